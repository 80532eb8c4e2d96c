"""Pushing to an intercepted registry: refused unless it is allowed, and then streamed."""

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

from tests.e2e.house import images, wire
from tests.e2e.house.daemon import Proxy
from tests.e2e.house.fake_registry import Behaviour, refuse
from tests.e2e.house.images import EVERY_MANIFEST, Content
from tests.e2e.house.machines import Machines
from tests.e2e.house.process import eventually, need
from tests.e2e.house.serving import Exchange
from tests.e2e.house.upstreams import FAKE, PLAIN, REGISTRY, TOKENS, Upstreams

PUSHES = [
    ("POST", "/v2/refused/blobs/uploads/"),
    ("PATCH", "/v2/refused/blobs/uploads/session-1"),
    ("PUT", "/v2/refused/blobs/uploads/session-1?digest=sha256:" + "0" * 64),
    ("PUT", "/v2/refused/manifests/1"),
    ("DELETE", "/v2/refused/manifests/sha256:" + "0" * 64),
]


@pytest.mark.parametrize(("method", "path"), PUSHES, ids=[f"{method}-{n}" for n, (method, _) in enumerate(PUSHES)])
@pytest.mark.parametrize("origin", [FAKE, PLAIN])
def test_refused_with_the_name_of_the_setting(
    upstreams: Upstreams, proxy: Proxy, method: str, path: str, origin: str
) -> None:
    upstreams.plain.forget()
    answer = proxy.client.ask(method, origin + path, {"Content-Type": "application/octet-stream"}, b"x" * 1000)
    assert (answer.status, answer.error_code) == (405, "UNSUPPORTED")
    assert "ALLOW_PUSH" in answer.message
    assert upstreams.fake.requests == []
    assert upstreams.plain.seen(method, "/refused/") == []


def test_docker_is_told_why(upstreams: Upstreams, proxy: Proxy, machines: Machines) -> None:
    upstreams.on_registry("push/from", "1", images.small("push-from", oci=False))
    docker = machines.docker(proxy)
    docker.do("pull", "registry.test:5443/push/from:1")
    docker.do("tag", "registry.test:5443/push/from:1", "registry.test:5443/push/refused:1")
    pushed = docker.run("push", "registry.test:5443/push/refused:1")
    assert pushed.returncode != 0
    assert "ALLOW_PUSH" in pushed.stdout + pushed.stderr


@pytest.fixture(scope="module")
def open_proxy(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("open"), {**upstreams.settings, "ALLOW_PUSH": "true"})
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


def test_docker_pushes_through(upstreams: Upstreams, open_proxy: Proxy, machines: Machines) -> None:
    image = upstreams.on_registry("push/source", "1", images.small("push-source", oci=False))
    docker = machines.docker(open_proxy)
    docker.do("pull", "registry.test:5443/push/source:1")
    for name in ("registry.test:5443/push/target:1", "plain.test:8080/push/target:1"):
        docker.do("tag", "registry.test:5443/push/source:1", name)
        docker.do("push", name)
    machines.skopeo(open_proxy).pull("registry.test:5443/push/target:1")
    for origin in (REGISTRY, PLAIN):
        got = open_proxy.client.get(f"{origin}/v2/push/target/manifests/1", Accept=EVERY_MANIFEST)
        assert got.json["config"]["digest"] == image.blobs[0].digest


def test_docker_pushes_to_hub_with_a_login(upstreams: Upstreams, open_proxy: Proxy, machines: Machines) -> None:
    upstreams.on_hub("library/seed", "1", images.small("hub-seed", oci=False))
    upstreams.tokens.owners["alice/pushed"] = {"alice"}
    docker = machines.docker(open_proxy)
    docker.do("pull", "seed:1")
    docker.do("tag", "seed:1", "alice/pushed:1")
    assert docker.run("push", "alice/pushed:1").returncode != 0
    docker.login("https://index.docker.io/v1/", "alice", upstreams.users["alice"])
    docker.do("push", "alice/pushed:1")
    skopeo = machines.skopeo(open_proxy)
    skopeo.pull("docker.io/alice/pushed:1", "--src-creds", f"alice:{upstreams.users['alice']}")
    assert skopeo.try_pull("docker.io/alice/pushed:1").returncode != 0


