"""Tests for the authorizer with a token server on loopback. The dialer maps several host names to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import TestCase

from dockerproxy.errors import (
    DestinationForbidden,
    IntermediaryRefused,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamUnreachable,
)
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.agent import Agent, ClientContext, UpstreamTimeouts
from dockerproxy.upstream.authorizer import Authorizer
from dockerproxy.upstream.credentials import Anonymous, ClientCredential
from tests.support.resolvers import StaticResolver

NOW = 1_700_000_000.0
REGISTRY = Registry.parse("http://registry.example")
LOGIN, REALM_LOGIN = BasicCredentials("me", "secret"), BasicCredentials("me", "realm-secret")
SCOPE = "repository:library/ubuntu:pull"
ANONYMOUS = Anonymous()


def bearer(realm: str = "http://registry.example/token", **more: str) -> list[Challenge]:
    return [Challenge("bearer", {"realm": realm, "service": "the registry", **more})]


class FakeTokenServer(Factory):
    """Returns the tokens token-1, token-2, … Responses wait in `pending_responses` if that is a list."""

    noisy = False

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], list[str]]] = []  # host, query, Authorization fields
        self.forms: list[list[tuple[str, str]]] = []
        self.respond: Callable[[int], tuple[int, Any]] = lambda number: (200, {"token": f"token-{number}"})
        self.fields = ""
        self.pending_responses: list[Callable[[], None]] | None = None
        self.connections: set[Any] = set()

    def buildProtocol(self, address: Any) -> Protocol:
        return _FakeTokenServerProtocol(self)


class _FakeTokenServerProtocol(Protocol):
    def __init__(self, token_server: FakeTokenServer) -> None:
        self.token_server = token_server

    def connectionMade(self) -> None:
        self.token_server.connections.add(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.token_server.connections.discard(self)

    def dataReceived(self, data: bytes) -> None:
        request_head, _, form = data.decode().partition("\r\n\r\n")
        first, *lines = request_head.split("\r\n")
        if first.startswith("POST "):
            self.token_server.forms.append(parse_qsl(form))
        fields = [tuple(line.split(": ", 1)) for line in lines]
        query = parse_qsl(first.split(" ")[1].partition("?")[2])
        self.token_server.requests.append(
            (dict(fields)["Host"], query, [value for name, value in fields if name.lower() == "authorization"])  # type: ignore[arg-type]
        )
        status, content = self.token_server.respond(len(self.token_server.requests))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{self.token_server.fields}\r\n".encode()

        def send() -> None:
            self.transport.write(head + body)  # type: ignore[union-attr]

        if self.token_server.pending_responses is None:
            send()
        else:
            self.token_server.pending_responses.append(send)


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        await deferLater(reactor, 0)


class AuthorizerTests(TestCase):
    timeout = 10

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.token_server = FakeTokenServer()
        self.port = reactor.listenTCP(0, self.token_server, interface="127.0.0.1")
        place = ("127.0.0.1", self.port.getHost().port)
        names = ("registry.example", "auth.example", "evil.test")
        dialer = Dialer(reactor, StaticResolver(), overrides={Host(name, 80): place for name in names})
        self.agent = Agent(self.clock, dialer, ClientContext(), UpstreamTimeouts())
        self.authorizer = self.make_authorizer({REGISTRY.host: LOGIN})

    async def tearDown(self) -> None:
        await self.agent.close()
        await self.port.stopListening()
        await wait_until(lambda: not self.token_server.connections)

    def make_authorizer(self, logins: dict[Host, BasicCredentials], address_check: Any = None) -> Authorizer:
        return Authorizer(self.agent, self.clock.seconds, address_check, logins)

    async def authorize(
        self, credential: Any = ANONYMOUS, scope: str | None = SCOPE, challenges: Any = None
    ) -> str | None:
        challenges = bearer() if challenges is None else challenges
        authorization = await self.authorizer.get_authorization(REGISTRY, challenges, scope, credential)
        return None if authorization is None else authorization.value

    async def test_anonymous_token_is_fetched_without_a_login(self) -> None:
        self.assertEqual(await self.authorize(), "Bearer token-1")
        self.assertEqual(
            self.token_server.requests, [("registry.example", [("service", "the registry"), ("scope", SCOPE)], [])]
        )

    async def test_access_token_field_is_accepted(self) -> None:
        self.token_server.respond = lambda number: (200, {"access_token": "other"})
        self.assertEqual(await self.authorize(), "Bearer other")

    async def test_scopes_of_the_challenge_are_requested(self) -> None:
        mount = "repository:library/ubuntu:pull,push repository:base:pull"
        await self.authorize(challenges=bearer(scope=mount))
        await self.authorize(
            scope=None, challenges=bearer("http://registry.example/token?a=b", scope="registry:catalog:*")
        )
        self.assertEqual(
            [query for _, query, _ in self.token_server.requests],
            [
                [("service", "the registry"), ("scope", SCOPE), *(("scope", one) for one in mount.split())],
                [("a", "b"), ("service", "the registry"), ("scope", "registry:catalog:*")],
            ],
        )

    async def test_tokens_are_cached_by_scope_and_login(self) -> None:
        first = [
            await self.authorize(),
            await self.authorize(LOGIN),
            await self.authorize(scope="repository:other:pull"),
        ]
        self.assertEqual(first, ["Bearer token-1", "Bearer token-2", "Bearer token-3"])
        again = [
            await self.authorize(),
            await self.authorize(LOGIN),
            await self.authorize(scope="repository:other:pull"),
        ]
        self.assertEqual(again, first)

    async def test_tokens_are_renewed_before_expiry(self) -> None:
        for lifetime, margin in ((None, 10), (300, 30), (50, 10), (6, 3)):
            self.token_server.respond = lambda number, lifetime=lifetime: (
                200, {"token": f"token-{number}", **({} if lifetime is None else {"expires_in": lifetime})}
            )  # fmt: skip
            scope = f"repository:lifetime{lifetime}:pull"
            first = await self.authorize(scope=scope)
            self.clock.advance((lifetime or 60) - margin - 0.1)
            self.assertEqual(await self.authorize(scope=scope), first)
            self.clock.advance(0.2)
            self.assertNotEqual(await self.authorize(scope=scope), first)

    async def test_concurrent_requests_share_one_fetch(self) -> None:
        self.token_server.pending_responses = []
        pending = [Deferred.fromCoroutine(self.authorize()) for _ in range(5)]
        await wait_until(lambda: self.token_server.pending_responses)
        pending[0].cancel()
        await self.assertFailure(pending[0], CancelledError)
        self.token_server.pending_responses[0]()
        self.assertEqual([await one for one in pending[1:]], ["Bearer token-1"] * 4)
        self.assertEqual(len(self.token_server.requests), 1)

    async def test_cancelled_caller_does_not_cancel_the_fetch(self) -> None:
        self.token_server.pending_responses = []
        pending = Deferred.fromCoroutine(self.authorize())
        await wait_until(lambda: self.token_server.pending_responses)
        pending.cancel()
        await self.assertFailure(pending, CancelledError)
        second = Deferred.fromCoroutine(self.authorize())
        self.token_server.pending_responses[0]()
        self.assertEqual(await second, "Bearer token-1")
        self.assertEqual(len(self.token_server.requests), 1)

    async def test_failures_are_not_cached(self) -> None:
        for status, error_type in ((401, Unauthorized), (403, Unauthorized), (500, UpstreamBroken),
                                   (404, UpstreamBroken), (302, UpstreamBroken)):  # fmt: skip
            self.token_server.respond = lambda number, status=status: (status, {"token": "no"})
            error = await self.assertFailure(Deferred.fromCoroutine(self.authorize(LOGIN)), error_type)
            self.assertIn("registry.example", error.message)
            self.assertNotIn("secret", error.message)
        self.token_server.respond = lambda number: (200, {"token": "yes"})
        self.assertEqual(await self.authorize(LOGIN), "Bearer yes")

    async def test_rate_limit_error_has_retry_after(self) -> None:
        self.token_server.respond = lambda number: (429, b"")
        self.token_server.fields = "Retry-After: 17\r\n"
        error = await self.assertFailure(Deferred.fromCoroutine(self.authorize()), TooManyRequests)
        self.assertEqual(error.headers, (("Retry-After", "17"),))

    async def test_responses_without_a_token_are_errors(self) -> None:
        for content in (b"", b"<html>", b"[]", b"{}", b'{"token": 5}', b'{"token": ""}', b'{"token": "a\\r\\nX: y"}',
                        b"[" * 100000, b'{"token": "' + b"x" * 20000 + b'"}', b" " * 70000,
                        b'{"token": "\\ud800"}'):  # fmt: skip
            self.token_server.respond = lambda number, content=content: (200, content)
            await self.assertFailure(Deferred.fromCoroutine(self.authorize()), UpstreamBroken)

    async def test_odd_lifetimes_are_no_errors(self) -> None:
        for number, lifetime in enumerate((10**400, -(10**400), 1e308, "x", None, [], {})):
            self.token_server.respond = lambda _, lifetime=lifetime: (200, {"token": "t", "expires_in": lifetime})
            self.assertEqual(await self.authorize(scope=f"repository:a{number}:pull"), "Bearer t")

    async def test_login_goes_to_the_realm_on_the_registrys_host(self) -> None:
        await self.authorize(LOGIN)
        await self.authorize(LOGIN, challenges=bearer("http://auth.example/token"))
        await self.authorize(LOGIN, challenges=bearer("http://evil.test/token"))
        sent = [(host, fields) for host, _, fields in self.token_server.requests]
        expected = [("registry.example", [LOGIN.authorization]), ("auth.example", []), ("evil.test", [])]
        self.assertEqual(sent, expected)

    async def test_login_of_the_realms_host_is_used_for_its_registry(self) -> None:
        registry = Registry.parse("http://registry.test")
        logins = {Host("evil.test", 80): REALM_LOGIN, Host("auth.registry.test", 80): LOGIN}
        self.authorizer = self.make_authorizer(logins)
        self.assertIs(self.authorizer.effective_login(registry), None)
        self.authorizer.add_challenges(registry, bearer("http://auth.registry.test/token"))
        self.assertEqual(self.authorizer.effective_login(registry), LOGIN)
        self.authorizer.add_challenges(registry, bearer("http://evil.test/token"))
        self.assertIs(self.authorizer.effective_login(registry), None)

    async def test_docker_hub_realm_is_built_in(self) -> None:
        self.authorizer = self.make_authorizer({Host("auth.docker.io", 443): LOGIN})
        self.assertEqual(self.authorizer.effective_login(Registry.parse("registry-1.docker.io")), LOGIN)
        self.assertIs(self.authorizer.effective_login(Registry.parse("quay.io")), None)

    async def test_a_token_of_our_login_is_for_our_scope_only(self) -> None:
        """The registry chooses the challenge, and gets the token."""
        await self.authorize(LOGIN, challenges=bearer(scope="repository:secret:pull,push registry:catalog:*"))
        await self.authorize(LOGIN, challenges=bearer("http://registry.example/token?tenant=a"))
        self.assertEqual(
            [query for _, query, _ in self.token_server.requests],
            [
                [("service", "the registry"), ("scope", SCOPE)],
                [("tenant", "a"), ("service", "the registry"), ("scope", SCOPE)],
            ],
        )
        for query in ("scope=repository:secret:pull", "a&%73cope=x", "%zz", "x&scope", "a=" + "b" * 9000):
            challenges = bearer(f"http://registry.example/token?{query}")
            work = Deferred.fromCoroutine(self.authorize(LOGIN, challenges=challenges))
            await self.assertFailure(work, UpstreamBroken)
        self.assertEqual(len(self.token_server.requests), 2)

    async def test_anonymous_token_may_come_without_tls(self) -> None:
        """Nothing secret is sent, and clients that ask by themselves take it too."""
        work = self.authorizer.get_authorization(Registry.parse("registry.example"), bearer(), SCOPE, ANONYMOUS)
        authorization = await work
        assert authorization is not None
        self.assertEqual(authorization.value, "Bearer token-1")

    async def test_realm_without_tls_is_refused(self) -> None:
        """At the usual port, its host is asked with TLS."""
        registry = Registry.parse("registry.example")
        usual = Deferred.fromCoroutine(self.authorizer.get_authorization(registry, bearer(), SCOPE, LOGIN))
        await self.assertFailure(usual, UpstreamUnreachable)
        challenges = bearer("http://registry.example:81/token")
        self.authorizer = self.make_authorizer({Host("registry.example", 81): LOGIN})
        work = self.authorizer.get_authorization(registry, challenges, SCOPE, LOGIN)
        error = await self.assertFailure(Deferred.fromCoroutine(work), UpstreamBroken)
        self.assertIn("plain HTTP", error.message)
        self.assertEqual(self.token_server.requests, [])

    async def test_foreign_realm_address_is_checked(self) -> None:
        def address_check(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        self.authorizer = self.make_authorizer({}, address_check)
        port = self.port.getHost().port
        work = Deferred.fromCoroutine(self.authorize(challenges=bearer(f"http://127.0.0.1:{port}/token")))
        await self.assertFailure(work, DestinationForbidden)
        registry = Registry(Host("127.0.0.1", port), "http")
        challenges = bearer(f"http://127.0.0.1:{port}/token")
        authorization = await self.authorizer.get_authorization(registry, challenges, SCOPE, ANONYMOUS)
        assert authorization is not None
        self.assertEqual(authorization.value, "Bearer token-1")

    async def test_malformed_or_unreachable_realm_is_an_error(self) -> None:
        await self.assertFailure(Deferred.fromCoroutine(self.authorize(challenges=bearer("token"))), UpstreamBroken)
        work = Deferred.fromCoroutine(self.authorize(challenges=bearer("http://no.invalid/token")))
        await self.assertFailure(work, UpstreamUnreachable)

    async def test_basic_challenge_is_answered_with_the_login(self) -> None:
        basic = [Challenge("basic", {"realm": "x"})]
        self.assertEqual(await self.authorize(LOGIN, challenges=basic), LOGIN.authorization)
        self.assertIs(await self.authorize(challenges=basic), None)
        self.assertIs(await self.authorize(LOGIN, challenges=[]), None)
        self.assertEqual(await self.authorize(LOGIN, challenges=basic + bearer()), "Bearer token-1")

    async def test_client_credential_is_sent_unchanged(self) -> None:
        self.assertEqual(await self.authorize(ClientCredential("Bearer mine")), "Bearer mine")
        self.assertEqual(self.token_server.requests, [])

    async def test_rejected_token_is_replaced_unless_it_is_new(self) -> None:
        challenges = bearer()
        first = await self.authorizer.get_authorization(REGISTRY, challenges, SCOPE, ANONYMOUS)
        assert first is not None
        self.assertIs(
            await self.authorizer.get_authorization(
                REGISTRY, challenges, SCOPE, ANONYMOUS, rejected_authorization=first
            ),
            first,
        )
        cached = await self.authorizer.get_authorization(REGISTRY, challenges, SCOPE, ANONYMOUS)
        fresh = await self.authorizer.get_authorization(
            REGISTRY, challenges, SCOPE, ANONYMOUS, rejected_authorization=cached
        )
        assert fresh is not None
        self.assertEqual(fresh.value, "Bearer token-2")
        wider = await self.authorizer.get_authorization(
            REGISTRY, bearer(scope="more"), SCOPE, ANONYMOUS, rejected_authorization=fresh
        )
        assert wider is not None
        self.assertEqual(wider.value, "Bearer token-3")
        self.assertNotIn("token-3", repr(wider))

    async def test_challenges_are_remembered(self) -> None:
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), ())
        self.authorizer.add_challenges(REGISTRY, [Challenge("negotiate"), *bearer(scope=SCOPE)])
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), tuple(bearer()))
        self.authorizer.add_challenges(REGISTRY, [])
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), tuple(bearer()))
        self.authorizer.remove_challenges(REGISTRY)
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), ())
        for number in range(300):
            self.authorizer.add_challenges(Registry(Host("h", number + 1)), bearer())
        self.assertEqual(self.authorizer.challenges_for(Registry(Host("h", 44))), ())
        self.assertEqual(len(self.authorizer.challenges_for(Registry(Host("h", 45)))), 1)

    async def test_an_identity_token_is_exchanged_for_a_token(self) -> None:
        """This is the "OAuth2 Token Authentication" of distribution, as docker does it for Azure's registry."""
        login = IdentityToken("the-identity-token")
        self.authorizer = self.make_authorizer({REGISTRY.host: login})
        self.token_server.respond = lambda number: (200, {"access_token": f"access-{number}"})
        self.assertEqual(await self.authorize(login), "Bearer access-1")
        [(host, query, authorizations)] = self.token_server.requests
        self.assertEqual((host, query, authorizations), ("registry.example", [], []))
        [form] = self.token_server.forms
        self.assertEqual(
            dict(form),
            {
                "grant_type": "refresh_token", "refresh_token": "the-identity-token", "service": "the registry",
                "scope": SCOPE, "client_id": "docker-registry-proxy",
            },
        )  # fmt: skip
        self.assertEqual(await self.authorize(login), "Bearer access-1")
        self.assertIsNone(await self.authorize(login, challenges=[Challenge("basic")]))

    async def test_a_login_is_refused_or_not(self) -> None:
        for challenges, login in ((bearer(), LOGIN), (bearer(), IdentityToken("x")), ([Challenge("basic")], LOGIN)):
            self.authorizer = self.make_authorizer({REGISTRY.host: login})
            self.authorizer.add_challenges(REGISTRY, challenges)
            refusals = [(401, {}), (403, {})]
            if challenges == bearer():
                refusals += [(400, {"error": "invalid_grant"}), (400, {"error": "invalid_client", "x": 1})]
            for answer in refusals:
                self.token_server.respond = lambda number, answer=answer: answer
                reason = await self.authorizer.refusal(REGISTRY, login)
                assert reason is not None
                self.assertIn(str(answer[0]), reason)
                self.assertIn("registry.example", reason)
                self.assertNotIn("secret", reason)
            self.token_server.respond = lambda number: (200, {"token": "t"})
            self.assertIsNone(await self.authorizer.refusal(REGISTRY, login))
            for query in (query for _, query, _ in self.token_server.requests):
                self.assertNotIn("scope", dict(query))  # the question is about the login, not about a repository

    async def test_an_answer_that_is_no_refusal_of_a_login(self) -> None:
        self.authorizer.add_challenges(REGISTRY, bearer())
        for answer in [(500, {}), (404, {}), (429, {}), (400, {}), (400, b"<html>"), (400, {"error": []}), (400, [1])]:
            self.token_server.respond = lambda number, answer=answer: answer
            with self.assertRaises((UpstreamBroken, TooManyRequests, IntermediaryRefused)):
                await self.authorizer.refusal(REGISTRY, LOGIN)
        self.authorizer.add_challenges(REGISTRY, [Challenge("basic")])
        self.token_server.respond = lambda number: (403, b"<html>blocked</html>")
        with self.assertRaises(UpstreamBroken):
            await self.authorizer.refusal(REGISTRY, LOGIN)

    async def test_an_identity_token_for_a_registry_without_a_token_server(self) -> None:
        self.authorizer.add_challenges(REGISTRY, [Challenge("basic")])
        reason = await self.authorizer.refusal(REGISTRY, IdentityToken("x"))
        self.assertEqual(reason, "registry.example:80 has no token server for an identity token")
        self.assertEqual(self.token_server.requests, [])

    async def test_a_login_of_a_redirects_target_is_refused_there(self) -> None:
        """A front such as lscr.io has the login of the registry that it redirects to."""
        front = Registry.parse("http://evil.test")
        self.authorizer.add_redirect(front, REGISTRY, bearer())
        self.assertEqual(self.authorizer.effective_login(front), LOGIN)
        self.token_server.respond = lambda number: (401, {})
        reason = await self.authorizer.refusal(front, LOGIN)
        assert reason is not None
        self.assertIn("registry.example:80 refuses a token", reason)
        [(host, _, authorizations)] = self.token_server.requests
        self.assertEqual((host, authorizations), ("registry.example", [LOGIN.authorization]))
        self.token_server.respond = lambda number: (200, {"token": "t"})
        self.assertIsNone(await self.authorizer.refusal(front, LOGIN))
