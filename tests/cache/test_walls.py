"""The answers of firewalls, content delivery networks and captive portals are not the registry's word.

Public content that is cached is served STALE, and nothing is forgotten. Private content is not served, because the wall
may guard the registry. If nothing is cached, a client gets the wall's response, as without the proxy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.access import GRANT_TTL
from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.token_endpoint import TokenRequest
from dockerproxy.cache.upstream import error_from_response
from dockerproxy.errors import (
    CaptivePortalSuspected,
    IntermediaryRefused,
    RegistryError,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Digest, Registry
from tests.cache.support.harness import HUB, CacheHarness, result
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import (
    FakeRepository,
    ScriptedResponse,
    captive_portal,
    error_response,
    raise_error,
    replace_with,
    respond_with,
)

APP = "library/app"
MANIFEST = b'{"schemaVersion":2,"layers":[]}'
LAYER = b"layer" * 50_000  # more than PossessionCheck reads as a whole
ALICE = "Bearer alice"
LOGIN = BasicCredentials("shared", "login")
PAGE = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>"
HTML = {"content-type": "text/html; charset=utf-8"}


def wall(status: int, body: bytes = PAGE, fields: dict[str, str] | None = None) -> Callable[..., ScriptedResponse]:
    """Return a responder that gives the same answer to everything."""
    headers = HTML if fields is None else fields
    return lambda request, data: ScriptedResponse(status, b"" if request.method == "HEAD" else body, headers)


REFUSING_WALLS = {
    "403 page": wall(403),
    "404 page": wall(404),
    "451 page": wall(451),
    "451 without a body": wall(451, b"", {}),
    "400 page": wall(400),
    "401 without a challenge": wall(401, b"", {}),
    "401 page": wall(401),
    "407": wall(407, b"", {"proxy-authenticate": "Basic"}),
    "XML of an object store": wall(403, b"<?xml version='1.0'?><Error>", {"content-type": "application/xml"}),
    "page without a type": wall(403, b"\xef\xbb\xbf \n<html>", {}),
    "page of unknown content": wall(403, b"blocked", HTML),
    "page that says JSON": wall(403, PAGE, {"content-type": "application/json"}),
    "long page": wall(403, PAGE + b"x" * 100_000),
    "Cloudflare's text": wall(403, b"error code: 1020", {"content-type": "text/plain"}),
    "Cloudflare's challenge": wall(403, b"", {"cf-mitigated": "challenge"}),
    "Squid": wall(403, b"denied", {"x-squid-error": "ERR_ACCESS_DENIED 0"}),
}
PORTALS = {
    "portal": captive_portal,
    "503 page": wall(503),
    "511": wall(511),
    "302 that is not followed": wall(302, b"", {"location": "http://portal.example/"}),
    "redirect to a login page": raise_error(CaptivePortalSuspected("it redirects to 192.168.1.1")),
}
WALLS = REFUSING_WALLS | PORTALS
API = {"docker-distribution-api-version": "registry/2.0"}
OWN_REFUSALS = {
    "JSON": respond_with(403),
    "401 with a challenge": respond_with(401),
    "404 JSON": respond_with(404),
    "451 JSON": respond_with(451),
    "JSON without a type": wall(403, b' {"errors":[]}', {}),
    "401 JSON without a challenge": wall(401, b'{"details":"no"}', {}),
    "bare 403": wall(403, b"", {}),
    "bare 404": wall(404, b"", {}),
    "text": wall(403, b"forbidden", {"content-type": "text/plain"}),
    "page of a registry": wall(403, PAGE, HTML | API),
    "page with a challenge": wall(401, PAGE, HTML | {"www-authenticate": "Basic realm=x"}),
    "empty with the version": wall(451, b"", API),
}


def named(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("answer", cases.values(), ids=cases)


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    return fill(make_harness())


def fill(harness: CacheHarness) -> CacheHarness:
    repository = app(harness)
    repository.put_manifest(MANIFEST, "1")
    repository.put_blob(LAYER)
    return harness


def app(harness: CacheHarness) -> FakeRepository:
    return harness.upstream.repository(f"{HUB}/{APP}")


def raise_wall(harness: CacheHarness, answer: Any) -> None:
    harness.reactor.advance(GRANT_TTL + 1)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "library/", answer)


def pull(harness: CacheHarness, authorization: str | None = None) -> set[str]:
    """Pull by tag, then by digest, as clients do. Return the cache statuses."""
    statuses = set()
    for reference in ("1", Digest.of(MANIFEST)):
        for head in (True, False):
            response = harness.run(harness.manifest(reference, authorization=authorization, head=head))
            assert response.digest == Digest.of(MANIFEST)
        statuses.add(response.cache_status)
        assert response.content == MANIFEST
    status, content = harness.fetch(Digest.of(LAYER), authorization=authorization)
    assert content == LAYER
    return {*statuses, status}


def fails(harness: CacheHarness, authorization: str | None = None) -> bool:
    """Return whether neither the manifest nor the layer is served."""
    works = [
        harness.manifest("1", authorization=authorization),
        harness.manifest(Digest.of(MANIFEST), authorization=authorization),
        harness.blob(Digest.of(LAYER), authorization=authorization),
    ]
    for work in works:
        with pytest.raises(RegistryError):
            harness.run(work, 60)
    return True


@named(WALLS)
@pytest.mark.parametrize("authorization", [None, ALICE])
def test_what_is_public_is_served_stale(harness: CacheHarness, answer: Any, authorization: str | None) -> None:
    """So it is for a client with a login of its own, and as often as it asks."""
    pull(harness)
    raise_wall(harness, answer)
    for _ in range(3):
        assert pull(harness, authorization) == {"STALE"}
    # Nothing was forgotten: neither the grant nor the tag.
    harness.upstream.reset()
    harness.upstream.go_down()
    assert pull(harness, authorization) == {"STALE"}
    harness.upstream.reset()
    assert pull(harness) == {"REVALIDATED", "HIT"}


@named(WALLS)
def test_what_is_private_is_not_served(harness: CacheHarness, answer: Any) -> None:
    """A web server that guards the registry may have refused a login that was withdrawn."""
    app(harness).readers = {ALICE}
    pull(harness, ALICE)
    raise_wall(harness, answer)
    is_outage_of_the_registry = answer in (PORTALS["503 page"], PORTALS["511"], PORTALS["302 that is not followed"])
    for authorization in (None,) if is_outage_of_the_registry else (ALICE, None):
        assert fails(harness, authorization)
    harness.upstream.reset()
    if not is_outage_of_the_registry:  # nobody knows whether a guard has refused the login
        harness.upstream.go_down()
        assert fails(harness, ALICE)
        harness.upstream.reset()
    harness.reactor.advance(1)
    assert pull(harness, ALICE) == {"REVALIDATED", "HIT"}


@named(REFUSING_WALLS)
def test_private_content_of_the_shared_login(make_harness: Callable[..., CacheHarness], answer: Any) -> None:
    harness = fill(make_harness(login=LOGIN))
    app(harness).readers = {"login shared"}
    pull(harness)
    raise_wall(harness, answer)
    assert fails(harness)


@named(OWN_REFUSALS)
def test_a_registrys_own_refusal_counts(harness: CacheHarness, answer: Any) -> None:
    pull(harness)
    raise_wall(harness, answer)
    response = answer(type("Request", (), {"method": "GET", "range": None}), b"")
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.manifest("1"))
    assert excinfo.value.status == response.status and not is_outage(excinfo.value)
    if response.status in (401, 403, 404):  # it has withdrawn the grant, or deleted the tag
        harness.upstream.reset()
        harness.upstream.go_down()
        with pytest.raises(RegistryError):
            harness.run(harness.manifest("1"))


@named(REFUSING_WALLS)
def test_the_first_client_gets_the_walls_answer(harness: CacheHarness, answer: Any) -> None:
    raise_wall(harness, answer)
    response = answer(type("Request", (), {"method": "GET"}), b"")
    for work in (harness.manifest("1"), harness.blob(Digest.of(LAYER))):
        with pytest.raises(IntermediaryRefused) as excinfo:
            harness.run(work, 60)
        assert excinfo.value.status == response.status
        short = 0 < len(response._body) <= 65_536
        assert not short or excinfo.value.content == response._body


def test_a_login_does_not_help_against_a_wall(harness: CacheHarness) -> None:
    """Only what is public is served. So the client is not told to log in, which would end in a loop."""
    client = harness.client()
    error = result(Deferred.fromCoroutine(error_from_response(HUB, ScriptedResponse(403, PAGE, HTML))), ManualReactor())
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401))
    harness.run(harness.challenges.get(HUB))
    assert client.request_login(error, harness.repository().name) is error


def test_referrers_and_unknown_blobs_are_refused_as_before(harness: CacheHarness) -> None:
    """A wall's 404 is no word about a blob that the repository has never sent, so nothing is served."""
    harness.fetch(Digest.of(LAYER))
    raise_wall(harness, wall(404))
    with pytest.raises(IntermediaryRefused):
        harness.run(harness.blob(Digest.of(LAYER), "library/other"), 60)


