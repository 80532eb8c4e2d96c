"""Byte ranges (RFC 9110, section 14) in requests from clients and in responses from upstreams."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from operator import itemgetter

from attrs import frozen

from dockerproxy.errors import RangeInvalid

MAX_RANGES = 1024
"""Ranges that a request may name. containers/storage, of podman, asks for up to so many chunks of a layer at once."""

_UNIT = re.compile(r"bytes[ \t]*=", re.IGNORECASE)
# Nineteen digits are enough for every 64-bit size.
_RANGE = re.compile(r"([0-9]{0,19})-([0-9]{0,19})")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.IGNORECASE)


@frozen(slots=True)
class ByteRange:
    """The bytes from `start` up to, but not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


Segment = bytes | ByteRange
"""Consecutive bytes of a response body: these bytes, or a range of the content."""


def parse_ranges(header: str | None, size: int) -> list[ByteRange]:
    """Return the ranges that a Range field selects from content of `size` bytes, or an empty list for all of it.

    A field that is absent, malformed or in another unit selects everything, as RFC 9110, section 14.2 permits, and so
    does one for more than `MAX_RANGES` ranges, or for more bytes than the content has. Any range of empty content
    selects everything too, because no Content-Range could describe the response, and containerd asks for ``bytes=0-``
    of all content.

    Ranges after the end of the content are left out. If there is no other, raise `RangeInvalid`. A range that ends
    before it begins raises it as well. Section 14.2 also lets a server reject that, and the conformance suite of the
    distribution-spec requires it.

    Ranges that overlap become one. All others stay as they are and in their order, however close together: podman
    counts the parts of the response, and takes each for the range that it named at this place.
    """
    unit = _UNIT.match(header) if header is not None else None
    if header is None or unit is None or size == 0 or header.count(",") >= MAX_RANGES:
        return []
    ranges, found = [], False
    for text in header[unit.end() :].split(","):
        specification = text.strip(" \t")
        if not specification:  # RFC 9110, section 5.6.1.2: a list may have empty elements
            continue
        match = _RANGE.fullmatch(specification)
        if match is None or specification == "-":
            return []
        found = True
        first, last = match[1], match[2]
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start < stop:
            ranges.append(ByteRange(start, stop))
        elif first and last and int(last) < start:
            raise _range_invalid(f"the range {specification} ends before it begins", size)
    if found and not ranges:
        raise _range_invalid(f"the range is outside the content, which has {size} bytes", size)
    if sum(byte_range.size for byte_range in ranges) > size:
        return []
    return _merge_overlapping(ranges) if len(ranges) > 1 else ranges


def _range_invalid(message: str, size: int) -> RangeInvalid:
    return RangeInvalid(message, headers=[("Content-Range", f"bytes */{size}")])


def _merge_overlapping(ranges: list[ByteRange]) -> list[ByteRange]:
    """Return `ranges` with those that overlap as one, at the place of the first of them."""
    merged: list[tuple[int, ByteRange]] = []
    for place, byte_range in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if merged and byte_range.start < merged[-1][1].stop:
            first_place, previous = merged[-1]
            stop = max(previous.stop, byte_range.stop)
            merged[-1] = min(first_place, place), ByteRange(previous.start, stop)
        else:
            merged.append((place, byte_range))
    return [byte_range for _, byte_range in sorted(merged, key=itemgetter(0))]


class MultipartRanges:
    """The segments of a multipart/byteranges body with `ranges` of content of `size` bytes (RFC 9110, section 14.6).

    The bytes of the content must not be able to contain `boundary`, so it should be random.
    """

    __slots__ = ("_boundary", "_bounds", "_part_type", "_size", "content_type", "length")

    def __init__(self, ranges: Iterable[ByteRange], size: int, part_type: str, boundary: str) -> None:
        # An array has 16 KiB for 1,024 ranges. As objects they would take 120 KiB while a slow client reads.
        self._bounds = array("Q", [bound for byte_range in ranges for bound in (byte_range.start, byte_range.stop)])
        self._size = size
        self._part_type = part_type
        self._boundary = boundary
        self.content_type = f"multipart/byteranges; boundary={boundary}"
        self.length = sum(len(segment) if isinstance(segment, bytes) else segment.size for segment in self)

    def __iter__(self) -> Iterator[Segment]:
        delimiter = f"--{self._boundary}"
        for index in range(0, len(self._bounds), 2):
            byte_range = ByteRange(self._bounds[index], self._bounds[index + 1])
            yield (
                f"{delimiter}\r\nContent-Type: {self._part_type}\r\n"
                f"Content-Range: {content_range(byte_range, self._size)}\r\n\r\n"
            ).encode("latin-1")
            yield byte_range
            delimiter = f"\r\n--{self._boundary}"
        yield f"{delimiter}--\r\n".encode("latin-1")


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
