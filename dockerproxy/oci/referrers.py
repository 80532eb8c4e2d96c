"""Referrers of a manifest (distribution-spec 1.1, "Listing Referrers"): their descriptors, and the index of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from attrs import frozen

from dockerproxy.oci.manifests import OCI_INDEX, Manifest
from dockerproxy.oci.names import Digest


@frozen
class Referrer:
    """A manifest that refers to `subject`, with the descriptor that the referrers API lists for it."""

    subject: Digest
    descriptor: dict[str, Any]


def make_referrer(manifest: Manifest, content: bytes, digest: Digest) -> Referrer | None:
    """Return the referrer that `manifest`, parsed from `content`, is of its subject; None if it has no subject."""
    if manifest.subject is None:
        return None
    descriptor: dict[str, Any] = {"mediaType": manifest.media_type, "digest": str(digest), "size": len(content)}
    if manifest.artifact_type is not None:
        descriptor["artifactType"] = manifest.artifact_type
    annotations = json.loads(content).get("annotations")
    if isinstance(annotations, dict) and annotations:
        descriptor["annotations"] = annotations
    return Referrer(manifest.subject.digest, descriptor)


def build_index(descriptors: Iterable[bytes]) -> bytes:
    """Return an index of `descriptors`, each of which is JSON."""
    return b'{"schemaVersion":2,"mediaType":"%b","manifests":[%b]}' % (OCI_INDEX.encode(), b",".join(descriptors))
