"""Byte ranges, compared with Python's slices and sets."""

from __future__ import annotations

import email.policy
from email.parser import BytesParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import RangeInvalid
from dockerproxy.oci.ranges import (
    MAX_RANGES,
    ByteRange,
    MultipartRanges,
    content_range,
    parse_content_range,
    parse_ranges,
)

sizes = st.integers(1, 50)
positions = st.integers(0, 60)


def make_bytes(size: int) -> bytes:
    return bytes(range(size))


@given(positions, st.one_of(st.none(), positions), sizes)
def test_a_range_selects_the_same_bytes_as_a_slice(first: int, last: int | None, size: int) -> None:
    header = f"bytes={first}-{'' if last is None else last}"
    if first >= size or (last is not None and last < first):
        with pytest.raises(RangeInvalid) as caught:
            parse_ranges(header, size)
        assert caught.value.headers == (("Content-Range", f"bytes */{size}"),)
    else:
        (byte_range,) = parse_ranges(header, size)
        expected = make_bytes(size)[first : None if last is None else last + 1]
        assert make_bytes(size)[byte_range.start : byte_range.stop] == expected
        assert byte_range.stop - byte_range.start == len(expected)


@given(st.integers(1, 60), sizes)
def test_suffix(length: int, size: int) -> None:
    (byte_range,) = parse_ranges(f"bytes=-{length}", size)
    assert make_bytes(size)[byte_range.start : byte_range.stop] == make_bytes(size)[-length:]


@pytest.mark.parametrize(
    ("header", "size"),
    [("bytes=-0", 5), ("bytes=5-", 5), ("bytes=3-1", 5), ("bytes=5-9", 5), ("bytes=9999999999999999999-", 5)],
)
def test_unsatisfiable(header: str, size: int) -> None:
    with pytest.raises(RangeInvalid) as caught:
        parse_ranges(header, size)
    assert dict(caught.value.headers) == {"Content-Range": f"bytes */{size}"}


@pytest.mark.parametrize(
    "header",
    [
        None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,3-4;", "bytes=0-1,-", "bytes=9-,a", "bytes=,",
        "bytes=0-1,bytes=3-4", "lines=0-1", "bytes=0-1\x0b,2-3",
        "bytes=+0-1", "bytes=0--1", "bytes=-1-2", "bytes=0x0-1", "bytes=0 - 1", "bytes=٠-١", "bytes:0-1", "bytes=0-1\n",
        "bytes=0-" + "9" * 20, "bytes=" + "0" * 5000 + "-",
    ],
)  # fmt: skip
def test_whole_content(header: str | None) -> None:
    assert parse_ranges(header, 5) == []


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-5", "bytes=-0", "bytes=7-", None])
def test_empty_content_is_always_whole(header: str | None) -> None:
    assert parse_ranges(header, 0) == []


def test_spelling() -> None:
    assert parse_ranges("Bytes = 1-2 ", 5) == [ByteRange(1, 3)]
    assert parse_ranges("bytes= ,0-0 ,\t2-2,,", 5) == [ByteRange(0, 1), ByteRange(2, 3)]


slices = st.one_of(
    st.tuples(positions, positions).map(lambda pair: (min(pair), max(pair))),
    st.tuples(positions, st.none()),
    st.tuples(st.none(), positions),
)


@given(st.lists(slices, min_size=1, max_size=8), sizes)
def test_several_ranges_select_the_same_bytes_as_slices(
    requested: list[tuple[int | None, int | None]], size: int
) -> None:
    header = "bytes=" + ",".join(
        f"{'' if first is None else first}-{'' if last is None else last}" for first, last in requested
    )
    everything = list(range(size))
    selected = [
        everything[size - min(last or 0, size) :]
        if first is None
        else everything[first : size if last is None else last + 1]
        for first, last in requested
    ]
    selected = [offsets for offsets in selected if offsets]
    if not selected:
        with pytest.raises(RangeInvalid) as caught:
            parse_ranges(header, size)
        assert caught.value.headers == (("Content-Range", f"bytes */{size}"),)
        return
    ranges = parse_ranges(header, size)
    if sum(map(len, selected)) > size:
        assert ranges == []
        return
    groups: list[set[int]] = []  # the ranges that overlap, at the place of the first
    for offsets in selected:
        overlapping = [group for group in groups if not group.isdisjoint(offsets)]
        if not overlapping:
            groups.append(set(offsets))
            continue
        overlapping[0].update(offsets, *overlapping[1:])
        groups = [group for group in groups if not any(group is other for other in overlapping[1:])]
    assert [set(range(byte_range.start, byte_range.stop)) for byte_range in ranges] == groups


