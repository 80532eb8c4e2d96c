"""Tests for the logins that belong to a connection."""

from __future__ import annotations

import pytest

from dockerproxy.http.headers import Headers
from dockerproxy.upstream.connection_auth import request_logs_in, response_logs_in


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Basic YTpi", False),
        ("bearer x", False),
        ("BEARER x", False),
        ("Digest username=a", False),
        ("AWS4-HMAC-SHA256 Credential=x", False),
        ("NTLM TlRMTVNTUAAB", True),
        ("ntlm x", True),
        ("Negotiate YII=", True),
        ("NEGOTIATE", True),
        ("Kerberos x", True),
        ("Nego2 x", True),
        ("Unheard-Of x", True),
        ("", True),
    ],
)
def test_requests(value: str, expected: bool) -> None:
    assert request_logs_in(Headers([("Authorization", value)])) is expected


def test_every_field_counts() -> None:
    assert request_logs_in(Headers([("Authorization", "Basic YTpi"), ("Authorization", "NTLM x")]))
    assert not request_logs_in(Headers([("Cookie", "NTLM x")]))


@pytest.mark.parametrize(
    ("status", "fields", "expected"),
    [
        (401, [("WWW-Authenticate", 'Basic realm="x"')], False),
        (401, [("WWW-Authenticate", 'Bearer realm="https://a/token",service="a"')], False),
        (401, [("WWW-Authenticate", "NTLM TlRMTVNTUAAC")], True),
        (401, [("WWW-Authenticate", 'Basic realm="x", Negotiate')], True),
        (401, [("WWW-Authenticate", 'Basic realm="x"'), ("WWW-Authenticate", "Negotiate")], True),
        (407, [("Proxy-Authenticate", "NTLM")], True),
        (401, [], False),
        (200, [("WWW-Authenticate", "NTLM")], False),
    ],
)
def test_responses(status: int, fields: list[tuple[str, str]], expected: bool) -> None:
    assert response_logs_in(status, Headers(fields)) is expected
