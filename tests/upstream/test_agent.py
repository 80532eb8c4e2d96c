"""Tests for the HTTP agent against real servers on loopback: sockets, TLS, time-outs, memory.

Sockets and TLS are real, but the agent's clock is fake: it stands still until a test advances it.
"""

from __future__ import annotations

import os
import socket
import tempfile
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator, IPullProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import AccumulatingProtocol
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import TestCase
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from dockerproxy.errors import BadRequest, Denied, EndUnconfirmed, UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Digest, Host
from dockerproxy.upstream.agent import Agent, ClientContext, UpstreamTimeouts
from tests.support.resolvers import StaticResolver

NOW = datetime.now(UTC)


class EphemeralCA:
    """A CA for tests; `issue` returns a certificate for names and addresses, and its key, in PEM."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test CA {x509.random_serial_number()}")])
        self.certificate = self._sign(self.name, self.key, NOW + timedelta(days=1), ca=True)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str, lifetime: timedelta = timedelta(days=1)) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(x509.Name([]), key, NOW + lifetime, names=names)
        return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def _sign(
        self, subject: x509.Name, key: Any, not_after: datetime, names: Any = (), ca: bool = False
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=10))
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            alternatives = [
                x509.IPAddress(ip_address(name)) if name[0].isdigit() or ":" in name else x509.DNSName(name)
                for name in names
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=not len(list(subject)))
        return builder.sign(self.key, hashes.SHA256())


AUTHORITY = EphemeralCA()


@implementer(IOpenSSLServerConnectionCreator)
class ServerTLSCreator:
    def __init__(self, pair: tuple[bytes, bytes], max_version: int = SSL.TLS1_3_VERSION) -> None:
        self._context = SSL.Context(SSL.TLS_METHOD)
        self._context.set_min_proto_version(SSL.TLS1_VERSION)
        self._context.set_max_proto_version(max_version)
        self.server_names: list[bytes | None] = []
        with tempfile.TemporaryDirectory() as directory:
            for name, content in zip(("crt", "key"), pair, strict=True):
                Path(directory, name).write_bytes(content)
            self._context.use_certificate_file(os.path.join(directory, "crt"))
            self._context.use_privatekey_file(os.path.join(directory, "key"))
        self._context.set_tlsext_servername_callback(
            lambda connection: self.server_names.append(connection.get_servername())
        )

    def serverConnectionForTLS(self, protocol: object) -> SSL.Connection:
        return SSL.Connection(self._context, None)


class ScriptedProtocol(Protocol):
    """A server that calls `respond(connection, head)` for each request head. `buffer` collects the bodies."""

    def __init__(self, factory: ScriptedServer) -> None:
        self.server = factory
        self.buffer = b""

    def connectionMade(self) -> None:
        self.server.connections.append(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.server.connections.remove(self)
        self.server.closed += 1

    def dataReceived(self, data: bytes) -> None:
        self.buffer += data
        self.server.bytes_received += len(data)
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            if not head.startswith((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH")):
                return
            self.buffer = rest
            self.server.heads.append(head)
            self.server.respond(self, head)


class ScriptedServer(Factory):
    noisy = False

    def __init__(self, respond: Callable[[Any, bytes], None]) -> None:
        self.respond = respond
        self.heads: list[bytes] = []
        self.connections: list[ScriptedProtocol] = []
        self.accepted = 0
        self.closed = 0
        self.bytes_received = 0

    def buildProtocol(self, address: Any) -> ScriptedProtocol:
        self.accepted += 1
        return ScriptedProtocol(self)


def respond_with(*parts: bytes, close: bool = False) -> Callable[[Any, bytes], None]:
    def respond(connection: Any, head: bytes) -> None:
        for part in parts:
            connection.transport.write(part)
        if close:
            connection.transport.loseConnection()

    return respond


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SENT_UPGRADE = [b"x-end: 2", b"Connection: Upgrade", b"Upgrade: echo"]


@implementer(IBodyProducer)
class PiecewiseBodyProducer:
    """Produces the given pieces at once, except while the transport pauses it."""

    def __init__(self, *pieces: bytes, length: Any = None) -> None:
        self.length = sum(map(len, pieces)) if length is None else length
        self.pieces = list(pieces)
        self.paused = False
        self.stopped = False
        self.done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        self._produce()
        return self.done

    def _produce(self) -> None:
        while self.pieces and not self.paused and not self.stopped:
            self.consumer.write(self.pieces.pop(0))
        if not self.pieces and not self.stopped and not self.done.called:
            self.done.callback(None)

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        self._produce()

    def stopProducing(self) -> None:
        self.stopped = True


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds. If it never does, trial's time-out fails the test."""
    while not condition():
        await deferLater(reactor, 0)


