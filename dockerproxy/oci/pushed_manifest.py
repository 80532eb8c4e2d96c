"""A manifest as a client pushes it: its digest, media type and references."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from dockerproxy.errors import DigestInvalid, ManifestInvalid
from dockerproxy.oci.manifests import (
    KNOWN_TYPES,
    MEDIA_TYPE,
    Manifest,
    data_type,
    is_nondistributable,
    media_type_of,
    parse_manifest,
)
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import Referrer, make_referrer

_GENERIC_TYPES = ("", "application/json", "application/octet-stream")


@frozen
class PushedManifest:
    """A parsed push. `manifest` is None if the media type is unknown, `referrer` if the manifest has no subject."""

    content: bytes
    digest: Digest
    media_type: str
    manifest: Manifest | None = None
    referrer: Referrer | None = None

    @classmethod
    def parse(cls, content: bytes, expected_digest: Digest | None, declared_type: str) -> PushedManifest:
        """Return the manifest in `content`, declared to be of `declared_type`. Blocks: it may parse 4 MiB of JSON.

        Raise `DigestInvalid`, or `ManifestInvalid` if the content is not valid for a known type.
        """
        digest = Digest.of(content, "sha256" if expected_digest is None else expected_digest.algorithm)
        if expected_digest is not None and digest != expected_digest:
            raise DigestInvalid(f"the manifest's digest is {digest}, not {expected_digest}")
        if declared_type in _GENERIC_TYPES:
            declared_type = media_type_of(content)
        if not MEDIA_TYPE.fullmatch(declared_type):
            raise ManifestInvalid("the manifest's Content-Type is not a media type")
        if data_type(declared_type) != declared_type:
            raise ManifestInvalid(
                f"{declared_type} is not a type of a manifest, which is JSON; a web browser may show it as a page"
            )
        try:
            manifest = parse_manifest(content, declared_type)
        except ManifestInvalid:
            if declared_type.lower() in KNOWN_TYPES:
                raise
            return cls(content, digest, declared_type)
        return cls(content, digest, declared_type, manifest, make_referrer(manifest, digest, len(content)))

    @property
    def subject(self) -> Digest | None:
        """The manifest that this one refers to. It may be pushed later."""
        return None if self.manifest is None or self.manifest.subject is None else self.manifest.subject.digest

    def required_references(self) -> Iterator[tuple[Digest, bool]]:
        """Yield each digest that its repository must have, and whether that is a manifest."""
        manifest = self.manifest
        if manifest is None or manifest.media_type not in KNOWN_TYPES:
            return
        if manifest.config is not None:
            yield manifest.config.digest, False
        for layer in manifest.layers:
            if not is_nondistributable(layer.media_type):
                yield layer.digest, False
        for child in manifest.manifests:
            yield child.digest, True
