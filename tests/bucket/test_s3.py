"""Tests for the client of a bucket, against a store in memory that has bad days."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from dockerproxy.bucket import s3
from dockerproxy.bucket.s3 import ListedKey, S3Bucket, part_size
from dockerproxy.errors import (
    InsufficientStorage,
    RegistryError,
    StoreRefused,
    StoreUnavailable,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import Digest
from dockerproxy.upstream.connection import ConnectionDropped
from tests.cache.support.upstream import ScriptedResponse
from tests.store.support.reactor import SteppedReactor
from tests.support.fake_store import LOCATION, FakeStore, refusal, xml

MIB = 1024 * 1024
GIB = 1024 * MIB


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(SteppedReactor())


@pytest.fixture
def bucket(store: FakeStore) -> S3Bucket:
    return store.bucket()


@pytest.fixture
def run(store: FakeStore) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return store.clock.run  # type: ignore[no-any-return]


async def read_list(bucket: S3Bucket, prefix: str, **options: Any) -> list[ListedKey]:
    return [entry async for entry in bucket.list_keys(prefix, **options)]


@pytest.fixture
def data_file() -> Iterator[Callable[[bytes], int]]:
    files = []

    def make(content: bytes) -> int:
        file = tempfile.TemporaryFile()
        file.write(content)
        file.flush()
        files.append(file)
        return file.fileno()

    yield make
    for file in files:
        file.close()


def test_objects(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    assert run(bucket.size("a")) is None
    assert run(bucket.get("a", 10)) is None
    run(bucket.put("a!b/c", b"content"))
    assert store.objects == {"site/a!b/c": b"content"}
    assert run(bucket.size("a!b/c")) == 7
    assert run(bucket.get("a!b/c", 10)) == b"content"
    run(bucket.delete(["a!b/c"]))
    assert store.objects == {}
    run(bucket.delete(["a!b/c"]))


def test_only_one_creates(bucket: S3Bucket, run: Any) -> None:
    assert run(bucket.create("k", b"deleting")) == b"deleting"
    assert run(bucket.create("k", b"rescued")) == b"deleting"


def test_an_object_that_was_deleted_after_a_conflict_is_created(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.fail(refusal(412, "PreconditionFailed"))
    assert run(bucket.create("k", b"x")) == b"x"
    assert store.objects == {"site/k": b"x"}


def test_an_object_longer_than_the_limit(bucket: S3Bucket, run: Any) -> None:
    run(bucket.put("k", bytes(100)))
    with pytest.raises(StoreRefused, match="100 bytes in k, which should have at most 99"):
        run(bucket.get("k", 99))


def test_a_part_of_an_object(bucket: S3Bucket, run: Any) -> None:
    run(bucket.put("k", b"0123456789"))

    async def read(offset: int) -> tuple[int, bytes]:
        response = await bucket.open("k", f"bytes={offset}-" if offset else None)
        return response.status, await response.read_all(100)

    assert run(read(0)) == (200, b"0123456789")
    assert run(read(7)) == (206, b"789")
    assert run(read(10))[0] == 416


def test_lists_have_pages(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.lists_at_once = 3
    for number in range(8):
        run(bucket.put(f"many/{number}/x", b"12"))
        store.clock.advance(10)
    entries = run(read_list(bucket, "many/"))
    assert [entry.key for entry in entries] == [f"many/{number}/x" for number in range(8)]
    assert {entry.size for entry in entries} == {2}
    assert [round(entry.age) for entry in entries] == [80, 70, 60, 50, 40, 30, 20, 10]
    assert [entry.key for entry in run(read_list(bucket, "many/", after="many/5/x"))] == ["many/6/x", "many/7/x"]
    groups = run(read_list(bucket, "many/", delimiter="/"))
    assert [entry.key for entry in groups] == [f"many/{number}/" for number in range(8)]
    assert run(read_list(bucket, "nothing/")) == []


def test_a_thousand_keys_are_deleted_at_once(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    keys = [f"<&>{number}" for number in range(1500)]
    for key in keys:
        store.store(f"site/{key}", b"")
    run(bucket.delete(keys))
    assert store.objects == {}
    assert [str(request) for request in store.requests] == ["POST delete", "POST delete"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            refusal(403, "InvalidAccessKeyId", "no such key."),
            "(InvalidAccessKeyId: no such key); set AWS_ACCESS_KEY_ID",
        ),
        (refusal(403, "SignatureDoesNotMatch"), "(SignatureDoesNotMatch); set AWS_SECRET_ACCESS_KEY"),
        (refusal(403, "RequestTimeTooSkewed", "15 min"), "(RequestTimeTooSkewed: 15 min); set the clock"),
        (refusal(403, "AccessDenied"), "(AccessDenied); let the key list the bucket"),
        (refusal(404, "NoSuchBucket", "none"), "(NoSuchBucket: none); create the bucket"),
        (refusal(400, "AuthorizationHeaderMalformed", "expecting 'eu-1'"), "expecting 'eu-1'); set region="),
        (refusal(301, "PermanentRedirect"), "(PermanentRedirect); set region= and endpoint="),
        (ScriptedResponse(403, b"<html>go away"), "(status 403); check the bucket"),
    ],
    ids=lambda value: value[1:25] if isinstance(value, str) else "",
)
def test_a_refusal_has_the_words_of_the_store_and_is_not_repeated(
    bucket: S3Bucket, store: FakeStore, run: Any, answer: ScriptedResponse, error: str
) -> None:
    store.fail(answer)
    with pytest.raises(StoreRefused) as caught:
        run(bucket.get("k", 10))
    assert error in caught.value.message
    assert "the bucket images at http://store.test:9000 refuses us" in caught.value.message
    assert dict(caught.value.headers) == {"Retry-After": "60"}
    assert len(store.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [refusal(507, "InsufficientStorage"), refusal(403, "QuotaExceeded"), refusal(400, "XMinioStorageFull")],
    ids=["507", "quota", "minio"],
)
def test_a_full_store(bucket: S3Bucket, store: FakeStore, run: Any, answer: ScriptedResponse) -> None:
    store.fail(answer)
    with pytest.raises(InsufficientStorage, match="is full"):
        run(bucket.put("k", b"x"))
    assert len(store.requests) == 1


PASSING_TROUBLES: dict[str, Callable[[], ScriptedResponse | Exception]] = {
    "slow down": lambda: refusal(503, "SlowDown"),
    "internal": lambda: refusal(500, "InternalError"),
    "no xml": lambda: ScriptedResponse(502, b"<html>bad gateway"),
    "too many": lambda: ScriptedResponse(429),
    "conflict": lambda: refusal(409, "ConditionalRequestConflict"),
    "timed out": lambda: refusal(400, "RequestTimeout"),
    "dropped": lambda: ConnectionDropped("store.test:9000: closed the connection"),
    "refused": lambda: UpstreamUnreachable("store.test:9000: connection refused", "refused"),
}


@pytest.mark.parametrize("make", PASSING_TROUBLES.values(), ids=PASSING_TROUBLES)
def test_trouble_that_passes_is_waited_for(
    bucket: S3Bucket, store: FakeStore, run: Any, make: Callable[[], ScriptedResponse | Exception]
) -> None:
    for _ in range(4):
        store.fail(make())
    run(bucket.put("k", b"x"))
    assert store.objects == {"site/k": b"x"}
    assert len(store.requests) == 5
    assert 2.6 < store.clock.seconds() < 3.6  # three quarters of the pauses


@pytest.mark.parametrize("make", PASSING_TROUBLES.values(), ids=PASSING_TROUBLES)
def test_trouble_that_stays_says_when_to_try_again_and_is_forgotten(
    bucket: S3Bucket, store: FakeStore, run: Any, make: Callable[[], ScriptedResponse | Exception]
) -> None:
    for _ in range(5):
        store.fail(make())
    with pytest.raises(StoreUnavailable) as caught:
        run(bucket.put("k", b"x"))
    assert caught.value.status == 503
    assert dict(caught.value.headers) == {"Retry-After": "5"}
    assert "the bucket images at http://store.test:9000" in caught.value.message
    run(bucket.put("k", b"x"))
    assert len(store.requests) == 6


def test_a_time_out_is_not_repeated(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.fail(UpstreamTimeout("store.test:9000: timed out"))
    with pytest.raises(StoreUnavailable, match="timed out"):
        run(bucket.size("k"))
    assert len(store.requests) == 1


def test_retry_after_is_kept_if_it_is_short(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.fail(refusal(503, "SlowDown", fields={"Retry-After": "7"}))
    run(bucket.put("k", b"x"))
    assert 7 <= store.clock.seconds() < 8
    store.fail(refusal(503, "SlowDown", fields={"Retry-After": "600"}))
    with pytest.raises(StoreUnavailable):
        run(bucket.put("k", b"x"))
    assert store.clock.seconds() < 8


def test_one_line_in_the_log_for_one_outage(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    from twisted.logger import globalLogPublisher

    lines: list[str] = []

    def observe(event: Any) -> None:
        if event["log_namespace"] == "dockerproxy.bucket.s3":
            lines.append(event["log_format"])

    globalLogPublisher.addObserver(observe)
    try:
        for _ in range(3):
            store.fail(refusal(403, "AccessDenied"))
            with pytest.raises(StoreRefused):
                run(bucket.get("k", 1))
        run(bucket.get("k", 1))
        run(bucket.get("k", 1))
    finally:
        globalLogPublisher.removeObserver(observe)
    assert [line.split("; ")[0] for line in lines] == [
        "REGISTRY_STORE: {reason}",
        "REGISTRY_STORE: {place} answers again",
    ]


# files


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 16), (5 * GIB, 16), (5 * GIB + 1, 64), (600 * GIB, 64), (1000 * GIB, 103), (5000 * GIB, 512)],
)
def test_parts_are_larger_for_large_blobs(size: int, expected: int) -> None:
    assert part_size(size) == expected * MIB
    assert -(-size // part_size(size)) <= 10_000


def test_a_small_file_is_one_request(bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
    content = os.urandom(1_000_000)
    run(bucket.put_file("k", data_file(content + b"more"), len(content), Digest.of(content)))
    assert store.objects == {"site/k": content}
    assert store.requests[0].headers.get("x-amz-content-sha256") == Digest.of(content).hex
    run(bucket.put_file("e", data_file(b""), 0, Digest.of(b"", "sha512")))
    assert store.objects["site/e"] == b""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_SIZE", 1000)
    monkeypatch.setattr(s3, "part_size", lambda size: 1000)


@pytest.mark.usefixtures("small_parts")
class TestParts:
    content = os.urandom(10_500)

    def put(self, bucket: S3Bucket, run: Any, data_file: Any) -> None:
        run(bucket.put_file("k", data_file(self.content), len(self.content), Digest.of(self.content)))

    def test_a_long_file_is_sent_in_parts(self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
        self.put(bucket, run, data_file)
        assert store.objects == {"site/k": self.content}
        assert store.uploads == {}

    def test_a_part_is_sent_again(self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
        store.fail(refusal(503, "SlowDown"), times=3, only="PUT k uploadId")
        store.fail(ConnectionDropped("dropped"), only="PUT k uploadId")
        self.put(bucket, run, data_file)
        assert store.objects == {"site/k": self.content}

    def test_an_error_with_the_status_200_is_one(
        self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any
    ) -> None:
        answer = refusal(200, "InternalError", "We encountered an internal error.")
        store.fail(answer, only="POST k uploadId")
        self.put(bucket, run, data_file)
        assert store.objects == {"site/k": self.content}

    def test_an_error_with_the_status_200_that_stays(
        self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any
    ) -> None:
        for _ in range(5):
            store.fail(refusal(200, "InternalError", "We encountered an internal error."), only="POST k uploadId")
        with pytest.raises(StoreUnavailable, match="InternalError: We encountered"):
            self.put(bucket, run, data_file)
        assert store.objects == {}
        assert store.uploads == {}, "the parts are deleted"

    def test_a_lost_answer_to_the_last_request(
        self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any
    ) -> None:
        def complete_and_drop(request: Any) -> Exception | None:
            if not str(request).startswith("POST k uploadId"):
                return None
            store._complete("site/k", request.query["uploadId"], request.body)
            return ConnectionDropped("dropped")

        store.faults.append(complete_and_drop)
        self.put(bucket, run, data_file)
        assert store.objects == {"site/k": self.content}

    def test_a_failed_part_ends_the_upload(self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
        store.fail(refusal(403, "QuotaExceeded"), only="PUT k uploadId")
        with pytest.raises(InsufficientStorage):
            self.put(bucket, run, data_file)
        assert store.uploads == {}
        assert len([request for request in store.requests if request.method == "PUT"]) < 11

    def test_a_file_that_was_truncated(self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
        with pytest.raises(OSError, match="shorter"):
            run(bucket.put_file("k", data_file(self.content[:5000]), len(self.content), Digest.of(b"")))
        assert store.objects == {}

    def test_no_descriptor_is_left(self, bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any) -> None:
        fd = data_file(self.content)
        before = len(os.listdir("/proc/self/fd"))
        store.fail(refusal(403, "QuotaExceeded"), only="PUT k uploadId")
        with pytest.raises(RegistryError):
            run(bucket.put_file("k", fd, len(self.content), Digest.of(self.content)))
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "answer",
    [
        xml("ListBucketResult", "<Contents><Key>site/a</Key><Size>x</Size></Contents>"),
        xml("ListBucketResult", "<Contents><Key>site/a</Key><LastModified>never</LastModified></Contents>"),
        ScriptedResponse(200, b"not XML"),
        ScriptedResponse(200, b"<!DOCTYPE a [<!ENTITY b 'c'>]><ListBucketResult/>"),
    ],
    ids=["size", "date", "no XML", "entity"],
)
def test_a_list_that_cannot_be_read(bucket: S3Bucket, store: FakeStore, run: Any, answer: ScriptedResponse) -> None:
    store.fail(answer)
    with pytest.raises(StoreUnavailable):
        run(read_list(bucket, ""))


def test_keys_of_others_are_left_out(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.fail(
        xml(
            "ListBucketResult",
            "<Contents><Key>else/a</Key><Size>1</Size><LastModified>2030-01-01T00:00:00Z</LastModified></Contents>"
            "<Contents><Key>site/b</Key><Size>1</Size><LastModified>2030-01-01T00:00:00Z</LastModified></Contents>",
        )
    )
    assert [entry.key for entry in run(read_list(bucket, ""))] == ["b"]
    assert LOCATION.prefix == "site/"


def test_uploads_in_parts_are_listed_and_aborted(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    names = [("a b", 50.0), ("a b", 5.0), ("b+/%", 7.0), ("other", 9.0)]
    for number, (name, age) in enumerate(names):
        store.uploads[f"u{number}"] = {1: b"part"}
        store.upload_keys[f"u{number}"] = f"site/x/{name}" if name != "other" else name, store.now() - age

    async def listed() -> list[tuple[str, str, float]]:
        return [(upload.key, upload.upload, upload.age) async for upload in bucket.list_uploads("x/")]

    for store.lists_at_once in (1000, 1):
        found = run(listed())
        assert sorted(found) == [("x/a b", "u0", 50.0), ("x/a b", "u1", 5.0), ("x/b+/%", "u2", 7.0)]
    for _ in range(2):
        run(bucket.abort_upload("x/a b", "u0"))
    assert sorted(store.uploads) == ["u1", "u2", "u3"]


@pytest.mark.parametrize(
    "failure", [refusal(503, "SlowDown"), ConnectionDropped("dropped"), UpstreamTimeout("slow")],
    ids=["refused", "dropped", "timeout"],
)  # fmt: skip
def test_a_delete_that_must_not_come_twice(bucket: S3Bucket, store: FakeStore, run: Any, failure: Any) -> None:
    run(bucket.put("a", b"x"))
    store.fail(failure)
    with pytest.raises(RegistryError):
        run(bucket.delete_once("a"))
    assert [request.method for request in store.requests] == ["PUT", "DELETE"]
    for _ in range(2):
        run(bucket.delete_once("a"))
    assert store.objects == {}


# answers that are none of an object store


def test_a_list_that_is_cut_off_is_an_error(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    """A list without its end would make gc delete what is needed by that."""
    for flag in ("true", "True", " true "):
        store.fail(xml("ListBucketResult", f"<IsTruncated>{flag}</IsTruncated>"))
        with pytest.raises(StoreUnavailable, match="cuts a list off"):
            run(read_list(bucket, ""))

    async def uploads() -> list[Any]:
        return [upload async for upload in bucket.list_uploads("")]

    store.fail(xml("ListMultipartUploadsResult", "<IsTruncated>true</IsTruncated>"))
    with pytest.raises(StoreUnavailable, match="cuts a list off"):
        run(uploads())


CONTENTS = "<Contents><Key>site/{}</Key><Size>1</Size><LastModified>2030-01-01T00:00:00Z</LastModified></Contents>"


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("is_empty", [False, True], ids=["keys", "empty pages"])
@pytest.mark.parametrize("is_fresh", [False, True], ids=["same tokens", "new tokens"])
def test_a_list_that_repeats_itself_ends(
    bucket: S3Bucket, store: FakeStore, run: Any, length: int, is_empty: bool, is_fresh: bool
) -> None:
    if is_empty and is_fresh:
        length = 0  # nobody can tell

    def repeat(request: Any) -> ScriptedResponse | None:
        count = len(store.requests) - 1
        if length == 0 and count == 20:
            return xml("ListBucketResult", "<IsTruncated>false</IsTruncated>")
        store.faults.append(repeat)
        number = count % length if length else count
        token = f"<NextContinuationToken>{count if is_fresh else number}</NextContinuationToken>"
        contents = "" if is_empty else CONTENTS.format(number)
        return xml("ListBucketResult", f"<IsTruncated>true</IsTruncated>{token}{contents}")

    store.faults.append(repeat)
    if length:
        with pytest.raises(StoreUnavailable, match="repeats the pages"):
            run(read_list(bucket, ""))
        assert len(store.requests) <= 3 * length + 3
    else:
        assert run(read_list(bucket, "")) == []


@pytest.mark.parametrize("page", [b"<html><body>Sign in</body></html>", b"<ListBucketsResult/>"])
def test_a_page_of_something_else_is_no_answer(
    bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any, page: bytes, small_parts: None
) -> None:
    """An empty list, or a blob that is acknowledged and not there, would lose what others need."""

    async def uploads() -> list[Any]:
        return [upload async for upload in bucket.list_uploads("")]

    run(bucket.put("a", b"x"))
    for work, only in (
        (lambda: read_list(bucket, ""), "list-type"),
        (uploads, "GET"),
        (lambda: bucket.put_file("k", data_file(bytes(2500)), 2500, Digest.of(bytes(2500))), "uploads"),
        (lambda: bucket.put_file("k", data_file(bytes(2500)), 2500, Digest.of(bytes(2500))), "POST k uploadId"),
        (lambda: bucket.copy("a", "b"), "PUT b"),
        (lambda: bucket.delete(["a", "b"]), "POST"),
    ):
        store.fail(ScriptedResponse(200, page), only=only)
        with pytest.raises(StoreUnavailable, match="in place of"):
            run(work())
        assert store.faults == []


def test_what_is_not_confirmed_is_not_stored(
    bucket: S3Bucket, store: FakeStore, run: Any, data_file: Any, small_parts: None
) -> None:
    content = bytes(2500)
    for work in (
        lambda: bucket.put("k", b"x"),
        lambda: bucket.create("c", b"x"),
        lambda: bucket.put_file("k", data_file(b"x"), 1, Digest.of(b"x")),
        lambda: bucket.put_file("k", data_file(content), 2500, Digest.of(content)),
    ):
        store.fail(ScriptedResponse(200, b"<html>"), only="PUT")
        with pytest.raises(StoreUnavailable, match=r"does not confirm [kc] with an ETag"):
            run(work())
    assert store.uploads == {}


def test_an_object_without_a_size_is_not_one_that_is_missing(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    for work in (bucket.size, bucket.status):
        store.fail(ScriptedResponse(200, length=None))
        with pytest.raises(StoreUnavailable, match="size of k"):
            run(work("k"))


def test_a_creation_ends_if_the_store_contradicts_itself(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    store.fail(refusal(412, "PreconditionFailed"), times=100, only="PUT")
    with pytest.raises(StoreUnavailable, match="k is there, and that it is not"):
        run(bucket.create("k", b"x"))
    assert len(store.requests) == 10


@pytest.mark.parametrize(
    "time",
    ["2030-01-01T00:00:00", "2030-01-01", "Tue, 01 Jan 2030 00:00:00 GMT", "x" * 9999],
)
def test_a_time_without_a_zone_is_none(bucket: S3Bucket, store: FakeStore, run: Any, time: str) -> None:
    store.fail(xml("ListBucketResult", CONTENTS.format("a").replace("2030-01-01T00:00:00Z", time)))
    with pytest.raises(StoreUnavailable, match="without a date"):
        run(read_list(bucket, ""))


@pytest.mark.parametrize(
    ("date", "age"),
    [
        ("Tue, 01 Jan 2030 01:00:00 GMT", 3600.0),
        ("Tue, 01 Jan 2030 01:00:00 +0100", 0.0),
        ("Tue, 01 Jan 2030 01:00:00 -0000", 3600.0),
        ("never", 0.0),
        ("Tue, 01 Jan 2030 01:00:00 +9999999999999999", 0.0),
        (None, 0.0),
    ],
)
def test_ages_are_by_the_clock_of_the_store(
    bucket: S3Bucket, store: FakeStore, run: Any, date: str | None, age: float
) -> None:
    """Without that clock nothing is old, so that gc deletes nothing because of the clock of this machine."""
    store.clock.advance(50_000)
    answer = xml("ListBucketResult", CONTENTS.format("a"), None if date is None else {"date": date})
    store.fail(answer)
    [entry] = run(read_list(bucket, ""))
    assert entry.age == age


def test_a_size_that_is_no_number_of_bytes(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    for size in ("-1", "1e3", "\u0663", "9" * 5000):
        store.fail(xml("ListBucketResult", CONTENTS.format("a").replace("<Size>1<", f"<Size>{size}<")))
        with pytest.raises(StoreUnavailable, match="without a size"):
            run(read_list(bucket, ""))


ODD_KEYS = ["a\x01b", "a\rb", "a\nb", "\udcff", "\ufffe", "a\u2028b", "a b+c%/?#&=", "<>&\"'", "\u00e9", "\U0001f600"]


def test_any_key_of_other_programs_can_be_read_and_deleted(bucket: S3Bucket, store: FakeStore, run: Any) -> None:
    for key in ODD_KEYS:
        store.store(f"site/x/{key}", key.encode("utf-8", "surrogateescape"))
    listed = [entry.key for entry in run(read_list(bucket, "x/"))]
    assert sorted(listed) == sorted(f"x/{key}" for key in ODD_KEYS)
    for key in listed:
        assert run(bucket.get(key, 100)) == key.removeprefix("x/").encode("utf-8", "surrogateescape")
        run(bucket.copy(key, "copy"))
    assert "x/\udcff" in [entry.key for entry in run(read_list(bucket, "x/", after="x/\udcfe"))]
    run(bucket.delete(listed))
    assert sorted(store.objects) == ["site/copy"]


# credentials


@pytest.mark.parametrize(
    "answer",
    [
        refusal(400, "ExpiredToken"),
        refusal(403, "InvalidAccessKeyId"),
        refusal(403, "AccessDenied"),
        ScriptedResponse(403),
    ],
    ids=["expired", "unknown", "denied", "head"],
)
def test_other_credentials_are_used_if_there_are_any(
    bucket: S3Bucket, store: FakeStore, run: Any, answer: ScriptedResponse
) -> None:
    run(bucket.put("k", b"x"))
    store.signer.others = 1
    store.fail(answer)
    assert run(bucket.size("k")) == 1
    store.fail(answer)
    with pytest.raises(StoreRefused):
        run(bucket.size("k"))
