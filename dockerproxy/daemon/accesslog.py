"""One line in the log for each request."""

from __future__ import annotations

import time

from twisted.logger import LogEvent, LogLevel, globalLogPublisher

NAMESPACE = "dockerproxy.access"

FIELDS = ("client", "method", "host", "path", "status", "size", "seconds", "verdict")
"""What an access event holds as data, under these names, beside its `line`."""


class AccessLog:
    """The log of requests: events of the namespace ``dockerproxy.access``."""

    def record(
        self, client: str, method: str, host: str, path: str, status: int, size: int, seconds: float, cache_status: str
    ) -> None:
        """Log one request that is over.

        `path` loses its query (signed URLs are credentials); characters that could forge or break a line are escaped.
        `size` is the number of body bytes sent to the client.
        """
        method, host, path = (
            _escape_unprintable(method),
            _escape_unprintable(host),
            _escape_unprintable(path.partition("?")[0]),
        )
        # Line and event are made here, once: Twisted's own ways to them take as long as all else that a small request
        # costs.
        event: LogEvent = {
            "log_namespace": NAMESPACE,
            "log_level": LogLevel.info,
            "log_time": time.time(),
            "log_source": None,
            "log_format": "{line}",
            "line": f"{client} {method} {host}{path} {status} {size} {seconds:.3f} {cache_status}",
            "client": client,
            "method": method,
            "host": host,
            "path": path,
            "status": status,
            "size": size,
            "seconds": seconds,
            "verdict": cache_status,
        }
        globalLogPublisher(event)


def _escape_unprintable(text: str) -> str:
    """Return `text` with everything that is not printable, and the space between fields, as Python escapes it."""
    if text.isprintable() and " " not in text:
        return text
    return "".join(c if c.isprintable() and c != " " else f"\\x{ord(c):02x}" for c in text)
