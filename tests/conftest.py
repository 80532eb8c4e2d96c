"""The fixture `connect_client`: an HTTP client on a connection in memory. Tests of several packages use it."""

from __future__ import annotations

import functools
import gc
import http.client
import importlib.metadata
import io
import math
import os
import signal
from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from hypothesis import HealthCheck, settings
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site

Fields = Iterable[tuple[str, str]]

# A busy machine draws examples slowly, which is no fault of a test.
settings.register_profile("any-speed", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any-speed")
settings.register_profile("fast", settings.get_profile("any-speed"), max_examples=20)  # of `make check`

MARKERS = (
    "slow: takes more than a second",
    "root: needs root, and programs that `make test-programs` installs",
    "bench: tests the benchmarks",
)
"""Here and not in setup.cfg, because the Debian package's tests run without that. `make check` leaves them out."""

DIRECTORY_MARKERS = {"e2e": pytest.mark.root, "hostile": pytest.mark.slow, "bench": pytest.mark.bench}
"""Markers of all tests in a directory."""


# pytest asks for Twisted's version at each test, which took a fifth of the time of all fast tests.
importlib.metadata.version = functools.cache(importlib.metadata.version)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a parameter of binary data by its argument: compressed data has the time in it, and the name must not."""
    is_binary = isinstance(val, bytes) and not val.isascii()
    return argname if is_binary else None


def pytest_configure(config: pytest.Config) -> None:
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        from bench.servers import share_ports  # not at the top: the Debian package's tests run without it

        share_ports(int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    directories = {f"{Path(__file__).parent / name}/": marker for name, marker in DIRECTORY_MARKERS.items()}
    for item in items:
        path = str(item.path)
        for directory, marker in directories.items():
            if path.startswith(directory):
                item.add_marker(marker)


def pytest_collection_finish() -> None:
    gc.freeze()  # the collected tests live as long as the process: collections need not look at them


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored. Child processes inherit that, and some tests interrupt theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class WindowedTransport(StringTransport):
    """The transport of the server. It reports the end of the connection as a reactor does: asynchronously, and once.

    The client accepts `window` bytes. The rest is queued, and the producer is paused meanwhile.
    """

    can_sendfile = False

    @property
    def acknowledged(self) -> int:
        return self.sent

    def limit_reads(self, limited: bool) -> None:
        self.reads_limited = limited

    def read_for_relay(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None:
        self.channel = protocol
        protocol.makeConnection(self)

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

    def write_some(self, data: bytes | bytearray) -> int:
        self.write(bytes(data))
        return len(data)

    def extend_window(self, size: float) -> None:
        """Make the client accept `size` more bytes."""
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
    """The method of a socket that `http.client` uses."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._stream


class _UncloseableBytesIO(io.BytesIO):
    def close(self) -> None:
        """Stay open. The parser closes the stream after a response, but the next response follows in it."""


@frozen
class ReceivedResponse:
    """A response as parsed by `http.client`. `complete` is false if the body was truncated."""

    status: int
    headers: Message
    body: bytes
    complete: bool

    def fields(self, name: str) -> list[str]:
        return self.headers.get_all(name) or []


class HTTPTestClient:
    """A client with one connection to a `Site` that passes its requests to `handler`.

    Pass the `site` of another client to open a second connection to the same site.
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
        """Send bytes and advance the clock by `seconds`."""
        self.transport.channel.dataReceived(data)
        self.advance(seconds)

    def advance(self, seconds: float = 0) -> None:
        self.clock.advance(seconds)

    def disconnect(self) -> None:
        """Close the connection."""
        self.transport.connection_lost(ConnectionDone())
        self.advance()

    def extend_window(self, size: float) -> None:
        """Accept `size` more bytes. The initial window is unlimited."""
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
        """Send a request and return the part of the response that is available now."""
        start = len(self.received)
        self.send_request(method, target, fields, body, version)
        return self.read_response(method, start)

    def read_response(self, method: str = "GET", start: int = 0) -> ReceivedResponse:
        """Return the response that begins at byte `start` of the received data."""
        return next(self.read_responses(method, start=start))

    def read_responses(self, *methods: str, start: int = 0) -> Iterator[ReceivedResponse]:
        """Yield the consecutive responses to requests with `methods`."""
        stream: Any = _UncloseableBytesIO(self.received[start:])
        for method in methods:
            response = http.client.HTTPResponse(_SocketStub(stream), method=method)  # type: ignore[arg-type]
            response.begin()
            has_framing = response.length is not None or response.chunked or method == "HEAD"
            try:
                body, complete = response.read(), True
            except http.client.IncompleteRead as error:
                body, complete = error.partial, False
            if not has_framing:  # then an orderly close of the connection is the end of the body
                complete = self.transport.closed and not self.transport.aborted
            yield ReceivedResponse(response.status, response.headers, body, complete)


@pytest.fixture(scope="session")
def connect_client() -> type[HTTPTestClient]:
    """Return `HTTPTestClient`."""
    return HTTPTestClient
