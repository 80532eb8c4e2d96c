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
import termios
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from OpenSSL import SSL
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import (
    IAddress,
    IHandshakeListener,
    IOpenSSLServerConnectionCreator,
    IProtocol,
    IPushProducer,
    IReadWriteDescriptor,
    ITransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

# To a client that begins with a request where TLS is expected; in these words it is known from servers in Go.
_TLS_EXPECTED = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)
_NO_TLS = ("http request", "https proxy request")  # OpenSSL's words for that

_READ_SIZE = 64 * 1024
_WORD = 1024  # bytes: a record that is shorter is a request rather than content
_READS_AT_ONCE = 8  # then other connections get their turn

_RECORD = 16 * 1024  # bytes of content in a TLS record (RFC 8446, section 5.1)
# A record that the kernel did not take waits here twice: encrypted, and as OpenSSL wants to be given it once more. With
# a client that reads slowly it comes to that before more was sent than the kernel keeps for a connection (4 MiB by
# tcp_wmem). Until then records are small; a large one costs less for each byte.
_FIRST_RECORD = 8 * 1024
_QUICK = 4 * 1024 * 1024

_PARTIAL_WRITE, _MOVING_BUFFER = 0x1, 0x2  # of SSL_CTX_set_mode(3); pyOpenSSL has no names for them
_SEVERAL = hasattr(SSL.Context, "clear_mode")  # whether OpenSSL can be had to write several records by one call

_DISTRUST = ("unknown ca", "certificate unknown", "bad certificate")  # alerts (RFC 8446, section 6.2)

log = Logger()


class Yielded(Protocol):
    """What Twisted's own transport is left with once its socket is taken over."""


