"""Numbers in memory that several processes share."""

from __future__ import annotations

import os

import pytest

from dockerproxy.workers.tally import Tally


@pytest.fixture
def tally() -> Tally:
    return Tally.make(3)


def test_who_begins_has_nothing_ended_and_is_alive(tally: Tally) -> None:
    tally.begin(1, 7)
    assert (tally.ended(1), tally.seen(1)) == (0, 7)


def test_each_process_has_numbers_of_its_own(tally: Tally) -> None:
    for number in range(3):
        tally.begin(number, 10 * number)
    tally.count_end(1)
    tally.count_end(1)
    tally.count_end(2)
    tally.note_life(1, 99)
    assert [tally.ended(number) for number in range(3)] == [0, 2, 1]
    assert [tally.seen(number) for number in range(3)] == [0, 99, 20]


def test_who_begins_again_begins_from_nothing(tally: Tally) -> None:
    tally.count_end(2)
    tally.begin(2, 5)
    assert (tally.ended(2), tally.seen(2)) == (0, 5)


def test_a_copy_of_the_process_has_the_same(tally: Tally) -> None:
    pid = os.fork()
    if not pid:
        tally.count_end(1)
        tally.note_life(1, 2**60)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tally.ended(1), tally.seen(1)) == (1, 2**60)
