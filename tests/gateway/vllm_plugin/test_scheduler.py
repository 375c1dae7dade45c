"""The scheduler decides as the gateway does, whatever vLLM does with a request meanwhile."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from espo_gateway.stop.estimate import FEATURES
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.rules import RULES
from espo_gateway.stop.tracks import token_confidence
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.vllm_plugin.scheduler import check_engine
from espo_gateway.vllm_plugin.wire import told_by
from tests.helpers.scheduler import EOS, Answer, Engine, Rollout, rollout, vllm_config

pytestmark = [pytest.mark.slow]

ESTIMATOR = {"weights": [0.0, -0.15, *[-0.2] * (len(FEATURES) - 3), -0.01], "bias": 3.0}
GATES: dict[str, dict[str, Any]] = {
    "none": {},
    "value-gated": {"beta": 1.2, "value": "stream", "estimator": ESTIMATOR},
    "regret-only": {"beta": 0.7},
    "value-only": {"value": "stream", "estimator": ESTIMATOR, "p_star": 0.3},
    "success-probability": {"estimator": ESTIMATOR, "p_star": 0.3},
    "surprise": {"beta": 2.2},
    "confidence": {"confidence": 2.2, "confidence_window": 8, "confidence_top_k": 5},
    "random": {"hazard": 0.05},
    "length": {"beta": 20.0},
}
STRICT = json.dumps({"rule": "regret-only", "beta": 0.5})
LOOSE = json.dumps({"rule": "regret-only", "beta": 1e9})


def fields(gate: str, **others: Any) -> dict[str, Any]:
    return {"espo_gate": gate, **{f"espo_{name}": value for name, value in others.items()}}


def expected(gate_text: str, told: Rollout, prompt_tokens: int = 16) -> int | None:
    """Where the gateway would cut it; it exempts the token that completes."""
    gate = gate_from_json(gate_text.encode(), has_critic=False)
    watch, k = Watch(gate, prompt_tokens), gate.top_logprobs
    for token, row in zip(told.tokens, told.rows, strict=True):
        confidence = token_confidence(row[1 : k + 1], k) if k > 1 else None
        ends = token == EOS
        verdict = watch.push(row[0], max(row[:2]), last=ends, confidence=confidence)
        if verdict is Verdict.STOP:
            return watch.cut
        if ends:
            break
    return None


def check(engine: Engine, table: dict[str, Rollout], gate: str) -> list[int | None]:
    """Every answer ends where it should, and carries nothing that was not asked for."""
    cuts = []
    for name, told in table.items():
        answer = engine.answers[name]
        cut = expected(gate, told)
        cuts.append(cut)
        assert answer.tokens == told.tokens[:cut], name
        assert answer.logprobs == []
        assert answer.stop_reason == ("espo" if cut is not None else None)
        ended = cut is None and told.tokens[-1] == EOS
        assert answer.reason == ("stop" if ended else "length")
    assert not engine.scheduler._monitors
    assert not engine.scheduler._worker_params
    return cuts


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_cuts_where_the_gateway_would(rule: str, asynchronous: bool) -> None:
    gate = json.dumps({"rule": rule, **GATES[rule]})
    table = {f"r{n}": rollout(n, 10 + 3 * n, ends=n % 2 == 0) for n in range(24)}
    engine = Engine(asynchronous=asynchronous)
    for name, told in table.items():
        engine.add(name, told, fields(gate))
    engine.run()
    cuts = check(engine, table, gate)
    assert None in cuts
    assert rule == "none" or len(set(cuts)) > 1
    for name, told in table.items():
        kept = len(engine.answers[name].tokens)
        assert engine.sampled[name] <= kept + asynchronous, "sampled in vain"
        assert kept <= len(told.tokens)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_preempted_and_resumed(asynchronous: bool) -> None:
    table = {f"r{n}": rollout(100 + n, 90) for n in range(12)}
    gate = json.dumps({"rule": "regret-only", "beta": 0.9})
    engine = Engine(asynchronous=asynchronous, blocks=30)
    for name, told in table.items():
        engine.add(name, told, fields(gate))
    engine.run()
    assert engine.preempted > 3
    cuts = check(engine, table, gate)
    assert len(set(cuts)) > 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_running_are_preempted_at_once(asynchronous: bool) -> None:
    """As a reload of weights does that clears the cache: vLLM drops the step in flight."""
    table = {f"r{n}": rollout(200 + n, 60) for n in range(6)}
    engine = Engine(asynchronous=asynchronous)
    for name, told in table.items():
        engine.add(name, told, fields(STRICT))
    for _ in range(7):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    check(engine, table, STRICT)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_running_requests_keep_what_a_reset_of_the_cache_takes_from_all_others(
    asynchronous: bool,
) -> None:
    prompt = tuple(range(4, 52))  # three blocks
    engine = Engine(asynchronous=asynchronous)
    table = {
        name: rollout(seed, 60) for seed, name in enumerate(("before", "after", "further", "last"))
    }

    def cached(name: str, prompt: tuple[int, ...]) -> int:
        """Tokens of a new request's prompt that it need not compute."""
        engine.add(name, table[name], fields(LOOSE), prompt=prompt)
        request = engine.scheduler.requests[name]
        return int(engine.scheduler.kv_cache_manager.get_computed_blocks(request)[1])

    cached("before", prompt)
    for _ in range(7):
        engine.step()
    before = engine.scheduler.requests["before"]
    computed = before.num_computed_tokens
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert before.num_computed_tokens == computed > len(prompt)
    assert cached("after", prompt) == 0
    while before.num_output_tokens < 50:
        engine.step()
    # The prompt is there of "after"; what "before" went on with would be three blocks more.
    assert cached("further", (*prompt, *before.output_token_ids)) == len(prompt)
    assert engine.scheduler.reset_prefix_cache()
    assert cached("last", prompt) == 0
    engine.step()
    assert engine.preempted == 0
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert {name: answer.tokens for name, answer in engine.answers.items()} == {
        name: told.tokens for name, told in table.items()
    }


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_prompt_taken_in_pieces_and_one_from_the_cache(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous, max_num_batched_tokens=64, max_num_seqs=8)
    prompt = [4 + n % 50 for n in range(200)]
    told = rollout(5, 80)
    gate = json.dumps({"rule": "success-probability", **GATES["success-probability"]})
    for name in ("first", "second"):
        engine.add(name, told, fields(gate), prompt=prompt)
        engine.run()
        cut = expected(gate, told, prompt_tokens=200)
        assert engine.answers[name].tokens == told.tokens[:cut]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rule", ["regret-only", "confidence"])
