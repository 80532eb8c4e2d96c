"""A blob under way: a file that grows while it is hashed, survives the process, and becomes a blob or goes.

The lock on the file says who writes. It goes with the process, so that after a `kill -9` the next one takes up what is
there; what it cannot know - whether the bytes are right - the digest says at the end. Other processes read along.
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
    """The one right to write a blob's ingest file. Ends with `publish`, `discard` or `release`.

    `size` is the number of bytes that are there. The caller `rehash`es those of an earlier run before it appends.
    Of `rehash`, `append`, `verify` and `publish` one runs at a time, in whatever thread.
    """

    digest: Digest
    _path: str

    @classmethod
    def open(cls, layout: Layout, digest: Digest) -> Ingest | None:
        """Return the ingest of `digest`, made if need be, or None while another holds it (`Followed.open` it then).

        The other may have published in between: look for the blob after this, not before. Raises `OSError`.
        """
        path = layout.ingest(digest)
        while True:
            fd = _open_writable(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock the one who held it may have published or discarded the file.
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
        """Write `chunks` after what is there, and hash them. Blocks.

        Raises `OSError` (a full disk); then nothing of them is kept, and it may be tried again.
        """
        self._require_hashed()
        super().append(chunks)

    def verify(self) -> bool:
        """Say whether what is there is the whole blob, by its digest."""
        self._require_hashed()
        return self._hasher.hexdigest() == self.digest.hex

    def commit(self, blobs: Blobs) -> None:
        """Make it a blob, and end. Blocks.

        Raise `DigestInvalid` where it is not whole, `OSError` where it cannot be done; the ingest is then as before.
        """
        if not self.verify():
            raise DigestInvalid(f"what was received is not the content of {self.digest}")
        blobs.commit(self._path, self.digest)
        self.release()

    def discard(self) -> None:
        """Remove what is there, and end; who reads it goes on reading."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
        self.release()

    def release(self) -> None:
        """Leave what is there to be resumed, and end; a second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Closing alone would not do: the readers' descriptors are copies of this one and share its lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def reader(self) -> int:
        """Return a descriptor to read from, the caller's to close; it outlives the end of the ingest.

        Up to `size` the bytes stay as they are; beyond it a failed `append` may take them back.
        """
        return os.dup(self._fd)


@frozen
class ForeignIngest:
    """An ingest that another process writes, to be read along. Ends with `close`, or when it was `taken_over`."""

    digest: Digest
    fd: int
    _path: str

    @classmethod
    def open(cls, layout: Layout, digest: Digest) -> ForeignIngest | None:
        """Return the ingest of `digest` as it is, None where there is none (or no longer). Raises `OSError`."""
        path = layout.ingest(digest)
        try:
            return cls(digest, os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
        except FileNotFoundError:
            return None

    @property
    def size(self) -> int:
        """How many bytes are there now. They stay as they are, unless the writer's disk is full."""
        return os.fstat(self.fd).st_size

    @property
    def in_progress(self) -> bool:
        """Whether it is still under way: not published, nor given up by a writer that was alive to do so."""
        return _is_same_file(self._path, self.fd)

    def try_take_over(self) -> Ingest | None:
        """Return the right to write, where whoever had it has gone without an end; what is there is to be rehashed."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not self.in_progress:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            return None
        return Ingest(self.size, self.fd, self.digest.hasher(), self.digest, self._path)

    def close(self) -> None:
        """End the reading along; not after it was `taken_over`."""
        os.close(self.fd)


def stale_ingests(layout: Layout, older_than: float) -> list[Digest]:
    """Return the ingests last written before `older_than` (POSIX time), to be opened and discarded. Blocks."""
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
