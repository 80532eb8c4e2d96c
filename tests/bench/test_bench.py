"""`make bench` runs, and says all it is meant to say. What the numbers are is not this test's business."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_PROJECT = Path(__file__).resolve().parents[2]

_BYTES = ("throughput", "server CPU", "clients' CPU")
_REQUESTS = ("p50", "requests", "server CPU", "clients' CPU")
_CONNECTIONS = ("connections", "server CPU", "clients' CPU")
_RESUMED = (*_CONNECTIONS, "over full", "resumed")
_GROWTH = ("at most", "at the end")
_SECOND = ("one core", "two cores", "second core")

# The rows by measure and case, and beside whom each measure's are.
_FIGURES = {
    ("hit", "1 client"): _BYTES,
    ("hit", "8 clients"): _BYTES,
    ("plain", "hosted, 1 client"): _BYTES,
    ("plain", "hosted, 8 clients"): _BYTES,
    ("plain", "mirror, 1 client"): _BYTES,
    ("plain", "mirror, 8 clients"): _BYTES,
    ("miss", "1 client"): (*_BYTES, "from upstream"),
    ("miss", "8 clients"): (*_BYTES, "from upstream"),
    ("first", "64 KiB, cold"): ("first byte", "over direct"),
    ("joined", "1 client"): ("last end",),
    ("joined", "20 clients"): ("first byte", "from upstream", "last end", "over alone"),
    ("crowd", "50 clients"): (*_BYTES, "last first byte", "from upstream"),
    ("small", "1, manifest"): _REQUESTS,
    ("small", "1, 64 KiB"): _REQUESTS,
    ("small", "64, manifest"): _REQUESTS,
    ("small", "64, 64 KiB"): _REQUESTS,
    ("connect", "1, full handshake"): _CONNECTIONS,
    ("connect", "1, resumed"): _RESUMED,
    ("connect", "16, full handshake"): _CONNECTIONS,
    ("connect", "16, resumed"): _RESUMED,
    ("connect", "50, full handshake"): _CONNECTIONS,
    ("second", "hits, 8 clients"): _SECOND,
    ("second", "manifests, 64"): _SECOND,
    ("memory", "idle"): _GROWTH,
    ("memory", "start"): ("resident", "shared once", "with 1 worker"),
    ("memory", "slow clients"): _GROWTH,
    ("start", "all workers"): ("listening",),
    ("start", "1 worker"): ("listening",),
    ("start", "new host"): ("handshake", "the next one"),
    ("image", "200 layers"): ("duration", "server CPU"),
    ("image", "200 layers, one by one"): ("duration", "server CPU"),
    ("push", "1 layer"): _BYTES,
    ("push", "200 small layers"): ("layers", "server CPU", "clients' CPU"),
    ("gc", "1,000 blobs"): ("duration", "CPU", "wait, 99 %", "longest wait"),
}
_PEERS = {"push": "registry:2", "gc": "registry:2"}
_ALONE = {
    ("joined", "1 client", "last end"),
    ("joined", "20 clients", "over alone"),
    ("memory", "start", "with 1 worker"),
    ("start", "all workers", "listening"),
    ("start", "1 worker", "listening"),
    ("start", "new host", "handshake"),
    ("start", "new host", "the next one"),
}

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
_PROGRAMS = ("nginx", "docker-registry", "skopeo", "gcc", "taskset")

pytestmark = pytest.mark.skipif(
    None in [shutil.which(name, path=_PATH) for name in _PROGRAMS] or not Path("/usr/include/openssl/ssl.h").exists(),
    reason="nginx, docker-registry, skopeo, gcc, taskset or libssl-dev is missing",
)


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with `folder` for its files; end it, and all that it started, where it takes too long."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "--quick", *arguments],
        cwd=_PROJECT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=400)
        except BaseException:
            process.terminate()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bench")
    yield folder
    assert not list(folder.iterdir()), "the benchmark left files behind"


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the whole benchmark has to say."""
    file = tmp_path_factory.mktemp("json") / "new/bench.json"
    run = bench(folder, "--json", str(file))
    assert run.returncode == 0, run.stderr
    data: dict[str, Any] = json.loads(file.read_text())
    assert data["text"] in run.stdout
    return data


def rows(found: dict[str, Any], figure: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["figure"] == figure]


def test_every_figure_is_there(found: dict[str, Any]) -> None:
    figures: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in found["rows"]:
        key = row["measure"], row["case"]
        figures[key] = (*figures.get(key, ()), row["figure"])
    assert figures == _FIGURES


def test_every_figure_is_beside_those_of_a_peer(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        servers = {"proxy"}
        if (row["measure"], row["case"], row["figure"]) not in _ALONE:
            servers.add(_PEERS.get(row["measure"], "nginx"))
        if (row["measure"], row["case"]) == ("hit", "1 client") or row["measure"] == "small":
            servers.add("nginx+log")
        if row["measure"] == "image" or (row["measure"], row["figure"]) == ("first", "first byte"):
            servers.add("direct")
        assert set(row["samples"]) == servers, row
        assert all(len(values) == 1 for values in row["samples"].values()), row
        if row["figure"] in ("throughput", "requests", "connections", "layers", "last end", "duration"):
            assert all(ratio > 0 for ratio in row["ratios"].values()), row


def test_every_target_has_its_verdict(found: dict[str, Any]) -> None:
    assert len(found["targets"]) == 24
    for target in found["targets"]:
        assert target["cells"][-1] == ("met" if target["met"] else "MISSED")


def test_many_clients_share_one_download(found: dict[str, Any]) -> None:
    assert [row["medians"]["proxy"] for row in rows(found, "from upstream")] == [1, 1, 1, 1]


def test_sessions_are_resumed_where_that_is_measured(found: dict[str, Any]) -> None:
    for row in rows(found, "resumed"):
        assert row["medians"]["proxy"] == row["medians"]["nginx"] == 100


def test_the_load_of_the_machine_is_noted(found: dict[str, Any]) -> None:
    assert {"date", "machine", "load average at the start", "load average at the end"} <= set(found["machine"])


def test_what_decides_how_tcp_sends_is_noted(found: dict[str, Any]) -> None:
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        assert found["machine"]["machine"].endswith(f"congestion control of TCP: {file.read().strip()}")


def test_the_table_for_people(folder: Path, tmp_path: Path) -> None:
    run = bench(folder, "--only", "start,gc", "--json", str(tmp_path / "bench.json"))
    assert run.returncode == 0, run.stderr
    assert re.search(r"^date: \d{4}-\d\d-\d\d ", run.stdout, re.M)
    assert re.search(r"^start to listening +s +[\d.]+ +≤ 0.6 +(met|MISSED)$", run.stdout, re.M)
    assert re.search(r"^\d of 2 targets met$", run.stdout, re.M)
    assert re.search(r"^ +proxy +registry:2 +ratio$", run.stdout, re.M)
    assert re.search(r"^  1,000 blobs +duration +s( +[\d,.]+){3}$", run.stdout, re.M)
    assert "hit:" not in run.stdout


def test_a_measure_that_there_is_not(folder: Path) -> None:
    run = bench(folder, "--only", "small,large")
    assert run.returncode == 2
    assert "'large' is none of hit, plain, miss, first, joined, crowd, small, connect, second, memory," in run.stderr
