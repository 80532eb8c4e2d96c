"""TLS to upstreams: trusted CAs, and verification that a certificate matches the host."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_PEM, load_certificate
from service_identity import CertificateError, VerificationError
from service_identity.pyopenssl import verify_hostname, verify_ip_address
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from dockerproxy.config_files import check_config_file
from dockerproxy.errors import CertificateRejected, UpstreamUnreachable
from dockerproxy.http.tls import TLSTransport, set_mode
from dockerproxy.oci.names import Host

_UNTRUSTED_CA = "its CA is not trusted; to trust it, add the CA to UPSTREAM_CA_FILE and restart the proxy"
# The common errors of X509_verify_cert (openssl-verification-options(1)); all others are reported by number.
_VERIFY_ERRORS = {
    9: "it is not valid yet; is this machine's clock right?",
    10: "it has expired",
    18: "it is self-signed; to trust it, add it to UPSTREAM_CA_FILE and restart the proxy",
    19: _UNTRUSTED_CA,
    20: _UNTRUSTED_CA,
    21: _UNTRUSTED_CA,
    23: "it was revoked",
    24: "its issuer is not a CA",
    26: "it is not a server certificate",
}

_MAX_ISSUER = 80  # characters


class ClientContext:
    """The TLS settings of all connections to upstreams.

    If `verify` is true, a certificate must match the host, and its CA must be trusted by the system or be in `ca_file`
    (PEM). Raise `ValueError` with one sentence if `ca_file` cannot be used.
    """

    def __init__(self, *, verify: bool = True, ca_file: str | None = None) -> None:
        self.verify = verify
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        set_mode(context)
        if verify:
            context.set_verify(SSL.VERIFY_PEER)
            context.set_default_verify_paths()
            if ca_file is not None:
                _load_ca_file(context, ca_file)
        # pyOpenSSL forbids changes to a context once a connection has used it, so it is complete here.
        self._context = context

    @classmethod
    def trusting(cls, certificate: bytes) -> ClientContext:
        """Return the settings for servers whose certificates the CA `certificate` (PEM) has signed, and no other."""
        self = cls.__new__(cls)
        self.verify = True
        self._context = context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        set_mode(context)
        context.set_verify(SSL.VERIFY_PEER)
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(load_certificate(FILETYPE_PEM, certificate))
        return self

    def handshake(self, host: Host) -> ClientHandshake:
        """Return a new handshake for one connection to `host`."""
        return ClientHandshake(self._context, host, verify=self.verify)


class ClientHandshake:
    """The TLS side of one connection to `host`."""

    def __init__(self, context: SSL.Context, host: Host, *, verify: bool) -> None:
        self._context = context
        self._host = host
        self._verify = verify
        self._connection: SSL.Connection | None = None
        self._verify_error = 0
        self._certificate: Any = None  # of the server; or the one in its chain that was rejected

    @property
    def issuer(self) -> str:
        """The name of the CA that signed the server's certificate, which is not to be trusted; `""` if unknown."""
        name = None if self._certificate is None else self._certificate.get_issuer()
        return "" if name is None else str(name.organizationName or name.commonName or "")[:_MAX_ISSUER]

    def connection(self, sock: socket.socket) -> SSL.Connection:
        """Return a client TLS connection on `sock`, before its handshake."""
        connection = SSL.Connection(self._context, sock)
        connection.set_connect_state()
        if self._verify:
            connection.set_verify(SSL.VERIFY_PEER, self._on_verify)
        connection.set_alpn_protos([b"http/1.1"])
        if not self._host.is_address:  # RFC 6066, section 3: a server name must not be an address
            connection.set_tlsext_host_name(self._host.name.encode("ascii"))
        self._connection = connection
        return connection

    def verify_certificate(self) -> None:
        """Raise `UpstreamUnreachable` if the server's certificate does not match the host (RFC 9110, section 4.3.4)."""
        connection, self._connection = self._connection, None
        if not self._verify or connection is None:
            return
        verify_name = verify_ip_address if self._host.is_address else verify_hostname
        try:
            verify_name(connection, self._host.name)
        except (VerificationError, CertificateError):
            raise CertificateRejected(f"{self._host.authority}: its certificate is for another name") from None

    def failure(self, reason: Failure) -> UpstreamUnreachable:
        """Return the error of a handshake that has failed because of `reason`."""
        was_rejected, sentence = bool(self._verify_error), f"{self._host.authority}: {self._describe_failure(reason)}"
        return CertificateRejected(sentence) if was_rejected else UpstreamUnreachable(sentence, "tls")

    def _describe_failure(self, reason: Failure) -> str:
        """Describe the failure of the handshake, as a phrase to put after the host."""
        self._connection = None
        if self._verify_error:
            detail = _VERIFY_ERRORS.get(self._verify_error, f"OpenSSL verification error {self._verify_error}")
            return f"its certificate was rejected: {detail}"
        entries = reason.value.args[0] if isinstance(reason.value, SSL.Error) and reason.value.args else None
        detail = str(entries[0][-1]) if isinstance(entries, list) and entries else "unexpected eof"
        return "it closed the connection during the handshake" if "eof" in detail else f"TLS handshake failed: {detail}"

    def _on_verify(self, connection: SSL.Connection, certificate: object, error: int, depth: int, ok: int) -> bool:
        """Record OpenSSL's error code, because its exception omits it, and keep OpenSSL's decision."""
        if not ok or depth == 0:
            self._certificate = certificate
        if not ok:
            self._verify_error = error
        return bool(ok)


class TLSClientFactory(Factory):
    """Makes a protocol that starts TLS on a new connection and then runs `protocol` on it."""

    noisy = False

    def __init__(self, handshake: ClientHandshake, protocol: Protocol) -> None:
        self._handshake = handshake
        self._protocol = protocol

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _TLSStarter(self._start_tls)

    def _start_tls(self, tcp: Any) -> None:
        transport = TLSTransport(tcp.reactor, tcp, self._handshake.connection(tcp.getHandle()))
        transport.write_immediately = False
        transport.take_over(self._protocol)
        transport.start_handshake()


class _TLSStarter(Protocol):
    """Passes its transport to `start` once it is connected."""

    def __init__(self, start: Callable[[Any], None]) -> None:
        self._start = start

    def connectionMade(self) -> None:
        self._start(self.transport)


def _load_ca_file(context: SSL.Context, ca_file: str) -> None:
    try:
        check_config_file(ca_file)  # because OpenSSL's error for a missing file is unclear
        context.load_verify_locations(ca_file)
    except OSError as error:
        raise ValueError(f"UPSTREAM_CA_FILE {ca_file!r} cannot be read: {error.strerror}") from None
    except SSL.Error:
        raise ValueError(f"UPSTREAM_CA_FILE {ca_file!r} contains no certificates in PEM format") from None
