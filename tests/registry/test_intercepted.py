"""Upstream registries, intercepted and as a mirror, over a fake `UpstreamRegistry`."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from dockerproxy.daemon.transfers import Transfers
from dockerproxy.errors import (
    BlobUnknown,
    Unauthorized,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.http.cross_origin import CrossOriginProtection
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.http.tunnel import Tunnels, TunnelTimeouts
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.manifests import EMPTY_INDEX, OCI_INDEX
from dockerproxy.oci.names import Digest, Host, Registry, Repository
from dockerproxy.oci.referrers import ReferrersIndex
from dockerproxy.proxy.host_rule import HostRule
from dockerproxy.proxy.router import BrowserProtection, Router
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.intercepted import Intercepted, Mirror
from dockerproxy.registry.namespaces import NamespacedRegistries
from dockerproxy.registry.responses import respond_error

QUAY = Registry.parse("quay.io")
HUB = Registry.parse("registry-1.docker.io")
PORTED = Registry.parse("registry.example:5000")
PLAIN = Registry.parse("http://plain.example:8080")
MIRRORED = {registry.host: registry for registry in (QUAY, HUB, PORTED, PLAIN)} | {Host.parse("docker.io"): HUB}
DIGEST = Digest.of(b"x")

WRITES = [
    ("POST", "/v2/a/b/blobs/uploads/"),
    ("PATCH", "/v2/a/b/blobs/uploads/session"),
    ("PUT", "/v2/a/b/blobs/uploads/session?digest=x"),
    ("PUT", "/v2/a/b/manifests/latest"),
    ("DELETE", "/v2/a/b/manifests/latest"),
    ("DELETE", f"/v2/a/b/blobs/{DIGEST}"),
    ("POST", "/v2/"),
    ("PUT", "/v2/_catalog"),
    ("POST", "/v2/a/b/tags/list"),
    ("DELETE", "/v2/a/b/tags/reference/latest"),
    ("POST", "/v2/some/thing/unknown"),
    ("PROPFIND", "/v2/a/b/manifests/latest"),
]


@pytest.fixture
def connect_intercepted(connect_client: Any, upstream: Any) -> Any:
    """Return a function that connects a client to an intercepted registry."""

    def make(
        allow_push: bool = False, registry: Registry = QUAY, tunnels: Tunnels | None = None, **options: Any
    ) -> Any:
        clock = Clock() if tunnels is None else tunnels.clock
        intercepted = Intercepted(
            RegistryAPI(clock),
            upstream.open_registry,
            upstream,
            CrossOriginProtection(),
            tunnels or make_tunnels(clock),
            allow_push=allow_push,
        )
        return connect_client(
            lambda request: intercepted.handle(registry, request), clock=clock, **{"secure": True, **options}
        )

    return make


@pytest.fixture
def connect_mirror(connect_client: Any, upstream: Any) -> Any:
    """Return a function that connects a client to the mirror."""

    def make(**options: Any) -> Any:
        clock = Clock()
        mirror = Mirror(RegistryAPI(clock), upstream.open_registry, MIRRORED, HUB, CrossOriginProtection())
        registries = NamespacedRegistries(
            None,  # type: ignore[arg-type]
            mirror.handle,
            frozenset(),
            MIRRORED,
            has_no_repository,
            mirror_by_default=True,
        )
        return connect_client(registries.handle, clock=clock, **options)

    return make


def make_tunnels(
    clock: Clock, finished: list[Request] | None = None, allowed: list[str | None] | None = None
) -> Tunnels:
    """Return tunnels that add requests which have ended to `finished`. Without `allowed`, all users may go on."""
    requests = [] if finished is None else finished
    return Tunnels(
        clock,
        TunnelTimeouts(read=60, send=60),
        Transfers(),
        lambda user: allowed is None or user in allowed,
        lambda request, seconds: requests.append(request),
    )


async def has_no_repository(repository: Repository) -> bool:
    return False


def error_code(response: Any) -> str:
    value = json.loads(response.body)["errors"][0]["code"]
    assert isinstance(value, str)
    return value


# interception: pulling


def test_authorization_opens_the_registry(connect_intercepted: Any, upstream: Any, fake_content: Any) -> None:
    digest = upstream.put(fake_content(b"layer"))
    client = connect_intercepted()
    assert client.fetch("GET", f"/v2/a/b/blobs/{digest}").body == b"layer"
    upstream.put(fake_content(b"layer"))
    client.fetch("GET", f"/v2/a/b/blobs/{digest}", [("Authorization", "Bearer client")])
    assert upstream.open_calls == [(QUAY, None), (QUAY, "Bearer client")]
    assert [request.host for request in client.finished_requests] == ["quay.io", "quay.io"]


def test_the_coroutine_that_streams_is_not_wrapped(connect_client: Any, upstream: Any, fake_content: Any) -> None:
    """Every coroutine around it costs memory for each slow client."""
    clock, names = Clock(), []
    intercepted = Intercepted(
        RegistryAPI(clock),
        upstream.open_registry,
        upstream,
        CrossOriginProtection(),
        make_tunnels(clock),
        allow_push=False,
    )
    mirror = Mirror(RegistryAPI(clock), upstream.open_registry, MIRRORED, HUB, CrossOriginProtection())
    registries = NamespacedRegistries(None, mirror.handle, frozenset(), MIRRORED, has_no_repository, True)  # type: ignore[arg-type]
    protection = BrowserProtection(HostRule(allowed=None), CrossOriginProtection())
    router = Router(registries.handle, {}, protection, respond_error)
    for handler in (partial(intercepted.handle, QUAY), router.handle):

        def handle(request: Request, handler: Any = handler) -> Any:
            coroutine = handler(request)
            names.append(coroutine.cr_code.co_qualname)
            return coroutine

        digest = upstream.put(fake_content(b"layer"))
        assert connect_client(handle, clock=clock).fetch("GET", f"/v2/a/b/blobs/{digest}").body == b"layer"
    assert names == ["RegistryAPI._blob"] * 2


def test_cache_status_of_every_kind_of_response(connect_intercepted: Any, upstream: Any, fake_content: Any) -> None:
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, b"{}", "REVALIDATED")
    upstream.referrers_result = ReferrersIndex(EMPTY_INDEX, False, "PASS")
    upstream.realms = {("quay.io", "/token"): QUAY}
    upstream.cache_status = "JOINED"
    blob = upstream.put(fake_content(b"layer"))
    for path, expected, x_cache in [
        (f"/v2/a/b/blobs/{blob}", ["docker-registry-proxy;fwd=miss;collapsed"], ["JOINED"]),
        ("/v2/a/b/manifests/latest", ["docker-registry-proxy;fwd=stale"], ["REVALIDATED"]),
        (f"/v2/a/b/referrers/{DIGEST}", ["docker-registry-proxy;fwd=bypass"], ["PASS"]),
        ("/v2/a/b/tags/list", ["docker-registry-proxy;fwd=bypass"], ["PASS"]),
        ("/token", [], ["PASS"]),  # the response may be one of ours
        ("/v2/", [], []),
    ]:
        response = connect_intercepted().fetch("GET", path)
        assert (response.status, response.fields("Cache-Status")) == (200, expected), path
        assert response.fields("X-Cache") == x_cache, path


def test_manifest_comes_from_upstream(connect_intercepted: Any, upstream: Any) -> None:
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, b"{}", "HIT")
    response = connect_intercepted().fetch("GET", "/v2/a/b/manifests/latest", [("Accept", OCI_INDEX)])
    assert (response.status, response.body) == (200, b"{}")
    assert upstream.calls == [("a/b", "latest", [OCI_INDEX], False)]


@pytest.mark.parametrize(("method", "content"), [("GET", b"{}"), ("HEAD", b"{}"), ("HEAD", None)])
def test_rate_limit_fields_of_a_manifest(
    connect_intercepted: Any, upstream: Any, method: str, content: bytes | None
) -> None:
    fields = (("ratelimit-remaining", "99;w=21600"), ("docker-ratelimit-source", "192.0.2.1"))
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, content, "MISS", fields)
    response = connect_intercepted().fetch(method, "/v2/a/b/manifests/latest")
    assert [(name, *response.fields(name)) for name, _ in fields] == list(fields)


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_ping(connect_intercepted: Any, upstream: Any, path: str) -> None:
    for method in ("GET", "HEAD"):
        response = connect_intercepted().fetch(method, path)
        assert (response.status, response.headers["Docker-Distribution-Api-Version"]) == (200, "registry/2.0")
        assert response.body == (b"{}" if method == "GET" else b"")
    upstream.ping_error = Unauthorized("authentication required")
    response = connect_intercepted().fetch("GET", "/v2/")
    assert (response.status, error_code(response)) == (401, "UNAUTHORIZED")
    assert response.fields("WWW-Authenticate") == ['Bearer remembered,realm="https://ours/token"']
    assert upstream.forwarded_requests == []


@pytest.mark.parametrize("error", [UpstreamUnreachable("quay.io:443: no such name"), UpstreamTimeout("quay.io: late")])
def test_a_failed_ping_of_containers_image(connect_intercepted: Any, upstream: Any, error: UpstreamUnreachable) -> None:
    """It prints only the status of a failed ping. After a 401 without a challenge it requests the manifest."""
    upstream.ping_error = error
    for user_agent in ("containers/5.22 (github.com/containers/image)", "skopeo/1.9.3", "bootc/1 skopeo/1.9.3"):
        response = connect_intercepted().fetch("GET", "/v2/", [("User-Agent", user_agent)])
        assert (response.status, response.fields("WWW-Authenticate")) == (401, [])
        assert error.message.encode() in response.body
    for user_agent in ("docker/28.0.0", "containerd/1.6", "mypodman/1"):
        response = connect_intercepted().fetch("GET", "/v2/", [("User-Agent", user_agent)])
        assert response.status == error.status
    upstream.ping_error = UpstreamRefused(403, b"no", [])
    response = connect_intercepted().fetch("GET", "/v2/", [("User-Agent", "skopeo/1.9.3")])
    assert (response.status, response.body) == (403, b"no")


def test_a_401_carries_the_registrys_challenge_once(connect_intercepted: Any, upstream: Any) -> None:
    """The realm leads to us, with the scheme of the client's connection."""
    headers = [("www-authenticate", 'Bearer service="s"'), ("www-authenticate", "Basic realm2"), ("oci-own", "1")]
    upstream.error = UpstreamRefused(401, b"upstream words", headers)
    for secure, scheme in ((True, "https"), (False, "http"), (True, "https")):  # the same error object every time
        response = connect_intercepted(secure=secure).fetch("GET", f"/v2/a/b/blobs/{DIGEST}")
        assert (response.status, response.body, response.headers["OCI-Own"]) == (401, b"upstream words", "1")
        assert response.fields("WWW-Authenticate") == [
            f'Bearer service="s",realm="{scheme}://ours/token"',
            f'Basic realm2,realm="{scheme}://ours/token"',
        ]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_pull_during_outage_gets_a_challenge(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, method: str
) -> None:
    """A mirror has no logins, and sends none."""
    upstream.has_login, upstream.error = True, UpstreamUnreachable("gone")
    for path in ("blobs/" + str(DIGEST), "manifests/latest"):
        response = connect_intercepted().fetch(method, f"/v2/a/b/{path}")
        assert response.status == 401
        assert response.fields("WWW-Authenticate") == ['Bearer scope="a/b",realm="https://ours/token"']
        assert connect_mirror().fetch(method, f"/v2/a/b/{path}?ns=quay.io").status == 502


