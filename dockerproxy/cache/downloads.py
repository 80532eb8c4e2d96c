"""Downloads of blobs from upstream. There is one download per registry and digest, and any number of readers share it.

A `BlobDownload` writes one blob from upstream into an ingest file and hashes it on the way. Each reader has its own
descriptor and offset in that file, so that a slow or closed reader does not affect the others. The last byte becomes
readable only after digest and length have been verified, so no client ever completes a corrupt blob.

    upstream ──ResumableGet──► BlobDownload ──append, in a thread──► ingest file ──verify, rename──► blobs
                                   │ wakes                               │ pread
                                   └─────────► BlobReader (one per reader) ──► its client

A download belongs to one registry. Registries share verified blobs, but never a download: its bytes are unverified, and
its speed is that of its registry. If two registries send the same blob, the one that is verified first is stored.

If the file cannot be written further although upstream could continue, the download fails with `IngestFailed`. This
happens if the disk is full or the blob is larger than the cache. Each reader then fetches the rest directly from
upstream, from the byte at which the file ends, with a copy of the hash.

A download goes on if its readers leave, so that a client that tries again finds it. But then it ends after
_MAX_UNREAD_TIME seconds or `DownloadLimits.unread_size` bytes. The file stays, and the next download continues with it.
The number of downloads that write files is bounded, with a share for one registry and one client address. Beyond that,
blobs are passed on without being cached.

A range far ahead of the file is fetched by itself for the client that asked for it (`ahead`). The download goes on
meanwhile, and is compared with that range at its end.

If another process already writes the file, the readers of this process read the same file. The download ends when the
other process finishes. If that process dies, this one takes over the file and continues the download.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredLock
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.ahead import MAX_WAIT, AheadFetcher, AheadRange, AheadRanges
from dockerproxy.cache.board import POST_INTERVAL, BoardEntry, BoardPart
from dockerproxy.cache.download_memory import DownloadMemory
from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.ingests import DownloadInfo, FollowedIngest, IngestObserver, Ingests, IngestWriter
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.reader import WITHHELD_BYTES, BlobReader
from dockerproxy.cache.resumable import PartialTooLong, ResumableGet
from dockerproxy.cache.space import CacheSpace, Reservation
from dockerproxy.cache.upstream import RegistryClient, UpstreamPrincipal, UpstreamRepository
from dockerproxy.concurrency import LocalKeyedLock, in_thread, spawn
from dockerproxy.errors import RegistryError, UpstreamBroken
from dockerproxy.oci.content import VERIFY_FIRST_SIZE
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.shares import ClientShares
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.layout import IngestKey
from dockerproxy.store.lru_index import CacheFull

if TYPE_CHECKING:
    from hashlib import _Hash

_FSYNC_THRESHOLD = 64 * 1024 * 1024  # bytes; an NVMe disk needs 0.02 s for them
_MAX_UNREAD_TIME = 60.0  # seconds for which a download goes on without a reader
_MAX_HOOKS = 1000  # principals whose grants wait for a download
_MAX_CODINGS = 256  # blobs of which a registry's Content-Encoding was read the wrong way
_LEND_TIMEOUT = 5.0  # seconds for which a failed download keeps its connection open for a reader
_INTERNAL_ERROR = "the download failed because of an internal error; see the log of docker-registry-proxy"

log = Logger()


T = TypeVar("T")

OnVerified = Callable[[], Coroutine[Any, Any, None]]
"""Called when a blob has been verified, before its last byte becomes readable. Records the grant."""


class IngestFailed(Exception):
    """The ingest file cannot be completed, but upstream may still send the content."""


class IngestUnavailable(IngestFailed):
    """The ingest file cannot be opened or read."""


class DownloadUnread(Exception):
    """Nobody has read the download for too long, or it is too large for that. The next one continues with its file."""


@frozen
class DownloadLimits:
    """The bounds of the downloads of one process: those that write files, and the bytes of one without a reader.

    Each takes up to 192 KiB of memory. One registry and one client address may have half of them; the share is for 500
    hosts behind one address that pull different images at once.
    """

    downloads: int = 2000
    downloads_per_registry: int = 1000
    downloads_per_client: int = 1000
    unread_size: int = 256 * 1024 * 1024

    @classmethod
    def derive(cls, cache_size: int, descriptors: int) -> DownloadLimits:
        """Return the limits for a cache of `cache_size` bytes and a process that may open `descriptors` files.

        A download without a reader may take a sixteenth of the cache. Each download takes three descriptors, and all of
        them together an eighth (see `workers.connection_table.connection_limit`).
        """
        downloads = max(2, min(2000, descriptors // 8 // 3))
        return cls(downloads, downloads // 2, downloads // 2, min(256 * 1024 * 1024, cache_size // 16))


@frozen
class DownloadResources:
    """Services that all downloads of a process share."""

    reactor: Any
    upstream: RegistryClient
    space: CacheSpace
    ingests: Ingests
    observer: IngestObserver
    open_readers: OpenReaders
    ahead_fetcher: AheadFetcher
    limits: DownloadLimits
    board: BoardPart
    memory: DownloadMemory = field(factory=DownloadMemory)
    sync_lock: DeferredLock = field(factory=DeferredLock)
    rehash_locks: LocalKeyedLock = field(factory=LocalKeyedLock)
    codings: BoundedDict[IngestKey, bool] = field(factory=partial(BoundedDict, _MAX_CODINGS))
    """Whether to undo content codings of a blob, because the other reading of it was wrong."""


class BlobDownload:
    """The download of one blob, started for the first client that requested it, `principal`.

    `state` is described at `DownloadState`. It implements `Download`. A `refusal` is the reason why it must not write a
    file: too many others do.
    """

    def __init__(
        self,
        resources: DownloadResources,
        principal: UpstreamPrincipal,
        digest: Digest,
        on_verified: OnVerified,
        refusal: str = "",
    ) -> None:
        self._reactor = resources.reactor
        self._upstream = resources.upstream
        self._space = resources.space
        self._ingests = resources.ingests
        self._observer = resources.observer
        self._on_verified = on_verified
        self._other_hooks: dict[tuple[str, str], OnVerified] = {}  # by repository and identity
        self._background_fsync = BackgroundFsync(resources.reactor, resources.sync_lock)
        self._principal = principal
        self._info: DownloadInfo | None = None  # what is known of upstream's response
        self._waiters: dict[Deferred[None], None] = {}  # in the order of their calls
        # The partial file and its hash: the ingest, or the file that another process gave up.
        self._file: IngestWriter | HashedAppendFile | None = None
        self._fd = -1  # of the ingest file, to read it; each reader duplicates it
        self._lent: ResumableGet | None = None  # after a failure: open, at the byte where the file ends
        self._open_readers = resources.open_readers
        self._ahead_fetcher = resources.ahead_fetcher
        self._ahead_ranges: AheadRanges | None = None
        self._written_before = 0  # bytes in the file when upstream began to send
        self._rehash_locks = resources.rehash_locks
        self._refusal = refusal
        self._max_unread_size = resources.limits.unread_size
        self._attendants = 0  # readers, and callers that wait for one
        self._requests = 0  # requests that got a reader
        self._unread_since = resources.reactor.seconds()
        self._unread_from = 0  # the bytes in the file when the last attendant left
        self._unread_timer = resources.reactor.callLater(_MAX_UNREAD_TIME, self._end_if_unread)
        self._waiting_for_upstream: Deferred[Any] | None = None
        self._memory = resources.memory
        self._codings = resources.codings
        self._tail = resources.memory.tail()
        self._board = resources.board
        self._board_entry: BoardEntry | None = None
        self._posted_at = 0.0
        self._next_post: IDelayedCall | None = None
        self.key = principal.repository.ingest_key(digest)
        self.repository = principal.repository
        self.digest = digest
        self.state = DownloadState.CONNECTING
        self.verified = False
        """Whether this registry has sent the blob. If not, a committed blob may have come from another registry."""
        self.failure: Exception | None = None
        self.size: int | None = None
        self.written = 0
        self.is_from_member = False
        """Whether a member of the fleet has begun to send it, not upstream itself."""

    async def run(self) -> DownloadState:
        """Download the blob into an ingest file. Return the final state, with which the caller calls `end`.

        Do not raise, but set `failure`.
        """
        source = ResumableGet(
            self._reactor,
            self._upstream,
            self.repository,
            self.digest,
            read_ahead=self._read_ahead,
            undo_codings=self._codings.get(self.key),
        )
        try:
            await self._transfer(source)
        except Exception as error:
            self.failure = error
            self._log_failure(error)
            if isinstance(error, IngestFailed) and source.is_open:
                self._lend_connection(source)
            else:
                source.abort()
            return DownloadState.FAILED
        source.abort()
        return DownloadState.COMMITTED

    def end(self, state: DownloadState) -> None:
        """Change to the final `state`, and wake all waiters."""
        if self._unread_timer.active():
            self._unread_timer.cancel()
        self._tail.clear()  # because a slow reader may keep this object alive for hours
        if self._board_entry is not None:
            self._board_entry.remove(is_complete=state is DownloadState.COMMITTED)
            self._board_entry = None
        self._close_file()
        self._change_state(state)

    async def wait_changed(self) -> None:
        """Wait until more is written, or the state has changed."""
        waiter: Deferred[None] = Deferred(self._forget_waiter)
        self._waiters[waiter] = None
        await waiter

    def _forget_waiter(self, waiter: Deferred[None]) -> None:
        self._waiters.pop(waiter, None)  # a cancelled one; a silent download would otherwise keep any number of them

    @property
    def waiting(self) -> int:
        """The number of readers and other callers that wait for a change."""
        return len(self._waiters)

    async def wait_started(self) -> None:
        """Wait until upstream has begun to send. Raise the error if it does not.

        A foreign download may be committed before this process has seen it start.
        """
        with self._attended():
            while self.state.is_pending:
                await self.wait_changed()
        if self.state is DownloadState.FAILED and self._info is None:
            raise self.failure if isinstance(self.failure, RegistryError) else RegistryError(_INTERNAL_ERROR)

    async def wait_size(self) -> None:
        """Wait until the size of the blob is known or the download has ended."""
        with self._attended():
            while self.size is None and not self.state.is_end:
                await self.wait_changed()

    def serves(self, principal: UpstreamPrincipal, max_age: float) -> bool:
        """Return whether the upstream request of this download also decides for `principal`.

        It does if repository and identity are the same, and if the response is pending or less than `max_age` seconds
        old.
        """
        info = self._info
        if info is None:
            return (principal.repository, principal.identity) == (self.repository, self._principal.identity)
        age = self._reactor.seconds() - info.opened  # negative if the record is older than the start of the machine
        return (principal.repository.key, principal.identity) == (info.key, info.identity) and 0 <= age < max_age

    def when_verified(self, principal: UpstreamPrincipal, hook: OnVerified) -> None:
        """Call `hook` for another principal as soon as the blob is verified. There is one hook for each principal.

        Beyond _MAX_HOOKS, a principal is asked for again with its next request.
        """
        if not self.state.is_end and len(self._other_hooks) < _MAX_HOOKS:
            self._other_hooks.setdefault((principal.repository.key, principal.identity), hook)

    @property
    def readable(self) -> int:
        """The number of bytes from the start that clients may get."""
        if self.state is DownloadState.COMMITTED:
            return self.written
        complete = self.size is None or self.written == self.size  # possibly, if the size is unknown
        return max(0, self.written - WITHHELD_BYTES) if complete else self.written

    def open_reader(self, repository: UpstreamRepository, client: str = "") -> BlobReader | None:
        """Return a reader for `client`, which would fetch the rest from `repository` if the ingest failed.

        Return None if the download has ended; the store then has the result. Raise `OSError` (too many open files).
        """
        if self.state.is_end:
            return None
        fd = os.dup(self._fd) if self._fd >= 0 else -1
        reader = BlobReader(self._reactor, self, fd, repository, self._close_reader, client)
        self._open_readers.add(reader)
        self._attend()
        self._requests += 1
        return reader

    def read_tail(self, offset: int, at_most: int) -> memoryview | None:
        """Return one or more bytes from `offset` on if they are still in memory."""
        return self._tail.get(offset, at_most)

    def fetch_ahead(
        self, span: ByteRange, repository: UpstreamRepository, client: str, *, has_waited: bool
    ) -> AheadRange | None:
        """Return `span`, fetched from `repository` by a request of its own, if the download is far from it, else None.

        It is compared with the blob as soon as that is verified. If the client `has_waited` for MAX_WAIT, the rate of
        the download was misleading. So it is in its first moments. A blob that cannot be stored is not compared.
        """
        if self._info is None or self.size is None or self.state is DownloadState.COMMITTED:
            return None
        elapsed = self._reactor.seconds() - self._info.opened
        has_rate = elapsed >= MAX_WAIT and not (has_waited or self.state.is_end)
        rate = (self.written - self._written_before) / elapsed if has_rate else 0.0
        ranges = self._ahead_ranges or AheadRanges(self._ahead_fetcher, self.digest)
        ahead = ranges.fetch(repository, client, span, written=self.written, rate=rate, size=self.size)
        if ahead is not None:
            self._ahead_ranges = ranges
        return ahead

    def detach_reader(self, repository: UpstreamRepository) -> tuple[ResumableGet, _Hash]:
        """Return the upstream source of the remaining bytes, and the hash of the bytes before them."""
        hasher = self._file.hasher_copy() if self._file is not None else self.digest.hasher()
        lent, self._lent = self._lent, None
        if lent is not None:
            return lent, hasher
        source = ResumableGet(
            self._reactor, self._upstream, repository, self.digest, self.written, read_ahead=self._read_ahead
        )
        source.size = self.size
        return source, hasher

    def _read_ahead(self) -> int:
        return self._memory.read_ahead(self.key.host)

    # attendants

    def _attend(self) -> None:
        self._attendants += 1
        if self._unread_timer.active():
            self._unread_timer.cancel()
        self._post_soon()

    def _leave(self) -> None:
        self._attendants -= 1
        self._post_soon()
        if not self._attendants and not self.state.is_end:
            self._unread_since, self._unread_from = self._reactor.seconds(), self.written
            self._unread_timer = self._reactor.callLater(_MAX_UNREAD_TIME, self._end_if_unread)

    @contextmanager
    def _attended(self) -> Iterator[None]:
        self._attend()
        try:
            yield
        finally:
            self._leave()

    def _close_reader(self, reader: BlobReader) -> None:
        self._open_readers.discard(reader)
        self._leave()

    def _check_read(self) -> None:
        """Raise `DownloadUnread` if the download has been without attendants for too long."""
        if self._attendants:
            return
        if self._reactor.seconds() - self._unread_since >= _MAX_UNREAD_TIME:
            raise DownloadUnread(f"nobody has read it for {_MAX_UNREAD_TIME:g} s")
        if self.written - self._unread_from > self._max_unread_size:
            raise DownloadUnread(f"nobody has read it for {self.written - self._unread_from} bytes")

    def _end_if_unread(self) -> None:
        if self._waiting_for_upstream is not None:
            self._waiting_for_upstream.cancel()

    async def _unless_unread(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which waits for upstream, or raise `DownloadUnread`."""
        self._waiting_for_upstream = Deferred.fromCoroutine(work)
        try:
            return await self._waiting_for_upstream  # type: ignore[no-any-return]
        except CancelledError:
            self._check_read()
            raise
        finally:
            self._waiting_for_upstream = None

    # the transfer

    async def _transfer(self, source: ResumableGet) -> None:
        """Bring the blob into the store, or return as soon as somebody else has."""
        try:
            if self._refusal:
                raise IngestUnavailable(self._refusal)
            while (ingest := await self._acquire_ingest()) is not None:
                async with (
                    self._space.reservation(ingest, self._principal.client) as reservation,
                    self._holding(ingest),
                ):
                    if await self._open_upstream(source, ingest):
                        await self._receive(source, ingest, reservation)
                        return
        except IngestUnavailable:
            await self._unless_unread(source.open())  # because upstream decides whether the clients get the blob
            self._mark_started(self._describe(source))
            raise

    async def _acquire_ingest(self) -> IngestWriter | None:
        """Return the ingest, including the partial content of an earlier run or of a process that has died.

        Return None if the blob is in the store by now. Raise `IngestFailed`.
        """
        try:
            while (ingest := await in_thread(self._reactor, self._ingests.acquire, self.key)) is not None:
                writer = await self._follow(ingest) if ingest.is_foreign else ingest
                if writer is not None:
                    return await self._adopt(writer)
                if self._ingests.is_stored(self.digest):
                    break
                self._change_state(DownloadState.CONNECTING)
            return None
        except OSError as error:
            log.error(
                "cannot open the ingest file for {digest}: {reason}", digest=str(self.digest), reason=error.strerror
            )
            self._close_file()
            self._file, self.written = None, 0
            raise IngestUnavailable(f"cannot open the ingest file: {error.strerror}") from error

    async def _adopt(self, ingest: IngestWriter) -> IngestWriter:
        """Become the writer of `ingest`. Raise `OSError`, after which the ingest is released."""
        try:
            if self._fd < 0:
                self._fd = ingest.reader()
            self._ingests.remove_info(self.key)
            if ingest.size:
                await self._rehash(ingest)
        except BaseException:
            _give_back(ingest)
            raise
        self._file, self.written = ingest, ingest.size
        if self.state is not DownloadState.CONNECTING:  # the writer died
            self._change_state(DownloadState.DOWNLOADING if self._info else DownloadState.CONNECTING)
        return ingest

    async def _rehash(self, file: IngestWriter | HashedAppendFile) -> None:
        """Hash what is in the file, which takes a second for each GiB.

        The files of one registry take turns, because a registry and its clients could otherwise occupy all threads.
        """
        async with self._rehash_locks.hold(self.key.host):
            await in_thread(self._reactor, file.rehash)

    async def _follow(self, foreign: FollowedIngest) -> IngestWriter | None:
        """Pass the progress of another writer on to the readers here. Return the ingest if that writer died.

        Return None if the file is complete, or if it was given up before a reader here got any of it. Raise
        `IngestFailed` if it was given up later, and `UpstreamBroken` if bytes that readers have were removed.
        """
        self._change_state(DownloadState.WAITING)
        ingest = None
        try:
            self._fd = foreign.reader()
            with self._observer.observe(self._fd) as changes:
                while foreign.in_progress:
                    ingest = foreign.try_take_over()
                    progress = self._update_from(foreign)
                    if ingest is not None:
                        return ingest
                    self._check_read()
                    await changes.wait(progress=progress)
            self._update_from(foreign)
            self.verified = self._ingests.was_committed(foreign)
            if self.verified:
                if self._requests:  # beside the one that the other process downloads it for
                    self._space.touch(self.digest)
                await self._compare_ahead()
                # Not `_on_verified`: this process has not sent the request of its principal.
                await self._call(self._other_hooks.values())
            elif self._info is not None:
                # It is unknown whether the content was wrong or the disk full. The readers' hash decides.
                self._file = HashedAppendFile(self.written, self._fd, self.digest.hasher())
                await self._rehash(self._file)
                raise IngestFailed("another process gave up the download")
        except BaseException:
            if ingest is not None:
                ingest.release()
            raise
        finally:
            if ingest is None:
                foreign.close()
        if self._info is None:
            self._close_file()
        return None

    def _update_from(self, foreign: FollowedIngest) -> bool:
        """Pass on what is new of `foreign`. Return whether it has grown."""
        if self._info is None and (info := self._ingests.read_info(self.key)) is not None:
            self._info, self.size = info, info.size
            self._change_state(DownloadState.FOLLOWING)
        size = foreign.size
        if size < self.written:
            # The readers cannot continue, because this process has not hashed the bytes that they have.
            raise UpstreamBroken(f"another process discarded its partial download of {self.digest}")
        if size == self.written:
            return False
        self._grow(size)
        return True

    @asynccontextmanager
    async def _holding(self, ingest: IngestWriter) -> AsyncIterator[None]:
        """Take part in the division of the memory, and release the ingest at the end.

        The next download continues with the partial file, if it has any bytes.

        After a local failure, delete the partial file: a retry would fail in the same way, and the file may be what
        fills the disk.
        """
        try:
            with self._memory.share(self.key.host):
                yield
        except IngestFailed:
            try:
                await in_thread(self._reactor, ingest.discard)
            except OSError:
                log.failure("deleting the partial download of {digest} failed", digest=str(self.digest))
            raise
        finally:
            self._ingests.remove_info(self.key)
            _give_back(ingest)

    async def _open_upstream(self, source: ResumableGet, ingest: IngestWriter) -> bool:
        """Open `source` at the byte where the partial file ends.

        If the partial file is not the beginning of this blob, discard it and return False. It is empty the next time.
        """
        source.offset, source.size = ingest.size, self.size
        try:
            await self._unless_unread(source.open())
        except PartialTooLong:
            pass
        else:
            if not ingest.size or ingest.size != source.size or ingest.verify():
                return True
        log.warn(
            "discarded the partial download of {digest}: it does not match, restarting at byte 0",
            digest=str(self.digest),
        )
        source.abort()
        self._close_file()
        await in_thread(self._reactor, ingest.discard)
        if self._info is not None:  # from another process that died: readers already have some of its bytes
            raise UpstreamBroken(f"{self.repository.registry} returned content that does not match {self.digest}")
        return False

    async def _receive(self, source: ResumableGet, ingest: IngestWriter, reservation: Reservation) -> None:
        """Write all that `source` sends, verify it and commit it. Raise `IngestFailed`, `UpstreamError`."""
        info = self._describe(source)
        self._mark_started(info)
        if info.size is None or info.size > VERIFY_FIRST_SIZE:  # else it is served only when complete
            self._ingests.publish_info(ingest, info)
        await self._reserve(reservation, self.written, info.size)
        while pieces := await self._read(source):
            try:
                await self._append(source, ingest, reservation, pieces)
            except IngestFailed:
                source.unread(pieces)
                raise
            self._background_fsync.start_if_due(ingest)
        self.size = source.size
        if not ingest.verify():
            if source.guessed_coding is not None:
                self._codings[self.key] = not source.guessed_coding  # the next attempt reads it the other way
            source.report_mismatch()
            await in_thread(self._reactor, ingest.discard)
            raise UpstreamBroken(f"{self.repository.registry} returned content that does not match {self.digest}")
        self.verified = True
        await self._compare_ahead()
        verified_hooks = self._call([self._on_verified, *self._other_hooks.values()])
        try:
            try:
                await self._background_fsync.finish(ingest)
            finally:
                await verified_hooks  # first, because other processes check the grant as soon as they find the blob
            await in_thread(self._reactor, self._ingests.commit, ingest)
            await reservation.commit(ingest.size)
            if self._requests > 1:
                self._space.touch(self.digest)
        except OSError as error:
            raise IngestFailed(f"cannot commit the file: {error.strerror}") from error

    async def _read(self, source: ResumableGet) -> list[bytes]:
        self._check_read()
        # The first writes are smaller, so that readers get the beginning at once.
        at_least = min(self._memory.write_size(self.key.host), self.written)
        return await self._unless_unread(source.read(at_least))

    async def _compare_ahead(self) -> None:
        """Compare the ranges that were fetched ahead with the verified file."""
        if self._ahead_ranges is not None:
            await self._ahead_ranges.compare(self._fd)

    def _call(self, hooks: Iterable[OnVerified]) -> Deferred[Any]:
        return DeferredList([spawn(hook(), f"recording the grant of {self.digest}") for hook in hooks])

    async def _append(
        self, source: ResumableGet, ingest: IngestWriter, reservation: Reservation, pieces: list[bytes]
    ) -> None:
        end = self.written + sum(map(len, pieces))
        await self._reserve(reservation, end, source.size)
        try:
            await in_thread(self._reactor, ingest.append, pieces)
        except OSError as error:
            raise IngestFailed(f"cannot write the file: {error.strerror}") from error
        self._tail.add(self.written, pieces)
        self._grow(end)

    async def _reserve(self, reservation: Reservation, size: int, announced_size: int | None) -> None:
        """Reserve cache space for `size` bytes of the blob. Raise `IngestFailed`."""
        try:
            await reservation.grow(size, announced_size)
        except CacheFull as error:
            raise IngestFailed(str(error)) from error
        except OSError as error:
            raise IngestFailed(f"cannot reserve {size} bytes of cache space: {error.strerror}") from error

    # state

    def _describe(self, source: ResumableGet) -> DownloadInfo:
        self.is_from_member = source.is_from_member
        return DownloadInfo(source.size, self.repository.key, self._principal.identity, self._reactor.seconds())

    def _mark_started(self, info: DownloadInfo) -> None:
        """Record that upstream has begun to send, and wake the callers of `wait_started`."""
        self._info, self.size, self._written_before = info, info.size, self.written
        self._change_state(DownloadState.DOWNLOADING)

    def _grow(self, size: int) -> None:
        """Record that the file now has `size` bytes, and wake the readers."""
        self.written = size
        self._post_soon()
        self._wake()

    def _change_state(self, state: DownloadState) -> None:
        if not self.state.may_become(state):
            raise RuntimeError(f"a download that is {self.state.value} cannot become {state.value}")
        self.state = state
        self._post()
        self._wake()

    def _post_soon(self) -> None:
        """Write to the board within `POST_INTERVAL`, also if upstream sends nothing more."""
        if self._next_post is not None or self.state.is_end:
            return
        wait = self._posted_at + POST_INTERVAL - self._reactor.seconds()
        if wait > 0:
            self._next_post = self._reactor.callLater(wait, self._post)
        else:
            self._post()

    def _post(self) -> None:
        """Write to the board how far the download is, unless upstream has not responded."""
        self._posted_at = self._reactor.seconds()
        if self._next_post is not None and self._next_post.active():
            self._next_post.cancel()
        self._next_post = None
        if self.state.is_pending or self.state.is_end:
            return
        if self._board_entry is None:
            is_private = self._principal.identity != PUBLIC
            self._board_entry = self._board.add(self.repository.key, self.digest, self.size, private=is_private)
        if self._board_entry is not None:
            self._board_entry.update(self.written, self.size, self._attendants)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.callback(None)

    # failures

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
        elif isinstance(error, (IngestFailed, DownloadUnread)):
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


