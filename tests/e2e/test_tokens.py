"""Tokens: one program may fetch them and another one use them, either of them without the proxy; fronts; redirects."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.harness.client_factory import ClientFactory, ProcessGroup
from tests.e2e.harness.clients import Containerd, Podman, Skopeo, check_output
from tests.e2e.harness.fake_registry import require_authorization
from tests.e2e.harness.http_client import BufferedResponse, ProxyClient, basic_authorization, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, build_small_image
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.token_network import PASSWORD, USER, TokenClient, TokenNetwork, TokenRealm

ALICE = basic_authorization(USER, PASSWORD)
REGISTRY, REALM = "quay.test", "auth.elsewhere.test"
FAMILY_REALM = f"auth.{REGISTRY}"  # which has the owner of the registry
FRONT, PROPER = "lscr.test", "ghcr.test"

StartDaemon = Callable[..., RegistryDaemon]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[TokenNetwork]:
    network = TokenNetwork(tmp_path / "network")
    yield network
    network.stop()


@pytest.fixture
def start(network: TokenNetwork, tmp_path: Path) -> Iterator[StartDaemon]:
    """Return a function that starts the daemon with the given settings. At the end its log is searched for secrets."""
    group = ProcessGroup()

    def start(**settings: str) -> RegistryDaemon:
        daemon = RegistryDaemon(tmp_path / "daemon", {**network.settings, **settings})
        group.add(daemon)
        daemon.start()
        return daemon

    yield start
    group.stop()
    for daemon in group.members:
        assert isinstance(daemon, RegistryDaemon)
        daemon.check_log([PASSWORD, ALICE])


def proxy_client(network: TokenNetwork, daemon: RegistryDaemon) -> ProxyClient:
    context = ssl.create_default_context(cafile=str(network.trust_both(daemon)))
    return ProxyClient(daemon.port, context)


def client_of(network: TokenNetwork, daemon: RegistryDaemon, *, fetch: bool = True, use: bool = True) -> TokenClient:
    return TokenClient(network, proxy_client(network, daemon), fetch_by_proxy=fetch, use_by_proxy=use)


def add_guarded_registry(network: TokenNetwork, query: str = "", realm_host: str = REALM) -> TokenRealm:
    """Start a registry with a token server on a host that is not listed yet."""
    realm = network.add_realm(realm_host)
    realm.guard(network.add_registry(REGISTRY), f"https://{realm_host}/token{query}", "a")
    return realm


def wait_for(action: Callable[[], bool]) -> None:
    """Repeat `action` until it returns True: a realm counts as answering for 5 s."""
    for _ in range(100):
        with suppress(OSError, AssertionError):
            if action():
                return
        time.sleep(0.1)
    pytest.fail("no token during the outage")


PATHS_OF_A_TOKEN = [
    pytest.param(
        fetch, use, id=f"fetched {'by' if fetch else 'without'} the proxy, used {'by' if use else 'without'} it"
    )
    for fetch in (True, False)
    for use in (True, False)
]


@pytest.mark.parametrize(("fetch", "use"), PATHS_OF_A_TOKEN)
@pytest.mark.parametrize("listed", [False, True])
def test_token_is_good_whoever_fetches_and_uses_it(
    network: TokenNetwork, start: StartDaemon, fetch: bool, use: bool, listed: bool
) -> None:
    """Cold and warm, for clients without a login and for alice; her repository stays hers."""
    realm = add_guarded_registry(network)
    realm.private.add("private")
    registry = network.registry(REGISTRY)
    digests = {name: registry.put_blob(name, name.encode()) for name in ("public", "private")}
    if listed:
        network.registries.append(REALM)
    daemon = start()
    client = client_of(network, daemon, fetch=fetch, use=use)
    for _ in ("cold", "warm"):
        for name, login in (("public", None), ("public", ALICE), ("private", ALICE)):
            response = client.pull(REGISTRY, name, f"blobs/{digests[name]}", login)
            assert (response.status, response.body) == (200, name.encode()), response
            assert client.realm == f"https://{REALM}/token"
        assert client.pull(REGISTRY, "private", f"blobs/{digests['private']}").status == 401


@pytest.mark.parametrize("hides_by", [403, 404])
def test_a_private_image_that_the_registry_hides(network: TokenNetwork, start: StartDaemon, hides_by: int) -> None:
    """containerd begins with the manifest, and logs in only if that gets a challenge, as it does directly."""
    realm, registry = network.add_realm(REALM), network.add_registry(REGISTRY)
    realm.guard(registry, f"https://{REALM}/token", "a", hides_by)
    realm.private.add("private")
    registry.put("private", "1", build_small_image("hidden"))
    path = "/v2/private/manifests/1"
    daemon = start()
    for by_proxy in (False, True, True):  # directly, cold, warm
        client = client_of(network, daemon, fetch=by_proxy, use=by_proxy)
        for login, expected in ((ALICE, 200), (None, hides_by)):
            token = client.token(REGISTRY, "private", login, path)
            headers = {"Authorization": f"Bearer {token}", "Accept": ACCEPT_MANIFESTS}
            assert client.get(f"https://{REGISTRY}{path}", headers, by_proxy=by_proxy).status == expected


@pytest.mark.parametrize("listed", [False, True])
def test_a_realm_is_intercepted_only_if_it_is_listed(network: TokenNetwork, start: StartDaemon, listed: bool) -> None:
    """Also in an outage, and after a restart: a registry could name any host as its token server."""
    realm = add_guarded_registry(network)
    digest = network.registry(REGISTRY).put_blob("public", b"public")
    if listed:
        network.registries.append(REALM)
    daemon = start()
    client = client_of(network, daemon)

    def is_tunnelled() -> bool:
        connection = ProxyClient(daemon.port, network.ca.client_context()).new_connection(f"https://{REALM}/token")
        try:
            connection.request("GET", "/token")
            return connection.getresponse().status == 200
        except ssl.SSLCertVerificationError:  # it is the proxy's own
            return False
        finally:
            connection.close()

    assert is_tunnelled() is not listed
    for _ in ("running", "restarted"):
        assert client.pull(REGISTRY, "public", f"blobs/{digest}").body == b"public"
        assert is_tunnelled() is not listed
        network.registry(REGISTRY).stop()
        assert client.pull(REGISTRY, "public", f"blobs/{digest}").body == b"public"
        assert is_tunnelled() is not listed
        network.registry(REGISTRY).start()
        daemon.restart()
    assert set(realm.logins) == {None}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("gone", ["all", "realm"])
def test_outage_with_a_token_server_elsewhere(
    network: TokenNetwork, start: StartDaemon, listed: bool, gone: str
) -> None:
    realm = add_guarded_registry(network)
    digest = network.registry(REGISTRY).put_blob("public", b"public")
    if listed:
        network.registries.append(REALM)
    client = client_of(network, start(PROXY_CONNECT_TIMEOUT="5"))
    assert client.pull(REGISTRY, "public", f"blobs/{digest}").body == b"public"
    network.stop() if gone == "all" else realm.stop()
    wait_for(lambda: client.pull(REGISTRY, "public", f"blobs/{digest}").body == b"public")


@pytest.mark.parametrize("by_form", [False, True])
@pytest.mark.parametrize("query", ["", "?tenant=blue"])
def test_outage_of_a_listed_token_server_with_logins(
    network: TokenNetwork, start: StartDaemon, by_form: bool, query: str
) -> None:
    """The proxy forwards requests to a host of another owner as they are, but it learns which login is right."""
    realm = add_guarded_registry(network, query)
    realm.private.add("private")
    realm.required = {"tenant": "blue"} if query else {}
    network.registries.append(REALM)
    digest = network.registry(REGISTRY).put_blob("private", b"private")
    client = client_of(network, start(PROXY_CONNECT_TIMEOUT="5"))

    def pull(password: str) -> BufferedResponse:
        if by_form:
            token = client.token_by_form(REGISTRY, "private", USER, password)
        else:
            token = client.token(REGISTRY, "private", basic_authorization(USER, password)) or ""
        url = f"https://{REGISTRY}/v2/private/blobs/{digest}"
        return client.get(url, {"Authorization": f"Bearer {token}"}, by_proxy=True)

    assert pull(PASSWORD).body == b"private"
    assert client.realm == f"https://{REALM}/token{query}"
    network.stop()
    assert pull(PASSWORD).body == b"private"  # the realm counts as answering for 5 s
    wait_for(lambda: pull(PASSWORD).body == b"private" and client.realm.startswith(f"https://{REGISTRY}/.well-known/"))
    with pytest.raises(AssertionError, match="502"):
        pull("guessed")
    assert client.pull(REGISTRY, "private", f"blobs/{digest}").status != 200


@pytest.mark.parametrize("order", [(REGISTRY, "second.test"), ("second.test", REGISTRY)])
@pytest.mark.parametrize("first", [0, 1])
def test_one_realm_of_two_registries(
    network: TokenNetwork, start: StartDaemon, order: tuple[str, str], first: int
) -> None:
    """lscr.io names the token server of ghcr.io. A token is good at both, in each order, warm and in an outage."""
    realm = network.add_realm(FAMILY_REALM)
    digests = {}
    for host in order:
        registry = network.add_registry(host)
        realm.guard(registry, f"https://{FAMILY_REALM}/token", "shared")
        digests[host] = registry.put_blob("app", host.encode())
    network.registries.append(FAMILY_REALM)
    client = client_of(network, start())
    client.token(order[first], "app")
    client.token(order[1 - first], "app")
    for state in ("cold", "warm", "gone"):
        if state == "gone":
            network.stop()
        for host in order:
            token = client.token(host, "app")
            for other in order:
                url = f"https://{other}/v2/app/blobs/{digests[other]}"
                response = client.get(url, {"Authorization": f"Bearer {token}"}, by_proxy=True)
                assert response.body == other.encode(), (state, response)


def test_tokens_of_a_fleet_are_requested_once(network: TokenNetwork, start: StartDaemon) -> None:
    realm = add_guarded_registry(network, realm_host=FAMILY_REALM)
    network.registries.append(FAMILY_REALM)
    client = client_of(network, start(WORKERS="1"))
    tokens = {client.token(REGISTRY, "app") for _ in range(20)}
    assert len(tokens) == len(realm.queries) == 1


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("login", [None, ALICE])
@pytest.mark.parametrize("query", ["?tenant=blue", "?tenant=blue&service=b&scope=repository:other:pull"])
def test_query_of_a_realm_is_kept(
    network: TokenNetwork, start: StartDaemon, listed: bool, login: str | None, query: str
) -> None:
    realm = add_guarded_registry(network, query=query)
    realm.required = {"tenant": "blue"}
    digest = network.registry(REGISTRY).put_blob("app", b"app")
    if listed:
        network.registries.append(REALM)
    client = client_of(network, start())
    assert client.pull(REGISTRY, "app", f"blobs/{digest}", login).body == b"app"
    local = f"https://{REGISTRY}/.well-known/docker-registry-proxy/token?service=a&scope=repository:app:pull"
    headers = {} if login is None else {"Authorization": login}
    assert client.get(local, headers, by_proxy=True).status == 200
    assert realm.queries
    assert all("tenant=blue" in query and "service=a" in query for query in realm.queries)


@pytest.mark.parametrize("fetch", [True, False])
def test_shared_login_serves_the_bearer_of_any_anonymous_token(
    network: TokenNetwork, start: StartDaemon, fetch: bool
) -> None:
    realm = add_guarded_registry(network, realm_host=FAMILY_REALM)
    realm.private.add("private")
    digest = network.registry(REGISTRY).put_blob("private", b"private")
    network.registries.append(FAMILY_REALM)
    logins = f"{FAMILY_REALM}:{USER}:{PASSWORD} {REGISTRY}:{USER}:{PASSWORD}"
    client = client_of(network, start(AUTH_REGISTRIES=logins), fetch=fetch)
    url = f"https://{REGISTRY}/v2/private/blobs/{digest}"
    assert client.get(url, by_proxy=True).body == b"private"  # needs no token
    for _ in range(2):
        assert client.pull(REGISTRY, "private", f"blobs/{digest}").body == b"private"
    network.stop()
    token = "Bearer fetched-elsewhere"
    assert client.get(url, {"Authorization": token}, by_proxy=True).body == b"private"


@pytest.mark.parametrize("listed", [False, True])
def test_shared_login_needs_no_token_where_the_token_server_refuses_strangers(
    network: TokenNetwork, start: StartDaemon, listed: bool
) -> None:
    """BuildKit asks for content without a ping. A client that begins with one is told to get its token here."""
    realm = add_guarded_registry(network)
    realm.private.add("private")
    digest = network.registry(REGISTRY).put_blob("private", b"private")
    if listed:
        network.registries.append(REALM)
    logins = f"{REALM}:{USER}:{PASSWORD} {REGISTRY}:{USER}:{PASSWORD}"
    client = client_of(network, start(AUTH_REGISTRIES=logins))
    url = f"https://{REGISTRY}/v2/private/blobs/{digest}"
    for _ in ("cold", "warm"):
        assert client.get(url, by_proxy=True).body == b"private"
        assert client.pull(REGISTRY, "private", f"blobs/{digest}").body == b"private"
        assert client.realm == f"https://{REGISTRY}/.well-known/docker-registry-proxy/token"


# fronts


def add_front(
    network: TokenNetwork, status: int = 307, pattern: str = "/v2/", proper_listed: bool = False
) -> TokenRealm:
    """Start a front of a registry that wants tokens of its own realm."""
    proper = network.add_registry(PROPER)
    if not proper_listed:
        network.registries.remove(PROPER)
    realm = network.add_realm(f"auth.{PROPER}")
    realm.guard(proper, f"https://auth.{PROPER}/token", "proper")
    network.add_front(FRONT, PROPER, status, pattern)
    return realm


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("pattern", ["/v2/", "/v2/.+"])
def test_front(network: TokenNetwork, start: StartDaemon, status: int, pattern: str) -> None:
    """By interception and as a mirror, cold, warm and stale. The front gets no token."""
    add_front(network, status, pattern)
    front, proper = (network.registry(host) for host in (FRONT, PROPER))
    image = build_small_image("front")
    proper.put("app", "1", image)
    daemon = start(PROXY_CONNECT_TIMEOUT="5")
    client = client_of(network, daemon)
    paths = ["manifests/1", *(f"blobs/{blob.digest}" for blob in image.blobs)]
    contents = [image.manifest.data, *(blob.data for blob in image.blobs)]
    for state in ("cold", "warm", "stale"):
        token = client.token(FRONT, "app") if state != "stale" else None
        if state == "stale":
            network.stop()
        for path, content in zip(paths, contents, strict=True):
            headers = {"Accept": ACCEPT_MANIFESTS} | ({} if token is None else {"Authorization": f"Bearer {token}"})
            assert client.get(f"https://{FRONT}/v2/app/{path}", headers, by_proxy=True).body == content, (state, path)
            url = f"{daemon.url}/v2/app/{path}?ns={FRONT}"
            assert request_directly("GET", url, {"Accept": ACCEPT_MANIFESTS}).body == content
    assert {request.headers.get("authorization") for request in front.requests} == {None}


@pytest.mark.parametrize("listed", [False, True])
def test_logins_of_a_front(network: TokenNetwork, start: StartDaemon, listed: bool) -> None:
    """The login for the registry proper is used there, the one for the front nowhere else, alice's as without us."""
    realm = add_front(network, proper_listed=listed)
    realm.private.add("private")
    digest = network.registry(PROPER).put_blob("private", b"private")
    path, url = f"blobs/{digest}", f"https://{FRONT}/v2/private/blobs/{digest}"
    daemon = start(AUTH_REGISTRIES=f"{FRONT}:robot:pw-of-robot")
    client = client_of(network, daemon)
    assert client.get(url, by_proxy=True).status == 401
    assert client.pull(FRONT, "private", path).status == 401
    assert client.pull(FRONT, "private", path, ALICE).body == b"private"
    assert {*realm.logins} == {None, ALICE}
    daemon.stop()
    login = f"{USER}:{PASSWORD}"
    daemon = start(AUTH_REGISTRIES=f"{PROPER}:{login} auth.{PROPER}:{login}")
    client = client_of(network, daemon)
    mirror = f"{daemon.url}/v2/private/{path}?ns={FRONT}"
    assert request_directly("GET", mirror).body == client.get(url, by_proxy=True).body == b"private"
    front = network.registry(FRONT)
    assert {request.headers.get("authorization") for request in front.requests} == {None}
    network.stop()
    assert request_directly("GET", mirror).body == b"private"


