"""Benchmarks of the daemon's fixed costs: start-up, memory, and the first connection to a host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from bench.content import Resource
from bench.endpoints import RunningServer
from bench.loads import hold_connections, read_slowly
from bench.measurement import alternate_order, log_progress
from bench.table import NGINX, PROXY, ResultTable
from bench.testbed import UPSTREAM_HOST, Testbed

_KIB, _MB, _MS = 1024, 1e6, 1000

# Connections opened before measuring, so that each process has loaded the library pages that any connection needs.
# These are 2 MB, which do not depend on the number of connections.
_WARM_UP_CONNECTIONS = 8


def memory(testbed: Testbed, table: ResultTable) -> None:
    """Measure the memory of all processes together: after the start, and its growth for each connection."""
    count = testbed.scale.memory_connections
    for round_number in range(testbed.scale.memory_rounds):
        for case, job, blob in (
            ("idle", hold_connections, testbed.small_blob),
            ("slow clients", read_slowly, testbed.large_blob),
        ):
            for server_name in alternate_order(round_number, [PROXY, NGINX]):
                with ExitStack() as stack:
                    # A new process for each case: one that has served before would reuse the memory it has freed.
                    server = _start_server(testbed, stack, server_name)
                    log_progress("memory", f"{count} {case}", server_name)
                    resident_at_start, unique_resident = (
                        server.process.resident_bytes(),
                        server.process.unique_resident_bytes(),
                    )
                    _measure_resident(testbed, server, job, blob, _WARM_UP_CONNECTIONS)
                    resident_before, *resident_samples = _measure_resident(testbed, server, job, blob, count)
                    for metric, value in (("at most", max(resident_samples)), ("at the end", resident_samples[-1])):
                        table.add("memory", case, server_name, metric, "KiB", (value - resident_before) / count / _KIB)
                    if job is hold_connections:
                        table.add("memory", "start", server_name, "resident", "MB", resident_at_start / _MB)
                        table.add("memory", "start", server_name, "unique resident", "MB", unique_resident / _MB)
        with testbed.warm_proxy(workers=1) as warm:
            log_progress("memory", "start", "1 worker")
            table.add("memory", "start", PROXY, "with 1 worker", "MB", warm.proxy.process.resident_bytes() / _MB)


def startup(testbed: Testbed, table: ResultTable) -> None:
    """Measure the time until the daemon listens, and the first handshakes with hosts that it has no leaf for."""
    hosts = [f"{number}.{UPSTREAM_HOST}" for number in range(testbed.scale.new_hosts)]
    for round_number in range(testbed.scale.rounds):
        for workers, case in alternate_order(round_number, [(None, "all workers"), (1, "1 worker")]):
            log_progress("startup", case, PROXY)
            settings = {"REGISTRIES": " ".join([UPSTREAM_HOST, *hosts])}
            with testbed.temporary_state() as state, testbed.proxy(state, settings=settings, workers=workers) as server:
                table.add("startup", case, PROXY, "listening", "s", server.process.startup_seconds)
                if workers != 1:
                    continue
                for metric in ("handshake", "second handshake"):
                    result = testbed.generator.run_handshakes(server, hosts)
                    table.add("startup", "new host", PROXY, metric, "ms", result.first_byte * _MS)


def _measure_resident(
    testbed: Testbed, server: RunningServer, job: Callable[..., None], blob: Resource, count: int
) -> list[int]:
    """Return the resident set in bytes: before a load of `count` connections, then the samples taken during it."""
    scale, process = testbed.scale, server.process
    resident_samples = [process.resident_bytes()]
    testbed.clients.run(
        1,
        process,
        job,
        server.endpoint,
        blob,
        count,
        scale.memory_seconds,
        on_poll=lambda: resident_samples.append(process.resident_bytes()),
    )
    return resident_samples


def _start_server(testbed: Testbed, stack: ExitStack, name: str) -> RunningServer:
    if name == PROXY:
        return stack.enter_context(testbed.warm_proxy()).proxy
    return stack.enter_context(testbed.static_nginx()).tls
