"""A registry that sends wrong bytes, or none, does not affect the clients of another registry.

Registries share verified blobs, never a download: neither its bytes, nor what it leaves behind, nor its speed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, OTHER, CacheHarness, ManualReader, await_deferred, result
from tests.cache.support.upstream import (
    Gate,
    ReceivedRequest,
    ScriptedResponse,
    raise_error,
    respond_normally,
    respond_streaming,
)

EVIL = OTHER
APP = "library/app"
DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
WRONG = b"EVIL" * 25_600


def share_content(harness: CacheHarness) -> None:
    """Let both registries have the blob. The tests then script what EVIL sends."""
    for registry in (HUB, EVIL):
        harness.upstream.repository(f"{registry}/{APP}").put_blob(DATA)


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    harness = make_harness()
    share_content(harness)
    return harness


def script_evil(harness: CacheHarness, respond: Callable[[ReceivedRequest, bytes | None], Any]) -> None:
    """Let EVIL respond with `respond`, and HUB correctly."""

    def respond_by_registry(request: ReceivedRequest, data: bytes | None) -> Any:
        if request.registry == EVIL:
            return respond(request, data)
        assert data is not None
        response = respond_streaming(request, data)
        response.send_rest()
        return response

    harness.upstream.on("GET", "blobs", respond_by_registry)


def send_wrong_bytes(sent: int) -> Callable[[ReceivedRequest, bytes | None], ScriptedResponse]:
    return lambda request, data: ScriptedResponse(200, WRONG, sent=sent)


def requested_ranges(harness: CacheHarness, registry: Any) -> list[str | None]:
    return [
        request.range for request in harness.upstream.requests_matching("GET", "blobs") if request.registry == registry
    ]


def pending_response(harness: CacheHarness) -> ScriptedResponse:
    """Return the response that upstream has not completed."""
    [response] = [response for response in harness.upstream.responses if not response.ended]
    return response


def test_unverified_bytes_are_not_served_for_another_registry(harness: CacheHarness) -> None:
    """A range of a download in progress would be a complete response with wrong bytes."""
    script_evil(harness, send_wrong_bytes(50_000))
    evil = harness.run(harness.blob(DIGEST, registry=EVIL))
    response = harness.run(harness.blob(DIGEST))
    reader = ManualReader(harness, response.content, 1000)
    reader.read(1000)
    assert reader.data == DATA[1000:2000]
    assert response.cache_status == "MISS"
    assert requested_ranges(harness, HUB) == [None]
    reader.disconnect()
    evil.content.close()


def test_partial_download_is_not_resumed_by_another_registry(harness: CacheHarness) -> None:
    def send_and_disconnect(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        if request.range is not None:
            raise UpstreamBroken("refused")
        response = ScriptedResponse(200, WRONG, sent=len(WRONG) - 100)
        response.disconnect()
        return response

    script_evil(harness, send_and_disconnect)
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST, registry=EVIL)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert requested_ranges(harness, HUB) == [None]


def test_wrong_partial_download_is_dropped_after_verification(harness: CacheHarness) -> None:
    script_evil(harness, send_wrong_bytes(len(WRONG)))
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST, registry=EVIL)
    assert harness.ingest_files == []


def test_slow_registry_does_not_delay_clients_of_another(harness: CacheHarness) -> None:
    script_evil(harness, send_wrong_bytes(0))
    evil = harness.start(harness.fetch_later(DIGEST, registry=EVIL))
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert harness.fetch(DIGEST) == ("HIT", DATA)
    assert not evil.called
    evil.addErrback(lambda _: None)


def test_silent_registry_does_not_delay_clients_of_another(harness: CacheHarness) -> None:
    """EVIL accepts the request, but never responds."""
    waiting: Deferred[Any] = Deferred()
    script_evil(harness, lambda request, data: waiting)
    evil = harness.start(harness.fetch_later(DIGEST, registry=EVIL))
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    waiting.callback(ScriptedResponse(404))
    evil.addErrback(lambda _: None)


def test_second_registry_finishes_with_the_stored_blob(harness: CacheHarness) -> None:
    """Both registries send the blob. The one that is verified first is stored, and the space counts it once."""
    script_evil(harness, respond_streaming)
    response = harness.run(harness.blob(DIGEST, registry=EVIL))
    slow = ManualReader(harness, response.content)
    pending_response(harness).send(1000)
    harness.reactor.run_due_calls()
    slow.read_available()
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    inode = Path(harness.layout.blob(DIGEST)).stat().st_ino
    assert harness.space.index.total == 2 * len(DATA)
    pending_response(harness).send_rest()
    harness.reactor.run_due_calls()
    slow.read_available()
    assert (slow.data, slow.ended) == (DATA, True)
    assert Path(harness.layout.blob(DIGEST)).stat().st_ino == inode
    assert harness.ingest_files == []
    assert harness.space.index.total == len(DATA)
    slow.disconnect()


def test_stored_blob_does_not_complete_a_wrong_download(harness: CacheHarness) -> None:
    """The blob is stored while EVIL sends wrong bytes. EVIL's client must get neither the rest nor the stored blob."""
    script_evil(harness, send_wrong_bytes(1000))
    response = harness.run(harness.blob(DIGEST, registry=EVIL))
    reader = ManualReader(harness, response.content)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    pending_response(harness).send_rest()
    harness.reactor.run_due_calls()
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    assert reader.data == WRONG[:-1]
    reader.disconnect()
    assert harness.fetch(DIGEST) == ("HIT", DATA)


