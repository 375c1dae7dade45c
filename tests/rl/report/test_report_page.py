"""The report of a run in a real browser, at two widths."""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from espo_rl.record.run_folder import read_run
from espo_rl.report import command as report
from espo_rl.report.curves import panels
from espo_rl.types import Problem
from tests.helpers.browser import in_browser
from tests.helpers.report import (
    ASKING,
    ESTIMATOR,
    HOSTILE,
    RUN_GATE,
    make_run,
    one,
    with_tokenizer,
)

both = pytest.mark.parametrize("width", [1280, 390], ids=["wide", "narrow"])


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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_2000_rollouts_without_a_tokenizer(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    gate = dataclasses.replace(RUN_GATE, rule="success-probability", estimator=ESTIMATOR)
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
@pytest.mark.slow
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
@pytest.mark.slow
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


@in_browser
@pytest.mark.slow
@both
@pytest.mark.asyncio(loop_scope="module")
async def test_what_probes_said_is_drawn(browser: Browser, tmp_path: Path, width: int) -> None:
    said = [[4, -1.0, -1.5, -0.1], [8, -3.0, -3.0, -0.2], [12, -0.5, -0.5, -0.3]]
    folder = make_run(tmp_path / "run", batch=[one(1, probes=said), one(2)], gate=ASKING)
    report.main([str(folder)])
    async with opened(browser, folder / "report.html", width) as page:
        await show(page, 0)
        await drawn_in(page, "#trace-probes canvas", "--c1")
        await drawn_in(page, "#trace-value canvas", "--c0")
        keys = await page.locator("#trace-probes .keys li").all_inner_texts()
        assert keys == [
            "reference answer, first token",
            "reference answer",
            "the policy's own word",
        ]
        await show(page, 1)
        assert await page.locator("#trace-probes").count() == 0
