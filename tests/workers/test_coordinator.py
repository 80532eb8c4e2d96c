"""The shared cache space and locks, between a main process and workers, over real socket pairs in this process."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from dockerproxy.cache.ended_logins import EndedLogins
from dockerproxy.cache.janitor import Janitor
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.daemon.refusing_clients import RefusingClients
from dockerproxy.errors import ServiceOverloaded
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.names import Digest, Host
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.records import Records
from dockerproxy.upstream.docker_config import DockerConfig
from dockerproxy.upstream.login_provider import LocalLoginProvider, ProvidedLogin
from dockerproxy.workers import remote
from dockerproxy.workers.coordinator import Answers, Coordinator, LocalCoordinator, SharedState, rpc_handlers
from dockerproxy.workers.message_socket import socketpair
from dockerproxy.workers.remote import RemoteCoordinator
from dockerproxy.workers.rpc import RPC
from tests.support.examples import examples
from tests.workers.descriptor_reactor import DescriptorThreadReactor

LIMIT = 1000
ONE, OTHER, THIRD = (IngestKey("registry.example", Digest.of(name)) for name in (b"1", b"2", b"3"))


class WorkerStub:
    """A worker's end of its socket, and its coordinator in the main process."""

    def __init__(self, main_process: MainProcessStub) -> None:
        self.reactor = main_process.reactor
        main_socket, worker_socket = socketpair()
        local = LocalCoordinator(main_process.shared)
        self._main_rpc = RPC(self.reactor, main_socket, rpc_handlers(local), on_closed=local.close)
        self.rpc = RPC(self.reactor, worker_socket, {}, on_closed=lambda: None)
        self.space = self.lock = RemoteCoordinator(self.reactor, self.rpc)

    def reserve(self, key: IngestKey, size: int) -> list[Any]:
        """Return whether the reservation succeeds, as the only element of a list."""
        outcome = self.start(self.space.reserve(key, size, size, 0, "192.0.2.1"))
        return [result == "" for result in outcome]

    def release(self, key: IngestKey) -> None:
        self.space.release(key)
        self.reactor.iterate_all()

    def start(self, work: Coroutine[Any, Any, Any]) -> list[Any]:
        """Start `work`. Return a list to which its result is appended."""
        outcome: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(outcome.append)
        self.reactor.iterate_all()
        return outcome

    def die(self) -> None:
        self.rpc.message_socket.close()
        self.reactor.iterate_all()


class MainProcessStub:
    """The main process: a cache of `LIMIT` bytes, its reservations, and its locks."""

    def __init__(self, directory: Path) -> None:
        self.reactor = DescriptorThreadReactor()
        self.layout = Layout(directory)
        self.blobs = Blobs(self.layout, durable=False, clock=self.reactor.seconds)
        self.cache_space = CacheSpaceManager(
            self.reactor, self.layout, self.blobs,
            limit=LIMIT, max_blob_size=LIMIT, blob_cost=0, inactive=1e9, clock=self.reactor.seconds,
            janitor=Janitor(self.layout, Records(directory / "records"), self.reactor.seconds),
        )  # fmt: skip
        self.ended_logins = EndedLogins(self.reactor.seconds)
        self.logins = LocalLoginProvider(self.run_helper, self.reactor.seconds)
        self.refusing_clients = RefusingClients(lambda: 1234.5)
        self.pulls: list[dict[str, Any]] = []
        self.shared = SharedState(
            self.cache_space,
            self.ended_logins,
            self.logins,
            PullCounts(self.reactor.seconds),
            self.refusing_clients,
            self.pulls.append,
        )
        self.space = self.lock = LocalCoordinator(self.shared)

    def answer_with(self, *, overview: Any) -> None:
        self.shared.answer_with(Answers(overview, page_desk=self._refuse, doctor=self._refuse))

    async def _refuse(self, *_: Any) -> Any:
        raise AssertionError("this is not asked")

    async def run_helper(self, helper: str, server: str) -> Login | None:
        return BasicCredentials("AWS", f"{helper} {server}") if helper == "ecr" else IdentityToken(f"{helper} {server}")

    @property
    def reserved_bytes(self) -> int:
        """The bytes of all reserved and stored blobs."""
        return self.cache_space.index.total


@pytest.fixture(autouse=True)
def _unlimited_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheSpaceManager, "_free_bytes", lambda space: 2**60)


@pytest.fixture
def main_process(tmp_path: Path) -> MainProcessStub:
    return MainProcessStub(tmp_path)


@pytest.fixture
def workers(main_process: MainProcessStub) -> Iterator[tuple[WorkerStub, WorkerStub]]:
    one, other = WorkerStub(main_process), WorkerStub(main_process)
    yield one, other
    one.die()
    other.die()


