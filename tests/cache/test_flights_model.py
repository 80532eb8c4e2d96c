"""Flights by chance: whatever upstream, disk, threads and readers do, and in whatever order - what a reader has is a
piece of the blob, and who is told that this was all has all of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dockerproxy.errors import RegistryError
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from tests.cache.stand_ins.upstream import Answer, Asked, serve
from tests.cache.stand_ins.world import HUB, Reader, World, nothing

NAME = "library/app"
SIZE = 3000
DATA = bytes(index * 7 % 251 for index in range(SIZE))
DIGEST = Digest.of(DATA)
WRONG = DATA[:1500] + bytes([DATA[1500] ^ 1]) + DATA[1501:]

sizes = st.integers(0, SIZE)
numbers = st.integers(0, 9)
operations = st.one_of(
    st.tuples(st.just("send"), sizes),
    st.tuples(st.just("disk"), st.booleans()),
    st.tuples(st.sampled_from(["cut", "finish", "join", "leave", "read", "hold", "step", "release"]), numbers),
    st.tuples(st.just("join"), sizes),
    st.tuples(st.just("read"), numbers),
    st.tuples(st.just("advance"), st.sampled_from([0.25, 1.0, 6.0])),
    st.tuples(st.just("upstream"), st.sampled_from(["honest", "rangeless", "untold", "failing", "refusing"])),
)


class Play:
    """One flight after the other, of a blob that upstream sends as `data`; `left` lies there from before."""

    def __init__(self, root: Path, data: bytes, left: int, limit: int) -> None:
        self.world = World(root, limit=limit)
        self.data = data
        self.mood = "honest"
        self.full = False
        self.cuts = 0
        self.good = data == DATA  # whether all that is asked for can be had
        self.readers: list[Reader] = []
        self.gone: set[int] = set()
        self.world.upstream.repository(f"{HUB}/{NAME}").blobs[str(DIGEST)] = data
        self.world.upstream.on("GET", "blobs", self.answer)
        if left:
            ingest = Ingest.open(self.world.layout, DIGEST)
            assert ingest is not None
            ingest.append([data[:left]])
            ingest.release()

    def answer(self, asked: Asked, data: bytes | None) -> Answer:
        if self.mood == "failing":
            return Answer(503)
        if self.mood == "refusing":
            return Answer(401)
        if self.mood == "rangeless":
            return Answer(200, self.data, sent=0)
        if self.mood == "untold" and asked.range is None:
            return Answer(200, self.data, length=None, sent=0)
        return serve(asked, "", self.data, sent=0)

    def do(self, name: str, value: Any) -> None:
        if name == "join":
            self.join(value)
        elif name == "read" and self.readers:
            self.readers[value % len(self.readers)].read(1 + value * 50)
        elif name == "leave" and self.readers:
            number = value % len(self.readers)
            self.gone.add(number)
            self.readers[number].leave()
        elif name == "send":
            for answer in self.open_answers():
                answer.send(value)
        elif name in ("cut", "finish") and self.open_answers():
            answer = self.open_answers()[-1]
            answer.cut() if name == "cut" else answer.end()
            self.cuts += name == "cut"
            self.good &= self.cuts < 6
        elif name == "upstream":
            self.mood = value
            self.good &= value not in ("failing", "refusing")
        elif name == "disk":
            self.full = value
        elif name == "hold":
            self.world.reactor.pool.hold(results=value % 2 == 0)
        elif name == "step":
            self.world.reactor.pool.step()
        elif name == "release":
            self.world.reactor.pool.release()
        elif name == "advance":
            self.world.reactor.advance(value)
        self.world.reactor.settle()

    def join(self, start: int) -> None:
        if self.world.flights.get(DIGEST) is None and not self.world.blobs.exists(DIGEST):
            self.world.flights.start(self.world.visitor(), DIGEST, nothing)
            self.world.reactor.settle()
        flight = self.world.flights.get(DIGEST)
        if flight is not None and flight.opened:
            content = flight.content(self.world.origin())
            if content is not None:
                self.readers.append(Reader(self.world, content, min(start, len(self.data))))

    def open_answers(self) -> list[Answer]:
        return [answer for answer in self.world.upstream.answers if not answer.over]

    def append(self, ingest: Ingest, chunks: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        _append(ingest, chunks)

    def check(self) -> None:
        for number, reader in enumerate(self.readers):
            if number not in self.gone:
                assert reader.data == self.data[reader.start : reader.start + len(reader.data)]
                assert not reader.ended or reader.start + len(reader.data) == len(self.data)
                assert self.data == DATA or reader.start + len(reader.data) < SIZE or reader.start == SIZE
                assert reader.error is None or (isinstance(reader.error, RegistryError) and not self.good)
        if self.world.blobs.exists(DIGEST):
            assert Path(self.world.layout.blob(DIGEST)).read_bytes() == DATA

    def finish(self) -> None:
        """Let everything go well from here on."""
        self.mood = "honest"
        self.world.reactor.pool.release()
        for _ in range(200):
            for answer in self.open_answers():
                answer.end()
            self.world.reactor.settle()
            for number, reader in enumerate(self.readers):
                if number not in self.gone:
                    reader.read_on()
            active = [reader for number, reader in enumerate(self.readers) if number not in self.gone]
            if self.world.flights.get(DIGEST) is None and all(reader.ended or reader.error for reader in active):
                break
            self.world.reactor.advance(1)


_append = Ingest.append


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(operations, max_size=60),
    wrong=st.booleans(),
    left=st.sampled_from([0, 0, 1, 1000, SIZE]),
    limit=st.sampled_from([1 << 20, SIZE, SIZE - 1, 0]),
)
def test_no_reader_is_ever_deceived(steps: list[tuple[str, Any]], wrong: bool, left: int, limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        play = Play(Path(folder), WRONG if wrong else DATA, left, limit)
        with mock.patch.object(Ingest, "append", lambda ingest, chunks: play.append(ingest, chunks)):
            play.do("join", 0)
            for name, value in steps:
                play.do(name, value)
                play.check()
            play.finish()
            play.check()
            for number, reader in enumerate(play.readers):
                if number not in play.gone:
                    assert reader.ended or reader.error is not None  # nobody is left hanging
                    reader.leave()
            assert play.world.flights.get(DIGEST) is None
            play.world.check_ends()
