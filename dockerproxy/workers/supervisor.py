"""The supervisor of the workers in the main process: starts, replaces, reloads and stops them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from attrs import define, evolve, field
from twisted.application.service import Service
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from dockerproxy.cache.identity import Bindings
from dockerproxy.daemon.listener_service import Listener
from dockerproxy.workers.dispatch import ConnectionDispatcher
from dockerproxy.workers.log_relay import LogRelay
from dockerproxy.workers.message_socket import MessageSocket, socketpair
from dockerproxy.workers.rpc import RPC
from dockerproxy.workers.scoreboard import Scoreboard

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats of a worker."""

_HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a worker is killed
_RESTART_DELAYS = (0.5, 1, 2, 4, 8, 16, 30)  # seconds before a dead worker is replaced
_STABLE_AFTER = 60.0  # seconds after which the exit of a worker does not count as a failed start

_UNKNOWN_REASON = "exit status unknown"

log = Logger()


class Spawner(Protocol):
    """Starts worker processes; see `ForkServer`."""

    on_started: Callable[[int, int], None]
    on_exited: Callable[[int, str], None]
    on_lost: Callable[[], None]

    @property
    def alive(self) -> bool: ...

    def start(self, number: int, changed_settings: Mapping[str, str], socket_fd: int, log_fd: int | None) -> bool: ...

    def close(self) -> None: ...


