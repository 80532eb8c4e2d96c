"""A reactor whose threads and time stand still until a test lets them go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

T = TypeVar("T")


class SteppedReactor(Clock):
    """A clock with a thread pool, each of whose jobs waits until `run_one` takes it."""

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
        """Run one of the jobs, or let a moment pass where there are none."""
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
        """Return what `work` gives, everything that it starts run at once."""
        results: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(results.append)
        while not results and self.busy:
            self.run_one()
        assert results, "it waits for something that never comes"
        if isinstance(results[0], Failure):
            results[0].raiseException()
        return results[0]
