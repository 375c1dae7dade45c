"""Waiting for whichever ends first."""

from __future__ import annotations

import asyncio

import pytest

from espo_rl.first import first_of


async def test_the_first_is_given_and_the_others_have_ended() -> None:
    ended = []

    async def long(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # to clean up takes a while
            ended.append(name)

    first = await first_of(long("a"), asyncio.sleep(0, "short"), long("b"))
    assert (first.result(), ended) == ("short", ["a", "b"])


async def test_of_two_at_once_the_foremost() -> None:
    fails = asyncio.get_running_loop().create_future()
    fails.set_exception(ValueError("one"))
    gives = asyncio.get_running_loop().create_future()
    gives.set_result(2)
    assert (await first_of(gives, fails)).result() == 2
    with pytest.raises(ValueError, match="one"):
        (await first_of(fails, gives)).result()


async def test_all_end_with_whoever_waits() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def long() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(first_of(long()))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