def test_only_401_carries_a_challenge(connect_intercepted: Any, upstream: Any) -> None:
    for error in (BlobUnknown("no"), UpstreamRefused(403, b"", [("www-authenticate", "Basic")])):
        upstream.error = error
        assert "WWW-Authenticate" not in connect_intercepted().fetch("GET", f"/v2/a/b/blobs/{DIGEST}").headers


@pytest.mark.parametrize("error", [UpstreamUnreachable("no such name"), UpstreamTimeout("timed out")])
def test_outage_is_reported(connect_intercepted: Any, upstream: Any, error: Any) -> None:
    upstream.error = upstream.response = error
    for path in (f"/v2/a/b/blobs/{DIGEST}", "/v2/a/b/tags/list", "/elsewhere"):
        response = connect_intercepted().fetch("GET", path)
        assert (response.status, error_code(response)) == (error.status, "UNAVAILABLE")
        assert error.message in response.body.decode()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/UPPER/manifests/latest", 400),
        (f"/v2/a/blobs/{DIGEST}x", 400),
        ("/v2/a/manifests/!", 400),
        ("/v2/a/../b/tags/list", 400),
        ("/v2/%2e%2e/api/users", 400),
        ("/v2/a%2fb/tags/list", 400),
        ("/v2/a/blobs/md5:abc", 400),
    ],
)
def test_malformed_name_is_not_forwarded(connect_intercepted: Any, upstream: Any, path: str, status: int) -> None:
    response = connect_intercepted(allow_push=True).fetch("GET", path)
    assert response.status == status
    assert json.loads(response.body)["errors"]
    assert upstream.forwarded_requests == upstream.calls == []


@pytest.mark.parametrize(
    "target",
    [
        ".example.com/v2/",
        "@example.com/v2/",
        ":8443/v2/",
        "example.com/v2/",
        "http://example.com/v2/",
        "https://user:password@quay.io/v2/",
        "*",
        "quay.io:443",
        "?x=/v2/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT"])
def test_invalid_request_target_is_not_forwarded(
    connect_intercepted: Any, upstream: Any, target: str, method: str
) -> None:
    """After `https://quay.io`, such a target would make the URL of another server:
    `https://quay.io.example.com/v2/`."""
    client = connect_intercepted(allow_push=True)
    response = client.fetch(method, target)
    assert (response.status, error_code(response)) == (400, "UNSUPPORTED")
    assert upstream.forwarded_requests == upstream.calls == upstream.token_calls == []
    assert "password" not in client.finished_requests[0].path
    assert b"password" not in client.received


# interception: forwarded requests


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/v2/a/b/tags/list?n=10&last=1%2E0%20x", "a/b"),
        ("/v2/_catalog?n=5&last=a%2Fb", None),
        ("/v2/a/b/blobs/uploads/session?x=%7E", "a/b"),
        ("/v2/some/thing/unknown?%41=b+c&&=", None),
        ("/api/v1/user?x=1", None),
        ("/", None),
        ("/v1/_ping", None),
    ],
)
def test_other_requests_are_forwarded_verbatim(
    connect_intercepted: Any, upstream: Any, target: str, name: str | None
) -> None:
    for method in ("GET", "HEAD"):
        client = connect_intercepted()
        response = client.fetch(method, target)
        assert (response.status, response.headers["X-Cache"]) == (200, "PASS")
        assert (upstream.forwarded_requests[-1].method, upstream.forwarded_requests[-1].path) == (method, target)
        assert upstream.forwarded_requests[-1].name == name
        assert client.finished_requests[0].cache_status == "PASS"
        upstream.response._remaining = b"from upstream"
    assert upstream.calls == []


# Changes of the protocol

WEBSOCKET = [("Connection", "keep-alive, Upgrade"), ("Upgrade", "h2c, websocket"), ("Sec-WebSocket-Key", "abc")]
SWITCH = [("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-accept", "xyz"), ("set-cookie", "a=b")]


class ServerTransport(StringTransport):
    """The transport of the server that speaks another protocol. It is in the test's hands when it closes."""

    def getHandle(self) -> Any:
        return FakeSocket()


class FakeSocket:
    def setsockopt(self, *arguments: Any) -> None: ...


class SwitchedResponse:
    """A response with the status 101. Its connection has brought `rest` after the head."""

    status, length = 101, None

    def __init__(self, rest: bytes = b"", error: Exception | None = None) -> None:
        self.headers = Headers(SWITCH)
        self.transport = ServerTransport()
        self.aborted = False
        self._rest = rest
        self._error = error

    def hand_over(self, protocol: Any) -> None:
        if self._error is not None:
            raise self._error
        self.transport.protocol = protocol
        protocol.makeConnection(self.transport)
        if self._rest:
            protocol.dataReceived(self._rest)

    def abort(self) -> None:
        self.aborted = True


