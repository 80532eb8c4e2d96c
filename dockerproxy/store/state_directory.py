"""The daemon's directories, CACHE_DIR and REGISTRY_DIR. One daemon at a time may use each of them.

Two daemons in one directory would delete each other's temporary files and evict each other's blobs. The main process
therefore locks both directories before it touches anything in them. The lock is a flock, which the kernel releases when
that process ends, however it ends. Workers do not hold it. Where a flock may not reach other machines,
`directory_owner` notices them.

Both directories are private. If they belong to another user, that user can put anything in place of their files, so
nothing there is opened through a symbolic link of theirs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from attrs import define, field

from dockerproxy.store.directory_owner import OWNER_SIZE, DirectoryInUse, DirectoryOwner, SharedPlace
from dockerproxy.store.files import Staging
from dockerproxy.store.layout import Layout
from dockerproxy.store.mounts import remote_file_system
from dockerproxy.store.records import Records
from dockerproxy.store.secret import load_or_create_secret
from dockerproxy.store.tree_reader import Missing, UnsafeFile, read_small

_NO_FLOCK = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_PID_LIMIT = 20

_DIRECTORIES = (
    "docker",
    "docker/registry",
    "docker/registry/v2",
    "docker/registry/v2/blobs",
    "docker/registry/v2/repositories",
    "ingest",
    "uploads",
    "staging",
    "damaged",
    "records",
    "records/~staging",
)
"""The directories of a store. An administrator may have put one on another disk, by a symbolic link."""


_REMEDIES = {
    "CACHE_DIR": "set CACHE_DIR to a directory of its own at each machine; with FLEET, they share what is cached",
    "REGISTRY_DIR": (
        "set REGISTRY_DIR to a directory of its own at each machine, and REGISTRY_STORE to a bucket for the images that"
        " all of them serve"
    ),
}


@define(eq=False)
class StateDirectory:
    """The stores, records and secrets in CACHE_DIR and REGISTRY_DIR.

    `warnings` are sentences for the log. `registry_file_system` is the type of the file system of REGISTRY_DIR if that
    may hang (see `mounts`), and None if it is local. `cache_secret` signs tokens of the cache, `registry_secret` those
    of the hosted registry.
    """

    cache: Layout
    registry: Layout
    cache_secret: bytes = field(repr=False)
    registry_secret: bytes = field(repr=False)
    warnings: tuple[str, ...]
    registry_file_system: str | None
    owners: tuple[DirectoryOwner, ...]
    """The claims on directories that other machines may have, too."""
    # Open until the process ends, because closing them would release the locks. Forked processes inherit the numbers,
    # but have closed the files.
    _lock_fds: tuple[int, ...]

    @classmethod
    def open(cls, cache_dir: Path, registry_dir: Path) -> StateDirectory:
        """Lock both directories, create what they lack, and delete the temporary files that a crash left behind.

        Only the main process calls this, before it forks. Raises `DirectoryInUse` or OSError. Blocks, some seconds long
        if another machine has left its file in one of them (see `directory_owner`).
        """
        locks = []
        places: list[SharedPlace | None] = []
        warnings: list[str] = []
        try:
            for setting, root in (("CACHE_DIR", cache_dir), ("REGISTRY_DIR", registry_dir)):
                warnings.extend(_make_private(setting, root))
                if setting != "CACHE_DIR" and root.samefile(cache_dir):
                    raise DirectoryInUse(f"CACHE_DIR and {setting} are both {root}; set one to another directory")
                places.append(_find_shared_place(setting, root))
                locks.append(_lock(setting, root, places[-1]))
            owners = _claim(cache_dir, places)
            cache, registry = Layout(cache_dir), Layout(registry_dir)
            for layout in (cache, registry):
                Staging(layout.staging).clear()
            _records(cache).clear_staging()
            cache_secret, registry_secret = _open_secret(cache), _open_secret(registry)
        except BaseException:
            for fd, _ in locks:
                os.close(fd)
            raise
        warnings.extend(warning for _, warning in locks if warning)
        cache_place, registry_place = places
        if cache_place is not None:
            warnings.append(
                f"CACHE_DIR is {cache_dir}, which is on {cache_place.kind}: if that does not answer, the daemon"
                " answers no client; set CACHE_DIR to a directory on a local disk"
            )
        registry_file_system = None if registry_place is None else registry_place.kind
        lock_fds = tuple(fd for fd, _ in locks)
        return cls(
            cache, registry, cache_secret, registry_secret, tuple(warnings), registry_file_system, owners, lock_fds
        )

    def open_records(self, on_create: Callable[[], object] | None = None) -> Records:
        """Return the records of the cache. `on_create` is called after each new file."""
        return _records(self.cache, on_create)

    def write_pid(self) -> None:
        """Write the ID of this process into the lock files. It changes if twistd becomes a daemon. Raises OSError."""
        for fd in self._lock_fds:
            _write_pid(fd)


def _records(cache: Layout, on_create: Callable[[], object] | None = None) -> Records:
    return Records(cache.root / "records", on_create=on_create)


def _make_private(setting: str, root: Path) -> list[str]:
    """Create `root`, or take it from all other local users. Return sentences for the log. Raises `OSError`."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    _refuse_links_of_others(root)
    status = root.stat()
    if status.st_uid not in (0, os.geteuid()):
        return [
            f"{setting} is {root}, which belongs to the user with ID {status.st_uid}: they can read and replace all "
            f"files in it; give it to this daemon's user with chown"
        ]
    if not status.st_mode & 0o007:
        return []
    mode = stat.S_IMODE(status.st_mode)
    with suppress(OSError):
        root.chmod(mode & ~0o007)
    if root.stat().st_mode & 0o007:
        return [f"every local user can enter {setting}, which is {root} (mode {mode:04o}), and its mode cannot be set"]
    return [f"every local user could enter {setting}, which is {root}: its mode was {mode:04o}, and is {mode & ~7:04o}"]


