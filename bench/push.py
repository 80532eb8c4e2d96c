"""Benchmarks of the hosted registry beside Debian's docker-registry: pushes and garbage collection."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.endpoints import Endpoint
from bench.loads import WaitForStart
from bench.measurement import alternate_order, log_progress, record_rate, record_throughput
from bench.registry_client import open_connection, push_blob, read_response, send_request, with_digest_query
from bench.registry_tree import REPOSITORY, write_garbage_tree
from bench.servers import BenchError
from bench.table import ResultTable
from bench.testbed import PushableServer, Testbed

_BUFFER_SIZE = 1 << 20
_CHUNK_SIZE = 32 * 1024  # bytes of an HTTP chunk: the buffer of io.Copy, with which docker and other Go clients send
LAYER_COUNT, _LAYER_SIZE = 200, 10_000
"""Number of small layers, and the bytes of each."""
PUSH_CLIENTS = 5
"""Clients that push at the same time, because docker pushes five layers at a time."""
LARGE_REPOSITORY = "bench/large"
_REQUEST_INTERVAL = 0.005  # seconds between two requests of the client that runs during a garbage collection


def push(testbed: Testbed, table: ResultTable) -> None:
    """Push a large layer, and many small ones."""
    for round_number in range(testbed.scale.rounds):
        for start_server in alternate_order(round_number, [_hosted_registry, _docker_registry]):
            with start_server(testbed) as server:
                case = "1 layer"
                log_progress("push", case, server.name)
                result = testbed.clients.run(1, server.process, push_large, server.endpoint, testbed.scale.large_blob)
                record_throughput(table, "push", case, server, result, testbed.scale.large_blob)
                case = f"{LAYER_COUNT} small layers"
                log_progress("push", case, server.name)
                result = testbed.clients.run(
                    PUSH_CLIENTS, server.process, push_small, server.endpoint, LAYER_COUNT // PUSH_CLIENTS
                )
                record_rate(table, "push", case, server, result, LAYER_COUNT, "layer")


def garbage_collection(testbed: Testbed, table: ResultTable) -> None:
    """Collect garbage, and measure the latency of requests during it.

    This is measured only once, because creating the garbage takes long.
    """
    for start_server in (_hosted_registry, _docker_registry):
        folder = testbed.folder / "garbage"
        digest, garbage = write_garbage_tree(folder, testbed.scale.gc_blobs)
        try:
            with start_server(testbed, folder) as server:
                case = f"{testbed.scale.gc_blobs:,} blobs"
                log_progress("gc", case, server.name)
                cpu_seconds, started = server.process.cpu_seconds() + _children_cpu(), time.monotonic()
                waits = sorted(_measure_collection(server, digest))
                duration = time.monotonic() - started
                cpu_seconds = server.process.cpu_seconds() + _children_cpu() - cpu_seconds
        finally:
            remaining = _count_blobs(folder)
            shutil.rmtree(folder)
        if remaining != testbed.scale.gc_blobs - garbage:
            expected = testbed.scale.gc_blobs - garbage
            raise BenchError(
                f"{remaining} blobs are left after {server.name}'s garbage collection, expected {expected}."
            )
        table.add("gc", case, server.name, "duration", "s", duration)
        table.add("gc", case, server.name, "CPU", "s", cpu_seconds)
        table.add("gc", case, server.name, "p99 wait", "ms", waits[int(0.99 * len(waits))] * 1000)
        table.add("gc", case, server.name, "longest wait", "ms", waits[-1] * 1000)


PUSH_BENCHMARKS: dict[str, Callable[[Testbed, ResultTable], None]] = {"push": push, "gc": garbage_collection}


@contextmanager
def _hosted_registry(testbed: Testbed, folder: Path | None = None) -> Iterator[PushableServer]:
    with testbed.hosted_registry(folder) as server:
        yield server


@contextmanager
def _docker_registry(testbed: Testbed, folder: Path | None = None) -> Iterator[PushableServer]:
    with testbed.docker_registry(folder) as server:
        yield server


def _measure_collection(server: PushableServer, digest: str) -> list[float]:
    """Collect garbage; return the latencies, in seconds, of a client that requests a manifest all the time."""
    waits, connection = [], open_connection(server.endpoint)
    with subprocess.Popen(server.gc_command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as collector:
        while collector.poll() is None:
            started = time.monotonic()
            send_request(connection, 200, "GET", f"/v2/{REPOSITORY}/manifests/{digest}")
            waits.append(time.monotonic() - started)
            time.sleep(_REQUEST_INTERVAL)
        assert collector.stderr is not None
        if collector.returncode:
            raise BenchError(f"The garbage collection failed:\n{collector.stderr.read()[-2000:]}")
    connection.close()
    return waits


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _count_blobs(folder: Path) -> int:
    """Return the number of existing blobs of `write_garbage_tree`, without manifests and the configuration."""
    files = (folder / "docker/registry/v2/blobs/sha256").glob("*/*/data")
    return sum(file.read_bytes().startswith((b"needed", b"garbage")) for file in files)


# the clients' jobs


def push_large(start: WaitForStart, endpoint: Endpoint, size: int) -> str:
    """Push a layer of `size` bytes as docker does: in HTTP chunks, without a Content-Length. Return its sha256."""
    data, hasher = os.urandom(_BUFFER_SIZE), hashlib.sha256()
    for _ in range(size // _BUFFER_SIZE):
        hasher.update(data)
    pieces = [data[offset : offset + _CHUNK_SIZE] for offset in range(0, _BUFFER_SIZE, _CHUNK_SIZE)]
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    connection = open_connection(endpoint)
    start()
    location = send_request(connection, 202, "POST", f"/v2/{LARGE_REPOSITORY}/blobs/uploads/")
    connection.putrequest("PATCH", location)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(size // _BUFFER_SIZE):
        for chunk in chunks:
            connection.send(chunk)
    connection.send(b"0\r\n\r\n")
    location = read_response(connection, 202, "PATCH")
    send_request(connection, 201, "PUT", with_digest_query(location, hasher.hexdigest()))
    connection.close()
    return hasher.hexdigest()


def push_small(start: WaitForStart, endpoint: Endpoint, count: int) -> None:
    """Push `count` small layers one after the other, with a HEAD request before each."""
    layers = [os.urandom(_LAYER_SIZE) for _ in range(count)]
    connection = open_connection(endpoint)
    start()
    for layer in layers:
        push_blob(connection, "bench/small", layer, hashlib.sha256(layer).hexdigest())
    connection.close()
