"""What was written last, by offset: right bytes or none, and no more than the last two writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache.recent import Recent

LARGE = 64 * 1024


@given(
    writes=st.lists(st.lists(st.sampled_from([1, LARGE - 1, LARGE, LARGE + 1]), max_size=4), max_size=5),
    place=st.floats(0, 1),
    at_most=st.integers(1, 3 * LARGE),
)
def test_what_is_there_is_right(writes: list[list[int]], place: float, at_most: int) -> None:
    recent, content, starts = Recent(), b"", [0]
    for number, sizes in enumerate(writes):
        pieces = [bytes([number * 4 + index]) * size for index, size in enumerate(sizes)]
        recent.add(len(content), pieces)
        starts.append(len(content))
        content += b"".join(pieces)
    offset = int(place * len(content))
    found = recent.get(offset, at_most)
    if found is not None:
        assert 0 < len(found) <= at_most
        assert content[offset : offset + len(found)] == found
        assert offset >= starts[-2]


def test_the_last_two_writes() -> None:
    recent = Recent()
    for number in range(3):
        recent.add(number * 2 * LARGE, [bytes([number]) * LARGE, bytes([number + 10]) * LARGE])
    assert [recent.get(index * LARGE, 1) for index in range(7)] == [
        None,
        None,
        b"\x01",
        b"\x0b",
        b"\x02",
        b"\x0c",
        None,
    ]
    assert recent.get(5 * LARGE + 9, 2 * LARGE) == bytes([12]) * (LARGE - 9)
    recent.clear()
    assert recent.get(5 * LARGE, 1) is None


def test_small_pieces_are_not_kept() -> None:
    recent = Recent()
    recent.add(0, [bytes(LARGE - 1), b"1" * LARGE])
    assert recent.get(0, 1) is None
    assert recent.get(LARGE - 1, 1) == b"1"
