"""Requests for another protocol, and the responses that agree to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.headers import Headers
from dockerproxy.http.message import RequestHead, parse_head
from dockerproxy.http.upgrade import requested_protocols, switches_as_requested


def head(*lines: str, version: str = "1.1") -> RequestHead:
    return parse_head("\r\n".join([f"GET /ws HTTP/{version}", "Host: a", *lines]).encode())


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Connection: Upgrade", "Upgrade: websocket"], "websocket"),
        (["connection: keep-alive,\tUPGRADE", "upgrade: WebSocket"], "WebSocket"),
        (["Connection: keep-alive", "Connection: upgrade", "Upgrade: a/1, b", "Upgrade: c"], "a/1, b, c"),
        (["Connection: Upgrade", "Upgrade: h2c, websocket"], "websocket"),
        (["Connection: Upgrade", "Upgrade: SPDY/3.1"], "SPDY/3.1"),
        (["Upgrade: websocket"], None),
        (["Connection: x-upgrade", "Upgrade: websocket"], None),
        (["Connection: Upgrade"], None),
        (["Connection: Upgrade", "Upgrade:"], None),
        (["Connection: Upgrade", "Upgrade: , ,"], None),
        (["Connection: Upgrade", "Upgrade: a b"], None),
        (["Connection: Upgrade", "Upgrade: a/b/c"], None),
        (["Connection: Upgrade, HTTP2-Settings", "Upgrade: H2C"], None),
        (["Connection: Upgrade", "Upgrade: HTTP/2.0, TLS/1.2, h2, http/1.1"], None),
    ],
)
def test_requested_protocols(lines: list[str], expected: str | None) -> None:
    assert requested_protocols(head(*lines)) == expected
    assert requested_protocols(head(*lines, version="1.0")) is None  # RFC 9110, section 7.8


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_what_is_requested_can_be_sent_and_granted(value: str) -> None:
    protocols = requested_protocols(head("Connection: Upgrade", f"Upgrade: {value}"))
    if protocols is not None:
        assert requested_protocols(head("Connection: Upgrade", f"Upgrade: {protocols}")) == protocols
        assert switches_as_requested(protocols, Headers([("Upgrade", protocols)]))
        assert not switches_as_requested(protocols, Headers([("Upgrade", "h2c")]))


@pytest.mark.parametrize(
    ("requested", "switched", "expected"),
    [
        ("websocket", ["WebSocket"], True),
        ("a/1, b", ["b"], True),
        ("a/1", ["a/2"], True),
        ("a, b", ["a", "b"], True),
        ("a", ["a, h2c"], False),
        ("a", ["b"], False),
        ("a", [""], False),
        ("a", [], False),
        (None, ["a"], False),
        (None, [], False),
    ],
)
def test_switches_as_requested(requested: str | None, switched: list[str], expected: bool) -> None:
    assert switches_as_requested(requested, Headers([("Upgrade", value) for value in switched])) is expected
