"""The hostile network carries honest traffic: otherwise an attack that fails would prove nothing."""

from __future__ import annotations

from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon


def test_both_registries_serve_through_the_daemon(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    digests = {GOOD: network.good.put_blob("team/app", b"good"), EVIL: network.evil.put_blob("team/app", b"evil")}
    client = start_daemon().client
    for registry, digest in digests.items():
        assert client.get(f"{registry}/v2/team/app/blobs/{digest}").status == 200
        assert client.get(f"{registry}/v2/team/app/blobs/{digest}").cache_status == "HIT"
