"""TLS transport in which OpenSSL reads and writes the socket directly, without copies through a memory BIO."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from attrs import frozen
from OpenSSL import SSL
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHandshakeListener, IProtocol
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST

from dockerproxy.http.nested_tls import open_inner_socket
from dockerproxy.http.transport import READ_SIZE, RECORD_SIZE, SocketTransport, TransportState

# Sent to a client that speaks plain HTTP on a TLS port. Go's net/http sends the same text, which users know.
_TLS_EXPECTED_RESPONSE = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)
_PLAIN_HTTP_ERRORS = ("http request", "https proxy request")  # OpenSSL's reasons for this error

_SMALL_RECORD = 1024  # bytes: a shorter record is probably a request, and a longer one content
_MAX_READ = 512 * 1024  # bytes per reactor iteration
# Modes of SSL_CTX_set_mode(3). pyOpenSSL has no names for them.
_MODE_ENABLE_PARTIAL_WRITE, _MODE_ACCEPT_MOVING_WRITE_BUFFER = 0x1, 0x2
# Whether one call can write several records. This requires clearing a mode that pyOpenSSL sets on every context.
_MULTI_RECORD_WRITES = hasattr(SSL.Context, "clear_mode")
_MAX_WRITE = 256 * 1024 if _MULTI_RECORD_WRITES else RECORD_SIZE  # bytes per SSL_write

# Alerts of RFC 8446, section 6.2, as OpenSSL spells them.
_UNTRUSTED_CERTIFICATE_ALERTS = ("unknown ca", "certificate unknown", "bad certificate")


_UNEXPECTED_EOF = (-1,)  # of pyOpenSSL's SysCallError; other values are those of errno


class UnannouncedEnd(ConnectionLost):
    """The peer has ended the connection, but without TLS's close_notify, so that it may have been anybody."""


def make_record_reader() -> tuple[memoryview, Callable[[SSL.Connection, int], int]]:
    """Return a buffer, and a function that decrypts one record of a connection into it.

    Its second argument is the offset in the buffer. It returns the number of bytes, and raises the exceptions of
    `SSL.Connection.recv_into`. That method allocates memory for each record and copies it once more, which takes 0.2 s
    more CPU time per GB. It is therefore used only if pyOpenSSL does not have the private names that avoid that.
    """
    try:
        from OpenSSL._util import ffi, lib  # Twisted needs it too (`twisted.internet._sslverify`)

        ssl_read = lib.SSL_read
        probe = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
        probe._ssl, probe._raise_ssl_error  # noqa: B018
    except (ImportError, AttributeError):
        view = memoryview(bytearray(_MAX_READ))

        def recv_into(connection: SSL.Connection, offset: int) -> int:
            return connection.recv_into(view[offset:], RECORD_SIZE)

        return view, recv_into

    buffer = ffi.new_allocator(should_clear_after_alloc=False)("char[]", _MAX_READ)

    def read_record(connection: SSL.Connection, offset: int) -> int:
        size: int = ssl_read(connection._ssl, buffer + offset, RECORD_SIZE)
        if size <= 0:
            connection._raise_ssl_error(connection._ssl, size)
        return size

    return memoryview(ffi.buffer(buffer)), read_record


# All connections decrypt into one buffer. Only the reactor's thread may read from a connection, and it copies the data
# out before it reads from another one. The GIL would not be enough: OpenSSL runs without it.
_read_buffer, _read_record = make_record_reader()


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


