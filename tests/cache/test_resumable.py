from __future__ import annotations

import gzip
import random
import zlib
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.cache.resumable import PartialTooLong, ResumableGet, UpstreamTooSlow
from dockerproxy.cache.upstream import UpstreamRepository
from dockerproxy.errors import (
    RegistryError,
    ResponseCutOff,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import parse_repository
from dockerproxy.upstream.content_coding import PIECE_SIZE
from dockerproxy.upstream.credentials import Anonymous
from tests.cache.support.harness import HUB, result
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import (
    ScriptedResponse,
    ScriptedUpstream,
    disconnect_after,
    error_response,
    ignore_range,
    raise_error,
    replace_with,
    respond_streaming,
    respond_with,
    without_length,
)

DATA = bytes(range(256)) * 40
NOON = 1795953600.0  # Sun, 29 Nov 2026 12:00:00 GMT
REPOSITORY = UpstreamRepository(HUB, parse_repository("library/app"), Anonymous())


class ResumableGetHarness:
    """A `ResumableGet` of DATA from a scripted upstream."""

    def __init__(self, offset: int = 0, data: bytes = DATA) -> None:
        self.reactor = ManualReactor()
        self.upstream = ScriptedUpstream(self.reactor)
        self.digest = self.upstream.repository(REPOSITORY.key).put_blob(data)
        self.resumable_get = ResumableGet(
            self.reactor, self.upstream, REPOSITORY, self.digest, offset, wall_clock=lambda: NOON
        )

    def on(self, *responders: Any) -> None:
        for responder in responders:
            self.upstream.on("GET", str(self.digest), responder, times=1)

    def open(self, seconds: float = 60) -> None:
        result(Deferred.fromCoroutine(self.resumable_get.open()), self.reactor, seconds)

    def read(self, seconds: float = 60) -> bytes:
        return b"".join(self.read_pieces(seconds))

    def read_pieces(self, seconds: float = 60) -> list[bytes]:
        return result(Deferred.fromCoroutine(self.resumable_get.read()), self.reactor, seconds)  # type: ignore[no-any-return]

    def read_all(self) -> bytes:
        self.open()
        data = b""
        while chunk := self.read():
            data += chunk
        assert self.read() == b""  # further reads return the end, too
        assert all(response.ended for response in self.upstream.responses)
        return data

    @property
    def ranges(self) -> list[str | None]:
        return [request.range for request in self.upstream.requests]


def test_whole_blob() -> None:
    harness = ResumableGetHarness()
    assert harness.read_all() == DATA
    assert harness.resumable_get.size == harness.resumable_get.offset == len(DATA)
    assert harness.ranges == [None]


def test_empty_blob() -> None:
    harness = ResumableGetHarness(data=b"")
    assert harness.read_all() == b""
    assert harness.resumable_get.size == 0


def test_resume_from_offset() -> None:
    """The request starts at the last byte that is present."""
    harness = ResumableGetHarness(offset=1000)
    assert harness.read_all() == DATA[1000:]
    assert harness.ranges == ["bytes=999-"]
    assert harness.resumable_get.size == len(DATA)


@pytest.mark.parametrize("offset", [1, len(DATA) - 1])
def test_resume_at_either_end(offset: int) -> None:
    assert ResumableGetHarness(offset).read_all() == DATA[offset:]


def test_resume_at_end() -> None:
    """Upstream could only respond with 416 to a Range after the last byte."""
    harness = ResumableGetHarness(offset=len(DATA))
    harness.open()
    assert harness.resumable_get.size == len(DATA)
    assert harness.read() == b""
    assert [response.status for response in harness.upstream.responses] == [206]


def test_resumes_after_repeated_disconnects() -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), disconnect_after(1), disconnect_after(5), disconnect_after(500))
    assert harness.read_all() == DATA
    # A connection that delivers only the known byte makes no progress.
    assert harness.ranges == [None, "bytes=2999-", "bytes=2999-", "bytes=3003-", "bytes=3502-"]


