"""A server that keeps failing is left alone, and tried again by one request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.upstream.breaker import Breaker
from tests.helpers.clock import Clock


def opened(clock: Clock, limit: int = 3) -> Breaker:
    breaker = Breaker(limit, 10.0, clock)
    for _ in range(limit):
        assert (breaker.state, breaker.ready) == ("closed", True)
        breaker.failed(breaker.start())
    assert (breaker.state, breaker.ready) == ("open", False)
    return breaker


def test_failures_in_a_row_open_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.9
    assert breaker.state == "open"
    clock.now += 0.1
    assert (breaker.state, breaker.ready) == ("half-open", True)


def test_a_success_between_failures_does_not() -> None:
    breaker = Breaker(3, 10.0, Clock())
    for _ in range(5):
        breaker.failed(None)
        breaker.failed(None)
        breaker.succeeded()
    assert breaker.state == "closed"


def test_one_request_tries_and_its_success_closes() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    trial = breaker.start()
    assert trial is not None
    assert not breaker.ready
    assert breaker.start() is None
    breaker.succeeded()
    breaker.left(trial)
    assert (breaker.state, breaker.ready, breaker.failures) == ("closed", True, 0)


def test_a_trial_that_fails_opens_it_anew() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    trial = breaker.start()
    breaker.failed(trial)
    breaker.left(trial)
    assert breaker.state == "open"
    clock.now += 10
    assert breaker.ready


def test_a_trial_whose_client_leaves_lets_another_try() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    breaker.left(breaker.start())
    assert breaker.ready
    assert breaker.start() is not None


def test_a_trial_that_has_only_begun_closes_on_probation() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    trial = breaker.start()
    breaker.answered(trial)
    assert (breaker.state, breaker.ready) == ("closed", True)
    breaker.failed(trial)  # it sent headers and hung
    breaker.left(trial)
    assert breaker.state == "open"


def test_late_failures_neither_reopen_nor_hold_off_the_trial() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9
    breaker.failed(None)
    clock.now += 1
    trial = breaker.start()
    breaker.failed(None)
    assert breaker.state == "half-open"
    breaker.answered(trial)
    assert breaker.state == "closed"


def test_a_health_check_lets_the_trial_come_at_once() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.lives()
    assert breaker.ready
    assert breaker.start() is not None


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["start", "answered", "succeeded", "failed", "lives", "pass"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(1, 4))
def test_whatever_happens(operations: list[tuple[str, int]], limit: int) -> None:
    """Never two trials at once, and never a state that nothing leads out of."""
    clock = Clock()
    breaker = Breaker(limit, 10.0, clock)
    flying: list[object | None] = []
    for name, number in operations:
        before, ready = breaker.state, breaker.ready
        if name == "pass":
            clock.now += number
        elif name == "lives":
            breaker.lives()
            assert breaker.state in (before, "half-open")
        elif name == "start":
            flying.append(breaker.start())
            assert (flying[-1] is not None) == (before == "half-open" and ready)
            assert breaker.ready == (before == "closed")
        elif flying:
            flight = flying[number % len(flying)]
            if name == "answered":
                breaker.answered(flight)
                continue  # it goes on
            if name == "failed":
                breaker.failed(flight)
                assert breaker.state != "closed" or breaker.failures < limit
            else:
                breaker.succeeded()
                assert (breaker.state, breaker.failures) == ("closed", 0)
            breaker.left(flight)
            flying.remove(flight)
        if breaker.state == "half-open" and not breaker.ready:
            assert any(flight is not None for flight in flying)  # and when it ends, it is
    for flight in flying:
        breaker.left(flight)
    clock.now += 10
    assert breaker.ready
