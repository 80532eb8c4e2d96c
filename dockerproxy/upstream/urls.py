"""URLs that other servers name: where a request goes next. Pure."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin

from dockerproxy.errors import NameInvalid, UpstreamBroken
from dockerproxy.oci.names import Host, Registry

_ABSOLUTE_URL = re.compile(r"(https?)://([^/?#\\]+)((?:[/?][^#]*)?)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_SCHEME_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_UNSAFE_CHARACTERS = re.compile(r"[^!-~]+")
_MAX_LENGTH = 16 * 1024  # signed URLs have some 2 KiB; the longest line that common servers take is half of this


def split_url(url: str) -> tuple[Registry, str]:
    """Return where `url` leads and the target (path and query) to ask for there; raise `UpstreamBroken`.

    The path and query stay as they are, byte for byte: signatures are made over them. A fragment is dropped.
    """
    match = _ABSOLUTE_URL.fullmatch(url) if len(url) <= _MAX_LENGTH and not _UNSAFE_CHARACTERS.search(url) else None
    if match is None or "@" in match[2]:  # a password in a URL (RFC 3986, section 3.2.1) is nothing we would send
        raise UpstreamBroken("an upstream named a URL that is malformed, too long, or not http or https")
    scheme, authority, path = match[1].lower(), match[2], match[3]
    try:
        host = Host.parse(authority, 443 if scheme == "https" else 80)
    except NameInvalid:
        raise UpstreamBroken("an upstream named a URL whose host is malformed") from None
    return Registry(host, scheme), path if path.startswith("/") else f"/{path}"


def resolve_location(base: str, location: str) -> str:
    """Return the URL that a Location in an answer from `base` means (RFC 3986, section 5); raise `UpstreamBroken`."""
    # Some servers put a file's name there unescaped; what a field can hold of that is Latin-1.
    location = _UNSAFE_CHARACTERS.sub(lambda found: quote(found[0].encode("latin-1")), location.strip(" \t"))
    if _SCHEME_PREFIX.match(location):
        return location
    try:
        return urljoin(base, location)
    except ValueError:  # of brackets, which Python reads as an IPv6 address
        raise UpstreamBroken("an upstream named a URL that is malformed") from None
