"""Fake servers on real ports, for tests without a model: yours as much as the gateway's own.

`FakeServer` is an OpenAI/vLLM server that streams a script, or misbehaves by it. Nothing in it
waits for a clock: tokens come at once, or one for each `release`, and `until` awaits what the
server has seen. So a test is exact and takes milliseconds.

    from espo_gateway.testing import FakeServer, Script, Token

    script = Script([Token("a"), Token("b", logprob=-4.0, max_logprob=-0.1)], per_chunk=2)
    async with FakeServer(script) as server:
        ...                                     # talk to server.url
        await server.until(lambda: server.running == 0)
        assert server.aborted == 1 and server.generated < 10

In front of it, a gateway in the same process:

    from espo_gateway.app import running
    from espo_gateway.config import Config

    async with running(Config((server.url,), port=0, gate=b'{"rule": "regret-only"}')) as gateway:
        client = AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none")

What a script may ask for:

    Script(tokens, per_chunk=4, split=1)         # merged tokens, written byte by byte
    Script(tokens, status=503)                   # an error status
    Script(tokens, fault="reset", after=3)       # the connection drops after three tokens
    Script(tokens, content_type="text/plain")    # a stream under another name
    Script(tokens, rewrite=lambda chunk: {**chunk, "choices": [None]})  # one that lies

Every generation gets `server.script`, or the next of `server.queue`; a function in the place of a
script makes one from the request's body. `running`, `aborted`, `failed`, `finished` and `generated`
count what became of them: assert on the server's side too that nothing kept running.

`FakeCritic`, a critic server, is in `espo_gateway.testing.critic`.
"""

from espo_gateway.testing.fake import Fake
from espo_gateway.testing.script import Body, Fault, Script, Token
from espo_gateway.testing.server import FakeServer

__all__ = ["Body", "Fake", "FakeServer", "Fault", "Script", "Token"]
