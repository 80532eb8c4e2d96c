"""The main function of a worker process; see `dockerproxy.workers`."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from attrs import evolve, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.main import installReactor
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, globalLogPublisher

from dockerproxy.app import ProxyServer, SharedServices, build_server
from dockerproxy.cache.identity import Bindings
from dockerproxy.daemon.gc_tuning import freeze_startup_objects
from dockerproxy.daemon.jsonlog import JsonLog
from dockerproxy.daemon.listener_service import ListenerService
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.reload import describe_error
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.workers.dispatch import ConnectionReceiver
from dockerproxy.workers.fork_server import SpawnRequest
from dockerproxy.workers.remote import RemoteCacheSpace, RemoteKeyedLock
from dockerproxy.workers.rpc import RPC, Handlers
from dockerproxy.workers.scoreboard import Scoreboard
from dockerproxy.workers.supervisor import HEARTBEAT_INTERVAL

log = Logger()


@frozen
class ForkedState:
    """State a worker inherits through fork(). `environment` is the one the settings were parsed from at start-up."""

    reactor: Any
    environment: Mapping[str, str] = field(repr=False)
    state: StateDirectory
    authority: CertificateAuthority
    scoreboard: Scoreboard
    metrics: Metrics


class WorkerProcess:
    """Worker `number`, which is this process. `sock` is connected to the main process."""

    def __init__(
        self, reactor: Any, forked_state: ForkedState, settings: Settings, number: int, sock: socket.socket
    ) -> None:
        self._reactor = reactor
        self._forked_state = forked_state
        self._number = number
        self._scoreboard = forked_state.scoreboard
        self._stopping = self._ended = False
        bindings = Bindings(lambda token, client: self._rpc.notify("token_bound", token, client))
        handlers: Handlers = {
            "reload": self._reload,
            "stop": self._stop,
            "abort": self._abort,
            "token_bound": bindings.add,
        }
        self._rpc = RPC(reactor, sock, handlers, on_descriptor=self._on_descriptor, on_closed=self._parent_lost)
        cache_space = RemoteCacheSpace(reactor, self._rpc)
        shared = SharedServices(
            forked_state.state,
            cache_space,
            forked_state.metrics.for_process(number),
            RemoteKeyedLock(self._rpc),
            bindings,
            multi_process=True,
        )
        self._server = build_server(reactor, settings, forked_state.authority, shared)
        self._listener_service = self._build_listener_service(self._server)
        self._receiver = ConnectionReceiver(
            reactor, [listener.site for listener in self._server.listeners], self._on_connection_closed
        )

    def start(self) -> None:
        """Start to serve clients, and report that to the main process once the reactor runs."""
        self._listener_service.startService()
        self._reactor.addSystemEventTrigger("before", "shutdown", self._drain)
        heartbeats = LoopingCall(lambda: self._scoreboard.heartbeat(self._number, time.monotonic_ns()))
        heartbeats.clock = self._reactor
        heartbeats.start(HEARTBEAT_INTERVAL)
        self._reactor.callWhenRunning(self._rpc.notify, "ready")
        self._reactor.callWhenRunning(freeze_startup_objects)

    def _build_listener_service(self, server: ProxyServer) -> ListenerService:
        for listener in server.listeners:
            listener.site.on_closed = self._on_connection_closed
        listeners = [evolve(listener, descriptions=()) for listener in server.listeners]
        return ListenerService(self._reactor, listeners, server.transfers, server.close, lambda abort: None)

    def _on_connection_closed(self) -> None:
        self._scoreboard.count_closed(self._number)

    def _on_descriptor(self, label: bytes, descriptor: int) -> None:
        self._receiver(label, descriptor)

    def _reload(self, changed_settings: Mapping[str, str]) -> None:
        try:
            self._server.reconfigure(Settings.from_environment({**self._forked_state.environment, **changed_settings}))
        except (SettingsError, HtpasswdError, OSError) as error:
            log.error(
                "worker {number} not reloaded, its settings are unchanged: {reason}",
                number=self._number,
                reason=str(error),
            )

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()

    def _drain(self) -> Deferred[None]:
        return self._listener_service.stopService().addBoth(self._mark_ended)

    def _mark_ended(self, result: object) -> object:
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
    if request.log_fd is not None:
        globalLogPublisher.addObserver(JsonLog(open(1, "w", closefd=False)))
    reactor = _install_new_reactor(forked_state.reactor)
    try:
        settings = Settings.from_environment({**forked_state.environment, **request.changed_settings})
        WorkerProcess(reactor, forked_state, settings, request.number, socket.socket(fileno=request.socket_fd)).start()
    except (SettingsError, HtpasswdError, OSError) as error:
        log.error("worker {number} cannot start: {reason}", number=request.number, reason=describe_error(error))
        raise SystemExit(1) from None
    reactor.run(installSignalHandlers=False)


def _install_new_reactor(reactor: Any) -> Any:
    """Install and return a new reactor of the same class.

    A reactor cannot be used after fork(): parent and child would share one epoll set.
    """
    del sys.modules["twisted.internet.reactor"]
    new_reactor = type(reactor)()
    installReactor(new_reactor)  # type: ignore[no-untyped-call]
    return new_reactor
