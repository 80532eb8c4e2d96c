"""A complete cache, composed as in the daemon, with its own store, a scripted upstream and a manual reactor."""

from __future__ import annotations

import os
import re
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.cache.board import Board
from dockerproxy.cache.composition import CachePolicy, CacheServices, compose_cache
from dockerproxy.cache.downloads import BlobDownload, DownloadLimits, Downloads
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import Bindings
from dockerproxy.cache.janitor import Janitor
from dockerproxy.cache.pullthrough import CachedRegistry
from dockerproxy.cache.space import CacheSpaceManager, FileCounter
from dockerproxy.cache.upstream import UpstreamPrincipal, UpstreamRepository
from dockerproxy.concurrency import LocalKeyedLock
from dockerproxy.http.headers import Headers
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.credentials import Login
from dockerproxy.oci.host_table import HostKey
from dockerproxy.oci.names import Digest, Host, Registry, parse_reference, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.upstream.credentials import Anonymous, ClientCredential
from dockerproxy.upstream.login_provider import ProvidedLogin
from dockerproxy.upstream.registry_request import RegistryRequest
from dockerproxy.upstream.shared_logins import SharedLogins
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import ScriptedUpstream
from tests.support.parsers import make_parser

NO_HEADERS = Headers()
EPOCH = 1_700_000_000.0
HUB = Registry.parse("registry-1.docker.io")
OTHER = Registry.parse("other.example:5000")
ACCEPT = ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"]
NEVER_FRESH = Freshness(False, re.compile("(stable)"), 600, re.compile(r"\d+\.\d+"), 6000, 3600)


def ingest_key(digest: Digest, registry: Registry = HUB) -> IngestKey:
    """Return the key of the download of `digest` from `registry`."""
    return IngestKey(str(registry), digest)