class AgentLoopbackCase(TestCase):
    timeout = 20

    def setUp(self) -> None:
        self.clock = Clock()
        self.agents: list[Agent] = []
        self.ports: list[Any] = []
        self.servers: list[ScriptedServer] = []

    async def tearDown(self) -> None:
        for agent in self.agents:
            await agent.close()
        for port in self.ports:
            await port.stopListening()
        for server in self.servers:
            for connection in list(server.connections):
                connection.transport.abortConnection()
            await wait_until(lambda server=server: not server.connections)

    def serve(
        self, respond: Callable[[Any, bytes], None], tls: ServerTLSCreator | None = None
    ) -> tuple[ScriptedServer, int]:
        server = ScriptedServer(respond)
        factory = server if tls is None else TLSMemoryBIOFactory(tls, False, server)
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.ports.append(port)
        self.servers.append(server)
        return server, port.getHost().port

    def make_agent(self, overrides: Any = None, check_for: Any = lambda host: None, **tls: Any) -> Agent:
        dialer = Dialer(reactor, StaticResolver(), overrides=overrides)
        timeouts = UpstreamTimeouts(connect=20, read=30, send=40)
        agent = Agent(self.clock, dialer, ClientContext(**tls), timeouts, check_for)
        self.agents.append(agent)
        return agent

    def make_trusting_agent(self, overrides: dict[Host, tuple[str, int]]) -> Agent:
        path = self.mktemp()
        Path(path).write_bytes(AUTHORITY.pem)
        return self.make_agent(ca_file=path, overrides=overrides)

    async def assert_fails(self, error: type[Exception], work: Any, *words: str) -> None:
        failure = await self.assertFailure(Deferred.fromCoroutine(work), error)
        for word in words:
            self.assertIn(word, str(failure))


