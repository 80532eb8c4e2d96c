"""Tombstones of evicted blobs: when each left the cache, and for how long nobody had used it.

They are two rings in shared memory, which every process reads and the main process writes: 10,000 digests, and 20,000
links that were removed because their blob was gone. A repository is told that a blob was evicted only if it had a link
to it. Otherwise the owner of a registry could find out which blobs others have pulled.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.oci.names import Digest
from dockerproxy.store.files import history_staging
from dockerproxy.store.tree_reader import read_small

MAX_DIGESTS, MAX_LINKS = 10_000, 20_000

_MAGIC = b"docker-registry-proxy tombstones 1\n"
_HEAD = struct.Struct("<QQQ")  # the next slots of both rings, and 1 + the idle age of what last made room
_KEY_SIZE = 16  # bytes of a hash
_TIMES = struct.Struct("<II")  # POSIX time of the eviction, and seconds without a use
_RECORD_SIZE = _KEY_SIZE + _TIMES.size
_SIZE = _HEAD.size + MAX_DIGESTS * _RECORD_SIZE + MAX_LINKS * _KEY_SIZE
_MAX_SECONDS = 2**32 - 1
_SAVE_INTERVAL = 60.0  # seconds

log = Logger()


@frozen
class Tombstone:
    """A blob left the cache at `evicted_at` (POSIX time), after `idle` seconds without a use."""

    evicted_at: int
    idle: int

    def __str__(self) -> str:
        """Return the cause of a miss, ``evicted DATE IDLE``."""
        return f"evicted {time.strftime('%Y-%m-%d', time.gmtime(self.evicted_at))} {format_idle(self.idle)}"


@define(eq=False)
class Tombstones:
    """The rings in an anonymous mapping, which forked processes inherit."""

    _memory: mmap.mmap = field(factory=lambda: mmap.mmap(-1, _SIZE), init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)  # of the threads of the main process
    _is_changed: bool = field(default=False, init=False)

    # the main process

    def note_evicted(self, evicted: Iterable[tuple[Digest, float]], now: float, *, made_room: bool) -> None:
        """Note blobs that were evicted at the POSIX time `now`, and the seconds since the last use of each.

        `made_room` says that they were evicted for others. Call this in a thread, because it takes up to 0.1 ms for
        each of them.
        """
        ages = []
        with self._lock:
            for digest, idle in evicted:
                age = int(min(max(idle, 0.0), _MAX_SECONDS))
                ages.append(age)
                self._add_digest(_key(str(digest)), int(min(max(now, 0.0), _MAX_SECONDS)), age)
            if ages and made_room:
                digests, links, _ = _HEAD.unpack_from(self._memory)
                _HEAD.pack_into(self._memory, 0, digests, links, 1 + min(ages))
            self._is_changed = self._is_changed or bool(ages)

    def note_unlinked(self, repository: str, digest: Digest) -> None:
        """Note that the repository's link to the blob was removed, because the blob was gone."""
        with self._lock:
            if self._find_digest(digest) is None:
                return
            digests, links, idle = _HEAD.unpack_from(self._memory)
            start = _HEAD.size + MAX_DIGESTS * _RECORD_SIZE + links % MAX_LINKS * _KEY_SIZE
            self._memory[start : start + _KEY_SIZE] = _key(f"{repository}\0{digest}")
            _HEAD.pack_into(self._memory, 0, digests, (links + 1) % MAX_LINKS, idle)
            self._is_changed = True

    def load(self, path: str) -> None:
        """Read the rings that `save` wrote. A file that is torn, or from another version, is set aside."""
        try:
            content = read_small(path, len(_MAGIC) + _SIZE + 1)
        except OSError as error:
            log.warn("{path} cannot be read: {reason}", path=path, reason=error.strerror)
            return
        if content is None:
            return
        if len(content) == len(_MAGIC) + _SIZE and content.startswith(_MAGIC):
            self._memory[:] = content[len(_MAGIC) :]
            return
        log.warn("{path} was not written by this version; it is set aside as {path}.aside", path=path)
        with suppress(OSError):
            os.replace(path, f"{path}.aside")

    def save(self, path: str) -> None:
        """Write the rings, if they have changed since the last call. Raise OSError. Blocks."""
        with self._lock:
            content, is_changed, self._is_changed = self._memory[:], self._is_changed, False
        if not is_changed:
            return
        try:
            history_staging(os.path.dirname(path)).write(_MAGIC + content, path)
        except OSError:
            self._is_changed = True  # so that the next call tries again
            raise

    # every process

    @property
    def last_idle(self) -> int | None:
        """The seconds for which the blob that last made room had not been used; None if none has made room yet.

        If several made room at once, it is the one that was used last.
        """
        idle: int = _HEAD.unpack_from(self._memory)[2]
        return idle - 1 if idle else None

    def get_last_idle(self) -> int | None:
        """Return `last_idle`."""
        return self.last_idle

    def find(self, digest: Digest) -> Tombstone | None:
        """Return the tombstone of the blob, which only administrators may know; None if there is none."""
        return self._find_digest(digest)

    def find_in(self, repository: str, digest: Digest, *, is_linked: bool) -> Tombstone | None:
        """Return the tombstone of the blob if the repository has a link to it (`is_linked`), or had one."""
        tombstone = self._find_digest(digest)
        if tombstone is None or is_linked:
            return tombstone
        base = _HEAD.size + MAX_DIGESTS * _RECORD_SIZE
        is_known = self._find(_key(f"{repository}\0{digest}"), base, _SIZE, _KEY_SIZE) is not None
        return tombstone if is_known else None

    def _find_digest(self, digest: Digest) -> Tombstone | None:
        position = self._find(_key(str(digest)), *_DIGESTS)
        return None if position is None else Tombstone(*_TIMES.unpack_from(self._memory, position + _KEY_SIZE))

    def _add_digest(self, key: bytes, now: int, idle: int) -> None:
        position = self._find(key, *_DIGESTS)
        if position is None:
            digests, links, last_idle = _HEAD.unpack_from(self._memory)
            position = _HEAD.size + digests % MAX_DIGESTS * _RECORD_SIZE
            _HEAD.pack_into(self._memory, 0, (digests + 1) % MAX_DIGESTS, links, last_idle)
        self._memory[position : position + _RECORD_SIZE] = key + _TIMES.pack(now, idle)

    def _find(self, key: bytes, start: int, end: int, size: int) -> int | None:
        """Return the position of the record that begins with `key`."""
        position = self._memory.find(key, start, end)
        while position >= 0 and (position - start) % size:
            position = self._memory.find(key, position + 1, end)
        return position if position >= 0 else None


_DIGESTS = _HEAD.size, _HEAD.size + MAX_DIGESTS * _RECORD_SIZE, _RECORD_SIZE


class TombstoneService(TimerService):
    """Saves the tombstones at `path` once a minute, if there are new ones, and at the end of the daemon."""

    def __init__(self, reactor: Any, tombstones: Tombstones, path: str) -> None:
        super().__init__(_SAVE_INTERVAL, self._save_in_thread)  # type: ignore[no-untyped-call]
        self.clock = self._reactor = reactor
        self._tombstones = tombstones
        self._path = path
        self._has_failed = False

    def stopService(self) -> Any:
        self._save()
        return super().stopService()  # type: ignore[no-untyped-call]

    def _save_in_thread(self) -> Deferred[None]:
        return spawn(in_thread(self._reactor, self._save), f"writing {self._path}")

    def _save(self) -> None:
        try:
            self._tombstones.save(self._path)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.error("{path} cannot be written: {reason}", path=self._path, reason=error.strerror)
        else:
            self._has_failed = False


def format_idle(seconds: float) -> str:
    """Return a time as the settings write it, in its largest unit: ``43d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_KEY_SIZE).digest()
