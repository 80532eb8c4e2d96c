"""A bounded byte stream from a transport to a coroutine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import frozen
from twisted.internet.defer import Deferred

from dockerproxy.errors import RegistryError
from dockerproxy.shares import ClientShares, client_key

_MIN_CHUNK = 512  # bytes; smaller ones are joined, because a tiny chunk takes many times its length in memory
_HIGH_WATER = 256 * 1024
_SCARCE_HIGH_WATER = 16 * 1024
_SHORT_BODY = 64 * 1024


class Producer(Protocol):
    """A source of bytes that can be paused, such as a transport."""

    def pauseProducing(self) -> object: ...

    def resumeProducing(self) -> object: ...


class BufferBudget:
    """A limit in bytes for the buffers of several streams together, with a `share` for those of one client.

    `name` is what they hold, for `ClientShares`.

    A read of many bytes saves threads and system calls. But if clients stop just before the last of them, each takes
    that much memory. If a client exceeds its share, or has more than its part of the limit while all together exceed
    that, its streams are *scarce*: such reads return what there is, the transport is read in small pieces, and a stream
    whose reader is busy is paused. While all together exceed the limit, the transports of all clients are read in small
    pieces. Bytes count until the reader asks for the next ones, because until then it holds them.
    """

    def __init__(self, name: str, limit: int, share: int) -> None:
        self.shares = ClientShares(name, limit, share)
        self._waiting: dict[str, set[ByteStream]] = {}  # with a pending read of more than a byte
        self._unlimited: dict[str, set[ByteStream]] = {}  # read in large pieces

    def of_client(self, client: str) -> ClientBuffers:
        """Return the buffers of the streams of `client`, an address."""
        return ClientBuffers(self, client_key(client))

    def is_scarce(self, client: str) -> bool:
        """Return whether `client` may buffer no more than what its readers wait for."""
        shares, held = self.shares, self.shares.held_by(client)
        return held > shares.share or (shares.used > shares.limit and held * shares.clients > shares.limit)

    def requires_small_reads(self, client: str) -> bool:
        """Return whether the transports of `client` are to be read in small pieces."""
        return self.shares.used > self.shares.limit or self.shares.held_by(client) > self.shares.share

    def relieve(self, client: str) -> None:
        """If memory has become scarce, limit reads at once, and make pending reads of `client` return what there is.

        Otherwise each of its transports could still read a large piece, because it is told only when it has read one.
        """
        if self.shares.used > self.shares.limit:
            self._limit_reads_of(list(self._unlimited))
        elif client in self._unlimited and self.requires_small_reads(client):
            self._limit_reads_of([client])
        waiting = self._waiting.get(client)
        if waiting and self.is_scarce(client):
            for stream in list(waiting):
                stream.return_available()

    def add_waiting(self, client: str, stream: ByteStream) -> None:
        """Count `stream` among those with a pending read of more than a byte."""
        self._waiting.setdefault(client, set()).add(stream)

    def remove_waiting(self, client: str, stream: ByteStream) -> None:
        """Forget what `add_waiting` said."""
        _discard(self._waiting, client, stream)

    def add_unlimited(self, client: str, stream: ByteStream) -> None:
        """Count `stream` among those that are read in large pieces, until it ends."""
        self._unlimited.setdefault(client, set()).add(stream)

    def remove_unlimited(self, client: str, stream: ByteStream) -> None:
        """Forget what `add_unlimited` said."""
        _discard(self._unlimited, client, stream)

    def _limit_reads_of(self, clients: list[str]) -> None:
        for client in clients:
            for stream in list(self._unlimited[client]):
                stream.apply_read_limit()


def _discard(streams: dict[str, set[ByteStream]], client: str, stream: ByteStream) -> None:
    of_client = streams.get(client)
    if of_client is not None:
        of_client.discard(stream)
        if not of_client:
            del streams[client]


@frozen
class ClientBuffers:
    """The part of a `BufferBudget` that the streams of one client use."""

    _budget: BufferBudget
    _client: str

    @property
    def scarce(self) -> bool:
        return self._budget.is_scarce(self._client)

    @property
    def requires_small_reads(self) -> bool:
        return self._budget.requires_small_reads(self._client)

    def add(self, size: int) -> None:
        """Count bytes that a stream buffers, and make room if that is too much."""
        self._budget.shares.add(self._client, size)
        self._budget.relieve(self._client)

    def release(self, size: int) -> None:
        self._budget.shares.release(self._client, size)

    def refusal(self) -> RegistryError:
        """Return the error for a request whose body takes memory that is scarce."""
        return self._budget.shares.refuse(self._client)

    def add_waiting(self, stream: ByteStream) -> None:
        self._budget.add_waiting(self._client, stream)

    def remove_waiting(self, stream: ByteStream) -> None:
        self._budget.remove_waiting(self._client, stream)

    def add_unlimited(self, stream: ByteStream) -> None:
        self._budget.add_unlimited(self._client, stream)

    def remove_unlimited(self, stream: ByteStream) -> None:
        self._budget.remove_unlimited(self._client, stream)


class ByteStream:
    """A bounded queue of bytes between one producer and one reader.

    The producer side calls `feed`, then `finish` or `fail` once. The reader awaits `read` until it returns ``b""``.

    The producer is paused while the stream buffers more than `high_water` bytes and more than the last read asked for.
    It is resumed after a read. It is also resumed at the end of the stream, because its further bytes belong to the
    next message. `buffers` may lower these limits. `limit_reads` is called with False as long as memory is plentiful,
    and with True when it is not, and at the end. Before the first call, the producer is read in small pieces.
    """

    def __init__(
        self,
        producer: Producer | None = None,
        *,
        high_water: int = _HIGH_WATER,
        buffers: ClientBuffers | None = None,
        limit_reads: Callable[[bool], None] | None = None,
    ) -> None:
        self._producer = producer
        self._high_water = high_water
        self._buffers: ClientBuffers | None = None
        self._limit_reads = limit_reads
        self._reads_limited: bool | None = None  # as `limit_reads` was told; None if it was not
        self._chunks: list[bytes] = []
        self.buffered = 0
        """The number of bytes that the reader has not got yet."""
        self._taken = 0  # bytes of the last read, which the reader holds until it asks for more
        self._retained = 0  # bytes of reads before it, which the reader collects
        self._paused = False
        self._ended = False
        self._failure: BaseException | None = None
        self._read_waiter: Deferred[None] | None = None
        self._min_read = 1
        self.received = 0  # bytes from the producer
        if buffers is not None:
            self.count_for(buffers)

    @property
    def ended(self) -> bool:
        """Whether `finish` or `fail` was called; bytes may still be buffered."""
        return self._ended

    @property
    def starved(self) -> bool:
        """Whether a reader waits for bytes from the producer."""
        return self._read_waiter is not None and not self._ended

    def count_for(self, buffers: ClientBuffers) -> None:
        """Count all that is buffered among `buffers`, which may lower the limits. It counted for nobody before."""
        self._buffers = buffers
        if self.buffered:
            buffers.add(self.buffered)
        if self._is_scarce():
            self._pause_producer()  # until the reader waits

    def limit_read_ahead(self, size: int) -> None:
        """Set `high_water` to `size`. Allow for long reads if that is not less than usual."""
        self._high_water = size
        if self._limit_reads is not None and not self._ended:
            self._limit_reads(size < _HIGH_WATER)

    def feed(self, data: bytes) -> None:
        """Buffer bytes from the producer and wake the reader if it has enough."""
        if self._chunks and len(self._chunks[-1]) + len(data) <= _MIN_CHUNK:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self.buffered += len(data)
        self.received += len(data)
        if self._buffers is not None:
            self._buffers.add(len(data))
        if self._is_scarce():
            full = self.buffered + self._taken > _SCARCE_HIGH_WATER
        else:
            full = self.buffered > max(self._high_water, self._min_read)
        if full:
            self._pause_producer()
        if self._has_enough():
            self._wake_reader()

    def finish(self) -> None:
        """End the stream."""
        self._resume_producer()
        self._ended = True
        if self._buffers is not None:
            self._buffers.remove_unlimited(self)
        if self._limit_reads is not None:
            self._limit_reads(True)
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

        Wait until they hold `at_least` bytes, or the stream has ended.
        """
        self._release_taken()
        self._min_read = 1 if self._is_scarce() else max(1, at_least)
        while not self._has_enough() and not self._ended:
            self._resume_producer()  # it was paused at `high_water`, but this read needs more
            waiter = self._read_waiter = Deferred()
            if self._min_read > 1 and self._buffers is not None:
                self._buffers.add_waiting(self)
            try:
                await waiter
            finally:
                if self._buffers is not None:
                    self._buffers.remove_waiting(self)
                if self._read_waiter is waiter:  # cancelled
                    self._read_waiter = None
        if self._chunks:
            pieces, self._chunks = self._chunks, []
            self._taken, self.buffered = self.buffered, 0
            if not self._is_scarce():
                self._resume_producer()
            return pieces
        if self._failure is not None:
            raise self._failure
        return []

    def return_available(self) -> None:
        """Make a pending read return the buffered bytes now, or the next ones as soon as they arrive."""
        self._min_read = 1
        if self._buffers is not None:
            self._buffers.remove_waiting(self)
        if self._has_enough():
            self._wake_reader()

    def retain(self) -> None:
        """Count the bytes of the last read until `discard`, because the reader collects them.

        Raise `TooManyRequests` or `ServiceOverloaded` if that is too much memory. A short body is always accepted.
        """
        self._retained, self._taken = self._retained + self._taken, 0
        if self._retained > _SHORT_BODY and self._buffers is not None and self._buffers.scarce:
            raise self._buffers.refusal()

    def discard(self) -> None:
        """Drop the buffered bytes and resume the producer, because there is no reader any more."""
        self._chunks.clear()
        self._empty()
        self._resume_producer()

    def __del__(self) -> None:
        self._empty()  # bytes that nobody read

    def _empty(self) -> None:
        self._taken += self.buffered + self._retained
        self.buffered = self._retained = 0
        self._release_taken()

    def _release_taken(self) -> None:
        if self._taken and self._buffers is not None:
            self._buffers.release(self._taken)
        self._taken = 0

    def apply_read_limit(self) -> None:
        """Call `limit_reads` if the transport has to be read in other pieces than before."""
        if self._buffers is None or self._limit_reads is None or self._ended:
            return
        limited = self._buffers.requires_small_reads
        if limited != self._reads_limited:
            self._reads_limited = limited
            if limited:
                self._buffers.remove_unlimited(self)
            else:
                self._buffers.add_unlimited(self)
            self._limit_reads(limited)

    def _is_scarce(self) -> bool:
        """Return whether the limits are lowered."""
        self.apply_read_limit()
        return self._buffers is not None and self._buffers.scarce

    def _has_enough(self) -> bool:
        return self.buffered >= self._min_read

    def _pause_producer(self) -> None:
        if not self._paused and self._producer is not None:
            self._paused = True
            self._producer.pauseProducing()

    def _resume_producer(self) -> None:
        if self._paused and self._producer is not None:
            self._paused = False
            self._producer.resumeProducing()

    def _wake_reader(self) -> None:
        waiter, self._read_waiter = self._read_waiter, None
        if waiter is not None:
            waiter.callback(None)
