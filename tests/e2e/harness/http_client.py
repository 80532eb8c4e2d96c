"""An HTTP client for detailed checks: through a proxy (CONNECT or absolute-form), to a mirror, or directly."""

from __future__ import annotations

import base64
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
    """A response read to its end; the names of `headers` are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def cache_status(self) -> str | None:
        """The daemon's X-Cache header: HIT, MISS and so on."""
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
    """A connection to `address` with the Host (and SNI) of another host; over TLS if there is a `context`."""

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
    """Requests URLs through the proxy on `port` of 127.0.0.1; `context` is for https URLs."""

    port: int
    context: ssl.SSLContext

    def new_connection(self, url: str) -> http.client.HTTPConnection:
        """Return a connection for requests of `url`, which is not connected yet."""
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
        """Send a request and yield the response as soon as its head is received."""
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
        """Send a request and return the whole response. Raise http.client's exceptions if it is incomplete."""
        with self.stream(method, url, headers, body) as response:
            return read_response(response)

    def get(self, url: str, **headers: str) -> BufferedResponse:
        """GET `url`. Underscores in the names of `headers` become dashes."""
        return self.request("GET", url, {name.replace("_", "-"): value for name, value in headers.items()})

    def head(self, url: str, **headers: str) -> BufferedResponse:
        return self.request("HEAD", url, {name.replace("_", "-"): value for name, value in headers.items()})


def basic_authorization(user: str, password: str) -> str:
    """Return the Authorization header for a user and password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def read_response(response: http.client.HTTPResponse) -> BufferedResponse:
    """Read `response` to its end."""
    headers = {name.lower(): value for name, value in response.getheaders()}
    return BufferedResponse(response.status, headers, response.read())


def request_directly(
    method: str, url: str, headers: Mapping[str, str] | None = None, context: ssl.SSLContext | None = None
) -> BufferedResponse:
    """Send a request directly to a server of this machine, without a proxy."""
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
    """Send `data` unchanged to `port` and return all received bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    return received


def send_raw_request(port: int, data: bytes, *, timeout: float = 20) -> BufferedResponse:
    """Send `data` unchanged to `port` and return the first response, without waiting for the connection to close."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return read_response(response)
