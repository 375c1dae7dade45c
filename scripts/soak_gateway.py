"""Hold a gateway under load for minutes: its memory must stay flat and its counters come back.

Streams of all kinds at once, each client replaced by another as soon as it is done: some leave at
random, some servers' answers fail. Exits with 1 and a reason when memory grows, a counter is not
back at zero, a connection is left open, or a request ends in no way it may.

  python scripts/soak_gateway.py                     three minutes at 256 streams
  python scripts/soak_gateway.py --seconds 20 --streams 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.arguments import count, share
from espo_gateway.supervisor import ServerProcess, free_port
from espo_gateway.testing import Body, FakeServer, Fault, Script, Token

GATE = {"rule": "regret-only", "beta": 1.0}
#: All but the endless line, of which the gateway rightly holds megabytes for a moment.
FAULTS: tuple[Fault, ...] = ("reset", "no-body", "garbage", "error", "eof", "half", "stall")
#: Seconds between two looks at the memory; of silence that the gateway bears; and, after the run,
#: until everything must have come to its end.
INTERVAL, IDLE, LEFT = 0.5, 2.0, 30.0
#: Seconds of the shortest run: memory is looked at some times after its warm-up.
LEAST = 2.0
#: Bytes that each request may leave behind. The least thing kept for a request, an entry in a dict
#: with its key, is more than that; a session, a chunk or a connection is kilobytes.
BYTES_PER_REQUEST = 100
#: Bytes that memory may drift within a run however short: the allocator's arenas, which fill up
#: unevenly, and histograms met for the first time.
DRIFT = 4 * 2**20
#: Share of the run before memory is looked at: caches fill and arenas are laid out.
WARM_UP = 0.5


class SoakError(Exception):
    """Something that must not be, found by the soak."""


@dataclass
class Soak:
    """What has been seen. rss: bytes of the gateway's memory at `times`, in seconds from the start.

    done: finished requests at those times. ends: how many requests ended in which way.
    """

    times: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)


def growth(soak: Soak) -> tuple[float, float]:
    """Bytes by which memory grew since the warm-up, by a fitted line, and how much it may."""
    first = next(i for i, t in enumerate(soak.times) if t >= WARM_UP * soak.times[-1])
    times, rss = soak.times[first:], soak.rss[first:]
    mean_time, mean_rss = sum(times) / len(times), sum(rss) / len(rss)
    covariance = sum((t - mean_time) * (r - mean_rss) for t, r in zip(times, rss, strict=True))
    slope = covariance / sum((t - mean_time) ** 2 for t in times)
    allowed = DRIFT + BYTES_PER_REQUEST * (soak.done[-1] - soak.done[first])
    return slope * (times[-1] - times[0]), allowed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="default: 180, at least 2")
    parser.add_argument("--streams", type=count, default=256, help="at once (default: 256)")
    parser.add_argument("--faults", type=share, default=0.02, help="share (default: 0.02)")
    parser.add_argument("--departures", type=share, default=0.2, help="share (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    if not LEAST <= arguments.seconds < float("inf"):
        parser.error(f"--seconds must be at least {LEAST:g}")
    try:
        asyncio.run(soak(arguments))
    except SoakError as error:
        sys.exit(f"soak_gateway: {error}")
    print("memory is flat and nothing is left")


async def soak(arguments: argparse.Namespace) -> None:
    """The whole run. Raises SoakError."""
    rng = random.Random(arguments.seed)

    def script(body: Body) -> Script:
        return script_for(random.Random(body.get("seed", 0)), arguments.faults)

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        async with FakeServer(script) as a, FakeServer(script) as b:
            process = await start_gateway(Path(folder), [a.url, b.url])
            try:
                await put_under_load(process, [a, b], arguments, rng)
            finally:
                await process.stop()


async def start_gateway(folder: Path, upstreams: list[str]) -> ServerProcess:
    port = free_port()
    gate = folder / "gate.json"
    gate.write_text(json.dumps(GATE))
    command = [sys.executable, "-m", "espo_gateway", "--port", str(port), "--gate", str(gate)]
    # Faults are spread over the servers; a breaker would only thin out the load.
    limits = ["--breaker-failures", "1000000", "--log-level", "error"]
    for name in ("--idle-timeout", "--first-token-timeout"):
        limits += [name, str(IDLE)]
    return await ServerProcess.start(
        [*command, *limits, "--upstream", *upstreams],
        log_path=folder / "gateway.log",
        ready_url=f"http://127.0.0.1:{port}/health",
        name="gateway",
    )


async def put_under_load(
    process: ServerProcess,
    servers: list[FakeServer],
    arguments: argparse.Namespace,
    rng: random.Random,
) -> None:
    (gateway,) = psutil.Process(process.pid).children()
    url = next(f"http://127.0.0.1:{c.laddr.port}" for c in gateway.net_connections() if not c.raddr)
    result, files = Soak(), gateway.num_fds()
    end = time.monotonic() + arguments.seconds
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        watching = asyncio.create_task(watch(gateway, servers, result, arguments.seconds))
        asking = [
            asyncio.create_task(
                keep_asking(session, url, random.Random(rng.random()), result, end, arguments)
            )
            for _ in range(arguments.streams)
        ]
        done, stuck = await asyncio.wait(
            asking, timeout=arguments.seconds + LEFT, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in [watching, *stuck]:
            task.cancel()
        for task in done:
            task.result()
        if stuck:
            raise SoakError(f"{len(stuck)} requests have not ended after {LEFT:g} s")
        counters = await settled(session, url, gateway, files)
    for server in servers:
        await asyncio.wait_for(idle(server), LEFT)
    report(result, counters)
    if errors := process.log.strip():
        raise SoakError(f"the gateway logged errors:\n{errors[:2000]}")
    grown, allowed = growth(result)
    if grown > allowed:
        raise SoakError(f"memory grew by {grown / 2**20:.1f} MiB, more than {allowed / 2**20:.1f}")


def script_for(rng: random.Random, faults: float) -> Script:
    """What a server answers: short and long, merged and split, sometimes to be stopped."""
    length = rng.choice((5, 10, 20, 50, 100, 400))
    bad = rng.randrange(length) if rng.random() < 0.3 else length
    tokens = [
        Token(f"word{t} ", *((-0.1, None) if t < bad else (-8.0, -0.1))) for t in range(length)
    ]
    fault = rng.choice(FAULTS) if rng.random() < faults else None
    return Script(
        tokens,
        per_chunk=rng.choice((1, 1, 1, 4)),
        split=rng.choice((None, None, None, 100)),
        fault=fault,
        after=rng.randrange(length),
    )


async def keep_asking(
    session: aiohttp.ClientSession,
    url: str,
    rng: random.Random,
    result: Soak,
    end: float,
    arguments: argparse.Namespace,
) -> None:
    """One request after another until the time is over."""
    while time.monotonic() < end:
        chat, stream = rng.random() < 0.5, rng.random() < 0.6
        body: dict[str, Any] = {"model": "fake", "max_tokens": 2000, "seed": rng.randrange(2**31)}
        body |= {"n": rng.choice((1, 1, 1, 2, 3)), "stream": stream}
        body |= {"messages": [{"role": "user", "content": "p"}]} if chat else {"prompt": "p"}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        leaving = rng.expovariate(2.0) if rng.random() < arguments.departures else None
        try:
            async with asyncio.timeout(leaving):
                result.ends[await ask(session, url + path, body)] += 1
        except TimeoutError:
            result.ends["client left"] += 1


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> str:
    """How a request ended. Raises SoakError when it did in no way it may."""
    async with session.post(url, json=body) as response:
        tail = b""
        try:
            async for data in response.content.iter_any():
                tail = (tail + data)[-2000:]
        except aiohttp.ClientPayloadError as error:
            raise SoakError(f"an answer was cut off: {error}") from error
        if response.status != 200:
            if b'"error"' not in tail:
                raise SoakError(f"HTTP {response.status} without an error: {tail!r}")
            return f"HTTP {response.status}"
        if not body["stream"]:
            return "whole"
        if not tail.endswith(b"data: [DONE]\n\n"):
            raise SoakError(f"a stream without an end: {tail!r}")
        return "error event" if b'data: {"error"' in tail else "whole"


async def watch(
    gateway: psutil.Process, servers: list[FakeServer], result: Soak, seconds: float
) -> None:
    """Take down the gateway's memory, and tell of it ten times."""
    began, told = time.monotonic(), 0.0
    while True:
        now = time.monotonic() - began
        result.times.append(now)
        result.rss.append(gateway.memory_info().rss)
        result.done.append(result.ends.total())
        for server in servers:  # what they keep for tests would grow without end
            server.bodies.clear()
            server.headers.clear()
        if now >= told:
            told += seconds / 10
            print(
                f"{now:6.1f} s  rss {result.rss[-1] / 2**20:6.1f} MiB  "
                f"{result.done[-1]:7d} requests  {sum(s.generated for s in servers):9d} tokens",
                flush=True,
            )
        await asyncio.sleep(INTERVAL)


