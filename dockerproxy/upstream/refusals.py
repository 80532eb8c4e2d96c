"""Tells the refusals of a server from those of something before it. Pure.

Firewalls, content delivery networks and captive portals answer in a registry's place. Their pages say nothing about an
image, so that they must not make the cache forget it. A refusal of the registry itself must be obeyed at once. If in
doubt, a refusal is the registry's own, and what looks like a page is believed to be one only for public content
(`cache.access`), because a registry may be guarded by a web server that refuses with pages.
"""

from __future__ import annotations

from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import parse_challenges

# RFC 9110, section 11.6.1: a server's own 401 has a challenge. 407 is a proxy's (section 15.5.8). 451 is mostly sent by
# intermediaries (RFC 7725, section 3).
_INTERMEDIARY_STATUSES = frozenset({401, 407, 451})
_INTERMEDIARY_FIELDS = ("x-squid-error", "cf-mitigated")
_INTERMEDIARY_TEXT = b"error code: "  # Cloudflare's page for programs: "error code: 1020"
_PAGE_TYPES = ("text/html", "application/xhtml+xml", "text/xml", "application/xml")
_SNIFFED = 512  # bytes


def is_own_refusal(status: int, headers: Headers, content: bytes) -> bool:
    """Return whether a registry or token server itself responded with `status`, which is 4xx.

    It is believed to if the response has a mark of the protocol: Docker-Distribution-Api-Version, a challenge, or JSON
    (distribution-spec 1.1, "Error Codes"). Without one, a page, another server's mark, or a status that only others
    send means an intermediary. Plain text or nothing at all is the server's own.
    """
    if "docker-distribution-api-version" in headers or parse_challenges(headers.all("www-authenticate")):
        return True
    start = content[:_SNIFFED].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"{", b"[")):
        return True
    if status in _INTERMEDIARY_STATUSES or start.startswith((b"<", _INTERMEDIARY_TEXT)):
        return False
    return not is_page(headers) and not any(name in headers for name in _INTERMEDIARY_FIELDS)


def is_page(headers: Headers) -> bool:
    """Return whether the response has the type of a web page, or of an object store's error."""
    return (headers.get("content-type") or "").partition(";")[0].strip().lower() in _PAGE_TYPES
