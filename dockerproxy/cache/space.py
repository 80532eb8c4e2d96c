"""Cache space: reserves space for downloads, and evicts the least recently used blobs and partial downloads."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from math import inf
from typing import Any, Protocol

from attrs import define, field
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from dockerproxy.cache.ingests import IngestWriter
from dockerproxy.cache.janitor import LINK_MIN_AGE, Janitor
from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.oci.names import Digest
from dockerproxy.shares import BoundReport, client_key
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.eviction import CacheKey
from dockerproxy.store.ingest import Ingest, ingests_of, remove_ingests_without_host, walk_ingests
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.lru_index import CacheFull, LRUIndex, Rescan
from dockerproxy.store.progress import Stopped
from dockerproxy.store.tombstones import Tombstones

MAINTENANCE_INTERVAL = 600.0
"""Seconds between two rounds of maintenance, which expires blobs and rescans the disk."""

BLOB_COST = 8192
"""Bytes that a blob counts beside its size: its directory, and the blocks that it does not fill."""

_STALE_INGEST_AGE = 86400.0  # seconds after which an abandoned partial download is deleted
_MIN_FREE_BYTES = 16 * 1024 * 1024  # bytes kept free on the disk for other programs
_MAX_PARTIALS = 500  # partial downloads that are kept for one registry; each takes an inode
_MIN_FREE_INODES = 10_000  # files kept free on the disk for other programs, if it has 20 times as many

_FILE_COST = 4096  # bytes that a link or record counts; it takes a block and an inode
_MAX_METADATA = 8  # links and records may take one part in so many of the cache, because losing them costs little
_CLEAN_INTERVAL = 3600.0  # seconds between two walks of the janitor
_EARLY_CLEAN = 10_000  # new files after which the janitor walks earlier, and those of more than 10 % growth
_RETRY_CLEAN_INTERVAL = 60.0  # seconds before the next walk if inodes are still missing; by then, more may be removed
_REPORT_INTERVAL = 5.0  # seconds over which new files are collected into one report

_MIN_STEP = 128 * 1024  # bytes; a reservation begins with so many, and is then at most twice what has arrived
_MAX_STEP = 16 * 1024 * 1024

_MAX_REPORTED = 5  # clients and registries in a report

log = Logger()


class CacheSpace(Protocol):
    """The cache space as downloads and readers of one process see it.

    `CacheSpaceManager` implements it; the processes reach that one directly or by RPC. Downloads call `reservation`,
    which calls `reserve`, `record_commit` and `release`.
    """

    async def reserve(self, key: IngestKey, size: int, expected_size: int, existing_size: int, client: str) -> str: ...

    async def record_commit(self, key: IngestKey, size: int) -> None: ...

    def release(self, key: IngestKey) -> None: ...

    async def record(self, digest: Digest, size: int, client: str, registry: str) -> None: ...

    def touch(self, digest: Digest) -> None: ...

    def record_files(self, count: int) -> None: ...

    async def usage(self) -> tuple[int, int]: ...

    def reservation(self, ingest: IngestWriter, client: str) -> Reservation:
        """Return the reservation for `ingest`, which `client` requested. The first `grow` reserves."""
        return Reservation(self, ingest, client)


@define
class Reservation:
    """The cache space of one download, used as ``async with``. At the end, the bytes that are on disk count.

    It grows with what has arrived. An announced size reserves nothing, because anyone can announce one.
    """

    _space: CacheSpace
    _ingest: IngestWriter
    _client: str
    _size: int | None = field(default=None, init=False)

    async def grow(self, size: int, announced_size: int | None) -> None:
        """Reserve `size` bytes or a few more for the whole file, of which upstream has announced `announced_size`.

        Raise `CacheFull` if they do not fit, or cannot be expected to; or `OSError`.
        """
        if self._size is not None and size <= self._size:
            return
        self._size = self._size or 0  # from here on there is something to release, even if this fails
        expected_size = size if announced_size is None else announced_size
        step = min(max(size, _MIN_STEP), _MAX_STEP)
        next_size = size + step if announced_size is None else min(size + step, announced_size)
        for wanted in (next_size, size):
            refusal = await self._space.reserve(
                self._ingest.key, wanted, expected_size, self._ingest.size, self._client
            )
            if not refusal:
                self._size = wanted
                return
        raise CacheFull(refusal)

    async def commit(self, size: int) -> None:
        """Count the blob of `size` bytes that the ingest has become, in place of the reserved bytes."""
        await self._space.record_commit(self._ingest.key, size)

    async def __aenter__(self) -> Reservation:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._size is not None:
            try:
                self._space.release(self._ingest.key)
            except Exception:  # the rescan corrects the count; the download has done its work
                log.failure("releasing the cache space of {key} failed", key=str(self._ingest.key))


class FileCounter:
    """Counts new files in any thread, and reports their number to `report` every few seconds."""

    def __init__(self, reactor: Any, report: Callable[[int], object]) -> None:
        self._reactor = reactor
        self._report = report
        self._count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        """Count a new file."""
        with self._lock:
            self._count += 1
            report_is_due = self._count > 1
        if not report_is_due:
            self._reactor.callFromThread(self._reactor.callLater, _REPORT_INTERVAL, self._flush)

    def _flush(self) -> None:
        with self._lock:
            count, self._count = self._count, 0
        self._report(count)


def _ignore_evictions(reason: str, count: int) -> None:
    """Do nothing about evictions."""


async def _nothing() -> None:
    """Do nothing after the maintenance."""


class CacheSpaceManager(CacheSpace):
    """Keeps the cache within its limit.

    Space for a download is reserved before it is written. A reserved download is never evicted. A blob that is being
    read may be, because its readers have it open.

    Bytes that are not verified yet may take only a part of the cache, so that no registry can replace all blobs by
    bytes that nobody will ever use: `max_blob_size` for one blob, as much for all of one registry, and seven eighths
    (or `max_blob_size`) for all together. The downloads of one client from one registry may have half of the cache, or
    be one blob. Partial downloads that nobody continues make room first.

    `store.eviction` decides which are evicted then: blobs that were used once before those that were used again. Those
    that the administrator has pinned (`keep`) never are.

    `tombstones` get the blobs that are evicted, with the time since the last use that their files show. `on_evicted` is
    called with the reason, ``room`` or ``inactive``, and the number of blobs and partial downloads.

    Links and records count as well. The janitor keeps them within their part of the limit; if there are more between
    two of its walks, they do not take the space of blobs.
    """

    def __init__(
        self,
        reactor: Any,
        layout: Layout,
        blobs: Blobs,
        *,
        limit: int,
        max_blob_size: int,
        inactive: float,
        clock: Callable[[], float],
        janitor: Janitor,
        blob_cost: int = BLOB_COST,
        cooperative_thread: CooperativeThread | None = None,
        tombstones: Tombstones | None = None,
        on_evicted: Callable[[str, int], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._on_evicted = on_evicted or _ignore_evictions
        self._tombstones = tombstones or Tombstones()
        self._cooperative_thread = cooperative_thread or CooperativeThread(reactor)
        self._layout = layout
        self._blobs = blobs
        self._inactive = inactive
        self._clock = clock
        self._janitor = janitor
        self._new_files = 0  # since the janitor's last walk
        self._cleaned_at = -inf  # in the reactor's time
        self._is_cleaning = False
        self._next_clean: Any = None  # a delayed call
        self._reservations: dict[IngestKey, str] = {}  # the clients
        self._used_again: set[Digest] = set()  # whose files do not say so yet
        self._is_marking = False
        self._refused = 0  # reservations beyond the share of a client
        self._max_blob_size = max_blob_size
        self._max_unverified = max(limit - limit // 8, max_blob_size)
        self.index = LRUIndex(limit, blob_cost)
        self._after_maintenance: Callable[[], Awaitable[None]] = _nothing

    def call_after_maintenance(self, function: Callable[[], Awaitable[None]]) -> None:
        """Call `function` after each round of maintenance: it may walk the store then, as nothing else does."""
        self._after_maintenance = function

    def service(self) -> TimerService:
        """Return the service that runs `maintain`, first at start."""
        return _MaintenanceService(self._reactor, self._start_maintenance, self._cooperative_thread.stop)

    def _start_maintenance(self) -> Deferred[None]:
        return spawn(self._until_stopped(self.maintain()), "cache maintenance")

    @staticmethod
    async def _until_stopped(work: Awaitable[None]) -> None:
        with suppress(Stopped):
            await work

    async def maintain(self) -> None:
        """Remove abandoned downloads and rescan the disk.

        Then evict blobs that were unused for `inactive` seconds, or that exceed the limit. Once an hour, and if there
        are too many or the disk has few free inodes, remove links and records.
        """
        rescan = self.index.start_rescan()
        try:
            await self._cooperative_thread.run(self._scan(rescan))
            self.index.apply_rescan(rescan)
        finally:
            self.index.abort_rescan()
        await self._cooperative_thread.run(rescan.clear_incrementally())
        while expired := self.index.expire(self._inactive, self._clock()):
            await self._evict(expired, "inactive")
        is_due = self._reactor.seconds() - self._cleaned_at >= _CLEAN_INTERVAL or self._file_count > self._max_files
        if is_due or await in_thread(self._reactor, self._missing_inodes):
            await self.clean()
        await self._after_maintenance()

    async def clean(self) -> None:
        """Remove the links and records that nothing needs, and the oldest ones of those that exceed their part.

        If the disk has few free inodes, remove more of them, and then blobs. Do nothing if this is running already.
        """
        if self._is_cleaning:
            return
        self._is_cleaning = True
        try:
            await self._clean(self._max_files)
            missing = await in_thread(self._reactor, self._missing_inodes)
            if missing:
                log.warn("{root} has few free inodes left; evicting from the cache", root=str(self._layout.root))
                # New ones as well: otherwise whoever causes many of them would displace the blobs of others.
                await self._clean(max(0, min(self._max_files, self._janitor.inodes - missing)), min_age=0)
            while missing := await in_thread(self._reactor, self._missing_inodes):
                evicted = self.index.evict_count(missing // 2 + 1)  # a blob has a directory of its own
                if not evicted:
                    break
                await self._evict(evicted)
            if missing:
                self._clean_later(_RETRY_CLEAN_INTERVAL)
        finally:
            self._is_cleaning = False
            self._cleaned_at = self._reactor.seconds()

    async def _clean(self, max_files: int, min_age: float = LINK_MIN_AGE) -> None:
        new_files = self._new_files
        await self._cooperative_thread.run(self._janitor.clean(max_files, min_age))
        self._new_files -= new_files  # those written meanwhile may be counted twice, until the next walk
        self._update_overhead()

    @property
    def _max_files(self) -> int:
        return self.index.limit // _MAX_METADATA // _FILE_COST

    @property
    def _file_count(self) -> int:
        return self._janitor.inodes + self._new_files

    def record_files(self, count: int) -> None:
        """Count new links and records. Start `clean` if there are too many, or if the disk has few free inodes."""
        self._new_files += count
        self._update_overhead()
        threshold = self._file_count // 10
        if self._file_count <= self._max_files:
            threshold = max(threshold, _EARLY_CLEAN)
        if self._new_files > threshold:
            self._clean_later(0)
        elif not self._is_cleaning and self._next_clean is None:
            spawn(self._clean_if_inodes_are_missing(), "counting the free inodes of the cache's disk")

    async def _clean_if_inodes_are_missing(self) -> None:
        if await in_thread(self._reactor, self._missing_inodes):
            self._clean_later(0)  # unless another walk is scheduled, because the last one could not free enough

    def _clean_later(self, seconds: float) -> None:
        if self._next_clean is None:
            self._next_clean = self._reactor.callLater(seconds, self._start_cleaning)

    def _start_cleaning(self) -> None:
        self._next_clean = None
        spawn(self._until_stopped(self.clean()), "removing links and records from the cache")

    def _update_overhead(self) -> None:
        self.index.overhead = min(self._file_count, self._max_files) * _FILE_COST

    def _missing_inodes(self) -> int:
        """Return how many inodes the file system lacks; 0 if it has enough, or does not count them (Btrfs)."""
        status = os.statvfs(self._layout.root)
        return max(0, min(_MIN_FREE_INODES, status.f_files // 20) - status.f_favail)

    async def reserve(self, key: IngestKey, size: int, expected_size: int, existing_size: int, client: str) -> str:
        """Reserve space for the first `size` bytes of a download, `existing_size` of which are already on disk.

        `client` is the address of the client that requested it.

        Return the reason if that is impossible, or if the `expected_size` of the whole blob would be; otherwise `""`.
        Call it again as the download grows. The caller must call `release` at the end, even after a refusal.
        """
        if key not in self._reservations:
            self.index.pin(key)
        self._reservations[key] = client_key(client)
        if max(size, expected_size) > self._max_blob_size:
            return (
                f"a blob may take {self._max_blob_size} bytes of the cache, and it has {max(size, expected_size)};"
                " raise CACHE_MAX_BLOB_SIZE"
            )
        try:
            self._check_room(key, size, max(size, expected_size))
            # An earlier partial download, or a smaller reservation, is included in `size`.
            evicted = self._make_room(key, size - self.index.size(key))
        except CacheFull as error:
            return f"{error}; raise CACHE_MAX_SIZE"
        self._add(key, size, self._reservations[key], key.host)
        await self._evict(evicted)
        return await self._free_disk_space(size - existing_size, max(size, expected_size) - existing_size)

    def _check_room(self, key: IngestKey, size: int, expected_size: int) -> None:
        """Raise `CacheFull` if there is no room for `size` bytes, or none to be expected for the whole blob."""
        index, growth = self.index, size - self.index.size(key)
        if expected_size - index.size(key) > index.free + index.evictable:
            raise CacheFull(
                f"{expected_size} bytes do not fit into the cache, of whose {index.limit} bytes"
                f" {index.used - index.evictable} are in use"
            )
        if index.reserved_bytes(key.host) + growth > self._max_blob_size:
            raise CacheFull(
                f"unfinished downloads from {key.host} have {index.reserved_bytes(key.host)} of the"
                f" {self._max_blob_size} bytes that those of one registry may have"
            )
        client = self._reservations[key]
        others = sum(
            index.size(other)
            for other, owner in self._reservations.items()
            if (owner, other.host) == (client, key.host) and other != key
        )
        if client and others and others + size > index.limit // 2 and growth > index.free:
            self._refused += 1
            raise CacheFull(
                f"unfinished downloads from {key.host} that {client} has requested have {others} of the"
                f" {index.limit // 2} bytes that those of one client may have"
            )
        if index.reserved_bytes() + growth > self._max_unverified:
            raise CacheFull(
                f"unfinished downloads have {index.reserved_bytes()} of the {self._max_unverified} bytes that they may"
                " have"
            )

    def _make_room(self, key: IngestKey, growth: int) -> list[CacheKey]:
        """Return what to remove for `growth` more bytes: abandoned downloads if they exceed their part, then blobs."""
        index = self.index
        evicted = index.evict_partials(index.partial_bytes(key.host) + growth - self._max_blob_size, key.host)
        evicted += index.evict_partials(index.partial_bytes() + growth - self._max_unverified)
        return evicted + index.evict(growth)

    def release(self, key: IngestKey) -> None:
        """End a reservation, if there is one. The bytes on disk then count, and may be evicted."""
        if key not in self._reservations:
            return
        client = self._reservations.pop(key)
        self.index.unpin(key)
        self.index.remove(key)
        partial_size, blob_size = _file_size(self._layout.ingest(key)), self._blobs.size(key.digest)
        if partial_size is not None:
            self._add(key, partial_size, client, key.host)
            self._limit_partials(key.host)
        if blob_size is not None and key.digest not in self.index:
            self._add(key.digest, blob_size, client, key.host)  # its writer died before it could call `record_commit`

    def _limit_partials(self, host: str) -> None:
        excess = self.index.partials.count(host) - _MAX_PARTIALS
        if excess > 0:
            evicted = self.index.evict_partials(0, host, excess)
            spawn(self._evict(evicted), f"removing partial downloads from {host}")

    async def record_commit(self, key: IngestKey, size: int) -> None:
        """Count the blob that a reserved download has become."""
        self.index.remove(key)
        await self.record(key.digest, size, self._reservations.get(key, ""), key.host)

    def touch(self, digest: Digest) -> None:
        """Record that a blob is used now."""
        if self.index.touch(digest, self._clock()):
            self._mark_used_again(digest)

    def _mark_used_again(self, digest: Digest) -> None:
        self._used_again.add(digest)
        if not self._is_marking:
            self._is_marking = True
            spawn(self._mark_files(), "noting which blobs were used again")

    async def _mark_files(self) -> None:
        try:
            while self._used_again:
                digests, self._used_again = self._used_again, set()
                await in_thread(self._reactor, self._mark_all, digests)
        finally:
            self._is_marking = False

    def _mark_all(self, digests: set[Digest]) -> None:
        for digest in digests:
            self._blobs.mark_used_again(digest)

    async def record(self, digest: Digest, size: int, client: str, registry: str) -> None:
        """Count a blob that was written, and evict others if the limit is exceeded.

        `client` is the address of the client that requested it, and `registry` the host that sent it.
        """
        self._add(digest, size, client, registry)
        self.index.pin(digest)
        try:
            with suppress(CacheFull):
                await self._evict(self.index.evict(0))
        finally:
            self.index.unpin(digest)

    def keep(self, digests: Iterable[Digest]) -> None:
        """Never evict these blobs from now on, because the administrator has pinned them."""
        self.index.keep(digests, self._clock())

    def stop_keeping(self, digests: Iterable[Digest]) -> None:
        """Let these blobs be evicted again."""
        self.index.stop_keeping(digests, self._clock())

    async def usage(self) -> tuple[int, int]:
        """Return the bytes used, also by links and records, and the limit."""
        return self.index.used - self.index.overhead + self._file_count * _FILE_COST, self.index.limit

    def report_bounds(self) -> list[BoundReport]:
        """Return for `dockerproxy debug` how much of the cache each client and registry has brought."""
        used, limit = self.index.used, self.index.limit
        by_client, by_registry = self.index.held_bytes()
        return [
            BoundReport(
                name=name, used=used, limit=limit, share=limit // 2, refused=refused,
                clients={owner: size for owner, size in held.most_common(_MAX_REPORTED) if owner},
            )
            for name, held, refused in (
                ("bytes of the cache by client", by_client, self._refused),
                ("bytes of the cache by registry", by_registry, 0),
            )
        ]  # fmt: skip

    async def purge(self, digests: Iterable[Digest]) -> None:
        """Remove blobs and their partial downloads even if they are in use. Open readers can still read to the end."""
        blobs = list(digests)
        for digest in blobs:
            self.index.remove(digest)
        ingests = await in_thread(self._reactor, self._find_ingests, blobs)
        for key in ingests:
            self.index.remove(key)
        await self._remove([*ingests, *blobs])

    def _find_ingests(self, digests: list[Digest]) -> list[IngestKey]:
        return [key for digest in digests for key in ingests_of(self._layout, digest)]

    def _add(self, key: CacheKey, size: int, client: str, registry: str) -> None:
        is_second_use = self.index.add(key, size, self._clock(), client_key(client), registry)
        if is_second_use and isinstance(key, Digest):
            self._mark_used_again(key)

    async def _free_disk_space(self, size: int, expected_size: int) -> str:
        """Evict blobs if the disk has less than `size` bytes free. Return the reason if that is impossible, or `""`.

        It is impossible, too, if evictions could not free `expected_size` bytes.
        """
        free = await in_thread(self._reactor, self._free_bytes) - _MIN_FREE_BYTES
        if free >= size and free + self.index.evictable >= expected_size:
            return ""
        if free + self.index.evictable >= expected_size:
            # Evict as if the limit were lower by the shortfall, so that the least recently used go first here too.
            with suppress(CacheFull):
                await self._evict(self.index.evict(self.index.free + size - free))
                return ""
        return (
            f"CACHE_DIR is full: its disk lacks {expected_size - free} bytes for it and for the 16 MiB that are kept"
            " free; free space there, or give it a larger disk"
        )

    def _free_bytes(self) -> int:
        status = os.statvfs(self._layout.root)
        return status.f_bavail * status.f_frsize

    async def _evict(self, keys: list[CacheKey], reason: str = "room") -> None:
        self._on_evicted(reason, len(keys))
        if keys:
            log.info("evicting {count} blobs", count=len(keys))
            await in_thread(self._reactor, self._evict_all, keys, reason)

    def _evict_all(self, keys: list[CacheKey], reason: str) -> None:
        now, evicted = self._clock(), []
        for key in keys:
            if isinstance(key, Digest):
                with suppress(OSError):
                    evicted.append((key, now - os.stat(self._layout.blob(key)).st_mtime))
        # First the tombstone: a request that misses the blob finds it.
        self._tombstones.note_evicted(evicted, now, made_room=reason == "room")
        self._remove_all(keys)

    async def _remove(self, keys: list[CacheKey]) -> None:
        if keys:
            await in_thread(self._reactor, self._remove_all, keys)

    def _remove_all(self, keys: list[CacheKey]) -> None:
        for key in keys:
            try:
                if isinstance(key, IngestKey):
                    self._discard_ingest(key)
                else:
                    self._blobs.remove(key)
            except OSError as error:
                _log_removal_error(key, error)

    def _discard_ingest(self, key: IngestKey) -> None:
        if _file_size(self._layout.ingest(key)) is not None:
            ingest = Ingest.open(self._layout, key)
            if ingest is not None:
                try:
                    ingest.discard()
                finally:
                    ingest.release()

    def _scan(self, rescan: Rescan) -> Iterator[None]:
        remove_ingests_without_host(self._layout)
        for partial in walk_ingests(self._layout):
            if partial.last_used < self._clock() - _STALE_INGEST_AGE:
                self._remove_all([partial.key])
            if _file_size(self._layout.ingest(partial.key)) is not None:
                rescan.add(partial)
            yield None
        for entry in self._blobs.walk():
            rescan.add(entry)
            yield None
        yield from rescan.sort()


class _MaintenanceService(TimerService):
    """Starts the maintenance at intervals. When it stops, it calls `stop`, which ends a walk after its current step."""

    def __init__(self, reactor: Any, maintain: Callable[[], Deferred[None]], stop: Callable[[], object]) -> None:
        super().__init__(MAINTENANCE_INTERVAL, maintain)  # type: ignore[no-untyped-call]
        self.clock = reactor
        self._stop = stop

    def stopService(self) -> Any:
        self._stop()
        return super().stopService()  # type: ignore[no-untyped-call]


def _log_removal_error(key: CacheKey, error: OSError) -> None:
    log.error("cannot remove {key} from the cache: {reason}", key=str(key), reason=error.strerror)


def _file_size(path: str) -> int | None:
    """Return the bytes in the file at `path`, or None if it does not exist."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None
