"""Atomic file writes: readers, and the daemon after a crash, see either the old state or the new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from attrs import frozen

from dockerproxy.store.tree_reader import list_names

# A directory may be removed between creating it and renaming into it, because its last file was deleted. Each further
# attempt is needed only if that happens again.
_ATTEMPTS = 8

# Errors of link(2) on file systems without hard links (shared folders of virtual machines, FAT).
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)

# Maximum number of buffers in one writev on Linux (limits.h, IOV_MAX).
_IOV_MAX = 1024


@frozen
class Staging:
    """A directory of temporary files, on the same file system as their final paths.

    If `sync_data`, the data is synced before the file gets its final name. If `sync_names`, the name is synced before
    the call returns. If `private`, only the daemon's user can read the files; otherwise the umask decides. `on_create`
    is called after each file or directory that did not exist before, in the thread that created it.
    """

    directory: str
    sync_data: bool = False
    sync_names: bool = False
    private: bool = False
    on_create: Callable[[], object] | None = None

    def clear(self) -> None:
        """Delete files left by a crash. One process calls this at start-up, before others use the directory."""
        for name in list_names(self.directory):
            try_remove(f"{self.directory}/{name}")

    def write(self, content: bytes, path: str) -> None:
        """Write `content` to the file at `path`, atomically replacing an existing file."""
        with self._staged(content) as staged_path:
            self.move(staged_path, path)

    def write_new(self, content: bytes, path: str) -> None:
        """Write `content` to the file at `path`, unless it exists. If several processes do so, one file wins."""
        with self._staged(content) as staged_path:
            try:
                os.link(staged_path, path)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if not os.path.lexists(path):
                    os.rename(staged_path, path)
            with suppress(FileNotFoundError):
                os.unlink(staged_path)
        if self.sync_names:
            fsync_directory(os.path.dirname(path))

    def move(self, staged_path: str, path: str) -> None:
        """Rename `staged_path` to `path`, creating its directory if necessary.

        The caller has synced the data if that is required.
        """
        parent = os.path.dirname(path)
        is_new = self.on_create is not None and not os.path.lexists(path)
        for _ in range(_ATTEMPTS):
            try:
                os.rename(staged_path, path)
                break
            except FileNotFoundError:
                if not os.path.exists(staged_path):
                    raise
                self.makedirs(parent)
        else:
            raise FileNotFoundError(f"{parent} was removed {_ATTEMPTS} times while a file was moved into it")
        if self.sync_names:
            fsync_directory(parent)
        if is_new and self.on_create is not None:
            self.on_create()

    def remove_tree(self, path: str) -> bool:
        """Delete the directory at `path` recursively, atomically for readers. Return whether it existed."""
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
        """Move the file or directory at `path` into the staging directory.

        Return its new path, or None if `path` does not exist.
        """
        staged_path = self._new_path()
        for _ in range(_ATTEMPTS):
            try:
                os.rename(path, staged_path)
                return staged_path
            except NotADirectoryError:
                return None
            except FileNotFoundError:
                # Not whether the staging directory is missing: another thread may have created it meanwhile.
                if not os.path.lexists(path):
                    return None
                self.makedirs(self.directory)
        raise FileNotFoundError(f"{self.directory} was removed {_ATTEMPTS} times while a file was moved into it")

    def makedirs(self, path: str) -> None:
        """Create the directory at `path` and its missing parents."""
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
            raise FileNotFoundError(f"{os.path.dirname(path)} was removed {_ATTEMPTS} times while {path} was created")
        if self.on_create is not None:
            self.on_create()
        # Only the creator of a directory syncs its parent. Journals (ext4, XFS) keep the order of changes, so another
        # process that finds the directory and syncs it writes its name to disk as well.
        if self.sync_names:
            fsync_directory(os.path.dirname(path))

    @contextmanager
    def _staged(self, content: bytes) -> Iterator[str]:
        """Write `content` to a temporary file, whose path is the value. Delete it if the block raises."""
        path = self._new_path()
        fd = self._create(path)
        try:
            try:
                write_all(fd, [content], 0)
                if self.sync_data:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            yield path
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise

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


def history_staging(directory: str) -> Staging:
    """Return the temporary files of `directory`, STATE_DIR/history."""
    return Staging(f"{directory}/staging", private=True)


def write_all(fd: int, chunks: Sequence[bytes], offset: int) -> int:
    """Write all `chunks` at `offset`, repeating partial writes. Return the number of bytes written."""
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


def fsync_directory(path: str) -> None:
    """Sync the directory at `path`, if it exists, so that its entries survive a power cut. Blocks.

    Do nothing if the file system cannot sync directories (shared folders of virtual machines).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # `Links.prune` has removed the directory, which had become empty
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def try_remove(path: str) -> None:
    """Delete the file or directory tree at `path`, ignoring errors. Blocks."""
    # A file that cannot be deleted now does no harm, and `Staging.clear` retries at the next start.
    try:
        os.unlink(path)
    except OSError:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
