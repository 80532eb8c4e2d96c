"""The handler of repeated stop signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dockerproxy.daemon.signals import on_repeated_stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class RecordingReactor:
    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def callFromThread(self, callback: Callable[[], Any]) -> None:
        self.calls.append(callback)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_repeated_signal_calls_back_in_the_reactor_thread(number: signal.Signals) -> None:
    received: list[str] = []
    reactor = RecordingReactor()
    on_repeated_stop(reactor, lambda: received.append("again"))  # type: ignore[arg-type]
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # the pending Python handlers run before this call returns
    assert received == []
    assert len(reactor.calls) == 2
    reactor.calls[0]()
    assert received == ["again"]
