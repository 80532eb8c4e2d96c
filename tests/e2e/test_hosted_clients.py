"""Pushes to the hosted registry and pulls from it with more clients: podman, containerd, oras, dxf and curl."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Skopeo, check_output, clean_environment, run
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.registry_daemon import (
    HOSTED_REGISTRY_HOST,
    USERS,
    RegistryDaemon,
    write_htpasswd,
    write_image_folder,
)
from tests.e2e.harness.upstreams import Upstreams

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    registry_daemon = RegistryDaemon(tmp_path_factory.mktemp("hosting"), upstreams.settings)
    with registry_daemon.run_and_check_log(lambda: upstreams.secrets):
        yield registry_daemon


@pytest.fixture(scope="module")
def private_daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    """Return a daemon with ANONYMOUS_PULL: everybody may pull, and users may push."""
    folder = tmp_path_factory.mktemp("private")
    settings = {**upstreams.settings, "HTPASSWD_FILE": str(write_htpasswd(folder)), "ANONYMOUS_PULL": "true"}
    registry_daemon = RegistryDaemon(folder, settings)
    with registry_daemon.run_and_check_log(lambda: [*upstreams.secrets, *USERS.values()]):
        yield registry_daemon


def run_python(
    daemon: TwistdDaemon, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of the tests, and with the daemon as its proxy."""
    ca_variables = {"REQUESTS_CA_BUNDLE": str(daemon.ca_file), "HOME": str(folder), **variables}
    environment = clean_environment(daemon.client_environment | ca_variables)
    return run([sys.executable, *arguments], environment)


def test_podman_with_zstd(daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path) -> None:
    image = images.build_small_image("podman-zstd", size=100_000)
    push_client, pull_client = clients.podman(daemon), clients.podman(daemon)
    image_id = check_output(push_client.run("pull", f"dir:{write_image_folder(image, tmp_path / 'image')}")).strip()
    for name in (f"{HOSTED_REGISTRY_HOST}/podman/zstd:1", f"{daemon.https_address}/podman/direct:1"):
        check_output(push_client.run("push", "--format=oci", "--compression-format=zstd", image_id, f"docker://{name}"))
        assert check_output(pull_client.run("pull", name)).strip() == image_id
    manifest = daemon.client.get(
        f"https://{HOSTED_REGISTRY_HOST}/v2/podman/zstd/manifests/1", Accept=ACCEPT_MANIFESTS
    ).json
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar+zstd"}


def test_podman_with_a_login(private_daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path) -> None:
    image = images.build_small_image("podman-login", oci=False)
    podman = clients.podman(private_daemon)
    image_id = check_output(podman.run("pull", f"dir:{write_image_folder(image, tmp_path / 'image')}")).strip()
    target = f"docker://{HOSTED_REGISTRY_HOST}/podman/private:1"
    assert podman.run("push", image_id, target).returncode != 0
    assert podman.run("push", "--creds=alice:wrong", image_id, target).returncode != 0
    for user, password in USERS.items():
        check_output(podman.run("push", f"--creds={user}:{password}", image_id, target))
    check_output(podman.run("rmi", "--all", "--force"))
    check_output(podman.run("pull", f"{HOSTED_REGISTRY_HOST}/podman/private:1"))


@pytest.mark.parametrize("endpoint", ["proxy", "https", "http"])
def test_containerd(daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path, endpoint: str) -> None:
    image = images.build_index(
        {name: images.build_small_image(f"ctr-{endpoint}-{name}") for name in ("amd64", "arm64")}
    )
    host = {"proxy": HOSTED_REGISTRY_HOST, "https": daemon.https_address, "http": daemon.http_address}[endpoint]
    options = ["--plain-http"] if endpoint == "http" else []
    push_with_skopeo(daemon, image, f"ctr-{endpoint}/source", tmp_path)
    containerd = clients.containerd(daemon)
    if endpoint == "https":
        containerd.configure_ca(host, daemon.ca_file)  # containerd assumes plain HTTP for loopback addresses otherwise
    source = f"{host}/ctr-{endpoint}/source:1"
    containerd.pull(source, *options, "--all-platforms")
    check_output(containerd.try_push(f"{host}/ctr-{endpoint}/target:1", source, *options))
    response = daemon.client.get(
        f"https://{HOSTED_REGISTRY_HOST}/v2/ctr-{endpoint}/target/manifests/1", Accept=ACCEPT_MANIFESTS
    )
    assert response.body == image.manifest.data
    containerd.remove_all_images()
    containerd.pull(f"{host}/ctr-{endpoint}/target:1", *options)
    assert containerd.image_digest(f"{host}/ctr-{endpoint}/target:1") == image.digest