def test_skopeo_pushes_every_platform(upstreams: Upstreams, open_proxy: Proxy, machines: Machines) -> None:
    multi = images.index({"amd64": images.small("push-amd64"), "arm64": images.small("push-arm64")})
    upstreams.on_registry("push/multi", "1", multi)
    skopeo = machines.skopeo(open_proxy)
    folder = skopeo.pull("registry.test:5443/push/multi:1", "--all")
    pushed = skopeo.run(
        "copy", "--all", "--preserve-digests", f"dir:{folder}", "docker://registry.test:5443/push/copy:1"
    )
    assert pushed.returncode == 0, pushed.stderr
    got = open_proxy.client.get(f"{REGISTRY}/v2/push/copy/manifests/1", Accept=EVERY_MANIFEST)
    assert got.body == multi.manifest.data


def test_a_pull_sees_what_was_just_pushed(upstreams: Upstreams, open_proxy: Proxy) -> None:
    url = f"{FAKE}/v2/push/over/manifests/1"
    for seed in ("old", "new"):
        manifest = images.small(seed).manifest
        put = open_proxy.client.ask("PUT", url, {"Content-Type": manifest.media_type}, manifest.data)
        assert put.status == 201
        assert open_proxy.client.get(url, Accept=EVERY_MANIFEST).body == manifest.data


def test_the_location_of_an_upload_leads_back_through_the_proxy(open_proxy: Proxy) -> None:
    data = images.noise(200_000, "location")
    digest = images.sha256(data)
    for origin in (FAKE, REGISTRY):
        begun = open_proxy.client.ask("POST", f"{origin}/v2/push/location/blobs/uploads/")
        assert begun.status == 202
        for start in (0, 100_000):
            location = _absolute(origin, begun.headers["location"])
            begun = open_proxy.client.ask(
                "PATCH", location, {"Content-Range": f"{start}-{start + 99_999}"}, data[start : start + 100_000]
            )
            assert begun.status == 202, begun.body
            assert begun.headers["range"] == f"0-{start + 99_999}"
        location = _absolute(origin, begun.headers["location"])
        ended = open_proxy.client.ask("PUT", f"{location}{'&' if '?' in location else '?'}digest={digest}")
        assert ended.status == 201
        assert open_proxy.client.get(f"{origin}/v2/push/location/blobs/{digest}").body == data


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_first_byte_is_upstream_before_the_last_is_sent(
    upstreams: Upstreams, open_proxy: Proxy, framing: str
) -> None:
    data = images.noise(300_000, "streamed")
    connection = open_proxy.client.connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/streamed/blobs/uploads/s", skip_accept_encoding=True)
        if framing == "length":
            connection.putheader("Content-Length", str(len(data)))
        else:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        _send(connection, data[:100_000], framing)
        eventually(
            lambda: any(seen.received for seen in upstreams.fake.seen("PATCH", "/push/streamed/")),
            "the first bytes upstream, while the rest is still to be sent",
        )
        _send(connection, data[100_000:], framing)
        if framing == "chunked":
            connection.send(b"0\r\n\r\n")
        answer = wire.read(connection.getresponse())
    finally:
        connection.close()
    assert answer.status == 202
    assert [seen.received for seen in upstreams.fake.seen("PATCH", "/push/streamed/")] == [len(data)]


def test_memory_stays_flat_while_upstream_takes_its_time(upstreams: Upstreams, open_proxy: Proxy) -> None:
    """The client is held back: what upstream did not take yet stays with the client."""
    gate = threading.Event()
    upstreams.fake.on("PATCH", "/push/big/", _swallow(gate))
    before = open_proxy.memory
    connection = open_proxy.client.connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/big/blobs/uploads/s", skip_accept_encoding=True)
        connection.putheader("Content-Length", str(128 << 20))
        connection.endheaders()
        sent = threading.Event()
        thread = threading.Thread(target=_send_all, args=(connection, 128, sent), daemon=True)
        thread.start()
        try:
            eventually(lambda: upstreams.fake.seen("PATCH", "/push/big/"), "the request upstream")
            assert not sent.wait(1.5)  # it cannot be: there is room for 128 MiB nowhere
            held = open_proxy.memory - before
        finally:
            gate.set()
            thread.join(60)  # before anything is read: more than one must not use a TLS connection
        answer = wire.read(connection.getresponse())
    finally:
        connection.close()
    assert answer.status == 202
    assert held < 24 << 20
    assert upstreams.fake.seen("PATCH", "/push/big/")[0].received == 128 << 20


