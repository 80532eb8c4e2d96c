"""Tests of a download and its readers in one process."""

from __future__ import annotations

import errno
import gzip
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import Deferred

from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.downloads import BlobDownload, DownloadLimits, IngestFailed
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.reader import BlobReader
from dockerproxy.cache.upstream import UpstreamPrincipal, UpstreamRepository
from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError, UpstreamFailing, UpstreamRefused
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import read_cached
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import IngestKey
from tests.cache.support.harness import HUB, OTHER, CacheHarness, ManualReader, do_nothing, ingest_key
from tests.cache.support.upstream import (
    Gate,
    ScriptedResponse,
    disconnect_after,
    error_response,
    ignore_range,
    raise_error,
    replace_with,
    respond_streaming,
    respond_with,
    without_length,
)

DATA = bytes(range(256)) * 400
NAME = "library/app"


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    harness = make_harness()
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    return harness


DIGEST = Digest.of(DATA)


def require_nonblocking_reads(harness: CacheHarness) -> None:
    """Skip the test if a reader would need a thread of the pool, which the test holds."""
    path = Path(harness.layout.root, "sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1")
    with path.open("rb") as file:
        if read_cached(file.fileno(), 0, 1) is None:
            pytest.skip("this file system (an overlay, for example) does not support reads from the page cache only")
    path.unlink()


def start(
    harness: CacheHarness,
    digest: Digest = DIGEST,
    repository: UpstreamRepository | None = None,
    on_verified: Any = None,
) -> BlobDownload:
    principal = harness.principal() if repository is None else UpstreamPrincipal(repository, "someone")
    download = harness.downloads.start(principal, digest, on_verified or do_nothing)
    harness.reactor.run_due_calls()
    return download


def start_streaming(harness: CacheHarness, *, sent: int = 0) -> tuple[BlobDownload, ScriptedResponse]:
    """Return a download, and its upstream response, which the test controls."""
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    download = start(harness)
    response = harness.upstream.responses[-1]
    if sent:
        send(harness, response, sent)
    return download, response


def send(harness: CacheHarness, response: ScriptedResponse, size: int | None = None) -> None:
    response.send(size)
    harness.reactor.run_due_calls()


def end(harness: CacheHarness, response: ScriptedResponse) -> None:
    response.send_rest()
    harness.reactor.run_due_calls()


def reader(
    harness: CacheHarness, download: BlobDownload, start: int = 0, repository: UpstreamRepository | None = None
) -> ManualReader:
    content = download.open_reader(repository or harness.repository())
    assert content is not None
    return ManualReader(harness, content, start)


def wait_started_outcome(download: BlobDownload) -> list[Any]:
    """Return a list that gets the result of `wait_started` or its error. It is empty while waiting."""
    outcome: list[Any] = []
    Deferred.fromCoroutine(download.wait_started()).addBoth(
        lambda result: outcome.append(getattr(result, "value", result))
    )
    return outcome


# success


def test_download_is_committed(harness: CacheHarness) -> None:
    download, response = start_streaming(harness)
    one = reader(harness, download)
    one.read()
    assert one.waiting is not None
    send(harness, response, 1000)
    assert one.data == DATA[:1000]
    end(harness, response)
    one.read_available()
    assert (one.data, one.ended, one.error) == (DATA, True, None)
    one.disconnect()
    assert download.state is DownloadState.COMMITTED and download.size == len(DATA)
    assert Path(harness.layout.blob(DIGEST)).read_bytes() == DATA
    assert harness.ingest_files == []
    assert harness.active_download(DIGEST) is None
    assert harness.space.index.total == len(DATA)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", [0, 1, 2, 100_000])
def test_blob_sizes(harness: CacheHarness, algorithm: str, size: int) -> None:
    data = DATA[:size]
    digest = harness.upstream.repository(f"{HUB}/{NAME}").put_blob(data, algorithm)
    harness.reactor.pool.hold()
    download = start(harness, digest)
    readers = []
    while harness.reactor.pool.step():
        harness.reactor.run_due_calls()
        if not download.state.is_pending and not readers:
            readers.append(reader(harness, download))
            readers[0].read()
    harness.reactor.pool.release()
    readers[0].read_available()
    assert (readers[0].data, readers[0].ended) == (data, True)
    readers[0].disconnect()
    assert harness.blobs.size(digest) == size


def test_readers_are_independent(harness: CacheHarness) -> None:
    download, response = start_streaming(harness, sent=20_000)
    fast, slow, behind, beyond = (reader(harness, download, start) for start in (0, 0, 15_000, 60_000))
    fast.read_available()
    slow.read(100)
    behind.read_available(3)
    beyond.read()
    assert fast.data == DATA[:20_000]
    assert slow.data == DATA[:100]
    assert behind.data == DATA[15_000:20_000]
    assert beyond.waiting is not None
    end(harness, response)
    for one in (fast, slow, behind, beyond):
        one.read_available(7000)
        assert one.ended
        assert one.data == DATA[one.start :]
        one.disconnect()
    assert len(harness.upstream.requests) == 1


