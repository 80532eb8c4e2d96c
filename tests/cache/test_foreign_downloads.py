"""Downloads of the same blob by two processes.

The processes are two caches in one directory. They share no other state.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.downloads import BlobDownload
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.ingests import DownloadInfo
from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.content import VERIFY_FIRST_SIZE
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import ForeignIngest, Ingest
from dockerproxy.store.inotify import FileWatcher
from tests.cache.support.harness import HUB, CacheHarness, ManualReader, do_nothing, ingest_key, result
from tests.cache.support.upstream import ScriptedResponse, respond_streaming, respond_with

DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
KEY = ingest_key(DIGEST)
NAME = "library/app"
ALICE = "Basic alice"


class TwoProcesses:
    """Two caches. `writer` downloads the blob, and `follower` follows. The test controls the upstream response."""

    def __init__(self, make_harness: Callable[..., CacheHarness]) -> None:
        self.writer = make_harness(shared=True)
        self.upstream = self.writer.upstream
        self.follower = make_harness(shared=True, upstream=self.upstream)
        self.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
        self.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
        self.download = self._start(self.writer)
        self.response: ScriptedResponse = self.upstream.responses[-1]
        self.foreign_download = self._start(self.follower)
        self.advance()

    def _start(self, harness: CacheHarness) -> BlobDownload:
        download = harness.downloads.start(harness.principal(), DIGEST, do_nothing)
        harness.reactor.run_due_calls()
        return download

    def advance(self, seconds: float = 0.1) -> None:
        self.writer.advance(seconds)

    def send(self, size: int) -> None:
        self.response.send(size)
        self.advance()

    def end(self) -> None:
        self.response.send_rest()
        self.advance()

    def reader(self, download: BlobDownload | None = None) -> ManualReader:
        content = (download or self.foreign_download).open_reader(self.follower.repository())
        assert content is not None
        return ManualReader(self.follower, content)

    def kill_writer(self) -> None:
        """Simulate the death of the writing process: the kernel closes its file and releases the lock."""
        ingest = self.download._file
        assert isinstance(ingest, Ingest)
        reader = ingest.reader()
        os.dup2(reader, ingest._fd, inheritable=False)
        os.close(reader)

    @property
    def requested_ranges(self) -> list[str | None]:
        """The ranges that were requested from upstream."""
        return [request.range for request in self.upstream.requests_matching("GET", "blobs")]


@pytest.fixture
def processes(make_harness: Callable[..., CacheHarness]) -> TwoProcesses:
    return TwoProcesses(make_harness)


def test_both_processes_read_one_download(processes: TwoProcesses) -> None:
    reader = processes.reader()
    processes.send(1000)
    reader.read_available()
    assert reader.data == DATA[:1000]
    assert processes.foreign_download.size == len(DATA)
    processes.end()
    reader.read_available()
    assert (reader.data, reader.ended) == (DATA, True)
    assert processes.foreign_download.state is DownloadState.COMMITTED
    assert processes.requested_ranges == [None]
    assert processes.writer.ingest_files == []
    assert processes.writer.ingests.read_info(KEY) is None
    reader.disconnect()


def test_readers_of_another_process_are_another_use(processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Digest] = []
    monkeypatch.setattr(processes.follower.space, "touch", used.append)
    reader = processes.reader()
    processes.end()
    assert used == [DIGEST]
    reader.disconnect()


def test_download_without_a_reader_here_is_no_other_use(
    processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Digest] = []
    monkeypatch.setattr(processes.follower.space, "touch", used.append)
    processes.end()
    assert used == []


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_follower_starts_after_info_and_ends_after_publish(harness: CacheHarness, size: int | None) -> None:
    harness.ingests = evolve(harness.ingests, shared=True)
    ingest = harness.ingests.acquire(KEY)
    assert isinstance(ingest, Ingest)
    ingest.append([DATA[:10]])
    downloads = harness.new_downloads()
    download = downloads.start(harness.principal(), DIGEST, do_nothing)
    harness.advance(1)
    assert download.state is DownloadState.WAITING
    harness.ingests.publish_info(ingest, DownloadInfo(size, "library/app", PUBLIC, 0.0))
    harness.advance(1)
    assert download.state is DownloadState.FOLLOWING and (download.size, download.written) == (size, 10)
    content = download.open_reader(harness.repository())
    assert content is not None
    reader = ManualReader(harness, content)
    ingest.append([DATA[10:]])
    harness.advance(1)
    reader.read_available()
    assert reader.data == DATA[:-1]
    ingest.commit(harness.blobs)
    harness.advance(1)
    reader.read_available()
    assert reader.data == DATA
    assert harness.upstream.requests_matching("GET", "blobs") == []
    reader.disconnect()


@pytest.mark.parametrize("size", [1, VERIFY_FIRST_SIZE, VERIFY_FIRST_SIZE + 1])
def test_small_blob_has_no_download_info(make_harness: Callable[..., CacheHarness], size: int) -> None:
    """A small blob is served only when complete. Other processes then find the blob and its grant in the store."""
    one = make_harness(shared=True)
    upstream = one.upstream
    other = make_harness(shared=True, upstream=upstream)
    digest = upstream.repository(f"{HUB}/{NAME}").put_blob(DATA[:size])
    upstream.on("GET", str(digest), respond_streaming)
    first = one.start(one.fetch_later(digest))
    second = other.start(other.fetch_later(digest))
    one.advance(0.1)
    info = one.ingests.read_info(ingest_key(digest))
    assert info is None if size <= VERIFY_FIRST_SIZE else info.size == size
    upstream.responses[-1].send_rest()
    one.advance(0.1)
    assert result(first, one.reactor) == ("MISS", DATA[:size])
    assert result(second, other.reactor) == ("HIT" if size <= VERIFY_FIRST_SIZE else "JOINED", DATA[:size])
    assert len(upstream.requests) == 1


def test_follower_takes_over_from_dead_writer(processes: TwoProcesses) -> None:
    reader = processes.reader()
    processes.send(1000)
    reader.read_available()
    processes.kill_writer()
    processes.advance(1)
    reader.read_available()
    assert reader.data == DATA
    assert processes.requested_ranges == [None, "bytes=999-"]
    assert Path(processes.writer.layout.blob(DIGEST)).read_bytes() == DATA
    reader.disconnect()


def test_corrupt_data_of_dead_writer_is_not_completed(processes: TwoProcesses) -> None:
    reader = processes.reader()
    processes.send(1000)
    reader.read_available()
    ingest = processes.download._file
    assert isinstance(ingest, Ingest)
    ingest.append([b"wrong" * 10_000])
    processes.advance()
    reader.read_available()
    processes.kill_writer()
    processes.advance(1)
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    assert 51_000 <= len(reader.data) < len(DATA)
    assert processes.requested_ranges == [None, "bytes=50999-"]
    assert not processes.writer.blobs.exists(DIGEST)
    reader.disconnect()


def test_corrupt_download_fails_follower(make_harness: Callable[..., CacheHarness]) -> None:
    processes = TwoProcesses(make_harness)
    reader = processes.reader()
    processes.response._body = b"x" * len(DATA)
    processes.end()
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    assert len(reader.data) < len(DATA)
    assert not processes.writer.blobs.exists(DIGEST)
    reader.disconnect()


def test_full_disk_fails_both_ingests(processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ingest: Ingest, chunks: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = processes.reader()
    processes.send(1000)
    reader.read_available()
    monkeypatch.setattr(Ingest, "append", full)
    processes.end()
    reader.read_available()
    assert (reader.data, reader.ended) == (DATA, True)  # read directly from upstream
    assert processes.requested_ranges == [None, "bytes=999-"]
    assert not processes.writer.blobs.exists(DIGEST)
    reader.disconnect()


def test_truncated_ingest_fails_follower(processes: TwoProcesses) -> None:
    reader = processes.reader()
    processes.send(1000)
    reader.read_available()
    ingest = processes.download._file
    assert isinstance(ingest, Ingest)
    ingest.size = 500
    os.ftruncate(ingest._fd, 500)
    processes.advance()
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    assert reader.data == DATA[:1000]
    reader.disconnect()


def test_blob_published_before_lock(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(shared=True)
    harness.blobs.put(DATA, DIGEST)
    download = harness.downloads.start(harness.principal(), DIGEST, do_nothing)
    harness.reactor.run_due_calls()
    assert download.state is DownloadState.COMMITTED
    assert harness.upstream.requests_matching("GET", "blobs") == []
    assert harness.ingest_files == []


# notification


@pytest.fixture
def count_looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how often followers have looked at a foreign ingest since its last call."""
    looks: list[None] = []
    in_progress = ForeignIngest.in_progress.fget  # type: ignore[attr-defined]

    def count(ingest: ForeignIngest) -> bool:
        looks.append(None)
        return in_progress(ingest)  # type: ignore[no-any-return]

    monkeypatch.setattr(ForeignIngest, "in_progress", property(count))

    def count_since_last_call() -> int:
        number = len(looks)
        looks.clear()
        return number

    return count_since_last_call


