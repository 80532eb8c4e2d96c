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


class Answer(Protocol):
    """Another server's answer, its body not read yet."""

    status: int
    headers: Headers

    @property
    def length(self) -> int | None:
        """Its Content-Length (in an answer to HEAD, that which GET would have), or None where there is none."""

    async def read_chunk(self) -> bytes: ...

    def abort(self) -> None: ...


def request_body(request: Request) -> RequestBody | None:
    """Return the request's body for the next server, or None where it has none."""
    return RequestBody(request) if request.has_body else None


@implementer(IBodyProducer)
class RequestBody:
    """The body of a client's request, as it arrives. The client is held back while the next server takes no more."""

    def __init__(self, request: Request) -> None:
        framing = body_framing(request.head)
        self.length: Any = UNKNOWN_LENGTH if framing is None else framing
        self._request = request
        self._paused: Deferred[None] | None = None
        self._pump: Deferred[None] | None = None
        self._stopped = False

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self._pump = Deferred.fromCoroutine(self._produce(consumer))
        # Its own Deferred: whoever holds this one must not get at the coroutine by cancelling it.
        done: Deferred[None] = Deferred()
        self._pump.addCallbacks(done.callback, lambda why: None if why.check(CancelledError) else done.errback(why))
        return done

    async def _produce(self, consumer: IConsumer) -> None:
        while data := await self._request.read_chunk():
            consumer.write(data)
            if self._paused is not None:
                await self._paused
            if self._stopped:  # from within that `write`, when there was nothing to cancel
                raise CancelledError

    def pauseProducing(self) -> None:
        if self._paused is None:
            self._paused = Deferred()

    def resumeProducing(self) -> None:
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.callback(None)

    def stopProducing(self) -> None:
        self._stopped = True
        if self._pump is not None:
            self._pump.cancel()


async def relay(request: Request, answer: Answer, fields: Iterable[tuple[str, str]]) -> None:
    """Answer `request` with `answer`, under the header fields `fields`."""
    try:
        request.start(answer.status, fields, answer.length)
        while data := await answer.read_chunk():
            request.write(data)
            await request.drain()
        request.finish()
    except BaseException:
        answer.abort()
        raise


def relayed_fields(headers: Headers) -> list[tuple[str, str]]:
    """Return the fields of an answer that go to the client as they are; the framing is ours to say."""
    return list(headers.end_to_end().without("content-length", "date"))
