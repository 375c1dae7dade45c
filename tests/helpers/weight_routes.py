"""A server that only writes down what it is asked about weights, and answers like vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

Behaviour = Callable[[web.Request], web.Response | Awaitable[web.Response]]


class Recorder:
    """Answers like vLLM and notes the routes; `behaviour` may replace a route's answer."""

    def __init__(self) -> None:
        self.routes: list[str] = []
        self.client_ports: list[int] = []
        self.seen: dict[str, object] = {}
        self.behaviour: dict[str, Behaviour] = {}
        self.url = ""
        self.probe_logprob = -1.0
        self.version = "1"
        self.workers = 1
        self.checksums: dict[str, str] = {}
        #: V of a prefix: its last token
        self.pooled: Callable[[list[int]], float | None] = lambda prefix: float(prefix[-1])

    async def handle(self, request: web.Request) -> web.Response:
        self.routes.append(request.path)
        assert request.transport is not None
        self.client_ports.append(request.transport.get_extra_info("peername")[1])
        self.seen[request.path] = await request.json() if request.can_read_body else None
        if behaviour := self.behaviour.get(request.path):
            answer = behaviour(request)
            return answer if isinstance(answer, web.Response) else await answer
        entry = {str(token): {"logprob": self.probe_logprob} for token in range(32)}
        prefixes = (await request.json())["input"] if request.path == "/pooling" else []
        answers: dict[str, object] = {
            "/reset_prefix_cache": {"success": True},
            "/weight_info": {"weight_version": self.version},
            "/get_world_size": {"world_size": self.workers},
            "/weight_checker": {"checksums": self.checksums},
            "/v1/models": {"data": [{"id": "policy"}]},
            "/pooling": {"data": [{"data": [self.pooled(prefix)]} for prefix in prefixes]},
            "/v1/completions": {"choices": [{"prompt_logprobs": [None, entry, entry]}]},
        }
        return web.json_response(answers.get(request.path, {}))


@asynccontextmanager
async def serving() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", recorder.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    recorder.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield recorder
    await runner.cleanup()


#: The routes of one update by files, in order.
UPDATE = [
    "/init_weight_transfer_engine",
    "/pause",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


def fail(status: int) -> Callable[[web.Request], web.Response]:
    return lambda _: web.Response(status=status, text="the reason")
