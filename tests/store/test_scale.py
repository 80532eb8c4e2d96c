"""That long work is made of short steps, however much there is: this bounds the time that requests wait for it.

No clock decides here. A step, and a turn of the reactor, is measured by the calls that are made in it, those of the
system included; and what the cyclic garbage collector looks through, in one go, by the number of objects it tracks.
In a larger registry both are to be what they are in a small one.
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
from dockerproxy.store import usage
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.check import Checker
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.importing import Importer
from dockerproxy.store.layout import Layout
from dockerproxy.store.slices import Slices
from dockerproxy.store.survey import Survey
from dockerproxy.store.sweep import Sweeper
from tests.store.workbench.images import Content, image, index
from tests.store.workbench.reactor import Reactor

SMALL, LARGE = 30, 150
REPOSITORY = "library/many"

Work = Callable[[Reactor, Path, Slices], Coroutine[Any, Any, Any]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that can be: there are many files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


class Counting(Reactor):
    """Notes how many calls the longest job in a thread made, and the longest turn of the reactor."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = {"thread": 0, "reactor": 0}

    def run_one(self, number: int = 0) -> None:
        if self.jobs:
            done, job = self.jobs.popleft()
            self.jobs.appendleft((done, lambda: self.counted("thread", job)))
        self.counted("reactor", super().run_one, number)

    def counted(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call, and count what it calls; the job that the reactor has done in between is none of its own."""
        calls, outer = 0, sys.getprofile()

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            return function(*arguments)
        finally:
            sys.setprofile(outer)
            self.longest[where] = max(self.longest[where], calls)


def put(store: HostedStore, content: Content, *tags: str) -> None:
    """Put a manifest and what it needs into `store`, as `registry:2` would; none of it was used lately."""
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


def grow(root: Path, count: int) -> HostedStore:
    """A registry with `count` images that have tags, as many that have none, each with a signature, or in an index, and
    as many blobs that nothing leads to."""
    store = HostedStore.below(Layout(root))
    for number in range(count):
        put(store, image(b"config %d" % number, b"layer %d" % number, b"base"), f"v{number}", f"again{number}")
        loose = image(b"loose config %d" % number, b"loose layer %d" % number, b"base")
        put(store, loose if number % 2 else index(loose))
        put(store, image(b"{}", b"signature %d" % number, subject=loose))
        put(store, image(b"{}", b"of what is gone %d" % number, subject=image(b"gone %d" % number)))
        data = b"garbage %d" % number
        write(store.layout.blob(Digest.of(data)), data)
        write(store.layout.layer(REPOSITORY, Digest.of(data)), str(Digest.of(data)).encode())
        os.utime(store.layout.blob(Digest.of(data)), (1, 1))
    return store


async def collect(reactor: Reactor, root: Path, slices: Slices) -> None:
    swept = await Sweeper(reactor, HostedStore.below(Layout(root)), slices=slices).sweep(delete_untagged=True)
    assert swept.blobs > SMALL * 5
    assert not swept.problems


async def check(reactor: Reactor, root: Path, slices: Slices) -> None:
    checked = await Checker(reactor, Layout(root), slices=slices).check()
    assert (checked.damaged, checked.findings > SMALL, checked.blobs > SMALL * 5) == (0, False, True)


async def take(reactor: Reactor, root: Path, slices: Slices) -> None:
    store = HostedStore.below(Layout(root / "new"))
    imported = await Importer(reactor, store, slices=slices).take(root)
    assert imported.tags > SMALL


async def count(reactor: Reactor, root: Path, slices: Slices) -> None:
    layout = Layout(root)
    room = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, inactive=1e10, clock=time.time, cooperative_thread=slices
    )
    await room.maintain()
    assert room.index.total > SMALL * 10


async def expire(reactor: Reactor, root: Path, slices: Slices) -> None:
    layout = Layout(root)
    room = CacheSpaceManager(
        reactor, layout, Blobs(layout, False), limit=1 << 40, inactive=1, clock=time.time, cooperative_thread=slices
    )
    await room.maintain()
    assert room.index.total == 0


WORKS = [collect, check, take, count]


def longest(folder: Path, work: Work, size: int, slices: float) -> dict[str, int]:
    root = folder / f"{size}"
    grow(root, size)
    reactor = Counting()
    reactor.run(work(reactor, root, Slices(reactor, length=slices)))
    return reactor.longest


@pytest.mark.parametrize("work", WORKS)
def test_no_step_is_longer_where_there_is_more(folder: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(usage, "_RUN", 50)  # so that some are merged in a small cache, too
    # No length: each step is a slice of its own.
    small, large = (longest(folder, work, size, -1) for size in (SMALL, LARGE))
    assert large["thread"] <= small["thread"] * 1.1
    assert large["reactor"] <= small["reactor"] * 1.1
    assert small["thread"] < 3000


@pytest.mark.parametrize("work", [collect, count, expire])
def test_no_turn_of_the_reactor_is_longer_where_more_is_found(
    folder: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One slice has it all, but for what hands over to the reactor.
    small, large = (longest(folder, work, size, math.inf) for size in (LARGE, 2 * LARGE))
    assert large["reactor"] <= small["reactor"] * 1.1


def test_the_cyclic_collector_has_no_more_to_look_through(folder: Path) -> None:
    tracked = {}
    for size in (SMALL, LARGE):
        store = grow(folder / f"{size}", size)
        gc.collect()
        before = len(gc.get_objects())
        survey = Survey(store.layout, store.links, time.time() - 3600, True)
        for _ in survey.steps():
            pass
        for _ in range(3):
            gc.collect()
        tracked[size] = len(gc.get_objects()) - before
        assert len(survey.idle[REPOSITORY].groups) >= 2 * size
        assert len(survey.needed) >= 2 * size
    assert abs(tracked[LARGE] - tracked[SMALL]) < 20
