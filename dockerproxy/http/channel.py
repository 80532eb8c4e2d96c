"""HTTP/1.1, the server's side: requests off a transport, one after the other, each to one coroutine.

Ours and not `twisted.web.server`, for three things that a registry and a proxy need from the ground up: a request is
answered while its body still arrives (a push streams through), the same strict parser reads every head on every
port (two parsers that differ are how requests are smuggled), and CONNECT hands the transport over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from attrs import frozen
from OpenSSL import SSL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.errors import BadRequest, RegistryError
from dockerproxy.http.message import MAX_HEAD, ChunkedDecoder, body_framing, keeps_alive, parse_head
from dockerproxy.http.request import ClientGone, Request
from dockerproxy.http.stream import ByteStream
from dockerproxy.http.transport import SocketTransport, TLSTransport

Handler = Callable[[Request], Awaitable[None]]

_MAX_DISCARDED = 256 * 1024  # of a body that nobody reads, before the connection is given up instead
_LINGER = 5.0  # seconds in which a client may notice an answer that came before its request was whole

log = Logger()


@frozen
class Timeouts:
    """Seconds that a client may keep us waiting: between requests, for a head, for more of a body, to take bytes."""

    keepalive: float = 300
    header: float = 60
    body: float = 60
    send: float = 60


class Site(Factory):
    """Makes the channels of one door; `handler` answers their requests.

    `finished` is called with each request and its seconds when its answer has ended: for the access log.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        handler: Handler,
        *,
        timeouts: Timeouts,
        finished: Callable[[Request, float], None],
        tls: Callable[[], SSL.Context] | None = None,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.timeouts = timeouts
        self.log_finished = finished
        self.draining = False
        self._tls = tls
        self._channels: set[HTTPChannel] = set()
        self._drained: list[Deferred[None]] = []

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _Acceptor(self)

    def accept(self, tcp: Any) -> None:
        """Serve a connection that Twisted accepted."""
        channel = HTTPChannel(self, self.handler, secure=self._tls is not None)
        if self._tls is None:
            SocketTransport(self.reactor, tcp).start(channel)
        else:
            TLSTransport(self.reactor, tcp, self._tls()).start(channel)

    def opened(self, channel: HTTPChannel) -> None:
        self._channels.add(channel)

    def closed(self, channel: HTTPChannel) -> None:
        self._channels.discard(channel)
        if not self._channels:
            waiting, self._drained = self._drained, []
            for deferred in waiting:
                deferred.callback(None)

    def drain(self) -> Deferred[None]:
        """Close idle connections and let the others end with their answer; fires when none is left."""
        self.draining = True
        for channel in list(self._channels):
            channel.retire()
        done: Deferred[None] = Deferred()
        if self._channels:
            self._drained.append(done)
        else:
            done.callback(None)
        return done

    def abort(self) -> int:
        """Break off the connections that are left; return how many."""
        channels = list(self._channels)
        for channel in channels:
            channel.abort()
        return len(channels)


