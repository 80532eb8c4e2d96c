"""A client without a login, or a hostile registry, reaches this machine or a metadata service by a company's proxy.

With UPSTREAM_PROXY that proxy resolves the names, maybe in a network where they lead to such services.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import fake_registry
from tests.e2e.harness.http_client import send_raw_request
from tests.e2e.harness.recording_proxy import RecordingProxy
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, HostileNetwork, StartRegistryDaemon

HOSTS = (
    "metadata.google.internal Metadata.Google.INTERNAL. metadata instance-data metadata.azure.internal localhost "
    "x.localhost localhost.localdomain 169.254.169.254 [::ffff:169.254.169.254] 100.100.100.200 [fd00:ec2::254] "
    "[fd20:ce::254] [FD00:C1:0::A9FE:A9FE] [fd00:42::42] [fd00:a9fe:a9fe::1] api.metadata.cloud.ibm.com "
    "127.0.0.1 [::1] 0.0.0.0 [64:ff9b:1:a9fe:a9:fe00::] secret.corp.example"
).split()


@pytest.fixture
def parent() -> Iterator[RecordingProxy]:
    parent = RecordingProxy({})
    parent.start()
    yield parent
    parent.stop()


@pytest.fixture
def daemon(start_daemon: StartRegistryDaemon, parent: RecordingProxy) -> RegistryDaemon:
    return start_daemon(
        UPSTREAM_PROXY=f"http://127.0.0.1:{parent.port}",
        TUNNEL_DENY="loopback link-local metadata .corp.example",
    )


def test_clients_cannot_name_them(daemon: RegistryDaemon, parent: RecordingProxy) -> None:
    for host in HOSTS:
        for line in (f"CONNECT {host}:443", f"GET http://{host}/latest/meta-data/"):
            response = send_raw_request(daemon.port, f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (response.status, b"TUNNEL_DENY" in response.body) == (403, True), line
    assert parent.connected_targets == []


def test_registries_cannot_name_them(network: HostileNetwork, daemon: RegistryDaemon, parent: RecordingProxy) -> None:
    digest = network.evil.put_blob("team/app", b"evil")
    for host in HOSTS:
        network.evil.reset_rules()
        network.evil.add_rule("GET", "/blobs/", fake_registry.redirect_to(f"https://{host}/latest/meta-data/"))
        response = daemon.client.get(f"{EVIL}/v2/team/app/blobs/{digest}")
        assert (response.status, b"TUNNEL_DENY" in response.body) == (502, True), host
    assert parent.connected_targets == []


def test_other_names_reach_the_companys_proxy(
    network: HostileNetwork, daemon: RegistryDaemon, parent: RecordingProxy
) -> None:
    """Without this, the tests above could pass because nothing goes there."""
    send_raw_request(daemon.port, b"CONNECT cdn.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    digest = network.evil.put_blob("team/app", b"evil")
    network.evil.add_rule("GET", "/blobs/", fake_registry.redirect_to("https://other.example/blob"))
    daemon.client.get(f"{EVIL}/v2/team/app/blobs/{digest}")
    assert parent.connected_targets == ["cdn.example:443", "other.example:443"]
