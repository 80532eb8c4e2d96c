"""Runs gc, import and check, one at a time, each in a process of its own.

It is one of `dockerproxy.operations`, or of `dockerproxy.bucket_operations` if it works on the bucket of
REGISTRY_STORE.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from types import MappingProxyType
from typing import Any

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.cache.best_effort import try_put
from dockerproxy.concurrency import KeyedLock
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.principal import Principal
from dockerproxy.store.records import Records

_STOP_TIMEOUT = 10.0  # seconds that the process has to end before it is killed
_MAX_LINE = 4 * 1024 * 1024  # bytes; the longest line is a result with 1000 problems
_RECORD = "maintenance"
_REMEMBERED = ("gc", "check", "check of the cache")
_MAX_STDERR = 8192  # bytes that are logged, the last ones
_BUCKET = "s3://"  # with which the `root` of a bucket begins

log = Logger()

Event = dict[str, Any]


class OperationError(Exception):
    """An operation failed. `code` is ``BUSY``, one of `dockerproxy.operations`, or ``FAILED``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@frozen
class OperationHistory:
    """The last gc and checks that ended, as records. A gc that changes nothing does not count."""

    _records: Records

    def record(self, name: str, options: Mapping[str, Any], at: float, problems: int) -> None:
        """Note the end of an operation at a POSIX time, and how many problems it found."""
        if name == "check" and not options.get("links", True):
            name = "check of the cache"
        if name in _REMEMBERED and not options.get("dry_run", False):
            record: dict[str, Any] = {"at": at, "problems": problems}
            well_at = at if not problems else self.last_successes().get(name)
            if well_at is not None:
                record["well_at"] = well_at
            try_put(self._records, record, _RECORD, name)

    def last_runs(self) -> dict[str, Mapping[str, Any]]:
        """Return when each was last run, and its problems, by its name. Blocks."""
        records = {name: self._records.get(_RECORD, name) for name in _REMEMBERED}
        return {name: record for name, record in records.items() if record is not None and _is_run(record)}

    def last_successes(self) -> dict[str, float]:
        """Return when each last ended without a problem (POSIX time), by its name. Blocks."""
        ends = {name: record.get("well_at") for name, record in self.last_runs().items()}
        return {name: float(at) for name, at in ends.items() if isinstance(at, int | float)}


def _is_run(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("at"), int | float) and isinstance(record.get("problems"), int)


