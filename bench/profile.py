"""`make profile`: samples with `perf` the daemon's CPU time under the loads of the benchmark.

The stack of a sample determines its category. The shares of the categories explain the limits in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.clients import ClientPool
from bench.document import PROFILE_FILE
from bench.hits import MANY_CLIENTS
from bench.measurement import log_progress
from bench.process_setup import configure_process
from bench.requests import CONCURRENT_CONNECTS, CONNECTIONS
from bench.scale import FULL, QUICK
from bench.servers import BenchError, BenchServer, CoreAssignment
from bench.testbed import UPSTREAM_HOST, Testbed

Frame = tuple[str, str]
"""The name of a function, and the file that contains it."""

_FREQUENCY = 999  # samples per second and processor; odd, so that sampling does not run in step with a timer
_SECONDS = 5.0  # duration of the loads that are limited by time
_REPEATS = 4  # downloads of the blob by each client, if one takes only a second
_KERNEL = "[kernel.kallsyms]"

# Kernel samples are classified by system call. Sockets come first, because a write to a socket passes through the same
# VFS functions as a write to a file before it reaches those of TCP.
_KERNEL_CATEGORIES = (
    ("receiving", re.compile(r"(tcp|sock|inet6?|unix_stream)_recvmsg")),
    ("sending", re.compile(r"(tcp|sock|inet6?|unix_stream)_sendmsg|tcp_write_xmit|tcp_push|sendfile|splice")),
    ("files", re.compile(r"vfs_|ext4|xfs|btrfs|filemap|generic_perform_write|fsync|fdatasync|sys_openat|newfstatat")),
)
# Wheels of `cryptography` contain an OpenSSL of their own, which TLS uses; hashlib uses the system's. If both use the
# system's, libcrypto's share cannot be divided between TLS and hashing.
_LIBRARY_CATEGORIES = (
    ("interpreter", re.compile(r"python|_cffi_backend")),
    ("TLS", re.compile(r"_rust|libssl")),
    ("hashing", re.compile(r"libcrypto")),
    ("C library", re.compile(r"libc\.so|libc-|libm\.so|ld-linux|vdso|libpthread")),
)

CATEGORIES = (
    *(f"kernel: {name}" for name, _ in _KERNEL_CATEGORIES),
    "kernel: other",
    *(name for name, _ in _LIBRARY_CATEGORIES),
    "other",
)
"""The categories of CPU time, in the order of the columns."""


def classify(stack: Sequence[Frame]) -> str:
    """Return the category of a sample, one of `CATEGORIES`; `stack` begins with the innermost function."""
    _, file = stack[0]
    if file == _KERNEL:
        names = " ".join(name for name, symbol_file in stack if symbol_file == _KERNEL)
        return "kernel: " + next(
            (category for category, pattern in _KERNEL_CATEGORIES if pattern.search(names)), "other"
        )
    return next(
        (library for library, pattern in _LIBRARY_CATEGORIES if pattern.search(os.path.basename(file))), "other"
    )


def parse_stacks(script: Iterable[str]) -> Iterator[list[Frame]]:
    """Yield the stack of each sample in the output of `perf script -F ip,sym,dso`. No stack is empty."""
    stack: list[Frame] = []
    for line in script:
        if not line.strip():
            if stack:
                yield stack
            stack = []
        elif match := re.fullmatch(r"\s*[0-9a-f]+ (.*) \((.*)\)\s*", line):
            stack.append((match[1], match[2]))
    if stack:
        yield stack


def category_shares(samples: Iterable[Sequence[Frame]]) -> dict[str, float]:
    """Return the share of each category in the samples, from 0 to 1. Raise `BenchError` if there are no samples."""
    counts = Counter(map(classify, samples))
    total = counts.total()
    if not total:
        raise BenchError("perf took no samples.")
    return {name: counts[name] / total for name in CATEGORIES}


def render_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table of the shares under each load, in percent."""
    rows = [("", *CATEGORIES), ("---",) * (len(CATEGORIES) + 1)]
    rows += [
        (load, *(f"{load_shares[name] * 100:.0f} %" for name in CATEGORIES)) for load, load_shares in shares.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@contextmanager
def perf_record(server: BenchServer, recording: Path) -> Iterator[None]:
    """Sample the server's processes for the time of the context. Raise `BenchError` if perf cannot."""
    control_read, control_write = os.pipe()
    ack_read, ack_write = os.pipe()
    argv = ["perf", "record", "--quiet", "--freq", str(_FREQUENCY), "--call-graph", "fp", "--output", str(recording)]
    argv += ["--pid", ",".join(map(str, server.pids())), "--delay", "-1"]
    argv += ["--control", f"fd:{control_read},{ack_write}"]
    with (
        open(recording.with_suffix(".txt"), "w+") as perf_output,
        open(control_write, "wb", 0) as control,
        open(ack_read) as ack,
    ):
        perf = subprocess.Popen(argv, pass_fds=(control_read, ack_write), stdout=perf_output, stderr=perf_output)
        os.close(control_read)
        os.close(ack_write)
        try:
            with suppress(BrokenPipeError):  # perf has ended; its output, which is read below, has the reason
                control.write(b"enable\n")
            if "ack" not in ack.readline():
                perf_output.seek(0)
                raise BenchError(f"perf cannot sample the daemon:\n{perf_output.read()[-2000:]}")
            yield
        finally:
            perf.send_signal(signal.SIGINT)
            perf.wait()


def read_shares(recording: Path) -> dict[str, float]:
    """Return the share of each category in a recording."""
    argv = ["perf", "script", "--input", str(recording), "--fields", "ip,sym,dso"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as script:
        assert script.stdout is not None
        return category_shares(parse_stacks(script.stdout))


def profile_hit(testbed: Testbed) -> Path:
    """Record a large cached blob, sent to several clients over TLS."""
    with testbed.warm_proxy() as warm, perf_record(warm.proxy.process, recording := testbed.folder / "hit.perf"):
        testbed.generator.run_requests(warm.proxy, [testbed.large_blob.path], connections=MANY_CLIENTS, count=1)
    return recording


def profile_plain_http(testbed: Testbed) -> Path:
    """Record the same blob over plain HTTP, from the mirror."""
    with testbed.warm_proxy() as warm, perf_record(warm.mirror.process, recording := testbed.folder / "plain.perf"):
        testbed.generator.run_requests(
            warm.mirror, [f"{testbed.large_blob.path}?ns={UPSTREAM_HOST}"], connections=MANY_CLIENTS, count=_REPEATS
        )
    return recording


def profile_miss(testbed: Testbed) -> Path:
    """Record a large uncached blob, fetched for one client."""
    with testbed.cold_proxy() as server, perf_record(server.process, recording := testbed.folder / "miss.perf"):
        testbed.generator.run_requests(server, [testbed.large_blob.path], connections=1, count=1)
    return recording


def profile_small(testbed: Testbed) -> Path:
    """Record a cached manifest on many connections; one worker on a core of its own."""
    with (
        testbed.warm_proxy(workers=1, cores=CoreAssignment.separate()) as warm,
        perf_record(warm.proxy.process, recording := testbed.folder / "small.perf"),
    ):
        testbed.generator.run_requests(warm.proxy, [testbed.manifest.path], connections=CONNECTIONS, seconds=_SECONDS)
    return recording


def profile_connect(testbed: Testbed) -> Path:
    """Record a small cached blob, on a new connection with a full handshake each time; one worker on its own core."""
    with (
        testbed.warm_proxy(workers=1, cores=CoreAssignment.separate()) as warm,
        perf_record(warm.proxy.process, recording := testbed.folder / "connect.perf"),
    ):
        testbed.generator.run_reconnects(
            warm.proxy, [testbed.small_blob.path], connections=CONCURRENT_CONNECTS, seconds=_SECONDS, resume=False
        )
    return recording


LOADS: dict[str, Callable[[Testbed], Path]] = {
    f"hit, {MANY_CLIENTS} clients": profile_hit,
    f"plain HTTP, {MANY_CLIENTS} clients": profile_plain_http,
    "miss, 1 client": profile_miss,
    f"small hits, {CONNECTIONS} connections": profile_small,
    f"new tunnels, {CONCURRENT_CONNECTS} at a time": profile_connect,
}
"""The loads, by the name of the table row."""


def main() -> None:
    """Sample the daemon under each load, print the shares, and save them for docs/performance.md."""
    parser = argparse.ArgumentParser("profile", description="Sample the CPU time of the daemon.")
    parser.add_argument("--quick", action="store_true", help="use a smaller blob, to check that everything works")
    parser.add_argument(
        "--output", type=Path, default=PROFILE_FILE, help="write the table and the shares to this file (%(default)s)"
    )
    options = parser.parse_args()
    configure_process()
    if shutil.which("perf") is None:
        sys.exit("profile: perf is not installed; install the Debian package linux-perf")
    shares_by_load: dict[str, dict[str, float]] = {}
    try:
        with ClientPool(1) as clients, Testbed.open(QUICK if options.quick else FULL, clients) as testbed:
            for name, load in LOADS.items():
                log_progress("profile", name, "proxy")
                shares_by_load[name] = read_shares(load(testbed))
    except BenchError as error:
        sys.exit(f"profile: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(render_table(shares_by_load))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"table": render_table(shares_by_load), "shares": shares_by_load}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
