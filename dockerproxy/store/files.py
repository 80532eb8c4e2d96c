"""Writing so that a reader, or a machine that comes back from a crash, finds the old state or the new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress

from attrs import frozen

# A directory may be removed (the last of its files went) between making it and renaming into it. Each round needs
# another removal at that very moment.
_ATTEMPTS = 8

# Linux takes so many buffers in one writev (limits.h, IOV_MAX).
_IOV_MAX = 1024


@frozen
class Staging:
    """A directory of temp files, on the file system of the places they go to.

    `sync_data`: contents are on the disk before they get their name. `sync_names`: the name is when the call ends.
    `private`: only the daemon's user may read (else the process's umask says who may).
    """

    directory: str
    sync_data: bool = False
    sync_names: bool = False
    private: bool = False

    def clear(self) -> None:
        """Drop what a crash left. For one process at start, before any other uses the directory."""
        for name in list_names(self.directory):
            try_remove(f"{self.directory}/{name}")

    def write(self, content: bytes, path: str) -> None:
        """Make `content` the file at `path`, in place of one that may be there."""
        staged_path = self._new_path()
        fd = self._create(staged_path)
        try:
            try:
                write_all(fd, [content], 0)
                if self.sync_data:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self.move(staged_path, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(staged_path)
            raise

    def move(self, staged_path: str, path: str) -> None:
        """Rename `staged`, whose data is synced already where it has to be, to `path`."""
        parent = os.path.dirname(path)
        for _ in range(_ATTEMPTS):
            try:
                os.rename(staged_path, path)
                break
            except FileNotFoundError:
                if not os.path.exists(staged_path):
                    raise
                self.makedirs(parent)
        else:
            raise FileNotFoundError(f"{parent} is removed as fast as it is made")
        if self.sync_names:
            fsync_directory(parent)

    def remove_tree(self, path: str) -> bool:
        """Remove the directory at `path` with all it holds, in one step to every reader; say whether it was there."""
        staged_path = self.move_aside(path)
        if staged_path is None:
            return False
        try:
            if self.sync_names:
                fsync_directory(os.path.dirname(path))
        finally:
            try_remove(staged_path)
        return True

    def move_aside(self, path: str) -> str | None:
        """Rename what is at `path` to a new name here, and return that; None where there is nothing."""
        staged_path = self._new_path()
        for _ in range(_ATTEMPTS):
            try:
                os.rename(path, staged_path)
                return staged_path
            except NotADirectoryError:
                return None
            except FileNotFoundError:
                if os.path.isdir(self.directory):
                    return None
                self.makedirs(self.directory)
        raise FileNotFoundError(f"{self.directory} is removed as fast as it is made")

    def makedirs(self, path: str) -> None:
        """Make the directory at `path` and those above it that are missing."""
        mode = 0o700 if self.private else 0o777
        for _ in range(_ATTEMPTS):
            try:
                os.mkdir(path, mode)
                break
            except FileExistsError:
                return
            except FileNotFoundError:
                self.makedirs(os.path.dirname(path))
        else:
            raise FileNotFoundError(f"{os.path.dirname(path)} is removed as fast as it is made")
        # Only who made a directory syncs the one above it. Journals keep the order of changes (ext4, XFS), so whoever
        # found it there and then syncs what is in it has this name on disk as well.
        if self.sync_names:
            fsync_directory(os.path.dirname(path))

    def _new_path(self) -> str:
        return f"{self.directory}/{secrets.token_hex(8)}"

    def _create(self, path: str) -> int:
        mode = 0o600 if self.private else 0o666
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, mode)
        except FileNotFoundError:
            self.makedirs(self.directory)
            return os.open(path, flags, mode)


def write_all(fd: int, chunks: Sequence[bytes], offset: int) -> int:
    """Write `chunks` at `offset`, however often the file system takes less than all; return their length."""
    start = offset
    buffers: list[bytes | memoryview] = [chunk for chunk in chunks if chunk]
    while buffers:
        written = os.pwritev(fd, buffers[:_IOV_MAX], offset)
        offset += written
        complete = 0
        while complete < len(buffers) and written >= len(buffers[complete]):
            written -= len(buffers[complete])
            complete += 1
        del buffers[:complete]
        if written:
            buffers[0] = memoryview(buffers[0])[written:]
    return offset - start


def read_small(path: str, limit: int) -> bytes | None:
    """Return the first `limit` bytes of the file at `path`, None where there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def fsync_directory(path: str) -> None:
    """Make sure that the names in the directory at `path`, if it is there, are on the disk. Blocks.

    On a file system that cannot sync directories (shared folders of virtual machines) nothing is done.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # `Links.prune` was faster: it had no names any more
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def list_names(directory: str) -> list[str]:
    """Return the names in `directory`, in no order; an empty list if it does not exist or is not a directory."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def try_remove(path: str) -> None:
    """Remove what is at `path`, a file or a directory with all it holds, if that can be. Blocks."""
    # What cannot be removed now is in nobody's way, and is tried again at the next start.
    try:
        os.unlink(path)
    except OSError:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
