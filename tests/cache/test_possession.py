"""A registry has to send parts of a cached blob before its clients get the blob, whatever it claims."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from typing import Any

import pytest

from dockerproxy.errors import CaptivePortalSuspected, RegistryError, ResponseCutOff, UpstreamBroken, UpstreamRefused
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, OTHER, CacheHarness
from tests.cache.support.upstream import (
    ReceivedRequest,
    Responder,
    ScriptedResponse,
    error_response,
    ignore_range,
    respond_with,
    serve_content,
    without_length,
)

APP = "library/app"
DATA = random.Random(0).randbytes(300_000)
DIGEST = Digest.of(DATA)
PART = 16 * 1024


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    """Return a cache that has the blob from HUB. OTHER has it as well."""
    harness = make_harness()
    store(harness, DATA)
    return harness


def store(harness: CacheHarness, data: bytes) -> Digest:
    for registry in (HUB, OTHER):
        digest = harness.upstream.repository(f"{registry}/{APP}").put_blob(data)
    assert harness.fetch(digest) == ("MISS", data)
    harness.upstream.clear_requests()
    return digest


def fetch(harness: CacheHarness, digest: Digest = DIGEST) -> tuple[str, bytes]:
    """Fetch the blob from OTHER, which has not sent it yet."""
    return harness.fetch(digest, registry=OTHER)


def requested_ranges(harness: CacheHarness) -> list[str | None]:
    assert {request.method for request in harness.upstream.requests} <= {"GET"}
    ranges = [request.range for request in harness.upstream.requests_matching(pattern="blobs")]
    harness.upstream.clear_requests()
    return ranges


def parse(text: str | None) -> tuple[int, int]:
    assert text is not None
    first, _, last = text.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


def alter(
    position: int, respond: Responder = lambda request, data: serve_content(request, "", data or b"")
) -> Responder:
    """Respond as `respond` does, but with content of which one byte is wrong."""

    def respond_altered(request: ReceivedRequest, data: bytes | None) -> Any:
        assert data is not None
        altered = bytearray(data)
        altered[position] ^= 1
        return respond(request, bytes(altered))

    return respond_altered


def test_two_parts_are_compared(harness: CacheHarness) -> None:
    assert fetch(harness) == ("REVALIDATED", DATA)
    chosen, last = map(parse, requested_ranges(harness))
    assert last == (len(DATA) - PART, len(DATA))
    assert 0 < chosen[0] < chosen[1] == chosen[0] + PART <= len(DATA)
    assert fetch(harness) == ("HIT", DATA)


def test_parts_are_chosen_with_the_secret(make_harness: Callable[..., CacheHarness]) -> None:
    """A registry that fails gets the same question again, but nobody else can tell which one it is."""
    choices = []
    for secret in (b"1" * 32, b"2" * 32):
        harness = make_harness(secret=secret)
        store(harness, DATA) if not harness.blobs.exists(DIGEST) else None
        harness.upstream.on("GET", "blobs", respond_with(404))
        for _ in range(2):
            with pytest.raises(UpstreamRefused):
                fetch(harness)
        first, second = requested_ranges(harness)
        assert first == second
        choices.append(first)
    assert choices[0] != choices[1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("where", ["first of the part", "last of the part", "last of all"])
def test_wrong_byte(harness: CacheHarness, where: str, whole: bool) -> None:
    fetch(harness)
    chosen, _ = map(parse, requested_ranges(harness))
    harness.links.unlink_layer(f"{OTHER}/{APP}", DIGEST)
    position = {"first of the part": chosen[0], "last of the part": chosen[1] - 1, "last of all": -1}[where]
    harness.upstream.on("GET", "blobs", alter(position, ignore_range) if whole else alter(position))
    for _ in range(2):
        with pytest.raises(UpstreamBroken, match="does not match"):
            fetch(harness)
    assert not harness.links.has_layer(f"{OTHER}/{APP}", DIGEST)


@pytest.mark.parametrize(
    "respond",
    [
        lambda request, data: ScriptedResponse(206, b"", {"content-range": f"bytes 0-16383/{len(DATA)}"}),
        lambda request, data: ScriptedResponse(206, data[:5]),
        lambda request, data: ScriptedResponse(206, data),
        lambda request, data: ScriptedResponse(200, b"", length=len(DATA)),
        lambda request, data: ScriptedResponse(200, data + b"x", length=None),
        lambda request, data: ScriptedResponse(200, data[:-1]),
        lambda request, data: ScriptedResponse(416, b"", {"content-range": f"bytes */{len(DATA)}"}),
        lambda request, data: ScriptedResponse(304, b"", {"docker-content-digest": str(DIGEST)}),
        lambda request, data: ScriptedResponse(204, b"", {"docker-content-digest": str(DIGEST)}),
        lambda request, data: error_response(404),
        lambda request, data: error_response(500),
    ],
    ids=[
        "206 without content",
        "206 that is short",
        "206 that is long",
        "200 without content",
        "200 that is long",
        "200 that is short",
        "416 with the size",
        "304",
        "204",
        "404",
        "500",
    ],
)
def test_claims_prove_nothing(harness: CacheHarness, respond: Responder) -> None:
    harness.upstream.on("GET", "blobs", respond)
    harness.upstream.on("HEAD", "blobs", lambda request, data: serve_content(request, "", data or b""))
    for head in (True, False, True):
        try:
            response = harness.run(harness.blob(DIGEST, registry=OTHER, head=head))
        except RegistryError:
            continue
        assert (head, response.cache_status, response.content) == (True, "MISS", None)
    assert not harness.links.has_layer(f"{OTHER}/{APP}", DIGEST)


@pytest.mark.parametrize(
    "respond",
    [
        ignore_range,
        without_length,
        *(
            lambda request, data, status=status: (
                error_response(status) if request.range else serve_content(request, "", data)
            )
            for status in (400, 405, 416, 501)
        ),
    ],
)
def test_registry_without_ranges_sends_everything(harness: CacheHarness, respond: Responder) -> None:
    harness.upstream.on("GET", "blobs", respond)
    assert fetch(harness) == ("REVALIDATED", DATA)
    assert len(requested_ranges(harness)) == 2
    assert fetch(harness) == ("HIT", DATA)


@pytest.mark.parametrize(
    "data", [b"", b"{}", DATA[: 64 * 1024], bytes(200_000), bytes(100_000) + b"secret" + bytes(100_000)]
)
def test_content_that_could_be_guessed_is_sent_as_a_whole(harness: CacheHarness, data: bytes) -> None:
    """The question for a small blob is the one for a blob that is not cached, too."""
    digest = store(harness, data)
    assert fetch(harness, digest) == ("REVALIDATED", data)
    assert requested_ranges(harness) == [None]


def test_access_is_checked_with_the_first_bytes(harness: CacheHarness) -> None:
    """The repository has sent the blob before. Only access is in question, but a captive portal grants none."""
    fetch(harness)
    requested_ranges(harness)
    harness.reactor.advance(300)
    assert fetch(harness) == ("REVALIDATED", DATA)
    assert [parse(text) for text in requested_ranges(harness)] == [(0, PART)]
    harness.reactor.advance(300)
    harness.upstream.on("GET", "blobs", ignore_range, times=1)
    assert fetch(harness) == ("REVALIDATED", DATA)
    assert harness.upstream.responses[-1].bytes_read <= len(DATA)
    harness.reactor.advance(300)
    harness.upstream.on("GET", "blobs", alter(5))
    assert fetch(harness) == ("STALE", DATA)


def test_each_repository_is_asked(harness: CacheHarness) -> None:
    fetch(harness)
    with pytest.raises(UpstreamRefused):
        harness.fetch(DIGEST, "library/other", registry=OTHER)
    assert not harness.links.has_layer(f"{OTHER}/library/other", DIGEST)


def test_eviction_during_the_check(harness: CacheHarness) -> None:
    def evict(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        harness.blobs.remove(DIGEST)
        assert data is not None
        return serve_content(request, "", data)

    harness.upstream.on("GET", "blobs", evict, times=1)
    assert fetch(harness) == ("MISS", DATA)


def test_check_ends_with_its_last_client(harness: CacheHarness) -> None:
    """A registry that sends slowly does not keep a connection busy for nobody."""
    harness.upstream.on("GET", "blobs", lambda request, data: serve_content(request, "", data or b"", sent=10))
    waiting = [harness.start(harness.fetch_later(DIGEST, registry=OTHER)) for _ in range(2)]
    [response] = [response for response in harness.upstream.responses if not response.ended]
    for deferred in waiting:
        assert not response.aborted
        deferred.addErrback(lambda _: None)
        deferred.cancel()
    assert response.aborted


# framing and codings


def compress(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send the content with a coding, of which the parts are those of the coded content."""
    coded = gzip.compress(data or b"")
    response = serve_content(request, "", coded)
    response.headers = Headers([*response.headers, ("content-encoding", "gzip")])
    return response


