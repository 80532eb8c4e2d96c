"""The file systems that directories are on, as far as they can hang."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_REMOTE_TYPES = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs",
    "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs",
})  # fmt: skip
"""Types of file systems that another machine serves, or the host of a virtual machine. Programs serve those of FUSE."""


def remote_file_system(paths: Iterable[str], mountinfo: str = "/proc/self/mountinfo") -> tuple[str, str] | None:
    """Return the first of `paths` on a file system that may hang, and its type, or None if all are local. Blocks.

    `mountinfo` is described in proc_pid_mountinfo(5). Without it, all count as local. Paths that do not exist count as
    their parents.
    """
    try:
        lines = Path(mountinfo).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # a sandbox without /proc
        return None
    mounts = [_parse_mount(line) for line in lines]
    for path in paths:
        resolved = f"{os.path.realpath(path)}/"
        above = [(len(point), number) for number, (point, _) in enumerate(mounts) if resolved.startswith(point)]
        if above:
            name = mounts[max(above)[1]][1]
            if name in _REMOTE_TYPES or name.startswith("fuse"):
                return path, name
    return None


def _parse_mount(line: str) -> tuple[str, str]:
    """Return the mount point, which ends in a slash, and the type of the file system."""
    fields, _, file_system = line.partition(" - ")
    point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4])
    return f"{point.rstrip('/')}/", file_system.split(" ")[0]
