"""The client side of HTTP/1.1 (RFC 9112), without I/O: renders request heads, parses response heads and bodies.

`dockerproxy.http.message` is the server side, and strict: requests that two parsers could read differently are refused.
Responses are read as leniently as Go's and curl's clients do, because a client without this proxy gets them. They are
rendered anew, so that nobody else has to read them. A connection with an irregular response is not reused.

Errors are `ValueError`. The message is a phrase to put after the server's name, and contains no input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import ChunkedDecoder
from dockerproxy.oci.lists import TOKEN

MAX_HEAD = 300 * 1024  # as curl; Go's client accepts 10 MiB, nginx 4 to 8 KiB; signed redirects reach about 4 KiB

_TOKEN = re.compile(TOKEN)
_TARGET = re.compile(r"/[!\"$-~]*")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LINE_END = re.compile(r"\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([0-9])( +)([1-5][0-9][0-9])(?: [^\n]*)?")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
_WHITESPACE = " \t"
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_BODYLESS_STATUSES = frozenset({204, 304})


@frozen(slots=True)
class ResponseHead:
    """A status line and the header fields. `version` is the minor version of HTTP/1.

    `regular` is whether every parser reads the head in the same way.
    """

    status: int
    version: int
    headers: Headers
    regular: bool = True


def render_request_head(method: str, target: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """Render a request head. Raise ValueError, without the value, if a part of it is not allowed there."""
    if not _TOKEN.fullmatch(method):
        raise ValueError("the method is not a token")
    if not _TARGET.fullmatch(target):
        raise ValueError("the target is not a path of visible ASCII")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in fields:
        if not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
            raise ValueError("a header field's name is not a token, or its value contains control characters")
        lines.append(f"{name}: {value}")
    try:
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("a header field's value is not Latin-1") from None


def find_head_end(data: bytes, searched: int = 0) -> tuple[int, int] | None:
    """Return the end of the head at the start of `data`, without and with its empty line. Return None without one.

    A line may end in LF alone (RFC 9112, section 2.2). The first `searched` bytes are known to have no end, but may
    have the beginning of one.
    """
    match = _HEAD_END.search(data, max(searched - len(b"\r\n\r"), 0))
    return None if match is None else match.span()


def parse_response_head(raw: bytes) -> ResponseHead:
    """Parse a response head without its final empty line. Raise ValueError if it is malformed.

    Field lines that cannot be read are left out.
    """
    text = raw.decode("latin-1")
    first, *lines = _LINE_END.split(text)
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise ValueError("it did not send an HTTP/1 response")
    fields, skipped = _parse_fields(lines)
    regular = not skipped and text.count("\n") == text.count("\r\n") and len(status[2]) == 1
    return ResponseHead(int(status[3]), int(status[1]), Headers.from_lowercase(fields), regular)


def _parse_fields(lines: Iterable[str]) -> tuple[list[tuple[str, str]], bool]:
    """Return the fields with names in lower case, and whether a line was irregular.

    Each line that continues the one before it is replaced with a space (RFC 9112, section 5.2), and whitespace behind a
    name is removed (section 5.1).
    """
    fields: list[tuple[str, str]] = []
    irregular, was_read = False, False
    for line in lines:
        if line.startswith((" ", "\t")):
            irregular = True
            if was_read and not _CONTROLS.search(line):
                name, value = fields.pop()
                fields.append((name, f"{value} {line.strip(_WHITESPACE)}".strip(_WHITESPACE)))
            continue
        name, colon, value = line.partition(":")
        token = name.rstrip(_WHITESPACE)
        was_read = bool(colon) and _TOKEN.fullmatch(token) is not None and not _CONTROLS.search(value)
        irregular = irregular or not was_read or token != name
        if was_read:
            fields.append((token.lower(), value.strip(_WHITESPACE)))
    return fields, irregular


def transfer_codings(headers: Headers) -> set[str]:
    """Return the names of the transfer codings of a body, in lower case."""
    return _list_members(headers, "transfer-encoding") - {"", "identity"}  # which RFC 7230 removed


def _list_members(headers: Headers, name: str) -> set[str]:
    return {member.strip(_WHITESPACE).lower() for field in headers.all(name) for member in field.split(",")}


def parse_content_length(headers: Headers) -> int | None:
    """Return the Content-Length, or None without one. Raise ValueError if it is not a single number."""
    values = {value.strip(" \t") for field in headers.all("content-length") for value in field.split(",")}
    if not values:
        return None
    [first, *others] = values
    if others or not _CONTENT_LENGTH.fullmatch(first):  # RFC 9112, section 6.3: equal repetitions are valid
        raise ValueError("its response has an invalid or ambiguous Content-Length")
    return int(first)


def should_keep_alive(head: ResponseHead) -> bool:
    """Return whether the connection can be reused. HTTP/1.0 keep-alive is ignored, because no registry needs it."""
    options = _list_members(head.headers, "connection")
    # RFC 9112, section 6.1: do not reuse the connection after a response with both framings.
    ambiguous = "transfer-encoding" in head.headers and "content-length" in head.headers
    return head.version >= 1 and "close" not in options and not ambiguous and head.regular


class BodyReader:
    """Extracts the content from the bytes after a head. This base class reads until the connection ends."""

    done = False
    rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of content in `data`, without empty ones. Raise ValueError if the framing is invalid.

        Do not call this once `done` is true. `rest` contains the bytes after the end of the body.
        """
        return [data]

    def read_eof(self) -> str | None:
        """Describe the missing data, given that the connection has ended. Return None if the body is complete."""
        return None


class ContentLengthReader(BodyReader):
    """Reads a body of a known length."""

    def __init__(self, length: int) -> None:
        self._length = self._remaining = length
        self.done = length == 0

    def feed(self, data: bytes) -> list[bytes]:
        if len(data) > self._remaining:
            self.rest = data[self._remaining :]
            data = data[: self._remaining]
        self._remaining -= len(data)
        self.done = self._remaining == 0
        return [data] if data else []

    def read_eof(self) -> str | None:
        received = self._length - self._remaining
        return f"closed the connection after {received} of {self._length} bytes" if self._remaining else None


class ChunkedReader(BodyReader):
    """Reads a body in the chunked transfer coding."""

    def __init__(self) -> None:
        self._decoder = ChunkedDecoder(lenient=True)

    def feed(self, data: bytes) -> list[bytes]:
        try:
            pieces = self._decoder.feed(data)
        except BadRequest as error:
            raise ValueError(f"its response has invalid chunked framing: {error.message}") from None
        self.done, self.rest = self._decoder.done, self._decoder.unused_data
        return pieces

    def read_eof(self) -> str | None:
        return None if self.done else "closed the connection before the last chunk"


def body_reader_for(method: str, head: ResponseHead) -> BodyReader:
    """Return a reader for the body after `head` (RFC 9112, section 6.3). Raise ValueError if the framing is invalid."""
    if method == "HEAD" or head.status in _BODYLESS_STATUSES:
        return ContentLengthReader(0)
    codings = transfer_codings(head.headers)
    if codings == {"chunked"}:
        return ChunkedReader()
    if codings:
        raise ValueError("its response has a Transfer-Encoding other than chunked")
    length = parse_content_length(head.headers)
    return BodyReader() if length is None else ContentLengthReader(length)
