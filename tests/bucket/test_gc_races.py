"""Pushes and garbage collection in a bucket at the same time, by the real code over a store in memory.

Two nodes push, collectors run and are killed at any request, and requests arrive late. No push that was acknowledged
may ever lack anything, and all that nothing needs goes in the end. The same must fail without a rule of the protocol.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import pytest

from dockerproxy.bucket import gc_collector, keys
from dockerproxy.bucket.gc_survey import Survey
from dockerproxy.bucket.gc_view import GCView
from dockerproxy.bucket.manifest_writer import ManifestWriter
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.oci.names import Digest, parse_tag
from tests.bucket.support.gc_world import TIMES, Process, World, failure_of
from tests.registry.support.hosted_store_suite import make_image

pytestmark = pytest.mark.slow  # tries hundreds of orders of requests

BLOB, OTHER_BLOB, LAYER = b"config", b"another config", b"a layer of both"
IMAGE, OTHER_IMAGE = make_image(BLOB, LAYER), make_image(OTHER_BLOB, LAYER)
V1, V2 = parse_tag("v1"), parse_tag("v2")

STRIDE = int(os.environ.get("GC_RACES_STRIDE", "29"))
"""Each so manieth order of two processes is tried. 1 takes a minute."""
SEEDS = int(os.environ.get("GC_RACES_SEEDS", "6"))


@pytest.fixture(autouse=True)
def rare_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run that waits report rarely, because each report takes time."""
    monkeypatch.setattr(gc_collector, "_TICK", 40.0)


def make_world(*, untagged: bool) -> World:
    """Return a store with old contents that nothing needs: blobs, and with `untagged` a manifest that needs them."""
    world = World()
    for blob in (BLOB, LAYER, b"waste"):
        world.put_blob(blob)
    if untagged:
        world.put_manifest(IMAGE)
    else:  # so that the repository is in the catalog
        world.put_blob(b"kept")
        world.put_manifest(make_image(b"kept"), parse_tag("kept"))
    return world


def begin_push(world: World, name: str = "node", **push: Any) -> Process:
    process, store = world.node(name)
    process.do(world.push(store, push.get("image", IMAGE), push.get("blobs", [BLOB, LAYER]), push.get("tag", V1)))
    return process


# one push, one collector, and two changes between them


def interleave(untagged: bool, first: int, second: int) -> tuple[World, bool]:
    """Let the collector send `first` requests, then the push `second`, then the collector the rest, then the push.

    Return whether that was a case of its own: both were still under way.
    """
    world = make_world(untagged=untagged)
    collector = world.collector(delete_untagged=untagged)
    sent = world.run(collector, first)
    push = begin_push(world)
    pushed = world.run(push, second)
    world.run(collector)
    world.run(push)
    assert failure_of(collector) is None, failure_of(collector)
    return world, sent == first and pushed == second


def interleavings(untagged: bool, stride: int = 1, start: int = 0) -> Iterator[World]:
    """Yield the worlds after all pairs of such changes, or after each `stride`th, from the request `start` on."""
    for first in count(start):
        for second in count(first % stride, stride):
            world, is_new = interleave(untagged, first, second)
            yield world
            if not is_new:
                break
        if second == first % stride:
            return


@pytest.mark.parametrize("untagged", [False, True], ids=["blobs", "untagged"])
def test_a_push_in_the_middle_of_a_run(untagged: bool) -> None:
    worlds = list(interleavings(untagged, STRIDE))
    assert len(worlds) > 25
    assert not [world.lost() for world in worlds if world.lost()]
    acknowledged = [world for world in worlds if world.acknowledged]
    assert len(acknowledged) > len(worlds) / 4
    assert any(not world.acknowledged for world in worlds), "some pushes are refused"
    collected = [world for world in worlds if not world.has_content(Digest.of(b"waste"))]
    assert len(collected) > len(worlds) * 3 / 4, "in the others the push waited so long that the decision was late"
    rescued = [world for world in worlds if b"rescued" in world.store.objects.values()]
    assert rescued
    assert any(world.results[0].blobs > 1 and world.acknowledged for world in worlds), "a blob was pushed again"


async def _no_look(view: GCView) -> Any:
    return view.current


async def _no_decision(bucket: S3Bucket, key: str, content: bytes) -> bytes:
    if "/k/" not in key:
        return await _create(bucket, key, content)
    await bucket.put(key, content)
    return content


async def _no_rewriting(writer: ManifestWriter, repository: Any, manifest: Any) -> list[str]:
    digest = manifest.digest
    if await writer.bucket.size(keys.manifest_key(repository, digest)) is None:
        return await _write_manifest(writer, repository, manifest)
    return []


async def _yes(*arguments: object) -> bool:
    return True


_write_manifest = ManifestWriter._write_manifest
_create = S3Bucket.create


def _weaken(name: str, patch: pytest.MonkeyPatch) -> None:
    """Take a rule of the protocol out of the code."""
    match name:
        case "no fresh look":
            patch.setattr(GCView, "look", _no_look)
        case "no decision":
            patch.setattr(S3Bucket, "create", _no_decision)
        case "no last look":
            patch.setattr(ManifestWriter, "_has_all", _yes)
        case "no second mark":
            patch.setattr(gc_collector.Garbage, "keep_only", lambda self, other: None)
        case "no rewriting":
            patch.setattr(ManifestWriter, "_write_manifest", _no_rewriting)
        case "no age":
            patch.setattr(Survey, "_is_young", lambda self, age: self._first is None and age <= TIMES.shortest_grace)
            patch.setattr("dockerproxy.bucket.gc_survey.plan_repository", _plan_without_ages)


