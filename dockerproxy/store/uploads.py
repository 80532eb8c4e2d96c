"""Upload sessions: blobs that are being pushed. Their bytes on disk outlive the connection and the daemon.

A session is one file, whose name is its identifier (`oci/upload_ids`). There is none before the first byte. A lock
(flock) on the file ensures that only one request in any process writes to it. The kernel releases the lock when the
process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from dockerproxy.errors import BlobUploadBusy, BlobUploadUnknown, ServiceOverloaded, TooManyRequests
from dockerproxy.oci.names import Digest
from dockerproxy.oci.upload_ids import UPLOAD_ID, owner_of, repository_of, started_at
from dockerproxy.shares import BoundReport
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hashed_append_file import HashedAppendFile
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import iter_repositories, remove_empty_directories
from dockerproxy.store.tree_reader import list_names

if TYPE_CHECKING:
    from hashlib import _Hash

_MAX_HASHERS = 1000  # suspended sessions whose hash is kept in memory; the others are hashed again at the end
_GIVEN_UP_AGE = 600.0  # seconds without a byte after which a session makes room for another one
_ROOM_INTERVAL = 1.0  # seconds between two searches for sessions that were given up
_RETRY_AFTER = ("Retry-After", "60")


@frozen
class UploadLimits:
    """The bounds of unfinished uploads: of all clients together, and of one. One repository may have half of all."""

    total: int = 10_000
    per_client: int = 3_000

    @property
    def per_repository(self) -> int:
        """The bound of one repository."""
        return max(1, self.total // 2)


@define(eq=False)
class Upload(HashedAppendFile):
    """The exclusive right to write to a session. It ends with `commit`, `cancel` or `Uploads.suspend`."""

    session: str
    _path: str

    def truncate(self, size: int) -> None:
        """Truncate the file to its first `size` bytes. Blocks. Raises `OSError`."""
        os.ftruncate(self._fd, size)
        self.size = size
        self.hashed_size = -1  # a hash cannot be rolled back

    def fileno(self) -> int:
        """Return the descriptor of the file."""
        return self._fd

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
        blobs.commit(self._path, digest)
        self.close()

    def cancel(self) -> None:
        """Delete the session and its bytes. A second call does nothing. Blocks."""
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self._path)
        self.close()

    def close(self) -> _Hash:
        """Release the file, and return the hash of its bytes. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return self._hasher


