"""Tests of garbage collection, one case each. `test_sweep_machine` combines them at random."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.oci.manifests import OCI_INDEX, fallback_tag
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.oci.upload_ids import UploadIds
from dockerproxy.store import safe_delete as safe_delete_module
from dockerproxy.store import sweep as sweep_module
from dockerproxy.store.files import Staging
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, RepositoryLock, Stopped
from dockerproxy.store.safe_delete import DeleteOutcome, SafeDelete
from dockerproxy.store.secret import load_or_create_secret
from dockerproxy.store.sweep import InvalidGracePeriod, RemovedItem, SweepResult, sweep
from dockerproxy.store.tree_reader import UnsafeFile
from dockerproxy.store.uploads import Upload
from tests.store.support.images import BOTH, ONE, TWO, ManifestTree, age_blobs, descriptor, image, index, put_image
from tests.store.support.reactor import SteppedReactor
from tests.store.support.stepped_operation import SteppedOperation

REPOSITORY = "library/tiny"


@pytest.fixture
def reactor() -> SteppedReactor:
    return SteppedReactor()


@pytest.fixture
def store(tmp_path: Path) -> HostedTree:
    return HostedTree.from_layout(Layout(tmp_path))


def stored_digests(store: HostedTree) -> set[Digest]:
    return {entry.key for entry in store.blobs.walk()}


def closure(*manifests: ManifestTree) -> set[Digest]:
    """Return the digests of all manifests and blobs of `manifests`."""
    parts = [part for content in manifests for part in content.walk()]
    return {part.digest for part in parts} | {Digest.of(blob) for part in parts for blob in part.blobs}


# Retained objects


def test_retains_everything_a_tag_reaches(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    signature = image(b"sig", b"signature", subject=BOTH)
    again = image(b"sig", b"of the signature", subject=signature)
    put_image(store, REPOSITORY, signature)
    put_image(store, REPOSITORY, again)
    age_blobs(store)
    result = sweep(store.layout, delete_untagged=True)
    assert stored_digests(store) == closure(BOTH, signature, again)
    assert (result.manifests, result.links, result.blobs, result.problems) == (0, 0, 0, ())
    assert result.needed == len(stored_digests(store))


def test_retains_the_subject_of_a_tagged_manifest(store: HostedTree) -> None:
    put_image(store, REPOSITORY, ONE)
    put_image(store, REPOSITORY, image(b"sig", b"signature", subject=ONE), "signature")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert store.links.has_manifest(REPOSITORY, ONE.digest)
    assert closure(ONE) <= stored_digests(store)


def test_retains_the_signatures_of_a_manifest_that_is_not_pushed_yet(store: HostedTree) -> None:
    """An index may list images that come later, and the signatures of these may come before them."""
    put_image(store, REPOSITORY, ManifestTree(BOTH.media_type, BOTH.data), "v1")
    signature = image(b"sig", b"signature", subject=ONE)
    put_image(store, REPOSITORY, signature)
    age_blobs(store)
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert store.links.has_manifest(REPOSITORY, signature.digest)


def test_a_subject_in_another_repository_only_is_not_retained(store: HostedTree) -> None:
    put_image(store, "other", BOTH, "v1")
    put_image(store, REPOSITORY, ONE)
    put_image(store, REPOSITORY, image(b"sig", b"signature", subject=BOTH), "signature")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert not store.links.has_manifest(REPOSITORY, ONE.digest)


# Tags with names that are derived from a digest

SIGNATURE = image(b"sig", b"signature")  # cosign's have no subject
REFERRER = image(b"sig", b"referrer", subject=BOTH)


def put_signatures(store: HostedTree) -> list[str]:
    """Sign BOTH as cosign, oras and notation do at a registry without referrers. Return the tags."""
    base = fallback_tag(BOTH.digest)
    tags = [base, *(f"{base}.{extension}" for extension in ("sig", "att", "sbom"))]
    put_image(store, REPOSITORY, REFERRER)
    put_image(store, REPOSITORY, index(REFERRER), base)
    for tag in tags[1:]:
        put_image(store, REPOSITORY, SIGNATURE, tag)
    # And a signature of the signature.
    of_signature = f"{fallback_tag(SIGNATURE.digest)}.sig"
    put_image(store, REPOSITORY, image(b"sig", b"of a signature"), of_signature)
    return sorted([*tags, of_signature])


def test_signatures_live_with_their_image(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    signatures = put_signatures(store)
    before = stored_digests(store)
    age_blobs(store)
    for _ in range(2):
        assert sweep(store.layout, delete_untagged=True).problems == ()
        assert stored_digests(store) == before
        assert store.links.tags(REPOSITORY) == sorted([*signatures, "v1"])


@pytest.mark.parametrize("removal", ["tag", "manifest", "manifest, and two collections"])
def test_signatures_end_with_their_image(store: HostedTree, removal: str) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    signatures = put_signatures(store)
    if removal == "tag":
        store.links.remove_tag(REPOSITORY, "v1")
    else:
        store.remove_manifest(REPOSITORY, BOTH.digest)
    if "two" in removal:
        sweep(store.layout, delete_untagged=True)  # all of it was used a moment ago
        assert store.links.tags(REPOSITORY) == signatures
    age_blobs(store)
    assert sweep(store.layout).problems == ()
    assert store.links.tags(REPOSITORY) == signatures
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert store.links.tags(REPOSITORY) == []
    assert stored_digests(store) == set()
    assert list(store.links.repositories()) == []


def test_a_signature_that_was_used_ends_with_a_later_collection(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    put_signatures(store)
    store.links.remove_tag(REPOSITORY, "v1")
    age_blobs(store)
    store.blobs.touch(SIGNATURE.digest)
    sweep(store.layout, delete_untagged=True)
    assert not store.links.has_manifest(REPOSITORY, BOTH.digest)
    assert f"{fallback_tag(BOTH.digest)}.sig" in store.links.tags(REPOSITORY)
    age_blobs(store)
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert store.links.tags(REPOSITORY) == []
    assert stored_digests(store) == set()


def test_signatures_of_what_was_never_here_are_spared(store: HostedTree) -> None:
    """COSIGN_REPOSITORY: signatures have a repository of their own."""
    put_image(store, "images", BOTH, "v1")
    signatures = put_signatures(store)
    put_image(store, REPOSITORY, ONE, fallback_tag(ONE.digest))  # a person may give an image its own digest as a name
    put_image(store, REPOSITORY, TWO, f"sha256-{'0' * 63}", "sha256-latest", f"x{fallback_tag(ONE.digest)}")
    store.remove_manifest("images", BOTH.digest)
    before = store.links.tags(REPOSITORY)
    for _ in range(2):
        age_blobs(store)
        assert sweep(store.layout, delete_untagged=True).problems == ()
        assert store.links.tags(REPOSITORY) == before
    assert set(signatures) < set(before)
    assert closure(SIGNATURE, REFERRER, ONE, TWO) <= stored_digests(store)


def test_an_index_that_two_images_share_lives_with_one(store: HostedTree) -> None:
    """Clients leave an empty index behind if they remove the last signature."""
    for image_, tag in ((ONE, "one"), (TWO, "two")):
        put_image(store, REPOSITORY, image_, tag)
        put_image(store, REPOSITORY, index(), fallback_tag(image_.digest))
    store.links.remove_tag(REPOSITORY, "two")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert store.links.tags(REPOSITORY) == sorted(["one", fallback_tag(ONE.digest)])
    assert stored_digests(store) == closure(ONE, index())


def test_the_image_of_a_sha512_digest(store: HostedTree) -> None:
    """The tag has half of the digest."""
    digest = Digest.of(ONE.data, "sha512")
    put_image(store, REPOSITORY, ONE)
    store.remove_manifest(REPOSITORY, ONE.digest)
    store.blobs.put(ONE.data, digest)
    store.link_manifest(REPOSITORY, digest, ONE.media_type, None, ["v1"])
    put_image(store, REPOSITORY, SIGNATURE, f"{fallback_tag(digest)}.sig")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert store.links.tags(REPOSITORY) == [f"{fallback_tag(digest)}.sig", "v1"]
    store.links.remove_tag(REPOSITORY, "v1")
    sweep(store.layout, delete_untagged=True)
    assert store.links.tags(REPOSITORY) == []
    assert stored_digests(store) == set()


def test_a_crash_before_the_tags_of_signatures_were_deleted(store: HostedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    put_signatures(store)
    store.links.remove_tag(REPOSITORY, "v1")
    age_blobs(store)
    with monkeypatch.context() as crash:
        crash.setattr(sweep_module._SweepRun, "_clean_up", lambda run, repository: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep(store.layout, delete_untagged=True)
    assert store.links.tags(REPOSITORY) != []
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert store.links.tags(REPOSITORY) == []
    assert stored_digests(store) == set()


def test_an_image_that_is_pushed_again_keeps_its_signatures(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    signatures = put_signatures(store)
    store.remove_manifest(REPOSITORY, BOTH.digest)
    put_image(store, REPOSITORY, BOTH, "v1")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert store.links.tags(REPOSITORY) == sorted([*signatures, "v1"])


def test_untagged_manifests_are_deleted_only_on_request(store: HostedTree) -> None:
    put_image(store, REPOSITORY, ONE)
    age_blobs(store)
    assert sweep(store.layout).blobs == 0
    assert stored_digests(store) == closure(ONE)
    assert sweep(store.layout, delete_untagged=True).blobs == len(closure(ONE))
    assert stored_digests(store) == set()


def test_retains_the_blobs_of_a_buildkit_cache_index(store: HostedTree) -> None:
    """BuildKit's `type=registry` cache: the index's children are blobs."""
    layer = b"a cached layer" * 1_000_000  # larger than the manifest size limit
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor("x/y", layer)]}).encode()
    cache = ManifestTree(OCI_INDEX, data, (layer,))
    put_image(store, REPOSITORY, cache, "cache")
    age_blobs(store)
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert store.links.has_layer(REPOSITORY, Digest.of(layer))
    assert stored_digests(store) == closure(cache)


@pytest.mark.parametrize("text", ['{"blobs": [{"digest": "%s"}]}', "not JSON, but %s", '{"%s": NaN}'])
def test_retains_every_digest_in_a_manifest_of_an_unknown_type(store: HostedTree, text: str) -> None:
    strange = ManifestTree("application/vnd.strange", (text % Digest.of(b"named")).encode(), (b"named",))
    put_image(store, REPOSITORY, strange, "strange")
    put_image(store, REPOSITORY, ONE)
    age_blobs(store)
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert stored_digests(store) == closure(strange)


def test_retains_running_uploads_and_foreign_files(store: HostedTree) -> None:
    sessions = []
    for age in (60, 4000):
        upload = store.uploads.create(UploadIds(b"").make_offer("", parse_repository(REPOSITORY), "sha256", 0)[:36])
        upload.append([b"half"])
        store.uploads.suspend(upload)
        os.utime(f"{store.layout.sessions}/{upload.session}", (time.time() - age, time.time() - age))
        sessions.append(upload.session)
    other = Path(store.layout.blobs) / "sha256/ab/notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    for dry_run in (True, False):
        assert store.uploads.size(sessions[1]) == 4
        assert sweep(store.layout, delete_untagged=True, dry_run=dry_run).uploads == 1
    assert os.listdir(store.layout.sessions) == [sessions[0]]  # the other was given up before the grace period
    assert other.read_text() == "mine"


def start_upload(store: HostedTree, repository: str, age: float, last_used: float = 0) -> Upload:
    """Begin an upload `age` seconds ago."""
    ids = UploadIds(load_or_create_secret(Path(store.layout.secret), Staging(store.layout.staging)))
    offer = ids.make_offer("", parse_repository(repository), "sha256", time.time() - age)
    upload = store.uploads.create(offer[:36])
    upload.append([b"half"])
    store.uploads.suspend(upload)
    os.utime(f"{store.layout.sessions}/{upload.session}", (time.time() - last_used,) * 2)
    return upload


@pytest.mark.parametrize("delete_untagged", [False, True])
def test_a_push_that_lasts_longer_than_the_grace_period(store: HostedTree, delete_untagged: bool) -> None:
    store.blobs.put(b"before", Digest.of(b"before"))
    store.links.link_layer(REPOSITORY, Digest.of(b"before"))
    age_blobs(store, 3 * 3600)
    put_image(store, REPOSITORY, ONE)  # pushed two hours ago, and its index is not there yet
    for blob in (b"first layer", b"second layer"):
        store.blobs.put(blob, Digest.of(blob))
        store.links.link_layer(REPOSITORY, Digest.of(blob))
    put_image(store, "other", TWO)
    age_blobs(store, 2 * 3600)
    session = start_upload(store, REPOSITORY, 1.9 * 3600, last_used=600)
    start_upload(store, REPOSITORY, 60)
    for _ in range(2):
        sweep(store.layout, delete_untagged=delete_untagged)
        held = {Digest.of(b"first layer"), Digest.of(b"second layer")} | closure(ONE)
        assert stored_digests(store) == held if delete_untagged else held | closure(TWO)
        assert all(store.links.has_layer(REPOSITORY, Digest.of(blob)) for blob in (b"first layer", b"second layer"))
        assert store.links.has_manifest(REPOSITORY, ONE.digest)
    store.uploads.resume(session.session).cancel()
    sweep(store.layout, delete_untagged=delete_untagged)
    assert stored_digests(store) == (set() if delete_untagged else closure(ONE, TWO))


@pytest.mark.parametrize(("age", "last_used"), [(30 * 3600, 0), (1.9 * 3600, 2 * 3600), (-(10**6), 0)])
def test_an_upload_holds_what_is_a_day_old_at_most_and_only_while_it_is_used(
    store: HostedTree, age: float, last_used: float
) -> None:
    put_image(store, REPOSITORY, ONE)
    age_blobs(store, 26 * 3600)
    start_upload(store, REPOSITORY, age, last_used)
    sweep(store.layout, delete_untagged=True)
    assert stored_digests(store) == set()


@pytest.mark.parametrize("fault", ["torn", "empty", "dangling"])
def test_a_tag_without_its_manifest_is_told_with_the_remedy(store: HostedTree, fault: str) -> None:
    put_image(store, REPOSITORY, ONE, "v1")
    put_image(store, REPOSITORY, TWO)
    if fault == "dangling":
        store.links.unlink_manifest(REPOSITORY, ONE.digest)
    else:
        Path(store.layout.tag_current(REPOSITORY, "v1")).write_bytes(b"sha256:12" if fault == "torn" else b"")
    age_blobs(store)
    (problem,) = sweep(store.layout, delete_untagged=True).problems
    assert problem.startswith(f"{REPOSITORY}: the ")
    assert problem.endswith(f"run `dockerproxy rm {REPOSITORY}:v1`")
    assert closure(ONE, TWO) <= stored_digests(store)
    assert store.links.remove_tag(REPOSITORY, "v1")
    assert sweep(store.layout, delete_untagged=True).problems == ()
    assert stored_digests(store) == set()


# Deleted objects


def test_deletes_unreachable_objects(store: HostedTree) -> None:
    signature = image(b"sig", b"signature", subject=ONE)
    put_image(store, REPOSITORY, ONE, "v1", "v2")
    put_image(store, REPOSITORY, signature)
    put_image(store, REPOSITORY, TWO, "v1")  # moves the tag from the first image
    store.links.remove_tag(REPOSITORY, "v2")
    stray = b"unreferenced"
    store.blobs.put(stray, Digest.of(stray))
    age_blobs(store)
    sizes = {entry.key: entry.size for entry in store.blobs.walk()}
    items: list[RemovedItem] = []
    result = sweep(store.layout, delete_untagged=True, progress=Progress(emit=items.append))
    assert stored_digests(store) == closure(TWO)
    deleted = closure(ONE, signature) - closure(TWO) | {Digest.of(stray)}
    assert (result.manifests, result.links) == (2, 4)
    assert (result.blobs, result.bytes) == (len(deleted), sum(sizes[digest] for digest in deleted))
    assert {(item.repository, item.digest) for item in items if item.kind == "manifest"} == {
        (REPOSITORY, ONE.digest), (REPOSITORY, signature.digest)
    }  # fmt: skip
    assert {item.digest for item in items if item.kind == "blob"} == deleted
    assert list(store.links.manifests(REPOSITORY)) == [TWO.digest]
    # No file of our additions to the tree is left, either.
    leftovers = [str(path) for path in store.layout.root.rglob("*") if ONE.digest.hex in path.name]
    assert leftovers == []
    assert not os.path.exists(store.layout.referrers(REPOSITORY, ONE.digest))


def test_links_are_swept_per_repository(store: HostedTree) -> None:
    put_image(store, "one", ONE, "v1")
    for blob in (*ONE.blobs, b"mounted"):
        store.links.link_layer("two", Digest.of(blob))
    age_blobs(store)
    assert sweep(store.layout).links == 4
    assert list(store.links.layers("two")) == []
    assert set(store.links.layers("one")) == {Digest.of(blob) for blob in ONE.blobs}


def test_removes_empty_repositories(store: HostedTree) -> None:
    put_image(store, "a/b/c", ONE)
    put_image(store, "a/d", TWO, "v1")
    age_blobs(store)
    sweep(store.layout, delete_untagged=True)
    assert list(store.links.repositories()) == ["a/d"]
    assert os.listdir(f"{store.layout.repositories}/a") == ["d"]


def test_a_dry_run_deletes_nothing(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    put_image(store, REPOSITORY, image(b"config3", b"base"), "v1")
    age_blobs(store)
    before = sorted(map(str, store.layout.root.rglob("*")))
    dry_result = sweep(store.layout, delete_untagged=True, dry_run=True)
    assert sorted(map(str, store.layout.root.rglob("*"))) == before
    result = sweep(store.layout, delete_untagged=True)
    assert dry_result.manifests == 3
    for name in ("manifests", "links", "blobs", "bytes", "needed", "recent_manifests", "recent"):
        assert getattr(dry_result, name) == getattr(result, name), name


# Damage


def test_skips_a_repository_with_a_damaged_manifest(store: HostedTree) -> None:
    for repository in ("intact", "damaged"):
        put_image(store, repository, ONE, "v1")
        store.links.remove_tag(repository, "v1")
        store.blobs.put(b"unused", Digest.of(b"unused"))
        store.links.link_layer(repository, Digest.of(b"unused"))
    put_image(store, "damaged", BOTH, "v1")
    Path(store.layout.blob(BOTH.digest)).write_bytes(b"{}")
    age_blobs(store)
    result = sweep(store.layout, delete_untagged=True)
    assert len(result.problems) == 1
    assert "damaged" in result.problems[0] and str(BOTH.digest) in result.problems[0]
    assert closure(BOTH) | {Digest.of(b"unused")} == stored_digests(store)
    assert list(store.links.repositories()) == ["damaged"]
    assert store.links.has_layer("damaged", Digest.of(b"unused"))


@pytest.mark.parametrize("damage", ["missing", "no link", "torn tag", "too long", "no manifest"])
def test_damage_of_any_kind_deletes_nothing(store: HostedTree, damage: str) -> None:
    put_image(store, REPOSITORY, BOTH, "v1")
    put_image(store, REPOSITORY, ONE, "v2")
    blob = Path(store.layout.blob(ONE.digest))
    match damage:
        case "missing":
            blob.unlink()
        case "no link":
            store.links.unlink_manifest(REPOSITORY, BOTH.digest)
        case "torn tag":
            Path(store.layout.tag_current(REPOSITORY, "v1")).write_bytes(b"sha256:")
        case "too long":
            os.truncate(blob, 5_000_000)
        case "no manifest":
            put_image(store, REPOSITORY, ManifestTree(OCI_INDEX, b"[]"))
    age_blobs(store)
    before = stored_digests(store)
    result = sweep(store.layout, delete_untagged=True)
    assert len(result.problems) == 1, result
    assert stored_digests(store) == before
    assert all(store.links.has_layer(REPOSITORY, Digest.of(data)) for data in (*ONE.blobs, *TWO.blobs))


def test_retains_files_of_another_user(store: HostedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the owner can set their mtime, so their last use is not known."""
    put_image(store, REPOSITORY, ONE)
    store.blobs.put(b"loose", Digest.of(b"loose"))
    age_blobs(store)
    monkeypatch.setattr(safe_delete_module.os, "geteuid", lambda: os.getuid() + 1000)
    result = sweep(store.layout, delete_untagged=True)
    assert (result.manifests, result.blobs, result.foreign, result.foreign_bytes) == (0, 0, 2, 5)
    assert stored_digests(store) == closure(ONE) | {Digest.of(b"loose")}


