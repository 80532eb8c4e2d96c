"""The load generator: compiles `load.c` with gcc, runs it against a server, and parses its output."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from bench.endpoints import RunningServer
from bench.servers import BenchError, ResourceUsage, pin_to_cores

SOURCE = Path(__file__).with_name("load.c")

REQUESTS, RECONNECTS, HANDSHAKES = "requests", "reconnects", "handshakes"
"""Modes of load.c: requests on open connections, a new connection for each request, or handshakes only."""


@frozen
class GeneratorResult(ResourceUsage):
    """The result of one load. Response times are medians over all responses, in seconds since the request.

    On new connections they count from before the connection is made.
    """

    count: int
    """Complete responses."""
    resumed: int
    """Connections that resumed a TLS session."""
    bytes: int
    """Bytes received in bodies."""
    first_byte: float
    """Seconds until the first byte of the body, or until the end of the handshake if there is no request."""
    last_byte: float
    """Seconds until the last byte of the body, or until the end of the handshake if there is no request."""
    first_byte_times: tuple[float, ...]
    """For each connection: seconds until the first byte of its first response."""


class LoadGenerator:
    """The compiled program. Create it with `compile`."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def compile(cls, folder: Path) -> LoadGenerator:
        """Compile load.c into `folder`. Raise `BenchError` if that fails."""
        program = folder / "load"
        argv = ["gcc", "-O2", "-std=gnu17", "-Wall", "-o", str(program), str(SOURCE), "-lssl", "-lcrypto", "-pthread"]
        try:
            result = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
        except FileNotFoundError:
            raise BenchError("gcc is not installed; install the Debian package gcc.") from None
        if result.returncode:
            raise BenchError(f"gcc failed to compile {SOURCE.name}, which needs libssl-dev:\n{result.stdout}")
        return cls(program)

    def run_requests(
        self, server: RunningServer, paths: Sequence[str], *, connections: int = 1, count: int = 0, seconds: float = 0.0
    ) -> GeneratorResult:
        """Request `paths` in turn on open connections: `count` requests on each, or as many as `seconds` allow."""
        return self._run(server, paths, mode=REQUESTS, connections=connections, count=count, seconds=seconds)

    def run_reconnects(
        self, server: RunningServer, paths: Sequence[str], *, connections: int, seconds: float, resume: bool
    ) -> GeneratorResult:
        """For `seconds`, open a connection, send one request and close; `connections` clients at a time."""
        return self._run(server, paths, mode=RECONNECTS, connections=connections, seconds=seconds, resume=int(resume))

    def run_handshakes(self, server: RunningServer, hosts: Sequence[str]) -> GeneratorResult:
        """Connect to each of `hosts`, one after the other, and close the connection after the handshake."""
        return self._run(server, [], hosts, mode=HANDSHAKES)

    def _run(
        self, server: RunningServer, paths: Sequence[str], hosts: Sequence[str] = (), **options: Any
    ) -> GeneratorResult:
        endpoint, server_process = server.endpoint, server.process
        options |= {
            "port": endpoint.port,
            "ca": endpoint.ca_file,
            "connect": int(endpoint.through_connect),
        }
        argv = [str(self._program), *(f"{name}={value}" for name, value in options.items())]
        argv += [f"host={host}" for host in hosts or [endpoint.host]]
        argv += [f"path={path}" for path in paths]
        with subprocess.Popen(
            pin_to_cores(argv, server_process.cores.clients),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as load_process:
            assert load_process.stdout is not None
            load_process.stdout.readline()
            server_cpu = server_process.cpu_seconds()
            output, errors = load_process.communicate("\n")
            server_cpu = server_process.cpu_seconds() - server_cpu
        if load_process.returncode:
            raise BenchError(f"The clients of {endpoint.name} failed: {errors[-2000:]}")
        return parse_output(output, server_cpu)


def parse_output(output: str, server_cpu: float) -> GeneratorResult:
    """Parse the JSON that load.c prints; `server_cpu` is the server's CPU time under the load, in seconds."""
    data = json.loads(output)
    return GeneratorResult(
        wall=data["wall"],
        server_cpu=server_cpu,
        clients_cpu=data["cpu"],
        count=data["count"],
        resumed=data["resumed"],
        bytes=int(data["bytes"]),
        first_byte=data["first_byte"][0],
        last_byte=data["last_byte"][0],
        first_byte_times=tuple(data["first_byte_times"]),
    )
