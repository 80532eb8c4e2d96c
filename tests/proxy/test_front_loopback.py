"""The front door over loopback: what needs a real socket, which is all that comes after a CONNECT.

The clients are Python's own, blocking, in threads; their TLS is OpenSSL's. The time of tunnels is the test's.
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
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.front import FrontDoor, Interception
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.tunnel import TunnelTimeouts

QUAY = Registry.parse("quay.io")
ODD = Registry.parse("http://plain.example:5000")
ADDRESS = Registry.parse("10.9.8.7:5001")
SIX = Registry.parse("[fd00::1]:443")
BIG = b"0123456789abcdef" * 65536 * 8  # 8 MiB: more than sockets hold


class Talk(Protocol):
    """A server behind a tunnel, told by its test what to do."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.got = b""
        self.lost: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.server.talks.append(self)
        self.server.connected(self)

    def dataReceived(self, data: bytes) -> None:
        self.got += data
        self.server.heard(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(None)


class Server(Factory):
    noisy = False

    def __init__(self) -> None:
        self.talks: list[Talk] = []
        self.connected: Callable[[Talk], object] = lambda talk: None
        self.heard: Callable[[Talk], object] = lambda talk: None

    def buildProtocol(self, address: Any) -> Talk:
        return Talk(self)


class Loopback(TestCase):
    timeout = 60

    async def setUp(self) -> None:
        folder = Path(self.mktemp())
        authority = CertificateAuthority.open(
            folder / "ca", certificate_file=None, key_file=None, passphrase=None, now=time.time
        )
        self.pem = authority.certificate_pem.decode()
        self.answered: list[tuple[str, str, str]] = []
        self.requests: list[Request] = []  # those of the site's log
        self.tunnels: list[Request] = []
        self.transfers = Transfers()
        self.clock = Clock()  # the tunnels' own
        self.server = Server()
        server = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(self.server)
        self.addCleanup(server.stopListening)
        self.far = server.getHost().port
        front = self.front(authority)

        async def handle(request: Request) -> None:
            await front.handle(site, request)

        site = self.site = Site(
            reactor,
            handle,
            timeouts=ServerTimeouts(),
            on_request_finished=lambda request, seconds: self.requests.append(request),
        )
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(site)
        self.near = port.getHost().port
        self.addCleanup(lambda: Deferred.fromCoroutine(self._end(port)))

    async def _end(self, port: Any) -> None:
        await port.stopListening()
        self.site.abort()
        await self.site.drain()
        await self.transfers.drain(reactor, 0)
        await self.transfers.when_empty()

    def front(self, authority: CertificateAuthority) -> FrontDoor:
        async def registry(registry: Registry, request: Request) -> None:
            self.answered.append((str(registry), request.method, request.path))
            content = await request.read_all(1 << 30)
            request.respond(200, [("X-Secure", str(request.secure))], content or f"from {registry}".encode())

        async def own(request: Request) -> None:
            self.answered.append(("own", request.method, request.path))
            request.respond(200, [], b"from our own")

        registries = {registry.host: registry for registry in (QUAY, ODD, ADDRESS, SIX)}
        return FrontDoor(
            clock=self.clock,
            policy=Policy(
                AddressSet.parse("loopback"),
                frozenset({self.far}),
                Destinations.parse("all"),
                Destinations.parse("none"),
            ),
            interception=Interception(registries, authority.context_for, registry),
            dial=Dialer(reactor, overrides={Host("tunnel.example", self.far): ("127.0.0.1", self.far)}),
            transport=None,  # type: ignore[arg-type]
            local=own,
            own=own,
            own_names=frozenset({"docker-registry.local"}),
            timeouts=TunnelTimeouts(read=60, send=60),
            transfers=self.transfers,
            log=lambda request, seconds: self.tunnels.append(request),
        )

    # the client's side, in a thread

    @contextmanager
    def connect(self, target: str, early: bytes = b"") -> Any:
        """Yield a socket on which a CONNECT to `target` was answered with yes."""
        with socket.create_connection(("127.0.0.1", self.near), timeout=30) as connection:
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode() + early)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                piece = connection.recv(1)
                assert piece, head
                head += piece
            assert head.startswith(b"HTTP/1.1 200 "), head
            yield connection

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.pem)

    def over_tls(self, target: str, name: str, *requests: bytes) -> tuple[bytes, Any]:
        """Return all that the answers to `requests` are, and the certificate that was shown."""
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


