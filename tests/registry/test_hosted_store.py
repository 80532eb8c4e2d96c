"""The implementations of `HostedStore`."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.oci.manifests import EMPTY_INDEX, OCI_INDEX
from dockerproxy.oci.names import Digest, parse_tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.store import disk_access
from dockerproxy.store import local_hosted_store as module
from dockerproxy.store.disk_access import NETWORK_DISK_LIMITS, DiskAccess, LocalDisk, NetworkDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.thread_pool import BoundedThreadPool
from tests.registry.support.hosted_store_suite import APP, HostedStoreSuite, make_tags
from tests.registry.support.synchronous_reactor import SynchronousReactor
from tests.support.hosted import make_hosted_store

T = TypeVar("T")


class TestLocalHostedStore(HostedStoreSuite):
    """The local tree. Thread calls run synchronously, so every coroutine ends at once."""

    @pytest.fixture
    def tree(self, tmp_path: Path) -> HostedTree:
        return HostedTree.from_layout(Layout(tmp_path))

    @pytest.fixture
    def disk(self) -> DiskAccess:
        return LocalDisk(SynchronousReactor())

    @pytest.fixture
    def store(self, tree: HostedTree, disk: DiskAccess) -> HostedStore:
        return make_hosted_store(SynchronousReactor(), tree, disk)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        results: list[Any] = []
        Deferred.fromCoroutine(coroutine).addBoth(results.append)
        (result,) = results
        if isinstance(result, Failure):
            result.raiseException()
        return result  # type: ignore[no-any-return]

    def test_an_index_of_referrers_is_limited(self, store: HostedStore, monkeypatch: pytest.MonkeyPatch) -> None:
        subject = Digest.of(b"subject")
        pushed = [str(self.push_image(store, f"{number}", subject=subject)) for number in range(5)]
        monkeypatch.setattr(module, "_MAX_REFERRERS_SIZE", 400)
        listed: list[str] = []
        last = None
        while True:
            page = self.run(store.referrers(APP, subject, None, last))
            assert 1 <= len(page.descriptors) <= 2
            listed += [json.loads(descriptor)["digest"] for descriptor in page.descriptors]
            last = page.last
            if last is None:
                break
        assert sorted(listed) == sorted(pushed)

    @pytest.mark.parametrize("size", [0, 1, 300 * 1024, 5 * 1024 * 1024])
    def test_a_manifest_that_does_not_match_its_digest_is_absent(
        self, store: HostedStore, tree: HostedTree, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        messages: list[str] = []
        monkeypatch.setattr(module.log, "error", lambda form, **fields: messages.append(form.format(**fields)))
        digest = self.push_image(store, "x", "1")
        path = Path(tree.layout.blob(digest))
        path.write_bytes(b"x" * size)
        assert self.run(store.manifest(APP, digest)) is None
        assert str(digest) in messages[0] and APP in messages[0]
        self.push_image(store, "x", "1")
        assert self.run(store.manifest(APP, digest)) is not None

    @pytest.mark.parametrize("change", ["push", "removal of a tag", "removal of a manifest"])
    def test_a_change_waits_for_the_lock_of_the_repository(
        self, store: HostedStore, tree: HostedTree, change: str
    ) -> None:
        """Another process of the daemon, gc or `dockerproxy rm` has the lock of the repository."""
        digest = self.push_image(store, "x", "1")
        changes: dict[str, Coroutine[Any, Any, object]] = {
            "push": store.commit_manifest(APP, PushedManifest.parse(EMPTY_INDEX, None, OCI_INDEX), make_tags("2")),
            "removal of a tag": store.remove_tag(APP, parse_tag("1")),
            "removal of a manifest": store.remove_manifest(APP, digest),
        }
        lock = tree.locks.hold(APP)
        self.run(lock.__aenter__())
        results: list[object] = []
        Deferred.fromCoroutine(changes.pop(change)).addBoth(results.append)
        for other in changes.values():
            other.close()
        assert (results, tree.links.tags(APP)) == ([], ["1"])
        self.run(lock.__aexit__(None, None, None))
        assert len(results) == 1
        assert tree.links.tags(APP) == (["1", "2"] if change == "push" else [])

    def test_a_large_manifest_is_verified_in_a_thread(
        self, store: HostedStore, disk: DiskAccess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk_access, "_MAX_INLINE_MANIFEST", 10)
        digest = self.push_image(store, "x", "1")
        monkeypatch.setattr(type(disk), "run", None)
        with pytest.raises(TypeError):
            self.run(store.manifest(APP, digest))


class TestNetworkHostedStore(TestLocalHostedStore):
    """The tree on a file system that may hang: each access is one of its threads'."""

    @pytest.fixture
    def disk(self) -> DiskAccess:
        reactor = SynchronousReactor()
        pool = BoundedThreadPool(reactor, "accesses to REGISTRY_DIR", NETWORK_DISK_LIMITS, reactor)
        return NetworkDisk(reactor, "REGISTRY_DIR", "nfs4", pool)
