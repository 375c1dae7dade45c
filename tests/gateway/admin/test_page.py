"""The page at /espo in a real browser, at two widths."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from espo_gateway.app import listen, running
from espo_gateway.config import Config
from espo_gateway.supervisor import free_port
from espo_gateway.testing import FakeServer, Script, Token
from tests.helpers.browser import in_browser
from tests.helpers.gateway import (
    BAD,
    COMPLETIONS,
    FAILING,
    GATE,
    GOOD,
    advance,
    completion_body,
    gateway_for,
    post,
    raw_request,
)

pytestmark = [in_browser, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
WIDTHS = {"wide": 1280, "narrow": 390}
both = pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><b>" + "long" * 200


@dataclass
class Seen:
    """What the browser said and asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type != "log" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    async def text(self, name: str, expected: str | re.Pattern[str]) -> None:
        await expect(self.page.locator(f"#{name}")).to_have_text(expected)

    async def fits(self) -> None:
        """Nothing sticks out to the right."""
        assert await self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@asynccontextmanager
async def opened(browser: Browser, url: str, width: int, *, faults: bool = False) -> Any:
    """The page; at the end it must have had no problem, and have asked nobody else."""
    context = await browser.new_context(viewport={"width": width, "height": 800})
    try:
        seen = Seen(await context.new_page())
        seen.watch()
        await seen.page.clock.install()  # it runs as ever, and can be put forward
        await seen.page.goto(url + "/espo")
        await expect(seen.page.locator("#status")).to_have_text("Live")
        yield seen
        await seen.fits()
        if not faults:
            assert seen.problems == []
        assert [asked for asked in seen.requests if not asked.startswith((url, "data:"))] == []
    finally:
        await context.close()


def gated(tokens: list[Token]) -> FakeServer:
    return FakeServer(Script(tokens), gated=True)


async def points(seen: Seen, row: int = 0) -> int:
    """How many points a row's line has."""
    line = seen.page.locator("#streams tbody tr").nth(row).locator("path.level")
    return len(re.findall("[ML]", await line.get_attribute("d") or ""))


async def until_more_points(seen: Seen, than: int) -> None:
    await seen.page.wait_for_function(
        "n => (document.querySelector('#streams path.level')"
        "?.getAttribute('d')?.match(/[ML]/g) ?? []).length > n",
        arg=than,
    )


@both
async def test_an_idle_gateway_tells_how_to_use_it(browser: Browser, width: int) -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, width) as seen,
    ):
        await seen.text("running", "0")
        await seen.text("share", "–")
        await expect(seen.page.locator("#empty")).to_be_visible()
        await expect(seen.page.locator("#streams")).to_be_hidden()
        await seen.text("example", re.compile(re.escape(f"{gateway.url}/v1/completions")))
        await expect(seen.page.locator("#servers tbody tr")).to_have_count(1)
        await expect(seen.page.locator("#servers tbody")).to_contain_text(server.url)
        await expect(seen.page.locator("#servers tbody")).to_contain_text("healthy")


@both
async def test_the_numbers_of_a_load(browser: Browser, width: int) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        server.queue.extend([Script([GOOD] * 4000, per_chunk=100)] * 3)
        for _ in range(3):
            await post(gateway.url + COMPLETIONS, completion_body(max_tokens=5000))
        await post(gateway.url + COMPLETIONS, completion_body())
        async with opened(browser, gateway.url, width) as seen:
            await seen.text("share", "25\u202f%")
            await seen.text("share-note", "1 of 4")
            await seen.text("saved", "≈\u202f3.99\u202fk")
            await seen.text("rate", "0")
            await seen.text("rate-note", "12.0\u202fk so far")
            await seen.text("rule", "regret-only")
            await seen.text("rule-note", "β 1")
            await seen.text("version", "3")
            await seen.text("requests", "4")
            gateway.push_gate(
                b'{"version": 4, "rule": "value-only", "p_star": 0.125, "constant": 0.5}'
            )
            await seen.text("version", "4")
            await seen.text("rule-note", "p* 0.125, V constant")
            await expect(seen.page.locator("#level-name")).to_have_text("V")
            gateway.push_gate(b'{"version": 5, "rule": "confidence", "confidence": 0.25}')
            await seen.text("version", "5")
            await seen.text("rule-note", "confidence 0.25")


