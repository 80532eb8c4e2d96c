"""Shared memory with the last heartbeat of each process, and its closed connections: all, and those of each client."""

from __future__ import annotations

import mmap
import time
from typing import Any

from attrs import frozen
from twisted.application.internet import TimerService

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats of a worker."""

_CLOSED, _HEARTBEAT, _CLOSED_BY_CLIENT = range(3)  # connections; CLOCK_MONOTONIC in ns; the first client's connections
_WORD_SIZE = 8  # bytes; an aligned 64-bit word is read and written atomically


@frozen
class Scoreboard:
    """One slot for each process, by its number, with counters for the connections of `clients` clients.

    Only that process writes to its slot while it runs. The main process resets the slot before it starts a worker. The
    kernel provides a page of it when it is first written to.
    """

    _words: memoryview
    processes: int
    clients: int

    @classmethod
    def create(cls, processes: int, clients: int) -> Scoreboard:
        """Create a scoreboard for `processes` processes, which must be forked from this one afterwards."""
        words = processes * (_CLOSED_BY_CLIENT + clients)
        return cls(memoryview(mmap.mmap(-1, _WORD_SIZE * words)).cast("Q"), processes, clients)

    def slot(self, number: int) -> Slot:
        """Return the slot of process `number`."""
        return Slot(self._words, number * (_CLOSED_BY_CLIENT + self.clients), self.clients)


@frozen
class Slot:
    """The slot of one process."""

    _words: memoryview
    _start: int
    clients: int

    @property
    def closed_connections(self) -> int:
        """The number of connections that the process has closed."""
        return self._words[self._start + _CLOSED]

    @property
    def last_heartbeat(self) -> int:
        """The time of the last heartbeat, of CLOCK_MONOTONIC in ns."""
        return self._words[self._start + _HEARTBEAT]

    def closed_by_client(self, index: int) -> int:
        """Return how often `count_closed` was called with `index`, by all processes that had this number."""
        return self._words[self._start + _CLOSED_BY_CLIENT + index]

    def reset(self) -> None:
        """Reset the slot for a process that starts, apart from the counters of clients."""
        self._words[self._start + _CLOSED] = 0
        self.heartbeat()

    def count_closed(self, index: int) -> None:
        """Count a connection that this process closed, of the client with the counter `index`."""
        self._words[self._start + _CLOSED] += 1
        self._words[self._start + _CLOSED_BY_CLIENT + index] += 1

    def heartbeat(self) -> None:
        """Record a heartbeat of this process."""
        self._words[self._start + _HEARTBEAT] = time.monotonic_ns()


def heartbeat_service(reactor: Any, slot: Slot) -> TimerService:
    """Return the service that records the heartbeats of this process."""
    service = TimerService(HEARTBEAT_INTERVAL, slot.heartbeat)  # type: ignore[no-untyped-call]
    service.clock = reactor
    return service