class Interceptions(Loopback):
    async def intercepted(self, target: str, name: str, *requests: bytes) -> tuple[bytes, Any]:
        answers, certificate = await deferToThread(self.over_tls, target, name, *requests)
        return answers, certificate

    async def test_a_registry_is_answered_for_over_tls(self) -> None:
        """Python's client checks chain and name; several requests share the connection."""
        answers, certificate = await self.intercepted("quay.io:443", "quay.io", GET, GET, LAST)
        self.assertEqual(answers.count(b"HTTP/1.1 200 OK"), 3)
        self.assertEqual(answers.count(b"from quay.io"), 3)
        self.assertEqual(answers.count(b"X-Secure: True"), 3)
        self.assertEqual(self.answered, [("quay.io", "GET", "/v2/")] * 2 + [("quay.io", "GET", "/v2/last")])
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual(names.get_values_for_type(x509.DNSName), ["quay.io"])
        # one line for each request, and none for the CONNECT
        self.assertEqual([request.method for request in self.requests], ["GET"] * 3)
        self.assertEqual({request.client for request in self.requests}, {"127.0.0.1"})
        self.assertEqual(self.server.talks, [])

    async def test_every_kind_of_name(self) -> None:
        for target, name, told in [
            ("QUAY.io:443", "quay.io", b"from quay.io"),
            ("plain.example:5000", "plain.example", b"from plain.example:5000"),
            ("10.9.8.7:5001", "10.9.8.7", b"from 10.9.8.7:5001"),
            ("[fd00::1]:443", "fd00::1", b"from [fd00::1]"),
            ("docker-registry.local:443", "docker-registry.local", b"from our own"),
        ]:
            answers, _ = await self.intercepted(target, name, LAST)
            self.assertTrue(answers.endswith(told), (target, answers))

    async def test_a_body_as_large_as_it_likes(self) -> None:
        head = b"PUT /v2/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BIG)
        answers, _ = await self.intercepted("quay.io:443", "quay.io", head + BIG)
        self.assertTrue(answers.endswith(BIG))

    async def test_a_client_that_does_not_wait_for_its_connect(self) -> None:
        """It sends the first bytes of TLS along with it."""

        def talk() -> bytes:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = self.context().wrap_bio(incoming, outgoing, server_hostname="quay.io")

            def shaken() -> bool:
                try:
                    tls.do_handshake()
                except ssl.SSLWantReadError:
                    return False
                return True

            self.assertFalse(shaken())
            with self.connect("quay.io:443", outgoing.read()) as connection:
                while not shaken():
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))
                tls.write(LAST)
                connection.sendall(outgoing.read())
                answer = b""
                while not answer.endswith(b"from quay.io"):
                    try:
                        answer += tls.read(65536)
                    except ssl.SSLWantReadError:
                        incoming.write(connection.recv(65536))
                return answer

        self.assertIn(b"200 OK", await deferToThread(talk))

    async def test_a_client_that_does_not_trust_us(self) -> None:
        def talk() -> None:
            with self.connect("quay.io:443") as connection:
                ssl.create_default_context().wrap_socket(connection, server_hostname="quay.io")

        with self.assertRaises(ssl.SSLCertVerificationError):
            await deferToThread(talk)
        self.assertEqual(self.answered, [])

    async def test_garbage_instead_of_tls(self) -> None:
        def talk() -> bytes:
            with self.connect("quay.io:443") as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                try:
                    return read_all(connection)
                except ConnectionError:
                    return b""

        self.assertNotIn(b"HTTP/1.1", await deferToThread(talk))
        self.assertEqual(self.answered, [])


