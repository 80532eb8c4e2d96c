"""Servers under load: programs in the foreground, and what their processes use."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")
_START = 20.0  # seconds that a program may take to come up
_STOP = 30.0


class BenchError(Exception):
    """The benchmark cannot go on: one sentence, and what the program wrote where one failed."""


class Server:
    """A program that listens on `ports` of 127.0.0.1; what it writes goes to `folder`/output. A context manager."""

    def __init__(self, argv: Sequence[str], folder: Path, environment: Mapping[str, str], ports: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._argv = argv
        self._environment = environment
        self._ports = ports
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with (self.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                cwd=self.folder,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + _START
        while not all(map(listening, self._ports)):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > end:
                output = (self.folder / "output").read_text("utf-8", "replace")
                raise BenchError(f"{' '.join(self._argv)} did not come up:\n{output[-4000:]}")
            time.sleep(0.02)

    def cpu(self) -> float:
        """Return the CPU seconds, of user and system, that its processes have used so far."""
        # After the name in parentheses, which may hold spaces: proc(5), fields 14 and 15.
        ticks = (_stat(pid).split()[11:13] for pid in self._pids())
        return sum(int(user) + int(system) for user, system in ticks) / _TICKS

    def resident(self) -> int:
        """Return the resident set of its processes in bytes."""
        return sum(int(line.split()[1]) * 1024 for pid in self._pids() for line in _status(pid, "VmRSS:"))

    def _pids(self) -> list[int]:
        """Return the program's process and all that come from it."""
        assert self._process is not None
        parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        found = [self._process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


def _stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]


def _parent(pid: int) -> int:
    try:
        return int(_stat(pid).split()[1])
    except OSError:  # it has ended since it was listed
        return 0


def _status(pid: int, field: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field)]


def listening(port: int) -> bool:
    """Tell whether something accepts connections at `port` of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
