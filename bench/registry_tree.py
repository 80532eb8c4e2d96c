"""Writes storage trees of `registry:2`: many small blobs, half of them unreferenced; images; and one large blob."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from bench.content import OCI_MANIFEST

REPOSITORY = "bench/gc"
_LAYERS_PER_IMAGE = 100
_AGE = 86400.0  # seconds since the last use of every blob, because garbage collectors spare new blobs


def link_blob(root: Path, repository: str, blob: Path, sha256_hex: str) -> None:
    """Add the file `blob`, whose sha256 is `sha256_hex`, to `repository` below `root` as a hard link."""
    folder = root / f"docker/registry/v2/blobs/sha256/{sha256_hex[:2]}/{sha256_hex}"
    folder.mkdir(parents=True, exist_ok=True)
    os.link(blob, folder / "data")
    _write_file(
        f"{_repository_path(root, repository)}/_layers/sha256/{sha256_hex}", "link", f"sha256:{sha256_hex}".encode()
    )


def write_image(root: Path, repository: str, layers: int, size: int) -> str:
    """Write an image with `layers` layers of `size` random bytes each below `root`; return its tag."""
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    digests = [write_blob(root, os.urandom(size), repository=repository) for _ in range(layers)]
    config_digest = write_blob(root, json.dumps(config).encode(), repository=repository)
    digest = write_manifest(root, config_digest, digests, repository=repository, sizes=(len(json.dumps(config)), size))
    return digest.partition(":")[2][:12]


def export_as_files(root: Path, repository: str, tag: str, folder: Path) -> None:
    """Export the image `tag` below `root` into `folder`, as hard links that a file server can serve as a registry."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "manifests").mkdir()
    blobs = root / "docker/registry/v2/blobs/sha256"
    for blob in blobs.glob("*/*/data"):
        os.link(blob, folder / f"blobs/sha256:{blob.parent.name}")
    digest = Path(f"{_repository_path(root, repository)}/_manifests/tags/{tag}/current/link").read_text()
    os.link(folder / "blobs" / digest, folder / "manifests" / tag)


def write_garbage_tree(root: Path, count: int) -> tuple[str, int]:
    """Write `count` blobs below `root`; return the digest of one manifest, and the number of unreferenced blobs."""
    referenced = [write_blob(root, f"needed {number}".encode()) for number in range(count // 2)]
    for number in range(count - len(referenced)):
        write_blob(root, f"garbage {number}".encode())
    config = write_blob(root, b"{}")
    digest = ""
    for start in range(0, len(referenced), _LAYERS_PER_IMAGE):
        digest = write_manifest(root, config, referenced[start : start + _LAYERS_PER_IMAGE])
    return digest, count - len(referenced)


def write_blob(root: Path, content: bytes, *, layer: bool = True, repository: str = REPOSITORY) -> str:
    """Write a blob, and a layer link to it in the repository if `layer` is true; return its digest."""
    sha256_hex = hashlib.sha256(content).hexdigest()
    folder = f"{root}/docker/registry/v2/blobs/sha256/{sha256_hex[:2]}/{sha256_hex}"
    _write_file(folder, "data", content)
    last_used = time.time() - _AGE
    os.utime(f"{folder}/data", (last_used, last_used))
    if layer:
        _write_file(
            f"{_repository_path(root, repository)}/_layers/sha256/{sha256_hex}", "link", f"sha256:{sha256_hex}".encode()
        )
    return f"sha256:{sha256_hex}"


def write_manifest(
    root: Path, config: str, layers: list[str], *, repository: str = REPOSITORY, sizes: tuple[int, int] = (2, 16)
) -> str:
    """Write a manifest with a tag of its own; return its digest. `sizes` are those of the configuration and a layer."""
    layer_type = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": sizes[0]},
        "layers": [{"mediaType": layer_type, "digest": layer, "size": sizes[1]} for layer in layers],
    }
    digest = write_blob(root, json.dumps(manifest).encode(), layer=False)
    sha256_hex, manifests = digest.partition(":")[2], f"{_repository_path(root, repository)}/_manifests"
    tag = f"{manifests}/tags/{sha256_hex[:12]}"
    for folder in (f"{manifests}/revisions/sha256/{sha256_hex}", f"{tag}/current", f"{tag}/index/sha256/{sha256_hex}"):
        _write_file(folder, "link", digest.encode())
    return digest


def _repository_path(root: Path, repository: str) -> str:
    return f"{root}/docker/registry/v2/repositories/{repository}"


def _write_file(folder: str, name: str, content: bytes) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}", "wb") as file:
        file.write(content)