def test_last_byte_waits_for_publish(harness: CacheHarness) -> None:
    require_nonblocking_reads(harness)
    download, response = start_streaming(harness)
    one = reader(harness, download)
    harness.reactor.pool.hold()
    end(harness, response)
    harness.reactor.pool.step()
    one.read_available()
    assert one.data == DATA[:-1] and one.waiting is not None
    assert not harness.blobs.exists(DIGEST)
    harness.reactor.pool.release()
    assert one.data == DATA
    one.disconnect()


def test_last_byte_waits_for_on_verified(harness: CacheHarness) -> None:
    """A client that has the whole blob and requests it again must find it in the store."""
    done: Deferred[None] = Deferred()

    async def on_verified() -> None:
        await done

    harness.upstream.on("GET", "", respond_streaming)
    download = start(harness, on_verified=on_verified)
    one = reader(harness, download)
    end(harness, harness.upstream.responses[0])
    one.read_available()
    one.read()
    assert one.data == DATA[:-1]
    assert not harness.blobs.exists(DIGEST)
    done.callback(None)
    harness.reactor.run_due_calls()
    assert one.data == DATA and harness.blobs.exists(DIGEST)
    one.disconnect()


@pytest.mark.parametrize("fails", [False, True])
def test_on_verified_runs_during_fsync_and_before_publish(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A process that finds the published blob must also find the grant."""
    require_nonblocking_reads(harness)
    steps: list[str] = []
    done: Deferred[None] = Deferred()
    publish = Ingest.commit

    def publish_and_record(ingest: Ingest, blobs: Any) -> None:
        steps.append("published")
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(ingest, blobs)

    async def on_verified() -> None:
        steps.append("hook started")
        await done
        steps.append("hook finished")

    monkeypatch.setattr(Ingest, "commit", publish_and_record)
    harness.upstream.on("GET", "", respond_streaming)
    download = start(harness, on_verified=on_verified)
    harness.reactor.pool.hold()
    end(harness, harness.upstream.responses[0])
    harness.reactor.pool.step()  # write the last bytes
    harness.reactor.run_due_calls()
    assert steps == ["hook started"]
    harness.reactor.pool.step()  # and sync them
    harness.reactor.run_due_calls()
    assert harness.reactor.pool.waiting == 0
    done.callback(None)
    harness.reactor.pool.release()
    harness.reactor.run_due_calls()
    assert steps == ["hook started", "hook finished", "published"]
    assert download.state is (DownloadState.FAILED if fails else DownloadState.COMMITTED)


def test_failing_on_verified_does_not_prevent_commit(harness: CacheHarness, log_lines: list[str]) -> None:
    async def on_verified() -> None:
        raise ValueError("a bug in this program")

    download = start(harness, on_verified=on_verified)
    assert download.state is DownloadState.COMMITTED and download.failure is None
    assert any("recording the grant of" in line and "failed" in line for line in log_lines)


def test_unknown_length(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", lambda request, data: ScriptedResponse(200, DATA, length=None, sent=100))
    download = start(harness)
    assert download.size is None
    size_known = Deferred.fromCoroutine(download.wait_size())
    one = reader(harness, download)
    one.read_available()
    assert one.content.size is None
    assert not size_known.called
    end(harness, harness.upstream.responses[0])
    one.read_available()
    assert one.data == DATA
    assert one.content.size == download.size == len(DATA)
    assert size_known.called
    one.disconnect()


@pytest.mark.parametrize("first", [True, False])
def test_reader_disconnect_does_not_affect_others(harness: CacheHarness, first: bool) -> None:
    download, response = start_streaming(harness, sent=1000)
    one, other = reader(harness, download), reader(harness, download)
    one.read_available()
    other.read_available()
    leaving, staying = (one, other) if first else (other, one)
    leaving.read()
    leaving.disconnect()
    leaving.content.close()
    end(harness, response)
    staying.read_available()
    assert staying.data == DATA
    staying.disconnect()


def test_download_continues_without_readers(harness: CacheHarness) -> None:
    download, response = start_streaming(harness, sent=1000)
    one = reader(harness, download)
    one.read()
    one.disconnect()
    end(harness, response)
    assert harness.blobs.exists(DIGEST)


def test_cancel_before_start(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "", gate.delay(respond_streaming))
    download = start(harness)
    deferreds = Deferred.fromCoroutine(download.wait_started())
    deferreds.addErrback(lambda _: None)
    deferreds.cancel()
    gate.open()
    end(harness, harness.upstream.responses[0])
    assert harness.blobs.exists(DIGEST)


def test_disconnect_during_threaded_read(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.cache.reader.read_cached", lambda fd, offset, size: None)
    download, response = start_streaming(harness, sent=1000)
    one, other = reader(harness, download), reader(harness, download)
    harness.reactor.pool.hold()
    one.read()
    other.read()
    assert harness.reactor.pool.waiting == 2
    one.disconnect()
    harness.reactor.pool.release()
    assert other.data == DATA[:1000]
    other.disconnect()
    end(harness, response)


# joining at the end


def test_joining_at_every_step_of_commit(harness: CacheHarness) -> None:
    """A reader that joins while a thread closes the ingest must not read another file with the same descriptor."""
    require_nonblocking_reads(harness)
    download, response = start_streaming(harness, sent=1000)
    harness.reactor.pool.hold(results=True)
    response.send_rest()
    harness.reactor.run_due_calls()
    readers = []
    while not download.state.is_end:
        readers.append(reader(harness, download))  # the thread has finished, but its result is delayed
        harness.reactor.pool.step()
        harness.reactor.run_due_calls()
    assert download.open_reader(harness.repository()) is None
    assert len(readers) == 3  # during write, sync and rename
    for one in readers:
        one.read_available()
        assert one.data == DATA
        one.disconnect()


def test_wait_started_after_start_and_after_end(harness: CacheHarness) -> None:
    download, response = start_streaming(harness)
    assert wait_started_outcome(download) == [None]
    end(harness, response)
    assert wait_started_outcome(download) == [None]


def test_serves_same_principal_while_fresh(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "", gate.delay(respond_streaming))
    download = start(harness)
    started = wait_started_outcome(download)
    harness.reactor.advance(1000)
    assert download.serves(harness.principal(), 300)  # upstream has not responded yet
    gate.open()
    assert started == [None]
    one = reader(harness, download)
    assert download.serves(harness.principal(), 300)
    assert not download.serves(harness.principal(authorization="Basic someone"), 300)
    assert not download.serves(harness.principal("library/other"), 300)
    harness.reactor.advance(299)
    assert download.serves(harness.principal(), 300)
    harness.reactor.advance(1)
    assert not download.serves(harness.principal(), 300)
    harness.reactor.rightNow -= 100_000  # the time counts from the start of the machine, and a record may be older
    assert not download.serves(harness.principal(), 300)
    harness.reactor.rightNow += 100_000
    end(harness, harness.upstream.responses[0])
    one.disconnect()


# upstream failures


def test_disconnect_and_resume(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", disconnect_after(3000), times=1)
    harness.upstream.on("GET", "", disconnect_after(5000), times=1)
    harness.upstream.on("GET", "", ignore_range)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert [request.range for request in harness.upstream.requests_matching("GET", "blobs")] == [
        None,
        "bytes=2999-",
        "bytes=7998-",
    ]
    assert harness.blobs.exists(DIGEST)


def test_final_failure_reaches_all_readers(harness: CacheHarness, log_lines: list[str]) -> None:
    download, response = start_streaming(harness, sent=3000)
    readers = [reader(harness, download, start) for start in (0, 2000, 50_000)]
    for one in readers:
        one.read_available()
        one.read()
    late = Deferred.fromCoroutine(readers[0].content.wait_verified())
    harness.upstream.go_down()
    response.disconnect()
    harness.advance(20)
    for one in readers:
        assert isinstance(one.error, UpstreamError)
        assert one.start + len(one.data) < len(DATA) - 1 or not one.data
        one.disconnect()
    late.addErrback(lambda failure: failure.trap(UpstreamError))
    assert late.called
    assert any("was not cached" in line and "connection refused" in line for line in log_lines)
    assert harness.active_download(DIGEST) is None
    assert not harness.blobs.exists(DIGEST)


def test_partial_download_is_resumed_next_time(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", disconnect_after(3000), times=1)
    harness.upstream.on("GET", "", raise_error(UpstreamBroken("cut")), times=6)
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST)
    assert len(harness.ingest_files) == 1
    harness.upstream.clear_requests()
    assert harness.fetch(DIGEST)[1] == DATA
    assert [request.range for request in harness.upstream.requests_matching("GET", "blobs")] == ["bytes=2999-"]
    assert harness.ingest_files == []


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"!", b"!" + DATA[1:]])
def test_corrupt_content_is_never_completed(harness: CacheHarness, wrong: bytes) -> None:
    harness.upstream.on("GET", "", lambda request, data: ScriptedResponse(200, wrong, sent=0))
    download = start(harness)
    readers = [reader(harness, download, start) for start in (0, 0, 70_000)]
    response = harness.upstream.responses[0]
    send(harness, response, 5000)
    readers[0].read_available()
    end(harness, response)
    for one in readers:
        one.read_available()
        assert isinstance(one.error, UpstreamBroken)
        assert one.data == wrong[one.start : -1]
        one.disconnect()
    assert not harness.blobs.exists(DIGEST)
    assert harness.ingest_files == []
    harness.upstream.reset()
    assert harness.fetch(DIGEST)[1] == DATA


def test_corrupt_content_of_unknown_length(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", lambda request, data: ScriptedResponse(200, DATA + b"more", length=None))
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST)
    assert not harness.blobs.exists(DIGEST)


def test_html_page_is_rejected(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", replace_with(b"<h1>Sign in</h1>", content_type="text/html"))
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST)
    assert harness.ingest_files == []


def test_small_blob_is_verified_first(harness: CacheHarness) -> None:
    download, response = start_streaming(harness)
    one = reader(harness, download)
    verified = Deferred.fromCoroutine(one.content.wait_verified())
    assert not verified.called
    end(harness, response)
    assert verified.called
    one.disconnect()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_error_before_start(harness: CacheHarness, status: int) -> None:
    harness.upstream.on("GET", "", respond_with(status))
    download = start(harness)
    [error] = wait_started_outcome(download)
    assert isinstance(error, UpstreamRefused) and error.status == status
    assert harness.active_download(DIGEST) is None
    assert harness.space.index.total == 0


@pytest.mark.parametrize(("status", "expected_status"), [(429, 429), (500, 502), (503, 502)])
def test_outage_before_start(harness: CacheHarness, status: int, expected_status: int) -> None:
    harness.upstream.on("GET", "", respond_with(status, retry_after="9"))
    download = start(harness)
    [error] = wait_started_outcome(download)
    assert isinstance(error, UpstreamFailing) and error.status == expected_status
    assert ("retry-after", "9") in error.headers


def test_waiters_get_upstream_error(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "", gate.delay(respond_with(401)))
    download = start(harness)
    deferreds = [wait_started_outcome(download) for _ in range(3)]
    assert deferreds == [[], [], []]
    gate.open()
    harness.reactor.run_due_calls()
    assert all(isinstance(outcome[0], UpstreamRefused) for outcome in deferreds)


# partial files of an earlier run


def leave_partial(harness: CacheHarness, data: bytes, digest: Digest = DIGEST) -> None:
    ingest = Ingest.open(harness.layout, ingest_key(digest))
    assert ingest is not None
    ingest.append([data])
    ingest.release()


@pytest.mark.parametrize("size", [1, 5000, len(DATA) - 1])
def test_partial_file_is_resumed(harness: CacheHarness, size: int) -> None:
    leave_partial(harness, DATA[:size])
    assert harness.fetch(DIGEST)[1] == DATA
    assert [request.range for request in harness.upstream.requests_matching("GET", "blobs")] == [f"bytes={size - 1}-"]
    assert harness.blobs.exists(DIGEST)


def test_complete_partial_file(harness: CacheHarness) -> None:
    """A crash after the last byte, but before the rename. Upstream would respond with 416 to a Range at the end."""
    leave_partial(harness, DATA)
    assert harness.fetch(DIGEST)[1] == DATA
    assert [response.status for response in harness.upstream.responses if response.bytes_read] == [206]
    assert harness.upstream.responses[-1].bytes_read == 1
    assert harness.blobs.exists(DIGEST) and harness.ingest_files == []


def test_complete_partial_file_without_range_support(harness: CacheHarness) -> None:
    leave_partial(harness, DATA)
    harness.upstream.on("GET", "", ignore_range)
    assert harness.fetch(DIGEST)[1] == DATA


def test_complete_partial_file_still_requires_grant(harness: CacheHarness) -> None:
    """The partial file does not prove access."""
    leave_partial(harness, DATA)
    harness.upstream.on("GET", "", respond_with(401))
    with pytest.raises(UpstreamRefused):
        harness.fetch(DIGEST)
    assert not harness.blobs.exists(DIGEST)
    harness.upstream.reset()
    assert harness.fetch(DIGEST)[1] == DATA


@pytest.mark.parametrize(
    "partial_data", [DATA + b"more", DATA + bytes(100_000), DATA[:-1] + b"!"], ids=["longer", "much longer", "damaged"]
)
@pytest.mark.parametrize("responder", [None, ignore_range, without_length], ids=["ranges", "no ranges", "no length"])
def test_mismatched_partial_file_is_discarded(harness: CacheHarness, partial_data: bytes, responder: Any) -> None:
    leave_partial(harness, partial_data)
    if responder is not None:
        harness.upstream.on("GET", "", responder)
    if responder is without_length and len(partial_data) == len(DATA):
        with pytest.raises(UpstreamBroken):  # detected only at the end
            harness.fetch(DIGEST)
    assert harness.fetch(DIGEST)[1] == DATA
    assert harness.ingest_files == []


def test_corrupt_partial_file_fails_once(harness: CacheHarness) -> None:
    leave_partial(harness, b"!" + DATA[1:5000])
    with pytest.raises(UpstreamBroken):
        harness.fetch(DIGEST)
    assert harness.ingest_files == []
    assert harness.fetch(DIGEST)[1] == DATA


def test_partial_file_is_not_served_before_grant(harness: CacheHarness) -> None:
    leave_partial(harness, DATA[:5000])
    gate = Gate()
    harness.upstream.on("GET", "", gate.delay(respond_with(404)))
    download = start(harness)
    assert download.readable == 4999
    assert wait_started_outcome(download) == []
    gate.open()
    harness.reactor.run_due_calls()
    assert download.open_reader(harness.repository()) is None


# disk failures


class FullDisk:
    """Simulates a disk with `space` bytes left for all ingests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, space: int, number: int = errno.ENOSPC) -> None:
        self.space = space
        append = Ingest.append

        def full(ingest: Ingest, chunks: Any) -> None:
            size = sum(map(len, chunks))
            if size > self.space:
                raise OSError(number, os.strerror(number))
            self.space -= size
            append(ingest, chunks)

        monkeypatch.setattr(Ingest, "append", full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, number: int, log_lines: list[str]) -> None:
    FullDisk(monkeypatch, 10_000, number)
    harness.upstream.on("GET", "", respond_streaming, times=1)
    download = start(harness)
    response = harness.upstream.responses[0]
    one, other, behind, beyond = (reader(harness, download, start) for start in (0, 0, 9_000, 70_000))
    send(harness, response, 9_900)
    one.read_available()
    other.read(100)
    send(harness, response, 5_000)  # this exceeds the space
    assert download.state is DownloadState.FAILED
    end(harness, response)
    for reading in (one, other, behind, beyond):
        reading.read_available(3000)
        assert reading.error is None
        assert reading.data == DATA[reading.start :]
        reading.disconnect()
    # The first reader got the open connection. The others resume at the end of the file.
    assert [request.range for request in harness.upstream.requests_matching("GET", "blobs")] == [None] + [
        "bytes=9899-"
    ] * 3
    assert not harness.blobs.exists(DIGEST)
    assert harness.ingest_files == []  # the partial file is deleted
    assert any("was not cached" in line and os.strerror(number) in line for line in log_lines)


