"""What a worker writes, in the log of the first process."""

from __future__ import annotations

import os
from typing import Any

import pytest
from twisted.logger import LogEvent, LogLevel, globalLogPublisher

from dockerproxy.daemon.jsonlog import JsonLog
from dockerproxy.workers.relay import Relay, stop_logging
from tests.workers.by_hand import Reactor


class Pipe:
    """The worker's end of a pipe."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        reading, self.writing = os.pipe()
        self.relay = Relay(self.reactor, reading)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.writing, data[:4096]) :]
            self.reactor.turn()

    def close(self) -> None:
        os.close(self.writing)
        self.reactor.turn()


def test_an_event_is_logged_as_if_it_were_from_here(logged: list[LogEvent]) -> None:
    lines: list[str] = []
    stream: Any = type("Stream", (), {"write": lambda self, data: lines.append(data), "flush": lambda self: None})()
    JsonLog(stream)(
        {
            "log_time": 1.5,
            "log_level": LogLevel.warn,
            "log_namespace": "dockerproxy.some",
            "log_format": "{what} is wrong",
            "what": "ä\n{x}",
        }
    )
    pipe = Pipe()
    data = "".join(lines).encode()
    pipe.write(data[:10])
    assert logged == []
    pipe.write(data[10:])
    [event] = logged
    assert (event["log_time"], event["log_level"], event["log_namespace"]) == (1.5, LogLevel.warn, "dockerproxy.some")
    assert event["log_format"].format(**event) == "ä\n{x} is wrong"
    pipe.close()


@pytest.mark.parametrize("line", ["Traceback (most recent call last):", "[1]", "{}", '{"time": 1}', '"x"', "5"])
def test_what_is_no_event_is_logged_as_it_is(logged: list[LogEvent], line: str) -> None:
    pipe = Pipe()
    pipe.write(f"{line}\nlast words".encode())
    pipe.close()
    assert [event["line"] for event in logged if "line" in event] == [line, "last words"]


def test_a_line_without_end_is_not_kept_whole(logged: list[LogEvent]) -> None:
    pipe = Pipe()
    for _ in range(100):
        pipe.write(b"x" * 10_000)
    pipe.write(b"\n")
    pipe.close()
    assert max(len(event["line"]) for event in logged if "line" in event) <= 2 * 64 * 1024


def test_it_ends_with_the_pipe() -> None:
    pipe = Pipe()
    descriptor = pipe.relay.fileno()
    pipe.close()
    assert pipe.reactor.readers == set()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_the_log_is_without_observers_then(logged: list[LogEvent]) -> None:
    """Who observes it is put back afterwards: pytest and trial are among them."""
    observers = stop_logging()
    try:
        globalLogPublisher({"log_level": LogLevel.info, "log_format": "unseen"})
    finally:
        for observer in observers:
            globalLogPublisher.addObserver(observer)
    globalLogPublisher({"log_level": LogLevel.info, "log_format": "seen"})
    assert [event["log_format"] for event in logged if "log_format" in event] == ["seen"]
