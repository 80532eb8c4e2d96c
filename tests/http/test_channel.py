"""HTTPChannel on an in-memory transport: order, framing, invalid requests, detaching and draining."""

from __future__ import annotations

import contextlib  # not `from contextlib import suppress`: Trial interprets a module attribute of that name
import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.message import MAX_HEAD
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.shares import client_key
from tests.http.support.in_memory import (
    GET,
    BlockingHandler,
    DownloadHandler,
    Handler,
    InMemoryServer,
    ParsedResponse,
    echo,
    ignore_body,
    parse_responses,
)

# The same bytes, split in any way
STREAM = (
    b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n"
    b"\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    b"\r\n\r\nPUT /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nA: b\r\n\r\n"
    b"POST /4 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    b"HEAD /5 HTTP/1.1\r\nHost: a\r\n\r\n"
    b"GET /6 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    b"PATCH /7 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
)
ECHOED = ["GET /1 ", "POST /2 hello", "PUT /3 hello", "POST /4 ", "", "GET /6 ", "PATCH /7 "]
METHODS = ("GET", "POST", "PUT", "POST", "HEAD", "GET", "PATCH")
TAILS = {
    b"GET /8 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET % 9: 200,
    b"POST /8 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nxyz" + GET % 9: 200,
    b"POST /8 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxyz\r\n0\r\n\r\n" + GET % 9: 400,
    b"GET /8 HTTP/2.0\r\nHost: a\r\n\r\n" + GET % 9: 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n" + GET % 9: 400,
    b"GET /8 HTTP/1.1\nHost: a\n\n" + GET % 9: 400,
    b"GET /8 HTTP/1.1\r\nHost: a\r\nA:" + b"a" * MAX_HEAD + b"\r\n\r\n" + GET % 9: 400,
}


@st.composite
def split_requests(draw: st.DrawFn) -> tuple[list[bytes], int]:
    """Return a split stream of requests, the last of which ends the connection, and the last response's status."""
    tail, status = draw(st.sampled_from(sorted(TAILS.items())))
    data = STREAM + tail
    offsets = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=40)))
    return [data[a:b] for a, b in zip([0, *offsets], [*offsets, len(data)], strict=True)], status


@settings(deadline=None)
@given(split_requests(), st.booleans())
def test_parsing_is_independent_of_splits(case: tuple[list[bytes], int], iterate: bool) -> None:
    pieces, status = case
    server = InMemoryServer(echo)
    client = server.client()
    for piece in pieces:
        client.send(piece)
        if iterate:
            server.clock.advance(0)
    responses = parse_responses(client.transport.value(), *METHODS)
    assert [response.body.decode() for response in responses[:-1]] == ECHOED
    assert [response.status for response in responses] == [200] * len(METHODS) + [status]
    assert responses[-1].fields["Connection"] == "close"
    server.clock.advance(5)
    assert client.closed_cleanly


@settings(deadline=None)
@given(split_requests())
def test_unread_bodies_are_independent_of_splits(case: tuple[list[bytes], int]) -> None:
    pieces, status = case
    client = InMemoryServer(ignore_body).client()
    for piece in pieces:
        client.send(piece)
    responses = parse_responses(client.transport.value(), *METHODS)
    assert [response.status for response in responses[: len(METHODS)]] == [200] * len(METHODS)
    # An invalid body that the handler does not read has no effect on its response, but no further request is parsed.
    last = b"".join(pieces).removeprefix(STREAM)
    assert [response.status for response in responses[len(METHODS) :]] == [200 if b"chunked" in last else status]


def test_requests_are_parsed_byte_by_byte() -> None:
    client = InMemoryServer(echo).client()
    for byte in STREAM:
        client.send(bytes([byte]))
    assert [response.body.decode() for response in parse_responses(client.transport.value(), *METHODS)] == ECHOED
    assert not client.transport.disconnecting


