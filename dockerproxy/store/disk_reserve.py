"""Space on the disk that pushes and imports leave free, so that what the daemon itself writes there still fits."""

from __future__ import annotations

import errno
import os

from attrs import frozen

_MAX_BYTES = 64 * 1024 * 1024
_MAX_INODES = 20_000
_PART = 20  # of a small file system, at most one part in so many is reserved

_MIB = 1024 * 1024


@frozen
class DiskReserve:
    """The bytes and inodes of the file system at `directory` that no push and no import may use."""

    _directory: str

    def check(self, size: int = 0) -> None:
        """Raise `OSError` (ENOSPC) if less than the reserve would be left beside `size` more bytes. Blocks."""
        status = os.statvfs(self._directory)
        free, reserved = status.f_bavail * status.f_frsize, min(_MAX_BYTES, status.f_blocks * status.f_frsize // _PART)
        if free - size < reserved:
            numbers = (
                f"{free / _MIB:.1f} MiB are free, and pushes and imports leave {reserved / _MIB:.1f} MiB to the daemon"
            )
            raise OSError(errno.ENOSPC, numbers)
        # File systems that do not count inodes (Btrfs) have 0 of them.
        inodes, reserved_inodes = status.f_favail, min(_MAX_INODES, status.f_files // _PART)
        if inodes < reserved_inodes:
            raise OSError(
                errno.ENOSPC, f"{inodes} inodes are free, and pushes and imports leave {reserved_inodes} to the daemon"
            )
