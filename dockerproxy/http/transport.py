"""Bytes between a socket and a protocol: plain, or TLS by OpenSSL on the socket itself.

Twisted accepts the connection; then these transports take its socket over. Two things are gained. OpenSSL reads and
writes the socket without a memory BIO between, which halves the CPU time for each byte (measured: 1.07 s per GiB
against 2.5 s through `TLSMemoryBIOProtocol`; nginx needs 1.08 s). And a write goes to the kernel at once where it
takes it, so that a small answer costs no round through the reactor, and nothing is buffered for a client that reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import (
    IAddress,
    IProtocol,
    IPushProducer,
    IReadWriteDescriptor,
    ITransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

READ_SIZE = 64 * 1024

RECORD_SIZE = 16 * 1024  # bytes of content in a TLS record (RFC 8446, section 5.1)
_MIN_WRITE = 4 * 1024  # bytes that are given to the kernel at least, whether or not it has room
# For each client, the kernel keeps up to 4 MiB (tcp_wmem) to be sent. With many slow ones it runs out of memory
# (tcp_mem), and takes less than it had room for. So no more than `_UNSENT` bytes wait there, but for a client that
# has shown to be quick: where nothing waits any more when there is more to give, it may be as much as it was given so
# far, and any number from `_PROMPT` on; so it is for one that has taken `_PROOF`.
_SLOW_SEND_BUFFER = 128 * 1024
_FAST_AFTER_DRAINED = 1024 * 1024
_FAST_AFTER = 4 * 1024 * 1024

_SO_MEMINFO = 55  # socket(7) does not have it: asm-generic/socket.h and linux/sock_diag.h do, since Linux 4.12
_MEMINFO = struct.Struct("@9I")
_MEMINFO_SNDBUF, _MEMINFO_WMEM_QUEUED = 3, 5  # of that: SK_MEMINFO_SNDBUF, SK_MEMINFO_WMEM_QUEUED
_TCP_NOTSENT_LOWAT = 25  # tcp(7); socket has it since Python 3.12
_SIOCOUTQNSD = 0x894B  # tcp(7) does not have that either: linux/sockios.h


class DetachedProtocol(Protocol):
    """What Twisted's own transport is left with once its socket is taken over."""


