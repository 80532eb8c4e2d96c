"""Scalability tests: long-running work consists of short steps, and its memory does not grow with what clients push.

Short steps bound the delay of requests in the daemon, and the time in which an operation stops or releases a lock. The
tests do not measure time. The cost of a step, or of a reactor iteration, is the number of calls made in it, including
system calls. It must not grow with the registry.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.cache.janitor import Janitor
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.oci.names import Digest
from dockerproxy.store import lru_index
from dockerproxy.store import progress as progress_module
from dockerproxy.store import sweep as sweep_module
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.importer import import_registry
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress
from dockerproxy.store.records import Records
from dockerproxy.store.scrub import scrub
from dockerproxy.store.sweep import sweep
from tests.store.support.images import ManifestTree, image, index
from tests.store.support.reactor import SteppedReactor

pytestmark = pytest.mark.slow  # large trees

SMALL, LARGE = 30, 150
REPOSITORY = "library/many"

CooperativeWork = Callable[[SteppedReactor, Path, CooperativeThread], Coroutine[Any, Any, Any]]
Operation = Callable[[Path, Progress[Any]], Any]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary directory, in memory if possible, because the tests create many files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


class CallCountingReactor(SteppedReactor):
    """Records the maximum number of calls made by a step in a thread and by a reactor iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.max_calls = {"thread": 0, "reactor": 0}
        self._calls = 0

    def run_one(self, number: int = 0) -> None:
        if self.jobs:
            done, job = self.jobs.popleft()
            self.jobs.appendleft((done, lambda: self.count_calls("thread", job)))
        self.count_calls("reactor", super().run_one, number)

    def count_calls(self, place: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` and count the calls it makes, but not those of a job that runs within it."""
        outer, outer_calls = sys.getprofile(), self._calls
        self._calls = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            self._calls += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            return function(*arguments)
        finally:
            sys.setprofile(outer)
            self.end_step(place)
            self._calls = outer_calls

    def end_step(self, place: str) -> None:
        """Count the calls since the last step."""
        self.max_calls[place] = max(self.max_calls[place], self._calls)
        self._calls = 0


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


def collect(root: Path, progress: Progress[Any]) -> None:
    result = sweep(Layout(root), delete_untagged=True, progress=progress)
    assert result.blobs > SMALL * 5
    assert not result.problems


def check(root: Path, progress: Progress[Any]) -> None:
    result = scrub(Layout(root), progress=progress)
    assert (result.damaged, result.findings > SMALL, result.blobs > SMALL * 5) == (0, False, True)


def import_from(root: Path, progress: Progress[Any]) -> None:
    result = import_registry(Layout(root / "new"), root, progress=progress)
    assert result.tags > SMALL


def max_calls_between_reports(folder: Path, operation: Operation, size: int) -> int:
    """Return the maximum number of calls that the operation makes in one step."""
    root = folder / f"{size}"
    make_registry(root, size)
    calls = maximum = 0

    def report(*arguments: object) -> None:
        nonlocal calls, maximum
        maximum = max(maximum, calls)
        calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        operation(root, Progress(report))
    finally:
        sys.setprofile(None)
    return max(maximum, calls)


@pytest.mark.parametrize("operation", [collect, check, import_from])
def test_step_cost_of_an_operation_does_not_grow_with_the_registry(
    folder: Path, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(progress_module, "_MAX_LOCK_HOLD", 0)
    monkeypatch.setattr(sweep_module, "_BATCH", 10)
    small, large = (max_calls_between_reports(folder, operation, size) for size in (SMALL, LARGE))
    assert large <= small * 1.1
    assert small < 3000


def put_hostile_manifest(store: HostedTree, rng: random.Random, references: int) -> None:
    """Store a manifest of an unknown type that is full of digests, with the media type that its client stated."""
    data = " ".join(f"sha256:{rng.randbytes(32).hex()}" for _ in range(references)).encode()
    digest = Digest.of(data)
    put_manifest(store, ManifestTree("application/vnd.strange", data))
    write(store.layout.media_type(REPOSITORY, digest), b"application/vnd.strange")


@pytest.mark.parametrize("delete_untagged", [False, True])
def test_memory_of_a_collection_does_not_grow_with_references(folder: Path, delete_untagged: bool) -> None:
    """Otherwise anyone with leave to push could decide whether garbage can be collected."""
    rng, peaks = random.Random(0), list[int]()
    for count in (5, 50):
        store = HostedTree.from_layout(Layout(folder / f"{count}"))
        for _ in range(count):
            put_hostile_manifest(store, rng, 2000)
        tracemalloc.start()
        result = sweep(store.layout, delete_untagged=delete_untagged)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (result.problems, result.manifests) == ((), count if delete_untagged else 0)
    assert peaks[1] < peaks[0] * 1.3


async def rescan(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    layout = Layout(root)
    space = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, max_blob_size=1 << 40, inactive=1e10, clock=time.time,
        janitor=Janitor(layout, Records(root / "records"), time.time), cooperative_thread=thread,
    )  # fmt: skip
    await space.maintain()
    assert space.index.total > SMALL * 10


async def expire(reactor: SteppedReactor, root: Path, thread: CooperativeThread) -> None:
    layout = Layout(root)
    space = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, max_blob_size=1 << 40, inactive=1, clock=time.time,
        janitor=Janitor(layout, Records(root / "records"), time.time), cooperative_thread=thread,
    )  # fmt: skip
    await space.maintain()
    assert space.index.total == 0


def max_calls(folder: Path, work: CooperativeWork, size: int) -> dict[str, int]:
    root = folder / f"{size}"
    make_registry(root, size)
    reactor = CallCountingReactor()
    # Each step takes a second, so that it is followed by a pause.
    thread = CooperativeThread(
        reactor, clock=itertools.count().__next__, sleep=lambda seconds: reactor.end_step("thread")
    )
    reactor.run(work(reactor, root, thread))
    return reactor.max_calls


def test_step_cost_of_a_rescan_does_not_grow_with_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_index, "_RUN_LENGTH", 50)  # so that even a small cache has several runs to merge
    small, large = (max_calls(folder, rescan, size) for size in (SMALL, LARGE))
    assert large["thread"] <= small["thread"] * 1.1
    assert large["reactor"] <= small["reactor"] * 1.1
    assert small["thread"] < 3000


@pytest.mark.parametrize("work", [rescan, expire])
def test_reactor_iteration_cost_does_not_grow_with_the_cache(folder: Path, work: CooperativeWork) -> None:
    small, large = (max_calls(folder, work, size) for size in (LARGE, 2 * LARGE))
    assert large["reactor"] <= small["reactor"] * 1.1
