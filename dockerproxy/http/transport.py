"""Transport on a socket taken over from Twisted; `TLSTransport` in tls.py is its TLS variant.

Twisted accepts the connection, and then these transports take over its socket. This has two benefits:

- OpenSSL reads and writes the socket without a memory BIO, which halves the CPU time per byte. Measured: 1.07 s per GiB
  instead of 2.5 s through `TLSMemoryBIOProtocol`; nginx needs 1.08 s.
- A write goes to the kernel immediately if that accepts it. A small response needs no extra reactor iteration, and
  nothing is buffered for a client that keeps reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum, auto
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
_MIN_WRITE = 4 * 1024  # bytes passed to the kernel in any case, even if it reports no free space
# The kernel buffers up to 4 MiB (tcp_wmem) of output per client. With many slow clients it runs out of TCP memory
# (tcp_mem) and then accepts less than the free space that it reported. The unsent bytes in the kernel are therefore
# limited to `_SLOW_SEND_BUFFER` until the client has proved fast. If no bytes are unsent at the next write, the limit
# grows to the number of bytes sent so far, and ends once that is `_FAST_AFTER_DRAINED`. It also ends once the client
# has acknowledged `_FAST_AFTER` bytes.
_SLOW_SEND_BUFFER = 128 * 1024
_FAST_AFTER_DRAINED = 1024 * 1024
_FAST_AFTER = 4 * 1024 * 1024

_SO_MEMINFO = 55  # since Linux 4.12; not in socket(7), but in asm-generic/socket.h and linux/sock_diag.h
_MEMINFO = struct.Struct("@9I")
_UCRED = struct.Struct("@iII")  # of SO_PEERCRED, see unix(7): process ID, user ID, group ID
_MEMINFO_SNDBUF, _MEMINFO_WMEM_QUEUED = 3, 5  # indexes SK_MEMINFO_SNDBUF, SK_MEMINFO_WMEM_QUEUED
_TCP_NOTSENT_LOWAT = 25  # tcp(7); Python's socket module has it since 3.12
_SIOCOUTQ = termios.TIOCOUTQ  # of a TCP socket the bytes that the peer has not acknowledged; see tcp(7)
_SIOCOUTQNSD = 0x894B  # linux/sockios.h; not in tcp(7)


def limit_unsent(sock: socket.socket) -> None:
    """Make the kernel accept only so many bytes that little of them is unsent, unless the socket is a Unix socket."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _SLOW_SEND_BUFFER)


class TransportState(Enum):
    """The states of a transport::

        HANDSHAKE ──► OPEN ──► FLUSHING ──► CLOSED
            └───────────┴─────────┴──► BROKEN or RESET ──► CLOSED

    Reading may be paused in HANDSHAKE and OPEN. The producer is paused while bytes are buffered.
    """

    HANDSHAKE = auto()
    """Writes are buffered, because no application data can be sent yet (TLS)."""
    OPEN = auto()
    """Writes go to the kernel. Bytes that it does not accept are buffered."""
    FLUSHING = auto()
    """After `loseConnection`: the buffered bytes are sent. Input is not read, and writes are ignored."""
    BROKEN = auto()
    """After a failed write or handshake: writes are ignored. `doWrite` reports the loss."""
    RESET = auto()
    """After `abortConnection`: writes are ignored. The loss is reported in the next reactor iteration."""
    CLOSED = auto()
    """The loss was reported, or the socket was detached."""


_WRITABLE = (TransportState.HANDSHAKE, TransportState.OPEN)  # not a set: members of an Enum hash in Python code


class DetachedProtocol(Protocol):
    """A placeholder protocol for Twisted's own transport after its socket was taken over."""


