"""Request bodies of HTTPChannel: reading, 100 (Continue), discarding and back-pressure."""

from __future__ import annotations

import gc
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import BadRequest
from dockerproxy.http.request import ClientDisconnected, Request
from tests.http.support.in_memory import (
    DISCARD_LIMIT,
    GET,
    DownloadHandler,
    InMemoryClient,
    InMemoryServer,
    UploadHandler,
    echo,
    ignore_body,
)


class RequestBodyTests(SynchronousTestCase):
    def test_read_all_is_bounded(self) -> None:
        async def handle(request: Request) -> None:
            await request.read_all(10)

        client = InMemoryServer(handle).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n12345678901")
        self.assertEqual(client.statuses, [413])

    def test_stalled_bodies_of_all_clients_are_bounded(self) -> None:
        """Each client stops a byte before the handler's read of 256 KiB would return."""
        stored = 0

        async def handle(request: Request) -> None:
            nonlocal stored
            while data := await request.read_chunk(256 * 1024):
                stored += len(data)

        server = InMemoryServer(handle)
        budget = server.site.budgets.requests.shares
        clients = [server.client() for _ in range(300)]
        sent, piece = 0, bytes(64 * 1024)
        for client in clients:
            client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
            for data in (piece, piece, piece, piece[1:]):
                client.send(data)
                sent += len(data)
                self.assertLessEqual(budget.used, 32 * 1024 * 1024)
        self.assertEqual(budget.used + stored, sent)
        self.assertGreater(stored, 0)
        for client in clients:
            client.disconnect()
        del client
        clients.clear()
        gc.collect()
        self.assertEqual(budget.used, 0)

    def test_long_heads_count_until_they_are_complete_or_given_up(self) -> None:
        server = InMemoryServer(echo)
        budget = server.site.budgets.requests.shares
        part = b"GET /1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 8000
        endings: dict[str, Callable[[InMemoryClient], object]] = {
            "complete": lambda client: client.send(b"\r\n\r\n"),
            "invalid": lambda client: client.send(b"\r\n : \r\n\r\n"),
            "lost": lambda client: client.disconnect(),
            "timeout": lambda client: server.clock.advance(100),
            "drain": lambda client: server.site.drain(),
        }
        for name, end in endings.items():
            client = server.client()
            client.send(part)
            self.assertEqual(budget.used, len(part), name)
            end(client)
            self.assertEqual(budget.used, 0, name)

    def test_a_long_head_is_refused_if_others_take_too_much_memory(self) -> None:
        server = InMemoryServer(echo)
        clients = [server.client() for _ in range(3)]
        budget = server.site.budgets.requests
        budget.of_client(clients[0].channel.client).add(budget.shares.share)
        clients[0].send(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 3000)
        self.assertEqual(clients[0].transport.value(), b"")
        clients[1].send(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000)
        self.assertEqual(clients[1].statuses, [429])
        self.assertEqual(clients[1].responses[0].fields["Retry-After"], "1")
        self.assertEqual(budget.shares.used, budget.shares.share)
        clients[2].send(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000 + b"\r\n\r\n")  # it was not incomplete
        self.assertEqual(clients[2].statuses, [200])

    def test_broken_framing_raises_in_the_reader(self) -> None:
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        client.send(b"z\r\n")
        upload_handler.proceed.callback(None)
        self.assertEqual(upload_handler.body, b"hello")
        self.assertIsInstance(upload_handler.error, BadRequest)
        self.assertEqual(client.statuses, [400])

    def test_request_without_body(self) -> None:
        results: list[tuple[bool, bytes]] = []

        async def handle(request: Request) -> None:
            results.append((request.has_body, await request.read_chunk()))
            request.respond(200, [])

        client = InMemoryServer(handle).client()
        client.send(GET % 1 + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(results, [(False, b""), (False, b"")])

    def test_path_and_query(self) -> None:
        results: list[tuple[str, str]] = []

        async def handle(request: Request) -> None:
            results.append((request.path, request.query))
            request.respond(200, [])

        InMemoryServer(handle).client().send(b"GET /a%2Fb?n=1?2 HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(results, [("/a%2Fb", "n=1?2")])


class ExpectContinueTests(SynchronousTestCase):
    HEAD = b"PUT /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

    def test_continue_is_sent_once_when_the_body_is_read(self) -> None:
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        client.send(self.HEAD)
        self.assertEqual(client.transport.value(), b"")
        upload_handler.proceed.callback(None)
        self.assertEqual(client.transport.value(), self.CONTINUE)
        client.send(b"he")
        client.send(b"llo")
        self.assertEqual(client.statuses, [100, 201])
        self.assertEqual(upload_handler.body, b"hello")
        self.assertFalse(client.transport.disconnecting)

    def test_no_continue_if_the_body_is_not_read(self) -> None:
        """The connection closes, because the client may or may not send the body (RFC 9110, section 10.1.1)."""
        server = InMemoryServer(ignore_body)
        client = server.client()
        client.send(self.HEAD)
        self.assertEqual(client.statuses, [200])
        self.assertEqual(client.responses[0].fields["Connection"], "close")
        client.send(GET % 2)
        self.assertEqual(len(server.logged), 1)
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_no_continue_for_http_1_0(self) -> None:
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        client.send(self.HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"))
        upload_handler.proceed.callback(None)
        self.assertEqual(client.transport.value(), b"")

    def test_no_continue_without_a_body(self) -> None:
        client = InMemoryServer(echo).client()
        client.send(self.HEAD.replace(b"Content-Length: 5", b"Content-Length: 0"))
        self.assertEqual(client.statuses, [200])
        self.assertFalse(client.transport.disconnecting)

    def test_no_continue_after_the_response_started(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 2)
            await request.read_chunk()

        client = InMemoryServer(handle).client()
        client.send(self.HEAD)
        self.assertEqual(client.transport.value().count(b"HTTP/1.1"), 1)


class UnreadBodyTests(SynchronousTestCase):
    def post(self, length: int, *, chunked: bool = False) -> tuple[bytes, bytes]:
        body = b"x" * length
        if chunked:
            return (
                b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"%x\r\n%b\r\n0\r\n\r\n" % (length, body),
            )
        return b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length, body

    def test_short_body_is_discarded(self) -> None:
        for chunked in (False, True):
            client = InMemoryServer(ignore_body).client()
            for _ in range(20):  # the limit applies to each body separately
                head, body = self.post(DISCARD_LIMIT // 2, chunked=chunked)
                client.send(head)
                for start in range(0, len(body), 10_000):
                    client.send(body[start : start + 10_000])
            client.send(GET % 2)
            self.assertEqual(client.statuses, [200] * 21)
            self.assertFalse(client.transport.disconnecting)
            self.assertNotIn("Connection", client.responses[0].fields)

    def test_long_body_closes_the_connection(self) -> None:
        server = InMemoryServer(ignore_body)
        client = server.client()
        head, body = self.post(DISCARD_LIMIT + 100_000)
        client.send(head + body[:1000])
        self.assertEqual(client.responses[0].fields["Connection"], "close")
        # If the connection were closed now, the client could not read the response, because it is still sending.
        client.send(body[1000:])
        client.send(GET % 2)
        self.assertFalse(client.transport.disconnecting)
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)
        self.assertEqual(client.statuses, [200])

    def test_long_chunked_body_closes_the_connection(self) -> None:
        server = InMemoryServer(ignore_body)
        client = server.client()
        head, body = self.post(2 * DISCARD_LIMIT, chunked=True)
        client.send(head)
        for start in range(0, len(body), 10_000):
            client.send(body[start : start + 10_000])
        client.send(GET % 2)
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)
        self.assertEqual(client.statuses, [200])

    def test_chunk_extensions_count_as_discarded(self) -> None:
        """A chunk of one byte may have an extension of 1000 bytes."""
        server = InMemoryServer(ignore_body)
        client = server.client()
        client.send(self.post(1, chunked=True)[0])
        for _ in range(DISCARD_LIMIT // 1000 + 1):
            client.send(b"1;" + b"x" * 1000 + b"\r\nx\r\n")
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_discarding_times_out(self) -> None:
        server = InMemoryServer(ignore_body)
        client = server.client()
        client.send(self.post(100)[0] + b"x")
        for _ in range(10):
            self.assertFalse(client.transport.disconnecting)
            client.send(b"x")
            server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_broken_framing_of_an_unread_body_closes_the_connection(self) -> None:
        server = InMemoryServer(ignore_body)
        client = server.client()
        client.send(self.post(5, chunked=True)[0])
        client.send(b"zz\r\n" + GET % 2)
        self.assertEqual(client.statuses, [200])
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_the_last_response_is_not_lost_by_a_reset(self) -> None:
        """After broken framing, the handler responds while the client goes on sending. All of that is dropped."""
        upload_handler = UploadHandler()
        server = InMemoryServer(upload_handler)
        client = server.client()
        client.send(self.post(5, chunked=True)[0])
        client.send(b"zz\r\n")
        assert upload_handler.request is not None
        upload_handler.request.respond(403, [])
        client.send(b"more of it" + GET % 2)
        self.assertEqual(client.statuses, [403])
        self.assertFalse(client.transport.disconnecting)
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_reading_a_discarded_body_fails(self) -> None:
        """A partly discarded body must not look complete to a handler that still reads it."""
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        client.send(self.post(10)[0] + b"12345")
        upload_handler.proceed.callback(None)
        assert upload_handler.request is not None
        upload_handler.request.respond(403, [])
        client.send(b"67890" + GET % 2)
        self.assertEqual(upload_handler.body, b"12345")
        self.assertIsInstance(upload_handler.error, ClientDisconnected)
        self.assertEqual(client.statuses, [403, 201])

    def test_buffered_bytes_do_not_block_the_connection(self) -> None:
        """The handler responds while its unread body has paused the transport. The rest of the body is short."""
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        head, body = self.post(500_000)
        client.send(head)
        client.send(body[:400_000])
        self.assertTrue(client.transport.paused)
        assert upload_handler.request is not None
        upload_handler.request.respond(403, [])
        self.assertFalse(client.transport.paused)
        client.send(body[400_000:])
        upload_handler.proceed.callback(None)
        client.send(GET % 2)
        self.assertEqual(client.statuses, [403, 201])
        self.assertFalse(client.transport.disconnecting)


class BackPressureTests(SynchronousTestCase):
    def test_unread_request_body_pauses_the_transport(self) -> None:
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        size = 3_000_000
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        sent = 0
        while not client.transport.paused:
            client.send(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 300_000)
        upload_handler.proceed.callback(None)
        self.assertFalse(client.transport.paused)
        self.assertEqual(len(upload_handler.body), sent)
        client.send(b"x" * (size - sent))
        self.assertEqual(client.statuses, [201])

    def test_next_request_after_a_paused_body_is_read(self) -> None:
        for chunked in (False, True):
            upload_handler = UploadHandler()
            client = InMemoryServer(upload_handler).client()
            body = b"x" * 300_000
            if chunked:
                client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
                client.send(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
            else:
                client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + body)
            upload_handler.proceed.callback(None)
            self.assertFalse(client.transport.paused)
            client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
            self.assertEqual(client.statuses, [201, 201])

    def test_pipelined_requests_behind_a_long_body_are_handled(self) -> None:
        upload_handler = UploadHandler()
        client = InMemoryServer(upload_handler).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000 + GET % 2 * 2000)
        self.assertTrue(client.transport.paused)
        upload_handler.proceed.callback(None)  # this does not shrink the buffer of pipelined requests
        self.assertEqual(len(client.responses[0].body), 0)
        self.assertEqual(client.statuses[:2], [201, 201])

    def test_slow_client_pauses_the_response(self) -> None:
        download_handler = DownloadHandler(100_000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await download_handler(request)

        client = InMemoryServer(handle).client()
        client.send(GET % 1)
        self.assertEqual(download_handler.written, 1000)
        client.resume_reading()
        self.assertEqual(download_handler.written, 100_000)
        self.assertEqual(len(client.responses[0].body), 100_000)
