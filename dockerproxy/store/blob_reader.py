"""Reader that sends a stored blob to an HTTP client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.logger import Logger

from dockerproxy.concurrency import in_thread
from dockerproxy.errors import ServiceOverloaded, StorageFailed
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.store.blobs import OpenBlob

log = Logger()


class StoredBlobReader:
    """An `oci.content.Content` over an open blob on disk. Closing it calls `on_close` once.

    After an error of the disk, `failure` is set, and `read` and `sendfile_source` raise `StorageFailed`.
    """

    __slots__ = ("_blob", "_is_reading_in_thread", "_on_close", "_reactor", "failure", "size")

    def __init__(
        self, reactor: Any, blob: OpenBlob, on_close: Callable[[StoredBlobReader], None] | None = None
    ) -> None:
        self._reactor = reactor
        self._blob = blob
        self._on_close = on_close
        self._is_reading_in_thread = False
        self.failure: OSError | None = None
        self.size: int | None = blob.size

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        """Do nothing, because everything can be read at once."""

    async def read(self, offset: int, max_bytes: int) -> bytes | bytearray:
        """Return 1 to `max_bytes` bytes from `offset`, or ``b""`` at the end of the blob.

        Raise `ServiceOverloaded` after `give_up`, and `StorageFailed`.
        """
        self._require_open()
        data = self._blob.read(offset, max_bytes)
        return data if data is not None else await self._read_in_thread(offset, max_bytes)

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        """Return the file descriptor and the number of bytes to send from it. Raise as `read` does.

        If these bytes are not in the page cache, read them in a thread first: sendfile(2) would block the reactor.
        """
        self._require_open()
        size = max(0, min(max_bytes, self._blob.size - offset))
        if size and not self._blob.is_cached(offset, size):
            await self._read_in_thread(offset, size)
        return self._blob.fd, size

    async def wait_verified(self) -> None:
        """Return at once, because every stored blob has been verified."""

    @property
    def digest(self) -> Digest:
        return self._blob.digest

    @property
    def fd(self) -> int:
        """The descriptor of the file; -1 if it is closed."""
        return self._blob.fd

    def give_up(self) -> bool:
        """Close the file now, so that the next read fails. Return False if a thread is reading it."""
        if self._is_reading_in_thread:
            return False
        self._blob.close()
        return True

    def close(self) -> None:
        """Close the blob. A second call does nothing."""
        self._blob.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self)

    def _require_open(self) -> None:
        if self._blob.fd < 0:
            raise ServiceOverloaded(f"{self._blob.digest} was evicted while a slow client read it; try again")

    async def _read_in_thread(self, offset: int, size: int) -> bytes:
        self._is_reading_in_thread = True
        try:
            return await in_thread(self._reactor, self._blob.read_blocking, offset, size)
        except OSError as error:
            self.failure = error
            log.error(
                "cannot read {digest} at byte {offset}: {reason}",
                digest=str(self.digest),
                offset=offset,
                reason=error.strerror,
            )
            raise StorageFailed(f"the proxy cannot read {self.digest} from its disk: {error.strerror}") from error
        finally:
            self._is_reading_in_thread = False
