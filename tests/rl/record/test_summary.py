"""The numbers of a run's summary against brute force and known values."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from espo_rl.config import load_recipe
from espo_rl.gate.batch_gates import StopController
from espo_rl.record.intervals import ProblemMean
from espo_rl.record.provenance import machine, versions
from espo_rl.record.summary import Share, Summary
from espo_rl.record.totals import Totals
from espo_rl.types import EndReason, Problem, Rollout

NOTHING = np.empty(0)  # the summary never looks at logprobs


def rollout(length: int, end: EndReason = EndReason.COMPLETED, **fields: object) -> Rollout:
    """A rollout of `length` recorded tokens."""
    values: dict = {"kept": length, **fields}
    return Rollout(
        problem=Problem("1", "1", "1"),
        prompt_ids=[1],
        token_ids=[1] * length,
        logprobs=NOTHING,
        max_logprobs=NOTHING,
        text="",
        end=end,
        **values,
    )


def stopped(
    full: int, kept: int, *, audited: bool, overshoot: int = 0, correct: bool = False
) -> Rollout:
    """A rollout of `full` tokens that is stopped after `kept`; audited ones go on to their end."""
    if audited:
        return rollout(full, EndReason.EARLY_STOP, kept=kept, audited=True, correct=correct)
    return rollout(kept, EndReason.EARLY_STOP, overshoot=min(overshoot, full - kept))


def sampled(batch: list[Rollout]) -> int:
    """Tokens that the server counts for a batch."""
    return sum(rollout.generated for rollout in batch)


def simulated(rng: random.Random, count: int, audit_share: float) -> tuple[list[Rollout], int]:
    """Rollouts, some stopped, and the tokens that all of them would have had in full."""
    rollouts, without = [], 0
    for _ in range(count):
        full = 20 + int(rng.expovariate(1 / 60))
        without += full
        if rng.random() < 0.4:
            kept = rng.randint(1, full)
            audited = rng.random() < audit_share
            rollouts.append(stopped(full, kept, audited=audited, overshoot=rng.randint(0, 2)))
        else:
            rollouts.append(rollout(full, correct=rng.random() < 0.5))
    return rollouts, without


def totals_of(batch: list[Rollout]) -> Totals:
    totals = Totals()
    totals.add(batch, sampled(batch), gated=True)
    return totals


# -- tokens without stopping -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("count", "audit_share"), [(1200, 0.1), (500, 0.5), (500, 0.9)])
def test_tokens_without_stopping_lies_in_its_interval(count: int, audit_share: float) -> None:
    repeats, inside, errors = 400, 0, []
    for seed in range(repeats):
        batch, without = simulated(random.Random(seed), count, audit_share)
        totals = Totals()
        for start in range(0, count, 250):
            part = batch[start : start + 250]
            totals.add(part, sampled(part), gated=True)
        estimate, half_width = totals.tokens_without_stopping()
        inside += abs(estimate - without) <= half_width
        errors.append((estimate - without) / half_width)
    # 95 % of 400 ± three standard deviations of that count
    assert 0.95 * repeats - 13 <= inside <= 0.95 * repeats + 13
    # The errors lie on both sides: unbiased.
    assert abs(np.mean(errors)) < 0.1


@pytest.mark.parametrize("audits", [2, 4])
def test_the_interval_holds_with_very_few_audits(audits: int) -> None:
    """Normal lengths, so that Student's distribution is exact; 1.96 would give 0.70 and 0.86."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(600):
        full = 1000 + np.round(rng.normal(400, 100, size=40)).astype(int)
        batch = [stopped(n, 1000, audited=i < audits) for i, n in enumerate(full)]
        totals = totals_of(batch)
        estimate, half_width = totals.tokens_without_stopping()
        inside += abs(estimate - full.sum()) <= half_width
    assert 0.92 <= inside / 600 <= 0.98


def test_without_a_stop_nothing_is_estimated() -> None:
    totals = totals_of([rollout(10), rollout(7, EndReason.LENGTH)])
    assert totals.tokens_without_stopping() == (17.0, 0.0)


def test_when_all_stops_were_audited_nothing_is_estimated() -> None:
    totals = totals_of([stopped(30, 10, audited=True), stopped(50, 10, audited=True)])
    assert totals.tokens_without_stopping() == (80.0, 0.0)


def test_without_an_audit_it_is_unknown() -> None:
    totals = totals_of([stopped(30, 10, audited=False), rollout(5)])
    assert all(map(math.isnan, totals.tokens_without_stopping()))


def test_one_audit_gives_a_number_but_no_interval() -> None:
    totals = totals_of([stopped(30, 10, audited=True), stopped(99, 10, audited=False)])
    estimate, half_width = totals.tokens_without_stopping()
    assert estimate == 60.0
    assert math.isnan(half_width)