class PlainHTTPTests(AgentLoopbackCase):
    async def test_request_and_response(self) -> None:
        server, port = self.serve(
            respond_with(b"HTTP/1.1 200 OK\r\nX-Tag: one\r\nX-Tag: two\r\nContent-Length: 5\r\n\r\nhello")
        )
        headers = Headers([("Accept", "a"), ("Connection", "x-hop"), ("X-Hop", "1")])
        response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/v2/?n=1", headers)
        self.assertEqual((response.status, response.length), (200, 5))
        self.assertEqual(response.url, f"http://127.0.0.1:{port}/v2/?n=1")
        self.assertEqual(response.headers.all("x-tag"), ["one", "two"])
        self.assertEqual(await response.read_all(5), b"hello")
        self.assertEqual(await response.read_chunk(), b"")
        lines = server.heads[0].split(b"\r\n")
        self.assertEqual(lines[0], b"GET /v2/?n=1 HTTP/1.1")
        self.assertIn(b"Host: 127.0.0.1:%d" % port, lines)
        self.assertEqual([line for line in lines if b"ncoding" in line], [b"Accept-Encoding: identity"])
        self.assertNotIn(b"x-hop", server.heads[0])

    async def test_a_clients_own_accept_encoding_is_sent(self) -> None:
        server, port = self.serve(respond_with(OK))
        await self.make_agent().request("GET", f"http://127.0.0.1:{port}/", Headers([("Accept-Encoding", "br")]))
        lines = server.heads[0].split(b"\r\n")
        self.assertEqual([line.lower() for line in lines if b"ncoding" in line], [b"accept-encoding: br"])

    async def test_connections_are_reused(self) -> None:
        server, port = self.serve(respond_with(OK))
        agent = self.make_agent()
        for _ in range(3):
            response = await agent.request("GET", f"http://127.0.0.1:{port}/")
            self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual(server.accepted, 1)

    async def test_connection_is_not_shared_between_address_checks(self) -> None:
        server, port = self.serve(respond_with(OK))
        agent = self.make_agent()
        await (await agent.request("GET", f"http://127.0.0.1:{port}/")).read_all(9)

        def address_check(address: str) -> None:
            raise Denied(f"{address} is forbidden")

        await self.assert_fails(
            Denied, agent.request("GET", f"http://127.0.0.1:{port}/", address_check=address_check), "127.0.0.1"
        )
        self.assertEqual(server.accepted, 1)

    async def test_a_host_may_have_a_check_for_all_requests(self) -> None:
        _, port = self.serve(respond_with(OK))

        def check_for(host: Host) -> Any:
            def address_check(address: str) -> None:
                raise Denied(f"{address} is forbidden for {host}")

            return address_check

        agent = self.make_agent(check_for=check_for)
        await self.assert_fails(Denied, agent.request("GET", f"http://127.0.0.1:{port}/"), f"for 127.0.0.1:{port}")
        response = await agent.request("GET", f"http://127.0.0.1:{port}/", address_check=lambda address: None)
        self.assertEqual(await response.read_all(9), b"hello")

    async def test_a_connection_that_a_client_logged_in_is_that_clients(self) -> None:
        server, port = self.serve(respond_with(OK))
        agent, url = self.make_agent(), f"http://127.0.0.1:{port}/"

        async def get(client_connection: int | None, *fields: tuple[str, str], method: str = "GET") -> None:
            response = await agent.request(method, url, Headers(fields), client_connection=client_connection)
            await response.read_all(10)

        await get(1)
        self.assertEqual(server.accepted, 1)
        await get(1, ("Authorization", "NTLM TlRMTVNTUAAB"))  # on the idle connection
        self.assertEqual(server.accepted, 1)
        await get(1)
        await get(1, method="POST")  # a login must not end because a client sends a form
        self.assertEqual(server.accepted, 1)
        await get(2)
        await get(None)  # takes that of 2
        self.assertEqual(server.accepted, 2)
        await get(None, ("Authorization", "Negotiate YII="))  # belongs to nobody, so it is closed
        await get(None)
        self.assertEqual(server.accepted, 3)
        await get(1)
        self.assertEqual(server.accepted, 3)

    async def test_a_connection_that_was_asked_for_such_a_login_is_that_clients(self) -> None:
        """The handshake is half made, so the next login of another client on this connection would finish it."""
        challenge = b"HTTP/1.1 401 No\r\nWWW-Authenticate: Negotiate oYG1\r\nContent-Length: 0\r\n\r\n"
        server, port = self.serve(respond_with(challenge))
        agent = self.make_agent()
        for client_connection, accepted in ((1, 1), (1, 1), (2, 2), (None, 3), (None, 4), (1, 4)):
            response = await agent.request("GET", f"http://127.0.0.1:{port}/", client_connection=client_connection)
            await response.read_all(10)
            self.assertEqual(server.accepted, accepted)

    async def test_idle_connection_closed_by_server_is_replaced(self) -> None:
        # The server closes the connection on the second request, as if its keep-alive time-out had just expired.
        def respond(connection: Any, head: bytes) -> None:
            if connection.server.heads.count(head) == 2:
                connection.transport.loseConnection()
            else:
                connection.transport.write(OK)

        server, port = self.serve(respond)
        agent = self.make_agent()
        for _ in range(2):
            response = await agent.request("GET", f"http://127.0.0.1:{port}/")
            self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual(server.accepted, 2)

    async def test_kernel_ends_connections_on_which_nothing_is_acknowledged(self) -> None:
        """The time is short for requests of a single packet, and that of a pause for bodies."""
        _, port = self.serve(respond_with(OK))
        _, tls_port = self.serve(respond_with(OK), ServerTLSCreator(AUTHORITY.issue("127.0.0.1")))
        agent = self.make_trusting_agent({})
        for origin, method, body, milliseconds in (
            (f"http://127.0.0.1:{port}", "GET", None, 10_000),
            (f"http://127.0.0.1:{port}", "PUT", PiecewiseBodyProducer(b"x"), 40_000),
            (f"https://127.0.0.1:{tls_port}", "GET", None, 10_000),
            (f"https://127.0.0.1:{tls_port}", "PUT", PiecewiseBodyProducer(b"x"), 40_000),
        ):
            response = await agent.request(method, f"{origin}/", body=body)
            await response.read_all(9)
            [connection] = agent._connections
            sock = connection.transport.getHandle()
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), milliseconds)
            connection.abort()
            await wait_until(lambda: not agent.open_connections)

    async def test_connection_that_speaks_another_protocol(self) -> None:
        """It is handed over with what came after the head, has no time-out, and is no longer the agent's."""

        def respond(connection: Any, head: bytes) -> None:
            connection.transport.write(b"HTTP/1.1 101 Switching\r\nUpgrade: echo\r\n\r\nearly")
            connection.dataReceived = connection.transport.write

        server, port = self.serve(respond)
        tls_server, tls_port = self.serve(respond, ServerTLSCreator(AUTHORITY.issue("127.0.0.1")))
        agent = self.make_trusting_agent({})
        for served, origin in ((server, f"http://127.0.0.1:{port}"), (tls_server, f"https://127.0.0.1:{tls_port}")):
            fields = Headers([("Upgrade", "echo"), ("Connection", "Upgrade, X-Hop"), ("X-Hop", "1"), ("X-End", "2")])
            response = await agent.request("GET", f"{origin}/ws", fields)
            self.assertEqual(response.status, 101)
            lines = served.heads[0].split(b"\r\n")
            self.assertEqual([line for line in lines if line.startswith((b"x-", b"Con", b"Upg"))], SENT_UPGRADE)
            protocol = AccumulatingProtocol()
            response.hand_over(protocol)
            self.assertEqual((agent.open_connections, agent.idle_connections), (0, 0))
            sock = protocol.transport.getHandle()
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 0)
            self.clock.advance(3600)
            protocol.transport.write(b" and late")
            await wait_until(lambda protocol=protocol: protocol.data == b"early and late")
            protocol.transport.loseConnection()
            await wait_until(lambda protocol=protocol: protocol.closed)

    async def test_connections_that_died_cost_one_wait_together(self) -> None:
        """A firewall has forgotten the idle connections. One request finds it out, and the others get new ones."""
        server, port = self.serve(respond_with(OK))
        agent, url = self.make_agent(), f"http://127.0.0.1:{port}/"
        works = [Deferred.fromCoroutine(agent.request("GET", url)) for _ in range(3)]
        for work in works:
            await (await work).read_all(9)
        self.assertEqual((server.accepted, agent.idle_connections), (3, 3))
        held: list[Any] = []
        server.respond = lambda connection, head: held.append(connection)
        waiting = Deferred.fromCoroutine(agent.request("GET", url))
        await wait_until(lambda: len(held) == 1)
        self.clock.advance(3)  # the kernel gives up after 10 s
        server.respond = respond_with(OK)
        held[0].transport.abortConnection()
        response = await waiting
        self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual((server.accepted, len(agent._connections)), (4, 1))

    async def test_a_server_that_says_nothing_is_remembered(self) -> None:
        held: list[Any] = []
        server, port = self.serve(lambda connection, head: held.append(head))
        agent, url = self.make_agent(), f"http://127.0.0.1:{port}/v2/secret/manifests/1"
        headers = Headers([("Authorization", "Basic secret"), ("Accept", "x")])
        first = Deferred.fromCoroutine(agent.request("GET", url, headers))
        await wait_until(lambda: len(held) == 1)
        self.clock.advance(5)
        await wait_until(lambda: len(held) == 2)
        self.assertTrue(held[1].startswith(b"GET /v2/ HTTP/1.1\r\n"))
        self.assertNotIn(b"secret", held[1])
        self.clock.advance(25)
        await self.assertFailure(first, UpstreamTimeout)
        self.clock.advance(5)  # our own request has timed out as well
        for method in ("GET", "HEAD", "PUT"):
            await self.assert_fails(UpstreamTimeout, agent.request(method, url), "tried 0 s ago")
        # A server that a client chose, and no registry did, is not remembered, and the client waits as without us.
        own = Deferred.fromCoroutine(agent.request("GET", url, client="192.0.2.1"))
        await wait_until(lambda: len(held) == 3)
        own.cancel()
        await self.assertFailure(own, CancelledError)
        server.respond = respond_with(OK)
        self.clock.advance(5)
        await wait_until(lambda: server.heads.count(held[1]) == 2)
        response = None
        while response is None:
            try:
                response = await agent.request("GET", url)
            except UpstreamTimeout:
                await deferLater(reactor, 0.01)
        self.assertEqual(await response.read_all(9), b"hello")

    async def test_a_path_that_hangs_does_not_make_its_server_silent(self) -> None:
        def respond(connection: Any, head: bytes) -> None:
            if b"/hang" not in head:
                connection.transport.write(OK)

        server, port = self.serve(respond)
        agent, url = self.make_agent(), f"http://127.0.0.1:{port}"
        hanging = [Deferred.fromCoroutine(agent.request("GET", f"{url}/hang/{number}")) for number in range(5)]
        await wait_until(lambda: len(server.heads) == 5)
        self.clock.advance(5)
        await wait_until(lambda: len(server.heads) == 6 and agent.idle_connections == 1)
        self.clock.advance(25)
        for work in hanging:
            await self.assertFailure(work, UpstreamTimeout)
        response = await agent.request("GET", f"{url}/v2/")
        self.assertEqual(await response.read_all(9), b"hello")

    async def test_new_connection_closed_by_server_is_an_error(self) -> None:
        server, port = self.serve(respond_with(close=True))
        await self.assert_fails(
            UpstreamBroken, self.make_agent().request("GET", f"http://127.0.0.1:{port}/"), str(port)
        )
        self.assertEqual(server.accepted, 1)

    async def test_post_uses_a_new_connection(self) -> None:
        server, port = self.serve(respond_with(OK))
        agent = self.make_agent()
        for _ in range(2):
            await (await agent.request("POST", f"http://127.0.0.1:{port}/")).read_all(9)
        self.assertEqual(server.accepted, 2)
        self.assertIn(b"Content-Length: 0", server.heads[0])

    async def test_head_has_length_and_no_body(self) -> None:
        server, port = self.serve(respond_with(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"))
        agent = self.make_agent()
        for _ in range(2):
            response = await agent.request("HEAD", f"http://127.0.0.1:{port}/")
            self.assertEqual(response.length, 1000000)
            self.assertEqual(await response.read_chunk(), b"")
            await response.discard()
        self.assertEqual(server.accepted, 1)

    async def test_chunked_body_is_read(self) -> None:
        _, port = self.serve(
            respond_with(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfoo\r\n", b"3\r\nbar\r\n0\r\n\r\n")
        )
        response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/")
        self.assertIs(response.length, None)
        self.assertEqual(await response.read_all(6), b"foobar")

    async def test_body_without_a_length_ends_with_the_connection(self) -> None:
        _, port = self.serve(respond_with(b"HTTP/1.0 200 OK\r\n\r\nall", close=True))
        response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/")
        self.assertEqual(await response.read_all(3), b"all")

    async def test_truncated_bodies_are_errors(self) -> None:
        for head in (b"Content-Length: 9", b"Transfer-Encoding: chunked"):
            _, port = self.serve(respond_with(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n5\r\nhel", close=True))
            response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/")
            await self.assert_fails(
                UpstreamBroken, response.read_all(100), f"127.0.0.1:{port}", "closed the connection"
            )

    async def test_silence_in_head_or_body_times_out(self) -> None:
        agent = self.make_agent()
        server, port = self.serve(respond_with())
        work = Deferred.fromCoroutine(agent.request("GET", f"http://127.0.0.1:{port}/"))
        await wait_until(lambda: server.heads)
        self.clock.advance(30)
        self.assertIn("received nothing for 30 s", str(await self.assertFailure(work, UpstreamTimeout)))
        _, port = self.serve(respond_with(OK[:-1]))
        response = await agent.request("GET", f"http://127.0.0.1:{port}/")
        self.assertEqual(await response.read_chunk(), b"hell")
        self.clock.advance(30)
        await self.assert_fails(UpstreamTimeout, response.read_chunk(), f"127.0.0.1:{port}")

    async def test_unreachable_servers_are_named_in_the_error(self) -> None:
        agent = self.make_agent()
        await self.assert_fails(
            UpstreamUnreachable, agent.request("GET", "http://a.invalid/"), "a.invalid:80", "no such name"
        )
        _, port = self.serve(respond_with(OK))
        await self.ports.pop().stopListening()
        await self.assert_fails(
            UpstreamUnreachable, agent.request("GET", f"http://127.0.0.1:{port}/"), f"127.0.0.1:{port}", "refused"
        )

    async def test_read_all_refuses_a_longer_body(self) -> None:
        _, port = self.serve(respond_with(OK))
        response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/")
        await self.assert_fails(UpstreamBroken, response.read_all(4), "4 bytes")

    async def test_discard_reuses_the_connection_after_a_small_body(self) -> None:
        server, port = self.serve(respond_with(OK))
        agent = self.make_agent()
        for _ in range(2):
            await (await agent.request("GET", f"http://127.0.0.1:{port}/")).discard()
        self.assertEqual(server.accepted, 1)
        large, port = self.serve(respond_with(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nx"))
        await (await agent.request("GET", f"http://127.0.0.1:{port}/")).discard()
        await wait_until(lambda: large.closed)

    async def test_cancel_closes_the_connection(self) -> None:
        server, port = self.serve(respond_with())
        work = Deferred.fromCoroutine(self.make_agent().request("GET", f"http://127.0.0.1:{port}/"))
        await wait_until(lambda: server.heads)
        work.cancel()
        await self.assertFailure(work, CancelledError)
        await wait_until(lambda: server.closed)

    async def test_memory_is_bounded_with_a_slow_reader(self) -> None:
        size = 100 * 1024 * 1024
        piece = bytes(1024 * 1024)

        @implementer(IPullProducer)
        class ZeroProducer:
            sent = 0

            def __init__(self, transport: Any) -> None:
                self.transport = transport

            def resumeProducing(self) -> None:
                if ZeroProducer.sent == size:
                    self.transport.unregisterProducer()
                else:
                    ZeroProducer.sent += len(piece)
                    self.transport.write(piece)

            def stopProducing(self) -> None: ...

        def respond(connection: Any, head: bytes) -> None:
            connection.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            connection.transport.registerProducer(ZeroProducer(connection.transport), False)

        _, port = self.serve(respond)
        response = await self.make_agent().request("GET", f"http://127.0.0.1:{port}/")
        received = 0
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        while data := await response.read_chunk():
            received += len(data)
            for _ in range(3):  # read slowly
                await deferLater(reactor, 0)
            # The kernel's socket buffers account for a part of these 16 MiB.
            self.assertLess(ZeroProducer.sent - received, 16 * 1024 * 1024)
        self.assertEqual(received, size)
        self.assertLess(tracemalloc.get_traced_memory()[1], 8 * 1024 * 1024)


class SendBodyTests(AgentLoopbackCase):
    async def test_body_of_known_length_is_sent_with_its_length(self) -> None:
        server, port = self.serve(respond_with())
        body = PiecewiseBodyProducer(b"abc", b"def")
        work = Deferred.fromCoroutine(self.make_agent().request("PUT", f"http://127.0.0.1:{port}/", body=body))
        await wait_until(lambda: server.connections and server.connections[0].buffer == b"abcdef")
        self.assertIn(b"Content-Length: 6", server.heads[0])
        self.assertNoResult(work)
        server.connections[0].transport.write(OK)
        self.assertEqual(await (await work).read_all(9), b"hello")

    async def test_body_of_unknown_length_is_chunked(self) -> None:
        server, port = self.serve(respond_with())
        body = PiecewiseBodyProducer(b"abc", b"defg", length=UNKNOWN_LENGTH)
        work = Deferred.fromCoroutine(self.make_agent().request("PATCH", f"http://127.0.0.1:{port}/", body=body))
        await wait_until(lambda: server.connections and server.connections[0].buffer.endswith(b"0\r\n\r\n"))
        self.assertIn(b"Transfer-Encoding: chunked", server.heads[0])
        self.assertEqual(server.connections[0].buffer, b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
        server.connections[0].transport.write(OK)
        self.assertEqual(await (await work).read_all(9), b"hello")

    async def test_early_response_stops_the_body(self) -> None:
        _, port = self.serve(respond_with(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"))
        body = PiecewiseBodyProducer(b"x", length=1000)
        body.done = Deferred()
        body._produce = lambda: None  # type: ignore[method-assign]  # it produces nothing
        response = await self.make_agent().request("PUT", f"http://127.0.0.1:{port}/", body=body)
        self.assertEqual((response.status, await response.read_all(3)), (413, b"big"))
        self.assertTrue(body.stopped)

    async def test_body_of_another_length_is_an_error(self) -> None:
        for pieces in ([b"abc"], [b"abc", b"defg"]):
            _, port = self.serve(respond_with())
            work = self.make_agent().request(
                "PUT", f"http://127.0.0.1:{port}/", body=PiecewiseBodyProducer(*pieces, length=6)
            )
            await self.assert_fails(BadRequest, work, "length")

    async def test_error_of_the_body_is_raised(self) -> None:
        server, port = self.serve(respond_with())
        body = PiecewiseBodyProducer(b"abc", length=6)
        body._produce = lambda: None  # type: ignore[method-assign]
        work = Deferred.fromCoroutine(self.make_agent().request("PUT", f"http://127.0.0.1:{port}/", body=body))
        await wait_until(lambda: server.heads)
        body.done.errback(ZeroDivisionError("the client disconnected"))
        await self.assertFailure(work, ZeroDivisionError)

    async def test_stalled_upload_times_out(self) -> None:
        def respond(connection: Any, head: bytes) -> None:
            connection.transport.pauseProducing()

        _, port = self.serve(respond)
        body = PiecewiseBodyProducer(*[bytes(1024 * 1024)] * 64)
        work = Deferred.fromCoroutine(self.make_agent().request("PUT", f"http://127.0.0.1:{port}/", body=body))
        await wait_until(lambda: body.paused)
        previous = -1
        while previous != len(body.pieces) or not body.paused:  # until the kernel's buffers are full
            previous = len(body.pieces)
            for _ in range(20):
                await deferLater(reactor, 0)
        self.clock.advance(40)
        self.assertIn("could send nothing for 40 s", str(await self.assertFailure(work, UpstreamTimeout)))
        self.assertTrue(body.stopped)
        self.assertGreater(len(body.pieces), 32)  # because the producer was paused, and nothing buffered


class UpstreamTLSTests(AgentLoopbackCase):
    def overrides_for(self, port: int, name: str = "registry.example") -> dict[Host, tuple[str, int]]:
        return {Host(name, 443): ("127.0.0.1", port)}

    async def test_certificate_for_the_name_is_accepted(self) -> None:
        tls = ServerTLSCreator(AUTHORITY.issue("registry.example"))
        server, port = self.serve(respond_with(OK), tls)
        agent = self.make_trusting_agent(self.overrides_for(port))
        for _ in range(2):
            response = await agent.request("GET", "https://registry.example/v2/")
            self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual(tls.server_names, [b"registry.example"])
        self.assertIn(b"Host: registry.example\r\n", server.heads[0] + b"\r\n")
        self.assertEqual(server.accepted, 1)

    async def test_certificate_for_an_address_is_accepted(self) -> None:
        tls = ServerTLSCreator(AUTHORITY.issue("127.0.0.1"))
        _, port = self.serve(respond_with(OK), tls)
        response = await self.make_trusting_agent({}).request("GET", f"https://127.0.0.1:{port}/")
        self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual(tls.server_names, [None])

    async def assert_certificate_rejected(self, key_pair: tuple[bytes, bytes], *words: str, trust: bool = True) -> None:
        server, port = self.serve(respond_with(OK), ServerTLSCreator(key_pair))
        agent = (
            self.make_trusting_agent(self.overrides_for(port))
            if trust
            else self.make_agent(overrides=self.overrides_for(port))
        )
        await self.assert_fails(
            UpstreamUnreachable, agent.request("GET", "https://registry.example/"), "registry.example:443", *words
        )
        self.assertEqual(server.heads, [])

    async def test_certificate_for_another_name_is_rejected(self) -> None:
        await self.assert_certificate_rejected(AUTHORITY.issue("other.example"), "another name")

    async def test_certificate_for_the_address_of_a_name_is_rejected(self) -> None:
        await self.assert_certificate_rejected(AUTHORITY.issue("127.0.0.1"), "another name")

    async def test_expired_certificate_is_rejected(self) -> None:
        await self.assert_certificate_rejected(
            AUTHORITY.issue("registry.example", lifetime=-timedelta(days=1)), "expired"
        )

    async def test_unknown_ca_is_rejected(self) -> None:
        await self.assert_certificate_rejected(EphemeralCA().issue("registry.example"), "not trusted")
        await self.assert_certificate_rejected(
            AUTHORITY.issue("registry.example"), "not trusted", "UPSTREAM_CA_FILE", trust=False
        )

    async def test_self_signed_certificate_is_rejected(self) -> None:
        self_signed = EphemeralCA()
        key = self_signed.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        await self.assert_certificate_rejected((self_signed.pem, key), "self-signed")

    async def test_any_certificate_is_accepted_without_verification(self) -> None:
        tls = ServerTLSCreator(EphemeralCA().issue("other.example"))
        _, port = self.serve(respond_with(OK), tls)
        response = await self.make_agent(verify=False, overrides=self.overrides_for(port)).request(
            "GET", "https://registry.example/"
        )
        self.assertEqual(await response.read_all(9), b"hello")
        self.assertEqual(tls.server_names, [b"registry.example"])

    async def test_tls_1_1_is_refused(self) -> None:
        _, port = self.serve(
            respond_with(OK), ServerTLSCreator(AUTHORITY.issue("registry.example"), SSL.TLS1_1_VERSION)
        )
        work = self.make_trusting_agent(self.overrides_for(port)).request("GET", "https://registry.example/")
        await self.assert_fails(UpstreamUnreachable, work, "registry.example:443")

    async def test_server_without_tls_is_an_error(self) -> None:
        class MailServer(Protocol):
            def connectionMade(self) -> None:
                self.transport.write(b"220 this is mail, not HTTP\r\n")  # type: ignore[union-attr]

            def dataReceived(self, data: bytes) -> None:
                self.transport.loseConnection()  # type: ignore[union-attr]

        port = reactor.listenTCP(0, Factory.forProtocol(MailServer), interface="127.0.0.1")
        self.ports.append(port)
        work = self.make_trusting_agent(self.overrides_for(port.getHost().port)).request(
            "GET", "https://registry.example/"
        )
        await self.assert_fails(UpstreamUnreachable, work, "registry.example:443", "TLS handshake failed")

    async def test_silent_handshake_times_out(self) -> None:
        server, port = self.serve(respond_with())
        work = Deferred.fromCoroutine(
            self.make_trusting_agent(self.overrides_for(port)).request("GET", "https://registry.example/")
        )
        await wait_until(lambda: server.bytes_received)
        self.clock.advance(20)
        self.assertIn("registry.example:443: timed out", str(await self.assertFailure(work, UpstreamTimeout)))
        await wait_until(lambda: server.closed)

    async def test_missing_close_notify_is_an_unconfirmed_end(self) -> None:
        """A reader of JSON takes it for the end, as clients do; one of a blob lets the digest decide."""

        def respond(connection: Any, head: bytes) -> None:
            connection.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nsome")

        server, port = self.serve(respond, ServerTLSCreator(AUTHORITY.issue("registry.example")))
        agent = self.make_trusting_agent(self.overrides_for(port))
        for digest in (None, Digest.of(b"some"), Digest.of(b"other")):
            response = await agent.request("GET", "https://registry.example/")
            server.connections[-1].transport.transport.loseConnection()  # close TCP without close_notify
            if digest is not None and digest != Digest.of(b"some"):
                await self.assert_fails(EndUnconfirmed, response.read_all(100, digest), "connection broke")
            else:
                self.assertEqual(await response.read_all(100, digest), b"some")

    async def test_large_bodies_are_sent_and_received_over_tls(self) -> None:
        size = 8 * 1024 * 1024

        def respond(connection: Any, head: bytes) -> None:
            def count(data: bytes) -> None:
                sizes.append(len(data))
                if sum(sizes) == size:
                    connection.transport.write(
                        b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
                    )

            connection.dataReceived = count
            rest, connection.buffer = connection.buffer, b""
            if rest:
                count(rest)

        sizes: list[int] = []
        _, port = self.serve(respond, ServerTLSCreator(AUTHORITY.issue("registry.example")))
        body = PiecewiseBodyProducer(*[bytes(1024 * 1024)] * 8)
        response = await self.make_trusting_agent(self.overrides_for(port)).request(
            "PUT", "https://registry.example/", body=body
        )
        self.assertEqual(response.status, 201)
        self.assertEqual(len(await response.read_all(size)), size)


class CAFileTests(TestCase):
    def test_ca_file_errors_name_the_setting(self) -> None:
        path = self.mktemp()
        error = self.assertRaises(ValueError, ClientContext, ca_file=path)
        self.assertIn("UPSTREAM_CA_FILE", str(error))
        self.assertIn("No such file", str(error))
        Path(path).write_text("no certificate")
        error = self.assertRaises(ValueError, ClientContext, ca_file=path)
        self.assertIn("PEM", str(error))
