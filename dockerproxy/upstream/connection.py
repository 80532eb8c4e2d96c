"""One HTTP/1.1 connection to an upstream, for one exchange after the other.

`twisted.web.client` is not suitable. Its connections lose a response that arrives before the request body is complete,
such as a refused push. They ignore bytes after a response, and read heads of any size. Its pool uses the host name
alone as the key, so a request could use a connection to an address that its address check forbids.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable
from typing import Any
from typing import Protocol as TypingProtocol

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, IProtocol, IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from dockerproxy.errors import (
    EndUnconfirmed,
    ResponseCutOff,
    UpstreamBroken,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ByteStream, ClientBuffers
from dockerproxy.http.tls import UnannouncedEnd
from dockerproxy.http.transport import READ_SIZE, RECORD_SIZE, SocketTransport
from dockerproxy.http.upgrade import switches_as_requested
from dockerproxy.oci.names import Digest
from dockerproxy.upstream.body_writer import BodyWriter
from dockerproxy.upstream.connection_auth import response_logs_in
from dockerproxy.upstream.content_coding import can_decode, content_codings, decode
from dockerproxy.upstream.http1 import (
    MAX_HEAD,
    BodyReader,
    ResponseHead,
    body_reader_for,
    find_head_end,
    parse_content_length,
    parse_response_head,
    should_keep_alive,
    transfer_codings,
)
from dockerproxy.upstream.idle_timer import IdleTimer
from dockerproxy.upstream.tls import ClientHandshake

_UNACKNOWLEDGED_HEAD = 10.0  # seconds
_MAX_DISCARD = 64 * 1024  # bytes of an unwanted body that are read so that the connection can be reused


@frozen
class UpstreamTimeouts:
    """Limits in seconds: to connect (with TLS), without a byte received, without a byte sent."""

    connect: float = 60.0
    read: float = 60.0
    send: float = 60.0

    @property
    def probe(self) -> float:
        """The longest time that a new connection and the head of a response on it may take."""
        return self.connect + self.read


@frozen
class OutgoingRequest:
    """A request to send. `head` contains the bytes of the head; `url` is copied to the response.

    `client_connection` identifies the client's connection that it came on, or is None. `logs_in` is whether the request
    may log the connection to the upstream in. `protocols` are those that the server may switch to, as in Upgrade.
    """

    method: str
    url: str
    head: bytes = field(repr=False)
    body: IBodyProducer | None = None
    client_connection: Hashable = None
    logs_in: bool = False
    protocols: str | None = None


def bound_key(key: Hashable, client_connection: Hashable) -> Hashable:
    """Return the key of a connection that only requests of `client_connection` may use."""
    return (key, client_connection)


class ConnectionDropped(UpstreamBroken):
    """The connection was closed before the first byte of the response."""

    reason = "reset"


class Response:
    """A response whose head has been received. Read its body with `read_chunk` or `read_pieces`, or call `discard` or
    `abort`. If its status is 101, call `hand_over` or `abort`.

    `length` is the Content-Length, or None. In a response to HEAD it is the length that GET would return. `read_chunk`
    and `read_pieces` return the content as it was sent, `read_all` undoes its codings (`content_coding`).
    Back-pressure limits the buffered body to 768 KiB, or to 512 KiB more than `read_pieces` requested. The connection
    is read in small pieces unless `limit_read_ahead` or `count_for` allows for long ones. `on_received` is called with
    the number of bytes that are read.
    """

    sender: Any = None
    """It is upstream's own; see `cache.upstream.UpstreamResponse`."""

    def __init__(self, url: str, head: ResponseHead, stream: ByteStream, connection: UpstreamConnection) -> None:
        self.url = url
        self.status = head.status
        self.headers: Headers = head.headers
        self.length = None if transfer_codings(head.headers) else parse_content_length(head.headers)
        self.on_received: Callable[[int], None] | None = None
        self._stream = stream
        self._connection = connection

    def limit_read_ahead(self, size: int) -> None:
        """Stop to receive while more than `size` bytes wait for the next read. Otherwise it is 256 KiB."""
        self._stream.limit_read_ahead(size)

    def count_for(self, buffers: ClientBuffers) -> None:
        """Count what is buffered of the body among `buffers`, which may limit it."""
        self._stream.count_for(buffers)

    async def read_chunk(self) -> bytes:
        """Return the data received so far, at least one byte, or ``b""`` at the end of the body.

        Raise `UpstreamBroken` if the body is truncated and `UpstreamTimeout` if no byte arrives in time.
        """
        data = await self._stream.read()
        if self.on_received is not None:
            self.on_received(len(data))
        return data

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        """Return the received pieces of the body, or an empty list at its end. Raise as `read_chunk` does.

        Wait until `at_least` bytes are there, or for `timeout` seconds and then for the first byte.
        """
        timer = self._connection.call_later(timeout, self._stream.return_available)
        try:
            pieces = await self._stream.read_pieces(at_least)
        finally:
            if timer.active():
                timer.cancel()
        if self.on_received is not None:
            self.on_received(sum(map(len, pieces)))
        return pieces

    async def read_all(self, limit: int, digest: Digest | None = None) -> bytes:
        """Return the whole content. Raise as `read_chunk` does, and `UpstreamBroken` if it exceeds `limit` bytes.

        On any error the response is aborted, so no connection stays open because its reader has left.

        With a `digest`, content that matches it is returned whatever the framing and coding: also if the connection was
        cut off, and as it was sent if only that matches. Without one, `EndUnconfirmed` is the end.
        """
        try:
            return await self._read_all(limit, digest)
        except BaseException:
            self.abort()
            raise

    async def _read_all(self, limit: int, digest: Digest | None) -> bytes:
        parts, size = [], 0
        cut_off = None
        try:
            while data := await self.read_chunk():
                size += len(data)
                if size > limit:
                    raise UpstreamBroken(f"{self._connection.authority}: its response exceeds {limit} bytes")
                parts.append(data)
        except ResponseCutOff as error:
            if digest is None and not isinstance(error, EndUnconfirmed):
                raise
            cut_off = None if digest is None else error
        content = self._decode(b"".join(parts), limit, digest)
        if cut_off is not None and not _matches(content, digest):
            raise cut_off
        return content

    def _decode(self, content: bytes, limit: int, digest: Digest | None) -> bytes:
        codings = content_codings(self.headers)
        if not codings or not can_decode(codings) or _matches(content, digest):
            return content
        try:
            return decode(content, codings, limit)
        except ValueError as error:
            if content.startswith(b"{"):  # JSON as it is, so that the field is wrong
                return content
            raise UpstreamBroken(f"{self._connection.authority}: {error}") from None

    async def discard(self) -> None:
        """Read the rest of the body if it is small, so that the connection can be reused; otherwise abort."""
        size = 0
        try:
            while size <= _MAX_DISCARD and (self._stream.ended or (self.length or 0) <= _MAX_DISCARD):
                data = await self.read_chunk()
                if not data:
                    return
                size += len(data)
        except UpstreamError:
            return  # because an error in an unwanted body does not matter
        finally:
            self.abort()

    def hand_over(self, protocol: IProtocol) -> None:
        """Attach `protocol` to the connection, which no longer speaks HTTP. Raise `UpstreamBroken` if it is closed."""
        self._connection.hand_over(self, protocol)

    def abort(self) -> None:
        """Drop the rest of the body, and abort the connection unless the body is complete."""
        self._connection.abort_response(self)
        self._stream.discard()


