"""The exceptions of the registry API, in one tree.

Each class carries its wire form: the HTTP status and the error code of distribution-spec 1.1, "Error Codes". The
`error_renderer` of a request turns it into a response. `UpstreamError` and its subclasses are failures of another
server. Their usual status is 502 or 504, because the client is not at fault.
"""

from __future__ import annotations

import json
from collections.abc import Sequence


class RegistryError(Exception):
    """A request that failed. Base class of all errors that a client receives.

    `message` is a sentence for a person. It never contains a credential, a path of this machine or the query of a URL.
    `headers` are additional response fields as (name, value), for example a challenge or Retry-After. `forwarded` says
    whether the response is that of another server, so that its status line is as usual.
    """

    status = 500
    code = "UNKNOWN"
    forwarded = False

    def __init__(self, message: str, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.headers = tuple(headers)


class NameInvalid(RegistryError):
    """The repository, host or tag name is malformed."""

    status, code = 400, "NAME_INVALID"


class NameUnknown(RegistryError):
    """The name is well-formed, but there is no such repository or host here."""

    status, code = 404, "NAME_UNKNOWN"


class DigestInvalid(RegistryError):
    """The digest is malformed, uses an unregistered algorithm, or does not match the content."""

    status, code = 400, "DIGEST_INVALID"


class ManifestUnknown(RegistryError):
    """The repository has no manifest with this tag or digest."""

    status, code = 404, "MANIFEST_UNKNOWN"


class ManifestInvalid(RegistryError):
    """The content is not a valid manifest."""

    status, code = 400, "MANIFEST_INVALID"


class ManifestNeeded(RegistryError):
    """The manifest cannot be deleted, because the index of a tag needs it."""

    status, code = 409, "DENIED"


class BlobUnknown(RegistryError):
    """The repository has no blob with this digest."""

    status, code = 404, "BLOB_UNKNOWN"


class ManifestBlobUnknown(RegistryError):
    """The manifest refers to blobs or manifests that are missing in its repository."""

    status, code = 404, "MANIFEST_BLOB_UNKNOWN"


class BlobUploadUnknown(RegistryError):
    """The repository has no such upload session. It may have expired."""

    status, code = 404, "BLOB_UPLOAD_UNKNOWN"


class BlobUploadInvalid(RegistryError):
    """The chunk is inconsistent, for example its length and its Content-Range. The session is unchanged."""

    status, code = 400, "BLOB_UPLOAD_INVALID"


class BlobUploadBusy(BlobUploadInvalid):
    """Another request is writing to the upload session."""

    status = 409


class PaginationInvalid(RegistryError):
    """The page size is not a number. The code is an extension of CNCF distribution."""

    status, code = 400, "PAGINATION_NUMBER_INVALID"


class SizeInvalid(RegistryError):
    """The request body exceeds the size limit."""

    status, code = 413, "SIZE_INVALID"


class RangeInvalid(RegistryError):
    """The requested range is outside the content."""

    status, code = 416, "RANGE_INVALID"


class Unauthorized(RegistryError):
    """The client must authenticate. `headers` contains the challenge."""

    status, code = 401, "UNAUTHORIZED"


class LocalTokenRequired(Unauthorized):
    """The client must authenticate at the token endpoint of this proxy, because upstream's own would not do."""


class ProxyAuthenticationRequired(RegistryError):
    """The client must authenticate to the proxy itself. `headers` contains the challenge."""

    status, code = 407, "UNAUTHORIZED"


class Denied(RegistryError):
    """The request is not permitted with any credential."""

    status, code = 403, "DENIED"


class MisdirectedRequest(RegistryError):
    """The request names a host that is not this server (RFC 9110, section 15.5.20)."""

    status, code = 421, "DENIED"


class Unsupported(RegistryError):
    """The method is disabled by a setting, or the resource does not support it."""

    status, code = 405, "UNSUPPORTED"


class BadRequest(RegistryError):
    """The request violates HTTP, or uses a form of it that is not accepted."""

    status, code = 400, "UNSUPPORTED"


class TooManyRequests(RegistryError):
    """The rate limit of the proxy or of the upstream registry is exceeded."""

    status, code = 429, "TOOMANYREQUESTS"


class ServiceOverloaded(RegistryError):
    """Too many requests of all clients together wait for a limited resource. `headers` has Retry-After."""

    status, code = 503, "UNAVAILABLE"


class LoopDetected(RegistryError):
    """The request would wait for its own sender (RFC 5842, section 7.2). Another member of the fleet can serve it."""

    status, code = 508, "UNAVAILABLE"


class NotCached(RegistryError):
    """Only cached content was asked for (RFC 9111, section 5.2.1.7: only-if-cached), and it is not here."""

    status, code = 504, "UNAVAILABLE"


class InsufficientStorage(RegistryError):
    """The disk of the proxy is full. Docker prints the status line of a 5xx, so 507 itself tells the user."""

    status, code = 507, "UNAVAILABLE"


class StorageFailed(RegistryError):
    """The disk of the proxy failed. The log has the details."""


class StoreUnavailable(ServiceOverloaded):
    """The object store of the hosted registry is down, throttles us, or fails. `headers` has Retry-After."""


class StoreRefused(StoreUnavailable):
    """The object store refuses every request: because of the bucket, the key, the region or the clock."""


class UpstreamError(RegistryError):
    """Another server failed. Base class of upstream errors. `reason` is the kind of the failure, one of a few words."""

    status, code = 502, "UNAVAILABLE"
    reason = "other"


class UpstreamUnreachable(UpstreamError):
    """The connection failed: unknown host name, refused, or an invalid TLS certificate.

    The `reason` is ``dns``, ``refused``, ``tls``, ``reset``, ``proxy`` or ``unreachable``.
    """

    def __init__(self, message: str, reason: str = "unreachable", *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message, headers=headers)
        self.reason = reason


class CertificateRejected(UpstreamUnreachable):
    """The server has a certificate that is not to be trusted, or one for another name."""

    def __init__(self, message: str, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message, "tls", headers=headers)


class UpstreamTimeout(UpstreamError):
    """The server sent nothing within the timeout."""

    status = 504
    reason = "timeout"


class UpstreamBroken(UpstreamError):
    """The response was truncated or invalid: wrong digest, length or type."""

    reason = "invalid"


class ResponseCutOff(UpstreamBroken):
    """The connection ended within the body, or at its end if nothing tells where that is. Only a digest can tell."""


class EndUnconfirmed(ResponseCutOff):
    """The peer ended the connection in order, but neither the response nor TLS says that its content ends there.

    Many servers do not send TLS's close_notify. Clients therefore take this for the end of the content.
    """


class DestinationForbidden(UpstreamError):
    """The settings forbid connections to the address."""

    status, code = 403, "DENIED"


class CaptivePortalSuspected(UpstreamBroken):
    """A web page came in place of the content, or a redirect leads to plain HTTP or to a forbidden address."""


class UpstreamFailing(UpstreamError):
    """The upstream registry responded with 5xx, or with 429 and perhaps Retry-After."""

    def __init__(self, message: str, status: int = 502, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message, headers=headers)
        self.status = status
        self.code = "TOOMANYREQUESTS" if status == 429 else "UNAVAILABLE"


class HeadRefused(UpstreamFailing):
    """Upstream refused HEAD with `head_status`. GET would have told whether that is about access, but failed.

    `outage` is the error of GET. A rate limit or an overload must not hide a refusal, so that only the public may go on
    reading what is cached.
    """

    def __init__(self, head_status: int, outage: UpstreamError) -> None:
        super().__init__(outage.message, outage.status, headers=outage.headers)
        self.head_status = head_status
        self.outage = outage


class UpstreamRefused(RegistryError):
    """The upstream registry responded with 4xx, which is forwarded.

    `content` is the body of its response, `headers` are the fields, with names in lower case.
    """

    forwarded = True

    def __init__(self, status: int, content: bytes, headers: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"upstream responded with {status}", headers=headers)
        self.status = status
        self.content = content


class IntermediaryRefused(UpstreamRefused):
    """Something before the upstream server responded with 4xx: a firewall, a CDN, a captive portal.

    It is no word of the registry. Public content that is cached is served instead, and nothing is forgotten. A client
    that gets nothing from the cache gets the refusal, as it would without the proxy.
    """

    def __init__(self, status: int, content: bytes, headers: Sequence[tuple[str, str]]) -> None:
        super().__init__(status, content, headers)
        self.message = f"a firewall, a CDN or a captive portal answered in upstream's place (status {status})"
        self.args = (self.message,)

    @classmethod
    def in_our_words(cls, status: int, message: str) -> IntermediaryRefused:
        """Return the error with a response of our own, because the intermediary's says nothing to the client."""
        content = json.dumps({"errors": [{"code": "UNAVAILABLE", "message": message}]}).encode()
        return cls(status, content, [("content-type", "application/json")])


def is_outage(error: RegistryError) -> bool:
    """Return whether upstream is unavailable, so that a stale response may be served instead of the error."""
    outage = isinstance(error, UpstreamError | TooManyRequests | IntermediaryRefused)
    return outage and not isinstance(error, DestinationForbidden)
