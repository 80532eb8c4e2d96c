"""Cached manifests and tags: served from the store if access and freshness allow it, otherwise from upstream.

A repository serves only manifests that it has sent itself, in response to a GET. The response to a HEAD may name one of
these. Any other manifest has to be fetched, even if another registry has sent it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

from attrs import evolve, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger

from dockerproxy.cache.access import Access, AccessState
from dockerproxy.cache.best_effort import try_link, try_put, try_remove
from dockerproxy.cache.companions import Companions
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.pins import PinnedContent
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.cache.upstream import (
    RegistryClient,
    UpstreamPrincipal,
    UpstreamResponse,
    error_for_content,
    error_from_response,
    is_denial,
    is_gone,
    rate_limit_fields,
)
from dockerproxy.concurrency import KeyedLock, SingleFlight, in_thread
from dockerproxy.errors import (
    CaptivePortalSuspected,
    DigestInvalid,
    HeadRefused,
    IntermediaryRefused,
    ManifestInvalid,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamUnreachable,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.manifests import (
    DOCKER_SCHEMA1_SIGNED,
    KNOWN_TYPES,
    MAX_MANIFEST,
    accept_key,
    accept_set,
    accepts,
    data_type,
    media_type_of,
)
from dockerproxy.oci.names import Digest, Reference, Tag
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.links import Links, Visibility
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.content_coding import content_codings
from dockerproxy.upstream.refusals import is_page

_MAX_TAG_ENTRIES = 16  # of one kind per tag (public or private, claimed or not): one for each set of media types
_PRIVATE_PREFIX, _CLAIMED_PREFIX = "private ", "claimed "  # of the keys of such entries in a record
_OWN_ACCEPT = sorted(KNOWN_TYPES)
_REFUSALS = frozenset({401, 403, 404})  # statuses by which registries deny access, or hide what is there
_OUTAGE_CHECK_TIMEOUT = 10.0  # seconds
_MEMORY_TTL = (
    30.0  # seconds; a new read updates the manifest's last use, and sees a media type that another process wrote
)
_MEMORY_MAX_MANIFEST = 256 * 1024  # bytes; manifests of images have some KiB
_MEMORY_MAX_TOTAL = 4 * 1024 * 1024  # bytes of all entries
_MEMORY_ENTRY_OVERHEAD = 1024  # approximate bytes per entry in addition to its content

log = Logger()


@frozen
class TagEntry:
    """The digest that upstream returned for a tag and one set of accepted media types. `checked_at` is POSIX time.

    It is public if upstream has returned it to a client without a credential. It is claimed if upstream has named a
    digest that it had not sent at that time, in response to a HEAD; it counts as soon as the manifest has been sent. It
    is relayed if a member of the fleet has returned it, whose answer may be as old as it is fresh: it is never fresh
    here, so that the ages do not add up.
    """

    accept: str
    digest: Digest
    media_type: str
    checked_at: float
    public: bool
    claimed: bool = False
    relayed: bool = False

    @property
    def record_key(self) -> str:
        return ("" if self.public else _PRIVATE_PREFIX) + (_CLAIMED_PREFIX if self.claimed else "") + self.accept


def is_public_entry(record_key: str) -> bool:
    """Return whether a `TagEntry.record_key` is that of a public entry."""
    return not record_key.startswith(_PRIVATE_PREFIX)


def tag_entries(records: Records, key: str, tag: str) -> list[TagEntry]:
    """Return the entries of a tag of the repository `key`, the newest first."""
    entries = []
    for name, entry in (records.get("tag", key, tag) or {}).items():
        public, name = not name.startswith(_PRIVATE_PREFIX), name.removeprefix(_PRIVATE_PREFIX)
        claimed, accept = name.startswith(_CLAIMED_PREFIX), name.removeprefix(_CLAIMED_PREFIX)
        try:
            digest, checked_at = Digest.parse(entry["digest"]), float(entry["checked"])
            relayed = entry.get("relayed") is True
            entries.append(TagEntry(accept, digest, str(entry["type"]), checked_at, public, claimed, relayed))
        except (DigestInvalid, KeyError, AttributeError, TypeError, ValueError):
            continue  # ignore a damaged entry; upstream is asked again
    return sorted(entries, key=lambda entry: -entry.checked_at)


@frozen
class _Loaded:
    """A stored manifest. It is public if upstream has sent it to a client without a credential."""

    manifest: ManifestResponse
    public: bool


class CachedManifests:
    """Serves manifests of upstream repositories.

    `clock` returns POSIX time. `on_stored` is called with the digest and size of each stored manifest, and with the
    client and registry that it is from; `on_used` with the digest of each one that is read again; `on_pull` with the
    registry and repository of each GET that was answered. `lock` may span processes: identical upstream requests are
    sent one at a time.
    """

    def __init__(
        self,
        reactor: Any,
        upstream: RegistryClient,
        blobs: Blobs,
        links: Links,
        records: Records,
        access: Access,
        companions: Companions,
        freshness: Freshness,
        rate_limits: RateLimits,
        pinned: PinnedContent,
        lock: KeyedLock,
        parser: ContentParser,
        tombstones: Tombstones,
        *,
        clock: Callable[[], float],
        on_stored: Callable[[Digest, int, str, str], None],
        on_used: Callable[[Digest], None],
        on_pull: Callable[[str, str], None],
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self._records = records
        self._access = access
        self._companions = companions
        self._freshness = freshness
        self.rate_limits = rate_limits
        self._pinned = pinned
        self._lock = lock
        self._parser = parser
        self._tombstones = tombstones
        self._clock = clock
        self._on_stored = on_stored
        self._on_used = on_used
        self._on_pull = on_pull
        self._requests: SingleFlight[tuple[object, ...], ManifestResponse] = SingleFlight()
        self._first_pulls: SingleFlight[tuple[object, ...], ManifestResponse] = SingleFlight()
        self._memory_cache = ManifestMemoryCache(clock)

    async def get(
        self, principal: UpstreamPrincipal, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        """Return the manifest. `accept` has the client's Accept fields. Raise the error that upstream returned."""
        if isinstance(reference, Digest):
            return await self._get_by_digest(principal, reference, accept, head)
        return await self._get_by_tag(principal, reference, accept, head)

    # by digest: the content cannot change, so only access must be checked

    async def _get_by_digest(
        self, principal: UpstreamPrincipal, digest: Digest, accept: list[str], head: bool
    ) -> ManifestResponse:
        loaded = await self._load(principal.repository.key, digest)
        if loaded is not None and self._is_granted(principal, loaded.public):
            return loaded.manifest
        because = self._describe_miss(principal, digest, "new")  # before a response makes the link
        try:
            if loaded is not None or head:
                head_result = await self._request("HEAD", principal, digest, accept)
                if loaded is not None:
                    return evolve(_mark_revalidated(loaded.manifest, head_result), because="unchanged")
                return evolve(head_result, because=because)
            return evolve(await self._request("GET", principal, digest, accept), because=because)
        except RegistryError as error:
            if loaded is None:
                raise
            if not is_outage(error):
                if await self._keeps(principal, digest, loaded.public, error):
                    return _mark_stale(loaded.manifest, error)
                raise
            identity = self._access.outage_identity(principal, error, public=loaded.public)
            if identity is None:
                raise
            current = await self._check_outage(principal, identity, digest, error)
            return current or _mark_stale(loaded.manifest, error)

    # by tag: revalidated upstream, unless the entry is fresh or upstream is down

    async def _get_by_tag(
        self, principal: UpstreamPrincipal, tag: Tag, accept: list[str], head: bool
    ) -> ManifestResponse:
        key = principal.repository.key
        media_types = accept_set(accept)
        stored_manifest = evicted_digest = None
        entries = self._tag_entries(key, tag)
        for entry in entries:
            if entry.accept == accept_key(media_types):
                loaded = await self._load(key, entry.digest, entry.media_type)
                if loaded is not None and self._is_fresh(principal, tag, entry, loaded):
                    return loaded.manifest
                if loaded is not None:
                    stored_manifest = stored_manifest or loaded.manifest
                elif not entry.claimed:
                    evicted_digest = evicted_digest or entry.digest
        try:
            if entries or head:
                current = await self._revalidate(principal, tag, accept, stored_manifest, head=head)
            else:
                current = await self._first_pull(principal, tag, accept)
            because = _describe_change(stored_manifest, current, is_known=bool(entries))
            if current.cache_status == "MISS" and evicted_digest is not None:
                # Both are in a record of this tag, so the repository may know of them.
                if evicted_digest == current.digest:
                    because = self._describe_miss(principal, current.digest, because)
                else:
                    because = _describe_move(evicted_digest, current.digest)
            return evolve(current, because=because)
        except RegistryError as error:
            if not is_outage(error):
                kept = await self._serve_pinned(principal, tag, media_types, error)
                if kept is None:
                    raise
                return kept
            stale = await self._serve_stale(principal, tag, media_types, error)
            if stale is None:
                self._companions.check_absence(principal, tag, error)
                raise
            return stale

    def _describe_miss(self, principal: UpstreamPrincipal, digest: Digest, otherwise: str) -> str:
        """Return ``evicted DATE IDLE`` if that is why the manifest is not here, else `otherwise`."""
        key = principal.repository.key
        is_linked = self._links.has_manifest(key, digest)
        return str(self._tombstones.find_in(key, digest, is_linked=is_linked) or otherwise)

    def _is_fresh(self, principal: UpstreamPrincipal, tag: Tag, entry: TagEntry, loaded: _Loaded) -> bool:
        is_fresh = not entry.relayed and self._freshness.is_fresh(tag, self._clock() - entry.checked_at)
        return is_fresh and self._is_granted(principal, entry.public and loaded.public)

    def _is_granted(self, principal: UpstreamPrincipal, public: bool) -> bool:
        return self._access.state(principal.repository.key, principal.identity, public=public) is AccessState.GRANTED

    async def _first_pull(self, principal: UpstreamPrincipal, tag: Tag, accept: list[str]) -> ManifestResponse:
        """Get a tag that is not known yet. Clients that accept other media types wait, because one pull may do."""
        key, media_types = principal.repository.key, accept_key(accept_set(accept))
        return await self._first_pulls.do(
            (key, tag, media_types, principal.identity), lambda: self._first_pull_locked(principal, tag, accept)
        )

    async def _first_pull_locked(self, principal: UpstreamPrincipal, tag: Tag, accept: list[str]) -> ManifestResponse:
        key, started_at = principal.repository.key, self._clock()
        async with self._lock.hold(f"first {key} {tag} {principal.identity}") as waited:
            stored_manifest = await self._stored_since(principal, tag, accept, started_at) if waited else None
            if stored_manifest is not None:
                return stored_manifest
            if waited and self._tag_entries(key, tag):
                return await self._revalidate(principal, tag, accept, None, head=False)
            return await self._request("GET", principal, tag, accept)

    async def _revalidate(
        self,
        principal: UpstreamPrincipal,
        tag: Tag,
        accept: list[str],
        stored_manifest: ManifestResponse | None,
        *,
        head: bool,
    ) -> ManifestResponse:
        # Docker Hub counts no HEAD as a pull. Clients that accept other media types mostly get the same manifest.
        head_result = await self._request("HEAD", principal, tag, accept)
        if head_result.content is not None:
            return head_result  # the HEAD fell back to GET, which already counted as a pull
        if stored_manifest is not None and head_result.digest == stored_manifest.digest:
            return _mark_revalidated(stored_manifest, head_result)
        current = await self._load(principal.repository.key, head_result.digest, head_result.media_type)
        if current is not None:
            return _mark_revalidated(current.manifest, head_result)
        return head_result if head else await self._request("GET", principal, tag, accept)

    async def _serve_stale(
        self, principal: UpstreamPrincipal, tag: Tag, media_types: frozenset[str], error: RegistryError
    ) -> ManifestResponse | None:
        """Return a stored manifest of `tag` that the client accepts, an exact match first, then the newest.

        Return None if there is none that the principal may read during an outage.
        """
        key, exact_key = principal.repository.key, accept_key(media_types)
        for entry in sorted(self._tag_entries(key, tag), key=lambda entry: entry.accept != exact_key):
            if entry.accept == exact_key or accepts(media_types, entry.media_type):
                loaded = await self._load(key, entry.digest, entry.media_type)
                if loaded is None:
                    continue
                public = entry.public and loaded.public
                identity = self._access.outage_identity(principal, error, public=public)
                if identity is not None:
                    current = await self._check_outage(principal, identity, tag, error)
                    accepted = current is not None and accepts(media_types, current.media_type)
                    return current if accepted else _mark_stale(loaded.manifest, error)
        return None

    async def _serve_pinned(
        self, principal: UpstreamPrincipal, tag: Tag, media_types: frozenset[str], error: RegistryError
    ) -> ManifestResponse | None:
        """Return the manifest of a pinned tag that upstream has no longer, as `error` says, if the client accepts it.

        Return None if it is not pinned, or if the client had no access to it before.
        """
        key = principal.repository.key
        if not is_gone(error) or not self._pinned.has_tag(key, tag):
            return None
        for entry in self._tag_entries(key, tag):
            if not accepts(media_types, entry.media_type):
                continue
            loaded = await self._load(key, entry.digest, entry.media_type)
            if loaded is not None and self._had_access(principal, entry.public and loaded.public):
                return _mark_stale(loaded.manifest, error)
        return None

    async def _keeps(self, principal: UpstreamPrincipal, digest: Digest, public: bool, error: RegistryError) -> bool:
        """Return whether a pinned image has the manifest that upstream has no longer, and the client had access."""
        if not is_gone(error) or not self._had_access(principal, public):
            return False
        return await in_thread(self._reactor, self._pinned.has, principal.repository.key, digest)

    def _had_access(self, principal: UpstreamPrincipal, public: bool) -> bool:
        state = self._access.state(principal.repository.key, principal.identity, public=public)
        return state is not AccessState.UNKNOWN

    async def _check_outage(
        self, principal: UpstreamPrincipal, identity: str, reference: Reference, error: RegistryError
    ) -> ManifestResponse | None:
        """Ask upstream once more, in our own words, before a stale response is served because of `error`.

        Upstream may have failed only because of the Accept fields or the credential, which the client chose. `identity`
        is the one that may read the stored manifest during an outage. Return the manifest if upstream sends it, None if
        there is an outage. Raise the error with which upstream refuses it.
        """
        if identity == PUBLIC and principal.identity != PUBLIC:
            principal = principal.without_credential()
        elif error.status == 429:
            return None  # it is for the sender, whatever the fields
        if isinstance(error, UpstreamUnreachable):
            return None
        request = Deferred.fromCoroutine(self._request("GET", principal, reference, _OWN_ACCEPT))
        try:
            return await request.addTimeout(_OUTAGE_CHECK_TIMEOUT, self._reactor)
        except TimeoutError:
            return None
        except RegistryError as own_error:
            if is_outage(own_error):
                return None
            raise

    # upstream

    async def _request(
        self,
        method: str,
        principal: UpstreamPrincipal,
        reference: Reference,
        accept: list[str],
        *,
        is_refused: bool = False,
    ) -> ManifestResponse:
        """Request from upstream. Identical concurrent requests of the same identity share one response.

        A GET that `is_refused`, as the HEAD before it was, is sent although upstream refuses pulls now: it will not be
        counted, and nobody may go on reading because we could not ask.
        """
        accepted = accept_key(accept_set(accept))
        key = (method, principal.repository.key, str(reference), accepted, principal.identity, is_refused)
        return await self._requests.do(
            key, lambda: self._request_locked(method, principal, reference, accept, is_refused)
        )

    async def _request_locked(
        self, method: str, principal: UpstreamPrincipal, reference: Reference, accept: list[str], is_refused: bool
    ) -> ManifestResponse:
        """Request from upstream, unless another process stored the response while this one waited for the lock."""
        started_at = self._clock()
        key = f"{method} {principal.repository.key} {reference} {accept_key(accept_set(accept))} {principal.identity}"
        async with self._lock.hold(key) as waited:
            stored_manifest = await self._stored_since(principal, reference, accept, started_at) if waited else None
            return stored_manifest or await self._request_upstream(method, principal, reference, accept, is_refused)

    async def _stored_since(
        self, principal: UpstreamPrincipal, reference: Reference, accept: list[str], since: float
    ) -> ManifestResponse | None:
        """Return the manifest that was stored for `principal` at the time `since` or later; None if there is none."""
        key = principal.repository.key
        if not self._access.granted_since(key, principal.identity, since):
            return None
        public = principal.identity == PUBLIC
        if isinstance(reference, Digest):
            loaded = await self._load(key, reference)
        else:
            accepted = accept_key(accept_set(accept))
            entries = [entry for entry in self._tag_entries(key, reference) if entry.accept == accepted]
            entry = next((entry for entry in entries if entry.checked_at >= since and entry.public >= public), None)
            loaded = await self._load(key, entry.digest, entry.media_type) if entry is not None else None
        if loaded is None or loaded.public < public:
            return None
        return evolve(loaded.manifest, cache_status="JOINED")

    async def _request_upstream(
        self, method: str, principal: UpstreamPrincipal, reference: Reference, accept: list[str], is_refused: bool
    ) -> ManifestResponse:
        repository = principal.repository
        headers = Headers([("accept", value) for value in accept])
        if method == "GET" and not is_refused:
            self.rate_limits.check(repository.registry, principal.identity)
        try:
            response = await self._upstream.request(repository.manifest_request(method, reference, headers))
        except (CaptivePortalSuspected, IntermediaryRefused, Unauthorized) as error:
            self._record_error(principal, error)
            raise
        # A client that has HEAD refused must not prolong the limit. A member of the fleet says nothing about it.
        if response.sender is None and not (is_refused and response.status == 429):
            self.rate_limits.note(
                repository.registry, principal.identity, method, response.status, response.headers,
                repository.credential.user if isinstance(repository.credential, BasicCredentials) else None,
            )  # fmt: skip
        if method == "GET" and response.status == 200 and response.sender is None:
            self._on_pull(str(repository.registry.host), repository.name)
        if method == "HEAD" and response.status not in (200, 429):
            # Registries and the walls before them refuse HEAD in many ways. Only the answer to GET counts: it decides
            # about grants and tags, and if it is a refusal too, it is no counted pull.
            await response.discard()
            is_refused = response.status in _REFUSALS
            try:
                return await self._request("GET", principal, reference, accept, is_refused=is_refused)
            except UpstreamError as error:
                if not is_refused or not is_outage(error):
                    raise
                refusal = HeadRefused(response.status, error)
            self._record_error(principal, refusal)
            raise refusal
        if response.status != 200:
            upstream_error = await error_from_response(repository.registry, response, "MANIFEST_UNKNOWN")
            if response.status == 429:
                sentence = self.rate_limits.get(repository.registry, principal.identity).describe(repository.registry)
                upstream_error = UpstreamFailing(sentence, 429, headers=upstream_error.headers)
            await self._record_refusal(principal, reference, accept, upstream_error)
            raise upstream_error
        if method == "HEAD":
            return await self._handle_head(principal, reference, accept, response)
        return await self._handle_get(principal, reference, accept, response)

    async def _handle_head(
        self, principal: UpstreamPrincipal, reference: Reference, accept: list[str], response: UpstreamResponse
    ) -> ManifestResponse:
        header_digest, key = _digest_field(response), principal.repository.key
        await response.discard()
        digest = reference if isinstance(reference, Digest) else header_digest
        sent_before = digest is not None and self._links.has_manifest(key, digest)
        stored_size = self._blobs.size(digest) if digest is not None and sent_before else None
        # With a coding, the length is that of the coded content, and only a digest says that it is the same.
        is_coded = bool(content_codings(response.headers))
        size = stored_size if is_coded else response.length
        is_same = stored_size is not None and not is_coded and not is_page(response.headers)
        conclusive = header_digest == digest if header_digest is not None else is_same
        media_type = _media_type_field(response)
        if (
            digest is not None and media_type not in KNOWN_TYPES
        ):  # an artifact's type, or a server's default for any file
            media_type = self._links.manifest_media_type(key, digest)
        if digest is None or size is None or media_type is None or stored_size not in (None, size) or not conclusive:
            # The registry omits fields in HEAD responses, or a captive portal answers. Only the content is conclusive.
            return await self._request("GET", principal, reference, accept)
        if stored_size is not None:
            self._record_grant(principal)
            await self._update_link(principal, digest, media_type)
        if not isinstance(reference, Digest):
            # containerd asks for a tag by HEAD only, and then for its digest. That request may fail.
            self._record_tag(principal, reference, accept, digest, media_type, response, claimed=stored_size is None)
        return ManifestResponse(digest, media_type, size, None, _status(response), rate_limit_fields(response))

    async def _handle_get(
        self, principal: UpstreamPrincipal, reference: Reference, accept: list[str], response: UpstreamResponse
    ) -> ManifestResponse:
        registry = principal.repository.registry
        claimed_digest = reference if isinstance(reference, Digest) else _digest_field(response)
        content = await response.read_all(MAX_MANIFEST, claimed_digest)
        try:
            body_type = await self._parser.parse(media_type_of, content, client=str(registry))
            media_type = _media_type_field(response) or body_type
        except ManifestInvalid:
            error = error_for_content(
                response, f"{registry} returned content for {reference} that is not a valid manifest"
            )
            self._record_error(principal, error)
            raise error from None
        if media_type == body_type == DOCKER_SCHEMA1_SIGNED and claimed_digest is not None:
            # Not cached, because its digest covers only a part of the content, the JWS payload.
            self._record_grant(principal)
            limits = rate_limit_fields(response)
            return ManifestResponse(claimed_digest, media_type, len(content), content, "PASS", limits)
        digest = Digest.of(content, claimed_digest.algorithm if claimed_digest is not None else "sha256")
        if claimed_digest is not None and digest != claimed_digest:
            raise UpstreamBroken(f"{registry} returned content that does not match {claimed_digest}")
        self._record_grant(principal)
        await self._store(principal, digest, media_type, content)
        if not isinstance(reference, Digest):
            self._record_tag(principal, reference, accept, digest, media_type, response)
            await try_link(self._reactor, self._links.set_tag, principal.repository.key, reference, digest)
        limits = rate_limit_fields(response)
        return ManifestResponse(digest, media_type, len(content), content, _status(response), limits)

    def _record_grant(self, principal: UpstreamPrincipal) -> None:
        # Called only after the response has been checked, because a captive portal answers every request.
        self._access.record_grant(principal.repository.key, principal.identity, self._access.now(), write_through=True)

    def _record_error(self, principal: UpstreamPrincipal, error: RegistryError) -> None:
        if is_denial(error, principal.identity):
            self._access.record_denial(principal.repository.key, principal.identity)

    async def _record_refusal(
        self, principal: UpstreamPrincipal, reference: Reference, accept: list[str], error: RegistryError
    ) -> None:
        """Record what upstream's own response says about access, and about the tag `reference` if it has none.

        Registries send 404, too, if they have no manifest of the types that a client accepts. So before others lose
        what is stored of a tag, upstream is asked in our own words.
        """
        self._record_error(principal, error)
        if error.status != 404 or is_outage(error) or isinstance(reference, Digest):
            return
        # The tag was deleted upstream, and must not be served stale. Ignore a 404 to a client that never had access of
        # its own, because registries also send it to hide private repositories.
        key, public = principal.repository.key, principal.identity == PUBLIC
        if not self._had_access(principal, public):
            return
        if is_gone(error) and self._pinned.has_tag(key, reference):
            return  # it stays
        entries = self._tag_entries(key, reference)
        kept = [one for one in entries if one.public != public]
        if len(kept) < len(entries) and accept != _OWN_ACCEPT:
            with suppress(RegistryError):
                await self._request("HEAD", principal, reference, _OWN_ACCEPT)
            return  # if the tag is gone, that request has recorded it
        self._save_tag(key, reference, kept)
        self._companions.record_absence(principal, reference, accept_set(accept))

    # the store

    async def _load(self, key: str, digest: Digest, media_type: str | None = None) -> _Loaded | None:
        """Return a stored manifest of the repository, as a HIT. `media_type` is used if the store has no type."""
        visibility = self._links.manifest_visibility(key, digest)
        if visibility is None:
            return None
        public = visibility is Visibility.PUBLIC
        cached = self._memory_cache.get(key, digest)
        if cached is not None:
            return _Loaded(cached, public)
        linked_type = self._links.manifest_media_type(key, digest)
        manifest = await self._read_stored(digest, linked_type or media_type)
        if manifest is None:
            return None
        # Another process may have changed the type in the meantime.
        if linked_type is not None and linked_type == self._links.manifest_media_type(key, digest):
            self._memory_cache.add(key, manifest)
        return _Loaded(manifest, public)

    async def _read_stored(self, digest: Digest, media_type: str | None) -> ManifestResponse | None:
        if media_type is None:
            return None
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        with blob:
            cached = blob.read(0, blob.size)
            if cached is not None and len(cached) == blob.size:
                content = bytes(cached)
            else:  # the page cache does not hold all of it
                content = await in_thread(self._reactor, blob.read_blocking, 0, blob.size)
        if Digest.of(content, digest.algorithm) != digest:
            # The check takes some microseconds, and a damaged manifest would break the whole pull.
            log.error(
                "removed the damaged manifest {digest} from the cache; it is fetched from upstream again",
                digest=str(digest),
            )
            with suppress(OSError):
                self._blobs.remove(digest)
            return None
        self._on_used(digest)
        return ManifestResponse(digest, media_type, len(content), content, "HIT")

    async def _update_link(self, principal: UpstreamPrincipal, digest: Digest, media_type: str) -> None:
        """Link a stored manifest to the repository, with the media type that upstream gives now."""
        key, visibility = principal.repository.key, _visibility(principal)
        is_linked = self._links.manifest_visibility(key, digest) in (visibility, Visibility.PUBLIC)
        if not is_linked or self._links.manifest_media_type(key, digest) != media_type:
            await try_link(self._reactor, self._links.link_manifest, key, digest, media_type, visibility)
            self._memory_cache.remove(key, digest)

    async def _store(self, principal: UpstreamPrincipal, digest: Digest, media_type: str, content: bytes) -> None:
        key = principal.repository.key
        try:
            await in_thread(self._reactor, self._blobs.put, content, digest)
            await in_thread(self._reactor, self._links.link_manifest, key, digest, media_type, _visibility(principal))
            self._memory_cache.remove(key, digest)  # because its media type may have changed
        except OSError as error:
            log.warn("{digest} was not cached: {reason}", digest=str(digest), reason=error.strerror)
        else:
            self._on_stored(digest, len(content), principal.client, str(principal.repository.registry.host))

    def _tag_entries(self, key: str, tag: Tag) -> list[TagEntry]:
        return tag_entries(self._records, key, tag)

    def _record_tag(
        self,
        principal: UpstreamPrincipal,
        tag: Tag,
        accept: list[str],
        digest: Digest,
        media_type: str,
        response: UpstreamResponse,
        *,
        claimed: bool = False,
    ) -> None:
        """Record what upstream returned for a tag. A claimed entry leaves the last one that is not claimed in place."""
        public = principal.identity == PUBLIC
        relayed = response.sender is not None
        new = TagEntry(accept_key(accept_set(accept)), digest, media_type, self._clock(), public, claimed, relayed)
        key = principal.repository.key
        entries = [
            entry
            for entry in self._tag_entries(key, tag)
            if (entry.accept, entry.public) != (new.accept, public) or (claimed and not entry.claimed)
        ]
        self._save_tag(key, tag, [new, *entries])
        self._companions.forget_absence(principal, tag)

    def _save_tag(self, key: str, tag: Tag, entries: list[TagEntry]) -> None:
        """Save the entries of a tag, of which the newest are first."""
        if not entries:
            try_remove(self._records, "tag", key, tag)
            return
        record = {}
        for kind in product((True, False), repeat=2):
            for entry in [one for one in entries if (one.public, one.claimed) == kind][:_MAX_TAG_ENTRIES]:
                record[entry.record_key] = {
                    "digest": str(entry.digest),
                    "type": entry.media_type,
                    "checked": entry.checked_at,
                    **({"relayed": True} if entry.relayed else {}),
                }
        try_put(self._records, record, "tag", key, tag)