def _matches(content: bytes, digest: Digest | None) -> bool:
    return digest is not None and Digest.of(content, digest.algorithm) == digest


class ConnectionOwner(TypingProtocol):
    """The owner of a connection, which is notified of its state."""

    def on_connection_idle(self, connection: UpstreamConnection) -> None:
        """Called when `connection` is ready for another exchange."""

    def on_connection_lost(self, connection: UpstreamConnection) -> None:
        """Called when `connection` is closed, or handed over to another protocol."""


@implementer(IHandshakeListener, IPushProducer)
class UpstreamConnection(Protocol):
    """A connection to `authority`, the host and port in error messages. It uses TLS if `handshake` is given.

    `ready` fires once the connection can be used, or fails with an `UpstreamError`. After that, `exchange` may be
    called if no other exchange is running and the connection is `alive`. The pool finds connections by `key`. Once a
    client has logged the connection in (`connection_auth`), its key includes that client's connection; if that is
    unknown, the connection is not reused.
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
        self._protocols: str | None = None
        self._response_waiter: Deferred[Response] | None = None  # until the head is received
        self._response: Response | None = None  # from then until the response is complete
        self._body_writer: BodyWriter | None = None
        self._buffer = b""
        self._interim_size = 0  # bytes of interim (1xx) responses before this one
        self._body_reader = BodyReader()
        self._stream = ByteStream()
        self._reusable = False
        self._logged_in = False
        self._client_connection: Hashable = None  # of the current exchange

    # opening

    def connectionMade(self) -> None:
        self._connected = True
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        self._limit_unacknowledged(_UNACKNOWLEDGED_HEAD)
        self._limit_reads(True)
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
        """Send `request`. The Deferred fires with the response once its head is received.

        Cancelling the Deferred aborts the connection.
        """
        self._method, self._url, self._protocols = request.method, request.url, request.protocols
        self._buffer, self._interim_size = b"", 0
        self._client_connection = request.client_connection
        if request.body is not None:
            self._limit_unacknowledged(self._timeouts.send)  # which a receiver that pauses may need
        if request.logs_in:
            self._bind_to_client()
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

    def _limit_unacknowledged(self, seconds: float) -> None:
        """Make the kernel end the connection if the peer acknowledges nothing of what was sent for so many seconds.

        A request on a connection that is dead, because a router or a firewall has forgotten it, then costs less than
        the time for an answer. See TCP_USER_TIMEOUT in tcp(7).
        """
        transport, milliseconds = self.transport, min(int(seconds * 1000), 2**31 - 1)
        if isinstance(transport, SocketTransport) or ITCPTransport.providedBy(transport):
            handle: socket.socket = transport.getHandle()  # type: ignore[union-attr]
            handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        """Schedule `callback` on the connection's clock and return the delayed call."""
        return self._clock.callLater(seconds, callback)

    def abort_response(self, response: Response) -> None:
        """Abort the connection if it still receives `response`."""
        if self._response is response:
            self.abort()

    def hand_over(self, response: Response, protocol: IProtocol) -> None:
        """Attach `protocol` in place of this one, after `response` has switched protocols; see `Response.hand_over`."""
        if self._response is not response or not self._connected:
            raise UpstreamBroken(f"{self.authority}: closed the connection")
        self._response = None
        self._connected = self.alive = False
        self._read_timer.stop()
        self._limit_unacknowledged(0)  # as long as the kernel likes, because the receiver may pause
        self._owner.on_connection_lost(self)
        received, self._buffer = self._buffer, b""
        transport = self.transport
        if isinstance(transport, SocketTransport):
            transport.read_for_relay()
            transport.set_protocol(protocol)
        else:  # Twisted's, without TLS
            transport.bufferSize = READ_SIZE
            transport.protocol = protocol
            protocol.makeConnection(transport)
            transport.resumeProducing()
        if received:
            protocol.dataReceived(received)

    def abort(self) -> None:
        """Abort the connection."""
        self._fail(UpstreamBroken(f"{self.authority}: the connection was aborted"))

    def _cancel_exchange(self, _: Deferred[Response]) -> None:
        self._response_waiter = None
        self.abort()

    def _on_request_sent(self, _: None) -> None:
        self._body_writer = None
        if self._response_waiter is not None:
            self._read_timer.start()

    def _on_body_failed(self, failure: Failure) -> None:
        """Fail the exchange with the body's error, which comes from the client's side and is reported there."""
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
            self.abort()  # because unsolicited bytes could be mistaken for the next response

    def _read_head(self, data: bytes) -> None:
        searched = len(self._buffer)  # or a head of 300 KiB that arrives byte by byte would be searched 300,000 times
        self._buffer += data
        while self._response_waiter is not None:
            end = find_head_end(self._buffer, searched)
            searched = 0
            if self._interim_size + (len(self._buffer) if end is None else end[0]) > MAX_HEAD:
                self._fail(UpstreamBroken(f"{self.authority}: its response head exceeds {MAX_HEAD} bytes"))
                return
            if end is None:
                return
            raw, self._buffer = self._buffer[: end[0]], self._buffer[end[1] :]
            try:
                self._handle_head(parse_response_head(raw), len(raw), self._response_waiter)
            except ValueError as error:
                self._fail(UpstreamBroken(f"{self.authority}: {error}"))

    def _handle_head(self, head: ResponseHead, size: int, waiter: Deferred[Response]) -> None:
        if head.status == 101:
            return self._switch_protocols(head, waiter)
        if head.status < 200:  # RFC 9110, section 15.2: a client may ignore interim responses
            self._interim_size += size + 4
            return
        body_reader, stream = body_reader_for(self._method, head), ByteStream(self, limit_reads=self._limit_reads)
        response = Response(self._url, head, stream, self)
        self._body_reader, self._stream, self._response, self._response_waiter = body_reader, stream, response, None
        if response_logs_in(head.status, head.headers):
            self._bind_to_client()
        self._reusable = should_keep_alive(head) and not (self._logged_in and self._client_connection is None)
        if self._body_writer is not None and head.status >= 300:
            self._stop_sending()  # because the server refused the request and will not read the rest
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

    def _switch_protocols(self, head: ResponseHead, waiter: Deferred[Response]) -> None:
        """Stop to read HTTP. The bytes after the head are kept until the connection is handed over or aborted."""
        if not switches_as_requested(self._protocols, head.headers):
            raise ValueError("it switched protocols without a request to do so (status 101)")
        if self._body_writer is not None:  # RFC 9110, section 7.8: only after it has received the whole request
            raise ValueError("it switched protocols before it had the whole request (status 101)")
        self._response, self._response_waiter = Response(self._url, head, ByteStream(self), self), None
        self._reusable = False
        self._body_reader = BodyReader()
        self.transport.pauseProducing()
        self._read_timer.start()
        waiter.callback(self._response)

    def _bind_to_client(self) -> None:
        if not self._logged_in:
            self._logged_in = True
            self.key = bound_key(self.key, self._client_connection)

    def _read_body(self, data: bytes) -> None:
        response = self._response
        try:
            pieces = self._body_reader.feed(data)
        except ValueError as error:
            self._fail(UpstreamBroken(f"{self.authority}: {error}"))
            return
        for piece in pieces:
            self._stream.feed(piece)  # this wakes the reader, which may abort the response
        if self._body_reader.done and self._response is response:
            self._finish_response()

    def _finish_response(self) -> None:
        """Complete the response; return the connection to its owner, or close it if it cannot be reused."""
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

    def _limit_reads(self, limited: bool) -> None:
        if isinstance(self.transport, SocketTransport):
            self.transport.limit_reads(limited)
        else:  # Twisted's, without TLS
            self.transport.bufferSize = RECORD_SIZE if limited else READ_SIZE

    # IPushProducer: called by the stream

    def pauseProducing(self) -> None:
        self._read_timer.pause()
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        if self._response is not None:
            self._read_timer.start()
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        self.abort()

    # errors and closing

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._connected = self.alive = False
        if not self.ready.called:
            if self._handshake is None:
                self._fail(UpstreamUnreachable(f"{self.authority}: closed the connection", "reset"))
            else:
                self._fail(self._handshake.failure(reason))
        elif self._response_waiter is not None:
            error_type = UpstreamBroken if self._buffer or self._interim_size else ConnectionDropped
            self._fail(error_type(f"{self.authority}: closed the connection before a complete response head"))
        elif self._response is not None:
            self._end_response(reason)
        self._owner.on_connection_lost(self)

    def _end_response(self, reason: Failure) -> None:
        """End the response, given that the connection was lost by `reason`."""
        shortfall = self._body_reader.read_eof()
        if shortfall is not None:
            self._fail(ResponseCutOff(f"{self.authority}: {shortfall}"))
        elif isinstance(reason.value, ConnectionDone):
            self._finish_response()
        else:
            error_type = EndUnconfirmed if isinstance(reason.value, UnannouncedEnd) else ResponseCutOff
            self._fail(error_type(f"{self.authority}: the connection broke within a response of unknown length"))

    def _on_read_timeout(self) -> None:
        self._fail(UpstreamTimeout(f"{self.authority}: timed out, received nothing for {self._timeouts.read:g} s"))

    def _on_send_timeout(self) -> None:
        self._fail(UpstreamTimeout(f"{self.authority}: timed out, could send nothing for {self._timeouts.send:g} s"))

    def _fail(self, error: Exception) -> None:
        """Abort the connection, and fail pending operations with `error`."""
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
