"""Tests of the cache with different clients. No client may get content that upstream would deny to it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from dockerproxy.cache.access import GRANT_TTL, STALE_GRANT_TTL
from dockerproxy.cache.challenges import TOKEN_PATH
from dockerproxy.cache.identity import TOKEN_LIFETIME
from dockerproxy.errors import (
    BadRequest,
    IntermediaryRefused,
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
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.manifests import EMPTY_INDEX, MAX_MANIFEST, OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, Registry, parse_reference, parse_repository
from dockerproxy.oci.referrers import ReferrersQuery
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.upstream.credentials import Anonymous, ClientCredential
from dockerproxy.upstream.shared_logins import LAST_RETRY
from tests.cache.support.harness import HUB, OTHER, CacheHarness, read_all
from tests.cache.support.upstream import (
    ScriptedResponse,
    error_response,
    raise_error,
    replace_with,
    respond_with,
    serve_content,
)

APP, COPY = "library/app", "public/copy"
SERVICE = "registry.docker.io"
NAME = parse_repository(APP)
TAGS = Target(Kind.TAGS, NAME)
ALICE, BOB = "Bearer alice", "Bearer bob"
LOGIN = BasicCredentials("robot", "secret")
DATA = bytes(range(256)) * 300
BLOB = Digest.of(DATA)
MANIFEST = b'{"schemaVersion":2,"config":{},"layers":[]}'
REVISION = Digest.of(MANIFEST)

# All kinds of requests for content.
PATHS_TO_CONTENT = [("manifest", "1"), ("manifest", str(REVISION)), ("blob", str(BLOB))]


def fill_repository(harness: CacheHarness, name: str = APP, registry: Registry = HUB, **options: Any) -> Any:
    repository = harness.upstream.repository(f"{registry.host}/{name}", **options)
    repository.put_blob(DATA)
    repository.put_manifest(MANIFEST, "1")
    return repository


def ask(
    harness: CacheHarness, target: tuple[str, str], authorization: str | None = None, *, head: bool = False,
    name: str = APP, registry: Registry = HUB,
) -> tuple[str, bytes | None]:  # fmt: skip
    """Return the cache status and the content (None for HEAD)."""
    kind, reference = target
    if kind == "manifest":
        manifest = harness.run(harness.manifest(reference, name, authorization, head=head, registry=registry), 60)
        return manifest.cache_status, manifest.content
    response = harness.run(harness.blob(Digest.parse(reference), name, authorization, head=head, registry=registry), 60)
    if response.content is None:
        return response.cache_status, None
    try:
        return response.cache_status, harness.run(read_all(response.content), 60)
    finally:
        response.content.close()


def denied(
    harness: CacheHarness, target: tuple[str, str], authorization: str | None = None, **options: Any
) -> RegistryError:
    with pytest.raises(RegistryError) as excinfo:
        ask(harness, target, authorization, **options)
    return excinfo.value


def local_token(harness: CacheHarness, identity: str) -> str:
    return f"Bearer {harness.identities.issue_token(identity, frozenset({NAME}))}"


def pull(harness: CacheHarness, authorization: str | None = None, **options: Any) -> None:
    """Pull all content of the repository."""
    for target in PATHS_TO_CONTENT:
        assert ask(harness, target, authorization, **options)[1] in (DATA, MANIFEST)


every_target = pytest.mark.parametrize("target", PATHS_TO_CONTENT, ids=["tag", "digest", "blob"])
get_and_head = pytest.mark.parametrize("head", [False, True], ids=["GET", "HEAD"])


# upstream is reachable


@every_target
@get_and_head
def test_public_repository(harness: CacheHarness, target: tuple[str, str], head: bool) -> None:
    fill_repository(harness)
    for _ in range(2):
        for authorization in (None, ALICE, local_token(harness, "public")):
            ask(harness, target, authorization, head=head)
    pull(harness)
    harness.upstream.clear_requests()
    cache_status, _ = ask(harness, target, head=head)
    assert cache_status == ("REVALIDATED" if target[1] == "1" else "HIT")
    assert [str(one) for one in harness.upstream.requests] == (["HEAD 1"] if target[1] == "1" else [])


@every_target
@get_and_head
@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("authorization", [None, BOB, "Basic Ym9iOmd1ZXNz", "local token"])
@pytest.mark.parametrize("cached", [False, True])
def test_private_repository_is_denied_to_others(
    harness: CacheHarness, target: tuple[str, str], head: bool, status: int, authorization: str | None, cached: bool
) -> None:
    fill_repository(harness, readers={ALICE}, denial_status=status)
    if cached:
        pull(harness, ALICE)
    error = denied(
        harness,
        target,
        local_token(harness, "own:someone") if authorization == "local token" else authorization,
        head=head,
    )
    assert isinstance(error, UpstreamRefused) and error.status == status
    assert b"UPSTREAM" in error.content  # the error from upstream
    # Clients with access are not affected.
    assert ask(harness, target, ALICE)[1] in (DATA, MANIFEST)


@every_target
@get_and_head
def test_content_of_another_repository(harness: CacheHarness, target: tuple[str, str], head: bool) -> None:
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    harness.upstream.repository(f"{HUB.host}/{COPY}").put_blob(b"something else")
    harness.upstream.repository(f"{OTHER.host}/{APP}")
    for authorization in (None, BOB, ALICE):
        assert denied(harness, target, authorization, head=head, name=COPY).status == 404
        assert denied(harness, target, authorization, head=head, registry=OTHER).status == 404
        assert denied(harness, target, authorization, head=head, name="library/no-such-thing").status == 404


@every_target
def test_granted_client_is_served_from_disk(harness: CacheHarness, target: tuple[str, str]) -> None:
    fill_repository(harness, readers={ALICE, BOB})
    pull(harness, ALICE)
    harness.upstream.clear_requests()
    assert ask(harness, target, BOB) == ("REVALIDATED", DATA if target[0] == "blob" else MANIFEST)
    method = "GET" if target[0] == "blob" else "HEAD"  # because a HEAD proves nothing about a blob
    assert [(one.method, one.requester) for one in harness.upstream.requests] == [(method, BOB)]
    harness.upstream.clear_requests()
    ask(harness, target, BOB)
    assert [one.method for one in harness.upstream.requests] == (["HEAD"] if target[1] == "1" else [])


@every_target
def test_grant_expires(harness: CacheHarness, target: tuple[str, str]) -> None:
    repository = fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    harness.reactor.advance(GRANT_TTL - 1)
    harness.upstream.clear_requests()
    ask(harness, target, ALICE)
    assert len(harness.upstream.requests) == (1 if target[1] == "1" else 0)
    harness.reactor.advance(GRANT_TTL)
    repository.readers = {BOB}
    assert denied(harness, target, ALICE).status == 401
    harness.upstream.go_down()  # the denial remains in effect
    assert isinstance(denied(harness, target, ALICE), UpstreamUnreachable)


@every_target
@get_and_head
@pytest.mark.parametrize("authorization", [ALICE, "Basic YWxpY2U6cHc="])
def test_client_login_wins_over_shared_login(
    make_harness: Callable[..., CacheHarness], target: tuple[str, str], head: bool, authorization: str
) -> None:
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"login robot"})
    harness.identities.bind("alice", "realm", "Basic alice", frozenset({NAME}), harness.now() + 300)
    pull(harness)
    assert denied(harness, target, authorization, head=head).status == 401
    assert ask(harness, target, head=head)[1] in (DATA, MANIFEST, None)
    assert harness.client(authorization).credential == ClientCredential(authorization)
    assert harness.client().credential == LOGIN


@every_target
@get_and_head
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("status", [401, 403])
def test_shared_login_serves_the_bearer_of_nobodys_token(
    make_harness: Callable[..., CacheHarness], target: tuple[str, str], head: bool, cached: bool, status: int
) -> None:
    """The token was fetched without the proxy, which cannot know that it is one of a client without a login."""
    harness = make_harness(login=LOGIN)
    repository = fill_repository(harness, readers={"login robot"}, denial_status=status)
    if cached:
        pull(harness)
    assert ask(harness, target, BOB, head=head)[1] in (DATA, MANIFEST, None)
    pull(harness, BOB)
    repository.readers = {BOB}  # upstream is asked with the token first
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.clear_requests()
    ask(harness, target, BOB, head=head)
    assert {one.requester for one in harness.upstream.requests} == {BOB}
    repository.readers = set()
    harness.reactor.advance(GRANT_TTL)
    assert denied(harness, target, BOB, head=head).status == status


@every_target
def test_shared_login_serves_the_bearer_of_nobodys_token_during_outage(
    make_harness: Callable[..., CacheHarness], target: tuple[str, str]
) -> None:
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"login robot"})
    pull(harness)
    make_unreachable(harness)
    harness.reactor.advance(GRANT_TTL + 1000 * 86400)
    assert ask(harness, target, BOB)[0] == "STALE"
    harness.identities.bind("bob", "realm", "Basic bob", frozenset({NAME}), harness.now() + 300)
    assert denied(harness, target, BOB).status == 502


def test_tokens_of_a_realm_elsewhere_are_not_needed_for_public_content(harness: CacheHarness) -> None:
    """Otherwise each client's token would have to be shown upstream, and an outage would take the images away."""
    learn_challenge(harness, OTHER, FOREIGN)
    fill_repository(harness, registry=OTHER)
    pull(harness, BOB, registry=OTHER)
    assert {one.requester for one in harness.upstream.requests} == {None}
    make_unreachable(harness)
    for authorization in (None, ALICE):
        harness.reactor.advance(GRANT_TTL)
        for target in PATHS_TO_CONTENT:
            assert ask(harness, target, authorization, registry=OTHER)[0] == "STALE"