def test_a_web_socket_becomes_a_tunnel(connect_intercepted: Any, upstream: Any) -> None:
    clock, finished = Clock(), []
    upstream.response = response = SwitchedResponse(rest=b"<hello>")
    client = connect_intercepted(tunnels=make_tunnels(clock, finished))
    client.send_request("GET", "/ws?x=1", [*WEBSOCKET, ("Authorization", "Bearer client"), ("Cookie", "session=1")])
    head, _, rest = client.received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    for line in (b"Connection: Upgrade", b"Upgrade: websocket", b"sec-websocket-accept: xyz", b"set-cookie: a=b"):
        assert head.count(line) == 1, line
    assert rest == b"<hello>"
    [forwarded] = upstream.forwarded_requests
    assert (forwarded.method, forwarded.path) == ("GET", "/ws?x=1")
    assert [value for name, value in forwarded.headers if name == "upgrade"] == ["websocket"]
    assert forwarded.headers.get("sec-websocket-key") == "abc"
    assert forwarded.headers.get("cookie") == "session=1"
    assert upstream.open_calls == [(QUAY, "Bearer client")]
    client.send(b"GET /v2/ HTTP/1.1\r\n\r\n")
    assert response.transport.value() == b"GET /v2/ HTTP/1.1\r\n\r\n"  # bytes like all others
    response.transport.protocol.dataReceived(b"<bye>")
    assert client.received.endswith(b"<hello><bye>")
    assert finished == []
    client.disconnect()
    assert response.transport.disconnecting
    response.transport.protocol.connectionLost(Failure(ConnectionDone()))
    [request] = finished
    assert (request.status, request.bytes_sent, request.cache_status, request.path) == (101, 12, "PASS", "/ws")


