"""Tests for NO_PROXY and for the CONNECT request to an upstream proxy."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import UpstreamBroken, UpstreamUnreachable
from dockerproxy.net.upstream_proxy import ConnectFactory, UpstreamProxy
from dockerproxy.oci.names import Host

HOST = Host("registry.example", 443)


@pytest.mark.parametrize(
    ("entry", "host", "excluded"),
    [
        ("*", "quay.io", True),
        ("example.com", "example.com", True),
        ("example.com", "a.example.com", True),
        ("example.com", "anexample.com", False),
        ("EXAMPLE.com", "example.com", True),
        (".example.com", "a.b.example.com", True),
        (".example.com", "example.com", False),
        ("*.example.com", "a.example.com", True),
        ("example.com:5000", "example.com:5000", True),
        ("example.com:5000", "example.com", False),
        ("10.0.0.0/8", "10.1.2.3:5000", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:80", "10.1.2.3", False),
        ("10.0.0.0/8", "ten.example", False),
        ("fd00::/8", "[fd00::1]:5000", True),
        ("fd00::1", "[fd00::1]", True),
        ("[fd00::1]:443", "[fd00::1]", True),
        ("[fd00::1]:80", "[fd00::1]", False),
        ("fd00::/8", "[fe00::1]", False),
        ("", "quay.io", False),
        (".", "quay.io", False),
        ("io", "quay.io", True),
    ],
)
def test_no_proxy_excludes_hosts(entry: str, host: str, excluded: bool) -> None:
    proxy = UpstreamProxy("proxy.example", 3128, None, ("other.example", entry))
    assert proxy.applies_to(Host.parse(host)) is not excluded


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1", "127.8.8.8:80", "[::1]:5000"])
def test_loopback_is_reached_directly(host: str) -> None:
    assert not UpstreamProxy("proxy.example", 3128).applies_to(Host.parse(host))


def test_repr_hides_authorization() -> None:
    assert "secret" not in repr(UpstreamProxy("proxy.example", 3128, "Basic secret"))


class TunnelledProtocol(Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.lost_reason: Any = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost_reason = reason


class ConnectFactoryTests(SynchronousTestCase):
    def connect(self, authorization: str | None = None) -> None:
        self.factory = ConnectFactory(
            UpstreamProxy("proxy.example", 3128, authorization), HOST, Factory.forProtocol(TunnelledProtocol)
        )
        self.tunnel = self.factory.buildProtocol(None)
        self.transport = StringTransport()
        self.tunnel.makeConnection(self.transport)

    def test_connect_request_names_host_and_login(self) -> None:
        self.connect()
        self.assertEqual(
            self.transport.value(), b"CONNECT registry.example:443 HTTP/1.1\r\nHost: registry.example:443\r\n\r\n"
        )
        self.connect("Basic eDp5")
        self.assertIn(b"\r\nProxy-Authorization: Basic eDp5\r\n", self.transport.value())

    def test_response_is_parsed_in_any_segmentation(self) -> None:
        response = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 Connection established\r\nVia: x\r\n\r\nleft over"
        for size in range(1, len(response) + 1):
            self.connect()
            for start in range(0, len(response), size):
                self.tunnel.dataReceived(response[start : start + size])
            inner = self.successResultOf(self.factory.done)
            self.assertEqual(inner.received, b"left over")
            self.assertIs(inner.transport, self.transport)
            self.tunnel.connectionLost(Failure(ConnectionDone()))
            self.assertTrue(inner.lost_reason.check(ConnectionDone))

    def test_refusal_names_host_proxy_and_reason_but_no_password(self) -> None:
        for status, word in ((407, "password"), (403, "forbids"), (502, "502"), (301, "301")):
            self.connect("Basic eDp5")
            self.tunnel.dataReceived(b"HTTP/1.1 %d No\r\nContent-Length: 3\r\n\r\nno!" % status)
            message = str(self.failureResultOf(self.factory.done, UpstreamUnreachable).value)
            for part in ("registry.example:443", "proxy.example:3128", str(status), word):
                self.assertIn(part, message)
            self.assertNotIn("eDp5", message)
            self.assertTrue(self.transport.disconnected)

    def test_invalid_response_is_an_error(self) -> None:
        for response in (b"hello\r\n\r\n", b"HTTP/1.1 2xx\r\n\r\n", b"HTTP/3 200\r\n\r\n", b"x" * 20000):
            self.connect()
            self.tunnel.dataReceived(response)
            self.failureResultOf(self.factory.done, UpstreamBroken)
            self.assertTrue(self.transport.disconnected)

    def test_connection_closed_by_the_proxy_is_unreachable(self) -> None:
        self.connect()
        self.tunnel.dataReceived(b"HTTP/1.1 200 OK\r\n")
        self.tunnel.connectionLost(Failure(ConnectionDone()))
        self.failureResultOf(self.factory.done, UpstreamUnreachable)
