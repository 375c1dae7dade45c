"""A batch is its watches, to the last bit, whoever comes and goes."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Answers, in_order
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.vllm_plugin.batch import Batch, can_be_batched

_finite = st.floats(-20.0, 0.0, width=32)
_logprobs = st.one_of(
    *[_finite] * 12,
    st.sampled_from([0.0, -math.inf, math.inf, math.nan, -9999.0, -1e30]),
)
_gates = st.builds(
    lambda rule, value, p_star, estimator, beta, mean, variance, smoothing, clip, least: (
        gate_from_json(
            json.dumps(
                {
                    **{"rule": rule, "beta": beta, "min_tokens": least},
                    **{"value": value, "p_star": p_star, "estimator": estimator},
                    **({"schedule": {"every": 2}} if "critic" in estimator["sources"] else {}),
                    "statistics": {"mean": mean, "variance": variance},
                    "monitor": {"smoothing": smoothing, "clip": clip},
                }
            ).encode(),
            has_critic=True,
        )
    ),
    st.sampled_from(["none", "regret-only", "value-gated", "success-probability", "value-only"]),
    st.just("stream"),
    st.floats(0.01, 0.5),
    st.builds(
        lambda weights, bias, told: {
            **{"weights": [*weights, *told.values()], "bias": bias},
            "sources": [*in_order([*told])],
        },
        st.lists(st.floats(-1.0, 1.0), min_size=12, max_size=12),
        st.floats(-3.0, 3.0),
        st.fixed_dictionaries(
            {}, optional={"history": st.floats(-1.0, 1.0), "critic": st.sampled_from([-1.0, 1.0])}
        ),
    ),
    st.floats(0.05, 5.0),
    st.floats(0.0, 2.0),
    st.floats(0.01, 4.0),
    st.floats(0.0, 0.99),
    st.floats(0.5, 10.0),
    st.integers(1, 6),
)


def show(watch: Watch, logprob: float, largest: float | None) -> None:
    """A token, and what is asked about it: some say yes, some no, and some nothing."""
    if watch.push(logprob, largest) is Verdict.ASK:
        token = watch.tokens
        answers: Answers = {} if token % 3 == 0 else {"critic": (8.0 * (0.5 - token % 2),)}
        watch.settle(token, watch.valued(token, answers))


@given(
    gates=st.lists(_gates, min_size=1, max_size=6),
    steps=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 2), _logprobs, _logprobs),
            max_size=6,
            unique_by=lambda row: row[0],
        ),
        max_size=40,
    ),
    leaves=st.sets(st.integers(0, 39)),
    history=st.none() | st.floats(-3.0, 3.0),
)
@settings(max_examples=200)
def test_a_batch_is_its_watches(
    gates: list[Gate],
    steps: list[list[tuple[int, int, float, float]]],
    leaves: set[int],
    history: float | None,
) -> None:
    batch = Batch()
    watches: dict[int, Watch] = {}
    references: dict[int, Watch] = {}

    def join(number: int) -> None:
        gate = gates[number % len(gates)]
        assert can_be_batched(gate)
        watches[number], references[number] = (
            Watch(gate, 3 + number, history=history, asks=gate.needs_critic) for _ in range(2)
        )
        batch.add(str(number), watches[number])

    for number in range(6):
        join(number)
    for position, step in enumerate(steps):
        names = [str(number) for number, *_ in step] + ["a stranger"]
        counts = [count for _, count, *_ in step] + [1]
        rows = np.array([(x, top) for *_, x, top in step] + [(-1.0, -1.0)], dtype=np.float32)
        opened = batch.push(names, counts, rows)
        assert set(opened) <= {name for name in names if name in batch}
        for (number, count, *_), row in zip(step, rows.tolist(), strict=False):
            name, watch, reference = str(number), watches[number], references[number]
            followed = name in batch
            assert count == 1 or name in opened or not followed
            for _ in range(count):
                logprob, top = row
                largest = top if logprob <= top else (logprob if top > -9999.0 else None)
                if name in opened:
                    batch.settle(name, watch, reference.tokens)
                    show(watch, logprob, largest)
                    batch.resume(name, watch)
                elif not followed:
                    show(watch, logprob, largest)
                show(reference, logprob, largest)
            batch.settle(name, watch, reference.tokens)
            for what in ("tokens", "cut", "z", "missing", "threshold", "value"):
                assert getattr(watch, what) == getattr(reference, what)
            if watch.statistics is not None and reference.statistics is not None:
                assert watch.statistics.state == reference.statistics.state
            if watch.cut is not None:
                batch.remove(name)
        if position in leaves:
            batch.remove(str(position % 6))
            join(position % 6)


def test_what_follows_more_is_left_to_its_watch() -> None:
    for rule in ("surprise", "random", "length", "confidence"):
        assert not can_be_batched(Gate(rule=rule))
    assert not can_be_batched(Gate(rule="value-only"))
    assert can_be_batched(Gate(rule="regret-only"))
