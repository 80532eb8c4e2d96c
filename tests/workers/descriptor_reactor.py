"""A reactor whose turns are the test's."""

from __future__ import annotations

from typing import Any


class DescriptorReactor:
    """Knows who wants to read and to write, and lets them."""

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
