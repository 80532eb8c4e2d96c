"""Nodes and collectors over one store in memory. The test chooses the order in which it answers.

The code is the real one. A request waits in `World.pending` until the test answers it. One that nobody waits for any
more, because its sender was killed or has given up, may still reach the store within the time that the protocol allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.bucket import keys
from dockerproxy.bucket.bucket_hosted_store import BucketHostedStore
from dockerproxy.bucket.gc_collector import GCOptions, collect
from dockerproxy.bucket.gc_runs import Times
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.errors import ManifestBlobUnknown, RegistryError, UpstreamTimeout
from dockerproxy.oci.names import Digest, Repository, Tag, parse_repository
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.store.progress import Progress
from dockerproxy.store.sweep import SweepResult
from dockerproxy.upstream.bytes_body import BytesBody
from tests.cache.support.reactor import ManualReactor
from tests.support.fake_store import LOCATION, FakeStore, UnsignedRequests, read_body
from tests.support.parsers import make_parser

APP = parse_repository("team/app")
TIMES = Times()
_REQUEST_TIMEOUT = 60.0  # seconds that a sender waits for an answer
_graveyard: list[object] = []  # the work of killed processes, of which nothing may ever be tidied up


@define(eq=False)
class Request:
    """A request on its way to the store."""

    sender: Process
    arguments: tuple[Any, ...]
    sent: float
    answer: Deferred[Any] | None

    @property
    def is_delete(self) -> bool:
        return self.arguments[0] == "DELETE"

    def forsake(self) -> None:
        """Note that nobody waits for the answer any more."""
        self.answer = None

    def __str__(self) -> str:
        return f"{self.sender.name}: {self.arguments[0]} {unquote(self.arguments[1]).partition('/images')[2]}"


@define(eq=False)
class Process:
    """A daemon or a collector: the agent of its bucket. `outcome` is that of its present work."""

    world: World
    name: str
    is_alive: bool = True
    outcome: list[Any] = field(factory=list)
    doing: Any = None

    def bucket(self) -> S3Bucket:
        return S3Bucket(self.world.clock, self, UnsignedRequests(), LOCATION, self.world.store.now, lambda: 0.5)  # type: ignore[arg-type]

    async def request(self, method: str, url: str, headers: Any, body: Any = None, *, reuse: bool = False) -> Any:
        content = None if body is None else BytesBody(await read_body(body))
        answer: Deferred[Any] = Deferred(lambda _: request.forsake())
        request = Request(self, (method, url, headers, content), self.world.clock.seconds(), answer)
        self.world.pending.append(request)
        return await answer

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Begin to do something."""
        self.outcome.clear()
        self.doing = Deferred.fromCoroutine(coroutine)
        self.doing.addBoth(self.outcome.append)

    @property
    def is_done(self) -> bool:
        return bool(self.outcome)

    def kill(self) -> None:
        """End the process. Its requests may have reached the store, or may reach it later."""
        self.is_alive = False
        _graveyard.append(self.doing)
        for request in self.world.pending:
            if request.sender is self and request.answer is not None:
                _graveyard.append(request.answer)
                request.answer = None


class _Upload:
    """The bytes of an upload in a file of this node."""

    def __init__(self, content: bytes) -> None:
        self._fd = os.memfd_create("upload")
        os.write(self._fd, content)
        self.size = len(content)

    def fileno(self) -> int:
        return self._fd

    async def verify(self, digest: Digest) -> _Upload:
        return self

    async def cancel(self) -> None:
        with suppress(OSError):
            os.close(self._fd)


class _NoCache:
    """The cache of a node without a disk."""

    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket

    async def read_manifest(self, digest: Digest) -> bytes | None:
        return await self._bucket.get(keys.blob_key(digest), 1 << 20)

    async def keep_manifest(self, *arguments: object) -> None:
        pass

    keep_blob = keep_tag = keep_manifest


@define
class Acknowledged:
    """A push that the client was told to be stored."""

    manifest: PushedManifest
    tag: Tag