# Concurrent use


def test_objects_used_within_the_grace_period_are_retained(store: HostedTree) -> None:
    put_image(store, REPOSITORY, ONE)
    age_blobs(store, 1800)
    result = sweep(store.layout, delete_untagged=True)
    assert (result.recent_manifests, result.blobs, result.recent) == (1, 0, 0), (
        "a recent manifest retains its references"
    )
    store.blobs.put(b"loose", Digest.of(b"loose"))
    result = sweep(store.layout, delete_untagged=True)
    assert (result.blobs, result.recent, result.recent_bytes) == (0, 1, 5)
    assert sweep(store.layout, delete_untagged=True, grace=600).blobs == len(closure(ONE))
    for grace in (60, float("nan"), -1):
        with pytest.raises(InvalidGracePeriod, match="120"):
            sweep(store.layout, grace=grace)
    assert stored_digests(store) == {Digest.of(b"loose")}


def start(reactor: SteppedReactor, store: HostedTree, **options: Any) -> SteppedOperation[SweepResult]:
    def operation(progress: Progress[RemovedItem], lock: RepositoryLock) -> SweepResult:
        return sweep(store.layout, delete_untagged=True, progress=progress, lock=lock, **options)

    return SteppedOperation(reactor, operation, store.locks)


def start_after_mark(reactor: SteppedReactor, store: HostedTree) -> SteppedOperation[SweepResult]:
    """Start a collection and run it to the end of its mark phase."""
    dry_run = start(reactor, store, dry_run=True)
    finish(reactor, dry_run)
    operation = start(reactor, store)
    while operation.reports_of("mark") < dry_run.reports_of("mark"):
        reactor.run_one()
    return operation


