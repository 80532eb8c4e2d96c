"""`dockerproxy pull` and `pin`: images by platform, resumed and shared downloads, rate limits, eviction, PIN_FILE."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import pause_after, respond_corrupted, respond_status
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage, TypedContent
from tests.e2e.harness.process import mount_tmpfs, wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

MIB = 1 << 20


@define
class Result:
    """The output of a command, and its exit status."""

    status: int
    output: str
    errors: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]


def start_command(daemon: TwistdDaemon, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "dockerproxy.cli", *arguments]
    environment = {**daemon.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [*argv, "--socket", str(daemon.state_folder / "run/control.sock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(daemon: TwistdDaemon, *arguments: str, text: str = "") -> Result:
    process = start_command(daemon, *arguments)
    output, errors = process.communicate(text, timeout=120)
    return Result(process.returncode, output, errors)


def run_well(daemon: TwistdDaemon, *arguments: str, text: str = "") -> str:
    result = run(daemon, *arguments, text=text)
    assert result.status == 0, result
    return result.output


def put_index(upstreams: Upstreams, name: str, tag: str = "v1", size: int = 40_000) -> dict[str, SampleImage]:
    """Store an index of three platforms. Return the image of each architecture."""
    children = {
        architecture: images.build_image(
            [{f"data/{part}": images.random_bytes(size, f"{name} {tag} {architecture} {part}")} for part in range(2)],
            architecture=architecture,
        )
        for architecture in ("amd64", "arm64", "s390x")
    }
    upstreams.fake.put(name, tag, images.build_index(children))
    return children


def fetched_blobs(upstreams: Upstreams, name: str) -> list[str]:
    """Return the digests of the blobs that were fetched from upstream, in order."""
    requests = upstreams.fake.find_requests("GET", f"/v2/{name}/blobs/")
    return [request.path.rpartition("/")[2] for request in requests]


def counted_pulls(upstreams: Upstreams, name: str) -> int:
    """Return how many manifests of the repositories below `name` were fetched from upstream."""
    requests = upstreams.fake.find_requests("GET", f"/v2/{name}")
    return sum("/manifests/" in request.path for request in requests)


def stored_blob(daemon: TwistdDaemon, digest: str) -> Path:
    """Return the path of a blob in the cache."""
    hex_digits = digest.removeprefix("sha256:")
    return daemon.state_folder / f"cache/docker/registry/v2/blobs/sha256/{hex_digits[:2]}/{hex_digits}/data"


def digests(image: SampleImage) -> set[str]:
    return {blob.digest for blob in image.blobs}


def test_one_platform_of_an_index(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    children = put_index(upstreams, "pulled/platforms")
    output = run_well(daemon, "pull", "fake.test/pulled/platforms:v1", "--platform", "linux/arm64")
    assert "1 image: 0 B to download, and 1 image of unknown size" in output
    assert "fake.test/pulled/platforms:v1: done, " in output and "1 of 1 image in the cache" in output
    assert sorted(fetched_blobs(upstreams, "pulled/platforms")) == sorted(digests(children["arm64"]))
    requests = len(upstreams.fake.requests)
    for blob in children["arm64"].blobs:
        url = f"{FAKE}/v2/pulled/platforms/blobs/{blob.digest}"
        assert daemon.client.get(url).cache_status == "HIT"
    assert len(upstreams.fake.requests) == requests
    # The next time, the platform that is here is the default.
    run_well(daemon, "pull", "fake.test/pulled/platforms:v1")
    assert len(fetched_blobs(upstreams, "pulled/platforms")) == 3
    result = run(daemon, "pull", "fake.test/pulled/platforms:v1", "--platform", "linux/riscv64")
    assert result.status == 1
    assert "it has no linux/riscv64, but linux/amd64, linux/arm64, linux/s390x" in result.output
    run_well(daemon, "pull", "fake.test/pulled/platforms:v1", "--platform", "all")
    assert len(fetched_blobs(upstreams, "pulled/platforms")) == 9


def test_an_image_of_another_platform(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """Without an index, its configuration says for which platform it is."""
    daemon = start_daemon()
    image = images.build_small_image("another platform", size=1000)  # of linux/amd64
    upstreams.fake.put("pulled/single", "v1", image)
    name = "fake.test/pulled/single:v1"
    for command in ("pull", "pin"):
        result = run(daemon, command, name, "--platform", "linux/arm/v7")
        assert result.status == 1
        assert f"{name}: failed: {name}: it has no linux/arm, but linux/amd64" in result.output
    assert fetched_blobs(upstreams, "pulled/single") == [image.blobs[0].digest]
    assert run(daemon, "pull", name, "--platform", "linux/arm/v7", "--dry-run").status == 1
    assert json.loads(run_well(daemon, "pins", "--json"))["pins"] == []
    run_well(daemon, "pull", name, "--platform", "linux/amd64")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the mount point of a file system of 8 MiB."""
    with mount_tmpfs(tmp_path / "disk", "8m") as folder:
        yield folder


