"""A critic fitted to recorded rollouts: what it learns, what is measured, what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from espo_gateway.stop.rules import Gate
from espo_rl.config import load_recipe
from espo_rl.ppo.critic import Critic
from espo_rl.pretrain_critic import command as pretrain_critic
from espo_rl.pretrain_critic.__main__ import main, parse
from espo_rl.pretrain_critic.fit import Array, PretrainError, deal, split, usable, values_of
from espo_rl.pretrain_critic.head import fit_head, keep_layers
from espo_rl.pretrain_critic.quality import auc, qualities
from espo_rl.pretrain_critic.settings import Settings
from espo_rl.record.rollout_files import RolloutFiles, read_rollouts
from espo_rl.replay.source import worth_of
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.models import random_checkpoint
from tests.helpers.trainer import Paths, trainer

SLIP = 9  # the token after which all is lost
RIGHT, WRONG = 1.0, -1.0


def make_rollouts(count: int) -> list[Rollout]:
    """Half of them hold the token SLIP somewhere, and just these are wrong."""
    rng = np.random.default_rng(3)
    rollouts = []
    for number in range(count):
        tokens = rng.integers(10, 30, rng.integers(8, 14))
        correct = bool(rng.random() < 0.5)
        if not correct:
            tokens[rng.integers(1, len(tokens) // 2)] = SLIP
        rollouts.append(
            Rollout(
                problem=Problem(f"p{number // 2}", f"problem {number // 2}", "1"),
                prompt_ids=[2, 4 + number // 2 % 5, 3],
                token_ids=tokens.tolist(),
                logprobs=np.where(tokens == SLIP, -3.0, -0.1),
                max_logprobs=np.full(len(tokens), -0.1),
                text="",
                end=EndReason.COMPLETED,
                kept=len(tokens),
                correct=correct,
                reward=RIGHT if correct else WRONG,
            )
        )
    return rollouts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("base"), 0)


def record(folder: Path, rollouts: list[Rollout]) -> Path:
    """A run's folder with the rollouts in two files."""
    files = RolloutFiles(load_recipe("arithmetic-mixed", [f"run.output={folder}"]))
    half = len(rollouts) // 2
    # An answer that no grader could tell is no rollout to learn from.
    lost = replace(rollouts[0], end=EndReason.ERROR, correct=None)
    rollouts = [*rollouts, lost]
    files.write(1, rollouts[:half], Gate())
    files.write(2, rollouts[half:], Gate())
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pretrain_critic", *map(str, arguments)])
    return main()


