"""A hostile member of a fleet, and strangers that pose as members."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.servers import free_port
from dockerproxy.fleet.members import ordered
from tests.e2e.harness.fleet import MemberDaemon
from tests.e2e.harness.http_client import BufferedResponse, read_response, send_raw_request
from tests.e2e.harness.images import random_bytes
from tests.hostile.conftest import GOOD, HostileNetwork

pytestmark = pytest.mark.slow

SIZE = 300_000  # bytes: too many to be read as a whole before they are passed on
HEAD = "HTTP/1.1 200 OK\r\nX-Fleet-Answer: upstream\r\nContent-Type: application/octet-stream\r\n"

Attack = Callable[[socket.socket], None]
"""Answers a request on a connection of the hostile member, which is closed afterwards."""


class HostileMember:
    """An address in FLEET at which `attack` answers every request."""

    def __init__(self, address: str, attack: Attack) -> None:
        self.attack = attack
        self.requests: list[bytes] = []
        member = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    self.request.settimeout(60)
                    data = b""
                    while b"\r\n\r\n" not in data:
                        piece = self.request.recv(65536)
                        if not piece:
                            return
                        data += piece
                    member.requests.append(data)
                    member.attack(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server((address, free_port()), Handler)
        self.name = f"{address}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fleet_of(
    attack: Attack, network: HostileNetwork, folder: Path, workers: int, **settings: str
) -> Iterator[tuple[MemberDaemon, HostileMember]]:
    """Run a daemon in a fleet with a hostile member."""
    common = {**network.settings, "WORKERS": str(workers), "FLEET_TIMEOUT": "1s", **settings}
    daemon, member = MemberDaemon(folder / "member", 0, common), HostileMember("127.0.0.21", attack)
    daemon.environment["FLEET"] = f"{daemon.name} {member.name}"
    try:
        daemon.start()
        yield daemon, member
        daemon.check_log([])
    finally:
        member.stop()
        if daemon.running:
            daemon.kill()


def owned_by(member: str, daemon: MemberDaemon, size: int = SIZE) -> bytes:
    """Return the content of a blob that `member` owns."""
    names = tuple(sorted((member, daemon.name)))
    for number in itertools.count():
        data = random_bytes(size, f"hostile {number}")
        if ordered(f"sha256:{hashlib.sha256(data).hexdigest()}", names)[0] == member:
            return data
    raise AssertionError


def _refuse_later(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")


def _elsewhere(connection: socket.socket) -> None:
    head = "HTTP/1.1 307 Temporary Redirect\r\nX-Fleet-Answer: own\r\nX-Fleet-Relay: {}\r\nLocation: http://{}/\r\n"
    target = f"127.0.0.31:{_trap_port}"
    connection.sendall((head.format(target, target) + "Content-Length: 0\r\n\r\n").encode())


def _redirect(connection: socket.socket) -> None:
    connection.sendall(
        f"HTTP/1.1 307 See\r\nX-Fleet-Answer: upstream\r\nLocation: http://127.0.0.31:{_trap_port}/\r\n"
        "Content-Length: 0\r\n\r\n".encode()
    )


def _endless(connection: socket.socket) -> None:
    """Send a body without an end, of the wrong content."""
    connection.sendall(f"{HEAD}Connection: close\r\n\r\n".encode())
    while True:
        connection.sendall(b"\0" * 65536)


def _endless_head(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)


def _silent_body(connection: socket.socket) -> None:
    connection.sendall(f"{HEAD}Content-Length: {SIZE}\r\n\r\n".encode())
    threading.Event().wait(10)


def _nothing(connection: socket.socket) -> None:
    connection.sendall(f"{HEAD}Content-Length: 0\r\n\r\n".encode())


def _huge_length(connection: socket.socket) -> None:
    connection.sendall(f"{HEAD}Content-Length: {1 << 62}\r\n\r\n".encode() + b"\0" * 65536)
    threading.Event().wait(10)


def _binary(connection: socket.socket) -> None:
    connection.sendall(bytes(range(256)) * 100 + b"\r\n\r\n")


def _forged_refusal(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\n{}")


_trap_port = free_port()

ATTACKS = {
    "breaks off in the head": _refuse_later,
    "names a stranger": _elsewhere,
    "redirects elsewhere": _redirect,
    "endless head": _endless_head,
    "silent body": _silent_body,
    "no content": _nothing,
    "huge length, then silence": _huge_length,
    "no HTTP": _binary,
    "refuses like no member": _forged_refusal,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_pull_ends_with_the_right_bytes(
    network: HostileNetwork, tmp_path: Path, workers: int, attack: Attack
) -> None:
    """The content comes from upstream then, whatever a member sends."""
    trap = HostileMember("127.0.0.31", _nothing)
    global _trap_port
    _trap_port = int(trap.name.rpartition(":")[2])
    try:
        with fleet_of(attack, network, tmp_path, workers) as (daemon, member):
            data = owned_by(member.name, daemon)
            digest = network.good.put_blob("team/app", data)
            response = daemon.client.get(f"{GOOD}/v2/team/app/blobs/{digest}")
            assert (response.status, response.body == data) == (200, True)
            assert member.requests and trap.requests == []
    finally:
        trap.stop()


def test_an_endless_blob_of_a_member_ends_when_its_client_has_left(
    network: HostileNetwork, tmp_path: Path, workers: int
) -> None:
    """As one of a registry does; see `test_cache_room` for the share of the cache that it takes at most."""
    has_ended = threading.Event()

    def send(connection: socket.socket) -> None:
        try:
            _endless(connection)
        except OSError:
            has_ended.set()

    with fleet_of(send, network, tmp_path, workers) as (daemon, member):
        digest = network.good.put_blob("team/app", owned_by(member.name, daemon))
        with daemon.client.stream("GET", f"{GOOD}/v2/team/app/blobs/{digest}", {}) as response:
            assert len(response.read(4 << 20)) == 4 << 20
        assert has_ended.wait(30)


def test_wrong_content_is_never_delivered_whole(network: HostileNetwork, tmp_path: Path, workers: int) -> None:
    """That pull breaks off. The next one comes from upstream, because the member is not asked any more."""

    def attack(connection: socket.socket) -> None:
        connection.sendall(f"{HEAD}Content-Length: {SIZE}\r\n\r\n".encode() + b"\1" * SIZE)

    with fleet_of(attack, network, tmp_path, workers) as (daemon, member):
        data = owned_by(member.name, daemon)
        digest = network.good.put_blob("team/app", data)
        url = f"{GOOD}/v2/team/app/blobs/{digest}"
        with suppress(http.client.IncompleteRead, OSError):
            response = daemon.client.get(url)
            assert response.status != 200 or response.body == data
        for _ in range(2 * workers):  # each process learns it by itself
            with suppress(http.client.IncompleteRead, OSError):
                response = daemon.client.get(url)
                if response.status == 200 and response.body == data:
                    break
        else:
            pytest.fail("the blob never came")


def _request(daemon: MemberDaemon, source: str, port: int, path: str, fields: Mapping[str, str]) -> BufferedResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, source_address=(source, 0), timeout=20)
    try:
        connection.request("GET", path, headers=dict(fields))
        return read_response(connection.getresponse())
    finally:
        connection.close()


def test_an_address_in_a_field_makes_no_member(network: HostileNetwork, tmp_path: Path, workers: int) -> None:
    """The stranger is in a network of TRUSTED_PROXIES, and names the address of a member."""
    data = b"public"
    digest = network.good.put_blob("team/app", data)
    with fleet_of(_nothing, network, tmp_path, workers, TRUSTED_PROXIES="127.0.0.0/8") as (daemon, member):
        address = member.name.rpartition(":")[0]
        hop = f'docker-registry-proxy;from="{member.name}";login=configured;as=owner'
        forwarded: list[dict[str, str]] = [
            {"X-Forwarded-For": address}, {"Forwarded": f"for={address}"}, {"X-Real-IP": address},
            {"X-Forwarded-For": f"{address}, {address}"}, {"Client-IP": address}, {},
        ]  # fmt: skip
        path = f"/v2/team/app/blobs/{digest}?ns=good.test"
        for port in (daemon.port, daemon.registry_port):
            for fields in forwarded:
                response = _request(daemon, "127.0.0.1", port, path, {**fields, "CDN-Loop": hop})
                assert "x-fleet-answer" not in response.headers, (port, fields)
        # The same from the address itself: the field counts there, so that the test proves something.
        response = _request(daemon, address, daemon.port, path, {"CDN-Loop": hop})
        assert response.headers["x-fleet-answer"] == "own"  # it has no such login


HOPS = {
    "lines": 'docker-registry-proxy;from="a\r\n b";login=none;as=owner',
    "folded": 'docker-registry-proxy;from="\r\n\tX-Evil: 1";login=none;as=owner',
    "nul": 'docker-registry-proxy;from="\0";login=none;as=owner',
    "huge": 'docker-registry-proxy;from="' + "a" * 60_000 + '";login=none;as=owner',
    "many": "docker-registry-proxy;" * 2_000,
    "many fields": "\r\nCDN-Loop: ".join(["docker-registry-proxy;from=a"] * 90),
    "commas": "," * 60_000,
}


@pytest.mark.parametrize("hop", HOPS.values(), ids=HOPS)
def test_malformed_fields_make_no_member(network: HostileNetwork, tmp_path: Path, workers: int, hop: str) -> None:
    digest = network.good.put_blob("team/app", b"public")
    with fleet_of(_nothing, network, tmp_path, workers) as (daemon, _):
        request = f"GET /v2/team/app/blobs/{digest}?ns=good.test HTTP/1.1\r\nHost: x\r\nCDN-Loop: {hop}\r\n\r\n"
        response = send_raw_request(daemon.port, request.encode())
        assert response.status in (200, 400, 431)
        assert not {"x-fleet-answer", "x-evil"} & {name.lower() for name in response.headers}