@both
async def test_a_stream_from_its_first_token_to_its_stop(browser: Browser, width: int) -> None:
    async with (
        gated([GOOD] * 6 + [BAD] * 100) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, width) as seen,
    ):
        request = asyncio.create_task(post(gateway.url + COMPLETIONS, completion_body()))
        row = seen.page.locator("#streams tbody tr")
        await expect(row).to_have_count(1)
        await expect(row.locator(".state")).to_have_text("no token yet")
        await advance(server, 3)
        await expect(row.locator(".name")).to_have_text("cmpl-1")
        await expect(row.locator("td.n").first).to_have_text("3")
        await seen.text("running", "1")
        await expect(seen.page.locator("#empty")).to_be_hidden()
        drawn = await points(seen)
        await advance(server, 2)
        await until_more_points(seen, drawn)
        await expect(row.locator("svg")).to_have_attribute("aria-label", "0.00 against 1.00")
        assert await row.locator("path.threshold").get_attribute("d")
        server.release(20)
        await request
        await expect(row).to_have_class("ended stopped")
        await expect(row.locator(".state")).to_have_text("stopped at token 8")
        await expect(row.locator("svg")).to_have_attribute("aria-label", "1.50 against 1.00")
        await seen.text("share", "100\u202f%")
        await seen.text("running", "0")
        await expect(row).to_have_count(1)
        await seen.page.clock.fast_forward(7000)  # so it could be read
        await expect(row).to_have_count(0)
        await expect(seen.page.locator("#empty")).to_be_visible()


async def test_a_shadow_decision_goes_on_and_says_so(browser: Browser) -> None:
    async with (
        gated([GOOD] * 6 + [BAD] * 100) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, 1280) as seen,
    ):
        body = completion_body(espo={"mode": "shadow"})
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        await server.until(lambda: server.running == 1)
        await advance(server, 12)
        row = seen.page.locator("#streams tbody tr")
        await expect(row).to_have_class("would")
        await expect(row.locator(".state")).to_have_text("shadow: would stop at token 8 · fake")
        await expect(row.locator("td.n").first).to_have_text("12")
        writer.transport.abort()
        await server.until(lambda: server.running == 0)
        await expect(row.locator(".state")).to_have_text("aborted")


@both
async def test_200_streams(browser: Browser, width: int) -> None:
    lengths = iter(range(1, 220))

    def script(body: dict[str, Any]) -> Script:
        return Script([GOOD] * next(lengths), fault="stall", after=1000)

    async with (
        FakeServer(script) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, width) as seen,
    ):
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body(n=219))
        await server.until(lambda: server.generated == sum(range(1, 101)) + 119 * 100)
        rows = seen.page.locator("#streams tbody tr")
        await expect(rows).to_have_count(200)
        await seen.text("running", "219")
        await seen.text("shown", "the longest 200 of 219")
        writer.transport.abort()
        await server.until(lambda: server.running == 0)
        await seen.text("running", "0")
        await seen.page.clock.fast_forward(2000)
        await expect(rows).to_have_count(0)


@both
async def test_names_from_outside_are_text(
    browser: Browser, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"id": HOSTILE, "object": "text_completion", "created": 1, "model": HOSTILE}
    monkeypatch.setattr("espo_gateway.testing.server.head", lambda chat, stream=False: dict(head))
    async with (
        gated([GOOD] * 10) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, width) as seen,
    ):
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
        await server.until(lambda: server.running == 1)
        await advance(server, 2)
        gateway.pool.servers[0].url += "/" + HOSTILE
        row = seen.page.locator("#streams tbody tr")
        await expect(row.locator(".name")).to_have_text(HOSTILE[:120])
        await expect(row.locator(".state")).to_contain_text(HOSTILE[:120])
        await expect(seen.page.locator("#servers tbody")).to_contain_text(HOSTILE)
        assert await seen.page.locator("img, b").count() == 0
        assert await seen.page.title() == "ESPO gateway"
        await seen.fits()
        writer.transport.abort()
        await server.until(lambda: server.running == 0)


