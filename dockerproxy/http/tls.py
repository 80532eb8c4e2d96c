"""TLS transport in which OpenSSL reads and writes the socket directly, without copies through a memory BIO."""

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

# Sent to a client that speaks plain HTTP on a TLS port. Go's net/http sends the same text, which users know.
_TLS_EXPECTED_RESPONSE = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)
_PLAIN_HTTP_ERRORS = ("http request", "https proxy request")  # OpenSSL's reasons for this error

_SMALL_RECORD = 1024  # bytes: a shorter record is probably a request, and a longer one content
_MAX_READ = 512 * 1024  # bytes per reactor iteration, so that other connections are served too
# All connections decrypt into this shared buffer, from which the data is copied once. `SSL.Connection.recv` would
# allocate memory for each record, copy it twice, and leave the records to be joined: 0.2 s more CPU time per GB.
_READ_BUFFER = ffi.new_allocator(should_clear_after_alloc=False)("char[]", _MAX_READ)

# Modes of SSL_CTX_set_mode(3). pyOpenSSL has no names for them.
_MODE_ENABLE_PARTIAL_WRITE, _MODE_ACCEPT_MOVING_WRITE_BUFFER = 0x1, 0x2
# Whether one call can write several records. This requires clearing a mode that pyOpenSSL sets on every context.
_MULTI_RECORD_WRITES = hasattr(SSL.Context, "clear_mode")
_MAX_WRITE = 256 * 1024 if _MULTI_RECORD_WRITES else RECORD_SIZE  # bytes per SSL_write

# Alerts of RFC 8446, section 6.2, as OpenSSL spells them.
_UNTRUSTED_CERTIFICATE_ALERTS = ("unknown ca", "certificate unknown", "bad certificate")


@implementer(IOpenSSLServerConnectionCreator)
@frozen
class ServerContext:
    """The OpenSSL contexts of a server's connections.

    `ticket_context` holds the ticket keys. OpenSSL uses those of the context that a connection was created with, even
    if the connection changes to another context later. A session is resumed only if the context then in use has the
    same session id context (`SSL_CTX_set_session_id_context`).

    `certificate_context` holds the certificate and that session id context. It is None if `ticket_context` selects a
    certificate itself.
    """

    ticket_context: SSL.Context
    certificate_context: SSL.Context | None = None

    def create_connection(self, handle: socket.socket | None) -> SSL.Connection:
        """Return the server side of a connection on the socket `handle`, or on a memory BIO if that is None."""
        connection = SSL.Connection(self.ticket_context, handle)
        self.apply_to(connection)
        connection.set_accept_state()
        return connection

    def apply_to(self, connection: SSL.Connection) -> None:
        """Switch `connection` to this certificate, even if it was created with another `ticket_context`."""
        if self.certificate_context is not None:
            connection.set_context(self.certificate_context)

    def serverConnectionForTLS(self, protocol: object) -> SSL.Connection:
        return self.create_connection(None)


class TLSTransport(SocketTransport):
    """TLS on a socket taken over from Twisted.

    `tls` is a connection on that socket, in accept or connect state, whose context was prepared by `set_mode`.
    `plaintext` is sent unencrypted before the handshake. A protocol that provides `IHandshakeListener` is notified when
    the handshake is complete. If it fails, the protocol's `connectionLost` receives the `SSL.Error`.
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
        """Attach `protocol` and wait for the peer to start the handshake, unless `start_handshake` is called."""
        super().set_protocol(protocol)
        if self._plaintext:
            self._start_writing()

    def start_handshake(self) -> None:
        """Start the handshake as the client."""
        if self.connected and not self._broken:
            self._start_writing()

    def resumeProducing(self) -> None:
        # Input before `plaintext` is sent stays unread, and would wake the reactor in every iteration.
        if not self._plaintext:
            super().resumeProducing()

    @classmethod
    def server(cls, reactor: Any, tcp: Any, context: ServerContext, plaintext: bytes = b"") -> TLSTransport:
        """Return a transport for the server side that uses `context`."""
        return cls(reactor, tcp, context.create_connection(tcp.getHandle()), plaintext)

    def doRead(self) -> Any:
        if self._ready:
            return self._read_records()
        # Cork the socket so that three parts share a segment: the end of the handshake, two tickets, and the response
        # to data that arrived with the client's last handshake message. Separate segments would cost both sides more.
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
                break  # probably the last record for now: another read would cost more than a reactor iteration
        reason = self._read_end_reason(received) if received <= 0 else None
        if size:
            self.protocol.dataReceived(ffi.buffer(_READ_BUFFER, size)[:])
        return reason

    def _read_end_reason(self, result: int) -> Exception | None:
        """Return the reason for the end of input after `SSL_read` returned `result`, or None if more may arrive."""
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
        """Continue the handshake and return whether it is complete."""
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
            self._socket.recv(READ_SIZE)  # closing a socket with unread data resets it, and the response is lost
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
        """Set or clear TCP_CORK, so that the kernel sends full segments only; return whether the socket supports it.

        OpenSSL makes a system call for each record, and the kernel would send each one separately. That takes a third
        more CPU time per byte (measured on loopback with server and client on a core each).
        """
        if self._is_unix:
            return False
        with suppress(OSError):  # the peer is gone; the next write reports it
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        return True

    def _send_close_notify(self) -> None:
        with suppress(SSL.Error):  # the peer is gone already
            self._tls.shutdown()


def upgrade_to_tls(transport: SocketTransport, context: ServerContext, protocol: IProtocol, received: bytes) -> None:
    """Start TLS as the server on a plain transport and attach `protocol`.

    `received` holds bytes of the TLS stream that were already read from the socket.
    """
    if not received:
        reactor, tcp, pending = transport.detach()
        TLSTransport.server(reactor, tcp, context, pending).set_protocol(protocol)
        return
    # The client sent its ClientHello before our response to CONNECT. OpenSSL cannot be fed bytes that were already read
    # from its socket, so this connection needs a memory BIO.
    factory = TLSMemoryBIOFactory(context, False, SingleProtocolFactory(protocol), transport.reactor)
    wrapper: Any = factory.buildProtocol(transport.getPeer())
    transport.set_protocol(wrapper)
    wrapper.dataReceived(received)


def set_mode(context: SSL.Context) -> None:
    """Set the modes that `TLSTransport` needs on `context`.

    A write may be retried from another address, which pyOpenSSL 25.0 does not allow by default. An idle connection
    releases its buffers of 34 KiB. One call writes several records, if pyOpenSSL can enable that.
    """
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_ACCEPT_MOVING_WRITE_BUFFER)
    if _MULTI_RECORD_WRITES:
        context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)


def describe_handshake_error(error: SSL.Error) -> str:
    """Return the reason of a failed handshake: OpenSSL's text, or a hint if the client rejected our certificate."""
    reasons = [str(entry[-1]) for entry in error.args[0]] if error.args and isinstance(error.args[0], list) else []
    if any(distrust in reason for reason in reasons for distrust in _UNTRUSTED_CERTIFICATE_ALERTS):
        return "the client does not trust this proxy's CA; install the certificate from /ca.crt on it"
    return "; ".join(reasons) or "the client closed the connection"


class SingleProtocolFactory(Factory):
    """A factory whose `buildProtocol` returns the given protocol. Use it for one connection."""

    noisy = False

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, address: object) -> Any:
        return self._protocol
