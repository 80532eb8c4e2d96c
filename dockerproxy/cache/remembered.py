"""Manifests that were read from the store a moment ago: the nodes of a fleet ask for the same ones, all at once."""

from __future__ import annotations

from collections.abc import Callable

from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.names import Digest

_MEMORY_TTL = 30.0  # seconds; reading it again dates its last use, and finds the media type that another process wrote
_MEMORY_MAX_MANIFEST = 256 * 1024  # bytes of a manifest; those of images have some KiB
_MEMORY_MAX_TOTAL = 4 * 1024 * 1024  # bytes of all
_MEMORY_ENTRY_OVERHEAD = 1024  # bytes that an entry takes besides its content, about


class ManifestMemoryCache:
    """Manifests by repository and digest, for a while. `clock` is in seconds.

    That a repository has a manifest is not remembered: what was removed has to be gone at once, in all processes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, Digest], tuple[float, ManifestResponse]] = {}  # the oldest first
        self._size = 0

    def get(self, key: str, digest: Digest) -> ManifestResponse | None:
        """Return what was added a short while ago, None where nothing was."""
        entry = self._entries.get((key, digest))
        if entry is None:
            return None
        if not 0 <= self._clock() - entry[0] < _MEMORY_TTL:  # or the clock was set back
            self.remove(key, digest)
            return None
        return entry[1]

    def add(self, key: str, manifest: ManifestResponse) -> None:
        """Remember an answer with its content, unless that is unusually large."""
        self.remove(key, manifest.digest)
        if manifest.size > _MEMORY_MAX_MANIFEST:
            return
        self._entries[key, manifest.digest] = self._clock(), manifest
        self._size += manifest.size + _MEMORY_ENTRY_OVERHEAD
        while self._size > _MEMORY_MAX_TOTAL:
            self.remove(*next(iter(self._entries)))

    def remove(self, key: str, digest: Digest) -> None:
        """Forget a manifest."""
        entry = self._entries.pop((key, digest), None)
        if entry is not None:
            self._size -= entry[1].size + _MEMORY_ENTRY_OVERHEAD
