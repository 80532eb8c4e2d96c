"""Firewalls, content delivery networks and captive portals in the place of a registry, and odd ways to send content.

Each case is also tried by the same client directly, which may fail where the proxy has the image.
"""

from __future__ import annotations

import gzip
import json

import pytest

from tests.e2e.harness import fake_registry, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Skopeo, check_output
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import ResponseBehaviour, respond_encoded, respond_wall
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.upstreams import FAKE, HUB, TOKEN_URL, Upstreams

PORTAL = fake_registry.redirect_to("https://fake.test/login", 302)
WALLS = {
    "403": respond_wall(403),
    "404": respond_wall(404),
    "451": respond_wall(451, b"blocked", Content_Type="text/plain"),
    "401": respond_wall(401),
    "503": respond_wall(503),
    "page": fake_registry.respond_html,
    "portal": PORTAL,
    "portal without TLS": fake_registry.redirect_to("http://fake.test/login", 302),
    "portal in the local network": fake_registry.redirect_to("https://127.0.0.1/login", 302),
}


def raise_wall(upstreams: Upstreams, behaviour: ResponseBehaviour) -> None:
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "^/v2/", behaviour)
        upstreams.fake.add_rule(method, "^/login", fake_registry.respond_html)


def pulls_directly(upstreams: Upstreams, skopeo: Skopeo, name: str) -> bool:
    """Return whether the client can pull without the proxy."""
    image = f"127.0.0.1:{upstreams.fake.port}/{name}:1"
    return skopeo.try_pull(image, "--src-tls-verify=false").returncode == 0


@pytest.mark.parametrize("wall", WALLS)
def test_cached_image_behind_a_wall(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory, wall: str
) -> None:
    name = f"walled/by-{wall.replace(' ', '-').lower()}"
    image = images.build_small_image(name)
    upstreams.fake.put(name, "1", image)
    skopeo, direct = clients.skopeo(daemon), clients.skopeo_without_proxy()
    skopeo.pull(f"fake.test/{name}:1")
    raise_wall(upstreams, WALLS[wall])
    assert not pulls_directly(upstreams, direct, name)
    for _ in range(2):
        skopeo.pull(f"fake.test/{name}:1")
        for method in ("GET", "HEAD"):
            response = daemon.client.request(method, f"{FAKE}/v2/{name}/manifests/1", {"Accept": ACCEPT_MANIFESTS})
            assert (response.status, response.cache_status) == (200, "STALE")
            assert response.headers["docker-content-digest"] == image.digest
    upstreams.fake.reset_rules()
    response = daemon.client.get(f"{FAKE}/v2/{name}/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status == 200 and response.cache_status in ("MISS", "REVALIDATED")


@pytest.mark.slow
@pytest.mark.parametrize("wall", ["403", "401", "portal"])
def test_engines_behind_a_wall(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, wall: str
) -> None:
    """Engines ask /v2/ first, of which the answer is known, and for tokens, also after a restart of the daemon."""
    daemon = start_daemon()
    image = images.build_small_image(f"engines-{wall}", oci=False)
    upstreams.fake.put(f"engines/{wall}", "1", image)
    upstreams.push_to_hub(f"library/engines{wall}", "1", image)
    names = [f"fake.test/engines/{wall}:1", f"docker.io/library/engines{wall}:1"]
    docker, containerd, podman = clients.docker(daemon), clients.containerd(daemon), clients.podman(daemon)
    for name in names:
        docker.run_checked("pull", name)
        containerd.pull(name)
        check_output(podman.run("pull", name))
    docker.remove_all_images()
    containerd.remove_all_images()
    check_output(podman.run("rmi", "--all", "--force"))
    daemon.restart()
    raise_wall(upstreams, WALLS[wall])
    upstreams.token_server.behaviour = WALLS[wall]
    try:
        for name in names:
            docker.run_checked("pull", name)
            containerd.pull(name)
            check_output(podman.run("pull", name))
    finally:
        upstreams.token_server.behaviour = None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 451])
def test_the_walls_page_is_passed_on(upstreams: Upstreams, daemon: TwistdDaemon, status: int) -> None:
    raise_wall(upstreams, respond_wall(status))
    for path in ("/v2/walled/never/manifests/1", f"/v2/walled/never/blobs/sha256:{'1' * 64}", "/v2/walled/tags/list"):
        response = daemon.client.get(f"{FAKE}{path}")
        direct = request_directly("GET", f"http://127.0.0.1:{daemon.port}/v2/fake.test{path.removeprefix('/v2')}")
        assert response.status == direct.status == status
        assert b"Blocked" in response.body


