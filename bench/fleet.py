"""Benchmark of three members with a bucket beside docker-registry's own s3 driver, on the same object store.

Each server has a bucket of its own, and sends what it has to the store before it acknowledges a push. The store syncs
nothing for either of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from attrs import evolve, frozen

from bench.daemon import DaemonPorts
from bench.endpoints import RunningServer
from bench.measurement import MB, alternate_order, client_count_label, log_progress, record_rate, record_throughput
from bench.object_store import ObjectStore, running_store
from bench.push import LARGE_REPOSITORY, LAYER_COUNT, PUSH_CLIENTS, push_large, push_small
from bench.registry_client import open_connection
from bench.servers import BenchError
from bench.table import ALONE, ResultTable
from bench.testbed import HOSTED_REGISTRY_HOST, Testbed

_MEMBERS = 3
_CATALOG_TIMEOUT = 120.0  # seconds until a daemon has taken a bucket over
_bucket_numbers = count(1)


@frozen
class Pair:
    """Two servers of one registry: one to push to, and another one to pull from."""

    pushed: RunningServer
    pulled: RunningServer


def fleet(testbed: Testbed, table: ResultTable) -> None:
    """Push and pull through members, list many repositories, and read what a member has cached."""
    with running_store(testbed.folder / "object-store") as store:
        for round_number in range(testbed.scale.rounds):
            for start_registry in alternate_order(round_number, [_members, _docker_registry]):
                with start_registry(testbed, store, store.create_bucket(f"bucket{next(_bucket_numbers)}")) as pair:
                    _measure_transfers(testbed, table, pair)
        _measure_catalog(testbed, table, store)
    _measure_hits(testbed, table)


def _measure_transfers(testbed: Testbed, table: ResultTable, pair: Pair) -> None:
    """Push to one server, and pull from the other one: for the first time, and once more."""
    size = testbed.scale.large_blob
    log_progress("fleet", "push", pair.pushed.name)
    result = testbed.clients.run(1, pair.pushed.process, push_large, pair.pushed.endpoint, size)
    record_throughput(table, "fleet", "push, 1 layer", pair.pushed, result, size)
    [digest] = result.results
    result = testbed.clients.run(
        PUSH_CLIENTS, pair.pushed.process, push_small, pair.pushed.endpoint, LAYER_COUNT // PUSH_CLIENTS
    )
    record_rate(table, "fleet", f"push, {LAYER_COUNT} small", pair.pushed, result, LAYER_COUNT, "layer")
    for case in ("pull, cold", "pull, warm"):
        log_progress("fleet", case, pair.pulled.name)
        path = f"/v2/{LARGE_REPOSITORY}/blobs/sha256:{digest}"
        pulled = testbed.generator.run_requests(pair.pulled, [path], connections=1, count=1)
        record_throughput(table, "fleet", case, pair.pulled, pulled, pulled.bytes)


def _measure_catalog(testbed: Testbed, table: ResultTable, store: ObjectStore) -> None:
    """List the repositories of one bucket, which both servers read."""
    number, bucket = testbed.scale.repositories, store.create_bucket("catalog")
    for index in range(number):
        _put_repository(store, bucket, f"bench/repository{index:04}")
    case = f"{number:,} repositories"
    for start_registry in (_docker_registry, _members):
        with start_registry(testbed, store, bucket) as pair:
            log_progress("fleet", case, pair.pulled.name)
            _wait_for_catalog(pair.pulled, number)
            for _ in range(testbed.scale.rounds):
                seconds, listed = _list_catalog(pair.pulled, number)
                if listed != number:
                    raise BenchError(f"{pair.pulled.name} listed {listed} of {number} repositories.")
                table.add("fleet", case, pair.pulled.name, "catalogue", "s", seconds)


def _put_repository(store: ObjectStore, bucket: str, name: str) -> None:
    """Write the keys by which a registry knows a repository with one manifest."""
    digest = "0" * 64
    folder = f"docker/registry/v2/repositories/{name}"
    for key in (f"_layers/sha256/{digest}/link", f"_manifests/revisions/sha256/{digest}/link"):
        store.put(bucket, f"{folder}/{key}", f"sha256:{digest}".encode())


def _wait_for_catalog(server: RunningServer, number: int) -> None:
    """Wait until the server lists all repositories. A daemon notes them when it sees a bucket for the first time."""
    deadline = time.monotonic() + _CATALOG_TIMEOUT
    while _list_catalog(server, number)[1] != number:
        if time.monotonic() > deadline:
            raise BenchError(f"{server.name} does not list the {number} repositories of the bucket.")
        time.sleep(0.2)


def _list_catalog(server: RunningServer, number: int) -> tuple[float, int]:
    """Return the seconds that a list of up to `number` repositories takes, and their number."""
    connection = open_connection(server.endpoint)
    try:
        started = time.monotonic()
        connection.request("GET", f"/v2/_catalog?n={number}")
        response = connection.getresponse()
        content = response.read()
        seconds = time.monotonic() - started
        if response.status != 200:
            raise BenchError(
                f"{server.name} answered {response.status} to a request of the catalogue: {content[:200]!r}"
            )
        return seconds, len(json.loads(content)["repositories"])
    finally:
        connection.close()


def _measure_hits(testbed: Testbed, table: ResultTable) -> None:
    """Read a blob that a member has cached, and one that a daemon without a fleet has."""
    path = testbed.large_blob.path
    with ExitStack() as stack:
        warm = stack.enter_context(testbed.warm_proxy())
        alone = RunningServer(warm.proxy.process, evolve(warm.proxy.endpoint, name=ALONE))
        member = stack.enter_context(_warm_member(testbed))
        for round_number in range(testbed.scale.rounds):
            for server in alternate_order(round_number, [member, alone]):
                for connections in (1, 8):
                    case = f"hit, {client_count_label(connections)}"
                    log_progress("fleet", case, server.name)
                    result = testbed.generator.run_requests(server, [path], connections=connections, count=1)
                    table.add("fleet", case, server.name, "throughput", "MB/s", result.bytes / result.wall / MB)
                    table.add("fleet", case, server.name, "server CPU", "s/GB", result.server_cpu / result.bytes * 1e9)


@contextmanager
def _warm_member(testbed: Testbed) -> Iterator[RunningServer]:
    """Run the first of three members, of which the others do not run, with the large blob in its cache."""
    ports = [DaemonPorts() for _ in range(_MEMBERS)]
    with testbed.temporary_state() as state:
        with testbed.proxy(state, ports[0], _fleet_settings(ports, 0, state / "ca")) as server:
            testbed.fetch_head(server, testbed.large_blob)
            yield server


@contextmanager
def _members(testbed: Testbed, store: ObjectStore, bucket: str) -> Iterator[Pair]:
    """Run three members with `bucket`."""
    ports = [DaemonPorts() for _ in range(_MEMBERS)]
    with ExitStack() as stack:
        ca, servers = stack.enter_context(testbed.temporary_state()), list[RunningServer]()
        for number in range(_MEMBERS):
            state = stack.enter_context(testbed.temporary_state())
            settings = {**_fleet_settings(ports, number, ca), **store.daemon_settings(bucket)}
            server = stack.enter_context(testbed.proxy(state, ports[number], settings))
            endpoint = evolve(
                server.endpoint, port=ports[number].registry_tls, host=HOSTED_REGISTRY_HOST, through_connect=False
            )
            servers.append(RunningServer(server.process, endpoint))
        yield Pair(servers[0], servers[1])


def _fleet_settings(ports: Sequence[DaemonPorts], number: int, ca: Path) -> dict[str, str]:
    names = [f"127.0.0.1:{one.proxy}" for one in ports]
    return {"FLEET": " ".join(names), "FLEET_ADDRESS": names[number], "CA_DIR": str(ca)}


@contextmanager
def _docker_registry(testbed: Testbed, store: ObjectStore, bucket: str) -> Iterator[Pair]:
    """Run docker-registry with `bucket`. It keeps nothing itself, so that it does not matter which one is asked."""
    with testbed.docker_registry(settings=store.docker_registry_settings(bucket)) as server:
        yield Pair(server, server)
