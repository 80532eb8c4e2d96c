"""Removes links and records that nothing needs any more, and the oldest ones if there are too many.

Eviction deletes blobs. The links to them, and the records about them, lose their use but stay, and a client can cause
any number of them. Losing a link or record costs a request to upstream, never a wrong response.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial

from attrs import define, field, frozen

from dockerproxy.cache.access import DENIAL, GRANT, STALE_GRANT_TTL
from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import ingests_of
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import LinkEntry, Links, iter_repositories
from dockerproxy.store.records import RecordEntry, Records

GRACE = 3600.0
"""Seconds for which links and records stay after their last use, even if nothing needs them. The blob of a link may be
on its way."""

_MIN_AGE = 60.0  # seconds for which they stay even if there are too many
_UNKNOWN_TTL = 30 * 86400.0  # seconds after which a record of another version of the program is removed
_LOW_WATERMARK = 0.9  # of the maximum, so that the next walk does not have to remove anything

# Files and directories; see `store.layout`.
_LAYER_INODES = 2  # HEX, link
_MANIFEST_INODES = 3  # HEX, link, media-type
_TAG_INODES = 5  # TAG, current, link, index, ALG
_TAG_INDEX_INODES = 2  # HEX, link
_REPOSITORY_INODES = 7  # NAME, _layers, ALG, _manifests, revisions, ALG, tags


@frozen
class _Item:
    """A link, tag or record that takes `inodes` files and directories.

    `is_needed` tells whether something that is in the cache needs it. `discard` removes it, unless that has become
    true. `evict` removes it in any case; it is None if the item has to stay. Both return whether it is removed.
    """

    inodes: int
    age: float
    is_needed: Callable[[], bool]
    discard: Callable[[], bool]
    evict: Callable[[], bool] | None


@define
class _Ages:
    """How many inodes have which age. Ages are rounded down by at most 9 %, so that a few hundred counters suffice."""

    _counts: Counter[int] = field(factory=Counter, init=False)

    def add(self, age: float, inodes: int) -> None:
        self._counts[self._bucket(age)] += inodes

    def cutoff(self, inodes: int) -> _Cutoff:
        """Return what to remove so that the oldest `inodes` inodes go, or all if there are fewer."""
        for bucket in sorted(self._counts, reverse=True):
            if inodes <= self._counts[bucket]:
                return _Cutoff(2 ** (bucket / 8), 2 ** ((bucket + 1) / 8), inodes)
            inodes -= self._counts[bucket]
        return _Cutoff(0.0, 0.0, 0)

    def _bucket(self, age: float) -> int:
        return int(8 * math.log2(max(age, 1.0)))


@define
class _Cutoff:
    """Everything that is at least `max_age` seconds old goes, and `rest` inodes of what is at least `min_age` old."""

    min_age: float
    max_age: float
    rest: int

    def includes(self, age: float) -> bool:
        return age >= _MIN_AGE and (age >= self.max_age or (age >= self.min_age and self.rest > 0))

    def count(self, age: float, inodes: int) -> None:
        """Count what was removed."""
        if age < self.max_age:
            self.rest -= inodes


class Janitor:
    """The janitor of the cache in `layout` and `records`. `clock` returns POSIX time."""

    def __init__(self, layout: Layout, records: Records, clock: Callable[[], float]) -> None:
        self._layout = layout
        self._records = records
        self._clock = clock
        self._blobs = Blobs(layout, durable=False)
        self._links = Links(layout, durable=False)
        self.inodes = 0
        """The files and directories that links and records took at the end of the last `clean`."""

    def clean(self, max_inodes: int) -> Iterator[None]:
        """Remove what nothing needs, and then the least recently used until at most `max_inodes` are left.

        Each step blocks briefly.
        """
        ages, counted, now = _Ages(), 0, self._clock()
        for item in self._items(now):
            if isinstance(item, int):
                counted += max(item, 0)
            elif item.age < GRACE or item.is_needed() or not item.discard():
                counted += item.inodes
                if item.evict is not None:
                    ages.add(item.age, item.inodes)
            yield None
        if counted > max_inodes:
            excess = counted - int(max_inodes * _LOW_WATERMARK)
            counted -= yield from self._evict(ages.cutoff(excess), now)
        self.inodes = counted

    def _evict(self, cutoff: _Cutoff, now: float) -> Generator[None, None, int]:
        """Remove the items that `cutoff` includes. Return the number of inodes that are freed."""
        removed = 0
        for item in self._items(now):
            if isinstance(item, int):
                freed, age = -min(item, 0), 0.0
            else:
                age = item.age
                freed = item.inodes if item.evict is not None and cutoff.includes(age) and item.evict() else 0
            cutoff.count(age, freed)
            removed += freed
            yield None
        return removed

    def _items(self, now: float) -> Iterator[_Item | int]:
        """Yield all links, tags and records, and the numbers of other inodes, negative if they were freed."""
        # "." makes it yield directories of which nothing is left as well.
        for repository in iter_repositories(self._layout, "."):
            had_links = self._has_links(repository)
            yield from self._links_of(repository, now)
            for _ in self._links.prune(repository):
                yield 0
            if self._has_links(repository):
                yield _REPOSITORY_INODES
            else:
                yield -_REPOSITORY_INODES if had_links else 1
        # Denials come last, because a denial without a grant says nothing.
        for kind in sorted(self._records.kinds(), key=lambda kind: (kind == DENIAL, kind)):
            directory = ""
            for entry in self._records.walk(kind):
                if os.path.dirname(entry.path) != directory:
                    yield 1 if directory else 2  # that of the kind as well
                    directory = os.path.dirname(entry.path)
                yield self._record(entry, now)

    # links

    def _links_of(self, repository: str, now: float) -> Iterator[_Item | int]:
        for entry in self._links.layer_entries(repository):
            yield self._link(entry, _LAYER_INODES, now, partial(self._is_present, entry.digest))
        for entry in self._links.manifest_entries(repository):
            yield self._link(entry, _MANIFEST_INODES, now, partial(self._is_present, entry.digest))
        for entry in self._links.tag_entries(repository):
            yield self._link(entry, _TAG_INODES, now, partial(self._has_manifest, repository, entry.digest))
        for _ in self._links.prune_tag_index(repository, _Unlinked(self._links, repository)):
            yield _TAG_INDEX_INODES

    def _link(self, entry: LinkEntry, inodes: int, now: float, is_needed: Callable[[], bool]) -> _Item:
        return _Item(
            inodes,
            abs(now - entry.last_used),
            is_needed,
            discard=partial(self._links.discard, entry, is_needed),
            evict=partial(self._links.discard, entry, _no),
        )

    def _is_present(self, digest: Digest | None) -> bool:
        # The download becomes the blob, so look for the download first.
        return digest is not None and (bool(ingests_of(self._layout, digest)) or self._blobs.exists(digest))

    def _has_manifest(self, repository: str, digest: Digest | None) -> bool:
        return digest is not None and self._links.has_manifest(repository, digest)

    # records

    def _record(self, entry: RecordEntry, now: float) -> _Item:
        age = abs(now - entry.mtime_ns / 1e9)
        is_needed, can_be_evicted = self._record_rule(entry, age)
        discard = partial(self._records.discard, entry)
        return _Item(1, age, is_needed, discard, discard if can_be_evicted else None)

    def _record_rule(self, entry: RecordEntry, age: float) -> tuple[Callable[[], bool], bool]:
        """Return what tells whether a record is needed, and whether it may be evicted even if it is."""
        kind, *names = entry.key
        match kind, *names:
            case "tag", repository, _:
                return partial(self._has_tag, repository, entry), True
            case "grant", _, identity if identity.startswith("own:") and age >= STALE_GRANT_TTL:
                return _no, True
            case "grant", repository, _:
                return partial(self._has_links, repository), True
            case "denial", *_:
                return partial(self._has_grant, names), False
            case "client", *_:
                return (lambda: age < STALE_GRANT_TTL), True
            case "flight", *_, digest:
                return partial(self._is_downloaded, digest), False
            case "challenge", *_:
                return _yes, False
        return (lambda: age < _UNKNOWN_TTL), True

    def _has_links(self, repository: str) -> bool:
        try:
            return self._links.has_repository(repository)
        except NameInvalid:
            return False

    def _has_tag(self, repository: str, entry: RecordEntry) -> bool:
        """Return whether the manifest of one of the entries is in the cache."""
        values = (self._records.read(entry) or {}).values()
        for digest in {value.get("digest") for value in values if isinstance(value, dict)}:
            try:
                parsed = Digest.parse(str(digest))
                if self._links.has_manifest(repository, parsed) and self._blobs.exists(parsed):
                    return True
            except (DigestInvalid, NameInvalid):
                continue
        return False

    def _has_grant(self, names: list[str]) -> bool:
        return self._records.exists(GRANT, *names)

    def _is_downloaded(self, digest: str) -> bool:
        try:
            return bool(ingests_of(self._layout, Digest.parse(digest)))
        except DigestInvalid:
            return False


@frozen
class _Unlinked:
    """The manifests that a repository has no link to."""

    _links: Links
    _repository: str

    def __contains__(self, digest: object) -> bool:
        return not self._links.has_manifest(self._repository, Digest.parse(str(digest)))


def _yes() -> bool:
    return True


def _no() -> bool:
    return False
