"""HTTP/1.1, the server's side: requests off a transport, one after the other, each to one coroutine.

Ours and not `twisted.web.server`, for three things that a registry and a proxy need from the ground up: a request is
answered while its body still arrives (a push streams through), the same strict parser reads every head on every
port (two parsers that differ are how requests are smuggled), and CONNECT hands the transport over.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.errors import BadRequest, RegistryError
from dockerproxy.http.flow import Incoming, Outflow
from dockerproxy.http.message import (
    MAX_HEAD,
    RequestHead,
    body_framing,
    keeps_alive,
    may_become_head,
    parse_head,
    render_head,
)
from dockerproxy.http.patience import Patience, Wait
from dockerproxy.http.request import ClientGone, Fields, Request
from dockerproxy.http.stream import ByteStream
from dockerproxy.http.tls import explain_handshake
from dockerproxy.http.transport import SocketTransport

if TYPE_CHECKING:
    from dockerproxy.http.site import Site

Handler = Callable[[Request], Awaitable[None]]

_FULL = MAX_HEAD + 4  # bytes, the empty line included: with so many, there is a head or there will be none
_AT_ONCE = 32  # requests of one client that are answered before others get their turn
_LINGER = 5.0  # seconds in which a client may notice an answer that came before its request was whole

_PLAIN = [("Content-Type", "text/plain; charset=utf-8")]

log = Logger()


class _BodyOverdue(BadRequest):
    """The rest of a request's body did not come in time."""

    status = 408


