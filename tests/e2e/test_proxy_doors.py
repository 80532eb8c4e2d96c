"""The proxy's own doors: TLS to the proxy, a login for it, and certificates in files, with real clients."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from bench.servers import free_port
from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.pki import Leaf, UpstreamCA
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import USERS, RegistryDaemon, write_htpasswd
from tests.e2e.harness.upstreams import FAKE, Upstreams
from tests.support.tls_tunnel import open_tls

LOGIN = f"alice:{quote(USERS['alice'], safe='')}"
HOST = FAKE.removeprefix("https://")
MIB = 1024 * 1024


class TLSProxyDaemon(RegistryDaemon):
    """A daemon that its clients reach over TLS, with a login."""

    def __init__(self, folder: Path, upstreams: Upstreams, **settings: str) -> None:
        self.tls_port = free_port()
        folder.mkdir(parents=True)
        super().__init__(
            folder,
            {
                **upstreams.settings,
                "PROXY_TLS_LISTEN": f"tcp:{self.tls_port}:interface=127.0.0.1",
                "PROXY_HTPASSWD_FILE": str(write_htpasswd(folder)),
                "WORKERS": "2",
                **settings,
            },
        )

    @property
    def tls_url(self) -> str:
        return f"https://{LOGIN}@localhost:{self.tls_port}/"

    @property
    def client_environment(self) -> dict[str, str]:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        return {**dict.fromkeys(names, self.tls_url), "SSL_CERT_FILE": str(self.ca_file)}


@pytest.fixture(scope="module")
def tls_daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TLSProxyDaemon]:
    daemon = TLSProxyDaemon(tmp_path_factory.mktemp("doors") / "daemon", upstreams)
    with daemon.run_and_check_log(lambda: [*upstreams.secrets, USERS["alice"]]):
        yield daemon


def curl(daemon: TLSProxyDaemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    require_programs("curl")
    certificates = ["--cacert", str(daemon.ca_file), "--proxy-cacert", str(daemon.ca_file)]
    command = ["curl", "-sS", "--max-time", "20", *certificates, *arguments]
    return subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_curl_reaches_a_registry_through_tls_within_tls(
    upstreams: Upstreams, tls_daemon: TLSProxyDaemon, host: str
) -> None:
    upstreams.fake.put_blob("team/app", b"content")
    address = ["--resolve", f"{host}:{tls_daemon.tls_port}:127.0.0.1"]
    proxy = ["--proxy", f"https://{host}:{tls_daemon.tls_port}", "--proxy-user", f"alice:{USERS['alice']}"]
    result = curl(tls_daemon, *address, *proxy, f"{FAKE}/v2/team/app/blobs/{blob_digest(b'content')}")
    assert (result.stdout, result.stderr) == ("content", "")
    result = curl(tls_daemon, *address, *proxy[:2], f"{FAKE}/v2/")
    assert "407" in result.stderr


def blob_digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_skopeo_podman_docker_and_containerd_use_it(
    upstreams: Upstreams, tls_daemon: TLSProxyDaemon, clients: ClientFactory
) -> None:
    image = upstreams.push_to_hub("library/doors", "1", images.build_small_image("doors", oci=False, layers=2))
    clients.skopeo(tls_daemon).pull("docker.io/library/doors:1")
    docker = clients.docker(tls_daemon)
    docker.run_checked("pull", "doors:1")
    assert docker.image_digest("doors:1") == image.digest
    assert clients.podman(tls_daemon).run("pull", "docker.io/library/doors:1").returncode == 0


def test_pages_over_tls(tls_daemon: TLSProxyDaemon) -> None:
    def get(path: str) -> bytes:
        url = f"https://localhost:{tls_daemon.tls_port}{path}"
        return http_client.request_directly("GET", url, context=tls_daemon.client_context).body

    assert get("/healthz") == b"ok\n"
    assert f"proxy=http://localhost:{tls_daemon.port}/\n".encode() in get("/setup")
    reply = http_client.send_raw(tls_daemon.tls_port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"Client sent an HTTP request to an HTTPS server" in reply


def read_blob(daemon: TLSProxyDaemon, digest: str, size: int) -> tuple[int, str]:
    """Return the size of the blob and its digest, read through TLS within TLS."""
    hashed, received = hashlib.sha256(), 0
    with open_blob(daemon, digest) as tunnel, tunnel.makefile("rb") as reader:
        while reader.readline().strip():
            pass
        while received < size and (data := reader.read(min(65536, size - received))):
            hashed.update(data)
            received += len(data)
    return received, hashed.hexdigest()


def open_blob(daemon: TLSProxyDaemon, digest: str) -> socket.socket:
    """Return a plain socket for the response to GET of a blob; the TLS of the registry is within the proxy's."""
    authorization = http_client.basic_authorization("alice", USERS["alice"])
    outer = open_tls(("127.0.0.1", daemon.tls_port), daemon.client_context, "localhost")
    outer.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {authorization}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += outer.recv(1)
    assert head.startswith(b"HTTP/1.1 200 ")
    tunnel = daemon.client_context.wrap_socket(outer, server_hostname=HOST)
    tunnel.sendall(f"GET /v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    return tunnel


def test_a_large_blob_arrives_whole(upstreams: Upstreams, tls_daemon: TLSProxyDaemon) -> None:
    content = images.random_bytes(20 * MIB, "doors")
    digest = upstreams.fake.put_blob("team/app", content)
    assert read_blob(tls_daemon, digest, len(content)) == (len(content), digest.partition(":")[2])


def test_clients_that_do_not_read_take_little_memory(upstreams: Upstreams, tls_daemon: TLSProxyDaemon) -> None:
    """Back-pressure passes through both layers of TLS: the daemon does not read the cached blob for them."""
    content = images.random_bytes(20 * MIB, "not read")
    digest = upstreams.fake.put_blob("team/app", content)
    read_blob(tls_daemon, digest, len(content))
    before = tls_daemon.resident_bytes
    clients = [open_blob(tls_daemon, digest) for _ in range(16)]  # each reads at most what its socket pair holds
    for client in clients:
        client.recv(1)
    assert tls_daemon.resident_bytes - before < 16 * MIB  # measured: 0.1 MB; 16 blobs would be 320 MiB
    received, _ = read_blob(tls_daemon, digest, len(content))
    assert received == len(content)
    for client in clients:
        client.close()


# certificates in files


class CertificateFiles:
    """The two files of a certificate that a company's CA issues."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca = UpstreamCA(folder / "ca", "a company")
        self.certificate, self.key = folder / "fullchain.pem", folder / "privkey.pem"

    def install(self, leaf: Leaf) -> None:
        shutil.copy(leaf.certificate_file, self.certificate)
        shutil.copy(leaf.key_file, self.key)

    def settings(self, prefix: str) -> dict[str, str]:
        return {f"{prefix}_CRT_FILE": str(self.certificate), f"{prefix}_KEY_FILE": str(self.key)}


def presented(port: int, context: ssl.SSLContext, name: str) -> str:
    """Return the serial number of the certificate that is presented at `port` for `name`, after verifying it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as tcp:
        with context.wrap_socket(tcp, server_hostname=name) as tls:
            certificate = tls.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])


