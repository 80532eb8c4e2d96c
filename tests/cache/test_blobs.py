"""Blobs of the cache: who gets them from where, and what upstream has to say for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.cache.access import FRESH, Standing
from dockerproxy.errors import (
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import Digest
from tests.cache.stand_ins.upstream import (
    Answer,
    Gate,
    cut_after,
    fails,
    flowing,
    refusal,
    says,
    serve,
    untold,
    web_page,
)
from tests.cache.stand_ins.world import HUB, OTHER, Reader, World, read_all

DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
APP, COPY = "library/app", "library/copy"
ALICE, BOB = "Bearer alice", "Bearer bob"


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world()
    world.upstream.repository(f"{HUB}/{APP}").put_blob(DATA)
    return world


def asked(world: World) -> list[str]:
    return [asked.method for asked in world.upstream.seen(pattern="blobs")]


# the usual way


def test_fetched_once_and_then_from_the_disk(world: World) -> None:
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert world.fetch(DIGEST) == ("HIT", DATA)
    assert asked(world) == ["GET"]
    world.upstream.vanish()
    assert world.fetch(DIGEST) == ("HIT", DATA)


def test_many_ask_for_the_same_at_once(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "blobs", gate.then(flowing))
    waiting = [world.start(world.blob(DIGEST)) for _ in range(20)]
    gate.open()
    world.reactor.settle()
    answer = world.upstream.answers[0]
    answer.send(1000)
    world.reactor.settle()
    waiting += [world.start(world.blob(DIGEST)) for _ in range(5)]  # and some more, while it flows
    readers = []
    verdicts = []
    for deferred in waiting:
        found = world.run(_value(deferred))
        verdicts.append(found.verdict)
        readers.append(Reader(world, found.content))
        assert found.size == len(DATA)
    answer.end()
    world.reactor.settle()
    for reader in readers:
        reader.read_on()
        assert reader.data == DATA
        reader.leave()
    assert verdicts == ["MISS"] + ["JOINED"] * 24
    assert asked(world) == ["GET"]


async def _value(deferred: Deferred[Any]) -> Any:
    return await deferred


def test_what_is_asked_for_the_moment_it_is_complete_is_a_hit(world: World) -> None:
    world.upstream.on("GET", "blobs", flowing)
    found = world.run(world.blob(DIGEST))
    reader = Reader(world, found.content)
    reader.read()
    again: list[Any] = []
    got = reader._got

    def ask_again(data: bytes) -> None:
        got(data)
        if len(reader.data) == len(DATA) and not again:
            again.append(world.start(world.blob(DIGEST)))

    reader._got = ask_again  # type: ignore[method-assign]
    world.upstream.answers[0].end()
    world.reactor.settle()
    reader.read_on()
    assert len(again) == 1
    answer = world.run(_value(again[0]))
    assert answer.verdict == "HIT"
    answer.content.close()
    reader.leave()


def test_head(world: World) -> None:
    answer = world.run(world.blob(DIGEST, head=True))
    assert (answer.size, answer.content, answer.verdict) == (len(DATA), None, "MISS")
    assert asked(world) == ["HEAD"]
    world.fetch(DIGEST)
    answer = world.run(world.blob(DIGEST, head=True))
    assert (answer.size, answer.content, answer.verdict) == (len(DATA), None, "HIT")
    assert asked(world) == ["HEAD", "GET"]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_both_algorithms(world: World, algorithm: str) -> None:
    digest = world.upstream.repository(f"{HUB}/{APP}").put_blob(b"content", algorithm)
    assert world.fetch(digest) == ("MISS", b"content")
    assert world.fetch(digest) == ("HIT", b"content")


def test_an_unknown_blob(world: World) -> None:
    for head in (False, True):
        with pytest.raises(UpstreamRefused) as caught:
            world.run(world.blob(Digest.of(b"other"), head=head))
        assert caught.value.status == 404


def test_an_evicted_blob_is_fetched_again(world: World) -> None:
    world.fetch(DIGEST)
    world.blobs.remove(DIGEST)
    assert world.fetch(DIGEST) == ("MISS", DATA)


def test_eviction_between_the_question_and_the_answer(world: World) -> None:
    world.fetch(DIGEST)
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)

    def evict(asked: Any, data: Any) -> Answer:
        world.blobs.remove(DIGEST)
        return serve(asked, "", data)

    world.upstream.on("HEAD", COPY, evict)
    assert world.fetch(DIGEST, COPY) == ("MISS", DATA)


def test_a_cache_that_evicts_faster_than_it_fetches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fetch(DIGEST)
    monkeypatch.setattr(type(world.blobs), "open", lambda blobs, digest: None)
    with pytest.raises(UpstreamFailing, match="too small"):
        world.run(world.blob(DIGEST))


def test_what_is_read_is_not_evicted(world: World) -> None:
    world.fetch(DIGEST)
    answer = world.run(world.blob(DIGEST))
    assert world.room.usage.expire(0, world.now() + 100) == []
    content = answer.content
    content.close()
    content.close()
    assert world.room.usage.expire(0, world.now() + 100) == [DIGEST]


# another's download


def test_another_repository_joins_after_upstream_says_yes(world: World) -> None:
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    world.upstream.on("GET", APP, flowing)
    first = world.run(world.blob(DIGEST))
    second = world.run(world.blob(DIGEST, COPY))
    assert second.verdict == "JOINED"
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST, "library/not-there"))
    readers = [Reader(world, answer.content) for answer in (first, second)]
    world.upstream.answers[0].end()
    for reader in readers:
        reader.read_on()
        assert reader.data == DATA
        reader.leave()
    assert [str(one) for one in world.upstream.seen(pattern=COPY)] == [f"HEAD {DIGEST}"]


def test_another_client_joins_after_upstream_says_yes(world: World) -> None:
    repository = world.upstream.repository(f"{HUB}/{APP}")
    repository.readers = {ALICE, BOB}
    world.upstream.on("GET", APP, flowing)
    first = world.run(world.blob(DIGEST, who=ALICE))
    second = world.run(world.blob(DIGEST, who=BOB))
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST, who=None))
    assert [first.verdict, second.verdict] == ["MISS", "JOINED"]
    assert [(one.method, one.who) for one in world.upstream.seen(pattern="blobs")] == [
        ("GET", ALICE), ("HEAD", BOB), ("HEAD", None),
    ]  # fmt: skip
    first.content.close()
    second.content.close()


def test_a_clients_second_token_needs_no_question(world: World) -> None:
    """Its login is what counts: the desk knows that both were given to it."""
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, "Bearer second"}
    for token in ("alice", "second"):
        world.identities.bind(token, "Basic YWxpY2U6cHc=")
    world.fetch(DIGEST, who=ALICE)
    assert world.fetch(DIGEST, who="Bearer second") == ("HIT", DATA)
    assert asked(world) == ["GET"]


def test_the_first_ones_refusal_is_not_the_seconds(world: World) -> None:
    """A client with a bad token must not take the blob from one with a good token."""
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    gate = Gate()
    world.upstream.on("GET", "blobs", gate.then(says(401)), times=1)
    refused = world.start(world.blob(DIGEST, who=BOB))
    good = world.start(world.blob(DIGEST, who=ALICE))
    assert not good.called
    gate.open()
    world.reactor.settle()
    with pytest.raises(UpstreamRefused):
        world.run(_value(refused))
    answer = world.run(_value(good))
    assert world.run(read_all(answer.content)) == DATA
    answer.content.close()


@pytest.mark.parametrize("error", [UpstreamUnreachable("gone"), UpstreamFailing("limited", 429)])
def test_the_first_registrys_trouble_is_not_the_seconds(world: World, error: RegistryError) -> None:
    world.upstream.repository(f"{OTHER}/{APP}").put_blob(DATA)
    gate = Gate()
    world.upstream.on("GET", "/v2/library/app/blobs", gate.then(fails(error)), times=1)
    failing = world.start(world.blob(DIGEST))
    good = world.start(world.blob(DIGEST, registry=OTHER))
    gate.open()
    world.reactor.settle()
    with pytest.raises(type(error)):
        world.run(_value(failing))
    answer = world.run(_value(good))
    assert world.run(read_all(answer.content)) == DATA
    answer.content.close()


def test_a_registry_that_is_gone_is_waited_for_once(world: World) -> None:
    """However many clients ask, with whatever tokens: the next one would only wait as long again."""
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    gate = Gate()
    world.upstream.on("GET", "blobs", gate.then(fails(UpstreamUnreachable("gone"))))
    waiting = [world.start(world.blob(DIGEST, who=who)) for who in (ALICE, BOB, ALICE)]
    gate.open()
    world.reactor.settle()
    for deferred in waiting:
        with pytest.raises(UpstreamUnreachable):
            world.run(_value(deferred))
    assert asked(world) == ["GET"]


def test_a_rate_limit_may_be_anothers(world: World) -> None:
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    gate = Gate()
    world.upstream.on("GET", "blobs", gate.then(says(429)), times=1)
    limited = world.start(world.blob(DIGEST, who=BOB))
    good = world.start(world.blob(DIGEST, who=ALICE))
    gate.open()
    world.reactor.settle()
    with pytest.raises(UpstreamFailing):
        world.run(_value(limited))
    answer = world.run(_value(good))
    assert world.run(read_all(answer.content)) == DATA
    answer.content.close()


def test_a_long_download_does_not_keep_a_yes_alive(world: World) -> None:
    """Whoever joins it when upstream's yes is old is asked about, like everyone."""
    repository = world.upstream.repository(f"{HUB}/{APP}")
    world.upstream.on("GET", "blobs", flowing)
    first = world.run(world.blob(DIGEST))
    world.reactor.advance(FRESH - 1)
    second = world.run(world.blob(DIGEST))
    assert asked(world) == ["GET"]
    repository.readers = {ALICE}
    world.reactor.advance(1)
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST))
    for answer in (first, second):
        answer.content.close()


