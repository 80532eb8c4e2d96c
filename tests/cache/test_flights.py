"""One download and its readers: how it begins, how it ends, and what everyone gets out of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.flights import Flight
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.origin import Origin, Visitor
from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError, UpstreamFailing, UpstreamRefused
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import read_cached
from dockerproxy.store.ingest import Ingest
from tests.cache.stand_ins.upstream import (
    Answer,
    Gate,
    cut_after,
    fails,
    flowing,
    instead,
    rangeless,
    refusal,
    says,
    untold,
)
from tests.cache.stand_ins.world import HUB, OTHER, Reader, World, nothing

DATA = bytes(range(256)) * 400
NAME = "library/app"


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world()
    world.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    return world


DIGEST = Digest.of(DATA)


def needs_reads_without_a_thread(world: World) -> None:
    """Skip the test where a reader would wait for the very thread that the test holds up."""
    path = Path(world.layout.root, "sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1")
    with path.open("rb") as file:
        if read_cached(file.fileno(), 0, 1) is None:
            pytest.skip("this file system (an overlay, say) cannot tell what is in memory")
    path.unlink()


def start(world: World, digest: Digest = DIGEST, origin: Origin | None = None, landing: Any = None) -> Flight:
    visitor = world.visitor() if origin is None else Visitor(origin, "someone")
    flight = world.flights.start(visitor, digest, landing or nothing)
    world.reactor.settle()
    return flight


def under_way(world: World, *, sent: int = 0) -> tuple[Flight, Answer]:
    """Return a flight whose upstream sends what it is told to."""
    world.upstream.on("GET", str(DIGEST), flowing, times=1)
    flight = start(world)
    answer = world.upstream.answers[-1]
    if sent:
        send(world, answer, sent)
    return flight, answer


def send(world: World, answer: Answer, size: int | None = None) -> None:
    answer.send(size)
    world.reactor.settle()


def end(world: World, answer: Answer) -> None:
    answer.end()
    world.reactor.settle()


def reader(world: World, flight: Flight, start: int = 0, origin: Origin | None = None) -> Reader:
    content = flight.content(origin or world.origin())
    assert content is not None
    return Reader(world, content, start)


def ready(flight: Flight) -> list[Any]:
    """Return what waiting for the flight to begin brings: nothing yet, None or the error."""
    outcome: list[Any] = []
    Deferred.fromCoroutine(flight.ready()).addBoth(lambda result: outcome.append(getattr(result, "value", result)))
    return outcome


# all is well


def test_it_lands(world: World) -> None:
    flight, answer = under_way(world)
    one = reader(world, flight)
    one.read()
    assert one.waiting is not None
    send(world, answer, 1000)
    assert one.data == DATA[:1000]
    end(world, answer)
    one.read_on()
    assert (one.data, one.ended, one.error) == (DATA, True, None)
    one.leave()
    assert flight.landed and flight.ended and flight.size == len(DATA)
    assert Path(world.layout.blob(DIGEST)).read_bytes() == DATA
    assert world.ingests == []
    assert world.flights.get(DIGEST) is None
    assert world.room.usage.total == len(DATA)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", [0, 1, 2, 100_000])
def test_any_size(world: World, algorithm: str, size: int) -> None:
    data = DATA[:size]
    digest = world.upstream.repository(f"{HUB}/{NAME}").put_blob(data, algorithm)
    world.reactor.pool.hold()
    flight = start(world, digest)
    readers = []
    while world.reactor.pool.step():
        world.reactor.settle()
        if flight.opened and not readers:
            readers.append(reader(world, flight))
            readers[0].read()
    world.reactor.pool.release()
    readers[0].read_on()
    assert (readers[0].data, readers[0].ended) == (data, True)
    readers[0].leave()
    assert world.blobs.size(digest) == size


def test_readers_at_their_own_place_and_pace(world: World) -> None:
    flight, answer = under_way(world, sent=20_000)
    fast, slow, behind, beyond = (reader(world, flight, start) for start in (0, 0, 15_000, 60_000))
    fast.read_on()
    slow.read(100)
    behind.read_on(3)
    beyond.read()
    assert fast.data == DATA[:20_000]
    assert slow.data == DATA[:100]
    assert behind.data == DATA[15_000:20_000]
    assert beyond.waiting is not None
    end(world, answer)
    for one in (fast, slow, behind, beyond):
        one.read_on(7000)
        assert one.ended
        assert one.data == DATA[one.start :]
        one.leave()
    assert len(world.upstream.asked) == 1


def test_the_last_byte_waits_for_the_renaming(world: World) -> None:
    needs_reads_without_a_thread(world)
    flight, answer = under_way(world)
    one = reader(world, flight)
    world.reactor.pool.hold()
    end(world, answer)
    world.reactor.pool.step()
    one.read_on()
    assert one.data == DATA[:-1] and one.waiting is not None
    assert not world.blobs.exists(DIGEST)
    world.reactor.pool.release()
    assert one.data == DATA
    one.leave()


def test_the_last_byte_waits_for_the_landing(world: World) -> None:
    """Who has all of it and asks again at once must find it."""
    done: Deferred[None] = Deferred()

    async def landing() -> None:
        await done

    world.upstream.on("GET", "", flowing)
    flight = start(world, landing=landing)
    one = reader(world, flight)
    end(world, world.upstream.answers[0])
    one.read_on()
    one.read()
    assert one.data == DATA[:-1]
    assert not world.blobs.exists(DIGEST)
    done.callback(None)
    world.reactor.settle()
    assert one.data == DATA and world.blobs.exists(DIGEST)
    one.leave()


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_noted_while_the_disk_takes_it(world: World, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Who finds it published, in another process, is to find as well whose it is."""
    needs_reads_without_a_thread(world)
    steps: list[str] = []
    done: Deferred[None] = Deferred()
    publish = Ingest.publish

    def published(ingest: Ingest, blobs: Any) -> None:
        steps.append("published")
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(ingest, blobs)

    async def landing() -> None:
        steps.append("landing")
        await done
        steps.append("landed")

    monkeypatch.setattr(Ingest, "publish", published)
    world.upstream.on("GET", "", flowing)
    flight = start(world, landing=landing)
    world.reactor.pool.hold()
    end(world, world.upstream.answers[0])
    world.reactor.pool.step()  # the last of it is written
    world.reactor.settle()
    assert steps == ["landing"]
    world.reactor.pool.step()  # and synced
    world.reactor.settle()
    assert world.reactor.pool.waiting == 0
    done.callback(None)
    world.reactor.pool.release()
    world.reactor.settle()
    assert (steps, flight.ended, flight.landed) == (["landing", "landed", "published"], True, not fails)


