"""Helpers for coroutines: start, run in a thread, shield from cancellation, lock by key, deduplicate calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

log = Logger()

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def spawn(coroutine: Coroutine[Any, Any, object], description: str) -> Deferred[None]:
    """Start `coroutine` in the background. Log an exception that it raises as "`description` failed"."""

    def report(failure: Failure) -> None:
        log.failure("{description} failed", failure, description=description)

    deferred: Deferred[Any] = Deferred.fromCoroutine(coroutine)
    return deferred.addErrback(report)


async def in_thread(reactor: Any, function: Callable[..., T], *args: object) -> T:
    """Call `function`, which may block, in a thread of the reactor's pool, and return its result."""
    return await deferToThreadPool(reactor, reactor.getThreadPool(), function, *args)


async def shield(coroutine: Coroutine[Any, Any, T], description: str) -> T:
    """Return the result of `coroutine`, which runs to its end even if the caller is cancelled.

    If it fails after the caller was cancelled, the exception is logged as "`description` failed".
    """
    waiter: Deferred[T] = Deferred()

    def on_failure(failure: Failure) -> None:
        if waiter.called:
            log.failure("{description} failed", failure, description=description)
        else:
            waiter.errback(failure)

    Deferred.fromCoroutine(coroutine).addCallbacks(
        lambda result: None if waiter.called else waiter.callback(result), on_failure
    )
    return await waiter


class KeyedLock(Protocol):
    """A set of locks, one for each key."""

    def hold(self, key: str) -> AbstractAsyncContextManager[bool]:
        """Hold the lock of `key` during the `async with` block. The value is true if the caller had to wait."""


class LocalKeyedLock:
    """Locks of this process. Waiting callers get a lock in the order of their calls."""

    def __init__(self) -> None:
        self._locks: dict[str, DeferredLock] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Hold the lock of `key`; see `KeyedLock.hold`."""
        lock = self._locks.setdefault(key, DeferredLock())
        waited = bool(lock.locked)
        await lock.acquire()
        try:
            yield waited
        finally:
            lock.release()
            if not lock.locked and self._locks.get(key) is lock:
                del self._locks[key]


class SingleFlight(Generic[K, T]):
    """Runs a function at most once at a time for each key; concurrent callers share the result.

    A cancelled caller does not cancel the work, because others may wait for it. Results are not cached.
    """

    def __init__(self) -> None:
        self._in_flight: dict[K, list[Deferred[T]]] = {}

    async def do(self, key: K, work: Callable[[], Awaitable[T]]) -> T:
        """Call `work` and return its result. If a call for `key` is already running, return the result of that one."""
        waiter: Deferred[T] = Deferred()
        waiters = self._in_flight.get(key)
        if waiters is not None:
            waiters.append(waiter)
        else:
            # Add the entry before the work starts, because work that ends synchronously must find its waiters.
            self._in_flight[key] = [waiter]
            Deferred.fromCoroutine(self._run(key, work))
        return await waiter

    async def _run(self, key: K, work: Callable[[], Awaitable[T]]) -> None:
        result: T | Failure
        try:
            result = await work()
        except Exception:
            result = Failure()  # type: ignore[no-untyped-call]
        for waiter in self._in_flight.pop(key):
            waiter.callback(result)
