"""Tests of cached manifests and tags: few upstream requests, stale responses during outages, exact bytes."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError

from dockerproxy.cache.access import GRANT_TTL, AccessState
from dockerproxy.cache.freshness import Freshness
from dockerproxy.errors import (
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.manifests import DOCKER_MANIFEST, DOCKER_SCHEMA1_SIGNED, MAX_MANIFEST, OCI_INDEX
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob
from tests.cache.support.harness import HUB, CacheHarness, await_deferred
from tests.cache.support.upstream import (
    FakeRepository,
    Gate,
    ScriptedResponse,
    captive_portal,
    error_response,
    raise_error,
    replace_with,
    respond_normally,
    respond_with,
    serve_content,
)

APP, COPY = "library/app", "library/copy"
ALICE, BOB = "Bearer alice", "Bearer bob"
OCI = "application/vnd.oci.image.manifest.v1+json"
# Unusual whitespace, because the exact bytes must be preserved.
ONE = b'{ "schemaVersion":2,\n"config":{"digest":"sha256:%b","size":1}, "layers": [] }\n' % (b"1" * 64)
TWO = ONE.replace(b"1" * 64, b"2" * 64)
INDEX = b'{"schemaVersion":2,"manifests":[]}'
SCHEMA1 = json.dumps({"schemaVersion": 1, "name": APP, "fsLayers": [], "signatures": [{"signature": "x"}]}).encode()
TIERS = Freshness(True, re.compile("(stable)"), 600, re.compile(r"\d+\.\d+\.\d+"), 6000, 3600)


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    harness = make_harness()
    app_repository(harness).put_manifest(ONE, "1")
    return harness


def app_repository(harness: CacheHarness) -> FakeRepository:
    return harness.upstream.repository(f"{HUB}/{APP}")


def requested_methods(harness: CacheHarness) -> list[str]:
    methods = [one.method for one in harness.upstream.requests_matching(pattern="manifests")]
    harness.upstream.clear_requests()
    return methods


def result_of(response: ManifestResponse) -> tuple[str, bytes | None]:
    assert response.content is None or response.size == len(response.content)
    return response.cache_status, response.content


# by tag


def test_tag_is_fetched_once_then_revalidated(harness: CacheHarness) -> None:
    assert result_of(harness.run(harness.manifest("1"))) == ("MISS", ONE)
    assert requested_methods(harness) == ["GET"]
    for _ in range(3):
        response = harness.run(harness.manifest("1"))
        assert result_of(response) == ("REVALIDATED", ONE)
        assert (response.digest, response.media_type) == (Digest.of(ONE), OCI)
        assert requested_methods(harness) == ["HEAD"]


def test_the_response_says_why_it_is_no_hit(harness: CacheHarness) -> None:
    def cause_of(reference: Any, **options: Any) -> str:
        return harness.run(harness.manifest(reference, **options)).because

    one, two = (str(Digest.of(content))[: len("sha256:") + 12] for content in (ONE, TWO))
    assert cause_of("1", head=True) == "new"
    assert cause_of("1") == "accept"  # containerd's HEAD has told the digest only
    assert cause_of("1") == cause_of("1", head=True) == "unchanged"
    assert cause_of("1", accept=["application/other", OCI]) == "accept"
    app_repository(harness).put_manifest(TWO, "1")
    assert cause_of("1", head=True) == cause_of("1") == f"moved {one} {two}"
    assert cause_of("1") == "unchanged"
    app_repository(harness).put_manifest(ONE, "1")
    assert cause_of("1") == f"moved {two} {one}"
    assert cause_of(str(Digest.of(ONE))) == ""  # a hit
    harness.upstream.on("HEAD", "", raise_error(UpstreamTimeout("registry-1.docker.io: timed out")))
    harness.upstream.on("GET", "", raise_error(UpstreamTimeout("registry-1.docker.io: timed out")))
    assert cause_of("1") == "registry-1.docker.io: timed out"


def test_manifest_that_is_read_again_was_used_again(harness: CacheHarness) -> None:
    for uses in range(2):
        harness.run(harness.manifest("1"))
        assert [entry.used_again for entry in harness.blobs.walk()] == [uses > 0]


def test_moved_tag_costs_one_pull(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    app_repository(harness).put_manifest(TWO, "1")
    requested_methods(harness)
    assert result_of(harness.run(harness.manifest("1"))) == ("MISS", TWO)
    assert requested_methods(harness) == ["HEAD", "GET"]
    assert result_of(harness.run(harness.manifest("1"))) == ("REVALIDATED", TWO)
    app_repository(harness).put_manifest(ONE, "1")  # back to the stored manifest
    requested_methods(harness)
    assert result_of(harness.run(harness.manifest("1"))) == ("REVALIDATED", ONE)
    assert requested_methods(harness) == ["HEAD"]


def test_manifest_stored_by_digest(harness: CacheHarness) -> None:
    harness.run(harness.manifest(Digest.of(ONE)))
    requested_methods(harness)
    assert result_of(harness.run(harness.manifest("1")))[1] == ONE
    assert requested_methods(harness) == ["GET"]
    app_repository(harness).put_manifest(ONE, "2")
    assert result_of(harness.run(harness.manifest("2", head=True))) == ("REVALIDATED", ONE)
    assert requested_methods(harness) == ["HEAD"]


@pytest.mark.parametrize(("tag", "lifetime"), [("stable", 600), ("1.2.3", 6000), ("latest", 3600)])
def test_tiers(make_harness: Callable[..., CacheHarness], tag: str, lifetime: float) -> None:
    harness = make_harness(freshness=TIERS)
    app_repository(harness).put_manifest(ONE, tag)
    harness.run(harness.manifest(tag))
    requested_methods(harness)
    for _ in range(2):
        assert result_of(harness.run(harness.manifest(tag))) == ("HIT", ONE)
    assert requested_methods(harness) == []
    harness.reactor.advance(GRANT_TTL)  # the tag is fresh, but the grant has expired
    assert result_of(harness.run(harness.manifest(tag))) == ("REVALIDATED", ONE)
    assert requested_methods(harness) == ["HEAD"]
    before = 0.0
    while before + GRANT_TTL / 2 < lifetime:
        harness.reactor.advance(GRANT_TTL / 2)
        before += GRANT_TTL / 2
        harness.run(harness.manifest(Digest.of(ONE)))  # renews the grant, but not the tag
    requested_methods(harness)
    assert result_of(harness.run(harness.manifest(tag))) == ("HIT", ONE)
    harness.reactor.advance(lifetime - before)
    assert result_of(harness.run(harness.manifest(tag))) == ("REVALIDATED", ONE)


def test_fresh_tag_still_requires_grant(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(freshness=TIERS)
    app_repository(harness).put_manifest(ONE, "latest")
    app_repository(harness).readers = {ALICE}
    harness.run(harness.manifest("latest", authorization=ALICE))
    for authorization in (None, BOB):
        with pytest.raises(UpstreamRefused):
            harness.run(harness.manifest("latest", authorization=authorization))


def test_state_survives_restart(harness: CacheHarness, make_harness: Callable[..., CacheHarness]) -> None:
    harness.run(harness.manifest("1"))
    restarted = make_harness(upstream=harness.upstream)
    requested_methods(restarted)
    assert result_of(restarted.run(restarted.manifest("1"))) == ("REVALIDATED", ONE)
    restarted.upstream.go_down()
    assert result_of(restarted.run(restarted.manifest("1"))) == ("STALE", ONE)


# by Accept


def respond_by_accept(request: Any, data: Any) -> ScriptedResponse:
    """Return an index to clients that accept one, like a registry."""
    index = OCI_INDEX in request.headers.joined("accept").replace(" ", "").split(",")
    return serve_content(request, OCI_INDEX if index else OCI, INDEX if index else ONE)


def test_tag_entries_per_accept(harness: CacheHarness) -> None:
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", respond_by_accept)
    both, one = [f"{OCI}, {OCI_INDEX}"], [OCI]
    for cache_status in ("MISS", "REVALIDATED"):
        assert result_of(harness.run(harness.manifest("1", accept=both))) == (cache_status, INDEX)
        assert result_of(harness.run(harness.manifest("1", accept=one))) == (cache_status, ONE)
    requested_methods(harness)
    for same in ([f"{OCI_INDEX},{OCI}"], [OCI_INDEX, OCI], [OCI, OCI_INDEX, OCI], [f"{OCI};q=0.5", OCI_INDEX.upper()]):
        assert result_of(harness.run(harness.manifest("1", accept=same)))[0] == "REVALIDATED"
    assert set(requested_methods(harness)) == {"HEAD"}


def test_clients_with_other_media_types_cost_no_pull(harness: CacheHarness) -> None:
    """Docker Hub counts GET, and engines differ in the types that they accept."""
    for accept in ([OCI], [OCI, OCI_INDEX], ["*/*"], [OCI, "application/other"], []):
        assert result_of(harness.run(harness.manifest("1", accept=accept)))[1] == ONE
    assert requested_methods(harness) == ["GET", "HEAD", "HEAD", "HEAD", "HEAD"]


def test_a_rate_limit_is_believed_until_it_ends(harness: CacheHarness) -> None:
    app_repository(harness).put_manifest(TWO, "2")
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "manifests", respond_with(429, retry_after="600"))
    for _ in range(3):
        with pytest.raises(UpstreamFailing) as excinfo:
            harness.run(harness.manifest("2"))
        assert excinfo.value.status == 429
    assert requested_methods(harness) == ["GET", "GET"]
    assert result_of(harness.run(harness.manifest("1")))[1] == ONE
    app_repository(harness).put_manifest(TWO, "1")
    assert result_of(harness.run(harness.manifest("1"))) == ("STALE", ONE)
    assert requested_methods(harness) == ["HEAD", "HEAD"]
    harness.upstream.reset()
    harness.reactor.advance(601)
    assert result_of(harness.run(harness.manifest("2")))[1] == TWO
    assert requested_methods(harness) == ["GET"]


def test_accept_fields_are_forwarded_unchanged(harness: CacheHarness) -> None:
    fields = [f"{OCI};q=0.5", "*/*;q=0.1", "application/x, application/y"]
    harness.run(harness.manifest("1", accept=fields))
    assert harness.upstream.requests[-1].headers.all("accept") == fields


def test_stale_manifest_matches_accept(harness: CacheHarness) -> None:
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", respond_by_accept)
    harness.run(harness.manifest("1", accept=[OCI]))
    harness.reactor.advance(10)
    harness.run(harness.manifest("1", accept=[OCI_INDEX]))
    harness.upstream.go_down()
    assert result_of(harness.run(harness.manifest("1", accept=[OCI]))) == ("STALE", ONE)
    assert result_of(harness.run(harness.manifest("1", accept=[OCI, "application/other"]))) == ("STALE", ONE)
    assert result_of(harness.run(harness.manifest("1", accept=[]))) == ("STALE", INDEX)  # the newest
    assert result_of(harness.run(harness.manifest("1", accept=["application/*"]))) == ("STALE", INDEX)
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.manifest("1", accept=["application/vnd.docker.distribution.manifest.v2+json"]))


def test_tag_entries_are_bounded(harness: CacheHarness) -> None:
    for number in range(40):
        harness.run(harness.manifest("1", accept=[f"application/x{number}"]))
        harness.reactor.advance(1)
    assert len(harness.records.get("tag", f"{HUB}/{APP}", "1") or {}) == 16


# stale if error

FAILURES = [
    raise_error(UpstreamUnreachable("gone")),
    raise_error(UpstreamTimeout("silent")),
    raise_error(UpstreamBroken("no token")),
    raise_error(TooManyRequests("of tokens")),
    respond_with(429, retry_after="5"),
    respond_with(500),
    respond_with(502),
    respond_with(503),
    respond_with(504),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_stale_if_error(harness: CacheHarness, failure: Any, head: bool, reference: str) -> None:
    harness.run(harness.manifest(reference))
    harness.reactor.advance(10 * 86400)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", failure)
    for _ in range(2):
        assert result_of(harness.run(harness.manifest(reference, head=head))) == ("STALE", ONE)
    assert (
        harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.GRANTED_STALE
    )  # a stale response does not renew the grant
    with pytest.raises(RegistryError) as excinfo:
        harness.run(harness.manifest("unknown", head=head))
    assert excinfo.value.status in (429, 502, 504)
    harness.upstream.reset()
    assert result_of(harness.run(harness.manifest(reference)))[0] == "REVALIDATED"


def test_stale_when_new_manifest_is_unavailable(harness: CacheHarness) -> None:
    """HEAD shows that the tag has moved, but the GET of the new manifest exceeds the rate limit."""
    harness.run(harness.manifest("1"))
    app_repository(harness).put_manifest(TWO, "1")
    harness.upstream.on("GET", "manifests", respond_with(429))
    assert result_of(harness.run(harness.manifest("1"))) == ("STALE", ONE)


def test_rate_limit_without_stored_manifest(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "manifests", respond_with(429, retry_after="5"))
    with pytest.raises(UpstreamFailing) as excinfo:
        harness.run(harness.manifest("1"))
    assert (excinfo.value.status, excinfo.value.code) == (429, "TOOMANYREQUESTS")
    assert ("retry-after", "5") in excinfo.value.headers


def test_tag_deleted_upstream(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    del app_repository(harness).manifests["1"]
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.manifest("1"))
    assert excinfo.value.status == 404
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.manifest("1"))
    assert result_of(harness.run(harness.manifest(Digest.of(ONE))))[1] == ONE  # only the tag was deleted


def test_404_to_unauthorized_client_deletes_nothing(harness: CacheHarness) -> None:
    """Many registries send 404 to clients without access."""
    app_repository(harness).readers, app_repository(harness).denial_status = {ALICE}, 404
    harness.run(harness.manifest("1", authorization=ALICE))
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest("1", authorization=BOB))
    harness.upstream.go_down()
    assert result_of(harness.run(harness.manifest("1", authorization=ALICE))) == ("STALE", ONE)


@pytest.mark.parametrize("denial", [respond_with(401), respond_with(403), raise_error(Unauthorized("no token"))])
def test_denial_revokes_grant(harness: CacheHarness, denial: Any) -> None:
    harness.run(harness.manifest("1"))
    for method in ("HEAD", "GET"):
        harness.upstream.on(method, "", denial)
    with pytest.raises(RegistryError) as excinfo:
        harness.run(harness.manifest("1"))
    assert excinfo.value.status in (401, 403)
    harness.upstream.go_down()
    for reference in ("1", Digest.of(ONE)):
        with pytest.raises(UpstreamUnreachable):
            harness.run(harness.manifest(reference))


def test_damaged_records_are_fetched_again(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    for record in (
        {"x": 1},
        {"x": {"digest": "no", "type": OCI, "checked": 1}},
        {"x": {"digest": 5, "type": OCI, "checked": 1}},
        {"x": {"digest": str(Digest.of(ONE))}},
    ):
        harness.records.put(record, "tag", f"{HUB}/{APP}", "1")
        assert result_of(harness.run(harness.manifest("1")))[1] == ONE


# by digest


@pytest.mark.parametrize("head", [False, True])
def test_digest_is_served_without_request(harness: CacheHarness, head: bool) -> None:
    digest = Digest.of(ONE)
    assert result_of(harness.run(harness.manifest(digest))) == ("MISS", ONE)
    requested_methods(harness)
    assert result_of(harness.run(harness.manifest(digest, head=head))) == ("HIT", ONE)
    assert requested_methods(harness) == []
    harness.reactor.advance(GRANT_TTL)
    assert result_of(harness.run(harness.manifest(digest, head=head))) == ("REVALIDATED", ONE)
    assert requested_methods(harness) == ["HEAD"]


def test_head_of_missing_manifest(harness: CacheHarness) -> None:
    for reference in ("1", Digest.of(ONE)):
        response = harness.run(harness.manifest(reference, head=True))
        assert (response.digest, response.size, response.content) == (Digest.of(ONE), len(ONE), None)
    assert requested_methods(harness) == ["HEAD", "HEAD"]


@pytest.mark.parametrize("authorization", [None, ALICE])
def test_tag_of_head_and_digest_is_served_stale(harness: CacheHarness, authorization: str | None) -> None:
    """containerd asks for a tag by HEAD, and then for its digest."""
    harness.run(harness.manifest("1", authorization=authorization, head=True))
    harness.run(harness.manifest(Digest.of(ONE), authorization=authorization))
    harness.upstream.go_down()
    for head in (True, False):
        assert result_of(harness.run(harness.manifest("1", authorization=authorization, head=head))) == ("STALE", ONE)
    if authorization is not None:  # the claim was not made to others
        with pytest.raises(UpstreamUnreachable):
            harness.run(harness.manifest("1"))


def test_claim_of_unsent_manifest_does_not_count(harness: CacheHarness) -> None:
    """The previous manifest of the tag remains until the new one has been sent."""
    harness.run(harness.manifest("1"))
    app_repository(harness).put_manifest(TWO, "1")
    for _ in range(2):
        assert harness.run(harness.manifest("1", head=True)).digest == Digest.of(TWO)
    harness.upstream.go_down()
    for head in (True, False):
        assert result_of(harness.run(harness.manifest("1", head=head))) == ("STALE", ONE)
    harness.upstream.reset()
    harness.run(harness.manifest(Digest.of(TWO)))
    harness.upstream.go_down()
    assert result_of(harness.run(harness.manifest("1"))) == ("STALE", TWO)


def test_claims_displace_no_entries(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    app_repository(harness).put_manifest(TWO, "1")
    for number in range(40):
        harness.run(harness.manifest("1", accept=[f"application/x{number}"], head=True))
        harness.reactor.advance(1)
    assert len(harness.records.get("tag", f"{HUB}/{APP}", "1") or {}) == 17
    harness.upstream.go_down()
    assert result_of(harness.run(harness.manifest("1"))) == ("STALE", ONE)


def test_sha512(harness: CacheHarness) -> None:
    digest = app_repository(harness).put_manifest(TWO, algorithm="sha512")
    response = harness.run(harness.manifest(digest))
    assert (response.digest, response.content) == (digest, TWO)
    assert result_of(harness.run(harness.manifest(digest))) == ("HIT", TWO)


def test_tag_with_sha512_digest(harness: CacheHarness) -> None:
    digest = Digest.of(ONE, "sha512")

    def respond(request: Any, data: Any) -> ScriptedResponse:
        body = ONE if request.method == "GET" else b""
        return ScriptedResponse(200, body, {"content-type": OCI, "docker-content-digest": str(digest)}, length=len(ONE))

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", respond)
    for cache_status in ("MISS", "REVALIDATED"):
        response = harness.run(harness.manifest("1"))
        assert (response.cache_status, response.digest, response.content) == (cache_status, digest, ONE)


def test_manifest_of_another_repository(harness: CacheHarness) -> None:
    """Knowing a digest does not grant access."""
    app_repository(harness).readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    harness.upstream.repository(f"{HUB}/{COPY}")
    for authorization in (None, ALICE):
        with pytest.raises(UpstreamRefused) as excinfo:
            harness.run(harness.manifest(Digest.of(ONE), COPY, authorization))
        assert excinfo.value.status == 404
    harness.upstream.repository(f"{HUB}/{COPY}").put_manifest(ONE)
    assert result_of(harness.run(harness.manifest(Digest.of(ONE), COPY)))[1] == ONE


def test_layer_is_not_a_manifest(harness: CacheHarness) -> None:
    layer = app_repository(harness).put_blob(b"layer")
    harness.fetch(layer)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest(layer))


# unusual upstream responses


def test_exact_bytes(harness: CacheHarness) -> None:
    for content in (ONE, b"\n" + ONE, ONE + b"  ", '{"layers":[],"config":{},"x":"ä\\u00e4"}'.encode()):
        app_repository(harness).put_manifest(content, "exact")
        assert harness.run(harness.manifest("exact")).content == content
        assert harness.run(harness.manifest(Digest.of(content))).content == content


@pytest.mark.parametrize(
    ("content", "content_type", "media_type"),
    [
        (INDEX, "application/json", OCI_INDEX),
        (INDEX, "", OCI_INDEX),
        (ONE, "text/plain; charset=utf-8", OCI),
        (ONE, f"{OCI}; charset=utf-8", OCI),
        (ONE, DOCKER_MANIFEST, DOCKER_MANIFEST),
    ],
)  # fmt: skip
def test_media_types(harness: CacheHarness, content: bytes, content_type: str, media_type: str) -> None:
    digest = app_repository(harness).put_manifest(content, "typed", media_type=content_type)
    for reference in ("typed", digest, "typed", digest):
        assert harness.run(harness.manifest(reference)).media_type == media_type


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize(
    "responder",
    [
        replace_with(TWO, docker_content_digest=str(Digest.of(ONE)), content_type=OCI),
        replace_with(b"not JSON", docker_content_digest=str(Digest.of(b"not JSON")), content_type=OCI),
        replace_with(b"[]", content_type=OCI),
        captive_portal,
        replace_with(b" " * MAX_MANIFEST + ONE, content_type=OCI),
        replace_with(b"{" * 100_000, content_type=OCI),
    ],
    ids=["wrong digest", "no JSON", "no object", "page", "too long", "too deep"],
)
def test_invalid_manifest_is_rejected(harness: CacheHarness, responder: Any, reference: str) -> None:
    harness.upstream.on("GET", "manifests", responder)
    with pytest.raises(UpstreamBroken):
        harness.run(harness.manifest(reference))
    assert list(harness.blobs.walk()) == []
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.UNKNOWN
    harness.upstream.reset()
    assert result_of(harness.run(harness.manifest(reference))) == ("MISS", ONE)


def test_captive_portal_grants_nothing(harness: CacheHarness) -> None:
    """A captive portal responds with 200 to every request, so a 200 alone grants nothing."""
    app_repository(harness).readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", captive_portal)
    for reference in (Digest.of(ONE), "1", Digest.of(TWO), "2"):
        for head in (False, True):
            with pytest.raises(UpstreamError):
                harness.run(harness.manifest(reference, head=head))
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.UNKNOWN


def test_a_coding_in_the_answer_to_head_grants_nothing(harness: CacheHarness) -> None:
    """The length of coded content cannot be compared, so that without a digest, the answer may be anybody's."""
    app_repository(harness).readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    portal = {"content-type": "application/json", "content-encoding": "gzip"}
    harness.upstream.on("HEAD", "", lambda request, data: ScriptedResponse(200, b"", portal, length=50))
    harness.upstream.on("GET", "", lambda request, data: ScriptedResponse(200, b'{"blocked":1', portal))
    for head in (False, True):
        with pytest.raises(UpstreamError):
            harness.run(harness.manifest(Digest.of(ONE), head=head, authorization="Bearer mallory"))


