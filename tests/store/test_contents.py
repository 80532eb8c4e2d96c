"""A stored blob as it is sent: its file, and who is told when it is closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.store.contents import StoredContent
from dockerproxy.store.layout import Layout

DATA = bytes(range(256)) * 1000


class Threads:
    """A reactor whose threads are this one, and are counted."""

    def __init__(self) -> None:
        self.used = 0

    def getThreadPool(self) -> Threads:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any, *arguments: Any) -> None:
        self.used += 1
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
def test_a_file_is_in_memory_before_it_is_sent(blob: OpenBlob, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr(OpenBlob, "is_cached", lambda *_: cached)
    threads = Threads()
    content = StoredContent(threads, blob)
    assert result(content.in_file(1000, 100)) == (blob.fd, 100)
    assert result(content.in_file(len(DATA) - 10, 100)) == (blob.fd, 10)
    assert threads.used == (0 if cached else 2)
    assert result(content.in_file(len(DATA), 100)) == (blob.fd, 0)
    content.close()


def test_its_end_is_told_once(blob: OpenBlob) -> None:
    told: list[None] = []
    content = StoredContent(Threads(), blob, lambda: told.append(None))
    assert bytes(result(content.read(0, len(DATA)))) == DATA
    assert told == []
    content.close()
    content.close()
    assert told == [None] and blob.fd == -1