def finish(reactor: SteppedReactor, operation: SteppedOperation[SweepResult]) -> SweepResult:
    async def wait() -> SweepResult:
        return await operation.ended

    return reactor.run(wait())


@pytest.mark.parametrize("child", range(4))
def test_a_child_used_after_the_mark_phase_retains_its_index(
    reactor: SteppedReactor, store: HostedTree, child: int
) -> None:
    """A push of the index finds its children and does not check their layers, so these must stay, too."""
    children = [image(b"config%d" % number, b"base", b"layer%d" % number) for number in range(4)]
    put_image(store, REPOSITORY, index(*children))
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    store.blobs.touch(children[child].digest)
    result = finish(reactor, operation)
    assert result.manifests == 0
    assert stored_digests(store) == closure(index(*children))
    assert set(store.links.layers(REPOSITORY)) == {Digest.of(blob) for child in children for blob in child.blobs}


@pytest.mark.parametrize("used", ["subject", "signature"])
def test_a_subject_and_its_signature_used_after_the_mark_phase_retain_each_other(
    reactor: SteppedReactor, store: HostedTree, used: str
) -> None:
    signature = image(b"sig", b"signature", subject=ONE)
    put_image(store, REPOSITORY, ONE)
    put_image(store, REPOSITORY, signature)
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    store.blobs.touch(ONE.digest if used == "subject" else signature.digest)
    assert finish(reactor, operation).manifests == 0
    assert stored_digests(store) == closure(ONE, signature)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_manifest_damaged_after_the_mark_phase_retains_its_repository(
    reactor: SteppedReactor, store: HostedTree, damage: str
) -> None:
    """Its references are read again when it turns out to be in use, and are unknown then."""
    put_image(store, REPOSITORY, BOTH)
    put_image(store, "other", image(b"other"))
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    store.blobs.touch(TWO.digest)
    path = Path(store.layout.blob(ONE.digest))
    path.unlink()
    if damage == "changed":
        path.write_bytes(b"{}")
    result = finish(reactor, operation)
    assert len(result.problems) == 1 and str(ONE.digest) in result.problems[0]
    assert closure(BOTH) - {ONE.digest} <= stored_digests(store)
    assert list(store.links.repositories()) == [REPOSITORY]
    assert set(store.links.layers(REPOSITORY)) == {Digest.of(blob) for part in (ONE, TWO) for blob in part.blobs}


