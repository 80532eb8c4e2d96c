"""Sizes and durations of a run: the full one, and a quick one that only checks that everything works."""

from __future__ import annotations

from attrs import frozen

SMALL_BLOBS = (1536, 65536)
"""Bytes of two small blobs, the size of an image's configuration and of a small layer."""


@frozen(kw_only=True)
class Scale:
    """Sizes are in bytes, times in seconds."""

    rounds: int
    """Number of rounds. The medians are shown. Benchmarks with another number of rounds say so."""
    large_blob: int
    seconds: float
    """Duration of a load of small requests or of new connections."""
    slow_rate: int
    """Bytes per second from the slow repository."""
    joined_blob: int
    """Bytes of the blob that many clients download together."""
    herd_clients: int
    """Number of clients that send their requests at the same time."""
    herd_blob: int
    """Bytes of the blob that these clients request."""
    cold_blobs: int
    """Number of small blobs that are fetched one by one, in each round."""
    new_hosts: int
    """Number of hosts that have no leaf certificate yet, in each round."""
    memory_connections: int
    memory_seconds: float
    memory_rounds: int
    image_layers: int
    """Number of layers in the image that is copied."""
    gc_blobs: int
    """Number of blobs in the tree for the garbage collection, which is measured once."""
    repositories: int
    """Number of repositories in the bucket of which the catalogue is listed."""


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
    repositories=1000,
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
    repositories=20,
)