# token servers


REALM = Realm(Registry.parse("auth.docker.io"), "/token")


def ask_token(harness: CacheHarness, authorization: str) -> str | None:
    """Return the identity in the local token that the client gets; None if it gets upstream's."""
    request = TokenRequest("service=registry.docker.io&scope=repository:library/app:pull", authorization)
    content = harness.run(harness.token_endpoint.token(HUB, REALM, request))
    token = harness.identities.read_token("Bearer " + json.loads(content)["token"])
    return None if token is None else token.identity_at(harness.repository().name)


@named(REFUSING_WALLS | {"portal": captive_portal})
def test_login_at_a_walled_token_server(harness: CacheHarness, answer: Any) -> None:
    """A client that has logged in before gets a token for what is public, until the token server accepts it again."""
    alice = BasicCredentials("alice", "pw").authorization
    own = harness.identities.for_authorization(str(REALM), alice)
    harness.upstream.on("GET", "^/token", replace_with(b'{"token":"upstreams"}'), times=1)
    assert ask_token(harness, alice) is None
    harness.upstream.on("GET", "^/token", answer)
    for _ in range(2):
        assert ask_token(harness, alice) == "public"
    with pytest.raises(RegistryError):
        ask_token(harness, BasicCredentials("alice", "guess").authorization)
    harness.upstream.reset()
    harness.upstream.go_down()
    assert ask_token(harness, alice) == "public"  # nobody knows whether the wall has refused it
    harness.upstream.reset()
    harness.upstream.on("GET", "^/token", replace_with(b'{"token":"upstreams"}'), times=1)
    assert ask_token(harness, alice) is None
    harness.upstream.go_down()
    assert ask_token(harness, alice) == own
