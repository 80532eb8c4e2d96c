"""The door for other members of the fleet: their requests are served from upstream and the cache, never from a member.

A request counts as a member's if it has the fields of `hop` and comes from the address of a member. It has no more
rights than one of a client. It is served by a cache of its own over the same files. Its client asks upstream only.
Downloads of the two caches are shared as those of two processes are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import ip_address
from typing import Any, Protocol

from attrs import evolve, field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.pullthrough import CachedRegistry, PullThrough
from dockerproxy.errors import (
    BlobUnknown,
    DestinationForbidden,
    ManifestUnknown,
    NotCached,
    RangeInvalid,
    RegistryError,
    ServiceOverloaded,
    Unauthorized,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from dockerproxy.fleet.hop import (
    ANSWER_FIELD,
    FIELD,
    OWN_WORD,
    PROOF_FIELD,
    RELAY_FIELD,
    UPSTREAM_WORD,
    Hop,
    HopKind,
    HopLogin,
    HopProofs,
    parse_hop,
)
from dockerproxy.fleet.members import Members, blob_key, repository_key
from dockerproxy.fleet.progress import reporting_progress
from dockerproxy.fleet.question import asks_for_rest
from dockerproxy.fleet.relays import Relays
from dockerproxy.fleet.upstream import MAX_PROGRESS, PeerMeter
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.request import Request
from dockerproxy.http.security_fields import SECURITY_FIELDS
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.names import Digest, Host, Reference, Registry, Repository
from dockerproxy.oci.routes import Kind, route
from dockerproxy.registry.upstream import Namespace, UpstreamRegistry
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential

_FIELD = FIELD.lower()
_MAX_DIFFERENCES = 1000  # settings of members
_DIFFERENCE_TTL = 3600.0  # seconds until one is logged again
_UPSTREAM_WORDS = (UpstreamError, UpstreamRefused, Unauthorized, ManifestUnknown, BlobUnknown, RangeInvalid)

log = Logger()


class MirrorDoor(Protocol):
    """Responds to a request to the mirror; see `registry.intercepted.Mirror`."""

    def handle(self, request: Request, namespace: Namespace | None) -> Awaitable[None]: ...


class InterceptedDoor(Protocol):
    """Responds to a request to a registry under its own name; see `registry.intercepted.Intercepted`."""

    def handle(self, server: Registry, request: Request) -> Awaitable[None]: ...


OpenRegistry = Callable[[Registry, "str | None", str], UpstreamRegistry]
"""Returns the registry for a client; see `registry.intercepted`."""


@frozen
class MemberRegistry(CachedRegistry):
    """One registry as seen by another member, which names the login that it asks for."""

    hop: Hop = field(kw_only=True)
    waits: Waits = field(kw_only=True)
    differences: BoundedDict[str, bool] = field(kw_only=True)

    @property
    def credential(self) -> Credential:
        """The credential that the member asks for. Raise `NotCached` if this one has no such login."""
        if self.hop.login is HopLogin.NONE:
            return Anonymous()
        if self.hop.login is HopLogin.CLIENT and self.authorization is not None:
            return ClientCredential(self.authorization)
        login = self.cache.logins.login_for(self.registry) if self.hop.login is HopLogin.CONFIGURED else None
        if login is None:
            self.report_difference(f"a login for {self.registry} (AUTH_REGISTRIES)")
            raise NotCached(f"this member has no login for {self.registry}")
        return login

    def report_difference(self, setting: str) -> None:
        """Warn once an hour that the asking member has `setting`, and this one has not."""
        if setting not in self.differences:
            self.differences[setting] = True
            log.warn(
                "the member {member} asks with {setting}, which this daemon does not have; such settings must be the"
                " same at all members",
                member=self.hop.sender, setting=setting,
            )  # fmt: skip

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        """Return a manifest; see `CachedRegistry.manifest`. Raise `LoopDetected`."""
        work = CachedRegistry.manifest(self, name, reference, accept, head=head)
        return await self.waits.run(repository_key(self.registry.host, name), self.hop, work)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        """Return a blob; see `CachedRegistry.blob`. Raise `LoopDetected`, and `NotCached` if this was its owner."""
        # A download is no answer to a new owner: it may be one that gets the blob from there.
        if self.hop.kind is HopKind.FORMER and not self.cache.blobs.is_stored(digest):
            raise NotCached(f"this member does not have {digest}")
        return await self.waits.run(f"{self.registry.host} {digest}", self.hop, self._sized_blob(name, digest, head))

    async def _sized_blob(self, name: Repository, digest: Digest, head: bool) -> BlobResponse:
        """Return a blob with its size: if upstream does not give it, as soon as all of it is here."""
        response = await CachedRegistry.blob(self, name, digest, head=head)
        content = response.content
        if response.size is not None or content is None:
            return response
        try:
            await content.wait_verified()
        except BaseException:
            content.close()
            raise
        if content.size is None:
            content.close()
            raise NotCached(f"this member cannot store {digest}, whose size is unknown")
        return evolve(response, size=content.size)

    def _may_hold_public_token(self) -> bool:
        return False  # the member that asks has tried that

    def request_login(self, error: RegistryError, name: Repository) -> RegistryError:
        """Return `error`. The member that asks has to learn of the outage, and then serves what it has."""
        return error

    async def _try(self, credential: Credential, attempt: Callable[[Credential], Awaitable[Any]]) -> Any:
        return await attempt(credential)  # the member that asks has other logins, too


@frozen
class FleetDoor:
    """Decides for each request to the mirror or to an intercepted registry whether a member sends it.

    `mirror` and `intercepted` serve clients. `mirror_for` and `intercepted_for` return those that serve a member, with
    a function that opens registries: those of `pull_through`, or of `cached_only`, which has no upstream. `is_draining`
    says whether this daemon is stopping.
    """

    clock: Any
    members: Members
    waits: Waits
    relays: Relays
    proofs: HopProofs
    pull_through: PullThrough
    cached_only: PullThrough
    meter: PeerMeter
    timeout: float
    is_draining: Callable[[], bool]
    mirror: MirrorDoor
    intercepted: InterceptedDoor
    mirror_for: Callable[[OpenRegistry], MirrorDoor]
    intercepted_for: Callable[[OpenRegistry], InterceptedDoor]
    differences: BoundedDict[str, bool] = field(init=False)

    @differences.default
    def _make_differences(self) -> BoundedDict[str, bool]:
        return BoundedDict(_MAX_DIFFERENCES, ttl=_DIFFERENCE_TTL, clock=self.clock.seconds)

    def handle_mirror(self, request: Request, namespace: Namespace | None) -> Awaitable[None]:
        """Return the awaitable that responds to a request to the mirror. Raise `RegistryError`."""
        hop = self._hop(request)
        if hop is None:
            return self.mirror.handle(request, namespace)
        relay = self._relay(request, hop)
        if relay is not None:
            return _name_relay(request, relay)
        return self._serve(request, lambda: self.mirror_for(self._open(hop)).handle(request, namespace))

    def handle_intercepted(self, server: Registry, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to a request to `server`. Raise `RegistryError`."""
        hop = self._hop(request)
        if hop is None:
            return self.intercepted.handle(server, request)
        return self._serve(request, lambda: self.intercepted_for(self._open(hop)).handle(server, request))

    def _hop(self, request: Request) -> Hop | None:
        """Return the hop if the sender is a member, else None.

        Raise `NotCached` for a stranger that asks for what is here only. If its list of members differs from ours, it
        may be a member by its own, and would wait for us while we wait for it.
        """
        value = request.headers.joined(_FIELD)
        hop = None if value is None or request.method not in ("GET", "HEAD") else parse_hop(value)
        if hop is None:
            return None
        if hop.sender in self.members.names and _is_from(request.peer, hop.sender):
            proof = request.headers.joined(PROOF_FIELD.lower())
            if self.proofs.holds(proof, hop, self.members.me, request.method, request.path):
                return hop
        if hop.kind is HopKind.FORMER:
            _mark(request, OWN_WORD)
            raise NotCached(f"FLEET has no {hop.sender} with the address {request.peer} and the CA of this member")
        return None

    def _relay(self, request: Request, hop: Hop) -> str | None:
        """Return the member that sends the blob in place of this one, None if this one does.

        Only public blobs have relays: access to others would have to be proved again at each of them.
        """
        if hop.kind not in (HopKind.OWNER, HopKind.LAST) or request.method != "GET" or self.is_draining():
            return None
        target = route(request.path)
        if target.kind is not Kind.BLOB or not asks_for_rest(request.headers.get("range")):
            return None
        key, has_failed = blob_key(target.digest), hop.kind is HopKind.LAST
        relay = self.relays.place(key, hop.sender, has_failed=has_failed, successor=self.members.successor(key))
        return None if relay is None or self.members.is_down(relay) else relay

    def _open(self, hop: Hop) -> OpenRegistry:
        return partial(self._open_registry, hop)

    def _open_registry(self, hop: Hop, registry: Registry, authorization: str | None, client: str) -> MemberRegistry:
        authorization = authorization if hop.login is HopLogin.CLIENT else None
        cache = self.cached_only if hop.kind in (HopKind.RELAY, HopKind.FORMER) else self.pull_through
        return MemberRegistry(
            cache, registry, authorization, None, client, hop=hop, waits=self.waits, differences=self.differences
        )

    async def _serve(self, request: Request, handle: Callable[[], Awaitable[None]]) -> None:
        """Serve a member. Until the response starts, tell it for MAX_PROGRESS that this daemon lives."""
        try:
            with reporting_progress(self.clock, request, min(self.timeout, MAX_PROGRESS), MAX_PROGRESS):
                if self.is_draining():
                    raise ServiceOverloaded("this member is stopping", headers=[("Retry-After", "1")])
                work = handle()  # which sets the fields, and sends nothing yet
                _mark(request, UPSTREAM_WORD)
                await self._start_in_time(request, work)
        except RegistryError as error:
            is_own = not isinstance(error, _UPSTREAM_WORDS) or isinstance(error, DestinationForbidden)
            _mark(request, OWN_WORD if is_own else UPSTREAM_WORD)
            raise
        finally:
            self.meter.count_peer_bytes("sent", request.bytes_sent)

    async def _start_in_time(self, request: Request, work: Awaitable[None]) -> None:
        """Await `work`. End it, and raise `UpstreamTimeout`, if the response has not started after MAX_PROGRESS."""
        task, is_late = Deferred.fromCoroutine(_await(work)), False

        def end() -> None:
            nonlocal is_late
            if not request.started:
                is_late = True
                task.cancel()

        timer = self.clock.callLater(MAX_PROGRESS, end)
        try:
            await task
        except CancelledError:
            if not is_late:
                raise
            raise UpstreamTimeout(f"upstream has not answered within {MAX_PROGRESS:g} s") from None
        finally:
            if timer.active():
                timer.cancel()


async def _await(work: Awaitable[None]) -> None:
    await work


async def _name_relay(request: Request, relay: str) -> None:
    """Send the member to another one."""
    _mark(request, OWN_WORD)
    request.respond(307, [(RELAY_FIELD, relay), ("Cache-Control", "no-store")])


def _mark(request: Request, word: str) -> None:
    """Tell the member whether the response is upstream's word or our own."""
    request.security_fields = f"{SECURITY_FIELDS}{ANSWER_FIELD}: {word}\r\n"


def _is_from(peer: str, member: str) -> bool:
    """Return whether `peer`, an address, is that of `member`.

    Members connect directly: an address that a reverse proxy names does not count.
    """
    try:
        address = ip_address(peer)
    except ValueError:  # a Unix socket
        return False
    return str(getattr(address, "ipv4_mapped", None) or address) == Host.parse(member).name
