"""The JSON log of LOG_FORMAT=json: one object per line."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from attrs import frozen
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import ILogObserver, InvalidLogLevelError, LogEvent, LogLevel, formatEvent
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile
from zope.interface import implementer

from dockerproxy.daemon.accesslog import FIELDS, NAMESPACE
from dockerproxy.daemon.log_stream import DROPPED_MESSAGE, NonBlockingStream

# Twisted logs these when a port is opened or closed. They name a class, and the listener's own line says more.
_PORT_MESSAGE = re.compile(r"\S+ starting on \S+|\(\w+ Port \S+ Closed\)")


class TextStream(Protocol):
    """The methods of a text file that a log needs; Twisted's `LogFile` has them, too."""

    def write(self, data: str, /) -> object: ...

    def flush(self) -> object: ...


@implementer(ILogObserver)
@frozen
class JsonLog:
    """Writes each event as ``{"time", "level", "namespace", "message"}``; never raises.

    The time is ISO 8601 in UTC. A failure adds ``traceback``, an access event adds `accesslog.FIELDS`.
    """

    _stream: TextStream

    def __call__(self, event: LogEvent) -> None:
        # A full disk or a closed pipe must not end the transfer that is being logged.
        with suppress(Exception):
            line = _format_event(event)
            if line is not None:
                self._stream.write(line)
                self._stream.flush()


def install(application: Componentized, stream: TextStream) -> None:
    """Make `application` log JSON to `stream`.

    Call this before twistd starts its log: in the top service's ``setServiceParent(application)``, or in a .tac file.
    It replaces ``--logfile`` and ``--syslog``; pass `twistd_stream` as `stream` to honour ``--logfile``. ``--logger``
    takes precedence (`twisted.application.app.AppLogger.start`, unchanged from Twisted 24.3 to 26.10).
    """
    application.setComponent(ILogObserver, JsonLog(stream))  # type: ignore[no-untyped-call]


def twistd_stream(options: Mapping[str, Any], reactor: IReactorFromThreads) -> TextStream:
    """Return the stream that twistd would log to under its `options` ``logfile`` and ``nodaemon``.

    A plugin finds these options as the `parent` of its own. As in twistd, SIGUSR1 rotates a log file. Raise SystemExit
    if a daemon is to log to standard output.
    """
    name = options.get("logfile") or ""
    if name == "-" and not options.get("nodaemon"):
        raise SystemExit("Daemons cannot log to stdout, exiting!")
    if logs_to_stdout(options):
        return json_stream(reactor, sys.stdout.fileno())
    file: LogFile = LogFile.fromFullPath(name or "twistd.log")  # type: ignore[no-untyped-call]
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda *_: reactor.callFromThread(file.rotate))
    return file


def json_stream(reactor: Any, descriptor: int) -> NonBlockingStream:
    """Return a stream of JSON lines to a copy of `descriptor` that does not block if nobody reads it."""
    return NonBlockingStream(reactor, descriptor, encoding="ascii", format_dropped=_format_dropped)


def _format_dropped(count: int) -> str:
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "level": "warn",
        "namespace": __name__,
        "message": DROPPED_MESSAGE.format(count),
    }
    return json.dumps(entry) + "\n"


def logs_to_stdout(options: Mapping[str, Any]) -> bool:
    """Return whether twistd logs to standard output under its `options`."""
    return bool(options.get("nodaemon")) and options.get("logfile") in (None, "", "-") and not options.get("syslog")


def is_port_message(event: LogEvent) -> bool:
    """Return whether `event` is one of those that Twisted itself logs when a port is opened or closed."""
    message = event.get("message") or ("",)
    return _PORT_MESSAGE.fullmatch(str(message[0])) is not None


def parse_event(line: bytes) -> LogEvent | None:
    """Return the event that a `JsonLog` wrote as `line`, or None if `line` is not such an object."""
    try:
        entry = json.loads(line)
        event = {
            "log_time": datetime.fromisoformat(entry["time"]).timestamp(),
            "log_level": LogLevel.levelWithName(entry["level"] or "info"),
            "log_namespace": entry["namespace"],
            "log_source": None,
            "log_format": "{line}",
            # Not under the key `message`, which has another meaning for Twisted's legacy observers.
            "line": "\n".join(filter(None, (entry["message"], entry.get("traceback")))),
        }
    except (ValueError, LookupError, TypeError, InvalidLogLevelError):
        return None
    if event["log_namespace"] == NAMESPACE:
        event.update((name, entry.get(name)) for name in FIELDS)
    return event


def _format_event(event: LogEvent) -> str | None:
    failure: Failure | None = event.get("log_failure")
    message = formatEvent(event)
    if (not message and failure is None) or is_port_message(event):
        return None
    time, level = event.get("log_time"), event.get("log_level")
    entry = {
        "time": None if time is None else datetime.fromtimestamp(time, UTC).isoformat(timespec="microseconds"),
        "level": None if level is None else level.name,
        "namespace": event.get("log_namespace"),
        "message": message,
    }
    if failure is not None:
        entry["traceback"] = failure.getTraceback()
    if event.get("log_namespace") == NAMESPACE:
        entry.update((name, event.get(name)) for name in FIELDS)
    # ASCII, because any stream can encode it. Values that JSON lacks are written as their repr().
    return json.dumps(entry, default=repr) + "\n"
