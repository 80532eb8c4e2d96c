"""Shared memory with the closed connections and the last heartbeat of each process."""

from __future__ import annotations

import mmap
import struct

from attrs import frozen

_SLOT = struct.Struct("QQ")  # closed connections; last heartbeat (CLOCK_MONOTONIC, ns)


@frozen
class Scoreboard:
    """One slot for each process, by its number.

    Only that process writes to its slot while it runs. Reads and writes of a single number are atomic.
    """

    _memory: mmap.mmap

    @classmethod
    def create(cls, processes: int) -> Scoreboard:
        """Create a scoreboard for `processes` processes, which must be forked from this one afterwards."""
        return cls(mmap.mmap(-1, _SLOT.size * processes))

    def reset(self, number: int, now: int) -> None:
        """Reset the slot of a process that starts."""
        _SLOT.pack_into(self._memory, number * _SLOT.size, 0, now)

    def closed_connections(self, number: int) -> int:
        """Return the number of connections that the process has closed."""
        return int(_SLOT.unpack_from(self._memory, number * _SLOT.size)[0])

    def last_heartbeat(self, number: int) -> int:
        """Return the time of the last heartbeat of the process, in ns."""
        return int(_SLOT.unpack_from(self._memory, number * _SLOT.size)[1])

    def count_closed(self, number: int) -> None:
        """Count a closed connection of this process, `number`."""
        struct.pack_into("Q", self._memory, number * _SLOT.size, self.closed_connections(number) + 1)

    def heartbeat(self, number: int, now: int) -> None:
        """Record a heartbeat of this process, `number`."""
        struct.pack_into("Q", self._memory, number * _SLOT.size + 8, now)
