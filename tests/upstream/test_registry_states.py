"""The log of registries that stop to answer and answer again: one line for each change, over all processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher

from dockerproxy.errors import UpstreamTimeout, UpstreamUnreachable
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.registry_states import MAX_OUTAGES, OUTAGE_WINDOW, RegistryStates
from dockerproxy.upstream.silent_servers import PROBE_INTERVAL, SilentServers

QUAY, HUB = Registry.parse("quay.io"), Registry.parse("registry-1.docker.io")
REFUSED = "quay.io:443: connection refused"
BEGINS = "quay.io does not answer: connection refused; serving what is cached"


class States:
    """The states of registries, and what they have logged."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000.0)
        self.lines: list[str] = []
        self.levels: set[str] = set()
        self.stale: Counter[str] = Counter()
        listed = {QUAY, HUB}
        self.states = RegistryStates(
            self.clock, self.clock.seconds, lambda registry: registry in listed, self.stale.__getitem__
        )

    def observe(self, event: dict[str, object]) -> None:
        if event.get("log_namespace") == "dockerproxy.upstream.registry_states":
            self.lines.append(str(event["log_format"]).format(**event))
            self.levels.add(event["log_level"].name)  # type: ignore[attr-defined]

    def report(self, failure: str, origin: Registry = QUAY) -> None:
        self.states.report(origin.origin, failure)


@pytest.fixture
def states() -> Iterator[States]:
    states = States()
    globalLogPublisher.addObserver(states.observe)
    yield states
    globalLogPublisher.removeObserver(states.observe)


def test_one_line_for_each_change(states: States) -> None:
    for _ in range(3):
        states.report(REFUSED)
    states.stale["quay.io"] += 31
    states.clock.advance(14 * 60)
    assert states.states.report_list() == [
        {"registry": "quay.io", "reason": "connection refused", "since": 1_700_000_000.0, "stale": 31}
    ]
    for _ in range(3):
        states.report("")
    assert states.lines == [BEGINS, "quay.io answers again after 14 min, 31 answers were stale"]
    assert states.levels == {"warn"}
    assert states.states.report_list() == []


