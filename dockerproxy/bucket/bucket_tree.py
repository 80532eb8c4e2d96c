"""The tree of a registry in a bucket, for the code that reads one on a disk (`store.tree_reader`).

A path is a key of the bucket. A repository is read by one listing of its keys, which tells the existence and the size
of each link. The contents of links and manifests, and the sizes of contents, are requests of their own, several at a
time.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from attrs import define, field, frozen

from dockerproxy.bucket import keys
from dockerproxy.bucket.blocking_bucket import BlockingBucket
from dockerproxy.bucket.s3 import ListedKey
from dockerproxy.errors import StoreRefused
from dockerproxy.oci.names import Digest
from dockerproxy.store.tree_reader import TreeReader
from dockerproxy.thread_pool import DaemonThreadPool, Threads

AT_ONCE = 16
"""Requests of all listings of a process at a time."""

_MAX_REPOSITORIES = 2 * AT_ONCE + 2  # whose keys are in memory: those of the threads, and the one of a walk
_MAX_KEYS = 2_000_000  # of one repository, with some 300 bytes each
_MAX_STATUSES = 50_000
_SKIPPED = ("_uploads/", "_referrers/")  # nobody reads these here, and there may be many

T = TypeVar("T")
R = TypeVar("R")


@frozen(slots=True)
class Leaf:
    """An object: its size in bytes, and when it was written (POSIX time)."""

    size: int
    written: float


Directory = dict[str, "Directory | Leaf"]


class ReaderThreads:
    """The threads in which all `BucketTree`s of a process read, none of which is started before there is work."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._free = threading.Semaphore(AT_ONCE)

    @classmethod
    def start(cls) -> ReaderThreads:
        """Return them. The process does not wait for them at its end."""
        pool = DaemonThreadPool(0, AT_ONCE, "reads of the bucket")
        pool.start()
        return cls(pool)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results of `function` in the order of `items`, which are taken as there is room.

        Work that finds no free thread is done in the caller's. None waits for a thread, so `function` may call this.
        """
        pending: deque[Future[R]] = deque()
        for item in items:
            if len(pending) == AT_ONCE:
                yield pending.popleft().result()
            pending.append(self._start(partial(function, item)))
        while pending:
            yield pending.popleft().result()

    def _start(self, call: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        if self._free.acquire(blocking=False):
            self._threads.callInThreadWithCallback(None, self._run_and_release, future, call)
        else:
            _run(future, call)
        return future

    def _run_and_release(self, future: Future[R], call: Callable[[], R]) -> None:
        try:
            _run(future, call)
        finally:
            self._free.release()


def _run(future: Future[R], call: Callable[[], R]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


@define(eq=False)
class BucketTree(TreeReader):
    """Reads a bucket for one answer: what it has read once, it does not read again.

    If `walks` is true, the repositories are found by one listing of all their keys, which also has those without a
    manifest, and is what the answer needs anyway if it is about all of them. Otherwise they are those of the catalog.
    `known` has the sizes of contents that were listed before. Every method raises `StoreUnavailable` if the bucket does
    not answer.
    """

    _bucket: BlockingBucket
    _threads: ReaderThreads | None = None
    _walks: bool = False
    _known: Mapping[Digest, int] = field(factory=dict)
    _repositories: OrderedDict[str, Directory] = field(factory=OrderedDict, init=False)
    _statuses: dict[str, ListedKey | None] = field(factory=dict, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @property
    def records_use(self) -> bool:  # type: ignore[override]
        return False

    def read_small(self, path: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of the object at `path`, or None if it does not exist."""
        key = _key(path)
        if key.startswith(keys.REPOSITORIES):
            entry = self._find(key)
            if not isinstance(entry, Leaf):
                return None
            if not entry.size:
                return b""
        elif key in self._statuses and self._statuses[key] is None:
            return None
        return self._bucket.read_start(key, limit)

    def list_names(self, directory: str) -> list[str]:
        entry = self._find(_key(directory))
        return list(entry) if isinstance(entry, dict) else []

    def stat(self, path: str) -> os.stat_result:
        """Return the status of the object or directory at `path`. Raise `FileNotFoundError`."""
        key = _key(path)
        entry: Directory | Leaf | ListedKey | None
        entry = self._find(key) if key.startswith(keys.REPOSITORIES) else self._status(key)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(entry, dict):
            return _stat_result(stat.S_IFDIR, 0, 0.0)
        return _stat_result(stat.S_IFREG, entry.size, entry.written)

    def is_directory(self, path: str) -> bool:
        return isinstance(self._find(_key(path)), dict)

    def change_time(self, directory: str) -> int:
        entry = self._find(_key(directory))
        if not isinstance(entry, dict):
            return 0
        leaves = list(_leaves(entry))
        return hash((len(leaves), max((leaf.written for leaf in leaves), default=0.0)))

    def list_repositories(self) -> Iterator[str]:
        return self._walk() if self._walks else self._list_catalog()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items) if self._threads is None else self._threads.map(function, items)

    def forget(self, repository: str) -> None:
        """Read the keys of a repository again when they are needed."""
        with self._lock:
            self._repositories.pop(repository, None)

    def _status(self, key: str) -> ListedKey | None:
        if key not in self._statuses:
            digest = keys.content_of(key) if self._known else None
            if digest is not None and digest in self._known:
                return ListedKey(key, self._known[digest])
            status = self._bucket.status(key)
            if len(self._statuses) >= _MAX_STATUSES:
                self._statuses = {}
            self._statuses[key] = status
            return status
        return self._statuses.get(key)

    def _list_catalog(self) -> Iterator[str]:
        for entry in self._bucket.list_keys(keys.CATALOG):
            name = keys.catalog_name(entry.key)
            if name is not None:
                yield name

    def _walk(self) -> Iterator[str]:
        """Yield the repositories. The keys of one come together, and are in memory when it is yielded."""
        name, directory, count = "", Directory(), 0
        for entry in self._bucket.list_keys(keys.REPOSITORIES):
            repository = keys.repository_of(entry.key)
            if repository is None:
                continue
            if repository != name:
                if name:
                    self._remember(name, directory)
                    yield name
                name, directory, count = repository, Directory(), 0
            count += 1
            self._add(directory, name, entry, count)
        if name:
            self._remember(name, directory)
            yield name

    def _find(self, key: str) -> Directory | Leaf | None:
        """Return what is at a key of a repository."""
        name, separator, inner = key.removeprefix(keys.REPOSITORIES).partition("/_")
        if not separator:
            return None
        entry: Directory | Leaf | None = self._read_repository(name)
        for component in f"_{inner}".split("/"):
            if not isinstance(entry, dict):
                return None
            entry = entry.get(component)
        return entry

    def _read_repository(self, name: str) -> Directory:
        with self._lock:
            known = self._repositories.get(name)
            if known is not None:
                self._repositories.move_to_end(name)
                return known
        directory = Directory()
        for count, entry in enumerate(self._bucket.list_keys(f"{keys.REPOSITORIES}{name}/_"), 1):
            self._add(directory, name, entry, count)
        self._remember(name, directory)
        return directory

    def _remember(self, name: str, directory: Directory) -> None:
        with self._lock:
            self._repositories[name] = directory
            if len(self._repositories) > _MAX_REPOSITORIES:
                self._repositories.popitem(last=False)

    def _add(self, directory: Directory, name: str, entry: ListedKey, count: int) -> None:
        """Add an object, the one with the number `count`, to the directory of its repository."""
        if count > _MAX_KEYS:
            raise StoreRefused(f"{self._bucket.bucket.location} has more than {_MAX_KEYS} keys of {name}")
        path = entry.key[len(keys.REPOSITORIES) + len(name) + 1 :]
        *parents, last = path.split("/")
        if path.startswith(_SKIPPED) or not last:  # some tools make an empty object for a directory
            return
        for component in parents:
            child = directory.setdefault(component, {})
            if not isinstance(child, dict):
                return  # no file has children on a disk
            directory = child
        directory.setdefault(last, Leaf(entry.size, entry.written))


def _key(path: str) -> str:
    return path.removeprefix(keys.PATH_PREFIX)


def _leaves(directory: Directory) -> Iterator[Leaf]:
    pending = [directory]
    while pending:
        for entry in pending.pop().values():
            if isinstance(entry, dict):
                pending.append(entry)
            else:
                yield entry


def _stat_result(mode: int, size: int, written: float) -> os.stat_result:
    seconds = int(written)
    return os.stat_result(
        (mode | 0o600, 0, 0, 1, 0, 0, size, seconds, seconds, seconds),
        {"st_mtime": written, "st_mtime_ns": int(written * 1_000_000_000)},
    )
