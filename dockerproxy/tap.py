"""`twistd dockerproxy`: the daemon is put together here, and nothing else happens here."""

from __future__ import annotations

import errno
import os
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen
from OpenSSL import SSL
from twisted.application.service import IService, MultiService
from twisted.logger import Logger
from twisted.python import usage

from dockerproxy.admin.control import Control, Operations
from dockerproxy.admin.names import CACHED, HOSTED, Names, Shelf
from dockerproxy.admin.page import Page
from dockerproxy.admin.removing import Remover
from dockerproxy.cache.access import Access
from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.challenges import Challenges
from dockerproxy.cache.flights import Flights
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import Identities
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.pullthrough import PullThrough
from dockerproxy.cache.room import CacheRoom
from dockerproxy.cache.tokens import TokenDesk
from dockerproxy.daemon import jsonlog, priority
from dockerproxy.daemon.accesslog import AccessLog
from dockerproxy.daemon.doors import Door, Doors
from dockerproxy.daemon.local import LocalDoor
from dockerproxy.daemon.notify import Notifier, Supervised
from dockerproxy.daemon.signals import on_repeated_stop
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.channel import Handler, Site, Timeouts
from dockerproxy.http.request import Request
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Digest
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.front import FrontDoor, Interception
from dockerproxy.proxy.issuer import AuthorityError
from dockerproxy.proxy.own import OwnDoor
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.tunnel import TunnelTimeouts
from dockerproxy.registry.doors import Intercepted, Mirror
from dockerproxy.registry.face import Face
from dockerproxy.registry.guard import Guard, OnlyUsers, Open, ReadByAll
from dockerproxy.registry.hosted import Hosted, purging
from dockerproxy.registry.own import ByNamespace, Own
from dockerproxy.registry.push import Push
from dockerproxy.registry.users import HtpasswdError, Users
from dockerproxy.reload import Reload, Served, sentence
from dockerproxy.settings import DOCKER_HUB, Settings, SettingsError, read_env_file
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import Staging
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.importing import Importer
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from dockerproxy.store.secret import kept_secret
from dockerproxy.store.sweep import Sweeper
from dockerproxy.tasks import spawn
from dockerproxy.upstream.client import UpstreamClient
from dockerproxy.upstream.tls import TLSClient
from dockerproxy.upstream.tokens import Tokens
from dockerproxy.upstream.transport import Timeouts as UpstreamTimeouts
from dockerproxy.upstream.transport import Transport

_THREADS = 20  # disk writes of downloads, one each, and name look-ups share them

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
        return make_daemon(reactor, partial(read_settings, options["env-file"]), options.parent or {}, notifier)
    except (SettingsError, AuthorityError, HtpasswdError, OSError) as error:
        why = sentence(error)
    notifier.failed(why)
    priority.complain(f"docker-registry-proxy: {why}")
    raise SystemExit(os.EX_CONFIG)  # which tells systemd that another try would fail as well


