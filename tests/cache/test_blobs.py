"""Tests of cached blobs: their source, and the upstream access check before they are served."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.cache.access import GRANT_TTL, AccessState
from dockerproxy.errors import (
    RegistryError,
    ServiceOverloaded,
    StorageFailed,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.store.blobs import OpenBlob
from tests.cache.support.harness import EPOCH, HUB, OTHER, CacheHarness, ManualReader, await_deferred, read_all
from tests.cache.support.upstream import (
    Gate,
    ReceivedRequest,
    ScriptedResponse,
    captive_portal,
    disconnect_after,
    error_response,
    raise_error,
    respond_streaming,
    respond_with,
    serve_content,
    without_length,
)

DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
APP, COPY = "library/app", "library/copy"
ALICE, BOB = "Bearer alice", "Bearer bob"


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    harness = make_harness()
    harness.upstream.repository(f"{HUB}/{APP}").put_blob(DATA)
    return harness


def requested_methods(harness: CacheHarness) -> list[str]:
    return [request.method for request in harness.upstream.requests_matching(pattern="blobs")]


# hits and misses


def test_miss_then_hit(harness: CacheHarness) -> None:
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert harness.fetch(DIGEST) == ("HIT", DATA)
    assert requested_methods(harness) == ["GET"]
    harness.upstream.go_down()
    assert harness.fetch(DIGEST) == ("HIT", DATA)


def test_concurrent_requests_share_one_download(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "blobs", gate.delay(respond_streaming))
    deferreds = [harness.start(harness.blob(DIGEST)) for _ in range(20)]
    gate.open()
    harness.reactor.run_due_calls()
    response = harness.upstream.responses[0]
    response.send(1000)
    harness.reactor.run_due_calls()
    deferreds += [harness.start(harness.blob(DIGEST)) for _ in range(5)]  # some requests arrive during the transfer
    readers = []
    cache_statuses = []
    for deferred in deferreds:
        result = harness.run(await_deferred(deferred))
        cache_statuses.append(result.cache_status)
        readers.append(ManualReader(harness, result.content))
        assert result.size == len(DATA)
    response.send_rest()
    harness.reactor.run_due_calls()
    for reader in readers:
        reader.read_available()
        assert reader.data == DATA
        reader.disconnect()
    assert cache_statuses == ["MISS"] + ["JOINED"] * 24
    assert requested_methods(harness) == ["GET"]
    assert used_again(harness) == {DIGEST}


def used_again(harness: CacheHarness) -> set[Digest]:
    """Return the blobs whose files say that they were used again."""
    harness.reactor.run_due_calls()
    return {entry.key for entry in harness.blobs.walk() if entry.used_again}


def test_second_request_is_another_use(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    assert used_again(harness) == set()
    harness.fetch(DIGEST)
    assert used_again(harness) == {DIGEST}


def test_request_at_completion_is_a_hit(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "blobs", respond_streaming)
    result = harness.run(harness.blob(DIGEST))
    reader = ManualReader(harness, result.content)
    reader.read()
    restarted: list[Any] = []
    on_data = reader._on_data

    def request_again(data: bytes) -> None:
        on_data(data)
        if len(reader.data) == len(DATA) and not restarted:
            restarted.append(harness.start(harness.blob(DIGEST)))

    reader._on_data = request_again  # type: ignore[method-assign]
    harness.upstream.responses[0].send_rest()
    harness.reactor.run_due_calls()
    reader.read_available()
    assert len(restarted) == 1
    response = harness.run(await_deferred(restarted[0]))
    assert response.cache_status == "HIT"
    response.content.close()
    reader.disconnect()


def test_head(harness: CacheHarness) -> None:
    response = harness.run(harness.blob(DIGEST, head=True))
    assert (response.size, response.content, response.cache_status) == (len(DATA), None, "MISS")
    assert requested_methods(harness) == ["HEAD"]
    harness.fetch(DIGEST)
    response = harness.run(harness.blob(DIGEST, head=True))
    assert (response.size, response.content, response.cache_status) == (len(DATA), None, "HIT")
    assert requested_methods(harness) == ["HEAD", "GET"]


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 405, 500, 501])
def test_refused_head(harness: CacheHarness, status: int) -> None:
    """Only the answer to GET counts."""
    harness.upstream.on("HEAD", "blobs", respond_with(status))
    assert harness.run(harness.blob(DIGEST, head=True)).size == len(DATA)
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.blob(Digest.of(b"never seen"), head=True))
    assert excinfo.value.status == 404


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_both_algorithms(harness: CacheHarness, algorithm: str) -> None:
    digest = harness.upstream.repository(f"{HUB}/{APP}").put_blob(b"content", algorithm)
    assert harness.fetch(digest) == ("MISS", b"content")
    assert harness.fetch(digest) == ("HIT", b"content")


def test_unknown_blob(harness: CacheHarness) -> None:
    for head in (False, True):
        with pytest.raises(UpstreamRefused) as excinfo:
            harness.run(harness.blob(Digest.of(b"other"), head=head))
        assert excinfo.value.status == 404


def test_evicted_blob_is_fetched_again(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    harness.blobs.remove(DIGEST)
    assert harness.fetch(DIGEST) == ("MISS", DATA)


def evict(harness: CacheHarness, *digests: Digest) -> None:
    """Evict all blobs as the space manager does, 43 days after their last use."""
    harness.advance(1)  # a download that has just ended releases its space
    last_used = harness.now() - 43 * 86400
    for digest in digests:
        os.utime(harness.layout.blob(digest), (last_used, last_used))
    harness.space.index.limit = harness.space.index.overhead + 1
    harness.run(harness.space.record(Digest.of(b"what they make room for"), 1, "", ""))
    harness.space.index.limit = 1 << 20
    assert not any(map(harness.blobs.exists, digests))


def test_a_miss_says_that_the_blob_was_evicted(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    evict(harness, DIGEST)
    assert harness.tombstones.last_idle == 43 * 86400
    for _ in range(2):  # again after the janitor has removed the link
        response = harness.run(harness.blob(DIGEST))
        date = time.strftime("%Y-%m-%d", time.gmtime(harness.now()))
        assert (response.cache_status, response.because) == ("MISS", f"evicted {date} 43d")
        harness.run(read_all(response.content))
        response.content.close()
        evict(harness, DIGEST)
        harness.run(harness.space.clean())


@pytest.mark.parametrize("head", [True, False])
def test_a_repository_without_the_blob_learns_nothing_of_its_eviction(harness: CacheHarness, head: bool) -> None:
    """Its owner would find out what others have pulled."""
    harness.fetch(DIGEST)
    evict(harness, DIGEST)
    harness.upstream.repository(f"{OTHER}/{COPY}").put_blob(DATA)
    response = harness.run(harness.blob(DIGEST, COPY, registry=OTHER, head=head))
    assert (response.cache_status, response.because) == ("MISS", "new")
    if response.content is not None:
        response.content.close()


def test_eviction_between_check_and_open(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)

    def evict(request: Any, data: Any) -> ScriptedResponse:
        harness.blobs.remove(DIGEST)
        return serve_content(request, "", data)

    harness.upstream.on("GET", COPY, evict, times=1)
    assert harness.fetch(DIGEST, COPY) == ("MISS", DATA)


def test_blob_evicted_on_every_attempt(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.fetch(DIGEST)
    monkeypatch.setattr(type(harness.blobs), "open", lambda blobs, digest: None)
    with pytest.raises(UpstreamFailing, match="raise CACHE_MAX_SIZE"):
        harness.run(harness.blob(DIGEST))


def test_open_blob_may_be_evicted(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    content = harness.run(harness.blob(DIGEST)).content
    harness.run(harness.space.purge([DIGEST]))
    assert not harness.blobs.exists(DIGEST)
    assert harness.run(read_all(content)) == DATA
    content.close()
    content.close()


# errors of the disk


@pytest.fixture
def break_open(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function after which stored blobs cannot be opened; the argument is an errno."""

    def break_open(number: int) -> None:
        def fail(blobs: Any, digest: Digest) -> Any:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(type(harness.blobs), "open", fail)

    return break_open


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_blob_that_cannot_be_opened_comes_from_upstream(
    harness: CacheHarness, break_open: Callable[[int], None], log_lines: list[str], number: int
) -> None:
    harness.fetch(DIGEST)
    break_open(number)
    for _ in range(2):
        assert harness.fetch(DIGEST) == ("PASS", DATA)
    assert any("cannot open" in line and os.strerror(number) in line for line in log_lines)
    assert any("was not cached: the cache cannot be read" in line for line in log_lines)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files(harness: CacheHarness, break_open: Callable[[int], None], number: int) -> None:
    harness.fetch(DIGEST)
    break_open(number)
    with pytest.raises(ServiceOverloaded, match=os.strerror(number)) as caught:
        harness.fetch(DIGEST)
    assert dict(caught.value.headers) == {"Retry-After": "1"}


