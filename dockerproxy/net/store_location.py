"""The bucket of an object store that REGISTRY_STORE names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, urlsplit

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host, Registry

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # AWS, "General purpose bucket naming rules"
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_REGION = re.compile(r"[A-Za-z0-9-]{1,63}")
_SCALE = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,6})?")
_MAX_PREFIX = 256
_DEFAULT_REGION = "us-east-1"
_UNRESERVED = "-._~"  # RFC 3986, section 2.3, beside letters and digits: Signature Version 4 quotes all others


@frozen
class StoreLocation:
    """A bucket: its name, the prefix of all keys (``""`` or ends in ``/``), the endpoint and region of its store.

    With `path_style`, the bucket is a part of the path in URLs, and otherwise of the host name. All times of the
    protocol of garbage collection are multiplied by `time_scale`, which is 1 but in tests.
    """

    bucket: str
    prefix: str
    endpoint: Registry
    region: str
    path_style: bool
    time_scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> StoreLocation:
        """Parse ``s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&addressing=path|virtual]``. Raise ValueError.

        Tests may add ``gc_time_scale``.
        """
        parts = urlsplit(text)
        if parts.scheme != "s3" or parts.fragment or "@" in parts.netloc:
            raise ValueError("it does not begin with s3://BUCKET, or has a user or a fragment")
        if not _BUCKET.fullmatch(parts.netloc):
            raise ValueError(f"{parts.netloc[:80]!r} is not the name of a bucket")
        prefix = parts.path.strip("/")
        if len(prefix) > _MAX_PREFIX or (prefix and not _PREFIX.fullmatch(prefix)):
            raise ValueError(f"{prefix[:80]!r} is not a prefix of letters, digits and . _ - between slashes")
        options = _parse_options(parts.query)
        region = options.get("region") or _DEFAULT_REGION
        if not _REGION.fullmatch(region):
            raise ValueError(f"{region[:80]!r} is not a region")
        endpoint = _parse_endpoint(options.get("endpoint"), region)
        # No certificate of a store is for BUCKET.STORE if the name of the bucket has dots.
        is_path = "endpoint" in options or "." in parts.netloc
        addressing = options.get("addressing") or ("path" if is_path else "virtual")
        if addressing not in ("path", "virtual"):
            raise ValueError(f"addressing={addressing[:80]!r} is neither path nor virtual")
        if addressing == "virtual" and endpoint.host.is_address:
            raise ValueError("a bucket cannot be a part of an address; use addressing=path")
        scale = _parse_scale(options.get("gc_time_scale"))
        return cls(parts.netloc, f"{prefix}/" if prefix else "", endpoint, region, addressing == "path", scale)

    @property
    def address(self) -> str:
        """``s3://BUCKET[/PREFIX]``, by which the audit log names the bucket."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def url(self, key: str = "", query: Iterable[tuple[str, str]] = ()) -> str:
        """Return the URL of the object with `key`, which does not have the prefix, or of the bucket if it is empty."""
        path = _quote(f"{self.prefix}{key}" if key else "", f"/{_UNRESERVED}")
        parameters = "&".join(f"{name}={_quote(value, _UNRESERVED)}" for name, value in query)
        if self.path_style:
            base = f"{self.endpoint.origin}/{self.bucket}/{path}" if path else f"{self.endpoint.origin}/{self.bucket}"
        else:
            host = Host(f"{self.bucket}.{self.endpoint.host.name}", self.endpoint.host.port)
            base = f"{Registry(host, self.endpoint.scheme).origin}/{path}"
        return f"{base}?{parameters}" if parameters else base

    def __str__(self) -> str:
        return f"the bucket {self.bucket} at {self.endpoint.origin}"


def _quote(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="surrogateescape")  # other programs may write keys that are no UTF-8


def _parse_options(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    unknown = sorted(options.keys() - {"endpoint", "region", "addressing", "gc_time_scale"})
    if unknown or len(options) != len(pairs):
        raise ValueError(
            f"{unknown[0][:80]!r} is no option; there are endpoint, region and addressing"
            if unknown
            else "an option is given twice"
        )
    return options


def _parse_scale(text: str | None) -> float:
    if text is None:
        return 1.0
    if not _SCALE.fullmatch(text) or not 0 < float(text) <= 1:
        raise ValueError(f"gc_time_scale={text[:80]!r} is not a number between 0 and 1, such as 0.01")
    return float(text)


def _parse_endpoint(text: str | None, region: str) -> Registry:
    if text is None:
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        return Registry(Host(f"s3.{region}.{suffix}", 443))
    scheme, separator, authority = text.partition("://")
    try:
        if scheme not in ("http", "https") or not separator:
            raise NameInvalid("no scheme")
        return Registry.parse(f"{scheme}://{authority.removesuffix('/')}")
    except NameInvalid:
        raise ValueError(f"endpoint={text[:80]!r} is not a URL such as https://s3.example.com:9000") from None
