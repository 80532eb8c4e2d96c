"""One blob from upstream, from an offset to its end, over as many connections as it takes."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.upstream import RegistryClient, UpstreamRepository, UpstreamResponse, error_from_response
from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.upstream.retry import parse_retry_after

_RETRY_DELAYS = (0.2, 0.5, 1, 2, 4, 8)  # seconds before each further try; progress starts the row anew
_MAX_OPEN_ATTEMPTS = 2
_READ_BATCH_TIME = 0.002  # seconds that a larger piece is worth
_MAX_RETRY_AFTER = 20.0  # seconds, the most that an upstream's Retry-After makes of a pause

log = Logger()


class PartialTooLong(UpstreamBroken):
    """What is here is longer than what upstream has: no beginning of the same blob."""


class ResumableGet:
    """The bytes of a blob, in order.

    After `open`, `size` is the whole blob's length in bytes, or None where upstream does not say; it is known when
    `read` has given all. `read` resumes by Range what breaks off or stalls; an upstream that ignores the Range sends
    again what is then skipped.
    """

    def __init__(
        self, clock: Any, upstream: RegistryClient, repository: UpstreamRepository, digest: Digest, offset: int = 0
    ) -> None:
        self._clock = clock
        self._upstream = upstream
        self._repository = repository
        self._digest = digest
        self._response: UpstreamResponse | None = None
        self._buffer: list[bytes] = []  # read of the answer already
        self.offset = offset
        self.size: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to upstream."""
        return self._response is not None

    async def open(self) -> None:
        """Send the request. Raise what upstream refuses with, `TooLong`, or an `UpstreamError` after a second try."""
        for delay in _RETRY_DELAYS[: _MAX_OPEN_ATTEMPTS - 1]:
            try:
                await self._connect()
                return
            except PartialTooLong:
                raise
            except UpstreamBroken as error:
                await self._back_off(delay, error)
        await self._connect()

    async def read(self, at_least: int = 1) -> list[bytes]:
        """Return the next pieces, none at the end. Raise `UpstreamError` when upstream has failed too often.

        They are `at_least` so many where that is a matter of milliseconds.
        """
        delays = iter(_RETRY_DELAYS)
        while True:
            try:
                return await self._read(at_least)
            except UpstreamError as error:
                self.abort()
                delay = next(delays, None)
                if delay is None or isinstance(error, PartialTooLong):  # which no further try makes shorter
                    raise
                await self._back_off(max(delay, self._retry_after(error)), error)

    def unread(self, pieces: list[bytes]) -> None:
        """Take back what `read` gave last; it is what the next `read` gives."""
        self._buffer = pieces + self._buffer
        self.offset -= sum(map(len, pieces))

    def abort(self) -> None:
        """Close the connection to upstream."""
        response, self._response, self._buffer = self._response, None, []
        if response is not None:
            response.abort()

    async def _read(self, at_least: int) -> list[bytes]:
        if self._response is None and not self._buffer and self.offset != self.size:
            await self._connect()
        if not self._buffer:
            if self.offset == self.size:
                self.abort()
                return []
            assert self._response is not None
            self._buffer = await self._response.read_pieces(at_least, _READ_BATCH_TIME)
        pieces, self._buffer = self._buffer, []
        end = self.offset + sum(map(len, pieces))
        if not pieces and self.size is None:
            self.size = self.offset
        elif not pieces:
            raise UpstreamBroken(f"{self._repository.registry} sent too little of {self._digest}")
        elif self.size is not None and end > self.size:
            raise UpstreamBroken(f"{self._repository.registry} sent more of {self._digest} than it has")
        self.offset = end
        return pieces

    def _retry_after(self, error: UpstreamError) -> float:
        """Return for how many seconds upstream wants to be left alone, up to what clients have patience for."""
        return min(parse_retry_after(Headers(error.headers), self._clock.seconds()) or 0.0, _MAX_RETRY_AFTER)

    async def _back_off(self, seconds: float, error: RegistryError) -> None:
        log.info(
            "{digest} broke off at byte {offset} ({reason}): going on in {seconds} s",
            digest=str(self._digest), offset=self.offset, reason=error.message, seconds=seconds,
        )  # fmt: skip
        await deferLater(self._clock, seconds)

    async def _connect(self) -> None:
        repository = self._repository
        # From the last byte that is here, and not the one behind it: if that was all, there is an answer to this too,
        # where upstream could only say 416 to the other.
        headers = Headers([("range", f"bytes={self.offset - 1}-")] if self.offset else [])
        response = await self._upstream.request(
            "GET", repository.registry, repository.blob_path(self._digest),
            name=repository.name, credential=repository.credential, headers=headers,
        )  # fmt: skip
        try:
            await self._check_response(response)
        except BaseException:
            response.abort()
            raise

    async def _check_response(self, response: UpstreamResponse) -> None:
        registry = self._repository.registry
        start, size = 0, response.length
        if response.status == 206 and self.offset:
            start, size = self._parse_range(response)
        elif response.status == 416 and self.offset:
            await response.discard()
            raise PartialTooLong(f"{registry} has less of {self._digest} than {self.offset} bytes")
        elif response.status != 200:
            raise await error_from_response(registry, response, "BLOB_UNKNOWN")
        if self.size is not None and size is not None and size != self.size:
            raise UpstreamBroken(f"{registry} changed its mind about the length of {self._digest}")
        if size is not None and size < self.offset:
            raise PartialTooLong(f"{registry} has {size} bytes of {self._digest}, and here are {self.offset}")
        if self.size is None:
            self.size = size
        await self._skip(response, self.offset - start)

    def _parse_range(self, response: UpstreamResponse) -> tuple[int, int | None]:
        try:
            start, _, size = parse_content_range(response.headers.get("content-range") or "")
        except ValueError:
            raise UpstreamBroken(f"{self._repository.registry} sent a range that it does not describe") from None
        if start > self.offset:
            raise UpstreamBroken(f"{self._repository.registry} sent another range than was asked for")
        return start, size

    async def _skip(self, response: UpstreamResponse, count: int) -> None:
        """Read `count` bytes that are here already; keep what the last piece has beyond them."""
        remainder = b""
        while count:
            data = await response.read_chunk()
            if not data:
                # A whole answer that ends before is shorter than what is here; a part may be cut at any place.
                error_class = PartialTooLong if response.status == 200 else UpstreamBroken
                raise error_class(f"{self._repository.registry} sent too little of {self._digest}")
            remainder, count = data[count:], max(0, count - len(data))
        self._buffer, self._response = [remainder] if remainder else [], response
