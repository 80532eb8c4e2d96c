"""Timeouts of HTTPChannel, on a Clock."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.request import ClientDisconnected, Request
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
