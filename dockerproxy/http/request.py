"""One request, and the answer to it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol

from dockerproxy.errors import SizeInvalid
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import RequestHead, expects_continue, render_head

if TYPE_CHECKING:
    from dockerproxy.http.stream import ByteStream

Fields = Iterable[tuple[str, str]]

_BODYLESS_STATUSES = frozenset({204, 304})  # RFC 9112, section 6.3


class ClientDisconnected(Exception):
    """The client closed its connection; there is nobody left to answer."""


class RequestChannel(Protocol):
    """What a request needs of the connection that it came by."""

    client: str
    port: int
    secure: bool

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def write_some(self, data: bytes | bytearray | memoryview) -> int: ...

    @property
    def can_sendfile(self) -> bool: ...

    def sendfile(self, descriptor: int, offset: int, size: int) -> int: ...

    def drain(self) -> Awaitable[None]: ...

    def abort(self) -> None: ...

    def exceeds_discard_limit(self) -> bool: ...

    def on_response_finished(self) -> None: ...

    def detach(self) -> tuple[Any, bytes]: ...


class Request:
    """One request and its answer.

    `path` and `query` are those of the origin-form target, as sent (still percent-encoded). `verdict` says for the
    access log and `X-Cache` how the answer came about. `host` is whom the client wanted to speak to, for the log.
    An answer is either `answer`, or `start`, any number of `write` and `drain`, and `finish`. Once it has ended, or the
    client is gone, what is written goes nowhere.
    """

    __slots__ = (
        "_awaits_continue",
        "_body",
        "_body_suppressed",
        "_channel",
        "_chunked",
        "_content_length",
        "bytes_sent",
        "cache_status",
        "client",
        "closing",
        "finished",
        "head",
        "headers",
        "host",
        "method",
        "path",
        "port",
        "query",
        "secure",
        "status",
    )  # fmt: skip

    def __init__(self, channel: RequestChannel, head: RequestHead, body: ByteStream | None) -> None:
        self._channel = channel
        self._body = body
        self._awaits_continue = body is not None and expects_continue(head)
        self._content_length: int | None = 0
        self._chunked = self._body_suppressed = False
        self.head = head
        self.method = head.method
        self.headers: Headers = head.headers
        self.path, _, self.query = head.target.partition("?")
        self.client = channel.client
        self.port = channel.port  # ours, that the client connected to; 0 where there is none
        self.secure = channel.secure
        self.host = ""
        self.cache_status = "-"
        self.status = 0
        self.bytes_sent = 0  # bytes of the answer's body that were written
        self.finished = False
        self.closing = False  # whether the connection ends with this answer

    @property
    def started(self) -> bool:
        """Whether a status was sent, after which no other answer is possible."""
        return self.status != 0

    # the request's body

    @property
    def has_body(self) -> bool:
        """Whether a body comes with the request (an empty one does not count)."""
        return self._body is not None

    async def read_chunk(self, at_least: int = 1) -> bytes:
        """Return what has come of the body, `at_least` so many bytes of it unless it ends before;
        ``b""`` at its end. Raise `ClientGone`."""
        if self._body is None:
            return b""
        if self._awaits_continue:
            self._awaits_continue = False
            if not self.started:
                self._channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self._body.read(at_least)

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body; raise `SizeInvalid` where it is longer than `limit` bytes."""
        parts, size = [], 0
        while data := await self.read_chunk():
            size += len(data)
            if size > limit:
                raise SizeInvalid(f"the body is longer than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    # the answer

    def respond(self, status: int, fields: Fields, content: bytes = b"") -> None:
        """Send a whole answer."""
        self._send_head(status, fields, len(content), content)
        self.finish()

    def start(self, status: int, fields: Fields, length: int | None) -> None:
        """Send the head of an answer whose body has `length` bytes; None where that is not known before the end."""
        self._send_head(status, fields, length, b"")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send a piece of the body; the transport keeps what the client does not take: `drain` before the next."""
        if self._may_write(len(data)):
            self.bytes_sent += len(data)
            self._channel.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)) if self._chunked else data)

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send what the client takes at once of a piece of the body, and little more; return how much that was.

        `drain` before the rest is offered again: for content that need not wait in memory.
        """
        if self._chunked or not self._may_write(len(data)):  # the length of a chunk is said before it is sent
            self.write(data)
            return len(data)
        written = self._channel.write_some(data)
        self.bytes_sent += written
        return written

    @property
    def can_sendfile(self) -> bool:
        """Whether the body can be sent by `offer_file`."""
        return not self._chunked and self._channel.can_sendfile

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        """Send bytes of a file as `offer` does. They should be in memory: what the disk takes, all wait for.

        Raise OSError where they cannot be read.
        """
        if not self._may_write(size):
            return size
        sent = self._channel.sendfile(descriptor, offset, size)
        self.bytes_sent += sent
        return sent

    def drain(self) -> Awaitable[None]:
        """Wait until the client has taken what was written. Raise `ClientGone`."""
        return self._channel.drain()

    def finish(self) -> None:
        """End the answer; one that lacks bytes of what it promised breaks the connection off, so that it is noticed."""
        if self.finished:
            return
        if self._chunked and not self._body_suppressed:
            self._channel.write(b"0\r\n\r\n")
        elif self._content_length is not None and not self._body_suppressed and self.bytes_sent != self._content_length:
            self.abort()
            return
        self.finished = True
        self._channel.on_response_finished()

    def abort(self) -> None:
        """Break the connection off: the client must not take what it has for the whole."""
        if not self.finished:
            self.finished = True
            self.closing = True
            self._channel.abort()

    def detach(self) -> tuple[Any, bytes]:
        """Take the connection over: its transport, and what was read beyond this request's head."""
        self.finished = True
        return self._channel.detach()

    def _may_write(self, size: int) -> bool:
        """Whether `size` bytes more are to be sent."""
        if self._body_suppressed or self.finished or not size:
            return False
        if self._content_length is not None and self.bytes_sent + size > self._content_length:
            self.abort()  # what is too much would be read as the next answer
            return False
        return True

    def _send_head(self, status: int, fields: Fields, length: int | None, content: bytes) -> None:
        if self.started:
            raise RuntimeError("an answer was started already")
        response_fields = list(fields)
        chunked = False
        if status in _BODYLESS_STATUSES:
            # RFC 9110, section 8.6: a 204 has no length; a 304 may tell the content's, which is left unsaid.
            length = 0
        elif length is not None:
            response_fields.append(("Content-Length", str(length)))
        elif self.head.version == (1, 1):
            chunked = True
            response_fields.append(("Transfer-Encoding", "chunked"))
        else:
            self.closing = True
        if self._awaits_continue or self._channel.exceeds_discard_limit():
            self.closing = True  # what is left of the body is not asked for, or not worth reading
        if self.closing:
            response_fields.append(("Connection", "close"))
        elif self.head.version == (1, 0):
            response_fields.append(("Connection", "keep-alive"))
        response_fields.append(("Date", _date.now()))
        head = render_head(status, response_fields)
        self.status, self._content_length, self._chunked = status, length, chunked
        self._body_suppressed = self.method == "HEAD" or status in _BODYLESS_STATUSES
        if content and not self._body_suppressed:
            self.bytes_sent = len(content)
            self._channel.write(head + content)
        else:
            self._channel.write(head)


class _DateField:
    """The Date field, made anew once a second only."""

    def __init__(self) -> None:
        self._second = 0
        self._value = ""

    def now(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._value = second, formatdate(second, usegmt=True)
        return self._value


_date = _DateField()