def test_a_content_delivery_networks_401_stays(network: TokenNetwork, start: StartDaemon) -> None:
    proper = network.add_registry(PROPER)
    for method in ("GET", "HEAD"):
        proper.add_rule(method, "/v2/", require_authorization('Basic realm="x"'))
    network.add_front(FRONT, PROPER)
    daemon = start(AUTH_REGISTRIES=f"{FRONT}:robot:pw-of-robot {PROPER}:{USER}:{PASSWORD}")
    assert daemon.client.get(f"https://{FRONT}/v2/app/manifests/1").status == 401
    assert {request.headers.get("authorization") for request in proper.requests} == {None}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "kept"),
    [("/token/", True), (f"https://{FAMILY_REALM}/other", True), ("https://tokens.test/token/", False)],
)
def test_token_server_behind_a_redirect(
    network: TokenNetwork, start: StartDaemon, status: int, location: str, kept: bool
) -> None:
    realm = add_guarded_registry(network, realm_host=FAMILY_REALM)
    other = network.add_realm("tokens.test")
    other.readable = realm.readable
    realm.location, realm.status = location, status
    digest = network.registry(REGISTRY).put_blob("app", b"app")
    network.registries.append(FAMILY_REALM)
    client = client_of(network, start())
    assert client.pull(REGISTRY, "app", f"blobs/{digest}").body == b"app"
    assert client.pull(REGISTRY, "app", f"blobs/{digest}", ALICE).body == b"app"
    assert ALICE not in other.logins
    assert (realm.logins.count(ALICE) == 2) is kept


