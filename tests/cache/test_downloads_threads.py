"""Downloads with a running reactor and real threads, because the manual reactor cannot show race conditions."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from dockerproxy.cache import resumable
from dockerproxy.cache.open_readers import OpenReaders
from dockerproxy.cache.space import FileCounter
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, CacheHarness
from tests.cache.support.upstream import ReceivedRequest, ScriptedResponse, ScriptedUpstream, serve_content

NAME = "library/app"


def cancel_timers() -> None:
    """Cancel the reports of new files and the checks of open readers, which a daemon drops when it ends."""
    for call in reactor.getDelayedCalls():
        if isinstance(getattr(call.func, "__self__", None), (FileCounter, OpenReaders)):
            call.cancel()


class DownloadsTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.patch(resumable, "_RETRY_DELAYS", (0.001,) * 6)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.addCleanup(cancel_timers)
        self.random = random.Random(7)
        self.upstream = ScriptedUpstream(reactor)
        self.upstream.on("GET", "blobs", self.respond_in_pieces)
        self.blobs: dict[Digest, bytes] = {}
        repository = self.upstream.repository(f"{HUB}/{NAME}")
        for size in (1, 1000, 300_000, 1 << 20, 3_000_000):
            data = self.random.randbytes(size)
            self.blobs[repository.put_blob(data)] = data

    def respond_in_pieces(self, request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        """Send pieces, and sometimes break the connection after the first, so that every retry has a Range."""
        assert data is not None
        response = serve_content(request, "", data, sent=0)
        length = len(response._body)

        def send_next() -> None:
            if response.ended:
                return
            if self.random.random() < 0.02 and 1000 < len(response._body) < length:
                response.disconnect()
            elif response._body:
                response.send(self.random.choice([1, 1000, 70_000, 300_000]))
                reactor.callLater(0, send_next)
            else:
                response.finish()

        reactor.callLater(0, send_next)
        return response

    async def read(self, harness: CacheHarness, digest: Digest, disconnects: bool) -> None:
        data, start = self.blobs[digest], 0
        response = await harness.blob(digest)
        assert response.content is not None
        try:
            if self.random.random() < 0.5:
                start = self.random.randrange(len(data))
            received = bytearray()
            while piece := await response.content.read(start + len(received), self.random.choice([100_000, 1 << 20])):
                received += piece
                if disconnects and len(received) > len(data) // 2:
                    return
                await deferLater(reactor, 0)
            self.assertEqual(bytes(received), data[start:])
        finally:
            response.content.close()

    async def read_concurrently(self, harness: CacheHarness, readers: int) -> None:
        """Run many readers at random times. Some disconnect during a read or while waiting."""
        reading: list[Deferred[Any]] = []
        timers = []
        for number in range(readers):
            digest = self.random.choice(list(self.blobs))
            deferred = Deferred.fromCoroutine(self.read(harness, digest, number % 5 == 0))
            if number % 7 == 0:
                timers.append(reactor.callLater(self.random.random() / 50, deferred.cancel))
                deferred.addErrback(lambda _: None)
            reading.append(deferred)
            if self.random.random() < 0.3:
                await deferLater(reactor, 0.002)
        await gatherResults(reading, consumeErrors=True)
        for timer in timers:
            if timer.active():  # its reader was faster
                timer.cancel()
        # The last readers disconnect a little later, and what their threads still do ends after that.
        while harness.downloads._downloads or harness.space.index._pins or harness.open_files:
            await deferLater(reactor, 0.01)

    async def test_many_readers(self) -> None:
        harness = CacheHarness(self.folder, upstream=self.upstream)
        await self.read_concurrently(harness, 100)
        first = [request for request in self.upstream.requests_matching("GET", "blobs") if request.range is None]
        self.assertEqual(len(first), len({request.path for request in first}))  # one download per blob
        for digest, data in self.blobs.items():
            if harness.blobs.exists(digest):
                self.assertEqual(Path(harness.layout.blob(digest)).read_bytes(), data)

    async def test_many_readers_and_little_space(self) -> None:
        """Blobs are evicted during reads, joined during commits, and read directly while there is no space."""
        harness = CacheHarness(self.folder, upstream=self.upstream, limit=3_100_000)
        maintaining = True

        async def maintain() -> None:
            while maintaining:
                await harness.space.maintain()
                await deferLater(reactor, 0.005)

        service = Deferred.fromCoroutine(maintain())
        for _ in range(3):
            await self.read_concurrently(harness, 40)
        maintaining = False
        await service
        self.assertLessEqual(harness.space.index.total, 3_100_000)
        self.assertLessEqual(sum(entry.size for entry in harness.blobs.walk()), 3_100_000)
        self.assertEqual(harness.ingest_files, [])
        for deferred in reactor.getDelayedCalls():
            deferred.cancel()  # timeouts of lent connections
