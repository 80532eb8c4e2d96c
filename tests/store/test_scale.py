"""Scalability tests: long-running work consists of short steps, which bounds the delay of requests.

The tests do not measure time. The cost of a step, or of a reactor iteration, is the number of calls made in it,
including system calls. The cost of Python's garbage collection is the number of tracked objects. Both must not grow
with the registry.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.oci.names import Digest
from dockerproxy.store import lru_index
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.importer import Importer
from dockerproxy.store.layout import Layout
from dockerproxy.store.mark import Mark
from dockerproxy.store.scrub import Scrubber
from dockerproxy.store.sweep import Sweeper
from tests.store.support.images import ManifestTree, image, index
from tests.store.support.reactor import SteppedReactor

SMALL, LARGE = 30, 150
REPOSITORY = "library/many"

Operation = Callable[[SteppedReactor, Path, CooperativeThread], Coroutine[Any, Any, Any]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary directory, in memory if possible, because the tests create many files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


class CallCountingReactor(SteppedReactor):
    """Records the maximum number of calls made by a thread job and by a reactor iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.max_calls = {"thread": 0, "reactor": 0}

    def run_one(self, number: int = 0) -> None:
        if self.jobs:
            done, job = self.jobs.popleft()
            self.jobs.appendleft((done, lambda: self.count_calls("thread", job)))
        self.count_calls("reactor", super().run_one, number)

    def count_calls(self, place: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` and count the calls it makes, but not those of a job that runs within it."""
        calls, outer = 0, sys.getprofile()

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            return function(*arguments)
        finally:
            sys.setprofile(outer)
            self.max_calls[place] = max(self.max_calls[place], calls)


def put_manifest(store: HostedTree, content: ManifestTree, *tags: str) -> None:
    """Store a manifest with its blobs and children, as `registry:2` would, all unused for a long time."""
    for part in content.walk():
        digests = [Digest.of(blob) for blob in part.blobs]
        for data, digest in zip((*part.blobs, part.data), (*digests, part.digest), strict=True):
            write(store.layout.blob(digest), data)
            os.utime(store.layout.blob(digest), (1, 1))
        for digest in digests:
            write(store.layout.layer(REPOSITORY, digest), str(digest).encode())
        write(store.layout.manifest(REPOSITORY, part.digest), str(part.digest).encode())
    for tag in tags:
        write(store.layout.tag_current(REPOSITORY, tag), str(content.digest).encode())
        write(store.layout.tag_index(REPOSITORY, tag, content.digest), str(content.digest).encode())


def write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(data)


def make_registry(root: Path, count: int) -> HostedTree:
    """Create a registry with `count` tagged images, `count` untagged ones and `count` unreferenced blobs.

    Each untagged image has a signature, and every second one is in an index.
    """
    store = HostedTree.from_layout(Layout(root))
    for number in range(count):
        put_manifest(store, image(b"config %d" % number, b"layer %d" % number, b"base"), f"v{number}", f"again{number}")
        untagged = image(b"loose config %d" % number, b"loose layer %d" % number, b"base")
        put_manifest(store, untagged if number % 2 else index(untagged))
        put_manifest(store, image(b"{}", b"signature %d" % number, subject=untagged))
        put_manifest(store, image(b"{}", b"of what is gone %d" % number, subject=image(b"gone %d" % number)))
        data = b"garbage %d" % number
        write(store.layout.blob(Digest.of(data)), data)
        write(store.layout.layer(REPOSITORY, Digest.of(data)), str(Digest.of(data)).encode())
        os.utime(store.layout.blob(Digest.of(data)), (1, 1))
    return store


async def collect(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    result = await Sweeper(reactor, HostedTree.from_layout(Layout(root)), thread=thread).sweep(delete_untagged=True)
    assert result.blobs > SMALL * 5
    assert not result.problems


async def scrub(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    result = await Scrubber(reactor, Layout(root), thread=thread).scrub()
    assert (result.damaged, result.findings > SMALL, result.blobs > SMALL * 5) == (0, False, True)


async def import_from(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    store = HostedTree.from_layout(Layout(root / "new"))
    result = await Importer(reactor, store, thread=thread).import_from(root)
    assert result.tags > SMALL


async def rescan(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    layout = Layout(root)
    space = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, inactive=1e10, clock=time.time, cooperative_thread=thread
    )
    await space.maintain()
    assert space.index.total > SMALL * 10


async def expire(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    layout = Layout(root)
    space = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, inactive=1, clock=time.time, cooperative_thread=thread
    )
    await space.maintain()
    assert space.index.total == 0


OPERATIONS = [collect, scrub, import_from, rescan]


def max_calls(folder: Path, operation: Operation, size: int, slice_length: float) -> dict[str, int]:
    root = folder / f"{size}"
    make_registry(root, size)
    reactor = CallCountingReactor()
    reactor.run(operation(reactor, root, CooperativeThread(reactor, slice_length=slice_length)))
    return reactor.max_calls


@pytest.mark.parametrize("operation", OPERATIONS)
def test_step_cost_does_not_grow_with_the_registry(
    folder: Path, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(lru_index, "_RUN_LENGTH", 50)  # so that even a small cache has several runs to merge
    # A negative slice length makes each step a slice of its own.
    small, large = (max_calls(folder, operation, size, -1) for size in (SMALL, LARGE))
    assert large["thread"] <= small["thread"] * 1.1
    assert large["reactor"] <= small["reactor"] * 1.1
    assert small["thread"] < 3000


@pytest.mark.parametrize("operation", [collect, rescan, expire])
def test_reactor_iteration_cost_does_not_grow_with_results(
    folder: Path, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One slice does all the work, except that results are passed to the reactor in batches.
    small, large = (max_calls(folder, operation, size, math.inf) for size in (LARGE, 2 * LARGE))
    assert large["reactor"] <= small["reactor"] * 1.1


def test_gc_tracked_objects_do_not_grow(folder: Path) -> None:
    tracked = {}
    for size in (SMALL, LARGE):
        store = make_registry(folder / f"{size}", size)
        gc.collect()
        before = len(gc.get_objects())
        mark = Mark(store.layout, store.links, time.time() - 3600, True)
        for _ in mark.steps():
            pass
        for _ in range(3):
            gc.collect()
        tracked[size] = len(gc.get_objects()) - before
        assert len(mark.unreferenced[REPOSITORY].groups) >= 2 * size
        assert len(mark.reachable) >= 2 * size
    assert abs(tracked[LARGE] - tracked[SMALL]) < 20
