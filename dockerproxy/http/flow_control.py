"""What flows on a server's connection: the body that comes with a request, and room for the bytes of an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from dockerproxy.http.message import ChunkedDecoder
from dockerproxy.http.stream import ByteStream

MAX_DISCARDED = 256 * 1024
"""Bytes of a body that nobody reads which are thrown away; beyond that the connection is given up instead."""


class RequestBody:
    """The body of the request under way: `framing` is its length in bytes, or None for the chunked coding."""

    def __init__(self, stream: ByteStream, framing: int | None) -> None:
        self.stream = stream
        self.done = False
        self.discarding = False
        self._remaining = framing
        self._decoder = ChunkedDecoder() if framing is None else None
        self._discarded_bytes = 0

    @property
    def exceeds_discard_limit(self) -> bool:
        """Whether more is to come, as far as is known, than is worth being thrown away."""
        return self._discarded_bytes + (self._remaining or 0) > MAX_DISCARDED

    def feed(self, data: bytes) -> bytes:
        """Pass on what belongs to the body; return the rest. Raise `BadRequest` where the framing is broken."""
        if self.discarding:
            self._discarded_bytes += len(data)
        if self._decoder is not None:
            content = b"".join(self._decoder.feed(data))
            rest, self.done = self._decoder.unused_data, self._decoder.done
        else:
            assert self._remaining is not None
            content, rest = data[: self._remaining], data[self._remaining :]
            self._remaining -= len(content)
            self.done = not self._remaining
        if content and not self.discarding:
            self.stream.feed(content)
        if self.done:
            self.stream.finish()
        return rest

    def discard(self, error: BaseException) -> None:
        """Throw away what still comes; whoever reads all the same gets `error`, and not a body with a hole."""
        self.discarding = True
        self.stream.discard()
        self.stream.fail(error)


_DRAINED = succeed(None)


def _noop() -> None:
    """In the place of a callback that would keep a connection alive in memory."""


@implementer(IPushProducer)
class FlowControl:
    """Whether the transport takes more: what a transport tells a push producer, made awaitable.

    `opened` is called when it takes more again, after whoever waited for that has had his turn.
    """

    __slots__ = ("_drain_waiter", "_failure", "_on_resumed", "paused")

    def __init__(self, on_resumed: Callable[[], None]) -> None:
        self.paused = False
        self._on_resumed = on_resumed
        self._failure: BaseException | None = None
        self._drain_waiter: Deferred[None] | None = None

    def drain(self) -> Awaitable[None]:
        """Wait until the transport takes more; raise what `fail` was given. For one coroutine at a time."""
        if self._failure is not None:
            raise self._failure
        if not self.paused:
            return _DRAINED
        self._drain_waiter = Deferred()
        return self._drain_waiter

    def fail(self, error: BaseException) -> None:
        """Say that the transport is gone."""
        self._on_resumed = _noop
        self._failure = error
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None:
            waiter.errback(error)

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None:
            waiter.callback(None)
        if not self.paused:
            self._on_resumed()

    def stopProducing(self) -> None:
        self.paused = False