def test_a_recently_used_index_retains_its_children(store: HostedTree) -> None:
    put_image(store, REPOSITORY, BOTH)
    age_blobs(store)
    store.blobs.touch(BOTH.digest)
    assert sweep(store.layout, delete_untagged=True).manifests == 0
    assert stored_digests(store) == closure(BOTH)


def test_a_blob_used_after_the_mark_phase_is_retained(reactor: SteppedReactor, store: HostedTree) -> None:
    put_image(store, REPOSITORY, ONE)
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    store.blobs.touch(Digest.of(b"base"))
    result = finish(reactor, operation)
    assert (result.manifests, result.links, result.blobs, result.recent) == (1, 2, 3, 1)
    assert store.links.has_layer(REPOSITORY, Digest.of(b"base"))
    assert stored_digests(store) == {Digest.of(b"base")}


def test_a_large_group_is_deleted_in_batches(reactor: SteppedReactor, store: HostedTree) -> None:
    children = [image(b"config%d" % number, b"base") for number in range(100)]
    large = index(*children)
    put_image(store, REPOSITORY, large)
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    while store.links.has_manifest(REPOSITORY, large.digest):
        reactor.run_one()
    later_child = next(child for child in children if store.links.has_manifest(REPOSITORY, child.digest))
    store.blobs.touch(later_child.digest)
    result = finish(reactor, operation)
    assert result.manifests in (32, 64, 96)
    remaining = [child for child in children if store.links.has_manifest(REPOSITORY, child.digest)]
    assert len(remaining) == 101 - result.manifests
    assert later_child in remaining
    assert stored_digests(store) == closure(*remaining)


