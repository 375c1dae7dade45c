"""Problems of an evaluation, and a scripted server's answers to each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from espo_gateway.testing import Script, Token
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
