"""Rollouts on disk: what is written comes back, the folder stays bounded, a failure is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.regret import RegretStatistics
from espo_gateway.stop.rules import Gate
from espo_gateway.traces.judge import survey
from espo_gateway.traces.reader import read_traces
from espo_rl.config import Recipe, load_recipe
from espo_rl.record.log_errors import LogError
from espo_rl.record.rollout_files import SCHEMA, RolloutFiles, read_rollouts, recipe_hash
from espo_rl.types import EndReason, Problem, Rollout

anything = st.floats()  # NaN and infinities included
text = st.text(st.characters(exclude_categories=["Cs"]))
ids = st.lists(st.integers(0, 200_000), max_size=5)


finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def rollouts(draw: Any) -> Rollout:
    token_ids = draw(ids)
    of_tokens = st.lists(anything, min_size=len(token_ids), max_size=len(token_ids)).map(np.array)
    return Rollout(
        problem=Problem(draw(text), draw(text), draw(text)),
        prompt_ids=draw(ids),
        token_ids=token_ids,
        logprobs=draw(of_tokens),
        max_logprobs=draw(of_tokens),
        text=draw(text),
        end=draw(st.sampled_from(EndReason)),
        kept=draw(st.integers(0, len(token_ids))),
        audited=draw(st.booleans()),
        audited_right=draw(st.sampled_from(["whole", "cut", "failed"])),
        overshoot=draw(st.integers(0, 9)),
        gate_version=draw(st.integers(0, 10**6)),
        weights_version=draw(text),
        weights_changes=draw(st.lists(st.tuples(st.integers(0, 99), text), max_size=3)),
        correct=draw(st.none() | st.booleans()),
        reward=draw(st.floats(allow_nan=False)),
        group=draw(st.integers(0, 1000)),
        error=draw(text),
        history=draw(st.none() | finite),
        probes=draw(st.lists(st.lists(finite, min_size=4, max_size=4), max_size=3)),
        values=draw(st.none() | of_tokens),
    )


gates = st.builds(
    Gate,
    version=st.integers(0, 10**6),
    weights_version=text,
    rule=st.sampled_from(["none", "value-gated", "success-probability"]),
    value=st.just("stream"),
    statistics=st.builds(RegretStatistics, mean=finite, variance=finite.map(abs)),
    beta=st.floats(0.01, 100.0),
    p_star=st.floats(0.001, 0.999),
    estimator=st.builds(
        SuccessEstimator,
        weights=st.tuples(*[finite] * len(FEATURES)),
        bias=finite,
    ),
)


def recipe_for(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("arithmetic", [f"run.output={folder}", *overrides])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rollouts").iterdir())


def equal(one: Rollout, other: Rollout) -> bool:
    fields = dict(vars(one)), dict(vars(other))
    for name in ("logprobs", "max_logprobs", "values"):
        a, b = (values.pop(name) for values in fields)
        if a is None or b is None:
            assert a is b
            continue
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype == np.float64
    return fields[0] == fields[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batch=st.lists(rollouts(), max_size=4), gate=gates)
def test_what_is_written_comes_back(tmp_path: Path, batch: list[Rollout], gate: Gate) -> None:
    RolloutFiles(recipe_for(tmp_path)).write(3, batch, gate)
    read, read_gate = read_rollouts(tmp_path / "rollouts" / "step-00000003.parquet")
    assert len(read) == len(batch)
    assert all(equal(*pair) for pair in zip(read, batch, strict=True))
    assert [type(rollout.end) for rollout in read] == [EndReason] * len(batch)
    assert read_gate == gate


def a_rollout(tokens: int = 3, words: str = "") -> Rollout:
    rng = np.random.default_rng(tokens)
    return Rollout(
        problem=Problem("p1", "1+1", "2"),
        prompt_ids=[1, 2],
        token_ids=rng.integers(0, 50_000, tokens).tolist(),
        logprobs=rng.normal(size=tokens),
        max_logprobs=rng.normal(size=tokens),
        text=words,
        end=EndReason.COMPLETED,
        kept=tokens,
    )


def test_a_replay_reads_the_values_of_those_that_have_any(tmp_path: Path) -> None:
    told, untold = a_rollout(3), a_rollout(2)
    told.values = np.array([0.5, 0.25, 0.125])
    cut = dataclasses.replace(untold, end=EndReason.EARLY_STOP, correct=None)
    RolloutFiles(recipe_for(tmp_path)).write(1, [told, untold], Gate())
    RolloutFiles(recipe_for(tmp_path / "stopped")).write(1, [told, cut], Gate())
    RolloutFiles(recipe_for(tmp_path)).write(2, [untold], Gate())
    one, other = sorted((tmp_path / "rollouts").iterdir())
    (traces,) = read_traces([one], outcome="correct", known=None)
    np.testing.assert_array_equal(traces.recorded.critic, [[0.5, 0.25, 0.125], [np.nan] * 3])
    assert survey(traces).told["critic"] == 1
    (traces,) = read_traces([other], outcome="correct", known=None)
    assert traces.recorded.critic is None
    # Of one that was stopped nobody can be told, and nothing is judged.
    (traces,) = read_traces([*tmp_path.glob("stopped/*/*")], outcome="correct", known=None)
    assert survey(traces).told["critic"] == 2


def test_no_field_is_left_out() -> None:
    fields = {field.name for field in dataclasses.fields(Rollout)} - {"problem"}
    assert fields <= set(SCHEMA.names)


def test_files_of_before_are_read(tmp_path: Path) -> None:
    RolloutFiles(recipe_for(tmp_path)).write(1, [a_rollout()], Gate())
    path = tmp_path / "rollouts" / "step-00000001.parquet"
    table = pq.read_table(path)
    later = ["history", "probes", "opened", "grader_timed_out"]
    pq.write_table(table.drop_columns(later), path)
    ((read,), _) = read_rollouts(path)
    assert (read.opened, read.grader_timed_out) == ("", False)
    assert (read.history, read.probes) == (None, [])


def test_logprobs_are_exact(tmp_path: Path) -> None:
    rollout = a_rollout(100)
    RolloutFiles(recipe_for(tmp_path)).write(1, [rollout], Gate())
    ((read,), _) = read_rollouts(tmp_path / "rollouts" / "step-00000001.parquet")
    np.testing.assert_array_equal(read.logprobs, rollout.logprobs)


def test_a_text_without_utf8_is_no_reason_to_fail(tmp_path: Path) -> None:
    RolloutFiles(recipe_for(tmp_path)).write(1, [a_rollout(words="half \ud83d")], Gate())
    ((read,), _) = read_rollouts(tmp_path / "rollouts" / "step-00000001.parquet")
    assert read.text == "half ?"


def test_any_parquet_reader_opens_it(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    rollout = a_rollout()
    rollout.logprobs[1] = np.nan  # missing, but no null: whoever reads it computes with floats
    RolloutFiles(recipe).write(7, [rollout, rollout], Gate(version=2))
    path = tmp_path / "rollouts" / "step-00000007.parquet"
    assert pq.read_table(path).column("step").to_pylist() == [7, 7]
    file = pq.ParquetFile(path)
    logprobs = pq.read_table(path).column("logprobs").combine_chunks().values
    assert (logprobs.null_count, pc.is_nan(logprobs).to_pylist()) == (0, [False, True, False] * 2)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    about = file.schema_arrow.metadata
    assert about[b"espo.recipe"].decode() == recipe_hash(recipe)
    assert about[b"espo.version"]


def test_the_hash_tells_recipes_apart(tmp_path: Path) -> None:
    one, same, other = (recipe_for(tmp_path, f"run.seed={seed}") for seed in (1, 1, 2))
    assert recipe_hash(one) == recipe_hash(same) != recipe_hash(other)


def test_the_oldest_go_when_there_is_too_much(tmp_path: Path) -> None:
    RolloutFiles(recipe_for(tmp_path)).write(1, [a_rollout(10_000)], Gate())
    size = (tmp_path / "rollouts" / "step-00000001.parquet").stat().st_size
    limit = f"logs.rollouts_megabytes={2.5 * size / 1e6}"
    files = RolloutFiles(recipe_for(tmp_path, limit))
    for step in (2, 3, 4):
        files.write(step, [a_rollout(10_000)], Gate())
    assert names(tmp_path) == ["step-00000003.parquet", "step-00000004.parquet"]
    files.write(5, [a_rollout(40_000)], Gate())  # alone too much, yet it is the newest
    assert names(tmp_path) == ["step-00000005.parquet"]


def test_a_resumed_run_drops_what_comes_again(tmp_path: Path) -> None:
    files = RolloutFiles(recipe_for(tmp_path))
    files.drop_after(0)  # nothing there yet
    for step in (9, 10, 11):
        files.write(step, [a_rollout()], Gate())
    (tmp_path / "rollouts" / "step-00000008.tmp").touch()
    files.drop_after(10)
    assert names(tmp_path) == ["step-00000009.parquet", "step-00000010.parquet"]


def test_they_can_be_turned_off(tmp_path: Path) -> None:
    RolloutFiles(recipe_for(tmp_path, "logs.rollouts=false")).write(1, [a_rollout()], Gate())
    assert not (tmp_path / "rollouts").exists()


def test_a_failure_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(table: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"PAR1 and no more")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fill)
    with pytest.raises(LogError, match=r"step-00000001\.parquet: No space.*logs\.rollouts=false"):
        RolloutFiles(recipe_for(tmp_path)).write(1, [a_rollout()], Gate())
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["damaged", "cut", "other"])
def test_a_file_that_is_no_dump(tmp_path: Path, kind: str) -> None:
    RolloutFiles(recipe_for(tmp_path)).write(1, [a_rollout(1000)], Gate())
    path = tmp_path / "rollouts" / "step-00000001.parquet"
    whole = path.read_bytes()
    if kind == "damaged":
        path.write_bytes(whole[:50] + bytes(len(whole) - 300) + whole[-250:])
    elif kind == "cut":
        path.write_bytes(whole[:-20])
    else:
        pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(ValueError, match="holds no rollouts, or is damaged"):
        read_rollouts(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_rollouts(tmp_path / "step-00000001.parquet")
