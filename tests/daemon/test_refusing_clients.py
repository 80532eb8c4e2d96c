"""The clients that refused our certificate are bounded, and forgotten after a day."""

from __future__ import annotations

from twisted.internet.task import Clock

from dockerproxy.daemon.refusing_clients import REFUSAL_TTL, RefusingClients


def test_the_last_refusal_of_each_client_counts_for_a_day() -> None:
    clock = Clock()
    clients = RefusingClients(clock.seconds)
    clients.add("10.0.0.7")
    clock.advance(100)
    clients.add("10.0.0.7")
    clients.add("fd00::1")
    clients.add("fd00::2")  # a host has as many addresses as it likes
    assert clients.last_refusals() == {"10.0.0.7": 100.0, "fd00::/64": 100.0}
    clock.advance(REFUSAL_TTL)
    assert clients.last_refusals() == {}


def test_the_table_is_bounded() -> None:
    clients = RefusingClients(Clock().seconds)
    for number in range(5000):
        clients.add(f"10.0.{number // 256}.{number % 256}")
    assert len(clients.last_refusals()) == 1000
