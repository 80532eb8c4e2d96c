"""Members do not wait for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import LoopDetected
from dockerproxy.fleet.hop import Hop, HopKind
from dockerproxy.fleet.waits import PATIENCE, Waits
from dockerproxy.store.records import Records

KEY = "registry.example sha256:00"


class Work:
    """Work for a member that the test ends."""

    def __init__(self) -> None:
        self.done: Deferred[str] = Deferred(lambda _: self.cancel())
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def run(self) -> str:
        return await self.done


def start(waits: Waits, work: Work, hop: Hop) -> tuple[Deferred[str], list[Any]]:
    task: Deferred[str] = Deferred.fromCoroutine(waits.run(KEY, hop, work.run()))
    outcome: list[Any] = []
    task.addCallbacks(outcome.append, lambda failure: outcome.append(failure.value))
    return task, outcome


def test_a_member_that_asks_for_what_this_one_waits_for_there_is_refused_at_once() -> None:
    waits, work = Waits(Clock(), None), Work()
    waits.begin(KEY, "a:1")
    _, [error] = start(waits, work, Hop("a:1"))
    assert isinstance(error, LoopDetected) and error.status == 508 and work.cancelled


def test_another_one_is_refused_if_nothing_comes_soon() -> None:
    clock = Clock()
    waits, work = Waits(clock, None), Work()
    waits.begin(KEY, "b:1")
    _, outcome = start(waits, work, Hop("a:1"))
    clock.pump([0.25] * 3)
    assert outcome == []
    clock.advance(PATIENCE)
    assert isinstance(outcome[0], LoopDetected) and work.cancelled and clock.getDelayedCalls() == []


def test_it_is_served_if_the_wait_ends_in_time() -> None:
    clock = Clock()
    waits, work = Waits(clock, None), Work()
    end = waits.begin(KEY, "b:1")
    _, outcome = start(waits, work, Hop("a:1"))
    end()
    clock.pump([1.0] * 100)  # upstream may take as long as it likes
    work.done.callback("content")
    assert outcome == ["content"] and clock.getDelayedCalls() == []


def test_a_relay_may_wait_longer_but_not_for_the_one_that_asks() -> None:
    clock = Clock()
    waits, work = Waits(clock, None), Work()
    waits.begin(KEY, "b:1")
    _, outcome = start(waits, work, Hop("a:1", kind=HopKind.RELAY))
    clock.pump([0.5] * 8)
    assert outcome == []
    waits.begin(KEY, "a:1")
    clock.advance(0.5)
    assert isinstance(outcome[0], LoopDetected)


def test_a_client_that_leaves_cancels_the_work() -> None:
    clock = Clock()
    waits, work = Waits(clock, None), Work()
    task, outcome = start(waits, work, Hop("a:1"))
    task.cancel()
    assert work.cancelled and isinstance(outcome[0], CancelledError) and clock.getDelayedCalls() == []


def test_ending_a_wait_twice_ends_one_wait() -> None:
    waits = Waits(Clock(), None)
    first, second = waits.begin(KEY, "a:1"), waits.begin(KEY, "b:1")
    second()
    second()
    assert waits.member(KEY) == "a:1"
    first()
    assert waits.member(KEY) is None


def test_other_processes_know_the_waits_of_this_one(tmp_path: Path) -> None:
    clock = Clock()
    waits, other = Waits(clock, Records(tmp_path)), Waits(clock, Records(tmp_path))
    end = waits.begin(KEY, "a:1")
    assert other.member(KEY) == "a:1"
    end()
    assert other.member(KEY) is None


@pytest.mark.parametrize(
    "record", [{}, {"member": 1, "since": 0.0}, {"member": "a:1"}, {"member": "a:1", "since": "x"}]
)
def test_a_torn_record_is_no_wait(tmp_path: Path, record: dict[str, Any]) -> None:
    Records(tmp_path).put(record, "via", KEY)
    assert Waits(Clock(), Records(tmp_path)).member(KEY) is None


def test_the_record_of_a_killed_process_ends_after_an_hour(tmp_path: Path) -> None:
    clock = Clock()
    Waits(clock, Records(tmp_path)).begin(KEY, "a:1")
    other = Waits(clock, Records(tmp_path))
    clock.advance(3599)
    assert other.member(KEY) == "a:1"
    clock.advance(1)
    assert other.member(KEY) is None
