"""A bounded byte stream from a transport to a coroutine."""

from __future__ import annotations

import math
from typing import Protocol

from twisted.internet.defer import Deferred

_MAX_CHUNKS = 4096  # buffered chunks: a tiny chunk takes many times its length in memory
_SCARCE_HIGH_WATER = 16 * 1024


class Producer(Protocol):
    """A source of bytes that can be paused, such as a transport."""

    def pauseProducing(self) -> object: ...

    def resumeProducing(self) -> object: ...


class BufferBudget:
    """A limit in bytes for the buffers of several streams together.

    A read of many bytes saves threads and system calls. But if clients stop just before the last of them, each takes
    that much memory. If the streams together exceed `limit`, such reads therefore return what there is, the oldest
    first. Streams whose reader is busy are then paused at `_SCARCE_HIGH_WATER` bytes.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._waiting: dict[ByteStream, None] = {}  # with a pending read of more than a byte, the oldest first
        self.used = 0
        """The number of bytes that the streams buffer."""

    @property
    def exceeded(self) -> bool:
        """Whether the streams buffer more than the limit."""
        return self.used > self._limit

    def relieve(self) -> None:
        """Make pending reads return what there is until the limit is no longer exceeded."""
        while self._waiting and self.exceeded:
            next(iter(self._waiting)).return_available()

    def add_waiting(self, stream: ByteStream) -> None:
        """Count `stream` among those with a pending read of more than a byte."""
        self._waiting[stream] = None

    def remove_waiting(self, stream: ByteStream) -> None:
        """Forget what `add_waiting` said."""
        self._waiting.pop(stream, None)


_UNLIMITED = BufferBudget(math.inf)


class ByteStream:
    """A bounded queue of bytes between one producer and one reader.

    The producer side calls `feed`, then `finish` or `fail` once. The reader awaits `read` until it returns ``b""``.

    The producer is paused while the stream buffers more than `high_water` bytes and more than the last read asked for,
    or more than `_MAX_CHUNKS` chunks. It is resumed after a read. It is also resumed at the end of the stream, because
    its further bytes belong to the next message. `budget` may lower these limits.
    """

    def __init__(
        self, producer: Producer | None = None, *, high_water: int = 256 * 1024, budget: BufferBudget = _UNLIMITED
    ) -> None:
        self._producer = producer
        self.high_water = high_water
        self._budget = budget
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended = False
        self._failure: BaseException | None = None
        self._read_waiter: Deferred[None] | None = None
        self._min_read = 1
        self.received = 0  # bytes from the producer

    @property
    def ended(self) -> bool:
        """Whether `finish` or `fail` was called; bytes may still be buffered."""
        return self._ended

    @property
    def starved(self) -> bool:
        """Whether a reader waits for bytes from the producer."""
        return self._read_waiter is not None and not self._ended

    def feed(self, data: bytes) -> None:
        """Buffer bytes from the producer and wake the reader if it has enough."""
        self._chunks.append(data)
        self._buffered += len(data)
        self.received += len(data)
        self._budget.used += len(data)
        self._budget.relieve()
        high_water = _SCARCE_HIGH_WATER if self._budget.exceeded else self.high_water
        full = self._buffered > max(high_water, self._min_read) or len(self._chunks) > _MAX_CHUNKS
        if full and not self._paused and self._producer is not None:
            self._paused = True
            self._producer.pauseProducing()
        if self._has_enough():
            self._wake_reader()

    def finish(self) -> None:
        """End the stream."""
        self._resume_producer()
        self._ended = True
        self._wake_reader()

    def fail(self, error: BaseException) -> None:
        """End the stream with an error: reads return the buffered bytes, then raise `error`."""
        if not self._ended:
            self._failure = error
            self.finish()

    async def read(self, at_least: int = 1) -> bytes:
        """Return the bytes that `read_pieces` returns, joined."""
        pieces = await self.read_pieces(at_least)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_pieces(self, at_least: int = 1) -> list[bytes]:
        """Return all buffered chunks, or an empty list at the end. Raise the exception given to `fail`.

        Wait until they hold `at_least` bytes, there are more than `_MAX_CHUNKS` of them, or the stream has ended.
        """
        self._min_read = 1 if self._budget.exceeded else max(1, at_least)
        while not self._has_enough() and not self._ended:
            self._resume_producer()  # it was paused at `high_water`, but this read needs more
            waiter = self._read_waiter = Deferred()
            if self._min_read > 1:
                self._budget.add_waiting(self)
            try:
                await waiter
            finally:
                self._budget.remove_waiting(self)
                if self._read_waiter is waiter:  # cancelled
                    self._read_waiter = None
        if self._chunks:
            pieces, self._chunks = self._chunks, []
            self._empty()
            self._resume_producer()
            return pieces
        if self._failure is not None:
            raise self._failure
        return []

    def return_available(self) -> None:
        """Make a pending read return the buffered bytes now, or the next ones as soon as they arrive."""
        self._min_read = 1
        self._budget.remove_waiting(self)
        if self._has_enough():
            self._wake_reader()

    def discard(self) -> None:
        """Drop the buffered bytes and resume the producer, because there is no reader any more."""
        self._chunks.clear()
        self._empty()
        self._resume_producer()

    def __del__(self) -> None:
        self._empty()  # bytes that nobody read

    def _empty(self) -> None:
        self._budget.used -= self._buffered
        self._buffered = 0

    def _has_enough(self) -> bool:
        return self._buffered >= self._min_read or len(self._chunks) > _MAX_CHUNKS

    def _resume_producer(self) -> None:
        if self._paused and self._producer is not None:
            self._paused = False
            self._producer.resumeProducing()

    def _wake_reader(self) -> None:
        waiter, self._read_waiter = self._read_waiter, None
        if waiter is not None:
            waiter.callback(None)
