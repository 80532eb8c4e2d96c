"""The attacker runs a registry, evil.test, and is a client without a login.

He knows the digest of private content of good.test, which the cache has or will have. He gets nothing of it
from the cache, because his registry has not sent it, whatever it claims.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from http.client import IncompleteRead
from itertools import product

import pytest

from tests.e2e.harness.fake_registry import (
    ResponseBehaviour,
    ignore_range,
    pause_after,
    redirect_to,
    require_authorization,
    respond_chunked,
    respond_normally,
    respond_status,
)
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import OCI_MANIFEST, TypedContent, build_small_image, random_bytes
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

PRIVATE = "private/app"
ALICE = basic_authorization("alice", "secret")

LARGE = TypedContent("application/octet-stream", random_bytes(300_000, "the private layer"))
SMALL = TypedContent("application/octet-stream", random_bytes(3000, "the private configuration"))
TINY = TypedContent("application/octet-stream", b"{}")
MANIFEST = build_small_image("private").manifest
CONTENTS = [LARGE, SMALL, TINY, MANIFEST]


@pytest.fixture
def private(network: HostileNetwork) -> HostileNetwork:
    """Put private content into good.test, which only alice may read."""
    for content in CONTENTS:
        network.good.put_blob(PRIVATE, content.data)
    network.good.put_manifest(PRIVATE, MANIFEST.digest, MANIFEST)
    network.good.put_manifest(PRIVATE, "latest", MANIFEST)
    for method in ("GET", "HEAD"):
        network.good.add_rule(method, f"/v2/{PRIVATE}/", require_authorization('Basic realm="good"'))
    return network


def pull_as_alice(daemon: RegistryDaemon) -> None:
    """Pull all private content with alice's login, so that it is cached."""
    for content in CONTENTS:
        path = f"{GOOD}/v2/{PRIVATE}/blobs/{content.digest}"
        assert daemon.client.get(path, Authorization=ALICE).body == content.data
    for reference in (MANIFEST.digest, "latest"):
        path = f"{GOOD}/v2/{PRIVATE}/manifests/{reference}"
        assert daemon.client.get(path, Authorization=ALICE, Accept=OCI_MANIFEST).body == MANIFEST.data


def claim(content: TypedContent, fill: bytes = b"\0") -> ResponseBehaviour:
    """Claim to have `content`, with everything that is right except the bytes."""

    def respond(exchange: HTTPExchange, _: TypedContent | None) -> None:
        fake = TypedContent(content.media_type, (fill * len(content.data))[: len(content.data)])
        fields = {
            "Content-Type": content.media_type,
            "Docker-Content-Digest": content.digest,
            "ETag": f'"{content.digest}"',
            "Accept-Ranges": "bytes",
        }
        first, last = 0, len(fake.data) - 1
        range_field = exchange.request.headers.get("range", "").removeprefix("bytes=")
        if range_field and exchange.method == "GET":
            start, _, end = range_field.partition("-")
            first, last = (int(start), min(int(end or last), last)) if start else (len(fake.data) - int(end), last)
            fields["Content-Range"] = f"bytes {first}-{last}/{len(fake.data)}"
        if exchange.method == "HEAD":
            exchange.respond(200, {**fields, "Content-Length": str(len(fake.data))})
        else:
            exchange.respond(206 if range_field else 200, fields, fake.data[first : last + 1])

    return respond


def claim_without_bytes(content: TypedContent) -> ResponseBehaviour:
    """Claim to have `content`, and send nothing of it."""

    def respond(exchange: HTTPExchange, _: TypedContent | None) -> None:
        fields = {"Content-Type": content.media_type, "Docker-Content-Digest": content.digest}
        exchange.send_head(200, {**fields, "Content-Length": str(len(content.data))})
        exchange.close_after_response()

    return respond


def confirm_only(status: int) -> ResponseBehaviour:
    """Confirm a HEAD, and answer a GET with `status` and a claimed total size."""

    def respond(exchange: HTTPExchange, _: TypedContent | None) -> None:
        exchange.respond(status, {"Content-Range": f"bytes 0-0/{len(LARGE.data)}", "ETag": f'"{LARGE.digest}"'})

    return respond


def lie(network: HostileNetwork, get: ResponseBehaviour | None = None) -> None:
    """Let evil.test claim every private content; `get` is its response to GET."""
    for content in CONTENTS:
        network.evil.add_rule("HEAD", content.digest, claim(content))
        network.evil.add_rule("GET", content.digest, get or claim(content))
    network.evil.add_rule("HEAD", "/manifests/latest", claim(MANIFEST))
    network.evil.add_rule("GET", "/manifests/latest", get or claim(MANIFEST))


