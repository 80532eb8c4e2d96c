"""Questions and answers between two processes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from dockerproxy.workers.calls import Calls, Elsewhere
from dockerproxy.workers.line import pair
from tests.workers.by_hand import Reactor


class Both:
    """Two processes. The one asks the other, whose answers come when the test says so."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.later: Deferred[Any] = Deferred()
        self.told: list[Any] = []
        answers = {
            "sum": lambda *numbers: sum(numbers),
            "later": lambda: self.later,
            "fail": lambda: 1 // 0,
            "note": self.told.append,
            "think": self._think,
        }
        one, other = pair()
        self.lost = lambda: None
        self.one = Calls(self.reactor, one, {}, lost=lambda: self.lost())
        self.other = Calls(self.reactor, other, answers, lost=lambda: None)

    async def _think(self, text: str) -> str:
        return text.upper()

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Ask, and return where the answer will be."""
        outcome: list[Any] = []
        self.asked = Deferred.fromCoroutine(self.one.ask(name, *arguments))
        self.asked.addBoth(outcome.append)
        self.turn()
        return outcome

    def turn(self) -> None:
        for _ in range(3):
            self.reactor.turn()


@pytest.fixture
def both() -> Any:
    both = Both()
    yield both
    both.one.line.close()
    both.other.line.close()


def test_what_is_asked_is_answered(both: Both) -> None:
    assert both.ask("sum", 1, 2, 3) == [6]
    assert both.ask("think", "a") == ["A"]


def test_answers_come_in_any_order(both: Both) -> None:
    later = both.ask("later")
    assert both.ask("sum", 1) == [1]
    assert later == []
    both.later.callback({"size": None})
    both.turn()
    assert later == [{"size": None}]


def test_what_is_told_is_not_answered(both: Both) -> None:
    both.one.tell("note", "something")
    both.turn()
    assert both.told == ["something"]


@pytest.mark.parametrize("name", ["fail", "unheard of"])
def test_what_fails_there(both: Both, name: str, logged: list[LogEvent]) -> None:
    [failure] = both.ask(name)
    assert isinstance(failure, Failure) and isinstance(failure.value, Elsewhere)
    assert any("log_failure" in event for event in logged)
    assert both.ask("sum", 1) == [1]


def test_who_does_not_wait_any_longer(both: Both) -> None:
    outcome = both.ask("later")
    both.asked.cancel()
    assert isinstance(outcome[0].value, CancelledError)
    both.later.callback(1)
    both.turn()
    assert both.ask("sum", 1) == [1]


def test_the_other_process_dies(both: Both) -> None:
    outcome = both.ask("later")
    both.other.line.close()
    both.turn()
    assert isinstance(outcome[0].value, Elsewhere)
    assert isinstance(both.ask("sum", 1)[0].value, Elsewhere)


def test_the_end_is_known_before_who_waits_is_told(both: Both) -> None:
    # A worker ends in there: nobody is answered, in the first process's last moment, that something failed.
    outcome = both.ask("later")
    then: list[list[Any]] = []
    both.lost = lambda: then.append(list(outcome))
    both.other.line.close()
    both.turn()
    assert then == [[]] and len(outcome) == 1
