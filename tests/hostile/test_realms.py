"""A hostile registry, or a machine in the middle, names token servers to get at the logins and tokens of others."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlencode

import pytest

from dockerproxy.net.public_suffix import LIST_FILE
from tests.e2e.harness.fake_registry import FakeRegistry, require_authorization, respond_error, respond_normally
from tests.e2e.harness.http_client import ProxyClient, basic_authorization, request_directly
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import TypedContent
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

ADMIN, ALICE = basic_authorization("admin", "of-everything"), basic_authorization("alice", "wonderland")
ANONYMOUS_TOKEN, ADMIN_TOKEN = "Bearer anonymous", "Bearer of-the-administrator"


class OpenRealm(StubServer):
    """Issues one token to the administrator, and another to everybody else."""

    def handle(self, exchange: HTTPExchange) -> None:
        b"".join(exchange.read_body())
        token = ADMIN_TOKEN if exchange.request.headers.get("authorization") == ADMIN else ANONYMOUS_TOKEN
        document = {"token": token.removeprefix("Bearer "), "expires_in": 300}
        exchange.respond(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


def challenge_with(registry: FakeRegistry, realm: str, *, token: str = ANONYMOUS_TOKEN, **parameters: str) -> None:
    """Make `registry` demand `token`, of the token server at the URL `realm`."""
    challenge = ",".join([f'Bearer realm="{realm}"', *(f'{name}="{value}"' for name, value in parameters.items())])

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if exchange.request.headers.get("authorization") == token:
            respond_normally(exchange, content)
        else:
            respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate=challenge)

    for method in ("GET", "HEAD"):
        registry.add_rule(method, "^/v2/", respond)


def realm_url(client: ProxyClient, host: str) -> str:
    """Return the URL of the token server of `host`, as clients are told."""
    challenge = client.get(f"{host}/v2/").headers["www-authenticate"]
    return challenge.partition('realm="')[2].partition('"')[0]


def pull(client: ProxyClient, host: str, digest: str) -> bytes:
    """Pull a blob of the repository `app` like docker without a login."""
    token = client.get(f"{realm_url(client, host)}?scope=repository:app:pull").json["token"]
    response = client.get(f"{host}/v2/app/blobs/{digest}", Authorization=f"Bearer {token}")
    assert response.status == 200, response.body
    return response.body


def test_a_password_never_leaves_tls(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """The registry has TLS. Its token server has none, and a machine in the middle would read the password."""
    tokens = OpenRealm()
    network.add_server("tokens.test:80", tokens)
    network.registries.append("http://tokens.test")
    challenge_with(network.evil, "http://tokens.test/token")
    digest = network.evil.put_blob("app", b"public")
    client = start_daemon().client
    url = realm_url(client, EVIL)
    assert url.startswith(f"{EVIL}/")
    form = {"grant_type": "password", "username": "alice", "password": "wonderland"}
    refresh = {"grant_type": "refresh_token", "refresh_token": "of-alice"}
    responses = [
        client.get(f"{url}?scope=repository:app:pull", Authorization=ALICE),
        *(client.request("POST", url, body=urlencode(fields).encode()) for fields in (form, refresh)),
    ]
    for response in responses:
        assert (response.status, response.error_code) == (502, "UNAVAILABLE")
        assert "plain HTTP" in response.error_message
    assert tokens.requests == []
    assert pull(client, EVIL, digest) == b"public"  # without a login
    assert {request.headers.get("authorization") for request in tokens.requests} == {None}


@pytest.mark.parametrize("evil_first", [True, False])
def test_a_realm_is_not_taken_over(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, evil_first: bool
) -> None:
    """The hostile registry names the honest one's realm as its own. Clients of both go on pulling."""
    network.add_server("auth.good.test:443", OpenRealm(network.ca.leaf("auth.good.test").server_context()))
    hosts = ["evil.test", "good.test"] if evil_first else ["good.test", "evil.test"]
    network.registries[:] = [*hosts, "auth.good.test"]
    for registry in (network.good, network.evil):
        challenge_with(registry, "https://auth.good.test/token")
    digests = {GOOD: network.good.put_blob("app", b"good"), EVIL: network.evil.put_blob("app", b"evil")}
    client = start_daemon().client
    for host in (EVIL, GOOD, EVIL):
        assert pull(client, host, digests[host]).decode() in host
    token = client.get(f"{realm_url(client, EVIL)}?scope=repository:app:pull").json["token"]
    assert client.get(f"{GOOD}/v2/app/blobs/{digests[GOOD]}", Authorization=f"Bearer {token}").body == b"good"