def test_follower_looks_only_at_changes(processes: TwoProcesses, count_looks: Callable[[], int]) -> None:
    processes.advance(10)
    assert count_looks() <= 10
    processes.response.send(1000)
    processes.writer.reactor.run_due_calls()  # without any time
    assert processes.foreign_download.written == 1000
    assert count_looks() == 1


def test_published_information_wakes_followers(harness: CacheHarness) -> None:
    """Upstream has responded, but has not sent any byte."""
    harness.ingests = evolve(harness.ingests, shared=True)
    ingest = harness.ingests.acquire(KEY)
    assert isinstance(ingest, Ingest)
    download = harness.new_downloads().start(harness.principal(), DIGEST, do_nothing)
    harness.advance(0.1)
    harness.ingests.publish_info(ingest, DownloadInfo(len(DATA), "library/app", PUBLIC, 0.0))
    harness.reactor.run_due_calls()
    assert download.state is DownloadState.FOLLOWING
    ingest.discard()
    harness.advance(1)


def test_follower_may_not_grant_access_to_its_client(processes: TwoProcesses) -> None:
    """The request that the writer sent was not for this client."""
    granted: list[None] = []

    async def grant() -> None:
        granted.append(None)

    processes.foreign_download._on_verified = grant
    processes.end()
    assert processes.foreign_download.state is DownloadState.COMMITTED
    assert granted == []


