"""What a registry answers with: values that the HTTP face sends, whoever made them."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from dockerproxy.oci.names import Digest

VERIFY_FIRST_SIZE = 64 * 1024
"""Bytes up to which a blob under way is sent only when it is verified: then a bad one is a clean error."""

BytesLike = bytes | bytearray | memoryview
"""Bytes of a content. Nobody changes them any more."""


class Content(Protocol):
    """The bytes of a blob, by offset; perhaps still arriving."""

    @property
    def size(self) -> int | None:
        """The whole length in bytes, or None while nobody knows it."""

    async def read(self, offset: int, max_bytes: int) -> BytesLike:
        """Return bytes from `offset` on, at least one, waiting for them; ``b""`` at the end. Raise `UpstreamError`.

        `offset` grows from call to call.
        """

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        """Return a file's descriptor, and how many bytes it has in memory at `offset` that are the content's there.

        None where there is no such file: what is still arriving is `read`. The descriptor is good until `close`.
        """

    async def wait_verified(self) -> None:
        """Wait until it is certain that the content can be had whole; raise where it cannot."""

    def close(self) -> None:
        """Let go of it."""


@frozen
class BlobResponse:
    """A blob to send. `content` is to be closed; it is None where only the head was asked for and is all there is."""

    digest: Digest
    size: int | None
    content: Content | None
    cache_status: str


@frozen
class ManifestResponse:
    """A manifest to send. `content` is None where only the head was asked for and is all there is."""

    digest: Digest
    media_type: str
    size: int
    content: bytes | None
    cache_status: str
