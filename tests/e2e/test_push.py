"""Pushes to an intercepted registry: refused unless ALLOW_PUSH is set, and streamed if it is."""

from __future__ import annotations

import contextlib
import http.client
import select
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.fake_registry import ResponseBehaviour, respond_error
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.upstreams import FAKE, PLAIN, REGISTRY, TOKEN_URL, Upstreams

PUSH_REQUESTS = [
    ("POST", "/v2/refused/blobs/uploads/"),
    ("PATCH", "/v2/refused/blobs/uploads/session-1"),
    ("PUT", "/v2/refused/blobs/uploads/session-1?digest=sha256:" + "0" * 64),
    ("PUT", "/v2/refused/manifests/1"),
    ("DELETE", "/v2/refused/manifests/sha256:" + "0" * 64),
]


@pytest.mark.parametrize(
    ("method", "path"), PUSH_REQUESTS, ids=[f"{method}-{n}" for n, (method, _) in enumerate(PUSH_REQUESTS)]
)
@pytest.mark.parametrize("origin", [FAKE, PLAIN])
def test_refused_push_names_the_setting(
    upstreams: Upstreams, daemon: TwistdDaemon, method: str, path: str, origin: str
) -> None:
    upstreams.plain.clear_log()
    response = daemon.client.request(method, origin + path, {"Content-Type": "application/octet-stream"}, b"x" * 1000)
    assert (response.status, response.error_code) == (405, "UNSUPPORTED")
    assert "ALLOW_PUSH" in response.error_message
    assert upstreams.fake.requests == []
    assert upstreams.plain.find_requests(method, "/refused/") == []


def test_docker_reports_the_refusal(upstreams: Upstreams, daemon: TwistdDaemon, clients: ClientFactory) -> None:
    upstreams.push_to_registry("push/from", "1", images.build_small_image("push-from", oci=False))
    docker = clients.docker(daemon)
    docker.run_checked("pull", "registry.test:5443/push/from:1")
    docker.run_checked("tag", "registry.test:5443/push/from:1", "registry.test:5443/push/refused:1")
    result = docker.run("push", "registry.test:5443/push/refused:1")
    assert result.returncode != 0
    assert "ALLOW_PUSH" in result.stdout + result.stderr


@pytest.fixture(scope="module")
def push_enabled_daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwistdDaemon]:
    daemon = TwistdDaemon(tmp_path_factory.mktemp("open"), {**upstreams.settings, "ALLOW_PUSH": "true"})
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        yield daemon


