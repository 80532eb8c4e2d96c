"""The platforms of stored manifests."""

from __future__ import annotations

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import INDEX_TYPES, MAX_MANIFEST, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import MAX_CONFIG, config_platform, index_platforms
from dockerproxy.store.layout import Layout
from dockerproxy.store.tree_reader import UnsafeFile, read_small


def manifest_platforms(layout: Layout, digest: Digest, media_type: str | None) -> tuple[str, ...]:
    """Return the platforms of an index, or that of an image. It is empty if they are not known. Blocks.

    `media_type` is that with which the manifest was sent. An evicted manifest or configuration has no platform.
    """
    try:
        content = read_small(layout.blob(digest), MAX_MANIFEST + 1) or b""
        manifest = parse_manifest(content, media_type)
        if manifest.media_type in INDEX_TYPES:
            return tuple(dict.fromkeys(index_platforms(content).values()))
        if manifest.config is None or (manifest.config.size or 0) > MAX_CONFIG:
            return ()
        config = read_small(layout.blob(manifest.config.digest), MAX_CONFIG) or b""
    except (ManifestInvalid, UnsafeFile):
        return ()
    platform = config_platform(config)
    return () if platform is None else (platform,)
