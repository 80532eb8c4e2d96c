"""Tests of the listings: what they take in a repository that somebody filled to take the daemon's memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin.inventory import Closure, list_manifests, list_repositories
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageRef, StoreView
from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from tests.store.support.images import BOTH, ManifestTree, descriptor, image, put_image

REPOSITORY = "library/tiny"


def hostile_manifest(store: HostedTree, count: int) -> ManifestTree:
    """Store a manifest of an unknown type with `count` digests of nothing, and those of `BOTH` and of a blob."""
    digests = [*(Digest.of(b"%d" % number) for number in range(count)), BOTH.digest, Digest.of(b"named")]
    manifest = ManifestTree("application/vnd.strange", " ".join(map(str, digests)).encode(), (b"named",))
    put_image(store, REPOSITORY, BOTH)
    put_image(store, REPOSITORY, manifest, "strange")
    return manifest


def test_a_closure_has_only_blobs_that_exist_or_are_linked(tmp_path: Path) -> None:
    tree = HostedTree.from_layout(Layout(tmp_path))
    manifest = hostile_manifest(tree, 1000)
    evicted = image(b"evicted")
    put_image(tree, REPOSITORY, evicted)
    tree.blobs.remove(Digest.of(b"evicted"))
    closure = Closure(StoreView(HOSTED, tree.layout), REPOSITORY)
    closure.reach([manifest.digest, evicted.digest])
    assert closure.manifests == {manifest.digest, evicted.digest, *(part.digest for part in BOTH.walk())}
    blobs = {Digest.of(blob) for part in BOTH.walk() for blob in part.blobs}
    assert closure.blobs == blobs | {Digest.of(b"named"), Digest.of(b"evicted")}


def test_the_size_of_an_image_counts_what_exists(tmp_path: Path) -> None:
    tree = HostedTree.from_layout(Layout(tmp_path))
    manifest = hostile_manifest(tree, 10)
    ref = ImageRef(StoreView(HOSTED, tree.layout), REPOSITORY, "strange", None)
    rows = list(list_manifests(ref))
    contents = {content for part in (*BOTH.walk(), manifest) for content in (part.data, *part.blobs)}
    assert [row["size"] for row in rows] == [sum(map(len, contents))]


def platform_image(architecture: str) -> ManifestTree:
    return image(json.dumps({"os": "linux", "architecture": architecture}).encode(), b"layer")


def test_the_platforms_of_images(tmp_path: Path) -> None:
    tree = HostedTree.from_layout(Layout(tmp_path))
    arm, amd = platform_image("arm64"), platform_image("amd64")
    entries = [
        {**descriptor(part.media_type, part.data), "platform": {"os": "linux", "architecture": name}}
        for part, name in ((arm, "arm64"), (amd, "amd64"))
    ]
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    both = ManifestTree(OCI_INDEX, data, (), (arm, amd))
    put_image(tree, REPOSITORY, both, "v1")
    put_image(tree, REPOSITORY, image(b"no configuration"), "artifact")
    store = StoreView(HOSTED, tree.layout)
    [row] = list_repositories(store)
    assert row["platforms"] == ["linux/amd64", "linux/arm64"]
    rows = {row["tag"] or row["digest"]: row["platforms"] for row in list_manifests(ImageRef(store, REPOSITORY))}
    assert rows == {
        "artifact": [],
        "v1": ["linux/arm64", "linux/amd64"],
        str(arm.digest): ["linux/arm64"],
        str(amd.digest): ["linux/amd64"],
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["docker.io/grafana/grafana", "docker.io/library/nginx", "ghcr.io/nginx/nginx"]),
        ("nginx*", ["docker.io/library/nginx"]),
        ("*nginx", ["docker.io/library/nginx", "ghcr.io/nginx/nginx"]),
        ("grafana/*", ["docker.io/grafana/grafana"]),
        ("docker.io/library/[n]ginx", ["docker.io/library/nginx"]),
        ("NGINX", []),
    ],
)
def test_a_pattern_matches_full_and_short_names(tmp_path: Path, pattern: str | None, names: list[str]) -> None:
    tree = HostedTree.from_layout(Layout(tmp_path))
    for repository in (
        "registry-1.docker.io/library/nginx",
        "registry-1.docker.io/grafana/grafana",
        "ghcr.io/nginx/nginx",
    ):
        put_image(tree, repository, BOTH, "v1")
    rows = list_repositories(StoreView(CACHED, tree.layout), pattern)
    assert [row["name"] for row in rows] == names


def test_platforms_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content never changes. One that has no platform now may only lack its configuration, and is read again."""
    tree = HostedTree.from_layout(Layout(tmp_path))
    configuration = json.dumps({"os": "linux", "architecture": "arm64"}).encode()
    manifest = image(configuration, b"layer")
    put_image(tree, REPOSITORY, manifest, "v1")
    tree.blobs.remove(Digest.of(configuration))
    store = StoreView(HOSTED, tree.layout)
    assert [row["platforms"] for row in list_repositories(store)] == [[]]
    tree.blobs.put(configuration, Digest.of(configuration))
    assert [row["platforms"] for row in list_repositories(store)] == [["linux/arm64"]]

    def fail(*arguments: Any) -> Any:
        raise AssertionError("it is read again")

    monkeypatch.setattr("dockerproxy.store.contents.Contents.read", fail)
    assert [row["platforms"] for row in list_repositories(store)] == [["linux/arm64"]]
    tree.blobs.remove(manifest.digest)
    assert [row["platforms"] for row in list_repositories(store)] == [[]]
    monkeypatch.setattr("dockerproxy.store.platforms._MAX_KNOWN", 1)
    monkeypatch.undo()
    for number in range(3):
        assert store.platforms.read(Digest.of(b"%d" % number), lambda: None) == ()
