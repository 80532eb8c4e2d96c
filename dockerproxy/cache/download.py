"""One blob from upstream, from an offset to its end, over as many connections as it takes."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.origin import Answer, Origin, Upstream, refuse
from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.upstream.retry import retry_after

_PAUSES = (0.2, 0.5, 1, 2, 4, 8)  # seconds before each further try; progress starts the row anew
_TRIES_TO_OPEN = 2
_PATIENT = 0.002  # seconds that a larger piece is worth
_PATIENCE = 20.0  # seconds, the most that an upstream's Retry-After makes of a pause

log = Logger()


class TooLong(UpstreamBroken):
    """What is here is longer than what upstream has: no beginning of the same blob."""


class Download:
    """The bytes of a blob, in order.

    After `open`, `size` is the whole blob's length in bytes, or None where upstream does not say; it is known when
    `read` has given all. `read` resumes by Range what breaks off or stalls; an upstream that ignores the Range sends
    again what is then skipped.
    """

    def __init__(self, clock: Any, upstream: Upstream, origin: Origin, digest: Digest, offset: int = 0) -> None:
        self._clock = clock
        self._upstream = upstream
        self._origin = origin
        self._digest = digest
        self._answer: Answer | None = None
        self._rest: list[bytes] = []  # read of the answer already
        self.offset = offset
        self.size: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to upstream."""
        return self._answer is not None

    async def open(self) -> None:
        """Send the request. Raise what upstream refuses with, `TooLong`, or an `UpstreamError` after a second try."""
        for pause in _PAUSES[: _TRIES_TO_OPEN - 1]:
            try:
                await self._connect()
                return
            except TooLong:
                raise
            except UpstreamBroken as error:
                await self._wait(pause, error)
        await self._connect()

    async def read(self, at_least: int = 1) -> list[bytes]:
        """Return the next pieces, none at the end. Raise `UpstreamError` when upstream has failed too often.

        They are `at_least` so many where that is a matter of milliseconds.
        """
        pauses = iter(_PAUSES)
        while True:
            try:
                return await self._read(at_least)
            except UpstreamError as error:
                self.abort()
                pause = next(pauses, None)
                if pause is None or isinstance(error, TooLong):  # which no further try makes shorter
                    raise
                await self._wait(max(pause, self._asked_for(error)), error)

    def unread(self, pieces: list[bytes]) -> None:
        """Take back what `read` gave last; it is what the next `read` gives."""
        self._rest = pieces + self._rest
        self.offset -= sum(map(len, pieces))

    def abort(self) -> None:
        """Close the connection to upstream."""
        answer, self._answer, self._rest = self._answer, None, []
        if answer is not None:
            answer.abort()

    async def _read(self, at_least: int) -> list[bytes]:
        if self._answer is None and not self._rest and self.offset != self.size:
            await self._connect()
        if not self._rest:
            if self.offset == self.size:
                self.abort()
                return []
            assert self._answer is not None
            self._rest = await self._answer.read_pieces(at_least, _PATIENT)
        pieces, self._rest = self._rest, []
        end = self.offset + sum(map(len, pieces))
        if not pieces and self.size is None:
            self.size = self.offset
        elif not pieces:
            raise UpstreamBroken(f"{self._origin.registry} sent too little of {self._digest}")
        elif self.size is not None and end > self.size:
            raise UpstreamBroken(f"{self._origin.registry} sent more of {self._digest} than it has")
        self.offset = end
        return pieces

    def _asked_for(self, error: UpstreamError) -> float:
        """Return for how many seconds upstream wants to be left alone, up to what clients have patience for."""
        return min(retry_after(Headers(error.headers), self._clock.seconds()) or 0.0, _PATIENCE)

    async def _wait(self, seconds: float, error: RegistryError) -> None:
        log.info(
            "{digest} broke off at byte {offset} ({why}): going on in {seconds} s",
            digest=str(self._digest), offset=self.offset, why=error.message, seconds=seconds,
        )  # fmt: skip
        await deferLater(self._clock, seconds)

    async def _connect(self) -> None:
        origin = self._origin
        # From the last byte that is here, and not the one behind it: if that was all, there is an answer to this too,
        # where upstream could only say 416 to the other.
        headers = Headers([("range", f"bytes={self.offset - 1}-")] if self.offset else [])
        answer = await self._upstream.request(
            "GET", origin.registry, origin.blob_path(self._digest),
            name=origin.name, credential=origin.credential, headers=headers,
        )  # fmt: skip
        try:
            await self._accept(answer)
        except BaseException:
            answer.abort()
            raise

    async def _accept(self, answer: Answer) -> None:
        registry = self._origin.registry
        start, size = 0, answer.length
        if answer.status == 206 and self.offset:
            start, size = self._range_of(answer)
        elif answer.status == 416 and self.offset:
            await answer.discard()
            raise TooLong(f"{registry} has less of {self._digest} than {self.offset} bytes")
        elif answer.status != 200:
            raise await refuse(registry, answer, "BLOB_UNKNOWN")
        if self.size is not None and size is not None and size != self.size:
            raise UpstreamBroken(f"{registry} changed its mind about the length of {self._digest}")
        if size is not None and size < self.offset:
            raise TooLong(f"{registry} has {size} bytes of {self._digest}, and here are {self.offset}")
        if self.size is None:
            self.size = size
        await self._skip(answer, self.offset - start)

    def _range_of(self, answer: Answer) -> tuple[int, int | None]:
        try:
            start, _, size = parse_content_range(answer.headers.get("content-range") or "")
        except ValueError:
            raise UpstreamBroken(f"{self._origin.registry} sent a range that it does not describe") from None
        if start > self.offset:
            raise UpstreamBroken(f"{self._origin.registry} sent another range than was asked for")
        return start, size

    async def _skip(self, answer: Answer, count: int) -> None:
        """Read `count` bytes that are here already; keep what the last piece has beyond them."""
        rest = b""
        while count:
            data = await answer.read_chunk()
            if not data:
                # A whole answer that ends before is shorter than what is here; a part may be cut at any place.
                kind = TooLong if answer.status == 200 else UpstreamBroken
                raise kind(f"{self._origin.registry} sent too little of {self._digest}")
            rest, count = data[count:], max(0, count - len(data))
        self._rest, self._answer = [rest] if rest else [], answer