def test_a_companys_certificate_is_used_and_replaced(upstreams: Upstreams, tmp_path: Path) -> None:
    files = CertificateFiles(tmp_path / "company")
    names = ("registry.example.com", "proxy.example.com")
    files.install(files.ca.leaf(*names))
    daemon = TLSProxyDaemon(
        tmp_path / "daemon",
        upstreams,
        REGISTRY_HOSTNAME="docker-registry.local registry.example.com",
        **files.settings("REGISTRY"),
        **files.settings("PROXY"),
    )
    company = files.ca.client_context()
    with daemon.run_and_check_log(list):

        def all_presented() -> set[str]:
            ports = (daemon.registry_port, daemon.tls_port)
            return {presented(port, company, name) for port in ports for name in names for _ in range(4)}

        (first,) = all_presented()  # both processes present the same
        presented(daemon.registry_port, daemon.client_context, "docker-registry.local")  # of our CA
        files.install(files.ca.leaf(*names))
        files.key.write_bytes(b"half a renewal")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: daemon.output_text.count("the previous certificate stays in use") >= 4, "log of a bad file")
        assert all_presented() == {first}
        files.install(files.ca.leaf(*names))
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: len(all_presented()) == 1 and all_presented() != {first}, "the new certificate everywhere")


@pytest.mark.parametrize("prefix", ["REGISTRY", "PROXY"])
def test_a_damaged_certificate_stops_the_start(upstreams: Upstreams, tmp_path: Path, prefix: str) -> None:
    files = CertificateFiles(tmp_path / "company")
    files.install(files.ca.leaf("registry.example.com"))
    files.key.write_bytes(b"")
    daemon = TLSProxyDaemon(tmp_path / "daemon", upstreams, **files.settings(prefix))
    daemon.launch()
    wait_until(lambda: not daemon.running, "the daemon stops")
    assert f"{prefix}_KEY_FILE: {files.key} contains no private key in PEM format." in daemon.output_text
