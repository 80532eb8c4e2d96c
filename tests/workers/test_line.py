"""Messages and descriptors between two processes: over real sockets, with a reactor that does what the test says."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from dockerproxy.workers import line
from dockerproxy.workers.line import LONGEST, Line, LineError, pair
from tests.workers.by_hand import Reactor


class End:
    """One end, and what came to it."""

    def __init__(self, reactor: Reactor, end: socket.socket) -> None:
        self.got: list[Any] = []
        self.descriptors: list[tuple[bytes, int]] = []
        self.lost = 0
        self.line = Line(reactor, end, self.got.append, lambda *passed: self.descriptors.append(passed), self._lose)

    def _lose(self) -> None:
        self.lost += 1


@pytest.fixture
def reactor() -> Reactor:
    return Reactor()


@pytest.fixture
def ends(reactor: Reactor) -> Any:
    one, other = (End(reactor, end) for end in pair())
    yield one, other
    one.line.close()
    other.line.close()
    for _, descriptor in [*one.descriptors, *other.descriptors]:
        os.close(descriptor)


def test_messages_keep_their_order_and_shape(reactor: Reactor, ends: tuple[End, End]) -> None:
    one, other = ends
    messages = [["a", 1, None], {"b": [True, "ü"]}, "", 0]
    for message in messages:
        one.line.send(message)
    reactor.turn()
    assert other.got == messages


def test_descriptors_between_messages(reactor: Reactor, ends: tuple[End, End]) -> None:
    one, other = ends
    read, write = os.pipe()
    one.line.send("before")
    assert one.line.pass_on(b"\x01\x02", read)
    one.line.send("after")
    os.close(read)
    reactor.turn()
    assert other.got == ["before", "after"]
    [(label, descriptor)] = other.descriptors
    assert label == b"\x01\x02"
    os.write(write, b"x")
    assert os.read(descriptor, 1) == b"x"
    assert not os.get_inheritable(descriptor)
    os.close(write)


def test_who_is_behind_gets_no_descriptors_and_misses_nothing(reactor: Reactor, ends: tuple[End, End]) -> None:
    one, other = ends
    count = 0
    while not one.line._waiting:
        one.line.send(count)
        count += 1
    assert not one.line.pass_on(b"x", 0)
    one.line.send(count)
    while one.line._waiting:
        reactor.turn()
    reactor.turn()
    for _ in range(count):
        reactor.turn()
    assert other.got == list(range(count + 1))
    assert one.line not in reactor.writers
    assert one.line.pass_on(b"x", 0)
    reactor.turn()


def test_who_takes_nothing_at_all_is_hung_up_on(
    reactor: Reactor, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = ends
    monkeypatch.setattr(line, "_MOST_WAITING", 10)
    while one.line.connected:
        one.line.send("again")
    assert one.lost == 1
    one.line.send("late")


def test_a_message_that_is_too_long(ends: tuple[End, End]) -> None:
    with pytest.raises(LineError):
        ends[0].line.send("x" * LONGEST)


def test_the_longest_message(reactor: Reactor, ends: tuple[End, End]) -> None:
    one, other = ends
    text = "x" * (LONGEST - 3)
    one.line.send(text)
    for _ in range(3):
        reactor.turn()
    assert other.got == [text]


def test_the_end_of_one_is_the_end_of_the_other(reactor: Reactor, ends: tuple[End, End]) -> None:
    one, other = ends
    one.line.send("last")
    one.line.close()
    one.line.close()
    assert (one.lost, other.lost) == (1, 0)
    other.line.send("to nobody")
    reactor.turn()
    reactor.turn()
    assert (other.got, other.lost, other.line.connected) == (["last"], 1, False)
    assert not other.line.pass_on(b"x", 0)
    assert reactor.readers == reactor.writers == set()
