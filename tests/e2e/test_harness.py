"""The harness itself: clients and upstreams work together without the daemon.

If these tests pass and another one fails, the fault is the daemon's.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ProcessGroup
from tests.e2e.harness.clients import Containerd, Docker, Skopeo
from tests.e2e.harness.recording_proxy import RecordingProxy
from tests.e2e.harness.upstreams import HUB, PLAIN, REDIRECTING_ABSOLUTE, REDIRECTING_RELATIVE, TOKEN_URL, Upstreams


@pytest.fixture(scope="module")
def recording_proxy(upstreams: Upstreams) -> Iterator[RecordingProxy]:
    proxy_server = RecordingProxy(upstreams.addresses)
    proxy_server.start()
    yield proxy_server
    proxy_server.stop()


@pytest.fixture
def environment(recording_proxy: RecordingProxy, upstreams: Upstreams) -> dict[str, str]:
    url = f"http://127.0.0.1:{recording_proxy.port}"
    return {"HTTP_PROXY": url, "HTTPS_PROXY": url, "SSL_CERT_FILE": str(upstreams.ca.ca_file)}


@pytest.fixture
def client(recording_proxy: RecordingProxy, upstreams: Upstreams) -> http_client.ProxyClient:
    return http_client.ProxyClient(recording_proxy.port, upstreams.client_context)


@pytest.fixture
def process_group() -> Iterator[ProcessGroup]:
    group = ProcessGroup()
    yield group
    group.stop()


def test_hub_requires_a_valid_token(upstreams: Upstreams, client: http_client.ProxyClient) -> None:
    image = upstreams.push_to_hub("library/harness", "1", images.build_small_image("harness"))
    url = f"{HUB}/v2/library/harness/manifests/1"
    unauthorized = client.get(url, Accept=images.ACCEPT_MANIFESTS)
    assert unauthorized.status == 401
    assert 'realm="https://auth.docker.io/token"' in unauthorized.headers["www-authenticate"]
    token = client.get(f"{TOKEN_URL}?service=registry.docker.io&scope=repository:library/harness:pull").json["token"]
    response = client.get(url, Accept=images.ACCEPT_MANIFESTS, Authorization=f"Bearer {token}")
    assert (response.status, response.body) == (200, image.manifest.data)
    forged_token = token[:-8] + "AAAAAAAA"
    assert client.get(url, Authorization=f"Bearer {forged_token}").status == 401


def test_hub_hides_private_repositories(upstreams: Upstreams, environment: dict[str, str], tmp_path: Path) -> None:
    upstreams.push_to_hub("alice/harness", "1", images.build_small_image("private"), owners={"alice"})
    skopeo = Skopeo(tmp_path, environment)
    assert skopeo.try_pull("docker.io/alice/harness:1").returncode != 0
    assert skopeo.try_pull("docker.io/alice/harness:1", "--src-creds", f"bob:{upstreams.users['bob']}").returncode != 0
    skopeo.pull("docker.io/alice/harness:1", "--src-creds", f"alice:{upstreams.users['alice']}")


def test_docker_pulls(
    upstreams: Upstreams, environment: dict[str, str], process_group: ProcessGroup, tmp_path: Path
) -> None:
    hub_image = upstreams.push_to_hub(
        "library/harness-docker", "1", images.build_small_image("harness-docker", oci=False)
    )
    upstreams.push_to_plain("plain/harness", "1", images.build_small_image("plain"))
    docker = Docker(tmp_path / "d", environment, insecure=["plain.test:8080"])
    process_group.add(docker)
    docker.start()
    docker.run_checked("pull", "harness-docker:1")
    assert docker.image_digest("harness-docker:1") == hub_image.digest
    docker.run_checked("pull", "plain.test:8080/plain/harness:1")


def test_containerd_pulls(
    upstreams: Upstreams, environment: dict[str, str], process_group: ProcessGroup, tmp_path: Path
) -> None:
    image = upstreams.push_to_registry("harness/containerd", "1", images.build_small_image("harness-containerd"))
    containerd = Containerd(tmp_path / "c", environment)
    process_group.add(containerd)
    containerd.start()
    containerd.pull("registry.test:5443/harness/containerd:1")
    assert containerd.image_digest("registry.test:5443/harness/containerd:1") == image.digest


def test_blob_redirects(upstreams: Upstreams, client: http_client.ProxyClient) -> None:
    image = upstreams.push_to_registry("harness/redirected", "1", images.build_small_image("redirected"))
    layer = image.layers[0]
    for base_url in (REDIRECTING_ABSOLUTE, REDIRECTING_RELATIVE):
        redirect = client.get(f"{base_url}/v2/harness/redirected/blobs/{layer.digest}")
        assert redirect.status == 307
        location = redirect.headers["location"]
        url = location if location.startswith("https:") else base_url + location
        assert client.get(url).body == layer.data
        assert client.get(url, Authorization="Bearer x").status == (400 if base_url == REDIRECTING_ABSOLUTE else 200)
        assert client.get(url.partition("?")[0]).status == 403


def test_plain_http_and_basic_auth(upstreams: Upstreams, client: http_client.ProxyClient) -> None:
    image = upstreams.push_to_plain("harness/plain", "1", images.build_small_image("plain"))
    assert client.get(f"{PLAIN}/v2/harness/plain/blobs/{image.layers[0].digest}").body == image.layers[0].data
    upstreams.push_to_basic("harness/basic", "1", images.build_small_image("basic"))
    url = "https://basic.test/v2/harness/basic/manifests/1"
    unauthorized = client.get(url)
    assert (unauthorized.status, unauthorized.headers["www-authenticate"].split()[0]) == (401, "Basic")
    assert (
        client.get(url, Authorization=upstreams.basic_authorization("alice"), Accept=images.ACCEPT_MANIFESTS).status
        == 200
    )


def test_invalid_certificates_are_rejected(client: http_client.ProxyClient) -> None:
    for host in ("selfsigned.test", "wrongname.test", "expired.test"):
        with pytest.raises(ssl.SSLCertVerificationError):
            client.get(f"https://{host}/v2/")


def test_registry_logs_response_sizes(upstreams: Upstreams, client: http_client.ProxyClient) -> None:
    image = upstreams.push_to_registry("harness/counted", "1", images.build_small_image("counted"))
    upstreams.registry.clear_log()
    blob_path = f"/v2/harness/counted/blobs/{image.layers[0].digest}"
    client.get(f"https://registry.test:5443{blob_path}")
    [entry] = upstreams.registry.find_requests("GET", blob_path)
    assert (entry.status, entry.size) == (200, len(image.layers[0].data))
