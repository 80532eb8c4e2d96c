"""Pulls through interception, from the mirror and over plain HTTP, which are served from disk the second time."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.harness import fake_registry, http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import AccessLogEntry, StartDaemon, TwistdDaemon
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.recording_proxy import RecordingProxy
from tests.e2e.harness.upstreams import (
    FAKE,
    HUB,
    PLAIN,
    REDIRECTING_ABSOLUTE,
    REDIRECTING_RELATIVE,
    REGISTRY,
    TOKEN_URL,
    Upstreams,
)

# whole pulls by real clients


def test_docker_pulls_from_hub_then_from_cache(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    image = upstreams.push_to_hub("library/first", "1", images.build_small_image("first", oci=False, layers=3))
    first_docker = clients.docker(daemon)
    first_docker.run_checked("pull", "first:1")
    assert first_docker.image_digest("first:1") == image.digest
    upstreams.hub.clear_log()
    log_offset = daemon.log_offset()
    second_docker = clients.docker(daemon)
    second_docker.run_checked("pull", "first:1")
    assert second_docker.image_digest("first:1") == image.digest
    assert upstreams.hub.find_requests("GET", "/library/first/") == []
    entries = find_log_entries(daemon, log_offset, "/library/first/blobs/")
    assert {line.cache_status for line in entries} == {"HIT"}
    assert len(entries) == len(image.blobs)


def test_pulled_image_runs(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory, tmp_path: Path) -> None:
    require_programs("gcc")
    source = tmp_path / "hello.c"
    source.write_text('#include <unistd.h>\nint main(void) { return write(1, "it runs\\n", 8) != 8; }\n')
    subprocess.run(["gcc", "-static", "-Os", "-o", str(tmp_path / "hello"), str(source)], check=True)
    upstreams.push_to_hub("library/program", "1", images.build_image([{"hello": (tmp_path / "hello").read_bytes()}]))
    docker = clients.docker(daemon)
    docker.run_checked("pull", "program:1")
    result = docker.run("run", "--rm", "--network", "none", "program:1")
    if result.returncode == 125 and "cgroup" in result.stderr:
        pytest.skip(f"containers cannot run on this machine: {result.stderr.strip()[-200:]}")
    assert result.stdout == "it runs\n", result.stderr


def test_docker_selects_its_platform(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    multi_platform_image = build_multi_platform_image("platforms", oci=False)
    upstreams.push_to_hub("library/platforms", "latest", multi_platform_image)
    docker = clients.docker(daemon)
    docker.run_checked("pull", "platforms")
    assert docker.image_digest("platforms") == multi_platform_image.digest


def test_docker_pulls_from_a_plain_registry(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    upstreams.push_to_plain("plain/app", "1", images.build_small_image("plain-app", oci=False))
    clients.docker(daemon).run_checked("pull", "plain.test:8080/plain/app:1")
    upstreams.plain.clear_log()
    clients.docker(daemon).run_checked("pull", "plain.test:8080/plain/app:1")
    assert upstreams.plain.find_requests("GET", "/blobs/") == []


def test_docker_uses_the_daemon_as_a_mirror(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    image = upstreams.push_to_hub("library/mirrored", "1", images.build_small_image("mirrored", oci=False))
    docker = clients.docker_with_mirror(daemon)
    docker.run_checked("pull", "mirrored:1")
    assert docker.image_digest("mirrored:1") == image.digest


def test_containerd_pulls_through_the_proxy(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    image = upstreams.push_to_registry("ctr/proxied", "1", images.build_small_image("ctr-proxied"))
    containerd = clients.containerd(daemon)
    containerd.pull("registry.test:5443/ctr/proxied:1")
    assert containerd.image_digest("registry.test:5443/ctr/proxied:1") == image.digest


def test_containerd_uses_the_daemon_as_a_mirror(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    registry_image = upstreams.push_to_registry("ctr/mirrored", "1", images.build_small_image("ctr-mirrored"))
    hub_image = upstreams.push_to_hub("library/ctr", "1", images.build_small_image("ctr-hub"))
    upstreams.push_to_plain("ctr/plain", "1", images.build_small_image("ctr-plain"))
    containerd = clients.containerd()
    for host in ("registry.test:5443", "docker.io", "plain.test:8080"):
        containerd.configure_mirror(host, daemon.url)
    containerd.pull("registry.test:5443/ctr/mirrored:1")
    containerd.pull("docker.io/library/ctr:1")
    containerd.pull("plain.test:8080/ctr/plain:1")
    assert containerd.image_digest("registry.test:5443/ctr/mirrored:1") == registry_image.digest
    assert containerd.image_digest("docker.io/library/ctr:1") == hub_image.digest


@pytest.mark.parametrize("oci", [True, False], ids=["oci", "docker"])
def test_skopeo_copies_every_platform(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory, oci: bool
) -> None:
    multi_platform_image = build_multi_platform_image(f"skopeo-{oci}", oci=oci)
    name = f"skopeo/multi-{oci}".lower()
    upstreams.push_to_registry(name, "1", multi_platform_image)
    skopeo = clients.skopeo(daemon)
    skopeo.pull(f"registry.test:5443/{name}:1", "--all")
    upstreams.registry.clear_log()
    folder = skopeo.pull(f"registry.test:5443/{name}:1", "--all")
    assert upstreams.registry.find_requests("GET", "/blobs/") == []
    assert (folder / "manifest.json").read_bytes() == multi_platform_image.manifest.data
    for child in multi_platform_image.children:
        for blob in child.blobs:
            assert (folder / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data


def test_skopeo_follows_blob_redirects(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    upstreams.push_to_registry("skopeo/redirected", "1", images.build_small_image("skopeo-redirected"))
    clients.skopeo(daemon).pull("redirecting.test/skopeo/redirected:1")
    assert upstreams.store.find_requests("GET", "/blobs/")


def test_podman_pulls_through_the_proxy(
    upstreams: Upstreams, daemon: TwistdDaemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_programs("podman", root=True)
    tmp_path = tmp_path_factory.mktemp("p")  # podman needs a short path
    image = upstreams.push_to_registry("podman/app", "1", images.build_small_image("podman"))
    storage_options = ["--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs"]
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), **daemon.client_environment}
    result = subprocess.run(
        [shutil.which("podman") or "podman", *storage_options, "pull", "-q", "registry.test:5443/podman/app:1"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == image.blobs[0].digest.removeprefix("sha256:")


# manifests


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("reference", ["tag", "digest"])
def test_manifest_by_tag_and_digest(upstreams: Upstreams, daemon: TwistdDaemon, method: str, reference: str) -> None:
    image = upstreams.push_to_registry(
        f"manifest/{method.lower()}-{reference}", "v1", images.build_small_image(f"{method}{reference}")
    )
    name = "v1" if reference == "tag" else image.digest
    url = f"{REGISTRY}/v2/manifest/{method.lower()}-{reference}/manifests/{name}"
    for _ in range(2):  # uncached, then cached
        response = daemon.client.request(method, url, {"Accept": ACCEPT_MANIFESTS})
        assert response.status == 200
        assert response.headers["docker-content-digest"] == image.digest
        assert response.headers["content-type"] == image.manifest.media_type
        assert response.headers["content-length"] == str(len(image.manifest.data))
        assert response.body == (image.manifest.data if method == "GET" else b"")


def test_cache_status(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_registry("statuses", "v1", images.build_small_image("statuses"))
    url = f"{REGISTRY}/v2/statuses"
    log_offset = daemon.log_offset()
    tag_statuses = [daemon.client.get(f"{url}/manifests/v1", Accept=ACCEPT_MANIFESTS).cache_status for _ in range(2)]
    assert tag_statuses == ["MISS", "REVALIDATED"]
    assert daemon.client.get(f"{url}/manifests/{image.digest}", Accept=ACCEPT_MANIFESTS).cache_status == "HIT"
    blob_statuses = [daemon.client.get(f"{url}/blobs/{image.layers[0].digest}").cache_status for _ in range(2)]
    assert blob_statuses == ["MISS", "HIT"]
    assert daemon.client.get(f"{url}/tags/list").cache_status == "PASS"
    wait_until(lambda: len(find_log_entries(daemon, log_offset, "/v2/statuses/")) == 6, "six requests are logged")
    entries = find_log_entries(daemon, log_offset, "/v2/statuses/")
    assert [entry.cache_status for entry in entries] == ["MISS", "REVALIDATED", "HIT", "MISS", "HIT", "PASS"]
    assert {(line.client, line.method, line.status) for line in entries} == {("127.0.0.1", "GET", 200)}
    assert entries[3].target == f"registry.test:5443/v2/statuses/blobs/{image.layers[0].digest}"
    assert entries[3].size == len(image.layers[0].data)


def test_tag_content_negotiation(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    multi_platform_image = build_multi_platform_image("accept", oci=False)
    upstreams.push_to_registry("accept", "1", multi_platform_image)
    url = f"{REGISTRY}/v2/accept/manifests/1"
    for _ in range(2):
        list_response = daemon.client.get(url, Accept=f"{images.DOCKER_LIST}, {images.DOCKER_MANIFEST}")
        assert list_response.headers["docker-content-digest"] == multi_platform_image.digest
        # distribution returns the image for amd64 to clients that do not accept manifest lists
        image_response = daemon.client.get(url, Accept=images.DOCKER_MANIFEST)
        assert image_response.headers["docker-content-digest"] == multi_platform_image.children[0].digest
        # the order of the media types in Accept does not matter
        assert (
            daemon.client.get(url, Accept=f"{images.DOCKER_MANIFEST}, {images.DOCKER_LIST}").body == list_response.body
        )


def test_moved_tag_is_revalidated(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    url = f"{REGISTRY}/v2/moving/manifests/latest"
    for seed in ("before", "after"):
        image = upstreams.push_to_registry("moving", "latest", images.build_small_image(seed))
        assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).body == image.manifest.data


def test_manifest_cache_skips_revalidation(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(
        ENABLE_MANIFEST_CACHE="true", MANIFEST_CACHE_PRIMARY_REGEX="never", MANIFEST_CACHE_PRIMARY_TIME="0s"
    )
    for tag in ("latest", "never"):
        upstreams.push_to_registry("fresh", tag, images.build_small_image(tag))
    urls = {tag: f"{REGISTRY}/v2/fresh/manifests/{tag}" for tag in ("latest", "never")}
    for url in urls.values():
        daemon.client.get(url, Accept=ACCEPT_MANIFESTS)
    upstreams.registry.clear_log()
    assert daemon.client.get(urls["latest"], Accept=ACCEPT_MANIFESTS).cache_status == "HIT"
    assert upstreams.registry.find_requests("HEAD", "/fresh/") == []
    assert daemon.client.get(urls["never"], Accept=ACCEPT_MANIFESTS).cache_status == "REVALIDATED"
    assert len(upstreams.registry.find_requests("HEAD", "/fresh/")) == 1


def test_same_tag_of_different_registries(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    registry_image = upstreams.push_to_registry("library/same", "1", images.build_small_image("same-on-registry"))
    plain_image = upstreams.push_to_plain("library/same", "1", images.build_small_image("same-on-plain"))
    hub_image = upstreams.push_to_hub("library/same", "1", images.build_small_image("same-on-hub"))
    manifests = [fetch_manifest(daemon, origin, "library/same", "1") for origin in (REGISTRY, PLAIN, HUB)]
    assert manifests == [registry_image.manifest.data, plain_image.manifest.data, hub_image.manifest.data]


def test_a_manifest_of_nearly_4_mib(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    layer = images.TypedContent(images.OCI_LAYER, b"x")
    config = images.TypedContent(images.OCI_CONFIG, b"{}")
    big = images.build_image_from_blobs(config, [layer] * 23_500)
    assert 3_900_000 < len(big.manifest.data) < 4 << 20
    upstreams.fake.put("big/manifest", "1", big)
    for _ in range(2):
        assert fetch_manifest(daemon, FAKE, "big/manifest", "1") == big.manifest.data


def test_unknown_manifest_returns_upstream_404(daemon: TwistdDaemon) -> None:
    response = daemon.client.get(f"{REGISTRY}/v2/no/such/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert (response.status, response.error_code) == (404, "MANIFEST_UNKNOWN")


def test_manifest_range_request(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """containerd 2.1 requests manifests with `Range: bytes=0-` and an Accept-Encoding."""
    image = upstreams.push_to_registry("manifest/part", "1", images.build_small_image("part"))
    url = f"{REGISTRY}/v2/manifest/part/manifests/1"
    for _ in range(2):
        response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS, Range="bytes=0-", Accept_Encoding="zstd, gzip")
        assert (response.status, response.body) in ((200, image.manifest.data), (206, image.manifest.data))


# blobs


def test_blob_head_and_get(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    layer = push_image_and_get_layer(upstreams, "blob/head")
    url = f"{REGISTRY}/v2/blob/head/blobs/{layer.digest}"
    head_before = daemon.client.head(url)
    get_response = daemon.client.get(url)
    head_after = daemon.client.head(url)
    assert get_response.body == layer.data
    for response in (head_before, get_response, head_after):
        assert response.status == 200
        assert response.headers["content-length"] == str(len(layer.data))
        assert response.headers["docker-content-digest"] == layer.digest


RANGES = {
    "bytes=0-99": (206, slice(0, 100)),
    "bytes=1000-1999": (206, slice(1000, 2000)),
    "bytes=39000-": (206, slice(39000, None)),
    "bytes=-500": (206, slice(-500, None)),
    "bytes=39000-99999999": (206, slice(39000, None)),
    "lines=1-2": (200, slice(None)),
}


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("byte_range", RANGES)
def test_blob_ranges(upstreams: Upstreams, daemon: TwistdDaemon, byte_range: str, state: str) -> None:
    data = images.random_bytes(50_000, f"range {byte_range} {state}")
    digest = upstreams.fake.put_blob("ranges", data)
    url = f"{FAKE}/v2/ranges/blobs/{digest}"
    if state == "warm":
        daemon.client.get(url)
    response = daemon.client.get(url, Range=byte_range)
    status, expected = RANGES[byte_range]
    assert (response.status, response.body) == (status, data[expected])
    if status == 206:
        start, stop, _ = expected.indices(len(data))
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    assert daemon.client.get(url).body == data


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("byte_range", ["1000-1001", "5-2"])
def test_blob_range_beyond_the_end(upstreams: Upstreams, daemon: TwistdDaemon, state: str, byte_range: str) -> None:
    digest = upstreams.fake.put_blob("ranges", images.random_bytes(1000, f"beyond {state} {byte_range}"))
    url = f"{FAKE}/v2/ranges/blobs/{digest}"
    if state == "warm":
        daemon.client.get(url)
    response = daemon.client.get(url, Range=f"bytes={byte_range}")
    assert (response.status, response.error_code) == (416, "RANGE_INVALID")
    assert response.headers["content-range"] == "bytes */1000"


def test_conditional_requests(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_registry("conditional", "1", images.build_small_image("conditional"))
    for url in (f"blobs/{image.layers[0].digest}", "manifests/1"):
        url = f"{REGISTRY}/v2/conditional/{url}"
        full_response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS)
        etag = full_response.headers["etag"]
        not_modified = daemon.client.get(url, Accept=ACCEPT_MANIFESTS, If_None_Match=etag)
        assert (not_modified.status, not_modified.body) == (304, b"")
        assert not_modified.headers["etag"] == etag
        assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS, If_None_Match='"other"').body == full_response.body
        range_response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS, Range="bytes=0-9", If_Range='"other"')
        assert (range_response.status, range_response.body) == (200, full_response.body)


@pytest.mark.parametrize(("base_url", "server"), [(REDIRECTING_ABSOLUTE, "store"), (REDIRECTING_RELATIVE, "relative")])
def test_blobs_behind_a_redirect(upstreams: Upstreams, daemon: TwistdDaemon, base_url: str, server: str) -> None:
    name = f"redirected/{server}"
    layer = push_image_and_get_layer(upstreams, name)
    url = f"{base_url}/v2/{name}/blobs/{layer.digest}"
    # The store rejects requests with an Authorization. The client's is for the registry only.
    response = daemon.client.get(url, Authorization="Basic b3duOm93bg==")
    assert (response.status, response.body) == (200, layer.data)
    store_requests = getattr(upstreams, server).find_requests("GET", f"{layer.digest}?")
    assert [request.response_status for request in store_requests] == [200]


def test_blob_is_shared_between_registries(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """Each of the others has to send two small parts of it."""
    image = images.build_small_image("shared/blob", size=200_000)
    layer = upstreams.push_to_registry("shared/blob", "1", image).layers[0]
    upstreams.push_to_plain("other/name", "1", image)
    assert daemon.client.get(f"{REDIRECTING_ABSOLUTE}/v2/shared/blob/blobs/{layer.digest}").cache_status == "MISS"
    for url in (f"{REGISTRY}/v2/shared/blob", f"{PLAIN}/v2/other/name"):
        upstreams.registry.clear_log()
        upstreams.plain.clear_log()
        for cache_status in ("REVALIDATED", "HIT"):
            response = daemon.client.get(f"{url}/blobs/{layer.digest}")
            assert (response.cache_status, response.body) == (cache_status, layer.data)
        requests = [
            request
            for registry in (upstreams.registry, upstreams.plain)
            for request in registry.find_requests("GET", "/blobs/")
        ]
        assert [request.status for request in requests] == [206, 206]
        assert sum(request.size for request in requests) < 40_000


def test_sha512(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(100_000, "sha512")
    digest = f"sha512:{hashlib.sha512(data).hexdigest()}"
    upstreams.fake.put_blob("long/digest", data, digest)
    cache_statuses = []
    for _ in range(2):
        response = daemon.client.get(f"{FAKE}/v2/long/digest/blobs/{digest}")
        assert (response.status, response.body) == (200, data)
        cache_statuses.append(response.cache_status)
    assert cache_statuses == ["MISS", "HIT"]


def test_a_blob_without_a_manifest_is_fetched(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    digest = upstreams.fake.put_blob("lone/blob", b"no manifest references this blob")
    assert daemon.client.get(f"{FAKE}/v2/lone/blob/blobs/{digest}").body == b"no manifest references this blob"


def test_an_empty_blob(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    digest = upstreams.fake.put_blob("empty", b"")
    for _ in range(2):
        response = daemon.client.get(f"{FAKE}/v2/empty/blobs/{digest}")
        assert (response.status, response.body, response.headers["content-length"]) == (200, b"", "0")


# requests that are not cached


def test_ping_tags_and_catalog(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    for tag in ("1", "2"):
        upstreams.push_to_registry("listed", tag, images.build_small_image(tag))
    assert daemon.client.get(f"{REGISTRY}/v2/").status == 200
    assert sorted(daemon.client.get(f"{REGISTRY}/v2/listed/tags/list").json["tags"]) == ["1", "2"]
    assert "listed" in daemon.client.get(f"{REGISTRY}/v2/_catalog?n=1000").json["repositories"]
    response = daemon.client.get(f"{REGISTRY}/v2/_catalog?n=1")
    assert len(response.json["repositories"]) == 1
    assert "n=1" in response.headers["link"]


def test_hub_requires_a_token(daemon: TwistdDaemon) -> None:
    response = daemon.client.get(f"{HUB}/v2/")
    assert response.status == 401
    assert 'realm="https://auth.docker.io/token"' in response.headers["www-authenticate"]
    token_response = daemon.client.get(f"{TOKEN_URL}?service=registry.docker.io&scope=repository:library/any:pull")
    assert token_response.status == 200
    assert token_response.json["token"]


def test_referrers_tag_fallback(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """distribution 2.8 has no referrers API, so the daemon uses the tag of the spec's "Referrers Tag Schema"."""
    subject = upstreams.push_to_registry("referred", "1", images.build_small_image("referred"))
    url = f"{REGISTRY}/v2/referred/referrers"
    empty_response = daemon.client.get(f"{url}/sha256:{'0' * 64}")
    assert (empty_response.status, empty_response.json["manifests"]) == (200, [])
    signature = images.build_image_from_blobs(
        images.TypedContent("application/vnd.example.signature", b"{}"),
        [images.TypedContent("application/octet-stream", b"signed")],
        subject=subject.manifest,
    )
    upstreams.push_to_registry("referred", "signature", signature)
    upstreams.push_to_registry("referred", subject.digest.replace(":", "-"), images.build_index({"unknown": signature}))
    response = daemon.client.get(f"{url}/{subject.digest}")
    assert response.status == 200
    assert response.headers["content-type"] == images.OCI_INDEX
    assert [descriptor["digest"] for descriptor in response.json["manifests"]] == [signature.digest]


