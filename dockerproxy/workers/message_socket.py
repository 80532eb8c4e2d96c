"""A socket between two processes that carries JSON messages and descriptors in order (AF_UNIX, SOCK_SEQPACKET)."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure
from zope.interface import implementer

MAX_MESSAGE_SIZE = 192 * 1024
"""Maximum bytes of a message. A socket accepts that many at once by the default of net.core.wmem_default."""

_MAX_QUEUED_MESSAGES = 10_000  # messages; a peer that is so far behind hangs, and is disconnected
_MAX_QUEUED_HINTS = 1000  # messages of one kind; further ones are dropped while so many wait
_MESSAGES_PER_READ = 64  # messages to receive before control returns to the reactor

_encode = json.JSONEncoder(separators=(",", ":")).encode

OnMessage = Callable[[Any], None]
OnDescriptor = Callable[[Any, int | None], None]


def reject_descriptor(message: Any, descriptor: int | None) -> None:
    """Close a descriptor that was not expected."""
    if descriptor is not None:
        os.close(descriptor)


class MessageNotSent(Exception):
    """The message is too long, or the kernel refused it (no memory). Earlier and later messages are not affected."""


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets."""
    parent_socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return parent_socket, child_socket


@implementer(IReadWriteDescriptor)
class MessageSocket:
    """One end of the connection.

    `on_message` is called with each message, a JSON value. `on_descriptor` is called with each message that carries a
    descriptor, and the descriptor, which it must close. The descriptor is None if the kernel dropped it, because this
    process has too many open files. `on_closed` is called once, when either end has been closed.
    """

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        on_message: OnMessage,
        on_closed: Callable[[], None],
        on_descriptor: OnDescriptor = reject_descriptor,
    ) -> None:
        self._reactor = reactor
        self._socket = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._on_descriptor = on_descriptor
        self._send_queue: deque[tuple[str, bytes]] = deque()  # the kinds of hints, and "" for others
        self._queued_hints: Counter[str] = Counter()  # by kind
        self._buffer = bytearray(MAX_MESSAGE_SIZE)
        self.connected = True
        self.dropped_hints = 0
        """Hints that were dropped because the peer was behind."""
        sock.setblocking(False)
        try:
            reactor.addReader(self)
        except OSError:  # the kernel has no memory for another watched descriptor
            sock.close()
            raise

    @property
    def queued(self) -> int:
        """The number of messages that wait for the peer."""
        return len(self._send_queue)

    def send(self, message: Any, kind: str = "") -> None:
        """Send `message`, or queue it if the socket is full. Do nothing if it is closed. Raise `MessageNotSent`.

        `kind` is that of a hint.
        """
        data = _encode(message).encode()
        if len(data) > MAX_MESSAGE_SIZE:
            raise MessageNotSent(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_SIZE} bytes")
        if not self.connected:
            return
        if self._send_queue or not self._try_send(data):
            self._send_queue.append((kind, data))
            if kind:
                self._queued_hints[kind] += 1
            self._reactor.addWriter(self)
            if len(self._send_queue) > _MAX_QUEUED_MESSAGES:
                self.close()

    def hint(self, kind: str, message: Any) -> None:
        """Send a message that need not arrive. Drop it if the peer is behind, or if it cannot be sent.

        Each `kind` of hints has its own place in the queue. Clients that cause many of one kind cannot displace others.
        """
        if self._queued_hints[kind] >= _MAX_QUEUED_HINTS:
            self.dropped_hints += 1
            return
        try:
            self.send(message, kind)
        except MessageNotSent:
            self.dropped_hints += 1

    def send_descriptors(self, message: Any, descriptors: list[int]) -> None:
        """Send `message` with copies of `descriptors`. The caller closes its own.

        Raise `OSError` if the socket is full or closed.
        """
        if not self.connected:
            raise BrokenPipeError("the other process is gone")
        if self._send_queue:
            raise BlockingIOError("the other process is behind")
        socket.send_fds(self._socket, [_encode(message).encode()], descriptors)

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
                size, ancillary, flags, _ = self._socket.recvmsg_into(
                    [self._buffer], socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return None
            except OSError:
                return CONNECTION_LOST
            if not size:
                return CONNECTION_DONE
            message = json.loads(bytes(memoryview(self._buffer)[:size]))
            if ancillary:
                [(_, _, content)] = ancillary
                self._on_descriptor(message, int.from_bytes(content[:4], sys.byteorder))
            elif flags & socket.MSG_CTRUNC:
                self._on_descriptor(message, None)
            else:
                self._on_message(message)
            if not self.connected:
                return None
        return None

    def doWrite(self) -> Any:
        while self._send_queue:
            kind, data = self._send_queue[0]
            try:
                if not self._try_send(data):
                    return None
            except MessageNotSent:  # its sender has returned; the peer must not miss a message silently
                return CONNECTION_LOST
            self._send_queue.popleft()
            if kind:
                self._queued_hints[kind] -= 1
        self._reactor.removeWriter(self)
        return None

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def _try_send(self, data: bytes) -> bool:
        """Return whether the message needs no other attempt. Raise `MessageNotSent`."""
        try:
            self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            # The peer is gone. `doRead` reports that, so that `on_closed` is not called within `send`.
            return True
        except OSError as error:  # EMSGSIZE, ENOBUFS, ENOMEM
            raise MessageNotSent(f"message of {len(data)} bytes: {error.strerror}") from error
        return True

    def _shut_down(self) -> None:
        self.connected = False
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._send_queue.clear()
        self._socket.close()
        self._on_closed()
