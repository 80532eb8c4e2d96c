"""How much is done: the full run, and a quick one that only shows that everything works."""

from __future__ import annotations

from attrs import frozen

SMALL_BLOB = 1536  # bytes: an image's configuration, say


@frozen(kw_only=True)
class Scale:
    """Sizes are in bytes, times in seconds."""

    blob: int
    rounds: int
    small_seconds: float
    """How long a load of small requests or of new connections goes on."""
    memory_connections: int
    memory_seconds: float
    gc_blobs: int
    """Blobs that a garbage collector looks through."""


FULL = Scale(blob=1 << 30, rounds=3, small_seconds=2, memory_connections=500, memory_seconds=10, gc_blobs=100_000)
QUICK = Scale(blob=1 << 26, rounds=1, small_seconds=0.5, memory_connections=50, memory_seconds=2, gc_blobs=1000)
