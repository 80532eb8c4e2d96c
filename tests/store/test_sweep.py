"""What goes and what stays, one case each; `test_sweep_machine` tries them all at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Digest
from dockerproxy.store import removal as removal_module
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.layout import Layout
from dockerproxy.store.removal import Removal, Verdict
from dockerproxy.store.slices import Slices, Watch
from dockerproxy.store.sweep import Removed, Sweeper, SweepUnderWay, Swept
from tests.store.workbench.images import BOTH, ONE, TWO, Content, age, described, image, index, keep
from tests.store.workbench.reactor import Reactor

REPOSITORY = "library/tiny"


@pytest.fixture
def reactor() -> Reactor:
    return Reactor()


@pytest.fixture
def store(tmp_path: Path) -> HostedStore:
    return HostedStore.below(Layout(tmp_path))


def sweep(reactor: Reactor, store: HostedStore, **options: Any) -> Swept:
    return reactor.run(Sweeper(reactor, store).sweep(**options))


def kept(store: HostedStore) -> set[Digest]:
    return {entry.digest for entry in store.blobs.walk()}


def digests(*contents: Content) -> set[Digest]:
    """Everything that `contents` consist of."""
    parts = [part for content in contents for part in content.walk()]
    return {part.digest for part in parts} | {Digest.of(blob) for part in parts for blob in part.blobs}


# what stays


def test_what_a_tag_leads_to(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, BOTH, "v1")
    signature = image(b"sig", b"signature", subject=BOTH)
    again = image(b"sig", b"of the signature", subject=signature)
    keep(store, REPOSITORY, signature)
    keep(store, REPOSITORY, again)
    age(store)
    swept = sweep(reactor, store, delete_untagged=True)
    assert kept(store) == digests(BOTH, signature, again)
    assert (swept.manifests, swept.links, swept.blobs, swept.problems) == (0, 0, 0, ())
    assert swept.needed == len(kept(store))


def test_the_subject_of_what_a_tag_means(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, ONE)
    keep(store, REPOSITORY, image(b"sig", b"signature", subject=ONE), "signature")
    age(store)
    sweep(reactor, store, delete_untagged=True)
    assert store.links.has_manifest(REPOSITORY, ONE.digest)
    assert digests(ONE) <= kept(store)


def test_a_subject_that_only_another_repository_has_is_not_needed_here(reactor: Reactor, store: HostedStore) -> None:
    keep(store, "other", BOTH, "v1")
    keep(store, REPOSITORY, ONE)
    keep(store, REPOSITORY, image(b"sig", b"signature", subject=BOTH), "signature")
    age(store)
    sweep(reactor, store, delete_untagged=True)
    assert not store.links.has_manifest(REPOSITORY, ONE.digest)


def test_untagged_manifests_unless_they_are_to_go(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, ONE)
    age(store)
    assert sweep(reactor, store).blobs == 0
    assert kept(store) == digests(ONE)
    assert sweep(reactor, store, delete_untagged=True).blobs == len(digests(ONE))
    assert kept(store) == set()


def test_blobs_of_a_cache_that_is_an_index(reactor: Reactor, store: HostedStore) -> None:
    """BuildKit's `type=registry` cache: the index's children are blobs."""
    layer = b"a cached layer" * 1_000_000  # longer than a manifest can be
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [described("x/y", layer)]}).encode()
    cache = Content(OCI_INDEX, data, (layer,))
    keep(store, REPOSITORY, cache, "cache")
    age(store)
    assert sweep(reactor, store, delete_untagged=True).problems == ()
    assert store.links.has_layer(REPOSITORY, Digest.of(layer))
    assert kept(store) == digests(cache)


@pytest.mark.parametrize("text", ['{"blobs": [{"digest": "%s"}]}', "not JSON, but %s", '{"%s": NaN}'])
def test_whatever_a_manifest_of_an_unknown_type_names(reactor: Reactor, store: HostedStore, text: str) -> None:
    strange = Content("application/vnd.strange", (text % Digest.of(b"named")).encode(), (b"named",))
    keep(store, REPOSITORY, strange, "strange")
    keep(store, REPOSITORY, ONE)
    age(store)
    assert sweep(reactor, store, delete_untagged=True).problems == ()
    assert kept(store) == digests(strange)


def test_uploads_and_what_is_no_content(reactor: Reactor, store: HostedStore) -> None:
    upload = store.uploads.start(REPOSITORY)
    upload.append([b"half"])
    store.uploads.suspend(upload)
    other = Path(store.layout.blobs) / "sha256/ab/notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    sweep(reactor, store, delete_untagged=True)
    assert store.uploads.size(REPOSITORY, upload.session) == 4
    assert other.read_text() == "mine"


# what goes


def test_what_nothing_leads_to(reactor: Reactor, store: HostedStore) -> None:
    signature = image(b"sig", b"signature", subject=ONE)
    keep(store, REPOSITORY, ONE, "v1", "v2")
    keep(store, REPOSITORY, signature)
    keep(store, REPOSITORY, TWO, "v1")  # in place of the first
    store.links.remove_tag(REPOSITORY, "v2")
    stray = b"nobody's"
    store.blobs.put(stray, Digest.of(stray))
    age(store)
    sizes = {entry.digest: entry.size for entry in store.blobs.walk()}
    found: list[Removed] = []
    swept = sweep(reactor, store, delete_untagged=True, watch=Watch(found=found.append))
    assert kept(store) == digests(TWO)
    gone = digests(ONE, signature) - digests(TWO) | {Digest.of(stray)}
    assert (swept.manifests, swept.links) == (2, 4)
    assert (swept.blobs, swept.bytes) == (len(gone), sum(sizes[digest] for digest in gone))
    assert {(thing.repository, thing.digest) for thing in found if thing.kind == "manifest"} == {
        (REPOSITORY, ONE.digest), (REPOSITORY, signature.digest)
    }  # fmt: skip
    assert {thing.digest for thing in found if thing.kind == "blob"} == gone
    assert list(store.links.manifests(REPOSITORY)) == [TWO.digest]
    # Nothing is left of it beside the tree's own parts, either.
    left = [str(path) for path in store.layout.root.rglob("*") if ONE.digest.hex in path.name]
    assert left == []
    assert not os.path.exists(store.layout.referrers(REPOSITORY, ONE.digest))


def test_links_of_one_repository_and_not_of_another(reactor: Reactor, store: HostedStore) -> None:
    keep(store, "one", ONE, "v1")
    for blob in (*ONE.blobs, b"mounted"):
        store.links.link_layer("two", Digest.of(blob))
    age(store)
    assert sweep(reactor, store).links == 4
    assert list(store.links.layers("two")) == []
    assert set(store.links.layers("one")) == {Digest.of(blob) for blob in ONE.blobs}


def test_repositories_that_have_nothing_any_more(reactor: Reactor, store: HostedStore) -> None:
    keep(store, "a/b/c", ONE)
    keep(store, "a/d", TWO, "v1")
    age(store)
    sweep(reactor, store, delete_untagged=True)
    assert list(store.links.repositories()) == ["a/d"]
    assert os.listdir(f"{store.layout.repositories}/a") == ["d"]


def test_a_dry_run_tells_what_would_go_and_changes_nothing(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, BOTH, "v1")
    keep(store, REPOSITORY, image(b"config3", b"base"), "v1")
    age(store)
    before = sorted(map(str, store.layout.root.rglob("*")))
    tried = sweep(reactor, store, delete_untagged=True, dry_run=True)
    assert sorted(map(str, store.layout.root.rglob("*"))) == before
    done = sweep(reactor, store, delete_untagged=True)
    assert tried.manifests == 3
    for name in ("manifests", "links", "blobs", "bytes", "needed", "recent_manifests", "recent"):
        assert getattr(tried, name) == getattr(done, name), name


# what cannot be understood


def test_a_repository_with_a_damaged_manifest_is_left_alone(reactor: Reactor, store: HostedStore) -> None:
    for repository in ("sound", "damaged"):
        keep(store, repository, ONE, "v1")
        store.links.remove_tag(repository, "v1")
        store.blobs.put(b"unused", Digest.of(b"unused"))
        store.links.link_layer(repository, Digest.of(b"unused"))
    keep(store, "damaged", BOTH, "v1")
    Path(store.layout.blob(BOTH.digest)).write_bytes(b"{}")
    age(store)
    swept = sweep(reactor, store, delete_untagged=True)
    assert len(swept.problems) == 1
    assert "damaged" in swept.problems[0] and str(BOTH.digest) in swept.problems[0]
    assert digests(BOTH) | {Digest.of(b"unused")} == kept(store)
    assert list(store.links.repositories()) == ["damaged"]
    assert store.links.has_layer("damaged", Digest.of(b"unused"))


@pytest.mark.parametrize("trouble", ["missing", "no link", "torn tag", "too long", "no manifest"])
def test_other_damage(reactor: Reactor, store: HostedStore, trouble: str) -> None:
    keep(store, REPOSITORY, BOTH, "v1")
    keep(store, REPOSITORY, ONE, "v2")
    blob = Path(store.layout.blob(ONE.digest))
    match trouble:
        case "missing":
            blob.unlink()
        case "no link":
            store.links.unlink_manifest(REPOSITORY, BOTH.digest)
        case "torn tag":
            Path(store.layout.tag_current(REPOSITORY, "v1")).write_bytes(b"sha256:")
        case "too long":
            os.truncate(blob, 5_000_000)
        case "no manifest":
            keep(store, REPOSITORY, Content(OCI_INDEX, b"[]"))
    age(store)
    before = kept(store)
    swept = sweep(reactor, store, delete_untagged=True)
    assert len(swept.problems) == 1, swept
    assert kept(store) == before
    assert all(store.links.has_layer(REPOSITORY, Digest.of(data)) for data in (*ONE.blobs, *TWO.blobs))


def test_files_of_another_user_stay(reactor: Reactor, store: HostedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their owner can date them, so nobody can tell when they were last counted on."""
    keep(store, REPOSITORY, ONE)
    store.blobs.put(b"loose", Digest.of(b"loose"))
    age(store)
    monkeypatch.setattr(removal_module.os, "geteuid", lambda: os.getuid() + 1000)
    swept = sweep(reactor, store, delete_untagged=True)
    assert (swept.manifests, swept.blobs, swept.foreign, swept.foreign_bytes) == (0, 0, 2, 5)
    assert kept(store) == digests(ONE) | {Digest.of(b"loose")}