@pytest.mark.parametrize("error", [UpstreamTimeout("silent"), UpstreamUnreachable("gone"), UpstreamBroken("cut")])
def test_retry_delays_and_final_error(error: RegistryError) -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000))
    harness.open()
    assert harness.read() == DATA[:3000]
    harness.upstream.down = error
    harness.upstream.clear_requests()
    before, attempt_times = harness.reactor.seconds(), []
    reading = Deferred.fromCoroutine(harness.resumable_get.read())
    outcome: list[Any] = []
    reading.addBoth(outcome.append)
    while not outcome:
        due = min(call.getTime() for call in harness.reactor.getDelayedCalls())
        harness.reactor.advance(due - harness.reactor.seconds())
        harness.reactor.run_due_calls()
        attempt_times += [harness.reactor.seconds() - before] * len(harness.upstream.requests)
        harness.upstream.clear_requests()
    assert outcome[0].value is error
    assert attempt_times == pytest.approx([0.2, 0.7, 1.7, 3.7, 7.7, 15.7])
    assert harness.resumable_get.offset == 3000


def test_progress_resets_retry_delays() -> None:
    harness = ResumableGetHarness()
    harness.on(*[disconnect_after(2)] * 50)  # only the second byte is new
    assert harness.read_all() == DATA
    assert harness.reactor.seconds() < 50 * 0.4  # the first delay each time, not the longer ones


@pytest.mark.parametrize("status", [429, 500, 503])
def test_resumes_after_error_status(status: int) -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), respond_with(status), respond_with(status))
    assert harness.read_all() == DATA


@pytest.mark.parametrize(
    ("retry_after", "delay"),
    [
        ("3", 3.0),
        ("3600", 20.0),
        ("0", 0.2),
        ("soon", 0.2),
        ("Sun, 29 Nov 2026 12:00:04 GMT", 4.0),
        ("Sun, 29 Nov 2026 11:59:00 GMT", 0.2),
    ],
)
def test_retry_after_is_bounded(retry_after: str, delay: float) -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), lambda _request, _data: ScriptedResponse(429, b"", {"retry-after": retry_after}))
    harness.open()
    harness.read()
    started_at = harness.reactor.seconds()
    harness.read()
    # The broken connection costs the first delay. The 429 costs at least the second one.
    assert harness.reactor.seconds() - started_at == pytest.approx(0.2 + max(0.5, delay))


def test_416_on_resume_is_not_retried() -> None:
    """A retry would not make the content longer."""
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), respond_with(416))
    harness.open()
    harness.read()
    with pytest.raises(PartialTooLong):
        harness.read()
    assert len(harness.upstream.requests) == 2


def test_401_on_resume_is_not_retried() -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), respond_with(401))
    harness.open()
    harness.read()
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.read()
    assert excinfo.value.status == 401
    assert len(harness.upstream.requests) == 2


def test_upstream_ignores_range() -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), ignore_range)
    assert harness.read_all() == DATA


def test_upstream_ignores_range_and_disconnects_early() -> None:
    harness = ResumableGetHarness()
    disconnected_at = lambda size: lambda request, data: disconnected(ScriptedResponse(200, data, sent=size))  # noqa: E731
    harness.on(disconnect_after(3000), disconnected_at(100), disconnected_at(2999), disconnected_at(3500), ignore_range)
    assert harness.read_all() == DATA


def disconnected(response: ScriptedResponse) -> ScriptedResponse:
    response.disconnect()
    return response


def test_range_starting_too_early_is_skipped() -> None:
    harness = ResumableGetHarness(offset=3000)
    harness.on(
        lambda request, data: ScriptedResponse(
            206, DATA[2000:], {"content-range": f"bytes 2000-{len(DATA) - 1}/{len(DATA)}"}
        )
    )
    assert harness.read_all() == DATA[3000:]