@implementer(ITransport, IReadWriteDescriptor, IPushProducer)
class SocketTransport:
    """A connected TCP or Unix socket, taken over from Twisted's transport `tcp`.

    An `ITransport` for `protocol`, and an `IConsumer` for one push producer: it is paused as soon as the kernel takes
    no more, and resumed when all is handed over. `sent` counts bytes given to the kernel: what a time-out looks at.
    """

    def __init__(self, reactor: Any, tcp: Any) -> None:
        self._reactor = reactor
        self._tcp = tcp
        self._socket: socket.socket = tcp.getHandle()
        self._fileno = self._socket.fileno()
        self._pending: deque[bytes | memoryview] = deque()
        self._producer: IPushProducer | None = None
        self._producer_paused = False
        self._reading = self._writing = False
        self._offered = 0  # bytes that OpenSSL could not send, and has to be offered once more; 0: none
        self._ready = True  # whether application data can be written: TLS first shakes hands
        self._broken = self._aborted = False
        self._reason: Exception = CONNECTION_LOST
        self.protocol: IProtocol = Yielded()
        self.connected = True
        self.disconnecting = False
        self.sent = 0
        # Whether `write` sends at once. Else that is left to the reactor, and what can be read is read before: so a
        # peer's last words are heard before it is found that it takes no more (after which OpenSSL reads nothing).
        self.eager = True

    def start(self, protocol: IProtocol) -> None:
        """Take the socket from Twisted's transport and give `protocol` what arrives from now on."""
        self._tcp.stopReading()
        self._tcp.stopWriting()
        if not isinstance(self._tcp.protocol, Yielded):
            self._tcp.protocol = Yielded()
        if self._socket.family != socket.AF_UNIX:
            self._tcp.setTcpNoDelay(True)
            self._tcp.setTcpKeepAlive(True)
        self.protocol = protocol
        self.resumeProducing()
        protocol.makeConnection(self)

    def hand_over(self, protocol: IProtocol) -> None:
        """Give `protocol` what arrives from now on."""
        self.protocol = protocol
        protocol.makeConnection(self)
        self.resumeProducing()

    def upgrade(self, context: SSL.Context, protocol: IProtocol, received: bytes) -> None:
        """Go on with TLS, as the server, for `protocol`; `received` was read from the socket before."""
        if received:
            self._upgrade_in_memory(context, protocol, received)
            return
        pending = b"".join(self._pending)
        self._pending.clear()
        self._stop()
        self.connected = False
        self.protocol = Yielded()
        TLSTransport.server(self._reactor, self._tcp, context, pending).start(protocol)

    def _upgrade_in_memory(self, context: SSL.Context, protocol: IProtocol, received: bytes) -> None:
        # A client that did not wait for the answer to its CONNECT: OpenSSL cannot be given bytes for a socket.
        factory = TLSMemoryBIOFactory(_ServerContext(context), False, _Once(protocol), self._reactor)
        wrapper: Any = factory.buildProtocol(self.getPeer())
        self.hand_over(wrapper)
        wrapper.dataReceived(received)

    # ITransport

    def write(self, data: bytes) -> None:
        """Hand `data` to the kernel, and keep what it does not take yet."""
        if not self.connected or self.disconnecting or self._broken or not data:
            return
        if not self._pending and self._ready and self.eager:
            sent = self._send(data)
            if sent == len(data):
                return
            if sent:
                data = memoryview(data)[sent:]  # type: ignore[assignment]
        self._keep(data)

    def offer(self, data: bytes | bytearray) -> int:
        """Hand as much of `data` to the kernel as it takes, and keep little of the rest; return how much was taken.

        That is at least one byte. Whoever can get at the rest again offers that when the producer is resumed, and so
        a client that reads slowly costs less memory than by `write`.
        """
        if not self.connected or self.disconnecting or self._broken:
            return len(data)
        sent = self._send(data) if not self._pending and self._ready else 0
        kept = bytes(memoryview(data)[sent : sent + (self._offered or self._record())])
        if kept:
            self._keep(kept)
        return sent + len(kept)

    @property
    def takes_files(self) -> bool:
        """Whether bytes of a file can go to the peer as they are (`offer_file`)."""
        return True

    def offer_file(self, descriptor: int, offset: int, size: int) -> int:
        """Hand `size` bytes of a file to the kernel as `offer` does; they are not copied on the way (sendfile(2)).

        Raise OSError where they cannot be read.
        """
        if not self.connected or self.disconnecting or self._broken:
            return size
        sent = self._send_file(descriptor, offset, size) if not self._pending else 0
        kept = os.pread(descriptor, min(size - sent, _RECORD), offset + sent) if sent < size else b""
        if kept:
            self._keep(kept)
        return sent + len(kept)

    def _send_file(self, descriptor: int, offset: int, size: int) -> int:
        try:
            sent = os.sendfile(self._fileno, descriptor, offset, size)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
            self._break()
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
            self._stop()
            self._reactor.callLater(0, self._lose, Failure(ConnectionAborted()))  # type: ignore[no-untyped-call]

    def getPeer(self) -> IAddress:
        address: IAddress = self._tcp.getPeer()
        return address

    def getHost(self) -> IAddress:
        address: IAddress = self._tcp.getHost()
        return address

    def _keep(self, data: bytes | memoryview) -> None:
        self._pending.append(data)
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
            self._reactor.removeReader(self)

    def resumeProducing(self) -> None:
        if self.connected and not self.disconnecting and not self._reading:
            self._reading = True
            self._reactor.addReader(self)

    def stopProducing(self) -> None:
        self.loseConnection()

    # IReadWriteDescriptor: what the reactor calls

    def fileno(self) -> int:
        return self._fileno if self.connected else -1

    def logPrefix(self) -> str:
        return type(self.protocol).__name__

    def doRead(self) -> Any:
        try:
            data = self._socket.recv(_READ_SIZE)
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
            self._pending.popleft()
        if self._broken:
            return CONNECTION_LOST
        if self._pending:
            return None
        self._stop_writing()
        if self.disconnecting:
            self._say_goodbye()
            return CONNECTION_DONE
        if self._producer is not None and self._producer_paused:
            self._producer_paused = False
            self._producer.resumeProducing()
        return None

    def connectionLost(self, reason: Failure) -> None:
        if not self._aborted:  # else that is how it ends, and not as the reactor finds it in the middle of that
            self._lose(reason)

    # the socket

    def _record(self) -> int:
        """Return how many bytes are encrypted together."""
        return _FIRST_RECORD if self.sent < _QUICK else _RECORD

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """Return how many bytes the kernel took."""
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._break()
            return 0
        self.sent += sent
        return sent

    def _say_goodbye(self) -> None:
        """Tell the peer that the end is meant, where the protocol has a word for it."""

    def _break(self) -> None:
        self._broken = True
        self._start_writing()  # the reactor comes to doWrite, which reports it: never from within a call of ours

    def _lose(self, reason: Failure) -> None:
        if not self.connected:
            return
        self._stop()
        self.connected = False
        self._pending.clear()
        producer, self._producer = self._producer, None
        self._tcp.connectionLost(reason)
        if producer is not None:
            producer.stopProducing()
        protocol, self.protocol = self.protocol, Yielded()
        protocol.connectionLost(reason)

    def _stop(self) -> None:
        self.pauseProducing()
        self._stop_writing()

    def _start_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self._reactor.addWriter(self)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._reactor.removeWriter(self)


