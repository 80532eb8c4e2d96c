"""Byte ranges (RFC 9110, section 14) in requests from clients and in responses from upstreams."""

from __future__ import annotations

import re

from attrs import frozen

from dockerproxy.errors import RangeInvalid

# Nineteen digits are enough for every 64-bit size.
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.IGNORECASE)


@frozen(slots=True)
class ByteRange:
    """The bytes from `start` up to, but not including, `stop`."""

    start: int
    stop: int


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the range that a Range field selects from content of `size` bytes, or None for all of it.

    A field that is absent, malformed, in another unit or for several ranges selects everything. RFC 9110, section 14.2
    lets a server ignore the field, and lazy pullers accept that. Any range of empty content selects everything too,
    because no Content-Range could describe the response, and containerd asks for ``bytes=0-`` of all content.

    A range that begins after the end of the content, or after its own end, raises `RangeInvalid`. Section 14.2 also
    lets a server reject the latter, and the conformance suite of the distribution-spec requires it.
    """
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None or size == 0 or not (match[1] or match[2]):
        return None
    first, last = match[1], match[2]
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise RangeInvalid(
            f"the range is outside the content, which has {size} bytes", headers=[("Content-Range", f"bytes */{size}")]
        )
    return ByteRange(start, stop)


def content_range(byte_range: ByteRange, size: int) -> str:
    """Return the Content-Range value of a 206 response with `byte_range` (not empty) of `size` bytes."""
    return f"bytes {byte_range.start}-{byte_range.stop - 1}/{size}"


def parse_content_range(value: str) -> tuple[int, int, int | None]:
    """Return start, stop (exclusive) and total size (None if not stated) from the Content-Range of a 206 response.

    Raise ValueError for everything else. That includes an unsatisfied range (``bytes */SIZE``), which a 206 response
    never has.
    """
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise ValueError("not a Content-Range of bytes")
    start, stop = int(match[1]), int(match[2]) + 1
    size = None if match[3] == "*" else int(match[3])
    if stop <= start or (size is not None and stop > size):
        raise ValueError("the Content-Range contradicts itself")
    return start, stop, size
