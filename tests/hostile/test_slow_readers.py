"""A client without a login requests large content on many connections and reads nothing. It takes a bounded amount of
memory, in the daemon and in the kernel, however its TLS connections began."""

from __future__ import annotations

import ssl
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import client_connection, resident_bytes
from tests.http.support.loopback import MemoryBIOClient, read_exactly

KIB = 1024
CLIENTS = 100
CONNECT = b"CONNECT good.test:443 HTTP/1.1\r\nHost: good.test:443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def bytes_in_kernel(daemon: RegistryDaemon) -> list[int]:
    """Return the bytes in the send buffer of each connection of the proxy's port, as proc(5) shows them."""
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{daemon.port:04X}"
    return [int(fields[4].partition(":")[0], 16) for fields in connections if fields[1].endswith(port)]


@pytest.mark.parametrize("early", [False, True], ids=["usual", "ClientHello with the CONNECT"])
def test_readers_that_do_not_read(network: HostileNetwork, start_daemon: StartRegistryDaemon, early: bool) -> None:
    blob = network.good.put_blob("team/large", bytes(16 * KIB * KIB))
    daemon = start_daemon()
    assert daemon.client.get(f"{GOOD}/v2/team/large/blobs/{blob}").status == 200
    context = ssl.create_default_context(cafile=str(daemon.ca_file))
    context.check_hostname = False
    request = f"GET /v2/team/large/blobs/{blob} HTTP/1.1\r\nHost: good.test\r\n\r\n".encode()
    before = resident_bytes(daemon)
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            client = stack.enter_context(client_connection(daemon.port, "127.0.0.2"))
            session = MemoryBIOClient(context=context)
            flight = session.next_flight() or b""
            client.sendall(CONNECT + flight if early else CONNECT)
            assert read_exactly(client, len(ESTABLISHED)) == ESTABLISHED
            if not early:
                client.sendall(flight)
            session.incoming.write(client.recv(64 * KIB))
            session.do_handshake(client)
            client.sendall(session.encrypt(request))
            assert session.read(client, 12).startswith(b"HTTP/1.1 200")
        wait_until(lambda: sum(map(bool, bytes_in_kernel(daemon))) == CLIENTS, "all responses wait in the kernel")
        assert max(bytes_in_kernel(daemon)) <= 1024 * KIB
        assert sum(bytes_in_kernel(daemon)) <= CLIENTS * 384 * KIB
        assert resident_bytes(daemon) - before <= CLIENTS * 64 * KIB + 16 * KIB * KIB
        assert daemon.client.get(f"{GOOD}/v2/team/large/blobs/{blob}").cache_status == "HIT"