def test_curl_waits_for_100_continue(upstreams: Upstreams, open_proxy: Proxy, tmp_path: Path) -> None:
    need("curl")
    file = tmp_path / "layer"
    file.write_bytes(images.noise(3_000_000, "expect"))
    done = subprocess.run(
        ["curl", "-sS", "--fail", "--cacert", str(open_proxy.ca_file), "--proxy", open_proxy.url, "-X", "PATCH",
         "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-T", str(file),
         f"{FAKE}/v2/push/expect/blobs/uploads/s"],
        capture_output=True, text=True, timeout=25, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert upstreams.fake.seen("PATCH", "/push/expect/")[0].received == 3_000_000


def test_a_refusal_of_upstreams_comes_back(upstreams: Upstreams, open_proxy: Proxy) -> None:
    token = open_proxy.client.get(f"{TOKENS}?service=registry.docker.io&scope=repository:library/x:pull,push")
    assert token.status == 200
    answer = open_proxy.client.ask(
        "POST", "https://registry-1.docker.io/v2/library/x/blobs/uploads/",
        {"Authorization": f"Bearer {token.json['token']}"},
    )  # fmt: skip
    assert (answer.status, answer.error_code) == (401, "UNAUTHORIZED")


def test_a_refusal_that_comes_before_the_body_is_through(upstreams: Upstreams, open_proxy: Proxy) -> None:
    """Upstream reads no more after it has answered; the client hears of it while it is still sending."""
    heard = threading.Event()
    upstreams.fake.on("PATCH", "/push/early/", _refuse_at_once(heard))
    connection = open_proxy.client.connection(FAKE)
    try:
        connection.putrequest("PATCH", "/v2/push/early/blobs/uploads/s", skip_accept_encoding=True)
        connection.putheader("Content-Length", str(64 << 20))
        connection.endheaders()
        assert isinstance(connection.sock, ssl.SSLSocket)
        answer = _send_until_answered(connection.sock)
    finally:
        heard.set()
        connection.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"SIZE_INVALID"' in answer


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_push_that_breaks_off_is_not_completed(upstreams: Upstreams, open_proxy: Proxy, framing: str) -> None:
    connection = open_proxy.client.connection(FAKE)
    path = f"/v2/push/broken-{framing}/blobs/uploads/s"
    connection.putrequest("PATCH", path, skip_accept_encoding=True)
    if framing == "length":
        connection.putheader("Content-Length", "300000")
    else:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    _send(connection, bytes(100_000), framing)
    eventually(lambda: any(seen.received for seen in upstreams.fake.seen("PATCH", path)), "the first bytes upstream")
    connection.close()
    [seen] = upstreams.fake.seen("PATCH", path)
    eventually(lambda: seen.ended is not None, "the end of the request upstream")
    assert seen.status == 0  # the fake registry had nothing that it could answer
    assert path not in upstreams.fake.uploads


def _refuse_at_once(heard: threading.Event) -> Behaviour:
    def behave(exchange: Exchange, content: Content | None) -> None:
        refuse(exchange, 413, "SIZE_INVALID")
        heard.wait(20)
        exchange.hang_up()

    return behave


def _send_until_answered(sock: ssl.SSLSocket) -> bytes:
    """Send as fast as it is taken, all in one thread: more than one must not use a TLS connection."""
    sock.setblocking(False)
    piece, answer = bytes(1 << 16), b""
    while b"SIZE_INVALID" not in answer:
        with contextlib.suppress(ssl.SSLWantWriteError):
            sock.send(piece)
        try:
            data = sock.recv(1 << 16)
            assert data, "the connection ends without an answer"
            answer += data
        except ssl.SSLWantReadError:
            select.select([sock], [sock], [], 20)
    return answer


def _absolute(origin: str, location: str) -> str:
    return location if "://" in location else origin + location


def _send(connection: http.client.HTTPConnection, data: bytes, framing: str) -> None:
    connection.send(b"%x\r\n%b\r\n" % (len(data), data) if framing == "chunked" else data)


def _send_all(connection: http.client.HTTPConnection, mebibytes: int, sent: threading.Event) -> None:
    for _ in range(mebibytes):
        connection.send(bytes(1 << 20))
    sent.set()


def _swallow(gate: threading.Event) -> Behaviour:
    def behave(exchange: Exchange, content: Content | None) -> None:
        gate.wait(60)
        for _ in exchange.body():
            pass
        exchange.answer(202, {"Location": exchange.path, "Range": f"0-{exchange.seen.received - 1}"})

    return behave
