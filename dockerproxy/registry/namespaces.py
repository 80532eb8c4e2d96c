"""The choice of a registry by `?ns=` or by the path, for requests to `/v2/` of this server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container

from attrs import define, field, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.errors import DigestInvalid, NameInvalid, NameUnknown, RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host, Repository
from dockerproxy.oci.routes import pop_parameter, route_hosted, split_registry, unescape_slashes
from dockerproxy.registry.hosted_app import HostedRegistryApp
from dockerproxy.registry.responses import respond_error
from dockerproxy.registry.upstream import Namespace

MirrorHandler = Callable[[Request, Namespace | None], Awaitable[None]]
"""Responds to a request for an upstream registry, or for the default one; see `Mirror.handle`."""


_MAX_NAMES = 10_000
_NAME_TTL = 60.0  # seconds for which an answer counts

HasRepository = Callable[[Repository], Awaitable[bool]]
"""Returns whether the hosted registry has a repository."""


@define(eq=False)
class KnownNames:
    """The answers of `_has_repository`, which asks another machine. `_now` returns seconds.

    Each pull of `/v2/HOST/NAME` needs one. A storage that does not answer must not end those of mirrored images, so
    the last answer counts then.
    """

    _has_repository: HasRepository
    _now: Callable[[], float]
    _recent: BoundedDict[Repository, bool] = field(init=False)
    _last: BoundedDict[Repository, bool] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._recent = BoundedDict(_MAX_NAMES, ttl=_NAME_TTL, clock=self._now)
        self._last = BoundedDict(_MAX_NAMES)

    async def has_repository(self, repository: Repository) -> bool:
        """Return the answer of the last minute, or of the last time. Raise `RegistryError` if there is none."""
        known = self._recent.get(repository)
        if known is None:
            try:
                known = await self._has_repository(repository)
            except RegistryError:
                known = self._last.get(repository)
                if known is None:
                    raise
            self._recent[repository] = self._last[repository] = known
        return known


@frozen
class NamespacedRegistries:
    """The registry that `?ns=HOST` or `/v2/HOST/…` names.

    `?ns=` names the hosted registry by one of `hosted_names`, else the mirror of an upstream one. A client that reaches
    us by another name or by address sends `ns` for our own registry as well.

    A request without `ns` is for the mirror if `mirror_by_default` is true, else for the hosted registry.

    At the mirror, a first component of the path that is written like a host names the upstream registry. At the hosted
    registry, it does if it is one of `mirrored` and the hosted registry has no such repository (`has_repository`).
    Nobody can push one there, so that no user can put an image in the place of an upstream one.
    """

    hosted: HostedRegistryApp
    mirror: MirrorHandler
    hosted_names: Container[str]
    mirrored: Container[Host]
    has_repository: HasRepository
    mirror_by_default: bool

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        request.error_renderer = respond_error
        text, request.query = pop_parameter(request.query, "ns")
        namespace = None if text is None else Namespace(Host.parse(text))
        if namespace is None and self.mirror_by_default:
            name, request.path = split_registry(request.path)
            return self.mirror(request, None if name is None else Namespace(Host.parse(name), in_path=True))
        if namespace is not None and namespace.host.name not in self.hosted_names:
            return self._handle_mirrored(request, namespace)
        return self._handle_hosted(request)

    def _handle_mirrored(self, request: Request, namespace: Namespace) -> Awaitable[None]:
        # containerd and BuildKit send `ns` even if the path of the mirror's URL names the registry.
        name, path = split_registry(request.path)
        if name is not None and _parse_host(name) == namespace.host:
            request.path, namespace = path, Namespace(namespace.host, in_path=True)
        return self.mirror(request, namespace)

    def _handle_hosted(self, request: Request) -> Awaitable[None]:
        name, path = split_registry(unescape_slashes(request.path))
        named_host = None if name is None else _parse_host(name)
        if named_host is None or named_host not in self.mirrored:
            return self.hosted.handle(request)
        return self._handle_shared_name(request, Namespace(named_host, in_path=True), path)

    async def _handle_shared_name(self, request: Request, namespace: Namespace, mirrored_path: str) -> None:
        """Respond to a request for a repository that the hosted registry and `namespace` may both have."""
        if await self._is_hosted(request.path):
            await self.hosted.handle(request)
        else:
            request.path = mirrored_path
            await self.mirror(request, namespace)

    async def _is_hosted(self, path: str) -> bool:
        try:
            repository = route_hosted(path).name
        except (NameInvalid, NameUnknown, DigestInvalid):
            return False
        return bool(repository) and await self.has_repository(repository)


def _parse_host(text: str) -> Host | None:
    try:
        return Host.parse(text)
    except NameInvalid:
        return None
