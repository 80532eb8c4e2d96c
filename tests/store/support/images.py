"""Test images: manifests with the blobs, children and subjects that they refer to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from attrs import frozen

from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import Referrer
from dockerproxy.store.hosted_tree import HostedTree


@frozen
class ManifestTree:
    """A manifest's bytes, and the blobs and children that must be pushed before it."""

    media_type: str
    data: bytes
    blobs: tuple[bytes, ...] = ()
    children: tuple[ManifestTree, ...] = ()
    subject: Digest | None = None

    @property
    def digest(self) -> Digest:
        return Digest.of(self.data)

    def walk(self) -> Iterator[ManifestTree]:
        """Yield all descendants, and then this manifest."""
        for child in self.children:
            yield from child.walk()
        yield self


def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def image(config: bytes, *layers: bytes, subject: ManifestTree | None = None) -> ManifestTree:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.test", config),
        "layers": [descriptor("application/vnd.test.layer", layer) for layer in layers],
    }
    if subject is not None:
        document["subject"] = descriptor(subject.media_type, subject.data)
    data = json.dumps(document).encode()
    return ManifestTree(OCI_MANIFEST, data, (config, *layers), (), None if subject is None else subject.digest)


def index(*children: ManifestTree) -> ManifestTree:
    manifests = [descriptor(child.media_type, child.data) for child in children]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return ManifestTree(OCI_INDEX, json.dumps(document).encode(), (), children)


def put_image(store: HostedTree, repository: str, manifest: ManifestTree, *tags: str) -> None:
    """Store `manifest` with its blobs and children, and point `tags` to it."""
    for part in manifest.walk():
        for blob in part.blobs:
            store.blobs.put(blob, Digest.of(blob))
            store.links.link_layer(repository, Digest.of(blob))
        store.blobs.put(part.data, part.digest)
        referrer = None if part.subject is None else Referrer(part.subject, descriptor(part.media_type, part.data))
        store.link_manifest(repository, part.digest, part.media_type, referrer, tags if part is manifest else ())


def age_blobs(store: HostedTree, seconds: float = 7200) -> None:
    """Move the last use of every blob `seconds` into the past."""
    for entry in list(store.blobs.walk()):
        mtime = entry.last_used - seconds
        os.utime(store.layout.blob(entry.key), (mtime, mtime))


ONE, TWO = image(b"config1", b"base", b"layer1"), image(b"config2", b"base", b"layer2")
BOTH = index(ONE, TWO)
