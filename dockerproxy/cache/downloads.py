"""Downloads of blobs from upstream. There is one download per digest, and any number of readers share it.

A `BlobDownload` writes one blob from upstream into an ingest file and hashes it on the way. Each reader has its own
descriptor and offset in that file, so that a slow or closed reader does not affect the others. The last byte becomes
readable only after digest and length have been verified, so no client ever completes a corrupt blob.

    upstream ──ResumableGet──► BlobDownload ──append, in a thread──► ingest file ──verify, rename──► blobs
                                   │ wakes                               │ pread
                                   └─────────► BlobReader (one per reader) ──► its client

If the file cannot be written further although upstream could continue, the download fails with `IngestFailed`. This
happens if the disk is full or the blob is larger than the cache. Each reader then fetches the rest directly from
upstream, from the byte at which the file ends, with a copy of the hash.

If another process already writes the file, the download is *foreign*: its readers read the same file. It ends when the
other process finishes. If that process dies, this one takes over the file and continues the download.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.ingests import DownloadInfo, Ingests
from dockerproxy.cache.reader import WITHHELD_BYTES, BlobReader
from dockerproxy.cache.resumable import PartialTooLong, ResumableGet
from dockerproxy.cache.space import CacheSpace
from dockerproxy.cache.upstream import RegistryClient, UpstreamPrincipal, UpstreamRepository
from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.errors import RegistryError, UpstreamBroken
from dockerproxy.oci.content import VERIFY_FIRST_SIZE
from dockerproxy.oci.names import Digest
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.ingest import ForeignIngest, Ingest

if TYPE_CHECKING:
    from hashlib import _Hash

# Maximum number of bytes that are hashed and written at a time. Each write costs 100 µs for the thread and for waking
# the readers; with half the size, each byte costs 9 % more CPU time. The first writes are smaller, so that readers get
# the beginning at once.
_MAX_WRITE_SIZE = 2 * 1024 * 1024
_MIN_PIECE_SIZE = 64 * 1024  # bytes; smaller pieces are read from the file, many at a time
_FSYNC_THRESHOLD = 64 * 1024 * 1024  # bytes; an NVMe disk needs 0.02 s for them
_POLL_INTERVAL = 0.01  # seconds between two checks of a foreign ingest
_LEND_TIMEOUT = 5.0  # seconds for which a failed download keeps its connection open for a reader
_INTERNAL_ERROR = "the download failed because of an internal error; see the log of docker-registry-proxy"

log = Logger()


OnVerified = Callable[[], Coroutine[Any, Any, None]]
"""Called when a blob has been verified, before its last byte becomes readable. Records the grant."""


class IngestFailed(Exception):
    """The ingest file cannot be completed, but upstream may still send the content."""


class BlobDownload:
    """The download of one blob, started for the first client that requested it, `principal`."""

    def __init__(
        self,
        reactor: Any,
        upstream: RegistryClient,
        principal: UpstreamPrincipal,
        digest: Digest,
        space: CacheSpace,
        ingests: Ingests,
        on_verified: OnVerified,
        sync_lock: DeferredLock,
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._space = space
        self._ingests = ingests
        self._on_verified = on_verified
        self._background_fsync = BackgroundFsync(reactor, sync_lock)
        self._principal = principal
        self._info: DownloadInfo | None = None
        self._waiters: list[Deferred[None]] = []
        # The partial file and its hash: the ingest, or the file that another process gave up.
        self._file: HashedAppendFile | None = None
        self._fd = -1  # of the ingest file; readers duplicate it, because the ingest closes its own in a thread
        self._reserved_size = -1  # bytes
        self._lent: ResumableGet | None = None  # after a failure: open, at the byte where the file ends
        self.repository = principal.repository
        self.digest = digest
        self.size: int | None = None  # of the whole blob, once it is known
        self.written = 0  # bytes in the ingest file
        self.tail = TailBuffer()  # the last of these bytes, in memory
        self.is_foreign = False  # whether another process downloads the blob
        self.started = False  # whether upstream has begun to send
        self.committed = False  # verified and published
        self.failure: Exception | None = None
        self.ended = False  # accepts no new readers

    async def run(self) -> None:
        """Download the blob into an ingest file. Do not raise, but set `failure`. The caller must then call `end`."""
        source = ResumableGet(self._reactor, self._upstream, self.repository, self.digest)
        try:
            await self._transfer(source)
        except Exception as error:
            self.failure = error
            self._log_failure(error)
        if isinstance(self.failure, IngestFailed) and source.is_open:
            self._lend_connection(source)
        else:
            source.abort()
        await self._release()

    def mark_started(self, info: DownloadInfo) -> None:
        """Record the response head and wake the callers of `wait_started`."""
        self.size = info.size
        self.started, self._info = True, info
        self._wake()

    def grow(self, size: int) -> None:
        """Record that the file now has `size` bytes, and wake the readers."""
        self.written = size
        self._wake()

    def end(self) -> None:
        """Wake all waiters and refuse new readers."""
        self.ended = True
        self.tail.clear()  # because a slow reader may keep this object alive for hours
        self._close_file()
        self._wake()

    async def wait_changed(self) -> None:
        """Wait until more is written or the download has ended."""
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        await waiter

    async def wait_started(self) -> None:
        """Wait until upstream has begun to send. Raise the error if it does not.

        A foreign download may be committed before this process has seen it start.
        """
        while not self.started and not self.ended:
            await self.wait_changed()
        if not self.started and not self.committed:
            raise self.failure if isinstance(self.failure, RegistryError) else RegistryError(_INTERNAL_ERROR)

    async def wait_size(self) -> None:
        """Wait until the size of the blob is known or the download has ended."""
        while self.size is None and not self.ended:
            await self.wait_changed()

    def serves(self, principal: UpstreamPrincipal, max_age: float) -> bool:
        """Return whether the upstream request of this download also decides for `principal`.

        It does if repository and identity are the same, and if the response is pending or less than `max_age` seconds
        old.
        """
        info = self._info
        if info is None:
            return (principal.repository, principal.identity) == (self.repository, self._principal.identity)
        age = self._reactor.seconds() - info.opened
        return (principal.repository.key, principal.identity) == (info.key, info.identity) and age < max_age

    @property
    def readable(self) -> int:
        """The number of bytes from the start that clients may get."""
        complete = self.size is None or self.written == self.size  # possibly, if the size is unknown
        return max(0, self.written - WITHHELD_BYTES) if complete and not self.committed else self.written

    def open_reader(self, repository: UpstreamRepository) -> BlobReader | None:
        """Return a reader, which would fetch the rest from `repository` if the ingest failed.

        Return None if the download has ended; the store then has the result. Raise `OSError` (too many open files).
        """
        if self.ended:
            return None
        return BlobReader(self._reactor, self, os.dup(self._fd) if self._fd >= 0 else -1, repository)

    def detach_reader(self, repository: UpstreamRepository) -> tuple[ResumableGet, _Hash]:
        """Return the upstream source of the remaining bytes, and the hash of the bytes before them."""
        hasher = self._file.hasher_copy() if self._file is not None else self.digest.hasher()
        lent, self._lent = self._lent, None
        if lent is not None:
            return lent, hasher
        source = ResumableGet(self._reactor, self._upstream, repository, self.digest, self.written)
        source.size = self.size
        return source, hasher

    async def _transfer(self, source: ResumableGet) -> None:
        ingest = await self._open_upstream(source)
        if self.committed:
            return
        info = DownloadInfo(source.size, self.repository.key, self._principal.identity, self._reactor.seconds())
        self.mark_started(info)
        if ingest is None:
            raise IngestFailed("cannot open the ingest file")
        if self.size is None or self.size > VERIFY_FIRST_SIZE:  # else it is served only when complete
            self._ingests.publish_info(self.digest, info)
        await self._reserve(self.written if self.size is None else self.size)
        while pieces := await source.read(min(_MAX_WRITE_SIZE, self.written)):
            await self._append(ingest, source, pieces)
            self._background_fsync.start_if_due(ingest)
        self.size = source.size
        if not ingest.verify():
            await in_thread(self._reactor, ingest.discard)
            raise UpstreamBroken(f"{self.repository.registry} returned content that does not match {self.digest}")
        verified_hook = spawn(self._on_verified(), f"recording the grant of {self.digest}")
        try:
            try:
                await self._background_fsync.finish(ingest)
            finally:
                await verified_hook  # first, because other processes check the grant as soon as they find the blob
            await self._space.commit(ingest)
        except OSError as error:
            raise IngestFailed(f"cannot commit the file: {error.strerror}") from error
        self.committed = True

    async def _open_upstream(self, source: ResumableGet) -> Ingest | None:
        """Acquire the ingest, and open `source` at the byte where the partial file ends.

        Return None if there is no file to write to, or if another process has committed the blob (`committed`).
        """
        while True:
            ingest = await self._acquire_ingest()
            if self.committed:
                return None
            source.offset, source.size = self.written, self.size
            try:
                await source.open()
            except PartialTooLong:
                pass
            else:
                if ingest is None or not self.written or self.written != source.size or ingest.verify():
                    return ingest
            # The partial file is not the beginning of this blob. The loop ends, because the file is empty next time.
            log.warn(
                "discarded the partial download of {digest}: it does not match, restarting at byte 0",
                digest=str(self.digest),
            )
            assert ingest is not None
            source.abort()
            self._close_file()
            await in_thread(self._reactor, ingest.discard)
            if self.started:  # by another process that died: readers already have some of its bytes
                raise UpstreamBroken(f"{self.repository.registry} returned content that does not match {self.digest}")

    async def _acquire_ingest(self) -> Ingest | None:
        """Return the ingest, including the partial content of an earlier run or of a process that has died.

        Return None if the file cannot be opened, or if the blob is already `committed`.
        """
        self._file, self.written, self.is_foreign = None, 0, False
        ingest: Ingest | ForeignIngest | None = None
        try:
            ingest = await in_thread(self._reactor, self._ingests.acquire, self.digest)
            if isinstance(ingest, ForeignIngest):
                self._fd = os.dup(ingest.fd)
                ingest = await self._follow_foreign(ingest)
                if ingest is None and not self._ingests.is_published(self.digest):
                    self._close_file()
                    return await self._acquire_ingest()
            elif ingest is not None:
                self._fd = ingest.reader()
            if ingest is None:
                self.committed = True
                return None
            self._ingests.remove_info(self.digest)
            if ingest.size:
                await in_thread(self._reactor, ingest.rehash)
        except OSError as error:
            log.error(
                "cannot open the ingest file for {digest}: {reason}", digest=str(self.digest), reason=error.strerror
            )
            if isinstance(ingest, Ingest):
                ingest.release()
            self._close_file()
            return None
        self._file, self.written = ingest, ingest.size
        return ingest

    async def _follow_foreign(self, foreign: ForeignIngest) -> Ingest | None:
        """Follow the ingest of another process. Return the ingest if that process died.

        Return None if the blob was published, or if it was given up before a reader here got any of it.
        """
        self.is_foreign = True
        ingest = await _follow_ingest(self._reactor, self, self._ingests, foreign)
        if ingest is None and self.started and not self._ingests.is_published(self.digest):
            # It is unknown whether the content was wrong or the disk full. The readers' hash decides.
            self._file = HashedAppendFile(self.written, self._fd, self.digest.hasher())
            await in_thread(self._reactor, self._file.rehash)
            raise IngestFailed("another process gave up the download")
        self.is_foreign = ingest is None
        return ingest

    async def _reserve(self, size: int) -> None:
        """Reserve cache space for `size` bytes of the blob. Raise `IngestFailed`."""
        if size <= self._reserved_size:
            return
        try:
            granted = await self._space.reserve(self.digest, size, self.written)
        except OSError as error:
            raise IngestFailed(f"cannot reserve {size} bytes of cache space: {error.strerror}") from error
        if not granted:
            raise IngestFailed(f"no cache space for {size} bytes; check CACHE_MAX_SIZE and the free disk space")
        self._reserved_size = size

    async def _append(self, ingest: Ingest, source: ResumableGet, pieces: list[bytes]) -> None:
        end = self.written + sum(map(len, pieces))
        try:
            await self._reserve(end if source.size is None else source.size)
            await in_thread(self._reactor, ingest.append, pieces)
        except OSError as error:
            source.unread(pieces)
            raise IngestFailed(f"cannot write the file: {error.strerror}") from error
        except IngestFailed:
            source.unread(pieces)
            raise
        self.tail.add(self.written, pieces)
        self.grow(end)

    async def _release(self) -> None:
        """Release the cache space and the ingest file. The next download continues with the partial file.

        After a local failure, delete the partial file: a retry would fail in the same way, and the file may be what
        fills the disk.
        """
        ingest = self._file if isinstance(self._file, Ingest) else None
        try:
            if ingest is None:
                return
            self._ingests.remove_info(self.digest)
            try:
                if isinstance(self.failure, IngestFailed):
                    await in_thread(self._reactor, ingest.discard)
            finally:
                ingest.release()
                self._space.release(self.digest)
        except Exception:
            log.failure("cleaning up after the download of {digest} failed", digest=str(self.digest))

    def _lend_connection(self, source: ResumableGet) -> None:
        """Keep the open connection for _LEND_TIMEOUT seconds, for the first reader that continues directly."""
        self._lent = source
        self._reactor.callLater(_LEND_TIMEOUT, self._close_lent)

    def _close_lent(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.abort()

    def _log_failure(self, error: Exception) -> None:
        if isinstance(error, RegistryError):
            reason = error.message
        elif isinstance(error, IngestFailed):
            reason = str(error)
        else:
            log.failure("download of {digest} failed", digest=str(self.digest))
            return
        log.warn(
            "{digest} from {key} was not cached: {reason}",
            digest=str(self.digest),
            key=self.repository.key,
            reason=reason,
        )

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(None)


class Downloads:
    """The active downloads, by digest."""

    def __init__(self, reactor: Any, upstream: RegistryClient, space: CacheSpace, ingests: Ingests) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._space = space
        self._ingests = ingests
        self._sync_lock = DeferredLock()
        self._downloads: dict[Digest, BlobDownload] = {}

    def get(self, digest: Digest) -> BlobDownload | None:
        """Return the active download of `digest`, if any."""
        return self._downloads.get(digest)

    def start(self, principal: UpstreamPrincipal, digest: Digest, on_verified: OnVerified) -> BlobDownload:
        """Start to download `digest` for `principal`. The download continues even if all readers close."""
        download = self._downloads[digest] = BlobDownload(
            self._reactor, self._upstream, principal, digest, self._space, self._ingests, on_verified, self._sync_lock
        )
        spawn(self._run(download), f"the download of {digest}")
        return download

    async def _run(self, download: BlobDownload) -> None:
        try:
            await download.run()
        finally:
            del self._downloads[download.digest]
            download.end()


async def _follow_ingest(
    reactor: Any, download: BlobDownload, ingests: Ingests, foreign: ForeignIngest
) -> Ingest | None:
    """Pass the progress of a foreign ingest on to the readers of `download`, until that ingest ends.

    Return the ingest if the other process died; None if it published the blob or gave it up. Raise `UpstreamBroken` if
    it removed bytes that readers already have.
    """
    ingest = None
    try:
        while foreign.in_progress and (ingest := foreign.try_take_over()) is None:
            _update_from(download, ingests, foreign)
            await deferLater(reactor, _POLL_INTERVAL)
        _update_from(download, ingests, foreign)
    except BaseException:
        if ingest is not None:
            ingest.release()
        raise
    finally:
        if ingest is None:
            foreign.close()
    return ingest


def _update_from(download: BlobDownload, ingests: Ingests, foreign: ForeignIngest) -> None:
    if not download.started and (info := ingests.read_info(download.digest)) is not None:
        download.mark_started(info)
    size = foreign.size
    if size < download.written:
        # The readers cannot continue, because this process has not hashed the bytes that they have.
        raise UpstreamBroken(f"another process discarded its partial download of {download.digest}")
    if size > download.written:
        download.grow(size)


class TailBuffer:
    """The pieces of the last two writes. They serve readers that are close behind the download."""

    def __init__(self) -> None:
        self._previous_write: list[tuple[int, bytes]] = []
        self._last_write: list[tuple[int, bytes]] = []

    def add(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Add `pieces`, which were written at `offset`. Drop those of the write before the last."""
        self._previous_write, self._last_write = self._last_write, []
        for piece in pieces:
            if len(piece) >= _MIN_PIECE_SIZE:
                self._last_write.append((offset, piece))
            offset += len(piece)

    def get(self, offset: int, at_most: int) -> memoryview | None:
        """Return one or more bytes from `offset` on; None if they are not in the buffer."""
        for pieces in (self._last_write, self._previous_write):
            for start, piece in pieces:
                if start <= offset < start + len(piece):
                    return memoryview(piece)[offset - start : offset - start + at_most]
        return None

    def clear(self) -> None:
        """Drop all pieces."""
        self._previous_write, self._last_write = [], []


