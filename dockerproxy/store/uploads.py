"""Upload sessions: blobs that are being pushed. Their bytes on disk outlive the connection and the daemon.

The on-disk layout is CNCF distribution's. A lock (flock) on a session's file ensures that only one request in any
process writes to it. The kernel releases the lock when the process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import define, field

from dockerproxy.errors import BlobUploadBusy, BlobUploadUnknown
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import iter_repositories, remove_empty_directories
from dockerproxy.store.tree_reader import list_names

if TYPE_CHECKING:
    from hashlib import _Hash

_SESSION_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAX_HASHERS = 1000  # suspended sessions whose hash is kept in memory; the others are hashed again at the end
_ATTEMPTS = 8  # an empty directory of the repository may be removed while it is created


@define(eq=False)
class Upload(HashedAppendFile):
    """The exclusive right to write to a session. It ends with `commit`, `cancel` or `Uploads.suspend`."""

    session: str
    _directory: str

    def truncate(self, size: int) -> None:
        """Truncate the file to its first `size` bytes. Blocks. Raises `OSError`."""
        os.ftruncate(self._fd, size)
        self.size = size
        self.hashed_size = -1  # a hash cannot be rolled back

    def is_hashed(self, algorithm: str) -> bool:
        """Return whether `verify` need not read the file for a digest of this algorithm."""
        return self.hashed_size == self.size and self._hasher.name == algorithm

    def verify(self, digest: Digest) -> bool:
        """Return whether the received bytes match `digest`. Blocks unless `is_hashed`. Raises `OSError`."""
        if not self.is_hashed(digest.algorithm):
            self.rehash(digest.algorithm)
        return self._hasher.hexdigest() == digest.hex

    def commit(self, blobs: Blobs, digest: Digest) -> None:
        """Commit the file as the blob `digest` and end the session. The caller has verified it. Blocks.

        If it raises `OSError`, the session is unchanged.
        """
        blobs.commit(f"{self._directory}/data", digest)
        self.cancel()

    def cancel(self) -> None:
        """Delete the session and its bytes. A second call does nothing. Blocks."""
        if self._fd >= 0:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._close()

    def _close(self) -> _Hash:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return self._hasher


@define
class Uploads:
    """The upload sessions of a store.

    Methods raise `NameInvalid` for an invalid repository name, and `OSError`. Call them in the reactor's thread, except
    `start` and `purge`, which block.
    """

    _layout: Layout
    _clock: Callable[[], float] = time.time
    _hashers: OrderedDict[str, tuple[_Hash, int]] = field(factory=OrderedDict, init=False)

    def start(self, repository: str, algorithm: str = "sha256") -> Upload:
        """Start a session whose bytes are hashed with `algorithm` as they arrive. Blocks."""
        session = str(uuid.uuid4())
        directory = self._directory(repository, session)
        try:
            _makedirs(directory)
            started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
            with open(f"{directory}/startedat", "x", encoding="ascii") as file:
                file.write(started_at)
            os.close(os.open(f"{directory}/data", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            return self._acquire(session, directory, hashlib.new(algorithm))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def resume(self, repository: str, session: str) -> Upload:
        """Open a session to append to it. Raises `BlobUploadUnknown` and `BlobUploadBusy`."""
        directory = self._directory(repository, session)
        hasher, hashed_size = self._hashers.get(session) or (hashlib.sha256(), 0)
        upload = self._acquire(session, directory, hasher)
        self._hashers.pop(session, None)
        # Another process may have appended to the session. Our hash still covers the first bytes of the file.
        upload.hashed_size = hashed_size if hashed_size <= upload.size else -1
        return upload

    def suspend(self, upload: Upload) -> None:
        """Release a session, so that it can be resumed. Does nothing if it has ended."""
        if upload._fd >= 0:
            self._hashers[upload.session] = (upload._close(), upload.hashed_size)
            if len(self._hashers) > _MAX_HASHERS:
                self._hashers.popitem(last=False)

    def size(self, repository: str, session: str) -> int:
        """Return the number of bytes of a session, even one that is being written. Raises `BlobUploadUnknown`."""
        try:
            return os.stat(f"{self._directory(repository, session)}/data").st_size
        except (FileNotFoundError, NotADirectoryError):
            raise _unknown_upload() from None

    def purge(self, before: float) -> int:
        """Delete the sessions that were last used before `before` (POSIX time). Return their number. Blocks.

        Also delete the directory of a repository that contains nothing else.
        """
        count = 0
        for repository in iter_repositories(self._layout, "_uploads"):
            directory = self._layout.uploads(repository)
            for session in list_names(directory):
                if _SESSION_ID.fullmatch(session):
                    count += self._purge_session(f"{directory}/{session}", session, before)
            remove_empty_directories(self._layout, directory)
        return count

    def _purge_session(self, directory: str, session: str, before: float) -> bool:
        paths = (directory, f"{directory}/data", f"{directory}/startedat")
        if max(map(_mtime, paths)) >= before:
            return False
        try:
            self._acquire(session, directory, hashlib.sha256()).cancel()
        except BlobUploadBusy:
            return False
        except BlobUploadUnknown:  # a crash came after its data was committed, but before the session was deleted
            shutil.rmtree(directory, ignore_errors=True)
        return True

    def _directory(self, repository: str, session: str) -> str:
        if not _SESSION_ID.fullmatch(session):
            raise _unknown_upload()
        return f"{self._layout.uploads(repository)}/{session}"

    def _acquire(self, session: str, directory: str, hasher: _Hash) -> Upload:
        path = f"{directory}/data"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise _unknown_upload() from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            # The previous writer may have committed or cancelled the session between our open and our lock.
            if _file_id(path) != (status.st_dev, status.st_ino):
                raise _unknown_upload()
            return Upload(status.st_size, fd, hasher, session, directory)
        except BlockingIOError:
            os.close(fd)
            raise BlobUploadBusy("another request is writing to this upload") from None
        except BaseException:
            os.close(fd)
            raise


def _makedirs(directory: str) -> None:
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            os.makedirs(directory)
            return
    os.makedirs(directory)


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _mtime(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _unknown_upload() -> BlobUploadUnknown:
    return BlobUploadUnknown("there is no such upload in this repository")