class TLSTransport(SocketTransport):
    """TLS on a socket taken over from Twisted.

    `tls` is a connection on that socket, in accept or connect state, whose context was prepared by `set_mode`.
    `plaintext` is sent unencrypted before the handshake. `received` is the start of the TLS stream if it was already
    read from the socket. A protocol that provides `IHandshakeListener` is notified when the handshake is complete. If
    it fails, the protocol's `connectionLost` receives the `SSL.Error`.
    """

    __slots__ = ("_received", "_tls", "_unencrypted")

    max_read = _MAX_READ

    def __init__(
        self, reactor: Any, tcp: Any, tls: SSL.Connection, plaintext: bytes = b"", received: bytes = b""
    ) -> None:
        super().__init__(reactor, tcp)
        self._tls = tls
        self._state = TransportState.HANDSHAKE
        self._received = received
        self._unencrypted = plaintext  # to be sent around OpenSSL, before OpenSSL sends anything

    @property
    def can_sendfile(self) -> bool:
        return False

    def set_protocol(self, protocol: IProtocol) -> None:
        """Attach `protocol` and wait for the peer to start the handshake, unless `start_handshake` is called."""
        super().set_protocol(protocol)
        if self._unencrypted or self._received:
            self._start_writing()

    def start_handshake(self) -> None:
        """Start the handshake as the client."""
        if self._state is TransportState.HANDSHAKE:
            self._start_writing()

    def resumeProducing(self) -> None:
        # OpenSSL may not read the socket before these bytes. Input would stay unread, and wake the reactor each time.
        if not self._unencrypted and not self._received:
            super().resumeProducing()

    @classmethod
    def server(
        cls, reactor: Any, tcp: Any, context: ServerContext, plaintext: bytes = b"", received: bytes = b""
    ) -> TLSTransport:
        """Return a transport for the server side that uses `context`."""
        return cls(reactor, tcp, context.create_connection(tcp.getHandle()), plaintext, received)

    def doRead(self) -> Any:
        if self._state is not TransportState.HANDSHAKE:
            return self._read_records()
        # Cork the socket so that three parts share a segment: the end of the handshake, two tickets, and the response
        # to data that arrived with the client's last handshake message. Separate segments would cost both sides more.
        corked = self._cork(True)
        try:
            if self._do_handshake():
                return self._read_records()
            return self._handshake_failure()
        finally:
            if corked:
                self._cork(False)

    def _read_records(self) -> Any:
        size = 0
        reason: Exception | None = None
        try:
            while size <= self._read_size - RECORD_SIZE:
                received = _read_record(self._tls, size)
                size += received
                if received < _SMALL_RECORD:
                    break  # probably the last record for now: another read would cost more than a reactor iteration
        except (SSL.WantReadError, SSL.WantWriteError):
            pass
        except SSL.ZeroReturnError:
            reason = CONNECTION_DONE
        except SSL.Error as error:
            reason = UnannouncedEnd() if error.args[:1] == _UNEXPECTED_EOF else CONNECTION_LOST
        if size:
            self.protocol.dataReceived(bytes(_read_buffer[:size]))
        return reason

    def doWrite(self) -> Any:
        if self._state is TransportState.HANDSHAKE and not self._do_handshake():
            return self._handshake_failure()
        if not self.write_immediately and self._reading and (reason := self.doRead()) is not None:
            return reason
        return super().doWrite()

    def _do_handshake(self) -> bool:
        """Continue the handshake and return whether it is complete."""
        try:
            if (self._unencrypted or self._received) and not self._exchange_prefixes():
                return False
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._stop_writing()
            return False
        except SSL.WantWriteError:
            self._start_writing()
            return False
        except (SSL.Error, OSError) as error:
            self._lost_reason = error
            self._send_unencrypted()  # may be OpenSSL's alert
            if describe_handshake_error(error) in _PLAIN_HTTP_ERRORS:
                self._refuse_plain_http()
            self._mark_broken()
            return False
        self._state = TransportState.OPEN
        if self._pending:
            self._start_writing()
        else:
            self._stop_writing()
        if IHandshakeListener.providedBy(self.protocol):
            self.protocol.handshakeCompleted()
        return True

    def _handshake_failure(self) -> Exception | None:
        return None if self._state is TransportState.HANDSHAKE else self._lost_reason

    def _exchange_prefixes(self) -> bool:
        """Send `_unencrypted` and let OpenSSL process `_received`; return whether OpenSSL may use the socket now."""
        if not self._send_unencrypted():
            return False
        if self._received:
            self._process_received()
            if not self._send_unencrypted():
                return False
        self.resumeProducing()
        return True

    def _send_unencrypted(self) -> bool:
        """Send what is left of `_unencrypted` and return whether all of it was sent."""
        if self._unencrypted:
            self._unencrypted = self._unencrypted[super()._send(self._unencrypted) :]
        return not self._unencrypted

    def _process_received(self) -> None:
        """Let OpenSSL process `_received`, and append its response to `_unencrypted`.

        OpenSSL uses only the descriptor that it was created with. Meanwhile that refers to a socket pair. The reactor
        does not notice, because it runs only after the descriptor refers to the connection again.
        """
        received, self._received = self._received, b""
        pair, openssl_end = socket.socketpair()
        with pair, openssl_end, _redirected(self._fileno, openssl_end.fileno()):
            pair.setblocking(False)
            openssl_end.setblocking(False)
            blocked = False
            while received or blocked:
                received, blocked = received[pair.send(received) :], False
                try:
                    self._tls.do_handshake()
                except SSL.WantReadError:
                    pass
                except SSL.WantWriteError:
                    blocked = True
                finally:
                    with suppress(BlockingIOError):
                        self._unencrypted += pair.recv(_MAX_READ)

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


@contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[None]:
    """Let `descriptor` refer to the file of `target` in the context."""
    original = os.dup(descriptor)
    try:
        os.dup2(target, descriptor, inheritable=False)
        yield
    finally:
        os.dup2(original, descriptor, inheritable=False)
        os.close(original)


def upgrade_to_tls(transport: SocketTransport, context: ServerContext, protocol: IProtocol, received: bytes) -> None:
    """Start TLS as the server on a plain transport and attach `protocol`.

    `received` holds bytes of the TLS stream that were already read from the socket. A client may send its ClientHello
    without waiting for the response to CONNECT.
    """
    reactor, tcp, pending = transport.detach()
    TLSTransport.server(reactor, tcp, context, pending, received).set_protocol(protocol)


def start_inner_tls(
    outer: TLSTransport, context: ServerContext, protocol: IProtocol, received: bytes, on_closed: Callable[[], None]
) -> None:
    """Start TLS as the server within the TLS of `outer`, and attach `protocol`; otherwise as `upgrade_to_tls`.

    `on_closed` is called when `outer` has closed.
    """
    inner = open_inner_socket(outer, received, on_closed)
    TLSTransport.server(outer.reactor, inner, context).set_protocol(protocol)


def set_mode(context: SSL.Context) -> None:
    """Set the modes that `TLSTransport` needs on `context`.

    A write may be retried from another address, which pyOpenSSL 25.0 does not allow by default. An idle connection
    releases its buffers of 34 KiB. One call writes several records, if pyOpenSSL can enable that.
    """
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_ACCEPT_MOVING_WRITE_BUFFER)
    if _MULTI_RECORD_WRITES:
        context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)


def describe_handshake_error(error: SSL.Error | OSError) -> str:
    """Return the reason of a failed handshake: OpenSSL's text, or a hint if the client rejected our certificate."""
    if isinstance(error, OSError):
        return str(error)
    if refuses_certificate(error):
        return "the client does not trust this proxy's CA; install the certificate from /ca.crt on it"
    return "; ".join(_reasons(error)) or "the client closed the connection"


def refuses_certificate(error: SSL.Error | OSError) -> bool:
    """Return whether the handshake failed because the client does not trust our certificate."""
    return any(distrust in reason for reason in _reasons(error) for distrust in _UNTRUSTED_CERTIFICATE_ALERTS)


def _reasons(error: SSL.Error | OSError) -> list[str]:
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return [str(entry[-1]) for entry in entries]
