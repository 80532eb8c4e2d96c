"""An in-memory HTTP server on a Clock, its clients, and handlers for tests."""

from __future__ import annotations

import io

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site

TIMEOUTS = ServerTimeouts(keepalive=300, header=60, body=50, send=40, min_rate=0)
GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
DISCARD_LIMIT = 256 * 1024  # bytes of an unread body that are discarded to keep the connection open


class RecordingTransport(StringTransport):
    """A StringTransport with the additions of `SocketTransport`, and a flag for aborted connections."""

    def __init__(self) -> None:
        super().__init__(lenient=True)
        self.sent = 0
        self.aborted = False

    can_sendfile = False

    @property
    def acknowledged(self) -> int:
        return self.sent

    def limit_reads(self, limited: bool) -> None:
        self.reads_limited = limited

    def read_for_relay(self) -> None: ...

    def write(self, data: bytes) -> None:
        if not self.disconnecting:
            super().write(data)

    def write_some(self, data: bytes) -> int:
        self.write(bytes(data))
        return len(data)

    def abortConnection(self) -> None:
        self.aborted = True
        super().abortConnection()

    @property
    def paused(self) -> bool:
        return bool(self.producerState == "paused")


@frozen
class ParsedResponse:
    status: int
    fields: dict[str, str]
    body: bytes


def parse_responses(data: bytes, *methods: str) -> list[ParsedResponse]:
    """Parse `data` as the responses to requests with these methods; further requests are GETs."""
    file, responses = io.BytesIO(data), []
    while line := file.readline():
        version, status, _ = line.decode().split(" ", 2)
        assert version == "HTTP/1.1"
        fields = {}
        while (line := file.readline()) != b"\r\n":
            name, value = line.decode().split(": ", 1)
            assert name not in fields
            fields[name] = value.removesuffix("\r\n")
        method = methods[len(responses)] if len(responses) < len(methods) else "GET"
        if method == "HEAD" or status in ("100", "204", "304"):
            body = b""
        elif fields.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(file.readline(), 16):
                body += file.read(size)
                assert file.read(2) == b"\r\n"
            assert file.read(2) == b"\r\n"
        elif "Content-Length" in fields:
            body = file.read(int(fields["Content-Length"]))
            assert len(body) == int(fields["Content-Length"])
        else:
            body = file.read()
        responses.append(ParsedResponse(int(status), fields, body))
    return responses


class InMemoryServer:
    """A site on a clock. `logged` has path, status, body bytes and seconds of each finished request."""

    def __init__(self, handler: Handler, timeouts: ServerTimeouts = TIMEOUTS) -> None:
        self.clock = Clock()
        self.logged: list[tuple[str, int, int, float]] = []
        self.site = Site(self.clock, handler, timeouts=timeouts, on_request_finished=self._log)

    def _log(self, request: Request, seconds: float) -> None:
        self.logged.append((request.path, request.status, request.bytes_sent, seconds))

    def client(self) -> InMemoryClient:
        return InMemoryClient(self.site)


class InMemoryClient:
    def __init__(self, site: Site) -> None:
        self.channel = HTTPChannel(site, site.handler, secure=False)
        self.transport = RecordingTransport()
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.channel.dataReceived(data)

    def disconnect(self) -> None:
        self.channel.connectionLost(Failure(ConnectionDone()))

    def stop_reading(self) -> None:
        assert self.transport.producer is not None
        self.transport.producer.pauseProducing()

    def resume_reading(self) -> None:
        assert self.transport.producer is not None
        self.transport.producer.resumeProducing()

    @property
    def statuses(self) -> list[int]:
        return [response.status for response in self.responses]

    @property
    def responses(self) -> list[ParsedResponse]:
        return parse_responses(self.transport.value())

    @property
    def closed_cleanly(self) -> bool:
        """Whether the server closed the connection without a reset."""
        return self.transport.disconnecting and not self.transport.aborted


async def echo(request: Request) -> None:
    """Respond with the method, path and body of the request."""
    body = await request.read_all(1 << 20)
    request.respond(200, [], f"{request.method} {request.path} ".encode() + body)


async def ignore_body(request: Request) -> None:
    """Respond without reading the request body."""
    request.respond(200, [], b"ok")


class BlockingHandler:
    """Responds to each request when the test fires its Deferred in `waiters`."""

    def __init__(self) -> None:
        self.waiters: list[Deferred[None]] = []
        self.outcomes: list[BaseException | None] = []

    async def __call__(self, request: Request) -> None:
        waiter: Deferred[None] = Deferred()
        self.waiters.append(waiter)
        try:
            await waiter
        except BaseException as error:
            self.outcomes.append(error)
            raise
        request.respond(200, [], request.path.encode())
        self.outcomes.append(None)


class DownloadHandler:
    """Responds with `size` bytes in chunks of 1000, and drains after each chunk."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written = 0
        self.errors: list[BaseException] = []

    async def __call__(self, request: Request) -> None:
        request.start(200, [], self.size)
        try:
            while self.written < self.size:
                request.write(b"x" * 1000)
                self.written += 1000
                await request.drain()
        except BaseException as error:
            self.errors.append(error)
            raise
        request.finish()


class UploadHandler:
    """Reads the request body after the test fires `proceed`."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.proceed = Deferred[None]()
        self.body = b""
        self.error: BaseException | None = None

    async def __call__(self, request: Request) -> None:
        self.request = request
        await self.proceed
        try:
            while data := await request.read_chunk():
                self.body += data
        except BaseException as error:
            self.error = error
            raise
        request.respond(201, [])
