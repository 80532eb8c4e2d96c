"""The service of pulls and pins: PIN_FILE, and what becomes of it if it changes all the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin.pulls import PullService
from dockerproxy.cache.image_pull import PullRequest
from dockerproxy.cache.pins import Pins, pin_records
from dockerproxy.concurrency import spawn
from dockerproxy.errors import NameUnknown
from dockerproxy.store.layout import Layout
from tests.cache.support.reactor import ManualReactor
from tests.support.audit import make_audit_log

NOW = 1_800_000_000.0


class StubPuller:
    """Pulls nothing: no registry is cached."""

    def prepare(self, request: PullRequest) -> Any:
        raise NameUnknown(f"{request.image.host} is not cached here")


class Harness:
    def __init__(self, folder: Path) -> None:
        self.reactor, self.layout, self.pin_file = ManualReactor(), Layout(folder / "cache"), folder / "pins"
        self.pins = Pins(self.reactor, pin_records(self.layout), lambda: NOW, limit=1000, cost=1)
        puller: Any = StubPuller()
        self.service = PullService(
            self.reactor, puller, self.pins, self.layout, make_audit_log()[0], lambda: NOW, lambda: self.pin_file
        )  # fmt: skip

    def read(self, content: bytes) -> None:
        """Change the file, and have it read."""
        self.pin_file.write_bytes(content)
        spawn(self.service.fetch_new_pins(), "fetching pinned images")

    @property
    def images(self) -> list[str]:
        return [row["image"] for row in self.service.pins()]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"nginx:1\nredis:7\n", b"nginx:1\r\nredis:7\r\n", b"\xef\xbb\xbfnginx:1\nredis:7", b"nginx:1\rredis:7\rnginx:1"],
    ids=["unix", "windows", "byte-order-mark", "old-mac"],
)
def test_files_of_all_editors(harness: Harness, content: bytes) -> None:
    harness.read(content)
    assert harness.images == ["docker.io/library/nginx:1", "docker.io/library/redis:7"]
    assert harness.service._problems == ()


def test_what_was_read_last_counts(harness: Harness) -> None:
    """A timer and a reload read it at the same time, and one of the threads is slow."""
    harness.reactor.pool.hold(results=True)
    harness.read(b"nginx:1\n")
    harness.read(b"redis:7\n")
    while harness.reactor.pool.waiting:
        if harness.reactor.pool.waiting > 1:
            harness.reactor.pool.defer_next()
        harness.reactor.pool.step()
    assert harness.images == ["docker.io/library/redis:7"]


def test_a_file_that_is_removed_while_the_daemon_runs(harness: Harness) -> None:
    harness.read(b"nginx:1\n")
    harness.pin_file.unlink()
    spawn(harness.service.fetch_new_pins(), "fetching pinned images")
    assert harness.images == ["docker.io/library/nginx:1"]
    (problem,) = harness.service._problems
    assert problem == f"PIN_FILE: {harness.pin_file} cannot be read: No such file or directory; its pins stay"
