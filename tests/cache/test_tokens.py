from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import pytest

from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import LIFETIME
from dockerproxy.cache.tokens import TokenRequest
from dockerproxy.errors import (
    BadRequest,
    DestinationForbidden,
    RegistryError,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.challenge import basic
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.credentials import Own
from tests.cache.stand_ins.upstream import Answer, fails, says
from tests.cache.stand_ins.world import EPOCH, HUB, World

REALM = Realm(Registry.parse("auth.docker.io"), "/token")
QUERY = "service=registry.docker.io&scope=repository:library/app:pull"
ALICE = basic("alice", "pw:with:colons")
TOKEN = b'{"token":"upstreams","expires_in":300}'
DAY = 86400

TROUBLES = [
    fails(UpstreamUnreachable("gone")), fails(UpstreamTimeout("silent")), says(500), says(503), says(429),
    lambda asked, data: Answer(200, b"<h1>Sign in</h1>"),
    lambda asked, data: Answer(200, b"{}"),
]  # fmt: skip


def gives(content: bytes = TOKEN) -> Any:
    return lambda asked, data: Answer(200, content)


def ask(world: World, authorization: str | None = None, form: bytes | None = None, realm: Realm = REALM) -> bytes:
    return world.run(world.desk.token(HUB, realm, TokenRequest(QUERY, authorization, form)))  # type: ignore[no-any-return]


def ours(world: World, content: bytes) -> str | None:
    """Return who an answer of ours vouches for, None for one of upstream's."""
    token = json.loads(content)["token"]
    return world.identities.read(HUB, f"Bearer {token}", world.now())


def form(**fields: str) -> bytes:
    return urlencode(fields).encode()


def on(world: World, behaviour: Any) -> None:
    world.upstream.behave()
    for method in ("GET", "POST"):
        world.upstream.on(method, "^/token", behaviour)


@pytest.mark.parametrize("body", [None, b"", form(grant_type="password", service="x"), b"\xff\xfe=&&&;"])
def test_who_shows_nothing_gets_a_token_of_ours(world: World, body: bytes | None) -> None:
    content = ask(world, None, body)
    assert ours(world, content) == "public"
    assert world.upstream.asked == []
    answer = json.loads(content)
    assert answer["token"] == answer["access_token"]
    assert answer["expires_in"] == LIFETIME
    assert datetime.fromisoformat(answer["issued_at"]).timestamp() == EPOCH


def test_a_login_is_passed_on(world: World) -> None:
    on(world, gives())
    assert ask(world, ALICE) == TOKEN
    [asked] = world.upstream.asked
    assert (asked.method, asked.registry, asked.path) == ("GET", REALM.server, f"/token?{QUERY}")
    assert asked.headers.all("authorization") == [ALICE]
    assert world.identities.of(HUB, Own("Bearer upstreams")) == world.identities.of_authorization(ALICE)


@pytest.mark.parametrize("name", ["token", "access_token"])
def test_under_either_name(world: World, name: str) -> None:
    on(world, gives(json.dumps({name: "t"}).encode()))
    ask(world, ALICE)
    assert world.identities.of(HUB, Own("Bearer t")) == world.identities.of_authorization(ALICE)


def test_a_form(world: World) -> None:
    on(world, gives())
    body = form(grant_type="password", username="alice", password="pw:with:colons", service="x")
    assert ask(world, None, body) == TOKEN
    [asked] = world.upstream.asked
    assert (asked.method, asked.headers.get("content-type")) == ("POST", "application/x-www-form-urlencoded")
    assert world.exchange.bodies == [body]
    assert asked.headers.get("authorization") is None
    # The same client as the one who shows the same login by GET.
    assert world.identities.of(HUB, Own("Bearer upstreams")) == world.identities.of_authorization(ALICE)


def test_a_refresh_token(world: World) -> None:
    on(world, gives())
    assert ask(world, None, form(grant_type="refresh_token", refresh_token="r")) == TOKEN
    assert len(world.upstream.asked) == 1


@pytest.mark.parametrize("body", [b"&".join(b"x=1" for _ in range(60)), form(username="a:b", password="c")])
def test_a_form_that_is_none(world: World, body: bytes) -> None:
    with pytest.raises(BadRequest):
        ask(world, None, body)
    assert world.upstream.asked == []


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("body", [None, form(username="alice", password="pw:with:colons")])
@pytest.mark.parametrize("restart", [False, True])
def test_a_known_client_is_vouched_for(
    make_world: Callable[..., World], trouble: Any, body: bytes | None, restart: bool
) -> None:
    world = make_world()
    on(world, gives())
    ask(world, ALICE)
    on(world, trouble)
    world.reactor.advance(DAY - 1)
    if restart:
        world = make_world(upstream=world.upstream)
    shown = ALICE if body is None else None
    assert ours(world, ask(world, shown, body)) == world.identities.of_authorization(ALICE)
    world.reactor.advance(1)
    with pytest.raises(RegistryError):
        ask(world, shown, body)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_stranger_is_not(world: World, trouble: Any) -> None:
    on(world, gives())
    ask(world, ALICE)
    on(world, trouble)
    for who in (basic("alice", "guess"), "Basic", "Bearer x", ""):
        with pytest.raises(RegistryError) as caught:
            ask(world, who)
        assert caught.value.status in (429, 502, 504)
    assert ours(world, ask(world)) == "public"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_the_realms_own(world: World, status: int) -> None:
    on(world, says(status))
    with pytest.raises(UpstreamRefused) as caught:
        ask(world, ALICE)
    assert caught.value.status == status and b"UPSTREAM" in caught.value.content


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_refused_is_known_no_longer(world: World, status: int) -> None:
    on(world, gives())
    ask(world, ALICE)
    on(world, says(status))
    with pytest.raises(UpstreamRefused):
        ask(world, ALICE)
    on(world, fails(UpstreamUnreachable("gone")))
    with pytest.raises(UpstreamUnreachable):
        ask(world, ALICE)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"token"', b"{}", b'{"token":1}', b'{"token":""}', b"\xff", b"[" * 200_000],
    ids=range(9),
)
def test_what_is_no_token(world: World, content: bytes) -> None:
    on(world, gives(content))
    with pytest.raises(UpstreamBroken):
        ask(world, ALICE)
    on(world, fails(UpstreamUnreachable("gone")))
    with pytest.raises(UpstreamUnreachable):  # and nobody was proven by it
        ask(world, ALICE)


