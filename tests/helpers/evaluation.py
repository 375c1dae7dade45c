"""Problems of an evaluation, and a scripted server's answers to each sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.gate_json import gate_to_dict
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import TOLD, SourceName
from espo_gateway.testing import FakeServer, Script, Token
from espo_rl.evaluate.arguments import parse
from espo_rl.evaluate.command import Command
from espo_rl.types import Problem
from tests.helpers.gateway import BAD, GOOD

PROBLEMS = [Problem(id=f"p{i}", prompt=f"{i}", answer=str(i)) for i in range(3)]
#: Stopped by the gate of the tests; right if it were not.
DOUBTFUL = Script([GOOD] * 6 + [BAD] * 4 + [Token("#", id=3), Token("0", id=3)])


def place(body: dict[str, Any]) -> tuple[int, int]:
    """Which sample of which problem a request asks for, when the seed is 0."""
    return divmod(body["seed"], 65_536)


def saying(text: str) -> Script:
    return Script([Token(character, id=1) for character in text])


def probe_answer(body: dict[str, Any], logprob: float = -0.5) -> Script:
    """What a server says to a question of the answer probe: each token asked about is so likely."""
    tops = [{f"token_id:{token}": logprob for token in body["logprob_token_ids"]}]

    def rewrite(answer: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"top_logprobs": tops, "token_logprobs": [-0.1]}
        answer["choices"][0] |= {"token_ids": [0], "logprobs": logprobs}
        return answer

    return Script([Token("a", id=0)], rewrite=rewrite)


Answers = Sequence[Sequence[str | Script]]


def answering(answers: Answers) -> Callable[[dict[str, Any]], Script]:
    """The script of each sample by problem and number; a text is said after some reasoning."""

    def script(body: dict[str, Any]) -> Script:
        index, number = place(body)
        answer = answers[index][number]
        return answer if isinstance(answer, Script) else saying(f"2+#1#{answer}")

    return script


ANSWERS = [["0", "7"], ["1", "1"], ["7", "7"]]


async def run(arguments: list[str], script: Any) -> FakeServer:
    """The command against a scripted server; what it was asked."""
    async with FakeServer(script) as server:
        await Command(parse([*arguments, "--url", server.url])).run()
    return server


def with_estimate(source: SourceName, **more: Any) -> str:
    """A gate whose estimate of success reads a source, and its weight, as JSON."""
    estimator = SuccessEstimator((0.0,) * (len(FEATURES) + len(TOLD[source])), 0.0, (source,))
    gate = Gate(rule="success-probability", value="stream", estimator=estimator, **more)
    return json.dumps(gate_to_dict(gate))
