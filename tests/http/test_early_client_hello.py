"""CONNECT from a client that sends its ClientHello without waiting for the response."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher
from twisted.python.failure import Failure

from dockerproxy.http.channel import HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import Site
from dockerproxy.http.tls import TLSTransport, upgrade_to_tls
from tests.http.support.in_memory import TIMEOUTS, echo
from tests.http.support.loopback import MIB, SERVER_CONTEXT, MemoryBIOClient, client_context

HEAD = b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


class SelectReactor(Clock):
    """A reactor on select(2) that runs only if the test calls `iterate`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def iterate(self) -> bool:
        """Call what is ready, and return whether anything was."""
        self.advance(0)
        readable, writable, _ = select.select(self.readers, self.writers, [], 0)
        for descriptor, method in [*((each, "doRead") for each in readable), *((each, "doWrite") for each in writable)]:
            if descriptor in self.readers | self.writers and (reason := getattr(descriptor, method)()) is not None:
                descriptor.connectionLost(Failure(reason))  # type: ignore[no-untyped-call]
        return bool(readable or writable)


class TCPStub:
    """Twisted's transport of an accepted socket, as far as `SocketTransport` uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.protocol: Any = None

    def getHandle(self) -> socket.socket:
        return self._sock

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", *self._sock.getpeername())

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", *self._sock.getsockname())

    def stopReading(self) -> None: ...

    def stopWriting(self) -> None: ...

    def setTcpNoDelay(self, enabled: bool) -> None: ...

    def setTcpKeepAlive(self, enabled: bool) -> None: ...

    def connectionLost(self, reason: Failure) -> None:
        self._sock.close()


class Connection:
    """A connection over loopback to a site that accepts CONNECT and then serves HTTP over TLS.

    The client's stream is cut at the offsets in `cuts`: the server reads one piece before the next is sent.
    """

    def __init__(self, cuts: Iterable[int] = ()) -> None:
        self._cuts = sorted(set(cuts))
        self._offset = 0
        self.reactor = SelectReactor()
        self.site = Site(self.reactor, self._connect, timeouts=TIMEOUTS, on_request_finished=lambda request, time: None)
        self.channels: list[HTTPChannel] = []
        with socket.create_server(("127.0.0.1", 0)) as listening_socket:
            self.client = socket.create_connection(listening_socket.getsockname())
            accepted, _ = listening_socket.accept()
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.setblocking(False)
        accepted.setblocking(False)
        self.site.accept(TCPStub(accepted))

    async def _connect(self, request: Request) -> None:
        transport, received = request.detach()
        transport.write(ESTABLISHED)
        self.channels.append(HTTPChannel(self.site, echo, secure=True))
        upgrade_to_tls(transport, SERVER_CONTEXT, self.channels[-1], received)

    @property
    def transport(self) -> Any:
        return self.channels[-1].transport

    def send(self, data: bytes) -> None:
        start, end = self._offset, self._offset + len(data)
        places = [start, *(cut for cut in self._cuts if start < cut < end), end]
        for first, last in pairwise(places):
            self._send_piece(data[first - start : last - start])

    def _send_piece(self, piece: bytes) -> None:
        self._offset += len(piece)
        while piece:
            piece = piece[self.client.send(piece) :]
            self.run()

    def run(self) -> None:
        """Run the server until it waits for the client."""
        while self.reactor.iterate():
            pass

    def receive(self) -> bytes:
        """Return what has arrived at the client; raise OSError if the connection was reset."""
        data = b""
        try:
            while piece := self.client.recv(MIB):
                data += piece
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        self.client.close()
        self.run()


def handshake(connection: Connection, session: MemoryBIOClient, early: int | None = None) -> None:
    """Send CONNECT with the first `early` bytes of the ClientHello, and complete the handshake."""
    hello = session.next_flight()
    assert hello
    early = len(hello) if early is None else min(early, len(hello))
    connection.send(HEAD + hello[:early])
    received = connection.receive()
    assert received.startswith(ESTABLISHED)
    connection.send(hello[early:])
    session.incoming.write(received.removeprefix(ESTABLISHED) + connection.receive())
    while (flight := session.next_flight()) is not None:
        connection.send(flight)
        session.incoming.write(connection.receive())


def post(connection: Connection, session: MemoryBIOClient, body: bytes) -> bytes:
    """Send a request and return the response."""
    head = b"POST /path HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.send(session.encrypt(head))
    connection.send(session.encrypt(body))
    received: Any = ReceivedBytes(connection.receive())
    return session.read(received, 1)


class ReceivedBytes:
    """Bytes that were received, with the method of a socket that `MemoryBIOClient.read` uses."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def recv(self, size: int) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data


