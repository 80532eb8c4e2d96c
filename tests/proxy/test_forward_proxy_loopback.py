"""Tests for CONNECT over loopback: interception and tunnels, which need real sockets.

The clients use Python's blocking sockets and `ssl` in threads. A fake clock drives the time-outs of the tunnels.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.http.tunnel import Tunnels, TunnelTimeouts
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.net.dial import Dialer
from dockerproxy.net.own_addresses import is_own_address
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.forward_proxy import ForwardProxy, Interception
from dockerproxy.proxy.login import ProxyLogin
from dockerproxy.proxy.policy import Policy
from tests.support.resolvers import StaticResolver
from tests.support.tls_tunnel import open_tls

QUAY = Registry.parse("quay.io")
PLAIN_HTTP = Registry.parse("http://plain.example:5000")
ADDRESS = Registry.parse("10.9.8.7:5001")
IPV6 = Registry.parse("[fd00::1]:443")
LARGE_BODY = b"0123456789abcdef" * 65536 * 8  # 8 MiB, more than the socket buffers hold


class TunnelServerProtocol(Protocol):
    """One connection to the server behind a tunnel; the callbacks of `TunnelServer` decide its behaviour."""

    def __init__(self, server: TunnelServer) -> None:
        self.server = server
        self.received = b""
        self.disconnected: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.server.connections.append(self)
        self.server.on_connected(self)

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self.server.on_data(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.disconnected.callback(None)


class TunnelServer(Factory):
    noisy = False

    def __init__(self) -> None:
        self.connections: list[TunnelServerProtocol] = []
        self.on_connected: Callable[[TunnelServerProtocol], object] = lambda connection: None
        self.on_data: Callable[[TunnelServerProtocol], object] = lambda connection: None

    def buildProtocol(self, address: Any) -> TunnelServerProtocol:
        return TunnelServerProtocol(self)


class ForwardProxyLoopbackCase(TestCase):
    timeout = 60
    proxy_tls = False

    async def setUp(self) -> None:
        directory = Path(self.mktemp())
        authority = CertificateAuthority.open(
            directory / "ca", certificate_file=None, key_file=None, passphrase=None, clock=time.time
        )
        self.pem = authority.certificate_pem.decode()
        proxy_context = authority.sni_context("PROXY_TLS_LISTEN", {"proxy.test"})
        self.handled: list[tuple[str, str, str]] = []
        self.requests: list[Request] = []  # the requests that the site reported as finished
        self.tunnels: list[Request] = []
        self.transfers = Transfers()
        self.clock = Clock()  # drives the tunnels only
        self.server = TunnelServer()
        server = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(self.server)
        self.addCleanup(server.stopListening)
        self.server_port = server.getHost().port
        proxy = self.make_proxy(authority)

        async def handle(request: Request) -> None:
            await proxy.handle(site, request)

        site = self.site = Site(
            reactor,
            handle,
            timeouts=ServerTimeouts(),
            on_request_finished=lambda request, seconds: self.requests.append(request),
            get_tls_context=(lambda: proxy_context) if self.proxy_tls else None,
        )
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(site)
        self.proxy_port = port.getHost().port
        self.addCleanup(lambda: Deferred.fromCoroutine(self._shut_down(port)))

    async def _shut_down(self, port: Any) -> None:
        await port.stopListening()
        self.site.abort()
        await self.site.drain()
        await self.transfers.drain(reactor, 0)
        await self.transfers.when_empty()

    def make_proxy(self, authority: CertificateAuthority) -> ForwardProxy:
        async def registry(registry: Registry, request: Request) -> None:
            self.handled.append((str(registry), request.method, request.path))
            content = await request.read_all(1 << 30)
            request.respond(200, [("X-Secure", str(request.secure))], content or f"from {registry}".encode())

        async def hosted(request: Request) -> None:
            self.handled.append(("hosted", request.method, request.path))
            request.respond(200, [], b"from the hosted registry")

        registries = {registry.host: registry for registry in (QUAY, PLAIN_HTTP, ADDRESS, IPV6)}
        login = ProxyLogin(None)
        return ForwardProxy(
            circles=None,
            policy=Policy(
                AddressSet.parse("loopback"),
                frozenset({self.server_port}),
                Destinations.parse("all"),
                Destinations.parse("none"),
                is_own_address,
            ),
            login=login,
            interception=Interception(registries, lambda host: authority.context_for(host.name), registry),
            dialer=Dialer(
                reactor,
                StaticResolver(),
                overrides={Host("tunnel.example", self.server_port): ("127.0.0.1", self.server_port)},
            ),
            agent=None,  # type: ignore[arg-type]
            local=hosted,
            hosted=hosted,
            hosted_names=frozenset({"docker-registry.local"}),
            hosted_context_for=authority.context_for,
            registry_ports=frozenset({5443}),
            registry_http_ports=frozenset({5000}),
            tunnels=Tunnels(
                self.clock,
                TunnelTimeouts(read=60, send=60),
                self.transfers,
                login.allows,
                lambda request, seconds: self.tunnels.append(request),
            ),
        )

    # client side, in a thread

    @contextmanager
    def connect(self, target: str, early_data: bytes = b"") -> Any:
        """Yield a socket after a successful CONNECT to `target`."""
        with self.connect_to_proxy() as connection:
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode() + early_data)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                piece = connection.recv(1)
                assert piece, head
                head += piece
            assert head.startswith(b"HTTP/1.1 200 "), head
            yield connection

    def connect_to_proxy(self) -> socket.socket:
        address = ("127.0.0.1", self.proxy_port)
        if self.proxy_tls:
            return open_tls(address, self.context(), "proxy.test")
        return socket.create_connection(address, timeout=30)

    def assert_reset(self, connection: socket.socket) -> None:
        if self.proxy_tls:
            self.assertEqual(connection.recv(100), b"")  # the client's TLS was reset, and the socket pair is closed
        else:
            with self.assertRaises(ConnectionResetError):
                connection.recv(100)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.pem)

    def over_tls(self, target: str, name: str, *requests: bytes) -> tuple[bytes, Any]:
        """Return the bytes of all responses to `requests`, and the certificate that the server presented."""
        with self.connect(target) as connection, self.context().wrap_socket(connection, server_hostname=name) as secure:
            certificate = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
            for request in requests:
                secure.sendall(request)
            return read_all(secure), certificate


def read_all(connection: Any) -> bytes:
    parts = []
    while data := connection.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


GET = b"GET /v2/ HTTP/1.1\r\nHost: whatever\r\n\r\n"
LAST = b"GET /v2/last HTTP/1.1\r\nHost: whatever\r\nConnection: close\r\n\r\n"


class InterceptionTests(ForwardProxyLoopbackCase):
    async def intercepted(self, target: str, name: str, *requests: bytes) -> tuple[bytes, Any]:
        responses, certificate = await deferToThread(self.over_tls, target, name, *requests)
        return responses, certificate

    async def test_registry_is_intercepted_over_tls(self) -> None:
        """Python's client verifies the chain and the name. Several requests share the connection."""
        responses, certificate = await self.intercepted("quay.io:443", "quay.io", GET, GET, LAST)
        self.assertEqual(responses.count(b"HTTP/1.1 200 OK"), 3)
        self.assertEqual(responses.count(b"from quay.io"), 3)
        self.assertEqual(responses.count(b"X-Secure: True"), 3)
        self.assertEqual(self.handled, [("quay.io", "GET", "/v2/")] * 2 + [("quay.io", "GET", "/v2/last")])
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual(names.get_values_for_type(x509.DNSName), ["quay.io"])
        # the access log has one line per request, and none for the CONNECT
        self.assertEqual([request.method for request in self.requests], ["GET"] * 3)
        self.assertEqual({request.client for request in self.requests}, {"127.0.0.1"})
        self.assertEqual(self.server.connections, [])

    async def test_every_kind_of_host_is_intercepted(self) -> None:
        for target, name, expected in [
            ("QUAY.io:443", "quay.io", b"from quay.io"),
            ("plain.example:5000", "plain.example", b"from plain.example:5000"),
            ("10.9.8.7:5001", "10.9.8.7", b"from 10.9.8.7:5001"),
            ("[fd00::1]:443", "fd00::1", b"from [fd00::1]"),
            ("docker-registry.local:443", "docker-registry.local", b"from the hosted registry"),
        ]:
            responses, _ = await self.intercepted(target, name, LAST)
            self.assertTrue(responses.endswith(expected), (target, responses))

    async def test_large_body_is_sent_and_received(self) -> None:
        head = b"PUT /v2/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(LARGE_BODY)
        responses, _ = await self.intercepted("quay.io:443", "quay.io", head + LARGE_BODY)
        self.assertTrue(responses.endswith(LARGE_BODY))

    async def test_client_hello_may_follow_the_connect_at_once(self) -> None:
        def run_client() -> bytes:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = self.context().wrap_bio(incoming, outgoing, server_hostname="quay.io")

            def try_handshake() -> bool:
                try:
                    tls.do_handshake()
                except ssl.SSLWantReadError:
                    return False
                return True

            self.assertFalse(try_handshake())
            with self.connect("quay.io:443", outgoing.read()) as connection:
                while not try_handshake():
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))
                tls.write(LAST)
                connection.sendall(outgoing.read())
                response = b""
                while not response.endswith(b"from quay.io"):
                    try:
                        response += tls.read(65536)
                    except ssl.SSLWantReadError:
                        incoming.write(connection.recv(65536))
                return response

        self.assertIn(b"200 OK", await deferToThread(run_client))

    async def test_client_that_does_not_trust_the_ca_fails_the_handshake(self) -> None:
        def run_client() -> None:
            with self.connect("quay.io:443") as connection:
                ssl.create_default_context().wrap_socket(connection, server_hostname="quay.io")

        with self.assertRaises(ssl.SSLCertVerificationError):
            await deferToThread(run_client)
        self.assertEqual(self.handled, [])

    async def test_garbage_instead_of_tls_is_not_answered(self) -> None:
        def run_client() -> bytes:
            with self.connect("quay.io:443") as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                try:
                    return read_all(connection)
                except ConnectionError:
                    return b""

        self.assertNotIn(b"HTTP/1.1", await deferToThread(run_client))
        self.assertEqual(self.handled, [])


