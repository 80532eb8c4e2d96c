from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.headers import Headers
from dockerproxy.registry.pull_gatherer import PullGatherer, Row, rows_of
from tests.cache.support.reactor import ManualReactor

INDEX, IMAGE, LAYER = (f"sha256:{character * 64}" for character in "abc")


class FinishedRequest:
    """The parts of a finished request that are gathered."""

    def __init__(self, resource: str, method: str = "GET", verdict: str = "HIT", **attributes: Any) -> None:
        self.client, self.user, self.proxy_user, self.registry = "192.0.2.1", None, None, "docker.io"
        self.path, self.method, self.status, self.cache_status = f"/v2/library/nginx/{resource}", method, 200, verdict
        self.kind = "manifest" if resource.startswith("manifests") else "blob"
        self.because, self.user_agent, self.bytes_sent = "", "docker/27", 10
        self.headers = Headers()
        for name, value in attributes.items():
            setattr(self, name, value)


class Harness:
    def __init__(self) -> None:
        self.reactor, self.reports = ManualReactor(), list[list[Row]]()
        self.gatherer = PullGatherer(self.reactor, self.reports.append, lambda: 1_800_000_000 + self.reactor.seconds())

    def note(self, *arguments: Any, **attributes: Any) -> None:
        self.gatherer.note(FinishedRequest(*arguments, **attributes))  # type: ignore[arg-type]

    def rows(self) -> list[Row]:
        self.reactor.advance(60)
        return [row for report in self.reports for row in report]


def summary(rows: list[Row]) -> list[tuple[str, str, int, int]]:
    return [(row["reference"], row["verdict"], row["requests"], row["pulls"]) for row in rows]


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_docker_pulls_by_tag_and_then_by_digest(harness: Harness) -> None:
    harness.note("manifests/1.29", verdict="REVALIDATED", because="unchanged")
    harness.note(f"manifests/{IMAGE}")
    harness.note(f"blobs/{LAYER}")
    (row,) = harness.rows()
    assert row == {
        "time": "2027-01-15T08:00:00Z", "client": "192.0.2.1", "user": None, "user_agent": "docker/27",
        "where": "cached", "repository": "docker.io/library/nginx", "kind": "manifest", "reference": "1.29",
        "status": 200, "verdict": "REVALIDATED", "because": "unchanged", "bytes": 10, "requests": 1, "pulls": 1,
    }  # fmt: skip


def test_containerd_asks_for_the_tag_by_head(harness: Harness) -> None:
    harness.note("manifests/1.29", "HEAD", "REVALIDATED", bytes_sent=0)
    harness.note(f"manifests/{INDEX}")
    harness.note(f"manifests/{IMAGE}")
    assert summary(harness.rows()) == [("1.29", "REVALIDATED", 1, 1)]


def test_a_question_is_no_pull(harness: Harness) -> None:
    harness.note("manifests/1.29", "HEAD", "REVALIDATED")
    assert summary(harness.rows()) == [("1.29", "REVALIDATED", 1, 0)]


def test_a_pull_by_digest(harness: Harness) -> None:
    for digest in (INDEX, IMAGE, INDEX, IMAGE):
        harness.note(f"manifests/{digest}")
    assert summary(harness.rows()) == [(INDEX, "HIT", 2, 2)]


def test_hosts_behind_one_address(harness: Harness) -> None:
    for _ in range(500):
        harness.note("manifests/1.29")
        harness.note(f"manifests/{IMAGE}")
    assert summary(harness.rows()) == [("1.29", "HIT", 500, 500)]