def _status(response: UpstreamResponse) -> str:
    """Return the cache status of content that was not here: upstream or a member of the fleet has sent it."""
    return "MISS" if response.sender is None else "PEER"


def _visibility(principal: UpstreamPrincipal) -> Visibility:
    return Visibility.PUBLIC if principal.identity == PUBLIC else Visibility.PRIVATE


def _mark_revalidated(stored_manifest: ManifestResponse, head_result: ManifestResponse) -> ManifestResponse:
    """Return the stored manifest with the media type of `head_result`, which confirms that it is current."""
    return evolve(
        stored_manifest,
        media_type=head_result.media_type,
        cache_status="REVALIDATED",
        rate_limit_fields=head_result.rate_limit_fields,
    )


def _mark_stale(stored_manifest: ManifestResponse, error: RegistryError) -> ManifestResponse:
    return evolve(stored_manifest, cache_status="STALE", because=error.message)


def _describe_change(stored: ManifestResponse | None, current: ManifestResponse, *, is_known: bool) -> str:
    """Return how a tag has changed since it was `stored`. `is_known` says whether other media types of it are."""
    if stored is None:
        return "accept" if is_known else "new"
    if current.digest == stored.digest:
        return "unchanged"
    return _describe_move(stored.digest, current.digest)


def _describe_move(old: Digest, new: Digest) -> str:
    return f"moved {_abbreviate(old)} {_abbreviate(new)}"


