"""Tests for the forward proxy in memory: dispatch, refusals and forwarding."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import define, field
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure

from dockerproxy.daemon.transfers import Transfers
from dockerproxy.errors import UpstreamBroken, UpstreamUnreachable
from dockerproxy.http.request import Request
from dockerproxy.http.tunnel import Tunnels, TunnelTimeouts
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.net.dial import Dialer
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.forward_proxy import DestinationCheck, ForwardProxy, Interception
from dockerproxy.proxy.login import ProxyLogin
from dockerproxy.proxy.policy import Policy
from dockerproxy.upstream.agent import Agent, UpstreamTimeouts
from dockerproxy.upstream.tls import ClientContext
from tests.support.resolvers import StaticResolver

QUAY = Registry.parse("quay.io")
PLAIN = Registry.parse("http://plain.example:5000")
PORT = 3128

OWN_ADDRESSES = ("203.0.113.7", "2001:db8::7")
NAMES = {
    "own.example": ["203.0.113.7"],
    "web.example": ["192.0.2.7"],
    "two.example": ["127.0.0.1", "192.0.2.8"],
    "cloud.example": ["169.254.169.254"],
    "self.example": ["127.0.0.1", "::1"],
    "six.example": ["::ffff:127.0.0.1"],
    "forbidden.example": ["192.0.2.9"],
}


def make_policy(**changes: str) -> Policy:
    rules = {
        "clients": "private loopback link-local",
        "ports": "443",
        "allow": "all",
        "deny": "loopback link-local metadata forbidden.example",
    } | changes
    return Policy(
        AddressSet.parse(rules["clients"]),
        frozenset(int(port) for port in rules["ports"].split()),
        Destinations.parse(rules["allow"]),
        Destinations.parse(rules["deny"]),
        lambda address: str(address) in OWN_ADDRESSES,
    )


@define
class ProxyHarness:
    """A forward proxy with fake handlers, and a record of the requests that they received."""

    reactor: MemoryReactorClock = field(factory=MemoryReactorClock)
    resolver: StaticResolver = field(factory=lambda: StaticResolver(NAMES))
    handled: list[tuple[str, str, str, str]] = field(factory=list)  # handler, method, path, query
    closed_tunnels: list[tuple[Request, float]] = field(factory=list)
    agent: Any = None

    def make_proxy(self, **changes: str) -> ForwardProxy:
        async def registry(registry: Registry, request: Request) -> None:
            self.handled.append((str(registry), request.method, request.path, request.query))
            request.respond(200, [], b"registry")

        def respond_with(name: str) -> Any:
            async def response(request: Request) -> None:
                self.handled.append((name, request.method, request.path, request.query))
                request.respond(200, [], name.encode())

            return response

        def no_context(host: object) -> Any:
            raise AssertionError("no TLS in memory")

        dialer, login = Dialer(self.reactor, self.resolver, connect_timeout=20), ProxyLogin(None)
        return ForwardProxy(
            circles=None,
            policy=make_policy(**changes),
            login=login,
            interception=Interception({QUAY.host: QUAY, PLAIN.host: PLAIN}, no_context, registry),
            dialer=dialer,
            agent=self.agent or Agent(self.reactor, dialer, ClientContext(verify=False), UpstreamTimeouts(20, 20, 20)),
            local=respond_with("local"),
            hosted=respond_with("hosted"),
            hosted_names=frozenset({"docker-registry.local"}),
            hosted_context_for=no_context,
            registry_ports=frozenset({5443}),
            registry_http_ports=frozenset({5000}),
            tunnels=Tunnels(
                self.reactor,
                TunnelTimeouts(),
                Transfers(),
                login.allows,
                lambda request, seconds: self.closed_tunnels.append((request, seconds)),
            ),
        )


@pytest.fixture
def harness() -> ProxyHarness:
    return ProxyHarness()


@pytest.fixture
def connect(connect_client: Any, harness: ProxyHarness) -> Any:
    """Return a function that connects an HTTP client to the forward proxy."""

    def make(client: str = "10.1.2.3", **changes: str) -> Any:
        proxy = harness.make_proxy(**changes)
        http_client: Any = None

        async def handle(request: Request) -> None:
            request.port = PORT  # because the in-memory transport has another one
            await proxy.handle(http_client.site, request)

        http_client = connect_client(handle, clock=harness.reactor, client=client)
        return http_client

    return make


def error_text(response: Any) -> str:
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.body.endswith(b"\n")
    text: str = response.body.decode()
    return text


# ALLOW_CLIENTS


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
def test_clients_outside_allow_clients_are_refused(
    connect: Any, harness: ProxyHarness, client: str, method: str, target: str
) -> None:
    http_client = connect(client)
    response = http_client.fetch(method, target)
    assert response.status == 403
    assert "ALLOW_CLIENTS" in error_text(response)
    assert client in error_text(response)
    assert harness.handled == []
    assert harness.reactor.tcpClients == []


def test_clients_in_allow_clients_are_served(connect: Any) -> None:
    for client in ("10.1.2.3", "192.168.1.1", "127.0.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "fd00::1"):
        assert connect(client).fetch("GET", "/").status == 200, client
    assert connect("8.8.8.8", clients="8.8.8.0/24").fetch("GET", "/").status == 200
    assert connect("10.1.2.3", clients="8.8.8.0/24").fetch("GET", "/").status == 403


# origin-form, and absolute-form


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/", ("local", "/", "")),
        ("/v2/a/tags/list?n=1", ("local", "/v2/a/tags/list", "n=1")),
        ("//web.example/", ("local", "//web.example/", "")),
        ("http://docker-registry.local:3128/ca.crt?x=1", ("local", "/ca.crt", "x=1")),
        ("HTTP://Docker-Registry.LOCAL:3128", ("local", "/", "")),
        ("http://docker-registry.local/v2/", ("hosted", "/v2/", "")),
        ("https://docker-registry.local/v2/", ("hosted", "/v2/", "")),
        ("https://quay.io/v2/?a=b%20c", ("quay.io", "/v2/", "a=b%20c")),
        ("https://QUAY.io:443/v2/", ("quay.io", "/v2/", "")),
        ("http://quay.io:443/v2/", ("quay.io", "/v2/", "")),
        ("http://plain.example:5000/v2/", ("plain.example:5000", "/v2/", "")),
        ("https://quay.io?x", ("quay.io", "/", "x")),
    ],
)
def test_dispatch_by_target(connect: Any, harness: ProxyHarness, target: str, expected: tuple[str, str, str]) -> None:
    http_client = connect()
    assert http_client.fetch("GET", target).status == 200
    handler, path, query = expected
    assert harness.handled == [(handler, "GET", path, query)]


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
def test_invalid_target_is_refused(connect: Any, harness: ProxyHarness, target: str, method: str) -> None:
    http_client = connect()
    response = http_client.fetch(method, target)
    assert response.status == 400
    assert error_text(response)
    assert harness.handled == []
    assert harness.reactor.tcpClients == []
    assert "secret" not in http_client.received.decode()
    finished_request = http_client.finished_requests[0]
    assert "secret" not in f"{finished_request.host}{finished_request.path}{finished_request.query}"


# forwarding


class ServerConnection:
    """The server side of the proxy's connection number `attempt`."""

    def __init__(self, reactor: MemoryReactorClock, attempt: int = 0) -> None:
        self.address = reactor.tcpClients[attempt][:2]
        self.transport = StringTransport(lenient=True)
        self.protocol = reactor.tcpClients[attempt][2].buildProtocol(None)
        self.protocol.makeConnection(self.transport)

    @property
    def head(self) -> list[str]:
        return self.transport.value().partition(b"\r\n\r\n")[0].decode().split("\r\n")

    @property
    def body(self) -> bytes:
        return bytes(self.transport.value().partition(b"\r\n\r\n")[2])


