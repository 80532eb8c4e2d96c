"""Tests of the scrubber: the finding for every kind of damage, and the quarantine of damaged blobs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.repository_check import Finding, ScrubResult
from dockerproxy.store.scrub import scrub as scrub_layout
from tests.store.support.images import BOTH, ONE, descriptor, image, put_image

REPOSITORY = "library/tiny"
CONFIG = Digest.of(b"config1")


@pytest.fixture
def store(tmp_path: Path) -> HostedTree:
    store = HostedTree.from_layout(Layout(tmp_path))
    put_image(store, REPOSITORY, BOTH, "v1")
    return store


def scrub(store: HostedTree, *, links: bool = True) -> tuple[ScrubResult, list[Finding]]:
    findings: list[Finding] = []
    return scrub_layout(store.layout, check_links=links, progress=Progress(emit=findings.append)), findings


def test_an_intact_store_has_no_findings(store: HostedTree) -> None:
    put_image(store, "other", image(b"sig", b"signature", subject=BOTH))
    before = {path: path.stat().st_mtime for path in store.layout.root.rglob("*")}
    result, findings = scrub(store)
    assert findings == []
    size = sum(entry.size for entry in store.blobs.walk())
    assert result == ScrubResult(blobs=11, bytes=size, repositories=2, links=11, tags=1)
    assert {path: path.stat().st_mtime for path in store.layout.root.rglob("*")} == before


@pytest.mark.parametrize("content", [b"config2", b"", b"config1 and more"])
def test_a_damaged_blob_is_quarantined(store: HostedTree, content: bytes) -> None:
    blob = Path(store.layout.blob(CONFIG))
    blob.write_bytes(content)
    result, findings = scrub(store)
    assert (result.damaged, result.findings) == (1, 3)
    assert [(finding.kind, finding.repository, finding.digest) for finding in findings] == [
        ("damaged", None, CONFIG), ("missing", REPOSITORY, CONFIG), ("missing", REPOSITORY, ONE.digest)
    ]  # fmt: skip
    assert str(CONFIG) in findings[2].message
    assert not blob.exists()
    assert (store.layout.root / "damaged" / f"sha256-{CONFIG.hex}").read_bytes() == content
    # If the blob is pushed and damaged again, the second file does not overwrite the first in quarantine.
    store.blobs.put(b"config1", CONFIG)
    assert scrub(store)[1] == []
    blob.write_bytes(b"damaged again")
    scrub(store)
    assert len(os.listdir(store.layout.damaged)) == 2


def test_a_blob_replaced_while_it_is_scrubbed_is_not_quarantined(
    store: HostedTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(store.layout.blob(CONFIG)).write_bytes(b"damaged!")
    real = os.rename

    def rename(source: str, target: str) -> None:
        if target.startswith(store.layout.damaged):
            monkeypatch.undo()
            store.blobs.put(b"config1", CONFIG)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert scrub(store)[1] == []
    assert Path(store.layout.blob(CONFIG)).read_bytes() == b"config1"


def test_missing_and_torn_links_are_reported(store: HostedTree) -> None:
    os.unlink(store.layout.blob(Digest.of(b"layer2")))
    store.links.unlink_layer(REPOSITORY, Digest.of(b"layer1"))
    Path(store.layout.layer(REPOSITORY, Digest.of(b"base"))).write_bytes(b"")
    store.links.set_tag(REPOSITORY, "nowhere", Digest.of(b"nothing"))
    Path(store.layout.tag_current(REPOSITORY, "v1")).write_bytes(b"sha256:12")
    put_image(store, "odd", image(b"config"), "v1")
    odd = b'{"schemaVersion":2}'
    store.blobs.put(odd, Digest.of(odd))
    store.links.link_manifest("odd", Digest.of(odd), OCI_MANIFEST)
    result, findings = scrub(store)
    messages = sorted(finding.message.partition(": ")[2] for finding in findings)
    base, first, second = (Digest.of(name) for name in (b"base", b"layer1", b"layer2"))
    children = [child.digest for child in BOTH.children]
    assert messages == sorted([
        f"the blob {second} is missing",
        f"the link to the blob {base} was torn; it was mended, because its content is here",
        f"the manifest {children[0]} refers to {first}, which is missing",
        f"the manifest {children[1]} refers to {second}, which is missing",
        f"the tag points to {Digest.of(b'nothing')}, which is not a manifest of the repository; "
        f"push the tag again, or run `dockerproxy rm {REPOSITORY}:nowhere`",
        "the tag's link was torn; it was mended, because it has had one manifest only",
        f"the manifest {Digest.of(odd)} is invalid (the manifest has no config)",
    ])  # fmt: skip
    assert result.findings == len(findings)
    assert result.damaged == 0
    assert not os.path.exists(store.layout.damaged)


@pytest.mark.parametrize("content", [b"", b"sha256:12", b"\0" * 71])
def test_torn_links_are_mended(store: HostedTree, content: bytes) -> None:
    paths = [store.layout.layer(REPOSITORY, CONFIG), store.layout.manifest(REPOSITORY, BOTH.children[0].digest),
             store.layout.manifest(REPOSITORY, BOTH.digest), store.layout.tag_current(REPOSITORY, "v1")]  # fmt: skip
    before = [Path(path).read_bytes() for path in paths]
    for path in paths:
        Path(path).write_bytes(content)
    findings = scrub(store)[1]
    assert [finding.kind for finding in findings] == ["torn"] * 4
    assert all("mended" in finding.message for finding in findings)
    assert [Path(path).read_bytes() for path in paths] == before
    assert scrub(store)[1] == []


def test_torn_links_that_cannot_be_mended(store: HostedTree) -> None:
    other = image(b"other")
    put_image(store, REPOSITORY, other, "v1")  # the tag has had two manifests
    damaged, missing = Digest.of(b"config1"), Digest.of(b"base")
    for path in (store.layout.tag_current(REPOSITORY, "v1"), store.layout.layer(REPOSITORY, damaged),
                 store.layout.layer(REPOSITORY, missing)):  # fmt: skip
        Path(path).write_bytes(b"")
    Path(store.layout.blob(damaged)).write_bytes(b"damaged")
    os.unlink(store.layout.blob(missing))
    messages = {finding.message for finding in scrub(store)[1] if finding.kind == "torn"}
    assert messages == {
        f"{REPOSITORY}:v1: the tag's link is torn; push the tag again, or run `dockerproxy rm {REPOSITORY}:v1`",
        f"{REPOSITORY}: the link to the blob {damaged} is torn",
        f"{REPOSITORY}: the link to the blob {missing} is torn",
    }
    assert store.links.tag(REPOSITORY, "v1") is None
    assert not store.links.has_layer(REPOSITORY, damaged)


def test_nondistributable_layers_may_be_missing(store: HostedTree) -> None:
    foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"from its vendor")
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor("a/b", b"config1"), "layers": [foreign]}
    ).encode()
    store.blobs.put(manifest, Digest.of(manifest))
    store.links.link_manifest(REPOSITORY, Digest.of(manifest), OCI_MANIFEST)
    assert scrub(store)[1] == []


def test_a_manifest_of_an_unknown_type_need_not_parse(store: HostedTree) -> None:
    for content, media_type in ((b"anything", "application/vnd.anything"), (b'{"config": 1}', "a/b+json")):
        store.blobs.put(content, Digest.of(content))
        store.links.link_manifest(REPOSITORY, Digest.of(content), media_type)
    assert scrub(store)[1] == []


def test_a_cache_may_have_dangling_links(store: HostedTree) -> None:
    os.unlink(store.layout.blob(CONFIG))
    Path(store.layout.blob(Digest.of(b"base"))).write_bytes(b"bass")
    result, findings = scrub(store, links=False)
    assert [finding.kind for finding in findings] == ["damaged"]
    assert (result.repositories, result.links, result.tags) == (0, 0, 0)


def test_progress_and_stop(store: HostedTree) -> None:
    reports: list[tuple[str, int, int | None]] = []
    scrub_layout(store.layout, progress=Progress(report=lambda *state: reports.append(state)))
    size = sum(entry.size for entry in store.blobs.walk())
    assert [state for state in reports if state[0] == "contents"][-1] == ("contents", size, size)
    assert reports[-1] == ("repositories", 1, None)
    remaining = iter(range(10))

    def stop(phase: str, done: int, total: int | None) -> None:
        if next(remaining, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        scrub_layout(store.layout, progress=Progress(report=stop))


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "link to a blob"])
def test_what_is_no_file_is_reported_and_stays(store: HostedTree, tmp_path: Path, kind: str) -> None:
    path = Path(store.layout.blob(CONFIG))
    path.rename(tmp_path / "elsewhere")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    _, findings = scrub(store)
    assert findings[0].kind == "unreadable"
    assert f"{path} is a " in findings[0].message
    assert os.path.lexists(path)
    assert store.blobs.open(CONFIG) is None
    assert not store.blobs.exists(CONFIG)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_linked_directory_is_reported_and_not_entered(store: HostedTree, tmp_path: Path, depth: int) -> None:
    path = Path(store.layout.blob(CONFIG)).parents[depth]
    path.rename(tmp_path / "elsewhere")
    [copy] = [file for file in (tmp_path / "elsewhere").rglob("data") if file.read_bytes() == b"config1"]
    copy.write_bytes(b"damaged")
    path.symlink_to(tmp_path / "elsewhere")
    _, findings = scrub(store)
    assert any(f"{path} is a symbolic link" in finding.message for finding in findings)
    assert copy.read_bytes() == b"damaged"


def test_the_blobs_may_be_on_another_disk(store: HostedTree, tmp_path: Path) -> None:
    path = Path(store.layout.blobs)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert scrub(store)[1] == []