def ask(daemon: RegistryDaemon, method: str, path: str, headers: Mapping[str, str] | None = None) -> BufferedResponse:
    """Ask for a path of evil.test. Return no body if the response was cut off because evil's bytes were wrong."""
    try:
        return daemon.client.request(method, EVIL + path, headers)
    except IncompleteRead:
        return BufferedResponse(502, {}, b"")


def attack(daemon: RegistryDaemon, name: str) -> Iterator[tuple[str, BufferedResponse]]:
    """Ask for the private content under the name of evil.test. Yield the questions and the answers."""
    for content in (LARGE, MANIFEST):
        for kind, method in product(("blobs", "manifests"), ("HEAD", "GET")):
            path = f"/v2/{name}/{kind}/{content.digest}"
            yield f"{method} {path}", ask(daemon, method, path)


def attack_in_all_forms(daemon: RegistryDaemon, name: str) -> Iterator[tuple[str, BufferedResponse]]:
    paths = [f"/v2/{name}/{kind}/{content.digest}" for content in CONTENTS for kind in ("blobs", "manifests")]
    for path in [*paths, f"/v2/{name}/manifests/latest"]:
        digest = path.rpartition("/")[2]
        fields = [
            {"Range": "bytes=0-9"},
            {"Range": "bytes=-1"},
            {"If-None-Match": f'"{digest}"'},
            {"If-Range": f'"{digest}"', "Range": "bytes=1-2"},
            {"Accept": OCI_MANIFEST},
        ]
        for headers in fields:
            yield f"GET {path} {headers}", ask(daemon, "GET", path, headers)
        yield f"HEAD {path}", ask(daemon, "HEAD", path)
        address = daemon.http_address if "blobs" in path else f"127.0.0.1:{daemon.port}"
        yield f"mirror {path}", ask_mirror(address, f"{path}?ns=evil.test")
    mount = f"/v2/{name}/blobs/uploads/?mount={LARGE.digest}&from={PRIVATE}"
    yield "mount", ask(daemon, "POST", mount, {"Content-Length": "0"})


def ask_mirror(address: str, target: str) -> BufferedResponse:
    try:
        return request_directly("GET", f"http://{address}{target}")
    except IncompleteRead:
        return BufferedResponse(502, {}, b"")


def assert_nothing_is_given(answers: Iterable[tuple[str, BufferedResponse]]) -> None:
    for question, response in answers:
        assert response.cache_status in (None, "MISS", "PASS"), (question, response)
        assert response.status != 304 or question.startswith("HEAD"), (question, response)
        for content in (LARGE, SMALL, MANIFEST):
            assert content.data[-100:] not in response.body, (question, response)
            assert not response.body or content.data[:10] != response.body[:10], (question, response)
        assert response.body != TINY.data, (question, response)


def refuse_ranges(exchange: HTTPExchange, content: TypedContent | None) -> None:
    """Respond to requests with a Range by 416."""
    if "range" in exchange.request.headers:
        exchange.respond(416)
    else:
        respond_normally(exchange, content)


LIES = {
    "right in everything but the bytes": None,
    "a guess": claim(LARGE, b"\x1f\x8b\x08\x00"),
    "a head without bytes": claim_without_bytes(LARGE),
    "206 without bytes": confirm_only(206),
    "304": confirm_only(304),
    "416": confirm_only(416),
    "204": confirm_only(204),
    "404 to GET": respond_status(404),
    "a redirect to the honest registry": redirect_to(f"{GOOD}/v2/{PRIVATE}/blobs/{LARGE.digest}"),
}


