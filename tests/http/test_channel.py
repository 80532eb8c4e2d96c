"""Requests off an in-memory transport: their order, their framing, those that are refused, and how it all ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.message import MAX_HEAD
from dockerproxy.http.request import Request
from tests.http.kit.in_memory import GET, Answer, Door, Downloads, Handler, Slow, answers, echo, ignore

# Any cut of the same bytes

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
ANSWERED = ["GET /1 ", "POST /2 hello", "PUT /3 hello", "POST /4 ", "", "GET /6 ", "PATCH /7 "]
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
def cut(draw: st.DrawFn) -> tuple[list[bytes], int]:
    """Return a stream of requests, of which the last ends the connection, cut anywhere; and the last one's status."""
    tail, status = draw(st.sampled_from(sorted(TAILS.items())))
    data = STREAM + tail
    places = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=40)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)], status


@settings(deadline=None)
@given(cut(), st.booleans())
def test_any_cut_gives_the_same(case: tuple[list[bytes], int], turn: bool) -> None:
    pieces, status = case
    door = Door(echo)
    client = door.client()
    for piece in pieces:
        client.send(piece)
        if turn:
            door.clock.advance(0)
    got = answers(client.wire.value(), *METHODS)
    assert [answer.body.decode() for answer in got[:-1]] == ANSWERED
    assert [answer.status for answer in got] == [200] * len(METHODS) + [status]
    assert got[-1].fields["Connection"] == "close"
    door.clock.advance(5)
    assert client.closed


@settings(deadline=None)
@given(cut())
def test_any_cut_gives_the_same_where_nobody_reads_bodies(case: tuple[list[bytes], int]) -> None:
    pieces, status = case
    client = Door(ignore).client()
    for piece in pieces:
        client.send(piece)
    got = answers(client.wire.value(), *METHODS)
    assert [answer.status for answer in got[: len(METHODS)]] == [200] * len(METHODS)
    # What is wrong with a body that nobody reads concerns nobody; but no request is looked for behind it.
    last = b"".join(pieces).removeprefix(STREAM)
    assert [answer.status for answer in got[len(METHODS) :]] == [200 if b"chunked" in last else status]


def test_byte_by_byte() -> None:
    client = Door(echo).client()
    for byte in STREAM:
        client.send(bytes([byte]))
    assert [answer.body.decode() for answer in answers(client.wire.value(), *METHODS)] == ANSWERED
    assert not client.wire.disconnecting


@pytest.mark.parametrize("excess", [0, 1])
def test_the_longest_head(excess: int) -> None:
    start = b"GET / HTTP/1.1\r\nHost: a\r\nA: "
    head = start + b"a" * (MAX_HEAD - len(start) + excess) + b"\r\n\r\n"
    for at in (0, 1, 2, 3, 4, 5, 1000):
        client = Door(echo).client()
        client.send(head[: len(head) - at])
        client.send(head[len(head) - at :])
        assert client.statuses == [400 if excess else 200]
        assert not client.wire.paused


