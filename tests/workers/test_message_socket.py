"""Messages and descriptors over a real socket pair. The test runs the iterations of the reactor."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from dockerproxy.workers import message_socket
from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE, MessageSocket, MessageTooLong, socketpair
from tests.workers.descriptor_reactor import DescriptorReactor


class RecordingEnd:
    """One end of the socket pair. Records received messages and descriptors."""

    def __init__(self, reactor: DescriptorReactor, sock: socket.socket) -> None:
        self.messages: list[Any] = []
        self.descriptors: list[tuple[bytes, int]] = []
        self.closed_count = 0
        self.message_socket = MessageSocket(
            reactor, sock, self.messages.append, lambda *received: self.descriptors.append(received), self._on_closed
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
    assert one.message_socket.send_descriptors(b"\x01\x02", read)
    one.message_socket.send("after")
    os.close(read)
    reactor.iterate()
    assert other.messages == ["before", "after"]
    [(label, descriptor)] = other.descriptors
    assert label == b"\x01\x02"
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
    assert not one.message_socket.send_descriptors(b"x", 0)
    one.message_socket.send(count)
    while one.message_socket._send_queue:
        reactor.iterate()
    reactor.iterate()
    for _ in range(count):
        reactor.iterate()
    assert other.messages == list(range(count + 1))
    assert one.message_socket not in reactor.writers
    assert one.message_socket.send_descriptors(b"x", 0)
    reactor.iterate()


def test_stalled_peer_is_disconnected(
    reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = ends
    monkeypatch.setattr(message_socket, "_MAX_QUEUED_MESSAGES", 10)
    while one.message_socket.connected:
        one.message_socket.send("again")
    assert one.closed_count == 1
    one.message_socket.send("late")


def test_message_too_long(ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    with pytest.raises(MessageTooLong):
        ends[0].message_socket.send("x" * MAX_MESSAGE_SIZE)


def test_message_of_maximum_size(reactor: DescriptorReactor, ends: tuple[RecordingEnd, RecordingEnd]) -> None:
    one, other = ends
    text = "x" * (MAX_MESSAGE_SIZE - 3)
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
    assert not other.message_socket.send_descriptors(b"x", 0)
    assert reactor.readers == reactor.writers == set()
