"""What a worker asks of the first process, over a real pair of sockets: room in the cache, and turns."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.cache.room import CacheRoom
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import Layout
from dockerproxy.tasks import Turns
from dockerproxy.workers import elsewhere
from dockerproxy.workers.calls import Calls
from dockerproxy.workers.desk import Desk, FirstRoom, Reservations
from dockerproxy.workers.elsewhere import RoomElsewhere, TurnsElsewhere
from dockerproxy.workers.line import pair
from tests.workers.by_hand import Reactor

LIMIT = 1000
ONE, OTHER, THIRD = (Digest.of(name) for name in (b"1", b"2", b"3"))


class Machine(Reactor, Clock):
    """A reactor by hand that has a clock, and whose threads are done at once."""

    def __init__(self) -> None:
        Reactor.__init__(self)
        Clock.__init__(self)  # type: ignore[no-untyped-call]

    def getThreadPool(self) -> Any:
        return self

    def callInThreadWithCallback(self, result: Any, function: Any, *arguments: Any, **named: Any) -> None:
        try:
            value = function(*arguments, **named)
        except Exception:
            result(False, Failure())  # type: ignore[no-untyped-call]
        else:
            result(True, value)

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)

    def settle(self) -> None:
        for _ in range(4):
            self.turn()


class Worker:
    """A worker's end of its line, and the desk that it asks."""

    def __init__(self, first: First) -> None:
        self.machine = first.machine
        ours, theirs = pair()
        self.desk = Desk(first.reservations, first.turns)
        self._first_end = Calls(self.machine, ours, self.desk.answers, lost=self.desk.close)
        self.calls = Calls(self.machine, theirs, {}, lost=lambda: None)
        self.room = RoomElsewhere(self.machine, self.calls, first.blobs)
        self.turns = TurnsElsewhere(self.calls)

    def reserve(self, digest: Digest, size: int) -> list[Any]:
        return self.machine_runs(self.room.reserve(digest, size, 0))

    def release(self, digest: Digest) -> None:
        self.room.release(digest)
        self.machine.settle()

    def machine_runs(self, work: Coroutine[Any, Any, Any]) -> list[Any]:
        """Start `work`, and return where its result is or will be."""
        outcome: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(outcome.append)
        self.machine.settle()
        return outcome

    def die(self) -> None:
        self.calls.line.close()
        self.machine.settle()


