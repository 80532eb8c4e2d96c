"""Coordination of downloads of the same blob from the same registry, across processes too.

Downloads coordinate through the ingest file and its lock. The file does not contain the size of the blob, nor the
repository and identity of the request. The writing process publishes these as a `DownloadInfo` record.

A process that follows the ingest of another one is told of each change by the kernel (`IngestObserver`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from attrs import asdict, frozen
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import ForeignIngest, Ingest
from dockerproxy.store.inotify import FileWatcher
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.records import Records

if TYPE_CHECKING:
    from hashlib import _Hash

_RECORD_KIND = "flight"

_MIN_INTERVAL = 0.01  # seconds between two looks at a followed ingest
_MAX_INTERVAL = 1.0
_MAX_POLL_INTERVAL = 0.1  # without inotify

log = Logger()


@frozen
class DownloadInfo:
    """A response that upstream has begun to send to `identity`, from the repository `key`.

    `size` is in bytes, or None if upstream does not give it. `opened` is the reactor's time, which all processes share.
    """

    size: int | None
    key: str
    identity: str
    opened: float


class IngestWriter(Protocol):
    """The exclusive right to write an ingest; `store.ingest.Ingest` has the details."""

    is_foreign: ClassVar[Literal[False]]
    key: IngestKey
    size: int

    def rehash(self) -> None: ...

    def append(self, chunks: Sequence[bytes]) -> None: ...

    def verify(self) -> bool: ...

    def hasher_copy(self) -> _Hash: ...

    def touch(self) -> None: ...

    def commit(self, blobs: Blobs) -> None: ...

    def discard(self) -> None: ...

    def release(self) -> None: ...

    def reader(self) -> int: ...

    def duplicate(self) -> int: ...


class FollowedIngest(Protocol):
    """An ingest that somebody else writes and this process reads; `store.ingest.ForeignIngest` has the details."""

    is_foreign: ClassVar[Literal[True]]

    @property
    def size(self) -> int: ...

    @property
    def in_progress(self) -> bool: ...

    def was_committed(self, layout: Layout) -> bool: ...

    def reader(self) -> int: ...

    def try_take_over(self) -> IngestWriter | None: ...

    def close(self) -> None: ...


class IngestObserver:
    """Tells when to look again at the ingests that other processes write.

    The kernel reports changes (inotify). A follower looks at most every _MIN_INTERVAL seconds, however often the file
    is written. If the kernel reports nothing, it looks every _MAX_INTERVAL seconds, because the kernel reports that a
    dying writer has closed its file before it releases the lock. Without inotify, a follower looks again after
    _MIN_INTERVAL seconds, and less and less often while there is no progress.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._watcher = FileWatcher(reactor)
        self._warned = False

    @contextmanager
    def observe(self, fd: int) -> Iterator[Changes]:
        """Observe the open file `fd` during the ``with`` block."""
        changes = Changes(self._reactor)
        try:
            watch = self._watcher.watch(fd, changes.notify)
        except OSError as error:
            self._warn(error)
            yield PolledChanges(self._reactor)
            return
        try:
            yield changes
        finally:
            self._watcher.unwatch(watch)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warn(
                "cannot watch the downloads of other processes ({reason}); checking each of them every {ms} ms or less"
                " often instead, which takes more CPU time",
                reason=error.strerror, ms=int(_MIN_INTERVAL * 1000),
            )  # fmt: skip


class Changes:
    """The changes of one file, as the kernel reports them."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._changed = False
        self._waiter: Deferred[None] | None = None

    def notify(self) -> None:
        """Record a change, and wake the follower."""
        self._changed = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    async def wait(self, *, progress: bool) -> None:
        """Wait until it is time to look again. `progress` says whether the last look has shown any."""
        await deferLater(self._reactor, _MIN_INTERVAL)
        if not self._changed:
            self._waiter = Deferred()
            timeout = self._reactor.callLater(_MAX_INTERVAL, self.notify)
            await self._waiter
            if timeout.active():
                timeout.cancel()
        self._changed = False


class PolledChanges(Changes):
    """The substitute for a process that cannot have inotify."""

    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor)
        self._interval = _MIN_INTERVAL

    async def wait(self, *, progress: bool) -> None:
        self._interval = _MIN_INTERVAL if progress else min(2 * self._interval, _MAX_POLL_INTERVAL)
        await deferLater(self._reactor, self._interval)


@frozen
class Ingests:
    """The ingest files of a cache. `shared` is true if other processes use the same cache."""

    _layout: Layout
    _blobs: Blobs
    _records: Records
    shared: bool = False

    def acquire(self, key: IngestKey) -> IngestWriter | FollowedIngest | None:
        """Return the ingest of `key`, locked for writing, or a read-only view if another process writes it.

        Return None if the blob is in the store by now: another process or another registry was faster. Block the
        thread. Raise `OSError`.
        """
        while True:
            ingest = Ingest.open(self._layout, key)
            if ingest is not None:
                if self._blobs.exists(key.digest):
                    ingest.discard()
                    return None
                return ingest
            foreign = ForeignIngest.open(self._layout, key)
            if foreign is not None:
                return foreign

    def commit(self, ingest: IngestWriter) -> None:
        """Move the complete file of `ingest` into the store. Block the thread. Raise `OSError`."""
        ingest.commit(self._blobs)

    def was_committed(self, ingest: FollowedIngest) -> bool:
        """Return whether the file of `ingest` has become the blob."""
        return ingest.was_committed(self._layout)

    def is_stored(self, digest: Digest) -> bool:
        """Return whether the blob is in the store, whichever registry it came from."""
        return self._blobs.exists(digest)

    def publish_info(self, ingest: IngestWriter, info: DownloadInfo) -> None:
        """Publish `info` to other processes, and make them look at it."""
        if self.shared:
            try_put(self._records, asdict(info), _RECORD_KIND, ingest.key.host, str(ingest.key.digest))
            ingest.touch()

    def remove_info(self, key: IngestKey) -> None:
        """Remove the published information."""
        if self.shared:
            try_remove(self._records, _RECORD_KIND, key.host, str(key.digest))

    def read_info(self, key: IngestKey) -> DownloadInfo | None:
        """Return the information that the writing process published; None if there is none yet."""
        return _parse_info(self._records.get(_RECORD_KIND, key.host, str(key.digest)) or {})


def _parse_info(record: Mapping[str, Any]) -> DownloadInfo | None:
    match record:
        case {"size": int() | None as size, "key": str(key), "identity": str(identity), "opened": float(opened)}:
            return DownloadInfo(size, key, identity, opened)
    return None
