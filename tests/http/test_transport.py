"""Both transports on real sockets: bytes, back-pressure, ends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import ssl
import struct
import sys
import tempfile
import threading
from typing import Any, ClassVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

import dockerproxy.http.transport as transport_module
from dockerproxy.http.tls import TLSTransport
from dockerproxy.http.transport import SocketTransport
from tests.http.kit.loopback import (
    KERNEL,
    MIB,
    MUCH,
    PATIENCE,
    PIECE,
    SERVER,
    Recorder,
    SocketCase,
    Source,
    client_context,
    dial,
    reactor,
    read,
    read_all,
)


class Pausing:
    """A producer that knows whether it is to wait."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None: ...


def unsent(transport: Any) -> int:
    """Return how many bytes wait in the kernel to be sent."""
    found = fcntl.ioctl(transport.fileno(), 0x894B, bytes(4))  # SIOCOUTQNSD of linux/sockios.h
    return int.from_bytes(found, sys.byteorder)


class AnyTransport:
    """What holds for both kinds. A mixin, so that it is not collected by itself."""

    tls: ClassVar[ssl.TLSVersion | None] = None

    def serve(self: Any, protocol: Protocol | None = None) -> tuple[int, Recorder, list[Any]]:
        """Listen; return the port, the protocol of the one connection, and a list that its transport will be in."""
        recorder: Any = protocol or Recorder()
        transports: list[Any] = []

        def take(tcp: Any) -> None:
            if self.tls is None:
                transport = SocketTransport(reactor, tcp)
            else:
                transport = TLSTransport.server(reactor, tcp, SERVER)
            transports.append(transport)
            transport.start(recorder)

        return self.listen(take), recorder, transports

    def connect(self, port: int, receives: int | None = None) -> socket.socket:
        sock = dial(port, receives)
        if self.tls is not None:
            # Without a close_notify the end is no end that was meant.
            sock = client_context(self.tls).wrap_socket(sock, server_hostname="a.test", suppress_ragged_eofs=False)
        return sock

    async def test_much_each_way_with_a_slow_reader(self: Any) -> None:
        port, recorder, transports = self.serve(Recorder(keep=False))
        reading = threading.Event()

        def client() -> tuple[int, str]:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(PATIENCE)
                sender = threading.Thread(target=sock.sendall, args=(b"y" * MUCH,)) if self.tls is None else None
                size, digest, sent = 0, hashlib.sha256(), 0
                if sender is not None:
                    sender.start()
                while size < MUCH:
                    if sender is None and sent < MUCH:  # one thread at a time may use a TLS connection
                        sent += sock.send(memoryview(b"y" * PIECE))
                    data = sock.recv(PIECE)
                    size += len(data)
                    digest.update(data)
                if sender is None:
                    sock.sendall(b"y" * (MUCH - sent))
                else:
                    sender.join(PATIENCE)
                return size, digest.hexdigest()

        running = self.in_thread(client)
        await recorder.until(2)
        source = Source(transports[0], MUCH)
        source.begin()
        await source.paused
        self.assertLess(source._written, KERNEL)
        reading.set()
        await source.done
        size, digest = await running
        await recorder.lost
        self.assertEqual(size, MUCH)
        self.assertEqual(digest, hashlib.sha256(bytes(MUCH)).hexdigest())
        self.assertEqual(recorder.size, MUCH + 2)
        self.assertEqual(recorder.hash.digest(), hashlib.sha256(b"go" + b"y" * MUCH).digest())
        self.assertLessEqual(source.most, PIECE)
        self.assertGreater(source.pauses, 1)

    async def test_last_words_of_a_peer_that_takes_no_more(self: Any) -> None:
        """A server that refuses a push says why and closes; what is being written to it must not drown that out."""
        port, recorder, transports = self.serve()
        said, go = threading.Event(), threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reset drops what waits to be sent
            sock.sendall(b"hello")
            go.wait(PATIENCE)
            sock.sendall(b"last words")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()  # a reset: writing to it is an error from now on
            said.set()

        running = self.in_thread(client)
        await recorder.until(5)
        go.set()
        said.wait(PATIENCE)  # the reactor stands still: what was said has not been read
        transports[0].eager = False
        transports[0].write(b"x")
        transports[0].write(b"x")
        await running
        await recorder.lost
        self.assertEqual(recorder.received, b"hellolast words")

    async def test_small_answers_at_once(self: Any) -> None:
        """What the kernel takes needs no turn of the reactor, and nothing is kept."""

        class Echo(Recorder):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                before = self.transport.sent
                self.transport.write(data)
                self.transport.writeSequence([data, b""])
                self.at_once = self.transport.sent - before

        port, recorder, _ = self.serve(Echo())

        def client() -> list[bytes]:
            with self.connect(port) as sock:
                answers = []
                for word in (b"one", b"two", b"three"):
                    sock.sendall(word)
                    answers.append(read(sock, 2 * len(word)))
                return answers

        self.assertEqual(await self.in_thread(client), [b"oneone", b"twotwo", b"threethree"])
        self.assertEqual(recorder.at_once, 10)
        await recorder.lost

    async def test_close_flushes(self: Any) -> None:
        port, recorder, transports = self.serve()
        reading = threading.Event()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(PATIENCE)
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        transport.write(bytes(KERNEL))
        transport.write(b"end")
        self.assertLess(transport.sent, KERNEL)
        transport.loseConnection()
        transport.loseConnection()
        transport.write(b"too late")
        self.assertFalse(recorder.lost.called)
        reading.set()
        self.assertEqual(await running, bytes(KERNEL) + b"end")
        reason = await recorder.lost
        self.assertIs(type(reason), ConnectionDone)

    async def test_close_with_nothing_to_say(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.until(2)
        transports[0].stopProducing()
        self.assertEqual(await running, b"")
        await recorder.lost

    async def test_abort_in_the_middle(self: Any) -> None:
        """The client must not take what it has for the whole."""
        port, recorder, transports = self.serve()
        reading = threading.Event()

        def client() -> str:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(PATIENCE)
                try:
                    read_all(sock)
                except OSError as error:
                    return type(error).__name__
                return "a good end"

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        source = Source(transport, MUCH)
        source.begin()
        transport.abortConnection()
        transport.abortConnection()
        transport.connectionLost(Failure(ConnectionLost()))  # as the reactor does that has just looked at the socket
        self.assertFalse(recorder.lost.called)  # never from within a call
        reason = await recorder.lost
        self.assertIs(type(reason), ConnectionAborted)
        self.assertTrue(source.stopped)
        self.assertFalse(transport.connected)
        reading.set()
        self.assertIn(await running, ("ConnectionResetError", "SSLEOFError"))

    async def test_nothing_happens_after_the_end(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")

        await self.in_thread(client)
        await recorder.lost
        (transport,) = transports
        sent = transport.sent
        transport.write(b"x")
        transport.pauseProducing()
        transport.resumeProducing()
        transport.loseConnection()
        transport.abortConnection()
        source = Source(transport, 10)
        transport.registerProducer(source, True)
        self.assertTrue(source.stopped)
        self.assertEqual(transport.sent, sent)
        self.assertEqual(transport.fileno(), -1)

    async def test_the_client_goes_in_the_middle(self: Any) -> None:
        port, recorder, transports = self.serve()
        full = threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.sendall(b"go")
            full.wait(PATIENCE)
            sock.close()  # with bytes unread: a reset

        running = self.in_thread(client)
        await recorder.until(2)
        source = Source(transports[0], MUCH)
        source.begin()
        await source.paused
        full.set()
        await running
        reason = await recorder.lost
        self.assertIsInstance(reason, ConnectionLost)
        self.assertTrue(source.stopped)

    async def test_a_write_that_finds_the_client_gone(self: Any) -> None:
        port, recorder, transports = self.serve()
        paused = threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.sendall(b"go")
            paused.wait(PATIENCE)
            if self.tls is not None:
                sock = socket.socket(fileno=sock.detach())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.close()

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        transport.pauseProducing()
        paused.set()
        await running
        while transport.connected:
            transport.write(b"x" * PIECE)
            self.assertFalse(recorder.lost.called)  # never from within a call
            await self.turn()
        await recorder.lost

    async def test_reading_can_be_paused(self: Any) -> None:
        port, recorder, transports = self.serve(Recorder(keep=False))
        stuck = threading.Event()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                sent = 0
                data = bytes(PIECE)
                sock.settimeout(0.2)
                try:
                    while True:
                        sent += sock.send(data)
                except OSError:  # a time-out, or in TLS the same as a half-written record
                    stuck.set()
                sock.settimeout(PATIENCE)
                sock.sendall(data)

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        transport.pauseProducing()
        transport.pauseProducing()
        await self.in_thread(stuck.wait, PATIENCE)
        self.assertLess(recorder.size, MIB)
        transport.resumeProducing()
        transport.resumeProducing()
        await running
        await recorder.lost
        self.assertGreater(recorder.size, PIECE)

    async def test_what_is_offered_does_not_wait_in_memory(self: Any) -> None:
        port, recorder, transports = self.serve()
        content = random.Random(1).randbytes(KERNEL)
        reading, running = self.late_reader(lambda: self.connect(port))
        await recorder.until(2)
        (transport,) = transports
        offered, most = 0, 0
        resumed: Deferred[None] = Deferred()

        class Offering:
            def resumeProducing(self) -> None:
                resumed.callback(None)

            def pauseProducing(self) -> None:
                self.paused = True

            def stopProducing(self) -> None: ...

        producer = Offering()
        transport.registerProducer(producer, True)
        while offered < len(content):
            resumed, producer.paused = Deferred(), False
            piece = content[offered : offered + MIB]
            taken = transport.offer(piece)
            offered += taken
            most = max(most, offered - transport.sent)
            if taken < len(piece) or offered > transport.sent:
                self.assertTrue(producer.paused)
            if producer.paused:
                reading.set()
                await resumed
        transport.loseConnection()
        self.assertEqual(await running, content)
        self.assertTrue(reading.is_set())
        self.assertLessEqual(most, 16 * 1024)
        await recorder.lost
        self.assertEqual(transport.offer(b"for nobody"), 10)

    async def test_little_of_an_offer_waits_in_the_kernel_for_a_client_that_reads_nothing(self: Any) -> None:
        port, recorder, transports = self.serve()
        reading, running = self.late_reader(lambda: self.connect(port))
        await recorder.until(2)
        (transport,) = transports
        producer = Pausing()
        transport.registerProducer(producer, True)
        offered = 0
        for _ in range(20):
            while not producer.paused:
                offered += transport.offer(bytes(MIB))
            await deferLater(reactor, 0)
        self.assertLess(offered, 2 * MIB)
        self.assertEqual(offered, transport.sent)  # nothing waits here
        transport.abortConnection()
        reading.set()
        with contextlib.suppress(OSError):
            await running

    async def test_a_client_that_takes_all_at_once_is_given_more_each_time(self: Any) -> None:
        """And so has a layer of 4 MiB by few offers."""
        port, recorder, transports = self.serve()
        read, client = self.portions(lambda: self.connect(port))
        await recorder.until(2)
        (transport,) = transports
        transport.registerProducer(Pausing(), True)
        taken = []
        while sum(taken) < 4 * MIB:
            taken.append(transport.offer(bytes(4 * MIB)))
            await read(taken[-1])
            await self.turn()
        self.assertLessEqual(taken[0], 128 * 1024)
        for now, before in zip(taken[2:-1], taken[1:], strict=False):
            self.assertGreater(now, before * 3 // 2)
        self.assertLessEqual(len(taken), 8)
        self.assertEqual(transport.sent, sum(taken))
        await read(0)
        await client
        await recorder.lost

    async def test_a_client_that_takes_a_little_at_a_time_is_given_little(self: Any) -> None:
        port, recorder, transports = self.serve()
        read, client = self.portions(lambda: self.connect(port, 32 * 1024))
        await recorder.until(2)
        (transport,) = transports
        producer = Pausing()
        transport.registerProducer(producer, True)
        offered = taken = 0
        while offered < 3 * MIB:
            while not producer.paused:
                offered += transport.offer(bytes(MIB))
                self.assertLessEqual(unsent(transport), 132 * 1024)  # TLS adds to its records
            await read(16 * 1024)
            taken += 16 * 1024
            await self.turn()
        self.assertGreater(taken, MIB)
        await read(0)
        await client
        await recorder.lost

    async def test_an_offer_where_the_kernel_does_not_tell_what_room_it_has(self: Any) -> None:
        """The whole is offered in any case, a piece at a time, and comes as it is."""
        self.patch(transport_module, "_SO_MEMINFO", 9999)
        port, recorder, transports = self.serve()
        content = random.Random(3).randbytes(MIB)
        reading, running = self.late_reader(lambda: self.connect(port))
        await recorder.until(2)
        (transport,) = transports
        reading.set()
        offered = 0
        while offered < len(content):
            taken = transport.offer(content[offered:])
            self.assertLessEqual(taken, 16 * 1024)
            offered += taken
            await deferLater(reactor, 0)
        transport.loseConnection()
        self.assertEqual(await running, content)
        await recorder.lost

    async def test_producers(self: Any) -> None:
        port, recorder, transports = self.serve()
        leave = threading.Event()

        def client() -> bool:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return leave.wait(PATIENCE)

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        transport.write(bytes(KERNEL))
        source, other = Source(transport, 0), Source(transport, 0)
        transport.registerProducer(source, True)
        self.assertEqual(source.pauses, 1)
        self.assertRaises(RuntimeError, transport.registerProducer, other, True)
        transport.unregisterProducer()
        self.assertRaises(ValueError, transport.registerProducer, other, False)
        transport.write(b"x")
        leave.set()
        await running
        await recorder.lost
        self.assertFalse(source.stopped)

    async def test_an_error_in_the_protocol_ends_the_connection(self: Any) -> None:
        class Broken(Recorder):
            def dataReceived(self, data: bytes) -> None:
                raise KeyError("broken")

        port, recorder, _ = self.serve(Broken())

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                try:
                    sock.recv(1)
                except OSError:
                    pass

        await self.in_thread(client)
        reason = await recorder.lost
        self.assertIs(type(reason), KeyError)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    async def test_addresses(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> int:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                read_all(sock)
                number: int = sock.getsockname()[1]
                return number

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        peer, host = transport.getPeer(), transport.getHost()
        transport.loseConnection()
        self.assertEqual((peer.port, host.port), (await running, port))
        await recorder.lost
        self.assertEqual(transport.getPeer(), peer)

    async def test_no_descriptor_is_lost(self: Any) -> None:
        all_gone: list[Deferred[BaseException]] = []

        def take(tcp: Any) -> None:
            recorder = Recorder()
            all_gone.append(recorder.lost)
            if self.tls is None:
                SocketTransport(reactor, tcp).start(recorder)
            else:
                TLSTransport.server(reactor, tcp, SERVER).start(recorder)

        port = self.listen(take)

        def clients() -> None:
            for number in range(200):
                if number % 4 == 3:  # in the middle of a handshake, where there is one
                    sock = dial(port)
                    sock.sendall(b"\x16\x03\x01")
                else:
                    sock = self.connect(port)
                    sock.sendall(b"go")
                sock.close()

        await self.in_thread(lambda: None)  # starts the thread pool, with descriptors of its own
        before = len(os.listdir("/proc/self/fd"))
        await self.in_thread(clients)
        while len(all_gone) < 200:
            await self.turn()
        for lost in all_gone:
            await lost
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before)


class Plain(AnyTransport, SocketCase):
    async def test_a_file_goes_out_as_it_is(self) -> None:
        """To a client that reads late: nothing waits in memory but little, and nothing is lost."""
        port, recorder, transports = self.serve()
        content = random.Random(1).randbytes(KERNEL)
        reading, running = self.late_reader(lambda: self.connect(port))
        await recorder.until(2)
        (transport,) = transports
        self.assertTrue(transport.takes_files)
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            offered = 0
            while offered < len(content):
                taken = transport.offer_file(file.fileno(), offered, min(MIB, len(content) - offered))
                self.assertGreater(taken, 0)
                offered += taken
                self.assertLessEqual(offered - transport.sent, 16 * 1024)
                while transport._pending:
                    reading.set()
                    await deferLater(reactor, 0)
            self.assertEqual(transport.offer_file(file.fileno(), len(content), 10), 0)  # there is no more
            transport.loseConnection()
            self.assertEqual(await running, content)
            self.assertTrue(reading.is_set())
            await recorder.lost
            self.assertEqual(transport.offer_file(file.fileno(), 0, 10), 10)

    async def test_a_file_for_who_is_gone(self) -> None:
        port, recorder, transports = self.serve()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        await self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        with tempfile.TemporaryFile() as file:
            file.write(bytes(MIB))
            file.flush()
            while not recorder.lost.called:
                transport.offer_file(file.fileno(), 0, MIB)
                await deferLater(reactor, 0)

    async def test_a_file_that_cannot_be_read(self) -> None:
        port, recorder, transports = self.serve()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.until(2)
        (transport,) = transports
        with self.assertRaises(OSError):
            transport.offer_file(99_999, 0, 10)
        transport.loseConnection()
        self.assertEqual(await running, b"")
        await recorder.lost

    async def test_hand_over(self) -> None:
        port, first, transports = self.serve()
        second = Recorder()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"one")
                answer = read(sock, 3)
                sock.sendall(b"three")
                return answer + read_all(sock)

        running = self.in_thread(client)
        await first.until(3)
        (transport,) = transports
        transport.pauseProducing()
        transport.hand_over(second)
        transport.write(b"two")
        await second.until(5)
        transport.loseConnection()
        self.assertEqual(await running, b"two")
        await second.lost
        self.assertEqual((first.received, second.received), (b"one", b"three"))
        self.assertFalse(first.lost.called)


class TLS13(AnyTransport, SocketCase):
    tls = ssl.TLSVersion.TLSv1_3


class TLS12(AnyTransport, SocketCase):
    tls = ssl.TLSVersion.TLSv1_2