def test_a_page_of_another_host_is_no_realm(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """The proxy answers requests to realms itself. A hostile registry must not get it to answer others' pages."""
    network.good.add_rule("GET", "^/signin", lambda exchange, _: exchange.respond(200, {}, b"the page"))
    challenge_with(network.evil, f"{GOOD}/signin")
    network.registries[:] = ["evil.test", "good.test"]
    client = start_daemon().client
    assert realm_url(client, EVIL) == f"{GOOD}/signin"  # as without the proxy
    assert client.get(f"{GOOD}/signin").body == b"the page"
    response = client.request("GET", f"{GOOD}/signin", {"Authorization": ALICE})
    assert response.body == b"the page"
    assert network.good.requests[-1].headers["authorization"] == ALICE


@pytest.mark.parametrize("field", ["Cookie", "Private-Token"])
def test_a_page_does_not_confirm_a_guessed_login(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, field: str
) -> None:
    """The page knows mallory by another field. Her guess beside it is right, but nobody has said so to the proxy."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        is_known = exchange.request.headers.get(field.lower()) == "mallory"
        exchange.respond(200, {"Content-Type": "application/json"}, b'{"token":"of-mallory"}' if is_known else b"{}")

    network.good.add_rule("GET", "^/session", respond)
    challenge_with(network.evil, f"{GOOD}/session", service="s")
    client = start_daemon().client
    assert realm_url(client, EVIL) == f"{GOOD}/session"
    query = "service=s&scope=repository:app:pull"
    page = client.request("GET", f"{GOOD}/session?{query}", {"Authorization": ALICE, field: "mallory"})
    assert page.json == {"token": "of-mallory"}
    network.stop()
    local = f"{EVIL}/.well-known/docker-registry-proxy/token?{query}"
    assert client.get(local, Authorization=ALICE).status == 502


def use_login(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, registry: str, realm: str, logins: str
) -> tuple[int, list[str | None], str]:
    """Pull from `registry`, which names `realm`, without a login of the client's.

    Return the status, the Authorization fields that the realm got, and the daemon's log.
    """
    tokens = OpenRealm(network.ca.leaf(realm).server_context())
    network.add_server(f"{realm}:443", tokens)
    network.registries.append(registry)
    server = network.add_registry(registry)
    challenge_with(server, f"https://{realm}/token", token=ADMIN_TOKEN)
    digest = server.put_blob("app", b"private")
    daemon = start_daemon(AUTH_REGISTRIES=logins)
    response = daemon.client.get(f"https://{registry}/v2/app/blobs/{digest}")
    return response.status, [request.headers.get("authorization") for request in tokens.requests], daemon.output_text


@pytest.mark.parametrize(
    ("registry", "realm"),
    [
        ("evil.duckdns.org", "victim.duckdns.org"),
        ("evil.azurecr.io", "victim.azurecr.io"),
        ("evil.co.uk", "victim.co.uk"),
        ("thing.test", "auth.victim.test"),
    ],
)
def test_strangers_are_no_family(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, registry: str, realm: str
) -> None:
    """Anybody can have a name below a public suffix, and would get a token that was made with the admin's login."""
    status, sent, log = use_login(network, start_daemon, registry, realm, f"{realm}:admin:of-everything")
    assert (status, set(sent)) == (401, {None})
    assert f"{registry} names {realm} as its token server" in log


@pytest.mark.parametrize(
    ("registry", "realm", "logins"),
    [
        ("hub.test", "auth.hub.test", "auth.hub.test:admin:of-everything"),
        ("registry.gitlab.com", "gitlab.com", "gitlab.com:admin:of-everything"),
        ("a.duckdns.org", "b.duckdns.org", "b.duckdns.org:admin:of-everything a.duckdns.org:admin:of-everything"),
        pytest.param(
            "registry.company.com", "gitlab.company.com", "gitlab.company.com:admin:of-everything",
            marks=pytest.mark.skipif(not LIST_FILE.exists(), reason="there is no Public Suffix List"),
        ),
    ],
)  # fmt: skip
def test_one_owners_hosts_are_family(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, registry: str, realm: str, logins: str
) -> None:
    status, sent, log = use_login(network, start_daemon, registry, realm, logins)
    assert (status, set(sent)) == (200, {ADMIN})
    assert "as its token server" not in log


def test_our_login_gets_tokens_of_our_scopes_only(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """The registry, which is sent the token, also writes the challenge."""
    tokens = OpenRealm(network.ca.leaf("auth.good.test").server_context())
    network.add_server("auth.good.test:443", tokens)
    wider = "repository:secret:pull,push registry:catalog:*"
    challenge_with(network.good, "https://auth.good.test/token?tenant=1", token=ADMIN_TOKEN, scope=wider, service="s")
    digest = network.good.put_blob("app", b"private")
    client = start_daemon(AUTH_REGISTRIES="auth.good.test:admin:of-everything").client
    assert client.get(f"{GOOD}/v2/app/blobs/{digest}").body == b"private"
    assert client.get(f"{GOOD}/v2/token?scope=repository:secret:pull,push").status == 401
    asked = f"{realm_url(client, GOOD)}?scope=repository:secret:pull,push"
    assert f"Bearer {client.get(asked).json['token']}" == ANONYMOUS_TOKEN
    assert client.get(f"{GOOD}/v2/_catalog").status == 404  # the fake registry has none, but takes the token
    requests = [request for request in tokens.requests if request.headers.get("authorization") == ADMIN]
    scopes = [parse_qs(request.path.partition("?")[2]).get("scope") for request in requests]
    assert sorted(map(str, scopes)) == ["['registry:catalog:*']", "['repository:app:pull']"]


def test_a_realm_with_a_scope_is_refused(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    tokens = OpenRealm(network.ca.leaf("auth.good.test").server_context())
    network.add_server("auth.good.test:443", tokens)
    challenge_with(network.good, "https://auth.good.test/token?scope=repository:secret:pull", token=ADMIN_TOKEN)
    digest = network.good.put_blob("app", b"private")
    daemon = start_daemon(AUTH_REGISTRIES="auth.good.test:admin:of-everything")
    for response, status in (
        (daemon.client.get(f"{GOOD}/v2/app/blobs/{digest}"), 401),  # the client may log in by itself
        (request_directly("GET", f"{daemon.url}/v2/app/blobs/{digest}?ns=good.test"), 502),
    ):
        assert (response.status, "has a scope" in response.error_message) == (status, True)
    assert tokens.requests == []


def test_a_strangers_challenge_is_not_remembered(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """A web page of the registry's host, and a client with a bad token, are told another challenge."""
    network.add_server("auth.good.test:443", OpenRealm(network.ca.leaf("auth.good.test").server_context()))
    for path in ("^/git", "^/v2/app/manifests"):
        network.good.add_rule("GET", path, require_authorization('Bearer realm="https://none.test/token"'))
    challenge_with(network.good, "https://auth.good.test/token")
    digest = network.good.put_blob("app", b"public")
    client = start_daemon().client
    for authorization in ({}, {"Authorization": "Bearer junk"}):
        client.request("GET", f"{GOOD}/git", authorization)
    client.get(f"{GOOD}/v2/app/tags/list", Authorization="Bearer junk")
    assert client.get(f"{GOOD}/v2/app/blobs/{digest}").body == b"public"