def _plan_without_ages(repository: Any, targets: Any, references: Any, grace: float) -> Any:
    from dockerproxy.bucket.gc_plan import plan_repository

    return plan_repository(repository, targets, references, -1.0)


@pytest.mark.parametrize(
    ("weakness", "untagged"),
    [
        ("no fresh look", False),
        ("no decision", False),
        ("no second mark", False),
        ("no rewriting", True),
        ("no age", True),
    ],
    ids=["no fresh look", "no decision", "no second mark", "no rewriting", "no age"],
)
def test_a_push_is_lost_without_a_rule(weakness: str, untagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _weaken(weakness, monkeypatch)
    assert any(world.lost() for world in chain(pushes_first(untagged, 5), interleavings(untagged, STRIDE)))


def test_a_push_is_lost_without_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    _weaken("no last look", monkeypatch)
    late = 45  # while the run deletes; it may end before the push looks at the runs
    assert any(world.lost() for world in interleavings(True, start=late))


def pushes_first(untagged: bool, stride: int = 1) -> Iterator[World]:
    """Let the push send some requests, then the collector some, then the push the rest, then the collector."""
    for first in count():
        for second in count(first % stride, stride):
            world = make_world(untagged=untagged)
            push = begin_push(world)
            if world.run(push, first) < first:
                return
            collector = world.collector(delete_untagged=untagged)
            is_new = world.run(collector, second) == second
            world.run(push)
            world.run(collector)
            yield world
            if not is_new:
                break


@pytest.mark.parametrize("untagged", [False, True], ids=["blobs", "untagged"])
def test_a_run_in_the_middle_of_a_push(untagged: bool) -> None:
    worlds = list(pushes_first(untagged, STRIDE))
    assert len(worlds) > 25
    assert not [world.lost() for world in worlds if world.lost()]
    assert len([world for world in worlds if world.acknowledged]) > len(worlds) / 4


# all at once, in any order


class Chaos:
    """Two nodes that push, one after the other images, and collectors that are killed."""

    def __init__(self, seed: int, *, untagged: bool) -> None:
        self.random = random.Random(seed)
        self.untagged = untagged
        self.world = make_world(untagged=untagged)
        self.collector: Process | None = None
        self.pushes = [begin_push(self.world, "first"), begin_push(self.world, "second", tag=V2)]
        self.pushes_left = 4
        self.kills = 0

    def run(self, steps: int = 900) -> str:
        """Do so many steps, and bring all to an end. Return a key that a push lacked, or ``""``."""
        for _ in range(steps):
            self.step()
            if lost := self.world.lost():
                return lost
        for process in (*self.pushes, self.collector):
            if process is not None:
                self.world.run(process)
        return self.world.lost() or self.collect_the_rest()

    def step(self) -> None:
        world, chance = self.world, self.random.random()
        if self.collector is None or self.collector.is_done:
            self.collector = world.collector(delete_untagged=self.untagged)
        elif chance < 0.005:
            self.collector.kill()
            self.collector, self.kills = None, self.kills + 1
            world.advance(self.random.choice([0.0, TIMES.dead + 1]))
        for number, push in enumerate(self.pushes):
            if push.is_done and self.pushes_left and chance > 0.9:
                self.pushes_left -= 1
                image, blobs = self.random.choice([(IMAGE, [BLOB, LAYER]), (OTHER_IMAGE, [OTHER_BLOB, LAYER])])
                tag = (V1, V2)[number]
                world.acknowledged = [done for done in world.acknowledged if done.tag != tag]
                self.pushes[number] = begin_push(world, f"{number}", image=image, blobs=blobs, tag=tag)
        if world.pending and chance < 0.95:
            world.answer(self.random.choice(world.pending))
        elif (pause := world.next_call()) is not None:
            world.advance(pause)

    def collect_the_rest(self) -> str:
        """Run gc until nothing is under way. Return a sentence if garbage is left."""
        world = self.world
        world.pending.clear()
        world.advance(TIMES.dead + TIMES.delete + 1)
        for _ in range(2):
            world.run(world.collector(delete_untagged=self.untagged))
        if world.lost():
            return world.lost()
        return "waste is left" if world.has_content(Digest.of(b"waste")) else ""


@pytest.mark.parametrize("untagged", [False, True], ids=["blobs", "untagged"])
def test_chaos(untagged: bool) -> None:
    kills = pushes = 0
    for seed in range(SEEDS):
        chaos = Chaos(seed, untagged=untagged)
        assert chaos.run() == "", f"seed {seed}"
        kills, pushes = kills + chaos.kills, pushes + len(chaos.world.acknowledged)
    assert kills > SEEDS and pushes > SEEDS / 2


@pytest.mark.parametrize("at", range(60))
def test_a_collector_is_killed_at_each_request(at: int) -> None:
    """Its requests arrive or not; the next run goes on once it is dead, and a push in between is safe."""
    for arrives in (False, True):
        world = make_world(untagged=True)
        killed = world.collector(delete_untagged=True)
        world.run(killed, at)
        killed.kill()
        if arrives:
            for request in list(world.pending):
                world.answer(request)
        world.run(begin_push(world))
        for request in list(world.pending):
            world.answer(request)
        assert not world.lost()
        busy = world.collector(delete_untagged=True)
        world.run(busy)
        world.advance(TIMES.dead + 1)
        world.run(begin_push(world, tag=V2))
        assert [push.tag for push in world.acknowledged][-1] == V2
        world.run(world.collector(delete_untagged=True))
        assert not world.lost()
        assert not world.has_content(Digest.of(b"waste"))
