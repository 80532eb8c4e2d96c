"""Tests of the tail buffer: it returns correct bytes or None, from the last two writes only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache.downloads import TailBuffer

LARGE = 64 * 1024


@given(
    writes=st.lists(st.lists(st.sampled_from([1, LARGE - 1, LARGE, LARGE + 1]), max_size=4), max_size=5),
    fraction=st.floats(0, 1),
    at_most=st.integers(1, 3 * LARGE),
)
def test_returned_bytes_are_correct(writes: list[list[int]], fraction: float, at_most: int) -> None:
    tail, content, starts = TailBuffer(), b"", [0]
    for number, sizes in enumerate(writes):
        pieces = [bytes([number * 4 + index]) * size for index, size in enumerate(sizes)]
        tail.add(len(content), pieces)
        starts.append(len(content))
        content += b"".join(pieces)
    offset = int(fraction * len(content))
    piece = tail.get(offset, at_most)
    if piece is not None:
        assert 0 < len(piece) <= at_most
        assert content[offset : offset + len(piece)] == piece
        assert offset >= starts[-2]


def test_last_two_writes() -> None:
    tail = TailBuffer()
    for number in range(3):
        tail.add(number * 2 * LARGE, [bytes([number]) * LARGE, bytes([number + 10]) * LARGE])
    assert [tail.get(index * LARGE, 1) for index in range(7)] == [
        None,
        None,
        b"\x01",
        b"\x0b",
        b"\x02",
        b"\x0c",
        None,
    ]
    assert tail.get(5 * LARGE + 9, 2 * LARGE) == bytes([12]) * (LARGE - 9)
    tail.clear()
    assert tail.get(5 * LARGE, 1) is None


def test_small_pieces_are_not_buffered() -> None:
    tail = TailBuffer()
    tail.add(0, [bytes(LARGE - 1), b"1" * LARGE])
    assert tail.get(0, 1) is None
    assert tail.get(LARGE - 1, 1) == b"1"
