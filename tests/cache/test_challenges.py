from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.challenges import TOKEN_PATH, Realm
from dockerproxy.errors import (
    RegistryError,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamUnreachable,
)
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.names import Registry
from tests.cache.stand_ins.upstream import Answer, Gate, instead, refusal, says
from tests.cache.stand_ins.world import HUB, OTHER, World

BEARER = 'Bearer realm="https://auth.other.example/token",service="other",scope="repository:a:pull,push"'
HOUR = 3600


def asks(*fields: str, status: int = 401, **more: str) -> Any:
    def behave(asked: Any, data: Any) -> Answer:
        answer = Answer(status, b"{}", {name.replace("_", "-"): value for name, value in more.items()})
        answer.headers._fields += [("www-authenticate", field) for field in fields]
        return answer

    return behave


def of(world: World, registry: Registry = OTHER) -> list[Challenge]:
    return world.run(world.challenges.of(registry))  # type: ignore[no-any-return]


def test_asked_once_in_an_hour(world: World) -> None:
    world.upstream.on("GET", "^/v2/$", asks(BEARER, 'Basic realm="x"'))
    for _ in range(3):
        assert [challenge.scheme for challenge in of(world)] == ["bearer", "basic"]
    assert len(world.upstream.asked) == 1
    assert [challenge.scheme for challenge in world.learned[OTHER]] == ["bearer", "basic"]
    world.reactor.advance(HOUR)
    world.upstream.behave()
    assert of(world) == []
    assert world.learned[OTHER] == []


def test_asked_for_by_many_at_once(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "^/v2/$", gate.then(asks(BEARER)))
    waiting = [world.start(world.challenges.of(OTHER)) for _ in range(5)]
    gate.open()
    world.reactor.settle()
    assert all(deferred.called for deferred in waiting)
    assert len(world.upstream.asked) == 1


@pytest.mark.parametrize("trouble", [says(500), says(429)])
def test_remembered_while_upstream_fails(world: World, make_world: Callable[..., World], trouble: Any) -> None:
    world.upstream.on("GET", "^/v2/$", asks(BEARER), times=1)
    of(world)
    world.upstream.on("GET", "^/v2/$", trouble)
    world.reactor.advance(1000 * HOUR)
    again = make_world(upstream=world.upstream)
    for cache in (world, again):
        assert [challenge.parameters["service"] for challenge in of(cache)] == ["other"]
    again.challenges.recall([OTHER])
    assert [challenge.scheme for challenge in again.learned[OTHER]] == ["bearer"]


def test_open_to_all_is_remembered_too(world: World) -> None:
    assert of(world) == []
    world.upstream.vanish()
    world.reactor.advance(HOUR)
    assert of(world) == []


def test_one_that_never_said(world: World) -> None:
    world.upstream.vanish()
    with pytest.raises(UpstreamUnreachable):
        of(world)
    assert world.challenges.remembered(OTHER) == []
    assert world.challenges.realm(OTHER) is None


def test_docker_hub_is_known_from_the_start(world: World) -> None:
    world.upstream.vanish()
    [challenge] = of(world, HUB)
    assert challenge.parameters == {"realm": "https://auth.docker.io/token", "service": "registry.docker.io"}
    realm = world.challenges.realm(HUB)
    assert realm == Realm(Registry.parse("auth.docker.io"), "/token")
    assert len(world.upstream.asked) == 1


@pytest.mark.parametrize("status", [200, 204, 301, 302, 307, 308])
def test_open_to_all(world: World, status: int) -> None:
    """registry.k8s.io sends who asks for /v2/ elsewhere."""
    world.upstream.on("GET", "^/v2/$", asks(status=status, location="https://elsewhere.example/v2/"))
    assert of(world) == []


@pytest.mark.parametrize(("status", "kind"), [(403, UpstreamRefused), (404, UpstreamRefused), (500, UpstreamFailing)])
def test_no_registry_at_all(world: World, status: int, kind: type[RegistryError]) -> None:
    world.upstream.on("GET", "^/v2/$", says(status))
    with pytest.raises(kind):
        of(world)
    assert world.records.get("challenge", str(OTHER)) is None


@pytest.mark.parametrize("media_type", ["text/html", "text/html; charset=utf-8", "Text/HTML"])
def test_a_web_page_is_no_registry(world: World, media_type: str) -> None:
    world.upstream.on("GET", "^/v2/$", instead(b"<h1>Sign in</h1>", content_type=media_type))
    with pytest.raises(UpstreamBroken, match="no registry"):
        of(world)
    assert world.records.get("challenge", str(OTHER)) is None


def test_damaged_records_are_asked_for_again(world: World) -> None:
    world.upstream.on("GET", "^/v2/$", asks(BEARER))
    for record in ({}, {"fields": "x", "checked": 1}, {"fields": [], "checked": "now"}):
        world.records.put(record, "challenge", str(OTHER))
        assert len(of(world)) == 1


def test_a_disk_that_takes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    world.upstream.on("GET", "^/v2/$", asks(BEARER))
    assert len(of(world)) == 1
    assert len(world.learned[OTHER]) == 1


