"""The workers as the first process has them. No processes are started: the test plays their part."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from dockerproxy.cache.identity import Bindings
from dockerproxy.daemon.listener_service import Listener
from dockerproxy.http.site import Site, Timeouts
from dockerproxy.workers import crew as crew_module
from dockerproxy.workers.calls import Calls
from dockerproxy.workers.crew import Crew
from dockerproxy.workers.tally import Tally
from tests.workers.by_hand import Reactor

GRACE = 25.0
LABEL = b"\x00\x02"
NO_PID = 2**22  # more than the kernel gives


class Machine(Reactor, Clock):
    """A reactor by hand that has a clock."""

    def __init__(self) -> None:
        Reactor.__init__(self)
        Clock.__init__(self)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        for _ in range(4):
            self.turn()


class Forks:
    """The fork server, as far as the crew knows it; `orders` are those it had."""

    started: Any
    ended: Any
    lost: Any

    def __init__(self, machine: Machine, tally: Tally) -> None:
        self.machine = machine
        self.tally = tally
        self.orders: list[Played] = []
        self.alive = True
        self.refuses = False

    def start(self, number: int, changed: Mapping[str, str], line: int, output: int | None) -> bool:
        if self.refuses or not self.alive:
            return False
        copy = None if output is None else os.dup(output)
        self.orders.append(Played(self, number, dict(changed), socket.socket(fileno=os.dup(line)), copy))
        return True

    def close(self) -> None:
        self.alive = False

    def die(self) -> None:
        self.close()
        self.lost()


@define(eq=False, slots=False)
class Played:
    """A worker's process, played by the test: it has copies of the descriptors that it was started with."""

    forks: Forks
    number: int
    changed: dict[str, str]
    end_of_line: socket.socket
    output: int | None
    asked: list[Any] = field(factory=list)
    connections: list[tuple[bytes, int]] = field(factory=list)
    signals: list[int] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        # As a worker has them (dockerproxy.worker).
        answers = {name: partial(self._note, name) for name in ("reload", "stop", "hurry", "bound")}
        self.machine = self.forks.machine
        self.tally = self.forks.tally
        self.calls = Calls(self.machine, self.end_of_line, answers, passed=self._take, lost=lambda: None)

    def _note(self, name: str, *arguments: Any) -> None:
        self.asked.append((name, *arguments))

    def _take(self, label: bytes, descriptor: int) -> None:
        os.close(descriptor)
        self.connections.append((label, descriptor))

    @property
    def pid(self) -> int:
        return NO_PID + self.number

    def get_ready(self) -> None:
        self.forks.started(self.number, self.pid)
        self.calls.tell("ready")
        self.machine.settle()

    def leave(self) -> None:
        """End, without a word of that from the fork server."""
        self.calls.line.close()
        if self.output is not None:
            os.close(self.output)
            self.output = None
        self.machine.settle()

    def end(self, why: str = "exit status 1") -> None:
        self.leave()
        self.forks.ended(self.number, why)

    def write(self, data: bytes) -> None:
        assert self.output is not None
        while data:
            data = data[os.write(self.output, data[:4096]) :]
            self.machine.settle()


class Desks:
    """Desks, and how many of them were closed."""

    def __init__(self) -> None:
        self.made = self.closed = 0
        self.answers = {"number": lambda: self.made}

    def make(self) -> Desks:
        self.made += 1
        return self

    def close(self) -> None:
        self.closed += 1


