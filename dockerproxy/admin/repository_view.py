"""A repository as a viewer sees it: all of its content, or only the content that upstream has sent to everybody.

A repository that the public may read can have private content: other tags, other platforms, other layers. Nobody may
find out by any figure that it is here.
"""

from __future__ import annotations

from attrs import frozen

from dockerproxy.admin.resolver import CACHED, StoreView
from dockerproxy.admin.viewer import Viewer
from dockerproxy.cache.manifests import is_public_entry
from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.docker_hub import stored_name
from dockerproxy.oci.manifests import INDEX_TYPES
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import index_platforms
from dockerproxy.store.links import Visibility
from dockerproxy.store.platforms import manifest_platforms
from dockerproxy.store.records import Records

MAX_SHOWN_MANIFEST = 256 * 1024
"""Bytes of a manifest that is read to show it. A longer one would keep requests waiting while it is parsed."""


@frozen
class RepositoryView:
    """The repository `key` of `store` for somebody who may read its name. All methods block."""

    store: StoreView
    key: str
    records: Records
    sees_all: bool

    @classmethod
    def of(cls, viewer: Viewer, store: StoreView, key: str, records: Records) -> RepositoryView:
        """Return the repository as `viewer` sees it."""
        return cls(store, key, records, viewer.is_admin or store.kind != CACHED)

    def sees_manifest(self, digest: Digest) -> bool:
        """Return whether the repository has the manifest, as far as the viewer may know it."""
        return self._is_seen(self.store.links.manifest_visibility(self.key, digest))

    def sees_layer(self, digest: Digest) -> bool:
        """Return whether the repository has the blob, as far as the viewer may know it."""
        return self._is_seen(self.store.links.layer_visibility(self.key, digest))

    def sees_content(self, digest: Digest) -> bool:
        """Return whether the viewer may know if a blob or manifest, to which a manifest refers, is here.

        A manifest may name any digest, also one that only another repository has.
        """
        return self.sees_all or self.sees_layer(digest) or self.sees_manifest(digest)

    def sees_tag(self, tag: str, digest: Digest) -> bool:
        """Return whether the viewer may know the tag, which leads to `digest`."""
        if not self.sees_manifest(digest):
            return False
        # Upstream may have named a public manifest by this tag to a client with a credential only.
        return self.sees_all or any(map(is_public_entry, self.records.peek("tag", self.key, tag) or {}))

    def sees_reference(self, reference: str) -> bool:
        """Return whether the viewer may know the tag or digest `reference`. Raise `NameInvalid` or `DigestInvalid`."""
        if ":" in reference:
            return self.sees_manifest(Digest.parse(reference))
        digest = self.store.links.tag(self.key, reference)
        return digest is not None and self.sees_tag(reference, digest)

    def has_manifest(self, digest: Digest) -> bool:
        """Return whether the content of the manifest is here, as far as the viewer may know it."""
        return self.sees_manifest(digest) and self.store.contents.exists(digest)

    def platforms(self, digest: Digest) -> list[str]:
        """Return the platforms of an image or index, of an index only those whose manifests are here."""
        media_type = self.store.links.manifest_media_type(self.key, digest)
        if (self.store.contents.size(digest) or 0) > MAX_SHOWN_MANIFEST:
            return []
        if media_type not in INDEX_TYPES and self.sees_all:
            return list(self.store.platforms.read(digest, lambda: media_type))
        if media_type not in INDEX_TYPES:
            return list(manifest_platforms(self.store.contents, digest, media_type, self.sees_content))
        children = index_platforms(self.store.contents.read(digest, MAX_SHOWN_MANIFEST) or b"")
        present = (platform for child, platform in children.items() if self.has_manifest(child))
        return list(dict.fromkeys(present))

    def _is_seen(self, visibility: Visibility | None) -> bool:
        return visibility is Visibility.PUBLIC or (visibility is not None and self.sees_all)


def everybody_sees(store: StoreView, records: Records, name: str, reference: str) -> bool:
    """Return whether upstream has sent the tag or digest of a cached repository to everybody. Blocks.

    `name` is the name of the repository as people write it.
    """
    key = stored_name(name)
    try:
        return key is not None and RepositoryView(store, key, records, sees_all=False).sees_reference(reference)
    except (NameInvalid, DigestInvalid):
        return False
