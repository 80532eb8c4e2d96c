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
_REQUESTS = ("requests", "server CPU", "clients' CPU")
_CONNECTIONS = ("connections", "server CPU", "clients' CPU")
_GROWTH = ("at most", "at the end", "without them")

_FIGURES = {
    ("hit", "1 client"): _BYTES,
    ("hit", "8 clients"): _BYTES,
    ("miss", "1 client"): (*_BYTES, "from upstream"),
    ("miss", "8 clients"): (*_BYTES, "from upstream"),
    ("small", "32 connections"): _REQUESTS,
    ("connect", "full handshake"): _CONNECTIONS,
    ("connect", "session resumed"): (*_CONNECTIONS, "resumed"),
    ("memory", "50 slow clients"): _GROWTH,
    ("memory", "50 idle"): _GROWTH,
    ("push", "1 layer"): _BYTES,
    ("push", "200 small layers"): ("layers", "server CPU", "clients' CPU"),
    ("gc", "1,000 blobs"): ("duration", "CPU", "longest wait"),
}

_BESIDE_REGISTRY = {"push", "gc"}

_BESIDE_LOGGING = {
    ("hit", "1 client"),
    ("small", "32 connections"),
    ("connect", "full handshake"),
    ("connect", "session resumed"),
}

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"

pytestmark = pytest.mark.skipif(
    None in (shutil.which("nginx", path=_PATH), shutil.which("docker-registry", path=_PATH)),
    reason="nginx or docker-registry is missing (Debian's nginx-light, docker-registry)",
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
            output, errors = process.communicate(timeout=240)
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
def found(folder: Path) -> dict[str, Any]:
    """What the whole benchmark has to say."""
    run = bench(folder, "--json")
    assert run.returncode == 0, run.stderr
    data: dict[str, Any] = json.loads(run.stdout)
    return data


def test_every_figure_is_there(found: dict[str, Any]) -> None:
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in found["rows"]:
        key = row["measure"], row["case"]
        rows[key] = (*rows.get(key, ()), row["figure"])
    assert rows == _FIGURES


def test_every_figure_is_beside_those_of_a_peer(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        logging = {"nginx+log"} if (row["measure"], row["case"]) in _BESIDE_LOGGING else set()
        peer = "registry:2" if row["measure"] in _BESIDE_REGISTRY else "nginx"
        assert set(row["samples"]) == {"proxy", peer} | logging, row
        for values in row["samples"].values():
            assert len(values) == 1, row
            assert values[0] >= 0, row
        if row["figure"] in ("throughput", "requests", "connections", "layers"):
            assert all(ratio > 0 for ratio in row["ratios"].values()), row


def test_many_clients_share_one_download(found: dict[str, Any]) -> None:
    upstream = [row for row in found["rows"] if row["figure"] == "from upstream"]
    assert [row["medians"]["proxy"] for row in upstream] == [1, 1]


def test_sessions_are_resumed_where_that_is_measured(found: dict[str, Any]) -> None:
    (row,) = [row for row in found["rows"] if row["figure"] == "resumed"]
    assert row["medians"]["proxy"] == row["medians"]["nginx"] == 100


def test_the_load_of_the_machine_is_noted(found: dict[str, Any]) -> None:
    assert {"load average at the start", "load average at the end"} <= set(found["machine"])


def test_the_table_for_people(folder: Path) -> None:
    run = bench(folder, "--only", "small,gc")
    assert run.returncode == 0, run.stderr
    assert re.search(r"^ +proxy +registry:2 +ratio$", run.stdout, re.M)
    assert re.search(r"^  1,000 blobs +duration +s( +[\d,.]+){3}$", run.stdout, re.M)
    assert re.search(r"^ +proxy +nginx +ratio +nginx\+log +ratio$", run.stdout, re.M)
    assert re.search(r"^  32 connections +requests +/s( +[\d,.]+\*?){5}$", run.stdout, re.M)
    assert re.search(r"^ +server CPU +µs each( +[\d,.]+){5}$", run.stdout, re.M)
    assert "hit:" not in run.stdout


def test_a_measure_that_there_is_not(folder: Path) -> None:
    run = bench(folder, "--only", "small,large")
    assert run.returncode == 2
    assert "'large' is none of hit, miss, small, connect, memory, push, gc" in run.stderr