def test_a_download_that_took_long_is_no_fresh_yes(world: World) -> None:
    repository = world.upstream.repository(f"{HUB}/{APP}")
    world.upstream.on("GET", "blobs", flowing)
    first = world.run(world.blob(DIGEST))
    world.reactor.advance(FRESH)
    repository.readers = {ALICE}
    world.upstream.answers[0].end()
    world.reactor.settle()
    first.content.close()
    assert world.blobs.exists(DIGEST)
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST))


def test_joining_a_download_of_untold_length(world: World) -> None:
    """There is nothing to compare upstream's answer with before its end: so that is waited for."""
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    world.upstream.on("GET", APP, lambda asked, data: Answer(200, DATA, length=None, sent=100))
    first = world.run(world.blob(DIGEST))
    second = world.start(world.blob(DIGEST, COPY))
    assert not second.called
    world.upstream.answers[0].end()
    world.reactor.settle()
    answer = world.run(_value(second))
    assert answer.verdict == "REVALIDATED"
    assert world.run(read_all(answer.content)) == DATA
    first.content.close()
    answer.content.close()


# what is a yes


def redirecting(world: World, there: Callable[[Any, Any], Answer]) -> None:
    """Let COPY redirect every blob; what is there is answered by `there`."""
    world.upstream.repository(f"{HUB}/{COPY}")

    def behave(asked: Any, data: Any) -> Answer:
        return there(asked, DATA) if asked.follow else refusal(307, location="https://cdn.example/signed?x=1")

    for method in ("GET", "HEAD"):
        world.upstream.on(method, COPY, behave)


