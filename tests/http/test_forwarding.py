"""Forwarding between a server connection and an upstream connection, both on in-memory transports."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import UNKNOWN_LENGTH

from dockerproxy.http.forwarding import RequestBodyProducer, forward_response, forwarded_fields, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.upstream.body_writer import framing_field
from dockerproxy.upstream.connection import OutgoingRequest, UpstreamConnection, UpstreamTimeouts
from tests.http.support.in_memory import GET, InMemoryClient, InMemoryServer, RecordingTransport, parse_responses

PUT_WITH_LENGTH = b"PUT /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
PUT_CHUNKED = b"PUT /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class ForwardingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.server = InMemoryServer(self.handle)
        self.client = self.server.client()
        self.upstream = RecordingTransport()
        self.connection = UpstreamConnection(self.server.clock, "a:80", None, UpstreamTimeouts(), self, "key")
        self.connection.makeConnection(self.upstream)
        self.outcomes: list[BaseException | None] = []

    def on_connection_idle(self, connection: UpstreamConnection) -> None: ...

    def on_connection_lost(self, connection: UpstreamConnection) -> None: ...

    async def handle(self, request: Request) -> None:
        body = request_body_producer(request)
        framing = "" if body is None else "{}: {}\r\n".format(*framing_field(body))
        head = f"{request.method} {request.path}\r\n{framing}\r\n".encode()
        try:
            response = await self.connection.exchange(OutgoingRequest(request.method, "http://a/", head, body))
            await forward_response(request, response, forwarded_fields(response.headers))
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append(None)

    def feed_response(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    # Request
    def test_request_body_is_streamed(self) -> None:
        self.client.send(PUT_WITH_LENGTH % 11)
        self.assertEqual(self.upstream.value(), b"PUT /1\r\nContent-Length: 11\r\n\r\n")
        for piece in (b"h", b"ello ", b"worl"):
            self.upstream.clear()
            self.client.send(piece)
            self.assertEqual(self.upstream.value(), piece)
        self.client.send(b"d" + GET % 2)
        self.assertTrue(self.upstream.value().endswith(b"d"))
        self.feed_response(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(self.client.statuses, [201])
        self.assertTrue(self.upstream.value().endswith(b"GET /2\r\n\r\n"))

    def test_chunked_request_body_is_streamed(self) -> None:
        self.client.send(PUT_CHUNKED)
        self.client.send(b"3\r\nhel")
        self.assertEqual(self.upstream.value(), b"PUT /1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n")
        self.client.send(b"\r\n2\r\nlo\r\n0\r\nA: b\r\n\r\n")
        self.assertTrue(self.upstream.value().endswith(b"hel\r\n2\r\nlo\r\n0\r\n\r\n"))

    def test_slow_upstream_pauses_the_client(self) -> None:
        self.client.send(PUT_WITH_LENGTH % 3_000_000)
        self.client.send(b"x" * 1000)
        sent = 1000
        assert self.upstream.producer is not None
        self.upstream.producer.pauseProducing()
        while not self.client.transport.paused:
            self.client.send(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 400_000)
        self.assertLess(len(self.upstream.value()), 20_000)
        self.upstream.producer.resumeProducing()
        self.assertFalse(self.client.transport.paused)
        self.assertGreater(len(self.upstream.value()), sent)
        self.client.send(b"x" * (3_000_000 - sent))
        self.feed_response(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(self.client.statuses, [201])

    def test_early_refusal_of_a_long_request_body_is_forwarded(self) -> None:
        self.client.send(PUT_WITH_LENGTH % 1_000_000 + b"x" * 1000)
        self.feed_response(b"HTTP/1.1 413 Too large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n")
        (response,) = self.client.responses
        self.assertEqual((response.status, response.body), (413, b"no\n"))
        self.assertEqual(response.fields["Connection"], "close")
        before = len(self.upstream.value())
        self.client.send(b"x" * 100_000)
        self.assertEqual(len(self.upstream.value()), before)
        self.assertFalse(self.client.transport.disconnecting)  # lingers, because the client may still be sending
        self.server.clock.advance(5)
        self.assertTrue(self.client.closed_cleanly)
        self.assertTrue(self.upstream.disconnecting)

    def test_rest_of_a_short_request_body_is_discarded(self) -> None:
        self.client.send(PUT_WITH_LENGTH % 10 + b"hello")
        self.feed_response(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        self.client.send(b"world")
        self.assertEqual(self.client.statuses, [401])
        self.assertFalse(self.client.transport.disconnecting)

    def test_broken_request_framing_is_a_bad_request(self) -> None:
        self.client.send(PUT_CHUNKED + b"3\r\nhel\r\n")
        self.client.send(b"zz\r\n")
        self.assertEqual(self.client.statuses, [400])
        self.assertTrue(self.upstream.disconnecting)
        self.assertFalse(self.upstream.value().endswith(b"0\r\n\r\n"))

    def test_disconnect_during_request_body_aborts_upstream(self) -> None:
        for head in (PUT_WITH_LENGTH % 10, PUT_CHUNKED + b"5\r\n"):
            self.setUp()
            self.client.send(head + b"hello")
            self.client.disconnect()
            self.assertTrue(self.upstream.aborted)
            self.assertFalse(self.upstream.value().endswith(b"0\r\n\r\n"))
            self.assertEqual([type(error) for error in self.outcomes], [ClientDisconnected])
            self.assertEqual(len(self.server.logged), 1)

    def test_upstream_disconnect_during_request_body_is_a_502(self) -> None:
        self.client.send(PUT_WITH_LENGTH % 10 + b"hello")
        self.connection.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.client.statuses, [502])

    # Response
    def get(self, response: bytes, head: bytes = GET % 1) -> None:
        self.client.send(head)
        self.feed_response(response)

    def test_response_body_is_streamed(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nA: b\r\nConnection: x\r\nX: y\r\n\r\n")
        for piece in (b"h", b"ello ", b"worl", b"d"):
            self.feed_response(piece)
            self.assertTrue(self.client.transport.value().endswith(piece))
        self.assertEqual(self.outcomes, [None])
        self.assertEqual(self.client.responses[0].body, b"hello world")
        self.assertNotIn("x", self.client.responses[0].fields)

    def test_response_framing_is_preserved(self) -> None:
        for response, body, fields in (
            (b"Content-Length: 5\r\n\r\nhello", b"hello", {"Content-Length": "5"}),
            (b"Content-Length: 0\r\n\r\n", b"", {"Content-Length": "0"}),
            (
                b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
                b"hello",
                {"Transfer-Encoding": "chunked"},
            ),
        ):
            self.setUp()
            self.get(b"HTTP/1.1 200 OK\r\nDate: then\r\na: b\r\n" + response)
            (forwarded,) = self.client.responses
            self.assertEqual(forwarded.body, body)
            self.assertNotEqual(forwarded.fields.pop("Date"), "then")
            self.assertEqual({**forwarded.fields, "a": "b", **fields}, forwarded.fields)
            self.assertFalse(self.client.transport.disconnecting)

    def test_response_delimited_by_close_is_forwarded(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\n\r\nhello")
        self.connection.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.client.responses[0].body, b"hello")

    def test_head_response_keeps_content_length(self) -> None:
        """The Content-Length in a response to HEAD is the one that GET would have (RFC 9110, section 8.6)."""
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"HEAD /1 HTTP/1.1\r\nHost: a\r\n\r\n")
        (response,) = parse_responses(self.client.transport.value(), "HEAD")
        self.assertEqual(response.fields["Content-Length"], "500")
        self.assertFalse(self.client.transport.disconnecting)
        self.assertEqual(self.outcomes, [None])

    def test_bodyless_statuses_are_forwarded(self) -> None:
        for status in (204, 304):
            self.setUp()
            self.get(b"HTTP/1.1 %d X\r\nETag: x\r\n\r\n" % status)
            (response,) = self.client.responses
            self.assertEqual((response.status, response.fields["etag"]), (status, "x"))
            self.assertEqual(self.client.transport.value().count(b"\r\n\r\n"), 1)
            self.assertFalse(self.client.transport.disconnecting)

    def test_slow_client_pauses_upstream(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        self.client.stop_reading()
        sent = 0
        while not self.upstream.paused:
            self.feed_response(b"x" * 10_000)
            sent += 10_000
        self.assertLess(sent, 400_000)
        self.assertLess(len(self.client.transport.value()), 20_000)
        self.client.resume_reading()
        self.assertFalse(self.upstream.paused)
        self.feed_response(b"x" * (3_000_000 - sent))
        self.assertEqual(len(self.client.responses[0].body), 3_000_000)

    def test_the_bytes_that_wait_for_a_client_count_for_it(self) -> None:
        shares = self.server.site.budgets.responses.shares
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        self.client.stop_reading()
        self.feed_response(bytes(10_000))
        self.feed_response(bytes(10_000))
        self.assertEqual(shares.held_by(self.client.channel.client), 20_000)
        self.client.disconnect()
        self.assertEqual(shares.used, 0)

    def test_a_client_with_too_many_bytes_waiting_gets_its_responses_in_small_pieces(self) -> None:
        self.server.site.budgets.responses.of_client(self.client.channel.client).add(33 * 1024 * 1024)
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        self.assertFalse(self.upstream.paused)
        self.assertEqual(self.upstream.bufferSize, 16 * 1024)
        self.client.stop_reading()
        self.feed_response(bytes(16 * 1024))
        self.feed_response(b"x")
        self.assertTrue(self.upstream.paused, "the first piece has not been sent yet")
        self.client.resume_reading()
        self.assertFalse(self.upstream.paused)
        self.feed_response(bytes(3_000_000 - 16 * 1024 - 1))
        self.assertEqual(len(self.client.responses[0].body), 3_000_000)

    def test_disconnect_during_response_aborts_upstream(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        self.client.disconnect()
        self.assertTrue(self.upstream.aborted)
        self.assertEqual([(path, status, size) for path, status, size, _ in self.server.logged], [("/1", 200, 5)])

    def test_truncated_upstream_response_aborts(self) -> None:
        for start in (b"Content-Length: 10\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"):
            self.setUp()
            self.get(b"HTTP/1.1 200 OK\r\n" + start)
            self.connection.connectionLost(Failure(ConnectionDone()))
            self.assertTrue(self.client.transport.aborted)
            self.assertFalse(self.client.transport.value().endswith(b"0\r\n\r\n"))

    def test_unforwardable_response_is_aborted(self) -> None:
        """If the response head cannot be sent, the upstream connection is aborted and the client gets a 500."""

        async def handle(request: Request) -> None:
            response = await self.connection.exchange(OutgoingRequest("GET", "http://a/", b"", None))
            await forward_response(request, response, [("A", "\n")])

        self.server.site.handler = handle
        self.client = InMemoryClient(self.server.site)
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertEqual(self.client.statuses, [500])
        self.assertTrue(self.upstream.aborted)


def test_forwarded_fields_omit_framing_and_hop_by_hop_fields() -> None:
    headers = Headers([
        ("Content-Type", "a/b"), ("Content-Length", "5"), ("Date", "now"), ("Connection", "close, X-Hop"),
        ("X-Hop", "1"), ("Transfer-Encoding", "chunked"), ("Docker-Content-Digest", "sha256:0"),
    ])  # fmt: skip
    assert forwarded_fields(headers) == [("content-type", "a/b"), ("docker-content-digest", "sha256:0")]


class RequestBodyProducerTests(SynchronousTestCase):
    """RequestBodyProducer used through the IBodyProducer interface."""

    def start_request(self, data: bytes, consumer: Any) -> tuple[RequestBodyProducer, InMemoryClient]:
        bodies: list[RequestBodyProducer] = []

        async def handle(request: Request) -> None:
            body = request_body_producer(request)
            assert body is not None
            bodies.append(body)
            await Deferred()

        client = InMemoryServer(handle).client()
        client.send(data)
        return bodies[0], client

    def test_length_is_the_content_length_or_unknown(self) -> None:
        self.assertEqual(self.start_request(PUT_WITH_LENGTH % 7, None)[0].length, 7)
        self.assertIs(self.start_request(PUT_CHUNKED, None)[0].length, UNKNOWN_LENGTH)

    def test_no_producer_without_a_body(self) -> None:
        bodies: list[RequestBodyProducer | None] = []

        async def handle(request: Request) -> None:
            bodies.append(request_body_producer(request))
            request.respond(200, [])

        InMemoryServer(handle).client().send(GET % 1 + PUT_WITH_LENGTH % 0)
        self.assertEqual(bodies, [None, None])

    def test_stop_producing_within_write(self) -> None:
        """After stopProducing the Deferred never fires (IBodyProducer) and nothing more is read."""

        class RecordingConsumer:
            def __init__(self) -> None:
                self.body: RequestBodyProducer | None = None
                self.chunks: list[bytes] = []

            def write(self, data: bytes) -> None:
                self.chunks.append(data)
                if data == b"stop":
                    assert self.body is not None
                    self.body.stopProducing()

        for pieces in ((b"one", b"stop", b"more"), (b"stop", b"more")):
            for with_head in (False, True):
                consumer = RecordingConsumer()
                head = PUT_WITH_LENGTH % len(b"".join(pieces))
                body, client = self.start_request(head + (pieces[0] if with_head else b""), consumer)
                consumer.body = body
                done = body.startProducing(consumer)  # type: ignore[arg-type]
                for piece in pieces[1 if with_head else 0 :]:
                    client.send(piece)
                self.assertEqual(consumer.chunks, list(pieces[:-1]))
                self.assertNoResult(done)
                body.stopProducing()
                body.resumeProducing()

    def test_stop_producing_while_waiting(self) -> None:
        consumer = RecordingTransport()
        body, client = self.start_request(PUT_WITH_LENGTH % 10, consumer)
        done = body.startProducing(consumer)
        body.stopProducing()
        client.send(b"hello")
        self.assertEqual(consumer.value(), b"")
        self.assertNoResult(done)

    def test_pause_and_resume_producing(self) -> None:
        consumer = RecordingTransport()
        body, client = self.start_request(PUT_WITH_LENGTH % 10, consumer)
        done = body.startProducing(consumer)
        body.pauseProducing()
        body.pauseProducing()
        client.send(b"hello")
        client.send(b"w")  # at most one piece is written after a pause
        self.assertEqual(consumer.value(), b"hello")
        body.resumeProducing()
        body.resumeProducing()
        client.send(b"orld")
        self.assertEqual(consumer.value(), b"helloworld")
        self.successResultOf(done)
