"""A client without a login gets what another client has logged in to: NTLM and Negotiate log a connection in."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.threaded_server import ThreadedServer
from tests.hostile.conftest import HostileNetwork, StartRegistryDaemon

FIRST, SECOND, THIRD = "TlRMTVNTUAAB", "TlRMTVNTUAAC", "TlRMTVNTUAADYWxpY2U="  # alice's


class ConnectionLoginServer(ThreadedServer):
    """A mail server that logs a connection in by a handshake of three messages, and then answers all requests on it."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme

    def serve(self, client: socket.socket) -> None:
        with suppress(ConnectionError), client:
            self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        user, challenged = "", False
        reader = client.makefile("rb")
        while reader.readline().strip():
            headers = http.client.parse_headers(reader)
            reader.read(int(headers.get("Content-Length", "0")))
            token = headers.get("Authorization", "").removeprefix(f"{self._scheme} ")
            challenge = self._scheme
            if token == FIRST:
                challenged, challenge = True, f"{self._scheme} {SECOND}"
            elif token == THIRD and challenged:
                user = "alice"
            body = f"the mail of {user}".encode() if user else b"log in"
            head = "HTTP/1.1 200 OK" if user else f"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: {challenge}"
            client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.fixture(params=["NTLM", "Negotiate"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(scheme: str) -> Iterator[ConnectionLoginServer]:
    server = ConnectionLoginServer(scheme)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def daemon(start_daemon: StartRegistryDaemon, network: HostileNetwork, server: ConnectionLoginServer) -> RegistryDaemon:
    """Return a daemon that intercepts `mail.test` and forwards requests for the server's address."""
    addresses = f"{network.settings['UPSTREAM_ADDRESSES']} mail.test:8080=127.0.0.1:{server.port}"
    return start_daemon(TUNNEL_DENY="none", REGISTRIES="http://mail.test:8080", UPSTREAM_ADDRESSES=addresses)


@pytest.fixture(params=["forwarded", "intercepted"])
def url(request: pytest.FixtureRequest, server: ConnectionLoginServer) -> str:
    host = "mail.test:8080" if request.param == "intercepted" else f"127.0.0.1:{server.port}"
    return f"http://{host}/mail"


class Client:
    """A connection to the proxy and its requests to the mail server."""

    def __init__(self, daemon: RegistryDaemon, url: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)
        self._url = url

    def ask(self, authorization: str = "", method: str = "GET") -> bytes:
        headers = {"Authorization": authorization} if authorization else {}
        body = b"a form" if method == "POST" else None
        self._connection.request(method, self._url, body, headers=headers)
        return self._connection.getresponse().read()

    def log_in(self, scheme: str) -> bytes:
        assert self.ask() == b"log in"
        assert self.ask(f"{scheme} {FIRST}") == b"log in"
        return self.ask(f"{scheme} {THIRD}")

    def close(self) -> None:
        self._connection.close()


def test_a_login_serves_the_connection_that_made_it(daemon: RegistryDaemon, url: str, scheme: str) -> None:
    alice = Client(daemon, url)
    assert alice.log_in(scheme) == b"the mail of alice"
    assert alice.ask() == alice.ask(method="POST") == alice.ask() == b"the mail of alice"
    alice.close()


@pytest.mark.parametrize("alice_leaves", [False, True])
def test_nobody_else_uses_a_connection_that_a_client_logged_in(
    daemon: RegistryDaemon, url: str, scheme: str, alice_leaves: bool
) -> None:
    alice = Client(daemon, url)
    assert alice.log_in(scheme) == b"the mail of alice"
    if alice_leaves:
        alice.close()
    strangers = [Client(daemon, url) for _ in range(4)]  # enough for both processes
    for stranger in strangers:
        for answer in (stranger.ask(), stranger.ask(method="POST"), stranger.ask("Basic eDp5"), stranger.ask()):
            assert answer == b"log in"
        stranger.close()
    alice.close()


def test_a_half_made_login_is_finished_by_nobody_else(daemon: RegistryDaemon, url: str, scheme: str) -> None:
    """A stranger on the connection would be logged in as alice, or could take her challenge."""
    alice = Client(daemon, url)
    assert alice.ask(f"{scheme} {FIRST}") == b"log in"
    strangers = [Client(daemon, url) for _ in range(4)]
    for stranger in strangers:
        assert stranger.ask(f"{scheme} {THIRD}") == b"log in"
        stranger.close()
    assert alice.ask(f"{scheme} {THIRD}") == b"the mail of alice"
    alice.close()