def test_docker_pushes_through_the_proxy(
    upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    image = upstreams.push_to_registry("push/source", "1", images.build_small_image("push-source", oci=False))
    docker = clients.docker(push_enabled_daemon)
    docker.run_checked("pull", "registry.test:5443/push/source:1")
    for name in ("registry.test:5443/push/target:1", "plain.test:8080/push/target:1"):
        docker.run_checked("tag", "registry.test:5443/push/source:1", name)
        docker.run_checked("push", name)
    clients.skopeo(push_enabled_daemon).pull("registry.test:5443/push/target:1")
    for origin in (REGISTRY, PLAIN):
        response = push_enabled_daemon.client.get(f"{origin}/v2/push/target/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert response.json["config"]["digest"] == image.blobs[0].digest


def test_docker_pushes_to_hub_with_a_login(
    upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    upstreams.push_to_hub("library/seed", "1", images.build_small_image("hub-seed", oci=False))
    upstreams.token_server.owners["alice/pushed"] = {"alice"}
    docker = clients.docker(push_enabled_daemon)
    docker.run_checked("pull", "seed:1")
    docker.run_checked("tag", "seed:1", "alice/pushed:1")
    assert docker.run("push", "alice/pushed:1").returncode != 0
    docker.write_login("https://index.docker.io/v1/", "alice", upstreams.users["alice"])
    docker.run_checked("push", "alice/pushed:1")
    skopeo = clients.skopeo(push_enabled_daemon)
    skopeo.pull("docker.io/alice/pushed:1", "--src-creds", f"alice:{upstreams.users['alice']}")
    assert skopeo.try_pull("docker.io/alice/pushed:1").returncode != 0


def test_skopeo_pushes_every_platform(
    upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, clients: ClientFactory
) -> None:
    multi_platform_image = images.build_index(
        {"amd64": images.build_small_image("push-amd64"), "arm64": images.build_small_image("push-arm64")}
    )
    upstreams.push_to_registry("push/multi", "1", multi_platform_image)
    skopeo = clients.skopeo(push_enabled_daemon)
    folder = skopeo.pull("registry.test:5443/push/multi:1", "--all")
    result = skopeo.run(
        "copy", "--all", "--preserve-digests", f"dir:{folder}", "docker://registry.test:5443/push/copy:1"
    )
    assert result.returncode == 0, result.stderr
    response = push_enabled_daemon.client.get(f"{REGISTRY}/v2/push/copy/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.body == multi_platform_image.manifest.data


def test_pull_returns_the_pushed_manifest(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon) -> None:
    url = f"{FAKE}/v2/push/over/manifests/1"
    for seed in ("old", "new"):
        manifest = images.build_small_image(seed).manifest
        response = push_enabled_daemon.client.request("PUT", url, {"Content-Type": manifest.media_type}, manifest.data)
        assert response.status == 201
        assert push_enabled_daemon.client.get(url, Accept=ACCEPT_MANIFESTS).body == manifest.data


def test_upload_location_points_to_the_proxy(push_enabled_daemon: TwistdDaemon) -> None:
    data = images.random_bytes(200_000, "location")
    digest = images.sha256_digest(data)
    for origin in (FAKE, REGISTRY):
        response = push_enabled_daemon.client.request("POST", f"{origin}/v2/push/location/blobs/uploads/")
        assert response.status == 202
        for start in (0, 100_000):
            location = _absolute_url(origin, response.headers["location"])
            response = push_enabled_daemon.client.request(
                "PATCH", location, {"Content-Range": f"{start}-{start + 99_999}"}, data[start : start + 100_000]
            )
            assert response.status == 202, response.body
            assert response.headers["range"] == f"0-{start + 99_999}"
        location = _absolute_url(origin, response.headers["location"])
        put_response = push_enabled_daemon.client.request(
            "PUT", f"{location}{'&' if '?' in location else '?'}digest={digest}"
        )
        assert put_response.status == 201
        assert push_enabled_daemon.client.get(f"{origin}/v2/push/location/blobs/{digest}").body == data


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_push_is_streamed_upstream(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, framing: str) -> None:
    data = images.random_bytes(300_000, "streamed")
    connection = push_enabled_daemon.client.new_connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/streamed/blobs/uploads/s", skip_accept_encoding=True)
        if framing == "length":
            connection.putheader("Content-Length", str(len(data)))
        else:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        _send_framed(connection, data[:100_000], framing)
        wait_until(
            lambda: any(request.received_bytes for request in upstreams.fake.find_requests("PATCH", "/push/streamed/")),
            "upstream receives the first bytes before the rest is sent",
        )
        _send_framed(connection, data[100_000:], framing)
        if framing == "chunked":
            connection.send(b"0\r\n\r\n")
        response = http_client.read_response(connection.getresponse())
    finally:
        connection.close()
    assert response.status == 202
    upstream_requests = upstreams.fake.find_requests("PATCH", "/push/streamed/")
    assert [request.received_bytes for request in upstream_requests] == [len(data)]


def test_memory_stays_flat_while_upstream_is_slow(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon) -> None:
    """If upstream does not read, the daemon stops reading from the client."""
    gate = threading.Event()
    upstreams.fake.add_rule("PATCH", "/push/big/", _discard_body(gate))
    memory_before = push_enabled_daemon.resident_bytes
    connection = push_enabled_daemon.client.new_connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/big/blobs/uploads/s", skip_accept_encoding=True)
        connection.putheader("Content-Length", str(128 << 20))
        connection.endheaders()
        sent = threading.Event()
        thread = threading.Thread(target=_send_mebibytes, args=(connection, 128, sent), daemon=True)
        thread.start()
        try:
            wait_until(lambda: upstreams.fake.find_requests("PATCH", "/push/big/"), "the request arrives upstream")
            assert not sent.wait(1.5)  # no buffer on the way can hold 128 MiB
            memory_growth = push_enabled_daemon.resident_bytes - memory_before
        finally:
            gate.set()
            thread.join(60)  # before reading the response, because two threads must not use a TLS connection
        response = http_client.read_response(connection.getresponse())
    finally:
        connection.close()
    assert response.status == 202
    assert memory_growth < 64 << 20  # measured: 2 MB; without back-pressure 128 MiB
    assert upstreams.fake.find_requests("PATCH", "/push/big/")[0].received_bytes == 128 << 20


def test_curl_waits_for_100_continue(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, tmp_path: Path) -> None:
    require_programs("curl")
    file = tmp_path / "layer"
    file.write_bytes(images.random_bytes(3_000_000, "expect"))
    proxy_options = ["--cacert", str(push_enabled_daemon.ca_file), "--proxy", push_enabled_daemon.url]
    upload_options = ["-X", "PATCH", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-T", str(file)]
    result = subprocess.run(
        ["curl", "-sS", "--fail", *proxy_options, *upload_options, f"{FAKE}/v2/push/expect/blobs/uploads/s"],
        capture_output=True, text=True, timeout=25, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert upstreams.fake.find_requests("PATCH", "/push/expect/")[0].received_bytes == 3_000_000


def test_upstream_refusal_is_forwarded(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon) -> None:
    token_response = push_enabled_daemon.client.get(
        f"{TOKEN_URL}?service=registry.docker.io&scope=repository:library/x:pull,push"
    )
    assert token_response.status == 200
    response = push_enabled_daemon.client.request(
        "POST", "https://registry-1.docker.io/v2/library/x/blobs/uploads/",
        {"Authorization": f"Bearer {token_response.json['token']}"},
    )  # fmt: skip
    assert (response.status, response.error_code) == (401, "UNAUTHORIZED")


def test_early_refusal_is_forwarded(upstreams: Upstreams, push_enabled_daemon: TwistdDaemon) -> None:
    """Upstream stops reading after its response, and the client receives the response while it is still sending."""
    response_received = threading.Event()
    upstreams.fake.add_rule("PATCH", "/push/early/", _refuse_early(response_received))
    connection = push_enabled_daemon.client.new_connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/early/blobs/uploads/s", skip_accept_encoding=True)
        connection.putheader("Content-Length", str(64 << 20))
        connection.endheaders()
        assert isinstance(connection.sock, ssl.SSLSocket)
        response = _send_until_response(connection.sock)
    finally:
        response_received.set()
        connection.close()
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b'"SIZE_INVALID"' in response


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_interrupted_push_is_not_completed(
    upstreams: Upstreams, push_enabled_daemon: TwistdDaemon, framing: str
) -> None:
    connection = push_enabled_daemon.client.new_connection(FAKE)
    path = f"/v2/push/broken-{framing}/blobs/uploads/s"
    connection.putrequest("PATCH", path, skip_accept_encoding=True)
    if framing == "length":
        connection.putheader("Content-Length", "300000")
    else:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    _send_framed(connection, bytes(100_000), framing)
    wait_until(
        lambda: any(request.received_bytes for request in upstreams.fake.find_requests("PATCH", path)),
        "upstream receives the first bytes",
    )
    connection.close()
    [upstream_request] = upstreams.fake.find_requests("PATCH", path)
    wait_until(lambda: upstream_request.ended_event is not None, "the upstream request ends")
    assert upstream_request.response_status == 0  # the fake registry received an incomplete body, and did not respond
    assert path not in upstreams.fake.uploads


def _refuse_early(response_received: threading.Event) -> ResponseBehaviour:
    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        respond_error(exchange, 413, "SIZE_INVALID")
        response_received.wait(20)
        exchange.close_after_response()

    return respond


def _send_until_response(sock: ssl.SSLSocket) -> bytes:
    """Send until there is a response, in one thread, because two threads must not use a TLS connection."""
    sock.setblocking(False)
    chunk, response = bytes(1 << 16), b""
    while b"SIZE_INVALID" not in response:
        with contextlib.suppress(ssl.SSLWantWriteError):
            sock.send(chunk)
        try:
            data = sock.recv(1 << 16)
            assert data, "the connection was closed without a response"
            response += data
        except ssl.SSLWantReadError:
            select.select([sock], [sock], [], 20)
    return response


def _absolute_url(origin: str, location: str) -> str:
    return location if "://" in location else origin + location


def _send_framed(connection: http.client.HTTPConnection, data: bytes, framing: str) -> None:
    connection.send(b"%x\r\n%b\r\n" % (len(data), data) if framing == "chunked" else data)


def _send_mebibytes(connection: http.client.HTTPConnection, mebibytes: int, sent: threading.Event) -> None:
    for _ in range(mebibytes):
        connection.send(bytes(1 << 20))
    sent.set()


def _discard_body(gate: threading.Event) -> ResponseBehaviour:
    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        gate.wait(60)
        for _ in exchange.read_body():
            pass
        exchange.respond(202, {"Location": exchange.path, "Range": f"0-{exchange.request.received_bytes - 1}"})

    return respond