class _Acceptor(Protocol):
    """Takes a new connection from Twisted and hands it to the site."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def connectionMade(self) -> None:
        self._site.accept(self.transport)


class HTTPChannel(Protocol):
    """One client's connection.

    Bytes go to the body of the request under way until that is complete, then to `_buffer`; the next head is looked
    for there when the answer before it has ended. So pipelined requests wait, and are answered in order.
    """

    transport: Any

    def __init__(self, site: Site, handler: Handler, *, secure: bool) -> None:
        self._site = site
        self._handler = handler
        self._buffer = b""
        self._request: Request | None = None
        self._serving: Deferred[None] | None = None
        self._incoming: _Incoming | None = None
        self._outflow = _Outflow()
        self._advancing = self._held = self._lingering = False
        self._discarded = 0
        self._timer: Any = None
        self._since = 0.0  # when the connection began to wait for a head, or last got bytes of a body
        self._progress = (0, 0.0)  # what was sent, and when that was last seen to grow
        self._began = 0.0
        self.secure = secure
        self.client = "-"

    # Protocol

    def connectionMade(self) -> None:
        self.client = str(getattr(self.transport.getPeer(), "host", "-"))
        self.transport.registerProducer(self._outflow, True)
        self._site.opened(self)
        self._since = self._now()
        self._timer = self._site.reactor.callLater(self._site.timeouts.header, self._check_time)

    def dataReceived(self, data: bytes) -> None:
        if self._lingering:
            self._discard(len(data))
            return
        if self._incoming is not None:
            data = self._feed_body(data)
        if not data:
            return
        if self._request is None and not self._buffer:
            self._since = self._now()
        self._buffer += data
        if self._request is None:
            self._advance()
        elif len(self._buffer) > MAX_HEAD and not self._held:
            self._held = True
            self.transport.pauseProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._stop_timer()
        self._outflow.fail(ClientGone())
        if self._incoming is not None:
            self._incoming.stream.fail(ClientGone())
        request, self._request = self._request, None
        if request is not None:
            request.finished = True
            self._site.log_finished(request, self._now() - self._began)
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.cancel()  # the coroutine's wait ends; what others share goes on (it is never ours to cancel)
        self._site.closed(self)

    def retire(self) -> None:
        """Close when the answer under way has ended, or now where there is none."""
        if self._request is None:
            self._close()
        else:
            self._request.closing = True

    # what a request does with its connection

    def write(self, data: bytes | bytearray) -> None:
        self.transport.write(data)

    async def writable(self) -> None:
        await self._outflow.open()

    def abort(self) -> None:
        self.transport.abortConnection()

    def finished(self) -> None:
        """Log the request whose answer has ended, and go on to the next, or close."""
        request, self._request = self._request, None
        assert request is not None
        self._since = self._now()
        self._site.log_finished(request, self._since - self._began)
        if request.closing or self._site.draining:
            self._close()
            return
        if self._incoming is not None:
            self._incoming.abandon()
        elif self._held:
            self._held = False
            self.transport.resumeProducing()
        self._advance()

    def detach(self) -> tuple[Any, bytes]:
        """Leave the connection to another protocol: return its transport and the bytes not read as HTTP."""
        assert self._request is not None
        self._stop_timer()
        self.transport.unregisterProducer()
        self._request = self._serving = None
        self._site.closed(self)
        rest, self._buffer = self._buffer, b""
        return self.transport, rest

    # heads and bodies

    def _advance(self) -> None:
        """Start the requests that are complete, until one has to be waited for."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._request is None and self._incoming is None and self._buffer and not self._lingering:
                head = self._take_head()
                if head is None:
                    return
                self._begin(head)
        finally:
            self._advancing = False

    def _take_head(self) -> Any:
        """Return the head at the start of the buffer, parsed, or None where it is not complete or not acceptable."""
        buffer = self._buffer.removeprefix(b"\r\n")  # RFC 9112, section 2.2
        end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        try:
            if end >= 0:
                self._buffer = buffer[end + 4 :]
                return parse_head(buffer[:end])
            if len(buffer) > MAX_HEAD:
                raise BadRequest(f"the request's head is longer than {MAX_HEAD} bytes")
            if buffer and not buffer[:1].isalpha():
                raise BadRequest("this is not HTTP")
        except RegistryError as error:
            self._refuse(error)
        return None

    def _begin(self, head: Any) -> None:
        framing = 0 if head.method == "CONNECT" else body_framing(head)
        stream = None
        if framing != 0:
            stream = ByteStream(self.transport)
            self._incoming = _Incoming(stream, framing)
        request = self._request = Request(self, head, stream)
        request.closing = self._site.draining or not keeps_alive(head)
        self._began = self._since = self._now()
        self._progress = (0, self._began)
        if self._incoming is not None:
            rest, self._buffer = self._buffer, b""
            self._buffer = self._feed_body(rest)
        serving = Deferred.fromCoroutine(self._serve(request))
        if not serving.called and self._request is request:
            self._serving = serving

    async def _serve(self, request: Request) -> None:
        try:
            await self._handler(request)
        except (ClientGone, CancelledError):
            request.abort()
        except Exception:
            log.failure("{method} {path} failed", method=request.method, path=request.path)
            if request.started:
                request.abort()
            else:
                request.closing = True
                request.answer(500, [("Content-Type", "text/plain")], b"internal error\n")
        else:
            if not request.finished:
                log.error("{method} {path} was left without an answer", method=request.method, path=request.path)
                request.abort()

    def _feed_body(self, data: bytes) -> bytes:
        """Give `data` to the body under way; return what lies beyond its end."""
        incoming = self._incoming
        assert incoming is not None
        self._since = self._now()
        try:
            rest = incoming.feed(data)
        except BadRequest as error:
            incoming.stream.fail(error)
            self._incoming = None
            if self._request is not None:
                self._request.closing = True
            self._lingering = True
            return b""
        if incoming.abandoned:
            self._discard(len(data))
        if incoming.done:
            self._incoming = None
            if self._request is None and not self._lingering:
                self._since = self._now()
        return rest

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MAX_DISCARDED:
            if self._lingering:
                self._lose()
            else:
                self._close()

    def _refuse(self, error: RegistryError) -> None:
        """Answer what is no request, and close."""
        body = f"{error.message}\n".encode()
        self.write(
            b"HTTP/1.1 %d Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%b" % (error.status, len(body), body)
        )
        log.info("{client} sent no acceptable request: {why}", client=self.client, why=error.message)
        self._buffer = b""
        self._linger()

    # the end

    def _close(self) -> None:
        """Close; where the client is still sending, let it first see the answer (RFC 9112, section 9.6)."""
        if self._incoming is not None:
            self._incoming.abandon()
            self._linger()
        elif not self._lingering:
            self._lose()

    def _linger(self) -> None:
        if not self._lingering:
            self._lingering = True
            self._discarded = 0
            self._stop_timer()
            self._timer = self._site.reactor.callLater(_LINGER, self._lose)
            self.transport.resumeProducing()

    def _lose(self) -> None:
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # time

    def _now(self) -> float:
        now: float = self._site.reactor.seconds()
        return now

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _check_time(self) -> None:
        """End what has waited too long; come again when the next thing could have."""
        now = self._now()
        limit, since, expired = self._waiting_for()
        remaining = limit - (now - since)
        if remaining > 0:
            self._timer = self._site.reactor.callLater(remaining, self._check_time)
        else:
            self._timer = None
            expired()

    def _waiting_for(self) -> tuple[float, float, Callable[[], None]]:
        """Return the limit that holds now, since when, and what to do when it is over."""
        timeouts = self._site.timeouts
        if self._request is None and self._incoming is None:
            if self._buffer:
                return timeouts.header, self._since, self._head_overdue
            return timeouts.keepalive, self._since, self._lose
        if self._outflow.closed:
            sent = getattr(self.transport, "sent", 0)
            if sent != self._progress[0]:
                self._progress = (sent, self._now())
            return timeouts.send, self._progress[1], self.abort
        self._progress = (self._progress[0], self._now())
        if self._incoming is not None and (self._incoming.stream.starved or self._incoming.abandoned):
            return timeouts.body, self._since, self._body_overdue
        return min(timeouts.body, timeouts.send), self._now(), self.abort

    def _head_overdue(self) -> None:
        self._refuse(BadRequest("the request's head took too long"))

    def _body_overdue(self) -> None:
        if self._incoming is not None and self._request is not None:
            self._request.closing = True
            self._incoming.stream.fail(ClientGone())
        else:
            self._lose()