@pytest.mark.parametrize("denial", [401, 403, 404])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_a_rate_limit_does_not_hide_a_denial(harness: CacheHarness, reference: str, denial: int) -> None:
    """Otherwise a client that has lost its access could go on as long as it is refused further pulls."""
    repository = app_repository(harness)
    repository.readers, repository.denial_status = {ALICE}, denial
    harness.run(harness.manifest(reference, authorization=ALICE))
    harness.upstream.on("GET", "manifests/2", respond_with(429, retry_after="3600"))
    with pytest.raises(UpstreamError):
        harness.run(harness.manifest("2", authorization=ALICE))
    harness.reactor.advance(GRANT_TTL)
    repository.readers = {"Bearer bob"}
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.manifest(reference, authorization=ALICE))
    assert excinfo.value.status == denial


OUTAGES = {
    "429": respond_with(429, retry_after="3600"),
    "503": respond_with(503),
    "cut off": raise_error(UpstreamBroken("upstream broke off")),
    "unreachable": raise_error(UpstreamUnreachable("gone")),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
@pytest.mark.parametrize("denial", [401, 403, 404])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize("head", [True, False])
def test_an_outage_of_get_does_not_hide_a_refusal_of_head(
    harness: CacheHarness, head: bool, reference: str, denial: int, outage: Any
) -> None:
    """Private content is not served STALE after it, neither then nor later, until upstream grants access again."""
    repository = app_repository(harness)
    repository.readers = {ALICE}
    blob = repository.put_blob(b"layer")
    harness.run(harness.manifest(reference, authorization=ALICE))
    harness.fetch(blob, authorization=ALICE)
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("GET", "library/app", outage)
    harness.upstream.on("HEAD", "library/app", respond_with(denial))
    for _ in range(2):
        with pytest.raises(UpstreamFailing):
            harness.run(harness.manifest(reference, authorization=ALICE, head=head))
    if denial != 404:
        with pytest.raises(UpstreamError):
            harness.fetch(blob, authorization=ALICE)
    harness.upstream.reset()
    assert harness.run(harness.manifest(reference, authorization=ALICE, head=head)).cache_status == "REVALIDATED"


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
@pytest.mark.parametrize("authorization", [None, ALICE])
def test_what_is_public_is_stale_although_head_is_refused(
    harness: CacheHarness, authorization: str | None, outage: Any
) -> None:
    """Firewalls and registries refuse HEAD in many ways."""
    harness.run(harness.manifest("1"))
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("GET", "manifests", outage)
    harness.upstream.on("HEAD", "manifests", respond_with(403))
    for reference in ("1", Digest.of(ONE)):
        assert result_of(harness.run(harness.manifest(reference, authorization=authorization))) == ("STALE", ONE)


def test_a_refused_head_does_not_prolong_a_rate_limit(harness: CacheHarness) -> None:
    """A client can have a HEAD refused, by its media types, as often as it likes."""
    app_repository(harness).put_manifest(TWO, "2")
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "manifests", respond_with(429, retry_after="60"))
    with pytest.raises(UpstreamError):
        harness.run(harness.manifest("2"))
    harness.upstream.on("HEAD", "manifests/1", respond_with(404))
    for _ in range(3):
        harness.reactor.advance(19)
        with pytest.raises(UpstreamError):
            harness.run(harness.manifest("1", accept=["odd/type"]))
    harness.upstream.reset()
    harness.reactor.advance(4)
    assert harness.run(harness.manifest("2")).content == TWO


