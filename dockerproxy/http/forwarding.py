"""A request passed on to another server, and its answer passed back: both streamed, neither held."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IConsumer
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from dockerproxy.http.headers import Headers
from dockerproxy.http.message import body_framing
from dockerproxy.http.request import Request


class ForwardedResponse(Protocol):
    """Another server's answer, its body not read yet."""

    status: int
    headers: Headers

    @property
    def length(self) -> int | None:
        """Its Content-Length (in an answer to HEAD, that which GET would have), or None where there is none."""

    async def read_chunk(self) -> bytes: ...

    def abort(self) -> None: ...


def request_body_producer(request: Request) -> RequestBodyProducer | None:
    """Return the request's body for the next server, or None where it has none."""
    return RequestBodyProducer(request) if request.has_body else None


@implementer(IBodyProducer)
class RequestBodyProducer:
    """The body of a client's request, as it arrives. The client is held back while the next server takes no more."""

    def __init__(self, request: Request) -> None:
        framing = body_framing(request.head)
        self.length: Any = UNKNOWN_LENGTH if framing is None else framing
        self._request = request
        self._resume_waiter: Deferred[None] | None = None
        self._produce_task: Deferred[None] | None = None
        self._stopped = False

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self._produce_task = Deferred.fromCoroutine(self._produce(consumer))
        # Its own Deferred: whoever holds this one must not get at the coroutine by cancelling it.
        done: Deferred[None] = Deferred()
        self._produce_task.addCallbacks(
            done.callback, lambda failure: None if failure.check(CancelledError) else done.errback(failure)
        )
        return done

    async def _produce(self, consumer: IConsumer) -> None:
        while data := await self._request.read_chunk():
            consumer.write(data)
            if self._resume_waiter is not None:
                await self._resume_waiter
            if self._stopped:  # from within that `write`, when there was nothing to cancel
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
    """Answer `request` with `answer`, under the header fields `fields`."""
    try:
        request.start(response.status, fields, response.length)
        while data := await response.read_chunk():
            request.write(data)
            await request.drain()
        request.finish()
    except BaseException:
        response.abort()
        raise


def forwarded_fields(headers: Headers) -> list[tuple[str, str]]:
    """Return the fields of an answer that go to the client as they are; the framing is ours to say."""
    return list(headers.end_to_end().without("content-length", "date"))
