"""Tests of the listings: what they take in a repository that somebody filled to take the daemon's memory."""

from __future__ import annotations

from pathlib import Path

from dockerproxy.admin.inventory import Closure, list_manifests
from dockerproxy.admin.resolver import HOSTED, ImageRef, StoreView
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from tests.store.support.images import BOTH, ManifestTree, image, put_image

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
