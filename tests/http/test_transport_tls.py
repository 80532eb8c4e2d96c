"""TLS on real sockets: handshakes that fail or take their time, and what CONNECT makes of a connection."""

from __future__ import annotations

import contextlib  # `suppress` itself means something to Trial in a module of tests
import random
import socket
import ssl
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

from OpenSSL import SSL
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.http import tls
from dockerproxy.http.tls import TLSTransport, explain_handshake, upgrade
from dockerproxy.http.transport import SocketTransport
from tests.http.kit.loopback import (
    KERNEL,
    MIB,
    PATIENCE,
    SERVER,
    MemoryTLS,
    Recorder,
    SocketCase,
    Source,
    client_context,
    dial,
    hello,
    reactor,
    read,
    read_all,
)


def data_segments(sock: socket.socket) -> int:
    """Return how many segments with data have arrived: `tcpi_data_segs_in` of linux/tcp.h."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[152:156], sys.byteorder)


class Handshakes(SocketCase):
    def serve(self, protocol: Recorder | None = None) -> tuple[int, Recorder, list[TLSTransport]]:
        recorder = protocol or Recorder()
        transports: list[TLSTransport] = []

        def take(tcp: Any) -> None:
            transports.append(TLSTransport.server(reactor, tcp, SERVER))
            transports[0].start(recorder)

        return self.listen(take), recorder, transports

    async def why(self, client: Callable[[int], object]) -> str:
        """Return how the failed handshake of `client` is explained."""
        port, recorder, _ = self.serve()
        await self.in_thread(client, port)
        reason = await recorder.lost
        self.assertIsInstance(reason, SSL.Error)
        assert isinstance(reason, SSL.Error)
        self.assertEqual(recorder.size, 0)
        return explain_handshake(reason)

    async def test_the_client_does_not_trust_us(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):

            def client(port: int, version: ssl.TLSVersion = version) -> None:
                context = ssl.create_default_context(cadata=None)
                context.maximum_version = version
                with dial(port) as sock, self.assertRaises(ssl.SSLCertVerificationError):
                    context.wrap_socket(sock, server_hostname="a.test")

            self.assertEqual(await self.why(client), "the client does not trust our CA (/ca.crt)")

    async def test_plain_http(self) -> None:
        """Told in the clear that this is the wrong port, as by servers in Go."""
        for method, why in (("GET", "http request"), ("PUT", "http request"), ("CONNECT", "https proxy request")):
            heard: list[bytes] = []

            def client(port: int, method: str = method, heard: list[bytes] = heard) -> None:
                with dial(port) as sock:
                    sock.sendall(f"{method} /a HTTP/1.1\r\nHost: a.test\r\nX: {'x' * 2000}\r\n\r\n".encode())
                    heard.append(read_all(sock))

            self.assertEqual(await self.why(client), why)
            head, _, body = heard[0].partition(b"\r\n\r\n")
            self.assertTrue(head.startswith(b"HTTP/1.0 400 Bad Request\r\n"), head)
            self.assertEqual(body, b"Client sent an HTTP request to an HTTPS server.\n")

    async def test_rubbish(self) -> None:
        def client(port: int) -> None:
            with dial(port) as sock:
                sock.sendall(bytes(range(256)))
                try:
                    read_all(sock)
                except ConnectionResetError:
                    pass

        self.assertTrue(await self.why(client))

    async def test_an_old_version(self) -> None:
        def client(port: int) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():  # they are deprecated indeed
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            with dial(port) as sock, self.assertRaises(OSError):
                context.wrap_socket(sock, server_hostname="a.test")

        self.assertRegex(await self.why(client), "protocol")

    async def test_the_client_hangs_up(self) -> None:
        def begun(port: int) -> None:
            with dial(port) as sock:
                sock.sendall(hello()[:100])

        def not_begun(port: int) -> None:
            dial(port).close()

        for client in (begun, not_begun):
            self.assertEqual(await self.why(client), "the client hung up")

    async def test_drop_by_drop(self) -> None:
        port, recorder, _ = self.serve()

        def client() -> None:
            with dial(port) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = MemoryTLS()
                session.shake_hands(sock, one_by_one=True)
                sock.sendall(session.encrypt(b"hello"))

        await self.in_thread(client)
        await recorder.lost
        self.assertEqual(recorder.received, b"hello")

    async def test_the_end_of_the_handshake_and_the_first_answer_go_out_together(self) -> None:
        class Echo(Recorder):
            def dataReceived(self, data: bytes) -> None:
                self.transport.write(data)

        port, recorder, _ = self.serve(Echo())

        def client() -> int:
            session = MemoryTLS()
            with dial(port) as sock:
                sock.sendall(session.next_flight() or b"")
                session.incoming.write(sock.recv(MIB))
                before = data_segments(sock)
                sock.sendall((session.next_flight() or b"") + session.encrypt(b"hello"))
                self.assertEqual(session.read(sock, 5), b"hello")
                return data_segments(sock) - before

        self.assertEqual(await self.in_thread(client), 1)
        await recorder.lost

    async def test_a_client_that_never_stops_lets_others_have_their_turn(self) -> None:
        @implementer(IHandshakeListener)
        class Shaken(Recorder):
            def handshakeCompleted(self) -> None:
                self.transport.pauseProducing()
                reactor.callLater(0, turn)

        port, recorder, transports = self.serve(Shaken())

        def client() -> None:
            session = MemoryTLS()
            with dial(port) as sock:
                session.shake_hands(sock, one_by_one=True)
                while sock.recv(MIB):
                    pass

        def turn() -> None:
            self.patch(tls, "lib", SimpleNamespace(SSL_read=lambda connection, place, size: size))
            self.assertIsNone(transports[0].doRead())
            sizes.append(len(recorder.received))
            recorder.transport.abortConnection()

        sizes: list[int] = []
        with contextlib.suppress(ConnectionError):
            await self.in_thread(client)
        await recorder.lost
        self.assertEqual(sizes, [512 * 1024])

    async def test_what_is_written_before_waits(self) -> None:
        @implementer(IHandshakeListener)
        class Eager(Recorder):
            events: ClassVar[list[str]] = []

            def connectionMade(self) -> None:
                super().connectionMade()
                self.transport.write(b"hel")
                self.transport.write(b"lo")
                self.events.append("made")

            def handshakeCompleted(self) -> None:
                self.events.append("shaken")

            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.events.append("data")
                self.transport.loseConnection()

        port, recorder, _ = self.serve(Eager())

        def client() -> bytes:
            with client_context().wrap_socket(dial(port), server_hostname="a.test") as sock:
                sock.sendall(b"x")
                return read_all(sock)

        self.assertEqual(await self.in_thread(client), b"hello")
        await recorder.lost
        self.assertEqual(Eager.events, ["made", "shaken", "data"])

    async def test_close_before_the_end(self) -> None:
        """The client may never go on with it: there is nothing to wait for, whatever was written."""
        for written in (b"", b"for nobody"):
            port, recorder, transports = self.serve()
            sock = dial(port)
            await recorder.made
            transports[0].write(written)
            transports[0].loseConnection()
            await recorder.lost
            sock.close()

    async def test_a_client_that_waits_costs_nothing(self) -> None:
        """The reactor is not woken again and again while a handshake waits for the client."""
        port, recorder, transports = self.serve()
        sock = dial(port)
        sock.sendall(hello()[:100])
        await recorder.made
        await self.turn()
        wakes = 0
        (transport,) = transports
        for name in ("doRead", "doWrite"):
            called = getattr(type(transport), name)

            def count(transport: TLSTransport, called: Callable[[TLSTransport], Any] = called) -> Any:
                nonlocal wakes
                wakes += 1
                return called(transport)

            self.patch(type(transport), name, count)
        await deferLater(reactor, 0.05)
        self.assertEqual(wakes, 0)
        sock.close()
        await recorder.lost


class Upgrades(SocketCase):
    """As CONNECT does: some bytes in the clear, our answer, then TLS."""

    ASK, ANSWER = b"CONNECT\r\n", b"200 OK\r\n"

    def serve(self, protocol: Protocol, before: bytes = b"") -> tuple[int, list[SocketTransport]]:
        transports: list[SocketTransport] = []
        case = self

        class Front(Protocol):
            def dataReceived(self, data: bytes) -> None:
                transport: Any = self.transport
                assert data.startswith(case.ASK)
                transport.write(before)
                transport.write(case.ANSWER)
                upgrade(transport, SERVER, protocol, data.removeprefix(case.ASK))

            def connectionLost(self, reason: Failure = connectionDone) -> None:
                raise AssertionError("the connection is not this protocol's any more")

        def take(tcp: Any) -> None:
            transports.append(SocketTransport(reactor, tcp))
            transports[0].start(Front())

        return self.listen(take), transports

    async def exchange(self, version: ssl.TLSVersion, *, early: bool) -> tuple[bytes, Recorder]:
        class Answering(Recorder):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                if self.received.endswith(b"!"):
                    self.transport.write(bytes(5 * MIB))
                    self.transport.loseConnection()

        recorder = Answering()
        port, _ = self.serve(recorder)

        def client() -> bytes:
            session = MemoryTLS(version)
            with dial(port) as sock:
                sock.sendall(self.ASK + (session.next_flight() or b"" if early else b""))
                assert read(sock, len(self.ANSWER)) == self.ANSWER
                if early:
                    session.incoming.write(sock.recv(MIB))
                session.shake_hands(sock)
                sock.sendall(session.encrypt(b"hello "))
                sock.sendall(session.encrypt(b"world!"))
                data = session.read(sock)
                sock.sendall(session.encrypt(b""))
                return data

        data = await self.in_thread(client)
        await recorder.lost
        return data, recorder

    async def test_after_the_answer(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            data, recorder = await self.exchange(version, early=False)
            self.assertEqual(data, bytes(5 * MIB))
            self.assertEqual(recorder.received, b"hello world!")
            self.assertIsInstance(recorder.transport, TLSTransport)

    async def test_a_client_that_did_not_wait(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            data, recorder = await self.exchange(version, early=True)
            self.assertEqual(data, bytes(5 * MIB))
            self.assertEqual(recorder.received, b"hello world!")

    async def test_the_client_takes_the_answer_late(self) -> None:
        """What is still to be sent in the clear goes first, and its client wakes nobody while it waits for that."""
        recorder = Recorder()
        port, transports = self.serve(recorder, before=bytes(KERNEL))
        sock = dial(port)
        session = MemoryTLS()
        await self.in_thread(sock.sendall, self.ASK)
        await recorder.made
        await self.in_thread(sock.sendall, session.next_flight())
        wakes = 0
        read_before = TLSTransport.doRead

        def count(transport: TLSTransport) -> Any:
            nonlocal wakes
            wakes += 1
            return read_before(transport)

        self.patch(TLSTransport, "doRead", count)
        await deferLater(reactor, 0.05)
        self.assertEqual(wakes, 0)

        def client() -> None:
            with sock:
                clear = read(sock, KERNEL + len(self.ANSWER))
                assert clear == bytes(KERNEL) + self.ANSWER
                session.incoming.write(sock.recv(MIB))
                session.shake_hands(sock)
                sock.sendall(session.encrypt(b"hello"))

        await self.in_thread(client)
        await recorder.lost
        self.assertEqual(recorder.received, b"hello")
        del transports

    async def test_back_pressure_for_a_client_that_did_not_wait(self) -> None:
        recorder = Recorder(keep=False)
        port, transports = self.serve(recorder)
        reading = threading.Event()

        def client() -> int:
            session = MemoryTLS()
            with dial(port) as sock:
                sock.sendall(self.ASK + (session.next_flight() or b""))
                read(sock, len(self.ANSWER))
                session.incoming.write(sock.recv(MIB))
                session.shake_hands(sock)
                sock.sendall(session.encrypt(b"go"))
                reading.wait(PATIENCE)
                return len(session.read(sock))

        running = self.in_thread(client)
        await recorder.until(2)
        source = Source(recorder.transport, KERNEL)
        source.begin()
        await source.paused
        self.assertGreater(source._left, 0)
        reading.set()
        await source.done
        recorder.transport.unregisterProducer()
        recorder.transport.loseConnection()
        self.assertEqual(await running, KERNEL)
        await recorder.lost
        self.assertGreater(transports[0].sent, KERNEL)

    async def test_a_handshake_that_fails(self) -> None:
        for early in (b"", b"GET / HTTP/1.1\r\n\r\n"):
            recorder = Recorder()
            port, _ = self.serve(recorder)

            def client(port: int = port, early: bytes = early) -> bytes:
                with dial(port) as sock:
                    sock.sendall(self.ASK + early)
                    read(sock, len(self.ANSWER))
                    if not early:
                        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                        return read_all(sock)
                    try:
                        read_all(sock)
                    except OSError:
                        pass
                    return b""

            heard = await self.in_thread(client)
            if not early:
                self.assertIn(b"Client sent an HTTP request to an HTTPS server.", heard)
            reason = await recorder.lost
            assert isinstance(reason, SSL.Error)
            self.assertEqual(explain_handshake(reason), "http request")


class Roomy(TLSTransport):
    """Believes that the kernel has more room than it has."""

    __slots__ = ()

    def _room(self) -> int:
        return MIB


class SeveralRecords(SocketCase):
    async def test_what_the_kernel_does_not_take_of_them_is_offered_again(self) -> None:
        """As where the kernel has less room than it seemed to have: content stays what it is."""
        content = random.Random(2).randbytes(KERNEL)
        transports: list[TLSTransport] = []
        recorder = Recorder()

        def take(tcp: Any) -> None:
            transports.append(Roomy.server(reactor, tcp, SERVER))
            transports[0].start(recorder)

        port = self.listen(take)
        reading, running = self.late_reader(lambda: client_context().wrap_socket(dial(port), server_hostname="a.test"))
        await recorder.until(2)
        (transport,) = transports
        offered, pauses = 0, 0
        while offered < len(content):
            offered += transport.offer(content[offered : offered + MIB])
            # Else the end of what was taken would wait for more.
            self.assertFalse(transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))
            while transport._pending:
                pauses += 1
                reading.set()
                await deferLater(reactor, 0)
        transport.loseConnection()
        self.assertEqual(await running, content)
        self.assertGreater(pauses, 0)
        await recorder.lost

    async def test_much_goes_in_full_segments_and_little_at_once(self) -> None:
        transports: list[TLSTransport] = []
        recorder = Recorder()

        def take(tcp: Any) -> None:
            transports.append(TLSTransport.server(reactor, tcp, SERVER))
            transports[0].start(recorder)

        port = self.listen(take)
        reading, running = self.late_reader(lambda: client_context().wrap_socket(dial(port), server_hostname="a.test"))
        await recorder.until(2)
        (transport,) = transports
        tls, corked = transport._tls, list[int]()
        send = tls.send

        def watched(data: memoryview) -> int:
            corked.append(transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))
            return send(data)

        self.patch(tls, "send", watched)
        transport.write(bytes(1000))
        self.assertEqual(corked, [0])
        corked.clear()
        taken = transport.offer(bytes(MIB))
        self.assertEqual(set(corked), {1})
        transport.loseConnection()
        reading.set()
        self.assertEqual(len(await running), 1000 + taken)
        await recorder.lost