async def settled(
    session: aiohttp.ClientSession, url: str, gateway: psutil.Process, files: int
) -> dict[str, float]:
    """The gateway's counters, once all that must come back to zero has. Raises SoakError."""
    deadline = time.monotonic() + LEFT
    while True:
        async with session.get(url + "/metrics") as response:
            text = await response.text()
        counters: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                counters[sample.name] = counters.get(sample.name, 0.0) + sample.value
        held = {
            name: value
            for name, value in counters.items()
            if value and (name.endswith(("_in_flight", "_queued", "_waiting")))
        }
        if (left := gateway.num_fds() - files) > 4:  # our own, and health checks'
            held["open files"] = left
        if not held:
            return counters
        if time.monotonic() > deadline:
            raise SoakError(f"not back at zero: {held}")
        await asyncio.sleep(0.1)


async def idle(server: FakeServer) -> None:
    await server.until(lambda: server.running == 0)


def report(result: Soak, counters: dict[str, float]) -> None:
    for name, number in result.ends.most_common():
        print(f"{number:8d}  {name}")
    for name in ("requests", "client_disconnects", "stops", "generated_tokens", "overshoot_tokens"):
        print(f"{counters.get(f'espo_gateway_{name}_total', 0.0):8.0f}  {name} counted")
    grown, allowed = growth(result)
    print(
        f"rss {min(result.rss) / 2**20:.1f} to {max(result.rss) / 2**20:.1f} MiB; "
        f"since the warm-up {grown / 2**20:+.2f} MiB, at most {allowed / 2**20:.1f} allowed"
    )


if __name__ == "__main__":
    main()