def test_what_is_not_noted_lands_all_the_same(world: World, logged: list[str]) -> None:
    async def landing() -> None:
        raise ValueError("a mistake of ours")

    flight = start(world, landing=landing)
    assert flight.landed and flight.failure is None
    assert any("the landing of" in line and "failed" in line for line in logged)


def test_a_length_that_is_not_told(world: World) -> None:
    world.upstream.on("GET", "", lambda asked, data: Answer(200, DATA, length=None, sent=100))
    flight = start(world)
    assert flight.size is None
    measured = Deferred.fromCoroutine(flight.measured())
    one = reader(world, flight)
    one.read_on()
    assert one.content.size is None
    assert not measured.called
    end(world, world.upstream.answers[0])
    one.read_on()
    assert one.data == DATA
    assert one.content.size == flight.size == len(DATA)
    assert measured.called
    one.leave()


@pytest.mark.parametrize("first", [True, False])
def test_who_leaves_harms_nobody(world: World, first: bool) -> None:
    flight, answer = under_way(world, sent=1000)
    one, other = reader(world, flight), reader(world, flight)
    one.read_on()
    other.read_on()
    leaving, staying = (one, other) if first else (other, one)
    leaving.read()
    leaving.leave()
    leaving.content.close()
    end(world, answer)
    staying.read_on()
    assert staying.data == DATA
    staying.leave()


def test_when_all_have_left_it_goes_on(world: World) -> None:
    flight, answer = under_way(world, sent=1000)
    one = reader(world, flight)
    one.read()
    one.leave()
    end(world, answer)
    assert world.blobs.exists(DIGEST)