@pytest.mark.parametrize("length", [len(DATA), None])
def test_full_disk_and_corrupt_content(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    FullDisk(monkeypatch, 10_000)
    wrong = DATA[:-1] + b"!"

    def respond(request: Any, data: Any) -> ScriptedResponse:
        if request.range is None:
            return ScriptedResponse(200, wrong, length=length, sent=9000)
        return ScriptedResponse(
            206, wrong[8999:], {"content-range": f"bytes 8999-{len(DATA) - 1}/{len(DATA)}"}, length=length
        )

    harness.upstream.on("GET", "", respond)
    download = start(harness)
    readers = [reader(harness, download, start) for start in (0, 95_000)]
    end(harness, harness.upstream.responses[0])
    for one in readers:
        one.read_available()
        assert isinstance(one.error, UpstreamBroken)
        assert one.data == wrong[one.start : -1]
        one.disconnect()


def test_direct_reader_withholds_last_byte(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 10_000)
    download, response = start_streaming(harness, sent=9000)
    one = reader(harness, download)
    send(harness, response, 5000)
    one.read_available()
    assert one.data == DATA[:13_999]
    send(harness, response, len(DATA) - 14_000 - 1)
    one.read_available()
    one.read()
    assert one.data == DATA[:-2]
    end(harness, response)
    one.read_available()
    assert one.data == DATA and one.ended
    one.disconnect()


def test_direct_reader_cannot_go_back(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges in descending order: what is in the file is read from there, and nothing else is kept in memory."""
    FullDisk(monkeypatch, 10_000)
    download, response = start_streaming(harness, sent=9000)
    one = reader(harness, download)
    send(harness, response, 60_000)
    for offset in (50_000, 1000, 50_100):
        one.start, one.data = offset, b""
        one.read(100)
        assert one.data == DATA[offset : offset + 100]
    one.start, one.data = 20_000, b""
    one.read(100)
    assert isinstance(one.error, UpstreamBroken) and "ascending order" in one.error.message
    one.disconnect()


def test_full_disk_and_disconnect(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 10_000)
    harness.upstream.on("GET", "", disconnect_after(20_000), times=1)
    harness.upstream.on("GET", "", disconnect_after(20_000), times=1)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert not harness.blobs.exists(DIGEST)


def test_direct_reader_disconnects(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 0)
    download, response = start_streaming(harness)
    one = reader(harness, download)
    send(harness, response, 5000)
    one.read_available()
    one.read()
    one.disconnect()
    assert response.aborted


def test_lent_connection_times_out(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 0)
    download, response = start_streaming(harness)
    one = reader(harness, download)
    send(harness, response, 5000)
    harness.advance(4.5)
    assert not response.ended
    harness.advance(1)
    assert response.aborted
    one.read_available()  # opens a new connection
    assert one.data == DATA
    assert len(harness.upstream.requests_matching("GET", "blobs")) == 2
    one.disconnect()


def test_unopenable_ingest(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ingests: Ingests, key: IngestKey) -> Ingest | None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Ingests, "acquire", refuse)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert len(harness.upstream.requests_matching("GET", "blobs")) == 1
    assert not harness.blobs.exists(DIGEST)


def test_unreadable_partial_file(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_partial(harness, DATA[:5000])

    def fail(ingest: Ingest) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Ingest, "rehash", fail)
    assert harness.fetch(DIGEST)[1] == DATA


def test_failed_publish_does_not_fail_readers(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingest: Ingest, blobs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Ingest, "commit", fail)
    for without_size in (False, True):
        if without_size:
            harness.upstream.on("GET", "", without_length)
        download = start(harness)
        one = reader(harness, download) if not download.state.is_end else None
        assert one is None
        assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert not harness.blobs.exists(DIGEST)
    assert harness.ingest_files == []


def test_background_fsync(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blob is published only after the fsync, because that may fail."""
    monkeypatch.setattr("dockerproxy.cache.downloads._FSYNC_THRESHOLD", 5000)
    download, response = start_streaming(harness, sent=4999)
    harness.reactor.pool.hold()
    send(harness, response, 1)
    harness.reactor.pool.step()  # write the data
    harness.reactor.run_due_calls()
    assert harness.reactor.pool.waiting == 1  # the sync
    response.send_rest()
    harness.reactor.run_due_calls()
    assert harness.reactor.pool.waiting == 2
    harness.reactor.pool.defer_next()  # finish the sync last
    harness.reactor.pool.step()
    harness.reactor.run_due_calls()
    assert download.written == len(DATA) and harness.reactor.pool.waiting == 1  # only the sync
    harness.reactor.pool.release()
    harness.reactor.run_due_calls()
    assert download.state is DownloadState.COMMITTED


def test_fsync_error_prevents_publish(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    """The kernel reports the error only once; a second sync would appear to succeed."""
    monkeypatch.setattr("dockerproxy.cache.downloads._FSYNC_THRESHOLD", 5000)
    errors = [OSError(errno.EIO, "Input/output error")]

    def fail(fd: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(os, "fdatasync", fail)
    download, response = start_streaming(harness, sent=5000)
    one = reader(harness, download)
    end(harness, response)
    one.read_available()
    assert one.data == DATA and one.ended
    assert not errors and not harness.blobs.exists(DIGEST)
    assert any("cannot commit the file: Input/output error" in line for line in log_lines)
    one.disconnect()


def test_direct_readers_survive_failed_publish(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingest: Ingest, blobs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Ingest, "commit", fail)
    download, response = start_streaming(harness, sent=3000)
    one, late = reader(harness, download), reader(harness, download)
    one.read_available()
    end(harness, response)
    one.read_available()
    assert one.data == DATA and one.ended
    harness.advance(10)
    late.read_available()
    assert late.data == DATA and late.ended
    assert (
        len(harness.upstream.requests_matching("GET", "blobs")) == 1
    )  # the file was complete, so nothing else is requested
    one.disconnect()
    late.disconnect()


def test_truncated_ingest_fails_reader(harness: CacheHarness) -> None:
    """If another program truncates the file, it must not look like the end of the blob."""
    download, response = start_streaming(harness, sent=5000)
    one = reader(harness, download)
    os.truncate(harness.layout.ingest(ingest_key(DIGEST)), 0)
    one.read()
    assert isinstance(one.error, UpstreamBroken)
    one.disconnect()
    end(harness, response)


# downloads that nobody reads


@pytest.fixture
def limited(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    """A cache in which a download without a reader ends after 40,000 bytes, and only two may write files."""
    limits = DownloadLimits(downloads=3, downloads_per_registry=2, downloads_per_client=2, unread_size=40_000)
    harness = make_harness(download_limits=limits)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    return harness


def test_small_fast_download_is_committed_without_readers(limited: CacheHarness) -> None:
    download, response = start_streaming(limited, sent=1000)
    one = reader(limited, download)
    send(limited, response, len(DATA) - 41_000)
    one.disconnect()
    limited.reactor.advance(59)
    end(limited, response)
    assert limited.blobs.exists(DIGEST)


def test_slow_download_ends_without_readers(limited: CacheHarness, log_lines: list[str]) -> None:
    download, response = start_streaming(limited, sent=1000)
    one, other = reader(limited, download), reader(limited, download)
    limited.reactor.advance(1000)
    assert download.state is DownloadState.DOWNLOADING
    one.disconnect()
    limited.reactor.advance(1000)
    other.disconnect()
    limited.reactor.advance(59)
    assert download.state is DownloadState.DOWNLOADING
    limited.reactor.advance(1)
    assert download.state is DownloadState.FAILED and response.aborted
    assert limited.active_download(DIGEST) is None
    assert any("nobody has read it for 60 s" in line for line in log_lines)
    assert limited.space.index.total == 1000
    limited.upstream.reset()
    assert limited.fetch(DIGEST) == ("MISS", DATA)
    assert limited.upstream.requests[-1].range == "bytes=999-"


def test_large_download_ends_without_readers(limited: CacheHarness) -> None:
    download, response = start_streaming(limited, sent=10_000)
    one = reader(limited, download)
    send(limited, response, 30_000)
    one.disconnect()
    send(limited, response, 40_000)
    assert download.state is DownloadState.DOWNLOADING
    send(limited, response, 1)
    assert download.state is DownloadState.FAILED and response.aborted


def test_returning_reader_keeps_the_download(limited: CacheHarness) -> None:
    download, response = start_streaming(limited, sent=1000)
    reader(limited, download).disconnect()
    limited.reactor.advance(59)
    one = reader(limited, download)
    send(limited, response, 50_000)
    limited.reactor.advance(1000)
    end(limited, response)
    one.read_available()
    assert one.data == DATA
    one.disconnect()


@pytest.mark.parametrize("waits", [True, False])
def test_silent_upstream_before_the_response(limited: CacheHarness, waits: bool) -> None:
    gate = Gate()
    limited.upstream.on("GET", "", gate.delay(respond_streaming))
    download = start(limited)
    waiting = Deferred.fromCoroutine(download.wait_started()) if waits else None
    limited.reactor.advance(60)
    limited.reactor.run_due_calls()
    assert (download.state is DownloadState.CONNECTING) == waits
    if waiting is not None:
        waiting.addErrback(lambda _: None)
        waiting.cancel()
        limited.reactor.advance(60)
        assert download.state is DownloadState.FAILED
    assert limited.ingest_files == []


@pytest.mark.parametrize("status", [404, 401, 503])
def test_refused_download_leaves_no_file(harness: CacheHarness, status: int) -> None:
    """One inode for each refused digest would fill the disk."""
    harness.upstream.on("GET", "", respond_with(status))
    with pytest.raises(RegistryError):
        harness.fetch(DIGEST)
    assert harness.ingest_files == []


def test_cancelled_waiters_are_forgotten(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "", Gate().delay(respond_streaming))
    download = start(harness)
    for _ in range(100):
        waiting = Deferred.fromCoroutine(download.wait_started())
        waiting.addErrback(lambda _: None)
        waiting.cancel()
    assert download.waiting == 0


def test_grants_that_wait_for_a_download_are_bounded(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.cache.downloads._MAX_HOOKS", 2)
    download, response = start_streaming(harness)
    granted: list[int] = []

    async def grant(number: int) -> None:
        granted.append(number)

    for number in range(4):
        download.when_verified(evolve(harness.principal(), identity=f"own:{number}"), partial(grant, number))
    end(harness, response)
    assert granted == [0, 1]


def test_partial_files_of_one_registry_are_hashed_in_turn(harness: CacheHarness) -> None:
    """A registry that left large files, and its clients, could otherwise occupy all threads of the pool."""
    for registry, number in ((HUB, 1), (HUB, 2), (HUB, 3), (OTHER, 4)):
        ingest = Ingest.open(harness.layout, ingest_key(Digest.of(b"%d" % number), registry))
        assert ingest is not None
        ingest.append([b"?"])
        ingest.release()
    harness.reactor.pool.hold()
    for registry, number in ((HUB, 1), (HUB, 2), (HUB, 3), (OTHER, 4)):
        repository = harness.repository(NAME, registry)
        start(harness, Digest.of(b"%d" % number), repository)
    for _ in range(4):
        harness.reactor.pool.step()  # opens a file
        harness.reactor.run_due_calls()
    assert harness.reactor.pool.waiting == 2  # one for each registry
    harness.reactor.pool.release()
    harness.reactor.run_due_calls()


# the number of downloads


@pytest.mark.parametrize(
    ("descriptors", "downloads"), [(20, 2), (300, 12), (1024, 42), (65_536, 2000), (1 << 20, 2000)]
)
def test_downloads_are_bounded_by_descriptors(descriptors: int, downloads: int) -> None:
    limits = DownloadLimits.derive(1 << 40, descriptors)
    share = downloads // 2
    assert limits == DownloadLimits(downloads, share, share, 256 << 20)
    assert DownloadLimits.derive(1 << 20, descriptors).unread_size == 1 << 16


def test_downloads_beyond_the_share_of_a_registry_are_not_cached(limited: CacheHarness, log_lines: list[str]) -> None:
    limited.upstream.on("GET", "", respond_streaming)
    blobs = [bytes([number]) * 30_000 for number in range(4)]
    principals = [evolve(limited.principal(), client=f"192.0.2.{number}") for number in range(4)]
    other = evolve(limited.principal("other/app", OTHER), client="192.0.2.9")
    small = limited.upstream.repository(f"{OTHER.host}/other/app").put_blob(DATA[:1000])
    for data in blobs:
        limited.upstream.repository(f"{HUB}/{NAME}").put_blob(data)
    downloads = [
        limited.downloads.start(principal, Digest.of(data), do_nothing)
        for principal, data in zip(principals, blobs, strict=True)
    ]
    downloads.append(limited.downloads.start(other, small, do_nothing))
    limited.reactor.run_due_calls()
    assert [download.failure is None for download in downloads] == [True, True, False, False, True]
    assert any("2 of 2 for registry-1.docker.io" in line for line in log_lines)
    passed_on = ManualReader(limited, BlobReader(limited.reactor, downloads[2], -1, limited.repository(), do_not_care))
    passed_on.read_available()
    for response in limited.upstream.responses:
        response.send_rest()
        limited.reactor.run_due_calls()
    passed_on.read_available()
    assert passed_on.data == blobs[2]
    passed_on.disconnect()
    assert [limited.blobs.exists(download.digest) for download in downloads] == [True, True, False, False, True]


def do_not_care(reader: BlobReader) -> None:
    """Do nothing when a reader is closed."""


def test_downloads_beyond_the_share_of_a_client_are_not_cached(limited: CacheHarness) -> None:
    limited.upstream.on("GET", "", respond_streaming)
    limited.upstream.repository(f"{OTHER.host}/{NAME}").put_blob(DATA)
    client = "192.0.2.1"
    digests = [limited.upstream.repository(f"{HUB}/{NAME}").put_blob(bytes([number]) * 500) for number in range(2)]
    for digest in digests:
        limited.downloads.start(evolve(limited.principal(), client=client), digest, do_nothing)
    refused = limited.downloads.start(evolve(limited.principal(NAME, OTHER), client=client), DIGEST, do_nothing)
    limited.reactor.run_due_calls()
    assert isinstance(refused.failure, IngestFailed)
    assert [bound.report()["refused"] for bound in limited.downloads.bounds] == [0, 1, 0]


# cache space


def test_blob_larger_than_cache(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=len(DATA) - 1)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    assert harness.fetch(DIGEST) == ("MISS", DATA)
    assert len(harness.upstream.requests_matching("GET", "blobs")) == 1
    assert not harness.blobs.exists(DIGEST)
    assert harness.ingest_files == []
    assert harness.space.index.total == 0


def test_blob_of_unknown_length_larger_than_cache(make_harness: Callable[..., CacheHarness]) -> None:
    """Growth is counted, because one response without a length could otherwise fill the disk."""
    harness = make_harness(limit=50_000)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    harness.upstream.on("GET", "", lambda request, data: ScriptedResponse(200, DATA, length=None, sent=30_000), times=1)
    download = start(harness)
    response = harness.upstream.responses[0]
    one = reader(harness, download)
    one.read_available()
    assert harness.space.index.total == 30_000
    send(harness, response, 30_000)
    assert download.state is DownloadState.FAILED
    end(harness, response)
    one.read_available()
    assert one.data == DATA and one.ended
    assert len(harness.upstream.requests_matching("GET", "blobs")) == 1
    assert harness.space.index.total == 0
    one.disconnect()


# credentials


def test_expired_token_of_first_client(harness: CacheHarness) -> None:
    """Readers with a valid credential continue. The others get the error from upstream."""
    download, response = start_streaming(harness, sent=3000)
    expired, good = reader(harness, download, 0, harness.repository(authorization="Bearer old")), None
    good = reader(harness, download, 0, harness.repository(authorization="Bearer good"))
    for one in (expired, good):
        one.read_available()
    harness.upstream.on(
        "GET",
        "",
        lambda request, data: (
            error_response(401) if request.requester != "Bearer good" else ignore_range(request, data)
        ),
    )
    response.disconnect()
    harness.advance(2)
    good.read_available()
    assert good.data == DATA and good.ended
    expired.read_available()
    assert isinstance(expired.error, UpstreamRefused) and expired.error.status == 401
    assert expired.data == DATA[:3000]
    expired.disconnect()
    good.disconnect()


# internal errors


def test_internal_error_before_request(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingests: Ingests, key: IngestKey) -> Ingest | None:
        raise RuntimeError("a bug in this program")

    monkeypatch.setattr(Ingests, "acquire", fail)
    download = start(harness)
    [error] = wait_started_outcome(download)
    assert type(error) is RegistryError and error.status == 500
    assert "a bug" not in error.message
    assert harness.active_download(DIGEST) is None


@pytest.mark.parametrize("method", ["append", "verify", "commit"])
def test_internal_error_during_download(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Readers continue directly from upstream, as if the disk were full. The digest is still verified."""

    def fail(ingest: Ingest, *args: Any) -> None:
        raise RuntimeError("a bug in this program")

    harness.upstream.on("GET", "", respond_streaming, times=1)
    download = start(harness)
    response = harness.upstream.responses[0]
    send(harness, response, 3000)
    monkeypatch.setattr(Ingest, method, fail)
    one = reader(harness, download)
    end(harness, response)
    one.read_available()
    assert one.data == DATA and one.ended
    one.disconnect()
    assert harness.active_download(DIGEST) is None


@pytest.mark.parametrize("method", ["release", "size"])
def test_failing_cleanup_wakes_readers(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    download, response = start_streaming(harness, sent=3000)
    one = reader(harness, download)
    one.read_available()
    one.read()
    target: Any = harness.space if method == "release" else type(harness.blobs)

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    release = harness.space.release
    monkeypatch.setattr(target, method, fail)
    end(harness, response)
    one.read_available()
    assert one.data == DATA
    assert harness.active_download(DIGEST) is None
    monkeypatch.undo()
    release(ingest_key(DIGEST))
    one.disconnect()


@pytest.mark.parametrize("is_coded", [True, False])
def test_a_content_coding_that_was_read_the_wrong_way(harness: CacheHarness, is_coded: bool) -> None:
    """A long response is read in the likelier way. If its digest shows that this is wrong, the next is read right."""
    noise = random.Random(0).randbytes(600_000)
    data = b"a tar" + noise if is_coded else gzip.compress(gzip.compress(noise))  # neither looks like what it is
    sent = gzip.compress(data) if is_coded else data
    digest = harness.upstream.repository(f"{HUB}/library/app").put_blob(data)
    harness.upstream.on("GET", "blobs", replace_with(sent, content_encoding="gzip"))
    with pytest.raises(UpstreamBroken, match="does not match"):
        harness.fetch(digest)
    assert harness.fetch(digest) == ("MISS", data)