@implementer(ITransport, IReadWriteDescriptor, IPushProducer)
class SocketTransport:
    """A connected TCP or Unix socket, taken over from Twisted's transport `tcp`.

    An `ITransport` for `protocol`, and an `IConsumer` for one push producer: it is paused as soon as the kernel takes
    no more, and resumed when all is handed over. `sent` counts bytes given to the kernel: what a time-out looks at.
    """

    __slots__ = (
        "_aborted",
        "_broken",
        "_fast_client",
        "_fileno",
        "_is_unix",
        "_lost_reason",
        "_notsent_lowat",
        "_pending",
        "_producer",
        "_producer_paused",
        "_reading",
        "_ready",
        "_retry_size",
        "_socket",
        "_tcp",
        "_writing",
        "connected",
        "disconnecting",
        "protocol",
        "reactor",
        "sent",
        "write_immediately",
    )  # fmt: skip

    def __init__(self, reactor: Any, tcp: Any) -> None:
        self.reactor = reactor
        self._tcp = tcp
        self._socket: socket.socket = tcp.getHandle()
        self._fileno = self._socket.fileno()
        self._pending: list[bytes | memoryview] = []  # a deque would take 760 bytes
        self._producer: IPushProducer | None = None
        self._producer_paused = False
        self._reading = self._writing = False
        self._retry_size = 0  # bytes that OpenSSL could not send, and has to be offered once more; 0: none
        self._ready = True  # whether application data can be written: TLS first shakes hands
        self._broken = self._aborted = False
        self._is_unix = self._socket.family == socket.AF_UNIX  # asked once: an enum is made for each answer
        self._fast_client = self._is_unix  # whether the client has shown to be quick
        self._notsent_lowat = 0  # bytes that may wait in the kernel to be sent; 0: any number
        self._lost_reason: Exception = CONNECTION_LOST
        self.protocol: IProtocol = DetachedProtocol()
        self.connected = True
        self.disconnecting = False
        self.sent = 0
        # Whether `write` sends at once. Else that is left to the reactor, and what can be read is read before: so a
        # peer's last words are heard before it is found that it takes no more (after which OpenSSL reads nothing).
        self.write_immediately = True

    def take_over(self, protocol: IProtocol) -> None:
        """Take the socket from Twisted's transport and give `protocol` what arrives from now on."""
        self._tcp.stopReading()
        self._tcp.stopWriting()
        if not isinstance(self._tcp.protocol, DetachedProtocol):
            self._tcp.protocol = DetachedProtocol()
        if not self._is_unix:
            self._tcp.setTcpNoDelay(True)
            self._tcp.setTcpKeepAlive(True)
        self.set_protocol(protocol)

    def set_protocol(self, protocol: IProtocol) -> None:
        """Give `protocol` what arrives from now on."""
        self.protocol = protocol
        self.resumeProducing()
        protocol.makeConnection(self)

    def detach(self) -> tuple[Any, Any, bytes]:
        """Leave the socket to another transport: return reactor, Twisted's transport, and what was not sent."""
        pending = b"".join(self._pending)
        self._pending.clear()
        self._stop_io()
        self.connected = False
        self.protocol = DetachedProtocol()
        return self.reactor, self._tcp, pending

    # ITransport

    def write(self, data: bytes) -> None:
        """Hand `data` to the kernel, and keep what it does not take yet."""
        if not self.connected or self.disconnecting or self._broken or not data:
            return
        if not self._pending and self._ready and self.write_immediately:
            sent = self._send(data)
            if sent == len(data):
                return
            if sent:
                data = memoryview(data)[sent:]  # type: ignore[assignment]
        self._enqueue(data)

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Hand as much of `data` to the kernel as it has room for; return how much that was.

        That is at least one byte. Whoever can get at the rest again offers that when the producer is resumed, and so
        for a client that reads slowly nothing waits here: what TLS has encrypted and the kernel does not take would be
        kept twice, 16 KiB each time, for OpenSSL wants to be given the same once more.
        """
        if not self.connected or self.disconnecting or self._broken:
            return len(data)
        space = self._send_space() if len(data) >= RECORD_SIZE else 2 * RECORD_SIZE
        size = min(len(data), max(_MIN_WRITE, space))
        sent = self._send(memoryview(data)[:size]) if not self._pending and self._ready else 0
        if sent < size:
            buffered = bytes(memoryview(data)[sent : sent + (self._retry_size or _MIN_WRITE)])
            self._enqueue(buffered)
            return sent + len(buffered)
        if sent < len(data) or space - sent < RECORD_SIZE:
            self._pause_producer()
        return sent

    @property
    def can_sendfile(self) -> bool:
        """Whether bytes of a file can go to the peer as they are (`offer_file`)."""
        return True

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        """Hand `size` bytes of a file to the kernel as `offer` does; they are not copied on the way (sendfile(2)).

        Raise OSError where they cannot be read.
        """
        if not self.connected or self.disconnecting or self._broken:
            return size
        sent = self._sendfile(descriptor, offset, size) if not self._pending else 0
        buffered = os.pread(descriptor, min(size - sent, RECORD_SIZE), offset + sent) if sent < size else b""
        if buffered:
            self._enqueue(buffered)
        return sent + len(buffered)

    def _sendfile(self, descriptor: int, offset: int, size: int) -> int:
        try:
            sent = os.sendfile(self._fileno, descriptor, offset, size)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
            self._mark_broken()
            return 0
        self.sent += sent
        return sent

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        """Close when all that was written has been sent."""
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            self.pauseProducing()
            if self._ready:
                self._start_writing()
            else:
                self.abortConnection()  # nothing can be said before the handshake, and the peer may never end it

    def abortConnection(self) -> None:
        """Reset the connection, whatever has not been sent: the peer does not take that for an end that was meant."""
        if self.connected and not self._broken:
            self._broken = self._aborted = True
            self.disconnecting = True
            self._pending.clear()
            self._stop_io()
            self.reactor.callLater(0, self._call_connection_lost, Failure(ConnectionAborted()))  # type: ignore[no-untyped-call]

    def getPeer(self) -> IAddress:
        address: IAddress = self._tcp.getPeer()
        return address

    def getHost(self) -> IAddress:
        address: IAddress = self._tcp.getHost()
        return address

    def _enqueue(self, data: bytes | memoryview) -> None:
        self._pending.append(data)
        self._pause_producer()

    def _pause_producer(self) -> None:
        """Wait for the kernel to have room."""
        self._start_writing()
        if self._producer is not None and not self._producer_paused:
            self._producer_paused = True
            self._producer.pauseProducing()

    # IConsumer

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self._producer is not None:
            raise RuntimeError("there is a producer already")
        if not streaming:
            raise ValueError("push producers only")
        if not self.connected:
            producer.stopProducing()
            return
        self._producer = producer
        self._producer_paused = bool(self._pending)
        if self._producer_paused:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        self._producer = None

    # IPushProducer

    def pauseProducing(self) -> None:
        if self._reading:
            self._reading = False
            self.reactor.removeReader(self)

    def resumeProducing(self) -> None:
        if self.connected and not self.disconnecting and not self._reading:
            self._reading = True
            self.reactor.addReader(self)

    def stopProducing(self) -> None:
        self.loseConnection()

    # IReadWriteDescriptor: what the reactor calls

    def fileno(self) -> int:
        return self._fileno if self.connected else -1

    def logPrefix(self) -> str:
        return type(self.protocol).__name__

    def doRead(self) -> Any:
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def doWrite(self) -> Any:
        while self._pending and not self._broken:
            data = self._pending[0]
            sent = self._send(data)
            if sent < len(data):
                self._pending[0] = memoryview(data)[sent:]
                break
            del self._pending[0]
        if self._broken:
            return CONNECTION_LOST
        if self._pending:
            return None
        self._stop_writing()
        if self.disconnecting:
            self._send_close_notify()
            return CONNECTION_DONE
        if self._producer is not None and self._producer_paused:
            self._producer_paused = False
            self._producer.resumeProducing()
        return None

    def connectionLost(self, reason: Failure) -> None:
        if not self._aborted:  # else that is how it ends, and not as the reactor finds it in the middle of that
            self._call_connection_lost(reason)

    # the socket

    def _send_space(self) -> int:
        """Return how many bytes the kernel has room for.

        As good as surely: where it does not take them, they are kept here.
        """
        try:
            meminfo: tuple[int, ...] = _MEMINFO.unpack(
                self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            )
            free, queued = meminfo[_MEMINFO_SNDBUF] - meminfo[_MEMINFO_WMEM_QUEUED], meminfo[_MEMINFO_WMEM_QUEUED]
            space = free - free // 4  # what the kernel makes of them takes room as well
            return space if self._fast_client else min(space, self._slow_client_space(queued))
        except (OSError, struct.error):
            return RECORD_SIZE

    def _slow_client_space(self, queued: int) -> int:
        """Return the same as far as it goes by how quick the client is; of what was sent, it has not taken `queued`."""
        unsent = int.from_bytes(fcntl.ioctl(self._fileno, _SIOCOUTQNSD, bytes(4)), sys.byteorder)
        if self.sent - queued >= _FAST_AFTER or (self.sent >= _FAST_AFTER_DRAINED and not unsent):
            lowat = 0  # as for every socket
        elif unsent:
            lowat = self._notsent_lowat or _SLOW_SEND_BUFFER
        else:
            lowat = max(_SLOW_SEND_BUFFER, self.sent)
        if lowat != self._notsent_lowat:
            self._notsent_lowat = lowat
            self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, lowat)
        if not lowat:
            self._fast_client = True
            return _FAST_AFTER
        return lowat - lowat // 16 - unsent  # a record is somewhat longer than what is in it

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """Return how many bytes the kernel took."""
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._mark_broken()
            return 0
        self.sent += sent
        return sent

    def _send_close_notify(self) -> None:
        """Tell the peer that the end is meant, where the protocol has a word for it."""

    def _mark_broken(self) -> None:
        self._broken = True
        self._start_writing()  # the reactor comes to doWrite, which reports it: never from within a call of ours

    def _call_connection_lost(self, reason: Failure) -> None:
        if not self.connected:
            return
        self._stop_io()
        self.connected = False
        self._pending.clear()
        producer, self._producer = self._producer, None
        self._tcp.connectionLost(reason)
        if producer is not None:
            producer.stopProducing()
        protocol, self.protocol = self.protocol, DetachedProtocol()
        protocol.connectionLost(reason)

    def _stop_io(self) -> None:
        self.pauseProducing()
        self._stop_writing()

    def _start_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self.reactor.addWriter(self)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self.reactor.removeWriter(self)
