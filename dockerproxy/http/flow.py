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


class Incoming:
    """The body of the request under way: `framing` is its length in bytes, or None for the chunked coding."""

    def __init__(self, stream: ByteStream, framing: int | None) -> None:
        self.stream = stream
        self.done = False
        self.abandoned = False
        self._remaining = framing
        self._decoder = ChunkedDecoder() if framing is None else None
        self._discarded = 0

    @property
    def too_long(self) -> bool:
        """Whether more is to come, as far as is known, than is worth being thrown away."""
        return self._discarded + (self._remaining or 0) > MAX_DISCARDED

    def feed(self, data: bytes) -> bytes:
        """Pass on what belongs to the body; return the rest. Raise `BadRequest` where the framing is broken."""
        if self.abandoned:
            self._discarded += len(data)
        if self._decoder is not None:
            mine = b"".join(self._decoder.feed(data))
            rest, self.done = self._decoder.rest, self._decoder.done
        else:
            assert self._remaining is not None
            mine, rest = data[: self._remaining], data[self._remaining :]
            self._remaining -= len(mine)
            self.done = not self._remaining
        if mine and not self.abandoned:
            self.stream.feed(mine)
        if self.done:
            self.stream.finish()
        return rest

    def abandon(self, error: BaseException) -> None:
        """Throw away what still comes; whoever reads all the same gets `error`, and not a body with a hole."""
        self.abandoned = True
        self.stream.release()
        self.stream.fail(error)


_OPEN = succeed(None)


def _nothing() -> None:
    """In the place of a callback that would keep a connection alive in memory."""


@implementer(IPushProducer)
class Outflow:
    """Whether the transport takes more: what a transport tells a push producer, made awaitable.

    `opened` is called when it takes more again, after whoever waited for that has had his turn.
    """

    __slots__ = ("_failure", "_opened", "_waiter", "closed")

    def __init__(self, opened: Callable[[], None]) -> None:
        self.closed = False
        self._opened = opened
        self._failure: BaseException | None = None
        self._waiter: Deferred[None] | None = None

    def open(self) -> Awaitable[None]:
        """Wait until the transport takes more; raise what `fail` was given. For one coroutine at a time."""
        if self._failure is not None:
            raise self._failure
        if not self.closed:
            return _OPEN
        self._waiter = Deferred()
        return self._waiter

    def fail(self, error: BaseException) -> None:
        """Say that the transport is gone."""
        self._opened = _nothing
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
        if not self.closed:
            self._opened()

    def stopProducing(self) -> None:
        self.closed = False