class Operations(Service):
    """Runs long operations one at a time, because concurrent ones would invalidate each other's results.

    Each is recorded in `audit` at its end, and in `history` if it changed anything. `locks` are those of the hosted
    store's repositories. `current` has the name of the running operation, the user that started it, and when, as POSIX
    time by `clock`. `variables` are those that the settings were parsed from: an operation on a bucket needs them.
    """

    def __init__(
        self,
        reactor: Any,
        locks: KeyedLock,
        audit: AuditLog,
        clock: Callable[[], float],
        history: OperationHistory,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._reactor = reactor
        self._locks = locks
        self._audit = audit
        self._clock = clock
        self._history = history
        self._variables = variables
        self._process: OperationProcess | None = None
        self.current: dict[str, Any] | None = None

    async def run(
        self,
        principal: Principal,
        name: str,
        options: Mapping[str, Any],
        on_event: Callable[[Event], Awaitable[None]],
    ) -> Event:
        """Run an operation for `principal` and return its result. If the caller is cancelled, the operation stops.

        `on_event` gets each progress report and item; the operation waits while it does. Raise `OperationError`.
        """
        if self.current is not None:
            running = f"{self.current['name']} of {self.current['user']} is running"
            raise OperationError("BUSY", f"the daemon is busy: {running}; try again later")
        self.current = {"name": name, "user": principal.user, "since": self._clock()}
        log.info("{principal} started {operation}", operation=name, principal=str(principal))
        outcome = "interrupted"
        problems = 0

        async def count_problems(event: Event) -> None:
            nonlocal problems
            problems += event["event"] == "finding"
            await on_event(event)

        try:
            result = await self._run_process(name, options, count_problems)
            outcome = "done"
            self._history.record(name, options, self._clock(), problems + len(result.get("problems", ())))
            return result
        except OperationError as error:
            outcome = f"failed: {error.message}"
            raise
        finally:
            self.current = None
            log.info("{operation} of {principal} ended", operation=name, principal=str(principal))
            target = str(options.get("directory", options.get("root", "")))
            flags = ", ".join(option for option, value in options.items() if value is True)
            self._audit.record(principal, name, target, outcome, flags)

    def stopService(self) -> Deferred[None] | None:
        """Wait until the operation has ended, which the control socket stops by closing its client's connection."""
        super().stopService()  # type: ignore[no-untyped-call]
        return None if self._process is None else self._process.wait_ended()

    async def _run_process(
        self, name: str, options: Mapping[str, Any], on_event: Callable[[Event], Awaitable[None]]
    ) -> Event:
        process = self._process = OperationProcess(self._reactor, self._variables)
        async with AsyncExitStack() as held_lock:
            try:
                process.start(name, options)
                while (event := await process.read_event()) is not None:
                    match event.pop("event"):
                        case "lock":
                            await held_lock.enter_async_context(self._locks.hold(event["repository"]))
                            process.grant_lock()
                        case "unlock":
                            await held_lock.aclose()
                        case "error":
                            raise OperationError(event["code"], event["message"])
                        case "result":
                            return event
                        case kind:
                            await on_event({"event": kind, **event})
            finally:
                await process.stop()
                self._process = None
        log.error(
            "{operation} failed ({reason}): {output}", operation=name, reason=process.exit_reason, output=process.stderr
        )
        raise OperationError("FAILED", f"the process of {name} failed ({process.exit_reason}); see the daemon's log")


class OperationProcess(ProcessProtocol):
    """The process of an operation. It reads no further output until the last event has been read."""

    transport: Any

    def __init__(self, reactor: Any, variables: Mapping[str, str] = MappingProxyType({})) -> None:
        self._reactor = reactor
        self._variables = variables
        self._lines: deque[bytes] = deque()
        self._partial_line = b""
        self._stderr = b""
        self._running = False
        self._stopping = False
        self._wakeup: Deferred[None] | None = None
        self._end_waiters: list[Deferred[None]] = []
        self.exit_reason = "it was not started"

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        """Start the process. Raise `OperationError`."""
        is_bucket = str(options.get("root", "")).startswith(_BUCKET)
        module = "dockerproxy.bucket_operations" if is_bucket else "dockerproxy.operations"
        # The same modules as here, and none from the working directory.
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        environment = {**os.environ, **(self._variables if is_bucket else {}), **paths}
        arguments = [sys.executable, "-m", module, name, json.dumps(options)]
        try:
            self._reactor.spawnProcess(self, sys.executable, arguments, environment)
        except OSError as error:
            raise OperationError("FAILED", f"the process of {name} cannot be started: {error.strerror}") from None

    @property
    def stderr(self) -> str:
        """The end of the error output."""
        return self._stderr.decode("utf-8", "replace").strip()

    async def read_event(self) -> Event | None:
        """Return the next event, or None at the end of the output."""
        while not self._lines and self._running:
            self.transport.resumeProducing()
            wakeup = self._wakeup = Deferred()
            try:
                await wakeup
            finally:
                self._wakeup = None
        if not self._lines:
            return None
        event: Event = json.loads(self._lines.popleft())
        return event

    def grant_lock(self) -> None:
        """Tell the process that it holds the lock."""
        self.transport.write(b"\n")

    async def stop(self) -> None:
        """Stop the process after its current step, and wait until it has ended. Kill it if that takes too long."""
        if self._running:
            self._stopping = True
            self.transport.resumeProducing()
            self.transport.closeStdin()
            timer = self._reactor.callLater(_STOP_TIMEOUT, self._kill)
            await self.wait_ended()
            if timer.active():
                timer.cancel()

    def wait_ended(self) -> Deferred[None]:
        """Wait until the process has ended."""
        waiter: Deferred[None] = Deferred()
        if self._running:
            self._end_waiters.append(waiter)
        else:
            waiter.callback(None)
        return waiter

    # ProcessProtocol

    def connectionMade(self) -> None:
        self._running = True

    def outReceived(self, data: bytes) -> None:
        if self._stopping:
            return
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        self._lines.extend(lines)
        if self._lines:
            self.transport.pauseProducing()
            self._wake()
        elif len(self._partial_line) > _MAX_LINE:
            self._kill()

    def errReceived(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-_MAX_STDERR:]

    def processEnded(self, reason: Failure) -> None:
        self._running = False
        self.exit_reason = _describe_exit(reason.value)
        self._wake()
        waiters, self._end_waiters = self._end_waiters, []
        for waiter in waiters:
            if not waiter.called:
                waiter.callback(None)

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.called:
            self._wakeup.callback(None)

    def _kill(self) -> None:
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")


def _describe_exit(error: Any) -> str:
    if isinstance(error, ProcessDone):
        return "exit status 0"
    return f"exit status {error.exitCode}" if error.signal is None else f"killed by signal {error.signal}"
