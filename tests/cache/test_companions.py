"""Signatures and other referrers of cached images while upstream is down: what it has said about them before."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dockerproxy.cache.companions import companion_base
from dockerproxy.errors import ManifestUnknown, RegistryError, UpstreamFailing, UpstreamRefused, UpstreamUnreachable
from dockerproxy.oci.manifests import EMPTY_INDEX, OCI_INDEX
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.oci.referrers import ReferrersQuery
from tests.cache.support.harness import HUB, CacheHarness
from tests.cache.support.upstream import ScriptedResponse, replace_with, respond_with

APP = "library/app"
ALICE, BOB = "Bearer alice", "Bearer bob"
ONE = b'{"schemaVersion":2,"config":{"digest":"sha256:%b","size":1},"layers":[]}' % (b"1" * 64)
SUBJECT = Digest.of(ONE)
SIGNATURE_TAG = f"sha256-{SUBJECT.hex}.sig"
INDEX = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {"digest": str(Digest.of(kind.encode())), "size": 1, "mediaType": "x/y", "artifactType": kind}
            for kind in ("a/b", "c/d")
        ],
    }
).encode()


@pytest.fixture
def harness(make_harness: Any) -> CacheHarness:
    harness = make_harness()
    harness.upstream.repository(f"{HUB}/{APP}").put_manifest(ONE, "1")
    return harness


def referrers(harness: CacheHarness, query: str = "", artifact_type: str | None = None, **client: Any) -> Any:
    cached_registry = harness.client(**client)
    return harness.run(cached_registry.referrers(parse_repository(APP), SUBJECT, ReferrersQuery(query, artifact_type)))


def status_of(harness: CacheHarness, tag: str, **client: Any) -> int:
    with pytest.raises(RegistryError) as excinfo:
        harness.run(harness.manifest(tag, **client))
    return excinfo.value.status


def test_an_absence_that_head_repeats_counts_in_a_rate_limit(harness: CacheHarness) -> None:
    """A private image, too: upstream says that there is no signature, and would count the GET that confirms it."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    assert status_of(harness, SIGNATURE_TAG, authorization=ALICE) == 404
    harness.upstream.on("GET", "manifests", respond_with(429))
    for head in (True, False):
        with pytest.raises(ManifestUnknown):
            harness.run(harness.manifest(SIGNATURE_TAG, authorization=ALICE, head=head))


@pytest.mark.parametrize("suffix", ["", ".sig", ".att", ".sbom"])
def test_a_signature_that_upstream_had_not_is_missing_in_an_outage(harness: CacheHarness, suffix: str) -> None:
    tag = f"sha256-{SUBJECT.hex}{suffix}"
    harness.run(harness.manifest("1"))
    assert status_of(harness, tag) == 404
    harness.upstream.go_down()
    with pytest.raises(ManifestUnknown, match="cannot be asked now"):
        harness.run(harness.manifest(tag))


@pytest.mark.parametrize(
    "tag", ["2", f"sha256-{'0' * 64}.sig", f"sha256-{SUBJECT.hex}.other", f"sha512-{'0' * 64}.sig"]
)
def test_other_tags_are_not_remembered(harness: CacheHarness, tag: str) -> None:
    """Only a bounded number for each image in the cache, and no images: these may have been pushed since."""
    harness.run(harness.manifest("1"))
    assert status_of(harness, tag) == 404
    harness.upstream.go_down()
    assert status_of(harness, tag) == UpstreamUnreachable.status


@pytest.mark.parametrize("suffix", ["", ".sig"])
def test_the_media_types_of_one_client_hide_no_signature(harness: CacheHarness, suffix: str) -> None:
    """Registries answer 404, too, if they have no manifest of an accepted type."""
    tag = f"sha256-{SUBJECT.hex}{suffix}"
    harness.run(harness.manifest("1"))
    assert status_of(harness, tag, accept=["odd/type"]) == 404
    harness.upstream.go_down()
    assert status_of(harness, tag) == UpstreamUnreachable.status


