"""TLSTransport on real sockets: failing and slow handshakes, and the upgrade of a connection after CONNECT."""

from __future__ import annotations

import contextlib  # not `from contextlib import suppress`: Trial interprets a module attribute of that name
import random
import socket
import ssl
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

from OpenSSL import SSL
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.http import tls
from dockerproxy.http.tls import TLSTransport, describe_handshake_error, upgrade_to_tls
from dockerproxy.http.transport import SocketTransport
from tests.http.support.loopback import (
    MIB,
    OVER_KERNEL_BUFFERS,
    RECORD_SIZE,
    SERVER_CONTEXT,
    TIMEOUT,
    MemoryBIOClient,
    RecordingProtocol,
    SocketTestCase,
    ZerosProducer,
    client_context,
    client_hello,
    dial,
    reactor,
    read_all,
    read_exactly,
)


def data_segments(sock: socket.socket) -> int:
    """Return how many segments with data have arrived: `tcpi_data_segs_in` of linux/tcp.h."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[152:156], sys.byteorder)


class HandshakeTests(SocketTestCase):
    def serve(self, protocol: RecordingProtocol | None = None) -> tuple[int, RecordingProtocol, list[TLSTransport]]:
        recorder = protocol or RecordingProtocol()
        transports: list[TLSTransport] = []

        def on_connection(tcp: Any) -> None:
            transports.append(TLSTransport.server(reactor, tcp, SERVER_CONTEXT))
            transports[0].take_over(recorder)

        return self.listen(on_connection), recorder, transports

    async def handshake_error(self, client: Callable[[int], object]) -> str:
        """Return the description of the error if `client` fails in the handshake."""
        port, recorder, _ = self.serve()
        await self.in_thread(client, port)
        reason = await recorder.connection_lost
        self.assertIsInstance(reason, SSL.Error)
        assert isinstance(reason, SSL.Error)
        self.assertEqual(recorder.size, 0)
        return describe_handshake_error(reason)

    async def test_error_of_a_client_that_does_not_trust_the_ca(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):

            def client(port: int, version: ssl.TLSVersion = version) -> None:
                context = ssl.create_default_context(cadata=None)
                context.maximum_version = version
                with dial(port) as sock, self.assertRaises(ssl.SSLCertVerificationError):
                    context.wrap_socket(sock, server_hostname="a.test")

            self.assertEqual(
                await self.handshake_error(client),
                "the client does not trust this proxy's CA; install the certificate from /ca.crt on it",
            )

    async def test_plain_http_gets_a_response(self) -> None:
        """The client gets an unencrypted response with the text that Go's net/http sends."""
        for method, expected in (("GET", "http request"), ("PUT", "http request"), ("CONNECT", "https proxy request")):
            responses: list[bytes] = []

            def client(port: int, method: str = method, responses: list[bytes] = responses) -> None:
                with dial(port) as sock:
                    sock.sendall(f"{method} /a HTTP/1.1\r\nHost: a.test\r\nX: {'x' * 2000}\r\n\r\n".encode())
                    responses.append(read_all(sock))

            self.assertEqual(await self.handshake_error(client), expected)
            head, _, body = responses[0].partition(b"\r\n\r\n")
            self.assertTrue(head.startswith(b"HTTP/1.0 400 Bad Request\r\n"), head)
            self.assertEqual(body, b"Client sent an HTTP request to an HTTPS server.\n")

    async def test_garbage_fails_the_handshake(self) -> None:
        def client(port: int) -> None:
            with dial(port) as sock:
                sock.sendall(bytes(range(256)))
                try:
                    read_all(sock)
                except ConnectionResetError:
                    pass

        self.assertTrue(await self.handshake_error(client))

    async def test_old_tls_versions_are_refused(self) -> None:
        def client(port: int) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():  # these versions are deprecated
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            with dial(port) as sock, self.assertRaises(OSError):
                context.wrap_socket(sock, server_hostname="a.test")

        self.assertRegex(await self.handshake_error(client), "protocol")

    async def test_error_of_a_client_that_closes_during_the_handshake(self) -> None:
        def after_client_hello(port: int) -> None:
            with dial(port) as sock:
                sock.sendall(client_hello()[:100])

        def before_client_hello(port: int) -> None:
            dial(port).close()

        for client in (after_client_hello, before_client_hello):
            self.assertEqual(await self.handshake_error(client), "the client closed the connection")

    async def test_handshake_byte_by_byte(self) -> None:
        port, recorder, _ = self.serve()

        def client() -> None:
            with dial(port) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = MemoryBIOClient()
                session.do_handshake(sock, one_by_one=True)
                sock.sendall(session.encrypt(b"hello"))

        await self.in_thread(client)
        await recorder.connection_lost
        self.assertEqual(recorder.received, b"hello")

    async def test_handshake_end_and_first_response_share_a_segment(self) -> None:
        class EchoProtocol(RecordingProtocol):
            def dataReceived(self, data: bytes) -> None:
                self.transport.write(data)

        port, recorder, _ = self.serve(EchoProtocol())

        def client() -> int:
            session = MemoryBIOClient()
            with dial(port) as sock:
                sock.sendall(session.next_flight() or b"")
                session.incoming.write(sock.recv(MIB))
                before = data_segments(sock)
                sock.sendall((session.next_flight() or b"") + session.encrypt(b"hello"))
                self.assertEqual(session.read(sock, 5), b"hello")
                return data_segments(sock) - before

        self.assertEqual(await self.in_thread(client), 1)
        await recorder.connection_lost

    async def test_reads_per_iteration_are_bounded(self) -> None:
        @implementer(IHandshakeListener)
        class PausedAfterHandshake(RecordingProtocol):
            def handshakeCompleted(self) -> None:
                self.transport.pauseProducing()
                reactor.callLater(0, read_once)

        port, recorder, transports = self.serve(PausedAfterHandshake())

        def client() -> None:
            session = MemoryBIOClient()
            with dial(port) as sock:
                session.do_handshake(sock, one_by_one=True)
                while sock.recv(MIB):
                    pass

        def read_once() -> None:
            self.patch(tls, "_read_record", lambda connection, offset: RECORD_SIZE)
            self.assertIsNone(transports[0].doRead())
            sizes.append(len(recorder.received))
            recorder.transport.abortConnection()

        sizes: list[int] = []
        with contextlib.suppress(ConnectionError):
            await self.in_thread(client)
        await recorder.connection_lost
        self.assertEqual(sizes, [512 * 1024])

    async def test_writes_before_the_handshake_are_buffered(self) -> None:
        @implementer(IHandshakeListener)
        class WritesOnConnect(RecordingProtocol):
            events: ClassVar[list[str]] = []

            def connectionMade(self) -> None:
                super().connectionMade()
                self.transport.write(b"hel")
                self.transport.write(b"lo")
                self.events.append("connected")

            def handshakeCompleted(self) -> None:
                self.events.append("handshake completed")

            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.events.append("data")
                self.transport.loseConnection()

        port, recorder, _ = self.serve(WritesOnConnect())

        def client() -> bytes:
            with client_context().wrap_socket(dial(port), server_hostname="a.test") as sock:
                sock.sendall(b"x")
                return read_all(sock)

        self.assertEqual(await self.in_thread(client), b"hello")
        await recorder.connection_lost
        self.assertEqual(WritesOnConnect.events, ["connected", "handshake completed", "data"])

    async def test_close_during_the_handshake_does_not_wait(self) -> None:
        """The connection closes even if data is pending, because the client may never complete the handshake."""
        for data in (b"", b"not sent"):
            port, recorder, transports = self.serve()
            sock = dial(port)
            await recorder.connection_made
            transports[0].write(data)
            transports[0].loseConnection()
            await recorder.connection_lost
            sock.close()

    async def test_no_wakeups_while_the_handshake_waits(self) -> None:
        port, recorder, transports = self.serve()
        sock = dial(port)
        sock.sendall(client_hello()[:100])
        await recorder.connection_made
        await self.run_reactor()
        wakeups = 0
        (transport,) = transports
        for name in ("doRead", "doWrite"):
            original = getattr(type(transport), name)

            def count(transport: TLSTransport, original: Callable[[TLSTransport], Any] = original) -> Any:
                nonlocal wakeups
                wakeups += 1
                return original(transport)

            self.patch(type(transport), name, count)
        await deferLater(reactor, 0.05)
        self.assertEqual(wakeups, 0)
        sock.close()
        await recorder.connection_lost


