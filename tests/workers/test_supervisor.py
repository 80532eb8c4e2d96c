"""The supervisor of the workers. No processes are started; the test plays the fork server and the workers."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, LogLevel

from dockerproxy.cache.identity import Binding, Bindings
from dockerproxy.workers import message_socket as message_socket_module
from dockerproxy.workers import scoreboard as scoreboard_module
from dockerproxy.workers import supervisor as supervisor_module
from dockerproxy.workers.connection_table import ConnectionTable
from dockerproxy.workers.coordinator import LocalCoordinator
from dockerproxy.workers.fork_server import SpawnRequest
from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE
from dockerproxy.workers.rpc import RPC
from dockerproxy.workers.scoreboard import Scoreboard
from dockerproxy.workers.supervisor import WorkerState, WorkerSupervisor
from tests.workers.descriptor_reactor import DescriptorClockReactor

GRACE = 25.0
SETTING = "PROXY_LISTEN"
CLIENT = "192.0.2.1"
UNUSED_PID = 2**22  # above the largest process ID of the kernel


class FakeSpawner:
    """A fork server that starts no processes. `workers` are those that were requested."""

    observer: WorkerSupervisor

    def __init__(self, reactor: DescriptorClockReactor, scoreboard: Scoreboard) -> None:
        self.reactor = reactor
        self.scoreboard = scoreboard
        self.workers: list[FakeWorkerProcess] = []
        self.alive = True
        self.refuse = False

    def start(self, request: SpawnRequest) -> None:
        if self.refuse or not self.alive:
            raise BrokenPipeError("refused")
        log_copy = None if request.log_fd is None else os.dup(request.log_fd)
        sock = socket.socket(fileno=os.dup(request.socket_fd))
        self.workers.append(FakeWorkerProcess(self, request.number, dict(request.changed_settings), sock, log_copy))

    def close(self) -> None:
        self.alive = False

    def die(self) -> None:
        self.close()
        self.observer.fork_server_lost()


@define(eq=False, slots=False)
class FakeWorkerProcess:
    """A worker process, played by the test. It owns copies of the descriptors that it was started with."""

    spawner: FakeSpawner
    number: int
    changed_settings: dict[str, str]
    sock: socket.socket
    log_fd: int | None
    messages: list[Any] = field(factory=list)
    connections: list[tuple[str, int]] = field(factory=list)
    signals: list[int] = field(factory=list)
    reload_answer: Any = ""

    def __attrs_post_init__(self) -> None:
        # The same names as in dockerproxy.workers.process.
        handlers: dict[str, Callable[..., Any]] = {
            name: partial(self._record, name)
            for name in ("stop", "abort", "token_bound", "server_silent", "close_idle")
        }
        handlers |= {"reload": self._on_reload, "debug": lambda: {"pools": {}}}
        self.reactor = self.spawner.reactor
        self.slot = self.spawner.scoreboard.slot(self.number)
        self.rpc = RPC(self.reactor, self.sock, handlers, on_descriptor=self._on_descriptor, on_closed=lambda: None)

    def _record(self, name: str, *arguments: Any) -> None:
        self.messages.append((name, *arguments))

    def _on_reload(self, changed_settings: dict[str, str]) -> Any:
        self._record("reload", changed_settings)
        return self.reload_answer

    def _on_descriptor(self, message: tuple[str, int], descriptor: int | None) -> None:
        assert descriptor is not None
        os.close(descriptor)
        self.connections.append(message)

    @property
    def pid(self) -> int:
        return UNUSED_PID + self.number

    def mark_ready(self) -> None:
        self.spawner.observer.worker_started(self.number, self.pid)
        self.rpc.notify("ready")
        self.reactor.iterate_all()

    def close_silently(self) -> None:
        """Exit without a report of the fork server."""
        self.rpc.message_socket.close()
        if self.log_fd is not None:
            os.close(self.log_fd)
            self.log_fd = None
        self.reactor.iterate_all()

    def exit(self, reason: str = "exit status 1") -> None:
        self.close_silently()
        self.spawner.observer.worker_exited(self.number, reason)

    def write(self, data: bytes) -> None:
        assert self.log_fd is not None
        while data:
            data = data[os.write(self.log_fd, data[:4096]) :]
            self.reactor.iterate_all()


class FakeCoordinators:
    """Counts the coordinators that were opened and closed. Their `usage` is the number of those that were opened."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    def make(self) -> LocalCoordinator:
        self.opened += 1
        return LocalCoordinator(self)  # type: ignore[arg-type]

    # as the `SharedState` of the coordinators

    @property
    def owners(self) -> dict[Any, Any]:
        """A coordinator looks for its reservations when it is closed."""
        self.closed += 1
        return {}

    @property
    def space(self) -> FakeCoordinators:
        return self

    async def usage(self) -> tuple[int, int]:
        return self.opened, 0