def test_a_referrer_pushed_again_after_its_deletion_stays_in_the_index(
    reactor: SteppedReactor, store: HostedTree
) -> None:
    signature = image(b"sig", b"signature", subject=ONE)
    put_image(store, REPOSITORY, ONE, "v1")
    put_image(store, "other", signature)
    put_image(store, REPOSITORY, signature)
    store.links.remove_tag(REPOSITORY, "v1")
    age_blobs(store)
    operation = start_after_mark(reactor, store)
    while store.links.has_manifest(REPOSITORY, signature.digest):
        reactor.run_one()
    put_image(store, REPOSITORY, signature)
    finish(reactor, operation)
    assert len(list(store.referrers.list(REPOSITORY, ONE.digest, None))) == 1


def test_cleans_up_a_repository_only_under_its_lock(reactor: SteppedReactor, store: HostedTree) -> None:
    signature = image(b"sig", b"signature", subject=ONE)
    put_image(store, REPOSITORY, signature)
    age_blobs(store)
    push_lock = store.locks.hold(REPOSITORY)
    Deferred.fromCoroutine(push_lock.__aenter__())
    operation = start(reactor, store)
    while reactor.busy:
        reactor.run_one()
    assert not operation.ended.called, "it waits for the push"
    assert not store.links.has_manifest(REPOSITORY, signature.digest)
    assert os.path.exists(store.layout.referrer(REPOSITORY, ONE.digest, signature.digest))
    Deferred.fromCoroutine(push_lock.__aexit__(None, None, None))
    finish(reactor, operation)
    assert not os.path.exists(store.layout.referrer(REPOSITORY, ONE.digest, signature.digest))