def mislabel(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    response = serve_content(request, "", data or b"")
    response.headers = Headers([*response.headers, ("content-encoding", "gzip")])
    return response


def cut_off(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send the whole without a length, and no end of it."""
    response = ScriptedResponse(200, data or b"", length=None, sent=0)
    response.send()
    response.disconnect(ResponseCutOff("cut off"))
    return response


@pytest.mark.parametrize("respond", [compress, mislabel, cut_off])
@pytest.mark.parametrize("proven", [False, True])
def test_the_digest_decides_about_framing_and_codings(harness: CacheHarness, respond: Responder, proven: bool) -> None:
    if proven:
        fetch(harness)
        harness.reactor.advance(1000)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "blobs", respond)
    assert fetch(harness) == ("REVALIDATED", DATA)


@pytest.mark.parametrize("position", [0, 200_000, -1])
def test_other_content_in_a_coding(harness: CacheHarness, position: int) -> None:
    harness.upstream.on("GET", "blobs", alter(position, compress))
    with pytest.raises(UpstreamBroken, match="does not match"):
        fetch(harness)


def test_a_bomb_is_no_proof(harness: CacheHarness) -> None:
    """Work ends as soon as there is more of it than of the blob."""
    bomb = gzip.compress(bytes(64 << 20))
    harness.upstream.on("GET", "blobs", lambda request, data: mislabel(request, bomb))
    with pytest.raises(UpstreamBroken, match="does not match"):
        fetch(harness)


@pytest.mark.parametrize("respond", [compress, mislabel, without_length])
def test_the_size_of_a_blob_with_a_coding(harness: CacheHarness, respond: Responder) -> None:
    """HEAD is about the blob and not about its coded content. It reads no blob to find out how long that is."""
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "blobs", respond)
    assert harness.run(harness.blob(DIGEST, head=True, registry=OTHER)).size is None
    requests = [(request.method, request.range) for request in harness.upstream.requests_matching(pattern="blobs")]
    assert requests[-2:] == [("HEAD", None), ("GET", "bytes=0-0")]
    assert all(response.bytes_read == 0 for response in harness.upstream.responses[-2:])
    assert fetch(harness)[1] == DATA
    assert harness.run(harness.blob(DIGEST, head=True, registry=OTHER)).size == len(DATA)


def test_a_page_is_no_blob(harness: CacheHarness) -> None:
    page = {"content-type": "text/html"}
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "blobs", lambda request, data: ScriptedResponse(200, b"<p>", page, length=None))
    with pytest.raises(CaptivePortalSuspected):
        harness.run(harness.blob(DIGEST, head=True, registry=OTHER))
