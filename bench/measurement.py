"""Helpers of the benchmarks: rounds, progress and recording.

Every round loads each server once, so that other load on the machine affects all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from bench.endpoints import RunningServer
from bench.servers import ResourceUsage
from bench.table import ResultTable
from bench.testbed import Testbed

MB = 1e6
_GB, _MICRO = 1e9, 1e6

_T = TypeVar("_T")


def each_round(
    testbed: Testbed, servers: Sequence[RunningServer], benchmark: str, case: str
) -> Iterator[RunningServer]:
    """Yield each server once in every round."""
    for round_number in range(testbed.scale.rounds):
        for server in alternate_order(round_number, servers):
            log_progress(benchmark, case, server.name)
            yield server


def alternate_order(round_number: int, items: Sequence[_T]) -> Sequence[_T]:
    """Return the order of a round. Every second round is reversed, so that a drift favours no server."""
    return items[::-1] if round_number % 2 else items


def client_count_label(count: int) -> str:
    """Return the name of the case with `count` clients."""
    return "1 client" if count == 1 else f"{count} clients"


def log_progress(benchmark: str, case: str, server: str) -> None:
    """Print to stderr which case is measured next."""
    print(f"{benchmark}: {case}: {server}", file=sys.stderr, flush=True)


def record_throughput(
    table: ResultTable, benchmark: str, case: str, server: RunningServer, usage: ResourceUsage, size: int
) -> None:
    """Record a load in which `size` bytes were sent to clients or received from them."""
    name = server.name
    table.add(
        benchmark, case, name, "throughput", "MB/s", size / usage.wall / MB, utilization=_utilization(usage, server)
    )
    table.add(benchmark, case, name, "server CPU", "s/GB", usage.server_cpu / size * _GB)
    table.add(benchmark, case, name, "clients' CPU", "s/GB", usage.clients_cpu / size * _GB)


def record_rate(
    table: ResultTable, benchmark: str, case: str, server: RunningServer, usage: ResourceUsage, count: int, unit: str
) -> None:
    """Record a load of `count` operations; `unit` is the name of one."""
    name = server.name
    table.add(benchmark, case, name, f"{unit}s", "/s", count / usage.wall, utilization=_utilization(usage, server))
    table.add(benchmark, case, name, "server CPU", "µs each", usage.server_cpu / count * _MICRO)
    table.add(benchmark, case, name, "clients' CPU", "µs each", usage.clients_cpu / count * _MICRO)


def _utilization(usage: ResourceUsage, server: RunningServer) -> float:
    return usage.server_cpu / usage.wall / server.process.workers
