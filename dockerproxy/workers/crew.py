"""The workers, as the first process has them: started, replaced, given connections, told to reload and to stop."""

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
from dockerproxy.workers.calls import Calls
from dockerproxy.workers.line import Line, pair
from dockerproxy.workers.passing import PassingOn
from dockerproxy.workers.relay import Relay
from dockerproxy.workers.tally import Tally

LIFE_EVERY = 1.0
"""Seconds between two signs of life of a worker."""

_HANGS = 60.0  # seconds without a sign of life after which a worker is killed
_PAUSES = (0.5, 1, 2, 4, 8, 16, 30)  # seconds before one that died is replaced
_STEADY = 60.0  # seconds after which a worker that dies did not do so at its start

_UNKNOWN = "nobody was told why"

log = Logger()


class Forks(Protocol):
    """What starts workers; see `ForkServer`."""

    started: Callable[[int, int], None]
    ended: Callable[[int, str], None]
    lost: Callable[[], None]

    @property
    def alive(self) -> bool: ...

    def start(self, number: int, changed: Mapping[str, str], line: int, output: int | None) -> bool: ...

    def close(self) -> None: ...


class Crew(Service):
    """`count` workers beside this process, whose number is 0. `desk` returns what does for one what it asks for.

    `forks` starts them; where they do not write the log themselves (`relayed`), it goes into that of this process. What
    one process finds out about a token, the others learn (`bindings`).
    """

    def __init__(
        self,
        reactor: Any,
        count: int,
        forks: Forks,
        tally: Tally,
        desk: Callable[[], Any],
        bindings: Bindings,
        grace: float,
        *,
        relayed: bool,
    ) -> None:
        self._reactor = reactor
        self._forks = forks
        forks.started, forks.ended, forks.lost = self._started, self._ended, self._unattended
        self._relayed = relayed
        self._changed: dict[str, str] = {}
        self._desk = desk
        self._grace = grace
        self._tally = tally
        self._workers = [_Worker(number) for number in range(1, count + 1)]
        self._passed = [0] * (count + 1)
        self._watching = LoopingCall(self._watch)
        self._watching.clock = reactor
        self._stopping = False
        self._bindings = bindings
        bindings.tell = partial(self._tell_bound, None)

    # connections

    def doors(self, doors: Sequence[Listener]) -> list[Listener]:
        """Return `doors` as this process opens them: so that connections are passed on to workers."""
        if not self._workers:
            return list(doors)
        for door in doors:
            door.site.gone = partial(self._tally.count_end, 0)
        return [evolve(door, factory=PassingOn(number, door.site, self.pass_on)) for number, door in enumerate(doors)]

    def pass_on(self, label: bytes, handle: socket.socket | None) -> bool:
        """Pass a connection on to the worker that has the fewest; False where this process has to serve it.

        None: it has to in any case. So it has to at the end: the workers were told to stop before the doors close.
        """
        tally, passed = self._tally, self._passed
        chosen, fewest = None, passed[0] - tally.ended(0)
        for worker in self._workers if handle is not None and not self._stopping else ():
            live = passed[worker.number] - tally.ended(worker.number)
            if worker.ready and live < fewest:
                chosen, fewest = worker, live
        if chosen is not None and handle is not None and chosen.line.pass_on(label, handle.fileno()):
            passed[chosen.number] += 1
            return True
        passed[0] += 1
        return False

    # the service

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        for worker in self._workers:
            self._begin(worker)
        self._watching.start(_HANGS / 4, now=False)

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        self._stopping = True
        if self._watching.running:
            self._watching.stop()
        for worker in self._workers:
            if worker.pause is not None and worker.pause.active():
                worker.pause.cancel()
        return Deferred.fromCoroutine(self._stop())

    def reload(self, changed: Mapping[str, str]) -> None:
        """Have the workers, now and later, use settings that have changed; the others are as they were at the start."""
        self._changed.update(changed)
        for worker in self._workers:
            worker.tell("reload", changed)

    def hurry(self) -> None:
        """Have the workers break off at once what they still wait for."""
        for worker in self._workers:
            worker.tell("hurry")

    async def _stop(self) -> None:
        for worker in self._workers:
            worker.tell("stop")
        ends = self._reactor.seconds() + self._grace
        for worker in self._workers:
            try:
                await worker.ended().addTimeout(max(0.0, ends - self._reactor.seconds()), self._reactor)
            except TimeoutError:
                worker.kill()
        self._forks.close()

    def _begin(self, worker: _Worker) -> None:
        worker.pause = None
        worker.silent = False
        ours, theirs = pair()
        desk = self._desk()
        self._tally.begin(worker.number, time.monotonic_ns())
        self._passed[worker.number] = 0
        worker.began = self._reactor.seconds()
        worker.calls = Calls(
            self._reactor,
            ours,
            {**desk.answers, "ready": worker.get_ready, "bound": partial(self._bound, worker)},
            lost=lambda: self._lost(worker, desk),
        )
        output = None
        if self._relayed:
            reading, output = os.pipe()
            Relay(self._reactor, reading)
        with theirs:
            asked = self._forks.start(worker.number, self._changed, theirs.fileno(), output)
        if output is not None:
            os.close(output)
        worker.begun = True
        if not asked:
            self._died(worker, "it could not be asked for")

    def _bound(self, worker: _Worker, token: str, client: str) -> None:
        self._bindings.note(token, client)
        self._tell_bound(worker, token, client)

    def _tell_bound(self, source: _Worker | None, token: str, client: str) -> None:
        for worker in self._workers:
            if worker is not source:
                worker.tell("bound", token, client)

    def _lost(self, worker: _Worker, desk: Any) -> None:
        worker.ready = False
        desk.close()
        if worker.begun and not self._forks.alive:
            self._died(worker, _UNKNOWN)

    def _started(self, number: int, pid: int) -> None:
        self._workers[number - 1].pid = pid

    def _ended(self, number: int, why: str) -> None:
        self._died(self._workers[number - 1], why)

    def _unattended(self) -> None:
        if not self._stopping:
            log.critical("the fork server has ended: workers that end are not replaced any more, until a restart")
        for worker in self._workers:
            if worker.begun and not worker.line.connected:
                self._died(worker, _UNKNOWN)

    def _died(self, worker: _Worker, why: str) -> None:
        worker.begun, worker.pid = False, None
        worker.line.close()
        worker.announce_end()
        if self._stopping:
            return
        if not self._forks.alive:
            log.error("worker {number} ended ({why}), and is not replaced", number=worker.number, why=why)
            return
        steady = self._reactor.seconds() - worker.began >= _STEADY
        worker.deaths = 0 if steady else worker.deaths + 1
        pause = _PAUSES[min(worker.deaths, len(_PAUSES) - 1)]
        log.error(
            "worker {number} ended ({why}): another one starts in {pause} s",
            number=worker.number, why=why, pause=pause,
        )  # fmt: skip
        worker.pause = self._reactor.callLater(pause, self._begin, worker)

    def _watch(self) -> None:
        for worker in self._workers:
            before, worker.silent = worker.silent, time.monotonic_ns() - self._tally.seen(worker.number) > _HANGS * 1e9
            # For the second time: where all of the daemon was halted for a while (a frozen container), this process may
            # be the first to go on.
            if worker.begun and worker.silent and before:
                log.error("worker {number} hangs and is killed", number=worker.number)
                worker.kill()


@define(eq=False)
class _Worker:
    number: int
    calls: Calls | None = None
    begun: bool = False
    pid: int | None = None
    pause: Any = None
    began: float = 0.0
    deaths: int = 0
    ready: bool = False
    silent: bool = False
    _ending: list[Deferred[None]] = field(factory=list)

    @property
    def line(self) -> Line:
        assert self.calls is not None
        return self.calls.line

    def get_ready(self) -> None:
        self.ready = True
        log.info("worker {number} serves", number=self.number)

    def tell(self, name: str, *arguments: Any) -> None:
        if self.calls is not None and self.begun:
            self.calls.tell(name, *arguments)

    def kill(self) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> Deferred[None]:
        ended: Deferred[None] = Deferred(self._ending.remove)
        if not self.begun:
            ended.callback(None)
        else:
            self._ending.append(ended)
        return ended

    def announce_end(self) -> None:
        ending, self._ending = self._ending, []
        for ended in ending:
            ended.callback(None)
