"""The memory that all downloads of a process hold together, however many they are."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from attrs import define

_MIB = 1024 * 1024

# Maximum number of bytes that are hashed and written at a time. Each write costs 100 µs for the thread and for waking
# the readers; with half the size, each byte costs 9 % more CPU time.
_MAX_WRITE_SIZE = 2 * _MIB
_MIN_WRITE_SIZE = 32 * 1024
_CHUNK_SIZE = 64 * 1024  # bytes that a transport may deliver beyond what was asked for

_MAX_READ_AHEAD = 256 * 1024  # bytes from upstream that wait while the previous ones are being written
_MIN_PIECE_SIZE = 64 * 1024  # bytes; readers read smaller pieces from the file, many at a time
_WRITES_PER_TAIL = 2


class DownloadMemory:
    """Divides a fixed number of bytes among the registries from which downloads are active, and then among these.

    `transit_limit` is for bytes on their way from upstream to the disk: those that arrive and those that are being
    written. The more downloads from a registry, the smaller are their writes; a download with a slow disk stops reading
    from upstream.
    With more than 200 downloads, each takes 192 KiB more at most. `tail_limit` is for bytes that are on disk, but that
    readers close behind still get from memory. The oldest are dropped first.
    """

    def __init__(self, transit_limit: int = 40 * _MIB, tail_limit: int = 24 * _MIB) -> None:
        self._transit_limit = transit_limit
        self._tail_limit = tail_limit
        self._active: Counter[str] = Counter()  # downloads by the host of their registry
        self._writes: OrderedDict[int, _Write] = OrderedDict()  # in all tails, the oldest first, by `id`
        self.tail_size = 0  # bytes

    @contextmanager
    def share(self, host: str) -> Iterator[None]:
        """Take part in the division during the ``with`` block, as a download from `host`."""
        self._active[host] += 1
        try:
            yield
        finally:
            self._active[host] -= 1
            if not self._active[host]:
                del self._active[host]

    def write_size(self, host: str) -> int:
        """Return the number of bytes that a download from `host` collects before it writes them."""
        share = self._transit_limit // (2 * max(1, len(self._active)) * max(1, self._active[host])) - _CHUNK_SIZE
        return max(_MIN_WRITE_SIZE, min(_MAX_WRITE_SIZE, share))

    def read_ahead(self, host: str) -> int:
        """Return the number of bytes that may arrive while a download from `host` writes."""
        return min(_MAX_READ_AHEAD, self.write_size(host))

    def tail(self) -> TailBuffer:
        """Return the tail of a new download."""
        return TailBuffer(self)

    def _keep(self, write: _Write) -> None:
        self._writes[id(write)] = write
        self.tail_size += write.size
        while self.tail_size > self._tail_limit:
            self._drop(next(iter(self._writes.values())))

    def _drop(self, write: _Write) -> None:
        if self._writes.pop(id(write), None) is not None:
            self.tail_size -= write.size
            write.pieces = []


@define(eq=False)
class _Write:
    """The large pieces of one write, with their offsets in the file, and the bytes that they take."""

    pieces: list[tuple[int, bytes]]
    size: int


class TailBuffer:
    """The pieces of a download's last writes. They serve readers that are close behind the download."""

    def __init__(self, memory: DownloadMemory) -> None:
        self._memory = memory
        self._writes: list[_Write] = []

    def add(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Add `pieces`, which were written at `offset`. Drop those of the write before the last."""
        kept = []
        for piece in pieces:
            if len(piece) >= _MIN_PIECE_SIZE:
                kept.append((offset, piece))
            offset += len(piece)
        write = _Write(kept, sum(len(piece) for _, piece in kept))
        self._writes.append(write)
        self._memory._keep(write)
        if len(self._writes) > _WRITES_PER_TAIL:
            self._memory._drop(self._writes.pop(0))

    def get(self, offset: int, at_most: int) -> memoryview | None:
        """Return one or more bytes from `offset` on; None if they are not in the buffer."""
        for write in reversed(self._writes):
            for start, piece in write.pieces:
                if start <= offset < start + len(piece):
                    return memoryview(piece)[offset - start : offset - start + at_most]
        return None

    def clear(self) -> None:
        """Drop all pieces."""
        for write in self._writes:
            self._memory._drop(write)
        self._writes.clear()
