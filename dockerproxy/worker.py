"""A worker: one more process that serves clients, begun as a copy of the first one; see `dockerproxy.workers`."""

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

from dockerproxy.assembly import Common, Serving, make_serving
from dockerproxy.cache.identity import Bindings
from dockerproxy.daemon.gc_tuning import freeze_startup_objects
from dockerproxy.daemon.jsonlog import JsonLog
from dockerproxy.daemon.listener_service import ListenerService
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.registry.users import HtpasswdError
from dockerproxy.reload import sentence
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.workers.calls import Answers, Calls
from dockerproxy.workers.crew import LIFE_EVERY
from dockerproxy.workers.elsewhere import RoomElsewhere, TurnsElsewhere
from dockerproxy.workers.forking import Order
from dockerproxy.workers.passing import Taking
from dockerproxy.workers.tally import Tally

log = Logger()


@frozen
class Inherited:
    """What a worker has from the first process: the `environment`, as the settings were read from at the start, ..."""

    reactor: Any
    environment: Mapping[str, str] = field(repr=False)
    authority: CertificateAuthority
    tally: Tally
    metrics: Metrics


class Worker:
    """This process, which the first one calls `number` and has a `line` to."""

    def __init__(
        self, reactor: Any, inherited: Inherited, settings: Settings, number: int, line: socket.socket
    ) -> None:
        self._reactor = reactor
        self._inherited = inherited
        self._number = number
        self._tally = inherited.tally
        self._stopping = self._ended = False
        bindings = Bindings(lambda token, client: self._calls.tell("bound", token, client))
        answers: Answers = {
            "reload": self._reload,
            "stop": self._stop,
            "hurry": self._hurry,
            "bound": bindings.note,
        }
        self._calls = Calls(reactor, line, answers, passed=self._passed, lost=self._alone)
        room = RoomElsewhere(reactor, self._calls, Blobs(Layout(settings.cache_dir), durable=False))
        common = Common(room, inherited.metrics.for_process(number), TurnsElsewhere(self._calls), bindings, shared=True)
        self._serving = make_serving(reactor, settings, inherited.authority, common)
        self._entrance = self._make_entrance(self._serving)
        self._taking = Taking(reactor, [door.site for door in self._serving.doors], self._count_end)

    def start(self) -> None:
        """Begin to serve."""
        self._entrance.startService()
        self._reactor.addSystemEventTrigger("before", "shutdown", self._finish)
        living = LoopingCall(lambda: self._tally.note_life(self._number, time.monotonic_ns()))
        living.clock = self._reactor
        living.start(LIFE_EVERY)
        self._reactor.callWhenRunning(self._calls.tell, "ready")
        self._reactor.callWhenRunning(freeze_startup_objects)

    def _make_entrance(self, serving: Serving) -> ListenerService:
        for door in serving.doors:
            door.site.gone = self._count_end
        doors = [evolve(door, descriptions=()) for door in serving.doors]
        return ListenerService(self._reactor, doors, serving.transfers, serving.close, lambda hurry: None)

    def _count_end(self) -> None:
        self._tally.count_end(self._number)

    def _passed(self, label: bytes, descriptor: int) -> None:
        self._taking(label, descriptor)

    def _reload(self, changed: Mapping[str, str]) -> None:
        try:
            self._serving.use(Settings.from_environment({**self._inherited.environment, **changed}))
        except (SettingsError, HtpasswdError, OSError) as error:
            log.error("worker {number} did not reload: {why}", number=self._number, why=str(error))

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()

    def _finish(self) -> Deferred[None]:
        return self._entrance.stopService().addBoth(self._end)

    def _end(self, result: object) -> object:
        self._ended = True
        return result

    def _hurry(self) -> None:
        self._entrance.abort()

    def _alone(self) -> None:
        """End at once: another daemon may start where the first process is gone, and clears what is under way."""
        if not self._ended:  # or it is the reactor that closes the line, and what it closes last has yet to be logged
            os._exit(1)


def run_worker(inherited: Inherited, order: Order) -> None:
    """Run a worker until the first process says so or is gone."""
    if order.output is not None:
        globalLogPublisher.addObserver(JsonLog(open(1, "w", closefd=False)))
    reactor = _another(inherited.reactor)
    try:
        settings = Settings.from_environment({**inherited.environment, **order.changed})
        Worker(reactor, inherited, settings, order.number, socket.socket(fileno=order.line)).start()
    except (SettingsError, HtpasswdError, OSError) as error:
        log.error("worker {number} cannot start: {why}", number=order.number, why=sentence(error))
        raise SystemExit(1) from None
    reactor.run(installSignalHandlers=False)


def _another(reactor: Any) -> Any:
    """Return a reactor of the same kind, which is the one that is imported from now on: one has no use in a copy."""
    del sys.modules["twisted.internet.reactor"]
    another = type(reactor)()
    installReactor(another)  # type: ignore[no-untyped-call]
    return another
