"""The reference and the array code against a direct transcription of the equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.recorded import pad
from espo_gateway.stop.regret import MonitorConfig, RegretStatistics, smoothed_regret
from tests.gateway.stop.reference import RegretMonitor, surrogate_regret

regret = st.floats(0.0, 60.0)
streams = st.lists(st.lists(st.one_of(regret, st.none()), max_size=30), min_size=1, max_size=6)
statistics = st.builds(RegretStatistics, mean=st.floats(0, 3), variance=st.floats(0, 9))
configs = st.builds(
    MonitorConfig, smoothing=st.floats(0, 0.99), clip=st.floats(0.5, 20), delta=st.just(1e-6)
)


def transcribed_z(
    stream: Sequence[float | None], statistics: RegretStatistics, config: MonitorConfig
) -> list[float]:
    """Rows 3 and 4 as they are written."""
    z = 0.0
    out = []
    for g in stream:
        if g is not None:
            normalised = (g - statistics.mean) / math.sqrt(statistics.variance + config.delta)
            clipped = max(-config.clip, min(config.clip, normalised))
            z = config.smoothing * z + (1 - config.smoothing) * clipped
        out.append(z)
    return out


@given(streams, statistics, configs)
def test_z_follows_the_equations_and_the_replay_equals_the_live_stream(
    rows: list[list[float | None]], stats: RegretStatistics, config: MonitorConfig
) -> None:
    live = []
    for row in rows:
        monitor = RegretMonitor(stats, config)
        live.append([monitor.push(g) for g in row])
        assert live[-1] == pytest.approx(transcribed_z(row, stats, config), rel=1e-9, abs=1e-12)
    replayed = smoothed_regret(
        pad([[math.nan if g is None else g for g in row] for row in rows]), stats, config
    )
    for expected, z in zip(live, replayed, strict=True):
        assert z[: len(expected)].tolist() == expected  # to the last bit


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=20), st.floats(-5, 5))
def test_regret_is_the_distance_to_the_largest_logprob_whatever_the_normaliser(
    logprobs: list[float], shift: float
) -> None:
    chosen, largest = logprobs[0], max(logprobs)
    expected = largest - chosen
    assert surrogate_regret(chosen, largest) == expected
    assert surrogate_regret(chosen + shift, largest + shift) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bad", [None, math.nan, -9999.0, math.inf, -math.inf])
def test_a_bad_logprob_is_no_evidence(bad: float | None) -> None:
    assert surrogate_regret(bad, -0.1) is None
    assert surrogate_regret(-0.1, bad) is None


def test_rounding_never_makes_a_regret_negative() -> None:
    assert surrogate_regret(-0.1, -0.1000001) == 0.0


@given(st.lists(st.lists(regret, min_size=1, max_size=20), min_size=1, max_size=5))
def test_statistics_move_by_the_equations_from_the_second_batch_on(
    batches: list[list[float]],
) -> None:
    running = RegretStatistics(decay=0.9)
    mean, variance = np.mean(batches[0]), np.var(batches[0])
    for number, batch in enumerate(batches):
        running = running.updated(np.array([*batch, math.nan]))
        if number:
            mean = 0.9 * mean + 0.1 * np.mean(batch)
            variance = 0.9 * variance + 0.1 * np.var(batch)
        assert running.mean == pytest.approx(mean)
        assert running.variance == pytest.approx(variance)


def test_a_batch_without_a_single_number_leaves_the_statistics_alone() -> None:
    before = RegretStatistics(mean=1.0, variance=2.0, batches=3)
    assert before.updated(np.array([math.nan, math.nan])) == before
    assert before.updated(np.empty(0)) == before


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MonitorConfig(smoothing=1.0),
        lambda: MonitorConfig(clip=0.0),
        lambda: MonitorConfig(delta=0.0),
        lambda: RegretStatistics(decay=1.0),
        lambda: RegretStatistics(variance=-1.0),
    ],
)
def test_constants_out_of_range_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must"):
        wrong()