def test_who_leaves_before_it_begins(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "", gate.then(flowing))
    flight = start(world)
    waiting = Deferred.fromCoroutine(flight.ready())
    waiting.addErrback(lambda _: None)
    waiting.cancel()
    gate.open()
    end(world, world.upstream.answers[0])
    assert world.blobs.exists(DIGEST)


def test_who_leaves_while_a_thread_reads_for_him(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.cache.reading.read_cached", lambda fd, offset, size: None)
    flight, answer = under_way(world, sent=1000)
    one, other = reader(world, flight), reader(world, flight)
    world.reactor.pool.hold()
    one.read()
    other.read()
    assert world.reactor.pool.waiting == 2
    one.leave()
    world.reactor.pool.release()
    assert other.data == DATA[:1000]
    other.leave()
    end(world, answer)


# it joins and ends at once


def test_joining_at_any_moment_of_its_end(world: World) -> None:
    """While a thread closes the ingest, whoever comes must get the blob's bytes, and not those of another file."""
    needs_reads_without_a_thread(world)
    flight, answer = under_way(world, sent=1000)
    world.reactor.pool.hold(results=True)
    answer.end()
    world.reactor.settle()
    readers = []
    while not flight.ended:
        readers.append(reader(world, flight))  # the thread's work is done, nobody was told
        world.reactor.pool.step()
        world.reactor.settle()
    assert flight.content(world.origin()) is None
    assert len(readers) == 3  # while it was written, synced and renamed
    for one in readers:
        one.read_on()
        assert one.data == DATA
        one.leave()


def test_ready_on_one_that_has_begun_and_one_that_has_ended(world: World) -> None:
    flight, answer = under_way(world)
    assert ready(flight) == [None]
    end(world, answer)
    assert ready(flight) == [None]


def test_for_whom_it_is(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "", gate.then(flowing))
    flight = start(world)
    world.reactor.advance(1000)
    assert flight.is_for(world.visitor(), 300)  # upstream has not answered yet
    gate.open()
    assert flight.is_for(world.visitor(), 300)
    assert not flight.is_for(world.visitor(who="Basic someone"), 300)
    assert not flight.is_for(world.visitor("library/other"), 300)
    world.reactor.advance(299)
    assert flight.is_for(world.visitor(), 300)
    world.reactor.advance(1)
    assert not flight.is_for(world.visitor(), 300)
    end(world, world.upstream.answers[0])


# upstream's trouble


def test_cut_and_resumed(world: World) -> None:
    world.upstream.on("GET", "", cut_after(3000), times=1)
    world.upstream.on("GET", "", cut_after(5000), times=1)
    world.upstream.on("GET", "", rangeless)
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert [asked.range for asked in world.upstream.seen("GET", "blobs")] == [None, "bytes=2999-", "bytes=7998-"]
    assert world.blobs.exists(DIGEST)


def test_gives_up_and_says_so_to_all(world: World, logged: list[str]) -> None:
    flight, answer = under_way(world, sent=3000)
    readers = [reader(world, flight, start) for start in (0, 2000, 50_000)]
    for one in readers:
        one.read_on()
        one.read()
    late = Deferred.fromCoroutine(readers[0].content.settled())
    world.upstream.vanish()
    answer.cut()
    world.advance(20)
    for one in readers:
        assert isinstance(one.error, UpstreamError)
        assert one.start + len(one.data) < len(DATA) - 1 or not one.data
        one.leave()
    late.addErrback(lambda failure: failure.trap(UpstreamError))
    assert late.called
    assert any("was not cached" in line and "connection refused" in line for line in logged)
    assert world.flights.get(DIGEST) is None
    assert not world.blobs.exists(DIGEST)


def test_what_was_fetched_is_left_for_the_next_try(world: World) -> None:
    world.upstream.on("GET", "", cut_after(3000), times=1)
    world.upstream.on("GET", "", fails(UpstreamBroken("cut")), times=6)
    with pytest.raises(UpstreamBroken):
        world.fetch(DIGEST)
    assert len(world.ingests) == 1
    world.upstream.forget()
    assert world.fetch(DIGEST)[1] == DATA
    assert [asked.range for asked in world.upstream.seen("GET", "blobs")] == ["bytes=2999-"]
    assert world.ingests == []


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"!", b"!" + DATA[1:]])
def test_wrong_content_is_completed_to_nobody(world: World, wrong: bytes) -> None:
    world.upstream.on("GET", "", lambda asked, data: Answer(200, wrong, sent=0))
    flight = start(world)
    landings: list[int] = []
    readers = [reader(world, flight, start) for start in (0, 0, 70_000)]
    answer = world.upstream.answers[0]
    send(world, answer, 5000)
    readers[0].read_on()
    end(world, answer)
    for one in readers:
        one.read_on()
        assert isinstance(one.error, UpstreamBroken)
        assert one.data == wrong[one.start : -1]
        one.leave()
    assert not world.blobs.exists(DIGEST)
    assert world.ingests == landings == []
    world.upstream.behave()
    assert world.fetch(DIGEST)[1] == DATA


