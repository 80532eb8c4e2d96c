"""Whether a store can be written at this moment: a file or an object is written, and removed again."""

from __future__ import annotations

import enum
import errno
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.errors import RegistryError
from dockerproxy.store.disk_errors import disk_error
from dockerproxy.store.layout import Layout

ANSWER_TIMEOUT = 2.0
"""Seconds after which a file system that does not answer counts as hanging."""
RESULT_TTL = 1.0
"""Seconds for which a result counts, so that frequent requests do not keep the disk busy."""

_SIZE = 4096  # bytes; an empty file needs no block of the disk

RunInThread = Callable[[Callable[[], str]], Awaitable[str]]
"""Calls a function that may block, in a thread."""


class StoreState(enum.Enum):
    """The state of a store."""

    WRITABLE = enum.auto()
    FAILED = enum.auto()
    HANGS = enum.auto()


@frozen
class ProbeResult:
    """The result of a probe. `sentence` names the setting of the store, without its place, and the problem.

    `details` is the same for administrators, if they may know more.
    """

    state: StoreState
    sentence: str = ""
    details: str = ""


@define(eq=False)
class StoreProbe:
    """Probes a store, whose `place` the setting `name` has. Concurrent callers share one attempt to write.

    `attempt` makes it. A result counts for `ttl` seconds. `directory` is that of the store, if it is on this machine.
    """

    _reactor: Any
    name: str
    place: str
    _attempt: Callable[[], Awaitable[ProbeResult]]
    directory: str | None = None
    _ttl: float = RESULT_TTL
    _last: tuple[float, ProbeResult] | None = field(default=None, init=False)
    _waiters: list[Deferred[ProbeResult]] = field(factory=list, init=False)
    _began_at: float | None = field(default=None, init=False)  # of an attempt that has not ended

    async def probe(self) -> ProbeResult:
        """Return the state of the store, within `ANSWER_TIMEOUT` seconds."""
        now = self._reactor.seconds()
        if self._last is not None and now - self._last[0] < self._ttl:
            return self._last[1]
        if self._began_at is None:
            self._began_at = now
            Deferred.fromCoroutine(self._try()).addBoth(self._end)
            if self._began_at is None and self._last is not None:  # it has ended already
                return self._last[1]
        left = self._began_at + ANSWER_TIMEOUT - now
        if left <= 0:
            return self._hanging()
        waiter: Deferred[ProbeResult] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        timer = self._reactor.callLater(left, self._give_up, waiter)
        try:
            return await waiter
        finally:
            if timer.active():
                timer.cancel()

    async def _try(self) -> ProbeResult:
        return await self._attempt()

    def _end(self, result: ProbeResult | Failure) -> None:
        self._began_at = None
        if isinstance(result, Failure):
            if not isinstance(result.value, RegistryError):
                sentence = f"{self.name} cannot be probed: {result.getErrorMessage()}"
                outcome = ProbeResult(StoreState.FAILED, sentence)
            else:  # the threads for it are all busy
                outcome = self._hanging()
        else:
            outcome = result
        self._last = self._reactor.seconds(), outcome
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(outcome)

    def _give_up(self, waiter: Deferred[ProbeResult]) -> None:
        self._waiters.remove(waiter)
        waiter.callback(self._hanging())

    def _hanging(self) -> ProbeResult:
        question = "is the store alive?" if self.directory is None else "is its disk alive?"
        return ProbeResult(StoreState.HANGS, f"{self.name} has not answered for {ANSWER_TIMEOUT:g} s; {question}")


def probe_directory(
    reactor: Any, name: str, layout: Layout, run: RunInThread, check: Callable[[], None] = lambda: None
) -> StoreProbe:
    """Return the probe of a directory, which the setting `name` has.

    While a file system hangs, one thread waits for it, however many callers there are. `check` raises `OSError` if
    clients may not write to the store, though that is possible.
    """

    def write() -> str:
        """Write a file and remove it. Return why that is impossible, or `""`. Blocks."""
        try:
            check()
            write_file(layout.staging)
        except OSError as error:
            return disk_error(name, error).message
        return ""

    async def attempt() -> ProbeResult:
        problem = await run(write)
        return ProbeResult(StoreState.FAILED if problem else StoreState.WRITABLE, problem)

    return StoreProbe(reactor, name, str(layout.root), attempt, str(layout.root))


def write_file(directory: str) -> None:
    """Write a file of some KiB in `directory`, and remove it. Raise `OSError`. Blocks."""
    path = f"{directory}/probe-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            if os.write(descriptor, bytes(_SIZE)) < _SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    finally:
        with suppress(OSError):
            os.unlink(path)
