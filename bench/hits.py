"""Benchmarks of a large cached blob: through CONNECT and TLS, over plain HTTP, and on a second core."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import product

from bench.endpoints import RunningServer
from bench.measurement import MB, alternate_order, client_count_label, each_round, log_progress, record_throughput
from bench.requests import CONNECTIONS
from bench.servers import CoreAssignment
from bench.table import NGINX, PROXY, ResultTable
from bench.testbed import UPSTREAM_HOST, Testbed

MANY_CLIENTS = 8
"""Number of clients in the loads with several clients."""


def hit(testbed: Testbed, table: ResultTable) -> None:
    """Read a whole cached blob through the proxy."""
    with ExitStack() as stack:
        warm, static = stack.enter_context(testbed.warm_proxy()), stack.enter_context(testbed.static_nginx())
        # One log line per GiB hardly costs anything, so measuring nginx's log with one client is enough.
        for count, servers in (
            (1, [warm.proxy, static.tls, static.tls_with_log]),
            (MANY_CLIENTS, [warm.proxy, static.tls]),
        ):
            for server in each_round(testbed, servers, "hit", client_count_label(count)):
                _measure_download(
                    testbed, table, "hit", client_count_label(count), server, count, testbed.large_blob.path
                )


def plain_http(testbed: Testbed, table: ResultTable) -> None:
    """Read the same blob over plain HTTP: from the hosted registry, and from the proxy as a mirror."""
    with ExitStack() as stack:
        warm, static = stack.enter_context(testbed.warm_proxy()), stack.enter_context(testbed.static_nginx())
        variants = (("hosted", warm.hosted, ""), ("mirror", warm.mirror, f"?ns={UPSTREAM_HOST}"))
        for (name, proxy_server, query), count in product(variants, (1, MANY_CLIENTS)):
            case = f"{name}, {client_count_label(count)}"
            for server in each_round(testbed, [proxy_server, static.plain_http], "http", case):
                _measure_download(testbed, table, "http", case, server, count, testbed.large_blob.path + query)


def core_scaling(testbed: Testbed, table: ResultTable) -> None:
    """Compare two workers and their clients on two cores with one worker and the same clients on one core.

    The clients share the server's cores, so everything gets twice the CPU time. A ratio of the rates below 2 shows the
    loss between the workers and in the kernel.
    """
    cases = (
        (f"hits, {client_count_label(MANY_CLIENTS)}", partial(_measure_hits, testbed)),
        (f"manifests, {CONNECTIONS}", partial(_measure_manifests, testbed)),
    )
    for round_number in range(testbed.scale.rounds):
        rates: dict[tuple[str, str, int], float] = {}
        for count, server_name in alternate_order(round_number, list(product((1, 2), (PROXY, NGINX)))):
            with ExitStack() as stack:
                server = _start_on_cores(testbed, stack, server_name, count)
                for case, load in cases:
                    log_progress("scaling", f"{case}, {CORES_LABELS[count]}", server_name)
                    rate, unit = load(server)
                    table.add("scaling", case, server_name, CORES_LABELS[count], unit, rate)
                    rates[case, server_name, count] = rate
        for case, server_name in product((case for case, _ in cases), (PROXY, NGINX)):
            table.add(
                "scaling",
                case,
                server_name,
                "second core",
                "×",
                rates[case, server_name, 2] / rates[case, server_name, 1],
            )


CORES_LABELS = {1: "one core", 2: "two cores"}


def _start_on_cores(testbed: Testbed, stack: ExitStack, server: str, count: int) -> RunningServer:
    """Start a server with `count` workers on `count` cores, which it shares with its clients."""
    cores = CoreAssignment.shared(count)
    if server == PROXY:
        return stack.enter_context(testbed.warm_proxy(workers=count, cores=cores)).proxy
    return stack.enter_context(testbed.static_nginx(workers=count, cores=cores)).tls


def _measure_hits(testbed: Testbed, server: RunningServer) -> tuple[float, str]:
    result = testbed.generator.run_requests(server, [testbed.large_blob.path], connections=MANY_CLIENTS, count=1)
    return result.bytes / result.wall / MB, "MB/s"


def _measure_manifests(testbed: Testbed, server: RunningServer) -> tuple[float, str]:
    result = testbed.generator.run_requests(
        server, [testbed.manifest.path], connections=CONNECTIONS, seconds=testbed.scale.seconds
    )
    return result.count / result.wall, "/s"


def _measure_download(
    testbed: Testbed, table: ResultTable, benchmark: str, case: str, server: RunningServer, count: int, path: str
) -> None:
    result = testbed.generator.run_requests(server, [path], connections=count, count=1)
    record_throughput(table, benchmark, case, server, result, result.bytes)