class UpgradeToTLSTests(SocketTestCase):
    """An upgrade as after CONNECT: plaintext, the response, then TLS."""

    CONNECT_REQUEST, CONNECT_RESPONSE = b"CONNECT\r\n", b"200 OK\r\n"

    def serve(self, protocol: Protocol, plaintext: bytes = b"") -> tuple[int, list[SocketTransport]]:
        transports: list[SocketTransport] = []
        case = self

        class ConnectProtocol(Protocol):
            def dataReceived(self, data: bytes) -> None:
                transport: Any = self.transport
                assert data.startswith(case.CONNECT_REQUEST)
                transport.write(plaintext)
                transport.write(case.CONNECT_RESPONSE)
                upgrade_to_tls(transport, SERVER_CONTEXT, protocol, data.removeprefix(case.CONNECT_REQUEST))

            def connectionLost(self, reason: Failure = connectionDone) -> None:
                raise AssertionError("connectionLost called on a detached protocol")

        def on_connection(tcp: Any) -> None:
            transports.append(SocketTransport(reactor, tcp))
            transports[0].take_over(ConnectProtocol())

        return self.listen(on_connection), transports

    async def exchange(self, version: ssl.TLSVersion, *, early: bool) -> tuple[bytes, RecordingProtocol]:
        class RespondingProtocol(RecordingProtocol):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                if self.received.endswith(b"!"):
                    self.transport.write(bytes(5 * MIB))
                    self.transport.loseConnection()

        recorder = RespondingProtocol()
        port, _ = self.serve(recorder)

        def client() -> bytes:
            session = MemoryBIOClient(version)
            with dial(port) as sock:
                sock.sendall(self.CONNECT_REQUEST + (session.next_flight() or b"" if early else b""))
                assert read_exactly(sock, len(self.CONNECT_RESPONSE)) == self.CONNECT_RESPONSE
                if early:
                    session.incoming.write(sock.recv(MIB))
                session.do_handshake(sock)
                sock.sendall(session.encrypt(b"hello "))
                sock.sendall(session.encrypt(b"world!"))
                data = session.read(sock)
                sock.sendall(session.encrypt(b""))
                return data

        data = await self.in_thread(client)
        await recorder.connection_lost
        return data, recorder

    async def test_upgrade_with_client_hello_after_the_response(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            data, recorder = await self.exchange(version, early=False)
            self.assertEqual(data, bytes(5 * MIB))
            self.assertEqual(recorder.received, b"hello world!")
            self.assertIsInstance(recorder.transport, TLSTransport)

    async def test_upgrade_with_client_hello_before_the_response(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            data, recorder = await self.exchange(version, early=True)
            self.assertEqual(data, bytes(5 * MIB))
            self.assertEqual(recorder.received, b"hello world!")
            self.assertIsInstance(recorder.transport, TLSTransport)

    async def test_pending_plaintext_is_sent_first(self) -> None:
        """Pending plaintext is sent before the handshake; input that arrives meanwhile does not wake the reactor."""
        recorder = RecordingProtocol()
        port, transports = self.serve(recorder, plaintext=bytes(OVER_KERNEL_BUFFERS))
        sock = dial(port)
        session = MemoryBIOClient()
        await self.in_thread(sock.sendall, self.CONNECT_REQUEST)
        await recorder.connection_made
        await self.in_thread(sock.sendall, session.next_flight())
        wakeups = 0
        original = TLSTransport.doRead

        def count(transport: TLSTransport) -> Any:
            nonlocal wakeups
            wakeups += 1
            return original(transport)

        self.patch(TLSTransport, "doRead", count)
        await deferLater(reactor, 0.05)
        self.assertEqual(wakeups, 0)

        def client() -> None:
            with sock:
                plaintext = read_exactly(sock, OVER_KERNEL_BUFFERS + len(self.CONNECT_RESPONSE))
                assert plaintext == bytes(OVER_KERNEL_BUFFERS) + self.CONNECT_RESPONSE
                session.incoming.write(sock.recv(MIB))
                session.do_handshake(sock)
                sock.sendall(session.encrypt(b"hello"))

        await self.in_thread(client)
        await recorder.connection_lost
        self.assertEqual(recorder.received, b"hello")
        del transports

    async def test_back_pressure_after_an_early_client_hello(self) -> None:
        recorder = RecordingProtocol(keep=False)
        port, _ = self.serve(recorder)
        reading = threading.Event()

        def client() -> int:
            session = MemoryBIOClient()
            with dial(port) as sock:
                sock.sendall(self.CONNECT_REQUEST + (session.next_flight() or b""))
                read_exactly(sock, len(self.CONNECT_RESPONSE))
                session.incoming.write(sock.recv(MIB))
                session.do_handshake(sock)
                sock.sendall(session.encrypt(b"go"))
                reading.wait(TIMEOUT)
                return len(session.read(sock))

        running = self.in_thread(client)
        await recorder.wait_for(2)
        source = ZerosProducer(recorder.transport, OVER_KERNEL_BUFFERS)
        source.start()
        await source.paused
        self.assertGreater(source._remaining, 0)
        reading.set()
        await source.done
        recorder.transport.unregisterProducer()
        recorder.transport.loseConnection()
        self.assertEqual(await running, OVER_KERNEL_BUFFERS)
        await recorder.connection_lost
        self.assertGreater(recorder.transport.sent, OVER_KERNEL_BUFFERS)

    async def test_handshake_failure_after_an_upgrade(self) -> None:
        for early in (b"", b"GET / HTTP/1.1\r\n\r\n"):
            recorder = RecordingProtocol()
            port, _ = self.serve(recorder)

            def client(port: int = port, early: bytes = early) -> bytes:
                with dial(port) as sock:
                    sock.sendall(self.CONNECT_REQUEST + early)
                    read_exactly(sock, len(self.CONNECT_RESPONSE))
                    if not early:
                        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return read_all(sock)

            response = await self.in_thread(client)
            self.assertIn(b"Client sent an HTTP request to an HTTPS server.", response)
            reason = await recorder.connection_lost
            assert isinstance(reason, SSL.Error)
            self.assertEqual(describe_handshake_error(reason), "http request")


class PublicFunctionsMixin(SocketTestCase):
    """A pyOpenSSL without the private names that `make_record_reader` uses."""

    def setUp(self) -> None:
        with patch.dict(sys.modules, {"OpenSSL._util": None}):
            buffer, read_record = tls.make_record_reader()
        self.assertIsInstance(buffer.obj, bytearray)
        self.patch(tls, "_read_buffer", buffer)
        self.patch(tls, "_read_record", read_record)


class HandshakeWithPublicFunctionsTests(PublicFunctionsMixin, HandshakeTests): ...


class UpgradeToTLSWithPublicFunctionsTests(PublicFunctionsMixin, UpgradeToTLSTests):
    async def test_content_is_received_unchanged(self) -> None:
        recorder = RecordingProtocol()
        port, _ = self.serve(recorder)
        content = random.Random(3).randbytes(3 * MIB)

        def client() -> None:
            with dial(port) as sock:
                sock.sendall(self.CONNECT_REQUEST)
                read_exactly(sock, len(self.CONNECT_RESPONSE))
                with client_context().wrap_socket(sock, server_hostname="a.test") as secure:
                    secure.sendall(content)
                    with contextlib.suppress(ssl.SSLEOFError):  # the server does not respond with a close_notify
                        secure.unwrap()

        await self.in_thread(client)
        self.assertEqual(type(await recorder.connection_lost), ConnectionDone)
        self.assertEqual(recorder.received, content)


class OverestimatingTransport(TLSTransport):
    """A transport that overestimates the free space in the kernel."""

    __slots__ = ()

    def _send_space(self) -> int:
        return MIB


class MultiRecordWriteTests(SocketTestCase):
    async def test_partial_writes_are_retried(self) -> None:
        """If the kernel accepts less than it reported, the content still arrives unchanged."""
        content = random.Random(2).randbytes(OVER_KERNEL_BUFFERS)
        transports: list[TLSTransport] = []
        recorder = RecordingProtocol()

        def on_connection(tcp: Any) -> None:
            transports.append(OverestimatingTransport.server(reactor, tcp, SERVER_CONTEXT))
            transports[0].take_over(recorder)

        port = self.listen(on_connection)
        reading, running = self.start_late_reader(
            lambda: client_context().wrap_socket(dial(port), server_hostname="a.test")
        )
        await recorder.wait_for(2)
        (transport,) = transports
        written, pause_count = 0, 0
        while written < len(content):
            written += transport.write_some(content[written : written + MIB])
            # With TCP_CORK set, the kernel would hold back the last partial segment.
            self.assertFalse(transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))
            while transport._pending:
                pause_count += 1
                reading.set()
                await deferLater(reactor, 0)
        transport.loseConnection()
        self.assertEqual(await running, content)
        self.assertGreater(pause_count, 0)
        await recorder.connection_lost

    async def test_large_writes_are_corked(self) -> None:
        transports: list[TLSTransport] = []
        recorder = RecordingProtocol()

        def on_connection(tcp: Any) -> None:
            transports.append(TLSTransport.server(reactor, tcp, SERVER_CONTEXT))
            transports[0].take_over(recorder)

        port = self.listen(on_connection)
        reading, running = self.start_late_reader(
            lambda: client_context().wrap_socket(dial(port), server_hostname="a.test")
        )
        await recorder.wait_for(2)
        (transport,) = transports
        tls, corked = transport._tls, list[int]()
        send = tls.send

        def recording_send(data: memoryview) -> int:
            corked.append(transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))
            return send(data)

        self.patch(tls, "send", recording_send)
        transport.write(bytes(1000))
        self.assertEqual(corked, [0])
        corked.clear()
        written = transport.write_some(bytes(MIB))
        self.assertEqual(set(corked), {1})
        transport.loseConnection()
        reading.set()
        self.assertEqual(len(await running), 1000 + written)
        await recorder.connection_lost
