"""Pulling: through the interception, as a mirror, over plain HTTP; the second time from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.house import fake_registry, images, wire
from tests.e2e.house.daemon import Logged, Proxy, RunProxy
from tests.e2e.house.images import EVERY_MANIFEST, Image
from tests.e2e.house.machines import Machines
from tests.e2e.house.parent_proxy import ParentProxy
from tests.e2e.house.process import eventually, need
from tests.e2e.house.upstreams import FAKE, HUB, PLAIN, REDIRECTING, REGISTRY, RELATIVE, TOKENS, Upstreams

# whole pulls by real clients


def test_docker_pulls_from_hub_and_the_next_machine_from_disk(
    upstreams: Upstreams, proxy: Proxy, machines: Machines
) -> None:
    image = upstreams.on_hub("library/first", "1", images.small("first", oci=False, layers=3))
    first = machines.docker(proxy)
    first.do("pull", "first:1")
    assert first.digest_of("first:1") == image.digest
    upstreams.hub.forget()
    since = proxy.log_end()
    second = machines.docker(proxy)
    second.do("pull", "first:1")
    assert second.digest_of("first:1") == image.digest
    assert upstreams.hub.seen("GET", "/library/first/") == []
    served = _lines(proxy, since, "/library/first/blobs/")
    assert {line.verdict for line in served} == {"HIT"}
    assert len(served) == len(image.blobs)


def test_what_docker_pulled_runs(upstreams: Upstreams, proxy: Proxy, machines: Machines, tmp_path: Path) -> None:
    need("gcc")
    source = tmp_path / "hello.c"
    source.write_text('#include <unistd.h>\nint main(void) { return write(1, "it runs\\n", 8) != 8; }\n')
    subprocess.run(["gcc", "-static", "-Os", "-o", str(tmp_path / "hello"), str(source)], check=True)
    upstreams.on_hub("library/program", "1", images.image([{"hello": (tmp_path / "hello").read_bytes()}]))
    docker = machines.docker(proxy)
    docker.do("pull", "program:1")
    ran = docker.run("run", "--rm", "--network", "none", "program:1")
    if ran.returncode == 125 and "cgroup" in ran.stderr:
        pytest.skip(f"containers cannot run on this machine: {ran.stderr.strip()[-200:]}")
    assert ran.stdout == "it runs\n", ran.stderr


def test_docker_picks_its_platform_from_a_list(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    multi = _multi_architecture("platforms", oci=False)
    upstreams.on_hub("library/platforms", "latest", multi)
    docker = machines.docker(proxy)
    docker.do("pull", "platforms")
    assert docker.digest_of("platforms") == multi.digest


def test_docker_pulls_from_a_plain_registry(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    upstreams.on_plain("plain/app", "1", images.small("plain-app", oci=False))
    machines.docker(proxy).do("pull", "plain.test:8080/plain/app:1")
    upstreams.plain.forget()
    machines.docker(proxy).do("pull", "plain.test:8080/plain/app:1")
    assert upstreams.plain.seen("GET", "/blobs/") == []


def test_docker_uses_the_daemon_as_its_mirror(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    image = upstreams.on_hub("library/mirrored", "1", images.small("mirrored", oci=False))
    docker = machines.mirrored_docker(proxy)
    docker.do("pull", "mirrored:1")
    assert docker.digest_of("mirrored:1") == image.digest


def test_containerd_pulls_through_the_proxy(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    image = upstreams.on_registry("ctr/proxied", "1", images.small("ctr-proxied"))
    containerd = machines.containerd(proxy)
    containerd.pull("registry.test:5443/ctr/proxied:1")
    assert containerd.digest_of("registry.test:5443/ctr/proxied:1") == image.digest


def test_containerd_uses_the_daemon_as_a_mirror(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    on_registry = upstreams.on_registry("ctr/mirrored", "1", images.small("ctr-mirrored"))
    on_hub = upstreams.on_hub("library/ctr", "1", images.small("ctr-hub"))
    upstreams.on_plain("ctr/plain", "1", images.small("ctr-plain"))
    containerd = machines.containerd()
    for host in ("registry.test:5443", "docker.io", "plain.test:8080"):
        containerd.mirror(host, proxy.url)
    containerd.pull("registry.test:5443/ctr/mirrored:1")
    containerd.pull("docker.io/library/ctr:1")
    containerd.pull("plain.test:8080/ctr/plain:1")
    assert containerd.digest_of("registry.test:5443/ctr/mirrored:1") == on_registry.digest
    assert containerd.digest_of("docker.io/library/ctr:1") == on_hub.digest


@pytest.mark.parametrize("oci", [True, False], ids=["oci", "docker"])
def test_skopeo_copies_every_platform(upstreams: Upstreams, proxy: Proxy, machines: Machines, oci: bool) -> None:
    multi = _multi_architecture(f"skopeo-{oci}", oci=oci)
    name = f"skopeo/multi-{oci}".lower()
    upstreams.on_registry(name, "1", multi)
    skopeo = machines.skopeo(proxy)
    skopeo.pull(f"registry.test:5443/{name}:1", "--all")
    upstreams.registry.forget()
    pulled = skopeo.pull(f"registry.test:5443/{name}:1", "--all")
    assert upstreams.registry.seen("GET", "/blobs/") == []
    assert (pulled / "manifest.json").read_bytes() == multi.manifest.data
    for child in multi.children:
        for blob in child.blobs:
            assert (pulled / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data


def test_skopeo_pulls_what_is_redirected(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    upstreams.on_registry("skopeo/redirected", "1", images.small("skopeo-redirected"))
    machines.skopeo(proxy).pull("redirecting.test/skopeo/redirected:1")
    assert upstreams.store.seen("GET", "/blobs/")


def test_podman_pulls_through_the_proxy(
    upstreams: Upstreams, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need("podman", root=True)
    tmp_path = tmp_path_factory.mktemp("p")  # podman wants a short one
    image = upstreams.on_registry("podman/app", "1", images.small("podman"))
    storage = ["--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs"]
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), **proxy.client_environment}
    pulled = subprocess.run(
        [shutil.which("podman") or "podman", *storage, "pull", "-q", "registry.test:5443/podman/app:1"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.strip() == image.blobs[0].digest.removeprefix("sha256:")


# manifests


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("reference", ["tag", "digest"])
def test_a_manifest_is_the_same_by_tag_and_digest(
    upstreams: Upstreams, proxy: Proxy, method: str, reference: str
) -> None:
    image = upstreams.on_registry(f"manifest/{method.lower()}-{reference}", "v1", images.small(f"{method}{reference}"))
    name = "v1" if reference == "tag" else image.digest
    url = f"{REGISTRY}/v2/manifest/{method.lower()}-{reference}/manifests/{name}"
    for _ in range(2):  # cold, and warm
        answer = proxy.client.ask(method, url, {"Accept": EVERY_MANIFEST})
        assert answer.status == 200
        assert answer.headers["docker-content-digest"] == image.digest
        assert answer.headers["content-type"] == image.manifest.media_type
        assert answer.headers["content-length"] == str(len(image.manifest.data))
        assert answer.body == (image.manifest.data if method == "GET" else b"")


def test_verdicts(upstreams: Upstreams, proxy: Proxy) -> None:
    image = upstreams.on_registry("verdicts", "v1", images.small("verdicts"))
    url = f"{REGISTRY}/v2/verdicts"
    since = proxy.log_end()
    tag = [proxy.client.get(f"{url}/manifests/v1", Accept=EVERY_MANIFEST).verdict for _ in range(2)]
    assert tag == ["MISS", "REVALIDATED"]
    assert proxy.client.get(f"{url}/manifests/{image.digest}", Accept=EVERY_MANIFEST).verdict == "HIT"
    blob = [proxy.client.get(f"{url}/blobs/{image.layers[0].digest}").verdict for _ in range(2)]
    assert blob == ["MISS", "HIT"]
    assert proxy.client.get(f"{url}/tags/list").verdict == "PASS"
    eventually(lambda: len(_lines(proxy, since, "/v2/verdicts/")) == 6, "six lines in the log")
    lines = _lines(proxy, since, "/v2/verdicts/")
    assert [line.verdict for line in lines] == ["MISS", "REVALIDATED", "HIT", "MISS", "HIT", "PASS"]
    assert {(line.client, line.method, line.status) for line in lines} == {("127.0.0.1", "GET", 200)}
    assert lines[3].target == f"registry.test:5443/v2/verdicts/blobs/{image.layers[0].digest}"
    assert lines[3].size == len(image.layers[0].data)


def test_a_tag_answers_by_what_the_client_accepts(upstreams: Upstreams, proxy: Proxy) -> None:
    multi = _multi_architecture("accept", oci=False)
    upstreams.on_registry("accept", "1", multi)
    url = f"{REGISTRY}/v2/accept/manifests/1"
    for _ in range(2):
        whole = proxy.client.get(url, Accept=f"{images.DOCKER_LIST}, {images.DOCKER_MANIFEST}")
        assert whole.headers["docker-content-digest"] == multi.digest
        # distribution gives those who know no lists the image for amd64
        one = proxy.client.get(url, Accept=images.DOCKER_MANIFEST)
        assert one.headers["docker-content-digest"] == multi.children[0].digest
        # the same set in another order is the same question
        assert proxy.client.get(url, Accept=f"{images.DOCKER_MANIFEST}, {images.DOCKER_LIST}").body == whole.body


def test_a_tag_that_moved_is_noticed(upstreams: Upstreams, proxy: Proxy) -> None:
    url = f"{REGISTRY}/v2/moving/manifests/latest"
    for seed in ("before", "after"):
        image = upstreams.on_registry("moving", "latest", images.small(seed))
        assert proxy.client.get(url, Accept=EVERY_MANIFEST).body == image.manifest.data


def test_the_manifest_cache_asks_less(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(
        ENABLE_MANIFEST_CACHE="true", MANIFEST_CACHE_PRIMARY_REGEX="never", MANIFEST_CACHE_PRIMARY_TIME="0s"
    )
    for tag in ("latest", "never"):
        upstreams.on_registry("fresh", tag, images.small(tag))
    ask = {tag: f"{REGISTRY}/v2/fresh/manifests/{tag}" for tag in ("latest", "never")}
    for url in ask.values():
        proxy.client.get(url, Accept=EVERY_MANIFEST)
    upstreams.registry.forget()
    assert proxy.client.get(ask["latest"], Accept=EVERY_MANIFEST).verdict == "HIT"
    assert upstreams.registry.seen("HEAD", "/fresh/") == []
    assert proxy.client.get(ask["never"], Accept=EVERY_MANIFEST).verdict == "REVALIDATED"
    assert len(upstreams.registry.seen("HEAD", "/fresh/")) == 1


def test_the_same_tag_of_two_registries_is_two_images(upstreams: Upstreams, proxy: Proxy) -> None:
    one = upstreams.on_registry("library/same", "1", images.small("same-on-registry"))
    two = upstreams.on_plain("library/same", "1", images.small("same-on-plain"))
    three = upstreams.on_hub("library/same", "1", images.small("same-on-hub"))
    found = [_manifest(proxy, origin, "library/same", "1") for origin in (REGISTRY, PLAIN, HUB)]
    assert found == [one.manifest.data, two.manifest.data, three.manifest.data]


def test_a_manifest_of_nearly_4_mib(upstreams: Upstreams, proxy: Proxy) -> None:
    layer = images.Content(images.OCI_LAYER, b"x")
    config = images.Content(images.OCI_CONFIG, b"{}")
    big = images.of_blobs(config, [layer] * 23_500)
    assert 3_900_000 < len(big.manifest.data) < 4 << 20
    upstreams.fake.put("big/manifest", "1", big)
    for _ in range(2):
        assert _manifest(proxy, FAKE, "big/manifest", "1") == big.manifest.data


def test_an_unknown_manifest_is_upstreams_404(proxy: Proxy) -> None:
    answer = proxy.client.get(f"{REGISTRY}/v2/no/such/manifests/1", Accept=EVERY_MANIFEST)
    assert (answer.status, answer.error_code) == (404, "MANIFEST_UNKNOWN")


def test_manifest_in_part(upstreams: Upstreams, proxy: Proxy) -> None:
    """containerd 2.1 asks for `bytes=0-`, and says what it can decompress."""
    image = upstreams.on_registry("manifest/part", "1", images.small("part"))
    url = f"{REGISTRY}/v2/manifest/part/manifests/1"
    for _ in range(2):
        answer = proxy.client.get(url, Accept=EVERY_MANIFEST, Range="bytes=0-", Accept_Encoding="zstd, gzip")
        assert (answer.status, answer.body) in ((200, image.manifest.data), (206, image.manifest.data))


# blobs


def test_blob_head_and_get(upstreams: Upstreams, proxy: Proxy) -> None:
    layer = _layer(upstreams, "blob/head")
    url = f"{REGISTRY}/v2/blob/head/blobs/{layer.digest}"
    before = proxy.client.head(url)
    got = proxy.client.get(url)
    after = proxy.client.head(url)
    assert got.body == layer.data
    for answer in (before, got, after):
        assert answer.status == 200
        assert answer.headers["content-length"] == str(len(layer.data))
        assert answer.headers["docker-content-digest"] == layer.digest


RANGES = {
    "bytes=0-99": (206, slice(0, 100)),
    "bytes=1000-1999": (206, slice(1000, 2000)),
    "bytes=39000-": (206, slice(39000, None)),
    "bytes=-500": (206, slice(-500, None)),
    "bytes=39000-99999999": (206, slice(39000, None)),
    "bytes=0-0,10-19": (200, slice(None)),  # several at once: the whole blob
    "lines=1-2": (200, slice(None)),
}


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("wanted", RANGES)
def test_blob_ranges(upstreams: Upstreams, proxy: Proxy, wanted: str, state: str) -> None:
    data = images.noise(50_000, f"range {wanted} {state}")
    digest = upstreams.fake.put_blob("ranges", data)
    url = f"{FAKE}/v2/ranges/blobs/{digest}"
    if state == "warm":
        proxy.client.get(url)
    answer = proxy.client.get(url, Range=wanted)
    status, part = RANGES[wanted]
    assert (answer.status, answer.body) == (status, data[part])
    if status == 206:
        start, stop, _ = part.indices(len(data))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    assert proxy.client.get(url).body == data


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("beyond", ["1000-1001", "5-2"])
def test_blob_range_beyond_the_end(upstreams: Upstreams, proxy: Proxy, state: str, beyond: str) -> None:
    digest = upstreams.fake.put_blob("ranges", images.noise(1000, f"beyond {state} {beyond}"))
    url = f"{FAKE}/v2/ranges/blobs/{digest}"
    if state == "warm":
        proxy.client.get(url)
    answer = proxy.client.get(url, Range=f"bytes={beyond}")
    assert (answer.status, answer.error_code) == (416, "RANGE_INVALID")
    assert answer.headers["content-range"] == "bytes */1000"


def test_conditional_requests(upstreams: Upstreams, proxy: Proxy) -> None:
    image = upstreams.on_registry("conditional", "1", images.small("conditional"))
    for url in (f"blobs/{image.layers[0].digest}", "manifests/1"):
        url = f"{REGISTRY}/v2/conditional/{url}"
        whole = proxy.client.get(url, Accept=EVERY_MANIFEST)
        tag = whole.headers["etag"]
        unchanged = proxy.client.get(url, Accept=EVERY_MANIFEST, If_None_Match=tag)
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert unchanged.headers["etag"] == tag
        assert proxy.client.get(url, Accept=EVERY_MANIFEST, If_None_Match='"other"').body == whole.body
        part = proxy.client.get(url, Accept=EVERY_MANIFEST, Range="bytes=0-9", If_Range='"other"')
        assert (part.status, part.body) == (200, whole.body)


@pytest.mark.parametrize(("front", "server"), [(REDIRECTING, "store"), (RELATIVE, "relative")])
def test_blobs_behind_a_redirect(upstreams: Upstreams, proxy: Proxy, front: str, server: str) -> None:
    name = f"redirected/{server}"
    layer = _layer(upstreams, name)
    url = f"{front}/v2/{name}/blobs/{layer.digest}"
    # The store refuses whoever shows an Authorization, which the client has for the registry.
    answer = proxy.client.get(url, Authorization="Basic b3duOm93bg==")
    assert (answer.status, answer.body) == (200, layer.data)
    fetched = getattr(upstreams, server).seen("GET", f"{layer.digest}?")
    assert [seen.status for seen in fetched] == [200]


def test_a_blob_is_one_whatever_registry_it_came_from(upstreams: Upstreams, proxy: Proxy) -> None:
    layer = _layer(upstreams, "shared/blob")
    upstreams.on_plain("other/name", "1", images.small("shared/blob"))
    assert proxy.client.get(f"{REDIRECTING}/v2/shared/blob/blobs/{layer.digest}").verdict == "MISS"
    for url in (f"{REGISTRY}/v2/shared/blob", f"{PLAIN}/v2/other/name"):
        upstreams.registry.forget()
        upstreams.plain.forget()
        answer = proxy.client.get(f"{url}/blobs/{layer.digest}")
        assert answer.body == layer.data
        assert not upstreams.registry.seen("GET", "/blobs/") and not upstreams.plain.seen("GET", "/blobs/")


def test_sha512(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(100_000, "sha512")
    digest = f"sha512:{hashlib.sha512(data).hexdigest()}"
    upstreams.fake.put_blob("long/digest", data, digest)
    verdicts = []
    for _ in range(2):
        answer = proxy.client.get(f"{FAKE}/v2/long/digest/blobs/{digest}")
        assert (answer.status, answer.body) == (200, data)
        verdicts.append(answer.verdict)
    assert verdicts == ["MISS", "HIT"]


def test_a_blob_without_a_manifest_is_fetched(upstreams: Upstreams, proxy: Proxy) -> None:
    digest = upstreams.fake.put_blob("lone/blob", b"nobody speaks of this one")
    assert proxy.client.get(f"{FAKE}/v2/lone/blob/blobs/{digest}").body == b"nobody speaks of this one"


def test_an_empty_blob(upstreams: Upstreams, proxy: Proxy) -> None:
    digest = upstreams.fake.put_blob("empty", b"")
    for _ in range(2):
        answer = proxy.client.get(f"{FAKE}/v2/empty/blobs/{digest}")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


# what passes through


def test_ping_tags_and_catalog(upstreams: Upstreams, proxy: Proxy) -> None:
    for tag in ("1", "2"):
        upstreams.on_registry("listed", tag, images.small(tag))
    assert proxy.client.get(f"{REGISTRY}/v2/").status == 200
    assert sorted(proxy.client.get(f"{REGISTRY}/v2/listed/tags/list").json["tags"]) == ["1", "2"]
    assert "listed" in proxy.client.get(f"{REGISTRY}/v2/_catalog?n=1000").json["repositories"]
    page = proxy.client.get(f"{REGISTRY}/v2/_catalog?n=1")
    assert len(page.json["repositories"]) == 1
    assert "n=1" in page.headers["link"]


def test_hub_asks_for_a_token(proxy: Proxy) -> None:
    ping = proxy.client.get(f"{HUB}/v2/")
    assert ping.status == 401
    assert 'realm="https://auth.docker.io/token"' in ping.headers["www-authenticate"]
    token = proxy.client.get(f"{TOKENS}?service=registry.docker.io&scope=repository:library/any:pull")
    assert token.status == 200
    assert token.json["token"]


def test_referrers_where_upstream_has_none(upstreams: Upstreams, proxy: Proxy) -> None:
    """distribution 2.8 knows no referrers: the tag of the spec's "Referrers Tag Schema" is asked for."""
    subject = upstreams.on_registry("referred", "1", images.small("referred"))
    url = f"{REGISTRY}/v2/referred/referrers"
    empty = proxy.client.get(f"{url}/sha256:{'0' * 64}")
    assert (empty.status, empty.json["manifests"]) == (200, [])
    signature = images.of_blobs(
        images.Content("application/vnd.example.signature", b"{}"),
        [images.Content("application/octet-stream", b"signed")],
        subject=subject.manifest,
    )
    upstreams.on_registry("referred", "signature", signature)
    upstreams.on_registry("referred", subject.digest.replace(":", "-"), images.index({"unknown": signature}))
    answer = proxy.client.get(f"{url}/{subject.digest}")
    assert answer.status == 200
    assert answer.headers["content-type"] == images.OCI_INDEX
    assert [entry["digest"] for entry in answer.json["manifests"]] == [signature.digest]


