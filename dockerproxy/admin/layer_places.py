"""The image that a blob is a part of, to describe a download: "layer 3 of 7 of 2.9-cuda13, linux/amd64".

A download knows its repository and digest only. A client fetches the manifest before its layers, so the place is in one
of the last manifests of the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import nlargest
from itertools import islice
from typing import Any

from attrs import define, evolve, frozen

from dockerproxy.admin.repository_view import MAX_SHOWN_MANIFEST
from dockerproxy.admin.resolver import StoreView
from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.manifests import is_public_entry
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import INDEX_TYPES, Manifest, fallback_base, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import index_platforms
from dockerproxy.store.links import Visibility
from dockerproxy.store.records import Records
from dockerproxy.store.tree_reader import UnsafeFile, read_small

_MAX_MANIFESTS = 50  # of a repository that are read, those that were used last
_MAX_TAGS = 1000  # of a repository that are read
_MAX_KEPT = 1000  # places
_KEPT = 30.0  # seconds
_MAX_READ = (
    4 * 1024 * 1024
)  # bytes of manifests that are parsed in that time; they take 20 MiB, and usual ones have 2 KiB

BlobKey = tuple[str, Digest]
"""The key of a cached repository, and the digest of a blob."""


@frozen
class LayerPlace:
    """The place of a blob: layer number `layer` of `layers`, or the config if that is None.

    `platform` and `tag` are None if they are not known. `is_public` and `tag_is_public` say whether upstream has sent
    the manifest, and its tag, to a client without a credential.
    """

    layer: int | None = None
    layers: int | None = None
    platform: str | None = None
    tag: str | None = None
    is_public: bool = False
    tag_is_public: bool = False

    def seen_by(self, *, is_admin: bool) -> LayerPlace:
        """Return the place without the things that only an administrator may see."""
        if is_admin:
            return self
        if not self.is_public:
            return UNKNOWN_PLACE
        return self if self.tag_is_public else evolve(self, tag=None)


UNKNOWN_PLACE = LayerPlace()


@define(eq=False)
class _ReadAllowance:
    """The bytes of manifests that may be read in `_KEPT` seconds of `clock`.

    Clients choose the images that they download. Many that have large manifests would keep a processor busy.
    """

    _clock: Callable[[], float]
    _since: float = 0.0
    _used: int = 0

    @property
    def is_used_up(self) -> bool:
        now = self._clock()
        if not self._used or now - self._since >= _KEPT:
            self._since, self._used = now, 0
        return self._used >= _MAX_READ

    def take(self, size: int) -> None:
        self._used += size


class LayerPlaces:
    """Finds places in the cache `store` in a thread, and remembers them for a moment."""

    def __init__(self, reactor: Any, store: StoreView, records: Records, clock: Callable[[], float]) -> None:
        self._reactor = reactor
        self._store = store
        self._records = records
        self._known: BoundedDict[BlobKey, LayerPlace] = BoundedDict(_MAX_KEPT, ttl=_KEPT, clock=clock)
        self._allowance = _ReadAllowance(clock)

    def known(self, blob: BlobKey) -> LayerPlace:
        """Return the place of a blob if it was found a moment ago."""
        return self._known.get(blob) or UNKNOWN_PLACE

    async def find(self, blobs: Iterable[BlobKey]) -> None:
        """Find the places of blobs, so that they are `known`."""
        missing = [blob for blob in blobs if self._known.get(blob) is None]
        if missing:
            for blob, place in (await in_thread(self._reactor, self._find_all, missing)).items():
                self._known[blob] = place

    def _find_all(self, blobs: Iterable[BlobKey]) -> Mapping[BlobKey, LayerPlace]:
        by_repository: dict[str, list[Digest]] = {}
        for repository, digest in blobs:
            by_repository.setdefault(repository, []).append(digest)
        found = {}
        for repository, digests in by_repository.items():
            images = _Images.read(self._store, self._records, repository, self._allowance)
            for digest in digests:
                found[repository, digest] = images.find_place(digest)
        return found


@frozen
class _Images:
    """The manifests of a repository that were used last, in that order. `owners` are the indexes of manifests."""

    store: StoreView
    records: Records
    repository: str
    manifests: Mapping[Digest, Manifest]
    platforms: Mapping[Digest, str]
    owners: Mapping[Digest, Digest]

    @classmethod
    def read(cls, store: StoreView, records: Records, repository: str, allowance: _ReadAllowance) -> _Images:
        """Read as many as `allowance` has. Blocks."""
        entries = [] if allowance.is_used_up else store.links.manifest_entries(repository)
        manifests: dict[Digest, Manifest] = {}
        platforms: dict[Digest, str] = {}
        owners: dict[Digest, Digest] = {}
        for entry in nlargest(_MAX_MANIFESTS, entries, key=lambda entry: entry.last_used):
            if entry.digest is None or allowance.is_used_up:
                continue
            try:
                content = read_small(store.layout.blob(entry.digest), MAX_SHOWN_MANIFEST + 1) or b""
                allowance.take(len(content))
                if len(content) > MAX_SHOWN_MANIFEST:
                    continue
                manifest = parse_manifest(content, store.links.manifest_media_type(repository, entry.digest))
            except (ManifestInvalid, UnsafeFile):
                continue
            if manifest.media_type in INDEX_TYPES:
                listed = index_platforms(content)
                platforms.update(listed)
                owners.update(dict.fromkeys(listed, entry.digest))
            else:
                manifests[entry.digest] = manifest
        return cls(store, records, repository, manifests, platforms, owners)

    def find_place(self, digest: Digest) -> LayerPlace:
        """Return the place of a blob. Blocks."""
        for manifest_digest, manifest in self.manifests.items():
            layers = [layer.digest for layer in manifest.layers]
            if digest in layers:
                return self._describe(manifest_digest, LayerPlace(layers.index(digest) + 1, len(layers)))
            if manifest.config is not None and manifest.config.digest == digest:
                return self._describe(manifest_digest, LayerPlace(None, len(layers)))
        return UNKNOWN_PLACE

    def _describe(self, manifest_digest: Digest, place: LayerPlace) -> LayerPlace:
        store, repository = self.store, self.repository
        is_public = store.links.manifest_visibility(repository, manifest_digest) is Visibility.PUBLIC
        targets = {manifest_digest, self.owners.get(manifest_digest)}
        tag, tag_is_public = _find_tag(store, self.records, repository, targets)
        return evolve(
            place,
            platform=self.platforms.get(manifest_digest),
            tag=tag,
            is_public=is_public,
            tag_is_public=tag_is_public,
        )


def _find_tag(
    store: StoreView, records: Records, repository: str, targets: set[Digest | None]
) -> tuple[str | None, bool]:
    """Return a tag that leads to one of `targets`, a public one if there is one, and whether it is public."""
    found: str | None = None
    for tag, target in islice(store.links.iter_tags(repository), _MAX_TAGS):
        if target is not None and target in targets and not fallback_base(tag):
            entries = records.get("tag", repository, tag) or {}
            if any(map(is_public_entry, entries)):
                return tag, True
            found = tag
    return found, False
