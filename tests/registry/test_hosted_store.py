"""The implementations of `HostedStore`."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.oci.names import Digest
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.store import disk_access
from dockerproxy.store import local_hosted_store as module
from dockerproxy.store.disk_access import NETWORK_DISK_LIMITS, DiskAccess, LocalDisk, NetworkDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.thread_pool import BoundedThreadPool
from tests.registry.support.hosted_store_suite import APP, HostedStoreSuite
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
