"""A blob under way as one reader has it: out of the growing file, and where that cannot go on, from upstream."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dockerproxy.cache.resumable import ResumableGet
from dockerproxy.cache.upstream import UpstreamRepository
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import UpstreamBroken, UpstreamError
from dockerproxy.oci.content import BytesLike
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import read_blocking, read_cached

if TYPE_CHECKING:
    from hashlib import _Hash

    from dockerproxy.cache.downloads import BlobDownload

WITHHELD_BYTES = 1
"""Bytes at the end of a blob that no reader gets before it is verified: without them no client takes it for whole."""


class BlobReader:
    """A blob under way, read from any offset; each reader has one of its own."""

    def __init__(self, reactor: Any, download: BlobDownload, fd: int, repository: UpstreamRepository) -> None:
        self._reactor = reactor
        self._download = download
        self._fd = fd
        self._repository = repository
        self._direct_reader: _DirectReader | None = None
        self.digest = download.digest

    @property
    def size(self) -> int | None:
        """The blob's length in bytes, or None while nobody knows it."""
        return self._download.size

    async def read(self, offset: int, at_most: int) -> BytesLike:
        """Return bytes from `offset` on, at least one; ``b""`` at the end. Raise `UpstreamError`."""
        download = self._download
        while True:
            available = min(download.readable - offset, at_most)
            if available > 0:
                return download.tail.get(offset, available) or await self._read_file(offset, available)
            if download.committed:
                return b""
            if download.failure is not None:
                return await self._read_direct(offset, at_most)
            await download.wait_changed()

    async def sendfile_source(self, offset: int, at_most: int) -> tuple[int, int] | None:
        """Return None: it is still arriving."""
        return None

    async def wait_verified(self) -> None:
        """Wait until the flight has ended; raise where the content cannot be had."""
        download = self._download
        while not download.committed and download.failure is None:
            await download.wait_changed()
        if isinstance(download.failure, UpstreamError):
            raise download.failure

    def close(self) -> None:
        """Give back the descriptor, and any connection of this reader's own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._direct_reader is not None:
            self._direct_reader.close()

    async def _read_file(self, offset: int, size: int) -> bytes | bytearray:
        data: bytes | bytearray | None = read_cached(self._fd, offset, size)
        if data is None:
            data = await in_thread(self._reactor, read_blocking, self._fd, offset, size)
        if not data:
            # Cut off by another's hand. It must not look like the blob's end.
            raise UpstreamBroken(f"what was received of {self.digest} is gone")
        return data

    async def _read_direct(self, offset: int, at_most: int) -> BytesLike:
        """Go on without the flight where that has stranded; where upstream has failed it, so it has this reader."""
        failure = self._download.failure
        if isinstance(failure, UpstreamError):
            raise failure
        if self._direct_reader is None:
            withheld = self._download.written - self._download.readable
            tail = bytes(await self._read_file(self._download.readable, withheld)) if withheld else b""
            self._direct_reader = _DirectReader(
                self.digest, *self._download.detach_reader(self._repository), self._download.readable, tail
            )
        return await self._direct_reader.read(offset, at_most)


class _DirectReader:
    """The end of a blob, straight from upstream for one reader, checked as it passes."""

    def __init__(self, digest: Digest, source: ResumableGet, hasher: _Hash, start: int, buffer: bytes) -> None:
        self._digest = digest
        self._source = source
        self._hasher = hasher
        self._start = start  # of `_tail` in the blob
        self._buffer = buffer  # what was read, and is held back or not asked for yet
        self._verified = False

    async def read(self, offset: int, at_most: int) -> bytes:
        """Return bytes from `offset` on, which only ever grows."""
        while True:
            if offset > self._start:
                drop = min(offset - self._start, len(self._buffer))
                self._buffer, self._start = self._buffer[drop:], self._start + drop
            available = len(self._buffer) - (0 if self._verified else WITHHELD_BYTES)
            if offset == self._start and available > 0:
                return self._buffer[: min(available, at_most)]
            if self._verified:
                return b""
            await self._fetch()

    async def _fetch(self) -> None:
        pieces = await self._source.read()
        if pieces:
            data = b"".join(pieces)
            self._hasher.update(data)
            self._buffer += data
        elif self._hasher.hexdigest() != self._digest.hex:
            raise UpstreamBroken(f"upstream sent content that is not {self._digest}")
        else:
            self._verified = True

    def close(self) -> None:
        self._source.abort()
