"""Ranges far ahead of a download: fetched by themselves for one client, and compared with the whole blob at its end."""

from __future__ import annotations

import errno
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache import ahead
from dockerproxy.cache.ahead import merge_close
from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.downloads import BlobDownload, DownloadLimits
from dockerproxy.errors import UpstreamBroken, UpstreamRefused
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange, parse_ranges
from tests.cache.support.harness import HUB, OTHER, CacheHarness, ManualReader, do_nothing
from tests.cache.support.upstream import (
    ReceivedRequest,
    Responder,
    ScriptedResponse,
    disconnect_after,
    ignore_range,
    raise_error,
    respond_normally,
    respond_streaming,
    respond_with,
    serve_content,
)

MIB = 1024 * 1024
SIZE = 8 * MIB
DATA = random.Random("ahead").randbytes(SIZE)
DIGEST = Digest.of(DATA)
NAME = "library/app"
END = ByteRange(SIZE - 5000, SIZE)


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    return prepare(make_harness())


def prepare(harness: CacheHarness) -> CacheHarness:
    """Make the registry send the whole blob as the test says, and ranges of it at once."""
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    return harness


def start(harness: CacheHarness, sent: int = 100_000) -> tuple[BlobDownload, ScriptedResponse]:
    """Return a download that has `sent` bytes, and its response."""
    download = harness.downloads.start(harness.principal(), DIGEST, do_nothing)
    harness.reactor.run_due_calls()
    response = harness.upstream.responses[-1]
    response.send(sent)
    harness.advance(0.1)
    assert download.written == sent
    return download, response


def open_reader(
    harness: CacheHarness,
    download: BlobDownload,
    *ranges: ByteRange,
    authorization: str | None = None,
    client: str = "",
) -> ManualReader:
    """Return a reader at the start of the first of `ranges`, which a client has asked for."""
    content = download.open_reader(harness.repository(authorization=authorization), client)
    assert content is not None
    content.expect(ranges)
    return ManualReader(harness, content, ranges[0].start)


def read(harness: CacheHarness, reader: ManualReader, byte_range: ByteRange) -> bytes:
    """Return the bytes of `byte_range` that can be read now."""
    reader.start, reader.data = byte_range.start, b""
    while len(reader.data) < byte_range.size:
        before = len(reader.data)
        reader.read(byte_range.size - before)
        if len(reader.data) == before:
            break
    return reader.data


def bytes_of(byte_range: ByteRange) -> bytes:
    return DATA[byte_range.start : byte_range.stop]


def requested_ranges(harness: CacheHarness) -> list[str | None]:
    return [request.range for request in harness.upstream.requests_matching("GET", str(DIGEST))]


def is_stored(harness: CacheHarness) -> bool:
    blob = harness.blobs.open(DIGEST)
    if blob is None:
        return False
    with blob:
        return blob.read_blocking(0, SIZE + 1) == DATA


def finish(harness: CacheHarness, download: BlobDownload, response: ScriptedResponse) -> None:
    """End the download, and check that the whole blob is stored as it is."""
    response.send_rest()
    harness.advance(0.5)
    assert download.state is DownloadState.COMMITTED
    assert is_stored(harness)


def test_the_end_comes_at_once(harness: CacheHarness) -> None:
    download, response = start(harness)
    reader = open_reader(harness, download, END, authorization="Bearer of the client")
    assert read(harness, reader, END) == bytes_of(END)
    assert requested_ranges(harness) == [None, f"bytes={END.start}-{SIZE - 1}"]
    request = harness.upstream.requests[-1]
    assert (request.requester, request.follow) == ("Bearer of the client", True)
    assert download.written == 100_000  # nothing of it went into the file
    reader.content.close()
    finish(harness, download, response)
    assert len(requested_ranges(harness)) == 2


