"""An HTTP request and the response to it, as handlers use them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol

from dockerproxy.errors import RegistryError, SizeInvalid
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import RequestHead, expects_continue, reason_phrase, render_head
from dockerproxy.http.security_fields import SECURITY_FIELDS

if TYPE_CHECKING:
    from dockerproxy.http.stream import ByteStream, ClientBuffers

Fields = Iterable[tuple[str, str]]

ErrorRenderer = Callable[["Request", RegistryError], None]
"""Responds with an error in the form that a surface's clients read. It is called before the response has started."""

PLAIN_TEXT = ("Content-Type", "text/plain; charset=utf-8")

_MAX_USER_AGENT = 256  # characters that are logged

_BODYLESS_STATUSES = frozenset({204, 304})  # RFC 9112, section 6.3


class ClientDisconnected(Exception):
    """The client closed the connection before the response was complete."""


class RequestChannel(Protocol):
    """The part of a connection that a request uses."""

    client: str
    port: int
    secure: bool
    number: int

    @property
    def peer_uid(self) -> int | None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def write_some(self, data: bytes | bytearray | memoryview) -> int: ...

    @property
    def can_sendfile(self) -> bool: ...

    def sendfile(self, descriptor: int, offset: int, size: int) -> int: ...

    @property
    def response_buffers(self) -> ClientBuffers: ...

    def drain(self) -> Awaitable[None]: ...

    def abort(self) -> None: ...

    def exceeds_discard_limit(self) -> bool: ...

    def on_response_started(self) -> None: ...

    def on_response_finished(self) -> None: ...

    def detach(self) -> tuple[Any, bytes]: ...


