"""The doors at start and at stop, with connections in memory and time that the test holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.testing import MemoryReactorClock

from dockerproxy.daemon.doors import GRACE, Door, Doors
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.request import Request


class Reactor(MemoryReactorClock):
    taken: int | None = None
    stops = 0

    def stop(self) -> None:
        self.stops += 1

    def listenTCP(self, port: int, *args: Any, **kwargs: Any) -> Any:
        if port == self.taken:
            raise CannotListenError("", port, OSError(98, "Address already in use"))
        return super().listenTCP(port, *args, **kwargs)


class Scene:
    """Two doors. A request to either is answered when the test says so."""

    def __init__(self, visit: Any) -> None:
        self.visit = visit
        self.reactor = Reactor()
        self.transfers = Transfers()
        self.waiting: dict[str, Deferred[None]] = {}
        self.closed = 0
        self.closing: Deferred[None] | None = None
        self.repeated: list[Callable[[], None]] = []
        self.sites = [visit(self.answer, clock=self.reactor).site for _ in range(2)]
        for site in self.sites:  # the visitors that came along with them
            site.abort()
        self.reactor.advance(0)
        self.doors = Doors(
            self.reactor,
            [
                Door("PROXY_LISTEN", ("tcp:3128", "tcp:3129"), self.sites[0]),
                Door("REGISTRY_LISTEN", ("tcp:5443",), self.sites[1]),
            ],
            self.transfers,
            self.close,
            self.repeated.append,
        )
        self.stopped: list[object] = []

    async def answer(self, request: Request) -> None:
        waiting = self.waiting[request.path] = Deferred()
        request.start(200, [], 10)
        request.write(b"01234")
        await waiting
        request.write(b"56789")
        request.finish()

    async def close(self) -> None:
        self.closed += 1
        if self.closing is not None:
            await self.closing

    def enter(self, site: int = 0) -> Any:
        return self.visit(self.answer, clock=self.reactor, site=self.sites[site])

    def stop(self) -> None:
        self.doors.stopService().addCallback(self.stopped.append)
        self.reactor.advance(0)

    @property
    def ports(self) -> list[int]:
        return [server[0] for server in self.reactor.tcpServers]


@pytest.fixture
def scene(visit: Any) -> Scene:
    return Scene(visit)


def test_all_doors_are_opened(scene: Scene) -> None:
    scene.doors.startService()
    assert scene.ports == [3128, 3129, 5443]
    assert [server[1] for server in scene.reactor.tcpServers] == [scene.sites[0], scene.sites[0], scene.sites[1]]


@pytest.mark.parametrize("taken", [3128, 3129, 5443])
def test_a_door_that_cannot_be_opened_ends_the_start(scene: Scene, taken: int) -> None:
    scene.reactor.taken = taken
    with pytest.raises(SystemExit) as raised:
        scene.doors.startService()
    setting = "REGISTRY_LISTEN" if taken == 5443 else "PROXY_LISTEN"
    assert raised.value.code == (
        f"docker-registry-proxy: {setting}: tcp:{taken} cannot be listened on: Address already in use."
    )


def test_a_door_that_opens_late_and_not_at_all_ends_the_daemon(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are endpoints that answer later. What fails there must not leave the daemon alive and deaf."""
    opening: Deferred[Any] = Deferred()
    monkeypatch.setattr("dockerproxy.daemon.listeners.serverFromString", lambda *_: _Late(opening))
    told: list[str] = []
    monkeypatch.setattr("dockerproxy.daemon.doors.log.critical", lambda form, why: told.append(why))
    scene.doors.startService()
    assert scene.reactor.stops == 0
    opening.errback(CannotListenError("", 3128, OSError(98, "Address already in use")))
    assert scene.reactor.stops == 1
    assert told == ["PROXY_LISTEN: tcp:3128 cannot be listened on: Address already in use."]


class _Late:
    def __init__(self, opening: Deferred[Any]) -> None:
        self.opening = opening

    def listen(self, factory: Any) -> Deferred[Any]:
        return self.opening


def test_nothing_under_way_is_nothing_to_wait_for(scene: Scene) -> None:
    scene.doors.startService()
    scene.stop()
    assert (len(scene.stopped), scene.closed) == (1, 1)
    assert scene.reactor.getDelayedCalls() == []


def test_idle_connections_are_closed_at_once(scene: Scene) -> None:
    scene.doors.startService()
    fresh, served, half = scene.enter(), scene.enter(1), scene.enter()
    served.request("GET", "/done")
    scene.waiting["/done"].callback(None)
    half.send(b"GET / HTT")
    scene.stop()
    for visitor in (fresh, served, half):
        assert (visitor.wire.closed, visitor.wire.aborted) == (True, False)
    assert served.answer().body == b"0123456789"
    assert len(scene.stopped) == 1


