from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dockerproxy.cache.room import MAINTENANCE
from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from tests.cache.stand_ins.upstream import cut_after, fails, flowing
from tests.cache.stand_ins.world import HUB, World

APP = "library/app"
DAY = 86400


def content(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def put(world: World, number: int, size: int = 1000) -> Digest:
    """Keep a content in the cache, as a manifest is kept."""
    data = content(number, size)
    digest = Digest.of(data)
    world.blobs.put(data, digest)
    os.utime(world.layout.blob(digest), (world.now(), world.now()))
    world.run(world.room.count(digest, size))
    world.reactor.advance(1)
    return digest


def left_over(world: World, number: int, size: int = 1000, kept: int = 600) -> Digest:
    """Leave the beginning of a blob, as a download that failed does."""
    data = content(number, size)
    ingest = Ingest.open(world.layout, Digest.of(data))
    assert ingest is not None
    ingest.append([data[:kept]])
    ingest.release()
    os.utime(world.layout.ingest(ingest.digest), (world.now(), world.now()))
    return ingest.digest


def reserve(world: World, digest: Digest, size: int, present: int = 0) -> bool:
    return world.run(world.room.reserve(digest, size, present))  # type: ignore[no-any-return]


def held(world: World) -> set[Digest]:
    return {entry.digest for entry in world.blobs.walk()}


class Disk:
    """Says how many bytes are free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free + 16 * 1024 * 1024  # so much is left to others
        monkeypatch.setattr(
            "dockerproxy.cache.room.os.statvfs", lambda path: SimpleNamespace(f_bavail=self.free, f_frsize=1)
        )


NEW = Digest.of(b"new")


def test_the_least_recently_used_go(make_world: Callable[..., World]) -> None:
    world = make_world(limit=3000)
    one, two, three = put(world, 1), put(world, 2), put(world, 3)
    world.room.hold(one)  # read once more, and no longer
    world.room.let_go(one)
    assert reserve(world, NEW, 500)
    assert held(world) == {one, three}
    assert world.room.usage.total == 2500
    assert not world.blobs.exists(two)
    world.room.release(NEW)
    assert world.room.usage.total == 2000


def test_what_is_in_use_never_goes(make_world: Callable[..., World]) -> None:
    world = make_world(limit=2000)
    one, two = put(world, 1), put(world, 2)
    world.room.hold(one)
    world.room.hold(one)
    world.room.let_go(one)
    assert not reserve(world, NEW, 1500)
    assert held(world) == {one, two}  # and what cannot help is left
    assert reserve(world, NEW, 900)
    assert held(world) == {one}
    world.room.let_go(one)
    world.room.release(NEW)


def test_what_is_reserved_is_not_given_twice(make_world: Callable[..., World]) -> None:
    world = make_world(limit=2000)
    assert reserve(world, NEW, 1500)
    other = Digest.of(b"other")
    assert not reserve(world, other, 600)
    assert reserve(world, other, 500)
    world.run(world.room.maintain())  # which finds nothing on the disk yet
    assert world.room.usage.total == 2000
    world.room.release(NEW)
    assert reserve(world, Digest.of(b"third"), 1500)
    for digest in (other, Digest.of(b"third")):
        world.room.release(digest)
    assert world.room.usage.total == 0


@pytest.mark.parametrize("size", [2001, 1 << 50])
def test_larger_than_the_limit(make_world: Callable[..., World], size: int) -> None:
    world = make_world(limit=2000)
    one = put(world, 1)
    assert not reserve(world, NEW, size)
    world.room.release(NEW)
    assert held(world) == {one}
    assert world.room.usage.total == 1000


def test_one_that_grows(make_world: Callable[..., World]) -> None:
    world = make_world(limit=2000)
    one = put(world, 1)
    for size in (0, 500, 1000):
        assert reserve(world, NEW, size)
        assert world.room.usage.total == 1000 + size
    assert reserve(world, NEW, 1001)
    assert held(world) == set()
    assert not reserve(world, NEW, 2001)
    world.room.release(NEW)
    assert world.room.usage.total == 0
    assert not world.blobs.exists(one)


def test_a_release_ends_only_what_was_reserved(make_world: Callable[..., World]) -> None:
    """A reader's hold on the same blob stays, whatever became of the download."""
    world = make_world(limit=2000)
    one = put(world, 1)
    world.room.hold(one)
    world.room.release(one)
    assert not reserve(world, one, 5000)
    world.room.release(one)
    world.room.let_go(one)
    with pytest.raises(KeyError):
        world.room.let_go(one)


def test_the_disk_has_less_than_the_limit(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(limit=1 << 40)
    disk = Disk(monkeypatch, 500)
    one, two, three = put(world, 1), put(world, 2), put(world, 3)
    assert reserve(world, NEW, 500)
    assert held(world) == {one, two, three}
    world.room.release(NEW)
    assert reserve(world, NEW, 501)
    assert one not in held(world)
    world.room.release(NEW)
    disk.free -= 10_000
    before = held(world)
    assert not reserve(world, NEW, 1)
    assert held(world) == before
    world.room.release(NEW)


def test_what_is_there_already_needs_no_room_on_the_disk(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(limit=1 << 40)
    Disk(monkeypatch, 100)
    assert not reserve(world, NEW, 1000, 800)
    assert reserve(world, NEW, 1000, 900)
    world.room.release(NEW)


def test_what_cannot_be_removed(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    world = make_world(limit=2000)
    put(world, 1)
    put(world, 2)
    remove = type(world.blobs).remove

    def fail(blobs: Any, digest: Digest) -> bool:
        if digest == Digest.of(content(1)):
            raise PermissionError(13, os.strerror(13))
        return remove(blobs, digest)

    monkeypatch.setattr(type(world.blobs), "remove", fail)
    assert reserve(world, NEW, 2000)
    assert held(world) == {Digest.of(content(1))}
    assert any("cannot be removed: Permission denied" in line for line in logged)
    world.room.release(NEW)


# what did not come whole


def test_what_is_left_of_a_download_counts(world: World) -> None:
    data = content(1, 10_000)
    digest = world.upstream.repository(f"{HUB}/{APP}").put_blob(data)
    world.upstream.on("GET", "", cut_after(6000), times=1)
    world.upstream.on("GET", "", fails(UpstreamBroken("cut")), times=6)
    with pytest.raises(UpstreamBroken):
        world.fetch(digest)
    assert world.room.usage.total == 6000
    world.run(world.room.maintain())
    assert world.room.usage.total == 6000
    assert world.fetch(digest) == ("MISS", data)
    assert world.room.usage.total == 10_000


def test_what_is_left_of_a_download_goes_like_all_else(make_world: Callable[..., World]) -> None:
    world = make_world(limit=2000)
    left_over(world, 1)
    world.run(world.room.maintain())
    two = put(world, 2)
    assert reserve(world, NEW, 900)
    assert world.ingests == []
    assert held(world) == {two}
    world.room.release(NEW)


def test_what_is_left_is_part_of_what_is_reserved(make_world: Callable[..., World]) -> None:
    world = make_world(limit=1000)
    digest = left_over(world, 1)
    world.run(world.room.maintain())
    assert world.room.usage.total == 600
    assert reserve(world, digest, 1000, 600)
    assert len(world.ingests) == 1
    world.room.release(digest)
    assert world.room.usage.total == 600


def test_a_download_under_way_is_never_dropped(make_world: Callable[..., World]) -> None:
    world = make_world(limit=12_000, inactive=10)
    data = content(1, 10_000)
    digest = world.upstream.repository(f"{HUB}/{APP}").put_blob(data)
    world.upstream.on("GET", "", flowing)
    answer = world.run(world.blob(digest))
    world.upstream.answers[0].send(5000)
    world.reactor.settle()
    world.reactor.advance(2 * DAY)
    os.utime(world.layout.ingest(digest), (1, 1))
    world.run(world.room.maintain())
    assert not reserve(world, NEW, 5000)
    world.room.release(NEW)
    world.upstream.answers[0].end()
    world.reactor.settle()
    assert world.blobs.exists(digest)
    answer.content.close()


def test_the_abandoned_go(world: World) -> None:
    old, new = left_over(world, 1), left_over(world, 2)
    for digest, age in ((old, DAY + 1), (new, DAY - 1)):
        os.utime(world.layout.ingest(digest), (world.now() - age, world.now() - age))
    Path(world.layout.ingests, "somebody-elses").write_text("x")
    world.run(world.room.maintain())
    assert world.ingests == [Path(world.layout.ingest(new)).name, "somebody-elses"]
    assert world.room.usage.total == 600


# maintenance


def test_what_the_disk_holds_is_counted(world: World, make_world: Callable[..., World]) -> None:
    put(world, 1)
    put(world, 2, 500)
    again = make_world(upstream=world.upstream)
    assert again.room.usage.total == 0
    again.run(again.room.maintain())
    assert again.room.usage.total == 1500


def test_a_limit_that_was_lowered(world: World, make_world: Callable[..., World]) -> None:
    one, two, three = (put(world, number) for number in (1, 2, 3))
    for digest, age in ((one, 30), (two, 10), (three, 20)):
        os.utime(world.layout.blob(digest), (world.now() - age, world.now() - age))
    again = make_world(upstream=world.upstream, limit=1500)
    again.run(again.room.maintain())
    assert held(again) == {two}


def test_what_nobody_reads_goes(make_world: Callable[..., World]) -> None:
    world = make_world(inactive=100)
    one, two, three = (put(world, number) for number in (1, 2, 3))
    world.room.hold(two)
    world.reactor.advance(90)
    world.room.hold(three)
    world.room.let_go(three)
    world.reactor.advance(90)
    world.run(world.room.maintain())
    assert held(world) == {two, three}
    assert not world.blobs.exists(one)
    world.room.let_go(two)


def test_what_comes_and_goes_while_it_is_counted(world: World) -> None:
    """The walk may have seen it as it was before; nothing may be missing for ten minutes, or counted that is gone."""
    one = put(world, 1)
    world.reactor.pool.hold(results=True)
    maintaining = world.start(world.room.maintain())
    assert world.reactor.pool.waiting == 1  # it has walked, and nobody knows yet
    two = Digest.of(content(2))
    world.blobs.put(content(2), two)
    world.start(world.room.count(two, 1000))
    world.start(world.room.purge([one]))
    world.reactor.pool.release()
    assert maintaining.called
    assert world.room.usage.total == 1000
    assert list(world.room.usage._kept) == [str(two)]


def test_a_walk_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(blobs: Any) -> Any:
        raise OSError(5, os.strerror(5))

    put(world, 1)
    monkeypatch.setattr(type(world.blobs), "walk", fail)
    with pytest.raises(OSError):
        world.run(world.room.maintain())
    monkeypatch.undo()
    put(world, 2)
    assert world.room.usage.total == 2000
    world.run(world.room.maintain())
    assert world.room.usage.total == 2000


def test_the_service_looks_at_start_and_now_and_then(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = put(world, 1)
    service = world.room.service()
    world.room.usage.remove(one)
    service.startService()
    assert world.room.usage.total == 1000
    world.blobs.put(content(2), Digest.of(content(2)))
    world.reactor.advance(MAINTENANCE - 1)
    assert world.room.usage.total == 1000
    world.reactor.advance(1)
    assert world.room.usage.total == 2000

    def fail(blobs: Any) -> Any:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(type(world.blobs), "walk", fail)
    world.reactor.advance(MAINTENANCE)  # an error does not end it
    monkeypatch.undo()
    world.blobs.put(content(3), Digest.of(content(3)))
    world.reactor.advance(MAINTENANCE)
    assert world.room.usage.total == 3000
    service.stopService()
