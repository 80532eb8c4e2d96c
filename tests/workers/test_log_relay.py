"""The relay of a worker's log to the log of the main process."""

from __future__ import annotations

import os
from typing import Any

import pytest
from twisted.logger import LogEvent, LogLevel, globalLogPublisher

from dockerproxy.daemon.jsonlog import JsonLog
from dockerproxy.workers.log_relay import LogRelay, remove_log_observers
from tests.workers.descriptor_reactor import DescriptorReactor


class LogPipe:
    """The worker's end of the pipe to a `LogRelay`."""

    def __init__(self) -> None:
        self.reactor = DescriptorReactor()
        read_fd, self.write_fd = os.pipe()
        self.relay = LogRelay(self.reactor, read_fd)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.write_fd, data[:4096]) :]
            self.reactor.iterate()

    def close(self) -> None:
        os.close(self.write_fd)
        self.reactor.iterate()


def test_json_event_is_relayed(log_events: list[LogEvent]) -> None:
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
    pipe = LogPipe()
    data = "".join(lines).encode()
    pipe.write(data[:10])
    assert log_events == []
    pipe.write(data[10:])
    [event] = log_events
    assert (event["log_time"], event["log_level"], event["log_namespace"]) == (1.5, LogLevel.warn, "dockerproxy.some")
    assert event["log_format"].format(**event) == "ä\n{x} is wrong"
    pipe.close()


@pytest.mark.parametrize("line", ["Traceback (most recent call last):", "[1]", "{}", '{"time": 1}', '"x"', "5"])
def test_other_lines_are_relayed_as_text(log_events: list[LogEvent], line: str) -> None:
    pipe = LogPipe()
    pipe.write(f"{line}\nlast words".encode())
    pipe.close()
    assert [event["line"] for event in log_events if "line" in event] == [line, "last words"]


def test_endless_line_is_truncated(log_events: list[LogEvent]) -> None:
    pipe = LogPipe()
    for _ in range(100):
        pipe.write(b"x" * 10_000)
    pipe.write(b"\n")
    pipe.close()
    assert max(len(event["line"]) for event in log_events if "line" in event) <= 2 * 64 * 1024


def test_relay_closes_with_the_pipe() -> None:
    pipe = LogPipe()
    descriptor = pipe.relay.fileno()
    pipe.close()
    assert pipe.reactor.readers == set()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_remove_log_observers(log_events: list[LogEvent]) -> None:
    """The test restores the observers afterwards, because those of pytest and trial are among them."""
    observers = remove_log_observers()
    try:
        globalLogPublisher({"log_level": LogLevel.info, "log_format": "unseen"})
    finally:
        for observer in observers:
            globalLogPublisher.addObserver(observer)
    globalLogPublisher({"log_level": LogLevel.info, "log_format": "seen"})
    assert [event["log_format"] for event in log_events if "log_format" in event] == ["seen"]