# while others are at it


def test_the_grace_period(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, ONE)
    age(store, 1800)
    swept = sweep(reactor, store, delete_untagged=True)
    assert (swept.recent_manifests, swept.blobs, swept.recent) == (1, 0, 0), "it needs what it refers to"
    store.blobs.put(b"loose", Digest.of(b"loose"))
    swept = sweep(reactor, store, delete_untagged=True)
    assert (swept.blobs, swept.recent, swept.recent_bytes) == (0, 1, 5)
    assert sweep(reactor, store, delete_untagged=True, grace=600).blobs == len(digests(ONE))
    with pytest.raises(ValueError, match="120"):
        sweep(reactor, store, grace=60)


def marked(reactor: Reactor, store: HostedStore) -> Deferred[Swept]:
    """Start a collection and let it get to the end of its mark phase."""
    marks: list[int] = []
    slices = Slices(reactor, length=-1)
    dry = Sweeper(reactor, store, slices=slices)
    watch: Watch[Removed] = Watch(progress=lambda phase, done, total: marks.append(1) if phase == "mark" else None)
    reactor.run(dry.sweep(delete_untagged=True, dry_run=True, watch=watch))
    expected = len(marks)
    marks.clear()
    sweep = Deferred.fromCoroutine(Sweeper(reactor, store, slices=slices).sweep(delete_untagged=True, watch=watch))
    while len(marks) < expected:
        reactor.run_one()
    return sweep