@every_target
@get_and_head
@pytest.mark.parametrize("status", [401, 403, 404])
def test_tokens_of_a_realm_elsewhere_read_private_content(
    harness: CacheHarness, target: tuple[str, str], head: bool, status: int
) -> None:
    """That a repository is private is remembered for a while."""
    learn_challenge(harness, OTHER, FOREIGN)
    fill_repository(harness, registry=OTHER, readers={ALICE}, denial_status=status)
    for expected in ({None, ALICE}, {ALICE}):
        harness.upstream.clear_requests()
        ask(harness, target, ALICE, head=head, registry=OTHER)
        requesters = {one.requester for one in harness.upstream.requests}
        assert requesters <= expected and (None in requesters) is (None in expected)
        for authorization in (None, BOB):
            assert denied(harness, target, authorization, head=head, registry=OTHER).status == status
    pull(harness, ALICE, registry=OTHER)
    make_unreachable(harness)
    harness.reactor.advance(GRANT_TTL)
    assert ask(harness, target, ALICE, head=head, registry=OTHER)[0] == "STALE"
    for authorization in (None, BOB):
        assert denied(harness, target, authorization, head=head, registry=OTHER).status == 502


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("login", [None, LOGIN])
def test_bearer_of_upstreams_anonymous_token_is_nobody(
    make_harness: Callable[..., CacheHarness], cached: bool, login: BasicCredentials | None
) -> None:
    """The cache, and a configured login, serve it as a client without a token."""
    harness = make_harness(login=login)
    fill_repository(harness, readers=None if login is None else {"login robot"})
    if cached:
        pull(harness)
    content = b'{"token":"nobodys","expires_in":300}'
    harness.upstream.on("GET", "^/token", lambda request, data: ScriptedResponse(200, content))
    harness.run(harness.pull_through.token(HUB, f"service={SERVICE}&scope=repository:{APP}:pull", None, None))
    harness.upstream.clear_requests()
    pull(harness, "bearer  nobodys")
    pull(harness, "Bearer nobodys")
    requesters = {one.requester for one in harness.upstream.requests}
    assert requesters == {None if login is None else "login robot"}
    if cached:
        assert [str(one) for one in harness.upstream.requests] == ["HEAD 1", "HEAD 1"]
    make_unreachable(harness)
    harness.reactor.advance(299)
    for target in PATHS_TO_CONTENT:
        assert ask(harness, target, "Bearer nobodys")[0] in ("HIT", "STALE")


@every_target
def test_shared_login_serves_all(make_harness: Callable[..., CacheHarness], target: tuple[str, str]) -> None:
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"login robot"})
    ask(harness, target)
    for authorization in (None, local_token(harness, "public"), local_token(harness, "own:someone")):
        assert ask(harness, target, authorization)[0] in ("HIT", "REVALIDATED")
    assert {one.requester for one in harness.upstream.requests_matching(pattern=APP)} == {"login robot"}


def test_without_shared_login(harness: CacheHarness) -> None:
    assert harness.client().credential == Anonymous()


# logins that have ended


def end_login(harness: CacheHarness) -> None:
    """Make upstream refuse the configured login everywhere. Content without `readers` needs none."""

    def respond(request: Any, data: bytes | None) -> Any:
        if request.requester == "login robot":
            return error_response(401)
        assert data is not None
        is_manifest = "/manifests/" in request.path
        return serve_content(request, OCI_MANIFEST if is_manifest else "application/octet-stream", data)

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "^/v2/.+", respond)
    harness.login_source.refusal_reason = "auth.docker.io answered 401"


@every_target
@get_and_head
def test_an_ended_login_takes_nothing_public_away(
    make_harness: Callable[..., CacheHarness], target: tuple[str, str], head: bool
) -> None:
    harness = make_harness(login=LOGIN)
    fill_repository(harness)
    end_login(harness)
    for _ in range(2):
        ask(harness, target, head=head)
    pull(harness)
    harness.upstream.clear_requests()
    assert ask(harness, ("blob", str(BLOB)))[0] == "HIT"
    ask(harness, target, local_token(harness, "own:someone"), head=head)
    assert {request.requester for request in harness.upstream.requests} <= {None}
    assert harness.login_source.questions == 1
    [(registry, setting, reason)] = harness.login_source.changes
    assert (registry, setting, reason) == (str(HUB), "AUTH_REGISTRIES", "auth.docker.io answered 401")


@every_target
@get_and_head
@pytest.mark.parametrize("cached", [False, True])
def test_an_ended_login_refuses_what_is_private_and_says_so(
    make_harness: Callable[..., CacheHarness], target: tuple[str, str], head: bool, cached: bool
) -> None:
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"login robot"})
    if cached:
        pull(harness)
        harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("GET", "^/v2/.+", respond_with(401))
    harness.upstream.on("HEAD", "^/v2/.+", respond_with(401))
    harness.login_source.refusal_reason = "auth.docker.io answered 401"
    for _ in range(2):
        error = denied(harness, target, head=head)
        assert error.status == 401
        assert "registry-1.docker.io in AUTH_REGISTRIES is refused (auth.docker.io answered 401)" in error.message
        assert LOGIN.password not in error.message
    assert "AUTH_REGISTRIES" not in denied(harness, target, ALICE, head=head).message
    harness.upstream.reset()
    fill_repository(harness, readers={"login robot"})
    harness.login_source.refusal_reason = None
    harness.reactor.advance(LAST_RETRY)
    denied(harness, target, head=head)  # it is tried again in the background
    assert ask(harness, target, head=head)[1] in (None, DATA, MANIFEST)


