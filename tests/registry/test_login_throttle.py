"""Delays for clients that guess passwords."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from dockerproxy.registry.login_throttle import LoginThrottle


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> LoginThrottle:
    return LoginThrottle(clock.seconds)


def fail(throttle: LoginThrottle, count: int, client: str = "192.0.2.1") -> None:
    for _ in range(count):
        throttle.record_failure(client)


def test_a_few_failures_cost_nothing(throttle: LoginThrottle) -> None:
    fail(throttle, 4)
    assert throttle.remaining_delay("192.0.2.1") == 0


@pytest.mark.parametrize(("failures", "delay"), [(5, 0.5), (6, 1), (7, 2), (10, 16), (11, 30), (10_000, 30)])
def test_the_delay_doubles_up_to_a_bound(throttle: LoginThrottle, failures: int, delay: float) -> None:
    fail(throttle, failures)
    assert throttle.remaining_delay("192.0.2.1") == delay


def test_the_delay_runs_from_the_last_failure(throttle: LoginThrottle, clock: Clock) -> None:
    fail(throttle, 7)
    clock.advance(1.5)
    assert throttle.remaining_delay("192.0.2.1") == 0.5
    clock.advance(1)
    assert throttle.remaining_delay("192.0.2.1") == 0


def test_other_clients_are_not_delayed(throttle: LoginThrottle) -> None:
    fail(throttle, 20)
    assert throttle.remaining_delay("192.0.2.2") == 0


def test_failures_are_forgotten(throttle: LoginThrottle, clock: Clock) -> None:
    fail(throttle, 20)
    clock.advance(300)
    fail(throttle, 1)
    assert throttle.remaining_delay("192.0.2.1") == 0


def test_a_million_clients_take_a_bounded_table(throttle: LoginThrottle) -> None:
    for number in range(20_000):
        throttle.record_failure(str(number))
    assert len(throttle._failures) == 10_000


def test_a_network_of_ipv6_is_one_client(throttle: LoginThrottle) -> None:
    for number in range(5):
        fail(throttle, 1, f"2001:db8::{number}")
    assert throttle.remaining_delay("2001:db8::ffff") == 0.5
    assert throttle.remaining_delay("2001:db8:0:1::1") == 0
