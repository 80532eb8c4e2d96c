"""Errors as the distribution API has them: the one place that renders a `RegistryError`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from dockerproxy.errors import RegistryError, UpstreamRefused
from dockerproxy.http.forwarding import forwarded_fields
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request

API_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")

FieldList = list[tuple[str, str]]

# What upstream says about itself as a server: we stand in its place. Alt-Svc would lead clients past us, and a
# content delivery network's X-Cache tells of another cache than ours.
_NOT_FORWARDED = ("alt-svc", "server", "strict-transport-security", "x-cache")


def cache_status_fields(cache_status: str) -> FieldList:
    """Return the field that says how an answer came about; none where no cache had a part in it."""
    return [] if cache_status == "-" else [("X-Cache", cache_status)]


def upstream_fields(headers: Headers) -> FieldList:
    """Return the fields of a registry's answer that a client of ours gets."""
    return forwarded_fields(headers.without(*_NOT_FORWARDED))


def without_cookies(headers: Headers) -> Headers:
    """Return `headers` without cookies, which the API does not know.

    A cookie that upstream gives may be a session of our own login; one that a client sends may be for another server
    than the one that it is passed on to.
    """
    return headers.without("cookie", "set-cookie")


def respond_error(request: Request, error: RegistryError, challenge: Iterable[tuple[str, str]] = ()) -> None:
    """Answer with `error`, upstream's own refusal in upstream's own words.

    The fields `challenge` take the place of whatever challenge `error` holds: that was not made for this client. The
    error is left as it is, for it may be the answer to several requests.
    """
    headers = Headers(error.headers).without("www-authenticate")
    if isinstance(error, UpstreamRefused):
        fields, body = upstream_fields(without_cookies(headers)), error.content
    else:
        fields = [("Content-Type", "application/json"), API_VERSION, *headers]
        body = json.dumps({"errors": [{"code": error.code, "message": error.message}]}).encode()
    request.respond(error.status, [*fields, *challenge, *cache_status_fields(request.cache_status)], body)


def handle_error(request: Request, error: RegistryError, challenge: list[tuple[str, str]]) -> None:
    """Answer with `error` under `challenge`; break off where an answer has begun, so that nobody takes it for whole."""
    if request.started:
        request.abort()
    else:
        respond_error(request, error, challenge)
