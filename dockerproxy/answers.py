"""Build the answers of the main process to people: about its state, about the history of pulls, and to their actions.

The first question loads the part that answers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from dockerproxy import __version__
from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import NDJSONResponse
from dockerproxy.admin.overview import Document, OverviewSources
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, StoreView
from dockerproxy.admin.sessions import Sessions
from dockerproxy.admin.viewer import Viewer
from dockerproxy.app import ProxyServer, build_freshness
from dockerproxy.cache.access import Access
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.concurrency import FirstUse
from dockerproxy.daemon.history import History
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.doctor.doctor import Doctor
from dockerproxy.doctor.findings import OK, public_report
from dockerproxy.http.request import Request
from dockerproxy.registry.principal import Principal
from dockerproxy.settings import Settings
from dockerproxy.shared_services import SharedServices
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.pull_history import PullHistory
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.upstream.registry_states import RegistryStates

if TYPE_CHECKING:
    from dockerproxy.admin.history import HistoryHandlers
    from dockerproxy.admin.image_actions import ImageActions
    from dockerproxy.admin.local_overview import LocalOverview
    from dockerproxy.admin.page_desk import PageDesk
    from dockerproxy.admin.why import Explainer


@frozen
class OverviewAnswers:
    """The overview in the main process."""

    _overview: FirstUse[LocalOverview]

    async def answer(self, resource: str, viewer: Sequence[Any], arguments: Mapping[str, str]) -> Document:
        """Return what `LocalOverview.answer` does."""
        overview = await self._overview.get()
        return await overview.answer(resource, viewer, arguments)

    async def renew(self) -> None:
        """Walk the repositories, if anybody has looked at them since the start."""
        if self._overview.loaded is not None:
            await self._overview.loaded.renew(somebody_looks=False)


def build_overview(
    reactor: Any,
    settings: Settings,
    stores: Sequence[StoreView],
    state: StateDirectory,
    server: ProxyServer,
    shared: SharedServices,
    history: History,
    pull_history: PullHistory,
    sources: OverviewSources,
) -> OverviewAnswers:
    """Build the answers to the page, the API and the command."""
    started = time.time()

    def load() -> LocalOverview:
        from dockerproxy.admin.local_overview import LocalOverview
        from dockerproxy.admin.summary import Summaries

        hosted, cached = stores
        walked = StoreView(HOSTED, server.hosted.layout, server.hosted.open_walker)
        records = state.open_records()
        summaries = Summaries(
            reactor, [walked, cached], server.hosted.disk, records, pull_history.counts.sums, sources.pinned
        )
        return LocalOverview(
            reactor,
            server.metrics,
            shared.board,
            history,
            summaries,
            [hosted, cached],
            records,
            server.hosted.disk,
            shared.cache_space.usage,
            time.time,
            sources,
            version=__version__,
            started=started,
            workers=settings.workers,
        )

    return OverviewAnswers(FirstUse(reactor, load))


def find_public_pulls(state: StateDirectory) -> Callable[[str, str], bool]:
    """Return a function that says whether everybody may know of a tag or digest of a cached repository. It blocks."""
    cached, records = StoreView(CACHED, state.cache), state.open_records()

    def is_public(repository: str, reference: str) -> bool:
        from dockerproxy.admin.repository_view import everybody_sees

        return everybody_sees(cached, records, repository, reference)

    return is_public


async def find_notices(doctor: Doctor, metrics: Metrics, viewer: Viewer) -> list[Document]:
    """Return what the overview says is wrong, as far as the viewer may know it."""
    report = await doctor.report(True)
    findings = report["findings"] if viewer.is_admin else public_report(report, metrics.registries)["findings"]
    return [
        {
            "level": finding["level"],
            "registry": finding["subject"] if finding["check"] == "registry" else None,
            "text": finding["sentence"],
            "advice": finding["advice"],
        }
        for finding in findings
        if finding["level"] != OK
    ]


def describe_outages(states: RegistryStates) -> dict[str, str]:
    """Return a sentence for each registry that does not answer."""
    return {
        outage["registry"]: "no answer since {since} UTC: {reason}; {stale} answers were stale".format(
            since=time.strftime("%Y-%m-%d %H:%M", time.gmtime(outage["since"])),
            reason=outage["reason"],
            stale=outage["stale"],
        )
        for outage in states.report_list()
    }


def load_explainer(
    settings: Settings,
    state: StateDirectory,
    server: ProxyServer,
    tombstones: Tombstones,
    pull_history: PullHistory,
) -> Explainer:
    """Load the answers to `dockerproxy why`."""
    from dockerproxy.admin.why import Explainer

    stores = store_views(state, server)
    records = state.open_records()
    return Explainer(
        ImageResolver(stores, frozenset(settings.registry_hostname)),
        stores[1],
        server.registries.mirrored,
        records,
        Access(records, time.time),
        RateLimits(records, time.time),
        build_freshness(settings),
        tombstones,
        pull_history,
        time.time,
    )


def build_history_handlers(
    reactor: Any, disk: DiskAccess, pull_history: PullHistory, explainer: Callable[[], Explainer]
) -> Mapping[tuple[str, str], ControlHandler]:
    """Build the handlers of `dockerproxy why` and `history`, by method and path.

    `explainer` loads the answers, which read the hosted registry in the threads of `disk`.
    """

    def load() -> HistoryHandlers:
        from dockerproxy.admin.history import HistoryHandlers

        return HistoryHandlers(reactor, disk, pull_history, explainer(), time.time)

    async def handle(request: Request, response: NDJSONResponse, principal: Principal) -> None:
        history = await first_use.get()
        await history.handlers[request.method, request.path](request, response, principal)

    first_use = FirstUse(reactor, load)
    return {("GET", "/v1/why"): handle, ("GET", "/v1/history"): handle}


def build_page_desk(
    reactor: Any, sessions: Sessions, actions: Callable[[], ImageActions], explainer: Callable[[], Explainer]
) -> Callable[[str, Sequence[Any]], Awaitable[Document]]:
    """Return `PageDesk.answer`. `actions` and `explainer` load what it needs."""

    def load() -> PageDesk:
        from dockerproxy.admin.page_desk import PageDesk

        return PageDesk(reactor, sessions, actions(), explainer())

    async def answer(question: str, arguments: Sequence[Any]) -> Document:
        desk = await first_use.get()
        return await desk.answer(question, arguments)

    first_use = FirstUse(reactor, load)
    return answer


def store_views(state: StateDirectory, server: ProxyServer) -> list[StoreView]:
    """Return the hosted store and the cache."""
    return [StoreView(HOSTED, server.hosted.layout, server.hosted.open_reader), StoreView(CACHED, state.cache)]
