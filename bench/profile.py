"""`make profile`: where the daemon's CPU time goes under the loads of the benchmark, as `perf` samples it.

Each sample is put in one place, by its stack: the shares are what docs/performance.md says of the limits of a row.
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

from bench.clients import Clients
from bench.document import PROFILE
from bench.hits import MANY
from bench.measures import tell
from bench.requests import AT_ONCE, CONNECTIONS
from bench.scale import FULL, QUICK
from bench.servers import BenchError, Cores, Server
from bench.stage import HOST, Stage
from bench.startup import prepare

Frame = tuple[str, str]
"""A function, and the file that it is in."""

_FREQUENCY = 999  # samples a second of each processor; an odd number meets no timer's beat
_SECONDS = 5.0  # of the loads that go on for a time
_AGAIN = 4  # times that each client gets the blob where that takes a second only
_KERNEL = "[kernel.kallsyms]"

# The kernel's part is told apart by what it was asked for. A write to a socket goes through the same functions as one
# to a file before it gets to those of TCP, so sockets come first.
_ASKED = (
    ("receiving", re.compile(r"(tcp|sock|inet6?|unix_stream)_recvmsg")),
    ("sending", re.compile(r"(tcp|sock|inet6?|unix_stream)_sendmsg|tcp_write_xmit|tcp_push|sendfile|splice")),
    ("files", re.compile(r"vfs_|ext4|xfs|btrfs|filemap|generic_perform_write|fsync|fdatasync|sys_openat|newfstatat")),
)
# Wheels of `cryptography` bring an OpenSSL along, for TLS; hashlib has the system's. Where both have the latter, what
# libcrypto does is not told apart.
_FILES = (
    ("interpreter", re.compile(r"python|_cffi_backend")),
    ("TLS", re.compile(r"_rust|libssl")),
    ("hashing", re.compile(r"libcrypto")),
    ("C library", re.compile(r"libc\.so|libc-|libm\.so|ld-linux|vdso|libpthread")),
)

PLACES = (*(f"kernel: {name}" for name, _ in _ASKED), "kernel: other", *(name for name, _ in _FILES), "other")
"""Where CPU time can go, in the order of the columns."""


def place(stack: Sequence[Frame]) -> str:
    """Return which of `PLACES` a sample belongs to; `stack` has the innermost function first."""
    _, file = stack[0]
    if file == _KERNEL:
        names = " ".join(name for name, where in stack if where == _KERNEL)
        return "kernel: " + next((asked for asked, pattern in _ASKED if pattern.search(names)), "other")
    return next((found for found, pattern in _FILES if pattern.search(os.path.basename(file))), "other")


def stacks(script: Iterable[str]) -> Iterator[list[Frame]]:
    """Yield the stack of each sample in the lines that `perf script -F ip,sym,dso` prints; they are never empty."""
    stack: list[Frame] = []
    for line in script:
        if not line.strip():
            if stack:
                yield stack
            stack = []
        elif found := re.fullmatch(r"\s*[0-9a-f]+ (.*) \((.*)\)\s*", line):
            stack.append((found[1], found[2]))
    if stack:
        yield stack


def shares(samples: Iterable[Sequence[Frame]]) -> dict[str, float]:
    """Return the part that each place has of the samples, by its name. Raise `BenchError` where there are none."""
    counts = Counter(map(place, samples))
    total = counts.total()
    if not total:
        raise BenchError("perf took no samples.")
    return {name: counts[name] / total for name in PLACES}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table in Markdown of the shares under each load, in percent."""
    rows = [("", *PLACES), ("---",) * (len(PLACES) + 1)]
    rows += [(load, *(f"{each[name] * 100:.0f} %" for name in PLACES)) for load, each in found.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@contextmanager
def recorded(server: Server, into: Path) -> Iterator[None]:
    """Sample the server's processes while the context lasts. Raise `BenchError` where perf cannot."""
    control, ours = os.pipe()
    heard, acknowledged = os.pipe()
    argv = ["perf", "record", "--quiet", "--freq", str(_FREQUENCY), "--call-graph", "fp", "--output", str(into)]
    argv += ["--pid", ",".join(map(str, server.processes())), "--delay", "-1"]
    argv += ["--control", f"fd:{control},{acknowledged}"]
    with open(into.with_suffix(".txt"), "w+") as said, open(ours, "wb", 0) as order, open(heard) as answer:
        perf = subprocess.Popen(argv, pass_fds=(control, acknowledged), stdout=said, stderr=said)
        os.close(control)
        os.close(acknowledged)
        try:
            with suppress(BrokenPipeError):  # it has ended already, and says why
                order.write(b"enable\n")
            if "ack" not in answer.readline():
                said.seek(0)
                raise BenchError(f"perf cannot sample the daemon:\n{said.read()[-2000:]}")
            yield
        finally:
            perf.send_signal(signal.SIGINT)
            perf.wait()


def read(recording: Path) -> dict[str, float]:
    """Return the shares that a recording has."""
    argv = ["perf", "script", "--input", str(recording), "--fields", "ip,sym,dso"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as script:
        assert script.stdout is not None
        return shares(stacks(script.stdout))


def hit(stage: Stage) -> Path:
    """A large blob that is cached, to several clients by TLS."""
    with stage.filled_proxy() as filled, recorded(filled.proxy.server, into := stage.folder / "hit.perf"):
        stage.generator.ask(filled.proxy, [stage.big.path], connections=MANY, count=1)
    return into


def plain(stage: Stage) -> Path:
    """The same in plain HTTP, from the mirror."""
    with stage.filled_proxy() as filled, recorded(filled.mirror.server, into := stage.folder / "plain.perf"):
        stage.generator.ask(filled.mirror, [f"{stage.big.path}?ns={HOST}"], connections=MANY, count=_AGAIN)
    return into


def miss(stage: Stage) -> Path:
    """A large blob that is fetched, for one client."""
    with stage.empty_proxy() as serving, recorded(serving.server, into := stage.folder / "miss.perf"):
        stage.generator.ask(serving, [stage.big.path], connections=1, count=1)
    return into


def small(stage: Stage) -> Path:
    """A manifest that is cached, on many connections; per core."""
    with (
        stage.filled_proxy(workers=1, cores=Cores.apart()) as filled,
        recorded(filled.proxy.server, into := stage.folder / "small.perf"),
    ):
        stage.generator.ask(filled.proxy, [stage.manifest.path], connections=CONNECTIONS, seconds=_SECONDS)
    return into


def connect(stage: Stage) -> Path:
    """A small blob that is cached, each on a new connection with a full handshake; per core."""
    with (
        stage.filled_proxy(workers=1, cores=Cores.apart()) as filled,
        recorded(filled.proxy.server, into := stage.folder / "connect.perf"),
    ):
        stage.generator.visit(filled.proxy, [stage.small.path], connections=AT_ONCE, seconds=_SECONDS, resume=False)
    return into


LOADS: dict[str, Callable[[Stage], Path]] = {
    f"hit, {MANY} clients": hit,
    f"plain HTTP, {MANY} clients": plain,
    "miss, 1 client": miss,
    f"small hits, {CONNECTIONS} connections": small,
    f"new tunnels, {AT_ONCE} at a time": connect,
}
"""The loads, by what the rows are called."""


def main() -> None:
    """Sample the daemon under each load, print the shares, and keep them for docs/performance.md."""
    parser = argparse.ArgumentParser("profile", description="Sample where the daemon's CPU time goes.")
    parser.add_argument("--quick", action="store_true", help="a smaller blob: shows that it works, and no more")
    parser.add_argument("--output", type=Path, default=PROFILE, help="where the table goes (%(default)s)")
    options = parser.parse_args()
    prepare()
    if shutil.which("perf") is None:
        sys.exit("profile: perf is missing: Debian's package linux-perf has it.")
    found: dict[str, dict[str, float]] = {}
    try:
        with Clients(1) as clients, Stage.open(QUICK if options.quick else FULL, clients) as stage:
            for name, load in LOADS.items():
                tell("profile", name, "proxy")
                found[name] = read(load(stage))
    except BenchError as error:
        sys.exit(f"profile: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(table(found))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"table": table(found), "shares": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
