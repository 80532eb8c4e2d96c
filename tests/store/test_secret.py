from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from dockerproxy.store.files import Staging
from dockerproxy.store.secret import load_or_create_secret


def load(path: Path) -> bytes:
    staging = Staging(str(path.parent / "staging"), sync_data=True, sync_names=True, private=True)
    return load_or_create_secret(path, staging)


def test_the_secret_is_persistent_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = load(path)
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(path) == secret
    assert load(tmp_path / "another") != secret


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_torn_secret_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    secret = load(path)
    assert len(secret) == 32
    assert load(path) == secret


@pytest.mark.parametrize("hard_links", [True, False])
def test_first_starts_at_the_same_time_get_one_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    """Another process creates the file just before this one would."""
    path, other = tmp_path / "secret", bytes(range(32))
    link, rename = os.link, os.rename

    def link_late(source: str, target: str) -> None:
        path.write_bytes(other)
        if not hard_links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    monkeypatch.setattr(os, "rename", rename)
    assert load(path) == other
    assert list((tmp_path / "staging").iterdir()) == []


def test_many_first_starts_get_one_secret(tmp_path: Path) -> None:
    barrier, secrets = threading.Barrier(8), []

    def start() -> None:
        barrier.wait()
        secrets.append(load(tmp_path / "secret"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(secrets)) == 1
    assert len(secrets) == 8


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail)
    secret = load(tmp_path / "secret")
    assert load(tmp_path / "secret") == secret


def test_the_secret_is_synced_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fdatasync", "link", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    (tmp_path / "staging").mkdir()
    load(tmp_path / "secret")
    assert calls == ["fdatasync", "link", "fsync"]
