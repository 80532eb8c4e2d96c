"""One download per digest, and everyone who wants it reading along.

A flight writes one blob from upstream into an ingest file and hashes it on the way. Readers follow the file: each has
its own descriptor and offset, so a slow one delays nobody, and one that leaves is not noticed. The last piece becomes
readable only when digest and length hold; a blob that turns out corrupt is never completed to anyone.

    upstream ──Download──► Flight ──append, in a thread──► ingest file ──verify, rename──► blobs
                              │ wakes                           │ pread
                              └──────────► FlightContent (one per reader) ──► its client

Where the file cannot go on though upstream could (the disk is full, the blob is larger than the cache, the first
client's credential has ended), the flight is *stranded*: each reader carries on from upstream itself, from the
byte where the file ends, with a copy of the hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from dockerproxy.cache.download import Download
from dockerproxy.cache.origin import Origin, Upstream
from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import read_blocking, read_cached
from dockerproxy.store.ingest import Ingest
from dockerproxy.tasks import in_thread, spawn

if TYPE_CHECKING:
    from hashlib import _Hash

HELD_BACK = 1
"""Bytes at the end of a blob that no reader gets before it is verified: without them no client takes it for whole."""

_OFFERED = 5.0  # seconds for which a stranded flight keeps its connection open for a reader

log = Logger()


class Stranded(Exception):
    """The ingest file cannot go on, though the content may be had."""


class Room(Protocol):
    """Says whether a blob may be kept, and makes room for it."""

    async def reserve(self, digest: Digest, size: int | None) -> bool: ...

    def release(self, digest: Digest) -> None: ...

    async def keep(self, ingest: Ingest) -> None: ...


class Flight:
    """The download of one blob, begun by the first who asked, from `origin`."""

    def __init__(self, reactor: Any, upstream: Upstream, origin: Origin, digest: Digest, room: Room) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._room = room
        self._waiting: list[Deferred[None]] = []
        self._ingest: Ingest | None = None
        self._spare: Download | None = None  # of a stranded flight: open, and at the byte where the file ends
        self.origin = origin
        self.digest = digest
        self.size: int | None = None  # of the whole blob, once upstream has said it
        self.written = 0  # bytes in the ingest file
        self.opened = False  # whether upstream has begun to send
        self.landed = False  # verified and published
        self.failure: Exception | None = None

    async def run(self, open_ingest: Callable[[Digest], Ingest | None]) -> None:
        """Fetch the blob into an ingest file; never raises: what went wrong is `failure`."""
        download = Download(self._reactor, self._upstream, self.origin, self.digest)
        try:
            await self._fly(download, open_ingest)
        except Exception as error:
            self.failure = error
            self._report(error)
        if isinstance(self.failure, Stranded):
            self._offer(download)
        else:
            download.abort()
        self._room.release(self.digest)
        self._wake()
        if self._ingest is not None:
            self._ingest.release()

    async def changed(self) -> None:
        """Wait until more is written, or the flight has ended."""
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        await waiter

    async def ready(self) -> None:
        """Wait until upstream has begun to send. Raise what it refused with, or that it failed."""
        while not self.opened and self.failure is None:
            await self.changed()
        if not self.opened and self.failure is not None:
            raise self.failure

    @property
    def readable(self) -> int:
        """How many bytes from the start may be given to clients."""
        return self.written if self.landed else max(0, self.written - HELD_BACK)

    def content(self, origin: Origin) -> FlightContent:
        """Return the content for one reader, who could go to `origin` itself if the flight were stranded."""
        fd = self._ingest.reader() if self._ingest is not None else -1
        return FlightContent(self._reactor, self, fd, origin)

    def carry_on(self, origin: Origin) -> tuple[Download, _Hash]:
        """Return what a reader needs to go on without the file: the rest from upstream, and the hash so far."""
        hasher = self._ingest.hasher_copy() if self._ingest is not None else self.digest.hasher()
        spare, self._spare = self._spare, None
        if spare is not None:
            return spare, hasher
        download = Download(self._reactor, self._upstream, origin, self.digest, self.written)
        download.size = self.size
        return download, hasher

    async def _fly(self, download: Download, open_ingest: Callable[[Digest], Ingest | None]) -> None:
        ingest = await self._begin(open_ingest)
        if ingest is not None:
            download.offset = self.written = ingest.size
        await download.open()
        self.size = download.size
        self.opened = True
        self._wake()
        if ingest is None:
            raise Stranded("its file cannot be opened")
        if not await self._room.reserve(self.digest, self.size):
            raise Stranded("the cache has no room for it")
        while data := await download.read():
            await self._append(ingest, data)
            self.written = ingest.size
            self._wake()
        if not ingest.verify():
            await in_thread(self._reactor, ingest.discard)
            raise UpstreamBroken(f"{self.origin.registry} sent content that is not {self.digest}")
        try:
            await self._room.keep(ingest)
        except OSError as error:
            raise Stranded(f"it cannot be kept: {error.strerror}") from error
        self.size = self.written
        self.landed = True

    async def _begin(self, open_ingest: Callable[[Digest], Ingest | None]) -> Ingest | None:
        """Open the ingest file and take up what an earlier run left there."""
        ingest = None
        try:
            ingest = await in_thread(self._reactor, open_ingest, self.digest)
            if ingest is not None and ingest.size:
                await in_thread(self._reactor, ingest.rehash)
        except OSError as error:
            log.error("no ingest file for {digest}: {why}", digest=str(self.digest), why=error.strerror)
            if ingest is not None:
                ingest.release()
            return None
        self._ingest = ingest
        return ingest

    def _offer(self, download: Download) -> None:
        """Leave the open connection to the first reader that goes on by itself, for a moment."""
        self._spare = download
        self._reactor.callLater(_OFFERED, self._withdraw)

    def _withdraw(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.abort()

    async def _append(self, ingest: Ingest, data: bytes) -> None:
        try:
            await in_thread(self._reactor, ingest.append, [data])
        except OSError as error:
            raise Stranded(f"it cannot be written: {error.strerror}") from error

    def _report(self, error: Exception) -> None:
        if isinstance(error, RegistryError):
            why = error.message
        elif isinstance(error, Stranded):
            why = str(error)
        else:
            log.failure("download of {digest} failed", digest=str(self.digest))
            return
        log.warn("{digest} from {key} was not cached: {why}", digest=str(self.digest), key=self.origin.key, why=why)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)


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

    async def read(self, offset: int, at_most: int) -> bytes | bytearray:
        """Return bytes from `offset` on, at least one; ``b""`` at the end. Raise `UpstreamError`."""
        flight = self._flight
        while True:
            available = flight.readable - offset
            if available > 0:
                return await self._read_file(offset, min(available, at_most))
            if flight.landed:
                return b""
            if flight.failure is not None:
                return await self._read_on(offset, at_most)
            await flight.changed()

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
        data = read_cached(self._fd, offset, size)
        return data if data is not None else await in_thread(self._reactor, read_blocking, self._fd, offset, size)

    async def _read_on(self, offset: int, at_most: int) -> bytes | bytearray:
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
        data = await self._download.read()
        if data:
            self._hasher.update(data)
            self._tail += data
        elif self._hasher.hexdigest() != self._digest.hex:
            raise UpstreamBroken(f"upstream sent content that is not {self._digest}")
        else:
            self._verified = True

    def close(self) -> None:
        self._download.abort()


class Flights:
    """The flights under way, by digest."""

    def __init__(
        self, reactor: Any, upstream: Upstream, room: Room, open_ingest: Callable[[Digest], Ingest | None]
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._room = room
        self._open_ingest = open_ingest
        self._flights: dict[Digest, Flight] = {}

    def get(self, digest: Digest) -> Flight | None:
        """Return the flight of `digest` that is under way, if any."""
        return self._flights.get(digest)

    def start(self, origin: Origin, digest: Digest) -> Flight:
        """Begin to fetch `digest` from `origin`; the flight goes on whoever leaves."""
        flight = self._flights[digest] = Flight(self._reactor, self._upstream, origin, digest, self._room)
        spawn(self._run(flight), f"the download of {digest}")
        return flight

    async def _run(self, flight: Flight) -> None:
        try:
            await flight.run(self._open_ingest)
        finally:
            del self._flights[flight.digest]
