"""Tests for tunnels between two in-memory transports, with a fake clock."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.http.tunnel import Tunnel, TunnelTimeouts
from dockerproxy.net.dial import SingleProtocolFactory


class FakeTransport:
    """The transport of one side. Data beyond `capacity` is buffered and pauses the producer.

    The end of the connection is reported in a later turn of the clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.capacity = 1 << 60
        self.delivered = b""
        self.pending = b""
        self.producer: Any = None
        self.paused = self.reading_paused = self.disconnecting = self.closed = self.aborted = False
        self.protocol: Any = None
        self.socket = socket.socket()

    def connect(self, protocol: Any) -> None:
        self.protocol = protocol
        protocol.makeConnection(self)

    def write(self, data: bytes) -> None:
        if self.disconnecting or self.closed:
            return
        self.pending += data
        self.accept(0)

    def accept(self, more: int) -> None:
        self.capacity += more
        delivered, self.pending = self.pending[: self.capacity], self.pending[self.capacity :]
        self.delivered += delivered
        self.capacity -= len(delivered)
        if self.producer is not None and bool(self.pending) != self.paused:
            self.paused = bool(self.pending)
            if self.paused:
                self.producer.pauseProducing()
            else:
                self.producer.resumeProducing()
        if self.disconnecting and not self.pending:
            self.report_lost(ConnectionDone())

    def loseConnection(self) -> None:
        assert self.producer is None, "loseConnection waits for a producer that is still registered"
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.accept, 0)

    def abortConnection(self) -> None:
        self.aborted = True
        self.clock.callLater(0, self.report_lost, ConnectionLost())

    def report_lost(self, reason: Exception) -> None:
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

    def getHandle(self) -> socket.socket:
        """Return a socket with the options of the connection."""
        return self.socket

    def unregisterProducer(self) -> None:
        self.producer = None

    def pauseProducing(self) -> None:
        self.reading_paused = True

    def resumeProducing(self) -> None:
        self.reading_paused = False

    def stopProducing(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    def peer_sends(self, data: bytes) -> None:
        """Deliver `data` from the peer."""
        self.protocol.dataReceived(data)

    def peer_closes(self) -> None:
        """Close or half-close the connection from the peer; Twisted reports both in this way by default."""
        self.report_lost(ConnectionDone())


class TunnelHarness:
    def __init__(self, *, start: bool = True, timeouts: TunnelTimeouts | None = None) -> None:
        self.clock = Clock()
        self.byte_counts: list[int] = []
        self.may_go_on = True
        self.tunnel = Tunnel(
            self.clock, timeouts or TunnelTimeouts(read=60, send=30), self.byte_counts.append, lambda: self.may_go_on
        )
        self.client, self.server = FakeTransport(self.clock), FakeTransport(self.clock)
        self.server.connect(SingleProtocolFactory(self.tunnel.server).buildProtocol(None))
        self.client.connect(self.tunnel.client)
        if start:
            self.tunnel.start()

    def run(self, seconds: float = 0) -> None:
        self.clock.advance(seconds)

    @property
    def is_over(self) -> bool:
        """Whether both connections are closed and no timer is pending."""
        return self.client.closed and self.server.closed and not self.clock.getDelayedCalls()


@pytest.fixture
def harness() -> TunnelHarness:
    return TunnelHarness()


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=50)), max_size=20))
def test_bytes_are_relayed_in_order_and_counted(messages: list[tuple[bool, bytes]]) -> None:
    harness = TunnelHarness()
    for by_client, data in messages:
        (harness.client if by_client else harness.server).peer_sends(data)
    down = b"".join(data for by_client, data in messages if not by_client)
    assert harness.client.delivered == down
    assert harness.server.delivered == b"".join(data for by_client, data in messages if by_client)
    harness.client.peer_closes()
    harness.run()
    assert harness.byte_counts == [len(down)]
    assert harness.is_over


def test_little_is_unsent_in_the_kernel_for_the_server(harness: TunnelHarness) -> None:
    """TCP_NOTSENT_LOWAT (25 in tcp.h) limits it. `SocketTransport.write` sets it for the client."""
    assert harness.server.socket.getsockopt(socket.IPPROTO_TCP, 25) == 128 * 1024


def test_data_before_start_is_buffered() -> None:
    harness = TunnelHarness(start=False)
    harness.client.peer_sends(b"early ")
    harness.server.peer_sends(b"banner ")
    harness.client.peer_sends(b"bird")
    assert (harness.client.delivered, harness.server.delivered) == (b"", b"")
    harness.tunnel.start()
    assert (harness.client.delivered, harness.server.delivered) == (b"banner ", b"early bird")


