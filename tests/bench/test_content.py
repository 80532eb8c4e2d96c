"""The blobs, manifests and storage trees that the benchmark creates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench import registry_tree
from bench.content import OCI_MANIFEST, create_blob, create_manifest, create_root


def sha256_digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_blob_is_stored_in_both_repositories(tmp_path: Path) -> None:
    create_root(tmp_path / "root")
    blob = create_blob(tmp_path / "root", 3 << 20)
    for path in (blob.path, blob.slow_path):
        content = (tmp_path / "root" / path.lstrip("/")).read_bytes()
        assert len(content) == blob.size == 3 << 20
        assert sha256_digest(content) == blob.digest
    assert blob.path != blob.slow_path


def test_a_manifest(tmp_path: Path) -> None:
    create_root(tmp_path / "root")
    manifest = create_manifest(tmp_path / "root")
    content = (tmp_path / "root" / manifest.path.lstrip("/")).read_bytes()
    assert (sha256_digest(content), len(content)) == (manifest.digest, manifest.size)
    assert json.loads(content)["mediaType"] == OCI_MANIFEST


def test_written_image_is_complete(tmp_path: Path) -> None:
    tag = registry_tree.write_image(tmp_path, "some/image", layers=3, size=100)
    base = tmp_path / "docker/registry/v2"
    link = (base / f"repositories/some/image/_manifests/tags/{tag}/current/link").read_text()
    sha256_hex = link.partition(":")[2]
    manifest = json.loads((base / f"blobs/sha256/{sha256_hex[:2]}/{sha256_hex}/data").read_text())
    assert len(manifest["layers"]) == 3
    for descriptor in (manifest["config"], *manifest["layers"]):
        sha256_hex = descriptor["digest"].partition(":")[2]
        content = (base / f"blobs/sha256/{sha256_hex[:2]}/{sha256_hex}/data").read_bytes()
        assert (sha256_digest(content), len(content)) == (descriptor["digest"], descriptor["size"])
        assert (base / f"repositories/some/image/_layers/sha256/{sha256_hex}/link").read_text() == descriptor["digest"]


def test_large_blob_is_hard_linked(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"content")
    sha256_hex = hashlib.sha256(b"content").hexdigest()
    registry_tree.link_blob(tmp_path / "registry", "some/blob", file, sha256_hex)
    data = tmp_path / f"registry/docker/registry/v2/blobs/sha256/{sha256_hex[:2]}/{sha256_hex}/data"
    assert data.samefile(file)


def test_exported_image_is_complete(tmp_path: Path) -> None:
    tag = registry_tree.write_image(tmp_path, "some/image", layers=3, size=100)
    folder = tmp_path / "published"
    registry_tree.export_as_files(tmp_path, "some/image", tag, folder)
    manifest = json.loads((folder / f"manifests/{tag}").read_text())
    for descriptor in (manifest["config"], *manifest["layers"]):
        assert sha256_digest((folder / f"blobs/{descriptor['digest']}").read_bytes()) == descriptor["digest"]