def test_request_and_response_are_forwarded(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
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
        ("Accept-Encoding", "gzip, br"),
    ]
    http_client.send_request("GET", "http://web.example/a%20b?c=%2F&&d", fields)
    server = ServerConnection(harness.reactor)
    assert server.address == ("192.0.2.7", 80)
    assert server.head[0] == "GET /a%20b?c=%2F&&d HTTP/1.1"
    sent = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in server.head[1:]}
    assert sent.pop("user-agent")
    assert sent == {
        "host": "web.example",
        "authorization": "Basic theirs",  # for the server, unlike Proxy-Authorization
        "cookie": "theirs=1",
        "x-end": "2",
        "accept-encoding": "gzip, br",
    }
    server.protocol.dataReceived(
        b"HTTP/1.1 302 Moved\r\nLocation: /x\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nX-Own: 1\r\nContent-Length: 3\r\n"
        b"Connection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\nProxy-Authenticate: Basic\r\n\r\nabc"
    )
    response = http_client.read_response()
    assert (response.status, response.body, response.complete) == (302, b"abc", True)
    assert (response.headers["Location"], response.headers["X-Own"]) == ("/x", "1")
    assert response.fields("Set-Cookie") == ["a=b", "c=d"]
    for name in ("Connection", "X-Hop", "Keep-Alive", "Proxy-Authenticate"):
        assert name not in response.headers, name
    finished_request = http_client.finished_requests[0]
    assert (finished_request.host, finished_request.path) == ("web.example:80", "/a%20b")
    assert (finished_request.status, finished_request.bytes_sent, finished_request.cache_status) == (302, 3, "PASS")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_request_body_is_streamed(connect: Any, harness: ProxyHarness, framing: str) -> None:
    http_client = connect()
    chunked = framing == "chunked"
    fields = [("Transfer-Encoding", "chunked")] if chunked else [("Content-Length", "10")]
    http_client.send_request("POST", "http://web.example:8080/form", [*fields, ("Expect", "100-continue")])
    assert http_client.received == b""  # because no server accepts the body yet
    server = ServerConnection(harness.reactor)
    assert server.address == ("192.0.2.7", 8080)
    assert http_client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    sent = [line.lower() for line in server.head]
    assert "host: web.example:8080" in sent
    assert ("transfer-encoding: chunked" if chunked else "content-length: 10") in sent
    assert not [line for line in sent if line.startswith("expect")]
    http_client.send(b"5\r\n01234\r\n" if chunked else b"01234")
    assert server.body == (b"5\r\n01234\r\n" if chunked else b"01234")
    http_client.send(b"5;x=y\r\n56789\r\n0\r\nX-Trailer: 1\r\n\r\n" if chunked else b"56789")
    assert server.body == (b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n" if chunked else b"0123456789")
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert http_client.read_response(start=len(b"HTTP/1.1 100 Continue\r\n\r\n")).body == b"ok"


def test_pipelined_request_in_body_is_not_smuggled(connect: Any, harness: ProxyHarness) -> None:
    """The framing delimits the body. The bytes after it are the next request, which the policy checks again."""
    http_client = connect()
    inner = b"GET http://forbidden.example/ HTTP/1.1\r\nHost: x\r\n\r\n"
    http_client.send_request("POST", "http://web.example/", [("Content-Length", "3")], b"abc" + inner)
    server = ServerConnection(harness.reactor)
    assert server.body == b"abc"
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    first, second = http_client.read_responses("POST", "GET")
    assert (first.status, second.status) == (200, 403)


def test_trailing_response_is_not_smuggled(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
    http_client.send_request("GET", "http://web.example/")
    ServerConnection(harness.reactor).protocol.dataReceived(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    )
    assert http_client.read_response().body == b"ok"
    assert b"evil" not in http_client.received


def test_head_request_is_forwarded(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
    http_client.send_request("HEAD", "http://web.example/large")
    ServerConnection(harness.reactor).protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
    response = http_client.read_response("HEAD")
    assert (response.status, response.headers["Content-Length"]) == (200, "3000000")


@pytest.mark.parametrize(
    ("target", "handler"),
    [
        (f"http://203.0.113.7:{PORT}/healthz", "local"),
        (f"http://own.example:{PORT}/healthz", "local"),
        ("http://203.0.113.7:5000/healthz", "hosted"),
        ("http://[2001:db8::7]:5000/healthz", "hosted"),
        ("http://own.example:5000/healthz", "hosted"),
    ],
)
def test_our_own_ports_are_served_without_a_connection(
    connect: Any, harness: ProxyHarness, target: str, handler: str
) -> None:
    assert connect().fetch("GET", target).body.decode() == handler
    assert harness.handled == [(handler, "GET", "/healthz", "")]
    assert harness.reactor.tcpClients == []


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
        ("http://203.0.113.7/", "TUNNEL_DENY (loopback)"),
        ("http://203.0.113.7:5443/", "TUNNEL_DENY (loopback)"),  # a port with TLS
        ("http://[2001:db8::7]:9090/", "TUNNEL_DENY (loopback)"),
        ("http://own.example:9090/", "TUNNEL_DENY (loopback)"),
        ("http://six.example/", "TUNNEL_DENY (loopback)"),
        ("https://self.example/", "TUNNEL_DENY (loopback)"),
        ("http://forbidden.example/", "TUNNEL_DENY (forbidden.example)"),
        ("http://FORBIDDEN.example.:8080/", "TUNNEL_DENY (forbidden.example)"),
    ],
)
def test_forbidden_destinations_are_refused(connect: Any, harness: ProxyHarness, target: str, rule: str) -> None:
    http_client = connect()
    response = http_client.fetch("GET", target)
    assert response.status == 403
    assert rule in error_text(response)
    assert harness.reactor.tcpClients == []
    # An error must not contain the address of a name, because clients could map the internal network with it.
    if target.split("/")[2].endswith("example"):
        assert "127.0.0.1" not in error_text(response) and "169.254" not in error_text(response)


def test_only_allowed_addresses_are_dialled(connect: Any, harness: ProxyHarness) -> None:
    connect().send_request("GET", "http://two.example/")
    harness.reactor.advance(1)
    assert [client[0] for client in harness.reactor.tcpClients] == ["192.0.2.8"]


def test_tunnel_allow_limits_destinations(connect: Any, harness: ProxyHarness) -> None:
    response = connect(allow="web.example").fetch("GET", "http://other.example/")
    assert (response.status, "TUNNEL_ALLOW" in error_text(response)) == (403, True)
    connect(allow="web.example").send_request("GET", "http://web.example/")
    assert len(harness.reactor.tcpClients) == 1


def test_response_to_a_refused_body_is_delivered(connect: Any) -> None:
    http_client = connect()
    response = http_client.fetch("POST", "http://forbidden.example/", [("Content-Length", "10000000")])
    assert (response.status, response.complete, response.headers["Connection"]) == (403, True, "close")


def test_unreachable_server_is_a_gateway_error(connect: Any, harness: ProxyHarness) -> None:
    response = connect().fetch("GET", "http://nowhere.example/")
    assert (response.status, "no such name" in error_text(response)) == (502, True)
    http_client = connect()
    http_client.send_request("GET", "http://slow.example/")
    harness.reactor.advance(21)
    response = http_client.read_response()
    assert (response.status, "timed out" in error_text(response)) == (504, True)


def test_truncated_response_aborts_the_client(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
    http_client.send_request("GET", "http://web.example/")
    server = ServerConnection(harness.reactor)
    server.protocol.dataReceived(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    server.protocol.connectionLost(Failure(ConnectionDone()))
    http_client.advance()
    assert (http_client.read_response().complete, http_client.transport.aborted) == (False, True)


def test_invalid_response_is_a_gateway_error(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
    http_client.send_request("GET", "http://web.example/")
    ServerConnection(harness.reactor).protocol.dataReceived(b"SSH-2.0-OpenSSH\r\n\r\n")
    response = http_client.read_response()
    assert response.status == 502
    assert "OpenSSH" not in error_text(response)


def test_destination_checks_compare_by_host() -> None:
    """A connection made for one name must not be reused for another, because other rules may apply to that."""
    rules = make_policy()
    web, other = DestinationCheck(rules, Host("web.example", 80)), DestinationCheck(rules, Host("other.example", 80))
    assert web == DestinationCheck(rules, Host("web.example", 80))
    assert hash(web) == hash(DestinationCheck(rules, Host("web.example", 80)))
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
def test_malformed_connect_target_is_refused(connect: Any, harness: ProxyHarness, target: str) -> None:
    http_client = connect()
    response = http_client.fetch("CONNECT", target)
    assert (response.status, response.headers["Connection"]) == (400, "close")
    assert error_text(response)
    assert harness.reactor.tcpClients == []
    assert http_client.transport.closed
    assert b"secret" not in http_client.received
    assert "secret" not in f"{http_client.finished_requests[0].host}{http_client.finished_requests[0].path}"


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
        ("203.0.113.7:443", "TUNNEL_DENY (loopback)"),
        ("own.example:443", "TUNNEL_DENY (loopback)"),
        ("six.example:443", "TUNNEL_DENY (loopback)"),
        ("forbidden.example:443", "TUNNEL_DENY (forbidden.example)"),
    ],
)
def test_forbidden_tunnels_are_refused(connect: Any, harness: ProxyHarness, target: str, rule: str) -> None:
    http_client = connect()
    response = http_client.fetch("CONNECT", target)
    assert (response.status, response.headers["Connection"]) == (403, "close")
    assert rule in error_text(response)
    assert harness.reactor.tcpClients == []
    assert http_client.transport.closed
    assert (http_client.finished_requests[0].status, http_client.finished_requests[0].path) == (403, "")


def test_tunnel_to_an_unreachable_server_is_a_gateway_error(connect: Any, harness: ProxyHarness) -> None:
    response = connect().fetch("CONNECT", "nowhere.example:443")
    assert (response.status, "no such name" in error_text(response)) == (502, True)
    http_client = connect()
    http_client.send_request("CONNECT", "slow.example:443")
    harness.reactor.advance(21)
    response = http_client.read_response()
    assert (response.status, "slow.example:443: timed out" in error_text(response)) == (504, True)


@pytest.mark.parametrize(("method", "target"), [("CONNECT", "web.example:443"), ("GET", "http://web.example/")])
def test_client_disconnect_cancels_the_attempt(connect: Any, harness: ProxyHarness, method: str, target: str) -> None:
    http_client = connect()
    http_client.send_request(method, target)
    assert len(harness.reactor.tcpClients) == 1
    http_client.disconnect()
    assert harness.reactor.connectors[0].stoppedConnecting
    assert [request.status for request in http_client.finished_requests] == [0]
    assert harness.closed_tunnels == []


def test_bytes_after_a_refused_connect_are_not_parsed(connect: Any, harness: ProxyHarness) -> None:
    http_client = connect()
    inner = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    http_client.send(b"CONNECT forbidden.example:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n" + inner)
    assert http_client.received.count(b"HTTP/1.1 ") == 1
    assert harness.handled == []


def test_upstream_errors_are_plain_text(connect_client: Any) -> None:
    class FailingAgent:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def request(self, *args: Any, **kwargs: Any) -> Any:
            raise self.error

    for error in (UpstreamBroken("web.example:80: broke off"), UpstreamUnreachable("web.example:80: refused")):
        proxy = ProxyHarness(agent=FailingAgent(error)).make_proxy()

        async def handle(request: Request, proxy: ForwardProxy = proxy) -> None:
            await proxy.handle(None, request)  # type: ignore[arg-type]

        response = connect_client(handle).fetch("GET", "http://web.example/")
        assert (response.status, error_text(response)) == (502, f"{error.message}\n")
