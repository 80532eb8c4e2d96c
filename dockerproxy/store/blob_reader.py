"""Reader that sends a stored blob to an HTTP client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dockerproxy.concurrency import in_thread
from dockerproxy.store.blobs import OpenBlob


class StoredBlobReader:
    """An `oci.content.Content` over an open blob on disk. Closing it calls `on_close` once."""

    __slots__ = ("_blob", "_on_close", "_reactor", "size")

    def __init__(self, reactor: Any, blob: OpenBlob, on_close: Callable[[], None] | None = None) -> None:
        self._reactor = reactor
        self._blob = blob
        self._on_close = on_close
        self.size: int | None = blob.size

    async def read(self, offset: int, max_bytes: int) -> bytes | bytearray:
        """Return 1 to `max_bytes` bytes from `offset`, or ``b""`` at the end of the blob."""
        data = self._blob.read(offset, max_bytes)
        return data if data is not None else await in_thread(self._reactor, self._blob.read_blocking, offset, max_bytes)

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        """Return the file descriptor and the number of bytes to send from it.

        If these bytes are not in the page cache, read them in a thread first: sendfile(2) would block the reactor.
        """
        size = max(0, min(max_bytes, self._blob.size - offset))
        if size and not self._blob.is_cached(offset, size):
            await in_thread(self._reactor, self._blob.read_blocking, offset, size)
        return self._blob.fd, size

    async def wait_verified(self) -> None:
        """Return at once, because every stored blob has been verified."""

    def close(self) -> None:
        """Close the blob. A second call does nothing."""
        self._blob.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
