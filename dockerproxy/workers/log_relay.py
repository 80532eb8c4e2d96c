"""The log of a worker on its way into that of the first process, where only that writes it: through a pipe."""

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
    """Take away the observers that the log has, and return them.

    It is twistd that has set one, and it does not say which; but the way of an event can be traced.
    """
    trace: list[tuple[object, ILogObserver]] = []
    globalLogPublisher({"log_trace": trace})
    observers = [observer for publisher, observer in trace if publisher is globalLogPublisher]
    for observer in observers:
        globalLogPublisher.removeObserver(observer)
    return observers


@implementer(IReadDescriptor)
class LogRelay:
    """Logs what comes from the pipe `descriptor`, until its other end is closed: events of `JsonLog`, and lines."""

    def __init__(self, reactor: Any, descriptor: int) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._partial_line = b""
        os.set_blocking(descriptor, False)
        reactor.addReader(self)

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
