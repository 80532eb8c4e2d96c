"""Checks by content that a registry has a blob which the cache has already, perhaps from another registry.

Nothing that a registry claims is evidence: not the status of a HEAD, nor a length, nor a digest. Otherwise a registry
could name the digest of a private blob of another one, and its clients would get that blob from the cache. Therefore
the registry has to send parts of the blob, and they are compared with the cached blob.

The parts are chosen with a secret, always the same ones for one registry and blob. If a registry knows a part of a
blob, repeating the question does not help it. The last bytes are always among them, because gzip and zstd end with a
checksum of all content.
"""

from __future__ import annotations

import hmac
import zlib
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

from attrs import frozen
from twisted.internet.task import deferLater

from dockerproxy.cache.upstream import (
    RegistryClient,
    UpstreamPrincipal,
    UpstreamResponse,
    error_for_content,
    error_from_response,
)
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import ResponseCutOff, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.upstream.content_coding import Decoder, can_decode, content_codings

_MAX_WHOLE = 64 * 1024  # bytes; smaller blobs are requested as a whole, because a part of them proves little
_PART_SIZE = 16 * 1024  # bytes
_MIN_COMPRESSED = 1024  # bytes; a part that compresses to fewer, such as one of zeros, could be guessed
_MAX_CANDIDATES = 8  # of which the first that cannot be guessed is requested
_RANGE_REFUSED = frozenset({400, 405, 416, 501})


@frozen
class _Part:
    """The content of a cached blob from byte `start` on."""

    start: int
    content: bytes

    @property
    def range(self) -> str:
        return f"bytes={self.start}-{self.start + len(self.content) - 1}"


@frozen
class _Sample:
    """The size of a cached blob, and the parts of it that prove possession; none if only the whole blob does."""

    size: int
    parts: list[_Part]


