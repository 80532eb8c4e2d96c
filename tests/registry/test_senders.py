"""Content on its way to a client that takes it fast, slowly, or not to the end."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts
from dockerproxy.registry.senders import Pace, send

SMALLEST, FIRST, LARGEST = 16 * 1024, 128 * 1024, 1024 * 1024
DATA = bytes(range(256)) * 4096  # 1 MiB


@given(st.lists(st.floats(min_value=0, max_value=1e6)))
def test_the_pace_stays_within_its_bounds(takes: list[float]) -> None:
    pace = Pace()
    for seconds in takes:
        before = pace.size
        pace.took(before, seconds)
        assert SMALLEST <= pace.size <= LARGEST
        if seconds < 0.02:
            assert pace.size >= before
        elif seconds > 0.2:
            assert pace.size <= before
        else:
            assert pace.size == before


def test_the_pace_goes_from_one_bound_to_the_other() -> None:
    pace = Pace()
    for _ in range(10):
        pace.took(pace.size, 0)
    assert pace.size == LARGEST
    for _ in range(10):
        pace.took(pace.size, 1)
    assert pace.size == SMALLEST


def test_no_more_is_read_than_twice_what_was_taken() -> None:
    pace = Pace()
    for _ in range(10):
        pace.took(min(pace.size, 100_000), 0)
    assert pace.size == 200_000


class Sending:
    """One answer of `send` for a visitor."""

    def __init__(self, visit: Any, content: Any, start: int = 0, stop: int | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.ended: list[BaseException | None] = []
        length = options.pop("length", None if stop is None else stop - start)

        async def handle(request: Request) -> None:
            request.start(200, [], length)
            try:
                await send(request, content, start, stop, self.clock)
            except BaseException as error:
                self.ended.append(error)
                raise
            self.ended.append(None)

        self.visitor = visit(handle, clock=self.clock, **options)

    def get(self, version: str = "1.1") -> Any:
        return self.visitor.ask("GET", "/", version=version)


def test_a_content_is_sent_whole(visit: Any, text: Any) -> None:
    content = text(DATA)
    answer = Sending(visit, content, 0, len(DATA)).get()
    assert (answer.body, answer.whole) == (DATA, True)
    assert answer.headers["Content-Length"] == str(len(DATA))


def test_a_part_is_sent_and_nothing_around_it_is_read(visit: Any, text: Any) -> None:
    content = text(DATA)
    assert Sending(visit, content, 1000, 500_000).get().body == DATA[1000:500_000]
    assert content.asked[0][0] == 1000
    assert max(offset + size for offset, size in content.asked) == 500_000


def test_pieces_are_never_larger_than_the_pace_allows(visit: Any, text: Any) -> None:
    content = text(DATA * 2)
    Sending(visit, content, 0, len(DATA) * 2).get()
    assert max(size for _, size in content.asked) == LARGEST
    assert content.asked[0][1] == FIRST


@pytest.mark.parametrize("piece", [1, 4096, 100_000])
def test_content_that_comes_in_small_pieces(visit: Any, text: Any, piece: int) -> None:
    data = DATA[: 20 * piece]
    assert Sending(visit, text(data, piece=piece), 0, len(data)).get().body == data


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_a_content_of_unknown_length(visit: Any, text: Any, data: bytes) -> None:
    answer = Sending(visit, text(data, size=None)).get()
    assert (answer.body, answer.whole) == (data, True)
    assert answer.headers["Transfer-Encoding"] == "chunked"
    answer = Sending(visit, text(data, size=None)).get("1.0")
    assert (answer.body, answer.whole) == (data, True)
    assert "Transfer-Encoding" not in answer.headers


def test_a_client_that_takes_nothing_is_waited_for(visit: Any, text: Any) -> None:
    content = text(DATA)
    sending = Sending(visit, content, 0, len(DATA))
    sending.visitor.transport.room = 1000
    sending.visitor.request("GET", "/")
    sending.visitor.run(1)
    assert len(content.asked) == 1  # one piece is all that waits in memory
    assert sending.ended == []
    sending.visitor.take(math.inf)
    assert sending.visitor.answer().body == DATA
    assert sending.ended == [None]


def test_a_client_that_was_slow_gets_smaller_pieces(visit: Any, text: Any) -> None:
    content = text(DATA)
    sending = Sending(visit, content, 0, len(DATA))
    sending.visitor.transport.room = 1000
    sending.visitor.request("GET", "/")
    sending.visitor.run(1)
    sending.visitor.take(FIRST)
    assert [size for _, size in content.asked] == [FIRST, FIRST // 4]


def test_a_client_that_leaves_ends_it(visit: Any, text: Any) -> None:
    content = text(DATA)
    sending = Sending(visit, content, 0, len(DATA))
    sending.visitor.transport.room = 1000
    sending.visitor.request("GET", "/")
    sending.visitor.disconnect()
    assert len(sending.ended) == 1 and sending.ended[0] is not None
    assert len(content.asked) == 1
    assert sending.visitor.logged[0].size == FIRST


def test_a_client_that_leaves_while_content_is_waited_for(visit: Any, text: Any) -> None:
    content = text(DATA, waits={300_000: Deferred()})
    sending = Sending(visit, content, 0, len(DATA))
    sending.visitor.request("GET", "/")
    assert sending.ended == []
    sending.visitor.disconnect()
    assert len(sending.ended) == 1 and sending.ended[0] is not None


def test_a_client_that_takes_nothing_for_too_long_is_dropped(visit: Any, text: Any) -> None:
    sending = Sending(visit, text(DATA), 0, len(DATA), timeouts=ServerTimeouts(send=10))
    sending.visitor.transport.room = 1000
    sending.visitor.request("GET", "/")
    for _ in range(100):
        sending.visitor.run(1)
    assert sending.visitor.transport.aborted
    assert len(sending.ended) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("known", [True, False])
def test_a_reading_that_fails_is_seen_by_the_client(visit: Any, text: Any, version: str, known: bool) -> None:
    content = text(DATA, fails={300_000: UpstreamBroken("it broke off")})
    sending = Sending(visit, content, 0, len(DATA) if known else None)
    answer = sending.get(version)
    assert not answer.whole
    assert DATA.startswith(answer.body)
    assert sending.visitor.transport.aborted


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_content_that_ends_before_its_length_is_seen_by_the_client(visit: Any, text: Any, version: str) -> None:
    sending = Sending(visit, text(DATA[:-1]), 0, len(DATA))
    assert not sending.get(version).whole
    assert sending.visitor.transport.aborted


def test_others_get_their_turn_between_pieces(visit: Any, text: Any) -> None:
    content = text(DATA)
    sending = Sending(visit, content, 0, len(DATA))
    turns: list[int] = []

    def turn() -> None:
        turns.append(len(content.asked))
        if len(turns) < 6:
            sending.clock.callLater(0, turn)

    sending.clock.callLater(0, turn)
    sending.get()
    assert len(set(turns)) > 2


# files


class Filed:
    """A content in a file, `cached` bytes of which are in memory at a time."""

    def __init__(self, folder: Path, data: bytes) -> None:
        path = folder / "content"
        path.write_bytes(data)
        self._file = path.open("rb")
        self.asked: list[tuple[int, int]] = []
        self.size: int | None = len(data)

    async def in_file(self, offset: int, at_most: int) -> tuple[int, int] | None:
        self.asked.append((offset, at_most))
        return self._file.fileno(), min(at_most, len(DATA) - offset)

    async def read(self, offset: int, at_most: int) -> bytes:
        raise AssertionError("its bytes are not to be copied")


class FileTaking:
    """A request over a connection that takes files, `step` bytes at a time."""

    def __init__(self, step: int) -> None:
        self.takes_files = True
        self.sent = b""
        self.finished = False
        self._step = step

    def offer_file(self, descriptor: int, offset: int, size: int) -> int:
        data = os.pread(descriptor, min(size, self._step), offset)
        self.sent += data
        return len(data)

    async def drain(self) -> None: ...

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("step", [1 << 30, 100_000])
def test_a_file_is_sent_without_being_read(tmp_path: Path, step: int) -> None:
    request: Any = FileTaking(step)
    clock = Clock()
    content: Any = Filed(tmp_path, DATA)
    done = Deferred.fromCoroutine(send(request, content, 10, len(DATA) - 5, clock))
    while not done.called:
        clock.advance(0)
    assert request.sent == DATA[10:-5] and request.finished


def test_a_file_that_was_cut_off_ends_the_answer(tmp_path: Path) -> None:
    request: Any = FileTaking(1 << 30)
    content: Any = Filed(tmp_path, DATA[:1000])
    clock = Clock()
    done = Deferred.fromCoroutine(send(request, content, 0, len(DATA), clock))
    for _ in range(10):
        clock.advance(0)
    assert done.called and request.sent == DATA[:1000] and request.finished  # which breaks off what is too short
