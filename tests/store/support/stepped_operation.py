"""Runs a blocking operation step by step, between the jobs of a `SteppedReactor`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.concurrency import KeyedLock, LocalKeyedLock
from dockerproxy.store.progress import Progress, RepositoryLock, Stopped
from tests.store.support.reactor import SteppedReactor

T = TypeVar("T")


class SteppedOperation(Generic[T]):
    """Runs `operation` in a thread that pauses at each progress report until the reactor runs its next job.

    Only one of the two threads runs at a time. `ended` fires with the result, and fails with `Stopped` after `stop`.
    """

    def __init__(
        self,
        reactor: SteppedReactor,
        operation: Callable[[Progress[Any], RepositoryLock], T],
        locks: KeyedLock | None = None,
    ) -> None:
        self.ended: Deferred[T] = Deferred()
        self.reports: list[tuple[str, int, int | None]] = []
        self.items: list[Any] = []
        self._reactor = reactor
        self._operation = operation
        self._locks = locks or LocalKeyedLock()
        self._stopping = False
        self._outcome: T | Failure | None = None
        self._wanted_lock: Any = None
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()
        self._schedule()

    def stop(self) -> None:
        """Make the operation stop at its next report."""
        self._stopping = True

    def reports_of(self, phase: str) -> int:
        """Return the number of reports of `phase`."""
        return sum(report[0] == phase for report in self.reports)

    # The main thread.

    def _schedule(self) -> None:
        self._reactor.jobs.append((self._on_paused, self._step))

    def _step(self) -> None:
        self._resume.release()
        self._paused.acquire()

    def _on_paused(self, success: bool, result: object) -> None:
        assert success, result
        if isinstance(self._outcome, Failure):
            self.ended.errback(self._outcome)
        elif self._outcome is not None:
            self.ended.callback(self._outcome)
        elif self._wanted_lock is not None:
            acquiring = Deferred.fromCoroutine(self._wanted_lock.__aenter__())
            self._wanted_lock = None
            acquiring.addCallback(lambda _: self._schedule())
        else:
            self._schedule()

    # The thread of the operation.

    def _run(self) -> None:
        self._resume.acquire()
        try:
            self._outcome = self._operation(Progress(self._report, self.items.append), self._lock)
        except Exception:
            self._outcome = Failure()
        self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        self._resume.acquire()
        if self._stopping:
            raise Stopped

    def _report(self, phase: str, done: int, total: int | None) -> None:
        self.reports.append((phase, done, total))
        self._pause()

    @contextmanager
    def _lock(self, repository: str) -> Iterator[None]:
        lock = self._wanted_lock = self._locks.hold(repository)
        try:
            self._pause()
            yield
        finally:
            Deferred.fromCoroutine(lock.__aexit__(None, None, None))
