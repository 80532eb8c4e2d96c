"""The table of results by benchmark and server: medians over the rounds, and ratios, as text or as data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field

PROXY, NGINX, NGINX_LOGGING = "proxy", "nginx", "nginx+log"
REGISTRY, DIRECT, ALONE = "registry:2", "direct", "no fleet"
"""Names of the servers. `DIRECT` is the upstream registry, used by clients without a proxy. `ALONE` is a daemon."""

Key = tuple[str, str, str]
"""Benchmark, case and metric."""

_MIN_UTILIZATION = 0.85  # of the CPU time of its workers; below this, something else limited the rate


@define
class Row:
    """One metric of one case; `samples` has the values of all rounds for each server."""

    benchmark: str
    case: str
    metric: str
    unit: str
    samples: dict[str, list[float]] = field(factory=dict)
    underutilized: set[str] = field(factory=set)
    """The servers that were partly idle in some round, so that something else limited the rate in this row."""

    def median(self, server: str) -> float | None:
        values = self.samples.get(server)
        return statistics.median(values) if values else None

    def ratio(self, server: str) -> float | None:
        """Return the proxy's value over that of `server`."""
        proxy_value, peer_value = self.median(PROXY), self.median(server)
        return proxy_value / peer_value if proxy_value is not None and peer_value else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "case": self.case,
            "metric": self.metric,
            "unit": self.unit,
            "samples": self.samples,
            "medians": {server: self.median(server) for server in self.samples},
            "ratios": {server: self.ratio(server) for server in self.samples if server != PROXY},
            "underutilized": sorted(self.underutilized),
        }


@define
class ResultTable:
    """The rows, in the order in which they were added."""

    rows: dict[Key, Row] = field(factory=dict)

    def add(
        self, benchmark: str, case: str, server: str, metric: str, unit: str, value: float, *, utilization: float = 1.0
    ) -> None:
        """Add the value of one round; `utilization` is the used fraction of the CPU time of the server's workers."""
        row = self.rows.setdefault((benchmark, case, metric), Row(benchmark, case, metric, unit))
        row.samples.setdefault(server, []).append(value)
        if utilization < _MIN_UTILIZATION:
            row.underutilized.add(server)

    def render(self, titles: Mapping[str, str]) -> str:
        """Return the table as text; `titles` has the heading of each benchmark."""
        lines: list[str] = []
        for benchmark in dict.fromkeys(row.benchmark for row in self.rows.values()):
            rows = [row for row in self.rows.values() if row.benchmark == benchmark]
            cases = list(dict.fromkeys(row.case for row in rows))
            rows.sort(key=lambda row: cases.index(row.case))
            peers = list(dict.fromkeys(server for row in rows for server in row.samples if server != PROXY))
            head = f"{'':52}{PROXY:>11}" + "".join(f"{peer:>11}{'ratio':>8}" for peer in peers)
            lines += ["", titles[benchmark], head]
            case = ""
            for row in rows:
                lines.append(_format_row(row, "" if row.case == case else row.case, peers))
                case = row.case
        if any(row.underutilized for row in self.rows.values()):
            lines += [
                "",
                "* The server used less than 85 % of its workers' CPU time: the clients, the disk or other load on the",
                "  machine limited this rate. The CPU time below it is the server's own.",
            ]
        return "\n".join(lines)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return all rows, including the values of each round."""
        return [row.as_dict() for row in self.rows.values()]


def _format_row(row: Row, case: str, peers: Sequence[str]) -> str:
    cells = [f"  {case:24} {row.metric:16} {row.unit:8}"]
    for server in (PROXY, *peers):
        cells.append(f"{format_number(row.median(server)) + ('*' if server in row.underutilized else ' '):>11}")
        if server != PROXY:
            ratio = row.ratio(server)
            cells.append(f"{'' if ratio is None else f'{ratio:.2f}':>8}")
    return "".join(cells).rstrip()


def format_number(value: float | None) -> str:
    """Return the number with three significant digits, or with all digits before the decimal point if it is larger."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
