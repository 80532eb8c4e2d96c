"""The documents of `admin.overview`, made in the main process.

No answer walks a store: repositories are those of the last walk (`admin.summary`), and files are read in threads.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from twisted.logger import Logger

from dockerproxy.admin.images import TAGS_PER_PAGE, ImageReader, parse_digest
from dockerproxy.admin.layer_places import LayerPlaces
from dockerproxy.admin.overview import Document, OverviewSources, error_answer
from dockerproxy.admin.repository_view import RepositoryView
from dockerproxy.admin.resolver import CACHED, HOSTED, StoreView
from dockerproxy.admin.shown_transfers import blob_transfers
from dockerproxy.admin.summary import (
    RepositorySummary,
    ShownRepository,
    Summaries,
    SummaryQuery,
    parse_choice,
    parse_number,
)
from dockerproxy.admin.viewer import Viewer, label_of
from dockerproxy.cache.access import public_may_read
from dockerproxy.cache.board import Board
from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.daemon.history import ALL, RANGES, History, Numbers, Series, Summary
from dockerproxy.daemon.metrics import OTHER, PEER_BYTES, UPSTREAM_UP, Metrics
from dockerproxy.errors import BadRequest, NameUnknown, RegistryError
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.progress import Stopped
from dockerproxy.store.records import Records

_DEFAULT_RANGE = "24h"
_RENEW_INTERVAL = 5.0  # seconds between two walks while somebody looks at the list of repositories
_RENEW_PART = 20  # a walk takes at most one part in so many of the time
_MAX_ANSWER = 160 * 1024  # bytes: a message to another process may have 192 KiB
_MAX_REGISTRIES = 100  # rows of one answer
_MAX_MEMBERS = 100  # those that are down first
_MAX_REASON = 300  # characters

_PUBLIC_LIMIT = frozenset({
    "registry", "limit", "window", "remaining", "seen", "refused_until", "refusals", "reserved", "last_hour", "gone_in",
    "turns",
})  # fmt: skip
"""The fields of a rate limit that everybody may see."""

log = Logger()


class LocalOverview:
    """The documents in the main process. `usage` returns the bytes of the cache and their limit."""

    def __init__(
        self,
        reactor: Any,
        metrics: Metrics,
        board: Board,
        history: History,
        summaries: Summaries,
        stores: Sequence[StoreView],
        records: Records,
        registry_disk: DiskAccess,
        usage: Callable[[], Awaitable[tuple[int, int]]],
        clock: Callable[[], float],
        sources: OverviewSources,
        *,
        version: str,
        started: float,
        workers: int,
    ) -> None:
        self._reactor = reactor
        self._metrics = metrics
        self._board = board
        self._history = history
        self._summaries = summaries
        self._stores = {store.kind: store for store in stores}
        self._records = records
        self._places = LayerPlaces(reactor, self._stores[CACHED], records, reactor.seconds)
        self._registry_disk = registry_disk
        self._usage = usage
        self._clock = clock
        self._about = {"version": version, "started": started, "workers": workers}
        self._next_renewal = 0.0  # in the reactor's time
        self._sources = sources
        self._resources: dict[str, Callable[[Viewer, Mapping[str, str]], Awaitable[Document]]] = {
            "overview": self._overview,
            "registries": self._registries,
            "registry": self._registry,
            "traffic": self._series,
            "transfers": self._transfers,
            "budget": self._budget,
            "images": self._images,
            "image": self._image,
            "manifest": self._manifest,
            "status": self._status,
        }

    async def answer(self, resource: str, viewer_values: Sequence[Any], arguments: Mapping[str, str]) -> Document:
        """Return ``{"document": …}``, or ``{"error": …}``. Never raise."""
        try:
            document = await self.get(resource, Viewer.parse(viewer_values), arguments)
        except RegistryError as error:
            return error_answer(error)
        except Exception:
            log.failure("the overview {resource} failed", resource=resource)
            return error_answer(RegistryError("internal error in the daemon; see its log"))
        answer = {"document": document}
        if len(json.dumps(answer)) > _MAX_ANSWER:
            log.error("the overview {resource} has more than {size} bytes", resource=resource, size=_MAX_ANSWER)
            return error_answer(RegistryError("the answer is too long; ask for a smaller page"))
        return answer

    async def get(self, resource: str, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        """Return a document. Raise `RegistryError`."""
        method = self._resources.get(resource)
        if method is None:
            raise NameUnknown(f"there is no {resource[:100]!r} here; there are {', '.join(self._resources)}")
        return await method(viewer, arguments)

    # traffic

    async def _overview(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        range_name = _range_of(arguments)
        if not self._summaries.is_complete:
            self.renew_soon()
        registries = await self._registries(viewer, arguments)
        summaries = await in_thread(self._reactor, self._history.summaries, range_name)
        total, since = await in_thread(self._reactor, self._history.total)
        used, limit = await self._usage()
        repositories = await self._summaries.totals(viewer)
        budget = await self._budget(viewer, {})
        transfers = await self._transfers(viewer, {})
        return {
            **self._about,
            "now": self._clock(),
            "range": range_name,
            "day": _sums(summaries[ALL].numbers),
            "total": {**_sums(total), "since": since},
            "cache": {"bytes": used, "limit": limit, "idle_age": self._sources.idle_age()},
            "budget": budget.get("limits", []),
            "notices": await self._notices(viewer),
            "transfers": transfers["transfers"],
            "registries": registries["registries"],
            "repositories": {
                "count": repositories.count,
                "bytes": repositories.size,
                "complete": self._summaries.is_complete,
            },
        }

    async def _notices(self, viewer: Viewer) -> list[Document]:
        shown = {*self._metrics.registries, None}
        notices = await self._sources.notices(viewer)
        return [notice for notice in notices if viewer.is_admin or notice["registry"] in shown]

    async def _registries(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        range_name = _range_of(arguments)
        limits = {limit["registry"]: limit for limit in (await self._budget(viewer, {})).get("limits", [])}
        rows = await in_thread(self._reactor, self._registry_rows, range_name, limits)
        return {"range": range_name, "registries": rows, "fleet": self._fleet(viewer)}

    def _fleet(self, viewer: Viewer) -> Document | None:
        """Return the members and their traffic, None without FLEET. Their addresses are for administrators."""
        states = self._sources.fleet()
        if not states:
            return None
        traffic = {sample.labels[0]: int(sample.value) for sample in self._metrics.samples(PEER_BYTES)}
        down = sum(state not in ("me", "up") for state in states.values())
        shown = (
            sorted(states.items(), key=lambda item: item[1] in ("me", "up"))[:_MAX_MEMBERS] if viewer.is_admin else []
        )
        return {
            "up": len(states) - down,
            "down": down,
            "received": traffic["received"],
            "sent": traffic["sent"],
            "members": [{"name": name, "state": state[:_MAX_REASON]} for name, state in shown],
        }

    def _registry_rows(self, range_name: str, limits: Mapping[str, Document]) -> list[Document]:
        summaries, problems = self._history.summaries(range_name), self._sources.problems()
        up = {sample.registry: bool(sample.value) for sample in self._metrics.samples(UPSTREAM_UP)}
        # A configured registry that nobody has used is shown; "other" only if it was.
        shown = [
            name
            for name, summary in summaries.items()
            if name != ALL and not (name == OTHER and summary.numbers.is_empty)
        ]
        shown.sort(key=lambda name: (-summaries[name].numbers.served, name))
        return [
            self._registry_row(name, summaries[name], up.get(name), limits, problems)
            for name in shown[:_MAX_REGISTRIES]
        ]

    def _registry_row(
        self,
        name: str,
        summary: Summary,
        up: bool | None,
        limits: Mapping[str, Document],
        problems: Mapping[str, str],
    ) -> Document:
        numbers = summary.numbers
        problem = problems.get(name, f"{name} does not answer" if up is False else "")
        return {
            "name": name,
            "kind": HOSTED if name == HOSTED else CACHED,
            "up": up,
            **_sums(numbers),
            "p50": numbers.percentile(0.5),
            "p95": numbers.percentile(0.95),
            "budget": limits.get(name),
            "sparkline": list(summary.bars) if not numbers.is_empty else [],
            "problem": problem,
        }

    async def _registry(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        name = arguments.get("name", "")
        rows = (await self._registries(viewer, arguments))["registries"]
        row = next((row for row in rows if row["name"] == name), None)
        if row is None:
            raise NameUnknown(f"{name[:300]!r} is none of the registries here")
        return {"registry": row, "series": await self._series(viewer, {**arguments, "registry": name})}

    async def _series(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        range_name, name = _range_of(arguments), arguments.get("registry", ALL)
        if name != ALL and name not in self._metrics.registries:
            raise NameUnknown(f"{name[:300]!r} is none of the registries here")
        series = await in_thread(self._reactor, self._history.series, range_name, name)
        return {"range": range_name, "registry": name or None, **_series_document(series)}

    async def _transfers(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        transfers = blob_transfers(self._board.rows())
        await self._places.find(blob for transfer in transfers for blob in transfer.blobs)

        places = {blob: self._places.known(blob) for transfer in transfers for blob in transfer.blobs}

        def show() -> list[Document]:
            labels, public = self._metrics.registries, lambda key: public_may_read(self._records, key)
            return [transfer.show(viewer, labels, public, places.__getitem__) for transfer in transfers]

        shown = await in_thread(self._reactor, show) if transfers else []
        return {"transfers": shown, "readers": sum(transfer["readers"] for transfer in shown)}

    async def _budget(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        document = await self._sources.budget()
        if viewer.is_admin:
            return document
        # A wildcard has any number of hosts. Logins, addresses and names of repositories are for administrators.
        limits = [
            {key: value for key, value in limit.items() if key in _PUBLIC_LIMIT}
            for limit in document.get("limits", [])
            if limit["registry"] in self._metrics.registries and not limit.get("login")
        ]
        return {**document, "limits": limits}

    # repositories

    async def _images(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        query = SummaryQuery.parse(arguments)
        self.renew_soon()
        page = await self._summaries.search(viewer, query)
        return {
            "q": arguments.get("q", ""),
            "where": query.where,
            "sort": query.sort,
            "order": "desc" if query.descending else "asc",
            "page": query.page,
            "pages": max(1, -(-page.count // query.per_page)),
            "count": page.count,
            "bytes": page.size,
            "complete": self._summaries.is_complete,
            "images": [self._show_repository(shown) for shown in page.rows],
        }

    def renew_soon(self) -> None:
        """Walk the repositories in the background, unless that was done a moment ago."""
        if self._reactor.seconds() >= self._next_renewal:
            self._next_renewal = self._reactor.seconds() + _RENEW_INTERVAL
            spawn(self.renew(), "reading the list of repositories")

    async def renew(self, *, somebody_looks: bool = True) -> None:
        """Walk the repositories. Return early if the daemon stops."""
        started = self._reactor.seconds()
        try:
            await self._summaries.renew(somebody_looks=somebody_looks)
        except Stopped:
            return
        ended = self._reactor.seconds()
        self._next_renewal = ended + max(_RENEW_INTERVAL, (ended - started) * _RENEW_PART)

    async def _image(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        shown = await self._find(viewer, arguments)
        row = shown.row
        number = parse_number(arguments, "page", 1, 1_000_000)
        page = await self._in_store(row.where, self._reader(viewer, row).tags, number)
        pinned = self._sources.pinned(row.key) if row.where == CACHED else ()
        for tag in page.tags:
            tag["pinned"] = tag["tag"] in pinned
        return {
            "image": self._show_repository(shown),
            "page": number,
            "pages": max(1, -(-page.count // TAGS_PER_PAGE)),
            "count": page.count,
            "tags": page.tags,
        }

    async def _manifest(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        row = (await self._find(viewer, arguments)).row
        digest = parse_digest(arguments.get("digest", ""))
        document: Document = await self._in_store(row.where, self._reader(viewer, row).manifest, digest)
        return document

    def _reader(self, viewer: Viewer, row: RepositorySummary) -> ImageReader:
        return ImageReader(RepositoryView.of(viewer, self._stores[row.where].snapshot(), row.key, self._records))

    async def _find(self, viewer: Viewer, arguments: Mapping[str, str]) -> ShownRepository:
        name, where = arguments.get("name", ""), parse_choice(arguments, "where", ("", HOSTED, CACHED), "")
        shown = await self._summaries.find(viewer, name, where)
        if shown is None:
            # The same for one that the viewer may not see, so that nobody can find out which exist.
            raise NameUnknown(f"there is no repository {name[:300]!r} here, or it is not public")
        return shown

    async def _in_store(self, where: str, function: Callable[..., Any], argument: object) -> Any:
        """Return the result of `function`, which reads a store. The cache does not wait for REGISTRY_DIR."""
        if where == HOSTED and self._registry_disk.file_system is not None:
            return await self._registry_disk.read(function, argument)  # it ends if the file system does not answer
        return await in_thread(self._reactor, function, argument)

    def _show_repository(self, shown: ShownRepository) -> Document:
        row, figures = shown.row, shown.figures
        registry = label_of(row.key, self._metrics.registries) if row.where == CACHED else HOSTED
        return {
            "name": row.name,
            "where": row.where,
            "registry": registry,
            "tags": figures.tags,
            "manifests": figures.manifests,
            "size": figures.size,
            "platforms": list(figures.platforms),
            "last_used": figures.last_used,
            "pulls": shown.pulls,
            "pinned": shown.is_pinned,
            "private": row.where == CACHED and not row.is_public,
        }

    # the daemon

    async def _status(self, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        return await self._sources.status() if viewer.is_admin else self._about


def _range_of(arguments: Mapping[str, str]) -> str:
    name = arguments.get("range", _DEFAULT_RANGE)
    if name not in RANGES:
        raise BadRequest(f"the argument range is not one of {', '.join(RANGES)}")
    return name


def _sums(numbers: Numbers) -> Document:
    saved = max(0, numbers.served - numbers.downloaded)
    return {
        "requests": numbers.requests,
        "served": numbers.served,
        "downloaded": numbers.downloaded,
        "saved": saved,
        "ratio": saved / numbers.served if numbers.served else None,
        "errors": numbers.errors,
        "stale": numbers.stale,
    }


def _series_document(series: Series) -> Document:
    return {
        "step": series.step,
        "start": series.start,
        "served": [numbers.served for numbers in series.bins],
        "downloaded": [numbers.downloaded for numbers in series.bins],
        "cache": [max(0, numbers.served - numbers.downloaded) for numbers in series.bins],
        "requests": [numbers.requests for numbers in series.bins],
        "errors": [numbers.errors for numbers in series.bins],
    }
