"""A site on a clock, its clients on transports of bytes, and handlers that do what tests need of them."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from dockerproxy.http.channel import HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import Site, Timeouts

TIMEOUTS = Timeouts(keepalive=300, header=60, body=50, send=40)
GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
UNREAD = 256 * 1024  # bytes of a body that are thrown away for the sake of the next request

Handler = Callable[[Request], Awaitable[None]]


class Wire(StringTransport):
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
class Answer:
    status: int
    fields: dict[str, str]
    body: bytes


def answers(data: bytes, *methods: str) -> list[Answer]:
    """Read the answers in `data` as a client does that sent requests with these methods (else GETs)."""
    file, found = io.BytesIO(data), []
    while line := file.readline():
        version, status, _ = line.decode().split(" ", 2)
        assert version == "HTTP/1.1"
        fields = {}
        while (line := file.readline()) != b"\r\n":
            name, value = line.decode().split(": ", 1)
            assert name not in fields
            fields[name] = value.removesuffix("\r\n")
        method = methods[len(found)] if len(found) < len(methods) else "GET"
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
        found.append(Answer(int(status), fields, body))
    return found


class Door:
    """A site on a clock, what it logged, and clients of it."""

    def __init__(self, handler: Handler, timeouts: Timeouts = TIMEOUTS) -> None:
        self.clock = Clock()
        self.logged: list[tuple[str, int, int, float]] = []
        self.site = Site(self.clock, handler, timeouts=timeouts, finished=self._log)

    def _log(self, request: Request, seconds: float) -> None:
        self.logged.append((request.path, request.status, request.size, seconds))

    def client(self) -> Client:
        return Client(self.site)


class Client:
    def __init__(self, site: Site) -> None:
        self.channel = HTTPChannel(site, site.handler, secure=False)
        self.wire = Wire()
        self.channel.makeConnection(self.wire)

    def send(self, data: bytes) -> None:
        self.channel.dataReceived(data)

    def leave(self) -> None:
        self.channel.connectionLost(Failure(ConnectionDone()))

    def stop_reading(self) -> None:
        assert self.wire.producer is not None
        self.wire.producer.pauseProducing()

    def read_on(self) -> None:
        assert self.wire.producer is not None
        self.wire.producer.resumeProducing()

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def answers(self) -> list[Answer]:
        return answers(self.wire.value())

    @property
    def closed(self) -> bool:
        """Whether the connection was closed in good order."""
        return self.wire.disconnecting and not self.wire.aborted


async def echo(request: Request) -> None:
    """Answer with what was asked."""
    body = await request.read_all(1 << 20)
    request.answer(200, [], f"{request.method} {request.path} ".encode() + body)


async def ignore(request: Request) -> None:
    """Answer without a look at the body."""
    request.answer(200, [], b"ok")


class Slow:
    """Answers when told."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[None]] = []
        self.ended: list[BaseException | None] = []

    async def __call__(self, request: Request) -> None:
        waiter: Deferred[None] = Deferred()
        self.waiting.append(waiter)
        try:
            await waiter
        except BaseException as error:
            self.ended.append(error)
            raise
        request.answer(200, [], request.path.encode())
        self.ended.append(None)


class Downloads:
    """Answers with `size` bytes in pieces of 1000, one after the other as the client takes them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written = 0
        self.ended: list[BaseException] = []

    async def __call__(self, request: Request) -> None:
        request.start(200, [], self.size)
        try:
            while self.written < self.size:
                request.write(b"x" * 1000)
                self.written += 1000
                await request.drain()
        except BaseException as error:
            self.ended.append(error)
            raise
        request.finish()


class Uploads:
    """Reads a body when told."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.go = Deferred[None]()
        self.body = b""
        self.ended: BaseException | None = None

    async def __call__(self, request: Request) -> None:
        self.request = request
        await self.go
        try:
            while data := await request.read_chunk():
                self.body += data
        except BaseException as error:
            self.ended = error
            raise
        request.answer(201, [])
