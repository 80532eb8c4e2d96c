"""The listener service at start-up and shutdown, with connections in memory and a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.testing import MemoryReactorClock

from dockerproxy.daemon.listener_service import SHUTDOWN_GRACE, EndpointOpener, Listener, ListenerService
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.request import Request


class ListeningReactor(MemoryReactorClock):
    port_in_use: int | None = None
    stops = 0

    def stop(self) -> None:
        self.stops += 1

    def listenTCP(self, port: int, *args: Any, **kwargs: Any) -> Any:
        if port == self.port_in_use:
            raise CannotListenError("", port, OSError(98, "Address already in use"))
        return super().listenTCP(port, *args, **kwargs)


class ListenerServiceHarness:
    """A service with two listeners. A request finishes when the test fires its Deferred in `pending`."""

    def __init__(self, connect_client: Any) -> None:
        self.make_client = connect_client
        self.reactor = ListeningReactor()
        self.transfers = Transfers()
        self.pending: dict[str, Deferred[None]] = {}
        self.closed = 0
        self.close_deferred: Deferred[None] | None = None
        self.stop_handlers: list[Callable[[], None]] = []
        self.sites = [connect_client(self.handle, clock=self.reactor).site for _ in range(2)]
        for site in self.sites:  # close the clients that were created only to get a site
            site.abort()
        self.reactor.advance(0)
        self.service = ListenerService(
            self.reactor,
            [
                Listener("PROXY_LISTEN", ("tcp:3128", "tcp:3129"), self.sites[0]),
                Listener("REGISTRY_LISTEN", ("tcp:5443",), self.sites[1]),
            ],
            EndpointOpener(self.reactor, lambda listener: listener.site),
            self.transfers,
            self.close,
            self.stop_handlers.append,
        )
        self.stopped: list[object] = []

    async def handle(self, request: Request) -> None:
        deferred = self.pending[request.path] = Deferred()
        request.start(200, [], 10)
        request.write(b"01234")
        await deferred
        request.write(b"56789")
        request.finish()

    async def close(self) -> None:
        self.closed += 1
        if self.close_deferred is not None:
            await self.close_deferred

    def connect(self, site: int = 0) -> Any:
        return self.make_client(self.handle, clock=self.reactor, site=self.sites[site])

    def stop(self) -> None:
        self.service.stopService().addCallback(self.stopped.append)
        self.reactor.advance(0)

    @property
    def ports(self) -> list[int]:
        return [server[0] for server in self.reactor.tcpServers]


@pytest.fixture
def harness(connect_client: Any) -> ListenerServiceHarness:
    return ListenerServiceHarness(connect_client)


def test_listens_on_every_endpoint(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    assert harness.ports == [3128, 3129, 5443]
    assert [server[1] for server in harness.reactor.tcpServers] == [
        harness.sites[0],
        harness.sites[0],
        harness.sites[1],
    ]


@pytest.mark.parametrize("busy_port", [3128, 3129, 5443])
def test_start_fails_if_a_port_is_in_use(harness: ListenerServiceHarness, busy_port: int) -> None:
    harness.reactor.port_in_use = busy_port
    with pytest.raises(SystemExit) as exit_info:
        harness.service.startService()
    setting = "REGISTRY_LISTEN" if busy_port == 5443 else "PROXY_LISTEN"
    assert exit_info.value.code == (
        f"docker-registry-proxy: {setting}: cannot listen on tcp:{busy_port}: Address already in use."
    )


def test_an_asynchronous_listen_failure_stops_the_reactor(
    harness: ListenerServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint may fail after start-up. The daemon must not keep running without its port."""
    listening: Deferred[Any] = Deferred()
    monkeypatch.setattr("dockerproxy.daemon.endpoints.serverFromString", lambda *_: _AsyncEndpoint(listening))
    messages: list[str] = []
    monkeypatch.setattr(
        "dockerproxy.daemon.listener_service.log.critical", lambda form, reason: messages.append(reason)
    )
    harness.service.startService()
    assert harness.reactor.stops == 0
    listening.errback(CannotListenError("", 3128, OSError(98, "Address already in use")))
    assert harness.reactor.stops == 1
    assert messages == ["PROXY_LISTEN: cannot listen on tcp:3128: Address already in use."]


class _AsyncEndpoint:
    def __init__(self, listening: Deferred[Any]) -> None:
        self.listening = listening

    def listen(self, factory: Any) -> Deferred[Any]:
        return self.listening


