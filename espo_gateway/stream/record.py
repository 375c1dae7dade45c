"""The record of a choice: what its client, the counters and the log are told of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.watch import Earlier, Watch
from espo_gateway.stream.followers import Step

#: How a choice ended; "aborted" until it has, and when the client left or the server failed.
End = Literal["completed", "length", "early_stop", "aborted"]

#: In the order of `Watch.look`.
_TRACED = ("g", "z", "threshold", "value")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the monitor saw and did, in each finished choice's `espo`.

    stopped: whether the choice was cut. audited: whether it was let finish in spite of it. cut: the
    token it was, or in shadow mode would have been, cut at. overshoot: tokens the server sent past
    the cut. missing: tokens without a usable logprob. reason: why the choice was not monitored.
    weights_version: of the weights that it began with. weights_changes: where others took over,
    after how many tokens, and their version.
    probes: of each token that an answer probe was asked about, the token and what it said.
    """

    rule: str | None = None
    mode: Mode
    audited: bool = False
    stopped: bool
    cut: int | None = None
    tokens: int = 0
    overshoot: int = 0
    missing: int = 0
    z: float | None = None
    threshold: float | None = None
    value: float | None = None
    beta: float | None = None
    gate_version: int = 0
    weights_version: str = ""
    weights_changes: list[tuple[int, str]] | None = None
    reason: str | None = None
    probes: list[list[float]] | None = None
    trace: list[Any] | None = None

    @classmethod
    def of(
        cls,
        gate: Gate,
        watch: Watch | None,
        *,
        mode: Mode,
        audited: bool,
        stopped: bool,
        reason: str | None,
        probes: Mapping[int, Sequence[float]] | None,
        trace: list[dict[str, Any]] | None,
        weights: Sequence[tuple[int, str]] = (),
    ) -> Record:
        """Of a choice under a gate. watch: None before its first token. weights: from which token
        on which they were; the gate's all along where nothing is said.
        """
        watch = watch or Watch(gate, 0)
        cut = watch.cut
        return cls(
            rule=gate.rule,
            mode=mode,
            audited=audited,
            stopped=stopped,
            cut=cut,
            tokens=watch.tokens,
            overshoot=watch.tokens - cut if stopped and cut is not None else 0,
            missing=watch.missing,
            z=watch.z if watch.tokens and reason is None and not math.isnan(watch.z) else None,
            threshold=watch.threshold,
            value=watch.value,
            beta=gate.beta,
            gate_version=gate.version,
            weights_version=weights[0][1] if weights else gate.weights_version,
            weights_changes=[*weights[1:]] or None,
            reason=reason,
            probes=None if probes is None else [[at, *said] for at, said in sorted(probes.items())],
            trace=trace[:cut] if trace is not None and stopped else trace,
        )

    def json(self) -> dict[str, Any]:
        """As a client gets it, without what is optional and not there."""
        fields = dict(vars(self))
        for name in ("weights_changes", "reason", "probes", "trace"):
            if fields[name] is None:
                del fields[name]
        return fields


class TokenTrace:
    """g, z, threshold and V of every token, for a request that wants them in its record.

    Goes on past the cut, as the answer does in shadow mode, where the watch that decides does not:
    so it has one of its own.
    """

    def __init__(self, gate: Gate, earlier: Earlier | None = None) -> None:
        self.tokens: list[dict[str, Any]] = []
        self._gate = gate
        self._earlier = earlier
        self.begin(0)

    def begin(self, prompt_tokens: int) -> None:
        self._watch = Watch(self._gate, prompt_tokens, decides=False, earlier=self._earlier)

    def push(self, step: Step) -> None:
        self._watch.push(step.logprob, step.max_logprob, confidence=step.confidence)
        self.tokens.append(dict(zip(_TRACED, self._watch.look(), strict=True)))

    def adopt(self, looks: Sequence[Sequence[float | None]]) -> None:
        """Take what a server that decides by itself has seen of every token."""
        self.tokens = [dict(zip(_TRACED, look, strict=True)) for look in looks]

    def settle(self, token: int, value: float) -> None:
        """Take what a critic has answered for a token: its V."""
        bound = RULES[self._gate.rule].bound(self._gate, value)
        self.tokens[token - 1].update(value=value, threshold=bound)