@pytest.mark.parametrize("excess", [0, 1])
def test_head_length_limit_is_exact(excess: int) -> None:
    start = b"GET / HTTP/1.1\r\nHost: a\r\nA: "
    head = start + b"a" * (MAX_HEAD - len(start) + excess) + b"\r\n\r\n"
    for missing in (0, 1, 2, 3, 4, 5, 1000):
        client = InMemoryServer(echo).client()
        client.send(head[: len(head) - missing])
        client.send(head[len(head) - missing :])
        assert client.statuses == [400 if excess else 200]
        assert not client.transport.paused


class PipeliningTests(SynchronousTestCase):
    def test_requests_are_handled_in_order(self) -> None:
        handler = BlockingHandler()
        client = InMemoryServer(handler).client()
        client.send(GET % 1 + GET % 2 + GET % 3)
        for count in (1, 2, 3):
            self.assertEqual(len(handler.waiters), count)
            handler.waiters[-1].callback(None)
        self.assertEqual([response.body for response in client.responses], [b"/1", b"/2", b"/3"])

    def test_thousands_of_requests_in_one_segment_are_handled_in_batches(self) -> None:
        """Requests are handled in batches, which bound the stack depth and let other clients in between."""
        server = InMemoryServer(echo)
        client, other = server.client(), server.client()
        client.send(GET % 7 * 5000)
        self.assertLess(len(server.logged), 100)
        self.assertTrue(client.transport.paused)
        other.send(GET % 1)
        self.assertEqual(other.statuses, [200])
        server.clock.pump([0] * 500)
        self.assertEqual(client.statuses, [200] * 5000)
        self.assertFalse(client.transport.paused)
        self.assertEqual(len(server.clock.getDelayedCalls()), 1)  # the timeout reaper

    def test_thousands_of_requests_wait_behind_a_slow_one(self) -> None:
        handler = BlockingHandler()
        handled: list[str] = []

        async def handle(request: Request) -> None:
            if request.path == "/0":
                await handler(request)
            else:
                handled.append(request.path)
                await echo(request)

        server = InMemoryServer(handle)
        client = server.client()
        client.send(GET % 0 + GET % 7 * 3000)
        self.assertEqual(handled, [])
        handler.waiters[0].callback(None)
        server.clock.pump([0] * 300)
        self.assertEqual(client.statuses, [200] * 3001)

    def test_next_request_waits_for_a_client_that_does_not_read(self) -> None:
        """Otherwise a client that reads nothing could make the server buffer any number of responses."""

        async def large(request: Request) -> None:
            request.respond(200, [], b"x" * 100_000)
            client.stop_reading()

        server = InMemoryServer(large)
        client = server.client()
        client.send(GET % 1 * 200)
        self.assertEqual(len(server.logged), 1)
        client.send(GET % 1 * 2000)
        self.assertTrue(client.transport.paused)
        client.resume_reading()
        self.assertEqual(len(server.logged), 2)

    def test_pipelined_input_is_bounded(self) -> None:
        handler = BlockingHandler()
        client = InMemoryServer(handler).client()
        client.send(GET % 1)
        client.send(GET % 2)
        self.assertFalse(client.transport.paused)
        client.send(b"GET /3 HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 30_000)
        client.send(b"a" * 2000 + b"\r\n\r\n" + GET % 4 * 30)
        self.assertTrue(client.transport.paused)
        handler.waiters[0].callback(None)
        handler.waiters[1].callback(None)
        handler.waiters[2].callback(None)
        self.assertEqual(len(handler.waiters), 4)
        self.assertFalse(client.transport.paused)

    def test_no_request_is_handled_after_connection_close(self) -> None:
        for first in (
            b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /1 HTTP/1.0\r\n\r\n",
            b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ):
            for at_once in (True, False):
                server = InMemoryServer(echo)
                client = server.client()
                client.send(first + (GET % 2 if at_once else b""))
                client.send(GET % 3)
                self.assertEqual([path for path, *_ in server.logged], ["/1"])
                self.assertTrue(client.closed_cleanly)

    def test_no_request_is_read_after_a_broken_body(self) -> None:
        server = InMemoryServer(echo)
        client = server.client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send(b"1\r\nxx\r\n0\r\n\r\n" + GET % 2)
        client.send(GET % 3)
        self.assertEqual(client.statuses, [400])
        self.assertEqual(client.responses[0].fields["Connection"], "close")
        self.assertEqual(len(server.logged), 1)
        server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)


