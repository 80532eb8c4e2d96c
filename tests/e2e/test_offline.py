"""Cached images can be pulled while the upstreams are down or return errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.harness import fake_registry, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Containerd, Docker, Skopeo
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.upstreams import FAKE, HUB, REGISTRY, TOKEN_URL, Upstreams

ON_HUB = "docker.io/offline/hub:1"
ON_REGISTRY = "registry.test:5443/offline/registry:1"
ON_PLAIN = "plain.test:8080/offline/plain:1"


@pytest.fixture(scope="module")
def warm_daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwistdDaemon]:
    """Return a daemon that was restarted after each kind of client had pulled the three images."""
    image = images.build_small_image("offline", oci=False)
    upstreams.push_to_hub("offline/hub", "1", image)
    upstreams.push_to_registry("offline/registry", "1", image)
    upstreams.push_to_plain("offline/plain", "1", image)
    daemon = TwistdDaemon(tmp_path_factory.mktemp("warm"), upstreams.settings)
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        clients = ClientFactory(tmp_path_factory.mktemp("clients"))
        try:
            docker, containerd, skopeo = clients.docker(daemon), clients.containerd(daemon), clients.skopeo(daemon)
            for name in (ON_HUB, ON_REGISTRY, ON_PLAIN):
                docker.run_checked("pull", name)
                skopeo.pull(name, plain_http=name is ON_PLAIN)
                containerd.pull(name, *(["--plain-http"] if name is ON_PLAIN else []))
        finally:
            clients.stop()
        daemon.restart()
        yield daemon


def _make_docker(clients: ClientFactory, daemon: TwistdDaemon) -> Docker:
    return clients.docker(daemon)


def _make_docker_with_mirror(clients: ClientFactory, daemon: TwistdDaemon) -> Docker:
    return clients.docker_with_mirror(daemon)


def _make_containerd(clients: ClientFactory, daemon: TwistdDaemon) -> Containerd:
    return clients.containerd(daemon)


def _make_containerd_with_mirrors(clients: ClientFactory, daemon: TwistdDaemon) -> Containerd:
    containerd = clients.containerd()
    for host in ("docker.io", "registry.test:5443", "plain.test:8080"):
        containerd.configure_mirror(host, daemon.url)
    return containerd


def _make_skopeo(clients: ClientFactory, daemon: TwistdDaemon) -> Skopeo:
    return clients.skopeo(daemon)


MakeClient = Callable[[ClientFactory, TwistdDaemon], "Docker | Containerd | Skopeo"]


@pytest.mark.parametrize(
    ("make_client", "names"),
    [
        (_make_docker, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_make_docker_with_mirror, (ON_HUB,)),
        (_make_containerd, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_make_containerd_with_mirrors, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
        (_make_skopeo, (ON_HUB, ON_REGISTRY, ON_PLAIN)),
    ],
    ids=["docker", "docker-mirror", "containerd", "containerd-mirror", "skopeo"],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_cached_images_pull_while_upstream_is_down(
    upstreams: Upstreams,
    warm_daemon: TwistdDaemon,
    clients: ClientFactory,
    make_client: MakeClient,
    names: tuple[str, ...],
    restarted: bool,
) -> None:
    with upstreams.stopped():
        if restarted:
            warm_daemon.restart(kill=True)
        engine = make_client(clients, warm_daemon)
        for name in names:
            if isinstance(engine, Docker):
                engine.run_checked("pull", name)
            elif isinstance(engine, Containerd):
                plain = name is ON_PLAIN and make_client is _make_containerd
                engine.pull(name, *(["--plain-http"] if plain else []))
            else:
                engine.pull(name, plain_http=name is ON_PLAIN)


def test_stale_response_is_marked(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = upstreams.push_to_registry("known", "1", images.build_small_image("known"))
    assert daemon.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
    with upstreams.stopped():
        response = daemon.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.cache_status, response.body) == (200, "STALE", image.manifest.data)
        assert "stale" in response.headers["warning"].lower()
        # An Accept that was never requested before, with a part of the media types, still gets the stale manifest.
        second_response = daemon.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=images.OCI_MANIFEST)
        assert second_response.body == image.manifest.data
    response = daemon.client.get(f"{REGISTRY}/v2/known/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.cache_status == "REVALIDATED"


def test_uncached_content_returns_502_while_upstream_is_down(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    with upstreams.stopped():
        for path in ("manifests/never", f"blobs/sha256:{'1' * 64}"):
            response = daemon.client.get(f"{REGISTRY}/v2/not/cached/{path}", Accept=ACCEPT_MANIFESTS)
            assert (response.status, response.error_code) == (502, "UNAVAILABLE")
            assert "registry.test:5443" in response.error_message


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_stale_response_while_upstream_fails(
    upstreams: Upstreams, daemon: TwistdDaemon, start_daemon: StartDaemon, status: int
) -> None:
    if status == 429:
        daemon = start_daemon()  # of its own, because it believes the limit for a while
    name = f"failing/with-{status}"
    image = images.build_small_image(name)
    upstreams.fake.put(name, "1", image)
    assert daemon.client.get(f"{FAKE}/v2/{name}/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
    layer = f"{FAKE}/v2/{name}/blobs/{image.layers[0].digest}"
    assert daemon.client.get(layer).status == 200
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, name, fake_registry.respond_status(status))
    for method in ("GET", "HEAD"):
        response = daemon.client.request(method, f"{FAKE}/v2/{name}/manifests/1", {"Accept": ACCEPT_MANIFESTS})
        assert (response.status, response.cache_status) == (200, "STALE")
        assert response.headers["docker-content-digest"] == image.digest
    assert daemon.client.get(layer).body == image.layers[0].data


def test_tag_deleted_upstream_returns_404(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    upstreams.fake.put("deleted", "1", images.build_small_image("deleted"))
    url = f"{FAKE}/v2/deleted/manifests/1"
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status == 200
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/deleted/manifests/1", fake_registry.respond_status(404, "MANIFEST_UNKNOWN"))
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status == 404
    upstreams.fake.reset_rules()  # from now on upstream fails, and the deleted tag must not be served as stale
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/deleted/manifests/1", fake_registry.respond_status(503))
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status >= 500


def test_cached_pull_while_token_server_fails(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory
) -> None:
    daemon = start_daemon()
    upstreams.push_to_hub("library/tokenless", "1", images.build_small_image("tokenless"))
    clients.skopeo(daemon).pull("docker.io/library/tokenless:1")
    daemon.restart()  # drops the tokens, which are only in memory
    upstreams.token_server.failure_status = 503
    try:
        clients.skopeo(daemon).pull("docker.io/library/tokenless:1")
    finally:
        upstreams.token_server.failure_status = None


def test_cached_pull_needs_no_upstream_token(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """After access was granted once, serving a cached digest needs neither /v2/ nor a token from upstream."""
    daemon = start_daemon()
    image = upstreams.push_to_hub("library/proven", "1", images.build_small_image("proven"))
    token = daemon.client.get(f"{TOKEN_URL}?service=registry.docker.io&scope=repository:library/proven:pull").json[
        "token"
    ]
    urls = [f"{HUB}/v2/library/proven/manifests/{image.digest}"]
    urls += [f"{HUB}/v2/library/proven/blobs/{blob.digest}" for blob in image.blobs]
    for url in urls:
        assert daemon.client.get(url, Authorization=f"Bearer {token}", Accept=ACCEPT_MANIFESTS).status == 200
    upstreams.hub.clear_log()
    token_request_count = len(upstreams.token_server.requests)
    for url in urls:
        response = daemon.client.get(url, Authorization=f"Bearer {token}", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.cache_status) == (200, "HIT")
    assert upstreams.hub.find_requests("GET", "/library/") == upstreams.hub.find_requests("HEAD", "/library/") == []
    assert len(upstreams.token_server.requests) == token_request_count


def test_signatures_of_a_cached_image_while_upstream_is_down(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """cosign asks for them with every image. It goes on if there are none, and fails if nobody can tell."""
    image = upstreams.push_to_registry("unsigned", "1", images.build_small_image("unsigned"))
    other = upstreams.push_to_registry("other-unsigned", "1", images.build_small_image("other-unsigned"))
    url = f"{REGISTRY}/v2/unsigned"
    paths = [f"manifests/{image.digest.replace(':', '-')}{suffix}" for suffix in ("", ".sig", ".att")]
    assert daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
    for path in paths:
        assert daemon.client.get(f"{url}/{path}", Accept=ACCEPT_MANIFESTS).status == 404
    assert daemon.client.get(f"{url}/referrers/{image.digest}").json["manifests"] == []
    with upstreams.stopped():
        daemon.restart()
        for path in paths:
            response = daemon.client.get(f"{url}/{path}", Accept=ACCEPT_MANIFESTS)
            assert (response.status, response.error_code) == (404, "MANIFEST_UNKNOWN")
            assert "cannot be asked now" in response.error_message
        assert daemon.client.get(f"{url}/referrers/{image.digest}").json["manifests"] == []
        for path in (f"manifests/{image.digest.replace(':', '-')}.sbom", f"referrers/{other.digest}"):
            assert daemon.client.get(f"{url}/{path}", Accept=ACCEPT_MANIFESTS).status == 502
