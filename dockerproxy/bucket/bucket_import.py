"""Import of another registry's directory into the bucket: an upload of files (`store.importer`)."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.bucket import keys
from dockerproxy.bucket.blocking_bucket import BlockingBucket, ReactorWait, Wait
from dockerproxy.bucket.bucket_tree import BucketTree, ReaderThreads
from dockerproxy.bucket.manifest_writer import BucketContents, ManifestWriter
from dockerproxy.concurrency import gather, in_thread
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest, Repository, parse_repository, parse_tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.store.contents import Contents
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.importer import (
    ImportResult,
    Skipped,
    SourceBlob,
    SourceError,
    find_source_layout,
    import_tree,
)
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress, no_lock

_WRITES_AT_ONCE = 8
_AT_ONCE = 16  # requests of one write
_MAX_TYPE = 256  # bytes of a media type


async def import_into_bucket(
    reactor: Any,
    manifests: ManifestWriter,
    directory: Path,
    staging: str,
    progress: Progress[Skipped],
    *,
    force: bool,
) -> ImportResult:
    """Import `directory`. Copies of files that others may change are in `staging` until they are sent.

    Leave tags alone that point to another manifest in the bucket, unless `force` is true. Raise `NotARegistry`, the
    errors of the store, `OSError` and `Stopped`.
    """

    def run() -> ImportResult:
        wait, writes = ReactorWait(reactor), ReactorWrites(reactor)
        target = BucketTarget.open(wait, ReaderThreads.start(), writes, manifests, staging)
        return import_tree(find_source_layout(directory), target, force=force, progress=progress, lock=no_lock)

    return await in_thread(reactor, run)


class Writes(Protocol):
    """Writes that are done at the same time. All methods block, and raise the error of an earlier write."""

    def submit(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a write when there is room for it. If it raises, `write` was not called."""

    def flush(self) -> None:
        """Return when all writes have ended."""


