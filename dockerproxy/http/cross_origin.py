"""Protection against web pages: requests that a browser sends because a page of another origin told it to.

A browser in the network is a client like any other, and any page that it shows can make it send requests. It names the
page's origin in Origin (RFC 6454) or its relation to us in Sec-Fetch-Site (W3C Fetch Metadata), and no page can prevent
that. Programs such as docker and containerd send neither.

Over plain HTTP browsers omit Sec-Fetch-Site, and for images, scripts, links and frames Origin too. Then only Referer is
left, which a page may suppress. Such a request cannot read the response and cannot write, because browsers send Origin
with every request that is neither GET nor HEAD. It must not reach an upstream registry, which counts pulls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum

from dockerproxy.errors import Denied, NameInvalid
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import SAFE_METHODS
from dockerproxy.http.request import Request
from dockerproxy.http.security_fields import SECURITY_FIELDS
from dockerproxy.oci.names import Host

_ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SITES_OF_OUR_OWN = ("same-origin", "none")  # none: a person typed the URL

_BROWSER_FIELDS = frozenset({"origin", "sec-fetch-site", "referer"})

# PowerShell calls itself Mozilla, but runs no pages.
_BROWSER = re.compile(r"Mozilla/(?!.*PowerShell)")

_EXPOSED_FIELDS = (
    "Cache-Status, Content-Range, Docker-Content-Digest, Docker-Distribution-Api-Version, Docker-Upload-UUID, Link, "
    "Location, OCI-Filters-Applied, OCI-Subject, OCI-Tag, Range, Retry-After, Warning, WWW-Authenticate, X-Cache"
)
_PREFLIGHT_FIELDS = (
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE"),
    (
        "Access-Control-Allow-Headers",
        "Accept, Authorization, Cache-Control, Content-Range, Content-Type, If-None-Match, If-Range, Range, "
        "X-Requested-With",
    ),
    ("Access-Control-Max-Age", "600"),
)


class Initiator(Enum):
    """Where a request comes from."""

    TRUSTED = "a program, a person, a page of our own or a page of CORS_ORIGINS"
    UNKNOWN = "a browser that does not say whether a page of another origin made it send the request"
    FOREIGN = "a page of another origin"


class CrossOriginProtection:
    """Refuses requests from pages of other origins, except those of CORS_ORIGINS."""

    def __init__(self, cors_origins: Iterable[str] = ()) -> None:
        self._cors_fields: dict[str, str] = {}
        self._fields = SECURITY_FIELDS
        self.set_cors_origins(cors_origins)

    def set_cors_origins(self, origins: Iterable[str]) -> None:
        """Replace the origins whose pages may use the API. Each is written as browsers write it in Origin."""
        self._cors_fields = {
            origin: f"{SECURITY_FIELDS}Vary: Origin\r\n"
            f"Access-Control-Allow-Origin: {origin}\r\n"
            "Access-Control-Allow-Credentials: true\r\n"
            f"Access-Control-Expose-Headers: {_EXPOSED_FIELDS}\r\n"
            for origin in origins
        }
        self._fields = f"{SECURITY_FIELDS}Vary: Origin\r\n" if self._cors_fields else SECURITY_FIELDS

    def check(self, request: Request, *, public: bool = False, pull: bool = False) -> None:
        """Raise `Denied` if the initiator of a request to `request.host` may not make it.

        A page of another origin may only read what is `public`. A `pull` reaches an upstream registry, so that it needs
        a known initiator. The response gets the CORS fields of its page, if that is one of CORS_ORIGINS.
        """
        headers = request.headers
        request.security_fields = self._fields
        if _is_from_program(headers):
            return
        origin = headers.get("origin")
        cors_fields = self._cors_fields.get(origin) if origin is not None else None
        if cors_fields is not None and len(headers.all("origin")) == 1:
            request.security_fields = cors_fields
            return
        initiator = self._initiator(headers, request.host, request.secure)
        is_read = request.method in SAFE_METHODS
        if initiator is Initiator.FOREIGN and not (public and is_read):
            raise _denial(headers)
        if initiator is Initiator.UNKNOWN and not is_read:
            raise Denied(
                "a web browser sent this request without an Origin field, so it may come from a page of another site; "
                "use another browser, or a program such as curl."
            )
        if initiator is Initiator.UNKNOWN and pull:
            raise Denied(
                "a web browser gets no images of upstream registries over plain HTTP, because any page could then use "
                "up the pulls of this network; use a program such as docker or curl."
            )

    def _initiator(self, headers: Headers, host: str, secure: bool) -> Initiator:
        sites = headers.all("sec-fetch-site")
        origins = headers.all("origin")
        if any(site not in _SITES_OF_OUR_OWN for site in sites):
            return Initiator.FOREIGN
        if any(not is_own_origin(origin, host, secure=secure) for origin in origins):
            return Initiator.FOREIGN
        if sites or origins or not _BROWSER.match(headers.get("user-agent") or ""):
            return Initiator.TRUSTED
        referer = _ORIGIN.match(headers.get("referer") or "")
        if referer is None:
            return Initiator.UNKNOWN
        is_own = referer[0] in self._cors_fields or is_own_origin(referer[0], host, secure=secure)
        return Initiator.TRUSTED if is_own else Initiator.FOREIGN


def _is_from_program(headers: Headers) -> bool:
    """Return whether no browser sent a request. One pass over the fields, because every cached hit takes it."""
    for name, value in headers:
        if name in _BROWSER_FIELDS or (name == "user-agent" and value.startswith("Mozilla/")):
            return False
    return True


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if a page may send a request (Fetch standard, "CORS-preflight request").

    Call it after `CrossOriginProtection.check`, which refuses it for all origins but those of CORS_ORIGINS.
    """
    headers = request.headers
    return request.method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


async def respond_preflight(request: Request) -> None:
    """Respond that the page may send its request. A login comes with that request, not with this one."""
    request.respond(204, _PREFLIGHT_FIELDS)


def is_own_origin(origin: str, host: str, *, secure: bool) -> bool:
    """Return whether `origin` is that of a request to `host` (``name[:port]``).

    A request over plain HTTP may come through a server in front of us that terminates TLS, so https is own as well. A
    browser sends no request of an https page over plain HTTP otherwise.
    """
    match = _ORIGIN.fullmatch(origin)
    if match is None or (secure and match[1] != "https"):
        return False
    default_port = _DEFAULT_PORTS[match[1]]
    try:
        return Host.parse(match[2], default_port) == Host.parse(host, default_port)
    except NameInvalid:
        return False


def _denial(headers: Headers) -> Denied:
    origin = _ORIGIN.fullmatch(headers.get("origin") or "")
    page = f"a page of {origin[0][:200]}" if origin is not None else "a page of another site"
    return Denied(
        f"{page} made a web browser send this request, which is not allowed; the administrator can add the page's "
        "origin to CORS_ORIGINS."
    )
