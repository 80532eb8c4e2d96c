"""The bad days of an object store: slow, silent, full, throttling, with errors in good answers, and not for us."""

from __future__ import annotations

import http.client
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.docker_registry import push_image
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.object_store import SECRET_KEY
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.seaweedfs import SeaweedFS
from tests.e2e.harness.upstreams import Upstreams

MIB = 1 << 20

Fault = Callable[[HTTPExchange], bool]
"""Answers a request in place of the store, and returns True, or returns False."""


class StoreFront(StubServer):
    """Passes requests on to a store, unless `fault` answers. The Host stays, because it is signed."""

    def __init__(self, store: SeaweedFS, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self._store = store
        self.fault: Fault = lambda exchange: False

    def handle(self, exchange: HTTPExchange) -> None:
        body = b"".join(exchange.read_body())
        if self.fault(exchange):
            return
        connection = http.client.HTTPConnection("127.0.0.1", self._store.port, timeout=60)
        try:
            connection.request(exchange.method, exchange.request.path, body or None, exchange.request.headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        fields = {name: value for name, value in response.getheaders() if name != "Transfer-Encoding"}
        if exchange.method != "HEAD":
            fields["Content-Length"] = str(len(content))
        exchange.respond(response.status, fields, content)


def refuse(exchange: HTTPExchange, status: int, code: str, message: str = "as the test wants") -> bool:
    """Answer with an error of S3."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    exchange.respond(status, {"Content-Type": "application/xml"}, body)
    return True


class Times:
    """A fault for the first `count` requests that match."""

    def __init__(self, count: float, fault: Fault, *, only: Callable[[HTTPExchange], bool] = lambda _: True) -> None:
        self.left, self.seen, self._fault, self._only = count, 0, fault, only

    def __call__(self, exchange: HTTPExchange) -> bool:
        if not self._only(exchange) or self.left <= 0:
            return False
        self.left -= 1
        self.seen += 1
        return self._fault(exchange)


@contextmanager
def running_behind_front(
    seaweedfs: SeaweedFS, bucket: str, folder: Path, read_timeout: str
) -> Iterator[tuple[StoreFront, RegistryDaemon]]:
    """Run a daemon whose store is `bucket` behind a front with faults."""
    front = StoreFront(seaweedfs)
    front.start()
    settings = seaweedfs.settings(seaweedfs.make_bucket(bucket))
    settings["REGISTRY_STORE"] = settings["REGISTRY_STORE"].replace(f":{seaweedfs.port}", f":{front.port}")
    daemon = RegistryDaemon(folder, {**settings, "PROXY_READ_TIMEOUT": read_timeout, "WORKERS": "1"})
    with daemon.run_and_check_log(lambda: [SECRET_KEY]):
        yield front, daemon
    front.stop()


@pytest.fixture(scope="module")
def _shared(
    seaweedfs: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StoreFront, RegistryDaemon]]:
    with running_behind_front(seaweedfs, "bad-days", tmp_path_factory.mktemp("daemon"), "4s") as both:
        yield both


@pytest.fixture
def front(_shared: tuple[StoreFront, RegistryDaemon]) -> Iterator[StoreFront]:
    yield _shared[0]
    _shared[0].fault = lambda exchange: False


@pytest.fixture
def daemon(_shared: tuple[StoreFront, RegistryDaemon]) -> RegistryDaemon:
    return _shared[1]


def push(daemon: RegistryDaemon, name: str, image: SampleImage) -> SampleImage:
    address: Any = SimpleNamespace(host="127.0.0.1", port=daemon.http_port, uses_tls=False)
    return push_image(address, name, "1", image)


def push_blob(daemon: RegistryDaemon, name: str, data: bytes) -> BufferedResponse:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port, timeout=120)
    try:
        connection.request("POST", f"/v2/{name}/blobs/uploads/?digest={images.sha256_digest(data)}", data)
        response = connection.getresponse()
        return BufferedResponse(
            response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        )
    finally:
        connection.close()


def pull(daemon: RegistryDaemon, name: str, image: SampleImage) -> None:
    for path, data in (
        ("manifests/1", image.manifest.data),
        *((f"blobs/{one.digest}", one.data) for one in image.blobs),
    ):
        url = f"http://{daemon.http_address}/v2/{name}/{path}"
        response = request_directly("GET", url, headers={"Accept": ACCEPT_MANIFESTS})
        assert (response.status, response.body) == (200, data)


def is_object(exchange: HTTPExchange) -> bool:
    """Return whether the request is for an object of the registry, not one of the probe that `/readyz` shows."""
    return "/docker/registry/" in exchange.path


def is_write(exchange: HTTPExchange) -> bool:
    """Return whether the answer has a body, with the word of the store."""
    return is_object(exchange) and exchange.method == "PUT"


def test_a_slow_store(front: StoreFront, daemon: RegistryDaemon) -> None:
    """Each answer takes some time, and is waited for."""

    def wait(exchange: HTTPExchange) -> bool:
        time.sleep(0.1)
        return False

    front.fault = wait
    pull(daemon, "slow", push(daemon, "slow", images.build_small_image("slow", size=17 * MIB)))


def test_a_store_that_says_nothing(front: StoreFront, daemon: RegistryDaemon) -> None:
    image = push(daemon, "silent", images.build_small_image("silent"))
    pull(daemon, "silent", image)

    def hang(exchange: HTTPExchange) -> bool:
        time.sleep(6)
        exchange.reset()
        return True

    front.fault = hang
    started = time.monotonic()
    pull(daemon, "silent", image)
    refused = push_blob(daemon, "silent", b"more")
    assert (refused.status, refused.error_code) == (503, "UNAVAILABLE")
    assert int(refused.headers["retry-after"]) > 0 and "timed out" in refused.error_message
    assert time.monotonic() - started < 60
    front.fault = lambda exchange: False
    wait_until(lambda: push_blob(daemon, "silent", b"more").status == 201, "it comes back by itself", timeout=60)


def test_a_full_store(front: StoreFront, daemon: RegistryDaemon) -> None:
    image = push(daemon, "full", images.build_small_image("full"))
    front.fault = lambda exchange: exchange.method in ("PUT", "POST") and refuse(exchange, 507, "InsufficientStorage")
    for data in (b"small", bytes(17 * MIB)):
        refused = push_blob(daemon, "full", data)
        assert refused.status == 507, refused
        assert "is full (InsufficientStorage: as the test wants)" in refused.error_message
    pull(daemon, "full", image)
    front.fault = lambda exchange: False
    assert push_blob(daemon, "full", b"small").status == 201


def test_a_store_that_throttles_is_asked_more_slowly(front: StoreFront, daemon: RegistryDaemon) -> None:
    slow_down = Times(3, lambda exchange: refuse(exchange, 503, "SlowDown"), only=is_object)
    front.fault = slow_down
    started = time.monotonic()
    assert push_blob(daemon, "throttled", b"waits").status == 201
    assert slow_down.seen == 3 and time.monotonic() - started > 0.3, "it was asked again at once"
    slow_down = Times(float("inf"), lambda exchange: refuse(exchange, 503, "SlowDown"), only=is_write)
    front.fault = slow_down
    refused = push_blob(daemon, "throttled", b"gives up")
    assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
    assert "SlowDown" in refused.error_message
    assert slow_down.seen <= 5, "a request of a client is a handful of requests to a store that throttles"


def test_an_error_in_a_good_answer(front: StoreFront, daemon: RegistryDaemon) -> None:
    """The last request of an upload in parts is answered 200 before its outcome is known."""

    def is_end(exchange: HTTPExchange) -> bool:
        return exchange.method == "POST" and "uploadId" in exchange.query

    once = Times(1, lambda exchange: refuse(exchange, 200, "InternalError"), only=is_end)
    front.fault = once
    data = images.random_bytes(17 * MIB, "good answer")
    assert push_blob(daemon, "good", data).status == 201
    assert once.seen == 1
    front.fault = Times(float("inf"), lambda exchange: refuse(exchange, 200, "InternalError"), only=is_end)
    data = images.random_bytes(17 * MIB, "bad answer")
    refused = push_blob(daemon, "good", data)
    assert refused.status == 503 and "InternalError" in refused.error_message
    front.fault = lambda exchange: False
    url = f"http://{daemon.http_address}/v2/good/blobs/{images.sha256_digest(data)}"
    assert request_directly("HEAD", url).status == 404


@pytest.mark.parametrize(
    ("fault", "command", "reason"),
    [
        (
            lambda exchange: refuse(
                exchange,
                400,
                "AuthorizationHeaderMalformed",
                "the region 'us-east-1' is wrong; expecting 'eu-central-1'",
            ),
            [],
            "expecting 'eu-central-1'); set region= in REGISTRY_STORE",
        ),
        (lambda exchange: False, ["faketime", "-f", "+1h"], "(RequestTimeTooSkewed"),
    ],
    ids=["region", "clock"],
)
def test_a_wrong_region_or_clock_stops_the_start(
    seaweedfs: SeaweedFS, front: StoreFront, tmp_path: Path, fault: Fault, command: list[str], reason: str
) -> None:
    require_programs("faketime")
    settings = seaweedfs.settings("bad-days")
    settings["REGISTRY_STORE"] = settings["REGISTRY_STORE"].replace(f":{seaweedfs.port}", f":{front.port}")
    front.fault = fault
    daemon = RegistryDaemon(tmp_path, settings)
    ended = subprocess.run(
        [*command, *daemon.argv], env={**os.environ, **daemon.environment}, capture_output=True, text=True, timeout=60,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 78, ended.stdout + ended.stderr
    assert "docker-registry-proxy: REGISTRY_STORE: " in ended.stderr and reason in ended.stderr


def test_a_store_over_tls_needs_its_ca(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    """Without it, the daemon starts, because the certificate may be the store's fault, and says why nothing works."""
    authority = UpstreamCA(tmp_path / "ca", "the CA of the store")
    front = StoreFront(seaweedfs, authority.leaf("localhost").server_context())
    front.start()
    settings = {**seaweedfs.settings(seaweedfs.make_bucket("tls")), "WORKERS": "1"}
    settings["REGISTRY_STORE"] = f"s3://tls?endpoint=https://localhost:{front.port}"
    try:
        trusting = RegistryDaemon(tmp_path / "right", {**settings, "UPSTREAM_CA_FILE": str(authority.ca_file)})
        with trusting.run_and_check_log(lambda: [SECRET_KEY]):
            image = push(trusting, "over/tls", images.build_small_image("over-tls"))
            pull(trusting, "over/tls", image)
        other = RegistryDaemon(tmp_path / "wrong", settings)
        with other.run_and_check_log(lambda: [SECRET_KEY]):
            refused = push_blob(other, "over/tls", b"x")
            assert refused.status == 503 and "certificate" in refused.error_message.lower(), refused.error_message
            assert "retry-after" in refused.headers
            assert "CERTIFICATE_VERIFY_FAILED" in other.output_text, "at the start"
    finally:
        front.stop()


def test_mirrored_images_do_not_need_the_store(
    front: StoreFront, seaweedfs: SeaweedFS, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Their names could be those of pushed images, so the store is asked once."""
    settings = {**upstreams.settings, **seaweedfs.settings("bad-days"), "WORKERS": "1"}
    settings["REGISTRY_STORE"] = settings["REGISTRY_STORE"].replace(f":{seaweedfs.port}", f":{front.port}")
    digest = upstreams.fake.put_blob("mirrored/app", b"mirrored")
    daemon = RegistryDaemon(tmp_path, settings)
    with daemon.run_and_check_log(lambda: [SECRET_KEY, *upstreams.secrets]):
        url = f"http://{daemon.http_address}/v2/fake.test/mirrored/app/blobs/{digest}"
        assert request_directly("GET", url).body == b"mirrored"
        front.fault = lambda exchange: refuse(exchange, 503, "ServiceUnavailable")
        front.requests.clear()
        for _ in range(3):
            assert request_directly("GET", url).body == b"mirrored"
        assert [request for request in front.requests if "mirrored" in request.path] == []
