"""CNCF distribution, as Debian packages it, as an upstream; and a front that sends its blobs' readers elsewhere."""

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

from bench.servers import free_port
from tests.e2e.house.images import Content, Image
from tests.e2e.house.pki import Leaf
from tests.e2e.house.process import Process, eventually, listening
from tests.e2e.house.serving import Exchange, Server
from tests.e2e.house.wire import Straight

_ACCESS = re.compile(
    r'^\S+ \S+ \S+ \[[^]]*\] "(?P<method>[A-Z]+) (?P<path>\S+) \S+" (?P<status>\d+) (?P<size>\d+)', re.MULTILINE
)


@frozen
class Access:
    """A line of the registry's access log; `size` counts the body's bytes."""

    method: str
    path: str
    status: int
    size: int


class DockerRegistry(Process):
    """A registry for `host` on a port of 127.0.0.1, over TLS where it has a `leaf`; `auth` as its config.yml has it."""

    def __init__(
        self, folder: Path, host: str, leaf: Leaf | None = None, auth: Mapping[str, Any] | None = None
    ) -> None:
        self.host = host
        self.port = free_port()
        self.storage = folder / "storage"
        self.storage.mkdir(parents=True)
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}, "delete": {"enabled": True}},
            "http": {"addr": f"127.0.0.1:{self.port}", "secret": secrets.token_hex(16)},
        }
        if leaf is not None:
            config["http"]["tls"] = {"certificate": str(leaf.certificate), "key": str(leaf.key)}
        if auth is not None:
            config["auth"] = auth
        (folder / "config.yml").write_text(json.dumps(config))
        self.secure = leaf is not None
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        super().__init__(
            ["docker-registry", "serve", str(folder / "config.yml")], folder / "output", environment, folder
        )
        self._forgotten = 0

    def start(self) -> None:
        self.launch()
        self.wait_for(lambda: listening(self.port))

    @property
    def accesses(self) -> list[Access]:
        """What was asked since the last `forget`; complete, since a line is written when its request is over."""
        if self.running:
            self._settle()
        return [
            Access(match["method"], match["path"], int(match["status"]), int(match["size"]))
            for match in _ACCESS.finditer(self.text[self._forgotten :])
        ]

    def forget(self) -> None:
        self._settle()
        self._forgotten = len(self.text)

    def _settle(self) -> None:
        """Wait until a request of our own is in the log, so that all before it are."""
        marker = f"/v2/?marker={secrets.token_hex(4)}"
        context = ssl._create_unverified_context() if self.secure else None
        connection = Straight(self.host, ("127.0.0.1", self.port), context)
        try:
            connection.request("GET", marker)
            connection.getresponse().read()
        finally:
            connection.close()
        eventually(lambda: marker in self.text, "the registry's log")

    def seen(self, method: str, part: str) -> list[Access]:
        """Return the accesses with this method whose path holds `part`."""
        return [access for access in self.accesses if access.method == method and part in access.path]

    def blob_file(self, digest: str) -> Path:
        algorithm, _, hexadecimal = digest.partition(":")
        return self.storage / "docker/registry/v2/blobs" / algorithm / hexadecimal[:2] / hexadecimal / "data"


def push(
    registry: DockerRegistry,
    name: str,
    tag: str,
    image: Image,
    context: ssl.SSLContext | None = None,
    authorization: str | None = None,
) -> Image:
    """Put `image` into `registry` as `name`:`tag`, straight, and return it."""
    connection = Straight(registry.host, ("127.0.0.1", registry.port), context if registry.secure else None)
    headers = {"Authorization": authorization} if authorization else {}
    try:
        for part in image.walk():
            for blob in part.blobs:
                _push_blob(connection, name, blob, headers)
            reference = tag if part is image else part.digest
            fields = headers | {"Content-Type": part.manifest.media_type}
            _expect(connection, 201, "PUT", f"/v2/{name}/manifests/{reference}", part.manifest.data, fields)
    finally:
        connection.close()
    return image


def _push_blob(connection: http.client.HTTPConnection, name: str, blob: Content, headers: Mapping[str, str]) -> None:
    session = _expect(connection, 202, "POST", f"/v2/{name}/blobs/uploads/", b"", headers)
    location = urlsplit(session["location"])
    target = f"{location.path}?{location.query}&digest={blob.digest}"
    fields = {**headers, "Content-Type": "application/octet-stream"}
    _expect(connection, 201, "PUT", target, blob.data, fields)


def _expect(
    connection: http.client.HTTPConnection,
    status: int,
    method: str,
    target: str,
    body: bytes,
    headers: Mapping[str, str],
) -> dict[str, str]:
    connection.request(method, target, body, dict(headers))
    response = connection.getresponse()
    text = response.read()
    assert response.status == status, (method, target, response.status, text)
    return {name.lower(): value for name, value in response.getheaders()}


class RedirectingFront(Server):
    """Stands before a registry, as Docker Hub's does: readers of blobs are sent to a store, with a signature.

    `locate` makes the Location of the store's URL; a relative one is completed by the client.
    """

    def __init__(self, context: ssl.SSLContext, registry: DockerRegistry, trust: ssl.SSLContext, location: str) -> None:
        super().__init__(context)
        self._registry = registry
        self._trust = trust
        self._location = location

    def serve(self, exchange: Exchange) -> None:
        connection = Straight(self._registry.host, ("127.0.0.1", self._registry.port), self._trust)
        blob = "/blobs/sha256:" in exchange.path
        headers = {name: value for name, value in exchange.seen.headers.items() if name not in ("connection", "range")}
        try:
            body = b"".join(exchange.body())
            connection.request("HEAD" if blob else exchange.method, exchange.seen.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        fields = dict(response.getheaders())
        if blob and exchange.method == "GET" and response.status == 200:
            digest = exchange.path.rpartition("/")[2]
            exchange.answer(307, {"Location": self._location.format(digest=digest, signature=SignedStore.SIGNATURE)})
        elif exchange.method == "HEAD":
            exchange.answer(response.status, fields)
        else:
            exchange.answer(response.status, fields | {"Content-Length": str(len(content))}, content)


class SignedStore(Server):
    """An object store that is read by signed URLs; a strict one takes it ill when an Authorization comes along."""

    SIGNATURE = "5ig-" + secrets.token_hex(16)

    def __init__(self, context: ssl.SSLContext, registry: DockerRegistry, *, strict: bool = True) -> None:
        super().__init__(context)
        self._registry = registry
        self._strict = strict

    def serve(self, exchange: Exchange) -> None:
        if self._strict and "authorization" in exchange.seen.headers:
            return self._refuse(exchange, 400, b"InvalidArgument")
        if f"Signature={self.SIGNATURE}" not in exchange.query:
            return self._refuse(exchange, 403, b"AccessDenied")
        file = self._registry.blob_file(exchange.path.rpartition("/")[2])
        if not file.exists():
            return self._refuse(exchange, 404, b"NoSuchKey")
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", exchange.seen.headers.get("range", ""))
        if wanted is None:
            exchange.answer(200, {"Content-Type": "application/octet-stream"}, data)
        else:
            start = int(wanted[1])
            fields = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            exchange.answer(206, fields, data[start:])

    @staticmethod
    def _refuse(exchange: Exchange, status: int, code: bytes) -> None:
        exchange.answer(status, {"Content-Type": "application/xml"}, b"<Error><Code>%b</Code></Error>" % code)
