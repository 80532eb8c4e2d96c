"""A client without a login requests large content on many connections and reads nothing. It takes a bounded amount of
memory, in the daemon and in the kernel, however its TLS connections began."""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bench.servers import free_port
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.e2e.harness.threaded_server import ThreadedServer
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import client_connection, connections, debug_bounds, descriptors, resident_bytes
from tests.http.support.loopback import MemoryBIOClient, read_exactly

__all__ = ["descriptors"]

KIB = 1024
CLIENTS = 100
CONNECT = b"CONNECT good.test:443 HTTP/1.1\r\nHost: good.test:443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def bytes_in_kernel(daemon: RegistryDaemon) -> list[int]:
    """Return the bytes in the send buffer of each connection of the proxy's port, as proc(5) shows them."""
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{daemon.port:04X}"
    return [int(fields[4].partition(":")[0], 16) for fields in connections if fields[1].endswith(port)]


@pytest.mark.parametrize("early", [False, True], ids=["usual", "ClientHello with the CONNECT"])
def test_readers_that_do_not_read(network: HostileNetwork, start_daemon: StartRegistryDaemon, early: bool) -> None:
    blob = network.good.put_blob("team/large", bytes(16 * KIB * KIB))
    daemon = start_daemon()
    assert daemon.client.get(f"{GOOD}/v2/team/large/blobs/{blob}").status == 200
    context = ssl.create_default_context(cafile=str(daemon.ca_file))
    context.check_hostname = False
    request = f"GET /v2/team/large/blobs/{blob} HTTP/1.1\r\nHost: good.test\r\n\r\n".encode()
    before = resident_bytes(daemon)
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            client = stack.enter_context(client_connection(daemon.port, "127.0.0.2"))
            session = MemoryBIOClient(context=context)
            flight = session.next_flight() or b""
            client.sendall(CONNECT + flight if early else CONNECT)
            assert read_exactly(client, len(ESTABLISHED)) == ESTABLISHED
            if not early:
                client.sendall(flight)
            session.incoming.write(client.recv(64 * KIB))
            session.do_handshake(client)
            client.sendall(session.encrypt(request))
            assert session.read(client, 12).startswith(b"HTTP/1.1 200")
        wait_until(lambda: sum(map(bool, bytes_in_kernel(daemon))) == CLIENTS, "all responses wait in the kernel")
        assert max(bytes_in_kernel(daemon)) <= 1024 * KIB
        assert sum(bytes_in_kernel(daemon)) <= CLIENTS * 384 * KIB
        # Measured: 5 MB in two processes. If the daemon buffered for slow readers, each would take a MiB.
        assert resident_bytes(daemon) - before <= CLIENTS * 64 * KIB + 16 * KIB * KIB
        assert daemon.client.get(f"{GOOD}/v2/team/large/blobs/{blob}").cache_status == "HIT"


def test_manifests_that_are_not_read(network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int) -> None:
    """The content of each response is in memory until its client has read it, and then the kernel has it back."""
    daemon = start_daemon()
    path = "/v2/team/long/manifests/latest"
    content = b'{"a": "' + b"x" * 4_000_000 + b'"}'
    url, media_type = f"http://{HOSTED_REGISTRY_HOST}{path}", {"Content-Type": "application/vnd.example"}
    assert daemon.client.request("PUT", url, media_type, content).status == 201
    request = f"GET {path} HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n\r\n".encode()
    before = resident_bytes(daemon)
    with connections(daemon.http_port, CLIENTS, "127.0.0.2", request) as clients:
        statuses = [client.recv(12) for client in clients]
        assert statuses.count(b"HTTP/1.1 200") == workers * 8  # the share of 32 MiB
        assert statuses.count(b"HTTP/1.1 429") == CLIENTS - workers * 8
        assert daemon.client.get(url).body == content
        bounds = debug_bounds(daemon)["bytes of manifests and lists that are being sent"]
        assert [bound["clients"] for bound in bounds] == [{"127.0.0.2": 8 * len(content)}] * workers
        # Measured: 33 MB in each process, the content that is being sent; 130 to 160 MB if each thread has a heap
        assert resident_bytes(daemon) - before < workers * 2 * 32 * KIB * KIB


class ListServer(StubServer):
    """A registry with a long list of tags."""

    def handle(self, exchange: HTTPExchange) -> None:
        is_list = exchange.request.path.endswith("/tags/list")
        content = b'{"tags": ["' + bytes(8 * KIB * KIB) + b'"]}' if is_list else b"{}"
        exchange.respond(200, {"Content-Type": "application/json"}, content)


