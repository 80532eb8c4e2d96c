"""The open client connections of all processes: each client's share of them, and room for others when they run out.

It belongs to the main process, which accepts all connections. A process reports the end of one without a message: it
increments a counter in shared memory that the main process chose for the client (`scoreboard`). The main process looks
at these counters when it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any

from attrs import define
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.errors import RegistryError
from dockerproxy.shares import BoundReport, ClientShares, client_key
from dockerproxy.workers.scoreboard import Scoreboard, Slot

_RESERVED_DESCRIPTORS = 64  # of the daemon itself: ports, log, control socket, messages to other processes
_MAX_CONNECTIONS = 65_536  # idle ones take about a GiB
_FEW = 16  # connections; clients with fewer may also use the last eighth
_RESERVED_PART = 8
_RELIEF_INTERVAL = 1.0  # seconds between two requests to close idle connections
_LOG_INTERVAL = 60.0  # seconds between two log lines about one client
_MAX_LOGGED = 1000

log = Logger()

CloseIdle = Callable[[str], None]
"""Closes the longest idle half of a client's idle connections in all processes."""


def connection_limit(descriptors: int, processes: int) -> int:
    """Return how many client connections `processes` processes with this limit of open files can have together.

    A connection needs another descriptor for the file that it is sent, or for the tunnel's other end. An eighth is for
    downloads, whose connections and files are beside those of their readers.
    """
    per_process = (descriptors - _RESERVED_DESCRIPTORS - descriptors // 8) // 2
    return min(_MAX_CONNECTIONS, processes * max(1, per_process))


@define
class _Given:
    """The connections of one client that a process was given."""

    index: int  # of the counter that the process increments when it closes one
    closed: int  # the value of the counter when it was last read
    open: int = 0


class GivenConnections:
    """The connections of each client that one process was given and that were not yet seen to be closed."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._clients: dict[str, _Given] = {}
        self._free: list[int] = []
        self._next_index = 0

    @property
    def full(self) -> bool:
        """Whether there is no counter for another client, until those of closed connections are collected."""
        return not self._free and self._next_index == self._slot.clients

    def index_of(self, client: str) -> int:
        """Return the index of the counter for `client`, which is new if the process has no connection of it."""
        if client not in self._clients:
            if self._free:
                index = self._free.pop()
            else:
                index, self._next_index = self._next_index, self._next_index + 1
            self._clients[client] = _Given(index, self._slot.closed_by_client(index))
        return self._clients[client].index

    def add(self, client: str) -> None:
        """Note that the process was given a connection, with the index that `index_of` returned."""
        self._clients[client].open += 1

    def collect(self, client: str) -> int:
        """Return the number of connections of `client` that the process has closed since the last call."""
        given = self._clients.get(client)
        if given is None:
            return 0
        closed = self._slot.closed_by_client(given.index)
        count, given.closed = closed - given.closed, closed
        given.open -= count
        if not given.open:
            del self._clients[client]
            self._free.append(given.index)
        return count

    def open_by_client(self) -> dict[str, int]:
        """Return the number of open connections of each client, as far as it is known."""
        return {client: given.open for client, given in self._clients.items()}


class ConnectionTable:
    """The connections of all processes. `share` is how many one client may have; by default half of all.

    If seven eighths of all are in use, only clients with a few connections get more. Then, and if a client exceeds its
    share, `close_idle` is called with the client that has most. `clock` is the reactor. `shared_addresses` are those of
    reverse proxies, which have no share, because each stands for many clients.
    """

    def __init__(
        self,
        clock: Any,
        scoreboard: Scoreboard,
        close_idle: CloseIdle,
        share: int | None = None,
        shared_addresses: Container[str] = (),
    ) -> None:
        limit = scoreboard.clients  # each connection may be another client's
        self._shares = ClientShares(
            "open connections",
            limit,
            min(limit, share or max(1, limit // 2)),
            limit_setting="the limit of open files, LimitNOFILE=",
            share_setting="MAX_CONNECTIONS_PER_CLIENT",
            reserved=limit // _RESERVED_PART,
        )
        self._clock = clock
        self._close_idle = close_idle
        self._shared_addresses = shared_addresses
        self._slots = [scoreboard.slot(number) for number in range(scoreboard.processes)]
        self._given = [GivenConnections(slot) for slot in self._slots]
        self._accepted = [0] * scoreboard.processes  # connections that each process was given
        self._next_relief = 0.0
        self._logged: BoundedDict[str, bool] = BoundedDict(_MAX_LOGGED, ttl=_LOG_INTERVAL, clock=clock.seconds)

    def open_in(self, process: int) -> int:
        """Return the number of open connections of a process."""
        return self._accepted[process] - self._slots[process].closed_connections

    def refusal(self, client: str) -> RegistryError | None:
        """Return why a new connection of `client` is to be refused, or None. Log a refusal, once a minute a client."""
        has_share = client not in self._shared_addresses
        client = client_key(client)
        self._collect(client)
        held = self._shares.held_by(client)
        if has_share and held >= self._shares.share:
            self._relieve(client)
        else:
            open_connections = sum(map(self.open_in, range(len(self._slots))))
            free = self._shares.limit - open_connections
            if free <= self._shares.reserved:
                self._relieve(None)
            if free > (0 if held < _FEW else self._shares.reserved):
                return None
        error = self._shares.refuse(client if has_share else "")
        if client not in self._logged:
            self._logged[client] = True
            log.warn("refused a connection of {client}: {reason}", client=client, reason=error.message)
        return error

    def index_of(self, process: int, client: str) -> int:
        """Return the counter that the process increments when it closes a connection of `client`."""
        given = self._given[process]
        if given.full:
            self._collect_all()
        return given.index_of(client_key(client))

    def add(self, process: int, client: str) -> None:
        """Count a connection of `client` that the process was given, together with the index of the counter."""
        client = client_key(client)
        self._accepted[process] += 1
        self._given[process].add(client)
        self._shares.add(client)

    def serve_here(self, client: str) -> Callable[[], None]:
        """Count a connection that this process serves. Return the function to call when it has closed."""
        index = self.index_of(0, client)
        self.add(0, client)
        return partial(self._slots[0].count_closed, index)

    def reset(self, process: int) -> None:
        """Forget the connections of a process that has ended."""
        for client, count in self._given[process].open_by_client().items():
            self._shares.release(client, count)
        self._given[process] = GivenConnections(self._slots[process])
        self._slots[process].reset()
        self._accepted[process] = 0

    def report(self) -> BoundReport:
        """Return the state for `dockerproxy debug`."""
        self._collect_all()
        return self._shares.report()

    def _collect(self, client: str) -> None:
        """Take note of the connections of `client` that were closed."""
        for given in self._given:
            if count := given.collect(client):
                self._shares.release(client, count)

    def _collect_all(self) -> None:
        for client in self._shares.holders:
            self._collect(client)

    def _relieve(self, client: str | None) -> None:
        """Have idle connections of `client`, or of the one with the most connections, closed. At most once a second."""
        now = self._clock.seconds()
        if now < self._next_relief:
            return
        self._next_relief = now + _RELIEF_INTERVAL
        if client is None:
            self._collect_all()
            client = next((top for top, count in self._shares.top_clients(1) if count > _FEW), None)
        if client is not None:
            self._close_idle(client)