class TunnelLoopbackTests(ForwardProxyLoopbackCase):
    async def run_through_tunnel(self, run_client: Callable[[Any], Any], early_data: bytes = b"") -> Any:
        def run() -> Any:
            with self.connect(f"tunnel.example:{self.server_port}", early_data) as connection:
                return run_client(connection)

        result = await deferToThread(run)
        for server_connection in self.server.connections:
            await server_connection.disconnected
        await self.transfers.when_empty()
        return result

    async def test_bytes_go_both_ways_untouched(self) -> None:
        """An echo server must receive nothing of the CONNECT, and the tunnel must not add a byte."""

        def echo(connection: TunnelServerProtocol) -> None:
            connection.transport.write(connection.received)
            connection.received = b""

        self.server.on_data = echo
        sent = bytes(range(256)) * 50

        def run_client(connection: socket.socket) -> bytes:
            connection.sendall(sent)
            received = b""
            while len(received) < len(sent):
                received += connection.recv(65536)
            return received

        self.assertEqual(await self.run_through_tunnel(run_client), sent)

    async def test_tunnel_logs_one_line(self) -> None:

        def send_and_close(connection: TunnelServerProtocol) -> None:
            connection.transport.write(b"x" * 1234)
            connection.transport.loseConnection()

        self.server.on_connected = send_and_close
        self.assertEqual(await self.run_through_tunnel(read_all), b"x" * 1234)
        self.assertEqual(self.requests, [])
        [request] = self.tunnels
        self.assertEqual(
            (
                request.client,
                request.method,
                request.host,
                request.path,
                request.status,
                request.bytes_sent,
                request.cache_status,
            ),
            ("127.0.0.1", "CONNECT", f"tunnel.example:{self.server_port}", "", 200, 1234, "PASS"),
        )

    async def test_data_sent_with_the_connect_is_delivered(self) -> None:

        def respond(connection: TunnelServerProtocol) -> None:
            if connection.received == b"hello":
                connection.transport.write(b"goodbye")
                connection.transport.loseConnection()

        self.server.on_data = respond
        self.assertEqual(await self.run_through_tunnel(read_all, b"hello"), b"goodbye")

    async def test_a_server_may_send_first(self) -> None:
        self.server.on_connected = lambda connection: connection.transport.write(b"220 welcome\r\n")

        def run_client(connection: socket.socket) -> bytes:
            return connection.recv(100)

        self.assertEqual(await self.run_through_tunnel(run_client), b"220 welcome\r\n")

    async def test_large_response_is_delivered_completely(self) -> None:
        """The response exceeds the socket buffers: back-pressure pauses the server, and no byte is lost."""
        closed_before: list[int] = []

        def on_connected(connection: TunnelServerProtocol) -> None:
            connection.transport.write(LARGE_BODY)
            connection.transport.loseConnection()

        self.server.on_connected = on_connected

        def run_client(connection: socket.socket) -> bytes:
            head = connection.recv(1000)
            closed_before.append(len(self.tunnels))
            return head + read_all(connection)

        self.assertEqual(await self.run_through_tunnel(run_client), LARGE_BODY)
        self.assertEqual(closed_before, [0])  # because the client had not read everything yet
        self.assertEqual([request.bytes_sent for request in self.tunnels], [len(LARGE_BODY)])

    async def test_large_body_to_a_slow_server_is_delivered_completely(self) -> None:
        self.server.on_connected = lambda connection: connection.transport.pauseProducing()

        def close_after_the_body(connection: TunnelServerProtocol) -> None:
            if len(connection.received) == len(LARGE_BODY):
                connection.transport.loseConnection()

        self.server.on_data = close_after_the_body

        def run_client(connection: socket.socket) -> bytes:
            connection.sendall(LARGE_BODY[:1_000_000])
            reactor.callFromThread(lambda: self.server.connections[0].transport.resumeProducing())
            connection.sendall(LARGE_BODY[1_000_000:])
            return read_all(connection)

        self.assertEqual(await self.run_through_tunnel(run_client), b"")
        self.assertEqual(self.server.connections[0].received, LARGE_BODY)

    async def test_data_before_a_client_disconnect_is_delivered(self) -> None:
        await self.run_through_tunnel(lambda connection: connection.sendall(b"x" * 300_000))
        self.assertEqual(self.server.connections[0].received, b"x" * 300_000)

    async def test_idle_tunnel_is_closed(self) -> None:
        def run_client(connection: socket.socket) -> None:
            reactor.callFromThread(self.clock.advance, 61)
            self.assert_reset(connection)

        await self.run_through_tunnel(run_client)
        self.assertEqual(len(self.tunnels), 1)

    async def test_draining_waits_for_tunnels_then_aborts_them(self) -> None:
        drained: list[int] = []
        clock = Clock()

        async def drain() -> None:
            drained.append(await self.transfers.drain(clock, 25))

        def stop() -> None:
            Deferred.fromCoroutine(drain())
            clock.advance(24)
            self.server.connections[0].transport.write(b"still here")

        def run_client(connection: socket.socket) -> bytes:
            reactor.callFromThread(stop)
            received = b""
            while len(received) < 10:
                received += connection.recv(100)
            reactor.callFromThread(clock.advance, 1)
            self.assert_reset(connection)
            return received

        self.assertEqual(await self.run_through_tunnel(run_client), b"still here")
        self.assertEqual(drained, [1])
        self.assertEqual(len(self.tunnels), 1)

    async def test_unreachable_server_is_a_gateway_error(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            forbidden_port = listener.getsockname()[1]
        for port, status in ((forbidden_port, b"403"), (self.server_port, b"502")):

            def run_client(port: int = port) -> bytes:
                with self.connect_to_proxy() as connection:
                    connection.sendall(b"CONNECT nowhere.invalid:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port)
                    return read_all(connection)

            response = await deferToThread(run_client)
            self.assertTrue(response.startswith(b"HTTP/1.1 " + status), response)


class InterceptionOverTLSTests(InterceptionTests):
    """The same through a proxy that clients reach over TLS: the registries' TLS is within that of the proxy."""

    proxy_tls = True


class TunnelOverTLSTests(TunnelLoopbackTests):
    proxy_tls = True
