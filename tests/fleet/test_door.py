"""The door for members: strangers get no hold of it, and members learn if an answer is the word of upstream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.cache.pullthrough import CachedRegistry
from dockerproxy.errors import (
    Denied,
    DestinationForbidden,
    LoopDetected,
    NameUnknown,
    NotCached,
    RegistryError,
    ServiceOverloaded,
    TooManyRequests,
    Unauthorized,
    UpstreamFailing,
    UpstreamRefused,
)
from dockerproxy.fleet.door import FleetDoor, MemberRegistry, OpenRegistry
from dockerproxy.fleet.hop import Hop, HopKind, HopLogin, HopProofs
from dockerproxy.fleet.members import Members, blob_key, ordered
from dockerproxy.fleet.relays import Relays
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Digest, Registry, parse_repository
from dockerproxy.upstream.credentials import Anonymous, ClientCredential
from tests.conftest import HTTPTestClient

ME, MEMBER, OTHER = "10.0.0.1:3128", "10.0.0.2:3128", "10.0.0.3:3128"
QUAY = Registry.parse("quay.io")
DIGEST = Digest.of(b"layer")
BLOB = f"/v2/a/b/blobs/{DIGEST}"


PROOFS = HopProofs(b"of the CA")


def hop_fields(hop: Hop | str, method: str = "GET", path: str = BLOB, receiver: str = ME) -> list[tuple[str, str]]:
    """Return the fields of a request of a member."""
    proof = PROOFS.make(hop, receiver, method, path) if isinstance(hop, Hop) else "0" * 64
    return [("CDN-Loop", str(hop)), ("X-Fleet-Proof", proof)]


class Logins:
    login: BasicCredentials | None = None

    def login_for(self, registry: Registry) -> BasicCredentials | None:
        return self.login


class Cache:
    """Stands for a `PullThrough`."""

    def __init__(self) -> None:
        self.logins, self.blobs = Logins(), self
        self.has_blobs = False

    def is_stored(self, digest: Digest) -> bool:
        return self.has_blobs


class Clients:
    """The handlers for clients."""

    def handle(self, *arguments: Any) -> Awaitable[None]:
        return self._respond(next(one for one in arguments if isinstance(one, Request)))

    async def _respond(self, request: Request) -> None:
        request.respond(200, [], b"as a client")


class DoorHarness:
    """A door at the member `ME`. `serve` is the work of a request of a member with its registry."""

    def __init__(self, fan_out: int = 8) -> None:
        self.clock = Clock()
        self.members = Members(self.clock.seconds)
        self.members.use((ME, MEMBER, OTHER), ME)
        self.opened: list[MemberRegistry] = []
        self.caches = Cache(), Cache()
        self.bytes = 0
        self.is_draining = False
        self.serve: Callable[[Request], Awaitable[None]] = self.respond
        relays = Relays(fan_out, self.clock.seconds)
        self.door = FleetDoor(
            self.clock, self.members, Waits(self.clock, None), relays, PROOFS, *self.caches, self, 6.0,  # type: ignore[arg-type]
            lambda: self.is_draining, Clients(), Clients(), self.handlers, self.handlers,
        )  # fmt: skip

    def count_peer_bytes(self, direction: str, size: int) -> None:
        assert direction == "sent"
        self.bytes += size

    def handlers(self, open_registry: OpenRegistry) -> Any:
        harness = self

        class Handlers:
            def handle(self, *arguments: Any) -> Awaitable[None]:
                request = next(one for one in arguments if isinstance(one, Request))
                registry = open_registry(QUAY, request.headers.get("authorization"), request.client)
                assert isinstance(registry, MemberRegistry)
                harness.opened.append(registry)
                return harness.serve(request)

        return Handlers()

    async def respond(self, request: Request) -> None:
        request.respond(200, [], b"as a member")

    def connect(self, address: str = "10.0.0.2") -> HTTPTestClient:
        return HTTPTestClient(lambda request: self.door.handle_mirror(request, None), clock=self.clock, client=address)

    def fetch(self, hop: Hop | str, address: str = "10.0.0.2", path: str = BLOB, **fields: str) -> Any:
        return self.connect(address).fetch("GET", path, [*hop_fields(hop, path=path), *fields.items()])


@pytest.fixture
def harness() -> DoorHarness:
    return DoorHarness()


def test_a_member_is_served_by_the_cache_for_members(harness: DoorHarness) -> None:
    response = harness.fetch(Hop(MEMBER))
    assert (response.status, response.body) == (200, b"as a member")
    assert response.fields("X-Fleet-Answer") == ["upstream"] and harness.bytes == len(b"as a member")
    [registry] = harness.opened
    assert registry.cache is harness.caches[0] and isinstance(registry.credential, Anonymous)


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        (Hop(MEMBER), "10.9.9.9"),
        (Hop(OTHER), "10.0.0.2"),
        (Hop("10.9.9.9:3128"), "10.9.9.9"),
        ("docker-registry-proxy;from=10.0.0.2", "10.0.0.2"),
        (f"{Hop(MEMBER)}, {Hop(MEMBER)}", "10.0.0.2"),
        ("", "10.0.0.2"),
    ],
    ids=["stranger", "as-another-member", "not-in-the-list", "malformed", "twice", "empty"],
)
def test_everybody_else_is_a_client(harness: DoorHarness, hop: Hop | str, address: str) -> None:
    response = harness.fetch(hop, address)
    assert response.body == b"as a client" and response.fields("X-Fleet-Answer") == []
    assert harness.opened == []


@pytest.mark.parametrize(
    "proof",
    [
        [],
        [("X-Fleet-Proof", "")],
        [("X-Fleet-Proof", "0" * 64)],
        [("X-Fleet-Proof", "\xe9")],
        [("X-Fleet-Proof", HopProofs(b"another CA").make(Hop(MEMBER), ME, "GET", BLOB))],
        hop_fields(Hop(MEMBER), path=BLOB + "0")[1:],
        hop_fields(Hop(MEMBER), "HEAD")[1:],
        hop_fields(Hop(MEMBER), receiver=OTHER)[1:],
        hop_fields(Hop(OTHER))[1:],
        hop_fields(Hop(MEMBER, HopLogin.CONFIGURED))[1:],
        hop_fields(Hop(MEMBER))[1:] * 2,
    ],
    ids=range(11),
)
def test_a_client_of_a_member_is_no_member(harness: DoorHarness, proof: list[tuple[str, str]]) -> None:
    """It comes from the address of that, by its proxy. It may know the proof of another request."""
    for client, handle in ((harness.connect(), "mirror"), (harness.connect(), "intercepted")):
        if handle == "intercepted":
            client = HTTPTestClient(
                lambda request: harness.door.handle_intercepted(QUAY, request), clock=harness.clock, client="10.0.0.2"
            )
        response = client.fetch("GET", BLOB, [("CDN-Loop", str(Hop(MEMBER))), *proof])
        assert (response.body, response.fields("X-Fleet-Answer")) == (b"as a client", [])
    assert harness.opened == []


def test_a_former_owner_whose_list_differs_does_not_wait(harness: DoorHarness) -> None:
    """It would ask its own former owner, and so on in a circle, until all of them have waited for FLEET_TIMEOUT."""
    response = harness.fetch(Hop("10.9.9.9:3128", kind=HopKind.FORMER), "10.9.9.9")
    assert (response.status, response.fields("X-Fleet-Answer"), harness.opened) == (504, ["own"], [])


def test_a_member_that_pushes_is_a_client(harness: DoorHarness) -> None:
    response = harness.connect().fetch("PUT", BLOB, hop_fields(Hop(MEMBER), "PUT"), b"")
    assert response.body == b"as a client"


def test_an_address_in_the_form_of_ipv6_is_that_of_the_member(harness: DoorHarness) -> None:
    assert harness.fetch(Hop(MEMBER), "::ffff:10.0.0.2").body == b"as a member"


def test_a_login_is_used_only_if_the_member_asks_for_it(harness: DoorHarness) -> None:
    """A login beside `login=none` counts for nothing: the answer would be taken for that to the public."""
    harness.caches[0].logins.login = BasicCredentials("user", "password")
    for login in HopLogin:
        harness.fetch(Hop(MEMBER, login), Authorization="Bearer token")
    none, configured, client = (registry.credential for registry in harness.opened)
    assert isinstance(none, Anonymous)
    assert configured == BasicCredentials("user", "password")
    assert client == ClientCredential("Bearer token")


def test_a_member_without_the_login_says_so(harness: DoorHarness) -> None:
    for hop in (Hop(MEMBER, HopLogin.CONFIGURED), Hop(MEMBER, HopLogin.CLIENT)):
        harness.fetch(hop)
        with pytest.raises(NotCached):
            _ = harness.opened[-1].credential


@pytest.mark.parametrize("kind", [HopKind.RELAY, HopKind.FORMER])
def test_a_relay_and_a_former_owner_never_ask_upstream(harness: DoorHarness, kind: HopKind) -> None:
    harness.fetch(Hop(MEMBER, kind=kind))
    assert harness.opened[0].cache is harness.caches[1]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (UpstreamFailing("it answered 503"), "upstream"),
        (UpstreamRefused(404, b"{}", ()), "upstream"),
        (Unauthorized("no"), "upstream"),
        (TooManyRequests("too many"), "own"),
        (ServiceOverloaded("busy"), "own"),
        (Denied("ALLOW_CLIENTS"), "own"),
        (NameUnknown("not in REGISTRIES"), "own"),
        (LoopDetected("a circle"), "own"),
        (DestinationForbidden("TUNNEL_DENY"), "own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_says_whether_it_is_upstreams(harness: DoorHarness, error: RegistryError, word: str) -> None:
    async def fail(request: Request) -> None:
        raise error

    harness.serve = fail
    response = harness.fetch(Hop(MEMBER))
    assert (response.status, response.fields("X-Fleet-Answer")) == (error.status, [word])


def test_a_member_that_stops_refuses(harness: DoorHarness) -> None:
    harness.is_draining = True
    response = harness.fetch(Hop(MEMBER))
    assert (response.status, response.fields("X-Fleet-Answer"), response.fields("Retry-After")) == (503, ["own"], ["1"])
    assert harness.opened == []


def test_progress_is_reported_while_upstream_is_slow(harness: DoorHarness) -> None:
    """Silence would mean that this member has died."""
    done: Deferred[None] = Deferred()

    async def wait(request: Request) -> None:
        await done
        request.respond(200, [], b"late")

    harness.serve = wait
    client = harness.connect()
    client.send_request("GET", BLOB, hop_fields(Hop(MEMBER)))
    harness.clock.pump([1.0] * 9)
    assert client.received == b"HTTP/1.1 102 Processing\r\n\r\n" * 4
    done.callback(None)
    assert client.received.endswith(b"late")
    harness.clock.pump([1.0] * 9)
    assert client.received.count(b"102 Processing") == 4


def test_a_member_learns_within_half_a_minute_that_upstream_does_not_answer(harness: DoorHarness) -> None:
    """It asks upstream itself then: perhaps only this member cannot reach it."""
    is_cancelled: list[bool] = []

    async def wait(request: Request) -> None:
        await Deferred(lambda _: is_cancelled.append(True))

    harness.serve = wait
    client = harness.connect()
    client.send_request("GET", BLOB, hop_fields(Hop(MEMBER)))
    harness.clock.pump([1.0] * 60)
    assert client.received.count(b"102 Processing") == 14 and is_cancelled == [True]
    assert b"HTTP/1.1 504 " in client.received and b"X-Fleet-Answer: upstream" in client.received


def test_a_member_that_leaves_ends_its_request(harness: DoorHarness) -> None:
    is_cancelled: list[bool] = []

    async def wait(request: Request) -> None:
        await Deferred(lambda _: is_cancelled.append(True))

    harness.serve = wait
    client = harness.connect()
    client.send_request("GET", BLOB, hop_fields(Hop(MEMBER)))
    client.disconnect()
    harness.clock.advance(1)
    assert is_cancelled == [True]


class Arriving:
    """A blob of which upstream gives no size. Stands for its `BlobReader`."""

    def __init__(self, size: int | None) -> None:
        self.size: int | None = None
        self.is_closed = False
        self._final_size = size

    async def wait_verified(self) -> None:
        await Deferred.fromCoroutine(self._arrive())

    async def _arrive(self) -> None:
        self.size = self._final_size

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("size", [12, None], ids=["stored", "not stored"])
def test_a_blob_is_sent_with_its_size_or_not_at_all(
    harness: DoorHarness, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """A member would take it for one that sends without an end."""
    content = Arriving(size)

    async def blob(self: CachedRegistry, name: object, digest: Digest, *, head: bool) -> BlobResponse:
        return BlobResponse(digest, None, content, "MISS")  # type: ignore[arg-type]

    monkeypatch.setattr(CachedRegistry, "blob", blob)
    harness.fetch(Hop(MEMBER))
    work = Deferred.fromCoroutine(harness.opened[0].blob(parse_repository("a/b"), DIGEST, head=False))
    results: list[Any] = []
    work.addBoth(results.append)
    if size is None:
        assert isinstance(results[0].value, NotCached) and content.is_closed
    else:
        assert results[0].size == size and not content.is_closed


def owned_by_me() -> str:
    """Return the path of a blob of which this daemon is the owner."""
    digests = (Digest.of(b"%d" % number) for number in range(100))
    names = tuple(sorted((ME, MEMBER, OTHER)))
    digest = next(one for one in digests if ordered(blob_key(one), names) == (ME, MEMBER, OTHER))
    return f"/v2/a/b/blobs/{digest}"


def test_further_members_are_sent_to_those_before_them() -> None:
    harness, path = DoorHarness(fan_out=1), owned_by_me()
    assert harness.fetch(Hop(MEMBER), path=path).status == 200
    response = harness.fetch(Hop(OTHER), "10.0.0.3", path=path)
    assert (response.status, response.fields("X-Fleet-Relay")) == (307, [MEMBER])
    assert response.fields("Location") == []  # so that nothing else follows it
    assert harness.fetch(Hop(OTHER, kind=HopKind.LAST), "10.0.0.3", path=path).status == 200


@pytest.mark.parametrize("byte_range", ["bytes=0-0", "bytes=100-200", "bytes=-5"])
def test_a_part_is_no_copy(byte_range: str) -> None:
    harness, path = DoorHarness(fan_out=1), owned_by_me()
    for _ in range(3):
        assert harness.fetch(Hop(OTHER), "10.0.0.3", path=path, Range=byte_range).status == 200
    assert harness.fetch(Hop(MEMBER), path=path).status == 200


def test_the_intercepted_registry_has_the_same_door(harness: DoorHarness) -> None:
    def handle(request: Request) -> Awaitable[None]:
        return harness.door.handle_intercepted(QUAY, request)

    for address, body in (("10.0.0.2", b"as a member"), ("10.9.9.9", b"as a client")):
        client = HTTPTestClient(handle, clock=harness.clock, client=address)
        assert client.fetch("GET", BLOB, hop_fields(Hop(MEMBER))).body == body


def test_a_malformed_path_is_refused_as_always(harness: DoorHarness) -> None:
    assert harness.fetch(Hop(MEMBER), path="/v2/UPPER/blobs/x").status in (400, 404)


def test_a_former_owner_sends_only_whole_blobs(harness: DoorHarness) -> None:
    """A blob that it gets itself may come from the new owner."""
    harness.fetch(Hop(MEMBER, kind=HopKind.FORMER))
    work = harness.opened[0].blob(parse_repository("a/b"), DIGEST, head=False)
    with pytest.raises(NotCached):
        work.send(None)


def test_an_address_that_a_reverse_proxy_names_is_no_members(harness: DoorHarness) -> None:
    """Members connect directly. TRUSTED_PROXIES may be a network in which strangers are, too."""

    def handle(request: Request) -> Awaitable[None]:
        request.client = "10.0.0.2"  # as `DirectRequestHandler` does
        return harness.door.handle_mirror(request, None)

    client = HTTPTestClient(handle, clock=harness.clock, client="10.9.9.9")
    assert client.fetch("GET", BLOB, hop_fields(Hop(MEMBER))).body == b"as a client"


def test_a_member_learns_of_an_outage(harness: DoorHarness) -> None:
    """It serves its copies. A request for a login would be taken for upstream's refusal."""
    harness.fetch(Hop(MEMBER))
    outage = UpstreamFailing("it answered 503")
    assert harness.opened[0].request_login(outage, parse_repository("a/b")) is outage
