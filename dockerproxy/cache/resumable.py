"""Resumable GET of one blob: reads from an offset to the end, over several connections if necessary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.cache.upstream import (
    RegistryClient,
    Sender,
    UpstreamRepository,
    UpstreamResponse,
    error_from_response,
)
from dockerproxy.errors import RegistryError, ResponseCutOff, UpstreamBroken, UpstreamError, UpstreamTimeout
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.upstream.content_coding import (
    PIECE_SIZE,
    Decoder,
    can_decode,
    content_codings,
    is_probably_coded,
)
from dockerproxy.upstream.retry import parse_retry_after

_RETRY_DELAYS = (0.2, 0.5, 1, 2, 4, 8)  # seconds before each retry; restarts at the first after progress
_RATE_WINDOW = 60.0  # seconds of waiting for upstream, over which its rate is measured
_MAX_COUNTED_WAIT = 20.0  # seconds; a longer silence counts as this one, because PROXY_READ_TIMEOUT allows it
_MIN_RATE = 1024  # bytes a second; an upstream that sends less for so long is as good as silent
_MAX_OPEN_ATTEMPTS = 2
_MAX_MEMBERS = 4  # of the fleet that give no answer of upstream, one after the other
_READ_BATCH_TIME = 0.002  # seconds to wait for more bytes per read
_SLOW_READ_BATCH_TIME = 0.1  # the same after a read of less than _SMALL_READ; each read costs a write in a thread
_SMALL_READ = 2048  # bytes
_READ_AHEAD = 256 * 1024  # bytes
_SHORT_CODED = 256 * 1024  # bytes; a shorter response with codings is read as a whole, so that its digest decides
_SHORT_DECODED = 8 * 1024 * 1024  # bytes
_MAX_RETRY_AFTER = 20.0  # seconds; upper limit for an upstream's Retry-After

log = Logger()


class PartialTooLong(UpstreamBroken):
    """The partial download is longer than the blob upstream, so it is not a prefix of it."""


class UpstreamTooSlow(UpstreamTimeout):
    """Upstream sends less than _MIN_RATE. To try again would give it another minute."""


class ResumableGet:
    """Reads the bytes of a blob in order.

    After `open`, `size` is the size of the whole blob in bytes, or None if upstream does not give it. It is always
    known after the last `read`. `read` resumes by Range if the connection breaks off or stalls. If upstream ignores
    the Range, the bytes before `offset` are skipped. A response of unknown length that is cut off twice at one byte
    ends there; its digest tells whether that is so. A content coding is undone if the digest says so, or for a longer
    blob if that is likely (`is_probably_coded`), or as `undo_codings` says because the other reading was wrong. About
    `read_ahead()` bytes may arrive between two reads.
    `wall_clock` gives the Unix time that dates from upstream are compared with.
    """

    def __init__(
        self,
        clock: Any,
        upstream: RegistryClient,
        repository: UpstreamRepository,
        digest: Digest,
        offset: int = 0,
        read_ahead: Callable[[], int] = lambda: _READ_AHEAD,
        wall_clock: Callable[[], float] = time.time,
        undo_codings: bool | None = None,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._upstream = upstream
        self._repository = repository
        self._digest = digest
        self._response: UpstreamResponse | None = None
        self._batch_time = _READ_BATCH_TIME
        self._waited = 0.0  # seconds of the current window
        self._received = 0  # bytes in it
        self._buffer: list[bytes] = []  # read from the response, but not returned yet
        self._undo_codings = undo_codings
        self.guessed_coding: bool | None = None
        """Whether codings are undone, if that is a guess. None if it is not."""
        self._codings: Sequence[str] | None = None  # to be undone; None until a response has had some
        self._needs_start = False  # to decide about codings
        self._decoder: Decoder | None = None  # of the response, if its codings are undone
        self._sent: list[bytes] = []  # read from the response, but not decoded yet
        self._decoded: Iterator[bytes] = iter(())
        self._cut_off_at = -1  # the offset at which the connection was cut off last
        self.offset = offset
        self.size: int | None = None
        self._senders: set[Sender] = set()  # that have sent content in upstream's place
        self._read_ahead = read_ahead

    @property
    def is_open(self) -> bool:
        """Whether there is an open response from upstream."""
        return self._response is not None

    @property
    def is_from_member(self) -> bool:
        """Whether a member of the fleet has sent content, in upstream's place."""
        return bool(self._senders)

    def report_mismatch(self) -> None:
        """Note that the content does not match the digest."""
        for sender in self._senders:
            sender.report_mismatch(self._digest)

    async def open(self) -> None:
        """Send the request. Raise the error that upstream responds with, `PartialTooLong`, or `UpstreamError`.

        Try a second time after `UpstreamBroken`.
        """
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
        """Return the next pieces; none at the end. Raise `UpstreamError` after too many retries.

        Wait a few milliseconds for `at_least` bytes; if upstream is slow, up to _SLOW_READ_BATCH_TIME seconds.
        """
        delays = iter(_RETRY_DELAYS)
        while True:
            try:
                return await self._read(at_least)
            except UpstreamError as error:
                if isinstance(error, ResponseCutOff) and self.size is None and self._response is not None:
                    if self._cut_off_at == self.offset:
                        self.size = self.offset
                        self.abort()
                        return []
                    self._cut_off_at = self.offset
                sender = None if self._response is None else self._response.sender
                if sender is not None:
                    sender.report_failure(error)
                self.abort()
                delay = next(delays, None)
                is_final = isinstance(error, PartialTooLong) or (isinstance(error, UpstreamTooSlow) and sender is None)
                if delay is None or is_final:  # a retry cannot succeed
                    raise
                await self._back_off(max(delay, self._retry_after(error)), error)

    def unread(self, pieces: list[bytes]) -> None:
        """Undo the last `read`, which returned `pieces`. The next `read` returns them again."""
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
            self._response.limit_read_ahead(self._read_ahead())
            self._buffer = await self._read_content(self._response, at_least, self._batch_time)
            size = sum(map(len, self._buffer))
            self._batch_time = _READ_BATCH_TIME if size >= _SMALL_READ else _SLOW_READ_BATCH_TIME
        pieces, self._buffer = self._buffer, []
        end = self.offset + sum(map(len, pieces))
        if not pieces and self.size is None:
            self.size = self.offset
        elif not pieces:
            raise UpstreamBroken(f"{self._repository.registry} sent {end} of {self.size} bytes of {self._digest}")
        elif self.size is not None and end > self.size:
            raise UpstreamBroken(f"{self._repository.registry} sent more than {self.size} bytes of {self._digest}")
        self.offset = end
        return pieces

    async def _receive(self, response: UpstreamResponse, at_least: int, timeout: float) -> list[bytes]:
        """Return the next pieces as upstream sent them; none at the end. Raise `UpstreamTooSlow`."""
        started = self._clock.seconds()
        pieces = await response.read_pieces(at_least, timeout)
        self._check_rate(sum(map(len, pieces)), self._clock.seconds() - started)
        return pieces

    def _check_rate(self, size: int, waited: float) -> None:
        """Count `size` bytes as sent, before they are decoded or skipped, because a coding may hold back its content.

        Raise `UpstreamTooSlow` at the end of a window in which too few have come.
        """
        self._waited += min(waited, _MAX_COUNTED_WAIT)
        self._received += size
        if self._waited < _RATE_WINDOW:
            return
        if size and self._received < _MIN_RATE * self._waited:
            raise UpstreamTooSlow(
                f"{self._repository.registry} sent {self._received} bytes of {self._digest} in {self._waited:.0f} s,"
                f" less than {_MIN_RATE} bytes a second"
            )
        self._waited, self._received = 0.0, 0

    def _retry_after(self, error: UpstreamError) -> float:
        """Return the Retry-After of `error` in seconds, limited to _MAX_RETRY_AFTER because a client is waiting."""
        return min(parse_retry_after(Headers(error.headers), self._wall_clock()) or 0.0, _MAX_RETRY_AFTER)

    async def _back_off(self, seconds: float, error: RegistryError) -> None:
        log.info(
            "download of {digest} interrupted at byte {offset} ({reason}); resuming in {seconds} s",
            digest=str(self._digest), offset=self.offset, reason=error.message, seconds=seconds,
        )  # fmt: skip
        await deferLater(self._clock, seconds)

    async def _connect(self) -> None:
        """Send the request, and again at once if a member of the fleet has not sent what upstream would.

        Such a member is left alone, so that the next one is asked, and upstream in the end.
        """
        for _ in range(_MAX_MEMBERS):
            response = await self._request()
            try:
                return await self._check_response(response)
            except UpstreamError as error:
                response.abort()
                if response.sender is None:
                    raise
                response.sender.report_failure(error)
            except BaseException:
                response.abort()
                raise
        raise UpstreamBroken(f"{_MAX_MEMBERS} members of the fleet did not send {self._digest} as upstream would")

    async def _request(self) -> UpstreamResponse:
        """Return the response to a request of the bytes from `offset` on."""
        repository = self._repository
        # Start at the last byte that is present, not at the next one: if the partial download is already complete,
        # upstream could only respond with 416 to the latter.
        # Offsets in a response with codings are those of its coded content.
        needs_start = self._codings or (self._codings is None and self._needs_start)
        headers = Headers([("range", f"bytes={self.offset - 1}-")] if self.offset and not needs_start else [])
        response = await self._upstream.request(repository.blob_request("GET", self._digest, headers))
        response.limit_read_ahead(self._read_ahead())
        if response.status == 206 and self._codings is None and _is_coded(response):
            response.abort()
            if "range" not in headers:
                raise UpstreamBroken(f"{repository.registry} sent a part of coded content in place of {self._digest}")
            self._needs_start = True
            return await self._request()
        return response

    async def _check_response(self, response: UpstreamResponse) -> None:
        registry = self._repository.registry
        start, size = 0, response.length
        self._decoder, self._sent, self._decoded = None, [], iter(())
        codings = content_codings(response.headers)
        if response.status == 200 and _is_coded(response):
            size = await self._choose_reading(response, codings)
        if response.status == 206 and self.offset:
            start, size = self._parse_range(response)
        elif response.status == 416 and self.offset:
            await response.discard()
            raise PartialTooLong(
                f"{registry} has fewer than {self.offset} bytes of {self._digest}, the size of the partial download"
            )
        elif response.status != 200:
            raise await error_from_response(registry, response, "BLOB_UNKNOWN")
        if self.size is not None and size is not None and size != self.size:
            if response.sender is None:  # so that the members that have sent the beginning were wrong
                self.report_mismatch()
            raise UpstreamBroken(f"{registry} reported {self.size} and then {size} bytes for {self._digest}")
        if size is not None and size < self.offset:
            raise PartialTooLong(
                f"{registry} has {size} bytes of {self._digest}, but the partial download has {self.offset}"
            )
        if self.size is None:
            self.size = size
        await self._skip(response, self.offset - start)

    async def _choose_reading(self, response: UpstreamResponse, codings: Sequence[str]) -> int | None:
        """Decide whether to undo the codings of a response to a request of the whole blob. Return the blob's size."""
        content, ended = b"", False
        try:
            while len(content) <= _SHORT_CODED and not ended:
                data = b"".join(await self._receive(response, 1, 0.0))
                content, ended = content + data, not data
        except ResponseCutOff:
            if not content:
                raise
            ended = True
        self._sent, size = [content], None if self._codings else response.length
        if ended and self._codings is None:
            with suppress(ValueError):
                decoded_size = await self._decoded_size(content, codings)
                if decoded_size is not None:
                    self._codings, size = codings, decoded_size
            if Digest.of(content, self._digest.algorithm) == self._digest:
                self._codings, size = (), len(content)
        elif self._codings is None:
            undo = self._undo_codings
            self.guessed_coding = is_probably_coded(content, codings, response.headers) if undo is None else undo
            self._codings = codings if self.guessed_coding else ()
        if self._codings:
            self._decoder = Decoder(codings)
            size = size if ended else None
        return size

    async def _decoded_size(self, content: bytes, codings: Sequence[str]) -> int | None:
        """Return the size of the decoded content if that is the blob, else None. Raise ValueError if it is malformed.

        It is decoded in small steps, because a few KiB may become _SHORT_DECODED bytes.
        """
        decoder, hasher, size = Decoder(codings), self._digest.hasher(), 0
        for piece in decoder.feed(content):
            hasher.update(piece)
            size += len(piece)
            if size > _SHORT_DECODED:
                return None
            await deferLater(self._clock, 0)
        decoder.finish()
        return size if hasher.hexdigest() == self._digest.hex else None

    async def _read_content(self, response: UpstreamResponse, at_least: int, timeout: float) -> list[bytes]:
        """Return the next pieces of the blob; none at the end."""
        if self._decoder is None:
            sent, self._sent = self._sent, []
            return sent or await self._receive(response, at_least, timeout)
        try:
            while True:
                pieces = list(islice(self._decoded, _READ_AHEAD // PIECE_SIZE))
                if pieces:
                    return pieces
                sent, self._sent = self._sent or await self._receive(response, 1, timeout), []
                if not sent:
                    self._decoder.finish()
                    return []
                self._decoded = self._decoder.feed(b"".join(sent))
        except ValueError as error:
            raise UpstreamBroken(f"{self._repository.registry} sent {self._digest} badly: {error}") from None

    def _parse_range(self, response: UpstreamResponse) -> tuple[int, int | None]:
        try:
            start, _, size = parse_content_range(response.headers.get("content-range") or "")
        except ValueError:
            raise UpstreamBroken(
                f"{self._repository.registry} sent a 206 without a valid Content-Range for {self._digest}"
            ) from None
        if start > self.offset:
            raise UpstreamBroken(
                f"{self._repository.registry} sent {self._digest} from byte {start}, not {self.offset - 1} as requested"
            )
        return start, size

    async def _skip(self, response: UpstreamResponse, count: int) -> None:
        """Skip `count` bytes that are already present. Keep the rest of the last piece."""
        remainder: list[bytes] = []
        while count:
            remainder = await self._read_content(response, 1, 0.0)
            if not remainder:
                # A complete response is shorter than the partial download; a 206 may have been cut anywhere.
                error_class = PartialTooLong if response.status == 200 else UpstreamBroken
                raise error_class(
                    f"{self._repository.registry} ended its response before byte {self.offset} of {self._digest}"
                )
            while remainder and count:
                count, rest = max(0, count - len(remainder[0])), remainder[0][count:]
                remainder[:1] = [rest] if rest else []
        self._buffer, self._response = remainder, response
        if response.sender is not None:
            self._senders.add(response.sender)


def _is_coded(response: UpstreamResponse) -> bool:
    codings = content_codings(response.headers)
    return bool(codings) and can_decode(codings)
