"""`twistd dockerproxy`: the daemon is put together here, and nothing else happens here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from twisted.application.service import IService, MultiService
from twisted.logger import Logger
from twisted.python import usage

from dockerproxy.admin.control import Control, ExclusiveJobs
from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, StoreView
from dockerproxy.assembly import RECORDS, Common, log_access, make_serving, make_site, open_authority, prepare
from dockerproxy.cache.identity import Bindings
from dockerproxy.cache.room import CacheRoom
from dockerproxy.daemon import jsonlog, textlog
from dockerproxy.daemon.control_socket import ControlSocket
from dockerproxy.daemon.gc_tuning import freeze_startup_objects
from dockerproxy.daemon.listener_service import SHUTDOWN_GRACE, ListenerService
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.daemon.signals import on_repeated_stop
from dockerproxy.daemon.systemd import Notifier, SystemdService
from dockerproxy.proxy.issuer import AuthorityError
from dockerproxy.registry.hosted import purging
from dockerproxy.registry.users import HtpasswdError
from dockerproxy.reload import Reload, changing, sentence
from dockerproxy.settings import DOCKER_HUB, Settings, SettingsError, read_env_file
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.importing import Importer
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from dockerproxy.store.sweep import Sweeper
from dockerproxy.tasks import Turns
from dockerproxy.worker import Inherited, run_worker
from dockerproxy.workers.crew import Crew
from dockerproxy.workers.desk import Desk, FirstRoom, Reservations
from dockerproxy.workers.forking import ForkServer
from dockerproxy.workers.tally import Tally

_MORE_GRACE = 2.0  # seconds after the end of their own grace that workers have to end

log = Logger()


class Options(usage.Options):
    """The command line of `twistd dockerproxy`."""

    synopsis = "twistd [options] dockerproxy [--env-file FILE]"
    longdesc = "A caching proxy for Docker registries. Its settings are environment variables: see the README."
    optParameters: ClassVar = [["env-file", None, None, "A .env file with settings; the environment wins over it."]]


def makeService(options: Options) -> IService:
    """Return the daemon, not started; say one sentence and SystemExit where the settings do not let it be made."""
    from twisted.internet import reactor

    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    try:
        return make_daemon(reactor, options["env-file"], options.parent or {}, notifier)
    except (SettingsError, AuthorityError, HtpasswdError, OSError) as error:
        why = sentence(error)
    notifier.status(why)
    textlog.print_error(f"docker-registry-proxy: {why}")
    raise SystemExit(os.EX_CONFIG)  # which tells systemd that another try would fail as well


def read_settings(env_file: str | None) -> Settings:
    """Return the settings as environment and `env_file` have them now. Raise `SettingsError`."""
    return Settings.from_environment(os.environ, read_env_file(env_file) if env_file else {})


def variables(env_file: str | None) -> dict[str, str]:
    """Return what `read_settings` reads, as an environment. Raise `SettingsError`."""
    return {**(read_env_file(env_file) if env_file else {}), **os.environ}


def make_daemon(reactor: Any, env_file: str | None, twistd_options: Any, notifier: Notifier) -> IService:
    """Put the daemon together. Raise `SettingsError`, `AuthorityError`, `HtpasswdError` or OSError."""
    settings = read_settings(env_file)
    authority = open_authority(settings)
    for warning in (*settings.warnings, *authority.warnings):
        log.warn("{warning}", warning=warning)
    prepare(settings)
    room = make_room(reactor, settings)
    reservations, turns, bindings = Reservations(room), Turns(), Bindings()
    several, metrics = settings.workers > 1, Metrics.make(settings.workers)
    common = Common(FirstRoom(reservations), metrics.for_process(0), turns, bindings, several)
    serving = make_serving(reactor, settings, authority, common)
    store = serving.hosted.hosted.store
    writes = jsonlog.logs_to_stdout(twistd_options)
    tally = Tally.make(settings.workers)
    inherited = Inherited(reactor, variables(env_file), authority, tally, metrics)
    forks = ForkServer(reactor, partial(run_worker, inherited), writes=writes)
    desk = partial(Desk, reservations, turns)
    crew = Crew(
        reactor, settings.workers - 1, forks, tally, desk, bindings, SHUTDOWN_GRACE + _MORE_GRACE, relayed=not writes
    )

    def use(changed: Settings) -> None:
        serving.use(changed)
        crew.reload(changing(variables(env_file)))

    def hurry(entrance: Callable[[], None]) -> None:
        entrance()
        crew.hurry()

    entrance = ListenerService(
        reactor,
        crew.doors(serving.doors),
        serving.transfers,
        serving.close,
        lambda call: on_repeated_stop(reactor, partial(hurry, call)),
    )
    reload = Reload(partial(read_settings, env_file), use, settings, serving.served, notifier)
    daemon = Daemon(reactor, settings, twistd_options, notifier)
    for service in (
        *([forks] if several else []),  # first, while nothing is open
        room.service(),
        purging(reactor, store.uploads, time.time),
        entrance,
        crew,
        make_control(reactor, settings, store, room),
        SystemdService(reactor, notifier, entrance.listening, serving.served.status, reload),
    ):
        daemon.addService(service)  # type: ignore[no-untyped-call]
    announce(settings)
    return daemon


class Daemon(MultiService):
    """The top service. It sets up the log at the one moment when twistd lets a plugin do so."""

    def __init__(self, reactor: Any, settings: Settings, twistd_options: Any, notifier: Notifier) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._settings = settings
        self._twistd_options = twistd_options
        self._notifier = notifier

    def startService(self) -> None:
        self._reactor.callWhenRunning(freeze_startup_objects)
        try:
            super().startService()  # type: ignore[no-untyped-call]
        except SystemExit as end:  # a door that cannot be opened
            self._notifier.status(str(end.code).removeprefix("docker-registry-proxy: "))
            raise

    def setServiceParent(self, parent: Any) -> None:
        if self._settings.log_format == "json":
            jsonlog.install(parent, jsonlog.twistd_stream(self._twistd_options, self._reactor))
        else:
            textlog.install(parent, self._twistd_options)
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


def make_room(reactor: Any, settings: Settings) -> CacheRoom:
    """Return the room that the cache has in CACHE_DIR."""
    layout = Layout(settings.cache_dir)
    return CacheRoom(
        reactor,
        layout,
        Blobs(layout, durable=False),
        limit=settings.cache_max_size,
        inactive=settings.cache_inactive,
        clock=time.time,
    )


def make_control(reactor: Any, settings: Settings, store: HostedStore, room: CacheRoom) -> ControlSocket:
    """Return what answers the commands of `dockerproxy`, on the socket in RUNTIME_DIR."""
    shelves = [StoreView(HOSTED, store.layout), StoreView(CACHED, Layout(settings.cache_dir))]
    names = ImageResolver(shelves, frozenset(settings.registry_hostname), {"docker.io": str(DOCKER_HUB)})
    control = Control(
        reactor,
        names,
        room,
        Deleter(reactor, store, room, Records(settings.cache_dir / RECORDS)),
        Sweeper(reactor, store),
        Importer(reactor, store),
        ExclusiveJobs(time.time),
        time.time,
    )
    site = make_site(reactor, settings, control.handle, log_access)
    return ControlSocket(reactor, settings.runtime_dir / "control.sock", site)


def announce(settings: Settings) -> None:
    """Say what is intercepted and where things are kept."""
    log.info("intercepting {hosts}", hosts=", ".join(str(registry) for registry in settings.intercepted))
    log.info(
        "cache in {cache} (up to {size} bytes), registry in {registry}, CA in {ca}",
        cache=settings.cache_dir, size=settings.cache_max_size,
        registry=settings.registry_dir, ca=settings.ca_crt_file or settings.ca_dir,
    )  # fmt: skip
