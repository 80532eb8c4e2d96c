"""The references of a manifest, extracted from its content alone."""

from __future__ import annotations

import re

from attrs import frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import KNOWN_TYPES, Manifest, media_type_of, parse_manifest
from dockerproxy.oci.names import Digest

_DIGEST = re.compile(rb"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})(?![0-9a-f])")


@frozen
class References:
    """The references of one manifest. `objects` has all except the subject; `manifests` may be manifests.

    The latter may also be plain blobs, because BuildKit's cache is an index of blobs.
    """

    objects: frozenset[Digest] = frozenset()
    manifests: tuple[Digest, ...] = ()
    subject: Digest | None = None


def extract_references(content: bytes, media_type: str | None) -> References:
    """Return the references of a manifest. Raises `ManifestInvalid`.

    If the media type is unknown, the content need not be JSON, and every digest in it counts as a reference.
    """
    effective_type = (media_type or media_type_of(content)).lower()
    try:
        manifest = parse_manifest(content, effective_type)
    except ManifestInvalid:
        if effective_type in KNOWN_TYPES:
            raise
        manifest = Manifest(effective_type)
    subject = None if manifest.subject is None else manifest.subject.digest
    if effective_type not in KNOWN_TYPES:
        digests = dict.fromkeys(Digest.parse(match.decode()) for match in _DIGEST.findall(content))
        return References(frozenset(digests) - {subject}, tuple(digests), subject)
    children = tuple(child.digest for child in manifest.manifests)
    descriptors = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
    return References(frozenset((*children, *(blob.digest for blob in descriptors))), children, subject)