def test_too_many_open_files_for_a_reader(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("dockerproxy.cache.downloads.os.dup", fail)
    with pytest.raises(ServiceOverloaded):
        harness.fetch(DIGEST)
    monkeypatch.undo()
    assert harness.fetch(DIGEST)[1] == DATA


def test_unreadable_blob_is_removed(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every client would be cut off at the same byte."""

    def fail(blob: OpenBlob, offset: int, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    harness.fetch(DIGEST)
    monkeypatch.setattr(OpenBlob, "read", lambda blob, offset, size: None)
    monkeypatch.setattr(OpenBlob, "read_blocking", fail)
    with pytest.raises(StorageFailed, match="cannot read"):
        harness.fetch(DIGEST)
    monkeypatch.undo()
    assert harness.fetch(DIGEST) == ("MISS", DATA)


# shared downloads


def test_other_repository_joins_after_grant(harness: CacheHarness) -> None:
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    harness.upstream.on("GET", APP, respond_streaming)
    first = harness.run(harness.blob(DIGEST))
    second = harness.run(harness.blob(DIGEST, COPY))
    assert second.cache_status == "JOINED"
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST, "library/not-there"))
    readers = [ManualReader(harness, response.content) for response in (first, second)]
    harness.upstream.responses[0].send_rest()
    for reader in readers:
        reader.read_available()
        assert reader.data == DATA
        reader.disconnect()
    assert [str(one) for one in harness.upstream.requests_matching(pattern=COPY)] == [f"GET {DIGEST}"]


def test_other_client_joins_after_grant(harness: CacheHarness) -> None:
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    repository.readers = {ALICE, BOB}
    harness.upstream.on("GET", APP, respond_streaming, times=1)
    first = harness.run(harness.blob(DIGEST, authorization=ALICE))
    second = harness.run(harness.blob(DIGEST, authorization=BOB))
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST, authorization=None))
    assert [first.cache_status, second.cache_status] == ["MISS", "JOINED"]
    assert [(one.method, one.requester) for one in harness.upstream.requests_matching(pattern="blobs")] == [
        ("GET", ALICE), ("GET", BOB), ("GET", None),
    ]  # fmt: skip
    first.content.close()
    second.content.close()


def test_second_token_of_same_client_shares_grant(harness: CacheHarness) -> None:
    """Access is per login. The token endpoint has recorded that both tokens were issued for it."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, "Bearer second"}
    for token in ("alice", "second"):
        harness.identities.bind(token, "realm", "Basic YWxpY2U6cHc=", frozenset({parse_repository(APP)}), EPOCH + 60)
    harness.fetch(DIGEST, authorization=ALICE)
    assert harness.fetch(DIGEST, authorization="Bearer second") == ("HIT", DATA)
    assert requested_methods(harness) == ["GET"]


def test_denial_of_first_client_does_not_affect_second(harness: CacheHarness) -> None:
    """A client with an invalid token must not fail the download for a client with a valid token."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    gate = Gate()
    harness.upstream.on("GET", "blobs", gate.delay(respond_with(401)), times=1)
    denied = harness.start(harness.blob(DIGEST, authorization=BOB))
    good = harness.start(harness.blob(DIGEST, authorization=ALICE))
    assert not good.called
    gate.open()
    harness.reactor.run_due_calls()
    with pytest.raises(UpstreamRefused):
        harness.run(await_deferred(denied))
    response = harness.run(await_deferred(good))
    assert harness.run(read_all(response.content)) == DATA
    response.content.close()


def test_many_denied_clients_do_not_fail_another(harness: CacheHarness) -> None:
    """Each of them starts the download in turn, and is refused."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    gate = Gate()
    harness.upstream.on("GET", "blobs", gate.delay(respond_with(401)), times=1)
    denied = [harness.start(harness.blob(DIGEST, authorization=f"Bearer junk{number}")) for number in range(10)]
    good = harness.start(harness.blob(DIGEST, authorization=ALICE))
    gate.open()
    harness.advance(1)
    for deferred in denied:
        with pytest.raises(UpstreamRefused):
            harness.run(await_deferred(deferred))
    response = harness.run(await_deferred(good))
    assert harness.run(read_all(response.content)) == DATA
    response.content.close()


@pytest.mark.parametrize("error", [UpstreamUnreachable("gone"), UpstreamFailing("limited", 429)])
def test_failure_of_one_registry_does_not_affect_another(harness: CacheHarness, error: RegistryError) -> None:
    harness.upstream.repository(f"{OTHER}/{APP}").put_blob(DATA)
    gate = Gate()
    harness.upstream.on("GET", "/v2/library/app/blobs", gate.delay(raise_error(error)), times=1)
    failing = harness.start(harness.blob(DIGEST))
    good = harness.start(harness.blob(DIGEST, registry=OTHER))
    gate.open()
    harness.reactor.run_due_calls()
    with pytest.raises(type(error)):
        harness.run(await_deferred(failing))
    response = harness.run(await_deferred(good))
    assert harness.run(read_all(response.content)) == DATA
    response.content.close()


def test_unreachable_registry_is_tried_once(harness: CacheHarness) -> None:
    """All waiting clients get the error of one attempt, because another attempt would take as long again."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    gate = Gate()
    harness.upstream.on("GET", "blobs", gate.delay(raise_error(UpstreamUnreachable("gone"))))
    deferreds = [
        harness.start(harness.blob(DIGEST, authorization=authorization)) for authorization in (ALICE, BOB, ALICE)
    ]
    gate.open()
    harness.reactor.run_due_calls()
    for deferred in deferreds:
        with pytest.raises(UpstreamUnreachable):
            harness.run(await_deferred(deferred))
    assert requested_methods(harness) == ["GET"]


@pytest.mark.parametrize(
    "failure", [respond_with(429), respond_with(500), raise_error(UpstreamBroken("closed the connection"))]
)
def test_failure_of_one_client_does_not_affect_another(harness: CacheHarness, failure: Any) -> None:
    """A client may have caused it by a credential on which upstream breaks off."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    gate = Gate()
    gated = gate.delay(failure)

    def fail_bob(request: ReceivedRequest, data: bytes | None) -> Any:
        return gated(request, data) if request.requester == BOB else serve_response(request, data)

    harness.upstream.on("GET", "blobs", fail_bob)
    limited = harness.start(harness.blob(DIGEST, authorization=BOB))
    good = harness.start(harness.blob(DIGEST, authorization=ALICE))
    gate.open()
    harness.reactor.run_due_calls()
    with pytest.raises(UpstreamError):
        harness.run(await_deferred(limited), 60)
    response = harness.run(await_deferred(good))
    assert harness.run(read_all(response.content)) == DATA
    response.content.close()


def test_long_download_does_not_extend_grant(harness: CacheHarness) -> None:
    """A client that joins when the grant has expired is checked upstream."""
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    harness.upstream.on("GET", "blobs", respond_streaming, times=1)
    first = harness.run(harness.blob(DIGEST))
    harness.reactor.advance(GRANT_TTL - 1)
    second = harness.run(harness.blob(DIGEST))
    assert requested_methods(harness) == ["GET"]
    repository.readers = {ALICE}
    harness.reactor.advance(1)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST))
    for response in (first, second):
        response.content.close()


