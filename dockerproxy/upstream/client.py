"""The client for registries: requests with authorization, which follow redirects."""

from __future__ import annotations

from collections.abc import Hashable

from attrs import frozen
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import CaptivePortalSuspected, DestinationForbidden, UpstreamBroken, UpstreamError
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.names import Registry, Repository
from dockerproxy.upstream.agent import Agent, Response
from dockerproxy.upstream.authorizer import Authorization, Authorizer
from dockerproxy.upstream.credentials import ClientCredential, Credential
from dockerproxy.upstream.urls import resolve_location, split_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_MAX_AUTH_RETRIES = 2  # once with the cached token, once with a new token if the registry rejects the cached one
# Fields that are sent to other hosts after a redirect. All others are omitted, because they may contain credentials.
_CROSS_ORIGIN_FIELDS = frozenset(
    {"accept", "range", "if-range", "if-match", "if-none-match", "if-modified-since", "user-agent"}
)
_NO_HEADERS = Headers()


@frozen
class _Request:
    method: str
    registry: Registry
    path: str
    headers: Headers
    body: IBodyProducer | None
    follow: bool


class UpstreamClient:
    """Sends the requests of the cache and the pass-through to registries.

    `redirect_address_check` checks the addresses of redirect targets on other hosts. Without it an upstream could make
    us fetch from this machine, its local network or the cloud's metadata service.
    """

    def __init__(self, agent: Agent, authorizer: Authorizer, redirect_address_check: AddressCheck | None) -> None:
        self._agent = agent
        self._authorizer = authorizer
        self._redirect_address_check = redirect_address_check

    async def request(
        self,
        method: str,
        registry: Registry,
        path: str,
        *,
        name: Repository | None,
        credential: Credential,
        headers: Headers = _NO_HEADERS,
        body: IBodyProducer | None = None,
        actions: str = "pull",
        follow: bool = True,
    ) -> Response:
        """Send a request to `registry` and return the final response, with any status. `path` includes the query.

        Authorization for `actions` (``pull`` or ``pull,push``) on the repository `name`, or for the catalog if it is
        None, is added according to `credential`, and replaces the one in `headers`. After a 401 the request is sent
        again with a new token, unless it has a `body` or the credential is the client's own. Redirects of GET and HEAD
        are followed if `follow` is true.

        Raise `UpstreamError`, or `Unauthorized` or `TooManyRequests` if the token server refuses a token.
        """
        scope = "registry:catalog:*" if name is None else f"repository:{name}:{actions}"
        follow = follow and method in ("GET", "HEAD")
        request = _Request(method, registry, path, headers.without("authorization"), body, follow)
        authorization = await self._initial_authorization(registry, scope, credential)
        response = await self._follow_redirects(request, authorization)
        for _ in range(_MAX_AUTH_RETRIES):
            if response.status != 401 or split_url(response.url)[0] != registry:
                break
            if isinstance(credential, ClientCredential):
                break  # the challenge answers this client's credential, and says nothing about other clients
            challenges = parse_challenges(response.headers.all("www-authenticate"))
            self._authorizer.add_challenges(registry, challenges)
            if body is not None:
                break
            try:
                new_authorization = await self._authorizer.get_authorization(
                    registry, challenges, scope, credential, rejected_authorization=authorization
                )
            except BaseException:
                response.abort()
                raise
            if new_authorization is None or (
                authorization is not None and new_authorization.value == authorization.value
            ):
                break
            await response.discard()
            authorization = new_authorization
            response = await self._follow_redirects(request, authorization)
        return response

    async def send(
        self,
        method: str,
        registry: Registry,
        path: str,
        headers: Headers,
        body: IBodyProducer | None = None,
        *,
        client_connection: Hashable = None,
    ) -> Response:
        """Send a request as it is: nothing is authorized, followed, or learned from the response.

        `client_connection` is as for `Agent.request`.
        """
        url = registry.origin + path
        return await self._agent.request(method, url, headers, body, client_connection=client_connection)

    async def _initial_authorization(
        self, registry: Registry, scope: str | None, credential: Credential
    ) -> Authorization | None:
        """Return an authorization for the remembered challenges, so that the registry need not refuse first."""
        try:
            return await self._authorizer.get_authorization(
                registry, self._authorizer.challenges_for(registry), scope, credential
            )
        except UpstreamError:
            self._authorizer.remove_challenges(registry)  # because the realm may have moved; the next 401 will name it
            raise

    async def _follow_redirects(self, request: _Request, authorization: Authorization | None) -> Response:
        registry = request.registry
        fields = [*request.headers, *([] if authorization is None else [("authorization", authorization.value)])]
        headers = Headers.from_lowercase(fields)
        url = registry.origin + request.path
        visited = {url}
        while True:
            origin, _ = split_url(url)
            if origin != registry:
                headers = Headers.from_lowercase([field for field in headers if field[0] in _CROSS_ORIGIN_FIELDS])
            address_check = None if origin.host == registry.host else self._redirect_address_check
            try:
                response = await self._agent.request(
                    request.method, url, headers, request.body, address_check=address_check
                )
            except DestinationForbidden as error:
                if origin == registry:
                    raise
                raise CaptivePortalSuspected(
                    f"{registry}: it redirects to {origin.host.authority}; {error.message}"
                ) from None
            location = response.headers.get("location")
            if not request.follow or response.status not in _REDIRECTS or location is None:
                return response
            await response.discard()
            url = resolve_location(url, location)
            if url in visited or len(visited) > _MAX_REDIRECTS:
                raise UpstreamBroken(f"{registry}: it redirects in a loop, or more than {_MAX_REDIRECTS} times")
            visited.add(url)
            _check_downgrade(registry, url)


def _check_downgrade(registry: Registry, url: str) -> None:
    target, _ = split_url(url)
    if target.scheme == "http" and registry.scheme == "https":
        raise CaptivePortalSuspected(f"{registry}: it redirects to plain HTTP at {target.host.authority}; refused")
