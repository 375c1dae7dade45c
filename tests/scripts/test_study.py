"""`scripts/reproduce.py`: what is run, what is kept, what comes of it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

import reproduce
from study import runner
from study.design import Preparation, Run, Study, StudyError, load_study
from study.plots import PLOTS, draw_all, styles
from study.results import curves_of, results_of, spread
from study.runner import Stopped, check, jobs_of, run_study, stop_share
from study.table import markdown

STUDIES = Path(reproduce.__file__).parent / "studies"
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"title": "PPO", "seeds": 3, "settings": ["stopping.rule=none"]},
    "espo": {"title": "ESPO", "paper": {"accuracy": 46.28, "length": 3278}},
    "random": {"title": "random", "settings": ["stopping.rule=random"], "rate_of": "espo"},
}


def study_of(folder: Path, **changes: Any) -> Study:
    values = {"recipe": "arithmetic", "output": folder, "baseline": "ppo", "seeds": 2}
    return Study.model_validate({**values, "methods": METHODS, **changes})


def row(step: int, tokens: int, full: float, **other: Any) -> dict[str, Any]:
    """Of metrics.jsonl; 10 rollouts a step, of which an audited one was right in the end."""
    known = {
        "rollout/tokens": tokens,
        "rollout/tokens_total_without_stopping": full,
        "rollout/length": tokens / 10,
        "rollout/length_without_stopping": tokens / 5,
        "rollout/stop_share": 0.25,
        "rollout/audited": 4,
        "rollout/audited_correct": 1,
        "rollout/questions": 3,
        "stopping/auc_within_prompts": 0.75,
        "ppo/entropy": 0.5,
        "seconds/rollout": tokens / 100,
        "seconds/update": 1.0,
        "seconds/step": 1.0 + tokens / 100,
    }
    return {"step": step, **known, **other}


def finish(run: Run, *, tokens: int, accuracy: float) -> None:
    """A run's folder as `espo_rl.run` leaves it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": 0, "evaluation/avg@1": {"value": 0.5}},
        row(1, tokens, tokens * 2),
        row(2, tokens, tokens * 4),
        {"step": 2, "evaluation/avg@1": {"value": accuracy}},
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary: dict[str, Any] = {
        "accuracy_before": 0.5,
        "accuracy_after": accuracy,
        "stop_rate": 0.25,
    }
    summary |= {"restarts": 0, "errors": 0, "tokens_without_stopping": 4 * tokens}
    summary |= {"right_lost_trials": 20.0}
    machine = {"cpus": 2, "processor": f"P{run.seed}", "gpus": ["G"] * run.seed}
    summary |= {"machine": machine, "versions": {"torch": "2"}}
    (run.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def done(tmp_path: Path) -> Study:
    """A study of which only the last run is missing."""
    study = study_of(tmp_path)
    for run in list(study.runs())[:-1]:
        tokens = {"ppo": 1000, "espo": 700, "random": 800}[run.name]
        finish(run, tokens=tokens + run.seed, accuracy=0.8 + 0.01 * run.seed)
    return study


def test_methods_take_turns_for_each_seed(tmp_path: Path) -> None:
    runs = [(run.name, run.seed) for run in study_of(tmp_path, first_seed=5).runs()]
    turn = ["ppo", "espo", "random"]
    assert runs == [(n, 5) for n in turn] + [(n, 6) for n in turn] + [("ppo", 7)]


def test_a_run_of_somebody_else_is_none_of_the_studys(tmp_path: Path) -> None:
    run = next(study_of(tmp_path).runs())
    finish(run, tokens=10, accuracy=0.5)
    (run.folder / "recipe.json").write_text("{}")
    with pytest.raises(StudyError, match="none of this study's"):
        run_study(study_of(tmp_path))


@pytest.mark.parametrize("path", STUDIES.rglob("*.toml"), ids=lambda path: path.stem)
def test_the_studies_that_ship_hold(tmp_path: Path, path: Path) -> None:
    check(load_study(path, output=tmp_path))


def test_the_papers_methods_are_compared(tmp_path: Path) -> None:
    study = load_study(STUDIES / "arithmetic.toml", output=tmp_path)
    assert {"ppo", "dapo", "espo", "random", "value-only"} <= set(study.methods)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"baseline": "grpo"}, "baseline = 'grpo' is none of the methods"),
        ({"methods": {**METHODS, "a": {"title": "A", "rate_of": "b"}}}, "must be a method above"),
        ({"methods": {"ppo": {"titel": "PPO"}}}, "methods.ppo.titel"),
    ],
)
def test_a_study_that_does_not_hold(tmp_path: Path, changes: Any, told: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text('recipe = "arithmetic"\noutput = "x"\n')
    with pytest.raises(StudyError, match=told):
        load_study(path, **{"baseline": "ppo", "methods": METHODS, **changes})


def test_a_wrong_setting_is_told_before_anything_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path, settings=["ppo.learning_rat=1"])
    with pytest.raises(StudyError, match=r"methods\.ppo: [^:]*:\s+ppo\.learning_rat: no such key"):
        run_study(study)
    assert not list(tmp_path.iterdir())


