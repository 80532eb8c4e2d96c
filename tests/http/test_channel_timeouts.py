"""Timeouts of HTTPChannel, on a Clock."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.http.site import ServerTimeouts
from tests.http.support.in_memory import (
    GET,
    TIMEOUTS,
    BlockingHandler,
    DownloadHandler,
    Handler,
    InMemoryServer,
    UploadHandler,
    echo,
)

MIN_RATE = ServerTimeouts()


class ChannelTimeoutTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.tick = TIMEOUTS.tick
        self.handler = BlockingHandler()
        self.server = InMemoryServer(self.handler)
        self.client = self.server.client()

    def assert_open_for(self, seconds: float, send: bytes = b"", interval: float = 1) -> None:
        """Advance the clock by `seconds`, send `send` after each interval, and assert that the connection is open."""
        for _ in range(int(seconds / interval)):
            self.assertFalse(self.client.transport.disconnecting)
            self.server.clock.advance(interval)
            if send:
                self.client.send(send)
        self.assertFalse(self.client.transport.disconnecting)

    def finish_response(self) -> None:
        self.handler.waiters[-1].callback(None)

    def test_connection_without_request_times_out(self) -> None:
        self.assert_open_for(TIMEOUTS.header - 1)
        self.server.clock.advance(1)
        self.assertTrue(self.client.closed_cleanly)
        self.assertEqual(self.client.transport.value(), b"")

    def test_keepalive_timeout_between_requests(self) -> None:
        self.client.send(GET % 1)
        self.assert_open_for(1000)
        self.finish_response()
        self.assert_open_for(TIMEOUTS.keepalive - 1)
        self.client.send(GET % 2)
        self.finish_response()
        self.assert_open_for(TIMEOUTS.keepalive - 1)
        self.server.clock.advance(1)
        self.assertTrue(self.client.closed_cleanly)
        self.assertEqual(self.client.statuses, [200, 200])

    def test_bytes_do_not_extend_the_header_timeout(self) -> None:
        """Otherwise a client could keep a connection open forever with an occasional byte."""
        self.assert_open_for(TIMEOUTS.header - 1, b"A")
        self.assertEqual(self.client.transport.value(), b"")
        self.server.clock.advance(1)
        self.assertEqual(self.client.statuses, [408])
        self.server.clock.advance(5)
        self.assertTrue(self.client.closed_cleanly)
        self.assertEqual(self.server.logged, [])

    def test_empty_lines_do_not_extend_the_header_timeout(self) -> None:
        self.assert_open_for(TIMEOUTS.header - 1, b"\r\n")
        self.server.clock.advance(1)
        self.assertTrue(self.client.closed_cleanly)

    def test_empty_lines_do_not_extend_keepalive(self) -> None:
        self.client.send(GET % 1)
        self.finish_response()
        for byte in b"\r\n" * (int(TIMEOUTS.keepalive) // 2):
            self.client.send(bytes([byte]))
            self.server.clock.advance(1)
        self.assertTrue(self.client.closed_cleanly)
        self.assertEqual(self.client.statuses, [200])

    def test_header_timeout_applies_to_a_later_request(self) -> None:
        self.client.send(GET % 1)
        self.finish_response()
        self.assert_open_for(200)
        self.client.send(b"G")
        self.assert_open_for(TIMEOUTS.header - 1, b"G")
        self.server.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [200, 408])

    def test_header_timeout_of_a_pipelined_request_starts_after_the_response(self) -> None:
        self.client.send(GET % 1 + b"GET ")
        self.assert_open_for(1000)
        self.finish_response()
        self.assert_open_for(TIMEOUTS.header - 1)
        self.server.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [200, 408])

    def test_no_timeout_while_the_handler_runs(self) -> None:
        self.client.send(GET % 1)
        self.assert_open_for(100_000, interval=10)
        self.finish_response()
        self.assertEqual(self.client.statuses, [200])
        self.assertEqual(self.server.logged, [("/1", 200, 2, 100_000.0)])

    def serve(self, handler: Handler) -> None:
        self.server = InMemoryServer(handler)
        self.client = self.server.client()

    def test_body_timeout_is_a_408(self) -> None:
        self.serve(echo)
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        self.assert_open_for(500, b"x", interval=10)
        self.assert_open_for(TIMEOUTS.body - 1)
        self.assertEqual(self.client.transport.value(), b"")
        self.server.clock.advance(1 + self.tick)
        self.assertEqual(self.client.statuses, [408])
        self.assertEqual([status for _, status, *_ in self.server.logged], [408])
        self.server.clock.advance(5)
        self.assertTrue(self.client.closed_cleanly)

    def test_body_timeout_excludes_back_pressure(self) -> None:
        """The timeout does not run while the transport is paused because the handler does not read."""
        upload_handler = UploadHandler()
        self.serve(upload_handler)
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n")
        self.client.send(b"x" * 300_000)
        self.assertTrue(self.client.transport.paused)
        self.assert_open_for(10 * TIMEOUTS.body - 0.5, interval=0.5)
        upload_handler.proceed.callback(None)
        self.assert_open_for(TIMEOUTS.body - 1)
        self.client.send(b"x" * 100_000)
        self.assertEqual(self.client.statuses, [201])

    def start_stalled_download(self) -> DownloadHandler:
        download_handler = DownloadHandler(1 << 40)

        async def handle(request: Request) -> None:
            self.client.stop_reading()
            await download_handler(request)

        self.serve(handle)
        self.client.send(GET % 1)
        return download_handler

    def test_send_timeout_aborts(self) -> None:
        download_handler = self.start_stalled_download()
        self.assert_open_for(TIMEOUTS.send)
        self.server.clock.advance(self.tick)
        self.assertTrue(self.client.transport.aborted)
        self.client.disconnect()
        self.assertEqual(download_handler.written, 1000)
        self.assertEqual([type(error) for error in download_handler.errors], [ClientDisconnected])
        self.assertEqual([(path, size) for path, _, size, _ in self.server.logged], [("/1", 1000)])
        self.assertEqual(self.server.clock.getDelayedCalls(), [])

    def test_progress_extends_the_send_timeout(self) -> None:
        self.start_stalled_download()
        for _ in range(50):
            self.client.transport.sent += 1
            self.assert_open_for(TIMEOUTS.send - 1)
        self.server.clock.advance(1 + self.tick)
        self.assertTrue(self.client.transport.aborted)

    def test_a_body_of_one_byte_each_59_seconds_keeps_nothing(self) -> None:
        self.server = InMemoryServer(echo, MIN_RATE)
        self.client = self.server.client()
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        self.assert_open_for(59, interval=1)
        self.client.send(b"x")
        self.server.clock.pump([1.0] * 30)
        self.assertEqual(self.client.statuses, [408])
        self.assertIn(b"less than 500 bytes a second (CLIENT_MIN_RATE)", self.client.transport.value())

    def test_a_slow_link_may_send_a_body(self) -> None:
        self.server = InMemoryServer(echo, MIN_RATE)
        self.client = self.server.client()
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n")
        self.assert_open_for(1000, b"x" * 600)

    def test_a_body_that_the_handler_does_not_read_has_no_lowest_rate(self) -> None:
        """The handler is slow (a full disk queue, a slow upstream): the client has nothing to do."""
        upload_handler = UploadHandler()
        self.server = InMemoryServer(upload_handler, MIN_RATE)
        self.client = self.server.client()
        self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n")
        self.client.send(b"x" * 300_000)
        self.assert_open_for(1000)
        upload_handler.proceed.callback(None)
        self.assert_open_for(30)
        self.client.send(b"x" * 100_000)
        self.assertEqual(self.client.statuses, [201])

    def test_each_body_has_its_own_rate(self) -> None:
        """A connection on which small requests with bodies follow each other is not slow."""
        self.server = InMemoryServer(echo, MIN_RATE)
        self.client = self.server.client()
        for _ in range(20):
            self.client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx")
            self.assert_open_for(20)
            self.client.send(b"y")
        self.assertEqual(self.client.statuses, [200] * 20)

    def read_slowly(self, rate: int) -> float:
        """Read `rate` bytes a second of an endless response. Return the seconds until the connection is closed."""
        self.server = InMemoryServer(self.stalled_handler, MIN_RATE)
        self.client = self.server.client()
        self.client.send(GET % 1)
        while not self.client.transport.aborted and self.server.clock.seconds() < 600:
            self.server.clock.advance(1)
            self.client.transport.sent += rate
        return self.server.clock.seconds()

    async def stalled_handler(self, request: Request) -> None:
        self.client.stop_reading()
        await DownloadHandler(1 << 40)(request)

    def test_a_reader_slower_than_the_lowest_rate_is_closed(self) -> None:
        self.assertLessEqual(self.read_slowly(499), 60 + 2 * MIN_RATE.tick)
        self.assertEqual(self.read_slowly(501), 600)

    def test_a_reader_is_measured_only_while_a_response_waits_for_it(self) -> None:
        """A response that upstream delivers at 10 bytes a second is not the client's fault."""
        handler = BlockingHandler()
        self.server = InMemoryServer(handler, MIN_RATE)
        self.client = self.server.client()
        self.client.send(GET % 1)
        for _ in range(100):
            self.client.stop_reading()
            self.server.clock.advance(1)
            self.client.resume_reading()
            self.assert_open_for(9)
        handler.waiters[0].callback(None)
        self.assertEqual(self.client.statuses, [200])

    def test_send_timeout_applies_while_closing(self) -> None:
        """The timeout also limits the flush after the last response of a connection."""
        self.client.send(b"GET /1 HTTP/1.0\r\n\r\n")
        self.client.stop_reading()
        self.finish_response()
        self.assertTrue(self.client.closed_cleanly)
        self.server.clock.advance(TIMEOUTS.send - 1)
        self.client.transport.sent += 1
        self.server.clock.pump([self.tick] * 4)
        self.assertFalse(self.client.transport.aborted)
        self.server.clock.pump([self.tick] * 2)
        self.assertTrue(self.client.transport.aborted)

    def test_send_timeout_applies_after_a_keepalive_response(self) -> None:
        self.client.send(GET % 1)
        self.client.stop_reading()
        self.finish_response()
        self.server.clock.pump([self.tick] * 6)
        self.assertTrue(self.client.transport.aborted)
