"""Tests for one upstream connection on a string transport, with a fake clock."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import AccumulatingProtocol, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import ResponseCutOff, UpstreamBroken, UpstreamTimeout
from dockerproxy.http.stream import BufferBudget
from dockerproxy.oci.names import Digest
from dockerproxy.upstream.connection import (
    ConnectionDropped,
    OutgoingRequest,
    Response,
    UpstreamConnection,
    UpstreamTimeouts,
)
from dockerproxy.upstream.http1 import MAX_HEAD

GET = OutgoingRequest("GET", "http://a/", b"GET / HTTP/1.1\r\n\r\n")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SWITCH = b"HTTP/1.1 101 Switching\r\nUpgrade: WebSocket\r\n\r\n"


class ManualBodyProducer:
    """A body that the test controls; it records the calls of its consumer."""

    length = 1000

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        return self.done

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class ConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.idle_count = 0
        self.lost_count = 0
        self.transport = StringTransport()
        self.connection = UpstreamConnection(self.clock, "a:80", None, UpstreamTimeouts(20, 30, 40), self, "key")
        self.connection.makeConnection(self.transport)
        self.successResultOf(self.connection.ready)

    def on_connection_idle(self, connection: UpstreamConnection) -> None:
        self.idle_count += 1

    def on_connection_lost(self, connection: UpstreamConnection) -> None:
        self.lost_count += 1

    def exchange(self, request: OutgoingRequest = GET) -> Deferred[Response]:
        return self.connection.exchange(request)

    def receive(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    def read(self, response: Response) -> bytes:
        return self.successResultOf(Deferred.fromCoroutine(response.read_all(1 << 20)))

    def lose_connection(self, error_type: type[Exception] = ConnectionDone) -> None:
        self.connection.connectionLost(Failure(error_type()))

    def test_response_is_parsed_in_any_segmentation(self) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nA: b\r\n\r\n"
        for response_bytes in (OK, chunked, interim + OK, interim + chunked):
            for size in range(1, len(response_bytes) + 1):
                pending = self.exchange()
                for start in range(0, len(response_bytes), size):
                    self.receive(response_bytes[start : start + size])
                self.assertEqual(self.read(self.successResultOf(pending)), b"hello")
        self.assertEqual(self.idle_count, sum(map(len, (OK, chunked, interim + OK, interim + chunked))))
        self.assertFalse(self.transport.disconnecting)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_nobody_reads_on_for_a_reader_that_has_left(self) -> None:
        """Otherwise the connection stays open for ever with a full buffer, which a server and a client can repeat."""
        for read in (lambda response: response.read_all(1 << 20), lambda response: response.discard()):
            self.setUp()
            pending = self.exchange()
            self.receive(OK[:-2])
            reading = Deferred.fromCoroutine(read(self.successResultOf(pending)))
            reading.addErrback(lambda failure: failure.trap(CancelledError))
            reading.cancel()
            self.assertTrue(self.transport.disconnected)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_connection_is_closed_if_the_server_says_so(self) -> None:
        for line in (b"Connection: Close\r\n", b"connection: x, close\r\n"):
            self.setUp()
            pending = self.exchange()
            self.receive(OK.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n", 1))
            self.assertEqual(self.read(self.successResultOf(pending)), b"hello")
            self.assertTrue(self.transport.disconnecting)
            self.assertEqual(self.idle_count, 0)
        self.setUp()
        pending = self.exchange()
        self.receive(OK.replace(b"1.1", b"1.0", 1))
        self.assertTrue(self.transport.disconnecting)

    def switch(self, head: bytes = SWITCH, rest: bytes = b"") -> Response:
        """Return the response with the status 101 to a request that asked for it."""
        pending = self.exchange(OutgoingRequest("GET", "http://a/", b"", protocols="websocket, x/1"))
        self.receive(head + rest)
        return self.successResultOf(pending)

    def test_connection_is_handed_over_after_a_switch_of_protocols(self) -> None:
        for rest in (b"", b"early"):
            self.setUp()
            response = self.switch(b"HTTP/1.1 103 Early Hints\r\n\r\n" + SWITCH, rest)
            self.assertEqual((response.status, response.headers.get("upgrade")), (101, "WebSocket"))
            self.assertEqual(self.transport.producerState, "paused")  # nothing is read that nobody takes
            protocol = AccumulatingProtocol()
            response.hand_over(protocol)
            self.assertEqual((protocol.data, protocol.transport), (rest, self.transport))
            self.assertIs(self.transport.protocol, protocol)
            self.assertEqual(self.transport.producerState, "producing")
            self.assertEqual((self.connection.alive, self.idle_count, self.lost_count), (False, 0, 1))
            self.assertEqual(self.clock.getDelayedCalls(), [])
            response.abort()
            self.connection.abort()
            self.assertFalse(self.transport.disconnected)  # it belongs to the protocol

    def test_a_switched_connection_that_nobody_takes_is_aborted(self) -> None:
        self.switch().abort()
        self.assertTrue(self.transport.disconnected)
        self.setUp()
        response = self.switch()
        self.clock.advance(30)
        self.assertTrue(self.transport.disconnected)
        self.assertRaises(UpstreamBroken, response.hand_over, AccumulatingProtocol())
        self.setUp()
        response = self.switch()
        self.lose_connection()
        self.assertRaises(UpstreamBroken, response.hand_over, AccumulatingProtocol())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_server_may_switch_only_to_requested_protocols(self) -> None:
        for protocols, upgrade in ((None, b"websocket"), ("websocket", b"h2c"), ("websocket", b"")):
            self.setUp()
            pending = self.exchange(OutgoingRequest("GET", "http://a/", b"", protocols=protocols))
            self.receive(SWITCH.replace(b"WebSocket", upgrade))
            self.failureResultOf(pending, UpstreamBroken)
            self.assertTrue(self.transport.disconnected)

    def test_server_may_not_switch_before_it_has_the_whole_request(self) -> None:
        body = ManualBodyProducer()
        pending = self.exchange(OutgoingRequest("POST", "http://a/", b"", body, protocols="websocket"))
        self.receive(SWITCH)
        self.failureResultOf(pending, UpstreamBroken)
        self.assertEqual(body.calls, ["stop"])

    def test_trailing_bytes_close_the_connection(self) -> None:
        for response_bytes in (OK + OK, OK + b"x", b"HTTP/1.1 204 No\r\n\r\nx"):
            self.setUp()
            pending = self.exchange()
            self.receive(response_bytes)
            self.successResultOf(pending)
            self.assertEqual(self.idle_count, 0)
            self.assertTrue(self.transport.disconnecting)

    def test_unsolicited_bytes_abort_the_connection(self) -> None:
        pending = self.exchange()
        self.receive(OK)
        self.successResultOf(pending)
        self.receive(OK)
        self.assertTrue(self.transport.disconnected)
        self.assertFalse(self.connection.alive)

    def test_invalid_responses_are_errors(self) -> None:
        invalid = [
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD,
            b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD // 20),
        ]
        for response_bytes in invalid:
            self.setUp()
            pending = self.exchange()
            self.receive(response_bytes)
            error = self.failureResultOf(pending, UpstreamBroken).value
            self.assertTrue(str(error).startswith("a:80: "), error)
            self.assertTrue(self.transport.disconnected)

    def test_invalid_chunks_are_an_error(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n")
        reading = Deferred.fromCoroutine(self.successResultOf(pending).read_all(9))
        self.assertIn("framing", str(self.failureResultOf(reading, UpstreamBroken).value))

    def test_repeated_equal_lengths_are_one(self) -> None:
        pending = self.exchange()
        self.receive(OK.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", 1))
        self.assertEqual(self.successResultOf(pending).length, 5)

    def test_both_framings_close_the_connection(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
        response = self.successResultOf(pending)
        self.assertIs(response.length, None)
        self.assertEqual(self.read(response), b"a")
        self.assertEqual(self.idle_count, 0)

    def test_slow_reader_pauses_the_connection(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 600000\r\n\r\n")
        response = self.successResultOf(pending)
        self.receive(bytes(262144))
        self.assertEqual(self.transport.producerState, "producing")
        self.receive(bytes(1))
        self.assertEqual(self.transport.producerState, "paused")
        self.clock.advance(3600)  # a slow reader must not cause a read time-out
        self.assertEqual(len(self.successResultOf(Deferred.fromCoroutine(response.read_chunk()))), 262145)
        self.assertEqual(self.transport.producerState, "producing")
        self.clock.advance(29)
        self.receive(bytes(600000 - 262145))
        self.assertEqual(self.idle_count, 1)
        self.assertEqual(self.transport.producerState, "producing")  # ready for the next exchange
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_read_ahead_is_limited(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        response = self.successResultOf(pending)
        response.limit_read_ahead(1000)
        self.receive(bytes(1000))
        self.assertEqual(self.transport.producerState, "producing")
        self.receive(b"1")
        self.assertEqual(self.transport.producerState, "paused")

    def test_the_connection_is_read_in_small_pieces_unless_memory_for_long_ones_is_counted(self) -> None:
        """Thousands of responses can arrive at the same time. Each could otherwise take half a MiB at once."""
        small, large = 16 * 1024, 64 * 1024  # without TLS
        scarce = BufferBudget("bytes", 10, 5).of_client("192.0.2.1")
        scarce.add(6)
        for allow, size in (
            (lambda response: response.limit_read_ahead(256 * 1024), large),
            (lambda response: response.limit_read_ahead(100 * 1024), small),
            (lambda response: response.count_for(BufferBudget("bytes", 10, 5).of_client("192.0.2.1")), large),
            (lambda response: response.count_for(scarce), small),
        ):
            self.setUp()
            pending = self.exchange()
            self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
            response = self.successResultOf(pending)
            self.assertEqual(self.transport.bufferSize, small)
            allow(response)
            self.assertEqual(self.transport.bufferSize, size)
            self.receive(b"hello")
            self.assertEqual(self.transport.bufferSize, small)

    def test_read_pieces_waits_briefly_for_more(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        response = self.successResultOf(pending)

        def read() -> Deferred[list[bytes]]:
            return Deferred.fromCoroutine(response.read_pieces(1000, 0.5))

        reading = read()
        self.receive(b"a" * 600)
        self.assertNoResult(reading)
        self.receive(b"b" * 600)
        self.assertEqual(self.successResultOf(reading), [b"a" * 600, b"b" * 600])
        reading = read()
        self.receive(b"c")
        self.clock.advance(0.4)
        self.assertNoResult(reading)
        self.clock.advance(0.1)
        self.assertEqual(self.successResultOf(reading), [b"c"])
        reading = read()
        self.clock.advance(1)
        self.assertNoResult(reading)
        self.receive(b"d")
        self.assertEqual(self.successResultOf(reading), [b"d"])
        reading = read()
        self.receive(b"e" * (5000 - 1202))
        self.assertEqual(self.successResultOf(reading), [b"e" * (5000 - 1202)])
        self.assertEqual(self.successResultOf(read()), [])
        timers = [call for call in self.clock.getDelayedCalls() if call.getTime() - self.clock.seconds() <= 0.5]
        self.assertEqual(timers, [])

    def test_silence_times_out(self) -> None:
        pending = self.exchange()
        self.receive(OK[:-5])
        response = self.successResultOf(pending)
        for byte in (b"h", b"e"):
            self.clock.advance(29)
            self.receive(byte)
        chunk = Deferred.fromCoroutine(response.read_chunk())
        self.assertEqual(self.successResultOf(chunk), b"he")
        chunk = Deferred.fromCoroutine(response.read_chunk())
        self.clock.advance(29)
        self.assertNoResult(chunk)
        self.clock.advance(1)
        self.failureResultOf(chunk, UpstreamTimeout)
        self.assertTrue(self.transport.disconnected)

    def test_connection_dropped_before_the_first_byte(self) -> None:
        pending = self.exchange()
        self.lose_connection()
        self.failureResultOf(pending, ConnectionDropped)
        self.setUp()
        pending = self.exchange()
        self.receive(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.lose_connection()
        self.assertNotIsInstance(self.failureResultOf(pending, UpstreamBroken).value, ConnectionDropped)
        self.assertEqual(self.lost_count, 1)

    def test_body_without_a_length_ends_with_the_connection(self) -> None:
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\n\r\nabc")
        self.lose_connection()
        self.assertEqual(self.read(self.successResultOf(pending)), b"abc")
        self.setUp()
        pending = self.exchange()
        self.receive(b"HTTP/1.1 200 OK\r\n\r\nabc")
        self.lose_connection(ConnectionLost)
        reading = Deferred.fromCoroutine(self.successResultOf(pending).read_all(9))
        self.failureResultOf(reading, UpstreamBroken)

    def test_truncated_body_is_an_error(self) -> None:
        pending = self.exchange()
        self.receive(OK[:-1])
        self.lose_connection()
        reading = Deferred.fromCoroutine(self.successResultOf(pending).read_all(9))
        self.assertIn("4 of 5 bytes", str(self.failureResultOf(reading, UpstreamBroken).value))

    def test_cancelling_aborts_the_connection(self) -> None:
        pending = self.exchange()
        pending.cancel()
        self.failureResultOf(pending, CancelledError)
        self.assertTrue(self.transport.disconnected)

    def test_abort_affects_only_its_own_response(self) -> None:
        pending = self.exchange()
        self.receive(OK)
        first = self.successResultOf(pending)
        pending = self.exchange()
        first.abort()
        self.assertFalse(self.transport.disconnected)
        self.receive(OK[:-1])
        second = self.successResultOf(pending)
        second.abort()
        self.assertTrue(self.transport.disconnected)

    def test_early_error_response_stops_the_body(self) -> None:
        body = ManualBodyProducer()
        pending = self.exchange(OutgoingRequest("PUT", "http://a/", b"PUT / HTTP/1.1\r\n\r\n", body))
        body.consumer.write(b"x" * 10)
        self.receive(OK.replace(b"200", b"401", 1))
        response = self.successResultOf(pending)
        self.assertEqual((response.status, self.read(response)), (401, b"hello"))
        self.assertEqual(body.calls, ["stop"])
        self.assertEqual(self.idle_count, 0)
        body.consumer.write(b"more")  # from a producer that has not handled the stop yet
        self.assertEqual(self.transport.value(), b"PUT / HTTP/1.1\r\n\r\n" + b"x" * 10)

    def test_interim_response_does_not_stop_the_body(self) -> None:
        body = ManualBodyProducer()
        self.exchange(OutgoingRequest("PUT", "http://a/", b"", body))
        self.receive(b"HTTP/1.1 102 Processing\r\n\r\n")
        self.assertEqual(body.calls, [])

    def test_read_timeout_starts_after_the_body(self) -> None:
        body = ManualBodyProducer()
        pending = self.exchange(OutgoingRequest("PUT", "http://a/", b"", body))
        self.clock.advance(3600)  # a slow client must not cause a read time-out
        body.consumer.write(bytes(1000))
        body.done.callback(None)
        self.clock.advance(29)
        self.assertNoResult(pending)
        self.clock.advance(1)
        self.failureResultOf(pending, UpstreamTimeout)

    def test_stalled_upload_times_out(self) -> None:
        body = ManualBodyProducer()
        pending = self.exchange(OutgoingRequest("PUT", "http://a/", b"", body))
        body_writer = self.transport.producer
        body_writer.pauseProducing()
        self.clock.advance(39)
        body_writer.resumeProducing()
        self.clock.advance(100)
        body_writer.pauseProducing()
        self.assertEqual(body.calls, ["pause", "resume", "pause"])
        self.assertNoResult(pending)
        self.clock.advance(40)
        self.failureResultOf(pending, UpstreamTimeout)
        self.assertEqual(body.calls[-1], "stop")

    # content: what its digest decides

    def receive_all(self, head: str, body: bytes, error_type: type[Exception] = ConnectionLost) -> Response:
        """Receive a response, after which the connection is lost."""
        pending = self.exchange()
        self.receive(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body)
        response = self.successResultOf(pending)
        self.lose_connection(error_type)
        return response

    def read_digest(self, response: Response, digest: Digest | None, limit: int = 1 << 20) -> Deferred[bytes]:
        return Deferred.fromCoroutine(response.read_all(limit, digest))

    def test_content_with_a_digest_is_complete_whatever_its_framing(self) -> None:
        chunked = b"5\r\nhello\r\n"
        for head, body in (
            ("", b"hello"),  # TLS that ends without close_notify
            ("Content-Length: 9\r\n", b"hello"),
            ("Transfer-Encoding: chunked\r\n", chunked),
            ("Transfer-Encoding: chunked\r\n", chunked + b"0\r\n"),
            ("Content-Encoding: gzip\r\n", gzip.compress(b"hello")),
            ("Content-Encoding: gzip\r\nContent-Length: 99\r\n", gzip.compress(b"hello")),
        ):
            self.setUp()
            response = self.receive_all(head, body)
            self.assertEqual(self.successResultOf(self.read_digest(response, Digest.of(b"hello"))), b"hello")
            for digest in (None, Digest.of(b"hell")):
                self.setUp()
                response = self.receive_all(head, body)
                self.failureResultOf(self.read_digest(response, digest), ResponseCutOff)

    def test_codings_are_undone(self) -> None:
        content = b"hello" * 1000
        for coding, coded in (
            ("gzip", gzip.compress(content)),
            ("X-Gzip", gzip.compress(content)),
            ("deflate", zlib.compress(content)),
            ("deflate, gzip", gzip.compress(zlib.compress(content))),
            ("identity", content),
            ("", content),
        ):
            for digest in (None, Digest.of(content)):
                self.setUp()
                head = f"Content-Encoding: {coding}\r\nContent-Length: {len(coded)}\r\n"
                response = self.receive_all(head, coded, ConnectionDone)
                self.assertEqual(self.successResultOf(self.read_digest(response, digest)), content)

    def test_a_coding_that_is_not_there(self) -> None:
        """Files that are gzip themselves, of which an object store says so, and JSON with a wrong field."""
        for content, digest in (
            (gzip.compress(b"hello"), Digest.of(gzip.compress(b"hello"))),
            (b"plain", Digest.of(b"plain")),
            (b'{"a": 1}', None),
        ):
            self.setUp()
            response = self.receive_all("Content-Encoding: gzip\r\n", content, ConnectionDone)
            self.assertEqual(self.successResultOf(self.read_digest(response, digest)), content)

    def test_bad_codings(self) -> None:
        for body in (b"plain", gzip.compress(b"hello")[:-1], gzip.compress(bytes(1 << 20)), b""):
            self.setUp()
            response = self.receive_all(f"Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n", body)
            self.failureResultOf(self.read_digest(response, Digest.of(b"hello"), 10_000), UpstreamBroken)

    def test_an_unknown_coding_is_the_content(self) -> None:
        response = self.receive_all("Content-Encoding: br\r\n", b"hello", ConnectionDone)
        self.assertEqual(self.successResultOf(self.read_digest(response, None)), b"hello")
