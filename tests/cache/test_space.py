from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.logger import LogEvent, globalLogPublisher

from dockerproxy.cache.janitor import Janitor
from dockerproxy.cache.space import MAINTENANCE_INTERVAL, CacheSpaceManager, FileCounter
from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.lru_index import CacheFull
from dockerproxy.store.records import Records
from tests.cache.support.harness import HUB, CacheHarness, ingest_key
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import disconnect_after, raise_error, respond_streaming
from tests.store.support.reactor import SteppedReactor

APP = "library/app"
DAY = 86400
CLIENT = "192.0.2.1"


def content(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def put_blob(harness: CacheHarness, number: int, size: int = 1000, client: str = "", registry: str = "") -> Digest:
    """Store a blob like a manifest, and record it."""
    data = content(number, size)
    digest = Digest.of(data)
    harness.blobs.put(data, digest)
    os.utime(harness.layout.blob(digest), (harness.now(), harness.now()))
    harness.run(harness.space.record(digest, size, client, registry))
    harness.reactor.advance(1)
    return digest


def leave_partial(harness: CacheHarness, number: int, size: int = 1000, partial_size: int = 600) -> IngestKey:
    """Leave a partial file, like a failed download."""
    data = content(number, size)
    ingest = Ingest.open(harness.layout, ingest_key(Digest.of(data)))
    assert ingest is not None
    ingest.append([data[:partial_size]])
    ingest.release()
    os.utime(harness.layout.ingest(ingest.key), (harness.now(), harness.now()))
    return ingest.key


def reserve(harness: CacheHarness, key: IngestKey, size: int, existing_size: int = 0) -> bool:
    return refusal(harness, key, size, size, existing_size) == ""


def refusal(
    harness: CacheHarness,
    key: IngestKey,
    size: int,
    expected_size: int | None = None,
    existing_size: int = 0,
    client: str = "",
) -> str:
    expected_size = size if expected_size is None else expected_size
    return harness.run(harness.space.reserve(key, size, expected_size, existing_size, client))  # type: ignore[no-any-return]


def stored_digests(harness: CacheHarness) -> set[Digest]:
    return {entry.key for entry in harness.blobs.walk()}


class FakeFreeSpace:
    """Replaces the free space reported by the file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free_bytes = free + 16 * 1024 * 1024  # the cache keeps 16 MiB free
        self.inodes = 0  # as Btrfs reports
        self.free_inodes: Callable[[], int] = lambda: 0
        monkeypatch.setattr("dockerproxy.cache.space.os.statvfs", lambda path: self.status)

    @property
    def status(self) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=self.free_bytes, f_frsize=1, f_files=self.inodes, f_favail=self.free_inodes())


NEW = ingest_key(Digest.of(b"new"))


def test_least_recently_used_is_evicted(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=3000)
    one, two, three = put_blob(harness, 1), put_blob(harness, 2), put_blob(harness, 3)
    harness.space.touch(one)
    assert reserve(harness, NEW, 500)
    assert stored_digests(harness) == {one, three}
    assert harness.space.index.total == 2500
    assert not harness.blobs.exists(two)
    harness.space.release(NEW)
    assert harness.space.index.total == 2000


def test_reservations_do_not_overlap(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000)
    assert reserve(harness, NEW, 1500)
    other = ingest_key(Digest.of(b"other"))
    assert not reserve(harness, other, 600)
    assert reserve(harness, other, 500)
    harness.run(harness.space.maintain())  # finds no file on disk yet
    assert harness.space.index.total == 2000
    harness.space.release(NEW)
    assert reserve(harness, ingest_key(Digest.of(b"third")), 1500)
    for digest in (other, ingest_key(Digest.of(b"third"))):
        harness.space.release(digest)
    assert harness.space.index.total == 0


@pytest.mark.parametrize("size", [2001, 1 << 50])
def test_reservation_larger_than_limit(make_harness: Callable[..., CacheHarness], size: int) -> None:
    harness = make_harness(limit=2000)
    one = put_blob(harness, 1)
    assert not reserve(harness, NEW, size)
    harness.space.release(NEW)
    assert stored_digests(harness) == {one}
    assert harness.space.index.total == 1000


def test_growing_reservation(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000)
    one = put_blob(harness, 1)
    for size in (0, 500, 1000):
        assert reserve(harness, NEW, size)
        assert harness.space.index.total == 1000 + size
    assert reserve(harness, NEW, 1001)
    assert stored_digests(harness) == set()
    assert not reserve(harness, NEW, 2001)
    harness.space.release(NEW)
    assert harness.space.index.total == 0
    assert not harness.blobs.exists(one)


def test_reservation_that_cannot_grow_keeps_its_bytes(make_harness: Callable[..., CacheHarness]) -> None:
    """The bytes of a partial download count, also after its reservation could not grow."""
    harness = make_harness(limit=2000)
    key = leave_partial(harness, 1)
    harness.run(harness.space.maintain())
    for reserved, size in ((600, 2001), (1500, 3000)):
        assert not reserve(harness, key, size)
        assert harness.space.index.total == reserved
        assert reserve(harness, key, 1500)
    harness.space.release(key)
    assert harness.space.index.total == 600


async def use_reservation(harness: CacheHarness, ingest: Ingest, sizes: list[int], *, commit: bool) -> None:
    async with harness.space.reservation(ingest, CLIENT) as reservation:
        for size in sizes:
            await reservation.grow(size, size)
            assert harness.space.index.total == size
        if commit:
            ingest.commit(harness.blobs)
            await reservation.commit(ingest.size)
        else:
            ingest.release()


@pytest.mark.parametrize("commit", [True, False])
def test_reservation_ends_with_the_bytes_on_disk(harness: CacheHarness, commit: bool) -> None:
    ingest = Ingest.open(harness.layout, ingest_key(Digest.of(content(1))))
    assert ingest is not None
    ingest.append([content(1)])
    harness.run(use_reservation(harness, ingest, [1000, 1500], commit=commit))
    assert harness.space.index.total == 1000
    assert (ingest.key in harness.space.index) != commit
    assert (ingest.key.digest in harness.space.index) == commit


def test_commit_needs_no_space_beside_the_reservation(make_harness: Callable[..., CacheHarness]) -> None:
    """The blob takes the place of the reserved bytes. Nothing is evicted for it."""
    harness = make_harness(limit=2000)
    old = put_blob(harness, 2)
    ingest = Ingest.open(harness.layout, ingest_key(Digest.of(content(1))))
    assert ingest is not None
    ingest.append([content(1)])

    async def commit() -> None:
        async with harness.space.reservation(ingest, CLIENT) as reservation:
            await reservation.grow(1000, 1000)
            ingest.commit(harness.blobs)
            await reservation.commit(1000)

    harness.run(commit())
    assert stored_digests(harness) == {old, ingest.key.digest}


def test_reservation_that_does_not_fit_is_released(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=999)
    ingest = Ingest.open(harness.layout, ingest_key(Digest.of(content(1))))
    assert ingest is not None
    with pytest.raises(CacheFull):
        harness.run(use_reservation(harness, ingest, [1000], commit=False))
    ingest.discard()
    assert harness.space.index.total == 0


def test_purge_removes_partial_downloads(harness: CacheHarness) -> None:
    blob, partial = put_blob(harness, 1), leave_partial(harness, 1)
    other = leave_partial(harness, 2)
    harness.run(harness.space.maintain())
    harness.run(harness.space.purge([blob]))
    assert stored_digests(harness) == set()
    assert not Path(harness.layout.ingest(partial)).exists()
    assert harness.ingest_files == [Path(harness.layout.ingest(other)).name]
    assert harness.space.index.total == 600


def test_disk_smaller_than_limit(make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make_harness(limit=1 << 40)
    free_space = FakeFreeSpace(monkeypatch, 500)
    one, two, three = put_blob(harness, 1), put_blob(harness, 2), put_blob(harness, 3)
    assert reserve(harness, NEW, 500)
    assert stored_digests(harness) == {one, two, three}
    harness.space.release(NEW)
    assert reserve(harness, NEW, 501)
    assert one not in stored_digests(harness)
    harness.space.release(NEW)
    free_space.free_bytes -= 10_000
    before = stored_digests(harness)
    assert not reserve(harness, NEW, 1)
    assert stored_digests(harness) == before
    harness.space.release(NEW)


def test_existing_bytes_need_no_disk_space(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make_harness(limit=1 << 40)
    FakeFreeSpace(monkeypatch, 100)
    assert not reserve(harness, NEW, 1000, 800)
    assert reserve(harness, NEW, 1000, 900)
    harness.space.release(NEW)


def test_removal_error(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    harness = make_harness(limit=2000)
    put_blob(harness, 1)
    put_blob(harness, 2)
    remove = type(harness.blobs).remove

    def fail(blobs: Any, digest: Digest) -> bool:
        if digest == Digest.of(content(1)):
            raise PermissionError(13, os.strerror(13))
        return remove(blobs, digest)

    monkeypatch.setattr(type(harness.blobs), "remove", fail)
    assert reserve(harness, NEW, 2000)
    assert stored_digests(harness) == {Digest.of(content(1))}
    assert any("cannot remove" in line and "Permission denied" in line for line in log_lines)
    harness.space.release(NEW)


# partial downloads


def test_partial_download_counts(harness: CacheHarness) -> None:
    data = content(1, 10_000)
    digest = harness.upstream.repository(f"{HUB}/{APP}").put_blob(data)
    harness.upstream.on("GET", "", disconnect_after(6000), times=1)
    harness.upstream.on("GET", "", raise_error(UpstreamBroken("cut")), times=6)
    with pytest.raises(UpstreamBroken):
        harness.fetch(digest)
    assert harness.space.index.total == 6000
    harness.run(harness.space.maintain())
    assert harness.space.index.total == 6000
    assert harness.fetch(digest) == ("MISS", data)
    assert harness.space.index.total == 10_000


def test_partial_download_is_evicted(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000)
    leave_partial(harness, 1)
    harness.run(harness.space.maintain())
    two = put_blob(harness, 2)
    assert reserve(harness, NEW, 900)
    assert harness.ingest_files == []
    assert stored_digests(harness) == {two}
    harness.space.release(NEW)


def test_partial_download_is_part_of_reservation(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=1000)
    digest = leave_partial(harness, 1)
    harness.run(harness.space.maintain())
    assert harness.space.index.total == 600
    assert reserve(harness, digest, 1000, 600)
    assert len(harness.ingest_files) == 1
    harness.space.release(digest)
    assert harness.space.index.total == 600


def test_running_download_is_not_evicted(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=12_000, inactive=10)
    data = content(1, 10_000)
    digest = harness.upstream.repository(f"{HUB}/{APP}").put_blob(data)
    harness.upstream.on("GET", "", respond_streaming)
    response = harness.run(harness.blob(digest))
    harness.upstream.responses[0].send(5000)
    harness.reactor.run_due_calls()
    harness.reactor.advance(2 * DAY)
    os.utime(harness.layout.ingest(ingest_key(digest)), (1, 1))
    harness.run(harness.space.maintain())
    assert not reserve(harness, NEW, 5000)
    harness.space.release(NEW)
    harness.upstream.responses[0].send_rest()
    harness.reactor.run_due_calls()
    assert harness.blobs.exists(digest)
    response.content.close()


def test_abandoned_ingests_are_discarded(harness: CacheHarness) -> None:
    old, new = leave_partial(harness, 1), leave_partial(harness, 2)
    for digest, age in ((old, DAY + 1), (new, DAY - 1)):
        os.utime(harness.layout.ingest(digest), (harness.now() - age, harness.now() - age))
    Path(harness.layout.ingests, "unrelated-file").write_text("x")
    harness.run(harness.space.maintain())
    assert harness.ingest_files == [Path(harness.layout.ingest(new)).name, "unrelated-file"]
    assert harness.space.index.total == 600


def test_partial_downloads_without_a_registry_are_discarded(harness: CacheHarness) -> None:
    """An earlier version did not record which registry had sent them."""
    old = Path(harness.layout.ingests, f"sha256-{Digest.of(content(2)).hex}")
    kept = leave_partial(harness, 1)
    old.write_bytes(content(2))
    harness.run(harness.space.maintain())
    assert harness.ingest_files == [Path(harness.layout.ingest(kept)).name]
    assert harness.space.index.total == 600


def test_small_blobs_take_room(make_harness: Callable[..., CacheHarness]) -> None:
    """A blob of one byte takes a directory and a block. Without counting them, blobs could fill the disk."""
    harness = make_harness(limit=100_000, blob_cost=8192)
    for number in range(30):
        put_blob(harness, number, 1)
    assert len(stored_digests(harness)) <= 12
    assert harness.run(harness.space.usage()) == (len(stored_digests(harness)) * 8193, 100_000)


# bytes that are not verified

EVIL, GOOD = "evil.example", "good.example"


def key_of(host: str, number: int) -> IngestKey:
    return IngestKey(host, Digest.of(b"%d" % number))


def leave(harness: CacheHarness, host: str, number: int, size: int) -> None:
    """Leave a partial download of `size` bytes, as a failed download does."""
    key = key_of(host, number)
    assert refusal(harness, key, size) == ""
    ingest = Ingest.open(harness.layout, key)
    assert ingest is not None
    ingest.append([bytes(size)])
    ingest.release()
    harness.space.release(key)
    harness.reactor.advance(1)


def test_blob_larger_than_its_part_of_the_cache(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000, max_blob_size=1500)
    one = put_blob(harness, 1)
    for size, expected_size in ((100, 1501), (1501, 1501)):
        assert "CACHE_MAX_BLOB_SIZE" in refusal(harness, NEW, size, expected_size)
    assert refusal(harness, NEW, 100, 1500) == ""
    assert stored_digests(harness) == {one}  # an announced size evicts nothing
    assert harness.space.index.total == 1100
    harness.space.release(NEW)


def test_downloads_of_one_client_have_half_if_others_would_have_to_go(
    make_harness: Callable[..., CacheHarness],
) -> None:
    harness = make_harness(limit=2000, max_blob_size=1500)
    keys = [key_of(registry, number) for registry in (EVIL, GOOD) for number in (1, 2)]
    assert refusal(harness, keys[0], 700, client=CLIENT) == ""
    assert refusal(harness, keys[1], 700, client=CLIENT) == ""  # into free space
    harness.space.release(keys[1])
    one = put_blob(harness, 1, 1000)
    reason = f"unfinished downloads from {EVIL} that {CLIENT} has requested have 700 of the 1000 bytes that"
    for _ in range(2):
        assert reason in refusal(harness, keys[1], 301, client=CLIENT)
    assert refusal(harness, keys[1], 300, client=CLIENT) == ""
    assert stored_digests(harness) == {one}
    assert harness.space.report_bounds()[0] == {
        "name": "bytes of the cache by client", "used": 2000, "limit": 2000, "share": 1000, "refused": 2,
        "clients": {CLIENT: 1000},
    }  # fmt: skip
    assert refusal(harness, keys[2], 301, client=CLIENT) == ""
    assert refusal(harness, keys[3], 301, client="192.0.2.2") == ""
    for key in keys:
        harness.space.release(key)


def test_one_blob_may_be_larger_than_the_share_of_a_client(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000, max_blob_size=1500)
    put_blob(harness, 1, 1000)
    assert refusal(harness, NEW, 1500, client=CLIENT) == ""
    harness.space.release(NEW)


def test_a_second_use_survives_a_restart(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=3000)
    one, two = put_blob(harness, 1), put_blob(harness, 2)
    harness.space.touch(one)
    harness.reactor.advance(0)
    restarted = make_harness(limit=3000)
    assert restarted.layout.root == harness.layout.root
    restarted.run(restarted.space.maintain())
    assert {entry.key for entry in restarted.blobs.walk() if entry.used_again} == {one}
    put_blob(restarted, 3, 1500)
    assert stored_digests(restarted) == {one, Digest.of(content(3, 1500))}
    assert two not in restarted.space.index


def test_a_manifest_that_is_stored_again_is_used_again(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=3000)
    one = put_blob(harness, 1)
    put_blob(harness, 1)
    assert {entry.key for entry in harness.blobs.walk() if entry.used_again} == {one}


def test_downloads_from_one_registry_have_a_share(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=2000, max_blob_size=1500)
    one = put_blob(harness, 1, 400)
    assert refusal(harness, key_of(EVIL, 1), 1000) == ""
    assert f"unfinished downloads from {EVIL} have 1000 of the 1500 bytes" in refusal(harness, key_of(EVIL, 2), 501)
    assert refusal(harness, key_of(GOOD, 1), 500) == ""
    assert refusal(harness, key_of(EVIL, 2), 250) == ""
    assert "unfinished downloads have 1750 of the 1750 bytes" in refusal(harness, key_of(GOOD, 2), 1)
    assert stored_digests(harness) == set()
    assert not harness.blobs.exists(one)
    for key in (key_of(EVIL, 1), key_of(EVIL, 2), key_of(GOOD, 1), key_of(GOOD, 2)):
        harness.space.release(key)


def test_abandoned_downloads_make_room_before_blobs(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=3000, max_blob_size=1500)
    blobs = {put_blob(harness, 1, 700), put_blob(harness, 2, 700)}
    for number in range(10):
        leave(harness, EVIL, number, 500)
    assert len(harness.ingest_files) == 3
    assert stored_digests(harness) == blobs
    for number in range(10):
        leave(harness, GOOD, number, 500)
    assert len(harness.ingest_files) == 5  # 2,625 bytes for all
    assert harness.space.index.partial_bytes(GOOD) == 1500
    assert harness.space.index.partial_bytes() == 2500
    assert stored_digests(harness) == set()


def test_partial_downloads_of_one_registry_are_few(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dockerproxy.cache.space._MAX_PARTIALS", 5)
    harness = make_harness()
    leave(harness, GOOD, 0, 1)
    for number in range(20):
        leave(harness, EVIL, number, 1)
    assert len(harness.ingest_files) == 6
    assert Path(harness.layout.ingest(key_of(GOOD, 0))).exists()
    restarted = make_harness(upstream=harness.upstream)
    restarted.run(restarted.space.maintain())
    assert restarted.space.index.partials.count(EVIL) == 5
    leave(restarted, EVIL, 30, 1)
    assert len(restarted.ingest_files) == 6


# maintenance


def test_rescan_counts_disk(harness: CacheHarness, make_harness: Callable[..., CacheHarness]) -> None:
    put_blob(harness, 1)
    put_blob(harness, 2, 500)
    restarted = make_harness(upstream=harness.upstream)
    assert restarted.space.index.total == 0
    restarted.run(restarted.space.maintain())
    assert restarted.space.index.total == 1500


def test_lowered_limit(harness: CacheHarness, make_harness: Callable[..., CacheHarness]) -> None:
    one, two, three = (put_blob(harness, number) for number in (1, 2, 3))
    for digest, age in ((one, 30), (two, 10), (three, 20)):
        os.utime(harness.layout.blob(digest), (harness.now() - age, harness.now() - age))
    restarted = make_harness(upstream=harness.upstream, limit=1500)
    restarted.run(restarted.space.maintain())
    assert stored_digests(restarted) == {two}


def test_inactive_blob_is_evicted(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(inactive=100)
    one, two, three = (put_blob(harness, number) for number in (1, 2, 3))
    harness.reactor.advance(90)
    harness.space.touch(two)
    harness.space.touch(three)
    harness.reactor.advance(90)
    harness.run(harness.space.maintain())
    assert stored_digests(harness) == {two, three}
    assert not harness.blobs.exists(one)


def test_changes_during_rescan(harness: CacheHarness) -> None:
    """The scan may have seen the old state. A change must not be lost until the next rescan."""
    one = put_blob(harness, 1)
    harness.reactor.pool.hold(results=True)
    maintaining = harness.start(harness.space.maintain())
    assert harness.reactor.pool.waiting == 1  # the scan has finished, but its result is delayed
    two = Digest.of(content(2))
    harness.blobs.put(content(2), two)
    harness.start(harness.space.record(two, 1000, CLIENT, str(HUB)))
    harness.start(harness.space.purge([one]))
    harness.reactor.pool.release()
    assert maintaining.called
    assert harness.space.index.total == 1000
    assert (one in harness.space.index, two in harness.space.index) == (False, True)


def test_failing_scan(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(blobs: Any) -> Any:
        raise OSError(5, os.strerror(5))

    put_blob(harness, 1)
    monkeypatch.setattr(type(harness.blobs), "walk", fail)
    with pytest.raises(OSError):
        harness.run(harness.space.maintain())
    monkeypatch.undo()
    put_blob(harness, 2)
    assert harness.space.index.total == 2000
    harness.run(harness.space.maintain())
    assert harness.space.index.total == 2000


def test_maintenance_interval(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    one = put_blob(harness, 1)
    service = harness.space.service()
    harness.space.index.remove(one)
    service.startService()
    assert harness.space.index.total == 1000
    harness.blobs.put(content(2), Digest.of(content(2)))
    harness.reactor.advance(MAINTENANCE_INTERVAL - 1)
    assert harness.space.index.total == 1000
    harness.reactor.advance(1)
    assert harness.space.index.total == 2000

    def fail(blobs: Any) -> Any:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(type(harness.blobs), "walk", fail)
    harness.reactor.advance(MAINTENANCE_INTERVAL)  # an error does not stop the service
    monkeypatch.undo()
    harness.blobs.put(content(3), Digest.of(content(3)))
    harness.reactor.advance(MAINTENANCE_INTERVAL)
    assert harness.space.index.total == 3000
    service.stopService()


# links and records


def put_records(harness: CacheHarness, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        harness.records.put({"at": 1.0}, "client", "quay.io", f"own:{number}")


def count_records(harness: CacheHarness) -> int:
    return sum(1 for kind in harness.records.kinds() for _ in harness.records.walk(kind))


def test_links_and_records_count(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=1 << 20)  # 32 of 256 blocks are for links and records
    put_records(harness, 10)
    assert harness.run(harness.space.usage()) == (0, 1 << 20)
    harness.reactor.advance(5)
    assert harness.run(harness.space.usage())[0] == 14 * 4096  # with their directories
    assert not reserve(harness, NEW, (1 << 20) - 14 * 4096 + 1)
    assert reserve(harness, NEW, (1 << 20) - 14 * 4096)
    harness.space.release(NEW)


def test_new_links_count(harness: CacheHarness) -> None:
    digest = harness.upstream.repository(f"{HUB}/{APP}").put_blob(content(1))
    assert harness.fetch(digest)[0] == "MISS"
    harness.reactor.advance(5)
    counted = harness.run(harness.space.usage())[0]
    assert counted >= 1000 + 8 * 4096  # the grant, the link, and their directories
    assert harness.fetch(digest)[0] == "HIT"
    harness.reactor.advance(5)
    assert harness.run(harness.space.usage())[0] == counted
    harness.run(harness.space.maintain())
    assert harness.run(harness.space.usage())[0] < counted + 8 * 4096


def test_links_and_records_do_not_take_the_space_of_blobs(make_harness: Callable[..., CacheHarness]) -> None:
    """If there are too many, the janitor walks at once, and the oldest ones go."""
    harness = make_harness(limit=1 << 20)
    one = put_blob(harness, 1, 900_000)
    harness.reactor.pool.hold()  # the janitor cannot walk yet
    put_records(harness, 1000)
    harness.reactor.advance(5)
    assert harness.run(harness.space.usage())[0] > 1 << 20
    assert harness.space.index.overhead == 32 * 4096
    harness.reactor.pool.release()
    assert count_records(harness) <= 32
    assert harness.run(harness.space.usage())[0] <= 1 << 20
    assert stored_digests(harness) == {one}


@pytest.mark.parametrize("load", ["blobs", "logins"])
def test_tree_is_bounded_whatever_clients_do(make_harness: Callable[..., CacheHarness], load: str) -> None:
    """200 blobs through a cache of 200 kB, and 2,000 one-time logins: all of the tree stays within the limit."""
    harness = make_harness(limit=200_000)
    if load == "blobs":
        repository = harness.upstream.repository(f"{HUB}/{APP}")
        for number in range(200):
            assert harness.fetch(repository.put_blob(b"%d" % number * 1000))[0] == "MISS"
            harness.advance(1)
    else:
        for number in range(20):
            put_records(harness, 100, 100 * number)
            harness.advance(5)
    harness.advance(10)
    used, limit = harness.run(harness.space.usage())
    assert used <= limit
    folders = [Path(harness.layout.repositories), harness.records.root]
    files = [path for folder in folders for path in folder.rglob("*")]
    assert len(files) * 4096 <= limit / 8 + 10 * 4096
    assert sum(path.stat().st_size for path in Path(harness.layout.blobs).rglob("data")) + len(files) * 4096 <= limit


def record_walks(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the time of each walk."""
    walks: list[float] = []
    clean = harness.space.clean

    async def count() -> None:
        walks.append(harness.reactor.seconds())
        await clean()

    monkeypatch.setattr(harness.space, "clean", count)
    return walks


def test_other_walks_are_made_after_the_maintenance(harness: CacheHarness) -> None:
    is_walking: list[bool] = []

    async def walk() -> None:
        is_walking.append(harness.space._is_cleaning)

    harness.space.call_after_maintenance(walk)
    for _ in range(2):
        harness.run(harness.space.maintain())
    assert is_walking == [False, False]


def test_janitor_walks_once_an_hour(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = record_walks(harness, monkeypatch)
    service = harness.space.service()
    service.startService()
    for _ in range(12):
        harness.reactor.advance(MAINTENANCE_INTERVAL)
    assert walks == [0, 3600, 7200]
    service.stopService()


def test_too_many_young_links_and_records_go_later(make_harness: Callable[..., CacheHarness]) -> None:
    harness = make_harness(limit=1 << 20)
    put_records(harness, 100)
    for path in harness.records.root.rglob("*"):
        os.utime(path, (harness.now(), harness.now()))
    harness.reactor.advance(5)
    assert count_records(harness) == 100
    harness.reactor.advance(MAINTENANCE_INTERVAL)
    harness.run(harness.space.maintain())
    assert count_records(harness) <= 32


def test_only_one_walk_at_a_time(harness: CacheHarness) -> None:
    put_records(harness, 3)
    harness.reactor.pool.hold()
    first = harness.start(harness.space.clean())
    assert harness.reactor.pool.waiting == 1
    second = harness.start(harness.space.clean())
    assert second.called
    assert harness.reactor.pool.waiting == 1
    harness.reactor.pool.release()
    assert first.called


@pytest.mark.parametrize("records", [0, 500])
def test_few_free_inodes(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch, log_lines: list[str], records: int
) -> None:
    """Records go first, and then blobs, each of which is a file in a directory of its own."""
    harness = make_harness(limit=1 << 40)
    file_system = FakeFreeSpace(monkeypatch, 1 << 40)
    blobs = [put_blob(harness, number) for number in range(20)]
    put_records(harness, records)
    harness.run(harness.space.maintain())
    assert (count_records(harness), len(stored_digests(harness))) == (0, 20)  # they are old by this clock
    put_records(harness, records)
    for path in harness.records.root.rglob("*"):
        os.utime(path, (harness.now() - 100, harness.now() - 100))

    def free_inodes() -> int:
        return 9_985 + (records - count_records(harness)) + 2 * (20 - len(stored_digests(harness)))

    file_system.inodes = 1_000_000
    file_system.free_inodes = free_inodes
    harness.run(harness.space.maintain())
    assert free_inodes() >= 10_000
    if records:
        assert stored_digests(harness) == set(blobs)
        assert 300 <= count_records(harness) <= 490
    else:
        assert stored_digests(harness) == set(blobs[8:])
    assert any("few free inodes" in line for line in log_lines)


def test_new_records_go_before_blobs(
    make_harness: Callable[..., CacheHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that causes many of them does not displace blobs. The count of new files starts the walk."""
    harness = make_harness(limit=1 << 40)
    blobs = {put_blob(harness, number) for number in range(20)}
    file_system = FakeFreeSpace(monkeypatch, 1 << 40)
    file_system.inodes = 1_000_000
    file_system.free_inodes = lambda: 10_200 - count_records(harness)
    put_records(harness, 500)
    for path in harness.records.root.rglob("*"):
        os.utime(path, (harness.now(), harness.now()))
    harness.reactor.advance(5)
    harness.reactor.run_due_calls()
    assert stored_digests(harness) == blobs
    assert 100 <= count_records(harness) <= 200


def test_walk_is_repeated_while_inodes_are_missing(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = record_walks(harness, monkeypatch)
    file_system = FakeFreeSpace(monkeypatch, 1 << 40)
    file_system.inodes = 1_000_000
    for number in range(3):
        put_records(harness, 1, number)
        harness.reactor.advance(5)  # files are new, and inodes are missing
        harness.reactor.advance(0)
    assert walks == [5]
    for _ in range(60):
        harness.reactor.advance(1)
    assert walks == [5, 65]
    file_system.free_inodes = lambda: 500_000
    for _ in range(300):
        harness.reactor.advance(1)
    assert walks == [5, 65, 125]


def test_file_systems_that_do_not_count_inodes(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeFreeSpace(monkeypatch, 1 << 40)
    one = put_blob(harness, 1)
    harness.run(harness.space.clean())
    assert stored_digests(harness) == {one}


def test_files_are_counted_in_threads_and_reported_together() -> None:
    reactor = ManualReactor()
    reports: list[int] = []
    counter = FileCounter(reactor, reports.append)
    threads = [threading.Thread(target=lambda: [counter.add() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reactor.getDelayedCalls()) == 1
    reactor.advance(5)
    assert reports == [4000]
    counter.add()
    reactor.advance(5)
    assert reports == [4000, 1]


def test_a_stop_ends_the_walk_of_the_cache(tmp_path: Path) -> None:
    """The daemon does not wait for it: a large cache, or a slow disk, takes minutes."""
    reactor, layout = SteppedReactor(), Layout(tmp_path)
    blobs = Blobs(layout, False)
    for number in range(10):
        blobs.put(b"%d" % number, Digest.of(b"%d" % number))
    space = CacheSpaceManager(
        reactor, layout, blobs, limit=1 << 40, max_blob_size=1 << 40, inactive=1e10, clock=reactor.seconds,
        janitor=Janitor(layout, Records(tmp_path / "records"), reactor.seconds),
    )  # fmt: skip
    failures: list[LogEvent] = []
    globalLogPublisher.addObserver(failures.append)
    service = space.service()
    service.startService()
    stopped: list[object] = []
    service.stopService().addCallback(stopped.append)
    try:
        while reactor.busy:
            reactor.run_one()
    finally:
        globalLogPublisher.removeObserver(failures.append)
    assert (space.index.total, len(stopped)) == (0, 1), "it ended at its first step"
    assert not failures