def raise_descriptor_limit() -> None:
    """Use all the file descriptors that we may: a client that reads a blob has two, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def read_settings(env_file: str | None) -> Settings:
    """Return the settings as environment and `env_file` have them now. Raise `SettingsError`."""
    return Settings.from_environment(os.environ, read_env_file(env_file) if env_file else {})


def make_daemon(reactor: Any, read: Callable[[], Settings], twistd_options: Any, notifier: Notifier) -> IService:
    """Put the daemon together. Raise `SettingsError`, `AuthorityError`, `HtpasswdError` or OSError."""
    settings = read()
    for warning in settings.warnings:
        log.warn("{warning}", warning=warning)
    authority = CertificateAuthority.open(
        settings.ca_dir,
        certificate_file=settings.ca_crt_file,
        key_file=settings.ca_key_file,
        passphrase=settings.ca_key_passphrase,
        now=time.time,
    )
    for warning in authority.warnings:
        log.warn("{warning}", warning=warning)
    reactor.suggestThreadPoolSize(_THREADS)
    raise_descriptor_limit()
    policy = Policy(settings.allow_clients, settings.tunnel_ports, settings.tunnel_allow, settings.tunnel_deny)
    net = make_net(reactor, settings)
    served = Served(settings)
    cache = make_cache(reactor, settings, served, policy, net.transport)
    face = Face(reactor)
    hosted = make_hosted(reactor, settings, face)
    mirror = Mirror(face, cache.pull_through.registry, served.mirrored, DOCKER_HUB)
    by_namespace = partial(ByNamespace, hosted.answer, mirror.answer, frozenset(settings.registry_hostname))
    own_page = Page(authority.certificate_pem, by_namespace(hosted.answer).answer, proxy_port(settings))
    own = OwnDoor(policy, own_page.answer)
    intercepted = Intercepted(face, cache.pull_through.registry, cache.pull_through, allow_push=settings.allow_push)
    transfers = Transfers()
    front = FrontDoor(
        clock=reactor,
        policy=policy,
        interception=Interception(served.intercepted, authority.context_for, intercepted.answer),
        dial=net.tunnel_dialer,
        transport=net.transport,
        local=Page(authority.certificate_pem, by_namespace(mirror.answer).answer).answer,
        own=own.answer,
        own_names=frozenset(settings.registry_hostname),
        timeouts=TunnelTimeouts(
            settings.proxy_connect_connect_timeout,
            settings.proxy_connect_read_timeout,
            settings.proxy_connect_send_timeout,
        ),
        transfers=transfers,
        log=log_access,
    )
    doors = make_doors(reactor, settings, front, own, authority)
    daemon = Daemon(reactor, settings, twistd_options, notifier)
    daemon.addService(cache.room.service())  # type: ignore[no-untyped-call]
    daemon.addService(purging(reactor, hosted.hosted.store.uploads, time.time))  # type: ignore[no-untyped-call]
    on_repeat = partial(on_repeated_stop, reactor)
    entrance = Doors(reactor, doors, transfers, net.transport.close, on_repeat)
    daemon.addService(entrance)  # type: ignore[no-untyped-call]

    def use(changed: Settings) -> None:
        guard = make_guard(reactor, changed)  # first, for it may fail
        hosted.guard = guard
        served.use(changed)
        cache.use(changed)

    daemon.addService(make_control(reactor, settings, hosted.hosted.store, cache.room))  # type: ignore[no-untyped-call]
    reload = Reload(read, use, settings, served, notifier)
    daemon.addService(Supervised(reactor, notifier, entrance.opened, served.status, reload))  # type: ignore[no-untyped-call]
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
        try:
            super().startService()  # type: ignore[no-untyped-call]
        except SystemExit as end:  # a door that cannot be opened
            self._notifier.failed(str(end.code).removeprefix("docker-registry-proxy: "))
            raise

    def setServiceParent(self, parent: Any) -> None:
        if self._settings.log_format == "json":
            jsonlog.install(parent, jsonlog.twistd_stream(self._twistd_options, self._reactor))
        elif priority.fits(self._twistd_options):
            priority.install(parent)
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


@frozen
class Net:
    """The ways out: HTTP exchanges with upstreams, and connections for tunnels."""

    transport: Transport
    tunnel_dialer: Dialer


def make_net(reactor: Any, settings: Settings) -> Net:
    """Return the ways to other servers. Raise `SettingsError` where UPSTREAM_CA_FILE cannot be used."""

    def dialer(connect_timeout: float) -> Dialer:
        return Dialer(
            reactor,
            overrides={host: (address.name, address.port) for host, address in settings.upstream_addresses.items()},
            ipv6=not settings.disable_ipv6,
            proxy=settings.upstream_proxy,
            connect_timeout=connect_timeout,
        )

    timeouts = UpstreamTimeouts(
        settings.proxy_connect_timeout, settings.proxy_read_timeout, settings.proxy_send_timeout
    )
    try:
        tls = TLSClient(verify=settings.verify_ssl, ca_file=str(settings.upstream_ca_file or "") or None)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    transport = Transport(reactor, dialer(settings.proxy_connect_timeout), tls, timeouts)
    return Net(transport, dialer(settings.proxy_connect_connect_timeout))


def prepared_layout(root: Path) -> Layout:
    """Return the layout below `root`, made if need be and cleared of what a crash left. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    layout = Layout(root)
    Staging(layout.staging).empty()
    return layout


@frozen
class Cache:
    """The pull-through cache, the room that it lives in, and the logins that it shows upstream."""

    pull_through: PullThrough
    room: CacheRoom
    tokens: Tokens

    def use(self, settings: Settings) -> None:
        """Show the logins of `settings` from now on, and recall what is known of its registries."""
        self.tokens.use(settings.auth_registries)
        self.pull_through.challenges.recall(settings.registries)


def make_cache(reactor: Any, settings: Settings, served: Served, policy: Policy, transport: Transport) -> Cache:
    """Return the cache in CACHE_DIR, what a crash left there cleared away. Raises OSError."""
    layout = prepared_layout(settings.cache_dir)
    records = Records(settings.cache_dir / "records")
    records.empty_staging()
    identities = Identities.open(settings.cache_dir / "secret")
    blobs, links = Blobs(layout, durable=False), Links(layout, durable=False)
    room = CacheRoom(
        reactor, layout, blobs, limit=settings.cache_max_size, inactive=settings.cache_inactive, clock=time.time
    )
    tokens = Tokens(transport, time.time, policy.check_upstream, settings.auth_registries)
    upstream = UpstreamClient(transport, tokens, policy.check_upstream)
    challenges = Challenges(transport, records, served.intercepted, tokens.remember, time.time)
    challenges.recall(settings.registries)
    access = Access(records, time.time)
    freshness = Freshness(
        settings.enable_manifest_cache,
        settings.manifest_cache_primary_regex,
        settings.manifest_cache_primary_time,
        settings.manifest_cache_secondary_regex,
        settings.manifest_cache_secondary_time,
        settings.manifest_cache_default_time,
    )

    def keep(digest: Digest, size: int) -> None:
        spawn(room.count(digest, size), f"making room for {digest}")

    manifests = CachedManifests(reactor, upstream, blobs, links, records, access, freshness, clock=time.time, keep=keep)
    flights = Flights(reactor, upstream, room, Ingests(layout, blobs, records))
    return Cache(
        PullThrough(
            upstream,
            identities,
            challenges,
            TokenDesk(
                transport,
                identities,
                records,
                lambda host: None if host in served.intercepted else policy.check_upstream,
                time.time,
            ),
            manifests,
            CachedBlobs(reactor, upstream, blobs, links, flights, access, room),
            served.mirrored.values(),
            tokens.effective_login if settings.share_auth_registries else lambda registry: None,
            time.time,
        ),
        room,
        tokens,
    )


