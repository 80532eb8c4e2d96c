"""Ranges far ahead of a download, each of which a request of its own fetches for one client.

Lazy pullers (stargz, SOCI, podman's zstd:chunked) first ask for the end of a layer, because its table of contents is
there. The download would need seconds or minutes to get that far. So the range is fetched by itself, with the client's
own credential, and passed on to this client only: no other one gets these bytes, and they never become part of the
ingest file.

They are unverified when the client gets them, like the beginning of a download. As soon as the whole blob is verified,
the hashes of these ranges are compared with it. If a registry has sent other bytes, the responses that are still open
are aborted, the log says so, and nothing is fetched ahead from that registry for an hour.

Each range is transferred twice. Several bounds limit that. Beyond them, and if a registry supports no ranges, a client
waits for the download as if this module did not exist.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from attrs import define, field
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.upstream import (
    RegistryClient,
    Sender,
    UpstreamRepository,
    UpstreamResponse,
    error_from_response,
)
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import RegistryError, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest, Registry
from dockerproxy.oci.ranges import ByteRange, parse_content_range
from dockerproxy.shares import ClientShares
from dockerproxy.upstream.content_coding import content_codings

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_RANGES = 8
"""Ranges of one request that may be fetched ahead. A request for more, such as podman's for chunks, waits."""

MAX_WAIT = 0.3
"""Seconds. A download that needs less to get to a range is about as fast as another request."""

_MIN_GAP = 1024 * 1024  # bytes between the download and a range, from which on the range is far ahead
_MAX_MERGED_GAP = 128 * 1024  # bytes between two ranges that one request fetches; a round trip costs as much
_MAX_FETCHED = 64 * 1024 * 1024  # bytes of one download, all of which are hashed a second time
_MAX_REQUESTS = 1000  # for one download
_READ_AHEAD = 256 * 1024  # bytes
_READ_BATCH_TIME = 0.002  # seconds to wait for more bytes per read
_HASHED_PIECE = 1024 * 1024  # bytes
_REFUSAL_TIME = 3600.0  # seconds for which a registry is not asked again
_MAX_REFUSALS = 1000

log = Logger()


class RangesUnsupported(UpstreamBroken):
    """The registry does not send the range that was requested."""