def test_a_denied_repository_is_asked_for_without_the_login(make_harness: Callable[..., CacheHarness]) -> None:
    """GitHub's registry refuses public images to a login without the permission to read packages."""
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"someone else"})
    fill_repository(harness, COPY, readers={None})
    pull(harness, name=COPY)
    for target in PATHS_TO_CONTENT:
        assert "AUTH_REGISTRIES" not in denied(harness, target).message
    assert harness.login_source.changes == []
    assert harness.client().credential == LOGIN


def test_an_ended_login_and_lists(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(login=LOGIN)
    path = f"/v2/{APP}/tags/list"
    answers = {"login robot": 403, None: 200}
    harness.upstream.on("GET", path, lambda request, data: ScriptedResponse(answers[request.requester], b"[]"))
    harness.login_source.refusal_reason = "registry-1.docker.io answered 403"
    for _ in range(2):
        assert harness.run(harness.client().forward("GET", TAGS, path, Headers())).status == 200
    answers[None] = 401
    with pytest.raises(Unauthorized, match="AUTH_REGISTRIES"):
        harness.run(harness.client().forward("GET", TAGS, path, Headers()))
    harness.upstream.on("POST", "", respond_with(401))
    pushed = harness.run(harness.client().forward("POST", Target(Kind.UPLOADS, NAME), path, Headers()))
    assert pushed.status == 401  # upstream's own words: the login would not be used for it


def test_a_ping_while_the_login_is_refused(make_harness: Callable[..., CacheHarness]) -> None:
    """docker without a login pulls nothing at all from a registry that asks for Basic, not even public images."""
    harness = make_harness(login=LOGIN)
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate='Basic realm="x"'))
    harness.login_source.refusal_reason = "it answered 401"
    fill_repository(harness, registry=OTHER, readers={"someone else"})
    denied(harness, ("manifest", "1"), registry=OTHER)
    harness.run(harness.client(registry=OTHER).ping())


# outage

OUTAGES = [
    (raise_error(UpstreamUnreachable("registry-1.docker.io: connection refused")), 502),
    (raise_error(UpstreamTimeout("registry-1.docker.io: timed out")), 504),
    (raise_error(UpstreamBroken("auth.docker.io gives no token (status 503)")), 502),
    (raise_error(TooManyRequests("auth.docker.io limits the rate of tokens")), 429),
    (respond_with(429), 429),
    (respond_with(500), 502),
    (respond_with(503), 502),
]


def make_unreachable(harness: CacheHarness, failure: Any = OUTAGES[0][0]) -> None:
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", failure)


@every_target
@get_and_head
@pytest.mark.parametrize("login", [None, LOGIN], ids=["public", "shared"])
@pytest.mark.parametrize("days", [0, 1, 1000])
def test_public_content_is_served_throughout_outage(
    make_harness: Callable[..., CacheHarness],
    target: tuple[str, str],
    head: bool,
    login: BasicCredentials | None,
    days: int,
) -> None:
    harness = make_harness(login=login)
    fill_repository(harness, readers=None if login is None else {"login robot"})
    pull(harness)
    make_unreachable(harness)
    harness.reactor.advance(GRANT_TTL + days * 86400)
    restarted = make_harness(login=login, upstream=harness.upstream)  # a restart in between
    for cache in (harness, restarted):
        for authorization in (None, local_token(harness, "public")):
            assert ask(cache, target, authorization, head=head)[0] == "STALE"


@every_target
@get_and_head
@pytest.mark.parametrize(("failure", "status"), OUTAGES)
@pytest.mark.parametrize(
    "authorization", [None, BOB, "local token of nobody", "local token of bob", "expired", "forged"]
)
def test_private_content_stays_private_during_outage(
    harness: CacheHarness, target: tuple[str, str], head: bool, failure: Any, status: int, authorization: str | None
) -> None:
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    alice = harness.identities.for_authorization(str(HUB), ALICE)
    expired = local_token(harness, alice)
    harness.reactor.advance(GRANT_TTL + TOKEN_LIFETIME)
    token = local_token(harness, alice)
    header = {
        "local token of nobody": local_token(harness, "public"),
        "local token of bob": local_token(harness, harness.identities.for_authorization(str(HUB), BOB)),
        "forged": token[:-2] + ("AA" if token[-2:] != "AA" else "BB"),
        "expired": expired,
    }.get(authorization or "", authorization)
    make_unreachable(harness, failure)
    error = denied(harness, target, header, head=head)
    assert error.status == (401 if authorization in ("expired", "forged") else status)


@every_target
@get_and_head
@pytest.mark.parametrize(("failure", "status"), OUTAGES)
@pytest.mark.parametrize("restart", [False, True])
def test_client_grant_is_valid_for_a_day_during_outage(
    make_harness: Callable[..., CacheHarness],
    target: tuple[str, str],
    head: bool,
    failure: Any,
    status: int,
    restart: bool,
) -> None:
    """The client may use the same credential, or a local token with its identity."""
    harness = make_harness()
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    make_unreachable(harness, failure)
    harness.reactor.advance(STALE_GRANT_TTL - 1)
    if restart:
        harness = make_harness(upstream=harness.upstream)
    tokens = (ALICE, local_token(harness, harness.identities.for_authorization(str(HUB), ALICE)))
    for authorization in tokens:
        assert ask(harness, target, authorization, head=head)[0] == "STALE"
    harness.reactor.advance(1)
    for authorization in tokens:
        assert denied(harness, target, authorization, head=head).status == status


@every_target
def test_local_token_is_no_credential_while_upstream_is_up(harness: CacheHarness, target: tuple[str, str]) -> None:
    """Upstream is asked as for a client without a credential, and its denial applies."""
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    token = local_token(harness, harness.identities.for_authorization(str(HUB), ALICE))
    harness.upstream.clear_requests()
    assert denied(harness, target, token).status == 401
    assert {one.requester for one in harness.upstream.requests} == {None}


@every_target
@pytest.mark.parametrize("defect", ["expired", "altered"])
def test_invalid_local_token(harness: CacheHarness, target: tuple[str, str], defect: str) -> None:
    """It is rejected even for public content, without an upstream request, so that the client gets a new token."""
    fill_repository(harness)
    pull(harness)
    token = local_token(harness, "public")
    if defect == "altered":
        token = token.replace("drp.", "drp.AAAA")
    if defect == "expired":
        harness.reactor.advance(TOKEN_LIFETIME)
    harness.upstream.clear_requests()
    assert isinstance(denied(harness, target, token), Unauthorized)
    client = harness.client(token)
    for work in (
        client.ping(),
        client.forward("GET", Target(Kind.CATALOG), "/v2/_catalog", Headers()),
        client.forward_page("GET", "/", Headers()),
    ):
        with pytest.raises(Unauthorized):
            harness.run(work)
    assert harness.upstream.requests == []


# /v2/


def test_ping_without_credential(harness: CacheHarness) -> None:
    """The client needs the challenge in order to get a token."""
    harness.upstream.on("GET", "^/v2/$", respond_with(401))
    with pytest.raises(Unauthorized) as excinfo:
        harness.run(harness.client().ping())
    [(name, value)] = harness.client().challenge(excinfo.value, secure=True)
    assert name == "WWW-Authenticate"
    [challenge] = parse_challenges([value])
    assert challenge.parameters["realm"] == "https://auth.docker.io/token"


OUTAGES = [UpstreamUnreachable("gone"), UpstreamTimeout("silent"), UpstreamFailing("503")]


