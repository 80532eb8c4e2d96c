"""Requests to a registry with the standard library's client, one after the other on a connection of its own."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from bench.content import OCI_MANIFEST
from bench.targets import Target


class Refused(ConnectionError):
    """An answer with another status than was asked for."""


def connect(target: Target) -> http.client.HTTPConnection:
    """Return a new connection, its handshake done."""
    connection = http.client.HTTPConnection(target.host)
    connection.sock = target.open(target.context())
    return connection


def ask(connection: http.client.HTTPConnection, status: int, method: str, target: str, body: bytes = b"") -> str:
    """Ask, and return where the answer says to go on. Raise `Refused` where its status is another."""
    connection.request(method, target, body, {"Accept": OCI_MANIFEST})
    return answer(connection, status, method)


def answer(connection: http.client.HTTPConnection, status: int, method: str) -> str:
    """Read the answer to a request; as `ask`."""
    found = connection.getresponse()
    content = found.read()
    if found.status != status:
        raise Refused(f"{method} was answered {found.status}: {content[:200]!r}")
    parts = urlsplit(found.headers.get("Location", ""))
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def with_digest(location: str, encoded: str) -> str:
    """Return the location of an upload that is to end as the content whose sha256 is `encoded`."""
    return f"{location}{'&' if '?' in location else '?'}digest=sha256:{encoded}"


def push_blob(connection: http.client.HTTPConnection, repository: str, content: bytes, encoded: str) -> None:
    """Push a layer as docker does: looked for before, then in one piece."""
    ask(connection, 404, "HEAD", f"/v2/{repository}/blobs/sha256:{encoded}")
    location = ask(connection, 202, "POST", f"/v2/{repository}/blobs/uploads/")
    location = ask(connection, 202, "PATCH", location, content)
    ask(connection, 201, "PUT", with_digest(location, encoded))
