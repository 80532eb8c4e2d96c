"""Pushes to three nodes with one bucket, while nodes, the store and collectors are killed: what is acknowledged stays.

BUCKET_KILLS is the time in seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
from attrs import define, field

from tests.e2e.harness import images
from tests.e2e.harness.bucket_fleet import running_bucket_fleet
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.http_client import BufferedResponse, read_response, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, OCI_CONFIG, OCI_LAYER, SampleImage, TypedContent
from tests.e2e.harness.object_store import SECRET_KEY
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_image_folder
from tests.e2e.harness.seaweedfs import SeaweedFS, SeaweedGateway

pytestmark = pytest.mark.slow

KIB = 1 << 10
SECONDS = float(os.environ.get("BUCKET_KILLS", "6"))
LAYERS = [TypedContent(OCI_LAYER, images.random_bytes(64 * KIB, f"kills, layer {number}")) for number in range(6)]


class NotAcknowledged(Exception):
    """A request of a push has failed."""


@define(eq=False)
class Pushes:
    """The acknowledged images by repository and tag, which may not be lost; None if only a client knows the content."""

    balancer: int
    expected: dict[tuple[str, str], SampleImage | None] = field(factory=dict)
    counts: Counter[str] = field(factory=Counter)
    ended: threading.Event = field(factory=threading.Event)

    def repeat(self, push: Callable[[int], bool], kind: str) -> None:
        """Push until the end, and once more when nothing is killed."""
        number, is_last, deadline = 0, False, 0.0
        while True:
            number += 1
            if push(number):
                self.counts[kind] += 1
                if is_last:
                    return
            else:
                self.ended.wait(0.1)
                assert not is_last or time.monotonic() < deadline, f"{kind} cannot push although nothing is killed"
            if self.ended.is_set() and not is_last:
                is_last, deadline = True, time.monotonic() + 60

    def push_raw(self, repository: str, number: int) -> bool:
        """Push an image that shares layers with others."""
        choice = Random(f"{repository} {number}")
        config = TypedContent(OCI_CONFIG, json.dumps({"architecture": "amd64", "os": repository, "n": number}).encode())
        image = images.build_image_from_blobs(config, choice.sample(LAYERS, 3))
        try:
            for blob in image.blobs:
                if self.request("HEAD", f"/v2/{repository}/blobs/{blob.digest}", also=404).status == 404:
                    self._push_blob(repository, blob)
            fields = {"Content-Type": image.manifest.media_type}
            self.request("PUT", f"/v2/{repository}/manifests/{number}", image.manifest.data, fields)
        except NotAcknowledged:
            self.counts["failed"] += 1
            return False
        self.expected[repository, str(number)] = image
        return True

    def _push_blob(self, repository: str, blob: TypedContent) -> None:
        target, half = f"/v2/{repository}/blobs/uploads/", len(blob.data) // 2
        for method, part in (("POST", b""), ("PATCH", blob.data[:half]), ("PATCH", blob.data[half:])):
            location = urlsplit(self.request(method, target, part).headers["location"])
            target = f"{location.path}?{location.query}" if location.query else location.path
        self.request("PUT", f"{target}{'&' if '?' in target else '?'}digest={blob.digest}")

    def delete(self, choice: Random) -> None:
        """Delete an image with its tag, so that a collector has something to do."""
        raw = [key for key, image in list(self.expected.items()) if image is not None and key[0].startswith("raw/")]
        if len(raw) < 10:
            self.ended.wait(0.1)
            return
        repository, tag = key = choice.choice(raw)
        image = self.expected.pop(key)
        assert image is not None
        for reference in (tag, image.digest):
            while True:
                try:
                    self.request("DELETE", f"/v2/{repository}/manifests/{reference}", also=404)
                    break
                except NotAcknowledged:
                    self.ended.wait(0.1)
        self.counts["deleted"] += 1

    def request(
        self, method: str, target: str, body: bytes = b"", fields: dict[str, str] | None = None, also: int = 0
    ) -> BufferedResponse:
        """Send a request to the next node. Raise `NotAcknowledged` unless it succeeds, or has the status `also`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.balancer, timeout=60)
        try:
            connection.request(method, target, body or None, fields or {})
            response = read_response(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            raise NotAcknowledged from error
        finally:
            connection.close()
        if response.status >= 300 and response.status != also:
            raise NotAcknowledged(response.status)
        return response


def check_image(node: RegistryDaemon, repository: str, tag: str, image: SampleImage | None, seen: set[str]) -> str:
    """Return what is wrong with the image, as a node without a cache sees it; "" if nothing is."""

    def fetch(path: str) -> bytes | None:
        fields = {"Accept": ACCEPT_MANIFESTS}
        response = request_directly("GET", f"http://{node.http_address}/v2/{repository}/{path}", headers=fields)
        is_good = response.status == 200 and (
            images.sha256_digest(response.body) == response.headers["docker-content-digest"]
        )
        return response.body if is_good else None

    content = fetch(f"manifests/{tag}")
    if content is None or (image is not None and content != image.manifest.data):
        return f"{repository}:{tag}"
    manifest = json.loads(content)
    for descriptor in (manifest["config"], *manifest["layers"]):
        place = f"{repository}@{descriptor['digest']}"
        if place not in seen:
            blob = fetch(f"blobs/{descriptor['digest']}")
            if blob is None or images.sha256_digest(blob) != descriptor["digest"]:
                return f"{place} of {tag}"
            seen.add(place)
    return ""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[SeaweedGateway]:
    """Return the gateway of a store. It is killed alone, because a store of one process needs 20 s for its election."""
    with SeaweedFS(tmp_path / "store").run() as store, SeaweedGateway(store, tmp_path / "gateway").run() as gateway:
        yield gateway


def skopeo_pushes(pushes: Pushes, clients: ClientFactory, node: RegistryDaemon, folder: Path) -> Callable[[int], bool]:
    skopeo = clients.skopeo(node)

    def push(number: int) -> bool:
        image = images.build_small_image(f"kills, skopeo {number}")
        source = write_image_folder(image, folder / f"image{number}")
        target = f"docker://127.0.0.1:{pushes.balancer}/by/skopeo:{number}"
        if skopeo.run("copy", "--dest-tls-verify=false", f"dir:{source}", target).returncode:
            return False
        pushes.expected["by/skopeo", str(number)] = image
        return True

    return push


def engine_pushes(
    pushes: Pushes, run: Callable[..., subprocess.CompletedProcess[str]], folder: Path, kind: str, *options: str
) -> Callable[[int], bool]:
    """Return a function that makes an image and pushes it, by the commands that docker and podman have in common."""

    def push(number: int) -> bool:
        tar = make_layer(folder, f"{kind} {number}")
        name = f"127.0.0.1:{pushes.balancer}/by/{kind}:{number}"
        if run("import", str(tar), name).returncode or run("push", *options, name).returncode:
            return False
        pushes.expected[f"by/{kind}", str(number)] = None
        return True

    return push


def make_layer(folder: Path, seed: str) -> Path:
    place = folder / seed.replace(" ", "-")
    place.mkdir(parents=True)
    (place / "file").write_bytes(images.random_bytes(256 * KIB, seed))
    subprocess.run(["tar", "-C", str(place), "-cf", str(place / "layer.tar"), "file"], check=True)
    return place / "layer.tar"


def kill_until_end(pushes: Pushes, kind: str, choice: Random, kill: Callable[[], bool]) -> None:
    """Call `kill`, with pauses. It returns whether it has killed something."""
    while not pushes.ended.wait(choice.random()):
        if kill():
            pushes.counts[f"killed {kind}"] += 1


def test_nothing_acknowledged_is_lost(
    gateway: SeaweedGateway, clients: ClientFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_programs("skopeo", "podman", "dockerd", root=True)
    settings = gateway.settings(gateway.make_bucket("kills"))
    random = Random(SECONDS)
    with running_bucket_fleet(tmp_path, 3, settings) as fleet, ThreadPoolExecutor(10) as pool:
        pushes = Pushes(fleet.balancer.port)
        node = fleet.nodes[0]
        docker, podman = clients.docker_with({}), clients.podman(node)

        def kill_node() -> bool:
            restart(random.choice(fleet.nodes))
            return True

        def kill_store() -> bool:
            gateway.kill()
            gateway.start()
            return True

        makers = {
            "skopeo": skopeo_pushes(pushes, clients, node, tmp_path),
            "docker": engine_pushes(pushes, docker.run, tmp_path / "docker-layers", "docker"),
            "podman": engine_pushes(pushes, podman.run, tmp_path / "podman-layers", "podman", "--tls-verify=false"),
        }
        running: list[Future[None]] = [pool.submit(pushes.repeat, push, kind) for kind, push in makers.items()]
        for number in range(2):
            repository = f"raw/app{number}"
            running.append(pool.submit(pushes.repeat, lambda n, name=repository: pushes.push_raw(name, n), "raw"))
        running.append(pool.submit(kill_until_end, pushes, "nodes", Random(1), kill_node))
        running.append(pool.submit(kill_until_end, pushes, "stores", Random(2), kill_store))
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not any(task.done() for task in running):
                pushes.delete(random)
        finally:
            pushes.ended.set()
        for task in running:
            task.result()
        lost = find_losses(pushes, tmp_path / "fresh", settings)
    with capsys.disabled():
        print(
            f"\n{SECONDS:g} s of kills: {dict(pushes.counts)}, {len(pushes.expected)} images checked, {len(lost)} lost"
        )
    assert lost == []
    assert all(pushes.counts[kind] for kind in ("raw", "skopeo", "docker", "podman", "killed nodes", "killed stores"))


def restart(node: RegistryDaemon) -> None:
    """Kill a node, and start it again at once."""
    node.kill()
    node.start()


def find_losses(pushes: Pushes, folder: Path, settings: dict[str, str]) -> list[str]:
    """Return what was acknowledged and is not there, whole, for a node that has nothing in its cache."""
    fresh, seen = RegistryDaemon(folder, settings), set[str]()
    with fresh.run_and_check_log(lambda: [SECRET_KEY]):
        checks = [check_image(fresh, *key, image, seen) for key, image in pushes.expected.items()]
    return [loss for loss in checks if loss]
