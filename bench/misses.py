"""Benchmarks of uncached content: one client, many clients at once, and clients that join a download."""

from __future__ import annotations

from contextlib import ExitStack

from bench.content import Resource, create_blob
from bench.endpoints import RunningServer
from bench.hits import MANY_CLIENTS
from bench.measurement import alternate_order, client_count_label, log_progress, record_throughput
from bench.table import DIRECT, NGINX, PROXY, ResultTable
from bench.testbed import Testbed

JOINING_CLIENTS = 20

_COLD_BLOB_SIZE = 64 * 1024  # bytes
_MS = 1000


def miss(testbed: Testbed, table: ResultTable) -> None:
    """Fetch a large blob: for one client, and for several that request it at the same time."""
    for count in (1, MANY_CLIENTS):
        case = client_count_label(count)
        for round_number in range(testbed.scale.rounds):
            for start_server in alternate_order(round_number, [testbed.cold_proxy, testbed.caching_nginx]):
                with start_server() as server:
                    log_progress("miss", case, server.name)
                    log_offset = testbed.origin_log_offset()
                    result = testbed.generator.run_requests(
                        server, [testbed.large_blob.path], connections=count, count=1
                    )
                    record_throughput(table, "miss", case, server, result, result.bytes)
                    table.add(
                        "miss",
                        case,
                        server.name,
                        "from upstream",
                        "blobs",
                        _upstream_copies(testbed, log_offset, testbed.large_blob),
                    )


def time_to_first_byte(testbed: Testbed, table: ResultTable) -> None:
    """Measure the time to the first byte of small blobs on one connection, and compare it with a direct fetch."""
    case = "64 KiB, cold"
    for round_number in range(testbed.scale.rounds):
        blobs = [create_blob(testbed.root, _COLD_BLOB_SIZE) for _ in range(testbed.scale.cold_blobs)]
        paths = [blob.path for blob in blobs]
        with ExitStack() as stack:
            servers = [
                stack.enter_context(start_server()) for start_server in (testbed.cold_proxy, testbed.caching_nginx)
            ]
            first_byte_ms: dict[str, float] = {}
            for server in alternate_order(round_number, [*servers, testbed.registry]):
                log_progress("ttfb", case, server.name)
                result = testbed.generator.run_requests(server, paths, count=len(paths))
                first_byte_ms[server.name] = result.first_byte * _MS
                table.add("ttfb", case, server.name, "first byte", "ms", first_byte_ms[server.name])
        for name in (PROXY, NGINX):
            table.add("ttfb", case, name, "over direct", "ms", first_byte_ms[name] - first_byte_ms[DIRECT])


def joined_download(testbed: Testbed, table: ResultTable) -> None:
    """Let many clients request at once a blob that the registry sends slowly, and compare them with one client."""
    case, blob = f"{JOINING_CLIENTS} clients", create_blob(testbed.root, testbed.scale.joined_blob)
    for round_number in range(testbed.scale.rounds):
        with testbed.cold_proxy() as server:
            log_progress("joined", "1 client", server.name)
            single_client_seconds = _measure_slow_download(testbed, table, "1 client", server, blob, 1)
        for start_server in alternate_order(round_number, [testbed.cold_proxy, testbed.caching_nginx]):
            with start_server() as server:
                log_progress("joined", case, server.name)
                duration = _measure_slow_download(testbed, table, case, server, blob, JOINING_CLIENTS)
                if server.name == PROXY:
                    table.add("joined", case, PROXY, "over 1 client", "×", duration / single_client_seconds)
    testbed.remove_resource(blob)


def thundering_herd(testbed: Testbed, table: ResultTable) -> None:
    """Let a whole fleet of clients request the same uncached layer at the same time."""
    count = testbed.scale.herd_clients
    case = f"{count:,} clients"
    for round_number in range(testbed.scale.rounds):
        blob = create_blob(testbed.root, testbed.scale.herd_blob)
        for start_server in alternate_order(round_number, [testbed.cold_proxy, testbed.caching_nginx]):
            with start_server() as server:
                log_progress("herd", case, server.name)
                log_offset = testbed.origin_log_offset()
                result = testbed.generator.run_requests(server, [blob.path], connections=count, count=1)
                record_throughput(table, "herd", case, server, result, result.bytes)
                table.add("herd", case, server.name, "last first byte", "ms", max(result.first_byte_times) * _MS)
                table.add(
                    "herd", case, server.name, "from upstream", "blobs", _upstream_copies(testbed, log_offset, blob)
                )
        testbed.remove_resource(blob)


def _measure_slow_download(
    testbed: Testbed, table: ResultTable, case: str, server: RunningServer, blob: Resource, count: int
) -> float:
    """Return the seconds until the last client has received the blob."""
    log_offset = testbed.origin_log_offset()
    result = testbed.generator.run_requests(server, [blob.slow_path], connections=count, count=1)
    if count > 1:
        first_byte_spread = (max(result.first_byte_times) - min(result.first_byte_times)) * _MS
        table.add("joined", case, server.name, "first byte", "ms", first_byte_spread)
        table.add("joined", case, server.name, "from upstream", "blobs", _upstream_copies(testbed, log_offset, blob))
    table.add("joined", case, server.name, "last byte", "s", result.wall)
    return result.wall


def _upstream_copies(testbed: Testbed, log_offset: int, blob: Resource) -> float:
    return testbed.origin_bytes_since(log_offset) / blob.size
