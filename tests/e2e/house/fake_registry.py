"""A registry in memory that can be told to misbehave: what no well-made registry would do on demand."""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from collections.abc import Callable

from attrs import define, field

from tests.e2e.house.images import Content, Image, sha256
from tests.e2e.house.serving import Exchange, Server

Behaviour = Callable[[Exchange, "Content | None"], None]
"""Answers a request for the given content; None where there is no such thing."""

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_UPLOAD = re.compile(r"/v2/(?P<name>.+)/blobs/uploads/(?P<session>[^/]*)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@define
class _Rule:
    method: str
    pattern: re.Pattern[str]
    behaviour: Behaviour
    left: int | None


@define
class _Repository:
    manifests: dict[str, Content] = field(factory=dict)
    blobs: dict[str, Content] = field(factory=dict)


class FakeRegistry(Server):
    """Serves what was put into it, honestly, save where a rule says otherwise."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self._repositories: dict[str, _Repository] = {}
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.uploads: dict[str, bytes] = {}

    def put(self, name: str, tag: str, image: Image) -> None:
        """Hold `image` as `name`:`tag`."""
        repository = self._repositories.setdefault(name, _Repository())
        for part in image.walk():
            repository.manifests[part.digest] = part.manifest
            repository.blobs.update((blob.digest, blob) for blob in part.blobs)
        repository.manifests[tag] = image.manifest

    def put_blob(self, name: str, data: bytes, digest: str | None = None) -> str:
        """Hold `data` as a blob of `name` and return its digest (or the one that it is to be had by)."""
        content = Content("application/octet-stream", data)
        digest = digest or content.digest
        self._repositories.setdefault(name, _Repository()).blobs[digest] = content
        return digest

    def put_manifest(self, name: str, reference: str, manifest: Content) -> None:
        self._repositories.setdefault(name, _Repository()).manifests[reference] = manifest

    def on(self, method: str, pattern: str, behaviour: Behaviour, times: int | None = None) -> None:
        """Answer requests whose path matches `pattern` by `behaviour`, the next `times` of them or all."""
        with self._lock:
            self._rules.append(_Rule(method, re.compile(pattern), behaviour, times))

    def behave(self) -> None:
        """Forget the rules and the log."""
        with self._lock:
            self._rules.clear()
        self.requests.clear()

    def serve(self, exchange: Exchange) -> None:
        content = self._find(exchange.path)
        with self._lock:
            rule = next((rule for rule in self._rules if self._applies(rule, exchange)), None)
            if rule is not None and rule.left is not None:
                rule.left -= 1
        if rule is not None:
            rule.behaviour(exchange, content)
        elif exchange.method in ("GET", "HEAD"):
            honest(exchange, content)
        else:
            self._take(exchange)

    @staticmethod
    def _applies(rule: _Rule, exchange: Exchange) -> bool:
        return rule.method == exchange.method and bool(rule.pattern.search(exchange.seen.path)) and rule.left != 0

    def _find(self, path: str) -> Content | None:
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        repository = self._repositories.get(match["name"], _Repository())
        return (repository.manifests if match["kind"] == "manifests" else repository.blobs).get(match["reference"])

    def _take(self, exchange: Exchange) -> None:
        """The pushing side: POST, PATCH, PUT of blobs and PUT of manifests, unchecked."""
        body = b"".join(exchange.body())
        upload = _UPLOAD.fullmatch(exchange.path)
        manifest = _PATH.fullmatch(exchange.path)
        if upload is not None and exchange.method == "POST":
            location = f"/v2/{upload['name']}/blobs/uploads/{len(self.requests)}"
            exchange.answer(202, {"Location": location, "Range": "0-0"})
        elif upload is not None and exchange.method == "PATCH":
            so_far = self.uploads[exchange.path] = self.uploads.get(exchange.path, b"") + body
            exchange.answer(202, {"Location": exchange.path, "Range": f"0-{len(so_far) - 1}"})
        elif upload is not None and exchange.method == "PUT":
            digest = self.put_blob(upload["name"], self.uploads.pop(exchange.path, b"") + body)
            exchange.answer(201, {"Location": f"/v2/{upload['name']}/blobs/{digest}", "Docker-Content-Digest": digest})
        elif manifest is not None and exchange.method == "PUT":
            media_type = exchange.seen.headers.get("content-type", "")
            self.put_manifest(manifest["name"], manifest["reference"], Content(media_type, body))
            exchange.answer(201, {"Docker-Content-Digest": sha256(body)})
        elif exchange.method == "DELETE":
            exchange.answer(202)
        else:
            exchange.answer(404)


# behaviours


def honest(exchange: Exchange, content: Content | None) -> None:
    """Answer as a registry does: whole, or the one range that is asked for."""
    if content is None:
        if exchange.path in ("/v2", "/v2/"):
            exchange.answer(200, {"Content-Type": "application/json"}, b"{}")
        else:
            refuse(exchange, 404, "NAME_UNKNOWN")
        return
    headers = {
        "Content-Type": content.media_type,
        "Docker-Content-Digest": content.digest,
        "Accept-Ranges": "bytes",
        "ETag": f'"{content.digest}"',
    }
    wanted = _RANGE.fullmatch(exchange.seen.headers.get("range", ""))
    size = len(content.data)
    if wanted is None or not any(wanted.groups()):
        exchange.answer(200, headers, content.data) if exchange.method == "GET" else exchange.answer(
            200, headers | {"Content-Length": str(size)}
        )
        return
    first, last = (int(text) if text else None for text in wanted.groups())
    start = size - (last or 0) if first is None else first
    end = size if first is None or last is None else min(last + 1, size)
    if start >= size:
        exchange.answer(416, {"Content-Range": f"bytes */{size}"})
        return
    exchange.answer(206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}, content.data[start:end])


def refuse(exchange: Exchange, status: int, code: str, **headers: str) -> None:
    """Answer with an OCI error body."""
    body = json.dumps({"errors": [{"code": code, "message": f"the fake registry says {code}"}]}).encode()
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    exchange.answer(status, {"Content-Type": "application/json", **fields}, body)


def status(number: int, code: str = "UNKNOWN", **headers: str) -> Behaviour:
    """Answer with that status; the header names' underscores are dashes."""
    return lambda exchange, content: refuse(exchange, number, code, **headers)


def challenge(text: str) -> Behaviour:
    """Ask for credentials; a request that brings any is answered."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        if "authorization" in exchange.seen.headers:
            honest(exchange, content)
        else:
            refuse(exchange, 401, "UNAUTHORIZED", WWW_Authenticate=text)

    return behave


def redirect(location: str, number: int = 307) -> Behaviour:
    return lambda exchange, content: exchange.answer(number, {"Location": location})


def html(exchange: Exchange, content: Content | None) -> None:
    """Answer as a captive portal or a tired load balancer does."""
    exchange.answer(200, {"Content-Type": "text/html"}, b"<!doctype html><title>Welcome</title><h1>Sign in</h1>")


def cut_after(size: int, *, reset: bool = False) -> Behaviour:
    """Promise all that was asked for, and break off after `size` bytes of it."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        _, rest = _begin(exchange, content)
        exchange.send(rest[:size])
        exchange.reset() if reset else exchange.hang_up()

    return behave


def damaged(exchange: Exchange, content: Content | None) -> None:
    """Send the right number of wrong bytes; all of the error is at the start."""
    _, rest = _begin(exchange, content)
    exchange.send(bytes([rest[0] ^ 1]) + bytes(rest[1:]))


def misstated(extra: int) -> Behaviour:
    """State a length that is `extra` more than what comes, and then end the connection."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        assert content is not None
        exchange.begin(200, {"Content-Type": content.media_type, "Content-Length": str(len(content.data) + extra)})
        exchange.send(content.data[: len(content.data) + min(extra, 0)])
        exchange.hang_up()

    return behave


def rangeless(exchange: Exchange, content: Content | None) -> None:
    """Answer every GET with the whole."""
    assert content is not None
    exchange.answer(200, {"Content-Type": content.media_type}, content.data)


def chunked(exchange: Exchange, content: Content | None) -> None:
    """Send the whole in chunks, its length untold."""
    assert content is not None
    exchange.begin(200, {"Content-Type": content.media_type, "Transfer-Encoding": "chunked"})
    for start in range(0, len(content.data), 50_000):
        exchange.send_chunk(content.data[start : start + 50_000])
    exchange.send_chunk(b"")


def gated(size: int, gate: threading.Event, then: Behaviour | None = None) -> Behaviour:
    """Send `size` bytes of what is asked for, and the rest once `gate` is open."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        _, rest = _begin(exchange, content)
        exchange.send(rest[:size])
        gate.wait(120)
        exchange.send(rest[size:])

    return behave


def paced(rate: float, gate_at: int = 0, gate: threading.Event | None = None) -> Behaviour:
    """Send at `rate` bytes a second; before byte `gate_at` wait for `gate`."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        start, rest = _begin(exchange, content)
        begun = time.monotonic()
        for position in range(0, len(rest), 262_144):
            if gate is not None and start + position >= gate_at and not gate.is_set():
                gate.wait(120)
                begun = time.monotonic() - position / rate
            exchange.send(rest[position : position + 262_144])
            time.sleep(max(0.0, begun + (position + 262_144) / rate - time.monotonic()))

    return behave


def _begin(exchange: Exchange, content: Content | None) -> tuple[int, memoryview]:
    """Send the head of an honest answer; return where it starts and what has to follow."""
    assert content is not None
    size = len(content.data)
    headers = {"Content-Type": content.media_type, "Accept-Ranges": "bytes"}
    wanted = _RANGE.fullmatch(exchange.seen.headers.get("range", ""))
    start = int(wanted[1] or 0) if wanted else 0
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    exchange.begin(206 if wanted else 200, headers | {"Content-Length": str(size - start)})
    return start, memoryview(content.data)[start:]