# mirrors


def test_ns_is_a_key_and_not_an_address(upstreams: Upstreams, proxy: Proxy) -> None:
    image = upstreams.on_registry("by/ns", "1", images.small("by-ns"))
    path = f"http://127.0.0.1:{proxy.port}/v2/by/ns/manifests/1"
    found = wire.request("GET", f"{path}?ns=registry.test:5443", {"Accept": EVERY_MANIFEST})
    assert found.body == image.manifest.data
    before = len(upstreams.store.requests)
    for other in ("store.test:8443", f"127.0.0.1:{upstreams.store.port}", "169.254.169.254", "a/b", ""):
        refused = wire.request("GET", f"{path}?ns={other}", {"Accept": EVERY_MANIFEST})
        assert refused.status in (400, 403, 404), other
        assert refused.error_code
    assert len(upstreams.store.requests) == before


def test_hub_by_its_other_name(upstreams: Upstreams, proxy: Proxy) -> None:
    image = upstreams.on_hub("library/by-ns", "1", images.small("hub-by-ns"))
    url = f"http://127.0.0.1:{proxy.port}/v2/library/by-ns/manifests/1"
    for query in ("?ns=docker.io", "?ns=registry-1.docker.io", ""):
        assert wire.request("GET", url + query, {"Accept": EVERY_MANIFEST}).body == image.manifest.data


