"""Tests for the handler of direct requests, and for the certificates that the hosted registry's listeners present."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from dockerproxy.concurrency import current_client
from dockerproxy.errors import NameUnknown
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.net.own_addresses import is_own_address
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.direct import DirectRequestHandler
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.trusted_proxies import TrustedProxies

NAME = "docker-registry.local"


async def application(request: Request) -> None:
    if request.path == "/none":
        raise NameUnknown("page not found")
    request.respond(200, [], f"{request.host} {request.path} {request.query}".encode())


@pytest.fixture
def handler() -> DirectRequestHandler:
    policy = Policy(
        AddressSet.parse("10.0.0.0/8"),
        frozenset(),
        Destinations.parse("all"),
        Destinations.parse("metadata"),
        is_own_address,
    )
    return DirectRequestHandler(policy, application)


def test_requests_are_handled(connect_client: Any, handler: DirectRequestHandler) -> None:
    http_client = connect_client(handler.handle)
    assert http_client.fetch("GET", "/v2/?n=1").body == b" /v2/ n=1"
    assert http_client.fetch("GET", f"http://{NAME}:80/v2/x?n=1").body == f"{NAME}:80 /v2/x n=1".encode()
    assert http_client.fetch("GET", "/none").status == 404
    assert http_client.fetch("GET", "http://user:secret@host/").status == 400


def test_allow_clients_is_enforced(connect_client: Any, handler: DirectRequestHandler) -> None:
    response = connect_client(handler.handle, client="192.0.2.1").fetch("GET", "/v2/")
    assert (response.status, b"ALLOW_CLIENTS" in response.body) == (403, True)


def test_connect_is_refused(connect_client: Any, handler: DirectRequestHandler) -> None:
    assert connect_client(handler.handle).fetch("CONNECT", f"{NAME}:443").status == 405


@pytest.fixture
def proxied(handler: DirectRequestHandler) -> DirectRequestHandler:
    """Return a handler behind reverse proxies at 192.0.2.0/24, which are not among ALLOW_CLIENTS."""

    async def describe(request: Request) -> None:
        client = current_client.get()
        request.respond(200, [], f"{request.client} {client} {request.secure} {request.host}".encode())

    return DirectRequestHandler(handler.policy, describe, TrustedProxies(AddressSet.parse("192.0.2.0/24")))


X_FIELDS = [
    ("X-Forwarded-For", "10.9.9.9, 10.0.0.7"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "reg.example:8443"),
]


def test_a_trusted_proxy_describes_the_client(connect_client: Any, proxied: DirectRequestHandler) -> None:
    http_client = connect_client(proxied.handle, client="192.0.2.1")
    response = http_client.fetch("GET", "/v2/", X_FIELDS)
    assert response.body == b"10.0.0.7 10.0.0.7 True reg.example:8443"
    assert http_client.finished_requests[-1].client == "10.0.0.7"  # for the log
    forwarded = [("Forwarded", "for=10.0.0.7;proto=https;host=reg.example")]
    assert http_client.fetch("GET", "/v2/", forwarded).body == b"10.0.0.7 10.0.0.7 True reg.example"
    absolute = http_client.fetch("GET", "http://inner:5000/v2/", [("X-Forwarded-For", "10.0.0.7")])
    assert absolute.body == b"10.0.0.7 10.0.0.7 False inner:5000"
    assert http_client.fetch("GET", "http://inner:5000/v2/", X_FIELDS).body.endswith(b"True reg.example:8443")


def test_fields_of_others_are_ignored(connect_client: Any, handler: Any, proxied: DirectRequestHandler) -> None:
    for fields in (X_FIELDS, [("Forwarded", "for=10.0.0.7;proto=https;host=x")], [("X-Forwarded-Proto", "gopher")]):
        response = connect_client(proxied.handle, client="10.0.0.1").fetch("GET", "/v2/", fields)
        assert response.body == b"10.0.0.1 10.0.0.1 False "
    untrusting = DirectRequestHandler(handler.policy, proxied.handler)
    assert connect_client(untrusting.handle, client="10.0.0.1").fetch("GET", "/v2/", X_FIELDS).body.endswith(b"False ")


def test_allow_clients_is_about_the_client_behind_the_proxy(connect_client: Any, proxied: DirectRequestHandler) -> None:
    http_client = connect_client(proxied.handle, client="192.0.2.1")
    for chain in ("198.51.100.7", "10.0.0.7, 198.51.100.7", "10.0.0.7, 198.51.100.7, 192.0.2.5", ""):
        response = http_client.fetch("GET", "/v2/", [("X-Forwarded-For", chain)])
        assert (response.status, b"ALLOW_CLIENTS" in response.body) == (403, True)


@pytest.mark.parametrize(
    "fields",
    [
        [("X-Forwarded-Proto", "gopher")],
        [("X-Forwarded-Proto", "https, ")],
        [("X-Forwarded-Host", "a b")],
        [("X-Forwarded-Host", "reg.example/path")],
        [("Forwarded", "for=10.0.0.7;proto=gopher")],
        [("Forwarded", "for=10.0.0.7;host=user@reg")],
        [("Forwarded", "for=10.0.0.7 proto=https")],
        [("Forwarded", 'for="10.0.0.7')],
        [("Forwarded", "for=10.0.0.7;for=10.0.0.8")],
        [("X-Forwarded-For", "10.0.0.7"), ("Forwarded", "for=10.0.0.8")],
        [*X_FIELDS, ("Forwarded", "for=10.0.0.7;proto=http")],
        [*X_FIELDS, ("Forwarded", "for=10.0.0.7;host=evil.example")],
    ],
)
def test_contradictions_and_garbage_of_a_trusted_proxy_are_refused(
    connect_client: Any, proxied: DirectRequestHandler, fields: list[tuple[str, str]]
) -> None:
    assert connect_client(proxied.handle, client="192.0.2.1").fetch("GET", "/v2/", fields).status == 400


class SNICertificateTests(TestCase):
    """Tests on real sockets, because the server name comes from OpenSSL and the local address from the kernel."""

    async def listen(self, description: str) -> int:
        directory = Path(self.mktemp())
        authority = CertificateAuthority.open(
            directory, certificate_file=None, key_file=None, passphrase=None, clock=time.time
        )
        self.context = ssl.create_default_context(cadata=authority.certificate_pem.decode())
        certificates = authority.sni_context("REGISTRY_LISTEN", {NAME, "registry"})
        site = Site(
            reactor,
            application,
            timeouts=ServerTimeouts(),
            on_request_finished=lambda request, seconds: None,
            get_tls_context=lambda: certificates,
        )
        port = await serverFromString(reactor, description).listen(site)
        self.addCleanup(port.stopListening)
        self.addCleanup(site.drain)
        return int(port.getHost().port)

    def presented_names(self, address: str, port: int, name: str | None) -> list[tuple[str, str]]:
        """Return the names in the certificate that the server presents. The client verifies the certificate."""
        context = self.context
        context.check_hostname = name is not None
        with socket.create_connection((address, port), timeout=10) as tcp:
            with context.wrap_socket(tcp, server_hostname=name) as tls:
                tls.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert tls.recv(65536).startswith(b"HTTP/1.1 200 ")
                certificate = tls.getpeercert()
                assert certificate is not None
                return list(certificate["subjectAltName"])  # type: ignore[arg-type]

    async def test_leaf_is_selected_by_server_name_or_local_address(self) -> None:
        port = await self.listen("tcp:0:interface=0.0.0.0")
        for name in (NAME, "registry", NAME.upper(), "localhost"):
            self.assertEqual(
                await deferToThread(self.presented_names, "127.0.0.1", port, name), [("DNS", name.lower())]
            )
        for address in ("127.0.0.1", "127.0.0.5"):
            for name in (address, None):
                self.assertEqual(
                    await deferToThread(self.presented_names, address, port, name), [("IP Address", address)]
                )
        with self.assertRaises(ssl.SSLCertVerificationError):
            await deferToThread(self.presented_names, "127.0.0.1", port, "registry-1.docker.io")

    async def test_ipv4_client_of_an_ipv6_listener_gets_the_ipv4_leaf(self) -> None:
        port = await self.listen(r"tcp6:0:interface=\:\:")
        self.assertEqual(
            await deferToThread(self.presented_names, "127.0.0.1", port, None), [("IP Address", "127.0.0.1")]
        )
