"""Bodies of requests: asked for, read, held back, or thrown away."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import BadRequest
from dockerproxy.http.request import ClientGone, Request
from tests.http.kit.in_memory import GET, UNREAD, Door, Downloads, Uploads, echo, ignore


class Bodies(SynchronousTestCase):
    def test_read_all_is_bounded(self) -> None:
        async def handle(request: Request) -> None:
            await request.read_all(10)

        client = Door(handle).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n12345678901")
        self.assertEqual(client.statuses, [413])

    def test_broken_framing_is_an_error_to_the_reader(self) -> None:
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        client.send(b"z\r\n")
        uploads.go.callback(None)
        self.assertEqual(uploads.body, b"hello")
        self.assertIsInstance(uploads.ended, BadRequest)
        self.assertEqual(client.statuses, [400])

    def test_none(self) -> None:
        seen: list[tuple[bool, bytes]] = []

        async def handle(request: Request) -> None:
            seen.append((request.has_body, await request.read_chunk()))
            request.answer(200, [])

        client = Door(handle).client()
        client.send(GET % 1 + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(seen, [(False, b""), (False, b"")])

    def test_path_and_query(self) -> None:
        seen: list[tuple[str, str]] = []

        async def handle(request: Request) -> None:
            seen.append((request.path, request.query))
            request.answer(200, [])

        Door(handle).client().send(b"GET /a%2Fb?n=1?2 HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(seen, [("/a%2Fb", "n=1?2")])


class Expectations(SynchronousTestCase):
    HEAD = b"PUT /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

    def test_once_when_the_body_is_read(self) -> None:
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(self.HEAD)
        self.assertEqual(client.wire.value(), b"")
        uploads.go.callback(None)
        self.assertEqual(client.wire.value(), self.CONTINUE)
        client.send(b"he")
        client.send(b"llo")
        self.assertEqual(client.statuses, [100, 201])
        self.assertEqual(uploads.body, b"hello")
        self.assertFalse(client.wire.disconnecting)

    def test_not_where_the_body_is_not_read(self) -> None:
        """Then the client may send it or not (RFC 9110, section 10.1.1): where the next request begins is open."""
        door = Door(ignore)
        client = door.client()
        client.send(self.HEAD)
        self.assertEqual(client.statuses, [200])
        self.assertEqual(client.answers[0].fields["Connection"], "close")
        client.send(GET % 2)
        self.assertEqual(len(door.logged), 1)
        door.clock.advance(5)
        self.assertTrue(client.closed)

    def test_not_for_http_1_0(self) -> None:
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(self.HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"))
        uploads.go.callback(None)
        self.assertEqual(client.wire.value(), b"")

    def test_not_without_a_body(self) -> None:
        client = Door(echo).client()
        client.send(self.HEAD.replace(b"Content-Length: 5", b"Content-Length: 0"))
        self.assertEqual(client.statuses, [200])
        self.assertFalse(client.wire.disconnecting)

    def test_not_behind_an_answer(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 2)
            await request.read_chunk()

        client = Door(handle).client()
        client.send(self.HEAD)
        self.assertEqual(client.wire.value().count(b"HTTP/1.1"), 1)


class UnreadBodies(SynchronousTestCase):
    def post(self, length: int, *, chunked: bool = False) -> tuple[bytes, bytes]:
        body = b"x" * length
        if chunked:
            return (
                b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"%x\r\n%b\r\n0\r\n\r\n" % (length, body),
            )
        return b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length, body

    def test_a_short_one_is_thrown_away(self) -> None:
        for chunked in (False, True):
            client = Door(ignore).client()
            for _ in range(20):  # each of them has the same right
                head, body = self.post(UNREAD // 2, chunked=chunked)
                client.send(head)
                for start in range(0, len(body), 10_000):
                    client.send(body[start : start + 10_000])
            client.send(GET % 2)
            self.assertEqual(client.statuses, [200] * 21)
            self.assertFalse(client.wire.disconnecting)
            self.assertNotIn("Connection", client.answers[0].fields)

    def test_a_long_one_ends_the_connection(self) -> None:
        door = Door(ignore)
        client = door.client()
        head, body = self.post(UNREAD + 100_000)
        client.send(head + body[:1000])
        self.assertEqual(client.answers[0].fields["Connection"], "close")
        # While the client is still sending it could not read the answer, were the connection closed now.
        client.send(body[1000:])
        client.send(GET % 2)
        self.assertFalse(client.wire.disconnecting)
        door.clock.advance(5)
        self.assertTrue(client.closed)
        self.assertEqual(client.statuses, [200])

    def test_one_that_turns_out_to_be_long_ends_the_connection(self) -> None:
        door = Door(ignore)
        client = door.client()
        head, body = self.post(2 * UNREAD, chunked=True)
        client.send(head)
        for start in range(0, len(body), 10_000):
            client.send(body[start : start + 10_000])
        client.send(GET % 2)
        door.clock.advance(5)
        self.assertTrue(client.closed)
        self.assertEqual(client.statuses, [200])

    def test_padding_counts(self) -> None:
        """A chunk of one byte may have an extension of a thousand."""
        door = Door(ignore)
        client = door.client()
        client.send(self.post(1, chunked=True)[0])
        for _ in range(UNREAD // 1000 + 1):
            client.send(b"1;" + b"x" * 1000 + b"\r\nx\r\n")
        door.clock.advance(5)
        self.assertTrue(client.closed)

    def test_one_that_does_not_end_in_time(self) -> None:
        door = Door(ignore)
        client = door.client()
        client.send(self.post(100)[0] + b"x")
        for _ in range(10):
            self.assertFalse(client.wire.disconnecting)
            client.send(b"x")
            door.clock.advance(5)
        self.assertTrue(client.closed)

    def test_broken_framing(self) -> None:
        door = Door(ignore)
        client = door.client()
        client.send(self.post(5, chunked=True)[0])
        client.send(b"zz\r\n" + GET % 2)
        self.assertEqual(client.statuses, [200])
        door.clock.advance(5)
        self.assertTrue(client.closed)

    def test_whoever_reads_on_gets_no_hole(self) -> None:
        """A body that is thrown away from some point on must not look whole to a reader that stayed."""
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(self.post(10)[0] + b"12345")
        uploads.go.callback(None)
        assert uploads.request is not None
        uploads.request.answer(403, [])
        client.send(b"67890" + GET % 2)
        self.assertEqual(uploads.body, b"12345")
        self.assertIsInstance(uploads.ended, ClientGone)
        self.assertEqual(client.statuses, [403, 201])

    def test_waiting_bytes_do_not_hold_the_connection(self) -> None:
        """An answer comes while more of the body waits than may: what is left of it is small, so it goes on."""
        uploads = Uploads()
        client = Door(uploads).client()
        head, body = self.post(500_000)
        client.send(head)
        client.send(body[:400_000])
        self.assertTrue(client.wire.paused)
        assert uploads.request is not None
        uploads.request.answer(403, [])
        self.assertFalse(client.wire.paused)
        client.send(body[400_000:])
        uploads.go.callback(None)
        client.send(GET % 2)
        self.assertEqual(client.statuses, [403, 201])
        self.assertFalse(client.wire.disconnecting)


class BackPressure(SynchronousTestCase):
    def test_a_body(self) -> None:
        uploads = Uploads()
        client = Door(uploads).client()
        size = 3_000_000
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        sent = 0
        while not client.wire.paused:
            client.send(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 300_000)
        uploads.go.callback(None)
        self.assertFalse(client.wire.paused)
        self.assertEqual(len(uploads.body), sent)
        client.send(b"x" * (size - sent))
        self.assertEqual(client.statuses, [201])

    def test_tiny_chunks(self) -> None:
        """Two bytes each, they take some fifty in memory."""
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        pieces = 0
        while not client.wire.paused:
            client.send(b"2\r\nxx\r\n")
            pieces += 1
        self.assertLess(pieces, 5000)

    def test_the_connection_goes_on_after_a_body_that_was_held_back_to_its_end(self) -> None:
        for chunked in (False, True):
            uploads = Uploads()
            client = Door(uploads).client()
            body = b"x" * 300_000
            if chunked:
                client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
                client.send(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
            else:
                client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + body)
            uploads.go.callback(None)
            self.assertFalse(client.wire.paused)
            client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
            self.assertEqual(client.statuses, [201, 201])

    def test_pipelined_requests_behind_a_long_body(self) -> None:
        uploads = Uploads()
        client = Door(uploads).client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000 + GET % 2 * 2000)
        self.assertTrue(client.wire.paused)
        uploads.go.callback(None)  # reading the body makes no room in what waits behind it
        self.assertEqual(len(client.answers[0].body), 0)
        self.assertEqual(client.statuses[:2], [201, 201])

    def test_an_answer(self) -> None:
        downloads = Downloads(100_000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await downloads(request)

        client = Door(handle).client()
        client.send(GET % 1)
        self.assertEqual(downloads.written, 1000)
        client.read_on()
        self.assertEqual(downloads.written, 100_000)
        self.assertEqual(len(client.answers[0].body), 100_000)
