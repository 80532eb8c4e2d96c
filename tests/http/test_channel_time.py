"""How long a client may take for what, under a clock that the tests turn."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.request import ClientGone, Request
from tests.http.kit.in_memory import GET, TIMEOUTS, Door, Downloads, Handler, Slow, Uploads, echo


class TimeOuts(SynchronousTestCase):
    def setUp(self) -> None:
        self.tick = TIMEOUTS.tick
        self.slow = Slow()
        self.door = Door(self.slow)
        self.client = self.door.client()

    def open_for(self, seconds: float, send: bytes = b"", every: float = 1) -> None:
        """Let time go by, the client sending something now and then; see that the connection is still open."""
        for _ in range(int(seconds / every)):
            self.assertFalse(self.client.wire.disconnecting)
            self.door.clock.advance(every)
            if send:
                self.client.send(send)
        self.assertFalse(self.client.wire.disconnecting)

    def finish(self) -> None:
        self.slow.waiting[-1].callback(None)

    def test_no_request_at_all(self) -> None:
        self.open_for(TIMEOUTS.header - 1)
        self.door.clock.advance(1)
        self.assertTrue(self.client.closed)
        self.assertEqual(self.client.wire.value(), b"")

    def test_between_requests(self) -> None:
        self.client.send(GET % 1)
        self.open_for(1000)
        self.finish()
        self.open_for(TIMEOUTS.keepalive - 1)
        self.client.send(GET % 2)
        self.finish()
        self.open_for(TIMEOUTS.keepalive - 1)
        self.door.clock.advance(1)
        self.assertTrue(self.client.closed)
        self.assertEqual(self.client.statuses, [200, 200])

    def test_drop_by_drop(self) -> None:
        """A byte now and then does not extend the time for a head: else they would hold a connection for ever."""
        self.open_for(TIMEOUTS.header - 1, b"A")
        self.assertEqual(self.client.wire.value(), b"")
        self.door.clock.advance(1)
        self.assertEqual(self.client.statuses, [408])
        self.door.clock.advance(5)
        self.assertTrue(self.client.closed)
        self.assertEqual(self.door.logged, [])

    def test_empty_lines_drop_by_drop(self) -> None:
        self.open_for(TIMEOUTS.header - 1, b"\r\n")
        self.door.clock.advance(1)
        self.assertTrue(self.client.closed)

    def test_empty_lines_between_requests(self) -> None:
        self.client.send(GET % 1)
        self.finish()
        for byte in b"\r\n" * (int(TIMEOUTS.keepalive) // 2):
            self.client.send(bytes([byte]))
            self.door.clock.advance(1)
        self.assertTrue(self.client.closed)
        self.assertEqual(self.client.statuses, [200])

    def test_a_later_head(self) -> None:
        self.client.send(GET % 1)
        self.finish()
        self.open_for(200)
        self.client.send(b"G")
        self.open_for(TIMEOUTS.header - 1, b"G")
        self.door.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [200, 408])

    def test_half_a_pipelined_head_counts_from_the_answer_before(self) -> None:
        self.client.send(GET % 1 + b"GET ")
        self.open_for(1000)
        self.finish()
        self.open_for(TIMEOUTS.header - 1)
        self.door.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [200, 408])

    def test_our_own_time_is_not_the_clients(self) -> None:
        self.client.send(GET % 1)
        self.open_for(100_000, every=10)
        self.finish()
        self.assertEqual(self.client.statuses, [200])
        self.assertEqual(self.door.logged, [("/1", 200, 2, 100_000.0)])

    def serve(self, handler: Handler) -> None:
        self.door = Door(handler)
        self.client = self.door.client()

    def test_a_body_that_stops(self) -> None:
        self.serve(echo)
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        self.open_for(500, b"x", every=10)
        self.open_for(TIMEOUTS.body - 1)
        self.assertEqual(self.client.wire.value(), b"")
        self.door.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [408])
        self.assertEqual([status for _, status, *_ in self.door.logged], [408])
        self.door.clock.advance(5)
        self.assertTrue(self.client.closed)

    def test_a_body_that_we_held_back(self) -> None:
        """The client's time begins when it is its turn: here the reader was away for long, the transport paused."""
        uploads = Uploads()
        self.serve(uploads)
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n")
        self.client.send(b"x" * 300_000)
        self.assertTrue(self.client.wire.paused)
        self.open_for(10 * TIMEOUTS.body - 0.5, every=0.5)
        uploads.go.callback(None)
        self.open_for(TIMEOUTS.body - 1)
        self.client.send(b"x" * 100_000)
        self.assertEqual(self.client.statuses, [201])

    def stalled(self) -> Downloads:
        downloads = Downloads(1 << 40)

        async def handle(request: Request) -> None:
            self.client.stop_reading()
            await downloads(request)

        self.serve(handle)
        self.client.send(GET % 1)
        return downloads

    def test_a_client_that_stops_reading(self) -> None:
        downloads = self.stalled()
        self.open_for(TIMEOUTS.send)
        self.door.clock.advance(self.tick)
        self.assertTrue(self.client.wire.aborted)
        self.client.leave()
        self.assertEqual(downloads.written, 1000)
        self.assertEqual([type(error) for error in downloads.ended], [ClientGone])
        self.assertEqual([(path, size) for path, _, size, _ in self.door.logged], [("/1", 1000)])
        self.assertEqual(self.door.clock.getDelayedCalls(), [])

    def test_a_client_that_reads_slowly(self) -> None:
        self.stalled()
        for _ in range(50):
            self.client.wire.sent += 1
            self.open_for(TIMEOUTS.send - 1)
        self.door.clock.advance(1 + self.tick)
        self.assertTrue(self.client.wire.aborted)

    def test_a_client_that_does_not_take_the_rest(self) -> None:
        """The answer has ended and the connection is to be closed; that must not last for ever either."""
        self.client.send(b"GET /1 HTTP/1.0\r\n\r\n")
        self.client.stop_reading()
        self.finish()
        self.assertTrue(self.client.closed)
        self.door.clock.advance(TIMEOUTS.send - 1)
        self.client.wire.sent += 1
        self.door.clock.pump([self.tick] * 4)
        self.assertFalse(self.client.wire.aborted)
        self.door.clock.pump([self.tick] * 2)
        self.assertTrue(self.client.wire.aborted)

    def test_a_client_that_does_not_take_the_rest_and_could_ask_more(self) -> None:
        self.client.send(GET % 1)
        self.client.stop_reading()
        self.finish()
        self.door.clock.pump([self.tick] * 6)
        self.assertTrue(self.client.wire.aborted)
