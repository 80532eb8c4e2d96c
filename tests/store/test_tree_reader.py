"""Reading of files that other users may have written: only regular ones, and no symbolic link is followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dockerproxy.store.tree_reader import StrictReader, UnsafeFile, list_names, open_regular, read_small


class Tree:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.unsafe: list[str] = []
        self.reader = StrictReader((str(root / "tree"),), lambda error: self.unsafe.append(error.filename))
        (root / "tree/a/b").mkdir(parents=True)
        (root / "tree/a/b/file").write_bytes(b"content")
        (root / "secret").write_bytes(b"secret")

    def path(self, name: str) -> str:
        return str(self.root / "tree" / name)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_reads_what_is_there(tree: Tree) -> None:
    assert tree.reader.read_small(tree.path("a/b/file"), 4) == b"cont"
    assert sorted(tree.reader.list_names(tree.path("a"))) == ["b"]
    assert tree.reader.list_names(str(tree.root / "tree")) == ["a"]
    assert tree.reader.stat(tree.path("a/b/file")).st_size == 7
    assert tree.reader.is_directory(tree.path("a/b")) and not tree.reader.is_directory(tree.path("a/b/file"))


@pytest.mark.parametrize("name", ["none", "a/none/file", "a/b/file/none"])
def test_what_is_missing_is_absent_and_not_unsafe(tree: Tree, name: str) -> None:
    assert tree.reader.read_small(tree.path(name), 4) is None
    assert tree.reader.list_names(tree.path(name)) == []
    assert not tree.reader.is_directory(tree.path(name))
    assert tree.unsafe == []


@pytest.mark.parametrize("link", ["a", "a/b", "a/b/file"])
@pytest.mark.parametrize("inside", [True, False])
def test_no_link_is_followed_and_each_is_reported_once(tree: Tree, link: str, inside: bool) -> None:
    path = Path(tree.path(link))
    elsewhere = tree.root / ("tree/elsewhere" if inside else "elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    for _ in range(2):
        assert tree.reader.read_small(tree.path("a/b/file"), 4) is None
    if link != "a/b/file":
        assert tree.reader.list_names(tree.path("a/b")) == []
        assert not tree.reader.is_directory(tree.path("a/b/c"))
    with pytest.raises(UnsafeFile, match=f"{path} is a symbolic link, which is not followed"):
        tree.reader.open(tree.path("a/b/file"))
    assert tree.unsafe == [str(path)]


def test_the_anchor_may_be_reached_by_links(tree: Tree) -> None:
    (tree.root / "link").symlink_to(tree.root / "tree")
    reader = StrictReader((str(tree.root / "link"),), pytest.fail)
    assert reader.read_small(str(tree.root / "link/a/b/file"), 4) == b"cont"
    assert reader.list_names(str(tree.root / "link")) == ["a"]


def test_no_path_leads_out(tree: Tree) -> None:
    with pytest.raises(ValueError, match="leads out"):
        tree.reader.read_small(tree.path("a/../../secret"), 4)


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory"])
def test_special_files_are_refused_without_waiting(tree: Tree, kind: str) -> None:
    path = Path(tree.path("a/special"))
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
        with pytest.raises(UnsafeFile, match="is a device"):
            open_regular("/dev/zero")
    assert tree.reader.read_small(str(path), 4) is None
    with pytest.raises(UnsafeFile):
        read_small(str(path), 4)
    if kind != "directory":
        with pytest.raises(UnsafeFile):
            tree.reader.stat(str(path))
    assert tree.unsafe == [str(path)]


def test_descriptors_are_closed(tree: Tree) -> None:
    os.symlink("a", tree.path("link"))
    os.mkfifo(tree.path("fifo"))
    before = os.listdir("/proc/self/fd")
    for name in ("a/b/file", "a/b/none", "link/b/file", "fifo", "a/b/file/x"):
        tree.reader.read_small(tree.path(name), 4)
        tree.reader.list_names(tree.path(name))
        tree.reader.is_directory(tree.path(name))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_names_of_a_missing_directory_are_none(tmp_path: Path) -> None:
    assert list_names(str(tmp_path / "none")) == []