@pytest.mark.parametrize(
    ("path", "fields", "version"),
    [
        ("/v2/", WEBSOCKET, "1.1"),
        ("/v2/some/thing", WEBSOCKET, "1.1"),
        ("/v2/a/b/tags/list", WEBSOCKET, "1.1"),
        ("/V2/a", WEBSOCKET, "1.1"),
        ("/%76%32/x", WEBSOCKET, "1.1"),
        ("/x/../v2/y", WEBSOCKET, "1.1"),
        ("/ws", WEBSOCKET, "1.0"),
        ("/ws", WEBSOCKET[1:], "1.1"),
        ("/ws", [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")], "1.1"),
        ("/ws", [("Connection", "Upgrade"), ("Upgrade", "TLS/1.3, HTTP/2.0")], "1.1"),
    ],
)
def test_no_other_protocol_is_asked_for(
    connect_intercepted: Any, upstream: Any, path: str, fields: Any, version: str
) -> None:
    """Below /v2/ requests are ours to see; HTTP/2 and TLS would carry requests that nobody sees."""
    connect_intercepted().send_request("GET", path, fields, version=version)
    for forwarded in upstream.forwarded_requests:
        assert "upgrade" not in forwarded.headers
        assert "connection" not in forwarded.headers


def test_a_server_that_does_not_switch_answers_as_always(connect_intercepted: Any, upstream: Any) -> None:
    client = connect_intercepted()
    response = client.fetch("GET", "/ws", WEBSOCKET)
    assert (response.status, response.body) == (200, b"from upstream")
    assert "Upgrade" not in response.headers
    assert client.fetch("GET", "/", []).status == 200  # the connection goes on


def test_a_server_that_has_gone_after_it_switched_is_a_502(connect_intercepted: Any, upstream: Any) -> None:
    upstream.response = SwitchedResponse(error=UpstreamBroken("quay.io:443: closed the connection"))
    client = connect_intercepted()
    assert client.fetch("GET", "/ws", WEBSOCKET).status == 502
    assert upstream.response.aborted
    assert len(client.finished_requests) == 1


def test_a_web_socket_ends_with_its_user(connect_intercepted: Any, upstream: Any) -> None:
    """It is not one request, so that the users of the proxy are looked at again and again."""
    clock, allowed = Clock(), [None]
    upstream.response = SwitchedResponse()
    client = connect_intercepted(tunnels=make_tunnels(clock, allowed=allowed))
    client.send_request("GET", "/ws", WEBSOCKET)
    for _ in range(3):
        client.send(b"ping", 40)
        assert not client.transport.aborted
    allowed.clear()
    client.send(b"ping", 60)
    assert client.transport.aborted
    assert upstream.response.transport.disconnecting or upstream.response.transport.disconnected


def test_hop_by_hop_request_fields_are_not_forwarded(connect_intercepted: Any, upstream: Any) -> None:
    fields = [
        ("Authorization", "Bearer client"),
        ("Proxy-Authorization", "Basic proxy"),
        ("Proxy-Connection", "keep-alive"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("Accept-Encoding", "gzip"),
        ("Cookie", "session=1"),
        ("Accept", "application/json"),
        ("User-Agent", "docker/29"),
        ("If-None-Match", '"x"'),
    ]
    connect_intercepted().fetch("GET", "/v2/a/b/tags/list", fields)
    assert sorted(name for name, _ in upstream.forwarded_requests[0].headers) == [
        "accept",
        "if-none-match",
        "user-agent",
    ]
    assert upstream.open_calls == [(QUAY, "Bearer client")]  # the login is handled there


def test_hop_by_hop_response_fields_are_not_forwarded(
    connect_intercepted: Any, upstream: Any, fake_response: Any
) -> None:
    fields = [
        ("content-type", "application/json"),
        ("link", '</v2/a/b/tags/list?last=9>; rel="next"'),
        ("connection", "close, x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=5"),
        ("content-length", "13"),
        ("x-cache", "Hit from cloudfront"),
        ("cache-status", "OriginCache;hit, ExampleCDN;fwd=miss"),
        ("alt-svc", 'h3=":443"'),
        ("set-cookie", "session=of-our-own-login"),
    ]
    upstream.response = fake_response(200, fields, b"from upstream")
    response = connect_intercepted().fetch("GET", "/v2/a/b/tags/list")
    assert (response.body, response.fields("Content-Length")) == (b"from upstream", ["13"])
    assert response.fields("X-Cache") == ["PASS"]
    # RFC 9211, section 2: the existing members stay, and the last one is the cache next to the client.
    assert response.fields("Cache-Status") == [
        "OriginCache;hit, ExampleCDN;fwd=miss",
        "docker-registry-proxy;fwd=bypass",
    ]
    assert response.headers["Link"] == '</v2/a/b/tags/list?last=9>; rel="next"'
    for name in ("Connection", "X-Hop", "Keep-Alive", "Alt-Svc", "Set-Cookie"):
        assert name not in response.headers, name


def test_cookies_are_forwarded_outside_the_api_only(
    connect_intercepted: Any, upstream: Any, fake_response: Any
) -> None:
    """The web pages of quay.io have the same host name as its registry."""
    upstream.response = fake_response(200, [("set-cookie", "a=b"), ("set-cookie", "c=d")])
    response = connect_intercepted().fetch("GET", "/signin/", [("Cookie", "a=b"), ("Accept-Encoding", "br")])
    assert response.fields("Set-Cookie") == ["a=b", "c=d"]
    assert upstream.forwarded_requests[0].headers.get("cookie") == "a=b"
    assert upstream.forwarded_requests[0].headers.get("accept-encoding") == "br"


@pytest.mark.parametrize("status", [200, 204, 302, 304, 404, 416, 429, 500, 503])
def test_any_upstream_status_is_forwarded(
    connect_intercepted: Any, upstream: Any, fake_response: Any, status: int
) -> None:
    body = b"" if status in (204, 304) else b"upstream words"
    for target, location in [
        ("/v2/a/b/tags/list", None),
        ("/v2/a/b/blobs/uploads/session", "https://elsewhere/x?sig=1"),
        ("/v2/unknown", "https://elsewhere/x?sig=1"),
        ("/signin", "https://elsewhere/x?sig=1"),
    ]:
        upstream.response = fake_response(status, [("location", "https://elsewhere/x?sig=1")], body)
        response = connect_intercepted().fetch("GET", target)
        assert (response.status, response.body, response.complete) == (status, body, True)
        assert response.headers.get("Location") == location


@pytest.mark.parametrize("status", [403, 404])
def test_a_client_without_a_login_is_asked_for_one_that_may_list(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, fake_response: Any, status: int
) -> None:
    """The registry may hide a private repository. `oras repo tags` begins with the list, and logs in after a 401."""
    upstream.has_login, upstream.referrers_result = True, UpstreamRefused(status, b"no", ())
    for target, connect, fields, expected in [
        ("/v2/a/b/tags/list", connect_intercepted, [], 401),
        (f"/v2/a/b/referrers/{DIGEST}", connect_intercepted, [], 401),
        ("/v2/a/b/tags/list", connect_intercepted, [("Authorization", "Bearer client")], status),
        ("/v2/_catalog", connect_intercepted, [], status),
        ("/v2/a/b/tags/list", connect_mirror, [], status),
    ]:
        upstream.response = fake_response(status, [], b"no")
        response = connect().fetch("GET", target, fields)
        assert response.status == expected, target
        assert bool(response.fields("WWW-Authenticate")) == (expected == 401)


def test_forwarded_401_names_our_realm(connect_intercepted: Any, upstream: Any, fake_response: Any) -> None:
    fields = [("www-authenticate", 'Bearer realm="https://theirs"'), ("oci-own", "1"), ("set-cookie", "a=b")]
    for target in ("/v2/a/b/tags/list", "/v2/a/b/blobs/uploads/session"):
        upstream.response = fake_response(401, fields, b"no")
        response = connect_intercepted().fetch("GET", target)
        assert (response.status, response.body, response.headers["OCI-Own"]) == (401, b"no", "1")
        assert response.fields("WWW-Authenticate") == ['Bearer realm="https://theirs",realm="https://ours/token"']
        assert (response.fields("X-Cache"), response.fields("Set-Cookie")) == (["PASS"], [])


def test_a_page_deals_with_its_401_itself(connect_intercepted: Any, upstream: Any, fake_response: Any) -> None:
    """Git asks for the password of the realm that it is told."""
    fields = [("www-authenticate", 'Basic realm="Gitea"'), ("set-cookie", "a=b")]
    upstream.response = fake_response(401, fields, b"log in")
    response = connect_intercepted().fetch("GET", "/org/app.git/info/refs?service=git-upload-pack")
    assert (response.status, response.body, response.fields("Set-Cookie")) == (401, b"log in", ["a=b"])
    assert response.fields("WWW-Authenticate") == ['Basic realm="Gitea"']


@pytest.mark.parametrize("allow_push", [False, True])
def test_pages_take_any_method(connect_intercepted: Any, upstream: Any, fake_response: Any, allow_push: bool) -> None:
    """ALLOW_PUSH is about images. A clone is a POST, and people log in to web pages by another."""
    for method, target in [("POST", "/org/app.git/git-upload-pack"), ("PUT", "/api/v1/x"), ("PROPFIND", "/dav/a%20b")]:
        upstream.response = fake_response(200, [("content-type", "text/html"), ("x-frame-options", "DENY")], b"a page")
        client = connect_intercepted(allow_push)
        response = client.fetch(method, target, [("Cookie", "a=b"), ("X-Csrf-Token", "t")], b"some bytes")
        assert (response.status, response.body, response.headers["Content-Type"]) == (200, b"a page", "text/html")
        assert response.headers["X-Frame-Options"] == "DENY"
        forwarded = upstream.forwarded_requests[-1]
        assert (forwarded.method, forwarded.path, forwarded.body) == (method, target, b"some bytes")
        assert (forwarded.headers.get("cookie"), forwarded.headers.get("x-csrf-token")) == ("a=b", "t")
        upstream.body_chunks.clear()


ALIASES = [Registry.parse(name) for name in ("index.docker.io", "docker.io", "registry.hub.docker.com")]


@pytest.mark.parametrize("alias", ALIASES, ids=str)
def test_another_name_of_docker_hub(
    connect_intercepted: Any, upstream: Any, fake_content: Any, fake_response: Any, alias: Registry
) -> None:
    """Its API is Docker Hub's, its pages are those of the host that was asked."""
    digest = upstream.put(fake_content(b"layer"))
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, b"{}", "HIT")
    upstream.realms = {("registry-1.docker.io", "/token"): HUB}
    client = connect_intercepted(registry=alias)
    for path in ("/v2/", f"/v2/a/b/blobs/{digest}", "/v2/a/b/manifests/latest", "/v2/a/b/tags/list", "/token"):
        assert client.fetch("GET", path).status == 200, path
    assert {registry for registry, _ in upstream.open_calls} == {HUB}
    assert {request.host for request in client.finished_requests} == {str(alias)}
    login = [("Authorization", "Basic mine")]
    pages = ["/", "/v1/search?q=nginx&n=25", "/v1/_ping", "/v1/", "/v2/repositories/library/nginx/tags?page_size=9"]
    for path in pages:
        upstream.response = fake_response(200, [("content-type", "text/html")], b"from upstream")
        assert client.fetch("GET", path, login).body == b"from upstream"
        assert upstream.open_calls[-1] == (alias, "Basic mine"), path
    assert [request.path for request in upstream.forwarded_requests[-len(pages) :]] == pages


HOSTILE_FIELDS = [
    ("set-cookie", "session=of-our-own-login"), ("refresh", "0;url=//evil.test"), ("clear-site-data", "*"),
    ("service-worker-allowed", "/"), ("access-control-allow-origin", "*"), ("access-control-allow-credentials", "true"),
    ("content-encoding", "gzip"), ("strict-transport-security", "max-age=99999999"), ("location", "//evil.test/"),
    ("content-security-policy", "default-src *"), ("cross-origin-resource-policy", "cross-origin"), ("nel", "{}"),
    ("x-content-type-options", "none"), ("content-disposition", "inline"), ("link", "</x.js>; rel=preload"),
    ("sourcemap", "/x"), ("public-key-pins", "x"), ("cache-control", "public"), ("server", "theirs"), ("alt-svc", "x"),
    ("authentication-info", "x"), ("report-to", "{}"), ("document-policy", "x"), ("x-frame-options", "ALLOWALL"),
]  # fmt: skip
API_FIELDS = [
    ("docker-content-digest", str(DIGEST)), ("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "76;w=21600"),
    ("docker-ratelimit-source", "192.0.2.1"), ("x-ratelimit-reset", "9"), ("retry-after", "7"), ("etag", '"x"'),
    ("last-modified", "Tue, 14 Nov 2023 22:13:20 GMT"), ("accept-ranges", "bytes"), ("oci-tag", "1"),
    ("oci-chunk-min-length", "5"), ("docker-upload-uuid", "u"), ("range", "0-9"), ("warning", '299 - "x"'),
]  # fmt: skip


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 503])
@pytest.mark.parametrize("path", ["/v2/a/b/tags/list", "/v2/_catalog", "/v2/a/b/blobs/uploads/session"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_fields_of_lists_pass_by_an_allow_list(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, fake_response: Any, status: int, path: str,
    mirrored: bool,
) -> None:  # fmt: skip
    fields = [("content-type", "text/html"), *HOSTILE_FIELDS, *API_FIELDS]
    upstream.response = fake_response(status, fields, b"<script>")
    client = connect_mirror() if mirrored else connect_intercepted()
    response = client.fetch("GET", path + ("?ns=quay.io" if mirrored else ""))
    if mirrored and "uploads" in path:
        assert (response.status, upstream.forwarded_requests) == (404, [])
        return
    assert response.fields("Content-Type") == ["application/octet-stream"]
    for name, value in HOSTILE_FIELDS:
        is_forwarded = name == "location" and "uploads" in path and status != 401
        assert (value in response.fields(name)) is is_forwarded, name
    for name, value in API_FIELDS:
        assert response.fields(name) == [value], name


@pytest.mark.parametrize("mirrored", [False, True])
def test_fields_of_refusals_pass_by_an_allow_list(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, mirrored: bool
) -> None:
    fields = [("content-type", "image/svg+xml"), *HOSTILE_FIELDS, *API_FIELDS]
    for status in (401, 403, 404):
        upstream.error = UpstreamRefused(status, b"<svg>", fields)
        for path in (f"/v2/a/b/blobs/{DIGEST}", "/v2/a/b/manifests/latest"):
            client = connect_mirror() if mirrored else connect_intercepted()
            response = client.fetch("GET", path + ("?ns=quay.io" if mirrored else ""))
            assert (response.status, response.body) == (status, b"<svg>")
            assert response.fields("Content-Type") == ["application/octet-stream"]
            assert not [name for name, value in HOSTILE_FIELDS if value in response.fields(name)]
            assert [response.fields(name) for name, _ in API_FIELDS] == [[value] for _, value in API_FIELDS]


def test_long_401_body_is_dropped(connect_intercepted: Any, upstream: Any, fake_response: Any) -> None:
    upstream.response = fake_response(401, [], b"x" * 100_000)
    response = connect_intercepted().fetch("GET", "/v2/a/b/tags/list")
    assert (response.status, response.body) == (401, b"")


def test_truncated_response_aborts_the_connection(connect_intercepted: Any, upstream: Any, fake_response: Any) -> None:
    for length in (100, None):
        upstream.response = fake_response(
            200, [], b"first half", length=length, error=UpstreamBroken("connection lost")
        )
        client = connect_intercepted()
        response = client.fetch("GET", "/v2/_catalog")
        assert (response.body, response.complete, client.transport.aborted) == (b"first half", False, True)
        assert upstream.response.aborted


def test_disconnect_aborts_the_upstream_response(connect_intercepted: Any, upstream: Any, fake_response: Any) -> None:
    upstream.response = fake_response(200, [], b"x" * 1_000_000, chunk_size=10_000)
    client = connect_intercepted()
    client.transport.window = 100
    client.send_request("GET", "/v2/_catalog")
    assert not upstream.response.aborted
    client.disconnect()
    assert upstream.response.aborted


# interception: referrers


def test_referrers(connect_intercepted: Any, upstream: Any) -> None:
    upstream.referrers_result = ReferrersIndex(EMPTY_INDEX, False, "PASS")
    for method in ("GET", "HEAD"):
        response = connect_intercepted().fetch(method, f"/v2/a/b/referrers/{DIGEST}")
        assert (response.status, response.headers["Content-Type"]) == (200, OCI_INDEX)
        assert response.headers["Content-Length"] == str(len(EMPTY_INDEX))
        assert response.body == (EMPTY_INDEX if method == "GET" else b"")
        assert "OCI-Filters-Applied" not in response.headers
    assert upstream.calls[0] == ("a/b", DIGEST, "", None)


def test_referrers_of_a_type(connect_intercepted: Any, upstream: Any) -> None:
    upstream.referrers_result = ReferrersIndex(EMPTY_INDEX, True, "PASS")
    query = "artifactType=application%2Fvnd.example%2Bjson&n=5"
    response = connect_intercepted().fetch("GET", f"/v2/a/b/referrers/{DIGEST}?{query}")
    assert (response.status, response.headers["OCI-Filters-Applied"]) == (200, "artifactType")
    assert upstream.calls[0] == ("a/b", DIGEST, query, "application/vnd.example+json")


def test_referrers_that_are_refused(connect_intercepted: Any, upstream: Any) -> None:
    upstream.referrers_result = UpstreamRefused(401, b"no", [("www-authenticate", "Bearer x")])
    response = connect_intercepted().fetch("GET", f"/v2/a/b/referrers/{DIGEST}")
    assert (response.status, response.fields("WWW-Authenticate")) == (401, ['Bearer x,realm="https://ours/token"'])
    assert connect_intercepted().fetch("GET", f"/v2/a/b/referrers/{DIGEST}?artifactType=%zz").status == 400


# interception: tokens


def test_tokens_at_the_realm_path(connect_intercepted: Any, upstream: Any) -> None:
    hub_tokens = Registry.parse("auth.docker.io")
    upstream.realms = {("quay.io", "/ours"): QUAY, ("auth.docker.io", "/token"): HUB}
    query = "service=s&scope=repository%3Aa%3Apull&scope=x"
    response = connect_intercepted().fetch("GET", f"/ours?{query}", [("Authorization", "Basic eA==")])
    assert (response.status, response.body) == (200, b'{"token":"t"}')
    assert (response.headers["Content-Type"], response.headers["Cache-Control"]) == ("application/json", "no-store")
    assert connect_intercepted(registry=hub_tokens).fetch("GET", "/token").status == 200
    form = b"grant_type=password&username=u"
    assert connect_intercepted(registry=hub_tokens).fetch("POST", "/token", body=form).status == 200
    assert upstream.token_calls == [(QUAY, query, "Basic eA==", None), (HUB, "", None, None), (HUB, "", None, form)]
    assert upstream.forwarded_requests == []


def test_form_size_is_limited(connect_intercepted: Any, upstream: Any) -> None:
    upstream.realms = {("quay.io", "/token"): QUAY}
    assert connect_intercepted().fetch("POST", "/token", body=b"x" * 65_536).status == 200
    response = connect_intercepted().fetch("POST", "/token", body=b"x" * 65_537)
    assert (response.status, error_code(response)) == (413, "SIZE_INVALID")
    chunked = [("Transfer-Encoding", "chunked")]
    body = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    assert connect_intercepted().fetch("POST", "/token", chunked, body * 3).status == 413  # although the body goes on
    assert len(upstream.token_calls) == 1


LOGIN = ("Authorization", "Basic eA==")
FORM = ("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")


@pytest.mark.parametrize(
    ("method", "fields", "body", "learns"),
    [
        ("GET", [LOGIN, ("User-Agent", "docker/1"), ("Accept-Encoding", "gzip")], b"", True),
        ("POST", [FORM], b"username=u&password=p", True),
        ("GET", [LOGIN, ("Baggage", "trigger=api"), ("Traceparent", "00-0-0-01")], b"", True),  # dockerd 28
        ("POST", [FORM], b"x" * 65_536, True),
        ("GET", [LOGIN, ("Cookie", "session=of-another")], b"", False),
        ("GET", [LOGIN, ("Private-Token", "of-another")], b"", False),
        ("GET", [LOGIN], b"username=u", False),
        ("POST", [FORM, ("Cookie", "a=b")], b"username=u&password=p", False),
        ("POST", [("Content-Type", "application/json")], b"{}", False),
        ("POST", [], b"username=u", False),
        ("POST", [FORM], b"x" * 65_537, False),
        ("POST", [FORM, ("Transfer-Encoding", "chunked")], b"1\r\nx\r\n0\r\n\r\n", False),
        ("PUT", [FORM], b"username=u&password=p", False),
        ("HEAD", [LOGIN], b"", False),
    ],
)
def test_a_page_that_may_be_a_token_server(
    connect_intercepted: Any, upstream: Any, method: str, fields: Any, body: bytes, learns: bool
) -> None:
    """It is forwarded whatever it is. The proxy learns only if nothing but one credential can have been the login."""
    upstream.named_pages = {("quay.io", "/page"): HUB}
    content = [("Content-Length", str(len(body)))] if body and ("Transfer-Encoding", "chunked") not in fields else []
    response = connect_intercepted().fetch(method, "/page?a=b", [*fields, *content], body)
    assert (response.status, response.body) == (200, b"" if method == "HEAD" else b"from upstream")
    [forwarded] = upstream.forwarded_requests
    assert (forwarded.method, forwarded.path) == (method, "/page?a=b")
    form = body if method == "POST" else None
    assert upstream.token_calls == ([(HUB, method, "/page?a=b", form)] if learns else [])


def test_outage_of_a_page_that_is_a_token_server(connect_intercepted: Any, upstream: Any) -> None:
    upstream.named_pages = {("quay.io", "/page"): HUB}
    upstream.response = UpstreamTimeout("quay.io: timed out")
    assert connect_intercepted().fetch("GET", "/page", [LOGIN]).status == 504
    upstream.local_token = b'{"token":"local"}'
    response = connect_intercepted().fetch("GET", "/page", [LOGIN])
    assert (response.status, response.body, response.headers["Cache-Control"]) == (
        200,
        b'{"token":"local"}',
        "no-store",
    )
    assert connect_intercepted().fetch("GET", "/page", [LOGIN, ("Cookie", "a=b")]).status == 504


def test_refused_token(connect_intercepted: Any, upstream: Any) -> None:
    upstream.realms = {("quay.io", "/token"): QUAY}
    upstream.error = UpstreamRefused(401, b'{"details":"incorrect username or password"}', [("content-type", "a/b")])
    response = connect_intercepted().fetch("GET", "/token")
    assert (response.status, response.body) == (401, upstream.error.content)
    upstream.error = UpstreamTimeout("auth.docker.io: timed out")
    response = connect_intercepted().fetch("GET", "/token")
    assert (response.status, error_code(response)) == (504, "UNAVAILABLE")


# interception: pushing


@pytest.mark.parametrize(("method", "target"), WRITES)
def test_push_is_disabled(connect_intercepted: Any, upstream: Any, method: str, target: str) -> None:
    client = connect_intercepted()
    response = client.fetch(method, target)
    assert (response.status, error_code(response)) == (405, "UNSUPPORTED")
    assert "ALLOW_PUSH" in response.body.decode()
    assert upstream.forwarded_requests == []


@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
def test_refusal_is_sent_before_the_body_is_read(connect_intercepted: Any, upstream: Any, framing: str) -> None:
    client = connect_intercepted()
    fields = {
        "length": [("Content-Length", "10000000000")],
        "chunked": [("Transfer-Encoding", "chunked")],
        "expect": [("Content-Length", "10000000000"), ("Expect", "100-continue")],
    }[framing]
    response = client.fetch("PATCH", "/v2/a/b/blobs/uploads/session", fields)
    assert (response.status, response.complete, response.headers["Connection"]) == (405, True, "close")
    assert b"100 Continue" not in client.received
    client.send(b"fffff\r\n" + b"x" * 0xFFFFF)  # the rest of the body is not read as a request
    assert client.received.count(b"HTTP/1.1 ") == 1
    client.advance(60)
    assert client.transport.closed


@pytest.mark.parametrize(("method", "target"), WRITES)
def test_push_is_forwarded(
    connect_intercepted: Any, upstream: Any, fake_response: Any, method: str, target: str
) -> None:
    upstream.response = fake_response(202, [("location", "/v2/a/b/blobs/uploads/2?_state=x"), ("range", "0-9")])
    body = None if method in ("DELETE", "PROPFIND") else b"some bytes"
    response = connect_intercepted(allow_push=True).fetch(
        method, target, [("Content-Type", "application/octet-stream")], body
    )
    assert (response.status, response.headers["Range"], response.body) == (202, "0-9", b"")
    assert response.headers["Location"] == "/v2/a/b/blobs/uploads/2?_state=x"
    forwarded = upstream.forwarded_requests[0]
    assert (forwarded.method, forwarded.path, forwarded.body) == (method, target, body)
    assert forwarded.headers.get("content-type") == "application/octet-stream"
    assert forwarded.name == ("a/b" if target.startswith("/v2/a/b/") and "reference" not in target else None)


def test_a_push_streams(connect_intercepted: Any, upstream: Any) -> None:
    client = connect_intercepted(allow_push=True)
    client.send_request("PATCH", "/v2/a/b/blobs/uploads/session", [("Content-Length", "30")])
    client.send(b"0123456789")
    assert b"".join(upstream.body_chunks) == b"0123456789"  # upstream has it before the client sends more
    client.send(b"0123456789")
    assert b"".join(upstream.body_chunks) == b"0123456789" * 2
    assert client.received == b""
    client.send(b"0123456789")
    assert client.read_response().status == 200


def test_malformed_push_body(connect_intercepted: Any, upstream: Any) -> None:
    client = connect_intercepted(allow_push=True)
    client.send_request("PATCH", "/v2/a/b/blobs/uploads/session", [("Transfer-Encoding", "chunked")])
    client.send(b"5\r\nhello\r\nnot a chunk\r\n")
    response = client.read_response()
    assert (response.status, response.complete) == (400, True)
    assert upstream.forwarded_requests == []


# the mirror


@pytest.mark.parametrize(
    ("query", "registry"),
    [
        ("", HUB),
        ("?ns=docker.io", HUB),
        ("?ns=DOCKER.io", HUB),
        ("?ns=registry-1.docker.io", HUB),
        ("?ns=quay.io", QUAY),
        ("?ns=Quay.IO", QUAY),
        ("?ns=quay.io.", QUAY),
        ("?ns=quay.io:443", QUAY),
        ("?ns=quay%2Eio", QUAY),
        ("?n=5&ns=quay.io&x=y", QUAY),
        ("?ns=quay.io&ns=quay.io", QUAY),
        ("?ns=registry.example:5000", PORTED),
        ("?ns=registry.example%3A5000", PORTED),
        ("?ns=plain.example:8080", PLAIN),
    ],
)
def test_ns_names_a_registry(
    connect_mirror: Any, upstream: Any, fake_content: Any, query: str, registry: Registry
) -> None:
    digest = upstream.put(fake_content(b"layer"))
    client = connect_mirror()
    response = client.fetch("GET", f"/v2/a/b/blobs/{digest}{query}")
    assert (response.status, response.body) == (200, b"layer")
    assert upstream.open_calls == [(registry, None)]
    assert client.finished_requests[0].host == str(registry)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?ns=evil.example", 404),
        ("?ns=quay.io:444", 404),
        ("?ns=registry.example", 404),
        ("?ns=169.254.169.254", 404),
        ("?ns=", 400),
        ("?ns=http://quay.io", 400),
        ("?ns=quay.io/x", 400),
        ("?ns=user@quay.io", 400),
        ("?ns=quay.io&ns=docker.io", 400),
        ("?ns=quay.io&n%73=docker.io", 400),
        ("?ns=%zz", 400),
    ],
)
def test_unknown_ns_is_never_dialled(connect_mirror: Any, upstream: Any, query: str, status: int) -> None:
    for path in (f"/v2/a/b/blobs/{DIGEST}", "/v2/", "/v2/a/b/tags/list"):
        response = connect_mirror().fetch("GET", path + query)
        assert response.status == status
        assert json.loads(response.body)["errors"][0]["message"]
        assert upstream.open_calls == []
    if status == 404:
        assert "REGISTRIES" in response.body.decode()


@pytest.mark.parametrize(
    ("host", "registry"),
    [
        ("docker.io", HUB),
        ("registry-1.docker.io", HUB),
        ("quay.io", QUAY),
        ("Quay.IO", QUAY),
        ("quay.io.", QUAY),
        ("quay.io:443", QUAY),
        ("quay%2Eio", QUAY),
        ("registry.example:5000", PORTED),
        ("registry.example%3A5000", PORTED),
        ("plain.example:8080", PLAIN),
    ],
)
@pytest.mark.parametrize("user_agent", ["containers/5.30.0 (github.com/containers/image)", "docker/28.0.0"])
def test_the_path_names_a_registry(
    connect_mirror: Any, upstream: Any, fake_content: Any, host: str, registry: Registry, user_agent: str
) -> None:
    digest = upstream.put(fake_content(b"layer"))
    client = connect_mirror()
    response = client.fetch("GET", f"/v2/{host}/a/b/blobs/{digest}", [("User-Agent", user_agent)])
    assert (response.status, response.body) == (200, b"layer")
    assert upstream.open_calls == [(registry, None)]
    finished = client.finished_requests[0]
    assert (finished.host, finished.path) == (str(registry), f"/v2/a/b/blobs/{digest}")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 404),
        ("quay.io:444", 404),
        ("registry.example", 404),
        ("localhost", 404),
        ("localhost:5000", 404),
        ("169.254.169.254", 404),
        ("my.app", 404),
        ("evil%2Eexample", 404),
        ("quay.io%2Fa", 400),
        ("quay%252Eio", 400),
        ("user@quay.io", 400),
        ("quay.io:x", 400),
        ("a..b", 400),
        (".", 400),
        ("..", 400),
        ("http:", 400),
        ("1.2", 400),
    ],
)
def test_an_unknown_registry_in_the_path_is_never_dialled(
    connect_mirror: Any, upstream: Any, host: str, status: int
) -> None:
    """It is not a repository of Docker Hub either."""
    for path in (f"a/b/blobs/{DIGEST}", "", "tags/list", "a/b/manifests/latest", "_catalog"):
        response = connect_mirror().fetch("GET", f"/v2/{host}/{path}")
        assert response.status == status, path
        assert json.loads(response.body)["errors"][0]["message"]
        assert upstream.open_calls == upstream.calls == upstream.forwarded_requests == []