@define(eq=False)
class World:
    """The store, and the processes of `nodes` that use it."""

    clock: ManualReactor = field(factory=ManualReactor)
    pending: list[Request] = field(factory=list)
    acknowledged: list[Acknowledged] = field(factory=list)
    results: list[SweepResult] = field(factory=list)
    store: FakeStore = field(init=False)
    collectors: int = 0

    @store.default
    def _make_store(self) -> FakeStore:
        return FakeStore(self.clock)

    def node(self, name: str) -> tuple[Process, BucketHostedStore]:
        """Return a daemon with a store."""
        process = Process(self, name)
        bucket = process.bucket()
        cache: Any = _NoCache(bucket)
        return process, BucketHostedStore.from_parts(
            self.clock,
            bucket,
            cache,
            cache,
            make_parser(self.clock),
            None,
            self.clock.seconds,  # type: ignore[arg-type]
        )

    def collector(self, **options: Any) -> Process:
        """Return a process that collects garbage, and begin."""
        self.collectors += 1
        process = Process(self, f"gc {self.collectors}")
        options = {"grace": TIMES.shortest_grace, **options}

        async def run() -> None:
            result = await collect(
                self.clock, process.bucket(), GCOptions(**options), Progress(), self.clock.seconds, process.name
            )
            self.results.append(result)

        process.do(run())
        return process

    async def push(
        self, store: BucketHostedStore, manifest: PushedManifest, blobs: list[bytes], tag: Tag, tries: int = 2
    ) -> None:
        """Push an image as clients do: they ask for each blob, and send those that are missing."""
        for _ in range(tries):
            for blob in blobs:
                digest = Digest.of(blob)
                if await store.blob_size(APP, digest) is None:
                    upload: Any = _Upload(blob)
                    try:
                        await store._contents.add_file(upload.fileno(), upload.size, digest)
                        await store._contents.link_layer(APP, digest)
                    finally:
                        await upload.cancel()
            try:
                await store.commit_manifest(APP, manifest, [tag])
            except ManifestBlobUnknown:
                continue
            self.acknowledged.append(Acknowledged(manifest, tag))
            return

    # steps of the test

    def answer(self, request: Request) -> None:
        """Let the store answer a request."""
        self.pending.remove(request)
        answers: list[Any] = []
        method, url, headers, body = request.arguments
        Deferred.fromCoroutine(self.store.request(method, url, headers, body)).addBoth(answers.append)
        (answer,) = answers
        if isinstance(answer, Failure):
            answer.raiseException()
        if request.answer is not None:
            request.answer.callback(answer)

    def advance(self, seconds: float) -> None:
        """Let time pass. Senders give up requests that take too long, and the store forgets old ones in the end."""
        self.clock.advance(seconds)
        now = self.clock.seconds()
        for request in list(self.pending):
            answer = request.answer
            if answer is not None and now - request.sent > _REQUEST_TIMEOUT:
                request.answer = None
                answer.errback(UpstreamTimeout("the store did not answer"))
        self.pending = [
            request for request in self.pending if request.answer is not None or now - request.sent <= TIMES.delete
        ]

    def next_call(self) -> float | None:
        """Return the seconds until something happens by itself."""
        calls = [call.getTime() for call in self.clock.getDelayedCalls()]
        return max(0.0, min(calls) - self.clock.seconds()) if calls else None

    def requests_of(self, process: Process) -> Iterator[Request]:
        """Yield the requests that `process` waits for."""
        return (request for request in self.pending if request.sender is process and request.answer is not None)

    def run(self, process: Process, requests: int = 1_000_000) -> int:
        """Let `process` alone go on for so many requests, or until it ends. Return how many it has sent."""
        for number in range(requests):
            while not process.is_done and (request := next(self.requests_of(process), None)) is None:
                pause = self.next_call()
                assert pause is not None, f"{process.name} hangs"
                self.advance(pause)
            if process.is_done:
                return number
            self.answer(request)
        return requests

    def abandon(self) -> None:
        """Keep all that is under way for ever. It must not be tidied up as if the reactor stopped."""
        _graveyard.append(self)

    # conditions

    def lost(self) -> str:
        """Return a key that an acknowledged push lacks, or ``""``."""
        for push in self.acknowledged:
            needed = [keys.tag_key(APP, push.tag), keys.manifest_key(APP, push.manifest.digest)]
            needed += [keys.blob_key(push.manifest.digest), keys.catalog_key(APP)]
            for digest, _ in push.manifest.required_references():
                needed += [keys.blob_key(digest), keys.layer_key(APP, digest)]
            for key in needed:
                if f"{LOCATION.prefix}{key}" not in self.store.objects:
                    return f"{push.tag} lacks {key}"
        return ""

    def has_content(self, digest: Digest) -> bool:
        """Return whether the store has a content."""
        return f"{LOCATION.prefix}{keys.blob_key(digest)}" in self.store.objects

    def put(self, key: str, content: bytes) -> None:
        """Put an object into the store that is old."""
        self.store.objects[LOCATION.prefix + key] = content
        self.store.written[LOCATION.prefix + key] = self.store.now() - 10 * TIMES.keep

    def put_blob(self, content: bytes, repository: Repository = APP) -> Digest:
        """Put an old blob into the store, of a repository."""
        digest = Digest.of(content)
        self.put(keys.blob_key(digest), content)
        self.put(keys.layer_key(repository, digest), str(digest).encode())
        return digest

    def put_manifest(self, manifest: PushedManifest, *tags: Tag, repository: Repository = APP) -> Digest:
        """Put an old manifest into the store."""
        link = str(manifest.digest).encode()
        self.put(keys.blob_key(manifest.digest), manifest.content)
        self.put(keys.media_type_key(repository, manifest.digest), manifest.media_type.encode())
        self.put(keys.subject_key(repository, manifest.digest), b"-")
        self.put(keys.manifest_key(repository, manifest.digest), link)
        self.put(keys.catalog_key(repository), b"")
        for tag in tags:
            self.put(keys.tag_index_key(repository, tag, manifest.digest), link)
            self.put(keys.tag_key(repository, tag), link)
        return manifest.digest


Scenario = Callable[[World], None]


def failure_of(process: Process) -> RegistryError | Exception | None:
    """Return the exception that ended the work of a process."""
    (outcome,) = process.outcome
    return outcome.value if isinstance(outcome, Failure) else None  # type: ignore[return-value]
