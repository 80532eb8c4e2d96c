"""The quarantine of a store, to which `check` moves blobs that do not match their digest (see `scrub`)."""

from __future__ import annotations

from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout, digest_from_names
from dockerproxy.store.tree_reader import list_names


def count_damaged(layout: Layout) -> int:
    """Return how many blobs are in quarantine, and were not replaced since. Blocks."""
    blobs = Blobs(layout, durable=False)
    names = {name.partition(".")[0].partition("-") for name in list_names(layout.damaged)}
    digests = (digest_from_names(algorithm, encoded) for algorithm, _, encoded in names)
    return sum(digest is not None and not blobs.exists(digest) for digest in digests)
