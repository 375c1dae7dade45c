"""Audits: no prompt is left without a finished rollout, and each rollout's chance is as stated."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_rl.gate.audits import FEW, Audits


@given(st.floats(0.001, 1.0), st.integers(FEW, 40), st.integers(1, 30), st.integers(0, 99))
def test_every_prompt_has_a_finished_rollout(share: float, n: int, prompts: int, seed: int) -> None:
    audits = Audits.of(share, n)
    drawn = audits.draw(prompts * n, random.Random(seed))
    groups = [drawn[i * n : (i + 1) * n] for i in range(prompts)]
    assert {sum(group) for group in groups} == {audits.each}
    assert audits.each >= 1
    assert audits.share == audits.each / n
    assert abs(audits.share - share) <= max(1.0 / n, 0.5 / n + 1e-9)


@pytest.mark.parametrize("n", [4, 8])
def test_no_place_in_a_group_is_preferred(n: int) -> None:
    drawn = Audits.of(0.1, n).draw(n * 4000, random.Random(0))
    for place in range(n):
        assert sum(drawn[place::n]) / 4000 == pytest.approx(1 / n, abs=0.03)


@pytest.mark.parametrize(("share", "n"), [(0.1, 1), (0.1, 3), (0.0, 8)])
def test_few_rollouts_of_a_prompt_are_audited_by_chance(share: float, n: int) -> None:
    audits = Audits.of(share, n)
    assert (audits.share, audits.each) == (share, 0)
    assert sum(audits.draw(9000, random.Random(0))) / 9000 == pytest.approx(share, abs=0.02)
