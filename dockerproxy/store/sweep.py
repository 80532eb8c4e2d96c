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
from typing import Any

from attrs import define, field, frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import Entry
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.removal import Removal, Verdict
from dockerproxy.store.slices import Slices, Watch
from dockerproxy.store.survey import Group, Survey, Text
from dockerproxy.tasks import in_thread

GRACE = 3600.0
"""Seconds for which a content is safe after its last use: a push may count on it."""

SHORTEST_GRACE = 120.0
"""Seconds. The date of the last use is up to 60 s behind (`Blobs.touch`)."""

_BATCH = 32  # things that go in one turn of the reactor: 1 to 2 ms
_MAX_PROBLEMS = 1000


class SweepUnderWay(Exception):
    """There is a collection already."""


@frozen
class Removed:
    """Something that went (or would go): a ``manifest`` or ``link`` of a repository, or a ``blob`` of `size` bytes."""

    kind: str
    digest: Digest
    repository: str | None = None
    size: int = 0


@frozen
class Swept:
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
    _slices: Slices = field(kw_only=True)
    _clock: Callable[[], float] = field(default=time.time, kw_only=True)
    _under_way: bool = field(default=False, init=False)

    @_slices.default
    def _make_slices(self) -> Slices:
        return Slices(self._reactor)

    async def sweep(
        self,
        *,
        delete_untagged: bool = False,
        dry_run: bool = False,
        grace: float = GRACE,
        watch: Watch[Removed] | None = None,
    ) -> Swept:
        """Collect. It may be cancelled at any time, and what went by then is gone.

        Raise `SweepUnderWay`, ValueError for a grace period that is too short, OSError.
        """
        if grace < SHORTEST_GRACE:
            raise ValueError(f"a grace period has {SHORTEST_GRACE:g} seconds at least")
        if self._under_way:
            raise SweepUnderWay
        self._under_way = True
        try:
            cutoff = self._clock() - grace
            survey = Survey(self._store.layout, self._store.links, cutoff, delete_untagged)
            removal = Removal(self._store.layout, cutoff, dry_run)
            run = _Run(self._reactor, self._store, survey, removal, watch or Watch(), self._slices)
            try:
                return await run.collect()
            except Exception:
                await in_thread(self._reactor, removal.drop)
                raise
        finally:
            self._under_way = False


@define
class _Run:
    """One collection."""

    _reactor: Any
    _store: HostedStore
    _survey: Survey
    _removal: Removal
    _watch: Watch[Removed]
    _slices: Slices
    _looked_at: int = field(default=0, init=False)
    _counts: Counter[str] = field(factory=Counter, init=False)
    _stay: set[Group] = field(factory=set, init=False)
    _gone: dict[str, dict[Text, Text | None]] = field(factory=dict, init=False)  # with their subjects

    async def collect(self) -> Swept:
        survey, watch, run = self._survey, self._watch, self._slices.run
        await run(survey.steps(), after_slice=watch.of("mark", lambda: survey.manifests))
        sweeping = watch.of("sweep", lambda: self._looked_at)
        await run(self._groups(), self._remove_groups, after_slice=sweeping)
        await run(self._layers(), self._remove_layers, after_slice=sweeping)
        # What is linked is there, after a power cut too: the links are gone from the disk before the first blob is.
        await in_thread(self._reactor, self._removal.sync)
        if not self._removal.dry_run:
            await self._tidy()
        await run(self._contents(), self._remove_blobs, after_slice=sweeping)
        return Swept(
            self._removal.dry_run,
            **self._counts,
            repositories=len(survey.repositories),
            needed=len(survey.needed),
            recent_manifests=survey.recent,
            problems=tuple(map(str, survey.problems[:_MAX_PROBLEMS])),
        )

    async def _tidy(self) -> None:
        """Remove what was noted of the manifests that went, and the directories of repositories that have nothing."""
        for repository in self._survey.repositories:
            async with self._store.turns.of(repository):
                await self._slices.run(self._tidy_repository(repository))

    # in a thread: what to decide on next, and what follows

    def _tidy_repository(self, repository: str) -> Iterator[None]:
        store, gone = self._store, self._gone.get(repository, {})
        for text, subject_text in gone.items():
            digest = Digest.parse(text)
            if subject_text is not None and not store.links.has_manifest(repository, digest):
                subject = Digest.parse(subject_text)
                store.referrers.forget(repository, digest, subject)
                with suppress(OSError):
                    os.rmdir(store.layout.referrers(repository, subject))
            yield None
        if gone:
            yield from store.links.forget(repository, set(map(Digest.parse, gone)))
        store.links.prune(repository)

    def _groups(self) -> Iterator[list[tuple[Group, int]]]:
        batch: list[tuple[Group, int]] = []
        size = 0
        for group in self._survey.idle_manifests:
            for number, part in enumerate(group.parts):
                batch.append((group, number))
                size += len(part)
                if size >= _BATCH:
                    yield batch
                    batch, size = [], 0
                    self._removal.drop()
        yield batch
        self._removal.drop()

    def _layers(self) -> Iterator[list[tuple[str, Digest]]]:
        for repository, idle in self._survey.idle_layers.items():
            waiting = list(idle)
            for start in range(0, len(waiting), _BATCH):
                yield [(repository, Digest.parse(layer)) for layer in waiting[start : start + _BATCH]]
                self._removal.drop()

    def _contents(self) -> Iterator[list[Entry] | None]:
        batch: list[Entry] = []
        for entry in self._store.blobs.walk():
            self._looked_at += 1
            if str(entry.digest) not in self._survey.needed:
                batch.append(entry)
            if len(batch) == _BATCH:
                yield batch
                batch = []
                self._removal.drop()
            else:
                yield None
        yield batch
        self._removal.drop()

    # in the reactor: decided, and done

    def _remove_groups(self, batch: list[tuple[Group, int]]) -> None:
        for group, number in batch:
            if group in self._stay:
                continue
            part = group.parts[number]
            verdict = self._removal.manifests(group.repository, list(map(Digest.parse, part)))
            if verdict is not Verdict.GONE:
                self._stay.add(group)
                self._survey.keep(group, [member for rest in group.parts[number:] for member in rest])
                self._counts.update(foreign=verdict is Verdict.FOREIGN)
                continue
            gone = self._gone.setdefault(group.repository, {})
            self._counts.update(manifests=len(part))
            for text in part:
                gone[text] = group.needs[text][2]
                self._watch.found(Removed("manifest", Digest.parse(text), group.repository))

    def _remove_layers(self, batch: list[tuple[str, Digest]]) -> None:
        for repository, digest in batch:
            if self._removal.layer(repository, digest) is Verdict.GONE:
                self._counts.update(links=1)
                self._watch.found(Removed("link", digest, repository))

    def _remove_blobs(self, batch: list[Entry]) -> None:
        for entry in batch:
            match self._removal.blob(entry.digest):
                case Verdict.GONE:
                    self._counts.update(blobs=1, bytes=entry.size)
                    self._watch.found(Removed("blob", entry.digest, size=entry.size))
                case Verdict.RECENT:
                    self._counts.update(recent=1, recent_bytes=entry.size)
                case Verdict.FOREIGN:
                    self._counts.update(foreign=1, foreign_bytes=entry.size)
