"""A registry client on the standard library's HTTP client: one request after the other on one connection."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from bench.content import OCI_MANIFEST
from bench.endpoints import Endpoint


class UnexpectedStatus(ConnectionError):
    """A response with another status than the expected one."""


def open_connection(endpoint: Endpoint) -> http.client.HTTPConnection:
    """Return a new connection after its handshake."""
    connection = http.client.HTTPConnection(endpoint.host)
    connection.sock = endpoint.connect(endpoint.tls_context())
    return connection


def send_request(
    connection: http.client.HTTPConnection, status: int, method: str, target: str, body: bytes = b""
) -> str:
    """Send a request and return the path in the response's Location, or "".

    Raise `UnexpectedStatus` if the response has another status than `status`.
    """
    connection.request(method, target, body, {"Accept": OCI_MANIFEST})
    return read_response(connection, status, method)


def read_response(connection: http.client.HTTPConnection, status: int, method: str) -> str:
    """Read the response to a request; the result and the errors are those of `send_request`."""
    response = connection.getresponse()
    content = response.read()
    if response.status != status:
        raise UnexpectedStatus(f"{method} returned {response.status} instead of {status}: {content[:200]!r}")
    parts = urlsplit(response.headers.get("Location", ""))
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def with_digest_query(location: str, sha256_hex: str) -> str:
    """Return the URL that completes the upload at `location` as the blob with this sha256."""
    return f"{location}{'&' if '?' in location else '?'}digest=sha256:{sha256_hex}"


def push_blob(connection: http.client.HTTPConnection, repository: str, content: bytes, sha256_hex: str) -> None:
    """Push a layer as docker does: a HEAD request first, then the whole layer in one PATCH."""
    send_request(connection, 404, "HEAD", f"/v2/{repository}/blobs/sha256:{sha256_hex}")
    location = send_request(connection, 202, "POST", f"/v2/{repository}/blobs/uploads/")
    location = send_request(connection, 202, "PATCH", location, content)
    send_request(connection, 201, "PUT", with_digest_query(location, sha256_hex))