@define
class Uploads:
    """The upload sessions of a store. `clock` returns POSIX time.

    Methods raise `OSError`. Call them in the reactor's thread, except `create` and `purge`, which block.
    """

    _layout: Layout
    _clock: Callable[[], float] = time.time
    limits: UploadLimits = field(factory=UploadLimits, kw_only=True)
    _hashers: OrderedDict[str, tuple[_Hash, int]] = field(factory=OrderedDict, init=False)
    _refused: int = field(default=0, init=False)
    _made_room_at: float = field(default=0.0, init=False)

    def create(self, session: str, algorithm: str = "sha256") -> Upload:
        """Create the file of a new session, whose bytes are hashed with `algorithm` as they arrive. Blocks.

        Raise `BlobUploadBusy` if it exists, and `TooManyRequests` or `ServiceOverloaded` if there are too many.
        """
        self._make_room(session)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with suppress(FileExistsError):
                os.makedirs(self._layout.sessions)
            fd = os.open(self._path(session), flags, 0o666)
        except FileExistsError:
            raise _busy_upload() from None
        return self._lock(session, fd, hashlib.new(algorithm))

    def resume(self, session: str) -> Upload:
        """Open a session to append to it. Raises `BlobUploadUnknown` and `BlobUploadBusy`."""
        hasher, hashed_size = self._hashers.get(session) or (hashlib.sha256(), 0)
        upload = self._acquire(session, hasher)
        self._hashers.pop(session, None)
        # Another process may have appended to the session. Our hash still covers the first bytes of the file.
        upload.hashed_size = hashed_size if hashed_size <= upload.size else -1
        return upload

    def suspend(self, upload: Upload) -> None:
        """Release a session, so that it can be resumed. Does nothing if it has ended."""
        if upload._fd >= 0:
            self._hashers[upload.session] = (upload.close(), upload.hashed_size)
            if len(self._hashers) > _MAX_HASHERS:
                self._hashers.popitem(last=False)

    def size(self, session: str) -> int:
        """Return the number of bytes of a session, even one that is being written. Raises `BlobUploadUnknown`."""
        try:
            return os.stat(self._path(session)).st_size
        except (FileNotFoundError, NotADirectoryError):
            raise unknown_upload() from None

    def purge(self, before: float, *, dry_run: bool = False) -> int:
        """Delete the sessions that were last used before `before` (POSIX time). Return their number. Blocks.

        Also delete those that another registry left in its own directories. With `dry_run`, only count.
        """
        return self._purge(self._sessions(), before, dry_run) + self._purge_foreign(before, dry_run)

    def oldest(self, used_after: float) -> dict[str, float]:
        """Return the start of the oldest session of each repository (POSIX time). Blocks.

        The keys are those of `repository_of`. Sessions that were not used after `used_after` do not count.
        """
        oldest: dict[str, float] = {}
        for session in self._sessions():
            if _mtime(self._path(session)) > used_after:
                part = repository_of(session)
                oldest[part] = min(oldest.get(part, math.inf), started_at(session))
        return oldest

    def purge_given_up(self) -> int:
        """Delete the sessions that nobody has used for a while, although they are not stale yet, to make room. Blocks.

        Return their number. Do nothing if this was done a moment ago.
        """
        return self._purge_given_up(self._sessions())

    def report(self) -> BoundReport:
        """Return the state of the bounds for `dockerproxy debug`. Clients are given by their part of the identifier."""
        sessions, limits = self._sessions(), self.limits
        return BoundReport(
            name="unfinished uploads",
            used=len(sessions),
            limit=limits.total,
            share=limits.per_client,
            refused=self._refused,
            clients=dict(Counter(map(owner_of, sessions)).most_common(5)),
        )

    def _make_room(self, session: str) -> None:
        """Raise an error if a bound does not allow for `session`, even after deleting sessions that were given up."""
        sessions = self._sessions()
        error = self._refusal(session, sessions)
        if error is not None:
            self._purge_given_up(sessions)
            error = self._refusal(session, self._sessions())
        if error is not None:
            self._refused += 1
            raise error

    def _refusal(self, session: str, sessions: list[str]) -> TooManyRequests | ServiceOverloaded | None:
        limits, total = self.limits, len(sessions)
        if total >= limits.total:
            return ServiceOverloaded(
                f"all clients together have {total} of the {limits.total} unfinished uploads that they may have"
                " (MAX_UPLOADS)", headers=[_RETRY_AFTER],
            )  # fmt: skip
        if total < min(limits.per_client, limits.per_repository):
            return None
        if sum(owner_of(other) == owner_of(session) for other in sessions) >= limits.per_client:
            return TooManyRequests(
                f"this client has {limits.per_client} unfinished uploads, as many as one may have"
                " (MAX_UPLOADS_PER_CLIENT)", headers=[_RETRY_AFTER],
            )  # fmt: skip
        if sum(repository_of(other) == repository_of(session) for other in sessions) >= limits.per_repository:
            return TooManyRequests(
                f"this repository has {limits.per_repository} unfinished uploads, as many as one may have"
                " (half of MAX_UPLOADS)", headers=[_RETRY_AFTER],
            )  # fmt: skip
        return None

    def _sessions(self) -> list[str]:
        return [name for name in list_names(self._layout.sessions) if UPLOAD_ID.fullmatch(name)]

    def _purge_given_up(self, sessions: Iterable[str]) -> int:
        # Not for each request that is refused: it looks at all sessions.
        now = self._clock()
        if abs(now - self._made_room_at) < _ROOM_INTERVAL:
            return 0
        self._made_room_at = now
        return self._purge(sessions, now - _GIVEN_UP_AGE)

    def _purge(self, sessions: Iterable[str], before: float, dry_run: bool = False) -> int:
        count = 0
        for session in sessions:
            if _mtime(self._path(session)) < before:
                with suppress(BlobUploadBusy, BlobUploadUnknown):
                    upload = self._acquire(session, hashlib.sha256())
                    count += 1
                    if dry_run:
                        upload.close()
                    else:
                        upload.cancel()
        return count

    def _purge_foreign(self, before: float, dry_run: bool) -> int:
        """Delete the stale sessions of CNCF distribution, and the directories of repositories without anything else."""
        count = 0
        for repository in iter_repositories(self._layout, "_uploads"):
            directory = self._layout.foreign_uploads(repository)
            for name in list_names(directory):
                path = f"{directory}/{name}"
                if _FOREIGN_SESSION.fullmatch(name) and max(map(_mtime, (path, f"{path}/data"))) < before:
                    count += 1
                    if not dry_run:
                        shutil.rmtree(path, ignore_errors=True)
            if not dry_run:
                remove_empty_directories(self._layout, directory)
        return count

    def _path(self, session: str) -> str:
        if not UPLOAD_ID.fullmatch(session):
            raise unknown_upload()
        return f"{self._layout.sessions}/{session}"

    def _acquire(self, session: str, hasher: _Hash) -> Upload:
        try:
            fd = os.open(self._path(session), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            raise unknown_upload() from None
        return self._lock(session, fd, hasher)

    def _lock(self, session: str, fd: int, hasher: _Hash) -> Upload:
        path = self._path(session)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            # The previous writer may have committed or cancelled the session between our open and our lock.
            if _file_id(path) != (status.st_dev, status.st_ino):
                raise unknown_upload()
            return Upload(status.st_size, fd, hasher, session, path)
        except BlockingIOError:
            os.close(fd)
            raise _busy_upload() from None
        except BaseException:
            os.close(fd)
            raise


_FOREIGN_SESSION = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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


def unknown_upload() -> BlobUploadUnknown:
    """Return the error that a session does not exist."""
    return BlobUploadUnknown("there is no such upload in this repository")


def _busy_upload() -> BlobUploadBusy:
    return BlobUploadBusy("another request is writing to this upload")