class Tunnels(Loopback):
    async def tunnelled(self, talk: Callable[[Any], Any], early: bytes = b"") -> Any:
        def run() -> Any:
            with self.connect(f"tunnel.example:{self.far}", early) as connection:
                return talk(connection)

        result = await deferToThread(run)
        for far in self.server.talks:
            await far.lost
        await self.transfers.when_empty()
        return result

    async def test_bytes_go_both_ways_untouched(self) -> None:
        """An echo: nothing of the CONNECT gets there, and nothing is added."""
        self.server.heard = lambda far: (far.transport.write(far.got), setattr(far, "got", b""))
        sent = bytes(range(256)) * 50

        def talk(connection: socket.socket) -> bytes:
            connection.sendall(sent)
            got = b""
            while len(got) < len(sent):
                got += connection.recv(65536)
            return got

        self.assertEqual(await self.tunnelled(talk), sent)

    async def test_there_is_one_line_in_the_log(self) -> None:
        self.server.connected = lambda far: (far.transport.write(b"x" * 1234), far.transport.loseConnection())
        self.assertEqual(await self.tunnelled(read_all), b"x" * 1234)
        self.assertEqual(self.requests, [])
        [logged] = self.tunnels
        self.assertEqual(
            (
                logged.client,
                logged.method,
                logged.host,
                logged.path,
                logged.status,
                logged.bytes_sent,
                logged.cache_status,
            ),
            ("127.0.0.1", "CONNECT", f"tunnel.example:{self.far}", "", 200, 1234, "PASS"),
        )

    async def test_a_client_that_does_not_wait_for_its_connect(self) -> None:
        self.server.heard = lambda far: (
            far.got == b"hello"
            and (
                far.transport.write(b"goodbye"),
                far.transport.loseConnection(),
            )
        )
        self.assertEqual(await self.tunnelled(read_all, b"hello"), b"goodbye")

    async def test_a_server_that_speaks_first(self) -> None:
        self.server.connected = lambda far: far.transport.write(b"220 welcome\r\n")

        def talk(connection: socket.socket) -> bytes:
            return connection.recv(100)

        self.assertEqual(await self.tunnelled(talk), b"220 welcome\r\n")

    async def test_a_large_answer(self) -> None:
        """More than sockets hold: the server is held back until the client takes it, and nothing is lost on the way."""
        ended_before: list[int] = []

        def connected(far: Talk) -> None:
            far.transport.write(BIG)
            far.transport.loseConnection()

        self.server.connected = connected

        def talk(connection: socket.socket) -> bytes:
            head = connection.recv(1000)
            ended_before.append(len(self.tunnels))
            return head + read_all(connection)

        self.assertEqual(await self.tunnelled(talk), BIG)
        self.assertEqual(ended_before, [0])  # until the last byte is taken, it is not over
        self.assertEqual([logged.bytes_sent for logged in self.tunnels], [len(BIG)])

    async def test_a_large_body_to_a_server_that_reads_late(self) -> None:
        self.server.connected = lambda far: far.transport.pauseProducing()
        self.server.heard = lambda far: len(far.got) == len(BIG) and far.transport.loseConnection()

        def talk(connection: socket.socket) -> bytes:
            connection.sendall(BIG[:1_000_000])
            reactor.callFromThread(lambda: self.server.talks[0].transport.resumeProducing())
            connection.sendall(BIG[1_000_000:])
            return read_all(connection)

        self.assertEqual(await self.tunnelled(talk), b"")
        self.assertEqual(self.server.talks[0].got, BIG)

    async def test_what_a_client_sends_before_it_leaves_arrives(self) -> None:
        await self.tunnelled(lambda connection: connection.sendall(b"x" * 300_000))
        self.assertEqual(self.server.talks[0].got, b"x" * 300_000)

    async def test_a_quiet_tunnel_is_closed(self) -> None:
        def talk(connection: socket.socket) -> bytes:
            reactor.callFromThread(self.clock.advance, 61)
            return read_all(connection)

        with self.assertRaises(ConnectionResetError):
            await self.tunnelled(talk)
        self.assertEqual(len(self.tunnels), 1)

    async def test_a_stopping_daemon_waits_for_tunnels_and_then_breaks_them_off(self) -> None:
        drained: list[int] = []
        clock = Clock()

        async def drain() -> None:
            drained.append(await self.transfers.drain(clock, 25))

        def stop() -> None:
            Deferred.fromCoroutine(drain())
            clock.advance(24)
            self.server.talks[0].transport.write(b"still here")

        def talk(connection: socket.socket) -> bytes:
            reactor.callFromThread(stop)
            got = b""
            while len(got) < 10:
                got += connection.recv(100)
            reactor.callFromThread(clock.advance, 1)
            with self.assertRaises(ConnectionResetError):
                connection.recv(100)
            return got

        self.assertEqual(await self.tunnelled(talk), b"still here")
        self.assertEqual(drained, [1])
        self.assertEqual(len(self.tunnels), 1)

    async def test_a_server_that_is_not_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            free = taken.getsockname()[1]
        for port, status in ((free, b"403"), (self.far, b"502")):

            def talk(port: int = port) -> bytes:
                with socket.create_connection(("127.0.0.1", self.near), timeout=30) as connection:
                    connection.sendall(b"CONNECT nowhere.invalid:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port)
                    return read_all(connection)

            answer = await deferToThread(talk)
            self.assertTrue(answer.startswith(b"HTTP/1.1 " + status), answer)
