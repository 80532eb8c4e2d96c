"""A client with a login shows a token where it is not valid: after its end, for another repository, by another realm.

The registry says 401 to each. If it is not asked, because the cache has the answer or because it is down, the answer
is no as well.
"""

from __future__ import annotations

import json
import threading
from urllib.parse import parse_qs

import pytest

from tests.e2e.harness.fake_registry import FakeRegistry, respond_error, respond_normally
from tests.e2e.harness.http_client import ProxyClient, basic_authorization
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent, build_small_image
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

ALICE = basic_authorization("alice", "wonderland")


class Realm(StubServer):
    """Issues tokens to alice, or to anyone if it is hostile, and says which tokens are valid for which repository."""

    def __init__(self, network: HostileNetwork, host: str, *, hostile: bool = False, lifetime: int = 300) -> None:
        super().__init__(network.ca.leaf(host).server_context())
        self.lifetime = lifetime
        self.next_token: str | None = None
        self.valid: dict[str, set[str]] = {}
        self._hostile = hostile
        self._next_is_another = False
        self._names = (f"token-{number}-of-{host}" for number in range(1000))
        network.add_server(f"{host}:443", self)
        network.registries.append(host)  # so that the proxy learns of the tokens

    def accept_next_as_another(self) -> None:
        """Take the next request as one of another user, who logs in, but may read nothing."""
        self._next_is_another = True

    def handle(self, exchange: HTTPExchange) -> None:
        b"".join(exchange.read_body())
        is_another, self._next_is_another = self._next_is_another, False
        if exchange.request.headers.get("authorization") != ALICE and not self._hostile and not is_another:
            return respond_error(exchange, 401, "UNAUTHORIZED")
        token = self.next_token or next(self._names)
        scopes = [] if is_another else parse_qs(exchange.query).get("scope", [])
        names = {scope.split(":")[1] for scope in scopes}
        self.valid[token] = names
        document = {"token": token, "expires_in": self.lifetime}
        exchange.respond(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def guard(self, registry: FakeRegistry, url: str) -> None:
        """Make `registry` serve only clients with a valid token of this realm, which it names `url`."""
        challenge = f'Bearer realm="{url}",service="registry"'

        def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
            token = exchange.request.headers.get("authorization", "").removeprefix("Bearer ")
            if exchange.path.split("/")[2] in self.valid.get(token, ()):
                respond_normally(exchange, content)
            else:
                respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate=challenge)

        for method in ("GET", "HEAD"):
            registry.add_rule(method, "^/v2/", respond)


def token_of(client: ProxyClient, host: str, authorization: str, *names: str) -> str:
    """Ask the proxy for a token of `host` for repositories."""
    query = "&".join(["service=registry", *(f"scope=repository:{name}:pull" for name in names)])
    challenge = client.get(f"{host}/v2/").headers["www-authenticate"]
    realm = challenge.partition('realm="')[2].partition('"')[0]
    token = client.get(f"{realm}?{query}", Authorization=authorization).json["token"]
    assert isinstance(token, str)
    return f"Bearer {token}"


@pytest.fixture
def realm(network: HostileNetwork) -> Realm:
    realm = Realm(network, "auth.good.test")
    realm.guard(network.good, "https://auth.good.test/token")
    return realm


@pytest.fixture(params=["up", "down"])
def registry_state(request: pytest.FixtureRequest) -> str:
    state: str = request.param
    return state


def test_a_token_reads_only_what_it_was_issued_for(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon, registry_state: str
) -> None:
    digest = network.good.put_blob("b", b"private")
    client = start_daemon().client
    for_a, for_b, for_none = (token_of(client, GOOD, ALICE, *names) for names in ("a", "b", ""))
    url = f"{GOOD}/v2/b/blobs/{digest}"
    assert client.get(url, Authorization=for_b).body == b"private"
    if registry_state == "down":
        network.good.stop()
    assert client.get(url, Authorization=for_b).cache_status == "HIT"
    for token in (for_a, for_none, "Bearer garbage"):
        for _ in range(3):  # by each of the processes
            response = client.get(url, Authorization=token)
            assert response.status == (401 if registry_state == "up" else 502)
            assert b"private" not in response.body
    assert client.get(url, Authorization=for_b).cache_status == "HIT"


def test_a_token_reads_nothing_after_its_end(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon, registry_state: str
) -> None:
    digest = network.good.put_blob("b", b"private")
    client = start_daemon().client
    url = f"{GOOD}/v2/b/blobs/{digest}"
    lasting = token_of(client, GOOD, ALICE, "b")
    realm.lifetime = 1
    short = token_of(client, GOOD, ALICE, "b")
    assert client.get(url, Authorization=lasting).body == b"private"
    assert client.get(url, Authorization=short).status == 200
    realm.valid.pop(short.removeprefix("Bearer "))
    if registry_state == "down":
        network.good.stop()
    ended = threading.Event()
    for _ in range(40):
        status = client.get(url, Authorization=short).status
        if status != 200:
            break
        ended.wait(0.1)
    assert status == (401 if registry_state == "up" else 502)
    assert client.get(url, Authorization=lasting).cache_status == "HIT"