def test_short_range_is_continued() -> None:
    """Some servers limit the length of a range."""
    harness = ResumableGetHarness(offset=3000)
    harness.on(
        lambda request, data: ScriptedResponse(206, DATA[2999:5000], {"content-range": f"bytes 2999-4999/{len(DATA)}"})
    )
    assert harness.read_all() == DATA[3000:]
    assert harness.ranges == ["bytes=2999-", "bytes=4999-"]


@pytest.mark.parametrize(
    "content_range", ["", "bytes 3001-10239/10240", "bytes */10240", "bytes 5-4/3", "items 0-1/2", "bytes 2999-10239"]
)
def test_invalid_content_range(content_range: str) -> None:
    harness = ResumableGetHarness(offset=3000)
    harness.upstream.on(
        "GET", "", lambda request, data: ScriptedResponse(206, DATA[2999:], {"content-range": content_range})
    )
    with pytest.raises(UpstreamBroken):
        harness.open()
    assert len(harness.upstream.requests) == 2
    assert all(response.ended for response in harness.upstream.responses)


def test_206_without_range_request() -> None:
    harness = ResumableGetHarness()
    harness.on(
        lambda request, data: ScriptedResponse(206, DATA, {"content-range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"})
    )
    with pytest.raises(UpstreamFailing):
        harness.open()


def test_changed_length() -> None:
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000), replace_with(DATA + b"more"))
    assert harness.read_all() == DATA  # the next response is correct
    harness = ResumableGetHarness()
    harness.on(disconnect_after(3000))
    harness.open()
    harness.read()
    harness.upstream.on("GET", "", replace_with(DATA[:-1]))
    with pytest.raises(UpstreamBroken, match="and then"):
        harness.read()


def test_body_longer_than_length() -> None:
    """The Content-Length and the Content-Range disagree."""
    harness = ResumableGetHarness(offset=3000)
    harness.upstream.on(
        "GET",
        "",
        lambda request, data: ScriptedResponse(206, DATA[2999:] + b"more", {"content-range": "bytes 2999-10239/10240"}),
    )
    harness.open()
    with pytest.raises(UpstreamBroken, match="more than"):
        harness.read()


def test_endless_response_is_aborted() -> None:
    """The connection is closed as soon as all bytes have arrived, even if the response does not end."""
    harness = ResumableGetHarness()

    def endless(request: Any, data: Any) -> ScriptedResponse:
        response = ScriptedResponse(200, DATA, sent=0, length=len(DATA))
        response.send()
        return response

    harness.on(endless)
    assert harness.read_all() == DATA
    assert harness.upstream.responses[0].aborted


def test_unknown_length() -> None:
    harness = ResumableGetHarness()
    harness.on(without_length)
    harness.open()
    assert harness.resumable_get.size is None
    assert harness.read() == DATA
    assert harness.read() == b""
    assert harness.resumable_get.size == len(DATA)


def test_unknown_length_learned_on_resume() -> None:
    harness = ResumableGetHarness()
    harness.on(lambda request, data: disconnected(ScriptedResponse(200, DATA, length=None, sent=3000)))
    assert harness.read_all() == DATA
    assert harness.resumable_get.size == len(DATA)


def test_unknown_length_disconnect_at_end() -> None:
    harness = ResumableGetHarness()
    harness.on(lambda request, data: disconnected(ScriptedResponse(200, DATA, length=None, sent=len(DATA))))
    assert harness.read_all() == DATA
    assert [response.status for response in harness.upstream.responses] == [200, 206]


@pytest.mark.parametrize(
    "responder",
    [
        lambda request, data: error_response(416),
        lambda request, data: ScriptedResponse(200, DATA[:2000]),
        lambda request, data: ScriptedResponse(200, DATA[:2000], length=None),
        lambda request, data: ScriptedResponse(206, DATA[2:3], {"content-range": "bytes 2-2/3"}),
    ],
)
def test_upstream_shorter_than_offset(responder: Any) -> None:
    """The error is raised without retries, because the partial file is not a prefix of the blob."""
    harness = ResumableGetHarness(offset=3000)
    harness.upstream.on("GET", "", responder)
    with pytest.raises(PartialTooLong):
        harness.open()
    assert len(harness.upstream.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 416])
