"""Where a run's numbers go: files, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from espo_gateway.stop.rules import Gate
from espo_rl.record.log import RunLog
from espo_rl.record.log_errors import LogError
from espo_rl.record.metrics import (
    METRICS,
    gate_metrics,
    grouped,
    rollout_metrics,
    table,
    undocumented,
)
from espo_rl.record.sinks import JsonLines
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.run_log import recipe_for, write_steps

NOTHING = np.empty(0)


def rollout(kept: int, end: EndReason = EndReason.COMPLETED, **fields: Any) -> Rollout:
    values: dict[str, Any] = {"token_ids": list(range(kept)), "kept": kept, **fields}
    return Rollout(
        problem=Problem("1", "1", "1"),
        prompt_ids=[1],
        logprobs=NOTHING,
        max_logprobs=NOTHING,
        text="",
        end=end,
        **values,
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]


# -- the numbers of the rollouts -------------------------------------------------------------------

STOPPED = EndReason.EARLY_STOP
BATCH = [
    rollout(10, correct=True, reward=1.0, weights_version="step-3"),
    rollout(20, correct=False, reward=-1.0, weights_version="step-3"),
    rollout(40, EndReason.LENGTH, correct=False, reward=-1.0, weights_version="step-2"),
    rollout(
        4,
        STOPPED,
        token_ids=list(range(24)),
        audited=True,
        correct=True,
        reward=-1.0,
        weights_version="step-3",
    ),
    rollout(6, STOPPED, overshoot=3, reward=-1.0, weights_version="step-3"),
    rollout(0, EndReason.ERROR, error="gone"),
]


def test_numbers_of_a_batch() -> None:
    numbers = rollout_metrics(BATCH, tokens=103, audit_share=0.25, weights_version="step-4")
    assert numbers["reward"] == pytest.approx(-0.6)
    # Weights: three that ended by themselves, and one audited that stands for four stopped.
    assert numbers["accuracy"] == pytest.approx((1 + 4) / (3 + 4))
    assert numbers["stop_share"] == pytest.approx(2 / 5)
    assert numbers["completed_share"] == pytest.approx(2 / 5)
    assert numbers["truncated_share"] == pytest.approx(1 / 5)
    assert (numbers["length"], numbers["length_completed"]) == (20.0, 15.0)
    assert (numbers["length_truncated"], numbers["length_stopped"]) == (40.0, 5.0)
    assert (numbers["tokens"], numbers["overshoot"]) == (103, 3)
    # 10 + 20 + 40 + 24, and 6 with the 20 more that the audited one had.
    assert numbers["tokens_without_stopping"] == 120.0
    assert numbers["length_without_stopping"] == 120.0 / 5
    assert numbers["tokens_saved_share"] == pytest.approx(1 - 103 / 120)
    assert (numbers["audited"], numbers["audited_correct"]) == (1, 1)
    assert numbers["false_positive_rate"] == 1.0
    assert numbers["errors"] == 1
    assert numbers["weights_version"] == "step-3"
    assert numbers["staleness"] == pytest.approx(4 - (3 * 4 + 2) / 5)


def test_staleness_is_that_of_tokens() -> None:
    whole = rollout(4, weights_version="step-3")
    partial = rollout(8, weights_version="step-1", weights_changes=[(2, "step-2"), (6, "step-3")])
    assert partial.token_versions == ["step-1"] * 2 + ["step-2"] * 4 + ["step-3"] * 2
    numbers = rollout_metrics(
        [whole, partial], tokens=12, audit_share=0.25, weights_version="step-3"
    )
    assert numbers["staleness"] == pytest.approx((0 + (2 * 2 + 4 * 1) / 8) / 2)
    assert (numbers["staleness_max"], numbers["partial"]) == (2.0, 0.5)
    assert numbers["weights_version"] == "step-3"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batch", [[], [rollout(0, EndReason.ERROR)], [rollout(6, STOPPED)]])
def test_numbers_of_a_batch_that_says_little(batch: list[Rollout]) -> None:
    numbers = rollout_metrics(batch, tokens=0, audit_share=0.0)
    for name in ("accuracy", "false_positive_rate"):
        number = numbers[name]
        assert isinstance(number, float)
        assert math.isnan(number)


@pytest.mark.parametrize(
    ("gate", "threshold"),
    [
        (Gate(rule="regret-only", beta=2.5, p_star=0.1), 2.5),
        (Gate(rule="value-gated", beta=2.5, p_star=0.1), 2.5),
        (Gate(beta=2.5), math.nan),
    ],
)
def test_the_threshold_is_the_rules_own(gate: Gate, threshold: float) -> None:
    assert gate_metrics(gate)["threshold"] == pytest.approx(threshold, nan_ok=True)


def test_every_name_is_documented() -> None:
    numbers = rollout_metrics(BATCH, tokens=1, audit_share=0.5)
    row = grouped(rollout=numbers, stopping={**gate_metrics(Gate()), "on": True, "reason": ""})
    assert undocumented(row) == set()
    assert undocumented(["seconds/rollout", "stopping/z_p99", "evaluation/aime/avg@32"]) == set()
    assert undocumented(["ppo/kl_", "rollout", "second/x"]) == {"ppo/kl_", "rollout", "second/x"}
    assert all(f"| `{name}` | " in table() for name in METRICS)


# -- metrics.jsonl ---------------------------------------------------------------------------------


def test_a_row_has_all_groups_and_no_nan(tmp_path: Path) -> None:
    log = RunLog(recipe_for(tmp_path), Console(file=io.StringIO()))
    with log:
        log.stopping(True, "enough seen")
        log.step(
            1,
            rollout={"tokens": np.int64(7), "accuracy": math.nan, "weights_version": "step-0"},
            stopping={"beta": np.float32(0.5)},
            ppo={"kl": math.inf},
            seconds={"rollout": 1.5},
        )
        log.write(1, evaluation={"accuracy": 0.25})
    assert rows_of(tmp_path) == [
        {
            "step": 1,
            "rollout/tokens": 7,
            "rollout/accuracy": None,
            "rollout/weights_version": "step-0",
            "stopping/beta": 0.5,
            "stopping/on": True,
            "stopping/reason": "enough seen",
            "ppo/kl": None,
            "seconds/rollout": 1.5,
        },
        {"step": 1, "evaluation/accuracy": 0.25},
    ]
    assert json.loads((tmp_path / "recipe.json").read_text())["run"]["steps"] == 4


def test_a_resumed_run_drops_what_comes_again(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    write_steps(recipe, 1, 2, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "roll')
    write_steps(recipe, 3, 4, start=2)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    write_steps(recipe, 1)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_a_resumed_run_knows_what_its_log_has(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows: list[dict[str, Any]] = [
        {"step": 1, "rollout/tokens_total": 10},
        {"step": 2, "rollout/tokens_total": 25},
        {"step": 2, "evaluation/avg@1": 0.5},
        {"step": 3, "rollout/tokens_total": 40},
    ]
    for start, evaluated, tokens in ((3, 2, 40), (2, 2, 25), (1, 0, 10), (0, 0, None)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = JsonLines(path, start)
        lines.close()
        assert (lines.evaluated, lines.tokens) == (evaluated, tokens)


# -- TensorBoard -----------------------------------------------------------------------------------


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "logs.tensorboard=true")
    write_steps(recipe, 1, 2, 3, reward=math.nan)
    write_steps(recipe, 3, start=2, accuracy=0.75)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rollout/tokens")] == [
        (1, 10.0),
        (2, 20.0),
        (3, 30.0),
    ]
    assert [(e.step, e.value) for e in events.Scalars("rollout/accuracy")] == [(3, 0.75)]
    assert set(events.Tags()["scalars"]) == {
        "rollout/tokens",
        "rollout/accuracy",
        "ppo/kl",
        "stopping/on",
    }


def test_tensorboard_gets_evaluations_and_accuracy_by_tokens(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "logs.tensorboard=true")

    def row(total: int, accuracy: float) -> dict[str, Any]:
        return {"tokens": 10, "tokens_total": total, "accuracy": accuracy}

    def run(start: int, *accuracies: float) -> None:
        log = RunLog(recipe, Console(file=io.StringIO()))
        log.start = start
        with log:
            if not start:
                average = {"value": 0.25, "interval": [0.125, 0.5]}
                log.write(0, evaluation={"avg@1": average, "maj@1": {"value": None}})
            for step, accuracy in enumerate(accuracies, start + 1):
                log.step(step, rollout=row(10 * step, accuracy), stopping={})

    run(0, 0.25, 0.5, 0.75)
    run(2, 1.0)  # the third step again

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in {"": 0.25, "/low": 0.125, "/high": 0.5}.items():
        assert [(e.step, e.value) for e in events.Scalars("evaluation/avg@1" + name)] == [
            (0, value)
        ]
    assert "evaluation/maj@1" not in events.Tags()["scalars"]
    by_tokens = EventAccumulator(str(tmp_path / "tensorboard" / "by_tokens"))
    by_tokens.Reload()
    assert [(e.step, e.value) for e in by_tokens.Scalars("evaluation/avg@1")] == [(0, 0.25)]
    accuracy = [(e.step, e.value) for e in by_tokens.Scalars("rollout/accuracy")]
    assert accuracy == [(10, 0.25), (20, 0.5), (30, 1.0)]


def test_a_kill_loses_no_event(tmp_path: Path) -> None:
    with RunLog(recipe_for(tmp_path, "logs.tensorboard=true"), Console(file=io.StringIO())) as log:
        log.write(1, ppo={"kl": 0.5})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.value for event in events.Scalars("ppo/kl")] == [0.5]


def test_tensorboard_can_be_turned_off(tmp_path: Path) -> None:
    write_steps(recipe_for(tmp_path), 1)
    assert not (tmp_path / "tensorboard").exists()


# -- failures to write -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_the_run_with_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(LogError, match=r"metrics\.jsonl: No space left.*--resume auto"):
        write_steps(recipe_for(tmp_path), 1)


def test_a_full_disk_at_a_resume_takes_no_row_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')

    def full(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(LogError, match="No space left"):
            JsonLines(path, 2)
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_under_tensorboard_is_seen_in_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    whole, written = RecordWriter.write, []

    def write(self: RecordWriter, data: bytes) -> None:
        written.append(data)
        if len(written) > 2:  # what opening the log writes still fits
            raise OSError(28, "No space left on device")
        whole(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr("threading.excepthook", lambda *_: None)  # of TensorBoard's own thread
    log = RunLog(recipe_for(tmp_path, "logs.tensorboard=true"), Console(file=io.StringIO()))
    log.__enter__()
    with pytest.raises(LogError, match="tensorboard: No space left"):
        log.write(1, ppo={"kl": 0.5})
    assert len(rows_of(tmp_path)) == 1


def test_closing_hides_no_error_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JsonLines) -> None:
        raise LogError("full")

    monkeypatch.setattr(JsonLines, "close", full)
    log = RunLog(recipe_for(tmp_path), Console(file=io.StringIO()))
    log.__enter__()
    log.__exit__(ValueError, ValueError("of the run"), None)
    with pytest.raises(LogError, match="full"):
        log.__exit__(None, None, None)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogError, match=r"file.*change run\.output"):
        write_steps(recipe_for(tmp_path / "file"), 1)
