"""HTTP/1.1 messages as bytes (RFC 9112): the one parser for all connections that clients make to us.

It is strict on purpose. What two readers of one stream can read in two ways is how requests are smuggled, so whatever
is ambiguous is refused instead of repaired; docker, containerd, podman, skopeo, curl and apt send none of it. No error
repeats what was sent: any part of a malformed head may be a credential.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from attrs import frozen

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Host

MAX_HEAD = 32 * 1024
MAX_FIELDS = 100

_CONTROL_CHARACTERS = bytes(code for code in range(128) if chr(code) != "\t" and (code < 32 or code == 127))
_VERSIONS = {"HTTP/1.1": (1, 1), "HTTP/1.0": (1, 0)}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Visible ASCII but for "#": no form of a target has a fragment (RFC 9112, section 3.2).
_TARGET = re.compile(r"[!\"$-~]+")
# A user and password before the host match nothing here, and so never reach an error that names the host.
_ABSOLUTE_FORM = re.compile(r"(https?)://([^/?@]+)([/?].*)?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")

# Chunked coding. Whitespace before an extension (BWS) is refused: nobody sends it, and readers differ on it.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_MAX_LINE = 1024
_MAX_TRAILERS = 8192


@frozen(slots=True)
class RequestHead:
    """A request line and its fields. `target` is as it came: see `authority_form`, `absolute_form`, `origin_form`."""

    method: str
    target: str
    version: tuple[int, int]
    headers: Headers


def parse_head(raw: bytes) -> RequestHead:
    """Return the request head in `raw` (all before the empty line), its framing checked; raise `BadRequest`."""
    if len(raw) > MAX_HEAD:
        raise BadRequest(f"the request's head is longer than {MAX_HEAD} bytes")
    lines = raw.decode("latin-1").split("\r\n")
    # One look at all bytes: every control character but the tab is half of a line end, or it is refused.
    if len(raw) - len(raw.translate(None, _CONTROL_CHARACTERS)) != 2 * (len(lines) - 1):
        raise BadRequest("the request's head holds a control character, or a CR or LF that stands alone")
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
    """Whether `raw`, which has no end yet, is the beginning of what `parse_head` might accept."""
    controls = len(raw) - len(raw.translate(None, _CONTROL_CHARACTERS))
    line_ends = 2 * raw.count(b"\r\n") + raw.endswith(b"\r")
    return controls == line_ends and (raw in (b"", b"\r") or _TOKEN.match(raw[:1].decode("latin-1")) is not None)


def _request_line(line: str) -> tuple[str, str, tuple[int, int]]:
    parts = line.split(" ")
    if len(parts) != 3:
        raise BadRequest("the request line is not a method, a target and a version with one space between them")
    method, target, version = parts
    if not _TOKEN.fullmatch(method):
        raise BadRequest("the request's method is not a token")
    if not _TARGET.fullmatch(target):
        raise BadRequest("the request's target is empty or holds characters that a target cannot hold")
    if version not in _VERSIONS:
        raise BadRequest("the request's version is neither HTTP/1.1 nor HTTP/1.0")
    return method, target, _VERSIONS[version]


def _describe_field_error(line: str) -> str:
    name, colon, _ = line.partition(":")
    if line.startswith((" ", "\t")):
        return "a header field is folded onto a second line"
    if not colon:
        return "a line among the header fields has no colon"
    if not name:
        return "a header field has no name"
    if name.endswith((" ", "\t")):
        return "a header field has whitespace before its colon"
    return "a header field's name is not a token"


def _check_host(method: str, version: tuple[int, int], headers: Headers) -> None:
    """RFC 9112, section 3.2. A CONNECT without Host is let pass: its target says it all."""
    hosts = headers.all("host")
    if len(hosts) > 1:
        raise BadRequest("the request has several Host fields")
    if not hosts and version == (1, 1) and method != "CONNECT":
        raise BadRequest("the request has no Host field")


def _check_framing(version: tuple[int, int], headers: Headers) -> None:
    """RFC 9112, section 6.3, refusing wherever it leaves a choice."""
    lengths, codings = headers.all("content-length"), headers.all("transfer-encoding")
    if codings:
        if lengths:
            raise BadRequest("the request has both Content-Length and Transfer-Encoding")
        if version == (1, 0):
            raise BadRequest("the request has a Transfer-Encoding, which HTTP/1.0 does not know")
        if len(codings) > 1 or codings[0].lower() != "chunked":
            raise BadRequest("the request has a Transfer-Encoding other than chunked")
    elif lengths:
        if len(lengths) > 1:
            raise BadRequest("the request has several Content-Length fields")
        if not _CONTENT_LENGTH.fullmatch(lengths[0]):
            raise BadRequest("the request's Content-Length is not a number")


def body_framing(head: RequestHead) -> int | None:
    """Return the body's length in bytes (0 where there is none), or None for a chunked one."""
    if "transfer-encoding" in head.headers:
        return None
    return int(head.headers.get("content-length") or 0)


def keeps_alive(head: RequestHead) -> bool:
    """Whether the client means to use the connection further (RFC 9112, section 9.3)."""
    tokens = {token.strip(" \t").lower() for value in head.headers.all("connection") for token in value.split(",")}
    return "close" not in tokens and (head.version == (1, 1) or "keep-alive" in tokens)


