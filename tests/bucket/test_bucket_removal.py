"""Removal of images in a bucket by the command and on the page: what both say, and what they record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin.deletion import Deleter, DeletionResult
from dockerproxy.admin.image_actions import ImageActions
from dockerproxy.admin.resolver import ImageResolver
from dockerproxy.bucket import keys
from dockerproxy.errors import Denied, StoreUnavailable
from dockerproxy.oci.manifests import fallback_tag
from dockerproxy.oci.names import Digest
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.principal import Principal
from dockerproxy.store.disk_access import LocalDisk
from tests.bucket.support.trees import bucket_view, fail_after, run
from tests.bucket.test_bucket_hosted_store import make_node
from tests.bucket.test_bucket_tree import twins
from tests.store.support.images import BOTH, ONE, TWO, image
from tests.support.fake_store import FakeStore, refusal

APP = "team/app"
SIGNATURE = image(b"sig", b"signature", subject=BOTH)
ALICE = Principal("alice", "192.0.2.1", None)


class World:
    """A bucket, a node, and its page."""

    def __init__(self, folder: Path, fake: FakeStore) -> None:
        unused: Any = None
        self.fake = fake
        self.recorded: list[Mapping[str, Any]] = []
        store = make_node(folder, fake).store
        disk = LocalDisk(fake.clock)
        audit = AuditLog(self.recorded.append)
        self.deleter = Deleter(fake.clock, disk, store, unused, unused, audit, lambda key, name: False)
        self.resolver = ImageResolver([bucket_view(fake)], frozenset())
        self.actions = ImageActions(fake.clock, self.resolver, self.deleter, unused, disk, "s3://images", unused)

    def act(self, name: str) -> str:
        return run(self.fake, self.actions.act(ALICE, "remove", name, "hosted"))

    def remove(self, name: str) -> DeletionResult:
        return run(self.fake, self.deleter.delete(ALICE, self.resolver.snapshot().resolve(name)))

    def reason_to_keep(self, name: str) -> str | None:
        return run(self.fake, self.deleter.reason_to_keep(self.resolver.snapshot().resolve(name)))

    def keys(self, part: str = "") -> list[str]:
        return [key for key in self.fake.keys() if key.startswith(f"{keys.REPOSITORIES}{APP}/_manifests/{part}")]


@pytest.fixture
def world(tmp_path: Path) -> World:
    with twins([(APP, BOTH, ["both"]), (APP, ONE, ["v1"]), (APP, SIGNATURE, [f"{fallback_tag(BOTH.digest)}.sig"])]) as (
        _,
        fake,
    ):
        return World(tmp_path, fake)


def test_the_page_removes_an_image_once(world: World) -> None:
    assert world.act(f"{APP}:v1") == "removed"
    assert world.keys("tags/v1/") == []
    assert world.act(f"{APP}:v1") == "gone"
    [entry] = world.recorded
    assert (entry["action"], entry["target"], entry["user"]) == ("remove", f"{APP}:v1 (hosted)", "alice")


def test_what_an_index_needs_stays_without_force(world: World) -> None:
    before = dict(world.fake.objects)
    with pytest.raises(Denied, match=f"{APP}:both needs {ONE.digest}; remove that tag first. Nothing was removed."):
        world.act(f"{APP}@{ONE.digest}")
    assert world.fake.objects == before
    assert world.reason_to_keep(f"{APP}@{ONE.digest}") == f"{APP}:both needs {ONE.digest}; remove that tag first"
    assert world.reason_to_keep(f"{APP}@{BOTH.digest}") is None
    assert world.remove(f"{APP}@{ONE.digest}") == DeletionResult(tags=1, manifests=1)
    assert world.keys(f"revisions/sha256/{ONE.digest.hex}/") == []


def test_the_tags_go_first_and_the_link_last(world: World) -> None:
    world.fake.requests.clear()
    world.remove(f"{APP}@{BOTH.digest}")
    changes = [request for request in world.fake.requests if request.method in ("DELETE", "PUT", "POST")]
    texts = [request.key or request.body.decode() for request in changes if "dockerproxy/" not in request.key]
    positions = [
        next(number for number, text in enumerate(texts) if part in text)
        for part in (
            "tags/both/current/link",
            "tags/both/index/",
            f"revisions/sha256/{BOTH.digest.hex}/link",
            "subject",
        )
    ]
    assert positions == sorted(positions)
    # gc deletes the signature, because its subject is gone.
    assert f"site/{keys.orphaned_key(APP, f'{fallback_tag(BOTH.digest)}.sig')}" in world.fake.objects


def test_a_whole_repository(world: World) -> None:
    assert world.remove(APP) == DeletionResult(tags=3, manifests=4)
    assert world.keys() == []
    assert f"site/{keys.catalog_key(APP)}" not in world.fake.objects
    assert f"site/{keys.blob_key(Digest.of(b'base'))}" in world.fake.objects, "gc deletes it"
    assert world.recorded[-1]["target"] == f"{APP} (hosted)"


def test_a_store_that_fails_in_the_middle_leaves_no_tag_without_its_manifest(tmp_path: Path) -> None:
    for first in range(0, 60, 2):
        with twins([(APP, BOTH, ["both", "again"]), (APP, TWO, ["v2"])]) as (_, fake):
            world = World(tmp_path / str(first), fake)
            ref = world.resolver.snapshot().resolve(f"{APP}@{BOTH.digest}")
            fail_after(fake, first, lambda request: refusal(503, "SlowDown"))
            try:
                run(fake, world.deleter.delete(ALICE, ref))
                assert first > 5
                return
            except StoreUnavailable:
                pass
            fake.faults.clear()
            assert world.recorded[-1]["result"].startswith("failed: the bucket images at http://store.test:9000")
            tags = [part for part in ("both", "again") if f"site/{keys.tag_key(APP, part)}" in fake.objects]
            has_manifest = f"site/{keys.manifest_key(APP, BOTH.digest)}" in fake.objects
            assert has_manifest or not tags
            if has_manifest:
                assert world.remove(f"{APP}@{BOTH.digest}").manifests == 1
    raise AssertionError("it never ends")


def test_an_image_is_not_said_to_be_gone_while_the_store_is_down(world: World) -> None:
    world.fake.fail(refusal(503, "SlowDown"), times=1000)
    with pytest.raises(StoreUnavailable):
        world.act(f"{APP}:v1")