def test_a_lazy_puller(harness: CacheHarness) -> None:
    """stargz: the footer, the table of contents before it, then chunks in any order, each by a request of its own."""
    download, response = start(harness)
    footer, contents = ByteRange(SIZE - 51, SIZE), ByteRange(SIZE - 200_000, SIZE - 51)
    chunks = [ByteRange(start, start + 400_000) for start in (6 * MIB, 3 * MIB, 5 * MIB)]
    for byte_range in (footer, contents, *chunks):
        reader = open_reader(harness, download, byte_range)
        assert read(harness, reader, byte_range) == bytes_of(byte_range)
        reader.content.close()
    assert len(requested_ranges(harness)) == 6
    finish(harness, download, response)


@pytest.mark.parametrize(
    ("byte_range", "reason"),
    [
        (ByteRange(100_000, 200_000), "it begins at the end of the file"),
        (ByteRange(100_000 + MIB, 101_000 + MIB), "it is a mebibyte away"),
        (ByteRange(3 * MIB, SIZE), "it is longer than what is before it"),
        (ByteRange(150_000, SIZE), "it is nearly everything"),
    ],
)
def test_a_range_that_is_not_worth_it_waits(harness: CacheHarness, byte_range: ByteRange, reason: str) -> None:
    download, response = start(harness)
    reader = open_reader(harness, download, byte_range)
    assert read(harness, reader, byte_range) == b""
    harness.advance(2)
    assert (reader.data, requested_ranges(harness)) == (b"", [None]), reason
    finish(harness, download, response)
    assert read(harness, reader, byte_range) == bytes_of(byte_range)
    reader.content.close()


FAST = 4 * MIB, ByteRange(5 * MIB + 500_000, 5 * MIB + 501_000)
"""Bytes that have come in half a second, and a range that would come in 0.2 s at that rate."""


def test_a_fast_download_is_waited_for(harness: CacheHarness) -> None:
    sent, byte_range = FAST
    download, response = start(harness, sent)
    harness.advance(0.4)
    reader = open_reader(harness, download, byte_range)
    assert read(harness, reader, byte_range) == b""
    response.send(2 * MIB)
    harness.advance(0.1)
    assert reader.data == bytes_of(byte_range)
    assert requested_ranges(harness) == [None]
    reader.content.close()
    finish(harness, download, response)


def test_a_fast_download_that_stops_is_not_waited_for(harness: CacheHarness) -> None:
    sent, byte_range = FAST
    download, response = start(harness, sent)
    harness.advance(0.4)
    reader = open_reader(harness, download, byte_range)
    assert read(harness, reader, byte_range) == b""
    harness.advance(0.2)
    assert requested_ranges(harness) == [None]
    harness.advance(0.2)
    assert reader.data == bytes_of(byte_range)
    assert len(requested_ranges(harness)) == 2
    reader.content.close()
    finish(harness, download, response)


def test_the_first_moments_of_a_download_say_nothing_about_its_rate(harness: CacheHarness) -> None:
    sent, byte_range = FAST
    download, response = start(harness, sent)
    reader = open_reader(harness, download, byte_range)
    assert read(harness, reader, byte_range) == bytes_of(byte_range)
    reader.content.close()
    finish(harness, download, response)


def test_the_bytes_before_the_resumption_of_a_download_say_nothing_about_its_rate(
    make_harness: Callable[..., CacheHarness],
) -> None:
    harness = prepare(make_harness())
    download, response = start(harness, 2 * MIB)
    response.disconnect()
    harness.advance(0.1)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    harness.advance(1)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == bytes_of(END)
    reader.content.close()
    finish(harness, download, harness.upstream.responses[1])


