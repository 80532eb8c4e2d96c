"""Threads for one kind of blocking work, with a bound for all clients and a share for one.

Python has no non-blocking getaddrinfo, fdatasync or bcrypt, so each of them needs threads. If they shared one pool,
slow name servers would stop disk writes. So each kind has a pool of its own, and a client that fills its share of one
delays only itself.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from dockerproxy.shares import ClientShares, client_key

T = TypeVar("T")


class Threads(Protocol):
    """Runs functions in threads; see `twisted.python.threadpool.ThreadPool`."""

    def callInThreadWithCallback(
        self, onResult: Callable[[bool, Any], object] | None, func: Callable[..., Any], *args: Any
    ) -> None: ...


class DaemonThreadPool(ThreadPool):
    """A thread pool that the process does not wait for at exit: a look-up may block for half a minute."""

    threadFactory = staticmethod(partial(threading.Thread, daemon=True))  # type: ignore[assignment]


@frozen
class PoolLimits:
    """The bounds of a pool: jobs that run and jobs that wait, of all clients together and of one."""

    threads: int
    threads_per_client: int
    waiting: int
    waiting_per_client: int
    reserved_threads: int = 0
    """Threads that only jobs of the daemon itself may use."""


@define(eq=False)
class _Job:
    client: str
    call: Callable[[], Any]
    done: Deferred[Any]
    started: bool = False


@define(eq=False)
class BoundedThreadPool:
    """Runs jobs called `name` (a plural for sentences, such as "name look-ups") in threads of its own.

    Jobs wait in the reactor's thread. So a job whose Deferred is cancelled is dropped if it has not started, and jobs
    that wait delay no shutdown. Clients take turns. `nice` is added to the threads' scheduling priority value: on Linux
    each thread has its own.
    """

    _reactor: Any
    name: str
    limits: PoolLimits
    _threads: Threads
    _nice: int = 0
    _queues: OrderedDict[str, deque[_Job]] = field(factory=OrderedDict, init=False)  # the next client first
    _running: ClientShares = field(init=False)
    _waiting: ClientShares = field(init=False)

    def __attrs_post_init__(self) -> None:
        limits = self.limits
        self._running = ClientShares(
            f"running {self.name}", limits.threads, limits.threads_per_client, reserved=limits.reserved_threads
        )
        self._waiting = ClientShares(f"waiting {self.name}", limits.waiting, limits.waiting_per_client)

    @classmethod
    def start(cls, reactor: Any, name: str, limits: PoolLimits, *, nice: int = 0) -> BoundedThreadPool:
        """Return a pool with daemon threads, none of which is started before there is work."""
        threads = DaemonThreadPool(0, limits.threads, name)
        threads.start()
        return cls(reactor, name, limits, threads, nice)

    @property
    def running(self) -> int:
        """The number of jobs in threads."""
        return self._running.used

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a thread."""
        return self._waiting.used

    @property
    def bounds(self) -> tuple[ClientShares, ...]:
        """The bounds of the jobs that run and of those that wait."""
        return self._running, self._waiting

    async def run(self, function: Callable[..., T], *args: object, client: str = "") -> T:
        """Return what `function` returns in a thread.

        `client` is whom the job counts for, `""` for the daemon itself. Raise `TooManyRequests` if the client's share
        of waiting jobs is used up, `ServiceOverloaded` if too many jobs wait in all.
        """
        client = client_key(client)
        self._waiting.acquire(client)
        job = _Job(client, partial(self._in_thread, function, args), Deferred(lambda _: self._drop(job)))
        self._queues.setdefault(client, deque()).append(job)
        self._dispatch()
        result: T = await job.done
        return result

    def refuse_waiting(self, client: str, error: Exception) -> None:
        """Fail the jobs of `client` that wait for a thread with `error`."""
        for job in self._queues.pop(client_key(client), ()):
            self._waiting.release(client)
            job.done.errback(Failure(error))  # type: ignore[no-untyped-call]

    def _in_thread(self, function: Callable[..., T], args: tuple[object, ...]) -> T:
        if self._nice:
            with suppress(OSError):  # a container engine's seccomp filter may forbid it
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
        return function(*args)

    def _dispatch(self) -> None:
        """Start jobs while there are threads, one of each client in turn."""
        while self.running < self.limits.threads:
            client = next(filter(self._running.has_room, self._queues), None)
            if client is None:
                return
            queue = self._queues[client]
            job = queue.popleft()
            del self._queues[client]
            if queue:
                self._queues[client] = queue  # behind the others
            job.started = True
            self._waiting.release(client)
            self._running.acquire(client)
            on_result = partial(self._reactor.callFromThread, self._finish, job)
            self._threads.callInThreadWithCallback(on_result, job.call)

    def _finish(self, job: _Job, success: bool, result: Any) -> None:
        self._running.release(job.client)
        if not job.done.called:
            if success:
                job.done.callback(result)
            else:
                assert isinstance(result, Failure)
                job.done.errback(result)
        self._dispatch()

    def _drop(self, job: _Job) -> None:
        """Forget a cancelled job if it has not started; a thread cannot be interrupted."""
        if job.started:
            return
        queue = self._queues[job.client]
        queue.remove(job)
        self._waiting.release(job.client)
        if not queue:
            del self._queues[job.client]


