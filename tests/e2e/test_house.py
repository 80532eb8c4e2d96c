"""The house itself: clients and upstreams work together without the daemon, so what fails elsewhere is the daemon's."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import images, wire
from tests.e2e.house.clients import Containerd, Docker, Skopeo
from tests.e2e.house.machines import Running
from tests.e2e.house.parent_proxy import ParentProxy
from tests.e2e.house.upstreams import HUB, PLAIN, REDIRECTING, RELATIVE, TOKENS, Upstreams


@pytest.fixture(scope="module")
def parent(upstreams: Upstreams) -> Iterator[ParentProxy]:
    parent = ParentProxy(upstreams.addresses)
    parent.start()
    yield parent
    parent.stop()


@pytest.fixture
def environment(parent: ParentProxy, upstreams: Upstreams) -> dict[str, str]:
    url = f"http://127.0.0.1:{parent.port}"
    return {"HTTP_PROXY": url, "HTTPS_PROXY": url, "SSL_CERT_FILE": str(upstreams.authority.file)}


@pytest.fixture
def client(parent: ParentProxy, upstreams: Upstreams) -> wire.Client:
    return wire.Client(parent.port, upstreams.trust)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


def test_hub_asks_for_a_token_and_checks_it(upstreams: Upstreams, client: wire.Client) -> None:
    image = upstreams.on_hub("library/house", "1", images.small("house"))
    url = f"{HUB}/v2/library/house/manifests/1"
    refused = client.get(url, Accept=images.EVERY_MANIFEST)
    assert refused.status == 401
    assert 'realm="https://auth.docker.io/token"' in refused.headers["www-authenticate"]
    token = client.get(f"{TOKENS}?service=registry.docker.io&scope=repository:library/house:pull").json["token"]
    answer = client.get(url, Accept=images.EVERY_MANIFEST, Authorization=f"Bearer {token}")
    assert (answer.status, answer.body) == (200, image.manifest.data)
    forged = token[:-8] + "AAAAAAAA"
    assert client.get(url, Authorization=f"Bearer {forged}").status == 401


def test_hub_keeps_what_is_private(upstreams: Upstreams, environment: dict[str, str], tmp_path: Path) -> None:
    upstreams.on_hub("alice/house", "1", images.small("private"), owners={"alice"})
    skopeo = Skopeo(tmp_path, environment)
    assert skopeo.try_pull("docker.io/alice/house:1").returncode != 0
    assert skopeo.try_pull("docker.io/alice/house:1", "--src-creds", f"bob:{upstreams.users['bob']}").returncode != 0
    skopeo.pull("docker.io/alice/house:1", "--src-creds", f"alice:{upstreams.users['alice']}")


def test_docker_pulls(upstreams: Upstreams, environment: dict[str, str], running: Running, tmp_path: Path) -> None:
    on_hub = upstreams.on_hub("library/house-docker", "1", images.small("house-docker", oci=False))
    upstreams.on_plain("plain/house", "1", images.small("plain"))
    docker = Docker(tmp_path / "d", environment, insecure=["plain.test:8080"])
    running.add(docker)
    docker.start()
    docker.do("pull", "house-docker:1")
    assert docker.digest_of("house-docker:1") == on_hub.digest
    docker.do("pull", "plain.test:8080/plain/house:1")


def test_containerd_pulls(upstreams: Upstreams, environment: dict[str, str], running: Running, tmp_path: Path) -> None:
    image = upstreams.on_registry("house/containerd", "1", images.small("house-containerd"))
    containerd = Containerd(tmp_path / "c", environment)
    running.add(containerd)
    containerd.start()
    containerd.pull("registry.test:5443/house/containerd:1")
    assert containerd.digest_of("registry.test:5443/house/containerd:1") == image.digest


def test_fronts_send_readers_elsewhere(upstreams: Upstreams, client: wire.Client) -> None:
    image = upstreams.on_registry("house/redirected", "1", images.small("redirected"))
    layer = image.layers[0]
    for front in (REDIRECTING, RELATIVE):
        first = client.get(f"{front}/v2/house/redirected/blobs/{layer.digest}")
        assert first.status == 307
        location = first.headers["location"]
        url = location if location.startswith("https:") else front + location
        assert client.get(url).body == layer.data
        assert client.get(url, Authorization="Bearer x").status == (400 if front == REDIRECTING else 200)
        assert client.get(url.partition("?")[0]).status == 403


def test_plain_and_basic(upstreams: Upstreams, client: wire.Client) -> None:
    plain = upstreams.on_plain("house/plain", "1", images.small("plain"))
    assert client.get(f"{PLAIN}/v2/house/plain/blobs/{plain.layers[0].digest}").body == plain.layers[0].data
    upstreams.on_basic("house/basic", "1", images.small("basic"))
    url = "https://basic.test/v2/house/basic/manifests/1"
    refused = client.get(url)
    assert (refused.status, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
    assert client.get(url, Authorization=upstreams.basic_login("alice"), Accept=images.EVERY_MANIFEST).status == 200


def test_broken_certificates(client: wire.Client) -> None:
    for host in ("selfsigned.test", "wrongname.test", "expired.test"):
        with pytest.raises(ssl.SSLCertVerificationError):
            client.get(f"https://{host}/v2/")


def test_registry_counts_what_it_sends(upstreams: Upstreams, client: wire.Client) -> None:
    image = upstreams.on_registry("house/counted", "1", images.small("counted"))
    upstreams.registry.forget()
    blob = f"/v2/house/counted/blobs/{image.layers[0].digest}"
    client.get(f"https://registry.test:5443{blob}")
    [access] = upstreams.registry.seen("GET", blob)
    assert (access.status, access.size) == (200, len(image.layers[0].data))
