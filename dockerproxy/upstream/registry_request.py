"""A request to a registry, as the cache and the pass-through make it."""

from __future__ import annotations

from attrs import field, frozen
from twisted.web.iweb import IBodyProducer

from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Registry, Repository
from dockerproxy.upstream.credentials import Credential

_NO_HEADERS = Headers()


@frozen
class RegistryRequest:
    """A request to `registry`. `path` includes the query.

    Authorization for `actions` (``pull`` or ``pull,push``) on the repository `name`, or for the catalog if it is None,
    is added according to `credential`, and replaces the one in `headers`. If `follow` is true, redirects of GET and
    HEAD are followed.
    """

    method: str
    registry: Registry
    path: str
    name: Repository | None = field(kw_only=True)
    credential: Credential = field(kw_only=True)
    headers: Headers = field(default=_NO_HEADERS, kw_only=True)
    body: IBodyProducer | None = field(default=None, kw_only=True)
    actions: str = field(default="pull", kw_only=True)
    follow: bool = field(default=True, kw_only=True)

    @property
    def follows_redirects(self) -> bool:
        return self.follow and self.method in ("GET", "HEAD")