@pytest.mark.parametrize(
    "behaviour",
    [
        fake_registry.respond_status(403, "DENIED"),
        fake_registry.respond_status(401, "UNAUTHORIZED"),
        respond_wall(403, b"", Server="nginx"),
        respond_wall(404, b"", Server="nginx"),
        respond_wall(401, WWW_Authenticate='Basic realm="x"'),
        respond_wall(403, Docker_Distribution_Api_Version="registry/2.0"),
    ],
    ids=["JSON", "JSON without a challenge", "bare 403", "bare 404", "challenge", "version"],
)
def test_the_registrys_own_refusal_counts(
    upstreams: Upstreams, daemon: TwistdDaemon, behaviour: ResponseBehaviour, request: pytest.FixtureRequest
) -> None:
    name = f"walled/own-{request.node.callspec.id.replace(' ', '-').lower()}"
    upstreams.fake.put(name, "1", images.build_small_image(name))
    url = f"{FAKE}/v2/{name}/manifests/1"
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status == 200
    raise_wall(upstreams, behaviour)
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status in (401, 403, 404)
    upstreams.fake.reset_rules()
    raise_wall(upstreams, respond_wall(503))
    assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status >= 500  # it has not been forgotten either


def test_cached_image_while_a_wall_is_before_the_token_server(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory
) -> None:
    daemon = start_daemon()
    upstreams.push_to_hub("library/walledtoken", "1", images.build_small_image("walledtoken"))
    skopeo = clients.skopeo(daemon)
    skopeo.pull("docker.io/library/walledtoken:1")
    scope = "service=registry.docker.io&scope=repository:library/walledtoken:pull"
    login = upstreams.basic_authorization("alice")
    assert daemon.client.get(f"{TOKEN_URL}?{scope}", Authorization=login).status == 200
    daemon.restart()  # drops the tokens, which are only in memory
    upstreams.token_server.behaviour = respond_wall(403)
    try:
        skopeo.pull("docker.io/library/walledtoken:1")
        # A client that has logged in before may read what is public; nobody has checked its password.
        response = daemon.client.get(f"{TOKEN_URL}?{scope}", Authorization=login)
        assert response.status == 200
        manifest = daemon.client.get(
            f"{HUB}/v2/library/walledtoken/manifests/1",
            Authorization=f"Bearer {response.json['token']}",
            Accept=ACCEPT_MANIFESTS,
        )
        assert (manifest.status, manifest.cache_status) == (200, "STALE")
        assert daemon.client.get(f"{TOKEN_URL}?{scope}", Authorization="Basic eDp5").status == 403
        response = daemon.client.get(f"{HUB}/v2/library/never/manifests/1")
        assert response.status == 403
        assert "a firewall, a CDN or a captive portal" in response.error_message
    finally:
        upstreams.token_server.behaviour = None


def test_static_registry(upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory) -> None:
    """A web server with files, of which /v2/ is an index page."""
    daemon = start_daemon()
    upstreams.fake.put("static/app", "1", images.build_small_image("static"))
    upstreams.fake.add_rule("GET", "^/v2/$", fake_registry.respond_html)
    upstreams.fake.add_rule("HEAD", "^/v2/$", fake_registry.respond_html)
    skopeo = clients.skopeo(daemon)
    assert pulls_directly(upstreams, clients.skopeo_without_proxy(), "static/app")
    for _ in range(2):
        skopeo.pull("fake.test/static/app:1")
    upstreams.fake.stop()
    try:
        skopeo.pull("fake.test/static/app:1")
    finally:
        upstreams.fake.start()


