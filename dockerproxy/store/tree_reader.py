"""Reading of files that other users may have written: regular files only, and at most the size that they had.

`open_regular` follows no symbolic link at the end of a path. `StrictReader` follows none below its directories, however
the path leads to it. A FIFO, socket or device is never opened for longer than it takes to see that it is one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from attrs import define, field

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_KINDS = (
    (stat.S_ISLNK, "a symbolic link, which is not followed"),
    (stat.S_ISDIR, "a directory, not a file"),
    (stat.S_ISFIFO, "a FIFO, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
)

T = TypeVar("T")
R = TypeVar("R")

Missing = (FileNotFoundError, NotADirectoryError)
"""The errors of a path that does not exist."""


class UnsafeFile(OSError):
    """The path is a symbolic link or no regular file, so it is not read. `strerror` says which."""

    @classmethod
    def of(cls, path: str, mode: int) -> UnsafeFile:
        """Return the error for the path, which has this `st_mode`."""
        kind = next((text for test, text in _KINDS if test(mode)), "a device, not a file")
        return cls(errno.ELOOP if stat.S_ISLNK(mode) else errno.EINVAL, f"is {kind}", path)

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def open_regular(path: str, *, directory_fd: int | None = None, shown_path: str | None = None) -> int:
    """Open the regular file at `path` for reading. Raises `UnsafeFile` and `OSError`.

    `path` may be relative to `directory_fd`; errors then name `shown_path`.
    """
    return open_with_status(path, directory_fd=directory_fd, shown_path=shown_path)[0]


def open_with_status(
    path: str, *, directory_fd: int | None = None, shown_path: str | None = None
) -> tuple[int, os.stat_result]:
    """Do the same as `open_regular`, and return the status of the file as well."""
    try:
        fd = os.open(path, _OPEN, dir_fd=directory_fd)
    except OSError as error:
        error.filename = shown_path or path
        # ENXIO is the error of a socket, and of a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            mode = os.stat(path, dir_fd=directory_fd, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise UnsafeFile.of(shown_path or path, mode) from None
        raise
    return fd, _check_regular(fd, shown_path or path)


def read_small(path: str, limit: int) -> bytes | None:
    """Return the first `limit` bytes of the file at `path`, or None if it does not exist.

    Raises `UnsafeFile` if it is not a regular file.
    """
    try:
        fd = open_regular(path)
    except Missing:
        return None
    return _read_and_close(fd, limit)


def list_names(directory: str) -> list[str]:
    """Return the names in `directory`, in no order; an empty list if it does not exist or is not a directory."""
    try:
        return os.listdir(directory)
    except Missing:
        return []


class TreeReader:
    """Reads the daemon's own trees: symbolic links to directories are followed, those to files are not.

    A tree need not be on a disk: `bucket.bucket_tree` reads one from a bucket.
    """

    records_use: bool = True
    """Whether the mtime of a content is its last use. If not, it is when the content was written."""

    def read_small(self, path: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of the file at `path`, or None if it does not exist or is unsafe."""
        try:
            return read_small(path, limit)
        except UnsafeFile:
            return None

    def list_names(self, directory: str) -> list[str]:
        """Return the names in `directory`; an empty list if it does not exist or is not a directory."""
        return list_names(directory)

    def stat(self, path: str) -> os.stat_result:
        """Return the status of the file at `path`. Raises `OSError`."""
        return os.lstat(path)

    def is_directory(self, path: str) -> bool:
        """Return whether there is a directory at `path`."""
        return os.path.isdir(path)

    def change_time(self, directory: str) -> int:
        """Return a number that changes if `directory` gains or loses an entry; 0 if there is none."""
        try:
            return os.stat(directory).st_mtime_ns
        except OSError:
            return 0

    def list_repositories(self) -> Iterator[str] | None:
        """Return the names of all repositories; None if the tree must be walked to find them."""
        return None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield what `function`, which reads something, returns for each of `items`, in their order.

        If each read asks another machine, several are done at a time.
        """
        return map(function, items)


@define(eq=False)
class StrictReader(TreeReader):
    """Reads below `anchors`, which are directories, and follows no symbolic link there.

    The anchors themselves, and the paths to them, are the administrator's choice and may have links. `on_unsafe` is
    called once for each path that is skipped because it is a link or no regular file. It may raise, to end the work.
    """

    anchors: tuple[str, ...]
    on_unsafe: Callable[[UnsafeFile], object]
    _reported: set[str] = field(factory=set, init=False)
    _real_anchors: dict[str, str] = field(factory=dict, init=False)

    def open(self, path: str) -> int:
        """Open the regular file at `path` for reading. Raises `UnsafeFile` and `OSError`."""
        fd = self._open_unlinked(path, _OPEN)
        if fd >= 0:
            _check_regular(fd, path)
            return fd
        parent_fd, name = self._open_parent(path)
        try:
            return open_regular(name, directory_fd=parent_fd, shown_path=path)
        finally:
            os.close(parent_fd)

    def read_small(self, path: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of the file at `path`, or None if it does not exist or is unsafe."""
        try:
            fd = self.open(path)
        except Missing:
            return None
        except UnsafeFile as error:
            self.report(error)
            return None
        return _read_and_close(fd, limit)

    def list_names(self, directory: str) -> list[str]:
        """Return the names in `directory`; an empty list if it does not exist, is no directory, or is unsafe."""
        try:
            fd = self._open_unlinked(directory, _LIST)
            if fd < 0:
                fd = self._open_directory(directory, _LIST)
        except Missing:
            return []
        except UnsafeFile as error:
            self.report(error)
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def stat(self, path: str) -> os.stat_result:
        """Return the status of the file or directory at `path`. Raises `UnsafeFile` and `OSError`."""
        status = self._stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            error = UnsafeFile.of(path, status.st_mode)
            self.report(error)
            raise error
        return status

    def is_directory(self, path: str) -> bool:
        """Return whether there is a directory at `path`."""
        try:
            return stat.S_ISDIR(self._stat(path).st_mode)
        except Missing:
            return False
        except UnsafeFile as error:
            self.report(error)
            return False

    def report(self, error: UnsafeFile) -> None:
        """Call `on_unsafe`, unless it was called for this path before."""
        if error.filename not in self._reported:
            self._reported.add(error.filename)
            self.on_unsafe(error)

    def _stat(self, path: str) -> os.stat_result:
        fd = self._open_unlinked(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        if fd >= 0:
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        parent_fd, name = self._open_parent(path)
        try:
            return os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        finally:
            os.close(parent_fd)

    def _open_unlinked(self, path: str, flags: int) -> int:
        """Open `path` at once. Return -1 if that fails, or if a symbolic link on the way was followed.

        The kernel tells where the open file really is. This takes a third of the time of `_open_directory`, which
        finds out the reason for a failure.
        """
        try:
            fd = os.open(path, flags)
        except OSError:
            return -1
        if os.readlink(f"/proc/self/fd/{fd}") == self._real_path(path):
            return fd
        os.close(fd)
        return -1

    def _real_path(self, path: str) -> str:
        """Return the path of a file below an anchor, with links on the way to that anchor replaced."""
        anchor = self._anchor_of(path)
        real_anchor = self._real_anchors.get(anchor)
        if real_anchor is None:
            real_anchor = self._real_anchors[anchor] = os.path.realpath(anchor)
        return real_anchor + path[len(anchor) :]

    def _anchor_of(self, path: str) -> str:
        return next(anchor for anchor in self.anchors if path == anchor or path.startswith(f"{anchor}/"))

    def _open_parent(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self._open_directory(parent, _WALK), name

    def _open_directory(self, path: str, flags: int) -> int:
        """Open a directory from its anchor, one component after the other."""
        anchor = self._anchor_of(path)
        names = [name for name in path[len(anchor) :].split("/") if name]
        if ".." in names:
            raise ValueError(f"{path!r} leads out of {anchor}")
        fd = os.open(anchor, (flags if not names else _WALK) & ~os.O_NOFOLLOW)
        seen = anchor
        for position, name in enumerate(names, 1):
            seen = f"{seen}/{name}"
            try:
                next_fd = os.open(name, flags if position == len(names) else _WALK, dir_fd=fd)
            except NotADirectoryError:
                # The error of a symbolic link, too.
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                if stat.S_ISLNK(mode):
                    raise UnsafeFile.of(seen, mode) from None
                raise
            finally:
                os.close(fd)
            fd = next_fd
        return fd


def _check_regular(fd: int, path: str) -> os.stat_result:
    """Return the status of `fd` if it is a regular file; otherwise close it and raise `UnsafeFile`."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status
    os.close(fd)
    raise UnsafeFile.of(path, status.st_mode)


def _read_and_close(fd: int, limit: int) -> bytes:
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)
