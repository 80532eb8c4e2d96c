"""The content of the registries: random blobs and a manifest, as files below a folder that an nginx serves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from attrs import frozen

REPOSITORY, SLOW_REPOSITORY = "bench/blob", "bench/slow"
"""Two repositories with the same content. The registry sends the content of the second one slowly."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"

_MIB = 1 << 20
_LAYER_COUNT = 8  # layers in the manifest


@frozen
class Resource:
    """A blob or manifest that clients request; `size` is in bytes."""

    path: str
    size: int

    @property
    def digest(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def slow_path(self) -> str:
        """The path of the same content in the slow repository."""
        return self.path.replace(REPOSITORY, SLOW_REPOSITORY, 1)


def create_root(root: Path) -> None:
    """Create the folder that the registry serves."""
    (root / f"v2/{REPOSITORY}").mkdir(parents=True)
    (root / f"v2/{SLOW_REPOSITORY}").symlink_to(root / f"v2/{REPOSITORY}")


def create_blob(root: Path, size: int) -> Resource:
    """Write a random blob of `size` bytes below `root`, at the path that the registry API has for it."""
    chunk = os.urandom(min(size, _MIB))
    return _write_resource(root, "blobs", (chunk for _ in range(size // len(chunk))), size)


def create_manifest(root: Path) -> Resource:
    """Write a manifest below `root`. The blobs that it references do not exist."""

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
