"""Garbage collection of a registry while it serves requests: deletes the objects that no tag reaches.

The mark phase (`mark`) runs beside pushes and pulls. The sweep phase then deletes manifests, links to blobs, and
blobs, in this order. Races between mark and delete are not prevented by a lock, but by the order of deletion
and the blob's mtime (see `safe_delete`):

- No object is deleted if its blob was used after the cutoff, which is `grace` seconds before the start. Objects that a
  push found, wrote or linked during the collection therefore stay. A client has the grace period from its HEAD request
  to the push of its manifest.
- A push may last longer than that. While a repository has an upload session that is used, its cutoff is so long
  before the start of the session, but at most a day earlier than that of the others.
- A manifest that is pushed meanwhile refers to blobs, which the push has used, and to manifests. All unreachable
  manifests are decided, with their references, before the first blob is deleted. If such a manifest was used before
  its deletion, it stays with all its references. If it was deleted first, the push does not find it and must push it
  again.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TypeVar

from attrs import define, field, frozen

from dockerproxy.oci.names import Digest
from dockerproxy.oci.upload_ids import UploadIds
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.mark import DigestText, Mark
from dockerproxy.store.progress import Progress, RepositoryLock, locked_slices, no_lock
from dockerproxy.store.referrers import Referrers
from dockerproxy.store.safe_delete import DeleteOutcome, SafeDelete
from dockerproxy.store.secret import SECRET_LENGTH
from dockerproxy.store.tree_reader import StrictReader, UnsafeFile, read_small
from dockerproxy.store.uploads import Uploads

GRACE_PERIOD = 3600.0
"""Seconds for which a blob is kept after its last use, because a running push may rely on it."""

MIN_GRACE_PERIOD = 120.0
"""Seconds. The recorded time of the last use may be 60 s too old (`Blobs.touch`)."""

_MANIFEST_BATCH = 32
"""Maximum number of manifests deleted per step. An image for all platforms has fewer, even with its signatures."""

_THREADS = 2
"""Threads that delete links and blobs. Two are twice as fast as one, because some disks are slow to free blocks. A
deletion takes 0.1 to 0.4 ms on ext4 without a journal, mounted with `discard`."""

_BATCH = 200
"""Links or blobs that these threads delete in one step."""

_MAX_HOLD = 86400.0  # seconds by which an upload session can delay the deletion of what its repository does not need

_MAX_PROBLEMS = 1000

T = TypeVar("T")


class InvalidGracePeriod(ValueError):
    """The grace period is too short."""


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
    reachable blobs, `uploads` that of unfinished uploads that were given up before the grace period and are deleted.
    `problems` are messages for the user.
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
    uploads: int = 0
    problems: tuple[str, ...] = ()


def sweep(
    layout: Layout,
    *,
    delete_untagged: bool = False,
    dry_run: bool = False,
    grace: float = GRACE_PERIOD,
    progress: Progress[RemovedItem] | None = None,
    lock: RepositoryLock = no_lock,
    clock: Callable[[], float] = time.time,
) -> SweepResult:
    """Collect the garbage of the store in `layout`. Only one collection may run at a time. Blocks.

    `clock` returns POSIX time. Raises `OSError`, `InvalidGracePeriod` and `Stopped`.
    """
    if not grace >= MIN_GRACE_PERIOD:  # also true for NaN
        message = f"a grace period of {grace:g} seconds is too short; use at least {MIN_GRACE_PERIOD:g}"
        raise InvalidGracePeriod(message)
    safe_delete = SafeDelete(layout, clock() - grace, dry_run)
    return _SweepRun(layout, safe_delete, delete_untagged, progress or Progress(), lock, grace).run()


@define
class _SweepRun:
    """One collection."""

    _layout: Layout
    _safe_delete: SafeDelete
    _delete_untagged: bool
    _progress: Progress[RemovedItem]
    _lock: RepositoryLock
    _grace: float
    _reader: StrictReader = field(init=False)
    _links: Links = field(init=False)
    _referrers: Referrers = field(init=False)
    _mark: Mark = field(init=False)
    _counts: Counter[str] = field(factory=Counter, init=False)
    _done: int = field(default=0, init=False)  # unreferenced objects handled
    _total: int = field(default=0, init=False)
    # By repository: the deleted manifests.
    _deleted_manifests: dict[str, set[DigestText]] = field(factory=dict, init=False)

    @_reader.default
    def _make_reader(self) -> StrictReader:
        return StrictReader(self._layout.anchors, _refuse)

    @_links.default
    def _make_links(self) -> Links:
        return Links(self._layout, durable=True, reader=self._reader)

    @_referrers.default
    def _make_referrers(self) -> Referrers:
        return Referrers(self._layout, Blobs(self._layout, durable=True), self._links)

    @_mark.default
    def _make_mark(self) -> Mark:
        return Mark(
            self._layout, self._links, self._reader, self._safe_delete.cutoff, self._make_cutoffs(),
            self._delete_untagged, on_step=self._report_mark,
        )  # fmt: skip

    def _make_cutoffs(self) -> Callable[[str], float]:
        """Return a function that returns the cutoff of a repository."""
        cutoff = self._safe_delete.cutoff
        secret = read_small(str(self._layout.secret), SECRET_LENGTH)
        if secret is None:
            return lambda repository: cutoff  # the daemon has not run yet
        ids, oldest = UploadIds(secret), Uploads(self._layout).oldest(cutoff)

        def cutoff_of(repository: str) -> float:
            start = oldest.get(ids.repository_part(repository), math.inf)
            return min(cutoff, max(start - self._grace, cutoff - _MAX_HOLD))

        return cutoff_of

    def run(self) -> SweepResult:
        """Collect the garbage."""
        mark = self._mark
        mark.run()
        self._total = len(mark.garbage) + sum(
            len(unreferenced.layers) + sum(map(len, unreferenced.groups)) for unreferenced in mark.unreferenced.values()
        )
        self._sweep_manifests()
        self._delete_in_threads(self._unreferenced_layers(), self._unlink_layer)
        # Sync the deleted links before the first blob is deleted, so that no link dangles after a power cut.
        for _ in self._safe_delete.sync():
            self._report_sweep()
        if not self._safe_delete.dry_run:
            for repository in mark.repositories:
                self._clean_up(repository)
        self._delete_in_threads(sorted(mark.garbage), self._delete_blob)
        return SweepResult(
            self._safe_delete.dry_run,
            **self._counts,
            repositories=len(mark.repositories),
            needed=mark.blob_count - len(mark.garbage),
            recent_manifests=mark.recent_count,
            uploads=Uploads(self._layout).purge(self._safe_delete.cutoff, dry_run=self._safe_delete.dry_run),
            problems=tuple(map(str, mark.problems[:_MAX_PROBLEMS])),
        )

    def _sweep_manifests(self) -> None:
        for repository, unreferenced in self._mark.unreferenced.items():
            for group in unreferenced.groups:
                for start in range(0, len(group), _MANIFEST_BATCH):
                    batch = [Digest.parse(text) for text in group[start : start + _MANIFEST_BATCH]]
                    outcome = self._safe_delete.unlink_manifests(repository, batch)
                    if outcome is not DeleteOutcome.DELETED:
                        if outcome is DeleteOutcome.NOT_OWNED:
                            self._record((outcome, RemovedItem("manifest", batch[0], repository)))
                        self._mark.retain(repository, group[start:])
                        break
                    self._deleted_manifests.setdefault(repository, set()).update(map(str, batch))
                    for digest in batch:
                        self._record((outcome, RemovedItem("manifest", digest, repository)))
                    self._report_sweep()
                self._done += len(group)

    def _unreferenced_layers(self) -> Iterator[tuple[str, DigestText]]:
        for repository, unreferenced in self._mark.unreferenced.items():
            for layer in unreferenced.layers:
                yield repository, layer

    def _clean_up(self, repository: str) -> None:
        """Remove the deleted manifests of a repository from its indexes, and its empty directories."""
        for _ in locked_slices(partial(self._lock, repository), self._clean_up_steps(repository)):
            self._report_sweep()

    def _clean_up_steps(self, repository: str) -> Iterator[None]:
        yield from self._clean_up_derived_tags(repository)
        deleted = self._deleted_manifests.get(repository)
        if deleted is not None:
            for text, subject_text in self._mark.unreferenced[repository].subjects.items():
                digest, subject = Digest.parse(text), Digest.parse(subject_text)
                if text in deleted and not self._links.has_manifest(repository, digest):
                    self._referrers.remove(repository, digest, subject)
                    with suppress(OSError):
                        os.rmdir(self._layout.referrers(repository, subject))
                yield None
            yield from self._links.prune_tag_index(repository, deleted)
        yield from self._links.prune(repository)

    def _clean_up_derived_tags(self, repository: str) -> Iterator[None]:
        """Delete the tags with names derived from digests that are gone, and record those that stay for now."""
        unreferenced = self._mark.unreferenced.get(repository)
        if unreferenced is None:
            return
        for items, act in (
            (unreferenced.tags, self._links.remove_tag), (unreferenced.orphans, self._links.mark_orphaned)
        ):  # fmt: skip
            for item in items:
                subject = None if item.subject is None else Digest.parse(item.subject)
                is_gone = subject is None or not self._links.has_manifest(repository, subject)
                if is_gone and self._links.tag(repository, item.tag) == Digest.parse(item.target):
                    act(repository, item.tag)
                yield None

    def _delete_in_threads(self, items: Iterable[T], delete: Callable[[T], DeleteResult | None]) -> None:
        """Call `delete` with each item in `_THREADS` threads, and record the results."""

        def delete_all(part: list[T]) -> list[DeleteResult | None]:
            return [delete(item) for item in part]

        remaining = iter(items)
        with ThreadPoolExecutor(_THREADS) as pool:
            while batch := list(islice(remaining, _BATCH)):
                for results in pool.map(delete_all, [batch[thread::_THREADS] for thread in range(_THREADS)]):
                    for result in results:
                        if result is not None:
                            self._record(result)
                self._done += len(batch)
                self._report_sweep()

    def _unlink_layer(self, item: tuple[str, DigestText]) -> DeleteResult | None:
        repository, digest = item[0], Digest.parse(item[1])
        outcome = self._safe_delete.unlink_layer(repository, digest)
        return (outcome, RemovedItem("link", digest, repository)) if outcome is DeleteOutcome.DELETED else None

    def _delete_blob(self, text: DigestText) -> DeleteResult:
        digest = Digest.parse(text)
        outcome, size = self._safe_delete.delete_blob(digest)
        return outcome, RemovedItem("blob", digest, size=size)

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

    def _report_mark(self) -> None:
        self._progress.report("mark", self._mark.manifest_count, None)

    def _report_sweep(self) -> None:
        self._progress.report("sweep", self._done, self._total)


def _refuse(error: UnsafeFile) -> None:
    """End the collection: what is behind a symbolic link would count as unreachable."""
    raise error
