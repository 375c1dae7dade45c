"""`python -m espo_gateway`: checks its servers, serves until SIGTERM or SIGINT, exits with 0."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine, Sequence

from espo_gateway.app import listen, running
from espo_gateway.config import Config, parse
from espo_gateway.critic import CriticServer
from espo_gateway.errors import GatewayError, UpstreamError
from espo_gateway.upstream import UpstreamPool

log = logging.getLogger("espo_gateway")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 0 after a signal, 1 with a message when it cannot start."""
    config = parse(arguments)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        _run(serve(config))
    except (GatewayError, OSError, TimeoutError) as error:
        sys.exit(f"espo_gateway: {error}")


def _run(coroutine: Coroutine[None, None, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(coroutine)
    else:
        uvloop.run(coroutine)


async def serve(config: Config) -> None:
    """Serve until a signal. Raises OSError, TimeoutError or GatewayError when it cannot start."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        # Taken before anything is waited for: a busy port is known at once.
        sock = listen(config.host, config.port)
    except OSError as error:
        raise OSError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
            "choose another with --port"
        ) from error
    check = asyncio.ensure_future(check_servers(config))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({check, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            check.result()
            async with running(config, sock=sock) as gateway:
                log.info("listening on %s, rule %s", gateway.url, gateway.gate.rule)
                await stopped
                log.info("stopping")
    finally:
        check.cancel()
        stopped.cancel()
        sock.close()


async def check_servers(config: Config) -> None:
    """Log what the servers serve; wait for them as long as configured.

    Raises TimeoutError when waiting was asked for and one still does not answer, UpstreamError when
    the critic answers but is none.
    """
    deadline = time.monotonic() + config.wait
    urls = [*config.upstreams, *([] if config.critic_url is None else [config.critic_url])]
    async with UpstreamPool(urls, connect_timeout=2.0) as pool:
        while True:
            answering = await pool.probe_all()
            silent = [s.url for s, a in zip(pool.servers, answering, strict=True) if not a]
            if not silent or time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.5)
        for server in pool.servers:
            if server.url in silent:
                continue
            models = await pool.models(server)
            names = ", ".join(str(model.get("id")) for model in models or ()) or "unknown"
            log.info("%s serves %s", server.url, names)
        critic = None if config.critic_url is None else pool.servers[-1].url
    if silent and config.wait:
        raise TimeoutError(f"no answer within {config.wait:g} s from {', '.join(silent)}")
    for url in silent:
        log.warning("%s does not answer yet", url)
    if critic is not None and critic not in silent:
        await check_critic(critic, config.critic_timeout)


async def check_critic(url: str, timeout: float) -> None:  # noqa: ASYNC109 (of its requests)
    """Ask for one value. Raises UpstreamError: a wrong address would else be met by every token."""
    async with CriticServer(url, timeout=timeout) as critic:
        try:
            await critic.value([0], [])
        except UpstreamError as error:
            raise UpstreamError(
                f"--critic {url} gives no values: {error}; start it with "
                "`python -m espo_gateway.vllm_plugin MODEL --critic`"
            ) from error


if __name__ == "__main__":
    main()
