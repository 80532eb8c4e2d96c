"""The plugin `twistd dockerproxy`: builds the daemon from its parts and does nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import asdict, evolve, frozen
from twisted.application.internet import TimerService
from twisted.application.service import IService, MultiService
from twisted.logger import Logger
from twisted.python import usage

from dockerproxy import __version__
from dockerproxy.admin.api import ControlAPI
from dockerproxy.admin.configuration import ConfigurationHandlers
from dockerproxy.admin.control import (
    Control,
    local_user_name,
)
from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.diagnosis import handle_doctor
from dockerproxy.admin.operations import OperationHistory, Operations
from dockerproxy.admin.overview import OverviewSources
from dockerproxy.admin.pull_desk import PullDesk
from dockerproxy.admin.resolver import ImageResolver
from dockerproxy.admin.sessions import Sessions
from dockerproxy.admin.sign_in_links import SignInLinks
from dockerproxy.answers import (
    build_history_handlers,
    build_overview,
    build_page_desk,
    describe_outages,
    find_notices,
    find_public_pulls,
    load_explainer,
    store_views,
)
from dockerproxy.app import (
    ProxyServer,
    build_server,
    build_silent_servers,
    build_site,
    open_certificates,
    open_upstream_tls,
    proxy_port,
)
from dockerproxy.cache.ended_logins import EndedLogins
from dockerproxy.cache.identity import Bindings
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.janitor import Janitor
from dockerproxy.cache.pins import Pins, pin_records
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.cache.rate_limits import stored_limits
from dockerproxy.cache.space import BLOB_COST, CacheSpaceManager
from dockerproxy.concurrency import in_thread, spawn, use_monotonic_clock
from dockerproxy.config_report import ConfigReport
from dockerproxy.daemon import jsonlog, textlog
from dockerproxy.daemon.control_socket import ControlSocket
from dockerproxy.daemon.history import History, HistoryService
from dockerproxy.daemon.listener_service import SHUTDOWN_GRACE, EndpointOpener, ListenerService, PortOpener
from dockerproxy.daemon.memory_tuning import forget_generated_source, freeze_startup_objects, tune_malloc
from dockerproxy.daemon.metrics import RELOAD_SUCCESS, WORKERS, Metrics
from dockerproxy.daemon.refusing_clients import RefusingClients
from dockerproxy.daemon.signals import DebugSignalService, on_repeated_stop
from dockerproxy.daemon.systemd import Notifier, SystemdService
from dockerproxy.doctor.doctor import DOCTOR_THREADS, Doctor, DoctorSettings, DoctorSources
from dockerproxy.metering import log_access
from dockerproxy.net.resolver import NameResolver
from dockerproxy.oci.docker_hub import registry_label
from dockerproxy.proxy.authority import AuthorityError, CertificateAuthority
from dockerproxy.proxy.trusted_proxies import TrustedProxies
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.registry.principal import Principal
from dockerproxy.reload import Configuration, Reloader, describe_error, reloadable_variables, settings_in_force
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.shared_services import SharedServices
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.directory_owner import DirectoryInUse, DirectoryOwner, OwnerService
from dockerproxy.store.journal import BackgroundJournal
from dockerproxy.store.local_hosted_store import upload_purge_service
from dockerproxy.store.pull_history import PullHistory, PullHistoryService
from dockerproxy.store.state_directory import StateDirectory
from dockerproxy.store.tombstones import Tombstones, TombstoneService
from dockerproxy.terminal import format_size
from dockerproxy.thread_pool import BoundedThreadPool
from dockerproxy.upstream.credential_helper import CredentialHelpers
from dockerproxy.upstream.login_provider import LocalLoginProvider
from dockerproxy.upstream.registry_states import RegistryStates
from dockerproxy.workers.connection_table import ConnectionTable
from dockerproxy.workers.coordinator import Answers, LocalCoordinator, SharedState
from dockerproxy.workers.dispatch import ConnectionDispatcher
from dockerproxy.workers.fork_server import ForkServer
from dockerproxy.workers.process import SERVER_SILENT, TOKEN_BOUND, ForkedState, run_worker
from dockerproxy.workers.supervisor import WorkerSupervisor

if TYPE_CHECKING:
    from dockerproxy.admin.image_actions import ImageActions
    from dockerproxy.admin.pulls import PullService

_WORKER_EXTRA_GRACE = 2.0  # seconds that workers have to exit after their own shutdown grace period

_PIN_INTERVAL = 60.0  # seconds between two looks at what is pinned

_DAEMON = Principal(None, "the daemon", None)

log = Logger()


class Options(usage.Options):
    """The command line of `twistd dockerproxy`."""

    synopsis = "twistd [options] dockerproxy [--env-file FILE]"
    longdesc = "A caching proxy for Docker registries. Its settings are environment variables; see docs/settings.md."
    optParameters: ClassVar = [
        ["env-file", None, None, "A .env file with settings. The environment takes precedence over it."]
    ]


def makeService(options: Options) -> IService:
    """Build the daemon. If a setting is unusable, print one sentence and raise SystemExit."""
    from twisted.internet import reactor

    use_monotonic_clock(reactor)
    tune_malloc()  # before there are threads
    forget_generated_source()
    # All that the daemon writes is its own user's. twistd applies the --umask of an administrator later.
    os.umask(0o077)
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    try:
        return build_daemon(reactor, options["env-file"], options.parent or {}, notifier)
    except (SettingsError, DirectoryInUse, AuthorityError, HtpasswdError, OSError) as error:
        reason = describe_error(error)
    notifier.status(reason)
    textlog.print_error(f"docker-registry-proxy: {reason}")
    raise SystemExit(os.EX_CONFIG)  # systemd does not restart the service on this status; it would fail again


def build_daemon(reactor: Any, env_file: str | None, twistd_options: Any, notifier: Notifier) -> IService:
    """Build the daemon. Raise `SettingsError`, `DirectoryInUse`, `AuthorityError`, `HtpasswdError` or OSError."""
    read = partial(Configuration.read, os.environ, env_file)
    configuration = read()
    settings = configuration.settings
    state = StateDirectory.open(settings.cache_dir, settings.registry_dir)  # first, because another daemon may run
    has_ca = settings.ca_crt_file is not None or (settings.ca_dir / "ca.crt").exists()
    certificates, upstream_tls = open_certificates(settings), open_upstream_tls(settings)
    authority = certificates.authority
    if settings.fleet:  # so that what one member has signed is good at all
        cache_secret, registry_secret = authority.derive_secret("cache"), authority.derive_secret("registry")
        state = evolve(state, cache_secret=cache_secret, registry_secret=registry_secret)
    for warning in (*settings.warnings, *state.warnings, *authority.warnings):
        log.warn("{warning}", warning=warning)
    for warning in probe_registry_store(reactor, settings, configuration.variables):
        log.warn("REGISTRY_STORE: {warning}", warning=warning)
    metrics = Metrics.make(settings.workers, map(registry_label, settings.intercepted))
    pins = Pins(reactor, pin_records(state.cache), time.time, limit=settings.cache_max_size, cost=BLOB_COST)
    tombstones, tombstone_file = Tombstones(), str(settings.state_dir / "history/evicted")
    tombstones.load(tombstone_file)
    cache_space = build_cache_space(reactor, settings, state, tombstones, pins, metrics.count_evictions)
    pins.subscribe(cache_space.keep, cache_space.stop_keeping)
    pins.load()
    helpers = CredentialHelpers(reactor, configuration.variables)
    logins = LocalLoginProvider(helpers.run, reactor.seconds)
    reactor.callWhenRunning(configure_provider, logins, configuration)
    pull_counts, bindings = PullCounts(time.time), Bindings()
    refusing_clients = RefusingClients(time.time)
    pull_history = PullHistory(
        str(settings.state_dir / "history"), settings.pull_history, is_public=find_public_pulls(state)
    )
    pull_history.clear_staging()
    recorder = BackgroundJournal(reactor, pull_history)
    reactor.addSystemEventTrigger("after", "shutdown", recorder.flush)
    shared_state = SharedState(
        cache_space, EndedLogins(time.time), logins, pull_counts, refusing_clients, recorder.append
    )
    forked_state = ForkedState.create(reactor, configuration, state, certificates, upstream_tls, metrics, tombstones)
    silent_servers = build_silent_servers(reactor, settings)
    shared = forked_state.shared_services(0, LocalCoordinator(shared_state), bindings, silent_servers)
    server = build_server(reactor, settings, certificates, shared)
    registry_states = RegistryStates(
        reactor, time.time, server.registries.is_listed, partial(metrics.count_of, cache_status="STALE")
    )
    silent_servers.set_on_state_changed(registry_states.report)
    history = History(str(settings.state_dir / "history"), metrics, time.time)
    stores = store_views(state, server)
    if server.fleet is not None:
        server.fleet.prefer_owned(cache_space.index, time.time)
    reactor.callWhenRunning(lambda: spawn(server.hosted.store.take_over(), "taking over REGISTRY_STORE"))
    workers = build_workers(reactor, forked_state, settings, server, shared_state, shared, twistd_options)
    listener_service = build_listener_service(reactor, server, workers)
    pulls = build_pulls(reactor, settings, state, server, pins, pull_counts)
    operation_history = OperationHistory(state.open_records())
    doctor = Doctor(
        build_doctor_sources(
            reactor,
            server,
            shared_state,
            authority,
            registry_states,
            operation_history,
            listener_service,
            workers.supervisor,
            tombstones,
            logins,
        ),
        doctor_settings(configuration, configuration, state.warnings),
    )
    apply = partial(
        apply_configuration,
        server,
        workers.supervisor,
        shared_state,
        pulls,
        doctor,
        partial(doctor_settings, configuration, warnings=state.warnings),
        settings,
    )
    server.metrics.set(RELOAD_SUCCESS, 1)
    report_reload = partial(server.metrics.set, RELOAD_SUCCESS)
    reloader = Reloader(read, apply, configuration, server.registries, notifier, server.audit, report_reload)
    configuration_handlers = ConfigurationHandlers(
        lambda: report_configuration(reloader), partial(reload_for_command, reloader)
    )
    operations = Operations(
        reactor, shared_state.locks, server.audit, time.time, operation_history, configuration.variables
    )
    if not has_ca:
        reactor.callWhenRunning(server.audit.record, _DAEMON, "ca", authority.fingerprint, "created")
    resolver = ImageResolver(stores, frozenset(settings.registry_hostname))
    deleter = Deleter(
        reactor,
        server.hosted.disk,
        server.hosted.store,
        cache_space,
        state.open_records(),
        server.audit,
        pulls.is_pinned,
    )
    sessions = Sessions(reactor.seconds)
    sign_in_links = SignInLinks(
        sessions, lambda: server.viewing.sign_in.is_off, proxy_port(settings), settings.registry_hostname[0]
    )

    def load_actions() -> ImageActions:
        from dockerproxy.admin.image_actions import ImageActions

        root = hosted_root(settings, state)
        return ImageActions(reactor, resolver, deleter, operations, server.hosted.disk, root, pulls.pulls)

    explainer = partial(load_explainer, settings, state, server, tombstones, pull_history)
    report = partial(debug_report, server, shared_state, workers)
    facts = partial(daemon_facts, server, workers.supervisor, listener_service, authority)
    control = Control(
        reactor,
        resolver,
        cache_space,
        deleter,
        operations,
        server.hosted_app.rules,
        server.hosted.disk,
        shared_state.ended_logins,
        report,
        facts,
        partial(server.pools.lookups.run, local_user_name),
        time.time,
        {
            **configuration_handlers.handlers(),
            **ControlAPI(shared.overview, server.viewing.live).handlers,
            **pulls.handlers,
            ("GET", "/v1/doctor"): partial(handle_doctor, doctor.report),
            **build_history_handlers(reactor, server.hosted.disk, pull_history, explainer),
            **sign_in_links.handlers,
        },
        pull_history.counts.pulls,
        None if settings.registry_store is None else server.probes[-1],
        hosted_root(settings, state),
    )
    sources = OverviewSources(
        status=control.status,
        fleet=lambda: facts()["fleet"],
        budget=pulls.budget,
        idle_age=tombstones.get_last_idle,
        notices=partial(find_notices, doctor, server.metrics),
        problems=partial(describe_outages, registry_states),
        pinned=pulls.pinned_references,
    )
    overview = build_overview(reactor, settings, stores, state, server, shared, history, pull_history, sources)
    cache_space.call_after_maintenance(overview.renew)
    page_desk = build_page_desk(reactor, sessions, load_actions, explainer)
    shared_state.answer_with(Answers(overview.answer, page_desk, doctor.report_for_page))
    daemon = DaemonService(reactor, settings, state, twistd_options, notifier)
    on_lost = partial(stop_for_another_machine, reactor, notifier)
    for service in (
        *workers.services,  # first, because the fork server forks: no descriptors and no threads may exist yet
        *(build_owner_service(reactor, owner, on_lost) for owner in state.owners),
        cache_space.service(),
        TombstoneService(reactor, tombstones, tombstone_file),
        PullHistoryService(reactor, pull_history),
        server.gauge_service(partial(sample_workers, server.metrics, workers.supervisor)),
        PinGauges(reactor, server.metrics, pulls),
        HistoryService(reactor, history),
        upload_purge_service(reactor, server.registry_disk, server.hosted_tree.uploads, time.time),
        listener_service,
        workers.supervisor,
        operations,
        helpers,
        pulls,
        build_control_socket(reactor, settings, control),
        DebugSignalService(reactor, report),
        SystemdService(reactor, notifier, listener_service.listening, server.registries.status, reloader),
    ):
        daemon.addService(service)  # type: ignore[no-untyped-call]
    log_configuration(settings, state, authority)
    listener_service.listening.addCallback(lambda _: log_ready(server.registries.status))
    return daemon


def build_owner_service(reactor: Any, owner: DirectoryOwner, on_lost: Callable[[str], object]) -> OwnerService:
    """Build the service that keeps other machines away from a shared directory, until the process ends."""
    service = OwnerService(reactor, owner, on_lost)
    reactor.addSystemEventTrigger("after", "shutdown", service.release)
    return service


def stop_for_another_machine(reactor: Any, notifier: Notifier, reason: str) -> None:
    """Stop the daemon, because another one has taken its directory while this machine stood still."""
    log.critical("the daemon stops: {reason}", reason=reason)
    notifier.status(reason)
    # systemd does not restart it on this status. Files are flushed before, because this is added last.
    reactor.addSystemEventTrigger("after", "shutdown", os._exit, os.EX_CONFIG)
    reactor.stop()


def probe_registry_store(reactor: Any, settings: Settings, variables: Mapping[str, str]) -> list[str]:
    """Look at the bucket of REGISTRY_STORE, if that is set. Return sentences for the log.

    Raise `SettingsError` if the bucket can never be used so.
    """
    if settings.registry_store is None:
        return []
    try:
        from dockerproxy.bucket import assembly
    except ImportError as error:
        raise SettingsError(
            f"REGISTRY_STORE needs botocore ({error}); install python3-botocore, or the package's extra s3."
        ) from None
    location, proxy = settings.registry_store, settings.upstream_proxy
    proxies: list[str | None] = [None]
    if proxy is not None and proxy.applies_to(location.endpoint.host):
        proxies = [one.url for one in (proxy, *proxy.others)] + ([None] if proxy.direct else [])
    verify = str(settings.upstream_ca_file) if settings.upstream_ca_file is not None else True
    try:
        return assembly.probe_store(
            reactor,
            location,
            variables,
            read_only=settings.registry_read_only,
            proxies=proxies,
            verify=verify if settings.verify_ssl else False,
        )
    except (assembly.NoCredentials, assembly.StoreRefused) as error:
        raise SettingsError(f"REGISTRY_STORE: {error}.") from None


@frozen
class Workers:
    """The worker processes: `opener` for the ports, and `services` to start before the others.

    `table` has the connections of all processes, also of this one.
    """

    opener: PortOpener
    services: list[IService]
    supervisor: WorkerSupervisor
    table: ConnectionTable


def build_workers(
    reactor: Any,
    forked_state: ForkedState,
    settings: Settings,
    server: ProxyServer,
    shared_state: SharedState,
    shared: SharedServices,
    twistd_options: Any,
) -> Workers:
    """Build the parts that start the workers and hand connections to them. With WORKERS=1 there are no workers."""

    def close_idle(client: str) -> None:
        server.close_idle(client)
        supervisor.close_idle(client)

    trusted_proxies = TrustedProxies(settings.trusted_proxies)
    table = ConnectionTable(
        reactor, forked_state.scoreboard, close_idle, settings.max_connections_per_client, trusted_proxies
    )
    keep_log_observers = jsonlog.logs_to_stdout(twistd_options)
    fork_server = ForkServer(reactor, partial(run_worker, forked_state), keep_log_observers=keep_log_observers)
    supervisor = WorkerSupervisor(
        reactor,
        settings.workers - 1,
        fork_server,
        forked_state.scoreboard,
        table,
        partial(LocalCoordinator, shared_state),
        {TOKEN_BOUND: shared.bindings.add, SERVER_SILENT: shared.silent_servers.add},
        SHUTDOWN_GRACE + _WORKER_EXTRA_GRACE,
        relay_logs=not keep_log_observers,
        on_ended=shared.metrics.count_replacement,
        initial_news=lambda: ((SERVER_SILENT, news) for news in shared.silent_servers.news()),
    )
    opener = EndpointOpener(reactor, lambda listener: ConnectionDispatcher(listener, table, supervisor.dispatch))
    if settings.workers == 1:
        return Workers(opener, [], supervisor, table)
    fork_server.subscribe(supervisor)
    shared.bindings.subscribe(partial(supervisor.broadcast, TOKEN_BOUND))
    shared.silent_servers.subscribe(partial(supervisor.broadcast, SERVER_SILENT))
    return Workers(opener, [fork_server], supervisor, table)


def build_listener_service(reactor: Any, server: ProxyServer, workers: Workers) -> ListenerService:
    """Build the service that listens and drains connections."""
    return ListenerService(
        reactor,
        server.listeners,
        workers.opener,
        server.transfers,
        server.close_upstreams,
        partial(abort_on_repeated_stop, reactor, workers.supervisor),
    )


def abort_on_repeated_stop(reactor: Any, supervisor: WorkerSupervisor, abort_connections: Callable[[], None]) -> None:
    """Make another stop signal abort the connections of all processes."""

    def abort() -> None:
        abort_connections()
        supervisor.abort()

    on_repeated_stop(reactor, abort)


async def apply_configuration(
    server: ProxyServer,
    supervisor: WorkerSupervisor,
    shared_state: SharedState,
    pulls: PullDesk,
    doctor: Doctor,
    settings_of_doctor: Callable[[Configuration], DoctorSettings],
    initial: Settings,
    configuration: Configuration,
) -> list[str]:
    """Apply the settings that may change in all processes. Return a sentence for each worker that failed.

    The others are as in `initial`, the settings of the start. Raise `HtpasswdError` or OSError if they cannot be
    applied here. Then they change nothing.
    """
    settings = settings_in_force(initial, configuration.settings)
    server.reconfigure(settings)  # first, because it may raise
    server.metrics.add_registries(map(registry_label, settings.intercepted))
    configure_provider(shared_state.logins, configuration)
    shared_state.ended_logins.clear()
    pulls.reconfigure(settings.rate_reserve, settings.pin_file)
    doctor.configure(settings_of_doctor(configuration))
    return await supervisor.reload(reloadable_variables(configuration.variables))


def report_configuration(reloader: Reloader) -> dict[str, Any]:
    """Return the settings in force, as a JSON value."""
    report = ConfigReport(reloader.initial, reloader.current)
    return {"settings": report.rows(), "warnings": list(reloader.current.settings.warnings)}


async def reload_for_command(reloader: Reloader, principal: Principal) -> dict[str, Any]:
    """Reload for `principal`, and return the result as a JSON value."""
    return asdict(await reloader.reload(principal))


def daemon_facts(
    server: ProxyServer,
    supervisor: WorkerSupervisor,
    listener_service: ListenerService,
    authority: CertificateAuthority,
) -> dict[str, Any]:
    """Return the version, the processes, the ports and the CA of the daemon, and its fleet, as a JSON value."""
    main_process = {"number": 0, "state": "serving", "pid": os.getpid()}
    return {
        "version": __version__,
        "processes": [main_process, *supervisor.report()],
        "ports": listener_service.report(),
        "ca": {"sha256": authority.fingerprint, "expires": authority.expires_at},
        "fleet": {} if server.fleet is None else server.fleet.members.states(),
    }


def doctor_settings(initial: Configuration, current: Configuration, warnings: Sequence[str]) -> DoctorSettings:
    """Return the settings of the doctor: those in force after the start with `initial` and a reload of `current`.

    `warnings` are other sentences about settings.
    """
    names = ("UPSTREAM_PROXY", "HTTPS_PROXY", "https_proxy")
    proxy_setting = next((name for name in names if initial.variables.get(name, "").strip()), names[0])
    settings = settings_in_force(initial.settings, current.settings)
    return DoctorSettings(settings, (*settings.warnings, *warnings), current.unread, proxy_setting)


def build_doctor_sources(
    reactor: Any,
    server: ProxyServer,
    shared_state: SharedState,
    authority: CertificateAuthority,
    registry_states: RegistryStates,
    operation_history: OperationHistory,
    listener_service: ListenerService,
    supervisor: WorkerSupervisor,
    tombstones: Tombstones,
    logins: LocalLoginProvider,
) -> DoctorSources:
    """Return the parts of the daemon that the doctor's checks read."""
    records = server.state.open_records()

    def limits() -> list[dict[str, Any]]:
        stored = stored_limits(records, time.time())
        return [{"registry": registry_label(registry), **asdict(limit)} for registry, limit in stored]

    return DoctorSources(
        reactor=reactor,
        threads=BoundedThreadPool.start(reactor, "checks of the doctor", DOCTOR_THREADS),
        now=time.time,
        agent=server.agent,
        authorizer=server.authorizer,
        logins=server.pull_through.logins,
        address_check=server.policy.check_upstream,
        resolver=NameResolver(server.pools.lookups, reactor.seconds),
        probes=server.probes,
        keeps_conditions=server.hosted.keeps_conditions,
        authority=authority,
        states=registry_states.report_list,
        refused_logins=shared_state.ended_logins.report_list,
        limits=limits,
        usage=lambda: (shared_state.space.index.total, shared_state.space.index.limit),
        idle_age=tombstones.get_last_idle,
        fleet=lambda: {} if server.fleet is None else server.fleet.members.states(),
        refusing_clients=shared_state.refusing_clients.last_refusals,
        repositories=server.state.cache.repositories,
        helpers=logins.report,
        maintenance=operation_history.last_runs,
        open_ports=lambda: listener_service.open_ports,
        process_ids=lambda: [os.getpid(), *supervisor.process_ids],
    )


