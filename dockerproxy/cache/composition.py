"""The composition of the cache: which parts it has, and which of them each part uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attrs import frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.access import GRANT_TTL, Access
from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.board import BoardPart
from dockerproxy.cache.challenges import Challenges, OnChallenge
from dockerproxy.cache.companions import Companions
from dockerproxy.cache.downloads import DownloadLimits, Downloads
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import Bindings, Identities
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.pins import PinnedContent, pin_records
from dockerproxy.cache.possession import PossessionCheck
from dockerproxy.cache.pullthrough import PullThrough
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.cache.space import CacheSpace
from dockerproxy.cache.token_endpoint import TokenEndpoint
from dockerproxy.cache.upstream import RegistryClient, UpstreamAgent
from dockerproxy.concurrency import KeyedLock, spawn
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.names import Digest, Host, Registry
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.shared_logins import SharedLogins

_MAX_PRIVATE_REPOSITORIES = 10_000


@frozen(kw_only=True)
class CacheServices:
    """The services that the parts of a cache use. `clock` returns POSIX time.

    `on_file_created` is called after each new link, `on_pull` with the registry and repository of each manifest that
    upstream has sent, and `on_limited` with the registry of each pull that is refused here because of its rate limit.
    `multi_process` is true if other processes use the same files; then they share `bindings`, `locks` and `space` too.
    `upstream` is the client for registries, and `content` the one by which manifests and blobs are fetched; in a fleet,
    that one asks the other members first.
    """

    reactor: Any
    clock: Callable[[], float]
    layout: Layout
    records: Records
    on_file_created: Callable[[], object]
    on_pull: Callable[[str, str], None]
    on_limited: Callable[[Registry], object]
    space: CacheSpace
    secret: bytes
    bindings: Bindings
    locks: KeyedLock
    parser: ContentParser
    tombstones: Tombstones
    multi_process: bool
    upstream: RegistryClient
    content: RegistryClient
    agent: UpstreamAgent
    board: BoardPart


@frozen(kw_only=True)
class CachePolicy:
    """The decisions about a cache that settings make.

    `registries` is the live table of served registries, `intercepted` that of intercepted hosts. `on_challenges` is
    called with the challenges of a registry. `address_check` is that of realms on hosts that are not intercepted, and
    `allows_client_to` returns whether clients may connect to a server through this proxy. `logins` serve every client.
    `evicted_bytes` bounds evicted blobs that are still read.
    """

    registries: Iterable[Registry]
    intercepted: Mapping[Host, Registry]
    on_challenges: OnChallenge
    address_check: AddressCheck | None
    allows_client_to: Callable[[Registry], bool]
    logins: SharedLogins
    freshness: Freshness
    download_limits: DownloadLimits
    evicted_bytes: int


@frozen
class CacheParts:
    """The parts of a cache. `pull_through` is the one that serves requests."""

    blobs: Blobs
    links: Links
    access: Access
    ingests: Ingests
    open_readers: OpenReaders
    board: BoardPart
    pull_through: PullThrough


def compose_cache(services: CacheServices, policy: CachePolicy) -> CacheParts:
    """Return a cache with new parts, which share nothing with those of another one but files and `services`."""
    reactor, content, agent, clock = services.reactor, services.content, services.agent, services.clock
    records, space = services.records, services.space
    identities = Identities(services.secret, clock, services.bindings)
    blobs = Blobs(services.layout, durable=False, clock=clock)
    links = Links(services.layout, False, clock, services.on_file_created)
    access = Access(records, clock, services.multi_process)
    companions = Companions(records, links, access)
    rate_limits, pinned = RateLimits(records, clock, services.on_limited), PinnedContent(pin_records(services.layout))
    ingests = Ingests(services.layout, blobs, records, services.multi_process)
    open_readers = OpenReaders(reactor, policy.evicted_bytes)
    downloads = Downloads(reactor, content, space, ingests, open_readers, policy.download_limits, services.board)

    def address_check_for(host: Host) -> AddressCheck | None:
        return None if host in policy.intercepted else policy.address_check

    def record_manifest(digest: Digest, size: int, client: str, registry: str) -> None:
        spawn(space.record(digest, size, client, registry), f"recording {digest} in the cache space")

    manifests = CachedManifests(
        reactor,
        content,
        blobs,
        links,
        records,
        access,
        companions,
        policy.freshness,
        rate_limits,
        pinned,
        services.locks,
        services.parser,
        services.tombstones,
        clock=clock,
        on_stored=record_manifest,
        on_used=space.touch,
        on_pull=services.on_pull,
    )
    challenges = Challenges(
        agent, records, policy.intercepted, policy.on_challenges, policy.allows_client_to, address_check_for, clock
    )
    possession = PossessionCheck(reactor, content, blobs, services.secret)
    pull_through = PullThrough(
        services.upstream,
        identities,
        challenges,
        TokenEndpoint(agent, identities, records, address_check_for, clock),
        manifests,
        companions,
        CachedBlobs(
            reactor,
            content,
            blobs,
            links,
            downloads,
            access,
            space,
            open_readers,
            possession,
            services.tombstones,
            pinned,
        ),
        services.parser,
        policy.registries,
        policy.logins,
        BoundedDict(_MAX_PRIVATE_REPOSITORIES, ttl=GRANT_TTL, clock=clock),
    )
    return CacheParts(blobs, links, access, ingests, open_readers, services.board, pull_through)
