"""What the controller learns of sources beside the stream: probes and the prompt's history."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from espo_gateway.stop.estimate import probabilities
from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import estimated, first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Verdict, Watch
from espo_rl.config import Stopping
from espo_rl.gate.audits import Audits
from espo_rl.gate.batch_gates import StopController
from espo_rl.gate.history import History
from espo_rl.gate.outcomes import recorded_of
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.simulated import LENGTH, judged, simulate

EVERY = 8


def blind(count: int, seed: int, gate: Gate) -> list[Rollout]:
    """Rollouts whose tokens tell nothing, and whose probes tell all once they have failed."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for number, rollout in enumerate(simulate(count, seed)):
        failed = rng.integers(0, LENGTH) if not rollout.correct else LENGTH
        flat = rng.normal(-0.3, 0.05, LENGTH)
        probes = [
            [float(t), *(-6.0 if t > failed else -1.0) + rng.normal(0, 0.4, 3)]
            for t in gate.schedule.tokens(LENGTH - 1)
        ]
        rollouts.append(
            dataclasses.replace(
                rollout,
                problem=Problem(f"p{number % 10}", "p", "a"),
                logprobs=flat,
                max_logprobs=np.maximum(flat, -0.25),
                probes=[[float(n) for n in probe] for probe in probes],
            )
        )
    return rollouts


def stopped_by(gate: Gate, rollouts: list[Rollout], audit_share: float, seed: int) -> list[Rollout]:
    rng = random.Random(seed)
    seen = []
    for rollout, cut in zip(rollouts, first_stops(gate, recorded_of(rollouts)), strict=True):
        changes: dict[str, Any] = {}
        if cut:
            audited = rng.random() < audit_share
            changes = {"end": EndReason.EARLY_STOP, "kept": int(cut), "audited": audited}
            if not audited:
                changes["correct"] = None
        seen.append(dataclasses.replace(rollout, **changes))
    return seen


@pytest.mark.slow
def test_probes_decide_where_the_tokens_tell_nothing() -> None:
    settings: dict[str, Any] = {"ask_every": EVERY, "ask_growth": 0.0, "audit_share": 0.2}
    stopping = StopController(Stopping(sources=["probe"], **settings), 100, random.Random(0))
    free = StopController(Stopping(**settings), 100, random.Random(0))
    caught = {}
    for controller in (stopping, free):
        for batch in range(10):
            gate = controller.gate("w")
            full = blind(300, batch, stopping.gate("w"))
            wrong = np.array([not rollout.correct for rollout in full])
            seen = stopped_by(gate, full, 0.2, batch)
            stops = np.array([rollout.stopped for rollout in seen])
            controller.observe(seen, None)
            controller = pickle.loads(pickle.dumps(controller))  # as a checkpoint does
        caught[controller.config.asks] = stops[wrong].mean(), stops[~wrong].mean()
        if controller.config.asks:
            told = controller.metrics()
            assert told["explained_variance"] > told["explained_variance_free"] + 0.2
            assert gate.free is not None
            assert gate.estimator is not None
            assert gate.estimator.sources == ("probe",)
        else:
            assert "explained_variance_free" not in controller.metrics()
    assert caught[True][0] > 0.5
    assert caught[True][1] < 0.1
    assert caught[False][0] < 0.2


def watched(rollout: Rollout, gate: Gate, audited: bool) -> Rollout:
    """As it would have come from the gateway: only what was asked is known."""
    watch = Watch(gate, len(rollout.prompt_ids), audited=audited)
    said, asked = {int(probe[0]): probe for probe in rollout.probes}, []
    for logprob, largest in zip(rollout.logprobs, rollout.max_logprobs, strict=True):
        verdict = watch.push(logprob, largest, last=watch.tokens + 1 == len(rollout.token_ids))
        if verdict is Verdict.ASK:
            probe = said[watch.tokens]
            asked.append(probe)
            watch.settle(watch.tokens, watch.valued(watch.tokens, {"probe": probe[1:]}))
        if watch.cut is not None and not audited:
            break
    stop: dict[str, Any] = {}
    if watch.cut is not None:
        correct = rollout.correct if audited else None
        stop = {"end": EndReason.EARLY_STOP, "kept": watch.cut, "correct": correct}
    return dataclasses.replace(rollout, probes=asked, audited=audited and bool(stop), **stop)


