"""Compatibility with the tree of CNCF distribution, tested with Debian's `docker-registry` and skopeo."""

from __future__ import annotations

import gzip
import http.client
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
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.importer import import_registry
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress
from dockerproxy.store.repository_check import Finding
from dockerproxy.store.scrub import scrub
from dockerproxy.store.sweep import sweep
from tests.store.support.images import BOTH, ONE, TWO, ManifestTree, age_blobs, index
from tests.store.support.images import image as oci_image

pytestmark = pytest.mark.skipif(
    not (shutil.which("docker-registry") and shutil.which("skopeo")), reason="needs docker-registry and skopeo"
)

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
REPOSITORY, TAG = "library/tiny", "v1.2.3.4"


@frozen
class DockerImage:
    """A one-layer image."""

    config: bytes
    layer: bytes
    manifest: bytes

    @property
    def blobs(self) -> tuple[bytes, bytes]:
        return self.config, self.layer


def docker_image() -> DockerImage:
    layer = gzip.compress(b"\0" * 10240, mtime=0)
    diff_id = str(Digest.of(b"\0" * 10240))
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    ).encode()
    types = ("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar.gzip")
    descriptors = [
        {"mediaType": media_type, "size": len(content), "digest": str(Digest.of(content))}
        for media_type, content in zip(types, (config, layer), strict=True)
    ]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptors[0], "layers": descriptors[1:]}
    return DockerImage(config, layer, json.dumps(manifest).encode())


def write_config(root: Path, port: int = 0) -> Path:
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
    """Run `docker-registry` on `root` and yield its ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"}
    process = subprocess.Popen(
        ["docker-registry", "serve", str(write_config(root, port))], stderr=subprocess.PIPE, text=True, env=environment
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
    """Return the files of a tree with their content, except those of upload sessions."""
    paths = (path for path in root.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths if "_uploads" not in path.parts}


def put_docker_image(root: Path, image: DockerImage) -> None:
    """Store `image` with our own code."""
    layout = Layout(root)
    blobs, links = Blobs(layout, True), Links(layout, True)
    for blob in image.blobs:
        blobs.put(blob, Digest.of(blob))
        links.link_layer(REPOSITORY, Digest.of(blob))
    blobs.put(image.manifest, Digest.of(image.manifest))
    links.link_manifest(REPOSITORY, Digest.of(image.manifest), MANIFEST)
    links.set_tag(REPOSITORY, TAG, Digest.of(image.manifest))


def test_reads_and_writes_the_same_tree(tmp_path: Path) -> None:
    content = docker_image()
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
    sizes = {entry.key: entry.size for entry in blobs.walk()}
    assert sizes == {Digest.of(blob): len(blob) for blob in (*content.blobs, content.manifest)}

    put_docker_image(ours, content)
    our_files = files(ours)
    del our_files[Layout(ours).media_type(REPOSITORY, manifest)]
    assert {path.replace(str(ours), str(theirs)): data for path, data in our_files.items()} == files(theirs)


def test_distribution_serves_and_retains_our_tree(tmp_path: Path) -> None:
    content = docker_image()
    root, pulled = tmp_path / "root", tmp_path / "pulled"
    put_docker_image(root, content)
    # Add an index without children, in a repository without layers.
    index = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [],
    }).encode()  # fmt: skip
    blobs, links = Blobs(Layout(root), True), Links(Layout(root), True)
    blobs.put(index, Digest.of(index))
    links.link_manifest("only/index", Digest.of(index), "application/vnd.oci.image.index.v1+json")
    links.set_tag("only/index", "latest", Digest.of(index))
    before = files(root)

    subprocess.run(
        ["docker-registry", "garbage-collect", "--delete-untagged=true", str(write_config(root))],
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
        ["docker-registry", "garbage-collect", "--delete-untagged=true", str(write_config(root))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert [entry.key for entry in blobs.walk()] == [Digest.of(index)]


def push(host: str, repository: str, content: ManifestTree, tag: str) -> None:
    """Push a manifest and its blobs in the same order as docker."""
    connection = http.client.HTTPConnection(host)

    def request(status: int, method: str, target: str, body: bytes = b"", media_type: str = "") -> str:
        connection.request(method, target, body, {"Content-Type": media_type} if media_type else {})
        response = connection.getresponse()
        text = response.read()
        assert response.status == status, text
        return response.getheader("Location") or ""

    for part in content.walk():
        for blob in part.blobs:
            location = request(202, "POST", f"/v2/{repository}/blobs/uploads/")
            request(201, "PUT", f"{location}&digest={Digest.of(blob)}", blob)
        reference = tag if part is content else part.digest
        request(201, "PUT", f"/v2/{repository}/manifests/{reference}", part.data, part.media_type)
    connection.close()


THREE = oci_image(b"config3", b"base", b"layer3")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory written by distribution: an index, a moved tag, and a tag deleted by removing its directory."""
    root = tmp_path / "theirs"
    with registry(root) as host:
        push(host, "multi", BOTH, "v1")
        push(host, "multi", THREE, "v1.1")
        push(host, "moved", ONE, "latest")
        push(host, "moved", TWO, "latest")
        push(host, "deleted", index(TWO, THREE), "v1")
        push(host, "deleted", ONE, "v2")
    shutil.rmtree(f"{Layout(root).tags('deleted')}/v1")
    store = HostedTree.from_layout(Layout(root))
    age_blobs(store)
    return root


