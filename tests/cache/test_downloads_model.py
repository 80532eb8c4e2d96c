"""Random sequences of events for a download: upstream, disk, threads and readers in any order.

A reader must always have a correct part of the blob, and all of it if the reader has ended.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dockerproxy.errors import RegistryError, ServiceOverloaded
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from tests.cache.support.harness import HUB, CacheHarness, ManualReader, do_nothing, ingest_key
from tests.cache.support.upstream import ReceivedRequest, ScriptedResponse, serve_content
from tests.support.examples import examples

pytestmark = pytest.mark.slow  # many examples

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
    st.tuples(st.just("upstream"), st.sampled_from(["honest", "ignore-range", "no-length", "failure", "denial"])),
)


class DownloadModel:
    """Successive downloads of a blob that upstream sends as `data`, after a partial file of `partial_size` bytes."""

    def __init__(self, root: Path, data: bytes, partial_size: int, limit: int) -> None:
        self.limit = limit
        self.harness = CacheHarness(root, limit=limit)
        self.data = data
        self.behaviour = "honest"
        self.full = False
        self.disconnects = 0
        self.expect_success = data == DATA  # whether every reader must succeed
        self.readers: list[ManualReader] = []
        self.closed_readers: set[int] = set()
        self.harness.upstream.repository(f"{HUB}/{NAME}").blobs[str(DIGEST)] = data
        self.harness.upstream.on("GET", "blobs", self.respond)
        if partial_size:
            ingest = Ingest.open(self.harness.layout, ingest_key(DIGEST))
            assert ingest is not None
            ingest.append([data[:partial_size]])
            ingest.release()

    def respond(self, request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        if self.behaviour == "failure":
            return ScriptedResponse(503)
        if self.behaviour == "denial":
            return ScriptedResponse(401)
        if self.behaviour == "ignore-range":
            return ScriptedResponse(200, self.data, sent=0)
        if self.behaviour == "no-length" and request.range is None:
            return ScriptedResponse(200, self.data, length=None, sent=0)
        return serve_content(request, "", self.data, sent=0)

    def do(self, name: str, value: Any) -> None:
        if name == "join":
            self.join(value)
        elif name == "read" and self.readers:
            self.readers[value % len(self.readers)].read(1 + value * 50)
        elif name == "leave" and self.readers:
            number = value % len(self.readers)
            self.closed_readers.add(number)
            self.readers[number].disconnect()
        elif name == "send":
            for response in self.open_responses():
                response.send(value)
        elif name in ("cut", "finish") and self.open_responses():
            response = self.open_responses()[-1]
            response.disconnect() if name == "cut" else response.send_rest()
            self.disconnects += name == "cut"
            self.expect_success &= self.disconnects < 6
        elif name == "upstream":
            self.behaviour = value
            self.expect_success &= value not in ("failure", "denial")
        elif name == "disk":
            self.full = value
        elif name == "hold":
            self.harness.reactor.pool.hold(results=value % 2 == 0)
        elif name == "step":
            self.harness.reactor.pool.step()
        elif name == "release":
            self.harness.reactor.pool.release()
        elif name == "advance":
            self.harness.reactor.advance(value)
        self.harness.reactor.run_due_calls()

    def join(self, start: int) -> None:
        if self.harness.active_download(DIGEST) is None and not self.harness.blobs.exists(DIGEST):
            self.harness.downloads.start(self.harness.principal(), DIGEST, do_nothing)
            self.harness.reactor.run_due_calls()
        download = self.harness.active_download(DIGEST)
        if download is not None and not download.state.is_pending:
            content = download.open_reader(self.harness.repository())
            if content is not None:
                self.readers.append(ManualReader(self.harness, content, min(start, len(self.data))))

    def open_responses(self) -> list[ScriptedResponse]:
        return [response for response in self.harness.upstream.responses if not response.ended]

    def append(self, ingest: Ingest, chunks: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        _append(ingest, chunks)

    def check(self) -> None:
        for number, reader in enumerate(self.readers):
            if number not in self.closed_readers:
                assert reader.data == self.data[reader.start : reader.start + len(reader.data)]
                assert not reader.ended or reader.start + len(reader.data) == len(self.data)
                assert self.data == DATA or reader.start + len(reader.data) < SIZE or reader.start == SIZE
                # A slow reader of a file that the cache has no room for is told to try again.
                is_evicted = isinstance(reader.error, ServiceOverloaded) and self.limit < SIZE
                is_failure = isinstance(reader.error, RegistryError) and not self.expect_success
                assert reader.error is None or is_evicted or is_failure
        if self.harness.blobs.exists(DIGEST):
            assert Path(self.harness.layout.blob(DIGEST)).read_bytes() == DATA

    def finish(self) -> None:
        """Complete all reads without further failures."""
        self.behaviour = "honest"
        self.harness.reactor.pool.release()
        for _ in range(200):
            for response in self.open_responses():
                response.send_rest()
            self.harness.reactor.run_due_calls()
            for number, reader in enumerate(self.readers):
                if number not in self.closed_readers:
                    reader.read_available()
            active = [reader for number, reader in enumerate(self.readers) if number not in self.closed_readers]
            if self.harness.active_download(DIGEST) is None and all(reader.ended or reader.error for reader in active):
                break
            self.harness.reactor.advance(1)


_append = Ingest.append


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(operations, max_size=60),
    wrong=st.booleans(),
    partial_size=st.sampled_from([0, 0, 1, 1000, SIZE]),
    limit=st.sampled_from([1 << 20, SIZE, SIZE - 1, 0]),
)
@example(
    steps=[("hold", 0), ("send", 1), ("join", 0), ("advance", 6.0), ("advance", 6.0)],
    wrong=False, partial_size=1, limit=0,
)  # fmt: skip
def test_readers_get_only_correct_content(
    steps: list[tuple[str, Any]], wrong: bool, partial_size: int, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = DownloadModel(Path(folder), WRONG if wrong else DATA, partial_size, limit)
        with mock.patch.object(Ingest, "append", lambda ingest, chunks: model.append(ingest, chunks)):
            model.do("join", 0)
            for name, value in steps:
                model.do(name, value)
                model.check()
            model.finish()
            model.check()
            for number, reader in enumerate(model.readers):
                if number not in model.closed_readers:
                    assert reader.ended or reader.error is not None  # no reader waits forever
                    reader.disconnect()
            assert model.harness.active_download(DIGEST) is None
            model.harness.assert_no_leaks()