def test_media_types_of_one_client_delete_no_tag(harness: CacheHarness) -> None:
    """Docker Hub answers 404 if it has no manifest of an accepted type."""
    harness.run(harness.manifest("1"))

    def respond(request: Any, data: bytes) -> ScriptedResponse:
        if "odd/type" in (request.headers.get("accept") or ""):
            return error_response(404)
        fields = {"content-type": OCI, "docker-content-digest": str(Digest.of(data))}
        return ScriptedResponse(200, data if request.method == "GET" else b"", fields, length=len(data))

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", respond)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest("1", accept=["odd/type"]))
    harness.upstream.go_down()
    assert harness.run(harness.manifest("1")).cache_status == "STALE"


def test_head_without_digest(harness: CacheHarness) -> None:
    """Only the content shows the digest. It is requested once."""

    def bare(request: Any, data: Any) -> ScriptedResponse:
        return ScriptedResponse(200, data if request.method == "GET" else b"", {"content-type": OCI}, length=len(data))

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", bare)
    assert result_of(harness.run(harness.manifest("1"))) == ("MISS", ONE)
    assert requested_methods(harness) == ["GET"]
    for head in (False, True):
        response = harness.run(harness.manifest("1", head=head))
        assert (response.digest, response.size) == (Digest.of(ONE), len(ONE))
        assert requested_methods(harness) == ["HEAD", "GET"]


