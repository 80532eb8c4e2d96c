"""Tests for the registry client. One server on loopback is the registry, its token server and its blob stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.logger import formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from dockerproxy.errors import (
    CaptivePortalSuspected,
    DestinationForbidden,
    Unauthorized,
    UpstreamBroken,
    UpstreamUnreachable,
)
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.challenge import Challenge, parse_challenges
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry, parse_repository
from dockerproxy.upstream.agent import Agent, ClientContext, Response, UpstreamTimeouts
from dockerproxy.upstream.authorizer import Authorizer
from dockerproxy.upstream.client import UpstreamClient
from dockerproxy.upstream.credentials import Anonymous, ClientCredential
from dockerproxy.upstream.registry_request import RegistryRequest
from tests.support.resolvers import StaticResolver

REGISTRY = Registry.parse("http://registry.example")
NAME = parse_repository("library/ubuntu")
LOGIN = BasicCredentials("me", "secret")
FRONT, PROPER = "registry.example", "proper.example"
ANONYMOUS = Anonymous()
PROPER_BEARER = 'Bearer realm="http://proper.example/token",service="p"'
PROPER_QUERY = "service=p&scope=repository%3Alibrary%2Fubuntu%3Apull"
BEARER = 'Bearer realm="http://registry.example/token",service="s",scope="repository:library/ubuntu:pull"'


@frozen
class ServedRequest:
    method: str
    url: str
    headers: Headers


ResponseTuple = tuple[int, dict[str, str], bytes]


class FakeServers(Factory):
    """The server for all host names. `respond` receives each request except token requests. Bodies are ignored."""

    noisy = False

    def __init__(self) -> None:
        self.requests: list[ServedRequest] = []
        self.tokens = 0
        self.token_requests: list[tuple[str, str | None]] = []  # URL and Authorization
        self.respond: Callable[[ServedRequest], ResponseTuple] = lambda request: (200, {}, b"ok")
        self.connections: set[Any] = set()

    def buildProtocol(self, address: Any) -> Protocol:
        return _FakeServersProtocol(self)

    def urls(self) -> list[str]:
        return [request.url for request in self.requests]

    def authorizations(self) -> list[str | None]:
        return [request.headers.get("authorization") for request in self.requests]


class _FakeServersProtocol(Protocol):
    def __init__(self, servers: FakeServers) -> None:
        self.servers = servers

    def connectionMade(self) -> None:
        self.servers.connections.add(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.servers.connections.discard(self)

    def dataReceived(self, data: bytes) -> None:
        head = data.partition(b"\r\n\r\n")[0].decode()
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = Headers([tuple(line.split(": ", 1)) for line in lines])  # type: ignore[misc]
        request = ServedRequest(method, f"{headers.get('host')}{target}", headers)
        if target.startswith("/token"):
            self.servers.tokens += 1
            self.servers.token_requests.append((request.url, headers.get("authorization")))
            status, fields, body = 200, {}, b'{"token": "t%d", "expires_in": 300}' % self.servers.tokens
        else:
            self.servers.requests.append(request)
            status, fields, body = self.servers.respond(request)
        lines = [
            f"HTTP/1.1 {status} X",
            f"Content-Length: {len(body)}",
            *(f"{name}: {fields[name]}" for name in fields),
        ]
        content = b"" if method == "HEAD" else body
        self.transport.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + content)  # type: ignore[union-attr]


def require_authorization(*accepted: str, challenge: str = BEARER) -> Callable[[ServedRequest], ResponseTuple]:
    """Return a `respond` that accepts only these Authorization values and answers others with `challenge`."""

    def respond(request: ServedRequest) -> ResponseTuple:
        if request.headers.get("authorization") in accepted:
            return 200, {}, b"ok"
        return 401, {"WWW-Authenticate": challenge}, b"{}"

    return respond


def redirect_from(**locations: str) -> Callable[[ServedRequest], ResponseTuple]:
    """Return a `respond` that redirects paths ending in a keyword to the Location that is its value."""

    def respond(request: ServedRequest) -> ResponseTuple:
        location = locations.get(request.url.partition("?")[0].rpartition("/")[2])
        return (200, {}, b"ok") if location is None else (307, {"Location": location}, b"see there")

    return respond


class SmallBodyProducer:
    length = 2

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(b"{}")
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


class UpstreamClientTests(TestCase):
    timeout = 10

    def setUp(self) -> None:
        clock = Clock()
        self.servers = FakeServers()
        self.port = reactor.listenTCP(0, self.servers, interface="127.0.0.1")
        place = ("127.0.0.1", self.port.getHost().port)
        hosts = [
            Host(name, port)
            for name in ("registry.example", "cdn.example", "proper.example")
            for port in (80, 443, 5000)
        ]
        resolver = StaticResolver({"localhost": ["127.0.0.1", "::1"]})
        dialer = Dialer(reactor, resolver, overrides=dict.fromkeys(hosts, place))
        self.agent = Agent(clock, dialer, ClientContext(verify=False), UpstreamTimeouts())
        self.make_authorizer = lambda: Authorizer(self.agent, clock.seconds, None, {REGISTRY.host: LOGIN})
        self.authorizer = self.make_authorizer()
        self.client = UpstreamClient(self.agent, self.authorizer, self.check_address)

    def check_address(self, address: str) -> None:
        raise DestinationForbidden(f"{address} is forbidden")

    async def tearDown(self) -> None:
        await self.agent.close()
        await self.port.stopListening()
        while self.servers.connections:
            await deferLater(reactor, 0)

    async def send_request(self, path: str = "/v2/library/ubuntu/x", method: str = "GET", **options: Any) -> Response:
        options = {"name": NAME, "credential": Anonymous(), **options}
        return await self.client.request(RegistryRequest(method, options.pop("registry", REGISTRY), path, **options))

    async def fetch(self, *arguments: str, **options: Any) -> bytes:
        response = await self.send_request(*arguments, **options)
        self.assertEqual(response.status, 200)
        return await response.read_all(100)

    # authorization

    async def test_no_authorization_is_sent_without_a_challenge(self) -> None:
        self.assertEqual(await self.fetch(credential=LOGIN), b"ok")
        self.assertEqual((self.servers.authorizations(), self.servers.tokens), ([None], 0))

    async def test_token_is_fetched_once_and_reused(self) -> None:
        self.servers.respond = require_authorization("Bearer t1")
        self.assertEqual(await self.fetch(), b"ok")
        self.assertEqual(await self.fetch(), b"ok")
        self.assertEqual(self.servers.authorizations(), [None, "Bearer t1", "Bearer t1"])
        self.assertEqual(self.servers.tokens, 1)

    async def test_rejected_cached_token_is_replaced(self) -> None:
        self.servers.respond = require_authorization("Bearer t1")
        await self.fetch()
        self.servers.respond = require_authorization("Bearer t2")
        self.assertEqual(await self.fetch(), b"ok")
        self.assertEqual(self.servers.authorizations(), [None, "Bearer t1", "Bearer t1", "Bearer t2"])

    async def test_rejected_new_token_is_final(self) -> None:
        self.servers.respond = require_authorization("Bearer never")
        for attempt in (1, 2):
            response = await self.send_request()
            self.assertEqual(response.status, 401)
            self.assertEqual(await response.read_all(9), b"{}")
            self.assertEqual(self.servers.tokens, attempt)

    async def test_challenge_with_another_scope_fetches_a_new_token(self) -> None:
        self.servers.respond = require_authorization("Bearer t1")
        await self.fetch()
        self.servers.respond = require_authorization(
            "Bearer t2", challenge=BEARER.replace("ubuntu:pull", "ubuntu:pull,push")
        )
        self.assertEqual(await self.fetch(), b"ok")

    async def test_basic_challenge_is_answered_with_the_login(self) -> None:
        self.servers.respond = require_authorization(LOGIN.authorization, challenge='Basic realm="x"')
        self.assertEqual(await self.fetch(credential=LOGIN), b"ok")
        self.assertEqual((await self.send_request()).status, 401)
        self.assertEqual(self.servers.authorizations(), [None, LOGIN.authorization, None])

    async def test_rejected_basic_is_not_retried(self) -> None:
        self.servers.respond = require_authorization("Basic other", challenge='Basic realm="x"')
        self.assertEqual((await self.send_request(credential=LOGIN)).status, 401)
        self.assertEqual(self.servers.authorizations(), [None, LOGIN.authorization])

    async def test_client_credential_is_forwarded_unchanged(self) -> None:
        self.servers.respond = require_authorization("Bearer theirs")
        headers = Headers([("Authorization", "Bearer other")])
        self.assertEqual(await self.fetch(credential=ClientCredential("Bearer theirs"), headers=headers), b"ok")
        self.assertEqual((await self.send_request(credential=ClientCredential("Bearer wrong"))).status, 401)
        self.assertEqual(self.servers.authorizations(), ["Bearer theirs", "Bearer wrong"])
        self.assertEqual(self.servers.tokens, 0)

    async def test_a_challenge_to_a_clients_credential_is_not_learned(self) -> None:
        """Some registries name another realm to clients with an expired token."""
        await self.fetch()
        self.servers.respond = require_authorization("Bearer t1", challenge=BEARER.replace("registry.example", "evil"))
        self.assertEqual((await self.send_request(credential=ClientCredential("Bearer junk"))).status, 401)
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), ())

    async def test_a_request_is_sent_as_it_is(self) -> None:
        self.authorizer.add_challenges(REGISTRY, [Challenge("basic", {"realm": "x"})])
        self.servers.respond = require_authorization("Basic never", challenge='Basic realm="page"')
        for authorization in ([], [("authorization", "Basic theirs")]):
            response = await self.client.send("GET", REGISTRY, "/signin?x", Headers([("cookie", "c"), *authorization]))
            self.assertEqual(response.status, 401)
            await response.discard()
        self.assertEqual(self.servers.authorizations(), [None, "Basic theirs"])
        self.assertEqual([request.headers.get("cookie") for request in self.servers.requests], ["c", "c"])
        self.assertEqual(self.authorizer.challenges_for(REGISTRY)[0].parameters, {"realm": "x"})
        self.servers.respond = redirect_from(signin="/y")
        response = await self.client.send("GET", REGISTRY, "/signin", Headers())
        self.assertEqual(response.status, 307)
        await response.discard()

    async def test_a_body_is_sent_once(self) -> None:
        self.servers.respond = require_authorization("Bearer t1")
        for status in (401, 200):  # the challenge of the first response applies to the second request
            response = await self.send_request(
                "/v2/library/ubuntu/blobs/uploads/", "POST", body=SmallBodyProducer(), actions="pull,push"
            )
            self.assertEqual(response.status, status)
            await response.discard()

    async def test_refused_token_is_unauthorized(self) -> None:
        def respond(request: ServedRequest) -> ResponseTuple:
            return 401, {"WWW-Authenticate": 'Bearer realm="http://registry.example/denied"'}, b"{}"

        self.servers.respond = respond
        error = await self.assertFailure(Deferred.fromCoroutine(self.send_request()), Unauthorized)
        self.assertIn("registry.example", error.message)

    async def test_moved_realm_is_rediscovered(self) -> None:
        self.authorizer.add_challenges(REGISTRY, [Challenge("bearer", {"realm": "http://gone.invalid/"})])
        self.servers.respond = require_authorization("Bearer t1")
        await self.assertFailure(Deferred.fromCoroutine(self.send_request()), UpstreamUnreachable)
        self.assertEqual(await self.fetch(), b"ok")

    async def test_a_realm_that_answers_no_more_refuses_nobody(self) -> None:
        """The registry names another one, or wants no token any more."""
        accept = require_authorization("Bearer t1")

        def respond(request: ServedRequest) -> ResponseTuple:
            return (404, {}, b"gone") if "/old" in request.url else accept(request)

        self.servers.respond = respond
        for expected in (["/old", "x", "x"], ["/old", "x"]):
            self.authorizer.add_challenges(REGISTRY, [Challenge("bearer", {"realm": "http://registry.example/old"})])
            self.servers.requests.clear()
            self.assertEqual(await self.fetch(), b"ok")
            for request, part in zip(self.servers.requests, expected, strict=True):
                self.assertIn(part, request.url)
            accept = lambda request: (200, {}, b"ok")  # noqa: E731

    async def test_no_credential_is_logged_or_in_an_error(self) -> None:
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        self.servers.respond = require_authorization("Bearer t1")
        await self.fetch(credential=LOGIN)
        self.servers.respond = lambda request: (302, {"Location": "ftp://cdn.example/?sig=signed"}, b"")
        error = await self.assertFailure(Deferred.fromCoroutine(self.send_request(credential=LOGIN)), UpstreamBroken)
        # A traceback with all local variables, the most detailed log output.
        text = Failure(error).getTraceback(detail="verbose") + "".join(formatEvent(event) for event in events)
        for secret in ("secret", LOGIN.authorization, "Bearer t1"):
            self.assertNotIn(secret, text)
        self.assertNotIn("signed", error.message)

    # redirects

    async def test_redirect_to_another_host_sends_no_credentials(self) -> None:
        self.servers.respond = lambda request: (
            redirect_from(x="http://cdn.example/blob?sig=%2B&a")(request)
            if request.headers.get("authorization") == "Bearer t1" or request.url.startswith("cdn")
            else require_authorization("Bearer t1")(request)
        )
        headers = Headers([("Accept", "a/b"), ("Range", "bytes=5-"), ("Cookie", "c"), ("X-Secret", "s")])
        response = await self.send_request(headers=headers)
        self.assertEqual(await response.read_all(9), b"ok")
        self.assertEqual(response.url, "http://cdn.example/blob?sig=%2B&a")
        last = self.servers.requests[-1]
        self.assertEqual(last.url, "cdn.example/blob?sig=%2B&a")
        self.assertEqual((last.headers.get("accept"), last.headers.get("range")), ("a/b", "bytes=5-"))
        for name in ("authorization", "cookie", "x-secret"):
            self.assertNotIn(name, last.headers)

    async def test_same_origin_redirect_keeps_the_authorization(self) -> None:
        self.servers.respond = redirect_from(x="../y?z=1", y="/end")
        self.assertEqual(await self.fetch(credential=ClientCredential("Bearer mine")), b"ok")
        self.assertEqual(
            self.servers.urls(),
            ["registry.example/v2/library/ubuntu/x", "registry.example/v2/library/y?z=1", "registry.example/end"],
        )
        self.assertEqual(self.servers.authorizations(), ["Bearer mine"] * 3)

    async def test_authorization_is_not_restored_after_a_cross_origin_redirect(self) -> None:
        self.servers.respond = redirect_from(x="http://registry.example:5000/y", y="http://registry.example/z")
        await self.fetch(credential=ClientCredential("Bearer mine"))
        self.assertEqual(self.servers.authorizations(), ["Bearer mine", None, None])

    async def test_head_stays_head(self) -> None:
        for status in (301, 302, 303, 307, 308):
            self.servers.requests.clear()
            self.servers.respond = lambda request, status=status: (
                (status, {"Location": "/y"}, b"") if request.url.endswith("x") else (200, {}, b"")
            )
            self.assertEqual((await self.send_request(method="HEAD")).status, 200)
            self.assertEqual([request.method for request in self.servers.requests], ["HEAD", "HEAD"])

    async def test_redirect_loops_and_more_than_ten_redirects_are_errors(self) -> None:
        self.servers.respond = redirect_from(x="y", y="x")
        await self.assertFailure(Deferred.fromCoroutine(self.send_request()), UpstreamBroken)
        self.assertEqual(len(self.servers.requests), 2)
        self.servers.respond = redirect_from(x="1", **{str(number): str(number + 1) for number in range(1, 20)})
        self.servers.requests.clear()
        error = await self.assertFailure(Deferred.fromCoroutine(self.send_request()), UpstreamBroken)
        self.assertEqual(len(self.servers.requests), 11)
        self.assertIn("registry.example", error.message)

    async def test_ten_redirects_are_followed(self) -> None:
        self.servers.respond = redirect_from(x="1", **{str(number): str(number + 1) for number in range(1, 10)})
        self.assertEqual(await self.fetch(), b"ok")

    async def test_redirect_into_the_local_network_is_refused(self) -> None:
        port = self.port.getHost().port
        for location in (f"http://127.0.0.1:{port}/y", f"http://localhost:{port}/y"):
            self.servers.respond = redirect_from(x=location)
            await self.assertFailure(Deferred.fromCoroutine(self.send_request()), CaptivePortalSuspected)

    async def test_registry_on_the_local_network_is_allowed(self) -> None:
        registry = Registry(Host("127.0.0.1", self.port.getHost().port), "http")
        self.servers.respond = redirect_from(x="/y")
        self.assertEqual(await self.fetch(registry=registry), b"ok")

    async def test_malformed_locations_are_errors(self) -> None:
        for location in ("ftp://cdn.example/", "http://u:p@cdn.example/", "http://cdn.example:99999/", "//["):
            self.servers.respond = redirect_from(x=location)
            await self.assertFailure(Deferred.fromCoroutine(self.send_request()), UpstreamBroken)

    async def test_challenge_of_a_redirect_target_is_ignored(self) -> None:
        def respond(request: ServedRequest) -> ResponseTuple:
            if request.url.startswith("cdn"):
                return 401, {"WWW-Authenticate": BEARER}, b"expired"
            return 302, {"Location": "http://cdn.example/y"}, b""

        self.servers.respond = respond
        self.assertEqual((await self.send_request(credential=LOGIN)).status, 401)
        self.assertEqual((self.servers.tokens, self.authorizer.challenges_for(REGISTRY)), (0, ()))

    async def test_other_successes_mean_that_the_content_follows(self) -> None:
        """docker and containerd take them. A part is one only if it was asked for."""
        part = Headers([("Range", "bytes=0-1")])
        for method, status, headers, expected in (
            *(("GET", status, Headers(), 200) for status in (201, 202, 203, 206, 207, 299)),
            *(("GET", status, Headers(), status) for status in (204, 205)),
            ("GET", 206, part, 206),
            ("POST", 202, Headers(), 202),
        ):
            self.servers.respond = lambda request, status=status: (status, {"Content-Range": "bytes 0-1/2"}, b"ok")
            response = await self.send_request(method=method, headers=headers)
            self.assertEqual(response.status, expected)
            self.assertEqual(await response.read_all(2), b"" if status == 204 else b"ok")

    async def test_other_redirects_are_returned(self) -> None:
        self.servers.respond = redirect_from(x="/y")
        self.assertEqual((await self.send_request(follow=False)).status, 307)
        self.assertEqual((await self.send_request(method="DELETE")).status, 307)
        self.servers.respond = lambda request: (304, {}, b"")
        self.assertEqual((await self.send_request()).status, 304)
        self.servers.respond = lambda request: (302, {}, b"")
        self.assertEqual((await self.send_request()).status, 302)

    # fronts, such as lscr.io: they redirect to the registry proper, which wants a token of its own realm

    def redirect_to_proper(self, *accepted: str, path: str = "/v2/library/ubuntu/manifests/1", **more: str) -> None:
        """Redirect to `path` of the registry proper. It accepts these Authorization values only."""

        def respond(request: ServedRequest) -> ResponseTuple:
            if request.url.startswith("registry.example"):
                return 307, {"Location": f"http://proper.example{path}"}, b""
            return require_authorization(*accepted, challenge=more.get("challenge", PROPER_BEARER))(request)

        self.servers.respond = respond

    async def pull(
        self, credential: Any = ANONYMOUS, status: int = 200, **options: Any
    ) -> list[tuple[str, str | None]]:
        """Pull a manifest from the front. Return the hosts that were asked for it, with the Authorization of each."""
        self.servers.requests.clear()
        response = await self.send_request("/v2/library/ubuntu/manifests/1", credential=credential, **options)
        self.assertEqual(response.status, status)
        await response.discard()
        return [(one.url.partition("/")[0], one.headers.get("authorization")) for one in self.servers.requests]

    async def test_registry_proper_gets_a_token_of_its_own(self) -> None:
        self.redirect_to_proper("Bearer t1")
        cold = [(FRONT, None), (PROPER, None), (FRONT, None), (PROPER, "Bearer t1")]
        self.assertEqual(await self.pull(), cold)
        for method in ("GET", "HEAD"):
            self.assertEqual(await self.pull(method=method), [(FRONT, None), (PROPER, "Bearer t1")])
        self.assertEqual(self.servers.token_requests, [(f"proper.example/token?{PROPER_QUERY}", None)])
        self.assertEqual(self.authorizer.challenges_for(REGISTRY), ())
        self.assertEqual(self.authorizer.challenges_for(Registry.parse("http://proper.example")), ())

    async def test_a_token_that_the_registry_proper_rejects_is_replaced(self) -> None:
        self.redirect_to_proper("Bearer t1")
        await self.pull()
        self.redirect_to_proper("Bearer t2")
        self.assertEqual((await self.pull())[-1], (PROPER, "Bearer t2"))
        self.redirect_to_proper("Bearer never")
        await self.pull(status=401)

    async def test_the_account_of_a_shared_login_is_not_passed_on(self) -> None:
        """Docker Hub says whose pulls it counts. It names an anonymous client by its address."""
        limits = {"Docker-RateLimit-Source": "an-account", "RateLimit-Remaining": "99;w=21600"}
        for status in (200, 403, 404, 429):
            self.servers.respond = lambda request, status=status: (status, limits, b"ok")  # type: ignore[misc]
            for credential, is_told in ((LOGIN, False), (ClientCredential("Basic eDp5"), True), (ANONYMOUS, True)):
                response = await self.send_request("/v2/library/ubuntu/manifests/1", credential=credential)
                self.assertEqual("docker-ratelimit-source" in response.headers, is_told)
                self.assertEqual(response.headers.get("ratelimit-remaining"), "99;w=21600")
                await response.discard()

    async def test_login_for_the_front_is_not_for_the_registry_proper(self) -> None:
        self.redirect_to_proper("Bearer t1")
        self.assertEqual((await self.pull(LOGIN))[-1], (PROPER, "Bearer t1"))
        self.assertEqual(await self.pull(LOGIN), [(FRONT, None), (PROPER, "Bearer t1")])
        self.assertEqual({login for _, login in self.servers.token_requests}, {None})

    async def test_login_for_the_registry_proper(self) -> None:
        """It is used once it is known that the front leads there, and is not sent to the front."""
        login, host = BasicCredentials("proper", "x"), Host("proper.example", 80)
        self.authorizer.set_logins({host: login})
        self.redirect_to_proper("Bearer t2")
        self.assertIs(self.authorizer.effective_login(REGISTRY), None)
        await self.pull(status=401)
        self.assertEqual(self.authorizer.effective_login(REGISTRY), login)
        self.assertEqual((await self.pull(login))[-1], (PROPER, "Bearer t2"))
        self.assertEqual([login for _, login in self.servers.token_requests], [None, login.authorization])
        for challenge in (BEARER, 'Basic realm="x"'):  # the front would like it, too
            self.servers.respond = require_authorization("never", challenge=challenge)
            self.servers.token_requests.clear()
            self.assertNotIn(login.authorization, [sent for _, sent in await self.pull(login, status=401)])
            self.assertNotIn(login.authorization, [sent for _, sent in self.servers.token_requests])

    async def test_login_that_is_renewed_while_the_front_lets_a_request_wait(self) -> None:
        old, host = BasicCredentials("proper", "x"), Host("proper.example", 80)
        self.authorizer.set_logins({host: old})
        self.redirect_to_proper("Bearer t1")
        await self.pull()
        self.assertEqual(self.authorizer.effective_login(REGISTRY), old)
        self.authorizer.set_logins({host: BasicCredentials("proper", "renewed")})
        self.authorizer.effective_login(REGISTRY)  # for another request
        for challenge in (BEARER, 'Basic realm="x"'):
            self.servers.respond = require_authorization("never", challenge=challenge)
            self.assertNotIn(old.authorization, [sent for _, sent in await self.pull(old, status=401)])
            self.assertNotIn(old.authorization, [sent for _, sent in self.servers.token_requests])
            self.authorizer.set_logins({})  # a request that began before

    async def test_login_for_the_registry_proper_is_for_pulls_alone(self) -> None:
        login, host = BasicCredentials("proper", "x"), Host("proper.example", 80)
        self.authorizer.set_logins({host: login})
        for path in ("/v2/library/ubuntu/manifests/1?x=y", "/v2/library/ubuntu/manifests/1?%zz"):
            self.redirect_to_proper("Bearer never", path=path)
            await self.pull(login, status=401)
        self.assertEqual({login for _, login in self.servers.token_requests}, {None})
        self.servers.token_requests.clear()
        for path in ("/v2/", "/v2/x/blobs/uploads/", "/v2/a/../b/manifests/1", "/page", "/v2/%61//manifests/1"):
            self.redirect_to_proper("Bearer never", path=path)
            await self.pull(login, status=401)
        self.assertEqual(self.servers.token_requests, [])

    async def test_registry_proper_has_another_name_for_the_repository(self) -> None:
        digest = f"sha256:{'0' * 64}"
        for path in ("a/b/manifests/1", f"a/b/blobs/{digest}", f"a/b/referrers/{digest}", "a/b/tags/list?n=5"):
            self.servers.token_requests.clear()
            self.authorizer = self.client._authorizer = self.make_authorizer()
            self.redirect_to_proper(*(f"Bearer t{number}" for number in range(9)), path=f"/v2/{path}")
            await self.pull()
            query = PROPER_QUERY.replace("library%2Fubuntu", "a%2Fb")
            self.assertEqual(self.servers.token_requests, [(f"proper.example/token?{query}", None)])

    async def test_another_hosts_401_without_bearer_stays(self) -> None:
        for challenge in ('Basic realm="x"', "Negotiate", ""):
            self.redirect_to_proper("Bearer t1", challenge=challenge)
            self.assertEqual(await self.pull(LOGIN, 401), [(FRONT, None), (PROPER, None)])
        self.assertEqual(self.servers.token_requests, [])

    async def test_clients_token_is_for_the_server_that_answered_the_ping(self) -> None:
        """The client got it by the challenge of that server, as without the proxy."""
        mine = ClientCredential("Bearer mine")
        self.redirect_to_proper("Bearer mine")
        proper, challenges = Registry.parse("http://proper.example"), parse_challenges([PROPER_BEARER])
        self.authorizer.set_ping_target(REGISTRY, proper, challenges)
        self.assertEqual(await self.pull(mine), [(FRONT, None), (PROPER, "Bearer mine")])
        self.redirect_to_proper("Bearer t1")
        self.assertEqual(await self.pull(mine, 401), [(FRONT, None), (PROPER, "Bearer mine")])
        self.assertEqual(self.servers.token_requests, [])
        basic = ClientCredential("Basic mine")  # which is for the front
        self.assertEqual(await self.pull(basic), [(FRONT, "Basic mine"), (PROPER, "Bearer t1")])
        self.authorizer.set_ping_target(REGISTRY, None, [])
        self.assertEqual(await self.pull(mine), [(FRONT, "Bearer mine"), (PROPER, "Bearer t1")])

    async def test_registry_that_redirects_the_ping_only(self) -> None:
        """Or does no longer redirect: it gets the client's token itself if it asks, as without the proxy."""
        proper, challenges = Registry.parse("http://proper.example"), parse_challenges([PROPER_BEARER])
        self.authorizer.set_ping_target(REGISTRY, proper, challenges)
        self.servers.respond = require_authorization("Bearer mine", challenge=PROPER_BEARER)
        mine = ClientCredential("Bearer mine")
        self.assertEqual(await self.pull(mine), [(FRONT, None), (FRONT, "Bearer mine")])
        other = ClientCredential("Bearer other")
        self.assertEqual(await self.pull(other, 401), [(FRONT, None), (FRONT, "Bearer other")])
        self.assertEqual(self.servers.token_requests, [])

    async def test_token_goes_no_further(self) -> None:
        def respond(request: ServedRequest) -> ResponseTuple:
            host, _, path = request.url.partition("/")
            if host == FRONT:
                return 302, {"Location": "http://proper.example/v2/library/ubuntu/manifests/1"}, b""
            if host == PROPER and "authorization" not in request.headers:
                return 401, {"WWW-Authenticate": PROPER_BEARER}, b"{}"
            if host == PROPER:
                return 302, {"Location": f"http://cdn.example/{path}"}, b""
            return 200, {}, b"ok"

        self.servers.respond = respond
        self.assertEqual((await self.pull())[-2:], [(PROPER, "Bearer t1"), ("cdn.example", None)])
        self.assertEqual(await self.pull(), [(FRONT, None), (PROPER, "Bearer t1"), ("cdn.example", None)])

    async def test_refused_token_of_the_registry_proper(self) -> None:
        self.redirect_to_proper("x", challenge='Bearer realm="http://proper.example/denied"')
        for _ in range(2):
            error = await self.assertFailure(Deferred.fromCoroutine(self.pull()), Unauthorized)
            self.assertIn("proper.example", error.message)
            self.assertIn("/denied", dict(error.headers)["WWW-Authenticate"])

    async def test_nobody_is_refused_because_of_an_earlier_challenge(self) -> None:
        """A realm that refuses is not believed to be that of the registry any more."""
        denied = Challenge("bearer", {"realm": "http://registry.example/denied"})
        self.authorizer.add_challenges(REGISTRY, [denied])

        def respond(request: ServedRequest) -> ResponseTuple:
            if "/denied" in request.url:
                return 401, {"WWW-Authenticate": BEARER}, b"{}"
            return require_authorization("Bearer t1")(request)

        self.servers.respond = respond
        self.assertEqual(await self.fetch(), b"ok")


class DowngradeTests(TestCase):
    async def test_redirect_to_plain_http_is_refused(self) -> None:
        class RedirectingAgent:
            async def request(self, method: str, url: str, *arguments: Any, **options: Any) -> Any:
                urls.append(url)
                return FoundResponse()

        class FoundResponse:
            status, url = 302, "https://registry.example/v2/"
            headers = Headers([("Location", "http://registry.example/v2/")])

            async def discard(self) -> None: ...

        urls: list[str] = []
        agent: Any = RedirectingAgent()
        client = UpstreamClient(agent, Authorizer(agent, Clock().seconds, None, {}), None)
        registry = Registry.parse("registry.example")
        work = client.request(RegistryRequest("GET", registry, "/v2/", name=None, credential=Anonymous()))
        error = await self.assertFailure(Deferred.fromCoroutine(work), UpstreamBroken)
        self.assertIn("plain HTTP", error.message)
        self.assertEqual(urls, ["https://registry.example/v2/"])
