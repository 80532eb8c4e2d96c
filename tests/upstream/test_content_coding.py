"""Content codings that nobody asked for: undone in small pieces, with a bound, and only if they are real."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.headers import Headers
from dockerproxy.upstream.content_coding import (
    PIECE_SIZE,
    Decoder,
    can_decode,
    content_codings,
    decode,
    is_probably_coded,
)

CONTENT = b'{"schemaVersion": 2}' * 500
LONG = zlib.compress(bytes(range(256)) * 2000, 0)  # several pieces


def raw_deflate(content: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


def members(content: bytes) -> bytes:
    return b"".join(gzip.compress(content[start : start + 400]) for start in range(0, len(content), 400))


CODERS = {
    ("gzip",): gzip.compress,
    ("gzip", "several members"): members,
    ("deflate",): zlib.compress,
    ("deflate", "raw"): raw_deflate,
    ("gzip", "gzip"): lambda content: gzip.compress(gzip.compress(content)),
    ("deflate", "gzip"): lambda content: gzip.compress(zlib.compress(content)),
    ("gzip", "deflate", "gzip"): lambda content: gzip.compress(zlib.compress(gzip.compress(content))),
}


def codings_of(key: tuple[str, ...]) -> list[str]:
    return [name for name in key if name in ("gzip", "deflate")]


@pytest.mark.parametrize(
    ("fields", "codings"),
    [
        ([], ()),
        (["identity"], ()),
        (["gzip"], ("gzip",)),
        (["X-GZip"], ("gzip",)),
        (["GZIP, identity", " deflate ,, br"], ("gzip", "deflate", "br")),
    ],
)
def test_fields(fields: list[str], codings: tuple[str, ...]) -> None:
    headers = Headers([("Content-Encoding", value) for value in fields])
    assert content_codings(headers) == codings
    assert can_decode(codings) == ("br" not in codings)


def test_more_codings_than_anybody_stacks() -> None:
    assert not can_decode(["gzip"] * 4)


@pytest.mark.parametrize("key", CODERS)
@given(content=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=5))
def test_any_segmentation(key: tuple[str, ...], content: bytes, cuts: list[int]) -> None:
    content = content or b"x"  # several members of nothing are nothing
    coded, decoder, decoded = CODERS[key](content), Decoder(codings_of(key)), b""
    bounds = sorted({0, len(coded), *(min(cut, len(coded)) for cut in cuts)})
    for start, end in pairwise(bounds):
        decoded += b"".join(decoder.feed(coded[start:end]))
    decoder.finish()
    assert decoded == content


@pytest.mark.parametrize("key", CODERS)
def test_pieces_are_short(key: tuple[str, ...]) -> None:
    pieces = list(Decoder(codings_of(key)).feed(CODERS[key](LONG)))
    assert b"".join(pieces) == LONG
    assert all(0 < len(piece) <= PIECE_SIZE for piece in pieces)


@pytest.mark.parametrize("key", CODERS)
def test_truncated_content_is_an_error(key: tuple[str, ...]) -> None:
    coded = CODERS[key](CONTENT)
    for end in (0, 1, len(coded) // 2, len(coded) - 1):
        if coded[:end] and key == ("gzip", "several members"):
            continue  # it may end with a member
        with pytest.raises(ValueError, match="incomplete"):
            decode(coded[:end], codings_of(key), 1 << 20)


@pytest.mark.parametrize("content", [b"plain text", b"\x1f\x8b\x08junk", gzip.compress(b"x")[:-8] + b"checksum"])
def test_other_content_is_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="not gzip"):
        decode(content, ["gzip"], 1 << 20)


def test_bytes_after_the_end() -> None:
    with pytest.raises(ValueError, match="not gzip"):
        decode(gzip.compress(CONTENT) + b"more", ["gzip"], 1 << 20)
    with pytest.raises(ValueError, match="after the end"):
        decode(zlib.compress(CONTENT) + b"more", ["deflate"], 1 << 20)


EMPTY_BLOCKS = b"\x00\x00\x00\xff\xff" * 200_000  # of deflate: a megabyte that is nothing


@pytest.mark.parametrize(
    ("coded", "codings", "message"),
    [
        (gzip.compress(b"") * 100, ["gzip"], "too many members"),
        (gzip.compress(b"x") * 100, ["gzip"], "too many members"),
        (gzip.compress(gzip.compress(b"") * 200_000), ["gzip", "gzip"], "too many members"),
        (EMPTY_BLOCKS, ["deflate"], "almost nothing"),
        (gzip.compress(EMPTY_BLOCKS), ["deflate", "gzip"], "almost nothing"),
        (gzip.compress(gzip.compress(EMPTY_BLOCKS)), ["deflate", "gzip", "gzip"], "almost nothing"),
        (gzip.compress(gzip.compress(b"x" * 300) + b"\0" * 10), ["gzip", "gzip"], "not gzip"),
    ],
)
def test_content_that_is_all_work_and_no_bytes(coded: bytes, codings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(coded, codings, 1 << 20)


def test_a_few_empty_members_are_usual() -> None:
    coded = gzip.compress(CONTENT) + gzip.compress(b"") * 3  # as in the footer of eStargz and of BGZF
    assert decode(coded, ["gzip"], 1 << 20) == CONTENT


def test_limit() -> None:
    coded = gzip.compress(CONTENT)
    assert decode(coded, ["gzip"], len(CONTENT)) == CONTENT
    with pytest.raises(ValueError, match="exceeds 9999 bytes"):
        decode(coded, ["gzip"], len(CONTENT) - 1)


def test_a_bomb_takes_no_memory() -> None:
    """Three codings on 64 MiB of zeros. Each of them may hold some pieces, and the last 64 KiB more than that."""
    compressor = zlib.compressobj(9, wbits=31)
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(64)) + compressor.flush()
    bomb = gzip.compress(gzip.compress(bomb))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="exceeds"):
            decode(bomb, ["gzip"] * 3, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


TAR = b"file".ljust(257, b"\0") + b"ustar" + bytes(2000)


@pytest.mark.parametrize(
    ("content", "fields", "coded"),
    [
        (gzip.compress(gzip.compress(TAR)), {"Content-Length": "9"}, True),  # a layer that was compressed once more
        (gzip.compress(b"\x28\xb5\x2f\xfd..."), {"Content-Length": "9"}, True),
        (gzip.compress(b'{"config": 1}'), {"Content-Length": "9"}, True),
        (gzip.compress(TAR), {"Content-Length": "9"}, False),  # a layer in an object store
        (gzip.compress(TAR), {}, False),
        (gzip.compress(TAR), {"Vary": "Origin, Accept-Encoding"}, True),  # compressed for this response
        (gzip.compress(TAR), {"ETag": 'W/"x"'}, True),
        (gzip.compress(TAR), {"ETag": 'W/"x"', "Content-Length": "9"}, False),
        (b"plain", {"Vary": "Accept-Encoding"}, False),
        (b"", {}, False),
    ],
)
def test_long_blobs(content: bytes, fields: dict[str, str], coded: bool) -> None:
    assert is_probably_coded(content, ["gzip"], Headers(fields.items())) == coded
