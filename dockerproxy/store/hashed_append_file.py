"""Append-only file with an incremental hash: the base class of downloads (`Ingest`) and uploads (`Upload`)."""

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
    """An open file of `size` bytes, and the hash of its first `hashed_size` bytes.

    Only one method may run at a time, in any thread. Methods that read or write block, and raise `OSError`.
    """

    size: int
    _fd: int
    _hasher: _Hash
    hashed_size: int = field(default=0, init=False)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Append `chunks`. Hash them too if all bytes before them are hashed.

        If it fails (such as a full disk), the file has its old size, and the caller may try again.
        """
        hasher = self._hasher.copy() if self.hashed_size == self.size else None
        end = self.size
        try:
            for chunk in chunks:
                # Hash the chunk now, while it is in the CPU cache. Writing a MiB before hashing it takes 10 % longer.
                end += write_all(self._fd, [chunk], end)
                if hasher is not None:
                    hasher.update(chunk)
        except OSError:
            # Cut off the bytes that reached the disk. A resumed download or upload would count them otherwise.
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        if hasher is not None:
            self._hasher, self.hashed_size = hasher, end
        self.size = end

    def hasher_copy(self) -> _Hash:
        """Return a copy of the hash of the whole file. Callers use it to check more bytes before they append them."""
        self._require_hashed()
        return self._hasher.copy()

    def rehash(self, algorithm: str | None = None) -> None:
        """Hash the whole file again, with another `algorithm` if one is given. A GiB takes about a second."""
        hasher, offset = hashlib.new(algorithm or self._hasher.name), 0
        buffer = bytearray(min(_CHUNK_SIZE, self.size))
        while offset < self.size:
            length = os.preadv(self._fd, [buffer], offset)
            if not length:
                break
            hasher.update(memoryview(buffer)[:length])
            offset += length
        # The file may be shorter than `size` if something else truncated it. Use the actual size.
        self.size = offset
        self._hasher, self.hashed_size = hasher, offset

    def _require_hashed(self) -> None:
        if self.hashed_size != self.size:
            raise RuntimeError(f"only {self.hashed_size} of {self.size} bytes are hashed; call rehash() first")
