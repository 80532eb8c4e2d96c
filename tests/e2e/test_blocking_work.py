"""Blocking work that one client causes - name look-ups, password hashes - does not delay other clients.

The tests compare the order of responses, not times: the requests that must not wait are answered while those that block
are not.
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
import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST
from tests.e2e.harness.upstreams import FAKE, Upstreams

SILENT_NAME_SERVER = """
import socket, time
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(3600)
"""

PROJECT = Path(__file__).parents[2]


@contextmanager
def waiting_clients(daemon: TwistdDaemon, requests: list[str]) -> Iterator[list[socket.socket]]:
    """Send each request on a connection of its own, and keep the connections open."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", daemon.port), timeout=60)) for _ in requests
        ]
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request.encode())
        yield clients


def unanswered(clients: list[socket.socket]) -> int:
    """Return the number of clients that have received nothing."""
    return len(clients) - len(select.select(clients, [], [], 0)[0])


def check_other_requests(daemon: TwistdDaemon, upstreams: Upstreams, name: str, **headers: str) -> None:
    """Pull a blob twice (cold, then cached), and push one to the hosted registry."""
    data = images.random_bytes(300_000, name)
    url = f"{FAKE}/v2/{name}/blobs/{upstreams.fake.put_blob(name, data)}"
    assert [daemon.client.get(url).cache_status for _ in range(2)] == ["MISS", "HIT"]
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    push = f"http://{HOSTED_REGISTRY_HOST}/v2/{name}/blobs/uploads/?digest={digest}"
    response = daemon.client.request("POST", push, headers, data)
    assert response.status == 201, response


@pytest.mark.parametrize("workers", ["1", "2"])
def test_silent_name_server(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path, workers: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SILENT_NAME_SERVER)
    daemon = start_daemon(PYTHONPATH=os.pathsep.join((str(tmp_path), str(PROJECT))), WORKERS=workers)
    requests = [f"CONNECT name-{number}.example:443 HTTP/1.1\r\nHost: x\r\n\r\n" for number in range(200)]
    requests += [f"GET http://plain-{number}.example/ HTTP/1.1\r\nHost: x\r\n\r\n" for number in range(50)]
    with waiting_clients(daemon, requests) as clients:
        check_other_requests(daemon, upstreams, f"dns/{workers}")
        assert unanswered(clients) == len(clients)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_wrong_passwords(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path, workers: str) -> None:
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(f"alice:{bcrypt.hashpw(b'wonder', bcrypt.gensalt(12)).decode()}\n")
    daemon = start_daemon(HTPASSWD_FILE=str(htpasswd), WORKERS=workers)
    login = basic_authorization("alice", "wonder")
    for number in range(4 * int(workers)):  # each process verifies the login once
        check_other_requests(daemon, upstreams, f"passwords/{workers}/{number}", Authorization=login)
    requests = [
        f"GET http://{HOSTED_REGISTRY_HOST}/v2/ HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\n"
        f"Authorization: {basic_authorization('alice', f'wrong {number}')}\r\n\r\n"
        for number in range(400)  # 0.2 s of CPU each
    ]
    with waiting_clients(daemon, requests) as clients:
        check_other_requests(daemon, upstreams, f"passwords/{workers}/others", Authorization=login)
        assert unanswered(clients) > len(clients) // 2
