"""Calibrating: what is recommended from some traces holds on others, or is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.threshold_control import Bound, Outcomes
from espo_gateway.testing import FakeServer, Script
from espo_gateway.traces import calibrate
from espo_gateway.traces.cross_fit import UNFITTED, CalibrationError
from espo_gateway.traces.reader import TraceError, read_outcomes, read_traces
from espo_gateway.traces.recommend import bounded_level, by_session
from espo_rl.config import load_recipe
from espo_rl.record.rollout_files import RolloutFiles, rollouts_table
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.gateway import BAD, GOOD, completion_body, gateway_for, post
from tests.helpers.simulated import LENGTH, censored, cuts, simulate


def line(rollout: Rollout, number: int, **fields: Any) -> dict[str, Any]:
    """A simulated rollout as `--record` writes it, with its outcome."""
    return {
        "request": f"r{number}",
        "id": f"cmpl-{number}",
        "index": 0,
        "prompt_tokens": len(rollout.prompt_ids),
        "logprobs": rollout.logprobs.tolist(),
        "max_logprobs": rollout.max_logprobs.tolist(),
        "end": rollout.end.value,
        "cut": rollout.kept if rollout.end is EndReason.EARLY_STOP else None,
        "correct": rollout.correct,
        **fields,
    }


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(told) + "\n" for told in lines))
    return path


def recorded(folder: Path, rollouts: Sequence[Rollout], *, outcomes: bool = True) -> Path:
    lines = [line(rollout, number) for number, rollout in enumerate(rollouts)]
    if not outcomes:
        for told in lines:
            del told["correct"]
    return write(folder / "traces.jsonl", lines)


def calibrated(folder: Path, *arguments: object) -> Gate:
    output = folder / "gate.json"
    calibrate.main([*map(str, arguments), "--output", str(output)])
    return gate_from_json(output.read_bytes(), has_critic=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        calibrate.main([*map(str, arguments)])
    return str(ended.value.code) + capsys.readouterr().err


def judged(gate: Gate, seed: int, count: int = 4000, harmless: float = 0.0) -> tuple[float, float]:
    """Share of other rollouts that a gate stops, and of those the share that would be right."""
    rollouts = simulate(count, seed, harmless=harmless)
    stopped = np.array(cuts(rollouts, gate)) > 0
    right = np.array([rollout.correct for rollout in rollouts])
    return float(stopped.mean()), float(right[stopped].mean()) if stopped.any() else 0.0


# -- a share of stops ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["regret-only", "value-gated", "surprise"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_wished_share_is_stopped_on_others(tmp_path: Path, rule: str, share: float) -> None:
    traces = recorded(tmp_path, simulate(1500, 0), outcomes=False)
    gate = calibrated(tmp_path, traces, "--rule", rule, "--stop-share", share)
    assert gate.rule == rule
    assert judged(gate, 1)[0] == pytest.approx(share, abs=0.04)


def test_the_statistics_are_those_of_the_traces(tmp_path: Path) -> None:
    rollouts = simulate(50, 0)
    regrets = np.concatenate([r.max_logprobs - r.logprobs for r in rollouts])
    gate = calibrated(tmp_path, recorded(tmp_path, rollouts), "--stop-share", 0.1)
    assert gate.rule == "regret-only"
    assert gate.statistics.mean == pytest.approx(regrets.mean())
    assert gate.statistics.variance == pytest.approx(regrets.var())
    assert (gate.statistics.batches, gate.version, gate.estimator) == (1, 1, None)


def test_confidence_is_calibrated_from_recorded_confidences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rollouts = simulate(400, 0)
    lines = []
    for number, rollout in enumerate(rollouts):
        sure = rng.normal(10.0, 1.0) - 0.1 * (rollout.logprobs < -4)
        confidences = rng.normal(sure, 0.3).tolist()
        lines.append(line(rollout, number, confidences=confidences))
    path = write(tmp_path / "t.jsonl", lines)
    base = tmp_path / "base.json"
    base.write_text('{"confidence_window": 16, "confidence_top_k": 5, "min_tokens": 16}')
    flags = ("--rule", "confidence", "--stop-share", 0.2, "--gate", base)
    gate = calibrated(tmp_path, path, *flags)
    assert (gate.confidence_window, gate.confidence_top_k) == (16, 5)
    logprobs, best, sure = (
        np.array([told[name] for told in lines], np.float64)
        for name in ("logprobs", "max_logprobs", "confidences")
    )
    ends = np.full(len(lines), LENGTH)
    replayed = Recorded(logprobs, best, np.full(400, 5.0), completed_at=ends, confidences=sure)
    stops = first_stops(gate, replayed)
    assert (stops > 0).mean() == pytest.approx(0.2, abs=0.01)


def test_the_table_tells_what_a_threshold_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = simulate(600, 3)
    gate = calibrated(tmp_path, recorded(tmp_path, rollouts), "--stop-share", 0.25)
    stops = np.array(cuts(rollouts, gate))
    saved = np.where(stops > 0, LENGTH - stops, 0).sum() / (600 * LENGTH)
    false = np.mean([rollouts[i].correct for i in np.flatnonzero(stops)])
    [row] = [told for told in capsys.readouterr().out.splitlines() if "<- recommended" in told]
    told = row.split()
    assert told[1:4] == [f"{np.mean(stops > 0):.1%}", f"{saved:.1%}", f"{false:.1%}"]
    assert float(told[0]) == pytest.approx(gate.beta, rel=1e-3)


# -- traces that were cut --------------------------------------------------------------------------


def test_cut_traces_count_where_a_threshold_would_have_cut_them_by_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those that a rule stops: left out wholly, the share would be far too small."""
    full = simulate(3000, 4)
    strict = calibrated(tmp_path, recorded(tmp_path, full), "--stop-share", 0.2)
    seen = censored(full, strict, audit_share=0.0, seed=0)
    path = recorded(tmp_path, seen)
    gate = calibrated(tmp_path, path, "--stop-share", 0.3)
    assert judged(gate, 5)[0] == pytest.approx(0.3, abs=0.05)
    told = capsys.readouterr().out
    assert "were cut" in told
    rows = [row.split() for row in told.splitlines() if row.endswith("<- recommended")]
    assert rows[-1][5] == "0"  # looser than the rule in force: each cut trace can tell


