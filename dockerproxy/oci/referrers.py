"""Referrers of a manifest (distribution-spec 1.1, "Listing Referrers"): their descriptors, and the index of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen

from dockerproxy.oci.manifests import OCI_INDEX, Manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import parse_query


@frozen
class Referrer:
    """A manifest that refers to `subject`, with the descriptor that the referrers API lists for it."""

    subject: Digest
    descriptor: dict[str, Any]


@frozen
class ReferrersQuery:
    """The query of a request for referrers: only those of `artifact_type`, and only those behind `last`.

    `text` is the query as it was received.
    """

    text: str = ""
    artifact_type: str | None = None
    last: str | None = None

    @classmethod
    def parse(cls, text: str) -> ReferrersQuery:
        """Return the parsed query. Raise `BadRequest`."""
        parameters = dict(reversed(parse_query(text)))
        return cls(text, parameters.get("artifactType"), parameters.get("last"))

    @property
    def is_for_all(self) -> bool:
        """Whether it asks for all referrers, perhaps of one type. Any other parameter may leave some out."""
        return all(name == "artifactType" for name, _ in parse_query(self.text))


@frozen
class ReferrersPage:
    """Descriptors of referrers as JSON, and the name of the last entry if more follow."""

    descriptors: list[bytes]
    last: str | None = None


@frozen
class ReferrersIndex:
    """An index of referrers to send.

    `filtered` is true if it holds only the requested artifact type. `last` is its last entry, if more follow.
    """

    content: bytes
    filtered: bool
    cache_status: str
    last: str | None = None


def make_referrer(manifest: Manifest, digest: Digest, size: int) -> Referrer | None:
    """Return the referrer that `manifest`, of `size` bytes, is of its subject; None if it has no subject."""
    if manifest.subject is None:
        return None
    descriptor: dict[str, Any] = {"mediaType": manifest.media_type, "digest": str(digest), "size": size}
    if manifest.artifact_type is not None:
        descriptor["artifactType"] = manifest.artifact_type
    if manifest.annotations:
        descriptor["annotations"] = dict(manifest.annotations)
    return Referrer(manifest.subject.digest, descriptor)


def build_index(descriptors: Iterable[bytes]) -> bytes:
    """Return an index of `descriptors`, each of which is JSON."""
    return b'{"schemaVersion":2,"mediaType":"%b","manifests":[%b]}' % (OCI_INDEX.encode(), b",".join(descriptors))
