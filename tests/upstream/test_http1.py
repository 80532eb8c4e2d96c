"""Tests for the client side of HTTP/1.1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.upstream.http1 import body_reader_for, parse_response_head, render_request_head, should_keep_alive


def test_render_request_head() -> None:
    assert (
        render_request_head("GET", "/v2/?a=b", [("Host", "h"), ("X", "ä")])
        == b"GET /v2/?a=b HTTP/1.1\r\nHost: h\r\nX: \xe4\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "target", "fields"),
    [
        ("GET /", "/", []),
        ("", "/", []),
        ("GET", "v2", []),
        ("GET", "/ x", []),
        ("GET", "/\r\n", []),
        ("GET", "/#f", []),
        ("GET", "/ä", []),
        ("GET", "/", [("A b", "")]),
        ("GET", "/", [("A", "x\r\nB: y")]),
        ("GET", "/", [("A", "x\0")]),
        ("GET", "/", [("A", "secret €")]),
    ],
)
def test_invalid_request_is_refused(method: str, target: str, fields: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError) as caught:
        render_request_head(method, target, fields)
    assert "secret" not in str(caught.value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z-]{1,8}", fullmatch=True), st.text(st.characters(max_codepoint=255)), max_size=5
    )
)
def test_fields_round_trip_or_are_refused(fields: dict[str, str]) -> None:
    try:
        raw = render_request_head("GET", "/", fields.items())
    except ValueError:
        return
    lines = raw.partition(b"\r\n")[2].removesuffix(b"\r\n\r\n").removesuffix(b"\r\n")
    head = parse_response_head(b"HTTP/1.1 200 OK" + (b"\r\n" + lines if lines else b""))
    assert list(head.headers) == [(name, value.strip(" \t")) for name, value in fields.items()]


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    try:
        head = parse_response_head(b"HTTP/1.1 200 OK\r\n" + raw)
    except ValueError:
        return
    assert all("\r" not in value and "\n" not in value and "\0" not in value for _, value in head.headers)


@pytest.mark.parametrize(
    ("method", "head", "content", "done"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 3", b"", True),
        ("GET", b"HTTP/1.1 204 No", b"", True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3", b"", True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0", b"", True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 3", b"abc", True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 9", b"abcdef", False),
        ("GET", b"HTTP/1.1 200", b"abcdef", False),
    ],
)
def test_body_reader_depends_on_the_framing(method: str, head: bytes, content: bytes, done: bool) -> None:
    body = body_reader_for(method, parse_response_head(head))
    pieces = [] if body.done else body.feed(b"abcdef")
    assert (b"".join(pieces), body.done) == (content, done)
    assert body.rest == (b"def" if content == b"abc" else b"")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 200 OK", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive", False),
        (b"HTTP/1.1 200 OK\r\nConnection: CLOSE", False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: x, close", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", False),
    ],
)
def test_should_keep_alive(head: bytes, expected: bool) -> None:
    assert should_keep_alive(parse_response_head(head)) is expected
