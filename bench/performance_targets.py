"""What the figures are to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import field, frozen

from bench.table import DIRECT, NGINX, PROXY, REGISTRY, Key, ResultTable, format_number


@frozen
class PerformanceTarget:
    """A bound for the proxy's figure in the row `key`: for its ratio to that of `peer`, where there is one."""

    label: str
    key: Key
    bound: float
    peer: str | None = field(default=None, kw_only=True)
    is_lower_bound: bool = field(default=False, kw_only=True)

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.is_lower_bound else value <= self.bound

    @property
    def bound_text(self) -> str:
        """The bound for people."""
        return f"{'≥' if self.is_lower_bound else '≤'} {self.bound:,g}{' ×' if self.peer else ''}"


@frozen
class TargetResult:
    """A goal beside what was measured; `value` is what the bound is for."""

    target: PerformanceTarget
    unit: str
    proxy_value: float
    peer_value: float | None
    value: float

    @property
    def is_met(self) -> bool:
        return self.target.is_met_by(self.value)

    def cells(self) -> tuple[str, ...]:
        """Return what `HEADINGS` announces."""
        target = self.target
        peer = "" if target.peer is None else f"{target.peer} {format_number(self.peer_value)}"
        ratio = f"{self.value:.2f}" if target.peer else ""
        return (
            target.label,
            self.unit,
            format_number(self.proxy_value),
            peer,
            ratio,
            target.bound_text,
            "met" if self.is_met else "MISSED",
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.target.label,
            "row": self.target.key,
            "unit": self.unit,
            "proxy": self.proxy_value,
            "peer": self.target.peer,
            "peer's": self.peer_value,
            "value": self.value,
            "target": self.target.bound_text,
            "met": self.is_met,
            "cells": self.cells(),
        }


HEADINGS = ("what", "unit", "proxy", "peer", "ratio", "target", "")


def evaluate(table: ResultTable, targets: Sequence[PerformanceTarget] | None = None) -> Iterator[TargetResult]:
    """Yield the verdicts on those goals whose rows were measured."""
    for target in PERFORMANCE_TARGETS if targets is None else targets:
        row = table.rows.get(target.key)
        if row is None or (proxy_value := row.median(PROXY)) is None:
            continue
        peer_value = row.median(target.peer) if target.peer else None
        value = row.ratio(target.peer) if target.peer else proxy_value
        if value is not None:
            yield TargetResult(target, row.unit, proxy_value, peer_value, value)


def render_results(results: Sequence[TargetResult]) -> str:
    """Return the verdicts as a table for people, and how many goals are missed."""
    rows = [HEADINGS, *(verdict.cells() for verdict in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    missed = sum(not verdict.is_met for verdict in results)
    return "\n".join([*lines, "", f"{len(results) - missed} of {len(results)} targets met"])


_ONE, _EIGHT = "1 client", "8 clients"

PERFORMANCE_TARGETS = (
    PerformanceTarget("hit, 1 client: server CPU", ("hit", _ONE, "server CPU"), 0.8, peer=NGINX),
    PerformanceTarget("hit, 8 clients: server CPU", ("hit", _EIGHT, "server CPU"), 0.8, peer=NGINX),
    PerformanceTarget("hit, 8 clients: throughput", ("hit", _EIGHT, "throughput"), 1.0, peer=NGINX, is_lower_bound=True),
    PerformanceTarget("hosted registry, plain HTTP, 8 clients", ("plain", "hosted, 8 clients", "throughput"), 0.7, peer=NGINX,
         is_lower_bound=True),
    PerformanceTarget("mirror, plain HTTP, 8 clients", ("plain", "mirror, 8 clients", "throughput"), 0.7, peer=NGINX,
         is_lower_bound=True),
    PerformanceTarget("miss: throughput", ("miss", _ONE, "throughput"), 1.2, peer=NGINX, is_lower_bound=True),
    PerformanceTarget("miss: server CPU", ("miss", _ONE, "server CPU"), 1.0, peer=NGINX),
    PerformanceTarget("first byte of a miss, over fetching directly", ("first", "64 KiB, cold", "over direct"), 5),
    PerformanceTarget("20 clients join: first byte after the leader's", ("joined", "20 clients", "first byte"), 50),
    PerformanceTarget("20 clients join: the last one's end over one client alone", ("joined", "20 clients", "over alone"), 1.05),
    PerformanceTarget("20 clients join: copies from upstream", ("joined", "20 clients", "from upstream"), 1.01),
    PerformanceTarget("1,000 clients ask at once: throughput", ("crowd", "1,000 clients", "throughput"), 1.0, peer=NGINX,
         is_lower_bound=True),
    PerformanceTarget("1,000 clients ask at once: copies from upstream", ("crowd", "1,000 clients", "from upstream"), 1.01),
    PerformanceTarget("small hit, 1 connection: manifest", ("small", "1, manifest", "p50"), 0.3),
    PerformanceTarget("small hit, 1 connection: blob of 64 KiB", ("small", "1, 64 KiB", "p50"), 0.3),
    PerformanceTarget("small hits, 64 connections, per core: manifests", ("small", "64, manifest", "requests"), 6000,
         is_lower_bound=True),
    PerformanceTarget("new tunnels, sixteen at a time, per core", ("connect", "16, full handshake", "connections"), 1000,
         is_lower_bound=True),
    PerformanceTarget("the same, TLS resumed, over full handshakes", ("connect", "16, resumed", "over full"), 1.0, is_lower_bound=True),
    PerformanceTarget("new tunnels, a thousand at a time, per core", ("connect", "1,000, full handshake", "connections"), 1000,
         is_lower_bound=True),
    PerformanceTarget("second core: hits", ("second", "hits, 8 clients", "second core"), 1.7, is_lower_bound=True),
    PerformanceTarget("second core: small requests", ("second", "manifests, 64", "second core"), 1.7, is_lower_bound=True),
    PerformanceTarget("memory of an idle tunnel", ("memory", "idle", "at most"), 30),
    PerformanceTarget("memory of a slowly downloading tunnel", ("memory", "slow clients", "at most"), 30),
    PerformanceTarget("memory at the start, all workers", ("memory", "start", "shared once"), 60),
    PerformanceTarget("start to listening", ("start", "all workers", "listening"), 0.6),
    PerformanceTarget("first handshake for a new host", ("start", "new host", "handshake"), 3),
    PerformanceTarget("garbage collection", ("gc", "100,000 blobs", "duration"), 1.0, peer=REGISTRY),
    PerformanceTarget("the longest wait of a request beside it", ("gc", "100,000 blobs", "longest wait"), 50),
    PerformanceTarget("skopeo copy, 200 layers, warm, over direct", ("image", "200 layers", "duration"), 0.63, peer=DIRECT),
)  # fmt: skip
