"""Coroutines at work: started and logged, run in a thread, shared by all who ask for the same."""

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
    """Start `work` and let it run; a failure that it does not deal with is logged as that of `what`."""

    def report(failure: Failure) -> None:
        log.failure("{description} failed", failure, description=description)

    deferred: Deferred[Any] = Deferred.fromCoroutine(coroutine)
    return deferred.addErrback(report)


async def in_thread(reactor: Any, function: Callable[..., T], *args: object) -> T:
    """Return what `function`, which may block, returns in a thread of the reactor's pool."""
    return await deferToThreadPool(reactor, reactor.getThreadPool(), function, *args)


async def shield(coroutine: Coroutine[Any, Any, T], description: str) -> T:
    """Return what `work` gives; it goes on where the caller is cancelled.

    A failure is logged as that of `what` then.
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
    """One at a time for each key."""

    def hold(self, key: str) -> AbstractAsyncContextManager[bool]:
        """Wait for one's turn, and have it for the length of the block; the value says whether one had to wait."""


class LocalKeyedLock:
    """One at a time for each key, in the order they asked."""

    def __init__(self) -> None:
        self._locks: dict[str, DeferredLock] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Wait for one's turn, and have it for the length of the block; the value says whether one had to wait."""
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
    """Work that is under way once for each key, however many ask.

    A caller that is cancelled leaves the work alone: others may wait for it. Nothing is remembered afterwards.
    """

    def __init__(self) -> None:
        self._in_flight: dict[K, list[Deferred[T]]] = {}

    async def do(self, key: K, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` gives, joining it where it is under way for `key` already."""
        waiter: Deferred[T] = Deferred()
        waiters = self._in_flight.get(key)
        if waiters is not None:
            waiters.append(waiter)
        else:
            # The entry stands before the work starts: work that ends at once must find its waiters.
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