# logins


def test_logins_of_helpers(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, acr = Host.parse("one.example"), Host.parse("acr.example:5000")
    main_process.logins.configure({one: "ecr", acr: "acr-env"}, DockerConfig())
    expected = BasicCredentials("AWS", "ecr one.example")
    for coordinator in (main_process.space, workers[0].space, workers[1].space):
        for refused in (None, expected, IdentityToken("x")):
            work = coordinator.get_login(one, refused, "10.0.0.1")
            assert workers[0].start(work) == [ProvidedLogin(expected, "CREDENTIAL_HELPERS")]
        [provided] = workers[0].start(coordinator.get_login(acr, None, ""))
        assert provided.login == IdentityToken("acr-env acr.example:5000")
        assert workers[0].start(coordinator.get_login(Host.parse("other.example"), None, "")) == [None]


def test_a_worker_without_a_main_process_has_no_logins(workers: tuple[WorkerStub, WorkerStub]) -> None:
    workers[0].die()
    assert workers[0].start(workers[0].space.get_login(Host.parse("one.example"), None, "")) == [None]


def test_refused_logins_are_reported(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    for worker in workers:
        worker.space.report_login("quay.io", "AUTH_REGISTRIES", "quay.io answered 401")
    main_process.reactor.iterate_all()
    assert [login["registry"] for login in main_process.ended_logins.report_list()] == ["quay.io"]
    workers[1].space.report_login("quay.io", "AUTH_REGISTRIES", "")
    main_process.reactor.iterate_all()
    assert main_process.ended_logins.report_list() == []


def test_refusing_clients_are_reported(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    for worker, client in zip(workers, ("10.0.0.7", "10.0.0.8"), strict=True):
        worker.space.report_refusal(client)
    main_process.reactor.iterate_all()
    assert main_process.refusing_clients.last_refusals() == {"10.0.0.7": 1234.5, "10.0.0.8": 1234.5}


# cache space


def test_space_is_reserved_until_release(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, other = workers
    assert one.reserve(ONE, 600) == [True]
    assert main_process.reserved_bytes == 600
    assert other.reserve(OTHER, 600) == [False]
    one.release(ONE)
    assert main_process.reserved_bytes == 0
    assert other.reserve(OTHER, 600) == [True]


def test_links_and_records_of_workers_count(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dockerproxy.cache.space._MAX_METADATA", 1 / 1000)  # so that the janitor does not walk yet
    for worker in workers:
        worker.space.record_files(2)
    main_process.space.record_files(1)
    main_process.reactor.iterate_all()
    assert workers[0].start(workers[0].space.usage()) == [(5 * 4096, LIMIT)]


def test_growing_blob_reserves_more(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, _ = workers
    assert [one.reserve(ONE, size) for size in (100, 200, LIMIT + 1)] == [[True], [True], [False]]
    one.release(ONE)
    assert main_process.reserved_bytes == 0


def test_release_by_former_owner_is_ignored(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    one.reserve(ONE, 300)
    other.reserve(ONE, 300)
    one.release(ONE)
    assert main_process.reserved_bytes == 300
    other.release(ONE)
    assert main_process.reserved_bytes == 0


def test_main_process_takes_over_a_reservation(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, _ = workers
    one.reserve(ONE, 300)
    one.start(main_process.space.reserve(ONE, 300, 300, 0, "192.0.2.1"))
    one.die()
    assert main_process.reserved_bytes == 300
    main_process.space.release(ONE)
    assert main_process.reserved_bytes == 0


def test_dead_worker_releases_only_its_own_reservations(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    one.reserve(ONE, 100)
    one.reserve(OTHER, 200)
    other.reserve(THIRD, 400)
    one.die()
    assert main_process.reserved_bytes == 400


def test_reservation_fails_without_the_main_process(workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, _ = workers
    one._main_rpc.message_socket.close()
    assert one.reserve(ONE, 1) == [False]


async def commit(worker: WorkerStub, blobs: Blobs, ingest: Ingest) -> None:
    """Commit an ingest as a download of the worker does."""
    async with worker.space.reservation(ingest, "192.0.2.1") as reservation:
        await reservation.grow(ingest.size, ingest.size)
        ingest.commit(blobs)
        await reservation.commit(ingest.size)


def test_committed_blob_is_counted_and_evicts_others(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, _ = workers
    old, new = b"a" * 500, b"b" * 600
    for content in (old, new):
        ingest = Ingest.open(main_process.layout, IngestKey("registry.example", Digest.of(content)))
        assert ingest is not None
        ingest.append([content])
        assert one.start(commit(one, main_process.blobs, ingest)) == [None]
        main_process.reactor.advance(100)
    assert main_process.reserved_bytes == 600
    assert [main_process.blobs.exists(Digest.of(content)) for content in (old, new)] == [False, True]


def test_worker_dies_between_commit_and_its_report(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    """The blob is counted when the worker's reservations are released."""
    one, _ = workers
    content = b"a" * 500
    ingest = Ingest.open(main_process.layout, IngestKey("registry.example", Digest.of(content)))
    assert ingest is not None
    ingest.append([content])
    assert one.reserve(ingest.key, 500) == [True]
    ingest.commit(main_process.blobs)
    one.die()
    assert main_process.reserved_bytes == 500
    main_process.reactor.advance(1)
    assert main_process.cache_space.index.expire(0.5, main_process.reactor.seconds()) == [Digest.of(content)]


def test_recorded_blob_is_counted(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, _ = workers
    one.start(one.space.record(ONE.digest, 250, "192.0.2.1", "registry.example"))
    assert main_process.reserved_bytes == 250


def test_uses_are_reported_in_batches_and_prevent_eviction(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, _ = workers
    for content in (b"a" * 400, b"b" * 400):
        main_process.blobs.put(content, Digest.of(content))
        one.start(one.space.record(Digest.of(content), 400, "192.0.2.1", "registry.example"))
        main_process.reactor.advance(100)
    for _ in range(3):
        one.space.touch(Digest.of(b"a" * 400))
    main_process.reactor.advance(10)
    main_process.reactor.iterate_all()
    one.reserve(THIRD, 400)
    assert [main_process.blobs.exists(Digest.of(letter * 400)) for letter in (b"a", b"b")] == [True, False]
    assert main_process.reactor.getDelayedCalls() == []


def test_use_reports_are_split(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = workers
    used: list[Digest] = []
    monkeypatch.setattr(main_process.cache_space, "touch", used.append)
    digests = [Digest.of(str(number).encode(), "sha512") for number in range(remote._MAX_USES_PER_REPORT + 1)]
    for digest in digests:
        one.space.touch(digest)
    main_process.reactor.iterate_all()
    assert len(used) == remote._MAX_USES_PER_REPORT
    main_process.reactor.advance(10)
    main_process.reactor.iterate_all()
    assert set(used) == set(digests)


def test_usage_is_the_same_in_all_processes(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    one.reserve(THIRD, 400)
    for space in (main_process.space, one.space, other.space):
        results: list[object] = []
        Deferred.fromCoroutine(space.usage()).addBoth(results.append)
        main_process.reactor.iterate_all()
        assert results == [(400, LIMIT)]


# locks


class LockHolder:
    """A coroutine that acquires a lock and holds it until `release`."""

    def __init__(self, reactor: DescriptorThreadReactor, lock: Coordinator, key: str = "a/b") -> None:
        self._reactor = reactor
        self._release: Deferred[None] = Deferred()
        self.holds_lock = False
        self.failure: Failure | None = None
        self.deferred = Deferred.fromCoroutine(self._hold(lock, key))
        self.deferred.addErrback(self._on_failure)
        reactor.iterate_all()

    async def _hold(self, lock: Coordinator, key: str) -> None:
        async with lock.hold(key):
            self.holds_lock = True
            try:
                await self._release
            finally:
                self.holds_lock = False

    def _on_failure(self, failure: Failure) -> None:
        self.failure = failure

    def release(self) -> None:
        self._release.callback(None)
        self._reactor.iterate_all()

    def cancel(self) -> None:
        self.deferred.cancel()
        self._reactor.iterate_all()


def test_lock_is_granted_in_request_order(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    holders = [
        LockHolder(main_process.reactor, lock)
        for lock in (one.lock, main_process.lock, other.lock, one.lock, main_process.lock)
    ]
    while holders:
        assert [holder.holds_lock for holder in holders] == [True] + [False] * (len(holders) - 1)
        holders.pop(0).release()
    assert main_process.shared.locks._locks == {}


def test_locks_of_different_keys_are_independent(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    holders = [LockHolder(main_process.reactor, one.lock, "a"), LockHolder(main_process.reactor, other.lock, "b")]
    assert [holder.holds_lock for holder in holders] == [True, True]
    for holder in holders:
        holder.release()


def test_cancelled_waiter_does_not_get_the_lock(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    holder, cancelled, next_one = (LockHolder(main_process.reactor, lock) for lock in (one.lock, other.lock, one.lock))
    cancelled.cancel()
    assert cancelled.failure is not None and cancelled.failure.check(CancelledError)
    holder.release()
    assert next_one.holds_lock
    next_one.release()
    assert main_process.shared.locks._locks == {}


def test_cancelled_holder_releases_the_lock(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    holder, waiting = LockHolder(main_process.reactor, one.lock), LockHolder(main_process.reactor, other.lock)
    holder.cancel()
    assert waiting.holds_lock
    waiting.release()


def test_cancellation_crosses_the_grant(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    """The worker cancels its wait while the message that grants it the lock is on the way."""
    one, other = workers
    holder, cancelled = LockHolder(main_process.reactor, main_process.lock), LockHolder(main_process.reactor, one.lock)
    holder._release.callback(None)  # the worker has not read yet that it holds the lock
    cancelled.deferred.cancel()
    main_process.reactor.iterate_all()
    waiting = LockHolder(main_process.reactor, other.lock)
    assert waiting.holds_lock
    waiting.release()
    assert main_process.shared.locks._locks == {}


def test_dead_worker_releases_its_locks(main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]) -> None:
    one, other = workers
    LockHolder(main_process.reactor, one.lock)
    LockHolder(main_process.reactor, one.lock)
    waiting = LockHolder(main_process.reactor, other.lock)
    one.die()
    assert waiting.holds_lock
    waiting.release()
    assert main_process.shared.locks._locks == {}


def test_failing_holder_releases_the_lock(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    one, other = workers
    holder, waiting = LockHolder(main_process.reactor, one.lock), LockHolder(main_process.reactor, other.lock)
    holder._release.errback(Failure(OSError()))  # type: ignore[no-untyped-call]
    main_process.reactor.iterate_all()
    assert waiting.holds_lock
    waiting.release()


class LockOrderMachine(RuleBasedStateMachine):
    """Workers and the main process acquire one lock; some cancel or die meanwhile. A list is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.main_process = MainProcessStub(Path(os.devnull))
        self.workers = [WorkerStub(self.main_process) for _ in range(2)]
        self.queue: list[tuple[LockHolder, int]] = []

    @rule(index=st.integers(0, 2))
    def request(self, index: int) -> None:
        lock = self.workers[index].lock if index < 2 else self.main_process.lock
        self.queue.append((LockHolder(self.main_process.reactor, lock), index))

    @precondition(lambda self: self.queue)
    @rule()
    def release(self) -> None:
        self.queue.pop(0)[0].release()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))[0].cancel()

    @rule(index=st.integers(0, 1))
    def die(self, index: int) -> None:
        self.workers[index].die()
        self.workers[index] = WorkerStub(self.main_process)
        self.queue = [(holder, owner) for holder, owner in self.queue if owner != index]

    @invariant()
    def only_the_head_of_the_queue_holds_the_lock(self) -> None:
        assert [holder.holds_lock for holder, _ in self.queue] == [position == 0 for position in range(len(self.queue))]

    def teardown(self) -> None:
        for worker in self.workers:
            worker.die()
        for holder, index in self.queue:
            if index == 2:
                holder.release()


TestLockOrder = LockOrderMachine.TestCase
TestLockOrder.settings = settings(max_examples=examples(25), stateful_step_count=25, deadline=None)


# the overview


async def echo_overview(resource: str, viewer: Sequence[Any], arguments: Mapping[str, str]) -> dict[str, Any]:
    return {"document": [resource, list(viewer), dict(arguments)]}


def test_a_worker_asks_the_main_process_for_the_overview(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub]
) -> None:
    main_process.answer_with(overview=echo_overview)
    values = "images", [None, False, True], {"q": "\udcff<b>", "page": "2"}
    expected = {"document": list(values)}
    assert workers[0].start(workers[0].space.get_overview(*values)) == [expected]
    local: list[Any] = []
    Deferred.fromCoroutine(main_process.space.get_overview(*values)).addBoth(local.append)
    assert local == [expected]


@pytest.mark.parametrize("event", ["hangs", "dies", "answers too much"])
def test_the_page_of_a_worker_says_that_the_main_process_does_not_answer(
    main_process: MainProcessStub, workers: tuple[WorkerStub, WorkerStub], event: str
) -> None:
    async def answer(*_: Any) -> dict[str, Any]:
        return {"document": "x" * 300_000} if event == "answers too much" else await Deferred()

    main_process.answer_with(overview=answer)
    worker = workers[0]
    outcome = worker.start(worker.space.get_overview("overview", [None, False, False], {}))
    if event == "dies":
        worker.die()
    elif event == "hangs":
        assert outcome == []
        worker.reactor.advance(30)
        worker.reactor.iterate_all()
    [failure] = outcome
    assert isinstance(failure.value, ServiceOverloaded)
    assert dict(failure.value.headers)["Retry-After"] == "10"
    other = workers[1].start(workers[1].lock.hold("key").__aenter__())  # the others go on
    assert other == [False]
