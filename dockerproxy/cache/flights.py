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

Where another process writes the file already, the flight *follows*: its readers have the same file. It ends with the
other's, and goes on by itself where the other process has died.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger

from dockerproxy.cache.download import Download, TooLong
from dockerproxy.cache.following import follow
from dockerproxy.cache.ingests import Announcement, Ingests
from dockerproxy.cache.origin import Origin, Upstream, Visitor
from dockerproxy.cache.reading import HELD_BACK, FlightContent
from dockerproxy.cache.recent import Recent
from dockerproxy.cache.room import Room
from dockerproxy.cache.syncing import EarlySync
from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.errors import RegistryError, UpstreamBroken
from dockerproxy.oci.contents import SMALL
from dockerproxy.oci.names import Digest
from dockerproxy.store.growing import GrowingFile
from dockerproxy.store.ingest import Followed, Ingest

if TYPE_CHECKING:
    from hashlib import _Hash

# Bytes that are hashed and written at a time, if they come fast: to have a thread do that, and to wake readers, takes
# 100 µs each time (with half as many, each byte takes 9 % more CPU time). Whoever waits for the beginning has that at
# once.
_MOST = 2 * 1024 * 1024
_OFFERED = 5.0  # seconds for which a stranded flight keeps its connection open for a reader
_OWN_FAULT = "the download failed in this proxy itself: its log says why"

log = Logger()


Landing = Callable[[], Coroutine[Any, Any, None]]
"""What is to be done when a blob is verified, before anyone can have the last of it: to note whose it is."""


class Stranded(Exception):
    """The ingest file cannot go on, though the content may be had."""


