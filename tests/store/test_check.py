"""Damage of every kind, and what is said and done about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.check import Checked, Checker, Finding
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.layout import Layout
from dockerproxy.store.slices import Slices, Watch
from tests.store.workbench.images import BOTH, ONE, described, image, keep
from tests.store.workbench.reactor import Reactor

REPOSITORY = "library/tiny"
CONFIG = Digest.of(b"config1")


@pytest.fixture
def store(tmp_path: Path) -> HostedStore:
    store = HostedStore.below(Layout(tmp_path))
    keep(store, REPOSITORY, BOTH, "v1")
    return store


def check(store: HostedStore, *, links: bool = True) -> tuple[Checked, list[Finding]]:
    reactor, found = Reactor(), list[Finding]()
    return reactor.run(Checker(reactor, store.layout, links).check(Watch(found=found.append))), found


def test_a_sound_store(store: HostedStore) -> None:
    keep(store, "other", image(b"sig", b"signature", subject=BOTH))
    before = {path: path.stat().st_mtime for path in store.layout.root.rglob("*")}
    checked, found = check(store)
    assert found == []
    size = sum(entry.size for entry in store.blobs.walk())
    assert checked == Checked(blobs=11, bytes=size, repositories=2, links=11, tags=1)
    assert {path: path.stat().st_mtime for path in store.layout.root.rglob("*")} == before


@pytest.mark.parametrize("content", [b"config2", b"", b"config1 and more"])
def test_damaged_content_is_set_aside(store: HostedStore, content: bytes) -> None:
    blob = Path(store.layout.blob(CONFIG))
    blob.write_bytes(content)
    checked, found = check(store)
    assert (checked.damaged, checked.findings) == (1, 3)
    assert [(finding.kind, finding.repository, finding.digest) for finding in found] == [
        ("damaged", None, CONFIG), ("missing", REPOSITORY, CONFIG), ("missing", REPOSITORY, ONE.digest)
    ]  # fmt: skip
    assert str(CONFIG) in found[2].what
    assert not blob.exists()
    assert (store.layout.root / "damaged" / f"sha256-{CONFIG.hex}").read_bytes() == content
    # Pushed again and damaged again, it does not take the place of the first.
    store.blobs.put(b"config1", CONFIG)
    assert check(store)[1] == []
    blob.write_bytes(b"damaged again")
    check(store)
    assert len(os.listdir(store.layout.damaged)) == 2


def test_a_content_that_is_mended_while_it_is_read(store: HostedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(store.layout.blob(CONFIG)).write_bytes(b"damaged!")
    real = os.rename

    def rename(source: str, target: str) -> None:
        if target.startswith(store.layout.damaged):
            monkeypatch.undo()
            store.blobs.put(b"config1", CONFIG)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert check(store)[1] == []
    assert Path(store.layout.blob(CONFIG)).read_bytes() == b"config1"


def test_what_is_missing_or_torn(store: HostedStore) -> None:
    os.unlink(store.layout.blob(Digest.of(b"layer2")))
    store.links.unlink_layer(REPOSITORY, Digest.of(b"layer1"))
    Path(store.layout.layer(REPOSITORY, Digest.of(b"base"))).write_bytes(b"")
    store.links.set_tag(REPOSITORY, "nowhere", Digest.of(b"nothing"))
    Path(store.layout.tag_current(REPOSITORY, "v1")).write_bytes(b"sha256:12")
    keep(store, "odd", image(b"config"), "v1")
    odd = b'{"schemaVersion":2}'
    store.blobs.put(odd, Digest.of(odd))
    store.links.link_manifest("odd", Digest.of(odd), OCI_MANIFEST)
    checked, found = check(store)
    texts = sorted(finding.what.partition(": ")[2] for finding in found)
    base, first, second = (Digest.of(name) for name in (b"base", b"layer1", b"layer2"))
    children = [child.digest for child in BOTH.children]
    assert texts == sorted([
        f"the blob {second} is missing",
        f"the link to the blob {base} is torn",
        f"the manifest {children[0]} lacks {base}",
        f"the manifest {children[0]} lacks {first}",
        f"the manifest {children[1]} lacks {base}",
        f"the manifest {children[1]} lacks {second}",
        f"the tag means {Digest.of(b'nothing')}, which is no manifest there",
        "the tag's link is torn",
        f"the manifest {Digest.of(odd)} is not understood (the manifest has no config)",
    ])  # fmt: skip
    assert checked.findings == len(found)
    assert checked.damaged == 0
    assert not os.path.exists(store.layout.damaged)


def test_layers_that_nobody_may_distribute_may_be_missing(store: HostedStore) -> None:
    foreign = described("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"from its vendor")
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described("a/b", b"config1"), "layers": [foreign]}
    ).encode()
    store.blobs.put(manifest, Digest.of(manifest))
    store.links.link_manifest(REPOSITORY, Digest.of(manifest), OCI_MANIFEST)
    assert check(store)[1] == []


def test_a_manifest_of_an_unknown_type_need_not_be_understood(store: HostedStore) -> None:
    for content, media_type in ((b"anything", "application/vnd.anything"), (b'{"config": 1}', "a/b+json")):
        store.blobs.put(content, Digest.of(content))
        store.links.link_manifest(REPOSITORY, Digest.of(content), media_type)
    assert check(store)[1] == []


def test_a_cache_may_lack_what_its_links_lead_to(store: HostedStore) -> None:
    os.unlink(store.layout.blob(CONFIG))
    Path(store.layout.blob(Digest.of(b"base"))).write_bytes(b"bass")
    checked, found = check(store, links=False)
    assert [finding.kind for finding in found] == ["damaged"]
    assert (checked.repositories, checked.links, checked.tags) == (0, 0, 0)


def test_progress_and_cancellation(store: HostedStore) -> None:
    reactor, told = Reactor(), list[tuple[str, int, int | None]]()
    checker = Checker(reactor, store.layout, slices=Slices(reactor, length=-1))
    watch: Watch[Finding] = Watch(progress=lambda *state: told.append(state))
    reactor.run(checker.check(watch))
    size = sum(entry.size for entry in store.blobs.walk())
    assert [state for state in told if state[0] == "contents"][-1] == ("contents", size, size)
    assert told[-1] == ("repositories", 1, None)
    under_way = Deferred.fromCoroutine(checker.check())
    for _ in range(10):
        reactor.run_one()
    under_way.cancel()

    async def wait() -> Checked:
        return await under_way

    with pytest.raises(CancelledError):
        reactor.run(wait())
    assert not reactor.busy
