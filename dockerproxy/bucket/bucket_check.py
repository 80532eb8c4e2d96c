"""Verification of the hosted registry in a bucket: reads every content, and every link against its target.

A content that does not match its digest is moved to `dockerproxy/damaged/`, so that a push can restore it: clients ask
what is there before they send it. The rest is as on a disk (`store.repository_check`).
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from attrs import define, field

from dockerproxy.bucket import keys
from dockerproxy.bucket.blocking_bucket import BlockingBucket, ReactorWait
from dockerproxy.bucket.bucket_tree import BucketTree, ReaderThreads
from dockerproxy.bucket.s3 import ListedKey, S3Bucket
from dockerproxy.concurrency import gather, in_thread
from dockerproxy.errors import RegistryError, UpstreamError
from dockerproxy.oci.names import Digest
from dockerproxy.store.contents import Contents
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress, no_lock
from dockerproxy.store.repository_check import Finding, RepositoryCheck, ScrubResult, describe_damage

_READS_AT_ONCE = 4  # contents: pushes and pulls need the bandwidth of the store, too
_BATCH = 1000
_MAX_COPY = 5 * 1024**3  # AWS, "CopyObject"
_ATTEMPTS = 3  # to read a content to its end


async def check_bucket(reactor: Any, bucket: S3Bucket, progress: Progress[Finding], *, sparse: bool) -> ScrubResult:
    """Verify the registry in `bucket`. Raise the errors of the store, and `Stopped`.

    `progress` reports bytes, and then repositories. With `sparse`, an index may lack manifests.
    """
    contents = ContentCheck(bucket, progress)
    await contents.run()
    blocking, threads = BlockingBucket(bucket, ReactorWait(reactor)), ReaderThreads.start()
    await in_thread(reactor, partial(contents.check_repositories, blocking, threads, sparse=sparse))
    return ScrubResult(**contents.counts)


@define
class ContentCheck:
    """Reads the contents of a bucket. `sizes` has those that match their digests, and `counts` those of the result."""

    _bucket: S3Bucket
    _progress: Progress[Finding]
    sizes: dict[Digest, int] = field(factory=dict, init=False)
    counts: Counter[str] = field(factory=Counter, init=False)
    _total_bytes: int | None = field(default=None, init=False)  # None until they are known

    async def run(self) -> None:
        """Check every content."""
        total = 0
        async for entry in self._bucket.list_keys(keys.BLOBS):
            total += entry.size
            self._report()
        self._total_bytes = total
        # List again, because a list of all entries could be large.
        batch: list[ListedKey] = []
        async for entry in self._bucket.list_keys(keys.BLOBS):
            batch.append(entry)
            if len(batch) == _BATCH:
                await self._check_all(batch)
                batch = []
        await self._check_all(batch)

    def check_repositories(self, bucket: BlockingBucket, threads: ReaderThreads | None, *, sparse: bool) -> None:
        """Check every repository. Blocks."""
        tree = BucketTree(bucket, threads, walks=True, known=self.sizes)
        links, contents = Links(keys.LAYOUT, durable=False, reader=tree), Contents(keys.LAYOUT, tree)
        check = BucketRepositoryCheck(
            links, contents, BucketLinkWriter(bucket, tree), self._progress, no_lock, sparse, tree=tree
        )
        check.unlinked.update(self.sizes)
        check.check_repositories()
        self.counts.update(check.counts)

    async def _check_all(self, entries: list[ListedKey]) -> None:
        found = ((keys.content_of(entry.key), entry) for entry in entries)
        await gather((self._check(digest, entry) for digest, entry in found if digest is not None), _READS_AT_ONCE)

    async def _check(self, digest: Digest, entry: ListedKey) -> None:
        try:
            is_right = await self._matches(digest, entry.key)
            if is_right is False:
                is_right = await self._move_aside(digest, entry)
        except RegistryError as error:
            await self._bucket.size(keys.TAKEN_OVER)  # which fails, too, if it is not the fault of this object
            self._record(Finding("unreadable", f"{digest} cannot be read: {error.message}", digest=digest))
            self.counts.update(blobs=1)
            return
        if is_right is not None:
            self.counts.update(blobs=1)
        if is_right:
            self.sizes[digest] = entry.size

    async def _matches(self, digest: Digest, key: str, *, is_counted: bool = True) -> bool | None:
        """Return whether a content matches its digest; None if it was deleted. Count its bytes if `is_counted`."""
        for attempt in range(1, _ATTEMPTS + 1):
            response = await self._bucket.open(key)
            hasher, count = digest.hasher(), 0
            try:
                if response.status == 404:
                    return None
                while data := await response.read_chunk():
                    hasher.update(data)
                    count += len(data) if is_counted else 0
                    self.counts.update(bytes=len(data) if is_counted else 0)
                    self._report()
                return hasher.hexdigest() == digest.hex
            except UpstreamError:
                self.counts.update(bytes=-count)
                if attempt == _ATTEMPTS:
                    raise
            finally:
                response.abort()
        raise AssertionError

    async def _move_aside(self, digest: Digest, entry: ListedKey) -> bool | None:
        """Move a content that does not match its digest aside. Return True if it matches by now, None if it is gone."""
        if entry.size > _MAX_COPY:
            message = f"{digest} is damaged, and too large to be moved: delete the key {entry.key}, and push it again"
            self._record(Finding("damaged", message, digest=digest))
            return False
        copy = keys.damaged_key(digest)
        await self._bucket.copy(entry.key, copy)
        # Again, because a push may have replaced it, and because what was read may have been changed on its way.
        is_right = await self._matches(digest, entry.key, is_counted=False)
        if is_right is not False:
            await self._bucket.delete([copy])
            return is_right
        await self._bucket.delete([entry.key])
        message = describe_damage(digest, f"{keys.DAMAGED} in {self._bucket.location}")
        self._record(Finding("damaged", message, digest=digest))
        return False

    def _record(self, finding: Finding) -> None:
        self.counts.update(findings=1, damaged=int(finding.kind == "damaged"))
        self._progress.emit(finding)

    def _report(self) -> None:
        self._progress.report("contents", self.counts["bytes"], self._total_bytes)


@define
class BucketRepositoryCheck(RepositoryCheck):
    """Looks at a repository again if it seems to lack something, and reports what it lacks both times.

    It lists the keys first, and reads their contents later. So what was pushed in between seems to lack its links.
    """

    _tree: BucketTree = field(kw_only=True)
    _suspects: set[str] | None = field(default=None, init=False)
    _confirmed: set[str] = field(factory=set, init=False)
    _torn: set[str] = field(factory=set, init=False)

    def record(self, kind: str, message: str, repository: str | None = None, digest: Digest | None = None) -> None:
        if kind == "torn":  # a link is read when it is looked at, and mended at once
            if message not in self._torn:
                self._torn.add(message)
                super().record(kind, message, repository, digest)
        elif self._suspects is not None:
            self._suspects.add(message)
        elif message in self._confirmed:
            super().record(kind, message, repository, digest)

    def check_repository(self, repository: str) -> None:
        links, tags = self.counts["links"], self.counts["tags"]
        suspects = self._suspects = set[str]()
        self._torn = set()
        super().check_repository(repository)
        self._suspects = None
        if suspects:
            self._confirmed = suspects
            self.counts["links"], self.counts["tags"] = links, tags
            self._tree.forget(repository)
            super().check_repository(repository)


@define
class BucketLinkWriter:
    """A `LinkWriter` in a bucket. All methods block. `tree` reads again whatever is written."""

    _bucket: BlockingBucket
    _tree: BucketTree

    def link_layer(self, repository: str, digest: Digest) -> None:
        self._write(keys.layer_key(repository, digest), digest)
        self._tree.forget(repository)

    def mend_manifest(self, repository: str, digest: Digest) -> None:
        self._write(keys.manifest_key(repository, digest), digest)
        self._tree.forget(repository)

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        self._write(keys.tag_index_key(repository, tag, digest), digest)
        self._write(keys.tag_key(repository, tag), digest)
        self._tree.forget(repository)

    def _write(self, key: str, digest: Digest) -> None:
        self._bucket.wait(self._bucket.bucket.put(key, str(digest).encode()))
