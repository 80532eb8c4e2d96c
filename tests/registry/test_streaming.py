"""Streaming to clients that are fast, slow or stalled, or that disconnect."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.registry.streaming import WHOLE_OF_UNKNOWN_SIZE, ChunkSizer, stream_content

MIN_CHUNK, INITIAL_CHUNK, MAX_CHUNK = 16 * 1024, 128 * 1024, 1024 * 1024
DATA = bytes(range(256)) * 4096  # 1 MiB


@given(st.lists(st.floats(min_value=0, max_value=1e6)))
def test_chunk_size_stays_within_bounds(durations: list[float]) -> None:
    sizer = ChunkSizer()
    for seconds in durations:
        before = sizer.size
        sizer.record(before, seconds)
        assert MIN_CHUNK <= sizer.size <= MAX_CHUNK
        if seconds < 0.02:
            assert sizer.size >= before
        elif seconds > 0.2:
            assert sizer.size <= before
        else:
            assert sizer.size == before


def test_chunk_size_reaches_both_bounds() -> None:
    sizer = ChunkSizer()
    for _ in range(10):
        sizer.record(sizer.size, 0)
    assert sizer.size == MAX_CHUNK
    for _ in range(10):
        sizer.record(sizer.size, 1)
    assert sizer.size == MIN_CHUNK


def test_chunk_size_is_at_most_twice_what_was_written() -> None:
    sizer = ChunkSizer()
    for _ in range(10):
        sizer.record(min(sizer.size, 100_000), 0)
    assert sizer.size == 200_000


class StreamingClient:
    """A client of a server that responds with `stream_content`."""

    def __init__(
        self, connect_client: Any, content: Any, start: int = 0, stop: int | None = None, **options: Any
    ) -> None:
        self.clock = Clock()
        self.outcomes: list[BaseException | None] = []
        length = options.pop("length", None if stop is None else stop - start)

        async def handle(request: Request) -> None:
            request.start(200, [], length)
            try:
                whole = WHOLE_OF_UNKNOWN_SIZE if stop is None else ByteRange(start, stop)
                await stream_content(request, content, [whole], self.clock)
            except BaseException as error:
                self.outcomes.append(error)
                raise
            self.outcomes.append(None)

        self.client = connect_client(handle, clock=self.clock, **options)

    def get(self, version: str = "1.1") -> Any:
        return self.client.fetch("GET", "/", version=version)


def test_whole_content(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    response = StreamingClient(connect_client, content, 0, len(DATA)).get()
    assert (response.body, response.complete) == (DATA, True)
    assert response.headers["Content-Length"] == str(len(DATA))


def test_partial_content_reads_nothing_else(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    assert StreamingClient(connect_client, content, 1000, 500_000).get().body == DATA[1000:500_000]
    assert content.reads[0][0] == 1000
    assert max(offset + size for offset, size in content.reads) == 500_000


def test_chunks_are_never_larger_than_the_chunk_size(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA * 2)
    StreamingClient(connect_client, content, 0, len(DATA) * 2).get()
    assert max(size for _, size in content.reads) == MAX_CHUNK
    assert content.reads[0][1] == INITIAL_CHUNK


@pytest.mark.parametrize("chunk_size", [1, 4096, 100_000])
def test_content_in_small_chunks(connect_client: Any, fake_content: Any, chunk_size: int) -> None:
    data = DATA[: 20 * chunk_size]
    assert StreamingClient(connect_client, fake_content(data, chunk_size=chunk_size), 0, len(data)).get().body == data


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_a_content_of_unknown_length(connect_client: Any, fake_content: Any, data: bytes) -> None:
    response = StreamingClient(connect_client, fake_content(data, size=None)).get()
    assert (response.body, response.complete) == (data, True)
    assert response.headers["Transfer-Encoding"] == "chunked"
    response = StreamingClient(connect_client, fake_content(data, size=None)).get("1.0")
    assert (response.body, response.complete) == (data, True)
    assert "Transfer-Encoding" not in response.headers


def test_a_stalled_client_stops_the_reading(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    streaming = StreamingClient(connect_client, content, 0, len(DATA))
    streaming.client.transport.window = 1000
    streaming.client.send_request("GET", "/")
    streaming.client.advance(1)
    assert len(content.reads) == 1  # only one chunk waits in memory
    assert streaming.outcomes == []
    streaming.client.extend_window(math.inf)
    assert streaming.client.read_response().body == DATA
    assert streaming.outcomes == [None]


def test_slow_client_gets_smaller_chunks(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    streaming = StreamingClient(connect_client, content, 0, len(DATA))
    streaming.client.transport.window = 1000
    streaming.client.send_request("GET", "/")
    streaming.client.advance(1)
    streaming.client.extend_window(INITIAL_CHUNK)
    assert [size for _, size in content.reads] == [INITIAL_CHUNK, INITIAL_CHUNK // 4]


def test_disconnect_ends_the_stream(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    streaming = StreamingClient(connect_client, content, 0, len(DATA))
    streaming.client.transport.window = 1000
    streaming.client.send_request("GET", "/")
    streaming.client.disconnect()
    assert len(streaming.outcomes) == 1 and streaming.outcomes[0] is not None
    assert len(content.reads) == 1
    assert streaming.client.finished_requests[0].bytes_sent == INITIAL_CHUNK


def test_disconnect_while_waiting_for_content(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA, delays={300_000: Deferred()})
    streaming = StreamingClient(connect_client, content, 0, len(DATA))
    streaming.client.send_request("GET", "/")
    assert streaming.outcomes == []
    streaming.client.disconnect()
    assert len(streaming.outcomes) == 1 and streaming.outcomes[0] is not None


def test_send_timeout(connect_client: Any, fake_content: Any) -> None:
    streaming = StreamingClient(connect_client, fake_content(DATA), 0, len(DATA), timeouts=ServerTimeouts(send=10))
    streaming.client.transport.window = 1000
    streaming.client.send_request("GET", "/")
    for _ in range(100):
        streaming.client.advance(1)
    assert streaming.client.transport.aborted
    assert len(streaming.outcomes) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("size_known", [True, False])
def test_read_error_is_visible_to_the_client(
    connect_client: Any, fake_content: Any, version: str, size_known: bool
) -> None:
    content = fake_content(DATA, errors={300_000: UpstreamBroken("connection lost")})
    streaming = StreamingClient(connect_client, content, 0, len(DATA) if size_known else None)
    response = streaming.get(version)
    assert not response.complete
    assert DATA.startswith(response.body)
    assert streaming.client.transport.aborted


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_truncated_content_is_visible_to_the_client(connect_client: Any, fake_content: Any, version: str) -> None:
    streaming = StreamingClient(connect_client, fake_content(DATA[:-1]), 0, len(DATA))
    assert not streaming.get(version).complete
    assert streaming.client.transport.aborted


def test_reactor_runs_between_chunks(connect_client: Any, fake_content: Any) -> None:
    content = fake_content(DATA)
    streaming = StreamingClient(connect_client, content, 0, len(DATA))
    read_counts: list[int] = []

    def tick() -> None:
        read_counts.append(len(content.reads))
        if len(read_counts) < 6:
            streaming.clock.callLater(0, tick)

    streaming.clock.callLater(0, tick)
    streaming.get()
    assert len(set(read_counts)) > 2


# files


class FileContent:
    """A blob in a file that `sendfile` can send."""

    def __init__(self, folder: Path, data: bytes) -> None:
        path = folder / "content"
        path.write_bytes(data)
        self._file = path.open("rb")
        self.reads: list[tuple[int, int]] = []
        self.size: int | None = len(data)

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        pass

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        self.reads.append((offset, max_bytes))
        return self._file.fileno(), min(max_bytes, len(DATA) - offset)

    async def read(self, offset: int, max_bytes: int) -> bytes:
        raise AssertionError("read() was called instead of sendfile_source()")


class SendfileRequest:
    """A request on a connection that supports sendfile, `step` bytes at a time."""

    def __init__(self, step: int) -> None:
        self.can_sendfile = True
        self.sent = b""
        self.finished = False
        self._step = step

    def write(self, data: bytes) -> None:
        self.sent += data

    def sendfile(self, descriptor: int, offset: int, size: int) -> int:
        data = os.pread(descriptor, min(size, self._step), offset)
        self.sent += data
        return len(data)

    async def drain(self) -> None: ...

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("step", [1 << 30, 100_000])
def test_a_file_is_sent_without_being_read(tmp_path: Path, step: int) -> None:
    request: Any = SendfileRequest(step)
    clock = Clock()
    content: Any = FileContent(tmp_path, DATA)
    streaming = Deferred.fromCoroutine(stream_content(request, content, [ByteRange(10, len(DATA) - 5)], clock))
    while not streaming.called:
        clock.advance(0)
    assert request.sent == DATA[10:-5] and request.finished


def test_truncated_file_ends_the_response(tmp_path: Path) -> None:
    request: Any = SendfileRequest(1 << 30)
    content: Any = FileContent(tmp_path, DATA[:1000])
    clock = Clock()
    streaming = Deferred.fromCoroutine(stream_content(request, content, [ByteRange(0, len(DATA))], clock))
    for _ in range(10):
        clock.advance(0)
    assert streaming.called and request.sent == DATA[:1000]
    assert request.finished  # this aborts a response that is too short


def test_long_ranges_of_a_file_are_sent_without_being_read(tmp_path: Path) -> None:
    request: Any = SendfileRequest(100_000)
    clock = Clock()
    content: Any = FileContent(tmp_path, DATA)
    segments = [b"first", ByteRange(500_000, 700_000), b"second", ByteRange(10, 300_000), b"end"]
    streaming = Deferred.fromCoroutine(stream_content(request, content, segments, clock))
    while not streaming.called:
        clock.advance(0)
    assert request.sent == b"first" + DATA[500_000:700_000] + b"second" + DATA[10:300_000] + b"end"
    assert request.finished