def list_objects(root: Path) -> dict[str, set[str]]:
    """Return the manifests and blobs of each repository, and all stored blobs under the key ``""``."""
    store = HostedTree.from_layout(Layout(root))
    objects = {repository: {f"m {digest}" for digest in store.links.manifests(repository)}
             | {f"b {digest}" for digest in store.links.layers(repository)}
             for repository in store.links.repositories()}  # fmt: skip
    return {**objects, "": {str(entry.key) for entry in store.blobs.walk()}}


def findings(root: Path) -> list[Finding]:
    results: list[Finding] = []
    scrub(Layout(root), progress=Progress(emit=results.append))
    return results


@pytest.mark.parametrize("delete_untagged", [False, True])
def test_garbage_collection_against_distribution(theirs: Path, tmp_path: Path, delete_untagged: bool) -> None:
    """Our collection deletes the same objects as distribution's, except the children of an index.

    distribution deletes these and thereby breaks the index (distribution issue 3178).
    """
    copy_root = tmp_path / "copied"
    shutil.copytree(theirs, copy_root)
    subprocess.run(
        ["docker-registry", "garbage-collect", f"--delete-untagged={str(delete_untagged).lower()}",
         str(write_config(copy_root))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert sweep(Layout(theirs), delete_untagged=delete_untagged).problems == ()
    ours, its = list_objects(theirs), list_objects(copy_root)
    children = {str(child.digest) for child in BOTH.children} if delete_untagged else set()
    assert ours[""] - its[""] <= children | {str(Digest.of(blob)) for child in BOTH.children for blob in child.blobs}
    assert its[""] <= ours[""]
    for repository in ours:
        manifests = {name for name in ours[repository] if name.startswith("m ")}
        its_own = {name for name in its[repository] if name.startswith("m ")}
        assert manifests - its_own <= {f"m {child}" for child in children}
        assert its_own <= manifests
    assert findings(theirs) == []
    with registry(theirs) as host:
        connection = http.client.HTTPConnection(host)
        for child in BOTH.children:
            connection.request("GET", f"/v2/multi/manifests/{child.digest}", headers={"Accept": child.media_type})
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, child.data)
    if delete_untagged:
        assert {repository: len(names) for repository, names in ours.items()} == {
            "multi": 4 + 7, "moved": 1 + 3, "deleted": 1 + 3, "": 4 + 7
        }  # fmt: skip


def test_imports_a_distribution_directory(theirs: Path, tmp_path: Path) -> None:
    store = HostedTree.from_layout(Layout(tmp_path / "ours"))
    result = import_registry(store.layout, theirs)
    assert (result.untaken, result.repositories, result.tags) == (0, 3, 4)
    assert findings(store.layout.root) == findings(theirs) == []
    assert list_objects(store.layout.root) == list_objects(theirs)
    with registry(store.layout.root) as host:
        for tag in ("v1", "v1.1"):
            connection = http.client.HTTPConnection(host)
            connection.request(
                "GET", f"/v2/multi/manifests/{tag}", headers={"Accept": f"{BOTH.media_type}, {ONE.media_type}"}
            )
            assert connection.getresponse().status == 200
