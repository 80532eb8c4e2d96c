"""The log as journald likes it. twistd's ``--logger=dockerproxy.daemon.priority.observer`` asks for it, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from twisted.logger import FileLogObserver, ILogObserver, LogEvent, LogLevel, eventAsText, textFileLogObserver
from twisted.python.components import Componentized

from dockerproxy.daemon.jsonlog import is_standard_output

# sd-daemon(3): the levels of syslog. The unit's SyslogLevel= is for lines without one.
_PRIORITIES = {LogLevel.debug: 7, LogLevel.info: 6, LogLevel.warn: 4, LogLevel.error: 3, LogLevel.critical: 2}
_INFO = 6


def observer() -> FileLogObserver:
    """Return an observer that writes text to standard output.

    Where standard output is the journal ($JOURNAL_STREAM, systemd.exec(5)), each line starts with its priority as
    ``<N>`` and has no time stamp, the journal having its own; elsewhere lines are as twistd writes them.
    """
    if _is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", "")):
        return FileLogObserver(sys.stdout, _with_priority)
    return textFileLogObserver(sys.stdout)


def fits(options: Mapping[str, Any]) -> bool:
    """Say whether twistd, by its `options`, would log to standard output, and that is the journal."""
    return is_standard_output(options) and _is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", ""))


def install(application: Componentized) -> None:
    """Make `application` log by `observer`. When to call it is told at `dockerproxy.daemon.jsonlog.install`."""
    application.setComponent(ILogObserver, observer())  # type: ignore[no-untyped-call]


def complain(text: str) -> None:
    """Write a line to standard error, there being no log yet."""
    error = _PRIORITIES[LogLevel.error]
    prefix = f"<{error}>" if _is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    print(f"{prefix}{text}", file=sys.stderr)


def _is_journal(stream: TextIO, named: str) -> bool:
    # The variable is inherited by children whose output may go elsewhere, so systemd says to compare.
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def _with_priority(event: LogEvent) -> str | None:
    text = eventAsText(event, includeTimestamp=False)
    if not text:
        return None
    priority = _PRIORITIES.get(event.get("log_level"), _INFO)
    # The journal takes each line of a traceback as an entry of its own.
    return "".join(f"<{priority}>{line}\n" for line in text.splitlines())