def test_wrong_content_of_untold_length(world: World) -> None:
    world.upstream.on("GET", "", lambda asked, data: Answer(200, DATA + b"more", length=None))
    with pytest.raises(UpstreamBroken):
        world.fetch(DIGEST)
    assert not world.blobs.exists(DIGEST)


def test_a_web_page_is_no_blob(world: World) -> None:
    world.upstream.on("GET", "", instead(b"<h1>Sign in</h1>", content_type="text/html"))
    with pytest.raises(UpstreamBroken):
        world.fetch(DIGEST)
    assert world.ingests == []


def test_a_small_blob_settles_before_it_is_given(world: World) -> None:
    flight, answer = under_way(world)
    one = reader(world, flight)
    settled = Deferred.fromCoroutine(one.content.settled())
    assert not settled.called
    end(world, answer)
    assert settled.called
    one.leave()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_at_the_start(world: World, status: int) -> None:
    world.upstream.on("GET", "", says(status))
    flight = start(world)
    [error] = ready(flight)
    assert isinstance(error, UpstreamRefused) and error.status == status
    assert world.flights.get(DIGEST) is None
    assert world.room.usage.total == 0


@pytest.mark.parametrize(("status", "told"), [(429, 429), (500, 502), (503, 502)])
def test_failing_at_the_start(world: World, status: int, told: int) -> None:
    world.upstream.on("GET", "", says(status, retry_after="9"))
    flight = start(world)
    [error] = ready(flight)
    assert isinstance(error, UpstreamFailing) and error.status == told
    assert ("retry-after", "9") in error.headers


def test_waiters_hear_of_a_refusal(world: World) -> None:
    gate = Gate()
    world.upstream.on("GET", "", gate.then(says(401)))
    flight = start(world)
    waiting = [ready(flight) for _ in range(3)]
    assert waiting == [[], [], []]
    gate.open()
    world.reactor.settle()
    assert all(isinstance(outcome[0], UpstreamRefused) for outcome in waiting)


# what an earlier run left


def leave_behind(world: World, data: bytes, digest: Digest = DIGEST) -> None:
    ingest = Ingest.open(world.layout, digest)
    assert ingest is not None
    ingest.append([data])
    ingest.release()


@pytest.mark.parametrize("size", [1, 5000, len(DATA) - 1])
def test_a_beginning_is_taken_up(world: World, size: int) -> None:
    leave_behind(world, DATA[:size])
    assert world.fetch(DIGEST)[1] == DATA
    assert [asked.range for asked in world.upstream.seen("GET", "blobs")] == [f"bytes={size - 1}-"]
    assert world.blobs.exists(DIGEST)


def test_all_of_it_was_there(world: World) -> None:
    """A crash between the last byte and the renaming; upstream says 416 to a Range behind the end."""
    leave_behind(world, DATA)
    assert world.fetch(DIGEST)[1] == DATA
    assert [answer.status for answer in world.upstream.answers if answer.read] == [206]
    assert world.upstream.answers[-1].read == 1
    assert world.blobs.exists(DIGEST) and world.ingests == []


def test_all_of_it_was_there_and_upstream_knows_no_ranges(world: World) -> None:
    leave_behind(world, DATA)
    world.upstream.on("GET", "", rangeless)
    assert world.fetch(DIGEST)[1] == DATA


def test_all_of_it_is_there_but_upstream_refuses(world: World) -> None:
    """To have the bytes is no right to give them."""
    leave_behind(world, DATA)
    world.upstream.on("GET", "", says(401))
    with pytest.raises(UpstreamRefused):
        world.fetch(DIGEST)
    assert not world.blobs.exists(DIGEST)
    world.upstream.behave()
    assert world.fetch(DIGEST)[1] == DATA


