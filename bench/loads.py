"""What clients in Python do to a server, where they need not be fast: `generator` has those that do.

A job prepares, calls `start`, which returns when all clients are ready, and works.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from bench.content import Resource
from bench.endpoints import Endpoint, read_body, read_head

WaitForStart = Callable[[], None]

_BUFFER = 256 * 1024
_SLOW_READ_SIZE = 10 * 1000  # bytes that a slow client takes each second


def download(start: WaitForStart, endpoint: Endpoint, blob: Resource) -> str:
    """Read a whole blob on a connection that is open; return the head of the answer."""
    buffer = bytearray(_BUFFER)
    with endpoint.connect(endpoint.tls_context()) as connection:
        start()
        connection.sendall(endpoint.get_request(blob.path))
        length, received = read_head(connection, buffer)
        head = buffer[:length].decode("latin-1")
        read_body(connection, buffer, blob.size - received)
    return head


def read_slowly(start: WaitForStart, endpoint: Endpoint, blob: Resource, connections: int, seconds: float) -> None:
    """Ask for a blob on many connections, and take little of it: `_SIP` bytes a second on each."""
    context, request, buffer = endpoint.tls_context(), endpoint.get_request(blob.path), bytearray(_SLOW_READ_SIZE)
    open_connections = [endpoint.connect(context) for _ in range(connections)]
    start()
    for connection in open_connections:
        connection.send(request)
    started = time.monotonic()
    for second in range(int(seconds)):
        time.sleep(max(0, started + second - time.monotonic()))
        for connection in open_connections:
            if not connection.recv_into(buffer):
                raise ConnectionError("the server hung up on a slow client")
    _close(open_connections)


def hold_connections(start: WaitForStart, endpoint: Endpoint, blob: Resource, connections: int, seconds: float) -> None:
    """Ask once on many connections, and leave them open."""
    context, request, buffer = endpoint.tls_context(), endpoint.get_request(blob.path), bytearray(_BUFFER)
    open_connections = [endpoint.connect(context) for _ in range(connections)]
    start()
    for connection in open_connections:
        connection.send(request)
        _, received = read_head(connection, buffer)
        read_body(connection, buffer, blob.size - received)
    time.sleep(seconds)
    _close(open_connections)


def _close(connections: list[ssl.SSLSocket]) -> None:
    for connection in connections:
        connection.close()
