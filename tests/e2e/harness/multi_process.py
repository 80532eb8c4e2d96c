"""A daemon with several processes, their pids, and connections to a particular process."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.e2e.harness.http_client import BufferedResponse, read_response
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon

WORKERS = 3


class MultiProcessDaemon(RegistryDaemon):
    """A daemon with `WORKERS` serving processes: the main process, number 0, and the workers 1, 2 and so on.

    The setting of that name may be another number.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.workers = int(settings.get("WORKERS", WORKERS))
        super().__init__(folder, {"WORKERS": str(WORKERS), **settings})

    def start(self) -> None:
        log_offset = self.log_offset()
        super().start()
        wait_until(lambda: self.output_text[log_offset:].count(" serves") == self.workers - 1, "all workers serve")

    @property
    def serving_pids(self) -> list[int]:
        """Return the pids of the serving processes: the main process, then the fork server's children by age."""
        return [self.pid, *child_pids(self.fork_server_pid)]

    @property
    def fork_server_pid(self) -> int:
        return child_pids(self.pid)[0]

    def pid_serving(self, connection: http.client.HTTPConnection) -> int | None:
        """Return the pid of the process that serves a connection, or None while it is passed between processes."""
        assert isinstance(connection.sock, socket.socket)
        local_port, remote_port = connection.sock.getsockname()[1], connection.sock.getpeername()[1]
        inode = _socket_inode(remote_port, local_port)
        pids = [pid for pid in self.serving_pids if inode is not None and f"socket:[{inode}]" in open_file_targets(pid)]
        return pids[0] if len(pids) == 1 else None

    def connection_to_each_process(self, url: str) -> AbstractContextManager[dict[int, http.client.HTTPConnection]]:
        """Open one connection for `url` to each process, by pid; they stay open for the time of the context."""
        return self._connection_to_each_process(lambda: self.client.new_connection(url))

    def hosted_connection_to_each_process(self) -> AbstractContextManager[dict[int, http.client.HTTPConnection]]:
        """Open one plain HTTP connection to the hosted registry in each process, by pid."""
        return self._connection_to_each_process(
            lambda: http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        )

    @contextmanager
    def _connection_to_each_process(
        self, connection_factory: Callable[[], http.client.HTTPConnection]
    ) -> Iterator[dict[int, http.client.HTTPConnection]]:
        by_pid: dict[int, http.client.HTTPConnection] = {}
        with ExitStack() as stack:
            for _ in range(4 * WORKERS):
                connection = connection_factory()
                stack.callback(connection.close)
                by_pid.setdefault(self.connect_and_get_pid(connection), connection)
                if len(by_pid) == WORKERS:
                    break
            assert sorted(by_pid) == sorted(self.serving_pids)
            yield {pid: by_pid[pid] for pid in self.serving_pids}

    def connect_and_get_pid(self, connection: http.client.HTTPConnection) -> int:
        """Connect, and return the pid of the process that serves the connection.

        The process is known only after its first response, which may be the one to CONNECT.
        """
        connection.connect()
        if not isinstance(connection, http.client.HTTPSConnection):
            request_on(connection, "GET", "/v2/")
        wait_until(lambda: self.pid_serving(connection) is not None, "a process serves the connection")
        pid = self.pid_serving(connection)
        assert pid is not None
        return pid

    def run_cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line tool `dockerproxy`."""
        argv = [sys.executable, "-m", "dockerproxy.cli", *arguments]
        return subprocess.run(
            [*argv, "--socket", str(self.state_folder / "run/control.sock")], env=self.environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


def request_on(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> BufferedResponse:
    """Send a request on a connection, which stays open, and return the response."""
    connection.request(method, target, body=body, headers=dict(headers or {}))
    return read_response(connection.getresponse())


def all_exited(pids: list[int]) -> bool:
    """Return whether all of these processes have ended."""
    return not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)


def child_pids(pid: int) -> list[int]:
    """Return the processes that the main thread of a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _socket_inode(local: int, remote: int) -> str | None:
    """Return the inode of the TCP socket with these two ports of 127.0.0.1, or None."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(address.partition(":")[2], 16) for address in fields[1:3]] == [local, remote]:
            return fields[9]
    return None


def open_file_targets(pid: int) -> set[str]:
    targets = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            targets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return targets
