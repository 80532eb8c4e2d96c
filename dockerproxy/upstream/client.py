"""The client for registries: requests with authorization, which follow redirects."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeGuard

from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import (
    CaptivePortalSuspected,
    DestinationForbidden,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import SAFE_METHODS
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.names import Registry
from dockerproxy.oci.routes import Kind, is_pull_query, route
from dockerproxy.upstream.agent import Agent, Response
from dockerproxy.upstream.authorizer import Authorization, Authorizer
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.redirects import MAX_REDIRECTS, REDIRECTS
from dockerproxy.upstream.registry_request import RegistryRequest
from dockerproxy.upstream.urls import resolve_location, split_url

# The registry, and the one it redirects to: once with the cached token, once with a new one if that is rejected.
_MAX_AUTH_RETRIES = 4
# Fields that are sent to other hosts after a redirect. All others are omitted, because they may contain credentials.
_CROSS_ORIGIN_FIELDS = frozenset(
    {"accept", "range", "if-range", "if-match", "if-none-match", "if-modified-since", "user-agent"}
)
# Fields that name the account of a login, which the clients that share it need not know.
_ACCOUNT_FIELDS = ("docker-ratelimit-source",)
_PULLED_KINDS = frozenset({Kind.MANIFEST, Kind.BLOB, Kind.REFERRERS, Kind.TAGS})


class UpstreamClient:
    """Sends the requests of the cache and the pass-through to registries.

    `redirect_address_check` checks the addresses of redirect targets on other hosts. Without it an upstream could make
    us fetch from this machine, its local network or the cloud's metadata service.
    """

    def __init__(self, agent: Agent, authorizer: Authorizer, redirect_address_check: AddressCheck | None) -> None:
        self._agent = agent
        self._authorizer = authorizer
        self._redirect_address_check = redirect_address_check

    async def request(self, request: RegistryRequest) -> Response:
        """Send a request and return the final response, with any status.

        After a 401 the request is sent again with a new token, unless it has a body or the credential is the client's
        own. Raise `UpstreamError`, or `Unauthorized` or `TooManyRequests` if the token server refuses a token.
        """
        registry, credential, body = request.registry, request.credential, request.body
        scope = "registry:catalog:*" if request.name is None else f"repository:{request.name}:{request.actions}"
        target_authorizations: dict[Registry, Authorization] = {}
        ping_target = self._authorizer.ping_target(registry)
        if ping_target is not None and _is_token(credential):
            # Clients got the token by the challenge of the target.
            target_authorizations[ping_target] = Authorization(credential.authorization)
            authorization = None
        else:
            authorization = await self._initial_authorization(registry, scope, credential)
        response = await self._follow_redirects(request, authorization, target_authorizations)
        for _ in range(_MAX_AUTH_RETRIES):
            if response.status != 401:
                break
            target = split_url(response.url)[0]
            if target != registry:
                if not await self._authorize_target(request, response, target_authorizations):
                    break
                await response.discard()
                response = await self._follow_redirects(request, authorization, target_authorizations)
                continue
            if isinstance(credential, ClientCredential):
                if authorization is None and body is None:  # it redirects nothing but the ping
                    await response.discard()
                    authorization = Authorization(credential.authorization)
                    response = await self._follow_redirects(request, authorization, target_authorizations)
                    continue
                break  # the challenge answers this client's credential, and says nothing about other clients
            challenges = parse_challenges(response.headers.all("www-authenticate"))
            self._authorizer.add_challenges(registry, challenges)
            if body is not None:
                break
            try:
                new_authorization = await self._authorizer.get_authorization(
                    registry, challenges, scope, credential, rejected_authorization=authorization
                )
            except Unauthorized as error:
                response.abort()
                raise Unauthorized(error.message, headers=_challenge_fields(response)) from None
            except BaseException:
                response.abort()
                raise
            if new_authorization is None or (
                authorization is not None and new_authorization.value == authorization.value
            ):
                break
            await response.discard()
            authorization = new_authorization
            response = await self._follow_redirects(request, authorization, target_authorizations)
        if not isinstance(credential, Anonymous | ClientCredential):
            response.headers = response.headers.without(*_ACCOUNT_FIELDS)
        # A server before the registry may say that it has changed the content (203, RFC 9110, section 15.3.4), or send
        # a part that is the whole (206). The digest decides about it, as about all framing.
        is_whole_part = response.status == 206 and "range" not in request.headers
        if is_whole_part or (request.method in SAFE_METHODS and _has_content(response.status)):
            response.status = 200
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
        except (Unauthorized, UpstreamBroken):
            self._authorizer.remove_challenges(registry)
            return None  # nobody is refused because of an earlier challenge: the registry names the realm again
        except UpstreamError:
            self._authorizer.remove_challenges(registry)  # because the realm may have moved; the next 401 will name it
            raise

    async def _authorize_target(
        self, request: RegistryRequest, response: Response, authorizations: dict[Registry, Authorization]
    ) -> bool:
        """Get a token for the server that `request` was redirected to, and that responded with a 401.

        Return whether the request should be sent again. Without a Bearer challenge, or outside the API, the 401 stays:
        it may be a content delivery network's.
        """
        registry, (target, path) = request.registry, split_url(response.url)
        scope, rejected = _pull_scope(path), authorizations.get(target)
        if scope is None or (rejected is not None and rejected.token_key is None):
            return False  # a token of the client's own is not replaced
        challenges = parse_challenges(response.headers.all("www-authenticate"))
        self._authorizer.add_redirect(registry, target, challenges)
        credential = _target_credential(request.credential, path)
        try:
            authorization = await self._authorizer.get_redirect_authorization(
                registry, target, challenges, scope, credential, rejected
            )
        except Unauthorized as error:
            response.abort()
            raise Unauthorized(error.message, headers=_challenge_fields(response)) from None
        except BaseException:
            response.abort()
            raise
        if authorization is None or (rejected is not None and rejected.value == authorization.value):
            return False
        authorizations[target] = authorization
        return True

    async def _known_target_authorization(
        self, request: RegistryRequest, target: Registry, path: str
    ) -> Authorization | None:
        """Return a token for the remembered challenge of `target`, so that it need not refuse first."""
        challenges, scope = self._authorizer.redirect_challenges(request.registry, target), _pull_scope(path)
        if not challenges or scope is None:
            return None
        credential = _target_credential(request.credential, path)
        try:
            return await self._authorizer.get_redirect_authorization(
                request.registry, target, challenges, scope, credential
            )
        except UpstreamError:
            self._authorizer.remove_redirect(request.registry, target)
            raise
        except Unauthorized:
            self._authorizer.remove_redirect(request.registry, target)
            return None

    async def _follow_redirects(
        self,
        request: RegistryRequest,
        authorization: Authorization | None,
        target_authorizations: dict[Registry, Authorization],
    ) -> Response:
        """Send `request`, follow its redirects, and return the final response.

        `authorization` is for the registry alone, each of `target_authorizations` for one server that it redirects to.
        """
        registry = request.registry
        fields = [*request.headers.without("authorization")]
        if authorization is not None:
            fields.append(("authorization", authorization.value))
        headers = Headers.from_lowercase(fields)
        url = registry.origin + request.path
        visited = {url}
        while True:
            origin, path = split_url(url)
            if origin != registry:
                fields = [field for field in headers if field[0] in _CROSS_ORIGIN_FIELDS]
                if origin not in target_authorizations:
                    known = await self._known_target_authorization(request, origin, path)
                    if known is not None:
                        target_authorizations[origin] = known
                if origin in target_authorizations and _pull_scope(path) is not None:
                    fields.append(("authorization", target_authorizations[origin].value))
                headers = Headers.from_lowercase(fields)
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
            if not request.follows_redirects or response.status not in REDIRECTS or location is None:
                return response
            await response.discard()
            url = resolve_location(url, location)
            if url in visited or len(visited) > MAX_REDIRECTS:
                raise UpstreamBroken(f"{registry}: it redirects in a loop, or more than {MAX_REDIRECTS} times")
            visited.add(url)
            _check_downgrade(registry, url)


def _has_content(status: int) -> bool:
    """Return whether clients take the content of a response to GET as they do that of 200."""
    return 200 < status < 300 and status not in (204, 205, 206)


def _challenge_fields(response: Response) -> list[tuple[str, str]]:
    return [("WWW-Authenticate", value) for value in response.headers.all("www-authenticate")]


def _is_token(credential: Credential) -> TypeGuard[ClientCredential]:
    return isinstance(credential, ClientCredential) and credential.authorization.startswith("Bearer ")


def _target_credential(credential: Credential, path: str) -> Credential:
    """Return the credential for a redirected request: a login of ours is for pulls alone, a client's for no target."""
    query = path.partition("?")[2]
    try:
        is_pull = is_pull_query(query)
    except RegistryError:
        is_pull = False
    return credential if is_pull and not isinstance(credential, ClientCredential) else Anonymous()


def _pull_scope(path: str) -> str | None:
    """Return the scope of a pull from `path`, which may have a query; None if the API has no such path."""
    try:
        target = route(path.partition("?")[0])
    except RegistryError:
        return None
    if target.kind is Kind.CATALOG:
        return "registry:catalog:*"
    return f"repository:{target.name}:pull" if target.kind in _PULLED_KINDS else None


def _check_downgrade(registry: Registry, url: str) -> None:
    target, _ = split_url(url)
    if target.scheme == "http" and registry.scheme == "https":
        raise CaptivePortalSuspected(f"{registry}: it redirects to plain HTTP at {target.host.authority}; refused")