def test_a_signature_that_was_pushed_since(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    assert status_of(harness, SIGNATURE_TAG) == 404
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    repository.put_manifest(ONE.replace(b"1" * 64, b"2" * 64), SIGNATURE_TAG)
    harness.run(harness.manifest(SIGNATURE_TAG))
    assert harness.records.get("absence", f"{HUB}/{APP}", SIGNATURE_TAG) is None
    harness.upstream.go_down()
    assert harness.run(harness.manifest(SIGNATURE_TAG)).cache_status == "STALE"


def test_a_signature_that_was_never_asked_for(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    harness.upstream.go_down()
    assert status_of(harness, SIGNATURE_TAG) == UpstreamUnreachable.status


def test_absence_in_a_private_repository(harness: CacheHarness) -> None:
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    assert status_of(harness, SIGNATURE_TAG, authorization=ALICE) == 404
    harness.upstream.go_down()
    assert status_of(harness, SIGNATURE_TAG, authorization=ALICE) == 404
    assert status_of(harness, SIGNATURE_TAG, authorization=BOB) == UpstreamUnreachable.status
    assert status_of(harness, SIGNATURE_TAG) == UpstreamUnreachable.status


def test_a_404_to_a_stranger_is_no_absence(harness: CacheHarness) -> None:
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    repository.readers, repository.denial_status = {ALICE}, 404
    harness.run(harness.manifest("1", authorization=ALICE))
    assert status_of(harness, SIGNATURE_TAG, authorization=BOB) == 404
    harness.upstream.go_down()
    assert status_of(harness, SIGNATURE_TAG, authorization=ALICE) == UpstreamUnreachable.status


@pytest.mark.parametrize("outage", ["down", 429, 503])
def test_referrers_in_an_outage(harness: CacheHarness, outage: str | int) -> None:
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", replace_with(INDEX))
    assert referrers(harness).content == INDEX
    if isinstance(outage, int):
        harness.upstream.reset()
        harness.upstream.on("GET", "referrers", respond_with(outage))
    else:
        harness.upstream.go_down()
    result = referrers(harness)
    assert (result.content, result.filtered, result.cache_status) == (INDEX, False, "STALE")
    result = referrers(harness, "artifactType=a%2Fb", "a/b")
    assert result.filtered and b"c/d" not in result.content and b"a/b" in result.content


def test_no_referrers_in_an_outage(harness: CacheHarness) -> None:
    """Also at a registry without the API, and without the fallback tag."""
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", respond_with(404))
    assert referrers(harness).content == EMPTY_INDEX
    harness.upstream.go_down()
    assert referrers(harness).content == EMPTY_INDEX


def test_outage_between_the_api_and_the_fallback_tag(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    assert status_of(harness, f"sha256-{SUBJECT.hex}") == 404
    harness.upstream.on("GET", "referrers", respond_with(404))
    harness.upstream.on("GET", "manifests", respond_with(503))
    result = referrers(harness, "artifactType=a%2Fb", "a/b")
    assert (result.content, result.filtered, result.cache_status) == (EMPTY_INDEX, True, "STALE")


@pytest.mark.parametrize("incomplete", ["filtered", "paged", "large", "limited", "unknown image"])
def test_referrers_that_are_not_remembered(harness: CacheHarness, incomplete: str) -> None:
    fields = {"filtered": {"oci_filters_applied": "artifactType"}, "paged": {"link": '</next>; rel="next"'}}
    content = INDEX + b" " * 20_000 if incomplete == "large" else INDEX
    if incomplete != "unknown image":
        harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", replace_with(content, **fields.get(incomplete, {})))
    assert referrers(harness, "n=1" if incomplete == "limited" else "").content == content
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        referrers(harness)


def test_referrers_of_a_private_repository(harness: CacheHarness) -> None:
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    harness.run(harness.manifest("1", authorization=ALICE))
    harness.upstream.on("GET", "referrers", replace_with(INDEX))
    assert referrers(harness, authorization=ALICE).content == INDEX
    harness.upstream.go_down()
    assert referrers(harness, authorization=ALICE).content == INDEX
    for authorization in (BOB, None):
        with pytest.raises(UpstreamUnreachable):
            referrers(harness, authorization=authorization)


def page(request: Any, data: bytes) -> ScriptedResponse:
    return ScriptedResponse(404, b"<html>blocked</html>", {"content-type": "text/html"})


@pytest.mark.parametrize("api", [respond_with(404), page])
def test_a_wall_has_no_word_about_referrers(harness: CacheHarness, api: Any) -> None:
    """A missing signature must not be the word of a firewall."""
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", replace_with(INDEX))
    referrers(harness)
    harness.upstream.reset()
    harness.upstream.on("GET", "referrers", api)
    harness.upstream.on("GET", "manifests", page)
    for _ in range(2):
        result = referrers(harness)
        assert (result.content, result.cache_status) == (INDEX, "STALE")


def test_a_server_without_the_api_may_say_so_with_a_page(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", page)
    assert referrers(harness).content == EMPTY_INDEX
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    repository.put_manifest(INDEX, f"sha256-{SUBJECT.hex}")
    assert referrers(harness).content == INDEX
    del repository.manifests[f"sha256-{SUBJECT.hex}"]
    assert referrers(harness).content == EMPTY_INDEX


def test_a_stranger_hides_no_referrers(harness: CacheHarness) -> None:
    """A registry that hides a private repository answers 404 to those who may not read it."""
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    repository.readers, repository.denial_status = {ALICE}, 404
    harness.run(harness.manifest("1", authorization=ALICE))
    harness.upstream.on("GET", "referrers", replace_with(INDEX), times=1)
    referrers(harness, authorization=ALICE)
    harness.upstream.on("GET", "referrers", respond_with(404))
    for authorization in (BOB, None):
        assert referrers(harness, authorization=authorization).content == EMPTY_INDEX
    harness.upstream.go_down()
    assert referrers(harness, authorization=ALICE).content == INDEX


def test_a_refusal_is_no_outage(harness: CacheHarness) -> None:
    harness.run(harness.manifest("1"))
    harness.upstream.on("GET", "referrers", replace_with(INDEX))
    referrers(harness)
    harness.upstream.reset()
    harness.upstream.on("GET", "referrers", respond_with(403))
    with pytest.raises(UpstreamRefused):
        referrers(harness)
    harness.upstream.reset()
    harness.upstream.on("GET", "referrers", respond_with(500))
    harness.records.put({"public": True, "index": 5}, "referrers", f"{HUB}/{APP}", str(SUBJECT))  # damaged
    with pytest.raises(UpstreamFailing):
        referrers(harness)


def test_the_image_of_a_tag() -> None:
    assert companion_base(SIGNATURE_TAG) == SUBJECT
    for tag in ("latest", f"sha256-{SUBJECT.hex[:-1]}.sig", f"sha256-{SUBJECT.hex}.sig.sig", f"sha512-{'0' * 64}"):
        assert companion_base(tag) is None
