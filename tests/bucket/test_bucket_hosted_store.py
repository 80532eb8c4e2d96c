"""The storage in a bucket, over a store in memory: the tests of every `HostedStore`, and those of an outage."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.bucket import keys
from dockerproxy.bucket.bucket_hosted_store import BucketHostedStore
from dockerproxy.bucket.bucket_reads import BucketClient, BucketReads
from dockerproxy.bucket.kept_answers import KeptAnswers
from dockerproxy.bucket.takeover import take_over
from dockerproxy.cache.downloads import DownloadLimits, Downloads
from dockerproxy.errors import ManifestNeeded, StoreUnavailable
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, parse_tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.store.disk_access import LocalDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.local_hosted_store import LocalHostedStore
from tests.cache.support.harness import CacheHarness
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import ScriptedResponse, ScriptedUpstream
from tests.registry.support.hosted_store_suite import ALL, APP, OTHER, HostedStoreSuite, make_image, make_tags, read_all
from tests.support.fake_store import FakeStore, refusal
from tests.support.parsers import make_parser

T = TypeVar("T")


@frozen
class Node:
    """A daemon's part of the hosted registry: its disk, and the store of all nodes."""

    cache: CacheHarness
    store: BucketHostedStore


def make_node(folder: Path, fake: FakeStore) -> Node:
    """Return a node with an empty disk in `folder`, which uses the clock of the store."""
    reactor = fake.clock
    cache = CacheHarness(folder / "cache", upstream=ScriptedUpstream(reactor))
    (folder / "registry").mkdir(parents=True)
    bucket = fake.bucket()
    downloads = Downloads(
        reactor,
        BucketClient(bucket),
        cache.space,
        cache.ingests,
        cache.open_readers,
        DownloadLimits(),
        cache.board.for_process(0),
    )
    reads = BucketReads(reactor, bucket, cache.blobs, downloads, cache.space, cache.open_readers)
    tree = HostedTree.from_layout(Layout(folder / "registry"))
    parser = make_parser(reactor)
    local = LocalHostedStore.from_tree(reactor, LocalDisk(reactor), tree, parser, b"secret", time.time)
    kept = KeptAnswers(reactor, cache.records)
    store = BucketHostedStore.from_parts(reactor, bucket, reads, kept, parser, local.uploads, reactor.seconds)
    return Node(cache, store)


