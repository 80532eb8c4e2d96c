"""Real sockets on loopback: the server runs in the reactor, and each client blocks in a thread of its own."""

from __future__ import annotations

import hashlib
import queue
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from dockerproxy.proxy.authority import CertificateAuthority

reactor: Any = _reactor

T = TypeVar("T")

MIB = 1 << 20
RECORD_SIZE = 16 * 1024
_BACKLOG = 256  # connections that may wait to be accepted
TIMEOUT = 20  # seconds after which a blocking client operation fails
LARGE = 50 * MIB
CHUNK = 64 * 1024
OVER_KERNEL_BUFFERS = 16 * MIB  # more than the kernel buffers for a connection, even with auto-tuned buffers

with tempfile.TemporaryDirectory() as _directory:
    _authority = CertificateAuthority.open(
        Path(_directory), certificate_file=None, key_file=None, passphrase=None, clock=time.time
    )
    # Created at import time because an authority must not be used from several threads.
    CERTIFICATE = _authority.certificate_pem.decode()
    SERVER_CONTEXT = _authority.context_for("a.test")


def client_context(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=CERTIFICATE)
    context.minimum_version = context.maximum_version = version
    return context


class RecordingProtocol(Protocol):
    """Records the length and hash of its input, and also the bytes if `keep` is true."""

    transport: Any

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._waiter: tuple[int, Deferred[None]] | None = None
        self.connection_made: Deferred[None] = Deferred()
        self.connection_lost: Deferred[BaseException] = Deferred()
        self.received = b""
        self.size = 0
        self.hash = hashlib.sha256()

    def connectionMade(self) -> None:
        self.connection_made.callback(None)

    def dataReceived(self, data: bytes) -> None:
        self.size += len(data)
        self.hash.update(data)
        if self._keep:
            self.received += data
        if self._waiter is not None and self.size >= self._waiter[0]:
            (_, deferred), self._waiter = self._waiter, None
            deferred.callback(None)

    def wait_for(self, size: int) -> Deferred[None]:
        """Return a Deferred that fires when `size` bytes have arrived."""
        deferred: Deferred[None] = Deferred()
        if self.size >= size:
            deferred.callback(None)
        else:
            self._waiter = (size, deferred)
        return deferred

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connection_lost.callback(reason.value)  # a second call would raise AlreadyCalledError


@implementer(IPushProducer)
class ZerosProducer:
    """Writes `size` zeros with back-pressure, and records the largest number of bytes buffered in the transport."""

    def __init__(self, transport: Any, size: int) -> None:
        self._transport = transport
        self._remaining = size
        self._written = 0
        self._paused = False
        self.max_buffered = 0
        self.pause_count = 0
        self.stopped = False
        self.done: Deferred[None] = Deferred()
        self.paused: Deferred[None] = Deferred()

    def start(self) -> None:
        self._transport.registerProducer(self, True)
        self._produce()

    def _produce(self) -> None:
        while self._remaining and not self._paused and not self.stopped:
            chunk = bytes(min(CHUNK, self._remaining))
            self._remaining -= len(chunk)
            self._transport.write(chunk)
            self._written += len(chunk)
            self.max_buffered = max(self.max_buffered, self._written - self._transport.sent)
        if not self._remaining and not self._paused and not self.done.called:
            self.done.callback(None)

    def pauseProducing(self) -> None:
        assert not self._paused
        self._paused = True
        self.pause_count += 1
        if not self.paused.called:
            self.paused.callback(None)

    def resumeProducing(self) -> None:
        assert self._paused
        self._paused = False
        self._produce()

    def stopProducing(self) -> None:
        self.stopped = True


class _CallbackProtocol(Protocol):
    def __init__(self, on_connection: Callable[[Any], None]) -> None:
        self._on_connection = on_connection

    def connectionMade(self) -> None:
        self._on_connection(self.transport)


class CallbackFactory(Factory):
    noisy = False

    def __init__(self, on_connection: Callable[[Any], None]) -> None:
        self._on_connection = on_connection

    def buildProtocol(self, address: object) -> Protocol:
        return _CallbackProtocol(self._on_connection)


