"""Cached blobs: served from the store or from a download in progress, after checking the client's access.

A client gets a blob only if upstream would serve it to the same client from the same repository.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from dockerproxy.cache.access import GRANT_TTL, Access, AccessState
from dockerproxy.cache.best_effort import try_link
from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.downloads import BlobDownload, Downloads
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.space import CacheSpace
from dockerproxy.cache.upstream import (
    RegistryClient,
    UpstreamPrincipal,
    UpstreamResponse,
    error_from_response,
    is_denial,
)
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import RegistryError, Unauthorized, UpstreamBroken, UpstreamError, UpstreamFailing, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.oci.content import BlobResponse
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.links import Links

_NO_HEADERS = Headers()
_MAX_ATTEMPTS = 3  # because a blob may be evicted between lookup and opening


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
    ) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._links = links
        self.downloads = downloads
        self._access = access
        self._space = space
        self._open_readers = open_readers
        self._upstream_checks: SingleFlight[tuple[object, ...], tuple[int | None, bool]] = SingleFlight()

    async def get(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse:
        """Return the blob for `principal`. Raise the error that upstream responded with, or `UpstreamError`."""
        for _ in range(_MAX_ATTEMPTS):
            response = await self._find(principal, digest)
            if response is not None:
                return response
        raise UpstreamFailing(
            f"{digest} was evicted {_MAX_ATTEMPTS} times before it could be served; raise CACHE_MAX_SIZE"
        )

    async def head(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse:
        """Return the blob's size without fetching the blob."""
        if self._blobs.exists(digest):
            response = await self.get(principal, digest)
            if response.content is not None:
                response.content.close()
            return evolve(response, content=None)
        download = self.downloads.get(principal.repository.ingest_key(digest))
        expected_size = None if download is None else download.size
        return BlobResponse(digest, await self._check_upstream(principal, digest, expected_size), None, "MISS")

    async def _find(self, principal: UpstreamPrincipal, digest: Digest) -> BlobResponse | None:
        """Return the blob; None if the caller should try again.

        That is the case if the blob was evicted during the search, or if a download for another client failed.
        """
        key = principal.repository.key
        linked = self._links.has_layer(key, digest)
        granted = linked and self._access.state(key, principal.identity) is AccessState.GRANTED
        hit = self._open_stored(digest, "HIT") if granted else None
        if hit is not None:
            return hit
        download = self.downloads.get(principal.repository.ingest_key(digest))
        if download is not None:
            return await self._join(download, principal, linked, granted, "JOINED")
        size = self._blobs.size(digest)
        if size is None:
            return await self._join(self._start_download(principal, digest), principal, linked, granted, "MISS")
        status = await self._authorize(principal, digest, size, linked)
        return self._open_stored(digest, status)

    async def _join(
        self, download: BlobDownload, principal: UpstreamPrincipal, linked: bool, granted: bool, cache_status: str
    ) -> BlobResponse | None:
        """Return the blob of a download from the principal's registry; None if the caller should try again."""
        if not await self._wait_started(download, principal):
            return None
        # The upstream response for this repository and identity, pending or less than GRANT_TTL seconds old, also
        # decides for this client.
        if granted or download.serves(principal, GRANT_TTL):
            is_foreign = download.state is DownloadState.FOLLOWING
            return self._open_reader(download, principal, "JOINED" if is_foreign else cache_status)
        await download.wait_size()
        if download.size is None:
            return None
        status = await self._authorize(principal, download.digest, download.size, linked)
        response = self._open_reader(download, principal, "JOINED")
        # The check was for a blob of this size. The store may have another one, from another registry.
        if response is None and self._blobs.size(download.digest) == download.size:
            return self._open_stored(download.digest, status)
        return response

    def _open_stored(self, digest: Digest, cache_status: str) -> BlobResponse | None:
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        self._space.touch(digest)
        content = StoredBlobReader(self._reactor, blob, self._open_readers.discard)
        self._open_readers.add(content)
        return BlobResponse(digest, blob.size, content, cache_status)

    def _start_download(self, principal: UpstreamPrincipal, digest: Digest) -> BlobDownload:
        started_at = self._access.now()
        # A 200 does not prove access, because a captive portal answers every request with 200. Record the grant only
        # once the digest has been verified.
        return self.downloads.start(principal, digest, lambda: self._record_grant(principal, digest, started_at))

    def _open_reader(
        self, download: BlobDownload, principal: UpstreamPrincipal, cache_status: str
    ) -> BlobResponse | None:
        content = download.open_reader(principal.repository)
        return None if content is None else BlobResponse(download.digest, download.size, content, cache_status)

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

    async def _authorize(self, principal: UpstreamPrincipal, digest: Digest, expected_size: int, linked: bool) -> str:
        """Check that `principal` may read the blob, which has `expected_size` bytes. Return the cache status."""
        try:
            await self._check_upstream(principal, digest, expected_size)
        except RegistryError as error:
            if is_outage(error) and linked and self._access.had_access(principal):
                return "STALE"
            raise
        return "REVALIDATED"

    # upstream access checks

    async def _check_upstream(
        self, principal: UpstreamPrincipal, digest: Digest, expected_size: int | None
    ) -> int | None:
        """Check upstream that `principal` may read the blob, sharing identical concurrent checks. Return the size.

        `expected_size` is the size of the cached blob. A response proves access only if it has that size.
        """
        now = self._access.now()
        size, conclusive = await self._upstream_checks.do(
            (principal.repository.key, principal.identity, digest, expected_size),
            lambda: self._head_upstream(principal, digest, expected_size),
        )
        if conclusive:
            await self._record_check(principal, digest, size, now)
        return size

    async def _head_upstream(
        self, principal: UpstreamPrincipal, digest: Digest, expected_size: int | None
    ) -> tuple[int | None, bool]:
        response = await self._request("HEAD", principal, digest, follow=False)
        if response.status == 200:
            await response.discard()
            if response.length is not None and expected_size in (None, response.length):
                digest_matches = response.headers.get("docker-content-digest") == str(digest)
                return response.length, digest_matches or expected_size is not None
        elif 300 <= response.status < 400 or response.status in (405, 501):
            await response.discard()
        else:
            raise await self._error_from(principal, response)
        # A redirect does not prove access: registry.k8s.io redirects every name and digest, and only the target
        # decides. Follow it by GET, because a signed URL may be valid for GET only.
        return await self._probe(principal, digest, expected_size)

    async def _probe(
        self, principal: UpstreamPrincipal, digest: Digest, expected_size: int | None
    ) -> tuple[int | None, bool]:
        """Request the first byte by GET, following redirects."""
        response = await self._request("GET", principal, digest, headers=Headers([("range", "bytes=0-0")]))
        if response.status == 200:
            size = response.length
            if size is None:
                return await _verify_and_measure(response, digest), True
        elif response.status == 206:
            size = _total_size(response)
        elif response.status == 416:
            size = 0  # RFC 9110, section 14.1.2: only empty content has no first byte
        else:
            raise await self._error_from(principal, response)
        await response.discard()
        if expected_size is not None and size != expected_size:
            raise UpstreamBroken(
                f"{principal.repository.registry} returned content of another size for {digest}: "
                f"{'unknown' if size is None else size} instead of {expected_size} bytes"
            )
        return size, expected_size is not None

    async def _request(
        self,
        method: str,
        principal: UpstreamPrincipal,
        digest: Digest,
        *,
        headers: Headers = _NO_HEADERS,
        follow: bool = True,
    ) -> UpstreamResponse:
        repository = principal.repository
        try:
            return await self._upstream.request(
                method, repository.registry, repository.blob_path(digest),
                name=repository.name, credential=repository.credential, headers=headers, follow=follow,
            )  # fmt: skip
        except Unauthorized as error:
            self._record_denial(principal, error)
            raise

    async def _error_from(self, principal: UpstreamPrincipal, response: UpstreamResponse) -> RegistryError:
        error = await error_from_response(principal.repository.registry, response, "BLOB_UNKNOWN")
        self._record_denial(principal, error)
        return error

    async def _record_check(
        self, principal: UpstreamPrincipal, digest: Digest, size: int | None, checked_at: float
    ) -> None:
        """Record that upstream offers `principal` the blob with `size` bytes.

        The offer is no proof that the registry has the content. It counts for a stored blob of this size, or for a
        download from the same registry once that is verified.
        """
        stored_size = self._blobs.size(digest)
        download = self.downloads.get(principal.repository.ingest_key(digest))
        if stored_size is not None and stored_size == size:
            await self._record_grant(principal, digest, checked_at)
        elif stored_size is None and download is not None:
            download.when_verified(principal, lambda: self._record_grant(principal, digest, checked_at))

    async def _record_grant(self, principal: UpstreamPrincipal, digest: Digest, granted_at: float) -> None:
        self._access.record_grant(principal.repository.key, principal.identity, granted_at)
        if not self._links.has_layer(principal.repository.key, digest):
            await try_link(self._reactor, self._links.link_layer, principal.repository.key, digest)

    def _record_denial(self, principal: UpstreamPrincipal, error: RegistryError) -> None:
        if is_denial(error):
            self._access.record_denial(principal.repository.key, principal.identity)


def _is_shared_failure(error: RegistryError) -> bool:
    """Return whether `error`, which failed a download, would hit all clients of that registry in the same way."""
    return isinstance(error, UpstreamError) and error.status != 429


async def _verify_and_measure(response: UpstreamResponse, digest: Digest) -> int:
    """Read a response of unknown length and return its size. Raise `UpstreamBroken` if the digest differs."""
    hasher, size = digest.hasher(), 0
    while data := await response.read_chunk():
        hasher.update(data)
        size += len(data)
    if hasher.hexdigest() != digest.hex:
        raise UpstreamBroken(f"upstream returned content that does not match {digest}")
    return size


def _total_size(response: UpstreamResponse) -> int | None:
    """Return the total size given by a 206's Content-Range; None if it is missing or invalid."""
    try:
        return parse_content_range(response.headers.get("content-range") or "")[2]
    except ValueError:
        return None
