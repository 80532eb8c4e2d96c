"""A run of garbage collection in a bucket; `gc_runs` has the protocol. It may die at any request.

It deletes in this order: tags, manifests, the links of blobs, contents with their links, catalog keys. All
manifests are decided before the first link or content. If one was rescued, all that it needs stays.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from attrs import define, evolve, field, frozen
from twisted.internet.task import LoopingCall, deferLater

from dockerproxy.bucket import keys
from dockerproxy.bucket.bucket_probe import keeps_conditions
from dockerproxy.bucket.gc_runs import (
    DELETING,
    GC,
    MAX_ENTRIES,
    Run,
    Times,
    begun_key,
    catalog_entry,
    condemned_key,
    content_entry,
    decision_key,
    end_key,
    gone_key,
    link_entry,
    list_runs,
    run_prefix,
    tag_entry,
)
from dockerproxy.bucket.gc_survey import Followers, Garbage, Survey
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.bucket.store_errors import IGNORES_CONDITIONS
from dockerproxy.bucket.walk import AT_ONCE, ListedRepository, read_references, read_tags, walk_repository
from dockerproxy.concurrency import gather
from dockerproxy.errors import RegistryError, StoreRefused
from dockerproxy.oci.names import Digest, Repository, Tag
from dockerproxy.store.mark import DigestText, ManifestUnreadable
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.sweep import GRACE_PERIOD, InvalidGracePeriod, RemovedItem, SweepResult

__all__ = ["GCOptions", "GCRefused", "collect"]

_TICK = 1.0  # seconds between two reports while the run waits
_MAX_PROBLEMS = 1000
_MAX_UPLOADS = 10_000  # unfinished uploads that one run aborts

T = TypeVar("T")


class GCRefused(Exception):
    """gc cannot run. If `is_busy`, another node runs it."""

    def __init__(self, message: str, *, is_busy: bool = False) -> None:
        super().__init__(message)
        self.is_busy = is_busy


class _Unsent(Exception):
    """A DELETE was not sent, because it came too late."""


@frozen
class _Decision:
    """The entry that this run deletes, and when it began to decide so, by the boot clock."""

    entry: str
    began: float


class _RunLost(Exception):
    """This collector was still for so long that another node may have pronounced its run dead."""


@frozen
class GCOptions:
    """The options of `collect`, which are those of the command `gc`, `grace` in seconds."""

    delete_untagged: bool = False
    dry_run: bool = False
    grace: float = GRACE_PERIOD


async def collect(
    reactor: Any,
    bucket: S3Bucket,
    options: GCOptions,
    progress: Progress[RemovedItem],
    boot_clock: Callable[[], float],
    node: str = os.uname().nodename,
) -> SweepResult:
    """Collect the garbage of `bucket`.

    `boot_clock` gives seconds that go on while the machine sleeps, and `node` is the name of this machine. Raise
    `GCRefused`, `InvalidGracePeriod`, `Stopped`, and the errors of the bucket.
    """
    times = Times.scaled(bucket.location.time_scale)
    if not options.grace >= times.shortest_grace:  # also true for NaN
        message = f"a grace period of {options.grace:g} seconds is too short; use at least {times.shortest_grace:g}"
        raise InvalidGracePeriod(message)
    collector = _GCRun(reactor, bucket, options, progress, boot_clock, node, times)
    return await (collector.report() if options.dry_run else collector.run())


@define
class _GCRun:
    _reactor: Any
    _bucket: S3Bucket
    _options: GCOptions
    _progress: Progress[RemovedItem]
    _boot_clock: Callable[[], float]
    _node: str
    _times: Times
    _run: int = field(default=0, init=False)
    _renewed: float = field(default=0.0, init=False)  # when the last `begun` was sent that the store has
    _garbage: Garbage = field(factory=Garbage, init=False)
    _condemned: frozenset[DigestText] = field(default=frozenset(), init=False)  # contents that were published
    _problems: list[str] = field(factory=list, init=False)
    _counts: Counter[str] = field(factory=Counter, init=False)
    _last_unanswered: float | None = field(default=None, init=False)  # when a DELETE was sent that nobody answered
    _failure: Exception | None = field(default=None, init=False)
    _done: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)

    async def report(self) -> SweepResult:
        """Look at the bucket without a run, and return the garbage in it."""
        survey = await self._survey(None)
        garbage = survey.garbage
        for repository, manifests in garbage.manifests.items():
            for text in manifests:
                self._record("manifest", text, repository)
        for repository, links in garbage.links.items():
            for text in links - garbage.contents.keys():
                self._record("link", text, repository)
        for text, size in garbage.contents.items():
            self._record("blob", text, size=size)
        uploads = len(await self._old_uploads())
        problems = tuple(self._problems[:_MAX_PROBLEMS])
        return evolve(self._result(survey), **self._deleted(), uploads=uploads, problems=problems)

    async def run(self) -> SweepResult:
        """Collect the garbage. The run ends also if this fails, unless a DELETE may be under way."""
        await self._check_conditions()
        content = await self._begin()
        renewal = LoopingCall(self._renew, content)
        renewal.clock = self._reactor
        renewal.start(self._times.renewal, now=False)
        try:
            result = await self._work()
            await self._wait_for_unanswered()
            return result
        except _RunLost:
            raise GCRefused(
                f"gc was given up, because this machine or the store stood still for more than {self._times.trust:g} s;"
                " run it again"
            ) from None
        finally:
            renewal.stop()
            await self._end()

    async def _work(self) -> SweepResult:
        await self._clean_up_runs()
        first = await self._survey(None)
        self._garbage = first.garbage
        await self._heal_catalog(first)
        result = self._result(first)
        left_out = self._garbage.limit(MAX_ENTRIES)
        if left_out:
            self._problems.append(f"{left_out} more links and contents can be deleted; run gc again")
        candidates, size = len(self._garbage.contents), sum(self._garbage.contents.values())
        manifests = sum(map(len, self._garbage.manifests.values()))
        if any(True for _ in self._garbage.entries()):
            await self._publish()
            second = await self._survey(first)
            self._garbage.keep_only(second.garbage)
            await self._wait(self._options.grace)
            await self._sweep()
            await self._mark_orphans(second)
        uploads = await self._old_uploads()
        await self._each(uploads, lambda upload: self._bucket.abort_upload(*upload))
        counts = self._counts
        return evolve(
            result,
            **self._deleted(),
            recent=result.recent + candidates - counts["blobs"],
            recent_bytes=result.recent_bytes + size - counts["bytes"],
            recent_manifests=result.recent_manifests + manifests - counts["manifests"],
            uploads=len(uploads),
            problems=tuple(self._problems[:_MAX_PROBLEMS]),
        )

    # the run

    async def _check_conditions(self) -> None:
        """Raise `GCRefused` if the store lets two writers create the same object."""
        try:
            holds = await keeps_conditions(self._bucket)
        except StoreRefused as error:
            raise GCRefused(f"gc needs to create objects by PUT with If-None-Match: {error.message}") from None
        if not holds:
            raise GCRefused(f"gc does not run, because {self._bucket.location} {IGNORES_CONDITIONS}")

    async def _begin(self) -> bytes:
        """Begin a run, after the last one if that has ended or is dead. Return the content of `begun`."""
        runs = await list_runs(self._bucket)
        last = runs[-1] if runs else Run(0, is_ended=True)
        if not last.is_ended:
            if last.age <= self._times.dead:
                raise await self._busy(last)
            await self._bucket.put(end_key(last.number), b"")
        self._run = last.number + 1
        content = json.dumps({"node": self._node, "token": secrets.token_hex(16)}).encode()
        self._renewed = self._boot_clock()
        if await self._bucket.create(begun_key(self._run), content) != content:
            raise await self._busy(Run(self._run, 0.0))
        return content

    async def _busy(self, run: Run) -> GCRefused:
        try:
            node = str(json.loads(await self._bucket.get(begun_key(run.number), 4096) or b"{}")["node"])[:100]
        except (ValueError, KeyError, TypeError):
            node = "a node"
        remaining = max(1.0, self._times.dead - run.age)
        return GCRefused(
            f"gc of this bucket is run by {node}, which reported {run.age:.0f} s ago; wait until it has ended, or, if"
            f" that node is dead, run gc again in {remaining:.0f} s",
            is_busy=True,
        )

    async def _renew(self, content: bytes) -> None:
        sent = self._boot_clock()
        with suppress(RegistryError):  # the next one may succeed
            await self._bucket.put(begun_key(self._run), content)
            if self._is_trusted():  # if it came too late, another node may have ended the run before it saw this one
                self._renewed = sent

    def _is_trusted(self) -> bool:
        """Return whether no other node can have ended the run."""
        return self._boot_clock() - self._renewed <= self._times.trust

    def _check_trust(self) -> None:
        if not self._is_trusted():
            raise _RunLost

    async def _publish(self) -> None:
        lines = sorted({entry.encode() for entry in self._garbage.entries()})
        self._condemned = frozenset(self._garbage.contents)
        await self._bucket.put(condemned_key(self._run), b"\n".join(lines))

    async def _end(self) -> None:
        """Note that no DELETE is under way, unless one may be: then the run is dead some time later."""
        if self._last_unanswered is None:
            with suppress(RegistryError):
                await self._bucket.put(end_key(self._run), b"")

    async def _clean_up_runs(self) -> None:
        """Delete the objects of runs that ended a day ago."""
        runs = {run.number: run for run in await list_runs(self._bucket)}
        async for entry in self._bucket.list_keys(GC, delimiter="/"):
            name = entry.key.removeprefix(GC).rstrip("/")
            if name.isdecimal():
                runs.setdefault(int(name), Run(int(name)))
        for run in runs.values():
            if run.number < self._run and run.age > self._times.keep:
                await self._delete_prefix(run_prefix(run.number))
                # `end` last: without it, the run would look as if it were under way.
                for key in (condemned_key(run.number), begun_key(run.number), end_key(run.number)):
                    await self._bucket.delete([key])

    async def _delete_prefix(self, prefix: str) -> None:
        batch: list[str] = []
        async for entry in self._bucket.list_keys(prefix):
            batch.append(entry.key)
            if len(batch) == 1000:
                await self._bucket.delete(batch)
                batch.clear()
                self._report("mark", 0, None)
        if batch:
            await self._bucket.delete(batch)

    async def _wait(self, seconds: float) -> None:
        began = self._boot_clock()
        while (passed := self._boot_clock() - began) < seconds:
            self._report("wait", int(passed), int(seconds))
            await deferLater(self._reactor, min(_TICK, seconds - passed))

    async def _wait_for_unanswered(self) -> None:
        """Wait until no DELETE can be under way any more."""
        if self._last_unanswered is not None:
            await self._wait(self._last_unanswered + self._times.delete - self._boot_clock())
            self._last_unanswered = None

    # mark

    async def _survey(self, first: Survey | None) -> Survey:
        survey = Survey(
            self._bucket,
            self._options.grace,
            self._options.delete_untagged,
            lambda count: self._report("mark", count, None),
            MAX_ENTRIES // 2,
            first,
        )
        await survey.run()
        if first is None:
            self._problems += survey.problems
        return survey

    async def _heal_catalog(self, survey: Survey) -> None:
        """Write the catalog keys that a node could not write before it died."""
        await self._each(survey.without_catalog, lambda repository: self._bucket.put(keys.catalog_key(repository), b""))

    async def _mark_orphans(self, survey: Survey) -> None:
        for repository, tags in survey.orphans.items():
            await self._each(tags, lambda tag: self._bucket.put(keys.orphaned_key(repository, tag), b"-"))  # noqa: B023

    # sweep

    async def _sweep(self) -> None:
        garbage = self._garbage
        self._total = sum(1 for _ in garbage.entries())
        await self._each(garbage.tags.items(), lambda item: self._sweep_tags(*item))
        await self._each(garbage.manifests.items(), lambda item: self._sweep_manifests(*item))
        places: dict[DigestText, list[Repository]] = {}
        links: list[tuple[Repository, DigestText]] = []
        for repository, texts in garbage.links.items():
            for text in texts:
                if text in garbage.contents:
                    places.setdefault(text, []).append(repository)
                # The entry of a manifest is decided already, and a link to a content that stays has none.
                elif text not in garbage.manifests.get(repository, ()) and text not in self._condemned:
                    links.append((repository, text))
        self._total = self._done + len(links) + len(garbage.contents) + len(garbage.catalog)
        await self._each(links, lambda item: self._sweep_link(*item))
        contents = ((text, size, places.get(text, ())) for text, size in garbage.contents.items())
        await self._each(contents, lambda item: self._sweep_content(*item))
        await self._each(garbage.catalog, self._sweep_catalog)

    async def _sweep_tags(self, repository: Repository, tags: Mapping[Tag, DigestText]) -> None:
        for tag, target in tags.items():
            decision = await self._decide(tag_entry(repository, tag))
            if decision is None:
                continue
            # A push that looked before the run was published has ended by now.
            is_same = (await read_tags(self._bucket, repository, [tag])).get(tag) == target
            doomed = []
            if is_same:
                prefix = keys.tag_prefix(repository, tag)
                doomed = [listed.key async for listed in self._bucket.list_keys(prefix)]
            await self._delete(decision, doomed)

    async def _sweep_manifests(self, repository: Repository, manifests: Mapping[DigestText, Followers]) -> None:
        listed = await walk_repository(self._bucket, repository)
        beside: dict[DigestText, list[str]] = {}
        for tag, text in listed.tag_index:
            beside.setdefault(text, []).append(keys.tag_index_key(repository, tag, Digest.parse(text)))
        for subject, text in listed.referrers:
            key = keys.referrer_key(repository, Digest.parse(subject), Digest.parse(text))
            beside.setdefault(text, []).append(key)
        kept: set[DigestText] = set()
        for text in manifests:
            if text in kept or self._failure is not None:
                continue
            digest = Digest.parse(text)
            notes = [keys.media_type_key(repository, digest), keys.subject_key(repository, digest)]
            doomed = [*beside.get(text, ()), *notes, keys.manifest_key(repository, digest)]
            decision = await self._decide(link_entry(repository, text))
            if decision is not None and await self._delete(decision, doomed):
                self._record("manifest", text, repository)
            else:
                await self._keep(listed, text, manifests, kept)

    async def _keep(
        self,
        listed: ListedRepository,
        text: DigestText,
        manifests: Mapping[DigestText, Followers],
        kept: set[DigestText],
    ) -> None:
        """Let off all that the manifest needs, and its followers with all that they need."""
        garbage = self._garbage
        links = garbage.links.get(listed.name, set())
        pending = [text]
        while pending:
            text = pending.pop()
            if text in kept:
                continue
            kept.add(text)
            pending += manifests.get(text, ())
            try:
                needed = {text, *map(str, (await read_references(self._bucket, listed, text)).objects)}
            except ManifestUnreadable as error:
                self._problems.append(f"{listed.name}: {error}; no content was deleted")
                garbage.contents.clear()
                garbage.links.clear()
                return
            links -= needed
            for digest in needed:
                garbage.contents.pop(digest, None)

    async def _sweep_link(self, repository: Repository, text: DigestText) -> None:
        decision = await self._decide(link_entry(repository, text))
        key = keys.layer_key(repository, Digest.parse(text))
        if decision is not None and await self._delete(decision, [key]):
            self._record("link", text, repository)

    async def _sweep_content(self, text: DigestText, size: int, repositories: Sequence[Repository]) -> None:
        digest, decision = Digest.parse(text), await self._decide(content_entry(text))
        links = [keys.layer_key(repository, digest) for repository in repositories]
        if decision is not None and await self._delete(decision, [*links, keys.blob_key(digest)]):
            for repository in repositories:
                self._record("link", text, repository)
            self._record("blob", text, size=size)

    async def _sweep_catalog(self, repository: Repository) -> None:
        decision = await self._decide(catalog_entry(repository))
        if decision is not None:
            is_empty = not (await walk_repository(self._bucket, repository)).manifests
            doomed = [keys.indexed_key(repository), keys.catalog_key(repository)]
            await self._delete(decision, doomed if is_empty else [])

    async def _decide(self, entry: str) -> _Decision | None:
        """Decide to delete an entry, and return that. Return None if somebody counts on it."""
        self._done += 1
        self._report("sweep", self._done, self._total)
        self._check_trust()
        decision = _Decision(entry, self._boot_clock())
        made = await self._bucket.create(decision_key(self._run, entry), DELETING)
        return decision if made == DELETING else None

    async def _delete(self, decision: _Decision, doomed: Sequence[str]) -> bool:
        """Delete the keys of an entry, the last one after the others. Return whether all of them are gone."""
        is_answered = True

        async def delete(key: str) -> None:
            nonlocal is_answered
            if not self._may_delete(decision):
                raise _Unsent
            is_done = False
            try:
                await self._bucket.delete_once(key)
                is_done = True
            finally:
                if not is_done:  # the store may still do it, at any later time
                    is_answered, self._last_unanswered = False, self._boot_clock()

        try:
            await gather(map(delete, doomed[:-1]), AT_ONCE)
            await gather(map(delete, doomed[-1:]), 1)
            is_deleted = True
        except (_Unsent, RegistryError):
            is_deleted = False
        if is_answered:
            await self._bucket.put(gone_key(self._run, decision.entry), b"")
        return is_deleted

    def _may_delete(self, decision: _Decision) -> bool:
        """Return whether all other nodes still believe that this DELETE may be under way.

        The machine may have slept since the decision, or since the run was renewed.
        """
        return self._boot_clock() - decision.began <= self._times.decision and self._is_trusted()

    async def _each(self, items: Iterable[T], act: Callable[[T], Awaitable[object]]) -> None:
        """Call `act` with each of `items`. After a failure, those under way come to their end before it is raised."""

        async def do(item: T) -> None:
            if self._failure is None:
                try:
                    await act(item)
                except (RegistryError, Stopped, _RunLost) as error:
                    self._failure = self._failure or error

        await gather(map(do, items), AT_ONCE)
        if self._failure is not None:
            raise self._failure

    async def _old_uploads(self) -> list[tuple[str, str]]:
        """Return the key and the ID of each upload in parts that its node has given up, or died before its end."""
        found: list[tuple[str, str]] = []
        try:
            async for upload in self._bucket.list_uploads(keys.BLOBS):
                if upload.age > self._times.keep and len(found) < _MAX_UPLOADS:
                    found.append((upload.key, upload.upload))
        except StoreRefused as error:
            self._problems.append(f"unfinished uploads in parts cannot be listed: {error.message}")
        return found

    # results

    def _record(self, kind: str, text: DigestText, repository: Repository | None = None, size: int = 0) -> None:
        self._counts[f"{kind}s"] += 1
        self._counts["bytes"] += size
        self._progress.emit(RemovedItem(kind, Digest.parse(text), repository, size))

    def _report(self, phase: str, done: int, total: int | None) -> None:
        self._progress.report(phase, done, total)

    def _deleted(self) -> dict[str, Any]:
        return dict(self._counts)

    def _result(self, survey: Survey) -> SweepResult:
        return SweepResult(
            self._options.dry_run,
            repositories=survey.repositories,
            needed=survey.contents - len(survey.garbage.contents) - survey.recent,
            recent=survey.recent,
            recent_bytes=survey.recent_bytes,
            recent_manifests=survey.recent_manifests,
        )
