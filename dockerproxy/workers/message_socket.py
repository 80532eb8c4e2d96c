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

MAX_MESSAGE_SIZE = 192 * 1024
"""Bytes in a message: what a socket takes at once by the kernel's defaults (net.core.wmem_default)."""

_MAX_QUEUED_MESSAGES = 10_000  # messages; who is so far behind hangs
_MESSAGES_PER_READ = 64  # messages that are received before others get their turn

OnMessage = Callable[[Any], None]
OnDescriptor = Callable[[bytes, int], None]


def reject_descriptor(label: bytes, descriptor: int) -> None:
    """Take no descriptors."""
    os.close(descriptor)


class MessageTooLong(Exception):
    """A message that cannot be sent."""


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a line."""
    parent_socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return parent_socket, child_socket


@implementer(IReadWriteDescriptor)
class MessageSocket:
    """One end of a line.

    `received` is called with each message (what JSON holds), `passed` with each descriptor, which is its to close, and
    the label that came with it, `lost` once when the other end is gone or was closed.
    """

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        on_message: OnMessage,
        on_descriptor: OnDescriptor,
        on_closed: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._socket = sock
        self._on_message = on_message
        self._on_descriptor = on_descriptor
        self._on_closed = on_closed
        self._send_queue: deque[bytes] = deque()
        self._buffer = bytearray(MAX_MESSAGE_SIZE)
        self.connected = True
        sock.setblocking(False)
        reactor.addReader(self)

    def send(self, message: Any) -> None:
        """Send `message`, after those before it. Raise `LineError` for one that is too long."""
        data = b"{" + json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE_SIZE:
            raise MessageTooLong(f"a message of {len(data)} bytes")
        if not self.connected:
            return
        if self._send_queue or not self._try_send(data):
            self._send_queue.append(data)
            self._reactor.addWriter(self)
            if len(self._send_queue) > _MAX_QUEUED_MESSAGES:
                self.close()

    def send_descriptors(self, label: bytes, *descriptors: int) -> bool:
        """Pass descriptors on, and say whether they were: not where the other end is behind. The caller closes its own.

        A label does not begin with ``{``.
        """
        if not self.connected or self._send_queue:
            return False
        try:
            socket.send_fds(self._socket, [label], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Hang up."""
        if self.connected:
            self._shut_down()

    # IReadWriteDescriptor

    def fileno(self) -> int:
        return self._socket.fileno() if self.connected else -1

    def logPrefix(self) -> str:
        return "MessageSocket"

    def doRead(self) -> Any:
        for _ in range(_MESSAGES_PER_READ):
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
                self._on_message(json.loads(data[1:]))
            else:
                for _, _, content in ancillary:
                    self._on_descriptor(data, int.from_bytes(content[:4], "little"))
            if not self.connected:
                return None
        return None

    def doWrite(self) -> Any:
        while self._send_queue:
            try:
                if not self._try_send(self._send_queue[0]):
                    return None
            except OSError:
                return CONNECTION_LOST
            self._send_queue.popleft()
        self._reactor.removeWriter(self)
        return None

    def connectionLost(self, reason: Failure) -> None:
        self._shut_down()

    def _try_send(self, data: bytes) -> bool:
        try:
            self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # the other end is gone: that is found by reading, not in the middle of a call of ours
            return True
        return True

    def _shut_down(self) -> None:
        self.connected = False
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._send_queue.clear()
        self._socket.close()
        self._on_closed()
