"""Parser and writer of HTTP/1.1 messages (RFC 9112). All client connections use this one parser.

It is strict on purpose. Request smuggling depends on input that two parsers read differently, so ambiguous input is
refused instead of repaired. docker, containerd, podman, skopeo, curl and apt never send such input. Errors never quote
the input, because any part of a malformed head may be a credential.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from attrs import frozen

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.oci.lists import TOKEN
from dockerproxy.oci.names import Host

SAFE_METHODS = ("GET", "HEAD")
"""The methods that only read (RFC 9110, section 9.2.1), of those that this server has."""

READ_METHODS = (*SAFE_METHODS, "OPTIONS")
"""Those that change nothing (RFC 9110, section 9.2.1) and are passed on. TRACE would return a login."""

MAX_HEAD = 32 * 1024
MAX_FIELDS = 100

_CONTROL_CHARACTERS = bytes(code for code in range(128) if chr(code) != "\t" and (code < 32 or code == 127))
_VERSIONS = {"HTTP/1.1": (1, 1), "HTTP/1.0": (1, 0)}
_TOKEN = re.compile(TOKEN)
_TOKENS = re.compile(rf"{TOKEN}(?:\n{TOKEN})*")
# Visible ASCII except "#": no form of a target has a fragment (RFC 9112, section 3.2).
_TARGET = re.compile(r"[!\"$-~]+")
# A user and password before the host do not match, so they never appear in an error that names the host.
_ABSOLUTE_FORM = re.compile(r"(https?)://([^/?@]+)([/?].*)?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")

_MAX_REASON = 120  # characters
_SERVER_SUFFIX = " (docker-registry-proxy)"

# Chunked coding. Whitespace before an extension (BWS) is refused: no client sends it, and parsers disagree about it.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LENIENT_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[^\n]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_MAX_LINE = 1024
_MAX_TRAILERS = 8192


@frozen(slots=True)
class RequestHead:
    """A request line and its header fields.

    `target` is unparsed; `authority_form`, `absolute_form` and `origin_form` parse it.
    """

    method: str
    target: str
    version: tuple[int, int]
    headers: Headers


def parse_head(raw: bytes) -> RequestHead:
    """Parse `raw`, the bytes before the empty line, and check the body framing; raise `BadRequest` if invalid."""
    if len(raw) > MAX_HEAD:
        raise BadRequest(f"the request head is longer than {MAX_HEAD} bytes")
    lines = raw.decode("latin-1").split("\r\n")
    # One pass over all bytes: the only control characters allowed are tabs and the CR LF pairs that end lines.
    if len(raw) - len(raw.translate(None, _CONTROL_CHARACTERS)) != 2 * (len(lines) - 1):
        raise BadRequest("the request head contains a control character, or a CR or LF outside a CR LF pair")
    if len(lines) > MAX_FIELDS + 1:
        raise BadRequest(f"the request has more than {MAX_FIELDS} header fields")
    method, target, version = _request_line(lines[0])
    fields = []
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise BadRequest(_describe_field_error(line))
        fields.append((name.lower(), value.strip(" \t")))
    headers = Headers.from_lowercase(fields)
    _check_host(method, version, headers)
    _check_framing(version, headers)
    return RequestHead(method, target, version, headers)


def may_become_head(raw: bytes) -> bool:
    """Return whether `raw`, an incomplete head, may be the beginning of a head that `parse_head` accepts."""
    controls = len(raw) - len(raw.translate(None, _CONTROL_CHARACTERS))
    line_ends = 2 * raw.count(b"\r\n") + raw.endswith(b"\r")
    return controls == line_ends and (raw in (b"", b"\r") or _TOKEN.match(raw[:1].decode("latin-1")) is not None)


def _request_line(line: str) -> tuple[str, str, tuple[int, int]]:
    parts = line.split(" ")
    if len(parts) != 3:
        raise BadRequest("the request line is not a method, a target and a version separated by single spaces")
    method, target, version = parts
    if not _TOKEN.fullmatch(method):
        raise BadRequest("the request method contains invalid characters")
    if not _TARGET.fullmatch(target):
        raise BadRequest("the request target is empty or contains invalid characters")
    if version == "HTTP/2.0":  # the preface (RFC 9113, section 3.4) of a client that has not asked for it by ALPN
        raise BadRequest("this server speaks HTTP/1.1, not HTTP/2; NO_PROXY leads gRPC past the proxy")
    if version not in _VERSIONS:
        raise BadRequest("the HTTP version is neither HTTP/1.1 nor HTTP/1.0")
    return method, target, _VERSIONS[version]


def _describe_field_error(line: str) -> str:
    name, colon, _ = line.partition(":")
    if line.startswith((" ", "\t")):
        return "a header field is folded onto a second line (obs-fold), which is not supported"
    if not colon:
        return "a header line has no colon"
    if not name:
        return "a header field has no name"
    if name.endswith((" ", "\t")):
        return "a header field has whitespace before its colon"
    return "a header field name contains invalid characters"


def _check_host(method: str, version: tuple[int, int], headers: Headers) -> None:
    """Check the Host field (RFC 9112, section 3.2). CONNECT may omit it, because its target names the host."""
    hosts = headers.all("host")
    if len(hosts) > 1:
        raise BadRequest("the request has more than one Host field")
    if not hosts and version == (1, 1) and method != "CONNECT":
        raise BadRequest("the request has no Host field")


def _check_framing(version: tuple[int, int], headers: Headers) -> None:
    """Check the fields that delimit the body; refuse cases in which RFC 9112, section 6.3, leaves a choice."""
    lengths, codings = headers.all("content-length"), headers.all("transfer-encoding")
    if codings:
        if lengths:
            raise BadRequest("the request has both Content-Length and Transfer-Encoding")
        if version == (1, 0):
            raise BadRequest("the request has a Transfer-Encoding, which HTTP/1.0 does not define")
        if len(codings) > 1 or codings[0].lower() != "chunked":
            raise BadRequest("the request has a Transfer-Encoding other than chunked")
    elif lengths:
        if len(lengths) > 1:
            raise BadRequest("the request has more than one Content-Length field")
        if not _CONTENT_LENGTH.fullmatch(lengths[0]):
            raise BadRequest("the Content-Length is not a number of at most 18 digits")


def body_framing(head: RequestHead) -> int | None:
    """Return the length of the body in bytes (0 if there is none), or None if it is chunked."""
    if "transfer-encoding" in head.headers:
        return None
    return int(head.headers.get("content-length") or 0)


def keeps_alive(head: RequestHead) -> bool:
    """Return whether the connection persists after this request (RFC 9112, section 9.3)."""
    values = head.headers.all("connection")
    if not values:
        return head.version == (1, 1)
    tokens = {token.strip(" \t").lower() for value in values for token in value.split(",")}
    return "close" not in tokens and (head.version == (1, 1) or "keep-alive" in tokens)


def expects_continue(head: RequestHead) -> bool:
    """Return whether the client waits for a 100 (Continue) before it sends the body.

    The expectation is ignored in HTTP/1.0 (RFC 9110, section 10.1.1).
    """
    return head.version == (1, 1) and (head.headers.get("expect") or "").lower() == "100-continue"


def authority_form(target: str) -> Host:
    """Parse the target of CONNECT (RFC 9112, section 3.2.3), which must include a port.

    Raise `BadRequest` or `NameInvalid`.
    """
    if "@" in target or ":" not in target.rpartition("]")[2]:
        raise BadRequest("the target of CONNECT is not host:port")
    return Host.parse(target)


def absolute_form(target: str) -> tuple[str, Host, str]:
    """Split the target of a request to a proxy (RFC 9112, section 3.2.2).

    Return the scheme (``http`` or ``https``), the host, and the path and query. Raise `BadRequest` or `NameInvalid`.
    """
    match = _ABSOLUTE_FORM.fullmatch(target) if _TARGET.fullmatch(target) else None
    if match is None:
        raise BadRequest("the request target is not an http:// or https:// URL")
    scheme, path_and_query = match[1].lower(), match[3] or "/"
    return (
        scheme,
        Host.parse(match[2], _DEFAULT_PORTS[scheme]),
        path_and_query if path_and_query.startswith("/") else f"/{path_and_query}",
    )


def origin_form(target: str) -> str:
    """Return `target` if it is a path and query (RFC 9112, section 3.2.1), or raise `BadRequest`."""
    if not target.startswith("/") or not _TARGET.fullmatch(target):
        raise BadRequest("the request target is not a path")
    return target


def printable_ascii(text: str) -> str:
    """Return `text` with a question mark for each character that a line of a response head cannot have."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)


