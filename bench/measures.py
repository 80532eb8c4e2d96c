"""How measures measure. Every round takes each server once, so that what the machine does besides falls on all."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from bench.servers import Cost
from bench.stage import Stage
from bench.table import Table
from bench.targets import Serving

MB = 1e6
_GB, _MICRO = 1e9, 1e6

_T = TypeVar("_T")


def rounds(stage: Stage, servings: Sequence[Serving], measure: str, case: str) -> Iterator[Serving]:
    """Yield each server in every round."""
    for round_ in range(stage.scale.rounds):
        for serving in turned(round_, servings):
            tell(measure, case, serving.name)
            yield serving


def turned(round_: int, each: Sequence[_T]) -> Sequence[_T]:
    """Return the order of a round: every other one goes backwards, so that a drift favours nobody."""
    return each[::-1] if round_ % 2 else each


def clients(count: int) -> str:
    """Return the name of the case of so many clients."""
    return "1 client" if count == 1 else f"{count} clients"


def tell(measure: str, case: str, server: str) -> None:
    """Say what is measured next."""
    print(f"{measure}: {case}: {server}", file=sys.stderr, flush=True)


def note_bytes(table: Table, measure: str, case: str, serving: Serving, cost: Cost, size: int) -> None:
    """Note a load in which `size` bytes went to clients, or came from them."""
    name = serving.name
    table.add(measure, case, name, "throughput", "MB/s", size / cost.wall / MB, busy=_busy(cost, serving))
    table.add(measure, case, name, "server CPU", "s/GB", cost.server_cpu / size * _GB)
    table.add(measure, case, name, "clients' CPU", "s/GB", cost.clients_cpu / size * _GB)


def note_count(table: Table, measure: str, case: str, serving: Serving, cost: Cost, count: int, unit: str) -> None:
    """Note a load in which something was done `count` times."""
    name = serving.name
    table.add(measure, case, name, f"{unit}s", "/s", count / cost.wall, busy=_busy(cost, serving))
    table.add(measure, case, name, "server CPU", "µs each", cost.server_cpu / count * _MICRO)
    table.add(measure, case, name, "clients' CPU", "µs each", cost.clients_cpu / count * _MICRO)


def _busy(cost: Cost, serving: Serving) -> float:
    return cost.server_cpu / cost.wall / serving.server.workers