def test_many_writes_are_one_change(processes: TwoProcesses, count_looks: Callable[[], int]) -> None:
    processes.advance(0.1)
    count_looks()
    for _ in range(50):
        processes.response.send(1000)
        processes.writer.reactor.run_due_calls()
    processes.advance(0.1)
    assert processes.foreign_download.written == 50_000
    assert count_looks() == 2  # the first at once, the second 10 ms later


def test_lost_notification_delays_a_follower_by_a_second(
    processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileWatcher, "doRead", lambda watcher: os.read(watcher.fileno(), 65536))
    processes.send(1000)
    assert processes.foreign_download.written == 0
    processes.advance(1)
    assert processes.foreign_download.written == 1000


def test_without_inotify(
    make_harness: Callable[..., CacheHarness],
    monkeypatch: pytest.MonkeyPatch,
    count_looks: Callable[[], int],
    log_lines: list[str],
) -> None:
    """Followers look every 10 ms while the file grows, and every 100 ms while it does not. The log says so once."""

    def fail(watcher: FileWatcher, fd: int, callback: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(FileWatcher, "watch", fail)
    processes = TwoProcesses(make_harness)
    reader = processes.reader()
    processes.advance(1)
    count_looks()
    processes.advance(10)
    assert 90 <= count_looks() <= 110
    processes.send(1000)
    processes.kill_writer()
    processes.advance(1)
    reader.read_available()
    assert reader.data == DATA
    assert sum("cannot watch the downloads of other processes" in line for line in log_lines) == 1
    reader.disconnect()


# clients


def test_blob_published_before_first_poll(make_harness: Callable[..., CacheHarness]) -> None:
    """The follower never sees the download start. It asks upstream about the published blob, as about any other."""
    harness = make_harness(shared=True)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    ingest = harness.ingests.acquire(KEY)
    assert isinstance(ingest, Ingest)
    results: list[Any] = []
    harness.start(harness.fetch_later(DIGEST)).addBoth(results.append)
    ingest.append([DATA])
    ingest.commit(harness.blobs)
    harness.advance(1)
    assert results == [("REVALIDATED", DATA)]
    assert len(harness.upstream.requests_matching(pattern="blobs")) == 1


def test_ingest_discarded_before_first_poll(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(shared=True)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    ingest = harness.ingests.acquire(KEY)
    assert isinstance(ingest, Ingest)
    ingest.append([b"something else"])
    results: list[Any] = []
    harness.start(harness.fetch_later(DIGEST)).addBoth(results.append)
    harness.advance(1)
    assert results == []
    ingest.discard()
    harness.advance(1)
    assert results == [("MISS", DATA)]
    assert [request.range for request in harness.upstream.requests_matching("GET", "blobs")] == [None]


def test_same_client_in_both_processes(processes: TwoProcesses) -> None:
    """The client that started the download needs no further access check in any process."""
    deferreds = [
        processes.writer.start(harness.fetch_later(DIGEST))
        for harness in (processes.writer, processes.follower, processes.follower)
    ]
    processes.advance()
    processes.end()
    results: list[Any] = []
    for deferred in deferreds:
        deferred.addBoth(results.append)
    assert results == [("JOINED", DATA)] * 3
    assert processes.requested_ranges == [None]
    assert processes.upstream.requests_matching("HEAD", "blobs") == []


def test_follower_client_is_denied(processes: TwoProcesses) -> None:
    processes.upstream.on("GET", str(DIGEST), respond_with(403), times=1)
    results: list[Any] = []
    processes.follower.start(processes.follower.fetch_later(DIGEST, authorization=ALICE)).addBoth(results.append)
    processes.advance()
    assert results and results[0].value.status == 403
    processes.end()


def test_follower_client_is_granted(processes: TwoProcesses) -> None:
    results: list[Any] = []
    processes.follower.start(processes.follower.fetch_later(DIGEST, authorization=ALICE)).addBoth(results.append)
    processes.advance()
    assert [request.requester for request in processes.upstream.requests_matching("GET", "blobs")] == [None, ALICE]
    processes.end()
    assert results == [("JOINED", DATA)]
    assert processes.requested_ranges == [None, "bytes=0-0"]


@pytest.mark.parametrize("sent", [0, 1000])
def test_follower_with_a_reader_goes_on_if_the_writer_has_none(processes: TwoProcesses, sent: int) -> None:
    """The writer does not know of the other's readers. It ends, and the other process continues with its file if it has
    any bytes. Otherwise the readers get the blob from upstream.
    """
    processes.upstream.on("GET", str(DIGEST), respond_streaming)
    reader = processes.reader()
    processes.response.send(sent)
    processes.advance(61)
    assert processes.download.state is DownloadState.FAILED
    assert processes.foreign_download.state is (DownloadState.DOWNLOADING if sent else DownloadState.FAILED)
    reader.read()
    processes.advance()
    processes.upstream.responses[-1].send_rest()
    processes.advance()
    reader.read_available()
    assert (reader.data, reader.ended) == (DATA, True)
    assert processes.requested_ranges == [None, f"bytes={sent - 1}-" if sent else None]
    reader.disconnect()


def test_both_processes_end_without_readers(processes: TwoProcesses) -> None:
    processes.send(1000)
    processes.advance(62)
    for download in (processes.download, processes.foreign_download):
        assert download.state is DownloadState.FAILED
    assert len(processes.writer.ingest_files) == 1
    processes.upstream.reset()
    assert processes.follower.fetch(DIGEST) == ("MISS", DATA)


def test_follower_without_a_reader_ends_before_the_writer(processes: TwoProcesses) -> None:
    reader = ManualReader(processes.writer, processes.download.open_reader(processes.writer.repository()))
    processes.send(1000)
    processes.advance(62)
    assert processes.foreign_download.state is DownloadState.FAILED
    processes.end()
    reader.read_available()
    assert (reader.data, reader.ended) == (DATA, True)
    reader.disconnect()
