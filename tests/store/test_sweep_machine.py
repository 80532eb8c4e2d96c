"""State machine test: pushes, deletions and garbage collection, interleaved at random and compared with a model.

The reactor is a clock with a thread pool that queues each call until the test runs it. A collection is one of these
jobs after each of its steps, so it can pause between any two while clients continue, and vice versa. Its thread never
runs at the same time as the test's. The test simulates the passing of time by making files older.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import Deferred

from dockerproxy.errors import RegistryError
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import RequestHead
from dockerproxy.http.request import Request
from dockerproxy.http.stream import ByteStream
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import route
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.hosted import HostedRegistry
from dockerproxy.registry.principal import Principal
from dockerproxy.store import progress as progress_module
from dockerproxy.store import sweep as sweep_module
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, RepositoryLock, Stopped
from dockerproxy.store.sweep import RemovedItem, SweepResult, sweep
from tests.store.support.images import ManifestTree, age_blobs, image, index
from tests.store.support.reactor import SteppedReactor
from tests.store.support.stepped_operation import SteppedOperation
from tests.support.examples import examples
from tests.support.hosted import make_hosted_registry

pytestmark = pytest.mark.slow  # a state machine on a real tree


def make_manifests() -> list[ManifestTree]:
    """Return images that share layers, an index, a nested index, signatures and a signature of a signature."""
    images = [image(b"config%d" % number, b"base", b"layer%d" % number) for number in range(3)]
    one, two, three = images
    both = index(one, two)
    signatures = [image(b"sig", b"signature", subject=both), image(b"sig", b"base", subject=three)]
    return [*images, both, index(both, three), *signatures, image(b"sig", b"again", subject=signatures[0])]


MANIFESTS = make_manifests()
BY_DIGEST = {content.digest: content for content in MANIFESTS}
REPOSITORIES, TAGS = ("one", "two/three"), ("v1", "v2")


class MemoryChannel:
    """A `RequestChannel` that keeps the bytes sent."""

    client, secure, port, can_sendfile = "test", False, 0, False

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None: ...

    def abort(self) -> None: ...

    def on_response_started(self) -> None:
        pass

    def exceeds_discard_limit(self) -> bool:
        return False

    def on_response_finished(self) -> None: ...

    def detach(self) -> Any: ...


@define
class InMemoryRegistry:
    """The HTTP API of a hosted registry, without a socket."""

    reactor: SteppedReactor
    store: HostedTree
    hosted: HostedRegistry = field(init=False)

    @hosted.default
    def _make_hosted(self) -> HostedRegistry:
        return make_hosted_registry(self.reactor, self.store)

    async def request(self, method: str, target: str, body: bytes = b"", media_type: str = "") -> int:
        """Send a request and return the status of the response."""
        headers = Headers([("host", "test"), ("content-length", str(len(body))), ("content-type", media_type)])
        stream = ByteStream()
        stream.feed(body)
        stream.finish()
        request = Request(MemoryChannel(), RequestHead(method, target, (1, 1), headers), stream if body else None)
        try:
            principal = Principal.of(request, None)
            await RegistryAPI(self.reactor).handle(request, route(request.path), self.hosted, principal)
        except RegistryError as error:
            return error.status
        return request.status

    async def push(self, repository: str, content: ManifestTree, tag: str | None) -> int:
        """Push like docker: check each blob and child, push the missing ones, and then the manifest."""
        for blob in content.blobs:
            digest = Digest.of(blob)
            if await self.request("HEAD", f"/v2/{repository}/blobs/{digest}") != 200:
                status = await self.request("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", blob)
                assert status == 201, status
        for child in content.children:
            if await self.request("HEAD", f"/v2/{repository}/manifests/{child.digest}") != 200:
                status = await self.push(repository, child, None)
                assert status == 201, status
        path = f"/v2/{repository}/manifests/{tag or content.digest}"
        return await self.request("PUT", path, content.data, content.media_type)


class SweepMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # In memory if possible, because every link is synced to disk.
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.reactor = SteppedReactor()
        self.layout = Layout(Path(self.directory.name))
        self.store = HostedTree.from_layout(self.layout)
        self.registry = InMemoryRegistry(self.reactor, self.store)
        self.sweep: SteppedOperation[SweepResult] | None = None
        self.pending_tags: set[tuple[str, str | None]] = set()
        self.tags: dict[tuple[str, str], ManifestTree] = {}
        self.failures: list[Any] = []

    def teardown(self) -> None:
        try:
            self.settle()
            self.check_final_collection()
        finally:
            self.directory.cleanup()

    # Clients

    @rule(
        repository=st.sampled_from(REPOSITORIES),
        content=st.sampled_from(MANIFESTS),
        tag=st.sampled_from((*TAGS, *TAGS, None)),
    )
    def push(self, repository: str, content: ManifestTree, tag: str | None) -> None:
        if tag is not None and (repository, tag) in self.pending_tags:
            return
        self.pending_tags.add((repository, tag))
        if tag is not None:
            self.tags.pop((repository, tag), None)

        async def run() -> None:
            status = await self.registry.push(repository, content, tag)
            assert status == 201, f"the push of {content.media_type} failed with status {status}"
            if tag is not None:
                self.tags[repository, tag] = content
            self.pending_tags.discard((repository, tag))

        Deferred.fromCoroutine(run()).addErrback(self.failures.append)

    @rule(repository=st.sampled_from(REPOSITORIES), tag=st.sampled_from(TAGS))
    def delete_tag(self, repository: str, tag: str) -> None:
        if (repository, tag) in self.pending_tags or (repository, tag) not in self.tags:
            return
        self.pending_tags.add((repository, tag))
        del self.tags[repository, tag]

        async def run() -> None:
            assert await self.registry.request("DELETE", f"/v2/{repository}/manifests/{tag}") == 202
            self.pending_tags.discard((repository, tag))

        Deferred.fromCoroutine(run()).addErrback(self.failures.append)

    # Garbage collection

    @precondition(lambda self: self.sweep is None)
    @rule(delete_untagged=st.booleans(), dry_run=st.sampled_from((False, False, False, True)))
    def collect(self, delete_untagged: bool, dry_run: bool) -> None:
        self.start_sweep(delete_untagged, dry_run)

    @precondition(lambda self: self.sweep is not None)
    @rule()
    def stop(self) -> None:
        assert self.sweep is not None
        self.sweep.stop()

    # Time

    @precondition(lambda self: self.reactor.busy)
    @rule(order=st.lists(st.integers(0, 3), min_size=1, max_size=25))
    def run_jobs(self, order: list[int]) -> None:
        for number in order:
            self.reactor.run_one(number)

    @precondition(lambda self: self.sweep is None and not self.pending_tags)
    @rule()
    def age(self) -> None:
        age_blobs(self.store)

    @rule()
    def settle(self) -> None:
        for _ in range(100_000):
            if not self.reactor.busy:
                break
            self.reactor.run_one(0)
        assert self.sweep is None
        self.check()
        assert not self.pending_tags

    # Invariants

    @invariant()
    def check(self) -> None:
        assert not self.failures, self.failures[0].getTraceback()
        for (repository, tag), content in self.tags.items():
            assert self.store.links.tag(repository, tag) == content.digest
            assert self.store.links.has_manifest(repository, content.digest), (
                f"the manifest of {repository}:{tag} was deleted"
            )
        for repository in REPOSITORIES:
            for digest in self.store.links.manifests(repository):
                if self.store.links.has_manifest(repository, digest):
                    self.check_complete(repository, BY_DIGEST[digest])

    def check_complete(self, repository: str, content: ManifestTree) -> None:
        assert self.store.blobs.exists(content.digest), f"the blob of {content} was deleted"
        for blob in content.blobs:
            assert self.store.links.has_layer(repository, Digest.of(blob)), f"{repository} has no link to {blob!r}"
            assert self.store.blobs.exists(Digest.of(blob)), f"{blob!r} was deleted"
        for child in content.children:
            assert self.store.links.has_manifest(repository, child.digest), (
                f"{repository} has no link to {child.digest}"
            )

    def check_final_collection(self) -> None:
        """A collection without concurrent clients leaves exactly the objects that tags reach."""
        self.age()
        self.start_sweep(True, False)
        self.settle()
        assert set(self.store.links.repositories()) == {repository for repository, _ in self.tags}
        all_reachable: set[Digest] = set()
        for repository in REPOSITORIES:
            manifests, blobs = self.reachable(repository)
            assert set(self.store.links.manifests(repository)) == manifests
            assert set(self.store.links.layers(repository)) == blobs
            all_reachable |= manifests | blobs
        assert {entry.key for entry in self.store.blobs.walk()} == all_reachable
        assert not os.path.exists(self.layout.staging) or os.listdir(self.layout.staging) == []

    def reachable(self, repository: str) -> tuple[set[Digest], set[Digest]]:
        links_before = self.manifests_before
        visited: set[Digest] = set()
        stack = [content for (name, _), content in self.tags.items() if name == repository]
        while stack:
            content = stack.pop()
            if content.digest in visited:
                continue
            visited.add(content.digest)
            stack.extend(content.children)
            manifests = [BY_DIGEST[digest] for digest in links_before[repository]]
            stack.extend(other for other in manifests if other.subject == content.digest)
            stack.extend(other for other in manifests if other.digest == content.subject)
        return visited, {Digest.of(blob) for digest in visited for blob in BY_DIGEST[digest].blobs}

    def start_sweep(self, delete_untagged: bool, dry_run: bool) -> None:
        self.manifests_before = {name: set(self.store.links.manifests(name)) for name in REPOSITORIES}

        def operation(progress: Progress[RemovedItem], lock: RepositoryLock) -> SweepResult:
            return sweep(self.layout, delete_untagged=delete_untagged, dry_run=dry_run, progress=progress, lock=lock)

        self.sweep = SteppedOperation(self.reactor, operation, self.store.locks)

        def on_finished(result: Any) -> None:
            self.sweep = None
            if isinstance(result, SweepResult):
                assert not result.problems
            else:
                result.trap(Stopped)

        self.sweep.ended.addBoth(on_finished)
        self.sweep.ended.addErrback(self.failures.append)


@pytest.fixture(autouse=True, scope="module")
def short_steps() -> Iterator[None]:
    """Delete one link or blob per step, and hold a lock for one step at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "_BATCH", 1)
        patch.setattr(progress_module, "_MAX_LOCK_HOLD", 0)
        yield


TestSweep = SweepMachine.TestCase
TestSweep.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
