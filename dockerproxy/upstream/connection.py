"""One HTTP/1.1 connection to an upstream, for one exchange after the other.

Ours and not `twisted.web.client`, whose connections lose an answer that comes before the request's body is whole (a
push that is refused), ignore what comes behind an answer, read heads without a bound, and are pooled by host name
alone, so that a request whose `permit` forbids an address could travel on a connection that was opened without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from typing import Protocol as TypingProtocol

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from dockerproxy.errors import UpstreamBroken, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ByteStream
from dockerproxy.upstream.body_writer import BodyWriter
from dockerproxy.upstream.http1 import (
    MAX_HEAD,
    BodyReader,
    ResponseHead,
    body_reader_for,
    parse_content_length,
    parse_response_head,
    should_keep_alive,
)
from dockerproxy.upstream.idle_timer import IdleTimer
from dockerproxy.upstream.tls import ClientHandshake

_MAX_DISCARD = 64 * 1024  # an answer nobody wants is read to its end if it is no longer than this


@frozen
class UpstreamTimeouts:
    """Seconds: until connected (TLS included), without a byte from upstream, without upstream taking a byte."""

    connect: float = 60.0
    read: float = 60.0
    send: float = 60.0


@frozen
class OutgoingRequest:
    """A request to send: `head` are its bytes, `url` is what the response is known by."""

    method: str
    url: str
    head: bytes = field(repr=False)
    body: IBodyProducer | None = None


class ConnectionDropped(UpstreamBroken):
    """The connection ended before a byte of the answer came."""


class Response:
    """An answer whose head is here. Its body is read with `read_chunk` (or `read_pieces`), or given up with `abort` or
    `discard`.

    `length` is the Content-Length (in an answer to HEAD, that which GET would have), None where there is none.
    While nobody reads, at most 768 KiB of the body wait here (or 512 KiB more than `read_pieces` was asked for), and
    the connection is held.
    """

    def __init__(self, url: str, head: ResponseHead, stream: ByteStream, connection: UpstreamConnection) -> None:
        self.url = url
        self.status = head.status
        self.headers: Headers = head.headers
        self.length = None if "transfer-encoding" in head.headers else parse_content_length(head.headers)
        self._stream = stream
        self._connection = connection

    async def read_chunk(self) -> bytes:
        """Return what has come of the body, at least one byte; ``b""`` at its end.

        Raise `UpstreamBroken` where it ends too early and `UpstreamTimeout` where nothing comes for too long.
        """
        return await self._stream.read()

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        """Return what has come of the body, as it came; none at its end. Raise as `read_chunk` does.

        `at_least` so many bytes are waited for, but no longer than `within` seconds.
        """
        timer = self._connection.call_later(timeout, self._stream.return_available)
        try:
            return await self._stream.read_pieces(at_least)
        finally:
            if timer.active():
                timer.cancel()

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body; raise as `read_chunk` does, and `UpstreamBroken` where it is above `limit` bytes."""
        parts, size = [], 0
        while data := await self.read_chunk():
            size += len(data)
            if size > limit:
                self.abort()
                raise UpstreamBroken(f"{self._connection.authority}: its answer is longer than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    async def discard(self) -> None:
        """Be done with the body: read it where it is small, so that the connection can be used again, or abort."""
        size = 0
        try:
            while size <= _MAX_DISCARD and (self._stream.ended or (self.length or 0) <= _MAX_DISCARD):
                data = await self.read_chunk()
                if not data:
                    return
                size += len(data)
        except UpstreamError:
            return  # that it broke harms nobody now
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once. Does nothing once the body is complete."""
        self._connection.abort_response(self)


class ConnectionOwner(TypingProtocol):
    """Who a connection belongs to."""

    def on_connection_idle(self, connection: UpstreamConnection) -> None:
        """Take note that `connection` can be used for another exchange."""

    def on_connection_lost(self, connection: UpstreamConnection) -> None:
        """Take note that `connection` is no more."""


@implementer(IHandshakeListener, IPushProducer)
class UpstreamConnection(Protocol):
    """A connection to `place` (host and port, for sentences); over TLS where `tls` is given.

    `opened` fires when it can be used, or fails with an `UpstreamError`. After that, `exchange` may be called whenever
    no exchange is under way and it is `alive`. `key` tells the owner which requests it serves.
    """

    transport: Any

    def __init__(
        self,
        clock: Any,
        authority: str,
        handshake: ClientHandshake | None,
        timeouts: UpstreamTimeouts,
        owner: ConnectionOwner,
        key: Hashable,
    ) -> None:
        self.authority = authority
        self.key = key
        self.ready: Deferred[None] = Deferred()
        self.alive = True
        self._clock = clock
        self._handshake = handshake
        self._timeouts = timeouts
        self._owner = owner
        self._connected = False
        self._read_timer = IdleTimer(clock, timeouts.read, self._on_read_timeout)
        self._method = ""
        self._url = ""
        self._response_waiter: Deferred[Response] | None = None  # until the head of the answer is here
        self._response: Response | None = None  # from then on, until the answer is complete
        self._body_writer: BodyWriter | None = None
        self._buffer = b""
        self._interim_size = 0  # bytes of interim answers before this one
        self._body_reader = BodyReader()
        self._stream = ByteStream()
        self._reusable = False

    # opening

    def connectionMade(self) -> None:
        self._connected = True
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        if self._handshake is None:
            self.ready.callback(None)

    def handshakeCompleted(self) -> None:
        assert self._handshake is not None
        try:
            self._handshake.verify_certificate()
        except UpstreamUnreachable as error:
            self._fail(error)
        else:
            self.ready.callback(None)

    # an exchange

    def exchange(self, request: OutgoingRequest) -> Deferred[Response]:
        """Send `request`; fires with the response when its head is here. To cancel it closes the connection."""
        self._method, self._url = request.method, request.url
        self._buffer, self._interim_size = b"", 0
        waiter: Deferred[Response] = Deferred(self._cancel_exchange)
        self._response_waiter = waiter
        self.transport.write(request.head)
        if request.body is None:
            self._on_request_sent(None)
        else:
            self._body_writer = BodyWriter(
                self._clock, self.transport, request.body, self._timeouts.send, self._on_send_timeout
            )
            self._body_writer.start().addCallbacks(self._on_request_sent, self._on_body_failed)
        return waiter

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        """Have the clock call `call`, and return what cancels that."""
        return self._clock.callLater(seconds, callback)

    def abort_response(self, response: Response) -> None:
        """Close the connection if `response` is still what comes on it."""
        if self._response is response:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._fail(UpstreamBroken(f"{self.authority}: the connection was given up"))

    def _cancel_exchange(self, _: Deferred[Response]) -> None:
        self._response_waiter = None
        self.abort()

    def _on_request_sent(self, _: None) -> None:
        self._body_writer = None
        if self._response_waiter is not None:
            self._read_timer.start()

    def _on_body_failed(self, failure: Failure) -> None:
        """End the exchange whose body failed: that is the client's side, and its error goes back there."""
        self._body_writer = None
        assert isinstance(failure.value, Exception)
        self._fail(failure.value)

    def dataReceived(self, data: bytes) -> None:
        self._read_timer.touch()
        if self._response_waiter is not None:
            self._read_head(data)
        elif self._response is not None:
            self._read_body(data)
        elif self.alive:
            self.abort()  # bytes that nobody asked for

    def _read_head(self, data: bytes) -> None:
        self._buffer += data
        while self._response_waiter is not None:
            end = self._buffer.find(b"\r\n\r\n")
            if self._interim_size + (end if end >= 0 else len(self._buffer)) > MAX_HEAD:
                self._fail(UpstreamBroken(f"{self.authority}: the head of its answer is longer than {MAX_HEAD} bytes"))
                return
            if end < 0:
                return
            raw, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            try:
                self._handle_head(parse_response_head(raw), len(raw), self._response_waiter)
            except ValueError as error:
                self._fail(UpstreamBroken(f"{self.authority}: {error}"))

    def _handle_head(self, head: ResponseHead, size: int, waiter: Deferred[Response]) -> None:
        if head.status == 101:
            raise ValueError("it changed the protocol, which nobody asked for")
        if head.status < 200:  # RFC 9110, section 15.2: may be passed over
            self._interim_size += size + 4
            return
        body_reader, stream = body_reader_for(self._method, head), ByteStream(self)
        response = Response(self._url, head, stream, self)
        self._body_reader, self._stream, self._response, self._response_waiter = body_reader, stream, response, None
        self._reusable = should_keep_alive(head)
        if self._body_writer is not None and head.status >= 300:
            self._stop_sending()  # refused: nobody reads the rest
            self._reusable = False
        rest, self._buffer = self._buffer, b""
        if body_reader.done:
            body_reader.rest = rest
            self._finish_response()
        else:
            self._read_timer.start()
            if rest:
                self._read_body(rest)
        waiter.callback(response)

    def _read_body(self, data: bytes) -> None:
        response = self._response
        try:
            pieces = self._body_reader.feed(data)
        except ValueError as error:
            self._fail(UpstreamBroken(f"{self.authority}: {error}"))
            return
        for piece in pieces:
            self._stream.feed(piece)  # wakes the reader, which may give the response up
        if self._body_reader.done and self._response is response:
            self._finish_response()

    def _finish_response(self) -> None:
        """Let the next exchange have the connection, now that all of the answer is here, or close it."""
        stream, self._response = self._stream, None
        self._read_timer.stop()
        if self._reusable and self._body_writer is None and not self._body_reader.rest and self._connected:
            self.transport.resumeProducing()
            self._owner.on_connection_idle(self)
        else:
            self.alive = False
            self._stop_sending()
            if self._connected:
                self.transport.loseConnection()
        stream.finish()

    # IPushProducer: what the stream asks for

    def pauseProducing(self) -> None:
        self._read_timer.pause()
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        if self._response is not None:
            self._read_timer.start()
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        self.abort()

    # ends

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._connected = self.alive = False
        if not self.ready.called:
            detail = "closed the connection" if self._handshake is None else self._handshake.describe_failure(reason)
            self._fail(UpstreamUnreachable(f"{self.authority}: {detail}"))
        elif self._response_waiter is not None:
            error_type = UpstreamBroken if self._buffer or self._interim_size else ConnectionDropped
            self._fail(error_type(f"{self.authority}: closed the connection without a complete answer"))
        elif self._response is not None:
            shortfall = self._body_reader.read_eof()
            if shortfall is None and not isinstance(reason.value, ConnectionDone):
                shortfall = "broke off in an answer of unknown length"
            if shortfall is None:
                self._finish_response()
            else:
                self._fail(UpstreamBroken(f"{self.authority}: {shortfall}"))
        self._owner.on_connection_lost(self)

    def _on_read_timeout(self) -> None:
        self._fail(UpstreamTimeout(f"{self.authority}: timed out, nothing came for {self._timeouts.read:g} s"))

    def _on_send_timeout(self) -> None:
        self._fail(UpstreamTimeout(f"{self.authority}: timed out, it took nothing for {self._timeouts.send:g} s"))

    def _fail(self, error: Exception) -> None:
        """End the connection, and with `error` whatever is under way."""
        self.alive = False
        self._read_timer.stop()
        self._stop_sending()
        waiter, self._response_waiter = self._response_waiter, None
        response, self._response = self._response, None
        if self._connected:
            self.transport.abortConnection()
        if not self.ready.called:
            self.ready.errback(error)
        if response is not None:
            self._stream.fail(error)
        if waiter is not None:
            waiter.errback(error)

    def _stop_sending(self) -> None:
        body_writer, self._body_writer = self._body_writer, None
        if body_writer is not None:
            body_writer.stop()
