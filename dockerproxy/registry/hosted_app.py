"""HTTP handlers of direct requests: the hosted registry, and the choice of a registry by `?ns=`."""

from __future__ import annotations

from attrs import define, frozen

from dockerproxy.errors import NameInvalid, RegistryError
from dockerproxy.http.channel import Handler
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.oci.routes import Target, pop_parameter, route
from dockerproxy.registry.access_control import HOSTED_TOKEN_PATH, AccessControl
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.hosted import HostedRegistry
from dockerproxy.registry.responses import handle_error


@define
class HostedRegistryApp:
    """Handles requests to `/v2/` for the hosted registry. A newly set `access_control` applies to later requests."""

    api: RegistryAPI
    backend: HostedRegistry
    access_control: AccessControl

    async def handle(self, request: Request) -> None:
        """Respond to `request`."""
        target: Target | None = None
        try:
            if request.path == HOSTED_TOKEN_PATH and await self.access_control.handle_token(request):
                return
            target = route(request.path)
            await self.access_control.check(request, target)
            await self.api.handle(request, target, self.backend)
        except RegistryError as error:
            challenge = [field for field in error.headers if field[0] == "WWW-Authenticate"]
            if error.status == 401 and not challenge:
                challenge = self.access_control.challenge(request, target)
            handle_error(request, error, challenge)


@frozen
class NamespaceRouter:
    """Dispatches requests to `/v2/` by `?ns=HOST`: to the mirror, unless HOST is one of `local_hostnames`.

    A client that reaches us by another name or by address sends `ns` for our own registry as well. A request without
    `ns` goes to the listener's `default`.
    """

    hosted: Handler
    mirror: Handler
    local_hostnames: frozenset[str]
    default: Handler

    async def handle(self, request: Request) -> None:
        """Respond to `request`."""
        try:
            namespace, rest = pop_parameter(request.query, "ns")
            is_local = namespace is not None and Host.parse(namespace).name in self.local_hostnames
        except NameInvalid:
            is_local = False
        except RegistryError as error:
            handle_error(request, error, [])
            return
        if is_local:
            request.query = rest
            await self.hosted(request)
        elif namespace is not None:
            await self.mirror(request)
        else:
            await self.default(request)
