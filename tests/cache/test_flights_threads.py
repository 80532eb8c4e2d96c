"""The same with a reactor that runs and threads that are threads: what a stand-in cannot show is what they get in each
other's way with."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from dockerproxy.cache import download
from dockerproxy.oci.names import Digest
from tests.cache.stand_ins.upstream import Answer, Asked, Upstream, serve
from tests.cache.stand_ins.world import HUB, World

NAME = "library/app"


class FlightsTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.patch(download, "_PAUSES", (0.001,) * 6)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.chance = random.Random(7)
        self.upstream = Upstream(reactor)
        self.upstream.on("GET", "blobs", self.flow)
        self.blobs: dict[Digest, bytes] = {}
        repository = self.upstream.repository(f"{HUB}/{NAME}")
        for size in (1, 1000, 300_000, 1 << 20, 3_000_000):
            data = self.chance.randbytes(size)
            self.blobs[repository.put_blob(data)] = data

    def flow(self, asked: Asked, data: bytes | None) -> Answer:
        """Send pieces, and break off now and then: after the first, so that a request without a range is a download."""
        assert data is not None
        answer = serve(asked, "", data, sent=0)
        length = len(answer._body)

        def go_on() -> None:
            if answer.over:
                return
            if self.chance.random() < 0.02 and 1000 < len(answer._body) < length:
                answer.cut()
            elif answer._body:
                answer.send(self.chance.choice([1, 1000, 70_000, 300_000]))
                reactor.callLater(0, go_on)
            else:
                answer.finish()

        reactor.callLater(0, go_on)
        return answer

    async def read(self, world: World, digest: Digest, leaves: bool) -> None:
        data, start = self.blobs[digest], 0
        answer = await world.blob(digest)
        assert answer.content is not None
        try:
            if self.chance.random() < 0.5:
                start = self.chance.randrange(len(data))
            got = bytearray()
            while piece := await answer.content.read(start + len(got), self.chance.choice([100_000, 1 << 20])):
                got += piece
                if leaves and len(got) > len(data) // 2:
                    return
                await deferLater(reactor, 0)
            self.assertEqual(bytes(got), data[start:])
        finally:
            answer.content.close()

    async def crowd(self, world: World, readers: int) -> None:
        """Let many read at random moments; some leave, in mid-read or in mid-wait."""
        reading: list[Deferred[Any]] = []
        for number in range(readers):
            digest = self.chance.choice(list(self.blobs))
            deferred = Deferred.fromCoroutine(self.read(world, digest, number % 5 == 0))
            if number % 7 == 0:
                reactor.callLater(self.chance.random() / 50, deferred.cancel)
                deferred.addErrback(lambda _: None)
            reading.append(deferred)
            if self.chance.random() < 0.3:
                await deferLater(reactor, 0.002)
        await gatherResults(reading, consumeErrors=True)
        await deferLater(reactor, 0.02)  # the last of those who leave
        while world.flights._flights:
            await deferLater(reactor, 0.01)
        self.assertEqual(world.room.usage._pins, {})

    async def test_a_crowd(self) -> None:
        world = World(self.folder, upstream=self.upstream)
        await self.crowd(world, 100)
        self.assertEqual(world.open_files, [])
        first = [asked for asked in self.upstream.seen("GET", "blobs") if asked.range is None]
        self.assertEqual(len(first), len({asked.path for asked in first}))  # one download for each
        for digest, data in self.blobs.items():
            if world.blobs.exists(digest):
                self.assertEqual(Path(world.layout.blob(digest)).read_bytes(), data)

    async def test_a_crowd_and_little_room(self) -> None:
        """What is evicted while it is read, joined while it lands, and passed by while there is no room."""
        world = World(self.folder, upstream=self.upstream, limit=3_100_000)
        maintaining = True

        async def maintain() -> None:
            while maintaining:
                await world.room.maintain()
                await deferLater(reactor, 0.005)

        service = Deferred.fromCoroutine(maintain())
        for _ in range(3):
            await self.crowd(world, 40)
        maintaining = False
        await service
        self.assertEqual(world.open_files, [])
        self.assertLessEqual(world.room.usage.total, 3_100_000)
        self.assertLessEqual(sum(entry.size for entry in world.blobs.walk()), 3_100_000)
        self.assertEqual([name for name in os.listdir(world.layout.ingests) if name], [])
        for deferred in reactor.getDelayedCalls():
            deferred.cancel()  # connections that were offered to whoever has no room