def reason_phrase(sentence: str) -> str:
    """Return `sentence` as a reason phrase: at most 120 characters of printable ASCII that end in the server's name.

    docker, containerd, podman and skopeo print the reason phrase of a refused CONNECT and of most other errors, and
    nothing else of the response. It may be any text (RFC 9112, section 4). The name tells a person which server of
    several on the way refused.
    """
    text = printable_ascii(sentence)
    room = _MAX_REASON - len(_SERVER_SUFFIX)
    if len(text) > room:
        text = text[: room - 3].rstrip() + "..."
    return text + _SERVER_SUFFIX


def render_head(
    status: int, fields: Iterable[tuple[str, str]], rendered_fields: str = "", *, reason: str = ""
) -> bytes:
    """Return the head of a response, including the empty line. `rendered_fields` are lines, each with its CR LF.

    `reason` is the reason phrase; the default is the standard one of the status. Raise ValueError if the status is
    outside 100 to 599, if a field name is not a token, or if `reason` or a field value contains CR, LF or NUL or cannot
    be encoded in Latin-1.
    """
    names, lines = [], [_status_line(status, reason)]
    for name, value in fields:
        names.append(name)
        lines.append(f"{name}: {value}")
    # All names at once. One that contains the separator is found below.
    if names and not _TOKENS.fullmatch("\n".join(names)):
        raise ValueError("a header field name is not a token")
    head = "\r\n".join(lines)
    if head.count("\r") != len(lines) - 1 or head.count("\n") != len(lines) - 1 or "\0" in head:
        raise ValueError("a header field value contains CR, LF or NUL")
    return f"{head}\r\n{rendered_fields}\r\n".encode("latin-1")


