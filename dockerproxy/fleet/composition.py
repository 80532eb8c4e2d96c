"""The composition of the parts that make a daemon a member of a fleet. It is imported only if FLEET is set."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from ipaddress import ip_address
from typing import Any

from attrs import field, frozen

from dockerproxy.cache.pullthrough import PullThrough
from dockerproxy.cache.upstream import RegistryClient
from dockerproxy.errors import RegistryError
from dockerproxy.fleet.directory import Directory, FleetInvalid, Identity, IsOwnAddress, MemberResolver
from dockerproxy.fleet.door import FleetDoor, InterceptedDoor, MirrorDoor, OpenRegistry
from dockerproxy.fleet.hop import HopProofs
from dockerproxy.fleet.members import Members
from dockerproxy.fleet.relays import Relays
from dockerproxy.fleet.transport import HTTPMemberTransport
from dockerproxy.fleet.uploads import UPLOADS_HOST, SessionDoor, SessionRouter
from dockerproxy.fleet.upstream import FleetUpstream, MemberClient, NoUpstream, OwnerUpstream, PeerMeter
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.request import Request
from dockerproxy.http.site import Site
from dockerproxy.oci.names import Host
from dockerproxy.store.eviction import COPY_AGE, LRUEntry
from dockerproxy.store.lru_index import LRUIndex
from dockerproxy.store.records import Records
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.tls import ClientContext

__all__ = ["UPLOADS_HOST", "Fleet", "FleetInvalid", "compose_fleet"]


@frozen
class Fleet:
    """The parts of a member. `sites` are those of its listeners."""

    members: Members
    waits: Waits
    relays: Relays
    proofs: HopProofs
    transport: HTTPMemberTransport
    directory: Directory
    meter: PeerMeter
    timeout: float
    client: MemberClient
    sites: list[Site] = field(factory=list)

    def start(self, reactor: Any, sites: Iterable[Site]) -> None:
        """Serve members at `sites`. Begin to look for members when the reactor runs."""
        self.sites.extend(sites)
        reactor.callWhenRunning(self.directory.start)

    def door(
        self,
        pull_through: PullThrough,
        cached_only: PullThrough,
        mirror: MirrorDoor,
        intercepted: InterceptedDoor,
        mirror_for: Callable[[OpenRegistry], MirrorDoor],
        intercepted_for: Callable[[OpenRegistry], InterceptedDoor],
    ) -> FleetDoor:
        """Return the door for members. `pull_through` and `cached_only` serve them; see `FleetDoor`."""
        return FleetDoor(
            self.directory.clock, self.members, self.waits, self.relays, self.proofs, pull_through, cached_only,
            self.meter, self.timeout, self._is_draining,
            mirror, intercepted, mirror_for, intercepted_for,
        )  # fmt: skip

    def session_router(self) -> SessionRouter:
        """Return what passes requests for upload sessions on to other members."""
        return SessionRouter(self.members, self.transport, self.meter)

    def session_door(
        self, handle_hosted: Callable[[Request], Awaitable[None]], check: Callable[[Request], None]
    ) -> SessionDoor:
        """Return the door for such requests of other members; see `SessionDoor`."""
        return SessionDoor(self.directory.clock, handle_hosted, check, self.meter, self.timeout)

    def own_name(self) -> str:
        """Return the name of this member, "" while it is not in the list."""
        return self.members.me

    def prefer_owned(self, index: LRUIndex, clock: Callable[[], float]) -> None:
        """Make copies of blobs that other members own leave the cache first. `clock` returns POSIX time."""

        def is_copy(text: str, entry: LRUEntry) -> bool:
            return clock() - entry[1] > COPY_AGE and self.members.is_copy(text)

        index.evict_first(is_copy)

    def _is_draining(self) -> bool:
        return any(site.draining for site in self.sites)

    def content_client(self, upstream: RegistryClient) -> FleetUpstream:
        """Return the client of the cache for content, which asks members before `upstream`."""
        return FleetUpstream(self.owner_client(upstream), self.members, self.client)

    def owner_client(self, upstream: RegistryClient) -> OwnerUpstream:
        """Return the client for content that this daemon owns, over `upstream`."""
        return OwnerUpstream(upstream, self.members, self.client)

    @property
    def no_upstream(self) -> NoUpstream:
        """The client of the cache that serves only what is there."""
        return NoUpstream()


def compose_fleet(
    reactor: Any,
    listed: tuple[Host, ...],
    address: Host | None,
    ports: frozenset[int],
    timeout: float,
    fan_out: int,
    *,
    is_own_address: IsOwnAddress,
    resolver: MemberResolver,
    ca_certificate: bytes,
    secret: bytes,
    records: Records | None,
    meter: PeerMeter,
    parser: ContentParser,
    max_blob_size: int,
) -> Fleet:
    """Return the parts of a member. Raise `FleetInvalid`.

    `records` are given if several processes serve. `ca_certificate` (PEM) is that of the CA that all members have, and
    `secret` is derived from its key.
    `max_blob_size` is that of a blob that the cache takes, in bytes.
    """
    identity = Identity(address, ports, is_own_address)
    members = Members(reactor.seconds)
    tls = ClientContext.trusting(ca_certificate)
    proofs = HopProofs(secret)
    source_address = partial(_source_address, members, is_own_address)
    transport = HTTPMemberTransport(reactor, tls, timeout, source_address, proofs)
    directory = Directory(reactor, listed, identity, resolver, members, transport.use)
    directory.check(listed)
    relays = Relays(fan_out, reactor.seconds)
    waits = Waits(reactor, records)
    client = MemberClient(reactor, members, transport, waits, meter, parser, max_blob_size)
    return Fleet(members, waits, relays, proofs, transport, directory, meter, timeout, client)


def _source_address(members: Members, is_own_address: Callable[[Any], bool]) -> str | None:
    """Return the address to connect from, so that members know this one; None if another machine translates it."""
    if not members.me:
        return None
    name = Host.parse(members.me).name
    try:
        return name if is_own_address(ip_address(name)) else None
    except RegistryError:  # the kernel cannot be asked: it chooses the address
        return None
