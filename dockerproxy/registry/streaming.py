"""Content on its way to a client: read and written a piece at a time, as fast as the client takes it."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater

from dockerproxy.http.request import Request
from dockerproxy.oci.content import Content

_MIN_CHUNK = 16 * 1024
_INITIAL_CHUNK = (
    128 * 1024
)  # what a client that has taken nothing yet is given of it (`SocketTransport`), and a small layer
_MAX_CHUNK = 1024 * 1024  # CPU seconds per GB in plain HTTP: 0.137, with 512 KiB 0.153
_FAST = 0.02  # seconds in which a client takes a piece, to be given a larger one
_SLOW = 0.2

_UNBOUNDED = 1 << 62


class ChunkSizer:
    """How large the next piece is, in bytes.

    Large pieces cost least for each byte; but what a slow client does not take of one was read for nothing, or, where
    it goes out as a chunk, waits in memory. So it grows while pieces are taken quickly and shrinks when they are not.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = _INITIAL_CHUNK

    def record(self, size: int, seconds: float) -> None:
        """Note how much was taken of the last piece, and how long the client took for that."""
        if seconds < _FAST:
            self.size = min(_MAX_CHUNK, max(_MIN_CHUNK, size * 2))
        elif seconds > _SLOW:
            self.size = max(_MIN_CHUNK, self.size // 4)


async def stream_content(request: Request, content: Content, start: int, stop: int | None, clock: Any) -> None:
    """Send the bytes from `start` to before `stop` (None: to the end) as the body that was announced, and finish.

    Raise `ClientGone`, or what reading raised. The reactor gets its turn after each piece.
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
    """Send bytes from `offset` on, and return how many; 0 at the content's end.

    What the client does not take is read again when it will be, and does not wait in memory.
    """
    source = await content.sendfile_source(offset, max_bytes) if request.can_sendfile else None
    if source is not None:
        return request.sendfile(source[0], offset, source[1]) if source[1] else 0
    data = await content.read(offset, max_bytes)
    return request.write_some(data) if data else 0
