"""The hosted registry with real clients: by each of its doors, with users, and beside Debian's `docker-registry`."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import free_port
from tests.e2e.house import images, wire
from tests.e2e.house.clients import Skopeo, check
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.docker_registry import DockerRegistry
from tests.e2e.house.hosting import OWN, USERS, Hosting, folder_of, users_file
from tests.e2e.house.images import EVERY_MANIFEST, OCI_MANIFEST, Image
from tests.e2e.house.machines import Machines
from tests.e2e.house.process import eventually, need
from tests.e2e.house.upstreams import Upstreams


@pytest.fixture(scope="module")
def hosting(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosting]:
    proxy = Hosting(tmp_path_factory.mktemp("hosting"), upstreams.settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


def push(skopeo: Skopeo, image: Image, folder: Path, target: str, *options: str) -> None:
    check(skopeo.run("copy", "--all", "--preserve-digests", *options, f"dir:{folder}", f"docker://{target}"))


@pytest.mark.parametrize("oci", [True, False], ids=["oci", "schema2"])
def test_skopeo_by_the_proxy_and_straight_over_tls(
    hosting: Hosting, machines: Machines, tmp_path: Path, oci: bool
) -> None:
    kind = "oci" if oci else "schema2"
    multi = images.index(
        {"amd64": images.small(f"s-amd64-{kind}", oci=oci), "arm64": images.small(f"s-arm64-{kind}", oci=oci)}, oci=oci
    )
    folder = folder_of(multi, tmp_path / "image")
    by_proxy = machines.skopeo(hosting)
    push(by_proxy, multi, folder, f"{OWN}/skopeo/{kind}:1")
    assert by_proxy.inspect_raw(f"{OWN}/skopeo/{kind}:1") == multi.manifest.data
    straight = Skopeo(tmp_path / "straight", {"SSL_CERT_FILE": str(hosting.ca_file)})
    pulled = straight.pull(f"{hosting.straight}/skopeo/{kind}:1", "--all")
    assert (pulled / "manifest.json").read_bytes() == multi.manifest.data
    push(straight, multi, folder, f"{hosting.straight}/skopeo/{kind}:2")
    push(straight, multi, folder, f"{hosting.plain}/skopeo/{kind}-copy:1", "--dest-tls-verify=false")
    check(straight.run("delete", f"docker://{hosting.straight}/skopeo/{kind}:2"))
    assert straight.try_pull(f"{hosting.straight}/skopeo/{kind}:1").returncode != 0
    straight.pull(f"{hosting.plain}/skopeo/{kind}-copy:1", "--all", plain=True)


def test_docker_pushes_and_pulls_through_the_proxy(upstreams: Upstreams, hosting: Hosting, machines: Machines) -> None:
    """As seed.md has it: pull from Docker Hub, tag, push, and pull it on another machine."""
    upstreams.on_hub("library/hosted", "1", images.small("docker-hosted", oci=False))
    docker = machines.docker(hosting)
    docker.do("pull", "hosted:1")
    docker.do("tag", "hosted:1", f"{OWN}/foo/bar:v1.2.3.4")
    pushed = docker.do("push", f"{OWN}/foo/bar:v1.2.3.4")
    assert "digest: sha256:" in pushed
    again = docker.do("push", f"{OWN}/foo/bar:v1.2.3.4")
    assert "Layer already exists" in again
    docker.do("tag", "hosted:1", f"{OWN}/foo/mounted:1")
    assert "Mounted from foo/bar" in docker.do("push", f"{OWN}/foo/mounted:1")
    docker.forget_images()
    docker.do("pull", f"{OWN}/foo/bar:v1.2.3.4")
    assert docker.digest_of(f"{OWN}/foo/bar:v1.2.3.4") in pushed


def test_docker_straight_over_tls_and_in_the_clear(
    upstreams: Upstreams, hosting: Hosting, machines: Machines, tmp_path: Path
) -> None:
    upstreams.on_hub("library/straight", "1", images.small("docker-straight", oci=False))
    docker = machines.docker(hosting)
    docker.do("pull", "straight:1")
    # Go asks no proxy for loopback addresses: these go to the doors themselves.
    for host in (hosting.straight, hosting.plain):
        docker.do("tag", "straight:1", f"{host}/docker/straight:1")
        docker.do("push", f"{host}/docker/straight:1")
        docker.do("rmi", f"{host}/docker/straight:1")
        docker.do("pull", f"{host}/docker/straight:1")


def test_every_door_and_name(hosting: Hosting) -> None:
    """SNI chooses the leaf; without it the address does. A name that is not ours gets no certificate for itself."""
    for host in (OWN, "127.0.0.1"):
        connection = wire.Straight(host, ("127.0.0.1", hosting.registry_port), hosting.context)
        connection.request("GET", "/v2/")
        assert connection.getresponse().read() == b"{}"
        connection.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        wire.Straight("registry-1.docker.io", ("127.0.0.1", hosting.registry_port), hosting.context).connect()
    for url in (f"https://{OWN}/v2/", f"https://{OWN}:5443/v2/", f"http://{OWN}/v2/"):
        assert hosting.client.get(url + "_catalog").json["repositories"] is not None
    assert wire.request("GET", f"http://{hosting.plain}/ca.crt").body == hosting.ca_file.read_bytes()
    script = wire.request("GET", f"http://{hosting.plain}/setup/systemd").body.decode()
    assert f"127.0.0.1:{hosting.port}/" in script
    assert wire.raw(hosting.plain_port, f"CONNECT {OWN}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode()).startswith(
        b"HTTP/1.1 405 "
    )


def test_ns_asks_for_a_mirror_unless_it_names_ourselves(upstreams: Upstreams, hosting: Hosting, tmp_path: Path) -> None:
    hub = upstreams.on_hub("library/mirrored-here", "1", images.small("mirrored-here"))
    base = f"http://{hosting.plain}/v2/library/mirrored-here/manifests/1"
    accept = {"Accept": EVERY_MANIFEST}
    assert wire.request("GET", base, accept).status == 404
    assert wire.request("GET", f"{base}?ns=docker.io", accept).body == hub.manifest.data
    assert wire.request("GET", f"{base}?ns={OWN}", accept).status == 404
    assert wire.request("GET", f"{hosting.url}/v2/library/mirrored-here/manifests/1", accept).status == 200
    assert wire.request("GET", f"{hosting.url}/v2/library/mirrored-here/manifests/1?ns={OWN}", accept).status == 404


def test_allow_clients_holds_at_every_door(run_proxy: RunProxy) -> None:
    plain = free_port()
    closed = run_proxy("closed", ALLOW_CLIENTS="127.0.0.1", REGISTRY_HTTP_LISTEN=f"tcp:{plain}:interface=127.0.0.1")
    for port, context in ((plain, None), (closed.registry_port, closed.context)):
        connection = wire.Straight("127.0.0.1", ("127.0.0.1", port), context)
        connection.connect()
        connection.close()
        refused = wire.Straight("127.0.0.1", ("127.0.0.1", port), context)
        refused.sock = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
        if context is not None:
            refused.sock = context.wrap_socket(refused.sock, server_hostname="127.0.0.1")
        refused.request("GET", "/v2/")
        answer = wire.read(refused.getresponse())
        assert (answer.status, b"ALLOW_CLIENTS" in answer.body) == (403, True)


def test_a_tree_of_docker_registry_is_served_and_ours_by_it(
    run_proxy: RunProxy, machines: Machines, tmp_path: Path
) -> None:
    """Both directions on one tree: theirs, then ours, then theirs again, which serves what we added."""
    need("docker-registry")
    old = images.index({"amd64": images.small("tree-old"), "arm64": images.small("tree-old-arm")})
    schema2 = images.small("tree-schema2", oci=False)
    theirs = DockerRegistry(tmp_path / "theirs", "127.0.0.1")
    theirs.start()
    skopeo = Skopeo(tmp_path / "skopeo", {})
    try:
        host = f"127.0.0.1:{theirs.port}"
        push(skopeo, old, folder_of(old, tmp_path / "old"), f"{host}/tree/old:1", "--dest-tls-verify=false")
        push(skopeo, schema2, folder_of(schema2, tmp_path / "s2"), f"{host}/tree/old:2", "--dest-tls-verify=false")
    finally:
        theirs.stop()

    plain = free_port()
    ours = run_proxy("ours", REGISTRY_DIR=str(theirs.storage), REGISTRY_HTTP_LISTEN=f"tcp:{plain}:interface=127.0.0.1")
    pulled = skopeo.pull(f"127.0.0.1:{plain}/tree/old:1", "--all", plain=True)
    assert (pulled / "manifest.json").read_bytes() == old.manifest.data
    skopeo.pull(f"127.0.0.1:{plain}/tree/old:2", plain=True)
    new = images.small("tree-new")
    push(skopeo, new, folder_of(new, tmp_path / "new"), f"127.0.0.1:{plain}/tree/new:1", "--dest-tls-verify=false")
    push(skopeo, old, tmp_path / "old", f"127.0.0.1:{plain}/tree/copy:1", "--dest-tls-verify=false")
    ours.stop()

    theirs.start()
    try:
        for name, image in (("new:1", new), ("copy:1", old), ("old:1", old), ("old:2", schema2)):
            pulled = skopeo.pull(f"{host}/tree/{name}", "--all", plain=True)
            assert (pulled / "manifest.json").read_bytes() == image.manifest.data
    finally:
        theirs.stop()


def with_users(tmp_path: Path, run_proxy: RunProxy, **settings: str) -> Proxy:
    return run_proxy("users", HTPASSWD_FILE=str(users_file(tmp_path)), **settings)


def test_docker_with_users(upstreams: Upstreams, run_proxy: RunProxy, machines: Machines, tmp_path: Path) -> None:
    upstreams.on_hub("library/users", "1", images.small("users", oci=False))
    proxy = with_users(tmp_path, run_proxy)
    docker = machines.docker(proxy)
    docker.do("pull", "users:1")
    name = f"{OWN}/users/image:1"
    docker.do("tag", "users:1", name)
    assert docker.run("push", name).returncode != 0
    assert docker.run("pull", name).returncode != 0
    assert docker.run("login", "-u", "alice", "-p", "wrong", OWN).returncode != 0
    for user, password in USERS.items():
        docker.do("login", "-u", user, "-p", password, OWN)
        docker.do("push", name)
        docker.do("pull", name)
    answer = proxy.client.get(f"https://{OWN}/v2/")
    assert (answer.status, answer.headers["www-authenticate"]) == (401, f'Basic realm="{OWN}"')
    for password in USERS.values():
        assert password not in proxy.text


def test_docker_pulls_without_a_login_where_all_may(
    upstreams: Upstreams, run_proxy: RunProxy, machines: Machines, tmp_path: Path
) -> None:
    upstreams.on_hub("library/readers", "1", images.small("readers", oci=False))
    proxy = with_users(tmp_path, run_proxy, ANONYMOUS_PULL="true")
    name = f"{OWN}/readers/image:1"
    writer, reader = machines.docker(proxy), machines.docker(proxy)
    writer.do("pull", "readers:1")
    writer.do("tag", "readers:1", name)
    assert writer.run("push", name).returncode != 0
    assert writer.run("login", "-u", "alice", "-p", "wrong", OWN).returncode != 0
    writer.do("login", "-u", "alice", "-p", USERS["alice"], OWN)
    writer.do("push", name)
    reader.do("pull", name)
    reader.do("tag", name, f"{OWN}/readers/other:1")
    assert reader.run("push", f"{OWN}/readers/other:1").returncode != 0
    skopeo = machines.skopeo(proxy)
    skopeo.pull(name)
    basic = base64.b64encode(f"alice:{USERS['alice']}".encode()).decode()
    url = f"https://{OWN}/v2/readers/image/manifests/1"
    assert proxy.client.ask("DELETE", url).status == 401
    assert proxy.client.ask("DELETE", url, {"Authorization": f"Basic {basic}"}).status == 202


def test_a_broken_file_of_users_stops_the_start(tmp_path: Path, upstreams: Upstreams) -> None:
    file = tmp_path / "htpasswd"
    file.write_text("# users\nalice:$apr1$abc$secretsecret\n")
    proxy = Proxy(tmp_path / "proxy", {**upstreams.settings, "HTPASSWD_FILE": str(file)})
    proxy.launch()
    eventually(lambda: not proxy.running, "the end of the daemon")
    assert f"{file}, line 2," in proxy.text
    assert "secretsecret" not in proxy.text
    assert "Traceback" not in proxy.text


def upload(proxy: Proxy, name: str) -> str:
    begun = proxy.client.ask("POST", f"http://{OWN}/v2/{name}/blobs/uploads/")
    assert begun.status == 202
    return f"http://{OWN}{begun.headers['location']}"


@pytest.mark.parametrize("how", ["drop", "kill"])
def test_an_upload_goes_on_after_a_drop_and_after_a_kill(run_proxy: RunProxy, how: str) -> None:
    proxy = run_proxy("resumed")
    data = images.noise(3_000_000, "resumed")
    url = upload(proxy, "resumed/here")
    connection = proxy.client.connection(url)
    connection.putrequest("PATCH", url)
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[:2_000_000])
    eventually(lambda: arrived(proxy, url) >= 1_700_000, "most of what was sent")
    if how == "kill":
        proxy.restart(kill=True)
    connection.close()
    eventually(lambda: patch(proxy, url, b"", arrived(proxy, url)) != 409, "the end of the request that dropped")
    here = arrived(proxy, url)
    assert 1_700_000 <= here <= 2_000_000
    assert patch(proxy, url, data[here:], here) == 202
    digest = images.sha256(data)
    assert proxy.client.ask("PUT", f"{url}?digest={digest}").status == 201
    assert proxy.client.get(f"http://{OWN}/v2/resumed/here/blobs/{digest}").body == data
    assert not list(proxy.state.glob("registry/**/_uploads/*"))


def arrived(proxy: Proxy, url: str) -> int:
    answer = proxy.client.get(url)
    assert answer.status == 204
    last = int(answer.headers["range"].removeprefix("0-"))
    return last + 1 if last else 0


def patch(proxy: Proxy, url: str, data: bytes, start: int) -> int:
    fields = {"Content-Range": f"{start}-{start + len(data) - 1}"} if data else {}
    return proxy.client.ask("PATCH", url, fields, data).status


def test_memory_stays_flat_and_nothing_is_read_twice(hosting: Hosting) -> None:
    size, piece = 256 << 20, os.urandom(1 << 20)
    hasher = hashlib.sha256()
    url = upload(hosting, "big/blob")
    before = hosting.memory
    connection = hosting.client.connection(url)
    connection.putrequest("PATCH", url)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    highest = 0
    for _ in range(size // len(piece)):
        connection.send(piece)
        hasher.update(piece)
        highest = max(highest, hosting.memory)
    answer = wire.read(connection.getresponse())
    connection.close()
    assert (answer.status, answer.headers["range"]) == (202, f"0-{size - 1}")
    assert highest - before < 24 << 20
    assert hosting.client.ask("PUT", f"{url}?digest=sha256:{hasher.hexdigest()}").status == 201


def test_two_clients_push_the_same_at_once(hosting: Hosting) -> None:
    image = images.small("same", size=2_000_000)
    failures: list[str] = []

    def client() -> None:
        try:
            push_plainly(hosting, "same/here", "1", image)
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    got = hosting.client.get(f"http://{OWN}/v2/same/here/manifests/1", Accept=EVERY_MANIFEST)
    assert got.body == image.manifest.data
    for blob in image.blobs:
        assert hosting.client.get(f"http://{OWN}/v2/same/here/blobs/{blob.digest}").body == blob.data


def push_plainly(proxy: Proxy, name: str, tag: str, image: Image) -> None:
    for blob in image.blobs:
        done = proxy.client.ask("PUT", f"{upload(proxy, name)}?digest={blob.digest}", body=blob.data)
        assert done.status == 201, done
    url = f"http://{OWN}/v2/{name}/manifests/{tag}"
    done = proxy.client.ask("PUT", url, {"Content-Type": image.manifest.media_type}, image.manifest.data)
    assert done.status == 201, done


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    need(root=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_nothing(run_proxy: RunProxy, small_disk: Path) -> None:
    proxy = run_proxy("full", REGISTRY_DIR=str(small_disk))
    used = shutil.disk_usage(small_disk).used
    data = images.noise(6_000_000, "full")
    url = upload(proxy, "full/disk")
    refused = proxy.client.ask("PATCH", url, body=data)
    assert (refused.status, refused.error_code) == (507, "UNAVAILABLE")
    assert "full" in refused.message
    assert proxy.client.get(url).status == 404
    assert shutil.disk_usage(small_disk).used - used < 64 << 10
    small = images.small("fits", size=1000)
    push_plainly(proxy, "full/disk", "1", small)
    assert proxy.client.get(f"http://{OWN}/v2/full/disk/manifests/1", Accept=OCI_MANIFEST).status == 200
