"""How much is done: the full run, and a quick one that only shows that everything works."""

from __future__ import annotations

from attrs import frozen

SMALL_BLOBS = (1536, 65536)
"""Bytes of two small blobs: an image's configuration, say, and a small layer."""


@frozen(kw_only=True)
class Scale:
    """Sizes are in bytes, times in seconds."""

    rounds: int
    """How often everything is measured, but for what says otherwise; medians are shown."""
    large_blob: int
    seconds: float
    """How long a load of small requests or of new connections goes on."""
    slow_rate: int
    """Bytes a second of the registry that is slow."""
    joined_blob: int
    """Bytes of the blob that clients join who come while it is fetched."""
    herd_clients: int
    """Clients that come at the same moment, ..."""
    herd_blob: int
    """... and bytes of the blob that they ask for."""
    cold_blobs: int
    """Small blobs that are fetched one by one, in each round."""
    new_hosts: int
    """Hosts that nobody connected to before, in each round."""
    memory_connections: int
    memory_seconds: float
    memory_rounds: int
    image_layers: int
    """Of the image that is copied."""
    gc_blobs: int
    """Blobs that a garbage collector looks through, once."""


FULL = Scale(
    rounds=5,
    large_blob=1 << 30,
    seconds=2,
    slow_rate=25_000_000,
    joined_blob=1 << 30,
    herd_clients=1000,
    herd_blob=1 << 23,
    cold_blobs=50,
    new_hosts=20,
    memory_connections=1000,
    memory_seconds=5,
    memory_rounds=5,
    image_layers=200,
    gc_blobs=100_000,
)
QUICK = Scale(
    rounds=1,
    large_blob=1 << 26,
    seconds=0.5,
    slow_rate=25_000_000,
    joined_blob=1 << 26,
    herd_clients=50,
    herd_blob=1 << 20,
    cold_blobs=5,
    new_hosts=5,
    memory_connections=50,
    memory_seconds=2,
    memory_rounds=1,
    image_layers=200,
    gc_blobs=1000,
)
