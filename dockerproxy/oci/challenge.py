"""Challenges (WWW-Authenticate).

RFC 9110, section 11.6.1, warns that one field may contain several challenges, and that commas separate both challenges
and parameters. The Bearer challenge of a registry has commas within quotes too (``scope="repository:a:pull,push"``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from attrs import evolve, field, frozen

from dockerproxy.oci.lists import TOKEN, elements

_QUOTED = r'"((?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+)"'
_PARAMETER = re.compile(rf"({TOKEN})[ \t]*=[ \t]*(?:({TOKEN})|{_QUOTED})")
_SCHEME = re.compile(rf"({TOKEN})(?:[ \t]+(.+))?", re.DOTALL)
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_QUOTABLE = re.compile(r"[\t -~\x80-\xff]*")

_MAX_CHALLENGES = 16
_MAX_PARAMETERS = 32


@frozen
class Challenge:
    """One challenge. `scheme` and the names of `parameters` are lower-case. Negotiate and NTLM have a `token68` instead
    of parameters."""

    scheme: str
    parameters: Mapping[str, str] = field(factory=dict)
    token68: str = ""

    def with_parameter(self, name: str, value: str) -> Challenge:
        """Return this challenge with parameter `name` set to `value`."""
        return evolve(self, parameters={**self.parameters, name.lower(): value})

    def render(self) -> str:
        """Return the challenge as a field value. Raise ValueError if a quoted string cannot represent a parameter."""
        # Some clients compare the scheme case-sensitively, contrary to RFC 9110; the registered names are capitalized.
        parts = [f"{name}={_quote(value)}" for name, value in self.parameters.items()]
        return f"{self.scheme.capitalize()} {','.join(parts) or self.token68}".rstrip(" ")


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all WWW-Authenticate fields, in order. Unreadable challenges are skipped."""
    challenges: list[Challenge] = []
    for value in values:
        challenges += _parse_field(value)
    return challenges[:_MAX_CHALLENGES]


def _parse_field(value: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    # Parameters of the current challenge; None if that challenge is unreadable.
    current: dict[str, str] | None = None
    for element in elements(value):
        if parameter := _PARAMETER.fullmatch(element):
            _add_parameter(current, parameter)
        elif match := _SCHEME.fullmatch(element):
            current = None
            scheme, rest = match[1].lower(), match[2] or ""
            parameter = _PARAMETER.fullmatch(rest)
            if parameter is not None or not rest:
                current = {}
                _add_parameter(current, parameter)
                challenges.append(Challenge(scheme, current))
            elif _TOKEN68.fullmatch(rest):
                challenges.append(Challenge(scheme, token68=rest))
    return challenges


def _add_parameter(parameters: dict[str, str] | None, match: re.Match[str] | None) -> None:
    """Add a parameter. If it is given twice, which RFC 9110 forbids, the first one counts."""
    if parameters is not None and match is not None and len(parameters) < _MAX_PARAMETERS:
        value = match[2] if match[3] is None else re.sub(r"\\(.)", r"\1", match[3])
        parameters.setdefault(match[1].lower(), value)


def _quote(value: str) -> str:
    if not _QUOTABLE.fullmatch(value):
        raise ValueError("a challenge parameter must not contain control characters")
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
