"""HTTP heads and chunked bodies: input of real clients, and smuggling attempts that the parser must refuse."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dockerproxy.errors import BadRequest, NameInvalid
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import (
    MAX_HEAD,
    ChunkedDecoder,
    RequestHead,
    absolute_form,
    authority_form,
    body_framing,
    expects_continue,
    keeps_alive,
    origin_form,
    parse_head,
    reason_phrase,
    render_head,
)
from dockerproxy.oci.names import Host

DIGEST = "sha256:" + "0a" * 32


def head(*lines: str, method: str = "GET", target: str = "/v2/", version: str = "1.1", host: bool = True) -> bytes:
    start = [f"{method} {target} HTTP/{version}", *(["Host: a"] if host else [])]
    return "\r\n".join([*start, *lines]).encode("latin-1")


def test_docker_request_head_is_parsed() -> None:
    raw = head(
        "User-Agent: docker/27.3.1 go/go1.22.7 os/linux arch/amd64 UpstreamClient(Docker-Client/27.3.1 \\(linux\\))",
        "Accept: application/json",
        "Accept:application/vnd.oci.image.index.v1+json\t",
        "Authorization: Bearer e30.e30",
        "X-Empty:",
        "X-Latin: caf\xe9\t!",
        target=f"/v2/library/ubuntu/blobs/{DIGEST}?ns=docker.io",
    )
    parsed = parse_head(raw)
    assert (parsed.method, parsed.version) == ("GET", (1, 1))
    assert parsed.target == f"/v2/library/ubuntu/blobs/{DIGEST}?ns=docker.io"
    assert next(iter(parsed.headers)) == ("host", "a")
    assert parsed.headers.all("accept") == ["application/json", "application/vnd.oci.image.index.v1+json"]
    assert parsed.headers.get("authorization") == "Bearer e30.e30"
    assert parsed.headers.get("x-empty") == ""
    assert parsed.headers.get("x-latin") == "caf\xe9\t!"


tokens = st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", fullmatch=True)
field_names = tokens.filter(lambda name: name.lower() not in ("host", "content-length", "transfer-encoding"))
field_values = st.text(
    st.sampled_from([chr(code) for code in range(256) if code == 9 or 32 <= code != 127]), max_size=20
)
field_values = field_values.map(lambda value: value.strip(" \t"))
targets = st.from_regex(r"/[!\"$-~]{0,20}", fullmatch=True)


@given(
    tokens,
    targets,
    st.sampled_from([(1, 0), (1, 1)]),
    st.lists(st.tuples(field_names, field_values), max_size=10),
    st.text(" \t"),
)
def test_heads_round_trip(
    method: str, target: str, version: tuple[int, int], fields: list[tuple[str, str]], space: str
) -> None:
    lines = [f"{name}:{space}{value}{space}" for name, value in fields]
    raw = head(*lines, method=method, target=target, version=f"{version[0]}.{version[1]}")
    assert parse_head(raw) == RequestHead(method, target, version, Headers([("host", "a"), *fields]))


START = b"POST /v2/ HTTP/1.1\r\nHost: a\r\n"

REFUSED_HEADS = {
    # Lines
    "bare LF between fields": START + b"A: b\nC: d",
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: a",
    "bare CR in a value": START + b"A: b\rC: d",
    "CR CR LF": START + b"A: b\r\r\nC: d",
    "CR at the end": START + b"A: b\r",
    "LF at the end": START + b"A: b\n",
    "LF CR": START + b"A: b\n\rC: d",
    "NUL in a value": START + b"A: b\0c",
    "NUL in a name": START + b"A\0: b",
    "escape character in a value": START + b"A: \x1b[2J",
    "DEL in a value": START + b"A: \x7f",
    "vertical tab": START + b"A: b\x0bc",
    "obs-fold by a space": START + b"A: b\r\n c",
    "obs-fold by a tab": START + b"A: b\r\n\tc",
    "obs-fold of the first field": b"GET / HTTP/1.1\r\n Host: a\r\nHost: a",
    "empty line in the middle": START + b"A: b\r\n\r\nC: d",
    "empty line at the start": b"\r\n" + START[:-2],
    "empty head": b"",
    # Fields
    "space before the colon": START + b"A : b",
    "tab before the colon": START + b"A\t: b",
    "no colon": START + b"A b",
    "no name": START + b": b",
    "space in a name": START + b"A B: b",
    "quotes in a name": START + b'"A": b',
    "slash in a name": START + b"A/B: b",
    "non-ASCII name": START + b"\xc4: b",
    "too many fields": START + b"\r\n".join(b"A: b" for _ in range(100)),
    "too long": START + b"A: " + b"b" * MAX_HEAD,
    # Request line
    "two words": b"GET /\r\nHost: a",
    "HTTP/0.9": b"GET /",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a",
    "a space at the end": b"GET / HTTP/1.1 \r\nHost: a",
    "a space at the start": b" GET / HTTP/1.1\r\nHost: a",
    "a tab between": b"GET\t/\tHTTP/1.1\r\nHost: a",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: a",
    "a tab in the target": b"GET /a\tb HTTP/1.1\r\nHost: a",
    "a fragment in the target": b"GET /a#b HTTP/1.1\r\nHost: a",
    "non-ASCII target": b"GET /\xe9 HTTP/1.1\r\nHost: a",
    "method is not a token": b"G(T / HTTP/1.1\r\nHost: a",
    "HTTP/2.0": b"PRI * HTTP/2.0",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a",
    "HTTP/1.01": b"GET / HTTP/1.01\r\nHost: a",
    "http/1.1": b"GET / http/1.1\r\nHost: a",
    "HTTP/1": b"GET / HTTP/1\r\nHost: a",
    "a TLS hello": bytes.fromhex("160301020001000001fc0303") + bytes(range(256)),
    # Host
    "no Host": b"GET / HTTP/1.1\r\nA: b",
    "two Hosts": START + b"Host: b",
    "the same Host twice": START + b"host: a",
    "two Hosts in 1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b",
    "two Hosts in CONNECT": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\nHost: b",
    # Framing: CL.CL, CL.TE, TE.CL, TE.TE
    "CL twice, differing": START + b"Content-Length: 5\r\nContent-Length: 6",
    "CL twice": START + b"Content-Length: 5\r\ncontent-length: 5",
    "CL as a list": START + b"Content-Length: 5, 5",
    "CL with a sign": START + b"Content-Length: +5",
    "CL negative": START + b"Content-Length: -5",
    "CL in hex": START + b"Content-Length: 0x5",
    "CL empty": START + b"Content-Length:",
    "CL with an underscore": START + b"Content-Length: 1_0",
    "CL with a fraction": START + b"Content-Length: 5.0",
    "CL with a space in the middle": START + b"Content-Length: 5 5",
    "CL in superscript": START + b"Content-Length: \xb2",
    "CL of 19 digits": START + b"Content-Length: " + b"1" * 19,
    "CL and TE": START + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    "TE and CL": START + b"Transfer-Encoding: chunked\r\nContent-Length: 0",
    "TE twice": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "TE twice, one odd": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    "TE as a list": START + b"Transfer-Encoding: chunked, chunked",
    "TE with gzip": START + b"Transfer-Encoding: gzip, chunked",
    "TE gzip only": START + b"Transfer-Encoding: gzip",
    "TE identity": START + b"Transfer-Encoding: identity",
    "TE xchunked": START + b"Transfer-Encoding: xchunked",
    "TE chunked;a=b": START + b"Transfer-Encoding: chunked;a=b",
    "TE in quotes": START + b'Transfer-Encoding: "chunked"',
    "TE with a vertical tab": START + b"Transfer-Encoding: \x0bchunked",
    "TE empty": START + b"Transfer-Encoding:",
    "TE in 1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked",
    "TE with a space before the colon": START + b"Transfer-Encoding : chunked",
    "TE folded": START + b"Transfer-Encoding:\r\n chunked",
    "TE with a no-break space": START + b"Transfer-Encoding: \xa0chunked",
}


@pytest.mark.parametrize("raw", REFUSED_HEADS.values(), ids=REFUSED_HEADS)
def test_head_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_head(raw)
    assert caught.value.status == 400


def test_limits_are_inclusive() -> None:
    assert parse_head(START + b"\r\n".join(b"A: b" for _ in range(99)))
    raw = START + b"A: "
    assert parse_head(raw + b"b" * (MAX_HEAD - len(raw)))
    assert body_framing(parse_head(START + b"Content-Length: " + b"1" * 18)) == int("1" * 18)


@pytest.mark.parametrize(
    "raw",
    [
        START + b"Authorization: Basic c2VjcmV0\0",
        START + b"Authorization Basic c2VjcmV0",
        b"GET /?sig=c2VjcmV0#x HTTP/1.1",
    ],
)
def test_errors_do_not_quote_the_input(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_head(raw)
    assert "c2VjcmV0" not in str(caught.value)


@given(st.binary())
def test_any_bytes_parse_or_raise_bad_request(raw: bytes) -> None:
    try:
        parse_head(raw)
    except BadRequest:
        pass


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3), st.sampled_from(["cut", "put", "set"]))
def test_accepted_damaged_heads_are_unambiguous(offset: int, damage: bytes, mutation: str) -> None:
    """If a damaged head is accepted, each line is one field, and the head is the same after rendering it again."""
    raw = head("Content-Length: 5", "Accept: a, b", "Connection: close", method="PUT")
    position = offset % len(raw)
    damaged = (
        raw[:position]
        + (b"" if mutation == "cut" else damage)
        + raw[position + (0 if mutation == "put" else len(damage)) :]
    )
    try:
        parsed = parse_head(damaged)
    except BadRequest:
        return
    lines = [f"{name}: {value}" for name, value in parsed.headers]
    version = f"{parsed.version[0]}.{parsed.version[1]}"
    rendered = head(*lines, method=parsed.method, target=parsed.target, version=version, host=False)
    assert parse_head(rendered) == parsed
    assert damaged.count(b"\n") == len(lines)


def test_connect_needs_no_host() -> None:
    parsed = parse_head(head(method="CONNECT", target="quay.io:443", host=False))
    assert authority_form(parsed.target) == Host("quay.io", 443)


def test_http_1_0_needs_no_host() -> None:
    assert parse_head(head(version="1.0", host=False)).version == (1, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], 0),
        (["Content-Length: 0"], 0),
        (["content-length:  0042 "], 42),
        (["Transfer-Encoding: chunked"], None),
        (["Transfer-Encoding: Chunked "], None),
    ],
)
def test_body_framing(lines: list[str], expected: int | None) -> None:
    assert body_framing(parse_head(head(*lines))) == expected


@pytest.mark.parametrize(
    ("version", "lines", "expected"),
    [
        ("1.1", [], True),
        ("1.1", ["Connection: close"], False),
        ("1.1", ["Connection: Upgrade, CLOSE"], False),
        ("1.1", ["Connection: te", "Connection: close"], False),
        ("1.1", ["Connection: closed"], True),
        ("1.0", [], False),
        ("1.0", ["Connection: Keep-Alive"], True),
        ("1.0", ["Connection: keep-alive, close"], False),
    ],
)
def test_keeps_alive(version: str, lines: list[str], expected: bool) -> None:
    assert keeps_alive(parse_head(head(*lines, version=version))) is expected


@pytest.mark.parametrize(
    ("version", "lines", "expected"),
    [
        ("1.1", [], False),
        ("1.1", ["Expect: 100-continue"], True),
        ("1.1", ["Expect: 100-Continue"], True),
        ("1.1", ["Expect: other"], False),
        ("1.0", ["Expect: 100-continue"], False),
    ],
)
def test_expects_continue(version: str, lines: list[str], expected: bool) -> None:
    assert expects_continue(parse_head(head(*lines, version=version))) is expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("quay.io:443", Host("quay.io", 443)),
        ("QUAY.io:5000", Host("quay.io", 5000)),
        ("10.0.0.1:8443", Host("10.0.0.1", 8443)),
        ("[::1]:443", Host("::1", 443)),
    ],
)
def test_authority_form(target: str, expected: Host) -> None:
    assert authority_form(target) == expected


@pytest.mark.parametrize(
    "target",
    [
        "", "quay.io", "[::1]", "::1", "quay.io:", "quay.io:0", "quay.io:65536", "quay.io:https",
        "quay.io:443/", "/", "*",
        ":443", "http://quay.io:443", "a b:443", "u@quay.io:443", "u:pw@quay.io:443", "u:pw@quay.io",
    ],
)  # fmt: skip
def test_invalid_authority_form_is_refused(target: str) -> None:
    with pytest.raises((BadRequest, NameInvalid)) as caught:
        authority_form(target)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://a/b?c=d", ("http", Host("a", 80), "/b?c=d")),
        ("HTTP://A:8080", ("http", Host("a", 8080), "/")),
        ("http://a?b=http://c/", ("http", Host("a", 80), "/?b=http://c/")),
        ("https://[::1]/b", ("https", Host("::1", 443), "/b")),
        ("http://a//b/../c@d", ("http", Host("a", 80), "//b/../c@d")),
    ],
)
def test_absolute_form(target: str, expected: tuple[str, Host, str]) -> None:
    assert absolute_form(target) == expected


@pytest.mark.parametrize(
    "target",
    [
        "", "/", "a", "a:80", "//a/b", "http:/a", "http:///b", "http://?a", "ftp://a/", "file:///etc/passwd",
        "http://u@a/",
        "http://u:pw@a/", "http://a/#b", "http://a#@b/", "http://a\\@b/", "http://a:x/", "http://a b/", "http://a/\n",
        " http://a/", "http://[::1/", "http://a/é",
    ],
)  # fmt: skip
def test_invalid_absolute_form_is_refused(target: str) -> None:
    with pytest.raises((BadRequest, NameInvalid)) as caught:
        absolute_form(target)
    assert "pw" not in str(caught.value)


def test_origin_form() -> None:
    assert origin_form("/v2/?a=b") == "/v2/?a=b"
    for target in ("", "*", "a", "http://a/", "/#a", "/a b", "/a\0", "/\n", "/é"):
        with pytest.raises(BadRequest):
            origin_form(target)


def test_render_head() -> None:
    fields = [("Content-Length", "0"), ("X-Latin", "caf\xe9")]
    assert render_head(200, fields) == b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Latin: caf\xe9\r\n\r\n"
    assert render_head(404, Headers([("A", "b")])) == b"HTTP/1.1 404 Not Found\r\na: b\r\n\r\n"
    assert render_head(599, []) == b"HTTP/1.1 599 \r\n\r\n"
    assert render_head(502, [], reason="no such name") == b"HTTP/1.1 502 no such name\r\n\r\n"
    for reason in ("a\r\nB: c", "a\nb", "a\0"):
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            render_head(502, [], reason=reason)


@given(st.text(max_size=300))
@example("quay.io:443: connection refused")
@example("a\r\nX-Forged: b")
def test_a_reason_phrase_is_one_line_of_bounded_length(sentence: str) -> None:
    phrase = reason_phrase(sentence)
    assert len(phrase) <= 120 and phrase.isascii() and phrase.isprintable()
    assert phrase.endswith(" (docker-registry-proxy)")
    if len(sentence) <= 96 and sentence.isascii() and sentence.isprintable():
        assert phrase == f"{sentence} (docker-registry-proxy)"


def test_a_long_reason_phrase_says_that_it_is_cut() -> None:
    assert reason_phrase("x" * 97) == "x" * 93 + "... (docker-registry-proxy)"


@pytest.mark.parametrize(
    ("status", "field"),
    [
        (200, ("A", "b\r\nC: d")),
        (200, ("A", "b\rc")),
        (200, ("A", "b\nc")),
        (200, ("A", "b\r\n")),
        (200, ("A", "b\0")),
        (200, ("A", "\u20ac")),
        (200, ("A\r\nB", "c")),
        (200, ("A:", "c")),
        (200, ("A ", "c")),
        (200, ("", "c")),
        (99, ("A", "b")),
        (600, ("A", "b")),
    ],
)
def test_render_head_refuses_invalid_input(status: int, field: tuple[str, str]) -> None:
    with pytest.raises(ValueError):
        render_head(status, [field])


@given(st.integers(100, 599), st.lists(st.tuples(field_names, field_values), max_size=10))
def test_rendered_fields_round_trip(status: int, fields: list[tuple[str, str]]) -> None:
    rendered = render_head(status, fields)
    assert rendered.endswith(b"\r\n\r\n")
    line, _, rest = rendered[:-4].partition(b"\r\n")
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert parse_head(b"GET / HTTP/1.0\r\n" + rest if rest else b"GET / HTTP/1.0").headers == Headers(fields)


def decode(parts: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    """Feed `parts` to a new decoder; return content, whether it is done and the unused data, or None if refused."""
    decoder, content = ChunkedDecoder(), b""
    try:
        for number, part in enumerate(parts):
            pieces = decoder.feed(part)
            assert all(pieces)
            content += b"".join(pieces)
            if decoder.done:
                return content, True, decoder.unused_data + b"".join(parts[number + 1 :])
    except BadRequest:
        return None
    assert decoder.unused_data == b""
    return content, False, b""


extensions = st.sampled_from([b"", b";", b";a=b", b'; a="b c"', b";" + b"x" * 500])
trailers = st.sampled_from([b"", b"A: b\r\n", b"A:\r\nB: c\t\xe9\r\n"])


@st.composite
def chunked_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return a chunked body and its content."""
    encoded = content = b""
    for chunk in draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5)):
        size = draw(st.sampled_from([b"%x", b"%X", b"%08x"])) % len(chunk)
        encoded += size + draw(extensions) + b"\r\n" + chunk + b"\r\n"
        content += chunk
    encoded += draw(st.sampled_from([b"0", b"000"])) + draw(extensions) + b"\r\n" + draw(trailers) + b"\r\n"
    return encoded, content


