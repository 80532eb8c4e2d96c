"""One HTTP/1.1 connection to an upstream, for one exchange after the other.

Ours and not `twisted.web.client`, whose connections lose an answer that comes before the request's body is whole (a
push that is refused), ignore what comes behind an answer, read heads without a bound, and are pooled by host name
alone, so that a request whose `permit` forbids an address could travel on a connection that was opened without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from typing import Protocol as Seam

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
from dockerproxy.upstream.sending import BodySender
from dockerproxy.upstream.stopwatch import Stopwatch
from dockerproxy.upstream.tls import TLSSession
from dockerproxy.upstream.wire import (
    MAX_HEAD,
    Body,
    ResponseHead,
    body_of,
    declared_length,
    keeps_alive,
    parse_response_head,
)

_SMALL = 64 * 1024  # an answer nobody wants is read to its end if it is no longer than this


@frozen
class Timeouts:
    """Seconds: until connected (TLS included), without a byte from upstream, without upstream taking a byte."""

    connect: float = 60.0
    read: float = 60.0
    send: float = 60.0


@frozen
class Outgoing:
    """A request to send: `head` are its bytes, `url` is what the response is known by."""

    method: str
    url: str
    head: bytes = field(repr=False)
    body: IBodyProducer | None = None


class Dropped(UpstreamBroken):
    """The connection ended before a byte of the answer came."""


class Response:
    """An answer whose head is here. Its body is read with `read_chunk` (or `read_pieces`), or given up with `abort` or
    `discard`.

    `length` is the Content-Length (in an answer to HEAD, that which GET would have), None where there is none.
    While nobody reads, at most 768 KiB of the body wait here (or 512 KiB more than `read_pieces` was asked for), and
    the connection is held.
    """

    def __init__(self, url: str, head: ResponseHead, stream: ByteStream, connection: Connection) -> None:
        self.url = url
        self.status = head.status
        self.headers: Headers = head.headers
        self.length = None if "transfer-encoding" in head.headers else declared_length(head.headers)
        self._stream = stream
        self._connection = connection

    async def read_chunk(self) -> bytes:
        """Return what has come of the body, at least one byte; ``b""`` at its end.

        Raise `UpstreamBroken` where it ends too early and `UpstreamTimeout` where nothing comes for too long.
        """
        return await self._stream.read()

    async def read_pieces(self, at_least: int, within: float) -> list[bytes]:
        """Return what has come of the body, as it came; none at its end. Raise as `read_chunk` does.

        `at_least` so many bytes are waited for, but no longer than `within` seconds.
        """
        timer = self._connection.call_later(within, self._stream.return_available)
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
                raise UpstreamBroken(f"{self._connection.place}: its answer is longer than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    async def discard(self) -> None:
        """Be done with the body: read it where it is small, so that the connection can be used again, or abort."""
        size = 0
        try:
            while size <= _SMALL and (self._stream.ended or (self.length or 0) <= _SMALL):
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
        self._connection.give_up(self)


class Owner(Seam):
    """Who a connection belongs to."""

    def released(self, connection: Connection) -> None:
        """Take note that `connection` can be used for another exchange."""

    def lost(self, connection: Connection) -> None:
        """Take note that `connection` is no more."""


@implementer(IHandshakeListener, IPushProducer)
class Connection(Protocol):
    """A connection to `place` (host and port, for sentences); over TLS where `tls` is given.

    `opened` fires when it can be used, or fails with an `UpstreamError`. After that, `exchange` may be called whenever
    no exchange is under way and it is `alive`. `key` tells the owner which requests it serves.
    """

    transport: Any

    def __init__(
        self, clock: Any, place: str, tls: TLSSession | None, timeouts: Timeouts, owner: Owner, key: Hashable
    ) -> None:
        self.place = place
        self.key = key
        self.opened: Deferred[None] = Deferred()
        self.alive = True
        self._clock = clock
        self._tls = tls
        self._timeouts = timeouts
        self._owner = owner
        self._connected = False
        self._stopwatch = Stopwatch(clock, timeouts.read, self._silent)
        self._method = ""
        self._url = ""
        self._answer: Deferred[Response] | None = None  # until the head of the answer is here
        self._response: Response | None = None  # from then on, until the answer is complete
        self._sender: BodySender | None = None
        self._buffer = b""
        self._interim = 0  # bytes of interim answers before this one
        self._body = Body()
        self._stream = ByteStream()
        self._reusable = False

    # opening

    def connectionMade(self) -> None:
        self._connected = True
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        if self._tls is None:
            self.opened.callback(None)

    def handshakeCompleted(self) -> None:
        assert self._tls is not None
        try:
            self._tls.check()
        except UpstreamUnreachable as error:
            self._fail(error)
        else:
            self.opened.callback(None)

    # an exchange

    def exchange(self, request: Outgoing) -> Deferred[Response]:
        """Send `request`; fires with the response when its head is here. To cancel it closes the connection."""
        self._method, self._url = request.method, request.url
        self._buffer, self._interim = b"", 0
        answer: Deferred[Response] = Deferred(self._cancelled)
        self._answer = answer
        self.transport.write(request.head)
        if request.body is None:
            self._sent(None)
        else:
            self._sender = BodySender(self._clock, self.transport, request.body, self._timeouts.send, self._stalled)
            self._sender.start().addCallbacks(self._sent, self._unsent)
        return answer

    def call_later(self, seconds: float, call: Callable[[], None]) -> Any:
        """Have the clock call `call`, and return what cancels that."""
        return self._clock.callLater(seconds, call)

    def give_up(self, response: Response) -> None:
        """Close the connection if `response` is still what comes on it."""
        if self._response is response:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._fail(UpstreamBroken(f"{self.place}: the connection was given up"))

    def _cancelled(self, _: Deferred[Response]) -> None:
        self._answer = None
        self.abort()

    def _sent(self, _: None) -> None:
        self._sender = None
        if self._answer is not None:
            self._stopwatch.start()

    def _unsent(self, failure: Failure) -> None:
        """End the exchange whose body failed: that is the client's side, and its error goes back there."""
        self._sender = None
        assert isinstance(failure.value, Exception)
        self._fail(failure.value)

    def dataReceived(self, data: bytes) -> None:
        self._stopwatch.touch()
        if self._answer is not None:
            self._read_head(data)
        elif self._response is not None:
            self._read_body(data)
        elif self.alive:
            self.abort()  # bytes that nobody asked for

    def _read_head(self, data: bytes) -> None:
        self._buffer += data
        while self._answer is not None:
            end = self._buffer.find(b"\r\n\r\n")
            if self._interim + (end if end >= 0 else len(self._buffer)) > MAX_HEAD:
                self._fail(UpstreamBroken(f"{self.place}: the head of its answer is longer than {MAX_HEAD} bytes"))
                return
            if end < 0:
                return
            raw, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            try:
                self._take_head(parse_response_head(raw), len(raw), self._answer)
            except ValueError as error:
                self._fail(UpstreamBroken(f"{self.place}: {error}"))

    def _take_head(self, head: ResponseHead, size: int, answer: Deferred[Response]) -> None:
        if head.status == 101:
            raise ValueError("it changed the protocol, which nobody asked for")
        if head.status < 200:  # RFC 9110, section 15.2: may be passed over
            self._interim += size + 4
            return
        body, stream = body_of(self._method, head), ByteStream(self)
        response = Response(self._url, head, stream, self)
        self._body, self._stream, self._response, self._answer = body, stream, response, None
        self._reusable = keeps_alive(head)
        if self._sender is not None and head.status >= 300:
            self._stop_sending()  # refused: nobody reads the rest
            self._reusable = False
        rest, self._buffer = self._buffer, b""
        if body.done:
            body.rest = rest
            self._complete()
        else:
            self._stopwatch.start()
            if rest:
                self._read_body(rest)
        answer.callback(response)

    def _read_body(self, data: bytes) -> None:
        response = self._response
        try:
            pieces = self._body.feed(data)
        except ValueError as error:
            self._fail(UpstreamBroken(f"{self.place}: {error}"))
            return
        for piece in pieces:
            self._stream.feed(piece)  # wakes the reader, which may give the response up
        if self._body.done and self._response is response:
            self._complete()

    def _complete(self) -> None:
        """Let the next exchange have the connection, now that all of the answer is here, or close it."""
        stream, self._response = self._stream, None
        self._stopwatch.stop()
        if self._reusable and self._sender is None and not self._body.rest and self._connected:
            self.transport.resumeProducing()
            self._owner.released(self)
        else:
            self.alive = False
            self._stop_sending()
            if self._connected:
                self.transport.loseConnection()
        stream.finish()

    # IPushProducer: what the stream asks for

    def pauseProducing(self) -> None:
        self._stopwatch.pause()
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        if self._response is not None:
            self._stopwatch.start()
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        self.abort()

    # ends

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._connected = self.alive = False
        if not self.opened.called:
            why = "closed the connection" if self._tls is None else self._tls.explain(reason)
            self._fail(UpstreamUnreachable(f"{self.place}: {why}"))
        elif self._answer is not None:
            kind = UpstreamBroken if self._buffer or self._interim else Dropped
            self._fail(kind(f"{self.place}: closed the connection without a complete answer"))
        elif self._response is not None:
            shortfall = self._body.shortfall()
            if shortfall is None and not isinstance(reason.value, ConnectionDone):
                shortfall = "broke off in an answer of unknown length"
            if shortfall is None:
                self._complete()
            else:
                self._fail(UpstreamBroken(f"{self.place}: {shortfall}"))
        self._owner.lost(self)

    def _silent(self) -> None:
        self._fail(UpstreamTimeout(f"{self.place}: timed out, nothing came for {self._timeouts.read:g} s"))

    def _stalled(self) -> None:
        self._fail(UpstreamTimeout(f"{self.place}: timed out, it took nothing for {self._timeouts.send:g} s"))

    def _fail(self, error: Exception) -> None:
        """End the connection, and with `error` whatever is under way."""
        self.alive = False
        self._stopwatch.stop()
        self._stop_sending()
        answer, self._answer = self._answer, None
        response, self._response = self._response, None
        if self._connected:
            self.transport.abortConnection()
        if not self.opened.called:
            self.opened.errback(error)
        if response is not None:
            self._stream.fail(error)
        if answer is not None:
            answer.errback(error)

    def _stop_sending(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.stop()
