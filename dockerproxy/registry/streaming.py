"""Streams a blob to a client, in chunks sized by the speed of the client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.task import deferLater

from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.request import Request
from dockerproxy.oci.content import Content
from dockerproxy.oci.ranges import ByteRange, Segment

_MIN_CHUNK = 16 * 1024
_INITIAL_CHUNK = 128 * 1024  # a client's first bytes (see `SocketTransport`), and the size of a small layer
_MAX_CHUNK = 1024 * 1024  # CPU seconds per GB in plain HTTP: 0.137, with 512 KiB 0.153
_FAST = 0.02  # seconds; a client that takes a chunk in less gets a larger one
_SLOW = 0.2

WHOLE_OF_UNKNOWN_SIZE = ByteRange(0, 1 << 62)

_MAX_GATHERED = 32 * 1024  # bytes of short segments that are sent at once


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


async def stream_content(request: Request, content: Content, segments: Iterable[Segment], clock: Any) -> None:
    """Send `segments` as the announced body, and finish the response.

    Raise `ClientDisconnected`, or the error of a read. The reactor runs after every chunk.
    """
    sizer, gathered = ChunkSizer(), b""
    for segment in segments:
        if isinstance(segment, bytes):
            gathered += segment
            continue
        is_short = segment.size <= _MIN_CHUNK
        if is_short:
            gathered += await _read_range(content, segment)
        if gathered and (not is_short or len(gathered) >= _MAX_GATHERED):
            await _send_gathered(request, gathered, clock)
            gathered = b""
        if not is_short and not await _stream_range(request, content, segment, sizer, clock):
            break
    if gathered:
        request.write(gathered)
    request.finish()


async def read_segments(content: Content, segments: Iterable[Segment]) -> bytes:
    """Return all the bytes of `segments`. Raise `UpstreamBroken` if the content ends early, or the error of a read."""
    parts = []
    for segment in segments:
        parts.append(segment if isinstance(segment, bytes) else await _read_range(content, segment))
    return b"".join(parts)


async def _read_range(content: Content, byte_range: ByteRange) -> bytes:
    offset, stop = byte_range.start, byte_range.stop
    data = b""
    while offset < stop:
        chunk = await content.read(offset, stop - offset)
        if not chunk:
            raise UpstreamBroken(f"the blob ends {stop - offset} bytes early")
        offset += len(chunk)
        data = data + chunk if data else bytes(chunk)
    return data


async def _send_gathered(request: Request, data: bytes, clock: Any) -> None:
    request.write(data)
    await request.drain()
    await deferLater(clock, 0)


async def _stream_range(
    request: Request, content: Content, byte_range: ByteRange, sizer: ChunkSizer, clock: Any
) -> bool:
    """Send the bytes of `byte_range`. Return False if the content ends before."""
    offset, stop = byte_range.start, byte_range.stop
    while True:
        written = await _send_chunk(request, content, offset, min(sizer.size, stop - offset))
        if not written:
            return False
        offset += written
        if offset >= stop:
            return True
        start_time = clock.seconds()
        await request.drain()
        sizer.record(written, clock.seconds() - start_time)
        if written >= _MIN_CHUNK:
            await deferLater(clock, 0)


async def _send_chunk(request: Request, content: Content, offset: int, max_bytes: int) -> int:
    """Send bytes from `offset` on, and return their number; 0 at the end of the content.

    Bytes that the client does not take now are read again later, so that they do not wait in memory.
    """
    source = await content.sendfile_source(offset, max_bytes) if request.can_sendfile else None
    if source is not None:
        return request.sendfile(source[0], offset, source[1]) if source[1] else 0
    data = await content.read(offset, max_bytes)
    return request.write_some(data) if data else 0