def test_realm_without_tls_that_has_tls(network: TokenNetwork, start: StartDaemon) -> None:
    """Harbor's, if it is configured so: docker sends the password in the clear, and follows the redirect."""
    plain, secure = network.add_realm(REALM, tls=False), network.add_realm(REALM)
    plain.location = f"https://{REALM}/token"
    secure.private.add("app")
    registry = network.add_registry(REGISTRY)
    secure.guard(registry, f"http://{REALM}/token", "a")
    digest = registry.put_blob("app", b"app")
    client = client_of(network, start())
    assert client.pull(REGISTRY, "app", f"blobs/{digest}", ALICE).body == b"app"
    assert ALICE in secure.logins and ALICE not in plain.logins


# real clients


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["front", "elsewhere"])
def test_real_clients(
    network: TokenNetwork, start: StartDaemon, clients: ClientFactory, tmp_path: Path, kind: str
) -> None:
    """docker, containerd, podman and skopeo pull, with an empty storage each, cold, warm, and in an outage."""
    if kind == "front":
        add_front(network)
        host, source = FRONT, network.registry(PROPER)
    else:
        add_guarded_registry(network)
        host, source = REGISTRY, network.registry(REGISTRY)
    image = build_small_image(kind, oci=False)
    source.put("app", "1", image)
    daemon = start(PROXY_CONNECT_TIMEOUT="5")
    environment = {**daemon.client_environment, "SSL_CERT_FILE": str(network.trust_both(daemon))}
    docker = clients.docker_with(environment)
    containerd = Containerd(tmp_path / "containerd", environment)
    group = ProcessGroup()
    group.add(containerd)
    containerd.start()
    podman = Podman(tmp_path / "p", environment)
    skopeo = Skopeo(tmp_path / "skopeo", environment)
    try:
        for state in ("cold", "warm", "gone"):
            if state == "gone":
                network.stop()
            else:
                docker.run_checked("pull", f"{host}/app:1")
                docker.remove_all_images()
                check_output(podman.run("pull", "-q", f"{host}/app:1"))
                assert (skopeo.pull(f"{host}/app:1") / "manifest.json").read_bytes() == image.manifest.data
            containerd.pull(f"{host}/app:1")
            containerd.remove_all_images()
    finally:
        group.stop()