class Pipelining(SynchronousTestCase):
    def test_one_after_the_other(self) -> None:
        slow = Slow()
        client = Door(slow).client()
        client.send(GET % 1 + GET % 2 + GET % 3)
        for count in (1, 2, 3):
            self.assertEqual(len(slow.waiting), count)
            slow.waiting[-1].callback(None)
        self.assertEqual([answer.body for answer in client.answers], [b"/1", b"/2", b"/3"])

    def test_thousands_in_one_segment(self) -> None:
        """Neither the stack nor the other clients suffer: some are answered, then others have their turn."""
        door = Door(echo)
        client, other = door.client(), door.client()
        client.send(GET % 7 * 5000)
        self.assertLess(len(door.logged), 100)
        self.assertTrue(client.wire.paused)
        other.send(GET % 1)
        self.assertEqual(other.statuses, [200])
        door.clock.pump([0] * 500)
        self.assertEqual(client.statuses, [200] * 5000)
        self.assertFalse(client.wire.paused)
        self.assertEqual(len(door.clock.getDelayedCalls()), 1)  # the clients' time-outs

    def test_thousands_behind_one_that_waits(self) -> None:
        slow = Slow()
        behind: list[str] = []

        async def handle(request: Request) -> None:
            if request.path == "/0":
                await slow(request)
            else:
                behind.append(request.path)
                await echo(request)

        door = Door(handle)
        client = door.client()
        client.send(GET % 0 + GET % 7 * 3000)
        self.assertEqual(behind, [])
        slow.waiting[0].callback(None)
        door.clock.pump([0] * 300)
        self.assertEqual(client.statuses, [200] * 3001)

    def test_an_answer_that_waits_for_the_client_holds_up_the_next(self) -> None:
        """Else a client that reads nothing makes us keep all the answers that it asks for."""

        async def large(request: Request) -> None:
            request.answer(200, [], b"x" * 100_000)
            client.stop_reading()

        door = Door(large)
        client = door.client()
        client.send(GET % 1 * 200)
        self.assertEqual(len(door.logged), 1)
        client.send(GET % 1 * 2000)
        self.assertTrue(client.wire.paused)
        client.read_on()
        self.assertEqual(len(door.logged), 2)

    def test_what_comes_during_a_request_is_bounded(self) -> None:
        slow = Slow()
        client = Door(slow).client()
        client.send(GET % 1)
        client.send(GET % 2)
        self.assertFalse(client.wire.paused)
        client.send(b"GET /3 HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 30_000)
        client.send(b"a" * 2000 + b"\r\n\r\n" + GET % 4 * 30)
        self.assertTrue(client.wire.paused)
        slow.waiting[0].callback(None)
        slow.waiting[1].callback(None)
        slow.waiting[2].callback(None)
        self.assertEqual(len(slow.waiting), 4)
        self.assertFalse(client.wire.paused)

    def test_none_after_the_last(self) -> None:
        """What comes behind a request that ends the connection is not carried out."""
        for first in (
            b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /1 HTTP/1.0\r\n\r\n",
            b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ):
            for at_once in (True, False):
                door = Door(echo)
                client = door.client()
                client.send(first + (GET % 2 if at_once else b""))
                client.send(GET % 3)
                self.assertEqual([path for path, *_ in door.logged], ["/1"])
                self.assertTrue(client.closed)

    def test_a_body_with_a_broken_end_hides_nothing(self) -> None:
        door = Door(echo)
        client = door.client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send(b"1\r\nxx\r\n0\r\n\r\n" + GET % 2)
        client.send(GET % 3)
        self.assertEqual(client.statuses, [400])
        self.assertEqual(client.answers[0].fields["Connection"], "close")
        self.assertEqual(len(door.logged), 1)
        door.clock.advance(5)
        self.assertTrue(client.closed)


class KeepingAlive(SynchronousTestCase):
    def ask(self, head: bytes) -> tuple[bool, str | None]:
        """Return whether the connection goes on, and what was said about it."""
        client = Door(echo).client()
        client.send(head + b"\r\n\r\n")
        (answer,) = client.answers
        return not client.closed, answer.fields.get("Connection")

    def test_as_the_client_means_it(self) -> None:
        self.assertEqual(self.ask(b"GET / HTTP/1.1\r\nHost: a"), (True, None))
        self.assertEqual(self.ask(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive"), (True, None))
        self.assertEqual(self.ask(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close"), (False, "close"))
        self.assertEqual(self.ask(b"GET / HTTP/1.0"), (False, "close"))
        self.assertEqual(self.ask(b"GET / HTTP/1.0\r\nConnection: Keep-Alive"), (True, "keep-alive"))

    def test_the_end_leaves_nothing_behind(self) -> None:
        door = Door(echo)
        client = door.client()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.leave()
        self.assertEqual(door.clock.getDelayedCalls(), [])
        self.successResultOf(door.site.drain())

    def test_a_connection_needs_no_garbage_collector(self) -> None:
        """Else thousands of them, and what TLS keeps for each, would wait for it."""
        door = Door(echo)
        client = door.client()
        client.send(GET % 1 + b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        client.leave()
        channel = weakref.ref(client.channel)
        gc.disable()
        self.addCleanup(gc.enable)
        del client
        self.assertIsNone(channel())


class Framing(SynchronousTestCase):
    def answer(self, handler: Handler, head: bytes = b"GET / HTTP/1.1\r\nHost: a") -> bytes:
        self.client = Door(handler).client()
        self.client.send(head + b"\r\n\r\n")
        return self.client.wire.value()

    async def in_pieces(self, request: Request) -> None:
        request.start(200, [], None)
        request.write(b"hello ")
        request.write(b"")
        request.write(b"world")
        request.finish()

    def test_unknown_length(self) -> None:
        raw = self.answer(self.in_pieces)
        self.assertTrue(raw.endswith(b"\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"))
        self.assertEqual(answers(raw)[0].body, b"hello world")
        self.assertFalse(self.client.closed)

    def test_unknown_length_for_http_1_0(self) -> None:
        raw = self.answer(self.in_pieces, b"GET / HTTP/1.0\r\nConnection: keep-alive")
        self.assertTrue(raw.endswith(b"\r\n\r\nhello world"))
        self.assertNotIn("Transfer-Encoding", answers(raw)[0].fields)
        self.assertEqual(answers(raw)[0].fields["Connection"], "close")
        self.assertTrue(self.client.closed)

    def test_head(self) -> None:
        for length in (11, None):

            async def handle(request: Request, length: int | None = length) -> None:
                request.start(200, [("A", "b")], length)
                request.write(b"hello world")
                request.finish()

            raw = self.answer(handle, b"HEAD / HTTP/1.1\r\nHost: a")
            self.assertTrue(raw.endswith(b"\r\n\r\n"))
            (answer,) = answers(raw, "HEAD")
            self.assertEqual(answer.fields.get("Content-Length"), "11" if length else None)
            self.assertEqual(answer.fields["A"], "b")
            self.assertFalse(self.client.wire.disconnecting)

    def test_no_content(self) -> None:
        """RFC 9112, section 6.1 and 6.3: these have no body, and a 204 no framing."""
        for status in (204, 304):
            for length in (0, 5, None):

                async def handle(request: Request, status: int = status, length: int | None = length) -> None:
                    request.start(status, [], length)
                    request.write(b"hello")
                    request.finish()

                raw = self.answer(handle)
                (answer,) = answers(raw)
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.body, b"")
                self.assertTrue(raw.endswith(b"\r\n\r\n"))
                self.assertNotIn("Transfer-Encoding", answer.fields)
                self.assertNotIn("Content-Length", answer.fields)
                self.assertFalse(self.client.wire.disconnecting)

    def test_date_and_length(self) -> None:
        (answer,) = answers(self.answer(echo))
        self.assertRegex(answer.fields["Date"], r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
        self.assertEqual(answer.fields["Content-Length"], "6")

    def test_too_short(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 10)
            request.write(b"12345")
            request.finish()

        self.answer(handle)
        self.assertTrue(self.client.wire.aborted)

    def test_too_long(self) -> None:
        """What is beyond the length that was said is never sent: it would be read as the next answer."""

        async def handle(request: Request) -> None:
            request.start(200, [], 3)
            request.write(b"123")
            request.write(b"HTTP/1.1 200 OK\r\n")
            request.finish()

        raw = self.answer(handle)
        self.assertTrue(raw.endswith(b"\r\n\r\n123"))
        self.assertTrue(self.client.wire.aborted)

    def test_what_is_offered_is_framed_like_what_is_written(self) -> None:
        for length, method, sent in ((None, "GET", b"5\r\nhello\r\n0\r\n\r\n"), (5, "GET", b"hello"), (5, "HEAD", b"")):
            taken: list[int] = []

            async def handle(request: Request, length: int | None = length, taken: list[int] = taken) -> None:
                request.start(200, [], length)
                taken.append(request.offer(b""))
                taken.append(request.offer(b"hello"))
                request.finish()

            raw = self.answer(handle, f"{method} / HTTP/1.1\r\nHost: a".encode())
            self.assertEqual(raw.partition(b"\r\n\r\n")[2], sent)
            self.assertEqual(taken, [0, 5])
            self.assertFalse(self.client.wire.disconnecting)

    def test_too_long_an_offer(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 3)
            request.offer(b"1234")
            request.finish()

        self.assertTrue(self.answer(handle).endswith(b"\r\n\r\n"))
        self.assertTrue(self.client.wire.aborted)

    def test_nothing_is_written_behind_an_answer(self) -> None:
        async def handle(request: Request) -> None:
            request.answer(200, [], b"ok")
            request.write(b"more")

        self.assertTrue(self.answer(handle).endswith(b"\r\n\r\nok"))


class Refusals(SynchronousTestCase):
    def refuse(self, data: bytes) -> Answer:
        self.door = Door(echo)
        client = self.door.client()
        client.send(data)
        client.send(GET % 2)
        (answer,) = client.answers
        self.assertEqual(answer.fields["Connection"], "close")
        self.assertEqual(self.door.logged, [])
        self.assertFalse(client.wire.disconnecting)
        self.door.clock.advance(4.9)
        self.assertFalse(client.wire.disconnecting)
        self.door.clock.advance(0.1)
        self.assertTrue(client.closed)
        client.leave()
        self.assertEqual(self.door.clock.getDelayedCalls(), [])
        return answer

    def test_heads(self) -> None:
        for head in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            answer = self.refuse(head)
            self.assertEqual(answer.status, 400)
            self.assertRegex(answer.body.decode(), r"\A[^\n]+\n\Z")

    def test_garbage_at_once(self) -> None:
        """What can no more become a request is not waited for."""
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))
        for data in (hello, hello[:1], b"\x00", b"\xff\xfe", b"SSH-2.0-x\n", b"GET / HTTP/1.0\n\n", b"\rGET", b" GET"):
            self.assertEqual(self.refuse(data).status, 400)

    def test_what_may_still_become_one_is_waited_for(self) -> None:
        for data in (b"\r", b"\r\n", b"\r\n\r", b"G", b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\r\nA: \xff\t"):
            client = Door(echo).client()
            client.send(data)
            self.assertEqual(client.wire.value(), b"")

    def test_too_long_a_head(self) -> None:
        for data in (b"A" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000, b"GET /" + b"a" * 40_000):
            self.assertEqual(self.refuse(data).status, 400)

    def test_after_a_good_one(self) -> None:
        client = Door(echo).client()
        client.send(GET % 1 + b"garbage\r\n\r\n" + GET % 2)
        self.assertEqual(client.statuses, [200, 400])

    def test_no_word_of_the_request_is_repeated(self) -> None:
        answer = self.refuse(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization Basic c2VjcmV0\r\n\r\n")
        self.assertNotIn(b"c2VjcmV0", answer.body)


class HandingOver(SynchronousTestCase):
    def setUp(self) -> None:
        self.dialled: Deferred[None] = Deferred()
        self.taken: tuple[Any, bytes] | None = None

        async def handle(request: Request) -> None:
            await self.dialled
            self.taken = request.detach()
            request.write(b"not ours any more")

        self.door = Door(handle)
        self.client = self.door.client()

    def test_with_early_bytes(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n\x16early")
        self.client.send(b" bytes")
        done = self.door.site.drain()
        self.assertNoResult(done)
        self.dialled.callback(None)
        self.assertEqual(self.taken, (self.client.wire, b"\x16early bytes"))
        self.successResultOf(done)
        self.assertIsNone(self.client.wire.producer)
        self.assertEqual(self.client.wire.value(), b"")
        self.assertFalse(self.client.wire.disconnecting)
        self.assertEqual(self.door.logged, [])
        self.assertEqual(self.door.clock.getDelayedCalls(), [])

    def test_early_bytes_are_bounded(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        for _ in range(MAX_HEAD // 1000 + 1):
            self.client.send(b"x" * 1000)
        self.assertTrue(self.client.wire.paused)
        self.dialled.callback(None)
        assert self.taken is not None
        self.assertEqual(len(self.taken[1]), (MAX_HEAD // 1000 + 1) * 1000)

    def test_a_length_does_not_count(self) -> None:
        """RFC 9110, section 9.3.6: what follows a CONNECT is no body."""
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\nContent-Length: 5\r\n\r\nhello world")
        self.dialled.callback(None)
        assert self.taken is not None
        self.assertEqual(self.taken[1], b"hello world")

    def test_the_client_leaves_before(self) -> None:
        self.client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        self.client.leave()
        self.assertIsNone(self.taken)
        self.assertEqual(len(self.door.logged), 1)


class Ending(SynchronousTestCase):
    def setUp(self) -> None:
        self.slow = Slow()
        self.door = Door(self.slow)

    def test_idle_connections(self) -> None:
        idle, fresh, half = self.door.client(), self.door.client(), self.door.client()
        idle.send(GET % 1)
        self.slow.waiting[0].callback(None)
        half.send(b"GET ")
        done = self.door.site.drain()
        for client in (idle, fresh, half):
            self.assertTrue(client.closed)
            self.assertNoResult(done)
            client.leave()
        self.successResultOf(done)
        self.assertEqual(self.door.clock.getDelayedCalls(), [])

    def test_nobody_there(self) -> None:
        self.successResultOf(self.door.site.drain())

    def test_answers_end_first(self) -> None:
        client = self.door.client()
        client.send(GET % 1 + GET % 2)
        done = self.door.site.drain()
        self.assertFalse(client.wire.disconnecting)
        self.slow.waiting[0].callback(None)
        self.assertTrue(client.closed)
        self.assertEqual(client.answers[0].fields["Connection"], "close")
        client.leave()
        self.successResultOf(done)
        self.assertEqual(len(self.door.logged), 1)

    def test_an_answer_under_way(self) -> None:
        downloads = Downloads(2000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await downloads(request)

        door = Door(handle)
        client = door.client()
        client.send(GET % 1)
        door.site.drain()
        client.read_on()
        self.assertEqual(len(client.answers[0].body), 2000)
        self.assertTrue(client.closed)

    def test_twice(self) -> None:
        client = self.door.client()
        client.send(GET % 1)
        one, other = self.door.site.drain(), self.door.site.drain()
        self.slow.waiting[0].callback(None)
        client.leave()
        self.successResultOf(one)
        self.successResultOf(other)

    def test_while_lingering(self) -> None:
        client = self.door.client()
        client.send(b"\x16")
        self.door.site.drain()
        self.assertFalse(client.wire.disconnecting)
        self.door.clock.advance(5)
        self.assertTrue(client.closed)

    def test_abort(self) -> None:
        clients = [self.door.client(), self.door.client()]
        clients[0].send(GET % 1)
        self.assertEqual(self.door.site.abort(), 2)
        for client in clients:
            self.assertTrue(client.wire.aborted)
            client.leave()
        self.assertEqual([type(error) for error in self.slow.ended], [CancelledError])
        self.assertEqual(len(self.door.logged), 1)
        self.assertEqual(self.door.site.abort(), 0)

    def test_drain_given_up(self) -> None:
        client = self.door.client()
        client.send(GET % 1)
        done = self.door.site.drain().addTimeout(25, self.door.clock)
        self.door.clock.advance(25)
        self.failureResultOf(done)
        self.door.site.abort()
        client.leave()