def test_upstream_error_is_passed_through(status: int) -> None:
    harness = ResumableGetHarness()
    harness.on(respond_with(status, x_request_id="7"))
    with pytest.raises(UpstreamRefused) as excinfo:
        harness.open()
    assert excinfo.value.status == status
    assert b"UPSTREAM" in excinfo.value.content
    assert ("x-request-id", "7") in excinfo.value.headers


def test_rate_limit_headers_are_passed_through() -> None:
    harness = ResumableGetHarness()
    harness.on(respond_with(429, retry_after="30", ratelimit_limit="100;w=21600", x_other="1"))
    with pytest.raises(UpstreamFailing) as excinfo:
        harness.open()
    assert (excinfo.value.status, excinfo.value.code) == (429, "TOOMANYREQUESTS")
    assert dict(excinfo.value.headers) == {"retry-after": "30", "ratelimit-limit": "100;w=21600"}


@pytest.mark.parametrize("status", [304, 500, 503])
def test_unexpected_status_is_502(status: int) -> None:
    harness = ResumableGetHarness()
    harness.on(respond_with(status))
    with pytest.raises(UpstreamFailing) as excinfo:
        harness.open()
    assert excinfo.value.status == 502


def test_open_succeeds_on_retry() -> None:
    harness = ResumableGetHarness()
    harness.on(raise_error(UpstreamBroken("cut")))
    assert harness.read_all() == DATA
    assert harness.reactor.seconds() >= 0.2


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(UpstreamBroken("cut"), 2), (UpstreamUnreachable("gone"), 1), (UpstreamTimeout("silent"), 1)],
)
def test_open_fails(error: RegistryError, attempts: int) -> None:
    harness = ResumableGetHarness()
    harness.upstream.down = error
    with pytest.raises(type(error)):
        harness.open()
    assert len(harness.upstream.requests) == attempts


def test_unread() -> None:
    harness = ResumableGetHarness()
    harness.on(respond_streaming)
    harness.open()
    harness.upstream.responses[0].send(2000)
    harness.upstream.responses[0].send(3000)
    pieces = harness.read_pieces()
    assert pieces == [DATA[:2000], DATA[2000:5000]]
    harness.resumable_get.unread(pieces)
    assert harness.resumable_get.offset == 0
    assert harness.read_pieces() == pieces
    harness.upstream.responses[0].send_rest()
    last = harness.read_pieces()
    harness.resumable_get.unread(last)  # the last bytes, after the response has ended
    assert harness.read_pieces() == last
    assert harness.read_pieces() == []
    harness.resumable_get.unread(last)
    assert harness.read_pieces() == last


def test_abort_closes_connection() -> None:
    harness = ResumableGetHarness()
    harness.on(respond_streaming)
    harness.open()
    harness.resumable_get.abort()
    harness.resumable_get.abort()
    assert harness.upstream.responses[0].aborted


def test_cancel_while_skipping_closes_connection() -> None:
    harness = ResumableGetHarness(offset=3000)
    harness.on(lambda request, data: ScriptedResponse(200, DATA, sent=10))
    opening = Deferred.fromCoroutine(harness.resumable_get.open())
    harness.reactor.run_due_calls()
    assert len(harness.upstream.responses) == 1
    opening.addErrback(lambda _: None)
    opening.cancel()
    assert harness.upstream.responses[0].aborted


# slow upstreams