def configure_provider(logins: LocalLoginProvider, configuration: Configuration) -> None:
    """Apply CREDENTIAL_HELPERS and DOCKER_CONFIG_FILE, and get the logins of listed registries in the background."""
    logins.configure(configuration.settings.credential_helpers, configuration.docker_config)
    hosts = [registry.host for registry in configuration.settings.registries]
    logins.prefetch(hosts)


async def debug_report(server: ProxyServer, shared_state: SharedState, workers: Workers) -> dict[str, Any]:
    """Return what all processes are doing, as a JSON value."""
    main_process = {"number": 0, "state": "serving", "pid": os.getpid(), **server.debug_report()}
    return {
        "locks": shared_state.locks.report(),
        "refused_logins": shared_state.ended_logins.report_list(),
        "bounds": [
            workers.table.report(),
            *shared_state.space.report_bounds(),
            shared_state.logins.running.report(),
        ],
        "processes": [main_process, *await workers.supervisor.debug()],
    }


class DaemonService(MultiService):
    """The top service. It installs the log in `setServiceParent`, the only moment at which a twistd plugin can."""

    def __init__(
        self, reactor: Any, settings: Settings, state: StateDirectory, twistd_options: Any, notifier: Notifier
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._settings = settings
        self._state = state
        self._twistd_options = twistd_options
        self._notifier = notifier

    def startService(self) -> None:
        self._reactor.callWhenRunning(freeze_startup_objects)
        self._state.write_pid()  # this process may be a fork of the one that opened the directories
        try:
            super().startService()  # type: ignore[no-untyped-call]
        except SystemExit as error:  # a listener failed to open
            self._notifier.status(str(error.code).removeprefix("docker-registry-proxy: "))
            raise

    def setServiceParent(self, parent: Any) -> None:
        if self._settings.log_format == "json":
            jsonlog.install(parent, jsonlog.twistd_stream(self._twistd_options, self._reactor))
        else:
            textlog.install(parent, self._twistd_options, self._reactor)
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


def build_cache_space(
    reactor: Any,
    settings: Settings,
    state: StateDirectory,
    tombstones: Tombstones,
    pins: Pins,
    on_evicted: Callable[[str, int], None],
) -> CacheSpaceManager:
    """Build the manager of the cache's disk space in CACHE_DIR."""
    return CacheSpaceManager(
        reactor,
        state.cache,
        Blobs(state.cache, durable=False),
        limit=settings.cache_max_size,
        max_blob_size=settings.max_blob_size,
        inactive=settings.cache_inactive,
        clock=time.time,
        janitor=Janitor(state.cache, state.open_records(), time.time, tombstones, pins.is_pinned),
        tombstones=tombstones,
        on_evicted=on_evicted,
    )


def sample_workers(metrics: Metrics, supervisor: WorkerSupervisor) -> None:
    """Write into the metrics how many processes serve."""
    metrics.set(WORKERS, 1 + supervisor.serving)


class PinGauges(TimerService):
    """Writes the number and size of pins into the metrics, each minute."""

    def __init__(self, reactor: Any, metrics: Metrics, pulls: PullDesk) -> None:
        async def sample() -> None:
            complete, incomplete, size = await in_thread(reactor, pulls.count_pins)
            metrics.set_pins(complete, incomplete, size)

        super().__init__(_PIN_INTERVAL, lambda: spawn(sample(), "counting the pins"))  # type: ignore[no-untyped-call]
        self.clock = reactor


def hosted_root(settings: Settings, state: StateDirectory) -> str:
    """Return the directory of the hosted registry, or the address of the bucket that it is in."""
    return str(state.registry.root) if settings.registry_store is None else settings.registry_store.address


def build_pulls(
    reactor: Any, settings: Settings, state: StateDirectory, server: ProxyServer, pins: Pins, counts: PullCounts
) -> PullDesk:
    """Build the service that pulls and pins images for the administrator."""
    budget = PullBudget(reactor, server.pull_through.manifests.rate_limits, counts, time.time, settings.rate_reserve)

    def load(desk: PullDesk) -> PullService:
        from dockerproxy.admin.pulls import PullService
        from dockerproxy.cache.image_pull import ImagePuller

        puller = ImagePuller(reactor, server.pull_through, state.cache, server.registries.mirrored, budget)
        return PullService(reactor, puller, pins, state.cache, server.audit, time.time, lambda: desk.pin_file)

    return PullDesk(reactor, load, budget, pins, state.cache, state.open_records(), time.time, settings.pin_file)


def build_control_socket(reactor: Any, settings: Settings, control: Control) -> ControlSocket:
    """Build the control socket in RUNTIME_DIR, which serves the command `dockerproxy`."""
    site = build_site(reactor, settings, control.handle, on_finished=log_access)
    return ControlSocket(reactor, settings.runtime_dir / "control.sock", site)


def log_ready(status: str) -> None:
    """Log that the daemon serves, with its version and the text that `systemctl status` shows, too."""
    log.info("docker-registry-proxy {version} is ready: {status}", version=__version__, status=status)


def log_configuration(settings: Settings, state: StateDirectory, authority: CertificateAuthority) -> None:
    """Log the intercepted registries, the directories, and the CA's fingerprint, which the set-up script compares."""
    log.info("intercepting {hosts}", hosts=", ".join(map(str, [*settings.intercepted, *settings.registry_wildcards])))
    log.info(
        "cache in {cache} (up to {size}), registry in {registry}, CA in {ca}",
        cache=settings.cache_dir, size=format_size(settings.cache_max_size),
        registry=settings.registry_store or settings.registry_dir, ca=settings.ca_crt_file or settings.ca_dir,
    )  # fmt: skip
    if state.registry_file_system is not None:
        log.info(
            "REGISTRY_DIR is on {type}, which may hang, so only the hosted registry waits for it",
            type=state.registry_file_system,
        )
    log.info("the SHA-256 of the CA certificate is {fingerprint}", fingerprint=authority.fingerprint)
