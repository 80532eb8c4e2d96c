"""Registries in memory, with the interfaces of `UpstreamClient` and `Agent`. Tests can script their responses.

A response arrives in the reactor's next turn, never during the request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from attrs import Factory, define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamUnreachable
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ByteStream, ClientBuffers
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Digest, Registry
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.registry_request import RegistryRequest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class ScriptedResponse:
    """A response with the body `body`, of which the first `sent` bytes have arrived (None: all)."""

    sender: Any = None

    def __init__(
        self,
        status: int = 200,
        body: bytes = b"",
        fields: dict[str, str] | None = None,
        *,
        length: int | None = -1,
        sent: int | None = None,
    ) -> None:
        fields = dict(fields or {})
        self.status = status
        self.length = len(body) if length == -1 else length
        if self.length is not None:
            fields.setdefault("content-length", str(self.length))
        self.headers = Headers(fields.items())
        self.aborted = False
        self.bytes_read = 0
        self._body = body
        self._stream = ByteStream()
        if sent is None:
            self.send()
            self.finish()
        elif sent:
            self.send(sent)

    @property
    def ended(self) -> bool:
        return self._stream.ended

    def send(self, size: int | None = None) -> None:
        """Make the next `size` bytes of the body arrive (None: the rest)."""
        data, self._body = (self._body, b"") if size is None else (self._body[:size], self._body[size:])
        if data:
            self._stream.feed(data)

    def finish(self) -> None:
        """End the body."""
        self._stream.finish()

    def send_rest(self) -> None:
        """Make the rest of the body arrive, and end it."""
        self.send()
        self.finish()

    def disconnect(self, error: Exception | None = None) -> None:
        """Break the connection."""
        self._stream.fail(error or UpstreamBroken("upstream broke off"))

    # cache.upstream.UpstreamResponse

    def limit_read_ahead(self, size: int) -> None:
        self._stream.limit_read_ahead(size)

    def count_for(self, buffers: ClientBuffers) -> None:
        self._stream.count_for(buffers)

    async def read_chunk(self) -> bytes:
        return b"".join(await self.read_pieces(1, 0.0))

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        pieces = await self._stream.read_pieces()
        self.bytes_read += sum(map(len, pieces))
        return pieces

    async def read_all(self, limit: int, digest: Digest | None = None) -> bytes:
        content = b""
        while data := await self.read_chunk():
            content += data
            if len(content) > limit:
                self.abort()
                raise UpstreamBroken(f"the response is longer than {limit} bytes")
        return content

    async def discard(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.ended:
            self.aborted = True
            self._stream.fail(UpstreamBroken("the response was aborted"))


@define(eq=False)
class ReceivedRequest:
    """A request that the upstream received."""

    method: str
    registry: Registry
    path: str
    headers: Headers
    credential: Credential
    follow: bool = True
    body: Any = None
    options: dict[str, Any] = Factory(dict)

    @property
    def requester(self) -> str | None:
        """The requesting client: None, ``login USER`` or the Authorization field."""
        if isinstance(self.credential, BasicCredentials):
            return f"login {self.credential.user}"
        return self.credential.authorization if isinstance(self.credential, ClientCredential) else None

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    def __str__(self) -> str:
        return f"{self.method} {self.path.rpartition('/')[2]}"


@define
class FakeRepository:
    """The content of a repository. `readers` may read it (None: everyone); others get `denial_status`."""

    blobs: dict[str, bytes] = Factory(dict)
    manifests: dict[str, tuple[str, bytes]] = Factory(dict)
    readers: set[str | None] | None = None
    denial_status: int = 401

    def put_blob(self, data: bytes, algorithm: str = "sha256") -> Digest:
        digest = Digest.of(data, algorithm)
        self.blobs[str(digest)] = data
        return digest

    def put_manifest(
        self, data: bytes, *tags: str, media_type: str = OCI_MANIFEST, algorithm: str = "sha256"
    ) -> Digest:
        digest = Digest.of(data, algorithm)
        for reference in (str(digest), *tags):
            self.manifests[reference] = (media_type, data)
        return digest


Responder = Callable[[ReceivedRequest, "bytes | None"], Any]
"""Returns the response to a request, or a Deferred of it, or raises. The bytes are the content (None if missing)."""


@define
class _Rule:
    method: str
    pattern: re.Pattern[str]
    responder: Responder
    remaining: int | None


@define
class ScriptedUpstream:
    """All registries. While `down` is not None, every request raises it."""

    reactor: Any
    repositories: dict[str, FakeRepository] = Factory(dict)
    requests: list[ReceivedRequest] = Factory(list)
    responses: list[ScriptedResponse] = Factory(list)
    down: RegistryError | None = None
    _rules: list[_Rule] = field(factory=list, init=False)

    def repository(self, name: str, **options: Any) -> FakeRepository:
        """Return the repository HOST/NAME. Create it if it does not exist."""
        return self.repositories.setdefault(name, FakeRepository(**options))

    def on(self, method: str, pattern: str, responder: Responder, times: int | None = None) -> None:
        """Use `responder` for the next `times` requests (None: all) that match. Earlier rules take precedence."""
        self._rules.append(_Rule(method, re.compile(pattern), responder, times))

    def reset(self) -> None:
        """Remove all rules, and be reachable again."""
        self._rules.clear()
        self.down = None

    def go_down(self) -> None:
        """Make all registries unreachable."""
        self.down = UpstreamUnreachable("registry.example: connection refused")

    def requests_matching(self, method: str = "", pattern: str = "") -> list[ReceivedRequest]:
        """Return the received requests with this method whose path matches `pattern`."""
        return [
            request
            for request in self.requests
            if request.method.startswith(method) and re.search(pattern, request.path)
        ]

    def clear_requests(self) -> None:
        """Clear the list of received requests."""
        self.requests.clear()

    async def request(self, request: RegistryRequest) -> ScriptedResponse:
        received = ReceivedRequest(
            request.method, request.registry, request.path, request.headers, request.credential, request.follow,
            request.body, {"name": request.name, "actions": request.actions},
        )  # fmt: skip
        self.requests.append(received)
        await deferLater(self.reactor, 0)
        response = self._respond(received)
        if isinstance(response, Deferred):
            response = await response
        self.responses.append(response)
        return response

    async def send(
        self,
        method: str,
        registry: Registry,
        path: str,
        headers: Headers,
        body: Any = None,
        *,
        client_connection: object = None,
    ) -> ScriptedResponse:
        return await self.request(
            RegistryRequest(
                method, registry, path, name=None, credential=Anonymous(), headers=headers, body=body, follow=False
            )
        )

    def _respond(self, request: ReceivedRequest) -> Any:
        if self.down is not None:
            raise self.down
        match = _PATH.fullmatch(request.path.partition("?")[0])
        content = self._find(request.registry, match) if match else None
        for rule in self._rules:
            if rule.method == request.method and rule.remaining != 0 and rule.pattern.search(request.path):
                rule.remaining = None if rule.remaining is None else rule.remaining - 1
                return rule.responder(request, None if content is None else content[1])
        if match is None:
            return ScriptedResponse(200, b"{}", {"content-type": "application/json"})
        repository = self.repositories.get(f"{request.registry.host}/{match['name']}")
        if repository is not None and repository.readers is not None and request.requester not in repository.readers:
            return error_response(repository.denial_status)
        if content is None:
            return error_response(404)
        return serve_content(request, *content)

    def _find(self, registry: Registry, match: re.Match[str]) -> tuple[str, bytes] | None:
        repository = self.repositories.get(f"{registry.host}/{match['name']}", FakeRepository())
        if match["kind"] == "manifests":
            return repository.manifests.get(match["reference"])
        data = repository.blobs.get(match["reference"])
        return None if data is None else ("application/octet-stream", data)


# responders


def serve_content(
    request: ReceivedRequest, media_type: str, data: bytes, *, sent: int | None = None
) -> ScriptedResponse:
    """Respond like a registry: to HEAD, to GET, and to a Range."""
    fields = {"content-type": media_type, "docker-content-digest": str(Digest.of(data))}
    if request.method == "HEAD":
        return ScriptedResponse(200, b"", fields, length=len(data))
    range_match = _RANGE.fullmatch(request.range or "")
    if range_match is None:
        return ScriptedResponse(200, data, fields, sent=sent)
    start, stop = int(range_match[1]), min(int(range_match[2]) + 1 if range_match[2] else len(data), len(data))
    if start >= len(data):
        return ScriptedResponse(416, b"", {"content-range": f"bytes */{len(data)}"})
    return ScriptedResponse(
        206, data[start:stop], fields | {"content-range": f"bytes {start}-{stop - 1}/{len(data)}"}, sent=sent
    )


def error_response(status: int, **fields: str) -> ScriptedResponse:
    """Return an error response with a body from upstream."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    if status == 401:
        headers.setdefault(
            "www-authenticate", 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"'
        )
    return ScriptedResponse(status, b'{"errors":[{"code":"UPSTREAM","message":"no"}]}', headers)