@both
async def test_a_gateway_that_goes_and_comes_back(browser: Browser, width: int) -> None:
    """As another process would: at the same port, with sums of its own."""
    async with FakeServer(FAILING) as server:
        config = Config((server.url,), port=free_port(), gate=GATE, drain_timeout=0.1)
        async with running(config) as gateway:
            url = gateway.url
            await post(url + COMPLETIONS, completion_body())
            context = opened(browser, url, width, faults=True)
            seen = await context.__aenter__()
            await post(url + COMPLETIONS, completion_body())
            await seen.text("requests", "2")
            await seen.text("share-top", "100\u202f%")
        try:
            await seen.text("status", re.compile("^No answer from the gateway since .* again$"))
            await expect(seen.page.locator("body")).to_have_attribute("data-state", "gone")
            await seen.fits()
            async with running(config, sock=listen(config.host, config.port)):
                await seen.text("status", "Live")
                await seen.text("requests", "0")
                await seen.text("share", "–")
                await seen.text("share-top", "")
        finally:
            await context.__aexit__(None, None, None)
        # The browser says that nobody answered; the page itself had no fault.
        assert all("Failed to load resource" in problem for problem in seen.problems)


async def test_a_refusal_is_told_as_one(browser: Browser) -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, 1280, faults=True) as seen,
    ):
        await seen.page.route("**/live", lambda route: route.fulfill(status=401))
        await seen.text("status", "Not allowed: reload the page and sign in")
        await seen.page.unroute("**/live")
        await seen.text("status", "Live")


async def test_a_hidden_page_asks_for_nothing(browser: Browser) -> None:
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, 1280) as seen,
    ):
        held = asyncio.Event()

        async def hold(route: Any) -> None:
            await held.wait()
            await route.continue_()

        # Hidden while a request is out: its answer must not start another.
        await seen.page.route("**/live", hold)
        async with seen.page.expect_request("**/live"):
            pass
        await seen.page.evaluate(hide, True)
        await seen.text("status", "Paused while hidden")
        async with seen.page.expect_response("**/live") as answer:
            held.set()
        await (await answer.value).finished()
        asked = len(seen.requests)
        await seen.page.clock.run_for(60_000)
        assert len(seen.requests) == asked
        await post(gateway.url + COMPLETIONS, completion_body())
        await seen.page.evaluate(hide, False)
        await seen.text("requests", "1")
        await seen.text("status", "Live")
        # Hidden while it waits for its next turn.
        await seen.page.evaluate(hide, True)
        await seen.text("status", "Paused while hidden")
        asked = len(seen.requests)
        await seen.page.clock.run_for(60_000)
        assert len(seen.requests) == asked


async def test_servers_in_trouble_are_told_in_words(browser: Browser) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        answers: dict[str, Any] = {}

        async def changed(route: Any) -> None:
            answer = await (await route.fetch()).json()
            answer["servers"] = [{**answer["servers"][0], **answers}]
            await route.fulfill(body=json.dumps(answer), content_type="application/json")

        async with opened(browser, gateway.url, 1280) as seen:
            await seen.page.route("**/live", changed)
            state = seen.page.locator("#servers .words")
            trouble: list[tuple[dict[str, Any], str]] = [
                ({"healthy": False}, "does not answer"),
                ({"breaker": "open"}, "left alone after failures"),
                ({"breaker": "half-open"}, "being tried again"),
                ({"healthy": True, "breaker": "closed"}, "healthy"),
            ]
            for more, words in trouble:
                answers.update(more)
                await expect(state).to_have_text(words)
            await seen.page.unroute_all(behavior="wait")


async def test_numbers_as_people_read_them(browser: Browser) -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        opened(browser, gateway.url, 1280) as seen,
    ):
        said = await seen.page.evaluate(
            """async () => {
                const { count, round, percent, duration } = await import('./format.js');
                return [
                    [0, 999, 1000, 12345, 999499, 999500, 4560000, null].map(count),
                    [5000, 2500, 10, 500, 100000, 250000].map(round),
                    [0, 0.0123, 0.05, 0.256, 1, null].map(percent),
                    [5, 99, 3600, 7500, 1e6].map(duration),
                ].map((all) => all.map((one) => one.replaceAll('\\u202f', ' ')));
            }"""
        )
        assert said == [
            ["0", "999", "1.00 k", "12.3 k", "999 k", "1.00 M", "4.56 M", "–"],
            ["5 k", "2.5 k", "10", "500", "100 k", "250 k"],
            ["0 %", "1.2 %", "5 %", "26 %", "100 %", "–"],
            ["5 s", "99 s", "60 min", "2 h 5 min", "11 days"],
        ]