def test_several_tokens_a_step_are_each_checked(asynchronous: bool, rule: str) -> None:
    gate = json.dumps({"rule": rule, **GATES[rule]})
    table = {f"r{n}": rollout(300 + n, 40, ends=n % 2 == 0) for n in range(16)}
    engine = Engine(asynchronous=asynchronous, drafts=3)
    for name, told in table.items():
        engine.add(name, told, fields(gate))
    engine.run()
    cuts = check(engine, table, gate)
    assert len(set(cuts)) > 3


VALUED: dict[str, dict[str, Any]] = {
    "value-gated": {"rule": "value-gated", "beta": 1.2, "value": "critic", "epsilon": 0.1},
    "value-only": {"rule": "value-only", "value": "critic", "p_star": 0.03},
    "estimate": {
        "rule": "success-probability",
        "estimator": {
            "weights": [0.0] * len(FEATURES) + [6.0],
            "bias": -2.0,
            "sources": ["critic"],
        },
        "free": ESTIMATOR,
        "schedule": {"every": 4, "below": 0.8},
        "p_star": 0.2,
    },
}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("name", VALUED)
@pytest.mark.parametrize("trace", [0, 1])
def test_v_that_the_engine_knows_decides(trace: int, name: str, asynchronous: bool) -> None:
    text = json.dumps(VALUED[name])
    gate = gate_from_json(text.encode(), has_critic=True)
    table = {f"r{n}": rollout(400 + n, 60, ends=n % 2 == 0) for n in range(24)}
    engine = Engine(asynchronous=asynchronous, values=True, blocks=30)
    for one, told in table.items():
        engine.add(one, told, fields(text, record=1, trace=trace))
    engine.run()
    assert engine.preempted > 3
    cuts = set()
    for one, told in table.items():
        watch = Watch(gate, 16)
        asked = {}
        for token, (row, value) in enumerate(zip(told.rows, told.values, strict=True), 1):
            ends = told.tokens[token - 1] == EOS
            verdict = watch.push(row[0], max(row[:2]), last=ends)
            if verdict is Verdict.ASK:
                asked[token] = watch.valued(token, {"critic": (value,)})
                verdict = watch.settle(token, asked[token])
            if verdict is Verdict.STOP:
                break
        record = told_by(engine.answers[one].stop_reason)
        assert record is not None
        assert record.cut == watch.cut
        if trace:
            assert record.trace is not None
            assert watch.cut in (None, len(record.trace))
            assert {t: record.trace[t - 1][3] for t in asked} == asked
        assert (record.value, record.threshold) == (watch.value, watch.threshold)
        cuts.add(watch.cut)
    assert len(cuts) > 3


