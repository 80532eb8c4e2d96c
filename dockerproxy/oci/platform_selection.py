"""Platforms of images, and the manifests of an index that are for them (image-spec 1.1, "Image Index")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import frozen

from dockerproxy.errors import DigestInvalid, ManifestInvalid, NameInvalid
from dockerproxy.oci.manifests import parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.untrusted_json import parse_json

ALL = "all"
"""Stands for every platform of an index."""

_PLATFORM = re.compile(r"([a-z0-9]{1,32})/([a-z0-9_.-]{1,32})(?:/([a-z0-9_.-]{1,32}))?")
_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm",
    "i386": "386",
    "i686": "386",
}
# BuildKit's attestations (SBOM, provenance) are entries of the index, which name the image that they are about.
_MAX_SHOWN = 20  # platforms in an error
_ATTESTATION_OF = "vnd.docker.reference.digest"


@frozen(order=True)
class Platform:
    """An operating system and an architecture, as Go names them. The usual variant of an architecture is left out."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Return the platform written as ``linux/amd64`` or ``linux/arm/v7``. Raise `NameInvalid`."""
        match = _PLATFORM.fullmatch(text.lower())
        if match is None:
            raise NameInvalid(f"{text[:100]!r} is not a platform such as linux/amd64 or linux/arm/v7")
        return cls.normalized(match[1], match[2], match[3] or "")

    @classmethod
    def normalized(cls, os: str, architecture: str, variant: str) -> Platform:
        """Return the platform with the names and defaults of containerd (platforms/database.go)."""
        architecture = _ARCHITECTURES.get(architecture, architecture)
        usual = {"arm64": "v8", "arm": "v7", "amd64": "v1"}.get(architecture)
        return cls(os, architecture, "" if variant == usual else variant)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


_UNKNOWN = Platform("unknown", "unknown")  # of attestations


@frozen
class IndexEntry:
    """A manifest of an index. `attests` is the one that it is an attestation of; such an entry has no platform."""

    digest: Digest
    platform: Platform | None
    attests: Digest | None = None


def parse_index(content: bytes) -> tuple[IndexEntry, ...]:
    """Return the manifests that an index lists. Raise `ManifestInvalid`."""
    parse_manifest(content, None)  # checks the form of all descriptors
    return tuple(_parse_entry(item) for item in parse_json(content).get("manifests") or ())


def _parse_entry(item: dict[str, Any]) -> IndexEntry:
    digest, platform = Digest.parse(item["digest"]), item.get("platform")
    annotations = item.get("annotations")
    attested = annotations.get(_ATTESTATION_OF) if isinstance(annotations, dict) else None
    if isinstance(attested, str):
        try:
            return IndexEntry(digest, None, Digest.parse(attested))
        except DigestInvalid:
            raise ManifestInvalid(f"the index has an attestation of {attested[:100]!r}, which is no digest") from None
    if not isinstance(platform, dict):
        return IndexEntry(digest, None)
    names = [platform.get(name) for name in ("os", "architecture", "variant")]
    os, architecture, variant = (name if isinstance(name, str) else "" for name in names)
    return IndexEntry(digest, Platform.normalized(os, architecture, variant))


def select(
    entries: Sequence[IndexEntry], wanted: Iterable[Platform], *, every: bool = False, attestations: bool = False
) -> list[Digest]:
    """Return the manifests of the `wanted` platforms, or of `every` one, and perhaps their attestations.

    For a platform that has several, such as those of Windows versions, it is all of them. Raise `NameInvalid`, with a
    clause, if a platform is missing.
    """
    wanted = list(dict.fromkeys(wanted))
    images = [entry for entry in entries if entry.attests is None]
    chosen = [entry.digest for entry in images if every or entry.platform in wanted]
    if not every:
        require([entry.platform for entry in images if entry.platform is not None], wanted)
    if attestations:
        chosen += [entry.digest for entry in entries if entry.attests in chosen]
    return list(dict.fromkeys(chosen))


def require(present: Sequence[Platform], wanted: Iterable[Platform]) -> None:
    """Raise `NameInvalid`, with a clause that says which platforms there are, if one that is `wanted` is missing."""
    missing = [str(platform) for platform in wanted if platform not in present]
    known = list(dict.fromkeys(str(platform) for platform in present if platform != _UNKNOWN))
    if len(known) > _MAX_SHOWN:
        known[_MAX_SHOWN:] = [f"{len(known) - _MAX_SHOWN} others"]
    if missing:
        offer = f"but {', '.join(known)}" if known else "and does not say for which platforms it is"
        raise NameInvalid(f"it has no {' and no '.join(missing)}, {offer}")
