"""Ingests: partially downloaded blobs. An ingest file outlives its process, and is committed as a blob or deleted.

The writer holds a lock (flock) on the file. The kernel releases it when the process ends, so that after a `kill -9`
another process can resume the download. The resumed bytes may be wrong, but the digest is verified at the end. Other
processes can read the file while it grows.

Each registry has its own ingest of a blob, because bytes that one registry sent are not verified yet.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import ClassVar, Literal

from attrs import define, frozen

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.eviction import Entry
from dockerproxy.store.files import try_remove
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.layout import IngestKey, Layout, digest_from_names, ingest_key_from_names
from dockerproxy.store.tree_reader import list_names


@define(eq=False)
class Ingest(HashedAppendFile):
    """The exclusive right to write a blob's ingest file. It ends with `commit`, `discard` or `release`.

    `size` is the number of bytes in the file. If an earlier run left some, the caller must `rehash` before it appends.
    Only one of `rehash`, `append`, `verify` and `commit` may run at a time, in any thread.
    """

    is_foreign: ClassVar[Literal[False]] = False

    key: IngestKey
    _path: str

    @classmethod
    def open(cls, layout: Layout, key: IngestKey) -> Ingest | None:
        """Open or create the ingest of `key`. Return None if another writer has it (then use `ForeignIngest.open`).

        Check whether the blob exists after this call, not before it, because another writer may have just committed
        it. Raises `OSError`.
        """
        path = layout.ingest(key)
        while True:
            fd = _open_writable(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous writer may have committed or discarded the file between our open and our lock.
                if _is_same_file(path, fd):
                    return cls(os.fstat(fd).st_size, fd, key.digest.hasher(), key, path)
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Append and hash `chunks`. Blocks.

        If it raises `OSError` (such as a full disk), the file has its old size, and the caller may try again.
        """
        self._require_hashed()
        super().append(chunks)

    def verify(self) -> bool:
        """Return whether the file has the digest of the blob."""
        self._require_hashed()
        return self._hasher.hexdigest() == self.key.digest.hex

    def commit(self, blobs: Blobs) -> None:
        """Commit the file as a blob and end the ingest. Blocks.

        Raises `DigestInvalid` if the blob is not complete, or `OSError`; the ingest is unchanged then.
        """
        if not self.verify():
            raise DigestInvalid(f"the {self.size} bytes received do not match the digest {self.key.digest}")
        blobs.commit(self._path, self.key.digest)
        self.release()

    def touch(self) -> None:
        """Make the processes that read the file look at it again."""
        with suppress(OSError):
            os.utime(self._fd)

    def discard(self) -> None:
        """Delete the file and end the ingest. Open readers stay usable."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
        self.release()

    def release(self) -> None:
        """End the ingest, but leave the file to be resumed. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Closing may not release the lock: a descriptor from `duplicate` shares it.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def reader(self) -> int:
        """Return a descriptor to read from. It stays valid after the end of the ingest, and the caller closes it.

        Bytes up to `size` do not change. A failed `append` may cut off bytes beyond that.
        """
        return _open_to_read(self._fd)

    def duplicate(self) -> int:
        """Return a duplicate of the descriptor, which the caller closes. It reports the errors of earlier writes."""
        return os.dup(self._fd)


@frozen
class ForeignIngest:
    """An ingest that another process writes, opened to read it. It ends with `close` or a successful takeover."""

    is_foreign: ClassVar[Literal[True]] = True

    key: IngestKey
    _fd: int
    _path: str

    @classmethod
    def open(cls, layout: Layout, key: IngestKey) -> ForeignIngest | None:
        """Open the ingest of `key`, or return None if there is none. Raises `OSError`."""
        path = layout.ingest(key)
        try:
            return cls(key, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), path)
        except FileNotFoundError:
            return None

    @property
    def size(self) -> int:
        """The current number of bytes. They do not change, unless the writer's disk is full."""
        return os.fstat(self._fd).st_size

    @property
    def in_progress(self) -> bool:
        """Whether the ingest has neither been committed nor discarded. Stays true if its writer was killed."""
        return _is_same_file(self._path, self._fd)

    def was_committed(self, layout: Layout) -> bool:
        """Return whether this very file has become the blob.

        A blob of another registry may exist even if the writer has found this file to be wrong.
        """
        return _is_same_file(layout.blob(self.key.digest), self._fd)

    def reader(self) -> int:
        """Return a descriptor to read from. It stays valid after the end of the ingest, and the caller closes it."""
        return _open_to_read(self._fd)

    def try_take_over(self) -> Ingest | None:
        """Return the ingest if its writer has died or released it, otherwise None. The caller must `rehash` it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not self.in_progress:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            return None
        return Ingest(self.size, self._fd, self.key.digest.hasher(), self.key, self._path)

    def close(self) -> None:
        """Close the file. Do not call this after a successful `try_take_over`."""
        os.close(self._fd)


def walk_ingests(layout: Layout) -> Iterator[Entry[IngestKey]]:
    """Yield all ingests, in no order, with their sizes and the times of their last writes. Blocks."""
    for host in list_names(layout.ingests):
        for name in list_names(f"{layout.ingests}/{host}"):
            key = ingest_key_from_names(host, name)
            if key is not None:
                with suppress(FileNotFoundError):
                    status = os.stat(layout.ingest(key))
                    yield Entry(key, status.st_size, status.st_mtime)


def ingests_of(layout: Layout, digest: Digest) -> list[IngestKey]:
    """Return the ingests of the blob `digest`, one for each registry that has sent a part of it. Blocks."""
    name = f"{digest.algorithm}-{digest.hex}"
    keys = [ingest_key_from_names(host, name) for host in list_names(layout.ingests)]
    return [key for key in keys if key is not None and os.path.exists(layout.ingest(key))]


def remove_ingests_without_host(layout: Layout) -> None:
    """Delete the partial downloads of an earlier version, of which nobody knows who sent them. Blocks."""
    for name in list_names(layout.ingests):
        path = f"{layout.ingests}/{name}"
        algorithm, _, encoded = name.partition("-")
        if digest_from_names(algorithm, encoded) is not None and os.path.isfile(path):
            try_remove(path)


def _open_writable(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _is_same_file(path: str, fd: int) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(fd))


def _open_to_read(fd: int) -> int:
    """Open the file of `fd` once more, to read it.

    Unlike a duplicate, the result does not share the lock. If the writer closes `fd`, the kernel reports that to
    followers (IN_CLOSE_WRITE), although readers are left.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
