"""`/readyz` of a real daemon, with a small disk that becomes full and a directory that is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.process import wait_until


def ready(daemon: TwistdDaemon) -> BufferedResponse:
    return request_directly("GET", daemon.url + "/readyz")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the directory of a file system of 40 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("setting", ["CACHE_DIR", "REGISTRY_DIR"])
def test_a_full_disk_is_not_ready(start_daemon: StartDaemon, small_disk: Path, setting: str, workers: int) -> None:
    daemon = start_daemon(WORKERS=str(workers), **{setting: str(small_disk / "store")})
    assert (ready(daemon).status, ready(daemon).body) == (200, b"ready\n")
    filler = small_disk / "filler"
    fill = f"open({str(filler)!r}, 'wb', 0).write(bytes(64 << 20))"
    subprocess.run([sys.executable, "-c", fill], capture_output=True, check=False)
    wait_until(lambda: ready(daemon).status == 503, "the daemon is not ready")
    response = ready(daemon)
    assert response.body.startswith(f"{setting} is full: ".encode())
    assert str(small_disk).encode() not in response.body
    assert response.headers["retry-after"] == "10"
    assert request_directly("GET", daemon.url + "/healthz").status == 200
    filler.unlink()
    wait_until(lambda: ready(daemon).status == 200, "the daemon is ready again")


def test_a_store_that_is_gone_is_not_ready(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(REGISTRY_READ_ONLY="true")
    for name, status in (("registry", 200), ("cache", 503)):  # nothing is written to a read-only registry
        staging = daemon.state_folder / name / "staging"
        staging.rename(staging.with_name("moved"))
        wait_until(lambda status=status: ready(daemon).status == status, f"{name} counts")
    assert ready(daemon).body.startswith(b"CACHE_DIR cannot be written: No such file or directory; ")
