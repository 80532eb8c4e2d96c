"""A file that grows while it is hashed: what a download and an upload under way have in common."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import define, field

from dockerproxy.store.files import write_all

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK_SIZE = 1024 * 1024


@define(eq=False)
class HashedAppendFile:
    """An open file of `size` bytes, and the hash of its first `hashed` ones.

    One method runs at a time, in whatever thread. Those that read or write block, and raise `OSError`.
    """

    size: int
    _fd: int
    _hasher: _Hash
    hashed_size: int = field(default=0, init=False)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write `chunks` after what is there, and hash them unless something before them is not hashed yet.

        Where that fails (a full disk), nothing of them is kept, and it may be tried again.
        """
        hasher = self._hasher.copy() if self.hashed_size == self.size else None
        end = self.size
        try:
            for chunk in chunks:
                # Hashed at once, while it is in the processor's cache: all of a MiB written first takes a tenth longer.
                end += write_all(self._fd, [chunk], end)
                if hasher is not None:
                    hasher.update(chunk)
        except OSError:
            # What reached the disk is cut off, or a resume would hash what no one was told of.
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        if hasher is not None:
            self._hasher, self.hashed_size = hasher, end
        self.size = end

    def hasher_copy(self) -> _Hash:
        """Return a copy of the hash of all that is there, e.g. to try bytes that are not appended yet."""
        self._require_hashed()
        return self._hasher.copy()

    def rehash(self, algorithm: str | None = None) -> None:
        """Hash all that is there anew, with another `algorithm` if one is given. A GiB takes about a second."""
        hasher, offset = hashlib.new(algorithm or self._hasher.name), 0
        buffer = bytearray(min(_CHUNK_SIZE, self.size))
        while offset < self.size:
            length = os.preadv(self._fd, [buffer], offset)
            if not length:
                break
            hasher.update(memoryview(buffer)[:length])
            offset += length
        # Shorter than it was: somebody else's hand. What is left is what there is.
        self.size = offset
        self._hasher, self.hashed_size = hasher, offset

    def _require_hashed(self) -> None:
        if self.hashed_size != self.size:
            raise RuntimeError("what is there already has to be hashed first")
