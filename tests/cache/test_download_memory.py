"""Tests of the memory of downloads: tails return correct bytes or None, and all downloads together have a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache.download_memory import DownloadMemory, TailBuffer
from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.stream import ByteStream
from dockerproxy.store.ingest import Ingest
from dockerproxy.upstream.connection import Response
from dockerproxy.upstream.http1 import parse_response_head
from tests.cache.support.harness import HUB, CacheHarness, do_nothing
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import ReceivedRequest

LARGE = 64 * 1024
MIB = 1024 * 1024


@given(
    writes=st.lists(st.lists(st.sampled_from([1, LARGE - 1, LARGE, LARGE + 1]), max_size=4), max_size=5),
    fraction=st.floats(0, 1),
    at_most=st.integers(1, 3 * LARGE),
)
def test_returned_bytes_are_correct(writes: list[list[int]], fraction: float, at_most: int) -> None:
    tail, content, starts = DownloadMemory().tail(), b"", [0]
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
    tail = DownloadMemory().tail()
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
    tail = DownloadMemory().tail()
    tail.add(0, [bytes(LARGE - 1), b"1" * LARGE])
    assert tail.get(0, 1) is None
    assert tail.get(LARGE - 1, 1) == b"1"


# all downloads of a process


@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 3))), max_size=40))
def test_tails_have_a_common_limit(operations: list[tuple[int, int | None]]) -> None:
    """The oldest writes are dropped first, and cleared tails count no more."""
    memory = DownloadMemory(tail_limit=5 * LARGE)
    tails = [memory.tail() for _ in range(5)]
    ends = [0] * 5
    for number, count in operations:
        if count is None:
            tails[number].clear()
        else:
            tails[number].add(ends[number], [bytes(LARGE)] * count)
            ends[number] += count * LARGE
            assert count == 0 or tails[number].get(ends[number] - 1, 1) is not None
        assert memory.tail_size == sum(buffered_bytes(tail) for tail in tails) <= 5 * LARGE
    for tail in tails:
        tail.clear()
    assert memory.tail_size == 0


def buffered_bytes(tail: TailBuffer) -> int:
    return sum(len(piece) for write in tail._writes for _, piece in write.pieces)


@pytest.mark.parametrize(("downloads", "expected"), [(1, 2 * MIB), (8, 2 * MIB), (20, MIB - LARGE), (1000, 32 * 1024)])
def test_writes_are_smaller_with_more_downloads(downloads: int, expected: int) -> None:
    memory = DownloadMemory()
    with ExitStack() as stack:
        for _ in range(downloads):
            stack.enter_context(memory.share("one.example"))
        assert memory.write_size("one.example") == expected
        assert memory.read_ahead("one.example") <= memory.write_size("one.example")
    assert memory.write_size("one.example") == 2 * MIB


def test_many_downloads_from_one_registry_leave_memory_to_others() -> None:
    memory = DownloadMemory()
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(memory.share("evil.example"))
        stack.enter_context(memory.share("good.example"))
        assert memory.write_size("good.example") == 2 * MIB
        in_transit = 100 * 2 * memory.write_size("evil.example") + 2 * memory.write_size("good.example")
        assert in_transit <= 40 * MIB


class GreedyResponse(Response):
    """A response whose connection delivers chunks of 64 KiB at any time, unless it is paused."""

    def __init__(self, reactor: ManualReactor) -> None:
        head = parse_response_head(b"HTTP/1.1 200 OK")
        super().__init__("", head, ByteStream(self), self)  # type: ignore[arg-type]
        self.authority, self.call_later = "", reactor.callLater
        self.paused = False
        self.delivered = 0

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def deliver(self) -> None:
        while not self.paused and not self._stream.ended:
            self.delivered += LARGE
            self._stream.feed(CHUNK)

    @property
    def ended(self) -> bool:
        return self._stream.ended

    def disconnect(self) -> None:
        self.paused = False
        self._stream.fail(UpstreamBroken("upstream broke off"))

    def abort_response(self, response: Response) -> None:
        self.disconnect()


CHUNK = bytes(LARGE)


def peak_of_held_bytes(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, downloads: int, steps_per_download: int = 24
) -> int:
    """Let greedy upstreams send to `downloads` downloads while the disk is slow. Return the most bytes in memory."""
    written = 0

    def append(ingest: Ingest, chunks: Sequence[bytes]) -> None:
        nonlocal written
        size = sum(map(len, chunks))
        ingest.size, written = ingest.size + size, written + size
        ingest.hashed_size = ingest.size

    def respond(request: ReceivedRequest, data: bytes | None) -> Any:
        responses.append(GreedyResponse(harness.reactor))
        return responses[-1]

    responses: list[GreedyResponse] = []
    monkeypatch.setattr(Ingest, "append", append)
    harness.upstream.on("GET", "blobs", respond)
    for number in range(downloads):
        digest = harness.upstream.repository(f"{HUB}/library/app").put_blob(b"%d of %d" % (number, downloads))
        harness.downloads.start(harness.principal(), digest, do_nothing)
    harness.reactor.run_due_calls()
    assert len(responses) == downloads
    harness.reactor.pool.hold()
    peak = 0
    for _ in range(steps_per_download * downloads):
        for response in responses:
            response.deliver()
        memory = harness.downloads._resources.memory
        peak = max(peak, sum(response.delivered for response in responses) - written + memory.tail_size)
        harness.reactor.pool.step()
        harness.reactor.advance(0.0001)
    assert written > 0
    harness.assert_no_leaks()
    assert harness.downloads._resources.memory.tail_size == 0
    return peak


@pytest.mark.slow
def test_150_downloads_hold_no_more_than_20(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = peak_of_held_bytes(make_harness(limit=1 << 50), monkeypatch, 20)
    many = peak_of_held_bytes(make_harness(limit=1 << 50), monkeypatch, 150)
    assert 16 * MIB < few <= 64 * MIB
    assert many <= few


def test_slow_disk_pauses_upstream(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of_held_bytes(harness, monkeypatch, 1) < 10 * MIB
