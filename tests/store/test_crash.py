"""Every change to the tree, stopped before each of the system calls it makes.

`Disk` stands for `os` in the store's modules. In a crash nothing reaches the disk after the call that was stopped,
clean-up neither; an error is one failing call, after which the program goes on. Either way a reader finds the old state
or the new one, the next start finds no litter it cannot remove, and the change can be made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from dockerproxy.oci.names import Digest
from dockerproxy.store import blobs as blobs_module
from dockerproxy.store import files, ingest, records
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import Staging
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records

CHANGING = {"pwritev", "fsync", "fdatasync", "rename", "mkdir", "makedirs", "rmdir", "unlink", "utime", "ftruncate"}
OLD, NEW = Digest.of(b"old"), Digest.of(b"new content")
INDEX, MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"


class Crash(BaseException):
    """The machine is gone."""


class Disk:
    """`os`, whose changing call number `stop` fails."""

    def __init__(self, stop: int, *, crash: bool) -> None:
        self.stop, self.crash = stop, crash
        self.calls: list[str] = []
        self.crashed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.guarded(name, real) if name in CHANGING or name == "open" else real

    def guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **named)
            if self.crashed:
                raise Crash
            self.calls.append(name)
            if len(self.calls) == self.stop:
                self.crashed = self.crash
                raise Crash if self.crash else OSError(5, "Input/output error")
            return real(*arguments, **named)

        return call


class Trees:
    """`shutil`, on the same disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def rmtree(self, path: str, ignore_errors: bool) -> None:
        assert ignore_errors
        for directory, _, names in os.walk(path, topdown=False):
            for name in names:
                self.disk.unlink(f"{directory}/{name}")
            self.disk.rmdir(directory)


@define
class Store:
    root: Path
    durable: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def blobs(self) -> Blobs:
        return Blobs(self.layout, self.durable)

    @property
    def links(self) -> Links:
        return Links(self.layout, self.durable)

    @property
    def records(self) -> Records:
        return Records(self.root / "records")

    def content(self, digest: Digest) -> bytes | None:
        blob = self.blobs.open(digest)
        if blob is None:
            return None
        with blob:
            return blob.read_blocking(0, 100)


@define
class Change:
    """`before` makes the old state, `change` goes from there to the new one; `seen` is what a reader then finds."""

    before: Callable[[Store], object]
    change: Callable[[Store], object]
    seen: Callable[[Store], object]


def stage(store: Store) -> str:
    os.makedirs(store.layout.staging, exist_ok=True)
    path = f"{store.layout.staging}/upload"
    Path(path).write_bytes(b"new content")
    return path


def receive(store: Store) -> None:
    """What a process does for a blob under way, whatever an earlier one left."""
    if store.blobs.exists(NEW):
        return
    received = Ingest.open(store.layout, NEW)
    assert received is not None
    try:
        received.rehash()
        received.append([b"new content"[received.size :]])
        received.publish(store.blobs)
    finally:
        received.release()


CHANGES = {
    "put": Change(lambda s: None, lambda s: s.blobs.put(b"new content", NEW), lambda s: s.content(NEW)),
    "publish": Change(lambda s: None, lambda s: s.blobs.publish(stage(s), NEW), lambda s: s.content(NEW)),
    "remove blob": Change(
        lambda s: s.blobs.put(b"new content", NEW), lambda s: s.blobs.remove(NEW), lambda s: s.content(NEW)
    ),
    "ingest": Change(lambda s: None, receive, lambda s: s.content(NEW)),
    "link layer": Change(
        lambda s: None, lambda s: s.links.link_layer("a/b", NEW), lambda s: s.links.has_layer("a/b", NEW)
    ),
    "unlink layer": Change(
        lambda s: s.links.link_layer("a/b", NEW),
        lambda s: s.links.unlink_layer("a/b", NEW),
        lambda s: s.links.has_layer("a/b", NEW),
    ),
    "link manifest": Change(
        lambda s: None,
        lambda s: s.links.link_manifest("a", NEW, INDEX),
        lambda s: s.links.has_manifest("a", NEW) and s.links.manifest_media_type("a", NEW),
    ),
    "unlink manifest": Change(
        lambda s: s.links.link_manifest("a", NEW, INDEX),
        lambda s: s.links.unlink_manifest("a", NEW),
        lambda s: s.links.has_manifest("a", NEW) and s.links.manifest_media_type("a", NEW),
    ),
    "new tag": Change(
        lambda s: None,
        lambda s: s.links.set_tag("a", "v1", NEW),
        lambda s: (s.links.tag("a", "v1"), s.links.tags("a")),
    ),
    "move tag": Change(
        lambda s: s.links.set_tag("a", "v1", OLD),
        lambda s: s.links.set_tag("a", "v1", NEW),
        lambda s: (s.links.tag("a", "v1"), s.links.tags("a")),
    ),
    "remove tag": Change(
        lambda s: s.links.set_tag("a", "v1", NEW),
        lambda s: s.links.remove_tag("a", "v1"),
        lambda s: (s.links.tag("a", "v1"), s.links.tags("a"), os.path.exists(s.layout.tag("a", "v1"))),
    ),
    "record": Change(
        lambda s: s.records.put({"x": 1}, "a", "b"),
        lambda s: s.records.put({"x": 2}, "a", "b"),
        lambda s: s.records.get("a", "b"),
    ),
}


