"""Removes links and records that nothing needs any more, and the oldest ones if there are too many.

Eviction deletes blobs. The links to them, and the records about them, lose their use but stay, and a client can cause
any number of them. Losing a link or record costs a request to upstream, never a wrong response.

If there are too many, those of the registries that have most go, so that no registry displaces those of others.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial

from attrs import define, evolve, field, frozen

from dockerproxy.cache.access import DENIAL, GRANT, STALE_GRANT_TTL
from dockerproxy.cache.companions import companion_base
from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import ingests_of
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import LinkEntry, Links, iter_repositories
from dockerproxy.store.records import RecordEntry, Records
from dockerproxy.store.tombstones import Tombstones

IsPinned = Callable[[str, str | None], bool]
"""Returns whether a tag or digest of a repository, or anything of it, is pinned; see `Pins`."""

GRACE = 3600.0
"""Seconds for which links and records stay after their last use, even if nothing needs them. The blob of a link may be
on its way."""

LINK_MIN_AGE = 60.0
"""Seconds for which they stay even if there are too many, unless the disk runs out of inodes."""

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
    """A link, tag or record that takes `inodes` files and directories. `owner` is the host of its registry.

    `is_needed` tells whether something that is in the cache needs it. `discard` removes it, unless that has become
    true. `evict` removes it in any case; it is None if the item has to stay. Both return whether it is removed.
    """

    inodes: int
    owner: str
    age: float
    is_needed: Callable[[], bool]
    discard: Callable[[], bool]
    evict: Callable[[], bool] | None


@frozen
class _Directories:
    """The `inodes` directories around links or records of `owner`; negative if they were freed.

    They stay until the youngest of these, which has this `age`, goes. 0 is for those whose age is not known.
    """

    inodes: int
    owner: str
    age: float = 0.0


@define
class _Ages:
    """How many inodes have which age. Ages are rounded down by at most 9 %, so that a few hundred counters suffice."""

    total: int = field(default=0, init=False)
    _counts: Counter[int] = field(factory=Counter, init=False)

    def add(self, age: float, inodes: int) -> None:
        self.total += inodes
        self._counts[self._bucket(age)] += inodes

    def cutoff(self, inodes: int) -> _Cutoff:
        """Return what to remove so that the oldest `inodes` inodes go, or all if there are fewer."""
        for bucket in sorted(self._counts, reverse=True):
            if inodes <= self._counts[bucket]:
                return _Cutoff(2 ** (bucket / 8) if bucket else 0.0, 2 ** ((bucket + 1) / 8), inodes)
            inodes -= self._counts[bucket]
        return _Cutoff(0.0, 0.0, 0)

    def _bucket(self, age: float) -> int:
        return int(8 * math.log2(max(age, 1.0)))


@define
class _Cutoff:
    """All that is at least `max_age` seconds old goes, and `rest` inodes of what is at least `min_age` old."""

    min_age: float
    max_age: float
    rest: int

    def includes(self, age: float) -> bool:
        return age >= self.max_age or (age >= self.min_age and self.rest > 0)

    def count(self, age: float, inodes: int) -> None:
        """Count what was removed."""
        if age < self.max_age:
            self.rest -= inodes


def divide_excess(counts: Mapping[str, int], excess: int) -> dict[str, int]:
    """Return how many each of the owners of `counts` loses if all lose `excess` together.

    Those that have most lose first, until they have as many as the next.
    """
    losses: dict[str, int] = {}
    ordered = sorted(counts, key=lambda owner: counts[owner])
    kept = max(0, sum(counts.values()) - excess)
    for position, owner in enumerate(ordered):
        share = min(counts[owner], kept // (len(ordered) - position))
        kept -= share
        if share < counts[owner]:
            losses[owner] = counts[owner] - share
    return losses


class Janitor:
    """The janitor of the cache in `layout` and `records`. `clock` returns POSIX time.

    `tombstones` get the links to layers and manifests that it removes because their blob is gone. Those that
    `is_pinned` names are not evicted.
    """

    def __init__(
        self,
        layout: Layout,
        records: Records,
        clock: Callable[[], float],
        tombstones: Tombstones | None = None,
        is_pinned: IsPinned | None = None,
    ) -> None:
        self._layout = layout
        self._records = records
        self._clock = clock
        self._tombstones = tombstones or Tombstones()
        self._is_pinned = is_pinned or _is_never_pinned
        self._blobs = Blobs(layout, durable=False)
        self._links = Links(layout, durable=False)
        self.inodes = 0
        """The files and directories that links and records took at the end of the last `clean`."""

    def clean(self, max_inodes: int, min_age: float = LINK_MIN_AGE) -> Iterator[None]:
        """Remove all that nothing needs, and then the least recently used until at most `max_inodes` are left.

        Keep those that were used in the last `min_age` seconds. Each step blocks briefly.
        """
        ages: defaultdict[str, _Ages] = defaultdict(_Ages)  # by owner
        counted, now = 0, self._clock()
        for item in self._items(now):
            if isinstance(item, _Directories):
                counted += max(item.inodes, 0)
                ages[item.owner].add(item.age, max(item.inodes, 0))
            elif item.age < GRACE or item.is_needed() or not item.discard():
                counted += item.inodes
                if item.evict is not None:
                    ages[item.owner].add(item.age, item.inodes)
            yield None
        if counted > max_inodes:
            excess = counted - int(max_inodes * _LOW_WATERMARK)
            excesses = divide_excess({owner: of_owner.total for owner, of_owner in ages.items()}, excess)
            cutoffs = {owner: ages[owner].cutoff(inodes) for owner, inodes in excesses.items()}
            counted -= yield from self._evict(cutoffs, now, min_age)
        self.inodes = counted

    def _evict(self, cutoffs: Mapping[str, _Cutoff], now: float, min_age: float) -> Generator[None, None, int]:
        """Remove the items that the cutoff of their owner includes. Return the number of inodes that are freed."""
        removed = 0
        for item in self._items(now):
            cutoff, freed = cutoffs.get(item.owner), 0
            if isinstance(item, _Directories):
                freed = -min(item.inodes, 0)
            elif cutoff is not None and item.evict is not None and item.age >= min_age and cutoff.includes(item.age):
                freed = item.inodes if item.evict() else 0
            if cutoff is not None:
                cutoff.count(item.age, freed)
            removed += freed
            yield None
        return removed

    def _items(self, now: float) -> Iterator[_Item | _Directories]:
        """Yield all links, tags and records, and the directories around them."""
        # "." makes it yield directories of which nothing is left as well.
        for repository in iter_repositories(self._layout, "."):
            had_links, age, owner = self._has_links(repository), math.inf, _host(repository)
            for item in self._links_of(repository, now):
                age = min(age, item.age) if isinstance(item, _Item) else age
                yield item
            for _ in self._links.prune(repository):
                yield _Directories(0, owner)
            if self._has_links(repository):
                yield _Directories(_REPOSITORY_INODES, owner, 0.0 if age == math.inf else age)
            else:
                yield _Directories(-_REPOSITORY_INODES if had_links else 1, owner)
        # Denials come last, because a denial without a grant says nothing.
        for kind in sorted(self._records.kinds(), key=lambda kind: (kind == DENIAL, kind)):
            directory = ""
            for entry in self._records.walk(kind):
                item = self._record(entry, now)
                if os.path.dirname(entry.path) != directory:
                    yield _Directories(1 if directory else 2, item.owner, item.age)  # that of the kind as well
                    directory = os.path.dirname(entry.path)
                yield item

    # links

    def _links_of(self, repository: str, now: float) -> Iterator[_Item | _Directories]:
        for entry in self._links.layer_entries(repository):
            yield self._content_link(repository, entry, _LAYER_INODES, now)
        for entry in self._links.manifest_entries(repository):
            yield self._content_link(repository, entry, _MANIFEST_INODES, now)
        for entry in self._links.tag_entries(repository):
            yield self._link(repository, entry, _TAG_INODES, now, partial(self._has_manifest, repository, entry.digest))
        for _ in self._links.prune_tag_index(repository, _Unlinked(self._links, repository)):
            yield _Directories(_TAG_INDEX_INODES, _host(repository))

    def _content_link(self, repository: str, entry: LinkEntry, inodes: int, now: float) -> _Item:
        item = self._link(repository, entry, inodes, now, partial(self._is_present, entry.digest))

        def discard() -> bool:
            is_removed = item.discard()
            if is_removed and entry.digest is not None:
                self._tombstones.note_unlinked(repository, entry.digest)
            return is_removed

        return evolve(item, discard=discard)

    def _link(self, repository: str, entry: LinkEntry, inodes: int, now: float, is_needed: Callable[[], bool]) -> _Item:
        return _Item(
            inodes,
            _host(repository),
            abs(now - entry.last_used),
            is_needed,
            discard=partial(self._links.discard, entry, is_needed),
            evict=None if self._keeps(repository, entry) else partial(self._links.discard, entry, _no),
        )

    def _keeps(self, repository: str, entry: LinkEntry) -> bool:
        return entry.digest is not None and self._is_pinned(repository, str(entry.digest))

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
        name = entry.key[1] if len(entry.key) > 1 else ""
        owner = "" if name.startswith("~") else _host(name)  # a hash stands for a long name
        return _Item(1, owner, age, is_needed, discard, discard if can_be_evicted else None)

    def _record_rule(self, entry: RecordEntry, age: float) -> tuple[Callable[[], bool], bool]:
        """Return what tells whether a record is needed, and whether it may be evicted even if it is."""
        kind, *names = entry.key
        match kind, *names:
            case "tag", repository, tag:
                return partial(self._has_tag, repository, entry), not self._is_pinned(repository, tag)
            case "absence", repository, tag:
                return partial(self._has_companions, repository, str(companion_base(tag))), True
            case "referrers", repository, digest:
                return partial(self._has_companions, repository, digest), True
            case "grant", _, identity if identity.startswith("own:") and age >= STALE_GRANT_TTL:
                return _no, True
            case "grant", repository, identity:
                is_kept = self._is_pinned(repository, None) and not identity.startswith("own:")
                return partial(self._has_links, repository), not is_kept
            case "denial", *_:
                return partial(self._has_grant, names), False
            case "client", *_:
                return (lambda: age < STALE_GRANT_TTL), True
            case "flight", *_, digest:
                return partial(self._is_downloaded, digest), False
            case "challenge" | "maintenance", *_:
                return _yes, False
        return (lambda: age < _UNKNOWN_TTL), True

    def _has_companions(self, repository: str, digest: str) -> bool:
        """Return whether the repository has the manifest to which signatures and other referrers belong."""
        try:
            return self._has_manifest(repository, Digest.parse(digest))
        except (DigestInvalid, NameInvalid):
            return False

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


def _host(repository: str) -> str:
    return repository.partition("/")[0]


def _is_never_pinned(repository: str, name: str | None) -> bool:
    return False


def _yes() -> bool:
    return True


def _no() -> bool:
    return False
