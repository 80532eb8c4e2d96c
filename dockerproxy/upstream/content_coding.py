"""Content codings of responses (RFC 9110, section 8.4), which some servers apply although none is asked for. Pure.

A Content-Encoding may also be wrong: object stores say `gzip` of a layer, of which the bytes themselves are gzip. So
both readings of a response are possible, and only a digest tells which of them is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from dockerproxy.http.headers import Headers

PIECE_SIZE = 64 * 1024
"""The most bytes that one step of decoding returns."""

_MAX_CODINGS = 3
_FREE_CODED = 256 * 1024  # bytes that may be decoded to nothing; beyond that, two bytes have to become one at least
_MAX_CODED_PER_BYTE = 2
_FREE_MEMBERS = 64  # members of a gzip file that may be short; beyond that, they need _MIN_MEMBER bytes on average
_MIN_MEMBER = 256
_GZIP, _ZLIB, _RAW_DEFLATE = 31, zlib.MAX_WBITS, -zlib.MAX_WBITS  # values of zlib's wbits
_ALIASES = {"x-gzip": "gzip"}  # RFC 9110, section 8.4.1.3
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")  # gzip, zstd, bzip2, xz


def content_codings(headers: Headers) -> tuple[str, ...]:
    """Return the codings of a response in the order in which they were applied, in lower case, without `identity`."""
    names = [name.strip(" \t").lower() for value in headers.all("content-encoding") for name in value.split(",")]
    return tuple(_ALIASES.get(name, name) for name in names if name not in ("", "identity"))


def can_decode(codings: Sequence[str]) -> bool:
    """Return whether `Decoder` undoes these codings: gzip and deflate, up to three."""
    return len(codings) <= _MAX_CODINGS and all(coding in ("gzip", "deflate") for coding in codings)


class Decoder:
    """Undoes `codings`, which `can_decode` accepts. Errors are `ValueError`, and say what is wrong with the content.

    The work is bounded by what is sent and by the content: coded content that becomes (almost) nothing is refused. With
    several codings, a few KiB could otherwise become gigabytes in between.
    """

    def __init__(self, codings: Sequence[str]) -> None:
        self._layers = [_Inflater(coding) for coding in reversed(codings)]
        self._size = 0  # bytes of the content

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the next pieces of the content, each of 1 to PIECE_SIZE bytes. Exhaust it before the next call."""
        for start in range(0, len(data), PIECE_SIZE):  # the inflater copies what it has not consumed, each time
            yield from self._feed(data[start : start + PIECE_SIZE], self._layers)

    def finish(self) -> None:
        """Raise ValueError if the coded content is incomplete."""
        if not all(layer.complete for layer in self._layers):
            raise ValueError("its coded content is incomplete")

    def _feed(self, data: bytes, layers: list[_Inflater]) -> Iterator[bytes]:
        if not layers:
            self._size += len(data)
            yield data
            return
        layers[0].received += len(data)
        if layers[0].received > _FREE_CODED + _MAX_CODED_PER_BYTE * self._size:
            raise ValueError("its coded content decodes to almost nothing")
        for piece in layers[0].feed(data):
            yield from self._feed(piece, layers[1:])


class _Inflater:
    """Undoes one coding."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._inflate = zlib.decompressobj(_GZIP) if coding == "gzip" else None
        self._start = b""
        self._members = 1
        self._size = 0
        self.received = 0  # bytes of its coded content

    @property
    def complete(self) -> bool:
        return self._inflate is not None and self._inflate.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inflate is None:
            data = self._start = self._start + data
            if len(data) < 2:
                return
            # RFC 9110, section 8.4.1.2: with a zlib header. Some servers leave it out, and all clients accept that.
            has_header = data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
            self._inflate = zlib.decompressobj(_ZLIB if has_header else _RAW_DEFLATE)
            self._start = b""
        while data:
            if self._inflate.eof:
                if self._coding != "gzip":
                    raise ValueError("its coded content has bytes after the end")
                self._inflate = zlib.decompressobj(_GZIP)  # RFC 1952, section 2.2: a file may have several members
                self._members += 1
                if (self._members - _FREE_MEMBERS) * _MIN_MEMBER > self._size:
                    raise ValueError("its coded content has too many members")
            try:
                piece = self._inflate.decompress(data, PIECE_SIZE)
                while piece:
                    self._size += len(piece)
                    yield piece
                    data = self._inflate.unconsumed_tail
                    piece = self._inflate.decompress(data, PIECE_SIZE) if not self._inflate.eof else b""
            except zlib.error:
                raise ValueError(f"its content is not {self._coding}, unlike its Content-Encoding") from None
            data = self._inflate.unused_data if self._inflate.eof else b""


def decode(content: bytes, codings: Sequence[str], limit: int) -> bytes:
    """Return the decoded content. Raise ValueError if it is malformed, or longer than `limit` bytes."""
    decoder, pieces, size = Decoder(codings), [], 0
    for piece in decoder.feed(content):
        size += len(piece)
        if size > limit:
            raise ValueError(f"its decoded content exceeds {limit} bytes")
        pieces.append(piece)
    decoder.finish()
    return b"".join(pieces)


def is_probably_coded(start: bytes, codings: Sequence[str], headers: Headers) -> bool:
    """Return which reading of a long blob is more likely: True if the codings have to be undone.

    `start` is the beginning of the response. Layers are compressed files. So a compressed file in a coding is coded,
    and anything else in it is probably the layer itself, unless the server seems to have compressed it for this
    response.
    """
    try:
        first = next(Decoder(codings).feed(start), b"")
    except ValueError:
        return False
    if first.startswith((*_COMPRESSED, b"{", b"[")):
        return True
    varies = "accept-encoding" in (headers.joined("vary") or "").lower()
    is_weak = (headers.get("etag") or "").startswith("W/")
    return "content-length" not in headers and (varies or is_weak)