def test_a_full_disk_is_named(upstreams: Upstreams, start_daemon: StartDaemon, small_disk: Path) -> None:
    daemon = start_daemon(CACHE_DIR=str(small_disk))
    upstreams.fake.put("pulled/large", "v1", images.build_small_image("a large one", size=20 * MIB, layers=1))
    for command in ("pull", "pin"):
        result = run(daemon, command, "fake.test/pulled/large:v1")
        assert result.status == 1
        sentence = "that are kept free; free space there, or give it a larger disk"
        assert "CACHE_DIR is full: its disk lacks " in result.output and sentence in result.output
    (row,) = json.loads(run_well(daemon, "pins", "--json"))["pins"]
    assert sentence in row["error"]
    assert "Traceback" not in daemon.output_text
    run_well(daemon, "unpin", "fake.test/pulled/large:v1")


def test_after_a_crash_only_the_rest_is_fetched(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("crash", size=MIB, layers=2)
    upstreams.fake.put("pulled/crash", "v1", image)
    first, second = image.layers
    gate = threading.Event()
    upstreams.fake.add_rule("GET", f"/v2/pulled/crash/blobs/{second.digest}", pause_after(MIB // 2, gate), times=1)
    process = start_command(daemon, "pull", "fake.test/pulled/crash:v1", "--json")
    partial = daemon.state_folder / "cache/ingest/fake.test" / second.digest.replace(":", "-")
    done = [stored_blob(daemon, blob.digest) for blob in (image.blobs[0], first)]
    wait_until(
        lambda: all(path.exists() for path in done) and partial.exists() and partial.stat().st_size >= MIB // 4,
        "half is here",
    )
    daemon.kill()
    gate.set()
    assert process.wait(60) != 0
    process.communicate()
    upstreams.fake.reset_rules()
    daemon.start()
    run_well(daemon, "pull", "fake.test/pulled/crash:v1")
    (request,) = upstreams.fake.find_requests("GET", "/v2/pulled/crash/blobs/")
    assert request.path.endswith(second.digest)
    assert int(request.headers["range"].removeprefix("bytes=").partition("-")[0]) >= MIB // 4


@pytest.mark.parametrize("workers", ["1", "3"])
def test_pulls_and_clients_share_one_download(upstreams: Upstreams, start_daemon: StartDaemon, workers: str) -> None:
    daemon = start_daemon(WORKERS=workers)
    name = f"pulled/shared-{workers}"
    image = images.build_small_image(name, size=MIB, layers=1)
    upstreams.fake.put(name, "v1", image)
    (layer,) = image.layers
    gate = threading.Event()
    upstreams.fake.add_rule("GET", f"/v2/{name}/blobs/{layer.digest}", pause_after(MIB // 2, gate))
    processes = [start_command(daemon, "pull", f"fake.test/{name}:v1") for _ in range(2)]
    wait_until(lambda: layer.digest in fetched_blobs(upstreams, name), "the layer is being downloaded")
    statuses: list[str | None] = []
    url = f"{FAKE}/v2/{name}"
    daemon.client.get(f"{url}/manifests/v1", Accept=ACCEPT_MANIFESTS)

    def read_as_client() -> None:
        response = daemon.client.get(f"{url}/blobs/{layer.digest}")
        assert response.body == layer.data
        statuses.append(response.cache_status)

    clients = [threading.Thread(target=read_as_client) for _ in range(4)]
    for client in clients:
        client.start()
    rows = json.loads(run_well(daemon, "debug", "--json"))
    assert sum(len(process["downloads"]) for process in rows["processes"]) >= 1
    gate.set()
    for client in clients:
        client.join(60)
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, (output, errors)
    assert statuses == ["JOINED"] * 4 or set(statuses) <= {"JOINED", "HIT"}
    assert sorted(fetched_blobs(upstreams, name)) == sorted(digests(image))
    assert counted_pulls(upstreams, name) == 1


def test_the_daemon_goes_on_if_the_command_ends(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("detached", size=MIB, layers=1)
    upstreams.fake.put("pulled/detached", "v1", image)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", f"/v2/pulled/detached/blobs/{image.layers[0].digest}", pause_after(1000, gate))
    output = run_well(daemon, "pull", "fake.test/pulled/detached:v1", "--detach")
    assert output.endswith("1 image are being pulled\n") or "being pulled" in output
    process = start_command(daemon, "pull", "fake.test/pulled/detached:v1")
    wait_until(lambda: len(fetched_blobs(upstreams, "pulled/detached")) == 2, "the layer is being downloaded")
    process.kill()
    process.communicate()
    gate.set()
    run_well(daemon, "pull", "fake.test/pulled/detached:v1")
    assert sorted(fetched_blobs(upstreams, "pulled/detached")) == sorted(digests(image))


def test_a_pull_is_cancelled(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("cancelled", size=MIB, layers=1)
    upstreams.fake.put("pulled/cancelled", "v1", image)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", f"/v2/pulled/cancelled/blobs/{image.layers[0].digest}", pause_after(1000, gate))
    name = "fake.test/pulled/cancelled:v1"
    result = run(daemon, "pull", "--cancel", name)
    assert result.status == 4 and f"{name} is not being pulled" in result.errors
    process = start_command(daemon, "pull", name)
    wait_until(lambda: len(fetched_blobs(upstreams, "pulled/cancelled")) == 2, "the layer is being downloaded")
    # Another command waits for the same pull. An interrupted command says how to end what it leaves behind.
    other = start_command(daemon, "pull", name)
    other_output = other.stdout
    assert other_output is not None and "1 image" in other_output.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the daemon goes on; `dockerproxy pull --cancel IMAGE` ends the pull of an image" in errors
    result = run(daemon, "pull", "--cancel", name, "fake.test/pulled/other:v1")
    assert result.status == 4 and "fake.test/pulled/other:v1 is not being pulled" in result.errors
    assert run_well(daemon, "pull", "--cancel", name) == f"the pull of {name} was cancelled\n"
    output, _ = other.communicate(timeout=60)
    assert other.returncode == 1
    assert f"{name}: failed: root at the control socket cancelled it; pull it again to go on" in output
    gate.set()
    assert "1 of 1 image in the cache" in run_well(daemon, "pull", name)


class Budget:
    """A registry that counts GETs of manifests as Docker Hub does. `turn` begins another window."""

    def __init__(self, upstreams: Upstreams, name: str, limit: int, window: int) -> None:
        self.limit = self.remaining = limit
        self.window = window
        self._lock = threading.Lock()
        upstreams.fake.add_rule("GET", f"/v2/{name}.*/manifests/", self.respond_to_get)
        upstreams.fake.add_rule("HEAD", f"/v2/{name}.*/manifests/", self.respond_to_head)

    def turn(self) -> None:
        with self._lock:
            self.remaining = self.limit

    def respond_to_get(self, exchange: HTTPExchange, content: TypedContent | None) -> None:
        with self._lock:
            is_refused = self.remaining == 0
            self.remaining = max(0, self.remaining - 1)
            remaining = self.remaining
        self._respond(exchange, content, remaining, 429 if is_refused else 200)

    def respond_to_head(self, exchange: HTTPExchange, content: TypedContent | None) -> None:
        self._respond(exchange, content, self.remaining, 200)

    def _respond(self, exchange: HTTPExchange, content: TypedContent | None, remaining: int, status: int) -> None:
        fields = {
            "RateLimit-Limit": f"{self.limit};w={self.window}",
            "RateLimit-Remaining": f"{remaining};w={self.window}",
        }
        if status == 429:
            exchange.respond(429, fields | {"Retry-After": str(self.window)}, b"")
        elif content is None:
            exchange.respond(404, fields, b"")
        else:
            fields |= {"Content-Type": content.media_type, "Docker-Content-Digest": content.digest}
            length = {} if exchange.method == "GET" else {"Content-Length": str(len(content.data))}
            exchange.respond(200, fields | length, content.data if exchange.method == "GET" else b"")


@pytest.mark.parametrize(("reserve", "pulled"), [("0%", 5), ("20%", 4)])
def test_pulls_beyond_the_budget_wait(
    upstreams: Upstreams, start_daemon: StartDaemon, reserve: str, pulled: int
) -> None:
    """A registry allows five pulls, and nine images are wanted: the others say until when they wait, and then go on."""
    daemon = start_daemon(RATE_RESERVE=reserve)
    base = f"budget/{pulled}"
    names = [f"{base}/app-{number}" for number in range(9)]
    for name in names:
        upstreams.fake.put(name, "v1", images.build_small_image(name, size=1000))
    budget = Budget(upstreams, base, 5, window=20)
    process = start_command(daemon, "pull", "--json", *(f"fake.test/{name}:v1" for name in names))
    assert process.stdout is not None
    states: dict[str, dict[str, Any]] = {}
    plan = json.loads(process.stdout.readline())
    (row,) = plan["pulls"]
    assert plan["event"] == "plan" and plan["unknown"] == 9
    assert row == {
        "registry": "fake.test", "pulls": 9, "remaining": 5, "limit": 5, "reserve": 5 - pulled,
    }  # fmt: skip

    def count(state: str) -> int:
        return sum(row["state"] == state for row in states.values())

    while count("done") < pulled or count("waiting") < 9 - pulled:
        event = json.loads(process.stdout.readline())
        states[event["image"]] = event
    assert (count("done"), count("waiting")) == (pulled, 9 - pulled)
    for row in states.values():
        if row["state"] == "waiting":
            assert re.search(r"pulls are left at fake\.test.*; this goes on by \d\d:\d\d:\d\d UTC", row["message"])
            assert row["until"] > 0
    assert counted_pulls(upstreams, base) == pulled, "and none was refused"
    # Clients are not held up by the reserve.
    if pulled == 4:
        waiting = next(name for name in names if states[f"fake.test/{name}:v1"]["state"] == "waiting")
        url = f"{FAKE}/v2/{waiting}/manifests/v1"
        assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).status == 200
    report = json.loads(run_well(daemon, "budget", "--json"))
    (limit,) = report["limits"]
    assert (limit["remaining"], limit["last_hour"]) == (budget.remaining, 5)
    assert {entry["repository"].partition("/app")[0] for entry in limit["top"]} == {base}
    budget.turn()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (output[-2000:], errors)
    assert json.loads(output.splitlines()[-1])["done"] == 9


def test_a_dry_run_spends_nothing(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("dry", size=1000)
    upstreams.fake.put("budget/dry", "v1", image)
    Budget(upstreams, "budget/dry", 100, window=21600)
    output = run_well(daemon, "pull", "fake.test/budget/dry:v1", "--pin", "--dry-run")
    assert "fake.test: up to 1 pull that count; 100 of 100 are left, 20 of them kept for clients" in output
    assert (counted_pulls(upstreams, "budget/dry"), fetched_blobs(upstreams, "budget/dry")) == (0, [])
    assert json.loads(run_well(daemon, "pins", "--json"))["pins"] == []


def test_what_is_pinned_stays_when_the_cache_is_full(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="10m")
    image = images.build_small_image("pinned", size=MIB, layers=2)
    upstreams.fake.put("pinned/app", "v1", image)
    run_well(daemon, "pin", "fake.test/pinned/app:v1")

    def fill() -> None:
        for number in range(12):
            digest = upstreams.fake.put_blob("pinned/other", images.random_bytes(2 * MIB, f"fill {number}"))
            for _ in range(2):  # used again, too
                assert daemon.client.get(f"{FAKE}/v2/pinned/other/blobs/{digest}").status == 200

    fill()
    daemon.restart(kill=True)  # before it has read the disk
    fill()
    upstreams.fake.requests.clear()
    with upstream_gone(upstreams):
        url = f"{FAKE}/v2/pinned/app"
        assert daemon.client.get(f"{url}/manifests/v1", Accept=ACCEPT_MANIFESTS).status == 200
        for blob in image.blobs:
            assert daemon.client.get(f"{url}/blobs/{blob.digest}").body == blob.data
    assert fetched_blobs(upstreams, "pinned/app") == []
    (row,) = json.loads(run_well(daemon, "pins", "--json"))["pins"]
    assert (row["image"], row["missing"], row["error"]) == ("fake.test/pinned/app:v1", 0, "")
    run_well(daemon, "unpin", "fake.test/pinned/app:v1")
    assert run(daemon, "unpin", "fake.test/pinned/app:v1").status == 4


@contextmanager
def upstream_gone(upstreams: Upstreams) -> Iterator[None]:
    """Let the registry answer 503 to everything."""
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/", respond_status(503))
    yield
    upstreams.fake.reset_rules()


def test_pinned_images_are_removed_by_force_only(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("kept", size=1000)
    for tag in ("v1", "v2"):
        upstreams.fake.put("pinned/kept", tag, image if tag == "v1" else images.build_small_image("loose", size=1000))
    run_well(daemon, "pin", "fake.test/pinned/kept:v1")
    run_well(daemon, "pull", "fake.test/pinned/kept:v2")
    repository = "fake.test/pinned/kept"
    for name in (
        f"{repository}:v1",
        repository,
        f"{repository}@{image.digest}",
        f"{repository}@{image.blobs[0].digest}",
    ):
        result = run(daemon, "rm", f"{repository}:v2", name)
        assert result.status == 7, name
        sentence = "has pinned images; unpin them first" if name == repository else "is pinned; unpin it first"
        assert f"{name} {sentence}, or use --force (nothing was removed)" in result.errors
        assert run(daemon, "pins", "--missing").status == 0
    assert "v2" in run_well(daemon, "ls", repository)
    run_well(daemon, "rm", f"{repository}:v2")
    run_well(daemon, "rm", "--force", f"{repository}:v1")
    assert run(daemon, "pins", "--missing").status == 1
    run_well(daemon, "pins", "--refresh")
    assert run(daemon, "pins", "--missing").status == 0
    run_well(daemon, "unpin", f"{repository}:v1")
    run_well(daemon, "rm", f"{repository}:v1")


def test_pins_that_are_too_large_are_refused(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="5m")
    image = images.build_small_image("too large", size=3 * MIB, layers=2)
    upstreams.fake.put("pinned/large", "v1", image)
    result = run(daemon, "pin", "fake.test/pinned/large:v1")
    assert result.status == 1
    assert re.search(
        r"needs \d+ more bytes, and the pinned images have \d+ of the \d+ that they may have", result.output
    )
    assert fetched_blobs(upstreams, "pinned/large") == [], "nothing of it was downloaded"
    assert json.loads(run_well(daemon, "pins", "--json"))["pins"] == []


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_pinned_tag_survives_its_deletion_upstream(
    upstreams: Upstreams, start_daemon: StartDaemon, workers: str
) -> None:
    daemon = start_daemon(WORKERS=workers)
    name = f"pinned/deleted-{workers}"
    pinned = images.build_small_image(f"{name} pinned", size=1000)
    other = images.build_small_image(f"{name} other", size=1000)
    upstreams.fake.put(name, "v1", pinned)
    upstreams.fake.put(name, "v2", other)
    run_well(daemon, "pin", f"fake.test/{name}:v1")
    run_well(daemon, "pull", f"fake.test/{name}:v2")
    gone = respond_status(404, "MANIFEST_UNKNOWN")
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, f"/v2/{name}/manifests/", gone)
    url = f"{FAKE}/v2/{name}"
    for _ in range(4):  # several processes
        for reference in ("v1", pinned.digest):
            response = daemon.client.get(f"{url}/manifests/{reference}", Accept=ACCEPT_MANIFESTS)
            assert (response.status, response.body) == (200, pinned.manifest.data)
    for blob in pinned.blobs:
        assert daemon.client.get(f"{url}/blobs/{blob.digest}").body == blob.data
    assert daemon.client.get(f"{url}/manifests/v2", Accept=ACCEPT_MANIFESTS).status == 404
    run_well(daemon, "pins", "--refresh", "--all")
    assert daemon.client.get(f"{url}/manifests/v1", Accept=ACCEPT_MANIFESTS).status == 200
    # A registry hides a repository that is private now: the old word counts no longer.
    upstreams.fake.reset_rules()
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, f"/v2/{name}/manifests/", respond_status(404, "NAME_UNKNOWN"))
    assert daemon.client.get(f"{url}/manifests/v1", Accept=ACCEPT_MANIFESTS).status == 404


def test_a_pin_file(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    put_index(upstreams, "pinned/file", "v1", size=1000)
    upstreams.fake.put("pinned/file", "v2", images.build_small_image("file v2", size=1000))
    file = tmp_path / "pins"
    file.write_text(
        "# by Ansible\nfake.test/pinned/file:v1  linux/amd64,linux/arm64\n\nno such thing at all\n"
        "fake.test/pinned/file:v2 # a comment\nnot.cached/app:v1\n"
    )
    daemon = start_daemon(PIN_FILE=str(file))

    def pins() -> dict[str, Any]:
        return {row["image"]: row for row in json.loads(run_well(daemon, "pins", "--json"))["pins"]}

    def is_pulled(tag: str) -> bool:
        row = pins().get(f"fake.test/pinned/file:{tag}", {})
        return bool(row.get("refreshed")) and row["missing"] == 0

    wait_until(lambda: is_pulled("v1") and is_pulled("v2"), "the images are pulled at the start")
    assert "not.cached is not cached here; add it to REGISTRIES" in pins()["not.cached/app:v1"]["error"]
    assert pins()["fake.test/pinned/file:v1"]["platforms"] == ["linux/amd64", "linux/arm64"]
    document = json.loads(run(daemon, "pins", "--json").output)
    assert document["problems"] == [
        f"PIN_FILE: {file}, line 4: 'no such thing at all' is more than an image and its platforms"
    ]
    assert f"{file}, line 4: 'no such thing at all'" in daemon.output_text
    result = run(daemon, "unpin", "fake.test/pinned/file:v1")
    assert result.status != 0 and f"is in {file}; remove its line there" in result.errors
    # The tag moves, and a line goes.
    moved = images.build_small_image("file v2 moved", size=1000)
    upstreams.fake.put("pinned/file", "v2", moved)
    file.write_text("fake.test/pinned/file:v2\n")
    run_well(daemon, "pins", "--refresh", "--all")
    assert list(pins()) == ["fake.test/pinned/file:v2"]
    assert pins()["fake.test/pinned/file:v2"]["digest"] == moved.digest
    file.write_text("fake.test/pinned/file:v2\nfake.test/pinned/file:v1 linux/s390x\n")
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: is_pulled("v1"), "a reload reads the file again")
    file.write_text("fake.test/pinned/file:v2\n")
    run_well(daemon, "pins", "--refresh")
    file.unlink()
    run(daemon, "pins", "--refresh")
    assert list(pins()) == ["fake.test/pinned/file:v2"], "a file that cannot be read removes nothing"


def test_a_torn_record_of_a_pin(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    for tag in ("v1", "v2"):
        upstreams.fake.put("pinned/torn", tag, images.build_small_image(f"torn {tag}", size=1000))
        run_well(daemon, "pin", f"fake.test/pinned/torn:{tag}", "--refresh", "2h")
    daemon.stop()
    (path,) = (daemon.state_folder / "cache/pins").rglob("v1~.json")
    path.write_bytes(path.read_bytes()[:20])
    daemon.start()
    assert "the pin of fake.test/pinned/torn:v1 is damaged, and is fetched again" in daemon.output_text

    def rows() -> list[tuple[str, bool, float]]:
        pins = json.loads(run_well(daemon, "pins", "--json"))["pins"]
        return [
            (row["image"].rpartition(":")[2], row["missing"] == 0 and row["error"] == "", row["refresh"])
            for row in pins
        ]

    wait_until(lambda: rows() == [("v1", True, 21600.0), ("v2", True, 7200.0)], "both are whole")


COMPOSE = """
x-base: &base
  image: &shared fake.test/lists/shared:${VERSION:-v1}
services:
  web:
    <<: *base
    image: "fake.test/lists/web:$TAG"
  again:
    image: *shared
  built: {build: .}
"""
DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      initContainers: [{name: init, image: fake.test/lists/init:v1}]
      containers:
      - name: app
        image: fake.test/lists/app:v1
---
apiVersion: v1
kind: Pod
spec: {containers: [{image: 'fake.test/lists/pod:v1'}]}
"""
DOCKERFILE = """
# syntax=docker/dockerfile:1
ARG VERSION=v1
FROM --platform=$BUILDPLATFORM fake.test/lists/builder:${VERSION} AS build
RUN echo
FROM fake.test/lists/runtime:v1
COPY --from=build /a /b
COPY --from=fake.test/lists/tools:v1 /a /b
FROM scratch
"""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("compose.yaml", COMPOSE, ["shared", "web"]),
        ("deployment.yaml", DEPLOYMENT, ["init", "app", "pod"]),
        ("Dockerfile", DOCKERFILE, ["builder", "runtime", "tools"]),
        ("images.txt", "# ours\nfake.test/lists/one:v1\nfake.test/lists/two:v1 # two\n", ["one", "two"]),
    ],
    ids=["compose", "kubernetes", "dockerfile", "list"],
)
def test_images_of_a_file(
    upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path, name: str, content: str, expected: Sequence[str]
) -> None:
    daemon = start_daemon()
    for image in expected:
        upstreams.fake.put(f"lists/{image}", "v1", images.build_small_image(f"list {image}", size=1000))
    file = tmp_path / name
    file.write_text(content)
    (tmp_path / ".env").write_text("TAG=v1\n")
    output = run_well(daemon, "pull", "--from-file", str(file), "--json")
    events = [json.loads(line) for line in output.splitlines()]
    done = [event["image"] for event in events if event.get("state") == "done"]
    assert sorted(done) == sorted(f"fake.test/lists/{image}:v1" for image in expected)
    if name == "images.txt":
        wrong = run(daemon, "pull", "--from-file", "-", text="fake.test/lists/one:v1\nno image\n")
        assert wrong.status == 1 and "standard input, line 2: 'no image' is more than" in wrong.errors
        assert "fake.test/lists/one:v1: done" in wrong.output


def test_names_that_are_wrong(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    upstreams.fake.put("pulled/right", "v1", images.build_small_image("right", size=1000))
    names = ["fake.test/pulled/right:v1", "UPPER CASE", "quay.io/not/ours:v1", "fake.test/pulled/missing:v1"]
    result = run(daemon, "pull", *names, "\x1b[31mred")
    assert result.status == 1
    assert "fake.test/pulled/right:v1: done" in result.output
    assert "quay.io is not cached here; add it to REGISTRIES" in result.output
    assert "fake.test has no pulled/missing:v1" in result.output
    assert "'UPPER CASE' is not the name of an image" in result.output
    assert "\x1b" not in result.output
    assert run(daemon, "pull").status == 2
    assert run(daemon, "pull", "x", "--platform", "linux").status == 2


def test_a_login_of_the_administrators(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """A pull uses it as a client without a login does, and none of a client's."""
    upstreams.push_to_hub("library/pulled-private", "v1", images.build_small_image("private pull"), {"alice"})
    daemon = start_daemon()
    result = run(daemon, "pull", "pulled-private:v1")
    assert result.status == 1 and "docker.io does not let us read library/pulled-private" in result.output
    daemon.stop()
    password = upstreams.users["alice"]
    daemon.environment |= {"AUTH_REGISTRIES": f"auth.docker.io|alice|{password}", "AUTH_REGISTRY_DELIMITER": "|"}
    daemon.start()
    run_well(daemon, "pull", "pulled-private:v1", "--referrers")
    (row,) = json.loads(run_well(daemon, "ls", "--json"))["repositories"]
    assert "library/pulled-private" in row["name"]


_DOCKER = "application/vnd.docker.distribution.manifest"
_IMAGE, _LIST = f"{_DOCKER}.v2+json", f"{_DOCKER}.list.v2+json"
_OCI_IMAGE, _OCI_INDEX = "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"
FIVE_ENGINES = {
    "docker": [_IMAGE, _LIST, _OCI_INDEX, _OCI_IMAGE, f"{_DOCKER}.v1+prettyjws", "application/json"],
    "containerd": [_IMAGE, _LIST, _OCI_IMAGE, _OCI_INDEX, "*/*"],
    "podman": [_OCI_IMAGE, _IMAGE, f"{_DOCKER}.v1+prettyjws", f"{_DOCKER}.v1+json", _LIST, _OCI_INDEX],
    "kaniko": [_IMAGE, _OCI_INDEX],
    "buildkit": [_IMAGE, _LIST, _OCI_IMAGE, _OCI_INDEX],
}
"""The media types that each engine accepts."""


@pytest.mark.parametrize("at_once", [False, True], ids=["in-turn", "at-once"])
@pytest.mark.parametrize("workers", ["1", "3"])
def test_first_pulls_of_five_engines_cost_one_pull(
    upstreams: Upstreams, start_daemon: StartDaemon, workers: str, at_once: bool
) -> None:
    daemon = start_daemon(WORKERS=workers)
    name = f"engines/app-{workers}-{at_once}".lower()
    image = images.build_index({"amd64": images.build_small_image(name, size=1000)})
    upstreams.fake.put(name, "v1", image)
    statuses: list[int] = []

    def request(accept: list[str]) -> None:
        response = daemon.client.get(f"{FAKE}/v2/{name}/manifests/v1", Accept=", ".join(accept))
        statuses.append(response.status)

    threads = [threading.Thread(target=request, args=(accept,)) for accept in FIVE_ENGINES.values()]
    for thread in threads:
        thread.start()
        if not at_once:
            thread.join(60)
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 5
    assert len(upstreams.fake.find_requests("GET", f"/v2/{name}/manifests/v1")) == 1


def test_clients_that_try_again_within_retry_after(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """A hundred clients that try five times cost two pulls at most, also if the daemon is killed in between."""
    daemon = start_daemon(WORKERS="3")
    upstreams.fake.put("retried/app", "v1", images.build_small_image("retried", size=1000))
    budget = Budget(upstreams, "retried/app", 0, window=3600)
    url = f"{FAKE}/v2/retried/app/manifests/v1"
    statuses: list[int] = []

    def retry(times: int) -> None:
        for _ in range(times):
            response = daemon.client.get(url, Accept=ACCEPT_MANIFESTS)
            assert "fake.test allows 0 pulls in 1 h" in response.error_message or response.status != 429
            statuses.append(response.status)

    def run_clients(times: int) -> None:
        threads = [threading.Thread(target=retry, args=(times,)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)

    run_clients(3)
    daemon.restart(kill=True)
    run_clients(2)
    assert statuses == [429] * 500
    assert len(upstreams.fake.find_requests("GET", "/v2/retried/app/manifests/v1")) <= 2
    assert budget.remaining == 0


def test_bars_on_a_terminal(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    upstreams.fake.put("pulled/bars", "v1", images.build_small_image("bars", size=1000))
    arguments = ["pull", "fake.test/pulled/bars:v1", "fake.test/pulled/none:v1"]
    controller, terminal = os.openpty()
    argv = [sys.executable, "-m", "dockerproxy.cli", *arguments, "--socket"]
    environment = {**daemon.environment, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*argv, str(daemon.state_folder / "run/control.sock")],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while chunk := read_terminal(controller):
        output += chunk
    os.close(controller)
    assert process.wait(60) == 1
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", output).decode()
    assert re.search(r"fake\.test/pulled/bars:v1 .*━━━.* done", text)
    assert "failed: fake.test has no pulled/none:v1" in text
    assert "1 of 2 images in the cache" in text


def read_terminal(controller: int) -> bytes:
    """Return the output of a program to its terminal; nothing after its end."""
    try:
        return os.read(controller, 65536)
    except OSError:  # EIO: the other end is closed
        return b""


def test_an_outage_leaves_a_pin_as_it_is(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    upstreams.fake.put("pinned/outage", "v1", images.build_small_image("outage", size=1000))
    run_well(daemon, "pin", "fake.test/pinned/outage:v1")
    (before,) = json.loads(run_well(daemon, "pins", "--json"))["pins"]
    with upstream_gone(upstreams):
        run(daemon, "pins", "--refresh", "--all")
        assert run(daemon, "pins", "--missing").status == 1
    (row,) = json.loads(run_well(daemon, "pins", "--json"))["pins"]
    assert (row["refreshed"], row["missing"], row["digest"]) == (before["refreshed"], 0, before["digest"])
    assert "what is cached stays, because fake.test answered 503" in row["error"]
    # An image that `rm` has removed comes back with the next refresh, although it is not time for one.
    run_well(daemon, "pins", "--refresh", "--all")
    run_well(daemon, "rm", "--force", "fake.test/pinned/outage")
    assert run(daemon, "pins", "--missing").status == 1
    run_well(daemon, "pins", "--refresh")
    assert run(daemon, "pins", "--missing").status == 0


def test_signatures_come_with_a_pin(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    image = images.build_small_image("signed", size=1000)
    upstreams.fake.put("pinned/signed", "v1", image)
    signature = images.build_small_image("signature", size=100, layers=1)
    upstreams.fake.put("pinned/signed", f"{image.digest.replace(':', '-')}.sig", signature)
    run_well(daemon, "pin", "fake.test/pinned/signed:v1")
    assert set(fetched_blobs(upstreams, "pinned/signed")) == digests(image) | digests(signature)
    (row,) = json.loads(run_well(daemon, "pins", "--json"))["pins"]
    assert row["contents"] == len(image.blobs) + 1 + len(signature.blobs) + 1


def nested_index(depth: int) -> SampleImage:
    image = images.build_small_image("nested", size=100)
    for _ in range(depth):
        image = images.build_index({"amd64": image})
    return image


def test_registries_that_lie(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """Each pull ends with a sentence, and the next one goes on."""
    daemon = start_daemon()
    corrupt = images.build_small_image("corrupt", size=1000)
    upstreams.fake.put("lies/corrupt", "v1", corrupt)
    upstreams.fake.add_rule("GET", f"/v2/lies/corrupt/blobs/{corrupt.layers[0].digest}", respond_corrupted)
    upstreams.fake.put("lies/nested", "v1", nested_index(9))
    many = json.dumps({
        "schemaVersion": 2,
        "mediaType": images.OCI_MANIFEST,
        "config": corrupt.blobs[0].descriptor(),
        "layers": [{**corrupt.layers[0].descriptor(), "digest": f"sha256:{number:064x}"} for number in range(6000)],
    })  # fmt: skip
    upstreams.fake.put_manifest("lies/many", "v1", TypedContent(images.OCI_MANIFEST, many.encode()))
    huge = json.loads(corrupt.manifest.data)
    huge["layers"][0] |= {"size": 10**12, "digest": f"sha256:{1:064x}"}
    upstreams.fake.put_manifest("lies/huge", "v1", TypedContent(images.OCI_MANIFEST, json.dumps(huge).encode()))
    upstreams.fake.put_manifest("lies/lacking", "v1", corrupt.manifest)
    upstreams.fake.put_manifest("lies/page", "v1", TypedContent("text/html", b"<html>Sign in</html>"))
    for method in ("GET", "HEAD"):
        upstreams.fake.add_rule(method, "/v2/lies/denied/", respond_status(403, "DENIED"))
    sentences = {
        "corrupt": "returned content that does not match sha256:",
        "nested": "has more than 4 indexes in each other",
        "many": "consists of more than 5000 manifests and blobs",
        "huge": "needs 100000",
        "page": "",
        "lacking": "fake.test does not have all that lies/lacking consists of",
        "denied": "fake.test does not let us read lies/denied",
    }
    result = run(daemon, "pin", *(f"fake.test/lies/{name}:v1" for name in sentences), "--platform", "all")
    assert result.status == 1
    for name, sentence in sentences.items():
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"fake.test/lies/{name}:v1: failed")]
        assert sentence in line
    assert "0 of 7 images in the cache" in result.output
    upstreams.fake.reset_rules()
    run_well(daemon, "pull", "fake.test/lies/corrupt:v1")


def test_a_registry_that_refuses_without_a_limit(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """It answers 429, and names no limit: the pull waits as long as it says, and goes on."""
    daemon = start_daemon()
    upstreams.fake.put("refusing/app", "v1", images.build_small_image("refusing", size=1000))
    refuse = respond_status(429, "TOOMANYREQUESTS", Retry_After="1")
    upstreams.fake.add_rule("GET", "/v2/refusing/app/manifests/", refuse, times=2)
    result = run(daemon, "pull", "fake.test/refusing/app:v1", "--json")
    assert result.status == 0
    waiting = [event for event in result.events if event.get("state") == "waiting"]
    assert waiting and "fake.test refuses pulls now; this goes on by" in waiting[0]["message"]


def test_clients_pull_a_pinned_image_while_the_registry_is_down(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory
) -> None:
    daemon = start_daemon()
    image = images.build_small_image("pinned for clients", size=1000)
    upstreams.push_to_registry("pinned/client", "v1", image)
    name = "registry.test:5443/pinned/client:v1"
    run_well(daemon, "pin", name)
    with upstreams.stopped():
        clients.skopeo(daemon).pull(name)
    assert {entry.cache_status for entry in daemon.access_log() if "/v2/pinned/client/" in entry.target} <= {
        "HIT",
        "STALE",
    }
