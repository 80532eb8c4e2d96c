"""The client side of HTTP/1.1 (RFC 9112), without I/O: renders request heads, parses response heads and bodies.

`dockerproxy.http.message` is the server side. Both are strict: input that two parsers could read differently is
refused. Errors are `ValueError`. The message is a phrase to put after the server's name, and contains no input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import ChunkedDecoder
from dockerproxy.oci.lists import TOKEN

MAX_HEAD = 64 * 1024  # Go's client accepts 10 MiB, curl 300 KiB, nginx 4 to 8 KiB; signed redirects reach about 4 KiB

_TOKEN = re.compile(TOKEN)
_TARGET = re.compile(r"/[!\"$-~]*")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_BODYLESS_STATUSES = frozenset({204, 304})


@frozen(slots=True)
class ResponseHead:
    """A status line and the header fields. `version` is the minor version of HTTP/1."""

    status: int
    version: int
    headers: Headers


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


def parse_response_head(raw: bytes) -> ResponseHead:
    """Parse a response head without its final empty line. Raise ValueError if it is malformed."""
    first, *lines = raw.decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise ValueError("it did not send an HTTP/1 response")
    fields = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
            raise ValueError("its response has a malformed header field")
        fields.append((name.lower(), value.strip(" \t")))
    return ResponseHead(int(status[2]), int(status[1]), Headers.from_lowercase(fields))


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
    tokens = {token.strip(" \t").lower() for field in head.headers.all("connection") for token in field.split(",")}
    # RFC 9112, section 6.1: do not reuse the connection after a response with both framings.
    ambiguous = "transfer-encoding" in head.headers and "content-length" in head.headers
    return head.version == 1 and "close" not in tokens and not ambiguous


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
        self._decoder = ChunkedDecoder()

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
    codings = head.headers.all("transfer-encoding")
    if codings:
        if head.version == 0 or [coding.lower() for coding in codings] != ["chunked"]:
            raise ValueError("its response has a Transfer-Encoding other than chunked")
        return ChunkedReader()
    length = parse_content_length(head.headers)
    return BodyReader() if length is None else ContentLengthReader(length)