def split_at(raw: bytes, offsets: list[int]) -> list[bytes]:
    ends = sorted(index % (len(raw) + 1) for index in offsets)
    return [raw[start:stop] for start, stop in zip([0, *ends], [*ends, len(raw)], strict=True)]


split_offsets = st.lists(st.integers(0, 2000), max_size=8)


@given(chunked_bodies(), st.binary(max_size=10), split_offsets)
def test_decoding_is_independent_of_splits(body: tuple[bytes, bytes], rest: bytes, offsets: list[int]) -> None:
    encoded, content = body
    raw = encoded + rest
    assert decode([raw]) == (content, True, rest)
    assert decode([raw[index : index + 1] for index in range(len(raw))]) == (content, True, rest)
    assert decode(split_at(raw, offsets)) == (content, True, rest)


@given(
    chunked_bodies(),
    st.integers(0, 2000),
    st.binary(min_size=1, max_size=3),
    st.sampled_from(["cut", "put", "set"]),
    split_offsets,
)
def test_decoding_a_damaged_body_is_independent_of_splits(
    body: tuple[bytes, bytes], offset: int, damage: bytes, mutation: str, offsets: list[int]
) -> None:
    encoded, _ = body
    position = offset % len(encoded)
    raw = (
        encoded[:position]
        + (b"" if mutation == "cut" else damage)
        + encoded[position + (0 if mutation == "put" else len(damage)) :]
    )
    whole = decode([raw])
    assert decode([raw[index : index + 1] for index in range(len(raw))]) == whole
    assert decode(split_at(raw, offsets)) == whole