def test_long_download_grants_from_its_start(harness: CacheHarness) -> None:
    repository = harness.upstream.repository(f"{HUB}/{APP}")
    harness.upstream.on("GET", "blobs", respond_streaming, times=1)
    first = harness.run(harness.blob(DIGEST))
    harness.reactor.advance(GRANT_TTL)
    repository.readers = {ALICE}
    harness.upstream.responses[0].send_rest()
    harness.reactor.run_due_calls()
    first.content.close()
    assert harness.blobs.exists(DIGEST)
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST))


def test_joining_download_of_unknown_length(harness: CacheHarness) -> None:
    """The check compares sizes, so a second client must wait until the size is known."""
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    harness.upstream.on("GET", APP, lambda request, data: ScriptedResponse(200, DATA, length=None, sent=100))
    first = harness.run(harness.blob(DIGEST))
    second = harness.start(harness.blob(DIGEST, COPY))
    assert not second.called
    harness.upstream.responses[0].send_rest()
    harness.reactor.run_due_calls()
    response = harness.run(await_deferred(second))
    assert (first.because, response.cache_status, response.because) == ("new", "REVALIDATED", "unproven")
    assert harness.run(read_all(response.content)) == DATA
    first.content.close()
    response.content.close()


# responses that grant access


def redirect_blobs(harness: CacheHarness, redirect_target: Callable[[Any, Any], ScriptedResponse]) -> None:
    """Make COPY redirect every blob. `redirect_target` responds at the target."""
    harness.upstream.repository(f"{HUB}/{COPY}")

    def respond(request: Any, data: Any) -> ScriptedResponse:
        return (
            redirect_target(request, DATA)
            if request.follow
            else error_response(307, location="https://cdn.example/signed?x=1")
        )

    for method in ("GET", "HEAD"):
        harness.upstream.on(method, COPY, respond)


