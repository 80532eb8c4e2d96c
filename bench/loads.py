"""What clients in Python do to a server, where they need not be fast: `generator` has those that do.

A job prepares, calls `start`, which returns when all clients are ready, and works.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from bench.content import Resource
from bench.targets import Target, read_body, read_head

Start = Callable[[], None]

_BUFFER = 256 * 1024
_SIP = 10 * 1000  # bytes that a slow client takes each second


def download(start: Start, target: Target, blob: Resource) -> str:
    """Read a whole blob on a connection that is open; return the head of the answer."""
    buffer = bytearray(_BUFFER)
    with target.open(target.context()) as connection:
        start()
        connection.sendall(target.request(blob.path))
        length, received = read_head(connection, buffer)
        head = buffer[:length].decode("latin-1")
        read_body(connection, buffer, blob.size - received)
    return head


def sip(start: Start, target: Target, blob: Resource, connections: int, seconds: float) -> None:
    """Ask for a blob on many connections, and take little of it: `_SIP` bytes a second on each."""
    context, request, buffer = target.context(), target.request(blob.path), bytearray(_SIP)
    open_connections = [target.open(context) for _ in range(connections)]
    start()
    for connection in open_connections:
        connection.send(request)
    begun = time.monotonic()
    for second in range(int(seconds)):
        time.sleep(max(0, begun + second - time.monotonic()))
        for connection in open_connections:
            if not connection.recv_into(buffer):
                raise ConnectionError("the server hung up on a slow client")
    _close(open_connections)


def idle(start: Start, target: Target, blob: Resource, connections: int, seconds: float) -> None:
    """Ask once on many connections, and leave them open."""
    context, request, buffer = target.context(), target.request(blob.path), bytearray(_BUFFER)
    open_connections = [target.open(context) for _ in range(connections)]
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