class Company:
    """A crew and its machine."""

    def __init__(self, count: int = 2, *, relayed: bool = False) -> None:
        self.machine = Machine()
        self.desks = Desks()
        self.bindings = Bindings()
        tally = Tally.make(count + 1)
        self.forks = Forks(self.machine, tally)
        self.crew = Crew(self.machine, count, self.forks, tally, self.desks.make, self.bindings, GRACE, relayed=relayed)
        self._pairs: list[socket.socket] = []

    def start(self) -> list[Played]:
        self.crew.startService()
        return list(self.forks.orders)

    def start_ready(self) -> list[Played]:
        workers = self.start()
        for worker in workers:
            worker.get_ready()
        return workers

    def connect(self) -> bool:
        """Say whether a new connection was passed on."""
        here, there = socket.socketpair()
        self._pairs += [here, there]
        passed = self.crew.pass_on(LABEL, here)
        self.machine.settle()
        return passed

    def stop(self) -> list[Any]:
        ended: list[Any] = []
        self.crew.stopService().addBoth(ended.append)
        self.machine.settle()
        return ended

    @property
    def number_started(self) -> int:
        return len(self.forks.orders)

    def close(self) -> None:
        for one in self._pairs:
            one.close()
        for worker in self.forks.orders:
            worker.leave()


@pytest.fixture
def make_company() -> Iterator[Any]:
    companies: list[Company] = []

    def make(*arguments: Any, **named: Any) -> Company:
        companies.append(Company(*arguments, **named))
        return companies[-1]

    yield make
    for company in companies:
        company.close()


@pytest.fixture
def company(make_company: Any) -> Company:
    made: Company = make_company()
    return made


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, company: Company) -> None:
    """Let the time that signs of life have be that of the machine's clock."""
    monkeypatch.setattr(crew_module.time, "monotonic_ns", lambda: int(company.machine.seconds() * 1e9))


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch, company: Company) -> None:
    """Let who is killed note that."""

    def note(pid: int, number: int) -> None:
        [worker] = [worker for worker in company.forks.orders if worker.pid == pid]
        worker.signals.append(number)

    monkeypatch.setattr(crew_module.os, "kill", note)


# how they are started


def test_each_is_told_its_number_and_has_a_line(company: Company) -> None:
    workers = company.start()
    assert [worker.number for worker in workers] == [1, 2]
    answers: list[Any] = []
    for worker in workers:
        Deferred.fromCoroutine(worker.calls.ask("number")).addBoth(answers.append)
    company.machine.settle()
    assert answers == [2, 2]
    assert {worker.output for worker in workers} == {None}


# who gets a connection


def test_who_has_the_fewest_gets_it(company: Company) -> None:
    one, other = company.start_ready()
    assert [company.connect() for _ in range(6)] == [False, True, True] * 2
    assert (len(one.connections), len(other.connections)) == (2, 2)
    for _ in range(2):
        other.tally.count_end(2)
    assert [company.connect() for _ in range(3)] == [True, True, False]
    assert (len(one.connections), len(other.connections)) == (2, 4)
    assert other.connections[0][0] == LABEL


def test_a_connection_that_ended_here_counts_no_more(company: Company) -> None:
    company.start_ready()
    [door] = company.crew.doors([Listener("PROXY_LISTEN", (), _site())])
    assert [company.connect() for _ in range(3)] == [False, True, True]
    door.site.gone()
    assert [company.connect() for _ in range(2)] == [False, False]


def test_who_is_not_ready_gets_none(company: Company) -> None:
    workers = company.start()
    assert [company.connect() for _ in range(2)] == [False, False]
    workers[1].get_ready()
    assert [company.connect() for _ in range(2)] == [True, True]
    assert not workers[0].connections


def test_who_has_died_gets_none_and_begins_again_with_none(company: Company) -> None:
    one, other = company.start_ready()
    for _ in range(6):
        company.connect()
    one.end()
    assert [company.connect() for _ in range(3)] == [False, True, False]
    company.machine.advance(1)
    company.forks.orders[2].get_ready()
    for _ in range(3):
        assert company.connect()
    assert len(company.forks.orders[2].connections) == 3
    assert len(other.connections) == 3


def test_what_has_to_be_served_here_counts(company: Company) -> None:
    company.start_ready()
    assert not company.crew.pass_on(LABEL, None)
    assert [company.connect() for _ in range(3)] == [True, True, False]


def test_where_a_line_is_full_it_is_served_here(company: Company) -> None:
    one, _ = company.start_ready()
    for worker in company.forks.orders:
        company.machine.removeReader(worker.calls.line)
    for worker in company.crew._workers:
        while not worker.line._waiting:
            worker.tell("hurry")
    assert not company.connect()
    assert not one.connections