def test_without_v_a_gate_that_asks_for_it_stops_nothing() -> None:
    """As where a critic server is silent."""
    text = json.dumps({**VALUED["value-only"], "p_star": 0.99})
    engine = Engine(values=True)
    engine._values = False  # the worker has fallen silent
    engine.add("r", told := rollout(1, 12), fields(text))
    assert engine.run()["r"].tokens == told.tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drafts": 3}, "not with speculative decoding"),
        ({"pipeline_parallel_size": 2}, "not with pipeline stages"),
        ({"worker_cls": "a.B"}, "by --worker-cls espo_gateway"),
    ],
)
def test_where_v_cannot_be_told_of_every_token(change: dict[str, Any], said: str) -> None:
    config = vllm_config(asynchronous=True, values=True, drafts=change.pop("drafts", 0))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in change.items():
            patch.setattr(config.parallel_config, name, value)
        with pytest.raises(ValueError, match=said):
            check_engine(config)


@pytest.mark.parametrize("asked", [None, 0, 1, -1])
def test_logprobs_are_the_clients_own_affair(asked: int | None) -> None:
    engine, told = Engine(), rollout(1, 12)
    gate = json.dumps({"rule": "confidence", "confidence": 1e-3, "confidence_top_k": 5})
    engine.add("r", told, fields(gate), logprobs=asked)
    answer = engine.run()["r"]
    assert engine.worker_params["r"].logprobs == (5 if asked != -1 else -1)
    # Of rows with more than was asked for vLLM's API server shows what was.
    assert len(answer.logprobs) == (0 if asked is None else 12)


def test_choices_that_share_their_parameters() -> None:
    """Within one process vLLM gives the choices of a request one object."""
    engine, told = Engine(), rollout(1, 12)
    engine.add("0", told, fields(STRICT))
    shared = engine.scheduler.requests["0"].sampling_params.extra_args
    engine.add("1", told, shared)
    engine.run()
    check(engine, {"0": told, "1": told}, STRICT)


def test_shadow_audit_and_off() -> None:
    engine, told = Engine(), rollout(8, 60, ends=True)
    cut = expected(STRICT, told)
    assert cut is not None
    engine.add("shadow", told, fields(STRICT, mode="shadow", record=1))
    engine.add("audited", told, fields(STRICT, audit=1.0, record=1))
    engine.add("spared", told, fields(STRICT, audit=0.0, record=1))
    engine.add("off", told, fields(STRICT, mode="off"))
    answers = engine.run()
    assert [len(answer.tokens) for answer in answers.values()] == [60, 60, cut, 60]
    shadow, audited, spared = (told_by(answers[n].stop_reason) for n in list(answers)[:3])
    assert shadow is not None
    assert audited is not None
    assert spared is not None
    assert (shadow.cut, shadow.tokens, shadow.mode, shadow.audited) == (cut, 60, "shadow", False)
    assert (audited.cut, audited.tokens, audited.mode, audited.audited) == (cut, 60, "shadow", True)
    assert (spared.cut, spared.tokens, spared.mode) == (cut, cut, "enforce")
    assert shadow.z == spared.z
    assert answers["off"].stop_reason is None


def test_the_record_and_the_trace_are_the_gateways() -> None:
    gate_text = json.dumps({"rule": "success-probability", **GATES["success-probability"]})
    engine, told = Engine(), rollout(11, 50)
    engine.add("r", told, fields(gate_text, mode="shadow", record=1, trace=1))
    found = told_by(engine.run()["r"].stop_reason)
    gate = gate_from_json(gate_text.encode(), has_critic=False)
    watch, traced = Watch(gate, 16), Watch(gate, 16, decides=False)
    looks = []
    for row in told.rows:
        watch.push(row[0], max(row[:2]))
        traced.push(row[0], max(row[:2]))
        looks.append(traced.look())
    assert found is not None
    assert found.trace == looks
    assert (found.cut, found.z, found.threshold, found.value) == (
        *(watch.cut, watch.z, watch.threshold, watch.value),
    )


def test_vllms_own_stop_reason_stays() -> None:
    engine, told = Engine(), rollout(2, 20)
    told.tokens[9] = 77
    engine.add("plain", told, fields(LOOSE), stop_token_ids=[77])
    engine.add("told", told, fields(LOOSE, record=1), stop_token_ids=[77])
    answers = engine.run()
    assert answers["plain"].stop_reason == 77
    found = told_by(answers["told"].stop_reason)
    assert found is not None
    assert (found.stop_reason, found.tokens, answers["told"].reason) == (77, 10, "stop")


def test_the_token_that_completes_is_exempt_but_not_the_last_that_fits() -> None:
    always = json.dumps({"rule": "random", "hazard": 1.0, "min_tokens": 10})
    engine = Engine()
    engine.add("eos", rollout(1, 10, ends=True), fields(always))
    engine.add(
        "stop token", rollout(1, 10), fields(always), stop_token_ids=[rollout(1, 10).tokens[9]]
    )
    engine.add("length", rollout(1, 10), fields(always))
    answers = engine.run()
    assert answers["eos"].stop_reason is None
    assert answers["eos"].reason == "stop"
    assert answers["stop token"].stop_reason != "espo"
    assert (answers["length"].reason, answers["length"].stop_reason) == ("length", "espo")


