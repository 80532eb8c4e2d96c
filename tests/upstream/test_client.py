"""The client with a registry, its token server and its blob stores in one small server on loopback."""

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

from dockerproxy.errors import DestinationForbidden, Unauthorized, UpstreamBroken, UpstreamUnreachable
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.names import Host, Registry, parse_repository
from dockerproxy.upstream.client import UpstreamClient
from dockerproxy.upstream.credentials import Anonymous, Configured, Own
from dockerproxy.upstream.tokens import Tokens
from dockerproxy.upstream.transport import Response, Timeouts, TLSClient, Transport

REGISTRY = Registry.parse("http://registry.example")
NAME = parse_repository("library/ubuntu")
LOGIN = Configured("me", "secret")
BEARER = 'Bearer realm="http://registry.example/token",service="s",scope="repository:library/ubuntu:pull"'


@frozen
class Seen:
    method: str
    url: str
    headers: Headers


Answer = tuple[int, dict[str, str], bytes]


class World(Factory):
    """Every host of the tests; `answer` gets what was asked. Bodies of requests are not looked at."""

    noisy = False

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.tokens = 0
        self.answer: Callable[[Seen], Answer] = lambda seen: (200, {}, b"ok")
        self.connections: set[Any] = set()

    def buildProtocol(self, address: Any) -> Protocol:
        return _WorldConnection(self)

    def urls(self) -> list[str]:
        return [seen.url for seen in self.seen]

    def authorizations(self) -> list[str | None]:
        return [seen.headers.get("authorization") for seen in self.seen]


class _WorldConnection(Protocol):
    def __init__(self, world: World) -> None:
        self.world = world

    def connectionMade(self) -> None:
        self.world.connections.add(self)

    def connectionLost(self, reason: Any = None) -> None:
        self.world.connections.discard(self)

    def dataReceived(self, data: bytes) -> None:
        head = data.partition(b"\r\n\r\n")[0].decode()
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = Headers([tuple(line.split(": ", 1)) for line in lines])  # type: ignore[misc]
        seen = Seen(method, f"{headers.get('host')}{target}", headers)
        if target.startswith("/token"):
            self.world.tokens += 1
            status, fields, body = 200, {}, b'{"token": "t%d", "expires_in": 300}' % self.world.tokens
        else:
            self.world.seen.append(seen)
            status, fields, body = self.world.answer(seen)
        lines = [
            f"HTTP/1.1 {status} X",
            f"Content-Length: {len(body)}",
            *(f"{name}: {fields[name]}" for name in fields),
        ]
        content = b"" if method == "HEAD" else body
        self.transport.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + content)  # type: ignore[union-attr]


def wants(*tokens: str, challenge: str = BEARER) -> Callable[[Seen], Answer]:
    """Answers only to these Authorization values."""

    def answer(seen: Seen) -> Answer:
        if seen.headers.get("authorization") in tokens:
            return 200, {}, b"ok"
        return 401, {"WWW-Authenticate": challenge}, b"{}"

    return answer


def redirects(**to: str) -> Callable[[Seen], Answer]:
    """Redirects from paths, by their last part, to Locations."""

    def answer(seen: Seen) -> Answer:
        location = to.get(seen.url.partition("?")[0].rpartition("/")[2])
        return (200, {}, b"ok") if location is None else (307, {"Location": location}, b"see there")

    return answer


class Body:
    length = 2

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(b"{}")
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