class PossessionCheck:
    """Compares cached blobs with what registries send. `secret` decides about the parts."""

    def __init__(self, reactor: Any, upstream: RegistryClient, blobs: Blobs, secret: bytes) -> None:
        self._reactor = reactor
        self._upstream = upstream
        self._blobs = blobs
        self._secret = secret

    async def confirm(self, principal: UpstreamPrincipal, digest: Digest, *, proven: bool) -> bool:
        """Check that the registry sends `principal` the content of the cached blob. Return False if it is not cached.

        `proven` says that the repository has sent the blob before, so that only access is in question. Then the first
        bytes suffice. Raise the error that upstream responded with, and `UpstreamBroken` if it sends anything else.
        """
        sample = await in_thread(self._reactor, self._read_sample, principal, digest, proven)
        if sample is None:
            return False
        for part in sample.parts:
            if not await self._confirm_part(principal, digest, part):
                break
        else:
            if sample.parts:
                return True
        await self._confirm_whole(principal, digest, sample.size)
        return True

    async def _confirm_part(self, principal: UpstreamPrincipal, digest: Digest, part: _Part) -> bool:
        """Check that the registry sends `part`. Return False if it supports no ranges."""
        response = await self._request(principal, digest, Headers([("range", part.range)]))
        try:
            if response.status == 206 or (response.status == 200 and part.start == 0):
                try:
                    await self._compare(principal, digest, response, part.content)
                except UpstreamBroken:
                    if content_codings(response.headers):
                        return False  # it is perhaps a part of the coded content
                    if response.sender is None:
                        raise
                    response.sender.report_mismatch(digest)  # so that another one is asked, and upstream in the end
                    return await self._confirm_part(principal, digest, part)
                await response.discard()
                return True
            if response.status == 200 or response.status in _RANGE_REFUSED:
                await response.discard()
                return False
            raise await error_from_response(principal.repository.registry, response, "BLOB_UNKNOWN")
        finally:
            response.abort()

    async def _compare(
        self, principal: UpstreamPrincipal, digest: Digest, response: UpstreamResponse, content: bytes
    ) -> None:
        """Check that the response begins with `content`."""
        offset = 0
        while offset < len(content):
            data = await response.read_chunk()
            if not data or data[: len(content) - offset] != content[offset : offset + len(data)]:
                raise _other_content(principal, digest, response)
            offset += len(data)

    async def _confirm_whole(self, principal: UpstreamPrincipal, digest: Digest, size: int) -> None:
        """Check that the registry sends the whole blob."""
        response = await self._request(principal, digest, Headers())
        try:
            if response.status != 200:
                raise await error_from_response(principal.repository.registry, response, "BLOB_UNKNOWN")
            if await verified_size(self._reactor, response, digest, size) is None:
                if response.sender is None:
                    raise _other_content(principal, digest, response)
                response.sender.report_mismatch(digest)
                await self._confirm_whole(principal, digest, size)
        finally:
            response.abort()

    async def _request(self, principal: UpstreamPrincipal, digest: Digest, headers: Headers) -> UpstreamResponse:
        # It follows redirects, which are no evidence: registry.k8s.io redirects every name and digest. GET, because a
        # registry may answer HEAD without looking, and a signed URL may be valid for GET only.
        return await self._upstream.request(principal.repository.blob_request("GET", digest, headers))

    # the cached blob

    def _read_sample(self, principal: UpstreamPrincipal, digest: Digest, proven: bool) -> _Sample | None:
        """Return the parts that the registry has to send, or None if the blob is not cached. Blocks."""
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        with blob:
            if blob.size <= _MAX_WHOLE:
                return _Sample(blob.size, [])
            if proven:
                return _Sample(blob.size, [_read_part(blob, 0)])
            for start in self._candidates(principal, blob):
                part = _read_part(blob, start)
                if len(zlib.compress(part.content, 1)) >= _MIN_COMPRESSED:
                    return _Sample(blob.size, [part, _read_part(blob, blob.size - _PART_SIZE)])
            return _Sample(blob.size, [])

    def _candidates(self, principal: UpstreamPrincipal, blob: OpenBlob) -> Iterator[int]:
        """Yield offsets of parts, in an order that only the secret determines."""
        for number in range(_MAX_CANDIDATES):
            text = f"possession\n{principal.repository.registry.host}\n{blob.digest}\n{number}"
            value = hmac.new(self._secret, text.encode(), sha256).digest()
            yield int.from_bytes(value, "big") % (blob.size - _PART_SIZE) + 1


async def verified_size(reactor: Any, response: UpstreamResponse, digest: Digest, limit: int) -> int | None:
    """Read a whole response. Return the size of its content if that matches `digest`; None if it does not.

    The framing does not matter, and codings are undone if the content does not match as it was sent. Content of more
    than `limit` bytes does not match.
    """
    sent, decoded, sent_size, decoded_size = digest.hasher(), digest.hasher(), 0, 0
    codings = content_codings(response.headers)
    decoder = Decoder(codings) if codings and can_decode(codings) else None
    with suppress(ResponseCutOff):
        while data := await response.read_chunk():
            sent.update(data)
            sent_size += len(data)
            if sent_size > limit + (limit // 64 + 1024 if decoder is not None else 0):  # a coding may add bytes
                return None
            try:
                for piece in decoder.feed(data) if decoder is not None else ():
                    decoded.update(piece)
                    decoded_size += len(piece)
                    if decoded_size > limit:
                        decoder = None
                        break
                    await deferLater(reactor, 0)  # a little of coded content may be a lot of work
            except ValueError:
                decoder = None
    if sent.hexdigest() == digest.hex:
        return sent_size
    return decoded_size if decoder is not None and decoded.hexdigest() == digest.hex else None


def _read_part(blob: OpenBlob, start: int) -> _Part:
    return _Part(start, blob.read_blocking(start, _PART_SIZE))


def _other_content(principal: UpstreamPrincipal, digest: Digest, response: UpstreamResponse) -> UpstreamBroken:
    message = f"{principal.repository.registry} returned content that does not match {digest}"
    return error_for_content(response, message)
