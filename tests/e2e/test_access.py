"""Who gets what: upstream's word counts, whatever the cache holds; and whose credential goes where."""

from __future__ import annotations

import base64

import pytest

from tests.e2e.house import fake_registry, images
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.images import EVERY_MANIFEST, Image
from tests.e2e.house.machines import Machines
from tests.e2e.house.upstreams import BASIC, FAKE, HUB, REGISTRY, STORE, TOKENS, Upstreams
from tests.e2e.house.wire import Answer, request

PRIVATE = "alice/app"


@pytest.fixture(scope="module")
def private(upstreams: Upstreams, proxy: Proxy) -> Image:
    """An image that only alice may read, and that the daemon has cached for her."""
    image = upstreams.on_hub(PRIVATE, "1", images.small(PRIVATE), owners={"alice"})
    upstreams.on_hub("library/public", "1", images.small("public"))
    token = _token(upstreams, proxy, PRIVATE, "alice")
    for path in _paths(image):
        assert _get(proxy, path, token).status == 200
    return image


def test_the_owner_is_served_from_disk(upstreams: Upstreams, proxy: Proxy, private: Image) -> None:
    token = _token(upstreams, proxy, PRIVATE, "alice")
    upstreams.hub.forget()
    for path in _paths(private):
        assert _get(proxy, path, token).status == 200
    assert upstreams.hub.seen("GET", PRIVATE) == []


@pytest.mark.parametrize("who", [None, "bob"], ids=["anonymous", "bob"])
@pytest.mark.parametrize("upstream", ["there", "gone"])
def test_others_are_refused(upstreams: Upstreams, proxy: Proxy, private: Image, who: str | None, upstream: str) -> None:
    token = _token(upstreams, proxy, PRIVATE, who)
    if upstream == "gone":
        with upstreams.away():
            answers = [_get(proxy, path, token) for path in _paths(private)]
            answers += [_get(proxy, path, None) for path in _paths(private)]
    else:
        answers = [_get(proxy, path, token) for path in _paths(private)]
        answers += [_get(proxy, path, None) for path in _paths(private)]
    for answer in answers:
        assert answer.status in ((401, 403, 404) if upstream == "there" else (401, 403, 404, 502, 504)), answer
        assert private.layers[0].data not in answer.body
        assert private.manifest.data not in answer.body


def test_a_digest_is_no_right_to_read(upstreams: Upstreams, proxy: Proxy, private: Image) -> None:
    """What the cache has from a private repository is not had under the name of a public one."""
    token = _token(upstreams, proxy, "library/public", None)
    for digest in (private.layers[0].digest, private.blobs[0].digest):
        answer = _get(proxy, f"library/public/blobs/{digest}", token)
        assert (answer.status, answer.error_code) == (404, "BLOB_UNKNOWN")
    answer = _get(proxy, f"library/public/manifests/{private.digest}", token)
    assert (answer.status, answer.error_code) == (404, "MANIFEST_UNKNOWN")
    for digest in (private.layers[0].digest, private.blobs[0].digest):
        answer = proxy.client.get(f"{REGISTRY}/v2/library/public/blobs/{digest}")
        assert answer.status == 404


def test_a_forged_token_gets_nothing(upstreams: Upstreams, proxy: Proxy, private: Image) -> None:
    real = _token(upstreams, proxy, PRIVATE, "alice")
    head, _, signature = real.rpartition(".")
    claims = base64.urlsafe_b64encode(f"docker.io\n{PRIVATE}".encode() + bytes(32)).decode()
    for token in (f"{head}.{signature[::-1]}", "drp." + claims, "x", ""):
        for path in _paths(private):
            assert _get(proxy, path, token).status in (400, 401), token[:10]


def test_a_wrong_password_is_upstreams_401(proxy: Proxy) -> None:
    wrong = base64.b64encode(b"alice:guess").decode()
    answer = proxy.client.get(
        f"{TOKENS}?service=registry.docker.io&scope=repository:{PRIVATE}:pull", Authorization=f"Basic {wrong}"
    )
    assert answer.status == 401