# on the way


def test_through_a_parent_proxy(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    parent = ParentProxy(upstreams.addresses)
    parent.start()
    try:
        proxy = run_proxy(UPSTREAM_ADDRESSES="", UPSTREAM_PROXY=f"http://user:par-ent@127.0.0.1:{parent.port}")
        image = upstreams.on_hub("library/behind", "1", images.small("behind"))
        upstreams.on_registry("behind", "1", images.small("behind"))
        assert _manifest(proxy, HUB, "library/behind", "1") == image.manifest.data
        assert _manifest(proxy, REGISTRY, "behind", "1") == image.manifest.data
        assert {"registry-1.docker.io:443", "auth.docker.io:443", "registry.test:5443"} <= set(parent.targets)
        assert b"Basic dXNlcjpwYXItZW50" in parent.heads[0]
        proxy.check_log(["par-ent", "dXNlcjpwYXItZW50"])
    finally:
        parent.stop()


def test_the_log_as_json(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(LOG_FORMAT="json")
    layer = _layer(upstreams, "logged/json")
    path = f"/v2/logged/json/blobs/{layer.digest}"
    proxy.client.get(f"{REGISTRY}{path}?secret=query")

    def found() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in proxy.text.splitlines()]
        return [line for line in lines if line.get("path") == path]

    eventually(found, "the request in the log")
    [line] = found()
    assert {name: line[name] for name in ("client", "method", "host", "status", "verdict")} == {
        "client": "127.0.0.1", "method": "GET", "host": "registry.test:5443", "status": 200, "verdict": "MISS",
    }  # fmt: skip
    assert "secret=query" not in proxy.text


def test_start_up_says_what_it_does(upstreams: Upstreams, proxy: Proxy) -> None:
    for what in (str(proxy.port), "registry-1.docker.io", "registry.test:5443", str(proxy.state)):
        assert what in proxy.text


def test_a_client_that_sends_many_requests_keeps_its_connection(upstreams: Upstreams, proxy: Proxy) -> None:
    layer = _layer(upstreams, "kept/alive")
    connection = proxy.client.connection(REGISTRY)
    try:
        for _ in range(20):
            connection.request("GET", f"/v2/kept/alive/blobs/{layer.digest}")
            assert connection.getresponse().read() == layer.data
            assert connection.sock is not None
    finally:
        connection.close()


def test_a_blob_whose_length_upstream_does_not_tell(upstreams: Upstreams, proxy: Proxy) -> None:
    digest = upstreams.fake.put_blob("chunked", images.noise(300_000, "chunked"))
    upstreams.fake.on("GET", digest, fake_registry.chunked)
    answer = proxy.client.get(f"{FAKE}/v2/chunked/blobs/{digest}")
    assert answer.body == images.noise(300_000, "chunked")


def _multi_architecture(seed: str, *, oci: bool) -> Image:
    def child(architecture: str) -> Image:
        return images.image([{"data": images.noise(20_000, seed + architecture)}], oci=oci, architecture=architecture)

    return images.index({name: child(name) for name in ("amd64", "arm64")}, oci=oci)


def _layer(upstreams: Upstreams, name: str) -> images.Content:
    return upstreams.on_registry(name, "1", images.small(name)).layers[0]


def _manifest(proxy: Proxy, origin: str, name: str, reference: str) -> bytes:
    """Return a manifest, after the token dance where that is asked for."""
    url = f"{origin}/v2/{name}/manifests/{reference}"
    answer = proxy.client.get(url, Accept=EVERY_MANIFEST)
    if answer.status == 401:
        token = proxy.client.get(f"{TOKENS}?service=registry.docker.io&scope=repository:{name}:pull").json["token"]
        answer = proxy.client.get(url, Accept=EVERY_MANIFEST, Authorization=f"Bearer {token}")
    assert answer.status == 200, answer
    return answer.body


def _lines(proxy: Proxy, since: int, part: str) -> list[Logged]:
    return [line for line in proxy.logged(since) if part in line.target]