def test_a_redirect_is_followed_before_it_is_believed(world: World) -> None:
    """registry.k8s.io redirects any name and digest: whoever knows a digest would get what is cached of anyone's."""
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    world.fetch(DIGEST, who=ALICE)
    redirecting(world, lambda asked, data: refusal(404))
    with pytest.raises(UpstreamRefused) as caught:
        world.run(world.blob(DIGEST, COPY))
    assert caught.value.status == 404
    assert not world.links.has_layer(f"{HUB}/{COPY}", DIGEST)


def test_a_redirect_to_a_url_that_is_signed_for_get(world: World) -> None:
    world.fetch(DIGEST)
    redirecting(world, lambda asked, data: serve(asked, "", data) if asked.method == "GET" else refusal(403))
    world.upstream.forget()
    assert world.fetch(DIGEST, COPY) == ("REVALIDATED", DATA)
    assert [(one.method, one.range) for one in world.upstream.seen(pattern=COPY)] == [
        ("HEAD", None), ("GET", "bytes=0-0"),
    ]  # fmt: skip
    assert world.upstream.answers[-1].read <= 1
    assert world.fetch(DIGEST, COPY) == ("HIT", DATA)


def test_head_of_what_is_redirected(world: World) -> None:
    redirecting(world, lambda asked, data: serve(asked, "", data))
    answer = world.run(world.blob(DIGEST, COPY, head=True))
    assert (answer.size, answer.content) == (len(DATA), None)


