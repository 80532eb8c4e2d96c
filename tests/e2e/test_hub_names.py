"""Docker Hub under its other names, as crane, kaniko, cosign (go-containerregistry) and `docker search` use them."""

from __future__ import annotations

import re

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.upstreams import HUB, HUB_ALIASES, TOKEN_URL, Upstreams


def pull_like_crane(daemon: TwistdDaemon, host: str, name: str, image: SampleImage) -> set[str | None]:
    """Pull `image` as go-containerregistry does: ping, token, manifest, blobs. Return the cache statuses."""
    url = f"https://{host}/v2/"
    challenge = daemon.client.get(url)
    assert challenge.status == 401
    realm, service = re.findall(r'(?:realm|service)="([^"]*)"', challenge.headers["www-authenticate"])
    assert (realm, service) == (TOKEN_URL, "registry.docker.io")
    token = daemon.client.get(f"{realm}?scope=repository%3A{name.replace('/', '%2F')}%3Apull&service={service}").json[
        "token"
    ]
    fields = {"Authorization": f"Bearer {token}", "Accept": ACCEPT_MANIFESTS}
    manifest = daemon.client.request("GET", f"{url}{name}/manifests/1", fields)
    assert (manifest.status, manifest.body) == (200, image.manifest.data)
    responses = [manifest]
    for blob in image.blobs:
        responses.append(daemon.client.request("GET", f"{url}{name}/blobs/{blob.digest}", fields))
        assert responses[-1].body == blob.data
    for other in (*HUB_ALIASES, "registry-1.docker.io"):  # a token is good at each name
        assert daemon.client.request("HEAD", f"https://{other}/v2/{name}/manifests/1", fields).status == 200
    return {response.cache_status for response in responses}


@pytest.mark.parametrize("host", HUB_ALIASES)
def test_pull_like_crane(upstreams: Upstreams, daemon: TwistdDaemon, host: str) -> None:
    name = f"library/{host.replace('.', '-')}"
    image = upstreams.push_to_hub(name, "1", images.build_small_image(host))
    upstreams.hub_pages.requests.clear()
    assert pull_like_crane(daemon, host, name, image) == {"MISS"}
    assert pull_like_crane(daemon, host, name, image) == {"HIT", "REVALIDATED"}
    assert pull_like_crane(daemon, "registry-1.docker.io", name, image) == {"HIT", "REVALIDATED"}
    with upstreams.stopped():
        assert pull_like_crane(daemon, host, name, image) <= {"HIT", "STALE"}
    assert upstreams.hub_pages.requests == []


def test_pull_under_another_name_after_docker_hubs_own(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_hub("library/own-first", "1", images.build_small_image("own-first"))
    assert pull_like_crane(daemon, "registry-1.docker.io", "library/own-first", image) == {"MISS"}
    upstreams.hub.clear_log()
    assert pull_like_crane(daemon, "index.docker.io", "library/own-first", image) == {"HIT", "REVALIDATED"}
    assert not [entry for entry in upstreams.hub.log_entries if "/blobs/" in entry.path]


@pytest.mark.parametrize("host", HUB_ALIASES)
def test_mirror_by_each_name(upstreams: Upstreams, daemon: TwistdDaemon, host: str) -> None:
    name = f"library/ns-{host.replace('.', '-')}"
    image = upstreams.push_to_hub(name, "1", images.build_small_image(f"ns-{host}"))
    for path in (f"{name}/manifests/1?ns={host}", f"{host}/{name}/manifests/1"):
        url = f"http://127.0.0.1:{daemon.port}/v2/{path}"
        assert http_client.request_directly("GET", url, {"Accept": ACCEPT_MANIFESTS}).body == image.manifest.data


@pytest.mark.parametrize("host", HUB_ALIASES)
def test_pages_are_those_of_the_host(daemon: TwistdDaemon, host: str) -> None:
    for path in ("/v1/search?q=nginx&n=25", "/v1/_ping", "/v2/repositories/library/nginx/tags?page_size=9"):
        page = daemon.client.get(f"https://{host}{path}").json
        assert (page["host"], page["path"]) == (host, path)
    redirect = daemon.client.get(f"https://{host}/")
    assert (redirect.status, redirect.headers["location"]) == (301, "https://www.docker.com/")


def test_docker_search(daemon: TwistdDaemon, clients: ClientFactory) -> None:
    assert "found-at/index.docker.io" in clients.docker(daemon).run_checked("search", "nginx")


@pytest.mark.parametrize("host", HUB_ALIASES)
def test_push_needs_permission_under_each_name(upstreams: Upstreams, daemon: TwistdDaemon, host: str) -> None:
    login = {"Authorization": upstreams.basic_authorization("alice")}
    response = daemon.client.request("POST", f"https://{host}/v2/alice/x/blobs/uploads/", login, b"")
    assert response.status == 405
    assert "ALLOW_PUSH" in response.error_message


def test_registries_may_name_docker_hub(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(REGISTRIES="quay.io index.docker.io docker.io")
    image = upstreams.push_to_hub("library/listed", "1", images.build_small_image("listed"))
    assert pull_like_crane(daemon, "index.docker.io", "library/listed", image) == {"MISS"}
    assert pull_like_crane(daemon, "registry-1.docker.io", "library/listed", image) == {"HIT", "REVALIDATED"}


@pytest.mark.parametrize("key", ["index.docker.io", "https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"])
def test_login_under_each_name(upstreams: Upstreams, start_daemon: StartDaemon, key: str) -> None:
    name = f"alice/{re.sub('[^a-z0-9]+', '-', key).strip('-')}"
    image = upstreams.push_to_hub(name, "1", images.build_small_image(key), {"alice"})
    daemon = start_daemon(AUTH_REGISTRIES=f"{key}:alice:{upstreams.users['alice']} unlisted.test:me:pw-of-nobody")
    assert pull_like_crane(daemon, "index.docker.io", name, image) == {"MISS"}
    assert "AUTH_REGISTRIES: entry 2 is never used" in daemon.output_text
    assert "pw-of-nobody" not in daemon.output_text


def test_token_for_another_service_is_the_token_servers(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """A token of ours would mean nothing to notary, and one that works without the proxy is better anywhere."""
    query = "scope=repository:docker.io/library/x:pull"
    token = daemon.client.get(f"{TOKEN_URL}?service=notary.docker.io&{query}").json["token"]
    assert token in upstreams.token_server.issued_tokens
    assert daemon.client.get(f"{HUB}/v2/").status == 401
    token = daemon.client.get(f"{TOKEN_URL}?service=registry.docker.io&{query}").json["token"]
    assert token in upstreams.token_server.issued_tokens
    with upstreams.stopped():
        query += "-2"
        assert daemon.client.get(f"{TOKEN_URL}?service=notary.docker.io&{query}").status == 502
        token = daemon.client.get(f"{TOKEN_URL}?service=registry.docker.io&{query}").json["token"]
        assert token.startswith("drp.")
