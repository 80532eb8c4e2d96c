"""Description of the machine and of the program versions in a run."""

from __future__ import annotations

import datetime
import os
import platform

from OpenSSL import SSL

import twisted
from bench import docker_registry, nginx
from bench.daemon import default_workers
from bench.image import skopeo_version
from bench.testbed import NGINX_WORKERS


def describe_machine() -> dict[str, str]:
    """Return the facts that a reader needs to judge the figures, as name and value."""
    uname = platform.uname()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {_processor()}, {uname.system} {uname.release}, "
        f"congestion control of TCP: {_congestion_control()}",
        "daemon": f"Python {platform.python_version()}, Twisted {twisted.__version__}, "
        f"{SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()}; {default_workers()} workers, one in rows per core",
        "peers": f"{nginx.version()}, {NGINX_WORKERS} workers, one in rows per core; {docker_registry.version()}",
        "clients": f"on the same cores: bench/load.c; {skopeo_version()}; Python for pushes and memory",
        "load average at the start": load_average(),
    }


def load_average() -> str:
    """Return the load averages of the last one, five and fifteen minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _congestion_control() -> str:
    try:
        with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
