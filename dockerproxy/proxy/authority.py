"""The certificate authority: TLS server contexts for any host name, with certificates signed on first use."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from attrs import define, field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL
from twisted.logger import Logger

from dockerproxy.errors import NameInvalid
from dockerproxy.http.tls import ServerContext
from dockerproxy.oci.host_table import Wildcard
from dockerproxy.oci.names import Host
from dockerproxy.proxy.certificate_file import CertificateFile
from dockerproxy.proxy.issuer import (
    BACKDATE,
    DAY,
    AuthorityError,
    Issuer,
    get_extension,
    key_usage,
    load_configured_issuer,
    to_datetime,
    validity,
)
from dockerproxy.proxy.local_ca import load_or_create_issuer
from dockerproxy.proxy.tls_contexts import make_context, use_certificate

__all__ = ["AuthorityError", "CertificateAuthority"]

_LEAF_LIFETIME = 90 * DAY
_MAX_CONTEXTS = 1000
_SNI_LISTENERS = ("REGISTRY_LISTEN", "PROXY_TLS_LISTEN")
_MAX_COMMON_NAME = 64  # characters, X.520's ub-common-name

log = Logger()


@frozen
class _Leaf:
    """A server context with its certificate. Times are in seconds since the epoch."""

    context: ServerContext
    not_before: float
    renew_at: float


@define
class CertificateAuthority:
    """Signs certificates for the hosts whose TLS we terminate.

    One EC key, generated at start and never written to disk, serves all leaves. Not thread-safe.

    A client may resume a session with the same host as long as this object exists. Processes forked from this one share
    its ticket keys, so they can resume each other's sessions. Another CA has other ticket keys, so its clients always
    verify a certificate first.
    """

    _issuer: Issuer
    _clock: Callable[[], float]
    _leaf_key: ec.EllipticCurvePrivateKey = field(
        init=False, repr=False, factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    _leaves: OrderedDict[Host, _Leaf] = field(init=False, repr=False, factory=OrderedDict)
    _ticket_context: SSL.Context = field(init=False, repr=False, factory=lambda: make_context())
    _sni_contexts: dict[str, SSL.Context] = field(
        init=False, repr=False, factory=lambda: {listener: make_context() for listener in _SNI_LISTENERS}
    )

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        certificate_file: Path | None,
        key_file: Path | None,
        passphrase: str | None,
        clock: Callable[[], float],
    ) -> CertificateAuthority:
        """Load the CA from the two files (CA_CRT_FILE, CA_KEY_FILE, CA_KEY_PASSPHRASE), or else the one in `directory`.

        If `directory` contains no CA yet, create one. Raise `AuthorityError` if the CA cannot be used. This blocks on
        disk I/O, so call it before the reactor runs.
        """
        if certificate_file is not None and key_file is not None:
            return cls(load_configured_issuer(certificate_file, key_file, passphrase, clock()), clock)
        if certificate_file is not None:
            raise AuthorityError(f"CA_CRT_FILE is {certificate_file} but CA_KEY_FILE is not set; set both, or neither")
        if key_file is not None:
            raise AuthorityError(f"CA_KEY_FILE is {key_file} but CA_CRT_FILE is not set; set both, or neither")
        return cls(load_or_create_issuer(directory, passphrase, clock()), clock)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Messages for the operator about problems that do not prevent the CA from working."""
        return self._issuer.warnings

    @property
    def certificate_pem(self) -> bytes:
        """The certificate that clients must trust, in PEM."""
        return self._issuer.trusted.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of that certificate (DER), as `openssl x509 -fingerprint -sha256` prints it."""
        return self._issuer.trusted.fingerprint(hashes.SHA256()).hex(":").upper()

    @property
    def path(self) -> tuple[x509.Certificate, ...]:
        """The certificate that signs, and those above it."""
        return self._issuer.path

    @property
    def expires_at(self) -> float:
        """The POSIX time at which clients stop to trust the CA: the end of that certificate or of the issuing one."""
        return min(validity(certificate)[1] for certificate in (self._issuer.trusted, self._issuer.certificate))

    def derive_secret(self, purpose: str) -> bytes:
        """Return 32 bytes that only who has the CA's key can know. All daemons with this CA get the same."""
        key = self._issuer.key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return hmac.digest(key, f"docker-registry-proxy {purpose}".encode(), "sha256")

    def context_for(self, name: str) -> ServerContext:
        """Return the server context for the host `name`: a DNS name, or an IP address without brackets.

        Raise `NameInvalid` if `name` is neither, and `AuthorityError` if the CA certificate is not valid now.
        """
        return self._context(Host.parse(f"[{name}]" if ":" in name else name))

    def wildcard_context_for(self, wildcard: Wildcard) -> ServerContext:
        """Return the server context for all hosts that `wildcard` covers. They have one certificate.

        Raise `AuthorityError` as `context_for` does.
        """
        return self._context(Host(wildcard.name, 443))

    def _context(self, host: Host) -> ServerContext:
        now = self._clock()
        leaf = self._leaves.get(host)
        if leaf is None or not leaf.not_before <= now < leaf.renew_at:
            leaf = self._leaves[host] = self._issue_leaf(host, now)
            if len(self._leaves) > _MAX_CONTEXTS:
                self._leaves.popitem(last=False)
        self._leaves.move_to_end(host)
        return leaf.context

    def own_context_for(self, name: str, file: CertificateFile | None) -> ServerContext:
        """Return the server context for a name or address of this server: that of `file` if it covers the name.

        Raise as `context_for` does.
        """
        if file is not None and file.covers(name):
            return ServerContext(self._ticket_context, file.context)
        return self.context_for(name)

    def sni_context(self, listener: str, names: Container[str], file: CertificateFile | None = None) -> ServerContext:
        """Return a server context that selects the certificate by the server name (SNI) of each client.

        `listener` is the setting of the listener that uses it, ``REGISTRY_LISTEN`` or ``PROXY_TLS_LISTEN``.

        If the name is in `names` or ``localhost``, the client gets the certificate for that name. Otherwise it gets the
        one for the local address of its connection, which must be a socket. Clients that connect to an IP address send
        no name. The certificate in `file` is used for everything that it covers, and for all other names.

        A session can be resumed under any of the names, because OpenSSL resumes it before it looks at the name. This is
        harmless because all the names belong to one server.
        """

        def select(name: str, address: str) -> ServerContext:
            if name in names or name == "localhost" or (file is not None and file.covers(name)):
                return self.own_context_for(name, file)
            if name and file is not None:
                return ServerContext(self._ticket_context, file.context)
            return self.own_context_for(address, file)

        def select_certificate(connection: SSL.Connection) -> None:
            server_name = connection.get_servername()
            name = server_name.decode("ascii", "replace").lower() if server_name is not None else ""
            try:
                select(name, _local_address(connection)).apply_to(connection)
            except (AuthorityError, NameInvalid) as error:
                # Without a certificate the handshake fails. Nothing more can be reported to the client.
                log.error("cannot issue a certificate, so a client's TLS handshake fails: {reason}", reason=str(error))

        context = self._sni_contexts[listener]
        context.set_tlsext_servername_callback(select_certificate)
        return ServerContext(context)

    def _issue_leaf(self, host: Host, now: float) -> _Leaf:
        issuer = self._issuer
        not_before, not_after = max(now - BACKDATE, issuer.not_before), min(now + _LEAF_LIFETIME, issuer.not_after)
        if not not_before <= now < not_after:
            validity = f"{to_datetime(issuer.not_before):%Y-%m-%d} to {to_datetime(issuer.not_after):%Y-%m-%d}"
            raise AuthorityError(
                f"the CA certificate is valid from {validity}, and this machine's clock is outside that range"
            )
        certificate = self._sign_leaf(host, not_before, not_after)
        certificate_context = _certificate_context(host, certificate, self._leaf_key, issuer.sent)
        return _Leaf(
            ServerContext(self._ticket_context, certificate_context), not_before, not_after - (not_after - now) / 3
        )

    def _sign_leaf(self, host: Host, not_before: float, not_after: float) -> x509.Certificate:
        issuer, public_key = self._issuer.certificate, self._leaf_key.public_key()
        has_common_name = len(host.name) <= _MAX_COMMON_NAME
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host.name)] if has_common_name else [])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(to_datetime(not_before))
            .not_valid_after(to_datetime(not_after))
            # RFC 5280, section 4.2.1.6: critical if the subject is empty.
            .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=not has_common_name)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(_authority_key_identifier(issuer), critical=False)
            .sign(self._issuer.key, hashes.SHA256())
        )


def _general_name(host: Host) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host.name)) if host.is_address else x509.DNSName(host.name)


def _authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    # RFC 5280, section 4.2.1.1: copy the issuer's own identifier, byte for byte. There are several ways to compute one,
    # and a client that finds another value than the issuer's looks for another issuer.
    identifier = get_extension(issuer, x509.SubjectKeyIdentifier)
    if identifier is not None:
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]


def _certificate_context(
    host: Host, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, sent: Sequence[x509.Certificate]
) -> SSL.Context:
    context = make_context()
    # A hash, because OpenSSL accepts at most 32 bytes. Certificates and sessions do not depend on the port.
    context.set_session_id(hashlib.sha256(host.name.encode()).digest())
    use_certificate(context, certificate, key, sent)
    return context


def _local_address(connection: SSL.Connection) -> str:
    """Return the local address of a connection in the form that the client used."""
    host: str = connection.getsockname()[0]
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
