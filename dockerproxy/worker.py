"""A worker: one more process that serves clients, started by the first one; see `dockerproxy.workers`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from attrs import evolve
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger, globalLogBeginner

from dockerproxy.assembly import Common, Serving, make_serving, open_authority
from dockerproxy.cache.identity import Bindings
from dockerproxy.daemon import priority
from dockerproxy.daemon.doors import Doors
from dockerproxy.daemon.jsonlog import JsonLog
from dockerproxy.daemon.memory import settle_memory
from dockerproxy.proxy.issuer import AuthorityError
from dockerproxy.registry.users import HtpasswdError
from dockerproxy.reload import sentence
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.workers.calls import Answers, Calls
from dockerproxy.workers.crew import LIFE_EVERY, LINE, RELAYED, TALLY
from dockerproxy.workers.elsewhere import RoomElsewhere, TurnsElsewhere
from dockerproxy.workers.line import adopt
from dockerproxy.workers.passing import Taking
from dockerproxy.workers.tally import Tally

log = Logger()


class Worker:
    """This process. `number` is what the first process calls it, `calls` and `tally` are shared with that."""

    def __init__(self, reactor: Any, settings: Settings, number: int, tally: Tally) -> None:
        self._reactor = reactor
        self._number = number
        self._tally = tally
        self._stopping = False
        bindings = Bindings(lambda token, client: self._calls.tell("bound", token, client))
        answers: Answers = {
            "reload": self._reload,
            "stop": self._stop,
            "hurry": self._hurry,
            "bound": bindings.note,
        }
        self._calls = Calls(reactor, adopt(LINE), answers, passed=self._passed, lost=self._alone)
        room = RoomElsewhere(reactor, self._calls, Blobs(Layout(settings.cache_dir), durable=False))
        common = Common(room, TurnsElsewhere(self._calls), bindings, shared=True)
        self._serving = make_serving(reactor, settings, open_authority(settings), common)
        self._entrance = self._make_entrance(self._serving)
        self._taking = Taking(reactor, [door.site for door in self._serving.doors], self._count_end)

    def start(self) -> None:
        """Begin to serve."""
        self._entrance.startService()
        self._reactor.addSystemEventTrigger("before", "shutdown", self._entrance.stopService)
        living = LoopingCall(lambda: self._tally.note_life(self._number, time.monotonic_ns()))
        living.clock = self._reactor
        living.start(LIFE_EVERY)
        self._reactor.callWhenRunning(self._calls.tell, "ready")
        self._reactor.callWhenRunning(settle_memory)

    def _make_entrance(self, serving: Serving) -> Doors:
        for door in serving.doors:
            door.site.gone = self._count_end
        doors = [evolve(door, descriptions=()) for door in serving.doors]
        return Doors(self._reactor, doors, serving.transfers, serving.close, lambda hurry: None)

    def _count_end(self) -> None:
        self._tally.count_end(self._number)

    def _passed(self, label: bytes, descriptor: int) -> None:
        self._taking(label, descriptor)

    def _reload(self, changed: Mapping[str, str]) -> None:
        try:
            self._serving.use(Settings.from_environment({**os.environ, **changed}))
        except (SettingsError, HtpasswdError, OSError) as error:
            log.error("worker {number} did not reload: {why}", number=self._number, why=str(error))

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()

    def _hurry(self) -> None:
        self._entrance.hurry()

    def _alone(self) -> None:
        """End at once: another daemon may start where the first process is gone, and clears what is under way."""
        os._exit(1)


def main() -> None:
    """Run the worker whose number is the argument, until the first process says so or is gone."""
    # A terminal's signals go to all processes, as systemd's SIGTERM does; it is the first one that knows what to do.
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, signal.SIG_IGN)
    from twisted.internet import reactor

    settings = Settings.from_environment(os.environ)
    as_json = settings.log_format == "json" or RELAYED in sys.argv[2:]
    observer: ILogObserver = JsonLog(sys.stdout) if as_json else priority.observer()
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    number = int(sys.argv[1])
    try:
        Worker(reactor, settings, number, Tally.of(TALLY)).start()
    except (SettingsError, AuthorityError, HtpasswdError, OSError) as error:
        log.error("worker {number} cannot start: {why}", number=number, why=sentence(error))
        raise SystemExit(1) from None
    except Exception:
        log.failure("worker {number} cannot start", number=number)
        raise SystemExit(1) from None
    reactor.run(installSignalHandlers=False)  # type: ignore[call-arg]


if __name__ == "__main__":
    main()
