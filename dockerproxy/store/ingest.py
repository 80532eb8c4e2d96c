"""Ingests: partially downloaded blobs. An ingest file outlives its process, and is committed as a blob or deleted.

The writer holds a lock (flock) on the file. The kernel releases it when the process ends, so that after a `kill -9`
another process can resume the download. The resumed bytes may be wrong, but the digest is verified at the end. Other
processes can read the file while it grows.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress

from attrs import define, frozen

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import list_names
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.layout import Layout, digest_from_names


@define(eq=False)
class Ingest(HashedAppendFile):
    """The exclusive right to write a blob's ingest file. It ends with `commit`, `discard` or `release`.

    `size` is the number of bytes in the file. If an earlier run left some, the caller must `rehash` before it appends.
    Only one of `rehash`, `append`, `verify` and `commit` may run at a time, in any thread.
    """

    digest: Digest
    _path: str

    @classmethod
    def open(cls, layout: Layout, digest: Digest) -> Ingest | None:
        """Open or create the ingest of `digest`. Return None if another writer has it (then use `ForeignIngest.open`).

        Check whether the blob exists after this call, not before it, because another writer may have just committed
        it. Raises `OSError`.
        """
        path = layout.ingest(digest)
        while True:
            fd = _open_writable(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous writer may have committed or discarded the file between our open and our lock.
                if _is_same_file(path, fd):
                    return cls(os.fstat(fd).st_size, fd, digest.hasher(), digest, path)
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
        return self._hasher.hexdigest() == self.digest.hex

    def commit(self, blobs: Blobs) -> None:
        """Commit the file as a blob and end the ingest. Blocks.

        Raises `DigestInvalid` if the blob is not complete, or `OSError`; the ingest is unchanged then.
        """
        if not self.verify():
            raise DigestInvalid(f"the {self.size} bytes received do not match the digest {self.digest}")
        blobs.commit(self._path, self.digest)
        self.release()

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
            # Closing would not release the lock, because the readers' descriptors are duplicates and share it.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def reader(self) -> int:
        """Return a descriptor to read from. It stays valid after the end of the ingest, and the caller closes it.

        Bytes up to `size` do not change. A failed `append` may cut off bytes beyond that.
        """
        return os.dup(self._fd)


@frozen
class ForeignIngest:
    """An ingest that another process writes, opened to read it. It ends with `close` or a successful takeover."""

    digest: Digest
    fd: int
    _path: str

    @classmethod
    def open(cls, layout: Layout, digest: Digest) -> ForeignIngest | None:
        """Open the ingest of `digest`, or return None if there is none. Raises `OSError`."""
        path = layout.ingest(digest)
        try:
            return cls(digest, os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
        except FileNotFoundError:
            return None

    @property
    def size(self) -> int:
        """The current number of bytes. They do not change, unless the writer's disk is full."""
        return os.fstat(self.fd).st_size

    @property
    def in_progress(self) -> bool:
        """Whether the ingest has neither been committed nor discarded. Stays true if its writer was killed."""
        return _is_same_file(self._path, self.fd)

    def try_take_over(self) -> Ingest | None:
        """Return the ingest if its writer has died or released it, otherwise None. The caller must `rehash` it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not self.in_progress:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            return None
        return Ingest(self.size, self.fd, self.digest.hasher(), self.digest, self._path)

    def close(self) -> None:
        """Close the file. Do not call this after a successful `try_take_over`."""
        os.close(self.fd)


def stale_ingests(layout: Layout, older_than: float) -> list[Digest]:
    """Return the ingests last written before `older_than` (POSIX time), which the caller may discard. Blocks."""
    digests = []
    for name in list_names(layout.ingests):
        digest = digest_from_names(*name.split("-", 1)) if "-" in name else None
        if digest is not None:
            with suppress(FileNotFoundError):
                if os.stat(layout.ingest(digest)).st_mtime < older_than:
                    digests.append(digest)
    return digests


def _open_writable(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _is_same_file(path: str, fd: int) -> bool:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(fd))
