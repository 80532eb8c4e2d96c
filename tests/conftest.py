"""What tests of several parts stand on: `Visitor`, a client's end of an HTTP connection in memory."""

from __future__ import annotations

import http.client
import io
import math
import signal
from collections.abc import Iterable, Iterator
from email.message import Message
from typing import Any

import pytest
from attrs import frozen
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site

Fields = Iterable[tuple[str, str]]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background. Programs inherit that, and some tests interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class WindowedTransport(StringTransport):
    """The server's transport. Its ends are reported as a reactor does: later, and once.

    The client takes `room` bytes; what is more waits, and the producer is told.
    """

    def __init__(self, clock: Clock, client: str) -> None:
        super().__init__(peerAddress=IPv4Address("TCP", client, 50000), lenient=True)
        self.clock = clock
        self.channel: Any = None
        self.sent = 0
        self.window: float = math.inf
        self.aborted = self.closed = False
        self._pending = b""
        self._paused = False

    def write(self, data: bytes | bytearray) -> None:
        if self.disconnecting:
            return
        self._pending += data
        self.extend_window(0)
        if self._pending and not self._paused and self.producer is not None:
            self._paused = True
            self.producer.pauseProducing()

    def extend_window(self, size: float) -> None:
        """Let the client take `more` bytes than it did."""
        self.window += size
        written = self._pending if self.window == math.inf else self._pending[: int(self.window)]
        super().write(written)
        self._pending = self._pending[len(written) :]
        self.sent += len(written)
        self.window -= len(written)
        if self._paused and not self._pending and self.producer is not None:
            self._paused = False
            self.producer.resumeProducing()

    def loseConnection(self) -> None:
        self._disconnect(ConnectionDone())

    def abortConnection(self) -> None:
        self.aborted = True
        self._disconnect(ConnectionLost())

    def unregisterProducer(self) -> None:
        self.producer = None

    def stopProducing(self) -> None:
        self.loseConnection()

    def _disconnect(self, reason: Exception) -> None:
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.connection_lost, reason)

    def connection_lost(self, reason: Exception) -> None:
        if not self.closed:
            self.closed = self.disconnecting = True
            self.channel.connectionLost(Failure(reason))


class _SocketStub:
    """As much of a socket as the standard library's parser asks for."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._stream


class _UncloseableBytesIO(io.BytesIO):
    def close(self) -> None:
        """Stay open: the parser closes what it has read an answer from, and the next one is behind it."""


@frozen
class ReceivedResponse:
    """An answer as Python's own client reads it; `whole` says whether that found it complete."""

    status: int
    headers: Message
    body: bytes
    complete: bool

    def fields(self, name: str) -> list[str]:
        return self.headers.get_all(name) or []


class HTTPTestClient:
    """A client on one connection to `handler`, which is given its requests as the daemon's sites do.

    `site` is that of another visitor, for a further connection there.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        clock: Clock | None = None,
        secure: bool = False,
        client: str = "10.1.2.3",
        timeouts: ServerTimeouts | None = None,
        site: Site | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.finished_requests: list[Request] = []
        self.site = site or Site(
            self.clock,
            handler,
            timeouts=timeouts or ServerTimeouts(),
            on_request_finished=lambda request, seconds: self.finished_requests.append(request),
        )
        self.transport = WindowedTransport(self.clock, client)
        self.transport.channel = HTTPChannel(self.site, handler, secure=secure)
        self.transport.channel.makeConnection(self.transport)

    def send(self, data: bytes, seconds: float = 0) -> None:
        """Send bytes, and let what is due within `seconds` happen."""
        self.transport.channel.dataReceived(data)
        self.advance(seconds)

    def advance(self, seconds: float = 0) -> None:
        self.clock.advance(seconds)

    def disconnect(self) -> None:
        """Close the connection."""
        self.transport.connection_lost(ConnectionDone())
        self.advance()

    def extend_window(self, size: float) -> None:
        """Take `more` bytes than before; at first, `wire.room` is without a bound."""
        self.transport.extend_window(size)
        self.advance()

    @property
    def received(self) -> bytes:
        return bytes(self.transport.value())

    def send_request(
        self, method: str, target: str, fields: Fields = (), body: bytes | None = None, version: str = "1.1"
    ) -> None:
        """Send a request."""
        headers = [("Host", "proxy.example:3128"), *fields]
        names = {name.lower() for name, _ in fields}
        if "host" in names:
            headers = headers[1:]
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            headers.append(("Content-Length", str(len(body))))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self.send(f"{method} {target} HTTP/{version}\r\n{head}\r\n".encode("latin-1") + (body or b""))

    def fetch(
        self, method: str, target: str, fields: Fields = (), body: bytes | None = None, version: str = "1.1"
    ) -> ReceivedResponse:
        """Send a request and return the answer to it, of which what is due now is taken."""
        start = len(self.received)
        self.send_request(method, target, fields, body, version)
        return self.read_response(method, start)

    def read_response(self, method: str = "GET", start: int = 0) -> ReceivedResponse:
        """Return the answer that begins at byte `start` of what was received."""
        return next(self.read_responses(method, start=start))

    def read_responses(self, *methods: str, start: int = 0) -> Iterator[ReceivedResponse]:
        """Yield the answers to requests with `methods`, read one behind the other."""
        stream: Any = _UncloseableBytesIO(self.received[start:])
        for method in methods:
            response = http.client.HTTPResponse(_SocketStub(stream), method=method)  # type: ignore[arg-type]
            response.begin()
            has_framing = response.length is not None or response.chunked or method == "HEAD"
            try:
                body, complete = response.read(), True
            except http.client.IncompleteRead as error:
                body, complete = error.partial, False
            if not has_framing:  # then the end of the connection is the end of the body, if it was meant to be one
                complete = self.transport.closed and not self.transport.aborted
            yield ReceivedResponse(response.status, response.headers, body, complete)


@pytest.fixture(scope="session")
def connect_client() -> type[HTTPTestClient]:
    """Return `Visitor`: conftest modules cannot be imported."""
    return HTTPTestClient
