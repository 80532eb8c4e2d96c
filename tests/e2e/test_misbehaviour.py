"""Upstreams that break off, lie, stall and loop: a good answer where one can still be had, else a clear error."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.house import fake_registry, images
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.fake_registry import Behaviour
from tests.e2e.house.images import EVERY_MANIFEST, Content
from tests.e2e.house.machines import Machines
from tests.e2e.house.serving import Exchange
from tests.e2e.house.upstreams import FAKE, REGISTRY, TOKENS, Upstreams

MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A daemon that waits for upstream for two seconds only."""
    settings = {**upstreams.settings, "PROXY_READ_TIMEOUT": "2s", "PROXY_CONNECT_TIMEOUT": "5s"}
    proxy = Proxy(tmp_path_factory.mktemp("impatient"), settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


# what can be mended


def test_a_download_that_breaks_off_is_taken_up_where_it_was(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(3 * MIB, "cut")
    digest = upstreams.fake.put_blob("cut", data)
    for size in (500_000, 700_000, 0, 900_000):
        upstreams.fake.on("GET", digest, fake_registry.cut_after(size, reset=size == 700_000), times=1)
    answer = proxy.client.get(f"{FAKE}/v2/cut/blobs/{digest}")
    assert (answer.status, answer.body) == (200, data)
    asked = [seen.headers.get("range") for seen in upstreams.fake.seen("GET", digest)]
    assert asked[0] is None
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in asked[1:] if text]
    assert len(starts) == 4 and starts == sorted(starts) and 0 < starts[0] <= 500_000
    assert proxy.client.get(f"{FAKE}/v2/cut/blobs/{digest}").verdict == "HIT"


def test_an_upstream_without_ranges_sends_it_again(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(2 * MIB, "rangeless")
    digest = upstreams.fake.put_blob("rangeless", data)
    upstreams.fake.on("GET", digest, fake_registry.cut_after(MIB), times=1)
    upstreams.fake.on("GET", digest, fake_registry.rangeless)
    assert proxy.client.get(f"{FAKE}/v2/rangeless/blobs/{digest}").body == data


def test_a_stalled_download_is_taken_up(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(2 * MIB, "stalled")
    digest = upstreams.fake.put_blob("stalled", data)
    never = threading.Event()
    upstreams.fake.on("GET", digest, fake_registry.gated(MIB, never), times=1)
    try:
        assert proxy.client.get(f"{FAKE}/v2/stalled/blobs/{digest}").body == data
    finally:
        never.set()
    assert len(upstreams.fake.seen("GET", digest)) == 2


def test_a_length_that_is_not_told(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(2 * MIB, "chunked")
    digest = upstreams.fake.put_blob("chunked", data)
    upstreams.fake.on("GET", digest, fake_registry.chunked)
    verdicts = []
    for _ in range(2):
        answer = proxy.client.get(f"{FAKE}/v2/chunked/blobs/{digest}")
        assert answer.body == data
        verdicts.append(answer.verdict)
    assert verdicts == ["MISS", "HIT"]


def test_an_upstream_without_head(upstreams: Upstreams, proxy: Proxy) -> None:
    image = images.small("headless")
    upstreams.fake.put("headless", "1", image)
    upstreams.fake.on("HEAD", "/v2/headless/", fake_registry.status(405, "UNSUPPORTED"))
    url = f"{FAKE}/v2/headless/manifests/1"
    for method in ("GET", "HEAD", "GET"):
        answer = proxy.client.ask(method, url, {"Accept": EVERY_MANIFEST})
        assert (answer.status, answer.headers.get("docker-content-digest")) == (200, image.digest)


def test_a_head_without_a_digest(upstreams: Upstreams, proxy: Proxy) -> None:
    image = images.small("no digest")
    upstreams.fake.put("no/digest", "1", image)
    upstreams.fake.on("HEAD", "/no/digest/", _bare)
    upstreams.fake.on("GET", "/no/digest/manifests", _bare)
    for _ in range(2):
        answer = proxy.client.head(f"{FAKE}/v2/no/digest/manifests/1", Accept=EVERY_MANIFEST)
        assert answer.headers["docker-content-digest"] == image.digest
        assert answer.headers["content-length"] == str(len(image.manifest.data))


def test_redirects_with_all_their_numbers(upstreams: Upstreams, proxy: Proxy) -> None:
    for number in (301, 302, 303, 307, 308):
        data = images.noise(1000, f"moved {number}")
        digest = upstreams.fake.put_blob("new/place", data)
        there = fake_registry.redirect(f"/v2/new/place/blobs/{digest}", number)
        upstreams.fake.on("GET", f"/moved/blobs/{digest}", there)
        assert proxy.client.get(f"{FAKE}/v2/moved/blobs/{digest}").body == data


def test_manifests_are_redirected_too(upstreams: Upstreams, proxy: Proxy) -> None:
    image = images.small("redirected manifest")
    upstreams.fake.put("here", "1", image)
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/there/manifests/1", fake_registry.redirect(f"{FAKE}/v2/here/manifests/1"))
    answer = proxy.client.get(f"{FAKE}/v2/there/manifests/1", Accept=EVERY_MANIFEST)
    assert (answer.status, answer.body) == (200, image.manifest.data)


# what cannot


@pytest.mark.parametrize("size", [1000, 3 * MIB], ids=["small", "large"])
def test_wrong_content_is_never_completed(upstreams: Upstreams, proxy: Proxy, size: int) -> None:
    data = images.noise(size, f"damaged {size}")
    digest = upstreams.fake.put_blob("damaged", data)
    url = f"{FAKE}/v2/damaged/blobs/{digest}"
    upstreams.fake.on("GET", digest, fake_registry.damaged)
    for _ in range(2):
        if size == 1000:
            answer = proxy.client.get(url)
            assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
            assert "fake.test" in answer.message
        else:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                proxy.client.get(url)
    upstreams.fake.behave()
    answer = proxy.client.get(url)
    assert (answer.status, answer.body, answer.verdict) == (200, data, "MISS")


@pytest.mark.parametrize("extra", [1000, -1000], ids=["more", "less"])
def test_a_wrong_length_is_never_completed(upstreams: Upstreams, proxy: Proxy, extra: int) -> None:
    data = images.noise(200_000, f"length {extra}")
    digest = upstreams.fake.put_blob("length", data)
    url = f"{FAKE}/v2/length/blobs/{digest}"
    upstreams.fake.on("GET", digest, fake_registry.misstated(extra), times=1)
    for _ in range(3):  # once for those who were told the wrong length, and once more if its end is still being sought
        try:
            answer = proxy.client.get(url)
        except http.client.IncompleteRead:
            continue
        assert (answer.status, answer.body) == (200, data)
        return
    raise AssertionError("the blob never came")


def test_html_is_no_manifest(upstreams: Upstreams, proxy: Proxy) -> None:
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/html/", fake_registry.html)
    for reference in ("1", "sha256:" + "2" * 64):
        answer = proxy.client.get(f"{FAKE}/v2/html/manifests/{reference}", Accept=EVERY_MANIFEST)
        assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
        assert b"<html" not in answer.body and "fake.test" in answer.message


def test_html_is_no_blob(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(10_000, "html")
    digest = upstreams.fake.put_blob("html", data)
    upstreams.fake.on("GET", digest, fake_registry.html)
    answer = proxy.client.get(f"{FAKE}/v2/html/blobs/{digest}")
    assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
    upstreams.fake.behave()
    assert proxy.client.get(f"{FAKE}/v2/html/blobs/{digest}").body == data


def test_a_manifest_that_is_not_what_its_digest_says(upstreams: Upstreams, proxy: Proxy) -> None:
    wrong, right = images.small("wrong").manifest, images.small("right").manifest
    upstreams.fake.put_manifest("swapped", right.digest, wrong)
    answer = proxy.client.get(f"{FAKE}/v2/swapped/manifests/{right.digest}", Accept=EVERY_MANIFEST)
    assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
    upstreams.fake.put_manifest("swapped", right.digest, right)
    answer = proxy.client.get(f"{FAKE}/v2/swapped/manifests/{right.digest}", Accept=EVERY_MANIFEST)
    assert (answer.status, answer.body) == (200, right.data)


def test_silence_is_504(upstreams: Upstreams, proxy: Proxy) -> None:
    never = threading.Event()
    digest = upstreams.fake.put_blob("silent", b"nothing comes of it")
    upstreams.fake.on("GET", "/v2/silent/", _silence(never))
    try:
        for path in ("manifests/1", f"blobs/{digest}"):
            answer = proxy.client.get(f"{FAKE}/v2/silent/{path}", Accept=EVERY_MANIFEST)
            assert (answer.status, answer.error_code) == (504, "UNAVAILABLE")
            assert "fake.test" in answer.message
    finally:
        never.set()


@pytest.mark.parametrize("after", [None, "30"])
def test_a_rate_limit_is_told_to_the_client(upstreams: Upstreams, proxy: Proxy, after: str | None) -> None:
    headers = {"RateLimit_Limit": "100;w=21600", **({"Retry_After": after} if after else {})}
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/v2/limited/", fake_registry.status(429, "TOOMANYREQUESTS", **headers))
    answer = proxy.client.get(f"{FAKE}/v2/limited/manifests/1", Accept=EVERY_MANIFEST)
    assert (answer.status, answer.error_code) == (429, "TOOMANYREQUESTS")
    assert answer.headers.get("retry-after") == after
    assert answer.headers["ratelimit-limit"] == "100;w=21600"
    assert len(upstreams.fake.requests) <= 2  # no hammering


@pytest.mark.parametrize("status", [500, 503])
def test_upstreams_own_trouble_is_502(upstreams: Upstreams, proxy: Proxy, status: int) -> None:
    digest = upstreams.fake.put_blob("trouble", b"trouble")
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/v2/trouble/", fake_registry.status(status))
    for path in ("manifests/1", f"blobs/{digest}"):
        answer = proxy.client.get(f"{FAKE}/v2/trouble/{path}", Accept=EVERY_MANIFEST)
        assert answer.status in (502, status)
        assert answer.error_code


UNREACHABLE = {
    "selfsigned.test": "certificate",
    "wrongname.test": "certificate",
    "expired.test": "certificate",
    "closed.test": "refused",
    "no-such-name.invalid": "name",
}


@pytest.mark.parametrize("host", UNREACHABLE)
def test_an_upstream_that_cannot_be_spoken_to(upstreams: Upstreams, proxy: Proxy, host: str) -> None:
    for path in ("x/manifests/1", "x/blobs/sha256:" + "3" * 64, "x/tags/list"):
        answer = proxy.client.get(f"https://{host}/v2/{path}", Accept=EVERY_MANIFEST)
        assert answer.status in (502, 504)
        assert answer.error_code == "UNAVAILABLE"
        assert host in answer.message and UNREACHABLE[host] in answer.message.lower()
    for server in (upstreams.self_signed, upstreams.wrong_name, upstreams.expired):
        assert server.requests == []


def test_verify_ssl_can_be_switched_off(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(VERIFY_SSL="false")
    try:
        for host in ("selfsigned.test", "wrongname.test", "expired.test"):
            assert proxy.client.get(f"https://{host}/v2/").status == 200
    finally:
        for server in (upstreams.self_signed, upstreams.wrong_name, upstreams.expired):
            server.requests.clear()


def test_a_redirect_loop_ends(upstreams: Upstreams, proxy: Proxy) -> None:
    digest = upstreams.fake.put_blob("loop", b"never")
    upstreams.fake.on("GET", "/v2/loop/", fake_registry.redirect(f"{FAKE}/v2/loop/blobs/{digest}"))
    answer = proxy.client.get(f"{FAKE}/v2/loop/blobs/{digest}")
    assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
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
def test_a_redirect_to_where_nobody_should_go(upstreams: Upstreams, proxy: Proxy, location: str) -> None:
    digest = upstreams.fake.put_blob("inwards", b"inwards")
    target = location.format(port=upstreams.plain.port)
    upstreams.plain.forget()
    upstreams.fake.on("GET", f"/v2/inwards/blobs/{digest}", fake_registry.redirect(target))
    answer = proxy.client.get(f"{FAKE}/v2/inwards/blobs/{digest}")
    assert answer.status in (403, 502), answer
    assert answer.error_code in ("DENIED", "UNAVAILABLE")
    assert b"password" not in answer.body and b"root:" not in answer.body
    assert upstreams.plain.seen("GET", "/v2/x") == []


def test_a_redirect_from_tls_to_plain_http_is_not_followed(upstreams: Upstreams, proxy: Proxy) -> None:
    layer = upstreams.on_plain("plain/store", "1", images.small("plain store")).layers[0]
    upstreams.fake.put_blob("to/plain", layer.data)
    location = f"http://plain.test:8080/v2/plain/store/blobs/{layer.digest}"
    upstreams.fake.on("GET", f"/to/plain/blobs/{layer.digest}", fake_registry.redirect(location))
    answer = proxy.client.get(f"{FAKE}/v2/to/plain/blobs/{layer.digest}")
    assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")
    assert "fake.test" in answer.message


GARBAGE = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 5_000_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_an_upstream_that_does_not_speak_http(upstreams: Upstreams, proxy: Proxy, name: str) -> None:
    digest = upstreams.fake.put_blob("garbage", b"garbage")
    upstreams.fake.on("GET", "/v2/garbage/", _raw(GARBAGE[name]))
    # A blob whose length upstream does not tell has begun when the bad chunk comes; it is sought for long.
    paths = ["manifests/1"] if name == "bad chunk" else ["manifests/1", f"blobs/{digest}"]
    for path in paths:
        answer = proxy.client.get(f"{FAKE}/v2/garbage/{path}", Accept=EVERY_MANIFEST)
        assert (answer.status, answer.error_code) == (502, "UNAVAILABLE"), path
        assert "fake.test" in answer.message


def test_an_endless_manifest(upstreams: Upstreams, proxy: Proxy) -> None:
    upstreams.fake.put_manifest("endless", "1", Content(images.OCI_MANIFEST, b" " * (5 * MIB)))
    answer = proxy.client.get(f"{FAKE}/v2/endless/manifests/1", Accept=EVERY_MANIFEST)
    assert answer.status in (413, 502)
    assert answer.error_code in ("SIZE_INVALID", "UNAVAILABLE")


def test_a_client_of_the_daemon_notices_nothing_of_a_bad_day(
    upstreams: Upstreams, proxy: Proxy, machines: Machines
) -> None:
    """A real pull, with every layer broken off once."""
    image = images.small("bad day", layers=3, size=400_000)
    upstreams.fake.put("bad/day", "1", image)
    for blob in image.blobs:
        upstreams.fake.on("GET", blob.digest, fake_registry.cut_after(len(blob.data) // 2), times=1)
    machines.skopeo(proxy).pull("fake.test/bad/day:1")


def test_a_token_server_that_says_nonsense(upstreams: Upstreams, proxy: Proxy) -> None:
    upstreams.fake.put("nonsense", "1", images.small("nonsense"))
    realm = 'Bearer realm="https://fake.test/token",service="fake.test",scope="repository:nonsense:pull"'
    for method in ("GET", "HEAD"):
        upstreams.fake.on(method, "/v2/nonsense/", fake_registry.challenge(realm))
    for reply in (b'{"token": 5}', b"[]", b"<html>", b'{"token": "a\\nb"}', b'{"token": ""}'):
        upstreams.fake.on("GET", "/token", _json(reply), times=1)
        answer = proxy.client.get(f"{FAKE}/v2/nonsense/manifests/1", Accept=EVERY_MANIFEST)
        assert answer.status in (401, 502), reply
        assert answer.headers["content-type"].startswith("application/json")


def test_hub_refuses_a_token(upstreams: Upstreams, proxy: Proxy) -> None:
    upstreams.tokens.failure = 429
    try:
        answer = proxy.client.get(
            f"{TOKENS}?service=registry.docker.io&scope=repository:library/x:pull",
            Authorization=upstreams.basic_login("alice"),
        )
        assert answer.status == 429
    finally:
        upstreams.tokens.failure = None


def test_other_upstreams_go_on_meanwhile(upstreams: Upstreams, proxy: Proxy) -> None:
    never = threading.Event()
    upstreams.fake.on("GET", "/v2/stuck/", _silence(never))
    image = upstreams.on_registry("meanwhile", "1", images.small("meanwhile"))
    connection = proxy.client.connection(FAKE)
    try:
        connection.request("GET", "/v2/stuck/manifests/1")
        answer = proxy.client.get(f"{REGISTRY}/v2/meanwhile/manifests/1", Accept=EVERY_MANIFEST)
        assert answer.body == image.manifest.data
    finally:
        never.set()
        connection.close()


def test_a_redirect_that_failed_is_asked_for_anew(upstreams: Upstreams, proxy: Proxy) -> None:
    """A signed URL that has ended is no reason to give up: the registry gives a new one."""
    data = images.noise(2 * MIB, "signed")
    digest = upstreams.fake.put_blob("signed", data)
    upstreams.fake.put_blob("bucket", data)
    url = f"{FAKE}/v2/bucket/blobs/{digest}"
    upstreams.fake.on("GET", f"/v2/signed/blobs/{digest}", fake_registry.redirect(f"{url}?first=yes"), times=1)
    upstreams.fake.on("GET", f"/v2/signed/blobs/{digest}", fake_registry.redirect(f"{url}?second=yes"))
    upstreams.fake.on("GET", "first=yes", fake_registry.cut_after(MIB), times=1)
    upstreams.fake.on("GET", "first=yes", fake_registry.status(403))
    assert proxy.client.get(f"{FAKE}/v2/signed/blobs/{digest}").body == data
    assert [seen.headers.get("range") is None for seen in upstreams.fake.seen("GET", "second=yes")] == [False]


def _bare(exchange: Exchange, content: Content | None) -> None:
    """Answer without Docker-Content-Digest."""
    assert content is not None
    fields = {"Content-Type": content.media_type, "Content-Length": str(len(content.data))}
    exchange.answer(200, fields, content.data)


def _silence(until: threading.Event) -> Behaviour:
    def behave(exchange: Exchange, content: Content | None) -> None:
        until.wait(60)
        exchange.reset()

    return behave


def _raw(data: bytes) -> Behaviour:
    def behave(exchange: Exchange, content: Content | None) -> None:
        exchange.send(data)
        exchange.hang_up()

    return behave


def _json(body: bytes) -> Behaviour:
    return lambda exchange, content: exchange.answer(200, {"Content-Type": "application/json"}, body)