def test_the_registry_in_the_query_has_precedence(connect_mirror: Any, upstream: Any, fake_content: Any) -> None:
    """The registry may itself be a mirror of this kind."""
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, b"{}", "HIT")
    assert connect_mirror().fetch("GET", "/v2/quay.io/a/manifests/latest?ns=registry.example:5000").status == 200
    assert upstream.open_calls == [(PORTED, None)]
    assert upstream.calls[0][0] == "quay.io/a"


@pytest.mark.parametrize(
    "user_agent",
    [
        "containers/5.23.1 (github.com/containers/image)",
        "Buildah/1.33.7",
        "skopeo/1.9.3",
        "bootc/1.1 skopeo/1.18.0",
        "cri-o/1.31.0 go/go1.22.5 os/linux arch/amd64",
        "libpod/4.3.1",
        "podman/5.4.2",
    ],
)
def test_a_client_that_may_mean_any_registry_has_to_name_it(
    connect_mirror: Any, upstream: Any, fake_content: Any, user_agent: str
) -> None:
    """Docker Hub may have an image of the same name: nobody would see that it is another one."""
    digest = upstream.put(fake_content(b"layer"))
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, b"{}", "HIT")
    fields = [("User-Agent", user_agent)]
    for path in ("manifests/latest", f"blobs/{digest}", "tags/list", f"referrers/{DIGEST}"):
        response = connect_mirror().fetch("GET", f"/v2/a/b/{path}", fields)
        assert (response.status, error_code(response)) == (404, "NAME_UNKNOWN")
        message = json.loads(response.body)["errors"][0]["message"]
        assert 'location = "docker-registry.local:3128/quay.io"' in message
    assert connect_mirror().fetch("GET", "/v2/_catalog", fields).status == 404
    assert upstream.open_calls == upstream.calls == upstream.forwarded_requests == []
    assert connect_mirror().fetch("GET", "/v2/", fields).status == 200  # the ping, before a pull that names it
    assert connect_mirror().fetch("GET", f"/v2/docker.io/a/b/blobs/{digest}", fields).status == 200
    assert connect_mirror().fetch("GET", "/v2/a/b/manifests/latest?ns=quay.io", fields).status == 200
    assert upstream.open_calls == [(HUB, None), (QUAY, None)]


