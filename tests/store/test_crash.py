"""Crash tests: every change to the tree is interrupted before each of its system calls.

`FaultyOS` replaces `os` in the store's modules. After a crash, no further call reaches the disk, not even clean-up. An
error is one failing call, after which the program continues. In both cases a reader finds the old state or the new one,
the next start removes all temporary files, and the change can be repeated.
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
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records

MUTATING_CALLS = {
    "pwritev",
    "fsync",
    "fdatasync",
    "rename",
    "mkdir",
    "makedirs",
    "rmdir",
    "unlink",
    "utime",
    "ftruncate",
}
OLD, NEW = Digest.of(b"old"), Digest.of(b"new content")
INDEX, MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"


class Crash(BaseException):
    """Simulates a crash of the machine."""


class FaultyOS:
    """A proxy for `os` that fails the mutating call number `fail_at`."""

    def __init__(self, fail_at: int, *, crash: bool) -> None:
        self.fail_at, self.crash = fail_at, crash
        self.calls: list[str] = []
        self.crashed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.wrap(name, real) if name in MUTATING_CALLS or name == "open" else real

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **kwargs: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **kwargs)
            if self.crashed:
                raise Crash
            self.calls.append(name)
            if len(self.calls) == self.fail_at:
                self.crashed = self.crash
                raise Crash if self.crash else OSError(5, "Input/output error")
            return real(*arguments, **kwargs)

        return call


class FaultyShutil:
    """A replacement for `shutil` that uses the same `FaultyOS`."""

    def __init__(self, disk: FaultyOS) -> None:
        self.disk = disk

    def rmtree(self, path: str, ignore_errors: bool) -> None:
        assert ignore_errors
        for directory, _, names in os.walk(path, topdown=False):
            for name in names:
                self.disk.unlink(f"{directory}/{name}")
            self.disk.rmdir(directory)


@define
class CrashStore:
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

    def read(self, digest: Digest) -> bytes | None:
        blob = self.blobs.open(digest)
        if blob is None:
            return None
        with blob:
            return blob.read_blocking(0, 100)


@define
class Change:
    """`set_up` creates the old state, `apply` changes it to the new state, and `observe` returns a reader's view."""

    set_up: Callable[[CrashStore], object]
    apply: Callable[[CrashStore], object]
    observe: Callable[[CrashStore], object]


def stage(store: CrashStore) -> str:
    os.makedirs(store.layout.staging, exist_ok=True)
    path = f"{store.layout.staging}/upload"
    Path(path).write_bytes(b"new content")
    return path


def download(store: CrashStore) -> None:
    """Download a blob, resuming the ingest of an earlier process if there is one."""
    if store.blobs.exists(NEW):
        return
    partial = Ingest.open(store.layout, IngestKey("registry.example", NEW))
    assert partial is not None
    try:
        partial.rehash()
        partial.append([b"new content"[partial.size :]])
        partial.commit(store.blobs)
    finally:
        partial.release()


CHANGES = {
    "put": Change(lambda s: None, lambda s: s.blobs.put(b"new content", NEW), lambda s: s.read(NEW)),
    "commit": Change(lambda s: None, lambda s: s.blobs.commit(stage(s), NEW), lambda s: s.read(NEW)),
    "remove blob": Change(
        lambda s: s.blobs.put(b"new content", NEW), lambda s: s.blobs.remove(NEW), lambda s: s.read(NEW)
    ),
    "ingest": Change(lambda s: None, download, lambda s: s.read(NEW)),
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


def install(monkeypatch: pytest.MonkeyPatch, disk: Any) -> None:
    for module in (files, blobs_module, ingest, records):
        monkeypatch.setattr(module, "os", disk)
    monkeypatch.setattr(files, "shutil", FaultyShutil(disk))


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("name", list(CHANGES))
def test_every_failure_leaves_the_old_or_the_new_state(
    name: str, crash: bool, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CHANGES[name]
    failures = 0
    for fail_at in range(1, 100):
        store = CrashStore(tmp_path / str(fail_at), durable)
        change.set_up(store)
        old = change.observe(store)
        disk = FaultyOS(fail_at, crash=crash)
        with monkeypatch.context() as patch:
            install(patch, disk)
            try:
                change.apply(store)
            except (Crash, OSError):
                failures += 1
        state = change.observe(store)
        if not crash and "commit" not in name:
            staging = Path(store.layout.staging)
            # If a tree was moved aside but could not be removed, the next start deletes the rest.
            assert not staging.exists() or not list(staging.iterdir()) or disk.calls[-1] in ("unlink", "rmdir")
        Staging(store.layout.staging).clear()
        store.records.clear_staging()
        litter = [path for path in store.root.rglob("*") if path.is_file() and path.parent.name.endswith("staging")]
        assert litter == []
        change.apply(store)
        new = change.observe(store)
        assert new != old
        assert state in (old, new)
        if len(disk.calls) < fail_at:
            break
    else:
        pytest.fail("the change makes more than 98 system calls")
    assert failures


def test_an_ingest_is_resumable_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CrashStore(tmp_path, True)
    with monkeypatch.context() as patch:
        # Crash before the fifth call, after open, makedirs, open and pwritev. The fifth is the utime of `commit`.
        install(patch, FaultyOS(5, crash=True))
        with pytest.raises(Crash):
            download(store)
    partial = Ingest.open(store.layout, IngestKey("registry.example", NEW))
    assert partial is not None
    assert partial.size == len(b"new content")
    partial.release()


@pytest.mark.parametrize("durable", [False, True])
def test_fsync_order_of_data_and_directories(durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CrashStore(tmp_path, durable)
    path = store.layout.blob(NEW)
    os.makedirs(os.path.dirname(os.path.dirname(path)))
    steps: list[tuple[str, str]] = []

    class RecordingOS(FaultyOS):
        def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **kwargs: Any) -> Any:
                target = arguments[-1] if name == "rename" else arguments[0]
                path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
                steps.append((name, path))
                return real(*arguments, **kwargs)

            return call

    staged_path = stage(store)
    with monkeypatch.context() as patch:
        install(patch, RecordingOS(0, crash=False))
        store.blobs.commit(staged_path, NEW)
        if durable:
            store.links.link_layer("a", NEW)
    steps = [step for step in steps if step[0] in ("fsync", "fdatasync", "rename")]
    directory = os.path.dirname(path)
    expected = [("fdatasync", staged_path), ("rename", path), ("fsync", os.path.dirname(directory)), ("rename", path)]
    if not durable:
        assert steps == [step for step in expected if step[0] != "fsync"]
        return
    assert steps[:5] == [*expected, ("fsync", directory)]
    link = store.layout.layer("a", NEW)
    link_calls = [name for name, target in steps[5:] if target in (link, os.path.dirname(link))]
    # The first rename fails, because the directories are missing. The second succeeds and is synced.
    assert link_calls == ["rename", "rename", "fsync"]
    assert steps[5][0] == "fdatasync"
    synced = {target for name, target in steps[5:] if name == "fsync"}
    parent = os.path.dirname(link)
    while parent != store.layout.repositories:
        assert parent in synced
        parent = os.path.dirname(parent)