class SocketTestCase(TestCase):
    """Base class of tests with real sockets.

    Trial fails a test that leaves a socket, a reader, a writer or a delayed call behind.
    """

    timeout = 60

    def listen(self, on_connection: Callable[[Any], None]) -> int:
        """Listen, call `on_connection` with the Twisted transport of each connection, and return the port."""
        # The kernel delays a connection that finds the backlog full for a second.
        port = reactor.listenTCP(0, CallbackFactory(on_connection), backlog=_BACKLOG, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def in_thread(self, function: Callable[..., T], *args: Any) -> Deferred[T]:
        deferred: Deferred[T] = deferToThread(function, *args)
        return deferred

    def start_late_reader(self, connect: Callable[[], socket.socket]) -> tuple[threading.Event, Deferred[bytes]]:
        """Start a client that sends "go" and reads to the end once an event is set; return the event and the data."""
        reading = threading.Event()

        def client() -> bytes:
            with connect() as sock:
                sock.sendall(b"go")
                reading.wait(TIMEOUT)
                return read_all(sock)

        return reading, self.in_thread(client)

    def start_metered_reader(
        self, connect: Callable[[], socket.socket]
    ) -> tuple[Callable[[int], Deferred[None]], Deferred[None]]:
        """Start a client that sends "go"; return a function that makes it read, and a Deferred for its end.

        The function takes the number of bytes to read; 0 makes the client disconnect.
        """
        reads: queue.SimpleQueue[tuple[int, Deferred[None]]] = queue.SimpleQueue()

        def client() -> None:
            with connect() as sock:
                sock.sendall(b"go")
                size = -1
                while size:
                    remaining, done = size, _ = reads.get(timeout=TIMEOUT)
                    while remaining:
                        data = sock.recv(min(remaining, MIB))
                        assert data, "the server closed the connection"
                        remaining -= len(data)
                    reactor.callFromThread(done.callback, None)

        def read(size: int) -> Deferred[None]:
            done: Deferred[None] = Deferred()
            reads.put((size, done))
            return done

        return read, self.in_thread(client)

    async def run_reactor(self) -> None:
        """Run a few iterations of the reactor."""
        for _ in range(3):
            await deferLater(reactor, 0)


def dial(port: int, receive_buffer: int | None = None) -> socket.socket:
    """Connect to `port`. `receive_buffer` is the approximate size of the kernel's receive buffer in bytes."""
    sock = socket.socket()
    sock.settimeout(TIMEOUT)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", port))
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Return all input until the peer closes the connection; raise OSError if it resets the connection."""
    parts = []
    while data := sock.recv(MIB):
        parts.append(data)
    return b"".join(parts)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(min(MIB, size - len(data)))
        if not chunk:
            raise EOFError
        data += chunk
    return data


class MemoryBIOClient:
    """A TLS client that leaves the transfer of its bytes to the test."""

    def __init__(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, context: ssl.SSLContext | None = None) -> None:
        self.incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = context or client_context(version)
        self._session = context.wrap_bio(self.incoming, self._outgoing, server_hostname="a.test")

    def next_flight(self) -> bytes | None:
        """Return the next bytes of the handshake to be sent, or None if the handshake was already complete."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            pass
        else:
            return self._outgoing.read() or None
        return self._outgoing.read()

    def do_handshake(self, sock: socket.socket, *, one_by_one: bool = False) -> None:
        while (flight := self.next_flight()) is not None:
            for piece in [bytes([byte]) for byte in flight] if one_by_one else [flight]:
                sock.sendall(piece)
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                self.incoming.write(sock.recv(MIB))
            else:
                sock.sendall(self._outgoing.read())
                return

    def encrypt(self, data: bytes) -> bytes:
        self._session.write(data)
        return self._outgoing.read()

    def read(self, sock: socket.socket, size: int | None = None) -> bytes:
        """Return at least `size` bytes, or all bytes until the server's close_notify."""
        data = b""
        while size is None or len(data) < size:
            try:
                chunk = self._session.read(MIB)
            except ssl.SSLWantReadError:
                ciphertext = sock.recv(MIB if size is None else RECORD_SIZE)
                if not ciphertext:
                    raise EOFError("no close_notify") from None
                self.incoming.write(ciphertext)
            except ssl.SSLZeroReturnError:
                return data
            else:
                if not chunk:
                    return data
                data += chunk
        return data


def client_hello() -> bytes:
    """Return a ClientHello."""
    flight = MemoryBIOClient().next_flight()
    assert flight
    return flight