@pytest.mark.parametrize(
    "user_agent",
    [
        "docker/28.0.1 go/go1.23.6 git-commit/bbd0a17 kernel/6.1 os/linux arch/amd64 UpstreamClient(containers/5.0)",
        "containerd/v1.7.2",
        "buildkit/v0.13",
        "curl/8.14.1",
    ],
)
def test_other_clients_mean_docker_hub(connect_mirror: Any, upstream: Any, fake_content: Any, user_agent: str) -> None:
    digest = upstream.put(fake_content(b"layer"))
    assert connect_mirror().fetch("GET", f"/v2/a/b/blobs/{digest}", [("User-Agent", user_agent)]).status == 200
    assert upstream.open_calls == [(HUB, None)]


def test_mirror_drops_client_credentials(connect_mirror: Any, upstream: Any, fake_content: Any) -> None:
    digest = upstream.put(fake_content(b"layer"))
    credentials = [("Authorization", "Basic secret"), ("Cookie", "session=1"), ("Proxy-Authorization", "Basic secret")]
    client = connect_mirror()
    client.fetch("GET", f"/v2/a/b/blobs/{digest}?ns=quay.io", credentials)
    client.fetch("GET", "/v2/a/b/tags/list?ns=quay.io", credentials)
    client.fetch("GET", "/v2/_catalog", credentials)
    assert upstream.open_calls == [(QUAY, None), (QUAY, None), (HUB, None)]
    for forwarded in upstream.forwarded_requests:
        assert [name for name, _ in forwarded.headers] == []


