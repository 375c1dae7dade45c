"""The report of a run: what it draws, which rollouts it shows, and in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from espo_gateway.monitor import RegretStatistics
from espo_gateway.rules import Gate, Verdict, Watch
from espo_gateway.values import FEATURES, SuccessEstimator
from espo_rl import report
from espo_rl.base_model import make_tokenizer
from espo_rl.config import load_recipe
from espo_rl.dumps import RolloutDumps
from espo_rl.intervals import Share
from espo_rl.report_curves import panels, tiles
from espo_rl.report_rollouts import choose, fitting, rollouts
from espo_rl.report_traces import trace
from espo_rl.run_folder import RunFolderError, read_run
from espo_rl.token_texts import Pieces, load_tokenizer, token_texts
from espo_rl.types import EndReason, Problem, Rollout

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: install chromium")
both = pytest.mark.parametrize("width", [1280, 390], ids=["wide", "narrow"])
expect.set_options(timeout=20_000)  # a machine may be busy

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> {{data}}"
GATE = Gate(version=3, rule="regret-only", beta=0.5, statistics=RegretStatistics(0.1, 1.0))
ESTIMATOR = SuccessEstimator((0.0, -1.0) + (0.0,) * (len(FEATURES) - 2), 2.0)
CUT = 8


def one(
    number: int = 0, tokens: int = 20, end: EndReason = EndReason.COMPLETED, **fields: Any
) -> Rollout:
    """Token i has the text of the i-th decimal digit; a large regret at token 8."""
    regrets = np.full(tokens, 0.01)
    regrets[CUT - 1 : CUT] = 9.0
    best = np.full(tokens, -0.1)
    values: dict[str, Any] = {
        "kept": tokens,
        "correct": True,
        "reward": 1.0,
        "text": "x" * tokens,
        "gate_version": 3,
    } | fields
    return Rollout(
        problem=Problem(f"p{number}", f"problem {number}", str(number)),
        prompt_ids=[2, 5, 3],
        token_ids=[5 + i % 10 for i in range(tokens)],
        logprobs=best - regrets,
        max_logprobs=best,
        end=end,
        **values,
    )


def stopped(number: int = 0, *, audited: bool, correct: bool | None = None) -> Rollout:
    return one(
        number,
        20 if audited else CUT,
        EndReason.EARLY_STOP,
        kept=CUT,
        audited=audited,
        correct=correct,
        overshoot=0 if audited else 2 + number,
        reward=-1.0,
    )


BATCH = [
    one(1),
    one(2, 30, EndReason.LENGTH, correct=False),
    stopped(3, audited=False),
    stopped(4, audited=True, correct=False),
    stopped(5, audited=True, correct=True),
]


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "rollout/tokens": 100 * step,
        "rollout/tokens_without_stopping": 150.0 * step if step != 2 else None,
        "rollout/accuracy": 0.1 * step,
        "rollout/stop_share": 0.6,
        "rollout/length": 10.0,
        "rollout/errors": 0,
        "rollout/audited": 2,
        "rollout/audited_correct": 1,
        "stopping/threshold": 0.5,
        "stopping/false_positives_upper": 1.0 if step == 1 else 0.2,
        "ppo/entropy": 0.5 / step,
        "ppo/kl": 1e-5,
        "seconds/rollout": 2.0,
        "seconds/step": 3.0,
        **more,
    }


def make_run(
    folder: Path, batch: list[Rollout] = BATCH, gate: Gate = GATE, steps: int = 3, **options: Any
) -> Path:
    """A run's folder, as a run leaves it."""
    recipe = load_recipe(
        "arithmetic", [f"run.output={folder}", f"run.steps={steps}", "model.path=nowhere/at-all"]
    )
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    estimate = {"value": 0.25, "interval": [0.125, 0.5]}
    rows = [{"step": 0, "evaluation/avg@1": estimate}]
    rows += [metrics(step, **options) for step in range(1, steps + 1)]
    rows += [{"step": steps, "evaluation/avg@1": estimate | {"value": 0.5}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dumps = RolloutDumps(recipe)
    for step in range(1, steps + 1):
        dumps.write(step, batch, gate)
    return folder


def with_tokenizer(folder: Path) -> Path:
    make_tokenizer().save_pretrained(folder / "actor")
    # What names the kind of model, without one.
    (folder / "actor" / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def opened_trace(packed: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    """By panel and label."""
    return {
        f"{panel['id']}/{line['label']}": line
        for panel in panels([read_run(folder)])
        for line in panel["lines"]
    }


# -- curves ----------------------------------------------------------------------------------------


def test_curves_follow_from_the_log(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path / "run"))
    assert lines["accuracy-step/training rollouts"]["x"] == [1, 2, 3]
    assert lines["accuracy-tokens/training rollouts"]["x"] == [100, 300, 600]
    evaluation = lines["accuracy-tokens/evaluation avg@1"]
    assert (evaluation["x"], evaluation["y"]) == ([0, 600], [0.25, 0.5])
    assert (evaluation["low"], evaluation["high"]) == ([0.125, 0.125], [0.5, 0.5])
    assert lines["tokens/without stopping"]["y"] == [150, None, 450]
    assert lines["tokens-total/sampled"]["y"] == [100, 300, 600]
    # The second step has no estimate: it counts as sampled.
    assert lines["tokens-total/without stopping"]["y"] == [150, 350, 800]
    assert lines["length/as cut"]["y"] == [10, 10, 10]
    assert lines["length/in full"]["y"] == [round(150 / 128, 5), None, round(450 / 128, 5)]
    audited = lines["false-positives/audited"]
    assert audited["y"] == [0.5, 0.5, 0.5]
    low, high = Share(3, 6).interval
    assert audited["low"][2] == pytest.approx(low, rel=1e-5)
    assert audited["high"][2] == pytest.approx(high, rel=1e-5)
    assert lines["false-positives/bound"]["y"] == [None, 0.2, 0.2]
    assert lines["false-positives/wished (at most)"]["y"] == [0.05] * 3
    assert lines["seconds/step"]["y"] == [3, 3, 3]
    assert "explained/critic" not in lines  # of which nothing is known


def test_what_a_run_logged_of_the_whole_comes_before_what_is_pieced_together(
    tmp_path: Path,
) -> None:
    logged = {
        "rollout/tokens_total_without_stopping": 999.0,
        "rollout/length_without_stopping": 77.0,
    }
    lines = lines_of(make_run(tmp_path / "run", **logged))
    assert lines["tokens-total/without stopping"]["y"] == [999] * 3
    assert lines["length/in full"]["y"] == [77] * 3


def test_false_positives_are_those_of_the_last_steps(tmp_path: Path) -> None:
    """So many as the threshold is judged by."""
    folder = make_run(tmp_path / "run", batch=[], steps=30)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:11]:
        row["rollout/audited_correct"] = 2
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    audited = lines_of(folder)["false-positives/audited"]["y"]
    assert audited[9] == 1.0
    assert audited[-1] == 0.5


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
    return load_tokenizer(run).decode(rollout.token_ids, skip_special_tokens=False)


# -- token by token --------------------------------------------------------------------------------

NOISE = np.random.default_rng(1).exponential(1.0, 60)


@pytest.mark.parametrize(
    "gate",
    [
        GATE,
        dataclasses.replace(GATE, rule="value-gated", value="stream", estimator=ESTIMATOR),
        dataclasses.replace(GATE, rule="success-probability", estimator=ESTIMATOR, p_star=0.7),
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


def test_a_trace_of_numbers_that_are_missing() -> None:
    rollout = one(tokens=4)
    rollout.logprobs[1] = math.nan
    shown = trace(rollout, GATE, None, Pieces(), 10)
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
    whole = trace(rollout, GATE, None, Pieces(), 1000)
    shown = trace(rollout, GATE, None, Pieces(), 30)
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


# -- in a browser ----------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # Containers run as root and have no user namespaces; only our own page is opened.
        yield await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@asynccontextmanager
async def opened(browser: Browser, path: Path, width: int = 1280, **options: Any) -> Any:
    """The report; it must have had no problem, asked nobody, and fit its window."""
    context = await browser.new_context(viewport={"width": width, "height": 800}, **options)
    problems: list[str] = []
    asked: list[str] = []
    try:
        page = await context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(path.as_uri())
        await expect(page.locator("body")).to_have_attribute("data-state", "ready")
        yield page
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert problems == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    finally:
        await context.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a tokenizer."""
    folder = with_tokenizer(make_run(tmp_path_factory.mktemp("report") / "run"))
    report.main([str(folder)])
    return folder / "report.html"


def rows(page: Page) -> Any:
    return page.locator("#table tbody tr")


async def first_column(page: Page) -> list[int]:
    return [int(text) for text in await page.locator("#table tbody button").all_inner_texts()]


async def select(page: Page, name: str) -> None:
    option = page.locator("#show option", has_text=re.compile(f"^{name}"))
    await page.locator("#show").select_option(await option.get_attribute("value"))


async def show(page: Page, row: int) -> None:
    await rows(page).nth(row).click()
    chosen = await rows(page).nth(row).get_attribute("data-id")
    await expect(page.locator("#rollout")).to_have_attribute("data-id", chosen)


@in_browser
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_the_curves_are_drawn(browser: Browser, made: Path, width: int) -> None:
    async with opened(browser, made, width) as page:
        figures = page.locator("#curves figure")
        assert await figures.count() == len(panels([read_run(made.parent)]))
        assert await page.locator("#curves canvas").count() == await figures.count()
        stops = page.locator("#panel-stops")
        await expect(stops.locator(".plot")).to_have_attribute(
            "aria-label", "Stop share: stopped from 60\u202f% to 60\u202f%"
        )
        entropy = page.locator("#panel-entropy")
        await expect(entropy.locator(".keys output")).to_have_text("0.1667")
        await entropy.locator(".plot").focus()
        await page.keyboard.press("Home")
        await expect(entropy.locator(".where")).to_have_text("step 1")
        await expect(entropy.locator(".keys output")).to_have_text("0.5")
        await page.keyboard.press("ArrowRight")
        await expect(entropy.locator(".where")).to_have_text("step 2")
        # It is there for the eye, too: a line in its colour.
        await drawn_in(page, "#panel-entropy canvas", "--c0")


async def drawn_in(page: Page, canvas: str, name: str) -> None:
    """Wait until a canvas shows something in a colour of the page."""
    await page.wait_for_function(
        """([canvas, name]) => {
            const found = document.querySelector(canvas);
            const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
            const rgb = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
            const copy = new OffscreenCanvas(found.width, found.height);
            const pixels = copy.getContext("2d", { willReadFrequently: true });
            pixels.drawImage(found, 0, 0);
            const { data } = pixels.getImageData(0, 0, found.width, found.height);
            let count = 0;
            for (let i = 0; i < data.length; i += 4) {
                count += rgb.every((part, j) => Math.abs(data[i + j] - part) < 8);
            }
            return count > 50;
        }""",
        arg=[canvas, name],
    )


@in_browser
@pytest.mark.asyncio(loop_scope="module")
async def test_the_colours_follow_the_system(browser: Browser, made: Path) -> None:
    async with opened(browser, made, color_scheme="light") as page:
        light = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        await drawn_in(page, "#panel-entropy canvas", "--c0")
        await page.emulate_media(color_scheme="dark")
        dark = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert light != dark
        await drawn_in(page, "#panel-entropy canvas", "--c0")


@in_browser
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_the_table_is_filtered_and_sorted(browser: Browser, made: Path, width: int) -> None:
    async with opened(browser, made, width) as page:
        await expect(rows(page)).to_have_count(15)
        for name, found in {
            "stopped": [3, 4, 5, 8, 9, 10, 13, 14, 15],
            "false positives": [5, 10, 15],
            "audited": [4, 5, 9, 10, 14, 15],
            "wrong": [2, 4, 7, 9, 12, 14],
            "cut by max_tokens": [2, 7, 12],
            "failed": [],
        }.items():
            await select(page, name)
            await expect(rows(page)).to_have_count(len(found))
            assert await first_column(page) == found
        await expect(page.locator("#page")).to_have_text("no rollout is like that")
        await select(page, "all")
        await page.locator("#sort").select_option(label="most overshoot")
        assert (await first_column(page))[:3] == [3, 8, 13]
        await page.locator("#sort").select_option(label="longest")
        assert (await first_column(page))[:3] == [2, 7, 12]
        await expect(page.locator("th[aria-sort=descending]")).to_have_text("Tokens")
        await page.locator("th", has_text="Tokens").locator("button").click()
        await expect(page.locator("th[aria-sort=ascending]")).to_have_text("Tokens")
        assert (await first_column(page))[:3] == [3, 8, 13]
        await page.locator("#step").select_option("2")
        await expect(rows(page)).to_have_count(5)
        await page.locator("#text").fill("PROBLEM 4")
        await expect(rows(page)).to_have_count(1)
        assert await first_column(page) == [9]
        await expect(rows(page)).to_contain_text("■stopped, rightly")


@in_browser
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_a_rollout_token_by_token(browser: Browser, made: Path, width: int) -> None:
    async with opened(browser, made, width) as page:
        await select(page, "false positives")
        await show(page, 0)
        await expect(page.locator("#rollout-title")).to_have_text(
            "Rollout 5, step 1: stopped at token 8"
        )
        await expect(page.locator("#facts")).to_contain_text("▲ false positive")
        tokens = page.locator("#tokens .t")
        await expect(tokens).to_have_count(20)
        # By regret, in classes of colour and underline.
        assert [await tokens.nth(i).get_attribute("class") for i in (0, 7, 8)] == [
            "t r0",
            "t r5",
            "t r0 after",
        ]
        await expect(tokens.nth(7)).to_have_css("text-decoration-line", "underline")
        assert await page.locator("#tokens .after").count() == 12
        # The cut stands between the last token that is kept and what followed.
        cut = page.locator("#tokens .t:nth-child(8) + .cut")
        await expect(cut).to_have_text(
            "stopped at token 8; what follows was generated for the audit only"
        )
        await drawn_in(page, "#trace-z canvas", "--stop")
        # A token that is pointed at is marked in the plot,
        readout = page.locator("#readout")
        await tokens.nth(7).hover()
        await expect(readout).to_contain_text("token 8")
        await expect(readout).to_contain_text("regret g 9.00 · z 0.8")
        await expect(readout).to_contain_text("threshold 0.50")
        left = await cursor(page)
        await page.locator("#tokens").focus()
        await page.keyboard.press("ArrowRight")
        await expect(readout).to_contain_text("token 9")
        await expect(tokens.nth(8)).to_have_class("t r0 after active")
        assert await cursor(page) > left
        # and the other way round.
        over = page.locator("#trace-z .u-over")
        await over.scroll_into_view_if_needed()
        box = await over.bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + 1, box["y"] + 20)
        await expect(tokens.nth(0)).to_have_class("t r0 active")
        await tokens.nth(2).hover()  # straight from a plot
        await expect(readout).to_contain_text("token 3")
        await page.locator("#trace-z .plot").focus()
        await page.keyboard.press("End")
        await expect(tokens.nth(19)).to_have_class("t r0 after active")


async def cursor(page: Page) -> float:
    """Where the line of the cursor stands in the plot of z."""
    line = page.locator("#trace-z .u-cursor-x")
    return await line.evaluate("line => new DOMMatrix(getComputedStyle(line).transform).e")


@in_browser
@pytest.mark.asyncio(loop_scope="module")
async def test_rollouts_in_turn_by_keyboard(browser: Browser, made: Path) -> None:
    async with opened(browser, made) as page:
        await select(page, "stopped")
        await page.locator("#table tbody button").first.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#rollout")).to_have_attribute("data-id", "2")
        await expect(page.locator("#previous")).to_be_disabled()
        await expect(page.locator("#tokens .cut")).to_have_text("stopped at token 8")
        await page.locator("#next").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#rollout")).to_have_attribute("data-id", "3")
        await expect(rows(page).nth(1)).to_have_attribute("aria-current", "true")


@in_browser
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_2000_rollouts_without_a_tokenizer(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    gate = dataclasses.replace(GATE, rule="success-probability", estimator=ESTIMATOR)
    folder = make_run(tmp_path / "run", [one(i, 120) for i in range(1000)], gate, steps=3)
    report.main([str(folder)])
    assert (folder / "report.html").stat().st_size < 4e6
    async with opened(browser, folder / "report.html", width) as page:
        await expect(rows(page)).to_have_count(15)  # a page of them, whatever there are
        await expect(page.locator("#chosen")).to_contain_text("2.00\u202fk of 3.00\u202fk")
        await page.locator("#forward").click()
        await expect(page.locator("#page")).to_have_text("16–30 of 2000")
        await show(page, 0)
        await expect(page.locator("#about")).to_contain_text("tokenizer was not found")
        await expect(page.locator("#tokens")).to_have_text("x" * 120)
        await expect(page.locator("#trace-value")).to_contain_text("p*")


@in_browser
@pytest.mark.asyncio(loop_scope="module")
async def test_texts_from_outside_are_text(browser: Browser, tmp_path: Path) -> None:
    rollout = one(1, text=HOSTILE)
    rollout.problem = Problem("1", HOSTILE, HOSTILE)
    folder = make_run(tmp_path / "run", [rollout])
    report.main([str(folder)])
    async with opened(browser, folder / "report.html", 390) as page:
        await expect(page.locator("#prompt")).to_have_text(HOSTILE)
        await expect(page.locator("#tokens")).to_have_text(HOSTILE)
        await expect(rows(page).first).to_contain_text(HOSTILE)
        assert await page.locator("img").count() == 0
        assert await page.title() == "run · ESPO report"


@in_browser
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_two_runs_and_no_rollouts(browser: Browser, tmp_path: Path, width: int) -> None:
    folders = [make_run(tmp_path / name, batch=[], steps=2) for name in ("ppo", "espo")]
    shutil.rmtree(folders[0] / "rollouts")
    report.main([*map(str, folders), "--output", str(tmp_path / "both.html")])
    async with opened(browser, tmp_path / "both.html", width) as page:
        await expect(page.locator(".run h2").nth(1)).to_contain_text("espo")
        await expect(page.locator(".run .letter")).to_have_text(["A", "B"])
        await expect(page.locator("#panel-entropy .keys")).to_contain_text("A entropy")
        await expect(page.locator("#panel-entropy .keys")).to_contain_text("B entropy")
        await drawn_in(page, "#panel-entropy canvas", "--c1")
        await expect(page.locator("#no-rollouts")).to_be_visible()
        await expect(page.locator("#browser")).to_be_hidden()