def test_containerd_with_a_login(private_daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path) -> None:
    image = images.build_small_image("ctr-login")
    login = ["--user", f"alice:{USERS['alice']}"]
    push_with_skopeo(private_daemon, image, "ctr/source", tmp_path, f"--dest-creds=alice:{USERS['alice']}")
    containerd = clients.containerd(private_daemon)
    containerd.pull(f"{HOSTED_REGISTRY_HOST}/ctr/source:1")
    names = f"{HOSTED_REGISTRY_HOST}/ctr/target:1", f"{HOSTED_REGISTRY_HOST}/ctr/source:1"
    assert containerd.try_push(*names).returncode != 0
    check_output(containerd.try_push(*names, *login))
    containerd.remove_all_images()
    containerd.pull(f"{HOSTED_REGISTRY_HOST}/ctr/target:1")
    assert containerd.image_digest(f"{HOSTED_REGISTRY_HOST}/ctr/target:1") == image.digest


def push_with_skopeo(daemon: RegistryDaemon, image: images.SampleImage, name: str, folder: Path, *options: str) -> None:
    skopeo = Skopeo(folder / "skopeo", daemon.client_environment)
    source = f"dir:{write_image_folder(image, folder / 'pushed')}"
    check_output(
        skopeo.run("copy", "--all", "--preserve-digests", *options, source, f"docker://{HOSTED_REGISTRY_HOST}/{name}:1")
    )


def test_docker_with_a_login_over_tls(
    upstreams: Upstreams, private_daemon: RegistryDaemon, clients: ClientFactory
) -> None:
    upstreams.push_to_hub("library/private", "1", images.build_small_image("docker-private", oci=False))
    docker = clients.docker(private_daemon)
    name = f"{private_daemon.https_address}/docker/private:1"
    docker.run_checked("pull", "private:1")
    docker.run_checked("tag", "private:1", name)
    assert docker.run("push", name).returncode != 0
    docker.run_checked("login", "-u", "bob", "-p", USERS["bob"], private_daemon.https_address)
    push_output = docker.run_checked("push", name)
    docker.run_checked("logout", private_daemon.https_address)
    docker.remove_all_images()
    docker.run_checked("pull", name)
    assert docker.image_digest(name) in push_output


_ORAS = """
import sys
from oras.client import OrasClient
from oras.oci import Subject

name, secret = sys.argv[1:]
client = OrasClient()
if secret:
    client.login(hostname=name.partition("/")[0], username="alice", password=secret)
pushed = client.push(
    target=f"{name}:1",
    files=["chart.tgz:application/vnd.cncf.helm.chart.content.v1.tar+gzip"],
    manifest_config="config.json:application/vnd.cncf.helm.config.v1+json",
)
digest, size = pushed.headers["Docker-Content-Digest"], len(pushed.request.body)
subject = Subject("application/vnd.oci.image.manifest.v1+json", digest, size)
attached = client.push(
    target=f"{name}:signature",
    files=["signature.txt:text/plain"],
    subject=subject,
    manifest_annotations={"signed": "yes"},
    do_chunked=True,
    chunk_size=1000,
)
assert attached.headers["OCI-Subject"] == digest
host, _, repository = name.partition("/")
referrers = client.do_request(f"https://{host}/v2/{repository}/referrers/{digest}", "GET")
assert referrers.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
assert [referrer["annotations"] for referrer in referrers.json()["manifests"]] == [{"signed": "yes"}]
pulled = client.pull(target=f"{name}:1", outdir="pulled")
assert open(pulled[0], "rb").read() == open("chart.tgz", "rb").read()
assert client.get_tags(f"{name}:1") == ["1", "signature"]
assert client.delete_tag(f"{name}:1", "signature")
assert client.get_tags(f"{name}:1") == ["1"]
"""


@pytest.mark.parametrize("login", [False, True], ids=["open", "login"])
def test_oras_with_a_chart_and_its_signature(
    daemon: RegistryDaemon, private_daemon: RegistryDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: bool
) -> None:
    pytest.importorskip("oras", reason="oras is not installed (PyPI)")
    target_daemon, access = (private_daemon, "login") if login else (daemon, "open")
    (tmp_path / "chart.tgz").write_bytes(images.random_bytes(200_000, "chart"))
    (tmp_path / "signature.txt").write_bytes(images.random_bytes(5000, "signature"))
    (tmp_path / "config.json").write_text('{"name": "chart", "version": "1.0.0"}')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(_ORAS)
    name = f"{HOSTED_REGISTRY_HOST}/oras/{access}"
    check_output(run_python(target_daemon, tmp_path, "script.py", name, USERS["alice"] if login else ""))