def test_alone_it_passes_nothing_on(make_company: Any) -> None:
    company = make_company(0)
    doors = [Listener("PROXY_LISTEN", (), _site())]
    assert company.crew.doors(doors) == doors
    assert company.start() == []
    assert company.stop() == [None]


# who dies


def test_who_dies_is_replaced_after_pauses_that_grow(company: Company) -> None:
    company.start()
    pauses = []
    for _ in range(9):
        company.forks.orders[-1].end()
        before, seconds = company.number_started, 0.0
        while company.number_started == before:
            company.machine.advance(0.5)
            seconds += 0.5
        assert company.forks.orders[-1].number == 2
        pauses.append(seconds)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert company.desks.closed == 9


def test_who_was_there_for_long_is_replaced_soon(company: Company, now: None) -> None:
    company.start()
    company.machine.advance(10)
    for _ in range(3):
        worker = company.forks.orders[-1]
        for _ in range(60):
            for each in company.forks.orders:
                each.tally.note_life(each.number, int(company.machine.seconds() * 1e9))
            company.machine.advance(1)
        worker.end()
        before = company.number_started
        company.machine.advance(0.5)
        assert company.number_started == before + 1


def test_one_that_cannot_be_started_is_tried_again(make_company: Any, logged: list[LogEvent]) -> None:
    company = make_company(1)
    company.forks.refuses = True
    company.start()
    assert [event["number"] for event in logged if "why" in event] == [1]
    company.machine.advance(1)
    assert company.number_started == 0
    company.forks.refuses = False
    company.machine.advance(2)
    assert company.number_started == 1
    assert company.desks.made - company.desks.closed == 1


def test_its_desk_is_closed_with_its_line(company: Company) -> None:
    one, _ = company.start_ready()
    one.calls.line.close()
    company.machine.settle()
    assert company.desks.closed == 1
    one.end()
    assert company.desks.closed == 1


# who hangs


def test_who_gives_no_sign_of_life_is_killed_and_replaced(company: Company, now: None, kill: None) -> None:
    alive, hanging = company.start_ready()
    for _ in range(60):
        company.machine.advance(1)
        alive.tally.note_life(1, int(company.machine.seconds() * 1e9))
    assert hanging.signals == []
    for _ in range(40):
        company.machine.advance(1)
        alive.tally.note_life(1, int(company.machine.seconds() * 1e9))
    assert hanging.signals[0] == signal.SIGKILL
    assert alive.signals == []
    hanging.end()
    company.machine.advance(1)
    assert company.number_started == 3


def test_where_everything_was_halted_nobody_is_killed(company: Company, now: None, kill: None) -> None:
    workers = company.start_ready()
    company.machine.advance(300)
    for _ in range(60):
        for worker in workers:
            worker.tally.note_life(worker.number, int(company.machine.seconds() * 1e9))
        company.machine.advance(1)
    assert [worker.signals for worker in workers] == [[], []]


# when the fork server is gone


def test_without_the_fork_server_workers_go_on_and_are_not_replaced(company: Company, logged: list[LogEvent]) -> None:
    one, other = company.start_ready()
    company.forks.die()
    assert [company.connect() for _ in range(3)] == [False, True, True]
    one.leave()
    company.machine.advance(100)
    assert company.number_started == 2
    assert [company.connect() for _ in range(2)] == [False, True]
    assert len(other.connections) == 2
    levels = [event["log_level"] for event in logged if event.get("log_namespace") == crew_module.__name__]
    assert [level for level in levels if level > LogLevel.warn] == [LogLevel.critical, LogLevel.error]
    ended = company.stop()
    other.leave()
    assert ended == [None]


def test_who_had_ended_when_the_fork_server_did_so_is_not_waited_for(company: Company) -> None:
    one, other = company.start_ready()
    one.leave()
    ended = company.stop()
    other.end()
    assert ended == []
    company.forks.die()
    assert ended == [None]


