"""A tree of `registry:2` with many small blobs, half of which nothing needs any more."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

REPOSITORY = "bench/gc"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYERS = 100  # of each image
_AGE = 86400.0  # seconds since all of it was last used: garbage collectors spare what is new


def grow(root: Path, count: int) -> tuple[str, int]:
    """Put `count` blobs below `root`; return the digest of one of the manifests, and how many blobs are garbage."""
    needed = [_blob(root, f"needed {number}".encode()) for number in range(count // 2)]
    for number in range(count - len(needed)):
        _blob(root, f"garbage {number}".encode())
    config = _blob(root, b"{}")
    digest = ""
    for start in range(0, len(needed), _LAYERS):
        digest = _image(root, config, needed[start : start + _LAYERS])
    return digest, count - len(needed)


def _blob(root: Path, content: bytes, *, layer: bool = True) -> str:
    """Store a blob that the repository has, or had, a link to; return its digest."""
    encoded = hashlib.sha256(content).hexdigest()
    folder = f"{root}/docker/registry/v2/blobs/sha256/{encoded[:2]}/{encoded}"
    _write(folder, "data", content)
    then = time.time() - _AGE
    os.utime(f"{folder}/data", (then, then))
    if layer:
        _write(f"{_repository(root)}/_layers/sha256/{encoded}", "link", f"sha256:{encoded}".encode())
    return f"sha256:{encoded}"


def _image(root: Path, config: str, layers: list[str]) -> str:
    """Store a manifest that has a tag of its own; return its digest."""
    kind = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": [{"mediaType": kind, "digest": layer, "size": 16} for layer in layers],
    }
    digest = _blob(root, json.dumps(manifest).encode(), layer=False)
    encoded, manifests = digest.partition(":")[2], f"{_repository(root)}/_manifests"
    tag = f"{manifests}/tags/{encoded[:12]}"
    for folder in (f"{manifests}/revisions/sha256/{encoded}", f"{tag}/current", f"{tag}/index/sha256/{encoded}"):
        _write(folder, "link", digest.encode())
    return digest


def _repository(root: Path) -> str:
    return f"{root}/docker/registry/v2/repositories/{REPOSITORY}"


def _write(folder: str, name: str, content: bytes) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}", "wb") as file:
        file.write(content)
