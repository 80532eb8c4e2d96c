"""The log as journald likes it: ``twistd --logger=dockerproxy.daemon.priority.observer``."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from twisted.logger import FileLogObserver, LogEvent, LogLevel, eventAsText, textFileLogObserver

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