WAYS = {
    "no end of TLS": fake_registry.respond_without_end,
    "HTTP/1.0": fake_registry.respond_http10,
    "trailers": fake_registry.respond_chunked_with_trailers,
    "gzip": respond_encoded("gzip"),
    "gzip without ranges": respond_encoded("x-gzip", ranges=False),
    "deflate": respond_encoded("deflate"),
    "stacked": respond_encoded("deflate", "gzip"),
    "identity": respond_encoded("identity"),
    "a wrong field": respond_encoded("LIE:gzip"),
    "interim": fake_registry.respond_odd_head(
        before="HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    ),
    "folded": fake_registry.respond_odd_head("X-Folded: a", "\tb", "  c"),
    "LF": fake_registry.respond_odd_head(line_end="\n"),
    "spaces": fake_registry.respond_odd_head("X-Space : a", "X Odd Name: a", status_line="HTTP/1.1  200 OK"),
    "many fields": fake_registry.respond_odd_head(*(f"X-{number}: {'x' * 1000}" for number in range(200))),
    "lengths": fake_registry.respond_odd_head("Content-Length: LENGTH, LENGTH", "Transfer-Encoding: identity"),
    "created": fake_registry.respond_odd_head(status_line="HTTP/1.1 201 Created"),
    "odd chunks": fake_registry.respond_odd_chunks(b"%x \t; a=b\r\n"),
    "chunks with LF": fake_registry.respond_odd_chunks(b"%x\n", b"\n"),
    "chunks of HTTP/1.0": fake_registry.respond_odd_chunks(version="1.0"),
}


def test_lists_and_pages_that_end_without_end_of_tls(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    for path in ("/v2/no/end/tags/list", "/page"):

        def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
            exchange.send_head(200, {"Content-Type": "application/json", "Connection": "close"})
            exchange.send_body(b'{"name": "no/end", "tags": []}')
            exchange.close_after_response()

        upstreams.fake.add_rule("GET", path, respond)
        response = daemon.client.get(f"{FAKE}{path}")
        assert (response.status, response.body) == (200, b'{"name": "no/end", "tags": []}')


@pytest.mark.parametrize("way", WAYS)
def test_content_with_the_right_digest_is_taken(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory, way: str
) -> None:
    """Small and large layers, cold and warm, for two repositories: each has to show that it has the layer."""
    name = f"odd/{way.replace(' ', '-').replace('/', '-').lower()}"
    image = images.build_small_image(name)
    layer = gzip.compress(images.random_bytes(600_000, name))
    skopeo = clients.skopeo(daemon)
    for repository in (f"{name}/a", f"{name}/b"):
        upstreams.fake.put(repository, "1", image)
        digest = upstreams.fake.put_blob(repository, layer)
        upstreams.fake.add_rule("GET", f"/v2/{repository}/(manifests|blobs)/", WAYS[way])
        for _ in range(2):
            skopeo.pull(f"fake.test/{repository}:1")
            assert daemon.client.get(f"{FAKE}/v2/{repository}/blobs/{digest}").body == layer


def test_token_and_list_with_a_coding(upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory) -> None:
    daemon = start_daemon()
    upstreams.push_to_hub("library/codedtoken", "1", images.build_small_image("codedtoken"))
    upstreams.token_server.coding = "gzip"
    try:
        clients.skopeo(daemon).pull("docker.io/library/codedtoken:1")
    finally:
        upstreams.token_server.coding = ""
    tags = json.dumps({"name": "odd", "tags": ["1"] * 1000}).encode()
    upstreams.fake.add_rule(
        "GET",
        "/v2/odd/tags/list",
        lambda exchange, content: exchange.respond(200, {"Content-Encoding": "gzip"}, gzip.compress(tags)),
    )
    response = daemon.client.get(f"{FAKE}/v2/odd/tags/list")
    assert (response.body, response.headers.get("content-encoding")) == (tags, None)


def test_a_bomb_is_refused(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """64 MiB in 64 KiB: more than a manifest or a token may have."""
    bomb = gzip.compress(bytes(64 << 20))
    upstreams.fake.add_rule(
        "GET",
        "/v2/bomb/",
        lambda exchange, content: exchange.respond(200, {"Content-Encoding": "gzip"}, bomb),
    )
    response = daemon.client.get(f"{FAKE}/v2/bomb/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status == 502
    assert "decoded content exceeds" in response.error_message


def test_rate_limit_fields(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """The usual check of one's budget at Docker Hub: a HEAD, and its fields. A cached copy has none."""
    daemon = start_daemon(ENABLE_MANIFEST_CACHE="true")
    upstreams.fake.put("limits/app", "1", images.build_small_image("limits"))
    limits = {
        "RateLimit-Limit": "100;w=21600",
        "RateLimit-Remaining": "76;w=21600",
        "Docker-RateLimit-Source": "192.0.2.1",
    }

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        assert content is not None
        fields = {"Content-Type": content.media_type, "Docker-Content-Digest": content.digest, "Set-Cookie": "a=b"}
        exchange.respond(200, {**fields, **limits, "Content-Length": str(len(content.data))}, content.data)

    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/limits/app/manifests/", respond)
    url = f"{FAKE}/v2/limits/app/manifests/1"
    for method, status in (("HEAD", "MISS"), ("GET", "MISS"), ("GET", "HIT"), ("HEAD", "HIT")):
        response = daemon.client.request(method, url, {"Accept": ACCEPT_MANIFESTS})
        assert (response.status, response.cache_status) == (200, status)
        sent = {name: response.headers.get(name.lower()) for name in limits}
        assert sent == (limits if status == "MISS" else dict.fromkeys(limits))
        assert "set-cookie" not in response.headers
