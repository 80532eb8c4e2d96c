"""One download per digest, and everyone who wants it reading along.

A flight writes one blob from upstream into an ingest file and hashes it on the way. Readers follow the file: each has
its own descriptor and offset, so a slow one delays nobody, and one that leaves is not noticed. The last piece becomes
readable only when digest and length hold; a blob that turns out corrupt is never completed to anyone.

    upstream ──Download──► Flight ──append, in a thread──► ingest file ──verify, rename──► blobs
                              │ wakes                           │ pread
                              └──────────► FlightContent (one per reader) ──► its client

Where the file cannot go on though upstream could (the disk is full, the blob is larger than the cache, the first
client's credential has ended), the flight is *stranded*: each reader carries on from upstream itself, from the
byte where the file ends, with a copy of the hash.

Where another process writes the file already, the flight *follows*: its readers have the same file. It ends with the
other's, and goes on by itself where the other process has died.
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
from dockerproxy.cache.upstream import Principal, RegistryClient, UpstreamRepository
from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.errors import RegistryError, UpstreamBroken
from dockerproxy.oci.content import VERIFY_FIRST_SIZE
from dockerproxy.oci.names import Digest
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.ingest import ForeignIngest, Ingest

if TYPE_CHECKING:
    from hashlib import _Hash

# Bytes that are hashed and written at a time, if they come fast: to have a thread do that, and to wake readers, takes
# 100 µs each time (with half as many, each byte takes 9 % more CPU time). Whoever waits for the beginning has that at
# once.
_MAX_WRITE_SIZE = 2 * 1024 * 1024
_MIN_PIECE_SIZE = 64 * 1024  # bytes of a piece: smaller ones are read from the file, many at a time
_FSYNC_THRESHOLD = 64 * 1024 * 1024  # bytes: 0.02 s for an NVMe disk
_POLL_INTERVAL = 0.01  # seconds between two looks at the file
_LEND_TIMEOUT = 5.0  # seconds for which a stranded flight keeps its connection open for a reader
_INTERNAL_ERROR = "the download failed in this proxy itself: its log says why"

log = Logger()


OnVerified = Callable[[], Coroutine[Any, Any, None]]
"""What is to be done when a blob is verified, before anyone can have the last of it: to note whose it is."""


class IngestFailed(Exception):
    """The ingest file cannot go on, though the content may be had."""


class BlobDownload:
    """The download of one blob, begun for the first who asked, `visitor`."""

    def __init__(
        self,
        reactor: Any,
        upstream: RegistryClient,
        principal: Principal,
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
        self._file: HashedAppendFile | None = (
            None  # what is written, and its hash: the ingest, or what is left of another's
        )
        self._fd = -1  # of the ingest file, for readers to copy: the ingest closes its own in a thread
        self._reserved_size = -1  # bytes
        self._lent: ResumableGet | None = None  # of a stranded flight: open, and at the byte where the file ends
        self.repository = principal.repository
        self.digest = digest
        self.size: int | None = None  # of the whole blob, once upstream has said it
        self.written = 0  # bytes in the ingest file
        self.tail = TailBuffer()  # the last of them, once more
        self.is_foreign = False  # whether another process fetches it
        self.started = False  # whether upstream has begun to send
        self.committed = False  # verified and published
        self.failure: Exception | None = None
        self.ended = False  # nobody can join any more

    async def run(self) -> None:
        """Fetch the blob into an ingest file; never raises: what went wrong is `failure`. `end` has to follow."""
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
        """Let those go on who are `ready` when upstream has begun to send."""
        self.size = info.size
        self.started, self._info = True, info
        self._wake()

    def grow(self, size: int) -> None:
        """Let readers have what was written, of which there are `size` bytes now."""
        self.written = size
        self._wake()

    def end(self) -> None:
        """Let all go who wait; nobody joins any more."""
        self.ended = True
        self.tail.clear()  # a slow reader may keep the flight for hours
        self._close_file()
        self._wake()

    async def wait_changed(self) -> None:
        """Wait until more is written, or the flight has ended."""
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        await waiter

    async def wait_started(self) -> None:
        """Wait until upstream has begun to send. Raise what it refused with, or that it failed.

        Of what another process fetched, the whole may be here before its beginning was seen.
        """
        while not self.started and not self.ended:
            await self.wait_changed()
        if not self.started and not self.committed:
            raise self.failure if isinstance(self.failure, RegistryError) else RegistryError(_INTERNAL_ERROR)

    async def wait_size(self) -> None:
        """Wait until it is known how long the blob is, or the flight has ended."""
        while self.size is None and not self.ended:
            await self.wait_changed()

    def serves(self, principal: Principal, max_age: float) -> bool:
        """Whether upstream sends to `visitor`, and began to less than `recent` seconds ago, or has yet to."""
        info = self._info
        if info is None:
            return (principal.repository, principal.identity) == (self.repository, self._principal.identity)
        age = self._reactor.seconds() - info.opened
        return (principal.repository.key, principal.identity) == (info.key, info.identity) and age < max_age

    @property
    def readable(self) -> int:
        """How many bytes from the start may be given to clients."""
        complete = self.size is None or self.written == self.size  # or may be, for all that is known
        return max(0, self.written - WITHHELD_BYTES) if complete and not self.committed else self.written

    def open_reader(self, repository: UpstreamRepository) -> BlobReader | None:
        """Return the content for one reader, who could go to `origin` itself if the flight were stranded.

        None where the flight has ended: what became of it shows in the store. Raises OSError (too many open files).
        """
        if self.ended:
            return None
        return BlobReader(self._reactor, self, os.dup(self._fd) if self._fd >= 0 else -1, repository)

    def detach_reader(self, repository: UpstreamRepository) -> tuple[ResumableGet, _Hash]:
        """Return what a reader needs to go on without the file: the rest from upstream, and the hash so far."""
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
            raise IngestFailed("its file cannot be opened")
        if self.size is None or self.size > VERIFY_FIRST_SIZE:  # else nobody gets any of it before it is here
            self._ingests.publish_info(self.digest, info)
        await self._reserve(self.written if self.size is None else self.size)
        while pieces := await source.read(min(_MAX_WRITE_SIZE, self.written)):
            await self._append(ingest, source, pieces)
            self._background_fsync.start_if_due(ingest)
        self.size = source.size
        if not ingest.verify():
            await in_thread(self._reactor, ingest.discard)
            raise UpstreamBroken(f"{self.repository.registry} sent content that is not {self.digest}")
        verified_hook = spawn(self._on_verified(), f"the landing of {self.digest}")
        try:
            try:
                await self._background_fsync.finish(ingest)
            finally:
                await verified_hook  # before other processes find it here, and would ask whose it is
            await self._space.commit(ingest)
        except OSError as error:
            raise IngestFailed(f"it cannot be kept: {error.strerror}") from error
        self.committed = True

    async def _open_upstream(self, source: ResumableGet) -> Ingest | None:
        """Return the ingest, `download` being open at the byte where what is there ends.

        None where there is no file to write to; or the blob `landed`, by another process.
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
            # What was left is not this blob, or not its beginning; without it there is no second time.
            log.warn("what was left of {digest} is not part of it: from the start", digest=str(self.digest))
            assert ingest is not None
            source.abort()
            self._close_file()
            await in_thread(self._reactor, ingest.discard)
            if self.started:  # in another process that has died: readers have some of that
                raise UpstreamBroken(f"{self.repository.registry} sent content that is not {self.digest}")

    async def _acquire_ingest(self) -> Ingest | None:
        """Return the ingest, with what an earlier run left there, or another process that has died meanwhile."""
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
            log.error("no ingest file for {digest}: {reason}", digest=str(self.digest), reason=error.strerror)
            if isinstance(ingest, Ingest):
                ingest.release()
            self._close_file()
            return None
        self._file, self.written = ingest, ingest.size
        return ingest

    async def _follow_foreign(self, foreign: ForeignIngest) -> Ingest | None:
        """Read along while another process writes. Return the right to go on where that died, None when it landed.

        None, too, where that gave it up before anyone here had a part of it.
        """
        self.is_foreign = True
        ingest = await _follow_ingest(self._reactor, self, self._ingests, foreign)
        if ingest is None and self.started and not self._ingests.is_published(self.digest):
            # Nobody knows here whether what it had is wrong, or its disk full: the hash will tell.
            self._file = HashedAppendFile(self.written, self._fd, self.digest.hasher())
            await in_thread(self._reactor, self._file.rehash)
            raise IngestFailed("another process gave it up")
        self.is_foreign = ingest is None
        return ingest

    async def _reserve(self, size: int) -> None:
        """Make sure that there is room for `size` bytes of the blob."""
        if size <= self._reserved_size:
            return
        try:
            granted = await self._space.reserve(self.digest, size, self.written)
        except OSError as error:
            raise IngestFailed(f"no room can be made for it: {error.strerror}") from error
        if not granted:
            raise IngestFailed("the cache has no room for it")
        self._reserved_size = size

    async def _append(self, ingest: Ingest, source: ResumableGet, pieces: list[bytes]) -> None:
        end = self.written + sum(map(len, pieces))
        try:
            await self._reserve(end if source.size is None else source.size)
            await in_thread(self._reactor, ingest.append, pieces)
        except OSError as error:
            source.unread(pieces)
            raise IngestFailed(f"it cannot be written: {error.strerror}") from error
        except IngestFailed:
            source.unread(pieces)
            raise
        self.tail.add(self.written, pieces)
        self.grow(end)

    async def _release(self) -> None:
        """Give back the room, and the file for the next flight to go on with.

        Of a flight that has stranded nothing is left: the next one would strand as well, and what it has on the disk
        may be what the disk is full of.
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
            log.failure("the end of the download of {digest} failed", digest=str(self.digest))

    def _lend_connection(self, source: ResumableGet) -> None:
        """Leave the open connection to the first reader that goes on by itself, for a moment."""
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
    """The flights under way, by digest."""

    def __init__(self, reactor: Any, upstream: RegistryClient, space: CacheSpace, ingests: Ingests) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._space = space
        self._ingests = ingests
        self._sync_lock = DeferredLock()
        self._downloads: dict[Digest, BlobDownload] = {}

    def get(self, digest: Digest) -> BlobDownload | None:
        """Return the flight of `digest` that is under way, if any."""
        return self._downloads.get(digest)

    def start(self, principal: Principal, digest: Digest, on_verified: OnVerified) -> BlobDownload:
        """Begin to fetch `digest` for `visitor`; the flight goes on whoever leaves."""
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
    """Let the readers of `flight` have what comes, to the end of it.

    Return the right to go on where the other process has died, None where it published the blob or gave it up. Raise
    `UpstreamBroken` where it took back what readers have a part of.
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
        # What readers have of it was never hashed.
        raise UpstreamBroken(f"another process took back what it had received of {download.digest}")
    if size > download.written:
        download.grow(size)


