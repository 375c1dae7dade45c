"""What a report shows of single rollouts: a row for its table, and g, z, threshold and V by token.

The numbers come from the gate that was stored with the rollout, through a `Watch` of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from espo_gateway.stop.estimate import probabilities
from espo_gateway.stop.replay import gate_logits
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.watch import Watch
from espo_rl.gate.outcomes import recorded_of
from espo_rl.record.run_folder import Row
from espo_rl.report.token_texts import Pieces, token_texts
from espo_rl.types import EndReason, Rollout

#: Characters of a problem that are shown.
LONGEST_TEXT = 4000


def row(rollout: Rollout, step: int, group: int) -> Row:
    """A line of the table. group: number of the step's gate among the report's."""
    return {
        "step": step,
        "gate": group,
        "prompt": _shown(rollout.problem.prompt),
        "answer": _shown(rollout.problem.answer),
        "end": str(rollout.end),
        "audited": rollout.audited,
        "correct": rollout.correct,
        "kept": rollout.kept,
        "tokens": len(rollout.token_ids),
        "overshoot": rollout.overshoot,
        "reward": round(rollout.reward, 4),
    }


def trace(rollout: Rollout, gate: Gate, tokenizer: Any | None, pieces: Pieces, longest: int) -> Row:
    """A rollout token by token; `start` is the number of tokens before those that are shown.

    longest: so many tokens are shown at most: around the cut of a stopped rollout, else the first.
    g is None where it is missing. threshold and value are single numbers where they do not change.
    probes: of each answer probe the token, and what it said (`told.TOLD`).
    """
    start = _start(rollout, longest)
    end = min(start + longest, len(rollout.token_ids))
    watch = Watch(gate, len(rollout.prompt_ids), decides=False, history=rollout.history)
    last = len(rollout.token_ids) if rollout.end is EndReason.COMPLETED else 0
    looks = []
    for place in range(end):
        watch.push(
            float(rollout.logprobs[place]),
            float(rollout.max_logprobs[place]),
            last=place + 1 == last,
        )
        if place >= start:
            looks.append(watch.look())
    regrets, zs, thresholds, values = zip(*looks, strict=True) if looks else ((), (), (), ())
    if gate.asks_estimate:
        # Of what was asked, as it was answered; unknown where nobody did.
        values = probabilities(gate_logits(gate, recorded_of([rollout])))[0, start:end].tolist()
    elif gate.source == "critic" and rollout.values is not None:
        values = gate.success(rollout.values)[start:end].tolist()
    shown: Row = {
        "start": start,
        "g": [_short(g) for g in regrets],
        "z": [_short(z) for z in zs],
        "threshold": _once([_short(threshold) for threshold in thresholds]),
        "value": _once([_short(value) for value in values]),
    }
    if probes := [probe for probe in rollout.probes if start < probe[0] <= end]:
        shown["probes"] = [[int(at), *map(_short, said)] for at, *said in probes]
    if tokenizer is None:
        shown["text"] = _shown(rollout.text)
    else:
        # From the first token, as the bytes of a character can lie on both sides of the start.
        texts = token_texts(tokenizer, rollout.token_ids[:end])[start:]
        shown["pieces"] = pieces.numbers(texts)
    return shown


def gate_row(gate: Gate) -> Row:
    """What the page says of a gate."""
    return {
        "rule": gate.rule,
        "version": gate.version,
        "source": gate.source,
        "compared": RULES[gate.rule].compared,
    }


def _start(rollout: Rollout, longest: int) -> int:
    if not rollout.stopped or len(rollout.token_ids) <= longest:
        return 0
    # Two thirds before the cut: what led to it.
    first = max(rollout.kept - 2 * longest // 3, 0)
    return min(first, len(rollout.token_ids) - longest)


def _once(values: Sequence[float | None]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)


def _short(value: float | None) -> float | None:
    """Four digits: more than can be seen."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " […]"
