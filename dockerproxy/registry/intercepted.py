"""The two handlers for upstream registries: interception under their own names, and the mirror."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from dockerproxy.errors import NameUnknown, RegistryError, Unauthorized, Unsupported
from dockerproxy.http.cross_origin import CrossOriginProtection, is_preflight, respond_preflight
from dockerproxy.http.message import READ_METHODS, SAFE_METHODS, origin_form
from dockerproxy.http.request import Request
from dockerproxy.http.tunnel import Tunnels
from dockerproxy.oci.docker_hub import canonical_registry, registry_label
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.routes import Kind, Target, is_api_path, route
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.responses import respond_error, respond_options, respond_ping
from dockerproxy.registry.upstream import (
    Namespace,
    UpstreamRegistry,
    check_push,
    forward_page,
    forward_request,
    forward_token_request,
    handle_list,
    respond_with_token,
)

_MAX_FORM_SIZE = 64 * 1024

# User-Agents of containers/image, and of the programs that set one of their own.
_CONTAINERS_IMAGE = re.compile(r"(?:containers|skopeo|buildah|cri-o|podman|libpod)/", re.IGNORECASE)
_SKOPEO_WITH_PREFIX = " skopeo/"  # its option --user-agent-prefix, as bootc uses it

OpenRegistry = Callable[[Registry, str | None, str], UpstreamRegistry]
"""Returns the registry for a client with this Authorization value, or without one, and with this address."""


class TokenService(Protocol):
    """The token endpoints of upstream registries."""

    def registry_for_realm(self, host: Registry, path: str) -> Registry | None:
        """Return the registry whose token endpoint is at `path` of `host`, or None."""

    def registry_naming(self, host: Registry, path: str) -> Registry | None:
        """Return a registry that names `path` of `host`, which may be a page of another owner, as its token server."""

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        """Return the JSON document for the client."""


class Intercepted:
    """Handles requests to upstream registries under their own names."""

    def __init__(
        self,
        api: RegistryAPI,
        open_registry: OpenRegistry,
        token_service: TokenService,
        cross_origin: CrossOriginProtection,
        tunnels: Tunnels,
        *,
        allow_push: bool,
    ) -> None:
        self._api = api
        self._open_registry = open_registry
        self._token_service = token_service
        self._cross_origin = cross_origin
        self._tunnels = tunnels
        self._allow_push = allow_push

    def handle(self, server: Registry, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to a request for `server`. Raise `RegistryError`.

        If `server` is another name of a registry, its API is that of the registry, and its pages are its own.
        This is no coroutine, because one around another costs memory for each slow client.
        """
        request.host = str(server)
        registry = canonical_registry(server)
        request.registry = registry_label(server)
        upstream = self._open_registry(registry, request.headers.get("authorization"), request.client)
        request.error_renderer = partial(_respond_error, upstream)
        _check_path(request)
        target = _api_target(request.path)
        if target is not None:
            return self._handle_api(request, target, upstream)
        token_registry = self._token_service.registry_for_realm(registry, request.path)
        if token_registry is not None and request.method in ("GET", "POST"):
            self._cross_origin.check(request)
            return self._handle_token(token_registry, request)
        if request.method not in READ_METHODS and is_api_path(request.path):
            self._cross_origin.check(request)
            check_push(request, self._allow_push)
        if registry != server:
            upstream = self._open_registry(server, request.headers.get("authorization"), request.client)
        naming = self._token_service.registry_naming(server, request.path)
        if naming is not None and request.method in ("GET", "POST"):
            return forward_token_request(request, upstream, naming, self._tunnels)
        return forward_page(request, upstream, self._tunnels)

    def _handle_api(self, request: Request, target: Target, upstream: UpstreamRegistry) -> Awaitable[None]:
        request.kind = target.kind
        self._cross_origin.check(request, pull=target.kind is not Kind.BASE)
        if is_preflight(request):
            return respond_preflight(request)
        if target.kind in (Kind.MANIFEST, Kind.BLOB, Kind.REFERRERS) and request.method in SAFE_METHODS:
            request.error_renderer = partial(_respond_pull_error, upstream, target)
        elif target.kind is Kind.BASE and _is_containers_image(request):
            request.error_renderer = partial(_respond_ping_error, upstream)
        pull = self._api.handle_pull(request, target, upstream) or handle_list(
            request, target, upstream, asks_for_login=True
        )
        if pull is not None:
            return pull
        if request.method not in READ_METHODS:
            check_push(request, self._allow_push)
        return forward_request(request, upstream, target)

    async def _handle_token(self, registry: Registry, request: Request) -> None:
        request.cache_status, request.kind = "PASS", "token"
        form = await request.read_all(_MAX_FORM_SIZE) if request.method == "POST" else None
        content = await self._token_service.token(registry, request.query, request.headers.get("authorization"), form)
        respond_with_token(request, content)