@pytest.mark.parametrize("status", [405, 501])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_upstream_without_head(harness: CacheHarness, status: int, reference: str) -> None:
    harness.upstream.on("HEAD", "manifests", respond_with(status))
    for head in (True, False, True):
        response = harness.run(harness.manifest(reference, head=head))
        assert (response.digest, response.size) == (Digest.of(ONE), len(ONE))
    harness.reactor.advance(GRANT_TTL)
    requested_methods(harness)
    assert harness.run(harness.manifest(reference)).content == ONE
    assert requested_methods(harness) == ["HEAD", "GET"]


REFUSALS = [304, 400, 401, 403, 404, 405, 406, 410, 451, 500, 501, 502, 503]


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize("head", [False, True])
def test_refused_head(harness: CacheHarness, status: int, reference: str, head: bool) -> None:
    """A registry that refuses HEAD is asked by GET, cold and warm, before a client is refused."""
    harness.upstream.on("HEAD", "manifests", respond_with(status))
    for authorization in (None, ALICE, None):
        response = harness.run(harness.manifest(reference, authorization=authorization, head=head))
        assert (response.digest, response.size) == (Digest.of(ONE), len(ONE))
        harness.reactor.advance(GRANT_TTL)
    harness.upstream.go_down()  # no tag was forgotten, and no grant was withdrawn
    assert result_of(harness.run(harness.manifest(reference, head=head))) == ("STALE", ONE)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_refused_head_of_missing_tag(harness: CacheHarness, status: int, head: bool) -> None:
    """The status of the GET counts, and deletes the tag."""
    harness.run(harness.manifest("1"))
    del app_repository(harness).manifests["1"]
    harness.upstream.on("HEAD", "manifests", respond_with(status))
    requested_methods(harness)
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.manifest("1", head=head))
    assert excinfo.value.status == 404
    # Once more in our own words, before others lose it.
    assert requested_methods(harness) == ["HEAD", "GET"] * 2
    assert harness.records.get("tag", f"{HUB}/{APP}", "1") is None
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.manifest("1", head=head))