def test_a_private_blob(make_harness: Callable[..., CacheHarness]) -> None:
    """Each client asks with its own credential, and gets a range only if the registry lets it read the blob."""
    harness = make_harness()
    repository = harness.upstream.repository(f"{HUB}/{NAME}", readers={"Bearer alice", "Bearer carol"})
    repository.put_blob(DATA)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    alice = harness.run(harness.blob(DIGEST, authorization="Bearer alice"))
    response = harness.upstream.responses[-1]
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST, authorization="Bearer bob"))
    with pytest.raises(UpstreamRefused):
        harness.run(harness.blob(DIGEST))
    carol = harness.run(harness.blob(DIGEST, authorization="Bearer carol"))
    for content, requester in ((alice.content, "Bearer alice"), (carol.content, "Bearer carol")):
        content.expect([END])
        reader = ManualReader(harness, content, END.start)
        assert read(harness, reader, END) == bytes_of(END)
        request = harness.upstream.requests[-1]
        assert (request.range, request.requester) == (f"bytes={END.start}-{SIZE - 1}", requester)
        content.close()
    response.send_rest()
    harness.advance(0.5)
    assert is_stored(harness)


# failures: the client waits for the download


def replace_range(body: bytes, content_range: str, status: int = 206, **fields: str) -> Responder:
    headers = {"content-range": content_range, **fields}
    return lambda request, data: ScriptedResponse(status, body, headers)


TRUE_RANGE = f"bytes {END.start}-{SIZE - 1}/{SIZE}"

FAILURES: dict[str, tuple[Responder, bool]] = {
    "the whole blob": (ignore_range, True),
    "416": (respond_with(416), True),
    "another range": (replace_range(bytes(5000), f"bytes 0-4999/{SIZE}"), True),
    "a part of the range": (replace_range(bytes(4000), f"bytes {END.start}-{SIZE - 1001}/{SIZE}"), True),
    "another size": (replace_range(bytes(5000), f"bytes {END.start}-{SIZE - 1}/{SIZE + 1}"), True),
    "no Content-Range": (replace_range(bytes(5000), ""), True),
    "gzip": (replace_range(bytes(5000), f"bytes 0-4999/{SIZE // 2}", **{"content-encoding": "gzip"}), True),
    "gzip of unknown size": (
        replace_range(bytes(5000), f"bytes {END.start}-{SIZE - 1}/*", **{"content-encoding": "gzip"}),
        True,
    ),
    "fewer bytes": (replace_range(b"", TRUE_RANGE), False),
    "more bytes": (replace_range(bytes(6000), TRUE_RANGE), False),
    "401": (respond_with(401), False),
    "404": (respond_with(404), False),
    "429": (respond_with(429), False),
    "503": (respond_with(503), False),
    "unreachable": (raise_error(UpstreamBroken("the connection broke")), False),
    "broken off": (disconnect_after(0), False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_reason_to_wait(harness: CacheHarness, name: str) -> None:
    responder, is_lack_of_ranges = FAILURES[name]
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), responder, times=1)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == b""
    assert (reader.error, len(requested_ranges(harness))) == (None, 2)
    # Another client: a registry that sends no ranges is not asked again.
    other = open_reader(harness, download, END)
    assert read(harness, other, END) == (b"" if is_lack_of_ranges else bytes_of(END))
    other.content.close()
    assert harness.downloads.bounds[-1].used == 0
    response.send_rest()
    harness.advance(0.5)
    reader.read_available()
    assert reader.data == bytes_of(END)
    reader.content.close()
    finish(harness, download, response)


@pytest.mark.parametrize(
    ("content_range", "coding"),
    [(TRUE_RANGE, "gzip"), (TRUE_RANGE, "identity"), (f"bytes {END.start}-{SIZE - 1}/*", "identity")],
)
def test_right_bytes_are_taken(harness: CacheHarness, content_range: str, coding: str) -> None:
    """With an unknown size, and with the coding of the layer's content, as some object stores name it."""
    download, response = start(harness)
    responder = replace_range(bytes_of(END), content_range, **{"content-encoding": coding})
    harness.upstream.on("GET", str(DIGEST), responder, times=1)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == bytes_of(END)
    reader.content.close()
    finish(harness, download, response)


