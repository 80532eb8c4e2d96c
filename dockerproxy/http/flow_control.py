"""Flow in both directions of a server connection: the incoming request body and back-pressure on the response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from dockerproxy.http.message import ChunkedDecoder
from dockerproxy.http.stream import ByteStream

MAX_DISCARDED = 256 * 1024
"""Bytes of an unread request body that are discarded to keep the connection usable; if more remain, it is closed."""


class RequestBody:
    """The body of the current request.

    `framing` is its length in bytes, or None for the chunked transfer coding.
    """

    def __init__(self, stream: ByteStream, framing: int | None) -> None:
        self.stream = stream
        self.done = False
        self.discarding = False
        self._remaining = framing or 0  # bytes that are known to follow
        self._decoder = ChunkedDecoder() if framing is None else None
        self._discarded_bytes = 0

    @property
    def exceeds_discard_limit(self) -> bool:
        """Whether the bytes discarded so far plus the known rest of the body exceed `MAX_DISCARDED`."""
        return self._discarded_bytes + self._remaining > MAX_DISCARDED

    def feed(self, data: bytes) -> bytes:
        """Pass the body's share of `data` to the stream and return the rest; raise `BadRequest` for invalid framing."""
        if self.discarding:
            self._discarded_bytes += len(data)
        if self._decoder is not None:
            content = b"".join(self._decoder.feed(data))
            rest, self.done = self._decoder.unused_data, self._decoder.done
        else:
            content, rest = data[: self._remaining], data[self._remaining :]
            self._remaining -= len(content)
            self.done = not self._remaining
        if content and not self.discarding:
            self.stream.feed(content)
        if self.done:
            self.stream.finish()
        return rest

    def discard(self, error: BaseException) -> None:
        """Discard the rest of the body. A pending or later read raises `error`, so no reader sees a body with a gap."""
        self.discarding = True
        self.stream.discard()
        self.stream.fail(error)


_DRAINED = succeed(None)


def _noop() -> None:
    """Replace a callback whose reference would keep a closed connection in memory."""


@implementer(IPushProducer)
class FlowControl:
    """A push producer that turns the transport's pause and resume calls into an awaitable `drain`.

    `on_resumed` is called when the transport has resumed, after the coroutine waiting in `drain` has run.
    """

    __slots__ = ("_drain_waiter", "_failure", "_on_resumed", "paused")

    def __init__(self, on_resumed: Callable[[], None]) -> None:
        self.paused = False
        self._on_resumed = on_resumed
        self._failure: BaseException | None = None
        self._drain_waiter: Deferred[None] | None = None

    def drain(self) -> Awaitable[None]:
        """Wait until the transport accepts more; raise the exception given to `fail`. One coroutine may wait."""
        if self._failure is not None:
            raise self._failure
        if not self.paused:
            return _DRAINED
        self._drain_waiter = Deferred()
        return self._drain_waiter

    def fail(self, error: BaseException) -> None:
        """Make pending and later `drain` calls raise `error`, because the transport is gone."""
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