def half_blind(prompts: int, rng: np.random.Generator) -> list[Rollout]:
    """Tokens tell of failure some, and probes more; 8 of each prompt."""
    rollouts = []
    for number in range(8 * prompts):
        wrong = bool(rng.random() > 0.35)
        logprobs = np.minimum(-rng.exponential(0.55 if wrong else 0.3, LENGTH), -0.01)
        probes = [
            [float(t), *(-1.0 - 1.2 * wrong * t / LENGTH + rng.normal(0, 0.8, 3))]
            for t in range(EVERY, LENGTH + 1, EVERY)
        ]
        [rollout] = simulate(1, number)
        rollout.logprobs, rollout.max_logprobs = logprobs, np.full(LENGTH, -0.01)
        rollout.correct, rollout.probes, rollout.group = not wrong, probes, number // 8
        rollouts.append(rollout)
    return rollouts


@pytest.mark.slow
def test_what_is_not_asked_about_spoils_no_estimate() -> None:
    """Fitted on answers alone, both would soon know only what the free one takes for lost."""
    audits = Audits.of(0.1, 8)
    config = Stopping(sources=["probe"], ask_every=EVERY, ask_growth=0.0, warmup_batches=3)
    stopping = StopController(config, 1000, random.Random(0), audits=audits)
    rng, shares = np.random.default_rng(0), []
    for _ in range(20):
        gate, full = stopping.gate("w"), half_blind(16, rng)
        drawn = stopping.draw_audits(len(full))
        seen = [watched(*one) for one in zip(full, [gate] * len(full), drawn, strict=True)]
        shares.append(np.mean([rollout.stopped for rollout in seen]))
        stopping.observe(seen, None)
    assert np.mean(shares[-5:]) > 0.8 * np.mean(shares[5:10]) > 0.2
    gate, fresh = stopping.gate("w"), half_blind(60, rng)
    assert gate.free is not None
    expected = probabilities(estimated(gate.free, recorded_of(fresh)))
    assert expected.mean() == pytest.approx(0.35, abs=0.05)
    # Where it looks no more it could never see that it should.
    assert gate.schedule.below > 0.02


def test_a_source_is_asked_only_where_the_free_estimate_leaves_a_decision() -> None:
    """Rollouts that the free estimate is sure of cost no question."""
    config = Stopping(sources=["history", "probe"], ask_every=EVERY, warmup_batches=1)
    stopping = StopController(config, 100, random.Random(0))
    for batch in range(6):
        full = blind(300, batch, stopping.gate("w"))
        for rollout in full:
            rollout.history = 4.0 if rollout.correct else -4.0
        stopping.observe(stopped_by(stopping.gate("w"), full, 0.1, batch), None)
    gate = stopping.gate("w")
    assert gate.free is not None
    assert gate.free.sources == ("history",)
    assert gate.schedule.every == EVERY
    assert 0.0 < gate.schedule.below < 0.5


