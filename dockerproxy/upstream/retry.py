"""The Retry-After field of upstream responses. Pure."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime

from dockerproxy.http.headers import Headers

MAX_RETRY_AFTER = 3600.0  # seconds; longer waits are shortened to this


def parse_retry_after(headers: Headers, now: float) -> float | None:
    """Return the wait in seconds that a Retry-After field (RFC 9110, section 10.2.3) requests, from 0 to an hour.

    `now` is Unix time, because the field may contain a date. Return None if the field is missing or malformed.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:10]), MAX_RETRY_AFTER))
    try:
        date = parsedate_to_datetime(value[:64])
        # A date without a time zone is GMT, the only zone in HTTP.
        seconds = date.timestamp() if date.tzinfo else date.replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):  # a time zone may have any number of digits
        return None
    return min(max(seconds - now, 0.0), MAX_RETRY_AFTER)
