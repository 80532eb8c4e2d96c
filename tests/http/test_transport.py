"""SocketTransport and TLSTransport on real sockets: transfers, back-pressure, closing."""

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
from tests.http.support.loopback import (
    CHUNK,
    LARGE,
    MIB,
    OVER_KERNEL_BUFFERS,
    SERVER_CONTEXT,
    TIMEOUT,
    CallbackFactory,
    RecordingProtocol,
    SocketTestCase,
    ZerosProducer,
    client_context,
    dial,
    reactor,
    read_all,
    read_exactly,
)


class PausableProducer:
    """A push producer that records whether it is paused."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None: ...


def unsent_bytes(transport: Any) -> int:
    """Return the number of unsent bytes in the kernel's send buffer."""
    result = fcntl.ioctl(transport.fileno(), 0x894B, bytes(4))  # SIOCOUTQNSD of linux/sockios.h
    return int.from_bytes(result, sys.byteorder)


class TransportTestsMixin:
    """Tests of both transports. This is a mixin so that it is not collected by itself."""

    tls: ClassVar[ssl.TLSVersion | None] = None

    def serve(self: Any, protocol: Protocol | None = None) -> tuple[int, RecordingProtocol, list[Any]]:
        """Listen; return the port, the connection's protocol, and a list to which its transport will be appended."""
        recorder: Any = protocol or RecordingProtocol()
        transports: list[Any] = []

        def on_connection(tcp: Any) -> None:
            if self.tls is None:
                transport = SocketTransport(reactor, tcp)
            else:
                transport = TLSTransport.server(reactor, tcp, SERVER_CONTEXT)
            transports.append(transport)
            transport.take_over(recorder)

        return self.listen(on_connection), recorder, transports

    def connect(self, port: int, receive_buffer: int | None = None) -> socket.socket:
        sock = dial(port, receive_buffer)
        if self.tls is not None:
            # Without suppress_ragged_eofs=False, a connection closed without close_notify would look complete.
            sock = client_context(self.tls).wrap_socket(sock, server_hostname="a.test", suppress_ragged_eofs=False)
        return sock

    async def test_little_is_unsent_in_the_kernel_after_a_long_write(self: Any) -> None:
        port, recorder, transports = self.serve(RecordingProtocol(keep=False))
        sock = await self.in_thread(lambda: self.connect(port))
        with sock:
            await self.in_thread(lambda: sock.sendall(b"go"))
            await recorder.wait_for(2)
            for _ in range(3):
                transports[0].write(bytes(OVER_KERNEL_BUFFERS))
            self.assertLessEqual(unsent_bytes(transports[0]), 256 * 1024)
            transports[0].abortConnection()

    async def test_acknowledged_bytes_are_those_that_the_peer_received(self: Any) -> None:
        """They grow while the peer reads what the kernel has buffered, without another write."""
        port, recorder, transports = self.serve(RecordingProtocol(keep=False))
        sock = await self.in_thread(lambda: self.connect(port, receive_buffer=4096))
        with sock:
            await self.in_thread(lambda: sock.sendall(b"go"))
            await recorder.wait_for(2)
            transport = transports[0]
            transport.write(bytes(OVER_KERNEL_BUFFERS))
            before = transport.acknowledged
            self.assertLess(before, transport.sent)
            await self.in_thread(lambda: read_exactly(sock, 20_000))
            while transport.acknowledged == before:
                await deferLater(reactor, 0.001)
            self.assertGreater(transport.acknowledged, before)
            transport.abortConnection()

    async def test_large_transfers_both_ways_with_a_slow_reader(self: Any) -> None:
        port, recorder, transports = self.serve(RecordingProtocol(keep=False))
        reading = threading.Event()

        def client() -> tuple[int, str]:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(TIMEOUT)
                sender = threading.Thread(target=sock.sendall, args=(b"y" * LARGE,)) if self.tls is None else None
                size, digest, sent = 0, hashlib.sha256(), 0
                if sender is not None:
                    sender.start()
                while size < LARGE:
                    if sender is None and sent < LARGE:  # one thread at a time may use a TLS connection
                        sent += sock.send(memoryview(b"y" * CHUNK))
                    data = sock.recv(CHUNK)
                    size += len(data)
                    digest.update(data)
                if sender is None:
                    sock.sendall(b"y" * (LARGE - sent))
                else:
                    sender.join(TIMEOUT)
                return size, digest.hexdigest()

        running = self.in_thread(client)
        await recorder.wait_for(2)
        source = ZerosProducer(transports[0], LARGE)
        source.start()
        await source.paused
        self.assertLess(source._written, OVER_KERNEL_BUFFERS)
        reading.set()
        await source.done
        size, digest = await running
        await recorder.connection_lost
        self.assertEqual(size, LARGE)
        self.assertEqual(digest, hashlib.sha256(bytes(LARGE)).hexdigest())
        self.assertEqual(recorder.size, LARGE + 2)
        self.assertEqual(recorder.hash.digest(), hashlib.sha256(b"go" + b"y" * LARGE).digest())
        self.assertLessEqual(source.max_buffered, CHUNK)
        self.assertGreater(source.pause_count, 1)

    async def test_data_received_before_a_reset_is_delivered(self: Any) -> None:
        """An upstream that refuses a push responds and closes. Writing to it must not lose that response."""
        port, recorder, transports = self.serve()
        client_closed, proceed = threading.Event(), threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reset drops what waits to be sent
            sock.sendall(b"hello")
            proceed.wait(TIMEOUT)
            sock.sendall(b"last words")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()  # a reset: writes to this connection fail from now on
            client_closed.set()

        running = self.in_thread(client)
        await recorder.wait_for(5)
        proceed.set()
        client_closed.wait(TIMEOUT)  # this blocks the reactor, so the last words are not read yet
        transports[0].write_immediately = False
        transports[0].write(b"x")
        transports[0].write(b"x")
        await running
        await recorder.connection_lost
        self.assertEqual(recorder.received, b"hellolast words")

    async def test_small_writes_are_immediate(self: Any) -> None:
        """Bytes that the kernel accepts need no reactor iteration and are not buffered."""

        class RecordingEcho(RecordingProtocol):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                before = self.transport.sent
                self.transport.write(data)
                self.transport.writeSequence([data, b""])
                self.sent_immediately = self.transport.sent - before

        port, recorder, _ = self.serve(RecordingEcho())

        def client() -> list[bytes]:
            with self.connect(port) as sock:
                responses = []
                for word in (b"one", b"two", b"three"):
                    sock.sendall(word)
                    responses.append(read_exactly(sock, 2 * len(word)))
                return responses

        self.assertEqual(await self.in_thread(client), [b"oneone", b"twotwo", b"threethree"])
        self.assertEqual(recorder.sent_immediately, 10)
        await recorder.connection_lost

    async def test_close_flushes_pending_bytes(self: Any) -> None:
        port, recorder, transports = self.serve()
        reading = threading.Event()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(TIMEOUT)
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        transport.write(bytes(OVER_KERNEL_BUFFERS))
        transport.write(b"end")
        self.assertLess(transport.sent, OVER_KERNEL_BUFFERS)
        transport.loseConnection()
        transport.loseConnection()
        transport.write(b"too late")
        self.assertFalse(recorder.connection_lost.called)
        reading.set()
        self.assertEqual(await running, bytes(OVER_KERNEL_BUFFERS) + b"end")
        reason = await recorder.connection_lost
        self.assertIs(type(reason), ConnectionDone)

    async def test_close_with_nothing_pending(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.wait_for(2)
        transports[0].stopProducing()
        self.assertEqual(await running, b"")
        await recorder.connection_lost

    async def test_abort_during_a_transfer_resets_the_connection(self: Any) -> None:
        """The client must be able to tell a partial transfer from a complete one."""
        port, recorder, transports = self.serve()
        reading = threading.Event()

        def client() -> str:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                reading.wait(TIMEOUT)
                try:
                    read_all(sock)
                except OSError as error:
                    return type(error).__name__
                return "no error"

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        source = ZerosProducer(transport, LARGE)
        source.start()
        transport.abortConnection()
        transport.abortConnection()
        transport.connectionLost(Failure(ConnectionLost()))  # the reactor may find the loss at the same time
        self.assertFalse(recorder.connection_lost.called)  # it is never reported within the caller's call
        reason = await recorder.connection_lost
        self.assertIs(type(reason), ConnectionAborted)
        self.assertTrue(source.stopped)
        self.assertFalse(transport.connected)
        reading.set()
        self.assertIn(await running, ("ConnectionResetError", "SSLEOFError"))

    async def test_calls_after_the_end_are_ignored(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")

        await self.in_thread(client)
        await recorder.connection_lost
        (transport,) = transports
        sent = transport.sent
        transport.write(b"x")
        transport.pauseProducing()
        transport.resumeProducing()
        transport.loseConnection()
        transport.abortConnection()
        source = ZerosProducer(transport, 10)
        transport.registerProducer(source, True)
        self.assertTrue(source.stopped)
        self.assertEqual(transport.sent, sent)
        self.assertEqual(transport.fileno(), -1)

    async def test_reset_during_a_transfer_stops_the_producer(self: Any) -> None:
        port, recorder, transports = self.serve()
        full = threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.sendall(b"go")
            full.wait(TIMEOUT)
            sock.close()  # with unread bytes, which causes a reset

        running = self.in_thread(client)
        await recorder.wait_for(2)
        source = ZerosProducer(transports[0], LARGE)
        source.start()
        await source.paused
        full.set()
        await running
        reason = await recorder.connection_lost
        self.assertIsInstance(reason, ConnectionLost)
        self.assertTrue(source.stopped)

    async def test_write_to_a_reset_connection_reports_the_loss_later(self: Any) -> None:
        port, recorder, transports = self.serve()
        paused = threading.Event()

        def client() -> None:
            sock = self.connect(port)
            sock.sendall(b"go")
            paused.wait(TIMEOUT)
            if self.tls is not None:
                sock = socket.socket(fileno=sock.detach())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.close()

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        transport.pauseProducing()
        paused.set()
        await running
        while transport.connected:
            transport.write(b"x" * CHUNK)
            self.assertFalse(recorder.connection_lost.called)  # it is never reported within the caller's call
            await self.run_reactor()
        await recorder.connection_lost

    async def test_reading_can_be_paused(self: Any) -> None:
        port, recorder, transports = self.serve(RecordingProtocol(keep=False))
        stuck = threading.Event()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                sent = 0
                data = bytes(CHUNK)
                sock.settimeout(0.2)
                try:
                    while True:
                        sent += sock.send(data)
                except OSError:  # a timeout, which TLS may report as a partially written record
                    stuck.set()
                sock.settimeout(TIMEOUT)
                sock.sendall(data)

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        transport.pauseProducing()
        transport.pauseProducing()
        await self.in_thread(stuck.wait, TIMEOUT)
        self.assertLess(recorder.size, MIB)
        transport.resumeProducing()
        transport.resumeProducing()
        await running
        await recorder.connection_lost
        self.assertGreater(recorder.size, CHUNK)

    async def test_write_some_buffers_at_most_one_record(self: Any) -> None:
        port, recorder, transports = self.serve()
        content = random.Random(1).randbytes(OVER_KERNEL_BUFFERS)
        reading, running = self.start_late_reader(lambda: self.connect(port))
        await recorder.wait_for(2)
        (transport,) = transports
        written, max_buffered = 0, 0
        resumed: Deferred[None] = Deferred()

        class ResumingProducer:
            def resumeProducing(self) -> None:
                resumed.callback(None)

            def pauseProducing(self) -> None:
                self.paused = True

            def stopProducing(self) -> None: ...

        producer = ResumingProducer()
        transport.registerProducer(producer, True)
        while written < len(content):
            resumed, producer.paused = Deferred(), False
            chunk = content[written : written + MIB]
            count = transport.write_some(chunk)
            written += count
            max_buffered = max(max_buffered, written - transport.sent)
            if count < len(chunk) or written > transport.sent:
                self.assertTrue(producer.paused)
            if producer.paused:
                reading.set()
                await resumed
        transport.loseConnection()
        self.assertEqual(await running, content)
        self.assertTrue(reading.is_set())
        self.assertLessEqual(max_buffered, 16 * 1024)
        await recorder.connection_lost
        self.assertEqual(transport.write_some(b"after loss"), 10)

    async def test_kernel_buffer_is_small_for_a_client_that_does_not_read(self: Any) -> None:
        port, recorder, transports = self.serve()
        reading, running = self.start_late_reader(lambda: self.connect(port))
        await recorder.wait_for(2)
        (transport,) = transports
        producer = PausableProducer()
        transport.registerProducer(producer, True)
        written = 0
        for _ in range(20):
            while not producer.paused:
                written += transport.write_some(bytes(MIB))
            await deferLater(reactor, 0)
        self.assertLess(written, 2 * MIB)
        self.assertEqual(written, transport.sent)  # nothing is buffered in the transport
        transport.abortConnection()
        reading.set()
        with contextlib.suppress(OSError):
            await running

    async def test_kernel_buffer_grows_for_a_fast_client(self: Any) -> None:
        """A fast client gets 4 MiB in few calls of write_some."""
        port, recorder, transports = self.serve()
        read, client = self.start_metered_reader(lambda: self.connect(port))
        await recorder.wait_for(2)
        (transport,) = transports
        transport.registerProducer(PausableProducer(), True)
        counts = []
        while sum(counts) < 4 * MIB:
            counts.append(transport.write_some(bytes(4 * MIB)))
            await read(counts[-1])
            await self.run_reactor()
        self.assertLessEqual(counts[0], 128 * 1024)
        for current, previous in zip(counts[2:-1], counts[1:], strict=False):
            self.assertGreater(current, previous * 3 // 2)
        self.assertLessEqual(len(counts), 8)
        self.assertEqual(transport.sent, sum(counts))
        await read(0)
        await client
        await recorder.connection_lost

    async def test_kernel_buffer_stays_small_for_a_slow_client(self: Any) -> None:
        port, recorder, transports = self.serve()
        read, client = self.start_metered_reader(lambda: self.connect(port, 32 * 1024))
        await recorder.wait_for(2)
        (transport,) = transports
        producer = PausableProducer()
        transport.registerProducer(producer, True)
        written = read_size = 0
        while written < 3 * MIB:
            while not producer.paused:
                written += transport.write_some(bytes(MIB))
                self.assertLessEqual(unsent_bytes(transport), 132 * 1024)  # 128 KiB and the overhead of TLS records
            await read(16 * 1024)
            read_size += 16 * 1024
            await self.run_reactor()
        self.assertGreater(read_size, MIB)
        await read(0)
        await client
        await recorder.connection_lost

    async def test_write_some_without_so_meminfo(self: Any) -> None:
        """Without SO_MEMINFO the content is still sent completely, at most one record per call."""
        self.patch(transport_module, "_SO_MEMINFO", 9999)
        port, recorder, transports = self.serve()
        content = random.Random(3).randbytes(MIB)
        reading, running = self.start_late_reader(lambda: self.connect(port))
        await recorder.wait_for(2)
        (transport,) = transports
        reading.set()
        written = 0
        while written < len(content):
            count = transport.write_some(content[written:])
            self.assertLessEqual(count, 16 * 1024)
            written += count
            await deferLater(reactor, 0)
        transport.loseConnection()
        self.assertEqual(await running, content)
        await recorder.connection_lost

    async def test_register_producer_pauses_it_while_bytes_are_pending(self: Any) -> None:
        port, recorder, transports = self.serve()
        disconnect = threading.Event()

        def client() -> bool:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return disconnect.wait(TIMEOUT)

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        transport.write(bytes(OVER_KERNEL_BUFFERS))
        source, other = ZerosProducer(transport, 0), ZerosProducer(transport, 0)
        transport.registerProducer(source, True)
        self.assertEqual(source.pause_count, 1)
        self.assertRaises(RuntimeError, transport.registerProducer, other, True)
        transport.unregisterProducer()
        self.assertRaises(ValueError, transport.registerProducer, other, False)
        transport.write(b"x")
        disconnect.set()
        await running
        await recorder.connection_lost
        self.assertFalse(source.stopped)

    async def test_protocol_error_closes_the_connection(self: Any) -> None:
        class FailingProtocol(RecordingProtocol):
            def dataReceived(self, data: bytes) -> None:
                raise KeyError("broken")

        port, recorder, _ = self.serve(FailingProtocol())

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                try:
                    sock.recv(1)
                except OSError:
                    pass

        await self.in_thread(client)
        reason = await recorder.connection_lost
        self.assertIs(type(reason), KeyError)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    async def test_addresses_are_known_after_the_end(self: Any) -> None:
        port, recorder, transports = self.serve()

        def client() -> int:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                read_all(sock)
                number: int = sock.getsockname()[1]
                return number

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        peer, host = transport.getPeer(), transport.getHost()
        transport.loseConnection()
        self.assertEqual((peer.port, host.port), (await running, port))
        await recorder.connection_lost
        self.assertEqual(transport.getPeer(), peer)

    async def test_no_descriptor_leak(self: Any) -> None:
        disconnects: list[Deferred[BaseException]] = []

        def on_connection(tcp: Any) -> None:
            recorder = RecordingProtocol()
            disconnects.append(recorder.connection_lost)
            if self.tls is None:
                SocketTransport(reactor, tcp).take_over(recorder)
            else:
                TLSTransport.server(reactor, tcp, SERVER_CONTEXT).take_over(recorder)

        port = self.listen(on_connection)

        def clients() -> None:
            for number in range(200):
                if number % 4 == 3:  # with TLS, disconnect during the handshake
                    sock = dial(port)
                    sock.sendall(b"\x16\x03\x01")
                else:
                    sock = self.connect(port)
                    sock.sendall(b"go")
                sock.close()

        await self.in_thread(lambda: None)  # start the thread pool now, because it opens descriptors
        before = len(os.listdir("/proc/self/fd"))
        await self.in_thread(clients)
        while len(disconnects) < 200:
            await self.run_reactor()
        for connection_lost in disconnects:
            await connection_lost
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before)


class PlainTransportTests(TransportTestsMixin, SocketTestCase):
    async def test_peer_of_a_unix_socket(self) -> None:
        """The kernel says which local user connected to a Unix socket. That of a TCP connection is not known."""
        uids: list[int | None] = []
        connected: Deferred[None] = Deferred()

        def on_connection(tcp: Any) -> None:
            transport = SocketTransport(reactor, tcp)
            transport.take_over(RecordingProtocol())
            uids.append(transport.peer_uid)
            if len(uids) == 2:
                connected.callback(None)

        path = f"{self.mktemp()}.sock"  # relative, because the path of a socket is short
        unix_port = reactor.listenUNIX(path, CallbackFactory(on_connection))
        self.addCleanup(unix_port.stopListening)
        with socket.socket(socket.AF_UNIX) as local, socket.socket() as tcp:
            local.connect(path)
            tcp.connect(("127.0.0.1", self.listen(on_connection)))
            await connected
        self.assertCountEqual(uids, [os.geteuid(), None])

    async def test_sendfile_to_a_client_that_reads_late(self) -> None:
        """A client that reads late gets the complete file, and at most one record is buffered in memory."""
        port, recorder, transports = self.serve()
        content = random.Random(1).randbytes(OVER_KERNEL_BUFFERS)
        reading, running = self.start_late_reader(lambda: self.connect(port))
        await recorder.wait_for(2)
        (transport,) = transports
        self.assertTrue(transport.can_sendfile)
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            written = 0
            while written < len(content):
                count = transport.sendfile(file.fileno(), written, min(MIB, len(content) - written))
                self.assertGreater(count, 0)
                written += count
                self.assertLessEqual(written - transport.sent, 16 * 1024)
                while transport._pending:
                    reading.set()
                    await deferLater(reactor, 0)
            self.assertEqual(transport.sendfile(file.fileno(), len(content), 10), 0)  # at the end of the file
            transport.loseConnection()
            self.assertEqual(await running, content)
            self.assertTrue(reading.is_set())
            await recorder.connection_lost
            self.assertEqual(transport.sendfile(file.fileno(), 0, 10), 10)

    async def test_sendfile_to_a_reset_connection_reports_the_loss(self) -> None:
        port, recorder, transports = self.serve()

        def client() -> None:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        await self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        with tempfile.TemporaryFile() as file:
            file.write(bytes(MIB))
            file.flush()
            while not recorder.connection_lost.called:
                transport.sendfile(file.fileno(), 0, MIB)
                await deferLater(reactor, 0)

    async def test_sendfile_raises_read_errors(self) -> None:
        port, recorder, transports = self.serve()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"go")
                return read_all(sock)

        running = self.in_thread(client)
        await recorder.wait_for(2)
        (transport,) = transports
        with self.assertRaises(OSError):
            transport.sendfile(99_999, 0, 10)
        transport.loseConnection()
        self.assertEqual(await running, b"")
        await recorder.connection_lost

    async def test_set_protocol_delivers_further_input_to_the_new_protocol(self) -> None:
        port, first, transports = self.serve()
        second = RecordingProtocol()

        def client() -> bytes:
            with self.connect(port) as sock:
                sock.sendall(b"one")
                response = read_exactly(sock, 3)
                sock.sendall(b"three")
                return response + read_all(sock)

        running = self.in_thread(client)
        await first.wait_for(3)
        (transport,) = transports
        transport.pauseProducing()
        transport.set_protocol(second)
        transport.write(b"two")
        await second.wait_for(5)
        transport.loseConnection()
        self.assertEqual(await running, b"two")
        await second.connection_lost
        self.assertEqual((first.received, second.received), (b"one", b"three"))
        self.assertFalse(first.connection_lost.called)


class TLS13TransportTests(TransportTestsMixin, SocketTestCase):
    tls = ssl.TLSVersion.TLSv1_3


class TLS12TransportTests(TransportTestsMixin, SocketTestCase):
    tls = ssl.TLSVersion.TLSv1_2