def told_by_a_head(rollouts: list[Rollout]) -> list[Array]:
    """V of each token, between -1 and 1; it falls half-way where the rollout is wrong."""
    halves = np.repeat([0.0, 1.0], LENGTH // 2)
    return [
        (1.0 if one.correct else -1.0) * halves + np.random.default_rng(one.seed).normal(0, 0.2, 40)
        for one in rollouts
    ]


@pytest.mark.parametrize("every", [1, 8])
def test_what_a_head_says_is_read_without_thrift(every: int) -> None:
    """No estimate without it decides where it need not be asked, as asking costs nothing."""
    asked: dict[str, Any] = {"value_every": every, "ask_growth": 0.0}
    settings: dict[str, Any] = {"sources": ["critic"], "value_head": Path("h"), **asked}
    stopping = StopController(Stopping(**settings), 100, random.Random(0), worth=(-1.0, 1.0))
    assert stopping.needs_values
    shares = []
    for batch in range(10):
        gate = stopping.gate("w")
        assert (gate.schedule.every, gate.schedule.below) == (every, 1.0)
        assert gate.free is None
        full = blind(300, batch, gate)
        full = judged(full, told_by_a_head(full))
        wrong = np.array([not one.correct for one in full])
        seen = stopped_by(gate, full, 0.1, batch)
        stops = np.array([one.stopped for one in seen])
        stopping.observe(seen, None)
        stopping = pickle.loads(pickle.dumps(stopping))
        shares.append((stops[wrong].mean(), stops[~wrong].mean()))
    caught, lost = shares[-1]
    assert caught > 0.9
    assert lost < 0.1
    assert "explained_variance_free" not in stopping.metrics()
    assert stopping.metrics()["explained_variance"] > 0.3


@pytest.mark.parametrize("threshold", ["audit", "share"])
def test_the_v_of_a_head_that_gates_is_judged_by_what_it_said(threshold: str) -> None:
    """Not by a critic that is trained for the advantages beside it."""
    settings: dict[str, Any] = {"rule": "value-gated", "value": "critic", "threshold": threshold}
    stopping = StopController(
        Stopping(**settings, value_head=Path("h"), warmup="explained-variance"),
        100,
        random.Random(0),
        worth=(-1.0, 1.0),
    )
    full = blind(300, 0, stopping.gate("w"))
    assert stopping.needs_values
    told = [2.0 * bool(one.correct) - 1.0 + np.zeros(LENGTH) for one in full]
    stopping.observe(judged(full, told), 0.4, 0.01)
    assert stopping.explained_variance == 1.0
    assert stopping.warmup.done
    assert stopping.needs_values


def test_the_baseline_is_the_estimate_where_it_was_last_asked() -> None:
    config = Stopping(sources=["probe"], ask_every=EVERY, ask_growth=0.0)
    stopping = StopController(config, 100, random.Random(0), worth=(-1.0, 1.0))
    full = blind(300, 0, stopping.gate("w"))
    for value in stopping.baselines(full):  # nothing is known yet
        assert value.tolist() == [0.0] * LENGTH
    stopping.observe(full, None)
    new = blind(50, 1, stopping.gate("w"))
    new[0] = dataclasses.replace(new[0], end=EndReason.EARLY_STOP, kept=20, correct=None)
    values = stopping.baselines(new)
    assert [len(value) for value in values] == [20, *[LENGTH] * 49]
    # Token 9 is the first that is sampled after eight, and so after the first probe.
    for value in values:
        changes = (np.flatnonzero(np.diff(value)) + 1).tolist()
        assert changes == [t for t in (8, 16, 24, 32) if t < len(value)]
        assert (np.abs(value) <= 1.0).all()
    right = [value[-1] for value, rollout in zip(values, new, strict=True) if rollout.correct]
    wrong = [value[-1] for value, one in zip(values, new, strict=True) if one.correct is False]
    assert np.mean(right) > np.mean(wrong) + 0.5


def test_history_tells_of_a_prompt_what_its_rollouts_showed() -> None:
    history = History()
    assert history.log_odds("new") == 0.0
    rollouts = [
        dataclasses.replace(
            rollout, problem=Problem("easy" if i < 4 else "hard", "p", "a"), correct=i < 4
        )
        for i, rollout in enumerate(simulate(8, 0))
    ]
    history.add(rollouts, np.ones(8))
    assert history.log_odds("easy") > 1.0
    assert history.log_odds("hard") < -1.0
    assert abs(history.log_odds("new")) < 1e-9
    history.add(rollouts[4:5], np.array([10.0]))  # an audited one stands for many
    assert history.log_odds("hard") < -2.0
    assert math.isfinite(history.log_odds("hard"))


def test_a_source_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="sources"):
        Stopping.model_validate({"sources": ["telepathy"]})
