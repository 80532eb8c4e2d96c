"""The measures of what the daemon takes to be there: its start, its memory, and a host that is new to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from bench.content import Resource
from bench.loads import idle, sip
from bench.measures import tell, turned
from bench.stage import HOST, Stage
from bench.table import NGINX, PROXY, Table
from bench.targets import Serving

_KIB, _MB, _MS = 1024, 1e6, 1000

# Connections after which each process has in memory what of its libraries any connection needs: 2 MB, which are not
# each connection's.
_FIRST = 8


def memory(stage: Stage, table: Table) -> None:
    """What all processes have in memory together: at the start, and what each connection adds to it."""
    count = stage.scale.memory_connections
    for round_ in range(stage.scale.memory_rounds):
        for case, job, blob in (("idle", idle, stage.small), ("slow clients", sip, stage.big)):
            for name in turned(round_, [PROXY, NGINX]):
                with ExitStack() as stack:
                    # A process that has served before would take the memory that it has left over.
                    serving = _fresh(stage, stack, name)
                    tell("memory", f"{count} {case}", name)
                    at_start, shared_once = serving.server.resident(), serving.server.shared_once()
                    _resident(stage, serving, job, blob, _FIRST)
                    before, *seen = _resident(stage, serving, job, blob, count)
                    for figure, value in (("at most", max(seen)), ("at the end", seen[-1])):
                        table.add("memory", case, name, figure, "KiB", (value - before) / count / _KIB)
                    if job is idle:
                        table.add("memory", "start", name, "resident", "MB", at_start / _MB)
                        table.add("memory", "start", name, "shared once", "MB", shared_once / _MB)
        with stage.filled_proxy(workers=1) as filled:
            tell("memory", "start", "1 worker")
            table.add("memory", "start", PROXY, "with 1 worker", "MB", filled.proxy.server.resident() / _MB)


def start(stage: Stage, table: Table) -> None:
    """The time until the daemon listens, and a client's first handshake with hosts that are new to it."""
    hosts = [f"{number}.{HOST}" for number in range(stage.scale.new_hosts)]
    for round_ in range(stage.scale.rounds):
        for workers, case in turned(round_, [(None, "all workers"), (1, "1 worker")]):
            tell("start", case, PROXY)
            settings = {"REGISTRIES": " ".join([HOST, *hosts])}
            with stage.fresh_state() as state, stage.proxy(state, settings=settings, workers=workers) as serving:
                table.add("start", case, PROXY, "listening", "s", serving.server.came_up)
                if workers != 1:
                    continue
                for figure in ("handshake", "the next one"):
                    done = stage.generator.greet(serving, hosts)
                    table.add("start", "new host", PROXY, figure, "ms", done.first * _MS)


def _resident(stage: Stage, serving: Serving, job: Callable[..., None], blob: Resource, count: int) -> list[int]:
    """Return the resident set before a load of `count` connections, and as it was seen while that lasted."""
    scale, server = stage.scale, serving.server
    seen = [server.resident()]
    stage.clients.run(
        1,
        server,
        job,
        serving.target,
        blob,
        count,
        scale.memory_seconds,
        meanwhile=lambda: seen.append(server.resident()),
    )
    return seen


def _fresh(stage: Stage, stack: ExitStack, name: str) -> Serving:
    if name == PROXY:
        return stack.enter_context(stage.filled_proxy()).proxy
    return stack.enter_context(stage.static_nginx()).tls
