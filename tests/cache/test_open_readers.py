"""Readers of evicted blobs hold disk space, up to a limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from dockerproxy.cache.open_readers import CHECK_INTERVAL, OpenReaders
from dockerproxy.errors import ServiceOverloaded
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, CacheHarness, ManualReader
from tests.cache.support.upstream import respond_streaming

LIMIT = 1000


class FileReader:
    """An open file of `size` bytes."""

    def __init__(self, folder: Path, name: str, size: int = 400) -> None:
        self.path = folder / name
        if not self.path.exists():
            self.path.write_bytes(bytes(size))
        self.fd = os.open(self.path, os.O_RDONLY)
        self.busy = False

    def give_up(self) -> bool:
        if self.busy:
            return False
        os.close(self.fd)
        self.fd = -1
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def readers(clock: Clock) -> OpenReaders:
    return OpenReaders(clock, LIMIT)


def test_oldest_readers_of_files_without_a_name_end(clock: Clock, readers: OpenReaders, tmp_path: Path) -> None:
    opened = [FileReader(tmp_path, name) for name in ("a", "b", "a", "kept", "c", "d")]
    for reader in opened:
        readers.add(reader)
        clock.advance(0.1)
    for name in "abcd":
        (tmp_path / name).unlink()
    clock.advance(2 * CHECK_INTERVAL)
    assert [reader.fd >= 0 for reader in opened] == [False, False, False, True, True, True]


def test_readers_within_the_limit_stay(clock: Clock, readers: OpenReaders, tmp_path: Path) -> None:
    opened = [FileReader(tmp_path, name) for name in "abab"]
    for reader in opened:
        readers.add(reader)
    for name in "ab":
        (tmp_path / name).unlink()
    clock.advance(5 * CHECK_INTERVAL)
    assert all(reader.fd >= 0 for reader in opened)


def test_reader_in_a_thread_ends_later(clock: Clock, readers: OpenReaders, tmp_path: Path) -> None:
    one, other = FileReader(tmp_path, "large", 2000), FileReader(tmp_path, "small", 100)
    one.busy = True
    for reader in (one, other):
        readers.add(reader)
        reader.path.unlink()
    clock.advance(CHECK_INTERVAL)
    assert (one.fd >= 0, other.fd >= 0) == (True, False)
    one.busy = False
    clock.advance(CHECK_INTERVAL)
    assert one.fd == -1


def test_check_stops_with_the_last_reader(clock: Clock, readers: OpenReaders, tmp_path: Path) -> None:
    one = FileReader(tmp_path, "a")
    readers.add(one)
    readers.discard(one)
    readers.discard(one)
    clock.advance(CHECK_INTERVAL)
    assert clock.getDelayedCalls() == []
    readers.add(one)
    assert len(clock.getDelayedCalls()) == 1


@pytest.mark.parametrize("stored", [True, False])
def test_reader_of_an_evicted_blob_ends_with_an_error(harness: CacheHarness, stored: bool) -> None:
    data = bytes(5000)
    digest = harness.upstream.repository(f"{HUB}/library/app").put_blob(data)
    harness.open_readers._limit = 4999
    if stored:
        harness.fetch(digest)
    else:
        harness.upstream.on("GET", "blobs", respond_streaming)
    reader = ManualReader(harness, harness.run(harness.blob(digest)).content)
    if not stored:
        harness.upstream.responses[0].send_rest()
        harness.reactor.run_due_calls()
    reader.read(100)
    harness.run(harness.space.purge([Digest.of(data)]))
    reader.read(100)
    assert reader.data == data[:200]
    for _ in range(2):
        harness.reactor.advance(CHECK_INTERVAL)
    reader.read(100)
    assert isinstance(reader.error, ServiceOverloaded) and "was evicted while a slow client read it" in str(
        reader.error
    )
    reader.disconnect()
