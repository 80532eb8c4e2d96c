"""Registries of which there are two copies, one in a directory and one in a bucket, and what a reader sees of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.admin.resolver import HOSTED, StoreView
from dockerproxy.bucket import keys
from dockerproxy.bucket.blocking_bucket import BlockingBucket
from dockerproxy.bucket.bucket_tree import BucketTree, ReaderThreads
from dockerproxy.bucket.takeover import take_over
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from tests.cache.support.reactor import ManualReactor
from tests.support.fake_store import LOCATION, FakeStore

T = TypeVar("T")


def make_store() -> FakeStore:
    return FakeStore(ManualReactor())


def run(fake: FakeStore, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that sends requests to the store, or raise what it raises."""
    results: list[Any] = []
    Deferred.fromCoroutine(coroutine).addBoth(results.append)
    for _ in range(10_000):
        if results:
            break
        fake.clock.run_due_calls()
        if not results:
            fake.clock.advance(0.01)
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    return result  # type: ignore[no-any-return]


def blocking(fake: FakeStore) -> BlockingBucket:
    def wait(coroutine: Coroutine[Any, Any, T]) -> T:
        return run(fake, coroutine)

    return BlockingBucket(fake.bucket(), wait)


def upload_tree(fake: FakeStore, root: Path) -> None:
    """Put the files of a registry's directory into the bucket, as another program may, and take the bucket over."""
    for path in sorted((root / "docker").rglob("*")):
        if path.is_file():
            key = f"{LOCATION.prefix}{path.relative_to(root)}"
            seconds = int(path.stat().st_mtime)
            os.utime(path, (seconds, seconds))  # the store has whole seconds
            fake.store(key, path.read_bytes())
            fake.written[key] = float(seconds)
    run(fake, take_over(fake.clock, fake.bucket()))
    for repository in HostedTree.from_layout(Layout(root)).links.repositories():
        fake.store(f"{LOCATION.prefix}{keys.catalog_key(repository)}", b"")  # also if damage took its last link


def disk_view(root: Path) -> StoreView:
    return StoreView(HOSTED, Layout(root))


def bucket_view(fake: FakeStore, *, walks: bool = False, threads: ReaderThreads | None = None) -> StoreView:
    bucket = blocking(fake)
    return StoreView(HOSTED, keys.LAYOUT, lambda: BucketTree(bucket, threads, walks))


def fail_after(fake: FakeStore, count: int, answer: Callable[[Any], Any]) -> None:
    """Answer all requests but the next `count` by `answer`, which may return None for an answer of the store."""
    seen = 0

    def fail(request: Any) -> Any:
        nonlocal seen
        seen += 1
        failure = answer(request) if seen > count else None
        if failure is not None:
            fake.faults.append(fail)  # in place of the one that is used up
        return failure

    fake.faults.append(fail)
