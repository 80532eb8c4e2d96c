from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from dockerproxy.store.daily_pulls import DailyPulls, Popularity
from dockerproxy.store.pull_history import PullHistory, PullHistoryService
from tests.store.support.reactor import SteppedReactor

DAY = 86400.0


@define
class Harness:
    folder: Path
    now: float = 1_800_000_000.0
    history: PullHistory = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restart()

    def restart(self, lifetime: float = 30 * DAY) -> None:
        self.history = PullHistory(str(self.folder / "history"), lifetime, lambda: self.now)

    def pull(self, repository: str = "docker.io/library/nginx", client: str = "192.0.2.1", pulls: int = 1) -> None:
        row = {"repository": repository, "client": client, "pulls": pulls, "where": "cached", "time": self.text}
        self.history.append([row])

    @property
    def text(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now))

    @property
    def clients(self) -> list[Any]:
        return [row["client"] for row in self.history.read()]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def test_rows_are_read_by_time_and_text(harness: Harness) -> None:
    for number in range(5):
        harness.pull(client=f"192.0.2.{number}")
        harness.now += DAY
    assert harness.clients == [f"192.0.2.{number}" for number in range(4, -1, -1)]
    assert [row["client"] for row in harness.history.read(harness.now - 2.5 * DAY)] == ["192.0.2.4", "192.0.2.3"]
    assert [row["client"] for row in harness.history.read(needle="192.0.2.1")] == ["192.0.2.1"]


def test_old_rows_are_neither_shown_nor_kept(harness: Harness) -> None:
    harness.pull(client="192.0.2.1")
    harness.now += 20 * DAY
    harness.pull(client="192.0.2.2")
    harness.now += 15 * DAY
    assert harness.clients == ["192.0.2.2"]
    assert b"192.0.2.1" in Path(harness.history.path).read_bytes()
    reactor = SteppedReactor()
    service = PullHistoryService(reactor, harness.history)
    service.startService()
    reactor.run_one()
    service.stopService()
    assert b"192.0.2.1" not in Path(harness.history.path).read_bytes()
    assert harness.clients == ["192.0.2.2"]


def test_a_history_that_is_switched_off_is_deleted(harness: Harness) -> None:
    harness.pull()
    harness.restart(lifetime=0)
    harness.history.clean()
    assert os.listdir(harness.folder / "history") == []
    assert dict(harness.history.counts.pulls()) == {}


def test_pulls_and_hosts_of_the_last_days(harness: Harness) -> None:
    for _ in range(40):
        harness.pull(client="192.0.2.1", pulls=2)
        harness.pull("ghcr.io/acme/x", "192.0.2.9")
        harness.pull(client=f"192.0.2.{harness.now % 7}", pulls=0)  # only a question
        harness.now += DAY
    harness.now -= DAY
    harness.pull(client="192.0.2.2")
    counts = DailyPulls(f"{harness.folder}/history", lambda: harness.now)  # in another process
    assert dict(counts.pulls()) == {"docker.io/library/nginx": 61, "ghcr.io/acme/x": 30}
    assert counts.of("docker.io/library/nginx") == Popularity(61, 2)
    assert counts.of("docker.io/library/other") == Popularity(0, 0)
    assert dict(counts.pulls(1))["docker.io/library/nginx"] == 3
    harness.pull(client="192.0.2.3")
    assert counts.of("docker.io/library/nginx") == Popularity(62, 3)
    assert counts.pulls()["docker.io/library/nginx"] == 62


def test_counts_go_on_after_a_restart_and_end_after_90_days(harness: Harness) -> None:
    harness.pull()
    harness.restart()
    harness.pull()
    assert harness.history.counts.of("docker.io/library/nginx") == Popularity(2, 1)
    harness.now += 91 * DAY
    harness.pull()
    harness.history.clean()
    assert len([name for name in os.listdir(harness.folder / "history") if name.startswith("pulls-")]) == 1


def test_a_hosted_repository_has_a_name_of_its_own(harness: Harness) -> None:
    harness.history.append(
        [{"repository": "docker.io/x", "client": "a", "pulls": 1, "where": "hosted", "time": harness.text}]
    )
    assert dict(harness.history.counts.pulls()) == {"hosted/docker.io/x": 1}


def test_the_counts_of_a_day_are_bounded(harness: Harness) -> None:
    counts = harness.history.counts
    counts.add((f"docker.io/library/{number}", f"c{number % 100}", 1) for number in range(6000))
    assert len(counts.pulls()) == 5000
    counts.add(("docker.io/library/0", f"client {number}", 1) for number in range(5000))
    assert counts.of("docker.io/library/0") == Popularity(5001, 2000)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"version":2,"repositories":{}}',
        b'{"version":1,"repositories":{"a":1}}',
        b"[" * 9999,
    ],
    ids=["empty", "torn", "list", "binary", "newer", "other", "nested"],
)
def test_a_file_of_counts_that_cannot_be_used_is_set_aside(harness: Harness, content: bytes) -> None:
    harness.pull()
    (file,) = (harness.folder / "history").glob("pulls-*.json")
    file.write_bytes(content)
    harness.restart()
    assert dict(harness.history.counts.pulls()) == {}
    assert file.with_name(f"{file.name}.aside").read_bytes() == content
    harness.pull()
    assert dict(harness.history.counts.pulls()) == {"docker.io/library/nginx": 1}


def test_a_directory_that_cannot_be_used_fails_no_start(tmp_path: Path) -> None:
    (tmp_path / "history").touch()
    harness = Harness(tmp_path)
    harness.history.clean()
    assert harness.clients == [] and dict(harness.history.counts.pulls()) == {}
    with pytest.raises(OSError):
        harness.pull()
