"""WebSocket, and other protocols that HTTP can change to, at a host that is a registry too, such as GitLab or Gitea."""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import time
from collections.abc import Iterator

import pytest
import websocket
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from tests.e2e.harness import http_client
from tests.e2e.harness.daemon import AccessLogEntry, StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_server import HTTPExchange, RecordedRequest
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses

MIB = 1024 * 1024
FLOOD = 64 * MIB
HOST = "code.test"
ADMIN, PASSWORD = "admin", "of-the-proxy-only"
ACCEPT_KEY = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class WebSocketHost(FakeRegistry):
    """A registry at `/v2/` that speaks WebSocket everywhere else, and a protocol `raw` at `/flood` and `/sink`."""

    def handle(self, exchange: HTTPExchange) -> None:
        headers, protocol = exchange.request.headers, exchange.request.headers.get("upgrade")
        if protocol == "raw" and exchange.path in ("/flood", "/sink"):
            exchange.send_head(101, {"Connection": "Upgrade", "Upgrade": "raw"})
            self._speak_raw(exchange)
        elif protocol == "websocket" and not exchange.path.startswith("/refused"):
            digest = hashlib.sha1((headers["sec-websocket-key"] + ACCEPT_KEY).encode()).digest()
            accept = base64.b64encode(digest).decode()
            exchange.send_head(101, {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Accept": accept})
            self._echo(exchange)
        else:
            super().handle(exchange)

    def _speak_raw(self, exchange: HTTPExchange) -> None:
        reader, _ = exchange.take_over()
        if exchange.path == "/flood":
            exchange.send_body(memoryview(bytes(FLOOD)))
            return
        while piece := reader.read1(65536):
            exchange.request.received_bytes += len(piece)

    def _echo(self, exchange: HTTPExchange) -> None:
        reader, writer = exchange.take_over()
        frames = Connection(ConnectionType.SERVER)
        while data := reader.read1(65536):
            frames.receive_data(data)
            for event in frames.events():
                if isinstance(event, TextMessage | BytesMessage):
                    writer.write(frames.send(event))
                elif isinstance(event, Ping | CloseConnection):
                    writer.write(frames.send(event.response()))
                if isinstance(event, CloseConnection):
                    return


@pytest.fixture(scope="module")
def code_host(upstreams: Upstreams) -> Iterator[WebSocketHost]:
    host = WebSocketHost(upstreams.ca.leaf(HOST).server_context())
    host.start()
    yield host
    host.stop()


@pytest.fixture
def daemon(start_daemon: StartDaemon, code_host: WebSocketHost) -> TwistdDaemon:
    return start_daemon(
        REGISTRIES=HOST,
        AUTH_REGISTRIES=f"{HOST}:{ADMIN}:{PASSWORD}",
        UPSTREAM_ADDRESSES=format_upstream_addresses({f"{HOST}:443": code_host.port}),
        WORKERS="2",
    )


def connect(daemon: TwistdDaemon, path: str = "/ws", **headers: str) -> websocket.WebSocket:
    return websocket.create_connection(
        f"wss://{HOST}{path}",
        http_proxy_host="127.0.0.1",
        http_proxy_port=daemon.port,
        proxy_type="http",
        http_no_proxy=["none.test"],
        sslopt={"ca_certs": str(daemon.ca_file)},
        header=headers,
        timeout=30,
    )


def open_raw(daemon: TwistdDaemon, path: str) -> ssl.SSLSocket:
    """Return a connection that speaks the protocol `raw` with `path` of the host."""
    plain = socket.create_connection(("127.0.0.1", daemon.port), timeout=30)
    plain.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    assert read_head(plain).startswith(b"HTTP/1.1 200 ")
    tls = daemon.client_context.wrap_socket(plain, server_hostname=HOST)
    tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n".encode())
    assert read_head(tls).startswith(b"HTTP/1.1 101 ")
    return tls


def read_head(connection: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, head
        head += byte
    return head


def test_both_ends_talk_as_long_as_they_like(daemon: TwistdDaemon, code_host: WebSocketHost) -> None:
    offset = daemon.log_offset()
    login = http_client.basic_authorization("carol", "her-token")
    sockets = [connect(daemon, f"/ws/{number}", Authorization=login) for number in range(4)]  # over both processes
    for number, client in enumerate(sockets):
        for message in (f"hello {number}", "x" * MIB, ""):
            client.send(message)
            assert client.recv() == message
        client.ping("still there?")
    assert daemon.client.get(f"https://{HOST}/v2/").status == 200  # requests go on beside them
    for client in sockets:
        client.close()
    [*requests] = code_host.find_requests("GET", "/ws/")
    assert {request.headers.get("authorization") for request in requests} == {login}
    wait_until(lambda: len(switched(daemon, offset)) == 4, "four tunnels are in the log")
    for entry in switched(daemon, offset):
        assert (entry.target.startswith(f"{HOST}/ws/"), entry.cache_status) == (True, "PASS")
        assert MIB < entry.size < 2 * MIB


def switched(daemon: TwistdDaemon, offset: int) -> list[AccessLogEntry]:
    return [entry for entry in daemon.access_log(offset) if entry.status == 101]


def test_no_login_of_the_proxy_is_shown(daemon: TwistdDaemon, code_host: WebSocketHost) -> None:
    client = connect(daemon, "/without-login")
    client.send("hello")
    assert client.recv() == "hello"
    client.close()
    [request] = code_host.find_requests("GET", "/without-login")
    assert "authorization" not in request.headers


def test_a_refusal_is_the_servers_own(daemon: TwistdDaemon) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as refusal:
        connect(daemon, "/refused")
    assert refusal.value.status_code == 404


def test_the_api_never_becomes_a_tunnel(daemon: TwistdDaemon, code_host: WebSocketHost) -> None:
    """A client that speaks another protocol there would be at the registry unseen, beside its rules for pushes."""
    for path in ("/v2/", "/v2/team/app/blobs/uploads/", "/v2/x", "/V2/x", "/x/../v2/y"):
        with pytest.raises(websocket.WebSocketBadStatusException):
            connect(daemon, path)
    assert not [request for request in code_host.requests if "/v2/" in request.path and "upgrade" in request.headers]


def test_a_reader_that_stops_holds_up_its_sender(daemon: TwistdDaemon, code_host: WebSocketHost) -> None:
    """No side can make the proxy keep more than what the kernel's buffers of a connection hold."""
    with open_raw(daemon, "/flood") as client:
        [request] = code_host.find_requests("GET", "/flood")
        assert wait_for_stall(request) < FLOOD // 2
        received = 0
        while piece := client.recv(65536):
            received += len(piece)
        assert received == FLOOD
    with open_raw(daemon, "/sink") as client:
        for _ in range(64):
            client.sendall(bytes(MIB))
        [request] = code_host.find_requests("GET", "/sink")
        wait_until(lambda: request.received_bytes == 64 * MIB, "the server has received all")
    wait_until(lambda: request.ended_event is not None, "the end of one side is the end of the other")


def wait_for_stall(request: RecordedRequest) -> int:
    """Return how much the server could send until it could send no more for a second."""
    sent, deadline = -1, 0.0
    while request.sent_bytes != sent or time.monotonic() < deadline:
        if request.sent_bytes != sent:
            sent, deadline = request.sent_bytes, time.monotonic() + 1
        time.sleep(0.02)
    return sent
