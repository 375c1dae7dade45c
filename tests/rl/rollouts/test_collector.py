"""Collecting rollouts: the official client, a real gateway, a scripted server."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from openai.types import Completion

from espo_gateway.front.gateway import Gateway
from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.testing.script import Body
from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import RolloutSection
from espo_rl.rollouts.collector import Collector, ProbePhrase, Prompter, read_completion
from espo_rl.types import EndReason, Problem, Request, Rollout
from tests.helpers.gateway import (
    BAD,
    FAILING,
    GOOD,
    gateway_for,
    get_text,
    until_asked,
    until_finished,
    until_running,
)

PROBLEM = Problem(id="358c", prompt="358c", answer="164")
PROMPTER = Prompter(make_tokenizer())


pytestmark = pytest.mark.usefixtures("retry_at_once")


@asynccontextmanager
async def collector_of(
    server: FakeServer, gateway: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Collector]:
    """A collector that reaches the server through a gateway whose rule is on."""
    async with (
        gateway_for(server, **(gateway or {})) as started,
        collector_at(started, **settings) as collector,
    ):
        yield collector


def collector_at(gateway: Gateway, **settings: Any) -> Collector:
    config = RolloutSection(max_tokens=20, **settings)
    return Collector(gateway.url, "fake", PROMPTER, config)


def samples(count: int, **fields: Any) -> list[Request]:
    return [Request(PROBLEM, seed=seed, **fields) for seed in range(count)]


async def one(script: Any, **fields: Any) -> Rollout:
    async with FakeServer(script) as server, collector_of(server) as collector:
        (rollout,) = await collector.collect(samples(1, **fields), temperature=1.0)
    return rollout


# -- how a rollout ended ---------------------------------------------------------------------------


async def test_completed_rollout_has_ids_and_logprobs_of_every_token() -> None:
    # Two tokens with the same text, one without any: only ids can tell them apart.
    tokens = [Token("a", -0.25, None, 7), Token("", -1.5, -0.5, 8), Token("a", -2.0, -0.25, 9)]
    rollout = await one(Script(tokens))
    assert (rollout.end, rollout.kept, rollout.error) == (EndReason.COMPLETED, 3, "")
    assert rollout.token_ids == [7, 8, 9]
    assert rollout.logprobs.tolist() == [-0.25, -1.5, -2.0]
    assert rollout.max_logprobs.tolist() == [-0.25, -0.5, -0.25]
    assert rollout.text == "aa"
    assert rollout.prompt_ids == PROMPTER(PROBLEM)
    assert (rollout.stopped, rollout.audited, rollout.generated) == (False, False, 3)
    assert (rollout.gate_version, rollout.weights_version) == (3, "w5")


async def test_a_rollout_knows_which_weights_sampled_each_token() -> None:
    """Told while the server samples nothing, in the middle of a rollout and before another's
    first token."""
    named = [Gate(version=number, rule="regret-only", beta=number) for number in (3, 4)]
    async with (
        FakeServer(Script([GOOD] * 10), gated=True) as server,
        gateway_for(server, gate=None) as gateway,
        collector_at(gateway) as collector,
    ):
        for gate in named:
            gateway.push_gate(gate_to_json(replace(gate, weights_version="w5")))
        first = asyncio.create_task(collector.rollout(Request(PROBLEM, 0, gate=3), 1.0))
        await until_running(server, 1)
        server.release(6)
        while [session.tokens for session in gateway.sessions] != [6]:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0)
        second = asyncio.create_task(collector.rollout(Request(PROBLEM, 1, gate=4), 1.0))
        await until_running(server, 2)
        gateway.push_gate(gate_to_json(replace(named[1], weights_version="w6")))
        server.release(100)
        one, other = await first, await second
        third = await collector.rollout(Request(PROBLEM, 2, gate=3), 1.0)
    assert one.token_versions == ["w5"] * 6 + ["w6"] * 4
    assert other.token_versions == third.token_versions == ["w6"] * 10
    assert one.weights_changes == [(6, "w6")]
    assert other.weights_changes == []
    # Each is watched by the gate it names, whatever is in force.
    assert [rollout.gate_version for rollout in (one, other, third)] == [3, 4, 3]


async def test_what_was_cut_before_the_weights_changed_is_of_the_old_ones_alone() -> None:
    record = {"cut": 2, "weights_version": "w5", "weights_changes": [(2, "w6")]}
    logprobs = {"token_logprobs": [-0.5, -0.5], "tokens": ["a", "a"], "top_logprobs": [{}, {}]}
    choice = {"index": 0, "text": "aa", "finish_reason": "length", "token_ids": [1, 1]}
    choices = [{**choice, "logprobs": logprobs, "espo": record}]
    fields = {"id": "1", "created": 1, "model": "m", "object": "text_completion"}
    completion = Completion.model_validate({**fields, "choices": choices})
    found = read_completion(completion, PROBLEM, [1], "enforce")
    assert found.token_versions == ["w5"] * 2
    assert found.weights_changes == []


async def test_a_gate_that_nobody_pushed_is_an_error_that_names_it() -> None:
    rollout = await one(Script([GOOD]), gate=17)
    assert rollout.end is EndReason.ERROR
    assert "no gate of version 17" in rollout.error


async def test_length_is_not_completion() -> None:
    rollout = await one(Script([GOOD] * 1000))
    assert (rollout.end, rollout.kept, rollout.generated) == (EndReason.LENGTH, 20, 20)


async def test_completion_at_exactly_the_limit_less_one_is_no_length() -> None:
    assert (await one(Script([GOOD] * 19))).end is EndReason.COMPLETED


@pytest.mark.parametrize("per_chunk", [1, 5, 16])
async def test_early_stop_keeps_what_led_to_the_decision(per_chunk: int) -> None:
    rollout = await one(dataclasses.replace(FAILING, per_chunk=per_chunk))
    assert (rollout.end, rollout.kept) == (EndReason.EARLY_STOP, 8)
    assert (rollout.stopped, rollout.audited) == (True, False)
    assert rollout.token_ids == [1] * 6 + [2] * 2
    assert rollout.logprobs.tolist() == [GOOD.logprob] * 6 + [BAD.logprob] * 2
    assert rollout.max_logprobs.tolist() == [GOOD.logprob] * 6 + [BAD.max_logprob] * 2
    assert rollout.text == "aaaaaabb"
    assert rollout.correct is None


async def test_what_is_told_of_a_rollout_is_asked_for_and_kept() -> None:
    gate = gate_to_json(Gate(schedule=Schedule(every=4, growth=0.0)))
    phrase = ProbePhrase(make_tokenizer(), "=", ";")

    def script(body: Body) -> Script:
        if "logprob_token_ids" not in body:
            return Script([GOOD] * 10)

        def rewrite(answer: Body) -> Body:
            asked = {f"token_id:{token}": -0.5 for token in body["logprob_token_ids"]}
            numbers = {
                "token_ids": [0],
                "logprobs": {"top_logprobs": [asked], "token_logprobs": [-0.1]},
            }
            answer["choices"][0] |= numbers
            return answer

        return Script([GOOD], rewrite=rewrite)

    async with FakeServer(script) as server, gateway_for(server, gate=gate) as gateway:
        config = RolloutSection(max_tokens=20)
        async with Collector(gateway.url, "fake", PROMPTER, config, probe=phrase) as collector:
            asked = samples(1, history=0.25)
            (rollout,) = await collector.collect(asked, temperature=1.0)
    assert rollout.probes == [[4, -0.5, -0.5, -0.1], [8, -0.5, -0.5, -0.1]]
    assert rollout.history == 0.25
    encode = make_tokenizer().encode
    assert server.bodies[1]["prompt"][-1:] == encode("=", add_special_tokens=False)
    answer = encode("164;", add_special_tokens=False)
    assert server.bodies[1]["logprob_token_ids"] == sorted(set(answer))


async def test_overshoot_counts_what_the_server_sampled_past_the_cut() -> None:
    # All sixteen tokens come in one chunk, so eight of them are past the decision.
    rollout = await one(dataclasses.replace(FAILING, per_chunk=16))
    assert (rollout.kept, rollout.overshoot, rollout.generated) == (8, 8, 16)


@pytest.mark.parametrize("tokens", [16, 1000])
async def test_audited_rollout_is_cut_for_training_and_known_to_its_end(tokens: int) -> None:
    script = Script([GOOD] * 6 + [BAD] * (tokens - 6))
    rollout = await one(script, mode="shadow")
    # One that would have run into max_tokens was given up all the same.
    assert (rollout.end, rollout.kept, rollout.audited) == (EndReason.EARLY_STOP, 8, True)
    length = min(tokens, 20)
    assert len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.max_logprobs) == length
    assert rollout.text == "a" * 6 + "b" * (length - 6)
    assert (rollout.overshoot, rollout.generated) == (0, length)


async def test_shadow_mode_alone_is_no_audit() -> None:
    rollout = await one(Script([GOOD] * 5), mode="shadow")
    assert (rollout.end, rollout.kept, rollout.audited) == (EndReason.COMPLETED, 5, False)


async def test_evaluation_is_never_stopped() -> None:
    rollout = await one(FAILING, mode="off")
    assert (rollout.end, rollout.kept, rollout.audited) == (EndReason.COMPLETED, 16, False)


async def test_a_missing_logprob_is_nan_and_shifts_nothing() -> None:
    rollout = await one(Script([GOOD, Token("c", None, None, 3), BAD]))
    assert rollout.token_ids == [1, 3, 2]
    np.testing.assert_array_equal(rollout.logprobs, [GOOD.logprob, math.nan, BAD.logprob])


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_what_the_server_gave_up_is_no_completion(reason: str) -> None:
    rollout = await one(Script([GOOD] * 4, finish_reason=reason))
    assert rollout.end is EndReason.ERROR
    assert reason in rollout.error


# -- what is asked -----------------------------------------------------------------------------


async def test_the_request_asks_for_what_training_needs() -> None:
    async with FakeServer(Script([GOOD])) as server, collector_of(server) as collector:
        await collector.collect(samples(3), temperature=0.7)
        bodies = sorted(server.bodies, key=lambda body: body["seed"])
    assert [body["seed"] for body in bodies] == [0, 1, 2]
    for body in bodies:
        assert body["prompt"] == PROMPTER(PROBLEM)
        assert (body["temperature"], body["max_tokens"]) == (0.7, 20)
        assert body["return_token_ids"] is True
        # Whatever a server's defaults are, the policy itself is sampled from.
        for name, neutral in (
            *(("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)),
            *(("presence_penalty", 0.0), ("frequency_penalty", 0.0)),
        ):
            assert body[name] == neutral
        assert "n" not in body or body["n"] == 1


async def test_rollouts_come_in_the_order_of_the_samples() -> None:
    def by_seed(body: dict[str, Any]) -> Script:
        return Script([Token("a", -0.1, None, body["seed"])] * (30 - 3 * body["seed"]))

    done: list[Rollout] = []
    async with FakeServer(by_seed) as server, collector_of(server) as collector:
        result = await collector.collect(samples(10), temperature=1.0, on_done=done.append)
    assert [rollout.token_ids[0] for rollout in result] == list(range(10))
    assert sorted(map(id, done)) == sorted(map(id, result))


async def test_no_more_requests_at_once_than_allowed() -> None:
    seen: list[int] = []

    def script(body: dict[str, Any]) -> Script:
        seen.append(server.running + 1)
        return Script([GOOD])

    async with (
        FakeServer(script, gated=True) as server,
        gateway_for(server) as gateway,
        collector_at(gateway, concurrency=3) as collector,
    ):
        collecting = asyncio.create_task(collector.collect(samples(8), temperature=1.0))
        for finished in range(5):
            begun = finished + 3
            await until_asked(server, begun)
            await until_running(server, 3)
            # Requests beyond the bound would be on their way by now: this comes after them.
            await get_text(gateway.url + "/v1/models")
            assert len(server.bodies) == begun
            server.release()  # a rollout is one token
            await until_finished(server, finished + 1)
        server.release(3)
        assert len(await collecting) == 8
    assert max(seen) == 3


async def test_as_many_requests_at_once_as_allowed() -> None:
    """The client by itself opens a thousand connections."""
    many = 1100
    config = RolloutSection(max_tokens=20, concurrency=many)
    async with (
        FakeServer(lambda body: Script([GOOD]), gated=True) as server,
        Collector(server.url, "fake", PROMPTER, config) as collector,
    ):
        collecting = asyncio.create_task(collector.collect(samples(many), temperature=1.0))
        await until_running(server, many)
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting


# -- failures --------------------------------------------------------------------------------------


async def test_a_failing_request_never_fails_the_step() -> None:
    def script(body: dict[str, Any]) -> Script:
        faults: dict[int, Any] = {
            1: {"status": 400},
            2: {"fault": "error", "after": 2},
            3: {"fault": "garbage", "after": 2},
            4: {"fault": "eof", "after": 2},
        }
        return Script([GOOD] * 5, **faults.get(body["seed"], {}))

    done: list[Rollout] = []
    async with FakeServer(script) as server, collector_of(server, retries=2) as collector:
        result = await collector.collect(samples(6), temperature=1.0, on_done=done.append)
    assert [rollout.end is EndReason.ERROR for rollout in result] == [False, *[True] * 4, False]
    assert len(done) == 6
    for rollout in result[1:5]:
        assert (rollout.kept, rollout.generated, rollout.token_ids) == (0, 0, [])
        assert rollout.prompt_ids == PROMPTER(PROBLEM)
        assert rollout.error
    assert "as scripted" in result[1].error


async def test_a_transient_503_is_retried() -> None:
    async with (
        FakeServer(Script([GOOD] * 5)) as server,
        collector_of(server, {"attempts": 1}, retries=3) as collector,
    ):
        server.queue += [Script([], status=503), Script([], status=503)]
        (rollout,) = await collector.collect(samples(1), temperature=1.0)
        assert len(server.bodies) == 3
    assert (rollout.end, rollout.kept) == (EndReason.COMPLETED, 5)


async def test_a_lasting_503_is_given_up_after_the_last_try() -> None:
    async with (
        FakeServer(Script([], status=503)) as server,
        collector_of(server, {"attempts": 1}, retries=3) as collector,
    ):
        (rollout,) = await collector.collect(samples(1), temperature=1.0)
        assert len(server.bodies) == 3
    assert rollout.end is EndReason.ERROR
    assert "503" in rollout.error


async def test_a_refused_request_is_not_repeated() -> None:
    async with FakeServer(Script([], status=400)) as server, collector_of(server) as collector:
        (rollout,) = await collector.collect(samples(1), temperature=1.0)
        assert len(server.bodies) == 1
    assert "400" in rollout.error


async def test_a_server_that_falls_silent_is_left() -> None:
    async with (
        FakeServer(Script([GOOD] * 5, fault="stall", after=2)) as server,
        collector_of(server, timeout=0.3, retries=3) as collector,
    ):
        (rollout,) = await collector.collect(samples(1), temperature=1.0)
        await server.until(lambda: server.aborted == 1)
        assert len(server.bodies) == 1  # the same would take as long again
    assert rollout.end is EndReason.ERROR
    assert rollout.error == "no answer within rollout.timeout = 0.3 s"


async def test_a_problem_that_no_tokenizer_takes_costs_its_rollout() -> None:
    half = Request(Problem(id="half", prompt="\ud83d", answer="1"), seed=1)
    async with FakeServer(Script([GOOD] * 5)) as server, collector_of(server) as collector:
        (rollout,) = await collector.collect([half], temperature=1.0)
        assert server.bodies == []
    assert (rollout.end, rollout.prompt_ids) == (EndReason.ERROR, [])
    assert rollout.error


async def test_nobody_listens() -> None:
    async with FakeServer(Script([GOOD])) as server:
        gone = server.url
    config = RolloutSection(retries=2)
    async with Collector(gone, "fake", PROMPTER, config) as collector:
        (rollout,) = await collector.collect(samples(1), temperature=1.0)
    assert rollout.end is EndReason.ERROR
    assert "Connection" in rollout.error


async def test_an_answer_without_token_ids_says_what_to_do() -> None:
    def forgetful(body: dict[str, Any]) -> Script:
        del body["return_token_ids"]
        return Script([GOOD] * 4)

    rollout = await one(forgetful)
    assert rollout.end is EndReason.ERROR
    assert "0 token ids with 4 logprobs" in rollout.error
    assert "return_token_ids" in rollout.error


async def test_an_answer_without_logprobs_says_what_to_do() -> None:
    rollout = await one(Script([GOOD] * 4, logprobs=False), mode="off")
    assert rollout.end is EndReason.ERROR
    assert "4 token ids with 0 logprobs" in rollout.error


@pytest.mark.parametrize("choices", [[], None])
async def test_an_answer_without_choices_is_a_value_error(choices: Any) -> None:
    fields: dict[str, Any] = {"id": "1", "created": 1, "model": "m", "object": "text_completion"}
    completion = Completion.model_construct(**fields, choices=choices)
    with pytest.raises(ValueError, match="no choice"):
        read_completion(completion, PROBLEM, [1], "enforce")
