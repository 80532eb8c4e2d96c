"""The memory and the open files of the daemon's processes, as /proc has them. The metrics show them. Blocks."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from contextlib import suppress

from attrs import frozen

_PAGE = os.sysconf("SC_PAGE_SIZE")


@frozen
class ProcessUsage:
    """The sums over some processes. Memory that several of them share counts once in `resident`, in parts."""

    resident: int = 0
    virtual: int = 0
    open_files: int = 0
    max_files: int = 0

    @classmethod
    def read(cls, process_ids: Iterable[int]) -> ProcessUsage:
        """Return the usage of those of `process_ids` that still run."""
        resident = virtual = open_files = max_files = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for process_id in process_ids:
            # A process may end at any moment.
            with suppress(OSError, ValueError, LookupError):
                sizes = _read(f"/proc/{process_id}/statm").split()
                open_files += len(os.listdir(f"/proc/{process_id}/fd"))
                max_files += limit
                virtual += int(sizes[0]) * _PAGE
                resident += _proportional_size(process_id) or int(sizes[1]) * _PAGE
        return cls(resident, virtual, open_files, max_files)


def _proportional_size(process_id: int) -> int:
    """Return the bytes of memory of a process, with a part of those that it shares; 0 if the kernel does not say."""
    with suppress(OSError, ValueError):
        for line in _read(f"/proc/{process_id}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
