"""Pushes to three nodes with one bucket, while nodes, the store and collectors are killed: what is acknowledged stays.

BUCKET_KILLS is the time in seconds. The store is killed as a whole at first, and then any of its processes, or all. In
a second test nodes do not take part in the protocol of gc, and lose something. If they did not, the first one would
prove nothing. It kills, too, if the time is longer than a minute: each dead collector makes the next one wait.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
from attrs import define, field

from tests.e2e.harness import images
from tests.e2e.harness.bucket_fleet import BucketFleet, running_bucket_fleet
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.http_client import BufferedResponse, read_response, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS, OCI_CONFIG, OCI_LAYER, SampleImage, TypedContent
from tests.e2e.harness.multi_process import child_pids
from tests.e2e.harness.object_store import SECRET_KEY, KillableStore
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_image_folder
from tests.e2e.harness.seaweedfs import SeaweedCluster
from tests.e2e.test_bucket import command_line

pytestmark = pytest.mark.slow

KIB = 1 << 10
SECONDS = float(os.environ.get("BUCKET_KILLS", "6"))
LAYERS = [TypedContent(OCI_LAYER, images.random_bytes(16 * KIB, f"kills, layer {number}")) for number in range(12)]
# The longest pauses between kills, in seconds. A run of gc takes about 6, and some shall come to their end.
NODE_PAUSE, STORE_PAUSE = (8, 12) if SECONDS > 60 else (2, 3)
LIVE_IMAGES = 3  # so that most layers are garbage most of the time, and needed again a moment later

TIME_SCALE = 0.01  # of all times of gc
GRACE = "2s"

WEAKENED = """
from dockerproxy.bucket import gc_view

async def look(self):
    return gc_view.Published()

