"""URLs from upstreams: redirect targets and token servers. Pure."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin

from dockerproxy.errors import NameInvalid, UpstreamBroken
from dockerproxy.oci.names import Host, Registry

_ABSOLUTE_URL = re.compile(r"(https?)://([^/?#\\]+)((?:[/?][^#]*)?)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_SCHEME_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_UNSAFE_CHARACTERS = re.compile(r"[^!-~]+")
_MAX_LENGTH = 16 * 1024  # signed URLs have about 2 KiB; the longest request line of common servers is half of this


def split_url(url: str) -> tuple[Registry, str]:
    """Split `url` into the server and the request target (path and query). Raise `UpstreamBroken` if it is malformed.

    Path and query are unchanged, byte for byte, because they may be signed. A fragment is dropped.
    """
    match = _ABSOLUTE_URL.fullmatch(url) if len(url) <= _MAX_LENGTH and not _UNSAFE_CHARACTERS.search(url) else None
    if match is None or "@" in match[2]:  # no passwords in URLs (RFC 3986, section 3.2.1)
        raise UpstreamBroken("an upstream sent a URL that is malformed, too long, or not http or https")
    scheme, authority, path = match[1].lower(), match[2], match[3]
    try:
        host = Host.parse(authority, 443 if scheme == "https" else 80)
    except NameInvalid:
        raise UpstreamBroken("an upstream sent a URL with a malformed host") from None
    return Registry(host, scheme), path if path.startswith("/") else f"/{path}"


def resolve_location(base: str, location: str) -> str:
    """Resolve a Location field in a response from `base` (RFC 3986, section 5). Raise `UpstreamBroken` if malformed."""
    # Some servers send an unescaped file name. Header fields are Latin-1.
    location = _UNSAFE_CHARACTERS.sub(lambda found: quote(found[0].encode("latin-1")), location.strip(" \t"))
    if _SCHEME_PREFIX.match(location):
        return location
    try:
        return urljoin(base, location)
    except ValueError:  # because of brackets, which Python parses as an IPv6 address
        raise UpstreamBroken("an upstream sent a malformed URL") from None


def with_tls_at_usual_port(server: Registry) -> Registry | None:
    """Return the server with TLS at the host of `server`, if that is without TLS at the usual port; else None."""
    return Registry(Host(server.host.name, 443), "https") if server.host.port == 80 else None
