"""A blob that two processes want at once: here, two caches on one folder, which know of each other by nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from dockerproxy.cache.flights import Flight, Flights
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.ingests import Announcement
from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.contents import SMALL
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from tests.cache.stand_ins.upstream import Answer, flowing, says
from tests.cache.stand_ins.world import HUB, Reader, World, nothing, result

DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
NAME = "library/app"
ALICE = "Basic alice"


class Two:
    """Two caches, `one` of which fetches the blob; upstream sends what it is told to."""

    def __init__(self, make_world: Callable[..., World]) -> None:
        self.one = make_world(shared=True)
        self.upstream = self.one.upstream
        self.other = make_world(shared=True, upstream=self.upstream)
        self.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
        self.upstream.on("GET", str(DIGEST), flowing, times=1)
        self.flight = self._start(self.one)
        self.answer: Answer = self.upstream.answers[-1]
        self.following = self._start(self.other)
        self.pass_time()

    def _start(self, world: World) -> Flight:
        flight = world.flights.start(world.visitor(), DIGEST, nothing)
        world.reactor.settle()
        return flight

    def pass_time(self, seconds: float = 0.1) -> None:
        self.one.advance(seconds)

    def send(self, size: int) -> None:
        self.answer.send(size)
        self.pass_time()

    def end(self) -> None:
        self.answer.end()
        self.pass_time()

    def reader(self, flight: Flight | None = None) -> Reader:
        content = (flight or self.following).content(self.other.origin())
        assert content is not None
        return Reader(self.other, content)

    def die(self) -> None:
        """Let the process of `one` die: its lock goes, and it does nothing more."""
        ingest = self.flight._file
        assert isinstance(ingest, Ingest)
        fcntl.flock(ingest._fd, fcntl.LOCK_UN)

    @property
    def fetched(self) -> list[str | None]:
        """The ranges that upstream was asked for."""
        return [asked.range for asked in self.upstream.seen("GET", "blobs")]


@pytest.fixture
def two(make_world: Callable[..., World]) -> Two:
    return Two(make_world)


def test_both_read_what_one_fetches(two: Two) -> None:
    reader = two.reader()
    two.send(1000)
    reader.read_on()
    assert reader.data == DATA[:1000]
    assert two.following.size == len(DATA)
    two.end()
    reader.read_on()
    assert (reader.data, reader.ended) == (DATA, True)
    assert two.following.landed and two.following.ended
    assert two.fetched == [None]
    assert two.one.ingests == []
    assert two.one.meeting.announced(DIGEST) is None
    reader.leave()


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_nobody_begins_before_upstream_does_and_ends_before_the_digest_holds(world: World, size: int | None) -> None:
    world.meeting = evolve(world.meeting, shared=True)
    ingest = world.meeting.enter(DIGEST)
    assert isinstance(ingest, Ingest)
    ingest.append([DATA[:10]])
    flights = Flights(world.reactor, world.upstream, world.room, world.meeting)
    flight = flights.start(world.visitor(), DIGEST, nothing)
    world.advance(1)
    assert not flight.opened
    world.meeting.announce(DIGEST, Announcement(size, "library/app", PUBLIC, 0.0))
    world.advance(1)
    assert flight.opened and (flight.size, flight.written) == (size, 10)
    content = flight.content(world.origin())
    assert content is not None
    reader = Reader(world, content)
    ingest.append([DATA[10:]])
    world.advance(1)
    reader.read_on()
    assert reader.data == DATA[:-1]
    ingest.publish(world.blobs)
    world.advance(1)
    reader.read_on()
    assert reader.data == DATA
    assert world.upstream.seen("GET", "blobs") == []
    reader.leave()


@pytest.mark.parametrize("size", [1, SMALL, SMALL + 1])
def test_a_small_one_is_not_announced_and_waited_for(make_world: Callable[..., World], size: int) -> None:
    """Nobody is given any of it before it is whole; then others have it, and know by the first whose it is."""
    one = make_world(shared=True)
    upstream = one.upstream
    other = make_world(shared=True, upstream=upstream)
    digest = upstream.repository(f"{HUB}/{NAME}").put_blob(DATA[:size])
    upstream.on("GET", str(digest), flowing)
    first = one.start(one.fetch_later(digest))
    second = other.start(other.fetch_later(digest))
    one.advance(0.1)
    announced = one.meeting.announced(digest)
    assert announced is None if size <= SMALL else announced.size == size
    upstream.answers[-1].end()
    one.advance(0.1)
    assert result(first, one.reactor) == ("MISS", DATA[:size])
    assert result(second, other.reactor) == ("HIT" if size <= SMALL else "JOINED", DATA[:size])
    assert len(upstream.asked) == 1


def test_who_dies_is_followed_by_the_other(two: Two) -> None:
    reader = two.reader()
    two.send(1000)
    reader.read_on()
    two.die()
    two.pass_time(1)
    reader.read_on()
    assert reader.data == DATA
    assert two.fetched == [None, "bytes=999-"]
    assert Path(two.one.layout.blob(DIGEST)).read_bytes() == DATA
    reader.leave()


def test_who_dies_with_what_is_wrong_completes_nobody(two: Two) -> None:
    reader = two.reader()
    two.send(1000)
    reader.read_on()
    ingest = two.flight._file
    assert isinstance(ingest, Ingest)
    ingest.append([b"wrong" * 10_000])
    two.pass_time()
    reader.read_on()
    two.die()
    two.pass_time(1)
    reader.read_on()
    assert isinstance(reader.error, UpstreamBroken)
    assert 51_000 <= len(reader.data) < len(DATA)
    assert two.fetched == [None, "bytes=50999-"]
    assert not two.one.blobs.exists(DIGEST)
    reader.leave()


def test_what_turns_out_wrong_completes_nobody(make_world: Callable[..., World]) -> None:
    two = Two(make_world)
    reader = two.reader()
    two.answer._body = b"x" * len(DATA)
    two.end()
    reader.read_on()
    assert isinstance(reader.error, UpstreamBroken)
    assert len(reader.data) < len(DATA)
    assert not two.one.blobs.exists(DIGEST)
    reader.leave()


def test_a_full_disk_strands_both(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ingest: Ingest, chunks: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = two.reader()
    two.send(1000)
    reader.read_on()
    monkeypatch.setattr(Ingest, "append", full)
    two.end()
    reader.read_on()
    assert (reader.data, reader.ended) == (DATA, True)  # by itself
    assert two.fetched == [None, "bytes=999-"]
    assert not two.one.blobs.exists(DIGEST)
    reader.leave()


def test_what_is_taken_back_fails_who_has_it(two: Two) -> None:
    reader = two.reader()
    two.send(1000)
    reader.read_on()
    ingest = two.flight._file
    assert isinstance(ingest, Ingest)
    ingest.size = 500
    os.ftruncate(ingest._fd, 500)
    two.pass_time()
    reader.read_on()
    assert isinstance(reader.error, UpstreamBroken)
    assert reader.data == DATA[:1000]
    reader.leave()


def test_it_comes_between_a_look_and_the_lock(make_world: Callable[..., World]) -> None:
    world = make_world(shared=True)
    world.blobs.put(DATA, DIGEST)
    flight = world.flights.start(world.visitor(), DIGEST, nothing)
    world.reactor.settle()
    assert flight.landed and flight.ended
    assert world.upstream.seen("GET", "blobs") == []
    assert world.ingests == []


# clients


def test_it_has_come_before_anyone_here_looks(make_world: Callable[..., World]) -> None:
    """Nothing was ever seen to begin; the client is answered all the same, by what is here now."""
    world = make_world(shared=True)
    world.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    ingest = world.meeting.enter(DIGEST)
    assert isinstance(ingest, Ingest)
    results: list[Any] = []
    world.start(world.fetch_later(DIGEST)).addBoth(results.append)
    ingest.append([DATA])
    ingest.publish(world.blobs)
    world.advance(1)
    assert results == [("REVALIDATED", DATA)]
    assert world.upstream.seen("GET", "blobs") == []


def test_it_is_given_up_before_anyone_here_looks(make_world: Callable[..., World]) -> None:
    world = make_world(shared=True)
    world.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    ingest = world.meeting.enter(DIGEST)
    assert isinstance(ingest, Ingest)
    ingest.append([b"something else"])
    results: list[Any] = []
    world.start(world.fetch_later(DIGEST)).addBoth(results.append)
    world.advance(1)
    assert results == []
    ingest.discard()
    world.advance(1)
    assert results == [("MISS", DATA)]
    assert [asked.range for asked in world.upstream.seen("GET", "blobs")] == [None]


def test_a_client_of_each(two: Two) -> None:
    """The one for whom it is fetched needs no further word of upstream's, wherever it asks."""
    answers = [two.one.start(world.fetch_later(DIGEST)) for world in (two.one, two.other, two.other)]
    two.pass_time()
    two.end()
    results: list[Any] = []
    for answer in answers:
        answer.addBoth(results.append)
    assert results == [("JOINED", DATA)] * 3
    assert two.fetched == [None]
    assert two.upstream.seen("HEAD", "blobs") == []


def test_a_client_of_the_other_process_that_upstream_refuses(two: Two) -> None:
    two.upstream.on("HEAD", str(DIGEST), says(403), times=1)
    results: list[Any] = []
    two.other.start(two.other.fetch_later(DIGEST, who=ALICE)).addBoth(results.append)
    two.pass_time()
    assert results and results[0].value.status == 403
    two.end()


def test_a_client_of_the_other_process_that_upstream_lets_in(two: Two) -> None:
    results: list[Any] = []
    two.other.start(two.other.fetch_later(DIGEST, who=ALICE)).addBoth(results.append)
    two.pass_time()
    assert [asked.who for asked in two.upstream.seen("HEAD", "blobs")] == [ALICE]
    two.end()
    assert results == [("JOINED", DATA)]
    assert two.fetched == [None]
