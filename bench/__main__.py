"""`python -m bench`: the options, and what is printed."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import signal
import ssl
import sys
from typing import NoReturn

from OpenSSL import SSL

import twisted
from bench import docker_registry, nginx
from bench.clients import Clients
from bench.measures import MANY
from bench.measures import MEASURES as PROXY_MEASURES
from bench.push import PUSH_MEASURES
from bench.scale import FULL, QUICK, Scale
from bench.servers import BenchError
from bench.stage import Stage
from bench.table import Table

MEASURES = {**PROXY_MEASURES, **PUSH_MEASURES}

_FILES = 8192  # descriptors: of the slow clients, and of the daemon, which has two for each


def main() -> None:
    """Measure what the command line asks for, and print it."""
    options = _options()
    scale = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, _end)
    _allow_files(_FILES)
    table = Table()
    try:
        machine = _machine()
        with Clients(MANY) as clients, Stage.open(scale, clients) as stage:
            for name in options.only:
                MEASURES[name](stage, table)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    machine["load average at the end"] = _load_average()
    if options.json:
        print(table.json(machine))
    else:
        print("\n".join(f"{name}: {value}" for name, value in machine.items()))
        print(
            f"rounds: {scale.rounds}, of which the medians are shown; a ratio is the proxy's figure over the other's\n"
        )
        print(table.text(_titles(scale)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description="Measure the proxy beside nginx and docker-registry.")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, and no more")
    parser.add_argument("--only", type=_names, default=list(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--json", action="store_true", help="print JSON, with the figures of each round")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MEASURES)}")
    return names


def _titles(scale: Scale) -> dict[str, str]:
    size = "1 GiB" if scale.blob == 1 << 30 else f"{scale.blob >> 20} MiB"
    blob = f"a blob of {size}"
    return {
        "hit": f"hit: {blob} that is cached (nginx: a file)",
        "miss": f"miss: {blob} that is fetched (nginx: proxy_cache, proxy_cache_lock)",
        "small": "small: a cached blob of 1.5 KiB, on connections that stay open (nginx: a file)",
        "connect": "connect: the same, each on a new connection (CONNECT, TLS; nginx: TLS)",
        "memory": "memory: growth of the resident set for each connection",
        "push": f"push: a layer of {size}, in chunks, by 1 client; layers of 10 kB by 5 clients (TLS)",
        "gc": "gc: garbage collection, half of the blobs being garbage, and requests beside it",
    }


def _machine() -> dict[str, str]:
    uname = platform.uname()
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {_processor()}, {uname.system} {uname.release}",
        "daemon": f"Python {platform.python_version()}, Twisted {twisted.__version__}, "
        f"{SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()}",
        "peers": f"{nginx.version()}, one worker; {docker_registry.version()}",
        "clients": f"Python's ssl, {ssl.OPENSSL_VERSION}",
        "load average at the start": _load_average(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _allow_files(count: int) -> None:
    """Let this process, and those that it starts, have `count` open files, or as many as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count if most == resource.RLIM_INFINITY else min(count, most), most))


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # so that what was started is stopped


if __name__ == "__main__":
    main()
