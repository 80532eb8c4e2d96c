"""A cache between stand-ins, put together as `dockerproxy.tap.make_cache` does it, on a store of its own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.cache.access import Access
from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.challenges import Challenges
from dockerproxy.cache.flights import Flights
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import Identities
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.origin import Origin, Visitor
from dockerproxy.cache.pullthrough import CachedRegistry, PullThrough
from dockerproxy.cache.room import CacheRoom
from dockerproxy.cache.tokens import TokenDesk
from dockerproxy.concurrency import LocalKeyedLock, spawn
from dockerproxy.http.headers import Headers
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.names import Digest, Registry, parse_reference, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from dockerproxy.store.slices import Slices
from dockerproxy.upstream.credentials import Anonymous, Configured, Own
from tests.cache.stand_ins.reactor import Reactor
from tests.cache.stand_ins.upstream import Upstream

NO_HEADERS = Headers()
EPOCH = 1_700_000_000.0
HUB = Registry.parse("registry-1.docker.io")
OTHER = Registry.parse("other.example:5000")
ACCEPT = ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"]
EACH_TIME = Freshness(False, re.compile("(stable)"), 600, re.compile(r"\d+\.\d+"), 6000, 3600)


class Exchange:
    """What is asked of servers without going through `Upstream`: pings and realms."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.permits: list[Any] = []
        self.bodies: list[bytes] = []

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = NO_HEADERS,
        body: Any = None,
        *,
        permit: Any = None,
    ) -> Any:
        self.permits.append(permit)
        if body is not None:
            written: list[bytes] = []
            body.startProducing(type("Consumer", (), {"write": staticmethod(written.append)}))
            self.bodies.append(b"".join(written))
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        registry = Registry.parse(f"{scheme}://{authority}")
        return await self._upstream.request(
            method, registry, "/" + path, name=None, credential=Anonymous(), headers=headers
        )


class World:
    """The cache, and all that it is made of. Time starts at `EPOCH`."""

    def __init__(
        self,
        root: Path,
        *,
        limit: int = 1 << 30,
        inactive: float = 5e6,
        freshness: Freshness = EACH_TIME,
        login: Configured | None = None,
        upstream: Upstream | None = None,
        registries: tuple[Registry, ...] = (HUB, OTHER),
        permit: Any = None,
        secret: bytes = b"s" * 32,
        since: float = 0.0,
        shared: bool = False,
        turns: LocalKeyedLock | None = None,
    ) -> None:
        self.reactor = reactor = Reactor() if upstream is None else upstream.reactor
        self.upstream = upstream or Upstream(reactor)
        self.exchange = Exchange(self.upstream)
        self.layout = Layout(root)
        self.blobs, self.links = Blobs(self.layout, False, self.now), Links(self.layout, False)
        self.records = Records(root / "records")
        self.identities = Identities(secret)
        self.access = Access(self.records, self.now, shared)
        self.turns = turns or LocalKeyedLock()
        whole = Slices(reactor, length=math.inf)  # nothing else is going on that would have to wait
        self.room = CacheRoom(
            reactor, self.layout, self.blobs, limit=limit, inactive=inactive, clock=self.now, slices=whole
        )
        self.meeting = Ingests(self.layout, self.blobs, self.records, shared)
        self.flights = Flights(reactor, self.upstream, self.room, self.meeting)
        self.learned: dict[Registry, Any] = {}
        hosts = [registry.host for registry in registries] + [Registry.parse("auth.docker.io").host]
        self.challenges = Challenges(self.exchange, self.records, hosts, self.learned.__setitem__, self.now)
        self.desk = TokenDesk(
            self.exchange, self.identities, self.records, lambda host: None if host in hosts else permit, self.now
        )
        self.manifests = CachedManifests(
            reactor, self.upstream, self.blobs, self.links, self.records, self.access, freshness, self.turns,
            clock=self.now, keep=lambda digest, size: spawn(self.room.count(digest, size), "counting"),
        )  # fmt: skip
        self.cached = CachedBlobs(reactor, self.upstream, self.blobs, self.links, self.flights, self.access, self.room)
        self.cache = PullThrough(
            self.upstream, self.identities, self.challenges, self.desk, self.manifests, self.cached, registries,
            lambda registry: login, self.now,
        )  # fmt: skip
        self._started: list[Deferred[Any]] = []

    def now(self) -> float:
        return EPOCH + float(self.reactor.seconds())

    # who asks

    def client(self, authorization: str | None = None, registry: Registry = HUB) -> CachedRegistry:
        return self.cache.registry(registry, authorization)

    def origin(self, name: str = "library/app", registry: Registry = HUB, who: str | None = None) -> Origin:
        return Origin(registry, parse_repository(name), Anonymous() if who is None else Own(who))

    def visitor(self, name: str = "library/app", registry: Registry = HUB, who: str | None = None) -> Visitor:
        origin = self.origin(name, registry, who)
        return Visitor(origin, self.identities.of(registry, origin.credential))

    def blob(
        self, digest: Digest, name: str = "library/app", who: str | None = None, *, head: bool = False,
        registry: Registry = HUB,
    ) -> Coroutine[Any, Any, BlobAnswer]:  # fmt: skip
        """Ask for a blob as the client that shows `who`."""
        return self.client(who, registry).blob(parse_repository(name), digest, head=head)

    def manifest(
        self, reference: object, name: str = "library/app", who: str | None = None, *, head: bool = False,
        registry: Registry = HUB, accept: list[str] = ACCEPT,
    ) -> Coroutine[Any, Any, ManifestAnswer]:  # fmt: skip
        """Ask for a manifest as the client that shows `who`."""
        parsed = parse_reference(str(reference))
        return self.client(who, registry).manifest(parse_repository(name), parsed, accept, head=head)

    # how it goes on

    def start(self, work: Coroutine[Any, Any, Any]) -> Deferred[Any]:
        """Start `work`, and let happen what is due."""
        started = Deferred.fromCoroutine(work)
        self._started.append(started)
        self.reactor.settle()
        return started

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 0) -> Any:
        """Return what `work` gives, within `seconds`, or raise what it raises."""
        return result(self.start(work), self.reactor, seconds)

    def fetch(
        self, digest: Digest, name: str = "library/app", who: str | None = None, **more: Any
    ) -> tuple[str, bytes]:
        """Ask for a blob and read it: return the verdict and the content."""
        return self.run(self.fetch_later(digest, name, who, **more), 60)  # type: ignore[no-any-return]

    async def fetch_later(
        self, digest: Digest, name: str = "library/app", who: str | None = None, **more: Any
    ) -> tuple[str, bytes]:
        """Ask for a blob and read it, however long that takes."""
        answer = await self.blob(digest, name, who, **more)
        assert answer.content is not None
        try:
            return answer.verdict, await read_all(answer.content)
        finally:
            answer.content.close()

    def advance(self, seconds: float) -> None:
        """Let time pass, in steps."""
        for _ in range(int(seconds * 10)):
            self.reactor.advance(0.1)
            self.reactor.settle()

    # what is left

    @property
    def ingests(self) -> list[str]:
        folder = Path(self.layout.ingests)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    @property
    def open_files(self) -> list[str]:
        """The files of this cache that are open."""
        files = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                files.append(os.readlink(f"/proc/self/fd/{name}"))
        return [file for file in files if file.startswith(f"{self.layout.root}/")]

    def check_ends(self) -> None:
        """Let all that is under way come to its end; nothing may be left."""
        self.reactor.pool.release()
        self.upstream.vanish()
        for answer in self.upstream.answers:
            if not answer.over:
                answer.cut()
        for _ in range(30):
            self.reactor.advance(10)
            self.reactor.settle()
        for started in self._started:
            started.addErrback(lambda _: None)
        assert self.flights._flights == {}
        assert self.room.usage._pins == {}
        assert self.open_files == []
        assert all(answer.over for answer in self.upstream.answers)


