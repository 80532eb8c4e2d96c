"""Messages and descriptors over a real socket pair. The test runs the iterations of the reactor."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import suppress
from typing import Any

import pytest

from dockerproxy.workers import message_socket
from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE, MessageNotSent, MessageSocket, socketpair
from tests.workers.descriptor_reactor import DescriptorReactor


class RecordingEnd:
    """One end of the socket pair. Records received messages and descriptors."""

    def __init__(self, reactor: DescriptorReactor, sock: socket.socket) -> None:
        self.messages: list[Any] = []
        self.descriptors: list[tuple[Any, int | None]] = []
        self.closed_count = 0
        self.message_socket = MessageSocket(
            reactor, sock, self.messages.append, self._on_closed, lambda *received: self.descriptors.append(received)
        )

    def _on_closed(self) -> None:
        self.closed_count += 1


@pytest.fixture
def reactor() -> DescriptorReactor:
    return DescriptorReactor()


@pytest.fixture
def ends(reactor: DescriptorReactor) -> Any:
    one, other = (RecordingEnd(reactor, end) for end in socketpair())
    yield one, other
    one.message_socket.close()
    other.message_socket.close()
    for _, descriptor in [*one.descriptors, *other.descriptors]:
        if descriptor is not None:
            os.close(descriptor)


def test_messages_round_trip_in_order(reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    one, other = ends
    messages = [["a", 1, None], {"b": [True, "ü"]}, "", 0]
    for message in messages:
        one.message_socket.send(message)
    reactor.iterate()
    assert other.messages == messages


def test_descriptors_are_ordered_with_messages(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    one, other = ends
    read, write = os.pipe()
    one.message_socket.send("before")
    one.message_socket.send_descriptors("with", [read])
    one.message_socket.send("after")
    os.close(read)
    reactor.iterate()
    assert other.messages == ["before", "after"]
    [(message, descriptor)] = other.descriptors
    assert message == "with"
    assert descriptor is not None
    os.write(write, b"x")
    assert os.read(descriptor, 1) == b"x"
    assert not os.get_inheritable(descriptor)
    os.close(write)


def test_slow_peer_gets_all_messages_but_no_descriptors(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    one, other = ends
    count = 0
    while not one.message_socket._send_queue:
        one.message_socket.send(count)
        count += 1
    with pytest.raises(BlockingIOError):
        one.message_socket.send_descriptors("x", [0])
    one.message_socket.send(count)
    while one.message_socket._send_queue:
        reactor.iterate()
    reactor.iterate()
    for _ in range(count):
        reactor.iterate()
    assert other.messages == list(range(count + 1))
    assert one.message_socket not in reactor.writers
    one.message_socket.send_descriptors("x", [0])
    reactor.iterate()
    assert [message for message, _ in other.descriptors] == ["x"]


def test_stalled_peer_is_disconnected(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = ends
    monkeypatch.setattr(message_socket, "_MAX_QUEUED_MESSAGES", 10)
    while one.message_socket.connected:
        one.message_socket.send("again")
    assert one.closed_count == 1
    one.message_socket.send("late")


def test_hints_are_dropped_while_the_peer_is_behind(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    """However many hints wait for a peer, it is not disconnected; messages are still queued."""
    one, other = ends
    for number in range(10_001):
        one.message_socket.hint("binding", number)
    assert one.message_socket.connected
    assert one.message_socket.queued == message_socket._MAX_QUEUED_HINTS
    one.message_socket.send("message")
    while one.message_socket.queued:
        reactor.iterate()
    for _ in range(10_001 // 64 + 1):
        reactor.iterate()
    assert other.messages[-1] == "message"
    assert len(other.messages) + one.message_socket.dropped_hints == 10_001 + 1
    assert one.message_socket.dropped_hints > 0


def test_hints_of_one_kind_do_not_displace_others(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    """A client that asks for many tokens does not hide from the main process which blobs others use."""
    one, other = ends
    for number in range(5000):
        one.message_socket.hint("binding", number)
    one.message_socket.hint("use", "used")
    assert one.message_socket.queued == message_socket._MAX_QUEUED_HINTS + 1
    while one.message_socket.queued:
        reactor.iterate()
    for _ in range(5000 // 64 + 1):
        reactor.iterate()
    assert other.messages[-1] == "used"
    one.message_socket.hint("binding", "again")  # the places are free again
    reactor.iterate()
    assert other.messages[-1] == "again"


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM])
def test_refused_message_is_reported(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd], number: int
) -> None:
    """The kernel may refuse a message. It must not count as sent, and does not affect others."""
    one, other = ends
    one.message_socket._socket = refusing = RefusingSocket(one.message_socket._socket, number)  # type: ignore[assignment]
    with pytest.raises(MessageNotSent, match=os.strerror(number)):
        one.message_socket.send("refused")
    one.message_socket.hint("kind", "refused")
    assert one.message_socket.dropped_hints == 1
    refusing.refuse = False
    one.message_socket.send("sent")
    reactor.iterate()
    assert other.messages == ["sent"]


def test_refused_queued_message_disconnects(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    one, other = ends
    while not one.message_socket.queued:
        one.message_socket.send("x" * 1000)
    for _ in range(10):
        other.message_socket.doRead()
    one.message_socket._socket = RefusingSocket(one.message_socket._socket, errno.ENOMEM)  # type: ignore[assignment]
    reactor.iterate()
    assert (one.closed_count, one.message_socket.connected) == (1, False)


class RefusingSocket:
    """A socket that raises an error in `send` while `refuse` is true."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self._socket = sock
        self._number = number
        self.refuse = True

    def send(self, data: bytes) -> int:
        if self.refuse:
            raise OSError(self._number, os.strerror(self._number))
        return self._socket.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def test_descriptor_beyond_the_limit_of_open_files(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]
) -> None:
    """The kernel drops it. The receiver learns of it, and the messages behind it arrive."""
    one, other = ends
    one.message_socket.send_descriptors("lost", [0])
    one.message_socket.send("after")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    try:
        used = fill_descriptors()
        reactor.iterate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for descriptor in used:
        os.close(descriptor)
    assert (other.messages, other.descriptors) == (["after"], [("lost", None)])


