"""The token dance with a small token server on loopback, reached under the names that tests give it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import TestCase

from dockerproxy.errors import DestinationForbidden, TooManyRequests, Unauthorized, UpstreamBroken, UpstreamUnreachable
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Anonymous, Configured, Own
from dockerproxy.upstream.tokens import Tokens, remaining_life
from dockerproxy.upstream.transport import Timeouts, TLSClient, Transport

NOW = 1_700_000_000.0
REGISTRY = Registry.parse("http://registry.example")
LOGIN, REALM_LOGIN = Configured("me", "secret"), Configured("me", "realm-secret")
SCOPE = "repository:library/ubuntu:pull"
ANONYMOUS = Anonymous()


def bearer(realm: str = "http://registry.example/token", **more: str) -> list[Challenge]:
    return [Challenge("bearer", {"realm": realm, "service": "the registry", **more})]


class Realm(Factory):
    """Counts its answers into the tokens it gives: token-1, token-2, …; `held` keeps them back."""

    noisy = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], list[str]]] = []  # host, query, Authorization fields
        self.answer: Callable[[int], tuple[int, Any]] = lambda number: (200, {"token": f"token-{number}"})
        self.fields = ""
        self.held: list[Callable[[], None]] | None = None
        self.connections: set[Any] = set()

    def buildProtocol(self, address: Any) -> Protocol:
        return _RealmConnection(self)


class _RealmConnection(Protocol):
    def __init__(self, realm: Realm) -> None:
        self.realm = realm

    def connectionMade(self) -> None:
        self.realm.connections.add(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.realm.connections.discard(self)

    def dataReceived(self, data: bytes) -> None:
        first, *lines = data.decode().removesuffix("\r\n\r\n").split("\r\n")
        fields = [tuple(line.split(": ", 1)) for line in lines]
        query = parse_qsl(first.split(" ")[1].partition("?")[2])
        self.realm.asked.append(
            (dict(fields)["Host"], query, [value for name, value in fields if name.lower() == "authorization"])  # type: ignore[arg-type]
        )
        status, content = self.realm.answer(len(self.realm.asked))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{self.realm.fields}\r\n".encode()

        def send() -> None:
            self.transport.write(head + body)  # type: ignore[union-attr]

        if self.realm.held is None:
            send()
        else:
            self.realm.held.append(send)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await deferLater(reactor, 0)


class TokensTests(TestCase):
    timeout = 10

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.realm = Realm()
        self.port = reactor.listenTCP(0, self.realm, interface="127.0.0.1")
        place = ("127.0.0.1", self.port.getHost().port)
        names = ("registry.example", "auth.example", "evil.test")
        dialer = Dialer(reactor, overrides={Host(name, 80): place for name in names})
        self.transport = Transport(self.clock, dialer, TLSClient(), Timeouts())
        self.tokens = self.make({REGISTRY.host: LOGIN})

    async def tearDown(self) -> None:
        await self.transport.close()
        await self.port.stopListening()
        await until(lambda: not self.realm.connections)

    def make(self, logins: dict[Host, Configured], permit: Any = None) -> Tokens:
        return Tokens(self.transport, self.clock.seconds, permit, logins)

    async def ask(self, credential: Any = ANONYMOUS, scope: str | None = SCOPE, challenges: Any = None) -> str | None:
        return await self.tokens.authorize(REGISTRY, bearer() if challenges is None else challenges, scope, credential)

    async def test_anonymous(self) -> None:
        self.assertEqual(await self.ask(), "Bearer token-1")
        self.assertEqual(self.realm.asked, [("registry.example", [("service", "the registry"), ("scope", SCOPE)], [])])

    async def test_access_token_is_another_name_for_it(self) -> None:
        self.realm.answer = lambda number: (200, {"access_token": "other"})
        self.assertEqual(await self.ask(), "Bearer other")

    async def test_scopes_of_the_challenge_are_asked_for_too(self) -> None:
        mount = "repository:library/ubuntu:pull,push repository:base:pull"
        await self.ask(challenges=bearer(scope=mount))
        await self.ask(scope=None, challenges=bearer("http://registry.example/token?a=b", scope="registry:catalog:*"))
        self.assertEqual(
            [query for _, query, _ in self.realm.asked],
            [
                [("service", "the registry"), ("scope", SCOPE), *(("scope", one) for one in mount.split())],
                [("a", "b"), ("service", "the registry"), ("scope", "registry:catalog:*")],
            ],
        )

    async def test_kept_by_what_was_asked_and_by_whom(self) -> None:
        first = [await self.ask(), await self.ask(LOGIN), await self.ask(scope="repository:other:pull")]
        self.assertEqual(first, ["Bearer token-1", "Bearer token-2", "Bearer token-3"])
        again = [await self.ask(), await self.ask(LOGIN), await self.ask(scope="repository:other:pull")]
        self.assertEqual(again, first)

    async def test_renewed_before_the_end(self) -> None:
        for life, margin in ((None, 10), (300, 30), (50, 10), (6, 3)):
            self.realm.answer = lambda number, life=life: (
                200, {"token": f"token-{number}", **({} if life is None else {"expires_in": life})}
            )  # fmt: skip
            scope = f"repository:life{life}:pull"
            first = await self.ask(scope=scope)
            self.clock.advance((life or 60) - margin - 0.1)
            self.assertEqual(await self.ask(scope=scope), first)
            self.clock.advance(0.2)
            self.assertNotEqual(await self.ask(scope=scope), first)

    async def test_one_request_however_many_ask(self) -> None:
        self.realm.held = []
        waiting = [Deferred.fromCoroutine(self.ask()) for _ in range(5)]
        await until(lambda: self.realm.held)
        waiting[0].cancel()
        await self.assertFailure(waiting[0], CancelledError)
        self.realm.held[0]()
        self.assertEqual([await one for one in waiting[1:]], ["Bearer token-1"] * 4)
        self.assertEqual(len(self.realm.asked), 1)

    async def test_a_cancelled_caller_leaves_the_token_to_the_next(self) -> None:
        self.realm.held = []
        waiting = Deferred.fromCoroutine(self.ask())
        await until(lambda: self.realm.held)
        waiting.cancel()
        await self.assertFailure(waiting, CancelledError)
        second = Deferred.fromCoroutine(self.ask())
        self.realm.held[0]()
        self.assertEqual(await second, "Bearer token-1")
        self.assertEqual(len(self.realm.asked), 1)

    async def test_failures_are_not_kept(self) -> None:
        for status, kind in ((401, Unauthorized), (403, Unauthorized), (500, UpstreamBroken), (404, UpstreamBroken),
                             (302, UpstreamBroken)):  # fmt: skip
            self.realm.answer = lambda number, status=status: (status, {"token": "no"})
            error = await self.assertFailure(Deferred.fromCoroutine(self.ask(LOGIN)), kind)
            self.assertIn("registry.example", error.message)
            self.assertNotIn("secret", error.message)
        self.realm.answer = lambda number: (200, {"token": "yes"})
        self.assertEqual(await self.ask(LOGIN), "Bearer yes")

    async def test_rate_limit(self) -> None:
        self.realm.answer = lambda number: (429, b"")
        self.realm.fields = "Retry-After: 17\r\n"
        error = await self.assertFailure(Deferred.fromCoroutine(self.ask()), TooManyRequests)
        self.assertEqual(error.headers, (("Retry-After", "17"),))

    async def test_answers_without_a_token(self) -> None:
        for content in (b"", b"<html>", b"[]", b"{}", b'{"token": 5}', b'{"token": ""}', b'{"token": "a\\r\\nX: y"}',
                        b"[" * 100000, b'{"token": "' + b"x" * 20000 + b'"}', b" " * 300000):  # fmt: skip
            self.realm.answer = lambda number, content=content: (200, content)
            await self.assertFailure(Deferred.fromCoroutine(self.ask()), UpstreamBroken)

    async def test_login_goes_to_the_realm_on_the_registrys_host(self) -> None:
        await self.ask(LOGIN)
        await self.ask(LOGIN, challenges=bearer("http://auth.example/token"))
        await self.ask(LOGIN, challenges=bearer("http://evil.test/token"))
        shown = [(host, fields) for host, _, fields in self.realm.asked]
        expected = [("registry.example", [LOGIN.authorization]), ("auth.example", []), ("evil.test", [])]
        self.assertEqual(shown, expected)

    async def test_login_of_the_realms_host(self) -> None:
        registry = Registry.parse("http://registry.example.test")
        self.tokens = self.make({Host("evil.test", 80): REALM_LOGIN, Host("example.test", 80): LOGIN})
        self.assertIs(self.tokens.effective_login(registry), None)
        self.tokens.remember(registry, bearer("http://example.test/token"))
        self.assertEqual(self.tokens.effective_login(registry), LOGIN)
        self.tokens.remember(registry, bearer("http://evil.test/token"))
        self.assertIs(self.tokens.effective_login(registry), None)

    async def test_hub_is_known_from_the_start(self) -> None:
        self.tokens = self.make({Host("auth.docker.io", 443): LOGIN})
        self.assertEqual(self.tokens.effective_login(Registry.parse("registry-1.docker.io")), LOGIN)
        self.assertIs(self.tokens.effective_login(Registry.parse("quay.io")), None)

    async def test_realm_without_tls(self) -> None:
        work = self.tokens.authorize(Registry.parse("registry.example"), bearer(), SCOPE, LOGIN)
        error = await self.assertFailure(Deferred.fromCoroutine(work), UpstreamBroken)
        self.assertIn("without TLS", error.message)
        self.assertEqual(self.realm.asked, [])

    async def test_realm_elsewhere_is_asked_about(self) -> None:
        def permit(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        self.tokens = self.make({}, permit)
        port = self.port.getHost().port
        work = Deferred.fromCoroutine(self.ask(challenges=bearer(f"http://127.0.0.1:{port}/token")))
        await self.assertFailure(work, DestinationForbidden)
        registry = Registry(Host("127.0.0.1", port), "http")
        own = bearer(f"http://127.0.0.1:{port}/token")
        self.assertEqual(await self.tokens.authorize(registry, own, SCOPE, ANONYMOUS), "Bearer token-1")

    async def test_realm_that_is_no_url_or_out_of_reach(self) -> None:
        await self.assertFailure(Deferred.fromCoroutine(self.ask(challenges=bearer("token"))), UpstreamBroken)
        work = Deferred.fromCoroutine(self.ask(challenges=bearer("http://no.invalid/token")))
        await self.assertFailure(work, UpstreamUnreachable)

    async def test_basic(self) -> None:
        basic = [Challenge("basic", {"realm": "x"})]
        self.assertEqual(await self.ask(LOGIN, challenges=basic), LOGIN.authorization)
        self.assertIs(await self.ask(challenges=basic), None)
        self.assertIs(await self.ask(LOGIN, challenges=[]), None)
        self.assertEqual(await self.ask(LOGIN, challenges=basic + bearer()), "Bearer token-1")

    async def test_own_is_sent_as_it_is(self) -> None:
        self.assertEqual(await self.ask(Own("Bearer mine")), "Bearer mine")
        self.assertEqual(self.realm.asked, [])

    async def test_refused_tokens(self) -> None:
        challenges = bearer()
        first = await self.tokens.grant(REGISTRY, challenges, SCOPE, ANONYMOUS)
        assert first is not None
        self.assertIs(await self.tokens.grant(REGISTRY, challenges, SCOPE, ANONYMOUS, refused=first), first)
        kept = await self.tokens.grant(REGISTRY, challenges, SCOPE, ANONYMOUS)
        fresh = await self.tokens.grant(REGISTRY, challenges, SCOPE, ANONYMOUS, refused=kept)
        assert fresh is not None
        self.assertEqual(fresh.authorization, "Bearer token-2")
        wider = await self.tokens.grant(REGISTRY, bearer(scope="more"), SCOPE, ANONYMOUS, refused=fresh)
        assert wider is not None
        self.assertEqual(wider.authorization, "Bearer token-3")
        self.assertNotIn("token-3", repr(wider))

    async def test_memory_of_challenges(self) -> None:
        self.assertEqual(self.tokens.challenges_for(REGISTRY), ())
        self.tokens.remember(REGISTRY, [Challenge("negotiate"), *bearer(scope=SCOPE)])
        self.assertEqual(self.tokens.challenges_for(REGISTRY), tuple(bearer()))
        self.tokens.remember(REGISTRY, [])
        self.assertEqual(self.tokens.challenges_for(REGISTRY), tuple(bearer()))
        self.tokens.forget(REGISTRY)
        self.assertEqual(self.tokens.challenges_for(REGISTRY), ())
        for number in range(300):
            self.tokens.remember(Registry(Host("h", number + 1)), bearer())
        self.assertEqual(self.tokens.challenges_for(Registry(Host("h", 44))), ())
        self.assertEqual(len(self.tokens.challenges_for(Registry(Host("h", 45)))), 1)


@pytest.mark.parametrize(
    ("answer", "life"),
    [
        ({}, 60),
        ({"expires_in": 300}, 300),
        ({"expires_in": 0}, 60),
        ({"expires_in": -5}, 60),
        ({"expires_in": "300"}, 60),
        ({"expires_in": True}, 60),
        ({"expires_in": float("inf")}, 60),
        ({"expires_in": float("nan")}, 60),
        ({"expires_in": 10**9}, 86400),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20Z"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20.123456789Z"}, 240.123456),
        ({"expires_in": 300, "issued_at": "2023-11-14T23:12:20+01:00"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:20:00Z"}, 300),  # their clock is ahead
        ({"expires_in": 300, "issued_at": "2023-11-14T20:00:00Z"}, 300),  # or behind
        ({"expires_in": 300, "issued_at": "yesterday"}, 300),
        ({"expires_in": 300, "issued_at": 17}, 300),
    ],
)
def test_remaining_life(answer: dict[str, Any], life: float) -> None:
    assert remaining_life(answer, NOW) == pytest.approx(life, abs=1e-5)


@given(
    st.dictionaries(
        st.sampled_from(["expires_in", "issued_at"]), st.integers() | st.floats() | st.text() | st.datetimes().map(str)
    )
)
def test_life_is_never_longer_than_said(answer: dict[str, Any]) -> None:
    assert 0 < remaining_life(answer, NOW) <= 86400