def test_what_was_no_hit_has_a_row(harness: Harness) -> None:
    harness.note("manifests/1.29", verdict="REVALIDATED", because="unchanged")
    harness.note(f"manifests/{IMAGE}", verdict="MISS", because="evicted 2026-11-14 43d")
    for number in range(20):
        harness.note(f"blobs/sha256:{number:064}", verdict="MISS", because="new")
    harness.note(f"blobs/{LAYER}", verdict="JOINED")
    rows = harness.rows()
    assert [(row["kind"], row["verdict"], row["because"], row["pulls"]) for row in rows] == [
        ("manifest", "REVALIDATED", "unchanged", 1), ("manifest", "MISS", "evicted 2026-11-14 43d", 0),
        ("blob", "MISS", "new", 0), ("blob", "JOINED", "", 0),
    ]  # fmt: skip
    assert (rows[2]["blobs"], len(rows[2]["digests"]), rows[2]["bytes"]) == (20, 8, 200)


def test_failures_are_no_pulls(harness: Harness) -> None:
    harness.note("manifests/1.29", status=502, verdict="-", because="docker.io does not answer")
    harness.note("manifests/1.29", status=401, verdict="-")
    harness.note("manifests/2", status=401, verdict="-", headers=Headers([("authorization", "Bearer x")]))
    harness.note("manifests/3", status=0, verdict="-")
    harness.note("manifests/4", "PUT", "-")
    rows = [(row["reference"], row["status"], row["pulls"]) for row in harness.rows()]
    assert rows == [("1.29", 502, 0), ("2", 401, 0)]


def test_hosted_repositories_and_users(harness: Harness) -> None:
    harness.note("manifests/1", registry="hosted", verdict="-", user="alice", path="/v2/team%2Fapp/manifests/1")
    (row,) = harness.rows()
    assert (row["where"], row["repository"], row["user"]) == ("hosted", "team/app", "alice")


def test_clients_and_minutes_are_apart(harness: Harness) -> None:
    harness.note("manifests/1.29")
    harness.note("manifests/1.29", client="192.0.2.2")
    assert len(harness.rows()) == 2
    harness.note("manifests/1.29")
    assert len(harness.rows()) == 3
    assert not harness.reactor.getDelayedCalls()


def test_what_one_client_can_cause_is_bounded(harness: Harness) -> None:
    for number in range(10_000):
        harness.note(f"manifests/{number}", client="198.51.100.1", user_agent="x" * 256, because="y" * 10_000)
        harness.note(f"manifests/{number}", client="198.51.100.1", status=404)
    harness.note("manifests/1.29")
    harness.note("manifests/1.29", status=404)
    rows = harness.rows()
    assert sum(row["client"] == "192.0.2.1" for row in rows) == 2
    assert len(rows) == 2 + 2500 + 250
    assert max(len(json.dumps(report)) for report in harness.reports) < 192 * 1024


def test_the_bound_of_a_client_is_that_of_a_minute(harness: Harness) -> None:
    for number in range(300):
        harness.note(f"manifests/{number}", status=404)
    assert len(harness.rows()) == 250
    harness.note("manifests/1.29", status=404)
    assert len(harness.rows()) == 251


def test_a_process_that_stops_reports_what_it_has(harness: Harness) -> None:
    harness.note("manifests/1.29")
    harness.gatherer.flush()
    assert len(harness.reports) == 1 and not harness.reactor.getDelayedCalls()
    harness.gatherer.flush()
    assert len(harness.reports) == 1


def test_a_busy_minute_holds_up_no_request(harness: Harness) -> None:
    """A thread turns thousands of requests into rows. Those that come meanwhile are of the next minute."""
    for number in range(1000):
        harness.note(f"manifests/{number}")
    harness.reactor.pool.hold()
    assert harness.rows() == [] and harness.reactor.pool.waiting == 1
    harness.note("manifests/later")
    harness.reactor.pool.release()
    assert [len(report) for report in harness.reports] == [100] * 10
    assert len(harness.rows()) == 1001


@given(st.lists(st.tuples(st.text(max_size=20), st.sampled_from(["GET", "HEAD"]), st.integers(100, 599)), max_size=20))
def test_no_path_that_a_client_sends_fails(requests: list[tuple[str, str, int]]) -> None:
    harness = Harness()
    for text, method, status in requests:
        harness.note("manifests/x", method, path=f"/v2/{text}/manifests/{text}", status=status)
    for row in harness.rows():
        json.dumps(row)
    assert rows_of([]) == []
