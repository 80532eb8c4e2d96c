"""Files that a setting names. Symbolic links lead to them as in /etc or in a Kubernetes secret, and are followed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_SIZE = 1024 * 1024
"""Bytes of a file. No list of users, certificates or variables is longer."""


def read_config_file(path: str | Path) -> tuple[bytes, os.stat_result]:
    """Return the content and the status of the regular file at `path`. Raises `OSError` with the reason.

    It never waits: a FIFO or a device is refused, and a file is read up to the size that it has.
    """
    fd, status = _open_regular(path)
    try:
        if status.st_size > MAX_SIZE:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {MAX_SIZE}", str(path))
        return _read(fd, status.st_size), status
    finally:
        os.close(fd)


def check_config_file(path: str | Path) -> None:
    """Raise `OSError` with the reason unless there is a regular file at `path` that can be read, of any size.

    Call it before a library opens the path, which would wait for the writer of a FIFO.
    """
    os.close(_open_regular(path)[0])


def exposure_warning(description: str, path: str | Path) -> str | None:
    """Return a sentence for the log if every local user can read the file at `path`, which has secrets."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return None
    if not mode & stat.S_IROTH:
        return None
    return f"every local user can read {path}, {description} (mode {mode:04o}); run: chmod o= {path}"


def _open_regular(path: str | Path) -> tuple[int, os.stat_result]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return fd, status
    os.close(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def _read(fd: int, size: int) -> bytes:
    content = b""
    while len(content) < size and (chunk := os.read(fd, size - len(content))):
        content += chunk
    return content
