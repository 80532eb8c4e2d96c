"""A reactor whose time and threads are the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure


class ManualThreadPool:
    """A thread pool without threads: what is given to it runs at once, or when the test says so."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] | None = None
        self._run_before_queueing = False

    def hold(self, *, results: bool = False) -> None:
        """Run nothing more until `step` or `release`; with `results`, run it but keep what comes of it."""
        self._queue, self._run_before_queueing = self._queue or [], results

    def step(self) -> bool:
        """Let the next one go, and say whether there was one."""
        if not self._queue:
            return False
        self._queue.pop(0)()
        return True

    def defer_next(self) -> None:
        """Have the next one wait until the others have gone: a thread that takes its time."""
        assert self._queue
        self._queue.append(self._queue.pop(0))

    def release(self) -> None:
        """Let all go, and hold no more."""
        queue, self._queue = self._queue or [], None
        for job in queue:
            job()

    @property
    def waiting(self) -> int:
        return len(self._queue or [])

    def callInThreadWithCallback(
        self, on_result: Callable[[bool, Any], None], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        def run() -> Callable[[], None]:
            try:
                result = function(*args, **kwargs)
            except BaseException:
                failure = Failure()
                return lambda: on_result(False, failure)
            return lambda: on_result(True, result)

        if self._queue is None:
            run()()
        elif self._run_before_queueing:
            self._queue.append(run())
        else:
            self._queue.append(lambda: run()())


class ManualReactor(Clock):
    """Time stands still but for `advance`; `settle` lets happen what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ManualThreadPool()

    def getThreadPool(self) -> ManualThreadPool:
        return self.pool

    def callFromThread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    def run_due_calls(self) -> None:
        while any(call.getTime() <= self.seconds() for call in self.getDelayedCalls()):
            self.advance(0)
