"""Manifests and tags of any registry: from the store where that is right, from upstream where it has to be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve, frozen
from twisted.logger import Logger

from dockerproxy.cache.access import Access, Standing
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.origin import Answer, Upstream, Visitor, refuse
from dockerproxy.errors import (
    DigestInvalid,
    ManifestInvalid,
    RegistryError,
    UpstreamBroken,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.manifests import (
    DOCKER_SCHEMA1_SIGNED,
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
from dockerproxy.tasks import Coalescing, in_thread

_MAX_ANSWERS = 16  # for one tag: so many different sets of media types are remembered

log = Logger()


@frozen
class _Known:
    """What a tag was found to name, for one set of media types; `checked` is POSIX time."""

    digest: Digest
    media_type: str
    checked: float


class CachedManifests:
    """Answers for manifests; `clock` is POSIX time, `keep` counts what is written to the store."""

    def __init__(
        self,
        reactor: Any,
        upstream: Upstream,
        blobs: Blobs,
        links: Links,
        records: Records,
        access: Access,
        freshness: Freshness,
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
        self._clock = clock
        self._keep = keep
        self._asking: Coalescing[tuple[object, ...], ManifestAnswer] = Coalescing()

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
            return evolve(kept, verdict="HIT")
        try:
            if kept is not None or head:
                asked = await self._ask("HEAD", visitor, digest, accept)
                return evolve(kept, verdict="REVALIDATED") if kept is not None else asked
            return await self._ask("GET", visitor, digest, accept)
        except RegistryError as error:
            if kept is not None and is_outage(error) and self._was_admitted(visitor):
                return evolve(kept, verdict="STALE")
            raise

    # by tag: upstream says what it names, unless it said so a short while ago or cannot say it

    async def _by_tag(self, visitor: Visitor, tag: Tag, accept: list[str], head: bool) -> ManifestAnswer:
        key = visitor.origin.key
        accepted = accept_set(accept)
        known = self._known(key, tag).get(accept_key(accepted))
        kept = await self._kept(key, known.digest, known.media_type) if known is not None else None
        if known is not None and kept is not None and self._is_fresh(visitor, tag, known):
            return evolve(kept, verdict="HIT")
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
        now = kept if kept is not None and asked.digest == kept.digest else None
        if now is None:
            now = await self._kept(visitor.origin.key, asked.digest, asked.media_type)
        if now is not None:
            return evolve(now, verdict="REVALIDATED")
        return asked if head else await self._ask("GET", visitor, tag, accept)

    async def _stale(self, visitor: Visitor, tag: Tag, accepted: frozenset[str]) -> ManifestAnswer | None:
        """Return the last good answer that suits the client, for a visitor that upstream once let in."""
        key = visitor.origin.key
        if not self._was_admitted(visitor):
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

    def _was_admitted(self, visitor: Visitor) -> bool:
        identities = [visitor.identity] if visitor.voucher is None else [visitor.identity, visitor.voucher]
        return any(
            self._access.standing(visitor.origin.key, identity) is not Standing.UNKNOWN for identity in identities
        )

    # upstream

    async def _ask(self, method: str, visitor: Visitor, reference: Reference, accept: list[str]) -> ManifestAnswer:
        """Ask upstream, joining whoever asks the same with the same standing."""
        key = (method, visitor.origin.key, str(reference), accept_key(accept_set(accept)), visitor.identity)
        return await self._asking.do(key, lambda: self._ask_alone(method, visitor, reference, accept))

    async def _ask_alone(
        self, method: str, visitor: Visitor, reference: Reference, accept: list[str]
    ) -> ManifestAnswer:
        origin = visitor.origin
        headers = Headers([("accept", value) for value in accept])
        answer = await self._upstream.request(
            method, origin.registry, origin.manifest_path(reference),
            name=origin.name, credential=origin.credential, headers=headers,
        )  # fmt: skip
        if answer.status == 405 and method == "HEAD":
            await answer.discard()
            return await self._ask("GET", visitor, reference, accept)
        if answer.status != 200:
            error = await refuse(origin.registry, answer)
            self._note_refusal(visitor, reference, error)
            raise error
        self._access.proven(origin.key, visitor.identity)
        if method == "HEAD":
            return await self._accept_head(visitor, reference, accept, answer)
        return await self._accept_content(visitor, reference, accept, answer)

    async def _accept_head(
        self, visitor: Visitor, reference: Reference, accept: list[str], answer: Answer
    ) -> ManifestAnswer:
        digest = _digest_field(answer)
        length = answer.headers.get("content-length") or ""
        await answer.discard()
        if isinstance(reference, Digest):
            digest = reference
        if digest is None or not (length.isascii() and length.isdigit()):
            # A registry that does not say the digest in a HEAD: only the content tells.
            return await self._ask("GET", visitor, reference, accept)
        media_type = _media_type_field(answer) or "application/octet-stream"
        if isinstance(reference, Digest):
            if self._blobs.exists(digest):
                await in_thread(self._reactor, self._links.link_manifest, visitor.origin.key, digest, media_type)
        else:
            self._note_tag(visitor.origin.key, reference, accept, digest, media_type)
        return ManifestAnswer(digest, media_type, int(length), None, "MISS")

    async def _accept_content(
        self, visitor: Visitor, reference: Reference, accept: list[str], answer: Answer
    ) -> ManifestAnswer:
        registry = visitor.origin.registry
        content = await answer.read_all(MAX_MANIFEST)
        try:
            media_type = _media_type_field(answer) or media_type_of(content)
            media_type_of(content)
        except ManifestInvalid:
            raise UpstreamBroken(f"{registry} sent something that is no manifest") from None
        claimed = reference if isinstance(reference, Digest) else _digest_field(answer)
        if media_type == DOCKER_SCHEMA1_SIGNED and claimed is not None:
            # Its digest is that of a part of it (the JWS payload): it is passed on, and not kept.
            return ManifestAnswer(claimed, media_type, len(content), content, "PASS")
        digest = Digest.of(content, claimed.algorithm if claimed is not None else "sha256")
        if claimed is not None and digest != claimed:
            raise UpstreamBroken(f"{registry} sent content that is not {claimed}")
        await self._store(visitor.origin.key, digest, media_type, content)
        if not isinstance(reference, Digest):
            self._note_tag(visitor.origin.key, reference, accept, digest, media_type)
            await in_thread(self._reactor, self._links.set_tag, visitor.origin.key, reference, digest)
        return ManifestAnswer(digest, media_type, len(content), content, "MISS")

    def _note_refusal(self, visitor: Visitor, reference: Reference, error: RegistryError) -> None:
        if not isinstance(error, UpstreamRefused):
            return
        if error.status in (401, 403):
            self._access.refused(visitor.origin.key, visitor.identity)
        elif error.status == 404 and not isinstance(reference, Digest):
            self._records.remove("tag", visitor.origin.key, reference)  # deleted upstream: not to be served as stale

    # the store

    async def _kept(self, key: str, digest: Digest, media_type: str | None = None) -> ManifestAnswer | None:
        """Return a manifest of this repository from the store."""
        media_type = self._links.manifest_media_type(key, digest) or media_type
        if media_type is None or not self._links.has_manifest(key, digest):
            return None
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        with blob:
            cached = blob.read(0, blob.size)
            if cached is None:
                content = await in_thread(self._reactor, blob.read_blocking, 0, blob.size)
            else:
                content = bytes(cached)
            return ManifestAnswer(digest, media_type, blob.size, content, "HIT")

    async def _store(self, key: str, digest: Digest, media_type: str, content: bytes) -> None:
        try:
            await in_thread(self._reactor, self._blobs.put, content, digest)
            await in_thread(self._reactor, self._links.link_manifest, key, digest, media_type)
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
        self._records.put(record, "tag", key, tag)


def _digest_field(answer: Answer) -> Digest | None:
    try:
        return Digest.parse(answer.headers.get("docker-content-digest") or "")
    except DigestInvalid:
        return None


def _media_type_field(answer: Answer) -> str | None:
    """Return the media type that upstream says, unless it says as good as nothing."""
    media_type = (answer.headers.get("content-type") or "").partition(";")[0].strip().lower()
    return None if media_type in ("", "application/json", "application/octet-stream", "text/plain") else media_type
