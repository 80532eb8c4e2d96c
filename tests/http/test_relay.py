"""A request passed on and its answer passed back: our server's side on one wire, our client's side on another."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import UNKNOWN_LENGTH

from dockerproxy.http.headers import Headers
from dockerproxy.http.relay import RequestBody, relay, relayed_fields, request_body
from dockerproxy.http.request import ClientGone, Request
from dockerproxy.upstream.connection import Connection, Outgoing, Timeouts
from dockerproxy.upstream.sending import framing_field
from tests.http.kit.in_memory import GET, Client, Door, Wire, answers

LENGTH = b"PUT /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"PUT /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class Relaying(SynchronousTestCase):
    def setUp(self) -> None:
        self.door = Door(self.handle)
        self.client = self.door.client()
        self.upstream = Wire()
        self.connection = Connection(self.door.clock, "a:80", None, Timeouts(), self, "key")
        self.connection.makeConnection(self.upstream)
        self.ended: list[BaseException | None] = []

    def released(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...

    async def handle(self, request: Request) -> None:
        body = request_body(request)
        framing = "" if body is None else "{}: {}\r\n".format(*framing_field(body))
        head = f"{request.method} {request.path}\r\n{framing}\r\n".encode()
        try:
            answer = await self.connection.exchange(Outgoing(request.method, "http://a/", head, body))
            await relay(request, answer, relayed_fields(answer.headers))
        except BaseException as error:
            self.ended.append(error)
            raise
        self.ended.append(None)

    def answer(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    # the request

    def test_it_goes_up_as_it_comes(self) -> None:
        self.client.send(LENGTH % 11)
        self.assertEqual(self.upstream.value(), b"PUT /1\r\nContent-Length: 11\r\n\r\n")
        for piece in (b"h", b"ello ", b"worl"):
            self.upstream.clear()
            self.client.send(piece)
            self.assertEqual(self.upstream.value(), piece)
        self.client.send(b"d" + GET % 2)
        self.assertTrue(self.upstream.value().endswith(b"d"))
        self.answer(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(self.client.statuses, [201])
        self.assertTrue(self.upstream.value().endswith(b"GET /2\r\n\r\n"))

    def test_it_goes_up_in_chunks(self) -> None:
        self.client.send(CHUNKED)
        self.client.send(b"3\r\nhel")
        self.assertEqual(self.upstream.value(), b"PUT /1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n")
        self.client.send(b"\r\n2\r\nlo\r\n0\r\nA: b\r\n\r\n")
        self.assertTrue(self.upstream.value().endswith(b"hel\r\n2\r\nlo\r\n0\r\n\r\n"))

    def test_the_client_is_held_back(self) -> None:
        self.client.send(LENGTH % 3_000_000)
        self.client.send(b"x" * 1000)
        sent = 1000
        assert self.upstream.producer is not None
        self.upstream.producer.pauseProducing()
        while not self.client.wire.paused:
            self.client.send(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 400_000)
        self.assertLess(len(self.upstream.value()), 20_000)
        self.upstream.producer.resumeProducing()
        self.assertFalse(self.client.wire.paused)
        self.assertGreater(len(self.upstream.value()), sent)
        self.client.send(b"x" * (3_000_000 - sent))
        self.answer(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(self.client.statuses, [201])

    def test_it_is_refused_while_the_client_still_sends(self) -> None:
        self.client.send(LENGTH % 1_000_000 + b"x" * 1000)
        self.answer(b"HTTP/1.1 413 Too large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n")
        (answer,) = self.client.answers
        self.assertEqual((answer.status, answer.body), (413, b"no\n"))
        self.assertEqual(answer.fields["Connection"], "close")
        before = len(self.upstream.value())
        self.client.send(b"x" * 100_000)
        self.assertEqual(len(self.upstream.value()), before)
        self.assertFalse(self.client.wire.disconnecting)  # it may still be sending, and not have read the answer
        self.door.clock.advance(5)
        self.assertTrue(self.client.closed)
        self.assertTrue(self.upstream.disconnecting)

    def test_what_is_left_of_a_short_one_is_thrown_away(self) -> None:
        self.client.send(LENGTH % 10 + b"hello")
        self.answer(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        self.client.send(b"world")
        self.assertEqual(self.client.statuses, [401])
        self.assertFalse(self.client.wire.disconnecting)

    def test_broken_framing_is_the_clients_fault(self) -> None:
        self.client.send(CHUNKED + b"3\r\nhel\r\n")
        self.client.send(b"zz\r\n")
        self.assertEqual(self.client.statuses, [400])
        self.assertTrue(self.upstream.disconnecting)
        self.assertFalse(self.upstream.value().endswith(b"0\r\n\r\n"))

    def test_the_client_leaves_in_its_body(self) -> None:
        for head in (LENGTH % 10, CHUNKED + b"5\r\n"):
            self.setUp()
            self.client.send(head + b"hello")
            self.client.leave()
            self.assertTrue(self.upstream.aborted)
            self.assertFalse(self.upstream.value().endswith(b"0\r\n\r\n"))
            self.assertEqual([type(error) for error in self.ended], [ClientGone])
            self.assertEqual(len(self.door.logged), 1)

    def test_upstream_leaves_in_the_body(self) -> None:
        self.client.send(LENGTH % 10 + b"hello")
        self.connection.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.client.statuses, [502])

    # the answer

    def get(self, answer: bytes, head: bytes = GET % 1) -> None:
        self.client.send(head)
        self.answer(answer)

    def test_it_comes_back_as_it_comes(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nA: b\r\nConnection: x\r\nX: y\r\n\r\n")
        for piece in (b"h", b"ello ", b"worl", b"d"):
            self.answer(piece)
            self.assertTrue(self.client.wire.value().endswith(piece))
        self.assertEqual(self.ended, [None])
        self.assertEqual(self.client.answers[0].body, b"hello world")
        self.assertNotIn("x", self.client.answers[0].fields)

    def test_framing(self) -> None:
        for answer, body, fields in (
            (b"Content-Length: 5\r\n\r\nhello", b"hello", {"Content-Length": "5"}),
            (b"Content-Length: 0\r\n\r\n", b"", {"Content-Length": "0"}),
            (
                b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
                b"hello",
                {"Transfer-Encoding": "chunked"},
            ),
        ):
            self.setUp()
            self.get(b"HTTP/1.1 200 OK\r\nDate: then\r\na: b\r\n" + answer)
            (got,) = self.client.answers
            self.assertEqual(got.body, body)
            self.assertNotEqual(got.fields.pop("Date"), "then")
            self.assertEqual(got.fields, {"a": "b", **fields})
            self.assertFalse(self.client.wire.disconnecting)

    def test_an_answer_that_ends_with_the_connection(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\n\r\nhello")
        self.connection.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.client.answers[0].body, b"hello")

    def test_head(self) -> None:
        """Its length is that of what GET would give (RFC 9110, section 8.6), not that of nothing."""
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"HEAD /1 HTTP/1.1\r\nHost: a\r\n\r\n")
        (answer,) = answers(self.client.wire.value(), "HEAD")
        self.assertEqual(answer.fields["Content-Length"], "500")
        self.assertFalse(self.client.wire.disconnecting)
        self.assertEqual(self.ended, [None])

    def test_without_content(self) -> None:
        for status in (204, 304):
            self.setUp()
            self.get(b"HTTP/1.1 %d X\r\nETag: x\r\n\r\n" % status)
            (answer,) = self.client.answers
            self.assertEqual((answer.status, answer.fields["etag"]), (status, "x"))
            self.assertEqual(self.client.wire.value().count(b"\r\n\r\n"), 1)
            self.assertFalse(self.client.wire.disconnecting)

    def test_upstream_is_held_back(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        self.client.stop_reading()
        sent = 0
        while not self.upstream.paused:
            self.answer(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 400_000)
        self.assertLess(len(self.client.wire.value()), 20_000)
        self.client.read_on()
        self.assertFalse(self.upstream.paused)
        self.answer(b"x" * (3_000_000 - sent))
        self.assertEqual(len(self.client.answers[0].body), 3_000_000)

    def test_the_client_leaves_in_the_answer(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        self.client.leave()
        self.assertTrue(self.upstream.aborted)
        self.assertEqual([(path, status, size) for path, status, size, _ in self.door.logged], [("/1", 200, 5)])

    def test_upstream_breaks_off(self) -> None:
        for start in (b"Content-Length: 10\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"):
            self.setUp()
            self.get(b"HTTP/1.1 200 OK\r\n" + start)
            self.connection.connectionLost(Failure(ConnectionDone()))
            self.assertTrue(self.client.wire.aborted)
            self.assertFalse(self.client.wire.value().endswith(b"0\r\n\r\n"))

    def test_an_answer_that_cannot_be_passed_on(self) -> None:
        """What upstream sends is let go of, and the client is told."""

        async def handle(request: Request) -> None:
            answer = await self.connection.exchange(Outgoing("GET", "http://a/", b"", None))
            await relay(request, answer, [("A", "\n")])

        self.door.site.handler = handle
        self.client = Client(self.door.site)
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertEqual(self.client.statuses, [500])
        self.assertTrue(self.upstream.aborted)


def test_the_fields_that_are_passed_on() -> None:
    headers = Headers([
        ("Content-Type", "a/b"), ("Content-Length", "5"), ("Date", "now"), ("Connection", "close, X-Hop"),
        ("X-Hop", "1"), ("Transfer-Encoding", "chunked"), ("Docker-Content-Digest", "sha256:0"),
    ])  # fmt: skip
    assert relayed_fields(headers) == [("content-type", "a/b"), ("docker-content-digest", "sha256:0")]


class Bodies(SynchronousTestCase):
    """`RequestBody` as whoever sends requests uses it."""

    def begin(self, data: bytes, consumer: Any) -> tuple[RequestBody, Client]:
        bodies: list[RequestBody] = []

        async def handle(request: Request) -> None:
            body = request_body(request)
            assert body is not None
            bodies.append(body)
            await Deferred()

        client = Door(handle).client()
        client.send(data)
        return bodies[0], client

    def test_length(self) -> None:
        self.assertEqual(self.begin(LENGTH % 7, None)[0].length, 7)
        self.assertIs(self.begin(CHUNKED, None)[0].length, UNKNOWN_LENGTH)

    def test_none(self) -> None:
        bodies: list[RequestBody | None] = []

        async def handle(request: Request) -> None:
            bodies.append(request_body(request))
            request.answer(200, [])

        Door(handle).client().send(GET % 1 + LENGTH % 0)
        self.assertEqual(bodies, [None, None])

    def test_stop(self) -> None:
        """Its Deferred never fires then (IBodyProducer), and nothing more is read."""

        class Consumer:
            def __init__(self) -> None:
                self.body: RequestBody | None = None
                self.got: list[bytes] = []

            def write(self, data: bytes) -> None:
                self.got.append(data)
                if data == b"stop":
                    assert self.body is not None
                    self.body.stopProducing()

        for pieces in ((b"one", b"stop", b"more"), (b"stop", b"more")):
            for at_once in (False, True):
                consumer = Consumer()
                head = LENGTH % len(b"".join(pieces))
                body, client = self.begin(head + (pieces[0] if at_once else b""), consumer)
                consumer.body = body
                done = body.startProducing(consumer)  # type: ignore[arg-type]
                for piece in pieces[1 if at_once else 0 :]:
                    client.send(piece)
                self.assertEqual(consumer.got, list(pieces[:-1]))
                self.assertNoResult(done)
                body.stopProducing()
                body.resumeProducing()

    def test_stop_while_it_waits(self) -> None:
        consumer = Wire()
        body, client = self.begin(LENGTH % 10, consumer)
        done = body.startProducing(consumer)
        body.stopProducing()
        client.send(b"hello")
        self.assertEqual(consumer.value(), b"")
        self.assertNoResult(done)

    def test_pause(self) -> None:
        consumer = Wire()
        body, client = self.begin(LENGTH % 10, consumer)
        done = body.startProducing(consumer)
        body.pauseProducing()
        body.pauseProducing()
        client.send(b"hello")
        client.send(b"w")  # one piece may be on its way, no more
        self.assertEqual(consumer.value(), b"hello")
        body.resumeProducing()
        body.resumeProducing()
        client.send(b"orld")
        self.assertEqual(consumer.value(), b"helloworld")
        self.successResultOf(done)