def expects_continue(head: RequestHead) -> bool:
    """Whether the client waits for a 100 before it sends the body; HTTP/1.0's word is not heard (RFC 9110, 10.1.1)."""
    return head.version == (1, 1) and (head.headers.get("expect") or "").lower() == "100-continue"


def authority_form(target: str) -> Host:
    """Return the host of a CONNECT's target (RFC 9112, section 3.2.3), its port written out; raise `BadRequest` or
    `NameInvalid`."""
    if "@" in target or ":" not in target.rpartition("]")[2]:
        raise BadRequest("the target of a CONNECT has to be a host and a port")
    return Host.parse(target)


def absolute_form(target: str) -> tuple[str, Host, str]:
    """Return scheme (``http`` or ``https``), host and origin-form of what a client asks a proxy for (RFC 9112, section
    3.2.2); raise `BadRequest` or `NameInvalid`."""
    match = _ABSOLUTE_FORM.fullmatch(target) if _TARGET.fullmatch(target) else None
    if match is None:
        raise BadRequest("the target is not the URL of an http or https resource")
    scheme, path_and_query = match[1].lower(), match[3] or "/"
    return (
        scheme,
        Host.parse(match[2], _DEFAULT_PORTS[scheme]),
        path_and_query if path_and_query.startswith("/") else f"/{path_and_query}",
    )


def origin_form(target: str) -> str:
    """Return `target` where it is a path and query (RFC 9112, section 3.2.1), or raise `BadRequest`."""
    if not target.startswith("/") or not _TARGET.fullmatch(target):
        raise BadRequest("the target is not a path")
    return target


def render_head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the head of a response, the empty line included.

    Raise ValueError for a status outside 100 to 599, a name that is no token, and a value that holds CR, LF or NUL or
    is not Latin-1.
    """
    lines = [_status_line(status)]
    for name, value in fields:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header field's name is not a token")
        lines.append(f"{name}: {value}")
    head = "\r\n".join(lines)
    if head.count("\r") != len(lines) - 1 or head.count("\n") != len(lines) - 1 or "\0" in head:
        raise ValueError("a header field's value holds CR, LF or NUL")
    return f"{head}\r\n\r\n".encode("latin-1")


def _status_line(status: int) -> str:
    if not 100 <= status <= 599:
        raise ValueError(f"{status} is not an HTTP status")
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""  # RFC 9112, section 4: the space stays, the phrase may be empty
    return f"HTTP/1.1 {status} {phrase}"


class ChunkedDecoder:
    """Takes the bytes of a chunked body (RFC 9112, section 7.1) as they come and gives the content in them.

    What waits here between two calls is part of one line, at most `_MAX_LINE` bytes. How the bytes are cut makes no
    difference to the content, to where it ends, or to whether it is refused.
    """

    __slots__ = ("_chunk_remaining", "_pending", "_state", "_trailers_size", "_unused_data")

    def __init__(self) -> None:
        self._state = "size"  # then "data" and "end" by turns with it; last "trailers" and "done"
        self._chunk_remaining = 0
        self._trailers_size = 0
        self._pending = b""
        self._unused_data = b""

    @property
    def done(self) -> bool:
        """Whether the body is complete, its trailers included."""
        return self._state == "done"

    @property
    def unused_data(self) -> bytes:
        """What came behind the body; empty until `done`."""
        return self._unused_data

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of content in `data`, none of them empty; raise `BadRequest` for what is no chunked coding.

        A decoder that is `done` takes nothing more (RuntimeError); one that refused is of no further use.
        """
        if self.done:
            raise RuntimeError("the body has ended")
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
            if self._state == "end" and not b"\r\n".startswith(data[position : position + 2]):
                raise BadRequest("a chunk is longer than its size says")
            line = _read_line(data, position)
            if line is None:
                self._pending = data[position:]
                return pieces
            position += len(line) + 2
            self._parse_line(line)
        self._unused_data = data[position:]
        return pieces

    def _parse_line(self, line: bytes) -> None:
        if self._state == "size":
            self._parse_chunk_size(line)
        elif self._state == "end":
            self._state = "size"
        elif line:
            self._trailers_size += len(line)
            if self._trailers_size > _MAX_TRAILERS or not _TRAILER.fullmatch(line):
                raise BadRequest("the trailer of a chunked body is malformed or too long")
        else:
            self._state = "done"

    def _parse_chunk_size(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise BadRequest("the size of a chunk is malformed")
        self._chunk_remaining = int(match[1], 16)
        self._state = "data" if self._chunk_remaining else "trailers"


def _read_line(data: bytes, position: int) -> bytes | None:
    """Return the line that starts at `position`, without its CRLF; None while its end is yet to come."""
    end = data.find(b"\n", position, position + _MAX_LINE + 2)
    if end < 0:
        if len(data) - position > _MAX_LINE + 1:
            raise BadRequest("a line of a chunked body is too long")
        return None
    line = data[position:end]
    if not line.endswith(b"\r"):
        raise BadRequest("a line of a chunked body ends in an LF that stands alone")
    return line[:-1]