class SupervisorHarness:
    """A supervisor with a fake fork server."""

    def __init__(self, count: int = 2, *, relay_logs: bool = False) -> None:
        self.reactor = DescriptorClockReactor()
        self.coordinators = FakeCoordinators()
        self.bindings = Bindings()
        self.silences: list[tuple[object, ...]] = []
        self.initial_news: list[tuple[str, tuple[object, ...]]] = []
        scoreboard = Scoreboard.create(count + 1, 100)
        self.table = ConnectionTable(self.reactor, scoreboard, lambda client: None)
        self.closed_here: Callable[[], None] = lambda: None
        self.spawner = FakeSpawner(self.reactor, scoreboard)
        self.supervisor = WorkerSupervisor(
            self.reactor,
            count,
            self.spawner,
            scoreboard,
            self.table,
            self.coordinators.make,
            {"token_bound": self.bindings.add, "server_silent": lambda *values: self.silences.append(values)},
            GRACE,
            relay_logs=relay_logs,
            initial_news=lambda: self.initial_news,
        )
        self.spawner.observer = self.supervisor
        self.bindings.subscribe(partial(self.supervisor.broadcast, "token_bound"))
        self._sockets: list[socket.socket] = []

    def start(self) -> list[FakeWorkerProcess]:
        self.supervisor.startService()
        return list(self.spawner.workers)

    def start_ready(self) -> list[FakeWorkerProcess]:
        workers = self.start()
        for worker in workers:
            worker.mark_ready()
        return workers

    def connect(self) -> bool:
        """Accept a connection. Return whether it was passed to a worker."""
        local, remote = socket.socketpair()
        self._sockets += [local, remote]
        dispatched = self.supervisor.dispatch(SETTING, local, CLIENT)
        if not dispatched:
            self.closed_here = self.table.serve_here(CLIENT)
        self.reactor.iterate_all()
        return dispatched

    def reload(self, settings: dict[str, str]) -> list[Any]:
        """Reload. Return a list to which the problems are appended."""
        problems: list[Any] = []
        Deferred.fromCoroutine(self.supervisor.reload(settings)).addBoth(problems.append)
        self.reactor.iterate_all()
        return problems

    def stop(self) -> list[Any]:
        results: list[Any] = []
        self.supervisor.stopService().addBoth(results.append)
        self.reactor.iterate_all()
        return results

    @property
    def started_count(self) -> int:
        return len(self.spawner.workers)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        for worker in self.spawner.workers:
            worker.close_silently()


@pytest.fixture
def make_harness() -> Iterator[Any]:
    harnesses: list[SupervisorHarness] = []

    def make(*arguments: Any, **named: Any) -> SupervisorHarness:
        harnesses.append(SupervisorHarness(*arguments, **named))
        return harnesses[-1]

    yield make
    for harness in harnesses:
        harness.close()


@pytest.fixture
def harness(make_harness: Any) -> SupervisorHarness:
    created: SupervisorHarness = make_harness()
    return created


@pytest.fixture
def fake_monotonic(monkeypatch: pytest.MonkeyPatch, harness: SupervisorHarness) -> None:
    """Make the clock of the heartbeats that of the reactor."""
    monkeypatch.setattr(scoreboard_module.time, "monotonic_ns", lambda: int(harness.reactor.seconds() * 1e9))


@pytest.fixture
def recorded_kills(monkeypatch: pytest.MonkeyPatch, harness: SupervisorHarness) -> None:
    """Record signals in the fake worker instead of sending them."""

    def record_kill(pid: int, number: int) -> None:
        [worker] = [worker for worker in harness.spawner.workers if worker.pid == pid]
        worker.signals.append(number)

    monkeypatch.setattr(supervisor_module.os, "kill", record_kill)


# start


def test_workers_get_their_number_and_an_rpc_socket(harness: SupervisorHarness) -> None:
    workers = harness.start()
    assert [worker.number for worker in workers] == [1, 2]
    results: list[Any] = []
    for worker in workers:
        Deferred.fromCoroutine(worker.rpc.call("usage")).addBoth(results.append)
    harness.reactor.iterate_all()
    assert results == [[2, 0], [2, 0]]
    assert {worker.log_fd for worker in workers} == {None}


