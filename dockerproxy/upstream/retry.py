"""When to try again. Pure: whoever waits brings clock and chance."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime

from attrs import frozen

from dockerproxy.http.headers import Headers

LONGEST_WAIT = 3600.0  # seconds; an upstream that asks for more is asked again after this


@frozen
class Backoff:
    """A schedule of growing delays: `first` seconds, each `factor` times the one before, `longest` at most."""

    attempts: int = 6  # the first one included
    first: float = 0.25
    factor: float = 2.0
    longest: float = 10.0

    def delay(self, failures: int, chance: float = 1.0) -> float | None:
        """Return the seconds to wait after so many failures in a row (1 and more), None where it is time to give up.

        `chance`, from 0 to 1, spreads those who fail together: half of the delay is sure, the rest is a matter of it.
        """
        if failures >= self.attempts:
            return None
        return float(min(self.first * self.factor ** (failures - 1), self.longest)) * (0.5 + chance / 2)


def retry_after(headers: Headers, now: float) -> float | None:
    """Return the seconds that a Retry-After field (RFC 9110, section 10.2.3) asks to wait, from 0 to an hour.

    `now` is Unix time, for the form that is a date. None where there is no such field or it cannot be read.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:10]), LONGEST_WAIT))
    try:
        moment = parsedate_to_datetime(value[:64])
    except ValueError:
        return None
    # A date without a zone is meant as GMT, the one that HTTP knows.
    seconds = moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()
    return min(max(seconds - now, 0.0), LONGEST_WAIT)
