"""Runs of garbage collection in a bucket by themselves: the garbage, the rest, and the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dockerproxy.bucket import gc_collector, keys
from dockerproxy.bucket.gc_collector import GCRefused
from dockerproxy.bucket.gc_runs import (
    RUNS,
    Times,
    begun_key,
    condemned_key,
    decision_key,
    end_key,
    gone_key,
    list_runs,
)
from dockerproxy.errors import ManifestBlobUnknown, StoreUnavailable, UpstreamTimeout
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, Tag, parse_repository, parse_tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.sweep import InvalidGracePeriod, RemovedItem, SweepResult
from tests.bucket.support.gc_world import APP, TIMES, Process, World, failure_of
from tests.registry.support.hosted_store_suite import make_image
from tests.support.fake_store import LOCATION, refusal

OTHER = parse_repository("other/place")
V1 = parse_tag("v1")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.abandon()


def collect(world: World, **options: Any) -> SweepResult:
    """Run gc, and return its result."""
    process = world.collector(**options)
    world.run(process)
    failure = failure_of(process)
    if failure is not None:
        raise failure
    return world.results[-1]


def ours(world: World) -> list[str]:
    """Return the keys without those of gc itself."""
    return [key for key in world.store.keys() if not key.startswith(("dockerproxy/gc/", keys.PROBES))]


def put_image(world: World, seed: bytes, *tags: Tag, repository: Any = APP, **options: Any) -> Digest:
    world.put_blob(seed, repository)
    return world.put_manifest(make_image(seed, **options), *tags, repository=repository)


def put_index(world: World, *children: Digest, tags: tuple[Tag, ...] = ()) -> Digest:
    listed = [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 1} for child in children]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    return world.put_manifest(PushedManifest.parse(json.dumps(document).encode(), None, OCI_INDEX), *tags)


# garbage, and the rest


def test_blobs_that_no_manifest_needs(world: World) -> None:
    image = put_image(world, b"needed", V1)
    waste = world.put_blob(b"waste")
    world.put_blob(b"waste", OTHER)
    before = ours(world)
    result = collect(world)
    assert (result.blobs, result.links, result.bytes, result.manifests) == (1, 2, 5, 0)
    assert (result.repositories, result.needed, result.recent, result.problems) == (2, 2, 0, ())
    gone = {keys.blob_key(waste), keys.layer_key(APP, waste), keys.layer_key(OTHER, waste)}
    assert set(before) - set(ours(world)) == gone
    assert world.has_content(image)


def test_a_dry_run_changes_nothing(world: World) -> None:
    put_image(world, b"untagged")
    world.put_blob(b"waste")
    before = dict(world.store.objects)
    result = collect(world, dry_run=True, delete_untagged=True)
    assert result.dry_run and (result.manifests, result.blobs, result.links) == (1, 3, 0)
    assert world.store.objects == before


def test_what_is_young_stays(world: World) -> None:
    old, young = world.put_blob(b"old content, young link"), world.put_blob(b"young")
    world.store.store(LOCATION.prefix + keys.layer_key(APP, old), b"x")
    world.store.store(LOCATION.prefix + keys.blob_key(young), b"young")
    result = collect(world)
    assert world.has_content(old) and world.has_content(young)
    assert (result.blobs, result.recent, result.recent_bytes) == (0, 1, 5)


def test_a_link_that_a_repository_does_not_need(world: World) -> None:
    image = put_image(world, b"shared", V1)
    world.put_blob(b"shared", OTHER)
    result = collect(world)
    assert (result.links, result.blobs) == (1, 0)
    assert keys.layer_key(OTHER, Digest.of(b"shared")) not in ours(world)
    assert keys.layer_key(APP, Digest.of(b"shared")) in ours(world) and world.has_content(image)


def test_untagged_manifests_stay_unless_asked_for(world: World) -> None:
    untagged = put_image(world, b"untagged")
    assert collect(world).manifests == 0
    assert world.has_content(untagged)
    result = collect(world, delete_untagged=True)
    assert (result.manifests, result.blobs, result.links) == (1, 2, 1)
    assert [key for key in ours(world) if key.startswith("docker/")] == []


def test_what_belongs_together_stays_or_goes_together(world: World) -> None:
    child, subject = put_image(world, b"child"), put_image(world, b"subject", V1)
    signature = put_image(world, b"signature", subject=subject)
    index = put_index(world, child, tags=(parse_tag("both"),))
    dead_child = put_image(world, b"dead child")
    dead = put_index(world, dead_child)
    dead_signature = put_image(world, b"dead signature", subject=dead)
    world.put(keys.referrer_key(APP, dead, dead_signature), b"null\n{}")
    result = collect(world, delete_untagged=True)
    assert result.manifests == 3
    assert all(world.has_content(digest) for digest in (child, subject, signature, index))
    assert not any(world.has_content(digest) for digest in (dead, dead_child, dead_signature))
    assert not [key for key in ours(world) if any(gone.hex in key for gone in (dead, dead_child, dead_signature))]


def test_tags_of_signatures_end_with_their_image(world: World) -> None:
    image, living = put_image(world, b"image"), put_image(world, b"living", V1)
    signatures = [
        put_image(world, b"of " + digest.hex.encode(), Tag(f"sha256-{digest.hex}.sig")) for digest in (image, living)
    ]
    result = collect(world, delete_untagged=True)
    assert result.manifests == 2
    assert [world.has_content(digest) for digest in (image, living, *signatures)] == [False, True, False, True]
    assert keys.tag_key(APP, f"sha256-{living.hex}.sig") in ours(world)
    assert not [key for key in ours(world) if f"sha256-{image.hex}" in key]


def test_a_repository_without_manifests_leaves_the_catalog(world: World) -> None:
    put_image(world, b"image", V1)
    put_image(world, b"untagged", repository=OTHER)
    for key in (keys.catalog_key("gone/away"), keys.indexed_key(OTHER)):
        world.put(key, b"")
    world.store._delete(LOCATION.prefix + keys.catalog_key(APP))  # a node died before it could write it
    collect(world, delete_untagged=True)
    assert [key for key in ours(world) if key.startswith("dockerproxy/")] == [keys.catalog_key(APP)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda world, image: world.put(keys.blob_key(image), b"{}"), "is damaged"),
        (lambda world, image: world.store._delete(LOCATION.prefix + keys.blob_key(image)), "is missing"),
        (lambda world, image: world.put(keys.blob_key(image), b"x" * (5 << 20)), "cannot be read"),
    ],
    ids=["damaged", "missing", "too long"],
)  # fmt: skip
def test_nothing_of_a_repository_goes_if_a_manifest_cannot_be_read(
    world: World, damage: Callable[[World, Digest], None], reason: str
) -> None:
    image = put_image(world, b"image", V1)
    waste, elsewhere = world.put_blob(b"waste"), world.put_blob(b"elsewhere", OTHER)
    damage(world, image)
    for untagged in (False, True):
        result = collect(world, delete_untagged=untagged)
        (problem,) = result.problems
        assert problem.startswith("team/app: ") and reason in problem
        assert world.has_content(waste) and world.has_content(Digest.of(b"image"))
    assert not world.has_content(elsewhere)


@pytest.mark.parametrize(
    "link", [b"torn", b"", b"x" * 5000, str(Digest.of(b"nothing")).encode()], ids=["torn", "empty", "long", "missing"]
)
def test_a_tag_that_leads_nowhere(world: World, link: bytes) -> None:
    put_image(world, b"image", V1)
    waste = world.put_blob(b"waste")
    world.put(keys.tag_key(APP, "bad"), link)
    for untagged in (False, True):
        (problem,) = collect(world, delete_untagged=untagged).problems
        assert "bad" in problem and problem.endswith("run `dockerproxy rm team/app:bad`")
    assert world.has_content(waste)


def test_more_than_one_run_can_condemn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_collector, "MAX_ENTRIES", 4)
    put_image(world, b"needed elsewhere", V1, repository=OTHER)
    world.put_blob(b"needed elsewhere")
    for number in range(5):
        world.put_blob(b"%d" % number)
    first = collect(world)
    assert (first.blobs, first.links) == (4, 4), "a link goes with its content"
    assert first.problems == ("2 more links and contents can be deleted; run gc again",)
    assert (collect(world).problems, world.results[-1].blobs, world.results[-1].links) == ((), 1, 2)
    assert not [key for key in ours(world) if key.startswith(f"{keys.REPOSITORIES}{APP}/")]


def test_uploads_in_parts_that_were_given_up(world: World) -> None:
    for upload, prefix, age in (("old", keys.BLOBS, TIMES.keep + 2), ("new", keys.BLOBS, 60), ("other", "x/", 1e6)):
        world.store.uploads[upload] = {1: b"part"}
        world.store.upload_keys[upload] = f"{LOCATION.prefix}{prefix}data", world.store.now() - age
    assert collect(world, dry_run=True).uploads == 1
    assert collect(world).uploads == 1
    assert sorted(world.store.uploads) == ["new", "other"]
    world.store.fail(refusal(501, "NotImplemented"), only="GET  uploads")


# runs


def runs(world: World) -> list[tuple[int, bool, bool]]:
    names = [key.removeprefix(RUNS) for key in world.store.keys() if key.startswith(RUNS)]
    numbers = sorted({int(name.partition(".")[0]) for name in names})
    return [(number, f"{number}.condemned" in names, f"{number}.end" in names) for number in numbers]


def test_the_objects_of_a_run(world: World) -> None:
    waste = world.put_blob(b"waste")
    assert collect(world).blobs == 1
    assert runs(world) == [(1, True, True)]
    condemned = world.store.objects[LOCATION.prefix + condemned_key(1)]
    assert condemned.decode().splitlines() == [str(waste)]
    assert world.store.objects[LOCATION.prefix + decision_key(1, str(waste))] == b"deleting"
    assert gone_key(1, str(waste)) in world.store.keys()
    assert collect(world).blobs == 0
    assert runs(world) == [(1, True, True), (2, False, True)], "nothing was to be condemned"
    world.advance(TIMES.keep + 1)
    collect(world)
    assert runs(world) == [(3, False, True)]
    assert not [key for key in world.store.keys() if key.startswith("dockerproxy/gc/1/")]


def test_one_run_at_a_time(world: World) -> None:
    world.put_blob(b"waste")
    first = world.collector()
    world.run(first, 12)
    with pytest.raises(GCRefused, match=r"run by gc 1, which reported \d+ s ago") as refused:
        collect(world)
    assert refused.value.is_busy
    world.run(first)
    assert failure_of(first) is None
    assert collect(world).blobs == 0


def test_two_that_begin_at_once(world: World) -> None:
    processes = [world.collector(), world.collector()]
    while not all(process.is_done for process in processes):
        if world.pending:
            world.answer(world.pending[0])
        else:
            world.advance(world.next_call() or 0)
    failures = [failure_of(process) for process in processes]
    assert sum(failure is None for failure in failures) == 1
    assert any(isinstance(failure, GCRefused) and failure.is_busy for failure in failures)


def test_a_store_that_ignores_conditions(world: World) -> None:
    world.put_blob(b"waste")
    before = dict(world.store.objects)
    world.store.knows_conditions = False
    with pytest.raises(GCRefused, match="does not keep to If-None-Match"):
        collect(world)
    assert world.store.objects == before
    assert collect(world, dry_run=True).blobs == 1, "it needs none"


def test_a_store_that_refuses_conditions(world: World) -> None:
    world.store.fail(refusal(501, "NotImplemented", "no conditions"), only="PUT dockerproxy/probe")
    with pytest.raises(GCRefused, match=r"If-None-Match: .*no conditions"):
        collect(world)


@pytest.mark.parametrize("grace", [0.0, 119.0, float("nan")])
def test_a_grace_period_that_is_too_short(world: World, grace: float) -> None:
    with pytest.raises(InvalidGracePeriod, match="at least 120"):
        collect(world, grace=grace)


def test_times_can_be_scaled() -> None:
    scaled = Times.scaled(0.01)
    assert (scaled.shortest_grace, scaled.dead, scaled.look) == (1.2, 18.0, 0.3)
    assert Times.scaled(1.0) == Times()
    assert TIMES.dead > TIMES.trust + TIMES.decision + TIMES.delete
    assert TIMES.shortest_grace > TIMES.push + TIMES.look


def stop_at(phase: str) -> Progress[RemovedItem]:
    def report(reported: str, done: int, total: int | None) -> None:
        if reported == phase:
            raise Stopped

    return Progress(report)


@pytest.mark.parametrize("phase", ["mark", "wait", "sweep"])
def test_a_run_that_is_stopped_ends(world: World, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waste = world.put_blob(b"waste")
    monkeypatch.setattr("tests.bucket.support.gc_world.Progress", lambda: stop_at(phase))
    with pytest.raises(Stopped):
        collect(world)
    monkeypatch.undo()
    assert runs(world)[-1][2]
    assert world.has_content(waste)
    assert collect(world).blobs == 1


def run_until(world: World, process: Process, text: str) -> None:
    """Let the process go on until it sends a request with `text`, which waits for its answer then."""
    while not any(text in str(request) for request in world.requests_of(process)):
        assert not process.is_done, process.outcome
        world.run(process, 1)
        if not list(world.requests_of(process)):
            world.advance(world.next_call() or 0)


def test_a_delete_without_an_answer_is_waited_for(world: World) -> None:
    """It may be applied later, so until then nobody may write the content again."""
    waste = world.put_blob(b"waste")
    process = world.collector()
    run_until(world, process, f"DELETE /site/{keys.blob_key(waste)}")
    before = world.clock.seconds()
    world.advance(61)  # it is given up
    assert gone_key(1, str(waste)) not in world.store.keys()
    world.run(process, 1)
    assert not process.is_done
    world.run(process)
    assert failure_of(process) is None
    assert world.clock.seconds() - before > TIMES.delete
    assert runs(world) == [(1, True, True)]
    assert len([request for request in world.store.requests if request.method == "DELETE" and waste.hex in request.key])
    assert collect(world).blobs == 1


def test_a_decision_that_came_late_deletes_nothing(world: World) -> None:
    """The machine slept between the decision and the DELETE, and others may believe that this one is dead."""
    waste = world.put_blob(b"waste")
    process = world.collector()
    run_until(world, process, f"PUT /site/{decision_key(1, str(waste))}")
    world.advance(TIMES.decision + 1)
    world.run(process)
    assert failure_of(process) is None
    assert world.has_content(waste)
    assert gone_key(1, str(waste)) in world.store.keys(), "no DELETE is under way"
    assert world.results[-1].recent == 1
    assert collect(world).blobs == 1


def test_a_machine_that_slept_gives_its_run_up(world: World) -> None:
    blobs = [world.put_blob(b"%d" % number) for number in range(20)]
    process = world.collector()
    run_until(world, process, "/k/")
    world.clock.advance(TIMES.trust + 1)
    world.run(process)
    assert isinstance(failure_of(process), GCRefused) and "stood still" in str(failure_of(process))
    assert all(map(world.has_content, blobs))
    assert collect(world).blobs == 20


def test_a_store_that_fails_in_the_middle(world: World) -> None:
    for number in range(30):
        world.put_blob(b"%d" % number)
    process = world.collector()
    run_until(world, process, "/k/")
    world.store.fail(refusal(403, "AccessDenied"), times=3, only="/k/")
    world.run(process)
    assert isinstance(failure_of(process), StoreUnavailable)
    assert runs(world) == [(1, True, True)]
    collect(world)
    assert [key for key in ours(world) if key.startswith("docker/")] == []


# nodes meanwhile


def begin_run(world: World, text: str) -> Process:
    """Begin a run, and stop before it sends a request with `text`."""
    process = world.collector(delete_untagged=True)
    run_until(world, process, text)
    return process


def test_what_is_asked_for_stays(world: World) -> None:
    blob, image = world.put_blob(b"blob"), put_image(world, b"config")
    world.put_blob(b"blob", OTHER)
    collector = begin_run(world, "/k/")
    node, store = world.node("node")
    for asked in (store._writer.view.look(), store.blob_size(APP, blob), store.manifest(APP, image)):
        node.do(asked)
        world.run(node)
        assert failure_of(node) is None
    world.run(collector)
    assert world.has_content(blob) and world.has_content(image) and world.has_content(Digest.of(b"config"))
    assert {keys.layer_key(name, blob) for name in (APP, OTHER)} <= set(ours(world)), "its links stay, too"
    assert world.results[-1].recent_manifests == 1
    assert collect(world, delete_untagged=True).manifests == 1, "only for this run"


def test_what_is_being_deleted_is_not_there(world: World) -> None:
    blob = world.put_blob(b"blob")
    collector = begin_run(world, f"DELETE /site/{keys.blob_key(blob)}")
    node, store = world.node("node")
    node.do(store._writer.view.look())
    world.run(node)
    node.do(store.blob_size(APP, blob))
    world.run(node)
    assert node.outcome == [None]
    world.run(collector)


def begin_upload(world: World, content: bytes) -> Process:
    node, store = world.node("node")

    async def upload() -> None:
        await store._writer.view.look()
        await store._contents.add_bytes(content, Digest.of(content))
        await store._contents.link_layer(APP, Digest.of(content))

    node.do(upload())
    return node


def test_an_upload_waits_until_it_is_gone(world: World) -> None:
    blob = world.put_blob(b"blob")
    collector = begin_run(world, f"DELETE /site/{keys.blob_key(blob)}")
    node = begin_upload(world, b"blob")
    for _ in range(40):
        for request in list(world.requests_of(node)):
            world.answer(request)
        world.clock.advance(0.1)
    assert not node.is_done and keys.blob_key(blob) in world.store.keys()
    for request in list(world.requests_of(collector)):
        world.answer(request)
    assert keys.blob_key(blob) not in world.store.keys()
    world.run(collector)
    world.run(node)
    assert failure_of(node) is None
    assert world.has_content(blob) and keys.layer_key(APP, blob) in world.store.keys()


def test_an_upload_does_not_wait_for_ever(world: World) -> None:
    blob = world.put_blob(b"blob")
    begin_run(world, f"DELETE /site/{keys.blob_key(blob)}").kill()
    node = begin_upload(world, b"blob")
    world.run(node)
    failure = failure_of(node)
    assert isinstance(failure, StoreUnavailable) and "try again" in failure.message and failure.headers
    world.advance(TIMES.delete + 1)  # the collector is dead
    node = begin_upload(world, b"blob")
    world.run(node)
    assert failure_of(node) is None and world.has_content(blob)
    assert runs(world) == [(1, True, False)], "nothing of the run sticks"


def test_an_upload_goes_on_if_the_run_ends_without_gone(world: World) -> None:
    blob = world.put_blob(b"blob")
    begin_run(world, f"DELETE /site/{keys.blob_key(blob)}").kill()
    world.pending.clear()
    node = begin_upload(world, b"blob")
    for _ in range(20):
        for request in list(world.requests_of(node)):
            world.answer(request)
    world.store.store(LOCATION.prefix + end_key(1), b"")
    world.run(node)
    assert failure_of(node) is None


def test_a_slow_push_is_no_success(world: World) -> None:
    """gc may have looked for the tag before it was there."""
    image = make_image(b"config")
    world.put_blob(b"config")
    node, store = world.node("node")
    node.do(store.commit_manifest(APP, image, [V1]))
    run_until(world, node, "/_manifests/revisions/")
    for request in list(world.requests_of(node)):
        world.answer(request)
    while not any("tags/v1/current" in str(request) for request in world.requests_of(node)):
        for request in list(world.requests_of(node)):
            world.answer(request)
    world.clock.advance(TIMES.push + 1)
    world.run(node)
    failure = failure_of(node)
    assert isinstance(failure, StoreUnavailable) and "more than 60 s" in failure.message


def test_a_manifest_whose_blob_is_gone_is_refused_and_stays(world: World) -> None:
    blob = world.put_blob(b"config")
    collector = begin_run(world, f"DELETE /site/{keys.layer_key(APP, blob)}")
    node, store = world.node("node")  # it does not know of the run yet
    image = make_image(b"config")
    node.do(store.commit_manifest(APP, image, [V1]))
    world.run(node)
    assert isinstance(failure_of(node), ManifestBlobUnknown)
    assert keys.manifest_key(APP, image.digest) in world.store.keys()
    assert keys.tag_key(APP, V1) not in world.store.keys()
    world.run(collector)


def test_a_node_looks_every_half_minute(world: World) -> None:
    node, store = world.node("node")
    store.start()
    world.put_blob(b"waste")
    begin_run(world, "/k/")
    for request in list(world.requests_of(node)):
        world.answer(request)
    world.clock.advance(30)
    while any(world.requests_of(node)):
        for request in list(world.requests_of(node)):
            world.answer(request)
    assert not store._writer.view.current.is_empty
    world.store.fail(UpstreamTimeout("down"), times=20)
    world.clock.advance(30)
    for request in list(world.requests_of(node)):
        with pytest.raises(UpstreamTimeout):
            world.answer(request)


def test_list_runs_skips_what_is_no_run(world: World) -> None:
    node = world.node("node")[0]
    for name in ("x", "0.begun", "1.begun", "1.other", "9999999999.begun", "2.end/x"):
        world.put(f"{RUNS}{name}", b"")
    node.do(list_runs(node.bucket()))
    world.run(node)
    assert [run.number for run in node.outcome[0]] == [1]
    assert begun_key(1) == f"{RUNS}1.begun"