@pytest.mark.parametrize("error", OUTAGES)
@pytest.mark.parametrize("target", PATHS_TO_CONTENT)
@pytest.mark.parametrize("head", [False, True])
def test_outage_asks_for_login(harness: CacheHarness, error: Any, target: tuple[str, str], head: bool) -> None:
    """containerd fetches a token only if the request for the manifest gets a challenge."""
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", raise_error(error))
    client = harness.client()
    with pytest.raises(RegistryError) as excinfo:
        ask(harness, target, head=head)
    refusal = client.request_login(excinfo.value, NAME)
    assert isinstance(refusal, Unauthorized) and error.message in refusal.message
    [(_, value)] = client.challenge(refusal, secure=True)
    [challenge] = parse_challenges([value])
    assert challenge.scheme == "bearer"
    assert challenge.parameters == {
        "realm": "https://auth.docker.io/token", "service": "registry.docker.io", "scope": f"repository:{NAME}:pull"
    }  # fmt: skip
    assert (
        ask(harness, target, local_token(harness, harness.principal(authorization=ALICE).identity), head=head)[0]
        == "STALE"
    )


def test_outage_asks_only_clients_that_a_login_may_help(
    harness: CacheHarness, make_harness: Callable[..., CacheHarness]
) -> None:
    error = UpstreamUnreachable("gone")
    for authorization in (ALICE, local_token(harness, "public")):  # no second challenge, which would be no cause
        assert harness.client(authorization).request_login(error, NAME) is error
    assert harness.client(registry=OTHER).request_login(error, NAME) is error  # its challenge is not known
    others = TooManyRequests("of tokens"), IntermediaryRefused(403, b"", []), refusal_of("MANIFEST_UNKNOWN")
    for other_error in others:
        assert harness.client().request_login(other_error, NAME) is other_error
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate='Basic realm="x"'))
    with pytest.raises(Unauthorized):
        harness.run(harness.client(registry=OTHER).ping())
    refusal = harness.client(registry=OTHER).request_login(error, NAME)
    assert refusal.headers == (("WWW-Authenticate", 'Basic realm="x"'),)
    with_login = make_harness(login=LOGIN)
    assert with_login.client(registry=OTHER).request_login(error, NAME) is error  # the configured login serves it


def refusal_of(code: str, status: int = 404) -> UpstreamRefused:
    return UpstreamRefused(status, json.dumps({"errors": [{"code": code}]}).encode(), [])


HIDDEN = {
    "403": refusal_of("DENIED", 403),
    "403 without a body": UpstreamRefused(403, b"", []),
    "404 of the repository": refusal_of("NAME_UNKNOWN"),
    "404 without a code": UpstreamRefused(404, b"not found", []),
}


@pytest.mark.parametrize("error", HIDDEN.values(), ids=HIDDEN)
def test_a_registry_that_hides_a_repository_is_asked_again_with_a_login(
    harness: CacheHarness, make_harness: Callable[..., CacheHarness], error: UpstreamRefused
) -> None:
    """Directly, its challenge comes first, and the client of a private image logs in. We have asked with a token."""
    [challenge] = parse_challenges([value for _, value in harness.client().request_login(error, NAME).headers])
    assert challenge.parameters["scope"] == f"repository:{NAME}:pull"
    for authorization in (ALICE, local_token(harness, "public")):
        assert harness.client(authorization).request_login(error, NAME) is error
    assert harness.client(registry=OTHER).request_login(error, NAME) is error  # it has no logins
    with_login = make_harness(login=LOGIN)  # which may not pull it, and the client's own may
    assert isinstance(with_login.client().request_login(error, NAME), Unauthorized)


@get_and_head
@pytest.mark.parametrize("head_status", [401, 429])
def test_a_rate_limit_of_clients_without_a_login_asks_for_one(
    harness: CacheHarness, head: bool, head_status: int
) -> None:
    """Directly, a request without a token gets a challenge, and so a client with a login gets to its own limit."""
    fill_repository(harness, readers={ALICE})
    pull(harness, ALICE)
    harness.upstream.on("HEAD", "manifests", respond_with(head_status))
    harness.upstream.on("GET", "manifests", respond_with(429, retry_after="600"))
    client = harness.client()
    with pytest.raises(UpstreamFailing) as excinfo:
        ask(harness, PATHS_TO_CONTENT[0], head=head)
    assert excinfo.value.status == 429
    refusal = client.request_login(excinfo.value, NAME)
    assert isinstance(refusal, Unauthorized) and excinfo.value.message in refusal.message
    [(_, value)] = client.challenge(refusal, secure=True)
    [challenge] = parse_challenges([value])
    assert challenge.parameters == {
        "realm": "https://auth.docker.io/token", "service": "registry.docker.io", "scope": f"repository:{NAME}:pull"
    }  # fmt: skip
    for authorization in (ALICE, local_token(harness, "public")):  # they have a limit, which a challenge would hide
        assert harness.client(authorization).request_login(excinfo.value, NAME) is excinfo.value
    assert harness.client(registry=OTHER).request_login(excinfo.value, NAME) is excinfo.value  # it has no logins


FOREIGN = 'realm="https://auth.other.example/token?tenant=blue"'


@pytest.mark.parametrize("state", ["up", "registry down", "realm down", "shared login"])
def test_realm_that_a_ping_names(make_harness: Callable[..., CacheHarness], state: str) -> None:
    """Upstream's own while it can be asked: its client need not use the proxy.

    A configured login serves clients that begin with /v2/ by tokens of ours, because the realm may refuse them.
    """
    harness = make_harness(login=LOGIN if state == "shared login" else None)
    learn_challenge(harness, OTHER, FOREIGN)
    failing = {"registry down": "^/v2/$", "realm down": "^/token"}.get(state)
    if failing is not None:
        harness.upstream.on("GET", failing, raise_error(UpstreamUnreachable("gone")))
    harness.upstream.on("GET", "^/v2/$", respond_with(401, www_authenticate=f"Bearer {FOREIGN}"))
    client = harness.client(registry=OTHER)
    with pytest.raises(Unauthorized) as excinfo:
        harness.run(client.ping())
    [(_, value)] = client.challenge(excinfo.value, secure=True)
    local_realm = f"https://{OTHER}{TOKEN_PATH}?tenant=blue"
    assert value == f"Bearer {FOREIGN}" if state == "up" else value == f'Bearer realm="{local_realm}"'


def test_an_outage_says_which_token_server_to_add(harness: CacheHarness, log_lines: list[str]) -> None:
    """Logins there are not known here, so that private content that is cached is refused. Once in an hour is enough."""
    outage = UpstreamUnreachable("gone")
    harness.client(ALICE).request_login(outage, NAME)  # the token server of Docker Hub is intercepted
    learn_challenge(harness, OTHER, FOREIGN)
    harness.client(registry=OTHER).request_login(outage, NAME)  # it has no login yet
    harness.client(ALICE, registry=OTHER).request_login(UpstreamRefused(404, b"", []), NAME)
    assert not [line for line in log_lines if "REGISTRIES" in line]
    for _ in range(3):
        assert harness.client(ALICE, registry=OTHER).request_login(outage, NAME) is outage
    assert len([line for line in log_lines if f"{OTHER} cannot" in line and "auth.other.example:443" in line]) == 1
    harness.reactor.advance(3600)
    for method in ("GET", "POST"):
        harness.upstream.on(method, "^/token", raise_error(outage))
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.pull_through.token(OTHER, "service=x", LOGIN_OF_ALICE, None))
    assert len([line for line in log_lines if "REGISTRIES" in line]) == 2


