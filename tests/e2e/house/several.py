"""A daemon of several processes: who they are, and which of them has a connection."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.e2e.house.hosting import Hosting
from tests.e2e.house.process import eventually
from tests.e2e.house.wire import Answer, read

WORKERS = 3


class Several(Hosting):
    """A daemon of `WORKERS` processes, the first of which is number 0 here too."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        super().__init__(folder, {"WORKERS": str(WORKERS), **settings})

    def start(self) -> None:
        since = self.log_end()
        super().start()
        eventually(lambda: self.text[since:].count(" serves") == WORKERS - 1, "all workers serve")

    @property
    def processes(self) -> list[int]:
        """Return the processes that serve: the first, and then the fork server's children by age."""
        return [self.pid, *_children(self.fork_server)]

    @property
    def fork_server(self) -> int:
        return _children(self.pid)[0]

    def owner(self, connection: http.client.HTTPConnection) -> int | None:
        """Return the process that has the other end of a connection; None while it is on its way there."""
        assert isinstance(connection.sock, socket.socket)
        here, there = connection.sock.getsockname()[1], connection.sock.getpeername()[1]
        inode = _inode(there, here)
        owners = [pid for pid in self.processes if inode is not None and f"socket:[{inode}]" in open_files(pid)]
        return owners[0] if len(owners) == 1 else None

    def one_each(self, url: str) -> AbstractContextManager[dict[int, http.client.HTTPConnection]]:
        """Open connections for `url`, one to each process, by process; they stay open for the time of the block."""
        return self._one_each(lambda: self.client.connection(url))

    def one_each_hosted(self) -> AbstractContextManager[dict[int, http.client.HTTPConnection]]:
        """As `one_each`, to the hosted registry in the clear."""
        return self._one_each(lambda: http.client.HTTPConnection("127.0.0.1", self.plain_port, timeout=60))

    @contextmanager
    def _one_each(
        self, make: Callable[[], http.client.HTTPConnection]
    ) -> Iterator[dict[int, http.client.HTTPConnection]]:
        found: dict[int, http.client.HTTPConnection] = {}
        with ExitStack() as stack:
            for _ in range(4 * WORKERS):
                connection = make()
                stack.callback(connection.close)
                found.setdefault(self.connect(connection), connection)
                if len(found) == WORKERS:
                    break
            assert sorted(found) == sorted(self.processes)
            yield {pid: found[pid] for pid in self.processes}

    def connect(self, connection: http.client.HTTPConnection) -> int:
        """Connect, and return the process that has it: then it has answered, be it to CONNECT."""
        connection.connect()
        if not isinstance(connection, http.client.HTTPSConnection):
            ask(connection, "GET", "/v2/")
        eventually(lambda: self.owner(connection) is not None, "some process takes the connection")
        owner = self.owner(connection)
        assert owner is not None
        return owner

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command `dockerproxy`."""
        return subprocess.run(
            [sys.executable, "-m", "dockerproxy.cli", *arguments, "--socket", str(self.state / "run/control.sock")],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send a request on a connection, which stays open, and return the answer."""
    connection.request(method, target, body=body, headers=dict(headers or {}))
    return read(connection.getresponse())


def gone(pids: list[int]) -> bool:
    """Say whether none of these processes is there any more."""
    return not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _inode(local: int, remote: int) -> str | None:
    """Return the inode of the socket that has these two ports of 127.0.0.1."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(address.partition(":")[2], 16) for address in fields[1:3]] == [local, remote]:
            return fields[9]
    return None


def open_files(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return found
