"""A line between two processes: messages, and descriptors, over a pair of sockets that keep both in order."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure
from zope.interface import implementer

LONGEST = 192 * 1024
"""Bytes in a message: what a socket takes at once by the kernel's defaults (net.core.wmem_default)."""

_MOST_WAITING = 10_000  # messages; who is so far behind hangs
_AT_ONCE = 64  # messages that are received before others get their turn

Received = Callable[[Any], None]
Passed = Callable[[bytes, int], None]


def refuse(label: bytes, descriptor: int) -> None:
    """Take no descriptors."""
    os.close(descriptor)


class LineError(Exception):
    """A message that cannot be sent."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a line."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, theirs


@implementer(IReadWriteDescriptor)
class Line:
    """One end of a line.

    `received` is called with each message (what JSON holds), `passed` with each descriptor, which is its to close, and
    the label that came with it, `lost` once when the other end is gone or was closed.
    """

    def __init__(
        self, reactor: Any, end: socket.socket, received: Received, passed: Passed, lost: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._socket = end
        self._received = received
        self._passed = passed
        self._lost = lost
        self._waiting: deque[bytes] = deque()
        self._buffer = bytearray(LONGEST)
        self.connected = True
        end.setblocking(False)
        reactor.addReader(self)

    def send(self, message: Any) -> None:
        """Send `message`, after those before it. Raise `LineError` for one that is too long."""
        data = b"{" + json.dumps(message, separators=(",", ":")).encode()
        if len(data) > LONGEST:
            raise LineError(f"a message of {len(data)} bytes")
        if not self.connected:
            return
        if self._waiting or not self._sent(data):
            self._waiting.append(data)
            self._reactor.addWriter(self)
            if len(self._waiting) > _MOST_WAITING:
                self.close()

    def pass_on(self, label: bytes, *descriptors: int) -> bool:
        """Pass descriptors on, and say whether they were: not where the other end is behind. The caller closes its own.

        A label does not begin with ``{``.
        """
        if not self.connected or self._waiting:
            return False
        try:
            socket.send_fds(self._socket, [label], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Hang up."""
        if self.connected:
            self._end()

    # IReadWriteDescriptor

    def fileno(self) -> int:
        return self._socket.fileno() if self.connected else -1

    def logPrefix(self) -> str:
        return "Line"

    def doRead(self) -> Any:
        for _ in range(_AT_ONCE):
            try:
                size, ancillary, _, _ = self._socket.recvmsg_into(
                    [self._buffer], socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return None
            except OSError:
                return CONNECTION_LOST
            if not size:
                return CONNECTION_DONE
            data = bytes(memoryview(self._buffer)[:size])
            if data.startswith(b"{"):
                self._received(json.loads(data[1:]))
            else:
                for _, _, content in ancillary:
                    self._passed(data, int.from_bytes(content[:4], "little"))
            if not self.connected:
                return None
        return None

    def doWrite(self) -> Any:
        while self._waiting:
            try:
                if not self._sent(self._waiting[0]):
                    return None
            except OSError:
                return CONNECTION_LOST
            self._waiting.popleft()
        self._reactor.removeWriter(self)
        return None

    def connectionLost(self, reason: Failure) -> None:
        self._end()

    def _sent(self, data: bytes) -> bool:
        try:
            self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # the other end is gone: that is found by reading, not in the middle of a call of ours
            return True
        return True

    def _end(self) -> None:
        self.connected = False
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._waiting.clear()
        self._socket.close()
        self._lost()