def test_claims_about_cached_content(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    pull_as_alice(daemon)
    for number, get in enumerate(LIES.values()):
        private.evil.reset_rules()
        lie(private, get)
        assert_nothing_is_given(attack(daemon, f"x/y{number}"))


def test_claim_in_all_forms(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    pull_as_alice(daemon)
    lie(private)
    assert_nothing_is_given(attack_in_all_forms(daemon, "x/y"))


def test_claim_before_the_content_is_cached(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """The claim comes first, and must give nothing after alice's pull, nor after a restart."""
    daemon = start_daemon()
    lie(private)
    assert_nothing_is_given(attack(daemon, "x/y"))
    pull_as_alice(daemon)
    assert_nothing_is_given(attack(daemon, "x/y"))
    daemon.restart()
    assert_nothing_is_given(attack(daemon, "x/y"))


def test_claim_while_the_content_arrives(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """alice's download is in progress. The clients of evil.test wait for evil.test, and get nothing of good.test."""
    gate = threading.Event()
    private.good.reset_rules()
    private.good.add_rule("GET", LARGE.digest, pause_after(200_000, gate))
    daemon = start_daemon()
    lie(private)
    with daemon.client.stream("GET", f"{GOOD}/v2/{PRIVATE}/blobs/{LARGE.digest}") as download:
        assert download.read(100_000) == LARGE.data[:100_000]
        assert_nothing_is_given(attack(daemon, "x/y"))
        gate.set()
        assert download.read() == LARGE.data[100_000:]
    assert_nothing_is_given(attack(daemon, "x/y"))


def test_size_cannot_be_guessed(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """evil.test is asked the same question whichever length it claims, so that it learns nothing from them."""
    daemon = start_daemon()
    pull_as_alice(daemon)
    for size in (len(LARGE.data) - 1, len(LARGE.data), len(LARGE.data) + 1):
        fake = TypedContent(LARGE.media_type, bytes(size))
        private.evil.reset_rules()
        private.evil.add_rule("HEAD", LARGE.digest, claim(fake))
        private.evil.add_rule("GET", LARGE.digest, respond_status(404))
        head = ask(daemon, "HEAD", f"/v2/x/y/blobs/{LARGE.digest}")
        assert (head.status, head.headers["content-length"]) == (200, str(size))  # its own word to its own client
        assert ask(daemon, "GET", f"/v2/x/y/blobs/{LARGE.digest}").status == 404
        requests = [(one.method, one.headers.get("range")) for one in private.evil.requests if LARGE.digest in one.path]
        assert requests[0] == ("HEAD", None)
        assert [method for method, _ in requests] == ["HEAD", "GET"]


def test_head_is_asked_as_if_nothing_was_cached(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    lie(private)
    questions = []
    for _ in range(2):
        private.evil.requests.clear()
        for content, kind in product(CONTENTS, ("blobs", "manifests")):
            ask(daemon, "HEAD", f"/v2/x/y/{kind}/{content.digest}")
        questions.append([(one.method, one.path, one.headers.get("range")) for one in private.evil.requests[-8:]])
        pull_as_alice(daemon)
    assert questions[0] == questions[1]


def test_registry_that_confirms_every_head(private: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """An honest registry that answers HEAD without looking: no repository gives out what another one has sent."""
    daemon = start_daemon()
    pull_as_alice(daemon)
    for content in CONTENTS:
        private.good.add_rule("HEAD", f"/v2/public/.*{content.digest}", claim(content))
    for content, kind in product(CONTENTS, ("blobs", "manifests")):
        response = daemon.client.get(f"{GOOD}/v2/public/app/{kind}/{content.digest}")
        assert response.status == 404, (content, kind)


# honest registries


def test_blob_of_two_registries_is_transferred_once(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """The second registry has to send two small parts of a large blob, and a small one as a whole."""
    for registry in (network.good, network.evil):
        for content in (LARGE, SMALL):
            registry.put_blob("team/app", content.data)
    daemon = start_daemon()
    for origin, expected in ((GOOD, "MISS"), (EVIL, "REVALIDATED"), (EVIL, "HIT")):
        for content in (LARGE, SMALL):
            response = daemon.client.get(f"{origin}/v2/team/app/blobs/{content.digest}")
            assert (response.cache_status, response.body) == (expected, content.data)
    requests = network.evil.find_requests("GET", LARGE.digest)
    assert [bool(request.headers.get("range")) for request in requests] == [True, True]
    assert sum(request.sent_bytes for request in requests) < 40_000
    assert len(network.evil.find_requests("GET", SMALL.digest)) == 1


@pytest.mark.parametrize("respond", [ignore_range, respond_chunked, refuse_ranges])
def test_registry_without_ranges(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, respond: ResponseBehaviour
) -> None:
    for registry in (network.good, network.evil):
        registry.put_blob("team/app", LARGE.data)
    network.evil.add_rule("GET", LARGE.digest, respond)
    daemon = start_daemon()
    for origin in (GOOD, EVIL, EVIL):
        assert daemon.client.get(f"{origin}/v2/team/app/blobs/{LARGE.digest}").body == LARGE.data
    network.evil.stop()
    assert daemon.client.get(f"{EVIL}/v2/team/app/blobs/{LARGE.digest}").cache_status == "HIT"
