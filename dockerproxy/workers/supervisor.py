"""The supervisor of the workers in the main process: starts, replaces, reloads and stops them.

A worker is a number; one process after the other has it. `WorkerState` is what is known of the current process:

    state           event                                          next state
    ENDED           the fork server is asked for a process         STARTING
    STARTING        it reports that it is ready                    SERVING
    STARTING, SERVING                it is told to stop            STOPPING
    STARTING, SERVING, STOPPING      its socket closes             DISCONNECTED
    any             the fork server reports its exit               ENDED
    ENDED, STARTING the request fails                              ENDED
    DISCONNECTED    the fork server exits, or is gone already      ENDED

The exit of a process is reported by its socket, which closes, and by the fork server. The first ends its reservations
and locks, the second starts its successor. Without the fork server the socket alone tells of the exit, and there is no
successor. A start that fails for any reason is an exit: it is retried with the same delays.
"""

from __future__ import annotations

import enum
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Protocol

from attrs import define, field
from twisted.application.service import Service
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from dockerproxy.concurrency import spawn
from dockerproxy.workers.connection_table import ConnectionTable
from dockerproxy.workers.coordinator import LocalCoordinator, rpc_handlers
from dockerproxy.workers.fork_server import SpawnRequest
from dockerproxy.workers.log_relay import LogRelay
from dockerproxy.workers.message_socket import socketpair
from dockerproxy.workers.rpc import RPC, RemoteError
from dockerproxy.workers.scoreboard import Scoreboard

_HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a worker is killed
_RESTART_DELAYS = (0.5, 1, 2, 4, 8, 16, 30)  # seconds before a dead worker is replaced
_STABLE_AFTER = 60.0  # seconds after which the exit of a worker does not count as a failed start
_REPLY_TIMEOUT = 10.0  # seconds that a worker has to answer

_UNKNOWN_REASON = "exit status unknown"

log = Logger()


class Spawner(Protocol):
    """Starts worker processes, and reports to a `SpawnObserver`; see `ForkServer`."""

    @property
    def alive(self) -> bool: ...

    def start(self, request: SpawnRequest) -> None: ...

    def close(self) -> None: ...


class WorkerState(enum.Enum):
    """The state of a worker's current process; see the module's docstring."""

    ENDED = enum.auto()
    STARTING = enum.auto()
    SERVING = enum.auto()
    STOPPING = enum.auto()
    DISCONNECTED = enum.auto()