def test_a_break_in_the_middle_is_continued_from_the_file(harness: CacheHarness) -> None:
    byte_range = ByteRange(6 * MIB, 6 * MIB + 300_000)
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), disconnect_after(100_000), times=1)
    reader = open_reader(harness, download, byte_range)
    reader.read_available()
    assert reader.data == DATA[6 * MIB : 6 * MIB + 100_000]
    response.send_rest()
    harness.advance(0.5)
    rest = ByteRange(6 * MIB + 100_000, byte_range.stop)
    assert read(harness, reader, rest) == bytes_of(rest)
    reader.content.close()
    finish(harness, download, response)


def test_a_silent_registry_is_waited_for_no_longer_than_the_download(harness: CacheHarness) -> None:
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == b""
    silent = harness.upstream.responses[-1]
    response.send_rest()
    harness.advance(0.5)
    reader.read_available()
    assert reader.data == bytes_of(END)
    assert silent.aborted
    reader.content.close()
    finish(harness, download, response)


def test_a_client_that_leaves_ends_its_request(harness: CacheHarness) -> None:
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    reader = open_reader(harness, download, END)
    reader.read()
    harness.reactor.run_due_calls()
    assert harness.downloads.bounds[-1].used == 1
    reader.disconnect()
    assert harness.upstream.responses[-1].aborted
    assert harness.downloads.bounds[-1].used == 0
    finish(harness, download, response)


def test_unsent_bytes_are_read_again(harness: CacheHarness) -> None:
    """A slow client takes less than it was offered: the same bytes are read from a lower offset."""
    download, response = start(harness)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == bytes_of(END)
    harness.reactor.run_due_calls()
    part = ByteRange(END.start + 100, END.stop)
    for _ in range(2):
        assert read(harness, reader, part) == bytes_of(part)
    assert len(requested_ranges(harness)) == 2
    reader.content.close()
    finish(harness, download, response)


# bounds


