"""The hosted registry in a bucket: two daemons, the store's bad days, and docker-registry's own driver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import check_output
from tests.e2e.harness.docker_registry import DockerRegistry, push_image
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_image_folder
from tests.e2e.harness.seaweedfs import SeaweedFS, SeaweedGateway

MIB = 1 << 20


@pytest.fixture
def bucket(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    name = request.node.name.removeprefix("test_").replace("_", "-").split("[")[0][:50]
    return store.make_bucket(name)


@pytest.fixture
def nodes(store: ObjectStore, bucket: str, tmp_path: Path) -> Iterator[tuple[RegistryDaemon, RegistryDaemon]]:
    """Return two daemons on one bucket, each with a disk of its own."""
    first, second = (RegistryDaemon(tmp_path / name, store.settings(bucket)) for name in ("first", "second"))
    with first.run_and_check_log(lambda: [SECRET_KEY]), second.run_and_check_log(lambda: [SECRET_KEY]):
        yield first, second


def push(daemon: RegistryDaemon, name: str, tag: str, image: SampleImage) -> SampleImage:
    address: Any = SimpleNamespace(host="127.0.0.1", port=daemon.http_port, uses_tls=False)
    return push_image(address, name, tag, image)


def get(daemon: RegistryDaemon, path: str, method: str = "GET", **fields: str) -> BufferedResponse:
    return request_directly(method, f"http://{daemon.http_address}/v2/{path}", headers=fields or None)


def check_pull(port: int, name: str, tag: str, image: SampleImage) -> None:
    """Check that a registry serves `image`, whole."""

    def fetch(path: str) -> BufferedResponse:
        return request_directly(
            "GET", f"http://127.0.0.1:{port}/v2/{name}/{path}", headers={"Accept": ACCEPT_MANIFESTS}
        )

    for child in image.children_first():
        response = fetch(f"manifests/{tag if child is image else child.digest}")
        assert (response.status, response.body) == (200, child.manifest.data)
        for blob in child.blobs:
            response = fetch(f"blobs/{blob.digest}")
            assert (response.status, response.body) == (200, blob.data)


def test_any_node_answers_any_request(nodes: tuple[RegistryDaemon, RegistryDaemon]) -> None:
    first, second = nodes
    image = push(first, "acme/app", "v1", images.build_small_image("any-node"))
    index = images.build_index({"amd64": image, "arm64": images.build_small_image("other")})
    push(second, "acme/app", "both", index)
    for node in nodes:
        check_pull(node.http_port, "acme/app", "v1", image)
        check_pull(node.http_port, "acme/app", "both", index)
        assert get(node, "acme/app/tags/list").json["tags"] == ["both", "v1"]
        assert get(node, "_catalog").json["repositories"] == ["acme/app"]
    needed = get(second, f"acme/app/manifests/{image.digest}", "DELETE")
    assert (needed.status, "acme/app:both needs" in needed.error_message) == (409, True)
    assert get(second, "acme/app/manifests/both", "DELETE").status == 202
    assert get(second, f"acme/app/manifests/{index.digest}", "DELETE").status == 202
    assert get(second, f"acme/app/manifests/{image.digest}", "DELETE").status == 202
    for node in nodes:
        assert get(node, "acme/app/manifests/v1").status == 404
        assert get(node, f"acme/app/manifests/{image.digest}").status == 404


def test_readyz_status_and_doctor_know_the_bucket(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    with SeaweedGateway(seaweedfs, tmp_path / "store").run() as store:
        daemon = RegistryDaemon(tmp_path / "node", store.settings(store.make_bucket("known")))
        with daemon.run_and_check_log(lambda: [SECRET_KEY]):

            def ready() -> tuple[int, str]:
                response = request_directly("GET", f"http://{daemon.http_address}/readyz")
                return response.status, response.body.decode()

            def run(*arguments: str) -> dict[str, Any]:
                ended = run_command(daemon, *arguments, "--json")
                assert ended.returncode in (0, 1), ended.stdout + ended.stderr
                return json.loads(ended.stdout)

            def finding(level: str) -> bool:
                findings = run("doctor")["findings"]
                return any((entry["subject"], entry["level"]) == ("REGISTRY_STORE", level) for entry in findings)

            assert ready() == (200, "ready\n")
            hosted = run("status")["shelves"]["hosted"]
            assert "known" in hosted["directory"] and "error" not in hosted
            assert finding("ok")
            assert "REGISTRY_STORE keeps to If-None-Match" in {entry["sentence"] for entry in run("doctor")["findings"]}
            store.stop()
            wait_until(lambda: "REGISTRY_STORE" in ready()[1], "the daemon noticed", timeout=60)
            status, text = ready()
            assert (status, text.splitlines()[0]) == (200, "ready"), "pulls get what the cache has"
            assert "REGISTRY_STORE" in run("status")["shelves"]["hosted"]["error"]
            assert finding("bad")


def command_line(daemon: RegistryDaemon, *command: str) -> list[str]:
    socket = daemon.state_folder / "run/control.sock"
    return [sys.executable, "-m", "dockerproxy.cli", "--socket", str(socket), *command]


def run_command(daemon: RegistryDaemon, *command: str) -> subprocess.CompletedProcess[str]:
    argv = command_line(daemon, *command)
    return subprocess.run(argv, env=daemon.environment, capture_output=True, text=True, timeout=60, check=False)


def test_clients(nodes: tuple[RegistryDaemon, RegistryDaemon], clients: ClientFactory, tmp_path: Path) -> None:
    require_programs("skopeo")
    first, second = nodes
    image = images.build_small_image("skopeo-bucket", size=40 * MIB)  # sent in parts
    folder = write_image_folder(image, tmp_path / "image")
    skopeo = clients.skopeo(first)
    check_output(
        skopeo.run("copy", "--dest-tls-verify=false", f"dir:{folder}", f"docker://{first.http_address}/large:1")
    )
    pulled = clients.skopeo(second).pull(f"{second.http_address}/large:1", plain_http=True)
    assert (pulled / "manifest.json").read_bytes() == image.manifest.data
    check_pull(second.http_port, "large", "1", image)


def test_a_bucket_of_another_registry_and_back(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    require_programs("docker-registry")
    s3 = {
        "accesskey": ACCESS_KEY, "secretkey": SECRET_KEY, "region": "us-east-1", "bucket": bucket,
        "regionendpoint": f"http://127.0.0.1:{store.port}", "secure": False, "v4auth": True,
    }  # fmt: skip
    other = DockerRegistry(tmp_path / "other", "127.0.0.1", storage={"s3": s3})
    theirs, ours = images.build_small_image("theirs"), images.build_small_image("ours")
    try:
        other.start()
        push_image(other, "team/theirs", "v1", theirs)
        other.stop()
        daemon = RegistryDaemon(tmp_path / "daemon", store.settings(bucket))
        with daemon.run_and_check_log(lambda: [SECRET_KEY]):
            check_pull(daemon.http_port, "team/theirs", "v1", theirs)
            wait_until(
                lambda: get(daemon, "_catalog").json["repositories"] == ["team/theirs"], "the catalog is complete"
            )
            assert get(daemon, f"team/theirs/referrers/{theirs.digest}").json["manifests"] == []
            push(daemon, "team/ours", "v1", ours)
            push(daemon, "team/theirs", "v2", ours)
        other.start()
        for name, tag, image in (("theirs", "v1", theirs), ("theirs", "v2", ours), ("ours", "v1", ours)):
            check_pull(other.port, f"team/{name}", tag, image)
        listed = request_directly("GET", f"http://127.0.0.1:{other.port}/v2/_catalog").json["repositories"]
        assert listed == ["team/ours", "team/theirs"]
    finally:
        other.stop()


def test_a_node_is_killed_and_an_empty_one_serves(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    first = RegistryDaemon(tmp_path / "first", store.settings(bucket))
    pushed = []
    with first.run_and_check_log(lambda: [SECRET_KEY]):
        for number in range(5):
            pushed.append(push(first, "acme/app", f"v{number}", images.build_small_image(f"killed-{number}")))
        first.kill()
        second = RegistryDaemon(tmp_path / "second", store.settings(bucket))
        with second.run_and_check_log(lambda: [SECRET_KEY]):
            for number, image in enumerate(pushed):
                check_pull(second.http_port, "acme/app", f"v{number}", image)
        first.start()


@pytest.mark.slow
def test_a_store_that_is_down_and_comes_back(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    with SeaweedGateway(seaweedfs, tmp_path / "store").run() as store:
        daemon = RegistryDaemon(tmp_path / "daemon", store.settings(store.make_bucket("down")))
        with daemon.run_and_check_log(lambda: [SECRET_KEY]):
            image = push(daemon, "acme/app", "v1", images.build_small_image("down"))
            unread = push(daemon, "acme/app", "v2", images.build_small_image("unread"))
            check_pull(daemon.http_port, "acme/app", "v1", image)
            store.kill()
            check_pull(daemon.http_port, "acme/app", "v1", image)
            for path, method in (
                (f"acme/app/blobs/{unread.blobs[0].digest}", "GET"),
                (f"acme/app/blobs/uploads/?digest={images.sha256_digest(b'')}", "POST"),
                ("acme/app/tags/list", "GET"),
            ):
                response = get(daemon, path, method)
                assert response.status == 503, path
                assert int(response.headers["retry-after"]) > 0
                assert "the bucket down at http://127.0.0.1" in response.error_message
            assert daemon.output_text.count("until then, pushes fail") <= 4, "a line for each process, not each request"
            store.start()
            push(daemon, "acme/app", "v3", image)
            check_pull(daemon.http_port, "acme/app", "v2", unread)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIDother"}, "InvalidAccessKeyId"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "there are no credentials; set AWS_ACCESS_KEY_ID"),
        ({"REGISTRY_STORE": "missing"}, "NoSuchBucket"),
    ],
    ids=["key", "secret", "no key", "bucket"],
)
def test_a_bucket_that_cannot_be_used_stops_the_start(
    store: ObjectStore, tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    settings = {**store.settings("missing-bucket"), **{k: v for k, v in change.items() if k != "REGISTRY_STORE"}}
    settings["AWS_SHARED_CREDENTIALS_FILE"] = settings["AWS_CONFIG_FILE"] = str(tmp_path / "none")
    if "REGISTRY_STORE" not in change:
        store.send("usable", "PUT")
        settings["REGISTRY_STORE"] = store.url("usable")
    daemon = RegistryDaemon(tmp_path / "daemon", {name: value for name, value in settings.items() if value})
    ended = subprocess.run(
        daemon.argv, env=daemon.environment, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    output = ended.stdout + ended.stderr + (daemon.output_file.read_text() if daemon.output_file.exists() else "")
    assert ended.returncode == 78, output
    assert "docker-registry-proxy: REGISTRY_STORE: " in output
    assert reason in output
    assert settings["AWS_SECRET_ACCESS_KEY"] not in output or not settings["AWS_SECRET_ACCESS_KEY"]
