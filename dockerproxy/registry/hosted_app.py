"""The HTTP handler of the hosted registry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import define, field

from dockerproxy.errors import RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import Target, route_hosted
from dockerproxy.registry.access_control import HOSTED_TOKEN_PATH, AccessControl
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.backend import RegistryBackend
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.registry.responses import respond_error

PassOn = Callable[[Request, Target], Awaitable[None] | None]
"""Returns the awaitable that responds to a request from elsewhere, None if it is to be handled here."""


@define
class HostedRegistryApp:
    """Handles requests to `/v2/` for the hosted registry. A newly set `access_control` applies to later requests.

    `pass_on`, if given, is asked about each request that the client may make.
    """

    api: RegistryAPI
    backend: RegistryBackend
    access_control: AccessControl
    audit: AuditLog
    rules: HostedRules = field(factory=HostedRules)
    _pass_on: PassOn | None = None

    async def handle(self, request: Request) -> None:
        """Respond to `request`. Raise `RegistryError`."""
        request.error_renderer = _respond_error
        request.registry = "hosted"
        if request.path == HOSTED_TOKEN_PATH and await self.access_control.handle_token(request):
            return
        target = route_hosted(request.path)
        request.kind = target.kind
        principal = await self.access_control.check(request, target)
        request.user = principal.user
        try:
            self.rules.check(request, target)
        except RegistryError as error:
            if principal.user is not None:  # what anybody can cause would displace the other entries
                resource = request.path.removeprefix("/v2/")
                self.audit.record(principal, request.method, resource, f"refused: {error.message}")
            raise
        passed_on = None if self._pass_on is None else self._pass_on(request, target)
        await (passed_on or self.api.handle(request, target, self.backend, principal))


def _respond_error(request: Request, error: RegistryError) -> None:
    """Respond with `error`. Its challenge, if it has one, was made for this client."""
    respond_error(request, error, [field for field in error.headers if field[0] == "WWW-Authenticate"])