@pytest.mark.parametrize("slow", ["client", "server"])
def test_slow_receiver_pauses_the_sender(harness: TunnelHarness, slow: str) -> None:
    receiver, sender = (harness.client, harness.server) if slow == "client" else (harness.server, harness.client)
    receiver.capacity = 10
    sender.peer_sends(b"x" * 10)
    assert not sender.reading_paused
    sender.peer_sends(b"y" * 10)
    assert sender.reading_paused
    assert not receiver.reading_paused
    receiver.accept(5)
    assert sender.reading_paused
    receiver.accept(5)
    assert not sender.reading_paused
    assert receiver.delivered == b"x" * 10 + b"y" * 10


@pytest.mark.parametrize("first", ["client", "server"])
def test_pending_data_is_delivered_after_a_close(harness: TunnelHarness, first: str) -> None:
    closing, other = (harness.client, harness.server) if first == "client" else (harness.server, harness.client)
    other.capacity = 3
    closing.peer_sends(b"the last words")
    closing.peer_closes()
    harness.run()
    assert (other.delivered, other.closed, harness.byte_counts) == (b"the", False, [])
    other.accept(100)
    assert (other.delivered, other.closed, other.aborted) == (b"the last words", True, False)
    assert harness.byte_counts == [14 if first == "server" else 0]
    assert harness.is_over


@pytest.mark.parametrize("first", ["client", "server"])
def test_blocked_side_is_aborted_after_the_idle_timeout(harness: TunnelHarness, first: str) -> None:
    closing, other = (harness.client, harness.server) if first == "client" else (harness.server, harness.client)
    other.capacity = 3
    closing.peer_sends(b"the last words")
    harness.run(50)
    closing.peer_closes()
    harness.run(59)
    assert not other.closed
    harness.run(1)
    assert other.aborted
    harness.run()
    assert len(harness.byte_counts) == 1
    assert harness.is_over


def test_closing_both_sides_at_once_ends_the_tunnel(harness: TunnelHarness) -> None:
    harness.client.peer_closes()
    harness.server.peer_closes()
    harness.run(100)
    assert harness.byte_counts == [0]
    assert harness.is_over


def test_idle_tunnel_is_aborted(harness: TunnelHarness) -> None:
    harness.run(59)
    assert not harness.client.aborted
    harness.run(1)
    assert harness.client.aborted and harness.server.aborted
    harness.run()
    assert harness.byte_counts == [0]
    assert harness.is_over


def test_tunnel_that_may_not_go_on_ends_within_a_minute_though_it_is_used() -> None:
    harness = TunnelHarness(timeouts=TunnelTimeouts(read=3600))
    for _ in range(5):
        harness.run(40)
        harness.client.peer_sends(b".")
    assert not harness.client.aborted
    harness.may_go_on = False
    for _ in range(6):
        harness.client.peer_sends(b".")
        harness.run(10)
    harness.run()
    assert harness.client.aborted and harness.server.aborted
    assert harness.is_over


@pytest.mark.parametrize("speaker", ["client", "server"])
def test_activity_in_either_direction_resets_the_timeout(harness: TunnelHarness, speaker: str) -> None:
    for _ in range(10):
        harness.run(40)
        getattr(harness, speaker).peer_sends(b".")
    harness.run(59)
    assert harness.byte_counts == []
    harness.run(1)
    harness.run()
    assert len(harness.byte_counts) == 1


def test_longer_timeout_applies() -> None:
    harness = TunnelHarness(timeouts=TunnelTimeouts(read=10, send=90))
    harness.run(89)
    assert not harness.client.aborted
    harness.run(1)
    assert harness.client.aborted


@pytest.mark.parametrize("capacity", [0, 1 << 60])
def test_abort_discards_pending_data(harness: TunnelHarness, capacity: int) -> None:
    harness.client.capacity = capacity
    harness.server.peer_sends(b"12345")
    harness.tunnel.abort()
    harness.run()
    assert harness.byte_counts == [5]
    assert harness.is_over
    harness.tunnel.abort()  # a late abort, as from a drain, must have no effect
    harness.run(1000)
    assert harness.byte_counts == [5]


def test_abort_after_one_side_closed_ends_the_tunnel(harness: TunnelHarness) -> None:
    harness.client.capacity = 0
    harness.server.peer_sends(b"12345")
    harness.server.peer_closes()
    harness.tunnel.abort()
    harness.run()
    assert harness.byte_counts == [5]
    assert harness.is_over
