"""Memory that is looked through, or taken from the kernel, again and again for nothing."""

from __future__ import annotations

import gc

_MMAP_THRESHOLD = 4 * 1024 * 1024  # bytes


def freeze_startup_objects() -> None:
    """Let Python's collector never again look at what is there now, and the C library keep some memory that is free.

    What is there now are modules, classes and services, which stay to the end: 50,000 objects, for which a full
    collection took 20 ms, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    # glibc returns what is free at the end of the heap to the kernel where that is more than twice the largest block
    # that was ever mapped by itself (mallopt(3), M_MMAP_THRESHOLD). Downloads and pushes take and leave a few MiB all
    # the time, for which the kernel had to clear 25,000 pages a GB. These bytes are never touched: they take no memory.
    bytes(_MMAP_THRESHOLD)
