"""A reactor for tests that need threads but no concurrency."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure


class SynchronousReactor(Clock):
    """A clock with a thread pool that runs every call at once."""

    def getThreadPool(self) -> SynchronousReactor:
        return self

    def callInThreadWithCallback(self, on_result: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            result = function(*args, **kwargs)
        except Exception:
            on_result(False, Failure())
        else:
            on_result(True, result)

    def callFromThread(self, function: Any, *args: Any) -> None:
        function(*args)