def test_redirect_is_followed_before_grant(harness: CacheHarness) -> None:
    """registry.k8s.io redirects any name and digest. Its redirects would grant access to every cached blob."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    harness.fetch(DIGEST, authorization=ALICE)
    redirect_blobs(harness, lambda request, data: error_response(404))
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.run(harness.blob(DIGEST, COPY))
    assert excinfo.value.status == 404
    assert not harness.links.has_layer(f"{HUB}/{COPY}", DIGEST)


def test_redirect_to_url_signed_for_get(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    redirect_blobs(
        harness,
        lambda request, data: serve_content(request, "", data) if request.method == "GET" else error_response(403),
    )
    harness.upstream.clear_requests()
    assert harness.fetch(DIGEST, COPY) == ("REVALIDATED", DATA)
    assert {one.method for one in harness.upstream.requests_matching(pattern=COPY)} == {"GET"}
    assert harness.fetch(DIGEST, COPY) == ("HIT", DATA)


def test_head_of_redirected_blob(harness: CacheHarness) -> None:
    redirect_blobs(harness, lambda request, data: serve_content(request, "", data))
    response = harness.run(harness.blob(DIGEST, COPY, head=True))
    assert (response.size, response.content) == (len(DATA), None)


@pytest.mark.parametrize("status", [405, 501])
def test_upstream_without_head(harness: CacheHarness, status: int) -> None:
    harness.upstream.on("HEAD", "blobs", respond_with(status))
    assert harness.run(harness.blob(DIGEST, head=True)).size == len(DATA)
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    harness.fetch(DIGEST, authorization=ALICE)
    assert harness.fetch(DIGEST, authorization=BOB) == ("REVALIDATED", DATA)


@pytest.mark.parametrize(
    "response",
    [
        lambda request, data: (
            ScriptedResponse(200, DATA, length=None) if request.method == "GET" else ScriptedResponse(200, length=None)
        ),
        lambda request, data: (
            ScriptedResponse(200, DATA) if request.method == "GET" else ScriptedResponse(200, length=0)
        ),
        lambda request, data: (
            serve_content(request, "", data) if request.method == "GET" else ScriptedResponse(200, length=7)
        ),
    ],
    ids=["no length at all", "a HEAD of length 0, no ranges", "a HEAD of another length"],
)
def test_other_successful_responses(harness: CacheHarness, response: Any) -> None:
    harness.fetch(DIGEST)
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    for method in ("HEAD", "GET"):
        harness.upstream.on(method, COPY, response)
    assert harness.fetch(DIGEST, COPY)[1] == DATA


def test_416_for_empty_blob_is_a_grant(harness: CacheHarness) -> None:
    empty = harness.upstream.repository(f"{HUB}/{APP}").put_blob(b"")
    harness.fetch(empty)
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(b"")
    harness.upstream.on("HEAD", "blobs", respond_with(405))
    assert harness.fetch(empty, COPY) == ("REVALIDATED", b"")


@pytest.mark.parametrize(
    "response",
    [
        captive_portal,
        lambda request, data: ScriptedResponse(200, b"<html>" * (request.method == "GET"), length=None),
        lambda request, data: ScriptedResponse(206, b"<", {"content-range": "bytes 0-0/5"}),
        lambda request, data: ScriptedResponse(206, b"<", {"content-range": "bytes 0-0/*"}),
        lambda request, data: ScriptedResponse(206, b"<"),
        lambda request, data: (
            ScriptedResponse(200, b"x" * 5000, length=None) if request.method == "GET" else error_response(307)
        ),
    ],
    ids=["page", "page of unknown length", "another size", "unknown size", "no Content-Range", "redirect to a page"],
)
def test_unverified_response_grants_nothing(harness: CacheHarness, response: Any) -> None:
    """A captive portal responds with 200 to every request. So does a web application in place of a registry."""
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    harness.fetch(DIGEST, authorization=ALICE)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", response)
    for name in (APP, COPY):
        with pytest.raises(UpstreamError):
            harness.run(harness.blob(DIGEST, name))
    other = Digest.of(b"never seen")
    with suppress(RegistryError):
        harness.run(harness.blob(other, head=True))
    with pytest.raises(RegistryError):
        harness.fetch(other)
    # None of these responses gave anyone else access to the private repository.
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.UNKNOWN
    harness.upstream.reset()
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST))


def test_huge_content_length_is_ignored(harness: CacheHarness) -> None:
    harness.upstream.on(
        "HEAD", "blobs", lambda request, data: ScriptedResponse(200, fields={"content-length": "9" * 5000}, length=None)
    )
    assert harness.run(harness.blob(DIGEST, head=True)).size == len(DATA)


def test_denial_by_token_server(harness: CacheHarness) -> None:
    """A denial by the token server counts like a 401 of the registry."""
    harness.fetch(DIGEST)
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("GET", "blobs", raise_error(Unauthorized("no token")))
    with pytest.raises(Unauthorized):
        harness.run(harness.blob(DIGEST))
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):  # because a revoked grant does not allow a stale response
        harness.run(harness.blob(DIGEST))


def test_denial_on_refetch(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    harness.blobs.remove(DIGEST)
    harness.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST))
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.UNKNOWN


# outage


@pytest.mark.parametrize(
    "failure",
    [
        raise_error(UpstreamUnreachable("gone")),
        respond_with(500),
        respond_with(503),
        respond_with(429),
        raise_error(UpstreamBroken("cut")),
    ],
)
def test_stale_while_upstream_fails(harness: CacheHarness, failure: Any) -> None:
    harness.fetch(DIGEST)
    harness.reactor.advance(GRANT_TTL)
    for method in ("GET", "HEAD"):
        harness.upstream.on(method, "", failure)
    assert harness.fetch(DIGEST) == ("STALE", DATA)
    response = harness.run(harness.blob(DIGEST))
    response.content.close()
    assert response.because in ("gone", "cut") or str(HUB) in response.because
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    with pytest.raises(UpstreamError):  # upstream never granted access to COPY
        harness.run(harness.blob(DIGEST, COPY))


def test_stale_response_does_not_renew_grant(harness: CacheHarness) -> None:
    """Otherwise each use during an outage would extend the grant."""
    harness.fetch(DIGEST)
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.go_down()
    harness.fetch(DIGEST)
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.GRANTED_STALE


def test_joining_during_outage_does_not_renew_grant(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    harness.blobs.remove(DIGEST)
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.on("GET", "blobs", respond_streaming)
    first = harness.run(harness.blob(DIGEST))
    harness.reactor.advance(GRANT_TTL)
    harness.upstream.go_down()
    second = harness.run(harness.blob(DIGEST))
    assert second.cache_status == "JOINED"
    assert harness.access.state(f"{HUB}/{APP}", "public", public=True) is AccessState.GRANTED_STALE
    first.content.close()
    second.content.close()


# the disk


def test_unwritable_links_and_records(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert harness.fetch(DIGEST)[1] == DATA
    assert any("cannot write a link" in line for line in log_lines)


def test_cancel_during_upstream_check(harness: CacheHarness) -> None:
    harness.fetch(DIGEST)
    harness.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    gate = Gate()
    harness.upstream.on("GET", COPY, gate.delay(serve_response))
    leaving = harness.start(harness.blob(DIGEST, COPY))
    staying = harness.start(harness.blob(DIGEST, COPY))
    leaving.addErrback(lambda failure: failure.trap(CancelledError))
    leaving.cancel()
    gate.open()
    harness.reactor.run_due_calls()
    response = harness.run(await_deferred(staying))
    assert response.cache_status == "REVALIDATED"
    assert len(harness.upstream.requests_matching("GET", COPY)) == 1
    response.content.close()


def serve_response(request: Any, data: Any) -> ScriptedResponse:
    return serve_content(request, "", data)


@pytest.mark.parametrize("step_count", range(12))
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_cancel_at_every_step(
    make_harness: Callable[..., CacheHarness], step_count: int, head: bool, stored: bool
) -> None:
    """Resources are released, and the download completes. The `make_harness` fixture checks for leaks."""
    harness = make_harness()
    harness.upstream.repository(f"{HUB}/{APP}").put_blob(DATA)
    if stored:
        harness.fetch(DIGEST)
        harness.reactor.advance(GRANT_TTL)
    harness.reactor.pool.hold()
    results: list[Any] = []
    deferred = Deferred.fromCoroutine(harness.blob(DIGEST, head=head))
    deferred.addBoth(results.append)
    for _ in range(step_count):
        if not harness.reactor.pool.step() and harness.reactor.getDelayedCalls():
            harness.reactor.advance(0)
    if results:
        if results[0].content is not None:
            results[0].content.close()
    else:
        deferred.cancel()
    harness.reactor.pool.release()
    harness.reactor.run_due_calls()
    assert harness.fetch(DIGEST)[1] == DATA


def test_internal_error_does_not_leak(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a bug in this program")

    monkeypatch.setattr(type(harness.links), "link_layer", fail)
    response = harness.run(harness.blob(DIGEST))
    assert harness.run(read_all(response.content), 30) == DATA
    response.content.close()


def test_stored_file_is_complete(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "blobs", disconnect_after(5000), times=2)
    harness.upstream.on("GET", "blobs", without_length)
    assert harness.fetch(DIGEST)[1] == DATA
    assert Path(harness.layout.blob(DIGEST)).read_bytes() == DATA