def test_realm_that_an_outage_names(harness: CacheHarness) -> None:
    """The realm cannot be asked about a login during an outage, and this proxy may know it. See upstream's own else."""
    learn_challenge(harness, OTHER, FOREIGN)
    client, outage = harness.client(registry=OTHER), UpstreamUnreachable("gone")
    [(_, value)] = client.challenge(client.request_login(outage, NAME), secure=True)
    assert f"https://{OTHER}{TOKEN_PATH}?tenant=blue" in value
    refusal = UpstreamRefused(401, b"", [("www-authenticate", f'Bearer {FOREIGN},scope="x"')])
    for error, expected in ((refusal, f'Bearer {FOREIGN},scope="x"'), (Unauthorized("no"), f"Bearer {FOREIGN}")):
        assert client.challenge(error, secure=True) == [("WWW-Authenticate", expected)]
    with pytest.raises(Unauthorized) as excinfo:
        harness.run(harness.client("Bearer drp.x", registry=OTHER).ping())
    assert TOKEN_PATH in client.challenge(excinfo.value, secure=True)[0][1]


def test_ping_with_local_token(harness: CacheHarness) -> None:
    harness.run(harness.client(local_token(harness, "public")).ping())
    assert harness.upstream.requests == []


@pytest.mark.parametrize("login", [None, LOGIN])
def test_ping_with_basic_challenge(make_harness: Callable[..., CacheHarness], login: BasicCredentials | None) -> None:
    """A configured login serves the client. Without one, the client needs its own login."""
    harness = make_harness(login=login)
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate='Basic realm="x"'))
    ping = harness.client(registry=OTHER).ping()
    if login is not None:
        harness.run(ping)
    else:
        with pytest.raises(Unauthorized):
            harness.run(ping)


@pytest.mark.parametrize(
    ("field", "is_served"),
    [
        ('Negotiate, Basic realm="x"', True),
        ('Basic realm="x", Negotiate', True),
        ('NTLM, nEGOTIATE, bASIC realm="x"', True),
        ('Digest realm="x", nonce="y", Basic realm="x"', True),
        ('Negotiate oYG2MIGzoAM=, Basic realm="x"', True),
        ("Negotiate", False),
        ("NTLM, Negotiate", False),
        ('Negotiate, Basic realm="x", Bearer realm="https://auth.docker.io/token"', False),
        ('Bearer realm="https://auth.docker.io/token", Basic realm="x"', False),
    ],
)
def test_ping_with_several_challenges(make_harness: Callable[..., CacheHarness], field: str, is_served: bool) -> None:
    """A login of AUTH_REGISTRIES serves clients wherever the registry accepts Basic; with Bearer they get a token."""
    harness = make_harness(login=LOGIN)
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate=field))
    ping = harness.client(registry=OTHER).ping()
    if is_served:
        harness.run(ping)
    else:
        with pytest.raises(Unauthorized):
            harness.run(ping)


@every_target
@pytest.mark.parametrize("empty", ["Basic Og==", "basic  Og== ", "Basic Og", "Basic", "Basic "])
def test_an_empty_login_is_none(make_harness: Callable[..., CacheHarness], target: tuple[str, str], empty: str) -> None:
    """skopeo and podman send one if they have no login. It must not win over that of AUTH_REGISTRIES."""
    harness = make_harness(login=LOGIN)
    fill_repository(harness, readers={"login robot"})
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate='Basic realm="x"'))
    harness.run(harness.client(empty, registry=OTHER).ping())
    assert harness.client(empty).credential == LOGIN
    assert ask(harness, target, empty)[1] in (DATA, MANIFEST)
    harness.run(harness.client(empty).forward_page("GET", "/", Headers()))
    assert "authorization" not in harness.upstream.requests[-1].headers


def test_ping_without_challenge(harness: CacheHarness) -> None:
    harness.run(harness.client(registry=OTHER).ping())


def test_ping_with_client_credential_goes_upstream(harness: CacheHarness) -> None:
    harness.upstream.on(
        "GET",
        "^/v2/$",
        lambda request, data: ScriptedResponse(200) if request.requester == ALICE else error_response(401),
    )
    harness.run(harness.client(ALICE).ping())
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.client(BOB).ping())
    assert excinfo.value.status == 401
    harness.upstream.go_down()
    harness.run(harness.client(BOB).ping())  # allowed, because each repository checks access again


def test_ping_of_unreachable_registry(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.client(registry=OTHER).ping())
    with pytest.raises(Unauthorized):  # Docker Hub's challenge is built in
        harness.run(harness.client().ping())


# tokens


def test_token_urls(harness: CacheHarness) -> None:
    auth = Registry.parse("auth.docker.io")
    assert harness.pull_through.registry_for_realm(auth, "/token") == HUB
    assert harness.pull_through.registry_for_realm(auth, "/other") is None
    assert harness.pull_through.registry_for_realm(HUB, "/token") is None
    assert harness.pull_through.registry_for_realm(HUB, TOKEN_PATH) == HUB
    assert harness.pull_through.registry_for_realm(OTHER, TOKEN_PATH) is None  # its challenge is not known
    with pytest.raises(NameUnknown):
        harness.run(harness.pull_through.token(OTHER, "", None, None))


def test_plain_http_registry_with_its_own_realm(make_harness: Callable[..., CacheHarness]) -> None:
    plain = Registry.parse("http://plain.example:5000")
    harness = make_harness(registries=(plain,))
    harness.upstream.on(
        "GET",
        "^/v2/$",
        lambda request, data: error_response(401, www_authenticate='Bearer realm="http://plain.example:5000/token"'),
    )
    with pytest.raises(Unauthorized):
        harness.run(harness.client(registry=plain).ping())
    assert harness.pull_through.registry_for_realm(plain, "/token") == plain


def test_token_flow_during_outage(harness: CacheHarness) -> None:
    """Request a token like docker, and then pull with it."""
    fill_repository(harness, readers={ALICE, BasicCredentials("alice", "pw").authorization})
    harness.upstream.on(
        "GET", "^/token", lambda request, data: ScriptedResponse(200, b'{"token":"alice","expires_in":300}')
    )
    login = BasicCredentials("alice", "pw").authorization
    harness.run(harness.pull_through.token(HUB, f"service={SERVICE}&scope=repository:{APP}:pull", login, None))
    pull(harness, ALICE)
    make_unreachable(harness)
    harness.upstream.down = UpstreamUnreachable("gone")
    harness.reactor.advance(GRANT_TTL)
    for query, expected in (
        (f"scope=repository:{APP}:pull", True),
        ("scope=repository:library/other:pull", False),
        (f"service={SERVICE}", False),
    ):
        token = "Bearer " + json.loads(harness.run(harness.pull_through.token(HUB, query, login, None)))["token"]
        harness.run(harness.client(token).ping())
        for target in PATHS_TO_CONTENT:
            if expected:
                assert ask(harness, target, token)[0] == "STALE"
            else:
                assert denied(harness, target, token).status == 502


@pytest.mark.parametrize("login", [None, BasicCredentials("alice", "pw").authorization])
@pytest.mark.parametrize(
    ("query", "form"),
    [
        ("service=notary.docker.io&scope=repository:library/app:pull", None),
        (f"service={SERVICE}&service=notary.docker.io", None),
        ("service=%6eotary.docker.io", None),
        (f"service={SERVICE}", b"service=notary.docker.io&scope=repository:library/app:pull"),
    ],
)
def test_token_for_another_service_is_the_realms(
    harness: CacheHarness, query: str, form: bytes | None, login: str | None
) -> None:
    content = b'{"token":"theirs","expires_in":300}'
    for method in ("GET", "POST"):
        harness.upstream.on(method, "^/token", lambda request, data: ScriptedResponse(200, content))
    harness.run(harness.pull_through.token(HUB, f"service={SERVICE}", login, None))
    assert harness.run(harness.pull_through.token(HUB, query, login, form)) == content
    assert harness.upstream.requests[-1].headers.all("authorization") == ([] if login is None else [login])
    harness.upstream.down = UpstreamUnreachable("gone")
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.pull_through.token(HUB, query, login, form))