def test_failing_registry_keeps_its_own_partial_download(harness: CacheHarness) -> None:
    """Each registry resumes its own partial download, although the other has stored the blob and lost it again."""

    def disconnect_once(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        response = respond_streaming(request, data)
        if request.range is None:
            response.send(3000)
            response.disconnect()
        else:
            response.send_rest()
        return response

    harness.upstream.on("GET", "blobs", disconnect_once, times=1)
    harness.upstream.on("GET", "blobs", raise_error(UpstreamBroken("cut")), times=6)
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST, registry=EVIL)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    harness.run(harness.space.purge([DIGEST]))
    harness.upstream.clear_requests()
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert requested_ranges(harness, HUB) == [None]


def send_unverifiable(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Announce a blob of another size, and send a part of it."""
    return ScriptedResponse(200, WRONG, length=60_000, sent=1000)


def claim_to_have_it(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    return ScriptedResponse(200, b"", {"docker-content-digest": str(DIGEST)}, length=60_000)


@pytest.mark.parametrize(
    "order", ["stored, confirmed, failed", "confirmed, failed, stored", "stored, failed, confirmed"]
)
def test_claim_of_a_wrong_download_gives_no_access_to_the_stored_blob(harness: CacheHarness, order: str) -> None:
    """EVIL confirms that its download is right. Its client must not get the blob that HUB has sent meanwhile."""
    gate = Gate()
    script_evil(harness, send_unverifiable)
    harness.upstream.on("HEAD", "blobs", gate.delay(claim_to_have_it))
    one = harness.start(harness.fetch_later(DIGEST, registry=EVIL))
    two = harness.start(harness.fetch_later(DIGEST, "library/copy", registry=EVIL))
    evil_response = pending_response(harness)
    for step in order.split(", "):
        if step == "stored":
            assert harness.fetch(DIGEST) == ("MISS", DATA)
        elif step == "confirmed":
            gate.open()
            harness.reactor.run_due_calls()
        else:
            harness.upstream.reset()
            harness.upstream.on("HEAD", "blobs", claim_to_have_it)
            harness.upstream.on("GET", "blobs", refuse_evil)
            evil_response.disconnect()
            harness.advance(30)
    for deferred in (one, two):
        assert deferred.called
        deferred.addErrback(lambda failure: None if failure.check(UpstreamBroken) else failure)
        assert harness.run(await_deferred(deferred)) is None
    assert not harness.links.has_layer(f"{EVIL}/library/copy", DIGEST)
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST, "library/copy", registry=EVIL)


def refuse_evil(request: ReceivedRequest, data: bytes | None) -> Any:
    if request.registry == EVIL:
        raise UpstreamBroken("refused")
    return respond_normally(request, data)


# several processes


def test_other_process_does_not_follow_another_registry(make_harness: Callable[..., CacheHarness]) -> None:
    one = make_harness(shared=True)
    share_content(one)
    other = make_harness(shared=True, upstream=one.upstream)
    script_evil(one, send_wrong_bytes(50_000))
    evil = one.run(one.blob(DIGEST, registry=EVIL))
    fetching = other.start(other.fetch_later(DIGEST))
    other.advance(1)
    assert result(fetching, other.reactor) == ("MISS", DATA)
    evil.content.close()


def test_follower_of_a_wrong_download_fails(make_harness: Callable[..., CacheHarness]) -> None:
    """The blob is stored by another registry while a process follows EVIL's wrong download."""
    one = make_harness(shared=True)
    share_content(one)
    other = make_harness(shared=True, upstream=one.upstream)
    script_evil(one, send_wrong_bytes(1000))
    evil = one.run(one.blob(DIGEST, registry=EVIL))
    opening = other.start(other.blob(DIGEST, registry=EVIL))
    other.advance(1)
    reader = ManualReader(other, result(opening, other.reactor).content)
    reader.read_available()
    assert reader.data == WRONG[:1000]
    assert one.fetch(DIGEST) == ("MISS", DATA)
    pending_response(one).send_rest()
    one.advance(1)
    reader.read_available()
    one.advance(30)
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    assert len(reader.data) < len(WRONG)
    reader.disconnect()
    evil.content.close()


def test_blob_that_is_evicted_before_the_check_is_not_linked(harness: CacheHarness) -> None:
    """A link is a proof. Without the blob, nothing can be proved, even by a registry that responds to everything."""
    harness.fetch(DIGEST)
    script_evil(harness, raise_error(UpstreamBroken("nothing")))
    harness.reactor.pool.hold()
    pending = harness.start(harness.blob(DIGEST, registry=EVIL))
    assert harness.reactor.pool.waiting == 1  # the check is about to read the blob
    harness.blobs.remove(DIGEST)
    harness.reactor.pool.release()
    with pytest.raises(UpstreamBroken):
        result(pending, harness.reactor, 60)
    assert not harness.links.has_layer(f"{EVIL}/{APP}", DIGEST)
    assert harness.links.has_layer(f"{HUB}/{APP}", DIGEST)
