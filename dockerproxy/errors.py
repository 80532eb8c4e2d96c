"""What can go wrong, in the registry's own terms.

One tree. A class carries its wire form (HTTP status and the error code of distribution-spec 1.1,
"Error Codes"); `dockerproxy.registry.responses` is the one place that renders it. `UpstreamError` is a branch of its
own: the trouble is another server's, and the client is told so (502, 504) and never blamed.
"""

from __future__ import annotations

from collections.abc import Sequence


class RegistryError(Exception):
    """A request that cannot be answered as asked.

    `message` is a sentence for a person; it never holds a credential, a path of this machine or a URL's query.
    `headers` are further response fields as (name, value), e.g. a challenge or Retry-After.
    """

    status = 500
    code = "UNKNOWN"

    def __init__(self, message: str, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.headers = tuple(headers)


class NameInvalid(RegistryError):
    """A repository, host or tag name that the grammar does not allow."""

    status, code = 400, "NAME_INVALID"


class NameUnknown(RegistryError):
    """A well-formed name that means nothing here."""

    status, code = 404, "NAME_UNKNOWN"


class DigestInvalid(RegistryError):
    """A digest that is malformed, of an unregistered algorithm, or not that of the content."""

    status, code = 400, "DIGEST_INVALID"


class ManifestUnknown(RegistryError):
    """The tag or digest names no manifest of this repository."""

    status, code = 404, "MANIFEST_UNKNOWN"


class ManifestInvalid(RegistryError):
    """Content that is no manifest."""

    status, code = 400, "MANIFEST_INVALID"


class BlobUnknown(RegistryError):
    """The digest names no blob of this repository."""

    status, code = 404, "BLOB_UNKNOWN"


class ManifestBlobUnknown(RegistryError):
    """A manifest that refers to blobs or manifests which its repository does not have."""

    status, code = 404, "MANIFEST_BLOB_UNKNOWN"


class BlobUploadUnknown(RegistryError):
    """There is no such upload session in this repository: never, or no longer."""

    status, code = 404, "BLOB_UPLOAD_UNKNOWN"


class BlobUploadInvalid(RegistryError):
    """A chunk that contradicts itself; the session stays as it was before."""

    status, code = 400, "BLOB_UPLOAD_INVALID"


class BlobUploadBusy(BlobUploadInvalid):
    """Another request writes to the session at this moment."""

    status = 409


class PaginationInvalid(RegistryError):
    """A page size that is no number (a code of CNCF distribution)."""

    status, code = 400, "PAGINATION_NUMBER_INVALID"


class SizeInvalid(RegistryError):
    """A body that is longer than what is accepted."""

    status, code = 413, "SIZE_INVALID"


class RangeInvalid(RegistryError):
    """A range that the content does not have."""

    status, code = 416, "RANGE_INVALID"


class Unauthorized(RegistryError):
    """The client has to show who it is; `headers` hold the challenge."""

    status, code = 401, "UNAUTHORIZED"


class Denied(RegistryError):
    """The client may not, whoever it is."""

    status, code = 403, "DENIED"


class Unsupported(RegistryError):
    """A method that is switched off, or that the resource does not have."""

    status, code = 405, "UNSUPPORTED"


class BadRequest(RegistryError):
    """A request that is not HTTP as we accept it."""

    status, code = 400, "UNSUPPORTED"


class TooManyRequests(RegistryError):
    """The rate limit (ours or upstream's) is reached."""

    status, code = 429, "TOOMANYREQUESTS"


class InsufficientStorage(RegistryError):
    """Our own disk is full. Of a 5xx docker prints the status line, which says as much."""

    status, code = 507, "UNAVAILABLE"


class StorageFailed(RegistryError):
    """Our own disk does not do as it should; the log has more of it."""


class UpstreamError(RegistryError):
    """Another server failed us."""

    status, code = 502, "UNAVAILABLE"


class UpstreamUnreachable(UpstreamError):
    """No connection: name not found, refused, TLS not acceptable."""


class UpstreamTimeout(UpstreamError):
    """Nothing came for as long as we are willing to wait."""

    status = 504


class UpstreamBroken(UpstreamError):
    """The answer broke off, or is not what it has to be (digest, length, type)."""


class DestinationForbidden(UpstreamError):
    """An address that the settings do not let us connect to."""

    status, code = 403, "DENIED"


class UpstreamFailing(UpstreamError):
    """Upstream answers, but not with what was asked for: 5xx, or 429 with its Retry-After."""

    def __init__(self, message: str, status: int = 502, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message, headers=headers)
        self.status = status
        self.code = "TOOMANYREQUESTS" if status == 429 else "UNAVAILABLE"


class UpstreamRefused(RegistryError):
    """Upstream said no (4xx), in its own words: `content` is its body, `headers` its fields, names in lower case."""

    def __init__(self, status: int, content: bytes, headers: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"upstream answered {status}", headers=headers)
        self.status = status
        self.content = content


def is_outage(error: RegistryError) -> bool:
    """Whether upstream could not say yes or no, so that the last good answer stands."""
    outage = isinstance(error, UpstreamError | TooManyRequests)
    return outage and not isinstance(error, DestinationForbidden)
