"""The errors of an object store as sentences, with the store's own words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import frozen

from dockerproxy.bucket.s3_xml import parse_answer
from dockerproxy.errors import InsufficientStorage, RegistryError, StoreRefused, StoreUnavailable

MAX_ERROR = 64 * 1024  # bytes of an error that are read

IGNORES_CONDITIONS = (
    "does not keep to If-None-Match, so two gateways may both create an object: `dockerproxy gc` will refuse to run;"
    " pushes and pulls work"
)

_MAX_WORDS = 300  # characters of the store's message that are shown
_RETRY_AFTER = 5  # seconds; a store that restarts needs about that long
_REFUSED_RETRY_AFTER = 60  # seconds; a person has to do something

_REMEDIES: Mapping[str, str] = MappingProxyType({
    "NoSuchBucket": "create the bucket, or correct its name in REGISTRY_STORE",
    "InvalidBucketName": "correct the name of the bucket in REGISTRY_STORE",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID to a key that the store knows",
    "SignatureDoesNotMatch": "set AWS_SECRET_ACCESS_KEY to the secret of AWS_ACCESS_KEY_ID",
    "AccessDenied": "let the key list the bucket, and read, write and delete objects in it",
    "ExpiredToken": "renew the credentials, or let botocore refresh them",
    "InvalidToken": "renew the credentials, or let botocore refresh them",
    "RequestTimeTooSkewed": "set the clock of this machine, or that of the store",
    "RequestExpired": "set the clock of this machine, or that of the store",
    "AuthorizationHeaderMalformed": "set region= in REGISTRY_STORE to the region of the bucket",
    "PermanentRedirect": "set region= and endpoint= in REGISTRY_STORE to those of the bucket",
    "TemporaryRedirect": "set region= and endpoint= in REGISTRY_STORE to those of the bucket",
    "IllegalLocationConstraintException": "set region= in REGISTRY_STORE to the region of the bucket",
})  # fmt: skip
_TRANSIENT_CODES = frozenset({
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "OperationAborted", "ConditionalRequestConflict", "Busy", "ServerBusy",
    "TooManyRequests",
})  # fmt: skip
_FULL_CODES = frozenset({
    "QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull", "StorageFull",
    "XMinioAdminBucketQuotaExceeded", "InsufficientStorageSpace",
})  # fmt: skip
_CREDENTIAL_CODES = frozenset({
    "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired",
    "AccessDenied",
})  # fmt: skip
_CREDENTIAL_STATUSES = frozenset({400, 401, 403})
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FULL_STATUS = 507


@frozen
class StoreAnswer:
    """A refusal by the store: the status, and the code and message of its XML, which are empty if there is none."""

    status: int
    code: str = ""
    message: str = ""

    @classmethod
    def parse(cls, status: int, content: bytes) -> StoreAnswer:
        """Return the refusal in a response. Content that is no error of S3, such as a web page, is left out."""
        try:
            error = parse_answer(content).error
        except ValueError:
            error = None
        code, message = error or ("", "")
        return cls(status, _printable(code)[:80], _printable(message)[:_MAX_WORDS])

    @property
    def is_full(self) -> bool:
        """Whether the store has no room."""
        return self.status == _FULL_STATUS or self.code in _FULL_CODES

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        if self.is_full:
            return False
        return self.code in _TRANSIENT_CODES or (self.status in _TRANSIENT_STATUSES and self.code not in _REMEDIES)

    @property
    def is_about_credentials(self) -> bool:
        """Whether other credentials may help. The answer to a HEAD has no code."""
        return self.code in _CREDENTIAL_CODES or (not self.code and self.status in _CREDENTIAL_STATUSES)

    def error(self, place: object) -> RegistryError:
        """Return the error for a client and the log; `place` is the bucket."""
        words = ": ".join(filter(None, [self.code, self.message])) or f"status {self.status}"
        if self.is_full:
            return InsufficientStorage(f"{place} is full ({words})")
        if self.is_transient:
            return StoreUnavailable(f"{place} cannot serve us now ({words}); try again", headers=retry_after())
        remedy = _REMEDIES.get(self.code) or "check the bucket, the key and the region of REGISTRY_STORE"
        return StoreRefused(f"{place} refuses us ({words}); {remedy}", headers=retry_after(_REFUSED_RETRY_AFTER))


def retry_after(seconds: int = _RETRY_AFTER) -> list[tuple[str, str]]:
    """Return the field that says when to try again."""
    return [("Retry-After", str(seconds))]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text).strip().rstrip(".")
