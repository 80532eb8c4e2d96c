"""The contents of a store for those that only look: nothing here counts as a use of what it reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from attrs import field, frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.tree_reader import Missing, TreeReader, UnsafeFile

T = TypeVar("T")
R = TypeVar("R")


@frozen
class Contents:
    """The contents in `layout`, as `reader` sees them. All methods block. Only regular files count."""

    _layout: Layout
    _reader: TreeReader = field(factory=TreeReader)

    def status(self, digest: Digest) -> os.stat_result | None:
        """Return the size and the last use of a content, or None if it does not exist."""
        try:
            status = self._reader.stat(self._layout.blob(digest))
        except (*Missing, UnsafeFile):
            return None
        return status if stat.S_ISREG(status.st_mode) else None

    def size(self, digest: Digest) -> int | None:
        """Return the size of a content in bytes, or None if it does not exist."""
        status = self.status(digest)
        return None if status is None else status.st_size

    def exists(self, digest: Digest) -> bool:
        """Return whether the content exists."""
        return self.status(digest) is not None

    def read(self, digest: Digest, limit: int) -> bytes | None:
        """Return the first `limit` bytes of a content, or None if it does not exist."""
        return self._reader.read_small(self._layout.blob(digest), limit)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Do what `TreeReader.map` does."""
        return self._reader.map(function, items)
