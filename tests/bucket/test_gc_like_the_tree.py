"""Garbage collection in a bucket leaves the same as that of a directory with the same repositories."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from dockerproxy.bucket import keys
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, Repository, Tag, parse_repository, parse_tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.store.layout import Layout
from dockerproxy.store.sweep import sweep
from tests.bucket.support.gc_world import TIMES, World, failure_of
from tests.registry.support.hosted_store_suite import make_descriptor
from tests.support.examples import examples
from tests.support.fake_store import LOCATION

REPOSITORIES = [parse_repository(name) for name in ("a", "a/b", "a-b")]
BLOBS = [b"blob %d" % number for number in range(4)]
OLD = 1_000_000_000


@define
class Builder:
    """Repositories in the store of `world`, made of random choices."""

    draw: Any
    world: World = field(factory=World)
    manifests: dict[Repository, list[Digest]] = field(factory=dict)

    def build(self) -> None:
        for repository in REPOSITORIES:
            for blob in self.draw(st.lists(st.sampled_from(BLOBS), unique=True, max_size=3)):
                self.world.put_blob(blob, repository)
            made = self.manifests.setdefault(repository, [])
            for _ in range(self.draw(st.integers(0, 5))):
                made.append(self.add_manifest(repository, made))
            for _ in range(self.draw(st.integers(0, 3))):
                self.add_tag(repository, made)

    def add_manifest(self, repository: Repository, made: list[Digest]) -> Digest:
        kind = self.draw(st.sampled_from([OCI_MANIFEST, OCI_INDEX]))
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": kind, "annotations": {"n": str(len(made))}}
        if kind == OCI_INDEX:
            children = self.draw(st.lists(st.sampled_from(made), unique=True, max_size=3)) if made else []
            document["manifests"] = [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 1} for child in children]
        else:
            blobs = self.draw(st.lists(st.sampled_from(BLOBS), unique=True, min_size=1, max_size=3))
            for blob in blobs:
                self.world.put_blob(blob, repository)
            document["config"] = make_descriptor(blobs[0])
            document["layers"] = [make_descriptor(blob) for blob in blobs[1:]]
        if made and self.draw(st.booleans()):
            subject = self.draw(st.sampled_from(made))
            document["subject"] = {"mediaType": OCI_MANIFEST, "digest": str(subject), "size": 1}
        return self.world.put_manifest(
            PushedManifest.parse(json.dumps(document).encode(), None, kind), repository=repository
        )

    def add_tag(self, repository: Repository, made: list[Digest]) -> None:
        if not made:
            return
        of, target = self.draw(st.sampled_from([*made, Digest.of(b"never here")])), self.draw(st.sampled_from(made))
        names = ["v1", "v2", f"sha256-{of.hex}", f"sha256-{of.hex}.sig"]
        tag: Tag = parse_tag(self.draw(st.sampled_from(names)))
        self.world.put(keys.tag_index_key(repository, tag, target), str(target).encode())
        self.world.put(keys.tag_key(repository, tag), str(target).encode())


def essentials(found: list[str]) -> set[str]:
    """Return the contents, the links and the tags among keys."""
    return {key for key in found if key.endswith(("/data", "/link")) and "/index/" not in key}


@settings(max_examples=examples(60), deadline=None)
@given(st.data(), st.booleans())
def test_the_same_is_left(data: st.DataObject, untagged: bool) -> None:
    builder = Builder(data.draw)
    builder.build()
    world = builder.world
    with tempfile.TemporaryDirectory() as folder:
        for key, content in world.store.objects.items():
            path = Path(folder, key.removeprefix(LOCATION.prefix))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (OLD, OLD))
        local = sweep(Layout(Path(folder)), delete_untagged=untagged, grace=TIMES.shortest_grace)
        files = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
    collector = world.collector(delete_untagged=untagged)
    world.run(collector)
    assert failure_of(collector) is None
    (result,) = world.results
    assert essentials(world.store.keys()) == essentials(files)
    assert (result.manifests, result.blobs, result.bytes) == (local.manifests, local.blobs, local.bytes)
    assert (result.repositories, result.needed, result.problems) == (local.repositories, local.needed, ())
