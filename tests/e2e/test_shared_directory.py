"""Two machines with one REGISTRY_DIR: the second daemon says so and does not start, and one alone goes on as always.

Each machine is a mount of its own of the same files. Their locks do not reach each other.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dockerproxy.store.directory_owner import OWNER_FILE
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.process import mount_fuse, wait_until


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[TwistdDaemon, TwistdDaemon]]:
    with ExitStack() as stack:
        daemons = []
        for name in ("first", "second"):
            stack.enter_context(mount_fuse(tmp_path / name, tmp_path / "files"))
            settings = {"REGISTRY_DIR": str(tmp_path / name / "registry"), "WORKERS": "1"}
            daemons.append(TwistdDaemon(tmp_path / f"{name[0]}", settings))
            stack.callback(daemons[-1].kill)
        yield daemons[0], daemons[1]


def refusal(daemon: TwistdDaemon) -> str:
    """Start `daemon`, which must not start, and return what it says."""
    ended = subprocess.run(
        daemon.argv, env=daemon.environment, capture_output=True, text=True, timeout=60, check=False, cwd=daemon.folder
    )
    assert ended.returncode == 78, ended.stdout + ended.stderr
    return ended.stderr


def test_the_second_daemon_is_refused(machines: tuple[TwistdDaemon, TwistdDaemon]) -> None:
    first, second = machines
    directory = first.environment["REGISTRY_DIR"]
    first.start()
    text = refusal(second)
    assert f"REGISTRY_DIR is {second.environment['REGISTRY_DIR']}, which is on fuse" in text
    assert f"in use by the daemon on {socket.gethostname()} (process ID {first.pid})" in text
    assert "REGISTRY_STORE" in text and text.count("\n") == 1
    # A crash, and the same machine again: it does not wait.
    first.restart(kill=True)
    assert request_directly("GET", f"{first.url}/healthz").status == 200
    assert first.stop() in (0, -signal.SIGTERM)
    assert not (Path(directory) / OWNER_FILE).exists()
    second.start()
    assert request_directly("GET", f"{second.url}/healthz").status == 200
    second.check_log([])


@pytest.mark.slow
def test_a_machine_that_stood_still_stops(machines: tuple[TwistdDaemon, TwistdDaemon]) -> None:
    first, second = machines
    first.start()
    first.send_signal(signal.SIGSTOP)
    second.launch()  # it waits until the other one is surely dead
    second.wait_until_ready(second._is_healthy, timeout=60)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: not first.running, "the first daemon has stopped", timeout=30)
    assert first.stop() == 78
    assert "the daemon stops: REGISTRY_DIR is" in first.output_text
    assert request_directly("GET", f"{second.url}/healthz").status == 200
    for daemon in machines:
        daemon.check_log([])