def test_met_once(world: World) -> None:
    for _ in range(2):
        world.run(world.challenges.meet(OTHER))
        world.run(world.challenges.meet(HUB))
    assert [asked.registry for asked in world.upstream.asked] == [OTHER]


def test_met_when_it_is_there(world: World) -> None:
    world.upstream.vanish()
    world.run(world.challenges.meet(OTHER))  # no error: what is asked for next will tell
    world.upstream.behave()
    world.run(world.challenges.meet(OTHER))
    assert len(world.upstream.asked) == 2


def test_what_another_process_found_out_is_learned(make_world: Callable[..., World]) -> None:
    one = make_world(shared=True)
    other = make_world(shared=True, upstream=one.upstream)
    one.upstream.on("GET", "^/v2/$", asks(BEARER))
    one.run(one.challenges.meet(OTHER))
    other.run(other.challenges.meet(OTHER))
    assert other.learned[OTHER] == one.learned[OTHER] != []
    assert len(one.upstream.asked) == 1


def test_who_leaves_does_not_end_the_question(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "^/v2/$", gate.then(asks(BEARER)))
    leaving = Deferred.fromCoroutine(world.challenges.of(OTHER))
    leaving.addErrback(lambda _: None)
    world.reactor.settle()
    leaving.cancel()
    gate.open()
    assert len(world.challenges.remembered(OTHER)) == 1


# what our clients are told


def told(world: World, registry: Registry, *fields: str, secure: bool = True) -> list[str]:
    answer = world.challenges.tell(registry, fields, secure=secure)
    assert {name for name, _ in answer} <= {"WWW-Authenticate"}
    return [value for _, value in answer]


@pytest.mark.parametrize(
    ("registry", "secure", "realm"),
    [
        (OTHER, True, "https://other.example:5000" + TOKEN_PATH),
        (OTHER, False, "http://other.example:5000" + TOKEN_PATH),
        (HUB, True, "https://registry-1.docker.io" + TOKEN_PATH),
        (Registry.parse("http://plain.example"), False, "http://plain.example" + TOKEN_PATH),
        (Registry.parse("[::1]:5000"), True, "https://[::1]:5000" + TOKEN_PATH),
        (Registry.parse("[::1]"), True, "https://[::1]" + TOKEN_PATH),
        (Registry.parse("10.0.0.1:80"), False, "http://10.0.0.1" + TOKEN_PATH),
    ],
)
def test_a_realm_that_would_lead_past_us(world: World, registry: Registry, secure: bool, realm: str) -> None:
    [field] = told(world, registry, BEARER, secure=secure)
    assert field == f'Bearer realm="{realm}",service="other",scope="repository:a:pull,push"'


@pytest.mark.parametrize(
    "field",
    [
        'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull"',
        'Bearer realm="https://other.example:5000/token"',
        'Bearer realm="https://OTHER.example:5000/v2/token?x=1"',
        'Basic realm="anything, with commas"',
        'Basic realm="a \\"quoted\\" one"',
        "Negotiate dG9rZW4=",
    ],
)
def test_others_are_left_alone(world: World, field: str) -> None:
    assert told(world, OTHER, field) == [field]


@pytest.mark.parametrize(
    "realm", ["", "https://", "ftp://x.example/token", "https://user:pw@other.example:5000/token", "nonsense",
              "https://other.example:99999/token", "https://other.example:5001/token", "//other.example:5000/token"]
)  # fmt: skip
def test_a_realm_that_cannot_be_asked_is_ours(world: World, realm: str) -> None:
    [field] = told(world, OTHER, f'Bearer realm="{realm}"')
    assert TOKEN_PATH in field


def test_several_at_once(world: World) -> None:
    fields = told(world, OTHER, f'{BEARER}, Basic realm="x"', "Digest")
    assert [field.partition(" ")[0] for field in fields] == ["Bearer", "Basic", "Digest"]


@pytest.mark.parametrize(
    ("url", "realm"),
    [
        ("https://auth.docker.io/token", Realm(Registry.parse("auth.docker.io"), "/token")),
        ("HTTPS://auth.docker.io/token?service=x", Realm(Registry.parse("auth.docker.io"), "/token")),
        ("http://a.example:5000", Realm(Registry.parse("http://a.example:5000"), "/")),
        ("https://[::1]:5000/x/y", Realm(Registry.parse("[::1]:5000"), "/x/y")),
        ("auth.docker.io/token", None),
        ("https://a b/token", None),
        ("https://0x7f000001/token", None),
        ("", None),
    ],
)
def test_realms(url: str, realm: Realm | None) -> None:
    assert Realm.parse(url) == realm


def test_a_realm_is_known_from_the_challenge(world: World) -> None:
    world.upstream.on("GET", "^/v2/$", lambda asked, data: refusal(401, www_authenticate=BEARER))
    assert world.challenges.realm(OTHER) is None
    of(world)
    assert world.challenges.realm(OTHER) == Realm(Registry.parse("auth.other.example"), "/token")
