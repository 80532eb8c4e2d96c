"""Progress reports of operations that take long, and the lock that they share with requests.

Garbage collection, verification and import run in a process of their own (`dockerproxy.operations`), so they are plain
loops that block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

from attrs import frozen

T = TypeVar("T")

RepositoryLock = Callable[[str], AbstractContextManager[object]]
"""Returns a context manager that holds the lock of a repository, which pushes and deletions take as well."""

_MAX_LOCK_HOLD = 0.002
"""Seconds for which an operation holds a lock, because requests wait for it."""


class Stopped(Exception):
    """The operation was asked to stop. Its changes so far are kept, and it can be repeated."""


def _noop(*arguments: object) -> None:
    pass


@frozen
class Progress(Generic[T]):
    """Callbacks of an operation, which it calls between two steps, when no object is half changed and no lock is held.

    `report` gets the name of a phase, the amount done, and the total (None if it is not known yet). `emit` gets each
    result. Both may block, and may raise `Stopped` to end the operation.
    """

    report: Callable[[str, int, int | None], object] = _noop
    emit: Callable[[T], object] = _noop


def no_lock(repository: str) -> AbstractContextManager[object]:
    """Hold no lock: the `RepositoryLock` of a store that nobody else changes."""
    return nullcontext()


def locked_slices(lock: Callable[[], AbstractContextManager[object]], steps: Iterator[T | None]) -> Iterator[list[T]]:
    """Exhaust `steps`, holding the lock for `_MAX_LOCK_HOLD` seconds at a time.

    Yield the results of each slice after the lock was released. Each step must be short.
    """
    has_more = True
    while has_more:
        results: list[T] = []
        with lock():
            deadline = time.monotonic() + _MAX_LOCK_HOLD
            for item in steps:
                if item is not None:
                    results.append(item)
                if time.monotonic() >= deadline:
                    break
            else:
                has_more = False
        yield results
