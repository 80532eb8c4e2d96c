"""TLS on a socket of ours: OpenSSL has the socket itself, so that nothing is copied on its way."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

from attrs import frozen
from OpenSSL import SSL
from OpenSSL._util import ffi, lib  # private; Twisted needs it too (`twisted.internet._sslverify`)
from twisted.internet.interfaces import IHandshakeListener, IOpenSSLServerConnectionCreator, IProtocol
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from dockerproxy.http.transport import READ_SIZE, RECORD_SIZE, SocketTransport

# To a client that begins with a request where TLS is expected; in these words it is known from servers in Go.
_TLS_EXPECTED_RESPONSE = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)
_PLAIN_HTTP_ERRORS = ("http request", "https proxy request")  # OpenSSL's words for that

_SMALL_RECORD = 1024  # bytes: a record that is shorter is a request rather than content
_MAX_READ = 512 * 1024  # bytes; then other connections get their turn
# What is read from a connection is decrypted to here, and copied from here once: `SSL.Connection.recv` takes memory for
# each record, copies it twice, and leaves the records to be joined, for which a GB takes 0.2 s more of CPU time.
_READ_BUFFER = ffi.new_allocator(should_clear_after_alloc=False)("char[]", _MAX_READ)

_MODE_ENABLE_PARTIAL_WRITE, _MODE_ACCEPT_MOVING_WRITE_BUFFER = (
    0x1,
    0x2,
)  # of SSL_CTX_set_mode(3); pyOpenSSL has no names for them
_MULTI_RECORD_WRITES = hasattr(
    SSL.Context, "clear_mode"
)  # whether OpenSSL can be had to write several records by one call
_MAX_WRITE = 256 * 1024 if _MULTI_RECORD_WRITES else RECORD_SIZE  # bytes that OpenSSL is given by one call

_UNTRUSTED_CERTIFICATE_ALERTS = (
    "unknown ca",
    "certificate unknown",
    "bad certificate",
)  # alerts (RFC 8446, section 6.2)


@implementer(IOpenSSLServerConnectionCreator)
@frozen
class ServerContext:
    """What a server's connections are made of.

    OpenSSL resumes a session for all connections that are created of the same context, by the ticket keys of that
    (`sessions`), whatever context they change to; there, a session is of those alone whose contexts have its session id
    (`SSL_CTX_set_session_id_context`). `shown` has the certificate and that id, unless `sessions` chooses one itself.
    """

    ticket_context: SSL.Context
    certificate_context: SSL.Context | None = None

    def create_connection(self, handle: socket.socket | None) -> SSL.Connection:
        """Return the server's side of a connection on a socket, or on memory."""
        connection = SSL.Connection(self.ticket_context, handle)
        self.apply_to(connection)
        connection.set_accept_state()
        return connection

    def apply_to(self, connection: SSL.Connection) -> None:
        """Have a connection, which may be one of other `sessions`, go on with what is shown here."""
        if self.certificate_context is not None:
            connection.set_context(self.certificate_context)

    def serverConnectionForTLS(self, protocol: object) -> SSL.Connection:
        return self.create_connection(None)