class ScriptedAgent:
    """The agent for requests that bypass the registry client: pings and realms."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self.address_checks: list[Any] = []
        self.bodies: list[bytes] = []

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = NO_HEADERS,
        body: Any = None,
        *,
        address_check: Any = None,
    ) -> Any:
        self.address_checks.append(address_check)
        if body is not None:
            chunks: list[bytes] = []
            body.startProducing(type("Consumer", (), {"write": staticmethod(chunks.append)}))
            self.bodies.append(b"".join(chunks))
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        registry = Registry.parse(f"{scheme}://{authority}")
        return await self._upstream.request(
            RegistryRequest(method, registry, "/" + path, name=None, credential=Anonymous(), headers=headers)
        )


class ScriptedLogins:
    """One login for all registries. A question about it is answered with `refusal`: why it is refused, or None."""

    def __init__(self, login: Login | None) -> None:
        self.login = login
        self.refusal_reason: str | None = None
        self.questions = 0
        self.changes: list[tuple[str, str, str]] = []

    def record(self, registry: str, setting: str, reason: str) -> None:
        self.changes.append((registry, setting, reason))

    def set_logins(self, logins: Mapping[HostKey, Login]) -> None:
        self.login = next(iter(logins.values()), None)

    def effective_login(self, registry: Registry) -> Login | None:
        return self.login

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        return None

    async def refusal(self, registry: Registry, login: Login) -> str | None:
        self.questions += 1
        return self.refusal_reason


class CacheHarness:
    """A cache and its parts. Time starts at `EPOCH`."""

    def __init__(
        self,
        root: Path,
        *,
        limit: int = 1 << 30,
        max_blob_size: int | None = None,
        blob_cost: int = 0,
        inactive: float = 5e6,
        download_limits: DownloadLimits | None = None,
        freshness: Freshness = NEVER_FRESH,
        login: Login | None = None,
        upstream: ScriptedUpstream | None = None,
        registries: tuple[Registry, ...] = (HUB, OTHER),
        address_check: Any = None,
        tunnel_ports: tuple[int, ...] = (443,),
        secret: bytes = b"s" * 32,
        shared: bool = False,
        lock: LocalKeyedLock | None = None,
    ) -> None:
        self.reactor = reactor = ManualReactor() if upstream is None else upstream.reactor
        self.upstream = upstream or ScriptedUpstream(reactor)
        self.agent = ScriptedAgent(self.upstream)
        self.layout = Layout(root)
        counter = FileCounter(reactor, lambda count: self.space.record_files(count))
        self.records = Records(root / "records", on_create=counter.add)
        self.lock = lock or LocalKeyedLock()
        self.tombstones = Tombstones()
        # Nothing else runs that its pauses could be for.
        restless = CooperativeThread(reactor, clock=lambda: 0.0)
        self.space = CacheSpaceManager(
            reactor,
            self.layout,
            Blobs(self.layout, False, self.now),
            limit=limit,
            max_blob_size=limit if max_blob_size is None else max_blob_size,
            inactive=inactive,
            clock=self.now,
            janitor=Janitor(self.layout, Records(root / "records"), self.now, self.tombstones),
            tombstones=self.tombstones,
            blob_cost=blob_cost,
            cooperative_thread=restless,
        )
        self._download_limits = download_limits or DownloadLimits()
        self.board = Board.make(2)
        self.login_source = ScriptedLogins(login)
        self.pulls: list[str] = []
        self.limited: list[Registry] = []
        self.learned_challenges: dict[Registry, Any] = {}
        self.ping_targets: dict[Registry, Registry | None] = {}
        services = CacheServices(
            reactor=reactor,
            clock=self.now,
            layout=self.layout,
            records=self.records,
            on_file_created=counter.add,
            on_pull=lambda registry, repository: self.pulls.append(repository),
            on_limited=self.limited.append,
            space=self.space,
            secret=secret,
            bindings=Bindings(),
            locks=self.lock,
            parser=make_parser(reactor),
            tombstones=self.tombstones,
            multi_process=shared,
            upstream=self.upstream,
            content=self.upstream,
            agent=self.agent,
            board=self.board.for_process(0),
        )
        policy = CachePolicy(
            registries=registries,
            intercepted={registry.host: registry for registry in (*registries, Registry.parse("auth.docker.io"))},
            on_challenges=self.learn_challenge,
            address_check=address_check,
            allows_client_to=lambda server: server.host.port in tunnel_ports,
            logins=SharedLogins(self.login_source, reactor.seconds, self.login_source.record, self.login_source),
            freshness=freshness,
            download_limits=self._download_limits,
            evicted_bytes=limit // 8,
        )
        parts = compose_cache(services, policy)
        self.blobs, self.links, self.access = parts.blobs, parts.links, parts.access
        self.ingests, self.open_readers, self.pull_through = parts.ingests, parts.open_readers, parts.pull_through
        self.identities, self.challenges = self.pull_through.identities, self.pull_through.challenges
        self.token_endpoint, self.manifests = self.pull_through.token_endpoint, self.pull_through.manifests
        self.cached_blobs = self.pull_through.blobs
        self.downloads = self.cached_blobs.downloads
        self._deferreds: list[Deferred[Any]] = []

    def learn_challenge(self, registry: Registry, target: Registry | None, challenges: Any) -> None:
        self.learned_challenges[registry] = challenges
        self.ping_targets[registry] = target

    def now(self) -> float:
        return EPOCH + float(self.reactor.seconds())

    def new_downloads(self) -> Downloads:
        """Return downloads in the same cache, like those of another process."""
        return Downloads(
            self.reactor,
            self.upstream,
            self.space,
            self.ingests,
            self.open_readers,
            self._download_limits,
            self.board.for_process(1),
        )

    # clients

    def client(self, authorization: str | None = None, registry: Registry = HUB) -> CachedRegistry:
        return self.pull_through.registry(registry, authorization)

    def repository(
        self, name: str = "library/app", registry: Registry = HUB, authorization: str | None = None
    ) -> UpstreamRepository:
        return UpstreamRepository(
            registry, parse_repository(name), Anonymous() if authorization is None else ClientCredential(authorization)
        )

    def principal(
        self, name: str = "library/app", registry: Registry = HUB, authorization: str | None = None
    ) -> UpstreamPrincipal:
        repository = self.repository(name, registry, authorization)
        identity = self.identities.for_credential(registry, repository.name, repository.credential)
        return UpstreamPrincipal(repository, identity)

    def blob(
        self, digest: Digest, name: str = "library/app", authorization: str | None = None, *, head: bool = False,
        registry: Registry = HUB,
    ) -> Coroutine[Any, Any, BlobResponse]:  # fmt: skip
        """Request a blob as the client with `authorization`."""
        return self.client(authorization, registry).blob(parse_repository(name), digest, head=head)

    def manifest(
        self, reference: object, name: str = "library/app", authorization: str | None = None, *, head: bool = False,
        registry: Registry = HUB, accept: list[str] = ACCEPT,
    ) -> Coroutine[Any, Any, ManifestResponse]:  # fmt: skip
        """Request a manifest as the client with `authorization`."""
        parsed = parse_reference(str(reference))
        return self.client(authorization, registry).manifest(parse_repository(name), parsed, accept, head=head)

    def active_download(self, digest: Digest, registry: Registry = HUB) -> BlobDownload | None:
        return self.downloads.get(ingest_key(digest, registry))

    # time

    def start(self, work: Coroutine[Any, Any, Any]) -> Deferred[Any]:
        """Start `work`, and run the calls that are due."""
        deferred = Deferred.fromCoroutine(work)
        self._deferreds.append(deferred)
        self.reactor.run_due_calls()
        return deferred

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 0) -> Any:
        """Return the result of `work`, or raise its error. It must finish within `seconds`."""
        return result(self.start(work), self.reactor, seconds)

    def fetch(
        self, digest: Digest, name: str = "library/app", authorization: str | None = None, **options: Any
    ) -> tuple[str, bytes]:
        """Request a blob and read it. Return the cache status and the content."""
        return self.run(self.fetch_later(digest, name, authorization, **options), 60)  # type: ignore[no-any-return]

    async def fetch_later(
        self, digest: Digest, name: str = "library/app", authorization: str | None = None, **options: Any
    ) -> tuple[str, bytes]:
        """Request a blob and read it, without a time limit."""
        response = await self.blob(digest, name, authorization, **options)
        assert response.content is not None
        try:
            return response.cache_status, await read_all(response.content)
        finally:
            response.content.close()

    def advance(self, seconds: float) -> None:
        """Advance the clock in steps of 0.1 s, and run the calls that are due."""
        for _ in range(int(seconds * 10)):
            self.reactor.advance(0.1)
            self.reactor.run_due_calls()

    # leaks

    @property
    def ingest_files(self) -> list[str]:
        folder = Path(self.layout.ingests)
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    @property
    def open_files(self) -> list[str]:
        """The paths of this cache's files that are open."""
        files = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                files.append(os.readlink(f"/proc/self/fd/{name}"))
        return [file for file in files if file.startswith(f"{self.layout.root}/")]

    def assert_no_leaks(self) -> None:
        """End all downloads, then check that no download, pin, descriptor or upstream response is left."""
        self.reactor.pool.release()
        self.upstream.go_down()
        for response in self.upstream.responses:
            if not response.ended:
                response.disconnect()
        for _ in range(30):
            self.reactor.advance(10)
            self.reactor.run_due_calls()
        for deferred in self._deferreds:
            deferred.addErrback(lambda _: None)
        assert self.downloads._downloads == {}
        assert self.space.index._pins == {}
        assert len(self.open_readers) == 0
        assert all(bound.used == 0 for bound in self.downloads.bounds)
        assert self.open_files == []
        assert self.reactor.readers == []
        assert all(response.ended for response in self.upstream.responses)


