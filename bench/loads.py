"""Jobs of the clients in Python, which need not be fast. If the load has to be fast, `generator` creates it.

A job first prepares its connections. Then it calls `start`, which returns when all clients are ready, and begins.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from bench.content import Resource
from bench.endpoints import Endpoint, read_body, read_head

WaitForStart = Callable[[], None]

_BUFFER = 256 * 1024
_SLOW_READ_SIZE = 10 * 1000  # bytes that a slow client reads each second


def download(start: WaitForStart, endpoint: Endpoint, blob: Resource) -> str:
    """Read a whole blob on an open connection; return the head of the response."""
    buffer = bytearray(_BUFFER)
    with endpoint.connect(endpoint.tls_context()) as connection:
        start()
        connection.sendall(endpoint.get_request(blob.path))
        length, received = read_head(connection, buffer)
        head = buffer[:length].decode("latin-1")
        read_body(connection, buffer, blob.size - received)
    return head


def read_slowly(start: WaitForStart, endpoint: Endpoint, blob: Resource, connections: int, seconds: float) -> None:
    """Request a blob on many connections, and read only `_SLOW_READ_SIZE` bytes a second on each."""
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
                raise ConnectionError("the server closed the connection of a slow client")
    _close(open_connections)


def hold_connections(start: WaitForStart, endpoint: Endpoint, blob: Resource, connections: int, seconds: float) -> None:
    """Request a blob once on each of many connections, and leave the connections open."""
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
