"""The text log on standard output. twistd's ``--logger=dockerproxy.daemon.textlog.observer`` selects it, too.

If standard output is the journal, each line has a priority. Otherwise the lines have twistd's format.
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
from dockerproxy.daemon.jsonlog import TextStream, is_port_message, logs_to_stdout
from dockerproxy.daemon.log_stream import DROPPED_MESSAGE, NonBlockingStream

# Syslog levels, as sd-daemon(3) defines them. Lines without one get the unit's SyslogLevel=.
_PRIORITIES = {LogLevel.debug: 7, LogLevel.info: 6, LogLevel.warn: 4, LogLevel.error: 3, LogLevel.critical: 2}
_INFO = 6


@implementer(ILogObserver)
class TextLog:
    """Writes each event as text; never raises.

    If `journal` is true, each line starts with its priority as ``<N>``, and has no timestamp because the journal adds
    one. Lines of the access log take a faster path to the same text, because there are many of them.
    """

    def __init__(self, stream: TextStream, *, journal: bool) -> None:
        self._stream = stream
        self._format = _format_with_priority if journal else formatEventAsClassicLogText
        self._journal = journal
        self._last_second: tuple[int, str] = (-1, "")  # the second logged last, and its text

    def __call__(self, event: LogEvent) -> None:
        # A full disk or a closed pipe must not end the transfer that is being logged.
        with suppress(Exception):
            if event.get("log_namespace") == NAMESPACE:
                text: str | None = self._format_access(event)
            else:
                text = None if is_port_message(event) else self._format(event)
            if text:
                self._stream.write(text)
                self._stream.flush()

    def _format_access(self, event: LogEvent) -> str:
        prefix = f"<{_INFO}>" if self._journal else f"{self._format_time(event['log_time'])} "
        return f"{prefix}[{NAMESPACE}#info] {event['line']}\n"

    def _format_time(self, timestamp: float) -> str:
        second, text = self._last_second
        if timestamp - int(timestamp) > 0.999999:  # Twisted rounds to microseconds, maybe up to the next second
            return formatTime(timestamp)
        if int(timestamp) != second:
            text = formatTime(timestamp)
            self._last_second = int(timestamp), text
        return text


def observer(reactor: Any | None = None) -> TextLog:
    """Return an observer for standard output, the journal if $JOURNAL_STREAM names it (systemd.exec(5)).

    If nobody reads the log, `reactor` serves to try again; see `NonBlockingStream`.
    """
    journal = _is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", ""))
    prefix = f"<{_PRIORITIES[LogLevel.warn]}>" if journal else ""
    stream = NonBlockingStream(
        reactor,
        sys.stdout.fileno(),
        encoding=sys.stdout.encoding,
        format_dropped=lambda count: f"{prefix}{DROPPED_MESSAGE.format(count)}\n",
    )
    return TextLog(stream, journal=journal)


def install(application: Componentized, options: Mapping[str, Any], reactor: Any) -> None:
    """Make `application` log through `observer` if twistd's `options` select standard output.

    Call this when `dockerproxy.daemon.jsonlog.install` would be called.
    """
    if logs_to_stdout(options):
        application.setComponent(ILogObserver, observer(reactor))  # type: ignore[no-untyped-call]


def print_error(text: str) -> None:
    """Print a line to standard error. Use this for errors before the log exists."""
    priority = _PRIORITIES[LogLevel.error]
    prefix = f"<{priority}>" if _is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    print(f"{prefix}{text}", file=sys.stderr)


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    # Children inherit the variable even if their output is redirected, so systemd.exec(5) requires this comparison.
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
    # The journal stores each line of a traceback as a separate entry, so each needs its priority.
    return "".join(f"<{priority}>{line}\n" for line in text.splitlines())
