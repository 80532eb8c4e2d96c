"""The open readers of a process, and a bound on the disk space that they hold of blobs that were evicted.

A reader keeps its file open, so an eviction needs not wait for it. But the disk space is free only when the last reader
has closed the file, and a client may take hours. Without a bound, slow clients could fill the disk with blobs that the
cache does not count any more.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from attrs import define, field
from twisted.logger import Logger

CHECK_INTERVAL = 10.0
"""Seconds between two checks. A reader that ends earlier is never looked at."""

log = Logger()


class OpenReader(Protocol):
    """A reader of one file."""

    @property
    def fd(self) -> int:
        """The descriptor of the file; -1 if it is closed."""

    def give_up(self) -> bool:
        """Close the file now, so that the next read fails. Return False if a thread is reading it."""


@define(eq=False)
class OpenReaders:
    """Looks every 10 seconds at the readers that are open for longer.

    If they hold more than `limit` bytes of files that have no name any more, end the oldest of these.
    """

    _reactor: Any
    _limit: int
    _opened: dict[OpenReader, float] = field(factory=dict, init=False)  # the oldest first
    _check_is_scheduled: bool = field(default=False, init=False)

    def add(self, reader: OpenReader) -> None:
        """Add a reader. The caller calls `discard` when it is closed."""
        self._opened[reader] = self._reactor.seconds()
        if not self._check_is_scheduled:
            self._check_is_scheduled = True
            self._reactor.callLater(CHECK_INTERVAL, self._check)

    def discard(self, reader: OpenReader) -> None:
        """Remove a reader, if it is there."""
        self._opened.pop(reader, None)

    def __len__(self) -> int:
        return len(self._opened)

    def _check(self) -> None:
        self._check_is_scheduled = False
        held = self._find_held()
        size = sum(file_size for file_size, _ in held.values())
        for file_size, readers in held.values():
            if size <= self._limit:
                break
            ended = sum(reader.give_up() for reader in readers)
            log.info(
                "ended {count} slow readers of an evicted blob of {size} bytes; with this CACHE_MAX_SIZE, readers"
                " of evicted blobs may hold {limit} bytes in this process",
                count=ended, size=file_size, limit=self._limit,
            )  # fmt: skip
            if ended == len(readers):
                size -= file_size
        if self._opened:
            self._check_is_scheduled = True
            self._reactor.callLater(CHECK_INTERVAL, self._check)

    def _find_held(self) -> dict[tuple[int, int], tuple[int, list[OpenReader]]]:
        """Return the size and the readers of each file without a name, the one with the oldest reader first."""
        held: dict[tuple[int, int], tuple[int, list[OpenReader]]] = {}
        latest = self._reactor.seconds() - CHECK_INTERVAL
        for reader, opened in self._opened.items():
            if opened > latest:
                break
            if reader.fd >= 0:
                status = os.fstat(reader.fd)
                if status.st_nlink == 0:
                    held.setdefault((status.st_dev, status.st_ino), (status.st_size, []))[1].append(reader)
        return held