def make_hosted(reactor: Any, settings: Settings, face: Face) -> Own:
    """Return the hosted registry in REGISTRY_DIR, what a crash left there cleared away. Raises OSError, ValueError."""
    store = HostedStore.below(prepared_layout(settings.registry_dir))
    hosted = Hosted(reactor, store, Push(reactor, store))
    return Own(face, hosted, make_guard(reactor, settings))


def make_guard(reactor: Any, settings: Settings) -> Guard:
    """Return who asks for logins to the hosted registry, as HTPASSWD_FILE and ANONYMOUS_PULL say. Raises ValueError."""
    if settings.htpasswd_file is None:
        return Open()
    realm = settings.registry_hostname[0]
    secret = kept_secret(settings.registry_dir / "secret")
    users = Users(reactor, settings.htpasswd_file, secret, time.time)
    return ReadByAll(users, realm, secret, time.time) if settings.anonymous_pull else OnlyUsers(users, realm)


def make_control(reactor: Any, settings: Settings, store: HostedStore, room: CacheRoom) -> LocalDoor:
    """Return what answers the commands of `dockerproxy`, on the socket in RUNTIME_DIR."""
    shelves = [Shelf(HOSTED, store.layout), Shelf(CACHED, Layout(settings.cache_dir))]
    names = Names(shelves, frozenset(settings.registry_hostname), {"docker.io": str(DOCKER_HUB)})
    control = Control(
        reactor,
        names,
        room,
        Remover(reactor, store, room, Records(settings.cache_dir / "records")),
        Sweeper(reactor, store),
        Importer(reactor, store),
        Operations(time.time),
        time.time,
    )
    site = make_site(reactor, settings, control.answer)
    return LocalDoor(reactor, settings.runtime_dir / "control.sock", site)


def proxy_port(settings: Settings) -> int:
    """Return the port that the first of PROXY_LISTEN has; the usual one where it does not say (a socket handed in)."""
    found = re.match(r"tcp6?:(?:.*?port=)?([0-9]+)", settings.proxy_listen[0])
    return int(found[1]) if found else 3128


def make_doors(
    reactor: Any, settings: Settings, front: FrontDoor, own: OwnDoor, authority: CertificateAuthority
) -> list[Door]:
    """Return the doors of the settings, not open yet."""

    async def handle(request: Request) -> None:
        await front.handle(proxy, request)

    certificates = authority.context_by_name(frozenset(settings.registry_hostname))
    proxy = make_site(reactor, settings, handle)
    return [
        Door("PROXY_LISTEN", settings.proxy_listen, proxy),
        Door(
            "REGISTRY_LISTEN", settings.registry_listen, make_site(reactor, settings, own.answer, lambda: certificates)
        ),
        Door("REGISTRY_HTTP_LISTEN", settings.registry_http_listen, make_site(reactor, settings, own.answer)),
    ]


def make_site(reactor: Any, settings: Settings, handler: Handler, tls: Callable[[], SSL.Context] | None = None) -> Site:
    """Return a site whose requests `handler` answers, over TLS by the contexts of `tls` if given."""
    timeouts = Timeouts(
        settings.keepalive_timeout, settings.client_header_timeout, settings.client_body_timeout, settings.send_timeout
    )
    return Site(reactor, handler, timeouts=timeouts, finished=log_access, tls=tls)


_access_log = AccessLog()


def log_access(request: Request, seconds: float) -> None:
    """Log one request."""
    _access_log.record(
        request.client,
        request.method,
        request.host,
        request.path,
        request.status,
        request.size,
        seconds,
        request.verdict,
    )


def announce(settings: Settings) -> None:
    """Say what is intercepted and where things are kept."""
    log.info("intercepting {hosts}", hosts=", ".join(str(registry) for registry in settings.intercepted))
    log.info(
        "cache in {cache} (up to {size} bytes), registry in {registry}, CA in {ca}",
        cache=settings.cache_dir, size=settings.cache_max_size,
        registry=settings.registry_dir, ca=settings.ca_crt_file or settings.ca_dir,
    )  # fmt: skip