def respond_with(status: int, **fields: str) -> Responder:
    return lambda request, data: error_response(status, **fields)


def raise_error(error: Exception) -> Responder:
    def respond(request: ReceivedRequest, data: bytes | None) -> Any:
        raise error

    return respond


def respond_streaming(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Start a correct response. The test sends its body."""
    assert data is not None
    return serve_content(request, "application/octet-stream", data, sent=0)


def disconnect_after(size: int) -> Responder:
    """Break the connection after `size` bytes of the requested content."""

    def respond(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        response = respond_streaming(request, data)
        response.send(size)
        response.disconnect()
        return response

    return respond


def ignore_range(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send the whole content even if a range was requested."""
    return ScriptedResponse(200, data or b"")


def without_length(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send the whole content without a Content-Length (chunked)."""
    return ScriptedResponse(200, data or b"", length=None)


def replace_with(body: bytes, **fields: str) -> Responder:
    """Send `body` instead of the content."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    return lambda request, data: (
        ScriptedResponse(200, b"", headers, length=len(body))
        if request.method == "HEAD"
        else ScriptedResponse(200, body, headers)
    )


def captive_portal(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send the same page for every request, like a captive portal or a failing load balancer."""
    return replace_with(b"<!doctype html><h1>Sign in</h1>", content_type="text/html")(request, data)  # type: ignore[no-any-return]


class Gate:
    """Delays responses until it is opened."""

    def __init__(self) -> None:
        self._waiters: list[Deferred[None]] = []
        self._open = False

    def open(self) -> None:
        self._open = True
        waiters, self._waiters = self._waiters, []
        for deferred in waiters:
            deferred.callback(None)

    def delay(self, responder: Responder) -> Responder:
        def respond(request: ReceivedRequest, data: bytes | None) -> Any:
            if self._open:
                return responder(request, data)
            deferred: Deferred[None] = Deferred()
            self._waiters.append(deferred)
            return deferred.addCallback(lambda _: responder(request, data))

        return respond


def respond_normally(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    return error_response(404) if data is None else serve_content(request, OCI_MANIFEST, data)
