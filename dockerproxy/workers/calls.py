"""Questions and answers between two processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from inspect import isawaitable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.tasks import spawn
from dockerproxy.workers.line import Line, Passed, refuse

log = Logger()

Answers = Mapping[str, Callable[..., Any]]
"""What can be asked, by name: functions, or coroutine functions, of what JSON holds."""


class Elsewhere(Exception):
    """What was asked failed in the other process, or that is gone; the log has why."""


class Calls:
    """This process's end of a line to another. `answers` are what the other may ask; the rest is as of `Line`."""

    def __init__(
        self,
        reactor: Any,
        end: socket.socket,
        answers: Answers,
        *,
        passed: Passed = refuse,
        lost: Callable[[], None],
    ) -> None:
        self._answers = answers
        self._lost = lost
        self._asked: dict[int, Deferred[Any]] = {}
        self._count = 0
        self.line = Line(reactor, end, self._received, passed, self._ended)

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Return what the other process answers. Raise `Elsewhere`."""
        if not self.line.connected:
            raise Elsewhere("the other process is gone")
        self._count += 1
        number = self._count
        answer = self._asked[number] = Deferred(lambda _: self._forget(number))
        self.line.send([name, number, *arguments])
        return await answer

    def _forget(self, number: int) -> None:
        del self._asked[number]

    def tell(self, name: str, *arguments: Any) -> None:
        """Say something that is not answered."""
        self.line.send([name, 0, *arguments])

    def _received(self, message: Any) -> None:
        name, number, *arguments = message
        if name:
            spawn(self._answer(name, number, arguments), f"the answer to {name}")
        elif (waiting := self._asked.pop(number, None)) is not None:
            result, failed = arguments
            waiting.callback(Failure(Elsewhere(result)) if failed else result)  # type: ignore[no-untyped-call]

    async def _answer(self, name: str, number: int, arguments: list[Any]) -> None:
        try:
            result = self._answers[name](*arguments)
            if isawaitable(result):
                result = await result
            reply = [result, False]
        except Exception:
            log.failure("{name}, asked by another process, failed", name=name)
            reply = [f"{name} failed", True]
        if number:
            self.line.send(["", number, *reply])

    def _ended(self) -> None:
        self._lost()  # first: a worker ends in there, before a client is told of a failure that it would not repeat
        asked, self._asked = self._asked, {}
        for waiting in asked.values():
            waiting.errback(Failure(Elsewhere("the other process is gone")))  # type: ignore[no-untyped-call]
