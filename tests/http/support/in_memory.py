"""A site on a clock, its clients on transports of bytes, and handlers that do what tests need of them."""

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

TIMEOUTS = ServerTimeouts(keepalive=300, header=60, body=50, send=40)
GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
DISCARD_LIMIT = 256 * 1024  # bytes of a body that are thrown away for the sake of the next request


class RecordingTransport(StringTransport):
    """A transport of bytes that counts what was sent, as the real one does."""

    def __init__(self) -> None:
        super().__init__(lenient=True)
        self.sent = 0
        self.aborted = False

    def write(self, data: bytes) -> None:
        if not self.disconnecting:
            super().write(data)

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
    """Read the answers in `data` as a client does that sent requests with these methods (else GETs)."""
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
    """A site on a clock, what it logged, and clients of it."""

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
        """Whether the connection was closed in good order."""
        return self.transport.disconnecting and not self.transport.aborted


async def echo(request: Request) -> None:
    """Answer with what was asked."""
    body = await request.read_all(1 << 20)
    request.respond(200, [], f"{request.method} {request.path} ".encode() + body)


async def ignore_body(request: Request) -> None:
    """Answer without a look at the body."""
    request.respond(200, [], b"ok")


class BlockingHandler:
    """Answers when told."""

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
    """Answers with `size` bytes in pieces of 1000, one after the other as the client takes them."""

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
    """Reads a body when told."""

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
