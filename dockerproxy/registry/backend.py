"""What the HTTP face asks of whoever answers: a registry hosted here, or the cache of one elsewhere."""

from __future__ import annotations

from typing import Protocol

from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.routes import Target


class RegistryBackend(Protocol):
    """A registry, as one client sees it. Every method raises `RegistryError` for what it cannot or must not give."""

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        """Return a manifest; `accept` are the client's Accept fields. With `head` the content may be left out."""

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        """Return a blob. With `head` the content may be left out."""

    async def handle(self, request: Request, target: Target) -> None:
        """Answer a request that is neither: the ping, lists, referrers, uploads and deletions."""
