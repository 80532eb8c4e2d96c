"""Content on its way to a client: read and written a piece at a time, as fast as the client takes it."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater

from dockerproxy.http.request import Request
from dockerproxy.oci.contents import Content

_SMALLEST = 16 * 1024
_FIRST = 128 * 1024  # what a client that has taken nothing yet is given of it (`SocketTransport`), and a small layer
_LARGEST = 1024 * 1024  # CPU seconds per GB in plain HTTP: 0.137, with 512 KiB 0.153
_QUICK = 0.02  # seconds in which a client takes a piece, to be given a larger one
_SLOW = 0.2

_UNBOUNDED = 1 << 62


class Pace:
    """How large the next piece is, in bytes.

    Large pieces cost least for each byte; but what a slow client does not take of one was read for nothing, or, where
    it goes out as a chunk, waits in memory. So it grows while pieces are taken quickly and shrinks when they are not.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = _FIRST

    def took(self, size: int, seconds: float) -> None:
        """Note how much was taken of the last piece, and how long the client took for that."""
        if seconds < _QUICK:
            self.size = min(_LARGEST, max(_SMALLEST, size * 2))
        elif seconds > _SLOW:
            self.size = max(_SMALLEST, self.size // 4)


async def send(request: Request, content: Content, start: int, stop: int | None, clock: Any) -> None:
    """Send the bytes from `start` to before `stop` (None: to the end) as the body that was announced, and finish.

    Raise `ClientGone`, or what reading raised. The reactor gets its turn after each piece.
    """
    pace, offset, end = Pace(), start, _UNBOUNDED if stop is None else stop
    while offset < end:
        taken = await _send_piece(request, content, offset, min(pace.size, end - offset))
        if not taken:
            break
        offset += taken
        if offset >= end:
            break
        began = clock.seconds()
        await request.drain()
        pace.took(taken, clock.seconds() - began)
        if taken >= _SMALLEST:
            await deferLater(clock, 0)
    request.finish()


async def _send_piece(request: Request, content: Content, offset: int, at_most: int) -> int:
    """Send bytes from `offset` on, and return how many; 0 at the content's end.

    What the client does not take is read again when it will be, and does not wait in memory.
    """
    found = await content.in_file(offset, at_most) if request.can_sendfile else None
    if found is not None:
        return request.sendfile(found[0], offset, found[1]) if found[1] else 0
    data = await content.read(offset, at_most)
    return request.write_some(data) if data else 0
