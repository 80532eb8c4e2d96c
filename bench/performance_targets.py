"""Targets for the figures, and their comparison with a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import field, frozen

from bench.table import ALONE, DIRECT, NGINX, PROXY, REGISTRY, Key, ResultTable, format_number


@frozen
class PerformanceTarget:
    """A bound for the proxy's figure in the row `key`, or for its ratio to the peer's figure if there is a `peer`."""

    label: str
    key: Key
    bound: float
    peer: str | None = field(default=None, kw_only=True)
    is_lower_bound: bool = field(default=False, kw_only=True)

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.is_lower_bound else value <= self.bound

    @property
    def bound_text(self) -> str:
        """The bound as it is printed."""
        return f"{'≥' if self.is_lower_bound else '≤'} {self.bound:,g}{' ×' if self.peer else ''}"


@frozen
class TargetResult:
    """A target with the measured values; `value` is the one that the bound applies to."""

    target: PerformanceTarget
    unit: str
    proxy_value: float
    peer_value: float | None
    value: float

    @property
    def is_met(self) -> bool:
        return self.target.is_met_by(self.value)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table row, in the order of `HEADINGS`."""
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
            "label": self.target.label,
            "row": self.target.key,
            "unit": self.unit,
            "proxy": self.proxy_value,
            "peer": self.target.peer,
            "peer_value": self.peer_value,
            "value": self.value,
            "target": self.target.bound_text,
            "met": self.is_met,
            "cells": self.cells(),
        }


HEADINGS = ("target", "unit", "proxy", "peer", "ratio", "bound", "")


def evaluate(table: ResultTable, targets: Sequence[PerformanceTarget] | None = None) -> Iterator[TargetResult]:
    """Yield a result for each target that has a measured row."""
    for target in PERFORMANCE_TARGETS if targets is None else targets:
        row = table.rows.get(target.key)
        if row is None or (proxy_value := row.median(PROXY)) is None:
            continue
        peer_value = row.median(target.peer) if target.peer else None
        value = row.ratio(target.peer) if target.peer else proxy_value
        if value is not None:
            yield TargetResult(target, row.unit, proxy_value, peer_value, value)


def render_results(results: Sequence[TargetResult]) -> str:
    """Return the results as a text table, followed by the number of targets that are met."""
    rows = [HEADINGS, *(result.cells() for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    missed = sum(not result.is_met for result in results)
    return "\n".join([*lines, "", f"{len(results) - missed} of {len(results)} targets met"])


_ONE, _EIGHT = "1 client", "8 clients"


def _at_most(label: str, key: Key, bound: float, peer: str | None = None) -> PerformanceTarget:
    return PerformanceTarget(label, key, bound, peer=peer)


def _at_least(label: str, key: Key, bound: float, peer: str | None = None) -> PerformanceTarget:
    return PerformanceTarget(label, key, bound, peer=peer, is_lower_bound=True)


PERFORMANCE_TARGETS = (
    _at_most("hit, 1 client: server CPU", ("hit", _ONE, "server CPU"), 0.8, NGINX),
    _at_most("hit, 8 clients: server CPU", ("hit", _EIGHT, "server CPU"), 0.8, NGINX),
    _at_least("hit, 8 clients: throughput", ("hit", _EIGHT, "throughput"), 1.0, NGINX),
    _at_least("hosted registry, plain HTTP, 8 clients", ("http", "hosted, 8 clients", "throughput"), 0.7, NGINX),
    _at_least("mirror, plain HTTP, 8 clients", ("http", "mirror, 8 clients", "throughput"), 0.7, NGINX),
    _at_least("miss: throughput", ("miss", _ONE, "throughput"), 1.2, NGINX),
    _at_most("miss: server CPU", ("miss", _ONE, "server CPU"), 1.0, NGINX),
    _at_most("first byte of a miss, over a direct fetch", ("ttfb", "64 KiB, cold", "over direct"), 5),
    _at_most("20 clients join: first byte after the leader's", ("joined", "20 clients", "first byte"), 50),
    _at_most("20 clients join: last byte, over 1 client", ("joined", "20 clients", "over 1 client"), 1.05),
    _at_most("20 clients join: copies from upstream", ("joined", "20 clients", "from upstream"), 1.01),
    _at_least("1,000 clients at once: throughput", ("herd", "1,000 clients", "throughput"), 1.0, NGINX),
    _at_most("1,000 clients at once: copies from upstream", ("herd", "1,000 clients", "from upstream"), 1.01),
    _at_most("small hit, 1 connection: manifest", ("small", "1, manifest", "p50"), 0.3),
    _at_most("small hit, 1 connection: blob of 64 KiB", ("small", "1, 64 KiB", "p50"), 0.3),
    _at_least("small hits, 64 connections, per core: manifests", ("small", "64, manifest", "requests"), 6000),
    _at_least("new tunnels, 16 at a time, per core", ("connect", "16, full handshake", "connections"), 1000),
    _at_least("new tunnels, TLS resumed, over full handshakes", ("connect", "16, resumed", "over full"), 1.0),
    _at_least("new tunnels, 1,000 at a time, per core", ("connect", "1,000, full handshake", "connections"), 1000),
    _at_least("second core: hits", ("scaling", "hits, 8 clients", "second core"), 1.7),
    _at_least("second core: small requests", ("scaling", "manifests, 64", "second core"), 1.7),
    _at_most("memory of an idle tunnel", ("memory", "idle", "at most"), 30),
    _at_most("memory of a slowly downloading tunnel", ("memory", "slow clients", "at most"), 30),
    _at_most("memory at the start, all workers", ("memory", "start", "unique resident"), 60),
    _at_most("start to listening", ("startup", "all workers", "listening"), 0.6),
    _at_most("first handshake for a new host", ("startup", "new host", "handshake"), 3),
    _at_most("garbage collection: duration", ("gc", "100,000 blobs", "duration"), 1.0, REGISTRY),
    _at_most("garbage collection: longest wait of a request", ("gc", "100,000 blobs", "longest wait"), 50),
    _at_least("fleet and bucket: push of a layer", ("fleet", "push, 1 layer", "throughput"), 1.0, REGISTRY),
    _at_least("fleet and bucket: small layers", ("fleet", "push, 200 small", "layers"), 1.0, REGISTRY),
    _at_most("fleet and bucket: 1,000 repositories", ("fleet", "1,000 repositories", "catalogue"), 0.5),
    _at_most("fleet: hit, 1 client: server CPU", ("fleet", "hit, 1 client", "server CPU"), 1.05, ALONE),
    _at_most("skopeo copy, 200 layers, warm, over direct", ("image", "200 layers", "duration"), 0.63, DIRECT),
)
