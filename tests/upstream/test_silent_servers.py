"""Servers that do not answer: one request waits, others fail at once in all processes, one asks in the background."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.concurrency import current_client
from dockerproxy.errors import Denied, RegistryError, UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.silent_servers import (
    PROBE_INTERVAL,
    PROBE_TTL,
    SILENCE_TTL,
    SUSPECT_AFTER,
    SilentServers,
)

TIMEOUT = 20.0
QUAY, GHCR = Registry.parse("quay.io"), Registry.parse("ghcr.io")
ERROR = UpstreamTimeout("quay.io:443: timed out, not connected after 20 s")


class Network:
    """Processes with a clock in common. All that wait for a server are in `connects`, `heads` and `probes`."""

    def __init__(self, processes: int = 1) -> None:
        self.clock = Clock()
        self.processes = [SilentServers(self.clock, 2 * TIMEOUT) for _ in range(processes)]
        self.connects: list[Deferred[str]] = []
        self.heads: list[Deferred[str]] = []
        self.probes: list[Deferred[str]] = []
        self.dropped: list[str] = []
        self.messages = 0
        for process in self.processes:
            process.set_on_silent(self.dropped.append)
            for other in self.processes:
                if other is not process:
                    process.subscribe(self._relay(other))

    def _relay(self, other: SilentServers) -> Any:
        def relay(origin: str, message: str, seconds: float) -> None:
            self.messages += 1
            other.add(origin, message, seconds)

        return relay

    async def _wait(self, place: list[Deferred[str]]) -> str:
        work: Deferred[str] = Deferred()
        place.append(work)
        try:
            return await work
        finally:
            place.remove(work)

    def connect(self, origin: Registry = QUAY, process: int = 0) -> list[Any]:
        """Start to connect. Return a list which gets the connection or the error."""
        return outcome(
            self.processes[process].connect(origin, lambda: self._wait(self.connects), lambda: self._wait(self.probes))
        )

    def exchange(self, origin: Registry = QUAY, process: int = 0) -> list[Any]:
        """Send a request on a connection. Return a list which gets the response or the error."""
        return outcome(
            self.processes[process].exchange(origin, lambda: self._wait(self.heads), lambda: self._wait(self.probes))
        )

    def fail(self, place: list[Deferred[str]], error: Exception = ERROR) -> None:
        for work in list(place):
            if not work.called:
                work.errback(error.with_traceback(None))  # otherwise it grows each time that it is raised

    def answer(self, place: list[Deferred[str]]) -> None:
        for work in list(place):
            if not work.called:
                work.callback("response")

    def close(self) -> None:
        for process in self.processes:
            process.close()
        assert not self.probes


def outcome(work: Any) -> list[Any]:
    results: list[Any] = []
    Deferred.fromCoroutine(work).addBoth(
        lambda result: results.append(result.value if isinstance(result, Failure) else result)
    )
    return results


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def silent_network() -> Network:
    """Two processes, of which the first has just found out that nobody can connect."""
    network = Network(2)
    first = network.connect()
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    assert first == [ERROR]
    return network


@pytest.mark.parametrize("process", [0, 1])
def test_only_one_request_waits(silent_network: Network, process: int) -> None:
    for _ in range(100):
        [error] = silent_network.connect(process=process)
        assert isinstance(error, UpstreamTimeout)
        assert error.message == f"{ERROR.message} (tried 0 s ago, and again in the background)"
    assert silent_network.connects == []
    silent_network.close()


def test_requests_that_wait_already_end_with_the_first(network: Network) -> None:
    """Those in other processes too, and those that have been sent on connections that have died unnoticed."""
    network = Network(2)
    waiting = [network.connect()]
    network.clock.advance(TIMEOUT - 1)
    waiting += [network.connect(process=1), network.exchange(), network.exchange(process=1)]
    other = network.connect(GHCR)
    network.clock.advance(1)
    network.connects[0].errback(ERROR)
    for results in waiting:
        assert isinstance(results[0], UpstreamTimeout)
    assert other == [] and len(network.connects) == 1
    assert network.dropped == [QUAY.origin] * 2  # the idle connections
    network.close()


def test_other_servers_are_not_concerned(silent_network: Network) -> None:
    for origin in (GHCR, Registry.parse("http://quay.io"), Registry.parse("quay.io:5000")):
        other = silent_network.connect(origin)
        silent_network.answer(silent_network.connects)
        assert other == ["response"]
    silent_network.close()


def test_one_process_asks_until_the_server_answers(silent_network: Network) -> None:
    """It asks for all, however long that takes, and though no request comes to it."""
    for _ in range(20):
        assert silent_network.probes == []
        silent_network.clock.advance(PROBE_INTERVAL)
        assert len(silent_network.probes) == 1
        for process in (0, 1):
            assert isinstance(silent_network.connect(process=process)[0], UpstreamTimeout)
        silent_network.clock.advance(TIMEOUT)
        silent_network.fail(silent_network.probes)
    silent_network.clock.advance(PROBE_INTERVAL)
    silent_network.answer(silent_network.probes)
    for process in (0, 1):
        request = silent_network.connect(process=process)
        assert request == []
        silent_network.answer(silent_network.connects)
        assert request == ["response"]
    silent_network.clock.advance(PROBE_TTL)
    assert silent_network.probes == [] and silent_network.clock.calls == []
    assert silent_network.messages < 50


def test_nobody_asks_for_ever(silent_network: Network) -> None:
    for _ in range(1000):
        silent_network.clock.advance(PROBE_INTERVAL)
        silent_network.fail(silent_network.probes)
    assert silent_network.clock.calls == []
    silent_network.clock.advance(SILENCE_TTL)
    for process in (0, 1):
        request = silent_network.connect(process=process)
        assert request == []
    silent_network.answer(silent_network.connects)


def test_the_news_of_a_process_that_has_ended_expire(silent_network: Network) -> None:
    silent_network.processes[0].close()
    assert silent_network.clock.calls == []
    silent_network.clock.advance(SILENCE_TTL - 1)
    assert len(silent_network.connect(process=1)) == 1
    silent_network.clock.advance(1)
    assert silent_network.connect(process=1) == []
    silent_network.fail(silent_network.connects, UpstreamUnreachable("refused"))


@pytest.mark.parametrize("error", [UpstreamUnreachable("refused"), Denied("forbidden"), ZeroDivisionError()])
def test_a_failure_at_once_is_not_remembered(network: Network, error: Exception) -> None:
    for _ in range(3):
        request = network.connect()
        network.fail(network.connects, error)
        assert request == [error]
    assert network.clock.calls == []


def test_a_slow_refusal_is_remembered(network: Network) -> None:
    """No route to the host, or silent name servers. A probe that is refused at once shows that it is back."""
    network.connect()
    network.clock.advance(3)
    network.fail(network.connects, UpstreamUnreachable("quay.io: no route"))
    assert isinstance(network.connect()[0], UpstreamUnreachable)
    network.clock.advance(PROBE_INTERVAL)
    network.fail(network.probes, UpstreamUnreachable("quay.io: refused"))
    assert network.connect() == []
    network.answer(network.connects)
    assert network.clock.calls == []


def test_a_lost_packet_does_not_outweigh_a_later_success(network: Network) -> None:
    lost = network.connect()
    network.clock.advance(1)
    other = network.connect()
    network.connects[1].callback("response")
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    assert other == ["response"] and lost == [ERROR]
    assert network.connect() == []
    network.answer(network.connects)


# a server that accepts connections and says nothing


def test_a_server_that_says_nothing(network: Network) -> None:
    first = network.exchange()
    network.clock.advance(SUSPECT_AFTER - 1)
    second = network.exchange()
    network.clock.advance(1)
    assert len(network.probes) == 1  # our own request, which says nothing about any client
    network.clock.advance(TIMEOUT)
    network.heads[0].errback(ERROR)
    assert (first, second) == ([ERROR], [])  # a time-out alone says nothing
    third = network.connect()
    network.answer(network.connects)
    assert third == ["response"]  # and neither does a connection
    network.fail(network.probes)
    assert isinstance(second[0], UpstreamTimeout)
    assert isinstance(network.connect()[0], UpstreamTimeout)
    network.clock.advance(PROBE_INTERVAL)
    network.answer(network.probes)
    assert network.connect() == []
    network.answer(network.connects)
    assert network.clock.calls == []


def test_a_request_that_times_out_before_the_suspicion(network: Network) -> None:
    """PROXY_READ_TIMEOUT may be shorter. Our own request has to fail as well."""
    hanging = network.exchange()
    network.clock.advance(SUSPECT_AFTER - 1)
    network.fail(network.heads)
    assert hanging == [ERROR] and len(network.probes) == 1
    request = network.connect()
    assert request == []
    network.answer(network.probes)
    network.answer(network.connects)
    assert request == ["response"] and network.clock.calls == []


def test_a_path_that_hangs_says_nothing_about_its_server(network: Network) -> None:
    """Any number of requests, and however long: our own request is answered."""
    for _ in range(5):
        hanging = [network.exchange() for _ in range(3)]
        network.clock.advance(SUSPECT_AFTER)
        assert len(network.probes) == 1
        network.answer(network.probes)
        network.clock.advance(TIMEOUT)
        network.fail(network.heads)
        assert hanging == [[ERROR]] * 3
        other = network.connect()
        network.answer(network.connects)
        assert other == ["response"]
    network.clock.advance(SUSPECT_AFTER)
    assert network.clock.calls == []


def test_the_answer_to_any_request_counts(network: Network) -> None:
    hanging = network.exchange()
    network.clock.advance(1)
    answered = network.exchange()
    network.heads[1].callback("response")
    network.clock.advance(SUSPECT_AFTER)
    assert network.probes == [] and answered == ["response"]
    network.fail(network.heads)
    assert hanging == [ERROR]
    assert network.connect() == []
    network.answer(network.connects)


def test_a_probe_that_is_refused_shows_that_the_server_is_there(network: Network) -> None:
    hanging = network.exchange()
    network.clock.advance(SUSPECT_AFTER)
    network.fail(network.probes, UpstreamUnreachable("refused"))
    network.clock.advance(TIMEOUT)
    network.fail(network.heads)
    assert hanging == [ERROR]
    assert network.connect() == []
    network.answer(network.connects)


def test_a_probe_that_times_out_first_counts(network: Network) -> None:
    """A request on a connection that has died waits longer than a new connection needs to fail."""
    hanging = network.exchange()
    network.clock.advance(SUSPECT_AFTER)
    network.clock.advance(TIMEOUT)
    network.fail(network.probes)
    assert isinstance(hanging[0], UpstreamTimeout)
    network.close()


@pytest.mark.parametrize("error", [UpstreamBroken("cut off"), UpstreamUnreachable("reset"), Denied("no")])
def test_other_failures_of_a_request_say_nothing(network: Network, error: Exception) -> None:
    request = network.exchange()
    network.fail(network.heads, error)
    assert request == [error] and network.clock.calls == []
    assert network.connect() == []
    network.answer(network.connects)


def test_a_request_that_its_client_gives_up(network: Network) -> None:
    process = network.processes[0]
    works = [
        Deferred.fromCoroutine(process.connect(QUAY, lambda: network._wait(network.connects), Deferred)),
        Deferred.fromCoroutine(process.exchange(QUAY, lambda: network._wait(network.heads), Deferred)),
    ]
    for work in works:
        results: list[Any] = []
        work.addErrback(results.append)
        work.cancel()
        assert results[0].check(CancelledError)
    assert network.connects == network.heads == network.clock.calls == []


def test_close(silent_network: Network) -> None:
    silent_network.clock.advance(PROBE_INTERVAL)
    assert len(silent_network.probes) == 1
    silent_network.close()
    assert silent_network.clock.calls == []


def test_nothing_begins_after_the_end(network: Network) -> None:
    """Attempts that end with the daemon say nothing about their servers."""
    waiting = [network.connect(), network.exchange()]
    network.clock.advance(TIMEOUT)
    network.processes[0].close()
    network.fail(network.connects, UpstreamBroken("the connection was aborted"))
    network.fail(network.heads)
    assert all(waiting) and network.clock.calls == [] and not network.probes


@pytest.mark.slow
def test_any_number_of_servers(network: Network) -> None:
    """The table is bounded, and a server that leaves it leaves no work behind for ever."""
    network.processes[0].set_is_listed(lambda server: False)
    for number in range(270):
        connect_as(f"192.0.2.{number % 5}", network, Registry.parse(f"host{number}.example"))
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    assert len(network.processes[0]._others) == len(network.processes[0]._active) == 256
    for _ in range(200):
        network.clock.advance(PROBE_INTERVAL)
        network.fail(network.probes)
    assert network.clock.calls == [] and not network.processes[0]._active


@pytest.mark.parametrize("silence", ["connect", "exchange"])
def test_servers_that_one_client_makes_up(network: Network, silence: str) -> None:
    """Below a wildcard there are any number. They leave the registries, and what other clients ask for, alone."""
    [process] = network.processes
    process.set_is_listed(lambda server: server == QUAY)
    network.connect(QUAY)
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    for number in range(300):
        connect_as("192.0.2.1", network, Registry.parse(f"made-up{number}.example"), silence)
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    network.fail(network.heads)
    assert process.places.used == process.places.held_by("192.0.2.1") == process.places.share
    assert isinstance(network.connect(QUAY)[0], UpstreamTimeout)  # at once: it is still known
    connect_as("192.0.2.2", network, GHCR)
    network.clock.advance(TIMEOUT)
    network.fail(network.connects)
    assert process.places.held_by("192.0.2.2") == 1
    assert isinstance(network.connect(GHCR)[0], UpstreamTimeout)
    process.close()
    assert process.places.used == 0 and network.clock.calls == []


def connect_as(client: str, network: Network, origin: Registry, kind: str = "connect") -> None:
    """Begin to connect, or to wait for a response, because of a request of `client`."""
    token = current_client.set(client)
    network.connect(origin) if kind == "connect" else network.exchange(origin)
    current_client.reset(token)


STEPS = ["connect", "exchange", "time out", "refuse", "answer", "wait", "other process", "close"]


@given(st.lists(st.sampled_from(STEPS), max_size=60))
def test_model(steps: list[str]) -> None:
    """While a server is silent no request waits, and at most one asks; nothing is left in the end."""
    network, process = Network(2), 0
    places = (network.connects, network.heads, network.probes)
    for step in steps:
        silent = network.processes[process]._server(QUAY.origin).error is not None
        if step == "connect":
            results = network.connect(process=process)
            still_silent = network.processes[process]._server(QUAY.origin).error is not None
            assert not (silent and still_silent) or isinstance(results[0], RegistryError)
        elif step == "exchange" and not silent:
            network.exchange(process=process)
        elif step == "time out":
            network.clock.advance(TIMEOUT)
            for place in places:
                network.fail(place)
        elif step == "refuse":
            for place in places:
                network.fail(place, UpstreamUnreachable("refused"))
        elif step == "answer":
            for place in places:
                network.answer(place)
        elif step == "wait":
            network.clock.advance(PROBE_INTERVAL)
        elif step == "other process":
            process = 1 - process
        elif step == "close":
            network.processes[process].close()
        assert len(network.probes) <= 2
    for place in places:
        network.answer(place)
    network.close()
    assert network.clock.calls == [] and network.connects == network.heads == []