class Downloads:
    """The active downloads, by registry and digest."""

    def __init__(
        self,
        reactor: Any,
        upstream: RegistryClient,
        space: CacheSpace,
        ingests: Ingests,
        open_readers: OpenReaders,
        limits: DownloadLimits,
        board: BoardPart,
    ) -> None:
        ranges = max(2, limits.downloads // 4)  # each takes a connection
        self._of_ranges = ClientShares("ranges fetched ahead of downloads", ranges, ranges // 2)
        self._resources = DownloadResources(
            reactor, upstream, space, ingests, IngestObserver(reactor), open_readers,
            AheadFetcher(reactor, upstream, self._of_ranges), limits, board,
        )  # fmt: skip
        self._downloads: dict[IngestKey, BlobDownload] = {}
        self._of_registries = ClientShares("downloads by registry", limits.downloads, limits.downloads_per_registry)
        self._of_clients = ClientShares("downloads", limits.downloads, limits.downloads_per_client)

    @property
    def bounds(self) -> tuple[ClientShares, ...]:
        """The bounds of the downloads that write files."""
        return self._of_registries, self._of_clients, self._of_ranges

    def get(self, key: IngestKey) -> BlobDownload | None:
        """Return the active download of `key`, if any."""
        return self._downloads.get(key)

    def start(
        self, principal: UpstreamPrincipal, digest: Digest, on_verified: OnVerified, refusal: str = ""
    ) -> BlobDownload:
        """Start to download `digest` for `principal`.

        Do not cache it if there is a `refusal`, a reason, or if too many downloads are running.
        """
        host, client = str(principal.repository.registry.host), principal.client
        refusal = refusal or _refusal(self._of_registries, host) or _refusal(self._of_clients, client)
        download = BlobDownload(self._resources, principal, digest, on_verified, refusal)
        self._downloads[download.key] = download
        work = self._run(download) if refusal else self._run_counted(download, host, client)
        spawn(work, f"the download of {digest}")
        return download

    def __len__(self) -> int:
        """Return the number of downloads in progress."""
        return len(self._downloads)

    def report(self) -> list[dict[str, Any]]:
        """Return what the downloads are doing, as a JSON value."""
        return [
            {
                "registry": key.host,
                "digest": str(download.digest),
                "state": download.state.name.lower(),
                "written": download.written,
                "size": download.size,
                "waiting": download.waiting,
            }
            for key, download in self._downloads.items()
        ]

    async def _run_counted(self, download: BlobDownload, host: str, client: str) -> None:
        self._of_registries.acquire(host)
        self._of_clients.acquire(client)
        try:
            await self._run(download)
        finally:
            self._of_registries.release(host)
            self._of_clients.release(client)

    async def _run(self, download: BlobDownload) -> None:
        state = DownloadState.FAILED
        try:
            state = await download.run()
        finally:
            del self._downloads[download.key]
            download.end(state)


def _give_back(ingest: IngestWriter) -> None:
    """Leave the partial file to the next download, or delete it if it is empty: each failure would leave an inode."""
    if ingest.size:
        ingest.release()
    else:
        ingest.discard()


def _refusal(shares: ClientShares, holder: str) -> str:
    """Return the reason why `holder` may not have another download that writes a file, or `""`."""
    if shares.has_room(holder):
        return ""
    shares.refused += 1
    return (
        f"{shares.used} of {shares.limit} {shares.name} are running, {shares.held_by(holder)} of {shares.share} for"
        f" {holder}"
    )


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

    def start_if_due(self, ingest: IngestWriter) -> None:
        """Start an fdatasync if at least _FSYNC_THRESHOLD bytes are dirty and no other one is running."""
        if ingest.size - self._synced_size >= _FSYNC_THRESHOLD and not self._lock.locked:
            self._synced_size = ingest.size
            self._running = spawn(self._sync(ingest.duplicate()), "the background fdatasync of a download")

    async def finish(self, ingest: IngestWriter) -> None:
        """Sync the rest. Raise the `OSError` of any earlier sync, because the kernel reports an error only once."""
        if self._running is not None:
            await self._running
        if self._error is not None:
            raise self._error
        await in_thread(self._reactor, _sync_and_close, ingest.duplicate())

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
