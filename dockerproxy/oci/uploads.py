"""The rules of an upload session (distribution-spec 1.1, "Pushing blobs"): what a chunk says, and what we say.

A session is a count of bytes that have arrived in order. All that a client can do wrong is to send others than the
next ones.
"""

from __future__ import annotations

import re

from dockerproxy.errors import BlobUploadInvalid, DigestInvalid, RangeInvalid
from dockerproxy.oci.names import ALGORITHMS, Digest

# The spec's own form, inclusive and without a unit: it is not RFC 9110's Content-Range.
_CHUNK_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")


def declared_length(content_range: str | None, content_length: int | None, session_size: int) -> int | None:
    """Return how many bytes a chunk is going to have; None where it does not say, and has as many as come.

    `content_length` is None for a body in chunked coding, `received` what the session has. Raise `RangeInvalid` where
    the chunk is not the next one, `BlobUploadInvalid` where its range cannot be read or is not of its length.
    """
    if content_range is None:
        return content_length
    match = _CHUNK_RANGE.fullmatch(content_range.strip())
    if match is None:
        raise BlobUploadInvalid("the chunk's Content-Range is not of the form start-end")
    start, last = int(match[1]), int(match[2])
    if start != session_size or last < start:
        raise RangeInvalid(f"the session has {session_size} bytes, and the chunk is {start}-{last}")
    length = last - start + 1
    if content_length is not None and content_length != length:
        raise BlobUploadInvalid(f"the chunk {start}-{last} comes with {content_length} bytes")
    return length


def range_header(session_size: int) -> str:
    """Return the Range field of a session that has `received` bytes: ``0-`` and the position of the last.

    An empty one has no last byte. As CNCF distribution it says ``0-0``: clients read two numbers.
    """
    return f"0-{max(session_size - 1, 0)}"


def algorithm_for(digest: Digest | None, digest_algorithm: str | None) -> str:
    """Return what to hash a session's bytes with as they arrive, by what the client tells of the digest to come.

    Raise `DigestInvalid` for an algorithm that is not registered.
    """
    if digest is not None:
        return digest.algorithm
    if digest_algorithm is None:
        return "sha256"
    if digest_algorithm not in ALGORITHMS:
        raise DigestInvalid(f"{digest_algorithm[:32]!r} is not one of {', '.join(ALGORITHMS)}")
    return digest_algorithm
