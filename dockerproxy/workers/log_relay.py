"""Relays the log of a worker, through a pipe, to the log of the main process."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import ILogObserver, Logger, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.daemon import jsonlog

_READ_SIZE = 64 * 1024
_MAX_LINE_LENGTH = 64 * 1024

log = Logger()


def remove_log_observers() -> list[ILogObserver]:
    """Remove all observers of the log and return them.

    twistd installs an observer without exposing it. Find it by publishing an event with `log_trace`.
    """
    trace: list[tuple[object, ILogObserver]] = []
    globalLogPublisher({"log_trace": trace})
    observers = [observer for publisher, observer in trace if publisher is globalLogPublisher]
    for observer in observers:
        globalLogPublisher.removeObserver(observer)
    return observers


@implementer(IReadDescriptor)
class LogRelay:
    """Logs everything that arrives from the pipe `descriptor` until it closes: events of `JsonLog`, and other lines."""

    def __init__(self, reactor: Any, descriptor: int) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._partial_line = b""
        os.set_blocking(descriptor, False)
        try:
            reactor.addReader(self)
        except OSError:  # the kernel has no memory for another watched descriptor
            os.close(descriptor)
            raise

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "LogRelay"

    def doRead(self) -> Any:
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return None
        if not data:
            return CONNECTION_DONE
        *lines, partial_line = (self._partial_line + data).split(b"\n")
        self._partial_line = partial_line[:_MAX_LINE_LENGTH]
        for line in lines:
            _log(line)
        return None

    def connectionLost(self, reason: Failure) -> None:
        self._reactor.removeReader(self)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._partial_line:
            _log(self._partial_line)


def _log(line: bytes) -> None:
    event = jsonlog.parse_event(line)
    if event is not None:
        globalLogPublisher(event)
    else:
        log.error("{line}", line=line.decode("utf-8", "replace"))