@pytest.mark.parametrize(
    "left", [DATA + b"more", DATA + bytes(100_000), DATA[:-1] + b"!"], ids=["longer", "much longer", "damaged"]
)
@pytest.mark.parametrize("behaviour", [None, rangeless, untold], ids=["ranges", "no ranges", "untold"])
def test_what_is_no_beginning_is_dropped_at_once(world: World, left: bytes, behaviour: Any) -> None:
    leave_behind(world, left)
    if behaviour is not None:
        world.upstream.on("GET", "", behaviour)
    if behaviour is untold and len(left) == len(DATA):
        with pytest.raises(UpstreamBroken):  # only at the end can it be known
            world.fetch(DIGEST)
    assert world.fetch(DIGEST)[1] == DATA
    assert world.ingests == []


def test_a_damaged_beginning_fails_once(world: World) -> None:
    leave_behind(world, b"!" + DATA[1:5000])
    with pytest.raises(UpstreamBroken):
        world.fetch(DIGEST)
    assert world.ingests == []
    assert world.fetch(DIGEST)[1] == DATA


def test_what_is_left_is_not_read_out_before_upstream_says_yes(world: World) -> None:
    leave_behind(world, DATA[:5000])
    gate = Gate()
    world.upstream.on("GET", "", gate.then(says(404)))
    flight = start(world)
    assert flight.readable == 4999
    assert ready(flight) == []
    gate.open()
    world.reactor.settle()
    assert flight.content(world.origin()) is None


# the disk's trouble


