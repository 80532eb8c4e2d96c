"""What the figures are to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import field, frozen

from bench.table import DIRECT, NGINX, PROXY, REGISTRY, Key, Table, number


@frozen
class Goal:
    """A bound for the proxy's figure in the row `key`: for its ratio to that of `peer`, where there is one."""

    what: str
    key: Key
    bound: float
    peer: str | None = field(default=None, kw_only=True)
    at_least: bool = field(default=False, kw_only=True)

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def text(self) -> str:
        """The bound for people."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:,g}{' ×' if self.peer else ''}"


@frozen
class Verdict:
    """A goal beside what was measured; `value` is what the bound is for."""

    goal: Goal
    unit: str
    ours: float
    theirs: float | None
    value: float

    @property
    def met(self) -> bool:
        return self.goal.met_by(self.value)

    def cells(self) -> tuple[str, ...]:
        """Return what `HEADINGS` announces."""
        goal = self.goal
        peer = "" if goal.peer is None else f"{goal.peer} {number(self.theirs)}"
        ratio = f"{self.value:.2f}" if goal.peer else ""
        return goal.what, self.unit, number(self.ours), peer, ratio, goal.text, "met" if self.met else "MISSED"

    def data(self) -> dict[str, Any]:
        return {
            "what": self.goal.what,
            "row": self.goal.key,
            "unit": self.unit,
            "proxy": self.ours,
            "peer": self.goal.peer,
            "peer's": self.theirs,
            "value": self.value,
            "target": self.goal.text,
            "met": self.met,
            "cells": self.cells(),
        }


HEADINGS = ("what", "unit", "proxy", "peer", "ratio", "target", "")


def verdicts(table: Table, goals: Sequence[Goal] | None = None) -> Iterator[Verdict]:
    """Yield the verdicts on those goals whose rows were measured."""
    for goal in GOALS if goals is None else goals:
        row = table.rows.get(goal.key)
        if row is None or (ours := row.median(PROXY)) is None:
            continue
        theirs = row.median(goal.peer) if goal.peer else None
        value = row.ratio(goal.peer) if goal.peer else ours
        if value is not None:
            yield Verdict(goal, row.unit, ours, theirs, value)


def text(found: Sequence[Verdict]) -> str:
    """Return the verdicts as a table for people, and how many goals are missed."""
    rows = [HEADINGS, *(verdict.cells() for verdict in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    missed = sum(not verdict.met for verdict in found)
    return "\n".join([*lines, "", f"{len(found) - missed} of {len(found)} targets met"])


_ONE, _EIGHT = "1 client", "8 clients"

GOALS = (
    Goal("hit, 1 client: server CPU", ("hit", _ONE, "server CPU"), 0.8, peer=NGINX),
    Goal("hit, 8 clients: server CPU", ("hit", _EIGHT, "server CPU"), 0.8, peer=NGINX),
    Goal("hit, 8 clients: throughput", ("hit", _EIGHT, "throughput"), 1.0, peer=NGINX, at_least=True),
    Goal("hosted registry, plain HTTP, 8 clients", ("plain", "hosted, 8 clients", "throughput"), 0.7, peer=NGINX,
         at_least=True),
    Goal("mirror, plain HTTP, 8 clients", ("plain", "mirror, 8 clients", "throughput"), 0.7, peer=NGINX,
         at_least=True),
    Goal("miss: throughput", ("miss", _ONE, "throughput"), 1.2, peer=NGINX, at_least=True),
    Goal("miss: server CPU", ("miss", _ONE, "server CPU"), 1.0, peer=NGINX),
    Goal("first byte of a miss, over fetching directly", ("first", "64 KiB, cold", "over direct"), 5),
    Goal("20 clients join: first byte after the leader's", ("joined", "20 clients", "first byte"), 50),
    Goal("20 clients join: the last one's end over one client alone", ("joined", "20 clients", "over alone"), 1.05),
    Goal("20 clients join: copies from upstream", ("joined", "20 clients", "from upstream"), 1.01),
    Goal("1,000 clients ask at once: throughput", ("crowd", "1,000 clients", "throughput"), 1.0, peer=NGINX,
         at_least=True),
    Goal("1,000 clients ask at once: copies from upstream", ("crowd", "1,000 clients", "from upstream"), 1.01),
    Goal("small hit, 1 connection: manifest", ("small", "1, manifest", "p50"), 0.3),
    Goal("small hit, 1 connection: blob of 64 KiB", ("small", "1, 64 KiB", "p50"), 0.3),
    Goal("small hits, 64 connections, per core: manifests", ("small", "64, manifest", "requests"), 6000,
         at_least=True),
    Goal("new tunnels, sixteen at a time, per core", ("connect", "16, full handshake", "connections"), 1000,
         at_least=True),
    Goal("the same, TLS resumed, over full handshakes", ("connect", "16, resumed", "over full"), 1.0, at_least=True),
    Goal("new tunnels, a thousand at a time, per core", ("connect", "1,000, full handshake", "connections"), 1000,
         at_least=True),
    Goal("second core: hits", ("second", "hits, 8 clients", "second core"), 1.7, at_least=True),
    Goal("second core: small requests", ("second", "manifests, 64", "second core"), 1.7, at_least=True),
    Goal("memory of an idle tunnel", ("memory", "idle", "at most"), 30),
    Goal("memory of a slowly downloading tunnel", ("memory", "slow clients", "at most"), 30),
    Goal("memory at the start, all workers", ("memory", "start", "shared once"), 60),
    Goal("start to listening", ("start", "all workers", "listening"), 0.6),
    Goal("first handshake for a new host", ("start", "new host", "handshake"), 3),
    Goal("garbage collection", ("gc", "100,000 blobs", "duration"), 1.0, peer=REGISTRY),
    Goal("the longest wait of a request beside it", ("gc", "100,000 blobs", "longest wait"), 50),
    Goal("skopeo copy, 200 layers, warm, over direct", ("image", "200 layers", "duration"), 0.63, peer=DIRECT),
)  # fmt: skip
