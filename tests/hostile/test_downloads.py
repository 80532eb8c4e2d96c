"""A hostile registry and its client start as many downloads as they can. Others go on, and get their blobs cached.

The attackers are a hostile registry that sends a byte from time to time, and a client without a login that asks for
another blob on each of its connections, or leaves as soon as a download has begun.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.e2e.harness.images import sha256_digest
from tests.e2e.harness.process import require_programs, wait_until
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import debug_bounds
from tests.hostile.test_cache_room import drip
from tests.hostile.test_connections import ATTACKER, FEW_DESCRIPTORS, connections, is_closed


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return the event that ends what the hostile registry does."""
    event = threading.Event()
    yield event
    event.set()


def request_for(number: int) -> bytes:
    path = f"/v2/x/y/blobs/{sha256_digest(b'%d' % number)}?ns=evil.test"
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
def test_dripping_downloads_leave_descriptors_to_others(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, gate: threading.Event, workers: int, leaves: bool
) -> None:
    require_programs("prlimit")
    daemon = start_daemon(prefix=FEW_DESCRIPTORS)
    network.evil.add_rule("GET", "/blobs/", drip(gate))
    with connections(daemon.port, 60 * workers, ATTACKER) as clients:
        for number, client in enumerate(clients):
            if not is_closed(client):
                client.sendall(request_for(number))
                if leaves:
                    client.recv(100)
                    client.close()
        if not leaves:
            wait_until(lambda: "was not cached" in daemon.output_text, "some are not cached")
            bounds = debug_bounds(daemon)
            for name, holder in (("downloads by registry", "evil.test"), ("downloads", "127.0.0.2")):
                assert any(bound["clients"].get(holder) == bound["share"] for bound in bounds[name])
        blob = network.good.put_blob("team/app", b"wanted" * 10_000)
        for status in ("MISS", "HIT"):
            response = daemon.client.get(f"{GOOD}/v2/team/app/blobs/{blob}")
            assert (response.cache_status, response.body) == (status, b"wanted" * 10_000)
    assert "open files" not in daemon.output_text