class TestBucketHostedStore(HostedStoreSuite):
    """One node, unless a test makes another."""

    @pytest.fixture
    def fake(self) -> FakeStore:
        self.fake = FakeStore(ManualReactor())
        return self.fake

    @pytest.fixture
    def store(self, tmp_path: Path, fake: FakeStore) -> HostedStore:
        return make_node(tmp_path / "first", fake).store

    @pytest.fixture
    def other(self, tmp_path: Path, fake: FakeStore) -> HostedStore:
        return make_node(tmp_path / "other", fake).store

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        results: list[Any] = []
        Deferred.fromCoroutine(coroutine).addBoth(results.append)
        for _ in range(10_000):
            if results:
                break
            self.fake.clock.run_due_calls()
            if not results:
                self.fake.clock.advance(0.01)
        (result,) = results
        if isinstance(result, Failure):
            result.raiseException()
        return result  # type: ignore[no-any-return]

    def break_down(self) -> None:
        self.fake.fail(refusal(503, "SlowDown"), times=10_000)

    def come_back(self) -> None:
        self.fake.faults.clear()

    def test_mount_without_a_source(self, store: HostedStore) -> None:
        """It would cost a request for each repository, so the client uploads the blob."""
        digest = self.push_blob(store, b"shared", OTHER)
        assert not self.run(store.mount_blob(APP, digest, None))
        assert self.run(store.blob_size(APP, digest)) is None

    # several nodes

    def test_another_node_has_all_that_was_pushed(self, store: HostedStore, other: HostedStore) -> None:
        digest = self.push_image(store, "seed", "v1")
        manifest = self.run(other.manifest(APP, parse_tag("v1")))
        assert manifest is not None and manifest.digest == digest
        content = self.run(other.open_blob(APP, Digest.of(b"seed")))
        assert content is not None and self.run(read_all(content)) == b"seed"
        assert self.tags(other) == ["v1"]
        assert self.run(other.repositories(ALL)).names == [APP]

    def test_what_one_node_deletes_is_gone_everywhere(self, store: HostedStore, other: HostedStore) -> None:
        digest = self.push_image(store, "seed", "v1")
        assert self.run(other.manifest(APP, digest)) is not None
        assert self.run(store.remove_manifest(APP, digest))
        assert self.run(other.manifest(APP, digest)) is None
        assert self.run(other.manifest(APP, parse_tag("v1"))) is None
        assert self.run(other.repositories(ALL)).names == []
        assert self.run(store.unlink_blob(APP, Digest.of(b"seed")))
        assert self.run(other.open_blob(APP, Digest.of(b"seed"))) is None

    def test_the_keys_are_those_of_the_other_registry(self, store: HostedStore, fake: FakeStore) -> None:
        digest = self.push_image(store, "seed", "v1")
        blob = Digest.of(b"seed")
        theirs = {
            key for key in fake.keys() if key.startswith("docker/") and not key.endswith(("media-type", "subject"))
        }
        repository = f"docker/registry/v2/repositories/{APP}"
        assert theirs == {
            f"docker/registry/v2/blobs/sha256/{blob.hex[:2]}/{blob.hex}/data",
            f"docker/registry/v2/blobs/sha256/{digest.hex[:2]}/{digest.hex}/data",
            f"{repository}/_layers/sha256/{blob.hex}/link",
            f"{repository}/_manifests/revisions/sha256/{digest.hex}/link",
            f"{repository}/_manifests/tags/v1/current/link",
            f"{repository}/_manifests/tags/v1/index/sha256/{digest.hex}/link",
        }
        assert fake.objects[f"site/{repository}/_manifests/tags/v1/current/link"] == str(digest).encode()

    def test_a_manifest_that_an_index_needs_stays(self, store: HostedStore) -> None:
        digest = self.push_image(store, "seed")
        index = PushedManifest.parse(
            b'{"schemaVersion":2,"mediaType":"%b","manifests":[{"mediaType":"%b","digest":"%b","size":1}]}'
            % (OCI_INDEX.encode(), OCI_MANIFEST.encode(), str(digest).encode()),
            None,
            OCI_INDEX,
        )
        self.run(store.commit_manifest(APP, index, make_tags("both")))
        with pytest.raises(ManifestNeeded, match="team/app:both needs"):
            self.run(store.remove_manifest(APP, digest))

    # a bucket of another registry

    def test_a_bucket_without_our_keys(self, store: HostedStore, other: HostedStore, fake: FakeStore) -> None:
        subject = self.push_image(store, "subject", "v1")
        signature = self.push_image(store, "signature", subject=subject)
        for key in list(fake.objects):
            if "dockerproxy/" in key or "_referrers" in key or key.endswith(("media-type", "subject")):
                fake._delete(key)
        self.run(take_over(fake.clock, fake.bucket()))
        assert self.run(other.repositories(ALL)).names == [APP]
        manifest = self.run(other.manifest(APP, parse_tag("v1")))
        assert manifest is not None and manifest.media_type == OCI_MANIFEST
        assert self.referrers(other, subject) == [str(signature)]
        requests = len(fake.requests)
        self.run(take_over(fake.clock, fake.bucket()))
        assert len(fake.requests) == requests + 1, "it is done once"

    # bad days

    def test_pulls_go_on_while_the_store_is_down(self, store: HostedStore) -> None:
        digest, blob = self.push_image(store, "seed", "v1"), Digest.of(b"seed")
        for reference in (parse_tag("v1"), digest):
            assert self.run(store.manifest(APP, reference)) is not None
        content = self.run(store.open_blob(APP, blob))
        assert content is not None and self.run(read_all(content)) == b"seed"
        unread = self.push_image(store, "unread", "v2")
        self.break_down()
        for reference in (parse_tag("v1"), digest):
            manifest = self.run(store.manifest(APP, reference))
            assert manifest is not None and manifest.digest == digest
        assert self.run(store.blob_size(APP, blob)) == 4
        content = self.run(store.open_blob(APP, blob))
        assert content is not None and self.run(read_all(content)) == b"seed"
        for asked in (
            store.manifest(APP, parse_tag("v2")),
            store.manifest(APP, unread),
            store.open_blob(APP, Digest.of(b"unread")),
            store.open_blob(APP, Digest.of(b"unknown")),
            store.tags(APP, ALL),
        ):
            with pytest.raises(StoreUnavailable):
                self.run(asked)
        self.come_back()
        assert self.run(store.manifest(APP, parse_tag("v2"))) is not None

    def test_nothing_that_was_deleted_comes_back_in_an_outage(self, store: HostedStore, other: HostedStore) -> None:
        digest, blob = self.push_image(store, "seed", "v1"), Digest.of(b"seed")
        for node in (store, other):
            self.run(node.manifest(APP, parse_tag("v1")))
            content = self.run(node.open_blob(APP, blob))
            assert content is not None
            self.run(read_all(content))
        self.run(other.remove_manifest(APP, digest))
        self.run(other.unlink_blob(APP, blob))
        assert self.run(store.manifest(APP, parse_tag("v1"))) is None
        assert self.run(store.manifest(APP, digest)) is None
        assert self.run(store.open_blob(APP, blob)) is None
        self.break_down()
        for node in (store, other):
            for asked in (node.manifest(APP, parse_tag("v1")), node.manifest(APP, digest), node.open_blob(APP, blob)):
                with pytest.raises(StoreUnavailable):
                    self.run(asked)  # type: ignore[arg-type]

    def test_a_push_that_the_store_refuses_can_be_finished_later(self, store: HostedStore) -> None:
        digest = Digest.of(b"data")
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        self.run(upload.append(b"data"))
        self.break_down()
        with pytest.raises(StoreUnavailable):
            self.run(upload.commit(digest))
        self.run(upload.suspend())
        self.come_back()
        resumed = self.run(store.uploads.resume(APP, upload.status.session))
        self.run(resumed.commit(digest))
        assert self.run(store.blob_size(APP, digest)) == 4

    def test_a_tag_never_leads_to_what_was_not_stored(self, store: HostedStore, fake: FakeStore) -> None:
        """Each request of a push fails once. A tag that has been written then leads to a whole image."""
        self.push_blob(store, b"config")
        manifest = make_image(b"config")
        before = dict(fake.objects)
        fake.requests.clear()
        self.run(store.commit_manifest(APP, manifest, make_tags("v1")))
        count = len(fake.requests)
        assert count > 8
        for number in range(count):
            fake.objects = dict(before)
            fake.requests.clear()
            fake.faults = [lambda request: refusal(403, "AccessDenied") if len(fake.requests) == number + 1 else None]  # noqa: B023
            try:
                self.run(store.commit_manifest(APP, manifest, make_tags("v1")))
            except StoreUnavailable:
                pass
            fake.faults = []
            if f"site/{keys.tag_key(APP, 'v1')}" in fake.objects:
                assert self.run(store.manifest(APP, parse_tag("v1"))) is not None

    def test_damaged_content_is_not_served(self, store: HostedStore, other: HostedStore, fake: FakeStore) -> None:
        digest, blob = self.push_image(store, "seed", "v1"), Digest.of(b"seed")
        fake.objects[f"site/{keys.blob_key(digest)}"] = b"{}"
        fake.objects[f"site/{keys.blob_key(blob)}"] = b"evil"
        assert self.run(other.manifest(APP, digest)) is None

        async def read() -> bytes:
            content = await other.open_blob(APP, blob)
            assert content is not None
            return await read_all(content)

        with pytest.raises(Exception, match="does not match"):
            self.run(read())

    @pytest.mark.parametrize("content", [b"", b"torn", b"x" * (5 << 20)], ids=["empty", "torn", "long"])
    def test_what_others_have_written_spoils_nothing_else(
        self, store: HostedStore, other: HostedStore, fake: FakeStore, content: bytes
    ) -> None:
        digest, torn = self.push_image(store, "seed", "v1", "v2"), self.push_image(store, "other", "v3")
        subject = Digest.of(b"a subject")
        referrer = self.push_image(store, "referrer", subject=subject)
        fake.store(f"site/{keys.tag_key(APP, 'v2')}", content)
        fake.store(f"site/{keys.blob_key(torn)}", content)
        for key in (keys.media_type_key(APP, digest), keys.subject_key(APP, digest), keys.manifest_key(APP, digest)):
            fake.store(f"site/{key}", content)
        for node in (store, other):
            assert self.tags(node) == ["v1", "v2", "v3"]
            assert self.run(node.manifest(APP, parse_tag("v2"))) is None
            found = self.run(node.manifest(APP, parse_tag("v1")))
            assert found is not None and found.digest == digest
            assert self.referrers(node, subject) == [str(referrer)]
        assert self.run(other.manifest(APP, parse_tag("v3"))) is None
        assert self.run(other.remove_tag(APP, parse_tag("v2")))
        assert self.run(other.remove_manifest(APP, digest))
        assert self.tags(other) == ["v3"]

    def test_a_push_replaces_damaged_content(self, store: HostedStore, other: HostedStore, fake: FakeStore) -> None:
        """Also if it has the right size, of which the store can tell us nothing."""
        blob = self.push_blob(store, b"seed")
        for damaged in (b"evil", b"", b"longer than it was"):
            fake.objects[f"site/{keys.blob_key(blob)}"] = damaged
            assert self.push_blob(other, b"seed") == blob
            assert fake.objects[f"site/{keys.blob_key(blob)}"] == b"seed"

    def test_a_download_is_resumed(self, store: HostedStore, fake: FakeStore) -> None:
        data = bytes(range(256)) * 1000
        digest = self.push_blob(store, data)
        cut = ScriptedResponse(200, data, sent=100_000)
        fake.fail(cut, only=f"GET {keys.blob_key(digest)}")

        async def read() -> bytes:
            content = await store.open_blob(APP, digest)
            assert content is not None
            first = bytes(await content.read(0, 1000))
            cut.disconnect()
            rest = b""
            while chunk := await content.read(1000 + len(rest), 100_000):
                rest += chunk
            content.close()
            return first + rest

        assert self.run(read()) == data
        ranges = [request.headers.get("range") for request in fake.requests if request.method == "GET"]
        assert "bytes=99999-" in ranges