def finish(reactor: Reactor, sweep: Deferred[Swept]) -> Swept:
    async def wait() -> Swept:
        return await sweep

    return reactor.run(wait())


@pytest.mark.parametrize("child", range(4))
def test_an_index_of_which_a_child_is_used_after_the_mark_phase(
    reactor: Reactor, store: HostedStore, child: int
) -> None:
    """A push of the index finds its children there, and does not look at their layers: they have to stay with them."""
    children = [image(b"config%d" % number, b"base", b"layer%d" % number) for number in range(4)]
    keep(store, REPOSITORY, index(*children))
    age(store)
    sweep = marked(reactor, store)
    store.blobs.touch(children[child].digest)
    swept = finish(reactor, sweep)
    assert swept.manifests == 0
    assert kept(store) == digests(index(*children))
    assert set(store.links.layers(REPOSITORY)) == {Digest.of(blob) for child in children for blob in child.blobs}


def test_a_recent_index_keeps_its_children(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, BOTH)
    age(store)
    store.blobs.touch(BOTH.digest)
    assert sweep(reactor, store, delete_untagged=True).manifests == 0
    assert kept(store) == digests(BOTH)


def test_blobs_that_are_used_after_the_mark_phase(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, ONE)
    age(store)
    sweep = marked(reactor, store)
    store.blobs.touch(Digest.of(b"base"))
    swept = finish(reactor, sweep)
    assert (swept.manifests, swept.links, swept.blobs, swept.recent) == (1, 2, 3, 1)
    assert store.links.has_layer(REPOSITORY, Digest.of(b"base"))
    assert kept(store) == {Digest.of(b"base")}


def test_a_large_group_goes_in_parts_and_stays_from_where_it_is_used(reactor: Reactor, store: HostedStore) -> None:
    children = [image(b"config%d" % number, b"base") for number in range(100)]
    large = index(*children)
    keep(store, REPOSITORY, large)
    age(store)
    sweep = marked(reactor, store)
    while store.links.has_manifest(REPOSITORY, large.digest):
        reactor.run_one()
    in_a_later_part = next(child for child in children if store.links.has_manifest(REPOSITORY, child.digest))
    store.blobs.touch(in_a_later_part.digest)
    swept = finish(reactor, sweep)
    assert swept.manifests in (32, 64, 96)
    left = [child for child in children if store.links.has_manifest(REPOSITORY, child.digest)]
    assert len(left) == 101 - swept.manifests
    assert in_a_later_part in left
    assert kept(store) == digests(*left)