@pytest.mark.parametrize("status", [405, 501])
def test_an_upstream_without_head(world: World, status: int) -> None:
    world.upstream.on("HEAD", "blobs", says(status))
    assert world.run(world.blob(DIGEST, head=True)).size == len(DATA)
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE, BOB}
    world.fetch(DIGEST, who=ALICE)
    assert world.fetch(DIGEST, who=BOB) == ("REVALIDATED", DATA)


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked, data: Answer(200, DATA, length=None) if asked.method == "GET" else Answer(200, length=None),
        lambda asked, data: Answer(200, DATA) if asked.method == "GET" else Answer(200, length=0),
        lambda asked, data: serve(asked, "", data) if asked.method == "GET" else Answer(200, length=7),
    ],
    ids=["no length at all", "a HEAD of length 0, no ranges", "a HEAD of another length"],
)
def test_other_ways_to_say_yes(world: World, answer: Any) -> None:
    world.fetch(DIGEST)
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    for method in ("HEAD", "GET"):
        world.upstream.on(method, COPY, answer)
    assert world.fetch(DIGEST, COPY)[1] == DATA


def test_the_empty_blob_has_no_first_byte(world: World) -> None:
    empty = world.upstream.repository(f"{HUB}/{APP}").put_blob(b"")
    world.fetch(empty)
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(b"")
    world.upstream.on("HEAD", "blobs", says(405))
    assert world.fetch(empty, COPY) == ("REVALIDATED", b"")


@pytest.mark.parametrize(
    "answer",
    [
        web_page,
        lambda asked, data: Answer(200, b"<html>" * (asked.method == "GET"), length=None),
        lambda asked, data: Answer(206, b"<", {"content-range": "bytes 0-0/5"}),
        lambda asked, data: Answer(206, b"<", {"content-range": "bytes 0-0/*"}),
        lambda asked, data: Answer(206, b"<"),
        lambda asked, data: Answer(200, b"x" * 5000, length=None) if asked.method == "GET" else refusal(307),
    ],
    ids=["page", "page of untold length", "another size", "untold size", "no Content-Range", "redirect to a page"],
)
def test_an_answer_is_not_yet_a_yes(world: World, answer: Any) -> None:
    """A captive portal says 200 to everything; so does a web application in the place of a registry."""
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    world.fetch(DIGEST, who=ALICE)
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "", answer)
    for name in (APP, COPY):
        with pytest.raises(UpstreamError):
            world.run(world.blob(DIGEST, name))
    other = Digest.of(b"never seen")
    with suppress(RegistryError):
        world.run(world.blob(other, head=True))
    with pytest.raises(RegistryError):
        world.fetch(other)
    # And with all that said, the private repository is still nobody else's.
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.UNKNOWN
    world.upstream.behave()
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST))


def test_the_size_that_upstream_tells_is_read_with_care(world: World) -> None:
    world.upstream.on(
        "HEAD", "blobs", lambda asked, data: Answer(200, fields={"content-length": "9" * 5000}, length=None)
    )
    assert world.run(world.blob(DIGEST, head=True)).size == len(DATA)


def test_the_token_server_says_no(world: World) -> None:
    """That is upstream's word as well as the registry's own 401."""
    world.fetch(DIGEST)
    world.reactor.advance(FRESH)
    world.upstream.on("HEAD", "blobs", fails(Unauthorized("no token")))
    with pytest.raises(Unauthorized):
        world.run(world.blob(DIGEST))
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):  # and so it is not served as stale
        world.run(world.blob(DIGEST))


