"""Verification of a registry in a bucket: the findings of a directory with the same faults, and bad days."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from dockerproxy.bucket import bucket_check, keys
from dockerproxy.bucket.bucket_check import ContentCheck
from dockerproxy.errors import InsufficientStorage, StoreRefused, StoreUnavailable, UpstreamBroken
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.repository_check import Finding, ScrubResult
from dockerproxy.store.scrub import scrub
from tests.bucket.support.trees import blocking, fail_after, make_store, run, upload_tree
from tests.bucket.test_bucket_tree import damages, pushes, twins
from tests.cache.support.upstream import ScriptedResponse
from tests.store.support.images import BOTH, ONE
from tests.support.examples import examples
from tests.support.fake_store import FakeStore, refusal, xml

CONFIG = Digest.of(b"config1")
BLOB = f"site/{keys.blob_key(CONFIG)}"


def check(fake: FakeStore, **progress: Any) -> tuple[ScrubResult, list[Finding]]:
    findings: list[Finding] = []
    contents = ContentCheck(fake.bucket(), Progress(emit=findings.append, **progress))
    run(fake, contents.run())
    contents.check_repositories(blocking(fake), None, sparse=False)
    return ScrubResult(**contents.counts), findings


def check_directory(root: Path) -> tuple[ScrubResult, list[Finding]]:
    findings: list[Finding] = []
    return scrub(Layout(root), progress=Progress(emit=findings.append)), findings


def comparable(findings: list[Finding]) -> list[tuple[Any, ...]]:
    return sorted(
        (finding.kind, finding.message.partition("; moved to")[0], finding.repository or "", str(finding.digest))
        for finding in findings
    )


@settings(max_examples=examples(80), deadline=None)
@given(pushes, damages)
def test_it_finds_what_it_finds_in_a_directory(pushed: Any, damaged: Any) -> None:
    with twins(pushed, damaged) as (root, fake):
        expected, expected_findings = check_directory(root)
        result, findings = check(fake)
        assert comparable(findings) == comparable(expected_findings)
        assert result == expected
        # Now for the second time: some links were mended, and some contents were moved.
        expected, expected_findings = check_directory(root)
        result, findings = check(fake)
        assert comparable(findings) == comparable(expected_findings)
        assert result == expected


def test_an_intact_bucket_has_no_findings_and_is_not_changed() -> None:
    with twins([("team/app", BOTH, ["v1"]), ("a", ONE, [])]) as (_, fake):
        before = dict(fake.objects)
        result, findings = check(fake)
        assert findings == []
        assert (result.repositories, result.tags, result.unlinked) == (2, 1, 0)
        assert fake.objects == before
        assert {request.method for request in fake.requests if "dockerproxy" not in request.key} <= {
            "GET", "HEAD", "PUT", "POST"
        }  # fmt: skip


def test_contents_of_no_repository_are_counted() -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (_, fake):
        fake.store(f"site/{keys.blob_key(Digest.of(b'garbage'))}", b"garbage")
        fake.store(f"site/{keys.BLOBS}sha256/00/short/data", b"strange")
        result, findings = check(fake)
        assert (findings, result.unlinked) == ([], 1)


@pytest.mark.parametrize("content", [b"config2", b"", b"config1 and more"])
def test_a_damaged_content_is_moved_aside_and_a_push_restores_it(content: bytes) -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        fake.store(BLOB, content)
        result, findings = check(fake)
        assert (result.damaged, result.findings) == (1, 3)
        assert [(finding.kind, finding.repository, finding.digest) for finding in findings] == [
            ("damaged", None, CONFIG), ("missing", "team/app", CONFIG), ("missing", "team/app", ONE.digest)
        ]  # fmt: skip
        message = findings[0].message
        assert "moved to dockerproxy/damaged/ in the bucket images at http://store.test:9000" in message
        assert "push an image with it again, or get it from a copy by `dockerproxy import DIRECTORY`" in message
        assert BLOB not in fake.objects
        assert fake.objects[f"site/{keys.damaged_key(CONFIG)}"] == content
        fake.store(BLOB, b"config1")
        assert check(fake)[1] == []


@pytest.mark.parametrize("moment", ["before the copy", "before the second look", "deleted"])
def test_a_content_that_a_push_replaces_meanwhile_stays(moment: str) -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        fake.store(BLOB, b"damaged")

        def replace(request: Any) -> Any:
            wanted = "PUT" if moment == "before the copy" else "GET"
            if request.method == wanted and CONFIG.hex in request.key and request is not fake.requests[0]:
                if wanted == "GET" and not any("damaged" in other.key for other in fake.requests):
                    return None
                if moment == "deleted":
                    fake._delete(BLOB)
                else:
                    fake.store(BLOB, b"config1")
                fake.faults.clear()
            return None

        fake.faults.append(replace)
        _, findings = check(fake)
        if moment == "deleted":
            assert [finding.kind for finding in findings] == ["missing", "missing"]
        else:
            assert findings == []
            assert fake.objects[BLOB] == b"config1"
        assert f"site/{keys.damaged_key(CONFIG)}" not in fake.objects


def test_a_content_that_changed_on_its_way_is_not_damaged() -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        fake.fail(ScriptedResponse(200, b"cOnfig1"), only=f"GET {keys.blob_key(CONFIG)}")
        assert check(fake)[1] == []
        assert fake.objects[BLOB] == b"config1"


def test_a_content_that_cannot_be_copied_is_told_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_check, "_MAX_COPY", 6)
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        fake.store(BLOB, b"damaged")
        result, findings = check(fake)
        assert f"delete the key {keys.blob_key(CONFIG)}, and push it again" in findings[0].message
        assert result.damaged == 1
        assert fake.objects[BLOB] == b"damaged"


def test_a_push_during_the_check_is_no_problem() -> None:
    """The manifest and its link come after the keys of the repository's blobs were listed."""
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        later = make_store()
        with twins([("team/app", BOTH, ["v1", "v2"])]) as (other, _):
            upload_tree(later, other)
        fake.lists_at_once = 4
        count = 0

        def push(request: Any) -> Any:
            nonlocal count
            count += "list-type" in request.query and request.query["prefix"].endswith("repositories/")
            if count == 2:
                fake.faults.clear()
                for key, content in later.objects.items():
                    fake.store(key, content)
            return None

        fake.faults.append(push)
        contents = ContentCheck(fake.bucket(), Progress(emit=(findings := list[Finding]()).append))
        run(fake, contents.run())
        contents.check_repositories(blocking(fake), None, sparse=False)
        assert count == 2
        assert findings == []