def test_a_step_without_logprobs_or_with_others_is_missing() -> None:
    """Where any request lists tokens of its own, vLLM's V1 worker leaves out all others' top."""
    engine, told = Engine(), rollout(1, 10)
    for n in (2, 5):
        told.rows[n] = [told.rows[n][0], *[float("-inf")] * 8]
    engine.add("r", told, fields(LOOSE, record=1))
    found = told_by(engine.run()["r"].stop_reason)
    assert found is not None
    assert (found.missing, found.tokens) == (2, 10)


@pytest.mark.parametrize(
    ("orders", "field"),
    [
        ({"espo_gate": "{"}, "espo_gate"),
        ({"espo_gate": 3}, "espo_gate"),
        ({"espo_mode": "enforce"}, "espo_gate"),
        (fields('{"rule": "regretonly"}'), "rule"),
        (fields('{"rule": "value-gated", "value": "critic"}'), "critic"),
        (fields('{"rule": "confidence", "confidence_top_k": 21}'), "confidence_top_k"),
        (fields(STRICT, mode="maybe"), "espo_mode"),
        (fields(STRICT, audit=2), "espo_audit"),
        (fields(STRICT, history="much"), "espo_history"),
        (fields(STRICT, record=[1]), "espo_record"),
        (fields(STRICT, trace="yes"), "espo_trace"),
        (fields(STRICT, moed="shadow"), "espo_mode"),
    ],
)
def test_a_wrong_order_fails_its_request_alone(
    orders: dict[str, Any], field: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, told = Engine(), rollout(1, 20)
    logger = logging.getLogger("vllm.espo_gateway.vllm_plugin.scheduler")
    logger.addHandler(caplog.handler)
    try:
        engine.add("wrong", told, orders)
        engine.add("right", told, fields(STRICT))
    finally:
        logger.removeHandler(caplog.handler)
    assert "request wrong is refused" in caplog.text
    assert field in caplog.text
    answers = engine.run()
    assert answers["wrong"].reason == "error"
    assert answers["right"].tokens == told.tokens[: expected(STRICT, told)]


def test_streamed_input_is_refused() -> None:
    engine, told = Engine(), rollout(1, 20)
    engine.add("streamed", told, fields(STRICT), resumable=True)
    engine.add("right", told, fields(STRICT))
    answers = engine.run()
    assert answers["streamed"].reason == "error"
    check(engine, {"right": told}, STRICT)


PLACES = ["Monitor.__init__", "Monitor.push", "Monitor.stop_reason", "order_of", "_read"]


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_of_ours_costs_the_monitoring_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espo_gateway.vllm_plugin import monitor, scheduler

    target: Any = {
        "Monitor": monitor.Monitor,
        "order_of": scheduler,
        "_read": scheduler.Monitored,
    }[place.split(".")[0]]
    name = place.split(".")[-1]
    whole = getattr(target, name)
    engine, told = Engine(), rollout(8, 60, ends=True)
    cut = expected(STRICT, told)
    assert cut is not None
    calls = 0

    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("a fault")
        return whole(*arguments, **named)

    monkeypatch.setattr(target, name, faulty)
    for n in range(4):
        engine.add(f"r{n}", told, fields(STRICT, record=1))
    answers = engine.run()
    assert calls >= 3
    lengths = [len(answer.tokens) for answer in answers.values()]
    assert set(lengths) <= {cut, 60}
    assert (60 in lengths) == (name != "stop_reason")
    for answer in answers.values():
        assert answer.logprobs == []
        found = told_by(answer.stop_reason)
        # Never a cut answer without a word, nor a word of a cut that was none.
        if len(answer.tokens) == 60:
            assert found is None or found.fault is not None
        else:
            assert answer.stop_reason == "espo" if found is None else found.cut == cut
    engine.add("after", told, fields(STRICT))
    assert len(engine.run()["after"].tokens) == cut


def test_an_aborted_request_leaves_nothing() -> None:
    engine = Engine()
    for n in range(3):
        engine.add(f"r{n}", rollout(n, 40), fields(LOOSE))
    engine.step()
    engine.scheduler.finish_requests(["r1"], _aborted())
    engine.run()
    assert not engine.scheduler._monitors
    assert not engine.scheduler._worker_params


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_another_vllm_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    engine, told = Engine(), rollout(8, 60)
    engine.add("r", told, fields(STRICT))
    answer: Answer = engine.run()["r"]
    assert (len(answer.tokens), answer.stop_reason) == (60, None)


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_are_refused_at_the_start(mode: str) -> None:
    with pytest.raises(ValueError, match=f"--logprobs-mode {mode}"):
        Engine(logprobs_mode=mode)
