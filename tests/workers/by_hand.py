"""A reactor whose turns are the test's."""

from __future__ import annotations

from typing import Any


class Reactor:
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

    def turn(self) -> None:
        for kind, method in ((self.writers, "doWrite"), (self.readers, "doRead")):
            for one in list(kind):
                why = getattr(one, method)()
                if why is not None:
                    one.connectionLost(why)
