"""REGISTRY_DIR is on a file system that another machine or program serves, and that stops answering."""

from __future__ import annotations

import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.images import random_bytes, sha256_digest
from tests.e2e.harness.process import mount_fuse, wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import client_connection, connections, debug_bounds, run_command

pytestmark = pytest.mark.root

HOSTED = f"http://{HOSTED_REGISTRY_HOST}/v2/team/app"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A directory of FUSE, and the process that serves it."""
    with mount_fuse(tmp_path / "disk") as server:
        yield tmp_path / "disk", server


def get_through_tunnel(daemon: RegistryDaemon, network: HostileNetwork, host: str) -> bytes:
    """Return the start of the response to a request to `host`, which is not intercepted."""
    context = ssl.create_default_context(cafile=str(network.ca.ca_file))
    with client_connection(daemon.port, "127.0.0.1") as client:
        client.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        with context.wrap_socket(client, server_hostname=host) as tls:
            tls.sendall(f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return tls.recv(100)


def test_tunnels_and_the_cache_go_on(
    disk: tuple[Path, subprocess.Popen[bytes]], network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int
) -> None:
    folder, server = disk
    network.add_server("tunnel.test:443", FakeRegistry(network.ca.leaf("tunnel.test").server_context()))
    daemon = start_daemon(REGISTRY_DIR=str(folder / "registry"))
    assert "REGISTRY_DIR is on fuse" in daemon.output_text
    content = random_bytes(1 << 20, "pushed")
    digest = sha256_digest(content)
    upload = daemon.client.request("POST", f"{HOSTED}/blobs/uploads/?digest={digest}", {}, content)
    assert upload.status == 201
    assert daemon.client.get(f"{HOSTED}/blobs/{digest}").body == content
    cached = network.good.put_blob("team/app", random_bytes(1 << 20, "cached"))
    assert daemon.client.get(f"{GOOD}/v2/team/app/blobs/{cached}").cache_status == "MISS"

    server.send_signal(signal.SIGSTOP)
    paths = (f"blobs/{digest}", "manifests/latest", "tags/list", f"referrers/{digest}")
    requests = [f"GET /v2/team/app/{path} HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n\r\n".encode() for path in paths]
    push = (
        f"POST /v2/team/app/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with ExitStack() as stack:
        readers = stack.enter_context(connections(daemon.http_port, 20, "127.0.0.2", requests[0]))
        for number, request in enumerate((*requests[1:], push.encode() + content), 3):
            stack.enter_context(connections(daemon.http_port, 10, f"127.0.0.{number}", request))
        wait_until(
            lambda: all(bound["used"] == 16 for bound in debug_bounds(daemon)["running accesses to REGISTRY_DIR"]),
            "all threads for the directory wait",
        )
        # Hits, misses and tunnels use none of them. Each would fail after the client's timeout.
        for _ in range(3):
            assert daemon.client.get(f"{GOOD}/v2/team/app/blobs/{cached}").cache_status == "HIT"
        fresh = network.good.put_blob("team/app", random_bytes(1 << 20, "fresh"))
        assert daemon.client.get(f"{GOOD}/v2/team/app/blobs/{fresh}").cache_status == "MISS"
        assert get_through_tunnel(daemon, network, "tunnel.test").startswith(b"HTTP/1.1 200 ")
        server.send_signal(signal.SIGCONT)
        for reader in readers:
            assert reader.recv(12) == b"HTTP/1.1 200"
    assert daemon.client.get(f"{HOSTED}/blobs/{digest}").body == content
    status = run_command(daemon, "status").stdout
    assert f"hosted in {folder / 'registry'} on fuse" in status
