"""A repository was public, and is private now. Clients without access of their own get only content that was public."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.freshness import Freshness
from dockerproxy.errors import (
    RegistryError,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import Digest
from dockerproxy.store.links import Visibility
from tests.cache.support.harness import ACCEPT, EPOCH, HUB, CacheHarness
from tests.cache.support.upstream import FakeRepository, ReceivedRequest, error_response, raise_error, respond_with

APP = "library/app"
ALICE, JUNK = "Basic alice", "Basic junk"
OLD = b'{"schemaVersion":2,"config":{"digest":"sha256:%b","size":1},"layers":[]}' % (b"1" * 64)
NEW = OLD.replace(b"1" * 64, b"2" * 64)
BLOB = bytes(range(256)) * 400
ALWAYS_FRESH = Freshness(True, re.compile("(stable)"), 6e6, re.compile(r"\d+"), 6e6, 6e6)


def repository(harness: CacheHarness) -> FakeRepository:
    return harness.upstream.repository(f"{HUB}/{APP}")


def pull(harness: CacheHarness, authorization: str | None, reference: object = "1", **options: Any) -> tuple[str, Any]:
    response = harness.run(harness.manifest(reference, authorization=authorization, **options))
    return response.cache_status, response.content


@pytest.fixture(params=[False, True], ids=["revalidated", "fresh"])
def harness(request: pytest.FixtureRequest, make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    """Return a cache: OLD was pulled while the repository was public, and NEW by alice since it is private."""
    harness = make_harness(freshness=ALWAYS_FRESH) if request.param else make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    make_private(harness)
    return harness


def make_private(harness: CacheHarness) -> None:
    repository(harness).readers = {ALICE}
    repository(harness).put_manifest(NEW, "1")
    repository(harness).put_manifest(NEW, "2")
    repository(harness).put_blob(BLOB)
    for reference in ("2", Digest.of(NEW)):
        assert pull(harness, ALICE, reference)[1] == NEW
    harness.run(harness.manifests.get(harness.principal(authorization=ALICE), "1", ["*/*"], head=False))  # type: ignore[arg-type]
    assert harness.fetch(Digest.of(BLOB), authorization=ALICE)[1] == BLOB


def assert_refused(harness: CacheHarness, authorization: str | None) -> None:
    for reference in ("2", Digest.of(NEW)):
        for options in ({}, {"head": True}, {"accept": ["*/*"]}):
            with pytest.raises((UpstreamRefused, UpstreamError)):
                harness.run(harness.manifest(reference, authorization=authorization, **options))
    with pytest.raises((UpstreamRefused, UpstreamError)):
        harness.fetch(Digest.of(BLOB), authorization=authorization)


@pytest.mark.parametrize("authorization", [None, JUNK])
def test_recent_public_grant_does_not_cover_private_content(harness: CacheHarness, authorization: str | None) -> None:
    assert_refused(harness, authorization)


@pytest.mark.parametrize("authorization", [None, JUNK])
@pytest.mark.parametrize("restart", [False, True])
def test_outage(
    harness: CacheHarness, make_harness: Callable[..., CacheHarness], authorization: str | None, restart: bool
) -> None:
    if restart:
        harness = make_harness(upstream=harness.upstream)
    harness.upstream.go_down()
    harness.reactor.advance(1000)
    assert_refused(harness, authorization)
    assert pull(harness, authorization, Digest.of(OLD)) == ("STALE", OLD)
    assert pull(harness, authorization) == ("STALE", OLD)  # where the tag led to while it was public
    assert pull(harness, ALICE, "2") == ("STALE", NEW)
    assert pull(harness, ALICE, accept=["*/*"]) == ("STALE", NEW)


def test_content_becomes_public_when_upstream_sends_it_to_anybody(harness: CacheHarness) -> None:
    repository(harness).readers = None
    assert pull(harness, None, "2")[1] == NEW
    assert harness.fetch(Digest.of(BLOB)) == ("REVALIDATED", BLOB)
    assert harness.fetch(Digest.of(BLOB)) == ("HIT", BLOB)
    assert pull(harness, None, Digest.of(NEW)) == ("HIT", NEW)
    for key, visibility in (
        (Digest.of(BLOB), harness.links.layer_visibility),
        (Digest.of(NEW), harness.links.manifest_visibility),
    ):
        assert visibility(f"{HUB}/{APP}", key) is Visibility.PUBLIC
    # alice's pulls do not make it private again
    assert harness.fetch(Digest.of(BLOB), authorization=ALICE)[1] == BLOB
    harness.upstream.go_down()
    harness.reactor.advance(1000)
    assert harness.fetch(Digest.of(BLOB)) == ("STALE", BLOB)
    assert pull(harness, None, "2") == ("STALE", NEW)


def test_denial_of_one_client_keeps_what_others_have(make_harness: Callable[..., CacheHarness]) -> None:
    """Neither a 404 nor a 401 to a bad credential changes anything for the public."""
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    repository(harness).readers = {None}  # type: ignore[arg-type]
    for status in (404, 401, 403):
        repository(harness).denial_status = status
        with pytest.raises(RegistryError):
            harness.run(harness.manifest("1", authorization=JUNK))
    harness.upstream.go_down()
    assert pull(harness, None) == ("STALE", OLD)


# an outage for one request only

REQUEST_FAILURES = [
    UpstreamBroken("closed the connection"),
    UpstreamTimeout("received nothing"),
    UpstreamFailing("answered 500"),
]


@pytest.mark.parametrize("failure", REQUEST_FAILURES)
@pytest.mark.parametrize("reference", ["1", Digest.of(OLD)])
@pytest.mark.parametrize("head", [False, True])
def test_failure_caused_by_accept_is_no_outage(
    make_harness: Callable[..., CacheHarness], failure: Exception, reference: object, head: bool
) -> None:
    """Upstream breaks off on an Accept field. Asked without it, it refuses; so there is no stale response."""
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    repository(harness).readers = {ALICE}
    harness.reactor.advance(1000)
    large = ["x/" + "y" * 20_000, *ACCEPT]

    def respond(request: ReceivedRequest, data: bytes | None) -> Any:
        if len(str(request.headers.get("accept"))) > 10_000:
            raise failure
        return error_response(401)

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests", respond)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest(reference, accept=large, head=head))
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):  # the denial counts, as any other
        harness.run(harness.manifest(reference))


@pytest.mark.parametrize("failure", [*REQUEST_FAILURES, UpstreamFailing("limited", 429)])
@pytest.mark.parametrize("target", ["1", Digest.of(OLD), Digest.of(BLOB)], ids=["tag", "manifest", "blob"])
def test_failure_caused_by_a_credential_is_no_outage(
    make_harness: Callable[..., CacheHarness], failure: Exception, target: object
) -> None:
    """The client relies on what was public. If upstream fails on his credential, it is asked without one."""
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    repository(harness).put_blob(BLOB)

    async def ask(authorization: str | None) -> Any:
        if target == Digest.of(BLOB):
            return await harness.fetch_later(Digest.of(BLOB), authorization=authorization)
        response = await harness.manifest(target, authorization=authorization)
        return response.cache_status, response.content

    harness.run(ask(None))
    harness.reactor.advance(1000)

    def respond(request: ReceivedRequest, data: bytes | None) -> Any:
        if request.requester == JUNK:
            raise failure
        return error_response(401)

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", respond)
    with pytest.raises(UpstreamRefused):
        harness.run(ask(JUNK))


def test_flaky_upstream(make_harness: Callable[..., CacheHarness]) -> None:
    """If upstream answers the second question, the client gets the current manifest."""
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    repository(harness).put_manifest(NEW, "1")
    harness.upstream.on("HEAD", "manifests", respond_with(503))
    assert pull(harness, None) == ("MISS", NEW)
    assert harness.now() == EPOCH


def test_silent_upstream_delays_a_stale_response_by_seconds(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    harness.upstream.on("HEAD", "manifests", raise_error(UpstreamTimeout("received nothing")))
    harness.upstream.on("GET", "manifests", lambda request, data: Deferred())
    response = harness.run(harness.manifest("1"), 11)
    assert (response.cache_status, response.content) == ("STALE", OLD)


def test_rate_limit_is_asked_once(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness()
    repository(harness).put_manifest(OLD, "1")
    pull(harness, None)
    harness.upstream.clear_requests()
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests", respond_with(429))
    assert pull(harness, None) == ("STALE", OLD)
    assert [request.method for request in harness.upstream.requests_matching(pattern="manifests")] == ["HEAD"]
