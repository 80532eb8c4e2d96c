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

from bench.clients import Clients
from bench.content import make_blob, make_manifest
from bench.daemon import Ports, command
from bench.scale import QUICK
from bench.servers import BenchError, Server
from bench.stage import OWN, Stage
from bench.startup import prepare
from bench.visitors import Upstream, Visitors

_MINUTES = 10.0
_SAMPLE = 1.0  # seconds
_TELL = 10  # samples between two lines that are printed
_COLLECT = 60  # samples between two garbage collections
_REST = 75.0  # seconds that the daemon has to close what it does not need: it keeps idle connections upstream for 60
_BLOBS, _SIZES = 120, (16 * 1024, 1 << 20, 8 << 20)
_MANIFESTS = 30
_CACHE = "128m"  # of about 360 MB that are pulled

_MORE_MEMORY, _MORE_DESCRIPTORS = 0.03, 0.10
"""What the later part of a soak may have above the earlier one: loads are random, and heaps fragment."""
_SLACK_MEMORY, _SLACK_DESCRIPTORS = 2e6, 8
"""And besides, in bytes and descriptors."""


@frozen
class Sample:
    """What the daemon's processes have together, memory in bytes, and their ids."""

    memory: int
    descriptors: int
    processes: frozenset[int]

    @classmethod
    def of(cls, server: Server) -> Sample:
        return cls(server.resident(), server.descriptors(), frozenset(server.processes()))


def growth(values: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the second quarter and of the last one: the first quarter is for warming up."""
    quarter = len(values) // 4
    if not quarter:
        raise BenchError("That is too short to say whether anything grows.")
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def complaints(samples: Sequence[Sample], before: Sample, after: Sample) -> Iterator[str]:
    """Yield what has grown or ended: while the load lasted, and from rest to rest."""
    for what, values, more, slack in (
        ("memory", [sample.memory for sample in samples], _MORE_MEMORY, _SLACK_MEMORY),
        ("descriptors", [sample.descriptors for sample in samples], _MORE_DESCRIPTORS, _SLACK_DESCRIPTORS),
    ):
        earlier, later = growth(values)
        if later > earlier * (1 + more) + slack:
            yield f"{what} grew from {earlier:,.0f} to {later:,.0f}"
    if after.descriptors > before.descriptors + _SLACK_DESCRIPTORS:
        yield f"{after.descriptors} descriptors are open without clients; {before.descriptors} were at the start"
    if ended := before.processes - after.processes:
        yield f"{len(ended)} of {len(before.processes)} processes ended"


def main() -> None:
    """Soak for as long as the command line says."""
    parser = argparse.ArgumentParser("soak", description="Load the daemon for minutes, and see whether anything grows.")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="another one has the clients choose otherwise")
    options = parser.parse_args()
    prepare()
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
    ports = Ports()
    with Clients(1) as clients, Stage.open(evolve(QUICK, blob=1 << 20), clients) as stage, stage.fresh_state() as state:
        sizes = random.Random(seed)
        resources = [make_blob(stage.root, sizes.choice(_SIZES)) for _ in range(_BLOBS)]
        resources += [make_manifest(stage.root) for _ in range(_MANIFESTS)]
        with stage.proxy(state, ports, {"CACHE_MAX_SIZE": _CACHE}) as serving:
            hosted = evolve(serving.target, port=ports.tls, host=OWN, through_connect=False)
            before = Sample.of(serving.server)
            visitors = Visitors(serving.target, hosted, resources, Upstream(stage.registry.server))
            with _visiting(visitors, seed):
                samples = _watch(serving.server, visitors, seconds, command(state, "gc", "--grace", "2m"))
            after = _rest(serving.server, before)
    for name, sample in (("at the start", before), ("at the end, without clients", after)):
        print(f"{name}: {_tell(sample)}")
    failures = visitors.failures
    more = [f"and {len(failures) - 5} more of that kind"] if len(failures) > 5 else []
    return [*failures[:5], *more, *complaints(samples, before, after)]


@contextmanager
def _visiting(visitors: Visitors, seed: int) -> Iterator[None]:
    visitors.start(seed)
    try:
        yield
    finally:
        visitors.stop()


def _watch(server: Server, visitors: Visitors, seconds: float, collect: Sequence[str]) -> list[Sample]:
    """Return a sample for each second, and tell of some."""
    samples: list[Sample] = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        samples.append(Sample.of(server))
        if len(samples) % _TELL == 0:
            done = ", ".join(f"{count:,} {what}" for what, count in sorted(visitors.done.items()))
            print(f"{elapsed:4.0f} s: {_tell(samples[-1])}; {done}; {len(visitors.failures)} failures", flush=True)
        if len(samples) % _COLLECT == 0:
            run = subprocess.run(collect, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if run.returncode:
                visitors.failures.append(f"gc: {run.stdout[-500:]}")
        time.sleep(_SAMPLE)
    return samples


def _rest(server: Server, before: Sample) -> Sample:
    """Return what the daemon has when it has as few descriptors open as before, or had the time to."""
    end = time.monotonic() + _REST
    while (sample := Sample.of(server)).descriptors > before.descriptors and time.monotonic() < end:
        time.sleep(_SAMPLE)
    return sample


def _tell(sample: Sample) -> str:
    return f"{sample.memory / 1e6:.1f} MB, {sample.descriptors} descriptors"


if __name__ == "__main__":
    main()
