"""The clients that refused our certificate of late: hosts that were never set up, or that trust another CA."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.shares import client_key

REFUSAL_TTL = 24 * 3600.0
"""Seconds for which a refusal counts."""

_MAX_CLIENTS = 1000


class RefusingClients:
    """The clients, as all processes know them. `clock` returns POSIX time. It belongs to the main process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._clients: BoundedDict[str, float] = BoundedDict(_MAX_CLIENTS, ttl=REFUSAL_TTL, clock=clock)

    def add(self, client: str) -> None:
        """Note that the client at an address has refused our certificate now."""
        self._clients[client_key(client)] = self._clock()

    def last_refusals(self) -> Mapping[str, float]:
        """Return the time of each client's last refusal."""
        times = {client: self._clients.get(client) for client in list(self._clients)}
        return {client: at for client, at in times.items() if at is not None}