def _abbreviate(digest: Digest) -> str:
    algorithm, _, value = str(digest).partition(":")
    return f"{algorithm}:{value[:12]}"


def _digest_field(response: UpstreamResponse) -> Digest | None:
    try:
        return Digest.parse(response.headers.get("docker-content-digest") or "")
    except DigestInvalid:
        return None


def _media_type_field(response: UpstreamResponse) -> str | None:
    """Return the Content-Type of the response; None if it is missing, generic or not that of a manifest."""
    media_type = (response.headers.get("content-type") or "").partition(";")[0].strip().lower()
    is_generic = media_type in ("application/json", "application/octet-stream") or data_type(media_type) != media_type
    return None if is_generic else media_type


class ManifestMemoryCache:
    """Keeps recently read manifests in memory, because the nodes of a fleet request the same ones at the same time.

    `clock` returns seconds. Links are not cached: a removed manifest must disappear at once in all processes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, Digest], tuple[float, ManifestResponse]] = {}  # the oldest first
        self._size = 0

    def get(self, key: str, digest: Digest) -> ManifestResponse | None:
        """Return an entry that has not expired; None if there is none."""
        entry = self._entries.get((key, digest))
        if entry is None:
            return None
        if not 0 <= self._clock() - entry[0] < _MEMORY_TTL:  # negative if the clock was set back
            self.remove(key, digest)
            return None
        return entry[1]

    def add(self, key: str, manifest: ManifestResponse) -> None:
        """Add a manifest with its content, unless it is larger than _MEMORY_MAX_MANIFEST."""
        self.remove(key, manifest.digest)
        if manifest.size > _MEMORY_MAX_MANIFEST:
            return
        self._entries[key, manifest.digest] = self._clock(), manifest
        self._size += manifest.size + _MEMORY_ENTRY_OVERHEAD
        while self._size > _MEMORY_MAX_TOTAL:
            self.remove(*next(iter(self._entries)))

    def remove(self, key: str, digest: Digest) -> None:
        """Remove a manifest."""
        entry = self._entries.pop((key, digest), None)
        if entry is not None:
            self._size -= entry[1].size + _MEMORY_ENTRY_OVERHEAD
