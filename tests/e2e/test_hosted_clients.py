"""Pushing to the hosted registry, and pulling from it, with the clients that `test_hosted.py` does not have."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import images, wire
from tests.e2e.house.clients import Skopeo, check, clean_environment, run
from tests.e2e.house.daemon import Proxy
from tests.e2e.house.hosting import OWN, USERS, Hosting, folder_of, users_file
from tests.e2e.house.images import EVERY_MANIFEST
from tests.e2e.house.machines import Machines
from tests.e2e.house.process import need
from tests.e2e.house.upstreams import Upstreams

MIB = 1 << 20


@pytest.fixture(scope="module")
def hosting(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosting]:
    proxy = Hosting(tmp_path_factory.mktemp("hosting"), upstreams.settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


@pytest.fixture(scope="module")
def private(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosting]:
    """A daemon that all may pull from, and users push to."""
    folder = tmp_path_factory.mktemp("private")
    settings = {**upstreams.settings, "HTPASSWD_FILE": str(users_file(folder)), "ANONYMOUS_PULL": "true"}
    proxy = Hosting(folder, settings)
    with proxy.running_for(lambda: [*upstreams.secrets, *USERS.values()]):
        yield proxy


def python(proxy: Proxy, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages that the tests have; it reaches the registry through the proxy port."""
    variables = {"REQUESTS_CA_BUNDLE": str(proxy.ca_file), "HOME": str(folder), **more}
    environment = clean_environment(proxy.client_environment | variables)
    return run([sys.executable, *arguments], environment)


def test_podman_with_zstd(hosting: Hosting, machines: Machines, tmp_path: Path) -> None:
    image = images.small("podman-zstd", size=100_000)
    writer, reader = machines.podman(hosting), machines.podman(hosting)
    local = check(writer.run("pull", f"dir:{folder_of(image, tmp_path / 'image')}")).strip()
    for name in (f"{OWN}/podman/zstd:1", f"{hosting.straight}/podman/straight:1"):
        check(writer.run("push", "--format=oci", "--compression-format=zstd", local, f"docker://{name}"))
        assert check(reader.run("pull", name)).strip() == local
    manifest = hosting.client.get(f"https://{OWN}/v2/podman/zstd/manifests/1", Accept=EVERY_MANIFEST).json
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar+zstd"}


def test_podman_with_a_login(private: Hosting, machines: Machines, tmp_path: Path) -> None:
    image = images.small("podman-login", oci=False)
    podman = machines.podman(private)
    local = check(podman.run("pull", f"dir:{folder_of(image, tmp_path / 'image')}")).strip()
    target = f"docker://{OWN}/podman/private:1"
    assert podman.run("push", local, target).returncode != 0
    assert podman.run("push", "--creds=alice:wrong", local, target).returncode != 0
    for user, password in USERS.items():
        check(podman.run("push", f"--creds={user}:{password}", local, target))
    check(podman.run("rmi", "--all", "--force"))
    check(podman.run("pull", f"{OWN}/podman/private:1"))


@pytest.mark.parametrize("door", ["proxy", "straight", "plain"])
def test_containerd(hosting: Hosting, machines: Machines, tmp_path: Path, door: str) -> None:
    multi = images.index({name: images.small(f"ctr-{door}-{name}") for name in ("amd64", "arm64")})
    host = {"proxy": OWN, "straight": hosting.straight, "plain": hosting.plain}[door]
    options = ["--plain-http"] if door == "plain" else []
    push_all(hosting, multi, f"ctr-{door}/source", tmp_path)
    containerd = machines.containerd(hosting)
    if door == "straight":
        containerd.trust(host, hosting.ca_file)  # without that it takes a loopback address for one without TLS
    source = f"{host}/ctr-{door}/source:1"
    containerd.pull(source, *options, "--all-platforms")
    check(containerd.try_push(f"{host}/ctr-{door}/target:1", source, *options))
    got = hosting.client.get(f"https://{OWN}/v2/ctr-{door}/target/manifests/1", Accept=EVERY_MANIFEST)
    assert got.body == multi.manifest.data
    containerd.forget_images()
    containerd.pull(f"{host}/ctr-{door}/target:1", *options)
    assert containerd.digest_of(f"{host}/ctr-{door}/target:1") == multi.digest


def test_containerd_with_a_login(private: Hosting, machines: Machines, tmp_path: Path) -> None:
    image = images.small("ctr-login")
    login = ["--user", f"alice:{USERS['alice']}"]
    push_all(private, image, "ctr/source", tmp_path, f"--dest-creds=alice:{USERS['alice']}")
    containerd = machines.containerd(private)
    containerd.pull(f"{OWN}/ctr/source:1")
    names = f"{OWN}/ctr/target:1", f"{OWN}/ctr/source:1"
    assert containerd.try_push(*names).returncode != 0
    check(containerd.try_push(*names, *login))
    containerd.forget_images()
    containerd.pull(f"{OWN}/ctr/target:1")
    assert containerd.digest_of(f"{OWN}/ctr/target:1") == image.digest


def push_all(proxy: Hosting, image: images.Image, name: str, folder: Path, *options: str) -> None:
    skopeo = Skopeo(folder / "skopeo", proxy.client_environment)
    source = f"dir:{folder_of(image, folder / 'pushed')}"
    check(skopeo.run("copy", "--all", "--preserve-digests", *options, source, f"docker://{OWN}/{name}:1"))


