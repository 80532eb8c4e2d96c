"""Build the page, its API and the live views of one process. The first person who looks at them loads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import frozen

from dockerproxy.admin.api import API, api_shares
from dockerproxy.admin.viewer import Viewer, live_shares
from dockerproxy.concurrency import FirstUse
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.doctor.findings import public_report
from dockerproxy.http.request import Request
from dockerproxy.page.door import PageDoor
from dockerproxy.page.place import Place
from dockerproxy.page.sign_in import SignIn
from dockerproxy.registry.access_control import AccessControl
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.htpasswd import HtpasswdFile
from dockerproxy.registry.principal import Principal
from dockerproxy.settings import Settings
from dockerproxy.shared_services import DoctorReport, SharedServices
from dockerproxy.shares import Bound, ClientShares

if TYPE_CHECKING:
    from dockerproxy.admin.live import LiveFeed
    from dockerproxy.page.site import BrowserPage


@frozen
class Viewing:
    """The page, its API and the live views of one process. `bounds` are those of their requests."""

    sign_in: SignIn
    live: FirstUse[LiveFeed]
    api: API
    bounds: Sequence[Bound]
    _page_requests: ClientShares
    _load_page: Callable[[bool], BrowserPage]
    _reactor: Any

    def door(self, *, on_proxy_port: bool) -> PageDoor:
        """Return the way to the page on the port of the proxy, or on those of the registry."""
        page = FirstUse(self._reactor, partial(self._load_page, on_proxy_port))
        return PageDoor(page, self.sign_in, self._page_requests)

    def configure(self, settings: Settings, users: HtpasswdFile | None, access_control: AccessControl) -> None:
        """Apply PAGE, ADMIN_USERS, HTPASSWD_FILE and ANONYMOUS_PULL."""
        sign_in = self.sign_in
        sign_in.page, sign_in.administrators, sign_in.users = settings.page, settings.admin_users, users
        sign_in.anonymous_reads_hosted = not access_control.reading_needs_login


def build_viewing(
    reactor: Any,
    settings: Settings,
    shared: SharedServices,
    audit: AuditLog,
    place: Place,
    registries: Callable[[], list[str]],
) -> Viewing:
    """Build the parts. `registries` returns the names of those that are cached."""
    sign_in = SignIn(shared.page_desk, partial(_note_sign_in, audit))
    viewers, api_requests = live_shares(), api_shares()
    page_requests = ClientShares("requests for the page", limit=256, share=128)

    def load_live() -> LiveFeed:
        from dockerproxy.admin.layer_places import LayerPlaces
        from dockerproxy.admin.live import LiveFeed
        from dockerproxy.admin.resolver import CACHED, StoreView

        records = shared.state.open_records()
        return LiveFeed(
            reactor,
            shared.board,
            shared.board_part,
            shared.metrics,
            records,
            LayerPlaces(reactor, StoreView(CACHED, shared.state.cache), records, reactor.seconds),
            shared.cache_space.usage,
            time.time,
            viewers,
        )

    def load_page(on_proxy_port: bool) -> BrowserPage:
        from dockerproxy.page.site import BrowserPage

        return BrowserPage(
            reactor,
            time.time,
            sign_in,
            shared.overview,
            partial(_report_health, shared.doctor_report, shared.metrics),
            shared.page_desk.act,
            shared.page_desk.read_history,
            place,
            registries,
            on_proxy_port=on_proxy_port,
        )

    live = FirstUse(reactor, load_live)
    api = API(shared.overview, live, sign_in.viewer_of, api_requests)
    return Viewing(sign_in, live, api, [viewers, api_requests, page_requests], page_requests, load_page, reactor)


def _note_sign_in(audit: AuditLog, request: Request, action: str, user: str | None, accepted: bool) -> None:
    """Record that somebody has signed in to the page or out of it, or was refused."""
    principal = Principal.of(request, user)
    if accepted:
        audit.record(principal, action, "the page", "accepted")
    else:
        audit.record_refusal(principal, action, "the page")


async def _report_health(doctor_report: DoctorReport, metrics: Metrics, quick: bool, viewer: Viewer) -> dict[str, Any]:
    """Return the health report that `viewer` may read."""
    report = await doctor_report(quick)
    return report if viewer.is_admin else public_report(report, metrics.registries)
