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
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.removal import Removal, Verdict
from dockerproxy.store.slices import Slices, Watch
from dockerproxy.store.survey import Survey, Text, emptying

GRACE = 3600.0
"""Seconds for which a content is safe after its last use: a push may count on it."""

SHORTEST_GRACE = 120.0
"""Seconds. The date of the last use is up to 60 s behind (`Blobs.touch`)."""

_PART = 32
"""So many manifests go in one step at most. An image for all platforms, with its signatures, has fewer."""

_LANES = 2
"""Threads in which links and contents are taken away. Each of these frees blocks, for which some disks let wait (0.1 to
0.4 ms on ext4 without a journal that is mounted with `discard`): two threads get twice as much done."""

_LONGER = 5
"""The slices of these are so much longer than those of the mark phase: they hardly compute in Python, and what the
system does for them lets go of the interpreter."""

_SOME = 200  # names looked at in one step
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


Judged = tuple[Verdict, Removed]


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
            run = _Run(self._store, survey, removal, watch or Watch(), self._slices)
            return await run.collect()
        finally:
            self._under_way = False


@define
class _Run:
    """One collection."""

    _store: HostedStore
    _survey: Survey
    _removal: Removal
    _watch: Watch[Removed]
    _slices: Slices
    _counts: Counter[str] = field(factory=Counter, init=False)
    _looked_at: list[int] = field(factory=lambda: [0] * _LANES, init=False)  # contents
    _gone: dict[str, dict[Text, Text | None]] = field(factory=dict, init=False)  # with their subjects

    async def collect(self) -> Swept:
        survey, watch, run = self._survey, self._watch, self._slices.run
        beside = evolve(self._slices, length=self._slices.length * _LONGER).run_beside
        await run(survey.steps(), after_slice=watch.of("mark", lambda: survey.manifests))
        told = watch.of("sweep", lambda: sum(self._looked_at))
        await run(self._manifests(), self._note, after_slice=told)
        await beside([self._layers() for _ in range(_LANES)], self._note, after_slice=told)
        # What is linked is there, after a power cut too: the links are gone from the disk before the first blob is.
        await run(self._removal.sync())
        if not self._removal.dry_run:
            await self._tidy()
        await beside([self._contents(lane) for lane in range(_LANES)], self._note, after_slice=told)
        needed = len(survey.needed)
        await run(emptying(survey.needed))
        return Swept(
            self._removal.dry_run,
            **self._counts,
            repositories=len(survey.repositories),
            needed=needed,
            recent_manifests=survey.recent,
            problems=tuple(map(str, survey.problems[:_MAX_PROBLEMS])),
        )

    async def _tidy(self) -> None:
        """Remove what was noted of the manifests that went, and the directories of repositories that have nothing."""
        for repository in self._survey.repositories:
            turn = partial(self._store.turns.hold, repository)
            await self._slices.run(self._tidy_repository(repository), turn=turn)

    def _note(self, judged: Judged) -> None:
        verdict, thing = judged
        counts = self._counts
        if verdict is Verdict.GONE:
            counts[f"{thing.kind}s"] += 1
            counts["bytes"] += thing.size
            self._watch.found(thing)
        else:
            spared = "foreign" if verdict is Verdict.FOREIGN else "recent"
            counts[spared] += 1
            counts[f"{spared}_bytes"] += thing.size

    # in a thread

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
            yield from store.links.forget(repository, gone)
        yield from store.links.prune(repository)

    def _manifests(self) -> Iterator[Judged | None]:
        for repository, idle in self._survey.idle.items():
            for group in idle.groups:
                for start in range(0, len(group), _PART):
                    part = group[start : start + _PART]
                    verdict = self._removal.manifests(repository, list(map(Digest.parse, part)))
                    if verdict is not Verdict.GONE:
                        if verdict is Verdict.FOREIGN:
                            yield verdict, Removed("manifest", Digest.parse(part[0]), repository)
                        yield from self._survey.keep(idle, group[start:])
                        break
                    gone = self._gone.setdefault(repository, {})
                    for text in part:
                        gone[text] = idle.needs[text][2]
                        yield verdict, Removed("manifest", Digest.parse(text), repository)

    def _layers(self) -> Iterator[Judged | None]:
        for repository, idle in self._survey.idle.items():
            while True:
                try:
                    digest = Digest.parse(idle.layers.pop())
                except KeyError:
                    break  # this lane, or the other, had the last one
                verdict = self._removal.layer(repository, digest)
                yield (verdict, Removed("link", digest, repository)) if verdict is Verdict.GONE else None

    def _contents(self, lane: int) -> Iterator[Judged | None]:
        for digest in self._store.blobs.digests(lane, _LANES):
            self._looked_at[lane] += 1
            if str(digest) not in self._survey.needed:
                verdict, size = self._removal.blob(digest)
                yield verdict, Removed("blob", digest, size=size)
            elif self._looked_at[lane] % _SOME == 0:
                yield None