def fill_descriptors() -> list[int]:
    """Open descriptors until the limit of the process."""
    used = []
    with suppress(OSError):
        while True:
            used.append(os.dup(0))
    return used


def test_failed_registration_closes_the_socket() -> None:
    class FullReactor(DescriptorReactor):
        def addReader(self, reader: Any) -> None:
            raise OSError(errno.ENOSPC, "no space for another watch")

    parent_socket, child_socket = socketpair()
    with child_socket, pytest.raises(OSError, match="no space"):
        RecordingEnd(FullReactor(), parent_socket)
    assert parent_socket.fileno() == -1


def test_message_too_long(ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    with pytest.raises(MessageNotSent):
        ends[0].message_socket.send("x" * MAX_MESSAGE_SIZE)


def test_message_of_maximum_size(reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    one, other = ends
    text = "x" * (MAX_MESSAGE_SIZE - 2)
    one.message_socket.send(text)
    for _ in range(3):
        reactor.iterate()
    assert other.messages == [text]


def test_closing_one_end_closes_the_other(reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    one, other = ends
    one.message_socket.send("last")
    one.message_socket.close()
    one.message_socket.close()
    assert (one.closed_count, other.closed_count) == (1, 0)
    other.message_socket.send("to nobody")
    reactor.iterate()
    reactor.iterate()
    assert (other.messages, other.closed_count, other.message_socket.connected) == (["last"], 1, False)
    with pytest.raises(BrokenPipeError):
        other.message_socket.send_descriptors("x", [0])
    assert reactor.readers == reactor.writers == set()
