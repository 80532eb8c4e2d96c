"""A reactor whose time and threads are the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure


class Pool:
    """A thread pool without threads: what is given to it runs at once, or when the test says so."""

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] | None = None
        self._late = False

    def hold(self, *, results: bool = False) -> None:
        """Run nothing more until `step` or `release`; with `results`, run it but keep what comes of it."""
        self._held, self._late = self._held or [], results

    def step(self) -> bool:
        """Let the next one go, and say whether there was one."""
        if not self._held:
            return False
        self._held.pop(0)()
        return True

    def put_off(self) -> None:
        """Have the next one wait until the others have gone: a thread that takes its time."""
        assert self._held
        self._held.append(self._held.pop(0))

    def release(self) -> None:
        """Let all go, and hold no more."""
        held, self._held = self._held or [], None
        for run in held:
            run()

    @property
    def waiting(self) -> int:
        return len(self._held or [])

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], None], function: Callable[..., Any], *args: Any, **more: Any
    ) -> None:
        def run() -> Callable[[], None]:
            try:
                result = function(*args, **more)
            except BaseException:
                failure = Failure()
                return lambda: done(False, failure)
            return lambda: done(True, result)

        if self._held is None:
            run()()
        elif self._late:
            self._held.append(run())
        else:
            self._held.append(lambda: run()())


class Reactor(Clock):
    """Time stands still but for `advance`; `settle` lets happen what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()

    def getThreadPool(self) -> Pool:
        return self.pool

    def callFromThread(self, function: Callable[..., Any], *args: Any, **more: Any) -> None:
        function(*args, **more)

    def settle(self) -> None:
        while any(call.getTime() <= self.seconds() for call in self.getDelayedCalls()):
            self.advance(0)
