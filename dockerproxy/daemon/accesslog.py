"""The access log: each request is logged as one line and one structured event.

A line is ``CLIENT METHOD HOST/PATH STATUS SIZE SECONDS CACHE-STATUS USER "USER-AGENT" BECAUSE``.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache

from twisted.logger import LogEvent, LogLevel, globalLogPublisher

NAMESPACE = "dockerproxy.access"

FIELDS = ("client", "method", "host", "path", "status", "size", "seconds", "verdict", "user", "user_agent", "because")
"""Keys of an access event beside `line`. The JSON log writes them under the same names."""

_UNSAFE = re.compile(rb"[^ !#-\[\]-~]")


class AccessLog:
    """Publishes one event of the namespace ``dockerproxy.access`` for each finished request."""

    def record(
        self,
        client: str,
        method: str,
        host: str,
        path: str,
        status: int,
        size: int,
        seconds: float,
        cache_status: str,
        user: str | None = None,
        user_agent: str | None = None,
        because: str = "",
    ) -> None:
        """Log one finished request.

        The query is dropped from `path`, because a signed URL is a credential, and a login from `host`. Characters that
        could forge or split a line are escaped. `size` is the number of body bytes sent to the client. `because` says
        why the request failed or was no hit. It is the last field of the line, so it may have spaces. `user` and
        `user_agent` are escaped as nginx does it, and ``-`` if there is none.
        """
        host, path = host.rpartition("@")[2], path.partition("?")[0]
        if not _is_printable(method + host + path):
            method, host, path = map(_escape_unprintable, (method, host, path))
        line = (
            f"{client} {method or '-'} {host + path or '-'} {status} {size} {seconds:.3f} {cache_status}"
            f" {_user_field(user) if user else '-'} {_user_agent_field(user_agent or '-')}"
        )
        if because:
            because = _escape_unprintable(because, "")
            line = f"{line} {because}"
        # The line and the event are built here, because Twisted's `Logger` and formatting take as long as the rest of a
        # small request.
        event: LogEvent = {
            "log_namespace": NAMESPACE,
            "log_level": LogLevel.info,
            "log_time": time.time(),
            "log_source": None,
            "log_format": "{line}",
            "line": line,
            "client": client,
            "method": method,
            "host": host,
            "path": path,
            "status": status,
            "size": size,
            "seconds": seconds,
            "verdict": cache_status,
            "user": user,
            "user_agent": user_agent,
            "because": because or None,
        }
        globalLogPublisher(event)


# A client sends the same user agent with each request, and quoting it takes ten times as long as finding it here.
@lru_cache(512)
def _user_agent_field(user_agent: str) -> str:
    return f'"{_escape_like_nginx(user_agent.encode("latin-1", "replace"))}"'


@lru_cache(512)
def _user_field(user: str) -> str:
    return _escape_like_nginx(user.encode("utf-8", "surrogatepass")).replace(" ", "\\x20")


def _escape_like_nginx(value: bytes) -> str:
    """Return `value` as nginx logs a variable: quotes, backslashes and all bytes but printable ASCII are ``\\xHH``.

    See ngx_http_log_variable.
    """
    return _UNSAFE.sub(lambda byte: b"\\x%02X" % ord(byte[0]), value).decode("ascii")


def _escape_unprintable(text: str, also: str = " ") -> str:
    """Return `text` with Python's escapes for unprintable characters, and for `also`: a space separates the fields."""
    if _is_printable(text, also):
        return text
    return "".join(c if c.isprintable() and c != also else f"\\x{ord(c):02x}" for c in text)


def _is_printable(text: str, also: str = " ") -> bool:
    return text.isprintable() and not (also and also in text)