def test_limited_head_costs_no_pull(harness: CacheHarness) -> None:
    harness.upstream.on("HEAD", "manifests", respond_with(429))
    with pytest.raises(UpstreamFailing):
        harness.run(harness.manifest("1", head=True))
    assert requested_methods(harness) == ["HEAD"]


@pytest.mark.parametrize("length", [{"length": None}, {"length": 0}, {"length": 3}])
def test_head_with_other_length(harness: CacheHarness, length: Any) -> None:
    harness.run(harness.manifest("1"))
    harness.upstream.on(
        "HEAD",
        "",
        lambda request, data: ScriptedResponse(200, fields={"docker-content-digest": str(Digest.of(ONE))}, **length),
    )
    harness.reactor.advance(GRANT_TTL)
    for reference in ("1", Digest.of(ONE)):
        assert harness.run(harness.manifest(reference)).content == ONE


def test_head_with_other_digest(harness: CacheHarness) -> None:
    harness.run(harness.manifest(Digest.of(ONE)))
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("HEAD", "", replace_with(ONE, docker_content_digest=str(Digest.of(TWO))))
    harness.upstream.on("GET", "", respond_with(404))
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest(Digest.of(ONE)))


@pytest.mark.parametrize("reference", ["old", "digest"])
def test_schema_1_is_not_cached(harness: CacheHarness, reference: str) -> None:
    """Its digest covers only a part of the content, so it cannot be verified."""
    digest = Digest.of(b"the payload")
    reference_string = "old" if reference == "old" else str(digest)
    headers = {"content_type": DOCKER_SCHEMA1_SIGNED, "docker_content_digest": str(digest)}
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests", replace_with(SCHEMA1, **headers))
    for _ in range(2):
        response = harness.run(harness.manifest(reference_string))
        assert (response.digest, response.content, response.cache_status) == (digest, SCHEMA1, "PASS")
        assert response.media_type == DOCKER_SCHEMA1_SIGNED
    assert list(harness.blobs.walk()) == []


