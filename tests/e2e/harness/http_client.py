"""A plain HTTP client for looking closely: through a proxy (CONNECT or absolute-form), a mirror, or straight."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from attrs import define, field, frozen

_TIMEOUT = 60


@frozen
class BufferedResponse:
    """A response read to its end; `headers` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def cache_status(self) -> str | None:
        """What the daemon says about where the answer came from."""
        return self.headers.get("x-cache")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error_code(self) -> str:
        """The first code of an OCI error body."""
        assert self.headers.get("content-type", "").startswith("application/json"), self
        code = self.json["errors"][0]["code"]
        assert isinstance(code, str)
        return code

    @property
    def error_message(self) -> str:
        message = self.json["errors"][0]["message"]
        assert isinstance(message, str)
        return message


class DirectConnection(http.client.HTTPConnection):
    """A connection to an address of ours in the name of another host; `context` makes it TLS."""

    def __init__(self, host: str, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        super().__init__(host, timeout=_TIMEOUT)
        self._address = address
        self._context = context

    def connect(self) -> None:
        self.sock = socket.create_connection(self._address, timeout=_TIMEOUT)
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


@define
class ProxyClient:
    """Asks for URLs through the proxy at `port` of 127.0.0.1, trusting `context` where they are https."""

    port: int
    context: ssl.SSLContext

    def new_connection(self, url: str) -> http.client.HTTPConnection:
        """Return a connection, not yet made, by which `url` can be asked for."""
        parts = urlsplit(url)
        assert parts.hostname
        if parts.scheme == "http":
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=_TIMEOUT, context=self.context)
        connection.set_tunnel(parts.hostname, parts.port or 443)
        return connection

    @contextmanager
    def stream(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the response as soon as its head is there."""
        parts = urlsplit(url)
        target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        connection = self.new_connection(url)
        try:
            target = url if parts.scheme == "http" else target
            connection.request(method, target, body=body, headers=dict(headers or {}))
            yield connection.getresponse()
        finally:
            connection.close()

    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> BufferedResponse:
        """Send a request and return the whole answer. Raise what http.client raises where it breaks off."""
        with self.stream(method, url, headers, body) as response:
            return read_response(response)

    def get(self, url: str, **headers: str) -> BufferedResponse:
        """GET `url`; the header names' underscores are dashes."""
        return self.request("GET", url, {name.replace("_", "-"): value for name, value in headers.items()})

    def head(self, url: str, **headers: str) -> BufferedResponse:
        return self.request("HEAD", url, {name.replace("_", "-"): value for name, value in headers.items()})


def read_response(response: http.client.HTTPResponse) -> BufferedResponse:
    """Read `response` to its end."""
    headers = {name.lower(): value for name, value in response.getheaders()}
    return BufferedResponse(response.status, headers, response.read())


def request_directly(
    method: str, url: str, headers: Mapping[str, str] | None = None, context: ssl.SSLContext | None = None
) -> BufferedResponse:
    """Ask a server of this machine directly, without any proxy."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    connection = DirectConnection(parts.hostname, (parts.hostname, parts.port), context)
    try:
        target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        connection.request(method, target, headers={"Host": parts.netloc, **(headers or {})})
        return read_response(connection.getresponse())
    finally:
        connection.close()


def send_raw(port: int, data: bytes, *, timeout: float = 20) -> bytes:
    """Send `data` as it is to `port` and return all that comes until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    return received


def send_raw_request(port: int, data: bytes, *, timeout: float = 20) -> BufferedResponse:
    """Send `data` as it is to `port` and return the first answer, without waiting for the connection's end."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return read_response(response)
