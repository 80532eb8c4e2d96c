"""What is on the shelves: repositories, their images, how large they are and when they were last used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from dockerproxy.admin.resolver import CACHED, HOSTED, ImageRef, StoreView
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest
from dockerproxy.store.files import read_small
from dockerproxy.store.references import References, extract_references

Row = dict[str, Any]

_BATCH = 200  # contents that are looked at in one step


def list_repositories(store: StoreView, rows: list[Row]) -> Iterator[None]:
    """Put a row for each repository into `rows`. Blocks, a moment a step."""
    for repository in sorted(store.links.repositories()):
        manifests = list(store.links.manifests(repository))
        tags = len(store.links.tags(repository))
        usage = _DiskUsage(store)
        yield from usage.add(manifests)
        last_used = usage.last_used
        yield from usage.add(store.links.layers(repository))
        # In the cache, links stay when contents are evicted; and of a hosted one only directories may be left.
        if usage.sizes or (store.kind == HOSTED and (tags or manifests)):
            rows.append({
                "where": store.kind,
                "name": repository,
                "tags": tags,
                "manifests": sum(digest in usage.sizes for digest in manifests),
                "size": sum(usage.sizes.values()),
                "last_used": last_used or usage.last_used,
            })  # fmt: skip


def list_manifests(ref: ImageRef, rows: list[Row]) -> Iterator[None]:
    """Put a row for each tag of a repository, then for each manifest without one, into `rows`. Blocks, a moment a step.

    Of a name with a tag or a digest, only for that. `tag` is None for one without.
    """
    store, repository = ref.store, ref.repository
    tagged_digests: set[Digest] = set()
    for tag in store.links.tags(repository):
        digest = store.links.tag(repository, tag)
        if digest is None:
            continue
        tagged_digests.add(digest)
        if ref.tag in (None, tag) and ref.digest in (None, digest):
            yield from _add_row(ref, tag, digest, rows)
    for digest in store.links.manifests(repository):
        if digest not in tagged_digests and ref.tag is None and ref.digest in (None, digest):
            yield from _add_row(ref, None, digest, rows)


def _add_row(ref: ImageRef, tag: str | None, digest: Digest, rows: list[Row]) -> Iterator[None]:
    store = ref.store
    usage = _DiskUsage(store)
    yield from usage.add([digest])
    last_used = usage.last_used
    if not usage.sizes and store.kind == CACHED:
        return  # evicted
    closure = Closure(store, ref.repository)
    yield from closure.reach([digest])
    yield from usage.add(closure.manifests | closure.blobs)
    media_type = store.links.manifest_media_type(ref.repository, digest)
    rows.append({
        "tag": tag,
        "digest": str(digest),
        "media_type": media_type or _media_type_in_content(store, digest),
        "size": sum(usage.sizes.values()),
        "last_used": last_used,
    })  # fmt: skip


def _media_type_in_content(store: StoreView, digest: Digest) -> str | None:
    try:
        return media_type_of(read_small(store.layout.blob(digest), MAX_MANIFEST) or b"")
    except ManifestInvalid:
        return None


class Closure:
    """What manifests lead to, as far as it is there: `manifests`, themselves included, and `blobs`."""

    def __init__(self, store: StoreView, repository: str) -> None:
        self._store = store
        self._repository = repository
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()

    def reach(self, roots: Iterable[Digest]) -> Iterator[None]:
        """Go on from `roots`. Blocks, a moment a step."""
        pending = [*roots]
        while pending:
            digest = pending.pop()
            if digest in self.manifests:
                continue
            self.manifests.add(digest)
            references = self._read(digest)
            # What an index leads to may be blobs (BuildKit's cache).
            children = [
                child for child in references.manifests if self._store.links.has_manifest(self._repository, child)
            ]
            pending.extend(children)
            self.blobs |= references.objects.difference(children)
            yield None

    def _read(self, digest: Digest) -> References:
        content = read_small(self._store.layout.blob(digest), MAX_MANIFEST + 1)
        try:
            return extract_references(content or b"", self._store.links.manifest_media_type(self._repository, digest))
        except ManifestInvalid:
            return References()


class _DiskUsage:
    """The lengths of contents, each once, and when the last of them was used."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self.sizes: dict[Digest, int] = {}
        self.last_used: float | None = None

    def add(self, digests: Iterable[Digest]) -> Iterator[None]:
        """Look at contents; those that are not there count for nothing. Blocks, a moment a step."""
        for count, digest in enumerate(digests):
            if digest not in self.sizes:
                try:
                    status = os.stat(self._store.layout.blob(digest))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                self.sizes[digest] = status.st_size
                self.last_used = max(self.last_used or 0.0, status.st_mtime)
            if count % _BATCH == 0:
                yield None