def test_one_collection_at_a_time(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, ONE)
    sweeper = Sweeper(reactor, store)
    first = Deferred.fromCoroutine(sweeper.sweep())
    with pytest.raises(SweepUnderWay):
        reactor.run(sweeper.sweep())
    finish(reactor, first)
    assert reactor.run(sweeper.sweep()).repositories == 1


def test_a_cancelled_collection_ends_and_leaves_no_litter(reactor: Reactor, store: HostedStore) -> None:
    keep(store, REPOSITORY, BOTH)
    age(store)
    sweeper = Sweeper(reactor, store, slices=Slices(reactor, length=-1))
    steps = 0
    while True:
        sweep = Deferred.fromCoroutine(sweeper.sweep(delete_untagged=True))
        for _ in range(steps):
            reactor.run_one()
        if sweep.called:
            break
        sweep.cancel()
        with pytest.raises(CancelledError):
            finish(reactor, sweep)
        assert not reactor.busy
        assert not os.path.exists(store.layout.staging) or os.listdir(store.layout.staging) == []
        steps += 1
    assert steps > 20
    assert kept(store) == set()


# one thing, taken away


Change = Callable[[HostedStore], object]

CONFIG = Digest.of(b"config1")


def take_blob(removal: Removal) -> Verdict:
    return removal.blob(CONFIG)[0]


def take_layer(removal: Removal) -> Verdict:
    return removal.layer(REPOSITORY, CONFIG)


def take_manifests(removal: Removal) -> Verdict:
    return removal.manifests(REPOSITORY, [ONE.digest, TWO.digest])


TAKEN: list[tuple[Callable[[Removal], Verdict], Digest]] = [
    (take_blob, CONFIG), (take_layer, CONFIG), (take_manifests, ONE.digest), (take_manifests, TWO.digest)
]  # fmt: skip


@pytest.mark.parametrize(("take", "digest"), TAKEN)
@pytest.mark.parametrize("moment", range(6))
def test_a_use_at_any_moment_is_seen_or_finds_nothing(
    store: HostedStore, monkeypatch: pytest.MonkeyPatch, take: Any, digest: Digest, moment: int
) -> None:
    """Another thread uses the content between any two of the system calls that look at it and move it."""
    keep(store, REPOSITORY, BOTH)
    age(store)
    found: list[int | None] = []
    calls = iter(range(100))

    def watched(real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            if next(calls) == moment:
                monkeypatch.undo()
                found.append(store.blobs.touch(digest))
            return result

        return call

    for name in ("stat", "rename"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    removal = Removal(store.layout, time.time() - 3600)
    verdict = take(removal)
    monkeypatch.undo()
    there = store.blobs.exists(digest)
    linked = store.links.has_layer(REPOSITORY, CONFIG) and store.links.has_manifest(REPOSITORY, ONE.digest)
    linked = linked and store.links.has_manifest(REPOSITORY, TWO.digest)
    if verdict is Verdict.GONE:
        assert not (there and linked)
        assert found in ([], [None]) or not linked, "the use was seen, and what it counted on went"
    else:
        assert there and linked
    if found and found[0] is not None and take is take_blob:
        assert verdict is Verdict.RECENT
    assert os.listdir(store.layout.staging) == []
    assert store.links.manifest_media_type(REPOSITORY, ONE.digest) == (
        None if verdict is Verdict.GONE and take is take_manifests else ONE.media_type
    )


def test_a_link_that_was_written_again_meanwhile(store: HostedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The push found no link and wrote it, but found the media type: none of the two may be lost."""
    keep(store, REPOSITORY, ONE)
    age(store)
    real = os.rename

    def rename(source: str, target: str) -> None:
        real(source, target)
        monkeypatch.undo()
        store.blobs.touch(ONE.digest)
        path = Path(store.layout.manifest(REPOSITORY, ONE.digest))
        path.parent.mkdir(parents=True)
        path.write_text(str(ONE.digest))

    monkeypatch.setattr(os, "rename", rename)
    removal = Removal(store.layout, time.time() - 3600)
    assert removal.manifests(REPOSITORY, [ONE.digest]) is Verdict.RECENT
    assert store.links.has_manifest(REPOSITORY, ONE.digest)
    assert store.links.manifest_media_type(REPOSITORY, ONE.digest) == ONE.media_type
    assert os.listdir(store.layout.staging) == []
