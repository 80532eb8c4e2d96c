"""Tests for TLS within TLS: the relay between the outer TLS and the socket pair, with transports in memory.

`tests/proxy/test_forward_proxy_loopback.py` has the handshakes and whole transfers, on real sockets.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.http.nested_tls import PairEnd, open_inner_socket

PEER, HOST = IPv4Address("TCP", "192.0.2.7", 50000), IPv4Address("TCP", "192.0.2.1", 3129)


class LoopReactor(Clock):
    """A reactor that runs the readers and writers of the pair when `iterate` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, descriptor: Any) -> None:
        self.readers.add(descriptor)

    def removeReader(self, descriptor: Any) -> None:
        self.readers.discard(descriptor)

    def addWriter(self, descriptor: Any) -> None:
        self.writers.add(descriptor)

    def removeWriter(self, descriptor: Any) -> None:
        self.writers.discard(descriptor)

    def iterate(self) -> None:
        for descriptor, method in [(d, "doRead") for d in self.readers] + [(d, "doWrite") for d in self.writers]:
            reason = getattr(descriptor, method)()
            if reason is not None:
                descriptor.connectionLost(Failure(reason))  # type: ignore[no-untyped-call]
        self.advance(0)


class OuterTransport:
    """The outer TLS as far as the relay uses it. The test plays its client."""

    connected = True

    def __init__(self) -> None:
        self.reactor = LoopReactor()
        self.sent = 0
        self.written = b""
        self.calls: list[str] = []
        self.protocol: Any = None
        self.producer: Any = None

    def getPeer(self) -> IPv4Address:
        return PEER

    def getHost(self) -> IPv4Address:
        return HOST

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        self.written += data

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)

    def lose(self) -> None:
        self.connected = False
        self.protocol.connectionLost(Failure(ConnectionDone()))  # type: ignore[no-untyped-call]


@pytest.fixture
def outer() -> OuterTransport:
    return OuterTransport()


def open_pair(outer: OuterTransport, received: bytes = b"") -> tuple[PairEnd, socket.socket]:
    end = open_inner_socket(outer, received, lambda: outer.calls.append("closed"))  # type: ignore[arg-type]
    return end, end.getHandle()


def test_bytes_go_both_ways_and_addresses_are_those_of_the_client(outer: OuterTransport) -> None:
    end, inner = open_pair(outer, b"early ")
    outer.protocol.dataReceived(b"hello")
    assert inner.recv(100) == b"early hello"
    inner.send(b"reply")
    outer.reactor.iterate()
    assert outer.written == b"reply"
    assert (end.getPeer(), end.getHost()) == (PEER, HOST)
    inner.close()


def test_a_client_that_does_not_read_stops_the_inner_side(outer: OuterTransport) -> None:
    _, inner = open_pair(outer)
    outer.producer.pauseProducing()  # as the transport does if the kernel accepts no more
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += inner.send(bytes(4096))
            outer.reactor.iterate()
    assert outer.written == b""
    assert sent < 512 * 1024
    outer.producer.resumeProducing()
    while len(outer.written) < sent:
        outer.reactor.iterate()
    inner.close()


def test_an_inner_side_that_does_not_read_stops_the_client(outer: OuterTransport) -> None:
    _, inner = open_pair(outer)
    written = 0
    while "pauseProducing" not in outer.calls:
        outer.protocol.dataReceived(bytes(4096))
        written += 4096
        assert written < 1024 * 1024
    received = 0
    while received < written:
        received += len(inner.recv(65536))
        outer.reactor.iterate()
    assert outer.calls[-1] == "resumeProducing"
    inner.close()


def test_the_end_of_the_client_closes_the_inner_side(outer: OuterTransport) -> None:
    _, inner = open_pair(outer)
    outer.protocol.dataReceived(b"last words")
    outer.lose()
    outer.reactor.iterate()
    assert inner.recv(100) == b"last words"
    assert inner.recv(100) == b""
    assert not outer.reactor.readers | outer.reactor.writers
    assert outer.reactor.getDelayedCalls() == []
    inner.close()


def test_the_end_of_the_inner_side_closes_the_client_after_the_last_bytes(outer: OuterTransport) -> None:
    _, inner = open_pair(outer)
    inner.send(b"last words")
    inner.close()
    outer.reactor.iterate()
    outer.reactor.iterate()
    assert outer.written == b"last words"
    assert outer.calls == ["stopProducing", "loseConnection"]
    for _ in range(5):  # the client reads slowly
        outer.sent += 1
        outer.reactor.advance(60)
    assert outer.calls[-1] == "loseConnection"
    outer.reactor.advance(60)
    assert outer.calls[-1] == "abortConnection"


def test_a_closed_client_ends_the_wait_for_the_last_bytes(outer: OuterTransport) -> None:
    _, inner = open_pair(outer)
    inner.close()
    outer.reactor.iterate()
    assert outer.reactor.getDelayedCalls()
    assert "closed" not in outer.calls
    outer.lose()
    assert outer.reactor.getDelayedCalls() == []
    assert outer.calls.count("closed") == 1
