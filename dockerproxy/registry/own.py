"""The registry that is hosted here, at the daemon's own doors; and which registry a request at such a door means."""

from __future__ import annotations

from attrs import define, frozen

from dockerproxy.errors import NameInvalid, RegistryError
from dockerproxy.http.channel import Handler
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.oci.routes import Target, route, take_parameter
from dockerproxy.registry.doors import refuse
from dockerproxy.registry.face import Face
from dockerproxy.registry.guard import TOKEN_PATH, Guard
from dockerproxy.registry.hosted import Hosted


@define
class Own:
    """Answers requests to `/v2/` for the hosted registry. Another `guard` may be set, for the requests to come."""

    face: Face
    hosted: Hosted
    guard: Guard

    async def answer(self, request: Request) -> None:
        """Answer `request`."""
        target: Target | None = None
        try:
            if request.path == TOKEN_PATH and await self.guard.token(request):
                return
            target = route(request.path)
            await self.guard.check(request, target)
            await self.face.answer(request, target, self.hosted)
        except RegistryError as error:
            challenge = [field for field in error.headers if field[0] == "WWW-Authenticate"]
            if error.status == 401 and not challenge:
                challenge = self.guard.challenge(request, target)
            refuse(request, error, challenge)


@frozen
class ByNamespace:
    """Answers requests to `/v2/`: `?ns=HOST` asks for a mirror of that registry, unless HOST is one of `own_names`.

    A client that reaches us by another name or an address says `ns` for our own registry as well. Without it the door's
    own `otherwise` answers.
    """

    own: Handler
    mirror: Handler
    own_names: frozenset[str]
    otherwise: Handler

    async def answer(self, request: Request) -> None:
        """Answer `request`."""
        try:
            namespace, rest = take_parameter(request.query, "ns")
            ours = namespace is not None and Host.parse(namespace).name in self.own_names
        except NameInvalid:
            ours = False
        except RegistryError as error:
            refuse(request, error, [])
            return
        if ours:
            request.query = rest
            await self.own(request)
        elif namespace is not None:
            await self.mirror(request)
        else:
            await self.otherwise(request)
