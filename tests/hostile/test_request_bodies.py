"""A client without a login sends many bodies and leaves them unfinished. They take a bounded amount of memory.

The bounds of the resident set are the daemon's budget, and as much again for what malloc keeps: about 1.7 times what is
measured with the budget. Each comment says what is measured in one process without it.
"""

from __future__ import annotations

import hashlib
import json
import selectors
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.hostile.conftest import StartRegistryDaemon
from tests.hostile.processes import client_connection, connections, debug_bounds, descriptors, resident_bytes

__all__ = ["descriptors"]

MIB = 1024 * 1024
ATTACKER = "127.0.0.2"
SHARE = 32 * MIB  # of one client in one process


def upload(number: int) -> str:
    return f"POST /v2/attack/{number}/blobs/uploads/?digest=sha256:{'0' * 64}"


def manifest(number: int) -> str:
    return f"PUT /v2/attack/{number}/manifests/latest"


@contextmanager
def unfinished_requests(
    port: int, lines: list[str], size: int, context: ssl.SSLContext | None = None, sent: int | None = None
) -> Iterator[list[socket.socket]]:
    """Send requests with bodies of `size` bytes, all at the same time, but only `sent` bytes of each body.

    A connection is left alone when its server reads nothing more for a second, or responds.
    """
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        clients = [stack.enter_context(client_connection(port, ATTACKER, context)) for _ in lines]
        remaining = {}
        for line, client in zip(lines, clients, strict=True):
            head = f"{line} HTTP/1.1\r\nHost: {HOSTED_REGISTRY_HOST}\r\nContent-Length: {size}\r\n\r\n"
            client.sendall(head.encode())
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
            remaining[client] = size - 1 if sent is None else sent
        piece = bytes(256 * 1024)
        while events := selector.select(1):
            for key, _ in events:
                client = key.fileobj
                assert isinstance(client, socket.socket)
                try:
                    remaining[client] -= client.send(piece[: remaining[client]])
                except (BlockingIOError, ssl.SSLWantWriteError):
                    continue
                except OSError:  # it was refused
                    remaining[client] = 0
                if not remaining[client]:
                    selector.unregister(client)
        yield clients


def check_push(daemon: RegistryDaemon, name: str) -> None:
    """Push a blob and a manifest of another client."""
    data = name.encode() * 50_000
    url = f"http://{HOSTED_REGISTRY_HOST}/v2/{name}"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    response = daemon.client.request("POST", f"{url}/blobs/uploads/?digest={digest}", body=data)
    assert response.status == 201, response
    media_type = "application/vnd.oci.image.manifest.v1+json"
    descriptor = {"mediaType": "application/octet-stream", "digest": digest, "size": len(data)}
    content = {"schemaVersion": 2, "mediaType": media_type, "config": descriptor, "layers": []}
    body = json.dumps(content).encode()
    response = daemon.client.request("PUT", f"{url}/manifests/latest", {"Content-Type": media_type}, body)
    assert response.status == 201, response


def test_many_half_uploads(start_daemon: StartRegistryDaemon, workers: int) -> None:
    """Each has sent all but a byte of what the daemon writes at a time."""
    daemon = start_daemon()
    before, count = resident_bytes(daemon), 600 * workers
    with unfinished_requests(daemon.http_port, [upload(number) for number in range(count)], 300_000, sent=250_000):
        used = debug_bounds(daemon)["bytes of unread requests"]
        assert sum(bound["used"] for bound in used) <= SHARE * workers + count * 32 * 1024
        check_push(daemon, "team/others")
        # A share, and for each connection its objects and two small pieces of its body; without the budget 158 MB
        assert resident_bytes(daemon) - before < 2 * SHARE * workers + count * 64 * 1024
    wait_until(
        lambda: all(not bound["clients"] for bound in debug_bounds(daemon)["bytes of unread requests"]),
        "no body is in memory",
    )


def test_fast_uploads_over_tls(start_daemon: StartRegistryDaemon, workers: int) -> None:
    """The daemon decrypts up to half a MiB at a time if memory is plentiful."""
    daemon = start_daemon()
    context = daemon.client_context
    context.check_hostname = False
    before, count = resident_bytes(daemon), 400 * workers
    lines = [upload(number) for number in range(count)]
    with unfinished_requests(daemon.registry_port, lines, 10 * MIB, context, sent=MIB):
        check_push(daemon, "team/tls")
        # As above, and the buffers of OpenSSL, which is in the middle of a record; without the budget 403 MB
        assert resident_bytes(daemon) - before < 3 * SHARE * workers + count * 64 * 1024


def test_manifests_that_are_not_finished(start_daemon: StartRegistryDaemon, workers: int) -> None:
    """The daemon needs a manifest as a whole. It refuses long ones if others of the client take too much memory."""
    daemon = start_daemon()
    before = resident_bytes(daemon)
    lines = [manifest(number) for number in range(100)]
    with unfinished_requests(daemon.http_port, lines, 4_000_000) as clients:
        check_push(daemon, "team/manifests")
        # A share, and the manifest that is parsed; without the budget 402 MB, of all processes together
        assert resident_bytes(daemon) - before < 2 * SHARE * workers + 20 * MIB
        answered = [client for client in clients if _is_readable(client)]
        assert len(answered) >= 100 - workers * (SHARE // 4_000_000 + 1)
        answered[0].settimeout(20)
        received = answered[0].recv(65536)
        assert received.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in received.lower()
        assert b"bytes of unread requests that one client may have" in received


def test_heads_that_are_not_finished(start_daemon: StartRegistryDaemon, workers: int) -> None:
    """A head has up to 32 KiB. Those of more than 4 KiB count for the client."""
    daemon = start_daemon()
    before = resident_bytes(daemon)
    head = b"GET / HTTP/1.1\r\nX: " + bytes(b"x" * 32_000)
    with connections(daemon.http_port, 2400 * workers, ATTACKER, head) as clients:
        check_push(daemon, "team/heads")
        wait_until(lambda: any(map(_is_readable, clients)), "a head is refused")
        [refused, *_] = [client for client in clients if _is_readable(client)]
        received = refused.recv(65536)
        assert received.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 1\r\n" in received
        assert b"bytes of unread requests that one client may have" in received
        used = debug_bounds(daemon)["bytes of unread requests"]
        assert all(bound["used"] <= SHARE + MIB for bound in used)
        # A share, and 3 KiB for each connection; without the budget 84 MB
        assert resident_bytes(daemon) - before < 2 * SHARE * workers


def _is_readable(client: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        return bool(selector.select(0))
