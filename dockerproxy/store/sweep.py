"""Garbage collection of a registry that goes on serving: what no tag leads to any more is found, and taken away.

First the mark phase (`survey`), in a thread, beside pushes and pulls. Then manifests, links to blobs and blobs go, in
this order. What is true when a thing goes and was not when it was looked at, no lock keeps out; the order and one date
do (`removal`):

- Nothing goes whose content was used after a moment that lies `grace` seconds before the start. So whatever a push
  found here, wrote or linked while the collection ran stays, and a client has the grace period from its HEAD to its
  manifest.
- A manifest that is pushed meanwhile refers to contents that were used by that, and to manifests. These have all been
  judged, with what they need in turn, before the first blob goes: one that was to go and was used first stays, and what
  it needs with it; one that went is not found by the push, which has to bring it again.
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
from dockerproxy.store.hosted_store import HostedStore
from dockerproxy.store.mark import DigestText, Mark, clear_incrementally
from dockerproxy.store.safe_delete import DeleteOutcome, SafeDelete

GRACE_PERIOD = 3600.0
"""Seconds for which a content is safe after its last use: a push may count on it."""

MIN_GRACE_PERIOD = 120.0
"""Seconds. The date of the last use is up to 60 s behind (`Blobs.touch`)."""

_MANIFEST_BATCH = 32
"""So many manifests go in one step at most. An image for all platforms, with its signatures, has fewer."""

_THREADS = 2
"""Threads in which links and contents are taken away. Each of these frees blocks, for which some disks let wait (0.1 to
0.4 ms on ext4 without a journal that is mounted with `discard`): two threads get twice as much done."""

_SLICE_FACTOR = 5
"""The slices of these are so much longer than those of the mark phase: they hardly compute in Python, and what the
system does for them lets go of the interpreter."""

_YIELD_EVERY = 200  # names looked at in one step
_MAX_PROBLEMS = 1000


class SweepInProgress(Exception):
    """There is a collection already."""


@frozen
class RemovedItem:
    """Something that went (or would go): a ``manifest`` or ``link`` of a repository, or a ``blob`` of `size` bytes."""

    kind: str
    digest: Digest
    repository: str | None = None
    size: int = 0


DeleteResult = tuple[DeleteOutcome, RemovedItem]


@frozen
class SweepResult:
    """What a collection did, or with `dry_run` would do.

    Of what nothing needs, `recent_manifests` (with what they need) and `recent` other blobs stayed, being used
    within the grace period, and `foreign` blobs and groups of manifests, because their files are another user's.
    `problems` are sentences.
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
    """Collects the garbage of `store`; one collection at a time. `clock` is POSIX time."""

    _reactor: Any
    _store: HostedStore
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
        """Collect. It may be cancelled at any time, and what went by then is gone.

        Raise `SweepUnderWay`, ValueError for a grace period that is too short, OSError.
        """
        if grace < MIN_GRACE_PERIOD:
            raise ValueError(f"a grace period has {MIN_GRACE_PERIOD:g} seconds at least")
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

    _store: HostedStore
    _mark: Mark
    _safe_delete: SafeDelete
    _progress: Progress[RemovedItem]
    _thread: CooperativeThread
    _counts: Counter[str] = field(factory=Counter, init=False)
    _scan_counts: list[int] = field(factory=lambda: [0] * _THREADS, init=False)  # contents
    _deleted_manifests: dict[str, dict[DigestText, DigestText | None]] = field(
        factory=dict, init=False
    )  # with their subjects

    async def collect(self) -> SweepResult:
        mark, progress, run = self._mark, self._progress, self._thread.run
        run_parallel = evolve(self._thread, slice_length=self._thread.slice_length * _SLICE_FACTOR).run_parallel
        await run(mark.steps(), after_slice=progress.reporter("mark", lambda: mark.manifest_count))
        report = progress.reporter("sweep", lambda: sum(self._scan_counts))
        await run(self._sweep_manifests(), self._record, after_slice=report)
        await run_parallel([self._sweep_links() for _ in range(_THREADS)], self._record, after_slice=report)
        # What is linked is there, after a power cut too: the links are gone from the disk before the first blob is.
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
        """Remove what was noted of the manifests that went, and the directories of repositories that have nothing."""
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

    # in a thread

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
                    break  # this lane, or the other, had the last one
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
