"""The tree beside the one that CNCF distribution writes: Debian's `docker-registry`, with skopeo as its client."""

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
from dockerproxy.store.check import Checker, Finding
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.importing import Importer
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.slices import Watch
from dockerproxy.store.sweep import Sweeper, Swept
from tests.store.workbench.images import BOTH, ONE, TWO, Content, age, index
from tests.store.workbench.images import image as oci_image
from tests.store.workbench.reactor import Reactor

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


def push(host: str, repository: str, content: Content, tag: str) -> None:
    """Push as docker does."""
    connection = http.client.HTTPConnection(host)

    def ask(status: int, method: str, target: str, body: bytes = b"", media_type: str = "") -> str:
        connection.request(method, target, body, {"Content-Type": media_type} if media_type else {})
        response = connection.getresponse()
        text = response.read()
        assert response.status == status, text
        return response.getheader("Location") or ""

    for part in content.walk():
        for blob in part.blobs:
            location = ask(202, "POST", f"/v2/{repository}/blobs/uploads/")
            ask(201, "PUT", f"{location}&digest={Digest.of(blob)}", blob)
        reference = tag if part is content else part.digest
        ask(201, "PUT", f"/v2/{repository}/manifests/{reference}", part.data, part.media_type)
    connection.close()


THREE = oci_image(b"config3", b"base", b"layer3")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory that it wrote: an index, tags that moved on, tags that were deleted as seed's recipe does."""
    root = tmp_path / "theirs"
    with registry(root) as host:
        push(host, "multi", BOTH, "v1")
        push(host, "multi", THREE, "v1.1")
        push(host, "moved", ONE, "latest")
        push(host, "moved", TWO, "latest")
        push(host, "deleted", index(TWO, THREE), "v1")
        push(host, "deleted", ONE, "v2")
    shutil.rmtree(f"{Layout(root).tags('deleted')}/v1")
    store = HostedStore.below(Layout(root))
    age(store)
    return root


def left(root: Path) -> dict[str, set[str]]:
    """What is there: the contents, and the manifests and blobs of each repository."""
    store = HostedStore.below(Layout(root))
    found = {repository: {f"m {digest}" for digest in store.links.manifests(repository)}
             | {f"b {digest}" for digest in store.links.layers(repository)}
             for repository in store.links.repositories()}  # fmt: skip
    return {**found, "": {str(entry.digest) for entry in store.blobs.walk()}}


def sweep(root: Path, *, delete_untagged: bool = True) -> Swept:
    reactor = Reactor()
    return reactor.run(Sweeper(reactor, HostedStore.below(Layout(root))).sweep(delete_untagged=delete_untagged))


def findings(root: Path) -> list[Finding]:
    reactor, found = Reactor(), list[Finding]()
    reactor.run(Checker(reactor, Layout(root)).check(Watch(found=found.append)))
    return found


@pytest.mark.parametrize("delete_untagged", [False, True])
def test_our_garbage_collection_beside_its_own(theirs: Path, tmp_path: Path, delete_untagged: bool) -> None:
    """What it takes for garbage is garbage to us, but for the children of an index: those it deletes, and breaks it
    (distribution 3178)."""
    copied = tmp_path / "copied"
    shutil.copytree(theirs, copied)
    subprocess.run(
        ["docker-registry", "garbage-collect", f"--delete-untagged={str(delete_untagged).lower()}",
         str(configure(copied))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert sweep(theirs, delete_untagged=delete_untagged).problems == ()
    ours, its = left(theirs), left(copied)
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


def test_its_directory_imported_and_checked(theirs: Path, tmp_path: Path) -> None:
    store = HostedStore.below(Layout(tmp_path / "ours"))
    reactor = Reactor()
    imported = reactor.run(Importer(reactor, store).take(theirs))
    assert (imported.untaken, imported.repositories, imported.tags) == (0, 3, 4)
    assert findings(store.layout.root) == findings(theirs) == []
    assert left(store.layout.root) == left(theirs)
    with registry(store.layout.root) as host:
        for tag in ("v1", "v1.1"):
            connection = http.client.HTTPConnection(host)
            connection.request(
                "GET", f"/v2/multi/manifests/{tag}", headers={"Accept": f"{BOTH.media_type}, {ONE.media_type}"}
            )
            assert connection.getresponse().status == 200
