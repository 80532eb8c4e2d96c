"""Manifests and tags of the cache: asked for as rarely as may be, served stale where it must be, and always exact."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.cache.access import FRESH, Standing
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
from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.manifests import DOCKER_MANIFEST, DOCKER_SCHEMA1_SIGNED, MAX_MANIFEST, OCI_INDEX
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob
from tests.cache.stand_ins.upstream import (
    Answer,
    FakeRepository,
    Gate,
    fails,
    honest,
    instead,
    refusal,
    says,
    serve,
    web_page,
)
from tests.cache.stand_ins.world import HUB, World

APP, COPY = "library/app", "library/copy"
ALICE, BOB = "Bearer alice", "Bearer bob"
OCI = "application/vnd.oci.image.manifest.v1+json"
# Not as a program would write it: the bytes are what counts.
ONE = b'{ "schemaVersion":2,\n"config":{"digest":"sha256:%b","size":1}, "layers": [] }\n' % (b"1" * 64)
TWO = ONE.replace(b"1" * 64, b"2" * 64)
INDEX = b'{"schemaVersion":2,"manifests":[]}'
SCHEMA1 = json.dumps({"schemaVersion": 1, "name": APP, "fsLayers": [], "signatures": [{"signature": "x"}]}).encode()
TIERS = Freshness(True, re.compile("(stable)"), 600, re.compile(r"\d+\.\d+\.\d+"), 6000, 3600)


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world()
    app(world).put_manifest(ONE, "1")
    return world


def app(world: World) -> FakeRepository:
    return world.upstream.repository(f"{HUB}/{APP}")


def asked(world: World) -> list[str]:
    methods = [one.method for one in world.upstream.seen(pattern="manifests")]
    world.upstream.forget()
    return methods


def got(answer: ManifestAnswer) -> tuple[str, bytes | None]:
    assert answer.content is None or answer.size == len(answer.content)
    return answer.verdict, answer.content


async def value(deferred: Deferred[Any]) -> Any:
    return await deferred


# by tag


def test_a_tag_is_fetched_once_and_then_asked_about(world: World) -> None:
    assert got(world.run(world.manifest("1"))) == ("MISS", ONE)
    assert asked(world) == ["GET"]
    for _ in range(3):
        answer = world.run(world.manifest("1"))
        assert got(answer) == ("REVALIDATED", ONE)
        assert (answer.digest, answer.media_type) == (Digest.of(ONE), OCI)
        assert asked(world) == ["HEAD"]


def test_a_tag_that_moves_costs_one_pull(world: World) -> None:
    world.run(world.manifest("1"))
    app(world).put_manifest(TWO, "1")
    asked(world)
    assert got(world.run(world.manifest("1"))) == ("MISS", TWO)
    assert asked(world) == ["HEAD", "GET"]
    assert got(world.run(world.manifest("1"))) == ("REVALIDATED", TWO)
    app(world).put_manifest(ONE, "1")  # and back again: that one is known
    asked(world)
    assert got(world.run(world.manifest("1"))) == ("REVALIDATED", ONE)
    assert asked(world) == ["HEAD"]


def test_a_manifest_that_is_known_by_its_digest(world: World) -> None:
    world.run(world.manifest(Digest.of(ONE)))
    asked(world)
    assert got(world.run(world.manifest("1")))[1] == ONE
    assert asked(world) == ["GET"]
    app(world).put_manifest(ONE, "2")
    assert got(world.run(world.manifest("2", head=True))) == ("REVALIDATED", ONE)
    assert asked(world) == ["HEAD"]


@pytest.mark.parametrize(("tag", "lifetime"), [("stable", 600), ("1.2.3", 6000), ("latest", 3600)])
def test_tiers(make_world: Callable[..., World], tag: str, lifetime: float) -> None:
    world = make_world(freshness=TIERS)
    app(world).put_manifest(ONE, tag)
    world.run(world.manifest(tag))
    asked(world)
    for _ in range(2):
        assert got(world.run(world.manifest(tag))) == ("HIT", ONE)
    assert asked(world) == []
    world.reactor.advance(FRESH)  # who may read it is another question than what it is
    assert got(world.run(world.manifest(tag))) == ("REVALIDATED", ONE)
    assert asked(world) == ["HEAD"]
    before = 0.0
    while before + FRESH / 2 < lifetime:
        world.reactor.advance(FRESH / 2)
        before += FRESH / 2
        world.run(world.manifest(Digest.of(ONE)))  # keeps access fresh, and says nothing of the tag
    asked(world)
    assert got(world.run(world.manifest(tag))) == ("HIT", ONE)
    world.reactor.advance(lifetime - before)
    assert got(world.run(world.manifest(tag))) == ("REVALIDATED", ONE)


def test_a_fresh_tag_is_not_everyones(make_world: Callable[..., World]) -> None:
    world = make_world(freshness=TIERS)
    app(world).put_manifest(ONE, "latest")
    app(world).readers = {ALICE}
    world.run(world.manifest("latest", who=ALICE))
    for who in (None, BOB):
        with pytest.raises(UpstreamRefused):
            world.run(world.manifest("latest", who=who))


def test_a_restart_forgets_nothing(world: World, make_world: Callable[..., World]) -> None:
    world.run(world.manifest("1"))
    again = make_world(upstream=world.upstream)
    asked(again)
    assert got(again.run(again.manifest("1"))) == ("REVALIDATED", ONE)
    again.upstream.vanish()
    assert got(again.run(again.manifest("1"))) == ("STALE", ONE)


# by Accept


def by_accept(asked: Any, data: Any) -> Answer:
    """Give the index to those who take one, as a registry does."""
    index = OCI_INDEX in asked.headers.joined("accept").replace(" ", "").split(",")
    return serve(asked, OCI_INDEX if index else OCI, INDEX if index else ONE)


def test_what_is_accepted_makes_two_answers_of_a_tag(world: World) -> None:
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "manifests/1", by_accept)
    both, one = [f"{OCI}, {OCI_INDEX}"], [OCI]
    for verdict in ("MISS", "REVALIDATED"):
        assert got(world.run(world.manifest("1", accept=both))) == (verdict, INDEX)
        assert got(world.run(world.manifest("1", accept=one))) == (verdict, ONE)
    asked(world)
    for same in ([f"{OCI_INDEX},{OCI}"], [OCI_INDEX, OCI], [OCI, OCI_INDEX, OCI], [f"{OCI};q=0.5", OCI_INDEX.upper()]):
        assert got(world.run(world.manifest("1", accept=same)))[0] == "REVALIDATED"
    assert set(asked(world)) == {"HEAD"}


def test_accept_fields_are_passed_on_as_they_came(world: World) -> None:
    fields = [f"{OCI};q=0.5", "*/*;q=0.1", "application/x, application/y"]
    world.run(world.manifest("1", accept=fields))
    assert world.upstream.asked[-1].headers.all("accept") == fields


def test_stale_is_what_suits_the_client(world: World) -> None:
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "manifests/1", by_accept)
    world.run(world.manifest("1", accept=[OCI]))
    world.reactor.advance(10)
    world.run(world.manifest("1", accept=[OCI_INDEX]))
    world.upstream.vanish()
    assert got(world.run(world.manifest("1", accept=[OCI]))) == ("STALE", ONE)
    assert got(world.run(world.manifest("1", accept=[OCI, "application/other"]))) == ("STALE", ONE)
    assert got(world.run(world.manifest("1", accept=[]))) == ("STALE", INDEX)  # the newest
    assert got(world.run(world.manifest("1", accept=["application/*"]))) == ("STALE", INDEX)
    with pytest.raises(UpstreamUnreachable):
        world.run(world.manifest("1", accept=["application/vnd.docker.distribution.manifest.v2+json"]))


def test_many_accepts_do_not_pile_up(world: World) -> None:
    for number in range(40):
        world.run(world.manifest("1", accept=[f"application/x{number}"]))
        world.reactor.advance(1)
    assert len(world.records.get("tag", f"{HUB}/{APP}", "1") or {}) == 16


# stale if error

TROUBLES = [
    fails(UpstreamUnreachable("gone")), fails(UpstreamTimeout("silent")), fails(UpstreamBroken("no token")),
    fails(TooManyRequests("of tokens")), says(429, retry_after="5"), says(500), says(502), says(503), says(504),
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_stale_if_error(world: World, trouble: Any, head: bool, reference: str) -> None:
    world.run(world.manifest(reference))
    world.reactor.advance(10 * 86400)
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "", trouble)
    for _ in range(2):
        assert got(world.run(world.manifest(reference, head=head))) == ("STALE", ONE)
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.STALE  # nothing was proven by that
    with pytest.raises(RegistryError) as caught:
        world.run(world.manifest("unknown", head=head))
    assert caught.value.status in (429, 502, 504)
    world.upstream.behave()
    assert got(world.run(world.manifest(reference)))[0] == "REVALIDATED"


def test_stale_when_the_new_content_cannot_be_had(world: World) -> None:
    """The HEAD tells of another one, and the GET for it is one too many for the rate limit."""
    world.run(world.manifest("1"))
    app(world).put_manifest(TWO, "1")
    world.upstream.on("GET", "manifests", says(429))
    assert got(world.run(world.manifest("1"))) == ("STALE", ONE)


def test_a_rate_limit_is_told_where_nothing_is_kept(world: World) -> None:
    world.upstream.on("GET", "manifests", says(429, retry_after="5"))
    with pytest.raises(UpstreamFailing) as caught:
        world.run(world.manifest("1"))
    assert (caught.value.status, caught.value.code) == (429, "TOOMANYREQUESTS")
    assert ("retry-after", "5") in caught.value.headers


def test_a_tag_deleted_upstream_is_gone(world: World) -> None:
    world.run(world.manifest("1"))
    del app(world).manifests["1"]
    with pytest.raises(UpstreamRefused) as caught:
        world.run(world.manifest("1"))
    assert caught.value.status == 404
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):
        world.run(world.manifest("1"))
    assert got(world.run(world.manifest(Digest.of(ONE))))[1] == ONE  # that is not what was deleted


def test_a_stranger_who_is_told_404_deletes_nothing(world: World) -> None:
    """Many registries say so to those who may not know."""
    app(world).readers, app(world).refusal = {ALICE}, 404
    world.run(world.manifest("1", who=ALICE))
    with pytest.raises(UpstreamRefused):
        world.run(world.manifest("1", who=BOB))
    world.upstream.vanish()
    assert got(world.run(world.manifest("1", who=ALICE))) == ("STALE", ONE)


@pytest.mark.parametrize("refusing", [says(401), says(403), fails(Unauthorized("no token"))])
def test_a_refusal_ends_the_yes(world: World, refusing: Any) -> None:
    world.run(world.manifest("1"))
    world.upstream.on("HEAD", "", refusing)
    with pytest.raises(RegistryError) as caught:
        world.run(world.manifest("1"))
    assert caught.value.status in (401, 403)
    world.upstream.vanish()
    for reference in ("1", Digest.of(ONE)):
        with pytest.raises(UpstreamUnreachable):
            world.run(world.manifest(reference))


def test_records_that_are_damaged_are_asked_for_again(world: World) -> None:
    world.run(world.manifest("1"))
    for record in (
        {"x": 1},
        {"x": {"digest": "no", "type": OCI, "checked": 1}},
        {"x": {"digest": str(Digest.of(ONE))}},
    ):
        world.records.put(record, "tag", f"{HUB}/{APP}", "1")
        assert got(world.run(world.manifest("1")))[1] == ONE


# by digest


@pytest.mark.parametrize("head", [False, True])
def test_a_digest_needs_no_question(world: World, head: bool) -> None:
    digest = Digest.of(ONE)
    assert got(world.run(world.manifest(digest))) == ("MISS", ONE)
    asked(world)
    assert got(world.run(world.manifest(digest, head=head))) == ("HIT", ONE)
    assert asked(world) == []
    world.reactor.advance(FRESH)
    assert got(world.run(world.manifest(digest, head=head))) == ("REVALIDATED", ONE)
    assert asked(world) == ["HEAD"]


def test_head_of_what_is_not_kept(world: World) -> None:
    for reference in ("1", Digest.of(ONE)):
        answer = world.run(world.manifest(reference, head=True))
        assert (answer.digest, answer.size, answer.content) == (Digest.of(ONE), len(ONE), None)
    assert asked(world) == ["HEAD", "HEAD"]


def test_sha512(world: World) -> None:
    digest = app(world).put_manifest(TWO, algorithm="sha512")
    answer = world.run(world.manifest(digest))
    assert (answer.digest, answer.content) == (digest, TWO)
    assert got(world.run(world.manifest(digest))) == ("HIT", TWO)


def test_a_tag_whose_digest_upstream_tells_as_sha512(world: World) -> None:
    digest = Digest.of(ONE, "sha512")

    def behave(asked: Any, data: Any) -> Answer:
        body = ONE if asked.method == "GET" else b""
        return Answer(200, body, {"content-type": OCI, "docker-content-digest": str(digest)}, length=len(ONE))

    for method in ("GET", "HEAD"):
        world.upstream.on(method, "manifests/1", behave)
    for verdict in ("MISS", "REVALIDATED"):
        answer = world.run(world.manifest("1"))
        assert (answer.verdict, answer.digest, answer.content) == (verdict, digest, ONE)


def test_another_repositorys_manifest(world: World) -> None:
    """To know a digest is no right to what it names."""
    app(world).readers = {ALICE}
    world.run(world.manifest("1", who=ALICE))
    world.upstream.repository(f"{HUB}/{COPY}")
    for who in (None, ALICE):
        with pytest.raises(UpstreamRefused) as caught:
            world.run(world.manifest(Digest.of(ONE), COPY, who))
        assert caught.value.status == 404
    world.upstream.repository(f"{HUB}/{COPY}").put_manifest(ONE)
    assert got(world.run(world.manifest(Digest.of(ONE), COPY)))[1] == ONE


def test_a_layer_is_no_manifest(world: World) -> None:
    layer = app(world).put_blob(b"layer")
    world.fetch(layer)
    with pytest.raises(UpstreamRefused):
        world.run(world.manifest(layer))


# what upstream may send


def test_exact_bytes(world: World) -> None:
    for content in (ONE, b"\n" + ONE, ONE + b"  ", '{"layers":[],"config":{},"x":"ä\\u00e4"}'.encode()):
        app(world).put_manifest(content, "exact")
        assert world.run(world.manifest("exact")).content == content
        assert world.run(world.manifest(Digest.of(content))).content == content


@pytest.mark.parametrize(
    ("content", "told", "media_type"),
    [
        (INDEX, "application/json", OCI_INDEX),
        (INDEX, "", OCI_INDEX),
        (ONE, "text/plain; charset=utf-8", OCI),
        (ONE, f"{OCI}; charset=utf-8", OCI),
        (ONE, DOCKER_MANIFEST, DOCKER_MANIFEST),
    ],
)  # fmt: skip
def test_media_types(world: World, content: bytes, told: str, media_type: str) -> None:
    digest = app(world).put_manifest(content, "typed", media_type=told)
    for reference in ("typed", digest, "typed", digest):
        assert world.run(world.manifest(reference)).media_type == media_type


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize(
    "behaviour",
    [
        instead(TWO, docker_content_digest=str(Digest.of(ONE)), content_type=OCI),
        instead(b"not JSON", docker_content_digest=str(Digest.of(b"not JSON")), content_type=OCI),
        instead(b"[]", content_type=OCI),
        web_page,
        instead(b" " * MAX_MANIFEST + ONE, content_type=OCI),
        instead(b"{" * 100_000, content_type=OCI),
    ],
    ids=["wrong digest", "no JSON", "no object", "page", "too long", "too deep"],
)
def test_what_is_no_manifest_is_an_error_and_not_kept(world: World, behaviour: Any, reference: str) -> None:
    world.upstream.on("GET", "manifests", behaviour)
    with pytest.raises(UpstreamBroken):
        world.run(world.manifest(reference))
    assert list(world.blobs.walk()) == []
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.UNKNOWN
    world.upstream.behave()
    assert got(world.run(world.manifest(reference))) == ("MISS", ONE)


def test_no_page_for_everything_makes_public_what_is_not(world: World) -> None:
    """It answers 200 to whoever asks, and that is all it knows."""
    app(world).readers = {ALICE}
    world.run(world.manifest("1", who=ALICE))
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "", web_page)
    for reference in (Digest.of(ONE), "1", Digest.of(TWO), "2"):
        for head in (False, True):
            with pytest.raises(UpstreamError):
                world.run(world.manifest(reference, head=head))
    assert world.access.standing(f"{HUB}/{APP}", "public") is Standing.UNKNOWN


def test_a_head_without_a_digest(world: World) -> None:
    """Only the content tells, and that is asked for once."""

    def bare(asked: Any, data: Any) -> Answer:
        return Answer(200, data if asked.method == "GET" else b"", {"content-type": OCI}, length=len(data))

    for method in ("GET", "HEAD"):
        world.upstream.on(method, "manifests/1", bare)
    assert got(world.run(world.manifest("1"))) == ("MISS", ONE)
    assert asked(world) == ["GET"]
    for head in (False, True):
        answer = world.run(world.manifest("1", head=head))
        assert (answer.digest, answer.size) == (Digest.of(ONE), len(ONE))
        assert asked(world) == ["HEAD", "GET"]


@pytest.mark.parametrize("status", [405, 501])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_an_upstream_without_head(world: World, status: int, reference: str) -> None:
    world.upstream.on("HEAD", "manifests", says(status))
    for head in (True, False, True):
        answer = world.run(world.manifest(reference, head=head))
        assert (answer.digest, answer.size) == (Digest.of(ONE), len(ONE))
    world.reactor.advance(FRESH)
    asked(world)
    assert world.run(world.manifest(reference)).content == ONE
    assert asked(world) == ["HEAD", "GET"]


@pytest.mark.parametrize("told", [{"length": None}, {"length": 0}, {"length": 3}])
def test_a_head_of_another_length(world: World, told: Any) -> None:
    world.run(world.manifest("1"))
    world.upstream.on(
        "HEAD", "", lambda asked, data: Answer(200, fields={"docker-content-digest": str(Digest.of(ONE))}, **told)
    )
    world.reactor.advance(FRESH)
    for reference in ("1", Digest.of(ONE)):
        assert world.run(world.manifest(reference)).content == ONE


def test_a_head_that_names_another_digest_than_was_asked_for(world: World) -> None:
    world.run(world.manifest(Digest.of(ONE)))
    world.reactor.advance(FRESH)
    world.upstream.on("HEAD", "", instead(ONE, docker_content_digest=str(Digest.of(TWO))))
    world.upstream.on("GET", "", says(404))
    with pytest.raises(UpstreamRefused):
        world.run(world.manifest(Digest.of(ONE)))


@pytest.mark.parametrize("reference", ["old", "digest"])
def test_schema_1_is_passed_on_and_not_kept(world: World, reference: str) -> None:
    """Its digest is that of a part of it."""
    digest = Digest.of(b"the payload")
    wanted = "old" if reference == "old" else str(digest)
    given = {"content_type": DOCKER_SCHEMA1_SIGNED, "docker_content_digest": str(digest)}
    for method in ("GET", "HEAD"):
        world.upstream.on(method, "manifests", instead(SCHEMA1, **given))
    for _ in range(2):
        answer = world.run(world.manifest(wanted))
        assert (answer.digest, answer.content, answer.verdict) == (digest, SCHEMA1, "PASS")
        assert answer.media_type == DOCKER_SCHEMA1_SIGNED
    assert list(world.blobs.walk()) == []


def test_schema_1_is_fetched_once_where_head_tells_nothing(world: World) -> None:
    digest = str(Digest.of(b"the payload"))
    world.upstream.on("HEAD", "manifests", says(405))
    given = {"content_type": DOCKER_SCHEMA1_SIGNED, "docker_content_digest": digest}
    world.upstream.on("GET", "manifests", instead(SCHEMA1, **given))
    world.run(world.manifest("old"))
    world.records.put({}, "tag", f"{HUB}/{APP}", "old")
    asked(world)
    assert world.run(world.manifest("old", head=True)).digest == Digest.parse(digest)
    assert asked(world) == ["HEAD", "GET"]


def test_nothing_else_passes_for_schema_1(world: World) -> None:
    """Whose content is not checked against the digest."""
    world.upstream.on("GET", "manifests", instead(TWO, content_type=DOCKER_SCHEMA1_SIGNED))
    with pytest.raises(UpstreamBroken):
        world.run(world.manifest(Digest.of(ONE)))


# many at once


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
@pytest.mark.parametrize("head", [False, True])
def test_the_same_question_is_asked_once(world: World, reference: str, head: bool) -> None:
    gate = Gate()
    world.upstream.on("HEAD" if head else "GET", "manifests", gate.then(honest))
    waiting = [world.start(world.manifest(reference, head=head)) for _ in range(20)]
    waiting[0].addErrback(lambda failure: failure.trap(CancelledError))
    waiting[0].cancel()  # who asked first goes
    gate.open()
    world.reactor.settle()
    for deferred in waiting[1:]:
        assert world.run(value(deferred)).digest == Digest.of(ONE)
    assert len(world.upstream.seen(pattern="manifests")) == 1


def test_different_clients_do_not_share_an_answer(world: World) -> None:
    app(world).readers = {ALICE}
    gate = Gate()
    world.upstream.on(
        "GET", "manifests", gate.then(lambda asked, data: refusal(401) if asked.who != ALICE else honest(asked, data))
    )
    waiting = {who: world.start(world.manifest("1", who=who)) for who in (ALICE, BOB, None)}
    gate.open()
    world.reactor.settle()
    assert world.run(value(waiting[ALICE])).content == ONE
    for who in (BOB, None):
        with pytest.raises(UpstreamRefused):
            world.run(value(waiting[who]))


def test_all_who_wait_hear_of_the_error(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "manifests", gate.then(says(500)))
    waiting = [world.start(world.manifest("1")) for _ in range(3)]
    gate.open()
    world.reactor.settle()
    for deferred in waiting:
        with pytest.raises(UpstreamFailing):
            world.run(value(deferred))


# the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, logged: list[str]
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    monkeypatch.setattr("dockerproxy.store.files.Staging.make_directory", fail)
    for reference in ("1", Digest.of(ONE), "1"):
        for head in (False, True):
            answer = world.run(world.manifest(reference, head=head))
            assert answer.digest == Digest.of(ONE)
            assert head or answer.content == ONE
    assert any("was not cached" in line for line in logged)


def test_a_disk_that_lets_nothing_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(world.manifest("1"))
    del app(world).manifests["1"]

    def fail(*args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("dockerproxy.store.records.Records.remove", fail)
    with pytest.raises(UpstreamRefused):
        world.run(world.manifest("1"))


@pytest.mark.parametrize("damage", [b"more", b"!", b""])
@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_a_damaged_manifest_is_fetched_again(world: World, damage: bytes, reference: str) -> None:
    """A disk that loses bytes, or a power cut behind our back."""
    world.run(world.manifest(reference))
    path = Path(world.layout.blob(Digest.of(ONE)))
    path.write_bytes(ONE + damage if damage == b"more" else damage + ONE[len(damage) or len(ONE) :])
    for verdict in ("MISS", "REVALIDATED"):
        assert got(world.run(world.manifest(reference))) == (verdict, ONE)
        world.reactor.advance(FRESH)
    path.write_bytes(b"!" + ONE[1:])
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):
        world.run(world.manifest(reference))


def test_what_was_read_a_moment_ago_is_not_read_again(world: World) -> None:
    digest = Digest.of(ONE)
    for verdict in ("MISS", "HIT"):
        assert got(world.run(world.manifest(digest))) == (verdict, ONE)
    Path(world.layout.blob(digest)).unlink()
    world.reactor.advance(29)
    assert got(world.run(world.manifest(digest))) == ("HIT", ONE)
    world.reactor.advance(1)
    assert got(world.run(world.manifest(digest))) == ("MISS", ONE)


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_what_was_removed_is_not_remembered(world: World, reference: str) -> None:
    for _ in range(2):
        world.run(world.manifest(reference))
    assert world.links.unlink_manifest(f"{HUB}/{APP}", Digest.of(ONE))
    assert got(world.run(world.manifest(reference))) == ("MISS", ONE)


def test_what_one_may_not_read_is_remembered_for_others_only(world: World) -> None:
    app(world).readers = {ALICE}
    digest = Digest.of(ONE)
    for _ in range(2):
        assert world.run(world.manifest(digest, who=ALICE)).content == ONE
    with pytest.raises(RegistryError):
        world.run(world.manifest(digest, who=BOB))


def test_another_media_type_is_the_one_that_counts(world: World) -> None:
    """Of the same bytes: upstream may have had it wrong."""
    digest = app(world).put_manifest(TWO, "typed", media_type=OCI)
    for _ in range(2):
        assert world.run(world.manifest(digest)).media_type == OCI
    app(world).put_manifest(TWO, "typed", media_type=DOCKER_MANIFEST)
    world.upstream.on("HEAD", "manifests", says(405))  # so that it is fetched
    for _ in range(2):
        assert world.run(world.manifest("typed")).media_type == DOCKER_MANIFEST
    assert world.run(world.manifest(digest)).media_type == DOCKER_MANIFEST


def test_another_media_type_counts_for_all_who_ask(world: World) -> None:
    digest = app(world).put_manifest(TWO, "typed", media_type=OCI)
    for _ in range(2):
        world.run(world.manifest(digest, who=ALICE))
    app(world).put_manifest(TWO, "typed", media_type=DOCKER_MANIFEST)
    for who in (BOB, ALICE):  # upstream is asked whether Bob may, and says another type
        assert world.run(world.manifest(digest, who=who)).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize("reference", ["typed", str(Digest.of(TWO))])
@pytest.mark.parametrize("told", [None, "application/json", "text/html; charset=utf-8"])
def test_a_registry_that_tells_no_media_type_in_a_head(world: World, told: str | None, reference: str) -> None:
    """What is known of a manifest stays, and what is not known is asked for by GET."""
    digest = app(world).put_manifest(TWO, "typed", media_type=OCI)
    typed = {} if told is None else {"content_type": told}
    world.upstream.on("HEAD", "manifests", instead(TWO, docker_content_digest=str(digest), **typed))
    assert world.run(world.manifest(reference, head=True, who=ALICE)).media_type == OCI
    for who in (ALICE, BOB, ALICE):
        assert world.run(world.manifest(reference, who=who)).media_type == OCI
    world.reactor.advance(60)
    assert world.run(world.manifest(str(digest), who=ALICE)).media_type == OCI


def test_a_media_type_that_changes_while_it_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = app(world).put_manifest(TWO, "typed", media_type=OCI)
    world.run(world.manifest(digest))
    there = Blobs.open

    def meanwhile(blobs: Blobs, asked: Digest) -> OpenBlob | None:
        world.links.link_manifest(f"{HUB}/{APP}", digest, DOCKER_MANIFEST)
        return there(blobs, asked)

    monkeypatch.setattr(Blobs, "open", meanwhile)
    world.run(world.manifest(digest))
    assert world.run(world.manifest(digest)).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize("cached", [None, bytearray(), bytearray(ONE[:10])])
def test_what_memory_has_only_in_part(world: World, monkeypatch: pytest.MonkeyPatch, cached: bytearray | None) -> None:
    """A read that does not wait for the disk gives what is there."""
    world.run(world.manifest("1"))
    monkeypatch.setattr("dockerproxy.store.blobs.OpenBlob.read", lambda blob, offset, size: cached)
    assert got(world.run(world.manifest("1"))) == ("REVALIDATED", ONE)


def test_what_is_kept_counts(world: World) -> None:
    world.run(world.manifest("1"))
    assert world.room.usage.total == len(ONE)


def test_evicted(world: World) -> None:
    world.run(world.manifest("1"))
    world.blobs.remove(Digest.of(ONE))
    for reference in ("1", Digest.of(ONE)):
        assert got(world.run(world.manifest(reference)))[1] == ONE


# several processes


@pytest.mark.parametrize("reference", ["1", str(Digest.of(ONE))])
def test_two_processes_ask_once(make_world: Callable[..., World], reference: str) -> None:
    one = make_world(shared=True)
    other = make_world(shared=True, upstream=one.upstream, turns=one.turns)
    app(one).put_manifest(ONE, "1")
    for method in ("GET", "HEAD"):  # the second time, all of them know what to expect
        gate = Gate()
        one.upstream.on(method, "manifests", gate.then(honest))
        waiting = [world.start(world.manifest(reference)) for world in (one, other, other)]
        gate.open()
        one.advance(1)
        assert [one.run(value(answer)).content for answer in waiting] == [ONE] * 3
        assert len(one.upstream.seen(pattern="manifests")) <= 1
        one.upstream.forget()
        one.advance(FRESH / 2)


def test_what_another_process_was_answered_is_no_answer_to_somebody_else(make_world: Callable[..., World]) -> None:
    one = make_world(shared=True)
    other = make_world(shared=True, upstream=one.upstream, turns=one.turns)
    app(one).put_manifest(ONE, "1")
    gate = Gate()
    one.upstream.on("GET", "manifests", gate.then(honest))
    waiting = [one.start(one.manifest("1", who=ALICE)), other.start(other.manifest("1", who=BOB))]
    gate.open()
    one.advance(1)
    assert [one.run(value(answer)).verdict for answer in waiting] == ["MISS", "MISS"]
    assert sorted(str(seen.who) for seen in one.upstream.seen(pattern="manifests")) == [ALICE, BOB]
