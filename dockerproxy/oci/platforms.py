"""Platforms that images are made for, ``OS/ARCHITECTURE[/VARIANT]`` as ``docker pull --platform`` takes them.

image-spec 1.1: an index has them in its descriptors ("Image Index", `platform`), an image in its configuration ("Image
Configuration", `os`, `architecture` and `variant`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json

MAX_CONFIG = 1024 * 1024
"""Bytes of a configuration that is read for its platform. Those of images have some KiB."""

_MAX_PLATFORMS = 100  # of an index; more are left out
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,30}", re.IGNORECASE | re.ASCII)


def index_platforms(content: bytes) -> dict[Digest, str]:
    """Return the platforms of the images in the index `content`, by the digests of their manifests.

    Attestations are left out, which BuildKit lists for the platform ``unknown/unknown``. So is everything that is
    malformed: anybody may have pushed it.
    """
    entries = _parse(content).get("manifests")
    platforms: dict[Digest, str] = {}
    for entry in entries if isinstance(entries, list) else ():
        platform = platform_name(entry.get("platform")) if isinstance(entry, dict) else None
        if platform is None or len(platforms) == _MAX_PLATFORMS:
            continue
        try:
            platforms[Digest.parse(str(entry.get("digest")))] = platform
        except DigestInvalid:
            continue
    return platforms


def config_platform(content: bytes) -> str | None:
    """Return the platform of the image that `content` configures, or None if it is not an image's configuration."""
    return platform_name(_parse(content))


def platform_name(value: Any) -> str | None:
    """Return the platform in the JSON object `value`; None if it has no valid one, or ``unknown``."""
    if not isinstance(value, Mapping):
        return None
    parts = [value.get("os"), value.get("architecture"), *([value["variant"]] if value.get("variant") else [])]
    if not all(isinstance(part, str) and _PART.fullmatch(part) for part in parts) or "unknown" in parts[:2]:
        return None
    return "/".join(parts)


def _parse(content: bytes) -> Mapping[str, Any]:
    try:
        document = parse_json(content)
    except JSONInvalid:
        return {}
    return document if isinstance(document, dict) else {}
