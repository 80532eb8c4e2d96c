"""The measures of a large blob that is there: through CONNECT and TLS, in plain HTTP, and on a second core."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import product

from bench.measures import MB, clients, note_bytes, rounds, tell, turned
from bench.requests import CONNECTIONS
from bench.servers import Cores
from bench.stage import HOST, Stage
from bench.table import NGINX, PROXY, Table
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
    """What a second core brings: two workers and their clients on two cores, beside one worker and the same on one.

    Everything that a core has to do is there twice, so that the ratio of the rates is what the server makes of it.
    """
    cases = (
        (f"hits, {clients(MANY)}", partial(_hits, stage)),
        (f"manifests, {CONNECTIONS}", partial(_manifests, stage)),
    )
    for round_ in range(stage.scale.rounds):
        rates: dict[tuple[str, str, int], float] = {}
        for count, server in turned(round_, list(product((1, 2), (PROXY, NGINX)))):
            with ExitStack() as stack:
                serving = _on_cores(stage, stack, server, count)
                for case, load in cases:
                    tell("second", f"{case}, {CORES[count]}", server)
                    rate, unit = load(serving)
                    table.add("second", case, server, CORES[count], unit, rate)
                    rates[case, server, count] = rate
        for case, server in product((case for case, _ in cases), (PROXY, NGINX)):
            table.add("second", case, server, "second core", "×", rates[case, server, 2] / rates[case, server, 1])


CORES = {1: "one core", 2: "two cores"}


def _on_cores(stage: Stage, stack: ExitStack, server: str, count: int) -> Serving:
    """Start a server with `count` workers on as many cores, which are its clients' too."""
    cores = Cores.together(count)
    if server == PROXY:
        return stack.enter_context(stage.filled_proxy(workers=count, cores=cores)).proxy
    return stack.enter_context(stage.static_nginx(workers=count, cores=cores)).tls


def _hits(stage: Stage, serving: Serving) -> tuple[float, str]:
    done = stage.generator.ask(serving, [stage.big.path], connections=MANY, count=1)
    return done.bytes / done.wall / MB, "MB/s"


def _manifests(stage: Stage, serving: Serving) -> tuple[float, str]:
    done = stage.generator.ask(serving, [stage.manifest.path], connections=CONNECTIONS, seconds=stage.scale.seconds)
    return done.count / done.wall, "/s"


def _download(stage: Stage, table: Table, measure: str, case: str, serving: Serving, count: int, path: str) -> None:
    done = stage.generator.ask(serving, [path], connections=count, count=1)
    note_bytes(table, measure, case, serving, done, done.bytes)
