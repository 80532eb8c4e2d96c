"""Three nodes with one bucket behind a balancer: any client works, and upload sessions are passed on to their node."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.bucket_fleet import BucketFleet, BucketNode, running_bucket_fleet
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import check_output
from tests.e2e.harness.http_client import BufferedResponse, DirectConnection, basic_authorization, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.object_store import SECRET_KEY, ObjectStore
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.registry_daemon import USERS, RegistryDaemon, write_htpasswd, write_image_folder
from tests.e2e.harness.seaweedfs import SeaweedFS

MIB = 1 << 20
UPLOADS_HOST = "uploads.docker-registry-proxy.invalid"
ALICE = {"Authorization": basic_authorization("alice", USERS["alice"])}


@pytest.fixture(scope="module")
def fleet(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketFleet]:
    """Return nodes to which users may push, and from which everybody may pull."""
    folder = tmp_path_factory.mktemp("fleet")
    users = {"HTPASSWD_FILE": str(write_htpasswd(folder)), "ANONYMOUS_PULL": "true", "WORKERS": "2"}
    with running_bucket_fleet(folder, 3, {**store.settings(store.make_bucket("fleet")), **users}) as fleet:
        yield fleet
        for node in fleet.nodes:
            node.check_log(list(USERS.values()))


class Uploader:
    """Sends each request of an upload to the node that the test names."""

    def __init__(self, name: str) -> None:
        self.location = f"/v2/{name}/blobs/uploads/"

    def send(
        self, node: RegistryDaemon, method: str, body: bytes = b"", query: str = "", **fields: str
    ) -> BufferedResponse:
        """Send a request to the current location, and follow its Location if it has succeeded."""
        target = self.location + (f"{'&' if '?' in self.location else '?'}{query}" if query else "")
        headers = {**ALICE, **{name.replace("_", "-"): value for name, value in fields.items()}}
        connection = DirectConnection("127.0.0.1", ("127.0.0.1", node.http_port), None)
        try:
            connection.request(method, target, body or None, headers)
            response = http_client.read_response(connection.getresponse())
        finally:
            connection.close()
        if response.status in (202, 204) and "location" in response.headers:
            parts = urlsplit(response.headers["location"])
            self.location = parts.path + (f"?{parts.query}" if parts.query else "")
        return response


def get(node: RegistryDaemon, path: str, method: str = "GET") -> BufferedResponse:
    return request_directly(method, f"http://{node.http_address}/v2/{path}", headers=ALICE)


def test_each_request_of_an_upload_goes_to_another_node(fleet: BucketFleet) -> None:
    first, second, third = fleet.nodes
    data = images.random_bytes(3 * MIB, "three nodes")
    digest = images.sha256_digest(data)
    upload = Uploader("chunks/app")
    assert upload.send(first, "POST").status == 202
    assert "node=" not in upload.location, "any node may take the first byte"
    chunks = [data[start : start + MIB] for start in range(0, len(data), MIB)]
    assert upload.send(second, "PATCH", chunks[0], Content_Range=f"0-{MIB - 1}").status == 202
    assert upload.location.endswith(f"?node={second.name}")
    for node in (first, third, second):
        assert upload.send(node, "GET").headers["range"] == f"0-{MIB - 1}"
    wrong = upload.send(third, "PATCH", chunks[2], Content_Range=f"{2 * MIB}-{3 * MIB - 1}")
    assert (wrong.status, wrong.headers["range"]) == (416, f"0-{MIB - 1}")
    assert upload.send(third, "PATCH", chunks[1], Content_Range=f"{MIB}-{2 * MIB - 1}").status == 202
    assert upload.send(first, "PATCH", chunks[2]).status == 202
    finished = upload.send(third, "PUT", query=f"digest={digest}")
    assert (finished.status, finished.headers["docker-content-digest"]) == (201, digest)
    for node in fleet.nodes:
        blob = get(node, f"chunks/app/blobs/{digest}")
        assert (blob.status, blob.body) == (200, data)
    assert upload.send(first, "GET").status == 404, "the session has ended"
    files = [path for node in fleet.nodes for path in (node.state_folder / "registry/uploads").glob("*")]
    assert files == []


def test_an_upload_is_cancelled_at_another_node(fleet: BucketFleet) -> None:
    first, second, _ = fleet.nodes
    upload = Uploader("cancel/app")
    upload.send(first, "POST")
    upload.send(first, "PATCH", b"data")
    assert upload.send(second, "DELETE").status == 204
    assert upload.send(first, "GET").status == 404


def test_a_wrong_digest_and_a_body_in_the_put(fleet: BucketFleet) -> None:
    first, second, third = fleet.nodes
    upload = Uploader("wrong/app")
    upload.send(first, "POST")
    upload.send(first, "PATCH", b"some ")
    digest = images.sha256_digest(b"some data")
    assert upload.send(second, "PUT", b"data", query=f"digest={digest}").status == 201
    upload = Uploader("wrong/app")
    upload.send(first, "POST")
    upload.send(first, "PATCH", b"some ")
    refused = upload.send(third, "PUT", b"other", query=f"digest={digest}")
    assert (refused.status, refused.error_code) == (400, "DIGEST_INVALID")


def test_a_login_is_needed_at_the_second_node_too(fleet: BucketFleet) -> None:
    """To know a session is not enough to write to it, at the node itself or through another one."""
    first, second, _ = fleet.nodes
    upload = Uploader("login/app")
    upload.send(first, "POST")
    upload.send(first, "PATCH", b"data")
    for node in (first, second):
        for fields in ({"Authorization": ""}, {"Authorization": basic_authorization("alice", "wrong")}):
            assert upload.send(node, "PATCH", b"more", **fields).status == 401
    assert upload.send(second, "GET").headers["range"] == "0-3"
    context = ssl.create_default_context(cafile=str(first.ca_file))
    client = http_client.ProxyClient(first.port, context)
    for path, status in ((upload.location, 401), ("/v2/_catalog", 404), ("/metrics", 404), ("/", 404)):
        assert client.request("GET", f"https://{UPLOADS_HOST}{path}").status == status
    assert client.request("GET", f"https://{UPLOADS_HOST}{upload.location}", ALICE).status == 204
    page = {**ALICE, "Origin": "https://evil.example"}
    assert client.request("PATCH", f"https://{UPLOADS_HOST}{upload.location}", page, b"x").status == 403


def test_no_address_but_that_of_a_member_is_asked(fleet: BucketFleet) -> None:
    first = fleet.nodes[0]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        upload = Uploader("ssrf/app")
        upload.send(first, "POST")
        upload.send(first, "PATCH", b"data")
        session = upload.location.partition("?")[0]
        for node in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            f"x@127.0.0.1:{port}",
            f"{fleet.nodes[1].name}@127.0.0.1:{port}",
        ):
            upload.location = f"{session}?node={quote(node)}"
            response = upload.send(first, "PATCH", b"more")
            assert (response.status, response.error_code) == (404, "BLOB_UPLOAD_UNKNOWN")
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_node_that_is_gone_and_one_that_hangs(fleet: BucketFleet) -> None:
    first, second, third = fleet.nodes
    uploads = []
    for node in (second, third):
        uploads.append(Uploader("gone/app"))
        uploads[-1].send(first, "POST")
        uploads[-1].send(node, "PATCH", b"data")
    second.kill()
    third.send_signal(signal.SIGSTOP)
    try:
        for upload, node in zip(uploads, (second, third), strict=True):
            response = upload.send(first, "PUT", query=f"digest={images.sha256_digest(b'data')}")
            assert (response.status, response.error_code) == (404, "BLOB_UPLOAD_UNKNOWN")
            assert node.name in response.error_message and "begin the upload again" in response.error_message
    finally:
        third.send_signal(signal.SIGCONT)
        second.start()
    # A node that was killed has its sessions again.
    assert uploads[0].send(first, "GET").headers["range"] == "0-3"
    assert uploads[0].send(third, "PUT", query=f"digest={images.sha256_digest(b'data')}").status == 201


def test_without_a_fleet_the_error_says_what_is_missing(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    settings = seaweedfs.settings(seaweedfs.make_bucket("no-fleet"))
    nodes = [RegistryDaemon(tmp_path / name, settings) for name in ("one", "two")]
    with nodes[0].run_and_check_log(lambda: [SECRET_KEY]), nodes[1].run_and_check_log(lambda: [SECRET_KEY]):
        upload = Uploader("app")
        upload.send(nodes[0], "POST")
        upload.send(nodes[0], "PATCH", b"data")
        assert "node=" not in upload.location
        response = upload.send(nodes[1], "PUT", query=f"digest={images.sha256_digest(b'data')}")
        assert response.status == 404 and "set FLEET" in response.error_message
        assert upload.send(nodes[0], "PUT", query=f"digest={images.sha256_digest(b'data')}").status == 201


def check_pull(node: BucketNode, name: str, tag: str, image: SampleImage | None = None) -> None:
    """Check that `node` serves an image whole; that it is `image`, if that is given."""

    def fetch(path: str) -> bytes:
        fields = {"Accept": ACCEPT_MANIFESTS, **ALICE}
        response = request_directly("GET", f"http://{node.http_address}/v2/{name}/{path}", headers=fields)
        assert response.status == 200, (path, response.body)
        digest = response.headers["docker-content-digest"]
        assert images.sha256_digest(response.body) == digest
        return response.body

    manifest = json.loads(content := fetch(f"manifests/{tag}"))
    assert image is None or content == image.manifest.data
    for descriptor in (manifest["config"], *manifest["layers"]):
        assert len(fetch(f"blobs/{descriptor['digest']}")) == descriptor["size"]


def test_any_client_pushes_through_the_balancer(fleet: BucketFleet, clients: ClientFactory, tmp_path: Path) -> None:
    require_programs("skopeo", "podman", "dockerd", root=True)
    address = fleet.balancer.address
    image = images.build_small_image("balanced", size=20 * MIB)
    folder = write_image_folder(image, tmp_path / "image")
    skopeo = clients.skopeo(fleet.nodes[0])
    login = f"alice:{USERS['alice']}"
    check_output(
        skopeo.run(
            "copy",
            "--dest-tls-verify=false",
            f"--dest-creds={login}",
            f"dir:{folder}",
            f"docker://{address}/by/skopeo:1",
        )
    )
    podman = clients.podman(fleet.nodes[0])
    image_id = check_output(podman.run("pull", f"dir:{folder}")).strip()
    check_output(
        podman.run("push", "--tls-verify=false", f"--creds={login}", image_id, f"docker://{address}/by/podman:1")
    )
    docker = clients.docker_with({})
    docker.write_login(address, "alice", USERS["alice"])
    tar = tmp_path / "layer.tar"
    (tmp_path / "file").write_bytes(images.random_bytes(8 * MIB, "docker, balanced"))
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", str(tar), "file"], check=True)
    docker.run_checked("import", str(tar), f"{address}/by/docker:1")
    docker.run_checked("push", f"{address}/by/docker:1")
    for node in fleet.nodes:
        check_pull(node, "by/skopeo", "1", image)
        check_pull(node, "by/podman", "1")
        check_pull(node, "by/docker", "1")
