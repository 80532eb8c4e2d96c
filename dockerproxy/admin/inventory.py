"""Listings of repositories and their images, with sizes and times of last use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from dockerproxy.admin.resolver import CACHED, HOSTED, ImageRef, StoreView
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.docker_hub import short_name
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest
from dockerproxy.store.needs import find_needs, read_references
from dockerproxy.store.references import References
from dockerproxy.store.tree_reader import read_small

Row = dict[str, Any]


def list_repositories(store: StoreView, pattern: str | None = None) -> Iterator[Row]:
    """Yield a row for each repository whose name matches `pattern`, as in a shell. Blocks.

    ``nginx*`` matches the names that docker shows, without the host of Docker Hub, and ``*/nginx*`` all full names.
    """
    for name, repository in sorted((store.shown(repository), repository) for repository in store.links.repositories()):
        if pattern is not None and not _matches(name, pattern):
            continue
        manifests = list(store.links.manifests(repository))
        tags = len(store.links.tags(repository))
        usage = DiskUsage(store)
        usage.add(manifests)
        last_used = usage.last_used
        usage.add(store.links.layers(repository))
        # Skip empty repositories: the cache keeps links to evicted blobs, and the hosted store empty directories.
        if usage.sizes or (store.kind == HOSTED and (tags or manifests)):
            yield {
                "where": store.kind,
                "name": name,
                "tags": tags,
                "manifests": sum(digest in usage.sizes for digest in manifests),
                "platforms": _platforms(store, repository, filter(usage.sizes.__contains__, manifests)),
                "size": sum(usage.sizes.values()),
                "last_used": last_used or usage.last_used,
            }


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(short_name(name), pattern)


def _platforms(store: StoreView, repository: str, manifests: Iterable[Digest]) -> list[str]:
    """Return the platforms of `manifests`, each once, in order."""
    platforms = {
        platform
        for digest in manifests
        for platform in store.platforms.read(digest, partial(store.links.manifest_media_type, repository, digest))
    }
    return sorted(platforms)


def list_manifests(ref: ImageRef) -> Iterator[Row]:
    """Yield a row for each tag of a repository, then for each untagged manifest. Blocks.

    If `ref` has a tag or a digest, list only that. An untagged manifest's row has the `tag` None, and `needed_by` is
    "of v1" if it is a part of an index, "signs v1" if it refers to what the tag leads to.
    """
    store, repository = ref.store, ref.repository
    tagged_digests: dict[Digest, str] = {}
    for tag in store.links.tags(repository):
        digest = store.links.tag(repository, tag)
        if digest is None:
            continue
        tagged_digests.setdefault(digest, tag)
        if ref.tag in (None, tag) and ref.digest in (None, digest):
            yield from _manifest_row(ref, tag, digest, None)
    if ref.tag is not None:
        return
    needs: dict[Digest, str] = {}
    for need in find_needs(store.layout, store.links, repository):
        needs.setdefault(need.digest, need.tag)
    for digest in store.links.manifests(repository):
        if digest not in tagged_digests and ref.digest in (None, digest):
            needed_by = f"of {needs[digest]}" if digest in needs else None
            subject = read_references(store.layout, store.links, repository, digest).subject
            if needed_by is None and subject is not None:
                signed = tagged_digests.get(subject, needs.get(subject))
                needed_by = None if signed is None else f"signs {signed}"
            yield from _manifest_row(ref, None, digest, needed_by)


def _manifest_row(ref: ImageRef, tag: str | None, digest: Digest, needed_by: str | None) -> Iterator[Row]:
    store = ref.store
    usage = DiskUsage(store)
    usage.add([digest])
    last_used = usage.last_used
    if not usage.sizes and store.kind == CACHED:
        return  # the manifest was evicted
    closure = Closure(store, ref.repository)
    closure.reach([digest])
    usage.add(closure.manifests | closure.blobs)
    media_type = store.links.manifest_media_type(ref.repository, digest)
    yield {
        "tag": tag,
        "needed_by": needed_by,
        "digest": str(digest),
        "media_type": media_type or _media_type_in_content(store, digest),
        "platforms": list(store.platforms.read(digest, lambda: media_type)),
        "size": sum(usage.sizes.values()),
        "last_used": last_used,
    }


def _media_type_in_content(store: StoreView, digest: Digest) -> str | None:
    try:
        return media_type_of(read_small(store.layout.blob(digest), MAX_MANIFEST) or b"")
    except ManifestInvalid:
        return None


class Closure:
    """The objects reachable from root manifests: `manifests`, including the roots, and `blobs`.

    Only manifests that the repository has are followed. Blobs are included only if the repository links them
    or they exist, because a manifest may be full of digests of nothing.
    """

    def __init__(self, store: StoreView, repository: str) -> None:
        self._store = store
        self._repository = repository
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()

    def reach(self, roots: Iterable[Digest]) -> None:
        """Add the objects reachable from `roots`. Blocks."""
        pending = [*roots]
        while pending:
            digest = pending.pop()
            if digest in self.manifests:
                continue
            self.manifests.add(digest)
            references = self._read(digest)
            # An index may refer to blobs instead of manifests (BuildKit's cache).
            children = {
                child for child in references.manifests if self._store.links.has_manifest(self._repository, child)
            }
            pending.extend(children - self.manifests)
            self.blobs.update(
                digest for digest in references.objects if digest not in children and self._has_blob(digest)
            )

    def _has_blob(self, digest: Digest) -> bool:
        return self._store.links.has_layer(self._repository, digest) or self._store.blobs.exists(digest)

    def _read(self, digest: Digest) -> References:
        return read_references(self._store.layout, self._store.links, self._repository, digest)


class DiskUsage:
    """The sizes of blobs, each counted once, and the latest time that one was used."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self.sizes: dict[Digest, int] = {}
        self.last_used: float | None = None

    def add(self, digests: Iterable[Digest]) -> None:
        """Add the blobs of `digests`, ignoring missing ones. Blocks."""
        for digest in digests:
            if digest not in self.sizes:
                try:
                    status = os.stat(self._store.layout.blob(digest))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                self.sizes[digest] = status.st_size
                self.last_used = max(self.last_used or 0.0, status.st_mtime)
