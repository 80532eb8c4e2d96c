"""Manifests and tags of any registry: from the store where that is right, from upstream where it has to be asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from attrs import evolve, frozen
from twisted.logger import Logger

from dockerproxy.cache.access import Access, Standing
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.notes import forget, note_link, remember
from dockerproxy.cache.origin import Answer, Upstream, Visitor, is_refusal, refuse
from dockerproxy.cache.remembered import RememberedManifests
from dockerproxy.concurrency import KeyedLock, SingleFlight, in_thread
from dockerproxy.errors import (
    DigestInvalid,
    ManifestInvalid,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.manifests import (
    DOCKER_SCHEMA1_SIGNED,
    KNOWN_TYPES,
    MAX_MANIFEST,
    accept_key,
    accept_set,
    accepts,
    media_type_of,
)
from dockerproxy.oci.names import Digest, Reference, Tag
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records

_MAX_ANSWERS = 16  # for one tag: so many different sets of media types are remembered

log = Logger()


@frozen
class _Known:
    """What a tag was found to name, for one set of media types; `checked` is POSIX time."""

    digest: Digest
    media_type: str
    checked: float


class CachedManifests:
    """Answers for manifests; `clock` is POSIX time, `keep` counts what is written to the store.

    By `turns`, which may be those of several processes, upstream is asked the same by one at a time.
    """

    def __init__(
        self,
        reactor: Any,
        upstream: Upstream,
        blobs: Blobs,
        links: Links,
        records: Records,
        access: Access,
        freshness: Freshness,
        turns: KeyedLock,
        *,
        clock: Callable[[], float],
        keep: Callable[[Digest, int], None],
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self._records = records
        self._access = access
        self._freshness = freshness
        self._turns = turns
        self._clock = clock
        self._keep = keep
        self._asking: SingleFlight[tuple[object, ...], ManifestAnswer] = SingleFlight()
        self._remembered = RememberedManifests(clock)

    async def get(self, visitor: Visitor, reference: Reference, accept: list[str], *, head: bool) -> ManifestAnswer:
        """Return the manifest; `accept` are the client's Accept fields. Raise what upstream refuses with."""
        if isinstance(reference, Digest):
            return await self._by_digest(visitor, reference, accept, head)
        return await self._by_tag(visitor, reference, accept, head)

    # by digest: the content cannot change, so the only question is whether the visitor may have it

    async def _by_digest(self, visitor: Visitor, digest: Digest, accept: list[str], head: bool) -> ManifestAnswer:
        key = visitor.origin.key
        kept = await self._kept(key, digest)
        if kept is not None and self._access.standing(key, visitor.identity) is Standing.PROVEN:
            return kept
        try:
            if kept is not None or head:
                asked = await self._ask("HEAD", visitor, digest, accept)
                return _revalidated(kept, asked) if kept is not None else asked
            return await self._ask("GET", visitor, digest, accept)
        except RegistryError as error:
            if kept is not None and is_outage(error) and self._access.was_admitted(visitor):
                return evolve(kept, verdict="STALE")
            raise

    # by tag: upstream says what it names, unless it said so a short while ago or cannot say it

    async def _by_tag(self, visitor: Visitor, tag: Tag, accept: list[str], head: bool) -> ManifestAnswer:
        key = visitor.origin.key
        accepted = accept_set(accept)
        known = self._known(key, tag).get(accept_key(accepted))
        kept = await self._kept(key, known.digest, known.media_type) if known is not None else None
        if known is not None and kept is not None and self._is_fresh(visitor, tag, known):
            return kept
        try:
            return await self._revalidate(visitor, tag, accept, kept, head)
        except RegistryError as error:
            stale = await self._stale(visitor, tag, accepted) if is_outage(error) else None
            if stale is None:
                raise
            return stale

    def _is_fresh(self, visitor: Visitor, tag: Tag, known: _Known) -> bool:
        return (
            self._freshness.is_fresh(tag, self._clock() - known.checked)
            and self._access.standing(visitor.origin.key, visitor.identity) is Standing.PROVEN
        )

    async def _revalidate(
        self, visitor: Visitor, tag: Tag, accept: list[str], kept: ManifestAnswer | None, head: bool
    ) -> ManifestAnswer:
        if kept is None and not head:
            return await self._ask("GET", visitor, tag, accept)
        # HEAD first: Docker Hub counts no HEAD as a pull.
        asked = await self._ask("HEAD", visitor, tag, accept)
        if asked.content is not None:
            return asked  # only a GET could tell: that was the one pull to be counted
        now = kept if kept is not None and asked.digest == kept.digest else None
        if now is None:
            now = await self._kept(visitor.origin.key, asked.digest, asked.media_type)
        if now is not None:
            return _revalidated(now, asked)
        return asked if head else await self._ask("GET", visitor, tag, accept)

    async def _stale(self, visitor: Visitor, tag: Tag, accepted: frozenset[str]) -> ManifestAnswer | None:
        """Return the last good answer that suits the client, for a visitor that upstream once let in."""
        key = visitor.origin.key
        if not self._access.was_admitted(visitor):
            return None
        known = self._known(key, tag)
        exact = known.pop(accept_key(accepted), None)
        others = sorted(known.values(), key=lambda entry: -entry.checked)
        for entry in ([exact] if exact is not None else []) + others:
            if entry is exact or accepts(accepted, entry.media_type):
                kept = await self._kept(key, entry.digest, entry.media_type)
                if kept is not None:
                    return evolve(kept, verdict="STALE")
        return None

    # upstream

    async def _ask(self, method: str, visitor: Visitor, reference: Reference, accept: list[str]) -> ManifestAnswer:
        """Ask upstream, joining whoever asks the same with the same standing."""
        key = (method, visitor.origin.key, str(reference), accept_key(accept_set(accept)), visitor.identity)
        return await self._asking.do(key, lambda: self._ask_in_turn(method, visitor, reference, accept))

    async def _ask_in_turn(
        self, method: str, visitor: Visitor, reference: Reference, accept: list[str]
    ) -> ManifestAnswer:
        """Ask upstream, unless another process did while we waited for it."""
        began = self._clock()
        key = f"{method} {visitor.origin.key} {reference} {accept_key(accept_set(accept))} {visitor.identity}"
        async with self._turns.hold(key) as waited:
            answered = await self._answered(visitor, reference, accept, began) if waited else None
            return answered or await self._ask_alone(method, visitor, reference, accept)

    async def _answered(
        self, visitor: Visitor, reference: Reference, accept: list[str], since: float
    ) -> ManifestAnswer | None:
        """Return what upstream answered to `visitor` since then, if that was kept."""
        key = visitor.origin.key
        if not self._access.is_proven_since(key, visitor.identity, since):
            return None
        if isinstance(reference, Digest):
            kept = await self._kept(key, reference)
        else:
            known = self._known(key, reference).get(accept_key(accept_set(accept)))
            fresh = known is not None and known.checked >= since
            kept = await self._kept(key, known.digest, known.media_type) if known is not None and fresh else None
        return evolve(kept, verdict="JOINED") if kept is not None else None

    async def _ask_alone(
        self, method: str, visitor: Visitor, reference: Reference, accept: list[str]
    ) -> ManifestAnswer:
        origin = visitor.origin
        headers = Headers([("accept", value) for value in accept])
        try:
            answer = await self._upstream.request(
                method, origin.registry, origin.manifest_path(reference),
                name=origin.name, credential=origin.credential, headers=headers,
            )  # fmt: skip
        except Unauthorized as error:
            self._note_refusal(visitor, reference, error)
            raise
        if answer.status in (405, 501) and method == "HEAD":
            await answer.discard()
            return await self._ask("GET", visitor, reference, accept)
        if answer.status != 200:
            refusal = await refuse(origin.registry, answer, "MANIFEST_UNKNOWN")
            self._note_refusal(visitor, reference, refusal)
            raise refusal
        if method == "HEAD":
            return await self._accept_head(visitor, reference, accept, answer)
        return await self._accept_content(visitor, reference, accept, answer)

    async def _accept_head(
        self, visitor: Visitor, reference: Reference, accept: list[str], answer: Answer
    ) -> ManifestAnswer:
        told, size, key = _digest_field(answer), answer.length, visitor.origin.key
        await answer.discard()
        digest = reference if isinstance(reference, Digest) else told
        here = self._blobs.size(digest) if digest is not None else None
        certain = told == digest if told is not None else here is not None
        media_type = _media_type_field(answer)
        if digest is not None and media_type not in KNOWN_TYPES:  # an artifact's, or what a server says of anything
            media_type = self._links.manifest_media_type(key, digest)
        if digest is None or size is None or media_type is None or here not in (None, size) or not certain:
            # A registry that does not say it in a HEAD, or something that says yes to all: only the content tells.
            return await self._ask("GET", visitor, reference, accept)
        self._note_yes(visitor)
        # By tag, not what is yet to be fetched: that may fail, and then the last good answer is what it was.
        if here is not None and (isinstance(reference, Digest) or self._links.has_manifest(key, digest)):
            await self._note_type(key, digest, media_type)
            if not isinstance(reference, Digest):
                self._note_tag(key, reference, accept, digest, media_type)
        return ManifestAnswer(digest, media_type, size, None, "MISS")

    async def _accept_content(
        self, visitor: Visitor, reference: Reference, accept: list[str], answer: Answer
    ) -> ManifestAnswer:
        registry = visitor.origin.registry
        content = await answer.read_all(MAX_MANIFEST)
        try:
            own_type = media_type_of(content)
            media_type = _media_type_field(answer) or own_type
        except ManifestInvalid:
            raise UpstreamBroken(f"{registry} sent something that is no manifest") from None
        claimed = reference if isinstance(reference, Digest) else _digest_field(answer)
        if media_type == own_type == DOCKER_SCHEMA1_SIGNED and claimed is not None:
            # Its digest is that of a part of it (the JWS payload): it is passed on, and not kept.
            self._note_yes(visitor)
            return ManifestAnswer(claimed, media_type, len(content), content, "PASS")
        digest = Digest.of(content, claimed.algorithm if claimed is not None else "sha256")
        if claimed is not None and digest != claimed:
            raise UpstreamBroken(f"{registry} sent content that is not {claimed}")
        self._note_yes(visitor)
        await self._store(visitor.origin.key, digest, media_type, content)
        if not isinstance(reference, Digest):
            self._note_tag(visitor.origin.key, reference, accept, digest, media_type)
            await note_link(self._reactor, self._links.set_tag, visitor.origin.key, reference, digest)
        return ManifestAnswer(digest, media_type, len(content), content, "MISS")

    def _note_yes(self, visitor: Visitor) -> None:
        # Once it is certain that the answer is one: upstream may be a page that is shown for everything.
        self._access.proven(visitor.origin.key, visitor.identity, self._access.now(), awaited=True)

    def _note_refusal(self, visitor: Visitor, reference: Reference, error: RegistryError) -> None:
        if is_refusal(error):
            self._access.refused(visitor.origin.key, visitor.identity)
        elif error.status == 404 and isinstance(error, UpstreamRefused) and not isinstance(reference, Digest):
            # Deleted upstream: not to be served as stale. Unless that is what a stranger is told, of what is not his.
            if self._access.was_admitted(visitor):
                forget(self._records, "tag", visitor.origin.key, reference)

    # the store

    async def _kept(self, key: str, digest: Digest, media_type: str | None = None) -> ManifestAnswer | None:
        """Return a manifest of this repository from the store, as a HIT; of a `media_type` if it is not known there."""
        if not self._links.has_manifest(key, digest):
            return None
        remembered = self._remembered.get(key, digest)
        if remembered is not None:
            return remembered
        noted = self._links.manifest_media_type(key, digest)
        kept = await self._read(digest, noted or media_type)
        # It may have got another type meanwhile.
        if kept is not None and noted is not None and noted == self._links.manifest_media_type(key, digest):
            self._remembered.add(key, kept)
        return kept

    async def _read(self, digest: Digest, media_type: str | None) -> ManifestAnswer | None:
        if media_type is None:
            return None
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        with blob:
            cached = blob.read(0, blob.size)
            if cached is not None and len(cached) == blob.size:
                content = bytes(cached)
            else:  # memory has none of it, or the beginning only
                content = await in_thread(self._reactor, blob.read_blocking, 0, blob.size)
        if Digest.of(content, digest.algorithm) != digest:
            # It costs some microseconds to notice it, and all that is pulled by a wrong manifest is wrong.
            log.error("{digest} is damaged on the disk: it is fetched again", digest=str(digest))
            with suppress(OSError):
                self._blobs.remove(digest)
            return None
        return ManifestAnswer(digest, media_type, len(content), content, "HIT")

    async def _note_type(self, key: str, digest: Digest, media_type: str) -> None:
        """Let the repository have a manifest that is here, of the type that upstream says now."""
        if self._links.manifest_media_type(key, digest) != media_type or not self._links.has_manifest(key, digest):
            await note_link(self._reactor, self._links.link_manifest, key, digest, media_type)
            self._remembered.forget(key, digest)

    async def _store(self, key: str, digest: Digest, media_type: str, content: bytes) -> None:
        try:
            await in_thread(self._reactor, self._blobs.put, content, digest)
            await in_thread(self._reactor, self._links.link_manifest, key, digest, media_type)
            self._remembered.forget(key, digest)  # it may have had another media type
        except OSError as error:
            log.warn("{digest} was not cached: {why}", digest=str(digest), why=error.strerror)
        else:
            self._keep(digest, len(content))

    def _known(self, key: str, tag: Tag) -> dict[str, _Known]:
        """Return what is remembered of a tag, by the key of the media types that were asked for."""
        known = {}
        for name, entry in (self._records.get("tag", key, tag) or {}).items():
            try:
                known[name] = _Known(Digest.parse(entry["digest"]), str(entry["type"]), float(entry["checked"]))
            except (DigestInvalid, KeyError, TypeError, ValueError):
                continue  # damaged: it is asked for again
        return known

    def _note_tag(self, key: str, tag: Tag, accept: list[str], digest: Digest, media_type: str) -> None:
        known = self._known(key, tag)
        known[accept_key(accept_set(accept))] = _Known(digest, media_type, self._clock())
        newest = sorted(known.items(), key=lambda item: -item[1].checked)[:_MAX_ANSWERS]
        record = {
            name: {"digest": str(entry.digest), "type": entry.media_type, "checked": entry.checked}
            for name, entry in newest
        }
        remember(self._records, record, "tag", key, tag)


def _revalidated(kept: ManifestAnswer, asked: ManifestAnswer) -> ManifestAnswer:
    """Return what is kept, as upstream says by the answer to a HEAD that it is still."""
    return evolve(kept, media_type=asked.media_type, verdict="REVALIDATED")


def _digest_field(answer: Answer) -> Digest | None:
    try:
        return Digest.parse(answer.headers.get("docker-content-digest") or "")
    except DigestInvalid:
        return None


def _media_type_field(answer: Answer) -> str | None:
    """Return the media type that upstream says, unless it says as good as nothing."""
    media_type = (answer.headers.get("content-type") or "").partition(";")[0].strip().lower()
    return None if media_type in ("", "application/json", "application/octet-stream", "text/plain") else media_type
