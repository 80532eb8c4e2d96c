"""Garbage collection of a registry while it serves requests: deletes the objects that no tag reaches.

The mark phase (`mark`) runs in a thread, beside pushes and pulls. The sweep phase then deletes manifests, links to
blobs, and blobs, in this order. Races between mark and delete are not prevented by a lock, but by the order of deletion
and the blob's mtime (see `safe_delete`):

- No object is deleted if its blob was used after the cutoff, which is `grace` seconds before the start. Objects that a
  push found, wrote or linked during the collection therefore stay. A client has the grace period from its HEAD request
  to the push of its manifest.
- A manifest that is pushed meanwhile refers to blobs, which the push has used, and to manifests. All unreachable
  manifests are decided, with their references, before the first blob is deleted. If such a manifest was used before
  its deletion, it stays with all its references. If it was deleted first, the push does not find it and must push it
  again.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from attrs import define, evolve, field, frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.cooperative import CooperativeThread, Progress
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.mark import DigestText, Mark, clear_incrementally
from dockerproxy.store.safe_delete import DeleteOutcome, SafeDelete

GRACE_PERIOD = 3600.0
"""Seconds for which a blob is kept after its last use, because a running push may rely on it."""

MIN_GRACE_PERIOD = 120.0
"""Seconds. The recorded time of the last use may be 60 s too old (`Blobs.touch`)."""

_MANIFEST_BATCH = 32
"""Maximum number of manifests deleted per step. An image for all platforms has fewer, even with its signatures."""

_THREADS = 2
"""Threads that delete links and blobs. Two are twice as fast as one, because some disks are slow to free blocks. A
deletion takes 0.1 to 0.4 ms on ext4 without a journal, mounted with `discard`."""

_SLICE_FACTOR = 5
"""Slice length of these threads as a multiple of the mark phase's. Longer slices do no harm, because these threads
compute little in Python, and their system calls release the interpreter lock."""

_YIELD_EVERY = 200  # names handled in one step
_MAX_PROBLEMS = 1000


class SweepInProgress(Exception):
    """A collection is already running."""


@frozen
class RemovedItem:
    """A deleted object: a ``manifest`` or ``link`` of a repository, or a ``blob`` of `size` bytes."""

    kind: str
    digest: Digest
    repository: str | None = None
    size: int = 0


DeleteResult = tuple[DeleteOutcome, RemovedItem]


@frozen
class SweepResult:
    """The result of a collection. With `dry_run`, nothing was deleted, and the numbers say what would be.

    Some unreachable objects were kept. `recent_manifests` (with their references) and `recent` other blobs were used
    within the grace period. `foreign` blobs and groups of manifests belong to another user. `needed` is the number of
    reachable blobs, and `problems` are messages for the user.
    """

    dry_run: bool
    repositories: int = 0
    needed: int = 0
    manifests: int = 0
    links: int = 0
    blobs: int = 0
    bytes: int = 0
    recent_manifests: int = 0
    recent: int = 0
    recent_bytes: int = 0
    foreign: int = 0
    foreign_bytes: int = 0
    problems: tuple[str, ...] = ()


@define
class Sweeper:
    """Collects the garbage of `store`, one collection at a time. `clock` returns POSIX time."""

    _reactor: Any
    _store: HostedTree
    _thread: CooperativeThread = field(kw_only=True)
    _clock: Callable[[], float] = field(default=time.time, kw_only=True)
    _running: bool = field(default=False, init=False)

    @_thread.default
    def _make_thread(self) -> CooperativeThread:
        return CooperativeThread(self._reactor)

    async def sweep(
        self,
        *,
        delete_untagged: bool = False,
        dry_run: bool = False,
        grace: float = GRACE_PERIOD,
        progress: Progress[RemovedItem] | None = None,
    ) -> SweepResult:
        """Collect garbage. The collection may be cancelled at any time; deleted objects stay deleted.

        Raises `SweepInProgress`, `OSError`, and `ValueError` if the grace period is too short.
        """
        if grace < MIN_GRACE_PERIOD:
            raise ValueError(f"a grace period of {grace:g} seconds is too short; use at least {MIN_GRACE_PERIOD:g}")
        if self._running:
            raise SweepInProgress
        self._running = True
        try:
            cutoff = self._clock() - grace
            mark = Mark(self._store.layout, self._store.links, cutoff, delete_untagged)
            safe_delete = SafeDelete(self._store.layout, cutoff, dry_run)
            run = _SweepRun(self._store, mark, safe_delete, progress or Progress(), self._thread)
            return await run.collect()
        finally:
            self._running = False


@define
class _SweepRun:
    """One collection."""

    _store: HostedTree
    _mark: Mark
    _safe_delete: SafeDelete
    _progress: Progress[RemovedItem]
    _thread: CooperativeThread
    _counts: Counter[str] = field(factory=Counter, init=False)
    _scan_counts: list[int] = field(factory=lambda: [0] * _THREADS, init=False)  # blobs
    # By repository: the deleted manifests and their subjects.
    _deleted_manifests: dict[str, dict[DigestText, DigestText | None]] = field(factory=dict, init=False)

    async def collect(self) -> SweepResult:
        mark, progress, run = self._mark, self._progress, self._thread.run
        run_parallel = evolve(self._thread, slice_length=self._thread.slice_length * _SLICE_FACTOR).run_parallel
        await run(mark.steps(), after_slice=progress.reporter("mark", lambda: mark.manifest_count))
        report = progress.reporter("sweep", lambda: sum(self._scan_counts))
        await run(self._sweep_manifests(), self._record, after_slice=report)
        await run_parallel([self._sweep_links() for _ in range(_THREADS)], self._record, after_slice=report)
        # Sync the deleted links before the first blob is deleted, so that no link dangles after a power cut.
        await run(self._safe_delete.sync())
        if not self._safe_delete.dry_run:
            await self._clean_up()
        await run_parallel(
            [self._sweep_blobs(partition) for partition in range(_THREADS)], self._record, after_slice=report
        )
        reachable_count = len(mark.reachable)
        await run(clear_incrementally(mark.reachable))
        return SweepResult(
            self._safe_delete.dry_run,
            **self._counts,
            repositories=len(mark.repositories),
            needed=reachable_count,
            recent_manifests=mark.recent_count,
            problems=tuple(map(str, mark.problems[:_MAX_PROBLEMS])),
        )

    async def _clean_up(self) -> None:
        """Remove the deleted manifests from the indexes, and the directories of empty repositories."""
        for repository in self._mark.repositories:
            lock = partial(self._store.locks.hold, repository)
            await self._thread.run(self._clean_up_repository(repository), lock=lock)

    def _record(self, result: DeleteResult) -> None:
        outcome, item = result
        counts = self._counts
        if outcome is DeleteOutcome.DELETED:
            counts[f"{item.kind}s"] += 1
            counts["bytes"] += item.size
            self._progress.emit(item)
        else:
            category = "foreign" if outcome is DeleteOutcome.NOT_OWNED else "recent"
            counts[category] += 1
            counts[f"{category}_bytes"] += item.size

    # The methods below run in a thread.

    def _clean_up_repository(self, repository: str) -> Iterator[None]:
        store, subjects = self._store, self._deleted_manifests.get(repository, {})
        for text, subject_text in subjects.items():
            digest = Digest.parse(text)
            if subject_text is not None and not store.links.has_manifest(repository, digest):
                subject = Digest.parse(subject_text)
                store.referrers.remove(repository, digest, subject)
                with suppress(OSError):
                    os.rmdir(store.layout.referrers(repository, subject))
            yield None
        if subjects:
            yield from store.links.prune_tag_index(repository, subjects)
        yield from store.links.prune(repository)

    def _sweep_manifests(self) -> Iterator[DeleteResult | None]:
        for repository, unreferenced in self._mark.unreferenced.items():
            for group in unreferenced.groups:
                for start in range(0, len(group), _MANIFEST_BATCH):
                    batch = group[start : start + _MANIFEST_BATCH]
                    outcome = self._safe_delete.unlink_manifests(repository, list(map(Digest.parse, batch)))
                    if outcome is not DeleteOutcome.DELETED:
                        if outcome is DeleteOutcome.NOT_OWNED:
                            yield outcome, RemovedItem("manifest", Digest.parse(batch[0]), repository)
                        yield from self._mark.retain(unreferenced, group[start:])
                        break
                    subjects = self._deleted_manifests.setdefault(repository, {})
                    for text in batch:
                        subjects[text] = unreferenced.refs[text][2]
                        yield outcome, RemovedItem("manifest", Digest.parse(text), repository)

    def _sweep_links(self) -> Iterator[DeleteResult | None]:
        for repository, unreferenced in self._mark.unreferenced.items():
            while True:
                try:
                    digest = Digest.parse(unreferenced.layers.pop())
                except KeyError:
                    break  # this thread, or the other, has taken the last one
                outcome = self._safe_delete.unlink_layer(repository, digest)
                yield (outcome, RemovedItem("link", digest, repository)) if outcome is DeleteOutcome.DELETED else None

    def _sweep_blobs(self, partition: int) -> Iterator[DeleteResult | None]:
        for digest in self._store.blobs.digests(partition, _THREADS):
            self._scan_counts[partition] += 1
            if str(digest) not in self._mark.reachable:
                outcome, size = self._safe_delete.delete_blob(digest)
                yield outcome, RemovedItem("blob", digest, size=size)
            elif self._scan_counts[partition] % _YIELD_EVERY == 0:
                yield None
