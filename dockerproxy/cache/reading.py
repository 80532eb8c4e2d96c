"""A blob under way as one reader has it: out of the growing file, and where that cannot go on, from upstream."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dockerproxy.cache.download import Download
from dockerproxy.cache.origin import Origin
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import UpstreamBroken, UpstreamError
from dockerproxy.oci.contents import Piece
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import read_blocking, read_cached

if TYPE_CHECKING:
    from hashlib import _Hash

    from dockerproxy.cache.flights import Flight

HELD_BACK = 1
"""Bytes at the end of a blob that no reader gets before it is verified: without them no client takes it for whole."""


class FlightContent:
    """A blob under way, read from any offset; each reader has one of its own."""

    def __init__(self, reactor: Any, flight: Flight, fd: int, origin: Origin) -> None:
        self._reactor = reactor
        self._flight = flight
        self._fd = fd
        self._origin = origin
        self._rest: _Rest | None = None
        self.digest = flight.digest

    @property
    def size(self) -> int | None:
        """The blob's length in bytes, or None while nobody knows it."""
        return self._flight.size

    async def read(self, offset: int, at_most: int) -> Piece:
        """Return bytes from `offset` on, at least one; ``b""`` at the end. Raise `UpstreamError`."""
        flight = self._flight
        while True:
            available = min(flight.readable - offset, at_most)
            if available > 0:
                return flight.recent.get(offset, available) or await self._read_file(offset, available)
            if flight.landed:
                return b""
            if flight.failure is not None:
                return await self._read_on(offset, at_most)
            await flight.changed()

    async def in_file(self, offset: int, at_most: int) -> tuple[int, int] | None:
        """Return None: it is still arriving."""
        return None

    async def settled(self) -> None:
        """Wait until the flight has ended; raise where the content cannot be had."""
        flight = self._flight
        while not flight.landed and flight.failure is None:
            await flight.changed()
        if isinstance(flight.failure, UpstreamError):
            raise flight.failure

    def close(self) -> None:
        """Give back the descriptor, and any connection of this reader's own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._rest is not None:
            self._rest.close()

    async def _read_file(self, offset: int, size: int) -> bytes | bytearray:
        data: bytes | bytearray | None = read_cached(self._fd, offset, size)
        if data is None:
            data = await in_thread(self._reactor, read_blocking, self._fd, offset, size)
        if not data:
            # Cut off by another's hand. It must not look like the blob's end.
            raise UpstreamBroken(f"what was received of {self.digest} is gone")
        return data

    async def _read_on(self, offset: int, at_most: int) -> Piece:
        """Go on without the flight where that has stranded; where upstream has failed it, so it has this reader."""
        failure = self._flight.failure
        if isinstance(failure, UpstreamError):
            raise failure
        if self._rest is None:
            held_back = self._flight.written - self._flight.readable
            tail = bytes(await self._read_file(self._flight.readable, held_back)) if held_back else b""
            self._rest = _Rest(self.digest, *self._flight.carry_on(self._origin), self._flight.readable, tail)
        return await self._rest.read(offset, at_most)


class _Rest:
    """The end of a blob, straight from upstream for one reader, checked as it passes."""

    def __init__(self, digest: Digest, download: Download, hasher: _Hash, start: int, tail: bytes) -> None:
        self._digest = digest
        self._download = download
        self._hasher = hasher
        self._start = start  # of `_tail` in the blob
        self._tail = tail  # what was read, and is held back or not asked for yet
        self._verified = False

    async def read(self, offset: int, at_most: int) -> bytes:
        """Return bytes from `offset` on, which only ever grows."""
        while True:
            if offset > self._start:
                drop = min(offset - self._start, len(self._tail))
                self._tail, self._start = self._tail[drop:], self._start + drop
            ready = len(self._tail) - (0 if self._verified else HELD_BACK)
            if offset == self._start and ready > 0:
                return self._tail[: min(ready, at_most)]
            if self._verified:
                return b""
            await self._fetch()

    async def _fetch(self) -> None:
        pieces = await self._download.read()
        if pieces:
            data = b"".join(pieces)
            self._hasher.update(data)
            self._tail += data
        elif self._hasher.hexdigest() != self._digest.hex:
            raise UpstreamBroken(f"upstream sent content that is not {self._digest}")
        else:
            self._verified = True

    def close(self) -> None:
        self._download.abort()
