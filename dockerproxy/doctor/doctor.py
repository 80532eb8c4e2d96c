"""The runner of the checks: one run at a time serves all callers, and each part of it is bounded in time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from attrs import define, field, frozen

from dockerproxy.concurrency import SingleFlight, in_thread
from dockerproxy.daemon.listener_service import OpenPort
from dockerproxy.doctor.findings import Diagnosis, Report, make_report
from dockerproxy.net.dial import AddressCheck, Resolver
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.settings import Settings
from dockerproxy.store.write_probe import StoreProbe
from dockerproxy.thread_pool import BoundedThreadPool, PoolLimits
from dockerproxy.upstream.agent import Agent
from dockerproxy.upstream.authorizer import Authorizer
from dockerproxy.upstream.shared_logins import SharedLogins

DOCTOR_THREADS = PoolLimits(threads=6, threads_per_client=6, waiting=64, waiting_per_client=64)
"""The threads of the checks, apart from all others, because some of them may hang."""

REPORT_TTL = 2.0
"""Seconds for which a report counts."""
PAGE_TTL = 60.0
"""Those for a page: its viewers must not make us ask all registries, or try a login, all the time."""


@frozen(kw_only=True)
class DoctorSources:
    """The parts of the daemon that the checks read. Those that block run in `threads`.

    `states`, `refused_logins` and `limits` return JSON values: those of `RegistryStates.report_list`,
    `EndedLogins.report_list` and ``/v1/budget``; the last one blocks. `usage` are the bytes of the cache and their
    limit, and `fleet` the states of the members of FLEET. `refusing_clients` has the POSIX time of each client's last
    refusal. `repositories` is the directory with those of the cache, and `helpers` returns the credential helpers as
    `HelperFacts` describes them. `keeps_conditions` asks the bucket of REGISTRY_STORE, if that is set, whether it does.
    `maintenance` has the last runs of gc and check, and blocks. `now` returns POSIX time.
    """

    reactor: Any
    threads: BoundedThreadPool
    now: Callable[[], float]
    agent: Agent
    authorizer: Authorizer
    logins: SharedLogins
    address_check: AddressCheck | None
    resolver: Resolver
    probes: Sequence[StoreProbe]
    keeps_conditions: Callable[[], Awaitable[bool]] | None
    authority: CertificateAuthority
    states: Callable[[], Sequence[Mapping[str, Any]]]
    refused_logins: Callable[[], Sequence[Mapping[str, Any]]]
    limits: Callable[[], Sequence[Mapping[str, Any]]]
    usage: Callable[[], tuple[int, int]]
    idle_age: Callable[[], float | None]
    fleet: Callable[[], Mapping[str, str]]
    refusing_clients: Callable[[], Mapping[str, float]]
    repositories: str
    helpers: Callable[[], Sequence[Mapping[str, Any]]]
    maintenance: Callable[[], Mapping[str, Mapping[str, Any]]]
    open_ports: Callable[[], Sequence[OpenPort]]
    process_ids: Callable[[], Iterable[int]]


@frozen
class DoctorSettings:
    """The settings of the checks, which a reload replaces.

    `warnings` are sentences about settings, and `unread` the names in the environment file that nothing reads.
    `proxy_setting` is the name of the variable that has the upstream proxy.
    """

    settings: Settings
    warnings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    proxy_setting: str = "UPSTREAM_PROXY"


@define(eq=False)
class Doctor:
    """Makes reports of everything that is wrong with this server. It belongs to the main process."""

    sources: DoctorSources
    settings: DoctorSettings
    _runs: SingleFlight[bool, Report] = field(factory=SingleFlight, init=False)
    _reports: dict[bool, tuple[float, Report]] = field(factory=dict, init=False)
    _network: tuple[float, Sequence[Diagnosis]] = field(default=(0.0, ()), init=False)

    async def report_for_page(self, quick: bool) -> Report:
        """Return `report`; that of all checks may be a minute old."""
        return await self.report(quick, REPORT_TTL if quick else PAGE_TTL)

    async def report(self, quick: bool, max_age: float = REPORT_TTL) -> Report:
        """Return the report of all checks, which takes some seconds at most, and may be `max_age` seconds old.

        A `quick` one asks nobody on the network; of that, it has the findings of the last full run.
        """
        made_at, report = self._reports.get(quick, (0.0, {}))
        if report and self.sources.reactor.seconds() - made_at < max_age:
            return report
        return await self._runs.do(quick, lambda: self._make_report(quick))

    def configure(self, settings: DoctorSettings) -> None:
        """Use other settings from now on, and forget the reports of the former ones."""
        self.settings = settings
        self._reports.clear()
        self._network = 0.0, ()

    async def _make_report(self, quick: bool) -> Report:
        reactor = self.sources.reactor
        started_at = reactor.seconds()
        run: Any = await in_thread(reactor, import_module, "dockerproxy.doctor.run")
        if not quick:
            self._network = reactor.seconds(), await run.network_findings(self.sources, self.settings)
        local = await run.local_findings(self.sources, self.settings)
        age = reactor.seconds() - self._network[0]
        findings = run.merge(local, run.lasting(self._network[1], age))
        ended_at = reactor.seconds()
        report = make_report(findings, self.sources.now(), ended_at - started_at)
        self._reports[quick] = ended_at, report
        return report
