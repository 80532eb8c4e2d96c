"""A blob of a store as the HTTP face sends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dockerproxy.concurrency import in_thread
from dockerproxy.store.blobs import OpenBlob


class StoredBlobReader:
    """A whole blob on disk, open (`oci.contents.Content`); `closed` is called once it is closed."""

    __slots__ = ("_blob", "_on_close", "_reactor", "size")

    def __init__(self, reactor: Any, blob: OpenBlob, on_close: Callable[[], None] | None = None) -> None:
        self._reactor = reactor
        self._blob = blob
        self._on_close = on_close
        self.size: int | None = blob.size

    async def read(self, offset: int, max_bytes: int) -> bytes | bytearray:
        """Return bytes from `offset` on, at least one; ``b""`` at the end."""
        data = self._blob.read(offset, max_bytes)
        return data if data is not None else await in_thread(self._reactor, self._blob.read_blocking, offset, max_bytes)

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        """Return the descriptor, and how many bytes may be sent from it."""
        size = max(0, min(max_bytes, self._blob.size - offset))
        if size and not self._blob.is_cached(offset, size):
            await in_thread(self._reactor, self._blob.read_blocking, offset, size)
        return self._blob.fd, size

    async def wait_verified(self) -> None:
        """What is stored was verified."""

    def close(self) -> None:
        """Let go of it; a second time does nothing."""
        self._blob.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