@pytest.mark.parametrize("query", ["", "service=", f"service={SERVICE}", f"service={SERVICE}&service="])
def test_local_token_for_a_registrys_service_during_outage(harness: CacheHarness, query: str) -> None:
    harness.upstream.go_down()
    token = json.loads(harness.run(harness.pull_through.token(HUB, query, None, None)))["token"]
    assert token.startswith("drp.")
    assert harness.identities.read_token(f"Bearer {token}") is not None


def learn_challenge(harness: CacheHarness, registry: Registry, *parameters: str) -> None:
    fields = [f"Bearer {','.join(parameters)}"]
    harness.records.put({"fields": fields, "checked": harness.now()}, "challenge", str(registry))


OTHER_HOST = Registry.parse("other.example")
TENANTS = tuple(map(Registry.parse, ("one.example", "blue.example", "green.example", "auth.example")))


@pytest.mark.parametrize("order", [TENANTS, TENANTS[::-1]])
@pytest.mark.parametrize("login", [None, BasicCredentials("alice", "pw").authorization])
@pytest.mark.parametrize(
    ("query", "sent", "identity"),
    [
        ("scope=x", "scope=x", "https://auth.example/token"),
        ("tenant=blue&scope=x", "tenant=blue&scope=x", "https://auth.example/token?tenant=blue"),
        ("scope=x&tenant=green&b=c", "scope=x&tenant=green&b=c", "https://auth.example/token?b=c&tenant=green"),
        ("tenant=green", "tenant=green", "https://auth.example/token"),
    ],
)
def test_registries_with_one_realm_and_a_query_each(
    make_harness: Callable[..., CacheHarness], order: Any, login: str | None, query: str, sent: str, identity: str
) -> None:
    """A user of one tenant is not the user of that name of another."""
    harness = make_harness(registries=order)
    for registry, own in zip(TENANTS, ("", "?tenant=blue", "?b=c&tenant=green", ""), strict=True):
        learn_challenge(harness, registry, f'realm="https://auth.example/token{own}"')
    harness.upstream.on("GET", "^/token", lambda request, data: ScriptedResponse(200, b'{"token":"t"}'))
    registry = harness.pull_through.registry_for_realm(TENANTS[3], "/token")
    assert registry is not None
    harness.run(harness.pull_through.token(registry, query, login, None))
    [request] = harness.upstream.requests
    assert (request.path, request.headers.get("authorization")) == (f"/token?{sent}", login)
    if login is not None:
        client = harness.identities.for_authorization(identity, login)
        assert harness.records.get("client", "auth.example", client) is not None


ELSEWHERE = Registry.parse("logins.example")
LOGIN_OF_ALICE = BasicCredentials("alice", "pw").authorization
PATH_OF_TOKEN = f"/token?service=s&scope=repository:{APP}:pull"
ISSUED = b'{"token":"issued","expires_in":300}'


def with_realm_elsewhere(
    make_harness: Callable[..., CacheHarness], query: str = "", name: str = "other.example"
) -> CacheHarness:
    """Return a harness of a registry with a token server on an intercepted host of another owner."""
    registry = Registry.parse(name)
    harness = make_harness(registries=(registry, ELSEWHERE))
    learn_challenge(harness, registry, f'realm="https://logins.example/token{query}"', 'service="s"')
    return harness


def ask_elsewhere(
    harness: CacheHarness,
    content: Any,
    authorization: str | None = LOGIN_OF_ALICE,
    path: str = PATH_OF_TOKEN,
    form: bytes | None = None,
) -> bytes:
    """Forward a token request as the interception does it. Return the body that the client gets."""
    harness.upstream.reset()
    response = content if isinstance(content, ScriptedResponse) else ScriptedResponse(200, content)
    for method in ("GET", "POST"):
        harness.upstream.on(method, "^/", lambda request, data: response)
    registry = harness.pull_through.registry_naming(ELSEWHERE, path.partition("?")[0])
    assert registry is not None
    client = harness.client(authorization, registry=ELSEWHERE)
    method = "GET" if form is None else "POST"
    forwarded = harness.run(client.forward_token_request(registry, method, path, Headers(), form))
    request = harness.upstream.requests[-1]
    assert (request.method, request.path, request.headers.get("authorization")) == (method, path, authorization)
    body = b""
    while piece := harness.run(forwarded.read_chunk()):
        body += piece
    return body


def is_login_known(harness: CacheHarness, authorization: str = LOGIN_OF_ALICE, query: str = "") -> bool:
    client = harness.identities.for_authorization(f"https://logins.example/token{query}", authorization)
    return harness.records.get("client", "logins.example", client) is not None


def test_logins_at_a_page_that_is_a_token_server(make_harness: Callable[..., CacheHarness]) -> None:
    harness = with_realm_elsewhere(make_harness)
    assert ask_elsewhere(harness, ISSUED) == ISSUED
    assert is_login_known(harness) and harness.identities.is_bound("Bearer issued")
    token = ClientCredential("Bearer issued")
    alice = harness.identities.for_authorization("https://logins.example/token", LOGIN_OF_ALICE)
    for name, is_hers in ((APP, True), ("other/app", False)):
        identity = harness.identities.for_credential(OTHER, parse_repository(str(name)), token)
        assert (identity == alice) is is_hers
    harness.upstream.go_down()
    registry = harness.pull_through.registry_naming(ELSEWHERE, "/token")
    query = PATH_OF_TOKEN.partition("?")[2]
    content = harness.run(harness.pull_through.token(registry, query, LOGIN_OF_ALICE, None))
    local = harness.identities.read_token(f"Bearer {json.loads(content)['token']}")
    assert local is not None and local.identity_at(parse_repository(str(APP))) == alice
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.pull_through.token(registry, query, BasicCredentials("alice", "x").authorization, None))


def test_outage_of_a_page_that_is_a_token_server(make_harness: Callable[..., CacheHarness]) -> None:
    """Clients may have been told its URL just before. Others than those that logged in get its error."""
    harness = with_realm_elsewhere(make_harness)
    ask_elsewhere(harness, ISSUED)
    gone, query = UpstreamUnreachable("gone"), PATH_OF_TOKEN.partition("?")[2]

    def token_after(error: RegistryError, authorization: str | None, query: str = query) -> str:
        client = harness.client(authorization, registry=ELSEWHERE)
        return str(json.loads(client.token_after(error, OTHER_HOST, query))["token"])

    assert token_after(gone, LOGIN_OF_ALICE).startswith("drp.")
    for authorization in (None, BasicCredentials("alice", "x").authorization):
        with pytest.raises(UpstreamUnreachable):
            token_after(gone, authorization)
    with pytest.raises(UpstreamUnreachable):
        token_after(gone, LOGIN_OF_ALICE, "service=notary")
    with pytest.raises(BadRequest):
        token_after(BadRequest("no outage"), LOGIN_OF_ALICE)
    harness.reactor.advance(STALE_GRANT_TTL)
    with pytest.raises(UpstreamUnreachable):
        token_after(gone, LOGIN_OF_ALICE)


def test_a_coded_token_of_such_a_page(make_harness: Callable[..., CacheHarness]) -> None:
    """It is coded although the client's Accept-Encoding is not passed on."""
    harness = with_realm_elsewhere(make_harness)
    response = ScriptedResponse(200, gzip.compress(ISSUED), {"content-encoding": "gzip"})
    assert ask_elsewhere(harness, response) == ISSUED
    assert is_login_known(harness)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_login_at_such_a_page(make_harness: Callable[..., CacheHarness], status: int) -> None:
    harness = with_realm_elsewhere(make_harness)
    ask_elsewhere(harness, ISSUED)
    for content, fields, is_known in (
        (b"<html>", {"content-type": "text/html"}, True),  # a wall's
        (b'{"details":"no"}', {}, False),
    ):
        assert ask_elsewhere(harness, ScriptedResponse(status, content, fields)) == content
        assert is_login_known(harness) is is_known
    ask_elsewhere(harness, ScriptedResponse(500, ISSUED))
    assert not is_login_known(harness)


