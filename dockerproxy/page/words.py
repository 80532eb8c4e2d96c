"""Numbers and times as people read them. Pure."""

from __future__ import annotations

from datetime import datetime

from dockerproxy.terminal import format_size

NOTHING = "—"

_SPANS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_SHOWN_DIGITS = 8


def size(number: float | None) -> str:
    """Return a number of bytes, such as 1.21 GB."""
    return NOTHING if number is None else format_size(number)


def rate(number: float | None) -> str:
    """Return a number of bytes a second, such as 46 MB/s."""
    return NOTHING if number is None else f"{format_size(number)}/s"


def count(number: int | None) -> str:
    """Return a whole number with separators, such as 41,230."""
    return NOTHING if number is None else f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Return a number with the singular or plural of `noun`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def percent(ratio: float | None) -> str:
    """Return a ratio from 0 to 1 in percent, without the sign. It is 100.0 only if nothing is missing."""
    if ratio is None:
        return NOTHING
    shown = f"{100 * ratio:.1f}"
    return "99.9" if shown == "100.0" and ratio < 1 else shown


def span(seconds: float | None) -> str:
    """Return a time in its two largest units, such as 3 h 20 min."""
    if seconds is None:
        return NOTHING
    remaining = max(0, round(seconds))
    parts: list[str] = []
    for unit, length in _SPANS:
        if remaining >= length or (unit == "s" and not parts):
            parts.append(f"{remaining // length} {unit}")
            remaining %= length
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def milliseconds(seconds: float | None) -> str:
    """Return a time in whole milliseconds without the unit."""
    return NOTHING if seconds is None else f"{1000 * seconds:.0f}"


def age(now: float, timestamp: float | None) -> str:
    """Return how long ago `timestamp` was, in its largest unit."""
    if timestamp is None:
        return NOTHING
    seconds = now - timestamp
    if seconds < 10:
        return "just now"
    for noun, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{counted(int(seconds // length), noun)} ago"
    return f"{counted(int(seconds), 'second')} ago"


def days(seconds: float | None) -> str:
    """Return a long time in its largest unit, such as 41 days."""
    return NOTHING if seconds is None else age(seconds, 0).removesuffix(" ago")


def clock(now: float, timestamp: float) -> str:
    """Return a time in the server's time zone: the hour if it is of today, else the date too."""
    then, today = datetime.fromtimestamp(timestamp), datetime.fromtimestamp(now)
    return then.strftime("%H:%M" if then.date() == today.date() else "%Y-%m-%d %H:%M")


def date(timestamp: float) -> str:
    """Return a date in the server's time zone, such as 2026-11-21."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d")


def short_digest(digest: str) -> str:
    """Return the beginning and the end of a digest."""
    algorithm, colon, value = digest.partition(":")
    if not colon or len(value) <= 2 * _SHOWN_DIGITS:
        return digest
    return f"{algorithm}:{value[:_SHOWN_DIGITS]}…{value[-4:]}"


def platform(text: str) -> str:
    """Return a platform without ``linux/``, which nearly all are of."""
    return text.removeprefix("linux/")


def shortened(text: str, limit: int) -> str:
    """Return a stranger's text in at most `limit` characters, in one line of printable ones."""
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
