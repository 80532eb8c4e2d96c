"""HTTP/1.1 as a client sees it (RFC 9112), without I/O: request heads written, response heads and bodies read.

Requests, which strangers send us, are parsed in `dockerproxy.http.message`; this is the other direction. It is as
strict: what two readers could read in two ways is refused. Errors are `ValueError`s with a phrase that goes behind the
server's name and never repeats what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import ChunkedDecoder

MAX_HEAD = 64 * 1024  # Go's client takes 10 MiB, curl 300 KiB, nginx 4 to 8 KiB; signed redirects reach some 4 KiB

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(r"/[!\"$-~]*")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_BODYLESS_STATUSES = frozenset({204, 304})


@frozen(slots=True)
class ResponseHead:
    """A status line and its fields; `version` is the minor version of HTTP/1."""

    status: int
    version: int
    headers: Headers


def render_request_head(method: str, target: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return a request's head; raise ValueError for what cannot stand there, without repeating it."""
    if not _TOKEN.fullmatch(method):
        raise ValueError("a method has to be a token")
    if not _TARGET.fullmatch(target):
        raise ValueError("a target has to be a path of visible ASCII")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in fields:
        if not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
            raise ValueError("a header field's name is no token, or its value holds control characters")
        lines.append(f"{name}: {value}")
    try:
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("a header field's value is not Latin-1") from None


def parse_response_head(raw: bytes) -> ResponseHead:
    """Return the head in `raw` (all before the empty line), or raise ValueError."""
    first, *lines = raw.decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise ValueError("what it sent is not an HTTP answer")
    fields = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
            raise ValueError("its answer has a malformed header field")
        fields.append((name.lower(), value.strip(" \t")))
    return ResponseHead(int(status[2]), int(status[1]), Headers.from_lowercase(fields))


def parse_content_length(headers: Headers) -> int | None:
    """Return what Content-Length says; None where there is none. Raise ValueError where it is no one number."""
    values = {value.strip(" \t") for field in headers.all("content-length") for value in field.split(",")}
    if not values:
        return None
    [first, *others] = values
    if others or not _CONTENT_LENGTH.fullmatch(first):  # RFC 9112, section 6.3: repetitions of one number are a number
        raise ValueError("its answer has no one Content-Length")
    return int(first)


def should_keep_alive(head: ResponseHead) -> bool:
    """Whether the server lets the connection be used again. HTTP/1.0's keep-alive is left alone: nobody needs it."""
    tokens = {token.strip(" \t").lower() for field in head.headers.all("connection") for token in field.split(",")}
    # RFC 9112, section 6.1: after an answer with both framings the connection is not to be trusted.
    ambiguous = "transfer-encoding" in head.headers and "content-length" in head.headers
    return head.version == 1 and "close" not in tokens and not ambiguous


class BodyReader:
    """Takes the bytes behind a head and gives the content in them; this one lasts until the connection ends."""

    done = False
    rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of content in `data`, none empty; raise ValueError for what breaks the framing.

        Once `done` nothing may be fed; `rest` is what came behind the end.
        """
        return [data]

    def read_eof(self) -> str | None:
        """Say what is missing where the connection has ended now; None where that is a proper end."""
        return None


class ContentLengthReader(BodyReader):
    """A body of so many bytes."""

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
    """A body in the chunked coding."""

    def __init__(self) -> None:
        self._decoder = ChunkedDecoder()

    def feed(self, data: bytes) -> list[bytes]:
        try:
            pieces = self._decoder.feed(data)
        except BadRequest as error:
            raise ValueError(f"broke the framing of its answer: {error.message}") from None
        self.done, self.rest = self._decoder.done, self._decoder.unused_data
        return pieces

    def read_eof(self) -> str | None:
        return None if self.done else "closed the connection before the last chunk"


def body_reader_for(method: str, head: ResponseHead) -> BodyReader:
    """Return the body that follows `head` (RFC 9112, section 6.3), or raise ValueError."""
    if method == "HEAD" or head.status in _BODYLESS_STATUSES:
        return ContentLengthReader(0)
    codings = head.headers.all("transfer-encoding")
    if codings:
        if head.version == 0 or [coding.lower() for coding in codings] != ["chunked"]:
            raise ValueError("its answer has a Transfer-Encoding other than chunked")
        return ChunkedReader()
    length = parse_content_length(head.headers)
    return BodyReader() if length is None else ContentLengthReader(length)
