"""The text log: lines for the journal have a priority instead of a timestamp, other lines have none."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.logger import LogEvent, eventAsText, formatEventAsClassicLogText, globalLogPublisher

from dockerproxy.daemon.accesslog import AccessLog
from dockerproxy.daemon.textlog import TextLog

PROJECT = Path(__file__).parents[2]

PROGRAM = """
import os, sys
if len(sys.argv) > 1:
    status = os.fstat(1)
    os.environ["JOURNAL_STREAM"] = sys.argv[1].format(here=f"{status.st_dev}:{status.st_ino}")
from twisted.logger import Logger, LogLevel
from dockerproxy.daemon.textlog import observer
log = Logger("n", observer=observer())
for level in LogLevel.iterconstants():
    log.emit(level, "a {x}", x="message")
log.info("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    log.failure("failed")
log.info("")
"""


def run(*arguments: str) -> list[str]:
    """Run PROGRAM with a pipe as standard output, and return its lines."""
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return result.stdout.splitlines()


def test_journal_lines_have_a_priority() -> None:
    lines = run("{here}")
    assert lines[:7] == [
        "<7>[n#debug] a message", "<6>[n#info] a message", "<4>[n#warn] a message", "<3>[n#error] a message",
        "<2>[n#critical] a message", "<6>[n#info] two", "<6>lines",
    ]  # fmt: skip
    assert lines[7] == "<2>[n#critical] failed"
    assert len(lines) > 9
    assert all(line.startswith("<2>") for line in lines[7:])
    assert lines[-1] == "<2>builtins.ZeroDivisionError: division by zero"


@pytest.mark.parametrize("arguments", [(), ("1:2",), ("",)], ids=["unset", "of another stream", "empty"])
def test_other_streams_get_a_time_and_no_priority(arguments: tuple[str, ...]) -> None:
    lines = run(*arguments)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[n#debug\] a message", lines[0])
    assert not any(line.startswith("<") for line in lines)


@given(st.lists(st.floats(0, 4e9, allow_nan=False), max_size=5), st.text())
@example([3999999999.0, 3999999999.9999995], "")
@example([3999999999.9999995, 3999999999.0], "")
def test_the_access_log_fast_path_formats_alike(times: list[float], path: str) -> None:
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    try:
        for _ in times:
            AccessLog().record("192.0.2.1", "GET", "a.test", f"/{path}", 200, 1, 0.5, "HIT")
    finally:
        globalLogPublisher.removeObserver(events.append)
    plain, journal = io.StringIO(), io.StringIO()
    logs = TextLog(plain, journal=False), TextLog(journal, journal=True)
    for event, timestamp in zip(events, times, strict=True):
        event["log_time"] = timestamp
        for log in logs:
            log(event)
    assert plain.getvalue() == "".join(str(formatEventAsClassicLogText(event)) for event in events)
    assert journal.getvalue() == "".join(f"<6>{eventAsText(event, includeTimestamp=False)}\n" for event in events)


def test_a_closed_stream_is_ignored() -> None:
    stream = io.StringIO()
    stream.close()
    TextLog(stream, journal=False)({"log_format": "text", "log_time": 0.0})