def test_schema_1_without_head_support(harness: CacheHarness) -> None:
    digest = str(Digest.of(b"the payload"))
    harness.upstream.on("HEAD", "manifests", respond_with(405))
    headers = {"content_type": DOCKER_SCHEMA1_SIGNED, "docker_content_digest": digest}
    harness.upstream.on("GET", "manifests", replace_with(SCHEMA1, **headers))
    harness.run(harness.manifest("old"))
    harness.records.put({}, "tag", f"{HUB}/{APP}", "old")
    requested_methods(harness)
    assert harness.run(harness.manifest("old", head=True)).digest == Digest.parse(digest)
    assert requested_methods(harness) == ["HEAD", "GET"]


def test_schema_1_media_type_does_not_bypass_digest_check(harness: CacheHarness) -> None:
    """The digest of a schema 1 manifest is not checked. Other content must not use that exception."""
    harness.upstream.on("GET", "manifests", replace_with(TWO, content_type=DOCKER_SCHEMA1_SIGNED))
    with pytest.raises(UpstreamBroken):
        harness.run(harness.manifest(Digest.of(ONE)))


# concurrent requests


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize("head", [False, True])
def test_concurrent_requests_are_coalesced(harness: CacheHarness, reference: str, head: bool) -> None:
    gate = Gate()
    harness.upstream.on("HEAD" if head else "GET", "manifests", gate.delay(respond_normally))
    deferreds = [harness.start(harness.manifest(reference, head=head)) for _ in range(20)]
    deferreds[0].addErrback(lambda failure: failure.trap(CancelledError))
    deferreds[0].cancel()  # the first client disconnects
    gate.open()
    harness.reactor.run_due_calls()
    for deferred in deferreds[1:]:
        assert harness.run(await_deferred(deferred)).digest == Digest.of(ONE)
    assert len(harness.upstream.requests_matching(pattern="manifests")) == 1


def test_clients_do_not_share_responses(harness: CacheHarness) -> None:
    app_repository(harness).readers = {ALICE}
    gate = Gate()
    harness.upstream.on(
        "GET",
        "manifests",
        gate.delay(
            lambda request, data: error_response(401) if request.requester != ALICE else respond_normally(request, data)
        ),
    )
    deferreds = {
        authorization: harness.start(harness.manifest("1", authorization=authorization))
        for authorization in (ALICE, BOB, None)
    }
    gate.open()
    harness.reactor.run_due_calls()
    assert harness.run(await_deferred(deferreds[ALICE])).content == ONE
    for authorization in (BOB, None):
        with pytest.raises(UpstreamRefused):
            harness.run(await_deferred(deferreds[authorization]))


def test_error_reaches_all_waiters(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "manifests", gate.delay(respond_with(500)))
    deferreds = [harness.start(harness.manifest("1")) for _ in range(3)]
    gate.open()
    harness.reactor.run_due_calls()
    for deferred in deferreds:
        with pytest.raises(UpstreamFailing):
            harness.run(await_deferred(deferred))


