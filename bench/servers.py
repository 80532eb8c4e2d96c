"""Servers under load: start and stop of a program, its cores, and the resources that its processes use."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from types import TracebackType

from attrs import frozen

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_START_TIMEOUT = 20.0  # seconds until a program has to listen
_STOP_TIMEOUT = 30.0

# Below the ephemeral ports of the kernel, because a benchmark opens thousands of connections.
_FIRST_PORT, _PORTS = 20000, 11000
_port_numbers = range(_FIRST_PORT, _FIRST_PORT + _PORTS)
_ports = count(random.randrange(_PORTS))

_POLL_INTERVAL = 0.002  # seconds between two checks whether a program listens; limits the precision of startup_seconds


class BenchError(Exception):
    """The benchmark cannot continue. The message is one sentence, and the output of the program if one failed."""


@frozen
class ResourceUsage:
    """The cost of a load: seconds from its start to its end, and seconds of CPU time."""

    wall: float
    server_cpu: float
    clients_cpu: float


@frozen
class CoreAssignment:
    """The cores of servers and of clients. Empty tuples leave the choice to the kernel."""

    server: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()

    @classmethod
    def separate(cls) -> CoreAssignment:
        """Return one core for the server and all others for the clients."""
        first, *others = sorted(os.sched_getaffinity(0))
        return cls((first,), tuple(others) or (first,))

    @classmethod
    def shared(cls, count: int) -> CoreAssignment:
        """Return `count` cores, shared by server and clients, or all cores if there are fewer."""
        cores = tuple(sorted(os.sched_getaffinity(0))[:count])
        return cls(cores, cores)


def pin_to_cores(argv: Sequence[str], cores: Sequence[int]) -> list[str]:
    """Return the command that runs `argv` and its child processes on `cores`."""
    return ["taskset", "-c", ",".join(map(str, cores)), *argv] if cores else list(argv)


def find_program(name: str, package: str) -> str:
    """Return the path of a program. Raise `BenchError` with the name of the Debian package if it is missing."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")  # nginx is in /usr/sbin
    if path is None:
        raise BenchError(f"{name} is not installed; install the Debian package {package}.")
    return path


class BenchServer:
    """A program that listens on `ports` of 127.0.0.1, and writes its output to `folder`/output. A context manager.

    It runs on `cores.server`. `workers` is the number of processes that serve.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        ports: Sequence[int],
        *,
        workers: int = 1,
        cores: CoreAssignment | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.workers = workers
        self.cores = cores or CoreAssignment()
        self.startup_seconds = 0.0
        """Seconds from the start until the program listened on all of its ports."""
        self._argv = pin_to_cores(argv, self.cores.server)
        self._environment = environment
        self._ports = ports
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BenchServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the program and wait until it listens. Raise `BenchError` if that takes too long."""
        started = time.monotonic()
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
            self._wait_until(lambda: all(map(is_listening, self._ports)))
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - started

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the program does not end within _STOP_TIMEOUT."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait_for_output(self, text: str) -> None:
        """Wait until `text` is in the program's output."""
        self._wait_until(lambda: text in self._read_output())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not condition():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{' '.join(self._argv)} did not start:\n{self._read_output()[-4000:]}")
            time.sleep(_POLL_INTERVAL)

    def _read_output(self) -> str:
        return (self.folder / "output").read_text("utf-8", "replace")

    def cpu_seconds(self) -> float:
        """Return the user and system CPU seconds that the processes have used so far."""
        return sum(map(_cpu, self.pids()))

    def resident_bytes(self) -> int:
        """Return the sum of the processes' resident sets in bytes."""
        return sum(
            int(line.split()[1]) * 1024 for pid in self.pids() for line in _matching_lines(pid, "status", "VmRSS:")
        )

    def unique_resident_bytes(self) -> int:
        """Return the resident bytes, with each page that several processes share counted once.

        The sum of the PSS would be too small, because other programs that have loaded the same library reduce it.
        """
        anonymous_total, file_backed = 0, dict[tuple[str, ...], int]()
        for pid in self.pids():
            for mapping, (resident, anonymous_kib) in _mappings(pid):
                file_backed[mapping] = max(file_backed.get(mapping, 0), resident - anonymous_kib)
            anonymous_total += sum(int(line.split()[1]) for line in _matching_lines(pid, "smaps_rollup", "Pss_Anon:"))
        return (anonymous_total + sum(file_backed.values())) * 1024

    def descriptor_count(self) -> int:
        """Return the number of open descriptors of all processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def pids(self) -> list[int]:
        """Return the process ids of the program and of all its descendants."""
        assert self._process is not None
        parents = {int(name): _parent_pid(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        descendants = [self._process.pid]
        for pid in descendants:
            descendants += [child for child, parent in parents.items() if parent == pid]
        return descendants


def _cpu(pid: int) -> float:
    # proc(5), fields 14 to 17: the process's own, and that of its children that have ended, such as the one that
    # collects garbage. They are counted after the name in parentheses, because it may contain spaces.
    return sum(map(int, _stat(pid).split()[11:15])) / _CLOCK_TICKS


def _stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]


def _parent_pid(pid: int) -> int:
    try:
        return int(_stat(pid).split()[1])
    except OSError:  # the process has ended since it was listed
        return 0


def _matching_lines(pid: int, file: str, field: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if line.startswith(field)]


def _mappings(pid: int) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
    """Yield offset, device, inode and path of each mapping, with its resident and its anonymous KiB."""
    mapping: tuple[str, ...] = ()
    resident = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # addresses, permissions, offset, device, inode, path: proc_pid_smaps(5)
            mapping = (rest[1], *rest[4:])
        elif first == "Rss:":
            resident = int(rest[0])
        elif first == "Anonymous:":
            yield mapping, (resident, int(rest[0]))


def is_listening(port: int) -> bool:
    """Return whether a program accepts connections on `port` of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def share_ports(part: int, parts: int) -> None:
    """Make `free_port` use part number `part` of `parts`, because other processes of the same run use the others."""
    global _port_numbers
    size = _PORTS // parts
    _port_numbers = range(_FIRST_PORT + part * size, _FIRST_PORT + (part + 1) * size)


def free_port() -> int:
    """Return a port on which nothing listens; each call returns another one."""
    for number in islice(_ports, len(_port_numbers)):
        port = _port_numbers[number % len(_port_numbers)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BenchError(f"no port is free between {_port_numbers.start} and {_port_numbers.stop}")
