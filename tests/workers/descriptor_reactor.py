"""Reactors that run only if the test calls `iterate`."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure


class DescriptorReactor:
    """Holds readers and writers, and calls each once in `iterate`, without a check that its descriptor is ready."""

    def __init__(self) -> None:
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def iterate(self) -> None:
        for descriptors, method in ((self.writers, "doWrite"), (self.readers, "doRead")):
            for descriptor in list(descriptors):
                reason = getattr(descriptor, method)()
                if reason is not None:
                    descriptor.connectionLost(reason)


class DescriptorClockReactor(DescriptorReactor, Clock):
    """A `DescriptorReactor` with a clock."""

    def __init__(self) -> None:
        DescriptorReactor.__init__(self)
        Clock.__init__(self)  # type: ignore[no-untyped-call]

    def iterate_all(self) -> None:
        """Iterate often enough for a call, its result, and their consequences."""
        for _ in range(4):
            self.iterate()


class DescriptorThreadReactor(DescriptorClockReactor):
    """A `DescriptorClockReactor`. Its thread pool runs a function at once, in the calling thread."""

    def getThreadPool(self) -> Any:
        return self

    def callInThreadWithCallback(self, on_result: Any, function: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            value = function(*arguments, **keywords)
        except Exception:
            on_result(False, Failure())  # type: ignore[no-untyped-call]
        else:
            on_result(True, value)

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)
