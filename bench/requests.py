"""Benchmarks of small cached content: on open connections, and on a new connection for each request.

The server has one worker on a core of its own, and the clients run on the other cores, so the rates are per core.
"""

from __future__ import annotations

from contextlib import ExitStack

from bench.measurement import alternate_order, each_round, log_progress, record_rate
from bench.servers import CoreAssignment
from bench.table import ResultTable
from bench.testbed import Testbed

CONNECTIONS, CONCURRENT_CONNECTS = 64, 16

_FULL, _RESUMED = (False, "full handshake"), (True, "resumed")

_MS = 1000


def small_requests(testbed: Testbed, table: ResultTable) -> None:
    """Request a manifest and a small blob, on one connection and on many."""
    cores = CoreAssignment.separate()
    with ExitStack() as stack:
        proxy_server = stack.enter_context(testbed.warm_proxy(workers=1, cores=cores)).proxy
        static = stack.enter_context(testbed.static_nginx(workers=1, cores=cores))
        for count in (1, CONNECTIONS):
            for name, resource in (("manifest", testbed.manifest), ("64 KiB", testbed.medium_blob)):
                case = f"{count}, {name}"
                for server in each_round(testbed, [proxy_server, static.tls, static.tls_with_log], "small", case):
                    result = testbed.generator.run_requests(
                        server, [resource.path], connections=count, seconds=testbed.scale.seconds
                    )
                    table.add("small", case, server.name, "p50", "ms", result.last_byte * _MS)
                    record_rate(table, "small", case, server, result, result.count, "request")


def new_connections(testbed: Testbed, table: ResultTable) -> None:
    """Open a new connection for each small blob: CONNECT, a handshake, a hit. Connections to nginx need no CONNECT."""
    cores = CoreAssignment.separate()
    with ExitStack() as stack:
        proxy_server = stack.enter_context(testbed.warm_proxy(workers=1, cores=cores)).proxy
        nginx_server = stack.enter_context(testbed.static_nginx(workers=1, cores=cores)).tls
        for count, handshakes in (
            (1, (_FULL, _RESUMED)),
            (CONCURRENT_CONNECTS, (_FULL, _RESUMED)),
            (testbed.scale.herd_clients, (_FULL,)),  # hardly any client connects a second time during the measurement
        ):
            for round_number in range(testbed.scale.rounds):
                full_rates: dict[str, float] = {}
                for resume, name in handshakes:
                    case = f"{count:,}, {name}"
                    for server in alternate_order(round_number, [proxy_server, nginx_server]):
                        log_progress("connect", case, server.name)
                        result = testbed.generator.run_reconnects(
                            server,
                            [testbed.small_blob.path],
                            connections=count,
                            seconds=testbed.scale.seconds,
                            resume=resume,
                        )
                        record_rate(table, "connect", case, server, result, result.count, "connection")
                        rate = result.count / result.wall
                        if not resume:
                            full_rates[server.name] = rate
                            continue
                        table.add("connect", case, server.name, "over full", "×", rate / full_rates[server.name])
                        table.add("connect", case, server.name, "resumed", "%", 100 * result.resumed / result.count)
