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
from dockerproxy.http.site import Site, Timeouts

Fields = Iterable[tuple[str, str]]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background. Programs inherit that, and some tests interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Wire(StringTransport):
    """The server's transport. Its ends are reported as a reactor does: later, and once.

    The client takes `room` bytes; what is more waits, and the producer is told.
    """

    def __init__(self, clock: Clock, client: str) -> None:
        super().__init__(peerAddress=IPv4Address("TCP", client, 50000), lenient=True)
        self.clock = clock
        self.channel: Any = None
        self.sent = 0
        self.room: float = math.inf
        self.aborted = self.closed = False
        self._pending = b""
        self._paused = False

    def write(self, data: bytes | bytearray) -> None:
        if self.disconnecting:
            return
        self._pending += data
        self.take(0)
        if self._pending and not self._paused and self.producer is not None:
            self._paused = True
            self.producer.pauseProducing()

    def take(self, more: float) -> None:
        """Let the client take `more` bytes than it did."""
        self.room += more
        taken = self._pending if self.room == math.inf else self._pending[: int(self.room)]
        super().write(taken)
        self._pending = self._pending[len(taken) :]
        self.sent += len(taken)
        self.room -= len(taken)
        if self._paused and not self._pending and self.producer is not None:
            self._paused = False
            self.producer.resumeProducing()

    def loseConnection(self) -> None:
        self._end(ConnectionDone())

    def abortConnection(self) -> None:
        self.aborted = True
        self._end(ConnectionLost())

    def unregisterProducer(self) -> None:
        self.producer = None

    def stopProducing(self) -> None:
        self.loseConnection()

    def _end(self, reason: Exception) -> None:
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.lost, reason)

    def lost(self, reason: Exception) -> None:
        if not self.closed:
            self.closed = self.disconnecting = True
            self.channel.connectionLost(Failure(reason))


class _Bytes:
    """As much of a socket as the standard library's parser asks for."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._stream


class _Undying(io.BytesIO):
    def close(self) -> None:
        """Stay open: the parser closes what it has read an answer from, and the next one is behind it."""


@frozen
class Answer:
    """An answer as Python's own client reads it; `whole` says whether that found it complete."""

    status: int
    headers: Message
    body: bytes
    whole: bool

    def fields(self, name: str) -> list[str]:
        return self.headers.get_all(name) or []


class Visitor:
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
        timeouts: Timeouts | None = None,
        site: Site | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.logged: list[Request] = []
        self.site = site or Site(
            self.clock,
            handler,
            timeouts=timeouts or Timeouts(),
            finished=lambda request, seconds: self.logged.append(request),
        )
        self.wire = Wire(self.clock, client)
        self.wire.channel = HTTPChannel(self.site, handler, secure=secure)
        self.wire.channel.makeConnection(self.wire)

    def send(self, data: bytes, seconds: float = 0) -> None:
        """Send bytes, and let what is due within `seconds` happen."""
        self.wire.channel.dataReceived(data)
        self.run(seconds)

    def run(self, seconds: float = 0) -> None:
        self.clock.advance(seconds)

    def leave(self) -> None:
        """Close the connection."""
        self.wire.lost(ConnectionDone())
        self.run()

    def take(self, more: float) -> None:
        """Take `more` bytes than before; at first, `wire.room` is without a bound."""
        self.wire.take(more)
        self.run()

    @property
    def received(self) -> bytes:
        return bytes(self.wire.value())

    def request(
        self, method: str, target: str, fields: Fields = (), body: bytes | None = None, version: str = "1.1"
    ) -> None:
        """Send a request."""
        given = [("Host", "proxy.example:3128"), *fields]
        names = {name.lower() for name, _ in fields}
        if "host" in names:
            given = given[1:]
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            given.append(("Content-Length", str(len(body))))
        head = "".join(f"{name}: {value}\r\n" for name, value in given)
        self.send(f"{method} {target} HTTP/{version}\r\n{head}\r\n".encode("latin-1") + (body or b""))

    def ask(
        self, method: str, target: str, fields: Fields = (), body: bytes | None = None, version: str = "1.1"
    ) -> Answer:
        """Send a request and return the answer to it, of which what is due now is taken."""
        before = len(self.received)
        self.request(method, target, fields, body, version)
        return self.answer(method, before)

    def answer(self, method: str = "GET", start: int = 0) -> Answer:
        """Return the answer that begins at byte `start` of what was received."""
        return next(self.answers(method, start=start))

    def answers(self, *methods: str, start: int = 0) -> Iterator[Answer]:
        """Yield the answers to requests with `methods`, read one behind the other."""
        stream: Any = _Undying(self.received[start:])
        for method in methods:
            response = http.client.HTTPResponse(_Bytes(stream), method=method)  # type: ignore[arg-type]
            response.begin()
            framed = response.length is not None or response.chunked or method == "HEAD"
            try:
                body, whole = response.read(), True
            except http.client.IncompleteRead as error:
                body, whole = error.partial, False
            if not framed:  # then the end of the connection is the end of the body, if it was meant to be one
                whole = self.wire.closed and not self.wire.aborted
            yield Answer(response.status, response.headers, body, whole)


@pytest.fixture(scope="session")
def visit() -> type[Visitor]:
    """Return `Visitor`: conftest modules cannot be imported."""
    return Visitor
