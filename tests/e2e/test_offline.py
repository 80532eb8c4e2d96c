"""With the upstreams gone, or unwell, everything that was cached still pulls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.house import fake_registry, images
from tests.e2e.house.clients import Containerd, Docker, Skopeo
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.images import EVERY_MANIFEST
from tests.e2e.house.machines import Machines
from tests.e2e.house.upstreams import FAKE, HUB, REGISTRY, TOKENS, Upstreams

ON_HUB = "docker.io/offline/hub:1"
ON_REGISTRY = "registry.test:5443/offline/registry:1"
ON_PLAIN = "plain.test:8080/offline/plain:1"


@pytest.fixture(scope="module")
def cached(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A daemon that has the three images, from one pull by each kind of client, and was restarted since."""
    image = images.small("offline", oci=False)
    upstreams.on_hub("offline/hub", "1", image)
    upstreams.on_registry("offline/registry", "1", image)
    upstreams.on_plain("offline/plain", "1", image)
    proxy = Proxy(tmp_path_factory.mktemp("cached"), upstreams.settings)
    with proxy.running_for(lambda: upstreams.secrets):
        machines = Machines(tmp_path_factory.mktemp("warm"))
        try:
            docker, containerd, skopeo = machines.docker(proxy), machines.containerd(proxy), machines.skopeo(proxy)
            for name in (ON_HUB, ON_REGISTRY, ON_PLAIN):
                docker.do("pull", name)
                skopeo.pull(name, plain=name is ON_PLAIN)
                containerd.pull(name, *(["--plain-http"] if name is ON_PLAIN else []))
        finally:
            machines.stop()
        proxy.restart()
        yield proxy


def _docker(machines: Machines, proxy: Proxy) -> Docker:
    return machines.docker(proxy)


def _mirrored_docker(machines: Machines, proxy: Proxy) -> Docker:
    return machines.mirrored_docker(proxy)


def _containerd(machines: Machines, proxy: Proxy) -> Containerd:
    return machines.containerd(proxy)


def _mirrored_containerd(machines: Machines, proxy: Proxy) -> Containerd:
    containerd = machines.containerd()
    for host in ("docker.io", "registry.test:5443", "plain.test:8080"):
        containerd.mirror(host, proxy.url)
    return containerd


def _skopeo(machines: Machines, proxy: Proxy) -> Skopeo:
    return machines.skopeo(proxy)


MakeClient = Callable[[Machines, Proxy], "Docker | Containerd | Skopeo"]


@pytest.mark.parametrize(
    ("client", "names"),
    [
        (_docker, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_mirrored_docker, (ON_HUB,)),
        (_containerd, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_mirrored_containerd, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_skopeo, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
    ],
    ids=["docker", "docker-mirror", "containerd", "containerd-mirror", "skopeo"],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_everything_cached_pulls_with_upstream_gone(
    upstreams: Upstreams, cached: Proxy, machines: Machines, client: MakeClient, names: tuple[str, ...], restarted: bool
) -> None:
    with upstreams.away():
        if restarted:
            cached.restart(kill=True)
        machine = client(machines, cached)
        for name in names:
            if isinstance(machine, Docker):
                machine.do("pull", name)
            elif isinstance(machine, Containerd):
                plain = name is ON_PLAIN and client is _containerd
                machine.pull(name, *(["--plain-http"] if plain else []))
            else:
                machine.pull(name, plain=name is ON_PLAIN)


def test_stale_answers_say_so(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    image = upstreams.on_registry("known", "1", images.small("known"))
    assert proxy.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=EVERY_MANIFEST).status == 200
    with upstreams.away():
        answer = proxy.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=EVERY_MANIFEST)
        assert (answer.status, answer.verdict, answer.body) == (200, "STALE", image.manifest.data)
        assert "stale" in answer.headers["warning"].lower()
        # With the same media types in another header, which was never asked for, it is still the best answer.
        other = proxy.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=images.OCI_MANIFEST)
        assert other.body == image.manifest.data
    answer = proxy.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=EVERY_MANIFEST)
    assert answer.verdict == "REVALIDATED"


