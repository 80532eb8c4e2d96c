"""The cache as clients of different kinds see it: what upstream would refuse them, they do not get."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dockerproxy.cache.access import FRESH, OUTAGE
from dockerproxy.cache.challenges import TOKEN_PATH
from dockerproxy.cache.identity import LIFETIME
from dockerproxy.errors import (
    NameUnknown,
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import basic, parse_challenges
from dockerproxy.oci.manifests import EMPTY_INDEX, MAX_MANIFEST, OCI_INDEX
from dockerproxy.oci.names import Digest, Registry, parse_repository
from dockerproxy.upstream.credentials import Anonymous, Configured, Own
from tests.cache.stand_ins.upstream import Answer, fails, instead, refusal, says
from tests.cache.stand_ins.world import HUB, OTHER, World, read_all

APP, COPY = "library/app", "public/copy"
NAME = parse_repository(APP)
ALICE, BOB = "Bearer alice", "Bearer bob"
LOGIN = Configured("robot", "secret")
DATA = bytes(range(256)) * 300
BLOB = Digest.of(DATA)
MANIFEST = b'{"schemaVersion":2,"config":{},"layers":[]}'
REVISION = Digest.of(MANIFEST)

# Every way to what a repository holds.
WAYS = [("manifest", "1"), ("manifest", str(REVISION)), ("blob", str(BLOB))]


def filled(world: World, name: str = APP, registry: Registry = HUB, **more: Any) -> Any:
    repository = world.upstream.repository(f"{registry.host}/{name}", **more)
    repository.put_blob(DATA)
    repository.put_manifest(MANIFEST, "1")
    return repository


def ask(
    world: World, way: tuple[str, str], who: str | None = None, *, head: bool = False, name: str = APP,
    registry: Registry = HUB,
) -> tuple[str, bytes | None]:  # fmt: skip
    """Return the verdict and the bytes (None where only the head was asked for)."""
    kind, reference = way
    if kind == "manifest":
        manifest = world.run(world.manifest(reference, name, who, head=head, registry=registry), 60)
        return manifest.verdict, manifest.content
    answer = world.run(world.blob(Digest.parse(reference), name, who, head=head, registry=registry), 60)
    if answer.content is None:
        return answer.verdict, None
    try:
        return answer.verdict, world.run(read_all(answer.content), 60)
    finally:
        answer.content.close()


def refused(world: World, way: tuple[str, str], who: str | None = None, **more: Any) -> RegistryError:
    with pytest.raises(RegistryError) as caught:
        ask(world, way, who, **more)
    return caught.value


def voucher(world: World, identity: str, registry: Registry = HUB) -> str:
    return f"Bearer {world.identities.issue(registry, identity, world.now())}"


def pull(world: World, who: str | None = None, **more: Any) -> None:
    """Let a client have all of it."""
    for way in WAYS:
        assert ask(world, way, who, **more)[1] in (DATA, MANIFEST)


every_way = pytest.mark.parametrize("way", WAYS, ids=["tag", "digest", "blob"])
get_and_head = pytest.mark.parametrize("head", [False, True], ids=["GET", "HEAD"])


# with upstream there


@every_way
@get_and_head
def test_a_public_repository(world: World, way: tuple[str, str], head: bool) -> None:
    filled(world)
    for _ in range(2):
        for who in (None, ALICE, voucher(world, "public")):
            ask(world, way, who, head=head)
    pull(world)
    world.upstream.forget()
    verdict, _ = ask(world, way, head=head)
    assert verdict == ("REVALIDATED" if way[1] == "1" else "HIT")
    assert [str(one) for one in world.upstream.asked] == (["HEAD 1"] if way[1] == "1" else [])


@every_way
@get_and_head
@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("who", [None, BOB, "Basic Ym9iOmd1ZXNz", "a voucher"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_private_one_is_nothing_for_others(
    world: World, way: tuple[str, str], head: bool, status: int, who: str | None, cached: bool
) -> None:
    filled(world, readers={ALICE}, refusal=status)
    if cached:
        pull(world, ALICE)
    error = refused(world, way, voucher(world, "own:someone") if who == "a voucher" else who, head=head)
    assert isinstance(error, UpstreamRefused) and error.status == status
    assert b"UPSTREAM" in error.content  # its own words
    # And as before for whom it is for.
    assert ask(world, way, ALICE)[1] in (DATA, MANIFEST)


@every_way
@get_and_head
def test_under_another_repositorys_name(world: World, way: tuple[str, str], head: bool) -> None:
    filled(world, readers={ALICE})
    pull(world, ALICE)
    world.upstream.repository(f"{HUB.host}/{COPY}").put_blob(b"something else")
    world.upstream.repository(f"{OTHER.host}/{APP}")
    for who in (None, BOB, ALICE):
        assert refused(world, way, who, head=head, name=COPY).status == 404
        assert refused(world, way, who, head=head, registry=OTHER).status == 404
        assert refused(world, way, who, head=head, name="library/no-such-thing").status == 404


@every_way
def test_whom_upstream_lets_in_is_served_from_the_disk(world: World, way: tuple[str, str]) -> None:
    filled(world, readers={ALICE, BOB})
    pull(world, ALICE)
    world.upstream.forget()
    assert ask(world, way, BOB) == ("REVALIDATED", DATA if way[0] == "blob" else MANIFEST)
    assert [(one.method, one.who) for one in world.upstream.asked] == [("HEAD", BOB)]
    world.upstream.forget()
    ask(world, way, BOB)
    assert [one.method for one in world.upstream.asked] == (["HEAD"] if way[1] == "1" else [])


@every_way
def test_a_yes_is_asked_for_again_in_time(world: World, way: tuple[str, str]) -> None:
    repository = filled(world, readers={ALICE})
    pull(world, ALICE)
    world.reactor.advance(FRESH - 1)
    world.upstream.forget()
    ask(world, way, ALICE)
    assert len(world.upstream.asked) == (1 if way[1] == "1" else 0)
    world.reactor.advance(FRESH)
    repository.readers = {BOB}
    assert refused(world, way, ALICE).status == 401
    world.upstream.vanish()  # and that no stands
    assert isinstance(refused(world, way, ALICE), UpstreamUnreachable)


def test_an_own_credential_wins_over_ours(make_world: Callable[..., World]) -> None:
    world = make_world(login=LOGIN)
    filled(world, readers={"login robot"})
    pull(world)
    for way in WAYS:
        assert refused(world, way, ALICE).status == 401
        assert ask(world, way)[1] in (DATA, MANIFEST)
    assert world.client(ALICE).credential == Own(ALICE)
    assert world.client().credential == LOGIN


@every_way
def test_our_login_is_for_all(make_world: Callable[..., World], way: tuple[str, str]) -> None:
    world = make_world(login=LOGIN)
    filled(world, readers={"login robot"})
    ask(world, way)
    for who in (None, voucher(world, "public"), voucher(world, "own:someone")):
        assert ask(world, way, who)[0] in ("HIT", "REVALIDATED")
    assert {one.who for one in world.upstream.seen(pattern=APP)} == {"login robot"}


def test_without_sharing_it_is_for_none(world: World) -> None:
    assert world.client().credential == Anonymous()


# with upstream gone

GONE = [
    (fails(UpstreamUnreachable("registry-1.docker.io: connection refused")), 502),
    (fails(UpstreamTimeout("registry-1.docker.io: timed out")), 504),
    (fails(UpstreamBroken("auth.docker.io gives no token (status 503)")), 502),
    (fails(TooManyRequests("auth.docker.io limits the rate of tokens")), 429),
    (says(429), 429),
    (says(500), 502),
    (says(503), 502),
]


def take_away(world: World, trouble: Any = GONE[0][0]) -> None:
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "", trouble)


@every_way
@get_and_head
@pytest.mark.parametrize("login", [None, LOGIN], ids=["public", "shared"])
@pytest.mark.parametrize("days", [0, 1, 1000])
def test_what_all_may_is_served_without_end(
    make_world: Callable[..., World], way: tuple[str, str], head: bool, login: Configured | None, days: int
) -> None:
    world = make_world(login=login)
    filled(world, readers=None if login is None else {"login robot"})
    pull(world)
    take_away(world)
    world.reactor.advance(FRESH + days * 86400)
    again = make_world(login=login, upstream=world.upstream)  # a restart in between
    for cache in (world, again):
        for who in (None, voucher(world, "public")):
            assert ask(cache, way, who, head=head)[0] == "STALE"


@every_way
@get_and_head
@pytest.mark.parametrize(("trouble", "status"), GONE)
@pytest.mark.parametrize("who", [None, BOB, "a voucher for nobody", "a voucher for bob", "ended", "forged"])
def test_a_private_one_stays_private(
    world: World, way: tuple[str, str], head: bool, trouble: Any, status: int, who: str | None
) -> None:
    filled(world, readers={ALICE})
    pull(world, ALICE)
    world.reactor.advance(FRESH + LIFETIME)
    alice = world.identities.of_authorization(ALICE)
    token = voucher(world, alice)
    shown = {
        "a voucher for nobody": voucher(world, "public"),
        "a voucher for bob": voucher(world, world.identities.of_authorization(BOB)),
        "forged": token[:-2] + ("AA" if token[-2:] != "AA" else "BB"),
        "ended": f"Bearer {world.identities.issue(HUB, alice, world.now() - LIFETIME)}",
    }.get(who or "", who)
    take_away(world, trouble)
    error = refused(world, way, shown, head=head)
    assert error.status == (401 if who in ("ended", "forged") else status)


@every_way
@get_and_head
@pytest.mark.parametrize(("trouble", "status"), GONE)
@pytest.mark.parametrize("restart", [False, True])
def test_an_own_yes_is_believed_for_a_day(
    make_world: Callable[..., World], way: tuple[str, str], head: bool, trouble: Any, status: int, restart: bool
) -> None:
    """By the same credential, and by a token of ours that stands for it."""
    world = make_world()
    filled(world, readers={ALICE})
    pull(world, ALICE)
    take_away(world, trouble)
    world.reactor.advance(OUTAGE - 1)
    if restart:
        world = make_world(upstream=world.upstream)
    tokens = (ALICE, voucher(world, world.identities.of_authorization(ALICE)))
    for who in tokens:
        assert ask(world, way, who, head=head)[0] == "STALE"
    world.reactor.advance(1)
    for who in tokens:
        assert refused(world, way, who, head=head).status == status


@every_way
def test_a_voucher_is_no_credential_while_upstream_can_be_asked(world: World, way: tuple[str, str]) -> None:
    """Upstream is asked as for anybody, and its no is a no."""
    filled(world, readers={ALICE})
    pull(world, ALICE)
    token = voucher(world, world.identities.of_authorization(ALICE))
    world.upstream.forget()
    assert refused(world, way, token).status == 401
    assert {one.who for one in world.upstream.asked} == {None}


@every_way
@pytest.mark.parametrize("how", ["ended", "altered", "another registry's"])
def test_a_token_of_ours_that_is_no_good(world: World, way: tuple[str, str], how: str) -> None:
    """Even for what is public: the client is to come again with another one, and upstream does not hear of it."""
    filled(world)
    pull(world)
    token = voucher(world, "public", OTHER if how == "another registry's" else HUB)
    if how == "altered":
        token = token.replace("drp.", "drp.AAAA")
    if how == "ended":
        world.reactor.advance(LIFETIME)
    world.upstream.forget()
    assert isinstance(refused(world, way, token), Unauthorized)
    client = world.client(token)
    for work in (client.ping(), client.forward("GET", "/v2/_catalog", None, Headers())):
        with pytest.raises(Unauthorized):
            world.run(work)
    assert world.upstream.asked == []


# /v2/


def test_ping_without_anything(world: World) -> None:
    """The challenge is what leads a client to a token."""
    world.upstream.on("GET", "^/v2/$", says(401))
    with pytest.raises(Unauthorized) as caught:
        world.run(world.client().ping())
    [(name, value)] = world.client().challenge(caught.value, secure=True)
    assert name == "WWW-Authenticate"
    [challenge] = parse_challenges([value])
    assert challenge.parameters["realm"] == "https://auth.docker.io/token"


def test_ping_with_a_token_of_ours(world: World) -> None:
    world.run(world.client(voucher(world, "public")).ping())
    assert world.upstream.asked == []


@pytest.mark.parametrize("login", [None, LOGIN])
def test_ping_where_a_basic_login_is_asked_for(make_world: Callable[..., World], login: Configured | None) -> None:
    """Ours serves the client; without one it has to bring its own."""
    world = make_world(login=login)
    world.upstream.on("GET", "^/v2/$", lambda asked, data: refusal(401, www_authenticate='Basic realm="x"'))
    ping = world.client(registry=OTHER).ping()
    if login is not None:
        world.run(ping)
    else:
        with pytest.raises(Unauthorized):
            world.run(ping)


def test_ping_where_nothing_is_asked_for(world: World) -> None:
    world.run(world.client(registry=OTHER).ping())


def test_ping_with_an_own_login_is_upstreams_to_judge(world: World) -> None:
    world.upstream.on("GET", "^/v2/$", lambda asked, data: Answer(200) if asked.who == ALICE else refusal(401))
    world.run(world.client(ALICE).ping())
    with pytest.raises(UpstreamRefused) as caught:
        world.run(world.client(BOB).ping())
    assert caught.value.status == 401
    world.upstream.vanish()
    world.run(world.client(BOB).ping())  # each repository's own check has to do


def test_ping_of_a_registry_that_never_answered(world: World) -> None:
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):
        world.run(world.client(registry=OTHER).ping())
    with pytest.raises(Unauthorized):  # Docker Hub's is known from the start
        world.run(world.client().ping())


# tokens


def test_where_tokens_are_given(world: World) -> None:
    auth = Registry.parse("auth.docker.io")
    assert world.cache.served_at(auth, "/token") == HUB
    assert world.cache.served_at(auth, "/other") is None
    assert world.cache.served_at(HUB, "/token") is None
    assert world.cache.served_at(HUB, TOKEN_PATH) == HUB
    assert world.cache.served_at(OTHER, TOKEN_PATH) is None  # nothing is known of it
    with pytest.raises(NameUnknown):
        world.run(world.cache.token(OTHER, "", None, None))


def test_a_plain_registry_that_gives_its_tokens_itself(make_world: Callable[..., World]) -> None:
    plain = Registry.parse("http://plain.example:5000")
    world = make_world(registries=(plain,))
    world.upstream.on(
        "GET",
        "^/v2/$",
        lambda asked, data: refusal(401, www_authenticate='Bearer realm="http://plain.example:5000/token"'),
    )
    with pytest.raises(Unauthorized):
        world.run(world.client(registry=plain).ping())
    assert world.cache.served_at(plain, "/token") == plain


def test_the_token_dance_without_upstream(world: World) -> None:
    """As docker dances it, and then pulls."""
    filled(world, readers={ALICE, basic("alice", "pw")})
    world.upstream.on("GET", "^/token", lambda asked, data: Answer(200, b'{"token":"alice","expires_in":300}'))
    login = basic("alice", "pw")
    world.run(world.cache.token(HUB, "service=x", login, None))
    pull(world, ALICE)
    take_away(world)
    world.upstream.down = UpstreamUnreachable("gone")
    world.reactor.advance(FRESH)
    token = "Bearer " + json.loads(world.run(world.cache.token(HUB, "service=x", login, None)))["token"]
    world.run(world.client(token).ping())
    for way in WAYS:
        assert ask(world, way, token)[0] == "STALE"


# what is passed on


def test_forward(make_world: Callable[..., World]) -> None:
    world = make_world(login=LOGIN)
    for authorization, credential in ((None, LOGIN), (ALICE, Own(ALICE)), (voucher(world, "public"), LOGIN)):
        world.run(world.client(authorization).forward("GET", f"/v2/{APP}/tags/list?n=2", NAME, Headers([("x", "1")])))
        asked = world.upstream.asked[-1]
        assert (asked.method, asked.path, asked.credential) == ("GET", f"/v2/{APP}/tags/list?n=2", credential)
        assert (asked.follow, asked.more) == (False, {"name": NAME, "actions": "pull"})
        assert asked.headers.get("x") == "1"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_our_login_reads_and_does_not_write(make_world: Callable[..., World], method: str) -> None:
    world = make_world(login=LOGIN)
    for authorization, credential in ((None, Anonymous()), (ALICE, Own(ALICE))):
        world.run(world.client(authorization).forward(method, f"/v2/{APP}/blobs/uploads/", NAME, Headers(), "body"))
        asked = world.upstream.asked[-1]
        assert (asked.credential, asked.body, asked.more["actions"]) == (credential, "body", "pull,push")


@pytest.mark.parametrize("path", ["/api/v2.0/users", "/", "/service/token", "/v1/x", "/v2x/"])
def test_our_login_reads_what_a_registry_serves_and_nothing_else(make_world: Callable[..., World], path: str) -> None:
    """A registry often has an API beside it where the same login may see more than images."""
    world = make_world(login=LOGIN)
    world.run(world.client().forward("GET", path, None, Headers()))
    assert world.upstream.asked[-1].credential == Anonymous()
    world.run(world.client(ALICE).forward("GET", path, None, Headers()))
    assert world.upstream.asked[-1].credential == Own(ALICE)


# referrers

SUBJECT = Digest.of(b"subject")
ONE = {"digest": str(Digest.of(b"1")), "size": 1, "mediaType": "x/y", "artifactType": "a/b"}
TWO = {**ONE, "artifactType": "c/d"}


def index(*descriptors: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(descriptors)}).encode()


def referrers(world: World, query: str = "", artifact_type: str | None = None) -> Any:
    return world.run(world.client().referrers(NAME, SUBJECT, query, artifact_type))


def test_referrers_are_upstreams(world: World) -> None:
    content = index(ONE)
    world.upstream.on("GET", "referrers", instead(content, oci_filters_applied="artifactType"))
    found = referrers(world, "artifactType=a%2Fb", "a/b")
    assert (found.content, found.filtered) == (content, True)
    asked = world.upstream.asked[-1]
    assert asked.path == f"/v2/{APP}/referrers/{SUBJECT}?artifactType=a%2Fb"
    assert asked.headers.get("accept") == OCI_INDEX


def test_referrers_that_are_elsewhere(world: World) -> None:
    """registry.k8s.io redirects these too."""
    content = index(ONE)
    world.upstream.on(
        "GET", "referrers", lambda asked, data: Answer(200, content) if asked.follow else refusal(307, location="/x")
    )
    assert referrers(world).content == content


def test_referrers_by_the_fallback_tag(world: World) -> None:
    world.upstream.on("GET", "referrers", says(404))
    repository = world.upstream.repository(f"{HUB}/{APP}")
    assert referrers(world).content == EMPTY_INDEX
    repository.put_manifest(index(ONE, TWO), f"sha256-{SUBJECT.hex}", media_type=OCI_INDEX)
    found = referrers(world)
    assert (found.content, found.filtered) == (index(ONE, TWO), False)
    found = referrers(world, "artifactType=a%2Fb", "a/b")
    assert found.filtered and b"c/d" not in found.content and b"a/b" in found.content


@pytest.mark.parametrize("status", [401, 403])
def test_referrers_refused(world: World, status: int) -> None:
    world.upstream.on("GET", "referrers", says(status))
    with pytest.raises(UpstreamRefused) as caught:
        referrers(world)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "content", [b"<h1>Sign in</h1>", b"[]", b"\xff", b" " * (MAX_MANIFEST + 1), b'{"manifests":{}}'], ids=range(5)
)
@pytest.mark.parametrize("where", ["referrers", "manifests"])
def test_referrers_that_are_none(world: World, content: bytes, where: str) -> None:
    if where == "manifests":
        world.upstream.on("GET", "referrers", says(404))
    world.upstream.on("GET", where, instead(content, content_type=OCI_INDEX))
    with pytest.raises(UpstreamBroken):
        referrers(world, "artifactType=a%2Fb", "a/b")


def test_referrers_with_upstream_gone(world: World) -> None:
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):
        referrers(world)
    world.upstream.behave()
    world.upstream.on("GET", "referrers", says(503))
    with pytest.raises(UpstreamFailing):
        referrers(world)


def test_no_credential_is_in_a_repr(make_world: Callable[..., World]) -> None:
    world = make_world(login=LOGIN)
    text = repr(world.client("Basic c2VjcmV0OnNlY3JldA==")) + repr(world.visitor(who="Bearer secret"))
    assert "secret" not in text and "c2VjcmV0" not in text