class FullDisk:
    """Takes `room` bytes more, for all ingests together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, number: int = errno.ENOSPC) -> None:
        self.room = room
        append = Ingest.append

        def full(ingest: Ingest, chunks: Any) -> None:
            size = sum(map(len, chunks))
            if size > self.room:
                raise OSError(number, os.strerror(number))
            self.room -= size
            append(ingest, chunks)

        monkeypatch.setattr(Ingest, "append", full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch, number: int, logged: list[str]) -> None:
    FullDisk(monkeypatch, 10_000, number)
    world.upstream.on("GET", "", flowing, times=1)
    flight = start(world)
    answer = world.upstream.answers[0]
    one, other, behind, beyond = (reader(world, flight, start) for start in (0, 0, 9_000, 70_000))
    send(world, answer, 9_900)
    one.read_on()
    other.read(100)
    send(world, answer, 5_000)  # this does not fit any more
    assert flight.ended
    end(world, answer)
    for reading in (one, other, behind, beyond):
        reading.read_on(3000)
        assert reading.error is None
        assert reading.data == DATA[reading.start :]
        reading.leave()
    # The first one had the connection that was open; each of the others goes on from where the file ends.
    assert [asked.range for asked in world.upstream.seen("GET", "blobs")] == [None] + ["bytes=9899-"] * 3
    assert not world.blobs.exists(DIGEST)
    assert world.ingests == []  # and what the disk is full of is gone
    assert any("was not cached" in line and os.strerror(number) in line for line in logged)


@pytest.mark.parametrize("length", [len(DATA), None])
def test_a_full_disk_and_wrong_content(world: World, monkeypatch: pytest.MonkeyPatch, length: int | None) -> None:
    FullDisk(monkeypatch, 10_000)
    wrong = DATA[:-1] + b"!"

    def behave(asked: Any, data: Any) -> Answer:
        if asked.range is None:
            return Answer(200, wrong, length=length, sent=9000)
        return Answer(206, wrong[8999:], {"content-range": f"bytes 8999-{len(DATA) - 1}/{len(DATA)}"}, length=length)

    world.upstream.on("GET", "", behave)
    flight = start(world)
    readers = [reader(world, flight, start) for start in (0, 95_000)]
    end(world, world.upstream.answers[0])
    for one in readers:
        one.read_on()
        assert isinstance(one.error, UpstreamBroken)
        assert one.data == wrong[one.start : -1]
        one.leave()


def test_the_last_byte_is_held_back_there_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 10_000)
    flight, answer = under_way(world, sent=9000)
    one = reader(world, flight)
    send(world, answer, 5000)
    one.read_on()
    assert one.data == DATA[:13_999]
    send(world, answer, len(DATA) - 14_000 - 1)
    one.read_on()
    one.read()
    assert one.data == DATA[:-2]
    end(world, answer)
    one.read_on()
    assert one.data == DATA and one.ended
    one.leave()


def test_a_full_disk_and_an_upstream_that_breaks_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 10_000)
    world.upstream.on("GET", "", cut_after(20_000), times=1)
    world.upstream.on("GET", "", cut_after(20_000), times=1)
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert not world.blobs.exists(DIGEST)


def test_the_reader_of_a_full_disk_leaves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 0)
    flight, answer = under_way(world)
    one = reader(world, flight)
    send(world, answer, 5000)
    one.read_on()
    one.read()
    one.leave()
    assert answer.aborted


def test_nobody_takes_the_open_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 0)
    flight, answer = under_way(world)
    one = reader(world, flight)
    send(world, answer, 5000)
    world.advance(4.5)
    assert not answer.over
    world.advance(1)
    assert answer.aborted
    one.read_on()  # late, but not too late
    assert one.data == DATA
    assert len(world.upstream.seen("GET", "blobs")) == 2
    one.leave()


def test_no_ingest_can_be_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ingests: Ingests, digest: Digest) -> Ingest | None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Ingests, "enter", refuse)
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert len(world.upstream.seen("GET", "blobs")) == 1
    assert not world.blobs.exists(DIGEST)


def test_what_is_left_cannot_be_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_behind(world, DATA[:5000])

    def fail(ingest: Ingest) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Ingest, "rehash", fail)
    assert world.fetch(DIGEST)[1] == DATA


def test_a_blob_that_cannot_be_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingest: Ingest, blobs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Ingest, "publish", fail)
    for untold_length in (False, True):
        if untold_length:
            world.upstream.on("GET", "", untold)
        flight = start(world)
        one = reader(world, flight) if not flight.ended else None
        assert one is None
        assert world.fetch(DIGEST) == ("MISS", DATA)
    assert not world.blobs.exists(DIGEST)
    assert world.ingests == []


def test_much_is_synced_while_more_comes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is published before that has ended, for it may bring an error."""
    monkeypatch.setattr("dockerproxy.cache.syncing._AT_ONCE", 5000)
    flight, answer = under_way(world, sent=4999)
    world.reactor.pool.hold()
    send(world, answer, 1)
    world.reactor.pool.step()  # it is written
    world.reactor.settle()
    assert world.reactor.pool.waiting == 1  # and to be synced
    answer.end()
    world.reactor.settle()
    assert world.reactor.pool.waiting == 2
    world.reactor.pool.put_off()  # the sync
    world.reactor.pool.step()
    world.reactor.settle()
    assert flight.written == len(DATA) and world.reactor.pool.waiting == 1  # nothing but the sync
    world.reactor.pool.release()
    world.reactor.settle()
    assert flight.landed


def test_what_could_not_be_synced_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    """The kernel reports that once: to sync again would seem to succeed."""
    monkeypatch.setattr("dockerproxy.cache.syncing._AT_ONCE", 5000)
    errors = [OSError(errno.EIO, "Input/output error")]

    def fail(fd: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(os, "fdatasync", fail)
    flight, answer = under_way(world, sent=5000)
    one = reader(world, flight)
    end(world, answer)
    one.read_on()
    assert one.data == DATA and one.ended
    assert not errors and not world.blobs.exists(DIGEST)
    assert any("cannot be kept: Input/output error" in line for line in logged)
    one.leave()


def test_a_reader_of_a_blob_that_cannot_be_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingest: Ingest, blobs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Ingest, "publish", fail)
    flight, answer = under_way(world, sent=3000)
    one, late = reader(world, flight), reader(world, flight)
    one.read_on()
    end(world, answer)
    one.read_on()
    assert one.data == DATA and one.ended
    world.advance(10)
    late.read_on()
    assert late.data == DATA and late.ended
    assert len(world.upstream.seen("GET", "blobs")) == 1  # all was here: there is nothing to go on with
    one.leave()
    late.leave()