class ClientTests(TestCase):
    timeout = 10

    def setUp(self) -> None:
        clock = Clock()
        self.world = World()
        self.port = reactor.listenTCP(0, self.world, interface="127.0.0.1")
        place = ("127.0.0.1", self.port.getHost().port)
        hosts = [Host(name, port) for name in ("registry.example", "cdn.example") for port in (80, 443, 5000)]
        dialer = Dialer(reactor, overrides=dict.fromkeys(hosts, place))
        self.transport = Transport(clock, dialer, TLSClient(verify=False), Timeouts())
        self.tokens = Tokens(self.transport, clock.seconds, None, {REGISTRY.host: LOGIN})
        self.client = UpstreamClient(self.transport, self.tokens, self.permit)

    def permit(self, address: str) -> None:
        raise DestinationForbidden(f"{address} is forbidden")

    async def tearDown(self) -> None:
        await self.transport.close()
        await self.port.stopListening()
        while self.world.connections:
            await deferLater(reactor, 0)

    async def ask(self, path: str = "/v2/library/ubuntu/x", method: str = "GET", **more: Any) -> Response:
        settings = {"name": NAME, "credential": Anonymous(), **more}
        return await self.client.request(method, settings.pop("registry", REGISTRY), path, **settings)

    async def content(self, *arguments: str, **more: Any) -> bytes:
        response = await self.ask(*arguments, **more)
        self.assertEqual(response.status, 200)
        return await response.read_all(100)

    # authorization

    async def test_nothing_is_asked_for(self) -> None:
        self.assertEqual(await self.content(credential=LOGIN), b"ok")
        self.assertEqual((self.world.authorizations(), self.world.tokens), ([None], 0))

    async def test_dance_and_no_refusal_afterwards(self) -> None:
        self.world.answer = wants("Bearer t1")
        self.assertEqual(await self.content(), b"ok")
        self.assertEqual(await self.content(), b"ok")
        self.assertEqual(self.world.authorizations(), [None, "Bearer t1", "Bearer t1"])
        self.assertEqual(self.world.tokens, 1)

    async def test_kept_token_that_is_taken_no_more(self) -> None:
        self.world.answer = wants("Bearer t1")
        await self.content()
        self.world.answer = wants("Bearer t2")
        self.assertEqual(await self.content(), b"ok")
        self.assertEqual(self.world.authorizations(), [None, "Bearer t1", "Bearer t1", "Bearer t2"])

    async def test_a_refused_new_token_is_the_last_word(self) -> None:
        self.world.answer = wants("Bearer never")
        for turn in (1, 2):
            response = await self.ask()
            self.assertEqual(response.status, 401)
            self.assertEqual(await response.read_all(9), b"{}")
            self.assertEqual(self.world.tokens, turn)

    async def test_challenge_with_another_scope(self) -> None:
        self.world.answer = wants("Bearer t1")
        await self.content()
        self.world.answer = wants("Bearer t2", challenge=BEARER.replace("ubuntu:pull", "ubuntu:pull,push"))
        self.assertEqual(await self.content(), b"ok")

    async def test_basic(self) -> None:
        self.world.answer = wants(LOGIN.authorization, challenge='Basic realm="x"')
        self.assertEqual(await self.content(credential=LOGIN), b"ok")
        self.assertEqual((await self.ask()).status, 401)
        self.assertEqual(self.world.authorizations(), [None, LOGIN.authorization, None])

    async def test_refused_basic_is_not_repeated(self) -> None:
        self.world.answer = wants("Basic other", challenge='Basic realm="x"')
        self.assertEqual((await self.ask(credential=LOGIN)).status, 401)
        self.assertEqual(self.world.authorizations(), [None, LOGIN.authorization])

    async def test_own_is_sent_as_it_is_and_never_danced_for(self) -> None:
        self.world.answer = wants("Bearer theirs")
        headers = Headers([("Authorization", "Bearer other")])
        self.assertEqual(await self.content(credential=Own("Bearer theirs"), headers=headers), b"ok")
        self.assertEqual((await self.ask(credential=Own("Bearer wrong"))).status, 401)
        self.assertEqual(self.world.authorizations(), ["Bearer theirs", "Bearer wrong"])
        self.assertEqual(self.world.tokens, 0)

    async def test_a_body_is_sent_once(self) -> None:
        self.world.answer = wants("Bearer t1")
        for status in (401, 200):  # the first answer taught us what to send with the second
            response = await self.ask("/v2/library/ubuntu/blobs/uploads/", "POST", body=Body(), actions="pull,push")
            self.assertEqual(response.status, status)
            await response.discard()

    async def test_realm_that_refuses(self) -> None:
        def answer(seen: Seen) -> Answer:
            return 401, {"WWW-Authenticate": 'Bearer realm="http://registry.example/denied"'}, b"{}"

        self.world.answer = answer
        error = await self.assertFailure(Deferred.fromCoroutine(self.ask()), Unauthorized)
        self.assertIn("registry.example", error.message)

    async def test_realm_that_moved_is_found(self) -> None:
        self.tokens.remember(REGISTRY, [Challenge("bearer", {"realm": "http://gone.invalid/"})])
        self.world.answer = wants("Bearer t1")
        await self.assertFailure(Deferred.fromCoroutine(self.ask()), UpstreamUnreachable)
        self.assertEqual(await self.content(), b"ok")

    async def test_no_credential_is_logged_or_in_an_error(self) -> None:
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        self.world.answer = wants("Bearer t1")
        await self.content(credential=LOGIN)
        self.world.answer = lambda seen: (302, {"Location": "ftp://cdn.example/?sig=signed"}, b"")
        error = await self.assertFailure(Deferred.fromCoroutine(self.ask(credential=LOGIN)), UpstreamBroken)
        # As a log with every detail would show it.
        text = Failure(error).getTraceback(detail="verbose") + "".join(formatEvent(event) for event in events)
        for secret in ("secret", LOGIN.authorization, "Bearer t1"):
            self.assertNotIn(secret, text)
        self.assertNotIn("signed", error.message)

    # redirects

    async def test_redirect_to_another_host(self) -> None:
        self.world.answer = lambda seen: (
            redirects(x="http://cdn.example/blob?sig=%2B&a")(seen)
            if seen.headers.get("authorization") == "Bearer t1" or seen.url.startswith("cdn")
            else wants("Bearer t1")(seen)
        )
        headers = Headers([("Accept", "a/b"), ("Range", "bytes=5-"), ("Cookie", "c"), ("X-Secret", "s")])
        response = await self.ask(headers=headers)
        self.assertEqual(await response.read_all(9), b"ok")
        self.assertEqual(response.url, "http://cdn.example/blob?sig=%2B&a")
        last = self.world.seen[-1]
        self.assertEqual(last.url, "cdn.example/blob?sig=%2B&a")
        self.assertEqual((last.headers.get("accept"), last.headers.get("range")), ("a/b", "bytes=5-"))
        for name in ("authorization", "cookie", "x-secret"):
            self.assertNotIn(name, last.headers)

    async def test_relative_redirect_keeps_the_authorization(self) -> None:
        self.world.answer = redirects(x="../y?z=1", y="/end")
        self.assertEqual(await self.content(credential=Own("Bearer mine")), b"ok")
        self.assertEqual(
            self.world.urls(),
            ["registry.example/v2/library/ubuntu/x", "registry.example/v2/library/y?z=1", "registry.example/end"],
        )
        self.assertEqual(self.world.authorizations(), ["Bearer mine"] * 3)

    async def test_other_ports_and_ways_back_are_other_hosts(self) -> None:
        self.world.answer = redirects(x="http://registry.example:5000/y", y="http://registry.example/z")
        await self.content(credential=Own("Bearer mine"))
        self.assertEqual(self.world.authorizations(), ["Bearer mine", None, None])

    async def test_head_stays_head(self) -> None:
        for status in (301, 302, 303, 307, 308):
            self.world.seen.clear()
            self.world.answer = lambda seen, status=status: (
                (status, {"Location": "/y"}, b"") if seen.url.endswith("x") else (200, {}, b"")
            )
            self.assertEqual((await self.ask(method="HEAD")).status, 200)
            self.assertEqual([seen.method for seen in self.world.seen], ["HEAD", "HEAD"])

    async def test_circles_and_long_ways(self) -> None:
        self.world.answer = redirects(x="y", y="x")
        await self.assertFailure(Deferred.fromCoroutine(self.ask()), UpstreamBroken)
        self.assertEqual(len(self.world.seen), 2)
        self.world.answer = redirects(x="1", **{str(number): str(number + 1) for number in range(1, 10)})
        self.world.seen.clear()
        error = await self.assertFailure(Deferred.fromCoroutine(self.ask()), UpstreamBroken)
        self.assertEqual(len(self.world.seen), 6)
        self.assertIn("registry.example", error.message)

    async def test_five_redirects_are_followed(self) -> None:
        self.world.answer = redirects(x="1", **{str(number): str(number + 1) for number in range(1, 5)})
        self.assertEqual(await self.content(), b"ok")

    async def test_redirect_into_our_own_network(self) -> None:
        port = self.port.getHost().port
        for location in (f"http://127.0.0.1:{port}/y", f"http://localhost:{port}/y"):
            self.world.answer = redirects(x=location)
            await self.assertFailure(Deferred.fromCoroutine(self.ask()), DestinationForbidden)

    async def test_registry_on_our_own_network_is_meant(self) -> None:
        registry = Registry(Host("127.0.0.1", self.port.getHost().port), "http")
        self.world.answer = redirects(x="/y")
        self.assertEqual(await self.content(registry=registry), b"ok")

    async def test_malformed_locations(self) -> None:
        for location in ("ftp://cdn.example/", "http://u:p@cdn.example/", "http://cdn.example:99999/", "//["):
            self.world.answer = redirects(x=location)
            await self.assertFailure(Deferred.fromCoroutine(self.ask()), UpstreamBroken)

    async def test_refusal_by_another_host_is_no_challenge_of_the_registrys(self) -> None:
        def answer(seen: Seen) -> Answer:
            if seen.url.startswith("cdn"):
                return 401, {"WWW-Authenticate": BEARER}, b"expired"
            return 302, {"Location": "http://cdn.example/y"}, b""

        self.world.answer = answer
        self.assertEqual((await self.ask(credential=LOGIN)).status, 401)
        self.assertEqual((self.world.tokens, self.tokens.challenges_for(REGISTRY)), (0, ()))

    async def test_not_followed(self) -> None:
        self.world.answer = redirects(x="/y")
        self.assertEqual((await self.ask(follow=False)).status, 307)
        self.assertEqual((await self.ask(method="DELETE")).status, 307)
        self.world.answer = lambda seen: (304, {}, b"")
        self.assertEqual((await self.ask()).status, 304)
        self.world.answer = lambda seen: (302, {}, b"")
        self.assertEqual((await self.ask()).status, 302)


class Downgrade(TestCase):
    async def test_tls_is_not_left(self) -> None:
        class Redirecting:
            async def request(self, method: str, url: str, *arguments: Any, **more: Any) -> Any:
                asked.append(url)
                return Found()

        class Found:
            status, url = 302, "https://registry.example/v2/"
            headers = Headers([("Location", "http://registry.example/v2/")])

            async def discard(self) -> None: ...

        asked: list[str] = []
        transport: Any = Redirecting()
        client = UpstreamClient(transport, Tokens(transport, Clock().seconds, None, {}), None)
        work = client.request("GET", Registry.parse("registry.example"), "/v2/", name=None, credential=Anonymous())
        error = await self.assertFailure(Deferred.fromCoroutine(work), UpstreamBroken)
        self.assertIn("plain HTTP", error.message)
        self.assertEqual(asked, ["https://registry.example/v2/"])
