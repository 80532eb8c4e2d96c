"""TLS within tunnels: the target of CONNECT decides whose content is served, whatever SNI and Host say.

The attackers are clients without a login.
"""

from __future__ import annotations

import socket
import ssl
from itertools import product

import pytest
from cryptography import x509
from OpenSSL import SSL

from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon

HOSTED = "docker-registry.local"


@pytest.fixture
def daemon(start_daemon: StartRegistryDaemon) -> RegistryDaemon:
    return start_daemon()


def open_tunnel(daemon: RegistryDaemon, target: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", daemon.port), timeout=20)
    connection.sendall(f"CONNECT {target}:443 HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    assert b" 200 " in connection.recv(4096)
    return connection


def unverified_context() -> ssl.SSLContext:
    """Return the context of a client that accepts any certificate, so that it sees which one it gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def fetch(daemon: RegistryDaemon, target: str, server_name: str, host: str, path: str) -> tuple[bytes, list[str]]:
    """Request `path` in a tunnel to `target`. Return the response, and the names in the certificate."""
    with (
        open_tunnel(daemon, target) as connection,
        unverified_context().wrap_socket(connection, server_hostname=server_name) as secure,
    ):
        secure.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        response = b""
        while data := secure.recv(65536):
            response += data
        certificate = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return response, names.get_values_for_type(x509.DNSName)


def test_the_target_of_connect_decides(daemon: RegistryDaemon, network: HostileNetwork) -> None:
    digests = {
        "good.test": network.good.put_blob("team/app", b"good content"),
        "evil.test": network.evil.put_blob("team/app", b"evil content"),
    }
    others = ["good.test", "evil.test", HOSTED, "127.0.0.1", "rebound.example"]
    for target, server_name, host in product(("good.test", HOSTED), others[:3], others):
        for registry, digest in digests.items():
            response, names = fetch(daemon, target, server_name, host, f"/v2/team/app/blobs/{digest}")
            assert names == [target]
            assert response.startswith(b"HTTP/1.1 200 " if registry == target else b"HTTP/1.1 404 ")
            assert b"evil content" not in response
    assert network.evil.requests == []
    assert {request.headers["host"] for request in network.good.requests} == {"good.test"}


def test_clients_do_not_renegotiate(daemon: RegistryDaemon) -> None:
    """Each handshake costs the server more than the client. The connection ends at the first attempt."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with open_tunnel(daemon, "good.test") as connection:
        connection.setblocking(True)
        secure = SSL.Connection(context, connection)
        secure.set_tlsext_host_name(b"good.test")
        secure.set_connect_state()
        secure.do_handshake()
        assert secure.renegotiate()
        with pytest.raises(SSL.Error):
            secure.do_handshake()
            secure.recv(1)
    assert daemon.client.get(f"{GOOD}/v2/").status == 200