def _paths(root: Path) -> list[str]:
    """Return `root` and the directories of the store in it."""
    return [str(root), *(f"{root}/{name}" for name in _DIRECTORIES)]


def _refuse_links_of_others(root: Path) -> None:
    """Raise `UnsafeFile` if a directory of the store is a symbolic link that belongs to another user than root."""
    for path in _paths(root)[1:]:
        with suppress(*Missing):
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
                reason = (
                    f"is a symbolic link of the user with ID {status.st_uid}, who could make it lead anywhere; "
                    "replace it by a directory, or give it to root with chown -h"
                )
                raise UnsafeFile(errno.ELOOP, reason, path)


def _find_shared_place(setting: str, root: Path) -> SharedPlace | None:
    """Return the first directory of the store that other machines may have, too, or None if all are local."""
    remote = remote_file_system(path for path in _paths(root) if os.path.isdir(path))
    return None if remote is None else SharedPlace(setting, *remote, _REMEDIES[setting])


def _claim(cache_dir: Path, places: Sequence[SharedPlace | None]) -> tuple[DirectoryOwner, ...]:
    """Claim the shared directories. Raise `DirectoryInUse` if another machine uses one of them."""
    # CACHE_DIR is locked, and on a local disk, unless it is shared itself. So nobody else writes this file.
    witness = None if places[0] is not None else f"{cache_dir}/registry-owner"
    owners = tuple(DirectoryOwner(place, witness) for place in places if place is not None)
    with ExitStack() as on_failure:
        for owner in owners:
            owner.claim()
            on_failure.callback(owner.release)
        on_failure.pop_all()
    return owners


def _lock(setting: str, root: Path, place: SharedPlace | None) -> tuple[int, str]:
    """Lock `root`. Return the open lock file, and a warning if the file system does not support locks.

    `place` is given if other machines may have the directory.
    """
    path = f"{root}/lock"
    fd = _open_lock(path)
    warning = ""
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(_describe_owner(setting, root, path, place)) from None
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


def _open_lock(path: str) -> int:
    """Open the lock file for writing. Raises `UnsafeFile` if writing to it could change another file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFile.of(path, stat.S_IFLNK) from None
        raise
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return fd
    os.close(fd)
    if stat.S_ISREG(status.st_mode):
        raise UnsafeFile(errno.EMLINK, "is a hard link, so it is another file, too; delete it", path)
    raise UnsafeFile.of(path, status.st_mode)


def _describe_owner(setting: str, root: Path, path: str, place: SharedPlace | None) -> str:
    if place is not None and (content := read_small(place.path, OWNER_SIZE)) is not None:
        return place.describe_owner(content)
    pid = (read_small(path, _PID_LIMIT) or b"").strip()
    owner = f"the daemon with process ID {pid.decode()}" if pid.isdigit() else "another daemon"
    return f"{root} is in use by {owner}; stop that daemon, or set {setting} to another directory"


def _write_pid(fd: int) -> None:
    content = b"%d\n" % os.getpid()
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))


def _open_secret(layout: Layout) -> bytes:
    staging = Staging(layout.staging, sync_data=True, sync_names=True, private=True)
    return load_or_create_secret(Path(layout.secret), staging)
