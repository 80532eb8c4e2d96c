"""What the registries have: random blobs and a manifest, as files below a folder that an nginx serves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from attrs import frozen

REPOSITORY, SLOW_REPOSITORY = "bench/blob", "bench/slow"
"""Two repositories with the same content; the registry sends what is in the second one slowly."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"

_MIB = 1 << 20
_LAYER_COUNT = 8  # of the image whose manifest is asked for


@frozen
class Resource:
    """What is asked for; `size` is in bytes."""

    path: str
    size: int

    @property
    def digest(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def slow_path(self) -> str:
        """Its path in the slow repository."""
        return self.path.replace(REPOSITORY, SLOW_REPOSITORY, 1)


def create_root(root: Path) -> None:
    """Make the folder that the registry serves."""
    (root / f"v2/{REPOSITORY}").mkdir(parents=True)
    (root / f"v2/{SLOW_REPOSITORY}").symlink_to(root / f"v2/{REPOSITORY}")


def create_blob(root: Path, size: int) -> Resource:
    """Put a blob of `size` bytes where a registry has it: below `root`, under its digest."""
    chunk = os.urandom(min(size, _MIB))
    return _write_resource(root, "blobs", (chunk for _ in range(size // len(chunk))), size)


def create_manifest(root: Path) -> Resource:
    """Put a manifest there. What it names is not."""

    def descriptor(kind: str, size: int) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(os.urandom(8)).hexdigest()}"
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": size}

    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("config.v1+json", 1536),
        "layers": [descriptor("layer.v1.tar+gzip", _MIB) for _ in range(_LAYER_COUNT)],
    }
    content = json.dumps(manifest).encode()
    return _write_resource(root, "manifests", [content], len(content))


def _write_resource(root: Path, kind: str, chunks: Iterable[bytes], size: int) -> Resource:
    folder = root / f"v2/{REPOSITORY}/{kind}"
    folder.mkdir(exist_ok=True)
    hasher, temporary_file = hashlib.sha256(), folder / "draft"
    with temporary_file.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            hasher.update(chunk)
    digest = f"sha256:{hasher.hexdigest()}"
    temporary_file.rename(folder / digest)
    return Resource(f"/v2/{REPOSITORY}/{kind}/{digest}", size)
