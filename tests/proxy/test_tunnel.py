"""Tunnels between two transports in memory, and time that the test holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.proxy.tunnel import ToEnd, Tunnel, TunnelTimeouts


class Pipe:
    """One end's transport. What is written beyond `room` waits, and the producer is told; ends are reported later."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.room = 1 << 60
        self.taken = b""
        self.pending = b""
        self.producer: Any = None
        self.paused = self.reading_paused = self.disconnecting = self.closed = self.aborted = False
        self.protocol: Any = None

    def connect(self, protocol: Any) -> None:
        self.protocol = protocol
        protocol.makeConnection(self)

    def write(self, data: bytes) -> None:
        if self.disconnecting or self.closed:
            return
        self.pending += data
        self.take(0)

    def take(self, more: int) -> None:
        self.room += more
        taken, self.pending = self.pending[: self.room], self.pending[self.room :]
        self.taken += taken
        self.room -= len(taken)
        if self.producer is not None and bool(self.pending) != self.paused:
            self.paused = bool(self.pending)
            if self.paused:
                self.producer.pauseProducing()
            else:
                self.producer.resumeProducing()
        if self.disconnecting and not self.pending:
            self.lose(ConnectionDone())

    def loseConnection(self) -> None:
        assert self.producer is None, "closing waits for a producer that nobody unregistered"
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.take, 0)

    def abortConnection(self) -> None:
        self.aborted = True
        self.clock.callLater(0, self.lose, ConnectionLost())

    def lose(self, reason: Exception) -> None:
        if not self.closed:
            self.closed = True
            producer, self.producer = self.producer, None
            if producer is not None:
                producer.stopProducing()
            self.protocol.connectionLost(Failure(reason))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        assert self.producer is None
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def pauseProducing(self) -> None:
        self.reading_paused = True

    def resumeProducing(self) -> None:
        self.reading_paused = False

    def stopProducing(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    def says(self, data: bytes) -> None:
        """Let the peer send."""
        self.protocol.dataReceived(data)

    def closes(self) -> None:
        """Let the peer close, or say that it sends no more: Twisted tells these apart only for who asks."""
        self.lose(ConnectionDone())


class Scene:
    def __init__(self, *, opened: bool = True, timeouts: TunnelTimeouts | None = None) -> None:
        self.clock = Clock()
        self.ended: list[int] = []
        self.tunnel = Tunnel(self.clock, timeouts or TunnelTimeouts(read=60, send=30), self.ended.append)
        self.client, self.server = Pipe(self.clock), Pipe(self.clock)
        self.server.connect(ToEnd(self.tunnel.server).buildProtocol(None))
        self.client.connect(self.tunnel.client)
        if opened:
            self.tunnel.open()

    def run(self, seconds: float = 0) -> None:
        self.clock.advance(seconds)

    @property
    def over(self) -> bool:
        """Whether nothing is left of the tunnel."""
        return self.client.closed and self.server.closed and not self.clock.getDelayedCalls()


@pytest.fixture
def scene() -> Scene:
    return Scene()


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=50)), max_size=20))
def test_bytes_go_across_in_order_and_are_counted(said: list[tuple[bool, bytes]]) -> None:
    scene = Scene()
    for by_client, data in said:
        (scene.client if by_client else scene.server).says(data)
    down = b"".join(data for by_client, data in said if not by_client)
    assert scene.client.taken == down
    assert scene.server.taken == b"".join(data for by_client, data in said if by_client)
    scene.client.closes()
    scene.run()
    assert scene.ended == [len(down)]
    assert scene.over


def test_what_comes_before_both_are_there_waits() -> None:
    scene = Scene(opened=False)
    scene.client.says(b"early ")
    scene.server.says(b"banner ")
    scene.client.says(b"bird")
    assert (scene.client.taken, scene.server.taken) == (b"", b"")
    scene.tunnel.open()
    assert (scene.client.taken, scene.server.taken) == (b"banner ", b"early bird")


@pytest.mark.parametrize("slow", ["client", "server"])
def test_a_slow_end_holds_the_other_back(scene: Scene, slow: str) -> None:
    taker, sender = (scene.client, scene.server) if slow == "client" else (scene.server, scene.client)
    taker.room = 10
    sender.says(b"x" * 10)
    assert not sender.reading_paused
    sender.says(b"y" * 10)
    assert sender.reading_paused
    assert not taker.reading_paused
    taker.take(5)
    assert sender.reading_paused
    taker.take(5)
    assert not sender.reading_paused
    assert taker.taken == b"x" * 10 + b"y" * 10


@pytest.mark.parametrize("first", ["client", "server"])
def test_when_one_end_closes_the_other_gets_what_is_on_its_way(scene: Scene, first: str) -> None:
    ends, other = (scene.client, scene.server) if first == "client" else (scene.server, scene.client)
    other.room = 3
    ends.says(b"the last words")
    ends.closes()
    scene.run()
    assert (other.taken, other.closed, scene.ended) == (b"the", False, [])
    other.take(100)
    assert (other.taken, other.closed, other.aborted) == (b"the last words", True, False)
    assert scene.ended == [14 if first == "server" else 0]
    assert scene.over


@pytest.mark.parametrize("first", ["client", "server"])
def test_an_end_that_takes_no_last_words_is_not_waited_for(scene: Scene, first: str) -> None:
    ends, other = (scene.client, scene.server) if first == "client" else (scene.server, scene.client)
    other.room = 3
    ends.says(b"the last words")
    scene.run(50)
    ends.closes()
    scene.run(59)
    assert not other.closed
    scene.run(1)
    assert other.aborted
    scene.run()
    assert len(scene.ended) == 1
    assert scene.over


def test_both_ends_close_at_once(scene: Scene) -> None:
    scene.client.closes()
    scene.server.closes()
    scene.run(100)
    assert scene.ended == [0]
    assert scene.over


def test_a_quiet_tunnel_ends(scene: Scene) -> None:
    scene.run(59)
    assert not scene.client.aborted
    scene.run(1)
    assert scene.client.aborted and scene.server.aborted
    scene.run()
    assert scene.ended == [0]
    assert scene.over


@pytest.mark.parametrize("speaker", ["client", "server"])
def test_a_byte_in_either_direction_keeps_it(scene: Scene, speaker: str) -> None:
    for _ in range(10):
        scene.run(40)
        getattr(scene, speaker).says(b".")
    scene.run(59)
    assert scene.ended == []
    scene.run(1)
    scene.run()
    assert len(scene.ended) == 1


def test_the_longer_of_the_two_times_counts() -> None:
    scene = Scene(timeouts=TunnelTimeouts(read=10, send=90))
    scene.run(89)
    assert not scene.client.aborted
    scene.run(1)
    assert scene.client.aborted


@pytest.mark.parametrize("room", [0, 1 << 60])
def test_an_abort_ends_it_whatever_waits(scene: Scene, room: int) -> None:
    scene.client.room = room
    scene.server.says(b"12345")
    scene.tunnel.abort()
    scene.run()
    assert scene.ended == [5]
    assert scene.over
    scene.tunnel.abort()  # and once more, as a drain does that comes late
    scene.run(1000)
    assert scene.ended == [5]


def test_an_abort_after_one_end_closed(scene: Scene) -> None:
    scene.client.room = 0
    scene.server.says(b"12345")
    scene.server.closes()
    scene.tunnel.abort()
    scene.run()
    assert scene.ended == [5]
    assert scene.over
