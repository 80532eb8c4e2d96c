"""`make soak`: mixed loads for minutes, with memory and descriptors that must not grow.

Clients pull and verify, leave in the midst of a download, push and delete; the registry upstream goes away and comes
back; the cache is too small for what is pulled, so that it evicts all the time, and garbage is collected. It fails
where memory or descriptors of the daemon's processes, all of them together, grow, where one of them ends, where clients
that are gone leave descriptors behind, and where a client gets what it should not: a wrong content ever, an error
unless the registry was away.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from attrs import evolve, frozen

from bench.clients import ClientPool
from bench.content import create_blob, create_manifest
from bench.daemon import DaemonPorts, cli_command
from bench.process_setup import configure_process
from bench.scale import QUICK
from bench.servers import BenchError, BenchServer
from bench.soak_clients import FlakyUpstream, SoakClients
from bench.testbed import HOSTED_REGISTRY_HOST, Testbed

_MINUTES = 10.0
_SAMPLE_INTERVAL = 1.0  # seconds
_SAMPLES_PER_REPORT = 10  # samples between two lines that are printed
_SAMPLES_PER_COLLECTION = 60  # samples between two garbage collections
_SETTLE_TIMEOUT = (
    75.0  # seconds that the daemon has to close what it does not need: it keeps idle connections upstream for 60
)
_BLOB_COUNT, _BLOB_SIZES = 120, (16 * 1024, 1 << 20, 8 << 20)
_MANIFEST_COUNT = 30
_CACHE_SIZE = "128m"  # of about 360 MB that are pulled

_MEMORY_GROWTH_LIMIT, _DESCRIPTOR_GROWTH_LIMIT = 0.03, 0.10
"""What the later part of a soak may have above the earlier one: loads are random, and heaps fragment."""
_MEMORY_SLACK, _DESCRIPTOR_SLACK = 2e6, 8
"""And besides, in bytes and descriptors."""


@frozen
class ProcessSample:
    """What the daemon's processes have together, memory in bytes, and their ids."""

    memory: int
    descriptors: int
    pids: frozenset[int]

    @classmethod
    def take(cls, server: BenchServer) -> ProcessSample:
        return cls(server.resident_bytes(), server.descriptor_count(), frozenset(server.pids()))


def quarter_medians(values: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the second quarter and of the last one: the first quarter is for warming up."""
    quarter = len(values) // 4
    if not quarter:
        raise BenchError("That is too short to say whether anything grows.")
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def find_problems(samples: Sequence[ProcessSample], before: ProcessSample, after: ProcessSample) -> Iterator[str]:
    """Yield what has grown or ended: while the load lasted, and from rest to rest."""
    for resource, values, growth_limit, slack in (
        ("memory", [sample.memory for sample in samples], _MEMORY_GROWTH_LIMIT, _MEMORY_SLACK),
        ("descriptors", [sample.descriptors for sample in samples], _DESCRIPTOR_GROWTH_LIMIT, _DESCRIPTOR_SLACK),
    ):
        earlier, later = quarter_medians(values)
        if later > earlier * (1 + growth_limit) + slack:
            yield f"{resource} grew from {earlier:,.0f} to {later:,.0f}"
    if after.descriptors > before.descriptors + _DESCRIPTOR_SLACK:
        yield f"{after.descriptors} descriptors are open without clients; {before.descriptors} were at the start"
    if ended := before.pids - after.pids:
        yield f"{len(ended)} of {len(before.pids)} processes ended"


def main() -> None:
    """Soak for as long as the command line says."""
    parser = argparse.ArgumentParser("soak", description="Load the daemon for minutes, and see whether anything grows.")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="another one has the clients choose otherwise")
    options = parser.parse_args()
    configure_process()
    try:
        failures = soak(options.minutes * 60, options.seed)
    except BenchError as error:
        sys.exit(f"soak: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if failures:
        sys.exit("\n".join(f"soak: {failure}" for failure in failures))
    print("soak: nothing grew")


def soak(seconds: float, seed: int) -> list[str]:
    """Do it, tell of it, and return what went wrong."""
    ports = DaemonPorts()
    with (
        ClientPool(1) as clients,
        Testbed.open(evolve(QUICK, large_blob=1 << 20), clients) as testbed,
        testbed.temporary_state() as state,
    ):
        sizes = random.Random(seed)
        resources = [create_blob(testbed.root, sizes.choice(_BLOB_SIZES)) for _ in range(_BLOB_COUNT)]
        resources += [create_manifest(testbed.root) for _ in range(_MANIFEST_COUNT)]
        with testbed.proxy(state, ports, {"CACHE_MAX_SIZE": _CACHE_SIZE}) as server:
            hosted = evolve(server.endpoint, port=ports.registry_tls, host=HOSTED_REGISTRY_HOST, through_connect=False)
            before = ProcessSample.take(server.process)
            soak_clients = SoakClients(server.endpoint, hosted, resources, FlakyUpstream(testbed.registry.process))
            with _clients_running(soak_clients, seed):
                samples = _collect_samples(
                    server.process, soak_clients, seconds, cli_command(state, "gc", "--grace", "2m")
                )
            after = _wait_until_settled(server.process, before)
    for name, sample in (("at the start", before), ("at the end, without clients", after)):
        print(f"{name}: {_format_sample(sample)}")
    failures = soak_clients.failures
    summary = [f"and {len(failures) - 5} more of that kind"] if len(failures) > 5 else []
    return [*failures[:5], *summary, *find_problems(samples, before, after)]


@contextmanager
def _clients_running(soak_clients: SoakClients, seed: int) -> Iterator[None]:
    soak_clients.start(seed)
    try:
        yield
    finally:
        soak_clients.stop()


def _collect_samples(
    server: BenchServer, soak_clients: SoakClients, seconds: float, gc_command: Sequence[str]
) -> list[ProcessSample]:
    """Return a sample for each second, and tell of some."""
    samples: list[ProcessSample] = []
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        samples.append(ProcessSample.take(server))
        if len(samples) % _SAMPLES_PER_REPORT == 0:
            activities = ", ".join(f"{count:,} {activity}" for activity, count in sorted(soak_clients.counts.items()))
            print(
                f"{elapsed:4.0f} s: {_format_sample(samples[-1])}; {activities}; {len(soak_clients.failures)} failures",
                flush=True,
            )
        if len(samples) % _SAMPLES_PER_COLLECTION == 0:
            result = subprocess.run(
                gc_command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            if result.returncode:
                soak_clients.failures.append(f"gc: {result.stdout[-500:]}")
        time.sleep(_SAMPLE_INTERVAL)
    return samples


def _wait_until_settled(server: BenchServer, before: ProcessSample) -> ProcessSample:
    """Return what the daemon has when it has as few descriptors open as before, or had the time to."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    while (sample := ProcessSample.take(server)).descriptors > before.descriptors and time.monotonic() < deadline:
        time.sleep(_SAMPLE_INTERVAL)
    return sample


def _format_sample(sample: ProcessSample) -> str:
    return f"{sample.memory / 1e6:.1f} MB, {sample.descriptors} descriptors"


if __name__ == "__main__":
    main()