DISK_THREADS = 20  # of the reactor's pool: each download writes to the disk in a thread of its own
_DISK_THREADS_PER_CLIENT = 12


@define(eq=False)
class FairThreads:
    """Lets clients take turns in the threads of the reactor's pool, each with a share of them.

    Unlike a `BoundedThreadPool` it refuses and drops no job: some clean up, and a request waits for each.
    """

    running: ClientShares = field(init=False)
    _queues: OrderedDict[str, deque[Callable[[], None]]] = field(factory=OrderedDict, init=False)

    @running.default
    def _make_running(self) -> ClientShares:
        return ClientShares("running disk jobs", DISK_THREADS, _DISK_THREADS_PER_CLIENT)

    def run(self, reactor: Any, client: str, function: Callable[[], T]) -> Deferred[T]:
        """Return what `function` returns in a thread. `client` is whom the job counts for, `""` for the daemon."""
        client = client_key(client)
        done: Deferred[T] = Deferred()

        def start() -> None:
            self.running.acquire(client)
            on_result = partial(reactor.callFromThread, self._finish, client, done)
            reactor.getThreadPool().callInThreadWithCallback(on_result, function)

        self._queues.setdefault(client, deque()).append(start)
        self._dispatch()
        return done

    def _dispatch(self) -> None:
        while (client := next(filter(self.running.has_room, self._queues), None)) is not None:
            queue = self._queues.pop(client)
            start = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the others
            start()

    def _finish(self, client: str, done: Deferred[Any], success: bool, result: Any) -> None:
        self.running.release(client)
        self._dispatch()
        if success:
            done.callback(result)
        else:
            done.errback(result)


PARSE_LIMITS = PoolLimits(threads=1, threads_per_client=1, waiting=128, waiting_per_client=32)
"""Long documents. Python parses in one thread at a time anyway, and each may take 40 MB meanwhile."""

_INLINE_CONTENT = 64 * 1024  # bytes that are parsed in the reactor's thread, in a millisecond at most


@frozen
class ContentParser:
    """Parses content that strangers sent: short content at once, long content in a thread of `pool`.

    The thread has the usual priority. It holds the interpreter's lock while it parses, so if other programs displaced
    it, the reactor would wait for them.
    """

    pool: BoundedThreadPool

    async def parse(self, function: Callable[..., T], content: bytes, *args: object, client: str = "") -> T:
        """Return what `function` returns for `content` and `args`. `client` is as for `BoundedThreadPool.run`."""
        if len(content) <= _INLINE_CONTENT:
            return function(content, *args)
        return await self.pool.run(function, content, *args, client=client)
