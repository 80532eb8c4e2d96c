"""Notification of changes to open files, with the kernel's inotify."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dockerproxy.store import inotify
from dockerproxy.store.inotify import FileWatcher


class ReaderReactor:
    """A reactor that calls `doRead` only in `iterate`."""

    def __init__(self) -> None:
        self.readers: set[FileWatcher] = set()

    def addReader(self, reader: FileWatcher) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: FileWatcher) -> None:
        self.readers.remove(reader)

    def iterate(self) -> None:
        for reader in list(self.readers):
            while select.select([reader], [], [], 0)[0]:
                reader.doRead()


class WatchedFile:
    """A file that is open to read, and is watched. Another descriptor writes it."""

    def __init__(self, path: Path) -> None:
        self.reactor = ReaderReactor()
        self.watcher = FileWatcher(self.reactor)
        self.path = path
        self.writer = os.open(path, os.O_RDWR | os.O_CREAT)
        self.fd = os.open(path, os.O_RDONLY)
        self.calls: list[None] = []
        self.watch = self.watcher.watch(self.fd, lambda: self.calls.append(None))

    def count_calls(self) -> int:
        """Return the number of calls since the last count."""
        self.reactor.iterate()
        count = len(self.calls)
        self.calls.clear()
        return count


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedFile]:
    file = WatchedFile(tmp_path / "file")
    yield file
    if file.reactor.readers:
        file.watcher.unwatch(file.watch)
    for fd in (file.fd, file.writer):
        os.close(fd)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: os.pwrite(file.writer, b"x", 0),
        lambda file: os.truncate(file.path, 5),
        lambda file: os.utime(file.writer),
        lambda file: os.unlink(file.path),
        lambda file: os.rename(file.path, f"{file.path}2"),
        lambda file: os.close(os.open(file.path, os.O_WRONLY)),
    ],
    ids=["write", "truncate", "touch", "unlink", "rename", "close"],
)
def test_change_is_reported(watched: WatchedFile, change: Callable[[WatchedFile], None]) -> None:
    assert watched.count_calls() == 0
    change(watched)
    assert watched.count_calls() == 1


def test_reading_is_not_reported(watched: WatchedFile) -> None:
    os.pread(watched.fd, 1, 0)
    os.close(os.open(watched.path, os.O_RDONLY))
    assert watched.count_calls() == 0


def test_many_changes_are_reported_once(watched: WatchedFile) -> None:
    for number in range(100):
        os.pwrite(watched.writer, b"x", number)
        os.utime(watched.writer)
    assert watched.count_calls() == 1


def test_file_is_watched_under_its_new_name(watched: WatchedFile) -> None:
    os.rename(watched.path, f"{watched.path}2")
    assert watched.count_calls() == 1
    watched.path.write_text("another file")
    assert watched.count_calls() == 0
    os.pwrite(watched.writer, b"x", 0)
    assert watched.count_calls() == 1


def test_killed_writer_is_reported(watched: WatchedFile) -> None:
    program = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(watched.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert watched.count_calls() == 0
        process.kill()
        process.wait()
    assert watched.count_calls() == 1


def test_no_descriptor_is_left(watched: WatchedFile) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watched.watcher.unwatch(watched.watch)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    os.pwrite(watched.writer, b"x", 0)
    assert watched.count_calls() == 0
    watched.watch = watched.watcher.watch(watched.fd, lambda: watched.calls.append(None))
    os.pwrite(watched.writer, b"x", 0)
    assert watched.count_calls() == 1


def test_callback_may_end_another_watch(tmp_path: Path, watched: WatchedFile) -> None:
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    other_watch = watched.watcher.watch(other, lambda: end(watched.watch))
    ended: list[int] = []

    def end(watch: int) -> None:
        ended.append(watch)
        watched.watcher.unwatch(watch)

    os.pwrite(other, b"x", 0)
    os.pwrite(watched.writer, b"x", 0)
    assert watched.count_calls() == 0
    assert ended == [watched.watch]
    watched.watch = other_watch
    os.close(other)


def test_overflow_is_reported_to_all(watched: WatchedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    os.pwrite(watched.writer, b"x", 0)
    overflow = inotify._EVENT.pack(-1, inotify._IN_Q_OVERFLOW, 0, 0)
    monkeypatch.setattr(os, "read", lambda fd, size: overflow)
    watched.watcher.doRead()
    assert len(watched.calls) == 1


@pytest.mark.parametrize("function", ["inotify_init1", "inotify_add_watch"])
def test_unavailable_inotify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> int:
        inotify.ctypes.set_errno(errno.EMFILE)
        return -1

    monkeypatch.setattr(inotify._libc, function, fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError) as caught:
        WatchedFile(tmp_path / "file")
    assert caught.value.errno == errno.EMFILE
    left = len(os.listdir("/proc/self/fd")) - len(before)
    assert left == 2  # the test's own two