def test_without_one_spared_nothing_is_said_of_false_positives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = simulate(400, 4)
    gate = calibrated(tmp_path, recorded(tmp_path, full), "--stop-share", 0.3)
    path = recorded(tmp_path, censored(full, gate, audit_share=0.0, seed=0))
    assert "none of those that a rule would have cut was spared" in refused(capsys, path)


def test_spared_traces_stand_for_the_cut_ones(tmp_path: Path) -> None:
    full = simulate(4000, 6, harmless=0.3)
    strict = calibrated(tmp_path, recorded(tmp_path, full), "--stop-share", 0.5)
    seen = censored(full, strict, audit_share=0.3, seed=0)
    lines = []
    for number, rollout in enumerate(seen):
        told = line(rollout, number)
        if rollout.audited:
            told["end"] = "completed"  # in shadow mode the end is the stream's own
        lines.append(told)
    path = write(tmp_path / "t.jsonl", lines)
    flags = ("--rule", "regret-only", "--false-positives", 0.25)
    gate = calibrated(tmp_path, path, *flags)
    stopped, false = judged(gate, 7, harmless=0.3)
    assert stopped > 0.3
    assert false < 0.25


# -- a bound on false positives --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["success-probability", "regret-only"])
def test_the_bound_holds_on_others_as_often_as_it_says(tmp_path: Path, rule: str) -> None:
    held, stopped = [], []
    for seed in range(10):
        traces = recorded(tmp_path, simulate(500, 2000 + seed, harmless=0.3))
        flags = ("--rule", rule, "--false-positives", 0.1, "--confidence", 0.9)
        try:
            gate = calibrated(tmp_path, traces, *flags)
        except SystemExit:
            continue  # too little evidence, and it says so
        # Many, as else the share would be uncertain itself.
        share, false = judged(gate, 200 + seed, 12_000, harmless=0.3)
        held.append(false <= 0.1)
        stopped.append(share)
    assert len(held) >= 6
    assert np.mean(held) >= 0.8  # 0.9 is promised; so few seeds tell no more
    assert np.mean(stopped) > 0.1


