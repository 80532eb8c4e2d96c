"""Requests to a registry with the standard library's client, one after the other on a connection of its own."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from bench.content import OCI_MANIFEST
from bench.endpoints import Endpoint


class UnexpectedStatus(ConnectionError):
    """An answer with another status than was asked for."""


def open_connection(endpoint: Endpoint) -> http.client.HTTPConnection:
    """Return a new connection, its handshake done."""
    connection = http.client.HTTPConnection(endpoint.host)
    connection.sock = endpoint.connect(endpoint.tls_context())
    return connection


def send_request(
    connection: http.client.HTTPConnection, status: int, method: str, target: str, body: bytes = b""
) -> str:
    """Ask, and return where the answer says to go on. Raise `Refused` where its status is another."""
    connection.request(method, target, body, {"Accept": OCI_MANIFEST})
    return read_response(connection, status, method)


def read_response(connection: http.client.HTTPConnection, status: int, method: str) -> str:
    """Read the answer to a request; as `ask`."""
    response = connection.getresponse()
    content = response.read()
    if response.status != status:
        raise UnexpectedStatus(f"{method} was answered {response.status}: {content[:200]!r}")
    parts = urlsplit(response.headers.get("Location", ""))
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def with_digest_query(location: str, sha256_hex: str) -> str:
    """Return the location of an upload that is to end as the content whose sha256 is `encoded`."""
    return f"{location}{'&' if '?' in location else '?'}digest=sha256:{sha256_hex}"


def push_blob(connection: http.client.HTTPConnection, repository: str, content: bytes, sha256_hex: str) -> None:
    """Push a layer as docker does: looked for before, then in one piece."""
    send_request(connection, 404, "HEAD", f"/v2/{repository}/blobs/sha256:{sha256_hex}")
    location = send_request(connection, 202, "POST", f"/v2/{repository}/blobs/uploads/")
    location = send_request(connection, 202, "PATCH", location, content)
    send_request(connection, 201, "PUT", with_digest_query(location, sha256_hex))
