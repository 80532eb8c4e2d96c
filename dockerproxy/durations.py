"""Durations as the settings and the command write them."""

from __future__ import annotations

import re

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|[smhdw])")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
_PLAIN_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,3})?")


def parse_duration(text: str) -> float:
    """Parse ``90s``, ``10m``, ``1h30m``, ``60d`` or plain seconds. Return seconds. Raise ValueError."""
    if _PLAIN_SECONDS.fullmatch(text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _PART.findall(text))