def drip(harness: ResumableGetHarness, size: int, interval: float, times: int) -> Exception | None:
    """Let `size` bytes arrive every `interval` seconds. Return the error of a read."""
    for _ in range(times):
        read = Deferred.fromCoroutine(harness.resumable_get.read())
        outcome: list[Any] = []
        read.addBoth(outcome.append)
        harness.reactor.advance(interval)
        harness.upstream.responses[-1].send(size)
        harness.reactor.run_due_calls()
        if isinstance(outcome[0], Failure):
            return outcome[0].value  # type: ignore[no-any-return]
    return None


@pytest.mark.parametrize(("size", "interval", "times"), [(1, 1, 60), (1000, 1, 60), (1, 59, 3)])
def test_slow_upstream_fails_without_a_retry(size: int, interval: float, times: int) -> None:
    harness = ResumableGetHarness(data=bytes(200_000))
    harness.on(respond_streaming)
    harness.open()
    assert drip(harness, size, interval, times - 1) is None
    error = drip(harness, size, interval, 1)
    assert isinstance(error, UpstreamTooSlow) and "less than 1024 bytes a second" in str(error)
    assert len(harness.upstream.requests) == 1


@pytest.mark.parametrize(("size", "interval", "times"), [(1100, 1, 150), (61_000, 59, 3)])
def test_upstream_that_is_just_fast_enough(size: int, interval: float, times: int) -> None:
    harness = ResumableGetHarness(data=bytes(200_000))
    harness.on(respond_streaming)
    harness.open()
    assert drip(harness, size, interval, times) is None


def coding_that_holds_back(request: Any, data: bytes) -> ScriptedResponse:
    """Start a response in a coding that becomes nothing for as long as it is sent: empty members of gzip."""
    body = gzip.compress(random.Random(1).randbytes(300_000)) + gzip.compress(b"") * 10_000
    fields = {"content-encoding": "gzip", "vary": "accept-encoding"}
    return ScriptedResponse(200, body, fields, length=None, sent=300_200)


def test_slow_coded_content() -> None:
    """Content comes out of a coding whenever upstream likes. Until then, what is sent counts all the same."""
    harness = ResumableGetHarness(data=random.Random(1).randbytes(300_000))
    harness.on(coding_that_holds_back)
    harness.open()
    reading: list[Any] = []

    async def read_everything() -> None:
        while await harness.resumable_get.read():
            pass

    Deferred.fromCoroutine(read_everything()).addErrback(reading.append)
    for _ in range(120):  # the first window has the content
        assert not reading
        harness.reactor.advance(1)
        harness.upstream.responses[-1].send(1)
        harness.reactor.run_due_calls()
    assert reading[0].check(UpstreamTooSlow) and harness.upstream.responses[-1].ended


@pytest.mark.parametrize("offset", [0, 1000])
def test_slow_start(offset: int) -> None:
    """The bytes that decide about a coding, and those that are skipped, count too."""
    harness = ResumableGetHarness(offset, data=bytes(200_000))
    fields = {} if offset else {"content-encoding": "gzip"}
    harness.on(lambda request, data: ScriptedResponse(200, data, fields, length=None, sent=1))
    opening: list[Any] = []
    Deferred.fromCoroutine(harness.resumable_get.open()).addErrback(opening.append)
    for _ in range(60):
        harness.reactor.run_due_calls()
        assert not opening
        harness.reactor.advance(1)
        harness.upstream.responses[-1].send(1)
    harness.reactor.run_due_calls()
    assert opening[0].check(UpstreamTooSlow) and harness.upstream.responses[-1].ended


def test_time_of_slow_clients_does_not_count() -> None:
    harness = ResumableGetHarness(data=bytes(200_000))
    harness.on(respond_streaming)
    harness.open()
    for _ in range(10):
        harness.upstream.responses[-1].send(10)
        assert harness.read() == bytes(10)
        harness.reactor.advance(100)


