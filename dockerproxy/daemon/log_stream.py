"""Log output that never blocks: if nobody reads the log, lines are dropped, and clients are still served.

journald, a shell pipeline or a container engine reads standard output through a socket or pipe with a small buffer
(64 KiB for a pipe). A blocking write to a full one would stop the reactor.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

_MAX_QUEUED = 1024 * 1024  # bytes; about 10,000 lines
_RETRY_INTERVAL = 0.1  # seconds

_streams: WeakSet[NonBlockingStream] = WeakSet()

DROPPED_MESSAGE = "{} log lines were dropped because nobody read the log"


class NonBlockingStream:
    """A text stream on a descriptor. While that takes nothing, it queues up to 1 MiB, and drops the lines beyond.

    As soon as there is room again, the line of `format_dropped` tells how many were dropped. Without a `reactor`,
    queued lines wait for the next `write`.
    """

    def __init__(
        self,
        reactor: Any | None,
        descriptor: int,
        *,
        encoding: str = "utf-8",
        format_dropped: Callable[[int], str] = f"{DROPPED_MESSAGE}\n".format,
    ) -> None:
        self._reactor = reactor
        self._encoding = encoding
        self._format_dropped = format_dropped
        self.descriptor, self._write_some = _non_blocking_write(descriptor)
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._dropped = 0
        self._retry: Any = None
        _streams.add(self)

    def start_again(self, reactor: Any) -> None:
        """Go on in a process that was forked: with its `reactor`, and without the lines that the other one writes."""
        self._reactor, self._retry, self._dropped = reactor, None, 0
        self._queue.clear()
        self._queued_bytes = 0

    def write(self, text: str) -> None:
        """Write `text`, one or more whole lines, or queue it. Raise OSError if the descriptor is broken."""
        data = text.encode(self._encoding, "backslashreplace")
        if not self._queue and not self._dropped and len(data) <= select.PIPE_BUF:
            # Almost always, the descriptor takes the whole line.
            try:
                written = self._write_some(data)
            except BlockingIOError:
                written = 0
            if written == len(data):
                return
            data = data[written:]
        if self._queued_bytes + len(data) > _MAX_QUEUED:
            self._dropped += text.count("\n")
            return
        self._enqueue(data)
        self._drain()

    def flush(self) -> None:
        """Do nothing: `write` has written as much as the descriptor takes."""

    def _enqueue(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)

    def _drain(self) -> None:
        try:
            while self._queue:
                data = self._queue[0]
                written = self._write_some(data[: select.PIPE_BUF])
                self._queued_bytes -= written
                if written == len(data):
                    self._queue.popleft()
                else:
                    self._queue[0] = data[written:]
                if self._dropped and self._queued_bytes < _MAX_QUEUED // 2:
                    self._enqueue(self._format_dropped(self._dropped).encode(self._encoding))
                    self._dropped = 0
        except BlockingIOError:
            if self._retry is None and self._reactor is not None:
                self._retry = self._reactor.callLater(_RETRY_INTERVAL, self._try_again)
        except OSError:
            self._queue.clear()
            self._queued_bytes = 0
            raise

    def _try_again(self) -> None:
        self._retry = None
        with suppress(OSError):  # nobody reads any more: there is no place to say it
            self._drain()


def inherited_descriptors() -> list[int]:
    """Return the descriptors of all streams. A forked process must not close them: it would log into its next file."""
    return [stream.descriptor for stream in _streams]


def start_inherited_streams(reactor: Any) -> None:
    """Let all streams of the process from which this one was forked go on here."""
    for stream in _streams:
        stream.start_again(reactor)


def _non_blocking_write(descriptor: int) -> tuple[int, Callable[[bytes], int]]:
    """Return a descriptor, and a function that writes up to PIPE_BUF bytes to it, or raises BlockingIOError.

    The descriptor itself stays in blocking mode: O_NONBLOCK belongs to the open file description, which other processes
    share. A pipe or terminal can be opened a second time (proc(5)), and a socket has a flag for a single call.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return sock.fileno(), lambda data: sock.send(data, socket.MSG_DONTWAIT)
    if stat.S_ISREG(mode):
        return descriptor, lambda data: os.write(descriptor, data)
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # no /proc, or a pipe that another user created
        return _polling_write(descriptor)
    return own, lambda data: os.write(own, data)


def _polling_write(descriptor: int) -> tuple[int, Callable[[bytes], int]]:
    """As `_non_blocking_write`, by poll(2): a pipe is writable if it has room for PIPE_BUF bytes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)

    def write(data: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(descriptor, data)

    return descriptor, write