def test_what_was_received_is_cut_off(world: World) -> None:
    """By another's hand. A shorter file must not look like the blob's end."""
    flight, answer = under_way(world, sent=5000)
    one = reader(world, flight)
    os.truncate(world.layout.ingest(DIGEST), 0)
    one.read()
    assert isinstance(one.error, UpstreamBroken)
    one.leave()
    end(world, answer)


# no room


def test_larger_than_the_cache(make_world: Callable[..., World]) -> None:
    world = make_world(limit=len(DATA) - 1)
    world.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    assert world.fetch(DIGEST) == ("MISS", DATA)
    assert len(world.upstream.seen("GET", "blobs")) == 1
    assert not world.blobs.exists(DIGEST)
    assert world.ingests == []
    assert world.room.usage.total == 0


def test_larger_than_the_cache_and_nobody_could_tell(make_world: Callable[..., World]) -> None:
    """What grows is counted, or one answer without a length fills the disk."""
    world = make_world(limit=50_000)
    world.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    world.upstream.on("GET", "", lambda asked, data: Answer(200, DATA, length=None, sent=30_000), times=1)
    flight = start(world)
    answer = world.upstream.answers[0]
    one = reader(world, flight)
    one.read_on()
    assert world.room.usage.total == 30_000
    send(world, answer, 30_000)
    assert flight.ended
    end(world, answer)
    one.read_on()
    assert one.data == DATA and one.ended
    assert len(world.upstream.seen("GET", "blobs")) == 1
    assert world.room.usage.total == 0
    one.leave()


# credentials


def test_the_first_clients_token_ends(world: World) -> None:
    """The others go on with what they have; who has nothing better hears upstream's own words."""
    flight, answer = under_way(world, sent=3000)
    ended, good = reader(world, flight, 0, world.origin(who="Bearer old")), None
    good = reader(world, flight, 0, world.origin(who="Bearer good"))
    for one in (ended, good):
        one.read_on()
    world.upstream.on(
        "GET", "", lambda asked, data: refusal(401) if asked.who != "Bearer good" else rangeless(asked, data)
    )
    answer.cut()
    world.advance(2)
    good.read_on()
    assert good.data == DATA and good.ended
    ended.read_on()
    assert isinstance(ended.error, UpstreamRefused) and ended.error.status == 401
    assert ended.data == DATA[:3000]
    ended.leave()
    good.leave()


def test_another_registry_has_it_too(world: World) -> None:
    flight, answer = under_way(world)
    one = reader(world, flight, 0, world.origin(registry=OTHER))
    end(world, answer)
    one.read_on()
    assert one.data == DATA
    one.leave()


# our own trouble


def test_a_mistake_of_ours_before_upstream_was_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ingests: Ingests, digest: Digest) -> Ingest | None:
        raise RuntimeError("a mistake in this program")

    monkeypatch.setattr(Ingests, "enter", fail)
    flight = start(world)
    [error] = ready(flight)
    assert type(error) is RegistryError and error.status == 500
    assert "a mistake" not in error.message
    assert world.flights.get(DIGEST) is None


@pytest.mark.parametrize("method", ["append", "verify", "publish"])
def test_a_mistake_of_ours_under_way(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Readers go on by themselves, as with a full disk: the hash is checked, so it is all the same to them."""

    def fail(ingest: Ingest, *args: Any) -> None:
        raise RuntimeError("a mistake in this program")

    world.upstream.on("GET", "", flowing, times=1)
    flight = start(world)
    answer = world.upstream.answers[0]
    send(world, answer, 3000)
    monkeypatch.setattr(Ingest, method, fail)
    one = reader(world, flight)
    end(world, answer)
    one.read_on()
    assert one.data == DATA and one.ended
    one.leave()
    assert world.flights.get(DIGEST) is None


@pytest.mark.parametrize("method", ["release", "exists"])
def test_an_end_that_fails_wakes_all(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    flight, answer = under_way(world, sent=3000)
    one = reader(world, flight)
    one.read_on()
    one.read()
    target: Any = world.room if method == "release" else type(world.blobs)

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    release = world.room.release
    monkeypatch.setattr(target, method, fail)
    end(world, answer)
    one.read_on()
    assert one.data == DATA
    assert world.flights.get(DIGEST) is None
    monkeypatch.undo()
    release(DIGEST)
    one.leave()
