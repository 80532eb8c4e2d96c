from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.oci.paging import NamePage, sort_key, take_page
from dockerproxy.store import links as module
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links, Visibility
from dockerproxy.store.tree_reader import TreeReader
from tests.support.examples import examples

INDEX = "application/vnd.oci.image.index.v1+json"
REPOSITORIES = st.sampled_from(["a", "a/b", "a/b/c", "a-b", "registry-1.docker.io/library/ubuntu", "host:5000/a"])
POSITIONS = REPOSITORIES | st.sampled_from(["", "a/", "a/b/", "a/b/c/d", "a/a", "0", "h", "z", "../x", "a//b"])
TAGS = st.sampled_from(["latest", "v1", "V1", "_x", "link", "current"])
DIGESTS = st.sampled_from([Digest.of(b"1"), Digest.of(b"2"), Digest.of(b"1", "sha512")])
VISIBILITIES = st.sampled_from(Visibility)
TYPES = st.sampled_from([INDEX, "application/vnd.docker.distribution.manifest.v2+json"])


def components(repository: str) -> list[str]:
    return repository.split("/")


class LinksMachine(RuleBasedStateMachine):
    """Compare `Links` with dicts. Queries use a second `Links` on the same tree, as another process would."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.layout = Layout(Path(self.directory.name))
        self.links = Links(self.layout, False)
        self.other = Links(self.layout, True)
        self.layers: dict[tuple[str, Digest], Visibility] = {}
        self.manifests: dict[tuple[str, Digest], tuple[str, Visibility]] = {}
        self.tags: dict[str, dict[str, Digest]] = {}
        self.repositories: set[str] = set()

    def teardown(self) -> None:
        assert not os.path.exists(self.layout.staging) or os.listdir(self.layout.staging) == []
        self.directory.cleanup()

    @rule(repository=REPOSITORIES, digest=DIGESTS, visibility=VISIBILITIES)
    def link_layer(self, repository: str, digest: Digest, visibility: Visibility) -> None:
        self.links.link_layer(repository, digest, visibility)
        if self.layers.get((repository, digest)) is not Visibility.PUBLIC:
            self.layers[repository, digest] = visibility
        self.repositories.add(repository)

    @rule(repository=REPOSITORIES, digest=DIGESTS)
    def unlink_layer(self, repository: str, digest: Digest) -> None:
        assert self.links.unlink_layer(repository, digest) == ((repository, digest) in self.layers)
        self.layers.pop((repository, digest), None)

    @rule(repository=REPOSITORIES, digest=DIGESTS, media_type=TYPES, visibility=VISIBILITIES)
    def link_manifest(self, repository: str, digest: Digest, media_type: str, visibility: Visibility) -> None:
        self.links.link_manifest(repository, digest, media_type, visibility)
        if self.manifests.get((repository, digest), ("", visibility))[1] is Visibility.PUBLIC:
            visibility = Visibility.PUBLIC
        self.manifests[repository, digest] = media_type, visibility
        self.repositories.add(repository)

    @rule(repository=REPOSITORIES, digest=DIGESTS)
    def unlink_manifest(self, repository: str, digest: Digest) -> None:
        manifest = self.manifests.pop((repository, digest), None)
        assert self.links.unlink_manifest(repository, digest) == (manifest is not None)

    @rule(repository=REPOSITORIES, tag=TAGS, digest=DIGESTS)
    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        self.links.set_tag(repository, tag, digest)
        self.tags.setdefault(repository, {})[tag] = digest
        self.repositories.add(repository)

    @rule(repository=REPOSITORIES, tag=TAGS)
    def remove_tag(self, repository: str, tag: str) -> None:
        target = self.tags.get(repository, {}).pop(tag, None)
        assert self.links.remove_tag(repository, tag) == (target is not None)

    @rule(repository=REPOSITORIES, digest=DIGESTS, tag=TAGS)
    def query(self, repository: str, digest: Digest, tag: str) -> None:
        assert self.other.has_layer(repository, digest) == ((repository, digest) in self.layers)
        assert self.other.layer_visibility(repository, digest) is self.layers.get((repository, digest))
        media_type, visibility = self.manifests.get((repository, digest), (None, None))
        assert self.other.has_manifest(repository, digest) == (media_type is not None)
        assert self.other.manifest_visibility(repository, digest) is visibility
        assert self.other.manifest_media_type(repository, digest) == media_type
        assert self.other.tag(repository, tag) == self.tags.get(repository, {}).get(tag)
        assert self.other.tags(repository) == sorted(self.tags.get(repository, {}))

    @rule()
    def list_repositories(self) -> None:
        assert sorted(self.other.repositories()) == sorted(self.repositories)
        assert list(self.other.repositories_after(None)) == sorted(self.repositories, key=components)

    @rule(position=POSITIONS)
    def list_repositories_after(self, position: str) -> None:
        expected = [name for name in self.repositories if components(name) > components(position)]
        assert list(self.other.repositories_after(position)) == sorted(expected, key=components)

    @rule(repository=REPOSITORIES, position=TAGS | st.sampled_from(["", "A", "m", "~"]))
    def list_tags_after(self, repository: str, position: str) -> None:
        tags = sorted(self.tags.get(repository, {}), key=sort_key)
        assert list(self.other.tags_after(repository, None)) == tags
        assert list(self.other.tags_after(repository, position)) == [
            t for t in tags if sort_key(t) > sort_key(position)
        ]


TestLinks = LinksMachine.TestCase
TestLinks.settings = settings(max_examples=examples(40), stateful_step_count=40, deadline=None)


def test_a_page_of_tags_looks_only_at_its_own_links(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    for number in range(20):
        links.set_tag("a", f"v{number:02}", digest)
    opened: list[str] = []
    link_exists = module._link_exists
    monkeypatch.setattr(module, "_link_exists", lambda reader, path: opened.append(path) or link_exists(reader, path))
    assert take_page(links.tags_after("a", "v04"), 3) == NamePage(["v05", "v06", "v07"], True)
    assert len(opened) == 4


def test_a_page_of_repositories_reads_only_its_own_directories(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    for number in range(20):
        links.link_layer(f"team{number:02}/app", digest)
    read: list[str] = []
    list_names = TreeReader.list_names
    monkeypatch.setattr(TreeReader, "list_names", lambda self, path: read.append(path) or list_names(self, path))
    assert take_page(links.repositories_after("team04/app"), 2) == NamePage(["team05/app", "team06/app"], True)
    assert len(read) <= 10


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.mark.parametrize("content", [b"", b"sha256:", b"sha256:abc", b"\0" * 71, b"\xff"])
def test_a_torn_tag_is_absent_and_can_be_set_again(layout: Layout, content: bytes) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    links.set_tag("a", "v1", digest)
    Path(layout.tag_current("a", "v1")).write_bytes(content)
    assert links.tag("a", "v1") is None
    links.set_tag("a", "v1", digest)
    assert links.tag("a", "v1") == digest


def test_an_empty_link_is_absent_and_can_be_written_again(layout: Layout) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    links.link_layer("a", digest)
    links.link_manifest("a", digest, INDEX)
    links.set_tag("a", "v1", digest)
    for path in (layout.layer("a", digest), layout.manifest("a", digest), layout.tag_current("a", "v1")):
        os.truncate(path, 0)
    assert not links.has_layer("a", digest)
    assert not links.has_manifest("a", digest)
    assert links.tags("a") == []
    links.link_layer("a", digest)
    assert links.has_layer("a", digest)


@pytest.mark.parametrize("content", [b"", b"a/b\r\nX: y", b"\0\0\0", b"a/" + b"b" * 300, "é".encode()])
def test_an_invalid_media_type_is_none(layout: Layout, content: bytes) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    links.link_manifest("a", digest, INDEX)
    Path(layout.media_type("a", digest)).write_bytes(content)
    assert links.manifest_media_type("a", digest) is None


def test_a_link_with_a_line_end_is_read(layout: Layout) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    links.set_tag("a", "v1", digest)
    Path(layout.tag_current("a", "v1")).write_text(f"{digest}\n")
    assert links.tag("a", "v1") == digest


def test_foreign_names_are_skipped(layout: Layout) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    assert list(links.repositories()) == []
    assert links.tags("a") == []
    links.link_layer("a", digest)
    links.set_tag("a", "v1", digest)
    (Path(layout.tags("a")) / ".hidden" / "current").mkdir(parents=True)
    (Path(layout.tags("a")) / "file").write_text("?")
    (Path(layout.repository("a")) / "_uploads" / "x").mkdir(parents=True)
    (Path(layout.repositories) / "lost+found" / "_layers").mkdir(parents=True)
    (Path(layout.repositories) / "file").write_text("?")
    assert links.tags("a") == ["v1"]
    assert list(links.repositories()) == ["a"]


@pytest.mark.parametrize("name", ["../x", "a/_layers", ""])
def test_every_method_rejects_path_traversal(layout: Layout, name: str) -> None:
    links, digest = Links(layout, False), Digest.of(b"1")
    for call in (
        lambda: links.has_layer(name, digest), lambda: links.link_layer(name, digest), lambda: links.tags(name),
        lambda: links.unlink_layer(name, digest), lambda: links.has_manifest(name, digest),
        lambda: links.link_manifest(name, digest, INDEX), lambda: links.unlink_manifest(name, digest),
        lambda: links.manifest_media_type(name, digest), lambda: links.tag(name, "v1"),
        lambda: links.set_tag(name, "v1", digest), lambda: links.remove_tag(name, "v1"),
    ):  # fmt: skip
        with pytest.raises(NameInvalid):
            call()


def test_prune_removes_only_empty_directories(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    links = Links(layout, durable=True)
    digest = Digest.of(b"a")
    links.link_layer("a/b", digest)
    links.link_manifest("a/b/c", digest, "x/y")
    links.set_tag("a/b/c", "v1", digest)
    os.makedirs(layout.referrers("a/b/c", digest))
    for repository in ("a/b", "a/b/c"):
        list(links.prune(repository))
    assert links.has_layer("a/b", digest)
    assert links.tag("a/b/c", "v1") == digest
    links.unlink_manifest("a/b/c", digest)
    links.remove_tag("a/b/c", "v1")
    list(links.prune("a/b/c"))
    assert os.listdir(f"{layout.repositories}/a/b") == ["_layers"]
    os.makedirs(f"{layout.foreign_uploads('a/b')}/session")
    links.unlink_layer("a/b", digest)
    list(links.prune("a/b"))
    assert os.listdir(f"{layout.repositories}/a/b") == ["_uploads"]
    assert list(links.repositories()) == []
    os.rmdir(f"{layout.foreign_uploads('a/b')}/session")
    list(links.prune("a/b"))
    assert os.listdir(layout.repositories) == []
    list(links.prune("never/there"))


def test_a_manifest_linked_during_prune_is_retained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is linked before each rmdir in turn. It exists afterwards, as does `_layers`.

    distribution requires `_layers`.
    """
    digest = Digest.of(b"a")
    real, attempt = os.rmdir, 0

    def rmdir(path: str) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            links.link_manifest("a", digest, "x/y")
        real(path)

    while True:
        layout = Layout(tmp_path / str(attempt))
        links = Links(layout, durable=True)
        links.link_manifest("a", digest, "x/y")
        links.set_tag("a", "v1", digest)
        links.unlink_manifest("a", digest)
        links.remove_tag("a", "v1")
        attempt += 1
        countdown = attempt
        monkeypatch.setattr(os, "rmdir", rmdir)
        list(links.prune("a"))
        monkeypatch.undo()
        if countdown > 0:
            break
        assert links.has_manifest("a", digest)
        assert os.path.isdir(layout.layers("a"))
    assert attempt > 5


def test_prune_tag_index_retains_the_current_target(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    links = Links(layout, durable=True)
    one, two = Digest.of(b"1"), Digest.of(b"2")
    for digest in (one, two):
        links.set_tag("a", "v1", digest)
    assert len(list(links.prune_tag_index("a", {str(one), str(two)}))) == 2, "one step per index entry"
    assert not os.path.exists(layout.tag_index("a", "v1", one))
    assert os.path.exists(layout.tag_index("a", "v1", two))
    assert links.tag("a", "v1") == two
