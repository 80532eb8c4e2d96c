"""Explanations of images: which of their contents are here, also of images that lead to very many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin import why
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, StoreView
from dockerproxy.admin.why import Explainer
from dockerproxy.bucket import keys
from dockerproxy.cache.access import Access
from dockerproxy.errors import StoreUnavailable
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.pull_history import PullHistory
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones
from tests.bucket.support.trees import bucket_view, fail_after, make_store, upload_tree
from tests.store.support.images import ManifestTree, image, index, put_image
from tests.support.fake_store import LOCATION, refusal

NOW = 1_800_000_000.0


class Harness:
    """A hosted registry, and an explainer of its images; or of those in a bucket."""

    def __init__(self, folder: Path, hosted: StoreView | None = None) -> None:
        self.tree = HostedTree.from_layout(Layout(folder / "registry"))
        self.cache = HostedTree.from_layout(Layout(folder / "cache"))
        stores = [hosted or StoreView(HOSTED, self.tree.layout), StoreView(CACHED, self.cache.layout)]
        unused: Any = None
        history = PullHistory(str(folder / "history"), 86400.0, lambda: NOW)
        self.explainer = Explainer(
            ImageResolver(stores, frozenset({"registry.test"})), stores[1], {}, unused, unused, unused, unused,
            Tombstones(), history, lambda: NOW,
        )  # fmt: skip

    def put(self, manifest: ManifestTree) -> None:
        put_image(self.tree, "app", manifest, "1")

    def contents(self) -> list[Mapping[str, Any]]:
        contents: list[Mapping[str, Any]] = self.explainer.explain("registry.test/app:1")["contents"]
        return contents


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def test_all_that_an_image_consists_of(harness: Harness) -> None:
    shared = image(b"config", b"layer", b"layer")
    harness.put(index(shared, image(b"config 2", b"layer")))
    assert [content["kind"] for content in harness.contents()] == [
        "index", "manifest", "manifest", "config", "layer", "config",
    ]  # fmt: skip
    assert {content["sentence"] for content in harness.contents()} == {"here"}


def test_an_image_of_very_many_parts_is_read_in_part(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registry may have made it so: five hundred manifests with forty thousand layers each are gigabytes."""
    monkeypatch.setattr(why, "_MAX_CONTENTS", 12)
    manifests = [image(f"config {n}".encode(), *(f"{n} {m}".encode() for m in range(10))) for n in range(5)]
    harness.put(index(*manifests))
    read = []
    children_of = why._children

    def count(content: bytes) -> Any:
        read.append(content)
        return children_of(content)

    monkeypatch.setattr(why, "_children", count)
    contents = harness.contents()
    assert len(contents) == 13
    assert len({content["digest"] for content in contents}) == 13
    assert len(read) == 2  # the index, and the manifest that filled the list


def test_an_image_in_a_bucket_is_explained_as_one_in_a_directory(harness: Harness, tmp_path: Path) -> None:
    harness.put(index(image(b"config", b"layer"), image(b"config 2", b"layer")))
    fake = make_store()
    upload_tree(fake, tmp_path / "registry")
    in_bucket = Harness(tmp_path, bucket_view(fake))
    names = ["registry.test/app:1", "app:1", "app:2", "app", f"app@{harness.contents()[1]['digest']}"]
    for name in names:
        assert in_bucket.explainer.explain(name) == harness.explainer.explain(name)
    layer = next(content for content in harness.contents() if content["kind"] == "layer")
    del fake.objects[f"{LOCATION.prefix}{keys.blob_key(Digest.parse(layer['digest']))}"]
    states = {content["digest"]: content["state"] for content in in_bucket.contents()}
    assert states[layer["digest"]] == "absent", "the next answer looks again"


def test_what_is_cached_is_explained_while_the_bucket_does_not_answer(tmp_path: Path) -> None:
    fake = make_store()
    harness = Harness(tmp_path, bucket_view(fake))
    put_image(harness.cache, "quay.io/team/app", image(b"config", b"layer"), "1")
    upload_tree(fake, tmp_path / "registry")
    fail_after(fake, 0, lambda request: refusal(503, "SlowDown"))
    assert harness.explainer._find("quay.io/team/app", "1", None).name == "quay.io/team/app"
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        harness.explainer.explain("app:1")


def test_who_may_read_what_was_never_pulled_is_not_known(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    put_image(harness.cache, "quay.io/team/app", image(b"config", b"layer"), "1")
    explainer, quay = harness.explainer, "quay.io/team/app"
    object.__setattr__(explainer, "access", Access(Records(tmp_path / "records"), lambda: NOW))
    object.__setattr__(explainer, "records", Records(tmp_path / "records"))
    known = explainer.cache.links.manifests(quay)
    sentences = [
        explainer._explain_readers(quay, "quay.io", digest, NOW)["sentence"]
        for digest in (None, *known, Digest.of(b"unknown"))
    ]
    assert sentences == ["clients that quay.io admits: it is asked about each of them"] * 3
