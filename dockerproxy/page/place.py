"""The addresses of this server. Pure."""

from __future__ import annotations

from attrs import frozen


@frozen
class Place:
    """Where this server is reached.

    `proxy_port` is that of the proxy without TLS, `tls_port` one with TLS, None if there is none. `name` is the
    server's own if a request has none. `ca_fingerprint` is the SHA-256 of the CA's certificate.
    """

    name: str
    proxy_port: int
    tls_port: int | None
    ca_fingerprint: str
