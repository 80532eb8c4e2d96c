"""Readers of blobs that are being downloaded. They read the growing file; if that fails, directly from upstream.

If the client has asked for a range far ahead of the growing file, they read that by a request of its own (`ahead`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, race
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.ahead import MAX_RANGES, MAX_WAIT, AheadRange, merge_close
from dockerproxy.cache.download_state import Download, DownloadState
from dockerproxy.cache.resumable import ResumableGet
from dockerproxy.cache.upstream import UpstreamRepository
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import RegistryError, ServiceOverloaded, UpstreamBroken, UpstreamError
from dockerproxy.oci.content import BytesLike
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.store.blobs import read_blocking, read_cached

if TYPE_CHECKING:
    from hashlib import _Hash

WITHHELD_BYTES = 1
"""Bytes at the end of a blob that are withheld until it is verified, so that no client completes a corrupt blob."""

log = Logger()


class BlobReader:
    """Content of a blob that is being downloaded, readable from any offset. Each client has its own reader.

    Closing it calls `on_close` once.
    """

    def __init__(
        self,
        reactor: Any,
        download: Download,
        fd: int,
        repository: UpstreamRepository,
        on_close: Callable[[BlobReader], None],
        client: str = "",
    ) -> None:
        self._reactor = reactor
        self._download = download
        self._on_close: Callable[[BlobReader], None] | None = on_close
        self._is_reading_in_thread = False
        self._given_up = False
        self.fd = fd
        self._repository = repository
        self._client = client
        self._expected: list[ByteRange] = []  # that may be fetched ahead
        self._ahead: AheadRange | None = None  # that is being read
        self._used_ahead: list[AheadRange] = []
        self._waited_for: ByteRange | None = None  # that was expected to be downloaded soon
        self._direct_reader: _DirectReader | None = None
        self.digest = download.digest

    @property
    def size(self) -> int | None:
        """The blob's size in bytes; None while it is unknown."""
        return self._download.size

    @property
    def failure(self) -> Exception | None:
        """The reason why the blob is not stored, if its download has failed."""
        return self._download.failure

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        """Fetch those of `ranges` by themselves that are far ahead when they are read.

        If they are all of the blob, its end has to wait for the verification, as in any other response.
        """
        merged = merge_close(ranges)
        if len(merged) <= MAX_RANGES and sum(byte_range.size for byte_range in ranges) != self.size:
            self._expected = merged

    async def read(self, offset: int, at_most: int) -> BytesLike:
        """Return one or more bytes from `offset` on; ``b""`` at the end. Raise `UpstreamError`."""
        download = self._download
        while True:
            for used in self._used_ahead:
                if used.failure is not None:
                    raise used.failure
            available = min(download.readable - offset, at_most)
            if available > 0:
                return download.read_tail(offset, available) or await self._read_file(offset, available)
            if download.state is DownloadState.COMMITTED:
                return b""
            if download.state is DownloadState.FAILED:
                return await self._read_direct(offset, at_most)
            if self._expected or self._ahead is not None:
                data = await self._read_ahead(offset, at_most)
                if data:
                    return data
                if self._is_reached(offset) or download.state.is_end:  # meanwhile
                    continue
            await download.wait_changed()

    async def sendfile_source(self, offset: int, at_most: int) -> tuple[int, int] | None:
        """Return None, because the blob is still arriving."""
        return None

    async def wait_verified(self) -> None:
        """Wait until the download has ended. Raise `UpstreamError` if it failed upstream."""
        download = self._download
        while not download.state.is_end:
            await download.wait_changed()
        if isinstance(download.failure, UpstreamError):
            raise download.failure

    def give_up(self) -> bool:
        """Close the file now, so that the next read fails. Return False if a thread is reading it."""
        if self._is_reading_in_thread:
            return False
        self._given_up = True
        self._close_file()
        return True

    def close(self) -> None:
        """Close the descriptor, and the upstream connection if this reader has one. A second call does nothing."""
        self._close_file()
        self._close_ahead()
        if self._direct_reader is not None:
            self._direct_reader.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self)

    def _close_file(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    async def _read_file(self, offset: int, size: int) -> bytes | bytearray:
        if self._given_up:
            raise ServiceOverloaded(f"{self.digest} was evicted while a slow client read it; try again")
        data: bytes | bytearray | None = read_cached(self.fd, offset, size)
        if data is None:
            data = await self._read_in_thread(offset, size)
        if not data:
            # Another program truncated the file. This must not look like the end of the blob.
            raise UpstreamBroken(f"the partial download of {self.digest} was truncated by another program")
        return data

    async def _read_in_thread(self, offset: int, size: int) -> bytes:
        self._is_reading_in_thread = True
        try:
            return await in_thread(self._reactor, read_blocking, self.fd, offset, size)
        finally:
            self._is_reading_in_thread = False

    async def _read_ahead(self, offset: int, at_most: int) -> bytes:
        """Return bytes from `offset` on that were fetched by themselves; ``b""`` if the download has to be waited for.

        They are not waited for any longer than the download.
        """
        ahead = self._find_ahead(offset)
        if ahead is None and self._waited_for is not (expected := self._find_expected(offset)):
            # The download may be fast enough. If it is not, or stops, the range is fetched after all.
            self._waited_for = expected
            timeout = deferLater(self._reactor, MAX_WAIT, bytes)
            await race([timeout, Deferred.fromCoroutine(self._wait_readable(offset))])
            if not self._is_reached(offset):
                ahead = self._find_ahead(offset)
        if ahead is None:
            return b""
        reading = Deferred.fromCoroutine(self._try_read_ahead(ahead, offset, at_most))
        index, data = await race([reading, Deferred.fromCoroutine(self._wait_readable(offset))])
        if index or not data:
            self._close_ahead()
            return b""
        return data

    async def _try_read_ahead(self, ahead: AheadRange, offset: int, at_most: int) -> bytes:
        try:
            return await ahead.read(offset, at_most)
        except RegistryError as error:
            log.info(
                "a client waits for byte {offset} of {digest}, which {registry} did not send by itself: {reason}",
                digest=str(self.digest),
                offset=offset,
                registry=str(self._repository.registry),
                reason=error.message,
            )
            return b""

    async def _wait_readable(self, offset: int) -> bytes:
        while not self._is_reached(offset):
            await self._download.wait_changed()
        return b""

    def _is_reached(self, offset: int) -> bool:
        """Return whether the download has the byte at `offset`, or will not have it because of upstream.

        If the blob can only not be stored, a range ahead is still the fastest way to this byte.
        """
        download = self._download
        has_failed = download.state is DownloadState.FAILED and isinstance(download.failure, UpstreamError)
        return has_failed or download.state is DownloadState.COMMITTED or download.readable > offset

    def _find_ahead(self, offset: int) -> AheadRange | None:
        """Return the open range that has the byte at `offset`. Start to fetch it if it is far ahead."""
        if self._ahead is not None and self._ahead.span.start <= offset < self._ahead.span.stop:
            return self._ahead
        expected = self._find_expected(offset)
        if expected is None:
            return None
        span, has_waited = ByteRange(offset, expected.stop), self._waited_for is expected
        ahead = self._download.fetch_ahead(span, self._repository, self._client, has_waited=has_waited)
        if ahead is not None:
            self._close_ahead()
            self._expected.remove(expected)  # it is requested once, even if that fails
            self._ahead = ahead
            self._used_ahead.append(ahead)
        return ahead

    def _find_expected(self, offset: int) -> ByteRange | None:
        return next((span for span in self._expected if span.start <= offset < span.stop), None)

    def _close_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    async def _read_direct(self, offset: int, at_most: int) -> BytesLike:
        """Read from upstream if the ingest failed. If upstream itself failed, raise its error for this reader, too."""
        failure = self._download.failure
        if isinstance(failure, UpstreamError):
            raise failure
        ahead = self._find_ahead(offset)
        if ahead is not None:
            data = await self._try_read_ahead(ahead, offset, at_most)
            if data:
                return data
            self._close_ahead()
        if self._direct_reader is None:
            withheld = self._download.written - self._download.readable
            tail = bytes(await self._read_file(self._download.readable, withheld)) if withheld else b""
            self._direct_reader = _DirectReader(
                self.digest, *self._download.detach_reader(self._repository), self._download.readable, tail
            )
        return await self._direct_reader.read(offset, at_most)


class _DirectReader:
    """Reads the rest of a blob from upstream for one reader, and verifies its digest."""

    def __init__(self, digest: Digest, source: ResumableGet, hasher: _Hash, start: int, buffer: bytes) -> None:
        self._digest = digest
        self._source = source
        self._hasher = hasher
        self._start = start  # offset of `_buffer` in the blob
        self._buffer = buffer  # received, but withheld or not requested yet
        self._verified = False

    async def read(self, offset: int, at_most: int) -> bytes:
        """Return bytes from `offset` on. Raise `UpstreamBroken` if they are behind, because none are kept."""
        if offset < self._start:
            raise UpstreamBroken(
                f"{self._digest} cannot be stored now, so its ranges can be read in ascending order only; try again"
            )
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
            self._source.report_mismatch()
            raise UpstreamBroken(f"upstream returned content that does not match {self._digest}")
        else:
            self._verified = True

    def close(self) -> None:
        self._source.abort()
