"""Header fields and errors of the distribution API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from dockerproxy.errors import RegistryError, UpstreamRefused
from dockerproxy.http.forwarding import forwarded_fields
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.manifests import data_type

API_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")

FieldList = list[tuple[str, str]]

# The fields of the distribution API, and of HTTP as registries use it. An upstream sends whatever it likes under our
# name: cookies, scripts, refreshes, permissions for other web pages. Everything that is not listed is left out.
_API_FIELDS = frozenset({
    "accept-ranges", "allow", "cache-status", "content-range", "content-type", "etag", "last-modified", "range",
    "retry-after", "warning", "x-request-id",
})  # fmt: skip
_API_FIELD_PREFIXES = ("docker-", "oci-", "ratelimit", "x-ratelimit-")

# Fields of web pages that are not passed on: Alt-Svc would lead clients past us, and the X-Cache of a content delivery
# network describes another cache than ours.
_NOT_FORWARDED = ("alt-svc", "x-cache")


# Our member of Cache-Status (RFC 9211, section 2) for every value of X-Cache.
_CACHE_STATUS_MEMBERS = {
    "HIT": "docker-registry-proxy;hit",
    "MISS": "docker-registry-proxy;fwd=miss",
    "PEER": "docker-registry-proxy;fwd=miss;detail=peer",
    "JOINED": "docker-registry-proxy;fwd=miss;collapsed",
    "REVALIDATED": "docker-registry-proxy;fwd=stale",
    "STALE": "docker-registry-proxy;hit;detail=stale",
    "PASS": "docker-registry-proxy;fwd=bypass",
}
_CACHE_STATUS_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    status: (("X-Cache", status), ("Cache-Status", member)) for status, member in _CACHE_STATUS_MEMBERS.items()
}


def cache_status_fields(cache_status: str) -> Sequence[tuple[str, str]]:
    """Return the two fields that report a cache status, X-Cache and Cache-Status; none if no cache was involved (-).

    Cache-Status is a list. Its first member is the cache next to the origin, and its last the cache next to the client
    (RFC 9211, section 2). Put these fields behind those of upstream: several fields are one list, in order (RFC 9110,
    section 5.3), so our member becomes the last.
    """
    return () if cache_status == "-" else _CACHE_STATUS_FIELDS[cache_status]


def x_cache_fields(cache_status: str) -> FieldList:
    """Return the only field that reports a cache status in a response that this server generates, such as an error.

    Cache-Status is not sent with those, because it says how a cache handled the request (RFC 9211, section 2).
    """
    return [] if cache_status == "-" else [("X-Cache", cache_status)]


def upstream_fields(headers: Headers) -> FieldList:
    """Return the fields of an upstream response to a request of the API that the client gets.

    Link and Location are not among them, because it depends on the request whether they lead anywhere.

    Upstream's Cache-Status is among them: a cache that adds its member preserves the existing ones (RFC 9211,
    section 2). That holds only for a response to this client's own request. The field describes how caches handled one
    request, so it is neither stored with a blob or manifest nor repeated with the cached copy.
    """
    return [
        (name, data_type(value) if name == "content-type" else value)
        for name, value in headers.end_to_end()
        if name in _API_FIELDS or name.startswith(_API_FIELD_PREFIXES)
    ]


def page_fields(headers: Headers) -> FieldList:
    """Return the fields of an upstream response to a request that is not of the API, such as a web page or git.

    Browsers and git need all of them, cookies included. No login of ours was shown for such a request.
    """
    return forwarded_fields(headers.without(*_NOT_FORWARDED))


def respond_ping(request: Request) -> None:
    """Respond that the distribution API is here."""
    request.respond(200, [("Content-Type", "application/json"), API_VERSION], b"{}")


async def respond_options(request: Request, allowed: Iterable[str]) -> None:
    """Respond to OPTIONS with the `allowed` methods (RFC 9110, section 9.3.7), as CNCF distribution does."""
    request.respond(200, [("Allow", ", ".join(allowed)), API_VERSION])


def respond_error(request: Request, error: RegistryError, challenge: Iterable[tuple[str, str]] = ()) -> None:
    """Respond with `error`. A refusal by upstream keeps upstream's own words.

    The fields in `challenge` replace any challenge of `error`, because that one was not made for this client. `error`
    is not modified, because it may be the response to several requests.
    """
    headers = Headers(error.headers).without("www-authenticate")
    if isinstance(error, UpstreamRefused):
        if request.cache_status != "PASS":
            # One refusal may decide for several clients, and its Cache-Status describes the request of only one.
            headers = headers.without("cache-status")
        fields, body = upstream_fields(headers), error.content
        cache_fields = cache_status_fields(request.cache_status)
    else:
        fields = [("Content-Type", "application/json"), API_VERSION, *headers]
        cache_fields = x_cache_fields(request.cache_status)
        body = json.dumps({"errors": [{"code": error.code, "message": error.message}]}).encode()
    request.respond(error.status, [*fields, *challenge, *cache_fields], body)
