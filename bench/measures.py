"""The measures. Every round takes each server once, so that what the machine does besides falls on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

from bench.clients import Load
from bench.loads import Handshakes, Resource, download, idle, new_connections, sip, small_requests
from bench.stage import Serving, Stage
from bench.table import NGINX, PROXY, Table

_T = TypeVar("_T")

MANY = 8
"""Clients of the loads that are not for one client."""

_SMALL_CLIENTS, _CONNECTIONS_EACH = 4, 8
_CONNECTING_CLIENTS = 4
_GB, _MB, _KIB, _MICRO = 1e9, 1e6, 1024, 1e6


def hit(stage: Stage, table: Table) -> None:
    """A blob that is cached, read whole."""
    with ExitStack() as stack:
        servings = _all(stage, stack)
        # A line in the log for each GiB is soon measured; the many clients take long enough without it.
        for count, those in ((1, servings), (MANY, servings[:2])):
            for serving in _rounds(stage, those, ("hit", _clients(count))):
                load = stage.clients.run(count, serving.server, download, serving.target, stage.big)
                note_bytes(table, "hit", _clients(count), serving.name, load, count * stage.big.size)


def miss(stage: Stage, table: Table) -> None:
    """A blob that is not cached: by one client, and by several that ask for it at the same moment."""
    for count in (1, MANY):
        case = _clients(count)
        for round_ in range(stage.scale.rounds):
            for serve in turned(round_, [stage.empty_proxy, stage.caching_nginx]):
                with serve() as serving:
                    tell("miss", case, serving.name)
                    mark = stage.origin_mark()
                    load = stage.clients.run(count, serving.server, download, serving.target, stage.big)
                    note_bytes(table, "miss", case, serving.name, load, count * stage.big.size)
                    blobs = stage.origin_sent(mark) / stage.big.size
                    table.add("miss", case, serving.name, "from upstream", "blobs", blobs)


def small(stage: Stage, table: Table) -> None:
    """Small blobs that are cached, one after the other on connections that stay open."""
    case = f"{_SMALL_CLIENTS * _CONNECTIONS_EACH} connections"
    with ExitStack() as stack:
        for serving in _rounds(stage, _all(stage, stack), ("small", case)):
            load = stage.clients.run(
                _SMALL_CLIENTS,
                serving.server,
                small_requests,
                serving.target,
                stage.small,
                _CONNECTIONS_EACH,
                stage.scale.small_seconds,
            )
            note_count(table, "small", case, serving.name, load, sum(load.results), "request")


def connect(stage: Stage, table: Table) -> None:
    """New connections, each for one small blob that is cached."""
    with ExitStack() as stack:
        servings = _all(stage, stack)
        for case, resume in (("full handshake", False), ("session resumed", True)):
            for serving in _rounds(stage, servings, ("connect", case)):
                load = stage.clients.run(
                    _CONNECTING_CLIENTS,
                    serving.server,
                    new_connections,
                    serving.target,
                    stage.small,
                    stage.scale.small_seconds,
                    resume=resume,
                )
                done: list[Handshakes] = load.results
                count = sum(each.count for each in done)
                note_count(table, "connect", case, serving.name, load, count, "connection")
                if resume:
                    resumed = 100 * sum(each.resumed for each in done) / count
                    table.add("connect", case, serving.name, "resumed", "%", resumed)


def memory(stage: Stage, table: Table) -> None:
    """What the resident set grows by for each connection."""
    count = stage.scale.memory_connections
    for case, job, blob in ((f"{count} slow clients", sip, stage.big), (f"{count} idle", idle, stage.small)):
        for name in (PROXY, NGINX):
            with ExitStack() as stack:
                # A process that has served before would take the memory that it has left over.
                serving = _fresh(stage, stack, name)
                tell("memory", case, name)
                before, *seen = _resident(stage, serving, job, blob)
                for figure, value in (("at most", max(seen)), ("at the end", seen[-1])):
                    table.add("memory", case, name, figure, "KiB", (value - before) / count / _KIB)
                table.add("memory", case, name, "without them", "MiB", before / _KIB / _KIB)


def _resident(stage: Stage, serving: Serving, job: Callable[..., None], blob: Resource) -> list[int]:
    """Return the resident set before a load of many connections, and as it was seen while that lasted."""
    scale, server = stage.scale, serving.server
    seen = [server.resident()]
    stage.clients.run(
        1,
        server,
        job,
        serving.target,
        blob,
        scale.memory_connections,
        scale.memory_seconds,
        meanwhile=lambda: seen.append(server.resident()),
    )
    return seen


def _fresh(stage: Stage, stack: ExitStack, name: str) -> Serving:
    if name == PROXY:
        return stack.enter_context(stage.filled_proxy())
    return stack.enter_context(stage.static_nginx())[0]


def _all(stage: Stage, stack: ExitStack) -> list[Serving]:
    """Start the servers of what is cached."""
    return [stack.enter_context(stage.filled_proxy()), *stack.enter_context(stage.static_nginx())]


def _rounds(stage: Stage, servings: Sequence[Serving], what: tuple[str, str]) -> Iterator[Serving]:
    for round_ in range(stage.scale.rounds):
        for serving in turned(round_, servings):
            tell(*what, serving.name)
            yield serving


def turned(round_: int, each: Sequence[_T]) -> Sequence[_T]:
    """Return the order of a round: every other one goes backwards, so that a drift favours nobody."""
    return each[::-1] if round_ % 2 else each


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def tell(measure: str, case: str, server: str) -> None:
    """Say what is measured next."""
    print(f"{measure}: {case}: {server}", file=sys.stderr, flush=True)


def note_bytes(table: Table, measure: str, case: str, server: str, load: Load, size: int) -> None:
    """Note a load in which `size` bytes went to clients, or came from them."""
    busy = load.server_cpu / load.wall
    table.add(measure, case, server, "throughput", "MB/s", size / load.wall / _MB, busy=busy)
    table.add(measure, case, server, "server CPU", "s/GB", load.server_cpu / size * _GB)
    table.add(measure, case, server, "clients' CPU", "s/GB", load.clients_cpu / size * _GB)


def note_count(table: Table, measure: str, case: str, server: str, load: Load, count: int, unit: str) -> None:
    """Note a load in which something was done `count` times."""
    busy = load.server_cpu / load.wall
    table.add(measure, case, server, f"{unit}s", "/s", count / load.wall, busy=busy)
    table.add(measure, case, server, "server CPU", "µs each", load.server_cpu / count * _MICRO)
    table.add(measure, case, server, "clients' CPU", "µs each", load.clients_cpu / count * _MICRO)


MEASURES: dict[str, Callable[[Stage, Table], None]] = {
    "hit": hit,
    "miss": miss,
    "small": small,
    "connect": connect,
    "memory": memory,
}
