"""The part of a file system that pushes and imports leave free."""

from __future__ import annotations

import errno
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dockerproxy.oci.names import parse_repository
from dockerproxy.oci.upload_ids import UploadIds
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout

MIB = 1024 * 1024
GIB = 1024 * MIB


def disk(size: int, free: int, inodes: int = 0, free_inodes: int = 0) -> Any:
    return SimpleNamespace(
        f_frsize=4096, f_blocks=size // 4096, f_bavail=free // 4096, f_files=inodes, f_favail=free_inodes
    )


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (disk(1000 * GIB, 65 * MIB), None),
        (disk(1000 * GIB, 63 * MIB), "63.0 MiB are free, and pushes and imports leave 64.0 MiB"),
        (disk(64 * MIB, 4 * MIB), None),
        (disk(64 * MIB, 3 * MIB), "3.0 MiB are free, and pushes and imports leave 3.2 MiB"),
        (disk(64 * MIB, 4 * MIB, 128_000, 6_400), None),
        (disk(64 * MIB, 4 * MIB, 128_000, 6_399), "6399 inodes are free, and pushes and imports leave 6400"),
        (disk(64 * MIB, 4 * MIB, 10**9, 19_999), "19999 inodes are free, and pushes and imports leave 20000"),
    ],
)
def test_reserve(monkeypatch: pytest.MonkeyPatch, status: Any, reason: str | None) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    if reason is None:
        DiskReserve("/").check()
    else:
        with pytest.raises(OSError, match=reason) as caught:
            DiskReserve("/").check()
        assert caught.value.errno == errno.ENOSPC


def test_uploads_that_were_given_up_make_room(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    store = HostedTree.from_layout(Layout(tmp_path), lambda: now)
    session = UploadIds(b"").make_offer("", parse_repository("a"), "sha256", 0)[:36]
    upload = store.uploads.create(session)
    upload.append([b"data"])
    store.uploads.suspend(upload)
    path = f"{store.layout.sessions}/{session}"
    monkeypatch.setattr(os, "statvfs", lambda _: disk(GIB, 0 if os.path.exists(path) else GIB))
    with pytest.raises(OSError):
        store.check_free_space()
    os.utime(path, (0, 0))
    with pytest.raises(OSError):  # because it has just looked for them
        store.check_free_space()
    now += 1
    store.check_free_space()
    assert not os.path.exists(path)