@implementer(ITransport, IReadWriteDescriptor, IPushProducer)
class SocketTransport:
    """A transport on a connected TCP or Unix socket, taken over from Twisted's transport `tcp`.

    It is an `ITransport` for `protocol` and an `IConsumer` for one push producer. The producer is paused as soon as the
    kernel accepts no more, and resumed when the pending bytes are written. `sent` counts the bytes accepted by the
    kernel.
    """

    __slots__ = (
        "_fast_client",
        "_fileno",
        "_is_unix",
        "_lost_reason",
        "_notsent_lowat",
        "_pending",
        "_producer",
        "_producer_paused",
        "_read_size",
        "_reading",
        "_retry_size",
        "_socket",
        "_state",
        "_tcp",
        "_writing",
        "protocol",
        "reactor",
        "sent",
        "write_immediately",
    )  # fmt: skip

    max_read = READ_SIZE
    """Bytes to read in one reactor iteration, at most, so that other connections are served too."""

    def __init__(self, reactor: Any, tcp: Any) -> None:
        self.reactor = reactor
        self._tcp = tcp
        self._socket: socket.socket = tcp.getHandle()
        self._fileno = self._socket.fileno()
        self._pending: list[bytes | memoryview] = []  # a deque would take 760 bytes
        self._producer: IPushProducer | None = None
        self._producer_paused = False
        self._reading = self._writing = False
        self._read_size = self.max_read
        self._retry_size = 0  # bytes of a failed SSL_write, which OpenSSL requires to be retried; 0 if there is none
        self._state = TransportState.OPEN
        self._is_unix = self._socket.family == socket.AF_UNIX  # cached because `family` creates an enum on each access
        self._fast_client = self._is_unix  # whether the send buffer is no longer limited
        self._notsent_lowat = 0  # current TCP_NOTSENT_LOWAT in bytes; 0 if it was not set
        self._lost_reason: Exception = CONNECTION_LOST
        self.protocol: IProtocol = DetachedProtocol()
        self.sent = 0
        # If False, `write` leaves sending to the reactor, and pending input is read first. A peer's last message is
        # then received before a failed write is noticed, after which OpenSSL reads nothing more.
        self.write_immediately = True

    def take_over(self, protocol: IProtocol) -> None:
        """Take the socket from Twisted's transport and attach `protocol`."""
        self._tcp.stopReading()
        self._tcp.stopWriting()
        if not isinstance(self._tcp.protocol, DetachedProtocol):
            self._tcp.protocol = DetachedProtocol()
        if not self._is_unix:
            self._tcp.setTcpNoDelay(True)
            self._tcp.setTcpKeepAlive(True)
        self.set_protocol(protocol)

    def set_protocol(self, protocol: IProtocol) -> None:
        """Deliver all further input to `protocol`."""
        self.protocol = protocol
        self.resumeProducing()
        protocol.makeConnection(self)

    def detach(self) -> tuple[Any, Any, bytes]:
        """Give up the socket for another transport; return the reactor, Twisted's transport and the unsent bytes."""
        pending = b"".join(self._pending)
        self._pending.clear()
        self._stop_io()
        self._state = TransportState.CLOSED
        self.protocol = DetachedProtocol()
        return self.reactor, self._tcp, pending

    @property
    def acknowledged(self) -> int:
        """The bytes that the peer has received, as far as the kernel knows. With TLS it is an estimate."""
        try:
            queued = int.from_bytes(fcntl.ioctl(self._fileno, _SIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return self.sent
        return self.sent - queued

    @property
    def connected(self) -> bool:
        """Whether the transport has its socket, and the protocol was not told of a loss."""
        return self._state is not TransportState.CLOSED

    # ITransport

    def write(self, data: bytes) -> None:
        """Pass `data` to the kernel, and buffer the bytes that it does not accept yet."""
        if self._state not in _WRITABLE or not data:
            return
        if len(data) > RECORD_SIZE and not self._fast_client and not self._notsent_lowat:
            self._notsent_lowat = _SLOW_SEND_BUFFER
            limit_unsent(self._socket)
        if self.write_immediately and self._can_send_now():
            sent = self._send(data)
            if sent == len(data):
                return
            if sent:
                data = memoryview(data)[sent:]  # type: ignore[assignment]
        self._enqueue(data)

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Pass as much of `data` to the kernel as it has room for; return the number of bytes, at least one.

        The caller passes the rest again when its producer is resumed. Nothing is then buffered here for a slow client.
        With TLS, a record that the kernel does not accept would be buffered twice, 16 KiB each, because OpenSSL keeps
        the encrypted record and requires the same plaintext for the retry.
        """
        if self._state not in _WRITABLE:
            return len(data)
        space = self._send_space() if len(data) >= RECORD_SIZE else 2 * RECORD_SIZE
        size = min(len(data), max(_MIN_WRITE, space))
        sent = self._send(memoryview(data)[:size]) if self._can_send_now() else 0
        if sent < size:
            buffered = bytes(memoryview(data)[sent : sent + (self._retry_size or _MIN_WRITE)])
            self._enqueue(buffered)
            return sent + len(buffered)
        if sent < len(data) or space - sent < RECORD_SIZE:
            self._pause_producer()
        return sent

    @property
    def can_sendfile(self) -> bool:
        """Whether bytes go to the peer unencrypted, so that `sendfile` can be used."""
        return True

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        """Pass `size` bytes of a file to the kernel like `write_some`, without copying them (sendfile(2)).

        Raise OSError if they cannot be read.
        """
        if self._state not in _WRITABLE:
            return size
        sent = self._sendfile(descriptor, offset, size) if self._can_send_now() else 0
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
        """Close after all pending bytes have been sent."""
        if self._state is TransportState.HANDSHAKE:
            self.abortConnection()  # nothing can be sent yet, and the peer may never complete the handshake
        elif self._state is TransportState.OPEN:
            self._state = TransportState.FLUSHING
            self.pauseProducing()
            self._start_writing()
        elif self._state is TransportState.BROKEN:
            self.pauseProducing()

    def abortConnection(self) -> None:
        """Reset the connection and drop pending bytes. The peer cannot mistake this for a regular close."""
        if self._state in (TransportState.HANDSHAKE, TransportState.OPEN, TransportState.FLUSHING):
            self._state = TransportState.RESET
            self._pending.clear()
            self._stop_io()
            self.reactor.callLater(0, self._call_connection_lost, Failure(ConnectionAborted()))  # type: ignore[no-untyped-call]

    def getHandle(self) -> socket.socket:
        """Return the socket, for its options."""
        return self._socket

    def getPeer(self) -> IAddress:
        address: IAddress = self._tcp.getPeer()
        return address

    def getHost(self) -> IAddress:
        address: IAddress = self._tcp.getHost()
        return address

    @property
    def peer_uid(self) -> int | None:
        """The user ID of the process that connected to our Unix socket (SO_PEERCRED, unix(7)); None if it is TCP."""
        if not self._is_unix:
            return None
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid: int = _UCRED.unpack(credentials)[1]
        return uid

    def _can_send_now(self) -> bool:
        return not self._pending and self._state is TransportState.OPEN

    def _enqueue(self, data: bytes | memoryview) -> None:
        self._pending.append(data)
        self._pause_producer()

    def _pause_producer(self) -> None:
        """Pause the producer until the kernel accepts more."""
        self._start_writing()
        if self._producer is not None and not self._producer_paused:
            self._producer_paused = True
            self._producer.pauseProducing()

    # IConsumer

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self._producer is not None:
            raise RuntimeError("a producer is already registered")
        if not streaming:
            raise ValueError("only push producers are supported")
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
        if self._state in _WRITABLE and not self._reading:
            self._reading = True
            self.reactor.addReader(self)

    def limit_reads(self, limited: bool) -> None:
        """Read pieces of at most `RECORD_SIZE` bytes, or of up to `max_read` bytes, as a new transport does."""
        self._read_size = RECORD_SIZE if limited else self.max_read

    def read_for_relay(self) -> None:
        """Read pieces of at most `READ_SIZE` bytes, because a slow connection to which they are copied takes less."""
        self._read_size = READ_SIZE

    def stopProducing(self) -> None:
        self.loseConnection()

    # IReadWriteDescriptor, called by the reactor

    def fileno(self) -> int:
        return self._fileno if self.connected else -1

    def logPrefix(self) -> str:
        return type(self.protocol).__name__

    def doRead(self) -> Any:
        try:
            data = self._socket.recv(self._read_size)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def doWrite(self) -> Any:
        while self._pending and self._state is not TransportState.BROKEN:
            data = self._pending[0]
            sent = self._send(data)
            if sent < len(data):
                self._pending[0] = memoryview(data)[sent:]
                break
            del self._pending[0]
        if self._state in (TransportState.BROKEN, TransportState.RESET):
            return self._lost_reason
        if self._pending:
            return None
        self._stop_writing()
        if self._state is TransportState.FLUSHING:
            self._send_close_notify()
            return CONNECTION_DONE
        if self._producer is not None and self._producer_paused:
            self._producer_paused = False
            self._producer.resumeProducing()
        return None

    def connectionLost(self, reason: Failure) -> None:
        if self._state is not TransportState.RESET:  # the reactor may find another reason than the reset
            self._call_connection_lost(reason)

    # Socket

    def _send_space(self) -> int:
        """Return an estimate of the bytes that the kernel has room for.

        If the kernel accepts less than that, the rest of the record is buffered here.
        """
        try:
            meminfo: tuple[int, ...] = _MEMINFO.unpack(
                self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            )
            free, queued = meminfo[_MEMINFO_SNDBUF] - meminfo[_MEMINFO_WMEM_QUEUED], meminfo[_MEMINFO_WMEM_QUEUED]
            space = free - free // 4  # the kernel's own overhead per segment counts as well
            return space if self._fast_client else min(space, self._slow_client_space(queued))
        except (OSError, struct.error):
            return RECORD_SIZE

    def _slow_client_space(self, queued: int) -> int:
        """Return the room under the limit for slow clients, and adjust or end that limit.

        `queued` is the number of bytes sent that the client has not acknowledged.
        """
        unsent = int.from_bytes(fcntl.ioctl(self._fileno, _SIOCOUTQNSD, bytes(4)), sys.byteorder)
        if self.sent - queued >= _FAST_AFTER or (self.sent >= _FAST_AFTER_DRAINED and not unsent):
            lowat = 0  # the kernel's default: no limit
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
        return lowat - lowat // 16 - unsent  # a TLS record is somewhat longer than its content

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """Pass `data` to the kernel and return the number of bytes accepted."""
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
        """Announce a regular close to the peer, if the protocol has a message for that (TLS does)."""

    def _mark_broken(self) -> None:
        self._state = TransportState.BROKEN
        self._start_writing()  # the reactor then calls doWrite, which reports the loss outside of the caller's call

    def _call_connection_lost(self, reason: Failure) -> None:
        if not self.connected:
            return
        self._stop_io()
        self._state = TransportState.CLOSED
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
