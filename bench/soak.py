"""`make soak`: puts mixed loads on a daemon for minutes, and checks that its memory and descriptors do not grow.

Clients pull and verify, abort downloads, push and delete. The upstream registry goes down and comes back. The cache is
smaller than the pulled content, so that it evicts all the time, and garbage is collected. The run fails

- if the memory or the descriptors of all processes of the daemon together grow;
- if one of these processes ends;
- if descriptors stay open after the clients have disconnected;
- if a client ever receives wrong content, or receives an error while the upstream registry is up.
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
_SAMPLES_PER_REPORT = 10  # samples between two lines of output
_SAMPLES_PER_COLLECTION = 60  # samples between two garbage collections
# Seconds for the daemon to close unused connections. It keeps idle upstream connections for 60 s.
_SETTLE_TIMEOUT = 75.0
_BLOB_COUNT, _BLOB_SIZES = 120, (16 * 1024, 1 << 20, 8 << 20)
_MANIFEST_COUNT = 30
_CACHE_SIZE = "128m"  # the clients pull about 360 MB

_MEMORY_GROWTH_LIMIT, _DESCRIPTOR_GROWTH_LIMIT = 0.03, 0.10
"""Permitted growth from the second quarter to the last, as a fraction: loads are random, and heaps fragment."""
_MEMORY_SLACK, _DESCRIPTOR_SLACK = 2e6, 8
"""Permitted growth in addition to that, in bytes and in descriptors."""


@frozen
class ProcessSample:
    """The sums over all processes of the daemon, memory in bytes, and the process ids."""

    memory: int
    descriptors: int
    pids: frozenset[int]

    @classmethod
    def take(cls, server: BenchServer) -> ProcessSample:
        return cls(server.resident_bytes(), server.descriptor_count(), frozenset(server.pids()))


def quarter_medians(values: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the second and of the last quarter. The first quarter is for warming up."""
    quarter = len(values) // 4
    if not quarter:
        raise BenchError("The run was too short to detect growth; use a larger --minutes.")
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def find_problems(samples: Sequence[ProcessSample], before: ProcessSample, after: ProcessSample) -> Iterator[str]:
    """Yield a sentence for each problem: growth under the load, descriptors left open, or processes that ended.

    `before` and `after` are samples without clients.
    """
    for resource, values, growth_limit, slack in (
        ("memory", [sample.memory for sample in samples], _MEMORY_GROWTH_LIMIT, _MEMORY_SLACK),
        ("descriptors", [sample.descriptors for sample in samples], _DESCRIPTOR_GROWTH_LIMIT, _DESCRIPTOR_SLACK),
    ):
        earlier, later = quarter_medians(values)
        if later > earlier * (1 + growth_limit) + slack:
            yield f"{resource} grew from {earlier:,.0f} to {later:,.0f}"
    if after.descriptors > before.descriptors + _DESCRIPTOR_SLACK:
        yield f"{after.descriptors} descriptors are open without clients, {before.descriptors} were open at the start"
    if ended := before.pids - after.pids:
        yield f"{len(ended)} of {len(before.pids)} processes ended"


def main() -> None:
    """Run the soak test for the time that the command line gives."""
    parser = argparse.ArgumentParser("soak", description="Load the daemon for minutes, and check that nothing grows.")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="duration (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients' random choices (%(default)s)")
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
    """Run the soak test, print its progress, and return the failures."""
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
    summary = [f"and {len(failures) - 5} more client failures"] if len(failures) > 5 else []
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
    """Take a sample every second and return all of them; print every tenth, and collect garbage once a minute."""
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
    """Wait until no more descriptors are open than in `before`, at most _SETTLE_TIMEOUT; return the last sample."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    while (sample := ProcessSample.take(server)).descriptors > before.descriptors and time.monotonic() < deadline:
        time.sleep(_SAMPLE_INTERVAL)
    return sample


def _format_sample(sample: ProcessSample) -> str:
    return f"{sample.memory / 1e6:.1f} MB, {sample.descriptors} descriptors"


if __name__ == "__main__":
    main()