class HTTPChannel(Protocol):
    """One client's connection.

    Bytes go to the body of the request under way until that is complete, then to `_buffer`; the next head is looked
    for there when the answer before it has ended and the client has taken it. So pipelined requests wait, are
    answered in order, and never make more than one answer wait in memory.

    The end has two steps, of which the first may be left out: *lingering*, in which a client that is still sending
    may notice its answer, and *closing*, in which the transport hands over what it has. From either on, nothing that
    comes is looked at.
    """

    transport: Any

    def __init__(self, site: Site, handler: Handler, *, secure: bool) -> None:
        self._site = site
        self._handler = handler
        self._buffer = b""
        self._request: Request | None = None
        self._serving: Deferred[None] | None = None
        self._incoming: Incoming | None = None
        self._outflow = Outflow(self._advance)
        self._advancing = self._due = self._held = False
        self._deaf = self._lingering = self._closing = False
        self._served = 0
        self._patience = Patience(site.rounds, self._waiting_for)
        self._began = 0.0  # when the request under way did
        self.secure = secure
        self.client = "-"
        self.port = 0

    # Protocol

    def connectionMade(self) -> None:
        client = str(getattr(self.transport.getPeer(), "host", "-"))
        # On a socket for both (systemd's), IPv4 addresses come as IPv6 (RFC 4291, section 2.5.5.2).
        self.client = client.removeprefix("::ffff:") if "." in client else client
        self.port = getattr(self.transport.getHost(), "port", 0)
        self._site.opened(self)
        self._patience.begin()
        self.transport.registerProducer(self._outflow, True)

    def dataReceived(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._incoming is not None:
            data = self._feed_body(data)
        if data:
            began = not self._buffer
            self._buffer += data
            self._advance()
            if began and self._served and self._request is None and self._buffer not in (b"", b"\r"):
                self._patience.note()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if isinstance(reason.value, SSL.Error):
            log.info("{client} broke off: {why}", client=self.client, why=explain_handshake(reason.value))
        self._deaf = True
        self._patience.end()
        request, self._request = self._request, None
        if request is not None:
            request.finished = True
            self._site.log_finished(request, self._patience.now() - self._began)
        self._outflow.fail(ClientGone())
        if self._incoming is not None:
            self._incoming.stream.fail(ClientGone())
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

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.transport.write(data)

    def offer(self, data: bytes | bytearray | memoryview) -> int:
        if isinstance(self.transport, SocketTransport):
            return self.transport.offer(data)
        self.transport.write(data)
        return len(data)

    @property
    def takes_files(self) -> bool:
        return isinstance(self.transport, SocketTransport) and self.transport.takes_files

    def offer_file(self, descriptor: int, offset: int, size: int) -> int:
        taken: int = self.transport.offer_file(descriptor, offset, size)
        return taken

    def writable(self) -> Awaitable[None]:
        return self._outflow.open()  # as it is: with each coroutine around it, a slow client costs memory

    def abort(self) -> None:
        self._deaf = True
        self.transport.abortConnection()

    def overburdened(self) -> bool:
        """Whether more of the request's body is to come than is read for the sake of the next request."""
        return self._incoming is not None and self._incoming.too_long

    def finished(self) -> None:
        """Log the request whose answer has ended, and go on to the next, or close."""
        request, self._request, self._serving = self._request, None, None
        assert request is not None
        self._served += 1
        self._patience.note()
        self._site.log_finished(request, self._patience.since - self._began)
        if self._incoming is not None:
            if self._incoming.done:
                self._incoming = None
            else:
                self._incoming.abandon(ClientGone())
        if request.closing or self._site.draining or self.overburdened():
            self._close()
        else:
            self._advance()

    def detach(self) -> tuple[Any, bytes]:
        """Leave the connection to another protocol: return its transport and the bytes not read as HTTP."""
        assert self._request is not None
        self._patience.end()
        self.transport.unregisterProducer()
        self._outflow.fail(ClientGone())
        self._request = self._serving = None
        self._deaf = True
        self._site.closed(self)
        rest, self._buffer = self._buffer, b""
        return self.transport, rest

    # heads and bodies

    def _advance(self) -> None:
        """Start the requests that are complete, until one has to be waited for."""
        if self._advancing:
            return
        self._advancing = True
        for _ in range(_AT_ONCE):
            if not self._may_begin():
                break
            head = self._take_head()
            if head is None:
                break
            self._begin(head)
        else:
            self._advance_later()
        self._advancing = False
        self._hold()

    def _may_begin(self) -> bool:
        occupied = self._request is not None or self._incoming is not None or self._outflow.closed
        return bool(self._buffer) and not occupied and not self._deaf

    def _advance_later(self) -> None:
        if not self._due:
            self._due = True
            self._site.reactor.callLater(0, self._advance_now)

    def _advance_now(self) -> None:
        self._due = False
        self._advance()

    def _hold(self) -> None:
        """Keep the client from sending more than can be made use of."""
        if not self._deaf and (len(self._buffer) >= _FULL) != self._held:
            self._held = not self._held
            if self._held:
                self.transport.pauseProducing()
            else:
                self.transport.resumeProducing()

    def _take_head(self) -> RequestHead | None:
        """Return the head at the start of the buffer, parsed, or None where it is not complete or not acceptable."""
        # RFC 9112, section 2.2: empty lines before a request are passed over. What is left of the buffer after them is
        # what counts as having come.
        start = 0
        while self._buffer.startswith(b"\r\n", start):
            start += 2
        buffer = self._buffer = self._buffer[start:]
        end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        try:
            if end >= 0:
                self._buffer = buffer[end + 4 :]
                return parse_head(buffer[:end])
            if len(buffer) >= _FULL:
                raise BadRequest(f"the request's head is longer than {MAX_HEAD} bytes")
            if not may_become_head(buffer):
                raise BadRequest("this is not HTTP")
        except BadRequest as error:
            self._refuse(error.status, error.message)
        return None

    def _begin(self, head: RequestHead) -> None:
        framing = 0 if head.method == "CONNECT" else body_framing(head)
        stream = None
        if framing != 0:
            stream = ByteStream(self.transport)
            self._incoming = Incoming(stream, framing)
        request = self._request = Request(self, head, stream)
        request.closing = self._site.draining or not keeps_alive(head)
        self._began = self._patience.now()
        if self._incoming is not None:
            rest, self._buffer = self._buffer, b""
            self._hold()  # from here on, the body's stream has the say over that
            self._buffer = self._feed_body(rest) if rest else b""
        serving = Deferred.fromCoroutine(self._serve(request))
        if not serving.called and self._request is request:
            self._serving = serving

    async def _serve(self, request: Request) -> None:
        try:
            await self._handler(request)
        except ClientGone:
            request.abort()
        except RegistryError as error:
            self._give_up(request, error.status, error.message, error.headers)
        except Exception as error:
            if isinstance(error, CancelledError) and request.finished:
                return  # by us
            log.failure("{method} {path} failed", method=request.method, path=request.path)
            self._give_up(request, 500, "internal error")
        else:
            if not request.finished:
                log.error("{method} {path} was left without an answer", method=request.method, path=request.path)
                self._give_up(request, 500, "internal error")

    def _give_up(self, request: Request, status: int, why: str, fields: Fields = ()) -> None:
        """Say that the request failed, by an answer where none was begun, else by breaking off."""
        if request.started:
            request.abort()
        elif not request.finished:
            request.closing = True
            request.answer(status, [*_PLAIN, *fields], f"{why}\n".encode())

    def _feed_body(self, data: bytes) -> bytes:
        """Give `data` to the body under way; return what lies beyond its end."""
        incoming = self._incoming
        assert incoming is not None
        try:
            rest = incoming.feed(data)
        except BadRequest as error:
            # Where the next request would begin, nobody knows.
            self._incoming = None
            self._deaf = True
            if self._request is None:
                self._close()
            else:
                self._request.closing = True
                incoming.stream.fail(error)
            return b""
        if incoming.done:
            self._incoming = None
            if self._request is None:
                self._patience.note()
        elif incoming.abandoned and incoming.too_long:
            self._close()
        return rest

    def _refuse(self, status: int, why: str) -> None:
        """Answer what is no request, and close."""
        body = f"{why}\n".encode()
        fields = [*_PLAIN, ("Content-Length", str(len(body))), ("Connection", "close")]
        self.write(render_head(status, fields) + body)
        log.info("{client} sent no acceptable request: {why}", client=self.client, why=why)
        self._linger()

    # the end

    def _close(self) -> None:
        """Close; where the client is still sending, let it first see the answer (RFC 9112, section 9.6)."""
        if self._lingering or self._closing:
            return
        if self._incoming is not None or self._deaf:
            self._linger()
        else:
            self._lose()

    def _linger(self) -> None:
        self._deaf = self._lingering = True
        self._buffer = b""
        if self._incoming is not None:
            self._incoming.abandon(ClientGone())
            self._incoming = None
        self._patience.note()
        self._patience.look_in(_LINGER)
        self.transport.resumeProducing()

    def _lose(self) -> None:
        self._deaf = self._closing = True
        self._buffer = b""
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # time

    def _waiting_for(self) -> Wait:
        timeouts, waited = self._site.timeouts, self._patience
        if self._lingering and not self._closing:
            return Wait(_LINGER, waited.since, self._lose)
        if self._closing or self._outflow.closed:
            sent = getattr(self.transport, "sent", 0)
            return Wait(timeouts.send, waited.unmoved_since(("sent", sent)), self.abort)
        if self._incoming is not None and self._incoming.stream.starved:
            waits = self._incoming.stream.waits
            return Wait(timeouts.body, waited.unmoved_since(("body", waits)), self._body_overdue)
        if self._request is not None:
            return Wait(math.inf, 0.0, self.abort)  # it is not the client who keeps us waiting
        if self._incoming is not None:
            return Wait(timeouts.body, waited.since, self._lose)
        if self._buffer:
            return Wait(timeouts.header, waited.since, self._head_overdue)
        return Wait(timeouts.keepalive if self._served else timeouts.header, waited.since, self._lose)

    def _head_overdue(self) -> None:
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request's head took too long")

    def _body_overdue(self) -> None:
        assert self._request is not None and self._incoming is not None
        self._request.closing = True
        self._incoming.stream.fail(_BodyOverdue("the request's body took too long"))
