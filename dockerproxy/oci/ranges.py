"""Byte ranges (RFC 9110, section 14): what a client asks for, and what an upstream says it sends."""

from __future__ import annotations

import re

from attrs import frozen

from dockerproxy.errors import RangeInvalid

# Nineteen digits hold every 64-bit size; a longer number is nobody's honest position.
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.IGNORECASE)


@frozen(slots=True)
class ByteRange:
    """The bytes from `start` on and before `stop`."""

    start: int
    stop: int


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the span that a Range field selects of a content of `size` bytes, None for the whole of it.

    A field that is absent, in another unit, malformed or asks for several ranges selects the whole (RFC 9110, section
    14.2 lets a server ignore it, and lazy pullers accept that). So does any range of an empty content: no
    Content-Range could describe the answer, and containerd asks for ``bytes=0-`` of everything. A range that begins
    behind the content's end or its own raises `RangeInvalid`: section 14.2 lets a server reject the latter too, and
    the conformance suite of the distribution-spec wants that.
    """
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None or size == 0 or not (match[1] or match[2]):
        return None
    first, last = match[1], match[2]
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise RangeInvalid(f"the content has {size} bytes", headers=[("Content-Range", f"bytes */{size}")])
    return ByteRange(start, stop)


def content_range(byte_range: ByteRange, size: int) -> str:
    """Return the Content-Range value of a 206 that carries `span` (not empty) of `size` bytes."""
    return f"bytes {byte_range.start}-{byte_range.stop - 1}/{size}"


def parse_content_range(value: str) -> tuple[int, int, int | None]:
    """Return start, stop (exclusive) and the whole's size (None where it is not told) from a 206's Content-Range.

    Raise ValueError for anything else, an unsatisfied range (``bytes */SIZE``) included: no 206 says that.
    """
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise ValueError("not a Content-Range of bytes")
    start, stop = int(match[1]), int(match[2]) + 1
    size = None if match[3] == "*" else int(match[3])
    if stop <= start or (size is not None and stop > size):
        raise ValueError("a Content-Range that contradicts itself")
    return start, stop, size