def test_docker_with_a_login_straight_over_tls(upstreams: Upstreams, private: Hosting, machines: Machines) -> None:
    upstreams.on_hub("library/private", "1", images.small("docker-private", oci=False))
    docker = machines.docker(private)
    name = f"{private.straight}/docker/private:1"
    docker.do("pull", "private:1")
    docker.do("tag", "private:1", name)
    assert docker.run("push", name).returncode != 0
    docker.do("login", "-u", "bob", "-p", USERS["bob"], private.straight)
    pushed = docker.do("push", name)
    docker.do("logout", private.straight)
    docker.forget_images()
    docker.do("pull", name)
    assert docker.digest_of(name) in pushed


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
    hosting: Hosting, private: Hosting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: bool
) -> None:
    pytest.importorskip("oras")
    proxy, kind = (private, "login") if login else (hosting, "open")
    (tmp_path / "chart.tgz").write_bytes(images.noise(200_000, "chart"))
    (tmp_path / "signature.txt").write_bytes(images.noise(5000, "signature"))
    (tmp_path / "config.json").write_text('{"name": "chart", "version": "1.0.0"}')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(_ORAS)
    name = f"{OWN}/oras/{kind}"
    check(python(proxy, tmp_path, "script.py", name, USERS["alice"] if login else ""))


@pytest.mark.parametrize("login", [False, True], ids=["open", "login"])
def test_dxf(hosting: Hosting, private: Hosting, tmp_path: Path, login: bool) -> None:
    pytest.importorskip("dxf")
    proxy = private if login else hosting
    data = images.noise(300_000, "dxf")
    (tmp_path / "data").write_bytes(data)

    def dxf(*arguments: str, password: str = USERS["bob"]) -> subprocess.CompletedProcess[str]:
        name = {"DXF_USERNAME": "bob", "DXF_PASSWORD": password} if login else {}
        return python(proxy, tmp_path, "-m", "dxf", *arguments, DXF_HOST=OWN, DXF_PROGRESS="0", **name)

    if login:
        assert dxf("push-blob", "dxf/here", str(tmp_path / "data"), password="wrong").returncode != 0
    digest = check(dxf("push-blob", "dxf/here", str(tmp_path / "data"), "@first")).strip()
    assert digest == images.sha256(data)
    assert check(dxf("blob-size", "dxf/here", digest)).strip() == str(len(data))
    assert check(dxf("get-alias", "dxf/here", "first")).strip() == digest
    check(dxf("set-alias", "dxf/here", "second", digest))
    assert check(dxf("mount-blob", "dxf/there", "dxf/here", digest, "@mounted")).strip() == digest
    assert sorted(check(dxf("list-aliases", "dxf/here")).split()) == ["first", "second"]
    assert {"dxf/here", "dxf/there"} <= set(check(dxf("list-repos")).split())
    check(dxf("del-alias", "dxf/here", "first"))
    check(dxf("del-blob", "dxf/here", digest))
    assert dxf("pull-blob", "dxf/here", digest).returncode != 0
    assert proxy.client.get(f"https://{OWN}/v2/dxf/there/blobs/{digest}").body == data


def test_skopeo_lists_and_syncs(hosting: Hosting, machines: Machines, tmp_path: Path) -> None:
    push_all(hosting, images.small("sync"), "sync/source", tmp_path)
    skopeo = machines.skopeo(hosting)
    check(skopeo.run("copy", f"docker://{OWN}/sync/source:1", f"docker://{OWN}/sync/source:2"))
    assert json.loads(check(skopeo.run("list-tags", f"docker://{OWN}/sync/source")))["Tags"] == ["1", "2"]
    check(skopeo.run("sync", "--src=docker", "--dest=docker", f"{OWN}/sync/source", f"{OWN}/sync/copy"))
    tags = hosting.client.get(f"https://{OWN}/v2/sync/copy/source/tags/list").json["tags"]
    assert tags == ["1", "2"]


def test_curl_pushes_a_gigabyte_and_memory_stays_flat(hosting: Hosting, tmp_path: Path) -> None:
    need("curl")
    size = 1 << 30
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(size)
    hasher = hashlib.sha256()
    for _ in range(size // MIB):
        hasher.update(bytes(MIB))
    begun = hosting.client.ask("POST", f"https://{OWN}/v2/curl/blob/blobs/uploads/")
    url = f"https://{hosting.straight}{begun.headers['location']}?digest=sha256:{hasher.hexdigest()}"
    before, highest = hosting.memory, 0
    answered = ["--silent", "--show-error", "--output", "/dev/null", "--write-out", "%{http_code}"]
    command = ["curl", "--cacert", str(hosting.ca_file), *answered, "--upload-file", str(tmp_path / "zeros"), url]
    with subprocess.Popen(command, env=clean_environment({}), stdout=subprocess.PIPE) as curl:
        while curl.poll() is None:
            highest = max(highest, hosting.memory)
            try:
                curl.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert curl.stdout is not None
        assert curl.stdout.read() == b"201"
    assert highest - before < 24 * MIB
    found = wire.request("HEAD", f"http://{hosting.plain}/v2/curl/blob/blobs/sha256:{hasher.hexdigest()}")
    assert found.headers["content-length"] == str(size)
