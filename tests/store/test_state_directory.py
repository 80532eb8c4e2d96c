from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define

from dockerproxy.reload import describe_error
from dockerproxy.store.directory_owner import DirectoryInUse
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tree_reader import UnsafeFile


@define
class Directories:
    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    def open(self) -> StateDirectory:
        return StateDirectory.open(self.cache, self.registry)


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    return Directories(tmp_path)


def close(state: StateDirectory) -> None:
    """Do what the end of the process does."""
    for fd in state._lock_fds:
        os.close(fd)


def test_open_creates_the_directories_and_secrets(directories: Directories) -> None:
    state = directories.open()
    assert (state.cache.root, state.registry.root) == (directories.cache, directories.registry)
    assert state.open_records().root == directories.cache / "records"
    assert state.warnings == ()
    assert len({state.cache_secret, state.registry_secret}) == 2
    for secret in (state.cache_secret, state.registry_secret):
        assert repr(secret) not in repr(state)
    close(state)
    reopened = directories.open()
    assert (reopened.cache_secret, reopened.registry_secret) == (state.cache_secret, state.registry_secret)
    close(reopened)


def test_new_secrets_survive_a_power_cut(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens and upload sessions that they sign are valid after it."""
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        sync = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda fd, sync=sync: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))
        )
    directories.open()
    for root in (directories.cache, directories.registry):
        assert any(path.startswith(f"{root}/staging/") for path in synced), "the content, before it gets its name"
        assert str(root) in synced, "the name"


def test_open_deletes_temporary_files_only(directories: Directories) -> None:
    for folder in ("cache/staging", "registry/staging", "cache/records/~staging", "cache/ingest"):
        (directories.root / folder).mkdir(parents=True)
        (directories.root / folder / "file").touch()
    close(directories.open())
    left = [path.relative_to(directories.root) for path in directories.root.rglob("file")]
    assert left == [Path("cache/ingest/file")]


@pytest.mark.parametrize("shared", ["CACHE_DIR", "REGISTRY_DIR"])
def test_another_daemon_is_refused_before_it_touches_anything(directories: Directories, shared: str) -> None:
    state = directories.open()
    temporary = [directories.cache / "staging" / "mine", directories.registry / "staging" / "mine"]
    for file in temporary:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    other = Directories(directories.root / "other")
    cache, registry = (
        (directories.cache, other.registry) if shared == "CACHE_DIR" else (other.cache, directories.registry)
    )
    with pytest.raises(DirectoryInUse) as error:
        StateDirectory.open(cache, registry)
    folder = directories.cache if shared == "CACHE_DIR" else directories.registry
    assert str(error.value) == (
        f"{folder} is in use by the daemon with process ID {os.getpid()}; stop that daemon, or set {shared} to another "
        "directory"
    )
    assert all(file.exists() for file in temporary)
    close(other.open())  # the lock of the other directory has been released
    close(state)
    close(directories.open())


def test_the_owner_may_be_unknown(directories: Directories) -> None:
    """It has not written its process ID yet."""
    directories.cache.mkdir()
    with (directories.cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DirectoryInUse, match="in use by another daemon; stop that daemon"):
            directories.open()


def test_the_lock_survives_fork_and_ends_with_the_process(directories: Directories) -> None:
    """As in twistd, which forks to become a daemon, and whose parent process exits."""
    program = """
import os, sys
from pathlib import Path
from dockerproxy.reload import describe_error
from dockerproxy.store.state_directory import StateDirectory
state = StateDirectory.open(Path(sys.argv[1]), Path(sys.argv[2]))
if os.fork():
    os._exit(0)
state.write_pid()
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, directories.cache, directories.registry],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process.wait(60) == 0
    assert pid != process.pid
    with pytest.raises(DirectoryInUse, match=f"process ID {pid};"):
        directories.open()
    process.stdin.close()
    process.stdout.read()  # its end is the end of the process
    deadline_reached = False
    while not deadline_reached:
        try:
            close(directories.open())
            return
        except DirectoryInUse:  # stdout is closed before the lock is
            deadline_reached = not Path(f"/proc/{pid}").exists()
    close(directories.open())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(directories: Directories, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    states = [directories.open(), directories.open()]
    assert [len(state.warnings) for state in states] == [2, 2]
    assert f"cannot lock {directories.cache} ({os.strerror(code)})" in states[0].warnings[0]
    assert "REGISTRY_DIR" in states[0].warnings[1]
    for state in states:
        close(state)


def test_an_error_of_the_lock_is_raised(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        directories.open()
    assert os.listdir("/proc/self/fd") == before


def test_one_directory_for_both_is_refused(directories: Directories) -> None:
    """The cache would evict what was pushed."""
    directories.cache.mkdir()
    (directories.root / "alias").symlink_to(directories.cache)
    with pytest.raises(DirectoryInUse, match="CACHE_DIR and REGISTRY_DIR are both"):
        StateDirectory.open(directories.cache, directories.root / "alias")


# Directories that other users may read, or have written.


@pytest.fixture
def umask() -> Iterator[None]:
    previous = os.umask(0)
    yield
    os.umask(previous)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_directories_are_private_whatever_the_umask(directories: Directories, umask: None) -> None:
    close(directories.open())
    assert {mode(directories.cache), mode(directories.registry)} == {0o700}
    assert {mode(path / "lock") for path in (directories.cache, directories.registry)} == {0o600}


def test_a_directory_that_every_local_user_could_enter_is_closed(directories: Directories) -> None:
    directories.cache.mkdir(mode=0o700)
    directories.registry.mkdir()
    directories.registry.chmod(0o755)
    state = directories.open()
    [warning] = state.warnings
    assert "REGISTRY_DIR" in warning and "its mode was 0755, and is 0750" in warning
    assert mode(directories.registry) == 0o750
    close(state)
    state = directories.open()
    assert state.warnings == ()
    close(state)


def test_a_mode_that_cannot_be_changed_is_reported(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared folder of a virtual machine has fixed modes."""
    directories.cache.mkdir()
    directories.cache.chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    state = directories.open()
    assert ["its mode cannot be set" in warning for warning in state.warnings] == [True]
    close(state)


@pytest.mark.root
def test_the_owner_of_the_directory_is_named(directories: Directories) -> None:
    directories.registry.mkdir(mode=0o700)
    os.chown(directories.registry, 12345, -1)
    state = directories.open()
    assert ["REGISTRY_DIR" in warning and "ID 12345" in warning for warning in state.warnings] == [True]
    close(state)


@pytest.mark.parametrize("name", ["lock", "secret"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "hard link"])
def test_no_file_of_the_daemon_is_another_one(directories: Directories, name: str, kind: str) -> None:
    victim = directories.root / "victim"
    victim.write_bytes(b"precious" * 10)
    directories.registry.mkdir(mode=0o700)
    path = directories.registry / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(victim, path)
    else:
        path.symlink_to(victim if kind == "link" else directories.root / "missing")
    if (name, kind) == ("secret", "hard link"):
        close(directories.open())
    else:
        with pytest.raises(UnsafeFile, match=str(path)):
            directories.open()
    assert victim.read_bytes() == b"precious" * 10
    assert not (directories.root / "missing").exists()


@pytest.mark.root
@pytest.mark.parametrize("name", ["staging", "docker", "docker/registry/v2/blobs", "damaged", "ingest"])
def test_a_directory_may_be_a_link_of_root_and_of_nobody_else(directories: Directories, name: str) -> None:
    elsewhere, path = directories.root / "elsewhere", directories.registry / name
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    path.parent.mkdir(parents=True)
    directories.registry.chmod(0o700)
    path.symlink_to(elsewhere)
    os.chown(path, 12345, -1, follow_symlinks=False)
    with pytest.raises(UnsafeFile, match=r"symbolic link of the user with ID 12345"):
        directories.open()
    assert (elsewhere / "file").exists()
    os.chown(path, 0, -1, follow_symlinks=False)
    close(directories.open())


def test_what_is_wrong_is_said_in_one_sentence(directories: Directories) -> None:
    directories.registry.mkdir()
    (directories.registry / "lock").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeFile) as raised:
        directories.open()
    assert describe_error(raised.value) == (f"{directories.registry}/lock: is a symbolic link, which is not followed.")