def use(monkeypatch: pytest.MonkeyPatch, disk: Any) -> None:
    for module in (files, blobs_module, ingest, records):
        monkeypatch.setattr(module, "os", disk)
    monkeypatch.setattr(files, "shutil", Trees(disk))


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("name", list(CHANGES))
def test_old_or_new_wherever_it_stops(
    name: str, crash: bool, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CHANGES[name]
    stopped = 0
    for stop in range(1, 100):
        store = Store(tmp_path / str(stop), durable)
        change.before(store)
        old = change.seen(store)
        disk = Disk(stop, crash=crash)
        with monkeypatch.context() as patch:
            use(patch, disk)
            try:
                change.change(store)
            except (Crash, OSError):
                stopped += 1
        found = change.seen(store)
        if not crash and "publish" not in name:
            staging = Path(store.layout.staging)
            # Of a tree that was moved aside, and then could not be removed, the rest waits for the next start.
            assert not staging.exists() or not list(staging.iterdir()) or disk.calls[-1] in ("unlink", "rmdir")
        Staging(store.layout.staging).empty()
        store.records.empty_staging()
        litter = [path for path in store.root.rglob("*") if path.is_file() and path.parent.name.endswith("staging")]
        assert litter == []
        change.change(store)
        new = change.seen(store)
        assert new != old
        assert found in (old, new)
        if len(disk.calls) < stop:
            break
    else:
        pytest.fail("no end")
    assert stopped


def test_a_crash_leaves_an_ingest_to_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, True)
    with monkeypatch.context() as patch:
        # Stopped before the fifth call: open, makedirs, open again, pwritev; then utime, of `publish`.
        use(patch, Disk(5, crash=True))
        with pytest.raises(Crash):
            receive(store)
    received = Ingest.open(store.layout, NEW)
    assert received is not None
    assert received.size == len(b"new content")
    received.release()


@pytest.mark.parametrize("durable", [False, True])
def test_data_is_on_disk_before_its_name_and_the_name_before_the_answer(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, durable)
    path = store.layout.blob(NEW)
    os.makedirs(os.path.dirname(os.path.dirname(path)))
    steps: list[tuple[str, str]] = []

    class Watched(Disk):
        def guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                where = arguments[-1] if name == "rename" else arguments[0]
                named_by = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else where
                steps.append((name, named_by))
                return real(*arguments, **named)

            return call

    staged = stage(store)
    with monkeypatch.context() as patch:
        use(patch, Watched(0, crash=False))
        store.blobs.publish(staged, NEW)
        if durable:
            store.links.link_layer("a", NEW)
    steps = [step for step in steps if step[0] in ("fsync", "fdatasync", "rename")]
    directory = os.path.dirname(path)
    published = [("fdatasync", staged), ("rename", path), ("fsync", os.path.dirname(directory)), ("rename", path)]
    if not durable:
        assert steps == [step for step in published if step[0] != "fsync"]
        return
    assert steps[:5] == [*published, ("fsync", directory)]
    link = store.layout.layer("a", NEW)
    linked = [name for name, where in steps[5:] if where in (link, os.path.dirname(link))]
    # Renamed in vain once (the directories were missing), then for good, then synced.
    assert linked == ["rename", "rename", "fsync"]
    assert steps[5][0] == "fdatasync"
    made = {where for name, where in steps[5:] if name == "fsync"}
    parent = os.path.dirname(link)
    while parent != store.layout.repositories:
        assert parent in made
        parent = os.path.dirname(parent)