@given(chunked_bodies(), st.integers(0, 2000))
def test_truncated_body_is_not_done(body: tuple[bytes, bytes], offset: int) -> None:
    encoded, content = body
    result = decode([encoded[: offset % len(encoded)]])
    assert result is not None
    assert content.startswith(result[0])
    assert not result[1]


END = b"0\r\n\r\n"

REFUSED_BODIES = {
    "no size": b"\r\n",
    "sign": b"+5\r\nhello\r\n" + END,
    "minus": b"-5\r\nhello\r\n" + END,
    "0x": b"0x5\r\nhello\r\n" + END,
    "underscore": b"1_0\r\n",
    "space before the size": b" 5\r\nhello\r\n" + END,
    "space after the size": b"5 \r\nhello\r\n" + END,
    "tab after the size": b"5\t\r\nhello\r\n" + END,
    "space before the extension": b"5 ;a\r\nhello\r\n" + END,
    "no hex digit": b"g\r\n",
    "17 digits": b"0" * 16 + b"5\r\nhello\r\n" + END,
    "size ended by LF": b"5\nhello\r\n" + END,
    "size ended by CR": b"5\rhello\r\n" + END,
    "size ended by CR CR LF": b"5\r\r\nhello\r\n" + END,
    "LF in an extension": b"5;a\nb\r\nhello\r\n" + END,
    "CR in an extension": b"5;a\rb\r\nhello\r\n" + END,
    "NUL in an extension": b"5;\0\r\nhello\r\n" + END,
    "extension too long": b"5;" + b"a" * 1024 + b"\r\nhello\r\n" + END,
    "extension without end": b"5;" + b"a" * 1024,
    "chunk longer than its size": b"4\r\nhello\r\n" + END,
    "chunk shorter than its size": b"6\r\nhello\r\n" + END,
    "chunk ended by LF": b"5\r\nhello\n" + END,
    "chunk ended by CR": b"5\r\nhello\r" + END,
    "chunk without an end": b"5\r\nhello" + END,
    "wrong byte after a chunk": b"5\r\nhello!",
    "end with LF": b"0\n\n",
    "end with LF in the trailer": b"0\r\n\n",
    "trailer without colon": b"0\r\nabc\r\n\r\n",
    "trailer folded": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer with a space before the colon": b"0\r\nA : b\r\n\r\n",
    "trailer with NUL": b"0\r\nA: \0\r\n\r\n",
    "trailer ended by LF": b"0\r\nA: b\n\r\n",
    "trailer line too long": b"0\r\nA: " + b"b" * 1024 + b"\r\n\r\n",
    "trailers too long": b"0\r\n" + (b"A: " + b"b" * 500 + b"\r\n") * 20 + b"\r\n",
    "a request instead of the end of a chunk": b"5\r\nhello\r\nGET / HTTP/1.1\r\n",
}


@pytest.mark.parametrize("raw", REFUSED_BODIES.values(), ids=REFUSED_BODIES)
def test_body_is_refused(raw: bytes) -> None:
    assert decode([raw]) is None
    assert decode([raw[index : index + 1] for index in range(len(raw))]) is None


def test_longest_line_is_accepted() -> None:
    raw = b"5;" + b"a" * 1022 + b"\r\nhello\r\n" + END
    assert decode([raw]) == (b"hello", True, b"")
    assert decode([raw[index : index + 1] for index in range(len(raw))]) == (b"hello", True, b"")


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_decoding_any_bytes_is_independent_of_splits(parts: list[bytes]) -> None:
    assert decode(parts) == decode([b"".join(parts)])


def test_content_is_decoded_incrementally() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"ffffffffffffffff\r\nab") == [b"ab"]
    assert decoder.feed(b"cd") == [b"cd"]
    data = bytes(65536)
    assert decoder.feed(data)[0] is data  # not copied
    assert not decoder.done


def test_feed_after_the_end_is_an_error() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(END + b"GET") == []
    assert decoder.done
    assert decoder.unused_data == b"GET"
    with pytest.raises(RuntimeError):
        decoder.feed(b"x")
