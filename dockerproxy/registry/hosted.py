"""The hosted registry as a backend of the HTTP API: manifests, blobs, lists and referrers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from attrs import frozen
from twisted.application.internet import TimerService
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.errors import BlobUnknown, ManifestInvalid, ManifestUnknown, NameUnknown, Unsupported
from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import MAX_MANIFEST, OCI_INDEX, media_type_of
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.paging import Page, next_link, take_page
from dockerproxy.oci.referrers import build_index
from dockerproxy.oci.routes import Kind, Target, parse_query
from dockerproxy.registry.push import PushHandler
from dockerproxy.registry.responses import API_VERSION
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.uploads import Uploads

_NO_CACHE_STATUS = "-"  # hosted content does not come from a cache

_MAX_ENTRIES = 10_000  # per response; its Link leads to the rest
_MAX_REFERRERS_SIZE = 3 * 1024 * 1024  # bytes of descriptors per index: clients read 4 MiB of a manifest

_JSON_FIELDS = [("Content-Type", "application/json"), API_VERSION]

_ALLOWED_METHODS = {
    Kind.BASE: "GET, HEAD",
    Kind.CATALOG: "GET, HEAD",
    Kind.TAGS: "GET, HEAD",
    Kind.REFERRERS: "GET, HEAD",
    Kind.MANIFEST: "GET, HEAD, PUT, DELETE",
    Kind.BLOB: "GET, HEAD, DELETE",
    Kind.UPLOADS: "POST",
    Kind.UPLOAD: "GET, HEAD, PATCH, PUT, DELETE",
}


_PURGE_INTERVAL = 3600.0  # seconds between two searches for stale upload sessions
_STALE_UPLOAD_AGE = 86400.0  # seconds without a byte after which a session is stale

log = Logger()


def upload_purge_service(reactor: Any, uploads: Uploads, clock: Callable[[], float]) -> TimerService:
    """Return the service that removes stale upload sessions at start-up and then hourly. `clock` returns POSIX time."""

    async def purge() -> None:
        count = await in_thread(reactor, uploads.purge, clock() - _STALE_UPLOAD_AGE)
        if count:
            log.info("removed {count} stale upload sessions", count=count)

    timer = TimerService(_PURGE_INTERVAL, lambda: spawn(purge(), "removing stale upload sessions"))  # type: ignore[no-untyped-call]
    timer.clock = reactor
    return timer


@frozen
class HostedRegistry:
    """A `RegistryBackend` over a `HostedTree`. `AccessControl` has already checked the client's permission."""

    reactor: Any
    store: HostedTree
    push: PushHandler

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        # Accept is ignored, as the spec allows: a tag refers to exactly one manifest.
        links = self.store.links
        digest = reference if isinstance(reference, Digest) else links.tag(name, reference)
        # Touch the blob first, and check the link afterwards: gc removes a link only if nobody used its blob recently.
        size = None if digest is None else self.store.blobs.touch(digest)
        if digest is None or size is None or not links.has_manifest(name, digest):
            self._check_repository(name)
            raise ManifestUnknown(f"{name} has no manifest {reference}")
        media_type = links.manifest_media_type(name, digest)
        if head and media_type is not None:
            return ManifestResponse(digest, media_type, size, None, _NO_CACHE_STATUS)
        content = await self._read_manifest(digest)
        if content is None:
            raise ManifestUnknown(f"{name} has no manifest {reference}")
        if media_type is None:
            media_type = _detect_media_type(content)
        return ManifestResponse(digest, media_type, len(content), content, _NO_CACHE_STATUS)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        size = self.store.blobs.touch(digest)
        is_linked = size is not None and self.store.links.has_layer(name, digest)
        if is_linked and head:
            return BlobResponse(digest, size, None, _NO_CACHE_STATUS)
        blob = self.store.blobs.open(digest) if is_linked else None
        if blob is None:
            self._check_repository(name)
            raise BlobUnknown(f"{name} has no blob {digest}")
        return BlobResponse(digest, blob.size, StoredBlobReader(self.reactor, blob), _NO_CACHE_STATUS)

    async def handle(self, request: Request, target: Target) -> None:
        """Respond to the ping, lists and referrers. Pass requests that write to `push`."""
        name, reference = target.name, target.reference
        is_read = request.method in ("GET", "HEAD")
        match target.kind:
            case Kind.BASE if is_read:
                request.respond(200, _JSON_FIELDS, b"{}")
            case Kind.CATALOG if is_read:
                await self._catalog(request)
            case Kind.TAGS if is_read and name is not None:
                await self._tags(request, name)
            case Kind.REFERRERS if is_read and name is not None and isinstance(reference, Digest):
                await self._referrers(request, name, reference)
            case _ if not await self.push.handle(request, target):
                allowed = _ALLOWED_METHODS[target.kind]
                raise Unsupported(
                    f"{request.method} is not supported here; supported: {allowed}", headers=[("Allow", allowed)]
                )

    def _check_repository(self, name: Repository) -> None:
        if not self.store.links.has_repository(name):
            raise NameUnknown(f"there is no repository {name}")

    async def _read_manifest(self, digest: Digest) -> bytes | None:
        blob = self.store.blobs.open(digest)
        if blob is None:
            return None
        with blob:
            content = blob.read(0, blob.size) if blob.size <= MAX_MANIFEST else None
            if content is None or len(content) != blob.size:
                return await in_thread(self.reactor, blob.read_blocking, 0, blob.size)
        return bytes(content)

    async def _tags(self, request: Request, name: Repository) -> None:
        page = Page.parse(request.query, _MAX_ENTRIES)
        self._check_repository(name)
        tags, more = await in_thread(self.reactor, self._list_tags, name, page)
        fields = list(_JSON_FIELDS)
        if more:
            fields.append(next_link(f"/v2/{name}/tags/list", {"n": str(len(tags)), "last": tags[-1]}))
        request.respond(200, fields, json.dumps({"name": name, "tags": tags}).encode())

    async def _catalog(self, request: Request) -> None:
        page = Page.parse(request.query, _MAX_ENTRIES)
        names, more = await in_thread(self.reactor, self._list_repositories, page)
        fields = list(_JSON_FIELDS)
        if more:
            fields.append(next_link("/v2/_catalog", {"n": str(len(names)), "last": names[-1]}))
        request.respond(200, fields, json.dumps({"repositories": names}).encode())

    def _list_tags(self, name: Repository, page: Page) -> tuple[list[str], bool]:
        return take_page(self.store.links.tags_after(name, page.last), page.limit)

    def _list_repositories(self, page: Page) -> tuple[list[str], bool]:
        """Return one page of the repositories that have manifests. Blocks.

        A repository is left out if all its manifests were deleted, although its blobs stay until gc runs.
        """
        links = self.store.links
        names = (name for name in links.repositories_after(page.last) if next(links.manifests(name), None) is not None)
        return take_page(names, page.limit)

    async def _referrers(self, request: Request, name: Repository, subject: Digest) -> None:
        parameters = dict(parse_query(request.query))
        artifact_type, after = parameters.get("artifactType"), parameters.get("last")
        # A 404 would tell clients that there is no referrers API, so an unknown repository has an empty index.
        if self.store.links.has_repository(name) and not self.store.referrers.is_complete(name):
            async with self.store.locks.hold(name):
                await in_thread(self.reactor, self.store.referrers.index_missing, name)
        descriptors, last = await in_thread(self.reactor, self._list_referrers, name, subject, artifact_type, after)
        fields = [("Content-Type", OCI_INDEX), API_VERSION]
        filter_parameters = {}
        if artifact_type is not None:
            fields.append(("OCI-Filters-Applied", "artifactType"))
            filter_parameters = {"artifactType": artifact_type}
        if last is not None:
            fields.append(next_link(f"/v2/{name}/referrers/{subject}", {**filter_parameters, "last": last}))
        request.respond(200, fields, build_index(descriptors))

    def _list_referrers(
        self, name: Repository, subject: Digest, artifact_type: str | None, after: str | None
    ) -> tuple[list[bytes], str | None]:
        """Return the descriptors of one page, and the name of its last entry if more follow. Blocks."""
        descriptors: list[bytes] = []
        size, last = 0, None
        for entry, content in self.store.referrers.list(name, subject, after):
            if artifact_type is not None and json.loads(content).get("artifactType") != artifact_type:
                continue
            size += len(content)
            if descriptors and size > _MAX_REFERRERS_SIZE:
                return descriptors, last
            descriptors.append(content)
            last = entry
        return descriptors, None


def _detect_media_type(content: bytes) -> str:
    """Return the media type of a manifest that another registry stored, from its content."""
    try:
        return media_type_of(content)
    except ManifestInvalid:
        return "application/octet-stream"
