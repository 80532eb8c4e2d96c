"""Tests of `StoredBlobReader`: reading, sendfile and the close callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.oci.names import Digest
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.store.layout import Layout

DATA = bytes(range(256)) * 1000


class SynchronousThreadPool:
    """A reactor that runs thread calls synchronously and counts them."""

    def __init__(self) -> None:
        self.calls = 0

    def getThreadPool(self) -> SynchronousThreadPool:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any, *arguments: Any) -> None:
        self.calls += 1
        done(True, function(*arguments))

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


@pytest.fixture
def blob(tmp_path: Path) -> OpenBlob:
    blobs, digest = Blobs(Layout(tmp_path), False), Digest.of(DATA)
    blobs.put(DATA, digest)
    blob = blobs.open(digest)
    assert blob is not None
    return blob


def result(coroutine: Any) -> Any:
    return Deferred.fromCoroutine(coroutine).result


@pytest.mark.parametrize("cached", [True, False])
def test_sendfile_source_reads_into_the_page_cache_first(
    blob: OpenBlob, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(OpenBlob, "is_cached", lambda *_: cached)
    threads = SynchronousThreadPool()
    reader = StoredBlobReader(threads, blob)
    assert result(reader.sendfile_source(1000, 100)) == (blob.fd, 100)
    assert result(reader.sendfile_source(len(DATA) - 10, 100)) == (blob.fd, 10)
    assert threads.calls == (0 if cached else 2)
    assert result(reader.sendfile_source(len(DATA), 100)) == (blob.fd, 0)
    reader.close()


def test_on_close_is_called_once(blob: OpenBlob) -> None:
    calls: list[StoredBlobReader] = []
    reader = StoredBlobReader(SynchronousThreadPool(), blob, calls.append)
    assert bytes(result(reader.read(0, len(DATA)))) == DATA
    assert calls == []
    reader.close()
    reader.close()
    assert calls == [reader] and blob.fd == -1