def test_progress_and_stop() -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (_, fake):
        reports: list[tuple[str, int, int | None]] = []
        result, _ = check(fake, report=lambda *state: reports.append(state))
        assert [state for state in reports if state[0] == "contents"][-1] == ("contents", result.bytes, result.bytes)
        assert reports[-1] == ("repositories", 1, None)
        for stop_after in (0, 3, len(reports) - 1):
            calls = iter(range(stop_after))

            def stop(*state: Any, calls: Any = calls) -> None:
                if next(calls, None) is None:
                    raise Stopped

            with pytest.raises(Stopped):
                check(fake, report=stop)


# bad days


def test_an_object_that_cannot_be_read_does_not_end_the_check() -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        broken = f"GET {keys.blob_key(CONFIG)}"
        fake.faults.extend([lambda request: refusal(500, "InternalError") if str(request) == broken else None] * 50)
        result, findings = check(fake)
        assert [(finding.kind, finding.digest) for finding in findings] == [("unreadable", CONFIG)]
        assert "InternalError" in findings[0].message
        assert (result.blobs, result.damaged) == (4, 0)
        assert fake.objects[BLOB] == b"config1"


def test_a_content_that_is_cut_off_is_read_again() -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        for _ in range(2):
            broken = ScriptedResponse(200, b"config1", sent=3)
            broken.disconnect(UpstreamBroken("store.test: the connection was lost"))
            fake.fail(broken, only=f"GET {keys.blob_key(CONFIG)}")
        result, findings = check(fake)
        assert (findings, result.bytes) == ([], sum(len(fake.objects[key]) for key in fake.objects if "/data" in key))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: refusal(503, "SlowDown"), StoreUnavailable),
        (lambda: refusal(403, "AccessDenied"), StoreRefused),
        (lambda: refusal(507, "InsufficientStorage"), InsufficientStorage),
        (lambda: xml("Error", "<Code>InternalError</Code>"), StoreUnavailable),
    ],
    ids=["slow down", "denied", "full", "error in a success"],
)
def test_a_store_that_fails_ends_the_check(answer: Callable[[], Any], error: type[Exception]) -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (_, fake):
        fake.store(BLOB, b"damaged")
        check_once = partial(check, fake)
        total = count_requests(check_once, fake)
        ended = 0
        for first in range(0, total, 3):
            before = dict(fake.objects)

            def fail(request: Any) -> Any:
                has_answer = "list-type" in request.query or request.method == "PUT"
                return answer() if has_answer or answer().status != 200 else None

            fail_after(fake, first, fail)
            try:
                check_once()
            except error:
                ended += 1
            fake.faults.clear()
            lost = before.keys() - fake.objects.keys()
            assert lost <= {BLOB}
            if lost:
                assert fake.objects[f"site/{keys.damaged_key(CONFIG)}"] == b"damaged"
            fake.store(BLOB, b"damaged")
        assert ended >= (total // 3 if answer().status != 200 else 2)


def count_requests(function: Callable[[], object], fake: FakeStore) -> int:
    """Return how many requests `function` sends. The bucket is as before."""
    before = dict(fake.objects)
    start = len(fake.requests)
    function()
    for key, content in before.items():
        if fake.objects.get(key) != content:
            fake.store(key, content)
    return len(fake.requests) - start