def test_a_hostile_realm_confirms_no_password(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon
) -> None:
    """It issues a token for any guess. If the guess is right, the honest registry's cache must not tell by a HIT."""
    hostile = Realm(network, "auth.evil.test", hostile=True)
    hostile.guard(network.evil, "https://auth.evil.test/token")
    digest = network.good.put_blob("b", b"private")
    client = start_daemon().client
    url = f"{GOOD}/v2/b/blobs/{digest}"
    assert client.get(url, Authorization=token_of(client, GOOD, ALICE, "b")).body == b"private"
    for guess in (ALICE, basic_authorization("alice", "guess")):
        guessed = token_of(client, EVIL, guess, "b")
        assert client.get(url, Authorization=guessed).status == 401


@pytest.mark.parametrize("token", ["\ud800", "a\r\nX-Injected: 1", "a b", "\u0000", "x" * 20_000])
def test_an_odd_token_is_502(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon, token: str
) -> None:
    realm.next_token = token
    client = start_daemon().client
    challenge = client.get(f"{GOOD}/v2/").headers["www-authenticate"]
    url = challenge.partition('realm="')[2].partition('"')[0]
    response = client.get(f"{url}?scope=repository:b:pull", Authorization=ALICE)
    assert (response.status, response.error_code) == (502, "UNAVAILABLE")


@pytest.mark.parametrize("scheme", ["Bearer" + " " * 12_000, "bEARER" + " " * 12_000])
def test_a_padded_token_makes_no_outage(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon, scheme: str
) -> None:
    """Alice may read no more. Upstream fails on fields that are too long, but the padding does not get there."""
    network.good.put("b", "latest", build_small_image("private"))
    client = start_daemon().client
    token = token_of(client, GOOD, ALICE, "b")
    url = f"{GOOD}/v2/b/manifests/latest"
    assert client.get(url, Authorization=token, Accept=ACCEPT_MANIFESTS).status == 200
    network.good.reset_rules()
    for method in ("GET", "HEAD"):
        network.good.add_rule(method, "^/v2/", refuse_or_fail)
    padded = f"{scheme} {token.removeprefix('Bearer ')}"
    for _ in range(3):  # by each of the processes
        response = client.get(url, Authorization=padded, Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.cache_status) == (401, None), response


def refuse_or_fail(exchange: HTTPExchange, _: TypedContent | None) -> None:
    """Fail on a long field as some front servers do, and refuse all others."""
    if len(exchange.request.headers.get("authorization", "")) > 8000:
        exchange.close_after_response()
    else:
        respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate='Bearer realm="https://auth.good.test/token"')


FORM = "service=registry&scope=repository:b:pull"
MALLORY, GUESS = "username=mallory&password=hers", "username=alice&password=wonderland"
MIXED_LOGINS: dict[str, tuple[str, str, dict[str, str]]] = {
    "a field of the head": ("", f"{FORM}&grant_type=password&{MALLORY}", {"Authorization": ALICE}),
    "a refresh token": ("", f"{FORM}&grant_type=refresh_token&refresh_token=hers&{GUESS}", {}),
    "two names": ("", f"{FORM}&grant_type=password&{MALLORY}&{GUESS}", {}),
    "another case": ("", f"{FORM}&grant_type=password&{MALLORY.replace('user', 'User')}&{GUESS}", {}),
    "a semicolon": ("", f"{FORM}&grant_type=password&x=;{MALLORY.replace('&', ';')};y=&{GUESS}", {}),
    "the query": (MALLORY, f"{FORM}&grant_type=password&{GUESS}", {}),
    "a client's secret": ("", f"{FORM}&grant_type=client_credentials&client_secret=hers&{GUESS}", {}),
}


@pytest.mark.parametrize("form", MIXED_LOGINS)
def test_a_login_beside_another_tells_nothing(
    network: HostileNetwork, realm: Realm, start_daemon: StartRegistryDaemon, form: str
) -> None:
    """Mallory logs in as herself, and adds a guess at alice's password. If it is right, no HIT must say so."""
    digest = network.good.put_blob("b", b"private")
    client = start_daemon().client
    url = f"{GOOD}/v2/b/blobs/{digest}"
    assert client.get(url, Authorization=token_of(client, GOOD, ALICE, "b")).body == b"private"
    realm.accept_next_as_another()
    challenge = client.get(f"{GOOD}/v2/").headers["www-authenticate"]
    query, body, headers = MIXED_LOGINS[form]
    realm_url = challenge.partition('realm="')[2].partition('"')[0]
    response = client.request("POST", f"{realm_url}?{query}", headers, body.encode())
    assert response.status == 200
    for _ in range(3):  # by each of the processes
        response_to_mallory = client.get(url, Authorization=f"Bearer {response.json['token']}")
        assert (response_to_mallory.status, response_to_mallory.body.count(b"private")) == (401, 0)
