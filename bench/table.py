"""Figures by measure and server: medians over the rounds, and ratios, as text or JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from attrs import define, field

PROXY, NGINX, NGINX_LOGGING, REGISTRY = "proxy", "nginx", "nginx+log", "registry:2"

_BUSY = 0.85  # of a core; below it, the server waited for somebody


@define
class Row:
    """One figure of one case; `samples` has a value for each round, by server."""

    measure: str
    case: str
    figure: str
    unit: str
    samples: dict[str, list[float]] = field(factory=dict)
    waited: set[str] = field(factory=set)
    """The servers that had time to spare in some round: others set the rate that this row tells."""

    def median(self, server: str) -> float | None:
        values = self.samples.get(server)
        return statistics.median(values) if values else None

    def ratio(self, server: str) -> float | None:
        """Return the proxy's value over that of `server`."""
        ours, theirs = self.median(PROXY), self.median(server)
        return ours / theirs if ours is not None and theirs else None

    @property
    def peers(self) -> tuple[str, ...]:
        """The columns beside the proxy's that the row's measure has."""
        return (REGISTRY,) if REGISTRY in self.samples else (NGINX, NGINX_LOGGING)

    def data(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "case": self.case,
            "figure": self.figure,
            "unit": self.unit,
            "samples": self.samples,
            "medians": {server: self.median(server) for server in self.samples},
            "ratios": {server: self.ratio(server) for server in self.samples if server != PROXY},
            "waited": sorted(self.waited),
        }


@define
class Table:
    """The rows, in the order in which they came."""

    _rows: dict[tuple[str, str, str], Row] = field(factory=dict)

    def add(
        self, measure: str, case: str, server: str, figure: str, unit: str, value: float, *, busy: float = 1.0
    ) -> None:
        """Note the value of one round; `busy` says how much of a core the server used while it came about."""
        row = self._rows.setdefault((measure, case, figure), Row(measure, case, figure, unit))
        row.samples.setdefault(server, []).append(value)
        if busy < _BUSY:
            row.waited.add(server)

    def text(self, titles: Mapping[str, str]) -> str:
        """Return the table for people; `titles` says what each measure is."""
        lines: list[str] = []
        measure = case = ""
        peers: tuple[str, ...] = ()
        for row in self._rows.values():
            if row.peers != peers:
                lines += [""] if lines else []
                peers = row.peers
                lines.append(f"{'':52}{PROXY:>11}" + "".join(f"{peer:>11}{'ratio':>8}" for peer in peers))
            if row.measure != measure:
                lines += ["", titles[row.measure]]
                measure, case = row.measure, ""
            lines.append(_line(row, "" if row.case == case else row.case))
            case = row.case
        if any(row.waited for row in self._rows.values()):
            lines += [
                "",
                "* The server used less than 85 % of a core: the clients, the disk or whatever else ran on the machine",
                "  set this rate. The CPU time beside it is the server's own.",
            ]
        return "\n".join(lines)

    def json(self, machine: Mapping[str, Any]) -> str:
        """Return everything, the rounds' values too."""
        return json.dumps({"machine": machine, "rows": [row.data() for row in self._rows.values()]}, indent=1)


def _line(row: Row, case: str) -> str:
    cells = [f"  {case:24}{row.figure:17}{row.unit:9}"]
    for server in (PROXY, *row.peers):
        cells.append(f"{_number(row.median(server)) + ('*' if server in row.waited else ' '):>11}")
        if server != PROXY:
            ratio = row.ratio(server)
            cells.append(f"{'' if ratio is None else f'{ratio:.2f}':>8}")
    return "".join(cells).rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
