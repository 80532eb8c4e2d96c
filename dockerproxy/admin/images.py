"""The tags of a repository, and the parts of one of its images, as people look at them. All functions block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen

from dockerproxy.admin.inventory import DiskUsage
from dockerproxy.admin.repository_view import MAX_SHOWN_MANIFEST, RepositoryView
from dockerproxy.admin.resolver import CACHED
from dockerproxy.cache.manifests import is_public_entry
from dockerproxy.errors import DigestInvalid, ManifestInvalid, NameUnknown
from dockerproxy.oci.manifests import INDEX_TYPES, Descriptor, Manifest, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import index_platforms
from dockerproxy.store.links import Visibility
from dockerproxy.store.needs import read_references
from dockerproxy.store.references import References

TAGS_PER_PAGE = 50
"""Tags of one answer."""

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
    """Reads one repository, as `view` shows it."""

    view: RepositoryView
    _read: dict[Digest, References] = field(factory=dict, init=False)
    _objects: int = field(default=0, init=False)  # of all of them

    def tags(self, page: int) -> TagPage:
        """Return a page of the tags, in their order."""
        store = self.view.store
        names = store.links.tags(self.view.key)
        start = (page - 1) * TAGS_PER_PAGE
        if store.kind != CACHED:  # all of them may be seen, so only those that are shown are read
            shown = names[start : start + TAGS_PER_PAGE]
            targets = [target for target in self._targets(shown) if self.view.sees_tag(*target)]
            count = len(names) - (len(shown) - len(targets))
        else:
            visible = [target for target in self._targets(names) if self.view.sees_tag(*target)]
            targets, count = visible[start : start + TAGS_PER_PAGE], len(visible)
        return TagPage(list(store.reader.map(self._describe_tag, targets)), count)

    def manifest(self, digest: Digest) -> dict[str, Any]:
        """Return the parts of a manifest as a JSON value. Raise `NameUnknown` if the viewer may not see it."""
        store = self.view.store
        if not self.view.sees_manifest(digest):
            raise NameUnknown(f"there is no manifest {digest} here")
        media_type = store.links.manifest_media_type(self.view.key, digest)
        content = store.contents.read(digest, MAX_SHOWN_MANIFEST + 1) or b""
        manifest = Manifest(media_type or "")
        if len(content) <= MAX_SHOWN_MANIFEST:
            with suppress(ManifestInvalid):
                manifest = parse_manifest(content, media_type)
        platforms = [
            {"platform": platform, "digest": str(child), "present": self.view.has_manifest(child)}
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
        for tag, digest in self.view.store.links.targets(self.view.key, names):
            if digest is not None:
                yield tag, digest

    def _describe_tag(self, item: tuple[str, Digest]) -> dict[str, Any]:
        (tag, digest), store, key = item, self.view.store, self.view.key
        usage = DiskUsage(store)
        usage.add([digest])
        last_used, is_present = usage.last_used, bool(usage.sizes)
        pending, reached = [digest], {digest}
        while pending:
            references = self._references(pending.pop())
            usage.add(filter(self.view.sees_content, references.objects))
            pending.extend(child for child in references.manifests if child not in reached)
            reached.update(references.manifests)
        visibility = store.links.manifest_visibility(key, digest)
        return {
            "tag": tag,
            "digest": str(digest),
            "media_type": store.links.manifest_media_type(key, digest),
            "present": is_present,
            "platforms": self.view.platforms(digest),
            "size": sum(usage.sizes.values()),
            "last_used": last_used,
            "private": visibility is Visibility.PRIVATE,
            "checked": self._checked_at(tag) if store.kind == CACHED else None,
        }

    def _references(self, digest: Digest) -> References:
        known = self._read.get(digest)
        if known is None:
            known, store = References(), self.view.store
            has_room = len(self._read) < _MAX_MANIFESTS and self._objects < _MAX_OBJECTS
            if has_room and self.view.sees_manifest(digest):
                known = read_references(store.contents, store.links, self.view.key, digest, MAX_SHOWN_MANIFEST)
            self._read[digest] = known
            self._objects += len(known.objects)
        return known

    def _checked_at(self, tag: str) -> float | None:
        """Return when upstream was last asked for the tag (POSIX time); None if that is not known."""
        entries = (self.view.records.get("tag", self.view.key, tag) or {}).items()
        seen = [entry for name, entry in entries if self.view.sees_all or is_public_entry(name)]
        times = [entry.get("checked") for entry in seen if isinstance(entry, dict)]
        return max((float(moment) for moment in times if isinstance(moment, int | float)), default=None)

    def _describe_layer(self, layer: Descriptor) -> dict[str, Any]:
        # A blob of another repository does not count: its presence here is not this repository's to tell.
        present = self.view.sees_layer(layer.digest) and self.view.store.contents.exists(layer.digest)
        return {"digest": str(layer.digest), "size": layer.size, "present": present}


def parse_digest(text: str) -> Digest:
    """Return the digest, or raise `NameUnknown`: nothing has that name."""
    try:
        return Digest.parse(text)
    except DigestInvalid:
        raise NameUnknown(f"{text[:150]!r} is no digest") from None


def _short_texts(annotations: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in list(annotations.items())[:_MAX_ANNOTATIONS]:
        yield key[:_MAX_TEXT], value[:_MAX_TEXT]
