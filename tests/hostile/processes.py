"""The processes of a daemon as an attack sees them, and clients with addresses of their own."""

from __future__ import annotations

import json
import re
import resource
import socket
import ssl
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon

_PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Give this process enough descriptors for its clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def client_connection(port: int, source: str, context: ssl.SSLContext | None = None) -> socket.socket:
    """Return a connection from the loopback address `source`, over TLS if there is a `context`."""
    client = socket.create_connection(("127.0.0.1", port), 20, (source, 0))
    return client if context is None else context.wrap_socket(client, server_hostname=HOSTED_REGISTRY_HOST)


@contextmanager
def connections(port: int, count: int, source: str = "127.0.0.1", data: bytes = b"") -> Iterator[list[socket.socket]]:
    """Open `count` connections from the address `source`, and send `data` on each of them."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(client_connection(port, source))
            clients.append(client)
            try:
                client.sendall(data)
            except ConnectionError:
                pass
        yield clients


def run_command(daemon: RegistryDaemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `dockerproxy` with `arguments` for the daemon."""
    socket_path = daemon.state_folder / "run/control.sock"
    command = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(socket_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def debug(daemon: RegistryDaemon) -> dict[str, Any]:
    """Return what `dockerproxy debug` reports."""
    socket_path = daemon.state_folder / "run" / "control.sock"
    command = [sys.executable, "-m", "dockerproxy.cli", "debug", "--json", "--socket", str(socket_path)]
    report: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=_PROJECT).stdout)
    return report


def debug_bounds(daemon: RegistryDaemon) -> dict[str, list[dict[str, Any]]]:
    """Return the reports of each bound by its name: one of each process, or one for all."""
    report = debug(daemon)
    bounds = defaultdict(list)
    for part in (report, *report["processes"]):
        for bound in part["bounds"]:
            bounds[bound["name"]].append(bound)
    return bounds


def resident_bytes(daemon: RegistryDaemon) -> int:
    """Return the resident sets of all serving processes together."""
    return sum(_resident_bytes(process["pid"]) for process in debug(daemon)["processes"])


def _resident_bytes(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