def merge_close(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Return `ranges` in their order, with each that begins shortly after the previous one as a part of that one."""
    merged: list[ByteRange] = []
    for byte_range in ranges:
        if merged and 0 <= byte_range.start - merged[-1].stop <= _MAX_MERGED_GAP:
            merged[-1] = ByteRange(merged[-1].start, byte_range.stop)
        else:
            merged.append(byte_range)
    return merged


@define
class AheadFetcher:
    """The requests for ranges far ahead of all downloads of a process, and the registries that are not asked for any.

    `bound` counts the requests that are open.
    """

    reactor: Any
    upstream: RegistryClient
    bound: ClientShares
    _refused: BoundedDict[Registry, bool] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._refused = BoundedDict(_MAX_REFUSALS, ttl=_REFUSAL_TIME, clock=self.reactor.seconds)

    def may_ask(self, registry: Registry, client: str) -> bool:
        """Return whether another range may be fetched from `registry` for `client`."""
        return registry not in self._refused and self.bound.has_room(client)

    def refuse(self, registry: Registry) -> None:
        """Fetch nothing ahead from `registry` for _REFUSAL_TIME seconds."""
        self._refused[registry] = True


class AheadRange:
    """A range that is fetched from `repository` for one reader of a blob with `size` bytes.

    `failure` is set if the registry turns out to have sent other bytes than for the whole blob.
    """

    def __init__(
        self,
        fetcher: AheadFetcher,
        repository: UpstreamRepository,
        digest: Digest,
        size: int,
        span: ByteRange,
        client: str,
    ) -> None:
        self._fetcher = fetcher
        self._repository = repository
        self._digest = digest
        self._size = size
        self._client = client
        self._response: UpstreamResponse | None = None
        self._start = span.start  # offset of `_buffer` in the blob
        self._buffer = b""  # received, but not requested yet
        self._hasher: _Hash = digest.hasher()
        self._is_open = True
        fetcher.bound.acquire(client)
        self.span = span
        self.sender: Sender | None = None
        """The member of the fleet that sends the range in the registry's place."""
        self.received = 0
        self.failure: RegistryError | None = None

    @property
    def received_hash(self) -> bytes:
        """The hash of the first `received` bytes."""
        return self._hasher.copy().digest()

    async def read(self, offset: int, at_most: int) -> bytes:
        """Return one or more bytes from `offset` on. Raise `RegistryError` if they cannot be had."""
        while True:
            if offset > self._start:
                drop = min(offset - self._start, len(self._buffer))
                self._buffer, self._start = self._buffer[drop:], self._start + drop
            if self._buffer and offset == self._start:
                return self._buffer[:at_most]
            if not self._is_open or offset < self._start:
                raise UpstreamBroken(f"the range of {self._digest} was read to its end already")
            await self._receive()

    def close(self) -> None:
        """End the request, and drop what was not read. A second call does nothing."""
        self._buffer = b""
        self._end()

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._fetcher.bound.release(self._client)
            response, self._response = self._response, None
            if response is not None:
                response.abort()

    async def _receive(self) -> None:
        """Add what arrives next to the buffer."""
        response = self._response
        if response is None:
            response = await self._open()
            if not self._is_open:
                response.abort()
                raise UpstreamBroken(f"the client of a range of {self._digest} has left")
            self._response = response
        data = b"".join(await response.read_pieces(1, _READ_BATCH_TIME))
        if not data or self.received + len(data) > self.span.size:
            raise UpstreamBroken(f"{self._repository.registry} sent another length for a range of {self._digest}")
        self.received += len(data)
        self._hasher.update(data)
        self._buffer += data
        if self.received == self.span.size:
            self._end()

    async def _open(self) -> UpstreamResponse:
        repository, registry = self._repository, self._repository.registry
        headers = Headers([("range", f"bytes={self.span.start}-{self.span.stop - 1}")])
        response = await self._fetcher.upstream.request(repository.blob_request("GET", self._digest, headers))
        response.limit_read_ahead(_READ_AHEAD)
        try:
            await self._check(response)
        except RangesUnsupported as error:
            response.abort()
            if response.sender is None:
                self._fetcher.refuse(registry)
            else:
                response.sender.report_failure(error)
            raise
        except BaseException:
            response.abort()
            raise
        self.sender = response.sender
        return response

    async def _check(self, response: UpstreamResponse) -> None:
        """Raise `RegistryError` unless `response` is the range."""
        registry = self._repository.registry
        if response.status not in (200, 206, 416):
            raise await error_from_response(registry, response, "BLOB_UNKNOWN")
        try:
            start, stop, size = parse_content_range(response.headers.get("content-range") or "")
        except ValueError:
            start, stop, size = 0, 0, None
        # Some stores say `gzip` of layers that are gzip themselves. With the right size, these are the layer's bytes.
        is_size = size == self._size or (size is None and not content_codings(response.headers))
        if response.status != 206 or ByteRange(start, stop) != self.span or not is_size:
            raise RangesUnsupported(f"{registry} does not send the requested range of {self._digest}")


class AheadRanges:
    """The ranges of one download that were fetched ahead."""

    def __init__(self, fetcher: AheadFetcher, digest: Digest) -> None:
        self._fetcher = fetcher
        self._digest = digest
        self._fetched = 0  # bytes of all ranges
        self._ranges: list[tuple[Registry, AheadRange]] = []

    def fetch(
        self, repository: UpstreamRepository, client: str, span: ByteRange, *, written: int, rate: float, size: int
    ) -> AheadRange | None:
        """Return the range `span` of the blob with `size` bytes if it is far ahead of its download, else None.

        The download has `written` bytes, and gets `rate` bytes a second. A range that is longer than what is missing
        before it is not far, because to fetch it costs more than to wait.
        """
        gap = span.start - written
        if gap <= max(_MIN_GAP, rate * MAX_WAIT) or span.size > gap or self._fetched + span.size > _MAX_FETCHED:
            return None
        if len(self._ranges) >= _MAX_REQUESTS or not self._fetcher.may_ask(repository.registry, client):
            return None
        ahead = AheadRange(self._fetcher, repository, self._digest, size, span, client)
        self._fetched += span.size
        self._ranges.append((repository.registry, ahead))
        return ahead

    async def compare(self, fd: int) -> None:
        """Compare the ranges with the verified blob in the file `fd`. Set the `failure` of those that differ."""
        claims = [(ahead.span.start, ahead.received, ahead.received_hash) for _, ahead in self._ranges]
        try:
            differing = await in_thread(self._fetcher.reactor, _differing, fd, claims, self._digest.hasher)
        except OSError as error:
            log.error("cannot read {digest} again: {reason}", digest=str(self._digest), reason=error.strerror)
            return
        for index in differing:
            registry, ahead = self._ranges[index]
            ahead.failure = UpstreamBroken(
                f"{registry} sent other bytes for a range of {self._digest} than for all of it"
            )
            if ahead.sender is not None:
                ahead.sender.report_mismatch(self._digest)
                continue
            self._fetcher.refuse(registry)
            log.error(
                "{registry} sent other bytes for the range {start}-{stop} of {digest} than for the whole blob, and a"
                " client has got them; no range is fetched ahead from it for an hour",
                registry=str(registry),
                start=ahead.span.start,
                stop=ahead.span.start + ahead.received - 1,
                digest=str(self._digest),
            )


def _differing(fd: int, claims: list[tuple[int, int, bytes]], new_hasher: Callable[[], _Hash]) -> list[int]:
    """Return the indexes of `claims` (start, size and hash of a part) that are not true of the file `fd`. Blocks."""
    differing = []
    for index, (start, size, expected) in enumerate(claims):
        hasher, offset = new_hasher(), start
        while offset < start + size and (data := os.pread(fd, min(_HASHED_PIECE, start + size - offset), offset)):
            hasher.update(data)
            offset += len(data)
        if hasher.digest() != expected:
            differing.append(index)
    return differing