# connections


def test_connection_goes_to_the_process_with_the_fewest(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    assert [harness.connect() for _ in range(6)] == [False, True, True] * 2
    assert (len(one.connections), len(other.connections)) == (2, 2)
    for _ in range(2):
        other.slot.count_closed(0)
    assert [harness.connect() for _ in range(3)] == [True, True, False]
    assert (len(one.connections), len(other.connections)) == (2, 4)
    assert other.connections[0] == [SETTING, 0]


def test_closed_local_connection_is_not_counted(harness: SupervisorHarness) -> None:
    harness.start_ready()
    assert [harness.connect() for _ in range(3)] == [False, True, True]
    harness.closed_here()
    assert [harness.connect() for _ in range(2)] == [False, False]


def test_worker_gets_no_connection_before_it_is_ready(harness: SupervisorHarness) -> None:
    workers = harness.start()
    assert [harness.connect() for _ in range(2)] == [False, False]
    workers[1].mark_ready()
    assert [harness.connect() for _ in range(2)] == [True, True]
    assert not workers[0].connections


def test_restarted_worker_starts_with_no_connections(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    for _ in range(6):
        harness.connect()
    one.exit()
    assert [harness.connect() for _ in range(3)] == [False, True, False]
    harness.reactor.advance(1)
    harness.spawner.workers[2].mark_ready()
    for _ in range(3):
        assert harness.connect()
    assert len(harness.spawner.workers[2].connections) == 3
    assert len(other.connections) == 3


def test_local_connection_is_counted(harness: SupervisorHarness) -> None:
    harness.start_ready()
    harness.table.serve_here(CLIENT)  # of a UNIX socket
    assert [harness.connect() for _ in range(3)] == [True, True, False]


def test_an_ended_worker_holds_no_connections(harness: SupervisorHarness) -> None:
    one, _ = harness.start_ready()
    for _ in range(6):
        harness.connect()
    one.exit()
    assert harness.table.report()["clients"] == {CLIENT: 4}


def test_idle_connections_are_closed_in_all_workers(harness: SupervisorHarness) -> None:
    workers = harness.start_ready()
    harness.supervisor.close_idle(CLIENT)
    harness.reactor.iterate_all()
    assert [worker.messages for worker in workers] == [[("close_idle", CLIENT)]] * 2


def test_full_message_socket_means_local_handling(harness: SupervisorHarness) -> None:
    one, _ = harness.start_ready()
    for worker in harness.spawner.workers:
        harness.reactor.removeReader(worker.rpc.message_socket)
    for worker in harness.supervisor._workers:
        while not worker.queued_messages:
            worker.notify("abort")
    assert not harness.connect()
    assert not one.connections


def test_no_dispatch_without_workers(make_harness: Any) -> None:
    harness = make_harness(0)
    assert not harness.connect()
    assert harness.start() == []
    assert harness.stop() == [None]


# exit and restart


def test_dead_worker_is_replaced_with_backoff(harness: SupervisorHarness) -> None:
    harness.start()
    delays = []
    for _ in range(9):
        harness.spawner.workers[-1].exit()
        started_before, seconds = harness.started_count, 0.0
        while harness.started_count == started_before:
            harness.reactor.advance(0.5)
            seconds += 0.5
        assert harness.spawner.workers[-1].number == 2
        delays.append(seconds)
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert harness.coordinators.closed == 9


def test_backoff_resets_after_a_stable_run(harness: SupervisorHarness, fake_monotonic: None) -> None:
    harness.start()
    harness.reactor.advance(10)
    for _ in range(3):
        worker = harness.spawner.workers[-1]
        for _ in range(60):
            for running in harness.spawner.workers:
                running.slot.heartbeat()
            harness.reactor.advance(1)
        worker.exit()
        started_before = harness.started_count
        harness.reactor.advance(0.5)
        assert harness.started_count == started_before + 1


def test_failed_start_is_retried(make_harness: Any, log_events: list[LogEvent]) -> None:
    harness = make_harness(1)
    harness.spawner.refuse = True
    harness.start()
    assert [event["number"] for event in log_events if "reason" in event] == [1]
    harness.reactor.advance(1)
    assert harness.started_count == 0
    harness.spawner.refuse = False
    harness.reactor.advance(2)
    assert harness.started_count == 1
    assert harness.coordinators.opened - harness.coordinators.closed == 1


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make the first call of a function raise EMFILE."""
    original, calls = getattr(owner, name), []

    def function(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("failing", ["socketpair", "connection", "pipe", "log relay", "request"])
def test_every_failure_to_start_is_retried(
    make_harness: Any, monkeypatch: pytest.MonkeyPatch, log_events: list[LogEvent], failing: str
) -> None:
    """At the limit of open files any of these calls fails. The next attempt follows after the usual delay."""
    harness = make_harness(1, relay_logs=True)
    owner, name = {
        "socketpair": (supervisor_module, "socketpair"),
        "connection": (supervisor_module, "RPC"),
        "pipe": (supervisor_module.os, "pipe"),
        "log relay": (supervisor_module, "LogRelay"),
        "request": (harness.spawner, "start"),
    }[failing]
    with monkeypatch.context() as patch:
        fail_once(patch, owner, name)
        harness.start()
        harness.reactor.iterate_all()
        assert harness.started_count == 0
        reasons = [event["reason"] for event in log_events if "reason" in event]
        assert reasons == ["not started: [Errno 24] Too many open files"]
        assert harness.reactor.readers == set()
        harness.reactor.advance(1)
    assert harness.started_count == 1
    harness.spawner.workers[0].mark_ready()
    assert [harness.connect() for _ in range(2)] == [False, True]


@pytest.mark.parametrize("first", ["socket", "fork server"])
def test_exit_is_reported_twice_in_any_order(harness: SupervisorHarness, first: str) -> None:
    """The socket closes, and the fork server reports the exit. The worker is replaced once."""
    _, worker = harness.start_ready()
    if first == "fork server":
        harness.supervisor.worker_exited(2, "exit status 1")
        worker.close_silently()
    else:
        worker.exit()
    assert harness.coordinators.closed == 1
    harness.reactor.advance(10)
    assert harness.started_count == 3
    assert len(harness.reactor.getDelayedCalls()) == 1  # the watchdog


def test_session_closes_with_its_socket(harness: SupervisorHarness) -> None:
    one, _ = harness.start_ready()
    one.rpc.message_socket.close()
    harness.reactor.iterate_all()
    assert harness.coordinators.closed == 1
    one.exit()
    assert harness.coordinators.closed == 1


# unresponsive workers


def test_worker_without_heartbeat_is_killed_and_replaced(
    harness: SupervisorHarness, fake_monotonic: None, recorded_kills: None
) -> None:
    alive, hung = harness.start_ready()
    for _ in range(60):
        harness.reactor.advance(1)
        alive.slot.heartbeat()
    assert hung.signals == []
    for _ in range(40):
        harness.reactor.advance(1)
        alive.slot.heartbeat()
    assert hung.signals[0] == signal.SIGKILL
    assert alive.signals == []
    hung.exit()
    harness.reactor.advance(1)
    assert harness.started_count == 3


def test_suspended_daemon_kills_no_worker(
    harness: SupervisorHarness, fake_monotonic: None, recorded_kills: None
) -> None:
    workers = harness.start_ready()
    harness.reactor.advance(300)
    for _ in range(60):
        for worker in workers:
            worker.slot.heartbeat()
        harness.reactor.advance(1)
    assert [worker.signals for worker in workers] == [[], []]


# exit of the fork server


def test_workers_continue_without_the_fork_server(harness: SupervisorHarness, log_events: list[LogEvent]) -> None:
    one, other = harness.start_ready()
    harness.spawner.die()
    assert [harness.connect() for _ in range(3)] == [False, True, True]
    one.close_silently()
    harness.reactor.advance(100)
    assert harness.started_count == 2
    assert [harness.connect() for _ in range(2)] == [False, True]
    assert len(other.connections) == 2
    levels = [event["log_level"] for event in log_events if event.get("log_namespace") == supervisor_module.__name__]
    assert [level for level in levels if level > LogLevel.warn] == [LogLevel.critical, LogLevel.error]
    ended = harness.stop()
    other.close_silently()
    assert ended == [None]


def test_stop_does_not_wait_for_worker_that_ended_with_the_fork_server(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    one.close_silently()
    ended = harness.stop()
    other.exit()
    assert ended == []
    harness.spawner.die()
    assert ended == [None]


def test_hung_worker_is_killed_without_the_fork_server(harness: SupervisorHarness, recorded_kills: None) -> None:
    one, other = harness.start_ready()
    harness.spawner.die()
    harness.stop()
    harness.reactor.advance(GRACE)
    assert (one.signals, other.signals) == ([signal.SIGKILL], [signal.SIGKILL])


def test_fork_server_is_closed_after_all_workers(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    harness.stop()
    one.exit()
    assert harness.spawner.alive
    other.exit()
    assert not harness.spawner.alive


# token bindings


def test_token_bindings_are_broadcast(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    one.rpc.notify("token_bound", "a token", "realm", "own:client", ["a/b"], 17.5)
    harness.reactor.iterate_all()
    assert harness.bindings.get("a token") == Binding("realm", "own:client", frozenset({"a/b"}), 17.5)
    assert (one.messages, other.messages) == ([], [("token_bound", "a token", "realm", "own:client", ["a/b"], 17.5)])
    harness.bindings.bind("another", Binding("realm", "own:client", frozenset(), 18.0))
    harness.reactor.iterate_all()
    assert [worker.messages[-1] for worker in (one, other)] == [
        ("token_bound", "another", "realm", "own:client", [], 18.0)
    ] * 2


def test_silent_servers_are_broadcast(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    one.rpc.hint("server_silent", "https://quay.io", "quay.io:443: timed out", 30.0)
    harness.supervisor.broadcast("server_silent", "https://ghcr.io", "", 0.0)
    harness.reactor.iterate_all()
    assert harness.silences == [("https://quay.io", "quay.io:443: timed out", 30.0)]
    assert ("server_silent", "https://quay.io", "quay.io:443: timed out", 30.0) in other.messages
    assert one.messages == [("server_silent", "https://ghcr.io", "", 0.0)]


def test_a_new_worker_gets_the_news(harness: SupervisorHarness) -> None:
    harness.initial_news = [("server_silent", ("https://quay.io", "refused", 0.0))]
    for worker in harness.start_ready():
        assert worker.messages == [("server_silent", "https://quay.io", "refused", 0.0)]


def test_bindings_never_end_a_worker(harness: SupervisorHarness) -> None:
    """A worker that is behind misses bindings, which are hints. It then gets messages as before."""
    one, other = harness.start_ready()
    harness.reactor.removeReader(one.rpc.message_socket)  # it is busy
    for number in range(10_001):
        harness.supervisor.broadcast("token_bound", f"token {number}", "realm", "own:client", [], 17.5)
        if number % 50 == 0:
            harness.reactor.iterate()
    assert [handle.state for handle in harness.supervisor._workers] == [WorkerState.SERVING] * 2
    assert harness.supervisor._workers[0].queued_messages == message_socket_module._MAX_QUEUED_HINTS
    assert harness.supervisor._workers[0].dropped_hints > 0
    harness.reactor.addReader(one.rpc.message_socket)
    harness.supervisor.abort()
    for _ in range(200):
        harness.reactor.iterate()
    assert one.messages[-1] == ("abort",)
    assert len(other.messages) == 10_001 + 1


# reload, abort, stop


def test_worker_that_cannot_reload_is_replaced(harness: SupervisorHarness) -> None:
    """It would give access to users that were removed. Its clients' requests may finish."""
    one, other = harness.start_ready()
    other.reload_answer = "HTPASSWD_FILE: /x: Permission denied."
    problem = "worker 2 is restarted, because it could not reload: HTPASSWD_FILE: /x: Permission denied."
    assert harness.reload({"ANONYMOUS_PULL": "true"}) == [[problem]]
    harness.reactor.iterate_all()
    assert (one.messages[1:], other.messages[1:]) == ([], [("stop",)])
    assert [harness.connect() for _ in range(4)] == [False, True] * 2
    assert other.connections == []
    other.exit("exit status 0")
    harness.reactor.advance(1)
    [*_, replacement] = harness.spawner.workers
    assert (replacement.number, replacement.changed_settings) == (2, {"ANONYMOUS_PULL": "true"})


def test_worker_that_does_not_answer_a_reload_is_killed(harness: SupervisorHarness, recorded_kills: None) -> None:
    one, other = harness.start_ready()
    other.reload_answer = Deferred()
    problems = harness.reload({"ANONYMOUS_PULL": "true"})
    assert problems == []
    harness.reactor.advance(supervisor_module._REPLY_TIMEOUT)
    assert problems == [["worker 2 is restarted, because it could not reload: it did not answer within 10 s"]]
    harness.reactor.advance(GRACE)
    assert (one.signals, other.signals) == ([], [signal.SIGKILL])


def test_reload_of_settings_that_do_not_fit_into_a_message(harness: SupervisorHarness) -> None:
    harness.start_ready()
    [problems] = harness.reload({"REGISTRIES": "a" * MAX_MESSAGE_SIZE})
    assert len(problems) == 2
    assert all("it could not reload: reload was not sent: " in problem for problem in problems)


def test_reload_does_not_wait_for_a_dead_worker(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    other.reload_answer = Deferred()
    problems = harness.reload({"ANONYMOUS_PULL": "true"})
    other.exit()
    assert problems == [[]]
    one.exit()
    assert harness.reload({"ANONYMOUS_PULL": "false"}) == [[]]


def test_worker_stopped_while_it_starts_gets_no_connections(harness: SupervisorHarness) -> None:
    one, _ = harness.start()
    harness.stop()
    one.mark_ready()
    assert [harness.connect() for _ in range(2)] == [False, False]


def test_debug_reports_each_worker(harness: SupervisorHarness) -> None:
    one, other = harness.start_ready()
    for _ in range(3):
        harness.connect()
    other.exit()
    reports: list[Any] = []
    Deferred.fromCoroutine(harness.supervisor.debug()).addBoth(reports.append)
    harness.reactor.iterate_all()
    [[first, second]] = reports
    assert first == {
        "number": 1,
        "state": "serving",
        "pid": one.pid,
        "connections": 1,
        "queued messages": 0,
        "dropped hints": 0,
        "pools": {},
    }
    assert (second["state"], second["pid"]) == ("ended", None)


def test_changed_settings_reach_current_and_future_workers(make_harness: Any) -> None:
    harness = make_harness(2)
    workers = harness.start_ready()
    assert harness.reload({"REGISTRIES": "ghcr.io"}) == [[]]
    assert [worker.messages for worker in workers] == [[("reload", {"REGISTRIES": "ghcr.io"})]] * 2
    workers[0].exit()
    harness.reactor.advance(1)
    assert [worker.changed_settings for worker in harness.spawner.workers] == [{}, {}, {"REGISTRIES": "ghcr.io"}]


def test_stop_waits_for_all_workers(harness: SupervisorHarness) -> None:
    workers = harness.start_ready()
    ended = harness.stop()
    assert [worker.messages for worker in workers] == [[("stop",)]] * 2
    assert ended == []
    for worker in workers:
        assert ended == []
        worker.exit()
    assert ended == [None]
    harness.reactor.advance(100)
    assert harness.started_count == 2
    assert harness.reactor.getDelayedCalls() == []


def test_stop_reaches_starting_workers(harness: SupervisorHarness) -> None:
    workers = harness.start()
    harness.stop()
    assert [worker.messages for worker in workers] == [[("stop",)]] * 2


def test_connections_are_handled_locally_while_stopping(harness: SupervisorHarness) -> None:
    workers = harness.start_ready()
    harness.stop()
    assert [harness.connect() for _ in range(3)] == [False] * 3
    assert [worker.connections for worker in workers] == [[], []]


def test_abort_reaches_all_workers(harness: SupervisorHarness) -> None:
    workers = harness.start_ready()
    harness.stop()
    harness.supervisor.abort()
    harness.reactor.iterate_all()
    assert [worker.messages for worker in workers] == [[("stop",), ("abort",)]] * 2


def test_worker_is_killed_after_the_grace_period(harness: SupervisorHarness, recorded_kills: None) -> None:
    one, other = harness.start_ready()
    ended = harness.stop()
    other.exit()
    harness.reactor.advance(GRACE - 1)
    assert (ended, one.signals) == ([], [])
    harness.reactor.advance(1)
    assert (ended, one.signals, other.signals) == ([None], [signal.SIGKILL], [])


def test_dead_worker_is_not_replaced_while_stopping(harness: SupervisorHarness) -> None:
    """The second worker died before the stop, and its restart delay passes while the first is still stopping."""
    one, other = harness.start_ready()
    other.exit()
    ended = harness.stop()
    harness.reactor.advance(20)
    assert harness.started_count == 2
    one.exit()
    assert ended == [None]
    assert harness.reactor.getDelayedCalls() == []


# log


def test_worker_output_is_relayed_to_the_log(make_harness: Any, log_events: list[LogEvent]) -> None:
    worker = make_harness(1, relay_logs=True).start()[0]
    worker.write(b"a line\nlast words")
    worker.exit()
    assert [event["line"] for event in log_events if "line" in event] == ["a line", "last words"]
