"""The registry in a bucket answers as that in a directory does, after the same pushes, deletions and questions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from dockerproxy.errors import RegistryError
from dockerproxy.oci.names import Digest, Repository, parse_repository, parse_tag
from dockerproxy.oci.paging import Page
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.store.disk_access import LocalDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from tests.bucket.support.trees import run
from tests.bucket.test_bucket_hosted_store import make_node
from tests.cache.support.reactor import ManualReactor
from tests.registry.support.hosted_store_suite import make_image, read_all
from tests.registry.support.synchronous_reactor import SynchronousReactor
from tests.support.examples import examples
from tests.support.fake_store import FakeStore
from tests.support.hosted import make_hosted_store

REPOSITORIES = [parse_repository(name) for name in ("a", "a/b", "a-b", "a/b/c", "a0", "b")]
TAGS = ["1", "v1", "V1", "v1.0", "_x", "latest"]
BLOBS = [b"blob %d" % number for number in range(4)]

Question = Callable[[HostedStore], Coroutine[Any, Any, Any]]

marks = st.one_of(
    st.none(),
    st.sampled_from([*REPOSITORIES, *TAGS]),
    st.text(st.characters(codec="utf-8") | st.sampled_from("abAB01-._!/~\x00"), max_size=12),
    st.sampled_from(["a/b!", "a!b", "a/", "/", "b" * 5000, "a/b/" + "c" * 300, "zz"]),
)


@define
class Both:
    """The two stores, and the answer of each to the same question."""

    local: HostedStore
    bucket: HostedStore
    fake: FakeStore
    manifests: list[tuple[Repository, Digest]] = field(factory=list)

    def ask(self, question: Question) -> Any:
        """Return the answer of both, which must be the same. An error is its class."""
        answers = [self._run(question(store)) for store in (self.local, self.bucket)]
        assert answers[0] == answers[1]
        return answers[0]

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return run(self.fake, coroutine)
        except RegistryError as error:
            return type(error)


async def push_blob(store: HostedStore, repository: Repository, content: bytes) -> None:
    upload = await store.uploads.start(repository, "sha256", "someone")
    await upload.append(content)
    await upload.commit(Digest.of(content))


async def read_blob(store: HostedStore, repository: Repository, digest: Digest) -> bytes | None:
    content = await store.open_blob(repository, digest)
    return None if content is None else await read_all(content)


async def list_referrers(store: HostedStore, repository: Repository, subject: Digest, kind: str | None) -> Any:
    page = await store.referrers(repository, subject, kind, None)
    return sorted(page.descriptors), page.last


class Actions:
    """Random actions and questions. Each does the same with both stores."""

    def __init__(self, draw: Callable[[Any], Any], both: Both) -> None:
        self.draw, self.both = draw, both

    def one_of(self, values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def digest(self) -> Digest:
        known = [digest for _, digest in self.both.manifests]
        return self.one_of([*map(Digest.of, BLOBS), *known, Digest.of(b"never here")])  # type: ignore[no-any-return]

    def push(self) -> None:
        repository = self.one_of(REPOSITORIES)
        blobs = self.draw(st.lists(st.sampled_from(BLOBS), min_size=1, max_size=3, unique=True))
        for blob in blobs[: self.draw(st.integers(len(blobs) - 1, len(blobs)))]:
            self.both.ask(lambda store: push_blob(store, repository, blob))  # noqa: B023
        subject = self.digest() if self.draw(st.booleans()) else None
        manifest = make_image(*blobs, subject=subject, kind=self.one_of(["", "application/sig"]))
        tags = [parse_tag(tag) for tag in self.draw(st.lists(st.sampled_from(TAGS), max_size=3, unique=True))]
        if self.both.ask(lambda store: store.commit_manifest(repository, manifest, tags)) is None:
            self.both.manifests.append((repository, manifest.digest))

    def remove(self) -> None:
        repository, digest, tag = self.one_of(REPOSITORIES), self.digest(), parse_tag(self.one_of(TAGS))
        source = self.one_of(REPOSITORIES)
        removals: list[Question] = [
            lambda store: store.remove_tag(repository, tag),
            lambda store: store.remove_manifest(repository, digest),
            lambda store: store.remove_images(repository, digest),
            lambda store: store.remove_images(repository),
            lambda store: store.unlink_blob(repository, digest),
            lambda store: store.mount_blob(repository, digest, source),
        ]
        self.both.ask(self.one_of(removals))

    def page(self) -> None:
        page, repository = Page(self.draw(st.integers(0, 4)), self.draw(marks)), self.one_of(REPOSITORIES)
        self.both.ask(lambda store: store.repositories(page))
        self.both.ask(lambda store: store.tags(repository, page))

    def compare(self) -> None:
        """Compare all that can be asked."""
        self.both.ask(lambda store: store.repositories(Page(100, None)))
        digests = {*map(Digest.of, BLOBS), *(digest for _, digest in self.both.manifests)}
        for repository in REPOSITORIES:
            self.both.ask(lambda store: store.has_repository(repository))  # noqa: B023
            self.both.ask(lambda store: store.tags(repository, Page(100, None)))  # noqa: B023
            for question in self._questions(repository, digests):
                self.both.ask(question)

    def _questions(self, repository: Repository, digests: set[Digest]) -> Iterator[Question]:
        for tag in map(parse_tag, TAGS):
            yield lambda store: store.manifest(repository, tag)  # noqa: B023
        for digest in digests:
            yield lambda store: store.manifest(repository, digest)  # noqa: B023
            yield lambda store: store.blob_size(repository, digest)  # noqa: B023
            yield lambda store: read_blob(store, repository, digest)  # noqa: B023
            for kind in (None, "application/sig"):
                yield lambda store: list_referrers(store, repository, digest, kind)  # noqa: B023


@settings(max_examples=examples(25), deadline=None)
@given(st.data())
def test_the_same_answers(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reactor = ManualReactor()
        fake = FakeStore(reactor, lists_at_once=data.draw(st.sampled_from([1, 3, 1000])))
        synchronous = SynchronousReactor()
        root = Path(folder, "tree")
        root.mkdir()
        tree = HostedTree.from_layout(Layout(root))
        local = make_hosted_store(synchronous, tree, LocalDisk(synchronous))
        actions = Actions(data.draw, Both(local, make_node(Path(folder, "node"), fake).store, fake))
        for _ in range(data.draw(st.integers(1, 12))):
            data.draw(st.sampled_from([actions.push, actions.push, actions.remove, actions.page]))()
            reactor.advance(61)  # a bucket knows for a minute that a repository was there
        actions.compare()
