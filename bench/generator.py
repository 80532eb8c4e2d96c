"""The load generator: `load.c`, compiled by gcc, and what it makes of a server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from bench.servers import BenchError, Cost, on_cores
from bench.targets import Serving

SOURCE = Path(__file__).with_name("load.c")

REQUESTS, VISITS, GREETINGS = "requests", "visits", "greetings"
"""What the connections do: ask again and again, come anew for every request, or go after the handshake."""


@frozen
class Outcome(Cost):
    """What a load came to. Times of an answer are medians over all of them, in seconds from its request."""

    count: int
    """Answers that came whole."""
    resumed: int
    """Connections that resumed a TLS session."""
    bytes: int
    """Bytes of bodies."""
    first: float
    """Until the first byte of the body."""
    whole: float
    """Until the last one, or the end of the handshake. On new connections both count from before they connect."""
    firsts: tuple[float, ...]
    """The time to the first byte of each connection's first answer."""


class Generator:
    """The compiled program. `compile` makes one."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def compile(cls, folder: Path) -> Generator:
        """Compile it into `folder`. Raise `BenchError` where that fails."""
        program = folder / "load"
        argv = ["gcc", "-O2", "-std=gnu17", "-Wall", "-o", str(program), str(SOURCE), "-lssl", "-lcrypto", "-pthread"]
        try:
            done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
        except FileNotFoundError:
            raise BenchError("gcc is missing: the Debian package of that name has it.") from None
        if done.returncode:
            raise BenchError(f"{SOURCE.name} cannot be compiled (it needs the package libssl-dev):\n{done.stdout}")
        return cls(program)

    def ask(
        self, serving: Serving, paths: Sequence[str], *, connections: int = 1, count: int = 0, seconds: float = 0.0
    ) -> Outcome:
        """Ask for `paths` in turn on open connections, `count` times on each, or for so many `seconds`."""
        return self._run(serving, paths, mode=REQUESTS, connections=connections, count=count, seconds=seconds)

    def visit(
        self, serving: Serving, paths: Sequence[str], *, connections: int, seconds: float, resume: bool
    ) -> Outcome:
        """Connect, ask and hang up for so many `seconds`, `connections` of them at a time."""
        return self._run(serving, paths, mode=VISITS, connections=connections, seconds=seconds, resume=int(resume))

    def greet(self, serving: Serving, hosts: Sequence[str]) -> Outcome:
        """Connect to each of `hosts`, one after the other, and hang up after the handshake."""
        return self._run(serving, [], hosts, mode=GREETINGS)

    def _run(self, serving: Serving, paths: Sequence[str], hosts: Sequence[str] = (), **options: Any) -> Outcome:
        target, server = serving.target, serving.server
        options |= {
            "port": target.port,
            "ca": target.ca_file,
            "connect": int(target.through_connect),
        }
        argv = [str(self._program), *(f"{name}={value}" for name, value in options.items())]
        argv += [f"host={host}" for host in hosts or [target.host]]
        argv += [f"path={path}" for path in paths]
        with subprocess.Popen(
            on_cores(argv, server.cores.clients),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            used = server.cpu()
            output, errors = process.communicate("\n")
            used = server.cpu() - used
        if process.returncode:
            raise BenchError(f"The clients of {target.name} failed: {errors[-2000:]}")
        return read(output, used)


def read(output: str, server_cpu: float) -> Outcome:
    """Return what the program printed, and what the server used meanwhile."""
    data = json.loads(output)
    return Outcome(
        wall=data["wall"],
        server_cpu=server_cpu,
        clients_cpu=data["cpu"],
        count=data["count"],
        resumed=data["resumed"],
        bytes=int(data["bytes"]),
        first=data["first"][0],
        whole=data["whole"][0],
        firsts=tuple(data["firsts"]),
    )
