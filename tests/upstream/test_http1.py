"""Tests for the client side of HTTP/1.1."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dockerproxy.upstream.http1 import (
    body_reader_for,
    find_head_end,
    parse_response_head,
    render_request_head,
    should_keep_alive,
)


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
    ("lines", "fields"),
    [
        (b"A: b\r\nC: d", [("a", "b"), ("c", "d")]),
        (b"A: b\nC: d", [("a", "b"), ("c", "d")]),
        (b"A: b\r\n c\r\n\td ", [("a", "b c d")]),
        (b"A:\r\n b", [("a", "b")]),
        (b" a: b\r\nC: d", [("c", "d")]),
        (b"A \t: b", [("a", "b")]),
        (b"A b: c\r\n d\r\nE: f", [("e", "f")]),
        (b"A\r\n: b\r\nC: d", [("c", "d")]),
        (b"A: b\0\r\nC: d\r\n e\x01\r\nF: g\rh", [("c", "d")]),
        (b"A: b\r\r\nC: d", [("c", "d")]),
    ],
)
def test_fields_are_read_as_leniently_as_clients_read_them(lines: bytes, fields: list[tuple[str, str]]) -> None:
    """The connection is not reused, because another server before it may have read them differently."""
    head = parse_response_head(b"HTTP/1.1 200 OK\r\n" + lines)
    assert list(head.headers) == fields
    assert head.regular is should_keep_alive(head) is (lines == b"A: b\r\nC: d")


@pytest.mark.parametrize(
    ("line", "status", "version", "regular"),
    [
        (b"HTTP/1.1 200", 200, 1, True),
        (b"HTTP/1.1 200 \xc3\xa9", 200, 1, True),
        (b"HTTP/1.1  404 x", 404, 1, False),
        (b"HTTP/1.2 200 OK", 200, 2, True),
    ],
)
def test_status_lines(line: bytes, status: int, version: int, regular: bool) -> None:
    head = parse_response_head(line)
    assert (head.status, head.version, head.regular) == (status, version, regular)


@pytest.mark.parametrize(
    "line", [b"", b"HTTP/2 200", b"HTTP/1.1 20", b"HTTP/1.1 600 OK", b"HTTP/1.1 2000", b"ICY 200 OK"]
)
def test_other_protocols_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="did not send an HTTP/1 response"):
        parse_response_head(line)


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"a\r\n\r\nb", (1, 5)),
        (b"a\n\nb", (1, 3)),
        (b"a\r\n\nb", (1, 4)),
        (b"a\n\r\nb", (1, 4)),
        (b"a\r\n", None),
        (b"a\n\r", None),
        (b"a\r\r\n", None),
    ],
)
def test_find_head_end(data: bytes, end: tuple[int, int] | None) -> None:
    assert find_head_end(data) == end


@given(st.text(alphabet="a\r\n").map(str.encode), st.integers(0, 20))
@example(b"\r\n\r\n", 3)
def test_the_end_of_a_head_is_found_in_what_follows_what_was_searched(data: bytes, searched: int) -> None:
    if find_head_end(data[:searched]) is None:
        assert find_head_end(data, min(searched, len(data))) == find_head_end(data)


@pytest.mark.parametrize(
    ("fields", "body", "content"),
    [
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: CHUNKED", b"2\r\nab\r\n0\r\n\r\n", b"ab"),
        (b"Transfer-Encoding: identity, chunked", b"2\r\nab\r\n0\r\n\r\n", b"ab"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 1", b"2 ;a\r\nab\r\n0\r\n\r\n", b"ab"),
        (b"Transfer-Encoding: chunked", b"2\nab\n0\n\n", b"ab"),
        (b"Transfer-Encoding: chunked", b"2 \t\r\nab\r\n0;\x01\r\nodd trailer\r\n\r\n", b"ab"),
        (b"Transfer-Encoding: identity\r\nContent-Length: 2", b"ab", b"ab"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 99])
def test_odd_framing(fields: bytes, body: bytes, content: bytes, step: int) -> None:
    reader = body_reader_for("GET", parse_response_head(b"HTTP/1.0 200 OK\r\n" + fields))
    pieces = [piece for start in range(0, len(body), step) for piece in reader.feed(body[start : start + step])]
    assert (b"".join(pieces), reader.done, reader.rest) == (content, True, b"")


@pytest.mark.parametrize("body", [b"2 2\r\n", b"2\r\nabc", b"2\r\nab\rc", b"-2\r\n", b"\r\n", b"2" * 2000])
def test_wrong_chunks_are_refused(body: bytes) -> None:
    reader = body_reader_for("GET", parse_response_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"))
    with pytest.raises(ValueError, match="chunked framing"):
        reader.feed(body)


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
