"""Ring files: numbers over time, of which each new one replaces the oldest.

    offset 0     a header of 64 bytes: ``drp-ring``, then the version, the step in seconds, the rows, and the columns
    offset 64    `rows` rows of 64 bytes: the period's number, and seven values of 64 bits

The row of a period is the one with the period's number modulo `rows`. A row with any other number is of another time,
so a file needs no index, and a clock that jumps leaves nothing to mend. No row crosses a sector of the disk.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from attrs import frozen
from twisted.logger import Logger

VALUES = 7
"""Values of one row."""

_WORD = 8  # bytes
_ROW = (1 + VALUES) * _WORD
_HEADER = struct.Struct("<8sIIII40x")
_MAGIC, _VERSION = b"drp-ring", 1
_MAX_PERIOD = 2**63
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

log = Logger()

Row = tuple[int, Sequence[int]]
"""The number of a period, and its values."""


class _Unusable(Exception):
    """The file is no ring of this version and shape. The message says why."""


@frozen
class RingFile:
    """The file at `path` with `rows` periods of `step` seconds. It is created when the first row is written.

    A file that this version cannot read is renamed to ``PATH.set-aside``, with a line in the log. All methods block,
    and are called by one thread at a time.
    """

    path: str
    step: int
    rows: int

    def period(self, moment: float) -> int:
        """Return the number of the period of a POSIX time."""
        return min(max(0, int(moment // self.step)), _MAX_PERIOD)

    def write(self, period: int, values: Sequence[int]) -> None:
        """Write the row of a period. Raises OSError."""
        row = struct.pack(f"<{1 + VALUES}Q", period, *values)
        with self._open(os.O_RDWR | os.O_CREAT) as fd:
            if os.pwrite(fd, row, self._offset(period)) != _ROW:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    def read(self, first: int, last: int) -> list[Row]:
        """Return the rows of the periods from `first` to `last` that were written, in order.

        Return none if the file cannot be read, with a line in the log.
        """
        first = max(first, last - self.rows + 1)
        try:
            with self._open(os.O_RDWR) as fd:
                start, end = first % self.rows, last % self.rows
                spans = [(start, end)] if start <= end else [(start, self.rows - 1), (0, end)]
                content = b"".join(
                    os.pread(fd, (end - start + 1) * _ROW, _HEADER.size + start * _ROW) for start, end in spans
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warn("cannot read {path}: {reason}", path=self.path, reason=error.strerror)
            return []
        words = array("Q", content[: len(content) // _ROW * _ROW])
        width = 1 + VALUES
        periods = words[::width]
        return [
            (period, words[index * width + 1 : (index + 1) * width])
            for index, period in enumerate(periods)
            if first <= period <= last
        ]

    def _offset(self, period: int) -> int:
        return _HEADER.size + period % self.rows * _ROW

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        """Open the file. If it is unusable, set it aside and open a new one."""
        try:
            fd = self._open_checked(flags)
        except _Unusable as reason:
            self._set_aside(str(reason))
            fd = self._open_checked(flags | os.O_CREAT)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_checked(self, flags: int) -> int:
        try:
            fd = os.open(self.path, flags | _OPEN, 0o600)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _Unusable("it is no regular file") from None
            raise
        try:
            self._check(fd, is_written=bool(flags & os.O_CREAT))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int, *, is_written: bool) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable("it is no regular file")
        size = _HEADER.size + self.rows * _ROW
        header = _HEADER.pack(_MAGIC, _VERSION, self.step, self.rows, 1 + VALUES)
        if not status.st_size:
            if is_written:
                self._begin(fd, header, size)
            return
        found = os.pread(fd, _HEADER.size, 0)
        if found == header and status.st_size == size:
            return
        if found[: len(_MAGIC)] != _MAGIC or len(found) < _HEADER.size:
            raise _Unusable("its beginning is damaged")
        version = _HEADER.unpack(found)[1]
        if version != _VERSION:
            raise _Unusable(f"it is of version {version} of the format, and this program knows version {_VERSION}")
        raise _Unusable("its size is wrong")

    def _begin(self, fd: int, header: bytes, size: int) -> None:
        """Write the header of a new file. It stays empty if the disk is full, because no header says it is damaged."""
        try:
            if os.pwrite(fd, header, 0) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
            os.ftruncate(fd, size)  # sparse: a row takes a block of the disk when it is written
        except OSError:
            os.ftruncate(fd, 0)
            raise

    def _set_aside(self, reason: str) -> None:
        aside = f"{self.path}.set-aside"
        log.warn(
            "the numbers in {path} begin anew, and the file is now {aside}: {reason}",
            path=self.path, aside=aside, reason=reason,
        )  # fmt: skip
        with suppress(OSError):
            os.rename(self.path, aside)
            return
        os.unlink(self.path)