class BackgroundFsync:
    """Flushes a growing ingest to disk in the background, so that clients wait less for the final sync.

    All downloads share `lock`. Only one file is synced at a time, because a slow disk would otherwise block every
    thread of the pool.
    """

    def __init__(self, reactor: Any, lock: DeferredLock) -> None:
        self._reactor = reactor
        self._lock = lock
        self._synced_size = 0
        self._running: Deferred[None] | None = None
        self._error: OSError | None = None

    def start_if_due(self, ingest: Ingest) -> None:
        """Start an fdatasync if at least _FSYNC_THRESHOLD bytes are dirty and no other one is running."""
        if ingest.size - self._synced_size >= _FSYNC_THRESHOLD and not self._lock.locked:
            self._synced_size = ingest.size
            self._running = spawn(self._sync(ingest.reader()), "the background fdatasync of a download")

    async def finish(self, ingest: Ingest) -> None:
        """Sync the rest. Raise the `OSError` of any earlier sync, because the kernel reports an error only once."""
        if self._running is not None:
            await self._running
        if self._error is not None:
            raise self._error
        await in_thread(self._reactor, _sync_and_close, ingest.reader())

    async def _sync(self, descriptor: int) -> None:
        async with self._lock:
            try:
                await in_thread(self._reactor, _sync_and_close, descriptor)
            except OSError as error:
                self._error = error


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
