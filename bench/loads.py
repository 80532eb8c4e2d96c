"""What clients do to a server. A job prepares, calls `start`, which returns when all clients are ready, and works."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from attrs import frozen

from bench.targets import Target, read_body, read_head

Start = Callable[[], None]

_BUFFER = 256 * 1024
_SIP = 10 * 1000  # bytes that a slow client takes each second


@frozen
class Resource:
    """What is asked for; `size` is in bytes."""

    path: str
    size: int


@frozen
class Handshakes:
    """How many connections were made, and how many of them resumed a session."""

    count: int
    resumed: int


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


def small_requests(start: Start, target: Target, blob: Resource, connections: int, seconds: float) -> int:
    """Ask for a small blob on each of several connections again and again; return how many answers came.

    Nothing is pipelined: a connection's next request goes out when its answer is whole. The requests go out on all
    connections before the answers are read, so that no poll is needed to keep the server supplied.
    """
    context, request, buffer = target.context(), target.request(blob.path), bytearray(_BUFFER)
    open_connections = [target.open(context) for _ in range(connections)]
    start()
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for connection in open_connections:
            connection.send(request)
        for connection in open_connections:
            _, received = read_head(connection, buffer)
            read_body(connection, buffer, blob.size - received)
        count += connections
    _close(open_connections)
    return count


def new_connections(start: Start, target: Target, blob: Resource, seconds: float, *, resume: bool) -> Handshakes:
    """Connect, ask for a small blob once and hang up, again and again."""
    context, request, buffer = target.context(), target.request(blob.path), bytearray(_BUFFER)
    session = _visit(target, context, None, request, blob, buffer)[0] if resume else None
    start()
    count, resumed, end = 0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        found, reused = _visit(target, context, session, request, blob, buffer)
        count += 1
        resumed += reused
        session = found if resume else None
    return Handshakes(count, resumed)


def _visit(
    target: Target,
    context: ssl.SSLContext,
    session: ssl.SSLSession | None,
    request: bytes,
    blob: Resource,
    buffer: bytearray,
) -> tuple[ssl.SSLSession | None, bool]:
    """Return the session that the server gave, and whether `session` was good for it."""
    with target.open(context, session) as connection:
        connection.send(request)
        _, received = read_head(connection, buffer)
        read_body(connection, buffer, blob.size - received)
        return connection.session, bool(connection.session_reused)


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
