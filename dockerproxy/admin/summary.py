"""A summary of all repositories in the memory of the main process, for lists that must not walk a store.

It is renewed in the background. Directories whose times are unchanged are not read again, apart from the last use of
their manifests; a whole repository is read again once an hour, because evictions change nothing there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from attrs import define, frozen
from twisted.logger import Logger

from dockerproxy.admin.images import present_platforms
from dockerproxy.admin.inventory import DiskUsage
from dockerproxy.admin.resolver import CACHED, HOSTED, StoreView
from dockerproxy.admin.viewer import Viewer
from dockerproxy.cache.access import public_may_read
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import BadRequest, NameInvalid, RegistryError
from dockerproxy.oci.docker_hub import stored_name
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.records import Records

MAX_REPOSITORIES = 200_000
"""Repositories that the summary has room for, with half a KiB each. Further ones are not listed."""

_READ_AGAIN = 3600.0  # seconds after which a repository is read again though its directories are unchanged
_MAX_EXAMINED = 40  # tagged manifests of a repository that are read for their platforms
_MAX_SHOWN_PLATFORMS = 16  # of one row
_STEPS_AT_ONCE = 50  # of a walk of a disk that may hang
_MAX_QUERY = 1000  # characters
_MAX_WORDS = 20
_MAX_PAGE = 1_000_000

SORT_KEYS = ("name", "size", "used", "pulls")

log = Logger()

Signature = tuple[int, ...]


@define(eq=False)
class RepositorySummary:
    """A repository. `where` is ``hosted`` or ``cached``, `key` its name in that store, and `name` as people write it.

    `size` are the bytes of its contents that are here, each counted once. `last_used` is a POSIX time, None if nothing
    of it is here. It `is_public` if the public may read it upstream.
    """

    where: str
    key: str
    name: str
    tags: int = 0
    manifests: int = 0
    size: int = 0
    platforms: tuple[str, ...] = ()
    last_used: float | None = None
    is_public: bool = False
    signature: Signature = ()
    read_at: float = 0.0


@frozen
class SummaryQuery:
    """A search: words that a name must contain, the store, the order, and the page, which begins at 1."""

    words: tuple[str, ...] = ()
    where: str = ""
    sort: str = "used"
    descending: bool = True
    page: int = 1
    per_page: int = 50

    @classmethod
    def parse(cls, arguments: Mapping[str, str]) -> SummaryQuery:
        """Return the query in the arguments of a request. Raise `BadRequest`, whatever they contain."""
        text = arguments.get("q", "")
        if len(text) > _MAX_QUERY or not text.isprintable():
            raise BadRequest(f"the search has {len(text)} characters; it may have {_MAX_QUERY}, all printable")
        words = tuple(dict.fromkeys(text.lower().split()))
        if len(words) > _MAX_WORDS:
            raise BadRequest(f"the search has {len(words)} words; it may have {_MAX_WORDS}")
        sort = _choice(arguments, "sort", SORT_KEYS, "used")
        order = _choice(arguments, "order", ("asc", "desc"), "asc" if sort == "name" else "desc")
        where = _choice(arguments, "where", ("", HOSTED, CACHED, "pinned"), "")
        page, per_page = parse_number(arguments, "page", 1, _MAX_PAGE), parse_number(arguments, "per_page", 50, 100)
        return cls(words, where, sort, order == "desc", page, per_page)


@frozen
class SummaryPage:
    """A page of a search: its rows, and how many repositories and bytes all pages have."""

    rows: list[RepositorySummary]
    count: int
    size: int


def _choice(arguments: Mapping[str, str], name: str, choices: Sequence[str], default: str) -> str:
    value = arguments.get(name, default)
    if value not in choices:
        raise BadRequest(f"the argument {name} is not one of {', '.join(filter(None, choices))}")
    return value


def parse_number(arguments: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    """Return the argument `name`, a number from 1 to `maximum`. Raise `BadRequest`."""
    text = arguments.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= maximum):
        raise BadRequest(f"the argument {name} is not a number from 1 to {maximum}")
    return int(text)


class RepositoryReader:
    """Reads the repositories of `store`. `records` say which of the cache are public; those of others are not asked."""

    def __init__(self, store: StoreView, records: Records, clock: Callable[[], float]) -> None:
        self.store = store
        self._records = records
        self._clock = clock

    def renew(
        self, known: Mapping[str, RepositorySummary], found: dict[str, RepositorySummary], room: int
    ) -> Iterator[None]:
        """Put at most `room` repositories into `found`, by key. Reuse what is `known`. Each step blocks briefly."""
        for key in self.store.links.repositories():
            if len(found) >= room:
                log.warn("the list of repositories has room for {count}; others are not in it", count=MAX_REPOSITORIES)
                return
            row = known.get(key)
            signature = self._signature(key)
            if row is None or row.signature != signature or not 0 <= self._clock() - row.read_at < _READ_AGAIN:
                row = RepositorySummary(self.store.kind, key, self.store.shown(key))
                yield from self._read(row)
                row.signature, row.read_at = signature, self._clock()
            else:
                row.last_used = self._last_used(key) or row.last_used
            # The cache keeps links to blobs that have left, and the hosted store empty directories.
            if row.size or (self.store.kind == HOSTED and (row.tags or row.manifests)):
                row.is_public = self.store.kind == CACHED and public_may_read(self._records, key)
                found[key] = row
            yield None

    def _read(self, row: RepositorySummary) -> Iterator[None]:
        store, key = self.store, row.key
        usage = DiskUsage(store)
        for digest in store.links.manifests(key):
            usage.add([digest])
            yield None
        row.manifests, row.last_used = len(usage.sizes), usage.last_used
        platforms: dict[str, None] = {}
        tagged = {}
        for tag, tagged_digest in store.links.iter_tags(key):
            row.tags += 1
            if tagged_digest in usage.sizes:
                tagged[tagged_digest] = tag
            if not row.tags % 20:
                yield None
        for digest in islice(filter(None, tagged), _MAX_EXAMINED):
            platforms.update(dict.fromkeys(present_platforms(store, key, digest)))
            yield None
        row.platforms = tuple(sorted(platforms))[:_MAX_SHOWN_PLATFORMS]
        for number, digest in enumerate(store.links.layers(key)):
            usage.add([digest])
            if not number % 20:
                yield None
        row.size = sum(usage.sizes.values())
        row.last_used = row.last_used or usage.last_used

    def _last_used(self, key: str) -> float | None:
        usage = DiskUsage(self.store)
        usage.add(islice(self.store.links.manifests(key), _MAX_EXAMINED))
        return usage.last_used

    def _signature(self, key: str) -> Signature:
        layout = self.store.layout
        paths = (layout.tags(key), f"{layout.revisions(key)}/sha256", f"{layout.layers(key)}/sha256")
        return tuple(map(_time_of_change, paths))


def _time_of_change(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _key_of(store: StoreView, name: str) -> str | None:
    """Return the key that the repository `name` has in `store` if it is there; None if no repository has that name."""
    key = name if store.kind == HOSTED else stored_name(name)
    try:
        if key is not None:
            store.layout.repository(key)
    except NameInvalid:
        return None
    return key


class Summaries:
    """The repositories of both stores. `renew` reads them, and everything else is answered from memory.

    `disk` accesses the hosted store, which may be on a file system that hangs: it delays only its own part. `pulls` has
    the pulls of the last 30 days by `name`, and `is_pinned` says whether a cached repository has a pin, given its key.
    """

    def __init__(
        self,
        reactor: Any,
        stores: Sequence[StoreView],
        disk: DiskAccess,
        records: Records,
        clock: Callable[[], float] = time.time,
        thread: CooperativeThread | None = None,
    ) -> None:
        self._reactor = reactor
        self._readers = [RepositoryReader(store, records, clock) for store in stores]
        self._disk = disk
        self._records = records
        self._thread = thread or CooperativeThread(reactor)
        self._rows: dict[str, dict[str, RepositorySummary]] = {store.kind: {} for store in stores}
        self._sorted: dict[str, list[RepositorySummary]] = {}  # by the sort key, ascending
        self._running: set[str] = set()
        self._renewed: set[str] = set()  # the stores that were read once
        self._is_in_hosted_store = False  # whether a thread is; it may hang, and another one would do so, too
        self._pulls: Mapping[str, int] = {}
        self.load_pulls: Callable[[], Mapping[str, int]] = dict
        """Returns the pulls of the last 30 days by name. Blocks."""
        self.is_pinned: Callable[[str], bool] = lambda key: False

    @property
    def is_complete(self) -> bool:
        """Whether both stores have been read once."""
        return len(self._renewed) == len(self._readers)

    def stop(self) -> None:
        """End the walk after its current step, because the daemon stops."""
        self._thread.stop()

    async def renew(self) -> None:
        """Read the changes. Do nothing for a store that is being read already."""
        for reader in self._readers:
            kind = reader.store.kind
            if kind in self._running or (kind == HOSTED and self._is_in_hosted_store):
                continue
            self._running.add(kind)
            try:
                found: dict[str, RepositorySummary] = {}
                others = sum(len(rows) for other, rows in self._rows.items() if other != kind)
                steps = reader.renew(self._rows[kind], found, MAX_REPOSITORIES - others)
                if kind == HOSTED and self._disk.file_system is not None:
                    while await self._disk.read(self._run_some, steps):
                        pass
                else:
                    await self._thread.run(steps)
                self._rows[kind] = found
                self._renewed.add(kind)
                self._sorted = {}
            except (RegistryError, OSError) as error:
                log.warn("the list of {kind} repositories is old: {reason}", kind=kind, reason=str(error))
            finally:
                self._running.remove(kind)
        self._pulls = await in_thread(self._reactor, self.load_pulls)
        self._sorted = {}

    def _run_some(self, steps: Iterator[None]) -> bool:
        """Do some steps in the hosted store. Return whether there may be more. Blocks."""
        self._is_in_hosted_store = True
        try:
            return sum(1 for _ in islice(steps, _STEPS_AT_ONCE)) == _STEPS_AT_ONCE
        finally:
            self._is_in_hosted_store = False

    def pulls(self, row: RepositorySummary) -> int | None:
        """Return the pulls of a repository in the last 30 days; None if they are not counted."""
        name = row.name if row.where == CACHED else f"{HOSTED}/{row.name}"
        return self._pulls.get(name, 0) if self._pulls else None

    async def search(self, viewer: Viewer, query: SummaryQuery) -> SummaryPage:
        """Return a page of the repositories that the viewer may see."""
        return await in_thread(self._reactor, self._search, viewer, query)

    async def find(self, viewer: Viewer, name: str, where: str = "") -> RepositorySummary | None:
        """Return the repository that is called `name`, or None if the viewer may not see it or it does not exist."""
        return await in_thread(self._reactor, self._find, viewer, name, where)

    async def totals(self, viewer: Viewer) -> SummaryPage:
        """Return how many repositories the viewer may see, and their bytes."""
        return await self.search(viewer, SummaryQuery(per_page=1))

    def _find(self, viewer: Viewer, name: str, where: str) -> RepositorySummary | None:
        for reader in self._readers:
            kind = reader.store.kind
            if where not in ("", kind):
                continue
            key = _key_of(reader.store, name)
            if key is None:
                continue
            # Before the look-up: one that exists and is private takes no other time than one that does not exist.
            is_public = kind == CACHED and not viewer.is_admin and public_may_read(self._records, key)
            row = self._rows[kind].get(key)
            if row is not None and name in (row.name, row.key):
                if kind == CACHED and not viewer.is_admin:
                    row.is_public = is_public
                if viewer.may_see(kind, is_public=row.is_public):
                    return row
        return None

    def _search(self, viewer: Viewer, query: SummaryQuery) -> SummaryPage:
        rows = [
            row
            for row in self._in_order(query.sort)
            if viewer.may_see(row.where, is_public=row.is_public)
            and self._is_of(row, query.where)
            and all(word in row.name.lower() for word in query.words)
        ]
        if query.descending:
            rows.reverse()
        start = (query.page - 1) * query.per_page
        # The rows that are shown are looked up: a repository may have become private since the last walk.
        shown = [row for row in rows[start : start + query.per_page] if self._may_see(viewer, row)]
        return SummaryPage(shown, len(rows), sum(row.size for row in rows))

    def _may_see(self, viewer: Viewer, row: RepositorySummary) -> bool:
        if row.where == CACHED and not viewer.is_admin:
            row.is_public = public_may_read(self._records, row.key)
        return viewer.may_see(row.where, is_public=row.is_public)

    def _is_of(self, row: RepositorySummary, where: str) -> bool:
        return where in ("", row.where) or (where == "pinned" and row.where == CACHED and self.is_pinned(row.key))

    def _in_order(self, sort: str) -> Collection[RepositorySummary]:
        in_order = self._sorted  # `renew` replaces it
        rows = in_order.get(sort)
        if rows is None:
            rows = sorted((row for by_key in list(self._rows.values()) for row in by_key.values()), key=self._key(sort))
            in_order[sort] = rows
        return rows

    def _key(self, sort: str) -> Callable[[RepositorySummary], Any]:
        match sort:
            case "size":
                return lambda row: (row.size, row.name)
            case "used":
                return lambda row: (row.last_used or 0.0, row.name)
            case "pulls":
                return lambda row: (self.pulls(row) or 0, row.name)
        return lambda row: (row.name, row.where)
