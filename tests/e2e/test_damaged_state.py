"""Files of the daemon that are damaged: torn, emptied, overwritten, enormous, or of a newer version. It starts, serves,
and says in a line or two what it lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.upstreams import FAKE, Upstreams

pytestmark = pytest.mark.slow

# Contents, which their digests protect, and secrets, of which a daemon never makes new ones without being told.
_KEPT = re.compile(r"/blobs/|/ca/|/secret$|/lock$|/run/")
_HUGE = 8 << 30  # bytes; a sparse file takes no room
_NEWER = re.compile(rb'("version"|tombstones|drp-ring)(:? ?)\d')


def empty(path: Path) -> None:
    path.write_bytes(b"")


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(min(path.stat().st_size, 4096) or 100))


def enlarge(path: Path) -> None:
    os.truncate(path, _HUGE)


def renew(path: Path) -> None:
    """Make it of a version that this program does not know, or at least of a form."""
    content = path.read_bytes()
    if content.startswith(b"drp-ring"):
        content = content[:8] + b"\x63" + content[9:]
    elif (newer := _NEWER.sub(rb"\g<1>\g<2>99", content, count=1)) != content:
        content = newer
    else:
        content = b'{"version": 99, "value": [{"kind": null}]}\n' + content[:0]
    path.write_bytes(content)


def run(daemon: TwistdDaemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dockerproxy.cli", *arguments, "--socket"]
    environment = {**daemon.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [*argv, str(daemon.state_folder / "run/control.sock")],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def test_a_daemon_starts_whatever_is_in_its_files(
    upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    name, image = "damaged/app", images.build_small_image("damaged state", size=1000)
    upstreams.fake.put(name, "v1", image)
    pins = tmp_path / "pins"
    pins.write_text(f"fake.test/{name}:v1\n")
    daemon = start_daemon(PIN_FILE=str(pins))

    def pull() -> None:
        assert daemon.client.get(f"{FAKE}/v2/{name}/manifests/v1", Accept=ACCEPT_MANIFESTS).status == 200
        assert daemon.client.get(f"{FAKE}/v2/{name}/blobs/{image.layers[0].digest}").status == 200

    pull()
    assert run(daemon, "pins", "--refresh").returncode == 0
    assert run(daemon, "check", "--cached").returncode == 0
    daemon.stop()
    files = [path for path in daemon.state_folder.rglob("*") if path.is_file() and not _KEPT.search(str(path))]
    kinds = {path.relative_to(daemon.state_folder).parts[0] for path in files}
    assert {"cache", "history", "audit.jsonl"} <= kinds
    names = {path.name for path in files}
    assert {"pulls.jsonl", "10s.ring", "link"} <= names
    contents = {path: path.read_bytes() for path in files}
    damages: tuple[Callable[[Path], None], ...] = (empty, tear, overwrite, enlarge, renew)
    for damage in damages:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            damage(path)
        offset = daemon.log_offset()
        daemon.start()
        pull()
        for command in (
            ("history",), ("why", f"fake.test/{name}:v1"), ("pins",), ("budget",), ("status",), ("ls",), ("doctor",),
        ):  # fmt: skip
            result = run(daemon, *command, "--json")
            assert result.returncode in (0, 1), (damage.__name__, command, result)
            json.loads(result.stdout)
        assert request_directly("GET", f"{daemon.url}/metrics").status == 200
        daemon.stop()
        daemon.check_log([])
        lines = Counter(
            str(path) for path in files for line in daemon.output_text[offset:].splitlines() if f"{path} " in line
        )
        assert max(lines.values(), default=0) <= 2, (damage.__name__, lines)