def test_a_token_in_pieces(make_harness: Callable[..., CacheHarness]) -> None:
    """The login is known before the client has the last byte, which it need not wait for the end of the body for."""
    harness = with_realm_elsewhere(make_harness)
    response = ScriptedResponse(200, b'{"a":{},"token":"issued"}', length=None, sent=8)
    harness.upstream.on("GET", "^/", lambda request, data: response)
    client = harness.client(LOGIN_OF_ALICE, registry=ELSEWHERE)
    forwarded = harness.run(client.forward_token_request(OTHER_HOST, "GET", PATH_OF_TOKEN, Headers()))
    assert harness.run(forwarded.read_chunk()) == b'{"a":{},"token":"issued"}'[:8]
    assert not is_login_known(harness)
    response.send()
    harness.run(forwarded.read_chunk())
    assert is_login_known(harness)
    response.finish()
    assert harness.run(forwarded.read_chunk()) == b""


@pytest.mark.parametrize(
    "content",
    [b"<html>", b"", b"{}", b'{"token":5}', b'{"token":"a b"}', b"[" * 60_000, b"}" * 70_000, b'{"token":',
     ISSUED[:-1] + b" " * 70_000 + b"}"],
)  # fmt: skip
def test_other_content_of_such_a_page(make_harness: Callable[..., CacheHarness], content: bytes) -> None:
    harness = with_realm_elsewhere(make_harness)
    assert ask_elsewhere(harness, content) == content
    assert not is_login_known(harness)


@pytest.mark.parametrize(
    ("authorization", "path", "form"),
    [
        (None, PATH_OF_TOKEN, None),
        (LOGIN_OF_ALICE, f"{PATH_OF_TOKEN}&username=bob&password=x", None),
        (LOGIN_OF_ALICE, f"{PATH_OF_TOKEN};access_token=x", None),
        (LOGIN_OF_ALICE, PATH_OF_TOKEN, b"username=bob&password=x"),
        (None, PATH_OF_TOKEN, b"username=alice"),
        (None, PATH_OF_TOKEN, b"&".join(b"x=1" for _ in range(60))),
        (None, "/token?service=notary", b"username=alice&password=pw&service=notary"),
        (LOGIN_OF_ALICE, "/token?service=notary", None),
    ],
)
def test_requests_to_such_a_page_that_are_no_login(
    make_harness: Callable[..., CacheHarness], authorization: str | None, path: str, form: bytes | None
) -> None:
    harness = with_realm_elsewhere(make_harness)
    assert ask_elsewhere(harness, ISSUED, authorization, path, form) == ISSUED
    assert not is_login_known(harness) and not harness.identities.is_bound("Bearer issued")


@pytest.mark.parametrize("form", [b"username=alice&password=pw&service=s", b"refresh_token=r&service=s"])
def test_login_by_form_at_such_a_page(make_harness: Callable[..., CacheHarness], form: bytes) -> None:
    harness = with_realm_elsewhere(make_harness)
    assert ask_elsewhere(harness, ISSUED, None, "/token", form) == ISSUED
    assert is_login_known(harness, LOGIN_OF_ALICE if b"username" in form else "Refresh r")


@pytest.mark.parametrize(("query", "is_known"), [("tenant=blue&", True), ("", False), ("tenant=green&", False)])
def test_tenants_of_such_a_page(make_harness: Callable[..., CacheHarness], query: str, is_known: bool) -> None:
    """Without the tenant of the realm, the token is another server's."""
    harness = with_realm_elsewhere(make_harness, "?tenant=blue")
    ask_elsewhere(harness, ISSUED, path=f"/token?{query}service=s")
    assert is_login_known(harness, query="?tenant=blue") is is_known
    assert not is_login_known(harness)


@pytest.mark.parametrize(
    ("name", "host", "path", "named"),
    [
        ("other.example", "https://logins.example", "/token", True),
        ("http://other.example", "https://logins.example", "/token", True),
        ("other.example", "https://logins.example", "/tokens", False),
        ("other.example", "https://logins.example:444", "/token", False),
        ("other.example", "http://logins.example", "/token", False),
        ("logins.example", "https://logins.example", "/token", False),  # it is the registry's own
    ],
)
def test_pages_that_registries_name(
    make_harness: Callable[..., CacheHarness], name: str, host: str, path: str, named: bool
) -> None:
    harness = with_realm_elsewhere(make_harness, name=name)
    assert (harness.pull_through.registry_naming(Registry.parse(host), path) is not None) is named


@pytest.mark.parametrize("login", [None, BasicCredentials("alice", "pw").authorization])
def test_a_realms_own_service_and_scope_stay(make_harness: Callable[..., CacheHarness], login: str | None) -> None:
    """Also where the client drops them; a token for both services is one for the registry."""
    harness = make_harness()
    learn_challenge(harness, OTHER, 'realm="https://auth.example/token?service=a&scope=b"', 'service="c"')
    harness.upstream.on("GET", "^/token", lambda request, data: ScriptedResponse(200, b'{"token":"t"}'))
    for query in ("service=a&scope=b&service=c&scope=d", "service=c&scope=d"):
        harness.upstream.clear_requests()
        harness.reactor.advance(60)
        harness.run(harness.pull_through.token(OTHER, query, login, None))
        [request] = harness.upstream.requests
        assert request.path == "/token?service=a&scope=b&service=c&scope=d"
        assert harness.identities.is_bound("Bearer t")


@every_target
@pytest.mark.parametrize("hours", [0, 1])
@pytest.mark.parametrize("reachable", [True, False])
def test_bound_token_counts_for_its_repositories_until_its_end(
    harness: CacheHarness, target: tuple[str, str], hours: int, reachable: bool
) -> None:
    """Alice herself may read. Upstream refuses the tokens, if it can be asked."""
    fill_repository(harness, readers={ALICE})
    for token, name, lifetime in (("alice", APP, 86400), ("other", "library/other", 86400), ("short", APP, 60)):
        expires_at = harness.now() + lifetime
        harness.identities.bind(token, "realm", "Basic alice", frozenset({parse_repository(name)}), expires_at)
    pull(harness, ALICE)
    harness.reactor.advance(61 + hours * 3600)
    if not reachable:
        make_unreachable(harness)
    for token in ("Bearer other", "Bearer short", "Bearer unknown"):
        assert denied(harness, target, token).status == (401 if reachable else 502)
    assert ask(harness, target, ALICE)[1] in (DATA, MANIFEST)


# forwarded requests