def test_an_endless_answer(world: World) -> None:
    on(world, gives(b" " * 300_000 + TOKEN))
    with pytest.raises(UpstreamBroken):
        ask(world, ALICE)


def test_a_client_is_written_down_now_and_then(world: World, tmp_path: Any) -> None:
    on(world, gives())
    ask(world, ALICE)
    [path] = (tmp_path / "records" / "client").rglob("*~.json")
    inode = path.stat().st_ino
    assert "alice" not in str(path) and "pw" not in path.read_text()
    world.reactor.advance(299)
    ask(world, ALICE)
    assert path.stat().st_ino == inode
    world.reactor.advance(10)
    ask(world, ALICE)
    assert path.stat().st_ino != inode


def test_a_disk_that_takes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    on(world, gives())
    assert ask(world, ALICE) == TOKEN


def test_where_a_realm_may_be(make_world: Callable[..., World]) -> None:
    """Upstream names it: it must not make us ask this machine. Hosts that the administrator named are his affair."""

    def permit(address: Any) -> None:
        raise DestinationForbidden("127.0.0.1 is not where a registry is")

    world = make_world(permit=permit)

    def behave(asked: Any, data: Any) -> Answer:
        asked_permit = world.exchange.permits[-1]
        if asked_permit is not None:
            asked_permit("127.0.0.1")
        return Answer(200, TOKEN)

    on(world, behave)
    assert ask(world, ALICE) == TOKEN  # auth.docker.io is intercepted
    elsewhere = Realm(Registry.parse("localhost:8080"), "/token")
    with pytest.raises(DestinationForbidden):
        ask(world, ALICE, realm=elsewhere)
    assert world.exchange.permits == [None, permit]


def test_nothing_secret_is_in_a_repr() -> None:
    text = repr(TokenRequest(QUERY, "Basic c2VjcmV0", b"password=secret"))
    assert "secret" not in text and "c2VjcmV0" not in text
