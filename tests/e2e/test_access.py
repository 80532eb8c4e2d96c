"""Access control and credentials: upstream decides about access to cached content, and no credential goes elsewhere."""

from __future__ import annotations

import base64

import pytest

from tests.e2e.harness import fake_registry, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.upstreams import BASIC, FAKE, HUB, REGISTRY, STORE_HOST, TOKEN_URL, Upstreams

PRIVATE_REPOSITORY = "alice/app"


@pytest.fixture(scope="module")
def private_image(upstreams: Upstreams, daemon: TwistdDaemon) -> SampleImage:
    """Return an image that only alice may read, and that the daemon has cached for her."""
    image = upstreams.push_to_hub(
        PRIVATE_REPOSITORY, "1", images.build_small_image(PRIVATE_REPOSITORY), owners={"alice"}
    )
    upstreams.push_to_hub("library/public", "1", images.build_small_image("public"))
    token = _fetch_token(upstreams, daemon, PRIVATE_REPOSITORY, "alice")
    for path in _pull_paths(image):
        assert _get(daemon, path, token).status == 200
    return image


def test_the_owner_is_served_from_disk(upstreams: Upstreams, daemon: TwistdDaemon, private_image: SampleImage) -> None:
    token = _fetch_token(upstreams, daemon, PRIVATE_REPOSITORY, "alice")
    upstreams.hub.clear_log()
    for path in _pull_paths(private_image):
        assert _get(daemon, path, token).status == 200
    assert upstreams.hub.find_requests("GET", PRIVATE_REPOSITORY) == []


@pytest.mark.parametrize("user", [None, "bob"], ids=["anonymous", "bob"])
@pytest.mark.parametrize("upstream_state", ["up", "down"])
def test_others_are_refused(
    upstreams: Upstreams, daemon: TwistdDaemon, private_image: SampleImage, user: str | None, upstream_state: str
) -> None:
    token = _fetch_token(upstreams, daemon, PRIVATE_REPOSITORY, user)
    if upstream_state == "down":
        with upstreams.stopped():
            responses = [_get(daemon, path, token) for path in _pull_paths(private_image)]
            responses += [_get(daemon, path, None) for path in _pull_paths(private_image)]
    else:
        responses = [_get(daemon, path, token) for path in _pull_paths(private_image)]
        responses += [_get(daemon, path, None) for path in _pull_paths(private_image)]
    for response in responses:
        expected_statuses = (401, 403, 404) if upstream_state == "up" else (401, 403, 404, 502, 504)
        assert response.status in expected_statuses, response
        assert private_image.layers[0].data not in response.body
        assert private_image.manifest.data not in response.body


def test_digest_alone_grants_no_access(upstreams: Upstreams, daemon: TwistdDaemon, private_image: SampleImage) -> None:
    """Content that is cached for a private repository is not served under the name of a public one."""
    token = _fetch_token(upstreams, daemon, "library/public", None)
    for digest in (private_image.layers[0].digest, private_image.blobs[0].digest):
        response = _get(daemon, f"library/public/blobs/{digest}", token)
        assert (response.status, response.error_code) == (404, "BLOB_UNKNOWN")
    response = _get(daemon, f"library/public/manifests/{private_image.digest}", token)
    assert (response.status, response.error_code) == (404, "MANIFEST_UNKNOWN")
    for digest in (private_image.layers[0].digest, private_image.blobs[0].digest):
        response = daemon.client.get(f"{REGISTRY}/v2/library/public/blobs/{digest}")
        assert response.status == 404


def test_forged_token_is_rejected(upstreams: Upstreams, daemon: TwistdDaemon, private_image: SampleImage) -> None:
    valid_token = _fetch_token(upstreams, daemon, PRIVATE_REPOSITORY, "alice")
    head, _, signature = valid_token.rpartition(".")
    claims = base64.urlsafe_b64encode(f"docker.io\n{PRIVATE_REPOSITORY}".encode() + bytes(32)).decode()
    for token in (f"{head}.{signature[::-1]}", "drp." + claims, "x", ""):
        for path in _pull_paths(private_image):
            assert _get(daemon, path, token).status in (400, 401), token[:10]


def test_wrong_password_returns_401(daemon: TwistdDaemon) -> None:
    wrong_credentials = basic_authorization("alice", "guess")
    response = daemon.client.get(
        f"{TOKEN_URL}?service=registry.docker.io&scope=repository:{PRIVATE_REPOSITORY}:pull",
        Authorization=wrong_credentials,
    )
    assert response.status == 401


