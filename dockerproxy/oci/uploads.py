"""The rules of an upload session (distribution-spec 1.1, "Pushing blobs"): ranges of chunks, and the session's status.

A session is a number of bytes received in order. The only mistake that a client can make is to send other bytes than
the next ones.
"""

from __future__ import annotations

import re

from attrs import frozen

from dockerproxy.errors import BadRequest, BlobUploadInvalid, DigestInvalid, NameInvalid, RangeInvalid
from dockerproxy.oci.names import ALGORITHMS, Digest, Repository, parse_repository
from dockerproxy.oci.routes import parse_query

# The form of the distribution-spec, inclusive and without a unit. It differs from the Content-Range of RFC 9110.
_CHUNK_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")


@frozen
class UploadParameters:
    """The request that starts an upload.

    It may mount a blob of another repository (of `source`, or of any) or upload the blob `digest` at once. `algorithm`
    is the digest algorithm that the client announces.

    A mount is a hint (distribution-spec 1.1, "Mounting a blob from another repository"): a registry that cannot use it
    starts a session. So `mount` is None if it, or the source, is not valid.
    """

    mount: Digest | None = None
    source: Repository | None = None
    digest: Digest | None = None
    algorithm: str | None = None

    @classmethod
    def parse(cls, query: str) -> UploadParameters:
        """Return the parameters in a URL's query. Raise `DigestInvalid`, `BadRequest`."""
        hints: list[str] = []
        others: list[str] = []
        for part in query.split("&"):
            (hints if part.partition("=")[0] in ("mount", "from") else others).append(part)
        parameters = dict(parse_query("&".join(others)))
        digest = None if "digest" not in parameters else Digest.parse(parameters["digest"])
        algorithm = parameters.get("digest-algorithm")
        if not any(part.startswith("mount") for part in hints):
            return cls(digest=digest, algorithm=algorithm)
        # A client that asks for a mount sends no content, so `digest` says only how a session will be hashed.
        mount, source = _parse_mount("&".join(hints))
        return cls(mount, source, algorithm=algorithm if digest is None else digest.algorithm)


def _parse_mount(query: str) -> tuple[Digest | None, Repository | None]:
    """Return the blob to mount and its repository; no blob if one of them is not valid."""
    try:
        parameters = dict(parse_query(query))
        source = parameters.get("from")
        return Digest.parse(parameters.get("mount", "")), None if source is None else parse_repository(source)
    except (BadRequest, DigestInvalid, NameInvalid):
        return None, None


@frozen
class UploadStatus:
    """An upload session, and the number of bytes received so far.

    `node` is the member of the fleet that has the bytes, "" if every one may be asked.
    """

    session: str
    size: int
    node: str = ""


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
