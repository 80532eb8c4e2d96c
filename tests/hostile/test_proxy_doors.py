"""A client without a login, at a proxy that asks for one (PROXY_HTPASSWD_FILE): every way in, every form of login."""

from __future__ import annotations

import json
import signal
import socket
import ssl
from pathlib import Path

import pytest

from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, request_directly, send_raw_request
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_htpasswd
from tests.hostile.conftest import HostileNetwork, StartRegistryDaemon

ALICE = basic_authorization("alice", "wonder:land")
WRONG = basic_authorization("alice", "wrong")

CONNECTS = ["good.test:443", "docker-registry.local:443", "registry-1.docker.io:443", "127.0.0.1:443", "x.test:443"]
TARGETS = [
    "http://docker-registry.local/v2/",
    "http://docker-registry.local/v2/team/app/tags/list?ns=good.test",
    "http://other.test/",
    "/v2/",
    "/v2/team/app/tags/list?ns=good.test",
    "/v2/library/ubuntu/tags/list",
]
LOGINS = {
    "none": [],
    "wrong": [WRONG],
    "another user": [basic_authorization("mallory", "wonder:land")],
    "no password": [basic_authorization("alice", "")],
    "nothing": [basic_authorization("", "")],
    "another scheme": [f"Bearer {ALICE.partition(' ')[2]}"],
    "not base64": ["Basic ###"],
    "no colon": ["Basic YWxpY2U="],
    "two": [WRONG, ALICE],
    "two, the first right": [ALICE, WRONG],
}


@pytest.fixture
def daemon(start_daemon: StartRegistryDaemon, tmp_path: Path) -> RegistryDaemon:
    return start_daemon(PROXY_HTPASSWD_FILE=str(write_htpasswd(tmp_path)), LOG_FORMAT="json")


def send(port: int, line: str, logins: list[str]) -> BufferedResponse:
    fields = "".join(f"Proxy-Authorization: {login}\r\n" for login in logins)
    return send_raw_request(port, f"{line} HTTP/1.1\r\nHost: docker-registry.local\r\n{fields}\r\n".encode())


def test_nothing_is_served_without_the_right_login(daemon: RegistryDaemon, network: HostileNetwork) -> None:
    network.good.put_blob("team/app", b"private")
    lines = [f"CONNECT {host}" for host in CONNECTS] + [f"GET {target}" for target in TARGETS]
    for line in lines:
        logins = LOGINS if line == lines[0] else {"none": [], "two": LOGINS["two"]}
        for name, values in logins.items():
            response = send(daemon.port, line, values)
            while response.status == 429:  # after five wrong passwords
                response = send(daemon.port, line, values)
            assert response.status == 407, (line, name)
            assert response.headers["proxy-authenticate"].startswith("Basic realm=")
    # Authorization is for the registry, and no login for the proxy.
    request = f"GET /v2/ HTTP/1.1\r\nHost: here\r\nAuthorization: {ALICE}\r\n\r\n"
    assert send_raw_request(daemon.port, request.encode()).status == 407
    assert network.good.find_requests("GET", "") == []


def test_the_mirror_on_the_other_ports_asks_too(daemon: RegistryDaemon) -> None:
    for url, context in ((f"http://{daemon.http_address}", None), (f"https://{daemon.https_address}", True)):
        tls = ssl.create_default_context(cafile=str(daemon.ca_file)) if context else None
        assert request_directly("GET", f"{url}/v2/", context=tls).status == 200
        login = {"Proxy-Authorization": ALICE}
        for path in ("team/app/tags/list?ns=good.test", "good.test/team/app/tags/list", "good.test/"):
            assert request_directly("GET", f"{url}/v2/{path}", context=tls).status == 407
            assert request_directly("GET", f"{url}/v2/{path}", login, context=tls).status != 407


def test_set_up_needs_no_login(daemon: RegistryDaemon) -> None:
    for path in ("/", "/ca.crt", "/setup", "/healthz"):
        assert request_directly("GET", f"{daemon.url}{path}").status == 200


class RecordingServer(StubServer):
    def handle(self, exchange: HTTPExchange) -> None:
        exchange.respond(200, {}, b"the server")


@pytest.fixture
def server(network: HostileNetwork) -> RecordingServer:
    server = RecordingServer()
    network.add_server("other.test:80", server)
    return server