class _Incoming:
    """The body of the request under way: `framing` is its length in bytes, or None for the chunked coding."""

    def __init__(self, stream: ByteStream, framing: int | None) -> None:
        self.stream = stream
        self.done = False
        self.abandoned = False
        self._remaining = framing
        self._decoder = ChunkedDecoder() if framing is None else None

    def feed(self, data: bytes) -> bytes:
        """Pass on what belongs to the body; return the rest."""
        if self._decoder is not None:
            for piece in self._decoder.feed(data):
                self._pass_on(piece)
            if not self._decoder.done:
                return b""
            rest = self._decoder.rest
        else:
            assert self._remaining is not None
            mine, rest = data[: self._remaining], data[self._remaining :]
            self._remaining -= len(mine)
            self._pass_on(mine)
            if self._remaining:
                return b""
        self.done = True
        self.stream.finish()
        return rest

    def abandon(self) -> None:
        """Throw away what still comes: nobody reads it."""
        self.abandoned = True
        self.stream.release()

    def _pass_on(self, piece: bytes) -> None:
        if piece and not self.abandoned:
            self.stream.feed(piece)


@implementer(IPushProducer)
class _Outflow:
    """Whether the transport takes more: what a transport tells a push producer, made awaitable."""

    def __init__(self) -> None:
        self.closed = False
        self._failure: BaseException | None = None
        self._waiter: Deferred[None] | None = None

    async def open(self) -> None:
        """Wait until the transport wants bytes; raise what `fail` was given."""
        if self._failure is not None:
            raise self._failure
        if self.closed:
            self._waiter = Deferred()
            await self._waiter

    def fail(self, error: BaseException) -> None:
        self._failure = error
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.errback(error)

    def pauseProducing(self) -> None:
        self.closed = True

    def resumeProducing(self) -> None:
        self.closed = False
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    def stopProducing(self) -> None:
        self.closed = False
