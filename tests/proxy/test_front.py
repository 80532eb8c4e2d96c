"""The front door in memory: what it decides, what it refuses and why, and what it passes on."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import define, field
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure

from dockerproxy.errors import UpstreamBroken, UpstreamUnreachable
from dockerproxy.http.request import Request
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.front import FrontDoor, Interception, Permitted
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.tunnel import TunnelTimeouts
from dockerproxy.upstream.tls import TLSClient
from dockerproxy.upstream.transport import Timeouts, Transport

QUAY = Registry.parse("quay.io")
PLAIN = Registry.parse("http://plain.example:5000")
PORT = 3128

NAMES = {
    "web.example": ["192.0.2.7"],
    "two.example": ["127.0.0.1", "192.0.2.8"],
    "cloud.example": ["169.254.169.254"],
    "self.example": ["127.0.0.1", "::1"],
    "six.example": ["::ffff:127.0.0.1"],
    "forbidden.example": ["192.0.2.9"],
}


class Resolver:
    def resolveHostName(self, receiver: Any, hostName: str, portNumber: int = 0, **_: Any) -> None:
        receiver.resolutionBegan(None)
        if hostName == "slow.example":
            return
        for text in NAMES.get(hostName, []):
            receiver.addressResolved((IPv6Address if ":" in text else IPv4Address)("TCP", text, portNumber))
        receiver.resolutionComplete()


class Net(MemoryReactorClock):
    def __init__(self) -> None:
        super().__init__()
        self.nameResolver: Any = Resolver()


def policy(**changes: str) -> Policy:
    words = {
        "clients": "private loopback link-local",
        "ports": "443",
        "allow": "all",
        "deny": "loopback link-local metadata forbidden.example",
    } | changes
    return Policy(
        AddressSet.parse(words["clients"]),
        frozenset(int(port) for port in words["ports"].split()),
        Destinations.parse(words["allow"]),
        Destinations.parse(words["deny"]),
    )


@define
class House:
    """A front door, and what came to whom behind it."""

    net: Net = field(factory=Net)
    answered: list[tuple[str, str, str, str]] = field(factory=list)  # whom it was for, method, path, query
    logged: list[tuple[Request, float]] = field(factory=list)
    upstream: Any = None

    def door(self, **changes: str) -> FrontDoor:
        async def registry(registry: Registry, request: Request) -> None:
            self.answered.append((str(registry), request.method, request.path, request.query))
            request.respond(200, [], b"registry")

        def says(word: str) -> Any:
            async def answer(request: Request) -> None:
                self.answered.append((word, request.method, request.path, request.query))
                request.respond(200, [], word.encode())

            return answer

        def no_context(host: str) -> Any:
            raise AssertionError("no TLS in memory")

        dialer = Dialer(self.net, connect_timeout=20)
        return FrontDoor(
            clock=self.net,
            policy=policy(**changes),
            interception=Interception({QUAY.host: QUAY, PLAIN.host: PLAIN}, no_context, registry),
            dial=dialer,
            transport=self.upstream or Transport(self.net, dialer, TLSClient(verify=False), Timeouts(20, 20, 20)),
            local=says("local"),
            own=says("own"),
            own_names=frozenset({"docker-registry.local"}),
            timeouts=TunnelTimeouts(),
            transfers=[],
            log=lambda request, seconds: self.logged.append((request, seconds)),
        )


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def enter(visit: Any, house: House) -> Any:
    """Return a function that makes a visitor of the front door."""

    def make(client: str = "10.1.2.3", **changes: str) -> Any:
        door = house.door(**changes)
        visitor: Any = None

        async def handle(request: Request) -> None:
            request.port = PORT  # the in-memory transport has another
            await door.handle(visitor.site, request)

        visitor = visit(handle, clock=house.net, client=client)
        return visitor

    return make


def sentence(answer: Any) -> str:
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.body.endswith(b"\n")
    text: str = answer.body.decode()
    return text


# who may come in


@pytest.mark.parametrize("client", ["8.8.8.8", "2001:db8::1", "192.0.2.1"])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/ca.crt"),
        ("GET", "/healthz"),
        ("GET", "/v2/"),
        ("POST", "/v2/a/blobs/uploads/"),
        ("GET", "http://web.example/"),
        ("GET", "http://docker-registry.local/"),
        ("GET", "https://quay.io/v2/"),
        ("CONNECT", "quay.io:443"),
        ("CONNECT", "web.example:443"),
        ("CONNECT", "docker-registry.local:443"),
    ],
)
def test_a_stranger_gets_nothing(enter: Any, house: House, client: str, method: str, target: str) -> None:
    visitor = enter(client)
    answer = visitor.ask(method, target)
    assert answer.status == 403
    assert "ALLOW_CLIENTS" in sentence(answer)
    assert client in sentence(answer)
    assert house.answered == []
    assert house.net.tcpClients == []


def test_neighbours_come_in(enter: Any) -> None:
    for client in ("10.1.2.3", "192.168.1.1", "127.0.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "fd00::1"):
        assert enter(client).ask("GET", "/").status == 200, client
    assert enter("8.8.8.8", clients="8.8.8.0/24").ask("GET", "/").status == 200
    assert enter("10.1.2.3", clients="8.8.8.0/24").ask("GET", "/").status == 403


# origin-form, and absolute-form


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("/", ("local", "/", "")),
        ("/v2/a/tags/list?n=1", ("local", "/v2/a/tags/list", "n=1")),
        ("//web.example/", ("local", "//web.example/", "")),
        ("http://docker-registry.local:3128/ca.crt?x=1", ("local", "/ca.crt", "x=1")),
        ("HTTP://Docker-Registry.LOCAL:3128", ("local", "/", "")),
        ("http://docker-registry.local/v2/", ("own", "/v2/", "")),
        ("https://docker-registry.local/v2/", ("own", "/v2/", "")),
        ("https://quay.io/v2/?a=b%20c", ("quay.io", "/v2/", "a=b%20c")),
        ("https://QUAY.io:443/v2/", ("quay.io", "/v2/", "")),
        ("http://quay.io:443/v2/", ("quay.io", "/v2/", "")),
        ("http://plain.example:5000/v2/", ("plain.example:5000", "/v2/", "")),
        ("https://quay.io?x", ("quay.io", "/", "x")),
    ],
)
def test_who_answers(enter: Any, house: House, target: str, seen: tuple[str, str, str]) -> None:
    visitor = enter()
    assert visitor.ask("GET", target).status == 200
    who, path, query = seen
    assert house.answered == [(who, "GET", path, query)]


@pytest.mark.parametrize(
    "target",
    [
        "http://user:secret@web.example/",
        "http://user:secret@quay.io/v2/",
        "https://user@docker-registry.local/",
        "http://web.example@quay.io/",
        "ftp://web.example/",
        "file:///etc/passwd",
        "web.example/",
        "web.example:80",
        "*",
        "http://",
        "http:///x",
        "http:/web.example/",
        "http://web_example!/",
        "http://web.example:0/",
        "http://web.example:99999/",
        "http://web.example:80:80/",
        "http://[::1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://web.example\\@x/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_a_target_that_is_no_url_of_a_web_server(enter: Any, house: House, target: str, method: str) -> None:
    visitor = enter()
    answer = visitor.ask(method, target)
    assert answer.status == 400
    assert sentence(answer)
    assert house.answered == []
    assert house.net.tcpClients == []
    assert "secret" not in visitor.received.decode()
    logged = visitor.logged[0]
    assert "secret" not in f"{logged.host}{logged.path}{logged.query}"


# what is forwarded elsewhere


class Recorded:
    """The one connection that was made, as its server sees it."""

    def __init__(self, net: Net, attempt: int = 0) -> None:
        self.address = net.tcpClients[attempt][:2]
        self.wire = StringTransport(lenient=True)
        self.protocol = net.tcpClients[attempt][2].buildProtocol(None)
        self.protocol.makeConnection(self.wire)

    @property
    def head(self) -> list[str]:
        return self.wire.value().partition(b"\r\n\r\n")[0].decode().split("\r\n")

    @property
    def body(self) -> bytes:
        return bytes(self.wire.value().partition(b"\r\n\r\n")[2])


def test_a_request_is_forwarded_and_its_answer_comes_back(enter: Any, house: House) -> None:
    visitor = enter()
    fields = [
        ("Host", "something.else"),
        ("Proxy-Authorization", "Basic secret"),
        ("Proxy-Connection", "keep-alive"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("Keep-Alive", "timeout=5"),
        ("Authorization", "Basic theirs"),
        ("Cookie", "theirs=1"),
        ("X-End", "2"),
    ]
    visitor.request("GET", "http://web.example/a%20b?c=%2F&&d", fields)
    server = Recorded(house.net)
    assert server.address == ("192.0.2.7", 80)
    assert server.head[0] == "GET /a%20b?c=%2F&&d HTTP/1.1"
    sent = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in server.head[1:]}
    assert sent.pop("user-agent")
    assert sent == {
        "host": "web.example",
        "authorization": "Basic theirs",  # the server's own business, unlike the proxy's
        "cookie": "theirs=1",
        "x-end": "2",
        "accept-encoding": "identity",
    }
    server.protocol.dataReceived(
        b"HTTP/1.1 302 Moved\r\nLocation: /x\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nX-Own: 1\r\nContent-Length: 3\r\n"
        b"Connection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\nProxy-Authenticate: Basic\r\n\r\nabc"
    )
    answer = visitor.answer()
    assert (answer.status, answer.body, answer.whole) == (302, b"abc", True)
    assert (answer.headers["Location"], answer.headers["X-Own"]) == ("/x", "1")
    assert answer.fields("Set-Cookie") == ["a=b", "c=d"]
    for name in ("Connection", "X-Hop", "Keep-Alive", "Proxy-Authenticate"):
        assert name not in answer.headers, name
    logged = visitor.logged[0]
    assert (logged.host, logged.path, logged.status, logged.size, logged.verdict) == (
        "web.example:80",
        "/a%20b",
        302,
        3,
        "PASS",
    )


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_streams_through(enter: Any, house: House, framing: str) -> None:
    visitor = enter()
    chunked = framing == "chunked"
    fields = [("Transfer-Encoding", "chunked")] if chunked else [("Content-Length", "10")]
    visitor.request("POST", "http://web.example:8080/form", [*fields, ("Expect", "100-continue")])
    assert visitor.received == b""  # until it is known that someone takes the body
    server = Recorded(house.net)
    assert server.address == ("192.0.2.7", 8080)
    assert visitor.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    sent = [line.lower() for line in server.head]
    assert "host: web.example:8080" in sent
    assert ("transfer-encoding: chunked" if chunked else "content-length: 10") in sent
    assert not [line for line in sent if line.startswith("expect")]
    visitor.send(b"5\r\n01234\r\n" if chunked else b"01234")
    assert server.body == (b"5\r\n01234\r\n" if chunked else b"01234")
    visitor.send(b"5;x=y\r\n56789\r\n0\r\nX-Trailer: 1\r\n\r\n" if chunked else b"56789")
    assert server.body == (b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n" if chunked else b"0123456789")
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert visitor.answer(start=len(b"HTTP/1.1 100 Continue\r\n\r\n")).body == b"ok"


def test_two_requests_in_one_are_not_smuggled(enter: Any, house: House) -> None:
    """A body is what its framing says: what is behind it is the next request, for which the policy is asked anew."""
    visitor = enter()
    inner = b"GET http://forbidden.example/ HTTP/1.1\r\nHost: x\r\n\r\n"
    visitor.request("POST", "http://web.example/", [("Content-Length", "3")], b"abc" + inner)
    server = Recorded(house.net)
    assert server.body == b"abc"
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    first, second = visitor.answers("POST", "GET")
    assert (first.status, second.status) == (200, 403)


def test_an_answer_with_more_in_it_is_not_smuggled(enter: Any, house: House) -> None:
    visitor = enter()
    visitor.request("GET", "http://web.example/")
    Recorded(house.net).protocol.dataReceived(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    )
    assert visitor.answer().body == b"ok"
    assert b"evil" not in visitor.received


def test_the_head_of_what_is_elsewhere(enter: Any, house: House) -> None:
    visitor = enter()
    visitor.request("HEAD", "http://web.example/large")
    Recorded(house.net).protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
    answer = visitor.answer("HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, "3000000")


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("http://web.example:22/", "TUNNEL_PORTS has no entry for port 22"),
        ("http://web.example:25/", "TUNNEL_PORTS has no entry for port 25"),
        ("http://127.0.0.1/", "TUNNEL_DENY (loopback)"),
        ("http://127.0.0.1:8080/", "TUNNEL_DENY (loopback)"),
        ("http://[::1]/", "TUNNEL_DENY (loopback)"),
        ("http://0.0.0.0/", "TUNNEL_DENY (loopback)"),
        ("http://[::ffff:169.254.169.254]/latest/meta-data/", "TUNNEL_DENY (link-local)"),
        ("http://169.254.169.254/latest/meta-data/", "TUNNEL_DENY (link-local)"),
        ("http://100.100.100.200/", "TUNNEL_DENY (metadata)"),
        ("http://cloud.example/latest/meta-data/", "TUNNEL_DENY (link-local)"),
        ("http://self.example/", "TUNNEL_DENY (loopback)"),
        ("http://six.example/", "TUNNEL_DENY (loopback)"),
        ("https://self.example/", "TUNNEL_DENY (loopback)"),
        ("http://forbidden.example/", "TUNNEL_DENY (forbidden.example)"),
        ("http://FORBIDDEN.example.:8080/", "TUNNEL_DENY (forbidden.example)"),
    ],
)
def test_where_nothing_is_forwarded_to(enter: Any, house: House, target: str, rule: str) -> None:
    visitor = enter()
    answer = visitor.ask("GET", target)
    assert answer.status == 403
    assert rule in sentence(answer)
    assert house.net.tcpClients == []
    # What a name resolves to is nothing to tell: it would map the inside of the network.
    if target.split("/")[2].endswith("example"):
        assert "127.0.0.1" not in sentence(answer) and "169.254" not in sentence(answer)


def test_of_several_addresses_only_those_that_are_allowed_are_tried(enter: Any, house: House) -> None:
    enter().request("GET", "http://two.example/")
    house.net.advance(1)
    assert [client[0] for client in house.net.tcpClients] == ["192.0.2.8"]


def test_only_some_destinations(enter: Any, house: House) -> None:
    answer = enter(allow="web.example").ask("GET", "http://other.example/")
    assert (answer.status, "TUNNEL_ALLOW" in sentence(answer)) == (403, True)
    enter(allow="web.example").request("GET", "http://web.example/")
    assert len(house.net.tcpClients) == 1


def test_a_body_that_is_refused_does_not_hide_the_answer(enter: Any) -> None:
    visitor = enter()
    answer = visitor.ask("POST", "http://forbidden.example/", [("Content-Length", "10000000")])
    assert (answer.status, answer.whole, answer.headers["Connection"]) == (403, True, "close")


def test_a_server_that_cannot_be_had(enter: Any, house: House) -> None:
    answer = enter().ask("GET", "http://nowhere.example/")
    assert (answer.status, "no such name" in sentence(answer)) == (502, True)
    visitor = enter()
    visitor.request("GET", "http://slow.example/")
    house.net.advance(21)
    answer = visitor.answer()
    assert (answer.status, "timed out" in sentence(answer)) == (504, True)


def test_an_answer_that_breaks_off_is_broken_off(enter: Any, house: House) -> None:
    visitor = enter()
    visitor.request("GET", "http://web.example/")
    server = Recorded(house.net)
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    server.protocol.connectionLost(Failure(ConnectionDone()))
    visitor.run()
    assert (visitor.answer().whole, visitor.wire.aborted) == (False, True)


def test_an_answer_that_is_none(enter: Any, house: House) -> None:
    visitor = enter()
    visitor.request("GET", "http://web.example/")
    Recorded(house.net).protocol.dataReceived(b"SSH-2.0-OpenSSH\r\n\r\n")
    answer = visitor.answer()
    assert answer.status == 502
    assert "OpenSSH" not in sentence(answer)


def test_the_policy_is_asked_for_every_connection_anew() -> None:
    """A connection that was made for one name is not taken for another, whose rules may be other ones."""
    rules = policy()
    web, other = Permitted(rules, Host("web.example", 80)), Permitted(rules, Host("other.example", 80))
    assert web == Permitted(rules, Host("web.example", 80))
    assert hash(web) == hash(Permitted(rules, Host("web.example", 80)))
    assert web != other


# CONNECT


@pytest.mark.parametrize(
    "target",
    [
        "quay.io",
        "quay.io:",
        "quay.io:0",
        "quay.io:65536",
        "quay.io:443:443",
        "quay.io:443/",
        "quay.io:443?x",
        "quay.io:+443",
        "quay.io:0x1bb",
        "user:secret@quay.io:443",
        "@quay.io:443",
        "https://quay.io:443",
        "/v2/",
        "/",
        "*",
        ":443",
        "[::1]",
        "[::1:443",
        "[quay.io]:443",
        "::1:443",
        "2130706433:443",
        "0177.0.0.1:443",
        "127.1:443",
    ],
)
def test_a_malformed_connect(enter: Any, house: House, target: str) -> None:
    visitor = enter()
    answer = visitor.ask("CONNECT", target)
    assert (answer.status, answer.headers["Connection"]) == (400, "close")
    assert sentence(answer)
    assert house.net.tcpClients == []
    assert visitor.wire.closed
    assert b"secret" not in visitor.received
    assert "secret" not in f"{visitor.logged[0].host}{visitor.logged[0].path}"


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("web.example:22", "TUNNEL_PORTS has no entry for port 22"),
        ("web.example:80", "TUNNEL_PORTS has no entry for port 80"),
        ("quay.io:8443", "TUNNEL_PORTS has no entry for port 8443"),
        ("127.0.0.1:443", "TUNNEL_DENY (loopback)"),
        ("[::1]:443", "TUNNEL_DENY (loopback)"),
        ("[::ffff:127.0.0.1]:443", "TUNNEL_DENY (loopback)"),
        ("169.254.169.254:443", "TUNNEL_DENY (link-local)"),
        ("cloud.example:443", "TUNNEL_DENY (link-local)"),
        ("self.example:443", "TUNNEL_DENY (loopback)"),
        ("six.example:443", "TUNNEL_DENY (loopback)"),
        ("forbidden.example:443", "TUNNEL_DENY (forbidden.example)"),
    ],
)
def test_where_no_tunnel_goes(enter: Any, house: House, target: str, rule: str) -> None:
    visitor = enter()
    answer = visitor.ask("CONNECT", target)
    assert (answer.status, answer.headers["Connection"]) == (403, "close")
    assert rule in sentence(answer)
    assert house.net.tcpClients == []
    assert visitor.wire.closed
    assert (visitor.logged[0].status, visitor.logged[0].path) == (403, "")


def test_a_tunnel_to_what_cannot_be_had(enter: Any, house: House) -> None:
    answer = enter().ask("CONNECT", "nowhere.example:443")
    assert (answer.status, "no such name" in sentence(answer)) == (502, True)
    visitor = enter()
    visitor.request("CONNECT", "slow.example:443")
    house.net.advance(21)
    answer = visitor.answer()
    assert (answer.status, "slow.example:443: timed out" in sentence(answer)) == (504, True)


@pytest.mark.parametrize(("method", "target"), [("CONNECT", "web.example:443"), ("GET", "http://web.example/")])
def test_a_client_that_leaves_ends_the_attempt(enter: Any, house: House, method: str, target: str) -> None:
    visitor = enter()
    visitor.request(method, target)
    assert len(house.net.tcpClients) == 1
    visitor.disconnect()
    assert house.net.connectors[0].stoppedConnecting
    assert [request.status for request in visitor.logged] == [0]
    assert house.logged == []


def test_what_is_sent_behind_a_refused_connect_is_no_request(enter: Any, house: House) -> None:
    visitor = enter()
    inner = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    visitor.send(b"CONNECT forbidden.example:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n" + inner)
    assert visitor.received.count(b"HTTP/1.1 ") == 1
    assert house.answered == []


def test_errors_of_upstreams_are_told_plainly(visit: Any) -> None:
    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def request(self, *args: Any, **kwargs: Any) -> Any:
            raise self.error

    for error in (UpstreamBroken("web.example:80: broke off"), UpstreamUnreachable("web.example:80: refused")):
        door = House(upstream=Failing(error)).door()

        async def handle(request: Request, door: FrontDoor = door) -> None:
            await door.handle(None, request)  # type: ignore[arg-type]

        answer = visit(handle).ask("GET", "http://web.example/")
        assert (answer.status, sentence(answer)) == (502, f"{error.message}\n")