def test_forwarded_lists_that_are_not_read(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int
) -> None:
    """The daemon reads long responses of others only as fast as its client, and little ahead if it has many."""
    network.registries.append("long.test")
    network.add_server("long.test:443", ListServer(network.ca.leaf("long.test").server_context()))
    daemon = start_daemon()
    path = "/v2/team/long/tags/list?ns=long.test"
    request = f"GET {path} HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n\r\n".encode()
    before, count = resident_bytes(daemon), 200 * workers
    with connections(daemon.http_port, count, "127.0.0.2", request) as clients:
        assert [client.recv(12) for client in clients] == [b"HTTP/1.1 200"] * count
        used = debug_bounds(daemon)["bytes of forwarded responses that are being sent"]
        share = 32 * KIB * KIB
        assert all(bound["used"] <= share + 512 * KIB + count // workers * 32 * KIB for bound in used)
        # Measured: a share, and 60 KiB for each connection with that to upstream; 1.1 MB for each without the budget
        assert resident_bytes(daemon) - before < workers * 2 * share + count * 128 * KIB
        assert len(daemon.client.get(f"http://{HOSTED_REGISTRY_HOST}{path}").body) > 8 * KIB * KIB


class SilentServer(ThreadedServer):
    """The accomplice behind a tunnel: it reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        super().stop()

    def serve(self, client: socket.socket) -> None:
        with client:
            self._stopped.wait()


def send_until_blocked(clients: list[socket.socket]) -> None:
    """Send on all of `clients` until none of them can send anything for a second."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
        piece = bytes(256 * KIB)
        while events := selector.select(1):
            for key, _ in events:
                assert isinstance(key.fileobj, socket.socket)
                with suppress(BlockingIOError, ssl.SSLWantWriteError):
                    key.fileobj.send(piece)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_tunnels_to_a_server_that_does_not_read(start_daemon: StartRegistryDaemon, secure: bool) -> None:
    server, tls_port = SilentServer(), free_port()
    server.start()
    daemon = start_daemon(
        TUNNEL_DENY="none",
        TUNNEL_PORTS=str(server.port),
        PROXY_TLS_LISTEN=f"tcp:{tls_port}:interface=127.0.0.1",
    )
    context = daemon.client_context
    context.check_hostname = False
    request = f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    before = resident_bytes(daemon)
    with ExitStack() as stack:
        stack.callback(server.stop)
        clients = []
        for _ in range(CLIENTS):
            port, client_context = (tls_port, context) if secure else (daemon.port, None)
            clients.append(stack.enter_context(client_connection(port, "127.0.0.2", client_context)))
            clients[-1].sendall(request)
            assert read_exactly(clients[-1], len(ESTABLISHED)) == ESTABLISHED
        send_until_blocked(clients)
        # Measured: a read of 64 KiB for each tunnel, and its objects; 400 KB if the daemon reads half a MiB over TLS
        assert resident_bytes(daemon) - before < CLIENTS * 256 * KIB


class FloodingServer(ThreadedServer):
    """The accomplice behind a tunnel: it sends without end."""

    def serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                client.sendall(bytes(64 * KIB))


@pytest.fixture
def flooding_server() -> Iterator[FloodingServer]:
    server = FloodingServer()
    server.start()
    yield server
    server.stop()


def test_tunnels_that_are_not_read(start_daemon: StartRegistryDaemon, flooding_server: FloodingServer) -> None:
    daemon = start_daemon(TUNNEL_DENY="none", TUNNEL_PORTS=str(flooding_server.port))
    before = resident_bytes(daemon)
    request = f"CONNECT 127.0.0.1:{flooding_server.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connections(daemon.port, CLIENTS, "127.0.0.2", request) as clients:
        for client in clients:
            assert read_exactly(client, len(ESTABLISHED)) == ESTABLISHED
        wait_until(lambda: sum(size > 64 * KIB for size in bytes_in_kernel(daemon)) == CLIENTS, "all tunnels are full")
        assert sum(bytes_in_kernel(daemon)) <= CLIENTS * 384 * KIB
        # Measured: 8 MB, a read of 64 KiB for each tunnel. The other end sends without end, and a tunnel without
        # back-pressure takes it all.
        assert resident_bytes(daemon) - before < CLIENTS * 192 * KIB
