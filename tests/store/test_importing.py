"""What is taken over from another registry's directory, and what is left where it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.oci.names import Digest
from dockerproxy.store import importing
from dockerproxy.store.check import Checker
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.importing import Imported, Importer, NoRegistry, Untaken
from dockerproxy.store.layout import Layout
from dockerproxy.store.slices import Slices, Watch
from tests.store.workbench.images import BOTH, ONE, TWO, image, keep
from tests.store.workbench.reactor import Reactor

REPOSITORY = "library/tiny"
SIGNATURE = image(b"sig", b"signature", subject=BOTH)


@pytest.fixture
def store(tmp_path: Path) -> HostedStore:
    return HostedStore.below(Layout(tmp_path / "ours"))


@pytest.fixture
def other(tmp_path: Path) -> HostedStore:
    """A registry's directory, as `registry:2` leaves it: it notes no media types and no subjects."""
    other = HostedStore.below(Layout(tmp_path / "other"))
    keep(other, REPOSITORY, BOTH, "v1", "latest")
    keep(other, REPOSITORY, SIGNATURE)
    keep(other, "two", ONE, "v1")
    for name in ("media-type", "subject"):
        for path in other.layout.root.rglob(name):
            path.unlink()
    for path in other.layout.root.rglob("_referrers"):
        shutil.rmtree(path)
    return other


def take(store: HostedStore, directory: Path, *, force: bool = False) -> tuple[Imported, list[Untaken]]:
    reactor, found = Reactor(), list[Untaken]()
    imported = reactor.run(Importer(reactor, store).take(directory, force=force, watch=Watch(found=found.append)))
    assert imported.untaken == len(found)
    assert os.listdir(store.layout.staging) == []
    return imported, found


def sound(store: HostedStore) -> bool:
    reactor = Reactor()
    return reactor.run(Checker(reactor, store.layout).check()).findings == 0


def test_everything_that_the_repositories_have(store: HostedStore, other: HostedStore) -> None:
    other.blobs.put(b"garbage", Digest.of(b"garbage"))
    before = sorted(map(str, other.layout.root.rglob("*")))
    imported, found = take(store, other.layout.root)
    assert found == []
    entries = {entry.digest: entry.size for entry in other.blobs.walk() if entry.digest != Digest.of(b"garbage")}
    assert imported == Imported(
        repositories=2, hardlinked=len(entries), bytes=sum(entries.values()), manifests=5, tags=3
    )
    assert {entry.digest: entry.size for entry in store.blobs.walk()} == entries
    assert store.links.tags(REPOSITORY) == ["latest", "v1"]
    assert store.links.tag(REPOSITORY, "v1") == BOTH.digest
    assert store.links.manifest_media_type(REPOSITORY, BOTH.digest) == BOTH.media_type
    assert sound(store)
    assert sorted(map(str, other.layout.root.rglob("*"))) == before
    config = Digest.of(b"config1")
    assert os.path.samefile(store.layout.blob(config), other.layout.blob(config))
    # Referrers are found although nobody noted them there.
    store.referrers.complete(REPOSITORY)
    assert len(list(store.referrers.list(REPOSITORY, BOTH.digest, None))) == 1


def test_a_second_time_nothing_is_left_to_do(store: HostedStore, other: HostedStore) -> None:
    take(store, other.layout.root)
    imported, found = take(store, other.layout.root)
    assert found == []
    assert imported == Imported(repositories=2, present=len(list(other.blobs.walk())))


@pytest.mark.parametrize("below", ["", "docker/registry/v2"])
def test_the_directory_may_be_named_in_two_ways(store: HostedStore, other: HostedStore, below: str) -> None:
    assert take(store, other.layout.root / below)[0].tags == 3


