"""Servers that do not answer: one request waits, the others fail at once, one connects in the background."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.errors import Denied, RegistryError, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.upstream.silent_servers import PROBE_INTERVAL, SILENCE_TTL, SilentServers

TIMEOUT = 20.0


class Network:
    """A server that `silent` makes unreachable, and its clients. Attempts that wait are in `attempts`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.servers = SilentServers(self.clock)
        self.attempts: list[Deferred[str]] = []
        self.connected_probes: list[str] = []

    async def _attempt(self) -> str:
        attempt: Deferred[str] = Deferred()
        self.attempts.append(attempt)
        attempt.addBoth(self._finish, attempt)
        return await attempt

    def _finish(self, result: Any, attempt: Deferred[str]) -> Any:
        self.attempts.remove(attempt)
        return result

    def request(self, key: str = "quay.io") -> list[Any]:
        """Start a request. Return a list which gets the connection or the error."""
        results: list[Any] = []
        work = self.servers.connect(key, key, self._attempt, self.connected_probes.append)
        Deferred.fromCoroutine(work).addBoth(
            lambda result: results.append(result.value if isinstance(result, Failure) else result)
        )
        return results

    def time_out(self) -> None:
        """Let the attempts that wait now time out."""
        self.clock.advance(TIMEOUT)
        for attempt in list(self.attempts):
            attempt.errback(UpstreamTimeout(f"quay.io: timed out, not connected after {TIMEOUT:g} s"))

    def answer(self) -> None:
        for attempt in list(self.attempts):
            attempt.callback("connection")


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def silent_network(network: Network) -> Network:
    """A network in which one request has just timed out."""
    [first] = [network.request()]
    network.time_out()
    [error] = first
    assert isinstance(error, UpstreamTimeout)
    return network


def test_only_one_request_waits(silent_network: Network) -> None:
    for _ in range(100):
        [error] = silent_network.request()
        assert isinstance(error, UpstreamTimeout)
        assert (
            error.message == "quay.io: timed out, not connected after 20 s (tried 0 s ago, and again in the background)"
        )
    assert silent_network.attempts == []


def test_other_servers_are_not_concerned(silent_network: Network) -> None:
    other = silent_network.request("ghcr.io")
    silent_network.answer()
    assert other == ["connection"]


def test_one_probe_runs_until_the_server_answers(silent_network: Network) -> None:
    for _ in range(20):
        silent_network.clock.advance(PROBE_INTERVAL)
        for _ in range(5):
            assert isinstance(silent_network.request()[0], UpstreamTimeout)
            assert len(silent_network.attempts) == 1
        silent_network.time_out()  # during a probe no request waits, however long it takes
    silent_network.clock.advance(PROBE_INTERVAL)
    assert isinstance(silent_network.request()[0], UpstreamTimeout)
    silent_network.answer()
    assert silent_network.connected_probes == ["connection"]
    next_request = silent_network.request()
    silent_network.answer()
    assert next_request == ["connection"]


def test_the_memory_ends(silent_network: Network) -> None:
    silent_network.clock.advance(SILENCE_TTL)
    request = silent_network.request()
    assert request == []
    silent_network.answer()
    assert request == ["connection"]


@pytest.mark.parametrize("error", [UpstreamUnreachable("refused"), Denied("forbidden"), ZeroDivisionError()])
def test_a_failure_at_once_is_not_remembered(network: Network, error: Exception) -> None:
    for _ in range(3):
        request = network.request()
        network.attempts[0].errback(error)
        assert request == [error]


def test_a_slow_refusal_is_remembered(network: Network) -> None:
    """No route to the host, or name servers that do not answer."""
    network.request()
    network.clock.advance(3)
    network.attempts[0].errback(UpstreamUnreachable("quay.io: no route"))
    [error] = network.request()
    assert isinstance(error, UpstreamUnreachable)
    network.clock.advance(PROBE_INTERVAL)
    network.request()
    network.attempts[0].errback(UpstreamUnreachable("quay.io: refused"))  # at once: it is there again
    assert network.request() == []
    network.answer()


def test_a_lost_packet_does_not_outweigh_a_later_success(network: Network) -> None:
    lost = network.request()
    network.clock.advance(1)
    other = network.request()
    network.attempts[1].callback("connection")
    network.time_out()
    assert other == ["connection"] and isinstance(lost[0], UpstreamTimeout)
    assert network.request() == []
    network.answer()


def test_close_cancels_the_probe(silent_network: Network) -> None:
    silent_network.clock.advance(PROBE_INTERVAL)
    silent_network.request()
    assert len(silent_network.attempts) == 1
    silent_network.servers.close()
    assert silent_network.attempts == []


@given(st.lists(st.sampled_from(["request", "time out", "answer", "wait"]), max_size=40))
def test_model(steps: list[str]) -> None:
    """After a time-out, no request waits and at most one attempt runs, until the server answers or 30 s have passed."""
    network = Network()
    silent_since: float | None = None
    for step in steps:
        if step == "request":
            result = network.request()
            if silent_since is not None:
                assert isinstance(result[0], RegistryError)
                assert len(network.attempts) <= 1
        elif step == "time out":
            was_waiting = bool(network.attempts)
            network.time_out()
            if was_waiting:
                silent_since = network.clock.seconds()
        elif step == "answer":
            if network.attempts:
                silent_since = None
            network.answer()
        else:
            network.clock.advance(PROBE_INTERVAL)
        is_old = silent_since is not None and network.clock.seconds() - silent_since >= SILENCE_TTL
        if is_old and not network.attempts:
            silent_since = None
    network.servers.close()
