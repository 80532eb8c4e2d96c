"""A client without a login causes work that blocks threads: name look-ups without an answer, and wrong passwords.

Other clients are served meanwhile, and the daemon stops without waiting for work that nobody wants any more.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import bcrypt

from tests.e2e.harness.daemon import CLEAN_EXIT_STATUSES
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import client_connection, debug_bounds

PROJECT = Path(__file__).parents[2]
ATTACKER, ACCOMPLICE = "127.0.0.2", "127.0.0.3"
STOP_TIMEOUT = 15  # seconds, in which work for an hour is not done

SILENT_NAME_SERVER = """
import socket, time
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(3600)
"""


@contextmanager
def waiting_clients(daemon: RegistryDaemon, requests: list[str]) -> Iterator[list[socket.socket]]:
    """Send each request on a connection of its own, from two addresses in turn, and keep the connections open."""
    with ExitStack() as stack:
        clients = []
        for number, request in enumerate(requests):
            client = stack.enter_context(client_connection(daemon.port, (ATTACKER, ACCOMPLICE)[number % 2]))
            client.sendall(request.encode())
            clients.append(client)
        yield clients


def unanswered(clients: list[socket.socket]) -> int:
    """Return the number of clients that have received nothing."""
    return len(clients) - len(select.select(clients, [], [], 0)[0])


def check_others(daemon: RegistryDaemon, network: HostileNetwork, name: str, **headers: str) -> None:
    """Pull a blob twice (cold, then cached), and push one to the hosted registry."""
    data = name.encode() * 30_000
    url = f"{GOOD}/v2/{name}/blobs/{network.good.put_blob(name, data)}"
    assert [daemon.client.get(url).cache_status for _ in range(2)] == ["MISS", "HIT"]
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    push = f"http://{HOSTED_REGISTRY_HOST}/v2/{name}/blobs/uploads/?digest={digest}"
    response = daemon.client.request("POST", push, headers, data)
    assert response.status == 201, response


def lookup_requests() -> list[str]:
    """Return requests for names that have no answer: some for other names each, some for the same one."""
    hosts = [f"n{number}.slow.test" for number in range(200)] + ["same.slow.test"] * 50
    connects = [f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}\r\n\r\n" for host in hosts]
    plain = [f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n" for host in hosts[150:210]]
    return connects + plain


def test_names_without_an_answer(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SILENT_NAME_SERVER)
    daemon = start_daemon(PYTHONPATH=os.pathsep.join((str(tmp_path), str(PROJECT))))
    with waiting_clients(daemon, lookup_requests()) as clients:
        for number in range(2 * workers):  # in each process
            check_others(daemon, network, f"team/names/{number}")
        assert unanswered(clients) == len(clients)
        bounds = debug_bounds(daemon)["running name look-ups"]
        assert all(set(bound["clients"]) <= {ATTACKER, ACCOMPLICE} for bound in bounds)
        assert all(0 < bound["used"] <= 12 for bound in bounds), "threads for registries are free"
    assert daemon.stop(STOP_TIMEOUT) in CLEAN_EXIT_STATUSES


def test_wrong_passwords(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, tmp_path: Path, workers: int
) -> None:
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(f"alice:{bcrypt.hashpw(b'wonder', bcrypt.gensalt(12)).decode()}\n")
    daemon = start_daemon(HTPASSWD_FILE=str(htpasswd))
    login = basic_authorization("alice", "wonder")
    for number in range(4 * workers):  # each process verifies the login once
        check_others(daemon, network, f"team/passwords/{number}", Authorization=login)
    requests = [
        f"GET http://{HOSTED_REGISTRY_HOST}/v2/ HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n"
        f"Authorization: {basic_authorization('alice', f'wrong {number}')}\r\n\r\n"
        for number in range(400)  # 0.2 s of CPU each
    ]
    with waiting_clients(daemon, requests) as clients:
        check_others(daemon, network, "team/passwords/others", Authorization=login)
        assert unanswered(clients) > len(clients) // 2
    assert daemon.stop(STOP_TIMEOUT) in CLEAN_EXIT_STATUSES
