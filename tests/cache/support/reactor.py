"""A reactor whose clock and thread pool are controlled by the test."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure


class ManualThreadPool:
    """A thread pool without threads. Jobs run at once, or on `step` and `release` after `hold`."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] | None = None
        self._run_before_queueing = False

    def hold(self, *, results: bool = False) -> None:
        """Queue all jobs until `step` or `release`. If `results`, run them at once but delay their results."""
        self._queue, self._run_before_queueing = self._queue or [], results

    def step(self) -> bool:
        """Run the next queued job. Return whether there was one."""
        if not self._queue:
            return False
        self._queue.pop(0)()
        return True

    def defer_next(self) -> None:
        """Move the next job to the end of the queue, like a slow thread."""
        assert self._queue
        self._queue.append(self._queue.pop(0))

    def release(self) -> None:
        """Run all queued jobs, and stop queueing."""
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
    """A reactor whose time changes only by `advance`. `run_due_calls` runs the calls that are due."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ManualThreadPool()
        self.readers: list[Any] = []

    def getThreadPool(self) -> ManualThreadPool:
        return self.pool

    def callFromThread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    def addReader(self, reader: Any) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.remove(reader)

    def run_due_calls(self) -> None:
        """Run the calls that are due, and let the readers read what has arrived."""
        while self._read_available() or any(call.getTime() <= self.seconds() for call in self.getDelayedCalls()):
            self.advance(0)

    def _read_available(self) -> bool:
        ready = select.select(self.readers, [], [], 0)[0] if self.readers else []
        for reader in ready:
            reader.doRead()
        return bool(ready)
