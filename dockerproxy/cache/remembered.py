"""Manifests that were read from the store a moment ago: the nodes of a fleet ask for the same ones, all at once."""

from __future__ import annotations

from collections.abc import Callable

from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.names import Digest

_FRESH = 30.0  # seconds; reading it again dates its last use, and finds the media type that another process wrote
_LARGEST = 256 * 1024  # bytes of a manifest; those of images have some KiB
_MOST = 4 * 1024 * 1024  # bytes of all
_EACH = 1024  # bytes that an entry takes besides its content, about


class RememberedManifests:
    """Manifests by repository and digest, for a while. `clock` is in seconds.

    That a repository has a manifest is not remembered: what was removed has to be gone at once, in all processes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, Digest], tuple[float, ManifestAnswer]] = {}  # the oldest first
        self._size = 0

    def get(self, key: str, digest: Digest) -> ManifestAnswer | None:
        """Return what was added a short while ago, None where nothing was."""
        entry = self._entries.get((key, digest))
        if entry is None:
            return None
        if not 0 <= self._clock() - entry[0] < _FRESH:  # or the clock was set back
            self.forget(key, digest)
            return None
        return entry[1]

    def add(self, key: str, answer: ManifestAnswer) -> None:
        """Remember an answer with its content, unless that is unusually large."""
        self.forget(key, answer.digest)
        if answer.size > _LARGEST:
            return
        self._entries[key, answer.digest] = self._clock(), answer
        self._size += answer.size + _EACH
        while self._size > _MOST:
            self.forget(*next(iter(self._entries)))

    def forget(self, key: str, digest: Digest) -> None:
        """Forget a manifest."""
        entry = self._entries.pop((key, digest), None)
        if entry is not None:
            self._size -= entry[1].size + _EACH
