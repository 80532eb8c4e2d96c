"""`twistd dockerproxy`: the daemon is put together here, and nothing else happens here."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen
from twisted.application.service import IService, MultiService
from twisted.logger import Logger
from twisted.python import usage

from dockerproxy.admin.page import Page
from dockerproxy.cache.access import Access
from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.challenges import Challenges
from dockerproxy.cache.flights import Flights
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import Identities
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.pullthrough import PullThrough
from dockerproxy.cache.room import CacheRoom
from dockerproxy.cache.tokens import TokenDesk
from dockerproxy.daemon import jsonlog
from dockerproxy.daemon.accesslog import AccessLog
from dockerproxy.daemon.doors import Door, Doors
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.channel import Site, Timeouts
from dockerproxy.http.request import Request
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Digest
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.front import FrontDoor, Interception
from dockerproxy.proxy.issuer import AuthorityError
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.tunnel import TunnelTimeouts
from dockerproxy.registry.doors import Intercepted, Mirror
from dockerproxy.registry.face import Face
from dockerproxy.settings import DOCKER_HUB, Settings, SettingsError, read_env_file
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import Staging
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
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
    """Return the daemon, not started; SystemExit with one sentence where the settings do not let it be made."""
    from twisted.internet import reactor

    try:
        file = read_env_file(options["env-file"]) if options["env-file"] else {}
        settings = Settings.from_environment(os.environ, file)
        return make_daemon(reactor, settings, options.parent or {})
    except (SettingsError, AuthorityError) as error:
        raise SystemExit(f"docker-registry-proxy: {error}") from None
    except ValueError as error:
        raise SystemExit(f"docker-registry-proxy: UPSTREAM_CA_FILE: {error}") from None
    except OSError as error:
        raise SystemExit(f"docker-registry-proxy: {error.filename}: {error.strerror}.") from None


def make_daemon(reactor: Any, settings: Settings, twistd_options: Any) -> IService:
    """Put the daemon together. Raise `AuthorityError`, OSError, or ValueError for UPSTREAM_CA_FILE."""
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
    policy = Policy(settings.allow_clients, settings.tunnel_ports, settings.tunnel_allow, settings.tunnel_deny)
    net = make_net(reactor, settings)
    cache = make_cache(reactor, settings, policy, net.transport)
    face = Face(reactor)
    intercepted = Intercepted(face, cache.pull_through.registry, cache.pull_through, allow_push=settings.allow_push)
    mirror = Mirror(face, cache.pull_through.registry, mirrored(settings), DOCKER_HUB)
    page = Page(authority.certificate_pem, mirror.answer)
    interception = Interception(
        {registry.host: registry for registry in settings.intercepted}, authority.context_for, intercepted.answer
    )
    transfers = Transfers()
    front = FrontDoor(
        clock=reactor,
        policy=policy,
        interception=interception,
        dial=net.tunnel_dialer,
        transport=net.transport,
        local=page.answer,
        own_names=frozenset(settings.registry_hostname),
        timeouts=TunnelTimeouts(
            settings.proxy_connect_connect_timeout,
            settings.proxy_connect_read_timeout,
            settings.proxy_connect_send_timeout,
        ),
        transfers=transfers,
        log=log_access,
    )
    site = make_site(reactor, settings, front)
    daemon = Daemon(reactor, settings, twistd_options)
    doors = [Door("PROXY_LISTEN", settings.proxy_listen, site)]
    daemon.addService(cache.room.service())  # type: ignore[no-untyped-call]
    daemon.addService(Doors(reactor, doors, transfers, net.transport.close))  # type: ignore[no-untyped-call]
    announce(settings)
    return daemon


class Daemon(MultiService):
    """The top service. It sets up LOG_FORMAT=json at the one moment when twistd lets a plugin do so."""

    def __init__(self, reactor: Any, settings: Settings, twistd_options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._settings = settings
        self._twistd_options = twistd_options

    def setServiceParent(self, parent: Any) -> None:
        if self._settings.log_format == "json":
            jsonlog.install(parent, jsonlog.twistd_stream(self._twistd_options, self._reactor))
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


@frozen
class Net:
    """The ways out: HTTP exchanges with upstreams, and connections for tunnels."""

    transport: Transport
    tunnel_dialer: Dialer


def make_net(reactor: Any, settings: Settings) -> Net:
    """Return the ways to other servers."""

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
    tls = TLSClient(verify=settings.verify_ssl, ca_file=str(settings.upstream_ca_file or "") or None)
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
    """The pull-through cache, and the room that it lives in."""

    pull_through: PullThrough
    room: CacheRoom


def make_cache(reactor: Any, settings: Settings, policy: Policy, transport: Transport) -> Cache:
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
    hosts = frozenset(registry.host for registry in settings.intercepted)
    challenges = Challenges(transport, records, hosts, tokens.remember, time.time)
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
    flights = Flights(reactor, upstream, room, lambda digest: Ingest.open(layout, digest))
    return Cache(
        PullThrough(
            upstream,
            identities,
            challenges,
            TokenDesk(
                transport,
                identities,
                records,
                lambda host: None if host in hosts else policy.check_upstream,
                time.time,
            ),
            manifests,
            CachedBlobs(reactor, upstream, blobs, links, flights, access, room),
            settings.registries,
            tokens.effective_login if settings.share_auth_registries else lambda registry: None,
            time.time,
        ),
        room,
    )


def mirrored(settings: Settings) -> dict[str, Any]:
    """Return the registries by what `?ns=` may call them; Docker Hub has a name that is none of its hosts."""
    return {str(registry.host): registry for registry in settings.registries} | {"docker.io": DOCKER_HUB}


def make_site(reactor: Any, settings: Settings, front: FrontDoor) -> Site:
    """Return the site of the proxy port."""
    timeouts = Timeouts(
        settings.keepalive_timeout, settings.client_header_timeout, settings.client_body_timeout, settings.send_timeout
    )

    async def handle(request: Request) -> None:
        await front.handle(site, request)

    site = Site(reactor, handle, timeouts=timeouts, finished=log_access)
    return site


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
        "cache in {cache} (up to {size} bytes), CA in {ca}",
        cache=settings.cache_dir, size=settings.cache_max_size, ca=settings.ca_crt_file or settings.ca_dir,
    )  # fmt: skip
