"""When an upstream wants to be asked again. Pure."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime

from dockerproxy.http.headers import Headers

MAX_RETRY_AFTER = 3600.0  # seconds; an upstream that asks for more is asked again after this


def parse_retry_after(headers: Headers, now: float) -> float | None:
    """Return the seconds that a Retry-After field (RFC 9110, section 10.2.3) asks to wait, from 0 to an hour.

    `now` is Unix time, for the form that is a date. None where there is no such field or it cannot be read.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:10]), MAX_RETRY_AFTER))
    try:
        date = parsedate_to_datetime(value[:64])
    except ValueError:
        return None
    # A date without a zone is meant as GMT, the one that HTTP knows.
    seconds = date.timestamp() if date.tzinfo else date.replace(tzinfo=UTC).timestamp()
    return min(max(seconds - now, 0.0), MAX_RETRY_AFTER)
