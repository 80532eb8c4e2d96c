"""Start-up tuning of Python's garbage collector and of glibc's malloc."""

from __future__ import annotations

import ctypes
import gc
import linecache
from contextlib import suppress

# Parameters of mallopt(3), from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_MAX_IN_HEAP = 1024 * 1024 + 64 * 1024  # bytes of a block: a chunk of a blob, and what Python adds to it
_MAX_FREE_AT_TOP = 8 * 1024 * 1024  # bytes of the heap


def tune_malloc() -> None:
    """Make malloc of this process and its forks keep little free memory, but enough. Call it before there are threads.

    By default, each thread may have a heap of its own, and each heap keeps what was freed in it. Threads read manifests
    of up to 4 MiB: after 1,100 requests for one, 15 heaps kept 190 MB. Python's lock lets one thread allocate at a
    time anyway, so one heap is enough.

    A block of up to `_MAX_IN_HEAP` bytes comes from the heap, because the kernel clears the pages of each other block:
    downloads and pushes allocate and free a few MiB all the time, which otherwise costs 25,000 page faults per GB. Long
    blocks do not, because they would leave gaps in the heap that small ones occupy.

    Other C libraries than glibc have no such parameters.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAX_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _MAX_FREE_AT_TOP)


def forget_generated_source() -> None:
    """Forget the source of the methods that attrs has generated, 1 MB of it. Call it when all modules are loaded.

    A traceback through such a method lacks that line, and still has its class and number.
    """
    linecache.clearcache()


def freeze_startup_objects() -> None:
    """Exempt all existing objects from garbage collection.

    About 50,000 objects exist after start-up: modules, classes and services, which live until the process exits. A full
    collection of them took 20 ms, and the reactor serves no request meanwhile.
    """
    gc.collect()
    gc.freeze()