class Flight:
    """The download of one blob, begun for the first who asked, `visitor`."""

    def __init__(
        self,
        reactor: Any,
        upstream: Upstream,
        visitor: Visitor,
        digest: Digest,
        room: Room,
        ingests: Ingests,
        landing: Landing,
        syncing: DeferredLock,
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._room = room
        self._ingests = ingests
        self._landing = landing
        self._sync = EarlySync(reactor, syncing)
        self._visitor = visitor
        self._opened: Announcement | None = None
        self._waiting: list[Deferred[None]] = []
        self._file: GrowingFile | None = None  # what is written, and its hash: the ingest, or what is left of another's
        self._fd = -1  # of the ingest file, for readers to copy: the ingest closes its own in a thread
        self._reserved = -1  # bytes
        self._spare: Download | None = None  # of a stranded flight: open, and at the byte where the file ends
        self.origin = visitor.origin
        self.digest = digest
        self.size: int | None = None  # of the whole blob, once upstream has said it
        self.written = 0  # bytes in the ingest file
        self.recent = Recent()  # the last of them, once more
        self.follows = False  # whether another process fetches it
        self.opened = False  # whether upstream has begun to send
        self.landed = False  # verified and published
        self.failure: Exception | None = None
        self.ended = False  # nobody can join any more

    async def run(self) -> None:
        """Fetch the blob into an ingest file; never raises: what went wrong is `failure`. `end` has to follow."""
        download = Download(self._reactor, self._upstream, self.origin, self.digest)
        try:
            await self._fly(download)
        except Exception as error:
            self.failure = error
            self._report(error)
        if isinstance(self.failure, Stranded) and download.is_open:
            self._offer(download)
        else:
            download.abort()
        await self._put_away()

    def open(self, announced: Announcement) -> None:
        """Let those go on who are `ready` when upstream has begun to send."""
        self.size = announced.size
        self.opened, self._opened = True, announced
        self._wake()

    def grow(self, size: int) -> None:
        """Let readers have what was written, of which there are `size` bytes now."""
        self.written = size
        self._wake()

    def end(self) -> None:
        """Let all go who wait; nobody joins any more."""
        self.ended = True
        self.recent.clear()  # a slow reader may keep the flight for hours
        self._close()
        self._wake()

    async def changed(self) -> None:
        """Wait until more is written, or the flight has ended."""
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        await waiter

    async def ready(self) -> None:
        """Wait until upstream has begun to send. Raise what it refused with, or that it failed.

        Of what another process fetched, the whole may be here before its beginning was seen.
        """
        while not self.opened and not self.ended:
            await self.changed()
        if not self.opened and not self.landed:
            raise self.failure if isinstance(self.failure, RegistryError) else RegistryError(_OWN_FAULT)

    async def measured(self) -> None:
        """Wait until it is known how long the blob is, or the flight has ended."""
        while self.size is None and not self.ended:
            await self.changed()

    def is_for(self, visitor: Visitor, recent: float) -> bool:
        """Whether upstream sends to `visitor`, and began to less than `recent` seconds ago, or has yet to."""
        opened = self._opened
        if opened is None:
            return (visitor.origin, visitor.identity) == (self.origin, self._visitor.identity)
        age = self._reactor.seconds() - opened.opened
        return (visitor.origin.key, visitor.identity) == (opened.key, opened.identity) and age < recent

    @property
    def readable(self) -> int:
        """How many bytes from the start may be given to clients."""
        complete = self.size is None or self.written == self.size  # or may be, for all that is known
        return max(0, self.written - HELD_BACK) if complete and not self.landed else self.written

    def content(self, origin: Origin) -> FlightContent | None:
        """Return the content for one reader, who could go to `origin` itself if the flight were stranded.

        None where the flight has ended: what became of it shows in the store. Raises OSError (too many open files).
        """
        if self.ended:
            return None
        return FlightContent(self._reactor, self, os.dup(self._fd) if self._fd >= 0 else -1, origin)

    def carry_on(self, origin: Origin) -> tuple[Download, _Hash]:
        """Return what a reader needs to go on without the file: the rest from upstream, and the hash so far."""
        hasher = self._file.hasher_copy() if self._file is not None else self.digest.hasher()
        spare, self._spare = self._spare, None
        if spare is not None:
            return spare, hasher
        download = Download(self._reactor, self._upstream, origin, self.digest, self.written)
        download.size = self.size
        return download, hasher

    async def _fly(self, download: Download) -> None:
        ingest = await self._depart(download)
        if self.landed:
            return
        opened = Announcement(download.size, self.origin.key, self._visitor.identity, self._reactor.seconds())
        self.open(opened)
        if ingest is None:
            raise Stranded("its file cannot be opened")
        if self.size is None or self.size > SMALL:  # else nobody gets any of it before it is here
            self._ingests.announce(self.digest, opened)
        await self._reserve(self.written if self.size is None else self.size)
        while pieces := await download.read(min(_MOST, self.written)):
            await self._append(ingest, download, pieces)
            self._sync.grown(ingest)
        self.size = download.size
        if not ingest.verify():
            await in_thread(self._reactor, ingest.discard)
            raise UpstreamBroken(f"{self.origin.registry} sent content that is not {self.digest}")
        noted = spawn(self._landing(), f"the landing of {self.digest}")
        try:
            try:
                await self._sync.finish(ingest)
            finally:
                await noted  # before other processes find it here, and would ask whose it is
            await self._room.keep(ingest)
        except OSError as error:
            raise Stranded(f"it cannot be kept: {error.strerror}") from error
        self.landed = True

    async def _depart(self, download: Download) -> Ingest | None:
        """Return the ingest, `download` being open at the byte where what is there ends.

        None where there is no file to write to; or the blob `landed`, by another process.
        """
        while True:
            ingest = await self._enter()
            if self.landed:
                return None
            download.offset, download.size = self.written, self.size
            try:
                await download.open()
            except TooLong:
                pass
            else:
                if ingest is None or not self.written or self.written != download.size or ingest.verify():
                    return ingest
            # What was left is not this blob, or not its beginning; without it there is no second time.
            log.warn("what was left of {digest} is not part of it: from the start", digest=str(self.digest))
            assert ingest is not None
            download.abort()
            self._close()
            await in_thread(self._reactor, ingest.discard)
            if self.opened:  # in another process that has died: readers have some of that
                raise UpstreamBroken(f"{self.origin.registry} sent content that is not {self.digest}")

    async def _enter(self) -> Ingest | None:
        """Return the ingest, with what an earlier run left there, or another process that has died meanwhile."""
        self._file, self.written, self.follows = None, 0, False
        entered: Ingest | Followed | None = None
        try:
            entered = await in_thread(self._reactor, self._ingests.enter, self.digest)
            if isinstance(entered, Followed):
                self._fd = os.dup(entered.fd)
                entered = await self._follow(entered)
                if entered is None and not self._ingests.is_published(self.digest):
                    self._close()
                    return await self._enter()
            elif entered is not None:
                self._fd = entered.reader()
            if entered is None:
                self.landed = True
                return None
            self._ingests.withdraw(self.digest)
            if entered.size:
                await in_thread(self._reactor, entered.rehash)
        except OSError as error:
            log.error("no ingest file for {digest}: {why}", digest=str(self.digest), why=error.strerror)
            if isinstance(entered, Ingest):
                entered.release()
            self._close()
            return None
        self._file, self.written = entered, entered.size
        return entered

    async def _follow(self, followed: Followed) -> Ingest | None:
        """Read along while another process writes. Return the right to go on where that died, None when it landed.

        None, too, where that gave it up before anyone here had a part of it.
        """
        self.follows = True
        ingest = await follow(self._reactor, self, self._ingests, followed)
        if ingest is None and self.opened and not self._ingests.is_published(self.digest):
            # Nobody knows here whether what it had is wrong, or its disk full: the hash will tell.
            self._file = GrowingFile(self.written, self._fd, self.digest.hasher())
            await in_thread(self._reactor, self._file.rehash)
            raise Stranded("another process gave it up")
        self.follows = ingest is None
        return ingest

    async def _reserve(self, size: int) -> None:
        """Make sure that there is room for `size` bytes of the blob."""
        if size <= self._reserved:
            return
        try:
            granted = await self._room.reserve(self.digest, size, self.written)
        except OSError as error:
            raise Stranded(f"no room can be made for it: {error.strerror}") from error
        if not granted:
            raise Stranded("the cache has no room for it")
        self._reserved = size

    async def _append(self, ingest: Ingest, download: Download, pieces: list[bytes]) -> None:
        end = self.written + sum(map(len, pieces))
        try:
            await self._reserve(end if download.size is None else download.size)
            await in_thread(self._reactor, ingest.append, pieces)
        except OSError as error:
            download.unread(pieces)
            raise Stranded(f"it cannot be written: {error.strerror}") from error
        except Stranded:
            download.unread(pieces)
            raise
        self.recent.add(self.written, pieces)
        self.grow(end)

    async def _put_away(self) -> None:
        """Give back the room, and the file for the next flight to go on with.

        Of a flight that has stranded nothing is left: the next one would strand as well, and what it has on the disk
        may be what the disk is full of.
        """
        ingest = self._file if isinstance(self._file, Ingest) else None
        try:
            if ingest is None:
                return
            self._ingests.withdraw(self.digest)
            try:
                if isinstance(self.failure, Stranded):
                    await in_thread(self._reactor, ingest.discard)
            finally:
                ingest.release()
                self._room.release(self.digest)
        except Exception:
            log.failure("the end of the download of {digest} failed", digest=str(self.digest))

    def _offer(self, download: Download) -> None:
        """Leave the open connection to the first reader that goes on by itself, for a moment."""
        self._spare = download
        self._reactor.callLater(_OFFERED, self._withdraw)

    def _withdraw(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.abort()

    def _report(self, error: Exception) -> None:
        if isinstance(error, RegistryError):
            why = error.message
        elif isinstance(error, Stranded):
            why = str(error)
        else:
            log.failure("download of {digest} failed", digest=str(self.digest))
            return
        log.warn("{digest} from {key} was not cached: {why}", digest=str(self.digest), key=self.origin.key, why=why)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)


class Flights:
    """The flights under way, by digest."""

    def __init__(self, reactor: Any, upstream: Upstream, room: Room, ingests: Ingests) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._room = room
        self._ingests = ingests
        self._syncing = DeferredLock()
        self._flights: dict[Digest, Flight] = {}

    def get(self, digest: Digest) -> Flight | None:
        """Return the flight of `digest` that is under way, if any."""
        return self._flights.get(digest)

    def start(self, visitor: Visitor, digest: Digest, landing: Landing) -> Flight:
        """Begin to fetch `digest` for `visitor`; the flight goes on whoever leaves."""
        flight = self._flights[digest] = Flight(
            self._reactor, self._upstream, visitor, digest, self._room, self._ingests, landing, self._syncing
        )
        spawn(self._run(flight), f"the download of {digest}")
        return flight

    async def _run(self, flight: Flight) -> None:
        try:
            await flight.run()
        finally:
            del self._flights[flight.digest]
            flight.end()
