"""Build the server: the part of the daemon that serves clients, which is the same in every process."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen
from twisted.application.internet import TimerService

from dockerproxy.admin.api import API_PREFIX
from dockerproxy.admin.builtin_endpoints import builtin_endpoints, handle_ready
from dockerproxy.cache.composition import CacheParts, CachePolicy, CacheServices, compose_cache
from dockerproxy.cache.downloads import DownloadLimits
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.pullthrough import PullThrough
from dockerproxy.cache.space import FileCounter
from dockerproxy.concurrency import fair_threads, in_thread
from dockerproxy.daemon.listener_service import Listener
from dockerproxy.daemon.metrics import DOWNLOADS, TUNNELS, Metrics
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.channel import Handler
from dockerproxy.http.cross_origin import CrossOriginProtection
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site, SiteBudgets
from dockerproxy.http.tls import ServerContext
from dockerproxy.http.tunnel import Tunnels, TunnelTimeouts
from dockerproxy.metering import RegistryMeter, count_and_log, handle_metrics
from dockerproxy.net.dial import AddressCheck, Dialer
from dockerproxy.net.local_names import LocalNames
from dockerproxy.net.own_addresses import is_own_address
from dockerproxy.net.parent_circles import ParentCircles
from dockerproxy.net.resolver import NameResolver
from dockerproxy.oci.docker_hub import DOCKER_HUB, registry_label
from dockerproxy.oci.names import Host
from dockerproxy.page.place import Place
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.certificate_file import CertificateFile
from dockerproxy.proxy.certificates import Certificates
from dockerproxy.proxy.direct import DirectRequestHandler
from dockerproxy.proxy.forward_proxy import ForwardProxy, InnerHost, Interception
from dockerproxy.proxy.host_rule import HostRule
from dockerproxy.proxy.login import ProxyLogin
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.router import BrowserProtection, Router
from dockerproxy.proxy.trusted_proxies import TrustedProxies
from dockerproxy.registry.access_control import AccessControl, AllowAll, AnonymousPull, RequireLogin
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.hosted import HostedRegistry
from dockerproxy.registry.hosted_app import HostedRegistryApp
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.registry.htpasswd import HtpasswdFile
from dockerproxy.registry.intercepted import Intercepted, Mirror, OpenRegistry
from dockerproxy.registry.namespaces import KnownNames, NamespacedRegistries
from dockerproxy.registry.pull_gatherer import PullGatherer
from dockerproxy.registry.responses import respond_error
from dockerproxy.reload import RegistryTable
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.shared_services import SharedServices
from dockerproxy.shares import Bound, ClientShares
from dockerproxy.store.disk_access import DiskAccess, LocalDisk, NetworkDisk
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.local_hosted_store import LocalHostedStore
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tree_reader import TreeReader
from dockerproxy.store.uploads import UploadLimits
from dockerproxy.store.write_probe import StoreProbe, probe_directory
from dockerproxy.thread_pool import DISK_THREADS, PARSE_LIMITS, BoundedThreadPool, ContentParser, PoolLimits
from dockerproxy.upstream.agent import Agent
from dockerproxy.upstream.agent import UpstreamTimeouts as UpstreamTimeouts
from dockerproxy.upstream.authorizer import Authorizer
from dockerproxy.upstream.client import UpstreamClient
from dockerproxy.upstream.metered_agent import MeteredAgent
from dockerproxy.upstream.metered_client import MeteredClient
from dockerproxy.upstream.shared_logins import SharedLogins
from dockerproxy.upstream.silent_servers import SilentServers
from dockerproxy.upstream.tls import ClientContext
from dockerproxy.viewing import Viewing, build_viewing

if TYPE_CHECKING:
    from dockerproxy.fleet.composition import Fleet

_LOOKUP_LIMITS = PoolLimits(threads=16, threads_per_client=6, waiting=4000, waiting_per_client=1000, reserved_threads=4)
"""Name look-ups. One silent name server must leave threads to other clients, and some to registries. Waiting ones cost
little memory, and a NAT with 500 hosts behind it is one client."""

_HELD_PART = 8
"""Readers of evicted blobs may hold one part in so many of CACHE_MAX_SIZE, beside the cache."""

_SAMPLE_INTERVAL = 1.0  # seconds between two samples of the gauges
_MAX_REPORTED = 200  # downloads in a report

_PASSWORD_PRIORITY = 10
"""Nice value of threads that hash passwords: other work goes first, because anyone can send wrong passwords."""


OnRequestFinished = Callable[[Request, float], None]
"""Callback for a finished request, with its duration in seconds."""


@frozen
class ThreadPools:
    """The threads of one process for blocking work that clients can cause, apart from the disk's."""

    lookups: BoundedThreadPool
    passwords: BoundedThreadPool
    documents: BoundedThreadPool

    @classmethod
    def start(cls, reactor: Any, processes: int) -> ThreadPools:
        """Return the pools of one of `processes` processes that share the cores. Hashes leave one core free."""
        cores = len(os.sched_getaffinity(0))
        threads = max(1, (cores - 1) // processes)
        password_limits = PoolLimits(threads, max(1, threads // 2), waiting=2000, waiting_per_client=500)
        return cls(
            BoundedThreadPool.start(reactor, "name look-ups", _LOOKUP_LIMITS),
            BoundedThreadPool.start(reactor, "password checks", password_limits, nice=_PASSWORD_PRIORITY),
            BoundedThreadPool.start(reactor, "long documents", PARSE_LIMITS),
        )


@frozen
class HostedStorage:
    """The storage of the hosted registry: REGISTRY_DIR, or the bucket of REGISTRY_STORE with its `probes`.

    The command and the page read it in the threads of `disk`, as a tree in `layout`. `open_reader` opens the tree for
    one answer, and `open_walker` for one about all repositories. `keeps_conditions` asks the bucket whether it does.
    """

    store: HostedStore
    disk: DiskAccess
    layout: Layout
    open_reader: Callable[[], TreeReader] = TreeReader
    open_walker: Callable[[], TreeReader] = TreeReader
    probes: Sequence[StoreProbe] = ()
    bounds: Sequence[Bound] = ()
    keeps_conditions: Callable[[], Awaitable[bool]] | None = None


@frozen
class ProxyServer:
    """The running parts of the server."""

    listeners: list[Listener]
    transfers: Transfers
    registries: RegistryTable
    pull_through: PullThrough
    authorizer: Authorizer
    browser_protection: BrowserProtection
    hosted_app: HostedRegistryApp
    proxy_login: ProxyLogin
    certificates: Certificates
    hosted: HostedStorage
    hosted_tree: HostedTree
    registry_disk: DiskAccess
    audit: AuditLog
    pulls: PullGatherer | None
    pools: ThreadPools
    bounds: Sequence[Bound]
    """The bounds that `debug_report` shows."""
    state: StateDirectory
    agent: Agent
    probes: Sequence[StoreProbe]
    policy: Policy
    metrics: Metrics
    viewing: Viewing
    fleet: Fleet | None
    _reactor: Any

    def reconfigure(self, settings: Settings) -> None:
        """Apply `settings`.

        Raise `HtpasswdError` or OSError, and change nothing, if the htpasswd file is unusable, and `SettingsError` if
        this daemon is not in FLEET.
        """
        # First, because they may raise.
        if self.fleet is not None and settings.fleet:
            check_fleet(self.fleet, settings)
        users = open_registry_users(self._reactor, settings, self.pools, self.state, self.metrics.count_login)
        access_control = build_access_control(settings, users, self.state)
        proxy_users = open_proxy_users(self._reactor, settings, self.pools, self.state)
        self.hosted_app.access_control = access_control
        self.viewing.configure(settings, users, access_control)
        set_hosted_rules(self.hosted_app.rules, settings)
        self.browser_protection.host_rule = build_host_rule(settings)
        self.browser_protection.cross_origin.set_cors_origins(settings.cors_origins)
        self.proxy_login.users = proxy_users
        self.certificates.check_files()
        self.metrics.read_registries()
        if self.fleet is not None and settings.fleet:
            self.fleet.directory.change(settings.fleet)
        self.registries.update(settings)
        configure_logins(self.pull_through.logins, settings)
        self.pull_through.challenges.restore(settings.registries)

    def sample_gauges(self) -> None:
        """Write what this process is doing into the metrics, which any process can be asked for."""
        self.metrics.set_process(os.getpid(), time.process_time())
        self.metrics.set(TUNNELS, len(self.transfers))
        self.metrics.set(DOWNLOADS, len(self.pull_through.blobs.downloads))
        if self.fleet is not None and self.metrics.is_first:
            self.metrics.set_peers(*self.fleet.members.count_others())

    async def close_upstreams(self) -> None:
        """Close the connections to registries and to other members of the fleet."""
        await self.agent.close()
        if self.fleet is not None:
            await self.fleet.transport.close()

    def gauge_service(self, sample_others: Callable[[], object] = bool) -> TimerService:
        """Return the service that samples the gauges every second. `sample_others` is called after it."""

        def sample() -> None:
            self.sample_gauges()
            sample_others()

        service = TimerService(_SAMPLE_INTERVAL, sample)  # type: ignore[no-untyped-call]
        service.clock = self._reactor
        return service

    def close_idle(self, client: str) -> None:
        """Close half of the idle connections of `client`, a `client_key`, those that are idle longest."""
        for listener in self.listeners:
            listener.site.close_idle(client)

    def debug_report(self) -> dict[str, Any]:
        """Return what this process is doing, as a JSON value."""
        return {
            "clients": {listener.setting: listener.site.channel_count for listener in self.listeners},
            "tunnels": len(self.transfers),
            "downloads": self.pull_through.blobs.downloads.report()[:_MAX_REPORTED],
            "upstream connections": {"open": self.agent.open_connections, "idle": self.agent.idle_connections},
            "bounds": [bound.report() for bound in self.bounds],
            **({} if self.fleet is None else {"fleet": self.fleet.members.states()}),
        }


def build_server(reactor: Any, settings: Settings, certificates: Certificates, shared: SharedServices) -> ProxyServer:
    """Build the server. Raise `SettingsError`, `HtpasswdError` or OSError."""
    reactor.suggestThreadPoolSize(DISK_THREADS)
    pools = ThreadPools.start(reactor, settings.workers)
    authority = certificates.authority
    policy = Policy(
        settings.allow_clients, settings.tunnel_ports, settings.tunnel_allow, settings.tunnel_deny, is_own_address
    )
    registries = RegistryTable(settings)

    shared.silent_servers.set_is_listed(registries.is_listed)

    def check_for(host: Host) -> AddressCheck | None:
        return None if registries.intercepted.covering(host) is None else CoveredHostCheck(policy, host)

    def context_for(host: Host) -> ServerContext:
        wildcard = registries.intercepted.covering(host)
        return authority.context_for(host.name) if wildcard is None else authority.wildcard_context_for(wildcard)

    connectors = build_connectors(
        reactor, settings, pools, check_for, shared.silent_servers, shared.upstream_tls, shared.state.cache_secret
    )
    meter = RegistryMeter(shared.metrics)
    authorizer = Authorizer(
        MeteredAgent(connectors.agent, meter), time.time, policy.check_upstream, settings.auth_registries
    )
    parser = ContentParser(pools.documents)
    fleet = build_fleet(reactor, settings, shared, connectors, authority, parser) if settings.fleet else None
    cache, *for_members = build_cache(
        reactor, settings, shared, registries, policy, connectors.agent, authorizer, parser, fleet
    )
    pull_through = cache.pull_through
    api = RegistryAPI(reactor)
    upload_limits = UploadLimits(settings.max_uploads, settings.max_uploads_per_client)
    hosted_tree = HostedTree.from_layout(shared.state.registry, time.time, shared.locks, upload_limits)
    users = open_registry_users(reactor, settings, pools, shared.state, shared.metrics.count_login)
    access_control = build_access_control(settings, users, shared.state)
    disk, disk_bounds = open_registry_disk(reactor, shared.state, hosted_tree)
    rules = HostedRules()
    set_hosted_rules(rules, settings)
    hosted = build_hosted_storage(
        reactor, settings, shared, disk, hosted_tree, cache, connectors.agent, parser, rules, fleet
    )
    audit = AuditLog.open(reactor, str(settings.state_dir))
    sessions = fleet if settings.registry_store is not None else None  # members pass them on
    hosted_app = HostedRegistryApp(
        api,
        HostedRegistry(hosted.store, parser, audit, rules),
        access_control,
        audit,
        rules,
        None if sessions is None else sessions.session_router().pass_on,
    )
    metrics_requests = ClientShares("requests for /metrics", limit=16, share=8)
    metrics_handler = partial(handle_metrics, reactor, shared, authority, disk, metrics_requests)
    probes = [*build_write_probes(reactor, shared.state, disk), *hosted.probes]
    ready_handler = partial(handle_ready, lambda: probes[:1] if rules.read_only else probes)
    pulls = PullGatherer(reactor, shared.record_pulls) if settings.pull_history else None
    if pulls is not None:
        reactor.addSystemEventTrigger("during", "shutdown", pulls.flush)
    on_finished = partial(count_and_log, shared.metrics, pulls)
    cross_origin = CrossOriginProtection(settings.cors_origins)
    browser_protection = BrowserProtection(build_host_rule(settings), cross_origin)

    login = ProxyLogin(open_proxy_users(reactor, settings, pools, shared.state))
    transfers = Transfers()
    timeouts = TunnelTimeouts(
        settings.proxy_connect_connect_timeout,
        settings.proxy_connect_read_timeout,
        settings.proxy_connect_send_timeout,
    )
    tunnels = Tunnels(reactor, timeouts, transfers, login.allows, on_finished)

    def mirror_for(open_registry: OpenRegistry) -> Mirror:
        return Mirror(api, open_registry, registries.mirrored, DOCKER_HUB, cross_origin)

    def intercepted_for(open_registry: OpenRegistry) -> Intercepted:
        return Intercepted(api, open_registry, pull_through, cross_origin, tunnels, allow_push=settings.allow_push)

    mirror, intercepted = mirror_for(pull_through.registry), intercepted_for(pull_through.registry)
    handle_mirror, handle_intercepted = mirror.handle, intercepted.handle
    if fleet is not None:
        owned, cached_only = (parts.pull_through for parts in for_members)
        door = fleet.door(owned, cached_only, mirror, intercepted, mirror_for, intercepted_for)
        handle_mirror, handle_intercepted = door.handle_mirror, door.handle_intercepted
    hosted_names = frozenset(settings.registry_hostname)
    has_repository = hosted.store.has_repository
    if hosted.disk.file_system is not None:
        has_repository = KnownNames(has_repository, reactor.seconds).has_repository
    registries_for = partial(
        NamespacedRegistries,
        hosted_app,
        login.guard(handle_mirror),
        registries.hosted_names,
        registries.mirrored,
        has_repository,
    )
    viewing = build_viewing(
        reactor,
        settings,
        shared,
        audit,
        Place(settings.registry_hostname[0], proxy_port(settings), tls_port(settings), authority.fingerprint),
        lambda: list(dict.fromkeys(map(registry_label, registries.mirrored.values()))),
    )
    viewing.configure(settings, users, access_control)

    def router(*, on_proxy_port: bool) -> Router:
        page = viewing.door(on_proxy_port=on_proxy_port)
        endpoints = builtin_endpoints(
            authority.certificate_pem,
            metrics_handler,
            ready_handler,
            proxy_port(settings),
            registries=lambda: [host.name for host in registries.intercepted],
            hosted=settings.registry_hostname[0],
            on_proxy_port=on_proxy_port,
        )
        pages = {**endpoints, **page.pages(endpoints["/"]), API_PREFIX: viewing.api.handle}
        handler = registries_for(mirror_by_default=on_proxy_port).handle
        return Router(handler, pages, browser_protection, respond_error, page.forms)

    proxy_router, registry_router = router(on_proxy_port=True), router(on_proxy_port=False)
    direct_listener = DirectRequestHandler(policy, registry_router.handle, TrustedProxies(settings.trusted_proxies))
    session_door = None
    if sessions is not None:
        session_door = open_session_door(sessions, hosted_app, authority, cross_origin)
    forward_proxy = ForwardProxy(
        policy=policy,
        login=login,
        interception=Interception(registries.intercepted, context_for, handle_intercepted),
        dialer=connectors.tunnel_dialer,
        agent=connectors.agent,
        circles=connectors.circles,
        local=proxy_router.handle,
        # Clients of the proxy reach it without a reverse proxy, also those on the machine of one.
        hosted=DirectRequestHandler(policy, registry_router.handle).handle,
        hosted_names=hosted_names,
        hosted_context_for=partial(authority.own_context_for, file=certificates.registry_file),
        registry_ports=listening_ports(settings.registry_listen, 443),
        registry_http_ports=listening_ports(settings.registry_http_listen, 80),
        tunnels=tunnels,
        for_members=session_door,
    )
    certificates.watch_files(reactor)
    budgets = SiteBudgets()
    listeners = build_listeners(
        reactor,
        settings,
        forward_proxy,
        direct_listener,
        certificates,
        on_finished,
        shared.report_refusal,
        budgets,
    )
    if fleet is not None:
        fleet.start(reactor, [listener.site for listener in listeners])
    return ProxyServer(
        listeners,
        transfers,
        registries,
        pull_through,
        authorizer,
        browser_protection,
        hosted_app,
        login,
        certificates,
        hosted,
        hosted_tree,
        disk,
        audit,
        pulls,
        pools,
        [
            budgets.requests.shares,
            budgets.responses.shares,
            api.long_responses,
            metrics_requests,
            *viewing.bounds,
            *pools.lookups.bounds,
            *pools.passwords.bounds,
            *pools.documents.bounds,
            fair_threads(reactor).running,
            shared.silent_servers.places,
            *pull_through.blobs.downloads.bounds,
            *disk_bounds,
            *hosted.bounds,
        ],
        shared.state,
        connectors.agent,
        probes,
        policy,
        shared.metrics,
        viewing,
        fleet,
        reactor,
    )


def open_registry_disk(reactor: Any, state: StateDirectory, tree: HostedTree) -> tuple[DiskAccess, Sequence[Bound]]:
    """Return the access to REGISTRY_DIR, and the bounds that a report may show without waiting for it."""
    if state.registry_file_system is None:
        return LocalDisk(reactor), [tree.uploads]
    network_disk = NetworkDisk.start(reactor, "REGISTRY_DIR", state.registry_file_system)
    return network_disk, network_disk.bounds


def build_write_probes(reactor: Any, state: StateDirectory, registry_disk: DiskAccess) -> tuple[StoreProbe, StoreProbe]:
    """Return the probes of CACHE_DIR and of REGISTRY_DIR, whose reserve of space is not for clients."""
    reserve = DiskReserve(str(state.registry.root))
    return (
        probe_directory(reactor, "CACHE_DIR", state.cache, partial(in_thread, reactor)),
        probe_directory(reactor, "REGISTRY_DIR", state.registry, registry_disk.run, reserve.check),
    )


def open_certificates(settings: Settings) -> Certificates:
    """Load the CA, or create it if there is none, and the certificates in files. Raise `AuthorityError` or OSError."""
    authority = CertificateAuthority.open(
        settings.ca_dir,
        certificate_file=settings.ca_crt_file,
        key_file=settings.ca_key_file,
        passphrase=settings.ca_key_passphrase,
        clock=time.time,
    )
    return Certificates(
        authority,
        CertificateFile.open(settings.registry_crt_file, settings.registry_key_file, "REGISTRY", time.time),
        CertificateFile.open(settings.proxy_crt_file, settings.proxy_key_file, "PROXY", time.time),
    )


def raise_descriptor_limit() -> int:
    """Raise the limit of open files of this process and its children to the hard limit, and return it.

    The usual soft limit of 1,024 is too low, because each client that reads a blob uses two descriptors.
    """
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    return hard_limit


@frozen
class Connectors:
    """The two ways to connect to other servers: HTTP requests to upstream registries, and tunnels."""

    agent: Agent
    tunnel_dialer: Dialer
    resolver: NameResolver
    circles: ParentCircles | None


@frozen
class CoveredHostCheck:
    """Checks the addresses of a host that only a wildcard of REGISTRIES covers. Checks for the same host are equal."""

    policy: Policy
    host: Host

    def __call__(self, address: str) -> None:
        self.policy.check_covered(self.host, address)


def build_connectors(
    reactor: Any,
    settings: Settings,
    pools: ThreadPools,
    check_for: Callable[[Host], AddressCheck | None],
    silent_servers: SilentServers,
    tls: ClientContext,
    secret: bytes,
) -> Connectors:
    """Build the connectors. `check_for` returns the check of a registry's addresses.

    All processes of the daemon have the `secret`.
    """
    circles = None if settings.upstream_proxy is None else ParentCircles.of(secret, reactor.seconds)
    resolver = NameResolver(pools.lookups, reactor.seconds, ipv6=not settings.disable_ipv6)

    def dialer(connect_timeout: float) -> Dialer:
        return Dialer(
            reactor,
            resolver,
            overrides={host: (address.name, address.port) for host, address in settings.upstream_addresses.items()},
            ipv6=not settings.disable_ipv6,
            proxy=settings.upstream_proxy,
            circles=circles,
            connect_timeout=connect_timeout,
        )

    timeouts = upstream_timeouts(settings)
    agent = Agent(reactor, dialer(settings.proxy_connect_timeout), tls, timeouts, check_for, silent_servers)
    return Connectors(agent, dialer(settings.proxy_connect_connect_timeout), resolver, circles)


def open_upstream_tls(settings: Settings) -> ClientContext:
    """Load the CAs that registries may have: those of the system, 3 MB in memory, and UPSTREAM_CA_FILE.

    Raise `SettingsError` if that cannot be used.
    """
    try:
        return ClientContext(verify=settings.verify_ssl, ca_file=str(settings.upstream_ca_file or "") or None)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def upstream_timeouts(settings: Settings) -> UpstreamTimeouts:
    """Return the limits of PROXY_CONNECT_TIMEOUT, PROXY_READ_TIMEOUT and PROXY_SEND_TIMEOUT."""
    return UpstreamTimeouts(settings.proxy_connect_timeout, settings.proxy_read_timeout, settings.proxy_send_timeout)


def build_silent_servers(reactor: Any, settings: Settings) -> SilentServers:
    """Return what one process knows of silent servers."""
    return SilentServers(reactor, upstream_timeouts(settings).probe)


def build_cache(
    reactor: Any,
    settings: Settings,
    shared: SharedServices,
    registries: RegistryTable,
    policy: Policy,
    agent: Agent,
    authorizer: Authorizer,
    parser: ContentParser,
    fleet: Fleet | None,
) -> list[CacheParts]:
    """Build the cache in CACHE_DIR, and the two over the same files that serve other members of the `fleet`.

    The second asks upstream only, and the third nobody.
    """
    file_counter, meter = FileCounter(reactor, shared.cache_space.record_files), RegistryMeter(shared.metrics)
    upstream = MeteredClient(UpstreamClient(agent, authorizer, policy.check_upstream), meter, reactor.seconds)
    services = CacheServices(
        reactor=reactor,
        clock=time.time,
        layout=shared.state.cache,
        records=shared.state.open_records(file_counter.add),
        on_file_created=file_counter.add,
        on_pull=shared.report_pull,
        on_limited=meter.count_rate_limited,
        space=shared.cache_space,
        secret=shared.state.cache_secret,
        bindings=shared.bindings,
        locks=shared.locks,
        parser=parser,
        tombstones=shared.tombstones,
        multi_process=shared.multi_process or fleet is not None,
        upstream=upstream,
        content=upstream if fleet is None else fleet.content_client(upstream),
        agent=MeteredAgent(agent, meter),
        board=shared.board_part,
    )
    cache_policy = CachePolicy(
        registries=registries.mirrored.values(),
        intercepted=registries.intercepted,
        on_challenges=authorizer.set_ping_target,
        address_check=policy.check_upstream,
        allows_client_to=policy.allows_client_to,
        logins=SharedLogins(
            authorizer, reactor.seconds, shared.report_login, shared.logins, shared=settings.share_auth_registries
        ),
        freshness=build_freshness(settings),
        download_limits=download_limits(settings),
        evicted_bytes=settings.cache_max_size // _HELD_PART // settings.workers,
    )
    configure_logins(cache_policy.logins, settings)
    parts = compose_cache(services, cache_policy)
    parts.pull_through.challenges.restore(settings.registries)
    if fleet is None:
        return [parts]
    clients = fleet.owner_client(upstream), fleet.no_upstream
    return [parts, *(compose_cache(evolve(services, content=client), cache_policy) for client in clients)]


def build_fleet(
    reactor: Any,
    settings: Settings,
    shared: SharedServices,
    connectors: Connectors,
    authority: CertificateAuthority,
    parser: ContentParser,
) -> Fleet:
    """Build the parts that make this daemon a member of FLEET. Raise `SettingsError`."""
    from dockerproxy.fleet.composition import FleetInvalid, compose_fleet

    try:
        return compose_fleet(
            reactor,
            settings.fleet,
            settings.fleet_address,
            listening_ports(settings.proxy_listen, 3128),
            settings.fleet_timeout,
            settings.fleet_fan_out,
            is_own_address=is_own_address,
            resolver=connectors.resolver,
            ca_certificate=authority.certificate_pem,
            secret=authority.derive_secret("fleet"),
            records=shared.state.open_records() if shared.multi_process else None,
            meter=shared.metrics,
            parser=parser,
            max_blob_size=settings.max_blob_size,
        )
    except FleetInvalid as error:
        raise SettingsError(f"{error}.") from None


def open_session_door(
    fleet: Fleet, hosted_app: HostedRegistryApp, authority: CertificateAuthority, cross_origin: CrossOriginProtection
) -> InnerHost:
    """Return the host at which other members ask for upload sessions that they pass on."""
    from dockerproxy.fleet.composition import UPLOADS_HOST

    door = fleet.session_door(hosted_app.handle, cross_origin.check)
    return InnerHost(UPLOADS_HOST, partial(authority.context_for, UPLOADS_HOST), door.handle)


def check_fleet(fleet: Fleet, settings: Settings) -> None:
    """Raise `SettingsError` if a new FLEET does not say which member this daemon is."""
    try:
        fleet.directory.check(settings.fleet)
    except ValueError as error:
        raise SettingsError(f"{error}.") from None


def build_freshness(settings: Settings) -> Freshness:
    """Return the lifetimes of tags by ENABLE_MANIFEST_CACHE and the settings beside it."""
    return Freshness(
        settings.enable_manifest_cache,
        settings.manifest_cache_primary_regex,
        settings.manifest_cache_primary_time,
        settings.manifest_cache_secondary_regex,
        settings.manifest_cache_secondary_time,
        settings.manifest_cache_default_time,
    )


def download_limits(settings: Settings) -> DownloadLimits:
    """Return the bounds of the downloads of one process."""
    return DownloadLimits.derive(settings.cache_max_size, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def build_hosted_storage(
    reactor: Any,
    settings: Settings,
    shared: SharedServices,
    disk: DiskAccess,
    tree: HostedTree,
    cache: CacheParts,
    agent: Agent,
    parser: ContentParser,
    rules: HostedRules,
    fleet: Fleet | None,
) -> HostedStorage:
    """Build the storage of the hosted registry: the bucket of REGISTRY_STORE with its probe, or else REGISTRY_DIR."""
    local = LocalHostedStore.from_tree(reactor, disk, tree, parser, shared.state.registry_secret, time.time)
    if settings.registry_store is None:
        return HostedStorage(local, disk, shared.state.registry)
    # Only here, because it loads botocore.
    from dockerproxy.bucket import assembly

    bucket = assembly.open_bucket(reactor, settings.registry_store, agent, time.time)
    records, limits = shared.state.open_records(), download_limits(settings)
    own_name = None if fleet is None else fleet.own_name
    store = assembly.open_store(
        reactor, bucket, cache, shared.cache_space, records, limits, local.uploads, parser, own_name
    )
    probe = assembly.probe_bucket(reactor, bucket, lambda: rules.read_only)
    # It may hang as a file system of another machine may.
    bucket_disk = NetworkDisk.start(reactor, "REGISTRY_STORE", "an object store")
    open_reader, open_walker = assembly.open_trees(reactor, bucket)
    keeps_conditions = partial(assembly.keeps_conditions, bucket)
    return HostedStorage(
        store,
        bucket_disk,
        assembly.TREE_LAYOUT,
        open_reader,
        open_walker,
        [probe],
        bucket_disk.bounds,
        keeps_conditions,
    )


def configure_logins(logins: SharedLogins, settings: Settings) -> None:
    """Apply AUTH_REGISTRIES, CREDENTIAL_HELPERS and DOCKER_CONFIG_FILE."""
    has_provider = bool(settings.credential_helpers) or settings.docker_config_file is not None
    logins.configure(settings.auth_registries, asks_provider=has_provider)


def build_host_rule(settings: Settings) -> HostRule:
    """Return the rule for the Host of requests. It reads the files with this machine's names."""
    local = LocalNames.read()
    public = set() if settings.registry_url is None else {settings.registry_url.host.name}
    return HostRule(local.names | set(settings.registry_hostname) | public, local.domains, settings.allowed_hosts)


def open_registry_users(
    reactor: Any,
    settings: Settings,
    pools: ThreadPools,
    state: StateDirectory,
    on_login: Callable[[bool], object],
) -> HtpasswdFile | None:
    """Return the users in HTPASSWD_FILE, or None if it is not set. Raise `HtpasswdError` or OSError.

    `on_login` is called with the outcome of each check of a password.
    """
    if settings.htpasswd_file is None:
        return None
    return HtpasswdFile(reactor, pools.passwords, settings.htpasswd_file, state.registry_secret, on_checked=on_login)


def build_access_control(settings: Settings, users: HtpasswdFile | None, state: StateDirectory) -> AccessControl:
    """Return the access control of the hosted registry, whose `users` are those in HTPASSWD_FILE."""
    if users is None:
        return AllowAll()
    realm, secret = settings.registry_hostname[0], state.registry_secret
    if not settings.anonymous_pull:
        return RequireLogin(users, realm)
    return AnonymousPull(users, settings.registry_hostname, secret, time.time, settings.registry_url)


def set_hosted_rules(rules: HostedRules, settings: Settings) -> None:
    """Apply REGISTRY_READ_ONLY, ALLOW_DELETE and ALLOW_SPARSE_INDEXES."""
    rules.read_only = settings.registry_read_only
    rules.allow_delete = settings.allow_delete
    rules.allow_sparse_indexes = settings.allow_sparse_indexes


def open_proxy_users(
    reactor: Any, settings: Settings, pools: ThreadPools, state: StateDirectory
) -> HtpasswdFile | None:
    """Return the users in PROXY_HTPASSWD_FILE, or None if it is not set. Raise `HtpasswdError` or OSError."""
    if settings.proxy_htpasswd_file is None:
        return None
    secret = state.registry_secret
    return HtpasswdFile(reactor, pools.passwords, settings.proxy_htpasswd_file, secret, "PROXY_HTPASSWD_FILE")


def proxy_port(settings: Settings) -> int:
    """Return the port of the first endpoint of PROXY_LISTEN."""
    (port,) = listening_ports(settings.proxy_listen[:1], 3128)
    return port


def tls_port(settings: Settings) -> int | None:
    """Return a port on which the page is reached over TLS, None if there is none."""
    return next(iter(listening_ports([*settings.proxy_tls_listen, *settings.registry_listen][:1], 443)), None)


def listening_ports(descriptions: Iterable[str], systemd_port: int) -> frozenset[int]:
    """Return the ports of endpoints. A socket from systemd is taken for that of the package, with `systemd_port`."""
    matches = (re.match(r"tcp6?:(?:.*?port=)?([0-9]+)", description) for description in descriptions)
    return frozenset(int(match[1]) if match else systemd_port for match in matches)


def build_listeners(
    reactor: Any,
    settings: Settings,
    forward_proxy: ForwardProxy,
    direct_listener: DirectRequestHandler,
    certificates: Certificates,
    on_finished: OnRequestFinished,
    on_refused: Callable[[str], object],
    budgets: SiteBudgets,
) -> list[Listener]:
    """Build the configured listeners, which are not open yet.

    `on_finished` is called after each request, and `on_refused` with each client that refuses our certificate.
    """

    make_site = partial(build_site, reactor, settings, on_finished=on_finished, on_refused=on_refused, budgets=budgets)

    def make_proxy_site(tls: Callable[[], ServerContext] | None = None) -> Site:
        def handle(request: Request) -> Awaitable[None]:
            return forward_proxy.handle(site, request)

        site = make_site(handle, tls=tls)
        return site

    authority, registry_names = certificates.authority, frozenset(settings.registry_hostname)
    registry_tls = authority.sni_context("REGISTRY_LISTEN", registry_names, certificates.registry_file)
    proxy_names = registry_names | LocalNames.read().names
    proxy_tls = authority.sni_context("PROXY_TLS_LISTEN", proxy_names, certificates.proxy_file)
    return [
        Listener("PROXY_LISTEN", settings.proxy_listen, make_proxy_site()),
        Listener("PROXY_TLS_LISTEN", settings.proxy_tls_listen, make_proxy_site(lambda: proxy_tls)),
        Listener("REGISTRY_LISTEN", settings.registry_listen, make_site(direct_listener.handle, lambda: registry_tls)),
        Listener("REGISTRY_HTTP_LISTEN", settings.registry_http_listen, make_site(direct_listener.handle)),
    ]


def build_site(
    reactor: Any,
    settings: Settings,
    handler: Handler,
    tls: Callable[[], ServerContext] | None = None,
    *,
    on_finished: OnRequestFinished,
    on_refused: Callable[[str], object] = lambda client: None,
    budgets: SiteBudgets | None = None,
) -> Site:
    """Build a site that passes its requests to `handler`. `tls`, if given, returns the TLS context of a connection."""
    timeouts = ServerTimeouts(
        settings.keepalive_timeout,
        settings.client_header_timeout,
        settings.client_body_timeout,
        settings.send_timeout,
        settings.client_min_rate,
    )
    return Site(
        reactor,
        handler,
        timeouts=timeouts,
        on_request_finished=on_finished,
        get_tls_context=tls,
        budgets=budgets,
        on_certificate_refused=on_refused,
    )
