"""The second signal that asks the daemon to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dockerproxy.daemon.signals import on_repeated_stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Reactor:
    def __init__(self) -> None:
        self.called: list[Callable[[], Any]] = []

    def callFromThread(self, call: Callable[[], Any]) -> None:
        self.called.append(call)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_further_signal_is_told_in_the_reactors_own_time(number: signal.Signals) -> None:
    told: list[str] = []
    reactor = Reactor()
    on_repeated_stop(reactor, lambda: told.append("again"))  # type: ignore[arg-type]
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # a call, after which the handlers have run
    assert told == []
    assert len(reactor.called) == 2
    reactor.called[0]()
    assert told == ["again"]
