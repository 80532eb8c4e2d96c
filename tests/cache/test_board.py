"""The board: downloads write to shared memory, and any process reads it."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache.board import ENTRIES, Board, BoardRow
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, CacheHarness
from tests.cache.support.upstream import respond_streaming

DATA = bytes(range(256)) * 4000
DIGEST = Digest.of(DATA)


def start(harness: CacheHarness) -> None:
    harness.upstream.repository(f"{HUB}/library/app").put_blob(DATA)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    harness.start(harness.fetch_later(DIGEST))
    harness.reactor.run_due_calls()


def only_row(harness: CacheHarness) -> BoardRow:
    [row] = harness.board.rows()
    return row


def test_a_download_is_on_the_board_until_it_ends(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    start(harness)
    row = only_row(harness)
    assert (row.repository, row.digest, row.size) == (f"{HUB}/library/app", DIGEST, len(DATA))
    assert (row.done, row.readers, row.private) == (0, 1, False)
    response = harness.upstream.responses[-1]
    response.send(300_000)
    harness.advance(2)
    response.send(500_000)
    harness.advance(2)
    assert 300_000 <= only_row(harness).done <= 800_000
    response.send_rest()
    harness.advance(1)
    assert harness.board.rows() == []
    assert harness.board.is_complete(row.id)


def test_a_download_whose_upstream_hangs(make_harness: Callable[..., CacheHarness]) -> None:
    """Bytes and clients that came within the second after an update are shown, although nothing more comes."""
    harness = make_harness()
    start(harness)
    assert (only_row(harness).done, only_row(harness).readers) == (0, 1)
    second = harness.start(harness.fetch_later(DIGEST))
    harness.upstream.responses[-1].send(300_000)
    harness.advance(1.2)
    assert (only_row(harness).done, only_row(harness).readers) == (300_000, 2)
    second.cancel()
    harness.advance(1.2)
    assert only_row(harness).readers == 1


def test_a_download_that_failed_is_not_complete(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    start(harness)
    row = only_row(harness)
    harness.upstream.go_down()
    harness.upstream.responses[-1].disconnect()
    harness.advance(60)
    assert harness.board.rows() == []
    assert not harness.board.is_complete(row.id)


def test_the_last_complete_downloads_are_known() -> None:
    board = Board.make(2)
    parts = [board.for_process(number) for number in range(2)]
    ids = []
    for number in range(100):
        entry = parts[number % 2].add("a/b", Digest.of(b"%d" % number), 1, private=False)
        assert entry is not None
        [row] = board.rows()
        ids.append(row.id)
        entry.remove(is_complete=number % 10 != 9)
    assert [board.is_complete(identifier) for identifier in ids[-20:]] == [number % 10 != 9 for number in range(20)]
    parts[0] = board.for_process(0)  # the process has been replaced
    assert not board.is_complete(ids[98]) and board.is_complete(ids[97])


def test_a_download_for_a_login_is_private(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    harness.upstream.repository(f"{HUB}/library/app").put_blob(DATA)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    principal = harness.principal(authorization="Basic YTpi")
    harness.downloads.start(principal, DIGEST, _nothing)
    harness.reactor.run_due_calls()
    assert only_row(harness).private
    harness.upstream.responses[-1].send_rest()
    harness.advance(1)


async def _nothing() -> None:
    pass


def test_a_download_writes_at_most_once_a_second(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    start(harness)
    response = harness.upstream.responses[-1]
    for _ in range(10):
        response.send(1000)
        harness.reactor.run_due_calls()
    assert only_row(harness).done <= 1000
    harness.advance(2)
    response.send(50_000)
    harness.reactor.run_due_calls()
    assert only_row(harness).done > 1000
    response.send_rest()
    harness.advance(1)


def test_there_is_room_for_so_many_and_a_place_is_used_again() -> None:
    board = Board.make(1)
    part = board.for_process(0)
    entries = [part.add(f"quay.io/a/{number}", DIGEST, None, private=False) for number in range(ENTRIES)]
    assert all(entries)
    assert part.add("quay.io/a/more", DIGEST, None, private=False) is None
    assert len(board.rows()) == ENTRIES
    first = entries[0]
    assert first is not None
    old_ids = {row.id for row in board.rows()}
    first.remove()
    assert part.add("quay.io/a/more", DIGEST, 5, private=True) is not None
    [new] = [row for row in board.rows() if row.id not in old_ids]
    assert (new.repository, new.size, new.private) == ("quay.io/a/more", 5, True)


def test_a_process_that_is_replaced_leaves_nothing() -> None:
    board = Board.make(2)
    for number in range(2):
        part = board.for_process(number)
        part.set_viewers(3)
        part.add(f"quay.io/a/{number}", DIGEST, None, private=False)
    assert board.viewers == 6
    board.for_process(1)
    assert [row.repository for row in board.rows()] == ["quay.io/a/0"]
    assert board.viewers == 3


def test_another_process_reads_what_one_wrote() -> None:
    board = Board.make(2)
    part = board.for_process(1)
    if not (pid := os.fork()):
        entry = part.add("ghcr.io/acme/app", DIGEST, 10, private=True)
        assert entry is not None
        entry.update(4, 10, 24)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    [row] = board.rows()
    assert (row.repository, row.done, row.readers) == ("ghcr.io/acme/app", 4, 24)


@given(st.text(max_size=2000), st.integers(0, 2**63), st.one_of(st.none(), st.integers(0, 2**63)))
def test_any_name_is_whole_or_not_there(name: str, done: int, size: int | None) -> None:
    name = name.encode(errors="replace").decode().replace("\n", "")
    board = Board.make(1)
    entry = board.for_process(0).add(name, DIGEST, size, private=False)
    if entry is not None:
        entry.update(done, size, 1)
        [row] = board.rows()
        assert (row.repository, row.done, row.size) == (name, done, size)
    assert entry is not None or len(name.encode()) > 1000


def test_a_name_that_is_too_long_is_not_shown_and_harms_no_other() -> None:
    board = Board.make(1)
    part = board.for_process(0)
    for name in ("ghcr.io/a/one", "ghcr.io/a/two"):
        assert part.add(name, DIGEST, 5, private=False) is not None
    part.clear()
    before = bytes(board._words)
    assert part.add("ghcr.io/" + "x" * 2000, DIGEST, 5, private=False) is None
    assert bytes(board._words) == before and board.rows() == []


def test_an_entry_that_another_download_takes_over_is_not_mixed_up() -> None:
    board = Board.make(1)
    part = board.for_process(0)
    assert part.add("ghcr.io/a/new", DIGEST, 5, private=True) is not None
    [start] = part._entries()
    identifier = board._words[start]
    assert board._read(0, start, identifier) is not None
    assert board._read(0, start, identifier + 1) is None
