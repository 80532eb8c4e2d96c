"""Registries in memory, spoken to as the cache speaks to `UpstreamClient` and `Transport`: honest, or as they are told.

A request is answered in the reactor's next turn, never while it is made.
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
from dockerproxy.http.stream import ByteStream
from dockerproxy.oci.names import Digest, Registry, Repository
from dockerproxy.upstream.credentials import Configured, Credential, Own

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_NOTHING = Headers()


class Answer:
    """An answer: its body is `body`, the first `sent` bytes of which (None: all) are there."""

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
        self.read = 0
        self._body = body
        self._stream = ByteStream()
        if sent is None:
            self.send()
            self.finish()
        elif sent:
            self.send(sent)

    @property
    def over(self) -> bool:
        return self._stream.ended

    def send(self, size: int | None = None) -> None:
        """Let the next `size` bytes of the body (None: the rest) arrive."""
        data, self._body = (self._body, b"") if size is None else (self._body[:size], self._body[size:])
        if data:
            self._stream.feed(data)

    def finish(self) -> None:
        """Let the body end."""
        self._stream.finish()

    def end(self) -> None:
        """Let the rest arrive, and the end."""
        self.send()
        self.finish()

    def cut(self, error: Exception | None = None) -> None:
        """Let the connection break off."""
        self._stream.fail(error or UpstreamBroken("upstream broke off"))

    # cache.origin.Answer

    async def read_chunk(self) -> bytes:
        return b"".join(await self.read_pieces(1, 0.0))

    async def read_pieces(self, at_least: int, within: float) -> list[bytes]:
        pieces = await self._stream.read_pieces()
        self.read += sum(map(len, pieces))
        return pieces

    async def read_all(self, limit: int) -> bytes:
        content = b""
        while data := await self.read_chunk():
            content += data
            if len(content) > limit:
                self.abort()
                raise UpstreamBroken(f"its answer is longer than {limit} bytes")
        return content

    async def discard(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.over:
            self.aborted = True
            self._stream.fail(UpstreamBroken("the connection was given up"))


@define(eq=False)
class Asked:
    """A request that was made."""

    method: str
    registry: Registry
    path: str
    headers: Headers
    credential: Credential
    follow: bool = True
    body: Any = None
    more: dict[str, Any] = Factory(dict)

    @property
    def who(self) -> str | None:
        """Who asks: None, ``login USER`` or the Authorization."""
        if isinstance(self.credential, Configured):
            return f"login {self.credential.user}"
        return self.credential.authorization if isinstance(self.credential, Own) else None

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    def __str__(self) -> str:
        return f"{self.method} {self.path.rpartition('/')[2]}"


@define
class FakeRepository:
    """What a repository holds, and who may read it (None: all); `refusal` is what others are told."""

    blobs: dict[str, bytes] = Factory(dict)
    manifests: dict[str, tuple[str, bytes]] = Factory(dict)
    readers: set[str | None] | None = None
    refusal: int = 401

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


Behaviour = Callable[[Asked, "bytes | None"], Any]
"""Returns an `Answer` or a Deferred of one, or raises, for a request for the content given (None: there is none)."""


@define
class _Rule:
    method: str
    pattern: re.Pattern[str]
    behaviour: Behaviour
    left: int | None


@define
class Upstream:
    """All registries there are. `down` is raised for everything while it is not None."""

    reactor: Any
    repositories: dict[str, FakeRepository] = Factory(dict)
    asked: list[Asked] = Factory(list)
    answers: list[Answer] = Factory(list)
    down: RegistryError | None = None
    _rules: list[_Rule] = field(factory=list, init=False)

    def repository(self, name: str, **more: Any) -> FakeRepository:
        """Return the repository HOST/NAME, made if need be."""
        return self.repositories.setdefault(name, FakeRepository(**more))

    def on(self, method: str, pattern: str, behaviour: Behaviour, times: int | None = None) -> None:
        """Answer requests whose path matches by `behaviour`, the next `times` of them or all. Older rules go first."""
        self._rules.append(_Rule(method, re.compile(pattern), behaviour, times))

    def behave(self) -> None:
        """Be honest again, and reachable."""
        self._rules.clear()
        self.down = None

    def vanish(self) -> None:
        """Be unreachable."""
        self.down = UpstreamUnreachable("registry.example: connection refused")

    def seen(self, method: str = "", pattern: str = "") -> list[Asked]:
        """Return the requests of that method whose path matches."""
        return [asked for asked in self.asked if asked.method.startswith(method) and re.search(pattern, asked.path)]

    def forget(self) -> None:
        """Forget what was asked."""
        self.asked.clear()

    async def request(
        self,
        method: str,
        registry: Registry,
        path: str,
        *,
        name: Repository | None,
        credential: Credential,
        headers: Headers = _NOTHING,
        body: Any = None,
        actions: str = "pull",
        follow: bool = True,
    ) -> Answer:
        asked = Asked(method, registry, path, headers, credential, follow, body, {"name": name, "actions": actions})
        self.asked.append(asked)
        await deferLater(self.reactor, 0)
        answer = self._answer(asked)
        if isinstance(answer, Deferred):
            answer = await answer
        self.answers.append(answer)
        return answer

    def _answer(self, asked: Asked) -> Any:
        if self.down is not None:
            raise self.down
        found = _PATH.fullmatch(asked.path.partition("?")[0])
        content = self._find(asked.registry, found) if found else None
        for rule in self._rules:
            if rule.method == asked.method and rule.left != 0 and rule.pattern.search(asked.path):
                rule.left = None if rule.left is None else rule.left - 1
                return rule.behaviour(asked, None if content is None else content[1])
        if found is None:
            return Answer(200, b"{}", {"content-type": "application/json"})
        repository = self.repositories.get(f"{asked.registry.host}/{found['name']}")
        if repository is not None and repository.readers is not None and asked.who not in repository.readers:
            return refusal(repository.refusal)
        if content is None:
            return refusal(404)
        return serve(asked, *content)

    def _find(self, registry: Registry, found: re.Match[str]) -> tuple[str, bytes] | None:
        repository = self.repositories.get(f"{registry.host}/{found['name']}", FakeRepository())
        if found["kind"] == "manifests":
            return repository.manifests.get(found["reference"])
        data = repository.blobs.get(found["reference"])
        return None if data is None else ("application/octet-stream", data)


# behaviours


def serve(asked: Asked, media_type: str, data: bytes, *, sent: int | None = None) -> Answer:
    """Answer as a registry does: the head, the whole, or the range that is asked for."""
    fields = {"content-type": media_type, "docker-content-digest": str(Digest.of(data))}
    if asked.method == "HEAD":
        return Answer(200, b"", fields, length=len(data))
    wanted = _RANGE.fullmatch(asked.range or "")
    if wanted is None:
        return Answer(200, data, fields, sent=sent)
    start, stop = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
    if start >= len(data):
        return Answer(416, b"", {"content-range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], fields | {"content-range": f"bytes {start}-{stop - 1}/{len(data)}"}, sent=sent)


def refusal(status: int, **fields: str) -> Answer:
    """Return an answer in upstream's own words."""
    given = {name.replace("_", "-"): value for name, value in fields.items()}
    if status == 401:
        given.setdefault("www-authenticate", 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"')
    return Answer(status, b'{"errors":[{"code":"UPSTREAM","message":"no"}]}', given)


def says(status: int, **fields: str) -> Behaviour:
    return lambda asked, data: refusal(status, **fields)


def fails(error: Exception) -> Behaviour:
    def behave(asked: Asked, data: bytes | None) -> Any:
        raise error

    return behave


def flowing(asked: Asked, data: bytes | None) -> Answer:
    """Begin an honest answer, of which the test lets pass what it likes."""
    assert data is not None
    return serve(asked, "application/octet-stream", data, sent=0)


def cut_after(size: int) -> Behaviour:
    """Break off after `size` bytes of what was asked for."""

    def behave(asked: Asked, data: bytes | None) -> Answer:
        answer = flowing(asked, data)
        answer.send(size)
        answer.cut()
        return answer

    return behave


def rangeless(asked: Asked, data: bytes | None) -> Answer:
    """Send the whole, whatever part was asked for."""
    return Answer(200, data or b"")


def untold(asked: Asked, data: bytes | None) -> Answer:
    """Send the whole and tell no length (chunked)."""
    return Answer(200, data or b"", length=None)


def instead(other: bytes, **fields: str) -> Behaviour:
    """Send something else."""
    given = {name.replace("_", "-"): value for name, value in fields.items()}
    return lambda asked, data: (
        Answer(200, b"", given, length=len(other)) if asked.method == "HEAD" else Answer(200, other, given)
    )


def web_page(asked: Asked, data: bytes | None) -> Answer:
    """Answer as a captive portal or a tired load balancer does: the same to everything."""
    return instead(b"<!doctype html><h1>Sign in</h1>", content_type="text/html")(asked, data)  # type: ignore[no-any-return]


class Gate:
    """Behaves honestly, but not before it is opened."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []
        self._open = False

    def open(self) -> None:
        self._open = True
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(None)

    def then(self, behaviour: Behaviour) -> Behaviour:
        def behave(asked: Asked, data: bytes | None) -> Any:
            if self._open:
                return behaviour(asked, data)
            deferred: Deferred[None] = Deferred()
            self._waiting.append(deferred)
            return deferred.addCallback(lambda _: behaviour(asked, data))

        return behave


def honest(asked: Asked, data: bytes | None) -> Answer:
    return refusal(404) if data is None else serve(asked, OCI_MANIFEST, data)