def test_stops_at_once_without_connections(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    harness.stop()
    assert (len(harness.stopped), harness.closed) == (1, 1)
    assert harness.reactor.getDelayedCalls() == []


def test_idle_connections_are_closed_at_once(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    fresh, keepalive, partial_head = harness.connect(), harness.connect(1), harness.connect()
    keepalive.send_request("GET", "/done")
    harness.pending["/done"].callback(None)
    partial_head.send(b"GET / HTT")
    harness.stop()
    for client in (fresh, keepalive, partial_head):
        assert (client.transport.closed, client.transport.aborted) == (True, False)
    assert keepalive.read_response().body == b"0123456789"
    assert len(harness.stopped) == 1


def test_responses_in_progress_may_finish(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    one, other = harness.connect(), harness.connect(1)
    one.send_request("GET", "/one")
    other.send_request("GET", "/other")
    harness.stop()
    harness.reactor.advance(10)
    assert (harness.stopped, harness.closed, one.transport.closed) == ([], 0, False)
    harness.pending["/one"].callback(None)
    harness.reactor.advance(0)
    assert one.read_response().body == b"0123456789"
    assert (one.transport.closed, one.transport.aborted, harness.stopped) == (True, False, [])
    harness.pending["/other"].callback(None)
    harness.reactor.advance(0)
    assert other.read_response().complete
    assert (len(harness.stopped), harness.closed) == (1, 1)
    assert harness.reactor.getDelayedCalls() == []


def test_a_pipelined_request_is_not_started_during_stop(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    client = harness.connect()
    client.send_request("GET", "/one")
    harness.stop()
    client.send_request("GET", "/two")
    harness.pending["/one"].callback(None)
    harness.reactor.advance(0)
    assert "/two" not in harness.pending
    assert client.transport.closed


def test_connections_are_aborted_after_the_grace_period(
    harness: ListenerServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr("dockerproxy.daemon.listener_service.log.warn", lambda form, count, grace: counts.append(count))
    harness.service.startService()
    one, other = harness.connect(), harness.connect(1)
    one.send_request("GET", "/one")
    other.send_request("GET", "/other")
    aborted: list[str] = []
    handle = harness.transfers.add(lambda: aborted.append("tunnel"))
    harness.stop()
    harness.reactor.advance(SHUTDOWN_GRACE - 1)
    assert (harness.stopped, aborted, one.transport.closed) == ([], [], False)
    harness.reactor.advance(1)
    harness.reactor.advance(0)
    assert one.transport.aborted and other.transport.aborted
    assert not one.read_response().complete
    assert aborted == ["tunnel"]
    assert sum(counts) == 3
    assert (len(harness.stopped), harness.closed) == (1, 1)
    harness.transfers.remove(handle)
    assert harness.reactor.getDelayedCalls() == []


def test_all_sites_drain_while_one_is_busy(harness: ListenerServiceHarness) -> None:
    """Clients of a site whose requests have finished are not served on, although another site is still busy."""
    harness.service.startService()
    busy, other = harness.connect(0), harness.connect(1)
    busy.send_request("GET", "/busy")
    other.send_request("GET", "/other")
    harness.stop()
    harness.pending["/other"].callback(None)
    harness.reactor.advance(0)
    response = other.read_response()
    assert response.complete
    assert other.transport.closed
    assert not busy.transport.closed
    late = harness.connect(1)  # accepted just before the port was closed
    late.send_request("GET", "/late")
    harness.pending["/late"].callback(None)
    harness.reactor.advance(0)
    assert late.read_response().fields("Connection") == ["close"]


def test_the_grace_period_is_shared(harness: ListenerServiceHarness) -> None:
    """The whole shutdown ends before systemd sends SIGKILL, regardless of the number of listeners and tunnels."""
    harness.service.startService()
    for site in (0, 1):
        harness.connect(site).send_request("GET", f"/{site}")
    harness.transfers.add(lambda: None)
    harness.stop()
    harness.reactor.advance(SHUTDOWN_GRACE)
    harness.reactor.advance(0)
    assert len(harness.stopped) == 1


def test_tunnels_are_waited_for(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    handle = harness.transfers.add(lambda: None)
    harness.stop()
    harness.reactor.advance(10)
    assert harness.stopped == []
    harness.transfers.remove(handle)
    assert len(harness.stopped) == 1


def test_upstreams_are_closed_last_and_awaited(harness: ListenerServiceHarness) -> None:
    harness.service.startService()
    harness.close_deferred = Deferred()
    harness.stop()
    assert (harness.closed, harness.stopped) == (1, [])
    harness.close_deferred.callback(None)
    assert len(harness.stopped) == 1


def test_a_repeated_stop_aborts_connections(harness: ListenerServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("dockerproxy.daemon.listener_service.log.warn", lambda form, **_: warnings.append(form))
    harness.service.startService()
    client = harness.connect()
    client.send_request("GET", "/one")
    aborted: list[str] = []

    def abort() -> None:
        aborted.append("tunnel")
        harness.transfers.remove(handle)

    handle = harness.transfers.add(abort)
    assert harness.stop_handlers == []
    harness.stop()
    assert len(harness.stop_handlers) == 1
    assert not client.transport.aborted
    harness.stop_handlers[0]()
    harness.reactor.advance(0)
    assert client.transport.aborted
    assert aborted == ["tunnel"]
    assert len(harness.stopped) == 1
    assert warnings
    harness.stop_handlers[0]()  # a third signal finds nothing left to abort
    harness.reactor.advance(1)
    assert aborted == ["tunnel"]


def test_ports_are_closed_first(harness: ListenerServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    listening: Deferred[None] = Deferred()
    harness.service.startService()

    def stop_listening(port: Any) -> Deferred[None] | None:
        stopped.append(port.getHost().port)
        return listening if len(stopped) == 1 else None

    monkeypatch.setattr("twisted.internet.testing._FakePort.stopListening", stop_listening)
    client = harness.connect()
    harness.stop()
    assert not client.transport.closed
    listening.callback(None)
    harness.reactor.advance(0)
    assert stopped == [3128, 3129, 5443]
    assert client.transport.closed
