"""Memory per connection, measured in a separate server process."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

CLIENTS = 500
SERVER = Path(__file__).parent / "support" / "memory_server.py"
PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _raise_file_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))  # the server inherits it
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class ServerProcess:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )
        assert self._process.stdout is not None
        self._tls, self._plain = map(int, self._process.stdout.readline().split())

    def connect(self, path: str) -> ssl.SSLSocket:
        """Request `path` and read only the beginning of the response."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = context.wrap_socket(socket.create_connection(("127.0.0.1", self._tls), timeout=20))
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: a.test\r\n\r\n" % path.encode())
        assert sock.recv(12) == b"HTTP/1.1 200"
        return sock

    def wait_until_blocked(self, count: int) -> None:
        url = f"http://127.0.0.1:{self._plain}/blocked?{count}"
        assert urllib.request.urlopen(url, timeout=60).read() == b"yes"

    @property
    def resident(self) -> int:
        """The resident set size in KiB."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize(("path", "max_kib"), [("/large", 36), ("/", 32)], ids=["slow", "idle"])
def test_memory_per_connection(
    path: str, max_kib: int, record_property: pytest.RecordProperty, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        server = ServerProcess()
        stack.callback(server.close)
        for warm_up_path in ("/", "/large"):  # allocate everything that the server needs only once
            server.connect(warm_up_path).close()
        server.wait_until_blocked(0)
        before = server.resident
        for _ in range(CLIENTS):
            stack.enter_context(server.connect(path))
        server.wait_until_blocked(CLIENTS if path == "/large" else 0)
        per_connection = (server.resident - before) / CLIENTS
    with capsys.disabled():
        print(f" {path}: {per_connection:.1f} KiB for each of {CLIENTS} connections", end="")
    assert per_connection <= max_kib