def test_the_bounds_of_all_clients_and_of_one(make_harness: Callable[..., CacheHarness]) -> None:
    harness = prepare(make_harness(download_limits=DownloadLimits(downloads=16)))  # 4 requests, 2 for one client
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), respond_streaming)
    readers = [
        open_reader(harness, download, END, client=client)
        for client in ("10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
    ]
    for reader in readers:
        reader.read()
    harness.reactor.run_due_calls()
    bound = harness.downloads.bounds[-1]
    assert (bound.used, bound.held_by("10.0.0.1")) == (4, 2)
    harness.upstream.reset()
    response.send_rest()
    harness.advance(0.5)
    for reader in readers:
        reader.read_available()
        assert reader.data == bytes_of(END)  # nobody was refused
        reader.content.close()
    assert bound.used == 0


def test_the_ranges_of_one_download_have_a_bound(make_harness: Callable[..., CacheHarness], monkeypatch: Any) -> None:
    monkeypatch.setattr("dockerproxy.cache.ahead._MAX_FETCHED", 12_000)
    harness = prepare(make_harness())
    download, response = start(harness)
    for expected in (bytes_of(END), bytes_of(END), b""):
        reader = open_reader(harness, download, END)
        assert read(harness, reader, END) == expected
        reader.content.close()
    finish(harness, download, response)


def test_close_ranges_are_one_request(harness: CacheHarness) -> None:
    download, response = start(harness)
    contents, footer = ByteRange(SIZE - 100_000, SIZE - 60_000), ByteRange(SIZE - 51, SIZE)
    reader = open_reader(harness, download, contents, footer)
    assert read(harness, reader, contents) == bytes_of(contents)
    assert read(harness, reader, footer) == bytes_of(footer)
    assert requested_ranges(harness)[1:] == [f"bytes={contents.start}-{SIZE - 1}"]
    reader.content.close()
    finish(harness, download, response)


@pytest.mark.parametrize(("count", "requests"), [(8, 8), (9, 0)])
def test_many_ranges_wait(harness: CacheHarness, count: int, requests: int) -> None:
    download, response = start(harness)
    ranges = [ByteRange(start, start + 1000) for start in range(2 * MIB, SIZE, 600_000)][:count]
    reader = open_reader(harness, download, *reversed(ranges))
    for byte_range in reversed(ranges):
        assert read(harness, reader, byte_range) == (bytes_of(byte_range) if requests else b"")
        if not requests:
            break
    assert len(requested_ranges(harness)) == 1 + requests
    reader.disconnect()
    finish(harness, download, response)


def test_the_end_of_a_whole_blob_waits_for_the_verification(harness: CacheHarness) -> None:
    """No response has all bytes of an unverified blob, however the client asked for them."""
    download, response = start(harness)
    first, rest = ByteRange(0, 5 * MIB), ByteRange(5 * MIB, SIZE)
    reader = open_reader(harness, download, rest, first)
    assert read(harness, reader, rest) == b""
    assert len(requested_ranges(harness)) == 1
    reader.disconnect()
    finish(harness, download, response)


# verification


def lie(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
    """Send other bytes than those of the blob for a range."""
    assert data is not None
    return serve_content(request, "application/octet-stream", bytes(len(data)))


def test_a_lie_is_found_out(harness: CacheHarness, log_lines: list[str]) -> None:
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), lie, times=1)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == bytes(5000)  # like any beginning of a blob, it is unverified
    response.send_rest()
    harness.advance(0.5)
    assert any(
        line.startswith(f"{HUB} sent other bytes for the range {END.start}-{SIZE - 1} of {DIGEST}")
        for line in log_lines
    )
    reader.read()
    assert isinstance(reader.error, UpstreamBroken)  # what is open is aborted
    reader.content.close()
    assert is_stored(harness)
    # For an hour nothing is fetched ahead from this registry; from others it is.
    other_data = DATA[::-1]
    digest = Digest.of(other_data)
    for registry, expected in ((HUB, b""), (OTHER, other_data[-100:])):
        harness.upstream.repository(f"{registry}/{NAME}").put_blob(other_data)
        harness.upstream.on("GET", str(digest), respond_streaming, times=1)
        other_download = harness.downloads.start(harness.principal(registry=registry), digest, do_nothing)
        harness.reactor.run_due_calls()
        content = other_download.open_reader(harness.repository(registry=registry))
        assert content is not None
        byte_range = ByteRange(SIZE - 100, SIZE)
        content.expect([byte_range])
        other_reader = ManualReader(harness, content, byte_range.start)
        other_reader.read_available()
        assert other_reader.data == expected
        other_reader.disconnect()


def test_a_lie_about_the_first_half_of_a_range_is_found_out(harness: CacheHarness, log_lines: list[str]) -> None:
    byte_range = ByteRange(6 * MIB, 6 * MIB + 300_000)
    download, response = start(harness)

    def lie_slowly(request: ReceivedRequest, data: bytes | None) -> ScriptedResponse:
        return serve_content(request, "application/octet-stream", bytes(SIZE), sent=100_000)

    harness.upstream.on("GET", str(DIGEST), lie_slowly, times=1)
    reader = open_reader(harness, download, byte_range)
    reader.read_available()
    assert reader.data == bytes(100_000)
    response.send_rest()
    harness.advance(0.5)
    assert any("sent other bytes for the range" in line for line in log_lines)
    reader.read_available()
    assert isinstance(reader.error, UpstreamBroken)
    reader.disconnect()


def test_true_ranges_of_a_corrupt_blob_are_no_lie(harness: CacheHarness, log_lines: list[str]) -> None:
    download, response = start(harness)
    reader = open_reader(harness, download, END)
    assert read(harness, reader, END) == bytes_of(END)
    response._body = bytes(len(response._body))
    response.send_rest()
    harness.advance(0.5)
    assert download.state is DownloadState.FAILED
    assert not any("sent other bytes" in line for line in log_lines)
    reader.content.close()


# blobs that cannot be stored