def test_with_outcomes_the_estimator_is_fitted_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = calibrated(tmp_path, recorded(tmp_path, simulate(600, 0)))
    assert gate.rule == "success-probability"
    assert gate.estimator is not None
    assert any(gate.estimator.weights)
    stopped, false = judged(gate, 1)
    assert stopped > 0.3
    assert false <= 0.05
    told = capsys.readouterr().out
    assert "explained variance of the estimator, out of sample: 0." in told
    assert "recommended: p* = " in told
    assert "with 90% confidence" in told


def test_too_little_evidence_says_how_much_more_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All fail that slip, so it is a matter of the number alone.
    flags = ("--rule", "regret-only", "--false-positives", 0.02)
    told = refused(capsys, recorded(tmp_path, simulate(60, 0)), *flags)
    assert "60 outcomes are known" in told
    more = int(told.split(" more outcomes are needed")[0].split()[-1].replace(",", ""))
    assert 10 < more < 400
    enough = recorded(tmp_path, simulate(60 + 2 * more, 0))
    assert calibrated(tmp_path, enough, *flags).rule == "regret-only"


#: Bounds the share of the stopped that would have been right.
FALSE = ("--false-positives", 0.05)


def test_a_rule_that_cannot_tell_says_that_more_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = simulate(300, 0)
    rng = np.random.default_rng(0)
    blind = [dataclasses.replace(r, correct=bool(rng.random() < 0.9)) for r in rollouts]
    told = refused(capsys, recorded(tmp_path, blind), "--rule", "regret-only", *FALSE)
    assert "more outcomes alone will not do" in told


def test_the_gates_own_estimator_may_speak_against_what_the_folds_allow() -> None:
    """It stops all from the start: no number of outcomes like these would do."""
    levels = np.r_[np.linspace(-9, -4, 300), np.linspace(-1, 0, 300)].astype(np.float32)
    outcomes = Outcomes(levels, levels > -2, np.ones(600, np.float32))
    own = dataclasses.replace(outcomes, levels=np.full(600, -12, np.float32))
    gate = Gate(rule="success-probability", estimator=UNFITTED)
    with pytest.raises(CalibrationError, match="but the gate's own, fitted on all, breaks"):
        bounded_level(outcomes, own, gate, Bound())


def test_equal_outcomes_are_nothing_to_fit_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [dataclasses.replace(r, correct=True) for r in simulate(50, 0)]
    assert "nothing to tell apart" in refused(capsys, recorded(tmp_path, same))


# -- what is read ----------------------------------------------------------------------------------


def test_outcomes_may_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    rollouts = simulate(300, 0)
    traces = recorded(tmp_path, rollouts, outcomes=False)
    for key, prefix in (("id", "cmpl-"), ("request", "r")):
        rows = [
            {key: f"{prefix}{number}", "index": 0, "good": int(bool(rollout.correct))}
            for number, rollout in enumerate(rollouts)
        ]
        outcomes = write(tmp_path / "outcomes.jsonl", rows)
        flags = ("--outcomes", outcomes, "--outcome", "good")
        assert calibrated(tmp_path, traces, *flags).rule == "success-probability"
        assert len(read_outcomes(outcomes, "good")) == 300


