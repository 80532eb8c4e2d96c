"""The main function of a worker process; see `dockerproxy.workers`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.main import installReactor
from twisted.logger import Logger, globalLogPublisher

from dockerproxy.admin.overview import Overview
from dockerproxy.admin.page_desk import PageDeskClient
from dockerproxy.app import build_server, build_silent_servers, raise_descriptor_limit
from dockerproxy.cache.board import Board
from dockerproxy.cache.identity import Bindings
from dockerproxy.concurrency import use_monotonic_clock
from dockerproxy.daemon.jsonlog import JsonLog, json_stream
from dockerproxy.daemon.listener_service import ListenerService
from dockerproxy.daemon.log_stream import start_inherited_streams
from dockerproxy.daemon.memory_tuning import freeze_startup_objects
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.proxy.certificates import Certificates
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.reload import Configuration, describe_error
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.shared_services import SharedServices
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.upstream.silent_servers import SilentServers
from dockerproxy.upstream.tls import ClientContext
from dockerproxy.workers.connection_table import connection_limit
from dockerproxy.workers.coordinator import Coordinator
from dockerproxy.workers.dispatch import ConnectionReceiver, NoPorts
from dockerproxy.workers.fork_server import SpawnRequest
from dockerproxy.workers.remote import RemoteCoordinator
from dockerproxy.workers.rpc import RPC, Handlers
from dockerproxy.workers.scoreboard import Scoreboard, heartbeat_service

TOKEN_BOUND, SERVER_SILENT = "token_bound", "server_silent"
"""News that each process tells the others: the calls of `Bindings.add` and `SilentServers.add`."""

log = Logger()


@frozen
class ForkedState:
    """State a worker inherits through fork(), so that all processes share its memory.

    `environment` has the variables that the settings were parsed from.
    """

    reactor: Any
    environment: Mapping[str, str] = field(repr=False)
    state: StateDirectory
    certificates: Certificates
    upstream_tls: ClientContext
    scoreboard: Scoreboard
    metrics: Metrics
    tombstones: Tombstones
    board: Board

    @classmethod
    def create(
        cls,
        reactor: Any,
        configuration: Configuration,
        state: StateDirectory,
        certificates: Certificates,
        upstream_tls: ClientContext,
        metrics: Metrics,
        tombstones: Tombstones,
    ) -> ForkedState:
        """Return the state with shared memory for all processes, which must be forked from this one afterwards."""
        processes = configuration.settings.workers
        scoreboard = Scoreboard.create(processes, connection_limit(raise_descriptor_limit(), processes))
        board = Board.make(processes)
        variables = configuration.variables
        return cls(reactor, variables, state, certificates, upstream_tls, scoreboard, metrics, tombstones, board)

    def shared_services(
        self, number: int, coordinator: Coordinator, bindings: Bindings, silent_servers: SilentServers
    ) -> SharedServices:
        """Return what process `number` shares with the others."""
        return SharedServices(
            self.state,
            coordinator,
            self.metrics.for_process(number),
            coordinator.report_login,
            coordinator.report_pull,
            coordinator.report_refusal,
            coordinator,
            coordinator.record_pulls,
            silent_servers,
            self.tombstones,
            self.board,
            self.board.for_process(number),
            Overview(coordinator.get_overview),
            PageDeskClient(coordinator.ask_page_desk),
            coordinator.doctor_report,
            self.upstream_tls,
            coordinator,
            bindings,
            multi_process=self.scoreboard.processes > 1,
        )


class WorkerProcess:
    """The worker that `request` asks for, which is this process."""

    def __init__(self, reactor: Any, forked_state: ForkedState, settings: Settings, request: SpawnRequest) -> None:
        self._reactor = reactor
        self._environment = forked_state.environment
        self._stopping = self._ended = False
        slot = forked_state.scoreboard.slot(request.number)
        bindings, silent_servers = Bindings(), build_silent_servers(reactor, settings)
        handlers: Handlers = {
            "reload": self._reload,
            "stop": self._stop,
            "abort": self._abort,
            TOKEN_BOUND: bindings.add,
            SERVER_SILENT: silent_servers.add,
            "debug": self._debug,
            "close_idle": self._close_idle,
        }
        sock = socket.socket(fileno=request.socket_fd)
        self._rpc = RPC(reactor, sock, handlers, on_closed=self._parent_lost, on_descriptor=self._on_connection)
        bindings.subscribe(partial(self._rpc.hint, TOKEN_BOUND))
        silent_servers.subscribe(partial(self._rpc.hint, SERVER_SILENT))
        coordinator = RemoteCoordinator(reactor, self._rpc)
        shared = forked_state.shared_services(request.number, coordinator, bindings, silent_servers)
        self._server = build_server(reactor, settings, forked_state.certificates, shared)
        self._listener_service = ListenerService(
            reactor,
            self._server.listeners,
            NoPorts(),
            self._server.transfers,
            self._server.close_upstreams,
            lambda abort: None,
        )
        sites = {listener.setting: listener.site for listener in self._server.listeners}
        self._receiver = ConnectionReceiver(reactor, sites, slot.count_closed)
        self._heartbeats = heartbeat_service(reactor, slot)

    def start(self) -> None:
        """Start to serve clients, and report that to the main process once the reactor runs."""
        self._reactor.addSystemEventTrigger("before", "shutdown", self._drain)
        self._heartbeats.startService()  # type: ignore[no-untyped-call]
        self._server.gauge_service().startService()  # type: ignore[no-untyped-call]
        self._listener_service.startService()
        self._reactor.callWhenRunning(self._rpc.notify, "ready")
        self._reactor.callWhenRunning(freeze_startup_objects)

    def _on_connection(self, message: tuple[str, int], descriptor: int | None) -> None:
        self._receiver(message, descriptor)

    def _reload(self, changed_settings: Mapping[str, str]) -> str:
        """Apply changed settings. Return why that is impossible, or ``""``."""
        try:
            self._server.reconfigure(Settings.from_environment({**self._environment, **changed_settings}))
        except (SettingsError, HtpasswdError, OSError) as error:
            return describe_error(error)
        return ""

    def _close_idle(self, client: str) -> None:
        self._server.close_idle(client)

    def _debug(self) -> dict[str, Any]:
        return self._server.debug_report()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()

    def _drain(self) -> Deferred[None]:
        return self._listener_service.stopService().addBoth(self._mark_ended)

    def _mark_ended(self, result: object) -> object:
        if self._server.pulls is not None:
            self._server.pulls.flush()
        self._ended = True
        return result

    def _abort(self) -> None:
        self._listener_service.abort()

    def _parent_lost(self) -> None:
        """Exit at once, because a new daemon may start now and delete the files of downloads that are in progress."""
        # After a regular stop the reactor closes the socket itself. Let it finish, so that its last events are logged.
        if not self._ended:
            os._exit(1)


def run_worker(forked_state: ForkedState, request: SpawnRequest) -> None:
    """Run a worker until the main process stops it or exits."""
    reactor = _install_new_reactor(forked_state.reactor)
    start_inherited_streams(reactor)
    if request.log_fd is not None:
        # Not sys.stdout, which is an object of the main process: twistd has replaced it if it runs in the background.
        globalLogPublisher.addObserver(JsonLog(json_stream(reactor, 1)))
    try:
        settings = Settings.from_environment({**forked_state.environment, **request.changed_settings})
        WorkerProcess(reactor, forked_state, settings, request).start()
    except (SettingsError, HtpasswdError, OSError) as error:
        log.error("worker {number} cannot start: {reason}", number=request.number, reason=describe_error(error))
        raise SystemExit(1) from None
    reactor.run(installSignalHandlers=False)


def _install_new_reactor(reactor: Any) -> Any:
    """Install and return a new reactor of the same class.

    A reactor cannot be used after fork(): parent and child would share one epoll set.
    """
    del sys.modules["twisted.internet.reactor"]  # Twisted has no public way to replace an installed reactor
    new_reactor: Any = type(reactor)()
    use_monotonic_clock(new_reactor)
    installReactor(new_reactor)  # type: ignore[no-untyped-call]
    return new_reactor
