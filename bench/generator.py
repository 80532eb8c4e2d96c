"""The load generator: `load.c`, compiled by gcc, and what it makes of a server."""

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

REQUESTS, RECONNECTS, HANDSHAKES = "requests", "visits", "greetings"
"""What the connections do: ask again and again, come anew for every request, or go after the handshake."""


@frozen
class GeneratorResult(ResourceUsage):
    """What a load came to. Times of an answer are medians over all of them, in seconds from its request."""

    count: int
    """Answers that came whole."""
    resumed: int
    """Connections that resumed a TLS session."""
    bytes: int
    """Bytes of bodies."""
    first_byte: float
    """Until the first byte of the body."""
    last_byte: float
    """Until the last one, or the end of the handshake. On new connections both count from before they connect."""
    first_byte_times: tuple[float, ...]
    """The time to the first byte of each connection's first answer."""


class LoadGenerator:
    """The compiled program. `compile` makes one."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def compile(cls, folder: Path) -> LoadGenerator:
        """Compile it into `folder`. Raise `BenchError` where that fails."""
        program = folder / "load"
        argv = ["gcc", "-O2", "-std=gnu17", "-Wall", "-o", str(program), str(SOURCE), "-lssl", "-lcrypto", "-pthread"]
        try:
            result = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
        except FileNotFoundError:
            raise BenchError("gcc is missing: the Debian package of that name has it.") from None
        if result.returncode:
            raise BenchError(f"{SOURCE.name} cannot be compiled (it needs the package libssl-dev):\n{result.stdout}")
        return cls(program)

    def run_requests(
        self, server: RunningServer, paths: Sequence[str], *, connections: int = 1, count: int = 0, seconds: float = 0.0
    ) -> GeneratorResult:
        """Ask for `paths` in turn on open connections, `count` times on each, or for so many `seconds`."""
        return self._run(server, paths, mode=REQUESTS, connections=connections, count=count, seconds=seconds)

    def run_reconnects(
        self, server: RunningServer, paths: Sequence[str], *, connections: int, seconds: float, resume: bool
    ) -> GeneratorResult:
        """Connect, ask and hang up for so many `seconds`, `connections` of them at a time."""
        return self._run(server, paths, mode=RECONNECTS, connections=connections, seconds=seconds, resume=int(resume))

    def run_handshakes(self, server: RunningServer, hosts: Sequence[str]) -> GeneratorResult:
        """Connect to each of `hosts`, one after the other, and hang up after the handshake."""
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
    """Return what the program printed, and what the server used meanwhile."""
    data = json.loads(output)
    return GeneratorResult(
        wall=data["wall"],
        server_cpu=server_cpu,
        clients_cpu=data["cpu"],
        count=data["count"],
        resumed=data["resumed"],
        bytes=int(data["bytes"]),
        first_byte=data["first"][0],
        last_byte=data["whole"][0],
        first_byte_times=tuple(data["firsts"]),
    )