def test_slow_upstream_is_read_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read costs a write in a thread, and a hostile registry could cause any number of them."""
    harness = ResumableGetHarness(data=bytes(200_000))
    harness.on(respond_streaming)
    harness.open()
    timeouts: list[float] = []
    read_pieces = ScriptedResponse.read_pieces

    async def record(response: ScriptedResponse, at_least: int, timeout: float) -> list[bytes]:
        timeouts.append(timeout)
        return await read_pieces(response, at_least, timeout)

    monkeypatch.setattr(ScriptedResponse, "read_pieces", record)
    for size in (10, 10, 5000, 5000):
        harness.upstream.responses[-1].send(size)
        harness.read()
    assert timeouts == [0.002, 0.1, 0.1, 0.002]


# framing and codings: the digest decides


def cut_off(size: int, *, ranges: bool = True, total: str | None = None) -> Any:
    """Send `size` bytes in a response of unknown length, and break the connection."""

    def respond(request: Any, data: bytes) -> ScriptedResponse:
        start, fields, status = 0, {}, 200
        if request.range is not None and ranges:
            start, status = int(request.range[6:].rstrip("-")), 206
            fields = {"content-range": f"bytes {start}-{len(data) - 1}/{total or len(data)}"}
        response = ScriptedResponse(status, data[start:], fields, length=None, sent=0)
        response.send(max(0, size - start))
        response.disconnect(ResponseCutOff("cut off"))
        return response

    return respond


@pytest.mark.parametrize("total", [None, "*"])
@pytest.mark.parametrize("ranges", [True, False])
def test_the_end_without_a_length(ranges: bool, total: str | None) -> None:
    """TLS that ends without close_notify may be cut off. A second response ends there, too, or tells the size."""
    harness = ResumableGetHarness()
    harness.on(*[cut_off(len(DATA), ranges=ranges, total=total)] * 2)
    assert harness.read_all() == DATA
    assert harness.resumable_get.size == len(DATA)
    assert harness.ranges == [None, f"bytes={len(DATA) - 1}-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_response_without_a_length_is_resumed(ranges: bool) -> None:
    harness = ResumableGetHarness()
    harness.on(*(cut_off(size, ranges=ranges, total="*") for size in (1, 500, 200, 5000, 5001, len(DATA), len(DATA))))
    assert harness.read_all() == DATA


def coded(
    *coders: Any, coding: str = "gzip", length: bool = True, cut: bool = False, head_start: int | None = None
) -> Any:
    """Send the content in codings. Ranges are those of the coded content, as RFC 9110 has them."""

    def respond(request: Any, data: bytes) -> ScriptedResponse:
        for coder in coders:
            data = coder(data)
        fields, status, start = {"content-encoding": coding}, 200, 0
        if request.range is not None:
            start = int(request.range[6:].partition("-")[0])
            status, fields["content-range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = ScriptedResponse(status, data[start:], fields, length=len(data) - start if length else None, sent=0)
        response.send(head_start)
        if cut:
            response.disconnect()
        else:
            response.send_rest()
        return response

    return respond


RANDOM = random.Random(1).randbytes(700_000)
LAYER = gzip.compress(RANDOM)
CODED = {
    "gzip": coded(gzip.compress),
    "x-gzip": coded(gzip.compress, coding="x-gzip"),
    "without a length": coded(gzip.compress, length=False),
    "deflate": coded(zlib.compress, coding="deflate"),
    "stacked": coded(zlib.compress, gzip.compress, coding="deflate, gzip"),
    "a wrong field": coded(),
    "identity": coded(coding="identity"),
    "another wrong field": coded(coding="gzip, deflate"),
    "unknown, and wrong": coded(coding="br"),
}


@pytest.mark.parametrize("answer", CODED.values(), ids=CODED)
@pytest.mark.parametrize("data", [DATA, LAYER, gzip.compress(DATA), b""], ids=["short", "layer", "short gzip", "empty"])
def test_content_coding(answer: Any, data: bytes) -> None:
    harness = ResumableGetHarness(data=data)
    harness.on(answer)
    assert harness.read_all() == data
    assert harness.resumable_get.size == len(data)
    assert harness.ranges == [None]


def test_resuming_within_coded_content() -> None:
    """Offsets in coded content are no offsets of the blob, so that it is sent from the start again."""
    harness = ResumableGetHarness(data=LAYER)
    harness.on(
        coded(gzip.compress, cut=True, head_start=400_000),
        coded(gzip.compress, cut=True, head_start=600_000),
        respond_with(503),
        coded(gzip.compress),
    )
    assert harness.read_all() == LAYER
    assert harness.ranges == [None] * 4


@pytest.mark.parametrize("offset", [0, 1000])
def test_a_coded_part_that_nobody_asked_for(offset: int) -> None:
    """A registry that sends parts of coded content whatever it is asked for is not asked for ever."""
    harness = ResumableGetHarness(offset, data=LAYER)

    def respond(request: Any, data: bytes) -> ScriptedResponse:
        fields = {"content-encoding": "gzip", "content-range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        return ScriptedResponse(206, data, fields)

    harness.upstream.on("GET", str(harness.digest), respond)
    with pytest.raises(UpstreamBroken, match="a part of coded content"):
        harness.open()
    assert len(harness.ranges) <= 4
    assert all(response.ended for response in harness.upstream.responses)


def test_a_few_kib_that_are_a_lot_are_decoded_in_steps() -> None:
    data = bytes(2 << 20)
    harness = ResumableGetHarness(data=data)
    harness.on(coded(gzip.compress))
    opening = Deferred.fromCoroutine(harness.resumable_get.open())
    steps = 0
    while not opening.called:
        [call] = harness.reactor.getDelayedCalls()
        call.func(*call.args)
        call.cancel()
        steps += 1
    assert steps >= len(data) // PIECE_SIZE
    assert harness.read() == data[: 4 * PIECE_SIZE]


def test_resuming_within_content_that_is_gzip_itself() -> None:
    harness = ResumableGetHarness(data=LAYER)
    harness.on(coded(cut=True, head_start=400_000), coded(cut=True, head_start=100_000), coded())
    assert harness.read_all() == LAYER
    assert harness.ranges == [None, "bytes=399999-", "bytes=499998-"]


@pytest.mark.parametrize("end", [1, 300_000])
def test_coded_content_that_ends_early(end: int) -> None:
    harness = ResumableGetHarness(data=LAYER)
    for _ in range(10):
        harness.on(coded(gzip.compress, lambda data: data[:-end], length=False))
    with pytest.raises(UpstreamBroken, match="incomplete"):
        harness.read_all()


def test_a_bomb_is_read_in_small_pieces() -> None:
    """It is evicted or passed on like any other blob of unknown length. Only a little of it is ever in memory."""
    zeros = bytes(64 << 20)
    bomb = gzip.compress(zeros)
    harness = ResumableGetHarness(data=gzip.compress(RANDOM))
    harness.on(coded(lambda data: gzip.compress(b"\x1f\x8b" + zeros) + gzip.compress(RANDOM[:300_000])))
    harness.open()
    assert len(bomb) < 1 << 17
    sizes = [len(harness.read()) for _ in range(200)]
    assert max(sizes) <= 256 * 1024 and sum(sizes) > 30 << 20


def test_a_partial_download_of_unknown_reading_is_sent_from_the_start() -> None:
    """A part of coded content is of no use, and nobody knows yet whether the content is coded."""
    harness = ResumableGetHarness(offset=5000, data=LAYER)
    harness.on(coded(gzip.compress), coded(gzip.compress))
    assert harness.read_all() == LAYER[5000:]
    assert harness.ranges == ["bytes=4999-", None]
    harness = ResumableGetHarness(offset=5000, data=LAYER)
    harness.on(coded(), coded(cut=True, head_start=400_000), coded())
    assert harness.read_all() == LAYER[5000:]
    assert harness.ranges == ["bytes=4999-", None, "bytes=399999-"]