def test_what_is_not_cached_is_502_with_upstream_gone(upstreams: Upstreams, proxy: Proxy) -> None:
    with upstreams.away():
        for path in ("manifests/never", f"blobs/sha256:{'1' * 64}"):
            answer = proxy.client.get(f"{REGISTRY}/v2/not/cached/{path}", Accept=EVERY_MANIFEST)
            assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
            assert "registry.test:5443" in answer.message


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_the_last_good_answer_while_upstream_fails(upstreams: Upstreams, proxy: Proxy, status: int) -> None:
    name = f"failing/with-{status}"
    image = images.small(name)
    upstreams.fake.put(name, "1", image)
    assert proxy.client.get(f"{FAKE}/v2/{name}/manifests/1", Accept=EVERY_MANIFEST).status == 200
    layer = f"{FAKE}/v2/{name}/blobs/{image.layers[0].digest}"
    assert proxy.client.get(layer).status == 200
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, name, fake_registry.status(status))
    for method in ("GET", "HEAD"):
        answer = proxy.client.ask(method, f"{FAKE}/v2/{name}/manifests/1", {"Accept": EVERY_MANIFEST})
        assert (answer.status, answer.verdict) == (200, "STALE")
        assert answer.headers["docker-content-digest"] == image.digest
    assert proxy.client.get(layer).body == image.layers[0].data


def test_a_tag_deleted_upstream_is_gone(upstreams: Upstreams, proxy: Proxy) -> None:
    upstreams.fake.put("deleted", "1", images.small("deleted"))
    url = f"{FAKE}/v2/deleted/manifests/1"
    assert proxy.client.get(url, Accept=EVERY_MANIFEST).status == 200
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/deleted/manifests/1", fake_registry.status(404, "MANIFEST_UNKNOWN"))
    assert proxy.client.get(url, Accept=EVERY_MANIFEST).status == 404
    upstreams.fake.behave()  # and it does not come back as a stale answer
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/deleted/manifests/1", fake_registry.status(503))
    assert proxy.client.get(url, Accept=EVERY_MANIFEST).status >= 500


def test_the_token_server_may_fail_alone(upstreams: Upstreams, run_proxy: RunProxy, machines: Machines) -> None:
    proxy = run_proxy()
    upstreams.on_hub("library/tokenless", "1", images.small("tokenless"))
    machines.skopeo(proxy).pull("docker.io/library/tokenless:1")
    proxy.restart()  # no token is left in memory
    upstreams.tokens.failure = 503
    try:
        machines.skopeo(proxy).pull("docker.io/library/tokenless:1")
    finally:
        upstreams.tokens.failure = None


def test_a_cached_pull_asks_for_no_token(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """Once access is proven, a cached digest needs neither /v2/ nor a token from upstream."""
    proxy = run_proxy()
    image = upstreams.on_hub("library/proven", "1", images.small("proven"))
    token = proxy.client.get(f"{TOKENS}?service=registry.docker.io&scope=repository:library/proven:pull").json["token"]
    urls = [f"{HUB}/v2/library/proven/manifests/{image.digest}"]
    urls += [f"{HUB}/v2/library/proven/blobs/{blob.digest}" for blob in image.blobs]
    for url in urls:
        assert proxy.client.get(url, Authorization=f"Bearer {token}", Accept=EVERY_MANIFEST).status == 200
    upstreams.hub.forget()
    tokens = len(upstreams.tokens.requests)
    for url in urls:
        answer = proxy.client.get(url, Authorization=f"Bearer {token}", Accept=EVERY_MANIFEST)
        assert (answer.status, answer.verdict) == (200, "HIT")
    assert upstreams.hub.seen("GET", "/library/") == upstreams.hub.seen("HEAD", "/library/") == []
    assert len(upstreams.tokens.requests) == tokens