def test_forward(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(login=LOGIN)
    for authorization, credential in (
        (None, LOGIN),
        (ALICE, ClientCredential(ALICE)),
        (local_token(harness, "public"), LOGIN),
    ):
        harness.run(
            harness.client(authorization).forward("GET", TAGS, f"/v2/{APP}/tags/list?n=2", Headers([("x", "1")]))
        )
        request = harness.upstream.requests[-1]
        assert (request.method, request.path, request.credential) == ("GET", f"/v2/{APP}/tags/list?n=2", credential)
        assert (request.follow, request.options) == (True, {"name": NAME, "actions": "pull"})
        assert request.headers.get("x") == "1"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_shared_login_is_read_only(make_harness: Callable[..., CacheHarness], method: str) -> None:
    harness = make_harness(login=LOGIN)
    for authorization, credential in ((None, Anonymous()), (ALICE, ClientCredential(ALICE))):
        for target in (TAGS, Target(Kind.UPLOADS, NAME), Target(Kind.MANIFEST, NAME, parse_reference("1"))):
            client = harness.client(authorization)
            harness.run(client.forward(method, target, f"/v2/{APP}/blobs/uploads/", Headers(), "body"))
            request = harness.upstream.requests[-1]
            assert (request.credential, request.body, request.options["actions"]) == (credential, "body", "pull,push")
            assert not request.follow


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (Target(Kind.UPLOAD, NAME, session="s"), f"/v2/{APP}/blobs/uploads/s"),
        (TAGS, f"/v2/{APP}/tags/list?access_token=x"),
        (Target(Kind.CATALOG), "/v2/_catalog?n=5&scope=repository:x:pull"),
        (Target(Kind.BASE), "/v2/"),
    ],
)
def test_shared_login_is_for_pulls_only(make_harness: Callable[..., CacheHarness], target: Target, path: str) -> None:
    harness = make_harness(login=LOGIN)
    for authorization, credential in ((None, Anonymous()), (ALICE, ClientCredential(ALICE))):
        harness.run(harness.client(authorization).forward("GET", target, path, Headers()))
        assert harness.upstream.requests[-1].credential == credential


@pytest.mark.parametrize("path", ["/api/v2.0/users", "/", "/service/token", "/v1/x", "/v2x/", "/v2/token?scope=x"])
def test_pages_are_sent_as_they_are(make_harness: Callable[..., CacheHarness], path: str) -> None:
    """Many registries have other APIs, in which the login may read more than images."""
    harness = make_harness(login=LOGIN)
    for authorization, expected in ((None, []), (local_token(harness, "public"), []), (ALICE, [ALICE])):
        harness.run(harness.client(authorization).forward_page("POST", path, Headers([("cookie", "a=b")]), "body"))
        request = harness.upstream.requests[-1]
        assert (request.method, request.path, request.body, request.follow) == ("POST", path, "body", False)
        assert (request.headers.all("authorization"), request.headers.get("cookie")) == (expected, "a=b")
        assert request.credential == Anonymous()


# referrers

SUBJECT = Digest.of(b"subject")
ONE = {"digest": str(Digest.of(b"1")), "size": 1, "mediaType": "x/y", "artifactType": "a/b"}
TWO = {**ONE, "artifactType": "c/d"}


def index(*descriptors: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(descriptors)}).encode()


def referrers(harness: CacheHarness, query: str = "", artifact_type: str | None = None) -> Any:
    return harness.run(harness.client().referrers(NAME, SUBJECT, ReferrersQuery(query, artifact_type)))


def test_referrers_from_upstream(harness: CacheHarness) -> None:
    content = index(ONE)
    harness.upstream.on("GET", "referrers", replace_with(content, oci_filters_applied="artifactType"))
    result = referrers(harness, "artifactType=a%2Fb", "a/b")
    assert (result.content, result.filtered) == (content, True)
    request = harness.upstream.requests[-1]
    assert request.path == f"/v2/{APP}/referrers/{SUBJECT}?artifactType=a%2Fb"
    assert request.headers.get("accept") == OCI_INDEX


@pytest.mark.parametrize(
    ("query", "is_shared"),
    [("", True), ("artifactType=a%2Fb", True), ("access_token=x", False), ("n=1&scope=x", False)],
)
def test_shared_login_is_for_referrers_of_a_pull(
    make_harness: Callable[..., CacheHarness], query: str, is_shared: bool
) -> None:
    harness = make_harness(login=LOGIN)
    harness.upstream.on("GET", "referrers", replace_with(EMPTY_INDEX))
    referrers(harness, query)
    assert harness.upstream.requests[-1].credential == (LOGIN if is_shared else Anonymous())
    harness.run(harness.client(ALICE).referrers(NAME, SUBJECT, ReferrersQuery(query, None)))
    assert harness.upstream.requests[-1].credential == ClientCredential(ALICE)


def test_referrers_redirect(harness: CacheHarness) -> None:
    """registry.k8s.io redirects these requests too."""
    content = index(ONE)
    harness.upstream.on(
        "GET",
        "referrers",
        lambda request, data: ScriptedResponse(200, content) if request.follow else error_response(307, location="/x"),
    )
    assert referrers(harness).content == content


def test_referrers_from_fallback_tag(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "referrers", respond_with(404))
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    assert referrers(harness).content == EMPTY_INDEX
    repository.put_manifest(index(ONE, TWO), f"sha256-{SUBJECT.hex}", media_type=OCI_INDEX)
    result = referrers(harness)
    assert (result.content, result.filtered) == (index(ONE, TWO), False)
    result = referrers(harness, "artifactType=a%2Fb", "a/b")
    assert result.filtered and b"c/d" not in result.content and b"a/b" in result.content


@pytest.mark.parametrize("status", [401, 403])
def test_referrers_denied(harness: CacheHarness, status: int) -> None:
    harness.upstream.on("GET", "referrers", respond_with(status))
    with pytest.raises(UpstreamRefused) as excinfo:
        referrers(harness)
    assert excinfo.value.status == status


@pytest.mark.parametrize(
    "content", [b"<h1>Sign in</h1>", b"[]", b"\xff", b" " * (MAX_MANIFEST + 1), b'{"manifests":{}}'], ids=range(5)
)
@pytest.mark.parametrize("endpoint", ["referrers", "manifests"])
def test_invalid_referrers(harness: CacheHarness, content: bytes, endpoint: str) -> None:
    if endpoint == "manifests":
        harness.upstream.on("GET", "referrers", respond_with(404))
    harness.upstream.on("GET", endpoint, replace_with(content, content_type=OCI_INDEX))
    with pytest.raises(UpstreamBroken):
        referrers(harness, "artifactType=a%2Fb", "a/b")


def test_referrers_during_outage(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        referrers(harness)
    harness.upstream.reset()
    harness.upstream.on("GET", "referrers", respond_with(503))
    with pytest.raises(UpstreamFailing):
        referrers(harness)


def test_repr_hides_credentials(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(login=LOGIN)
    text = repr(harness.client("Basic c2VjcmV0OnNlY3JldA==")) + repr(harness.principal(authorization="Bearer secret"))
    assert "secret" not in text and "c2VjcmV0" not in text


# content codings of what is passed on


@pytest.mark.parametrize("coding", ["gzip", "identity", "br"])
def test_lists_are_passed_on_without_a_coding(harness: CacheHarness, coding: str) -> None:
    content = json.dumps({"name": APP, "tags": [f"tag-{number}" for number in range(20_000)]}).encode()
    sent = gzip.compress(content) if coding == "gzip" else content
    harness.upstream.on("GET", "tags/list", replace_with(sent, content_encoding=coding))
    response = harness.run(harness.client().forward("GET", TAGS, f"/v2/{APP}/tags/list", Headers()))

    async def read() -> bytes:
        received = b""
        while piece := await response.read_chunk():
            assert len(piece) <= 65_536 or coding != "gzip"
            received += piece
        return received

    assert harness.run(read()) == content
    assert response.length == (None if coding == "gzip" else len(content))
    assert ("content-encoding" in response.headers) == (coding != "gzip")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (gzip.compress(b"x" * 100)[:-3], "incomplete"),
        (b"no gzip", "not gzip"),
        (gzip.compress(bytes(65 << 20)), "exceeds 67108864 bytes"),
    ],
)
def test_lists_with_a_bad_coding(harness: CacheHarness, sent: bytes, message: str) -> None:
    harness.upstream.on("GET", "tags/list", replace_with(sent, content_encoding="gzip"))
    response = harness.run(harness.client().forward("GET", TAGS, f"/v2/{APP}/tags/list", Headers()))

    async def read() -> None:
        while await response.read_chunk():
            pass

    with pytest.raises(UpstreamBroken, match=message):
        harness.run(read())