class First:
    """The first process: a cache of `LIMIT` bytes, its reservations, and its turns."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine()
        self.layout = Layout(folder)
        self.blobs = Blobs(self.layout, durable=False, clock=self.machine.seconds)
        self.cache = CacheRoom(
            self.machine, self.layout, self.blobs, limit=LIMIT, inactive=1e9, clock=self.machine.seconds
        )
        self.reservations = Reservations(self.cache)
        self.room = FirstRoom(self.reservations)
        self.turns = Turns()

    @property
    def reserved(self) -> int:
        """How many bytes are counted."""
        return self.cache.usage.total


@pytest.fixture(autouse=True)
def _roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheRoom, "_free", lambda room: 2**60)


@pytest.fixture
def first(tmp_path: Path) -> First:
    return First(tmp_path)


@pytest.fixture
def workers(first: First) -> Iterator[tuple[Worker, Worker]]:
    one, other = Worker(first), Worker(first)
    yield one, other
    one.die()
    other.die()


# room


def test_room_is_reserved_until_it_is_released(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    assert one.reserve(ONE, 600) == [True]
    assert first.reserved == 600
    assert other.reserve(OTHER, 600) == [False]
    one.release(ONE)
    assert first.reserved == 0
    assert other.reserve(OTHER, 600) == [True]


def test_a_blob_that_grows_reserves_more(first: First, workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    assert [one.reserve(ONE, size) for size in (100, 200, LIMIT + 1)] == [[True], [True], [False]]
    one.release(ONE)
    assert first.reserved == 0


def test_a_reservation_that_passed_on_to_another_is_not_released_by_the_former(
    first: First, workers: tuple[Worker, Worker]
) -> None:
    one, other = workers
    one.reserve(ONE, 300)
    other.reserve(ONE, 300)
    one.release(ONE)
    assert first.reserved == 300
    other.release(ONE)
    assert first.reserved == 0


def test_to_the_first_process_and_from_it(first: First, workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    one.reserve(ONE, 300)
    one.machine_runs(first.room.reserve(ONE, 300, 0))
    one.die()
    assert first.reserved == 300
    first.room.release(ONE)
    assert first.reserved == 0


def test_who_dies_gives_back_what_it_had_reserved_and_nothing_else(
    first: First, workers: tuple[Worker, Worker]
) -> None:
    one, other = workers
    one.reserve(ONE, 100)
    one.reserve(OTHER, 200)
    other.reserve(THIRD, 400)
    one.die()
    assert first.reserved == 400


def test_without_the_first_process_there_is_no_room(workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    one._first_end.line.close()
    assert one.reserve(ONE, 1) == [False]


def test_what_is_kept_is_counted_and_makes_others_go(first: First, workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    old, new = b"a" * 500, b"b" * 600
    for content in (old, new):
        digest = Digest.of(content)
        ingest = Ingest.open(first.layout, digest)
        assert ingest is not None
        ingest.append([content])
        assert one.reserve(digest, len(content)) == [True]
        assert one.machine_runs(one.room.keep(ingest)) == [None]
        one.release(digest)
        first.machine.advance(100)
    assert first.reserved == 600
    assert [first.blobs.exists(Digest.of(content)) for content in (old, new)] == [False, True]


def test_what_was_written_otherwise_is_counted(first: First, workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    one.machine_runs(one.room.count(ONE, 250))
    assert first.reserved == 250


def test_uses_are_told_together_and_keep_a_content(first: First, workers: tuple[Worker, Worker]) -> None:
    one, _ = workers
    for content in (b"a" * 400, b"b" * 400):
        first.blobs.put(content, Digest.of(content))
        one.machine_runs(one.room.count(Digest.of(content), 400))
        first.machine.advance(100)
    for _ in range(3):
        one.room.hold(Digest.of(b"a" * 400))
        one.room.let_go(Digest.of(b"a" * 400))
    first.machine.advance(10)
    first.machine.settle()
    one.reserve(THIRD, 400)
    assert [first.blobs.exists(Digest.of(letter * 400)) for letter in (b"a", b"b")] == [True, False]
    assert first.machine.getDelayedCalls() == []


def test_very_many_uses_fit_into_messages(
    first: First, workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = workers
    used: list[Digest] = []
    monkeypatch.setattr(first.cache, "note_use", used.append)
    digests = [Digest.of(str(number).encode(), "sha512") for number in range(elsewhere._MOST_TOLD + 1)]
    for digest in digests:
        one.room.hold(digest)
    first.machine.settle()
    assert len(used) == elsewhere._MOST_TOLD
    first.machine.advance(10)
    first.machine.settle()
    assert set(used) == set(digests)


def test_what_the_cache_holds_is_the_same_to_all(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    one.reserve(THIRD, 400)
    for room in (first.room, one.room, other.room):
        taken: list[object] = []
        Deferred.fromCoroutine(room.taken()).addBoth(taken.append)
        first.machine.settle()
        assert taken == [(400, LIMIT)]


# turns


class Turn:
    """Someone who wants a turn, and has it until told."""

    def __init__(self, machine: Machine, turns: Turns | TurnsElsewhere, key: str = "a/b") -> None:
        self._machine = machine
        self._go: Deferred[None] = Deferred()
        self.has = False
        self.failure: Failure | None = None
        self.deferred = Deferred.fromCoroutine(self._have(turns, key))
        self.deferred.addErrback(self._failed)
        machine.settle()

    async def _have(self, turns: Turns | TurnsElsewhere, key: str) -> None:
        async with turns.of(key):
            self.has = True
            try:
                await self._go
            finally:
                self.has = False

    def _failed(self, failure: Failure) -> None:
        self.failure = failure

    def end(self) -> None:
        self._go.callback(None)
        self._machine.settle()

    def cancel(self) -> None:
        self.deferred.cancel()
        self._machine.settle()


def test_one_at_a_time_in_the_order_they_asked(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    waiting = [Turn(first.machine, turns) for turns in (one.turns, first.turns, other.turns, one.turns, first.turns)]
    while waiting:
        assert [turn.has for turn in waiting] == [True] + [False] * (len(waiting) - 1)
        waiting.pop(0).end()
    assert first.turns._locks == {}


def test_another_repository_is_not_waited_for(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    turns = [Turn(first.machine, one.turns, "a"), Turn(first.machine, other.turns, "b")]
    assert [turn.has for turn in turns] == [True, True]
    for turn in turns:
        turn.end()


def test_who_does_not_wait_any_longer_gets_no_turn(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    having, leaving, next_one = (Turn(first.machine, turns) for turns in (one.turns, other.turns, one.turns))
    leaving.cancel()
    assert leaving.failure is not None and leaving.failure.check(CancelledError)
    having.end()
    assert next_one.has
    next_one.end()
    assert first.turns._locks == {}


def test_who_leaves_in_its_turn_ends_it(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    having, waiting = Turn(first.machine, one.turns), Turn(first.machine, other.turns)
    having.cancel()
    assert waiting.has
    waiting.end()


def test_who_leaves_while_the_turn_is_on_its_way_to_it(first: First, workers: tuple[Worker, Worker]) -> None:
    """The one says that it has ended what the other says has begun."""
    one, other = workers
    having, leaving = Turn(first.machine, first.turns), Turn(first.machine, one.turns)
    having._go.callback(None)  # and nobody has read yet that it was given on
    leaving.deferred.cancel()
    first.machine.settle()
    waiting = Turn(first.machine, other.turns)
    assert waiting.has
    waiting.end()
    assert first.turns._locks == {}


def test_who_dies_has_and_gets_no_turn_any_more(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    Turn(first.machine, one.turns)
    Turn(first.machine, one.turns)
    waiting = Turn(first.machine, other.turns)
    one.die()
    assert waiting.has
    waiting.end()
    assert first.turns._locks == {}


def test_what_fails_in_a_turn_ends_it(first: First, workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    having, waiting = Turn(first.machine, one.turns), Turn(first.machine, other.turns)
    having._go.errback(Failure(OSError()))  # type: ignore[no-untyped-call]
    first.machine.settle()
    assert waiting.has
    waiting.end()


class Order(RuleBasedStateMachine):
    """Workers and the first process, of whom some leave or die while they wait; a list is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = First(Path(os.devnull))
        self.workers = [Worker(self.first) for _ in range(2)]
        self.queue: list[tuple[Turn, int]] = []

    @rule(who=st.integers(0, 2))
    def ask(self, who: int) -> None:
        turns = self.workers[who].turns if who < 2 else self.first.turns
        self.queue.append((Turn(self.first.machine, turns), who))

    @precondition(lambda self: self.queue)
    @rule()
    def end(self) -> None:
        self.queue.pop(0)[0].end()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))[0].cancel()

    @rule(who=st.integers(0, 1))
    def die(self, who: int) -> None:
        self.workers[who].die()
        self.workers[who] = Worker(self.first)
        self.queue = [(turn, whose) for turn, whose in self.queue if whose != who]

    @invariant()
    def the_first_of_the_queue_has_the_turn(self) -> None:
        assert [turn.has for turn, _ in self.queue] == [index == 0 for index in range(len(self.queue))]

    def teardown(self) -> None:
        for worker in self.workers:
            worker.die()
        for turn, who in self.queue:
            if who == 2:
                turn.end()


TestOrder = Order.TestCase
TestOrder.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
