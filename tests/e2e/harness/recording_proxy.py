"""A simple proxy that records the requests it forwards.

It takes the part of a company's proxy, and shows that the clients and the upstreams work together without the daemon.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from tests.e2e.harness.threaded_server import ThreadedServer


class RecordingProxy(ThreadedServer):
    """Connects only to the targets in `addresses` ("host:port" to a port of 127.0.0.1), and records the requests."""

    def __init__(self, addresses: Mapping[str, int]) -> None:
        super().__init__()
        self.connected_targets: list[str] = []
        self.request_heads: list[bytes] = []
        self._addresses = addresses

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            head = b""
            while b"\r\n\r\n" not in head:
                chunk = client.recv(65536)
                if not chunk:
                    return
                head += chunk
            self.request_heads.append(head.partition(b"\r\n\r\n")[0])
            method, target, rest = head.split(b" ", 2)
            address = target.decode() if method == b"CONNECT" else urlsplit(target.decode()).netloc
            address = address if ":" in address else f"{address}:80"
            self.connected_targets.append(address)
            if address not in self._addresses:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self._addresses[address])) as server:
                if method == b"CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    server.sendall(head.partition(b"\r\n\r\n")[2])
                else:
                    # Only the first request of a connection is rewritten. "Connection: close" prevents a second one.
                    path = target.decode().partition("://")[2].partition("/")[2]
                    fields = rest.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
                    server.sendall(method + b" /" + path.encode() + b" " + fields)
                upload_thread = threading.Thread(target=_copy, args=(client, server), daemon=True)
                upload_thread.start()
                _copy(server, client)
                upload_thread.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(262_144):
            sink.sendall(chunk)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
