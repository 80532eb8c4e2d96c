"""Blobs of any registry: from the store, from a flight, and only to whom upstream would give them."""

from __future__ import annotations

from functools import partial
from typing import Any

from attrs import evolve

from dockerproxy.cache.access import FRESH, Access, Standing
from dockerproxy.cache.flights import Flight, Flights
from dockerproxy.cache.notes import note_link
from dockerproxy.cache.origin import Answer, Upstream, Visitor, is_refusal, refuse
from dockerproxy.cache.room import Room
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import RegistryError, Unauthorized, UpstreamBroken, UpstreamError, UpstreamFailing, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.oci.contents import BlobAnswer
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.contents import StoredContent
from dockerproxy.store.links import Links

_NONE = Headers()
_ATTEMPTS = 3  # a blob may be evicted between being seen and being opened


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
        room: Room,
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self._flights = flights
        self._access = access
        self._room = room
        self._confirming: SingleFlight[tuple[object, ...], tuple[int | None, bool]] = SingleFlight()

    async def get(self, visitor: Visitor, digest: Digest) -> BlobAnswer:
        """Return the blob for `visitor`. Raise what upstream refuses with, or `UpstreamError`."""
        for _ in range(_ATTEMPTS):
            answer = await self._find(visitor, digest)
            if answer is not None:
                return answer
        raise UpstreamFailing(f"{digest} goes as fast as it is fetched: the cache may be too small")

    async def head(self, visitor: Visitor, digest: Digest) -> BlobAnswer:
        """Return the blob's size, without fetching it."""
        if self._blobs.exists(digest):
            answer = await self.get(visitor, digest)
            if answer.content is not None:
                answer.content.close()
            return evolve(answer, content=None)
        return BlobAnswer(digest, await self._confirm(visitor, digest, self._size_of(digest)), None, "MISS")

    async def _find(self, visitor: Visitor, digest: Digest) -> BlobAnswer | None:
        """Return the blob; None where it went while it was looked for, or its download was another's and failed."""
        key = visitor.origin.key
        linked = self._links.has_layer(key, digest)
        known = linked and self._access.standing(key, visitor.identity) is Standing.PROVEN
        flight, verdict = self._flights.get(digest), "JOINED"
        if flight is None:
            stored = self._stored(digest, "HIT") if known else None
            if stored is not None:
                return stored
            if not self._blobs.exists(digest):
                flight, verdict = self._start(visitor, digest), "MISS"
        if flight is not None:
            if not await self._ready(flight, visitor):
                return None
            # What upstream answers to the request that is out, or answered to it just now, it answers to this visitor.
            if known or flight.is_for(visitor, FRESH):
                return self._join(flight, visitor, "JOINED" if flight.follows else verdict)
            await flight.measured()
        admitted = await self._admit(visitor, digest, linked)
        flight = self._flights.get(digest)
        if flight is not None and admitted is not None:
            return self._join(flight, visitor, "JOINED") if await self._ready(flight, visitor) else None
        return self._stored(digest, admitted) if admitted is not None else None

    def _stored(self, digest: Digest, verdict: str) -> BlobAnswer | None:
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        self._room.hold(digest)  # it does not leave the cache before it is closed
        content = StoredContent(self._reactor, blob, partial(self._room.let_go, digest))
        return BlobAnswer(digest, blob.size, content, verdict)

    def _start(self, visitor: Visitor, digest: Digest) -> Flight:
        began = self._access.now()
        # That upstream sends something is no yes yet: a page that it answers everything with would make everyone's of
        # all that the repository has here.
        return self._flights.start(visitor, digest, lambda: self._note_yes(visitor, digest, began))

    def _join(self, flight: Flight, visitor: Visitor, verdict: str) -> BlobAnswer | None:
        content = flight.content(visitor.origin)
        return None if content is None else BlobAnswer(flight.digest, flight.size, content, verdict)

    async def _ready(self, flight: Flight, visitor: Visitor) -> bool:
        """Wait until upstream sends, and raise what it says instead; False where it said that to another only."""
        try:
            await flight.ready()
        except RegistryError as error:
            if flight.origin != visitor.origin and not _is_common(flight, visitor, error):
                return False
            self._note_refusal(visitor, error)
            raise
        return True

    async def _admit(self, visitor: Visitor, digest: Digest, linked: bool) -> str | None:
        """Make sure that `visitor` may have what is here; return how that was found out, None where it went."""
        here = self._size_of(digest)
        if here is None:
            return None
        try:
            await self._confirm(visitor, digest, here)
        except RegistryError as error:
            if is_outage(error) and linked and self._access.was_admitted(visitor):
                return "STALE"
            raise
        return "REVALIDATED"

    # upstream's word on whether its repository has a blob for a visitor

    async def _confirm(self, visitor: Visitor, digest: Digest, here: int | None) -> int | None:
        """Ask upstream, joining whoever asks the same; return the size that it tells.

        `here` is the size that it has to be, so that an answer is a yes and not just an answer.
        """
        now = self._access.now()
        size, certain = await self._confirming.do(
            (visitor.origin.key, visitor.identity, digest, here), lambda: self._ask(visitor, digest, here)
        )
        if certain:
            await self._note_yes(visitor, digest, now)
        return size

    async def _ask(self, visitor: Visitor, digest: Digest, here: int | None) -> tuple[int | None, bool]:
        answer = await self._request("HEAD", visitor, digest, follow=False)
        if answer.status == 200:
            await answer.discard()
            if answer.length is not None and here in (None, answer.length):
                named = answer.headers.get("docker-content-digest") == str(digest)
                return answer.length, named or here is not None
        elif 300 <= answer.status < 400 or answer.status in (405, 501):
            await answer.discard()
        else:
            raise await self._refusal(visitor, answer)
        # A redirect is no yes: registry.k8s.io sends every name and digest elsewhere, and it is there that the answer
        # is given. With GET, for which alone a signed URL may be good.
        return await self._probe(visitor, digest, here)

    async def _probe(self, visitor: Visitor, digest: Digest, here: int | None) -> tuple[int | None, bool]:
        """Ask for the first byte, wherever that leads."""
        answer = await self._request("GET", visitor, digest, headers=Headers([("range", "bytes=0-0")]))
        if answer.status == 200:
            size = answer.length
            if size is None:
                return await _measure(answer, digest), True
        elif answer.status == 206:
            size = _whole(answer)
        elif answer.status == 416:
            size = 0  # RFC 9110, section 14.1.2: only an empty content has no first byte
        else:
            raise await self._refusal(visitor, answer)
        await answer.discard()
        if here is not None and size != here:
            raise UpstreamBroken(f"{visitor.origin.registry} has something else by the name of {digest}")
        return size, here is not None

    async def _request(
        self, method: str, visitor: Visitor, digest: Digest, *, headers: Headers = _NONE, follow: bool = True
    ) -> Answer:
        origin = visitor.origin
        try:
            return await self._upstream.request(
                method, origin.registry, origin.blob_path(digest),
                name=origin.name, credential=origin.credential, headers=headers, follow=follow,
            )  # fmt: skip
        except Unauthorized as error:
            self._note_refusal(visitor, error)
            raise

    async def _refusal(self, visitor: Visitor, answer: Answer) -> RegistryError:
        error = await refuse(visitor.origin.registry, answer, "BLOB_UNKNOWN")
        self._note_refusal(visitor, error)
        return error

    def _size_of(self, digest: Digest) -> int | None:
        flight = self._flights.get(digest)
        return self._blobs.size(digest) if flight is None else flight.size

    async def _note_yes(self, visitor: Visitor, digest: Digest, when: float) -> None:
        self._access.proven(visitor.origin.key, visitor.identity, when)
        if not self._links.has_layer(visitor.origin.key, digest):
            await note_link(self._reactor, self._links.link_layer, visitor.origin.key, digest)

    def _note_refusal(self, visitor: Visitor, error: RegistryError) -> None:
        if is_refusal(error):
            self._access.refused(visitor.origin.key, visitor.identity)


def _is_common(flight: Flight, visitor: Visitor, error: RegistryError) -> bool:
    """Whether what failed `flight` is its registry's trouble, so that it would fail this visitor in the same way."""
    same = flight.origin.registry == visitor.origin.registry
    return same and isinstance(error, UpstreamError) and error.status != 429


async def _measure(answer: Answer, digest: Digest) -> int:
    """Read an answer whose length is not told, and return that; raise `UpstreamBroken` where it is not the blob."""
    hasher, size = digest.hasher(), 0
    while data := await answer.read_chunk():
        hasher.update(data)
        size += len(data)
    if hasher.hexdigest() != digest.hex:
        raise UpstreamBroken(f"upstream has something else by the name of {digest}")
    return size


def _whole(answer: Answer) -> int | None:
    """Return the size of the whole that a 206 tells."""
    try:
        return parse_content_range(answer.headers.get("content-range") or "")[2]
    except ValueError:
        return None
