"""Bytes on their way from a transport to a coroutine, with a bound on how many may wait."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred

_MAX_CHUNKS = 4096  # that may wait: tiny ones take many times their bytes in memory


class Producer(Protocol):
    """What can be asked to hold its bytes back: a transport."""

    def pauseProducing(self) -> object: ...

    def resumeProducing(self) -> object: ...


class ByteStream:
    """A bounded queue of bytes between one producer and one reader.

    The producer side calls `feed`, then once `finish` or `fail`. The reader awaits `read` until it returns ``b""``.
    The producer is paused while more bytes wait than `high`, and than the reader wanted last, or very many pieces. It
    is resumed when the reader took them, or when nothing more is to come: what the producer has then is not for this
    stream, nor for it to hold back.
    """

    def __init__(self, producer: Producer | None = None, *, high_water: int = 256 * 1024) -> None:
        self._producer = producer
        self._high_water = high_water
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended = False
        self._failure: BaseException | None = None
        self._read_waiter: Deferred[None] | None = None
        self._min_read = 1
        self.wait_count = 0  # how often the reader began to wait for more: while it waits, this tells one wait apart

    @property
    def ended(self) -> bool:
        """Whether the producer has no more to give (what it gave may still wait here)."""
        return self._ended

    @property
    def starved(self) -> bool:
        """Whether the reader waits for the producer (and not the other way round)."""
        return self._read_waiter is not None and not self._ended

    def feed(self, data: bytes) -> None:
        """Take what the producer has."""
        self._chunks.append(data)
        self._buffered += len(data)
        full = self._buffered > max(self._high_water, self._min_read) or len(self._chunks) > _MAX_CHUNKS
        if full and not self._paused and self._producer is not None:
            self._paused = True
            self._producer.pauseProducing()
        if self._has_enough():
            self._wake_reader()
        else:
            self.wait_count += 1

    def finish(self) -> None:
        """Say that all is given."""
        self._resume_producer()
        self._ended = True
        self._wake_reader()

    def fail(self, error: BaseException) -> None:
        """Say that no more can come; the reader gets what waits and then `error`."""
        if not self._ended:
            self._failure = error
            self.finish()

    async def read(self, at_least: int = 1) -> bytes:
        """Return what `read_pieces` does as one."""
        pieces = await self.read_pieces(at_least)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_pieces(self, at_least: int = 1) -> list[bytes]:
        """Return all bytes that wait, in the pieces in which they came; none at the end. Raise what `fail` was given.

        They are `at_least` so many, or very many pieces, unless the end comes before.
        """
        self._min_read = max(1, at_least)
        while not self._has_enough() and not self._ended:
            self._resume_producer()  # it was paused at `high`, and more than that is wanted
            waiter = self._read_waiter = Deferred()
            self.wait_count += 1
            try:
                await waiter
            finally:
                if self._read_waiter is waiter:  # cancelled
                    self._read_waiter = None
        if self._chunks:
            pieces, self._chunks = self._chunks, []
            self._buffered = 0
            self._resume_producer()
            return pieces
        if self._failure is not None:
            raise self._failure
        return []

    def return_available(self) -> None:
        """Let a read under way that wants many bytes have those that are here, or the next that come."""
        self._min_read = 1
        if self._has_enough():
            self._wake_reader()

    def discard(self) -> None:
        """Drop what waits and let the producer go on: nobody reads any more."""
        self._chunks.clear()
        self._buffered = 0
        self._resume_producer()

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
