"""A socket between two processes that carries JSON messages and file descriptors in order (AF_UNIX, SOCK_SEQPACKET)."""

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
"""Maximum bytes of a message. A socket accepts that many at once by the default of net.core.wmem_default."""

_MAX_QUEUED_MESSAGES = 10_000  # messages; a peer that is so far behind hangs, and is disconnected
_MESSAGES_PER_READ = 64  # messages to receive before control returns to the reactor

OnMessage = Callable[[Any], None]
OnDescriptor = Callable[[bytes, int], None]


def reject_descriptor(label: bytes, descriptor: int) -> None:
    """Close a descriptor that was not expected."""
    os.close(descriptor)


class MessageTooLong(Exception):
    """The message exceeds `MAX_MESSAGE_SIZE`."""


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets."""
    parent_socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return parent_socket, child_socket


@implementer(IReadWriteDescriptor)
class MessageSocket:
    """One end of the connection.

    `on_message` is called with each message, a JSON value. `on_descriptor` is called with the label of each descriptor
    and the descriptor, which it must close. `on_closed` is called once, when either end has been closed.
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
        """Send `message`, or queue it if the socket is full. Raise `MessageTooLong`."""
        data = b"{" + json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE_SIZE:
            raise MessageTooLong(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_SIZE} bytes")
        if not self.connected:
            return
        if self._send_queue or not self._try_send(data):
            self._send_queue.append(data)
            self._reactor.addWriter(self)
            if len(self._send_queue) > _MAX_QUEUED_MESSAGES:
                self.close()

    def send_descriptors(self, label: bytes, *descriptors: int) -> bool:
        """Send copies of `descriptors`. Return False if messages are queued or the socket is full.

        The caller closes its own descriptors. `label` must not begin with ``{``, which marks a message.
        """
        if not self.connected or self._send_queue:
            return False
        try:
            socket.send_fds(self._socket, [label], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close this end, and call `on_closed`, unless it is closed already."""
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
        except OSError:  # the peer is gone; `doRead` reports that, so that `on_closed` is not called within `send`
            return True
        return True

    def _shut_down(self) -> None:
        self.connected = False
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._send_queue.clear()
        self._socket.close()
        self._on_closed()