gc_view.GCView.look = look
"""
"""A sitecustomize.py by which nodes never see that something is condemned."""


class NotAcknowledged(Exception):
    """A request of a push has failed."""


@define(eq=False)
class Pushes:
    """The acknowledged images by repository and tag, which may not be lost; None if only a client knows the content."""

    balancer: int
    expected: dict[tuple[str, str], SampleImage | None] = field(factory=dict)
    lost: list[str] = field(factory=list)
    acknowledged: Counter[str] = field(factory=Counter)
    killed: Counter[str] = field(factory=Counter)
    counts: Counter[str] = field(factory=Counter)
    ended: threading.Event = field(factory=threading.Event)

    def repeat(self, push: Callable[[int], bool], kind: str) -> None:
        """Push as the client `kind` until the end, and once more when nothing is killed."""
        number, is_last, deadline = 0, False, 0.0
        while True:
            number += 1
            if push(number):
                self.acknowledged[kind] += 1
                if is_last:
                    return
            else:
                self.counts[f"failed pushes of {kind}"] += 1
                self.ended.wait(0.1)
                assert not is_last or time.monotonic() < deadline, f"{kind} cannot push although nothing is killed"
            if self.ended.is_set() and not is_last:
                is_last, deadline = True, time.monotonic() + 60

    def live_images(self) -> list[tuple[str, str]]:
        """Return the images that may be deleted."""
        return [key for key in list(self.expected) if key[0].startswith("raw/")]

    def push_raw(self, repository: str, number: int) -> bool:
        """Push an image that shares layers with others, when there are few enough."""
        while len(self.live_images()) >= 2 * LIVE_IMAGES and not self.ended.is_set():
            self.ended.wait(0.05)
        choice = Random(f"{repository} {number}")
        config = TypedContent(OCI_CONFIG, json.dumps({"architecture": "amd64", "os": repository, "n": number}).encode())
        image = images.build_image_from_blobs(config, choice.sample(LAYERS, 2))
        try:
            for blob in image.blobs:
                if self.request("HEAD", f"/v2/{repository}/blobs/{blob.digest}", also=404).status == 404:
                    self._push_blob(repository, blob)
            fields = {"Content-Type": image.manifest.media_type}
            self.request("PUT", f"/v2/{repository}/manifests/{number}", image.manifest.data, fields)
        except NotAcknowledged:
            return False
        self.expected[repository, str(number)] = image
        return True

    def _push_blob(self, repository: str, blob: TypedContent) -> None:
        target, half = f"/v2/{repository}/blobs/uploads/", len(blob.data) // 2
        for method, part in (("POST", b""), ("PATCH", blob.data[:half]), ("PATCH", blob.data[half:])):
            location = urlsplit(self.request(method, target, part).headers["location"])
            target = f"{location.path}?{location.query}" if location.query else location.path
        self.request("PUT", f"{target}{'&' if '?' in target else '?'}digest={blob.digest}")

    def delete_some(self, choice: Random) -> None:
        """Delete images with their tags until the end, so that collectors have something to do."""
        while not self.ended.is_set():
            raw = self.live_images()
            if len(raw) < LIVE_IMAGES:
                self.ended.wait(0.05)
                continue
            key = choice.choice(raw)
            image = self.expected[key]
            assert image is not None
            if self.is_whole(*key, image):
                del self.expected[key]
                for reference in (key[1], image.digest):
                    self.insist("DELETE", f"/v2/{key[0]}/manifests/{reference}")
                self.counts["deleted"] += 1

    def is_whole(self, repository: str, tag: str, image: SampleImage) -> bool:
        """Return whether the bucket has the image, and note it if something is lost."""
        for path in (f"manifests/{tag}", *(f"blobs/{blob.digest}" for blob in image.blobs)):
            if self.insist("HEAD", f"/v2/{repository}/{path}").status == 404:
                self.lost.append(f"{path} of {repository}:{tag}")
                self.ended.set()
                return False
        return True

    def insist(self, method: str, target: str) -> BufferedResponse:
        """Send a request until it succeeds, or finds nothing."""
        while True:
            try:
                return self.request(method, target, also=404)
            except NotAcknowledged:
                time.sleep(0.1)

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


@pytest.fixture(params=["seaweedfs", "ceph"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KillableStore]:
    """Return a store of several processes. The main thread starts them, because they end with the thread that does."""
    if request.param == "ceph":
        yield request.getfixturevalue("ceph")
        return
    with SeaweedCluster(tmp_path / "store").run() as store:
        yield store


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


def repeat_until_end(pushes: Pushes, choice: Random, pause: float, act: Callable[[], None]) -> None:
    """Call `act`, with pauses of at most `pause` seconds."""
    while not pushes.ended.wait(pause * choice.random()):
        act()


def collect(pushes: Pushes, node: RegistryDaemon, choice: Random, *, kills: bool) -> None:
    """Run gc at `node`. If `kills`, kill its process at some moment or other."""
    with subprocess.Popen(
        command_line(node, "gc", "--grace", GRACE, "--delete-untagged", "--json"),
        env=node.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while kills and process.poll() is None and not pushes.ended.is_set():
            collector = find_collector(node)
            if collector is None:
                time.sleep(0.05)
                continue
            pushes.ended.wait(8 * choice.random())  # at any moment of its run
            with suppress(ProcessLookupError):
                os.kill(collector, signal.SIGKILL)
                pushes.killed["collectors"] += 1
                return
        output = process.communicate()[0]
    if process.returncode:
        pushes.counts["failed runs of gc"] += 1
        return
    pushes.counts["runs of gc"] += 1
    pushes.counts["collected blobs"] += json.loads(output)["blobs"]


def find_collector(node: RegistryDaemon) -> int | None:
    """Return the process that collects for `node`."""
    with suppress(OSError):  # the node is killed, or the process ends
        for pid in child_pids(node.pid):
            if b"dockerproxy.bucket_operations" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def push_while_killing(
    pushes: Pushes,
    fleet: BucketFleet,
    store: KillableStore,
    engines: Mapping[str, Callable[[int], bool]],
    seconds: float,
    *,
    kills: bool = True,
) -> None:
    """Push, delete and collect for `seconds` or until something is lost.

    Two clients push images that share layers, and most of these are deleted again. If `kills`, nodes and the store are
    killed all the time, and half of the runs of gc after the first. At the end gc has collected something.
    """
    nodes, stores, collectors = Random(1), Random(2), Random(3)
    started = time.monotonic()
    known = 0  # acknowledged images before the store was last killed: it is killed again after the next one

    def is_going_on(running: Sequence[Future[None]]) -> bool:
        limit = seconds + 60 if kills and not pushes.killed["whole stores"] else seconds
        return (
            time.monotonic() - started < limit
            and not pushes.ended.is_set()
            and not any(task.done() for task in running)
        )

    def kill_nodes() -> None:
        chosen = nodes.sample(fleet.nodes, nodes.choice((1, 1, 1, 2, 3)))
        for node in chosen:
            node.kill()
        pushes.killed["nodes"] += len(chosen)
        for node in chosen:
            node.start()

    def run_gc() -> None:
        is_killed = kills and pushes.counts["runs of gc"] > 0 and collectors.random() < 0.5
        collect(pushes, collectors.choice(fleet.nodes), collectors, kills=is_killed)

    raw = {name: partial(pushes.push_raw, name) for name in ("raw/app0", "raw/app1")}
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(pushes.repeat, push, kind) for kind, push in {**engines, **raw}.items()]
        running.append(pool.submit(pushes.delete_some, Random(4)))
        running.append(pool.submit(repeat_until_end, pushes, Random(1), 1, run_gc))
        if kills:
            running.append(pool.submit(repeat_until_end, pushes, Random(2), NODE_PAUSE, kill_nodes))
        try:
            while is_going_on(running):
                if kills and pushes.acknowledged.total() > known:
                    pushes.ended.wait(STORE_PAUSE * stores.random())
                    kill_store(pushes, store, stores)
                    known = pushes.acknowledged.total()
                pushes.ended.wait(0.1)
        finally:
            pushes.ended.set()
        for task in running:
            task.result()
        while not pushes.counts["collected blobs"]:  # a killed one counts as alive for some seconds
            collect(pushes, fleet.nodes[0], collectors, kills=False)


def kill_store(pushes: Pushes, store: KillableStore, choice: Random) -> None:
    """Kill all processes of the store at once, or some of them, and start them again."""
    parts = list(store.parts)
    is_whole = not pushes.killed["whole stores"] or choice.random() < 0.4
    store.kill(parts if is_whole else choice.sample(parts, choice.randint(1, len(parts) - 1)))
    store.start()
    pushes.killed["whole stores" if is_whole else "parts of stores"] += 1


def find_all_losses(pushes: Pushes, folder: Path, settings: dict[str, str], title: str) -> list[str]:
    """Return what is lost, and print the numbers."""
    lost = [*pushes.lost, *find_losses(pushes, folder, settings)]
    numbers = {"killed": pushes.killed, "acknowledged": pushes.acknowledged, "besides": pushes.counts}
    print(f"\n{title}:", *(f"{name}: {dict(sorted(counts.items()))};" for name, counts in numbers.items()))
    print(f"  {sum(pushes.killed.values())} kills, {sum(pushes.acknowledged.values())} acknowledged images, of which")
    print(f"  {len(pushes.expected)} were checked at the end, the others before they were deleted; lost: {lost}")
    return lost


def test_nothing_acknowledged_is_lost(
    store: KillableStore, clients: ClientFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_programs("skopeo", "podman", "dockerd", root=True)
    settings = scaled(store.settings(store.make_bucket("kills")))
    with running_bucket_fleet(tmp_path, 3, settings) as fleet:
        pushes = Pushes(fleet.balancer.port)
        node = fleet.nodes[0]
        docker, podman = clients.docker_with({}), clients.podman(node)
        engines = {
            "skopeo": skopeo_pushes(pushes, clients, node, tmp_path),
            "docker": engine_pushes(pushes, docker.run, tmp_path / "docker-layers", "docker"),
            "podman": engine_pushes(pushes, podman.run, tmp_path / "podman-layers", "podman", "--tls-verify=false"),
        }
        push_while_killing(pushes, fleet, store, engines, SECONDS)
        with capsys.disabled():
            lost = find_all_losses(
                pushes, tmp_path / "fresh", settings, f"{SECONDS:g} s of kills, {type(store).__name__}"
            )
    assert lost == []
    assert all(pushes.acknowledged[kind] for kind in ("raw/app0", "raw/app1", "skopeo", "docker", "podman"))
    assert pushes.killed["nodes"] and pushes.killed["whole stores"]


def test_nodes_that_ignore_collectors_lose_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(WEAKENED)
    with SeaweedCluster(tmp_path / "store").run() as store:
        settings = scaled(store.settings(store.make_bucket("weakened")))
        with running_bucket_fleet(tmp_path, 3, settings) as fleet:
            for node in fleet.nodes:
                node.environment["PYTHONPATH"] += f":{tmp_path}"
                node.restart()
            pushes = Pushes(fleet.balancer.port)
            push_while_killing(pushes, fleet, store, {}, max(120, SECONDS), kills=SECONDS > 60)
            with capsys.disabled():
                lost = find_all_losses(pushes, tmp_path / "fresh", settings, "weakened")
    assert lost


def scaled(settings: dict[str, str]) -> dict[str, str]:
    """Return `settings` with short times of gc."""
    return {**settings, "REGISTRY_STORE": f"{settings['REGISTRY_STORE']}&gc_time_scale={TIME_SCALE}"}


def find_losses(pushes: Pushes, folder: Path, settings: dict[str, str]) -> list[str]:
    """Return what was acknowledged and is not there, whole, for a node that has nothing in its cache."""
    fresh, seen = RegistryDaemon(folder, settings), set[str]()
    with fresh.run_and_check_log(lambda: [SECRET_KEY]):
        checks = [check_image(fresh, *key, image, seen) for key, image in pushes.expected.items()]
    return [loss for loss in checks if loss]