def test_what_is_no_registrys_directory(store: HostedStore, other: HostedStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(NoRegistry, match=str(directory)):
            take(store, directory)
    with pytest.raises(NoRegistry, match="own"):
        take(other, other.layout.root)


def test_another_file_system_or_another_users_files_are_copied(
    store: HostedStore, other: HostedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(importing.os, "link", link)
        imported, _ = take(store, other.layout.root)
    assert (imported.hardlinked, imported.copied) == (0, len(list(other.blobs.walk())))
    assert sound(store)
    assert not os.path.samefile(store.layout.blob(ONE.digest), other.layout.blob(ONE.digest))
    theirs = HostedStore.below(Layout(store.layout.root.parent / "third"))
    monkeypatch.setattr(importing.os, "geteuid", lambda: os.getuid() + 1000)
    assert take(theirs, other.layout.root)[0].hardlinked == 0


def test_tags_that_mean_something_else_here(store: HostedStore, other: HostedStore) -> None:
    keep(store, REPOSITORY, ONE, "v1", "mine")
    imported, found = take(store, other.layout.root)
    assert (imported.conflicts, imported.tags) == (1, 2)
    assert [untaken.kind for untaken in found] == ["conflict"]
    assert f"{REPOSITORY}:v1" in found[0].what
    assert store.links.tag(REPOSITORY, "v1") == ONE.digest
    imported, found = take(store, other.layout.root, force=True)
    assert (imported.conflicts, imported.tags, found) == (0, 1, [])
    assert store.links.tag(REPOSITORY, "v1") == BOTH.digest
    assert store.links.tag(REPOSITORY, "mine") == ONE.digest


def test_damage_there_does_not_come_here(store: HostedStore, other: HostedStore) -> None:
    Path(other.layout.blob(Digest.of(b"layer1"))).write_bytes(b"layer?")
    Path(other.layout.blob(TWO.digest)).unlink()
    Path(other.layout.blob(SIGNATURE.digest)).write_bytes(b"no manifest")
    Path(other.layout.tag_current("two", "v1")).write_bytes(str(TWO.digest).encode())
    _, found = take(store, other.layout.root)
    texts = sorted(untaken.what for untaken in found)
    layer = Digest.of(b"layer1")
    assert texts == sorted([
        f"{layer} is damaged",
        f"{SIGNATURE.digest} is damaged",
        f"{REPOSITORY}: the blob {layer} is missing",
        f"two: the blob {layer} is missing",
        f"{REPOSITORY}: the manifest {SIGNATURE.digest} is missing",
        f"{REPOSITORY}: the manifest {TWO.digest} is missing",
        "two:v1: what the tag means is missing",
    ])  # fmt: skip
    assert store.links.tags("two") == []
    assert not store.blobs.exists(layer)
    # Mended there, it comes.
    Path(other.layout.blob(layer)).write_bytes(b"layer1")
    take(store, other.layout.root)
    assert store.links.has_layer(REPOSITORY, layer)


def test_damage_here_is_mended(store: HostedStore, other: HostedStore) -> None:
    take(store, other.layout.root)
    path = store.layout.blob(ONE.digest)
    os.unlink(path)
    Path(path).write_bytes(b"short")
    assert take(store, other.layout.root)[0].hardlinked == 1
    assert sound(store)


def test_a_name_that_is_none(store: HostedStore, other: HostedStore) -> None:
    os.rename(f"{other.layout.repositories}/two", f"{other.layout.repositories}/Two")
    imported, found = take(store, other.layout.root)
    assert [untaken.kind for untaken in found] == ["invalid"]
    assert "Two" in found[0].what
    assert imported.repositories == 1


def test_it_goes_on_where_it_was_broken_off(store: HostedStore, other: HostedStore) -> None:
    reactor = Reactor()
    importer = Importer(reactor, store, slices=Slices(reactor, length=-1))
    steps = 0
    while True:
        under_way = Deferred.fromCoroutine(importer.take(other.layout.root))
        for _ in range(steps):
            reactor.run_one()
        if under_way.called:
            break
        under_way.cancel()

        async def wait(under_way: Deferred[Imported] = under_way) -> Imported:
            return await under_way

        with pytest.raises(CancelledError):
            reactor.run(wait())
        assert not os.path.exists(store.layout.staging) or os.listdir(store.layout.staging) == []
        for repository in store.links.repositories():
            for tag in store.links.tags(repository):
                digest = store.links.tag(repository, tag)
                assert digest is not None and store.links.has_manifest(repository, digest)
        steps += 3
    assert steps > 20
    assert sound(store)
    assert store.links.tags(REPOSITORY) == ["latest", "v1"]


def test_progress(store: HostedStore, other: HostedStore) -> None:
    reactor, told = Reactor(), list[tuple[str, int, int | None]]()
    importer = Importer(reactor, store, slices=Slices(reactor, length=-1))
    reactor.run(importer.take(other.layout.root, watch=Watch(progress=lambda *state: told.append(state))))
    size = sum(entry.size for entry in other.blobs.walk())
    contents = [done for phase, done, total in told if phase == "contents" and total == size]
    assert contents == sorted(contents)
    assert contents[-1] == size
    assert told[-1] == ("manifests", 5, None)