def test_outcomes_of_a_file_are_not_those_of_a_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces, dump = recorded(tmp_path, simulate(20, 0)), tmp_path / "rollouts.parquet"
    outcomes = write(tmp_path / "outcomes.jsonl", [{"id": "cmpl-0", "correct": True}])
    for paths in ([dump], [traces, dump]):
        told = refused(capsys, *paths, "--outcomes", outcomes)
        assert f"{dump}: --outcomes has no effect" in told


@pytest.mark.parametrize("name", ["prompt", "session", "request", "id"])
def test_what_is_named_by_a_number_may_be_0(tmp_path: Path, name: str) -> None:
    told = [line(r, 0, request=None, id=None) for r in simulate(4, 0)]
    for number, row in enumerate(told):
        row[name] = number % 2
    path = write(tmp_path / "t.jsonl", told)
    [traces] = read_traces([path], outcome="correct", known=None)
    first, second, third, fourth = traces.keys.tolist()
    assert first == third != second == fourth
    assert traces.by_prompt.tolist() == [name == "prompt"] * 4


def test_a_dump_of_the_trainers_gives_the_same(tmp_path: Path) -> None:
    rollouts = [
        dataclasses.replace(r, problem=dataclasses.replace(r.problem, prompt=f"r{number}"))
        for number, r in enumerate(simulate(400, 0))
    ]
    rollouts.append(dataclasses.replace(rollouts[0], end=EndReason.ERROR))
    overrides = [f"run.output={tmp_path}", "logs.rollouts=true"]
    RolloutFiles(load_recipe("arithmetic", overrides)).write(1, rollouts, Gate())
    [dump] = (tmp_path / "rollouts").glob("*.parquet")
    assert calibrated(tmp_path, dump) == calibrated(tmp_path, recorded(tmp_path, rollouts[:-1]))


def test_of_two_recordings_a_problem_is_its_prompt_whatever_its_name(tmp_path: Path) -> None:
    """Else a problem that both have would be judged by what was fitted on it."""
    [rollout] = simulate(1, 0)
    named = [("a:1", "1+1="), ("b:7", "1+1="), ("a:1", "2+2=")]
    rollouts = [dataclasses.replace(rollout, problem=Problem(*one, "2")) for one in named]
    overrides = [f"run.output={tmp_path}", "logs.rollouts=true"]
    RolloutFiles(load_recipe("arithmetic", overrides)).write(1, rollouts, Gate())
    [traces] = read_traces((tmp_path / "rollouts").glob("*"), outcome="correct", known=None)
    one, same, other = traces.keys
    assert one == same != other


def test_a_cut_rollout_of_a_dump_ends_at_its_cut(tmp_path: Path) -> None:
    [rollout] = simulate(1, 0)
    cut = dataclasses.replace(rollout, end=EndReason.EARLY_STOP, kept=7, correct=None)
    spared = dataclasses.replace(cut, audited=True, correct=False)
    overrides = [f"run.output={tmp_path}", "logs.rollouts=true"]
    RolloutFiles(load_recipe("arithmetic", overrides)).write(1, [cut, spared], Gate())
    [traces] = read_traces((tmp_path / "rollouts").glob("*"), outcome="correct", known=None)
    assert traces.lengths.tolist() == [7, LENGTH]
    assert traces.cut.tolist() == [True, False]
    assert traces.spared.tolist() == [False, True]
    assert [math.isnan(traces.correct[0]), traces.correct[1]] == [True, 0.0]