class TailBuffer:
    """The pieces of the last two writes, by their offset in the file."""

    def __init__(self) -> None:
        self._previous_write: list[tuple[int, bytes]] = []
        self._last_write: list[tuple[int, bytes]] = []

    def add(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Take `pieces`, which were written at `offset`, and forget those of the write before the last."""
        self._previous_write, self._last_write = self._last_write, []
        for piece in pieces:
            if len(piece) >= _MIN_PIECE_SIZE:
                self._last_write.append((offset, piece))
            offset += len(piece)

    def get(self, offset: int, at_most: int) -> memoryview | None:
        """Return bytes from `offset` on, at least one; None where they are not here."""
        for pieces in (self._last_write, self._previous_write):
            for start, piece in pieces:
                if start <= offset < start + len(piece):
                    return memoryview(piece)[offset - start : offset - start + at_most]
        return None

    def clear(self) -> None:
        """Forget all."""
        self._previous_write, self._last_write = [], []


class BackgroundFsync:
    """Syncs one ingest again and again as it grows.

    `turn` is shared: only one file is synced at a time, or a slow disk would hold every thread that there is.
    """

    def __init__(self, reactor: Any, lock: DeferredLock) -> None:
        self._reactor = reactor
        self._lock = lock
        self._synced_size = 0
        self._running: Deferred[None] | None = None
        self._error: OSError | None = None

    def start_if_due(self, ingest: Ingest) -> None:
        """Have the disk take what is there, where that is much, and it is not busy with that already."""
        if ingest.size - self._synced_size >= _FSYNC_THRESHOLD and not self._lock.locked:
            self._synced_size = ingest.size
            self._running = spawn(self._sync(ingest.reader()), "to sync a download")

    async def finish(self, ingest: Ingest) -> None:
        """Have the disk take the rest. Raise the OSError that any of it met: the kernel tells each only once."""
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