def test_mirror_sends_no_challenge(connect_mirror: Any, upstream: Any, fake_response: Any) -> None:
    challenge = ("www-authenticate", 'Bearer realm="https://theirs"')
    for error in (UpstreamRefused(401, b"no", [challenge]), Unauthorized("no", headers=[challenge])):
        upstream.error = upstream.referrers_result = error
        upstream.response = fake_response(401, [challenge], b"no")
        for path in ("blobs/" + str(DIGEST), "manifests/latest", "tags/list", "referrers/" + str(DIGEST)):
            response = connect_mirror().fetch("GET", f"/v2/a/b/{path}?ns=quay.io")
            assert (response.status, response.fields("WWW-Authenticate")) == (401, []), path


def test_shared_error_is_rendered_for_each_client(connect_mirror: Any, connect_intercepted: Any, upstream: Any) -> None:
    """Clients that share an upstream request also share its error object."""
    upstream.error = UpstreamRefused(401, b"no", [("www-authenticate", "Bearer theirs")])
    path = f"/v2/a/b/blobs/{DIGEST}"
    assert connect_mirror().fetch("GET", path).status == 401
    response = connect_intercepted().fetch("GET", path)
    assert response.fields("WWW-Authenticate") == ['Bearer theirs,realm="https://ours/token"']


@pytest.mark.parametrize("path", ["/v2/", "/v2", "/v2/?ns=quay.io"])
def test_mirror_ping(connect_mirror: Any, upstream: Any, path: str) -> None:
    for method in ("GET", "HEAD"):
        response = connect_mirror().fetch(method, path)
        assert (response.status, response.headers["Docker-Distribution-Api-Version"]) == (200, "registry/2.0")
    assert upstream.open_calls == []


def test_head_requests_to_a_mirror(connect_mirror: Any, upstream: Any, fake_content: Any) -> None:
    digest = upstream.put(fake_content(b"layer"))
    upstream.manifests["latest"] = ManifestResponse(DIGEST, OCI_INDEX, 2, None, "HIT")
    response = connect_mirror().fetch("HEAD", f"/v2/a/b/blobs/{digest}?ns=quay.io")
    assert (response.status, response.headers["Content-Length"]) == (200, "5")
    response = connect_mirror().fetch("HEAD", "/v2/a/b/manifests/latest?ns=quay.io")
    assert (response.status, response.headers["Docker-Content-Digest"]) == (200, str(DIGEST))


@pytest.mark.parametrize(
    ("path", "forwarded_path"),
    [
        ("/v2/a/b/tags/list?ns=quay.io", "/v2/a/b/tags/list"),
        ("/v2/a/b/tags/list?n=10&ns=quay.io&last=a%2Fb", "/v2/a/b/tags/list?n=10&last=a%2Fb"),
        ("/v2/_catalog?ns=quay.io&n=1", "/v2/_catalog?n=1"),
        ("/v2/_catalog", "/v2/_catalog"),
    ],
)
def test_lists_through_a_mirror(connect_mirror: Any, upstream: Any, path: str, forwarded_path: str) -> None:
    response = connect_mirror().fetch("GET", path)
    assert (response.status, response.body) == (200, b"from upstream")
    assert upstream.forwarded_requests[0].path == forwarded_path


@pytest.mark.parametrize(
    ("query", "link", "expected"),
    [
        ("?ns=quay.io", '</v2/a/b/tags/list?last=x>; rel="next"', "last=x&ns=quay.io"),
        ("?ns=registry.example:5000", "</v2/a?last=1>; rel=next", "last=1&ns=registry.example%3A5000"),
        ("", '</v2/a/b/tags/list?last=x>; rel="next"', "last=x"),
        ("?ns=quay.io", "<https://quay.io/v2/a/b/tags/list?last=x>; rel=next", "last=x&ns=quay.io"),
        ("?ns=quay.io", '<//evil.test/?n=1&last=%2e>;rel="next"', "n=1&last=%2e&ns=quay.io"),
        ("?ns=quay.io", "<?next_page=gAAA>; rel=next", "next_page=gAAA&ns=quay.io"),
        ("", "</evil.js?x>; rel=preload; as=script", None),
        ("", '</v2/a/b/tags/list?last=x>; rel="next", </evil.js>; rel=preload', "last=x"),
        ("", "</v2/a/b/tags/list>; rel=next", None),
        ("", '</?"onerror=x>; rel=stylesheet; rel=next', None),
    ],
)
def test_the_next_page_is_of_the_same_registry(
    connect_mirror: Any, upstream: Any, fake_response: Any, query: str, link: str, expected: str | None
) -> None:
    """A link leads to the same list, whatever upstream writes."""
    upstream.response = fake_response(200, [("link", link)], b"{}")
    response = connect_mirror().fetch("GET", "/v2/a/b/tags/list" + query)
    links = [] if expected is None else [f'</v2/a/b/tags/list?{expected}>; rel="next"']
    assert response.fields("Link") == links


