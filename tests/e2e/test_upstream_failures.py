"""Upstreams that disconnect, send wrong data, stall or redirect in loops. The daemon recovers or reports an error."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.harness import fake_registry, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import ResponseBehaviour
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.upstreams import FAKE, REGISTRY, TOKEN_URL, Upstreams

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwistdDaemon]:
    """Return a daemon that waits only two seconds for upstream."""
    settings = {**upstreams.settings, "PROXY_READ_TIMEOUT": "2s", "PROXY_CONNECT_TIMEOUT": "5s"}
    daemon = TwistdDaemon(tmp_path_factory.mktemp("impatient"), settings)
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        yield daemon


# failures that the daemon can recover from


def test_interrupted_download_resumes(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(3 * MIB, "cut")
    digest = upstreams.fake.put_blob("cut", data)
    for size in (500_000, 700_000, 0, 900_000):
        upstreams.fake.add_rule("GET", digest, fake_registry.truncate_after(size, reset=size == 700_000), times=1)
    response = daemon.client.get(f"{FAKE}/v2/cut/blobs/{digest}")
    assert (response.status, response.body) == (200, data)
    requested_ranges = [request.headers.get("range") for request in upstreams.fake.find_requests("GET", digest)]
    assert requested_ranges[0] is None
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in requested_ranges[1:] if text]
    assert len(starts) == 4 and starts == sorted(starts) and 0 < starts[0] <= 500_000
    assert daemon.client.get(f"{FAKE}/v2/cut/blobs/{digest}").cache_status == "HIT"


def test_upstream_without_range_support(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(2 * MIB, "rangeless")
    digest = upstreams.fake.put_blob("rangeless", data)
    upstreams.fake.add_rule("GET", digest, fake_registry.truncate_after(MIB), times=1)
    upstreams.fake.add_rule("GET", digest, fake_registry.ignore_range)
    assert daemon.client.get(f"{FAKE}/v2/rangeless/blobs/{digest}").body == data


def test_stalled_download_resumes(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(2 * MIB, "stalled")
    digest = upstreams.fake.put_blob("stalled", data)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(MIB, gate), times=1)
    try:
        assert daemon.client.get(f"{FAKE}/v2/stalled/blobs/{digest}").body == data
    finally:
        gate.set()
    assert len(upstreams.fake.find_requests("GET", digest)) == 2


def test_blob_of_unknown_length_is_cached(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(2 * MIB, "chunked")
    digest = upstreams.fake.put_blob("chunked", data)
    upstreams.fake.add_rule("GET", digest, fake_registry.respond_chunked)
    cache_statuses = []
    for _ in range(2):
        response = daemon.client.get(f"{FAKE}/v2/chunked/blobs/{digest}")
        assert response.body == data
        cache_statuses.append(response.cache_status)
    assert cache_statuses == ["MISS", "HIT"]


def test_upstream_without_head_support(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = images.build_small_image("headless")
    upstreams.fake.put("headless", "1", image)
    upstreams.fake.add_rule("HEAD", "/v2/headless/", fake_registry.respond_status(405, "UNSUPPORTED"))
    url = f"{FAKE}/v2/headless/manifests/1"
    for method in ("GET", "HEAD", "GET"):
        response = daemon.client.request(method, url, {"Accept": ACCEPT_MANIFESTS})
        assert (response.status, response.headers.get("docker-content-digest")) == (200, image.digest)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_upstream_that_refuses_head(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory, status: int
) -> None:
    """Cold and warm pulls succeed, as they do without the proxy; a missing tag is a 404."""
    name = f"refused/head-{status}"
    image = images.build_small_image(name)
    upstreams.fake.put(name, "1", image)
    upstreams.fake.add_rule("HEAD", f"/v2/{name}/", fake_registry.respond_status(status, "DENIED"))
    url = f"{FAKE}/v2/{name}"
    for method in ("HEAD", "GET", "GET", "HEAD"):
        response = daemon.client.request(method, f"{url}/manifests/1", {"Accept": ACCEPT_MANIFESTS})
        assert (response.status, response.headers.get("docker-content-digest")) == (200, image.digest)
    layer = image.layers[0]
    assert daemon.client.head(f"{url}/blobs/{layer.digest}").headers["content-length"] == str(len(layer.data))
    skopeo = clients.skopeo(daemon)
    for _ in range(2):
        skopeo.pull(f"fake.test/{name}:1")
    upstreams.fake.add_rule("GET", f"/v2/{name}/manifests/1", fake_registry.respond_status(404, "MANIFEST_UNKNOWN"))
    for method in ("GET", "HEAD"):
        assert daemon.client.request(method, f"{url}/manifests/1", {"Accept": ACCEPT_MANIFESTS}).status == 404


def test_head_without_docker_content_digest(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = images.build_small_image("no digest")
    upstreams.fake.put("no/digest", "1", image)
    upstreams.fake.add_rule("HEAD", "/no/digest/", _respond_without_digest)
    upstreams.fake.add_rule("GET", "/no/digest/manifests", _respond_without_digest)
    for _ in range(2):
        response = daemon.client.head(f"{FAKE}/v2/no/digest/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert response.headers["docker-content-digest"] == image.digest
        assert response.headers["content-length"] == str(len(image.manifest.data))


def test_redirect_status_codes(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    for status_code in (301, 302, 303, 307, 308):
        data = images.random_bytes(1000, f"moved {status_code}")
        digest = upstreams.fake.put_blob("new/place", data)
        redirect = fake_registry.redirect_to(f"/v2/new/place/blobs/{digest}", status_code)
        upstreams.fake.add_rule("GET", f"/moved/blobs/{digest}", redirect)
        assert daemon.client.get(f"{FAKE}/v2/moved/blobs/{digest}").body == data


def test_manifests_are_redirected_too(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    image = images.build_small_image("redirected manifest")
    upstreams.fake.put("here", "1", image)
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/there/manifests/1", fake_registry.redirect_to(f"{FAKE}/v2/here/manifests/1"))
    response = daemon.client.get(f"{FAKE}/v2/there/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert (response.status, response.body) == (200, image.manifest.data)


# failures that it cannot recover from


@pytest.mark.parametrize("size", [1000, 3 * MIB], ids=["small", "large"])
def test_corrupted_blob_is_never_completed(upstreams: Upstreams, daemon: TwistdDaemon, size: int) -> None:
    data = images.random_bytes(size, f"damaged {size}")
    digest = upstreams.fake.put_blob("damaged", data)
    url = f"{FAKE}/v2/damaged/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, fake_registry.respond_corrupted)
    for _ in range(2):
        if size == 1000:
            response = daemon.client.get(url)
            assert (response.status, response.error_code) == (502, "UNAVAILABLE")
            assert "fake.test" in response.error_message
        else:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                daemon.client.get(url)
    upstreams.fake.reset_rules()
    response = daemon.client.get(url)
    assert (response.status, response.body, response.cache_status) == (200, data, "MISS")


@pytest.mark.parametrize("extra", [1000, -1000], ids=["more", "less"])
def test_blob_of_wrong_length_is_never_completed(upstreams: Upstreams, daemon: TwistdDaemon, extra: int) -> None:
    data = images.random_bytes(200_000, f"length {extra}")
    digest = upstreams.fake.put_blob("length", data)
    url = f"{FAKE}/v2/length/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, fake_registry.respond_wrong_length(extra), times=1)
    # The first response may have announced the wrong length. A second one may still belong to the same download.
    for _ in range(3):
        try:
            response = daemon.client.get(url)
        except http.client.IncompleteRead:
            continue
        assert (response.status, response.body) == (200, data)
        return
    raise AssertionError("no response with the blob was complete")


def test_html_instead_of_manifest(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/html/", fake_registry.respond_html)
    for reference in ("1", "sha256:" + "2" * 64):
        response = daemon.client.get(f"{FAKE}/v2/html/manifests/{reference}", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.error_code) == (502, "UNAVAILABLE")
        assert b"<html" not in response.body and "fake.test" in response.error_message


def test_html_instead_of_blob(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(10_000, "html")
    digest = upstreams.fake.put_blob("html", data)
    upstreams.fake.add_rule("GET", digest, fake_registry.respond_html)
    response = daemon.client.get(f"{FAKE}/v2/html/blobs/{digest}")
    assert (response.status, response.error_code) == (502, "UNAVAILABLE")
    upstreams.fake.reset_rules()
    assert daemon.client.get(f"{FAKE}/v2/html/blobs/{digest}").body == data


def test_manifest_with_wrong_digest(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    wrong, right = images.build_small_image("wrong").manifest, images.build_small_image("right").manifest
    upstreams.fake.put_manifest("swapped", right.digest, wrong)
    response = daemon.client.get(f"{FAKE}/v2/swapped/manifests/{right.digest}", Accept=ACCEPT_MANIFESTS)
    assert (response.status, response.error_code) == (502, "UNAVAILABLE")
    upstreams.fake.put_manifest("swapped", right.digest, right)
    response = daemon.client.get(f"{FAKE}/v2/swapped/manifests/{right.digest}", Accept=ACCEPT_MANIFESTS)
    assert (response.status, response.body) == (200, right.data)


def test_upstream_timeout_returns_504(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    gate = threading.Event()
    digest = upstreams.fake.put_blob("silent", b"no response")
    upstreams.fake.add_rule("GET", "/v2/silent/", _never_respond(gate))
    try:
        for path in ("manifests/1", f"blobs/{digest}"):
            response = daemon.client.get(f"{FAKE}/v2/silent/{path}", Accept=ACCEPT_MANIFESTS)
            assert (response.status, response.error_code) == (504, "UNAVAILABLE")
            assert "fake.test" in response.error_message
    finally:
        gate.set()


@pytest.mark.parametrize("retry_after", [None, "30"])
def test_rate_limit_is_forwarded(upstreams: Upstreams, start_daemon: StartDaemon, retry_after: str | None) -> None:
    daemon = start_daemon()  # of its own, because it believes the limit for a while
    headers = {"RateLimit_Limit": "100;w=21600", **({"Retry_After": retry_after} if retry_after else {})}
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/limited/", fake_registry.respond_status(429, "TOOMANYREQUESTS", **headers))
    response = daemon.client.get(f"{FAKE}/v2/limited/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert (response.status, response.error_code) == (429, "TOOMANYREQUESTS")
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["ratelimit-limit"] == "100;w=21600"
    assert len(upstreams.fake.requests) <= 2  # the daemon does not retry


@pytest.mark.parametrize("status", [500, 503])
def test_upstream_server_error_returns_502(upstreams: Upstreams, daemon: TwistdDaemon, status: int) -> None:
    digest = upstreams.fake.put_blob("trouble", b"trouble")
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/trouble/", fake_registry.respond_status(status))
    for path in ("manifests/1", f"blobs/{digest}"):
        response = daemon.client.get(f"{FAKE}/v2/trouble/{path}", Accept=ACCEPT_MANIFESTS)
        assert response.status in (502, status)
        assert response.error_code


UNREACHABLE_HOSTS = {
    "selfsigned.test": "certificate",
    "wrongname.test": "certificate",
    "expired.test": "certificate",
    "closed.test": "refused",
    "no-such-name.invalid": "name",
}


@pytest.mark.parametrize("host", UNREACHABLE_HOSTS)
def test_unreachable_upstream(upstreams: Upstreams, daemon: TwistdDaemon, host: str) -> None:
    for path in ("x/manifests/1", "x/blobs/sha256:" + "3" * 64, "x/tags/list"):
        response = daemon.client.get(f"https://{host}/v2/{path}", Accept=ACCEPT_MANIFESTS)
        assert response.status in (502, 504)
        assert response.error_code == "UNAVAILABLE"
        assert host in response.error_message and UNREACHABLE_HOSTS[host] in response.error_message.lower()
    for server in (upstreams.self_signed, upstreams.wrong_name, upstreams.expired):
        assert server.requests == []


def test_verify_ssl_can_be_disabled(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(VERIFY_SSL="false")
    try:
        for host in ("selfsigned.test", "wrongname.test", "expired.test"):
            assert daemon.client.get(f"https://{host}/v2/").status == 200
    finally:
        for server in (upstreams.self_signed, upstreams.wrong_name, upstreams.expired):
            server.requests.clear()


def test_redirect_loop_is_limited(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    digest = upstreams.fake.put_blob("loop", b"never")
    upstreams.fake.add_rule("GET", "/v2/loop/", fake_registry.redirect_to(f"{FAKE}/v2/loop/blobs/{digest}"))
    response = daemon.client.get(f"{FAKE}/v2/loop/blobs/{digest}")
    assert (response.status, response.error_code) == (502, "UNAVAILABLE")
    assert len(upstreams.fake.requests) < 50


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/v2/x",
        "http://localhost:{port}/v2/x",
        "http://[::1]:{port}/v2/x",
        "http://0.0.0.0:{port}/v2/x",
        "http://[::ffff:127.0.0.1]:{port}/v2/x",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "https://user:password@fake.test/v2/x",
        "//",
        "https://fake.test:99999/",
    ],
)
def test_redirect_to_forbidden_target(upstreams: Upstreams, daemon: TwistdDaemon, location: str) -> None:
    digest = upstreams.fake.put_blob("inwards", b"inwards")
    target = location.format(port=upstreams.plain.port)
    upstreams.plain.clear_log()
    upstreams.fake.add_rule("GET", f"/v2/inwards/blobs/{digest}", fake_registry.redirect_to(target))
    response = daemon.client.get(f"{FAKE}/v2/inwards/blobs/{digest}")
    assert response.status in (403, 502), response
    assert response.error_code in ("DENIED", "UNAVAILABLE")
    assert b"password" not in response.body and b"root:" not in response.body
    assert upstreams.plain.find_requests("GET", "/v2/x") == []


def test_a_redirect_from_tls_to_plain_http_is_not_followed(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    layer = upstreams.push_to_plain("plain/store", "1", images.build_small_image("plain store")).layers[0]
    upstreams.fake.put_blob("to/plain", layer.data)
    location = f"http://plain.test:8080/v2/plain/store/blobs/{layer.digest}"
    upstreams.fake.add_rule("GET", f"/to/plain/blobs/{layer.digest}", fake_registry.redirect_to(location))
    response = daemon.client.get(f"{FAKE}/v2/to/plain/blobs/{layer.digest}")
    assert (response.status, response.error_code) == (502, "UNAVAILABLE")
    assert "fake.test" in response.error_message


MALFORMED_RESPONSES = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 5_000_000,
}


@pytest.mark.parametrize("name", MALFORMED_RESPONSES)
def test_malformed_upstream_response(upstreams: Upstreams, daemon: TwistdDaemon, name: str) -> None:
    digest = upstreams.fake.put_blob("garbage", b"garbage")
    upstreams.fake.add_rule("GET", "/v2/garbage/", _respond_raw(MALFORMED_RESPONSES[name]))
    # The response to a client has begun when the bad chunk arrives, because the length is unknown, and the daemon
    # retries the download for long.
    paths = ["manifests/1"] if name == "bad chunk" else ["manifests/1", f"blobs/{digest}"]
    for path in paths:
        response = daemon.client.get(f"{FAKE}/v2/garbage/{path}", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.error_code) == (502, "UNAVAILABLE"), path
        assert "fake.test" in response.error_message


def test_oversized_manifest(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    upstreams.fake.put_manifest("endless", "1", TypedContent(images.OCI_MANIFEST, b" " * (5 * MIB)))
    response = daemon.client.get(f"{FAKE}/v2/endless/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status in (413, 502)
    assert response.error_code in ("SIZE_INVALID", "UNAVAILABLE")


def test_pull_succeeds_despite_interrupted_layers(
    upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    """Pull with a real client while upstream interrupts the first download of every blob."""
    image = images.build_small_image("bad day", layers=3, size=400_000)
    upstreams.fake.put("bad/day", "1", image)
    for blob in image.blobs:
        upstreams.fake.add_rule("GET", blob.digest, fake_registry.truncate_after(len(blob.data) // 2), times=1)
    clients.skopeo(daemon).pull("fake.test/bad/day:1")


def test_malformed_token_response(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    upstreams.fake.put("nonsense", "1", images.build_small_image("nonsense"))
    realm = 'Bearer realm="https://fake.test/token",service="fake.test",scope="repository:nonsense:pull"'
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/nonsense/", fake_registry.require_authorization(realm))
    for token_body in (b'{"token": 5}', b"[]", b"<html>", b'{"token": "a\\nb"}', b'{"token": ""}'):
        upstreams.fake.add_rule("GET", "/token", _respond_json(token_body), times=1)
        response = daemon.client.get(f"{FAKE}/v2/nonsense/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert response.status in (401, 502), token_body
        assert response.headers["content-type"].startswith("application/json")


def test_token_server_refuses_a_token(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    upstreams.token_server.failure_status = 429
    try:
        response = daemon.client.get(
            f"{TOKEN_URL}?service=registry.docker.io&scope=repository:library/x:pull",
            Authorization=upstreams.basic_authorization("alice"),
        )
        assert response.status == 429
    finally:
        upstreams.token_server.failure_status = None


def test_other_upstreams_are_not_blocked(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    gate = threading.Event()
    upstreams.fake.add_rule("GET", "/v2/stuck/", _never_respond(gate))
    image = upstreams.push_to_registry("meanwhile", "1", images.build_small_image("meanwhile"))
    connection = daemon.client.new_connection(FAKE)
    try:
        connection.request("GET", "/v2/stuck/manifests/1")
        response = daemon.client.get(f"{REGISTRY}/v2/meanwhile/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert response.body == image.manifest.data
    finally:
        gate.set()
        connection.close()


def test_expired_redirect_is_requested_again(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """If a signed URL has expired, the daemon requests a new one from the registry."""
    data = images.random_bytes(2 * MIB, "signed")
    digest = upstreams.fake.put_blob("signed", data)
    upstreams.fake.put_blob("bucket", data)
    url = f"{FAKE}/v2/bucket/blobs/{digest}"
    upstreams.fake.add_rule("GET", f"/v2/signed/blobs/{digest}", fake_registry.redirect_to(f"{url}?first=yes"), times=1)
    upstreams.fake.add_rule("GET", f"/v2/signed/blobs/{digest}", fake_registry.redirect_to(f"{url}?second=yes"))
    upstreams.fake.add_rule("GET", "first=yes", fake_registry.truncate_after(MIB), times=1)
    upstreams.fake.add_rule("GET", "first=yes", fake_registry.respond_status(403))
    assert daemon.client.get(f"{FAKE}/v2/signed/blobs/{digest}").body == data
    assert [request.headers.get("range") is None for request in upstreams.fake.find_requests("GET", "second=yes")] == [
        False
    ]


def _respond_without_digest(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond without Docker-Content-Digest."""
    assert content is not None
    fields = {"Content-Type": content.media_type, "Content-Length": str(len(content.data))}
    exchange.respond(200, fields, content.data)


def _never_respond(gate: threading.Event) -> ResponseBehaviour:
    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        gate.wait(60)
        exchange.reset()

    return respond


def _respond_raw(data: bytes) -> ResponseBehaviour:
    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        exchange.send_body(data)
        exchange.close_after_response()

    return respond


def _respond_json(body: bytes) -> ResponseBehaviour:
    return lambda exchange, content: exchange.respond(200, {"Content-Type": "application/json"}, body)