def test_who_hangs_without_the_fork_server_is_killed(company: Company, kill: None) -> None:
    one, other = company.start_ready()
    company.forks.die()
    company.stop()
    company.machine.advance(GRACE)
    assert (one.signals, other.signals) == ([signal.SIGKILL], [signal.SIGKILL])


def test_the_fork_server_ends_when_all_have(company: Company) -> None:
    one, other = company.start_ready()
    company.stop()
    one.end()
    assert company.forks.alive
    other.end()
    assert not company.forks.alive


# what they tell each other


def test_whom_a_token_stands_for_is_known_to_all(company: Company) -> None:
    one, other = company.start_ready()
    one.calls.tell("bound", "own:token", "own:client")
    company.machine.settle()
    assert company.bindings.client("own:token") == "own:client"
    assert (one.asked, other.asked) == ([], [("bound", "own:token", "own:client")])
    company.bindings.bind("own:another", "own:client")
    company.machine.settle()
    assert [worker.asked[-1] for worker in (one, other)] == [("bound", "own:another", "own:client")] * 2


# reload, hurry, stop


def test_changed_settings_reach_all_and_those_who_come_later(make_company: Any) -> None:
    company = make_company(2)
    workers = company.start_ready()
    company.crew.reload({"REGISTRIES": "ghcr.io"})
    company.machine.settle()
    assert [worker.asked for worker in workers] == [[("reload", {"REGISTRIES": "ghcr.io"})]] * 2
    workers[0].end()
    company.machine.advance(1)
    assert [order.changed for order in company.forks.orders] == [{}, {}, {"REGISTRIES": "ghcr.io"}]


def test_all_are_asked_to_stop_and_waited_for(company: Company) -> None:
    workers = company.start_ready()
    ended = company.stop()
    assert [worker.asked for worker in workers] == [[("stop",)]] * 2
    assert ended == []
    for worker in workers:
        assert ended == []
        worker.end()
    assert ended == [None]
    company.machine.advance(100)
    assert company.number_started == 2
    assert company.machine.getDelayedCalls() == []


def test_those_who_are_starting_are_asked_too(company: Company) -> None:
    workers = company.start()
    company.stop()
    assert [worker.asked for worker in workers] == [[("stop",)]] * 2


def test_while_it_stops_it_serves_itself_what_still_comes(company: Company) -> None:
    workers = company.start_ready()
    company.stop()
    assert [company.connect() for _ in range(3)] == [False] * 3
    assert [worker.connections for worker in workers] == [[], []]


def test_they_may_be_asked_to_hurry(company: Company) -> None:
    workers = company.start_ready()
    company.stop()
    company.crew.hurry()
    company.machine.settle()
    assert [worker.asked for worker in workers] == [[("stop",), ("hurry",)]] * 2


def test_who_does_not_end_in_time_is_killed(company: Company, kill: None) -> None:
    one, other = company.start_ready()
    ended = company.stop()
    other.end()
    company.machine.advance(GRACE - 1)
    assert (ended, one.signals) == ([], [])
    company.machine.advance(1)
    assert (ended, one.signals, other.signals) == ([None], [signal.SIGKILL], [])


def test_who_has_died_is_not_replaced_in_the_end(company: Company) -> None:
    """The second has died, and a pause passes while the first takes its time to end."""
    one, other = company.start_ready()
    other.end()
    ended = company.stop()
    company.machine.advance(20)
    assert company.number_started == 2
    one.end()
    assert ended == [None]
    assert company.machine.getDelayedCalls() == []


# what they write


def test_what_a_worker_writes_is_logged_here_where_it_does_not_log_itself(
    make_company: Any, logged: list[LogEvent]
) -> None:
    worker = make_company(1, relayed=True).start()[0]
    worker.write(b"a line\nlast words")
    worker.end()
    assert [event["line"] for event in logged if "line" in event] == ["a line", "last words"]


def _site() -> Site:
    async def answer(request: Any) -> None: ...

    return Site(Clock(), answer, timeouts=Timeouts(), finished=lambda request, seconds: None)  # type: ignore[no-untyped-call]
