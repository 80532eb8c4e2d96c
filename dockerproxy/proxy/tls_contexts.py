"""OpenSSL contexts for the server side: protocol versions, ciphers, and the certificate that they present."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from OpenSSL import SSL, crypto

from dockerproxy.http.tls import set_mode
from dockerproxy.proxy.issuer import IssuerKey

# For TLS 1.2. RSA is for certificates of the administrator's; ours have EC keys. The client's order applies, because it
# knows whether its processor has AES.
_CIPHERS = (
    b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:"
    b"ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-CHACHA20-POLY1305"
)


def make_context() -> SSL.Context:
    """Return a server context without a certificate."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(_CIPHERS)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    set_mode(context)
    # Sessions are resumed by tickets, which clients store. The server-side cache would serve no client in use today.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(b"docker-registry-proxy")
    context.set_alpn_select_callback(_select_alpn)
    return context


def use_certificate(
    context: SSL.Context,
    certificate: x509.Certificate,
    key: IssuerKey,
    sent: Sequence[x509.Certificate],
) -> None:
    """Load key, certificate and chain into `context`, with the types that this pyOpenSSL accepts without a warning."""
    try:
        context.use_certificate(certificate)
    except TypeError:  # pyOpenSSL < 24.3 accepts only its own wrappers; later versions deprecate them
        context.use_certificate(crypto.X509.from_cryptography(certificate))  # noqa: TID251
        context.use_privatekey(crypto.PKey.from_cryptography_key(key))
        for intermediate in sent:
            context.add_extra_chain_cert(crypto.X509.from_cryptography(intermediate))  # noqa: TID251
    else:
        context.use_privatekey(key)
        for intermediate in sent:
            context.add_extra_chain_cert(intermediate)


def _select_alpn(connection: SSL.Connection, client_protocols: list[bytes]) -> bytes | SSL._NoOverlappingProtocols:
    # Without an overlap continue without ALPN, because a client that offers only h2 still speaks HTTP/1.1.
    return b"http/1.1" if b"http/1.1" in client_protocols else SSL.NO_OVERLAPPING_PROTOCOLS
