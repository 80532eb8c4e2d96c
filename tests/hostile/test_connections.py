"""A client without a login opens as many connections as it can. It costs other clients nothing."""

from __future__ import annotations

import select
import socket

import pytest

from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import connections, debug_bounds, descriptors

__all__ = ["descriptors"]

ATTACKER, ACCOMPLICE = "127.0.0.2", "127.0.0.3"
DESCRIPTORS = 300  # of each process
UNFINISHED_UPLOAD = (
    f"POST http://{HOSTED_REGISTRY_HOST}/v2/team/push/blobs/uploads/?digest=sha256:{'0' * 64} HTTP/1.1\r\n"
    f"Host: {HOSTED_REGISTRY_HOST}\r\nContent-Length: 1000\r\n\r\n"
).encode()
FEW_DESCRIPTORS = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"]


def is_closed(client: socket.socket) -> bool:
    """Return whether the other end has refused, closed or reset the connection."""
    poll = select.poll()  # select(2) has a limit of 1,024 descriptors
    poll.register(client, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        received = client.recv(4096, socket.MSG_PEEK)
    except ConnectionResetError:
        return True
    return not received or b"open connections that" in received


def read_all(client: socket.socket) -> bytes:
    """Return what arrives until the end, also if that is a reset."""
    received = b""
    try:
        while chunk := client.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def check_pulls(daemon: RegistryDaemon, network: HostileNetwork, name: str) -> None:
    """Pull a blob that is not cached, and then from the cache."""
    url = f"{GOOD}/v2/{name}/blobs/{network.good.put_blob(name, name.encode() * 10_000)}"
    assert [daemon.client.get(url).cache_status for _ in range(2)] == ["MISS", "HIT"]


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\nHost: ", b"CONNECT good.test:443 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["silent", "half a head", "no handshake", "idle"],
)
def test_a_flood_of_one_client_leaves_descriptors_to_others(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, data: bytes
) -> None:
    require_programs("prlimit")
    daemon = start_daemon(prefix=FEW_DESCRIPTORS)
    with connections(daemon.port, 1000, ATTACKER, data) as clients:
        check_pulls(daemon, network, "team/flood")
        wait_until(lambda: sum(map(is_closed, clients)) > 800, "the others were refused")
        with connections(daemon.registry_port, 300, ATTACKER):
            check_pulls(daemon, network, "team/tls")
    log = daemon.output_text
    assert log.count("refused a connection of 127.0.0.2: 127.0.0.2 has ") == 1
    assert "open files" not in log and "EMFILE" not in log


def test_a_flood_of_two_clients_makes_room_for_a_third(
    network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    require_programs("prlimit")
    daemon = start_daemon(prefix=FEW_DESCRIPTORS)
    with connections(daemon.port, 300, ATTACKER), connections(daemon.port, 300, ACCOMPLICE):
        check_pulls(daemon, network, "team/two")
        with connections(daemon.port, 5) as others:  # all at the same time
            check_pulls(daemon, network, "team/three")
            assert {ATTACKER, ACCOMPLICE} < set(debug_bounds(daemon)["open connections"][0]["clients"])
            assert not any(map(is_closed, others))


def test_a_refused_client_is_told_the_bound_and_debug_shows_it(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int
) -> None:
    daemon = start_daemon(MAX_CONNECTIONS_PER_CLIENT="20")
    request = b"GET /v2/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connections(daemon.port, 20, ATTACKER, UNFINISHED_UPLOAD):
        with connections(daemon.port, 1, ATTACKER, request) as [refused]:
            response = read_all(refused).decode()
        assert response.startswith("HTTP/1.1 429 ")
        assert "\r\nRetry-After: 1\r\n" in response
        assert "127.0.0.2 has 20 of the 20 open connections that one client may have" in response
        assert "MAX_CONNECTIONS_PER_CLIENT" in response
        [bound] = debug_bounds(daemon)["open connections"]
        assert (bound["share"], bound["refused"], bound["clients"]) == (20, 1, {"127.0.0.2": 20})
        check_pulls(daemon, network, "team/another")
    wait_until(lambda: debug_bounds(daemon)["open connections"][0]["used"] == 0, "no connection is open")


def test_idle_connections_of_a_client_make_room_for_its_own(start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon(MAX_CONNECTIONS_PER_CLIENT="20")
    request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connections(daemon.port, 20, data=request) as clients:
        for client in clients:
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")

        def refused() -> bool:
            with connections(daemon.port, 1, data=request) as [client]:
                return client.recv(65536).startswith(b"HTTP/1.1 429 ")

        assert refused()
        wait_until(lambda: not refused(), "idle connections are closed")
        assert sum(map(is_closed, clients)) == 10


def test_a_thousand_connections_behind_a_nat_pull_at_once(
    network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    """The bounds do not hurt many hosts that share an address: all connections stay open, and all get their blobs."""
    daemon = start_daemon()
    blobs = [network.good.put_blob("team/nat", b"%d" % number * 1000) for number in range(10)]
    requests = [f"GET /v2/team/nat/blobs/{blob}?ns=good.test HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" for blob in blobs]
    with connections(daemon.port, 1000) as clients:
        for _ in range(2):
            for number, client in enumerate(clients):
                client.sendall(requests[number % 10].encode())
            for number, client in enumerate(clients):
                assert read_response(client).endswith(b"%d" % (number % 10) * 1000)
    assert "refused" not in daemon.output_text


def read_response(client: socket.socket) -> bytes:
    """Return the body of a response with status 200 and a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = client.recv(65536)
        assert chunk, received
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    [length] = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < length:
        body += client.recv(65536)
    return body