class WorkerSupervisor(Service):
    """Supervises `count` workers. The number of the main process is 0, those of the workers begin at 1.

    `new_coordinator` returns a `LocalCoordinator` for a new worker. `grace` is the time in seconds that workers have to
    stop. If `relay_logs` is true, workers send their log to this process through a pipe.
    `on_ended` is called for each worker that ends unasked.
    `news` has a function for each kind of news that a worker reports, which gets its values; the other workers get them
    too (`Bindings.add`, `SilentServers.add`). A new worker gets `initial_news`, kinds and values.

    The supervisor is a `SpawnObserver`; the composition root subscribes it to the spawner.
    """

    def __init__(
        self,
        reactor: Any,
        count: int,
        spawner: Spawner,
        scoreboard: Scoreboard,
        table: ConnectionTable,
        new_coordinator: Callable[[], LocalCoordinator],
        news: Mapping[str, Callable[..., None]],
        grace: float,
        *,
        relay_logs: bool,
        on_ended: Callable[[], object] = bool,
        initial_news: Callable[[], Iterable[tuple[str, Iterable[Any]]]] = tuple,
    ) -> None:
        self._reactor = reactor
        self._spawner = spawner
        self._slots = [scoreboard.slot(number) for number in range(count + 1)]
        self._table = table
        self._new_coordinator = new_coordinator
        self._news = news
        self._grace = grace
        self._relay_logs = relay_logs
        self._report_end = on_ended
        self._initial_news = initial_news
        self._changed_settings: dict[str, str] = {}
        self._workers = [WorkerHandle(number) for number in range(1, count + 1)]
        self._watchdog = LoopingCall(self._check_heartbeats)
        self._watchdog.clock = reactor
        self._stopping = False

    @property
    def serving(self) -> int:
        """The number of workers that serve."""
        return sum(worker.state is WorkerState.SERVING for worker in self._workers)

    # connections

    def dispatch(self, setting: str, sock: socket.socket, client: str) -> bool:
        """Hand over a connection to the process with the fewest. Return False if this process must serve it.

        That is the case if this process has the fewest, or if no worker is serving: the workers stop before the
        listeners close.
        """
        chosen, fewest = None, self._table.open_in(0)
        for worker in self._workers:
            if worker.state is WorkerState.SERVING:
                open_connections = self._table.open_in(worker.number)
                if open_connections < fewest:
                    chosen, fewest = worker, open_connections
        if chosen is None:
            return False
        index = self._table.index_of(chosen.number, client)
        if not chosen.hand_over(setting, index, sock):
            return False
        self._table.add(chosen.number, client)
        return True

    @property
    def process_ids(self) -> list[int]:
        """The IDs of the workers' processes."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def close_idle(self, client: str) -> None:
        """Make the workers close idle connections of `client`."""
        for worker in self._workers:
            worker.notify("close_idle", client)

    # the service

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        for worker in self._workers:
            self._start_worker(worker)
        self._watchdog.start(_HEARTBEAT_TIMEOUT / 4, now=False)

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        self._stopping = True
        if self._watchdog.running:
            self._watchdog.stop()
        for worker in self._workers:
            if worker.restart_timer is not None and worker.restart_timer.active():
                worker.restart_timer.cancel()
        return Deferred.fromCoroutine(self._stop())

    async def reload(self, changed_settings: Mapping[str, str]) -> list[str]:
        """Send changed settings to the workers, and to those that start later.

        A worker that cannot apply them would give access to removed users, so it is replaced. Return a sentence for
        each of them.
        """
        self._changed_settings.update(changed_settings)
        answers = [
            (worker, Deferred.fromCoroutine(self._reload_worker(worker, changed_settings)))
            for worker in self._workers
            if worker.running
        ]
        problems = []
        for worker, answer in answers:
            reason = await answer
            if reason and worker.running:
                problems.append(f"worker {worker.number} is restarted, because it could not reload: {reason}")
                spawn(self._stop_worker(worker, self._grace), f"stopping worker {worker.number}")
        return problems

    def report(self) -> list[dict[str, Any]]:
        """Return the number, the state and the process ID of each worker, as known here."""
        return [_describe(worker) for worker in self._workers]

    async def debug(self) -> list[dict[str, Any]]:
        """Return the state of each worker: what is known here, and what the worker itself reports."""
        reports = [Deferred.fromCoroutine(self._report(worker)) for worker in self._workers]
        return [await report for report in reports]

    def broadcast(self, kind: str, *values: Any) -> None:
        """Send news of this process to the workers, as a hint: a worker that is behind gets none."""
        self._send_news(None, kind, values)

    def abort(self) -> None:
        """Make the workers abort their open connections at once."""
        for worker in self._workers:
            worker.notify("abort")

    # SpawnObserver

    def worker_started(self, number: int, pid: int) -> None:
        self._workers[number - 1].pid = pid

    def worker_exited(self, number: int, reason: str) -> None:
        self._on_ended(self._workers[number - 1], reason)

    def fork_server_lost(self) -> None:
        if not self._stopping:
            log.critical("the fork server has exited; workers that exit are not replaced until the daemon is restarted")
        for worker in self._workers:
            if worker.state is WorkerState.DISCONNECTED:
                self._on_ended(worker, _UNKNOWN_REASON)

    # start and end of a worker

    def _start_worker(self, worker: WorkerHandle) -> None:
        worker.restart_timer = None
        worker.started_at = self._reactor.seconds()
        self._table.reset(worker.number)
        try:
            self._request_worker(worker)
        except OSError as error:  # EMFILE, ENOMEM; or the fork server is gone
            self._on_ended(worker, f"not started: {error}")

    def _request_worker(self, worker: WorkerHandle) -> None:
        """Ask the fork server for a process. Raise `OSError`; then nothing is left open but `worker.rpc`."""
        with ExitStack() as stack:
            parent_socket, child_socket = socketpair()
            stack.callback(child_socket.close)
            on_news = {kind: partial(self._on_worker_news, worker, kind) for kind in self._news}
            worker.connect(self._reactor, parent_socket, self._new_coordinator(), self._on_worker_disconnected, on_news)
            log_fd = None
            if self._relay_logs:
                read_fd, log_fd = os.pipe()
                stack.callback(os.close, log_fd)
                LogRelay(self._reactor, read_fd)
            self._spawner.start(SpawnRequest(worker.number, self._changed_settings, child_socket.fileno(), log_fd))
        for kind, values in self._initial_news():
            worker.hint(kind, *values)

    def _on_worker_disconnected(self, worker: WorkerHandle) -> None:
        if not self._spawner.alive:
            self._on_ended(worker, _UNKNOWN_REASON)

    def _on_ended(self, worker: WorkerHandle, reason: str) -> None:
        worker.end()
        self._table.reset(worker.number)
        if self._stopping:
            return
        self._report_end()
        if not self._spawner.alive:
            log.error(
                "worker {number} exited ({reason}) and is not replaced; restart the daemon",
                number=worker.number,
                reason=reason,
            )
            return
        stable = self._reactor.seconds() - worker.started_at >= _STABLE_AFTER
        worker.early_exits = 0 if stable else worker.early_exits + 1
        delay = _RESTART_DELAYS[min(worker.early_exits, len(_RESTART_DELAYS) - 1)]
        log.error(
            "worker {number} exited ({reason}); starting another one in {delay} s",
            number=worker.number, reason=reason, delay=delay,
        )  # fmt: skip
        worker.restart_timer = self._reactor.callLater(delay, self._start_worker, worker)

    async def _stop(self) -> None:
        stops = [Deferred.fromCoroutine(self._stop_worker(worker, self._grace)) for worker in self._workers]
        for stop in stops:
            await stop
        self._spawner.close()

    async def _stop_worker(self, worker: WorkerHandle, grace: float) -> None:
        """Let the connections of a worker finish, and kill it if it still runs after `grace` seconds."""
        worker.stop()
        try:
            await worker.wait_ended().addTimeout(grace, self._reactor)
        except TimeoutError:
            worker.kill()

    def _check_heartbeats(self) -> None:
        now = time.monotonic_ns()
        for worker in self._workers:
            last_heartbeat = self._slots[worker.number].last_heartbeat
            was_unresponsive, worker.unresponsive = worker.unresponsive, now - last_heartbeat > _HEARTBEAT_TIMEOUT * 1e9
            # Kill only if the previous check failed as well. If the whole daemon was suspended (a frozen container),
            # this process may resume before the workers do.
            if worker.state is not WorkerState.ENDED and worker.unresponsive and was_unresponsive:
                log.error(
                    "worker {number} unresponsive for {seconds:.0f} s, sending SIGKILL",
                    number=worker.number,
                    seconds=_HEARTBEAT_TIMEOUT,
                )
                worker.kill()

    # messages

    async def _reload_worker(self, worker: WorkerHandle, changed_settings: Mapping[str, str]) -> str:
        """Return why the worker could not reload, or ``""``."""
        try:
            return str(await worker.call(self._reactor, "reload", changed_settings))
        except RemoteError as error:
            return str(error)

    async def _report(self, worker: WorkerHandle) -> dict[str, Any]:
        report = {**_describe(worker), "connections": self._table.open_in(worker.number)}
        if worker.state is not WorkerState.SERVING:
            return report
        report["queued messages"], report["dropped hints"] = worker.queued_messages, worker.dropped_hints
        try:
            answer: dict[str, Any] = await worker.call(self._reactor, "debug")
        except RemoteError as error:
            answer = {"error": str(error)}
        return report | answer

    def _on_worker_news(self, worker: WorkerHandle, kind: str, *values: Any) -> None:
        self._news[kind](*values)
        self._send_news(worker, kind, values)

    def _send_news(self, source: WorkerHandle | None, kind: str, values: Iterable[Any]) -> None:
        for worker in self._workers:
            if worker is not source:
                worker.hint(kind, *values)


def _describe(worker: WorkerHandle) -> dict[str, Any]:
    return {"number": worker.number, "state": worker.state.name.lower(), "pid": worker.pid}


@define(eq=False)
class WorkerHandle:
    """A worker as the main process sees it. `rpc` is connected while it is `running`."""

    number: int
    state: WorkerState = WorkerState.ENDED
    rpc: RPC | None = None
    pid: int | None = None
    restart_timer: Any = None
    started_at: float = 0.0
    early_exits: int = 0
    unresponsive: bool = False
    _exit_waiters: list[Deferred[None]] = field(factory=list)

    @property
    def running(self) -> bool:
        """Whether the process can be called."""
        return self.state not in (WorkerState.ENDED, WorkerState.DISCONNECTED)

    @property
    def queued_messages(self) -> int:
        return 0 if self.rpc is None else self.rpc.message_socket.queued

    @property
    def dropped_hints(self) -> int:
        return 0 if self.rpc is None else self.rpc.message_socket.dropped_hints

    def connect(
        self,
        reactor: Any,
        sock: Any,
        coordinator: LocalCoordinator,
        on_disconnected: Callable[[WorkerHandle], None],
        on_news: Mapping[str, Callable[..., None]],
    ) -> None:
        """Connect to a process that is about to be started."""

        def on_closed() -> None:
            coordinator.close()
            if self.running:
                self.state = WorkerState.DISCONNECTED
                on_disconnected(self)

        self.state, self.unresponsive = WorkerState.STARTING, False
        handlers: dict[str, Callable[..., Any]] = {
            **rpc_handlers(coordinator),
            "ready": self._on_ready,
            **on_news,
        }
        self.rpc = RPC(reactor, sock, handlers, on_closed=on_closed)

    def _on_ready(self) -> None:
        if self.state is WorkerState.STARTING:
            self.state = WorkerState.SERVING
        log.info("worker {number} serves", number=self.number)

    def end(self) -> None:
        """Note that the process has exited, or was not started."""
        self.state, self.pid, rpc, self.rpc = WorkerState.ENDED, None, self.rpc, None
        if rpc is not None:
            rpc.message_socket.close()
        waiters, self._exit_waiters = self._exit_waiters, []
        for waiter in waiters:
            waiter.callback(None)

    def hand_over(self, setting: str, index: int, sock: socket.socket) -> bool:
        """Send a copy of a connection, and the index of its client's counter. Return whether it was sent."""
        if self.rpc is None:
            return False
        try:
            self.rpc.message_socket.send_descriptors([setting, index], [sock.fileno()])
        except OSError:  # the worker is behind, or gone
            return False
        return True

    async def call(self, reactor: Any, name: str, *arguments: Any) -> Any:
        """Call a handler of the worker. Raise `RemoteError`, also if it does not answer in time."""
        if self.rpc is None or not self.running:
            raise RemoteError("it is not running")
        call = Deferred.fromCoroutine(self.rpc.call(name, *arguments))
        try:
            return await call.addTimeout(_REPLY_TIMEOUT, reactor)
        except TimeoutError:
            raise RemoteError(f"it did not answer within {_REPLY_TIMEOUT:.0f} s") from None

    def notify(self, name: str, *arguments: Any) -> None:
        if self.rpc is not None and self.running:
            self.rpc.notify(name, *arguments)

    def hint(self, name: str, *arguments: Any) -> None:
        if self.rpc is not None:
            self.rpc.hint(name, *arguments)

    def stop(self) -> None:
        """Make the process finish its requests and exit."""
        if self.running:
            self.notify("stop")
        if self.running:
            self.state = WorkerState.STOPPING

    def kill(self) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait_ended(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred(self._exit_waiters.remove)
        if self.state is WorkerState.ENDED:
            waiter.callback(None)
        else:
            self._exit_waiters.append(waiter)
        return waiter
