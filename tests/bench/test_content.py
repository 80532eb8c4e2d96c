"""What the registry of the benchmark has, and what images are planted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench import tree
from bench.content import OCI_MANIFEST, make_blob, make_manifest, make_root


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_blobs_lie_under_their_digest_in_both_repositories(tmp_path: Path) -> None:
    make_root(tmp_path / "root")
    blob = make_blob(tmp_path / "root", 3 << 20)
    for path in (blob.path, blob.slow):
        content = (tmp_path / "root" / path.lstrip("/")).read_bytes()
        assert len(content) == blob.size == 3 << 20
        assert digest(content) == blob.digest
    assert blob.path != blob.slow


def test_a_manifest(tmp_path: Path) -> None:
    make_root(tmp_path / "root")
    manifest = make_manifest(tmp_path / "root")
    content = (tmp_path / "root" / manifest.path.lstrip("/")).read_bytes()
    assert (digest(content), len(content)) == (manifest.digest, manifest.size)
    assert json.loads(content)["mediaType"] == OCI_MANIFEST


def test_a_planted_image_has_what_its_manifest_names(tmp_path: Path) -> None:
    tag = tree.plant(tmp_path, "some/image", layers=3, size=100)
    base = tmp_path / "docker/registry/v2"
    link = (base / f"repositories/some/image/_manifests/tags/{tag}/current/link").read_text()
    encoded = link.partition(":")[2]
    manifest = json.loads((base / f"blobs/sha256/{encoded[:2]}/{encoded}/data").read_text())
    assert len(manifest["layers"]) == 3
    for named in (manifest["config"], *manifest["layers"]):
        encoded = named["digest"].partition(":")[2]
        content = (base / f"blobs/sha256/{encoded[:2]}/{encoded}/data").read_bytes()
        assert (digest(content), len(content)) == (named["digest"], named["size"])
        assert (base / f"repositories/some/image/_layers/sha256/{encoded}/link").read_text() == named["digest"]


def test_a_large_blob_is_adopted_without_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"content")
    encoded = hashlib.sha256(b"content").hexdigest()
    tree.adopt(tmp_path / "registry", "some/blob", file, encoded)
    data = tmp_path / f"registry/docker/registry/v2/blobs/sha256/{encoded[:2]}/{encoded}/data"
    assert data.samefile(file)


def test_a_published_image_is_what_a_server_of_files_gives_out(tmp_path: Path) -> None:
    tag = tree.plant(tmp_path, "some/image", layers=3, size=100)
    folder = tmp_path / "published"
    tree.publish(tmp_path, "some/image", tag, folder)
    manifest = json.loads((folder / f"manifests/{tag}").read_text())
    for named in (manifest["config"], *manifest["layers"]):
        assert digest((folder / f"blobs/{named['digest']}").read_bytes()) == named["digest"]