def test_answers_under_way_may_finish(scene: Scene) -> None:
    scene.doors.startService()
    one, other = scene.enter(), scene.enter(1)
    one.request("GET", "/one")
    other.request("GET", "/other")
    scene.stop()
    scene.reactor.advance(10)
    assert (scene.stopped, scene.closed, one.wire.closed) == ([], 0, False)
    scene.waiting["/one"].callback(None)
    scene.reactor.advance(0)
    assert one.answer().body == b"0123456789"
    assert (one.wire.closed, one.wire.aborted, scene.stopped) == (True, False, [])
    scene.waiting["/other"].callback(None)
    scene.reactor.advance(0)
    assert other.answer().whole
    assert (len(scene.stopped), scene.closed) == (1, 1)
    assert scene.reactor.getDelayedCalls() == []


def test_a_further_request_on_a_busy_connection_is_not_begun(scene: Scene) -> None:
    scene.doors.startService()
    visitor = scene.enter()
    visitor.request("GET", "/one")
    scene.stop()
    visitor.request("GET", "/two")
    scene.waiting["/one"].callback(None)
    scene.reactor.advance(0)
    assert "/two" not in scene.waiting
    assert visitor.wire.closed


def test_after_the_grace_what_is_left_is_broken_off(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[int] = []
    monkeypatch.setattr("dockerproxy.daemon.doors.log.warn", lambda form, count, grace: warned.append(count))
    scene.doors.startService()
    one, other = scene.enter(), scene.enter(1)
    one.request("GET", "/one")
    other.request("GET", "/other")
    broken: list[str] = []
    token = scene.transfers.add(lambda: broken.append("tunnel"))
    scene.stop()
    scene.reactor.advance(GRACE - 1)
    assert (scene.stopped, broken, one.wire.closed) == ([], [], False)
    for _ in range(4):  # each thing that is waited for has its turn
        scene.reactor.advance(1)
    assert one.wire.aborted and other.wire.aborted
    assert not one.answer().whole
    assert broken == ["tunnel"]
    assert sum(warned) == 3
    assert (len(scene.stopped), scene.closed) == (1, 1)
    scene.transfers.remove(token)
    assert scene.reactor.getDelayedCalls() == []


def test_the_grace_is_shared(scene: Scene) -> None:
    """All of it together ends before systemd kills, however many doors and tunnels there are."""
    scene.doors.startService()
    for site in (0, 1):
        scene.enter(site).request("GET", f"/{site}")
    scene.transfers.add(lambda: None)
    scene.stop()
    for _ in range(int(GRACE) + 3):
        scene.reactor.advance(1)
    assert len(scene.stopped) == 1


def test_tunnels_are_waited_for(scene: Scene) -> None:
    scene.doors.startService()
    token = scene.transfers.add(lambda: None)
    scene.stop()
    scene.reactor.advance(10)
    assert scene.stopped == []
    scene.transfers.remove(token)
    assert len(scene.stopped) == 1


def test_what_is_behind_is_closed_last_and_waited_for(scene: Scene) -> None:
    scene.doors.startService()
    scene.closing = Deferred()
    scene.stop()
    assert (scene.closed, scene.stopped) == (1, [])
    scene.closing.callback(None)
    assert len(scene.stopped) == 1


def test_asked_to_stop_once_more_it_waits_no_longer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("dockerproxy.daemon.doors.log.warn", lambda form, **_: warned.append(form))
    scene.doors.startService()
    visitor = scene.enter()
    visitor.request("GET", "/one")
    broken: list[str] = []

    def breaks() -> None:
        broken.append("tunnel")
        scene.transfers.remove(token)

    token = scene.transfers.add(breaks)
    assert scene.repeated == []
    scene.stop()
    assert len(scene.repeated) == 1
    assert not visitor.wire.aborted
    scene.repeated[0]()
    scene.reactor.advance(0)
    assert visitor.wire.aborted
    assert broken == ["tunnel"]
    assert len(scene.stopped) == 1
    assert warned
    scene.repeated[0]()  # and once more: there is nothing left to break off
    scene.reactor.advance(1)
    assert broken == ["tunnel"]


def test_ports_are_closed_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    listening: Deferred[None] = Deferred()
    scene.doors.startService()

    def stop_listening(port: Any) -> Deferred[None] | None:
        stopped.append(port.getHost().port)
        return listening if len(stopped) == 1 else None

    monkeypatch.setattr("twisted.internet.testing._FakePort.stopListening", stop_listening)
    visitor = scene.enter()
    scene.stop()
    assert not visitor.wire.closed
    listening.callback(None)
    scene.reactor.advance(0)
    assert stopped == [3128, 3129, 5443]
    assert visitor.wire.closed