class Request:
    """A request and its response.

    To respond, call `respond` or `respond_long`, or else `start`, then `write` and `drain` any number of times, then
    `finish`. Writes are ignored after the response has ended or the client has disconnected.

    `path` and `query` come from the origin-form target and are still percent-encoded. `cache_status` is reported in the
    access log and in `X-Cache`. `host` is the host that the client addressed, `user` the user that logged in there, and
    `proxy_user` the user that logged in to the proxy. Handlers set them and the access log reports them.

    `because` goes to the access log: the sentence of the error that the request ended in, or why the cache could not
    just serve it. `reason` is the reason phrase of the response, "" for the standard one.

    `registry` and `kind` are the labels by which the request is counted in the metrics. `latency` are the seconds from
    its head to the head of the response, None before that.

    `security_fields` are rendered fields that the response gets besides those of the handler. A handler that forwards
    the page of another server sets them to "", because that server's own rules for its pages apply.

    A handler raises an error instead of responding with it. The channel then aborts a response that has started, and
    otherwise calls `error_renderer`. The handler that knows the surface of the request sets it; the default is plain
    text.
    """

    __slots__ = (
        "_awaits_continue",
        "_body",
        "_body_suppressed",
        "_channel",
        "_chunked",
        "_content_length",
        "because",
        "bytes_sent",
        "cache_status",
        "client",
        "closing",
        "error_renderer",
        "finished",
        "head",
        "headers",
        "host",
        "kind",
        "latency",
        "method",
        "path",
        "port",
        "proxy_user",
        "query",
        "reason",
        "registry",
        "secure",
        "security_fields",
        "status",
        "user",
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
        self.port = channel.port  # the local port that the client connected to; 0 for a Unix socket
        self.secure = channel.secure
        self.host = ""
        self.cache_status = "-"
        self.because = self.reason = ""
        self.registry, self.kind = "own", "other"
        self.latency: float | None = None
        self.user: str | None = None
        self.proxy_user: str | None = None
        self.status = 0
        self.bytes_sent = 0  # bytes of the response body that were written
        self.finished = False
        self.closing = False  # whether the connection is closed after this response
        self.error_renderer: ErrorRenderer = respond_text_error
        self.security_fields = SECURITY_FIELDS

    @property
    def started(self) -> bool:
        """Whether the status was sent, so that no other response is possible."""
        return self.status != 0

    @property
    def peer(self) -> str:
        """The address that the connection is from. `client` may be another one, if a reverse proxy names it."""
        return self._channel.client

    @property
    def peer_uid(self) -> int | None:
        """The ID of the local user that connected to our Unix socket; None for TCP."""
        return self._channel.peer_uid

    @property
    def user_agent(self) -> str | None:
        """The start of the User-Agent field, None if there is none."""
        value = self.headers.get("user-agent")
        return None if value is None else value[:_MAX_USER_AGENT]

    def set_error(self, error: RegistryError) -> None:
        """Put the sentence of `error` into the access log and, unless it is forwarded, into the status line."""
        self.because = error.message
        self.reason = "" if error.forwarded else reason_phrase(error.message)

    def report_progress(self) -> None:
        """Tell the client that its request is being handled (102, RFC 2518, section 10.1)."""
        if not self.started and not self.finished and self.head.version == (1, 1):
            self._channel.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    # Request body

    @property
    def has_body(self) -> bool:
        """Whether the request has a body that is not empty."""
        return self._body is not None

    @property
    def body_ended(self) -> bool:
        """Whether the whole body has been received, or no more of it will be."""
        return self._body is None or self._body.ended

    @property
    def bytes_received(self) -> int:
        """The bytes of the body that were received so far."""
        return 0 if self._body is None else self._body.received

    async def read_chunk(self, at_least: int = 1) -> bytes:
        """Return the buffered part of the body, after waiting for `at_least` bytes or the end of the body.

        Return ``b""`` at the end. Raise `ClientDisconnected`.
        """
        if self._body is None:
            return b""
        if self._awaits_continue:
            self._awaits_continue = False
            if not self.started:
                self._channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self._body.read(at_least)

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body; raise `SizeInvalid` if it is longer than `limit` bytes.

        Raise `TooManyRequests` or `ServiceOverloaded` if the bodies of this client, or of all, take too much memory.
        """
        parts, size = [], 0
        while data := await self.read_chunk():
            size += len(data)
            if size > limit:
                raise SizeInvalid(f"the request body is longer than {limit} bytes")
            parts.append(data)
            if self._body is not None:
                self._body.retain()
        return b"".join(parts)

    def drop_body(self) -> None:
        """Release the memory of the body, because the request has ended."""
        if self._body is not None:
            self._body.discard()

    # Response

    def respond(self, status: int, fields: Fields, content: bytes = b"") -> None:
        """Send a complete response."""
        self._send_head(status, fields, len(content), content)
        self.finish()

    async def respond_long(self, status: int, fields: Fields, content: bytes) -> None:
        """Send a complete response whose content is too long to be copied for a client that reads slowly."""
        self.start(status, fields, len(content))
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[self.write_some(remaining) :]
            await self.drain()
        self.finish()

    def start(self, status: int, fields: Fields, length: int | None) -> None:
        """Send the response head. `length` is the length of the body in bytes, or None if it is unknown."""
        self._send_head(status, fields, length, b"")
        self._channel.on_response_started()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send part of the response body; await `drain` before the next part.

        The transport buffers all the bytes that the kernel does not accept.
        """
        if self._may_write(len(data)):
            self.bytes_sent += len(data)
            self._channel.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)) if self._chunked else data)

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send as much of `data` as the kernel accepts now, and little more; return the number of bytes.

        Await `drain` before you pass the rest again. This avoids buffering content that can be read again.
        """
        if self._chunked or not self._may_write(len(data)):  # a chunk is announced with its length, so send it whole
            self.write(data)
            return len(data)
        written = self._channel.write_some(data)
        self.bytes_sent += written
        return written

    @property
    def can_sendfile(self) -> bool:
        """Whether the response body can be sent with `sendfile`."""
        return not self._chunked and self._channel.can_sendfile

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        """Send bytes of a file, like `write_some`; raise OSError if they cannot be read.

        The bytes should be in the page cache: a read from disk blocks the reactor.
        """
        if not self._may_write(size):
            return size
        sent = self._channel.sendfile(descriptor, offset, size)
        self.bytes_sent += sent
        return sent

    @property
    def response_buffers(self) -> ClientBuffers:
        """The client's part of the memory for responses that are forwarded."""
        return self._channel.response_buffers

    def drain(self) -> Awaitable[None]:
        """Wait until the transport accepts more data; raise `ClientDisconnected`."""
        return self._channel.drain()

    def finish(self) -> None:
        """End the response. If it is shorter than its Content-Length, abort, so that the client notices."""
        if self.finished:
            return
        if self._chunked and not self._body_suppressed:
            self._channel.write(b"0\r\n\r\n")
        elif self._content_length is not None and not self._body_suppressed and self.bytes_sent != self._content_length:
            self.abort()
            return
        self.finished = True
        self._channel.on_response_finished()

    @property
    def connection_number(self) -> int:
        """A number that no other client connection of this process has or had."""
        return self._channel.number

    def abort(self) -> None:
        """Reset the connection, so that the client does not mistake a partial response for a complete one."""
        if not self.finished:
            self.finished = True
            self.closing = True
            self._channel.abort()

    def detach(self) -> tuple[Any, bytes]:
        """Take over the connection: return its transport and the bytes received after the request head.

        Raise `ClientDisconnected` if the response has ended or the client has disconnected.
        """
        if self.finished:
            raise ClientDisconnected
        self.finished = True
        return self._channel.detach()

    def _may_write(self, size: int) -> bool:
        """Return whether `size` more bytes are to be sent; abort if they exceed the Content-Length."""
        if self._body_suppressed or self.finished or not size:
            return False
        if self._content_length is not None and self.bytes_sent + size > self._content_length:
            self.abort()  # the client would read the excess as the next response
            return False
        return True

    def _send_head(self, status: int, fields: Fields, length: int | None, content: bytes) -> None:
        if self.started:
            raise RuntimeError("the response was started already")
        response_fields = list(fields)
        chunked = False
        if status in _BODYLESS_STATUSES:
            # RFC 9110, section 8.6: a 204 has no Content-Length. A 304 may have one, but it is optional.
            length = 0
        elif length is not None:
            response_fields.append(("Content-Length", str(length)))
        elif self.head.version == (1, 1):
            chunked = True
            response_fields.append(("Transfer-Encoding", "chunked"))
        else:
            self.closing = True
        if self._awaits_continue or self._channel.exceeds_discard_limit():
            self.closing = True  # the rest of the request body was not requested, or is too long to discard
        if self.closing:
            response_fields.append(("Connection", "close"))
        elif self.head.version == (1, 0):
            response_fields.append(("Connection", "keep-alive"))
        response_fields.append(("Date", _date.now()))
        head = render_head(status, response_fields, self.security_fields, reason=self.reason)
        self.status, self._content_length, self._chunked = status, length, chunked
        self._body_suppressed = self.method == "HEAD" or status in _BODYLESS_STATUSES
        if content and not self._body_suppressed:
            self.bytes_sent = len(content)
            self._channel.write(head + content)
        else:
            self._channel.write(head)


def respond_text_error(request: Request, error: RegistryError) -> None:
    """Respond with the message of `error` as plain text, because a person may read it in curl's output."""
    request.closing = request.closing or request.method == "CONNECT" or request.has_body
    request.respond(error.status, [PLAIN_TEXT, *error.headers], f"{error.message}\n".encode())


class _DateField:
    """The value of the Date field, formatted at most once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._value = ""

    def now(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._value = second, formatdate(second, usegmt=True)
        return self._value


_date = _DateField()
