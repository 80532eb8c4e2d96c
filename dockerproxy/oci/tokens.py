"""Responses of token servers, and the scopes of their tokens (distribution, "Token Authentication Specification").

A token server may be anybody's, so nothing in its response is taken for granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from attrs import field, frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Repository, parse_repository
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json

MAX_TOKEN_RESPONSE = 64 * 1024
"""The longest response that is read. It is parsed in the reactor's thread."""

_TOKEN = re.compile(r"[!-~]{1,16384}")  # must fit in a header field; Amazon's and Google's have 2 to 5 KiB
_DEFAULT_LIFETIME = 60.0
_MAX_LIFETIME = 86400.0
_MAX_SCOPES = 8


@frozen
class TokenResponse:
    """The response of a token server.

    It may hold one token under two names, or two; the first in `tokens` is the one to use. `lifetime` is the number of
    seconds until its end. `scope` is what the server says it granted, or None.
    """

    tokens: tuple[str, ...] = field(repr=False)
    lifetime: float
    scope: str | None = None

    @classmethod
    def parse(cls, content: bytes, now: float) -> TokenResponse:
        """Return the response in `content`, received at the Unix time `now`.

        Raise ValueError if it has no token, or one that a header field cannot hold.
        """
        try:
            parsed = parse_json(content, lenient=True)  # clients read it so, and nothing in it is to be verified
        except JSONInvalid:
            raise ValueError("the response is no JSON") from None
        if not isinstance(parsed, dict):
            raise ValueError("the response is no JSON object")
        document = {name.lower(): value for name, value in parsed.items()}  # Go ignores the case of names
        tokens = [token for name in ("token", "access_token") if (token := document.get(name))]
        if not tokens or not all(isinstance(token, str) and _TOKEN.fullmatch(token) for token in tokens):
            raise ValueError("the response has no usable token")
        scope = document.get("scope")
        lifetime = _remaining_lifetime(document, now)
        return cls(tuple(dict.fromkeys(tokens)), lifetime, scope if isinstance(scope, str) else None)


def _remaining_lifetime(document: Mapping[str, Any], now: float) -> float:
    """Return the remaining lifetime of the token, in seconds.

    The lifetime counts from `issued_at`, which may be in the past because a server may return the same token twice. It
    is ignored if the token would be expired or not yet valid, because that means that the clocks differ.
    """
    lifetime = document.get("expires_in")
    if isinstance(lifetime, bool) or not isinstance(lifetime, int | float) or not 0 < lifetime < float("inf"):
        lifetime = _DEFAULT_LIFETIME
    lifetime = float(min(lifetime, _MAX_LIFETIME))  # in this order: an integer of 400 digits is no float
    issued_at = _parse_timestamp(document.get("issued_at"))
    age = 0.0 if issued_at is None else now - issued_at
    return lifetime - age if 0 < age < lifetime else lifetime


def _parse_timestamp(text: object) -> float | None:
    """Convert an RFC 3339 timestamp to Unix time; return None if it is malformed."""
    if not isinstance(text, str):
        return None
    # Go writes nanoseconds, but Python parses at most six digits.
    try:
        date = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text[:64]))
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):  # a time zone can shift a date out of Python's range
        return None


def readable_repositories(scopes: Iterable[str]) -> frozenset[Repository]:
    """Return the repositories that a token with `scopes` may pull from. Each element may hold several, with spaces."""
    names = set()
    for scope in " ".join(scopes).split()[:_MAX_SCOPES]:
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        if kind == "repository" and {"pull", "*"} & set(actions.split(",")):
            try:
                names.add(parse_repository(name))
            except NameInvalid:
                continue
    return frozenset(names)
