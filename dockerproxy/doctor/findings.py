"""The results of checks, and the report of all of them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from attrs import frozen

OK, WARN, BAD = "ok", "warn", "bad"

_ORDER = {BAD: 0, WARN: 1, OK: 2}
_OF_REGISTRIES = ("registry", "budget", "login")  # checks whose subject is a registry
_MAX_FINDINGS = 200  # with texts of `_MAX_TEXT`, a report is at most 150 KiB
_MAX_TEXT = 300  # characters of a sentence, or of an advice

Report = dict[str, Any]
"""A report as a JSON value: the worst `level`, the time `at` of the run, its `seconds`, and the `findings`."""


@frozen
class Diagnosis:
    """The result of a `check` of a `subject`: a sentence, and as `advice` what to do about it.

    `is_public` says that anonymous viewers may see it. Then it has no address of a client, no login and no path.
    """

    check: str
    subject: str
    level: str
    sentence: str
    advice: str = ""
    is_public: bool = False

    def render(self) -> dict[str, Any]:
        """Return the finding as a JSON value."""
        return {
            "check": self.check,
            "subject": _cut(self.subject),
            "level": self.level,
            "sentence": _cut(self.sentence),
            "advice": _cut(self.advice),
            "public": self.is_public,
        }


def make_report(findings: Iterable[Diagnosis], at: float, seconds: float) -> Report:
    """Return the report of `findings`, the worst first."""
    ordered = sorted(findings, key=lambda finding: _ORDER[finding.level])
    if len(ordered) > _MAX_FINDINGS:
        left_out = len(ordered) - _MAX_FINDINGS + 1
        ordered = ordered[: _MAX_FINDINGS - 1]
        last = ordered[-1]
        ordered.append(Diagnosis("report", "", last.level, f"{left_out} more findings are left out", is_public=True))
    rendered = [finding.render() for finding in ordered]
    return {"level": _worst(rendered), "at": at, "seconds": round(seconds, 3), "findings": rendered}


def public_report(report: Mapping[str, Any], registries: Collection[str]) -> Report:
    """Return the part of `report` that everybody may see. Only `registries`, which settings name, are named in it."""
    findings = [
        finding
        for finding in report["findings"]
        if finding["public"] and (finding["check"] not in _OF_REGISTRIES or finding["subject"] in registries)
    ]
    return {**report, "level": _worst(findings), "findings": findings}


def _worst(findings: list[dict[str, Any]]) -> str:
    return min((finding["level"] for finding in findings), key=_ORDER.__getitem__, default=OK)


def _cut(text: str) -> str:
    """Return `text` on one line, without what is not printable: a part of it may be a stranger's."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
