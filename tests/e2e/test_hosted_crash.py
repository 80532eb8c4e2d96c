"""The daemon is killed at random moments of pushes and deletions. Every acknowledged operation must be complete."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from attrs import Factory, define

from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress
from dockerproxy.store.repository_check import Finding
from dockerproxy.store.scrub import scrub
from tests.e2e.harness import http_client, images
from tests.e2e.harness.docker_registry import DockerRegistry
from tests.e2e.harness.forked_daemon import ForkedDaemon
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage, TypedContent
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon

RUN_COUNT = 3
KILL_COUNT = int(os.environ.get("HOSTED_KILLS", "30"))
"""Kills of the daemon in each run; each takes a quarter of a second."""
WRITER_COUNT = 3
MAX_OPERATIONS_BEFORE_KILL = 5  # operations that the writers complete between the start and a kill


def check_tree(root: Path) -> list[Finding]:
    """Return the findings of `dockerproxy check` in the tree."""
    problems: list[Finding] = []
    scrub(Layout(root), progress=Progress(emit=problems.append))
    return problems


@define
class Writer:
    """Pushes and deletes in its own repository until the connection breaks, and records acknowledged operations."""

    repository: str
    port: int
    rng: random.Random
    acknowledged_tags: dict[str, str | None] = Factory(dict)
    """The acknowledged digest of each tag; None if the tag was deleted."""
    pending_tags: dict[str, str | None] = Factory(dict)
    blobs: set[str] = Factory(set)
    manifests: set[str] = Factory(set)
    pushed_images: dict[str, SampleImage] = Factory(dict)
    failures: list[str] = Factory(list)
    operation_count: int = 0

    def run(self) -> None:
        """Run random operations until the connection breaks."""
        connection = http_client.DirectConnection("127.0.0.1", ("127.0.0.1", self.port), None)
        try:
            while not self.failures:
                self._run_operation(connection)
                self.operation_count += 1
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()

    def _run_operation(self, connection: http.client.HTTPConnection) -> None:
        tag = f"tag{self.rng.randrange(3)}"
        tagged_digest = self.acknowledged_tags.get(tag)
        draw = self.rng.random()
        if tagged_digest is None or draw < 0.8:
            size = 1_000_000 if draw < 0.1 else self.rng.randrange(20, 20_000)
            self._push_image(connection, tag, images.build_small_image(str(self.rng.random()), size=size, layers=1))
        else:
            self.pending_tags = {tag: None}
            if draw < 0.9:
                self._request(connection, 202, "DELETE", f"manifests/{tag}")
            else:
                self.manifests.discard(tagged_digest)
                self._request(connection, 202, "DELETE", f"manifests/{tagged_digest}")
            self._commit_pending()

    def _push_image(self, connection: http.client.HTTPConnection, tag: str, image: SampleImage) -> None:
        for blob in image.blobs:
            self._push_blob(connection, blob)
            self.blobs.add(blob.digest)
        self.pushed_images[image.digest] = image
        self.pending_tags = {tag: image.digest}
        fields = {"Content-Type": image.manifest.media_type}
        self._request(connection, 201, "PUT", f"manifests/{tag}", image.manifest.data, fields)
        self.manifests.add(image.digest)
        self._commit_pending()

    def _push_blob(self, connection: http.client.HTTPConnection, blob: TypedContent) -> None:
        if self.rng.random() < 0.3:
            self._request(connection, 201, "POST", f"blobs/uploads/?digest={blob.digest}", blob.data)
            return
        target, remainder = self._request(connection, 202, "POST", "blobs/uploads/"), blob.data
        if self.rng.random() < 0.5:
            split = self.rng.randrange(len(remainder))
            target, remainder = self._request(connection, 202, "PATCH", target, remainder[:split]), remainder[split:]
        self._request(connection, 201, "PUT", f"{target}?digest={blob.digest}", remainder)

    def _request(
        self,
        connection: http.client.HTTPConnection,
        status: int,
        method: str,
        target: str,
        body: bytes = b"",
        fields: dict[str, str] | None = None,
    ) -> str:
        """Send a request that must return `status`, and return the Location of the response."""
        path = target if target.startswith("/") else f"/v2/{self.repository}/{target}"
        connection.request(method, path, body, fields or {})
        response = http_client.read_response(connection.getresponse())
        if response.status != status:
            self.failures.append(f"{method} {path}: {response}")
            raise http.client.HTTPException
        return response.headers.get("location", "")

    def _commit_pending(self) -> None:
        self.acknowledged_tags.update(self.pending_tags)
        self.pending_tags = {}

    def verify(self, links: Links) -> None:
        """Compare the tree with the acknowledged operations. A pending operation must be complete or not begun."""
        assert not self.failures
        for tag in {*self.acknowledged_tags, *self.pending_tags}:
            current_digest = links.tag(self.repository, tag)
            tagged_digest = None if current_digest is None else str(current_digest)
            assert tagged_digest in (
                self.acknowledged_tags.get(tag),
                self.pending_tags.get(tag, self.acknowledged_tags.get(tag)),
            ), (tag, self)
            self.acknowledged_tags[tag] = tagged_digest
        self.pending_tags = {}
        for digest in self.blobs:
            assert links.has_layer(self.repository, Digest.parse(digest)), digest
        for digest in self.manifests:
            assert links.has_manifest(self.repository, Digest.parse(digest)), digest


@pytest.mark.parametrize("seed", range(RUN_COUNT))
def test_kill_at_random_moments(tmp_path: Path, seed: int) -> None:
    require_programs("docker-registry")
    docker_registry = DockerRegistry(tmp_path / "docker-registry", "127.0.0.1")
    daemon = RegistryDaemon(tmp_path / "daemon", {"REGISTRY_DIR": str(docker_registry.storage)})
    rng = random.Random(seed)
    writers = [
        Writer(f"crash/of{number}", daemon.http_port, random.Random(rng.random())) for number in range(WRITER_COUNT)
    ]
    with ForkedDaemon(daemon) as forked_daemon:
        for _ in range(KILL_COUNT):
            forked_daemon.start()
            kill_while_busy(forked_daemon, writers, rng.randrange(MAX_OPERATIONS_BEFORE_KILL), rng.uniform(0, 0.03))
            assert check_tree(docker_registry.storage) == []
            links = Links(Layout(docker_registry.storage), durable=True)
            for writer in writers:
                writer.verify(links)
        forked_daemon.start()
    assert "Traceback" not in daemon.output_text
    assert list((docker_registry.storage / "staging").iterdir()) == []
    assert sum(writer.operation_count for writer in writers) >= KILL_COUNT
    verify_with_docker_registry(docker_registry, writers)


def kill_while_busy(daemon: ForkedDaemon, writers: Sequence[Writer], operations: int, delay: float) -> None:
    """Kill the daemon `delay` seconds after the writers have completed `operations`, in the middle of another one."""
    target_count = sum(writer.operation_count for writer in writers) + operations
    threads = [threading.Thread(target=writer.run) for writer in writers]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: sum(writer.operation_count for writer in writers) >= target_count, f"{operations} more operations"
    )
    time.sleep(delay)
    daemon.kill()
    for thread in threads:
        thread.join()


def verify_with_docker_registry(docker_registry: DockerRegistry, writers: Sequence[Writer]) -> None:
    """Pull all acknowledged content from Debian's docker-registry, which serves the same tree."""
    docker_registry.start()
    connection = http_client.DirectConnection("127.0.0.1", ("127.0.0.1", docker_registry.port), None)
    try:
        for writer in writers:
            tags = {tag: digest for tag, digest in writer.acknowledged_tags.items() if digest is not None}
            for reference, digest in [*tags.items(), *((digest, digest) for digest in writer.manifests)]:
                content = fetch(connection, f"/v2/{writer.repository}/manifests/{reference}")
                assert images.sha256_digest(content) == digest
                assert json.loads(content)["schemaVersion"] == 2
            for digest in writer.blobs:
                content = fetch(connection, f"/v2/{writer.repository}/blobs/{digest}")
                assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
    finally:
        with contextlib.suppress(OSError):
            connection.close()
        docker_registry.stop()


def fetch(connection: http.client.HTTPConnection, target: str) -> bytes:
    connection.request("GET", target, headers={"Accept": ACCEPT_MANIFESTS})
    response = http_client.read_response(connection.getresponse())
    assert response.status == 200, (target, response)
    return response.body
