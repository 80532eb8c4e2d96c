"""Cached blobs: served from the store or from a download in progress, after checking the client's access.

A client gets a blob only if upstream would serve it to the same client from the same repository. A link records that
the repository has sent the blob, or has shown that it has it (`PossessionCheck`). Without a link, it has to do so, even
if another registry has sent the blob: all that registries share is the file.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from attrs import evolve
from twisted.logger import Logger

from dockerproxy.cache.access import GRANT_TTL, Access, AccessState
from dockerproxy.cache.best_effort import try_link
from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.downloads import BlobDownload, Downloads
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.pins import PinnedContent
from dockerproxy.cache.possession import PossessionCheck, verified_size
from dockerproxy.cache.space import CacheSpace
from dockerproxy.cache.upstream import (
    RegistryClient,
    UpstreamPrincipal,
    UpstreamResponse,
    error_for_content,
    error_from_response,
    is_denial,
    is_gone,
)
from dockerproxy.concurrency import SingleFlight, in_thread, spawn
from dockerproxy.errors import (
    CaptivePortalSuspected,
    IntermediaryRefused,
    RegistryError,
    ServiceOverloaded,
    Unauthorized,
    UpstreamFailing,
    UpstreamTimeout,
    UpstreamUnreachable,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.content import BlobResponse
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.links import Links, Visibility
from dockerproxy.store.tombstones import Tombstones
from dockerproxy.upstream.content_coding import content_codings
from dockerproxy.upstream.credentials import ClientCredential
from dockerproxy.upstream.refusals import is_page

_NO_HEADERS = Headers()
_OVERLOAD_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # upstream cannot be reached either
_MAX_ATTEMPTS = 3  # because a blob may be evicted between lookup and opening

log = Logger()


class CachedBlobs:
    """Serves blobs of upstream repositories."""

    def __init__(
        self,
        reactor: Any,
        upstream: RegistryClient,
        blobs: Blobs,
        links: Links,
        downloads: Downloads,
        access: Access,
        space: CacheSpace,
        open_readers: OpenReaders,
        possession: PossessionCheck,
        tombstones: Tombstones,
        pinned: PinnedContent,
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self.downloads = downloads
        self._access = access
        self._space = space
        self._open_readers = open_readers
        self._possession = possession
        self._tombstones = tombstones
        self._pinned = pinned
        self._confirmations: SingleFlight[tuple[object, ...], bool] = SingleFlight(cancel_abandoned=True)
        self._access_checks: SingleFlight[tuple[object, ...], int | None] = SingleFlight(cancel_abandoned=True)

    def is_stored(self, digest: Digest) -> bool:
        """Return whether the cache has the whole blob."""
        return self._blobs.exists(digest)

    async def get(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse:
        """Return the blob for `principal`. Raise the error that upstream responded with, or `UpstreamError`."""
        try:
            for _ in range(_MAX_ATTEMPTS):
                response = await self._find(principal, digest)
                if response is not None:
                    return response
        except OSError as error:
            return await self._pass_on(principal, digest, error)
        raise UpstreamFailing(
            f"{digest} was evicted {_MAX_ATTEMPTS} times before it could be served; raise CACHE_MAX_SIZE"
        )

    async def head(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse:
        """Return the blob's size without fetching the blob.

        The size is upstream's word, unless the repository has sent the blob. Upstream must not learn from the question
        whether the cache has a blob of another registry.
        """
        visibility = self._visibility(principal, digest)
        if visibility is not None and self._blobs.exists(digest):
            response = await self.get(principal, digest)
            if response.content is not None:
                response.content.close()
            return evolve(response, content=None)
        size = await self._access_checks.do(
            (principal.repository.key, principal.identity, digest, "HEAD"), lambda: self._ask_size(principal, digest)
        )
        return BlobResponse(digest, size, None, "MISS", self._describe_miss(principal, digest, visibility))

    async def _find(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse | None:
        """Return the blob; None if the caller should try again.

        That is the case if the blob was evicted during the search, or if a download ended.
        """
        visibility = self._visibility(principal, digest)
        granted = visibility is not None and self._is_granted(principal, visibility)
        hit = self._open_stored(digest, "HIT") if granted else None
        if hit is not None:
            return hit
        download = await self._wait_for_download(principal, digest)
        if download is not None:
            return await self._join(download, principal, visibility, granted, "JOINED")
        if not self._blobs.exists(digest):
            download = self._start_download(principal, digest)
            await self._wait_started(download, principal)
            cache_status = "PEER" if download.is_from_member else "MISS"
            return await self._join(download, principal, visibility, granted, cache_status)
        check = partial(self._confirm, digest=digest, proven=visibility is not None)
        status, because = await self._authorize(principal, digest, visibility, check)
        return self._open_stored(digest, status, because)

    def _visibility(self, principal: UpstreamPrincipal, digest: Digest) -> Visibility | None:
        """Return for whom the repository has sent the blob; None if it has not."""
        return self._links.layer_visibility(principal.repository.key, digest)

    def _is_granted(self, principal: UpstreamPrincipal, visibility: Visibility) -> bool:
        public = visibility is Visibility.PUBLIC
        return self._access.state(principal.repository.key, principal.identity, public=public) is AccessState.GRANTED

    async def _join(
        self,
        download: BlobDownload,
        principal: UpstreamPrincipal,
        visibility: Visibility | None,
        granted: bool,
        cache_status: str,
    ) -> BlobResponse | None:
        """Return the blob of a started download from the principal's registry; None if the caller should try again."""
        # The upstream response for this repository and identity, pending or less than GRANT_TTL seconds old, also
        # decides for this client.
        if granted or download.serves(principal, GRANT_TTL):
            is_foreign = download.state is DownloadState.FOLLOWING
            return self._open_reader(download, principal, "JOINED" if is_foreign else cache_status, visibility)
        await download.wait_size()
        if download.size is None:
            return None
        check = partial(self._ask_access, download=download)
        status, because = await self._authorize(principal, download.digest, visibility, check)
        response = self._open_reader(download, principal, "JOINED", visibility)
        # The check was about the bytes of this download. The store may have those of another registry.
        if response is None and download.verified:
            return self._open_stored(download.digest, status, because)
        return response

    async def _pass_on(self, principal: UpstreamPrincipal, digest: Digest, error: OSError) -> BlobResponse:
        """Return the blob from upstream, because the cache cannot be used. Raise `ServiceOverloaded`."""
        if error.errno not in _OVERLOAD_ERRNOS:
            log.error("cannot open {digest} in the cache: {reason}", digest=str(digest), reason=error.strerror)
            reason = f"the cache cannot be read ({error.strerror})"
            download = self.downloads.get(principal.repository.ingest_key(digest))
            if download is None:
                download = self._start_download(principal, digest, reason)
            with suppress(OSError):
                response = await self._join(download, principal, None, False, "PASS")
                if response is not None:
                    return response
        message = f"the proxy cannot open {digest}: {error.strerror}; try again"
        raise ServiceOverloaded(message, headers=[("Retry-After", "1")]) from error

    def _open_stored(self, digest: Digest, cache_status: str, because: str = "") -> BlobResponse | None:
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        self._space.touch(digest)
        content = StoredBlobReader(self._reactor, blob, self._close_reader)
        self._open_readers.add(content)
        return BlobResponse(digest, blob.size, content, cache_status, because)

    def _close_reader(self, reader: StoredBlobReader) -> None:
        self._open_readers.discard(reader)
        if reader.failure is not None:  # the next client gets the blob from upstream
            spawn(
                in_thread(self._reactor, self._blobs.remove, reader.digest), f"removing the unreadable {reader.digest}"
            )

    def _start_download(self, principal: UpstreamPrincipal, digest: Digest, refusal: str = "") -> BlobDownload:
        started_at = self._access.now()
        # A 200 does not prove access, because a captive portal answers every request with 200. Record the grant only
        # once the digest has been verified.
        return self.downloads.start(
            principal, digest, lambda: self._record_grant(principal, digest, started_at), refusal
        )

    def _open_reader(
        self, download: BlobDownload, principal: UpstreamPrincipal, cache_status: str, visibility: Visibility | None
    ) -> BlobResponse | None:
        content = download.open_reader(principal.repository, principal.client)
        if content is None:
            return None
        is_new = cache_status in ("MISS", "PEER")
        because = self._describe_miss(principal, download.digest, visibility) if is_new else ""
        return BlobResponse(download.digest, download.size, content, cache_status, because)

    def _describe_miss(self, principal: UpstreamPrincipal, digest: Digest, visibility: Visibility | None) -> str:
        """Return why the blob is not here: ``new``, or ``evicted DATE IDLE``."""
        key, is_linked = principal.repository.key, visibility is not None
        return str(self._tombstones.find_in(key, digest, is_linked=is_linked) or "new")

    async def _wait_for_download(self, principal: UpstreamPrincipal, digest: Digest) -> BlobDownload | None:
        """Return the active download from the principal's registry as soon as it has started; None if there is none.

        If downloads of other clients fail, the clients that wait start theirs in the order of their requests.
        """
        while (download := self.downloads.get(principal.repository.ingest_key(digest))) is not None:
            if await self._wait_started(download, principal):
                return download
        return None

    async def _wait_started(self, download: BlobDownload, principal: UpstreamPrincipal) -> bool:
        """Wait until upstream has begun to send.

        Raise the error that upstream responded with. Return False if that error applies only to another client.
        """
        try:
            await download.wait_started()
        except RegistryError as error:
            if download.repository != principal.repository and not _is_shared_failure(error):
                return False
            self._record_denial(principal, error)
            raise
        return True

    async def _authorize(
        self,
        principal: UpstreamPrincipal,
        digest: Digest,
        visibility: Visibility | None,
        check: Callable[[UpstreamPrincipal], Awaitable[object]],
    ) -> tuple[str, str]:
        """Let `check` ask upstream whether `principal` may read the blob. Return the cache status and its cause.

        If upstream fails, an earlier grant is sufficient for a blob that the repository has sent.
        """
        try:
            await check(principal)
            return "REVALIDATED", "unproven"
        except RegistryError as error:
            outage = error
            if visibility is None:
                raise
            if not is_outage(error):
                if await self._keeps(principal, digest, visibility, error):
                    return "STALE", outage.message
                raise
            identity = self._access.outage_identity(principal, error, public=visibility is Visibility.PUBLIC)
            if identity is None:
                raise
        # Upstream may have failed only because of the credential, which the client chose.
        if identity == PUBLIC and isinstance(principal.repository.credential, ClientCredential):
            try:
                await check(principal.without_credential())
            except RegistryError as error:
                if not is_outage(error):
                    raise
        return "STALE", outage.message

    async def _keeps(
        self, principal: UpstreamPrincipal, digest: Digest, visibility: Visibility, error: RegistryError
    ) -> bool:
        """Return whether a pinned image has the blob that upstream has no longer, and the client had access."""
        key, public = principal.repository.key, visibility is Visibility.PUBLIC
        if not is_gone(error) or self._access.state(key, principal.identity, public=public) is AccessState.UNKNOWN:
            return False
        return await in_thread(self._reactor, self._pinned.has, key, digest)

    # upstream access checks

    async def _confirm(self, principal: UpstreamPrincipal, digest: Digest, proven: bool) -> None:
        """Check that upstream sends the stored blob to `principal`, sharing identical concurrent checks."""
        now = self._access.now()
        try:
            confirmed = await self._confirmations.do(
                (principal.repository.key, principal.identity, digest, proven),
                lambda: self._possession.confirm(principal, digest, proven=proven),
            )
        except RegistryError as error:
            self._record_denial(principal, error)
            raise
        if confirmed:
            await self._record_grant(principal, digest, now)

    async def _ask_access(self, principal: UpstreamPrincipal, download: BlobDownload) -> None:
        """Ask upstream whether `principal` may read the blob of `download`, which is from the same registry.

        The registry's word for its own content counts once the download is verified.
        """
        now, digest = self._access.now(), download.digest
        await self._access_checks.do(
            (principal.repository.key, principal.identity, digest, download.size),
            lambda: self._probe(principal, digest, download.size),
        )
        if download.verified:
            await self._record_grant(principal, digest, now)
        else:
            download.when_verified(principal, lambda: self._record_grant(principal, digest, now))

    async def _ask_size(self, principal: UpstreamPrincipal, digest: Digest) -> int | None:
        """Return the size of the blob upstream, or None if only the whole blob would show it.

        It grants nothing, because a HEAD proves neither access nor content.
        """
        response = await self._request("HEAD", principal, digest, follow=False)
        if response.status == 429:
            raise await self._error_from(principal, response)
        await response.discard()
        if response.status == 200 and response.length is not None and not content_codings(response.headers):
            return response.length
        # A registry may refuse HEAD only, and a signed URL may be valid for GET only.
        return await self._probe(principal, digest, None)

    async def _probe(self, principal: UpstreamPrincipal, digest: Digest, expected_size: int | None) -> int | None:
        """Request the first byte by GET, following redirects. Return the size of the blob, which must be as expected.

        registry.k8s.io redirects every name and digest, so only the response of the target counts. If the size shows
        only in the whole blob, that is read, unless nothing is expected: then return None, because a request for a head
        must not cost as much as the blob.
        """
        response = await self._request("GET", principal, digest, headers=Headers([("range", "bytes=0-0")]))
        try:
            size = await self._read_size(principal, digest, response, expected_size)
        finally:
            response.abort()
        if expected_size is not None and size != expected_size:
            if response.sender is not None:
                response.sender.report_mismatch(digest)  # so that another one is asked, and upstream in the end
                return await self._probe(principal, digest, expected_size)
            error = error_for_content(
                response,
                f"{principal.repository.registry} returned content of another size for {digest}: "
                f"{'unknown' if size is None else size} instead of {expected_size} bytes",
            )
            self._record_denial(principal, error)
            raise error
        return size

    async def _read_size(
        self, principal: UpstreamPrincipal, digest: Digest, response: UpstreamResponse, expected_size: int | None
    ) -> int | None:
        """Return the size that a response to a request of the first byte gives. Read or discard its body."""
        is_coded = response.status in (200, 206) and bool(content_codings(response.headers))
        if is_coded or (response.status == 200 and response.length is None):
            if expected_size is None and is_page(response.headers):
                raise error_for_content(response, f"upstream returned other content than {digest}")
            if expected_size is None:
                return None
            if is_coded:
                return await self._measure(principal, digest, expected_size)
            return await self._verify(response, digest, expected_size)
        if response.status == 200:
            size = response.length
        elif response.status == 206:
            size = _total_size(response)
        elif response.status == 416:
            size = 0  # RFC 9110, section 14.1.2: only empty content has no first byte
        else:
            raise await self._error_from(principal, response)
        await response.discard()
        return size

    async def _measure(self, principal: UpstreamPrincipal, digest: Digest, expected_size: int) -> int:
        """Return the size of a blob that upstream sends with codings: all that it says is about the coded content."""
        response = await self._request("GET", principal, digest)
        try:
            if response.status != 200:
                raise await self._error_from(principal, response)
            return await self._verify(response, digest, expected_size)
        finally:
            response.abort()

    async def _verify(self, response: UpstreamResponse, digest: Digest, expected_size: int) -> int:
        """Read a response of unknown length and return its size. Raise `UpstreamBroken` if the digest differs."""
        size = await verified_size(self._reactor, response, digest, expected_size)
        if size is None:
            raise error_for_content(response, f"upstream returned content that does not match {digest}")
        return size

    async def _request(
        self,
        method: str,
        principal: UpstreamPrincipal,
        digest: Digest,
        *,
        headers: Headers = _NO_HEADERS,
        follow: bool = True,
    ) -> UpstreamResponse:
        try:
            return await self._upstream.request(
                principal.repository.blob_request(method, digest, headers, follow=follow)
            )
        except (CaptivePortalSuspected, IntermediaryRefused, Unauthorized) as error:
            self._record_denial(principal, error)
            raise

    async def _error_from(self, principal: UpstreamPrincipal, response: UpstreamResponse) -> RegistryError:
        error = await error_from_response(principal.repository.registry, response, "BLOB_UNKNOWN")
        self._record_denial(principal, error)
        return error

    async def _record_grant(self, principal: UpstreamPrincipal, digest: Digest, granted_at: float) -> None:
        key = principal.repository.key
        self._access.record_grant(key, principal.identity, granted_at)
        visibility = Visibility.PUBLIC if principal.identity == PUBLIC else Visibility.PRIVATE
        if self._links.layer_visibility(key, digest) not in (visibility, Visibility.PUBLIC):
            await try_link(self._reactor, self._links.link_layer, key, digest, visibility)

    def _record_denial(self, principal: UpstreamPrincipal, error: RegistryError) -> None:
        if is_denial(error, principal.identity):
            self._access.record_denial(principal.repository.key, principal.identity)


def _is_shared_failure(error: RegistryError) -> bool:
    """Return whether `error`, which failed a download, would hit all clients of that registry in the same way.

    Upstream may have broken off, or failed, only because of one client's credential.
    """
    return isinstance(error, UpstreamUnreachable | UpstreamTimeout)


def _total_size(response: UpstreamResponse) -> int | None:
    """Return the total size given by a 206's Content-Range; None if it is missing or invalid."""
    try:
        return parse_content_range(response.headers.get("content-range") or "")[2]
    except ValueError:
        return None
