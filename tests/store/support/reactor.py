"""A reactor that runs thread jobs and advances its clock only if a test requests it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

T = TypeVar("T")


class SteppedReactor(Clock):
    """A clock with a thread pool that queues its jobs until `run_one` runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: deque[tuple[Callable[[bool, Any], object], Callable[[], Any]]] = deque()

    def getThreadPool(self) -> SteppedReactor:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        self.jobs.append((done, lambda: function(*args, **kwargs)))

    def callFromThread(self, function: Any, *args: Any) -> None:
        function(*args)

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.getDelayedCalls())

    def run_one(self, number: int = 0) -> None:
        """Run one queued job, or advance the clock if there is none."""
        if not self.jobs:
            self.advance(0.01)
            return
        self.jobs.rotate(-(number % len(self.jobs)))
        done, job = self.jobs.popleft()
        try:
            result = job()
        except Exception:
            done(False, Failure())
        else:
            done(True, result)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and all jobs it starts, and return its result."""
        results: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(results.append)
        while not results and self.busy:
            self.run_one()
        assert results, "the coroutine waits, but no job or delayed call is left"
        if isinstance(results[0], Failure):
            results[0].raiseException()
        return results[0]