def test_overshoot_is_counted_once() -> None:
    """Every stopped rollout would have gone on by 20 tokens, two of which were sampled anyway."""
    totals = Totals()
    for _ in range(5):
        batch = [stopped(30, 10, audited=i < 2, overshoot=2) for i in range(6)]
        totals.add(batch, sampled(batch), gated=True)
    assert totals.tokens == 5 * (2 * 30 + 4 * 12)
    assert totals.overshoot == 5 * 4 * 2
    assert totals.tokens_without_stopping() == (5 * 6 * 30, 0.0)


def test_totals_are_sums_over_batches() -> None:
    totals = Totals()
    failed = rollout(0, EndReason.ERROR)
    totals.add([rollout(10), failed], 10, gated=False)
    totals.add([rollout(4), failed, stopped(30, 10, audited=True, correct=True)], 34, gated=True)
    assert (totals.rollouts, totals.gated, totals.stopped, totals.errors) == (3, 2, 1, 2)
    assert (totals.audited, totals.audited_correct, totals.tokens) == (1, 1, 44)


# -- Wilson's interval -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    share = Share(successes, trials)
    assert share.interval == pytest.approx((low, high), abs=1e-4)
    assert share.interval[0] <= share.value <= share.interval[1]


def test_share_of_nothing_is_unknown() -> None:
    assert math.isnan(Share(0, 0).value)
    assert all(map(math.isnan, Share(0, 0).interval))
    assert "unknown" in str(Share(0, 0))


# -- what is written and said ----------------------------------------------------------------------


def summary_of(*batches: list[Rollout], **overrides: object) -> Summary:
    recipe = load_recipe("arithmetic", [f"{key}={value}" for key, value in overrides.items()])
    summary = Summary(recipe)
    stopping = StopController(recipe.stopping, recipe.run.steps, random.Random(0))
    for batch in batches:
        summary.add(batch, sampled(batch), stopping, "success-probability")
    return summary