@pytest.fixture
def single_deletions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete one link or blob per step."""
    monkeypatch.setattr(sweep_module, "_BATCH", 1)


def test_a_stopped_collection_leaves_no_staged_files(
    reactor: SteppedReactor, store: HostedTree, single_deletions: None
) -> None:
    put_image(store, REPOSITORY, BOTH)
    age_blobs(store)
    steps = 0
    while True:
        operation = start(reactor, store)
        for _ in range(steps):
            reactor.run_one()
        if operation.ended.called:
            break
        operation.stop()
        with pytest.raises(Stopped):
            finish(reactor, operation)
        assert not reactor.busy
        assert not os.path.exists(store.layout.staging) or os.listdir(store.layout.staging) == []
        steps += 1
    assert steps > 20
    assert stored_digests(store) == set()


# SafeDelete

Change = Callable[[HostedTree], object]

CONFIG = Digest.of(b"config1")


def delete_blob(safe_delete: SafeDelete) -> DeleteOutcome:
    return safe_delete.delete_blob(CONFIG)[0]


def unlink_layer(safe_delete: SafeDelete) -> DeleteOutcome:
    return safe_delete.unlink_layer(REPOSITORY, CONFIG)


def unlink_manifests(safe_delete: SafeDelete) -> DeleteOutcome:
    return safe_delete.unlink_manifests(REPOSITORY, [ONE.digest, TWO.digest])


DELETIONS: list[tuple[Callable[[SafeDelete], DeleteOutcome], Digest]] = [
    (delete_blob, CONFIG), (unlink_layer, CONFIG), (unlink_manifests, ONE.digest), (unlink_manifests, TWO.digest)
]  # fmt: skip


@pytest.mark.parametrize(("delete", "digest"), DELETIONS)
@pytest.mark.parametrize("call_number", range(6))
def test_a_concurrent_use_prevents_deletion_or_fails(
    store: HostedTree, monkeypatch: pytest.MonkeyPatch, delete: Any, digest: Digest, call_number: int
) -> None:
    """Another thread uses the blob between any two system calls of the deletion."""
    put_image(store, REPOSITORY, BOTH)
    age_blobs(store)
    touches: list[int | None] = []
    calls = iter(range(100))

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if next(calls) == call_number:
                monkeypatch.undo()
                touches.append(store.blobs.touch(digest))
            return result

        return call

    for name in ("stat", "rename"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    safe_delete = SafeDelete(store.layout, time.time() - 3600)
    outcome = delete(safe_delete)
    monkeypatch.undo()
    exists = store.blobs.exists(digest)
    linked = store.links.has_layer(REPOSITORY, CONFIG) and store.links.has_manifest(REPOSITORY, ONE.digest)
    linked = linked and store.links.has_manifest(REPOSITORY, TWO.digest)
    if outcome is DeleteOutcome.DELETED:
        assert not (exists and linked)
        assert touches in ([], [None]) or not linked, "the use succeeded, but the object was deleted"
    else:
        assert exists and linked
    if touches and touches[0] is not None and delete is delete_blob:
        assert outcome is DeleteOutcome.IN_USE
    assert os.listdir(store.layout.staging) == []
    assert store.links.manifest_media_type(REPOSITORY, ONE.digest) == (
        None if outcome is DeleteOutcome.DELETED and delete is unlink_manifests else ONE.media_type
    )


def test_a_link_rewritten_during_deletion_is_retained(store: HostedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push finds no link and writes one, but finds the media type. Neither file may be lost."""
    put_image(store, REPOSITORY, ONE)
    age_blobs(store)
    real = os.rename

    def rename(source: str, target: str) -> None:
        real(source, target)
        monkeypatch.undo()
        store.blobs.touch(ONE.digest)
        path = Path(store.layout.manifest(REPOSITORY, ONE.digest))
        path.parent.mkdir(parents=True)
        path.write_text(str(ONE.digest))

    monkeypatch.setattr(os, "rename", rename)
    safe_delete = SafeDelete(store.layout, time.time() - 3600)
    assert safe_delete.unlink_manifests(REPOSITORY, [ONE.digest]) is DeleteOutcome.IN_USE
    assert store.links.has_manifest(REPOSITORY, ONE.digest)
    assert store.links.manifest_media_type(REPOSITORY, ONE.digest) == ONE.media_type
    assert os.listdir(store.layout.staging) == []


# Symbolic links


@pytest.mark.parametrize("part", ["repository", "tag", "blob prefix", "blob", "layer"])
def test_a_symbolic_link_stops_the_collection_before_it_leads_anywhere(
    store: HostedTree, tmp_path: Path, part: str
) -> None:
    put_image(store, REPOSITORY, ONE, "v1")
    garbage = Digest.of(b"garbage")
    store.blobs.put(b"garbage", garbage)
    store.links.link_layer(REPOSITORY, garbage)
    age_blobs(store)
    path = Path(
        {
            "repository": store.layout.repository(REPOSITORY),
            "tag": store.layout.tag_current(REPOSITORY, "v1"),
            "blob prefix": Path(store.layout.blob(garbage)).parents[1],
            "blob": Path(store.layout.blob(garbage)).parent,
            "layer": Path(store.layout.layer(REPOSITORY, garbage)).parent,
        }[part]
    )
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(UnsafeFile, match=f"{path} is a symbolic link, which is not followed"):
        sweep(store.layout, delete_untagged=True)
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before
    assert closure(ONE) <= stored_digests(store)
