"""The base model's demonstrations: how often, where and by how much they slip."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from espo_rl.base_model.__main__ import main
from espo_rl.base_model.slips import BELIEF, Kind, slips
from espo_rl.tasks.arithmetic import Arithmetic

PAIRS = [(oldest, newest) for oldest in range(10) for newest in range(10)]


def misses(
    kind: Kind, seed: int, rounds: int = 200, error: float = 0.06
) -> dict[tuple[int, int], list[int]]:
    slip = slips(kind, random.Random(seed), error)
    return {pair: [slip(*pair) for _ in range(rounds)] for pair in PAIRS}


@pytest.mark.parametrize("kind", ["sampled", "believed"])
def test_as_many_slips_of_every_kind(kind: Kind) -> None:
    all_misses = [miss for of_pair in misses(kind, 0).values() for miss in of_pair]
    # 20,000 draws: three standard deviations are half a per cent, and whole pairs may be wrong
    assert sum(map(bool, all_misses)) / len(all_misses) == pytest.approx(0.06, abs=0.006)


def test_a_sampled_slip_may_be_any_but_is_nowhere_the_likelier_digit() -> None:
    for of_pair in misses("sampled", 0).values():
        assert Counter(of_pair).most_common(1)[0][0] == 0
        assert max(of_pair) > 1


def test_a_believed_slip_is_the_likelier_digit_on_the_same_pairs_for_every_seed() -> None:
    wrong = [
        {pair for pair, of_pair in misses("believed", seed).items() if any(of_pair)}
        for seed in (0, 1)
    ]
    assert wrong[0] == wrong[1]
    assert len(wrong[0]) == round(100 * 0.06 / BELIEF)
    for pair, of_pair in misses("believed", 2).items():
        assert set(of_pair) == ({0, 1} if pair in wrong[0] else {0})
        assert Counter(of_pair).most_common(1)[0][0] == (pair in wrong[0])


def test_a_seed_stands_for_the_same_demonstrations_as_ever() -> None:
    """The README's numbers are of one base: it must be made again by its seed."""
    task, rng = Arithmetic(), random.Random(0)
    shown = ""
    for error in (0.0, 0.06):
        slip = slips("sampled", rng, error)
        shown += "".join(task.solution(task.problem(rng).prompt, slip) for _ in range(50))
    assert hashlib.md5(shown.encode()).hexdigest() == "dfaa0b9711cf1f2bf6e8c96094d87055"


def test_a_damaged_base_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base_model.json").touch()
    monkeypatch.setattr("sys.argv", ["base_model", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "base_model.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min-steps", "5", "--max-steps", "4"], "--min-steps"),
        (["--max-steps", "27"], "--max-steps"),
        (["--error", "0.9"], "--error"),
        (["--kind", "hidden"], "--kind"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["base_model", "--out", str(tmp_path / "base"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