class ReactorWrites:
    """`Writes` in the reactor's thread, at most `at_once` at a time."""

    def __init__(self, reactor: Any, at_once: int = _WRITES_AT_ONCE) -> None:
        self._reactor = reactor
        self._at_once = at_once
        self._free = threading.Semaphore(at_once)
        self._failure: Failure | None = None

    def submit(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._free.acquire()
        if self._failure is not None:
            self._free.release()
            self._failure.raiseException()
        self._reactor.callFromThread(self._start, write)

    def flush(self) -> None:
        for _ in range(self._at_once):
            self._free.acquire()
        self._free.release(self._at_once)
        if self._failure is not None:
            self._failure.raiseException()

    def _start(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        Deferred.fromCoroutine(write()).addBoth(self._end)

    def _end(self, result: object) -> None:
        if isinstance(result, Failure):
            self._failure = self._failure or result
        self._free.release()


@frozen
class BucketTarget:
    """An `ImportTarget` in a bucket.

    A file that nobody else can change is sent as it is. Others are copied first, because the bytes that are sent must
    be those that were verified.
    """

    _bucket: BlockingBucket
    _tree: BucketTree
    _links: Links
    _stored: Contents
    _writes: Writes
    _manifests: ManifestWriter
    _contents: BucketContents
    _staging: str
    _reserve: DiskReserve
    _added: set[Digest] = field(factory=set, init=False)
    _linked: set[tuple[str, Digest]] = field(factory=set, init=False)
    _tags: dict[str, dict[str, Digest | None]] = field(factory=dict, init=False)

    @classmethod
    def open(
        cls, wait: Wait, threads: ReaderThreads | None, writes: Writes, manifests: ManifestWriter, staging: str
    ) -> BucketTarget:
        """Return the target that `manifests` writes to."""
        bucket = BlockingBucket(manifests.bucket, wait)
        tree = BucketTree(bucket, threads)
        links, stored = Links(keys.LAYOUT, durable=False, reader=tree), Contents(keys.LAYOUT, tree)
        os.makedirs(staging, exist_ok=True)
        reserve = DiskReserve(staging)
        return cls(bucket, tree, links, stored, writes, manifests, manifests.contents, staging, reserve)

    def sizes(self, digests: Iterable[Digest]) -> Iterator[int | None]:
        return self._tree.map(self._stored.size, digests)

    def add(self, blob: SourceBlob) -> str | None:
        if blob.is_only_ours:
            is_right = blob.verify()
            if is_right and os.fstat(blob.fd).st_size != blob.status.st_size:
                raise SourceError("its size changed while it was read")
            if is_right:
                self._send(blob, blob.fd)
        else:
            with tempfile.TemporaryFile(dir=self._staging) as copy:
                is_right = blob.verify_and_copy(copy.fileno(), self._reserve)
                if is_right:
                    self._send(blob, copy.fileno())
        return "copied" if is_right else None

    def _send(self, blob: SourceBlob, fd: int) -> None:
        fd = os.dup(fd)
        try:
            self._writes.submit(partial(self._upload, fd, blob.status.st_size, blob.digest))
        except BaseException:
            os.close(fd)
            raise
        self._added.add(blob.digest)

    async def _upload(self, fd: int, size: int, digest: Digest) -> None:
        try:
            if size:
                await self._contents.add_file(fd, size, digest)
            else:
                await self._contents.add_bytes(b"", digest)
        finally:
            os.close(fd)

    def exists(self, digest: Digest) -> bool:
        return digest in self._added or self._stored.exists(digest)

    def read(self, digest: Digest) -> bytes | None:
        return self._bucket.read_start(keys.blob_key(digest), MAX_MANIFEST + 1)

    def link_layer(self, repository: str, digest: Digest) -> None:
        if not self._links.has_layer(repository, digest):
            self._writes.submit(partial(self._contents.link_layer, parse_repository(repository), digest))

    def has_manifest(self, repository: str, digest: Digest) -> bool:
        return (repository, digest) in self._linked or self._links.has_manifest(repository, digest)

    def link_manifest(
        self, repository: str, digest: Digest, content: bytes, media_type: str, linked_at: int | None
    ) -> None:
        manifest = _parse(content, digest, media_type)
        self._writes.submit(partial(self._commit, parse_repository(repository), manifest))
        self._linked.add((repository, digest))

    async def _commit(self, repository: Repository, manifest: PushedManifest, *tags: str) -> None:
        # An import takes images that lack something, too. gc is told only of what is there.
        here = await self._find_present(repository, manifest)
        if manifest.manifest is not None:
            layers = [layer for layer in manifest.manifest.layers if layer.digest in here]
            children = [child for child in manifest.manifest.manifests if child.digest in here]
            config = manifest.manifest.config
            present = evolve(
                manifest.manifest,
                config=config if config is not None and config.digest in here else None,
                layers=tuple(layers),
                manifests=tuple(children),
            )
            manifest = evolve(manifest, manifest=present)
        await self._manifests.commit(repository, manifest, [parse_tag(tag) for tag in tags])

    async def _find_present(self, repository: Repository, manifest: PushedManifest) -> set[Digest]:
        references = dict(manifest.required_references())
        found = await gather(
            (
                self._contents.has_reference(repository, digest, is_manifest=is_manifest)
                for digest, is_manifest in references.items()
            ),
            _AT_ONCE,
        )
        return {digest for digest, is_here in zip(references, found, strict=True) if is_here}

    def tag(self, repository: str, tag: str) -> Digest | None:
        if repository not in self._tags:
            self._tags.clear()  # those of the repository before it
            self._tags[repository] = dict(self._links.iter_tags(repository))
        return self._tags[repository].get(tag)

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        self._writes.submit(partial(self._tag_manifest, parse_repository(repository), tag, digest))

    async def _tag_manifest(self, repository: Repository, tag: str, digest: Digest) -> None:
        """Push a manifest that is there again, now with a tag: so gc learns of it."""
        bucket = self._manifests.bucket
        content = await bucket.get(keys.blob_key(digest), MAX_MANIFEST)
        media_type = await bucket.read_start(keys.media_type_key(repository, digest), _MAX_TYPE)
        manifest = _parse(content or b"", digest, (media_type or b"").decode("latin-1"))
        await self._commit(repository, manifest, tag)

    def flush(self) -> None:
        self._writes.flush()

    def finish(self) -> None:
        self._writes.flush()


def _parse(content: bytes, digest: Digest, media_type: str) -> PushedManifest:
    """Return a manifest, whatever its content is: it was verified when it was imported."""
    try:
        return PushedManifest.parse(content, digest, media_type)
    except ManifestInvalid:
        return PushedManifest(content, digest, media_type)
