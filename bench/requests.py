"""The measures of small things that are cached: on connections that stay open, and each on a new one.

What is said to be per core is one worker on a core of its own, the clients on the others.
"""

from __future__ import annotations

from contextlib import ExitStack

from bench.measures import note_count, rounds, tell, turned
from bench.servers import Cores
from bench.stage import Stage
from bench.table import Table

CONNECTIONS, AT_ONCE = 64, 16

_FULL, _RESUMED = (False, "full handshake"), (True, "resumed")

_MS = 1000


def small(stage: Stage, table: Table) -> None:
    """A manifest and a small blob, on one connection and on many."""
    cores = Cores.apart()
    with ExitStack() as stack:
        ours = stack.enter_context(stage.filled_proxy(workers=1, cores=cores)).proxy
        theirs = stack.enter_context(stage.static_nginx(workers=1, cores=cores))
        for count in (1, CONNECTIONS):
            for name, resource in (("manifest", stage.manifest), ("64 KiB", stage.medium)):
                case = f"{count}, {name}"
                for serving in rounds(stage, [ours, theirs.tls, theirs.logging], "small", case):
                    done = stage.generator.ask(serving, [resource.path], connections=count, seconds=stage.scale.seconds)
                    table.add("small", case, serving.name, "p50", "ms", done.whole * _MS)
                    note_count(table, "small", case, serving, done, done.count, "request")


def connect(stage: Stage, table: Table) -> None:
    """New connections, each for one small blob: CONNECT, a handshake, a hit; nginx is spared the CONNECT."""
    cores = Cores.apart()
    with ExitStack() as stack:
        ours = stack.enter_context(stage.filled_proxy(workers=1, cores=cores)).proxy
        theirs = stack.enter_context(stage.static_nginx(workers=1, cores=cores)).tls
        for count, ways in (
            (1, (_FULL, _RESUMED)),
            (AT_ONCE, (_FULL, _RESUMED)),
            (stage.scale.crowd, (_FULL,)),  # hardly anybody comes a second time while it is measured
        ):
            for round_ in range(stage.scale.rounds):
                full: dict[str, float] = {}
                for resume, name in ways:
                    case = f"{count:,}, {name}"
                    for serving in turned(round_, [ours, theirs]):
                        tell("connect", case, serving.name)
                        done = stage.generator.visit(
                            serving, [stage.small.path], connections=count, seconds=stage.scale.seconds, resume=resume
                        )
                        note_count(table, "connect", case, serving, done, done.count, "connection")
                        rate = done.count / done.wall
                        if not resume:
                            full[serving.name] = rate
                            continue
                        table.add("connect", case, serving.name, "over full", "×", rate / full[serving.name])
                        table.add("connect", case, serving.name, "resumed", "%", 100 * done.resumed / done.count)