def test_clients_log_in_with_their_own_credentials(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    upstreams.push_to_hub("alice/cli", "1", images.build_small_image("alice/cli", oci=False), owners={"alice"})
    skopeo = clients.skopeo(daemon)
    image = "docker.io/alice/cli:1"
    skopeo.pull(image, "--src-creds", f"alice:{upstreams.users['alice']}")
    assert skopeo.try_pull(image).returncode != 0
    assert skopeo.try_pull(image, "--src-creds", f"bob:{upstreams.users['bob']}").returncode != 0
    docker = clients.docker(daemon)
    assert docker.run("pull", "alice/cli:1").returncode != 0
    docker.write_login("https://index.docker.io/v1/", "alice", upstreams.users["alice"])
    docker.run_checked("pull", "alice/cli:1")


def test_private_image_pulls_while_upstream_is_down(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory
) -> None:
    """Also with clients that do not begin with /v2/: containerd requests the manifest, and waits for a challenge."""
    daemon = start_daemon()
    image = images.build_small_image("alice/outage", oci=False)
    upstreams.push_to_hub("alice/outage", "1", image, owners={"alice"})
    name, login = "docker.io/alice/outage:1", f"alice:{upstreams.users['alice']}"
    skopeo, docker, containerd = clients.skopeo(daemon), clients.docker(daemon), clients.containerd(daemon)
    docker.write_login("https://index.docker.io/v1/", "alice", upstreams.users["alice"])
    containerd.pull(name, "--user", login)
    containerd.remove_all_images()
    path = f"{HUB}/v2/alice/outage"
    with upstreams.stopped():
        containerd.pull(name, "--user", login)
        skopeo.pull(name, "--src-creds", login)
        docker.run_checked("pull", "alice/outage:1")
        for method in ("HEAD", "GET"):
            for target in ("manifests/1", f"manifests/{image.digest}", f"blobs/{image.layers[0].digest}"):
                response = daemon.client.request(method, f"{path}/{target}", {"Accept": ACCEPT_MANIFESTS})
                assert response.status == 401
                assert 'scope="repository:alice/outage:pull"' in response.headers["www-authenticate"]
        assert containerd.try_pull("docker.io/alice/never:1", "--user", login).returncode != 0
    containerd.remove_all_images()
    assert containerd.try_pull(name).returncode != 0


def test_repository_that_became_private_is_refused(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = upstreams.push_to_hub("alice/shy", "1", images.build_small_image("shy"))
    path = "alice/shy/manifests/1"
    assert _get(daemon, path, _fetch_token(upstreams, daemon, "alice/shy", None)).body == image.manifest.data
    upstreams.token_server.owners["alice/shy"] = {"alice"}
    daemon.restart()
    assert _get(daemon, path, _fetch_token(upstreams, daemon, "alice/shy", None)).status == 401


# credentials configured by the administrator


def test_auth_registries_logs_in_to_hub_for_everyone(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory
) -> None:
    login = f"alice:{upstreams.users['alice']}"
    daemon = start_daemon(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    upstreams.push_to_hub("alice/shared", "1", images.build_small_image("alice/shared", oci=False), owners={"alice"})
    clients.docker(daemon).run_checked("pull", "alice/shared:1")
    clients.skopeo(daemon).pull("docker.io/alice/shared:1")
    containerd = clients.containerd()
    containerd.configure_mirror("docker.io", daemon.url)
    containerd.pull("docker.io/alice/shared:1")
    upstreams.push_to_hub("bob/his", "1", images.build_small_image("bob/his", oci=False), owners={"bob"})
    assert clients.skopeo(daemon).try_pull("docker.io/bob/his:1").returncode != 0


def test_unshared_configured_login(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """The configured login gives clients no access. Clients with access of their own keep it."""
    login = f"alice:{upstreams.users['alice']}"
    daemon = start_daemon(
        AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login} basic.test:{login}",
        SHARE_AUTH_REGISTRIES="false",
    )
    image = upstreams.push_to_hub("alice/unshared", "1", images.build_small_image("unshared"), owners={"alice"})
    basic = upstreams.push_to_basic("private/unshared", "1", images.build_small_image("basic-unshared"))
    alice_token = _fetch_token(upstreams, daemon, "alice/unshared", "alice")
    paths = ["alice/unshared/manifests/1", f"alice/unshared/blobs/{image.layers[0].digest}"]
    basic_url = f"{BASIC}/v2/private/unshared/blobs/{basic.layers[0].digest}"
    for _ in ("cold", "cached"):
        for path in paths:
            for token in (None, _fetch_token(upstreams, daemon, "alice/unshared", None)):
                assert _get(daemon, path, token).status == 401
            mirror = request_directly("GET", f"http://127.0.0.1:{daemon.port}/v2/{path}", {"Accept": ACCEPT_MANIFESTS})
            assert mirror.status in (401, 403, 404)
            assert _get(daemon, path, alice_token).status == 200
        assert daemon.client.get(basic_url).status == 401
        assert daemon.client.get(basic_url, Authorization=upstreams.basic_authorization("alice")).status == 200


def test_auth_registries_with_basic(upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory) -> None:
    """The password of alice contains a colon."""
    assert ":" in upstreams.users["alice"]
    upstreams.push_to_basic("private/app", "1", images.build_small_image("basic"))
    daemon = start_daemon(AUTH_REGISTRIES=f"basic.test:alice:{upstreams.users['alice']}")
    clients.skopeo(daemon).pull("basic.test/private/app:1")
    upstreams.basic.clear_log()
    clients.skopeo(daemon).pull("basic.test/private/app:1")
    assert upstreams.basic.find_requests("GET", "/blobs/") == []


def test_basic_auth_without_configured_login(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_basic("private/own", "1", images.build_small_image("basic-own"))
    url = f"{BASIC}/v2/private/own/blobs/{image.layers[0].digest}"
    assert daemon.client.get(url, Authorization=upstreams.basic_authorization("alice")).status == 200
    unauthorized = daemon.client.get(url)
    assert unauthorized.status == 401
    assert unauthorized.headers["www-authenticate"].startswith("Basic ")
    wrong_credentials = basic_authorization("alice", "guess")
    assert daemon.client.get(url, Authorization=wrong_credentials).status == 401
    assert daemon.client.get(url, Authorization=upstreams.basic_authorization("bob")).status == 200


def test_custom_delimiters(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """The password of Google's `_json_key` contains spaces and colons."""
    image = images.build_small_image("json-key")
    upstreams.fake.put("json/key", "1", image)
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/", fake_registry.require_authorization('Basic realm="x"'))
    key = '{ "type": "service_account", "private_key": "-----BEGIN PRIVATE KEY----- a b:c" }'
    daemon = start_daemon(
        AUTH_REGISTRIES=f"basic.test===alice===x;;;fake.test===_json_key==={key}",
        AUTH_REGISTRIES_DELIMITER=";;;",
        AUTH_REGISTRY_DELIMITER="===",
    )
    response = daemon.client.get(f"{FAKE}/v2/json/key/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.body == image.manifest.data
    authorizations = {request.headers.get("authorization") for request in upstreams.fake.requests} - {None}
    encoded = base64.b64encode(f"_json_key:{key}".encode()).decode()
    assert authorizations == {f"Basic {encoded}"}
    daemon.check_log([key, encoded, "service_account"])


def test_client_login_takes_precedence(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    login = f"alice:{upstreams.users['alice']}"
    daemon = start_daemon(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    image = upstreams.push_to_hub("alice/own", "1", images.build_small_image("alice/own"), owners={"alice"})
    assert _get(daemon, "alice/own/manifests/1", _fetch_token(upstreams, daemon, "alice/own", None)).status == 200
    for _ in range(2):
        bob_token = _fetch_token(upstreams, daemon, "alice/own", "bob")
        assert _get(daemon, "alice/own/manifests/1", bob_token).status == 401
        assert _get(daemon, f"alice/own/blobs/{image.layers[0].digest}", bob_token).status == 401


def test_configured_credential_is_not_sent_to_foreign_realm(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(AUTH_REGISTRIES="fake.test:robot:pw-robot-1234")
    upstreams.fake.put("realm", "1", images.build_small_image("realm"))
    realm = f'Bearer realm="https://{STORE_HOST}/token",service="fake.test",scope="repository:realm:pull,push"'
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/realm/", fake_registry.require_authorization(realm))
    request_count = len(upstreams.store.requests)
    response = daemon.client.get(f"{FAKE}/v2/realm/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status in (401, 403, 502)
    assert [request for request in upstreams.store.requests[request_count:] if "authorization" in request.headers] == []
    daemon.check_log(["pw-robot-1234"])


def test_one_token_is_used_for_a_whole_pull(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    login = f"alice:{upstreams.users['alice']}"
    daemon = start_daemon(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    image = upstreams.push_to_hub("alice/tokens", "1", images.build_small_image("tokens", layers=4), owners={"alice"})
    request_count = len(upstreams.token_server.requests)
    mirror = f"http://127.0.0.1:{daemon.port}/v2/alice/tokens"
    for path in ["manifests/1", *(f"blobs/{blob.digest}" for blob in image.blobs)]:
        assert request_directly("GET", f"{mirror}/{path}", {"Accept": ACCEPT_MANIFESTS}).status == 200
    assert len(upstreams.token_server.requests) - request_count == 1


def test_ca_key_is_readable_by_its_owner_only(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    keys = [
        path for path in (daemon.state_folder / "ca").rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()
    ]
    assert keys
    for path in keys:
        assert path.stat().st_mode & 0o077 == 0


def _fetch_token(upstreams: Upstreams, daemon: TwistdDaemon, name: str, user: str | None) -> str:
    """Return the token that `user` gets from the token server through the proxy."""
    headers = {} if user is None else {"Authorization": upstreams.basic_authorization(user)}
    response = daemon.client.request(
        "GET", f"{TOKEN_URL}?service=registry.docker.io&scope=repository:{name}:pull", headers
    )
    assert response.status == 200, response.body
    token = response.json["token"]
    assert isinstance(token, str)
    return token


def _pull_paths(image: SampleImage) -> list[str]:
    """Return the paths that a pull of the image from `PRIVATE_REPOSITORY` requests."""
    manifests = [f"{PRIVATE_REPOSITORY}/manifests/1", f"{PRIVATE_REPOSITORY}/manifests/{image.digest}"]
    return [*manifests, *(f"{PRIVATE_REPOSITORY}/blobs/{blob.digest}" for blob in image.blobs)]


def _get(daemon: TwistdDaemon, path: str, token: str | None) -> BufferedResponse:
    headers = {"Accept": ACCEPT_MANIFESTS}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return daemon.client.request("GET", f"{HUB}/v2/{path}", headers)