@settings(deadline=None)
@given(st.sampled_from(VERSIONS), st.integers(0, 700), st.sets(st.integers(1, 2500), max_size=5))
def test_client_hello_may_be_cut_anywhere(version: ssl.TLSVersion, early: int, cuts: set[int]) -> None:
    connection, session = Connection(cuts), MemoryBIOClient(version)
    try:
        handshake(connection, session, early)
        response = post(connection, session, b"hello")
        assert response.startswith(b"HTTP/1.1 200 OK\r\n")
        assert response.endswith(b"POST /path hello")
        assert type(connection.transport) is TLSTransport
    finally:
        connection.close()
    assert not connection.reactor.readers | connection.reactor.writers


def test_every_cut_of_connect_and_client_hello() -> None:
    """One cut at each of the places around the ends of the head and of the ClientHello, where the paths differ."""
    hello = MemoryBIOClient().next_flight() or b""
    for cut in [*range(len(HEAD) - 5, len(HEAD) + 7), *range(len(HEAD) + len(hello) - 3, len(HEAD) + len(hello) + 3)]:
        connection, session = Connection([cut]), MemoryBIOClient()
        handshake(connection, session)
        assert post(connection, session, b"hello").endswith(b"POST /path hello")
        connection.close()


def large_session() -> MemoryBIOClient:
    """A client with a ClientHello of several TLS records."""
    context = client_context()
    context.set_alpn_protocols([f"{number:0>200}" for number in range(200)])
    return MemoryBIOClient(context=context)


@pytest.mark.parametrize("size", [None, 1])
def test_large_client_hello(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with buffers of a socket pair that are smaller than it."""
    connection, session = Connection(), large_session()
    if size is not None:
        create_pair = socket.socketpair

        def create_small_pair() -> tuple[socket.socket, socket.socket]:
            pair = create_pair()
            for each in pair:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # the kernel takes its minimum
            return pair

        monkeypatch.setattr(socket, "socketpair", create_small_pair)
    handshake(connection, session)
    assert post(connection, session, b"hello").endswith(b"POST /path hello")
    connection.close()


def events_of(action: Callable[[], None]) -> list[str]:
    """Return the log events during `action`, formatted."""
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    try:
        action()
    finally:
        globalLogPublisher.removeObserver(events.append)
    return [event["log_format"].format(**event) for event in events]


def test_invalid_client_hello_gets_an_alert() -> None:
    connection = Connection()
    assert events_of(partial(connection.send, HEAD + b"\x16\x03\x01\x00\x04\x01\x00\x00\x00" + bytes(1000)))
    response = connection.receive()
    assert response.startswith(ESTABLISHED)
    record = response.removeprefix(ESTABLISHED)
    assert (record[0], len(record)) == (21, 7)  # RFC 8446, section 5.1: alert(21)
    assert not connection.reactor.readers | connection.reactor.writers
    connection.close()


def test_plain_http_after_connect_gets_a_response() -> None:
    connection = Connection()
    logged = events_of(partial(connection.send, HEAD + b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"))
    assert logged == ["TLS connection from 127.0.0.1 failed: http request"]
    assert b"Client sent an HTTP request to an HTTPS server." in connection.receive()
    connection.close()


def test_connection_is_closed_if_no_descriptor_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", fail)
    connection = Connection()
    hello = MemoryBIOClient().next_flight()
    assert hello
    logged = events_of(partial(connection.send, HEAD + hello))
    assert logged == ["TLS connection from 127.0.0.1 failed: [Errno 24] Too many open files"]
    assert connection.receive() == ESTABLISHED
    assert not connection.reactor.readers | connection.reactor.writers
    connection.close()


def test_descriptors_are_closed_after_the_handshake() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    connection = Connection()
    open_connection = descriptors()
    handshake(connection, MemoryBIOClient())
    assert descriptors() == open_connection
    connection.close()
    assert descriptors() == before