@pytest.mark.parametrize("path", ["/second/token", None], ids=["moved", "open"])
def test_a_registry_that_leaves_its_token_server(
    network: TokenNetwork, start: StartDaemon, clients: ClientFactory, path: str | None
) -> None:
    """The old one is 404. A client that begins with `/v2/` is led there by the challenge that is remembered."""
    registry, realm = network.add_registry(REGISTRY), TokenRealm(None)
    images = [build_small_image(name) for name in ("before", "after", "direct")]
    for image, name in zip(images, ("before", "after", "direct"), strict=True):
        registry.put(f"moving/{name}", "1", image)

    def move(path: str | None) -> None:
        registry.reset_rules()
        if path is not None:
            realm.guard(registry, f"https://{REGISTRY}{path}", REGISTRY)
            registry.add_rule("GET", f"^{path}", lambda exchange, content: realm.handle(exchange))

    move("/first/token")
    daemon = start()
    skopeo = clients.skopeo(daemon)
    skopeo.pull(f"{REGISTRY}/moving/before:1")
    move(path)
    skopeo.pull(f"{REGISTRY}/moving/after:1")
    url = f"https://{REGISTRY}/v2/moving/direct/manifests/1"  # containerd does not begin with /v2/
    assert proxy_client(network, daemon).get(url, Accept=ACCEPT_MANIFESTS).status == 200
