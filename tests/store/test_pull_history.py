from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from dockerproxy.store import daily_pulls, journal
from dockerproxy.store.daily_pulls import CountedPull, DailyPulls, Popularity
from dockerproxy.store.journal import Journal
from dockerproxy.store.pull_history import PullHistory, PullHistoryService
from tests.store.support.reactor import SteppedReactor

DAY = 86400.0
ROW: dict[str, Any] = {
    "time": "2027-01-15T08:00:00Z", "client": "192.0.2.1", "user": None, "user_agent": None, "where": "cached",
    "repository": "docker.io/library/nginx", "kind": "manifest", "reference": "1.29", "status": 200, "verdict": "HIT",
    "because": "", "bytes": 10, "requests": 1, "pulls": 1,
}  # fmt: skip


def _is_public(repository: str, reference: str) -> bool:
    return reference == "public"


@define
class Harness:
    folder: Path
    now: float = 1_800_000_000.0
    history: PullHistory = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restart()

    def restart(self, lifetime: float = 30 * DAY) -> None:
        self.history = PullHistory(str(self.folder / "history"), lifetime, lambda: self.now, _is_public)

    def pull(
        self,
        repository: str = "docker.io/library/nginx",
        client: str = "192.0.2.1",
        pulls: int = 1,
        reference: str = "1.29",
    ) -> None:
        changes = {"repository": repository, "client": client, "pulls": pulls, "reference": reference}
        self.history.append([{**ROW, **changes, "time": self.text}])

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


def test_rows_of_a_wrong_clock_hide_and_remove_no_others(harness: Harness) -> None:
    """A machine without a battery is in 1970 until it hears of the time, after each start."""
    harness.pull(client="before")
    now, harness.now = harness.now, 60.0
    for _ in range(50):
        harness.pull(client="in 1970")
    harness.history.clean()
    harness.now = now + DAY
    harness.pull(client="after")
    assert harness.clients == ["after", "before"]
    harness.history.clean()
    assert harness.clients == ["after", "before"]
    assert b"1970" not in Path(harness.history.path).read_bytes()


def test_old_rows_are_not_read_to_the_last(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.history.append([{**ROW, "time": harness.text, "client": str(number)} for number in range(20_000)])
    harness.now += DAY
    harness.pull(client="new")
    parsed = []
    parse = journal._parse

    def count(line: bytes) -> Any:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(journal, "_parse", count)
    assert [row["client"] for row in harness.history.read(harness.now - 60)] == ["new"]
    assert len(parsed) < 2000


def test_lines_that_are_no_rows_are_left_out(harness: Harness) -> None:
    """Somebody has edited the file, or the disk is damaged."""
    harness.pull(client="of a row")
    row = {**ROW, "kind": "blob", "time": harness.text, "blobs": 1, "digests": []}
    values: tuple[Any, ...] = (1.5, [], {})
    odd = [{**row, name: value} for name in (*ROW, "blobs") for value in values]
    missing = [{other: row[other] for other in row if other != name} for name in ("time", "status", "blobs")]
    Journal(harness.history.path, "pulls", 1 << 20).append([*odd, *missing, {}, {"time": harness.text}])
    assert harness.clients == ["of a row"]


def test_a_history_that_is_switched_off_is_deleted(harness: Harness) -> None:
    harness.pull()
    folder = harness.folder / "history"
    for name in ("pulls.jsonl.aside", "pulls.jsonl.new", "pulls-2026-01-01.json.aside", "staging/1234"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"192.0.2.1")
    harness.history.clear_staging()
    harness.restart(lifetime=0)
    harness.history.clean()
    assert os.listdir(harness.folder / "history") == []
    assert dict(harness.history.counts.pulls()) == {}


def test_files_that_were_set_aside_are_kept_as_long_as_rows(harness: Harness) -> None:
    harness.pull()
    paths = [harness.folder / "history" / name for name in ("pulls.jsonl.aside", "pulls-2026-01-01.json.aside")]
    for path in paths:
        path.write_bytes(b"192.0.2.1")
        os.utime(path, (harness.now, harness.now))
    harness.now += 29 * DAY
    harness.history.clean()
    assert all(path.exists() for path in paths)
    harness.now += 2 * DAY
    harness.history.clean()
    assert not any(path.exists() for path in paths)


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


def test_public_pulls_are_counted_apart(harness: Harness) -> None:
    for reference, pulls in (("public", 2), ("private", 3)):
        harness.pull(pulls=pulls, reference=reference)
    harness.now += DAY
    harness.pull(reference="public")
    harness.restart()
    sums = harness.history.counts.sums()
    assert (dict(sums.total), dict(sums.public)) == ({"docker.io/library/nginx": 6}, {"docker.io/library/nginx": 3})


def test_counts_of_an_earlier_version_are_read(harness: Harness) -> None:
    harness.pull()
    (file,) = (harness.folder / "history").glob("pulls-*.json")
    file.write_text('{"version":1,"repositories":{"docker.io/library/nginx":[7,["192.0.2.1"]]}}')
    harness.restart()
    sums = harness.history.counts.sums()
    assert (dict(sums.total), dict(sums.public)) == ({"docker.io/library/nginx": 7}, {"docker.io/library/nginx": 0})


def test_a_hosted_repository_has_a_name_of_its_own(harness: Harness) -> None:
    harness.history.append([{**ROW, "repository": "docker.io/x", "where": "hosted", "time": harness.text}])
    assert dict(harness.history.counts.pulls()) == {"hosted/docker.io/x": 1}


def test_the_counts_of_a_day_are_bounded(harness: Harness) -> None:
    counts = harness.history.counts
    counts.add(
        CountedPull(f"docker.io/library/{number}", f"c{number % 100}", 1, is_public=True) for number in range(6000)
    )
    assert len(counts.pulls()) == 5000
    counts.add(CountedPull("docker.io/library/0", f"client {number}", 1, is_public=True) for number in range(5000))
    assert counts.of("docker.io/library/0") == Popularity(5001, 2000)


def test_the_clients_of_a_day_are_bounded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily_pulls, "_MAX_CLIENTS", 10)
    counts = harness.history.counts
    for repository in ("a", "b", "c"):
        counts.add(CountedPull(repository, f"192.0.2.{number}", 1, is_public=True) for number in range(4))
    assert [counts.of(repository) for repository in ("a", "b", "c")] == [
        Popularity(4, 4), Popularity(4, 4), Popularity(4, 2),
    ]  # fmt: skip


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
        b'{"version":1,"repositories":{"a":[1e999,[]]}}',
    ],
    ids=["empty", "torn", "list", "binary", "newer", "other", "nested", "infinite"],
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