def strict(text: str) -> dict:
    """JSON without Python's NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_step_without_a_number_leaves_the_others() -> None:
    summary = summary_of()
    stopping = StopController(summary.recipe.stopping, 9, random.Random(0))
    for stopping.explained_variance in (0.4, math.nan, None, 0.6):
        summary.add([], 0, stopping, "success-probability")
    assert summary.as_dict()["explained_variance"] == pytest.approx(0.5)


def test_unknown_numbers_are_null(tmp_path: Path) -> None:
    written = strict(summary_of().write(tmp_path / "summary.json").read_text())
    unknown = ("accuracy_before", "accuracy_after", "stop_rate", "false_positive_rate")
    for key in (*unknown, "explained_variance"):
        assert written[key] is None, key
    assert written["accuracy_before_interval"] == [None, None]
    assert (written["tokens_generated"], written["tokens_without_stopping"]) == (0, 0.0)


def test_an_estimate_that_is_not_to_be_had_is_null(tmp_path: Path) -> None:
    summary = summary_of([stopped(30, 10, audited=False)])
    written = strict(summary.write(tmp_path / "summary.json").read_text())
    assert written["tokens_without_stopping"] is None
    assert written["tokens_without_stopping_half_width"] is None
    assert written["stop_rate"] == 1.0


def test_summary_holds_what_the_run_came_to(tmp_path: Path) -> None:
    batch = [
        *[stopped(40, 10, audited=True, correct=i == 0) for i in range(4)],
        *[stopped(40, 10, audited=False, overshoot=1) for _ in range(6)],
        *[rollout(20) for _ in range(10)],
    ]
    summary = summary_of(batch, **{"run.seed": 7})
    summary.accuracy = {"before": ProblemMean.of([0.25] * 4), "after": ProblemMean.of([0.75] * 4)}
    summary.seconds = {"rollout": 1.26}
    written = strict(summary.write(tmp_path / "summary.json").read_text())
    assert (written["accuracy_before"], written["accuracy_after"]) == (0.25, 0.75)
    assert written["tokens_generated"] == 4 * 40 + 6 * 11 + 200
    assert written["tokens_without_stopping"] == 600
    assert (written["stop_rate"], written["false_positive_rate"]) == (0.5, 0.25)
    assert (written["audited"], written["overshoot_tokens"], written["errors"]) == (4, 6, 0)
    assert (written["seed"], written["seconds"]) == (7, {"rollout": 1.3})
    assert written["versions"] == versions()
    assert written["machine"] == machine()
    assert {"python", "torch", "transformers", "numpy"} <= set(written["versions"])
    assert written["recipe"]["run"]["seed"] == 7


@pytest.mark.parametrize(
    "batch",
    [
        [],
        [rollout(5)],
        [stopped(30, 10, audited=False)],
        [stopped(30, 10, audited=True), stopped(30, 10, audited=False)],
        [rollout(0, EndReason.ERROR)],
    ],
    ids=["nothing", "no stop", "no audit", "one audit", "only errors"],
)
def test_the_text_says_unknown_rather_than_nan(batch: list[Rollout]) -> None:
    text = summary_of(batch).text()
    assert "unknown" in text
    assert "nan" not in text.lower()


def test_the_text_says_what_was_saved() -> None:
    batch = [stopped(100, 50, audited=i < 4) for i in range(20)]
    lines = dict(re.split("  +", line, maxsplit=1) for line in summary_of(batch).text().split("\n"))
    assert lines["tokens generated"] == "1,200"
    assert lines["tokens without stopping"].startswith("2,000 ± 0")
    assert lines["tokens saved"].startswith("40.0% ± 0.0%")
    assert lines["rollouts stopped"].startswith("100.0%")


def test_the_interval_of_the_saving_is_that_of_the_tokens() -> None:
    rng = random.Random(5)
    summary = summary_of(simulated(rng, 400, 0.2)[0])
    tokens = summary.totals.tokens
    without, half_width = summary.totals.tokens_without_stopping()
    assert summary.token_metrics() == {
        "tokens_total": summary.totals.tokens,
        "tokens_total_without_stopping": without,
    }
    ends = [1 - tokens / (without - half_width), 1 - tokens / (without + half_width)]
    (line,) = (row for row in summary.text().splitlines() if row.startswith("tokens saved"))
    saved, plus_minus = (float(word.rstrip("%,")) / 100 for word in line.split()[2:5:2])
    assert saved == pytest.approx(np.mean(ends), abs=0.01)
    assert plus_minus == pytest.approx((ends[1] - ends[0]) / 2, rel=0.1)


# -- the bound on false positives ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audited", "correct", "verdict"),
    [
        (258, 2, "met"),  # interval 0.2 % to 2.8 %
        (100, 5, "not shown"),
        (100, 20, "not met"),  # 13.3 % to 28.9 %
        (0, 0, "not shown"),
    ],
)
def test_whether_the_bound_was_kept(
    tmp_path: Path, audited: int, correct: int, verdict: str
) -> None:
    batch = [stopped(30, 10, audited=True, correct=i < correct) for i in range(audited)]
    summary = summary_of([*batch, rollout(5)], **{"stopping.false_positives": "0.05"})
    written = strict(summary.write(tmp_path / "summary.json").read_text())
    assert written["bound"] == {"of": "false-positives", "limit": 0.05, "confidence": 0.9}
    assert written["bound_kept"] == verdict
    (line,) = (row for row in summary.text().splitlines() if row.startswith("bound "))
    said = re.split("  +", line)[1].lower()
    assert said.startswith(f"false positives under 5.0%, {verdict}")
    assert ("nothing was audited" in line) == (audited == 0)


@pytest.mark.parametrize("override", ["stopping.threshold=share", "stopping.rule=none"])
def test_no_bound_where_none_was_to_be_kept(override: str) -> None:
    key, _, value = override.partition("=")
    summary = summary_of([stopped(30, 10, audited=True, correct=True)], **{key: value})
    assert summary.as_dict()["bound_kept"] is None
    assert not [row for row in summary.text().splitlines() if row.startswith("bound ")]


@pytest.mark.parametrize(
    ("finished", "audited", "verdict"),
    [
        (3000, 2, "met"),
        (3000, 0, "met"),
        (300, 2, "not shown"),
        (300, 12, "not met"),
        (0, 0, "not shown"),
    ],
)
def test_right_rollouts_lost_are_counted_in_those_that_audits_show(
    finished: int, audited: int, verdict: str
) -> None:
    """An eighth of what was stopped is audited, one of each prompt's rollouts, so an eighth of the
    finished is what they stand for."""
    batch = [stopped(30, 10, audited=True, correct=True) for _ in range(audited)]
    full = [dataclasses.replace(rollout(5), correct=True) for _ in range(finished)]
    settings = {"stopping.audit_share": "0.1", "rollout.n": "8"}
    summary = summary_of([*batch, *full], **settings)
    told = summary.as_dict()
    trials = finished / 8 + audited
    assert told["right_lost"] == (pytest.approx(audited / trials) if trials else None)
    assert (told["bound"]["of"], told["bound_kept"]) == ("right-lost", verdict)
    said = {"met": "met:", "not met": "NOT MET", "not shown": "not shown"}[verdict]
    assert f"right rollouts lost under 5.0%, {said}" in summary.text()


def test_staleness_and_restarts_are_said_where_there_are_any() -> None:
    recipe = load_recipe("arithmetic")
    summary, batch = Summary(recipe), [rollout(10)]
    stopping = StopController(recipe.stopping, recipe.run.steps, random.Random(0))
    summary.add(batch, 10, stopping, "none")
    assert "staleness" not in summary.text()
    assert "restarted" not in summary.text()
    summary.add(batch, 10, stopping, "none", staleness=1.0)
    summary.restarts = 2
    assert re.search(r"^staleness +0\.50 updates", summary.text(), re.MULTILINE)
    assert re.search(r"^servers restarted +2$", summary.text(), re.MULTILINE)
    assert (summary.as_dict()["staleness"], summary.as_dict()["restarts"]) == (0.5, 2)
