"""The table of connections: each client's share, the reserve for clients with few, and idle ones that make room.

The test plays the processes: it increments their counters when a connection closes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher

from dockerproxy.errors import RegistryError, ServiceOverloaded, TooManyRequests
from dockerproxy.workers.connection_table import ConnectionTable, connection_limit
from dockerproxy.workers.scoreboard import Scoreboard


@define
class Processes:
    """A table of some processes with open connections."""

    limit: int
    share: int | None = None
    count: int = 2
    shared_addresses: frozenset[str] = frozenset()
    clock: Clock = field(factory=Clock)
    relieved: list[str] = field(factory=list)
    scoreboard: Scoreboard = field(init=False)
    table: ConnectionTable = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.scoreboard = Scoreboard.create(self.count, self.limit)
        self.table = ConnectionTable(
            self.clock, self.scoreboard, self.relieved.append, self.share, self.shared_addresses
        )

    def give(self, process: int, client: str) -> Callable[[], None]:
        """Give a connection to a process, and return the function that closes it."""
        index = self.table.index_of(process, client)
        self.table.add(process, client)
        return lambda: self.scoreboard.slot(process).count_closed(index)

    def connect(self, client: str, process: int = 0) -> Callable[[], None]:
        """Like `give`, if the table does not refuse it."""
        error = self.table.refusal(client)
        if error is not None:
            raise error
        return self.give(process, client)


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["open", "close", "end"]), st.integers(0, 2), st.sampled_from("abcdef"))),
)
def test_counts_are_those_of_the_open_connections(count: int, events: list[tuple[str, int, str]]) -> None:
    """Connections open and close in all processes, and processes end: no client holds more or less than it has."""
    processes = Processes(5, 3, count)
    connections: list[tuple[int, str, Callable[[], None]]] = []
    for event, number, client in events:
        number %= count
        if event == "open":
            held = sum(1 for _, other, _ in connections if other == client)
            error = processes.table.refusal(client)
            assert (error is None) == (held < 3 and len(connections) < 5)
            if error is None:
                connections.append((number, client, processes.give(number, client)))
        elif event == "close":
            for connection in [entry for entry in connections if entry[:2] == (number, client)][:1]:
                connection[2]()
                connections.remove(connection)
        elif number:
            processes.table.reset(number)
            connections = [entry for entry in connections if entry[0] != number]
        open_in = [processes.table.open_in(process) for process in range(count)]
        assert open_in == [sum(entry[0] == process for entry in connections) for process in range(count)]
    report = processes.table.report()
    assert report["used"] == len(connections)
    assert report["clients"] == Counter(client for _, client, _ in connections)


def test_one_client_may_have_half_of_all() -> None:
    processes = Processes(200)
    close = [processes.connect("192.0.2.1", number % 2) for number in range(100)]
    with pytest.raises(TooManyRequests, match=r"192\.0\.2\.1 has 100 of the 100 .* \(MAX_CONNECTIONS_PER_CLIENT\)"):
        processes.connect("192.0.2.1")
    processes.connect("192.0.2.2")
    close[1]()
    processes.connect("192.0.2.1")


def test_a_reverse_proxy_has_no_share() -> None:
    processes = Processes(80, 2, shared_addresses=frozenset({"192.0.2.1"}))
    for _ in range(70):
        processes.connect("192.0.2.1")
    with pytest.raises(ServiceOverloaded):
        processes.connect("192.0.2.1")
    processes.connect("192.0.2.2")
    processes.connect("192.0.2.2")
    with pytest.raises(TooManyRequests):
        processes.connect("192.0.2.2")


def test_ipv6_clients_count_by_network() -> None:
    processes = Processes(20, 2)
    processes.connect("2001:db8::1")
    processes.connect("2001:db8::2")
    with pytest.raises(TooManyRequests):
        processes.connect("2001:db8::3")
    processes.connect("2001:db8:0:1::3")


def test_a_client_with_few_connections_gets_in_when_others_have_almost_all() -> None:
    processes = Processes(800)
    for client in ("192.0.2.1", "192.0.2.2"):
        for _ in range(350):
            processes.connect(client)
    with pytest.raises(ServiceOverloaded, match="have 700 of the 700 open connections that they may have"):
        processes.connect("192.0.2.1")
    for _ in range(16):
        processes.connect("192.0.2.3")
    with pytest.raises(ServiceOverloaded):
        processes.connect("192.0.2.3")
    for number in range(84):
        processes.connect(f"198.51.100.{number}")
    with pytest.raises(ServiceOverloaded):
        processes.connect("192.0.2.4")


def test_idle_connections_of_the_client_with_most_are_closed_when_few_are_free() -> None:
    processes = Processes(80, 60)
    for client, count in (("192.0.2.1", 50), ("192.0.2.2", 19)):
        for _ in range(count):
            processes.connect(client)
    assert processes.relieved == []
    for _ in range(3):
        processes.connect("192.0.2.3")
    assert processes.relieved == ["192.0.2.1"]  # once a second
    processes.clock.advance(1)
    processes.connect("192.0.2.3")
    assert processes.relieved == ["192.0.2.1"] * 2


def test_nobody_is_relieved_if_all_have_few() -> None:
    processes = Processes(16)
    for number in range(16):
        processes.connect(f"192.0.2.{number}")
    with pytest.raises(ServiceOverloaded):
        processes.connect("198.51.100.1")
    assert processes.relieved == []


def test_idle_connections_of_a_client_at_its_share_are_closed() -> None:
    processes = Processes(80, 5)
    for _ in range(5):
        processes.connect("192.0.2.1")
    for _ in range(3):
        with pytest.raises(TooManyRequests):
            processes.connect("192.0.2.1")
    assert processes.relieved == ["192.0.2.1"]


def test_more_clients_than_counters_come_and_go() -> None:
    """A counter is used again after the connections of its client have closed."""
    processes = Processes(4)
    for number in range(100):
        processes.connect(f"192.0.2.{number}", number % 2)()


def test_refusals_are_counted_and_each_client_is_logged_once_a_minute() -> None:
    events: list[LogEvent] = []
    processes = Processes(80, 1)
    processes.connect("192.0.2.1")
    processes.connect("192.0.2.2")
    globalLogPublisher.addObserver(events.append)
    try:
        for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1"):
            assert isinstance(processes.table.refusal(client), RegistryError)
        processes.clock.advance(60)
        processes.table.refusal("192.0.2.1")
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert [event["client"] for event in events] == ["192.0.2.1", "192.0.2.2", "192.0.2.1"]
    assert processes.table.report()["refused"] == 5


@pytest.mark.parametrize(
    ("descriptors", "processes", "limit"),
    [
        (65_536, 1, 28_640),
        (65_536, 8, 65_536),
        (1024, 1, 416),
        (1024, 2, 832),
        (300, 1, 99),
        (64, 2, 2),
        (2**20, 1, 65_536),
    ],
)
def test_the_limit_leaves_descriptors_to_the_daemon(descriptors: int, processes: int, limit: int) -> None:
    assert connection_limit(descriptors, processes) == limit
