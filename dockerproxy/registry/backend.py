"""The interface between the HTTP API and a registry: the hosted one, or the cache of an upstream one."""

from __future__ import annotations

from typing import Protocol

from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.routes import Target


class RegistryBackend(Protocol):
    """A registry as one client sees it. Methods raise `RegistryError` if they cannot or must not serve a request."""

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        """Return a manifest for the Accept fields `accept`. If `head` is true, the content may be left out."""

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        """Return a blob. If `head` is true, the content may be left out."""

    async def handle(self, request: Request, target: Target) -> None:
        """Respond to any other request: the ping, lists, referrers, uploads and deletions."""
