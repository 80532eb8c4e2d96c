"""A summary of all repositories in the memory of the main process, for lists that must not walk a store.

It is renewed in the background. Directories whose times are unchanged are not read again, apart from the last use of
their manifests; a whole repository is read again once an hour, because evictions change nothing there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from attrs import define, evolve, frozen
from twisted.logger import Logger

from dockerproxy.admin.inventory import DiskUsage
from dockerproxy.admin.repository_view import RepositoryView
from dockerproxy.admin.resolver import CACHED, HOSTED, StoreView
from dockerproxy.admin.viewer import Viewer
from dockerproxy.cache.access import DENIAL, public_may_read
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import BadRequest, NameInvalid, RegistryError
from dockerproxy.oci.docker_hub import stored_name
from dockerproxy.oci.names import Digest
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.daily_pulls import PullSums
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.records import Records

MAX_REPOSITORIES = 200_000
"""Repositories that the summary has room for, with half a KiB each. Further ones are not listed."""

_READ_AGAIN = 3600.0  # seconds after which a repository is read again though its directories are unchanged
_READ_MIXED_AGAIN = 60.0  # the same for one with private content: that may have become public
_MAX_EXAMINED = 40  # tagged manifests of a repository that are read for their platforms
_MAX_SHOWN_PLATFORMS = 16  # of one row
_STEPS_AT_ONCE = 50  # of a walk of a disk that may hang
_MAX_QUERY = 1000  # characters
_MAX_WORDS = 20
_MAX_PAGE = 1_000_000

SORT_KEYS = ("name", "size", "used", "pulls")

log = Logger()

Signature = tuple[int, ...]


@frozen
class Figures:
    """The figures of a repository, or of a part of it.

    `size` are the bytes of its contents that are here, each counted once. `last_used` is a POSIX time, None if nothing
    of it is here.
    """

    tags: int = 0
    manifests: int = 0
    size: int = 0
    platforms: tuple[str, ...] = ()
    last_used: float | None = None


@define(eq=False)
class RepositorySummary:
    """A repository. `where` is ``hosted`` or ``cached``, `key` its name in that store, and `name` as people write it.

    It `is_public` if the public may read it upstream. Some of its content may be private all the same:
    `public_figures` are those of the rest, the same object as `figures` if that is all.
    """

    where: str
    key: str
    name: str
    figures: Figures = Figures()
    public_figures: Figures = Figures()
    is_public: bool = False
    signature: Signature = ()
    read_at: float = 0.0

    def seen_by(self, viewer: Viewer) -> Figures:
        """Return the figures of what `viewer` may see."""
        return self.figures if viewer.is_admin else self.public_figures


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
        sort = parse_choice(arguments, "sort", SORT_KEYS, "used")
        order = parse_choice(arguments, "order", ("asc", "desc"), "asc" if sort == "name" else "desc")
        where = parse_choice(arguments, "where", ("", HOSTED, CACHED, "pinned"), "")
        page, per_page = parse_number(arguments, "page", 1, _MAX_PAGE), parse_number(arguments, "per_page", 50, 100)
        return cls(words, where, sort, order == "desc", page, per_page)


@frozen
class ShownRepository:
    """A repository as a viewer may see it. `pulls` are those of the last 30 days, None if they are not counted.

    It `is_pinned` if something of it is that the viewer may see.
    """

    row: RepositorySummary
    figures: Figures
    pulls: int | None
    is_pinned: bool


@frozen
class SummaryPage:
    """A page of a search: its rows, and how many repositories and bytes all pages have."""

    rows: list[ShownRepository]
    count: int
    size: int


def parse_choice(arguments: Mapping[str, str], name: str, choices: Sequence[str], default: str) -> str:
    """Return the argument `name`, one of `choices`. Raise `BadRequest`."""
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
        self._snapshot = store  # that of the walk
        self._records = records
        self._clock = clock

    def renew(
        self, known: Mapping[str, RepositorySummary], found: dict[str, RepositorySummary], room: int
    ) -> Iterator[None]:
        """Put at most `room` repositories into `found`, by key. Reuse what is `known`. Each step blocks briefly."""
        self._snapshot = self.store.snapshot()
        for key in self._snapshot.links.repositories():
            if len(found) >= room:
                log.warn("the list of repositories has room for {count}; others are not in it", count=MAX_REPOSITORIES)
                return
            row = known.get(key)
            is_public = self.store.kind == CACHED and public_may_read(self._records, key)
            signature = (is_public, *self._signature(key))
            if row is None or row.signature != signature or not 0 <= self._clock() - row.read_at < _lifetime(row):
                row = RepositorySummary(self.store.kind, key, self.store.shown(key))
                yield from self._read(row, is_public=is_public)
                row.signature, row.read_at = signature, self._clock()
            elif self._snapshot.reader.records_use:
                self._renew_times(row)
            # The cache keeps links to blobs that have left, and the hosted store empty directories.
            figures = row.figures
            if figures.size or (self.store.kind == HOSTED and (figures.tags or figures.manifests)):
                row.is_public = is_public
                found[key] = row
            yield None

    def _read(self, row: RepositorySummary, *, is_public: bool) -> Iterator[None]:
        everything = self._view(row, sees_all=True)
        row.figures = yield from self._figures(everything)
        if self.store.kind == HOSTED or (is_public and not (yield from self._has_private(row.key))):
            row.public_figures = row.figures
        elif is_public:
            row.public_figures = yield from self._figures(self._view(row, sees_all=False))

    def _view(self, row: RepositorySummary, *, sees_all: bool) -> RepositoryView:
        return RepositoryView(self._snapshot, row.key, self._records, sees_all)

    def _has_private(self, key: str) -> Generator[None, None, bool]:
        """Return whether anything of a cached repository is private: a manifest, a blob, or the name of a tag."""
        links, public = self._snapshot.links, RepositoryView(self._snapshot, key, self._records, sees_all=False)
        found: tuple[Iterator[bool], ...] = (
            (not public.sees_manifest(digest) for digest in links.manifests(key)),
            (not public.sees_layer(digest) for digest in links.layers(key)),
            (digest is not None and not public.sees_tag(tag, digest) for tag, digest in links.iter_tags(key)),
        )
        for number, is_private in enumerate(chain.from_iterable(found)):
            if is_private:
                return True
            if not number % 20:
                yield None
        return False

    def _figures(self, view: RepositoryView) -> Generator[None, None, Figures]:
        links, key, tags = view.store.links, view.key, 0
        usage = DiskUsage(view.store)
        for digest in self._seen_manifests(view):
            usage.add([digest])
            yield None
        manifests, last_used = len(usage.sizes), usage.last_used
        tagged: dict[Digest, None] = {}
        for number, (tag, tagged_digest) in enumerate(links.iter_tags(key)):
            if view.sees_all or (tagged_digest is not None and view.sees_tag(tag, tagged_digest)):
                tags += 1
                if tagged_digest is not None and tagged_digest in usage.sizes:
                    tagged[tagged_digest] = None
            if not number % 20:
                yield None
        platforms: set[str] = set()
        for digest in islice(tagged, _MAX_EXAMINED):
            platforms.update(view.platforms(digest))
            yield None
        for number, digest in enumerate(links.layers(key)):
            if view.sees_all or view.sees_layer(digest):
                usage.add([digest])
            if not number % 20:
                yield None
        shown = tuple(sorted(platforms))[:_MAX_SHOWN_PLATFORMS]
        return Figures(tags, manifests, sum(usage.sizes.values()), shown, last_used or usage.last_used)

    def _seen_manifests(self, view: RepositoryView) -> Iterator[Digest]:
        manifests = view.store.links.manifests(view.key)
        return manifests if view.sees_all else filter(view.sees_manifest, manifests)

    def _renew_times(self, row: RepositorySummary) -> None:
        old, is_all_public = row.figures, row.public_figures is row.figures
        row.figures = self._with_last_use(old, self._view(row, sees_all=True))
        if is_all_public:
            row.public_figures = row.figures
        elif row.public_figures.size:
            row.public_figures = self._with_last_use(row.public_figures, self._view(row, sees_all=False))

    def _with_last_use(self, figures: Figures, view: RepositoryView) -> Figures:
        usage = DiskUsage(view.store)
        usage.add(islice(self._seen_manifests(view), _MAX_EXAMINED))
        if usage.last_used in (None, figures.last_used):
            return figures
        return evolve(figures, last_used=usage.last_used)

    def _signature(self, key: str) -> Signature:
        layout = self.store.layout
        paths = (layout.tags(key), f"{layout.revisions(key)}/sha256", f"{layout.layers(key)}/sha256")
        return tuple(map(self._snapshot.reader.change_time, paths))


def _lifetime(row: RepositorySummary) -> float:
    """Return the seconds after which a repository is read again."""
    return _READ_AGAIN if row.public_figures is row.figures or not row.is_public else _READ_MIXED_AGAIN


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

    `disk` accesses the hosted store, which may be on a file system that hangs: it delays only its own part.
    `load_pulls` returns the pulls of the last 30 days, and blocks. `pinned` returns the tags and digests of a cached
    repository that are pinned, given its key.
    """

    def __init__(
        self,
        reactor: Any,
        stores: Sequence[StoreView],
        disk: DiskAccess,
        records: Records,
        load_pulls: Callable[[], PullSums],
        pinned: Callable[[str], Collection[str]],
        clock: Callable[[], float] = time.time,
        thread: CooperativeThread | None = None,
    ) -> None:
        self._reactor = reactor
        self._readers = [RepositoryReader(store, records, clock) for store in stores]
        self._disk = disk
        self._records = records
        self._thread = thread or CooperativeThread(reactor)
        self._rows: dict[str, dict[str, RepositorySummary]] = {store.kind: {} for store in stores}
        self._sorted: dict[tuple[str, bool], list[RepositorySummary]] = {}  # ascending; by key, for administrators
        self._by_file_name: dict[str, RepositorySummary] = {}  # those of the cache, as `Records.changes` names them
        self._denials: dict[str, int] = {}  # as of the last look at them
        self._running: set[str] = set()
        self._renewed: set[str] = set()  # the stores that were read once
        self._is_in_hosted_store = False  # whether a thread is; it may hang, and another one would do so, too
        self._pulls = PullSums()
        self._load_pulls = load_pulls
        self._pinned = pinned

    @property
    def is_complete(self) -> bool:
        """Whether both stores have been read once."""
        return len(self._renewed) == len(self._readers)

    def stop(self) -> None:
        """End the walk after its current step, because the daemon stops."""
        self._thread.stop()

    async def renew(self, *, somebody_looks: bool = True) -> None:
        """Read the changes. Do nothing for a store that is being read already.

        Unless `somebody_looks`, a bucket is read only once, because its store may charge for requests.
        """
        for reader in self._readers:
            kind = reader.store.kind
            if kind in self._running or (kind == HOSTED and self._is_in_hosted_store):
                continue
            if not somebody_looks and kind in self._renewed and not reader.store.reader.records_use:
                continue
            self._running.add(kind)
            denials = await in_thread(self._reactor, self._records.changes, DENIAL)
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
                if kind == CACHED:
                    self._by_file_name = await in_thread(self._reactor, _by_file_name, found)
                    self._denials = denials  # later ones may have missed the walk
                self._renewed.add(kind)
                self._sorted = {}
            except (RegistryError, OSError) as error:
                log.warn("the list of {kind} repositories is old: {reason}", kind=kind, reason=str(error))
            finally:
                self._running.remove(kind)
        self._pulls = await in_thread(self._reactor, self._load_pulls)
        self._sorted = {}

    def _run_some(self, steps: Iterator[None]) -> bool:
        """Do some steps in the hosted store. Return whether there may be more. Blocks."""
        self._is_in_hosted_store = True
        try:
            return sum(1 for _ in islice(steps, _STEPS_AT_ONCE)) == _STEPS_AT_ONCE
        finally:
            self._is_in_hosted_store = False

    def _count_pulls(self, row: RepositorySummary, *, sees_all: bool) -> int | None:
        if not self._pulls.total:
            return None
        if row.where == HOSTED:
            return self._pulls.total.get(f"{HOSTED}/{row.name}", 0)
        return (self._pulls.total if sees_all else self._pulls.public).get(row.name, 0)

    def _is_pinned(self, viewer: Viewer, row: RepositorySummary) -> bool:
        names = self._pinned(row.key) if row.where == CACHED else ()
        if viewer.is_admin or not names:
            return bool(names)
        store = next(reader.store for reader in self._readers if reader.store.kind == CACHED)
        view = RepositoryView.of(viewer, store, row.key, self._records)
        return any(map(view.sees_reference, names))

    async def search(self, viewer: Viewer, query: SummaryQuery) -> SummaryPage:
        """Return a page of the repositories that the viewer may see."""
        return await in_thread(self._reactor, self._search, viewer, query)

    async def find(self, viewer: Viewer, name: str, where: str = "") -> ShownRepository | None:
        """Return the repository that is called `name`, or None if the viewer may not see it or it does not exist."""
        return await in_thread(self._reactor, self._find, viewer, name, where)

    async def totals(self, viewer: Viewer) -> SummaryPage:
        """Return how many repositories the viewer may see, and their bytes."""
        return await self.search(viewer, SummaryQuery(per_page=1))

    def _find(self, viewer: Viewer, name: str, where: str) -> ShownRepository | None:
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
                if self._is_visible(viewer, row):
                    return self._show(viewer, row)
        return None

    def _is_visible(self, viewer: Viewer, row: RepositorySummary) -> bool:
        """Return whether `viewer` may see the repository, and something of it."""
        if row.where == CACHED and not viewer.is_admin:
            return row.is_public and row.public_figures.size > 0
        return viewer.may_see(row.where, is_public=row.is_public)

    def _search(self, viewer: Viewer, query: SummaryQuery) -> SummaryPage:
        if not viewer.is_admin:
            self._look_up_denied()
        rows = [
            row
            for row in self._in_order(query.sort, sees_all=viewer.is_admin)
            if self._is_visible(viewer, row)
            and all(word in row.name.lower() for word in query.words)
            and self._is_of(viewer, row, query.where)
        ]
        if query.descending:
            rows.reverse()
        start = (query.page - 1) * query.per_page
        shown = [self._show(viewer, row) for row in rows[start : start + query.per_page] if self._may_see(viewer, row)]
        return SummaryPage(shown, len(rows), sum(row.seen_by(viewer).size for row in rows))

    def _show(self, viewer: Viewer, row: RepositorySummary) -> ShownRepository:
        pulls = self._count_pulls(row, sees_all=viewer.is_admin)
        return ShownRepository(row, row.seen_by(viewer), pulls, self._is_pinned(viewer, row))

    def _may_see(self, viewer: Viewer, row: RepositorySummary) -> bool:
        """Return whether `viewer` may see the repository by the records of this moment."""
        if row.where == CACHED and not viewer.is_admin:
            row.is_public = public_may_read(self._records, row.key)
        return self._is_visible(viewer, row)

    def _look_up_denied(self) -> None:
        """Look up the repositories that somebody was denied since the last walk, or since this was called before.

        Otherwise the numbers of a search would include repositories that have become private.
        """
        changes = self._records.changes(DENIAL)
        for name, changed in changes.items():
            row = self._by_file_name.get(name)
            if row is not None and row.is_public and self._denials.get(name) != changed:
                row.is_public = public_may_read(self._records, row.key)
        self._denials = changes

    def _is_of(self, viewer: Viewer, row: RepositorySummary, where: str) -> bool:
        return where in ("", row.where) or (where == "pinned" and self._is_pinned(viewer, row))

    def _in_order(self, sort: str, *, sees_all: bool) -> Collection[RepositorySummary]:
        in_order = self._sorted  # `renew` replaces it
        rows = in_order.get((sort, sees_all))
        if rows is None:
            all_rows = (row for by_key in list(self._rows.values()) for row in by_key.values())
            rows = in_order[sort, sees_all] = sorted(all_rows, key=self._key(sort, sees_all=sees_all))
        return rows

    def _key(self, sort: str, *, sees_all: bool) -> Callable[[RepositorySummary], Any]:
        def figures(row: RepositorySummary) -> Figures:
            return row.figures if sees_all else row.public_figures

        match sort:
            case "size":
                return lambda row: (figures(row).size, row.name)
            case "used":
                return lambda row: (figures(row).last_used or 0.0, row.name)
            case "pulls":
                return lambda row: (self._count_pulls(row, sees_all=sees_all) or 0, row.name)
        return lambda row: (row.name, row.where)


def _by_file_name(rows: Mapping[str, RepositorySummary]) -> dict[str, RepositorySummary]:
    return {Records.file_name(key): row for key, row in rows.items()}
