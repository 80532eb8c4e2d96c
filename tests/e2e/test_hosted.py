"""The hosted registry with real clients: on each endpoint, with users, and beside Debian's `docker-registry`."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import free_port
from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Skopeo, check_output
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.docker_registry import DockerRegistry
from tests.e2e.harness.images import ACCEPT_MANIFESTS, OCI_MANIFEST, SampleImage
from tests.e2e.harness.process import mount_tmpfs, require_programs, wait_until
from tests.e2e.harness.registry_daemon import (
    HOSTED_REGISTRY_HOST,
    USERS,
    RegistryDaemon,
    write_htpasswd,
    write_image_folder,
)
from tests.e2e.harness.upstreams import Upstreams


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    registry_daemon = RegistryDaemon(tmp_path_factory.mktemp("hosting"), upstreams.settings)
    with registry_daemon.run_and_check_log(lambda: upstreams.secrets):
        yield registry_daemon


def push_folder(skopeo: Skopeo, image: SampleImage, folder: Path, target: str, *options: str) -> None:
    check_output(skopeo.run("copy", "--all", "--preserve-digests", *options, f"dir:{folder}", f"docker://{target}"))


@pytest.mark.parametrize("oci", [True, False], ids=["oci", "schema2"])
def test_skopeo_through_the_proxy_and_over_tls(
    daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path, oci: bool
) -> None:
    image_format = "oci" if oci else "schema2"
    image = images.build_index(
        {
            "amd64": images.build_small_image(f"s-amd64-{image_format}", oci=oci),
            "arm64": images.build_small_image(f"s-arm64-{image_format}", oci=oci),
        },
        oci=oci,
    )
    folder = write_image_folder(image, tmp_path / "image")
    proxied_client = clients.skopeo(daemon)
    push_folder(proxied_client, image, folder, f"{HOSTED_REGISTRY_HOST}/skopeo/{image_format}:1")
    assert proxied_client.inspect_raw(f"{HOSTED_REGISTRY_HOST}/skopeo/{image_format}:1") == image.manifest.data
    direct_client = Skopeo(tmp_path / "direct", {"SSL_CERT_FILE": str(daemon.ca_file)})
    pulled_folder = direct_client.pull(f"{daemon.https_address}/skopeo/{image_format}:1", "--all")
    assert (pulled_folder / "manifest.json").read_bytes() == image.manifest.data
    push_folder(direct_client, image, folder, f"{daemon.https_address}/skopeo/{image_format}:2")
    push_folder(
        direct_client, image, folder, f"{daemon.http_address}/skopeo/{image_format}-copy:1", "--dest-tls-verify=false"
    )
    check_output(direct_client.run("delete", f"docker://{daemon.https_address}/skopeo/{image_format}:2"))
    assert direct_client.try_pull(f"{daemon.https_address}/skopeo/{image_format}:1").returncode != 0
    direct_client.pull(f"{daemon.http_address}/skopeo/{image_format}-copy:1", "--all", plain_http=True)


def test_docker_pushes_and_pulls_through_the_proxy(
    upstreams: Upstreams, daemon: RegistryDaemon, clients: ClientFactory
) -> None:
    """Pull an image from Docker Hub, tag and push it, and pull it again, as in the README."""
    upstreams.push_to_hub("library/hosted", "1", images.build_small_image("docker-hosted", oci=False))
    docker = clients.docker(daemon)
    docker.run_checked("pull", "hosted:1")
    docker.run_checked("tag", "hosted:1", f"{HOSTED_REGISTRY_HOST}/foo/bar:v1.2.3.4")
    push_output = docker.run_checked("push", f"{HOSTED_REGISTRY_HOST}/foo/bar:v1.2.3.4")
    assert "digest: sha256:" in push_output
    second_push_output = docker.run_checked("push", f"{HOSTED_REGISTRY_HOST}/foo/bar:v1.2.3.4")
    assert "Layer already exists" in second_push_output
    docker.run_checked("tag", "hosted:1", f"{HOSTED_REGISTRY_HOST}/foo/mounted:1")
    assert "Mounted from foo/bar" in docker.run_checked("push", f"{HOSTED_REGISTRY_HOST}/foo/mounted:1")
    docker.remove_all_images()
    docker.run_checked("pull", f"{HOSTED_REGISTRY_HOST}/foo/bar:v1.2.3.4")
    assert docker.image_digest(f"{HOSTED_REGISTRY_HOST}/foo/bar:v1.2.3.4") in push_output


def test_docker_over_tls_and_plain_http(
    upstreams: Upstreams, daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path
) -> None:
    upstreams.push_to_hub("library/direct", "1", images.build_small_image("docker-direct", oci=False))
    docker = clients.docker(daemon)
    docker.run_checked("pull", "direct:1")
    # Go uses no proxy for loopback addresses, so docker connects to the registry's own endpoints.
    for host in (daemon.https_address, daemon.http_address):
        docker.run_checked("tag", "direct:1", f"{host}/docker/direct:1")
        docker.run_checked("push", f"{host}/docker/direct:1")
        docker.run_checked("rmi", f"{host}/docker/direct:1")
        docker.run_checked("pull", f"{host}/docker/direct:1")


def test_every_endpoint_and_host_name(daemon: RegistryDaemon) -> None:
    """SNI selects the leaf, or the address if there is no SNI. Other names get no certificate of their own."""
    for host in (HOSTED_REGISTRY_HOST, "127.0.0.1"):
        connection = http_client.DirectConnection(host, ("127.0.0.1", daemon.registry_port), daemon.client_context)
        connection.request("GET", "/v2/")
        assert connection.getresponse().read() == b"{}"
        connection.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        http_client.DirectConnection(
            "registry-1.docker.io", ("127.0.0.1", daemon.registry_port), daemon.client_context
        ).connect()
    for url in (
        f"https://{HOSTED_REGISTRY_HOST}/v2/",
        f"https://{HOSTED_REGISTRY_HOST}:5443/v2/",
        f"http://{HOSTED_REGISTRY_HOST}/v2/",
    ):
        assert daemon.client.get(url + "_catalog").json["repositories"] is not None
    ca_response = http_client.request_directly("GET", f"http://{daemon.http_address}/ca.crt")
    assert ca_response.body == daemon.ca_file.read_bytes()
    script = http_client.request_directly("GET", f"http://{daemon.http_address}/setup/systemd").body.decode()
    assert f"127.0.0.1:{daemon.port}/" in script
    assert http_client.send_raw(
        daemon.http_port, f"CONNECT {HOSTED_REGISTRY_HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    ).startswith(b"HTTP/1.1 405 ")


def test_ns_selects_mirror_or_hosted_registry(upstreams: Upstreams, daemon: RegistryDaemon, tmp_path: Path) -> None:
    hub_image = upstreams.push_to_hub("library/mirrored-here", "1", images.build_small_image("mirrored-here"))
    base = f"http://{daemon.http_address}/v2/library/mirrored-here/manifests/1"
    accept = {"Accept": ACCEPT_MANIFESTS}
    assert http_client.request_directly("GET", base, accept).status == 404
    assert http_client.request_directly("GET", f"{base}?ns=docker.io", accept).body == hub_image.manifest.data
    assert http_client.request_directly("GET", f"{base}?ns={HOSTED_REGISTRY_HOST}", accept).status == 404
    mirror_url = f"{daemon.url}/v2/library/mirrored-here/manifests/1"
    assert http_client.request_directly("GET", mirror_url, accept).status == 200
    assert http_client.request_directly("GET", f"{mirror_url}?ns={HOSTED_REGISTRY_HOST}", accept).status == 404


def test_allow_clients_applies_to_every_endpoint(start_daemon: StartDaemon) -> None:
    http_port = free_port()
    daemon = start_daemon(
        "closed", ALLOW_CLIENTS="127.0.0.1", REGISTRY_HTTP_LISTEN=f"tcp:{http_port}:interface=127.0.0.1"
    )
    for port, context in ((http_port, None), (daemon.registry_port, daemon.client_context)):
        connection = http_client.DirectConnection("127.0.0.1", ("127.0.0.1", port), context)
        connection.connect()
        connection.close()
        denied_connection = http_client.DirectConnection("127.0.0.1", ("127.0.0.1", port), context)
        denied_connection.sock = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
        if context is not None:
            denied_connection.sock = context.wrap_socket(denied_connection.sock, server_hostname="127.0.0.1")
        denied_connection.request("GET", "/v2/")
        response = http_client.read_response(denied_connection.getresponse())
        assert (response.status, b"ALLOW_CLIENTS" in response.body) == (403, True)


def test_storage_is_interchangeable_with_docker_registry(
    start_daemon: StartDaemon, clients: ClientFactory, tmp_path: Path
) -> None:
    """One storage tree is used by docker-registry, by the daemon, and by docker-registry again, in that order."""
    require_programs("docker-registry")
    old_image = images.build_index(
        {"amd64": images.build_small_image("tree-old"), "arm64": images.build_small_image("tree-old-arm")}
    )
    schema2_image = images.build_small_image("tree-schema2", oci=False)
    docker_registry = DockerRegistry(tmp_path / "docker-registry", "127.0.0.1")
    docker_registry.start()
    skopeo = Skopeo(tmp_path / "skopeo", {})
    try:
        host = f"127.0.0.1:{docker_registry.port}"
        push_folder(
            skopeo,
            old_image,
            write_image_folder(old_image, tmp_path / "old"),
            f"{host}/tree/old:1",
            "--dest-tls-verify=false",
        )
        push_folder(
            skopeo,
            schema2_image,
            write_image_folder(schema2_image, tmp_path / "s2"),
            f"{host}/tree/old:2",
            "--dest-tls-verify=false",
        )
    finally:
        docker_registry.stop()

    http_port = free_port()
    daemon = start_daemon(
        "daemon", REGISTRY_DIR=str(docker_registry.storage), REGISTRY_HTTP_LISTEN=f"tcp:{http_port}:interface=127.0.0.1"
    )
    pulled_folder = skopeo.pull(f"127.0.0.1:{http_port}/tree/old:1", "--all", plain_http=True)
    assert (pulled_folder / "manifest.json").read_bytes() == old_image.manifest.data
    skopeo.pull(f"127.0.0.1:{http_port}/tree/old:2", plain_http=True)
    new_image = images.build_small_image("tree-new")
    push_folder(
        skopeo,
        new_image,
        write_image_folder(new_image, tmp_path / "new"),
        f"127.0.0.1:{http_port}/tree/new:1",
        "--dest-tls-verify=false",
    )
    push_folder(skopeo, old_image, tmp_path / "old", f"127.0.0.1:{http_port}/tree/copy:1", "--dest-tls-verify=false")
    daemon.stop()

    docker_registry.start()
    try:
        for name, image in (
            ("new:1", new_image),
            ("copy:1", old_image),
            ("old:1", old_image),
            ("old:2", schema2_image),
        ):
            pulled_folder = skopeo.pull(f"{host}/tree/{name}", "--all", plain_http=True)
            assert (pulled_folder / "manifest.json").read_bytes() == image.manifest.data
    finally:
        docker_registry.stop()


def start_with_users(tmp_path: Path, start_daemon: StartDaemon, **settings: str) -> TwistdDaemon:
    return start_daemon("users", HTPASSWD_FILE=str(write_htpasswd(tmp_path)), **settings)


def test_docker_with_users(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, tmp_path: Path
) -> None:
    upstreams.push_to_hub("library/users", "1", images.build_small_image("users", oci=False))
    daemon = start_with_users(tmp_path, start_daemon)
    docker = clients.docker(daemon)
    docker.run_checked("pull", "users:1")
    name = f"{HOSTED_REGISTRY_HOST}/users/image:1"
    docker.run_checked("tag", "users:1", name)
    assert docker.run("push", name).returncode != 0
    assert docker.run("pull", name).returncode != 0
    assert docker.run("login", "-u", "alice", "-p", "wrong", HOSTED_REGISTRY_HOST).returncode != 0
    for user, password in USERS.items():
        docker.run_checked("login", "-u", user, "-p", password, HOSTED_REGISTRY_HOST)
        docker.run_checked("push", name)
        docker.run_checked("pull", name)
    response = daemon.client.get(f"https://{HOSTED_REGISTRY_HOST}/v2/")
    assert (response.status, response.headers["www-authenticate"]) == (401, f'Basic realm="{HOSTED_REGISTRY_HOST}"')
    for password in USERS.values():
        assert password not in daemon.output_text


def test_anonymous_pull_with_docker(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, tmp_path: Path
) -> None:
    upstreams.push_to_hub("library/readers", "1", images.build_small_image("readers", oci=False))
    daemon = start_with_users(tmp_path, start_daemon, ANONYMOUS_PULL="true")
    name = f"{HOSTED_REGISTRY_HOST}/readers/image:1"
    push_client, pull_client = clients.docker(daemon), clients.docker(daemon)
    push_client.run_checked("pull", "readers:1")
    push_client.run_checked("tag", "readers:1", name)
    assert push_client.run("push", name).returncode != 0
    assert push_client.run("login", "-u", "alice", "-p", "wrong", HOSTED_REGISTRY_HOST).returncode != 0
    push_client.run_checked("login", "-u", "alice", "-p", USERS["alice"], HOSTED_REGISTRY_HOST)
    push_client.run_checked("push", name)
    pull_client.run_checked("pull", name)
    pull_client.run_checked("tag", name, f"{HOSTED_REGISTRY_HOST}/readers/other:1")
    assert pull_client.run("push", f"{HOSTED_REGISTRY_HOST}/readers/other:1").returncode != 0
    skopeo = clients.skopeo(daemon)
    skopeo.pull(name)
    login = {"Authorization": http_client.basic_authorization("alice", USERS["alice"])}
    url = f"https://{HOSTED_REGISTRY_HOST}/v2/readers/image/manifests/1"
    assert daemon.client.request("DELETE", url).status == 401
    assert daemon.client.request("DELETE", url, login).status == 202


def test_skopeo_and_the_rules_of_the_registry(tmp_path: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("rules")
    daemon.stop()
    env_file = tmp_path / "environment"
    env_file.write_text("")
    daemon.argv += ["--env-file", str(env_file)]
    daemon.start()

    def reload(text: str) -> None:
        log_offset = daemon.log_offset()
        env_file.write_text(text)
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: " in daemon.output_text[log_offset:], "the reload")

    platforms = {name: images.build_small_image(f"rules-{name}") for name in ("amd64", "arm64")}
    image = images.build_index(platforms)
    folder = write_image_folder(image, tmp_path / "image")
    skopeo = Skopeo(tmp_path / "skopeo", daemon.client_environment)
    target = f"{HOSTED_REGISTRY_HOST}/rules/image:1"
    push_folder(skopeo, image, folder, target)
    # A part of the index of a tag, by its digest: `skopeo delete` sends DELETE.
    child = f"{HOSTED_REGISTRY_HOST}/rules/image@{image.children[0].digest}"
    refused = skopeo.run("delete", f"docker://{child}")
    assert refused.returncode != 0 and "needs" in refused.stdout + refused.stderr
    skopeo.pull(target, "--all")
    for settings, command in (
        ("ALLOW_DELETE=false", ("delete", f"docker://{target}")),
        ("REGISTRY_READ_ONLY=true", ("delete", f"docker://{target}")),
        ("REGISTRY_READ_ONLY=true", ("copy", "--all", f"dir:{folder}", f"docker://{HOSTED_REGISTRY_HOST}/rules/b:1")),
        (
            "",
            ("copy", "--multi-arch", "index-only", f"docker://{target}", f"docker://{HOSTED_REGISTRY_HOST}/rules/c:1"),
        ),
    ):
        reload(f"{settings}\n")
        assert skopeo.run(*command).returncode != 0, command
        skopeo.pull(target, "--all")
    reload("ALLOW_SPARSE_INDEXES=true\n")
    check_output(skopeo.run(*command))
    assert skopeo.inspect_raw(f"{HOSTED_REGISTRY_HOST}/rules/c:1") == image.manifest.data
    check_output(skopeo.run("delete", f"docker://{target}"))


def test_invalid_htpasswd_prevents_startup(tmp_path: Path, upstreams: Upstreams) -> None:
    file = tmp_path / "htpasswd"
    file.write_text("# users\nalice:$apr1$abc$secretsecret\n")
    daemon = TwistdDaemon(tmp_path / "proxy", {**upstreams.settings, "HTPASSWD_FILE": str(file)})
    daemon.launch()
    wait_until(lambda: not daemon.running, "the end of the daemon")
    assert f"{file}, line 2 " in daemon.output_text
    assert "secretsecret" not in daemon.output_text
    assert "Traceback" not in daemon.output_text


def start_upload(daemon: TwistdDaemon, name: str) -> str:
    response = daemon.client.request("POST", f"http://{HOSTED_REGISTRY_HOST}/v2/{name}/blobs/uploads/")
    assert response.status == 202
    return f"http://{HOSTED_REGISTRY_HOST}{response.headers['location']}"


@pytest.mark.parametrize("interruption", ["drop", "kill"])
def test_upload_resumes_after_disconnect_and_kill(start_daemon: StartDaemon, interruption: str) -> None:
    daemon = start_daemon("resumed")
    data = images.random_bytes(3_000_000, "resumed")
    url = start_upload(daemon, "resumed/here")
    connection = daemon.client.new_connection(url)
    connection.putrequest("PATCH", url)
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[:2_000_000])
    wait_until(lambda: upload_size(daemon, url) >= 1_700_000, "most of the sent data is in the upload")
    if interruption == "kill":
        daemon.restart(kill=True)
    connection.close()
    wait_until(lambda: patch_upload(daemon, url, b"", upload_size(daemon, url)) != 409, "the interrupted request ends")
    received_size = upload_size(daemon, url)
    assert 1_700_000 <= received_size <= 2_000_000
    assert patch_upload(daemon, url, data[received_size:], received_size) == 202
    digest = images.sha256_digest(data)
    assert daemon.client.request("PUT", f"{url}?digest={digest}").status == 201
    assert daemon.client.get(f"http://{HOSTED_REGISTRY_HOST}/v2/resumed/here/blobs/{digest}").body == data
    assert not list(daemon.state_folder.glob("registry/uploads/*"))


def upload_size(daemon: TwistdDaemon, url: str) -> int:
    response = daemon.client.get(url)
    assert response.status == 204
    last = int(response.headers["range"].removeprefix("0-"))
    return last + 1 if last else 0


def patch_upload(daemon: TwistdDaemon, url: str, data: bytes, start: int) -> int:
    fields = {"Content-Range": f"{start}-{start + len(data) - 1}"} if data else {}
    return daemon.client.request("PATCH", url, fields, data).status


def test_memory_stays_flat_during_upload(daemon: RegistryDaemon) -> None:
    size, chunk = 256 << 20, os.urandom(1 << 20)
    hasher = hashlib.sha256()
    url = start_upload(daemon, "big/blob")
    memory_before = daemon.resident_bytes
    connection = daemon.client.new_connection(url)
    connection.putrequest("PATCH", url)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    peak = 0
    for _ in range(size // len(chunk)):
        connection.send(chunk)
        hasher.update(chunk)
        peak = max(peak, daemon.resident_bytes)
    response = http_client.read_response(connection.getresponse())
    connection.close()
    assert (response.status, response.headers["range"]) == (202, f"0-{size - 1}")
    assert peak - memory_before < 64 << 20  # measured: 2 MB; the blob is 256 MiB
    assert daemon.client.request("PUT", f"{url}?digest=sha256:{hasher.hexdigest()}").status == 201


def test_concurrent_pushes_of_the_same_image(daemon: RegistryDaemon) -> None:
    image = images.build_small_image("same", size=2_000_000)
    failures: list[str] = []

    def push_once() -> None:
        try:
            push_over_http(daemon, "same/here", "1", image)
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=push_once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    response = daemon.client.get(f"http://{HOSTED_REGISTRY_HOST}/v2/same/here/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.body == image.manifest.data
    for blob in image.blobs:
        assert daemon.client.get(f"http://{HOSTED_REGISTRY_HOST}/v2/same/here/blobs/{blob.digest}").body == blob.data


def push_over_http(daemon: TwistdDaemon, name: str, tag: str, image: SampleImage) -> None:
    for blob in image.blobs:
        result = daemon.client.request("PUT", f"{start_upload(daemon, name)}?digest={blob.digest}", body=blob.data)
        assert result.status == 201, result
    url = f"http://{HOSTED_REGISTRY_HOST}/v2/{name}/manifests/{tag}"
    result = daemon.client.request("PUT", url, {"Content-Type": image.manifest.media_type}, image.manifest.data)
    assert result.status == 201, result


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the mount point of a file system of 4 MiB."""
    with mount_tmpfs(tmp_path / "disk", "4m") as folder:
        yield folder


def test_full_disk_is_reported_and_leaves_no_files(start_daemon: StartDaemon, small_disk: Path) -> None:
    daemon = start_daemon("full", REGISTRY_DIR=str(small_disk))
    used_before = shutil.disk_usage(small_disk).used
    data = images.random_bytes(6_000_000, "full")
    url = start_upload(daemon, "full/disk")
    response = daemon.client.request("PATCH", url, body=data)
    assert (response.status, response.error_code) == (507, "UNAVAILABLE")
    assert "full" in response.error_message
    status = daemon.client.get(url)  # another process may answer, and take it for an upload without bytes
    assert status.status == 404 or status.headers["range"] == "0-0"
    assert shutil.disk_usage(small_disk).used - used_before < 64 << 10
    image = images.build_small_image("fits", size=1000)
    push_over_http(daemon, "full/disk", "1", image)
    assert (
        daemon.client.get(f"http://{HOSTED_REGISTRY_HOST}/v2/full/disk/manifests/1", Accept=OCI_MANIFEST).status == 200
    )
