"""Pulls and pins of the administrator: platforms, a full disk, and the most pulls that there may be."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin import pulls
from dockerproxy.admin.ndjson import NDJSONResponse
from dockerproxy.admin.pulls import PullService
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.image_pull import ImagePuller
from dockerproxy.cache.pins import Pins, pin_records
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.concurrency import spawn
from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Host
from dockerproxy.registry.principal import CONTROL_SOCKET, Principal
from dockerproxy.store.files import Staging
from dockerproxy.store.ingest import Ingest
from tests.cache.support.harness import HUB, CacheHarness
from tests.cache.support.upstream import Gate, respond_normally, respond_with
from tests.store.support.images import ManifestTree, descriptor, image
from tests.support.audit import make_audit_log

ADMIN = Principal("root", CONTROL_SOCKET, None)
APP = "docker.io/library/app:1"

Rows = dict[str, dict[str, Any]]


class RequestStub:
    """A request of the control socket with `body`, and the lines of its response."""

    method = "POST"

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self.started = False
        self.sent = b""

    async def read_all(self, limit: int) -> bytes:
        return self._body

    def start(self, status: int, fields: Any, length: int | None) -> None:
        self.started = True

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass

    def finish(self) -> None:
        pass

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.sent.splitlines()]


class PullsHarness:
    """The service over a cache in `root`, with a registry in memory. `pin_file` is PIN_FILE."""

    def __init__(self, root: Path, pin_file: Path | None = None) -> None:
        self.cache = cache = CacheHarness(root)
        cache.upstream.on("GET", "/referrers/", respond_with(404))
        self.pins = Pins(cache.reactor, pin_records(cache.layout), cache.now, limit=1 << 30, cost=0)
        limits, counts = cache.manifests.rate_limits, PullCounts(cache.now)
        budget = PullBudget(cache.reactor, limits, counts, cache.now, 20)
        registries = {Host.parse("docker.io"): HUB}
        puller = ImagePuller(cache.reactor, cache.pull_through, cache.layout, registries, budget)
        audit, self.audit_entries = make_audit_log()
        self.service = PullService(cache.reactor, puller, self.pins, cache.layout, audit, cache.now, lambda: pin_file)

    def put(self, manifest: ManifestTree, tag: str, name: str = "library/app") -> None:
        repository = self.cache.upstream.repository(f"{HUB}/{name}")
        for part in manifest.walk():
            for blob in part.blobs:
                repository.put_blob(blob)
            tags = [tag] if part is manifest else []
            repository.put_manifest(part.data, *tags, media_type=part.media_type)

    def pull(self, *images: str, path: str = "/v1/pull", **options: Any) -> Rows:
        """Return the last rows by image, and the result under ``result``."""
        request: Any = RequestStub({"images": images, **options} if path == "/v1/pull" else options)
        handler = self.service.handlers["POST", path]
        self.cache.run(handler(request, NDJSONResponse(request), ADMIN), 60)
        self.events = request.events
        rows = {event["image"]: event for event in request.events if event["event"] == "image"}
        return {**rows, "result": request.events[-1]}


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[PullsHarness]:
    harness = PullsHarness(tmp_path / "cache")
    yield harness
    harness.cache.assert_no_leaks()


def config(architecture: str, variant: str = "") -> bytes:
    platform = {"os": "linux", "architecture": architecture, **({"variant": variant} if variant else {})}
    return json.dumps(platform).encode()


def index_of(*entries: tuple[str, ManifestTree]) -> ManifestTree:
    """Return an index of images by platform; ``-`` for none."""
    manifests = []
    for text, child in entries:
        os_name, architecture, *variant = text.split("/") if text != "-" else ("", "")
        platform = {"os": os_name, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        manifests.append(
            {**descriptor(child.media_type, child.data), **({"platform": platform} if text != "-" else {})}
        )
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return ManifestTree(OCI_INDEX, json.dumps(document).encode(), (), tuple(child for _, child in entries))


# platforms


@pytest.mark.parametrize(
    ("configuration", "platforms", "problem"),
    [
        (config("amd64"), ["linux/arm64"], "it has no linux/arm64, but linux/amd64"),
        (config("amd64"), ["linux/amd64", "linux/s390x"], "it has no linux/s390x, but linux/amd64"),
        (config("arm", "v6"), ["linux/arm/v7"], "it has no linux/arm, but linux/arm/v6"),
        (config("arm64"), ["windows/arm64"], "it has no windows/arm64, but linux/arm64"),
        (b"{}", ["linux/arm64"], "it has no linux/arm64, and does not say for which platforms it is"),
        (b"no JSON", ["linux/arm64"], "it has no linux/arm64, and does not say for which platforms it is"),
        (config("x/y"), ["linux/arm64"], "it has no linux/arm64, and does not say for which platforms it is"),
        (config("amd64"), ["linux/amd64"], ""),
        (config("arm", "v7"), ["linux/arm"], ""),
        (config("arm"), ["linux/arm/v7"], ""),
        (config("arm64", "v8"), ["linux/arm64"], ""),
        (config("amd64"), ["all"], ""),
        (b"{}", ["all"], ""),
        (config("riscv64"), [], ""),
    ],
)
def test_an_image_without_an_index(
    harness: PullsHarness, configuration: bytes, platforms: list[str], problem: str
) -> None:
    harness.put(image(configuration, b"layer"), "1")
    rows = harness.pull(APP, platforms=platforms)
    assert rows[APP]["state"] == ("failed" if problem else "done")
    assert rows[APP]["message"] == (f"{APP}: {problem}" if problem else "")
    assert rows["result"]["failed"] == (1 if problem else 0)
    # The layers of another platform are not fetched.
    assert len(harness.cache.upstream.requests_matching("GET", "/blobs/")) == (1 if problem else 2)
    # Another time, all that is needed to know it is here, and a dry run says it, too.
    rows = harness.pull(APP, platforms=platforms, dry_run=True)
    assert rows["result"]["failed"] == (1 if problem else 0)


ARM6, ARM7 = image(config("arm", "v6"), b"six"), image(config("arm", "v7"), b"seven")
AMD, NONE = image(config("amd64"), b"amd"), image(b"{}", b"none")


@pytest.mark.parametrize(
    ("entries", "platforms", "problem"),
    [
        ([("linux/arm/v6", ARM6), ("linux/amd64", AMD)], ["linux/arm/v7"],
         "no linux/arm, but linux/arm/v6, linux/amd64"),
        ([("linux/arm/v6", ARM6), ("linux/arm/v7", ARM7)], ["linux/arm/v7"], ""),
        ([("linux/arm/v6", ARM6), ("linux/arm/v7", ARM7)], ["linux/arm/v8"],
         "no linux/arm/v8, but linux/arm/v6, linux/arm"),
        ([("-", NONE)], ["linux/amd64"], "no linux/amd64, and does not say for which platforms it is"),
        ([("-", NONE)], [], ""),
        ([("unknown/unknown", NONE)], ["linux/amd64"], "no linux/amd64, and does not say for which platforms it is"),
        ([], [], "and does not say for which platforms it is"),
        ([], ["linux/amd64"], "no linux/amd64, and does not say for which platforms it is"),
        ([("linux/s390x", AMD)], [], ", but linux/s390x"),
    ],
)  # fmt: skip
def test_an_index_without_the_platform(
    harness: PullsHarness, entries: list[tuple[str, ManifestTree]], platforms: list[str], problem: str
) -> None:
    harness.put(index_of(*entries), "1")
    row = harness.pull(APP, platforms=platforms)[APP]
    assert row["state"] == ("failed" if problem else "done")
    assert problem in row["message"]
    # The index is here by now, so a dry run knows it as well.
    assert harness.pull(APP, platforms=platforms, dry_run=True)["result"]["failed"] == (1 if problem else 0)


def test_a_long_list_of_platforms_is_cut(harness: PullsHarness) -> None:
    entries = [(f"linux/arch{number}", image(b"{}", b"%d" % number)) for number in range(30)]
    harness.put(index_of(*entries), "1")
    message = harness.pull(APP, platforms=["linux/amd64"])[APP]["message"]
    assert message.endswith("linux/arch19, 10 others")


def test_a_dry_run_changes_no_pin(harness: PullsHarness) -> None:
    harness.put(image(config("amd64"), b"layer"), "1")
    harness.pull(APP, pin=True)
    [before] = harness.service.pins()
    harness.cache.upstream.repositories.clear()
    rows = harness.pull(APP, pin=True, dry_run=True, platforms=["linux/arm64"])
    assert rows["result"]["failed"] == 1
    assert harness.service.pins() == [before]


# a full disk


def fail_with(number: int) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number), "/var/cache/docker-registry-proxy/somewhere")

    return fail


FULL = "CACHE_DIR is full: No space left on device; free space there, or give it a larger disk"
READ_ONLY = "CACHE_DIR cannot be written: Read-only file system; see the permissions and mounts of its directory"


@pytest.mark.parametrize(("number", "sentence"), [(errno.ENOSPC, FULL), (errno.EROFS, READ_ONLY)])
@pytest.mark.parametrize("pin", [False, True], ids=["pull", "pin"])
@pytest.mark.parametrize("part", ["records", "manifests", "ingest", "append", "commit"])
def test_a_full_disk_names_the_directory(
    harness: PullsHarness, monkeypatch: pytest.MonkeyPatch, log_lines: list[str],
    part: str, pin: bool, number: int, sentence: str,
) -> None:  # fmt: skip
    harness.put(image(config("amd64"), b"layer" * 1000), "1")
    fail = fail_with(number)
    with monkeypatch.context() as patch:
        match part:
            case "records":
                patch.setattr(Staging, "write", fail)
                patch.setattr("dockerproxy.cache.image_pull.write_file", fail)
            case "manifests":
                patch.setattr("dockerproxy.store.blobs.Blobs.put", fail)
                patch.setattr("dockerproxy.cache.image_pull.write_file", fail)
            case "ingest":
                patch.setattr("dockerproxy.cache.ingests.Ingests.acquire", fail)
            case "append":
                patch.setattr(Ingest, "append", fail)
            case "commit":
                patch.setattr("dockerproxy.cache.ingests.Ingests.commit", fail)
        row = harness.pull(APP, pin=pin)[APP]
    assert row["state"] == "failed"
    assert sentence in row["message"]
    assert not [line for line in log_lines if "Traceback" in line]
    # As soon as there is room, the same command succeeds.
    assert harness.pull(APP, pin=pin)[APP]["state"] == "done"
    assert [row["error"] for row in harness.service.pins()] == [""] * pin


def test_a_pin_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    file = tmp_path / "pins"
    file.write_text("app:1\napp:2\n")
    harness = PullsHarness(tmp_path / "cache", file)
    harness.put(image(config("amd64"), b"layer"), "1")
    harness.put(image(config("amd64"), b"layer"), "2")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write", fail_with(errno.ENOSPC))
        harness.pull(path="/v1/pins/refresh")
        assert [event["message"] for event in harness.events if event["event"] == "problem"] == [f"PIN_FILE: {FULL}"]
    assert harness.service.pins() == []
    harness.pull(path="/v1/pins/refresh")
    assert {row["image"] for row in harness.service.pins()} == {APP, APP.replace(":1", ":2")}
    file.write_text("app:1\n")
    with monkeypatch.context() as patch:
        patch.setattr("dockerproxy.store.records.os.unlink", fail_with(errno.EROFS))
        harness.pull(path="/v1/pins/refresh")
    assert len(harness.service.pins()) == 2
    harness.pull(path="/v1/pins/refresh")
    assert len(harness.service.pins()) == 1
    assert not [line for line in log_lines if "Traceback" in line]
    harness.cache.assert_no_leaks()


# the most pulls


def test_pulls_beyond_the_most_fail_and_the_others_go_on(
    harness: PullsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "MAX_PULLS", 2)
    names = [f"docker.io/library/app:{tag}" for tag in range(4)]
    for tag in range(4):
        harness.put(image(config("amd64"), b"layer %d" % tag), str(tag))
    gate = Gate()
    harness.cache.upstream.on("GET", "/manifests/", gate.delay(respond_normally))
    request: Any = RequestStub({"images": names})
    work = harness.cache.start(harness.service.handlers["POST", "/v1/pull"](request, NDJSONResponse(request), ADMIN))
    harness.cache.advance(1)
    gate.open()
    harness.cache.advance(10)
    assert work.called
    rows = {event["image"]: event for event in request.events if event["event"] == "image"}
    assert [rows[name]["state"] for name in names] == ["done", "done", "failed", "failed"]
    assert rows[names[3]]["message"] == "2 images are being pulled or wait, the most that may; try again later"
    assert (request.events[-1]["done"], request.events[-1]["failed"]) == (2, 2)
    # There is room again.
    assert harness.pull(*names[2:])["result"]["done"] == 2


def test_pins_beyond_the_most_pulls_are_fetched_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(pulls, "MAX_PULLS", 1)
    file = tmp_path / "pins"
    file.write_text("app:0\napp:1\napp:2\n")
    harness = PullsHarness(tmp_path / "cache", file)
    for tag in range(3):
        harness.put(image(config("amd64"), b"layer %d" % tag), str(tag))
    spawn(harness.service.fetch_new_pins(), "fetching pinned images")
    harness.cache.advance(10)
    assert sum(row["digest"] is not None for row in harness.service.pins()) == 1
    assert sum("images are being pulled or wait" in line for line in log_lines) == 2
    assert not [line for line in log_lines if "Traceback" in line]
    for _ in range(2):
        harness.pull(path="/v1/pins/refresh")
    assert all(row["digest"] is not None for row in harness.service.pins())
    harness.cache.assert_no_leaks()