def test_a_range_of_a_blob_that_is_too_large_for_the_cache(make_harness: Callable[..., CacheHarness]) -> None:
    harness = prepare(make_harness(max_blob_size=MIB))
    download = harness.downloads.start(harness.principal(), DIGEST, do_nothing)
    reader_of_all = download.open_reader(harness.repository())
    readers = []
    for byte_range in (END, ByteRange(5 * MIB, 5 * MIB + 1000), ByteRange(100, 200)):
        content = download.open_reader(harness.repository())
        assert content is not None
        content.expect([byte_range])
        readers.append((ManualReader(harness, content, byte_range.start), byte_range))
    harness.reactor.run_due_calls()
    assert download.state is DownloadState.FAILED
    for reader, byte_range in readers[:2]:
        assert read(harness, reader, byte_range) == bytes_of(byte_range)
        assert requested_ranges(harness)[-1] == f"bytes={byte_range.start}-{byte_range.stop - 1}"
    assert len(requested_ranges(harness)) == 3
    near, byte_range = readers[2]
    near.read()  # takes over the connection of the download
    harness.upstream.responses[0].send_rest()
    harness.reactor.run_due_calls()
    assert read(harness, near, byte_range) == bytes_of(byte_range)
    for reader, _ in readers:
        reader.content.close()
    assert reader_of_all is not None
    reader_of_all.close()


def test_a_download_that_fails_to_store_the_blob_does_not_end_a_range(
    harness: CacheHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_range = ByteRange(6 * MIB, 6 * MIB + 300_000)
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    reader = open_reader(harness, download, byte_range)
    reader.read()
    ahead_response = harness.upstream.responses[-1]
    ahead_response.send(1000)
    harness.reactor.run_due_calls()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("dockerproxy.store.ingest.Ingest.append", fail)
    reader.read()
    response.send(1000)
    harness.advance(0.1)
    assert download.state is DownloadState.FAILED
    ahead_response.send_rest()
    harness.reactor.run_due_calls()
    rest = ByteRange(byte_range.start + 1000, byte_range.stop)
    assert read(harness, reader, rest) == bytes_of(rest)
    assert len(requested_ranges(harness)) == 2
    reader.content.close()


def test_a_corrupt_download_ends_a_range(harness: CacheHarness) -> None:
    download, response = start(harness)
    harness.upstream.on("GET", str(DIGEST), respond_streaming, times=1)
    reader = open_reader(harness, download, END)
    reader.read()
    response._body = bytes(len(response._body))
    response.send_rest()
    harness.advance(0.5)
    assert download.state is DownloadState.FAILED
    assert len(reader.data) < END.size
    reader.read()
    assert isinstance(reader.error, UpstreamBroken)
    reader.content.close()


# two processes


@pytest.mark.parametrize("is_lie", [False, True])
def test_a_process_that_follows(make_harness: Callable[..., CacheHarness], log_lines: list[str], is_lie: bool) -> None:
    """The process that has the client fetches the range; another one writes the file."""
    writer = prepare(make_harness(shared=True))
    follower = make_harness(shared=True, upstream=writer.upstream)
    download, response = start(writer)
    following = follower.downloads.start(follower.principal(), DIGEST, do_nothing)
    follower.advance(0.2)
    assert following.state is DownloadState.FOLLOWING
    if is_lie:
        writer.upstream.on("GET", str(DIGEST), lie, times=1)
    reader = open_reader(follower, following, END)
    assert read(follower, reader, END) == (bytes(5000) if is_lie else bytes_of(END))
    assert len(requested_ranges(writer)) == 2
    reader.content.close()
    response.send_rest()
    follower.advance(3)
    assert (download.state, following.state) == (DownloadState.COMMITTED, DownloadState.COMMITTED)
    assert any("sent other bytes" in line for line in log_lines) == is_lie
    assert is_stored(follower)


# properties


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), max_size=20))
def test_merging_keeps_all_ranges_and_adds_little(pairs: list[tuple[int, int]]) -> None:
    ranges, stop = [], 0
    for gap, size in pairs:
        ranges.append(ByteRange(stop + gap, stop + gap + size))
        stop = ranges[-1].stop
    for order in (ranges, ranges[::-1]):
        merged = merge_close(order)
        assert all(any(m.start <= r.start and r.stop <= m.stop for m in merged) for r in order)
        added = sum(m.size for m in merged) - sum(r.size for r in order)
        assert 0 <= added <= 128 * 1024 * (len(order) - len(merged))


