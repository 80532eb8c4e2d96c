"""Notices that the daemon of another machine uses the same directory, which a lock may not show.

A flock on NFS, or on a shared folder of a virtual machine, may count on one machine only. A daemon whose directory is
on such a file system therefore has a file there that it changes every few seconds. Another daemon looks at that file
for some time before it takes the directory over: if the file changes, its owner lives. No clocks are compared.

A daemon that has stopped leaves no file. One that crashed leaves it, and its successor on the same machine knows it by
a copy on the local disk, so that it need not wait. A daemon that finds another one's file in place of its own, because
its machine had stood still, stops.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.application.service import Service
from twisted.logger import Logger

from dockerproxy.store.tree_reader import UnsafeFile, open_regular, read_small

OWNER_FILE = "dockerproxy-owner"

BEAT_INTERVAL = 3.0
"""Seconds between two changes of the file."""

OWNER_SIZE = 256
"""Bytes of the file, always, because another machine may remember the size that it had."""

_POLL_INTERVAL = 1.0  # seconds between two looks at the file of another daemon
_QUIET_POLLS = 15  # that see no change, until its daemon counts as dead
_MAX_POLLS = 300
_SLOW_POLL = 2.0  # seconds; a file system that slow may have kept the owner from writing, too
_CONTENT = re.compile(rb"([0-9a-f]{32}) ([0-9]{10}) ([0-9]{1,10}) ([A-Za-z0-9._-]{1,64}) *\n")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RELEASE_TIMEOUT = 2.0  # seconds; the file system may not answer, and the process is about to end

log = Logger()


class DirectoryInUse(Exception):
    """Another daemon uses the directory. The message says which directory, which process, and what to do."""


@frozen
class OwnerRecord:
    """The content of the file. `run` identifies a daemon from its start to its end."""

    run: str
    beat: int
    pid: int
    host: str

    @classmethod
    def parse(cls, content: bytes) -> OwnerRecord | None:
        """Return the record, None if it is none: torn, or written by somebody else."""
        match = _CONTENT.fullmatch(content)
        if match is None:
            return None
        return cls(match[1].decode(), int(match[2]), int(match[3]), match[4].decode())

    def __bytes__(self) -> bytes:
        text = f"{self.run} {self.beat % 10**10:010d} {self.pid} {self.host}"
        return text.encode().ljust(OWNER_SIZE - 1) + b"\n"


@frozen
class SharedPlace:
    """A directory that other machines may have, too: that of the setting `setting`, on a file system of type `kind`.

    `remedy` is what to do if they use it at the same time.
    """

    setting: str
    directory: str
    kind: str
    remedy: str

    @property
    def path(self) -> str:
        return f"{self.directory}/{OWNER_FILE}"

    def describe_owner(self, content: bytes | None) -> str:
        """Return the sentence for the administrator of a second daemon; `content` is that of the file."""
        record = None if content is None else OwnerRecord.parse(content)
        owner = "another daemon" if record is None else f"the daemon on {record.host} (process ID {record.pid})"
        return (
            f"{self.setting} is {self.directory}, which is on {self.kind} and in use by {owner}; two daemons would"
            f" delete each other's files there: stop that daemon, or {self.remedy}"
        )


@define(eq=False)
class DirectoryOwner:
    """The claim of this daemon on a shared directory, which is void unless `beat` is called every `BEAT_INTERVAL`.

    `witness` is the path of a copy on a disk of this machine that no other daemon uses; None if there is none.
    """

    place: SharedPlace
    witness: str | None
    _run: str = field(factory=lambda: secrets.token_hex(16))
    _beat: int = 0

    def claim(self, sleep: Callable[[float], object] = time.sleep, now: Callable[[], float] = time.monotonic) -> None:
        """Take the directory. Raise `DirectoryInUse` if another daemon lives in it, and OSError. Blocks for seconds."""
        while True:
            content = self._read()
            if content is not None:
                if not self._is_predecessor(content):
                    self._wait_until_dead(content, sleep, now)
                with suppress(FileNotFoundError):
                    os.unlink(self.place.path)
            # The witness first: with the file alone, a crash at this moment would make the next start wait.
            self._write_witness()
            if self._create():
                return

    def beat(self) -> None:
        """Say that this daemon lives. Raise `DirectoryInUse` if another one has taken the directory, and OSError."""
        content = self._read()
        if content is None:
            self._create()  # somebody has deleted the file
            return
        record = OwnerRecord.parse(content)
        if record is not None and record.run != self._run:
            raise DirectoryInUse(self.place.describe_owner(content))
        fd = os.open(self.place.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self._write(fd)

    def release(self) -> None:
        """Give the directory up. Raise OSError. Blocks."""
        record = OwnerRecord.parse(self._read() or b"")
        if record is not None and record.run == self._run:
            os.unlink(self.place.path)

    def _read(self) -> bytes | None:
        """Return the file as it is on the server, None if there is none."""
        try:
            fd = open_regular(self.place.path)
        except FileNotFoundError:
            return None
        try:
            with suppress(OSError):  # some file systems have no memory to forget
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # not as this machine remembers it
            return os.read(fd, OWNER_SIZE)
        finally:
            os.close(fd)

    def _is_predecessor(self, content: bytes) -> bool:
        """Return whether the file is that of a daemon that had the same local disk, and has ended for that reason."""
        record = OwnerRecord.parse(content)
        if record is None or self.witness is None:
            return False
        with suppress(UnsafeFile):
            return (read_small(self.witness, 100) or b"").decode("ascii", "replace").strip() == record.run
        return False

    def _wait_until_dead(self, content: bytes, sleep: Callable[[float], object], now: Callable[[], float]) -> None:
        """Return when the file has not changed for a while, or is gone. Raise `DirectoryInUse` if it changes."""
        quiet = 0
        for _ in range(_MAX_POLLS):
            started = now()
            sleep(_POLL_INTERVAL)
            seen = self._read()
            if seen is None:
                return
            if seen != content:
                raise DirectoryInUse(self.place.describe_owner(seen))
            quiet = quiet + 1 if now() - started < _SLOW_POLL else 0
            if quiet == _QUIET_POLLS:
                return
        raise TimeoutError(
            errno.ETIMEDOUT, f"{self.place.kind} is too slow to tell whether it is in use", self.place.path
        )

    def _write_witness(self) -> None:
        if self.witness is not None:
            temporary = f"{self.witness}.new"
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, f"{self._run}\n".encode())
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, self.witness)

    def _create(self) -> bool:
        """Create the file. Return False if there is one."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.place.path, flags, 0o600)
        except FileExistsError:
            return False
        self._write(fd)
        return True

    def _write(self, fd: int) -> None:
        host = os.uname().nodename
        self._beat += 1
        record = OwnerRecord(self._run, self._beat, os.getpid(), host if _HOST.fullmatch(host) else "unknown")
        try:
            os.pwrite(fd, bytes(record), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


class OwnerService(Service):
    """Calls `beat` of `owner` in a thread of its own, because the threads of the store may all wait for clients.

    `on_lost` is called with a sentence if another daemon has taken the directory. The claim lasts until `release`.
    """

    def __init__(self, reactor: Any, owner: DirectoryOwner, on_lost: Callable[[str], object]) -> None:
        self._reactor = reactor
        self._owner = owner
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="directory owner", daemon=True)

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._thread.start()

    def release(self) -> None:
        """Let another daemon have the directory, at the very end of this one. Blocks for a moment."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_RELEASE_TIMEOUT)

    def _work(self) -> None:
        has_failed = False
        while not self._ended.wait(BEAT_INTERVAL):
            try:
                self._owner.beat()
                has_failed = False
            except DirectoryInUse as error:
                self._reactor.callFromThread(self._on_lost, str(error))
                return
            except OSError as error:
                if not has_failed:
                    reason = "{setting}: cannot write {path} ({reason}), by which other machines know of this daemon"
                    self._reactor.callFromThread(
                        log.warn, reason,
                        setting=self._owner.place.setting, path=self._owner.place.path, reason=error.strerror,
                    )  # fmt: skip
                has_failed = True
        with suppress(OSError):
            self._owner.release()
