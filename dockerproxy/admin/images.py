"""The tags of a repository, and the parts of one of its images, as people look at them. All functions block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen

from dockerproxy.admin.inventory import DiskUsage
from dockerproxy.admin.resolver import CACHED, StoreView
from dockerproxy.admin.viewer import Viewer
from dockerproxy.cache.manifests import is_public_entry
from dockerproxy.errors import DigestInvalid, ManifestInvalid, NameUnknown
from dockerproxy.oci.manifests import INDEX_TYPES, Descriptor, Manifest, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import index_platforms
from dockerproxy.store.links import Visibility
from dockerproxy.store.needs import read_references
from dockerproxy.store.platforms import manifest_platforms
from dockerproxy.store.records import Records
from dockerproxy.store.references import References
from dockerproxy.store.tree_reader import read_small

TAGS_PER_PAGE = 50
"""Tags of one answer."""

MAX_SHOWN_MANIFEST = 256 * 1024
"""Bytes of a manifest that is read to show it. A longer one would keep requests waiting while it is parsed."""

_MAX_PARTS = 200  # layers or platforms of one answer
_MAX_MANIFESTS = 2000  # that are read for one answer; the sizes of tags lack the others
_MAX_OBJECTS = 20_000  # that these may refer to: with 0.2 KiB each, any client may have pulled millions into the cache
_MAX_ANNOTATIONS = 50
_MAX_TEXT = 300  # characters of one


@frozen
class TagPage:
    """Some tags of a repository as JSON values, and how many the viewer may see in all."""

    tags: list[dict[str, Any]]
    count: int


@define(eq=False)
class ImageReader:
    """Reads one repository of `store` for a viewer that may see the repository itself.

    A repository that the public may read can have private content. Only viewers that may read that see it.
    """

    store: StoreView
    repository: str
    records: Records
    viewer: Viewer
    _read: dict[Digest, References] = field(factory=dict, init=False)
    _objects: int = field(default=0, init=False)  # of all of them

    def tags(self, page: int) -> TagPage:
        """Return a page of the tags, in their order."""
        names = self.store.links.tags(self.repository)
        visible = [(tag, digest) for tag, digest in self._targets(names) if self._may_see_tag(tag, digest)]
        start = (page - 1) * TAGS_PER_PAGE
        rows = [self._describe_tag(tag, digest) for tag, digest in visible[start : start + TAGS_PER_PAGE]]
        return TagPage(rows, len(visible))

    def manifest(self, digest: Digest) -> dict[str, Any]:
        """Return the parts of a manifest as a JSON value. Raise `NameUnknown` if the viewer may not see it."""
        if not self._may_see(digest):
            raise NameUnknown(f"there is no manifest {digest} here")
        media_type = self.store.links.manifest_media_type(self.repository, digest)
        content = read_small(self.store.layout.blob(digest), MAX_SHOWN_MANIFEST + 1) or b""
        manifest = Manifest(media_type or "")
        if len(content) <= MAX_SHOWN_MANIFEST:
            with suppress(ManifestInvalid):
                manifest = parse_manifest(content, media_type)
        platforms = [
            {"platform": platform, "digest": str(child), "present": has_manifest(self.store, self.repository, child)}
            for child, platform in (index_platforms(content) if manifest.media_type in INDEX_TYPES else {}).items()
        ]
        return {
            "digest": str(digest),
            "media_type": manifest.media_type,
            "present": bool(content),
            "artifact_type": manifest.artifact_type,
            "platforms": platforms[:_MAX_PARTS],
            "config": None if manifest.config is None else str(manifest.config.digest),
            "layers": [self._describe_layer(layer) for layer in manifest.layers[:_MAX_PARTS]],
            "annotations": dict(_short_texts(manifest.annotations)),
        }

    def _targets(self, names: list[str]) -> Iterator[tuple[str, Digest]]:
        for tag in names:
            digest = self.store.links.tag(self.repository, tag)
            if digest is not None:
                yield tag, digest

    def _may_see(self, digest: Digest) -> bool:
        visibility = self.store.links.manifest_visibility(self.repository, digest)
        return visibility is Visibility.PUBLIC or (visibility is not None and self._sees_all)

    def _may_see_tag(self, tag: str, digest: Digest) -> bool:
        if not self._may_see(digest):
            return False
        # Upstream may have named a public manifest by this tag to a client with a credential only.
        entries = self.records.get("tag", self.repository, tag) or {}
        return self._sees_all or any(is_public_entry(name) for name in entries)

    @property
    def _sees_all(self) -> bool:
        return self.viewer.is_admin or self.store.kind != CACHED

    def _describe_tag(self, tag: str, digest: Digest) -> dict[str, Any]:
        usage = DiskUsage(self.store)
        usage.add([digest])
        last_used, is_present = usage.last_used, bool(usage.sizes)
        pending, reached = [digest], {digest}
        while pending:
            references = self._references(pending.pop())
            usage.add(references.objects)
            pending.extend(child for child in references.manifests if child not in reached)
            reached.update(references.manifests)
        visibility = self.store.links.manifest_visibility(self.repository, digest)
        return {
            "tag": tag,
            "digest": str(digest),
            "media_type": self.store.links.manifest_media_type(self.repository, digest),
            "present": is_present,
            "platforms": present_platforms(self.store, self.repository, digest),
            "size": sum(usage.sizes.values()),
            "last_used": last_used,
            "private": visibility is Visibility.PRIVATE,
            "checked": self._checked_at(tag) if self.store.kind == CACHED else None,
        }

    def _references(self, digest: Digest) -> References:
        known = self._read.get(digest)
        if known is None:
            known = References()
            has_room = len(self._read) < _MAX_MANIFESTS and self._objects < _MAX_OBJECTS
            if has_room and self.store.links.has_manifest(self.repository, digest):
                known = read_references(
                    self.store.layout, self.store.links, self.repository, digest, MAX_SHOWN_MANIFEST
                )
            self._read[digest] = known
            self._objects += len(known.objects)
        return known

    def _checked_at(self, tag: str) -> float | None:
        """Return when upstream was last asked for the tag (POSIX time); None if that is not known."""
        entries = (self.records.get("tag", self.repository, tag) or {}).values()
        times = [entry.get("checked") for entry in entries if isinstance(entry, dict)]
        return max((float(moment) for moment in times if isinstance(moment, int | float)), default=None)

    def _describe_layer(self, layer: Descriptor) -> dict[str, Any]:
        # A blob of another repository does not count: its presence here is not this repository's to tell.
        linked = self.store.links.has_layer(self.repository, layer.digest)
        present = linked and self.store.blobs.exists(layer.digest)
        return {"digest": str(layer.digest), "size": layer.size, "present": present}


def has_manifest(store: StoreView, repository: str, digest: Digest) -> bool:
    """Return whether a repository has a manifest whose content is here."""
    return store.links.has_manifest(repository, digest) and store.blobs.exists(digest)


def present_platforms(store: StoreView, repository: str, digest: Digest) -> list[str]:
    """Return the platforms of an image or index, of an index only those whose manifests are here."""
    media_type = store.links.manifest_media_type(repository, digest)
    if (store.blobs.size(digest) or 0) > MAX_SHOWN_MANIFEST:
        return []
    if media_type not in INDEX_TYPES:
        return list(manifest_platforms(store.layout, digest, media_type))
    children = index_platforms(read_small(store.layout.blob(digest), MAX_SHOWN_MANIFEST) or b"")
    present = (platform for child, platform in children.items() if has_manifest(store, repository, child))
    return list(dict.fromkeys(present))


def parse_digest(text: str) -> Digest:
    """Return the digest, or raise `NameUnknown`: nothing has that name."""
    try:
        return Digest.parse(text)
    except DigestInvalid:
        raise NameUnknown(f"{text[:150]!r} is no digest") from None


def _short_texts(annotations: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in list(annotations.items())[:_MAX_ANNOTATIONS]:
        yield key[:_MAX_TEXT], value[:_MAX_TEXT]