def test_a_long_file_is_read_in_parts(tmp_path: Path) -> None:
    path = recorded(tmp_path, simulate(700, 0))
    parts = list(read_traces([path], outcome="correct", known=None))
    assert [len(part) for part in parts] == [256, 256, 188]
    long = write(tmp_path / "long.jsonl", [line(simulate(1, 0)[0], 0)] * 3)
    text = [json.loads(told) for told in long.read_text().splitlines()]
    for told in text:
        told["logprobs"] = told["max_logprobs"] = [-0.1] * 400_000
    write(long, text)
    assert [len(part) for part in read_traces([long], outcome="c", known=None)] == [2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "t.jsonl:1: no JSON object"),
        ("[]\n", "t.jsonl:1: no JSON object"),
        (b'{"text": "\xff"}\n', "t.jsonl:1: no JSON object"),
        ("\n{}\n", "t.jsonl:2: no 'logprobs'"),
        ('{"logprobs": [1, "x"], "max_logprobs": []}', "logprobs must be a list of numbers"),
        ('{"logprobs": 3, "max_logprobs": []}', "logprobs must be a list of numbers"),
        ('{"logprobs": [-1], "max_logprobs": []}', "numbers of tokens differ"),
        ('{"logprobs": [], "max_logprobs": [], "correct": "yes"}', "true or false, not 'yes'"),
        ('{"prompt_tokens": "ten"}', r"t.jsonl:1: .*`\$.prompt_tokens`"),
        ('{"prompt_tokens": [1]}', r"`\$.prompt_tokens`"),
        ('{"prompt_tokens": -3}', r"`\$.prompt_tokens`"),
        ('{"turn": "1"}', r"`\$.turn`"),
        ('{"carried": "3"}', r"`\$.carried`"),
        ('{"end": 3}', r"`\$.end`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TraceError, match=message):
        list(read_traces([path], outcome="correct", known=None))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("logprobs", ["x"], "column 'logprobs' must hold lists of numbers, not string"),
        ("prompt_ids", [5], "column 'prompt_ids' must hold lists of numbers, not int64"),
        ("prompt", [7], "column 'prompt' must hold texts, not int64"),
        ("history", ["a"], "column 'history' must hold numbers, not string"),
        ("probes", [[1.0]], "column 'probes' must hold lists of lists of numbers, not list"),
        ("prompt", pa.array([None], pa.string()), "row 0: prompt is missing"),
        ("kept", pa.array([None], pa.int32()), "row 0: kept is missing"),
        ("logprobs", pa.array([None], pa.list_(pa.float64())), "row 0: logprobs and max_logprobs"),
    ],
)
def test_a_bad_column_is_named(tmp_path: Path, column: str, values: Any, message: str) -> None:
    [rollout] = simulate(1, 0)
    cut = dataclasses.replace(rollout, end=EndReason.EARLY_STOP, correct=None)
    table = rollouts_table(0, [cut], Gate(), {})
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values)), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=f"t.parquet.*{message}"):
        list(read_traces([tmp_path / "t.parquet"], outcome="correct", known=None))