@pytest.mark.parametrize(
    ("host", "expected"),
    [("quay.io", "quay.io"), ("docker.io", "docker.io"), ("registry.example%3A5000", "registry.example:5000")],
)
def test_the_next_page_names_the_registry_in_its_path(
    connect_mirror: Any, upstream: Any, fake_response: Any, host: str, expected: str
) -> None:
    for path in ("a/b/tags/list", "_catalog"):
        upstream.response = fake_response(200, [("link", f'</v2/{path}?last=x&n=1>; rel="next"')], b"{}")
        response = connect_mirror().fetch("GET", f"/v2/{host}/{path}?n=1")
        assert upstream.forwarded_requests[-1].path == f"/v2/{path}?n=1"
        assert response.fields("Link") == [f'</v2/{expected}/{path}?last=x&n=1>; rel="next"']
    upstream.referrers_result = ReferrersIndex(EMPTY_INDEX, False, "PASS")
    assert connect_mirror().fetch("GET", f"/v2/{host}/a/b/referrers/{DIGEST}").status == 200


def test_referrers_through_a_mirror(connect_mirror: Any, upstream: Any) -> None:
    upstream.referrers_result = ReferrersIndex(EMPTY_INDEX, False, "PASS")
    assert connect_mirror().fetch("GET", f"/v2/a/b/referrers/{DIGEST}?artifactType=x&ns=quay.io").status == 200
    assert upstream.calls == [("a/b", DIGEST, "artifactType=x", "x")]


@pytest.mark.parametrize(("method", "target"), [write for write in WRITES if "unknown" not in write[1]])
@pytest.mark.parametrize("namespace", ["", "ns=quay.io", "quay.io"])
def test_mirror_rejects_push(connect_mirror: Any, upstream: Any, method: str, target: str, namespace: str) -> None:
    if "reference" in target:
        return
    client = connect_mirror()
    if namespace == "quay.io":
        url = f"/v2/{namespace}{target.removeprefix('/v2')}"
    else:
        url = target + ("&" if "?" in target else "?") + namespace
    response = client.fetch(method, url, [("Content-Length", "1000000")])
    assert (response.status, error_code(response), response.headers["Allow"]) == (405, "UNSUPPORTED", "GET, HEAD")
    assert "ALLOW_PUSH" not in response.body.decode()  # because that setting would not help
    response = connect_mirror().fetch("OPTIONS", url)
    assert (response.status, response.headers["Allow"]) == (200, "GET, HEAD")
    assert upstream.forwarded_requests == upstream.open_calls == []


@pytest.mark.parametrize("path", ["/v2/some/thing/unknown", "/v1/_ping", "/v2x/"])
def test_mirror_serves_only_the_api(connect_mirror: Any, upstream: Any, path: str) -> None:
    for method in ("GET", "POST"):
        response = connect_mirror().fetch(method, path + "?ns=quay.io")
        assert (response.status, error_code(response)) == (404, "NAME_UNKNOWN")
    assert upstream.forwarded_requests == []


# web browsers


FOREIGN = [("Origin", "https://evil.example")]


@pytest.mark.parametrize("status", [200, 401, 403, 404])
def test_the_answers_of_a_registrys_api_are_no_pages(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, fake_response: Any, status: int
) -> None:
    fields = [("content-type", "text/html"), ("content-security-policy", "default-src *")]
    for client in (connect_intercepted(), connect_mirror()):
        upstream.response = fake_response(status, fields, b"<script>")
        response = client.fetch("GET", "/v2/a/b/tags/list?ns=quay.io")
        assert (response.status, response.body) == (status, b"<script>")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert response.fields("Content-Security-Policy") == ["sandbox; default-src 'none'; frame-ancestors 'none'"]


@pytest.mark.parametrize("status", [200, 401])
def test_a_web_site_beside_the_api_keeps_its_fields(
    connect_intercepted: Any, upstream: Any, fake_response: Any, status: int
) -> None:
    fields = [("content-type", "text/html"), ("content-security-policy", "default-src *")]
    upstream.response = fake_response(status, fields, b"<html>")
    response = connect_intercepted().fetch("GET", "/ui", FOREIGN)
    assert (response.status, response.body, response.headers["Content-Type"]) == (status, b"<html>", "text/html")
    assert response.fields("Content-Security-Policy") == ["default-src *"]
    assert "X-Content-Type-Options" not in response.headers


@pytest.mark.parametrize("path", ["/v2/", "/v2/a/b/tags/list", "/v2/a/b/manifests/latest", f"/v2/a/b/blobs/{DIGEST}"])
def test_pages_of_other_sites_do_not_reach_upstream(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any, path: str
) -> None:
    for client in (connect_intercepted(), connect_mirror()):
        for fields in (FOREIGN, [("Sec-Fetch-Site", "cross-site")], [("Sec-Fetch-Site", "same-site")]):
            response = client.fetch("GET", path, fields)
            assert (response.status, error_code(response)) == (403, "DENIED")
            assert b"CORS_ORIGINS" in response.body
    assert (upstream.calls, upstream.forwarded_requests) == ([], [])


def test_pages_of_other_sites_do_not_push(connect_intercepted: Any, upstream: Any) -> None:
    for method, path in WRITES:
        response = connect_intercepted(allow_push=True).fetch(method, path, FOREIGN)
        assert (response.status, error_code(response)) == (403, "DENIED"), path
    assert upstream.forwarded_requests == []


@pytest.mark.parametrize(
    "path", ["/v2/", "/v2/a/b/manifests/1", "/v2/a/b/blobs/uploads/", "/v2/a/b/tags/list", "/page"]
)
def test_options_is_passed_on(connect_intercepted: Any, upstream: Any, fake_response: Any, path: str) -> None:
    """It changes nothing, so ALLOW_PUSH is not about it."""
    upstream.response = fake_response(200, [("allow", "GET, PUT")], b"")
    response = connect_intercepted().fetch("OPTIONS", path)
    assert (response.status, response.headers["allow"]) == (200, "GET, PUT")
    assert [forwarded.method for forwarded in upstream.forwarded_requests] == ["OPTIONS"]


def test_a_page_of_cors_origins_reads(connect_client: Any, upstream: Any, fake_response: Any) -> None:
    api, cross_origin = RegistryAPI(Clock()), CrossOriginProtection(["https://ui.example"])
    tunnels = make_tunnels(Clock())
    intercepted = Intercepted(api, upstream.open_registry, upstream, cross_origin, tunnels, allow_push=False)
    client = connect_client(partial(intercepted.handle, QUAY), secure=True)
    fields = [("Origin", "https://ui.example"), ("Access-Control-Request-Method", "GET")]
    assert client.fetch("OPTIONS", "/v2/a/b/tags/list", fields).status == 204
    upstream.response = fake_response(200, [("access-control-allow-origin", "*")], b"{}")
    response = client.fetch("GET", "/v2/a/b/tags/list", fields[:1])
    assert (response.status, response.fields("Access-Control-Allow-Origin")) == (200, ["https://ui.example"])
    assert len(upstream.forwarded_requests) == 1


def test_an_image_on_a_page_over_plain_http_is_no_pull(
    connect_intercepted: Any, connect_mirror: Any, upstream: Any
) -> None:
    browser = [("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0")]
    for client in (connect_intercepted(secure=False, registry=PLAIN), connect_mirror()):
        response = client.fetch("GET", "/v2/a/b/manifests/latest", browser)
        assert (response.status, error_code(response)) == (403, "DENIED")
        assert client.fetch("GET", "/v2/", browser).status == 200  # no pull, and a person may want to see it
    assert (upstream.calls, upstream.forwarded_requests) == ([], [])