@pytest.mark.parametrize("login", [False, True], ids=["open", "login"])
def test_dxf(daemon: RegistryDaemon, private_daemon: RegistryDaemon, tmp_path: Path, login: bool) -> None:
    pytest.importorskip("dxf", reason="python-dxf is not installed (PyPI)")
    target_daemon = private_daemon if login else daemon
    data = images.random_bytes(300_000, "dxf")
    (tmp_path / "data").write_bytes(data)

    def run_dxf(*arguments: str, password: str = USERS["bob"]) -> subprocess.CompletedProcess[str]:
        credentials = {"DXF_USERNAME": "bob", "DXF_PASSWORD": password} if login else {}
        return run_python(
            target_daemon,
            tmp_path,
            "-m",
            "dxf",
            *arguments,
            DXF_HOST=HOSTED_REGISTRY_HOST,
            DXF_PROGRESS="0",
            **credentials,
        )

    if login:
        assert run_dxf("push-blob", "dxf/here", str(tmp_path / "data"), password="wrong").returncode != 0
    digest = check_output(run_dxf("push-blob", "dxf/here", str(tmp_path / "data"), "@first")).strip()
    assert digest == images.sha256_digest(data)
    assert check_output(run_dxf("blob-size", "dxf/here", digest)).strip() == str(len(data))
    assert check_output(run_dxf("get-alias", "dxf/here", "first")).strip() == digest
    check_output(run_dxf("set-alias", "dxf/here", "second", digest))
    assert check_output(run_dxf("mount-blob", "dxf/there", "dxf/here", digest, "@mounted")).strip() == digest
    assert sorted(check_output(run_dxf("list-aliases", "dxf/here")).split()) == ["first", "second"]
    assert {"dxf/here", "dxf/there"} <= set(check_output(run_dxf("list-repos")).split())
    check_output(run_dxf("del-alias", "dxf/here", "first"))
    check_output(run_dxf("del-blob", "dxf/here", digest))
    assert run_dxf("pull-blob", "dxf/here", digest).returncode != 0
    assert target_daemon.client.get(f"https://{HOSTED_REGISTRY_HOST}/v2/dxf/there/blobs/{digest}").body == data


def test_skopeo_lists_and_syncs(daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path) -> None:
    push_with_skopeo(daemon, images.build_small_image("sync"), "sync/source", tmp_path)
    skopeo = clients.skopeo(daemon)
    check_output(
        skopeo.run(
            "copy", f"docker://{HOSTED_REGISTRY_HOST}/sync/source:1", f"docker://{HOSTED_REGISTRY_HOST}/sync/source:2"
        )
    )
    assert json.loads(check_output(skopeo.run("list-tags", f"docker://{HOSTED_REGISTRY_HOST}/sync/source")))[
        "Tags"
    ] == ["1", "2"]
    check_output(
        skopeo.run(
            "sync",
            "--src=docker",
            "--dest=docker",
            f"{HOSTED_REGISTRY_HOST}/sync/source",
            f"{HOSTED_REGISTRY_HOST}/sync/copy",
        )
    )
    tags = daemon.client.get(f"https://{HOSTED_REGISTRY_HOST}/v2/sync/copy/source/tags/list").json["tags"]
    assert tags == ["1", "2"]


def test_memory_stays_flat_while_curl_pushes_a_gigabyte(daemon: RegistryDaemon, tmp_path: Path) -> None:
    require_programs("curl")
    size = 1 << 30
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(size)
    hasher = hashlib.sha256()
    for _ in range(size // MIB):
        hasher.update(bytes(MIB))
    upload_response = daemon.client.request("POST", f"https://{HOSTED_REGISTRY_HOST}/v2/curl/blob/blobs/uploads/")
    url = f"https://{daemon.https_address}{upload_response.headers['location']}?digest=sha256:{hasher.hexdigest()}"
    memory_before, peak = daemon.resident_bytes, 0
    output_options = ["--silent", "--show-error", "--output", "/dev/null", "--write-out", "%{http_code}"]
    command = ["curl", "--cacert", str(daemon.ca_file), *output_options, "--upload-file", str(tmp_path / "zeros"), url]
    with subprocess.Popen(command, env=clean_environment({}), stdout=subprocess.PIPE) as curl:
        while curl.poll() is None:
            peak = max(peak, daemon.resident_bytes)
            try:
                curl.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert curl.stdout is not None
        assert curl.stdout.read() == b"201"
    assert peak - memory_before < 64 * MIB  # measured: 3 MB; the blob is a GiB
    response = http_client.request_directly(
        "HEAD", f"http://{daemon.http_address}/v2/curl/blob/blobs/sha256:{hasher.hexdigest()}"
    )
    assert response.headers["content-length"] == str(size)
