"""The choice of a registry by `?ns=`, for requests to `/v2/` of this server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import frozen

from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.oci.routes import pop_parameter
from dockerproxy.registry.hosted_app import HostedRegistryApp
from dockerproxy.registry.responses import respond_error

MirrorHandler = Callable[[Request, Host | None], Awaitable[None]]
"""Responds to a request for an upstream registry, or for the default one; see `Mirror.handle`."""


@frozen
class NamespacedRegistries:
    """The registry that `?ns=HOST` names: the hosted one for one of `hosted_names`, else the mirror of an upstream one.

    A client that reaches us by another name or by address sends `ns` for our own registry as well. A request without
    `ns` is for the mirror if `mirror_by_default` is true, else for the hosted registry.
    """

    hosted: HostedRegistryApp
    mirror: MirrorHandler
    hosted_names: frozenset[str]
    mirror_by_default: bool

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        request.error_renderer = respond_error
        text, request.query = pop_parameter(request.query, "ns")
        namespace = None if text is None else Host.parse(text)
        is_mirrored = self.mirror_by_default if namespace is None else namespace.name not in self.hosted_names
        return self.mirror(request, namespace) if is_mirrored else self.hosted.handle(request)