def test_a_part_keeps_its_baseline(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert list(study.only(["espo"]).methods) == ["ppo", "espo"]
    assert [run.seed for run in study.with_seeds(1).runs()] == [0, 0, 0]
    with pytest.raises(StudyError, match="no method 'grpo'"):
        study.only(["grpo"])
    assert list(study.only(["random"]).methods) == ["ppo", "espo", "random"]


class Trainer:
    """Stands in for `python -m espo_rl.run`: takes its commands, ends as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        self.commands: list[list[str]] = []
        start = subprocess.Popen

        def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            self.commands.append(command)
            settings = dict(s.split("=", 1) for s in command if "=" in s)
            return start([sys.executable, "-c", script, settings["run.output"]], **options)

        monkeypatch.setattr(runner.subprocess, "Popen", popen)
        monkeypatch.setattr(runner, "POLL", 0.01)


# Off in the warm-up, and again in step 3: its share there is none, and counts.
SUCCEEDS = """
import json, sys
from pathlib import Path
steps = enumerate([(False, 0.0), (True, 0.5), (False, 0.0), (True, 0.4)], 1)
rows = [
    {"step": step, "rollout/tokens": 9, "stopping/on": on, "rollout/stop_share": share}
    for step, (on, share) in steps
]
(Path(sys.argv[1]) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(Path(sys.argv[1]) / "summary.json").write_text("{}")
"""


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study, trainer = study_of(tmp_path), Trainer(monkeypatch, SUCCEEDS)
    assert run_study(study) == []
    assert len(trainer.commands) == 7
    rates = [[s for s in c if s.startswith("stopping.target_share=")] for c in trainer.commands]
    assert [r for r in rates if r] == [["stopping.target_share=0.3000"]] * 2
    assert all(command[-2:] == ["--resume", "auto"] for command in trainer.commands)
    assert run_study(study) == []
    assert len(trainer.commands) == 7
    (tmp_path / "espo" / "seed-1" / "summary.json").unlink()
    assert run_study(study) == []
    assert len(trainer.commands) == 8


def test_a_share_that_cannot_be_matched_is_told(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    espo = next(run for run in study.runs() if run.name == "espo")
    with pytest.raises(StudyError, match="is not done"):
        stop_share(espo)
    finish(espo, tokens=10, accuracy=0.5)
    with pytest.raises(StudyError, match="stopped nothing"):
        stop_share(espo)
    # A run of a random rule takes no share of 0 or 1.
    for share, told in ((2e-5, "0.002%"), (1.0, "100.000%")):
        steps = [row(1, 10, 20.0, **{"stopping/on": True, "rollout/stop_share": share})]
        (espo.folder / "metrics.jsonl").write_text("".join(json.dumps(one) for one in steps))
        with pytest.raises(StudyError, match=f"stopped {told} of its rollouts: no share"):
            stop_share(espo)


def test_other_settings_do_not_mix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Trainer(monkeypatch, SUCCEEDS)
    run_study(study_of(tmp_path))
    with pytest.raises(StudyError, match="made with other settings; delete it"):
        run_study(study_of(tmp_path, settings=["run.steps=7"]))


def test_a_table_is_not_of_other_settings_than_its_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(monkeypatch, SUCCEEDS)
    path, output = tmp_path / "study.toml", tmp_path / "study"
    head = f'recipe = "arithmetic"\noutput = "{output}"\nbaseline = "ppo"\n'
    path.write_text(head + '[methods.ppo]\ntitle = "PPO"\n')
    run_study(load_study(path))
    given = [str(path), "--results-only"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *given, "--set", "run.steps=7"])
    assert reproduce.main() == 2
    assert "made with other settings" in capsys.readouterr().err
    assert not (output / "results.json").exists()


def test_other_weights_do_not_mix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    critic = tmp_path / "critic" / "model.safetensors"
    critic.parent.mkdir()
    critic.write_bytes(b"one")
    study = study_of(tmp_path, settings=[f"model.critic={critic.parent}"])
    Trainer(monkeypatch, SUCCEEDS)
    run_study(study)
    critic.unlink()  # whoever tidies up has not changed anything
    run_study(study)
    critic.write_bytes(b"two")
    with pytest.raises(StudyError, match=f"made with other weights in {critic.parent}; delete it"):
        run_study(study)


def test_damaged_settings_of_a_run_are_named(tmp_path: Path) -> None:
    """As a full disk left them before they were written whole."""
    study = study_of(tmp_path)
    told = next(iter(study.runs())).folder / "settings.json"
    told.parent.mkdir(parents=True)
    told.touch()
    with pytest.raises(StudyError, match=r"settings\.json is damaged .*delete"):
        check(study)


def test_a_run_that_fails_does_not_end_the_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "import sys\nif 'espo' in sys.argv[1]: sys.exit('no memory')\n" + SUCCEEDS
    trainer = Trainer(monkeypatch, fails)
    failed = run_study(study_of(tmp_path))
    assert [(run.name, run.seed) for run in failed] == [
        ("espo", 0),
        ("random", 0),  # which needs the former's rate
        ("espo", 1),
        ("random", 1),
    ]
    assert len(trainer.commands) == 3 + 2 * runner.ATTEMPTS
    assert "no memory" in capfd.readouterr().err


def test_a_signal_reaches_the_run_and_ends_the_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits = f"""
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (Path(sys.argv[1]) / "saved").touch() or sys.exit(130))
os.kill({os.getpid()}, signal.SIGTERM)
signal.pause()
"""
    trainer, before = Trainer(monkeypatch, waits), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run_study(study_of(tmp_path))
    assert (tmp_path / "ppo" / "seed-0" / "saved").exists()
    assert len(trainer.commands) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_run_at_a_time_and_none_before_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Each of the baseline waits until the other is there, so one after the other would never end.
    meets = f"""
import sys, time
from pathlib import Path
here = Path(sys.argv[1])
(here / "began").touch()
while here.parent.name == "ppo" and len([*Path({str(tmp_path)!r}).glob("ppo/*/began")]) < 2:
    time.sleep(0.01)
"""
    study, trainer = study_of(tmp_path), Trainer(monkeypatch, meets + SUCCEEDS)
    assert run_study(study, jobs=4) == []
    assert run_study(study) == []  # whatever the number, they are the same runs
    assert {jobs_of(run) for run in study.runs()} == {4}
    assert len(trainer.commands) == 7
    rates = [s for c in trainer.commands for s in c if s.startswith("stopping.target_share=")]
    assert rates == ["stopping.target_share=0.3000"] * 2


def test_a_signal_reaches_all_that_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits = f"""
import os, signal, sys, time
from pathlib import Path
here = Path(sys.argv[1])
signal.signal(signal.SIGINT, lambda *_: (here / "saved").touch() or sys.exit(130))
(here / "ready").touch()
while len([*Path({str(tmp_path)!r}).glob("*/*/ready")]) < 2:
    time.sleep(0.01)
if here.parent.name == "ppo":
    os.kill({os.getpid()}, signal.SIGTERM)
signal.pause()
"""
    trainer = Trainer(monkeypatch, waits)
    with pytest.raises(Stopped):
        run_study(study_of(tmp_path), jobs=2)
    assert len(trainer.commands) == len([*tmp_path.glob("*/*/saved")]) == 2


def test_preparations_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = tmp_path / "base"
    code = f"open({str(tmp_path / 'log')!r}, 'a').write('x'); open({str(made)!r}, 'w')"
    step = {"makes": made, "command": ["-c", code]}
    study = study_of(tmp_path / "study", prepare=[step], methods={"ppo": METHODS["ppo"]})
    for run in study.runs():
        finish(run, tokens=10, accuracy=0.5)
    for _ in range(2):
        run_study(study)
    assert (tmp_path / "log").read_text() == "x"
    bad = study.model_copy(update={"prepare": [Preparation(makes=made / "x", command=["-c", "1"])]})
    with pytest.raises(StudyError, match="did not make"):
        run_study(bad)


def test_only_what_the_chosen_methods_need_is_prepared(tmp_path: Path) -> None:
    steps = [
        {"makes": tmp_path / name, "command": ["-c", ""], "methods": methods}
        for name, methods in (("all", []), ("two", ["espo", "random"]), ("one", ["random"]))
    ]
    study = study_of(tmp_path, prepare=steps)
    for only, needed in (
        (["ppo"], ["all"]),
        (["espo"], ["all", "two"]),
        (["random"], ["all", "two", "one"]),
    ):
        assert [one.makes.name for one in study.only(only).prepare] == needed
    with pytest.raises(ValueError, match=r"prepare\.1\.methods = 'grpo' is none of the methods"):
        study_of(tmp_path, prepare=[steps[0], {**steps[1], "methods": ["espo", "grpo"]}])


def test_intervals_are_students() -> None:
    mean, low, high, n = spread([1.0, 2.0, 3.0, math.nan])
    assert (mean, n) == (2.0, 3)
    assert high - mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert low == pytest.approx(4.0 - high)
    assert spread([5.0]) == pytest.approx((5.0, math.nan, math.nan, 1), nan_ok=True)


def test_curves_are_those_of_the_log(done: Study) -> None:
    curves = curves_of(done.output / "espo" / "seed-0")
    assert curves["tokens_full"] == [1400.0, 2800.0]
    assert curves["evaluated_tokens"] == [0.0, 1400.0]
    assert curves["evaluated_accuracy"] == [0.5, 0.8]


def test_results_are_compared_seed_by_seed(done: Study) -> None:
    results = results_of(done)
    espo = results["methods"]["espo"]
    assert espo["tokens"]["mean"] == pytest.approx(1401.0)
    ratios = [700 / 1000, 701 / 1001]
    assert espo["against_baseline"]["tokens"]["mean"] == pytest.approx(sum(ratios) / 2)
    assert espo["against_baseline"]["accuracy"]["mean"] == pytest.approx(0.0)
    assert espo["length_full"]["mean"] == pytest.approx(140.1)
    assert [run["tokens_full"] for run in results["runs"] if run["method"] == "espo"] == [
        2800,
        2804,
    ]
    assert espo["false_positives"] == pytest.approx(
        {"value": 0.25, "audited": 16, "low": 0.1019, "high": 0.4950}, abs=1e-3
    )
    # Two of four audited were right, of twenty that audits would have shown, in each of two runs.
    assert espo["right_lost"] == pytest.approx(
        {"value": 0.1, "trials": 40, "low": 0.0396, "high": 0.2305}, abs=1e-3
    )
    assert (espo["auc_within_prompts"]["mean"], espo["questions"]["mean"]) == (0.75, 3.0)
    assert results["missing"] == [str(done.output / "ppo" / "seed-2")]


def test_time_to_a_target_and_time_saved_by_tokens_saved(done: Study) -> None:
    """Steps take a second and a hundredth of their tokens; accuracy goes from 0.5 up in two."""
    methods = {**METHODS, "espo": {**METHODS["espo"], "without": "ppo"}}
    results = results_of(study_of(done.output, methods=methods, target=0.6))
    ppo, espo = results["methods"]["ppo"], results["methods"]["espo"]
    [first] = [run for run in results["runs"] if run["method"] == "ppo" and run["seed"] == 0]
    assert first["seconds_to_target"] == pytest.approx(22.0 * (0.6 - 0.5) / (0.8 - 0.5))
    assert (ppo["reached_target"], len(ppo["seeds"])) == (2, 2)
    assert espo["saved"]["tokens"]["mean"] == pytest.approx(0.3, abs=1e-3)
    assert espo["saved"]["rollout_seconds_per_token"]["mean"] == pytest.approx(1.0)
    assert espo["saved"]["step_seconds_per_token"]["mean"] == pytest.approx(10 / 11, abs=1e-3)
    told = markdown(results)
    assert "Time to a held-out accuracy of 60%:" in told
    assert espo["saved"]["accuracy"]["mean"] == pytest.approx(0.0)
    assert "| ESPO | +0.0 [+0.0, +0.0] | 30.0%" in told
    for never in (0.9, None):
        runs = results_of(study_of(done.output, target=never))["runs"]
        assert all(math.isnan(run["seconds_to_target"]) for run in runs)
    assert "Time to" not in markdown(results_of(done))


def test_what_a_method_is_without_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"methods\.espo\.without = 'grpo' is none"):
        study_of(tmp_path, methods={**METHODS, "espo": {"title": "E", "without": "grpo"}})


def test_a_part_keeps_what_it_is_compared_with(tmp_path: Path) -> None:
    study = load_study(STUDIES / "schedule.toml", output=tmp_path)
    assert [*study.only(["stop-refill"]).methods] == [
        *("plain-batch", "plain-refill", "stop-refill"),
    ]


def test_tables_and_plots(done: Study, tmp_path: Path) -> None:
    told = markdown(results_of(done))
    assert "| ESPO | 2 | 80.5% [" in told
    assert "-30.0% [" in told
    assert "| ESPO | 46.3 | 3278 | – |" in told
    assert "| 0.75 [0.75, 0.75] | 3 [3, 3] |" in told
    assert "| 10.0% [4.0%, 23.1%] | 25.0% [10.2%, 49.5%] |" in told
    # Of the machines that trained, not of the one that writes the table.
    assert told.count("2 cores, P0; torch 2.") == told.count("2 cores, P1, G; torch 2.") == 1
    assert "Not done: " in told
    assert "no measurement" not in told
    paths = draw_all(done, tmp_path / "plots")
    assert [path.stem for path in paths] == list(PLOTS)
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_seconds_of_runs_beside_others_are_no_measurement(done: Study, tmp_path: Path) -> None:
    shutil.copytree(done.output, tmp_path / "study")
    study = done.model_copy(update={"output": tmp_path / "study"})
    for told in study.output.glob("*/*/summary.json"):
        jobs = 6 if told.parent.parent.name == "ppo" else 5
        (told.parent / "settings.json").write_text(json.dumps({"jobs": jobs}))
    told_of = markdown(results_of(study))
    # Once a machine, whichever parts of the study it did.
    assert told_of.count("Up to 6 runs at a time: their seconds are no measurement.") == 2
    assert "Up to 5" not in told_of


def test_results_of_more_runs_are_not_replaced(
    done: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "draw_all", lambda study, folder: [])
    file = done.output / "results.json"
    reproduce.write(done)
    before = file.read_bytes()
    for fewer in (done.only(["espo"]), done.with_seeds(1)):
        with pytest.raises(StudyError, match="lack, such as "):
            reproduce.write(fewer)
        assert file.read_bytes() == before
        assert "| ESPO |" in capsys.readouterr().out
    shutil.rmtree(next(iter(done.runs())).folder)
    with pytest.raises(StudyError, match="1 runs that these results lack, such as ppo, seed 0"):
        reproduce.write(done)
    assert file.read_bytes() == before


def test_names_of_many_methods_are_not_cut_off(
    done: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = {n: m.model_copy(update={"title": f"{n}: {40 * 'W'}"}) for n, m in done.methods.items()}
    more = {f"{name}-again": method for name, method in long.items()}
    study = done.model_copy(update={"methods": long | more})
    for name in long:
        shutil.copytree(done.output / name, done.output / f"{name}-again")
    # Nor do bands hide each other.
    monkeypatch.setattr(Axes, "fill_between", None)
    for path in draw_all(study, tmp_path / "plots"):
        assert (imread(path)[:, [0, -1], :3] == 1.0).all(), f"{path.name}: ink at its sides"


def test_no_two_methods_look_alike() -> None:
    drawn = [tuple(style.values()) for style, _ in zip(styles(), range(28), strict=False)]
    assert len(set(drawn)) == 28
