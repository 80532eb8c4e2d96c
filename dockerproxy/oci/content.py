"""Blob and manifest responses: the values that a registry backend returns and the HTTP API sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attrs import frozen

from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange

VERIFY_FIRST_SIZE = 64 * 1024
"""Blobs of up to this many bytes are verified before they are sent, so that a bad one is a clean error."""

BytesLike = bytes | bytearray | memoryview
"""Bytes of a blob. They are never modified."""


class Content(Protocol):
    """The bytes of a blob, read by offset. The blob may still be downloading."""

    @property
    def size(self) -> int | None:
        """The total size in bytes, or None if it is not known yet."""

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        """Prepare to `read` only these ranges, in this order. They do not overlap."""

    async def read(self, offset: int, max_bytes: int) -> BytesLike:
        """Return at least one byte from `offset` on, waiting for it if necessary; ``b""`` at the end.

        `offset` may be smaller than in the call before, if a client asked for ranges in another order. Raise
        `UpstreamError`.
        """

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        """Return a file descriptor, and the number of bytes at `offset` that are both in memory and part of the blob.

        Return None if there is no such file: a blob that is still downloading must be `read`. The descriptor is valid
        until `close`.
        """

    async def wait_verified(self) -> None:
        """Wait until the blob is certain to be available as a whole. Raise an error if it is not."""

    def close(self) -> None:
        """Release the blob."""


@frozen
class BlobResponse:
    """A blob to send. The receiver closes `content`. It may be None if only the head was requested.

    `because` says why it is no HIT: ``new`` (it was not here), ``evicted DATE IDLE`` (it was), ``unproven`` (upstream
    was asked whether this client may have it), or the sentence of the error for which it is STALE.
    """

    digest: Digest
    size: int | None
    content: Content | None
    cache_status: str
    because: str = ""


@frozen
class ManifestResponse:
    """A manifest to send. `content` may be None if only the head was requested.

    `rate_limit_fields` are those of upstream's response to this request, with names in lower case. `because` says why
    it is no HIT: ``new`` (it was not here), ``evicted DATE IDLE`` (it was), ``unchanged``, ``moved OLD NEW`` (the tag),
    ``accept`` (the tag was not known for these media types), or the sentence of the error for which it is STALE.
    """

    digest: Digest
    media_type: str
    size: int
    content: bytes | None
    cache_status: str
    rate_limit_fields: tuple[tuple[str, str], ...] = ()
    because: str = ""


@frozen
class RemovedImages:
    """The numbers of tags and manifests that were removed from a repository."""

    tags: int
    manifests: int


@frozen
class StoredManifest:
    """A manifest of a repository, as it is stored."""

    digest: Digest
    media_type: str
    content: bytes