class Mirror:
    """Handles requests as a mirror: the namespace names one of `registries`; the default is `hub`.

    The default is for dockerd, which mirrors Docker Hub only. The clients of containers/image mirror any registry and
    send no `?ns=`, so that they must name it in the path: Docker Hub's image of the same name may be another one.

    The client of a mirror has no login for upstream. Its Authorization is therefore not forwarded, and the proxy's own
    login is used, if there is one.
    """

    def __init__(
        self,
        api: RegistryAPI,
        open_registry: OpenRegistry,
        registries: Mapping[Host, Registry],
        hub: Registry,
        cross_origin: CrossOriginProtection,
    ) -> None:
        self._api = api
        self._open_registry = open_registry
        self._cross_origin = cross_origin
        self._registries = registries
        self._hub = hub

    def handle(self, request: Request, namespace: Namespace | None) -> Awaitable[None]:
        """Return the awaitable that responds to a request to `/v2/`. Raise `RegistryError`."""
        # Without a challenge: the client must not send us its login for the mirrored registry.
        request.error_renderer = respond_error
        registry = self._hub if namespace is None else self._find(namespace.host)
        target = route(request.path)
        if namespace is None and target.kind is not Kind.BASE:
            _check_default(request)
        self._cross_origin.check(request, pull=target.kind is not Kind.BASE)
        request.host, request.registry, request.kind = str(registry), registry_label(registry), target.kind
        if request.method == "OPTIONS":
            return respond_options(request, SAFE_METHODS)
        if request.method not in SAFE_METHODS:
            message = "a mirror is read-only; push to the registry itself"
            raise Unsupported(message, headers=[("Allow", ", ".join(SAFE_METHODS))])
        if target.kind is Kind.BASE:
            return _respond_ping(request)
        upstream = self._open_registry(registry, None, request.client)
        pull = self._api.handle_pull(request, target, upstream) or handle_list(request, target, upstream, namespace)
        if pull is None:
            raise NameUnknown("a mirror has no upload sessions")
        return pull

    def _find(self, host: Host) -> Registry:
        registry = self._registries.get(host)
        if registry is None:
            raise NameUnknown(
                f"'{host}' is not mirrored here; the administrator of this proxy can add it to REGISTRIES"
            )
        return registry


def _check_default(request: Request) -> None:
    """Refuse a client of containers/image that names no registry: it would take the default's image for another's."""
    if _is_containers_image(request):
        location = f"{request.host or 'docker-registry.local:3128'}/"
        raise NameUnknown(
            "a mirror for podman, CRI-O, buildah or skopeo has to name its registry, because they do not: write "
            f'location = "{location}quay.io" into registries.conf for quay.io, "{location}docker.io" for Docker Hub'
        )


def _is_containers_image(request: Request) -> bool:
    user_agent = request.headers.get("user-agent") or ""
    return _CONTAINERS_IMAGE.match(user_agent) is not None or _SKOPEO_WITH_PREFIX in user_agent


async def _respond_ping(request: Request) -> None:
    respond_ping(request)  # without a question to upstream, because a mirror needs no login


def _respond_error(upstream: UpstreamRegistry, request: Request, error: RegistryError) -> None:
    """Respond with `error`. A 401 has the registry's challenge."""
    respond_error(request, error, upstream.challenge(error, secure=request.secure) if error.status == 401 else [])


def _respond_pull_error(upstream: UpstreamRegistry, target: Target, request: Request, error: RegistryError) -> None:
    """Respond with `error`, or with a request for a login that the content may be served to from the cache."""
    _respond_error(upstream, request, upstream.request_login(error, target.name))


def _respond_ping_error(upstream: UpstreamRegistry, request: Request, error: RegistryError) -> None:
    """Respond with `error`, which a client of containers/image has to print.

    Its older versions print nothing of a failed ping but the status (`httpResponseToError`), so that nobody would learn
    the cause. After a 401 without a challenge they request the content, and print the error of that.
    """
    if error.forwarded or error.status == 401:
        return _respond_error(upstream, request, error)
    respond_error(request, Unauthorized(error.message, headers=error.headers))


def _check_path(request: Request) -> None:
    """Refuse a target that is not a path: after a registry's origin, `.example.com/` would name another server."""
    path, request.path = request.path, ""  # it may contain a login, which must not be logged
    request.path = origin_form(path)


def _api_target(path: str) -> Target | None:
    """Return the API resource of `path`, None if the API has no such path. Raise `NameInvalid`, `DigestInvalid`."""
    try:
        return route(path)
    except NameUnknown:
        return None