def test_real_clients_log_in_for_themselves(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    upstreams.on_hub("alice/cli", "1", images.small("alice/cli", oci=False), owners={"alice"})
    skopeo = machines.skopeo(proxy)
    image = "docker.io/alice/cli:1"
    skopeo.pull(image, "--src-creds", f"alice:{upstreams.users['alice']}")
    assert skopeo.try_pull(image).returncode != 0
    assert skopeo.try_pull(image, "--src-creds", f"bob:{upstreams.users['bob']}").returncode != 0
    docker = machines.docker(proxy)
    assert docker.run("pull", "alice/cli:1").returncode != 0
    docker.login("https://index.docker.io/v1/", "alice", upstreams.users["alice"])
    docker.do("pull", "alice/cli:1")


def test_what_became_private_is_refused(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    image = upstreams.on_hub("alice/shy", "1", images.small("shy"))
    path = "alice/shy/manifests/1"
    assert _get(proxy, path, _token(upstreams, proxy, "alice/shy", None)).body == image.manifest.data
    upstreams.tokens.owners["alice/shy"] = {"alice"}
    proxy.restart()
    assert _get(proxy, path, _token(upstreams, proxy, "alice/shy", None)).status == 401


# credentials of the administrator's


def test_auth_registries_logs_in_to_hub_for_everyone(
    upstreams: Upstreams, run_proxy: RunProxy, machines: Machines
) -> None:
    login = f"alice:{upstreams.users['alice']}"
    proxy = run_proxy(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    upstreams.on_hub("alice/shared", "1", images.small("alice/shared", oci=False), owners={"alice"})
    machines.docker(proxy).do("pull", "alice/shared:1")
    machines.skopeo(proxy).pull("docker.io/alice/shared:1")
    containerd = machines.containerd()
    containerd.mirror("docker.io", proxy.url)
    containerd.pull("docker.io/alice/shared:1")
    upstreams.on_hub("bob/his", "1", images.small("bob/his", oci=False), owners={"bob"})
    assert machines.skopeo(proxy).try_pull("docker.io/bob/his:1").returncode != 0


def test_a_login_of_ours_that_is_not_shared(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """It opens nothing for clients; who has a right of their own keeps it."""
    login = f"alice:{upstreams.users['alice']}"
    proxy = run_proxy(
        AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login} basic.test:{login}",
        SHARE_AUTH_REGISTRIES="false",
    )
    image = upstreams.on_hub("alice/unshared", "1", images.small("unshared"), owners={"alice"})
    basic = upstreams.on_basic("private/unshared", "1", images.small("basic-unshared"))
    own = _token(upstreams, proxy, "alice/unshared", "alice")
    paths = ["alice/unshared/manifests/1", f"alice/unshared/blobs/{image.layers[0].digest}"]
    basic_url = f"{BASIC}/v2/private/unshared/blobs/{basic.layers[0].digest}"
    for _ in ("cold", "cached"):
        for path in paths:
            for token in (None, _token(upstreams, proxy, "alice/unshared", None)):
                assert _get(proxy, path, token).status == 401
            mirror = request("GET", f"http://127.0.0.1:{proxy.port}/v2/{path}", {"Accept": EVERY_MANIFEST})
            assert mirror.status in (401, 403, 404)
            assert _get(proxy, path, own).status == 200
        assert proxy.client.get(basic_url).status == 401
        assert proxy.client.get(basic_url, Authorization=upstreams.basic_login("alice")).status == 200


def test_auth_registries_with_basic(upstreams: Upstreams, run_proxy: RunProxy, machines: Machines) -> None:
    """alice's password holds a colon."""
    assert ":" in upstreams.users["alice"]
    upstreams.on_basic("private/app", "1", images.small("basic"))
    proxy = run_proxy(AUTH_REGISTRIES=f"basic.test:alice:{upstreams.users['alice']}")
    machines.skopeo(proxy).pull("basic.test/private/app:1")
    upstreams.basic.forget()
    machines.skopeo(proxy).pull("basic.test/private/app:1")
    assert upstreams.basic.seen("GET", "/blobs/") == []


def test_without_them_basic_is_the_clients_affair(upstreams: Upstreams, proxy: Proxy) -> None:
    image = upstreams.on_basic("private/own", "1", images.small("basic-own"))
    url = f"{BASIC}/v2/private/own/blobs/{image.layers[0].digest}"
    assert proxy.client.get(url, Authorization=upstreams.basic_login("alice")).status == 200
    refused = proxy.client.get(url)
    assert refused.status == 401
    assert refused.headers["www-authenticate"].startswith("Basic ")
    wrong = base64.b64encode(b"alice:guess").decode()
    assert proxy.client.get(url, Authorization=f"Basic {wrong}").status == 401
    assert proxy.client.get(url, Authorization=upstreams.basic_login("bob")).status == 200


def test_other_delimiters(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """Google's `_json_key` has a password full of spaces and colons."""
    image = images.small("json-key")
    upstreams.fake.put("json/key", "1", image)
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/v2/", fake_registry.challenge('Basic realm="x"'))
    key = '{ "type": "service_account", "private_key": "-----BEGIN PRIVATE KEY----- a b:c" }'
    proxy = run_proxy(
        AUTH_REGISTRIES=f"basic.test===alice===x;;;fake.test===_json_key==={key}",
        AUTH_REGISTRIES_DELIMITER=";;;",
        AUTH_REGISTRY_DELIMITER="===",
    )
    answer = proxy.client.get(f"{FAKE}/v2/json/key/manifests/1", Accept=EVERY_MANIFEST)
    assert answer.body == image.manifest.data
    sent = {seen.headers.get("authorization") for seen in upstreams.fake.requests} - {None}
    encoded = base64.b64encode(f"_json_key:{key}".encode()).decode()
    assert sent == {f"Basic {encoded}"}
    proxy.check_log([key, encoded, "service_account"])


def test_a_clients_own_login_wins(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    login = f"alice:{upstreams.users['alice']}"
    proxy = run_proxy(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    image = upstreams.on_hub("alice/own", "1", images.small("alice/own"), owners={"alice"})
    assert _get(proxy, "alice/own/manifests/1", _token(upstreams, proxy, "alice/own", None)).status == 200
    for _ in range(2):
        bobs = _token(upstreams, proxy, "alice/own", "bob")
        assert _get(proxy, "alice/own/manifests/1", bobs).status == 401
        assert _get(proxy, f"alice/own/blobs/{image.layers[0].digest}", bobs).status == 401


def test_our_credential_goes_to_no_realm_of_upstreams_choice(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(AUTH_REGISTRIES="fake.test:robot:pw-robot-1234")
    upstreams.fake.put("realm", "1", images.small("realm"))
    realm = f'Bearer realm="https://{STORE}/token",service="fake.test",scope="repository:realm:pull,push"'
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/v2/realm/", fake_registry.challenge(realm))
    before = len(upstreams.store.requests)
    answer = proxy.client.get(f"{FAKE}/v2/realm/manifests/1", Accept=EVERY_MANIFEST)
    assert answer.status in (401, 403, 502)
    assert [seen for seen in upstreams.store.requests[before:] if "authorization" in seen.headers] == []
    proxy.check_log(["pw-robot-1234"])


def test_a_token_serves_for_a_whole_pull(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    login = f"alice:{upstreams.users['alice']}"
    proxy = run_proxy(AUTH_REGISTRIES=f"auth.docker.io:{login} registry-1.docker.io:{login}")
    image = upstreams.on_hub("alice/tokens", "1", images.small("tokens", layers=4), owners={"alice"})
    before = len(upstreams.tokens.requests)
    mirror = f"http://127.0.0.1:{proxy.port}/v2/alice/tokens"
    for path in ["manifests/1", *(f"blobs/{blob.digest}" for blob in image.blobs)]:
        assert request("GET", f"{mirror}/{path}", {"Accept": EVERY_MANIFEST}).status == 200
    assert len(upstreams.tokens.requests) - before == 1


def test_the_ca_key_is_for_the_daemon_alone(upstreams: Upstreams, proxy: Proxy) -> None:
    keys = [path for path in (proxy.state / "ca").rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert keys
    for path in keys:
        assert path.stat().st_mode & 0o077 == 0


def _token(upstreams: Upstreams, proxy: Proxy, name: str, user: str | None) -> str:
    """Return what the token server gives `user`, asked through the proxy."""
    headers = {} if user is None else {"Authorization": upstreams.basic_login(user)}
    answer = proxy.client.ask("GET", f"{TOKENS}?service=registry.docker.io&scope=repository:{name}:pull", headers)
    assert answer.status == 200, answer.body
    token = answer.json["token"]
    assert isinstance(token, str)
    return token


def _paths(image: Image) -> list[str]:
    """Return what a pull of the image asks for, in `PRIVATE`."""
    manifests = [f"{PRIVATE}/manifests/1", f"{PRIVATE}/manifests/{image.digest}"]
    return [*manifests, *(f"{PRIVATE}/blobs/{blob.digest}" for blob in image.blobs)]


def _get(proxy: Proxy, path: str, token: str | None) -> Answer:
    headers = {"Accept": EVERY_MANIFEST}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return proxy.client.ask("GET", f"{HUB}/v2/{path}", headers)