SMALL = DATA[:60_000]
SMALL_DIGEST = Digest.of(SMALL)

BEHAVIOURS: list[Responder] = [
    respond_normally,
    respond_normally,
    respond_streaming,
    disconnect_after(500),
    ignore_range,
    respond_with(403),
    raise_error(UpstreamBroken("the connection broke")),
]

STEPS = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 20_000)),
    st.tuples(st.just("send ahead"), st.integers(1, 3000)),
    st.tuples(st.just("read"), st.integers(1, 5000)),
    st.tuples(st.just("wait"), st.integers(1, 5)),
    st.tuples(st.just("break"), st.just(0)),
    st.tuples(st.just("full disk"), st.just(0)),
)


@given(
    st.lists(st.tuples(st.integers(0, 59_000), st.integers(1, 1000)), min_size=1, max_size=4),
    st.lists(st.sampled_from(BEHAVIOURS), max_size=6),
    st.lists(STEPS, max_size=25),
)
def test_every_client_gets_its_ranges(
    starts: list[tuple[int, int]], behaviours: list[Responder], steps: list[tuple[str, int]]
) -> None:
    """The download, the requests ahead and the clients are slow, and fail, in any order: nobody waits for ever."""
    field = "bytes=" + ",".join(f"{start}-{start + size - 1}" for start, size in starts)
    ranges = parse_ranges(field, len(SMALL))
    with tempfile.TemporaryDirectory() as folder, patch.object(ahead, "_MIN_GAP", 1000):
        harness = CacheHarness(Path(folder))
        harness.upstream.repository(f"{HUB}/{NAME}").put_blob(SMALL)
        remaining = iter(behaviours)

        def respond(request: ReceivedRequest, data: bytes | None) -> Any:
            is_ahead = request.range is not None and not request.range.endswith("-")
            return (next(remaining, respond_normally) if is_ahead else respond_streaming)(request, data)

        harness.upstream.on("GET", str(SMALL_DIGEST), respond)
        download = harness.downloads.start(harness.principal(), SMALL_DIGEST, do_nothing)
        harness.reactor.run_due_calls()
        reader_of_range = []
        for byte_range in ranges:
            content = download.open_reader(harness.repository(), "10.0.0.1")
            assert content is not None
            content.expect([byte_range])
            reader_of_range.append((ManualReader(harness, content, byte_range.start), byte_range))

        def read_on(size: int) -> None:
            for reader, byte_range in reader_of_range:
                missing = byte_range.size - len(reader.data)
                if missing:
                    reader.read(min(size, missing))

        with ExitStack() as stack:
            for step, number in steps:
                if step == "read":
                    read_on(number)
                elif step == "wait":
                    harness.advance(number / 10)
                elif step == "full disk":
                    append = patch("dockerproxy.store.ingest.Ingest.append", side_effect=OSError(errno.ENOSPC, "full"))
                    stack.enter_context(append)
                else:
                    responses = [response for response in harness.upstream.responses if not response.ended]
                    chosen = responses[-1:] if step == "send ahead" else responses[:1]
                    for response in chosen:
                        response.disconnect() if step == "break" else response.send(number)
                harness.reactor.run_due_calls()
            for _ in range(200):
                if all(len(reader.data) == byte_range.size for reader, byte_range in reader_of_range):
                    break
                for response in harness.upstream.responses:
                    if not response.ended:
                        response.send_rest()
                harness.advance(0.5)
                read_on(60_000)
            for reader, byte_range in reader_of_range:
                assert reader.error is None
                assert reader.data == SMALL[byte_range.start : byte_range.stop]
                reader.content.close()
            harness.assert_no_leaks()
