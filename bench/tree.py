"""Trees of `registry:2`: many small blobs, half of which nothing needs any more; images; and one large blob."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from bench.content import OCI_MANIFEST

REPOSITORY = "bench/gc"
_LAYERS = 100  # of each image
_AGE = 86400.0  # seconds since all of it was last used: garbage collectors spare what is new


def adopt(root: Path, repository: str, blob: Path, encoded: str) -> None:
    """Have `repository` below `root` hold the content of the file `blob`, whose sha256 is `encoded`, by a hard link."""
    folder = root / f"docker/registry/v2/blobs/sha256/{encoded[:2]}/{encoded}"
    folder.mkdir(parents=True, exist_ok=True)
    os.link(blob, folder / "data")
    _write(f"{_repository(root, repository)}/_layers/sha256/{encoded}", "link", f"sha256:{encoded}".encode())


def plant(root: Path, repository: str, layers: int, size: int) -> str:
    """Put an image of so many layers, of `size` random bytes each, below `root`; return its tag."""
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    digests = [_blob(root, os.urandom(size), repository=repository) for _ in range(layers)]
    config_digest = _blob(root, json.dumps(config).encode(), repository=repository)
    digest = _image(root, config_digest, digests, repository=repository, sizes=(len(json.dumps(config)), size))
    return digest.partition(":")[2][:12]


def publish(root: Path, repository: str, tag: str, folder: Path) -> None:
    """Have `folder` hold the image of `tag` that is below `root`, by hard links, as a server of files gives it out."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "manifests").mkdir()
    blobs = root / "docker/registry/v2/blobs/sha256"
    for blob in blobs.glob("*/*/data"):
        os.link(blob, folder / f"blobs/sha256:{blob.parent.name}")
    digest = Path(f"{_repository(root, repository)}/_manifests/tags/{tag}/current/link").read_text()
    os.link(folder / "blobs" / digest, folder / "manifests" / tag)


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


def _blob(root: Path, content: bytes, *, layer: bool = True, repository: str = REPOSITORY) -> str:
    """Store a blob that the repository has, or had, a link to; return its digest."""
    encoded = hashlib.sha256(content).hexdigest()
    folder = f"{root}/docker/registry/v2/blobs/sha256/{encoded[:2]}/{encoded}"
    _write(folder, "data", content)
    then = time.time() - _AGE
    os.utime(f"{folder}/data", (then, then))
    if layer:
        _write(f"{_repository(root, repository)}/_layers/sha256/{encoded}", "link", f"sha256:{encoded}".encode())
    return f"sha256:{encoded}"


def _image(
    root: Path, config: str, layers: list[str], *, repository: str = REPOSITORY, sizes: tuple[int, int] = (2, 16)
) -> str:
    """Store a manifest that has a tag of its own; return its digest. `sizes`: of the configuration, of a layer."""
    kind = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": sizes[0]},
        "layers": [{"mediaType": kind, "digest": layer, "size": sizes[1]} for layer in layers],
    }
    digest = _blob(root, json.dumps(manifest).encode(), layer=False)
    encoded, manifests = digest.partition(":")[2], f"{_repository(root, repository)}/_manifests"
    tag = f"{manifests}/tags/{encoded[:12]}"
    for folder in (f"{manifests}/revisions/sha256/{encoded}", f"{tag}/current", f"{tag}/index/sha256/{encoded}"):
        _write(folder, "link", digest.encode())
    return digest


def _repository(root: Path, repository: str) -> str:
    return f"{root}/docker/registry/v2/repositories/{repository}"


def _write(folder: str, name: str, content: bytes) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}", "wb") as file:
        file.write(content)
