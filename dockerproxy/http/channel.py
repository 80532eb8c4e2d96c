"""The server side of HTTP/1.1: parse requests from a transport and run one handler coroutine per request.

`twisted.web.server` is not used because a registry and a proxy need three things that it lacks:

- A handler can respond while the request body still arrives, so a push streams through.
- One strict parser reads every request head on every port. Request smuggling exploits two parsers that disagree.
- A handler of CONNECT can detach the transport from HTTP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.concurrency import current_client
from dockerproxy.errors import BadRequest, RegistryError
from dockerproxy.http.connection_state import READS_INPUT, next_state
from dockerproxy.http.connection_state import ConnectionEvent as Event
from dockerproxy.http.connection_state import ConnectionState as State
from dockerproxy.http.flow_control import FlowControl, RequestBody
from dockerproxy.http.message import (
    MAX_HEAD,
    RequestHead,
    body_framing,
    keeps_alive,
    may_become_head,
    parse_head,
    reason_phrase,
    render_head,
)
from dockerproxy.http.request import PLAIN_TEXT, ClientDisconnected, Fields, Request, respond_text_error
from dockerproxy.http.security_fields import SECURITY_FIELDS
from dockerproxy.http.stream import ByteStream, ClientBuffers
from dockerproxy.http.timeouts import ConnectionTimer, Deadline
from dockerproxy.http.tls import describe_handshake_error, refuses_certificate

if TYPE_CHECKING:
    from dockerproxy.http.site import Site

Handler = Callable[[Request], Awaitable[None]]

# Bytes, including the empty line that ends a head. A full buffer holds a complete head, or its head is too long.
_MAX_BUFFERED = MAX_HEAD + 4
_SHORT_HEAD = 4 * 1024  # bytes
_REQUESTS_PER_ITERATION = 32  # requests of one client per reactor iteration, so that other clients are served too
_LINGER_TIMEOUT = 5.0  # seconds for a client to read a response that was sent before its request was complete

_channel_numbers = itertools.count()

log = Logger()


class _BodyTimeout(BadRequest):
    """The client stopped sending the request body."""

    status = 408


class HTTPChannel(Protocol):
    """One client connection.

    Input goes to the body of the current request until that is complete, and then to `_buffer`. The next head is
    parsed only after the previous response has ended and the client has read it. Pipelined requests are therefore
    handled in order, and at most one response is buffered in memory. `connection_state` has the states of a connection
    and what each does.
    """

    transport: Any

    def __init__(self, site: Site, handler: Handler, *, secure: bool) -> None:
        self._site = site
        self._handler = handler
        self._buffer = b""
        self._counted_buffer = 0  # bytes of it in the budget of the site
        self._request: Request | None = None
        self._handler_task: Deferred[None] | None = None
        self._body: RequestBody | None = None
        self._flow_control = FlowControl(self._process_buffer)
        self._state = State.READING_HEAD
        self._processing = False  # whether buffered requests are being started, or that is scheduled
        self._reading_paused = False  # because the buffer is full
        self._request_count = 0
        self._timer = ConnectionTimer(site.timeout_reaper, self._current_deadline)
        self._request_started_at = 0.0  # of the current request, in the reactor's time
        self.secure = secure
        self.client = "-"
        self.port = 0
        self.number = next(_channel_numbers)

    # Protocol

    def connectionMade(self) -> None:
        client = str(getattr(self.transport.getPeer(), "host", "-"))
        # A dual-stack socket (from systemd) reports IPv4 addresses as IPv6 (RFC 4291, section 2.5.5.2).
        self.client = client.removeprefix("::ffff:") if "." in client else client
        self.port = getattr(self.transport.getHost(), "port", 0)
        self._site.channel_opened(self)
        self._timer.start()
        self.transport.limit_reads(True)  # heads are short, and a long piece would be in memory before its body counts
        self.transport.registerProducer(self._flow_control, True)

    def dataReceived(self, data: bytes) -> None:
        if self._state not in READS_INPUT:
            return
        if self._body is not None:
            data = self._feed_body(self._body, data)
        if data:
            was_empty = not self._buffer
            self._buffer += data
            self._process_buffer()
            if was_empty and self._request_count and self._request is None and self._buffer not in (b"", b"\r"):
                self._timer.restart()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if isinstance(reason.value, SSL.Error | OSError):
            log.info(
                "TLS connection from {client} failed: {reason}",
                client=self.client,
                reason=describe_handshake_error(reason.value),
            )
            if refuses_certificate(reason.value):
                self._site.on_certificate_refused(self.client)
        self._on_event(Event.LOST)
        self._buffer = b""
        self._count_buffer()
        self._timer.stop()
        request, self._request = self._request, None
        if request is not None:
            request.finished = True
            self._site.on_request_finished(request, self._timer.now() - self._request_started_at)
        self._flow_control.fail(ClientDisconnected())
        if self._body is not None:
            self._body.stream.fail(ClientDisconnected())
        handler_task, self._handler_task = self._handler_task, None
        if handler_task is not None:
            handler_task.cancel()  # work shared with other requests continues: SingleFlight does not pass this on
        self._site.channel_closed(self)

    @property
    def idle(self) -> bool:
        """Whether there is no request, or only a part of its head."""
        return self._state is State.READING_HEAD

    @property
    def idle_since(self) -> float:
        """The reactor's time at which the connection became idle, or the request head began."""
        return self._timer.started_at

    def shutdown(self) -> None:
        """Close after the current response, or now if there is none."""
        if self._request is None:
            self._on_event(Event.CLOSE)
        else:
            self._request.closing = True

    # RequestChannel

    @property
    def peer_uid(self) -> int | None:
        uid: int | None = self.transport.peer_uid
        return uid

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.transport.write(data)

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        written: int = self.transport.write_some(data)
        return written

    @property
    def can_sendfile(self) -> bool:
        return bool(self.transport.can_sendfile)

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        sent: int = self.transport.sendfile(descriptor, offset, size)
        return sent

    @property
    def response_buffers(self) -> ClientBuffers:
        return self._site.budgets.responses.of_client(self.client)

    def drain(self) -> Awaitable[None]:
        return self._flow_control.drain()  # no `async def`: every coroutine around it costs memory per slow client

    def abort(self) -> None:
        self._on_event(Event.LOST)
        self.transport.abortConnection()

    def exceeds_discard_limit(self) -> bool:
        """Whether the rest of the request body is too long to discard in order to reuse the connection."""
        return self._body is not None and self._body.exceeds_discard_limit

    def on_response_started(self) -> None:
        """Note how long the client waited for the head of a response that is not sent in one piece."""
        if self._request is not None:
            self._request.latency = self._timer.now() - self._request_started_at

    def on_response_finished(self) -> None:
        """Log the request whose response has ended, then process the next request or close."""
        request, self._request, self._handler_task = self._request, None, None
        if request is None:
            raise RuntimeError("there is no response that could end")
        request.drop_body()
        self._request_count += 1
        self._timer.restart()
        seconds = self._timer.started_at - self._request_started_at
        if request.latency is None and request.started:  # the response was sent in one piece
            request.latency = seconds
        self._site.on_request_finished(request, seconds)
        if self._body is not None:
            if self._body.done:
                self._body = None
            else:
                self._body.discard(ClientDisconnected())
        self._on_event(Event.RESPONSE_END if self._body is None else Event.EARLY_RESPONSE_END)
        if request.closing or self._site.draining or self.exceeds_discard_limit():
            self._on_event(Event.CLOSE)
        else:
            self._process_buffer()

    def detach(self) -> tuple[Any, bytes]:
        """Stop using the transport; return it together with the bytes received after the request head."""
        self._on_event(Event.DETACH)
        self._timer.stop()
        self.transport.read_for_relay()
        self.transport.unregisterProducer()
        self._flow_control.fail(ClientDisconnected())
        self._request = self._handler_task = None
        self._site.channel_closed(self)
        rest, self._buffer = self._buffer, b""
        self._count_buffer()
        return self.transport, rest

    # Heads and bodies

    def _process_buffer(self) -> None:
        """Start the buffered requests until one is incomplete or its response is pending."""
        if not self._processing:
            self._processing = True
            self._start_buffered_requests()

    def _start_buffered_requests(self) -> None:
        for _ in range(_REQUESTS_PER_ITERATION):
            head = self._parse_next_head() if self._can_start_request() else None
            if head is None:
                self._processing = False
                break
            self._start_request(head)
        else:
            self._site.reactor.callLater(0, self._start_buffered_requests)
        self._apply_back_pressure()
        self._count_buffer()

    def _can_start_request(self) -> bool:
        return self._state is State.READING_HEAD and bool(self._buffer) and not self._flow_control.paused

    def _apply_back_pressure(self) -> None:
        """Pause reading while the buffer is full, and resume it afterwards."""
        if self._state in READS_INPUT and (len(self._buffer) >= _MAX_BUFFERED) != self._reading_paused:
            self._reading_paused = not self._reading_paused
            if self._reading_paused:
                self.transport.pauseProducing()
            else:
                self.transport.resumeProducing()

    def _count_buffer(self) -> None:
        """Count a long part of a head among the bytes of unread requests. Refuse it if they take too much memory."""
        size = len(self._buffer) if len(self._buffer) > _SHORT_HEAD else 0
        if size == self._counted_buffer:
            return
        buffers = self._site.budgets.requests.of_client(self.client)
        if self._counted_buffer:
            buffers.release(self._counted_buffer)
        self._counted_buffer = size
        if size:
            buffers.add(size)
            if buffers.scarce and self._state is State.READING_HEAD:
                error = buffers.refusal()
                self._refuse(error.status, error.message, error.headers)

    def _parse_next_head(self) -> RequestHead | None:
        """Parse and return the head at the start of the buffer, or None if it is incomplete or was refused."""
        # RFC 9112, section 2.2: ignore empty lines before a request. They are removed from the buffer, because a
        # non-empty buffer counts as the start of a request.
        start = 0
        while self._buffer.startswith(b"\r\n", start):
            start += 2
        buffer = self._buffer = self._buffer[start:]
        end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        try:
            if end >= 0:
                self._buffer = buffer[end + 4 :]
                return parse_head(buffer[:end])
            if len(buffer) >= _MAX_BUFFERED:
                raise BadRequest(f"the request head is longer than {MAX_HEAD} bytes")
            if not may_become_head(buffer):
                raise BadRequest("this is not an HTTP request")
        except BadRequest as error:
            self._refuse(error.status, error.message)
        return None

    def _start_request(self, head: RequestHead) -> None:
        framing = 0 if head.method == "CONNECT" else body_framing(head)
        rest, stream = b"", None
        if framing != 0:
            rest, self._buffer = self._buffer, b""
            self._apply_back_pressure()  # with an empty buffer: from here on the body's stream pauses the transport
            buffers = self._site.budgets.requests.of_client(self.client)
            stream = ByteStream(self.transport, buffers=buffers, limit_reads=self.transport.limit_reads)
            self._body = RequestBody(stream, framing)
        self._on_event(Event.REQUEST)
        request = self._request = Request(self, head, stream)
        request.closing = self._site.draining or not keeps_alive(head)
        self._request_started_at = self._timer.now()
        if self._body is not None and rest:
            self._buffer = self._feed_body(self._body, rest)
        token = current_client.set(self.client)  # for the handler, whose context is a copy of this one
        handler_task = Deferred.fromCoroutine(self._run_handler(request))
        current_client.reset(token)
        if not handler_task.called and self._request is request:
            self._handler_task = handler_task

    async def _run_handler(self, request: Request) -> None:
        try:
            await self._handler(request)
            if not request.finished:
                raise RuntimeError("the handler returned without a complete response")
        except ClientDisconnected:
            request.abort()
        except Exception as error:
            if isinstance(error, CancelledError) and request.finished:
                return  # cancelled by `connectionLost`
            self._handle_error(request, error)

    def _handle_error(self, request: Request, error: Exception) -> None:
        """Respond with the error of a handler, or abort if the response has started. Do nothing if it has ended.

        This is the only place that turns an error of a handler into a response. It logs an unexpected error, which
        becomes a 500 that tells the client nothing about it.
        """
        if not isinstance(error, RegistryError):
            log.failure("{method} {path} failed", method=request.method, path=request.path)
            request.closing = True
            error = RegistryError("internal error")
        request.set_error(error)
        if request.started:
            request.abort()
        elif not request.finished:
            try:
                request.error_renderer(request, error)
            except Exception as rendering_error:
                request.error_renderer = respond_text_error
                self._handle_error(request, rendering_error)

    def _feed_body(self, body: RequestBody, data: bytes) -> bytes:
        """Pass `data` to the current request body and return the bytes after its end."""
        try:
            rest = body.feed(data)
        except BadRequest as error:
            self._body = None
            if self._request is not None:
                self._request.closing = True
            self._on_event(Event.INVALID_INPUT)
            body.stream.fail(error)
            return b""
        if body.done:
            self._body = None
            if self._state is State.DISCARDING_BODY:
                self._timer.restart()
                self._on_event(Event.BODY_END)
        elif body.discarding and body.exceeds_discard_limit:
            self._on_event(Event.CLOSE)
        return rest

    def _refuse(self, status: int, reason: str, fields: Fields = ()) -> None:
        """Respond to invalid input with `status`, `reason` and `fields`, then close."""
        body = f"{reason}\n".encode()
        fields = [PLAIN_TEXT, ("Content-Length", str(len(body))), *fields, ("Connection", "close")]
        self.write(render_head(status, fields, SECURITY_FIELDS, reason=reason_phrase(reason)) + body)
        log.info("refused a request from {client}: {reason}", client=self.client, reason=reason)
        self._on_event(Event.INVALID_INPUT)

    # State

    def _on_event(self, event: Event) -> None:
        previous, self._state = self._state, next_state(self._state, event)
        if self._state is State.LINGERING and previous is not State.LINGERING:
            self._start_lingering()
        elif self._state is State.CLOSING and previous is not State.CLOSING:
            self._start_closing()

    def _start_lingering(self) -> None:
        self._buffer = b""
        self._count_buffer()
        if self._body is not None:
            self._body.discard(ClientDisconnected())
            self._body = None
        self._timer.restart()
        self._timer.check_in(_LINGER_TIMEOUT)
        self.transport.resumeProducing()

    def _start_closing(self) -> None:
        self._buffer = b""
        self._count_buffer()
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # Timeouts

    def _current_deadline(self) -> Deadline:
        timeouts, timer = self._site.timeouts, self._timer
        if self._state is State.LINGERING:
            return Deadline(_LINGER_TIMEOUT, timer.started_at, self._give_up)
        if self._state is State.CLOSING or self._flow_control.paused:
            sent = self.transport.acknowledged
            return timer.progress_deadline(
                "sent", sent, timeouts.send, self.abort, timeouts.min_rate, self._on_slow_reader
            )
        if self._body is not None and self._body.stream.starved:
            received, of = self._body.stream.received, ("body", self._request_count)
            return timer.progress_deadline(
                of, received, timeouts.body, self._on_body_timeout, timeouts.min_rate, self._on_slow_body
            )
        if self._state is State.DISCARDING_BODY:
            return Deadline(timeouts.body, timer.started_at, self._give_up)
        if self._state is State.READING_HEAD:
            if self._buffer:
                return Deadline(timeouts.header, timer.started_at, self._on_header_timeout)
            seconds = timeouts.keepalive if self._request_count else timeouts.header
            return Deadline(seconds, timer.started_at, self._give_up)
        return Deadline(math.inf, 0.0, self.abort)  # the handler is working; the client has nothing to do

    def _give_up(self) -> None:
        self._on_event(Event.GIVE_UP)

    def _on_header_timeout(self) -> None:
        seconds = self._site.timeouts.header
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request head was not complete within {seconds:g} seconds")

    def _on_body_timeout(self) -> None:
        seconds = self._site.timeouts.body
        self._fail_body(f"no more of the request body arrived within {seconds:g} seconds")

    def _on_slow_body(self) -> None:
        rate = self._site.timeouts.min_rate
        self._fail_body(f"the request body arrived at less than {rate:g} bytes a second (CLIENT_MIN_RATE)")

    def _fail_body(self, reason: str) -> None:
        if self._request is None or self._body is None:
            raise RuntimeError("no handler waits for a request body")
        self._request.closing = True
        self._body.stream.fail(_BodyTimeout(reason))

    def _on_slow_reader(self) -> None:
        log.info(
            "closed a connection of {client}: it read less than {rate:g} bytes a second (CLIENT_MIN_RATE)",
            client=self.client,
            rate=self._site.timeouts.min_rate,
        )
        self.abort()