def _status_line(status: int, reason: str) -> str:
    if not 100 <= status <= 599:
        raise ValueError(f"{status} is not an HTTP status")
    # RFC 9112, section 4: the phrase may be empty, but the space before it is required.
    return f"HTTP/1.1 {status} {reason or _PHRASES.get(status, '')}"


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class ChunkedDecoder:
    """Incremental decoder of the chunked transfer coding (RFC 9112, section 7.1).

    Between calls it buffers part of one line, at most `_MAX_LINE` bytes. The decoded content, its end and any error do
    not depend on how the input is split.

    A `lenient` one accepts what clients accept of servers: lines that end in LF, whitespace behind a size, and trailers
    of any form. That is not for requests, which another server in front of this one may have read differently.
    """

    __slots__ = ("_chunk_remaining", "_lenient", "_pending", "_state", "_trailers_size", "_unused_data")

    def __init__(self, *, lenient: bool = False) -> None:
        self._lenient = lenient
        self._state = "size"  # size, data, end for each chunk; after the last size: trailers, done
        self._chunk_remaining = 0
        self._trailers_size = 0
        self._pending = b""
        self._unused_data = b""

    @property
    def done(self) -> bool:
        """Whether the body, including its trailers, is complete."""
        return self._state == "done"

    @property
    def unused_data(self) -> bytes:
        """The bytes after the end of the body; empty until `done`."""
        return self._unused_data

    def feed(self, data: bytes) -> list[bytes]:
        """Decode `data` and return its content as a list of non-empty pieces.

        Raise `BadRequest` if the coding is invalid, after which the decoder must not be used again. Raise RuntimeError
        if the decoder is `done`.
        """
        if self.done:
            raise RuntimeError("feed() called after the end of the body")
        pieces: list[bytes] = []
        data, position = self._pending + data, 0
        self._pending = b""
        while self._state != "done":
            if self._state == "data":
                piece = data[position : position + self._chunk_remaining]
                if not piece:
                    return pieces
                pieces.append(piece)
                position += len(piece)
                self._chunk_remaining -= len(piece)
                if not self._chunk_remaining:
                    self._state = "end"
                continue
            if self._state == "end" and not self._may_end_chunk(data[position : position + 2]):
                raise BadRequest("a chunk is longer than its declared size")
            end = _find_line_end(data, position)
            if end is None:
                self._pending = data[position:]
                return pieces
            line = data[position:end]
            position = end + 1
            if not self._lenient and not line.endswith(b"\r"):
                raise BadRequest("a line of the chunked body ends in LF without CR")
            self._parse_line(line.removesuffix(b"\r"))
        self._unused_data = data[position:]
        return pieces

    def _may_end_chunk(self, start: bytes) -> bool:
        return b"\r\n".startswith(start) or (self._lenient and start.startswith(b"\n"))

    def _parse_line(self, line: bytes) -> None:
        if self._state == "size":
            self._parse_chunk_size(line)
        elif self._state == "end":
            self._state = "size"
        elif line:
            self._trailers_size += len(line)
            if self._trailers_size > _MAX_TRAILERS or not (self._lenient or _TRAILER.fullmatch(line)):
                raise BadRequest("a trailer field of the chunked body is malformed, or the trailers are too long")
        else:
            self._state = "done"

    def _parse_chunk_size(self, line: bytes) -> None:
        match = (_LENIENT_CHUNK_SIZE if self._lenient else _CHUNK_SIZE).fullmatch(line)
        if match is None:
            raise BadRequest("a chunk size is malformed")
        self._chunk_remaining = int(match[1], 16)
        self._state = "data" if self._chunk_remaining else "trailers"


def _find_line_end(data: bytes, position: int) -> int | None:
    """Return the index of the LF of the line that starts at `position`, or None if the line is incomplete."""
    end = data.find(b"\n", position, position + _MAX_LINE + 2)
    if end >= 0:
        return end
    if len(data) - position > _MAX_LINE + 1:
        raise BadRequest(f"a line of the chunked body is longer than {_MAX_LINE} bytes")
    return None
