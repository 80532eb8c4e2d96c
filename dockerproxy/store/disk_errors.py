"""Errors of the disks of CACHE_DIR and REGISTRY_DIR, as people read them: which directory it is, and what to do."""

from __future__ import annotations

import errno

from dockerproxy.errors import InsufficientStorage, RegistryError, StorageFailed

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of errors that say that a disk, or somebody's part of it, is full."""


def disk_error(setting: str, error: OSError, consequence: str = "") -> RegistryError:
    """Return the error for people if the directory in `setting` cannot be written.

    `consequence` is a clause for the beginning of its sentence, such as "nothing was removed".
    """
    reason, before = error.strerror or str(error), f"{consequence}: " if consequence else ""
    if error.errno in FULL:
        return InsufficientStorage(f"{before}{setting} is full: {reason}; free space there, or give it a larger disk")
    return StorageFailed(
        f"{before}{setting} cannot be written: {reason}; see the permissions and mounts of its directory"
    )
