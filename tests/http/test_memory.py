"""Memory per connection, measured in a separate server process."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.http.support.loopback import MemoryBIOClient, read_exactly

pytestmark = pytest.mark.slow  # hundreds of real connections

CLIENTS = 500
MAX_IN_KERNEL = 256  # KiB for each client: up to 128 unsent, and the rest is unacknowledged or overhead
SERVER = Path(__file__).parent / "support" / "memory_server.py"
PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _raise_file_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))  # the server inherits it
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def unverified_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


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
        sock = unverified_context().wrap_socket(socket.create_connection(("127.0.0.1", self._tls), timeout=20))
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: a.test\r\n\r\n" % path.encode())
        assert sock.recv(12) == b"HTTP/1.1 200"
        return sock

    def connect_early(self, path: str) -> socket.socket:
        """Like `connect`, through a CONNECT that has the ClientHello in the same segment."""
        sock, session = (
            socket.create_connection(("127.0.0.1", self._plain), timeout=20),
            MemoryBIOClient(context=unverified_context()),
        )
        sock.sendall(b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n" + (session.next_flight() or b""))
        assert read_exactly(sock, 19) == b"HTTP/1.1 200 OK\r\n\r\n"
        session.incoming.write(sock.recv(1 << 16))
        session.do_handshake(sock)
        sock.sendall(session.encrypt(b"GET %b HTTP/1.1\r\nHost: a.test\r\n\r\n" % path.encode()))
        assert session.read(sock, 12).startswith(b"HTTP/1.1 200")
        return sock

    def wait_until_blocked(self, count: int) -> int:
        """Wait until `count` clients are blocked; return the bytes that the kernel holds for them."""
        url = f"http://127.0.0.1:{self._plain}/blocked?{count}"
        return int(urllib.request.urlopen(url, timeout=60).read())

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


# Measured: 28 KiB for a slow client, 23 for an idle one. OpenSSL's buffers of 34 KiB, or a piece of 64 KiB that waits
# for a slow client, would exceed the bounds.
@pytest.mark.parametrize(
    ("connect", "path", "max_kib"),
    [
        (ServerProcess.connect, "/large", 36),
        (ServerProcess.connect_early, "/large", 36),
        (ServerProcess.connect, "/", 32),
        (ServerProcess.connect_early, "/", 32),
    ],
    ids=["slow", "slow, early ClientHello", "idle", "idle, early ClientHello"],
)
def test_memory_per_connection(
    connect: Callable[[ServerProcess, str], socket.socket],
    path: str,
    max_kib: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ExitStack() as stack:
        server = ServerProcess()
        stack.callback(server.close)
        for warm_up_path in ("/", "/large"):  # allocate everything that the server needs only once
            connect(server, warm_up_path).close()
        server.wait_until_blocked(0)
        before = server.resident
        for _ in range(CLIENTS):
            stack.enter_context(connect(server, path))
        in_kernel = server.wait_until_blocked(CLIENTS if path == "/large" else 0) / 1024 / CLIENTS
        per_connection = (server.resident - before) / CLIENTS
    with capsys.disabled():
        print(f" {per_connection:.1f} KiB, in the kernel {in_kernel:.0f} KiB, each of {CLIENTS} clients", end="")
    assert per_connection <= max_kib
    assert in_kernel <= MAX_IN_KERNEL