def test_traces_of_one_prompt_are_known_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever way a line tells it; a session is known by the prompt that it began with."""
    rollouts = simulate(7, 0)
    told: list[dict[str, Any]] = [
        *({"prompt": "p"}, {"prompt": "p"}, {"prompt_token_ids": [1, 2]}),
        {"session": "a", "turn": 1, "prompt_token_ids": [1, 2]},
        {"session": "a", "turn": 2, "prompt_token_ids": [1, 2, 3]},
        *({"prompt_token_ids": [1, 2, 3]}, {}),
    ]
    lines = [line(r, n, **fields) for n, (r, fields) in enumerate(zip(rollouts, told, strict=True))]
    path = write(tmp_path / "t.jsonl", lines)
    [traces] = read_traces([path], outcome="correct", known=None)
    assert [[*traces.keys].index(key) for key in traces.keys] == [0, 0, 2, 2, 2, 5, 6]
    assert traces.by_prompt.tolist() == [True] * 6 + [False]
    calibrate.main([str(path), "--stop-share", "0.5"])
    assert "1 traces do not tell their prompt" in capsys.readouterr().out


def test_a_session_with_one_outcome_is_one_rollout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its turns are no more evidence than it is, and each that is stopped loses it."""
    rollouts = simulate(240, 0)
    lines = [line(r, n, session=f"s{n // 12}", turn=n % 12 + 1) for n, r in enumerate(rollouts)]
    path = write(tmp_path / "t.jsonl", lines)
    rows = [{"session": f"s{n}", "correct": n % 2 == 0} for n in range(20)]
    outcomes = write(tmp_path / "outcomes.jsonl", rows)
    told = refused(capsys, path, "--outcomes", outcomes, "--rule", "regret-only")
    assert "20 outcomes are known" in told
    assert "10 are of right answers, and at least 45 of these are needed" in told
    base = Outcomes(np.arange(4.0, dtype=np.float32), np.ones(4, bool), np.ones(4, np.float32))
    assert by_session(base, np.array([0, 7, 7, 0], np.uint32)).levels.tolist() == [3.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rule", "random"], "invalid choice"),
        (["--stop-share", "1.5"], "must lie between 0 and 1"),
        (["--folds", "1"], "at least 2"),
        (["--rule", "success-probability", "--stop-share", "0.1"], "needs outcomes"),
        (["--rule", "value-only", "--stop-share", "0.1"], "cannot be replayed"),
        (["--rule", "confidence", "--stop-share", "0.1"], "recorded confidences"),
        ([], "no outcome is known: give --stop-share"),
        (["--outcomes", "/no/such"], "/no/such: No such file"),
        (["--gate", "/no/such"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    traces = recorded(tmp_path, simulate(20, 0), outcomes=False)
    assert message in refused(capsys, traces, *flags)


def test_only_a_gate_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = recorded(tmp_path, simulate(40, 1), outcomes=False)
    output = tmp_path / "package.json"
    for content in ("{}x", '{"name": "mine"}', "text"):
        output.write_text(content)
        told = refused(capsys, traces, "--stop-share", "0.3", "--output", output)
        assert "--output" in told
        assert "package.json is there and no gate" in told
        assert output.read_text() == content
    output.write_text("")
    for _ in range(2):
        calibrate.main([str(traces), "--stop-share", "0.3", "--output", str(output)])


def test_no_parquet_and_no_traces_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    assert "no Parquet file, or damaged" in refused(capsys, tmp_path / "t.parquet")
    empty = write(tmp_path / "t.jsonl", [])
    assert "no trace" in refused(capsys, empty, "--stop-share", 0.1)


def test_without_its_libraries_it_says_how_to_install_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    told = refused(capsys, recorded(tmp_path, simulate(60, 0)))
    assert "sklearn is needed" in told
    assert "pip install '.[calibrate]'" in told


# -- from a gateway to a gateway -------------------------------------------------------------------


async def test_what_a_gateway_recorded_makes_a_gate_that_stops(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def script(body: Any) -> Script:
        bad = int(rng.integers(3, 9)) if rng.random() < 0.3 else 0
        return Script([GOOD] * 8 + [BAD] * bad + [GOOD] * 20)

    traces, output = tmp_path / "traces.jsonl", tmp_path / "gate.json"
    async with FakeServer(script) as server:
        async with gateway_for(server, gate=None, record=traces) as gateway:
            for _ in range(60):
                await post(gateway.url + "/v1/completions", completion_body())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "espo_gateway", "calibrate", str(traces)),
            *("--stop-share", "0.25", "--output", str(output)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        told, complaints = await process.communicate()
        assert process.returncode == 0, complaints.decode()
        assert b"60 traces" in told
        assert complaints == b""
        gate = output.read_bytes()
        async with gateway_for(server, gate=gate) as gateway:
            cut = []
            for _ in range(100):
                _, answer = await post(gateway.url + "/v1/completions", completion_body())
                cut.append(answer["choices"][0]["espo"]["stopped"])
    assert np.mean(cut) == pytest.approx(0.25, abs=0.12)