# mirrors


def test_ns_selects_configured_registries_only(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_registry("by/ns", "1", images.build_small_image("by-ns"))
    path = f"http://127.0.0.1:{daemon.port}/v2/by/ns/manifests/1"
    response = http_client.request_directly("GET", f"{path}?ns=registry.test:5443", {"Accept": ACCEPT_MANIFESTS})
    assert response.body == image.manifest.data
    request_count = len(upstreams.store.requests)
    for namespace in ("store.test:8443", f"127.0.0.1:{upstreams.store.port}", "169.254.169.254", "a/b", ""):
        rejection = http_client.request_directly("GET", f"{path}?ns={namespace}", {"Accept": ACCEPT_MANIFESTS})
        assert rejection.status in (400, 403, 404), namespace
        assert rejection.error_code
    assert len(upstreams.store.requests) == request_count


def test_hub_by_alias(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = upstreams.push_to_hub("library/by-ns", "1", images.build_small_image("hub-by-ns"))
    url = f"http://127.0.0.1:{daemon.port}/v2/library/by-ns/manifests/1"
    for query in ("?ns=docker.io", "?ns=registry-1.docker.io", ""):
        response = http_client.request_directly("GET", url + query, {"Accept": ACCEPT_MANIFESTS})
        assert response.body == image.manifest.data


# upstream proxy, logs and connections


def test_through_an_upstream_proxy(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    upstream_proxy = RecordingProxy(upstreams.addresses)
    upstream_proxy.start()
    try:
        daemon = start_daemon(
            UPSTREAM_ADDRESSES="", UPSTREAM_PROXY=f"http://user:par-ent@127.0.0.1:{upstream_proxy.port}"
        )
        image = upstreams.push_to_hub("library/behind", "1", images.build_small_image("behind"))
        upstreams.push_to_registry("behind", "1", images.build_small_image("behind"))
        assert fetch_manifest(daemon, HUB, "library/behind", "1") == image.manifest.data
        assert fetch_manifest(daemon, REGISTRY, "behind", "1") == image.manifest.data
        assert {"registry-1.docker.io:443", "auth.docker.io:443", "registry.test:5443"} <= set(
            upstream_proxy.connected_targets
        )
        assert b"Basic dXNlcjpwYXItZW50" in upstream_proxy.request_heads[0]
        daemon.check_log(["par-ent", "dXNlcjpwYXItZW50"])
    finally:
        upstream_proxy.stop()


def test_json_log(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(LOG_FORMAT="json")
    layer = push_image_and_get_layer(upstreams, "logged/json")
    path = f"/v2/logged/json/blobs/{layer.digest}"
    daemon.client.get(f"{REGISTRY}{path}?secret=query")

    def log_entries() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in daemon.output_text.splitlines()]
        return [line for line in lines if line.get("path") == path]

    wait_until(log_entries, "the request is logged")
    [entry] = log_entries()
    assert {name: entry[name] for name in ("client", "method", "host", "status", "verdict")} == {
        "client": "127.0.0.1", "method": "GET", "host": "registry.test:5443", "status": 200, "verdict": "MISS",
    }  # fmt: skip
    assert "secret=query" not in daemon.output_text


def test_startup_is_logged(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    for text in (str(daemon.port), "registry-1.docker.io", "registry.test:5443", str(daemon.state_folder)):
        assert text in daemon.output_text


def test_client_connection_is_kept_alive(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    layer = push_image_and_get_layer(upstreams, "kept/alive")
    connection = daemon.client.new_connection(REGISTRY)
    try:
        for _ in range(20):
            connection.request("GET", f"/v2/kept/alive/blobs/{layer.digest}")
            assert connection.getresponse().read() == layer.data
            assert connection.sock is not None
    finally:
        connection.close()


def test_blob_of_unknown_length(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    digest = upstreams.fake.put_blob("chunked", images.random_bytes(300_000, "chunked"))
    upstreams.fake.add_rule("GET", digest, fake_registry.respond_chunked)
    response = daemon.client.get(f"{FAKE}/v2/chunked/blobs/{digest}")
    assert response.body == images.random_bytes(300_000, "chunked")


def build_multi_platform_image(seed: str, *, oci: bool) -> SampleImage:
    def child(architecture: str) -> SampleImage:
        return images.build_image(
            [{"data": images.random_bytes(20_000, seed + architecture)}], oci=oci, architecture=architecture
        )

    return images.build_index({name: child(name) for name in ("amd64", "arm64")}, oci=oci)


def push_image_and_get_layer(upstreams: Upstreams, name: str) -> images.TypedContent:
    return upstreams.push_to_registry(name, "1", images.build_small_image(name)).layers[0]


def fetch_manifest(daemon: TwistdDaemon, origin: str, name: str, reference: str) -> bytes:
    """Return a manifest, with a token if the registry requires one."""
    url = f"{origin}/v2/{name}/manifests/{reference}"
    response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS)
    if response.status == 401:
        token = daemon.client.get(f"{TOKEN_URL}?service=registry.docker.io&scope=repository:{name}:pull").json["token"]
        response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS, Authorization=f"Bearer {token}")
    assert response.status == 200, response
    return response.body


def find_log_entries(daemon: TwistdDaemon, log_offset: int, target_part: str) -> list[AccessLogEntry]:
    return [line for line in daemon.access_log(log_offset) if target_part in line.target]
