"""The report of a run: what it draws, and which rollouts it shows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Verdict, Watch
from espo_rl.record.intervals import Share
from espo_rl.record.run_folder import RunFolderError, read_run
from espo_rl.report import command as report
from espo_rl.report.curves import panels, tiles
from espo_rl.report.rollouts import choose, fitting, rollouts
from espo_rl.report.token_texts import Pieces, load_tokenizer, token_texts
from espo_rl.report.traces import trace
from espo_rl.types import EndReason, Rollout
from tests.helpers.report import (
    ASKING,
    BATCH,
    ESTIMATOR,
    RUN_GATE,
    lines_of,
    make_run,
    metrics,
    one,
    opened_trace,
    with_tokenizer,
)

# -- curves ----------------------------------------------------------------------------------------


FALSE = ["stopping.false_positives=0.05"]


def test_curves_follow_from_the_log(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path / "run", settings=FALSE))
    assert lines["accuracy-step/training rollouts"]["x"] == [1, 2, 3]
    assert lines["accuracy-tokens/training rollouts"]["x"] == [100, 300, 600]
    evaluation = lines["accuracy-tokens/evaluation avg@1"]
    assert (evaluation["x"], evaluation["y"]) == ([0, 600], [0.25, 0.5])
    assert (evaluation["low"], evaluation["high"]) == ([0.125, 0.125], [0.5, 0.5])
    assert lines["tokens/without stopping"]["y"] == [150, None, 450]
    assert lines["tokens-total/sampled"]["y"] == [100, 300, 600]
    assert lines["tokens-total/without stopping"]["y"] == [150, 300, 800]
    assert lines["length/as cut"]["y"] == [10, 10, 10]
    assert lines["length/in full"]["y"] == [15, None, 15]
    audited = lines["cost/audited"]
    assert audited["y"] == [0.5, 0.5, 0.5]
    low, high = Share(3, 6).interval
    assert audited["low"][2] == pytest.approx(low, rel=1e-5)
    assert audited["high"][2] == pytest.approx(high, rel=1e-5)
    assert lines["cost/bound"]["y"] == [None, 0.2, 0.2]
    assert lines["cost/wished (at most)"]["y"] == [0.05] * 3
    assert lines["seconds/step"]["y"] == [3, 3, 3]
    assert "explained/critic" not in lines  # of which nothing is known


def test_false_positives_are_those_of_the_last_steps(tmp_path: Path) -> None:
    """So many as the threshold is judged by."""
    folder = make_run(tmp_path / "run", batch=[], steps=30, settings=FALSE)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:11]:
        row["rollout/audited_correct"] = 2
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    audited = lines_of(folder)["cost/audited"]["y"]
    assert audited[9] == 1.0
    assert audited[-1] == 0.5


def test_right_rollouts_lost_are_of_those_that_audits_show(tmp_path: Path) -> None:
    """One of two audited was right in each step, an eighth is audited, and 16 were right in all."""
    known: dict[str, Any] = {"rollout/right": 16.0, "stopping/on": 1.0}
    folder = make_run(tmp_path / "run", **known)
    lines = lines_of(folder)
    assert lines["cost/audited"]["y"] == [0.5, 0.5, 0.5]
    assert lines["cost/wished (at most)"]["y"] == [0.05] * 3


def test_nothing_was_wished_where_nothing_was_bounded(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path / "run", settings=["stopping.threshold=share"]))
    assert "cost/audited" in lines
    assert "cost/wished (at most)" not in lines


def test_a_run_that_goes_on_elsewhere_counts_what_came_before(tmp_path: Path) -> None:
    known: dict[str, Any] = {"rollout/tokens_total": 2000.0}
    folder = make_run(tmp_path / "run", **known)
    (folder / "summary.json").write_text(json.dumps({"tokens_without_stopping": 4000.0}))
    run = tiles(read_run(folder))
    assert (run["tokens"], run["without"], run["saved"]) == (2000, 4000, 0.5)
    assert lines_of(folder)["tokens-total/sampled"]["y"] == [2000] * 3


def test_a_run_of_before_bounded_false_positives(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", settings=FALSE)
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["stopping"]["right_lost"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert lines_of(folder)["cost/audited"]["y"] == [0.5, 0.5, 0.5]


def test_the_run_in_a_few_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    of_log = tiles(read_run(folder))
    assert (of_log["steps"], of_log["planned"], of_log["tokens"]) == (3, 3, 600)
    assert (of_log["before"], of_log["after"]) == (0.25, 0.5)
    assert (of_log["without"], of_log["saved"]) == (800, 0.25)
    assert (of_log["audited"], of_log["audited_correct"]) == (6, 3)
    summary = {"tokens_without_stopping": 1200.0, "tokens_without_stopping_half_width": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    of_summary = tiles(read_run(folder))
    assert (of_summary["without"], of_summary["saved"]) == (1200, 0.5)
    assert of_summary["half_width"] is None


def test_panels_of_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name)) for name in ("ppo", "espo")]
    [entropy] = [panel for panel in panels(runs) if panel["id"] == "entropy"]
    assert [line["run"] for line in entropy["lines"]] == [0, 1]
    assert list(report.named(runs)) == ["ppo", "espo"]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name / "run")) for name in ("ppo", "espo")]
    assert list(report.named(runs)) == ["ppo/run", "espo/run"]


# -- which rollouts --------------------------------------------------------------------------------


def test_all_audited_rollouts_are_shown_and_others_at_random(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", BATCH * 4))
    steps = []
    choice = choose(run, 48, lambda: steps.append(1))
    assert (choice.total, choice.audited, choice.audited_total) == (60, 24, 24)
    assert len(steps) == 3
    assert sum(map(len, choice.places.values())) == 48
    assert choose(run, 48) == choice
    few = choose(run, 10)
    assert few.audited == 5
    assert sum(map(len, few.places.values())) == 10
    everything = choose(run, 2000)
    assert [len(places) for places in everything.places.values()] == [20, 20, 20]


@pytest.mark.parametrize(
    ("lengths", "most", "cap"),
    [([10, 20, 30], 60, 30), ([10, 20, 30], 50, 20), ([10, 20, 30], 30, 10), ([], 9, 0)],
)
def test_long_rollouts_share_the_room(lengths: list[int], most: int, cap: int) -> None:
    assert fitting(lengths, most) == cap
    assert sum(min(length, cap) for length in lengths) <= most


def test_rollouts_for_the_page(tmp_path: Path) -> None:
    run = read_run(with_tokenizer(make_run(tmp_path / "run")))
    shown = rollouts(run, choose(run, 2000))
    assert shown["columns"]["step"] == [1] * 5 + [2] * 5 + [3] * 5
    assert shown["columns"]["correct"][:5] == [True, False, None, False, True]
    assert shown["columns"]["overshoot"][:5] == [0, 0, 5, 0, 0]
    assert shown["gates"][0]["compared"] == "z"
    first = opened_trace(shown["traces"][0])
    assert "".join(shown["pieces"][piece] for piece in first["pieces"]) == load_text(run, BATCH[0])
    assert shown["longest"] is None


def load_text(run: Any, rollout: Rollout) -> str:
    tokenizer = load_tokenizer(run)
    assert tokenizer is not None
    return tokenizer.decode(rollout.token_ids, skip_special_tokens=False)


# -- token by token --------------------------------------------------------------------------------

NOISE = np.random.default_rng(1).exponential(1.0, 60)


@pytest.mark.parametrize(
    "gate",
    [
        RUN_GATE,
        dataclasses.replace(RUN_GATE, rule="value-gated", value="stream", estimator=ESTIMATOR),
        dataclasses.replace(RUN_GATE, rule="success-probability", estimator=ESTIMATOR, p_star=0.7),
    ],
    ids=lambda gate: gate.rule,
)
def test_a_trace_is_what_the_gate_decided_by(gate: Gate) -> None:
    """A live stream under the stored gate stops where the drawn lines cross, and not before."""
    rollout = dataclasses.replace(one(tokens=60), logprobs=-0.1 - NOISE)
    watch, cut = Watch(gate, 3), None
    for place in range(60):
        told = rollout.logprobs[place], rollout.max_logprobs[place]
        if watch.push(*told) is Verdict.STOP:
            cut = place
            break
    assert cut is not None
    shown = trace(rollout, gate, None, Pieces(), 1000)
    assert shown["g"] == pytest.approx(list(NOISE), rel=1e-3)
    assert shown["z"][cut] == pytest.approx(watch.z, rel=1e-3)
    thresholds, values = (
        shown[name] if isinstance(shown[name], list) else [shown[name]] * 60
        for name in ("threshold", "value")
    )
    if gate.rule == "success-probability":
        crossed = [value < threshold for value, threshold in zip(values, thresholds, strict=True)]
    else:
        crossed = [z > bound for z, bound in zip(shown["z"], thresholds, strict=True)]
    # No decision is taken within the first tokens.
    assert crossed.index(True, gate.min_tokens - 1) == cut


def test_a_trace_of_what_was_asked() -> None:
    said = [[4, -1.0, -1.5, -0.1], [8, -3.0, -3.0, -0.2], [12, -0.5, -0.5, -0.3]]
    shown = trace(one(tokens=16, probes=said), ASKING, None, Pieces(), 1000)
    assert shown["probes"] == said
    known = {at: value for at, value in enumerate(shown["value"], 1) if value is not None}
    expected = {at: 1.0 / (1.0 + math.exp(-first - 0.5)) for at, first, *_ in said}
    assert known == pytest.approx(expected, rel=1e-3)
    # Of those after the cut, only what is shown.
    rollout = one(0, 100, EndReason.EARLY_STOP, kept=90, probes=[[4, *said[0][1:]], [80, 0, 0, 0]])
    assert trace(rollout, ASKING, None, Pieces(), 30)["probes"] == [[80, 0, 0, 0]]


def test_v_is_shown_as_it_was_told() -> None:
    """Of a head or a critic server: by itself where it gates, or by the estimate that reads it."""
    told = np.linspace(1.0, -1.0, 16)
    rollout = one(tokens=16, values=told)
    worth: dict[str, Any] = {"critic_wrong": -1.0, "critic_right": 1.0}
    gate = dataclasses.replace(RUN_GATE, rule="value-gated", value="critic", **worth)
    shown = trace(rollout, gate, None, Pieces(), 1000)
    assert shown["value"] == pytest.approx((told + 1.0) / 2.0, abs=1e-3)
    reads = SuccessEstimator((0.0,) * len(FEATURES) + (3.0,), 0.5, ("critic",))
    gate = dataclasses.replace(ASKING, estimator=reads, free=None)
    shown = trace(rollout, gate, None, Pieces(), 1000)
    assert shown["value"] == pytest.approx(1.0 / (1.0 + np.exp(-0.5 - 3.0 * told)), abs=1e-3)
    assert set(trace(one(tokens=16), gate, None, Pieces(), 1000)["value"] or [None]) == {None}


def test_a_trace_of_a_prompt_with_a_history() -> None:
    weights = (0.0,) * len(FEATURES) + (1.0,)
    gate = dataclasses.replace(ASKING, estimator=SuccessEstimator(weights, 0.0, ("history",)))
    shown = trace(
        one(tokens=4, history=2.0), dataclasses.replace(gate, free=None), None, Pieces(), 9
    )
    assert shown["value"] == pytest.approx(1.0 / (1.0 + math.exp(-2.0)), rel=1e-3)


def test_a_trace_of_numbers_that_are_missing() -> None:
    rollout = one(tokens=4)
    rollout.logprobs[1] = math.nan
    shown = trace(rollout, RUN_GATE, None, Pieces(), 10)
    assert shown["g"][1] is None
    assert shown["z"][1] == shown["z"][0]
    assert (shown["threshold"], shown["value"], shown["text"]) == (0.5, None, "xxxx")


@pytest.mark.parametrize(
    ("rollout", "start"),
    [
        (one(tokens=100), 0),
        (one(0, 100, EndReason.EARLY_STOP, kept=90), 70),
        (one(0, 100, EndReason.EARLY_STOP, kept=40), 20),
        (one(0, 100, EndReason.EARLY_STOP, kept=5), 0),
        (one(0, 25, EndReason.EARLY_STOP, kept=25), 0),
    ],
)
def test_a_long_rollout_is_shown_around_its_cut(rollout: Rollout, start: int) -> None:
    whole = trace(rollout, RUN_GATE, None, Pieces(), 1000)
    shown = trace(rollout, RUN_GATE, None, Pieces(), 30)
    assert shown["start"] == start
    end = min(start + 30, len(rollout.token_ids))
    assert shown["z"] == whole["z"][start:end]
    assert not rollout.stopped or start < rollout.kept <= end


def test_characters_of_several_tokens() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a é\n").ids
    assert token_texts(tokenizer, ids) == ["a", " ", None, "é", "\n"]


def test_a_tokenizer_of_the_model_or_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert load_tokenizer(read_run(folder)) is None
    model = with_tokenizer(tmp_path / "model") / "actor"
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["model"]["path"] = str(model)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert load_tokenizer(read_run(folder)) is not None


# -- the command -----------------------------------------------------------------------------------


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(RunFolderError, match=words):
            read_run(path)

    refused(tmp_path / "none", "does not exist: give a run's folder")
    refused(tmp_path, r"has no metrics\.jsonl")
    log = tmp_path / "metrics.jsonl"
    log.write_text("")
    refused(log, "is a file")
    log.write_text('{"step": 0, "evaluation/avg@1": null}\n')
    refused(tmp_path, "no training step yet")
    whole = json.dumps(metrics(1))
    log.write_text(f"{whole}\n{whole[:30]}\n{whole}\n")
    refused(tmp_path, "line 2 is no row of metrics")
    log.write_text(f"{whole}\n{whole[:30]}")  # a kill left it
    assert len(read_run(tmp_path).steps) == 1
    (tmp_path / "recipe.json").write_text("{")
    refused(tmp_path, r"cannot read .*recipe\.json")
    with pytest.raises(SystemExit, match=r"espo_rl\.report: .*none does not exist"):
        report.main([str(tmp_path / "none")])
    for arguments, words in (
        ([str(tmp_path), "--rollouts", "-1"], "--rollouts must be 0 or more"),
        ([str(tmp_path), str(tmp_path)], "given twice"),
        ([str(tmp_path / str(i)) for i in range(9)], "at most 8 runs"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert words in capsys.readouterr().err


def test_a_damaged_dump_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "rollouts" / "step-00000002.parquet").write_text("nothing")
    with pytest.raises(SystemExit, match=r"step-00000002\.parquet cannot be read"):
        report.main([str(folder)])
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"cannot write .*name another file with --output"):
        report.main([str(folder), "--output", str(tmp_path / "none" / "report.html")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