# the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_unwritable_disk(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, number: int, log_lines: list[str]
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    monkeypatch.setattr("dockerproxy.store.files.Staging.makedirs", fail)
    for reference in ("1", Digest.of(ONE), "1"):
        for head in (False, True):
            response = harness.run(harness.manifest(reference, head=head))
            assert response.digest == Digest.of(ONE)
            assert head or response.content == ONE
    assert any("was not cached" in line for line in log_lines)


def test_undeletable_records(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.run(harness.manifest("1"))
    del app_repository(harness).manifests["1"]

    def fail(*args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("dockerproxy.store.records.Records.remove", fail)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.manifest("1"))


@pytest.mark.parametrize("damage", [b"more", b"!", b""])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_damaged_manifest_is_fetched_again(harness: CacheHarness, damage: bytes, reference: str) -> None:
    """Damage by a failing disk or a power failure."""
    harness.run(harness.manifest(reference))
    path = Path(harness.layout.blob(Digest.of(ONE)))
    path.write_bytes(ONE + damage if damage == b"more" else damage + ONE[len(damage) or len(ONE) :])
    for cache_status in ("MISS", "REVALIDATED"):
        assert result_of(harness.run(harness.manifest(reference))) == (cache_status, ONE)
        harness.reactor.advance(GRANT_TTL)
    path.write_bytes(b"!" + ONE[1:])
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        harness.run(harness.manifest(reference))


def test_memory_cache_avoids_second_read(harness: CacheHarness) -> None:
    digest = Digest.of(ONE)
    for cache_status in ("MISS", "HIT"):
        assert result_of(harness.run(harness.manifest(digest))) == (cache_status, ONE)
    Path(harness.layout.blob(digest)).unlink()
    harness.reactor.advance(29)
    assert result_of(harness.run(harness.manifest(digest))) == ("HIT", ONE)
    harness.reactor.advance(1)
    assert result_of(harness.run(harness.manifest(digest))) == ("MISS", ONE)


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_removed_manifest_is_not_served_from_memory(harness: CacheHarness, reference: str) -> None:
    for _ in range(2):
        harness.run(harness.manifest(reference))
    assert harness.links.unlink_manifest(f"{HUB}/{APP}", Digest.of(ONE))
    assert result_of(harness.run(harness.manifest(reference))) == ("MISS", ONE)


def test_memory_cache_respects_access(harness: CacheHarness) -> None:
    app_repository(harness).readers = {ALICE}
    digest = Digest.of(ONE)
    for _ in range(2):
        assert harness.run(harness.manifest(digest, authorization=ALICE)).content == ONE
    with pytest.raises(RegistryError):
        harness.run(harness.manifest(digest, authorization=BOB))


def test_latest_media_type_wins(harness: CacheHarness) -> None:
    """Upstream may correct the media type of the same bytes."""
    digest = app_repository(harness).put_manifest(TWO, "typed", media_type=OCI)
    for _ in range(2):
        assert harness.run(harness.manifest(digest)).media_type == OCI
    app_repository(harness).put_manifest(TWO, "typed", media_type=DOCKER_MANIFEST)
    harness.upstream.on("HEAD", "manifests", respond_with(405))  # forces a GET
    for _ in range(2):
        assert harness.run(harness.manifest("typed")).media_type == DOCKER_MANIFEST
    assert harness.run(harness.manifest(digest)).media_type == DOCKER_MANIFEST


def test_latest_media_type_wins_for_all_clients(harness: CacheHarness) -> None:
    digest = app_repository(harness).put_manifest(TWO, "typed", media_type=OCI)
    for _ in range(2):
        harness.run(harness.manifest(digest, authorization=ALICE))
    app_repository(harness).put_manifest(TWO, "typed", media_type=DOCKER_MANIFEST)
    for authorization in (BOB, ALICE):  # the access check for Bob returns another type
        assert harness.run(harness.manifest(digest, authorization=authorization)).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize("reference", ["typed", str(Digest.of(TWO))])
@pytest.mark.parametrize("content_type", [None, "application/json", "text/html; charset=utf-8"])
def test_head_without_media_type(harness: CacheHarness, content_type: str | None, reference: str) -> None:
    """A stored media type is kept. If there is none, GET determines it."""
    digest = app_repository(harness).put_manifest(TWO, "typed", media_type=OCI)
    typed = {} if content_type is None else {"content_type": content_type}
    harness.upstream.on("HEAD", "manifests", replace_with(TWO, docker_content_digest=str(digest), **typed))
    assert harness.run(harness.manifest(reference, head=True, authorization=ALICE)).media_type == OCI
    for authorization in (ALICE, BOB, ALICE):
        assert harness.run(harness.manifest(reference, authorization=authorization)).media_type == OCI
    harness.reactor.advance(60)
    assert harness.run(harness.manifest(str(digest), authorization=ALICE)).media_type == OCI


def test_media_type_changed_during_read(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = app_repository(harness).put_manifest(TWO, "typed", media_type=OCI)
    harness.run(harness.manifest(digest))
    open_blob = Blobs.open

    def open_after_change(blobs: Blobs, digest_to_open: Digest) -> OpenBlob | None:
        harness.links.link_manifest(f"{HUB}/{APP}", digest, DOCKER_MANIFEST)
        return open_blob(blobs, digest_to_open)

    monkeypatch.setattr(Blobs, "open", open_after_change)
    harness.run(harness.manifest(digest))
    assert harness.run(harness.manifest(digest)).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize("cached", [None, bytearray(), bytearray(ONE[:10])])
def test_partial_page_cache_read(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, cached: bytearray | None
) -> None:
    """A nonblocking read may return only a part, or nothing."""
    harness.run(harness.manifest("1"))
    monkeypatch.setattr("dockerproxy.store.blobs.OpenBlob.read", lambda blob, offset, size: cached)
    assert result_of(harness.run(harness.manifest("1"))) == ("REVALIDATED", ONE)


def test_stored_manifest_counts_in_usage(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    assert harness.space.index.total == len(ONE)


def test_evicted_manifest(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    harness.blobs.remove(Digest.of(ONE))
    for reference in ("1", Digest.of(ONE)):
        assert result_of(harness.run(harness.manifest(reference)))[1] == ONE


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_a_miss_says_that_the_manifest_was_evicted(harness: CacheHarness, reference: str) -> None:
    harness.run(harness.manifest("1"))
    harness.tombstones.note_evicted([(Digest.of(ONE), 86400.0)], harness.now(), made_room=True)
    harness.blobs.remove(Digest.of(ONE))
    response = harness.run(harness.manifest(reference))
    date = time.strftime("%Y-%m-%d", time.gmtime(harness.now()))
    assert (response.cache_status, response.because) == ("MISS", f"evicted {date} 1d")


def test_a_tag_that_moved_after_its_manifest_was_evicted(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    harness.tombstones.note_evicted([(Digest.of(ONE), 86400.0)], harness.now(), made_room=True)
    harness.blobs.remove(Digest.of(ONE))
    app_repository(harness).put_manifest(TWO, "1")
    response = harness.run(harness.manifest("1"))
    assert response.because == f"moved {str(Digest.of(ONE))[:19]} {str(Digest.of(TWO))[:19]}"


# several processes


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_two_processes_share_one_request(make_harness: Callable[..., CacheHarness], reference: str) -> None:
    one = make_harness(shared=True)
    other = make_harness(shared=True, upstream=one.upstream, lock=one.lock)
    app_repository(one).put_manifest(ONE, "1")
    for method in ("GET", "HEAD"):  # by HEAD in the second round, because the manifest is stored
        gate = Gate()
        one.upstream.on(method, "manifests", gate.delay(respond_normally))
        deferreds = [harness.start(harness.manifest(reference)) for harness in (one, other, other)]
        gate.open()
        one.advance(1)
        assert [one.run(await_deferred(response)).content for response in deferreds] == [ONE] * 3
        assert len(one.upstream.requests_matching(pattern="manifests")) <= 1
        one.upstream.clear_requests()
        one.advance(GRANT_TTL / 2)


def test_processes_do_not_share_responses_between_clients(make_harness: Callable[..., CacheHarness]) -> None:
    one = make_harness(shared=True)
    other = make_harness(shared=True, upstream=one.upstream, lock=one.lock)
    app_repository(one).put_manifest(ONE, "1")
    gate = Gate()
    one.upstream.on("GET", "manifests", gate.delay(respond_normally))
    deferreds = [one.start(one.manifest("1", authorization=ALICE)), other.start(other.manifest("1", authorization=BOB))]
    gate.open()
    one.advance(1)
    assert [one.run(await_deferred(response)).cache_status for response in deferreds] == ["MISS", "MISS"]
    requests = one.upstream.requests_matching(pattern="manifests")
    assert sorted(str(request.requester) for request in requests) == [ALICE, BOB]


# rate limits


LIMITS = {
    "ratelimit-limit": "100;w=21600",
    "ratelimit-remaining": "99;w=21600",
    "docker-ratelimit-source": "192.0.2.1",
    "x-ratelimit-reset": "7",
    "retry-after": "3",
}


@pytest.mark.parametrize("head", [False, True])
def test_rate_limit_fields_of_upstream_are_passed_on(make_harness: Callable[..., CacheHarness], head: bool) -> None:
    """They are fields of an answer that upstream has just given, never of the cached copy."""
    harness = make_harness(freshness=TIERS)
    app_repository(harness).put_manifest(ONE, "1")

    def answer(request: Any, data: bytes) -> ScriptedResponse:
        response = serve_content(request, OCI, data)
        response.headers = Headers([*response.headers, *LIMITS.items(), ("set-cookie", "a=b"), ("x-more", "1")])
        return response

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests", answer)
    harness.run(harness.manifest("1"))
    harness.reactor.advance(6000)
    response = harness.run(harness.manifest("1", head=head))
    assert (response.cache_status, dict(response.rate_limit_fields)) == ("REVALIDATED", LIMITS)
    harness.blobs.remove(Digest.of(ONE))
    harness.manifests._memory_cache.remove(f"{HUB}/{APP}", Digest.of(ONE))
    response = harness.run(harness.manifest("1", head=head))
    assert (response.cache_status, dict(response.rate_limit_fields)) == ("MISS", LIMITS)
    harness.run(harness.manifest("1"))
    response = harness.run(harness.manifest("1", head=head))
    assert (response.cache_status, response.rate_limit_fields) == ("HIT", ())
    harness.upstream.go_down()
    harness.reactor.advance(6000)
    response = harness.run(harness.manifest("1", head=head))
    assert (response.cache_status, response.rate_limit_fields) == ("STALE", ())


@pytest.mark.parametrize("with_digest", [True, False])
def test_head_with_a_coding(harness: CacheHarness, with_digest: bool) -> None:
    """The length that a HEAD gives is that of the coded content."""

    def answer(request: Any, data: bytes) -> ScriptedResponse:
        fields = {"content-type": OCI, "content-encoding": "gzip"}
        if with_digest:
            fields["docker-content-digest"] = str(Digest.of(data))
        if request.method == "HEAD":
            return ScriptedResponse(200, b"", fields, length=len(data) - 1)
        return ScriptedResponse(200, data, fields)

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "manifests/1", answer)
    first = harness.run(harness.manifest("1", head=True))
    assert (first.digest, first.size) == (Digest.of(ONE), len(ONE))
    assert requested_methods(harness) == ["HEAD", "GET"]
    second = harness.run(harness.manifest("1"))
    assert (second.digest, second.content) == (Digest.of(ONE), ONE)
    assert requested_methods(harness) == (["HEAD"] if with_digest else ["HEAD", "GET"])
