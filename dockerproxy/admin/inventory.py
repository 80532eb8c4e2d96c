"""What is on the shelves: repositories, their images, how large they are and when they were last used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from dockerproxy.admin.names import CACHED, HOSTED, Named, Shelf
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest
from dockerproxy.store.files import read_small
from dockerproxy.store.references import References, references_in

Row = dict[str, Any]

_SOME = 200  # contents that are looked at in one step


def repositories(shelf: Shelf, rows: list[Row]) -> Iterator[None]:
    """Put a row for each repository into `rows`. Blocks, a moment a step."""
    for repository in sorted(shelf.links.repositories()):
        manifests = list(shelf.links.manifests(repository))
        tags = len(shelf.links.tags(repository))
        contents = _Contents(shelf)
        yield from contents.add(manifests)
        last_used = contents.last_used
        yield from contents.add(shelf.links.layers(repository))
        # In the cache, links stay when contents are evicted; and of a hosted one only directories may be left.
        if contents.sizes or (shelf.where == HOSTED and (tags or manifests)):
            rows.append({
                "where": shelf.where,
                "name": repository,
                "tags": tags,
                "manifests": sum(digest in contents.sizes for digest in manifests),
                "size": sum(contents.sizes.values()),
                "last_used": last_used or contents.last_used,
            })  # fmt: skip


def manifests(named: Named, rows: list[Row]) -> Iterator[None]:
    """Put a row for each tag of a repository, then for each manifest without one, into `rows`. Blocks, a moment a step.

    Of a name with a tag or a digest, only for that. `tag` is None for one without.
    """
    shelf, repository = named.shelf, named.repository
    tagged: set[Digest] = set()
    for tag in shelf.links.tags(repository):
        digest = shelf.links.tag(repository, tag)
        if digest is None:
            continue
        tagged.add(digest)
        if named.tag in (None, tag) and named.digest in (None, digest):
            yield from _row(named, tag, digest, rows)
    for digest in shelf.links.manifests(repository):
        if digest not in tagged and named.tag is None and named.digest in (None, digest):
            yield from _row(named, None, digest, rows)


def _row(named: Named, tag: str | None, digest: Digest, rows: list[Row]) -> Iterator[None]:
    shelf = named.shelf
    contents = _Contents(shelf)
    yield from contents.add([digest])
    last_used = contents.last_used
    if not contents.sizes and shelf.where == CACHED:
        return  # evicted
    reached = Reached(shelf, named.repository)
    yield from reached.spread([digest])
    yield from contents.add(reached.manifests | reached.blobs)
    media_type = shelf.links.manifest_media_type(named.repository, digest)
    rows.append({
        "tag": tag,
        "digest": str(digest),
        "media_type": media_type or _own_type(shelf, digest),
        "size": sum(contents.sizes.values()),
        "last_used": last_used,
    })  # fmt: skip


def _own_type(shelf: Shelf, digest: Digest) -> str | None:
    try:
        return media_type_of(read_small(shelf.layout.blob(digest), MAX_MANIFEST) or b"")
    except ManifestInvalid:
        return None


class Reached:
    """What manifests lead to, as far as it is there: `manifests`, themselves included, and `blobs`."""

    def __init__(self, shelf: Shelf, repository: str) -> None:
        self._shelf = shelf
        self._repository = repository
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()

    def spread(self, roots: Iterable[Digest]) -> Iterator[None]:
        """Go on from `roots`. Blocks, a moment a step."""
        waiting = [*roots]
        while waiting:
            digest = waiting.pop()
            if digest in self.manifests:
                continue
            self.manifests.add(digest)
            references = self._read(digest)
            # What an index leads to may be blobs (BuildKit's cache).
            children = [
                child for child in references.manifests if self._shelf.links.has_manifest(self._repository, child)
            ]
            waiting.extend(children)
            self.blobs |= references.contents.difference(children)
            yield None

    def _read(self, digest: Digest) -> References:
        content = read_small(self._shelf.layout.blob(digest), MAX_MANIFEST + 1)
        try:
            return references_in(content or b"", self._shelf.links.manifest_media_type(self._repository, digest))
        except ManifestInvalid:
            return References()


class _Contents:
    """The lengths of contents, each once, and when the last of them was used."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.sizes: dict[Digest, int] = {}
        self.last_used: float | None = None

    def add(self, digests: Iterable[Digest]) -> Iterator[None]:
        """Look at contents; those that are not there count for nothing. Blocks, a moment a step."""
        for count, digest in enumerate(digests):
            if digest not in self.sizes:
                try:
                    status = os.stat(self._shelf.layout.blob(digest))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                self.sizes[digest] = status.st_size
                self.last_used = max(self.last_used or 0.0, status.st_mtime)
            if count % _SOME == 0:
                yield None
