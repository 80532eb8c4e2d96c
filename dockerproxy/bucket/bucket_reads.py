"""Reads of the bucket's contents through CACHE_DIR.

A blob is downloaded as one of an upstream registry is: clients share the download, it is resumed by Range, verified,
and kept until it is evicted. The registry is the bucket, under a name that no registry can have.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from attrs import frozen
from twisted.logger import Logger

from dockerproxy.bucket.keys import blob_key
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.cache.downloads import Downloads
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.space import CacheSpace
from dockerproxy.cache.upstream import DirectResponse, UpstreamPrincipal, UpstreamRepository, UpstreamResponse
from dockerproxy.concurrency import current_client, in_thread
from dockerproxy.errors import BlobUnknown, RegistryError, ServiceOverloaded, StoreUnavailable, UpstreamFailing
from dockerproxy.oci.content import Content
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest, Host, Registry, Repository
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.upstream.credentials import Anonymous
from dockerproxy.upstream.registry_request import RegistryRequest


@frozen
class BucketRegistry(Registry):
    """The bucket as a registry. Messages do not show its host, which nobody knows."""

    def __str__(self) -> str:
        return "the bucket of REGISTRY_STORE"


BUCKET_REGISTRY = BucketRegistry(Host("registry-store.invalid", 443))
"""The name of the bucket among the registries of the cache. RFC 6761, section 6.4: no host can have it."""

_IDENTITY = "hosted"  # not that of the public, so that nobody sees the names of repositories among the downloads
_MAX_ATTEMPTS = 3  # because a blob may be evicted between two looks

log = Logger()


@frozen
class BucketClient:
    """The bucket as a `cache.upstream.RegistryClient` that is asked for blobs only."""

    _bucket: S3Bucket

    async def request(self, request: RegistryRequest) -> UpstreamResponse:
        """Return the response to a GET of `/v2/NAME/blobs/DIGEST`. Raise `BlobUnknown` and `UpstreamFailing`."""
        digest = Digest.parse(request.path.rpartition("/")[2])
        try:
            response = await self._bucket.open(blob_key(digest), request.headers.get("range"))
        except StoreUnavailable as error:
            raise UpstreamFailing(error.message, error.status, headers=error.headers) from error
        if response.status == 404:
            raise BlobUnknown(f"{self._bucket.location} has no content {digest}")
        return response

    async def send(self, *arguments: Any, **options: Any) -> DirectResponse:
        """Raise RuntimeError, because no request of a client is passed on to a bucket."""
        raise RuntimeError("a bucket is no registry")


@frozen
class BucketReads:
    """The contents of the bucket, read through the cache. The caller has checked access."""

    _reactor: Any
    _bucket: S3Bucket
    _blobs: Blobs
    _downloads: Downloads
    _space: CacheSpace
    _open_readers: OpenReaders

    async def open_blob(self, repository: Repository, digest: Digest) -> Content:
        """Open a blob. Raise `BlobUnknown`, or the error of the store as an `UpstreamError`."""
        for _ in range(_MAX_ATTEMPTS):
            stored = self.open_cached(digest)
            if stored is not None:
                return stored
            principal = UpstreamPrincipal(
                UpstreamRepository(BUCKET_REGISTRY, repository, Anonymous()), _IDENTITY, client=current_client.get()
            )
            download = self._downloads.get(principal.repository.ingest_key(digest))
            if download is None:
                download = self._downloads.start(principal, digest, _nothing)
            await download.wait_started()
            reader = download.open_reader(principal.repository, principal.client)
            if reader is not None:
                return reader
            if isinstance(download.failure, RegistryError):
                raise download.failure
        raise ServiceOverloaded(
            f"{digest} was evicted {_MAX_ATTEMPTS} times before it could be served; raise CACHE_MAX_SIZE",
            headers=[("Retry-After", "1")],
        )

    def open_cached(self, digest: Digest) -> Content | None:
        """Open a blob if it is in the cache."""
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        self._space.touch(digest)
        reader = StoredBlobReader(self._reactor, blob, self._close_reader)
        self._open_readers.add(reader)
        return reader

    def _close_reader(self, reader: StoredBlobReader) -> None:
        self._open_readers.discard(reader)
        if reader.failure is not None:  # the next client gets the blob from the bucket
            self._blobs.remove(reader.digest)

    async def read_manifest(self, digest: Digest) -> bytes | None:
        """Return the content of a manifest, which matches its digest; None if there is none, or if it is damaged."""
        content = await self.read_cached_manifest(digest)
        if content is not None:
            return content
        content = await self._bucket.read_start(blob_key(digest), MAX_MANIFEST + 1)
        if content is None:
            return None
        if Digest.of(content, digest.algorithm) != digest:
            log.error(
                "the manifest {digest} in {place} is damaged; push it again",
                digest=str(digest),
                place=str(self._bucket.location),
            )
            return None
        await self.keep_manifest(content, digest)
        return content

    async def read_cached_manifest(self, digest: Digest) -> bytes | None:
        """Return the content of a manifest if it is in the cache."""
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        content = await in_thread(self._reactor, _read, blob)
        if content is not None:
            self._space.touch(digest)
        return content

    async def keep_manifest(self, content: bytes, digest: Digest) -> None:
        """Store a manifest in the cache, if that is possible."""
        with suppress(OSError):
            await in_thread(self._reactor, self._blobs.put, content, digest)
            await self._space.record(digest, len(content), current_client.get(), str(BUCKET_REGISTRY.host))


def _read(blob: OpenBlob) -> bytes | None:
    with blob:
        content = blob.read_blocking(0, MAX_MANIFEST + 1)
    return content if len(content) == blob.size and Digest.of(content, blob.digest.algorithm) == blob.digest else None


async def _nothing() -> None:
    """Do nothing after a download: access is that of the hosted registry."""
