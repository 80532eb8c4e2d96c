"""Files of JSON lines that several processes append to, such as the audit log. A journal never grows beyond a bound.

A journal has two generations, PATH and PATH.1. If a line would make PATH too long, PATH replaces PATH.1. Only the
daemon's user can read them. Each begins with a line that names the kind of its entries and the version of their form.
A file that begins otherwise is not ours, or is from a newer version: it is set aside as PATH.aside.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeGuard

from attrs import define, field, frozen
from twisted.logger import Logger

from dockerproxy.concurrency import fair_threads, spawn
from dockerproxy.store.tree_reader import Missing, UnsafeFile, open_regular

MAX_TEXT = 512
"""Characters of a text in an entry. Clients choose many of them, such as names and user agents."""

_VERSION = 1
_MAX_HEADER = 256  # bytes
_MAX_LINE = 64 * 1024  # bytes; a longer line is not ours
_CHUNK = 64 * 1024  # bytes that are read at once
_ATTEMPTS = 8  # because another process may rotate the file between opening and locking it
_MAX_WAITING = 10_000  # entries of one process that are not written yet
_BATCH = 500  # entries that are written at once

_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_NO_FLOCK = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)

Entry = Mapping[str, Any]

log = Logger()


@frozen
class Journal:
    """The journal of `kind` at `path`, with at most `max_bytes` in each of its two generations. Its methods block."""

    path: str
    kind: str
    max_bytes: int

    def append(self, entries: Sequence[Entry]) -> None:
        """Append `entries`, whose values are JSON. All of them are written, or none. Raise OSError."""
        data = b"".join(_render(entry) for entry in entries)
        with self._locked() as fd:
            start = os.fstat(fd).st_size
            try:
                _write_all(fd, self._separator(fd, start) + data)
            except OSError:  # a full disk: what was written of it would be a torn line
                with suppress(OSError):
                    os.ftruncate(fd, start)
                raise
            is_full = os.fstat(fd).st_size > self.max_bytes
            if is_full:
                os.replace(self.path, f"{self.path}.1")

    def read_backwards(self, is_wanted: Callable[[bytes], bool] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the entries, the newest first. Torn lines are left out.

        `is_wanted`, if given, says of a line whether it is worth to be parsed.
        """
        with ExitStack() as files:
            # Open both before one is read: if the first becomes the second meanwhile, its entries would come twice.
            opened: list[int] = []
            for path in (self.path, f"{self.path}.1"):
                fd = self._open_to_read(path)
                if fd is not None:
                    files.callback(os.close, fd)
                    if not any(os.path.sameopenfile(fd, other) for other in opened):
                        opened.append(fd)
            for fd in opened:
                for line in _lines_backwards(fd):
                    if is_wanted is None or is_wanted(line):
                        entry = _parse(line)
                        if _is_entry(entry):
                            yield entry

    def drop(self, is_old: Callable[[Entry], bool]) -> None:
        """Remove the entries that are old, wherever they are: the clock may have been set back. Raise OSError."""
        with self._locked():
            for path in (f"{self.path}.1", self.path):
                fd = self._open_to_read(path)
                if fd is None:
                    continue
                try:
                    kept, has_old = _split(_lines_backwards(fd), is_old)
                finally:
                    os.close(fd)
                if has_old:
                    self._replace(path, kept)

    def remove(self) -> bool:
        """Delete both generations, and what was set aside. Return whether there was anything."""
        removed = False
        for suffix in ("", ".1", ".new", ".aside"):
            with suppress(*Missing):
                os.unlink(f"{self.path}{suffix}")
                removed = True
        return removed

    def _replace(self, path: str, lines: Sequence[bytes]) -> None:
        if not lines:
            os.unlink(path)
            return
        temporary = f"{self.path}.new"  # only the holder of the lock writes it
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                _write_all(fd, self._header + b"".join(lines))
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except OSError:  # a full disk, which it would help to fill
            with suppress(OSError):
                os.unlink(temporary)
            raise

    @property
    def _header(self) -> bytes:
        return _render({"journal": self.kind, "version": _VERSION})

    def _separator(self, fd: int, size: int) -> bytes:
        """Return what belongs between the content of the file and the next entry."""
        if not size:
            return self._header
        return b"" if os.pread(fd, 1, size - 1) == b"\n" else b"\n"  # another writer was killed, or the power cut

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open and lock the file, which exists afterwards. Set it aside first if it is not a journal of this kind."""
        for _ in range(_ATTEMPTS):
            fd = self._open()
            try:
                with _ignoring(_NO_FLOCK):
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if not _is_at(fd, self.path):  # rotated meanwhile
                    continue
                if self._is_ours(fd):
                    yield fd
                    return
                os.replace(self.path, f"{self.path}.aside")
                log.warn("{path} was not written by this version; it is set aside as {path}.aside", path=self.path)
            finally:
                os.close(fd)
        raise OSError(errno.EBUSY, "was replaced again and again", self.path)

    def _open(self) -> int:
        try:
            fd = os.open(self.path, _APPEND, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            fd = os.open(self.path, _APPEND, 0o600)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise UnsafeFile.of(self.path, status.st_mode)
        if status.st_mode & 0o077:
            with suppress(OSError):
                os.fchmod(fd, 0o600)
        return fd

    def _is_ours(self, fd: int) -> bool:
        if os.fstat(fd).st_size > self.max_bytes + _BATCH * _MAX_LINE:
            return False  # as of a damaged file system; to read it would take for ever
        first_line = os.pread(fd, _MAX_HEADER, 0).partition(b"\n")[0]
        header = _parse(first_line)
        if header is None:
            return not first_line  # new, or nothing was written yet
        return header.get("journal") == self.kind and header.get("version") == _VERSION

    def _open_to_read(self, path: str) -> int | None:
        """Open a generation, None if there is none or it is not ours. Raise OSError."""
        try:
            fd = open_regular(path)
        except (*Missing, UnsafeFile):
            return None
        try:
            is_ours = self._is_ours(fd)
        except OSError:
            os.close(fd)
            raise
        if is_ours:
            return fd
        os.close(fd)
        return None


class Appendable(Protocol):
    """A `Journal`, or what keeps one."""

    @property
    def path(self) -> str: ...

    def append(self, entries: Sequence[Entry]) -> None: ...


@define(eq=False)
class BackgroundJournal:
    """Appends to a journal in a thread. A disk that is full, or hangs, fails nothing and is logged once."""

    _reactor: Any
    journal: Appendable
    _waiting: deque[Entry] = field(factory=deque, init=False)
    _is_writing: bool = field(default=False, init=False)
    _lost: int = field(default=0, init=False)

    def append(self, entry: Entry) -> None:
        """Append `entry` soon. It is lost if 10,000 entries wait already, or if it cannot be written."""
        if len(self._waiting) >= _MAX_WAITING:
            self._count_lost(1, "the disk does not keep up")
            return
        self._waiting.append(entry)
        if not self._is_writing:
            self._is_writing = True
            spawn(self._write_all(), f"writing {self.journal.path}")

    def flush(self) -> None:
        """Append what waits, at the end of the process. Blocks."""
        with suppress(OSError):
            self._write_waiting()

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                waiting = len(self._waiting)
                try:
                    # For no client, even if one of them has caused the entry.
                    await fair_threads(self._reactor).run(self._reactor, "", partial(self._write_waiting))
                except OSError as error:
                    self._count_lost(waiting - len(self._waiting), error.strerror or str(error))
                    continue
                if self._lost:
                    path, lost = self.journal.path, self._lost
                    log.info("{path} is written again; {lost} entries are lost", path=path, lost=lost)
                    self._lost = 0
        finally:
            self._is_writing = False

    def _write_waiting(self) -> None:
        """Append what waits, taking it from the queue, so that a thread and `flush` do not append it twice."""
        while self._waiting:
            self.journal.append([self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH))])

    def _count_lost(self, count: int, reason: str) -> None:
        if not self._lost:
            log.error("{path} cannot be written, its entries are lost: {reason}", path=self.journal.path, reason=reason)
        self._lost += max(count, 1)


def bounded(text: str) -> str:
    """Return `text`, or its start and "…" if it is longer than `MAX_TEXT`."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _render(entry: Entry) -> bytes:
    # ASCII: control characters, line separators and lone surrogates become escapes, so an entry is always one line.
    return json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_entry(entry: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Return whether this is an entry, and neither the first line nor a torn one."""
    return entry is not None and "version" not in entry


def _split(lines: Iterable[bytes], is_old: Callable[[Entry], bool]) -> tuple[deque[bytes], bool]:
    """Return the lines of the entries that are not old, given the last one first, and whether others are."""
    kept, has_old = deque[bytes](), False
    for line in lines:
        entry = _parse(line)
        if _is_entry(entry):
            if is_old(entry):
                has_old = True
            else:
                kept.appendleft(line + b"\n")
    return kept, has_old


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except Missing:
        return False


@contextmanager
def _ignoring(errnos: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise


def _lines_backwards(fd: int) -> Iterator[bytes]:
    """Yield the lines of the file as it is now, without their ends, the last one first. Skip very long ones."""
    position, rest = os.fstat(fd).st_size, b""
    while position:
        size = min(_CHUNK, position)
        position -= size
        first, *lines = (os.pread(fd, size, position) + rest).split(b"\n")
        yield from (line for line in reversed(lines) if line and len(line) <= _MAX_LINE)
        rest = first if len(first) <= _MAX_LINE else b""
    if rest:
        yield rest
