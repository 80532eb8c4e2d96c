"""Listings of repositories and their images, with sizes and times of last use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

from dockerproxy.admin.resolver import CACHED, HOSTED, ImageRef, StoreView
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.docker_hub import short_name
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest
from dockerproxy.store.needs import find_needs, read_references
from dockerproxy.store.references import References

Row = dict[str, Any]


def list_repositories(store: StoreView, pattern: str | None = None) -> Iterator[Row]:
    """Yield a row for each repository whose name matches `pattern`, as in a shell. Blocks.

    ``nginx*`` matches the names that docker shows, without the host of Docker Hub, and ``*/nginx*`` all full names.
    """
    names = sorted((store.shown(repository), repository) for repository in store.links.repositories())
    matches = (names for names in names if pattern is None or _matches(names[0], pattern))
    yield from filter(None, store.reader.map(partial(_repository_row, store), matches))


def _repository_row(store: StoreView, names: tuple[str, str]) -> Row | None:
    """Return the row of a repository, given as it is shown and as it is stored. Return None if it is empty."""
    name, repository = names
    manifests = list(store.links.manifests(repository))
    tags = len(store.links.tags(repository))
    usage = DiskUsage(store)
    usage.add(manifests)
    last_used = usage.last_used
    usage.add(store.links.layers(repository))
    # Empty ones: the cache keeps links to evicted blobs, and the hosted store empty directories.
    if not usage.sizes and not (store.kind == HOSTED and (tags or manifests)):
        return None
    return {
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

    def read(digest: Digest) -> Iterable[str]:
        return store.platforms.read(digest, partial(store.links.manifest_media_type, repository, digest))

    return sorted(set(chain.from_iterable(store.reader.map(read, manifests))))


def list_manifests(ref: ImageRef) -> Iterator[Row]:
    """Yield a row for each tag of a repository, then for each untagged manifest. Blocks.

    If `ref` has a tag or a digest, list only that. An untagged manifest's row has the `tag` None, and `needed_by` is
    "of v1" if it is a part of an index, "signs v1" if it refers to what the tag leads to.
    """
    store, repository = ref.store, ref.repository
    tags = store.links.tags(repository) if ref.tag is None else [ref.tag]
    targets = {tag: digest for tag, digest in store.links.targets(repository, tags) if digest is not None}
    shown = ((tag, digest) for tag, digest in targets.items() if ref.digest in (None, digest))
    yield from filter(None, store.reader.map(lambda item: _manifest_row(ref, *item, None), shown))
    if ref.tag is not None:
        return
    tagged_digests: dict[Digest, str] = {}
    for tag, digest in targets.items():
        tagged_digests.setdefault(digest, tag)
    needs: dict[Digest, str] = {}
    for need in find_needs(store.contents, store.links, repository):
        needs.setdefault(need.digest, need.tag)

    def describe(digest: Digest) -> Row | None:
        needed_by = f"of {needs[digest]}" if digest in needs else None
        subject = read_references(store.contents, store.links, repository, digest).subject
        if needed_by is None and subject is not None:
            signed = tagged_digests.get(subject, needs.get(subject))
            needed_by = None if signed is None else f"signs {signed}"
        return _manifest_row(ref, None, digest, needed_by)

    untagged = (
        digest
        for digest in store.links.manifests(repository)
        if digest not in tagged_digests and ref.digest in (None, digest)
    )
    yield from filter(None, store.reader.map(describe, untagged))


def _manifest_row(ref: ImageRef, tag: str | None, digest: Digest, needed_by: str | None) -> Row | None:
    """Return the row of a manifest; None if it was evicted."""
    store = ref.store
    usage = DiskUsage(store)
    usage.add([digest])
    last_used = usage.last_used
    if not usage.sizes and store.kind == CACHED:
        return None
    closure = Closure(store, ref.repository)
    closure.reach([digest])
    usage.add(closure.manifests | closure.blobs)
    media_type = store.links.manifest_media_type(ref.repository, digest)
    return {
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
        return media_type_of(store.contents.read(digest, MAX_MANIFEST) or b"")
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
        return self._store.links.has_layer(self._repository, digest) or self._store.contents.exists(digest)

    def _read(self, digest: Digest) -> References:
        return read_references(self._store.contents, self._store.links, self._repository, digest)


class DiskUsage:
    """The sizes of blobs, each counted once, and the latest time that one was used."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self.sizes: dict[Digest, int] = {}
        self.last_used: float | None = None

    def add(self, digests: Iterable[Digest]) -> None:
        """Add the blobs of `digests`, ignoring missing ones. Blocks."""
        added = [digest for digest in digests if digest not in self.sizes]
        for digest, status in zip(added, self._store.contents.map(self._store.contents.status, added), strict=True):
            if status is not None:
                self.sizes[digest] = status.st_size
                self.last_used = max(self.last_used or 0.0, status.st_mtime)
