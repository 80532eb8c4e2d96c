"""The measures of a large blob that is there: through CONNECT and TLS, in plain HTTP, and on a second core."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product

from attrs import evolve

from bench.generator import Outcome
from bench.measures import clients, note_bytes, note_count, rounds, tell, turned
from bench.requests import CONNECTIONS
from bench.stage import HOST, Stage
from bench.table import ONE_WORKER, PROXY, Table
from bench.targets import Serving

MANY = 8
"""Clients of the loads that are not for one client."""


def hit(stage: Stage, table: Table) -> None:
    """A blob that is cached, read whole through the proxy."""
    with ExitStack() as stack:
        ours, theirs = stack.enter_context(stage.filled_proxy()), stack.enter_context(stage.static_nginx())
        # A line in the log for each GiB is soon measured; the many clients take long enough without it.
        for count, those in ((1, [ours.proxy, theirs.tls, theirs.logging]), (MANY, [ours.proxy, theirs.tls])):
            for serving in rounds(stage, those, "hit", clients(count)):
                _download(stage, table, "hit", clients(count), serving, count, stage.big.path)


def plain(stage: Stage, table: Table) -> None:
    """The same in plain HTTP: from the hosted registry, and from the proxy as a mirror."""
    with ExitStack() as stack:
        ours, theirs = stack.enter_context(stage.filled_proxy()), stack.enter_context(stage.static_nginx())
        ways = (("hosted", ours.hosted, ""), ("mirror", ours.mirror, f"?ns={HOST}"))
        for (name, mine, query), count in product(ways, (1, MANY)):
            case = f"{name}, {clients(count)}"
            for serving in rounds(stage, [mine, theirs.plain], "plain", case):
                _download(stage, table, "plain", case, serving, count, stage.big.path + query)


def second(stage: Stage, table: Table) -> None:
    """What a second worker brings.

    Clients and servers share the cores, so that the rates do not show it. How much two cores of their own would serve
    is what the CPU time of the busiest process allows: a worker that takes longer for each request, or has more of them
    than the other, holds that up.
    """
    for round_ in range(stage.scale.rounds):
        cost: dict[tuple[str, str], float] = {}
        for workers, name in turned(round_, [(1, ONE_WORKER), (2, PROXY)]):
            with stage.filled_proxy(workers=workers) as filled:
                serving = evolve(filled.proxy, target=evolve(filled.proxy.target, name=name))
                case = f"hits, {clients(MANY)}"
                tell("second", case, name)
                done = _download(stage, table, "second", case, serving, MANY, stage.big.path)
                cost[case, name] = done.server_cpu / done.bytes / done.balance
                case = f"manifests, {CONNECTIONS}"
                tell("second", case, name)
                done = stage.generator.ask(
                    serving, [stage.manifest.path], connections=CONNECTIONS, seconds=stage.scale.seconds
                )
                note_count(table, "second", case, serving, done, done.count, "request")
                cost[case, name] = done.server_cpu / done.count / done.balance
        for case in dict.fromkeys(case for case, _ in cost):
            table.add("second", case, PROXY, "capacity", "×", cost[case, ONE_WORKER] / cost[case, PROXY])


def _download(stage: Stage, table: Table, measure: str, case: str, serving: Serving, count: int, path: str) -> Outcome:
    done = stage.generator.ask(serving, [path], connections=count, count=1)
    note_bytes(table, measure, case, serving, done, done.bytes)
    return done
