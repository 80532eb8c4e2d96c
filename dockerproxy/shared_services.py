"""The state and the services that all processes of the daemon share, as one of them sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from attrs import field, frozen

from dockerproxy.admin.overview import Overview
from dockerproxy.admin.page_desk import PageDeskClient
from dockerproxy.cache.board import Board, BoardPart
from dockerproxy.cache.identity import Bindings
from dockerproxy.cache.space import CacheSpace
from dockerproxy.concurrency import KeyedLock, LocalKeyedLock
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.registry.pull_gatherer import Row
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.upstream.login_provider import LoginProvider
from dockerproxy.upstream.shared_logins import OnLoginChanged
from dockerproxy.upstream.silent_servers import SilentServers
from dockerproxy.upstream.tls import ClientContext

DoctorReport = Callable[[bool], Awaitable[dict[str, Any]]]
"""Returns the report of the doctor; True asks for a quick one. Raises `ServiceOverloaded`."""


@frozen
class SharedServices:
    """The state and the services that all processes of the daemon share.

    `metrics` counts the requests of this process and renders the sum over all processes. `report_login` is told of
    logins that are refused, `report_pull` of GETs of manifests, and `report_refusal` of the addresses of clients that
    refuse our certificate. `logins` has the logins of credential helpers. `silent_servers` remembers servers that do
    not answer. `board` shows the downloads of all processes, `board_part` those of this one, and `overview` answers the
    questions of the page and the API. `page_desk` has the page's sessions and does the actions of administrators.
    `doctor_report` asks the doctor. `upstream_tls` is for connections to registries. `bindings` maps issued tokens to
    the clients they were issued to. `multi_process` is true if the daemon has several processes.
    """

    state: StateDirectory
    cache_space: CacheSpace
    metrics: Metrics
    report_login: OnLoginChanged
    report_pull: Callable[[str, str], None]
    report_refusal: Callable[[str], None]
    logins: LoginProvider
    record_pulls: Callable[[list[Row]], object]
    silent_servers: SilentServers
    tombstones: Tombstones
    board: Board
    board_part: BoardPart
    overview: Overview
    page_desk: PageDeskClient
    doctor_report: DoctorReport
    upstream_tls: ClientContext
    locks: KeyedLock = field(factory=LocalKeyedLock)
    bindings: Bindings = field(factory=Bindings)
    multi_process: bool = False