def result(deferred: Deferred[Any], reactor: Reactor, seconds: float = 0) -> Any:
    """Return what `deferred` fires with, within `seconds`; raise what it fails with, or AssertionError."""
    outcome: list[Any] = []
    deferred.addBoth(outcome.append)
    reactor.settle()
    for _ in range(int(seconds * 10)):
        if outcome:
            break
        reactor.advance(0.1)
        reactor.settle()
    assert outcome, "it still waits"
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


async def nothing() -> None:
    """What there is to be done for a flight that lands."""


async def read_all(content: Any, start: int = 0, piece: int = 1 << 20) -> bytes:
    """Read a content as a client does, from `start` on, never more than `piece` bytes at once."""
    data = b""
    while got := await content.read(start + len(data), piece):
        assert 0 < len(got) <= piece
        data += got
    return data


class Reader:
    """A client of a content under way, that reads when it is told to."""

    def __init__(self, world: World, content: Any, start: int = 0) -> None:
        self._world = world
        self.content = content
        self.start = start
        self.data = b""
        self.error: Exception | None = None
        self.ended = False
        self.waiting: Deferred[Any] | None = None

    def read(self, at_most: int = 1 << 20) -> None:
        """Ask for the next bytes, unless it waits for them already."""
        if self.waiting is None and not self.ended and self.error is None:
            self.waiting = Deferred.fromCoroutine(self.content.read(self.start + len(self.data), at_most))
            self.waiting.addCallbacks(self._got, self._failed)
            self._world.reactor.settle()

    def read_on(self, at_most: int = 1 << 20) -> None:
        """Read until there is no more for now."""
        before = -1
        while len(self.data) != before:
            before = len(self.data)
            self.read(at_most)

    def leave(self) -> None:
        """Go, in the middle of whatever it does."""
        if self.waiting is not None:
            self.waiting.cancel()
        self.content.close()

    def _got(self, data: bytes) -> None:
        self.waiting = None
        self.data += data
        self.ended = not data

    def _failed(self, failure: Failure) -> None:
        self.waiting = None
        error = failure.value
        assert isinstance(error, Exception)
        self.error = error