class TLSTransport(SocketTransport):
    """TLS on a taken-over socket, by `tls`, which knows the socket and its side and has a context as of `set_mode`.

    `preface` is sent in the clear before the handshake. An `IHandshakeListener` is told when that is complete; where
    it fails, the protocol's `connectionLost` gets the `SSL.Error`.
    """

    def __init__(self, reactor: Any, tcp: Any, tls: SSL.Connection, preface: bytes = b"") -> None:
        super().__init__(reactor, tcp)
        self._tls = tls
        self._ready = False
        self._preface = preface

    @property
    def takes_files(self) -> bool:
        return False

    def start(self, protocol: IProtocol) -> None:
        """Take the socket, and begin with the handshake."""
        super().start(protocol)
        if self.connected and not self._broken:
            self._start_writing()

    def resumeProducing(self) -> None:
        if not self._preface:  # what comes before that is sent would not be read, and wake the reactor again and again
            super().resumeProducing()

    @classmethod
    def server(cls, reactor: Any, tcp: Any, context: SSL.Context, preface: bytes = b"") -> TLSTransport:
        """Return the server's side, as `context` has it."""
        tls = SSL.Connection(context, tcp.getHandle())
        tls.set_accept_state()
        return cls(reactor, tcp, tls, preface)

    def doRead(self) -> Any:
        if not self._ready and not self._shake_hands():
            return self._reason if self._broken else None
        records: list[bytes] = []
        end: Exception | None = None
        try:
            while len(records) < _READS_AT_ONCE:
                records.append(self._tls.recv(_READ_SIZE))  # one record, 16 KiB at most
                if len(records[-1]) < _WORD:
                    break  # most often the last for now, and if not, the reactor says so: to find out costs more
        except (SSL.WantReadError, SSL.WantWriteError):
            pass
        except SSL.ZeroReturnError:
            end = CONNECTION_DONE
        except SSL.Error:
            end = CONNECTION_LOST
        if records:
            self.protocol.dataReceived(records[0] if len(records) == 1 else b"".join(records))
        return end

    def doWrite(self) -> Any:
        if self._preface:
            self._preface = self._preface[super()._send(self._preface) :]
            if self._preface:
                return CONNECTION_LOST if self._broken else None
            self.resumeProducing()
        if not self._ready and not self._shake_hands():
            return self._reason if self._broken else None
        if not self.eager and self._reading and (end := self.doRead()) is not None:
            return end
        return super().doWrite()

    def _shake_hands(self) -> bool:
        """Go on with the handshake; return whether it is complete."""
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._stop_writing()
            return False
        except SSL.WantWriteError:
            self._start_writing()
            return False
        except SSL.Error as error:
            self._reason = error
            if explain_handshake(error) in _NO_TLS:
                self._refuse_plain_http()
            self._break()
            return False
        self._ready = True
        if self._pending:
            self._start_writing()
        else:
            self._stop_writing()
        if IHandshakeListener.providedBy(self.protocol):
            self.protocol.handshakeCompleted()
        return True

    def _refuse_plain_http(self) -> None:
        with suppress(OSError):
            self._socket.recv(_READ_SIZE)  # what is unread when a socket is closed resets it, and the answer is lost
        with suppress(OSError):
            self._socket.send(_TLS_EXPECTED)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        view, sent = memoryview(data), 0
        try:
            while sent < len(view):
                size = self._offered = self._offered or self._at_once(len(view) - sent)
                sent += self._tls.send(view[sent : sent + size])
                self._offered = 0
        except (SSL.WantWriteError, SSL.WantReadError):
            pass
        except SSL.Error:
            self._break()
        self.sent += sent
        return sent

    def _at_once(self, size: int) -> int:
        """Return how many bytes, of `size`, OpenSSL is to be given at once: whole records, or a last one."""
        record = self._record()
        if record < _RECORD or size <= record or not _SEVERAL:
            return record
        # Several, as far as the kernel has room for them and for what it makes of them: of what it does not take,
        # all has to be kept to be offered again.
        queued = int.from_bytes(fcntl.ioctl(self._fileno, termios.TIOCOUTQ, bytes(4)), "little")
        room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 - queued
        return max(1, room // record) * record

    def _say_goodbye(self) -> None:
        with suppress(SSL.Error):  # the peer is gone already
            self._tls.shutdown()


def set_mode(context: SSL.Context) -> None:
    """Set the mode of a context that is for a `TLSTransport`.

    A record may be offered again from another place in memory (which pyOpenSSL 25.0 does not set), a connection without
    traffic keeps no buffers, which are 34 KiB, and several records are written by one call, if that can be.
    """
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MOVING_BUFFER)
    if _SEVERAL:
        context.clear_mode(_PARTIAL_WRITE)


def explain_handshake(error: SSL.Error) -> str:
    """Say why a client's handshake failed, as OpenSSL has it; but in our words where our certificate is rejected."""
    reasons = [str(entry[-1]) for entry in error.args[0]] if error.args and isinstance(error.args[0], list) else []
    if any(distrust in reason for reason in reasons for distrust in _DISTRUST):
        return "the client does not trust our CA (/ca.crt)"
    return "; ".join(reasons) or "the client hung up"


@implementer(IOpenSSLServerConnectionCreator)
class _ServerContext:
    """An `IOpenSSLServerConnectionCreator` that uses one context."""

    def __init__(self, context: SSL.Context) -> None:
        self._context = context

    def serverConnectionForTLS(self, protocol: object) -> SSL.Connection:
        connection = SSL.Connection(self._context, None)
        connection.set_accept_state()
        return connection


class _Once(Factory):
    """A factory that gives the one protocol it was made with."""

    noisy = False

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, address: object) -> Any:
        return self._protocol
