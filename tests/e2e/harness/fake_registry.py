"""A registry in memory with rules that make it misbehave on demand."""

from __future__ import annotations

import gzip
import json
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable

from attrs import define, field

from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import SampleImage, TypedContent, sha256_digest

ResponseBehaviour = Callable[[HTTPExchange, "TypedContent | None"], None]
"""Responds to a request for the given content, which is None if the registry does not have it."""

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_UPLOAD = re.compile(r"/v2/(?P<name>.+)/blobs/uploads/(?P<session>[^/]*)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@define
class _Rule:
    method: str
    pattern: re.Pattern[str]
    behaviour: ResponseBehaviour
    remaining: int | None


@define
class _Repository:
    manifests: dict[str, TypedContent] = field(factory=dict)
    blobs: dict[str, TypedContent] = field(factory=dict)


class FakeRegistry(StubServer):
    """Serves the content that was put into it. A rule replaces the normal response to matching requests."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self._repositories: dict[str, _Repository] = {}
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.uploads: dict[str, bytes] = {}

    def put(self, name: str, tag: str, image: SampleImage) -> None:
        """Store `image` as `name`:`tag`."""
        repository = self._repositories.setdefault(name, _Repository())
        for child in image.children_first():
            repository.manifests[child.digest] = child.manifest
            repository.blobs.update((blob.digest, blob) for blob in child.blobs)
        repository.manifests[tag] = image.manifest

    def put_blob(self, name: str, data: bytes, digest: str | None = None) -> str:
        """Store `data` as a blob of `name` and return its digest. A wrong `digest` may be given for the blob's name."""
        content = TypedContent("application/octet-stream", data)
        digest = digest or content.digest
        self._repositories.setdefault(name, _Repository()).blobs[digest] = content
        return digest

    def put_manifest(self, name: str, reference: str, manifest: TypedContent) -> None:
        self._repositories.setdefault(name, _Repository()).manifests[reference] = manifest

    def add_rule(self, method: str, pattern: str, behaviour: ResponseBehaviour, times: int | None = None) -> None:
        """Respond with `behaviour` to requests with a path that matches `pattern`: to the next `times` or to all."""
        with self._lock:
            self._rules.append(_Rule(method, re.compile(pattern), behaviour, times))

    def reset_rules(self) -> None:
        """Remove all rules, and clear the list of requests."""
        with self._lock:
            self._rules.clear()
        self.requests.clear()

    def handle(self, exchange: HTTPExchange) -> None:
        content = self._find(exchange.path)
        with self._lock:
            rule = next((rule for rule in self._rules if self._matches(rule, exchange)), None)
            if rule is not None and rule.remaining is not None:
                rule.remaining -= 1
        if rule is not None:
            rule.behaviour(exchange, content)
        elif exchange.method in ("GET", "HEAD"):
            respond_normally(exchange, content)
        else:
            self._handle_push(exchange)

    @staticmethod
    def _matches(rule: _Rule, exchange: HTTPExchange) -> bool:
        return (
            rule.method == exchange.method and bool(rule.pattern.search(exchange.request.path)) and rule.remaining != 0
        )

    def _find(self, path: str) -> TypedContent | None:
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        repository = self._repositories.get(match["name"], _Repository())
        return (repository.manifests if match["kind"] == "manifests" else repository.blobs).get(match["reference"])

    def _handle_push(self, exchange: HTTPExchange) -> None:
        """Handle POST, PATCH and PUT of blobs, and PUT of manifests, without checking anything."""
        body = b"".join(exchange.read_body())
        upload = _UPLOAD.fullmatch(exchange.path)
        manifest = _PATH.fullmatch(exchange.path)
        if upload is not None and exchange.method == "POST":
            location = f"/v2/{upload['name']}/blobs/uploads/{len(self.requests)}"
            exchange.respond(202, {"Location": location, "Range": "0-0"})
        elif upload is not None and exchange.method == "PATCH":
            received = self.uploads[exchange.path] = self.uploads.get(exchange.path, b"") + body
            exchange.respond(202, {"Location": exchange.path, "Range": f"0-{len(received) - 1}"})
        elif upload is not None and exchange.method == "PUT":
            digest = self.put_blob(upload["name"], self.uploads.pop(exchange.path, b"") + body)
            exchange.respond(201, {"Location": f"/v2/{upload['name']}/blobs/{digest}", "Docker-Content-Digest": digest})
        elif manifest is not None and exchange.method == "PUT":
            media_type = exchange.request.headers.get("content-type", "")
            self.put_manifest(manifest["name"], manifest["reference"], TypedContent(media_type, body))
            exchange.respond(201, {"Docker-Content-Digest": sha256_digest(body)})
        elif exchange.method == "DELETE":
            exchange.respond(202)
        else:
            exchange.respond(404)


# behaviours


def respond_normally(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond as a correct registry does: with the whole content, or with a single requested range."""
    if content is None:
        if exchange.path in ("/v2", "/v2/"):
            exchange.respond(200, {"Content-Type": "application/json"}, b"{}")
        else:
            respond_error(exchange, 404, "NAME_UNKNOWN")
        return
    headers = {
        "Content-Type": content.media_type,
        "Docker-Content-Digest": content.digest,
        "Accept-Ranges": "bytes",
        "ETag": f'"{content.digest}"',
    }
    range_match = _RANGE.fullmatch(exchange.request.headers.get("range", ""))
    size = len(content.data)
    if range_match is None or not any(range_match.groups()):
        exchange.respond(200, headers, content.data) if exchange.method == "GET" else exchange.respond(
            200, headers | {"Content-Length": str(size)}
        )
        return
    first, last = (int(text) if text else None for text in range_match.groups())
    start = size - (last or 0) if first is None else first
    end = size if first is None or last is None else min(last + 1, size)
    if start >= size:
        exchange.respond(416, {"Content-Range": f"bytes */{size}"})
        return
    exchange.respond(206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}, content.data[start:end])


def respond_error(exchange: HTTPExchange, status: int, code: str, **headers: str) -> None:
    """Respond with an OCI error body."""
    body = json.dumps({"errors": [{"code": code, "message": f"the fake registry says {code}"}]}).encode()
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    exchange.respond(status, {"Content-Type": "application/json", **fields}, body)


def respond_status(status_code: int, code: str = "UNKNOWN", **headers: str) -> ResponseBehaviour:
    """Respond with this status. Underscores in the names of `headers` become dashes."""
    return lambda exchange, content: respond_error(exchange, status_code, code, **headers)


def require_authorization(www_authenticate: str) -> ResponseBehaviour:
    """Respond with 401 to requests without an Authorization, and normally to all others."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if "authorization" in exchange.request.headers:
            respond_normally(exchange, content)
        else:
            respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate=www_authenticate)

    return respond


def redirect_to(location: str, status_code: int = 307) -> ResponseBehaviour:
    return lambda exchange, content: exchange.respond(status_code, {"Location": location})


def respond_html(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond with an HTML page, as a captive portal or an overloaded load balancer does."""
    exchange.respond(200, {"Content-Type": "text/html"}, b"<!doctype html><title>Welcome</title><h1>Sign in</h1>")


def truncate_after(size: int, *, reset: bool = False) -> ResponseBehaviour:
    """Announce the whole content, and close or reset the connection after `size` bytes of it."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        _, remainder = _send_head(exchange, content)
        exchange.send_body(remainder[:size])
        exchange.reset() if reset else exchange.close_after_response()

    return respond


def respond_corrupted(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Send content of the right length with a wrong first byte."""
    _, remainder = _send_head(exchange, content)
    exchange.send_body(bytes([remainder[0] ^ 1]) + bytes(remainder[1:]))


def respond_wrong_length(extra: int) -> ResponseBehaviour:
    """Announce a length that is `extra` bytes more than the body, and close the connection after the body."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        assert content is not None
        exchange.send_head(200, {"Content-Type": content.media_type, "Content-Length": str(len(content.data) + extra)})
        exchange.send_body(content.data[: len(content.data) + min(extra, 0)])
        exchange.close_after_response()

    return respond


def ignore_range(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond to every GET with the whole content."""
    assert content is not None
    exchange.respond(200, {"Content-Type": content.media_type}, content.data)


def respond_chunked(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Send the whole content in chunks, without a Content-Length."""
    assert content is not None
    exchange.send_head(200, {"Content-Type": content.media_type, "Transfer-Encoding": "chunked"})
    for start in range(0, len(content.data), 50_000):
        exchange.send_chunk(content.data[start : start + 50_000])
    exchange.send_chunk(b"")


def respond_encoded(*codings: str, ranges: bool = True) -> ResponseBehaviour:
    """Respond with these content codings, though none was asked for. A coding `LIE:gzip` is in the field only."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if content is None:
            return respond_normally(exchange, content)
        data = content.data
        for coding in codings:
            data = _CODERS.get(coding, bytes)(data)
        fields = {
            "Content-Type": content.media_type,
            "Docker-Content-Digest": content.digest,
            "Content-Encoding": ", ".join(coding.removeprefix("LIE:") for coding in codings),
        }
        range_match = _RANGE.fullmatch(exchange.request.headers.get("range", "")) if ranges else None
        if range_match is not None and range_match[1]:
            start, stop = int(range_match[1]), int(range_match[2] or len(data) - 1) + 1
            fields["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            exchange.respond(206, fields, data[start:stop])
        elif exchange.method == "HEAD":
            exchange.respond(200, fields | {"Content-Length": str(len(data))})
        else:
            exchange.respond(200, fields, data)

    return respond


_CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress,
}  # fmt: skip


def respond_without_end(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Send the content without a length, and close the connection. Python closes TLS without close_notify."""
    if content is None:
        return respond_normally(exchange, content)
    fields = {"Content-Type": content.media_type, "Docker-Content-Digest": content.digest, "Connection": "close"}
    exchange.send_head(200, fields)
    exchange.send_body(content.data)
    exchange.close_after_response()


def respond_http10(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond with HTTP/1.0, without a length; the end of the connection is the end of the content."""
    if content is None:
        return respond_normally(exchange, content)
    head = f"HTTP/1.0 200 OK\r\nContent-Type: {content.media_type}\r\nDocker-Content-Digest: {content.digest}\r\n\r\n"
    exchange.send_body(head.encode() + content.data)
    exchange.close_after_response()


def respond_chunked_with_trailers(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Send the whole content in chunks with extensions, and trailers."""
    assert content is not None
    exchange.send_head(
        200, {"Content-Type": content.media_type, "Transfer-Encoding": "chunked", "Trailer": "Digest, X-Time"}
    )
    for start in range(0, len(content.data), 50_000):
        piece = content.data[start : start + 50_000]
        exchange.send_body(b"%x;part=%d\r\n%b\r\n" % (len(piece), start, piece))
    exchange.send_body(b"0;end\r\nDigest: sha-256=x\r\nX-Time: 1\r\n\r\n")


def respond_odd_head(
    *lines: str, status_line: str = "HTTP/1.1 200 OK", line_end: str = "\r\n", before: str = ""
) -> ResponseBehaviour:
    """Send `before`, a head whose lines end in `line_end`, and the content.

    The head has a Content-Type, a digest and a length, and `lines`, in which TYPE, DIGEST and LENGTH stand for theirs.
    """

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if content is None:
            return respond_normally(exchange, content)
        values = {"TYPE": content.media_type, "DIGEST": content.digest, "LENGTH": str(len(content.data))}
        fields = ["Content-Type: TYPE", "Docker-Content-Digest: DIGEST", "Content-Length: LENGTH"]
        head = before + "".join(line + line_end for line in (status_line, *fields, *lines, ""))
        exchange.send_body(re.sub("TYPE|DIGEST|LENGTH", lambda match: values[match[0]], head).encode())
        exchange.send_body(content.data if exchange.method == "GET" else b"")

    return respond


def respond_odd_chunks(
    size_line: bytes = b"%x\r\n", line_end: bytes = b"\r\n", version: str = "1.1"
) -> ResponseBehaviour:
    """Send the whole content in chunks, with lines of sizes and ends such as these."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if content is None:
            return respond_normally(exchange, content)
        fields = f"Content-Type: {content.media_type}\r\nDocker-Content-Digest: {content.digest}\r\n"
        codings = "Transfer-Encoding: Chunked\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n"
        exchange.send_body(f"HTTP/{version} 200 OK\r\n{fields}{codings}\r\n".encode())
        for start in range(0, len(content.data), 50_000):
            piece = content.data[start : start + 50_000]
            exchange.send_body(size_line % len(piece) + piece + line_end)
        exchange.send_body(b"000" + line_end + b"an odd trailer" + line_end * 2)

    return respond


def respond_wall(status: int, body: bytes = b"<html><h1>Blocked</h1></html>", **headers: str) -> ResponseBehaviour:
    """Respond as a firewall or a content delivery network in the place of the registry."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()} or {"Content-Type": "text/html"}
    return lambda exchange, content: exchange.respond(status, fields, body)


def pause_after(size: int, gate: threading.Event, then: ResponseBehaviour | None = None) -> ResponseBehaviour:
    """Send `size` bytes of the requested content, and the rest after `gate` is set."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        _, remainder = _send_head(exchange, content)
        exchange.send_body(remainder[:size])
        gate.wait(120)
        exchange.send_body(remainder[size:])

    return respond


def throttled(rate: float, gate_at: int = 0, gate: threading.Event | None = None) -> ResponseBehaviour:
    """Send `rate` bytes a second, and wait for `gate` before byte `gate_at`."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        start, remainder = _send_head(exchange, content)
        started = time.monotonic()
        for position in range(0, len(remainder), 262_144):
            if gate is not None and start + position >= gate_at and not gate.is_set():
                gate.wait(120)
                started = time.monotonic() - position / rate
            exchange.send_body(remainder[position : position + 262_144])
            time.sleep(max(0.0, started + (position + 262_144) / rate - time.monotonic()))

    return respond


def _send_head(exchange: HTTPExchange, content: TypedContent | None) -> tuple[int, memoryview]:
    """Send the head of a correct response; return the offset of the body in the content, and the body."""
    assert content is not None
    size = len(content.data)
    headers = {"Content-Type": content.media_type, "Accept-Ranges": "bytes"}
    range_match = _RANGE.fullmatch(exchange.request.headers.get("range", ""))
    start = int(range_match[1] or 0) if range_match else 0
    if range_match:
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    exchange.send_head(206 if range_match else 200, headers | {"Content-Length": str(size - start)})
    return start, memoryview(content.data)[start:]
