"""Byte ranges, compared with Python's slices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import RangeInvalid
from dockerproxy.oci.ranges import ByteRange, content_range, parse_content_range, parse_range

sizes = st.integers(1, 50)
positions = st.integers(0, 60)


def make_bytes(size: int) -> bytes:
    return bytes(range(size))


@given(positions, st.one_of(st.none(), positions), sizes)
def test_a_range_selects_the_same_bytes_as_a_slice(first: int, last: int | None, size: int) -> None:
    header = f"bytes={first}-{'' if last is None else last}"
    if first >= size or (last is not None and last < first):
        with pytest.raises(RangeInvalid) as caught:
            parse_range(header, size)
        assert caught.value.headers == (("Content-Range", f"bytes */{size}"),)
    else:
        byte_range = parse_range(header, size)
        assert byte_range is not None
        expected = make_bytes(size)[first : None if last is None else last + 1]
        assert make_bytes(size)[byte_range.start : byte_range.stop] == expected
        assert byte_range.stop - byte_range.start == len(expected)


@given(st.integers(1, 60), sizes)
def test_suffix(length: int, size: int) -> None:
    byte_range = parse_range(f"bytes=-{length}", size)
    assert byte_range is not None
    assert make_bytes(size)[byte_range.start : byte_range.stop] == make_bytes(size)[-length:]


@pytest.mark.parametrize(
    ("header", "size"),
    [("bytes=-0", 5), ("bytes=5-", 5), ("bytes=3-1", 5), ("bytes=5-9", 5), ("bytes=9999999999999999999-", 5)],
)
def test_unsatisfiable(header: str, size: int) -> None:
    with pytest.raises(RangeInvalid) as caught:
        parse_range(header, size)
    assert dict(caught.value.headers) == {"Content-Range": f"bytes */{size}"}


@pytest.mark.parametrize(
    "header",
    [
        None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,3-4", "bytes=0-1,", "lines=0-1",
        "bytes=+0-1", "bytes=0--1", "bytes=-1-2", "bytes=0x0-1", "bytes=0 - 1", "bytes=٠-١", "bytes:0-1", "bytes=0-1\n",
        "bytes=0-" + "9" * 20, "bytes=" + "0" * 5000 + "-",
    ],
)  # fmt: skip
def test_whole_content(header: str | None) -> None:
    assert parse_range(header, 5) is None


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-5", "bytes=-0", "bytes=7-", None])
def test_empty_content_is_always_whole(header: str | None) -> None:
    assert parse_range(header, 0) is None


def test_spelling() -> None:
    assert parse_range("Bytes = 1-2 ", 5) == ByteRange(1, 3)


@given(st.text())
def test_any_header(header: str) -> None:
    parse_range(header, 0)
    byte_range = None
    try:
        byte_range = parse_range(header, 7)
    except RangeInvalid:
        pass
    assert byte_range is None or 0 <= byte_range.start < byte_range.stop <= 7


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
