"""The rules of an upload session (distribution-spec 1.1, "Pushing blobs"): ranges of chunks, and the session's status.

A session is a number of bytes received in order. The only mistake that a client can make is to send other bytes than
the next ones.
"""

from __future__ import annotations

import re

from attrs import frozen

from dockerproxy.errors import BlobUploadInvalid, DigestInvalid, RangeInvalid
from dockerproxy.oci.names import ALGORITHMS, Digest, Repository, parse_repository
from dockerproxy.oci.routes import parse_query

# The form of the distribution-spec, inclusive and without a unit. It differs from the Content-Range of RFC 9110.
_CHUNK_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")


@frozen
class UploadParameters:
    """The request that starts an upload.

    It may mount a blob of another repository (of `source`, or of any) or upload the blob `digest` at once. `algorithm`
    is the digest algorithm that the client announces.
    """

    mount: Digest | None = None
    source: Repository | None = None
    digest: Digest | None = None
    algorithm: str | None = None

    @classmethod
    def parse(cls, query: str) -> UploadParameters:
        """Return the parameters in a URL's query. Raise `DigestInvalid`, `NameInvalid`, `BadRequest`."""
        parameters = dict(parse_query(query))
        mount, source, digest = (parameters.get(name) for name in ("mount", "from", "digest"))
        return cls(
            None if mount is None else Digest.parse(mount),
            None if mount is None or source is None else parse_repository(source),
            None if digest is None else Digest.parse(digest),
            parameters.get("digest-algorithm"),
        )


@frozen
class UploadStatus:
    """An upload session, and the number of bytes received so far."""

    session: str
    size: int


def declared_length(content_range: str | None, content_length: int | None, session_size: int) -> int | None:
    """Return the length in bytes that a chunk declares, or None if it declares none and its body may have any length.

    `content_length` is None for a body in chunked coding. `session_size` is the number of bytes already received. Raise
    `RangeInvalid` if the chunk is not the next one, and `BlobUploadInvalid` if its range is unreadable or does not
    match its length.
    """
    if content_range is None:
        return content_length
    match = _CHUNK_RANGE.fullmatch(content_range.strip())
    if match is None:
        raise BlobUploadInvalid("the chunk's Content-Range is not of the form start-end")
    start, last = int(match[1]), int(match[2])
    if start != session_size or last < start:
        raise RangeInvalid(f"the chunk {start}-{last} does not continue the session, which has {session_size} bytes")
    length = last - start + 1
    if content_length is not None and content_length != length:
        raise BlobUploadInvalid(f"the chunk {start}-{last} has a Content-Length of {content_length}")
    return length


def range_header(session_size: int) -> str:
    """Return the Range field of a session with `session_size` bytes: ``0-`` and the position of the last byte.

    An empty session has no last byte. It gets ``0-0``, as in CNCF distribution, because clients expect two numbers.
    """
    return f"0-{max(session_size - 1, 0)}"


def algorithm_for(digest: Digest | None, digest_algorithm: str | None) -> str:
    """Return the algorithm to hash a session's bytes with, from the digest or algorithm that the client announced.

    Raise `DigestInvalid` if the algorithm is not registered.
    """
    if digest is not None:
        return digest.algorithm
    if digest_algorithm is None:
        return "sha256"
    if digest_algorithm not in ALGORITHMS:
        raise DigestInvalid(f"digest algorithm {digest_algorithm[:32]!r} is not one of {', '.join(ALGORITHMS)}")
    return digest_algorithm
