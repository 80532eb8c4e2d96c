"""The log as text on standard output. twistd's ``--logger=dockerproxy.daemon.textlog.observer`` asks for it, too.

Where that is the journal, lines have its priorities; elsewhere they are as twistd writes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, formatEventAsClassicLogText, formatTime
from twisted.python.components import Componentized
from zope.interface import implementer

from dockerproxy.daemon.accesslog import NAMESPACE
from dockerproxy.daemon.jsonlog import TextStream, logs_to_stdout

# sd-daemon(3): the levels of syslog. The unit's SyslogLevel= is for lines without one.
_PRIORITIES = {LogLevel.debug: 7, LogLevel.info: 6, LogLevel.warn: 4, LogLevel.error: 3, LogLevel.critical: 2}
_INFO = 6


@implementer(ILogObserver)
class TextLog:
    """Writes each event as text; never raises.

    For the `journal`, each line starts with its priority as ``<N>`` and has no time stamp, the journal having its own.
    The lines of the access log, of which there are many, take a short way to the same text.
    """

    def __init__(self, stream: TextStream, *, journal: bool) -> None:
        self._stream = stream
        self._format = _format_with_priority if journal else formatEventAsClassicLogText
        self._journal = journal
        self._last_second: tuple[int, str] = (-1, "")  # the last one, and how it is written

    def __call__(self, event: LogEvent) -> None:
        # What is being logged matters more than its line: a full disk or a closed pipe must not end a transfer.
        with suppress(Exception):
            text = self._format_access(event) if event.get("log_namespace") == NAMESPACE else self._format(event)
            if text:
                self._stream.write(text)
                self._stream.flush()

    def _format_access(self, event: LogEvent) -> str:
        prefix = f"<{_INFO}>" if self._journal else f"{self._format_time(event['log_time'])} "
        return f"{prefix}[{NAMESPACE}#info] {event['line']}\n"

    def _format_time(self, timestamp: float) -> str:
        second, text = self._last_second
        if timestamp - int(timestamp) > 0.999999:  # Twisted rounds to microseconds: this may be the next second already
            return formatTime(timestamp)
        if int(timestamp) != second:
            text = formatTime(timestamp)
            self._last_second = int(timestamp), text
        return text


def observer() -> TextLog:
    """Return an observer for standard output, which is the journal where $JOURNAL_STREAM says so (systemd.exec(5))."""
    return TextLog(sys.stdout, journal=_is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", "")))


def install(application: Componentized, options: Mapping[str, Any]) -> None:
    """Make `application` log by `observer` where twistd, by its `options`, would log to standard output.

    When to call it is told at `dockerproxy.daemon.jsonlog.install`.
    """
    if logs_to_stdout(options):
        application.setComponent(ILogObserver, observer())  # type: ignore[no-untyped-call]


def print_error(text: str) -> None:
    """Write a line to standard error, there being no log yet."""
    priority = _PRIORITIES[LogLevel.error]
    prefix = f"<{priority}>" if _is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    print(f"{prefix}{text}", file=sys.stderr)


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    # The variable is inherited by children whose output may go elsewhere, so systemd says to compare.
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"


def _format_with_priority(event: LogEvent) -> str | None:
    text = eventAsText(event, includeTimestamp=False)
    if not text:
        return None
    priority = _PRIORITIES.get(event.get("log_level"), _INFO)
    # The journal takes each line of a traceback as an entry of its own.
    return "".join(f"<{priority}>{line}\n" for line in text.splitlines())
