"""The replay of recorded rollouts: what it counts, what it refuses, and that it equals live."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bench_replay
import espo_rl.replay.command as command
from bench_replay import make_rollouts
from espo_gateway.stop import regret
from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.replay import scores
from espo_gateway.stop.rules import BETA, Gate, threshold_of
from espo_gateway.stop.told import SourceName
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.traces import cross_fit
from espo_gateway.traces.detection import difficulty
from espo_gateway.traces.judge import LOOKS, Replayed, fitted, fitted_elsewhere, replayed
from espo_gateway.traces.reader import TraceError
from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import RolloutSection
from espo_rl.record.rollout_files import rollouts_table, worth_note
from espo_rl.replay.command import main
from espo_rl.replay.source import Source, worth_of
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.types import EndReason, Problem, Request, Rollout
from tests.helpers.gateway import gateway_for


def dump(path: Path, rollouts: list[Rollout], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rollouts_table(0, rollouts, Gate(), more.pop("about", {}))
    for name, column in more.items():
        table = table.append_column(name, pa.array(column, pa.list_(pa.float64())))
    pq.write_table(table, path)
    return path


def live_cut(gate: Gate, rollout: Rollout, values: Any = None) -> int:
    """The cut of a stream under a gate; the last token of a completed one is exempt."""
    watch = Watch(gate, len(rollout.prompt_ids))
    for token, pair in enumerate(zip(rollout.logprobs, rollout.max_logprobs, strict=True), 1):
        last = rollout.end is not EndReason.LENGTH and token == len(rollout.logprobs)
        logprob, best = map(float, pair)
        if watch.push(logprob, best, last=last) is Verdict.ASK:
            watch.settle(token, gate.success(float(values[token - 1])))
    return watch.cut or 0


@pytest.mark.parametrize("block", [regret.BLOCK, 24 * 7])
def test_every_threshold_of_the_grid_cuts_where_the_live_stream_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(regret, "BLOCK", block)
    rollouts = make_rollouts(24, 60, seed=5)
    rng = np.random.default_rng(0)
    for rollout in rollouts[::3]:
        rollout.logprobs[rng.integers(0, len(rollout.logprobs), 4)] = np.nan
    rollouts[1].end = EndReason.LENGTH
    values = [rng.random(len(rollout.logprobs)) for rollout in rollouts]
    source = Source([dump(tmp_path / "a.parquet", rollouts, values=values)], "correct", None)
    learnt = fitted(source.read, 2)
    learnt.gate = dataclasses.replace(learnt.gate, critic_wrong=-1.0, critic_right=2.0)
    traces = next(iter(source.read()))
    done = replayed(source.read, learnt)
    assert len(done.rules) == 8
    stops = 0
    for judgement in done.rules.values():
        threshold = threshold_of(judgement.gate.rule)
        for row, rollout in enumerate(rollouts):
            estimator = learnt.folds[traces.keys[row] % 2]
            for place, limit in enumerate(threshold.grid):
                gate = threshold.set(judgement.gate, float(limit))
                gate = dataclasses.replace(gate, estimator=estimator)
                cut = live_cut(gate, rollout, values[row] if gate.needs_critic else None)
                assert judgement.cuts[row, place] == cut, (gate.rule, row, limit)
                stops += cut > 0
    assert stops > 100


def test_scores_are_looked_at_on_the_way(tmp_path: Path) -> None:
    """Lower is worse, whichever way the rule compares; nothing where nothing is decided."""
    rollouts = make_rollouts(24, 60, seed=5)
    longest = max(range(24), key=lambda row: len(rollouts[row].logprobs))
    rollouts[longest].logprobs[31] = np.nan
    source = Source([dump(tmp_path / "a.parquet", rollouts)], "correct", None)
    learnt = fitted(source.read, 2)
    traces = next(iter(source.read()))
    unseen, _ = learnt.values(traces)
    for name, judgement in replayed(source.read, learnt).rules.items():
        gate = judgement.gate
        compared = scores(gate, traces.recorded, unseen if gate.needs_estimator else None)
        if threshold_of(gate.rule).above:
            compared = -compared
        for token, found in zip(LOOKS, judgement.looked_at.T, strict=True):
            column = compared[:, token - 1] if token <= compared.shape[1] else np.full(24, np.nan)
            assert found == pytest.approx(column, rel=1e-12, nan_ok=True), (name, token)
            assert np.isfinite(found).any() == (token < 60)
        assert np.isnan(judgement.looked_at[longest, LOOKS.index(32)])


@pytest.mark.slow
def test_other_processes_find_what_this_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [dump(tmp_path / f"{k}.parquet", make_rollouts(20, 40, k)) for k in range(7)]

    def done() -> tuple[Source, Replayed]:
        source = Source(paths, "correct", None)
        return source, replayed(source.read, fitted(source.read, 3))

    here, alone = done()
    monkeypatch.setattr("espo_rl.replay.source.APART", 0)
    there, apart = done()
    assert here.tokens == there.tokens > 0
    assert (alone.judged.prompts == apart.judged.prompts).all()
    for name, judgement in alone.rules.items():
        assert judgement.gate == apart.rules[name].gate
        assert (judgement.cuts == apart.rules[name].cuts).all()
        assert (judgement.levels == apart.rules[name].levels).all()
    paths.append(tmp_path / "damaged.parquet")
    paths[-1].write_text("no rollouts")
    with pytest.raises(TraceError, match=r"damaged\.parquet"):
        done()


def test_no_more_is_fitted_on_than_the_first_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [dump(tmp_path / f"{k}.parquet", make_rollouts(20, 40, k)) for k in range(2)]
    more = [dump(tmp_path / f"{k}.parquet", make_rollouts(20, 40, k)) for k in (2, 3)]
    monkeypatch.setattr(cross_fit, "MAX_FITTED", 40)
    first, all_of = (
        fitted(Source(paths, "correct", None).read, 2) for paths in (few, [*few, *more])
    )
    assert first.folds == all_of.folds
    assert first.gate.statistics != all_of.gate.statistics


async def test_the_replay_of_a_shadow_rollout_cuts_where_the_gateway_does(tmp_path: Path) -> None:
    tokens = [Token("a", id=1, logprob=-0.1 - (k > 5) * 8.0, max_logprob=-0.1) for k in range(12)]
    limit = float(BETA.grid[60])
    gate = Gate(rule="regret-only", beta=limit)
    async with (
        FakeServer(lambda body: Script(tokens)) as server,
        gateway_for(server, gate=gate_to_json(gate), attempts=1) as gateway,
        Collector(
            gateway.url, "fake", Prompter(make_tokenizer(), chat=False), RolloutSection(retries=1)
        ) as collector,
    ):
        problem = Problem("p", "1", "1")
        cut, whole = await collector.collect(
            [Request(problem, 0, "enforce"), Request(problem, 1, "shadow")], temperature=1.0
        )
    assert cut.end is EndReason.EARLY_STOP
    assert 0 < cut.kept < len(whole.token_ids) == 12
    whole.correct = False
    others = make_rollouts(40, 30)
    learnt = fitted(Source([dump(tmp_path / "o.parquet", others)], "correct", None).read, 2)
    learnt.gate = dataclasses.replace(learnt.gate, statistics=gate.statistics)
    path = dump(tmp_path / "w.parquet", [whole, *others])
    done = replayed(Source([path], "correct", None).read, learnt)
    assert done.rules["regret-only"].cuts[0, 60] == cut.kept


def probed(rollouts: list[Rollout], every: int = 4) -> list[Rollout]:
    """The same with what a probe said of them: more the further they have come."""
    rng = np.random.default_rng(0)
    for rollout in rollouts:
        length = len(rollout.token_ids)
        rollout.probes = [
            [token, *(rng.normal(-2.0 * (not rollout.correct) * token / length, 1.0, 3))]
            for token in range(every, length, every)
        ]
    return rollouts


@pytest.mark.parametrize(("price", "pays"), [(0.5, True), (1000.0, False)])
def test_the_price_of_asking_is_in_all_that_is_said_to_be_saved(
    tmp_path: Path, price: float, pays: bool
) -> None:
    source = Source([dump(tmp_path / "a.parquet", probed(make_rollouts(400, 80)))], "correct", None)
    done = replayed(source.read, fitted(source.read, 2), [fitted(source.read, 2, ("probe",), 4)])
    options = command.parse(["some", "--price", str(price), "--bootstrap", "2"])
    content, curves = command.report(done, options)
    tokens = [done.judged.lengths[rows].sum() for _, rows in difficulty(done.judged)]
    for name, rule in content["rules"].items():
        chosen = rule["recommended"]
        if chosen["threshold"] is None:
            continue
        assert chosen["saved"][0] == curves[name].saved[: chosen["grid_place"] + 1, 0].max() > 0
        bins = [part["saved"][0] for part in rule["by_difficulty"]]
        assert np.average(bins, weights=tokens) == pytest.approx(chosen["saved"][0])
    chosen = content["rules"]["success-probability + probe"]["recommended"]
    assert (chosen["threshold"] is not None) == pays
    assert pays or "saves anything" in chosen["reason"]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_rollouts_that_were_not_asked_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str
) -> None:
    dump(tmp_path / f"{names[0]}.parquet", make_rollouts(60, 40, 1))
    dump(tmp_path / f"{names[1]}.parquet", probed(make_rollouts(60, 40, 2)))
    out = tmp_path / "out"
    assert main([str(tmp_path), "--output", str(out), "--bootstrap", "2"]) == 0
    assert "60 of 120 rollouts carry nothing of 'probe'" in capsys.readouterr().out
    assert "success-probability + probe" in json.loads((out / "replay.json").read_text())["rules"]


def test_rollouts_without_a_critics_values_are_told_of_and_its_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(tmp_path / "a.parquet", make_rollouts(60, 40, 1))
    valued = make_rollouts(60, 40, 2)
    values = [
        np.full(len(rollout.token_ids), 0.7 if rollout.correct else 0.3) for rollout in valued
    ]
    dump(tmp_path / "b.parquet", valued, values=values)
    assert main([str(tmp_path), "--output", str(tmp_path / "out"), "--bootstrap", "2"]) == 0
    told = capsys.readouterr().out
    assert "60 of 120 rollouts carry nothing of 'critic'" in told
    assert "the rules with a critic's values save before its cost" in told
    rules = json.loads((tmp_path / "out" / "replay.json").read_text())["rules"]
    assert {"success-probability + critic", "value-gated (stream) + critic"} < rules.keys()
    source = Source([tmp_path], "correct", None)
    critic = replayed(source.read, fitted(source.read, 2)).rules["value-only (critic)"]
    assert np.isfinite(critic.levels).tolist() == [False] * 60 + [True] * 60


@pytest.mark.parametrize("said", [None, math.nan])
def test_a_probe_that_never_answered_takes_nothing_from_the_other_rules(
    tmp_path: Path, said: Any
) -> None:
    rollouts = make_rollouts(60, 40)
    for rollout in rollouts:
        rollout.probes = [[4.0, -1.0, said, -1.0]]
    path = dump(tmp_path / "a.parquet", rollouts)
    assert main([str(path), "--output", str(tmp_path), "--bootstrap", "2"]) == 0
    assert len(json.loads((tmp_path / "replay.json").read_text())["rules"]) == 6


@pytest.mark.parametrize("sources", [("probe",), ("critic",), ("critic", "probe")])
def test_questions_and_cuts_are_those_of_a_live_stream_that_is_told_what_was_recorded(
    tmp_path: Path, sources: tuple[SourceName, ...]
) -> None:
    rollouts = probed(make_rollouts(24, 60, seed=5), 2)
    for rollout in rollouts[::2]:
        rollout.probes = rollout.probes[::2]
    values = [(one.logprobs - one.max_logprobs).cumsum() + bool(one.correct) for one in rollouts]
    path = dump(tmp_path / "a.parquet", rollouts, values=values)
    source = Source([path], "correct", None)
    told = fitted(source.read, 2, sources, 2)
    assert told.free is not None
    keys = next(iter(source.read())).keys
    found = 0
    for name, judgement in replayed(source.read, fitted(source.read, 2), [told]).rules.items():
        if "+" not in name:
            continue
        assert (judgement.asked is not None) == ("probe" in sources)
        threshold = threshold_of(judgement.gate.rule)
        for row, place in np.ndindex(24, 12):
            limit, fold = threshold.grid[10 * place], keys[row] % 2
            gate = threshold.set(judgement.gate, float(limit))
            gate = dataclasses.replace(gate, estimator=told.folds[fold], free=told.free.folds[fold])
            cut, asked = live_told(gate, rollouts[row], values[row])
            assert judgement.cuts[row, 10 * place] == cut, (name, row, limit)
            if judgement.asked is not None:
                assert judgement.asked[row, 10 * place] == asked, (name, row, limit)
            found += cut > 0
    assert found > 50


def live_told(gate: Gate, rollout: Rollout, values: Any) -> tuple[int, int]:
    """The cut, and how many questions a probe had answered by then."""
    watch, asked = Watch(gate, len(rollout.prompt_ids)), 0
    said = {int(token): numbers for token, *numbers in rollout.probes}
    for token, pair in enumerate(zip(rollout.logprobs, rollout.max_logprobs, strict=True), 1):
        last = token == len(rollout.logprobs)
        if watch.push(*map(float, pair), last=last) is Verdict.ASK:
            asked += token in said
            answers: Any = {"critic": [values[token - 1]]}
            answers |= {"probe": said[token]} if token in said else {}
            watch.settle(token, watch.valued(token, answers))
        if watch.cut is not None:
            break
    return watch.cut or 0, asked


def test_the_command_leaves_table_numbers_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rollouts = make_rollouts(400, 80)
    rollouts[0].end, rollouts[0].correct = EndReason.EARLY_STOP, None
    rollouts[1].end, rollouts[1].audited = EndReason.EARLY_STOP, True
    dump(run / "rollouts" / "step-00000001.parquet", rollouts)
    out = tmp_path / "out"
    assert main([str(run), "--output", str(out), "--bootstrap", "20"]) == 0
    shown = capsys.readouterr().out
    assert "399 full rollouts of 100 prompts" in shown
    assert "1 left out" in shown
    content = json.loads((out / "replay.json").read_text())
    success = content["rules"]["success-probability"]
    assert success["auc"][1] > content["rules"]["random"]["auc"][0]
    assert success["recommended"]["gate"]["rule"] == "success-probability"
    assert "at most" in success["recommended"]["reason"]
    assert content["running_at"]["32"] == 399
    assert content["rules"]["length"]["auc_at"]["32"] == [0.5, 0.5, 0.5]
    assert success["auc_at"]["48"][1] > 0.5
    assert {part["bin"] for part in success["by_difficulty"]} <= {
        *("never right", "right up to 1/3", "1/3 to 2/3", "over 2/3", "always right")
    }
    with open(out / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 121
    assert (out / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_the_cut_ones_are_not_left_out_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = make_rollouts(60, 40)
    rollouts[0].end, rollouts[0].correct = EndReason.EARLY_STOP, None
    assert main([str(dump(tmp_path / "a.parquet", rollouts)), "--output", str(tmp_path)]) == 1
    assert "1 of 60 traces were cut and none" in capsys.readouterr().err


def test_audited_rollouts_stand_for_the_stopped_ones(tmp_path: Path) -> None:
    rollouts = make_rollouts(60, 40)
    for rollout in rollouts[:9]:
        rollout.end, rollout.correct, rollout.kept = EndReason.EARLY_STOP, None, 5
    for rollout in rollouts[6:9]:
        rollout.audited, rollout.correct = True, False
    source = Source([dump(tmp_path / "a.parquet", rollouts)], "correct", None)
    done = replayed(source.read, fitted(source.read, 2))
    assert done.left_out == 6
    assert done.judged.weights.tolist() == [3.0] * 3 + [1.0] * 51


def test_an_estimator_of_another_run_judges_all(tmp_path: Path) -> None:
    here, there = (
        Source([dump(tmp_path / f"{seed}.parquet", make_rollouts(60, 40, seed))], "correct", None)
        for seed in (1, 2)
    )
    learnt = fitted_elsewhere(there.read)
    assert learnt.folds == [learnt.gate.estimator]
    own, other = (replayed(here.read, fit) for fit in (fitted(here.read, 2), learnt))
    name = "success-probability"
    assert (own.rules[name].levels != other.rules[name].levels).any()
    # What the written gate would do to the rollouts that it was fitted on, too.
    assert (own.rules[name].rehearsed != own.rules[name].levels).any()
    assert (other.rules[name].rehearsed == other.rules[name].levels).all()


def test_another_run_is_not_asked_about_prompts_that_it_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, other = make_rollouts(60, 40), make_rollouts(60, 40, 1)
    here = dump(tmp_path / "here.parquet", both)
    there = dump(tmp_path / "there.parquet", [*both[:8], *other])
    flags = ["--output", str(tmp_path / "out"), "--bootstrap", "2"]
    assert main([str(here), "--fit-on", str(there), *flags]) == 0
    assert "8 of its 68 rollouts are left out, as their 2 prompts" in capsys.readouterr().out
    assert main([str(here), "--fit-on", str(here), *flags]) == 1
    assert "--fit-on: all of its prompts are among those" in capsys.readouterr().err


def test_a_single_prompt_is_nothing_to_judge_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dump(tmp_path / "a.parquet", make_rollouts(40, 20)[8:12])
    assert main([str(path), "--output", str(tmp_path / "out")]) == 1
    assert "all of one prompt" in capsys.readouterr().err


def outcomes(rollouts: list[Rollout], correct: bool | None) -> list[Rollout]:
    return [dataclasses.replace(rollout, correct=correct) for rollout in rollouts]


@pytest.mark.parametrize("correct", [None, True, False])
def test_outcomes_that_tell_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], correct: bool | None
) -> None:
    path = dump(tmp_path / "a.parquet", outcomes(make_rollouts(20, 20), correct))
    other = dump(tmp_path / "b.parquet", make_rollouts(40, 20))
    assert main([str(path), "--output", str(tmp_path / "out")]) == 1
    assert "nothing to tell apart" in capsys.readouterr().err
    assert main([str(path), "--fit-on", str(other), "--output", str(tmp_path / "out")]) == 1
    said = {None: "has an outcome", True: "are right", False: "are wrong"}[correct]
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outcomes_of_a_file_are_not_those_of_a_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dump(tmp_path / "a.parquet", make_rollouts(40, 20))
    traces, known = tmp_path / "traces.jsonl", tmp_path / "outcomes.jsonl"
    trace = {"id": "a", "logprobs": [-1.0], "max_logprobs": [0.0], "end": "completed"}
    traces.write_text(json.dumps(trace))
    known.write_text('{"id": "a", "correct": true}\n')
    for inputs in ([path], [traces, path], [traces, "--fit-on", path]):
        told = ["--outcomes", str(known), "--output", str(tmp_path / "out")]
        assert main([*map(str, inputs), *told]) == 1
        assert "a.parquet: --outcomes has no effect" in capsys.readouterr().err


def test_a_folder_without_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no rollouts" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fit-on", "other", "--folds", "3"], "--folds has no effect with --fit-on"),
        (["--critic-worth", "-inf", "1"], "--critic-worth"),
        (["--critic-worth", "nan", "1"], "--critic-worth"),
        (["--price", "-3"], "--price must be a number of at least 0"),
        (["--price", "nan"], "--price must be a number of at least 0"),
        (["--ask-every", "0"], "--ask-every must be a number of at least 1"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["some", *arguments])
    assert said in capsys.readouterr().err


def test_a_mixture_of_recipes_is_said(tmp_path: Path) -> None:
    for name in "ab":
        dump(tmp_path / f"{name}.parquet", make_rollouts(2, 9), about={"espo.recipe": name})
    assert "2 recipes" in Source([tmp_path], "correct", None).warnings()[0]
    assert not Source([tmp_path / "a.parquet"], "correct", None).warnings()


def test_the_files_say_of_which_rewards_their_v_are(tmp_path: Path) -> None:
    some = make_rollouts(2, 9)
    values = [np.zeros(len(one.token_ids)) for one in some]
    for name, worth in (("a", (0.0, 1.0)), ("b", (-1.0, 2.0)), ("c", None)):
        about = {} if worth is None else worth_note(*worth)
        dump(tmp_path / f"{name}.parquet", some, about=about, values=values)
    dump(tmp_path / "none.parquet", some, about=worth_note(5.0, 6.0))  # no V, so no matter

    def read(*names: str) -> tuple[float, float]:
        paths = [tmp_path / f"{name}.parquet" for name in names]
        return worth_of(paths)

    assert read("a", "none", "c") == (0.0, 1.0)
    assert read("c", "none") == (-1.0, 1.0)
    with pytest.raises(TraceError, match=r"\[-1.0, 2.0\] and \[0.0, 1.0\].*--critic-worth"):
        read("a", "b")


def test_v_of_other_rewards_gives_the_same_cuts(tmp_path: Path) -> None:
    full, found = make_rollouts(60, 40, 2), []
    for name, right in (("a", 1.0), ("b", 3.0)):
        values = [np.full(40, right if one.correct else -1.0)[: len(one.token_ids)] for one in full]
        dump(tmp_path / name / "x.parquet", full, about=worth_note(-1.0, right), values=values)
        output = tmp_path / f"{name}-out"
        assert main([str(tmp_path / name), "--output", str(output), "--bootstrap", "2"]) == 0
        found.append(json.loads((output / "replay.json").read_text())["rules"])
    assert found[0]["value-only (critic)"] == found[1]["value-only (critic)"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens() -> None:
    def peak(rollouts: int) -> float:
        command = [sys.executable, bench_replay.__file__, str(rollouts), "--tokens", "2000"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        return float(json.loads(done.stdout)["peak_megabytes"])

    # 1,536 rollouts more: 37 MB of logprobs alone, if all were kept.
    assert peak(2048) < peak(512) * 1.25
