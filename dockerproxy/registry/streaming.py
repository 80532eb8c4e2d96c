"""Streams a blob to a client, in chunks sized by the speed of the client."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater

from dockerproxy.http.request import Request
from dockerproxy.oci.content import Content

_MIN_CHUNK = 16 * 1024
_INITIAL_CHUNK = 128 * 1024  # a client's first bytes (see `SocketTransport`), and the size of a small layer
_MAX_CHUNK = 1024 * 1024  # CPU seconds per GB in plain HTTP: 0.137, with 512 KiB 0.153
_FAST = 0.02  # seconds; a client that takes a chunk in less gets a larger one
_SLOW = 0.2

_UNBOUNDED = 1 << 62


class ChunkSizer:
    """Chooses the size of the next chunk in bytes.

    Large chunks cost least per byte. But if a slow client does not take all of a chunk, the rest was read for nothing
    or, in chunked coding, waits in memory. The size therefore grows while chunks are taken quickly, and shrinks
    otherwise.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = _INITIAL_CHUNK

    def record(self, size: int, seconds: float) -> None:
        """Record that the client took `size` bytes of the last chunk in `seconds`."""
        if seconds < _FAST:
            self.size = min(_MAX_CHUNK, max(_MIN_CHUNK, size * 2))
        elif seconds > _SLOW:
            self.size = max(_MIN_CHUNK, self.size // 4)


async def stream_content(request: Request, content: Content, start: int, stop: int | None, clock: Any) -> None:
    """Send the bytes from `start` up to `stop` (None: to the end) as the announced body, and finish the response.

    Raise `ClientDisconnected`, or the error of a read. The reactor runs after every chunk.
    """
    sizer, offset, end = ChunkSizer(), start, _UNBOUNDED if stop is None else stop
    while offset < end:
        written = await _send_chunk(request, content, offset, min(sizer.size, end - offset))
        if not written:
            break
        offset += written
        if offset >= end:
            break
        start_time = clock.seconds()
        await request.drain()
        sizer.record(written, clock.seconds() - start_time)
        if written >= _MIN_CHUNK:
            await deferLater(clock, 0)
    request.finish()


async def _send_chunk(request: Request, content: Content, offset: int, max_bytes: int) -> int:
    """Send bytes from `offset` on, and return their number; 0 at the end of the content.

    Bytes that the client does not take now are read again later, so that they do not wait in memory.
    """
    source = await content.sendfile_source(offset, max_bytes) if request.can_sendfile else None
    if source is not None:
        return request.sendfile(source[0], offset, source[1]) if source[1] else 0
    data = await content.read(offset, max_bytes)
    return request.write_some(data) if data else 0
