"""Forwarding of a request to another server and of its response to the client. Both bodies are streamed.

If the two agree on another protocol (status 101), their connections become a tunnel.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IConsumer, IProtocol
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from dockerproxy.errors import EndUnconfirmed
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import body_framing, render_head
from dockerproxy.http.request import Request
from dockerproxy.http.stream import ClientBuffers
from dockerproxy.http.tunnel import Tunnels


class ForwardedResponse(Protocol):
    """Another server's response, with an unread body."""

    status: int
    headers: Headers

    @property
    def length(self) -> int | None:
        """The Content-Length (in a response to HEAD, the one that GET would have), or None if it has none."""

    def count_for(self, buffers: ClientBuffers) -> None:
        """Count what is buffered of the body among `buffers`, which may limit it."""

    async def read_chunk(self) -> bytes: ...

    def abort(self) -> None: ...


class SwitchableResponse(ForwardedResponse, Protocol):
    """Another server's response. Its status may be 101 if the request had Upgrade."""

    def hand_over(self, protocol: IProtocol) -> None:
        """Attach `protocol` to the connection, which no longer speaks HTTP. Raise `UpstreamBroken` if it is closed."""


def request_body_producer(request: Request) -> RequestBodyProducer | None:
    """Return a producer that sends the body of `request` to another server, or None if there is no body."""
    return RequestBodyProducer(request) if request.has_body else None


@implementer(IBodyProducer)
class RequestBodyProducer:
    """A producer that forwards a request body as it arrives. It pauses the client while the other server is slow."""

    def __init__(self, request: Request) -> None:
        framing = body_framing(request.head)
        self.length: Any = UNKNOWN_LENGTH if framing is None else framing
        self._request = request
        self._resume_waiter: Deferred[None] | None = None
        self._produce_task: Deferred[None] | None = None
        self._stopped = False

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self._produce_task = Deferred.fromCoroutine(self._produce(consumer))
        # Return a separate Deferred because cancelling the returned one must not cancel the coroutine.
        done: Deferred[None] = Deferred()
        self._produce_task.addCallbacks(
            done.callback, lambda failure: None if failure.check(CancelledError) else done.errback(failure)
        )
        return done

    async def _produce(self, consumer: IConsumer) -> None:
        while data := await self._request.read_chunk():
            consumer.write(data)
            del data  # while the client sends nothing, it takes no memory
            if self._resume_waiter is not None:
                await self._resume_waiter
            if self._stopped:  # `write` called stopProducing, when the coroutine waited for nothing it could cancel
                raise CancelledError

    def pauseProducing(self) -> None:
        if self._resume_waiter is None:
            self._resume_waiter = Deferred()

    def resumeProducing(self) -> None:
        waiter, self._resume_waiter = self._resume_waiter, None
        if waiter is not None:
            waiter.callback(None)

    def stopProducing(self) -> None:
        self._stopped = True
        if self._produce_task is not None:
            self._produce_task.cancel()


async def forward_response(request: Request, response: ForwardedResponse, fields: Iterable[tuple[str, str]]) -> None:
    """Respond to `request` with the status and body of `response` and with the header fields `fields`.

    The bytes that wait for the client count for it: each connection of it would otherwise take a MiB.
    """
    response.count_for(request.response_buffers)
    try:
        request.start(response.status, fields, response.length)
        with suppress(EndUnconfirmed):  # the client would take it for the end, too
            while data := await response.read_chunk():
                request.write(data)
                del data
                await request.drain()
        request.finish()
    except BaseException:
        response.abort()
        raise


async def switch_protocols(
    request: Request, response: SwitchableResponse, fields: Iterable[tuple[str, str]], tunnels: Tunnels
) -> None:
    """Respond to `request` with `response`, whose status is 101, and make the two connections one of `tunnels`.

    `fields` are the header fields but those of a single connection.
    """
    protocols = response.headers.joined("upgrade") or ""
    head = render_head(response.status, [*fields, ("Connection", "Upgrade"), ("Upgrade", protocols)])

    async def connect(server: IProtocol) -> None:
        response.hand_over(server)

    try:
        await tunnels.open(request, response.status, head, connect)
    except BaseException:
        response.abort()
        raise


def forwarded_fields(headers: Headers) -> list[tuple[str, str]]:
    """Return the response fields that are forwarded unchanged. Content-Length and Date are sent by `Request`."""
    return list(headers.end_to_end().without("content-length", "date"))