def result(deferred: Deferred[Any], reactor: ManualReactor, seconds: float = 0) -> Any:
    """Return the result of `deferred`, or raise its error. Raise AssertionError if it does not fire in `seconds`."""
    outcome: list[Any] = []
    deferred.addBoth(outcome.append)
    reactor.run_due_calls()
    for _ in range(int(seconds * 10)):
        if outcome:
            break
        reactor.advance(0.1)
        reactor.run_due_calls()
    assert outcome, f"the Deferred has not fired within {seconds} s"
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


async def await_deferred(deferred: Deferred[Any]) -> Any:
    return await deferred


async def do_nothing() -> None:
    """Do nothing when a download has been verified."""


async def read_all(content: Any, start: int = 0, piece: int = 1 << 20) -> bytes:
    """Return the content from `start` on, read at most `piece` bytes at a time."""
    data = b""
    while chunk := await content.read(start + len(data), piece):
        assert 0 < len(chunk) <= piece
        data += chunk
    return data


class ManualReader:
    """A client that reads content only if the test calls `read`."""

    def __init__(self, harness: CacheHarness, content: Any, start: int = 0) -> None:
        self._harness = harness
        self.content = content
        self.start = start
        self.data = b""
        self.error: Exception | None = None
        self.ended = False
        self.waiting: Deferred[Any] | None = None

    def read(self, at_most: int = 1 << 20) -> None:
        """Start to read the next bytes, unless a read is pending."""
        if self.waiting is None and not self.ended and self.error is None:
            self.waiting = Deferred.fromCoroutine(self.content.read(self.start + len(self.data), at_most))
            self.waiting.addCallbacks(self._on_data, self._on_failure)
            self._harness.reactor.run_due_calls()

    def read_available(self, at_most: int = 1 << 20) -> None:
        """Read all bytes that are available now."""
        previous_size = -1
        while len(self.data) != previous_size:
            previous_size = len(self.data)
            self.read(at_most)

    def disconnect(self) -> None:
        """Cancel a pending read and close the content."""
        if self.waiting is not None:
            self.waiting.cancel()
        self.content.close()

    def _on_data(self, data: bytes) -> None:
        self.waiting = None
        self.data += data
        self.ended = not data

    def _on_failure(self, failure: Failure) -> None:
        self.waiting = None
        error = failure.value
        assert isinstance(error, Exception)
        self.error = error
