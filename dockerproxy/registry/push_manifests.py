"""Manifest pushes to the hosted registry and deletions: media types, references and tags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen
from twisted.internet.task import deferLater

from dockerproxy.concurrency import in_thread
from dockerproxy.errors import DigestInvalid, ManifestBlobUnknown, ManifestInvalid, ManifestUnknown, SizeInvalid
from dockerproxy.http.request import Request
from dockerproxy.oci.manifests import (
    KNOWN_TYPES,
    MAX_MANIFEST,
    MEDIA_TYPE,
    Manifest,
    is_nondistributable,
    media_type_of,
    parse_manifest,
)
from dockerproxy.oci.names import Digest, Reference, Repository, Tag, parse_tag
from dockerproxy.oci.referrers import Referrer, make_referrer
from dockerproxy.oci.routes import parse_query
from dockerproxy.registry.responses import API_VERSION
from dockerproxy.store.hosted_tree import HostedTree

_BATCH_SIZE = 100  # references that are checked before the reactor runs again
_MAX_MISSING_LISTED = 10  # missing references that an error message lists

_GENERIC_TYPES = ("", "application/json", "application/octet-stream")


@frozen
class ParsedManifest:
    """A parsed push. `manifest` is None if the media type is unknown."""

    content: bytes
    digest: Digest
    media_type: str
    manifest: Manifest | None
    referrer: Referrer | None


@frozen
class ManifestPushHandler:
    """Handles PUT and DELETE of manifests."""

    reactor: Any
    store: HostedTree

    async def put(self, request: Request, name: Repository, reference: Reference) -> None:
        """Store a manifest under a digest or a tag."""
        tags = _tags(request, reference)
        try:
            content = await request.read_all(MAX_MANIFEST)
        except SizeInvalid:
            raise SizeInvalid(f"the manifest is longer than {MAX_MANIFEST} bytes") from None
        expected_digest = reference if isinstance(reference, Digest) else None
        media_type = (request.headers.get("content-type") or "").partition(";")[0].strip()
        parsed = await in_thread(self.reactor, parse_pushed, content, expected_digest, media_type)
        if parsed.manifest is not None:
            await self._check_references(name, parsed.manifest)
        async with self.store.locks.hold(name):
            await in_thread(self.reactor, self._commit, name, parsed, tags)
        fields = [
            API_VERSION,
            ("Location", f"/v2/{name}/manifests/{parsed.digest}"),
            ("Docker-Content-Digest", str(parsed.digest)),
        ]
        if parsed.referrer is not None:
            fields.append(("OCI-Subject", str(parsed.referrer.subject)))
        if expected_digest is not None and tags:
            fields.append(("OCI-Tag", ", ".join(tags)))
        request.respond(201, fields)

    async def delete(self, request: Request, name: Repository, reference: Reference) -> None:
        """Remove a tag, or a manifest with its tags."""
        async with self.store.locks.hold(name):
            if isinstance(reference, Digest):
                removed = await in_thread(self.reactor, self.store.remove_manifest, name, reference)
            else:
                removed = await in_thread(self.reactor, self.store.links.remove_tag, name, reference)
        if not removed:
            raise ManifestUnknown(f"{name} has no manifest {reference}")
        request.respond(202, [API_VERSION])

    def _commit(self, name: Repository, parsed: ParsedManifest, tags: list[Tag]) -> None:
        self.store.blobs.put(parsed.content, parsed.digest)
        self.store.link_manifest(name, parsed.digest, parsed.media_type, parsed.referrer, tags)

    async def _check_references(self, name: Repository, manifest: Manifest) -> None:
        """Raise `ManifestBlobUnknown` if `name` lacks a reference of `manifest`. Touch all of them: gc then keeps
        them."""
        missing = []
        for count, (digest, is_manifest) in enumerate(_required_references(manifest), 1):
            if self.store.blobs.touch(digest) is None or not self._is_linked(name, digest, is_manifest):
                missing.append(str(digest))
            if count % _BATCH_SIZE == 0:
                await deferLater(self.reactor, 0)
        if missing:
            more = f" and {len(missing) - _MAX_MISSING_LISTED} more" if len(missing) > _MAX_MISSING_LISTED else ""
            raise ManifestBlobUnknown(
                f"{name} lacks references of the manifest: {', '.join(missing[:_MAX_MISSING_LISTED])}{more}"
            )
        if manifest.subject is not None:
            self.store.blobs.touch(manifest.subject.digest)  # it may be missing; if it exists, gc keeps it

    def _is_linked(self, name: Repository, digest: Digest, is_manifest: bool) -> bool:
        # BuildKit's cache is an index of blobs. A child may therefore be a blob too, as in CNCF distribution.
        links = self.store.links
        return (is_manifest and links.has_manifest(name, digest)) or links.has_layer(name, digest)


def _tags(request: Request, reference: Reference) -> list[Tag]:
    """Return the tags of a pushed manifest: its reference, or the tags in the query if that is a digest."""
    if not isinstance(reference, Digest):
        return [reference]
    tags = [parse_tag(value) for name, value in parse_query(request.query) if name == "tag"]
    return list(dict.fromkeys(tags))


def parse_pushed(content: bytes, expected_digest: Digest | None, declared_type: str) -> ParsedManifest:
    """Return the manifest in `content`, declared to be of `declared_type`. Blocks: it may parse 4 MiB of JSON.

    Raise `DigestInvalid`, or `ManifestInvalid` if the content is not valid for a known type.
    """
    digest = Digest.of(content, "sha256" if expected_digest is None else expected_digest.algorithm)
    if expected_digest is not None and digest != expected_digest:
        raise DigestInvalid(f"the manifest's digest is {digest}, not {expected_digest}")
    if declared_type in _GENERIC_TYPES:
        declared_type = media_type_of(content)
    if not MEDIA_TYPE.fullmatch(declared_type):
        raise ManifestInvalid("the manifest's Content-Type is not a media type")
    try:
        manifest = parse_manifest(content, declared_type)
    except ManifestInvalid:
        if declared_type.lower() in KNOWN_TYPES:
            raise
        return ParsedManifest(content, digest, declared_type, None, None)
    return ParsedManifest(content, digest, declared_type, manifest, make_referrer(manifest, content, digest))


def _required_references(manifest: Manifest) -> Iterator[tuple[Digest, bool]]:
    """Yield each digest that `manifest` needs, and whether that is a manifest. The subject may be pushed later."""
    if manifest.media_type not in KNOWN_TYPES:
        return
    if manifest.config is not None:
        yield manifest.config.digest, False
    for layer in manifest.layers:
        if not is_nondistributable(layer.media_type):
            yield layer.digest, False
    for child in manifest.manifests:
        yield child.digest, True
