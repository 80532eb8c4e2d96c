"""The daemon's directories, CACHE_DIR and REGISTRY_DIR. One daemon at a time may use each of them.

Two daemons in one directory would delete each other's temporary files and evict each other's blobs. The main process
therefore locks both directories before it touches anything in them. The lock is a flock, which the kernel releases when
that process ends, however it ends. Workers do not hold it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

from dockerproxy.store.files import Staging, read_small
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from dockerproxy.store.secret import load_or_create_secret

_NO_FLOCK = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_PID_LIMIT = 20


class DirectoryInUse(Exception):
    """Another daemon uses the directory. The message says which directory, which process, and what to do."""


@define(eq=False)
class StateDirectory:
    """The stores, records and secrets in CACHE_DIR and REGISTRY_DIR.

    `warnings` are sentences for the log. `cache_secret` signs tokens of the cache, `registry_secret` those of the
    hosted registry.
    """

    cache: Layout
    registry: Layout
    cache_secret: bytes = field(repr=False)
    registry_secret: bytes = field(repr=False)
    warnings: tuple[str, ...]
    # Open until the process ends, because closing them would release the locks. Forked processes inherit the numbers,
    # but have closed the files.
    _lock_fds: tuple[int, ...]

    @classmethod
    def open(cls, cache_dir: Path, registry_dir: Path) -> StateDirectory:
        """Lock both directories, create what they lack, and delete the temporary files that a crash left behind.

        Only the main process calls this, before it forks. Raises `DirectoryInUse` or OSError. Blocks.
        """
        locks = []
        try:
            for setting, root in (("CACHE_DIR", cache_dir), ("REGISTRY_DIR", registry_dir)):
                _make_writable(root)
                if setting != "CACHE_DIR" and root.samefile(cache_dir):
                    raise DirectoryInUse(f"CACHE_DIR and {setting} are both {root}; set one to another directory")
                locks.append(_lock(setting, root))
            cache, registry = Layout(cache_dir), Layout(registry_dir)
            for layout in (cache, registry):
                Staging(layout.staging).clear()
            _records(cache).clear_staging()
            cache_secret, registry_secret = _open_secret(cache), _open_secret(registry)
        except BaseException:
            for fd, _ in locks:
                os.close(fd)
            raise
        warnings = tuple(warning for _, warning in locks if warning)
        lock_fds = tuple(fd for fd, _ in locks)
        return cls(cache, registry, cache_secret, registry_secret, warnings, lock_fds)

    def open_records(self, on_create: Callable[[], object] | None = None) -> Records:
        """Return the records of the cache. `on_create` is called after each new file."""
        return _records(self.cache, on_create)

    def write_pid(self) -> None:
        """Write the ID of this process into the lock files. It changes if twistd becomes a daemon. Raises OSError."""
        for fd in self._lock_fds:
            _write_pid(fd)


def _records(cache: Layout, on_create: Callable[[], object] | None = None) -> Records:
    return Records(cache.root / "records", on_create=on_create)


def _make_writable(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))


def _lock(setting: str, root: Path) -> tuple[int, str]:
    """Lock `root`. Return the open lock file, and a warning if the file system does not support locks."""
    path = f"{root}/lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    warning = ""
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(_describe_owner(setting, root, path)) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            warning = (
                f"cannot lock {root} ({error.strerror}); make sure that no other daemon has it as its {setting}, "
                "because two daemons would delete each other's files"
            )
        _write_pid(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd, warning


def _describe_owner(setting: str, root: Path, path: str) -> str:
    pid = (read_small(path, _PID_LIMIT) or b"").strip()
    owner = f"the daemon with process ID {pid.decode()}" if pid.isdigit() else "another daemon"
    return f"{root} is in use by {owner}; stop that daemon, or set {setting} to another directory"


def _write_pid(fd: int) -> None:
    content = b"%d\n" % os.getpid()
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))


def _open_secret(layout: Layout) -> bytes:
    staging = Staging(layout.staging, sync_data=True, sync_names=True, private=True)
    return load_or_create_secret(layout.root / "secret", staging)
