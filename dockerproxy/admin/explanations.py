"""The causes in the log and in the history, in words. Pure."""

from __future__ import annotations

import re

_EVICTED = re.compile(r"evicted (\d{4}-\d\d-\d\d) (\d+)([dhms])")
_MOVED = re.compile(r"moved (\S+) (\S+)")
_UNITS = {"d": "day", "h": "hour", "m": "minute", "s": "second"}

_BY_CAUSE = {
    "new": "it was never here before",
    "unchanged": "{registry} said that the tag has not moved (HEAD, which counts as no pull)",
    "accept": "the tag was not known for the media types that this client accepts",
    "unproven": "{registry} was asked whether this client may have it",
}
_BY_VERDICT = {
    "HIT": "it was here, and the client may have it",
    "JOINED": "another client had begun to download it",
    "REVALIDATED": "{registry} said that it is current",
    "PASS": "it was passed on",
    "-": "it is hosted here",
}


def explain(verdict: str, because: str, registry: str) -> str:
    """Return why a request had the cache status `verdict`, as a clause. `because` is the cause in the log.

    Everything that is no code is the sentence of an error.
    """
    evicted, moved = _EVICTED.fullmatch(because), _MOVED.fullmatch(because)
    if evicted is not None:
        number = int(evicted[2])
        unit = _UNITS[evicted[3]] + ("" if number == 1 else "s")
        return f"it was removed on {evicted[1]} to make room, last used {number} {unit} before"
    if moved is not None:
        return f"the tag moved upstream, from {moved[1]} to {moved[2]}"
    text = _BY_CAUSE.get(because) or (because if because else _BY_VERDICT.get(verdict, ""))
    if text is because and verdict == "STALE":
        text = f"{because}: so it is the last good response"
    return text.replace("{registry}", registry) if text is not because else text
