"""Redirects of single requests, such as those for a token: which URL comes next, and what goes along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from attrs import frozen

from dockerproxy.errors import CaptivePortalSuspected, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.urls import resolve_location, split_url

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 10  # Go's client, which is that of most clients, follows nine
# RFC 9110, section 15.4: after these, clients send GET without the body in place of POST.
_REDIRECTS_TO_GET = frozenset({301, 302, 303})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class RedirectingResponse(Protocol):
    """A response that may be a redirect."""

    status: int
    headers: Headers

    async def discard(self) -> None: ...


R_co = TypeVar("R_co", bound=RedirectingResponse, covariant=True)


class RequestSender(Protocol[R_co]):
    """Sends single requests; see `Agent.request`."""

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = ...,
        body: Any = ...,
        *,
        address_check: AddressCheck | None = ...,
    ) -> R_co: ...


@frozen
class Followed:
    """The server that responded at last, and whether the Authorization field and the form went along to it."""

    server: Registry
    with_login: bool


async def follow(
    agent: RequestSender[R_co],
    method: str,
    url: str,
    headers: Headers,
    form: BytesBody | None,
    address_check_for: Callable[[Host], AddressCheck | None],
) -> tuple[R_co, Followed]:
    """Send a request, follow its redirects, and return the final response.

    Within the host, the Authorization field and the form go along, also from plain HTTP to TLS. To another host, there
    is no Authorization, and a form goes nowhere. Raise `UpstreamBroken` if a form would go to another host, in a loop,
    and after MAX_REDIRECTS; `CaptivePortalSuspected` for a redirect from TLS to plain HTTP; and the errors of
    `Agent.request`.
    """
    visited = {url}
    with_login = True
    while True:
        server, _ = split_url(url)
        response = await agent.request(method, url, headers, form, address_check=address_check_for(server.host))
        location = response.headers.get("location")
        if response.status not in REDIRECTS or location is None:
            return response, Followed(server, with_login)
        await response.discard()
        url = resolve_location(url, location)
        target, _ = split_url(url)
        if url in visited or len(visited) > MAX_REDIRECTS:
            raise UpstreamBroken(f"{server}: it redirects in a loop, or more than {MAX_REDIRECTS} times")
        visited.add(url)
        if target.scheme == "http" and server.scheme == "https":
            raise CaptivePortalSuspected(f"{server}: it redirects to plain HTTP at {target.host.authority}; refused")
        if form is not None and response.status in _REDIRECTS_TO_GET:
            method, form, with_login = "GET", None, False
            headers = headers.without("content-type")
        if not _is_same_host(server, target):
            if form is not None:
                raise UpstreamBroken(f"{server}: it redirects a form, which may be a login, to {target.host.authority}")
            headers, with_login = headers.without("authorization"), False


def _is_same_host(one: Registry, other: Registry) -> bool:
    """Return whether both are one server, perhaps once without and once with TLS."""
    if one.host.name != other.host.name:
        return False
    return one.host.port == other.host.port or all(
        server.host.port == _DEFAULT_PORTS[server.scheme] for server in (one, other)
    )