def test_ranges_that_touch_or_are_in_another_order_stay_apart() -> None:
    """podman counts the parts, and asks for pieces of a layer that are next to each other."""
    ranges = [ByteRange(60, 70), ByteRange(10, 20), ByteRange(20, 30), ByteRange(31, 32)]
    assert parse_ranges("bytes=60-69,10-19,20-29,31-31", 100) == ranges


@pytest.mark.parametrize("header", ["bytes=-0,90-", "bytes=100-,90-300", "bytes=-10,100-200", "bytes=-10,9999999999-"])
def test_unsatisfiable_ranges_among_others_are_left_out(header: str) -> None:
    assert parse_ranges(header, 100) == [ByteRange(90, 100)]


@pytest.mark.parametrize("header", ["bytes=100-,200-300", "bytes=-0,100-", "bytes=0-1,5-2", "bytes=5-2,0-1"])
def test_unsatisfiable_ranges(header: str) -> None:
    with pytest.raises(RangeInvalid) as caught:
        parse_ranges(header, 100)
    assert dict(caught.value.headers) == {"Content-Range": "bytes */100"}


def test_more_bytes_than_the_content_has_select_the_whole() -> None:
    assert parse_ranges("bytes=0-59,40-79", 100) == [ByteRange(0, 80)]
    assert parse_ranges("bytes=0-59,40-80", 100) == []
    assert parse_ranges("bytes=" + ",".join(["0-"] * 5), 100) == []
    assert parse_ranges("bytes=0-49,50-", 100) == [ByteRange(0, 50), ByteRange(50, 100)]


def test_number_of_ranges_is_limited() -> None:
    texts = [f"{10 * index}-{10 * index}" for index in range(MAX_RANGES + 1)]
    assert len(parse_ranges("bytes=" + ",".join(texts[:-1]), 1 << 40)) == MAX_RANGES
    assert parse_ranges("bytes=" + ",".join(texts), 1 << 40) == []
    assert parse_ranges("bytes=0-0" + "," * 30_000, 1 << 40) == []


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(1, 100)), min_size=2, max_size=5))
def test_multipart_body(parts: list[tuple[int, int]]) -> None:
    ranges = [ByteRange(start, start + length) for start, length in parts]
    body = MultipartRanges(ranges, 2**63, "application/octet-stream", "boundary")
    data = b"".join(
        segment if isinstance(segment, bytes) else bytes([segment.start % 251]) * segment.size for segment in body
    )
    assert body.length == len(data)
    head = f"Content-Type: {body.content_type}\r\n\r\n".encode()
    message = BytesParser(policy=email.policy.HTTP).parsebytes(head + data)
    assert not message.defects
    received = list(message.iter_parts())
    assert [part["Content-Range"] for part in received] == [content_range(item, 2**63) for item in ranges]
    assert {part.get_content_type() for part in received} == {"application/octet-stream"}
    assert data.endswith(b"\r\n--boundary--\r\n")


@given(st.text() | st.from_regex(r"bytes=[0-9,\- ]*", fullmatch=True))
def test_any_header(header: str) -> None:
    assert parse_ranges(header, 0) == []
    try:
        ranges = parse_ranges(header, 7)
    except RangeInvalid:
        return
    assert all(0 <= byte_range.start < byte_range.stop <= 7 for byte_range in ranges)
    assert sum(byte_range.size for byte_range in ranges) <= 7


@given(st.integers(0, 2**62), st.integers(1, 2**30), st.integers(0, 2**30))
def test_content_range_round_trip(start: int, length: int, more: int) -> None:
    byte_range = ByteRange(start, start + length)
    size = byte_range.stop + more
    assert parse_content_range(content_range(byte_range, size)) == (byte_range.start, byte_range.stop, size)
    assert parse_content_range(f"bytes {byte_range.start}-{byte_range.stop - 1}/*") == (
        byte_range.start,
        byte_range.stop,
        None,
    )


@pytest.mark.parametrize(
    "value",
    [
        "", "bytes", "bytes */5", "bytes */*", "bytes 0-4", "bytes 0-5/5", "bytes 3-2/5", "bytes 0-0/0", "bytes=0-4/5",
        "0-4/5", "bytes 0-/5", "bytes -4/5", "bytes  0-4/5", "bytes 0-4/5 ", " bytes 0-4/5", "bytes 0-4/5\n",
        "bytes 0-4/+5",
        "lines 0-4/5", "bytes 0-4/٥", "bytes 0-4/5, bytes 0-4/5", "bytes 0-" + "9" * 20 + "/*",
    ],
)  # fmt: skip
def test_invalid_content_range(value: str) -> None:
    with pytest.raises(ValueError):
        parse_content_range(value)
