"""The two handlers for upstream registries: interception under their own names, and the mirror."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from dockerproxy.errors import NameUnknown, RegistryError, Unsupported
from dockerproxy.http.message import origin_form
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.routes import Kind, Target, pop_parameter, route
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.responses import API_VERSION, cache_status_fields, handle_error
from dockerproxy.registry.upstream_backend import (
    SAFE_METHODS,
    UpstreamBackend,
    UpstreamRegistry,
    check_push,
    forward_request,
)

_MAX_FORM_SIZE = 64 * 1024

OpenRegistry = Callable[[Registry, str | None], UpstreamRegistry]
"""Returns the registry for a client with this Authorization value, or without one."""


class TokenService(Protocol):
    """The token endpoints of upstream registries."""

    def registry_for_realm(self, host: Registry, path: str) -> Registry | None:
        """Return the registry whose token endpoint is at `path` of `host`, or None."""

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        """Return the JSON document for the client."""


class Intercepted:
    """Handles requests to upstream registries under their own names."""

    def __init__(
        self, api: RegistryAPI, open_registry: OpenRegistry, token_service: TokenService, *, allow_push: bool
    ) -> None:
        self._api = api
        self._open_registry = open_registry
        self._token_service = token_service
        self._allow_push = allow_push

    async def handle(self, registry: Registry, request: Request) -> None:
        """Respond to a request for `registry`."""
        request.host = str(registry)
        upstream = self._open_registry(registry, request.headers.get("authorization"))
        try:
            await self._route(registry, request, upstream)
        except RegistryError as error:
            handle_error(
                request, error, upstream.challenge(error, secure=request.secure) if error.status == 401 else []
            )

    def _route(self, registry: Registry, request: Request, upstream: UpstreamRegistry) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Another coroutine would cost memory per slow client."""
        _check_path(request)
        target = _api_target(request.path)
        if target is not None:
            return self._api.handle(request, target, UpstreamBackend(upstream, self._allow_push))
        token_registry = self._token_service.registry_for_realm(registry, request.path)
        if token_registry is not None and request.method in ("GET", "POST"):
            return self._handle_token(token_registry, request)
        if request.method not in (*SAFE_METHODS, "OPTIONS"):
            check_push(request, self._allow_push)
        return forward_request(request, upstream, None)

    async def _handle_token(self, registry: Registry, request: Request) -> None:
        request.cache_status = "PASS"
        form = await request.read_all(_MAX_FORM_SIZE) if request.method == "POST" else None
        content = await self._token_service.token(registry, request.query, request.headers.get("authorization"), form)
        fields = [
            ("Content-Type", "application/json"),
            ("Cache-Control", "no-store"),
            *cache_status_fields(request.cache_status),
        ]
        request.respond(200, fields, content)


class Mirror:
    """Handles requests as a mirror: `?ns=HOST` names one of `registries`; the default is `hub`.

    The client of a mirror has no login for upstream. Its Authorization is therefore not forwarded, and the proxy's own
    login is used, if there is one.
    """

    def __init__(
        self, api: RegistryAPI, open_registry: OpenRegistry, registries: Mapping[Host, Registry], hub: Registry
    ) -> None:
        self._api = api
        self._open_registry = open_registry
        self._registries = registries
        self._hub = hub

    async def handle(self, request: Request) -> None:
        """Respond to a request to `/v2/`."""
        try:
            await self._route(request)
        except RegistryError as error:
            # No challenge: the client must not send us its login for the mirrored registry.
            handle_error(request, error, [])

    async def _route(self, request: Request) -> None:
        _check_path(request)
        target = route(request.path)
        namespace, request.query = pop_parameter(request.query, "ns")
        registry = self._hub if namespace is None else self._registries.get(Host.parse(namespace))
        if registry is None:
            raise NameUnknown(
                f"{namespace!r} is not mirrored here; the administrator of this proxy can add it to REGISTRIES"
            )
        request.host = str(registry)
        if request.method not in SAFE_METHODS:
            message = "a mirror is read-only; push to the registry itself"
            raise Unsupported(message, headers=[("Allow", ", ".join(SAFE_METHODS))])
        if target.kind is Kind.BASE:
            request.respond(200, [("Content-Type", "application/json"), API_VERSION], b"{}")
            return
        await self._api.handle(request, target, UpstreamBackend(self._open_registry(registry, None), False, namespace))


def _check_path(request: Request) -> None:
    """Refuse a target that is not a path: after a registry's origin, `.example.com/` would name another server."""
    path, request.path = request.path, ""  # it may contain a login, which must not be logged
    request.path = origin_form(path)


def _api_target(path: str) -> Target | None:
    """Return the API resource of `path`. Return None if the API has no such path, so that the request is forwarded."""
    try:
        return route(path)
    except NameUnknown:
        return None