@pytest.mark.slow  # a trainer is made, whose DeepSpeed compiles itself where it is new
def test_a_critic_that_learns_what_spoils_a_rollout(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, values = record(tmp_path / "run", make_rollouts(300)), tmp_path / "c", tmp_path / "v"
    options = ["--learning-rate", "1e-3", "--epochs", "6", "--values", values]
    assert command(monkeypatch, run, "--model", base, "--output", out, *options) == 0

    report = json.loads((out / "report.json").read_text())
    assert report["epochs"] >= 1
    assert sum(report["rollouts"].values()) == 300
    found = report["held_out"]
    assert found["end"]["explained"] > 0.8
    assert found["end"]["auc"] > 0.95
    assert found["first token"]["explained"] < 0.2  # the prompt says nothing

    # What the trainer makes of it is what was measured, and what the values say.
    paths = Paths(base, out)
    loaded = trainer(paths)
    full = 0
    there: set[str] = set()
    for file in sorted(values.iterdir()):
        rollouts, _ = read_rollouts(file)
        column = pq.read_table(file)["values"].to_pylist()
        for rollout, row in zip(rollouts, column, strict=True):
            if rollout.end is EndReason.ERROR:
                assert row == []
                continue
            expected = loaded.values(rollout.prompt_ids + rollout.token_ids)
            assert row == pytest.approx(expected[len(rollout.prompt_ids) :], abs=1e-5)
            assert len(row) == len(rollout.token_ids)
            full, there = full + 1, there | {rollout.problem.id}
    assert full == report["rollouts"]["held_out"] == 2 * len(there)


def test_v_is_of_the_prefix_that_ends_with_the_token(base: Path) -> None:
    classifier = pretrain_critic.load_critic(str(base), seed=0).classifier
    torch.nn.init.normal_(classifier.score.weight)
    critic = Critic(classifier)
    rollouts = make_rollouts(5)
    for rollout, values in zip(rollouts, values_of(critic, rollouts, Settings()), strict=True):
        assert len(values) == len(rollout.token_ids) + 1
        for kept in (0, 1, len(rollout.token_ids)):
            prefix = rollout.prompt_ids + rollout.token_ids[:kept]
            alone = critic(torch.tensor([prefix]))[0, -1].item()
            assert values[kept] == pytest.approx(alone, abs=1e-3)


def test_a_problem_is_on_one_side_only() -> None:
    parts = split(make_rollouts(200), 0.3)
    sides = [{one.problem.id for one in part} for part in vars(parts).values()]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 100
    assert 30 < len(parts.held_out) < 90


def test_an_audited_rollout_counts_in_full() -> None:
    (stopped,) = make_rollouts(1)
    stopped.end, stopped.audited, stopped.kept = EndReason.EARLY_STOP, True, 3
    assert usable([stopped])[0].kept == len(stopped.token_ids)


def test_ranks_of_ties_count_half() -> None:
    outcomes = np.array([True, True, False, False])
    assert auc(np.array([3.0, 1.0, 1.0, 0.0]), outcomes) == 0.875
    assert math.isnan(auc(np.zeros(2), np.array([True, True])))


def test_quality_by_hand() -> None:
    values = [np.array([0.5, 1.0]), np.array([0.5, 0.0, -1.0])]
    found = qualities(values, [True, False])
    assert found["end"].explained == 1.0
    assert found["end"].mse == 0.0
    assert found["first token"].explained == 0.0
    assert found["first token"].mse == pytest.approx((0.25 + 2.25) / 2)
    assert found["first token"].bce == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert found["prompt, held"].auc == 0.5
    errors = np.array([0.5, 0.0, -1.5, -1.0, 0.0])
    variance = np.array([1.0, 1.0, -1.0, -1.0, -1.0]).var()
    assert found["all tokens"].explained == pytest.approx(1 - errors.var() / variance)
    assert found["all tokens"].states == 5


def test_stopped_rollouts_of_unknown_outcome_are_refused() -> None:
    rollouts = make_rollouts(4)
    rollouts[1].end, rollouts[1].correct = EndReason.EARLY_STOP, None
    with pytest.raises(PretrainError, match=r"1 of 4 .* stopping\.rule=none"):
        usable(rollouts)


@pytest.mark.parametrize(
    ("rollouts", "arguments", "said"),
    [
        (0, [], "no rollouts"),
        (4, [], "record more"),
        (60, ["--model", "/"], "--model / cannot be loaded"),
        (60, ["--model", "nowhere"], "--model: no folder nowhere"),
        (60, ["--learning-rate", "1e30"], "lower --learning-rate"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rollouts: int,
    arguments: list[str],
    said: str,
) -> None:
    run = record(tmp_path / "run", make_rollouts(rollouts)) if rollouts else tmp_path
    out = tmp_path / "critic"
    assert command(monkeypatch, run, "--model", base, "--output", out, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_in_use_is_left_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record(tmp_path / "run", make_rollouts(60))
    assert command(monkeypatch, run, "--model", base, "--output", base) == 2
    assert "not empty" in capsys.readouterr().err
    assert (base / "model.safetensors").exists()


def test_a_fault_while_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = pretrain_critic.load_critic(str(base), seed=0)
    tokenizer = pretrain_critic.load_tokenizer(str(base))
    with pytest.raises(TypeError):
        pretrain_critic.write_critic(tmp_path / "c", critic, {"no JSON": object()}, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="has no tokenizer"):
        pretrain_critic.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "argument",
    [
        *("--held-out=1", "--wrong-reward=1", "--epochs=0", "--seed=-1", f"--seed={2**63}"),
        *("--learning-rate=inf", "--learning-rate=nan", "--right-reward=inf"),
        *("--right-reward=1e39", "--wrong-reward=0.9999"),
    ],
)
def test_arguments_that_make_no_sense(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["x", "--model", "m", "--output", "o", argument])
    assert stopped.value.code == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


# -- the head alone --------------------------------------------------------------------------------


def test_a_head_tells_what_the_states_know(base: Path) -> None:
    critic = pretrain_critic.load_critic(str(base), seed=0)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    rollouts = usable(make_rollouts(1200))
    folds = deal(rollouts, 0.2)
    assert {*folds.tolist()} == {0, 1, 2, 3, 4}
    read: list[int] = []
    values = fit_head(critic, rollouts, folds, Settings(), on_rollouts=read.append)
    assert sum(read) == len(rollouts)
    changed = {name for name, value in critic.state_dict().items() if (value != before[name]).any()}
    assert changed == {"classifier.score.weight"}

    # The states are those of a random policy, and yet tell something of what was read.
    outcomes = [bool(rollout.correct) for rollout in rollouts]
    judged = [rows[:-1] for rows in values]
    assert qualities(judged, outcomes, right=RIGHT, wrong=WRONG)["end"].auc > 0.6


def test_a_fold_is_judged_by_least_squares_over_the_others(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = pretrain_critic.load_critic(str(base), seed=0)
    rollouts = usable(make_rollouts(100))
    folds = deal(rollouts, 0.2)
    monkeypatch.setattr("espo_rl.pretrain_critic.head.PENALTIES", [1e-3])
    values = fit_head(critic, rollouts, folds, Settings())
    states, worth, fold = [], [], []
    for rollout, k in zip(rollouts, folds, strict=True):
        tokens = torch.tensor([rollout.prompt_ids + rollout.token_ids])
        with torch.no_grad():
            states.append(critic.states(tokens)[0, len(rollout.prompt_ids) - 1 :].double().numpy())
        worth += [RIGHT if rollout.correct else WRONG] * len(rollout.token_ids)
        fold += [k] * len(rollout.token_ids)
    seen = np.concatenate([rows[:-1] for rows in states])

    def ridge(chosen: NDArray[np.bool_]) -> Array:
        rows, returns = seen[chosen], np.array(worth)[chosen]
        scales = np.sqrt(1e-3 * (rows**2).sum(axis=0))
        padded = np.concatenate([rows, np.diag(scales)])
        return np.linalg.lstsq(padded, np.append(returns, np.zeros(len(scales))), rcond=None)[0]

    heads = [ridge(np.array(fold) != k) for k in range(5)]
    for rows, value, k in zip(states, values, folds, strict=True):
        assert value == pytest.approx(rows @ heads[k], abs=1e-3)
    written = critic.classifier.score.weight.detach().numpy()[0]
    assert written == pytest.approx(ridge(np.full(len(fold), True)), abs=1e-3)


def test_folds_need_right_and_wrong_ones() -> None:
    rollouts = make_rollouts(40)
    for one in rollouts:
        one.correct = one.problem.id == "p0"
    with pytest.raises(PretrainError, match=r"2 of 40 rollouts are right.*two folds"):
        deal(rollouts, 0.2)


def test_a_trunk_of_fewer_layers_is_its_first_ones(base: Path, tmp_path: Path) -> None:
    critic = pretrain_critic.load_critic(str(base), seed=0)
    tokens = torch.tensor([[4, 5, 6, 7]])
    body = critic.classifier.model
    with torch.no_grad():
        whole = body(input_ids=tokens, output_hidden_states=True).hidden_states
        keep_layers(critic, 1)
        torch.testing.assert_close(critic.states(tokens), body.norm(whole[1]))
    critic.classifier.save_pretrained(tmp_path)
    loaded = pretrain_critic.load_critic(str(tmp_path), seed=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.states(tokens), critic.states(tokens))
    for layers in (2, 9):
        with pytest.raises(PretrainError, match=f"--layers {layers}: the model has 1"):
            keep_layers(critic, layers)


def test_a_head_is_written_as_a_critic(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = record(tmp_path / "run", make_rollouts(120)), tmp_path / "critic"
    options = ["--head-only", "--layers", "1", "--values", tmp_path / "values"]
    assert command(monkeypatch, run, "--model", base, "--output", out, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["head_only"], report["layers"], report["folds"]) == (True, 1, 5)
    assert report["rollouts"] == {"training": 120, "validation": 0, "held_out": 120}
    rows = [
        row
        for file in (tmp_path / "values").iterdir()
        for row in pq.read_table(file, columns=["prompt", "values"]).to_pylist()
    ]
    assert sum(bool(row["values"]) for row in rows) == 120  # every problem's were held out once
    # Of the state that a token is sampled in, as an engine tells it: first, that of the prompt.
    first: dict[str, list[float]] = {}
    for row in rows:
        first.setdefault(row["prompt"], []).extend(row["values"][:1])
    assert len(first) == 60
    assert all(ones == pytest.approx([ones[0]] * len(ones), abs=1e-5) for ones in first.values())
    assert {path.name for path in tmp_path.iterdir()} == {"run", "critic", "values"}
    # Another critic's values take the place of these.
    again = ["--head-only", "--values", tmp_path / "again", "--output", tmp_path / "other"]
    again += ["--wrong-reward", "0", "--right-reward", "2"]
    assert command(monkeypatch, tmp_path / "values", "--model", base, *again) == 0
    worths = [worth_of([*(tmp_path / name).iterdir()]) for name in ("values", "again")]
    assert worths == [(-1.0, 1.0), (0.0, 2.0)]
    for file in (tmp_path / "again").iterdir():
        assert pq.read_table(file).column_names.count("values") == 1
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_frozen_trunk_is_read_in_the_numbers_it_is_served_in(base: Path, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    policy.save_pretrained(tmp_path)
    critic = pretrain_critic.load_critic(str(tmp_path), seed=0, head_only=True)
    kinds = {name: one.dtype for name, one in critic.classifier.named_parameters()}
    assert kinds.pop("score.weight") is torch.float32
    assert {*kinds.values()} == {torch.bfloat16}
    rollouts = usable(make_rollouts(300))
    fit_head(critic, rollouts, deal(rollouts, 0.2), Settings())
    whole = pretrain_critic.load_critic(str(tmp_path), seed=0)
    whole.classifier.score.weight.data.copy_(critic.classifier.score.weight)
    for one, other in zip(
        values_of(critic, rollouts, Settings()),
        values_of(whole, rollouts, Settings()),
        strict=True,
    ):
        assert one == pytest.approx(other, abs=0.1)


def test_fewer_layers_are_for_a_head_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["runs", "--model", "m", "--output", "o", "--layers", "3"])
    assert "--head-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", ["--learning-rate=1e-3", "--epochs=3", "--patience=1", "--seed=4"]
)
def test_what_a_head_alone_does_not_read_is_refused(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["runs", "--model", "m", "--output", "o", given]
    parse(arguments)
    with pytest.raises(SystemExit):
        parse([*arguments, "--head-only"])
    name, _, _ = given.partition("=")
    assert f"{name} has no effect with --head-only" in capsys.readouterr().err
