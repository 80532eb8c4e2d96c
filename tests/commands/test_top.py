"""`top`: its state, its screen on a terminal of script(1), and its lines elsewhere."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dockerproxy.commands.live_screen import render
from dockerproxy.commands.live_view import SORTS, LiveView
from tests.commands.conftest import NOW, ControlSocketStub, Run
from tests.commands.test_status import limit, registry

ROOT = Path(__file__).parents[2]
DIGEST = f"sha256:{'ab' * 32}"


def transfer(identifier: str, name: str = "docker.io/library/nginx", **fields: Any) -> dict[str, Any]:
    row = {"registry": "docker.io", "digest": DIGEST, "size": 1000, "done": 250, "rate": 50, "readers": 1}
    return {"id": identifier, "name": name, **row, **fields}


FIRST = {
    "now": NOW, "first": True, "ended": [],
    "transfers": [
        transfer("1", rate=10, size=900, readers=3),
        transfer("2", "ghcr.io/acme/tool\x1b[2J", rate=None, size=None),
        transfer("3", "quay.io/a/b", size=5_000_000_000, done=1_000_000_000, rate=100_000_000),
    ],
    "registries": [{"name": "docker.io", "up": True}],
    "traffic": {"served": 2_000_000, "downloaded": 1_000_000},
    "cache": {"bytes": 10**9, "limit": 2 * 10**9},
}  # fmt: skip
OVERVIEW = {"version": "1.2.3", "registries": [registry("docker.io", budget=limit()), registry("quay.io", up=False)]}


@pytest.fixture
def view() -> LiveView:
    view = LiveView()
    view.apply(FIRST)
    view.set_overview(OVERVIEW)
    return view


def test_events_change_the_state(view: LiveView) -> None:
    view.apply({})
    view.apply({"now": NOW + 1, "transfers": [{"id": "1", "done": 800}], "ended": ["2", "unknown"]})
    view.apply({"now": NOW + 2, "registries": [{"name": "docker.io", "up": False}], "cache": {"bytes": 7, "limit": 9}})
    snapshot = view.snapshot()
    assert [(row["id"], row["done"], row["readers"]) for row in snapshot["transfers"]] == [
        ("3", 1_000_000_000, 1), ("1", 800, 3)
    ]  # fmt: skip
    assert snapshot["registries"] == [{"name": "docker.io", "up": False}]
    assert snapshot["cache"] == {"bytes": 7, "limit": 9}
    assert [row["up"] for row in view.registries()] == [False, False]
    view.apply({**FIRST, "transfers": []})
    assert view.snapshot()["transfers"] == [], "another first event begins anew"


@pytest.mark.parametrize(("sort", "order"), [("rate", "312"), ("size", "312"), ("clients", "123"), ("name", "123")])
def test_orders(view: LiveView, sort: str, order: str) -> None:
    assert "".join(row["id"] for row in view.transfers(sort)) == order


def draw(view: LiveView, width: int = 120, height: int = 30, sort: str = "rate") -> list[str]:
    output = io.StringIO()
    console = Console(file=output, width=width, height=height, force_terminal=False)
    console.print(render(view, sort, width, height))
    return [line.rstrip() for line in output.getvalue().splitlines()]


SCREEN = """\
docker-registry-proxy 1.2.3: 2 MB/s to clients, 1 MB/s from registries, cache 1 GB of 2 GB
3 downloads under way, by rate
IMAGE                                    DONE            RATE      LEFT  CLIENTS
quay.io/a/b sha256:abababab              1 GB of 5 GB    100 MB/s  40 s  1
docker.io/library/nginx sha256:abababab  250 B of 900 B  10 B/s    65 s  3
ghcr.io/acme/tool\\x1b[2J sha256:abababab 250 B           -         -     1
REGISTRY   STATE            REQUESTS  SERVED  FROM CACHE  P95    BUDGET
docker.io  ok               1200      5 GB    93 %        12 ms  34 of 100
quay.io    does not answer  1200      5 GB    93 %        12 ms  -
q quit  s sort
"""


def test_the_screen(view: LiveView) -> None:
    lines = draw(view, width=99)
    assert [line.split() for line in lines] == [line.split() for line in SCREEN.splitlines()]
    wide = "\n".join(draw(view))
    assert "PROGRESS" in wide and "━" in wide


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (80, 8), (500, 200)], ids=str)
def test_the_screen_fits_any_terminal(view: LiveView, size: tuple[int, int]) -> None:
    for number in range(300):
        view.apply({"transfers": [transfer(f"n{number}", "x" * number)]})
    for sort in SORTS:
        lines = draw(view, *size, sort)
        assert all(len(line) <= size[0] for line in lines)
        assert "\x1b[2J" not in "".join(lines)
    if size[1] > 8:
        assert len(lines) <= size[1]


# in processes


@pytest.fixture
def ticking(daemon: ControlSocketStub) -> Iterator[ControlSocketStub]:
    """Return a daemon that sends events until the test ends."""
    stop = threading.Event()

    def events() -> Iterator[dict[str, Any]]:
        yield FIRST
        for number in range(10_000):
            if stop.wait(0.05):
                return
            yield {"now": NOW + number, "transfers": [{"id": "3", "done": 1_000_000_000 + number}]}

    daemon.answers["GET /v1/live"] = events
    daemon.answers["GET /v1/overview"] = OVERVIEW
    yield daemon
    stop.set()


@pytest.mark.slow
def test_a_line_of_json_each_second(ticking: ControlSocketStub, run: Run) -> None:
    status, output, errors = run("top", "--count", "2")
    assert (status, errors) == (0, "")
    first, second = map(json.loads, output.splitlines())
    assert first["traffic"] == FIRST["traffic"]
    assert first["now"] == NOW
    assert second["transfers"][0]["done"] > 1_000_000_000, "events between the lines were applied"
    assert "\x1b" not in output


@pytest.mark.slow
def test_the_reader_of_the_lines_leaves(ticking: ControlSocketStub) -> None:
    command = f"{sys.executable} -m dockerproxy.cli --socket {ticking.path} top | head -n 1; echo ${{PIPESTATUS[0]}}"
    completed = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    line, status = completed.stdout.splitlines()
    assert json.loads(line)["traffic"] == FIRST["traffic"]
    assert (status, completed.stderr) == ("0", "")


def test_the_daemon_ends(daemon: ControlSocketStub, run: Run) -> None:
    daemon.answers["GET /v1/live"] = lambda: iter([FIRST])
    status, _, errors = run("top")
    assert (status, errors) == (7, "dockerproxy: the daemon closed the connection before it finished\n")


def test_an_older_daemon(daemon: ControlSocketStub, run: Run) -> None:
    status, _, errors = run("top")
    assert status == 4
    assert "does not support" in errors


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}


SCREEN_ON, SCREEN_OFF, CURSOR_ON = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


class OnTerminal:
    """A command on a pseudo-terminal, which script(1) makes within another one of the test."""

    def __init__(self, command: str) -> None:
        self.output = b""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["script", "-qec", f"stty cols 110 rows 30; exec {command}", "/dev/null"],
            stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True,
        )  # fmt: skip
        os.close(slave)

    def read_until(self, text: bytes) -> None:
        deadline = time.monotonic() + 30
        while text not in self.output:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, (text, self.output)
            self.output += self._read()

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def wait(self) -> int:
        while chunk := self._read():
            self.output += chunk
        return self.process.wait(30)

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return b""


@pytest.fixture
def terminal(ticking: ControlSocketStub) -> Iterator[OnTerminal]:
    if shutil.which("script") is None:
        pytest.skip("script(1) is not installed (Debian package bsdutils)")
    terminal = OnTerminal(f"{sys.executable} -m dockerproxy.cli --socket {ticking.path} top")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


@pytest.mark.slow
def test_keys_on_a_terminal(terminal: OnTerminal) -> None:
    terminal.read_until(b"by rate")
    assert SCREEN_ON in terminal.output
    for sort in ("size", "clients", "name", "rate"):
        terminal.output = b""
        terminal.press("s")
        terminal.read_until(f"by {sort}".encode())
    terminal.read_until(b"quay.io")
    terminal.press("x\x1b[A")
    terminal.press("q")
    assert terminal.wait() == 0
    assert SCREEN_OFF in terminal.output and CURSOR_ON in terminal.output
    assert b"ghcr.io/acme/tool\\x1b[2J" in terminal.output


@pytest.mark.slow
def test_an_interrupt_gives_the_terminal_back(terminal: OnTerminal) -> None:
    terminal.read_until(b"by rate")
    terminal.press("\x03")
    assert terminal.wait() == 0
    assert SCREEN_OFF in terminal.output and CURSOR_ON in terminal.output
    assert b"Traceback" not in terminal.output


@pytest.mark.slow
def test_a_signal_gives_the_terminal_back(terminal: OnTerminal, ticking: ControlSocketStub) -> None:
    terminal.read_until(b"by rate")
    [pid] = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_top(path, ticking.path)]
    os.kill(pid, signal.SIGTERM)
    assert terminal.wait() == 143
    assert SCREEN_OFF in terminal.output and CURSOR_ON in terminal.output


def _is_top(path: Path, socket: Path) -> bool:
    try:
        return path.read_bytes().split(b"\0")[-3:] == [str(socket).encode(), b"top", b""]
    except OSError:
        return False