def test_a_refusal_when_it_is_fetched_again(world: World) -> None:
    world.fetch(DIGEST)
    world.blobs.remove(DIGEST)
    world.upstream.repository(f"{HUB}/{APP}").readers = {ALICE}
    with pytest.raises(UpstreamRefused):
        world.run(world.blob(DIGEST))
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.UNKNOWN


# outage


@pytest.mark.parametrize(
    "trouble", [fails(UpstreamUnreachable("gone")), says(500), says(503), says(429), fails(UpstreamBroken("cut"))]
)
def test_stale_while_upstream_fails(world: World, trouble: Any) -> None:
    world.fetch(DIGEST)
    world.reactor.advance(FRESH)
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "", trouble)
    assert world.fetch(DIGEST) == ("STALE", DATA)
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    with pytest.raises(UpstreamError):  # what upstream never confirmed there
        world.run(world.blob(DIGEST, COPY))


def test_stale_proves_nothing(world: World) -> None:
    """Or each use while upstream is gone would prolong the yes."""
    world.fetch(DIGEST)
    world.reactor.advance(FRESH)
    world.upstream.vanish()
    world.fetch(DIGEST)
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.STALE


def test_joining_while_upstream_fails_proves_nothing(world: World) -> None:
    world.fetch(DIGEST)
    world.blobs.remove(DIGEST)
    world.reactor.advance(FRESH)
    world.upstream.on("GET", "blobs", flowing)
    first = world.run(world.blob(DIGEST))
    world.reactor.advance(FRESH)
    world.upstream.vanish()
    second = world.run(world.blob(DIGEST))
    assert second.verdict == "JOINED"
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.STALE
    first.content.close()
    second.content.close()


# the disk


def test_links_and_records_that_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert world.fetch(DIGEST)[1] == DATA
    assert any("is not linked" in line for line in logged)


def test_who_leaves_while_it_is_confirmed(world: World) -> None:
    world.fetch(DIGEST)
    world.upstream.repository(f"{HUB}/{COPY}").put_blob(DATA)
    gate = Gate()
    world.upstream.on("HEAD", COPY, gate.then(serve_head))
    leaving = world.start(world.blob(DIGEST, COPY))
    staying = world.start(world.blob(DIGEST, COPY))
    leaving.addErrback(lambda failure: failure.trap(CancelledError))
    leaving.cancel()
    gate.open()
    world.reactor.settle()
    answer = world.run(_value(staying))
    assert answer.verdict == "REVALIDATED"
    assert len(world.upstream.seen("HEAD", COPY)) == 1
    answer.content.close()


def serve_head(asked: Any, data: Any) -> Answer:
    return serve(asked, "", data)


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_who_leaves_at_any_moment(make_world: Callable[..., World], moment: int, head: bool, stored: bool) -> None:
    """What he held is given back, and the blob comes all the same (`make_world` looks for what is left open)."""
    world = make_world()
    world.upstream.repository(f"{HUB}/{APP}").put_blob(DATA)
    if stored:
        world.fetch(DIGEST)
        world.reactor.advance(FRESH)
    world.reactor.pool.hold()
    left: list[Any] = []
    deferred = Deferred.fromCoroutine(world.blob(DIGEST, head=head))
    deferred.addBoth(left.append)
    for _ in range(moment):
        if not world.reactor.pool.step() and world.reactor.getDelayedCalls():
            world.reactor.advance(0)
    if left:
        if left[0].content is not None:
            left[0].content.close()
    else:
        deferred.cancel()
    world.reactor.pool.release()
    world.reactor.settle()
    assert world.fetch(DIGEST)[1] == DATA


def test_a_mistake_of_ours_is_no_leak(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a mistake in this program")

    monkeypatch.setattr(type(world.links), "link_layer", fail)
    answer = world.run(world.blob(DIGEST))
    assert world.run(read_all(answer.content), 30) == DATA
    answer.content.close()


def test_the_file_is_whole(world: World) -> None:
    world.upstream.on("GET", "blobs", cut_after(5000), times=2)
    world.upstream.on("GET", "blobs", untold)
    assert world.fetch(DIGEST)[1] == DATA
    assert Path(world.layout.blob(DIGEST)).read_bytes() == DATA
