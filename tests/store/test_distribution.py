"""The tree beside the one that CNCF distribution writes: Debian's `docker-registry`, with skopeo as its client."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links

pytestmark = pytest.mark.skipif(
    not (shutil.which("docker-registry") and shutil.which("skopeo")), reason="needs docker-registry and skopeo"
)

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
REPOSITORY, TAG = "library/tiny", "v1.2.3.4"


@frozen
class Image:
    """A one-layer image."""

    config: bytes
    layer: bytes
    manifest: bytes

    @property
    def blobs(self) -> tuple[bytes, bytes]:
        return self.config, self.layer


def image() -> Image:
    layer = gzip.compress(b"\0" * 10240, mtime=0)
    diff_id = str(Digest.of(b"\0" * 10240))
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    ).encode()
    types = ("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar.gzip")
    described = [
        {"mediaType": media_type, "size": len(content), "digest": str(Digest.of(content))}
        for media_type, content in zip(types, (config, layer), strict=True)
    ]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
    return Image(config, layer, json.dumps(manifest).encode())


def configure(root: Path, port: int = 0) -> Path:
    path = root.with_suffix(".yml")
    path.write_text(json.dumps({
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root)}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }))  # fmt: skip
    return path


@contextmanager
def registry(root: Path) -> Iterator[str]:
    """Run `docker-registry` on `root`; yields its ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"}
    process = subprocess.Popen(
        ["docker-registry", "serve", str(configure(root, port))], stderr=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            assert process.stderr is not None
            log = []
            for line in process.stderr:
                log.append(line)
                if "listening on" in line:
                    break
            else:
                pytest.fail("".join(log))
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def copy(source: str, destination: str) -> None:
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false",
         "--dest-tls-verify=false", source, destination],
        check=True, timeout=60,
    )  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    """The files of a tree with their content, less what belongs to uploads."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found if "_uploads" not in path.parts}


def keep(root: Path, content: Image) -> None:
    """Write `content` as we do."""
    layout = Layout(root)
    blobs, links = Blobs(layout, True), Links(layout, True)
    for blob in content.blobs:
        blobs.put(blob, Digest.of(blob))
        links.link_layer(REPOSITORY, Digest.of(blob))
    blobs.put(content.manifest, Digest.of(content.manifest))
    links.link_manifest(REPOSITORY, Digest.of(content.manifest), MANIFEST)
    links.set_tag(REPOSITORY, TAG, Digest.of(content.manifest))


def test_what_it_writes_is_what_we_read_and_write(tmp_path: Path) -> None:
    content = image()
    source = tmp_path / "image"
    source.mkdir()
    (source / "version").write_text("Directory Transport Version: 1.1\n")
    (source / "manifest.json").write_bytes(content.manifest)
    for blob in content.blobs:
        (source / Digest.of(blob).hex).write_bytes(blob)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with registry(theirs) as host:
        copy(f"dir:{source}", f"docker://{host}/{REPOSITORY}:{TAG}")

    layout = Layout(theirs)
    blobs, links = Blobs(layout, True), Links(layout, True)
    manifest = Digest.of(content.manifest)
    assert list(links.repositories()) == [REPOSITORY]
    assert links.tags(REPOSITORY) == [TAG]
    assert links.tag(REPOSITORY, TAG) == manifest
    assert links.has_manifest(REPOSITORY, manifest)
    assert links.manifest_media_type(REPOSITORY, manifest) is None
    assert all(links.has_layer(REPOSITORY, Digest.of(blob)) for blob in content.blobs)
    sizes = {entry.digest: entry.size for entry in blobs.walk()}
    assert sizes == {Digest.of(blob): len(blob) for blob in (*content.blobs, content.manifest)}

    keep(ours, content)
    written = files(ours)
    del written[Layout(ours).media_type(REPOSITORY, manifest)]
    assert {path.replace(str(ours), str(theirs)): data for path, data in written.items()} == files(theirs)


def test_what_we_write_it_serves_and_its_garbage_collector_keeps(tmp_path: Path) -> None:
    content = image()
    root, pulled = tmp_path / "root", tmp_path / "pulled"
    keep(root, content)
    # An index that has no child yet, in a repository without a layer.
    index = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [],
    }).encode()  # fmt: skip
    blobs, links = Blobs(Layout(root), True), Links(Layout(root), True)
    blobs.put(index, Digest.of(index))
    links.link_manifest("only/index", Digest.of(index), "application/vnd.oci.image.index.v1+json")
    links.set_tag("only/index", "latest", Digest.of(index))
    before = files(root)

    subprocess.run(
        ["docker-registry", "garbage-collect", "--delete-untagged=true", str(configure(root))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert files(root) == before
    with registry(root) as host:
        copy(f"docker://{host}/{REPOSITORY}:{TAG}", f"dir:{pulled}")
    assert (pulled / "manifest.json").read_bytes() == content.manifest
    for blob in content.blobs:
        assert (pulled / Digest.of(blob).hex).read_bytes() == blob

    links.remove_tag(REPOSITORY, TAG)
    subprocess.run(
        ["docker-registry", "garbage-collect", "--delete-untagged=true", str(configure(root))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert [entry.digest for entry in blobs.walk()] == [Digest.of(index)]
