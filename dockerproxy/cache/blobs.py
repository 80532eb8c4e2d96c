"""Blobs of any registry: from the store, from a flight, and only to whom upstream would give them."""

from __future__ import annotations

from typing import Any

from dockerproxy.cache.access import Access, Standing
from dockerproxy.cache.download import Download
from dockerproxy.cache.flights import Flights
from dockerproxy.cache.origin import Upstream, Visitor, refuse
from dockerproxy.cache.room import CacheRoom
from dockerproxy.errors import RegistryError, UpstreamFailing, UpstreamRefused, is_outage
from dockerproxy.oci.contents import BlobAnswer
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.store.links import Links
from dockerproxy.tasks import Coalescing, in_thread

_ATTEMPTS = 3  # a blob may be evicted between being seen and being opened


class StoredContent:
    """A whole blob on disk, open; it does not leave the cache before it is closed."""

    def __init__(self, reactor: Any, blob: OpenBlob, room: CacheRoom) -> None:
        self._reactor = reactor
        self._blob = blob
        self._room = room
        self._closed = False
        room.hold(blob.digest)
        self.digest = blob.digest
        self.size: int | None = blob.size

    async def read(self, offset: int, at_most: int) -> bytes | bytearray:
        """Return bytes from `offset` on, at least one; ``b""`` at the end."""
        data = self._blob.read(offset, at_most)
        return data if data is not None else await in_thread(self._reactor, self._blob.read_blocking, offset, at_most)

    async def settled(self) -> None:
        """What is stored was verified."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._blob.close()
            self._room.let_go(self.digest)


class CachedBlobs:
    """Answers for blobs."""

    def __init__(
        self,
        reactor: Any,
        upstream: Upstream,
        blobs: Blobs,
        links: Links,
        flights: Flights,
        access: Access,
        room: CacheRoom,
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self._flights = flights
        self._access = access
        self._room = room
        self._confirming: Coalescing[tuple[str, str, Digest], int | None] = Coalescing()

    async def get(self, visitor: Visitor, digest: Digest) -> BlobAnswer:
        """Return the blob for `visitor`. Raise what upstream refuses with, or `UpstreamError`."""
        for _ in range(_ATTEMPTS):
            answer = await self._find(visitor, digest)
            if answer is not None:
                return answer
        raise UpstreamFailing(f"{digest} is evicted as fast as it is fetched: the cache is too small")

    async def head(self, visitor: Visitor, digest: Digest) -> BlobAnswer:
        """Return the blob's size, without fetching it."""
        if self._blobs.exists(digest):
            answer = await self.get(visitor, digest)
            if answer.content is not None:
                answer.content.close()
            return answer
        size = await self._confirm(visitor, digest)
        return BlobAnswer(digest, size if size is not None else await self._measure(visitor, digest), None, "MISS")

    async def _find(self, visitor: Visitor, digest: Digest) -> BlobAnswer | None:
        key = visitor.origin.key
        linked = self._links.has_layer(key, digest)
        if linked and self._access.standing(key, visitor.identity) is Standing.PROVEN:
            stored = self._stored(digest, "HIT")
            if stored is not None:
                return stored
        flight = self._flights.get(digest)
        if flight is None and not self._blobs.exists(digest):
            return await self._fetch(visitor, digest)
        if flight is not None and flight.origin == visitor.origin:
            return await self._join(visitor, digest)
        verdict = await self._admit(visitor, digest, linked)
        if self._flights.get(digest) is not None:
            return await self._join(visitor, digest)
        return self._stored(digest, verdict)

    def _stored(self, digest: Digest, verdict: str) -> BlobAnswer | None:
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        return BlobAnswer(digest, blob.size, StoredContent(self._reactor, blob, self._room), verdict)

    async def _fetch(self, visitor: Visitor, digest: Digest) -> BlobAnswer:
        flight = self._flights.start(visitor.origin, digest)
        try:
            await flight.ready()
        except UpstreamRefused as error:
            self._note_refusal(visitor, error)
            raise
        content = flight.content(visitor.origin)
        await self._note_yes(visitor, digest)
        return BlobAnswer(digest, flight.size, content, "MISS")

    async def _join(self, visitor: Visitor, digest: Digest) -> BlobAnswer | None:
        flight = self._flights.get(digest)
        if flight is None:
            return None
        await flight.ready()
        content = flight.content(visitor.origin)
        await self._note_yes(visitor, digest)
        return BlobAnswer(digest, flight.size, content, "JOINED")

    async def _admit(self, visitor: Visitor, digest: Digest, linked: bool) -> str:
        """Make sure that `visitor` may have what is here; return how that was found out."""
        try:
            await self._confirm(visitor, digest)
        except RegistryError as error:
            if is_outage(error) and linked and self._was_admitted(visitor):
                return "STALE"
            raise
        return "REVALIDATED"

    def _was_admitted(self, visitor: Visitor) -> bool:
        identities = [visitor.identity] if visitor.voucher is None else [visitor.identity, visitor.voucher]
        return any(
            self._access.standing(visitor.origin.key, identity) is not Standing.UNKNOWN for identity in identities
        )

    async def _confirm(self, visitor: Visitor, digest: Digest) -> int | None:
        """Ask upstream whether its repository has `digest` for the visitor; return the size it tells, if any."""
        size = await self._confirming.do(
            (visitor.origin.key, visitor.identity, digest), lambda: self._ask(visitor, digest)
        )
        await self._note_yes(visitor, digest)
        return size

    async def _ask(self, visitor: Visitor, digest: Digest) -> int | None:
        origin = visitor.origin
        # A redirect is a yes. It is not followed: signed URLs are often good for GET only.
        answer = await self._upstream.request(
            "HEAD",
            origin.registry,
            origin.blob_path(digest),
            name=origin.name,
            credential=origin.credential,
            follow=False,
        )
        if 300 <= answer.status < 400:
            await answer.discard()
            return None
        if answer.status != 200:
            error = await refuse(origin.registry, answer)
            self._note_refusal(visitor, error)
            raise error
        await answer.discard()
        length = answer.headers.get("content-length") or ""
        return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None

    async def _measure(self, visitor: Visitor, digest: Digest) -> int | None:
        """Return the size of a blob that upstream redirects to: by the head of a GET, as a HEAD may not be signed."""
        download = Download(self._reactor, self._upstream, visitor.origin, digest)
        try:
            await download.open()
        finally:
            download.abort()
        return download.size

    async def _note_yes(self, visitor: Visitor, digest: Digest) -> None:
        self._access.proven(visitor.origin.key, visitor.identity)
        if not self._links.has_layer(visitor.origin.key, digest):
            await in_thread(self._reactor, self._links.link_layer, visitor.origin.key, digest)

    def _note_refusal(self, visitor: Visitor, error: RegistryError) -> None:
        if isinstance(error, UpstreamRefused) and error.status in (401, 403):
            self._access.refused(visitor.origin.key, visitor.identity)
