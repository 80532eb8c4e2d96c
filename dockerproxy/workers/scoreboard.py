"""Shared memory with the closed connections and the last heartbeat of each process."""

from __future__ import annotations

import mmap
import time
from typing import Any

from attrs import frozen
from twisted.application.internet import TimerService

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats of a worker."""

_CLOSED, _HEARTBEAT = range(2)  # connections; CLOCK_MONOTONIC in ns
_WORDS_PER_PROCESS = 2
_WORD_SIZE = 8  # bytes; an aligned 64-bit word is read and written atomically


@frozen
class Scoreboard:
    """One slot for each process, by its number.

    Only that process writes to its slot while it runs. The main process resets the slot before it starts a worker.
    """

    _words: memoryview

    @classmethod
    def create(cls, processes: int) -> Scoreboard:
        """Create a scoreboard for `processes` processes, which must be forked from this one afterwards."""
        return cls(memoryview(mmap.mmap(-1, _WORD_SIZE * _WORDS_PER_PROCESS * processes)).cast("Q"))

    @property
    def processes(self) -> int:
        """The number of slots."""
        return len(self._words) // _WORDS_PER_PROCESS

    def slot(self, number: int) -> Slot:
        """Return the slot of process `number`."""
        return Slot(self._words, number * _WORDS_PER_PROCESS)


@frozen
class Slot:
    """The slot of one process."""

    _words: memoryview
    _start: int

    @property
    def closed_connections(self) -> int:
        """The number of connections that the process has closed."""
        return self._words[self._start + _CLOSED]

    @property
    def last_heartbeat(self) -> int:
        """The time of the last heartbeat, of CLOCK_MONOTONIC in ns."""
        return self._words[self._start + _HEARTBEAT]

    def reset(self) -> None:
        """Reset the slot for a process that starts."""
        self._words[self._start + _CLOSED] = 0
        self.heartbeat()

    def count_closed(self) -> None:
        """Count a connection that this process closed."""
        self._words[self._start + _CLOSED] += 1

    def heartbeat(self) -> None:
        """Record a heartbeat of this process."""
        self._words[self._start + _HEARTBEAT] = time.monotonic_ns()


def heartbeat_service(reactor: Any, slot: Slot) -> TimerService:
    """Return the service that records the heartbeats of this process."""
    service = TimerService(HEARTBEAT_INTERVAL, slot.heartbeat)  # type: ignore[no-untyped-call]
    service.clock = reactor
    return service
