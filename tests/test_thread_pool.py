"""The bounds of a thread pool, each client's share, and work that is dropped. Threads run when the test says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from dockerproxy.app import ThreadPools
from dockerproxy.concurrency import current_client, fair_threads, in_thread
from dockerproxy.errors import RegistryError, ServiceOverloaded, TooManyRequests
from dockerproxy.store.disk_access import NETWORK_DISK_LIMITS
from dockerproxy.thread_pool import BoundedThreadPool, ContentParser, FairThreads, PoolLimits


@define(eq=False)
class ManualThreads:
    """Threads whose jobs the test runs; it is the reactor as well, which gets their results at once."""

    jobs: list[tuple[Callable[[bool, Any], object], Callable[[], Any]]] = field(factory=list)

    def getThreadPool(self) -> ManualThreads:
        return self

    def callInThreadWithCallback(self, onResult: Any, func: Any, *args: Any) -> None:
        self.jobs.append((onResult, lambda: func(*args)))

    def callFromThread(self, function: Callable[..., object], *args: object) -> None:
        function(*args)

    def finish(self, index: int = 0) -> None:
        on_result, function = self.jobs.pop(index)
        try:
            result, success = function(), True
        except Exception:
            result, success = Failure(), False
        on_result(success, result)


LIMITS = PoolLimits(threads=2, threads_per_client=1, waiting=5, waiting_per_client=3)


@pytest.fixture
def threads() -> ManualThreads:
    return ManualThreads()


@pytest.fixture
def pool(threads: ManualThreads) -> BoundedThreadPool:
    return BoundedThreadPool(threads, "look-ups", LIMITS, threads)


def start(pool: BoundedThreadPool, function: Callable[[], Any] = lambda: None, client: str = "") -> Deferred[Any]:
    return Deferred.fromCoroutine(pool.run(function, client=client))


def failure_of(deferred: Deferred[Any]) -> BaseException:
    caught: list[Failure] = []
    deferred.addErrback(caught.append)
    return caught[0].value


def test_returns_the_result(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    work = start(pool, lambda: 5)
    threads.finish()
    assert work.result == 5


def test_raises_what_the_function_raised(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    work = start(pool, lambda: 1 // 0)
    threads.finish()
    assert isinstance(failure_of(work), ZeroDivisionError)


def test_no_more_threads_than_the_limit(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    for _ in range(4):
        start(pool)
    assert (pool.running, pool.waiting, len(threads.jobs)) == (2, 2, 2)
    threads.finish()
    assert (pool.running, pool.waiting, len(threads.jobs)) == (2, 1, 2)


def test_one_client_leaves_threads_to_others(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    for _ in range(3):
        start(pool, client="a")
    assert pool.running == 1
    start(pool, client="b")
    assert (pool.running, pool.waiting) == (2, 2)


def test_clients_take_turns(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    order: list[str] = []
    for client in "aabb":
        start(pool, lambda client=client: order.append(client), client=client)  # type: ignore[misc]
    while threads.jobs:
        threads.finish()
    assert order == ["a", "b", "a", "b"]


def test_a_client_with_many_jobs_takes_turns_with_one_that_has_few(threads: ManualThreads) -> None:
    """It may have all threads while nobody else waits, but not the next one as long as somebody does."""
    pool = BoundedThreadPool(threads, "look-ups", PoolLimits(2, 2, waiting=9, waiting_per_client=9), threads)
    order: list[str] = []
    for client in "aaaaab":
        start(pool, lambda client=client: order.append(client), client=client)  # type: ignore[misc]
    while threads.jobs:
        threads.finish()
    assert "".join(order) == "aaabaa"


def test_a_client_has_a_share_of_the_queue(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    for _ in range(4):
        start(pool, client="a")
    error = failure_of(start(pool, client="a"))
    assert isinstance(error, TooManyRequests)
    assert error.message == "a has 3 of the 3 waiting look-ups that one client may have"
    assert error.headers == (("Retry-After", "1"),)
    threads.finish()
    assert not start(pool, client="a").called


def test_the_queue_has_a_bound(pool: BoundedThreadPool) -> None:
    for number in range(7):
        start(pool, client=f"client {number}")
    error = failure_of(start(pool, client="another"))
    assert isinstance(error, ServiceOverloaded)
    assert (error.status, error.message) == (
        503,
        "all clients together have 5 of the 5 waiting look-ups that they may have",
    )


def test_the_daemon_itself_has_no_share_but_the_bound(pool: BoundedThreadPool) -> None:
    for _ in range(7):
        start(pool)
    assert pool.running == 2
    assert isinstance(failure_of(start(pool)), ServiceOverloaded)


def test_a_waiting_job_is_dropped_if_its_client_leaves(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    calls: list[int] = []
    first = start(pool, client="a")
    second = start(pool, lambda: calls.append(2), client="a")
    second.cancel()
    assert isinstance(failure_of(second), CancelledError)
    assert pool.waiting == 0
    threads.finish()
    assert first.called
    assert (calls, threads.jobs, pool.running) == ([], [], 0)


def test_waiting_jobs_of_a_client_are_refused(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    running, *waiting = [start(pool, client="a") for _ in range(3)]
    other = [start(pool, client="b") for _ in range(2)]
    pool.refuse_waiting("a", TooManyRequests("too many"))
    pool.refuse_waiting("unknown", TooManyRequests("too many"))
    assert [str(failure_of(work)) for work in waiting] == ["too many"] * 2
    assert pool.waiting == 1
    while threads.jobs:
        threads.finish()
    assert all(work.called for work in (running, *other))
    assert (pool.running, pool.waiting) == (0, 0)


def test_a_running_job_ends_although_its_client_leaves(pool: BoundedThreadPool, threads: ManualThreads) -> None:
    calls: list[int] = []
    work = start(pool, lambda: calls.append(1), client="a")
    work.cancel()
    assert isinstance(failure_of(work), CancelledError)
    assert pool.running == 1  # the thread is not free yet
    threads.finish()
    assert (calls, pool.running) == ([1], 0)


def test_clients_leave_reserved_threads_to_the_daemon(threads: ManualThreads) -> None:
    pool = BoundedThreadPool(threads, "look-ups", PoolLimits(3, 3, 9, 9, reserved_threads=1), threads)
    for client in "abc":
        start(pool, client=client)
    assert (pool.running, pool.waiting) == (2, 1)
    start(pool)
    assert (pool.running, pool.waiting) == (3, 1)


def test_its_bounds_name_the_busiest_clients(pool: BoundedThreadPool) -> None:
    for client in ("a", "a", "a", "b", "c"):
        start(pool, client=client)
    running, waiting = pool.bounds
    assert running.report()["clients"] == {"a": 1, "b": 1}
    assert waiting.report()["clients"] == {"a": 2, "c": 1}


def test_errors_are_the_registrys() -> None:
    assert issubclass(ServiceOverloaded, RegistryError)


def test_work_is_done_where_a_priority_cannot_be_set(threads: ManualThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    work = start(BoundedThreadPool(threads, "checks", LIMITS, threads, nice=10), lambda: 5)
    threads.finish()
    assert work.result == 5


def test_real_threads_are_daemons_with_their_own_priority() -> None:
    results: list[Any] = []
    arrived = threading.Event()

    class Reactor:
        def callFromThread(self, function: Callable[..., object], *args: object) -> None:
            function(*args)
            arrived.set()

    def work() -> tuple[bool, int, str]:
        thread = threading.current_thread()
        return thread.daemon, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), thread.name

    pool = BoundedThreadPool.start(Reactor(), "checks", PoolLimits(1, 1, 1, 1), nice=10)
    own_priority = os.getpriority(os.PRIO_PROCESS, 0)
    Deferred.fromCoroutine(pool.run(work)).addBoth(results.append)
    assert arrived.wait(30)
    daemon, priority, name = results[0]
    assert daemon
    assert priority == 10
    assert "checks" in name
    assert os.getpriority(os.PRIO_PROCESS, 0) == own_priority


def test_only_long_content_is_parsed_in_a_thread(threads: ManualThreads) -> None:
    parser = ContentParser(BoundedThreadPool(threads, "long documents", LIMITS, threads))
    for size, jobs in ((0, 0), (64 * 1024, 0), (64 * 1024 + 1, 1)):
        work = Deferred.fromCoroutine(parser.parse(lambda content, more: len(content) + more, bytes(size), 2))
        assert len(threads.jobs) == jobs
        if jobs:
            threads.finish()
        assert work.result == size + 2


def test_clients_have_a_share_of_the_disk_threads(threads: ManualThreads) -> None:
    fair = FairThreads()
    work = [fair.run(threads, "a", lambda: "a") for _ in range(30)]
    assert fair.running.report()["clients"] == {"a": 12}
    other = [fair.run(threads, "b", lambda: "b") for _ in range(10)]
    assert fair.running.report()["clients"] == {"a": 12, "b": 8}
    own = fair.run(threads, "", lambda: "own")
    threads.finish(12)  # one of b; then the clients that wait take turns, and the daemon is one of them
    assert own.called is False
    while threads.jobs:
        threads.finish()
    assert [job.result for job in (*work, *other, own)] == ["a"] * 30 + ["b"] * 10 + ["own"]
    assert fair.running.used == 0


def test_a_disk_job_that_fails_or_is_given_up_frees_its_thread(threads: ManualThreads) -> None:
    fair = FairThreads()
    failed = fair.run(threads, "a", lambda: 1 // 0)
    given_up = fair.run(threads, "a", lambda: 5)
    given_up.addErrback(lambda failure: failure.trap(CancelledError))
    given_up.cancel()
    assert len(threads.jobs) == 2  # it runs nevertheless, because it may clean up
    threads.finish()
    threads.finish()
    assert isinstance(failure_of(failed), ZeroDivisionError)
    assert fair.running.used == 0


def test_work_in_threads_counts_for_the_client_of_the_request() -> None:
    clients: list[str] = []

    threads = ManualThreads()

    async def serve() -> None:
        await in_thread(threads, lambda: None)
        await in_thread(threads, lambda: None)

    token = current_client.set("192.0.2.7")
    Deferred.fromCoroutine(serve())
    current_client.reset(token)
    for _ in range(2):
        clients += fair_threads(threads).running.report()["clients"]
        threads.finish()
    Deferred.fromCoroutine(serve())
    clients += fair_threads(threads).running.report()["clients"]
    assert clients == ["192.0.2.7", "192.0.2.7", ""]


@pytest.mark.parametrize("cores", [1, 2, 64])
@pytest.mark.parametrize("processes", [1, 4])
def test_no_pool_of_the_daemon_can_be_filled_by_one_client(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    pools = ThreadPools.start(ManualThreads(), processes)
    for limits in (pools.lookups.limits, pools.passwords.limits, pools.documents.limits, NETWORK_DISK_LIMITS):
        assert limits.waiting_per_client <= limits.waiting // 2
        assert limits.threads_per_client <= max(1, limits.threads // 2)
