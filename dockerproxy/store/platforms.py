"""The platforms of stored manifests."""

from __future__ import annotations

from collections.abc import Callable
from sys import intern

from attrs import define, field

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import INDEX_TYPES, MAX_MANIFEST, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import MAX_CONFIG, config_platform, index_platforms
from dockerproxy.store.contents import Contents


def manifest_platforms(
    contents: Contents, digest: Digest, media_type: str | None, may_read: Callable[[Digest], bool] = lambda digest: True
) -> tuple[str, ...]:
    """Return the platforms of an index, or that of an image. It is empty if they are not known. Blocks.

    `media_type` is that with which the manifest was sent. An evicted manifest or configuration has no platform,
    and neither has one whose configuration the caller `may_read` not.
    """
    try:
        content = contents.read(digest, MAX_MANIFEST + 1) or b""
        manifest = parse_manifest(content, media_type)
        if manifest.media_type in INDEX_TYPES:
            return tuple(dict.fromkeys(index_platforms(content).values()))
        if manifest.config is None or (manifest.config.size or 0) > MAX_CONFIG:
            return ()
        if not may_read(manifest.config.digest):
            return ()
        config = contents.read(manifest.config.digest, MAX_CONFIG) or b""
    except ManifestInvalid:
        return ()
    platform = config_platform(config)
    return () if platform is None else (platform,)


_MAX_KNOWN = 50_000  # manifests, with some 150 bytes each

KnownPlatforms = dict[bytes, tuple[str, ...]]
"""The platforms of manifests, by their digests."""


@define(eq=False)
class PlatformReader:
    """The platforms of the manifests among `contents`. It is thread-safe.

    They are remembered in `known`, because content never changes.

    To read and parse a manifest and its configuration takes most of the time of a list of repositories.
    """

    _contents: Contents
    _known: KnownPlatforms = field(factory=dict)

    def read(self, digest: Digest, media_type: Callable[[], str | None]) -> tuple[str, ...]:
        """Return what `manifest_platforms` does. `media_type` reads the media type. Blocks."""
        key = bytes.fromhex(digest.hex)
        platforms = self._known.get(key)
        if platforms is None:
            platforms = tuple(map(intern, manifest_platforms(self._contents, digest, media_type())))
            if platforms:  # otherwise its configuration may only be missing now
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[key] = platforms
        return platforms