class KeepAliveTests(SynchronousTestCase):
    def request(self, head: bytes) -> tuple[bool, str | None]:
        """Return whether the connection stays open, and the Connection field of the response."""
        client = InMemoryServer(echo).client()
        client.send(head + b"\r\n\r\n")
        (response,) = client.responses
        return not client.closed_cleanly, response.fields.get("Connection")

    def test_connection_field_decides_on_keepalive(self) -> None:
        self.assertEqual(self.request(b"GET / HTTP/1.1\r\nHost: a"), (True, None))
        self.assertEqual(self.request(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive"), (True, None))
        self.assertEqual(self.request(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close"), (False, "close"))
        self.assertEqual(self.request(b"GET / HTTP/1.0"), (False, "close"))
        self.assertEqual(self.request(b"GET / HTTP/1.0\r\nConnection: Keep-Alive"), (True, "keep-alive"))

    def test_disconnect_leaves_no_delayed_calls(self) -> None:
        server = InMemoryServer(echo)
        client = server.client()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.disconnect()
        self.assertEqual(server.clock.getDelayedCalls(), [])
        self.successResultOf(server.site.drain())

    def test_closed_connection_leaves_no_reference_cycle(self) -> None:
        """With cycles, thousands of closed connections and their TLS state would stay until a garbage collection."""
        server = InMemoryServer(echo)
        client = server.client()
        client.send(GET % 1 + b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        client.disconnect()
        channel = weakref.ref(client.channel)
        gc.disable()
        self.addCleanup(gc.enable)
        del client
        self.assertIsNone(channel())


class ResponseFramingTests(SynchronousTestCase):
    def get_response(self, handler: Handler, head: bytes = b"GET / HTTP/1.1\r\nHost: a") -> bytes:
        self.client = InMemoryServer(handler).client()
        self.client.send(head + b"\r\n\r\n")
        return self.client.transport.value()

    async def write_chunks(self, request: Request) -> None:
        request.start(200, [], None)
        request.write(b"hello ")
        request.write(b"")
        request.write(b"world")
        request.finish()

    def test_response_of_unknown_length_is_chunked(self) -> None:
        raw = self.get_response(self.write_chunks)
        self.assertTrue(raw.endswith(b"\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"))
        self.assertEqual(parse_responses(raw)[0].body, b"hello world")
        self.assertFalse(self.client.closed_cleanly)

    def test_response_of_unknown_length_to_http_1_0_ends_with_the_connection(self) -> None:
        raw = self.get_response(self.write_chunks, b"GET / HTTP/1.0\r\nConnection: keep-alive")
        self.assertTrue(raw.endswith(b"\r\n\r\nhello world"))
        self.assertNotIn("Transfer-Encoding", parse_responses(raw)[0].fields)
        self.assertEqual(parse_responses(raw)[0].fields["Connection"], "close")
        self.assertTrue(self.client.closed_cleanly)

    def test_response_to_head_has_no_body(self) -> None:
        for length in (11, None):

            async def handle(request: Request, length: int | None = length) -> None:
                request.start(200, [("A", "b")], length)
                request.write(b"hello world")
                request.finish()

            raw = self.get_response(handle, b"HEAD / HTTP/1.1\r\nHost: a")
            self.assertTrue(raw.endswith(b"\r\n\r\n"))
            (response,) = parse_responses(raw, "HEAD")
            self.assertEqual(response.fields.get("Content-Length"), "11" if length else None)
            self.assertEqual(response.fields["A"], "b")
            self.assertFalse(self.client.transport.disconnecting)

    def test_204_and_304_have_no_body(self) -> None:
        """These statuses have no body, and a 204 has no framing fields (RFC 9112, sections 6.1 and 6.3)."""
        for status in (204, 304):
            for length in (0, 5, None):

                async def handle(request: Request, status: int = status, length: int | None = length) -> None:
                    request.start(status, [], length)
                    request.write(b"hello")
                    request.finish()

                raw = self.get_response(handle)
                (response,) = parse_responses(raw)
                self.assertEqual(response.status, status)
                self.assertEqual(response.body, b"")
                self.assertTrue(raw.endswith(b"\r\n\r\n"))
                self.assertNotIn("Transfer-Encoding", response.fields)
                self.assertNotIn("Content-Length", response.fields)
                self.assertFalse(self.client.transport.disconnecting)

    def test_response_has_date_and_content_length(self) -> None:
        (response,) = parse_responses(self.get_response(echo))
        self.assertRegex(response.fields["Date"], r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
        self.assertEqual(response.fields["Content-Length"], "6")

    def test_response_too_short_aborts(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 10)
            request.write(b"12345")
            request.finish()

        self.get_response(handle)
        self.assertTrue(self.client.transport.aborted)

    def test_response_too_long_aborts(self) -> None:
        """Bytes beyond the Content-Length are never sent, because a client would read them as the next response."""

        async def handle(request: Request) -> None:
            request.start(200, [], 3)
            request.write(b"123")
            request.write(b"HTTP/1.1 200 OK\r\n")
            request.finish()

        raw = self.get_response(handle)
        self.assertTrue(raw.endswith(b"\r\n\r\n123"))
        self.assertTrue(self.client.transport.aborted)

    def test_write_some_is_framed_like_write(self) -> None:
        for length, method, expected in (
            (None, "GET", b"5\r\nhello\r\n0\r\n\r\n"),
            (5, "GET", b"hello"),
            (5, "HEAD", b""),
        ):
            written: list[int] = []

            async def handle(request: Request, length: int | None = length, written: list[int] = written) -> None:
                request.start(200, [], length)
                written.append(request.write_some(b""))
                written.append(request.write_some(b"hello"))
                request.finish()

            raw = self.get_response(handle, f"{method} / HTTP/1.1\r\nHost: a".encode())
            self.assertEqual(raw.partition(b"\r\n\r\n")[2], expected)
            self.assertEqual(written, [0, 5])
            self.assertFalse(self.client.transport.disconnecting)

    def test_write_some_beyond_the_length_aborts(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 3)
            request.write_some(b"1234")
            request.finish()

        self.assertTrue(self.get_response(handle).endswith(b"\r\n\r\n"))
        self.assertTrue(self.client.transport.aborted)

    def test_a_long_response_is_sent_as_the_client_reads(self) -> None:
        for method, expected in (("GET", bytes(100_000)), ("HEAD", b"")):

            async def handle(request: Request) -> None:
                await request.respond_long(200, [], bytes(100_000))

            raw = self.get_response(handle, f"{method} / HTTP/1.1\r\nHost: a".encode())
            head, _, body = raw.partition(b"\r\n\r\n")
            self.assertIn(b"Content-Length: 100000\r\n", head)
            self.assertEqual(body, expected)

    def test_write_after_the_response_is_ignored(self) -> None:
        async def handle(request: Request) -> None:
            request.respond(200, [], b"ok")
            request.write(b"more")

        self.assertTrue(self.get_response(handle).endswith(b"\r\n\r\nok"))


class BadRequestTests(SynchronousTestCase):
    def refuse(self, data: bytes) -> ParsedResponse:
        self.server = InMemoryServer(echo)
        client = self.server.client()
        client.send(data)
        client.send(GET % 2)
        (response,) = client.responses
        self.assertEqual(response.fields["Connection"], "close")
        self.assertEqual(self.server.logged, [])
        self.assertFalse(client.transport.disconnecting)
        self.server.clock.advance(4.9)
        self.assertFalse(client.transport.disconnecting)
        self.server.clock.advance(0.1)
        self.assertTrue(client.closed_cleanly)
        client.disconnect()
        self.assertEqual(self.server.clock.getDelayedCalls(), [])
        return response

    def test_malformed_heads_are_refused(self) -> None:
        for head in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            response = self.refuse(head)
            self.assertEqual(response.status, 400)
            self.assertRegex(response.body.decode(), r"\A[^\n]+\n\Z")

    def test_garbage_is_refused_immediately(self) -> None:
        """Input that cannot become a request is refused without waiting for more."""
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))
        for data in (hello, hello[:1], b"\x00", b"\xff\xfe", b"SSH-2.0-x\n", b"GET / HTTP/1.0\n\n", b"\rGET", b" GET"):
            self.assertEqual(self.refuse(data).status, 400)

    def test_incomplete_heads_are_awaited(self) -> None:
        for data in (b"\r", b"\r\n", b"\r\n\r", b"G", b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\r\nA: \xff\t"):
            client = InMemoryServer(echo).client()
            client.send(data)
            self.assertEqual(client.transport.value(), b"")

    def test_too_long_heads_are_refused(self) -> None:
        for data in (b"A" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000, b"GET /" + b"a" * 40_000):
            self.assertEqual(self.refuse(data).status, 400)

    def test_garbage_after_a_request_is_refused(self) -> None:
        client = InMemoryServer(echo).client()
        client.send(GET % 1 + b"garbage\r\n\r\n" + GET % 2)
        self.assertEqual(client.statuses, [200, 400])

    def test_error_does_not_echo_the_request(self) -> None:
        response = self.refuse(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization Basic c2VjcmV0\r\n\r\n")
        self.assertNotIn(b"c2VjcmV0", response.body)


class DetachTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.connected: Deferred[None] = Deferred()
        self.detached: tuple[Any, bytes] | None = None

        async def handle(request: Request) -> None:
            await self.connected
            self.detached = request.detach()
            request.write(b"written after detach")

        self.server = InMemoryServer(handle)
        self.client = self.server.client()

    def test_detach_returns_early_bytes(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n\x16early")
        self.client.send(b" bytes")
        done = self.server.site.drain()
        self.assertNoResult(done)
        self.connected.callback(None)
        self.assertEqual(self.detached, (self.client.transport, b"\x16early bytes"))
        self.successResultOf(done)
        self.assertIsNone(self.client.transport.producer)
        self.assertEqual(self.client.transport.value(), b"")
        self.assertFalse(self.client.transport.disconnecting)
        self.assertEqual(self.server.logged, [])
        self.assertEqual(self.server.clock.getDelayedCalls(), [])

    def test_early_bytes_are_bounded(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        for _ in range(MAX_HEAD // 1000 + 1):
            self.client.send(b"x" * 1000)
        self.assertTrue(self.client.transport.paused)
        self.connected.callback(None)
        assert self.detached is not None
        self.assertEqual(len(self.detached[1]), (MAX_HEAD // 1000 + 1) * 1000)

    def test_content_length_of_connect_is_ignored(self) -> None:
        """A CONNECT request has no body (RFC 9110, section 9.3.6)."""
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\nContent-Length: 5\r\n\r\nhello world")
        self.connected.callback(None)
        assert self.detached is not None
        self.assertEqual(self.detached[1], b"hello world")

    def test_no_detach_after_the_response_or_the_disconnect(self) -> None:
        disconnected = Deferred[None]()
        errors: list[type[BaseException]] = []

        async def handle(request: Request) -> None:
            if request.path == "/1":
                request.respond(200, [])
            else:
                with contextlib.suppress(CancelledError):
                    await disconnected
            try:
                request.detach()
            except ClientDisconnected as error:
                errors.append(type(error))

        client = InMemoryServer(handle).client()
        client.send(GET % 1 + GET % 2)
        self.assertEqual(client.statuses, [200])
        client.disconnect()
        self.assertEqual(errors, [ClientDisconnected, ClientDisconnected])

    def test_no_detach_if_the_client_disconnects_first(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        self.client.disconnect()
        self.assertIsNone(self.detached)
        self.assertEqual(len(self.server.logged), 1)


class SiteDrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.handler = BlockingHandler()
        self.server = InMemoryServer(self.handler)

    def test_idle_connections_are_closed(self) -> None:
        idle, fresh, half = self.server.client(), self.server.client(), self.server.client()
        idle.send(GET % 1)
        self.handler.waiters[0].callback(None)
        half.send(b"GET ")
        done = self.server.site.drain()
        for client in (idle, fresh, half):
            self.assertTrue(client.closed_cleanly)
            self.assertNoResult(done)
            client.disconnect()
        self.successResultOf(done)
        self.assertEqual(self.server.clock.getDelayedCalls(), [])

    def test_half_of_a_clients_idle_connections_are_closed_the_oldest_first(self) -> None:
        clients = []
        for number in range(4):
            clients.append(self.server.client())
            self.server.clock.advance(1)
            if number == 1:
                clients[1].send(GET % 1)
        clients[2].send(b"GET ")  # no head yet
        just_opened, other = self.server.client(), self.server.client()
        other.channel.client = "192.0.2.9"
        self.server.site.close_idle(client_key(clients[0].channel.client))
        closed = [client.closed_cleanly for client in (*clients, just_opened, other)]
        self.assertEqual(closed, [True, False, True, False, False, False])

    def test_drain_without_connections_fires_immediately(self) -> None:
        self.successResultOf(self.server.site.drain())

    def test_pending_response_is_sent_before_close(self) -> None:
        client = self.server.client()
        client.send(GET % 1 + GET % 2)
        done = self.server.site.drain()
        self.assertFalse(client.transport.disconnecting)
        self.handler.waiters[0].callback(None)
        self.assertTrue(client.closed_cleanly)
        self.assertEqual(client.responses[0].fields["Connection"], "close")
        client.disconnect()
        self.successResultOf(done)
        self.assertEqual(len(self.server.logged), 1)

    def test_partial_response_is_completed(self) -> None:
        download_handler = DownloadHandler(2000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await download_handler(request)

        server = InMemoryServer(handle)
        client = server.client()
        client.send(GET % 1)
        server.site.drain()
        client.resume_reading()
        self.assertEqual(len(client.responses[0].body), 2000)
        self.assertTrue(client.closed_cleanly)

    def test_drain_can_be_called_twice(self) -> None:
        client = self.server.client()
        client.send(GET % 1)
        one, other = self.server.site.drain(), self.server.site.drain()
        self.handler.waiters[0].callback(None)
        client.disconnect()
        self.successResultOf(one)
        self.successResultOf(other)

    def test_lingering_connection_is_closed_after_its_timeout(self) -> None:
        client = self.server.client()
        client.send(b"\x16")
        self.server.site.drain()
        self.assertFalse(client.transport.disconnecting)
        self.server.clock.advance(5)
        self.assertTrue(client.closed_cleanly)

    def test_abort_resets_all_connections(self) -> None:
        clients = [self.server.client(), self.server.client()]
        clients[0].send(GET % 1)
        self.assertEqual(self.server.site.abort(), 2)
        for client in clients:
            self.assertTrue(client.transport.aborted)
            client.disconnect()
        self.assertEqual([type(error) for error in self.handler.outcomes], [CancelledError])
        self.assertEqual(len(self.server.logged), 1)
        self.assertEqual(self.server.site.abort(), 0)

    def test_abort_after_a_drain_timeout(self) -> None:
        client = self.server.client()
        client.send(GET % 1)
        done = self.server.site.drain().addTimeout(25, self.server.clock)
        self.server.clock.advance(25)
        self.failureResultOf(done)
        self.server.site.abort()
        client.disconnect()