def test_the_right_login_opens_every_way_and_goes_nowhere(
    server: RecordingServer, network: HostileNetwork, daemon: RegistryDaemon
) -> None:
    digest = network.good.put_blob("team/app", b"content")
    assert send(daemon.port, "GET http://other.test/", [ALICE]).body == b"the server"
    assert send(daemon.port, f"GET /v2/team/app/blobs/{digest}?ns=good.test", [ALICE]).body == b"content"
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as connection:
        head = f"CONNECT good.test:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {ALICE}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 200 " in connection.recv(4096)
        with daemon.client_context.wrap_socket(connection, server_hostname="good.test") as tunnel:
            target = f"/v2/team/app/blobs/{digest}"
            for _ in range(2):
                request = f"GET {target} HTTP/1.1\r\nHost: good.test\r\nProxy-Authorization: {ALICE}\r\n\r\n"
                tunnel.sendall(request.encode())
                received = b""
                while not received.endswith(b"content"):
                    received += tunnel.recv(4096)
    upstream = [*server.find_requests("GET", ""), *network.good.find_requests("GET", "")]
    assert upstream
    assert all("proxy-authorization" not in request.headers for request in upstream)
    wait_until(lambda: logged_users(daemon, "/blobs/") == {"alice"}, "the access log names the user")
    assert "wonder" not in daemon.output_text


def logged_users(daemon: RegistryDaemon, path: str) -> set[str | None]:
    events = [json.loads(line) for line in daemon.output_text.splitlines() if line.startswith("{")]
    return {event["user"] for event in events if path in event.get("path", "")}


def test_a_removed_user_loses_access_at_once(daemon: RegistryDaemon, network: HostileNetwork, tmp_path: Path) -> None:
    """Also in a tunnel that was opened before."""
    digest = network.good.put_blob("team/app", b"content")
    request = f"GET /v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: good.test\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as connection:
        head = f"CONNECT good.test:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {ALICE}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 200 " in connection.recv(4096)
        with daemon.client_context.wrap_socket(connection, server_hostname="good.test") as tunnel:
            tunnel.sendall(request)
            assert b" 200 " in tunnel.recv(4096)
            (tmp_path / "htpasswd").write_text("")
            tunnel.sendall(request)
            received = b""
            while b"HTTP/1.1 407" not in received:
                received += tunnel.recv(4096)
    assert send(daemon.port, "CONNECT good.test:443", [ALICE]).status == 407


@pytest.mark.parametrize("host", ["good.test", "docker-registry.local"])
def test_a_tunnel_from_before_the_logins_needs_one_too(
    start_daemon: StartRegistryDaemon, network: HostileNetwork, tmp_path: Path, host: str
) -> None:
    """The administrator sets PROXY_HTPASSWD_FILE and reloads while a client without a login keeps its tunnel."""
    daemon, env_file = start_with_env_file(start_daemon)
    digest = network.good.put_blob("team/app", b"content")
    request = f"GET /v2/team/app/blobs/{digest}?ns=good.test HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as connection:
        connection.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in connection.recv(4096)
        with daemon.client_context.wrap_socket(connection, server_hostname=host) as tunnel:
            tunnel.sendall(request)
            received = b""
            while not received.endswith(b"content"):
                received += tunnel.recv(4096)
            require_logins(daemon, env_file, tmp_path)
            tunnel.sendall(request)
            assert tunnel.recv(4096).startswith(b"HTTP/1.1 407 ")


def test_an_opaque_tunnel_from_before_the_logins_ends(
    start_daemon: StartRegistryDaemon, network: HostileNetwork, tmp_path: Path
) -> None:
    """Although it is in use all the time. Without a reload, a removed user's tunnel ends in the same way."""
    network.add_server("other.test:443", RecordingServer())
    daemon, env_file = start_with_env_file(
        start_daemon, PROXY_CONNECT_READ_TIMEOUT="1s", PROXY_CONNECT_SEND_TIMEOUT="1s"
    )

    def is_alive(tunnel: socket.socket) -> bool:
        try:
            tunnel.sendall(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
            return tunnel.recv(4096) != b""
        except ConnectionError:
            return False

    def connect(fields: str = "") -> socket.socket:
        tunnel = socket.create_connection(("127.0.0.1", daemon.port), timeout=20)
        tunnel.sendall(f"CONNECT other.test:443 HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
        assert b" 200 " in tunnel.recv(4096)
        return tunnel

    with connect() as tunnel:
        assert is_alive(tunnel)
        require_logins(daemon, env_file, tmp_path)
        wait_until(lambda: not is_alive(tunnel), "the tunnel without a login ends")
    with connect(f"Proxy-Authorization: {ALICE}\r\n") as tunnel:
        assert is_alive(tunnel)
        (tmp_path / "htpasswd").write_text("")
        wait_until(lambda: not is_alive(tunnel), "the tunnel of the removed user ends")


def start_with_env_file(start_daemon: StartRegistryDaemon, **settings: str) -> tuple[RegistryDaemon, Path]:
    """Start a daemon that reads an environment file, which is empty. Return both."""
    daemon = start_daemon(**settings)
    env_file = daemon.folder / ".env"
    env_file.write_text("")
    daemon.stop()
    daemon.argv += ["--env-file", str(env_file)]
    daemon.start()
    return daemon, env_file


def require_logins(daemon: RegistryDaemon, env_file: Path, folder: Path) -> None:
    """Set PROXY_HTPASSWD_FILE, and reload."""
    env_file.write_text(f"PROXY_HTPASSWD_FILE={write_htpasswd(folder)}\n")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: serving" in daemon.output_text, "the reload")