class TLSTransport(SocketTransport):
    """TLS on a taken-over socket, by `tls`, which knows the socket and its side and has a context as of `set_mode`.

    `preface` is sent in the clear before the handshake. An `IHandshakeListener` is told when that is complete; where
    it fails, the protocol's `connectionLost` gets the `SSL.Error`.
    """

    __slots__ = ("_plaintext", "_tls")

    def __init__(self, reactor: Any, tcp: Any, tls: SSL.Connection, plaintext: bytes = b"") -> None:
        super().__init__(reactor, tcp)
        self._tls = tls
        self._ready = False
        self._plaintext = plaintext

    @property
    def can_sendfile(self) -> bool:
        return False

    def set_protocol(self, protocol: IProtocol) -> None:
        """Wait for the other side to begin with the handshake, unless we `greet`; then it is `protocol`'s."""
        super().set_protocol(protocol)
        if self._plaintext:
            self._start_writing()

    def start_handshake(self) -> None:
        """Begin with the handshake, as the client."""
        if self.connected and not self._broken:
            self._start_writing()

    def resumeProducing(self) -> None:
        if (
            not self._plaintext
        ):  # what comes before that is sent would not be read, and wake the reactor again and again
            super().resumeProducing()

    @classmethod
    def server(cls, reactor: Any, tcp: Any, context: ServerContext, plaintext: bytes = b"") -> TLSTransport:
        """Return the server's side, as `context` has it."""
        return cls(reactor, tcp, context.create_connection(tcp.getHandle()), plaintext)

    def doRead(self) -> Any:
        if self._ready:
            return self._read_records()
        # What ends the handshake, two tickets, and the answer to what came with the client's last words of it go out
        # together: each by itself would cost both sides a segment.
        corked = self._cork(True)
        try:
            if self._do_handshake():
                return self._read_records()
            return self._lost_reason if self._broken else None
        finally:
            if corked:
                self._cork(False)

    def _read_records(self) -> Any:
        read, tls, size, received = lib.SSL_read, self._tls._ssl, 0, 0
        while size <= _MAX_READ - RECORD_SIZE:
            received = read(tls, _READ_BUFFER + size, RECORD_SIZE)
            if received <= 0:
                break
            size += received
            if received < _SMALL_RECORD:
                break  # most often the last for now, and if not, the reactor says so: to find out costs more
        reason = self._read_end_reason(received) if received <= 0 else None
        if size:
            self.protocol.dataReceived(ffi.buffer(_READ_BUFFER, size)[:])
        return reason

    def _read_end_reason(self, result: int) -> Exception | None:
        """Return why nothing more can be read, after `SSL_read` had this `result`; None where it may be later."""
        try:
            self._tls._raise_ssl_error(self._tls._ssl, result)
        except (SSL.WantReadError, SSL.WantWriteError):
            return None
        except SSL.ZeroReturnError:
            return CONNECTION_DONE
        except SSL.Error:
            pass
        return CONNECTION_LOST

    def doWrite(self) -> Any:
        if self._plaintext:
            self._plaintext = self._plaintext[super()._send(self._plaintext) :]
            if self._plaintext:
                return CONNECTION_LOST if self._broken else None
            self.resumeProducing()
        if not self._ready and not self._do_handshake():
            return self._lost_reason if self._broken else None
        if not self.write_immediately and self._reading and (reason := self.doRead()) is not None:
            return reason
        return super().doWrite()

    def _do_handshake(self) -> bool:
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
            self._lost_reason = error
            if describe_handshake_error(error) in _PLAIN_HTTP_ERRORS:
                self._refuse_plain_http()
            self._mark_broken()
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
            self._socket.recv(READ_SIZE)  # what is unread when a socket is closed resets it, and the answer is lost
        with suppress(OSError):
            self._socket.send(_TLS_EXPECTED_RESPONSE)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        view, sent = memoryview(data), 0
        corked = len(view) > RECORD_SIZE and self._cork(True)
        try:
            while sent < len(view):
                size = self._retry_size = self._retry_size or min(len(view) - sent, _MAX_WRITE)
                sent += self._tls.send(view[sent : sent + size])
                self._retry_size = 0
        except (SSL.WantWriteError, SSL.WantReadError):
            pass
        except SSL.Error:
            self._mark_broken()
        if corked:
            self._cork(False)
        self.sent += sent
        return sent

    def _cork(self, corked: bool) -> bool:
        """Have the kernel wait for full segments, or no longer; return whether it can.

        OpenSSL makes a call for each record, and the kernel would send each by itself: that takes a third more CPU
        time for each byte (measured on loopback, server and client on a core each).
        """
        if self._is_unix:
            return False
        with suppress(OSError):  # the peer is gone, as writing will tell
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        return True

    def _send_close_notify(self) -> None:
        with suppress(SSL.Error):  # the peer is gone already
            self._tls.shutdown()


def upgrade_to_tls(transport: SocketTransport, context: ServerContext, protocol: IProtocol, received: bytes) -> None:
    """Go on with TLS, as the server, for `protocol`; `received` was read from the socket before."""
    if not received:
        reactor, tcp, pending = transport.detach()
        TLSTransport.server(reactor, tcp, context, pending).set_protocol(protocol)
        return
    # A client that did not wait for the answer to its CONNECT: OpenSSL cannot be given bytes for a socket.
    factory = TLSMemoryBIOFactory(context, False, SingleProtocolFactory(protocol), transport.reactor)
    wrapper: Any = factory.buildProtocol(transport.getPeer())
    transport.set_protocol(wrapper)
    wrapper.dataReceived(received)


def set_mode(context: SSL.Context) -> None:
    """Set the mode of a context that is for a `TLSTransport`.

    A record may be offered again from another place in memory (which pyOpenSSL 25.0 does not set), a connection without
    traffic keeps no buffers, which are 34 KiB, and several records are written by one call, if that can be.
    """
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_ACCEPT_MOVING_WRITE_BUFFER)
    if _MULTI_RECORD_WRITES:
        context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)


def describe_handshake_error(error: SSL.Error) -> str:
    """Say why a client's handshake failed, as OpenSSL has it; but in our words where our certificate is rejected."""
    reasons = [str(entry[-1]) for entry in error.args[0]] if error.args and isinstance(error.args[0], list) else []
    if any(distrust in reason for reason in reasons for distrust in _UNTRUSTED_CERTIFICATE_ALERTS):
        return "the client does not trust our CA (/ca.crt)"
    return "; ".join(reasons) or "the client hung up"


class SingleProtocolFactory(Factory):
    """A factory that gives the one protocol it was made with."""

    noisy = False

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, address: object) -> Any:
        return self._protocol
