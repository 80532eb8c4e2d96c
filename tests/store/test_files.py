from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.store.files import Staging, fsync_directory, write_all
from dockerproxy.store.tree_reader import read_small


@given(st.lists(st.binary(max_size=9), max_size=8), st.lists(st.integers(1, 7), max_size=40))
def test_write_all_retries_partial_writes(chunks: list[bytes], sizes: list[int]) -> None:
    fd = os.memfd_create("x")
    real, limits = os.pwritev, iter(sizes)

    def pwritev(fd: int, buffers: list[bytes], offset: int) -> int:
        return real(fd, [b"".join(buffers)[: next(limits, None)]], offset)

    try:
        os.write(fd, b"start")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", pwritev)
            assert write_all(fd, chunks, 5) == sum(map(len, chunks))
        assert os.pread(fd, 1000, 0) == b"start" + b"".join(chunks)
    finally:
        os.close(fd)


def test_write_all_of_more_than_iov_max_buffers(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        chunks = [b"%d," % number for number in range(3000)]
        write_all(fd, chunks, 0)
        assert (tmp_path / "x").read_bytes() == b"".join(chunks)
    finally:
        os.close(fd)


def test_clear_removes_everything(tmp_path: Path) -> None:
    Staging(str(tmp_path / "none")).clear()
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/")
    Staging(str(tmp_path)).clear()
    assert list(tmp_path.iterdir()) == []
    assert os.path.isdir("/")


def test_a_directory_that_keeps_vanishing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(str(tmp_path / "staging"))
    monkeypatch.setattr(Staging, "makedirs", lambda self, path: os.makedirs(self.directory, exist_ok=True))
    with pytest.raises(FileNotFoundError, match="removed"):
        staging.write(b"x", str(tmp_path / "gone" / "file"))
    assert os.listdir(staging.directory) == []


def test_a_missing_staged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Staging(str(tmp_path)).move(str(tmp_path / "gone"), str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


def test_remove_tree_returns_whether_it_existed(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "staging"), sync_names=True)
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    assert staging.remove_tree(str(tmp_path / "tree"))
    assert not staging.remove_tree(str(tmp_path / "tree"))
    assert os.listdir(staging.directory) == []


def test_read_small_respects_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_small(str(tmp_path / "x"), 4) == b"0123"
    assert read_small(str(tmp_path / "x" / "y"), 4) is None
    assert read_small(str(tmp_path / "y"), 4) is None


def test_private_files_are_readable_only_by_their_owner(tmp_path: Path) -> None:
    Staging(str(tmp_path / "s"), private=True).write(b"x", str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o600
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("s", "a", "a/b")} == {0o700}
    assert read_small(str(tmp_path / "a" / "b" / "c"), 9) == b"x"


def test_fsync_directory_ignores_unsupported_file_systems(tmp_path: Path) -> None:
    """A shared folder of VirtualBox returns EINVAL, as /proc does, because its directories cannot be synced."""
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY))
    fsync_directory("/proc/self")
    fsync_directory(str(tmp_path))
    fsync_directory(str(tmp_path / "none"))


def test_fsync_directory_raises_io_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(str(tmp_path))


def test_a_staging_directory_that_another_thread_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is moved, although the directory was missing at the first try and is there when that has failed."""
    file, staging = tmp_path / "file", Staging(f"{tmp_path}/staging")
    file.write_bytes(b"content")
    rename = os.rename

    def create_late(source: str, target: str) -> None:
        try:
            rename(source, target)
        finally:
            os.makedirs(staging.directory, exist_ok=True)

    monkeypatch.setattr(os, "rename", create_late)
    staged = staging.move_aside(str(file))
    assert staged is not None and Path(staged).read_bytes() == b"content" and not file.exists()
    assert staging.move_aside(str(file)) is None
