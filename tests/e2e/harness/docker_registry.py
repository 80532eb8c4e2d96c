"""Debian's docker-registry (CNCF distribution) as an upstream, and servers that redirect its blobs to a signed URL."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen

from bench.servers import free_port, is_listening
from tests.e2e.harness.http_client import DirectConnection
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import SampleImage, TypedContent
from tests.e2e.harness.pki import Leaf
from tests.e2e.harness.process import BackgroundProcess, wait_until

_ACCESS_LINE = re.compile(
    r'^\S+ \S+ \S+ \[[^]]*\] "(?P<method>[A-Z]+) (?P<path>\S+) \S+" (?P<status>\d+) (?P<size>\d+)', re.MULTILINE
)


@frozen
class RegistryLogEntry:
    """A line of the registry's access log; `size` is the size of the body in bytes."""

    method: str
    path: str
    status: int
    size: int


class DockerRegistry(BackgroundProcess):
    """A registry for `host` on a port of 127.0.0.1, over TLS if `leaf` is given.

    `auth` and `storage` go into its config.yml.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        leaf: Leaf | None = None,
        auth: Mapping[str, Any] | None = None,
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        self.host = host
        self.port = free_port()
        self.storage = folder / "storage"
        self.storage.mkdir(parents=True)
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {
                **(storage or {"filesystem": {"rootdirectory": str(self.storage)}}),
                "delete": {"enabled": True},
                "redirect": {"disable": True},
            },
            "http": {"addr": f"127.0.0.1:{self.port}", "secret": secrets.token_hex(16)},
        }
        if leaf is not None:
            config["http"]["tls"] = {"certificate": str(leaf.certificate_file), "key": str(leaf.key_file)}
        if auth is not None:
            config["auth"] = auth
        (folder / "config.yml").write_text(json.dumps(config))
        self.uses_tls = leaf is not None
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        super().__init__(
            ["docker-registry", "serve", str(folder / "config.yml")], folder / "output", environment, folder
        )
        self._log_offset = 0

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: is_listening(self.port))

    @property
    def log_entries(self) -> list[RegistryLogEntry]:
        """The requests since the last `clear_log`. The list is complete, although a request is logged after its end."""
        if self.running:
            self._wait_for_log()
        return [
            RegistryLogEntry(match["method"], match["path"], int(match["status"]), int(match["size"]))
            for match in _ACCESS_LINE.finditer(self.output_text[self._log_offset :])
        ]

    def clear_log(self) -> None:
        self._wait_for_log()
        self._log_offset = len(self.output_text)

    def _wait_for_log(self) -> None:
        """Send a request and wait until it is in the log, so that all earlier requests are in the log too."""
        marker = f"/v2/?marker={secrets.token_hex(4)}"
        context = ssl._create_unverified_context() if self.uses_tls else None
        connection = DirectConnection(self.host, ("127.0.0.1", self.port), context)
        try:
            connection.request("GET", marker)
            connection.getresponse().read()
        finally:
            connection.close()
        wait_until(lambda: marker in self.output_text, "the registry logs the marker request")

    def find_requests(self, method: str, path_part: str) -> list[RegistryLogEntry]:
        """Return the requests with this method and `path_part` in their path."""
        return [entry for entry in self.log_entries if entry.method == method and path_part in entry.path]

    def blob_file(self, digest: str) -> Path:
        algorithm, _, hexadecimal = digest.partition(":")
        return self.storage / "docker/registry/v2/blobs" / algorithm / hexadecimal[:2] / hexadecimal / "data"


def push_image(
    registry: DockerRegistry,
    name: str,
    tag: str,
    image: SampleImage,
    tls_context: ssl.SSLContext | None = None,
    authorization: str | None = None,
) -> SampleImage:
    """Push `image` to `registry` as `name`:`tag`, without the daemon, and return it."""
    connection = DirectConnection(
        registry.host, ("127.0.0.1", registry.port), tls_context if registry.uses_tls else None
    )
    headers = {"Authorization": authorization} if authorization else {}
    try:
        for child in image.children_first():
            for blob in child.blobs:
                _push_blob(connection, name, blob, headers)
            reference = tag if child is image else child.digest
            fields = headers | {"Content-Type": child.manifest.media_type}
            _request_expecting(connection, 201, "PUT", f"/v2/{name}/manifests/{reference}", child.manifest.data, fields)
    finally:
        connection.close()
    return image


def _push_blob(
    connection: http.client.HTTPConnection, name: str, blob: TypedContent, headers: Mapping[str, str]
) -> None:
    upload_headers = _request_expecting(connection, 202, "POST", f"/v2/{name}/blobs/uploads/", b"", headers)
    location = urlsplit(upload_headers["location"])
    target = f"{location.path}?{location.query}&digest={blob.digest}"
    fields = {**headers, "Content-Type": "application/octet-stream"}
    _request_expecting(connection, 201, "PUT", target, blob.data, fields)


def _request_expecting(
    connection: http.client.HTTPConnection,
    status: int,
    method: str,
    target: str,
    body: bytes,
    headers: Mapping[str, str],
) -> dict[str, str]:
    connection.request(method, target, body, dict(headers))
    response = connection.getresponse()
    response_body = response.read()
    assert response.status == status, (method, target, response.status, response_body)
    return {name.lower(): value for name, value in response.getheaders()}


class RedirectingRegistry(StubServer):
    """A frontend of a registry that redirects GETs of blobs to signed URLs of a store, as Docker Hub's does.

    `location_template` is the Location, with the fields `digest` and `signature`. It may be relative.
    """

    def __init__(
        self, context: ssl.SSLContext, registry: DockerRegistry, client_context: ssl.SSLContext, location_template: str
    ) -> None:
        super().__init__(context)
        self._registry = registry
        self._client_context = client_context
        self._location_template = location_template

    def handle(self, exchange: HTTPExchange) -> None:
        connection = DirectConnection(self._registry.host, ("127.0.0.1", self._registry.port), self._client_context)
        is_blob = "/blobs/sha256:" in exchange.path
        headers = {
            name: value for name, value in exchange.request.headers.items() if name not in ("connection", "range")
        }
        try:
            body = b"".join(exchange.read_body())
            connection.request("HEAD" if is_blob else exchange.method, exchange.request.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        fields = dict(response.getheaders())
        if is_blob and exchange.method == "GET" and response.status == 200:
            digest = exchange.path.rpartition("/")[2]
            exchange.respond(
                307, {"Location": self._location_template.format(digest=digest, signature=SignedURLStore.SIGNATURE)}
            )
        elif exchange.method == "HEAD":
            exchange.respond(response.status, fields)
        else:
            exchange.respond(response.status, fields | {"Content-Length": str(len(content))}, content)


class SignedURLStore(StubServer):
    """An object store with signed URLs. It may reject requests with an Authorization header, as S3 does."""

    SIGNATURE = "5ig-" + secrets.token_hex(16)

    def __init__(self, context: ssl.SSLContext, registry: DockerRegistry, *, reject_authorization: bool = True) -> None:
        super().__init__(context)
        self._registry = registry
        self._reject_authorization = reject_authorization

    def handle(self, exchange: HTTPExchange) -> None:
        if self._reject_authorization and "authorization" in exchange.request.headers:
            return self._respond_error(exchange, 400, b"InvalidArgument")
        if f"Signature={self.SIGNATURE}" not in exchange.query:
            return self._respond_error(exchange, 403, b"AccessDenied")
        file = self._registry.blob_file(exchange.path.rpartition("/")[2])
        if not file.exists():
            return self._respond_error(exchange, 404, b"NoSuchKey")
        data = file.read_bytes()
        range_match = re.fullmatch(r"bytes=(\d+)-", exchange.request.headers.get("range", ""))
        if range_match is None:
            exchange.respond(200, {"Content-Type": "application/octet-stream"}, data)
        else:
            start = int(range_match[1])
            fields = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            exchange.respond(206, fields, data[start:])

    @staticmethod
    def _respond_error(exchange: HTTPExchange, status: int, code: bytes) -> None:
        exchange.respond(status, {"Content-Type": "application/xml"}, b"<Error><Code>%b</Code></Error>" % code)
