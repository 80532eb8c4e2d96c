"""Helpers for coroutines: start, run in a thread, shield from cancellation, lock by key, share calls, load late."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from attrs import define, field
from twisted.internet.defer import Deferred, DeferredList, DeferredLock, FirstError
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.thread_pool import FairThreads

log = Logger()

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def spawn(coroutine: Coroutine[Any, Any, object], description: str) -> Deferred[None]:
    """Start `coroutine` in the background. Log an exception that it raises as "`description` failed"."""

    def report(failure: Failure) -> None:
        log.failure("{description} failed", failure, description=description)

    deferred: Deferred[Any] = Deferred.fromCoroutine(coroutine)
    return deferred.addErrback(report)


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """Return the results of `coroutines` in their order. At most `at_once` of them run at a time.

    If one fails, its exception is raised at once, and the others are cancelled. Those that have not started are not
    taken from the iterable.
    """
    results: dict[int, T] = {}
    remaining = enumerate(coroutines)

    async def run() -> None:
        for position, coroutine in remaining:
            results[position] = await coroutine

    runners = [Deferred.fromCoroutine(run()) for _ in range(at_once)]
    try:
        await DeferredList(runners, fireOnOneErrback=True, consumeErrors=True)
    except FirstError as error:
        for runner in runners:
            runner.cancel()
        error.subFailure.raiseException()
    return [results[position] for position in range(len(results))]


current_client: ContextVar[str] = ContextVar("current_client", default="")
"""The address of the client whose request a coroutine serves; `""` for the daemon's own work.

A coroutine that another one starts inherits it.
"""

_fair_threads: WeakKeyDictionary[Any, FairThreads] = WeakKeyDictionary()


def fair_threads(reactor: Any) -> FairThreads:
    """Return the threads of the reactor's pool, in which clients take turns."""
    threads = _fair_threads.get(reactor)
    if threads is None:
        threads = _fair_threads[reactor] = FairThreads()
    return threads


def use_monotonic_clock(reactor: Any) -> None:
    """Make the timers of `reactor` go on if the wall clock is set back. Call this before there are any.

    Dates, which are stored and sent, are those of `time.time`.
    """
    reactor.seconds = time.monotonic


async def in_thread(reactor: Any, function: Callable[..., T], *args: object) -> T:
    """Call `function`, which may block, in a thread of the reactor's pool, and return its result.

    It counts for `current_client`.
    """
    return await fair_threads(reactor).run(reactor, current_client.get(), partial(function, *args))


async def shield(
    coroutine: Coroutine[Any, Any, T], description: str, *, expected: tuple[type[Exception], ...] = ()
) -> T:
    """Return the result of `coroutine`, which runs to its end even if the caller is cancelled.

    If it fails after the caller was cancelled, the exception is logged as "`description` failed", unless it is one of
    `expected`.
    """
    waiter: Deferred[T] = Deferred()

    def on_failure(failure: Failure) -> None:
        if not waiter.called:
            waiter.errback(failure)
        elif not isinstance(failure.value, expected):
            log.failure("{description} failed", failure, description=description)

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

    def report(self) -> dict[str, int]:
        """Return the keys of the locks that are held, and how many callers wait for each."""
        return {key: len(lock.waiting) for key, lock in self._locks.items()}

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


@define(eq=False)
class _SharedCall(Generic[T]):
    """A call in progress and its callers. `call` is None until the call has suspended for the first time."""

    waiters: list[Deferred[T]] = field(factory=list)
    call: Deferred[None] | None = None


class SingleFlight(Generic[K, T]):
    """Runs one call per key at a time and gives its result to all callers. Nothing is cached afterwards.

    A caller that is cancelled does not affect the call, because others may wait for it. With `cancel_abandoned`, the
    call is cancelled with the last of its callers.
    """

    def __init__(self, *, cancel_abandoned: bool = False) -> None:
        self._cancel_abandoned = cancel_abandoned
        self._calls: dict[K, _SharedCall[T]] = {}

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys of the calls in progress."""
        return iter(self._calls)

    async def do(self, key: K, function: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `function`. If a call for `key` is in progress, wait for that one instead."""
        shared = self._calls.get(key)
        is_first = shared is None
        if shared is None:
            shared = self._calls[key] = _SharedCall()
        waiter: Deferred[T] = Deferred(lambda waiter: self._leave(key, shared, waiter))
        shared.waiters.append(waiter)
        if is_first:
            # The waiter must be registered first: the call may finish at once.
            shared.call = Deferred.fromCoroutine(self._run(key, shared, function))
        return await waiter

    async def _run(self, key: K, shared: _SharedCall[T], function: Callable[[], Awaitable[T]]) -> None:
        result: T | Failure
        try:
            result = await function()
        except Exception:
            result = Failure()  # type: ignore[no-untyped-call]
        if self._calls.get(key) is shared:
            del self._calls[key]
        for waiter in shared.waiters:
            waiter.callback(result)

    def _leave(self, key: K, shared: _SharedCall[T], waiter: Deferred[T]) -> None:
        shared.waiters.remove(waiter)
        if self._cancel_abandoned and not shared.waiters and shared.call is not None:
            if self._calls.get(key) is shared:
                del self._calls[key]
            shared.call.cancel()


@define(eq=False)
class FirstUse(Generic[T]):
    """A part of the daemon that its first use loads, because every process would keep it in memory, and most need it
    never.

    `load` imports the modules of the part, which takes up to a tenth of a second, and builds it. It runs in a thread,
    so it may not use the reactor. If it fails, the next use calls it again.
    """

    _reactor: Any
    _load: Callable[[], T]
    loaded: T | None = None
    """The part, or None before its first use."""
    _loading: SingleFlight[None, T] = field(factory=SingleFlight, init=False)

    async def get(self) -> T:
        """Return the part. Raise what `load` raises."""
        if self.loaded is None:
            self.loaded = await self._loading.do(None, partial(in_thread, self._reactor, self._load))
        return self.loaded