@pytest.mark.parametrize(
    ("origin", "failure", "line"),
    [
        ("quay.io", "quay.io:443: timed out, not connected after 60 s", "quay.io does not answer: connection timed"),
        ("quay.io", "quay.io:443: timed out, received nothing for 60 s", "quay.io does not answer: timed out, rec"),
        ("registry-1.docker.io", "registry-1.docker.io:443: no such name", "docker.io does not answer: no such name;"),
        ("auth.docker.io", "auth.docker.io:443: connection refused", "auth.docker.io does not answer: connection ref"),
        ("http://a.test:5000", "the upstream proxy refused", "a.test:5000 does not answer: the upstream"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_server_once(states: States, origin: str, failure: str, line: str) -> None:
    states.report(failure, Registry.parse(origin))
    assert states.lines[0].startswith(line)


@pytest.mark.parametrize(
    ("seconds", "stale", "text"),
    [
        (2.5, 1, "after 2 s, 1 answer was stale"), (119, 0, "after 119 s, 0 answers were stale"),
        (7199, 2, "after 119 min, 2 answers were stale"), (90_000, 2, "after 25 h, "), (400_000, 2, "after 4 days, "),
        (-50, 0, "after 0 s, "),
    ],
)  # fmt: skip
def test_the_end_says_how_long_it_took(states: States, seconds: float, stale: int, text: str) -> None:
    states.stale["quay.io"] = 5
    states.report(REFUSED)
    states.clock.rightNow += seconds  # the wall clock may be set back
    states.stale["quay.io"] += stale
    states.report("")
    assert text in states.lines[1]


def test_another_cause_is_no_change(states: States) -> None:
    states.report(REFUSED)
    states.report("quay.io:443: timed out, not connected after 60 s")
    assert len(states.lines) == 1
    assert states.states.report_list()[0]["reason"] == "connection timed out"


def test_the_answer_of_an_unknown_server_is_no_change(states: States) -> None:
    states.report("")
    assert states.lines == []


def test_a_registry_that_changes_all_the_time_is_logged_a_few_times(states: States) -> None:
    for _ in range(500):
        states.report(REFUSED)
        states.clock.advance(0.1)
        states.report("")
        states.clock.advance(0.1)
    assert len(states.lines) == 2 * MAX_OUTAGES
    states.report(REFUSED)
    states.clock.advance(OUTAGE_WINDOW)  # this outage lasts
    assert states.lines[2 * MAX_OUTAGES :] == [BEGINS]
    states.report("")
    assert len(states.lines) == 2 * MAX_OUTAGES + 2
    states.clock.advance(OUTAGE_WINDOW)
    assert states.clock.calls == []


def test_servers_that_clients_choose_cannot_fill_the_log(states: States) -> None:
    """A wildcard of REGISTRIES covers any number of names."""
    states.report("quay.io:443: connection refused")
    for number in range(5000):
        origin = Registry.parse(f"x{number}.example.com")
        states.report(f"{origin.host.authority}: no such name", origin)
    assert len(states.lines) == 11
    states.report("")
    assert states.lines[-1].startswith("quay.io answers again")
    states.clock.advance(61)
    states.report("x.example.com:443: no such name", Registry.parse("x.example.com"))
    assert states.lines[-1].startswith("x.example.com does not")
    assert len(states.states.report_list()) <= 64


@given(st.lists(st.tuples(st.sampled_from(["", REFUSED]), st.floats(0, 500)), max_size=40))
def test_outages_and_answers_take_turns(changes: list[tuple[str, float]]) -> None:
    states = States()
    globalLogPublisher.addObserver(states.observe)
    try:
        for failure, seconds in changes:
            states.report(failure)
            states.clock.advance(seconds)
    finally:
        globalLogPublisher.removeObserver(states.observe)
    for index, line in enumerate(states.lines):
        assert line.startswith("quay.io answers again" if index % 2 else "quay.io does not answer")
    down = bool(changes) and changes[-1][0] != ""
    assert bool(states.states.report_list()) == down


class Processes:
    """Processes that tell each other of silent servers; the first one keeps the states."""

    def __init__(self, states: States) -> None:
        self.processes = [SilentServers(states.clock, 20.0) for _ in range(3)]
        self.processes[0].set_on_state_changed(states.states.report)
        self.messages = 0
        for process in self.processes:
            for other in self.processes:
                if other is not process:
                    process.subscribe(self._relay(other))

    def _relay(self, other: SilentServers):  # type: ignore[no-untyped-def]
        def relay(origin: str, message: str, seconds: float) -> None:
            self.messages += 1
            other.add(origin, message, seconds)

        return relay

    def request(self, process: int, error: Exception | None) -> None:
        """Connect to quay.io, and get a response, or fail with `error` at once."""

        async def attempt() -> str:
            if error is not None:
                raise error
            return "connection"

        async def connect() -> None:
            servers = self.processes[process]
            await servers.connect(QUAY, attempt, attempt)

        Deferred.fromCoroutine(connect()).addErrback(lambda failure: failure.trap(type(error)))


@pytest.mark.parametrize("error", [UpstreamUnreachable(REFUSED, "refused"), UpstreamTimeout(REFUSED)])
def test_one_line_over_all_processes(states: States, error: Exception) -> None:
    """Whichever process finds out, and whichever is answered first."""
    processes = Processes(states)
    for process in (1, 2, 0, 1, 2):
        processes.request(process, error)
    assert states.lines == [BEGINS]
    if isinstance(error, UpstreamTimeout):
        states.clock.advance(PROBE_INTERVAL)  # its probe asks again on behalf of all
        assert states.lines == [BEGINS]
        processes.processes[1].add(QUAY.origin, "", 0.0)
        processes.processes[0].add(QUAY.origin, "", 0.0)
    else:
        states.clock.advance(PROBE_INTERVAL)
        processes.request(2, None)
    assert states.lines == [BEGINS, "quay.io answers again after 5 s, 0 answers were stale"]
    sent = processes.messages
    for process in (0, 1, 2):
        processes.request(process, None)
    assert processes.messages == sent  # nothing is said about a server that goes on to answer
    for silent_servers in processes.processes:
        silent_servers.close()


@pytest.mark.parametrize(
    ("error", "is_silent"), [(UpstreamUnreachable(REFUSED, "refused"), False), (UpstreamTimeout(REFUSED), True)]
)
def test_a_new_process_knows_which_servers_do_not_answer(states: States, error: Exception, is_silent: bool) -> None:
    processes = Processes(states)
    processes.request(0, error)
    new = SilentServers(states.clock, 20.0)
    new.subscribe(processes.processes[0].add)
    processes.processes.append(new)
    [news] = processes.processes[0].news()
    assert (news[:2], news[2] > 0) == ((QUAY.origin, REFUSED), is_silent)
    new.add(*news)
    processes.processes[0].close()
    states.clock.advance(news[2])
    processes.request(3, None)
    assert [line.partition(" after ")[0] for line in states.lines] == [BEGINS, "quay.io answers again"]
    assert processes.processes[0].news() == []


def test_a_server_that_refuses_after_its_silence_does_not_answer_yet(states: States) -> None:
    processes = Processes(states)
    processes.request(1, UpstreamTimeout("quay.io:443: timed out, not connected after 60 s"))
    processes.processes[1].add(QUAY.origin, REFUSED, 0.0)
    processes.processes[0].add(QUAY.origin, REFUSED, 0.0)
    assert states.states.report_list()[0]["reason"] == "connection refused"
    processes.request(1, None)
    assert len(states.lines) == 2 and "connection timed out" in states.lines[0]
    for silent_servers in processes.processes:
        silent_servers.close()
