"""Requests to registries: authorized, and followed to wherever the registry keeps what was asked for."""

from __future__ import annotations

from attrs import frozen
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import UpstreamBroken, UpstreamError
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Permit
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.names import Registry, Repository
from dockerproxy.upstream.credentials import Configured, Credential
from dockerproxy.upstream.tokens import Grant, Tokens
from dockerproxy.upstream.transport import Response, Transport
from dockerproxy.upstream.urls import resolve, split_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_MAX_REPEATS = 2  # with the first token, and with one in the place of a token that the registry takes no more
# What another host may be told. The rest, of which nobody knows whether it is a credential, is for the registry.
_FOR_OTHERS = frozenset({"accept", "range", "if-range", "if-match", "if-none-match", "if-modified-since", "user-agent"})
_NONE = Headers()


@frozen
class _Request:
    method: str
    registry: Registry
    path: str
    headers: Headers
    body: IBodyProducer | None
    follow: bool


class UpstreamClient:
    """Speaks to registries for the cache and the pass-through.

    `redirect_permit` is asked for the addresses that a redirect leads to, unless that is the registry itself: what an
    upstream names must not make us fetch from this machine, its network's edge or the cloud's metadata service.
    """

    def __init__(self, transport: Transport, tokens: Tokens, redirect_permit: Permit | None) -> None:
        self._transport = transport
        self._tokens = tokens
        self._redirect_permit = redirect_permit

    def effective_login(self, registry: Registry) -> Configured | None:
        """Return the login of AUTH_REGISTRIES that is good for `registry`, or None."""
        return self._tokens.effective_login(registry)

    async def request(
        self,
        method: str,
        registry: Registry,
        path: str,
        *,
        name: Repository | None,
        credential: Credential,
        headers: Headers = _NONE,
        body: IBodyProducer | None = None,
        actions: str = "pull",
        follow: bool = True,
    ) -> Response:
        """Return the final answer of `registry` for `path` (and query), whatever its status.

        Authorization is added for `actions` (``pull``, ``pull,push``) on the repository `name`, as `credential` has
        it; one that `headers` hold is replaced. A 401 is answered with a token and the request repeated, where it has
        no `body` and the credential is not the client's own. Redirects of GET and HEAD are followed; where `follow` is
        false they are the answer.

        Raise `UpstreamError`s, and `Unauthorized` or `TooManyRequests` where no token is given out.
        """
        scope = None if name is None else f"repository:{name}:{actions}"
        follow = follow and method in ("GET", "HEAD")
        request = _Request(method, registry, path, headers.without("authorization"), body, follow)
        grant = await self._first_grant(registry, scope, credential)
        response = await self._follow(request, grant)
        for _ in range(_MAX_REPEATS):
            if response.status != 401 or split_url(response.url)[0] != registry:
                break
            challenges = parse_challenges(response.headers.all("www-authenticate"))
            self._tokens.remember(registry, challenges)
            if body is not None:
                break
            try:
                better = await self._tokens.grant(registry, challenges, scope, credential, refused=grant)
            except BaseException:
                response.abort()
                raise
            if better is None or (grant is not None and better.authorization == grant.authorization):
                break
            await response.discard()
            grant = better
            response = await self._follow(request, grant)
        return response

    async def _first_grant(self, registry: Registry, scope: str | None, credential: Credential) -> Grant | None:
        """Return what the registry will ask for, as it asked before."""
        try:
            return await self._tokens.grant(registry, self._tokens.challenges_for(registry), scope, credential)
        except UpstreamError:
            self._tokens.forget(registry)  # the realm may have moved: the next request finds out
            raise

    async def _follow(self, request: _Request, grant: Grant | None) -> Response:
        registry = request.registry
        fields = [*request.headers, *([] if grant is None else [("authorization", grant.authorization)])]
        headers = Headers.from_lowercase(fields)
        url = registry.origin + request.path
        seen = {url}
        while True:
            origin, _ = split_url(url)
            if origin != registry:
                headers = Headers.from_lowercase([field for field in headers if field[0] in _FOR_OTHERS])
            permit = None if origin.host == registry.host else self._redirect_permit
            response = await self._transport.request(request.method, url, headers, request.body, permit=permit)
            location = response.headers.get("location")
            if not request.follow or response.status not in _REDIRECTS or location is None:
                return response
            await response.discard()
            url = resolve(url, location)
            if url in seen or len(seen) > _MAX_REDIRECTS:
                raise UpstreamBroken(f"{registry}: it redirects in a circle, or more than {_MAX_REDIRECTS} times")
            seen.add(url)
            _check_scheme(registry, url)


def _check_scheme(registry: Registry, url: str) -> None:
    target, _ = split_url(url)
    if target.scheme == "http" and registry.scheme == "https":
        raise UpstreamBroken(f"{registry}: it redirects to plain HTTP, at {target.host.authority}")