class WorkerSupervisor(Service):
    """Supervises `count` workers. The number of the main process is 0, those of the workers begin at 1.

    `new_session` returns a `WorkerSession` for a new worker. `grace` is the time in seconds that workers have to stop.
    If `relay_logs` is true, workers send their log to this process through a pipe. A token binding that one process
    adds to its `bindings` is sent to all others.
    """

    def __init__(
        self,
        reactor: Any,
        count: int,
        spawner: Spawner,
        scoreboard: Scoreboard,
        new_session: Callable[[], Any],
        bindings: Bindings,
        grace: float,
        *,
        relay_logs: bool,
    ) -> None:
        self._reactor = reactor
        self._spawner = spawner
        spawner.on_started, spawner.on_exited, spawner.on_lost = self._on_started, self._on_exited, self._spawner_lost
        self._relay_logs = relay_logs
        self._changed_settings: dict[str, str] = {}
        self._new_session = new_session
        self._grace = grace
        self._scoreboard = scoreboard
        self._workers = [WorkerHandle(number) for number in range(1, count + 1)]
        self._dispatched = [0] * (count + 1)
        self._watchdog = LoopingCall(self._check_heartbeats)
        self._watchdog.clock = reactor
        self._stopping = False
        self._bindings = bindings
        bindings.on_bind = partial(self._broadcast_binding, None)

    # connections

    def dispatching_listeners(self, listeners: Sequence[Listener]) -> list[Listener]:
        """Return copies of `listeners` that pass their connections to workers."""
        if not self._workers:
            return list(listeners)
        for listener in listeners:
            listener.site.on_closed = partial(self._scoreboard.count_closed, 0)
        return [
            evolve(listener, factory=ConnectionDispatcher(number, listener.site, self.dispatch))
            for number, listener in enumerate(listeners)
        ]

    def dispatch(self, label: bytes, sock: socket.socket | None) -> bool:
        """Pass a connection to the process with the fewest connections. Return False if this process must serve it.

        That is the case if this process has the fewest, if no worker is ready, if `sock` is None (not TCP), or if the
        daemon is stopping: the workers stop before the listeners close.
        """
        scoreboard, dispatched = self._scoreboard, self._dispatched
        chosen, fewest = None, dispatched[0] - scoreboard.closed_connections(0)
        for worker in self._workers if sock is not None and not self._stopping else ():
            open_connections = dispatched[worker.number] - scoreboard.closed_connections(worker.number)
            if worker.ready and open_connections < fewest:
                chosen, fewest = worker, open_connections
        if chosen is not None and sock is not None and chosen.message_socket.send_descriptors(label, sock.fileno()):
            dispatched[chosen.number] += 1
            return True
        dispatched[0] += 1
        return False

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

    def reload(self, changed_settings: Mapping[str, str]) -> None:
        """Send changed settings to the workers, and to those that start later."""
        self._changed_settings.update(changed_settings)
        for worker in self._workers:
            worker.notify("reload", changed_settings)

    def abort(self) -> None:
        """Make the workers abort their open connections at once."""
        for worker in self._workers:
            worker.notify("abort")

    async def _stop(self) -> None:
        for worker in self._workers:
            worker.notify("stop")
        deadline = self._reactor.seconds() + self._grace
        for worker in self._workers:
            try:
                await worker.wait_ended().addTimeout(max(0.0, deadline - self._reactor.seconds()), self._reactor)
            except TimeoutError:
                worker.kill()
        self._spawner.close()

    def _start_worker(self, worker: WorkerHandle) -> None:
        worker.restart_timer = None
        worker.unresponsive = False
        parent_socket, child_socket = socketpair()
        session = self._new_session()
        self._scoreboard.reset(worker.number, time.monotonic_ns())
        self._dispatched[worker.number] = 0
        worker.started_at = self._reactor.seconds()
        worker.rpc = RPC(
            self._reactor,
            parent_socket,
            {**session.handlers, "ready": worker.mark_ready, "token_bound": partial(self._on_token_bound, worker)},
            on_closed=lambda: self._on_disconnected(worker, session),
        )
        log_fd = None
        if self._relay_logs:
            read_fd, log_fd = os.pipe()
            LogRelay(self._reactor, read_fd)
        with child_socket:
            requested = self._spawner.start(worker.number, self._changed_settings, child_socket.fileno(), log_fd)
        if log_fd is not None:
            os.close(log_fd)
        worker.running = True
        if not requested:
            self._on_worker_ended(worker, "the fork server did not accept the request")

    def _on_token_bound(self, worker: WorkerHandle, token: str, client: str) -> None:
        self._bindings.add(token, client)
        self._broadcast_binding(worker, token, client)

    def _broadcast_binding(self, source: WorkerHandle | None, token: str, client: str) -> None:
        for worker in self._workers:
            if worker is not source:
                worker.notify("token_bound", token, client)

    def _on_disconnected(self, worker: WorkerHandle, session: Any) -> None:
        worker.ready = False
        session.close()
        if worker.running and not self._spawner.alive:
            self._on_worker_ended(worker, _UNKNOWN_REASON)

    def _on_started(self, number: int, pid: int) -> None:
        self._workers[number - 1].pid = pid

    def _on_exited(self, number: int, reason: str) -> None:
        self._on_worker_ended(self._workers[number - 1], reason)

    def _spawner_lost(self) -> None:
        if not self._stopping:
            log.critical("the fork server has exited; workers that exit are not replaced until the daemon is restarted")
        for worker in self._workers:
            if worker.running and not worker.message_socket.connected:
                self._on_worker_ended(worker, _UNKNOWN_REASON)

    def _on_worker_ended(self, worker: WorkerHandle, reason: str) -> None:
        worker.running, worker.pid = False, None
        worker.message_socket.close()
        worker.notify_ended()
        if self._stopping:
            return
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

    def _check_heartbeats(self) -> None:
        for worker in self._workers:
            was_unresponsive, worker.unresponsive = (
                worker.unresponsive,
                time.monotonic_ns() - self._scoreboard.last_heartbeat(worker.number) > _HEARTBEAT_TIMEOUT * 1e9,
            )
            # Kill only if the previous check failed as well. If the whole daemon was suspended (a frozen container),
            # this process may resume before the workers do.
            if worker.running and worker.unresponsive and was_unresponsive:
                log.error(
                    "worker {number} unresponsive for {seconds:.0f} s, sending SIGKILL",
                    number=worker.number,
                    seconds=_HEARTBEAT_TIMEOUT,
                )
                worker.kill()


@define(eq=False)
class WorkerHandle:
    """A worker as the main process sees it."""

    number: int
    rpc: RPC | None = None
    running: bool = False
    pid: int | None = None
    restart_timer: Any = None
    started_at: float = 0.0
    early_exits: int = 0
    ready: bool = False
    unresponsive: bool = False
    _exit_waiters: list[Deferred[None]] = field(factory=list)

    @property
    def message_socket(self) -> MessageSocket:
        assert self.rpc is not None
        return self.rpc.message_socket

    def mark_ready(self) -> None:
        self.ready = True
        log.info("worker {number} serves", number=self.number)

    def notify(self, name: str, *arguments: Any) -> None:
        if self.rpc is not None and self.running:
            self.rpc.notify(name, *arguments)

    def kill(self) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait_ended(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred(self._exit_waiters.remove)
        if not self.running:
            waiter.callback(None)
        else:
            self._exit_waiters.append(waiter)
        return waiter

    def notify_ended(self) -> None:
        waiters, self._exit_waiters = self._exit_waiters, []
        for waiter in waiters:
            waiter.callback(None)
