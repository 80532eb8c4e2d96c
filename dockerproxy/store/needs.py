"""Which manifests of a repository the indexes of its tags need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from attrs import frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import INDEX_TYPES, KNOWN_TYPES, MAX_MANIFEST, fallback_base
from dockerproxy.oci.names import Digest
from dockerproxy.store.contents import Contents
from dockerproxy.store.links import Links
from dockerproxy.store.references import References, extract_references


@frozen
class Need:
    """The manifest `digest` is a part of an index, to which the tag `tag` leads."""

    digest: Digest
    tag: str


def find_needs(contents: Contents, links: Links, repository: str) -> Iterator[Need]:
    """Yield a need for each manifest of the repository that an index of a tag leads to. Blocks.

    The lists of referrers that clients keep under a tag named after a digest do not count: a signature may be removed.
    """
    roots: dict[Digest, str] = {}
    for tag, digest in links.targets(repository, (tag for tag in links.tags(repository) if not fallback_base(tag))):
        if digest is not None:
            roots.setdefault(digest, tag)
    seen: set[Digest] = set()
    read = partial(_children, contents, links, repository)
    for (root, tag), children in zip(roots.items(), contents.map(read, roots), strict=True):
        pending = [root]
        while pending:
            parent = pending.pop()
            if parent in seen:
                continue
            seen.add(parent)
            for child in children if parent == root else read(parent):
                if links.has_manifest(repository, child):
                    pending.append(child)
                    yield Need(child, tag)


def read_references(
    contents: Contents, links: Links, repository: str, digest: Digest, limit: int = MAX_MANIFEST
) -> References:
    """Return the references of a manifest; none if it cannot be read, or has more than `limit` bytes. Blocks."""
    content = contents.read(digest, limit + 1)
    if content is not None and len(content) > limit:
        return References()
    try:
        return extract_references(content or b"", links.manifest_media_type(repository, digest))
    except ManifestInvalid:
        return References()


def _children(contents: Contents, links: Links, repository: str, digest: Digest) -> tuple[Digest, ...]:
    media_type = (links.manifest_media_type(repository, digest) or "").lower()
    if media_type in KNOWN_TYPES and media_type not in INDEX_TYPES:
        return ()  # most are images, which need not be read
    return read_references(contents, links, repository, digest).manifests
