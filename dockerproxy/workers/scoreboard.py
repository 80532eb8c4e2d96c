"""How many connections each process has, and when it was last seen alive: numbers in memory that all of them share."""

from __future__ import annotations

import mmap
import struct

from attrs import frozen

_SLOT = struct.Struct("QQ")  # connections that have ended, and the last sign of life (CLOCK_MONOTONIC, ns)


@frozen
class Scoreboard:
    """Slots by a process's number. Each is written by its process alone; a number is written, or read, whole."""

    _memory: mmap.mmap

    @classmethod
    def create(cls, processes: int) -> Scoreboard:
        """Return a tally for so many processes, of whom the others are copies of this one from now on."""
        return cls(mmap.mmap(-1, _SLOT.size * processes))

    def reset(self, number: int, now: int) -> None:
        """Begin to count for a process that starts."""
        _SLOT.pack_into(self._memory, number * _SLOT.size, 0, now)

    def closed_connections(self, number: int) -> int:
        """Return how many connections of a process have ended."""
        return int(_SLOT.unpack_from(self._memory, number * _SLOT.size)[0])

    def last_heartbeat(self, number: int) -> int:
        """Return when a process was last seen alive, in ns."""
        return int(_SLOT.unpack_from(self._memory, number * _SLOT.size)[1])

    def count_closed(self, number: int) -> None:
        """Count a connection of this process, `number`, that has ended."""
        struct.pack_into("Q", self._memory, number * _SLOT.size, self.closed_connections(number) + 1)

    def heartbeat(self, number: int, now: int) -> None:
        """Note that this process, `number`, is alive."""
        struct.pack_into("Q", self._memory, number * _SLOT.size + 8, now)
